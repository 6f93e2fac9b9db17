"""Everything there is to draw of a run, each with the words under it."""

from typing import NamedTuple

import numpy as np

from ddpm_jax import data
from ddpm_jax.commands import prog_name
from ddpm_jax.errors import DataError
from ddpm_jax.plots import figures, strips

SECTIONS = "Samples", "Forward process", "Training", "Evaluation"


class Plot(NamedTuple):
    section: str  # one of SECTIONS
    file: str  # its name in the folder of plots
    words: str  # what it shows, or without data why there is none
    data: bytes | None = None


def of_files(schedule, grids, metrics, evaluation):
    """Plots of what a run has written: the arguments are those that records.py reads, None or empty where missing."""
    if grids:
        steps, pictures = zip(*grids, strict=True)
        labels, columns = [f"step {step:,}" for step in steps], len(grids) if len(grids) < 4 else -(-len(grids) // 2)
        words = f"Samples while training, always of the same noise: {', '.join(labels)}."
        yield Plot("Samples", "grids.png", words, figures.png(figures.tiles(pictures, labels, columns)))
    else:
        yield Plot("Samples", "grids.png", "No grids of samples in the run's folder: training writes them.")
    if metrics:
        words = "The loss, each dot a mean since the one before, and its parts by quarter of t, whose mean it is."
        yield Plot("Training", "loss.svg", words, figures.svg(figures.losses(metrics)))
        words = "The norm of the gradient before it is clipped, and the learning rate."
        yield Plot("Training", "gradient.svg", words, figures.svg(figures.gradients(metrics)))
    else:
        yield Plot("Training", "loss.svg", "No curves of training: the run has no rows in metrics.jsonl.")
    words = "The noise schedule: alphas_bar, the share of the signal in the variance of x_t, and the log-SNR."
    yield Plot("Forward process", "schedule.svg", words, figures.svg(figures.schedule(schedule)))
    if evaluation and "nll" in evaluation["metrics"]:
        words = (
            "Rate and distortion (Ho et al. 2020, figure 5): the error of x_0_hat over the bits/dim that x_t costs, "
            "and over t."
        )
        figure = figures.rate_distortion(evaluation["metrics"]["nll"]["curve"])
        yield Plot("Evaluation", "rate_distortion.svg", words, figures.svg(figure))
    else:
        words = f"No curve of rate and distortion: it comes with python {prog_name('evaluate')} --metrics=nll."
        yield Plot("Evaluation", "rate_distortion.svg", words)


def of_samples(parts, params, num, steps, seed, made_of):
    """Plots of how `num` samples come about; made_of: which parameters, in words."""
    drawn = made_of + f", {parts.config.train.sampler} with {steps} steps, seed {seed}"
    path, previews = (strips.reverse(parts, params, num, steps, seed, preview) for preview in (False, True))
    words = f"Denoising: x_t after some of the steps, one image a row ({drawn})."
    yield Plot("Samples", "denoising.png", words, figures.png(strips.draw(path)))
    yield Plot("Samples", "denoising.gif", "Denoising as a film, the same images.", strips.gif(path))
    words = "Previews: x_0_hat, what the network took the image for at these times; at t = 0 the sample."
    yield Plot("Samples", "previews.png", words, figures.png(strips.draw(previews)))


def of_data(parts, num, seed):
    """Plots of how `num` images of the run's data, evenly spread, turn to noise."""
    try:
        images = data.load(**vars(parts.config.data)).images
    except DataError as error:
        yield Plot("Forward process", "forward.png", f"No forward process without the data: {error}")
        return
    picked = np.linspace(0, len(images) - 1, min(len(images), num)).astype(int)
    path = strips.forward(parts.schedule, images[picked], seed)
    words = f"The forward process: images of {parts.config.data.source} and their x_t (eq. 4), one eps an image."
    yield Plot("Forward process", "forward.png", words, figures.png(strips.draw(path)))
    yield Plot("Forward process", "forward.gif", "The forward process as a film, the same images.", strips.gif(path))
