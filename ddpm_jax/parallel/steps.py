"""The train step, evaluations and samplers mapped over the devices, and the placement of their arrays."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax.errors import ConfigError, Diverged

AXIS = "batch"


def check_batch_size(batch_size, accumulate=1, devices=None, members=1):
    """Raise ConfigError unless the batch divides evenly over all `devices` and micro-batches.

    An ensemble of several `members` runs in one process, and a member's whole batch is on one device.
    """
    if members > 1 and jax.process_count() > 1:
        raise ConfigError(f"train.ensemble={members} runs in one process, not in {jax.process_count()}")
    devices = 1 if members > 1 else len(devices or jax.devices())
    unit = devices * accumulate
    if batch_size % unit:
        valid = [size for size in (batch_size // unit * unit, -(-batch_size // unit) * unit) if size]
        over = f"{devices} devices" + (f" of {accumulate} micro-batches each" if accumulate > 1 else "")
        raise ConfigError(f"batch_size={batch_size} does not divide over {over}; try {' or '.join(map(str, valid))}")


def local_rows(batch_size):
    """The rows of a global batch that this process handles, as a slice."""
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def shard(batch):
    """Split this process's rows over its devices: (b, ...) -> (devices, b / devices, ...)."""
    return jax.tree.map(lambda x: x.reshape(jax.local_device_count(), -1, *x.shape[1:]), batch)


def replicate(tree, devices=None):
    """Place a copy of a tree on each device, with the sharding that the mapped functions return: they compile once."""
    mesh = Mesh(np.array(devices or jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def pmap_step(train_step, devices=None):
    """The train step mapped over all `devices` of all processes. Its state argument is donated."""
    axes = {"in_axes": (None, 0, None), "out_axes": None}
    return jax.pmap(train_step, axis_name=AXIS, **axes, devices=devices, donate_argnums=0)


def shard_members(steps, members):
    """(`steps` of arrays (members, ...) with the members sharded over as many devices as divide them, place).

    place(tree) moves a tree of such arrays to these devices.
    """
    devices = max(n for n in range(1, jax.device_count() + 1) if members % n == 0)
    mesh, spec = Mesh(np.array(jax.devices()[:devices]), ("members",)), PartitionSpec("members")
    sharded_steps = jax.shard_map(steps, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return sharded_steps, lambda tree: jax.device_put(tree, NamedSharding(mesh, spec))


def pmap_rows(measure):
    """measure(params, root, row), of a tree of arrays `row`, mapped over this process's devices and batches of rows."""
    batched = jax.vmap(measure, (None, None, 0))
    return jax.pmap(batched, axis_name=AXIS, in_axes=(None, None, 0), devices=jax.local_devices())


def measure_batches(measure, params, root, rows, batch_size=64):
    """Yield the results of a pmapped `measure` for `rows`, a tree of arrays (n, ...), as trees of arrays (b, ...).

    The batch size is rounded up to a multiple of the devices and the last batch is padded: one shape, one compilation.
    """
    devices, n = jax.local_device_count(), len(jax.tree.leaves(rows)[0])
    batch_size = -(-min(batch_size, n) // devices) * devices
    for start in range(0, n, batch_size):
        index, count = np.arange(start, start + batch_size) % n, min(batch_size, n - start)
        batch = shard(jax.tree.map(lambda x, index=index: x[index], rows))
        results = jax.device_get(measure(params, root, batch))
        yield jax.tree.map(lambda x, count=count: x.reshape(batch_size, *x.shape[2:])[:count], results)


def pmap_generate(generate):
    """`generate` (see samplers.make_generate) mapped over this process's devices and batches of images."""
    batched = jax.vmap(generate, (None, None, 0, 0))
    return jax.pmap(batched, axis_name=AXIS, in_axes=(None, None, 0, 0), devices=jax.local_devices())


def generate_batches(generate, params, root, indices, labels=None, batch_size=64):
    """Yield the images with the given indices as arrays (b, frames, H, W, C), drawn by a pmapped `generate`.

    Raises Diverged when an image is not finite.
    """

    def measure(params, root, row):
        return generate(params, root, row["index"], row["label"])

    rows, done = {"index": indices, "label": labels}, 0
    for images, finite in measure_batches(measure, params, root, rows, batch_size):
        if not finite.all():
            raise Diverged(f"sample {indices[done + np.argmin(finite)]} is not finite; nothing was written for it")
        yield images
        done += len(images)
