"""The loop: resuming, repeating, sharding, tracing, memory, and what it says to bad input."""

import functools
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import sys
import time

import jax
import jobs
import numpy as np
import optax
import pytest
from small import PATTERN, VARIANTS, check_advantages, make_inputs, redraw, small_config

from tests.effort import KILLS
from tests.runs import after_two_steps, assert_same, final_states, lasting
from world_distill import build
from world_distill.data.records.reader import RecordError
from world_distill.devices.interruption import Preempted
from world_distill.errors import UserError
from world_distill.interfaces import JudgeAnswer
from world_distill.programs import train
from world_distill.settings.loading import load_config
from world_distill.settings.objective import Phase
from world_distill.storage.metric_log import MetricLog
from world_distill.training import run_folder
from world_distill.training.collect import TooFewJudgments
from world_distill.training.step_programs import make_programs
from world_distill.weights import base_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


# Three steps of distillation, each rollout with a task of its own; then Flow-GRPO on groups.
STAGED = VARIANTS["flow_grpo"] | {"objective.rl_weight": ((2, 0.0), (3, 1.0)), "steps": 6, "evaluate_every": 2}
# Two steps whose judge does not mind how a pixel is rounded.
PATTERNED = VARIANTS["awm"] | {"judge.factory": PATTERN, "steps": 2}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A function from a variant's name to its config and the folder of its uninterrupted run, made once.

    What that warned of is in the folder's `warnings`.
    """

    @functools.cache
    def run(variant):
        config = small_config(inputs, **(VARIANTS | {"staged": STAGED, "patterned": PATTERNED})[variant])
        folder = tmp_path_factory.mktemp(variant)
        listener = logging.FileHandler(folder / "warnings")
        logging.getLogger("absl").addHandler(listener)
        try:
            train.train(config, folder)
        finally:
            logging.getLogger("absl").removeHandler(listener)
        check_advantages(config, folder)
        return config, folder

    return run


# "staged" is Flow-GRPO that begins with distillation; AWM is resumed after a kill, below.
@pytest.mark.parametrize("variant", ["distill", pytest.param("staged", marks=pytest.mark.once)])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(variant, whole, tmp_path):
    config, folder = whole(variant)
    resumed = after_two_steps(folder, tmp_path / "run")
    train.train(config, resumed)
    one, other = final_states(config, folder, resumed)
    assert int(one[0].step) == config.steps
    assert_same(one, other)
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (folder, resumed)
    ]
    for one, other in zip(*logs, strict=True):
        assert lasting(one) == lasting(other)


@pytest.mark.once
def test_a_run_that_is_killed_at_any_instant_goes_on_as_if_it_had_not_been(inputs, whole, tmp_path):
    config, folder = whole("awm")
    rng, faults, wanted = random.Random(0), 0, max(KILLS // 6, 1)
    while faults < wanted:
        workdir, codes = tmp_path / f"run {faults}", []
        while faults < wanted and 0 not in codes:
            [job] = jobs.start(inputs, workdir, VARIANTS["awm"] | {"save_every": 1})
            kind = rng.choice(["starting", "between", "terminated"]) if faults else "saving"
            done = min(jobs.logged(workdir), 3)
            if kind == "starting":
                time.sleep(rng.uniform(0, 8))
            elif kind == "saving":
                saving = workdir / "checkpoints"
                jobs.wait_for(lambda saving=saving: list(saving.glob("*.orbax-checkpoint-tmp*")), [job])
                time.sleep(rng.uniform(0, 0.03))
            else:
                count = rng.randint(done + 1, 4)
                jobs.wait_for(lambda w=workdir, n=count: jobs.logged(w) >= n, [job])
                time.sleep(rng.uniform(0, 0.5))
            job.send_signal(signal.SIGTERM if kind == "terminated" else signal.SIGKILL)
            [code], said = jobs.finish([job])
            assert code in (0, 75, -signal.SIGTERM, -signal.SIGKILL), said
            codes.append(code)
            faults += code != 0
        train.train(config, workdir)
        assert_same(*final_states(config, folder, workdir))


def damaged_copy(folder, to, rng):
    """A copy of a run whose newest checkpoint has its weights, and another file, deleted, cut or zeroed."""
    shutil.copytree(folder, to)
    files = [f for f in (to / "checkpoints/4/state").rglob("*") if f.is_file() and f.stat().st_size]
    # Several, and most of each, since Orbax leaves files, and parts of files, that nothing refers to.
    most = max(f.stat().st_size for f in files)
    for file in sorted({f for f in files if f.stat().st_size > most / 2} | {rng.choice(files)}):
        size, how = file.stat().st_size, rng.choice(["deleted", "cut", "zeroed"])
        if how == "deleted":
            file.unlink()
        elif how == "cut":
            os.truncate(file, rng.randrange(size // 10 + 1))
        else:
            file.write_bytes(bytes(size))


# Orbax leaves coroutines behind where reading fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.once
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(whole, tmp_path, capsys):
    config, folder = whole("awm")
    for number in range(max(KILLS // 6, 1)):
        workdir = tmp_path / str(number)
        damaged_copy(folder, workdir, random.Random(number))
        train.train(config, workdir)
        assert "after step 2" in capsys.readouterr().out
        assert_same(*final_states(config, folder, workdir))
        assert len(list((workdir / "checkpoints").glob("torn-4-*"))) == 1


# What a disk does that is full, or read-only to a process that is not allowed all.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
READ_ONLY = "import ctypes; ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())"


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_disk_that_takes_no_more_ends_the_run_with_the_last_good_step(inputs, whole, tmp_path):
    config, folder = whole("distill")
    full, read_only = (after_two_steps(folder, tmp_path / name) for name in ("full", "read_only"))
    (read_only / "checkpoints").chmod(0o555)
    # A cut-off entry of the compilation cache would be read by others.
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    started = [
        (run, why, jobs.start(inputs, run, VARIANTS["distill"], before=disk, environment=environment))
        for run, why, disk in ((full, "File too large", FULL), (read_only, "Permission denied", READ_ONLY))
    ]
    for run, why, job in started:
        [code], [said] = jobs.finish(job)
        assert code == 2, said
        assert f"error: {run / 'checkpoints'}: " in said and why in said, said
        assert "last good checkpoint: step 2" in said, said
    (read_only / "checkpoints").chmod(0o755)
    train.train(config, full)
    assert_same(*final_states(config, folder, full))


def test_a_second_run_and_a_replay_from_the_cache_are_the_same(whole, tmp_path, monkeypatch):
    config, folder = whole("awm")
    # On the way, the copies of the base are counted.
    shapes = jax.eval_shape(build.make_family(config).init_base, jax.random.key(0))
    kernel, weigh, seen = shapes["blocks"]["mlp"]["up"]["kernel"].shape, train.Collector.weigh, []
    copies = lambda: sum(x.shape == kernel for x in jax.live_arrays())  # noqa: E731
    before = copies()

    def counting(self, *args, **kwargs):
        out = weigh(self, *args, **kwargs)
        seen.append(copies() - before)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(train.Collector, "weigh", counting)
        train.train(config, tmp_path / "two")
    assert seen == [1] * 4

    # With the cache and a judge that knows nothing, the same weights come out.
    class Silent:
        name = build.make(config, "judge").name

        def ask(self, requests):
            return [JudgeAnswer(None, "off") for _ in requests]

    make = build.make
    monkeypatch.setattr(build, "make", lambda c, s: Silent() if s == "judge" else make(c, s))
    (tmp_path / "three").mkdir()
    shutil.copy(folder / "judgments.sqlite", tmp_path / "three")
    train.train(config, tmp_path / "three")
    one, two, three = final_states(config, folder, tmp_path / "two", tmp_path / "three")
    assert_same(one, two)
    assert_same(one, three)
    # Without the cache every judgment is missing: nothing is made up, and no reward moves the weights.
    monkeypatch.setattr("world_distill.training.collect.Collector._check", lambda *_: None)
    train.train(config, tmp_path / "four")
    lines = [json.loads(line) for line in (tmp_path / "four" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["judge/invalid"] == 1.0 for line in lines)


@pytest.mark.once
def test_a_run_that_is_told_to_stop_saves_and_goes_on_from_there(whole, tmp_path, monkeypatch):
    config, folder = whole("awm")
    write = MetricLog.write

    def told(self, step, values):
        write(self, step, values)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(MetricLog, "write", told)
    with pytest.raises(Preempted, match="saved after step 3") as caught:
        train.train(config, tmp_path)
    assert caught.value.exit_code == 75 and signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "checkpoints" / "3").is_dir()  # not a multiple of save_every
    monkeypatch.setattr(MetricLog, "write", write)
    train.train(config, tmp_path)
    assert_same(*final_states(config, folder, tmp_path))


@pytest.mark.once
def test_a_judge_that_fails_too_often_stops_the_run_which_goes_on_when_it_works(whole, tmp_path, monkeypatch):
    config, folder = whole("awm")
    oracle, make, asked = build.make(config, "judge"), build.make, []

    class Failing:
        name = oracle.name

        def ask(self, requests):
            asked.append(len(requests))
            answers = oracle.ask(requests)
            failed = [JudgeAnswer(None, "no connection") for _ in answers[3:]]
            return answers if len(asked) < 3 else answers[:3] + failed

    monkeypatch.setattr(build, "make", lambda c, s: Failing() if s == "judge" else make(c, s))
    with pytest.raises(TooFewJudgments, match=r"7 of 8 clips of step 3 have no judgment"):
        train.train(config, tmp_path)
    assert (tmp_path / "checkpoints" / "2").is_dir()
    monkeypatch.setattr(build, "make", make)
    train.train(config, tmp_path)
    assert_same(*final_states(config, folder, tmp_path))


def test_devices_and_mesh_do_not_change_the_result(inputs, whole, tmp_path):
    alone, folder = whole("patterned")
    eight = {"host_devices": 8, "mesh.data": 4, "mesh.fsdp": 2, "rollout.micro_batch": 4}  # of 8
    config = small_config(inputs, **PATTERNED, **eight)
    train.train(config, tmp_path / "eight")
    check_advantages(config, tmp_path / "eight")
    [(one, _)] = final_states(alone, folder)
    [(many, _)] = final_states(config, tmp_path / "eight")
    assert alone.host_devices == 1 and one.step == many.step == 2
    for a, b in zip(jax.tree.leaves(one.lora), jax.tree.leaves(many.lora), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert any(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(one.lora))


@pytest.mark.once
def test_muon_moves_full_weights_on_a_mesh_as_on_one_device(inputs):
    """Its state holds no moments where a weight is not a matrix, and the placing on devices has to see through that."""
    found = []
    for devices in ({"host_devices": 1}, {"host_devices": 4, "mesh.data": 2, "mesh.fsdp": 2}):
        config = small_config(inputs, **devices, **{"executor.rank": 0, "optimizer.name": "muon"})
        mesh = build.start_devices(config)
        made = make_programs(config, mesh)
        places = jax.tree.map(lambda x: x.sharding, made.state)
        state = made.init(base_model.load_base(made.family, config, mesh), config.seed)
        assert set(state.lora) == {"full"}

        def step(state, gradient, optimizer=made.optimizer):
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.lora)
            return state.replace(lora=optax.apply_updates(state.lora, changes), opt_state=opt_state)

        gradient = jax.device_put(redraw(made.state.lora, 3), places.lora)
        state = jax.jit(step, out_shardings=places)(state, gradient)
        assert len(state.lora["full"]["blocks"]["mlp"]["up"]["kernel"].devices()) == len(mesh.devices.flat)
        found.append(jax.device_get((state.lora, state.opt_state)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), *found)
    for name in (("mlp", "up", "kernel"), ("table",)):  # a matrix; what Adam moves
        moved = functools.reduce(lambda tree, key: tree[key], name, found[0][0]["full"]["blocks"])
        assert np.abs(moved).max() > 1e-4


@pytest.mark.once
def test_one_compilation_of_each_program_over_many_steps(whole):
    config, folder = whole("staged")
    # A schedule that begins with distillation alone has a second step function, and no more.
    made = make_programs(config, build.start_devices(config))
    updates = [made.update[phase] for phase in (Phase(False, True), Phase(True, True))]
    functions = [*made.roll.values(), *updates, made.decode, made.motion]
    assert [f._cache_size() for f in functions] == [1] * 6
    # Updates read few states, and compute the Demonstrator there themselves.
    assert made.demonstrate._cache_size() == made.update[Phase(True, False)]._cache_size() == 0
    assert "compiled" not in (folder / "warnings").read_text()  # none that was not to be expected

    # What the run says of its speed.
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = {line["step"]: line for line in lines if "time/step" in line}
    assert list(lines) == [1, 2, 3, 4, 5, 6]
    phases = ["time/rollout", "time/update"]
    for line in lines.values():
        judged = ["time/decode", "time/judge", "time/judge_wait"] if line["step"] > 3 else []
        assert all(line[name] >= 0 for name in phases + judged)
        parts = [*phases, "time/idle", *(name for name in ("time/decode", "time/compile") if name in line)]
        assert sum(line[name] for name in parts) == pytest.approx(line["time/step"])
        assert 0 < line["speed/goodput"] < 1 and line["speed/tokens"] > 0 and "speed/mfu" not in line
        assert line["speed/tflops"] == pytest.approx(line["speed/tflop"] / line["time/step"])
    assert [step for step, line in lines.items() if "time/save" in line] == [3, 5]
    assert [step for step, line in lines.items() if line.get("time/compile", 0) > 0.5] == [1, 4]
    # With RL, an update has more passes; the same ones in each step.
    work = [line["speed/tflop"] for line in lines.values()]
    assert len(set(work[:3])) == len(set(work[3:])) == 1 and work[0] < work[3]


@pytest.mark.once
def test_off_policy_states_are_the_demonstrators(inputs, tmp_path):
    config = small_config(inputs, **VARIANTS["distill"], **{"rollout.role": "demonstrator"}, steps=2)
    train.train(config, tmp_path, profile=frozenset({2}))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    assert all(name in trace.read_bytes() for name in (b"rollout", b"demonstrator", b"update", b"jit_train_step"))
    assert lines[0]["train/anchor"] > 0 and "reward/total" not in lines[0]  # without RL nothing is rewarded


# ---- Bad input


def test_a_password_in_an_address_never_reaches_the_disk(inputs, tmp_path):
    config = small_config(inputs)
    with config.unlocked():
        config.judge.options.servers = ("http://localhost:8000/v1", "https://me:hunter2@host/v1")
    with pytest.raises(UserError, match=r"config\.judge\.options\.servers holds .* password.*api_key_env") as caught:
        train.train(config, tmp_path)
    assert "hunter2" not in str(caught.value) and not any(p.is_file() for p in tmp_path.rglob("*"))


def test_a_folder_of_another_config_is_refused_before_anything_is_written(inputs, whole):
    _, folder = whole("distill")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    other = small_config(inputs, **VARIANTS["distill"], **{"rollout.group": 4})
    with pytest.raises(UserError, match=r"rollout\.group"):
        train.train(other, folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.once
def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_tasks(inputs, tmp_path):
    config = small_config(inputs, **VARIANTS["distill"], **{"optimizer.learning_rate": ((0, 1e30),)}, save_every=1)
    with pytest.raises(FloatingPointError, match=r"step \d; its tasks: \w+") as caught:
        train.train(config, tmp_path)
    assert str(tmp_path / "checkpoints") in str(caught.value)
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    for step in steps:  # what was saved is finite
        assert step < 4


def test_runs_of_one_process_share_their_programs(inputs):
    config = small_config(inputs)
    mesh = build.start_devices(config)
    made = make_programs(config, mesh)
    for same in ({"seed": 1}, {"steps": 9}, {"judge.factory": "another"}):
        assert make_programs(small_config(inputs, **same), mesh) is made
    for other in ({"objective.updates": 1}, {"executor.alpha": 4.0}, {"rollout.weights.task": 2.0}):
        assert make_programs(small_config(inputs, **other), mesh) is not made


def test_missing_records_name_the_file_and_the_verb(inputs, tmp_path):
    config = small_config(inputs)
    with config.unlocked():
        config.data = str(tmp_path / "nothing")
    with pytest.raises(RecordError, match="nothing"):
        train.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": "nothing.safetensors"}, {"judge.rubric": "nowhere"}, {"held_out.factory": "no:thing"},
        {"executor.start": "nothing.safetensors"}, {"judge.factory": "world_distill:nothing"}, {"text_length": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_call_that_fails_leaves_the_folder_to_the_corrected_one(inputs, tmp_path, wrong):
    with pytest.raises((UserError, ValueError, OSError)):
        train.train(small_config(inputs, **wrong), tmp_path)
    assert not (tmp_path / "config.json").exists()
    run_folder.check_folder(small_config(inputs), tmp_path)


def test_a_lora_to_start_from_is_looked_at_before_the_base(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "load_base", None)
    with pytest.raises(UserError, match=r"config.executor.start = 'nothing.safetensors'"):
        train.train(small_config(inputs, **{"executor.start": "nothing.safetensors"}), tmp_path)


def test_a_folder_belongs_to_a_run_from_its_first_step_on(inputs, tmp_path):
    one, other = small_config(inputs), small_config(inputs, **{"rollout.group": 4})
    run_folder.claim_folder(one, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    run_folder.claim_folder(other, tmp_path)  # nothing was trained: it ended while the first step was compiled
    assert run_folder.read_config(tmp_path).rollout.group == 4
    for begun in ("metrics.jsonl", "results.json", "data/scenes/train/0.png", "checkpoints/2/state"):
        folder = tmp_path / f"run with {begun.replace('/', '-')}"
        run_folder.claim_folder(one, folder)
        (folder / begun).parent.mkdir(parents=True, exist_ok=True)
        (folder / begun).write_text("{}\n")
        with pytest.raises(UserError, match=r"rollout\.group"):
            run_folder.check_folder(other, folder)


def test_records_of_another_family_are_named_before_anything_is_compiled(inputs, tmp_path):
    config = load_config("wan22_5b:debug", {"data": str(inputs / "data")})
    with pytest.raises(RecordError, match=r"encoded for model family 'tiny', and this config has 'wan'"):
        train.train(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_validation_records_that_are_missing_are_missed_at_once(inputs, tmp_path):
    shutil.copytree(inputs / "data", tmp_path / "data", ignore=shutil.ignore_patterns("validation.json"))
    config = small_config(inputs, evaluate_every=2)
    with config.unlocked():
        config.data = str(tmp_path / "data")
    with pytest.raises(RecordError, match=r"evaluate_every = 2 looks at validation records.*--validation 0\.02"):
        train.train(config, tmp_path / "run")


def test_a_run_that_is_done_says_what_would_be_more(whole, capsys, tmp_path):
    config, folder = whole("distill")
    shutil.copytree(folder, tmp_path / "run")
    train.train(config, tmp_path / "run")
    assert "is trained to step 4: for more, raise --config.steps" in capsys.readouterr().out
    fewer = config.copy_and_resolve_references()
    with fewer.unlocked():
        fewer.steps = 3
    assert train.train(fewer, tmp_path / "run")["steps"] == 4  # as many as there are, not as many as were asked for


def test_two_processes_do_not_train_in_one_folder(whole, tmp_path):
    config, folder = whole("distill")
    shutil.copytree(folder, tmp_path / "run")
    with run_folder.hold(tmp_path / "run"), pytest.raises(UserError, match="another process trains in this folder"):
        train.train(config, tmp_path / "run")
    assert train.train(config, tmp_path / "run")["steps"] == 4


def test_the_set_to_learn_from_is_a_setting(inputs, tmp_path):
    with pytest.raises(RecordError, match="better"):
        train.train(small_config(inputs, train_set="better"), tmp_path / "run")


def test_truncated_shard_is_named(inputs, tmp_path):
    shutil.copytree(inputs / "data", tmp_path / "data")
    shard = next((tmp_path / "data").glob("train-*.arrayrecord"))
    shard.write_bytes(shard.read_bytes()[:-100])
    config = small_config(inputs)
    with config.unlocked():
        config.data = str(tmp_path / "data")
    with pytest.raises(RecordError, match=shard.name):
        train.train(config, tmp_path / "run")


def test_weights_of_another_size_are_listed(inputs, tmp_path):
    config = small_config(inputs, **{"model.width": 48, "model.heads": 3})
    with pytest.raises(UserError, match=r"do not fit config\.model(.|\n)*blocks\.mlp\.up\.kernel"):
        train.train(config, tmp_path)


def test_opening_a_folder_without_a_run_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="world-distill train"):
        run_folder.open_run(tmp_path)


def test_group_and_batch_settings_are_checked(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.role"):
        train.train(small_config(inputs, **{"rollout.role": "nobody"}), tmp_path / "a")
    with pytest.raises(ValueError, match="stochastic"):
        train.train(small_config(inputs, **{"objective.rl": "flow_grpo"}), tmp_path / "b")
    with pytest.raises(ValueError, match=r"objective\.rl must be one of"):
        train.train(small_config(inputs, **{"objective.rl": "ppo"}), tmp_path / "c")
