"""What a training step takes, found by compiling it for the devices here, or for TPU chips that are elsewhere."""

import collections
import math
import re
import time

import jax
import numpy as np

from ddpm_jax import data, experiment, keys, parallel
from ddpm_jax.networks import convolutions

LARGE = 128  # sides beyond which minimal filtering is not compiled for a CPU

# Of a chip: products in bfloat16 a second, GiB of memory that the compiler gives a program (libtpu 0.0.42 and 0.0.50),
# bytes a second from memory, and in one direction to the other chips. Without the second column, from
# docs.cloud.google.com/tpu/docs, the pages of v4, v5e, v5p and tpu7x; that of v6e is compared with the last.
PEAKS = {
    "TPU v4": (275e12, 30.75, 1228e9, 300e9),
    "TPU v5 lite": (197e12, 15.75, 819e9, 200e9),
    "TPU v5": (459e12, 95.73, 2765e9, 600e9),
    "TPU v6 lite": (918e12, 31.24, 1638e9, 400e9),
    "TPU7x": (2307e12, 189.48, 7380e9, 600e9),
}


def dry_run(config, say):
    """Build and compile everything, take one step on made-up images, and report; nothing is written.

    Where the convolutions of a large network compile too slowly on a CPU, others are compiled, and no step is taken.
    """
    parts, batch = synthetic_batch(config)
    describe(parts, say)
    batch = parallel.shard(jax.tree.map(lambda x: x[parallel.local_rows(len(x))], batch))
    root = keys.root(config.train.seed, "train")
    if compiles_slowly(parts):
        say("XLA would compile this network's minimal filtering for a CPU for more than a quarter of an hour;")
        say("compiled here are direct convolutions in its place, and the memory told is theirs")
        with convolutions.direct_only():
            _compile(parallel.pmap_step(parts.train_step), jax.eval_shape(parts.init_state), batch, root, say)
        say("dry run done without a step, nothing written")
        return
    state = parallel.replicate(parts.init_state())
    compiled = _compile(parallel.pmap_step(parts.train_step), state, batch, root, say)
    clock = time.monotonic()
    loss = compiled(state, batch, root)[1]["loss"].item()
    say(f"one step took {time.monotonic() - clock:.2f} s, loss {loss:.4f}; dry run done, nothing written")


def compiles_slowly(parts):
    """Whether the network has minimal filtering of large images, which XLA for CPU takes long to compile."""
    model = parts.config.model
    wide = model.dtype == "float32" and model.channels * max(model.multipliers) >= convolutions.WIDE
    return jax.default_backend() == "cpu" and wide and max(parts.shape[:2]) > LARGE


def for_topology(config, devices, say):
    """Compile the step for `devices` that are not here, and tell what it takes of each and what it cannot beat."""
    parts, batch = synthetic_batch(config)
    describe(parts, say)
    state, root = jax.eval_shape(parts.init_state), jax.eval_shape(lambda: keys.root(config.train.seed, "train"))
    batch = jax.eval_shape(lambda: jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch))
    # With more effort the compiler searches for minutes for the best shape of each convolution.
    jax.config.update("jax_optimization_level", "O0")
    compiled = _compile(parallel.pmap_step(parts.train_step, devices), state, batch, root, say)
    held, once = compiled.memory_analysis(), compiled.cost_analysis()
    # XLA counts the loop over micro-batches once; around it is the update, which reads and writes the state.
    turns, update = config.train.accumulate, 2 * held.argument_size_in_bytes
    flops, moved = turns * once["flops"], update + turns * (once["bytes accessed"] - update)
    say(f"{flops / 1e9:,.1f} GFLOP and {moved / 1e9:,.2f} GB to and from memory a step on each device")
    exchanged = collectives(compiled.as_text())
    for name, (number, size) in exchanged.items():
        say(f"{number} {name} of {size / 1e6:,.1f} MB")
    kind, chips = devices[0].device_kind, len({tuple(device.coords) for device in devices})
    on_chip = len(devices) // chips
    say(f"{len(devices)} devices are {chips} chips {kind}")
    if kind not in PEAKS:
        say(f"{kind}: no peak figures are known here, so there is no estimate")
        return
    speed, memory, bandwidth, link = PEAKS[kind]
    share = on_chip * (held.argument_size_in_bytes + held.temp_size_in_bytes) / (memory * 2**30)
    say(f"{share:.1%} of the {memory:.2f} GiB that programs have of a chip's memory")
    ring = 2 * (chips - 1) / chips * sum(size for _, size in exchanged.values())
    times = {"products": on_chip * flops / speed, "memory": on_chip * moved / bandwidth, "exchange": ring / link}
    least = max(times.values())
    say(f"no step is faster than {1e3 * least:.2f} ms, {config.train.batch_size / least:,.0f} images/s")
    peaks = (
        f"{speed / 1e12:.0f} TFLOP/s in bfloat16, {bandwidth / 1e9:.0f} GB/s of memory, {link / 1e9:.0f} GB/s of links"
    )
    say(", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items()))
    say(f"at {kind}'s {peaks}, of each chip")


def collectives(text):
    """{operation: (how many, bytes that they give each device)} in the text of a compiled program."""
    found = collections.defaultdict(lambda: (0, 0))
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for shapes, name in re.findall(rf"= (\(?.*?\)?) ({kinds})(?:-start)?\(", text):
        number, size = found[name]
        for letters, bits, sides in re.findall(r"\b(f|bf|s|u|pred)(\d*)\[([\d,]*)\]", shapes):
            size += math.prod(map(int, filter(None, sides.split(",")))) * (int(bits) if letters != "pred" else 8) // 8
        found[name] = number + 1, size
    return dict(found)


def synthetic_batch(config):
    """(Experiment, a whole batch of made-up images) for images as the config has them, or else as its data are."""
    size, channels = config.data.image_size, config.data.channels
    known = (*(size * 2)[:2], channels) if size and channels else None  # one number is a square
    parts = experiment.make(config, known or data.load(**vars(config.data)).images.shape[1:])
    images = np.random.default_rng(0).integers(0, 256, (config.train.batch_size, *parts.shape), np.uint8)
    labels = np.zeros(len(images), np.int32) if config.model.num_classes else None
    return parts, data.batch(data.Dataset(images, labels), 0, 0, len(images))


def describe(parts, say):
    """Say how many parameters there are, and in which parts of the network."""
    images, total = "x".join(map(str, parts.shape)), experiment.parameter_count(parts)
    say(f"U-Net of {total:,} parameters for images of {images}")
    for name, number in counts(experiment.params_shape(parts)).items():
        say(f"{name:>12}{number:>14,}{number / total:>8.1%}")


def counts(params):
    """{part: how many parameters}; what belongs to one level of the U-Net is one part."""
    found = collections.Counter()
    for name, tree in params.items():
        part = re.sub(r"_(block|attention|halve|double|\d+$).*", "", name)
        found[part] += sum(leaf.size for leaf in jax.tree.leaves(tree))
    return found


def _compile(train_step, state, batch, root, say):
    clock = time.monotonic()
    compiled = train_step.lower(state, batch, root).compile()
    memory = compiled.memory_analysis()
    held, used = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    say(f"compiled in {time.monotonic() - clock:.1f} s; a device holds {held:,.0f} MB, a step uses {used:,.0f} MB more")
    return compiled
