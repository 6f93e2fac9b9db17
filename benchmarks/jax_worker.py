"""Our process in the comparisons of peers.py, which builds nothing but what it is asked for: commands on stdin."""

import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.diffusers_worker import peak_memory, serve
from ddpm_jax import config as configs
from ddpm_jax import data, experiment, keys, parallel

SIDE = 2048  # of the matrices that stand for the speed of the machine
PRODUCT = 2 * SIDE**3  # FLOP


def draw_params(parts):
    """Random parameters, also where training starts at zero, so that a comparison of outputs covers every layer."""

    def draw(path, leaf):
        return (0.05 * random.normal(size=leaf.shape) + (path[-1].key == "scale")).astype(np.float32)

    random = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(draw, experiment.params_shape(parts))


def matmul_flops(tries=8):
    """The best FLOP/s of a product of two 2048x2048 matrices."""
    matrix, seconds = jax.numpy.ones((SIDE, SIDE)), []
    multiply = jax.jit(jax.numpy.matmul)
    for _ in range(tries):
        begin = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        seconds.append(time.perf_counter() - begin)
    return PRODUCT / min(seconds)


def start(folder, config, cpu_devices):
    """(text about the devices and versions, the commands) for the images in `folder`."""
    folder, config = Path(folder), configs.from_json(config)
    jax.config.update("jax_enable_compilation_cache", False)  # memory includes that of compiling
    images = np.load(folder / "images.npy")
    parallel.start(len(images), 1, "cpu", "off", cpu_devices)
    parts = experiment.make(config, images.shape[1:])
    training, generators = [], {}

    def prepare():
        batch = data.batch(data.Dataset(images, None), 0, 0, len(images))
        inputs = parallel.shard(batch), keys.root(0, "train")
        state = parallel.replicate(parts.init_state())
        return state, inputs, parallel.pmap_step(parts.train_step).lower(state, *inputs).compile()

    def train(steps):
        """The seconds of `steps` training steps."""
        if not training:
            training.extend(prepare())
        state, inputs, step = training
        begin = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, *inputs)
        jax.block_until_ready((state, metrics))
        training[0] = state
        return time.perf_counter() - begin

    def flops():
        """FLOP of a training step on all devices."""
        return training[2].cost_analysis()["flops"] * jax.device_count()

    def output(t):
        """Write the network's output for the noisy images of x.npy at time `t` in 1..T to ours.npy."""
        found = jax.jit(jax.vmap(parts.net, (None, 0, None)))(draw_params(parts), np.load(folder / "x.npy"), t)
        np.save(folder / "ours.npy", found)

    def sample(steps, name, num):
        """The seconds of `num` samples with the sampler `name`."""
        if (name, num, steps) not in generators:
            generate = parallel.pmap_generate(experiment.make_generate(parts, name, steps))
            inputs = parallel.replicate(draw_params(parts)), keys.root(0, "sample"), parallel.shard(np.arange(num))
            generators[name, num, steps] = lambda: generate(*inputs, None)
        begin = time.perf_counter()
        jax.block_until_ready(generators[name, num, steps]())
        return time.perf_counter() - begin

    commands = {"train": train, "flops": flops, "matmul_flops": matmul_flops, "memory": peak_memory}
    return f"{parallel.describe()}, jax {jax.__version__}", commands | {"output": output, "sample": sample}


if __name__ == "__main__":
    serve(start)
