"""Rates, intervals and break-downs against plain counting; the evaluator's clips."""

import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small import VARIANTS, make_inputs, redraw, small_config
from streams import velocity_of

from world_distill import build, cli
from world_distill.core import sampling
from world_distill.core.measures import Measures
from world_distill.data.records.batches import fixed_batches
from world_distill.data.records.reader import RecordReader
from world_distill.evaluation.scoring import Verdict, breakdown, markdown, summarise
from world_distill.interfaces import Cases
from world_distill.programs import evaluate, train
from world_distill.storage.checkpoints import Checkpointer
from world_distill.training import run_folder, step_programs
from world_distill.training.step_programs import make_programs
from world_distill.weights import base_model


def verdict(i, task, agent, consistency, kind="go"):
    scores = {"task": task, "agent": agent, "consistency": consistency}
    return Verdict(str(i), f"[red disc]: Task {i}.", "red disc", kind, scores)


VERDICTS = [verdict(0, 1, 1, 1), verdict(1, 1, 1, 0), verdict(2, 0, 1, 1, "push"), verdict(3, 0, 0, 0, "push")]


def test_summary_counts():
    row = summarise("x", VERDICTS)
    assert (row["task"], row["agent"], row["consistency"]) == (0.5, 0.75, 0.5)
    assert row["average"] == pytest.approx(7 / 12)
    assert row["all"] == 0.25
    assert (row["n"], row["invalid"]) == (4, 0)
    low, high = row["ci95"]["task"]
    # Wilson's interval is where (p - rate)^2 = z^2 p (1 - p) / n.
    for p in (low, high):
        assert (p - 0.5) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / 4)
    assert row["ci95"]["average"] == [0, 1]  # four grades say little
    values = np.array([1, 2 / 3, 2 / 3, 0] * 4)
    low, high = summarise("x", VERDICTS * 4)["ci95"]["average"]
    half = 2.13145 * values.std(ddof=1) / 4  # Student's, of 15 degrees of freedom
    assert (low, high) == pytest.approx((7 / 12 - half, 7 / 12 + half), rel=1e-5)


def test_clips_that_could_not_be_checked_are_counted_and_left_out():
    row = summarise("x", [*VERDICTS, verdict(9, math.nan, 1, 1)])
    assert (row["n"], row["invalid"], row["task"]) == (4, 1, 0.5)
    empty = summarise("x", [verdict(9, math.nan, 1, 1)])
    assert empty["task"] is None and "–" in markdown([empty])


@pytest.mark.parametrize("missing", [0, 1, 7])
def test_clips_without_a_verdict_are_listed_below_the_table(missing):
    verdicts = [*VERDICTS, *(verdict(90 + i, 1, math.nan, 1) for i in range(missing))]
    result = {"rows": [summarise("executor", verdicts)], "by_kind": [], "by_agent": [], "held_out": {}}
    result["verdicts"] = {"executor": [v.to_json() for v in verdicts]}
    lines = [line for line in evaluate.tables(result).splitlines() if "no verdict" in line]
    ids = {1: "90", 7: "90, 91, 92, 93, 94, …"}
    assert lines == [f"Executor: {n} clips have no verdict and are left out ({ids[n]})." for n in [missing] if n]


def test_breakdown_and_table():
    rows = breakdown("x", VERDICTS, "kind")
    assert [(r["group"], r["n"], r["task"]) for r in rows] == [("go", 2, 1.0), ("push", 2, 0.0)]
    assert breakdown("x", VERDICTS, "agent")[0]["agent"] == 0.75  # the rate, not the name
    text = markdown(rows, first=("group", "name"))
    assert text.splitlines()[0].startswith("| group | name | task |")
    assert "| push | x | 0.0 % [0.0, 65.8] |" in text


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    config = small_config(folder, **{"scenes.test": 4})
    mesh = build.start_devices(config)
    family = build.make_family(config)
    return config, mesh, family, base_model.load_base(family, config, mesh), RecordReader(folder / "data", "test")


def clips_of(parts, batch, **kwargs):
    config, mesh, family, base, reader = parts
    with config.unlocked():
        config.evaluate_batch = batch
    evaluator = run_folder.make_evaluator(config, family, mesh, build.make(config, "benchmark"))
    clips = {}
    verdicts = evaluator.run(reader, base, None, text="task", keep=clips.__setitem__, **kwargs)
    return clips, verdicts


def test_a_clip_does_not_depend_on_the_batch(parts):
    small, verdicts = clips_of(parts, 2)
    large, again = clips_of(parts, 8)
    assert list(small) == list(large) and len(small) == 4
    for name in small:
        # Another batch size is another program: the last bit may differ, and a byte where it rounds.
        assert np.abs(small[name].astype(int) - large[name]).max() <= 1
    assert [v.id for v in verdicts] == [v.id for v in again]


@pytest.mark.parametrize("text", ["task", "solution"])
def test_a_clip_is_a_plain_rollout_from_the_seed_and_the_records_number(parts, text):
    config, mesh, family, base, reader = parts
    [batch] = fixed_batches(reader, 4, lengths={"text": config.text_length})
    rows, lora = np.array([0, 1, 2, 3]), redraw(make_programs(config, mesh).state.lora, 5)
    grid, _ = build.sampler_grid(config)
    condition = jax.tree.map(jnp.asarray, batch.condition(text))
    found, denoise = [], jax.jit(velocity_of(family))
    for seed in (0, 3):
        evaluator = run_folder.Evaluator(
            family, mesh, None, grid=grid, batch=4, lengths={"text": config.text_length}, seed=seed
        )
        found.append(evaluator.clips(batch, base, lora, text=text, rows=rows))
        keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), row) for row in rows])
        x = sampling.initial_noise(keys, condition.scene, family.latents)["video"]
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):  # Euler's method
            x = x + (t_next - t) * denoise(base, lora, x, jnp.full(4, t), condition)
        assert np.abs(found[-1].astype(int) - np.asarray(family.codec.decode(base, {"video": x}))).max() <= 1
    assert np.abs(found[0][:, 1:].astype(int) - found[1][:, 1:]).max() > 10  # another seed, other clips
    np.testing.assert_array_equal(found[0][:, 0], found[1][:, 0])  # of the same scene


def test_limit(parts):
    assert len(clips_of(parts, 2, limit=3)[1]) == 3


def test_rates_are_those_of_the_benchmark(parts):
    clips, verdicts = clips_of(parts, 8)
    config, _, _, _, reader = parts
    benchmark = build.make(config, "benchmark")
    records = list(reader)
    columns = ([getattr(r, name) for r in records] for name in ("id", "task", "agent", "image_png"))
    scores = benchmark.check(np.stack([clips[r.id] for r in records]), Cases(*columns))
    for question, values in scores.items():
        assert [v.scores[question] for v in verdicts] == list(values)


# ---- Who is scored, and told what


class Told:
    """In an evaluator's place: notes the weights and the text that each call gets."""

    measures = Measures()

    def __init__(self):
        self.calls = []

    def negative(self, *_):
        """Nothing is guided here."""

    def run(self, reader, base, lora, *, text, **_):
        self.calls.append((jax.device_get(lora), text))
        return [verdict(i, 1, 1, 1) for i in range(3)]


def test_roles_are_what_their_names_say(parts):
    config, mesh, family, base, reader = parts
    told = Told()
    opened = types.SimpleNamespace(
        config=config, data=reader.index_path.parent, base=base, executor="weights", step=7, evaluator=lambda _: told,
        family=family,
    )  # fmt: skip
    found = evaluate.evaluate_roles(opened, roles=("base", "demonstrator", "executor"), split="test")
    assert told.calls == [(None, "task"), (None, "solution"), ("weights", "task")]
    assert [row["name"] for row in found["rows"]] == list(found["verdicts"]) == ["base", "demonstrator", "executor"]


def test_a_run_is_opened_with_the_slow_average_of_its_newest_checkpoint(parts, tmp_path, monkeypatch):
    config, mesh, family, _, _ = parts
    state = make_programs(config, mesh).state
    made = redraw(state.replace(step=None, key=None), 1)
    assert run_folder.load_executor(config, mesh, tmp_path) == (None, 0)
    with Checkpointer(run_folder.checkpoint_folder(config, tmp_path)) as checkpointer:
        for step in (1, 2):
            ema = redraw(state.lora, 10 + step)
            saved = made.replace(step=jnp.int32(step), key=jax.random.key(0), lora_ema=ema)
            saved = jax.tree.map(lambda x, like: x if x.dtype == like.dtype else x.astype(like.dtype), saved, state)
            checkpointer.save(step, saved, b"{}", {"config": {}, "fingerprint": ""})
    # Nothing but the Executor is read, and no training program is made.
    read, restore = [], ocp.StandardCheckpointHandler.restore
    spy = lambda self, folder, *args, **kw: read.append(folder.name) or restore(self, folder, *args, **kw)  # noqa: E731
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", spy)
    monkeypatch.setattr(step_programs, "_make", None)
    found, step = run_folder.load_executor(config, mesh, tmp_path)
    assert step == 2 and read == ["executor"]
    jax.tree.map(np.testing.assert_array_equal, found, ema)


def test_training_validates_the_slow_average(parts, tmp_path, monkeypatch):
    config, told = parts[0], Told()
    config = small_config(pathlib.Path(config.data).parent, **VARIANTS["distill"], steps=2, evaluate_every=1)
    monkeypatch.setattr(train.run_folder, "make_evaluator", lambda *_: told)
    train.train(config, tmp_path)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        state, _, _ = checkpointer.restore_latest(make_programs(config, build.start_devices(config)).state)
    (_, text), (last, _) = told.calls
    assert text == "task"
    jax.tree.map(np.testing.assert_array_equal, last, jax.device_get(state.lora_ema))
    gaps = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(state.lora), strict=True)]
    assert max(gaps) > 1e-4  # the weights themselves are others


def test_unknown_roles_are_named(tmp_path, capsys):
    assert cli.main(["evaluate", "--workdir", str(tmp_path), "--roles", "teacher"]) == 2
    assert "--roles teacher: 'teacher' is unknown; there are base, demonstrator, executor" in capsys.readouterr().err
