"""The variational bound, the likelihood under the ODE and L_simple, each with its standard error over images."""

import math
import time

import jax
import numpy as np

from ddpm_jax import diffusion, keys, likelihood, parallel
from ddpm_jax.errors import ConfigError, Diverged
from ddpm_jax.schedules.report import check_start_snr

EXACT_UP_TO = 16  # dimensions up to which divergence="auto" is exact


def make_plan(parts, metrics, steps=0, spacing="trailing", ode_steps=100, decoder="exact", divergence="auto"):
    """The settings of each metric, with the times: {"metrics": names, "bound": settings, "ode": settings}.

    Warns if a likelihood treats x_t as pure noise at a time when it still contains signal.
    """
    exact = "exact" if math.prod(parts.shape) <= EXACT_UP_TO else "hutchinson"
    divergence = exact if divergence == "auto" else divergence
    for table, name, value in (
        (likelihood.DECODERS, "decoder", decoder),
        (likelihood.DIVERGENCES, "divergence", divergence),
    ):
        if value not in table:
            raise ConfigError(f"--{name}={value} is not one of {', '.join(table)}")
    config, schedule = parts.config.diffusion, parts.schedule
    calls = 2 if config.self_conditioning else 1  # self-conditioning needs a first evaluation
    times = schedule.times(steps or config.T, spacing)
    bound = {"variance": config.variance, "decoder": decoder, "limit": "clip", "spacing": spacing}
    bound |= {"times": times, "network_evaluations": calls * (len(times) - 1)}
    # Heun's steps are equally hard at evenly spaced log-SNRs; the ODE cannot start where no signal is left.
    times = schedule.times(min(ode_steps, config.T), "logsnr")
    times = times[np.asarray(schedule.logsnr(times)) > -math.inf]
    if "ode" in metrics and len(times) < 3:
        raise ConfigError(
            f"--ode-steps={ode_steps} with diffusion.T={config.T} leaves no step for the ODE; it needs two times"
        )
    ode = {"divergence": divergence, "limit": "none", "dequantization": "uniform", "spacing": "logsnr"}
    ode |= {"times": times, "network_evaluations": 2 * calls * (len(times) - 2)}
    if "nll" in metrics:
        check_start_snr(schedule, bound["times"][0])
    if "ode" in metrics:
        check_start_snr(schedule, ode["times"][0], "the larger diffusion.T, the less is left where the ODE can begin")
    return {"metrics": tuple(metrics), "bound": bound, "ode": ode}


def make_measure(parts, plan):
    """measure(params, root, row) -> {"index", and the values that the metrics need, of one image}."""
    schedule, metrics, bound, ode = parts.schedule, plan["metrics"], plan["bound"], plan["ode"]
    net, limit = parts.image_net, diffusion.LIMITS[bound["limit"]]

    def measure(params, root, row):
        predict = diffusion.make_denoiser_with_variance(net, schedule, parts.parameterization, params, row.get("label"))
        key, found = jax.random.fold_in(root, row["index"]), {"index": row["index"]}

        def denoise(x_t, t):
            return predict(x_t, t)[0]

        if {"nll", "mse"} & set(metrics):
            found |= likelihood.bits_per_dim(
                predict if bound["variance"] == "learned" else denoise,
                schedule,
                bound["times"],
                diffusion.to_unit(row["image"]),
                key,
                bound["variance"],
                bound["decoder"],
                limit,
            )
        if "ode" in metrics:
            found["ode"] = likelihood.ode_bits_per_dim(
                denoise, schedule, ode["times"], row["image"], key, ode["divergence"]
            )
        return found

    return measure


def report(parts, params, plan, rows, seed, batch_size, progress):
    """{metric: entry} of the plan over rows {"index", "image", "label"?}; calls progress(text) after each batch.

    Image i gets the same noise in any batch. Raises Diverged for a non-finite value.
    """
    measure, root = parallel.pmap_rows(make_measure(parts, plan)), keys.root(seed, "evaluate")
    start, batches, done = time.monotonic(), [], 0
    for batch in parallel.measure_batches(measure, parallel.replicate(params), root, rows, batch_size):
        for name, values in batch.items():
            bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
            if bad.any():
                raise Diverged(f"{name} of image {done + np.argmax(bad)} is not finite; nothing was written")
        batches.append(batch)
        done += len(batch["index"])
        progress(f"{done}/{len(rows['index'])} images, {done / (time.monotonic() - start):.1f}/s")
    found = jax.tree.map(lambda *values: np.concatenate(values).astype(np.float64), *batches)
    return {name: REPORTS[name](found, plan) for name in plan["metrics"]}


def nll(found, plan):
    """The bound, its parts, and over t the rate (bits/dim that x_t costs) and the rmse of x_0_hat (grey levels)."""
    steps = found["steps"].mean(0)
    parts = {"prior": found["prior"].mean(), "steps": steps.sum(), "decoder": found["decoder"].mean()}
    rate = parts["prior"] + np.insert(np.cumsum(steps), 0, 0.0)
    curve = {"rate": rate, "rmse": np.sqrt(found["distortion"].mean(0))}
    return summary(found["total"], "bits/dim", plan["bound"], parts=parts, curve=curve)


def ode(found, plan):
    """The bits/dim of the probability-flow ODE."""
    return summary(found["ode"], "bits/dim", plan["ode"])


def mse(found, plan):
    """L_simple, and the squared error at each t."""
    settings = {name: plan["bound"][name] for name in ("spacing", "times", "network_evaluations")}
    return summary(found["mse"].mean(1), "squared error of eps", settings, curve={"mse": found["mse"].mean(0)})


REPORTS = {"nll": nll, "ode": ode, "mse": mse}


def summary(values, unit, settings, curve=None, parts=None):
    """One metric as JSON: the mean over images, its standard error (None for one image), and its settings.

    The times are reduced to the number of steps; a curve has them in full.
    """
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    times = settings["times"].tolist()
    found = {"value": float(values.mean()), "standard_error": error, "unit": unit}
    if parts:
        found["parts"] = {name: float(value) for name, value in parts.items()}
    rest = {name: value for name, value in settings.items() if name != "times"}
    found["settings"] = rest | {"steps": len(times) - 1}
    if curve:
        found["curve"] = {"t": times[:-1]} | {name: value.tolist() for name, value in curve.items()}
    return found
