"""Samples during training: image grids, and a KID for the log. A failure is a warning; training goes on."""

import warnings

import jax
import numpy as np

from ddpm_jax import errors, experiment, images, parallel, program
from ddpm_jax.evaluation import features, samples


def make_grid_writer(parts, workdir, keep_alive):
    """write_grid(state, step) -> {name: grid of samples}, drawn with the averaged parameters, always by the same keys.

    A grid that cannot be drawn or written is skipped with a warning. keep_alive() is called after each batch.
    """
    config = parts.config.train
    draw = program.make_draw(parts, config.sampler, config.sample_steps)

    def write(params, seed, file):
        batches = []
        with parallel.memory_advice("try a smaller train.sample_num"):
            for batch in draw(params, config.sample_num, seed):
                batches.append(batch[:, -1])
                keep_alive()
        grid = images.grid(np.concatenate(batches))
        images.save_png(workdir / "samples" / file, grid)
        return grid

    def write_grid(state, step):
        grids = {}
        if not parallel.is_first():
            return grids
        try:
            params = jax.device_get(state.ema_params)
            for i in range(config.ensemble):
                suffix, member_params = "", params
                if config.ensemble > 1:
                    suffix, member_params = f"_member_{i}", jax.tree.map(lambda x, i=i: x[i], params)
                seed = experiment.member_config(parts.config, i).train.seed
                grids[f"samples{suffix}"] = write(member_params, seed, f"step_{step:09}{suffix}.png")
        except (OSError, errors.UserError) as error:
            warnings.warn(f"there is no grid of samples at step {step}: {error}", stacklevel=2)
        return grids

    return write_grid


def make_evaluator(parts, dataset, keep_alive, say):
    """evaluate(state, step) -> metrics of a few samples of the averaged parameters, every train.evaluate_every steps.

    The keys are always the same. On failure it warns and returns no metrics.
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
            with parallel.memory_advice("continue with train.evaluate_every=0"):
                params = jax.device_get(state.ema_params)
                batches = draw(params, config.evaluate_num, config.seed)
                drawn = samples.collect(batches, config.evaluate_num, parts.shape, lambda _: keep_alive())
                metrics = samples.quick_kid(
                    drawn, dataset.images, where, extractor, data_config.cache_dir, lambda _: keep_alive()
                )
        except (OSError, errors.UserError) as error:
            warnings.warn(f"there is no KID at step {step}: {error}", stacklevel=2)
            return {}
        say(f"step {step:,}: {', '.join(f'{name} {value:.2f}' for name, value in metrics.items())}")
        return metrics

    return evaluate
