"""Plot a run: python -m ddpm_jax.plots runs/digits --report

Writes curves (SVG) and pictures (PNG, GIF) to RUN/plots; with --report also RUN/report.html, one page with all of them;
with --card also RUN/card.md, a model card. Existing plots are overwritten: they can be recomputed from the run and its
data.
"""

import dataclasses
import itertools
import sys

from ddpm_jax import errors, options
from ddpm_jax.run import log
from ddpm_jax.run.files import expand, write_atomic


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    workdir: str = options.option("", "folder of the run, or of one of its steps; also without --workdir=")
    step: int = options.option(*options.STEP)
    report: bool = options.option(False, "also write the HTML page")
    card: bool = options.option(False, "also write the model card")
    curves: bool = options.option(False, "only plots that need neither network nor data")
    num: int = options.option(4, "images in each strip", options.at_least(1))
    seed: int = options.option(0, "seed of the images", options.at_least(0), options.below(2**32))
    steps: int = options.option(0, "sampling steps; 0 for train.sample_steps", options.at_least(0))
    weights: str = options.option(*options.WEIGHTS)
    member: int = options.option(*options.MEMBER)
    out: str = options.option("", "folder for plots, page and card; WORKDIR/plots and WORKDIR when empty")
    platform: str = options.option(*options.PLATFORM)
    cpu_devices: int = options.option(*options.CPU_DEVICES)
    debug: bool = options.option(*options.DEBUG)


@log.quiet()
def main(argv=None):
    """Plot a run; `argv` are the options, the program's when None. Returns the exit code."""
    args = options.parse(Args, argv, "-m ddpm_jax.plots RUN", __doc__, positional=["workdir"])
    if not args.workdir:
        raise errors.ConfigError("name a run, for example python -m ddpm_jax.plots runs/digits")

    from ddpm_jax import experiment, parallel
    from ddpm_jax.plots import album, card, figures, records, report
    from ddpm_jax.run import checkpoint

    figures.require_matplotlib()
    run, step = experiment.find_run(args.workdir, args.step)
    out, page_folder = (expand(args.out),) * 2 if args.out else (run / "plots", run)
    metrics, evaluation = records.metrics(run / "metrics.jsonl"), records.evaluation(run / "evaluation.json")
    starts, grids = records.starts(run / "run.json"), records.grids(run / "samples", args.member)
    parallel.start(args.num, platform=args.platform, distributed="off", cpu_devices=args.cpu_devices)
    parts, params, step = experiment.restore(run, args.weights, step, args.member)
    log.note(f"step {step:,} of {run}, {args.weights} weights, {parallel.describe()}")
    with errors.writing(f"--out={out}"):
        out.mkdir(parents=True, exist_ok=True)

    plots, generated = [], album.file_plots(parts.schedule, grids, metrics, evaluation)
    if not args.curves:
        steps, weights = args.steps or parts.config.train.sample_steps, f"step {step:,}, {args.weights} weights"
        sample_plots = album.sample_plots(parts, params, args.num, steps, args.seed, weights)
        generated = itertools.chain(generated, sample_plots, album.data_plots(parts, args.num, args.seed))
    with parallel.memory_advice(f"try a --num smaller than {args.num}"):
        for plot in generated:
            plots.append(plot)
            if plot.data is None:
                log.note(plot.caption)
                continue
            with errors.writing(f"--out={out}"):
                write_atomic(out / plot.file, plot.data)
    log.note(f"wrote {out}: {', '.join(plot.file for plot in plots if plot.data)}")
    pages = {}
    if args.report:
        parameters = experiment.parameter_count(parts)
        pages["report.html"] = report.page(run, step, args.member, parts.config, parameters, plots, starts, evaluation)
    if args.card:
        data = checkpoint.load(run / "checkpoints", [])[0].get("data")
        grid = max(records.grid_files(run / "samples", args.member), default=None)
        pages["card.md"] = card.text(run, step, args.member, parts, data, grid, metrics, starts, evaluation)
    for name, text in pages.items():
        with errors.writing(f"--out={page_folder}"):
            write_atomic(page_folder / name, text.encode())
        log.note(f"wrote {page_folder / name}")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
