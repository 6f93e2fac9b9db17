"""Samples while a run trains: grids to look at, and a KID for its log. What cannot be made is missed with a warning."""

import warnings

import jax
import numpy as np

from ddpm_jax import errors, experiment, images, parallel, program
from ddpm_jax.evaluation import features, samples


def make_grid_writer(parts, workdir, feed):
    """write_grid(state, step) -> {name: samples of the averaged parameters, always of the same keys, as one picture}.

    One that cannot be made or written is missed with a warning; feed() is called after each batch.
    """
    config = parts.config.train
    draw = program.make_draw(parts, config.sampler, config.sample_steps)

    def write(params, seed, file):
        batches = []
        with parallel.memory_advice("try a smaller train.sample_num"):
            for batch in draw(params, config.sample_num, seed):
                batches.append(batch[:, -1])
                feed()
        picture = images.grid(np.concatenate(batches))
        images.save_png(workdir / "samples" / file, picture)
        return picture

    def write_grid(state, step):
        pictures = {}
        if not parallel.is_first():
            return pictures
        try:
            params = jax.device_get(state.ema_params)
            for i in range(config.ensemble):
                mark, own = "", params
                if config.ensemble > 1:
                    mark, own = f"_member_{i}", jax.tree.map(lambda x, i=i: x[i], params)
                seed = experiment.member(parts.config, i).train.seed
                pictures[f"samples{mark}"] = write(own, seed, f"step_{step:09}{mark}.png")
        except (OSError, errors.UserError) as error:
            warnings.warn(f"there is no grid of samples at step {step}: {error}", stacklevel=2)
        return pictures

    return write_grid


def make_evaluator(parts, dataset, feed, say):
    """evaluate(state, step) -> metrics of a few samples of the averaged parameters, where train.evaluate_every says so.

    They are always of the same keys. Where it fails there is a warning in place of metrics.
    """
    config, data_config = parts.config.train, parts.config.data
    if not config.evaluate_every:
        return lambda state, step: {}

    extractor = features.load("enl0")
    draw = program.make_draw(parts, config.evaluate_sampler, config.evaluate_steps)
    where = {"source": data_config.source, "split": data_config.split}

    def evaluate(state, step):
        if not parallel.is_first() or (step % config.evaluate_every and step != config.steps):
            return {}
        try:
            with parallel.memory_advice("go on with train.evaluate_every=0"):
                params = jax.device_get(state.ema_params)
                batches = draw(params, config.evaluate_num, config.seed)
                drawn = samples.collect(batches, config.evaluate_num, parts.shape, lambda _: feed())
                found = samples.quick_kid(
                    drawn, dataset.images, where, extractor, data_config.cache_dir, lambda _: feed()
                )
        except (OSError, errors.UserError) as error:
            warnings.warn(f"there is no KID at step {step}: {error}", stacklevel=2)
            return {}
        say(f"step {step:,}: {', '.join(f'{name} {value:.2f}' for name, value in found.items())}")
        return found

    return evaluate
