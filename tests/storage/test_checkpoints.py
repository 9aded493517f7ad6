"""Checkpoints: bit-exact, of the right run, never a half one; and weight files that carry what they were given."""

import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.effort import KILLS
from world_distill.storage.checkpoints import Checkpointer, CheckpointError, make_metadata
from world_distill.structs import TrainState
from world_distill.training.optimizers import make_optimizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = {"model": {"name": "tiny", "sizes": (1, 2)}, "seed": 3, "optim": {"lr": 1e-3}}
METADATA = make_metadata(CONFIG)


def make_state(seed=0, impl=None):
    key = jax.random.key(seed, impl=impl)
    lora = {"q": {"a": jax.random.normal(key, (2, 16, 8)), "b": jnp.full((2, 8, 16), seed, jnp.bfloat16)}}
    optimizer = make_optimizer(name="muon", learning_rate=1e-3, grad_clip=1.0)
    opt_state = optimizer.init(lora)
    opt_state = optax.tree.map_params(optimizer, lambda x: x + seed, opt_state)
    return TrainState(jnp.int32(seed), lora, jax.tree.map(lambda x: x * 2, lora), None, opt_state, key)


def abstract(state, mesh=None, spec=None):
    def leaf(x):
        if mesh is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        fits = spec is not None and x.ndim == 3
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec if fits else PartitionSpec()))

    return jax.tree.map(leaf, state)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def write(folder, *steps, **options):
    with Checkpointer(folder, **options) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, make_state(step), b'{"n": %d}' % step, METADATA)


@pytest.mark.parametrize("async_", [True, False])
@pytest.mark.parametrize("impl", [None, "rbg"])
def test_round_trip(tmp_path, async_, impl):
    with Checkpointer(tmp_path, async_=async_) as checkpointer:
        assert checkpointer.restore_latest(abstract(make_state())) is None
        assert checkpointer.latest_step() is None
        checkpointer.save(7, make_state(7, impl), b'{"\xc3\xbc": 1}', METADATA)
        state, iterator, metadata = checkpointer.restore_latest(abstract(make_state(0, impl)), expect=METADATA)
    assert_equal(state, make_state(7, impl))
    assert jax.random.key_impl(state.key) == jax.random.key_impl(make_state(7, impl).key)
    assert iterator == b'{"\xc3\xbc": 1}' and metadata["step"] == 7
    assert {k: metadata[k] for k in METADATA} == METADATA
    # Concrete arrays describe what is wanted as well.
    with Checkpointer(tmp_path) as checkpointer:
        assert_equal(checkpointer.restore_latest(make_state(0, impl))[0], state)


def test_state_may_be_donated_right_after_saving(tmp_path):
    state = make_state(1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, b"", METADATA)
        jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state.lora)
        assert_equal(checkpointer.restore_latest(abstract(make_state()))[0], make_state(1))


@pytest.mark.parametrize(
    "before, after",
    [
        (((8,), PartitionSpec(None, "x")), ((2, 4), PartitionSpec("x", "y"))),
        (((2, 2), PartitionSpec("y", None, "x")), ((1,), PartitionSpec())),
        (((1,), PartitionSpec()), ((8,), PartitionSpec(None, None, "x"))),
    ],
)
def test_restore_to_another_sharding(tmp_path, before, after):
    def mesh(shape):
        names = ("x", "y")[: len(shape)]
        devices = jax.devices()[: int(np.prod(shape))]
        return jax.make_mesh(shape, names, (AxisType.Auto,) * len(names), devices=devices)

    state = make_state(4)
    shardings = jax.tree.map(lambda x: x.sharding, abstract(state, mesh(before[0]), before[1]))
    placed = jax.device_put(state, shardings)
    assert len(placed.lora["q"]["a"].sharding.device_set) == int(np.prod(before[0]))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, placed, b"", METADATA)
        wanted = abstract(state, mesh(after[0]), after[1])
        restored, _, _ = checkpointer.restore_latest(wanted)
    assert_equal(restored, state)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    assert len(restored.lora["q"]["a"].sharding.device_set) == int(np.prod(after[0]))


def test_which_steps_are_saved_and_kept(tmp_path):
    with Checkpointer(tmp_path, keep=2, save_every=5) as checkpointer:
        begun = [s for s in range(1, 23) if checkpointer.save(s, make_state(s), b"", METADATA)]
        assert begun == [5, 10, 15, 20]
        assert checkpointer.save(22, make_state(22), b"", METADATA, force=True)
        assert not checkpointer.save(22, make_state(0), b"", METADATA, force=True)  # there already
        checkpointer.wait()
        assert checkpointer.latest_step() == 22
        assert_equal(checkpointer.restore_latest(abstract(make_state()))[0], make_state(22))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "22"]


def test_a_step_below_the_newest_is_refused(tmp_path):
    write(tmp_path, 5)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="checkpoint of step 5 already, and this is step 3"):
            checkpointer.save(3, make_state(3), b"", METADATA)


def test_steps_are_restored_from_the_newest_back(tmp_path):
    write(tmp_path, 1, 2, 10)
    with Checkpointer(tmp_path) as checkpointer:
        state, iterator, metadata = checkpointer.restore_latest(abstract(make_state()))
        assert checkpointer.latest_step() == metadata["step"] == 10 and iterator == b'{"n": 10}'
        assert_equal(state, make_state(10))


# ---- Half-written


def tear(folder, how):
    if how == "no metadata":
        shutil.rmtree(folder / "metadata")
    elif how == "no iterator":
        shutil.rmtree(folder / "iterator")
    elif how == "no state":
        shutil.rmtree(folder / "state")
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "empty metadata":
        next(p for p in (folder / "metadata").rglob("metadata") if p.is_file()).write_text("")
    elif how == "no tree":
        (folder / "state/_METADATA").unlink()


@pytest.mark.parametrize("how", ["no metadata", "no iterator", "no state", "empty", "empty metadata", "no tree"])
def test_torn_checkpoint_is_passed_over_and_put_away(tmp_path, how):
    write(tmp_path, 1, 2)
    tear(tmp_path / "2", how)
    with Checkpointer(tmp_path) as reader:
        assert reader.latest_step() == 1
        assert_equal(reader.restore_latest(abstract(make_state()))[0], make_state(1))
    assert (tmp_path / "2").exists()  # a reader moves nothing
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.restore_latest(abstract(make_state()))
        assert checkpointer.save(2, make_state(3), b"", METADATA)
        assert_equal(checkpointer.restore_latest(abstract(make_state()))[0], make_state(3))
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == ["2", "torn"]


def test_only_torn_checkpoints_are_not_an_empty_folder(tmp_path):
    write(tmp_path, 1, 2)
    for step in "12":
        tear(tmp_path / step, "no metadata")
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match=r"none of steps \[1, 2\]"):
        checkpointer.restore_latest(abstract(make_state()))


def hurt(file, how, rng):
    """Damages a file as crashes, full disks and people do."""
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    if how == "deleted":
        return file.unlink()
    if how == "cut":
        del data[at:]
    elif how == "zeroed":
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    elif how == "flipped":
        data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def step_with_a_large_array(step):
    return {"w": jax.random.normal(jax.random.key(step), (64, 256)), "n": jnp.arange(step, dtype=jnp.int32)[:1]}


# Orbax leaves coroutines behind where reading fails.
@pytest.mark.once
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_however_a_file_is_damaged_the_state_is_the_saved_one_or_that_of_the_step_before(tmp_path):
    rng, back = random.Random(0), {"deleted": 0, "cut": 0, "zeroed": 0, "flipped": 0}
    with Checkpointer(tmp_path / "run") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, step_with_a_large_array(step), b"%d" % step, METADATA)
    files = sorted(f.relative_to(tmp_path / "run") for f in (tmp_path / "run/2").rglob("*") if f.is_file())
    largest = max(files, key=lambda f: (tmp_path / "run" / f).stat().st_size)
    for how in back:
        for file in [largest, *rng.choices(files, k=KILLS // 2)]:
            shutil.copytree(tmp_path / "run", tmp_path / "hurt")
            hurt(tmp_path / "hurt" / file, how, rng)
            with Checkpointer(tmp_path / "hurt") as checkpointer:
                state, iterator, metadata = checkpointer.restore_latest(step_with_a_large_array(2), expect=METADATA)
            assert_equal(state, step_with_a_large_array(metadata["step"]))
            assert iterator == b"%d" % metadata["step"]
            back[how] += metadata["step"] == 1
            shutil.rmtree(tmp_path / "hurt")
    assert all(back.values()), back


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_arrays_are_told_and_put_aside(tmp_path, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, step_with_a_large_array(step), b"%d" % step, METADATA)
    for step, how in ((2, "zeroed"), (1, "cut")):
        file = max((f for f in (tmp_path / f"{step}/state").rglob("*")), key=lambda f: f.stat().st_size)
        hurt(file, how, random.Random(1))
        with Checkpointer(tmp_path) as checkpointer:
            if step == 2:
                assert checkpointer.restore_latest(step_with_a_large_array(1))[1] == b"1"
                assert "step 2 is passed over: w differ from what was saved" in caplog.text
                continue
            with pytest.raises(CheckpointError, match=r"none of steps \[1, 2\] can be read \(w differ"):
                checkpointer.restore_latest(step_with_a_large_array(1))
            checkpointer.save(2, step_with_a_large_array(2), b"2", METADATA)
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == ["2", "torn", "torn"]


@pytest.mark.parametrize(
    "item, before, after",
    [
        ("metadata", '"seed": 3', '"seed": 8'),  # another config, which `expect` would compare with
        ("metadata", '"lora/q/a": ', '"lora/q/a": 1'),  # another check sum of an array
        ("iterator", "17", "18"),  # another place in the data
    ],
)
def test_text_that_is_whole_but_not_what_was_saved_is_passed_over(tmp_path, item, before, after):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), b'{"records": %d}' % (15 + step), METADATA)
    file = next(f for f in (tmp_path / "2" / item).rglob("metadata") if f.is_file())
    text = file.read_text()
    assert text.count(before) == 1
    file.write_text(text.replace(before, after))
    with Checkpointer(tmp_path) as checkpointer:
        state, iterator, metadata = checkpointer.restore_latest(abstract(make_state()))
        assert metadata["step"] == 1 and iterator == b'{"records": 16}' and metadata["config"]["seed"] == 3
        assert_equal(state, make_state(1))


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_checkpoints import *
checkpointer = Checkpointer({folder!r}, keep=2)
found = checkpointer.restore_latest(abstract(make_state()))
step = found[2]["step"] if found else 0
if found:
    assert_equal(found[0], make_state(step))
while True:
    step += 1
    checkpointer.save(step, make_state(step), b"%d" % step, METADATA)
    print(step, flush=True)
"""


@pytest.mark.once
def test_killed_runs_go_on_from_a_whole_checkpoint(tmp_path):
    rng, last = np.random.default_rng(0), 0
    code = WRITER.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    for _ in range(2):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as run:
            lines = [run.stdout.readline() for _ in range(2)]
            assert all(lines), run.stderr.read().decode()[-3000:]
            assert int(lines[0]) > last
            time.sleep(rng.uniform(0.0, 0.2))
            run.send_signal(signal.SIGKILL)
            begun = int([*lines, *run.stdout.read().splitlines()][-1])
        with Checkpointer(tmp_path) as checkpointer:
            state, iterator, metadata = checkpointer.restore_latest(abstract(make_state()), expect=METADATA)
        last = metadata["step"]
        assert begun - 1 <= last <= begun + 1  # saving one waits for the one before
        assert_equal(state, make_state(last))
        assert iterator == b"%d" % last


TWO_PROCESSES = """
import pathlib, shutil, sys
sys.path.insert(0, {tests!r})
import jax
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
from test_checkpoints import *
from jax.experimental.multihost_utils import sync_global_devices
from world_distill.storage.weight_files import save_weights
folder = pathlib.Path({folder!r})
mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,))
shardings = {{"w": NamedSharding(mesh, PartitionSpec("x")), "key": NamedSharding(mesh, PartitionSpec())}}
make = jax.jit(lambda s: {{"w": jnp.arange(32.0) * s, "key": jax.random.key(s)}}, out_shardings=shardings)
with Checkpointer(folder) as checkpointer:
    assert checkpointer.restore_latest(make(0)) is None
    for step in (1, 2):
        checkpointer.save(step, make(step), b"%d" % step, METADATA)
if jax.process_index() == 0:
    shutil.rmtree(folder / "2/metadata")
sync_global_devices("torn")
with Checkpointer(folder) as checkpointer:
    state, iterator, _ = checkpointer.restore_latest(make(0), expect=METADATA)
    assert iterator == b"1" and jnp.array_equal(state["w"], make(1)["w"])
    assert jnp.array_equal(jax.random.key_data(state["key"]), jax.random.key_data(make(1)["key"]))
    assert checkpointer.save(2, make(7), b"again", METADATA)
    assert checkpointer.restore_latest(make(0))[1] == b"again"
try:
    save_weights(folder / "w", {{"w": make(1)["w"]}}, {{}})
except ValueError as error:
    assert "several hosts" in str(error)
    print("fine")
"""


def test_two_processes_save_restore_and_tidy_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    code = TWO_PROCESSES.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "run"), port=port)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        said = [run.communicate(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all("fine" in out for out, _ in said), said[0][1][-3000:] + said[1][1][-3000:]
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "run").iterdir()) == ["1", "2", "torn"]


# ---- The wrong run, the wrong state


def test_another_config_is_refused_with_its_keys(tmp_path):
    write(tmp_path, 1)
    other = make_metadata({"model": {"name": "wan", "sizes": [1, 2]}, "optim": {"lr": 1e-3, "clip": None}})
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="/1 is of a run with another config") as caught:
            checkpointer.restore_latest(abstract(make_state()), expect=other)
        assert checkpointer.restore_latest(abstract(make_state()), expect=make_metadata(CONFIG)) is not None
    assert str(caught.value).splitlines()[1:-1] == [
        '  model.name: "tiny" -> "wan"',
        "  optim.clip: (absent) -> null",
        "  seed: 3 -> (absent)",
    ]


def test_another_state_is_refused_with_its_paths(tmp_path):
    write(tmp_path, 1)
    state = make_state()
    lora = {"q": {"a": jnp.zeros((2, 16, 6)), "b": jnp.zeros((2, 8, 16), jnp.float32)}, "k": jnp.zeros(1)}
    wrong = state.replace(lora=lora, key=jax.random.key_data(state.key), lora_ema={"q": {"a": state.lora["q"]["a"]}})
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="/1 does not fit") as caught:
            checkpointer.restore_latest(abstract(wrong))
        assert str(caught.value).splitlines()[1:] == [
            "  lora/k: not in the checkpoint",
            "  lora_ema/q/b: only in the checkpoint",
            "  lora/q/a: float32[2, 16, 8] in the checkpoint, float32[2, 16, 6] in this run",
            "  lora/q/b: bfloat16[2, 8, 16] in the checkpoint, float32[2, 8, 16] in this run",
        ]
        with pytest.raises(CheckpointError, match="key is a PRNG key on one side only"):
            checkpointer.restore_latest(abstract(state.replace(key=jax.random.key_data(state.key))))
        unsafe = jax.random.key(0, impl="unsafe_rbg")
        with pytest.raises(CheckpointError, match="key: uint32"):
            checkpointer.restore_latest(abstract(state.replace(key=unsafe)))


def test_key_of_another_kind_with_the_same_shape(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1, "rbg"), b"", METADATA)
        with pytest.raises(CheckpointError, match="key is a rbg key, this run has"):
            checkpointer.restore_latest(abstract(make_state(1, "unsafe_rbg")))


EXECUTOR = {"q": {"a": jnp.arange(6.0).reshape(2, 3)}}


def with_executor(step):
    executor = jax.tree.map(lambda x: x * step, EXECUTOR)
    return {"w": jnp.ones(4) * step, "lora_ema": executor}


def test_the_executor_is_an_item_of_its_own_and_read_alone(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_executor(EXECUTOR) is None
        for step in (1, 2):
            checkpointer.save(step, with_executor(step), b"{}", METADATA)
    assert (tmp_path / "2/executor").is_dir()
    with Checkpointer(tmp_path) as checkpointer:
        found, step = checkpointer.restore_executor(EXECUTOR)
        assert step == 2
        assert_equal(found, with_executor(2)["lora_ema"])
        whole, _, _ = checkpointer.restore_latest(with_executor(0))
        assert_equal(whole, with_executor(2))
        with pytest.raises(CheckpointError, match="lora_ema/q/a"):
            checkpointer.restore_executor({"q": {"a": jnp.zeros((2, 4))}})


@pytest.mark.parametrize("damage", ["gone", "zeroed", "cut"])
def test_a_damaged_executor_is_passed_over(tmp_path, damage, caplog):
    def state(step):
        return {"w": jnp.ones(4) * step, "lora_ema": step_with_a_large_array(step)}

    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step), b"{}", METADATA)
    folder = tmp_path / "2/executor"
    if damage == "gone":
        shutil.rmtree(folder)
    else:
        hurt(max(folder.rglob("*"), key=lambda f: f.stat().st_size), damage, random.Random(1))
    with Checkpointer(tmp_path) as checkpointer:
        found, step = checkpointer.restore_executor(step_with_a_large_array(3))
        assert step == 1
        assert_equal(found, state(1)["lora_ema"])
        assert damage != "zeroed" or "lora_ema/w differ from what was saved" in caplog.text
        assert_equal(checkpointer.restore_latest(state(3))[0], state(1))


# ---- The disk


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/file/run: no checkpoints can be kept there"):
        Checkpointer(tmp_path / "file/run")
    for bad in ({"keep": 0}, {"save_every": 0}):
        with pytest.raises(ValueError):
            Checkpointer(tmp_path / "run", **bad)


@pytest.mark.parametrize("call", ["save", "wait_until_finished"])
def test_full_disk_names_the_last_good_step(tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: " + "details " * 100 + "No space left on device [spec]")

    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, make_state(3), b"", METADATA)
    checkpointer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpointer._manager, call, full)
        with pytest.raises(CheckpointError, match=f"{tmp_path}: .*No space left.*last good checkpoint: step 3"):
            checkpointer.save(4, make_state(4), b"", METADATA)
            checkpointer.wait()
    assert_equal(checkpointer.restore_latest(abstract(make_state()))[0], make_state(3))
    checkpointer.close()


def test_unsaveable_states_are_named(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="arrays of size 0 cannot be saved: a/b"):
            checkpointer.save(1, {"a": {"b": jnp.zeros((0, 2))}}, b"", METADATA)
        with pytest.raises(ValueError, match="one path"):
            checkpointer.save(1, {"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, b"", METADATA)


def test_metadata_of_equal_configs_is_equal():
    assert (
        make_metadata({"b": [1, 2], "a": 1.0})["fingerprint"] == make_metadata({"a": 1.0, "b": (1, 2)})["fingerprint"]
    )
    assert make_metadata({"a": 1})["fingerprint"] != make_metadata({"a": 2})["fingerprint"]
    assert METADATA["versions"]["jax"] == jax.__version__
