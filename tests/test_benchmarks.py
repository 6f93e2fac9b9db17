"""The benchmarks' own parts: what they draw, fit and compare; their processes with programs that stand for ours."""

import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT

from benchmarks import __main__ as main
from benchmarks import convolutions, growth, nets, peers, reference
from ddpm_jax import config as configs
from ddpm_jax import experiment, options
from ddpm_jax.errors import ConfigError
from ddpm_jax.interop import layout

# --- random networks


@pytest.fixture(scope="module")
def drawn():
    random = np.random.default_rng(0)
    return [nets.random_net(random, 1e11) for _ in range(200)]


def test_random_networks_stay_in_their_limits(drawn):
    for config in drawn:
        model, (side,) = config.model, config.data.image_size
        assert 24 <= model.channels <= 96
        assert 16 <= side <= 64
        assert side % 2 ** (len(model.multipliers) - 1) == 0
        assert model.num_res_blocks in (1, 2)
        assert 8 <= config.train.batch_size <= 128
        assert nets.training_flops(config) <= 1e11


def test_random_networks_are_of_many_kinds(drawn):
    assert {len(config.model.multipliers) for config in drawn} == {2, 3, 4}
    assert {config.data.channels for config in drawn} == {1, 3}
    assert {config.train.batch_size for config in drawn} >= {8, 128}
    assert {20, 28, 36, 44} <= {config.data.image_size[0] for config in drawn}


def test_a_low_bound_on_the_work_ends():
    assert nets.training_flops(nets.random_net(np.random.default_rng(2), 1e9)) <= 1e9


def make(config):
    return experiment.make(config, (*config.data.image_size * 2, config.data.channels))


def test_random_networks_are_expressible_in_the_other_layout(drawn):
    """Which has one number of groups for all widths; each width must be a multiple of it, as in ours."""
    for config in drawn[:4]:
        unet, _ = layout.to_diffusers(make(config))
        assert all(width % unet["norm_num_groups"] == 0 for width in unet["block_out_channels"])


def test_the_estimated_work_is_about_what_xla_counts(drawn):
    """Of the forward pass before optimisation, times three; without compiling."""
    for config in drawn[:3]:
        parts = make(config)
        x = jax.ShapeDtypeStruct(parts.shape, np.float32)
        flops = jax.jit(parts.net).lower(experiment.params_shape(parts), x, 1).cost_analysis()["flops"]
        assert nets.training_flops(config) == pytest.approx(3 * config.train.batch_size * flops, rel=0.25)


# --- convolutions

TINY = options.replace(
    configs.load(ROOT / "configs" / "digits.py"),
    {"model.channels": 4, "model.groups": 2, "model.multipliers": (1, 1), "train.batch_size": 16},
)


@pytest.fixture(scope="module")
def cases():
    return convolutions.find_cases(TINY)


def test_the_convolutions_of_a_step_are_those_of_the_parameters(cases):
    """Each kernel is used once and has a gradient; the first convolution's input has none."""
    kernels = [leaf.shape for leaf in jax.tree.leaves(experiment.params_shape(experiment.make(TINY, (8, 8, 1))))]
    number = sum(shape[:2] == (3, 3) and len(shape) == 4 for shape in kernels)
    found = dict.fromkeys(("output", "kernel_gradient", "input_gradient"), 0)
    for case, count in cases.items():
        assert case.kernel in kernels
        assert case.image[0] == TINY.train.batch_size // jax.device_count()
        found[case.operation] += count
    assert list(found.values()) == [number, number, number - 1]
    assert sum(count for case, count in cases.items() if case.doubling) == 3
    assert sum(count for case, count in cases.items() if case.stride == 2) == 3


def test_the_forms_of_a_doubling_are_one_convolution(cases):
    random = np.random.default_rng(0)
    case = next(case for case in cases if case.doubling)
    x, kernel = (random.normal(size=shape).astype(np.float32) for shape in (case.image, case.kernel))
    one, other = (form.output(x, kernel, 1, case.padding) for form in convolutions.forms_of(case).values())
    assert one.shape == (len(x), 2 * x.shape[1], 2 * x.shape[2], kernel.shape[3])
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_table_of_convolutions(monkeypatch, capsys, cases):
    """With times of 3 for the chosen form, 2 for the others: the ratios, and their mean weighted by time and number."""
    enabled = jax.config.jax_enable_compilation_cache

    def measure(case, args):
        names = convolutions.forms_of(case)
        return {name: [3.0 if name == case.chosen else 2.0] * args.rounds for name in names}

    monkeypatch.setattr(convolutions, "measure", measure)
    monkeypatch.setattr(configs, "load", lambda *_: TINY)
    try:
        assert convolutions.main(["--config=configs/digits.py", "--rounds=2"]) == 0
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    out = capsys.readouterr().out
    assert out.count(" | 1.500 (1.500 to 1.500) |") == len(cases)
    assert out.endswith("\nwhole step, chosen forms / quickest forms: 1.500 (1.500 to 1.500)\n")


def test_forms_take_turns(cases):
    """Of each operation once, in real time."""
    args = convolutions.Args(rounds=2, milliseconds=0.1)
    for operation in ("output", "input_gradient", "kernel_gradient"):
        case = next(case for case in cases if case.operation == operation and case.stride == 2)
        seconds = convolutions.measure(case, args)
        assert {case.chosen, "xla", "im2col", "phases"} == set(seconds)
        assert all(0 < value < 10 for values in seconds.values() for value in values)


# --- growth


def test_exponents_of_a_power_law():
    x = np.array([8, 16, 32, 128])
    assert growth.exponent(x, 0.3 * x**1.7) == pytest.approx(1.7)
    assert growth.largest_slope(x, 0.3 * x**1.7) == pytest.approx(1.7)


def test_the_largest_slope_shows_a_step_that_the_exponent_hides():
    x = 2.0 ** np.arange(8)
    y = x * np.where(x >= 16, 4, 1)
    assert growth.largest_slope(x, y) == pytest.approx(3)
    assert growth.exponent(x, y) < 1.5


def test_points_that_would_take_too_long_are_left_out(monkeypatch, capsys):
    """On a machine of 1 GFLOP/s, a step of images of twice the side takes about four times as long."""

    def measure_point(config, args):
        seconds = nets.training_flops(config) / 1e9
        return peers.Seconds([seconds], [2 * seconds, 2 * seconds]), (100.0, 200.0), ("jax", "torch")

    monkeypatch.setattr(growth, "measure_point", measure_point)
    config = configs.load(ROOT / "configs" / "digits.py")
    points = [(side, 8, 32) for side in (8, 16, 32, 64)]
    most = nets.training_flops(growth.make_config(config, *points[1])) / 1e9 * 2.1  # theirs takes twice as long as ours
    rows = growth.measure_axis(growth.Args(config=config, most=most), "side", 0, points)
    assert [row[0] for row in rows] == [8, 16]
    out = capsys.readouterr().out
    assert out.count("left out: about ") == 2
    assert "| 16 | " in out
    assert "| 0.50 (0.50 to 0.50) | 100 | 200 |" in out


def test_a_process_that_ends_ends_the_axis(monkeypatch, capsys):
    def measure_point(config, args):
        if config.train.batch_size > 8:
            raise peers.ProcessEnded("diffusers_worker.py ended with exit code -9")
        return peers.Seconds([0.1], [0.1, 0.1]), (100.0, 200.0), ("jax", "torch")

    monkeypatch.setattr(growth, "measure_point", measure_point)
    args = growth.Args(config=configs.load(ROOT / "configs" / "digits.py"))
    assert len(growth.measure_axis(args, "batch", 1, [(8, batch, 32) for batch in (8, 16, 32)])) == 1
    assert "| 16 | diffusers_worker.py ended with exit code -9 | | | | |\n\njax, torch\n" in capsys.readouterr().out


def test_the_plot_has_a_panel_for_time_and_memory_of_each_axis():
    pytest.importorskip("matplotlib")
    rows = [(x, x**2, 2 * x**2, x, x) for x in (8, 16, 32)]
    figure = growth.draw({"side": rows, "batch": rows})
    assert [axes.get_ylabel() for axes in figure.axes] == ["seconds a step", "peak memory (MB)"] * 2
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    ours, theirs = figure.axes[0].lines
    np.testing.assert_array_equal(ours.get_ydata() * 2, theirs.get_ydata())


# --- the reference


FOUND = {"loop": [1.0, 1.02, 1.04], "compilation": [20.0, 21.0]}


@pytest.mark.parametrize(("factor", "slower"), [(1.0, False), (0.5, False), (1.03, False), (1.1, True)])
def test_slower_than_the_reference(tmp_path, factor, slower):
    """By more than the range of the reference, 0.04 of about 1; and nothing is said of the row that stayed."""
    file = tmp_path / "reference.json"
    reference.record(file, "stack", "config", FOUND)
    found = FOUND | {"loop": [factor * value for value in FOUND["loop"]]}
    verdicts = reference.compare(reference.find(file, "stack", "config"), found)
    assert verdicts["loop"].startswith(reference.SLOWER) == slower
    assert verdicts["compilation"] == "ok: 20.500 (20.000 to 21.000)"


def test_a_second_record_widens_the_range(tmp_path):
    file = tmp_path / "reference.json"
    for factor in (1, 1.1):
        reference.record(file, "stack", "config", {"loop": [factor * value for value in FOUND["loop"]]})
    expected = reference.find(file, "stack", "config")
    assert reference.compare(expected, {"loop": [1.2]})["loop"] == "ok: 1.070 (1.000 to 1.144)"
    assert reference.compare(expected, {"loop": [1.22]})["loop"].startswith(reference.SLOWER)


def test_the_reference_keeps_other_stacks_and_configs(tmp_path):
    file = tmp_path / "reference.json"
    for stack, config in (("a", "x"), ("a", "y"), ("b", "x")):
        reference.record(file, stack, config, {f"{stack} {config}": [1.0]})
    assert set(reference.find(file, "a", "x")) == {"a x"}
    assert set(reference.find(file, "b", "x")) == {"b x"}
    with pytest.raises(ConfigError, match="has nothing for y on b; measure it with --record"):
        reference.find(file, "b", "y")


def test_a_reference_of_other_options_or_that_cannot_be_read(tmp_path):
    file = tmp_path / "reference.json"
    reference.record(file, "a", "x", FOUND)
    with pytest.raises(ConfigError, match=r"other options; only here or only there: loop$"):
        reference.compare(reference.find(file, "a", "x"), {"compilation": [1.0]})
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read --reference=.*reference.json"):
        reference.find(file, "a", "x")


def test_a_config_is_known_by_its_file_and_its_changes():
    args = options.parse(
        main.Args, ["--config.model.channels=8", "--config.model.multipliers=1,2,2"], "", "", configs.load
    )
    assert reference.describe_config(args) == "digits.py --config.model.channels=8 --config.model.multipliers=1,2,2"


# --- two processes


@pytest.fixture
def ask(tmp_path):
    """ask(body) -> a process that serves the commands of `start`, whose source is `body`."""

    def make(body):
        script = tmp_path / "worker.py"
        path, lines = str(ROOT / "benchmarks"), "\n    ".join(body.splitlines())
        script.write_text(
            f"import os, sys\nsys.path.append({path!r})\nfrom diffusers_worker import *\n"
            f"def start(**options):\n    {lines}\nserve(start)\n"
        )
        return peers.process([sys.executable, str(script)], {"folder": "x"})

    return make


def test_a_process_answers_whatever_else_it_prints(ask):
    body = 'print("noise")\nos.system("echo more")\nreturn options["folder"], {"add": lambda a, b: a + b}'
    with ask(body) as (add, about):
        assert about == "x"
        assert [add("add", 1, 2), add("add", [3], [4])] == [3, [3, 4]]


def test_what_is_missing_in_a_process_is_one_line(ask):
    with (
        pytest.raises(ConfigError, match=r"no_such_module is missing: pip install .*, or give .* --their-python=PATH"),
        ask("import no_such_module"),
    ):
        pass


def test_a_process_that_ends_is_one_line(ask):
    with (
        ask('return "", {"end": lambda: os._exit(3)}') as (call, _),
        pytest.raises(peers.ProcessEnded, match=r"worker.py ended with exit code 3$"),
    ):
        call("end")


def test_a_python_that_does_not_exist():
    with (
        pytest.raises(ConfigError, match="cannot run --their-python=/nowhere/python: No such file"),
        peers.process(["/nowhere/python"], {}),
    ):
        pass


def test_peak_memory_is_that_of_the_process_alone(ask):
    """Of 100 MB held once; a child's getrusage would begin at the 200 MB and more that this process holds."""
    held = np.ones(200_000_000, np.uint8)
    body = 'hold = lambda: len(bytearray(b"x") * 100_000_000)\nreturn "", {"hold": hold, "memory": peak_memory}'
    with ask(body) as (call, _):
        del held
        before = call("memory")
        call("hold")
        assert before < 100
        assert call("memory") - before == pytest.approx(100, rel=0.1)


def test_blocks_take_turns_and_ratios_use_the_neighbours(tmp_path):
    calls, clock = [], iter([9.0, 9.0, 1.0, 4.0, 3.0, 6.0, 1.0])

    def answer(name):
        return lambda command, steps, *rest: calls.append((name, command, steps, *rest)) or next(clock) * steps

    pair = peers.Pair(answer("ours"), answer("theirs"), tmp_path, ("", ""))
    seconds = peers.measure(pair, "sample", 2, 10, "ddim", 4)
    assert [name for name, *_ in calls] == ["ours", "theirs", "theirs", "ours", "theirs", "ours", "theirs"]
    assert {tuple(rest) for _, *rest in calls} == {("sample", 10, "ddim", 4)}
    assert seconds.ratios() == [4 / 2, 6 / 2]


@pytest.mark.peers
def test_a_random_network_in_both_libraries():
    """The outputs of two processes agree, and each trains and samples."""
    pytest.importorskip("diffusers")
    config = options.replace(nets.random_net(np.random.default_rng(2), 1e9), {"train.batch_size": 2})
    parts = make(config)
    images = np.random.default_rng(0).integers(0, 256, (2, *parts.shape), np.uint8)
    args = nets.Args(rounds=1, block=1, threads=1, cpu_devices=1)
    start = time.perf_counter()
    with peers.processes(parts, images, args) as pair:
        seconds, memory = peers.measure_training(pair, args)
        assert peers.difference(pair, parts.shape) < 1e-5
        sampled = peers.measure(pair, "sample", 1, 2, "ddim", 2)
    elapsed = time.perf_counter() - start
    assert 0 < sum(seconds.ours + seconds.theirs + sampled.ours + sampled.theirs) < elapsed
    assert all(100 < size < 20_000 for size in memory)
