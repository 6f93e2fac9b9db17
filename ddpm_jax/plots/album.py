"""All plots of a run, with their captions."""

from typing import NamedTuple

from ddpm_jax import data
from ddpm_jax.commands import prog_name
from ddpm_jax.errors import DataError
from ddpm_jax.images import evenly_spaced
from ddpm_jax.plots import figures, strips

SECTIONS = "Samples", "Forward process", "Training", "Evaluation"


class Plot(NamedTuple):
    section: str  # one of SECTIONS
    file: str  # name in the folder of plots
    caption: str  # what it shows, or why there is no data
    data: bytes | None = None


def file_plots(schedule, grids, metrics, evaluation):
    """Plots of the files of a run. The arguments are from records.py, None or empty if missing."""
    if grids:
        steps, pictures = zip(*grids, strict=True)
        labels, columns = [f"step {step:,}" for step in steps], len(grids) if len(grids) < 4 else -(-len(grids) // 2)
        caption = f"Samples during training, always from the same noise: {', '.join(labels)}."
        yield Plot("Samples", "grids.png", caption, figures.png(figures.tiles(pictures, labels, columns)))
    else:
        yield Plot("Samples", "grids.png", "No grids of samples in the run's folder; training writes them.")
    if metrics:
        caption = "The loss, each point the mean since the previous one, and the loss in each quarter of t."
        yield Plot("Training", "loss.svg", caption, figures.svg(figures.losses(metrics)))
        caption = "The gradient norm before clipping, and the learning rate."
        yield Plot("Training", "gradient.svg", caption, figures.svg(figures.gradients(metrics)))
    else:
        yield Plot("Training", "loss.svg", "No training curves: metrics.jsonl has no rows.")
    caption = "The noise schedule: alphas_bar, the signal's share of the variance of x_t, and the log-SNR."
    yield Plot("Forward process", "schedule.svg", caption, figures.svg(figures.schedule(schedule)))
    if evaluation and "nll" in evaluation["metrics"]:
        caption = (
            "Rate and distortion (Ho et al. 2020, figure 5): the error of x_0_hat against the bits/dim that x_t costs, "
            "and against t."
        )
        figure = figures.rate_distortion(evaluation["metrics"]["nll"]["curve"])
        yield Plot("Evaluation", "rate_distortion.svg", caption, figures.svg(figure))
    else:
        caption = f"No rate-distortion curve: compute it with python {prog_name('evaluate')} --metrics=nll."
        yield Plot("Evaluation", "rate_distortion.svg", caption)


def sample_plots(parts, params, num, steps, seed, weights):
    """Plots of how `num` samples are generated; weights: a description of the parameters."""
    settings = weights + f", {parts.config.train.sampler} with {steps} steps, seed {seed}"
    path, previews = (strips.reverse(parts, params, num, steps, seed, preview) for preview in (False, True))
    caption = f"Denoising: x_t after some of the steps, one image per row ({settings})."
    yield Plot("Samples", "denoising.png", caption, figures.png(strips.draw(path)))
    yield Plot("Samples", "denoising.gif", "Denoising of the same images, animated.", strips.gif(path))
    caption = "Previews: x_0_hat, the network's estimate of the image at these times; at t = 0 the sample."
    yield Plot("Samples", "previews.png", caption, figures.png(strips.draw(previews)))


def data_plots(parts, num, seed):
    """Plots of how `num` evenly spaced images of the run's data turn into noise."""
    try:
        images = data.load(**vars(parts.config.data)).images
    except DataError as error:
        yield Plot("Forward process", "forward.png", f"No forward process without the data: {error}")
        return
    path = strips.forward(parts.schedule, images[evenly_spaced(len(images), num)], seed)
    caption = (
        f"The forward process: images of {parts.config.data.source} and their x_t (eq. 4), with one eps per image."
    )
    yield Plot("Forward process", "forward.png", caption, figures.png(strips.draw(path)))
    yield Plot("Forward process", "forward.gif", "The forward process of the same images, animated.", strips.gif(path))
