"""The cost of a training step, found by compiling it for the devices here or for TPU chips that are not here."""

import collections
import math
import re
import time

import jax
import numpy as np

from ddpm_jax import data, experiment, keys, parallel, vectors
from ddpm_jax.networks import convolutions

LARGE = 128  # side of images above which minimal filtering is not compiled for CPU

# Per chip: bfloat16 FLOP/s, GiB of memory available to a program (libtpu 0.0.42 and 0.0.50), bytes per second from
# memory, and bytes per second in one direction to the other chips. All but the second column are from
# docs.cloud.google.com/tpu/docs: the pages of v4, v5e, v5p and tpu7x, and for v6e the comparison on the last one.
PEAKS = {
    "TPU v4": (275e12, 30.75, 1228e9, 300e9),
    "TPU v5 lite": (197e12, 15.75, 819e9, 200e9),
    "TPU v5": (459e12, 95.73, 2765e9, 600e9),
    "TPU v6 lite": (918e12, 31.24, 1638e9, 400e9),
    "TPU7x": (2307e12, 189.48, 7380e9, 600e9),
}


def dry_run(config, say):
    """Build and compile everything, take one step on random images, and report; no files are written.

    If minimal filtering compiles too slowly on a CPU, direct convolutions are compiled instead and no step is taken.
    """
    parts, batch = synthetic_batch(config)
    describe(parts, say)
    batch = parallel.shard(jax.tree.map(lambda x: x[parallel.local_rows(len(x))], batch))
    root = keys.root(config.train.seed, "train")
    if compiles_slowly(parts):
        say("compiling this network's minimal filtering for CPU would take more than a quarter of an hour;")
        say("direct convolutions are compiled instead, and the memory reported is theirs")
        with convolutions.direct_only():
            _compile(parallel.pmap_step(parts.train_step), jax.eval_shape(parts.init_state), batch, root, say)
        say("dry run done without a step, nothing written")
        return
    state = parallel.replicate(parts.init_state())
    compiled = _compile(parallel.pmap_step(parts.train_step), state, batch, root, say)
    start = time.monotonic()
    loss = compiled(state, batch, root)[1]["loss"].item()
    say(f"one step took {time.monotonic() - start:.2f} s, loss {loss:.4f}; dry run done, nothing written")


def compiles_slowly(parts):
    """Whether the network uses minimal filtering on large images, which XLA compiles slowly for CPU."""
    model = parts.config.model
    wide = (
        model.network == "unet"
        and model.dtype == "float32"
        and model.channels * max(model.multipliers) >= convolutions.MIN_CHANNELS
    )
    return jax.default_backend() == "cpu" and wide and max(parts.shape[:2]) > LARGE * model.patch


def compile_for_topology(config, devices, say):
    """Compile the step for `devices` that are not here; report its cost per device and a lower bound of its time."""
    parts, batch = synthetic_batch(config)
    describe(parts, say)
    state = vectors.unpack(jax.eval_shape(parts.init_state))
    root = jax.eval_shape(lambda: keys.root(config.train.seed, "train"))
    batch = jax.eval_shape(lambda: jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch))
    # At higher levels the compiler searches for the best shape of each convolution, which takes minutes.
    jax.config.update("jax_optimization_level", "O0")
    compiled = _compile(parallel.pmap_step(parts.train_step, devices), state, batch, root, say)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    # XLA counts the loop over micro-batches once; around it is the update, which reads and writes the state.
    loops, update = config.train.accumulate, 2 * memory.argument_size_in_bytes
    flops, traffic = loops * cost["flops"], update + loops * (cost["bytes accessed"] - update)
    say(f"{flops / 1e9:,.1f} GFLOP and {traffic / 1e9:,.2f} GB to and from memory per step on each device")
    exchanged = collectives(compiled.as_text())
    for name, (count, size) in exchanged.items():
        say(f"{count} {name} of {size / 1e6:,.1f} MB")
    used, total = memory.argument_size_in_bytes + memory.temp_size_in_bytes, sum(size for _, size in exchanged.values())
    report_bound(devices, config.train.batch_size, flops, traffic, used, total, say)


def report_bound(devices, batch_size, flops, traffic, used, exchanged, say):
    """Report the lower bound of a step's time from FLOP and bytes per device, by the peak figures of the chips."""
    kind, chips = devices[0].device_kind, len({tuple(device.coords) for device in devices})
    per_chip = len(devices) // chips
    say(f"{len(devices)} devices are {chips} chips {kind}")
    if kind not in PEAKS:
        say(f"{kind}: no peak figures are known, so there is no estimate")
        return
    speed, memory, bandwidth, link = PEAKS[kind]
    say(f"{per_chip * used / (memory * 2**30):.1%} of the {memory:.2f} GiB of a chip's memory available to programs")
    ring = 2 * (chips - 1) / chips * exchanged
    times = {"products": per_chip * flops / speed, "memory": per_chip * traffic / bandwidth, "exchange": ring / link}
    bound = max(times.values())
    say(f"no step is faster than {1e3 * bound:.2f} ms, {batch_size / bound:,.0f} images/s")
    say(", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items()))
    peaks = f"{speed / 1e12:.0f} TFLOP/s in bfloat16, {bandwidth / 1e9:.0f} GB/s of memory"
    say(f"at {kind}'s {peaks}, {link / 1e9:.0f} GB/s of links per chip")


def collectives(text):
    """{operation: (count, bytes of results per device)} in the text of a compiled program."""
    found = collections.defaultdict(lambda: (0, 0))
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for shapes, name in re.findall(rf"= (\(?.*?\)?) ({kinds})(?:-start)?\(", text):
        count, size = found[name]
        for letters, bits, sides in re.findall(r"\b(f|bf|s|u|pred)(\d*)\[([\d,]*)\]", shapes):
            size += math.prod(map(int, filter(None, sides.split(",")))) * (int(bits) if letters != "pred" else 8) // 8
        found[name] = count + 1, size
    return dict(found)


def synthetic_batch(config):
    """(Experiment, a whole batch of random images) for images as in the config, or else as in its data."""
    size, channels = config.data.image_size, config.data.channels
    shape = (*(size * 2)[:2], channels) if size and channels else None  # one number is a square
    parts = experiment.make(config, shape or data.load(**vars(config.data)).images.shape[1:])
    images = np.random.default_rng(0).integers(0, 256, (config.train.batch_size, *parts.shape), np.uint8)
    labels = np.zeros(len(images), np.int32) if config.model.num_classes else None
    return parts, data.batch(data.Dataset(images, labels), 0, 0, len(images))


def describe(parts, say):
    """Report the number of parameters, in all and for each part of the network."""
    images, total = "x".join(map(str, parts.shape)), experiment.parameter_count(parts)
    say(f"{experiment.describe_network(parts)} for images of {images}")
    for name, number in counts(experiment.params_shape(parts)).items():
        say(f"{name:>12}{number:>14,}{number / total:>8.1%}")


def counts(params):
    """{part: number of parameters}; a level of a U-Net is one part."""
    found = collections.Counter()
    for name, tree in params.items():
        part = re.sub(r"_(block|attention|halve|double|\d+$).*", "", name)
        found[part] += sum(leaf.size for leaf in jax.tree.leaves(tree))
    return found


def _compile(train_step, state, batch, root, say):
    start = time.monotonic()
    compiled = train_step.lower(state, batch, root).compile()
    memory = compiled.memory_analysis()
    held, used = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    say(f"compiled in {time.monotonic() - start:.1f} s; a device holds {held:,.0f} MB, a step uses {used:,.0f} MB more")
    return compiled
