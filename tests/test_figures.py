"""Curves, strips and tiles of the plots, held against the numbers drawn and closed forms."""

import io
import re
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from PIL import Image
from plotted import EVALUATION, metrics, rows

from ddpm_jax import samplers, schedules
from ddpm_jax.plots import figures, records, strips

pytest.importorskip("matplotlib")


@pytest.fixture
def read(tmp_path):
    """What is read of metrics.jsonl."""
    (tmp_path / "metrics.jsonl").write_text(metrics())
    return records.metrics(tmp_path / "metrics.jsonl")


def lines(axes):
    """The curves that have points for data, without grids and axes."""
    return [line.get_xydata() for line in axes.lines if len(line.get_xydata()) != 2]


def test_curves_are_the_rows_of_the_file(read):
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


def test_the_svg_has_the_points_of_the_curve(read):
    """Read back from the drawing by its ticks: the learning rate, up to a hundredth of a dot."""
    figure = figures.gradients(read)
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


def test_svgs_are_small_sealed_and_the_same_each_time(read):
    made = [figures.svg(figures.losses(read)) for _ in range(2)]
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
    x_t = np.asarray(strips.noise_images(schedule, x_0, times, jax.random.key(0)), np.float64)
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
        path, _ = samplers.run_sampler(None, clock, times, jax.random.key(0), np.float32([0]), 40, view)
        np.testing.assert_array_equal(strips.frame_times(times, 40, preview), path[:, 0])


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
