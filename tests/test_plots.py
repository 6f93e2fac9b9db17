"""The plots of a run and its page, held against its files, closed forms, sample.py and a parser."""

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
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from conftest import T, make_run
from PIL import Image

from ddpm_jax import errors, images, options, samplers, schedules
from ddpm_jax.commands import COMMANDS, evaluate, sample, train
from ddpm_jax.config import load, to_json
from ddpm_jax.plots import __main__ as plots
from ddpm_jax.plots import album, figures, records, report, strips
from ddpm_jax.reports import progress

pytest.importorskip("matplotlib")

ODD = "<script>&\"'"  # a name that a page must escape
STEPS = (100, 200, 300)


def rows():
    """Three rows of metrics, one of them without a finite loss."""
    random = np.random.default_rng(1)
    made = [dict(zip(records.NAMES, [step, *random.uniform(0.01, 1, 7)], strict=True)) for step in STEPS]
    return [made[0], made[1] | {"loss": None, "loss_q4": None}, made[2]]


EVALUATION = {
    "metrics": {
        "nll": {
            "value": 4.75265,
            "standard_error": 0.01660,
            "unit": "bits/dim",
            "parts": {"prior": 2e-05, "steps": 3.0},
            "settings": {"decoder": "exact", "steps": 3},
            "curve": {"t": [3, 2, 1], "rate": [0.1, 0.5, 3.0], "rmse": [90.0, 20.0, 1.0]},
        },
        "KID-<i>": {
            "value": 3.25,
            "standard_error": None,
            "unit": "x 1000",
            "real": {"value": 0.125, "standard_error": 0.5},
            "settings": {"sampler": "ddim", "reference": {"source": ODD, "num": 77}},
        },
    },
    "num": 1000,
    "checkpoint_step": 5,
    "versions": {"jax": "0.0.7"},
}
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
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plots", str(whole), "--report", "--num=3", "--seed=4"])
        assert errors.run(plots.main) == 0
    return (whole / "report.html").read_text()


def lines(axes):
    """The curves that have points for data, without grids and axes."""
    return [line.get_xydata() for line in axes.lines if len(line.get_xydata()) != 2]


def test_curves_are_the_rows_of_the_file(whole):
    read = records.metrics(whole / "metrics.jsonl")
    loss, parts = figures.losses(read).axes
    norm, rate = figures.gradients(read).axes
    for axes, *names in (
        (loss, "loss"),
        (parts, "loss_q1", "loss_q2", "loss_q3", "loss_q4"),
        (norm, "grad_norm"),
        (rate, "learning_rate"),
    ):
        for line, name in zip(lines(axes), names, strict=True):
            wanted = [(row["step"], np.nan if row[name] is None else row[name]) for row in rows()]
            np.testing.assert_array_equal(line, wanted)
    assert [axes.get_yscale() for axes in (loss, parts, norm, rate)] == ["log", "log", "log", "linear"]
    assert [text.get_text() for text in parts.get_legend().get_texts()] == ["1st", "2nd", "3rd", "4th"]


def test_the_svg_has_the_points_of_the_curve(whole):
    """Read back from the drawing by its ticks: the learning rate, up to a hundredth of a dot."""
    figure = figures.gradients(records.metrics(whole / "metrics.jsonl"))
    root = ElementTree.fromstring(figures.svg(figure))
    part = next(element for element in root.iter() if element.get("id") == "axes_2")
    ticks = {}
    for axis in ("xtick", "ytick"):
        for tick in part.iter():
            if re.fullmatch(f"{axis}_[0-9]+", tick.get("id", "")):
                mark = [use for use in tick.iter() if use.tag.endswith("use")][-1]
                text = next(text for text in tick.iter() if text.tag.endswith("text"))
                place = float(mark.get("x" if axis == "xtick" else "y"))
                ticks.setdefault(axis, []).append((place, float(text.text)))
    found = []
    marks = [use for use in part.iter() if use.tag.endswith("use") and "fill: #0072b2" in use.get("style", "")]
    for mark in marks:
        x, y = (
            np.polyval(np.polyfit(*np.array(ticks[axis]).T, 1), float(mark.get(name)))
            for axis, name in (("xtick", "x"), ("ytick", "y"))
        )
        found.append((x, y))
    np.testing.assert_allclose(found, [(row["step"], row["learning_rate"]) for row in rows()], rtol=1e-3)


def test_svgs_are_small_sealed_and_the_same_each_time(whole):
    made = [figures.svg(figures.losses(records.metrics(whole / "metrics.jsonl"))) for _ in range(2)]
    assert made[0] == made[1]
    assert re.findall(rb'(?:href|src)="(?!#)', made[0]) == []
    assert len(made[0]) < 40_000


def test_schedule_is_the_product_of_the_papers_betas():
    """alphas_bar_t = prod (1 - beta), beta from 1e-4 to 0.02, in float64."""
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    left, right = figures.schedule(schedules.make_schedule("linear")).axes
    share = np.arange(1, 1001) / 1000
    for line, wanted in zip(lines(left) + lines(right), (bar, 1 - bar, np.log(bar / (1 - bar))), strict=True):
        np.testing.assert_allclose(line, np.stack([share, wanted], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_schedules_without_end_are_drawn_too():
    """Song et al. 2021: -log alphas_bar(t) = 0.1 t + 9.95 t^2; and one whose log-SNR at T is -inf."""
    vp = lines(figures.schedule(schedules.make_schedule("vp")).axes[0])[0]
    np.testing.assert_allclose(vp[:, 1], np.exp(-0.1 * vp[:, 0] - 9.95 * vp[:, 0] ** 2), rtol=1e-3)
    zero = schedules.make_schedule("linear", zero_terminal_snr=True)
    assert figures.svg(figures.schedule(zero))


def test_rate_and_distortion():
    curve = EVALUATION["metrics"]["nll"]["curve"]
    over_rate, over_t = figures.rate_distortion(curve).axes
    np.testing.assert_array_equal(lines(over_rate)[0], [(0.1, 90), (0.5, 20), (3, 1)])
    np.testing.assert_array_equal(lines(over_t)[0], [(3, 90), (2, 20), (1, 1)])


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_colours_can_be_read(page):
    """WCAG 2.1: contrast of 3 for graphics, and about 4 for letters, which are gray only outside a page."""

    def luminance(color):
        levels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    def contrast(*colors):
        low, high = sorted(map(luminance, colors))
        return (high + 0.05) / (low + 0.05)

    assert min(contrast(color, page) for color in figures.COLORS) > 3
    assert contrast(figures.GRAY, page) > 4


def test_the_forward_process_has_its_mean_and_variance():
    """Eq. 4 for images of -1 (a quarter) and 1: mean alpha / 2, variance alpha^2 3/4 + sigma^2."""
    schedule = schedules.make_schedule("linear")
    x_0 = np.ones((40, 16, 16, 1), np.float32)
    x_0[:, :4] = -1
    times = np.array([0, 100, 300, 1000])
    bar = np.append(1, np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[times]
    x_t = np.asarray(strips.noised(schedule, x_0, times, jax.random.key(0)), np.float64)
    np.testing.assert_allclose(x_t.mean((1, 2, 3, 4)), np.sqrt(bar) / 2, atol=0.03)
    np.testing.assert_allclose(x_t.var((1, 2, 3, 4)), 0.75 * bar + 1 - bar, rtol=0.03)
    eps = (x_t - np.sqrt(bar)[:, None, None, None, None] * x_0)[1:] / np.sqrt(1 - bar[1:])[:, None, None, None, None]
    np.testing.assert_allclose(eps, np.broadcast_to(eps[0], eps.shape), atol=1e-4)
    assert len(np.unique(eps[0])) > 0.99 * x_0.size  # each pixel of each image has its own


@pytest.mark.parametrize(
    ("name", "T", "frames"), [("cosine", 1, 2), ("cosine", 12, 13), ("linear", 200, 41), ("vp", 0, 41)]
)
def test_the_forward_strip_begins_with_the_images(name, T, frames):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    schedule = schedules.make_schedule(name, T)
    strip = strips.forward(schedule, pictures)
    assert len(strip.times) == len(strip.pictures) == frames
    assert (strip.times[0], strip.times[-1]) == (0, schedule.T)
    np.testing.assert_array_equal(strip.pictures[0], pictures)


@pytest.mark.parametrize("steps", [1, 3, 12, 50, 100, 101])
def test_times_under_the_frames(steps):
    """A sampler whose x is the time it has come to, and whose preview is the time it came from."""
    times = schedules.make_schedule("linear", 200).times(steps)
    clock = samplers.Sampler(lambda x: x, lambda predict, key, x, t, s, memory: (x * 0 + s, x * 0 + t))
    for preview in (False, True):
        view = (lambda x, memory: memory) if preview else (lambda x, memory: x)
        path, _ = samplers.follow(None, clock, times, jax.random.key(0), np.float32([0]), 40, view)
        np.testing.assert_array_equal(strips.shown(times, 40, preview), path[:, 0])


def test_a_strip_is_drawn_over_its_times():
    """Of 41 gray levels 11, evenly spread, each over its time."""
    levels = np.arange(41, dtype=np.uint8)
    figure = strips.draw(strips.Strip(levels / 30, levels[:, None, None, None, None].repeat(2, 1)))
    assert [text.get_text() for text in figure.texts[:4]] == ["t = 0", "t = 0.133", "t = 0.267", "t = 0.4"]
    page = np.asarray(Image.open(io.BytesIO(figures.png(figure))))
    for row in (34, 34 + 66):
        assert page[row, 34::72, 0].tolist() == list(range(0, 41, 4))


def test_tiles_are_dot_for_dot():
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (30, 50, channels), np.uint8) for channels in (1, 3, 1)]
    page = np.asarray(Image.open(io.BytesIO(figures.png(figures.tiles(pictures, ["a", "b", "c"], 2)))))
    assert page.shape == (2 * (30 + 16), 2 * (50 + 4), 4)
    for (y, x), picture in zip(((0, 0), (0, 54), (46, 0)), pictures, strict=True):
        np.testing.assert_array_equal(page[y : y + 30, x : x + 50, :3], np.broadcast_to(picture, (30, 50, 3)))
        assert page[y + 30 : y + 46, x : x + 50, 3].any()  # the label
    assert not page[46:, 54:, 3].any()


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
    differing = page.texts.index(("summary", "What differs from the defaults"))
    assert differing < page.texts.index(("summary", "All of it"))
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
        "No curves of training",
        "No curve of rate and distortion",
        "Not evaluated",
        "no run.json",
    ):
        assert any(missing in note for note in notes), missing
        assert missing in said or missing in ("Not evaluated", "no run.json")


def test_without_the_data_there_is_a_line(bare, monkeypatch):
    def gone(**_):
        raise errors.DataError("the folder is gone")

    monkeypatch.setattr(album.data, "load", gone)
    (plot,) = album.of_data(bare[1], 1, 0)
    assert plot.data is None
    assert plot.words == "No forward process without the data: the folder is gone"


def test_an_evaluation_without_the_bound(linear):
    plots = {plot.file: plot for plot in album.of_files(linear, [], None, {"metrics": {"mse": {}}})}
    assert plots["rate_distortion.svg"].data is None
    assert "--metrics=nll" in plots["rate_distortion.svg"].words


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
    *lines, plotted = map(shlex.split, report.commands(folder, 5, parts.config))
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
