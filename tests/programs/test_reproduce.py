"""The rows of the paper's table: their configs and commands, one call for all of them, killed, resumed and failed."""

import contextlib
import json
import shlex

import jax
import numpy as np
import pytest
from small import HASH, SMALL, make_inputs

from tests.vlm.fake_server import FakeServer
from world_distill import build, cli
from world_distill.core.metrics import student_interval
from world_distill.errors import UserError
from world_distill.evaluation.scoring import Verdict
from world_distill.judges.selftest import PROBES
from world_distill.programs import equal_compute, paper_plan, paper_rows, reproduce, train
from world_distill.programs.paper_rows import Study
from world_distill.settings.loading import load_config, to_json
from world_distill.storage.metric_log import read_log
from world_distill.training import run_folder

ROWS = ["base", "demonstrator", "sft", "off_policy", "on_policy", "wmsd"]
# Rows have their own objective; what is small is the same for all.
TINY = {
    key: str(value)
    for key, value in SMALL.items()
    if not key.startswith("objective.") or key in ("objective.updates", "objective.minibatches")
} | {"steps": "2", "save_every": "1", "judge.factory": HASH, "objective.rl_weight": "1"}  # fmt: skip


def study_of(folder, **changes):
    overrides = TINY | {"base": str(folder / "base.safetensors")} | changes.pop("overrides", {})
    return Study("sandbox", folder / "table", overrides, **{"seeds": (0, 1)} | changes)


# ---- What a row is


@pytest.mark.parametrize("address", ["sandbox:kinds=full", "wan22_5b", "wan22_5b:debug", "ltx2", "ltx2:debug"])
def test_rows_are_those_of_the_paper_at_equal_compute(address, tmp_path):
    runs = {run.row: run for run in paper_rows.make_runs(Study(address, tmp_path, {}, seeds=(3,)))}
    assert set(ROWS) <= set(runs) and {run.seed for run in runs.values()} == {3}
    roles = {name: run.role for name, run in runs.items() if not name.endswith("undistilled")}
    assert roles == {name: name if name in ("base", "demonstrator") else "executor" for name in ROWS}
    budget = equal_compute.run_forwards(runs["wmsd"].config)
    for name in ROWS[2:]:
        config = runs[name].config
        spent = equal_compute.run_forwards(config)
        assert spent == pytest.approx(budget, abs=spent / config.steps), name
    objectives = {name: runs[name].config.objective for name in ROWS}
    assert objectives["sft"].kind == "sft" and runs["sft"].config.train_set == "train_shown_3"
    assert [objectives[name].rl for name in ("off_policy", "on_policy", "wmsd")] == ["none", "none", "awm"]
    assert [runs[name].config.rollout.role for name in ("off_policy", "on_policy")] == ["demonstrator", "executor"]
    rates = runs["off_policy"].config.optimizer.learning_rate
    if address.startswith("sandbox"):  # each run cools down in its own time
        assert rates[-1][0] == runs["off_policy"].steps > runs["wmsd"].steps
        assert len(runs["sft"].config.annotator.options.kinds) == 4
    for run in runs.values():  # nothing that nobody is asked about
        assert run.config.judge.controls == 0 or run.config.objective.rl != "none"


@pytest.mark.parametrize("address", ["sandbox", "wan22_5b:debug", "ltx2:debug"])
def test_the_commands_of_a_row_have_its_config(address, tmp_path):
    study = Study(address, tmp_path, {"optimizer.eps": "1e-7"}, {"sft": {"steps": "5"}}, seeds=(2,), limit=3)
    for run in paper_rows.make_runs(study):
        *first, last = ([str(word) for word in call] for call in run.calls(study))
        names = {"sft": ["demonstrate", "train"]}.get(run.row, ["train"] if run.trains else [])
        assert [call[0] for call in first] == names and last[0] == "evaluate"
        assert last[-4:] == ["--roles", run.role, "--limit", "3"] and str(run.folder) in last
        [call] = [call for call in (*first, last) if "--config" in call and call[0] != "demonstrate"]
        flags = dict(word.removeprefix("--config.").split("=", 1) for word in call if word.startswith("--config."))
        assert to_json(build.load(call[call.index("--config") + 1], flags)) == to_json(run.config)
        assert run.config.optimizer.eps == 1e-7 and (run.row != "sft" or run.config.steps == 5)


def test_wrong_rows_are_refused_by_name(tmp_path):
    make = lambda *args, **kwargs: paper_rows.make_runs(Study("sandbox", tmp_path, *args, **kwargs))  # noqa: E731
    with pytest.raises(UserError, match="no row 'wmds'; did you mean 'wmsd'"):
        make(rows=("wmds",))
    with pytest.raises(UserError, match="no row 'stf'"):
        make({}, {"stf": {"steps": "1"}})
    with pytest.raises(UserError, match="--seeds"):
        make({"seed": "1"})
    with pytest.raises(UserError, match=r"row sft: .*'stepps'.*'steps'"):
        make({}, {"sft": {"stepps": "1"}})
    with pytest.raises(UserError, match=r"is not \(NAME, base\|demonstrator\|executor"):
        make({"reproduce.rows": "(('wmsd', 'executer', 'wmsd'),)"})
    with pytest.raises(UserError, match="trains nothing"):
        make({"reproduce.reference": "base"})
    assert cli.main(["reproduce", "--plan", "--row", "sft"]) == cli.main(["reproduce", "--plan", "--seeds", "0,0"]) == 2


def test_the_plan_says_that_there_is_nothing_to_score(tmp_path, capsys):
    flags = ["--plan", "--seeds", "0", "--rows", "base", "--workdir", str(tmp_path)]
    assert cli.main(["reproduce", "--config", "wan22_5b", f"--config.data={tmp_path}", *flags]) == 0
    assert "no records 'test' are there yet" in capsys.readouterr().out
    assert cli.main(["reproduce", "--config", "wan22_5b", f"--config.data={tmp_path}", *flags[1:]]) == 2
    assert "has no records 'test' to score" in capsys.readouterr().err
    assert cli.main(["reproduce", "--config", "sandbox", *flags]) == 0
    assert "no records" not in capsys.readouterr().out


def test_the_plan_counts_what_is_left(tmp_path):
    study = study_of(tmp_path, seeds=(0,), overrides={"evaluate_every": "1", "evaluate_tasks": "1"}, noises=2)
    planned = {entry["row"]: entry for entry in paper_plan.plan(study)}
    assert not (tmp_path / "table").exists()
    assert list(planned) == ROWS and not any(entry["finished"] for entry in planned.values())
    wmsd, config = planned["wmsd"], load_config("sandbox", {k: v for k, v in TINY.items() if k != "judge.factory"})
    assert wmsd["rewards"] == 2 * 8 * 3 and wmsd["clips"] == 2 * 4 and wmsd["benchmark"] == 0  # it asks nobody
    [controlled] = paper_plan.plan(study_of(tmp_path, seeds=(0,), rows=("wmsd",), overrides={"judge.controls": "8"}))
    assert controlled["rewards"] == wmsd["rewards"] + 168
    assert wmsd["training"] == equal_compute.run_forwards(config)
    assert wmsd["sampling"] == 3 * (2 * 4 + 2 * 1)  # the sampler's steps; two looks at one validation task
    assert planned["base"]["training"] == planned["on_policy"]["rewards"] == 0
    shown = planned["sft"]["sampling"] - 3 * (2 * 4 + planned["sft"]["steps"])
    assert shown == 3 * 6 * 2  # of every training task
    assert "| left in all |" in paper_plan.table(list(planned.values()))


# ---- Comparing


def verdicts(rates, ids):
    return [Verdict(i, "", "", "go", {"task": r, "agent": 1.0, "consistency": 1.0}) for i, r in zip(ids, rates)]  # noqa: B905


def test_seeds_of_one_task_are_one_case_and_pairs_are_of_one_seed(tmp_path):
    study = Study("sandbox", tmp_path, {}, seeds=(0, 1, 2), rows=("base", "wmsd"))
    runs = paper_rows.make_runs(study)
    rng, ids = np.random.default_rng(0), [str(i) for i in range(20)]
    drawn = {row: rng.integers(0, 2, (3, 20)).astype(float) for row in ("base", "wmsd")}
    roles = {"base": "base", "wmsd": "executor"}

    def scores(row, seed):
        return {"verdicts": {roles[row]: [v.to_json() for v in verdicts(drawn[row][seed], ids)]}}

    found = {"base": {s: scores("base", s) for s in (0, 1, 2)}, "wmsd": {s: scores("wmsd", s) for s in (0, 2)}}
    result = reproduce.compare(study, runs, found) | {"failed": []}
    base, wmsd = result["rows"]
    assert base["n"] == wmsd["n"] == 20 and base["task"] == pytest.approx(drawn["base"].mean())
    assert wmsd["seeds"] == [0, 2] and wmsd["task"] == pytest.approx(drawn["wmsd"][[0, 2]].mean())
    entry = next(e for e in result["paired"] if e["measure"] == "task")
    each = (drawn["wmsd"] - drawn["base"])[[0, 2]].mean(axis=1)
    assert entry["by_seed"] == pytest.approx(list(each)) and entry["difference"] == pytest.approx(each.mean())
    assert (entry["n"], entry["seeds"]) == (20, 2)
    half = 12.706 * each.std(ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom
    assert entry["ci95_seeds"] == pytest.approx([each.mean() - half, each.mean() + half], rel=1e-3)
    assert student_interval(np.array([1.0, 2, 3]))[2] == pytest.approx(2 + 4.30265 / np.sqrt(3), rel=1e-4)
    assert "intervals over seeds" in reproduce.tables(result)


# ---- The sandbox, whole


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(study, result) of a call that was killed in a step of its second training run, and called again."""
    folder = tmp_path_factory.mktemp("paper")
    make_inputs(folder)
    study, real = study_of(folder), train.train

    def dies(config, workdir, **options):
        if workdir.parent.name == "off_policy":
            patch.setattr(train.Checkpointer, "save", _killed(train.Checkpointer.save))
        return real(config, workdir, **options)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(train, "train", dies)
        reproduce.reproduce(study)
    assert not (study.workdir / "reproduce.json").exists()
    made = [p.parent.parent.name for p in study.workdir.glob("runs/*/*/evaluation.json")]
    assert sorted(made) == ["base", "demonstrator", "sft"]
    before = {path: path.stat().st_mtime_ns for path in study.workdir.glob("runs/*/*/evaluation.json")}
    result = reproduce.reproduce(study)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    return study, result


def _killed(save):
    """A `Checkpointer.save` after whose first checkpoint the process dies."""

    def saved(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.wait()
        raise KeyboardInterrupt

    return saved


def test_the_sandbox_fills_every_row(table):
    study, result = table
    assert [row["name"] for row in result["rows"]] == ROWS and not result["failed"]
    assert all(row["n"] == 8 and row["seeds"] == [0, 1] for row in result["rows"])  # four tasks in each seed's scenes
    assert json.loads((study.workdir / "reproduce.json").read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    text = (study.workdir / "reproduce.md").read_text()
    assert "Executor" not in text and text.count("world-distill train ") == 8 and "paper's figure" not in text
    page = (study.workdir / "reproduce.html").read_text()
    assert page.count('<figure data-model="') == 8 * (1 + len(ROWS)), "every row's clip of every task"
    assert page.count("world-distill train ") == 8
    pairs = {(entry["before"], entry["after"]) for entry in result["paired"]}
    assert {("base", "demonstrator"), ("base", "wmsd"), ("demonstrator", "sft"), ("on_policy", "wmsd")} <= pairs
    assert ("wmsd", "on_policy") not in pairs and len(pairs) == 5 + 4 + 3


def test_a_killed_run_goes_on_after_its_checkpoint(table):
    study, _ = table
    lines = read_log(study.workdir / "runs/off_policy/0/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    [entry] = [e for e in paper_plan.plan(study) if (e["row"], e["seed"]) == ("off_policy", 0)]
    assert entry["finished"] and entry["saved"] == entry["steps"] == len(lines) and entry["training"] == 0


def test_what_is_finished_is_only_read(table, monkeypatch):
    study, result = table
    for name in ("train", "demonstrate", "evaluate"):
        monkeypatch.setattr(getattr(reproduce, name), name, None)
    assert reproduce.reproduce(study)["rows"] == result["rows"]
    page = study.workdir / "runs/sft/1/evaluation.html"
    page.unlink()  # as if killed between the figures and their page
    assert reproduce.reproduce(study)["rows"] == result["rows"] and page.is_file()
    # Another number of clips, another benchmark or other settings are other results.
    [run] = [run for run in paper_rows.make_runs(study) if (run.row, run.seed) == ("wmsd", 1)]
    assert reproduce.finished(run, study) is not None
    assert reproduce.finished(run, study_of(study.workdir.parent, limit=1)) is None
    assert reproduce.finished(run, study_of(study.workdir.parent, noises=2)) is None
    for change in ({"benchmark.options.world": "@model"}, {"rollout.group": "4"}):
        other = study_of(study.workdir.parent, overrides=change)
        [changed] = [run for run in paper_rows.make_runs(other) if (run.row, run.seed) == ("wmsd", 1)]
        assert reproduce.finished(changed, other) is None


def test_a_rows_own_commands_make_the_same_row(table, tmp_path):
    study, result = table
    [line] = [line for line in result["commands"] if (line["row"], line["seed"]) == ("sft", 1)]
    old, new = study.workdir / "runs/sft/1", tmp_path / "alone"
    for call in line["calls"]:
        assert cli.main(shlex.split(call.replace(str(old), str(new)))[1:]) == 0
    one, other = (json.loads((folder / "evaluation.json").read_text()) for folder in (old, new))
    assert one == other
    executors = [jax.tree.leaves(run_folder.open_run(folder).executor) for folder in (old, new)]
    for a, b in zip(*executors, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_row_that_fails_is_named_and_does_not_stop_the_others(table, capsys):
    study, result = table
    flags = ["reproduce", "--config", "sandbox", "--workdir", str(study.workdir), "--seeds", "0,1"]
    flags += [f"--config.{key}={value}" for key, value in study.overrides.items()]
    # The run of another config lies in this folder.
    assert cli.main([*flags, "--row", "on_policy.rollout.group=4"]) == 1
    said = capsys.readouterr()
    assert "on_policy, seed 0 failed, and is left out" in said.err and "2 runs failed" in said.out
    found = json.loads((study.workdir / "reproduce.json").read_text())
    assert [row["name"] for row in found["rows"]] == [name for name in ROWS if name != "on_policy"]
    assert [(line["row"], line["seed"]) for line in found["failed"]] == [("on_policy", 0), ("on_policy", 1)]
    assert "rollout.group: 2 -> 4" in found["failed"][0]["why"]
    assert cli.main(flags) == 0
    assert str(study.workdir / "reproduce.html") in capsys.readouterr().out
    assert json.loads((study.workdir / "reproduce.json").read_text())["rows"] == result["rows"]


def test_rows_without_weights_say_how_to_name_them(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "count_records", lambda config, name: 1)
    study = Study("ltx2", tmp_path, {"data": str(tmp_path)}, seeds=(0,), rows=("base_undistilled",))
    with pytest.raises(UserError, match=r"no row could be made.*--row base_undistilled\.base"):
        reproduce.reproduce(study)


# ---- Wan, with a VLM as judge and benchmark


WAN = {
    "model.size": "(32, 32)", "model.frames": "5", "world.frames": "5", "model.depth": "1", "sampler.steps": "2",
    "evaluate_batch": "4", "encode_batch": "4", "host_devices": "1", "steps": "1", "save_every": "1",
    "rollout.tasks": "2", "objective.updates": "1", "objective.minibatches": "1", "objective.draws": "1",
    "scenes.train": "2", "scenes.validation": "1", "scenes.test": "4", "annotator.pairs": "2",
}  # fmt: skip


@pytest.mark.once
def test_wan_beside_the_papers_figures_and_no_question_twice(tmp_path, capsys):
    flags = ["reproduce", "--config", "wan22_5b:debug", "--workdir", str(tmp_path), "--seeds", "0"]
    flags += [f"--config.{key}={value}" for key, value in WAN.items()]
    flags += [
        "--config.judge.factory=world_distill.judges:ServerJudge", "--config.judge.options.model=judge",
        "--config.benchmark.factory=world_distill.evaluation:WorldTasksBench", "--config.benchmark.options.model=judge",
        "--config.judge.options.frames=4", "--config.benchmark.options.frames=4",
    ]  # fmt: skip

    def call(server):
        servers = [f"--config.{part}.options.servers={server.url}" for part in ("judge", "benchmark")]
        return cli.main([*flags, *servers])

    with FakeServer() as server:
        port = server.port
        server.fault = lambda number, body: "quota" if len(asked(server)) >= 20 else None  # the money is spent
        assert call(server) == 1
        first = asked(server)
    said = capsys.readouterr()
    assert "run 1/6" not in said.err and "run 2/6: demonstrator, seed 0 failed, and is left out" in said.err
    with FakeServer(port=port) as server:
        assert call(server) == 0
        second = asked(server)
    said = capsys.readouterr().out
    assert said.count("is trained to step") == 3  # what was learnt without a judge, before the money was spent
    assert len({*first, *second}) == len(first) + len(second)
    result = json.loads((tmp_path / "reproduce.json").read_text())
    assert [row["name"] for row in result["rows"]] == ROWS and not result["failed"]
    assert "| wmsd, here |" in said and "| *LTX-2 8-step + WMSD, the paper's figure* | 0.605 |" in said
    assert all(row["n"] == 4 and not row["invalid"] for row in result["rows"])


def asked(server):
    """(pictures, question) of the answers about clips."""
    probes = {text for text, _ in PROBES}
    return [(tuple(urls), question) for urls, question in server.answered if question not in probes]
