"""Speed compared with diffusers on PyTorch: python -m benchmarks.peers [--config=configs/digits.py] [--rounds=8]

Same network and weights, same batch size and image size, float32, alternating in one process; needs
pip install -e ".[peers]". A training step is noise, loss, gradient, clipping to norm 1, Adam and EMA in both; that of
diffusers follows its train_unconditional.py, with the images scaled beforehand. A sampling step is one of DDPMPipeline
or DDIMPipeline, and one of ours with the same sampler. Ratios are ours / theirs, each block of ours between two of
theirs: medians, with minimum and maximum in brackets.
"""

import copy
import dataclasses
import operator
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.__main__ import BenchmarkArgs, alternate, means_of_neighbours, median_and_range, print_row
from ddpm_jax import config as configs
from ddpm_jax import errors, options


@dataclasses.dataclass(frozen=True)
class Args(BenchmarkArgs):
    rounds: int = options.option(8, "blocks of ours, each between two of theirs", options.at_least(1))
    block: int = options.option(10, "training steps in a block", options.at_least(1))
    num: int = options.option(64, "images in a batch of samples; 0 to skip sampling", options.at_least(0))
    sample_steps: tuple[int, ...] = options.option(
        (1000, 50), "steps of ancestral sampling and of DDIM", options.all_of(options.at_least(2))
    )
    sample_rounds: int = options.option(3, "batches of ours, each between two of theirs", options.at_least(1))
    threads: int = options.option(0, "threads of PyTorch; 0 for its own choice", options.at_least(0))


def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.peers", __doc__, configs.load)
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise errors.ConfigError(f"{error.name} is missing: pip install -e '.[peers]'") from error

    from ddpm_jax import experiment, parallel
    from ddpm_jax.commands.dry_run import synthetic_batch
    from ddpm_jax.run import checkpoint, log

    train = args.config.train
    parallel.start(train.batch_size, 1, "cpu", "off", args.cpu_devices)
    parallel.check_batch_size(train.batch_size)
    if args.threads:
        torch.set_num_threads(args.threads)
    log.note(f"{parallel.describe()}, jax {checkpoint.versions()['jax']}")
    log.note(f"{torch.get_num_threads()} threads, torch {torch.__version__}, diffusers {diffusers.__version__}")
    parts, batch = synthetic_batch(args.config)
    log.note(
        f"{args.config_file}: {experiment.parameter_count(parts):,} parameters, "
        f"{train.batch_size} images of {'x'.join(map(str, parts.shape))} a step\n"
    )
    params, theirs = networks(parts)
    peak = matmul_flops()
    print_row("products of 2048x2048 matrices", f"{peak / 1e9:,.0f} GFLOP/s")
    measure_training(args, parts, params, theirs, batch, peak)
    for name, steps in zip(("ddpm", "ddim"), args.sample_steps if args.num else (), strict=False):
        measure_sampling(args, parts, params, theirs, name, steps)
    return 0


def networks(parts):
    """(our parameters, their network with the same ones); prints how far their outputs differ."""
    import diffusers
    import jax
    import numpy as np
    import torch

    from ddpm_jax import experiment
    from ddpm_jax.interop import released

    def draw(path, leaf):  # random also where training starts at zero, to compare every layer
        return (0.05 * random.normal(size=leaf.shape) + (path[-1].key == "scale")).astype(np.float32)

    random = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(draw, experiment.params_shape(parts))
    with tempfile.TemporaryDirectory() as folder:
        released.write(Path(folder), parts, params)
        theirs = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    x = random.normal(size=(1, *parts.shape)).astype(np.float32)
    ours = np.asarray(jax.jit(parts.net)(params, x[0], 500))
    with torch.no_grad():
        output = theirs.eval()(torch.from_numpy(np.moveaxis(x, -1, 1).copy()), 499).sample
    difference = np.abs(ours - np.moveaxis(output.numpy(), 1, -1)[0]).max() / np.abs(ours).max()
    print_row("difference of the outputs / largest", f"{difference:.1e}", "under 1e-5")
    return params, theirs


def matmul_flops(n=2048, tries=8):
    """The best FLOP/s of a product of two n x n matrices."""
    import jax
    import jax.numpy as jnp

    matrix, seconds = jnp.ones((n, n)), []
    multiply = jax.jit(jnp.matmul)
    for _ in range(tries):
        start = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def measure_training(args, parts, params, theirs, batch, peak):
    """Print the rows about a training step of both."""
    import diffusers
    import jax
    import torch
    from diffusers.training_utils import EMAModel

    from ddpm_jax import keys, parallel

    config = args.config.train
    state, root, shards = parallel.replicate(parts.init_state(params)), keys.root(0, "train"), parallel.shard(batch)
    compiled = parallel.pmap_step(parts.train_step).lower(state, shards, root).compile()

    def our_steps():
        nonlocal state
        for _ in range(args.block):
            state, metrics = compiled(state, shards, root)
        jax.block_until_ready((state, metrics))

    net = copy.deepcopy(theirs).train()
    optimizer = torch.optim.Adam(net.parameters(), config.learning_rate)
    average = EMAModel(net.parameters(), decay=config.ema_decay, use_ema_warmup=True)
    scheduler = diffusers.DDPMScheduler(args.config.diffusion.T)
    images = torch.from_numpy(batch["image"]).movedim(-1, 1).contiguous() / 127.5 - 1

    def diffusers_steps():
        for _ in range(args.block):
            noise = torch.randn(images.shape)
            times = torch.randint(scheduler.config.num_train_timesteps, (len(images),))
            output = net(scheduler.add_noise(images, noise, times), times).sample
            torch.nn.functional.mse_loss(output, noise).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            average.step(net.parameters())

    seconds = compare("training step", "ms", our_steps, diffusers_steps, args.rounds, args.block)
    flops = compiled.cost_analysis()["flops"] * jax.device_count()
    print_row("ours, share of the matrix products' speed", f"{flops / statistics.median(seconds) / peak:.2f}")


def measure_sampling(args, parts, params, theirs, name, steps):
    """Print the rows about a batch of samples of both."""
    import diffusers
    import jax
    import numpy as np

    from ddpm_jax import experiment, keys, parallel

    scheduler, pipeline = {
        "ddpm": (diffusers.DDPMScheduler, diffusers.DDPMPipeline),
        "ddim": (diffusers.DDIMScheduler, diffusers.DDIMPipeline),
    }[name]
    pipeline = pipeline(theirs.eval(), scheduler(args.config.diffusion.T))
    pipeline.set_progress_bar_config(disable=True)
    index = parallel.shard(np.arange(args.num))
    generate = parallel.pmap_generate(experiment.make_generate(parts, name, steps))
    placed, root = parallel.replicate(params), keys.root(0, "sample")

    def our_batch():
        jax.block_until_ready(generate(placed, root, index, None))

    def diffusers_batch():
        pipeline(batch_size=args.num, num_inference_steps=steps, output_type="np")

    what = f"{name}, {steps:,} steps, {args.num} images"
    compare(what, "ms a step", our_batch, diffusers_batch, args.sample_rounds, steps)


def compare(what, unit, ours, theirs, rounds, steps):
    """Print the time of a step of both and the ratio; return the seconds of our steps. A call makes `steps` steps."""

    def timer(call):
        def measure():
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) / steps

        measure()  # warm-up
        return measure

    our_seconds, their_seconds = alternate(timer(ours), timer(theirs), rounds)
    for name, seconds in (("ours", our_seconds), ("diffusers", their_seconds)):
        print_row(f"{what}, {name}", f"{median_and_range([1e3 * s for s in seconds], '{:.2f}')} {unit}")
    ratios = map(operator.truediv, our_seconds, means_of_neighbours(their_seconds))
    print_row(f"{what}, ours / theirs", median_and_range(ratios))
    return our_seconds


if __name__ == "__main__":
    sys.exit(errors.run(main))
