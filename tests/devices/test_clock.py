"""The clock of the training loop, and compilation that it does not expect."""

import time

import jax
import jax.numpy as jnp
import pytest

from world_distill.devices import chips
from world_distill.devices.clock import UPDATE, Clock
from world_distill.devices.compilation import Compiles, keep_programs


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(chips, "chip", lambda kind: chips.Chip("one", tflops=1e-3, hbm_gib=1.0, bandwidth=1.0))
    clock = Clock(devices=1, tokens=10, started=time.perf_counter())
    yield clock
    clock.close()


def slow(seconds):
    """A jitted product that takes so long on the device."""

    def wait(x):
        time.sleep(seconds)
        return x

    return jax.jit(lambda x: jax.pure_callback(wait, x, x @ x))


def test_seconds_are_those_of_the_device_and_the_loop_does_not_wait(clock):
    roll, update = clock.program("rollout", slow(0.2), lambda x: x), clock.program(UPDATE, slow(0.4), lambda x: x)
    started, x = clock.started, jnp.ones((8, 8))
    lines, ends = [], []
    for step in (1, 2):
        with clock.turn(step):
            jax.block_until_ready(update(roll(x)))
        lines.append(clock.figures(step))
        ends.append(time.perf_counter())
        with clock.away("save"):
            time.sleep(0.3)
    first, second = lines
    assert first["time/compile"] > 0 and "time/save" not in first
    # The clock's thread may wake late between the two: the first then has some of the second's time.
    assert second["time/rollout"] >= 0.2 and second["time/update"] >= 0.3
    assert second["time/rollout"] + second["time/update"] >= 0.6
    assert second["time/rollout"] + second["time/update"] <= second["time/step"]
    assert second["time/idle"] <= second["time/step"] - 0.3
    # Saving, after the first step, is not part of the second.
    assert second["time/save"] >= 0.3
    assert 0.3 <= second["time/step"] <= ends[1] - ends[0] - second["time/save"] + 0.25  # the loop may be kept waiting
    assert second["speed/tflop"] == 2 * 2 * 8**3 / 1e12
    assert second["speed/mfu"] == pytest.approx(2 * 2 * 8**3 / second["time/step"] / 1e9)
    assert second["speed/tokens"] == pytest.approx(10 / second["time/step"])
    assert 0 < second["speed/goodput"] < 1 - 0.3 / (ends[1] - started)


def test_a_result_that_failed_does_not_stop_the_clock(clock):
    x = jnp.ones(2)
    update = clock.program(UPDATE, jax.jit(lambda x: x * 2), lambda out: out)
    lost = clock.program("rollout", jax.jit(lambda x: x + 1), lambda out: out.delete() or out)
    with clock.turn(1):
        lost(x)
        update(x)
    assert clock.figures(1)["time/update"] >= 0


@pytest.fixture(params=[0.0, 60.0])
def kept_programs(request):
    """JAX keeps the programs on disk that take at least so long to compile: all of them here, and none."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, request.param)
    yield
    jax.config.update(name, before)


def test_a_compilation_in_a_later_step_is_reported_with_its_cause(kept_programs, caplog):
    def double(x):
        return 2 * x

    f, inputs = jax.jit(double), [jnp.ones(3), jnp.ones(3), jnp.ones(4), jnp.ones(4)]
    with_new = jax.jit(lambda x: x - 1)
    compiles = Compiles()
    try:
        for step, x in enumerate(inputs):
            with compiles.visit("step", f"step {step}"):
                f(x)
        with compiles.visit("step", "step 4"):
            compiles.expect()  # a program that was not called before
            with_new(x)
        with compiles.visit("evaluate", "evaluate"):
            f(jnp.ones(5))
    finally:
        compiles.close()
    [warning] = [r.getMessage() for r in caplog.records if "compiled" in r.getMessage()]
    assert warning.startswith("step 2 compiled jit(double) again") and "now f32[4] and before f32[3]" in warning
    assert compiles.seconds > 0 and not jax.config.jax_explain_cache_misses
    assert "TRACING CACHE MISS" not in caplog.text.replace(warning, "")
    assert "persistent cache" not in caplog.text.lower().replace("compilation ", "")  # which the tests have


def test_compiled_programs_are_kept_where_nothing_else_is_said(tmp_path, monkeypatch, caplog):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def kept(platform, **settings):
        for name, value in {"jax_compilation_cache_dir": None, **settings}.items():
            jax.config.update(name, value)
        keep_programs(platform)
        return jax.config.jax_compilation_cache_dir

    try:
        assert kept("cpu") is None
        assert kept("tpu", jax_enable_compilation_cache=False) is None
        assert not list(tmp_path.iterdir())
        assert kept("tpu", jax_enable_compilation_cache=True) == str(tmp_path / "world_distill" / "jax")
        assert kept("gpu", jax_compilation_cache_dir="/else") == "/else"
        assert not caplog.text
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert kept("tpu") is None and "compiled programs are not kept" in caplog.text
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_enable_compilation_cache", True)
