"""What do safe checkpoints cost? python -m benchmarks.checkpoints [--config=configs/cifar10.py] [--rounds=5]

Saves the training state of the config's network (parameters, their average, Adam's two moments) with random values,
restores it, and loads the averaged parameters alone; then repeats. The table shows medians, with minimum and maximum in
brackets.
"""

import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.__main__ import BenchmarkArgs, median_and_range
from ddpm_jax import config as configs
from ddpm_jax import errors, options
from ddpm_jax.run import log


@dataclasses.dataclass(frozen=True)
class Args(BenchmarkArgs):
    config_file: str = "configs/cifar10.py"
    shape: tuple[int, ...] = options.option((32, 32, 3), "height,width,channels of the images")
    rounds: int = options.option(5, "saves and loads", options.at_least(1))
    platform: str = options.option(*options.PLATFORM)
    cpu_devices: int = options.option(1, "number of devices that a CPU is split into", options.at_least(1))


@log.quiet()
def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.checkpoints", __doc__, configs.load)

    import jax
    import numpy as np

    from ddpm_jax import experiment, parallel
    from ddpm_jax.run import checkpoint, trees

    parallel.start(args.config.train.batch_size, 1, args.platform, "off", args.cpu_devices)
    parts = experiment.make(args.config, args.shape)
    template = jax.eval_shape(parts.init_state)
    random = np.random.default_rng(0)

    def draw(leaf):
        return random.standard_normal(leaf.shape).astype(leaf.dtype)

    state = parallel.replicate(jax.tree.map(draw, template)._replace(step=np.int32(0)))
    items = [getattr(state, name) for name in ("params", "ema_params", "opt_state")]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    times = {}

    def timed(name, function, *args):
        start = time.perf_counter()
        function(*args)
        times.setdefault(name, []).append(time.perf_counter() - start)

    folder = Path(tempfile.mkdtemp())
    try:
        with checkpoint.open_manager(folder, keep=1) as manager:
            for step in range(args.rounds + 1):
                state = state._replace(step=np.int32(step))
                start = time.perf_counter()
                timed("blocked", checkpoint.save, manager, state)
                checkpoint.finish(manager)
                times.setdefault("save", []).append(time.perf_counter() - start)
                host = jax.device_get(items)
                with ThreadPoolExecutor() as pool:
                    timed("digest", trees.digest, host, pool.map)
                timed("finite", trees.not_finite, host)
                timed("restore", checkpoint.restore_state, folder, template)
                timed("ema", checkpoint.load, folder, ["ema_params"])
                if not step:
                    times.clear()  # warm-up
    finally:
        shutil.rmtree(folder)

    print(f"{parallel.describe()}; {experiment.parameter_count(parts):,} parameters, a state of {size / 1e6:,.0f} MB\n")
    for name, text in ROWS.items():
        print(f"{text:<58} {median_and_range(times[name])} s")
    for name in ("digest", "finite"):
        ratio = statistics.median(a / b for a, b in zip(times[name], times["save"], strict=True))
        print(f"{ROWS[name] + ' / save':<58} {ratio:.3f}")
    return 0


ROWS = {
    "blocked": "training waits for an asynchronous save",
    "save": "save, until it is committed",
    "digest": "checksums of the state",
    "finite": "search for non-finite values",
    "restore": "restore the whole state, verified",
    "ema": "load the averaged parameters alone, verified",
}


if __name__ == "__main__":
    sys.exit(errors.run(main))
