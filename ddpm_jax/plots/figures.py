"""Figures from arrays. The colours of curves and text are legible on a white and on a black page.

    figures.losses(records.metrics("runs/digits/metrics.jsonl")).savefig("loss.svg")

All functions need matplotlib and raise ConfigError without it.
"""

import importlib.util
import io

import numpy as np

from ddpm_jax.errors import ConfigError
from ddpm_jax.schedules import ContinuousSchedule

GRAY = "#7a7a7a"  # of text and axes; the background is transparent
COLORS = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # safe for colour-blind readers (Okabe & Ito 2008)
SIZE, DPI = (8, 3), 100  # inches, dots per inch


def require_matplotlib():
    """Raise ConfigError if matplotlib is missing."""
    if not importlib.util.find_spec("matplotlib"):
        raise ConfigError('plots need matplotlib: pip install -e ".[plot]"')


def _figure(size):
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(size, DPI, facecolor="none")


def curves(*panels):
    """Panels (x label, x, y label, {name: y}, scale) side by side; with a legend if there are several curves."""
    figure = _figure(SIZE)
    figure.set_layout_engine("constrained")
    for axes, (x_label, x, y_label, curves, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for color, (name, y) in zip(COLORS, curves.items(), strict=False):
            axes.plot(x, y, label=name, color=color, marker="." if len(x) < 50 else None)
        axes.set(facecolor="none", yscale=scale)
        axes.set_xlabel(x_label, color=GRAY)
        axes.set_ylabel(y_label, color=GRAY)
        if scale == "log":
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.axhline(0, color=GRAY, linewidth=0.8)
        axes.minorticks_off()
        axes.tick_params(colors=GRAY)
        axes.grid(color=GRAY, alpha=0.3)
        axes.spines[:].set_visible(False)
        if len(curves) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, labelcolor=GRAY)
    return figure


def schedule(schedule):
    """alphas_bar, the signal's share of the variance of x_t (eq. 4), and the log-SNR, against t / T."""
    share = np.arange(1, 1001) / 1000
    times = share if isinstance(schedule, ContinuousSchedule) else np.ceil(share * schedule.T).astype(int)
    levels = np.asarray(schedule.logsnr(times), np.float64)
    shares = {"alphas_bar": 1 / (1 + np.exp(-levels)), "1 - alphas_bar": 1 / (1 + np.exp(levels))}
    return curves(
        ("t / T", share, "share of the variance", shares, "linear"), ("t / T", share, "log-SNR", {"": levels}, "linear")
    )


def losses(metrics):
    """The loss, and the loss in each quarter of t, against steps; metrics: {name: (N,)} from records.metrics."""
    quarters = {of: metrics[f"loss_q{q}"] for q, of in enumerate(("1st", "2nd", "3rd", "4th"), 1)}
    return curves(
        ("step", metrics["step"], "loss", {"": metrics["loss"]}, "log"),
        ("step", metrics["step"], "loss by quarter of t", quarters, "log"),
    )


def gradients(metrics):
    """The gradient norm before clipping, and the learning rate, against steps."""
    return curves(
        ("step", metrics["step"], "gradient norm", {"": metrics["grad_norm"]}, "log"),
        ("step", metrics["step"], "learning rate", {"": metrics["learning_rate"]}, "linear"),
    )


def rate_distortion(curve):
    """Ho et al. 2020, figure 5: the error of x_0_hat against the bits/dim that x_t costs, and against t.

    curve: {"t", "rate", "rmse"}, from nll in evaluation.json.
    """
    error = "rmse of x_0_hat (levels of 255)", {"": curve["rmse"]}, "linear"
    return curves(("rate (bits/dim)", curve["rate"], *error), ("t", curve["t"], *error))


def tiles(pictures, labels, columns):
    """uint8 pictures (H, W, C), C = 1 or 3, row by row, each above its label, without resampling."""
    rows, (height, width) = -(-len(pictures) // columns), np.max([picture.shape[:2] for picture in pictures], 0)
    size = max(8, width * columns // 100)  # points; legible when a large figure is scaled down
    height, width = height + 2 * size, width + size // 2
    figure = _figure((width * columns / DPI, height * rows / DPI))
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        row, column = divmod(index, columns)
        top = height * (rows - row)
        figure.figimage(np.broadcast_to(picture, (*picture.shape[:2], 3)), column * width, top - picture.shape[0])
        where = (column + 0.5) / columns, (top - height + size) / (height * rows)
        figure.text(*where, label, color=GRAY, size=size, ha="center", va="center")
    return figure


def svg(figure):
    """The Figure as SVG, the same bytes each time."""
    return _save(figure, "svg", dict.fromkeys(("Creator", "Date", "Format", "Type")))


def png(figure):
    """The Figure as PNG."""
    return _save(figure, "png", None)


def _save(figure, kind, metadata):
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ddpm_jax"}):
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()
