"""Evaluate a trained run: python evaluate.py --workdir=runs/digits --metrics=nll,ode,mse --num=1000

nll: the variational bound in bits/dim; ode: bits/dim of the probability-flow ODE; mse: L_simple, the mean squared error
of eps over all times. Image i of the data gets the same noise in any batch, so that a result is a function of the run,
the data, the seed and the options. It is written as one JSON file.
"""

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

from ddpm_jax import errors, options
from ddpm_jax.files import write_atomic

METRICS = ("nll", "ode", "mse")
EXACT = 16  # dimensions up to which a divergence is exact unless --divergence says otherwise


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    workdir: str = options.option("runs/digits", "folder of the run, or of one step of it")
    step: int = options.option(0, "of the checkpoint; 0 for the newest", options.at_least(0))
    metrics: tuple[str, ...] = options.option(
        ("nll",),
        "what to measure, of nll,ode,mse",
        options.each(options.one_of(*METRICS)),
        ("at least one of " + ", ".join(METRICS), len),
    )
    num: int = options.option(1000, "images, the first of the data", options.at_least(1))
    split: str = options.option("", "split of the data, in the spelling of TFDS; the run's own when empty")
    weights: str = options.option(
        "ema", "averaged or plain parameters, or the length (sigma_rel) of a post-hoc average", options.which_weights
    )
    steps: int = options.option(0, "steps of nll and mse; 0 for all T", options.at_least(0))
    spacing: str = options.option("trailing", "of these steps, a name in ddpm_jax.schedules.SPACINGS")
    ode_steps: int = options.option(100, "times that ode visits, at most T", options.at_least(2))
    decoder: str = options.option(
        "exact", "of nll's last step, a name in ddpm_jax.likelihood.DECODERS; tanh as in the paper's code"
    )
    divergence: str = options.option(
        "auto", f"of ode, a name in ddpm_jax.likelihood.DIVERGENCES; auto is exact up to {EXACT} dimensions"
    )
    seed: int = options.option(0, "seed of the noise", options.at_least(0), options.below(2**32))
    batch_size: int = options.option(64, "images at a time, over all devices", options.at_least(1))
    out: str = options.option("", "file to write; WORKDIR/evaluation.json when empty")
    overwrite: bool = options.option(False, "write over a file that is there")
    platform: str = options.option("auto", "what to run on", options.one_of("auto", "cpu", "gpu", "tpu"))
    cpu_devices: int = options.option(
        0, "as how many devices a CPU is used; 0 for up to one a core", options.at_least(0)
    )
    debug: bool = options.option(False, "show tracebacks")


def main():
    args = options.parse(Args, sys.argv[1:], "evaluate.py", __doc__)

    import jax
    import numpy as np

    from ddpm_jax import checkpoint, experiment, keys, log, parallel

    checkpoint.quiet()
    workdir, step = experiment.find(args.workdir, args.step)
    out = Path(os.path.expanduser(args.out or workdir / "evaluation.json"))
    if out.exists() and not out.is_file():
        raise errors.ConfigError(f"--out={out} is a folder or a device; give the name of a file")
    if out.exists() and not args.overwrite:
        raise errors.ConfigError(f"{out} already exists; take another --out, or say --overwrite")
    parallel.start(args.batch_size, platform=args.platform, distributed="off", cpu_devices=args.cpu_devices)
    parts, params, step = experiment.restore(workdir, args.weights, step)
    plan = make_plan(args, parts)
    rows = load_rows(args, parts)
    with errors.writing(f"--out={out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
    log.note(f"step {step:,} of {workdir}, {args.weights} weights, {', '.join(args.metrics)}, {parallel.describe()}")

    measure, root = parallel.pmap_rows(make_measure(args, parts, plan)), keys.root(args.seed, "evaluate")
    clock, batches, done = time.monotonic(), [], 0
    with parallel.memory_for(f"try a --batch-size smaller than {args.batch_size}"):
        params = parallel.replicate(params)
        for batch in parallel.measure_batches(measure, params, root, rows, args.batch_size):
            for name, values in batch.items():
                bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
                if bad.any():
                    raise errors.Diverged(f"{name} of image {done + np.argmax(bad)} is not finite; nothing was written")
            batches.append(batch)
            done, took = done + len(batch["index"]), time.monotonic() - clock
            log.note(f"{done}/{args.num} images, {done / took:.1f} a second")
    found = jax.tree.map(lambda *values: np.concatenate(values).astype(np.float64), *batches)

    metrics = {name: REPORTS[name](found, plan) for name in dict.fromkeys(args.metrics)}
    report = {"metrics": metrics, "num": args.num, "split": args.split or parts.config.data.split, "seed": args.seed}
    report |= {"weights": args.weights, "checkpoint_step": step, "config": dataclasses.asdict(parts.config)}
    report |= {"versions": checkpoint.versions(), "devices": parallel.describe()}
    for name, told in metrics.items():
        error = "" if told["standard_error"] is None else f" +- {told['standard_error']:.4f}"
        rest = [f"{part} {value:.4f}" for part, value in told.get("parts", {}).items()]
        log.note(f"{name} {told['value']:.4f}{error} {told['unit']}" + (f" ({', '.join(rest)})" if rest else ""))
    with errors.writing(f"--out={out}"):
        write_atomic(out, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    log.note(f"wrote {out}")
    return 0


def make_plan(args, parts):
    """What is measured at which times: {"bound": settings, "ode": settings}, each with its times."""
    import numpy as np

    from ddpm_jax import likelihood

    exact = "exact" if math.prod(parts.shape) <= EXACT else "hutchinson"
    divergence = exact if args.divergence == "auto" else args.divergence
    for table, name, value in (
        (likelihood.DECODERS, "decoder", args.decoder),
        (likelihood.DIVERGENCES, "divergence", divergence),
    ):
        if value not in table:
            raise errors.ConfigError(f"--{name}={value} is not one of {', '.join(table)}")
    config, schedule = parts.config.diffusion, parts.schedule
    calls = 2 if config.self_conditioning else 1  # a network that conditions on itself asks itself first
    times = schedule.times(args.steps or config.T, args.spacing)
    bound = {"variance": config.variance, "decoder": args.decoder, "limit": "clip", "spacing": args.spacing}
    bound |= {"times": times, "network_evaluations": calls * (len(times) - 1)}
    # At evenly spaced log-SNRs Heun's steps are equally hard; where no signal is left the ODE cannot begin.
    times = schedule.times(min(args.ode_steps, config.T), "logsnr")
    times = times[np.asarray(schedule.logsnr(times)) > -math.inf]
    if "ode" in args.metrics and len(times) < 3:
        raise errors.ConfigError(
            f"--ode-steps={args.ode_steps} with diffusion.T={config.T} leaves the ODE no step; it needs two times"
        )
    ode = {"divergence": divergence, "limit": "none", "dequantization": "uniform", "spacing": "logsnr"}
    return {"bound": bound, "ode": ode | {"times": times, "network_evaluations": 2 * calls * (len(times) - 2)}}


def load_rows(args, parts):
    """{"index", "image", "label"?}: the first --num images of the data that the run was trained on, or of --split."""
    import numpy as np

    from ddpm_jax import data, experiment

    config = parts.config.data
    if args.split and config.source.partition(":")[0] not in ("tfds", "digits"):
        raise errors.ConfigError(f"--split={args.split}, but data.source={config.source} has no splits")
    config = dataclasses.replace(config, split=args.split or config.split)
    dataset = experiment.with_labels(data.load(**vars(config)), parts.config.model.num_classes)
    there = len(dataset.images)
    if args.num > there:
        raise errors.ConfigError(f"--num={args.num}, but the data have {there:,} images; take --num={there} or fewer")
    if dataset.images.shape[1:] != parts.shape:
        shapes = ("x".join(map(str, shape)) for shape in (dataset.images.shape[1:], parts.shape))
        raise errors.ConfigError("the data have images of {}, the run was trained on {}".format(*shapes))
    rows = {"index": np.arange(args.num), "image": dataset.images[: args.num]}
    return rows if dataset.labels is None else rows | {"label": dataset.labels[: args.num].astype(np.int32)}


def make_measure(args, parts, plan):
    """measure(params, root, row) -> {"index", and of each image what the metrics ask for}."""
    import jax

    from ddpm_jax import diffusion, experiment, images, likelihood

    schedule, bound, ode = parts.schedule, plan["bound"], plan["ode"]
    net, limit = experiment.image_net(parts), diffusion.LIMITS[bound["limit"]]

    def measure(params, root, row):
        predict = diffusion.make_denoiser_with_variance(net, schedule, parts.parameterization, params, row.get("label"))
        key, found = jax.random.fold_in(root, row["index"]), {"index": row["index"]}

        def denoise(x_t, t):
            return predict(x_t, t)[0]

        if {"nll", "mse"} & set(args.metrics):
            found |= likelihood.bits_per_dim(
                predict if bound["variance"] == "learned" else denoise,
                schedule,
                bound["times"],
                images.to_unit(row["image"]),
                key,
                bound["variance"],
                bound["decoder"],
                limit,
            )
        if "ode" in args.metrics:
            found["ode"] = likelihood.ode_bits_per_dim(
                denoise, schedule, ode["times"], row["image"], key, ode["divergence"]
            )
        return found

    return measure


def nll(found, plan):
    """The bound, its parts, and over t the rate (bits/dim to know x_t) with the error of x_0_hat (levels of 0..255)."""
    import numpy as np

    steps = found["steps"].mean(0)
    parts = {"prior": found["prior"].mean(), "steps": steps.sum(), "decoder": found["decoder"].mean()}
    rate = parts["prior"] + np.insert(np.cumsum(steps), 0, 0.0)
    curve = {"rate": rate, "rmse": np.sqrt(found["distortion"].mean(0))}
    return summary(found["total"], "bits/dim", plan["bound"], parts=parts, curve=curve)


def ode(found, plan):
    """The bits/dim of the probability-flow ODE."""
    return summary(found["ode"], "bits/dim", plan["ode"])


def mse(found, plan):
    """L_simple, and the error at each t."""
    settings = {name: plan["bound"][name] for name in ("spacing", "times", "network_evaluations")}
    return summary(found["mse"].mean(1), "squared error of eps", settings, curve={"mse": found["mse"].mean(0)})


REPORTS = {"nll": nll, "ode": ode, "mse": mse}


def summary(values, unit, settings, curve=None, parts=None):
    """One metric as JSON: the mean over images, its standard error (none for one image), and what it rests on.

    Of the settings' times only the number of steps is told, except with a curve over them.
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


if __name__ == "__main__":
    sys.exit(errors.run(main))
