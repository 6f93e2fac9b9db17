"""Forms of convolutions: python -m benchmarks.convolutions [--config=configs/digits.py] [--rounds=15]

A Markdown table of every convolution larger than 1x1 in a training step of the config, and of its gradients: the form
that `ddpm_jax.networks.convolutions.choose_forms` chooses on a CPU, and the quickest of all that fit. The forms of one
operation take turns, each on all devices at once. Times are medians; ratios are to the quickest form in the same round,
medians with minimum and maximum in brackets. The last line is for the sum over a whole step. XLA's own gradients can be
the quickest here and slow in loops, where this command does not measure them.
"""

import collections
import dataclasses
import statistics
import sys
import time
from typing import NamedTuple

from benchmarks.__main__ import BenchmarkArgs, make_timer, median_and_range
from ddpm_jax import config as configs
from ddpm_jax import errors, options

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FIRST_OF_DOUBLING = (2, 2), ((1, 0), (1, 0))  # kernel and padding of the first of its four convolutions


@dataclasses.dataclass(frozen=True)
class Args(BenchmarkArgs):
    rounds: int = options.option(15, "measurements of each form", options.at_least(1))
    clock: str = options.option(
        "wall", "or cpu, the processor time of all threads: for a machine with other work", options.one_of(*CLOCKS)
    )
    milliseconds: float = options.option(5.0, "duration of a measurement, if a call is shorter", options.above(0))


class Case(NamedTuple):
    """An operation, a field of convolutions.Form, for the images of one device."""

    image: tuple[int, ...]  # (N, H, W, C)
    kernel: tuple[int, ...]  # (kh, kw, C, F)
    doubling: bool  # a convolution after nearest-neighbour upsampling
    stride: int
    padding: tuple[tuple[int, int], ...]
    operation: str
    dtype: str
    chosen: str


def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.convolutions", __doc__, configs.load)

    import jax

    from ddpm_jax import parallel
    from ddpm_jax.run import log

    jax.config.update("jax_enable_compilation_cache", False)
    batch_size = args.config.train.batch_size
    parallel.start(batch_size, 1, "cpu", "off", args.cpu_devices)
    parallel.check_batch_size(batch_size)
    log.note(f"{parallel.describe()}, jax {jax.__version__}, {args.config_file}, {batch_size} images a step\n")
    log.note("| convolution | of | in a step | chosen | ms | quickest | ms | chosen / quickest |")
    log.note("|---|---|---:|---|---:|---|---:|---:|")
    totals = [(0.0, 0.0)] * args.rounds
    for case, count in find_cases(args.config).items():
        seconds = measure(case, args)
        quickest = min(seconds, key=lambda name: statistics.median(seconds[name]))
        pairs = list(zip(seconds[case.chosen], seconds[quickest], strict=True))
        totals = [(a + count * c, b + count * q) for (a, b), (c, q) in zip(totals, pairs, strict=True)]
        names = f"{describe(case)} | {case.operation.replace('_', ' ')} | {count}"
        times = [f"{name} | {1e3 * statistics.median(seconds[name]):.2f}" for name in (case.chosen, quickest)]
        log.note(f"| {names} | {' | '.join(times)} | {ratio(pairs)} |")
    log.note(f"\nwhole step, chosen forms / quickest forms: {ratio(totals)}")
    return 0


def ratio(pairs):
    return median_and_range([chosen / quickest for chosen, quickest in pairs])


def describe(case):
    """Sides of the image and the kernel, and their channels, as text."""
    (_, height, width, channels), (*_, features) = case.image, case.kernel
    sides = f"{height}x{width}, {channels} to {features}"
    return sides + ", doubled" * case.doubling + ", halved" * (case.stride == 2)


def find_cases(config):
    """{Case: how often} in the training step of `config`, from the traced program; a loop counts once."""
    import jax

    from ddpm_jax import keys, parallel
    from ddpm_jax.commands.dry_run import synthetic_batch

    parts, batch = synthetic_batch(config)
    arguments = jax.eval_shape(parts.init_state), parallel.shard(batch), keys.root(0, "train")
    program = jax.make_jaxpr(parallel.pmap_step(parts.train_step))(*arguments)
    found = collections.Counter(filter(None, map(make_case, equations(program.jaxpr))))
    return dict(sorted(found.items(), key=lambda item: (-item[0].image[1], item[0])))


def equations(jaxpr):
    """All equations of a program, also those inside others."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(part, "jaxpr", part)  # that of a closed program
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def make_case(equation):
    """The Case of an equation, or None if it is none: no convolution, one of 1x1, or another part of a doubling."""
    from ddpm_jax.networks import convolutions

    operation = {
        "convolution": "output",
        "convolution_input_gradient": "input_gradient",
        "convolution_kernel_gradient": "kernel_gradient",
    }.get(equation.primitive.name)
    if not operation:
        return None
    (a, b), result, given = (x.aval.shape for x in equation.invars), equation.outvars[0].aval, equation.params
    image, kernel = {
        "output": (a, b),
        "input_gradient": (result.shape, b),
        "kernel_gradient": (b, result.shape),
    }[operation]
    stride, padding, chosen = given["stride"], given["padding"], getattr(given["forms"], operation)
    doubling = (kernel[:2], padding) == FIRST_OF_DOUBLING
    if doubling:
        kernel, padding, chosen = (3, 3, *kernel[2:]), convolutions.SAME, "four convolutions"
    elif kernel[:2] in ((1, 1), (2, 2)):
        return None
    return Case(image, kernel, doubling, stride, padding, operation, str(result.dtype), chosen)


def forms_of(case):
    """{name: convolutions.Form} of those that fit."""
    from ddpm_jax.networks import convolutions

    if case.doubling:
        return {
            "four convolutions": convolutions.with_transposes(lambda x, kernel, *_: convolutions.upsampled(x, kernel)),
            "repeated pixels": convolutions.with_transposes(
                lambda x, kernel, *_: convolutions.convolve(x.repeat(2, 1).repeat(2, 2), kernel)
            ),
        }
    given = case.image[1:3], case.kernel[:2], case.stride, case.padding
    return {name: form for name, form in convolutions.FORMS.items() if convolutions.fits(name, *given)}


def measure(case, args):
    """{name: seconds in each round} of the forms, which take turns."""
    timers = make_timers(case, args.milliseconds / 1e3, CLOCKS[args.clock])
    rounds = [{name: time_calls() for name, time_calls in timers.items()} for _ in range(args.rounds)]
    return {name: [seconds[name] for seconds in rounds] for name in timers}


def make_timers(case, least, clock):
    """{name: a function that returns the seconds of a call}, averaged over calls that take about `least` seconds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    random, timers, forms = np.random.default_rng(0), {}, forms_of(case)
    rest = case.stride, case.padding

    def draw(shape):
        return jnp.asarray(random.normal(size=(jax.device_count(), *shape)), case.dtype)

    x, kernel = draw(case.image), draw(case.kernel)
    y = draw(jax.eval_shape(lambda x, kernel: forms[case.chosen].output(x, kernel, *rest), x[0], kernel[0]).shape)
    arrays, size = {
        "output": ((x, kernel), ()),
        "input_gradient": ((y, kernel), (case.image[1:3],)),
        "kernel_gradient": ((y, x), (case.kernel[:2],)),
    }[case.operation]
    arrays = jax.pmap(lambda *arrays: arrays)(*arrays)  # places them on the devices
    functions = {getattr(form, case.operation): name for name, form in reversed(list(forms.items()))}  # some share one
    for function, name in functions.items():
        program = jax.pmap(lambda a, b, function=function: function(a, b, *size, *rest))

        def call(_, program=program):
            return program(*arrays)

        block = max(1, round(least / make_timer(call, None, 1)()))
        timers[name] = make_timer(call, None, block, clock)
    return timers


if __name__ == "__main__":
    sys.exit(errors.run(main))
