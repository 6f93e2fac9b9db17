"""Speed and memory compared with diffusers on PyTorch: python -m benchmarks.peers [--config=configs/digits.py]

Same network and weights, same batch size and image size, float32, taking turns in two processes; that of diffusers may
be another Python, --their-python=PATH, with torch and diffusers. A training step is noise, loss, gradient, clipping to
norm 1, Adam and EMA in both; that of diffusers follows its train_unconditional.py, with the images scaled beforehand. A
sampling step is one of DDPMPipeline or DDIMPipeline, and one of ours with the same sampler. Ratios are ours / theirs,
each block of ours between two of theirs: medians, with minimum and maximum in brackets. Peak memory is that of
processes that did nothing but import, compile and train, cold.
"""

import contextlib
import dataclasses
import json
import operator
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.__main__ import BenchmarkArgs, alternate, means_of_neighbours, median_and_range, print_row
from ddpm_jax import config as configs
from ddpm_jax import errors, options

THEIRS = Path(__file__).absolute().with_name("diffusers_worker.py")
THEIR_PYTHON = "", "the Python with torch and diffusers; this one if not given"
THREADS = 0, "threads of PyTorch; 0 for its own choice", options.at_least(0)


@dataclasses.dataclass(frozen=True)
class Args(BenchmarkArgs):
    rounds: int = options.option(8, "blocks of ours, each between two of theirs", options.at_least(1))
    block: int = options.option(10, "training steps in a block", options.at_least(1))
    num: int = options.option(64, "images in a batch of samples; 0 to skip sampling", options.at_least(0))
    sample_steps: tuple[int, ...] = options.option(
        (1000, 50), "steps of ancestral sampling and of DDIM", options.all_of(options.at_least(2))
    )
    sample_rounds: int = options.option(3, "batches of ours, each between two of theirs", options.at_least(1))
    their_python: str = options.option(*THEIR_PYTHON)
    threads: int = options.option(*THREADS)


class ProcessEnded(errors.UserError):
    """One of the two processes has ended by itself, such as for lack of memory."""


class Pair(NamedTuple):
    """The two processes: functions (command, *arguments) -> result, see jax_worker.py and diffusers_worker.py."""

    ours: Callable
    theirs: Callable
    folder: Path  # what both read, and where they write the arrays of `output`
    about: tuple[str, str]


class Seconds(NamedTuple):
    """The seconds of a step in each block; one more of theirs than of ours."""

    ours: list[float]
    theirs: list[float]

    def ratios(self):
        """Ours over the mean of theirs before and after."""
        return list(map(operator.truediv, self.ours, means_of_neighbours(self.theirs)))


def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.peers", __doc__, configs.load)

    import jax

    from ddpm_jax import experiment, parallel
    from ddpm_jax.commands.dry_run import synthetic_batch
    from ddpm_jax.run import log

    batch_size = args.config.train.batch_size
    parallel.start(batch_size, 1, "cpu", "off", args.cpu_devices)
    parallel.check_batch_size(batch_size)
    if args.num % jax.device_count():
        raise errors.ConfigError(f"--num={args.num} does not divide over {jax.device_count()} devices")
    parts, batch = synthetic_batch(args.config)
    with processes(parts, batch["image"], args) as pair:
        for about in pair.about:
            log.note(about)
        log.note(
            f"{args.config_file}: {experiment.parameter_count(parts):,} parameters, "
            f"{batch_size} images of {'x'.join(map(str, parts.shape))} a step\n"
        )
        seconds, memory = measure_training(pair, args)  # before anything else is built
        print_row("difference of the outputs / largest", f"{difference(pair, parts.shape):.1e}", "under 1e-5")
        print_comparison("training step", "ms", seconds)
        print_row("peak memory, ours", f"{memory[0]:,.0f} MB")
        print_row("peak memory, diffusers", f"{memory[1]:,.0f} MB")
        print_row("peak memory, ours / theirs", f"{memory[0] / memory[1]:.3f}")
        peak = pair.ours("matmul_flops")
        print_row("products of 2048x2048 matrices", f"{peak / 1e9:,.0f} GFLOP/s")
        share = pair.ours("flops") / statistics.median(seconds.ours) / peak
        print_row("ours, share of the matrix products' speed", f"{share:.2f}")
        for name, steps in zip(("ddpm", "ddim"), args.sample_steps if args.num else (), strict=False):
            seconds = measure(pair, "sample", args.sample_rounds, steps, name, args.num)
            print_comparison(f"{name}, {steps:,} steps, {args.num} images", "ms a step", seconds)
    return 0


@contextlib.contextmanager
def processes(parts, images, args):
    """A Pair of new processes with the network of the Experiment `parts` and uint8 `images` (N, H, W, C) to train on.

    args: with the options cpu_devices, their_python and threads. ConfigError where torch or diffusers is missing.
    """
    import numpy as np

    from benchmarks.jax_worker import draw_params
    from ddpm_jax.interop import released
    from ddpm_jax.run.files import expand

    train, python = parts.config.train, str(expand(args.their_python or sys.executable))
    ours = {"config": configs.to_json(parts.config), "cpu_devices": args.cpu_devices}
    theirs = {name: getattr(train, name) for name in ("learning_rate", "grad_clip", "ema_decay")}
    theirs |= {"threads": args.threads, "T": parts.config.diffusion.T}
    with tempfile.TemporaryDirectory() as folder:
        released.write(Path(folder), parts, draw_params(parts))
        np.save(f"{folder}/images.npy", images)
        with (
            process([sys.executable, "-m", "benchmarks.jax_worker"], ours | {"folder": folder}) as (ask_ours, about),
            process([python, str(THEIRS)], theirs | {"folder": folder}) as (ask_theirs, their_about),
        ):
            yield Pair(ask_ours, ask_theirs, Path(folder), (about, their_about))


@contextlib.contextmanager
def process(command, settings):
    """(a function (command, *arguments) -> result of a new process that runs `serve`, its information)."""
    python = command[0]
    try:
        worker = subprocess.Popen(
            command, cwd=THEIRS.parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise errors.ConfigError(f"cannot run --their-python={python}: {error.strerror}") from error

    def ask(request):
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=worker.stdin, flush=True)
        answer = json.loads(worker.stdout.readline() or "{}")
        if "missing" in answer:
            raise errors.ConfigError(
                f"{answer['missing']} is missing: pip install -e '.[peers]', "
                f"or give a Python that has torch and diffusers as --their-python=PATH (now {python})"
            )
        if "result" not in answer:
            raise ProcessEnded(f"{' '.join(map(str, command))} ended with exit code {worker.wait()}")
        return answer["result"]

    try:
        yield lambda *request: ask(request), ask(settings)
    finally:
        worker.kill()
        worker.communicate()


def measure(pair, command, rounds, steps, *arguments):
    """The Seconds of a step of both, after a block of each to warm up; a block is `steps` steps of `command`."""

    def timer(ask):
        ask(command, steps, *arguments)
        return lambda: ask(command, steps, *arguments) / steps

    return Seconds(*alternate(timer(pair.ours), timer(pair.theirs), rounds))


def measure_training(pair, args):
    """(Seconds of a training step, the peak memory of (ours, theirs) so far in MB); args: rounds and block."""
    return measure(pair, "train", args.rounds, args.block), (pair.ours("memory"), pair.theirs("memory"))


def difference(pair, shape):
    """The largest difference of the two networks' outputs for noise of `shape` (H, W, C), relative to the largest."""
    import numpy as np

    np.save(pair.folder / "x.npy", np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32))
    pair.ours("output", 500)
    pair.theirs("output", 500)
    ours, theirs = (np.load(pair.folder / f"{name}.npy") for name in ("ours", "theirs"))
    return np.abs(ours - theirs).max() / np.abs(ours).max()


def print_comparison(what, unit, seconds):
    """Print the time of a step of both, and the ratio."""
    for name, values in (("ours", seconds.ours), ("diffusers", seconds.theirs)):
        print_row(f"{what}, {name}", f"{median_and_range([1e3 * s for s in values], '{:.2f}')} {unit}")
    print_row(f"{what}, ours / theirs", median_and_range(seconds.ratios()))


if __name__ == "__main__":
    sys.exit(errors.run(main))
