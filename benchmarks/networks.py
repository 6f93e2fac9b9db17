"""The networks at about equal parameters: python -m benchmarks.networks [--parameters=1.6] [--batch=32] [--side=32]

A Markdown table: parameters; GFLOP of products and convolutions of an image, forward; seconds to compile a gradient and
its memory; images per second of processor time, forward and with gradients, and their share of what a product of
matrices reaches, measured in turns with them. Counted is the processor time of all cores, so that other work on the
machine matters less. Each row is a network; a gradient counts as three forward passes.
"""

import dataclasses
import resource
import statistics
import sys
import time

import numpy as np

from ddpm_jax import config as configs
from ddpm_jax import errors, options

SIDE = 2048  # of the matrices
U_NET = {"model.multipliers": (1, 2, 2, 2), "model.num_res_blocks": 1, "model.groups": "auto"}
ROWS = {
    "U-Net": U_NET | {"model.attention_resolutions": (8, 4)},
    "U-Net, residual": U_NET | {"model.attention_resolutions": (8, 4), "model.resample": "residual"},
    "U-Net, patch 2": U_NET | {"model.patch": 2, "model.multipliers": (1, 2, 2), "model.attention_resolutions": (8, 4)},
    "DiT, patch 2": {"model.network": "dit", "model.patch": 2, "model.depth": 6, "model.num_heads": 4},
    "DiT, patch 4": {"model.network": "dit", "model.patch": 4, "model.depth": 6, "model.num_heads": 4},
}


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    parameters: float = options.option(1.6, "millions of parameters of each network, about", options.above(0))
    batch: int = options.option(32, "images", options.at_least(1))
    side: int = options.option(32, "side of the images", options.at_least(16))
    rounds: int = options.option(5, "rounds, each of all programs of a network and the product", options.at_least(1))
    only: str = options.option("", "rows whose names start so; all when empty")
    cpu_devices: int = options.option(*options.CPU_DEVICES)
    debug: bool = options.option(*options.DEBUG)


def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.networks", __doc__)

    import jax

    from ddpm_jax import parallel
    from ddpm_jax.run import log

    parallel.start(1, 1, "cpu", "off")
    log.note(f"jax {jax.__version__}, {args.batch} images of {args.side}x{args.side}x3\n\n{HEADER}")
    for name, fields in ROWS.items():
        if name.startswith(args.only):
            log.note(f"| {name} | {measure(fields, args)} |")
    return 0


HEADER = """\
| network | channels | million parameters | GFLOP | compile, s | memory, MB | forward, 1/s | gradient, 1/s | shares |
|---|---:|---:|---:|---:|---:|---:|---:|---|"""


def measure(fields, args):
    """The cells of a row."""
    import jax
    import jax.numpy as jnp

    from ddpm_jax import experiment

    parts = of_size(fields, 1e6 * args.parameters, args.side)
    params = jax.jit(parts.init)(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(args.batch, *parts.shape)).astype(np.float32)
    times, keys = np.arange(1, args.batch + 1), jax.random.split(jax.random.key(0), args.batch)
    matrix = jnp.ones((SIDE, SIDE))

    def loss(params):
        return jnp.mean(jax.vmap(parts.loss, (None, 0, 0))(params, keys, images))

    def forward(params):
        return jax.vmap(parts.net, (None, 0, 0))(params, images, times)

    flops = products(jax.make_jaxpr(forward)(params).jaxpr)
    forward = jax.jit(forward).lower(params).compile()
    start = time.process_time()
    gradient = jax.jit(jax.grad(loss)).lower(params).compile()
    compiling = time.process_time() - start
    programs = (forward, params), (gradient, params), (jax.jit(lambda x: x @ x), matrix)
    for program, argument in programs:
        jax.block_until_ready(program(argument))
    rounds = [[seconds(*program) for program in programs] for _ in range(args.rounds)]
    rates = [(flops / a, 3 * flops / b, 2 * SIDE**3 / c) for a, b, c in rounds]
    ahead, back = (args.batch / statistics.median(column) for column in list(zip(*rounds, strict=True))[:2])
    shares = " and ".join(f"{statistics.median(rate[i] / rate[2] for rate in rates):.2f}" for i in (0, 1))
    memory = gradient.memory_analysis().temp_size_in_bytes / 1e6
    million = experiment.parameter_count(parts) / 1e6
    cells = f"{parts.config.model.channels} | {million:.2f} | {flops / args.batch / 1e9:.2f}"
    return f"{cells} | {compiling:.0f} | {memory:,.0f} | {ahead:,.0f} | {back:,.0f} | {shares}"


def of_size(fields, parameters, side):
    """The Experiment with the channels, a multiple of 16, that bring the number of parameters closest."""
    from ddpm_jax import experiment

    best = None
    for channels in range(16, 1025, 16):
        drawn = fields | {"model.channels": channels, "model.dropout": 0.0, "diffusion.variance": "fixedsmall"}
        parts = experiment.make(options.replace(configs.Config(), drawn), (side, side, 3))
        error = abs(experiment.parameter_count(parts) - parameters)
        if best and error > best[0]:
            break
        best = error, parts
    return best[1]


def products(jaxpr):
    """FLOP of all products and convolutions in a jaxpr; the body of a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        name, (*inputs,) = equation.primitive.name, equation.invars
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([inputs[0].aval.shape[axis] for axis in contracted])
            total += 2 * equation.outvars[0].aval.size * depth
        elif name == "convolution":
            total += 2 * equation.outvars[0].aval.size * np.prod(inputs[1].aval.shape[:3])
        else:
            times = equation.params["length"] if name == "scan" else 1
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                total += times * products(inner) if hasattr(inner, "eqns") else 0
    return float(total)


def seconds(program, argument):
    """Of processor time, all threads together."""
    import jax

    start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    jax.block_until_ready(program(argument))
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime - start


if __name__ == "__main__":
    sys.exit(errors.run(main))
