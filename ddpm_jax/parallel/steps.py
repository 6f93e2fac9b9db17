"""Functions over the devices: the train step, measurements of rows, samples; and where their arrays lie."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax.errors import ConfigError, Diverged

AXIS = "batch"


def check_batch_size(batch_size, accumulate=1, devices=None, members=1):
    """Raise ConfigError unless the batch divides evenly over all `devices` and micro-batches.

    Each of several `members` has a whole batch on one device; all are in one process.
    """
    if members > 1 and jax.process_count() > 1:
        raise ConfigError(f"train.ensemble={members} runs in one process, not in {jax.process_count()}")
    devices = 1 if members > 1 else len(devices or jax.devices())
    unit = devices * accumulate
    if batch_size % unit:
        near = [size for size in (batch_size // unit * unit, -(-batch_size // unit) * unit) if size]
        over = f"{devices} devices" + (f" of {accumulate} micro-batches each" if accumulate > 1 else "")
        raise ConfigError(f"batch_size={batch_size} does not divide over {over}; try {' or '.join(map(str, near))}")


def local_rows(batch_size):
    """The rows of a global batch that belong to this process."""
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def shard(batch):
    """Cut this process's rows into one piece a device: (b, ...) -> (devices, b / devices, ...)."""
    return jax.tree.map(lambda x: x.reshape(jax.local_device_count(), -1, *x.shape[1:]), batch)


def replicate(tree, devices=None):
    """Place a tree whole on each device, exactly as the mapped functions return it, so that they compile once."""
    mesh = Mesh(np.array(devices or jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def pmap_step(train_step, devices=None):
    """The train step over all `devices` of all processes; the state it is given is used up (donated)."""
    axes = {"in_axes": (None, 0, None), "out_axes": None}
    return jax.pmap(train_step, axis_name=AXIS, **axes, devices=devices, donate_argnums=0)


def spread(steps, members):
    """(`steps` of arrays (members, ...), the members shared out over as many devices as divide them; place).

    place(tree) puts one such tree where it belongs.
    """
    number = max(n for n in range(1, jax.device_count() + 1) if members % n == 0)
    mesh, parts = Mesh(np.array(jax.devices()[:number]), ("members",)), PartitionSpec("members")
    spread_steps = jax.shard_map(steps, mesh=mesh, in_specs=parts, out_specs=parts, check_vma=False)
    return spread_steps, lambda tree: jax.device_put(tree, NamedSharding(mesh, parts))


def pmap_rows(measure):
    """`measure`(params, root, row) over this process's devices and the rows of each; a row is a tree of arrays."""
    batched = jax.vmap(measure, (None, None, 0))
    return jax.pmap(batched, axis_name=AXIS, in_axes=(None, None, 0), devices=jax.local_devices())


def measure_batches(measure, params, root, rows, batch_size=64):
    """What a pmapped `measure` makes of `rows`, a tree of arrays (n, ...), one tree of arrays (b, ...) after another.

    The batch is rounded up to the devices, the last one filled up and cut off again: one shape, one compilation.
    """
    devices, n = jax.local_device_count(), len(jax.tree.leaves(rows)[0])
    batch_size = -(-min(batch_size, n) // devices) * devices
    for start in range(0, n, batch_size):
        take, keep = np.arange(start, start + batch_size) % n, min(batch_size, n - start)
        part = shard(jax.tree.map(lambda x, take=take: x[take], rows))
        found = jax.device_get(measure(params, root, part))
        yield jax.tree.map(lambda x, keep=keep: x.reshape(batch_size, *x.shape[2:])[:keep], found)


def pmap_generate(generate):
    """`generate` (see samplers.make_generate) over this process's devices and the images of each."""
    batched = jax.vmap(generate, (None, None, 0, 0))
    return jax.pmap(batched, axis_name=AXIS, in_axes=(None, None, 0, 0), devices=jax.local_devices())


def generate_batches(generate, params, root, indices, labels=None, batch_size=64):
    """Pictures of the given indices, one array (b, frames, H, W, C) after another, by a pmapped `generate`.

    Raises Diverged when a picture is not finite.
    """

    def measure(params, root, row):
        return generate(params, root, row["index"], row["label"])

    rows, done = {"index": indices, "label": labels}, 0
    for images, finite in measure_batches(measure, params, root, rows, batch_size):
        if not finite.all():
            raise Diverged(f"sample {indices[done + np.argmin(finite)]} is not finite; nothing was written for it")
        yield images
        done += len(images)
