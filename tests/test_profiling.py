"""Traces of a few steps, by the trace files that JAX writes; and a profiler that fails."""

import contextlib
import gzip
import json
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.run import profiling


@jax.jit
def watched_step(x):
    return x + 1


def follow(span, folder, steps=range(6)):
    """What is said and warned of while watched_step is called once a step."""
    said, x = [], jnp.zeros(())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with profiling.profiler(span, folder, said.append) as profile:
            for step in steps:
                profile(step, x)
                x = watched_step(x)
    assert int(x) == len(steps)
    return said, [str(warning.message) for warning in caught]


def calls(folder):
    """How often the trace in `folder` tells of watched_step, which is the same for each call of it."""
    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "PjitFunction(watched_step)" for event in events)


@pytest.mark.parametrize(("span", "steps"), [((1, 3), 2), ((2, 6), 4), ((3, 9), 3)])
def test_the_trace_has_the_steps_that_were_asked_for(tmp_path, span, steps):
    watched_step(jnp.zeros(()))  # compiled already
    with jax.profiler.trace(tmp_path / "one"):
        watched_step(jnp.zeros(())).block_until_ready()
    said, warned = follow(span, tmp_path / "some")
    assert calls(tmp_path / "some") == steps * calls(tmp_path / "one") > 0
    assert (said, warned) == ([f"the trace of --profile={span[0]}:{span[1]} is in {tmp_path / 'some'}"], [])


@pytest.mark.parametrize("span", [(0, 0), (20, 30)])
def test_no_trace(tmp_path, span):
    assert follow(span, tmp_path) == ([], [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", ["start_trace", "stop_trace"])
def test_a_profiler_that_fails_is_left_alone(monkeypatch, tmp_path, fails):
    calls = []

    def call(name):
        calls.append(name)
        if name == fails:
            raise RuntimeError("no profiler\nhere")

    fake = SimpleNamespace(start_trace=lambda _: call("start_trace"), stop_trace=lambda: call("stop_trace"))
    monkeypatch.setattr(jax, "profiler", fake)
    said, warned = follow((1, 3), tmp_path)
    assert (said, warned) == ([], ["there is no trace of steps 1 to 3: no profiler"])
    assert calls == (["start_trace"] if fails == "start_trace" else ["start_trace", "stop_trace"])


def test_a_run_that_fails_ends_the_trace(monkeypatch, tmp_path):
    calls = []
    fake = SimpleNamespace(start_trace=lambda _: calls.append("start"), stop_trace=lambda: calls.append("stop"))
    monkeypatch.setattr(jax, "profiler", fake)
    with contextlib.suppress(ZeroDivisionError), profiling.profiler((0, 9), tmp_path, print) as profile:
        profile(0, ())
        raise ZeroDivisionError
    assert calls == ["start", "stop"]
