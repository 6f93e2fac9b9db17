"""A file of ratios that were measured before, for each stack and config, to see what has become slower.

All are ratios within one run, so that machines of different speed can be compared. The file has the values of each
run that was recorded; slower is a median that exceeds theirs by more than the width of their range. A second record
widens the range by what differs from run to run; to begin anew, delete the file or the entry of the config.
"""

import json
import statistics
import sys
import time
from pathlib import Path

from ddpm_jax import config as configs
from ddpm_jax import errors, options

SLOWER = "slower than the reference by more than its spread"
BLOCK = 5  # compilations of the small program, which are timed as a whole


def describe_stack():
    """The minor version of Python, the version of JAX and the devices, as text."""
    import jax

    from ddpm_jax import parallel

    python = ".".join(map(str, sys.version_info[:2]))
    return f"Python {python}, jax {jax.__version__}, {parallel.describe()}"


def describe_config(args):
    """The config's file and the options that change it, as text."""
    changes = configs.differences(configs.load(args.config_file), args.config)
    return " ".join([Path(args.config_file).name, *(f"--config.{name}={options.to_text(b)}" for name, _, b in changes)])


def read(path):
    """{stack: {config: {row: values}}} in the file at `path`; empty if there is none."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise errors.ConfigError(f"cannot read --reference={path}: {error}") from error


def find(path, stack, config):
    """The rows of `config` on `stack` in the file at `path`. ConfigError if there are none."""
    try:
        return read(path)[stack][config]
    except KeyError as error:
        raise errors.ConfigError(
            f"{path} has nothing for {config} on {stack}; measure it with --record on a revision that is fast enough"
        ) from error


def record(path, stack, config, found):
    """Add the values `found`, {row: list}, to those of `config` on `stack` in the file at `path`."""
    from ddpm_jax.run.files import write_atomic

    content = read(path)
    before = content.setdefault(stack, {}).get(config, {})
    content[stack][config] = {
        row: before.get(row, []) + [float(f"{value:.4g}") for value in values] for row, values in found.items()
    }
    with errors.writing(f"--reference={path}"):
        write_atomic(Path(path), (json.dumps(content, indent=1) + "\n").encode())


def compare(expected, found):
    """{row: text} for the values `found`, {row: list}: ok, or slower than the rows `expected` from `find`.

    ConfigError where the rows are not the same.
    """
    if expected.keys() != found.keys():
        rows = ", ".join(sorted(expected.keys() ^ found.keys()))
        raise errors.ConfigError(f"the reference was measured with other options; only here or only there: {rows}")
    texts = {}
    for row, values in found.items():
        median, low, high = (of(expected[row]) for of in (statistics.median, min, max))
        slower = statistics.median(values) - median > high - low
        texts[row] = f"{SLOWER if slower else 'ok'}: {median:.3f} ({low:.3f} to {high:.3f})"
    return texts


def time_small_compilation():
    """The seconds to compile a small program that never changes."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    def loss(kernels, x):
        for kernel in kernels:
            convolved = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = x + jnp.tanh(convolved - convolved.mean((1, 2), keepdims=True))
        return jnp.sum(x**2)

    kernels = [jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32)] * 8
    images = jax.ShapeDtypeStruct((8, 16, 16, 16), jnp.float32)
    seconds = 0.0
    for _ in range(BLOCK):
        lowered = jax.jit(lambda *args: jax.grad(loss)(*args)).lower(
            kernels, images
        )  # a new function, so compiled anew
        start = time.perf_counter()
        lowered.compile()
        seconds += time.perf_counter() - start
    return seconds / BLOCK
