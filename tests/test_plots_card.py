"""The model card of a run, held against its files by parsers of YAML and Markdown."""

import dataclasses
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from conftest import make_run
from markdown_it import MarkdownIt
from PIL import Image

from ddpm_jax import config, data, options
from ddpm_jax.commands import evaluate, sample, train
from ddpm_jax.plots import __main__ as plots
from ddpm_jax.plots import album, card, records
from ddpm_jax.run import checkpoint

pytest.importorskip("matplotlib")

ODD = "a|b_c_ <i>&amp; `e` $h$ ~g~"  # a name that Markdown would take for more than text
WORSE = "*d* [f](g) # \\_ | x"  # and one of a setting
ROWS = [  # step, loss, images_per_second, seconds_per_step
    (100, 0.51234567, 30.0, 0.5),
    (200, None, None, None),
    (300, 0.25, 10.0, 2.0),
    (600, 0.125, 20.0, 4.0),
    (1000, 0.0625, 40.0, 8.0),
    (1100, 0.03125, 90.0, 16.0),
]
SETTINGS = {"seed": 7, "sampler": "dd|im", "reference": {"source": "folder:/home/me/my pictures/cats", "num": 77}}
CURVE = {"t": [3, 2, 1], "rate": [0.1, 0.5, 3.0], "rmse": [90.0, 20.0, 1.0]}
EVALUATION = {
    "metrics": {
        "nll": {
            "value": 4.75265,
            "standard_error": 0.0166,
            "unit": "bits/dim",
            "settings": {"seed": 7, "steps": 13},
            "curve": CURVE,
        },
        "KID-x": {
            "value": 3.25,
            "standard_error": None,
            "unit": "x 1000",
            "real": {"value": 0.125, "standard_error": 0.5},
            "subsets": WORSE,
            "settings": SETTINGS,
        },
    },
    "num": 1717,
    "samples": "~/out/samples.npz",
    "versions": {"jax": "0.0.7"},
}
START = {
    "argv": ["/opt/train.py"],
    "devices": "9 x abacus",
    "versions": {"jax": "0.0.3"},
    "git": "0ff1ce",
    "none": None,
}
TIMES = "2026-01-02T03:04:05+00:00", "2026-01-03T03:04:05+00:00"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run with all its files, under an odd name, whose step 6 knows its data."""
    folder = tmp_path_factory.mktemp("card") / ODD
    folder.mkdir()
    _, parts, _, _ = make_run(folder)
    init_state = parts.init_state
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init_state))
    meta = {"config": dataclasses.asdict(parts.config), "shape": parts.shape}
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        checkpoint.save(manager, state._replace(step=np.int32(6)), data=fingerprint(parts), **meta)
        checkpoint.finish(manager)
    names = "step", "loss", "images_per_second", "seconds_per_step"
    lines = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in ROWS]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "run.json").write_text(json.dumps([{"time": time, **START} for time in TIMES]))
    (folder / "config.json").write_text(config.to_json(parts.config))
    (folder / "samples").mkdir()
    for step in (5, 1000):
        Image.new("L", (20, 10)).save(folder / "samples" / f"step_{step:09}.png")
    return folder


def fingerprint(parts):
    return data.fingerprint(data.load(**vars(parts.config.data)))


@pytest.fixture(scope="module")
def made(whole):
    """The card of that run."""
    assert plots.main([whole, "--card", "--curves"]) == 0
    return (whole / "card.md").read_text()


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("plots", "card.md"))


def parsed(text):
    """(front matter, words, tables, codes, pictures) as they are shown; fails where anything is taken for HTML."""
    _, front, body = text.split("---\n", 2)
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    shown = SimpleNamespace(front=yaml.safe_load(front), words=[], tables=[], codes=[], pictures=[], links=[])
    for token in tokens:
        assert not token.type.startswith("html")
        if token.type == "table_open":
            shown.tables.append([])
        elif token.type == "tr_open":
            shown.tables[-1].append([])
        elif token.type == "fence":
            shown.codes.append(token.content)
        elif token.type == "inline":
            parts = token.children
            assert {part.type for part in parts} <= {
                *("text", "text_special", "softbreak", "image", "link_open", "link_close", "code_inline")
            }
            shown.words.append("".join(part.content for part in parts))
            shown.pictures += [part.attrs["src"] for part in parts if part.type == "image"]
            shown.links += [part.attrs["href"] for part in parts if part.type == "link_open"]
            if token.level >= 4 and shown.tables:  # in a cell
                shown.tables[-1][-1].append(shown.words.pop())
    return shown


def test_front_matter(made):
    assert parsed(made).front == {
        "library_name": "ddpm_jax",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "ddpm", "jax"],
    }


def test_title_and_picture(made, whole):
    shown = parsed(made)
    assert shown.words[0] == ODD
    assert shown.pictures == ["samples/step_000001000.png"]
    assert (whole / shown.pictures[0]).is_file()
    assert shown.links == ["https://arxiv.org/abs/2006.11239"]


def test_model_and_data(made, whole):
    """Parameters as the checkpoint has them, images as the file has them."""
    _, trees = checkpoint.load(whole / "checkpoints", ["params"])
    count = sum(leaf.size for leaf in jax.tree.leaves(trees))
    images = np.load(whole / "data.npz")["images"]
    size = "x".join(map(str, images.shape[1:]))
    words = "\n".join(parsed(made).words)
    assert f"A U-Net of {count:,} parameters that generates images of {size} " in words
    assert "at step 6. Parameterization eps, schedule cosine, T 12, variance fixedlarge." in words
    assert f"npz:…/data.npz: {len(images)} images, fingerprint {len(images)}x{size}-" in words


def test_training(made):
    shown = parsed(made)
    words = "\n".join(shown.words)
    seconds = sum((b[0] - a[0]) * b[3] for a, b in zip([(0,), *ROWS], ROWS, strict=False) if b[3])
    assert seconds == 50 + 200 + 1200 + 3200 + 1600
    assert "The logged steps took 1:44:10 (h:mm:ss), with a median of 30 images/s" in words
    assert "800,000 steps of 128 images, seed 0." in words
    assert f"Started {', '.join(TIMES)}: devices 9 x abacus, versions (jax 0.0.3), git 0ff1ce\n" in words + "\n"
    wanted = [["100", "0.5123"], ["200", "nan"], ["600", "0.125"], ["1,000", "0.0625"], ["1,100", "0.03125"]]
    assert shown.tables[0] == [["step", "loss"], *wanted]


def test_evaluation(made):
    """A setting that all metrics share is told once, below the table."""
    shown = parsed(made)
    assert shown.tables[1] == [
        ["metric", "value", "with"],
        ["nll", "4.7527\xa0±\xa00.0166 bits/dim", "steps 13"],
        [
            "KID-x",
            "3.2500 x 1000 (real images 0.1250\xa0±\xa00.5000)",
            f"subsets {WORSE}, sampler dd|im, reference (source folder:…/cats, num 77)",
        ],
    ]
    assert "Settings of all metrics: num 1717, samples …/samples.npz, versions (jax 0.0.7), seed 7." in shown.words


def test_config(made, whole):
    """Each field that is not as in Config(), by the JSON of both."""
    here, default = (json.loads(config.to_json(c)) for c in (config.load(whole / "config.json"), config.Config()))
    wanted = [f"{a}.{b}" for a in here for b in here[a] if here[a][b] != default[a][b]]
    head, *rows = parsed(made).tables[2]
    assert head == ["field", "here", "default"]
    assert [row[0] for row in rows] == wanted
    assert ["model.multipliers", "1", "1,2,2,2"] in rows
    assert ["data.source", "npz:…/data.npz", "tfds:cifar10"] in rows


def numbers(tree):
    """All numbers in a tree of JSON, also those in its texts."""
    if isinstance(tree, dict):
        return [number for part in tree.items() for number in numbers(part)]
    if isinstance(tree, (list, tuple)):
        return [number for part in tree for number in numbers(part)]
    if isinstance(tree, str):
        return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", tree)]
    return [] if tree is None or isinstance(tree, bool) else [float(tree)]


def test_every_number_is_in_the_files(made, whole):
    """Up to rounding; but for the time, its unit, the paper, and the number of parameters, which others check."""
    meta, trees = checkpoint.load(whole / "checkpoints", ["params"])
    files = [json.loads((whole / f"{name}.json").read_text()) for name in ("config", "run", "evaluation")]
    files += [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    known = numbers([files, meta, dataclasses.asdict(config.Config()), [path.name for path in whole.glob("samples/*")]])
    known += [float(sum(leaf.size for leaf in jax.tree.leaves(trees)))]
    spelled = {f"{number:{form}}" for number in known for form in ("", ".4g", ".4f", ".6g", ",.0f", ".0f")}
    body = made.split("---\n", 2)[2].replace(card.PAPER, "").replace("1:44:10", "")
    found = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", body)
    assert len(found) > 60
    assert [number for number in found if number not in spelled and (number.lstrip("0") or "0") not in spelled] == []


def test_no_path_of_this_machine(made, whole, tmp_path):
    assert str(whole.parent) not in made
    assert "my pictures" not in made
    assert re.findall(r"(?:^|[\s=:('\"])(?:~\w*)?/\S*", made.replace("https://", "")) == []


def test_paths_are_left_with_their_last_name(copy, call):
    told = {
        "folder:/a b/c/d e": "folder:…/d e",
        "npz:~/x.npz": "npz:…/x.npz",
        "~somebody/x/y/": "…/y/",
        "/x": "…/x",
        "--dump=/a/b": "--dump=…/b",
        "folder:package/img/64": "folder:package/img/64",
        "bits/dim": "bits/dim",
    }
    (copy / "run.json").write_text(json.dumps([{"time": "then", "argv": [], "what": [*told], "in": {"it": "/y/z"}}]))
    assert call(plots, copy, "--card", "--curves")[0] == 0
    wanted = f"Started then: what {','.join(told.values())}, in (it …/z)"
    assert wanted in parsed((copy / "card.md").read_text()).words


def test_commands(made, whole, call, monkeypatch):
    """They are those of the folder as it was typed, and of runs/NAME where that begins at the root."""
    monkeypatch.chdir(whole.parent)
    assert call(plots, ODD, "--card", "--curves")[0] == 0
    for text, folder in ((made, f"runs/{ODD}"), ((whole / "card.md").read_text(), ODD)):
        drawn, again = (shlex.split(code)[4:] for code in parsed(text).codes)
        args = options.parse(sample.Args, drawn, "", "")
        assert (args.workdir, args.step, args.num, args.seed, args.steps) == (folder, 6, 64, 0, 12)
        assert again[0] == f"--config={folder}/config.json"
    assert options.parse(train.Args, again, "", "", config.load).config == config.load(f"{ODD}/config.json")


def test_neither_network_nor_data_nor_compiling(copy, call, compilations, monkeypatch):
    def load(**_):
        raise AssertionError

    monkeypatch.setattr(album.data, "load", load)
    (copy / "data.npz").unlink()
    call(plots, copy, "--curves")
    with compilations() as compiled:
        code, said, _ = call(plots, copy, "--curves", "--card")
        assert compiled() == 0
    assert code == 0
    assert f"wrote {copy / 'card.md'}\n" in said


def test_a_run_with_nothing_but_a_checkpoint(run, call, tmp_path):
    """Nothing is evaluated, there are no grids, no metrics, no run.json, and the checkpoint does not know its data."""
    copy = shutil.copytree(run[0], tmp_path / "run")
    assert call(plots, copy, "--curves", "--card")[0] == 0
    shown = parsed((copy / "card.md").read_text())
    words = "\n".join(shown.words)
    for missing in (
        "There is no grid of samples yet.",
        "the number of images is not known",
        "metrics.jsonl has no rows yet.",
        "there is no run.json",
        "Not evaluated: there is no evaluation.json.",
    ):
        assert missing in words, missing
    assert len(shown.tables) == 1
    asked = [shlex.split(code)[4:] for code in shown.codes if " evaluate " in code]
    assert [options.parse(evaluate.Args, words, "", "").workdir for words in asked] == ["runs/run"]


def test_a_run_resumed_elsewhere(copy, call):
    starts = [{"time": time, **START} for time in TIMES]
    (copy / "run.json").write_text(json.dumps([*starts, {**starts[0], "time": "later", "devices": "1 x slide rule"}]))
    assert call(plots, copy, "--curves", "--card")[0] == 0
    begun = [words for words in parsed((copy / "card.md").read_text()).words if words.startswith("Started")]
    assert [words.partition(", versions")[0] for words in begun] == [
        f"Started {', '.join(TIMES)}: devices 9 x abacus",
        "Started later: devices 1 x slide rule",
    ]


def test_metrics_of_a_run_at_work_and_damaged_ones(copy, call, made):
    """A last line that is not finished does not count; a damaged one is an error as for the plots."""
    whole = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(whole + '{"step": 1200, "lo')
    assert call(plots, copy, "--curves", "--card")[0] == 0
    assert parsed((copy / "card.md").read_text()).tables == parsed(made).tables
    (copy / "card.md").unlink()
    (copy / "metrics.jsonl").write_text('{"step": 1\n' + whole)
    assert call(plots, copy, "--curves", "--card")[0] == 3
    assert not (copy / "card.md").exists()


def test_metrics_without_times_and_marks(copy, call):
    (copy / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5}\n{"step": 14, "loss": 0.25}\n')
    assert call(plots, copy, "--curves", "--card")[0] == 0
    shown = parsed((copy / "card.md").read_text())
    assert shown.tables[0] == [["step", "loss"], ["14", "0.25"]]
    assert "Their duration is not known." in "\n".join(shown.words)


def test_an_ensemble_has_the_grid_of_its_member(copy, call):
    for path in (copy / "samples").iterdir():
        for member in (0, 1):
            shutil.copy(path, path.with_stem(f"{path.stem}_member_{member}"))
        path.unlink()
    assert call(plots, copy, "--curves", "--card")[0] == 0
    assert parsed((copy / "card.md").read_text()).pictures == ["samples/step_000001000_member_0.png"]


def test_report_and_card_beside_each_other(copy, call, tmp_path):
    out = tmp_path / "out"
    assert call(plots, copy, "--curves", "--card", "--report", f"--out={out}")[0] == 0
    assert {"card.md", "report.html", "loss.svg"} <= {path.name for path in out.iterdir()}
    assert not (copy / "card.md").exists()


def test_a_revision_with_uncommitted_changes_is_told_in_words(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps([{**START, "time": TIMES[0], "git": git} for git in ("0ff1ce-dirty", "0ff1ce", None)]))
    told = [start["git"] for start in records.starts(file)]
    assert told == ["0ff1ce with uncommitted changes", "0ff1ce", None]
