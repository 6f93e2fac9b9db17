"""The command that plots a run and the page it makes, held against the run's files, sample.py and a parser."""

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import T, make_run
from PIL import Image
from plotted import EVALUATION, ODD, STEPS, metrics

from ddpm_jax import errors, images, options
from ddpm_jax.commands import COMMANDS, evaluate, progress, sample, train
from ddpm_jax.config import Config, load, to_json
from ddpm_jax.plots import __main__ as plots
from ddpm_jax.plots import album, figures, records, report, strips

pytest.importorskip("matplotlib")

STARTS = [{"time": "2026-01-02T03:04:05+00:00", "argv": ["train.py", f"--workdir={ODD}"], "devices": "9 x abacus"}]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(folder, Experiment, parameters, images) of a run with checkpoints and nothing else, of an odd name."""
    folder = tmp_path_factory.mktemp("plots") / ODD
    folder.mkdir()
    return make_run(folder)


@pytest.fixture(scope="module")
def whole(bare, tmp_path_factory):
    """The folder of the same run with all its files."""
    folder = tmp_path_factory.mktemp("whole") / ODD
    shutil.copytree(bare[0], folder)
    (folder / "metrics.jsonl").write_text(metrics())
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "run.json").write_text(json.dumps(STARTS))
    (folder / "samples").mkdir()
    for step in range(8):
        Image.new("L", (20, 10), 30 * step).save(folder / "samples" / f"step_{step:09}.png")
    return folder


@pytest.fixture
def broken(whole, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("plots", "report.html"))


@pytest.fixture(scope="module")
def drawn(whole):
    """What one whole call has printed, and the page it has made."""
    assert plots.main([whole, "--report", "--num=3", "--seed=4"]) == 0
    return (whole / "report.html").read_text()


class Page(HTMLParser):
    """Every tag that is opened and when it is closed, its texts, and what is wrong with it."""

    VOID = "meta", "img", "br", "link"

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.faults = [], [], [], []
        self.feed(text)
        self.close()
        self.faults += [f"{tag} is not closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if len(attrs) != len(dict(attrs)):
            self.faults.append(f"{tag} has an attribute twice")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if "svg" not in self.open:
            self.faults.append(f"{tag} closes itself outside of an svg")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"{tag} is closed but not open")

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def handle_pi(self, data):
        self.faults.append(f"<?{data}>")

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture(scope="module")
def page(drawn):
    return Page(drawn)


def test_the_page_is_whole(drawn, page):
    assert page.faults == []
    assert drawn.startswith("<!DOCTYPE html>\n<html lang=")
    assert [name for name in ("html", "head", "body", "title", "h1") if len(page.all(name)) != 1] == []
    assert "prefers-color-scheme: dark" in drawn
    assert figures.GRAY not in drawn
    assert page.all("meta")[1]["content"].startswith("width=device-width")
    names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(names) == len(set(names))
    asked = [value[1:] for _, attrs in page.tags for name, value in attrs.items() if name.endswith("href")]
    asked += re.findall(r"url\(#([^)]*)\)", drawn)
    assert asked
    assert set(asked) <= set(names)


def test_the_page_needs_nothing_else(drawn, page):
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "a"}
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
                assert value.startswith(("data:image/", "#"))
    style = "".join(text for tag, text in page.texts if tag == "style")
    assert not re.search(r"@import|url\((?!#)", style)


def test_the_pictures_of_the_page(whole, page):
    """Those of the folder, which Pillow opens, each with words for those who do not see it."""
    files = {path.name: path.read_bytes() for path in (whole / "plots").iterdir()}
    kinds = {"png": ["denoising", "forward", "grids", "previews"], "gif": ["denoising", "forward"]}
    kinds["svg"] = ["gradient", "loss", "rate_distortion", "schedule"]
    assert set(files) == {f"{name}.{kind}" for kind, names in kinds.items() for name in names}
    shown = [base64.b64decode(attrs["src"].partition(";base64,")[2]) for attrs in page.all("img")]
    assert sorted(shown) == sorted(data for name, data in files.items() if not name.endswith("svg"))
    for data in shown:
        with Image.open(io.BytesIO(data)) as image:
            assert image.n_frames == 1 if image.format == "PNG" else image.n_frames in (T, T + 1)
    captions = {text for tag, text in page.texts if tag == "figcaption"}
    words = [attrs["alt"] for attrs in page.all("img")] + [attrs["aria-label"] for attrs in page.all("svg")]
    assert set(words) == captions
    assert min(map(len, captions)) > 20
    assert [attrs["role"] for attrs in page.all("svg")] == ["img"] * 4


def test_the_words_of_the_page(whole, page):
    words = "".join(text for _, text in page.texts).replace("\N{NO-BREAK SPACE}", " ")
    for said in (
        "4.7527 ± 0.0166 bits/dim",
        "parts (prior 2e-05, steps 3), decoder exact, steps 3",
        "3.2500 x 1000 (real images 0.1250 ± 0.5000)",
        f"sampler ddim, reference (source {ODD}, num 77)",
        "checkpoint_step 5, versions (jax 0.0.7)",
        "2026-01-02T03:04:05+00:00",
        '"parameterization": "eps"',
        "9 x abacus",
        "step 0, step 1, step 2, step 4, step 5, step 7",
    ):
        assert said in words, said
    commands = [shlex.split(line) for tag, text in page.texts if tag == "code" for line in text.splitlines()[:4]]
    assert ["python", "train.py", f"--workdir={ODD}"] in commands
    assert ["python", "-m", "ddpm_jax.plots", str(whole), "--report"] in commands
    assert [attrs for attrs in page.all("details") if "open" in attrs] == []
    differing = page.texts.index(("summary", "Fields that differ from the defaults"))
    assert differing < page.texts.index(("summary", "Full config"))
    assert ("td", "diffusion.schedule") in page.texts
    assert ("td", "diffusion.parameterization") not in page.texts


def test_the_page_of_a_run_with_nothing_but_checkpoints(bare, call):
    code, said, told = call(plots, bare[0], "--report", "--curves")
    assert (code, told) == (0, "")
    page = Page((bare[0] / "report.html").read_text())
    assert page.faults == []
    assert [path.name for path in (bare[0] / "plots").iterdir()] == ["schedule.svg"]
    notes = [text for tag, text in page.texts if tag == "p"]
    for missing in (
        "No grids",
        "No training curves",
        "No rate-distortion curve",
        "Not evaluated",
        "no run.json",
    ):
        assert any(missing in note for note in notes), missing
        assert missing in said or missing in ("Not evaluated", "no run.json")


def test_without_the_data_there_is_a_line(bare, monkeypatch):
    def gone(**_):
        raise errors.DataError("the folder is gone")

    monkeypatch.setattr(album.data, "load", gone)
    (plot,) = album.data_plots(bare[1], 1, 0)
    assert plot.data is None
    assert plot.caption == "No forward process without the data: the folder is gone"


def test_an_evaluation_without_the_bound(linear):
    plots = {plot.file: plot for plot in album.file_plots(linear, [], None, {"metrics": {"mse": {}}})}
    assert plots["rate_distortion.svg"].data is None
    assert "--metrics=nll" in plots["rate_distortion.svg"].caption


def test_another_folder(broken, call, tmp_path):
    before = sorted(broken.rglob("*"))
    assert call(plots, broken, "--curves", "--report", f"--out={tmp_path / 'new' / 'out'}")[0] == 0
    wanted = ["gradient.svg", "grids.png", "loss.svg", "rate_distortion.svg", "report.html", "schedule.svg"]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == wanted
    assert sorted(broken.rglob("*")) == before


def test_the_commands_of_the_page_repeat_the_run_and_its_last_grid(whole, drawn, bare, call, tmp_path):
    """The first of these samples also are at the end of the strips, which were asked for the same seed."""
    folder, parts, params, _ = bare
    parts = parts._replace(config=options.replace(parts.config, {"train.seed": 4}))
    (folder / "config.json").write_text(to_json(parts.config))
    *lines, plotted = map(shlex.split, report.commands(folder, 5, 0, parts.config))
    assert [line[:4] for line in lines] == [["python", "-m", "ddpm_jax", name] for name in COMMANDS]
    again, grid, judged = (line[4:] for line in lines)
    args = options.parse(train.Args, again, "train.py", "", load)
    assert (args.config, Path(args.workdir).exists()) == (parts.config, False)
    assert options.parse(evaluate.Args, judged, "evaluate.py", "").workdir == str(folder)
    assert plotted == ["python", "-m", "ddpm_jax.plots", str(folder), "--report"]

    assert call(sample, *grid, f"--out={tmp_path}")[0] == 0
    progress.make_grid_writer(parts, tmp_path, lambda: None)(SimpleNamespace(ema_params=params), 5)
    there = np.asarray(Image.open(tmp_path / "samples" / "step_000000005.png"))
    np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "grid.png")), there.astype(int), atol=1)
    samples = images.grid(np.load(tmp_path / "samples.npz")["images"][:3], columns=1).astype(int)
    for name in ("denoising.png", "previews.png"):
        strip = np.asarray(Image.open(whole / "plots" / name))
        np.testing.assert_allclose(strip[: len(samples), -4 - samples.shape[1] : -4, :1], samples, atol=1)


def test_the_commands_of_a_member_of_an_ensemble():
    config = options.replace(Config(), {"train.ensemble": 3})
    again, grid, judged, plotted = map(shlex.split, report.commands(Path("runs/three"), 5, 2, config))
    assert "--member=2" not in again  # the training is that of all of them
    for script, words in ((sample, grid[4:]), (evaluate, judged[4:]), (plots, ["--workdir=", *plotted[4:]])):
        assert options.parse(script.Args, words, "", "").member == 2


def test_the_folder_of_a_step_and_other_weights(broken, call):
    code, said, _ = call(plots, f"--workdir={broken / 'checkpoints' / '5'}", "--weights=raw", "--curves")
    assert code == 0
    assert f"step 5 of {broken}, raw weights" in said


def test_metrics_of_a_run_at_work(whole, tmp_path):
    """The last line is not finished yet: it does not count. A file without rows is as none."""
    (tmp_path / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text() + '{"step": 400, "lo')
    assert records.metrics(tmp_path / "metrics.jsonl")["step"].tolist() == list(STEPS)
    (tmp_path / "metrics.jsonl").write_text("")
    assert records.metrics(tmp_path / "metrics.jsonl") is None


def test_the_grids_of_one_member_of_an_ensemble(tmp_path):
    for step in (5, 10):
        for member in (0, 1):
            images.save_png(
                tmp_path / f"step_{step:09}_member_{member}.png", np.full((4, 4, 1), 10 * step + member, np.uint8)
            )
    assert [(step, picture[0, 0, 0]) for step, picture in records.grids(tmp_path, 1)] == [(5, 51), (10, 101)]


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("metrics.jsonl", '{"step": 100}\n{"step": 2\n{"step": 300}\n', "line 2 is damaged; delete that line"),
        ("metrics.jsonl", '{"step": 100, "loss": "low"}\n', "line 1 is damaged"),
        ("metrics.jsonl", "[]\n", "line 1 is damaged"),
        ("metrics.jsonl", '{"loss": 1}\n', "line 1 is damaged"),
        ("evaluation.json", "{", "evaluation.json is damaged"),
        ("evaluation.json", "[]", "evaluation.json is damaged"),
        ("evaluation.json", '{"metrics": {"mse": {"value": "low", "unit": ""}}}', "evaluation.json is damaged"),
        ("evaluation.json", '{"metrics": {"mse": {"value": null, "unit": ""}}}', "evaluation.json is damaged"),
        ("evaluation.json", '{"metrics": {"nll": {"value": 1, "unit": "", "curve": {"t": [1]}}}}', "evaluation.json"),
        ("run.json", '[{"time": "now"}]', "run.json is damaged"),
        ("run.json", '[{"argv": []}]', "run.json is damaged"),
        ("samples/step_000000007.png", "no picture", "step_000000007.png cannot be read"),
    ],
)
def test_damaged_files(broken, call, file, text, told):
    (broken / file).write_text(text)
    code, _, said = call(plots, broken, "--curves")
    assert code == 3
    assert said.startswith(f"error: {broken}")
    assert told in said
    assert said.count("\n") == 1
    assert not (broken / "plots").exists()


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        ((), 2, "name a run"),
        (("--report",), 2, "name a run"),
        (("/none",), 4, "there is no run in /none"),
        (("RUN", "--out=RUN/run.json/there"), 2, "cannot write to --out="),
        (("RUN", f"--steps={T + 1}"), 2, f"steps={T + 1} must be from 1 to T={T}"),
        (("RUN", "--num=0"), 2, "--num=0 must be at least 1"),
        (("RUN", "--step=6"), 4, "6"),
    ],
)
def test_what_cannot_be_drawn(whole, call, options, code, told):
    found, _, said = call(plots, *(option.replace("RUN", str(whole)) for option in options))
    assert (found, said.count("\n")) == (code, 1)
    assert said.startswith("error: ")
    assert told in said


def test_without_matplotlib(whole, call, monkeypatch, linear):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, *said = call(plots, whole)
    assert (code, *said) == (2, "", 'error: plots need matplotlib: pip install -e ".[plot]"\n')

    with pytest.raises(errors.ConfigError, match="plots need matplotlib"):
        figures.schedule(linear)


def test_in_the_folder_itself(broken, call, monkeypatch):
    monkeypatch.chdir(broken)
    assert call(plots, ".", "--curves", "--report")[0] == 0
    page = (broken / "report.html").read_text()
    assert "<title>run</title>" in page
    assert "python -m ddpm_jax train --config=config.json --workdir=runs/run-again\n" in page


def test_what_is_drawn_before_a_failure_is_there(whole, call, monkeypatch, tmp_path):
    def diverge(*_):
        raise errors.Diverged("sample 0 is not finite")

    monkeypatch.setattr(strips, "reverse", diverge)
    code, _, said = call(plots, whole, f"--out={tmp_path}")
    assert (code, said) == (5, "error: sample 0 is not finite\n")
    assert (tmp_path / "loss.svg").exists()


@pytest.mark.slow
def test_a_browser_shows_the_page(whole, drawn, tmp_path):
    """A headless Chromium opens it, tells of no error, and knows the size of every picture."""
    names = "chromium", "chromium-browser", "chromium-headless-shell", "google-chrome"
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("no Chromium is installed")
    look = """<script>
        const told = []; addEventListener("error", event => told.push(event.message || event.target.tagName), true);
        addEventListener("load", () => {
          const widths = Array.from(document.images, image => image.naturalWidth);
          const broad = document.documentElement.scrollWidth > innerWidth;
          document.body.innerHTML = "<pre id=found>" + JSON.stringify({told, widths, broad}) + "</pre>";
        });</script>"""
    (tmp_path / "page.html").write_text(drawn.replace("<body>", f"<body>{look}"))
    for width in (400, 1200):
        flags = "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"
        command = [browser, *flags, (tmp_path / "page.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(re.search("<pre id=.?found.?>(.*?)</pre>", done.stdout)[1])
        assert found["told"] == []
        assert not found["broad"]
        assert len(found["widths"]) == 6
        assert min(found["widths"]) > 0
