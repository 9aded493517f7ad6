"""WorldTasks-Bench from made pictures to the table: imported, encoded, scored by a server, stopped, scored again."""

import json
import re

import numpy as np
import pytest

from tests.benchmark_sets import AGENTS, KINDS, save_worldtasks
from tests.vlm.fake_server import FakeServer, truth
from world_distill import cli
from world_distill.core.metrics import wilson_interval
from world_distill.evaluation import WorldTasksBench
from world_distill.judges.rubric import load_rubric
from world_distill.judges.selftest import PROBES
from world_distill.storage.video_files import load_strip

pytestmark = pytest.mark.once

CASES = 200
SMALL = {
    "model.size": (32, 32), "model.frames": 5, "model.depth": 1, "sampler.steps": 1, "evaluate_batch": 40,
    "encode_batch": 50, "host_devices": 1,
}  # fmt: skip
CONFIG = ["--config", "wan22_5b:debug", *(f"--config.{key}={value}" for key, value in SMALL.items())]
BENCH = "--config.benchmark.factory=world_distill.evaluation:WorldTasksBench"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder as the authors' data set has it, imported and encoded."""
    folder = tmp_path_factory.mktemp("bench")
    save_worldtasks(folder / "set", CASES)
    data = str(folder / "data")
    assert cli.main(["import-tasks", "--folder", str(folder / "set"), "--bench", "--out", data, "--name", "test"]) == 0
    assert cli.main(["encode", *CONFIG, "--records", data, "--name", "test"]) == 0
    return folder


def evaluate(bench, server, name, *more):
    flags = ["evaluate", "--workdir", str(bench / name), BENCH, f"--config.benchmark.options.servers={server.url}"]
    return cli.main([*flags, "--config.benchmark.options.model=judge", "--config.benchmark.options.frames=4", *more])


def asked(server):
    """(pictures, question) of the answers about clips."""
    probes = {text for text, _ in PROBES}
    return [(tuple(urls), question) for urls, question in server.answered if question not in probes]


@pytest.fixture(scope="module")
def scored(bench):
    """(evaluation.json, questions before the stop, questions after it) of an evaluation that was stopped on its way."""
    with FakeServer(fault=lambda number, body: "quota" if number > 250 else None) as server:  # the money is spent
        assert evaluate(bench, server, "base", *CONFIG, f"--config.data={bench / 'data'}") == 2
    assert not (bench / "base/evaluation.json").exists()
    with FakeServer() as other:
        assert evaluate(bench, other, "base") == 0
        after = asked(other)
        assert evaluate(bench, other, "base") == 0  # all of it is known
        assert asked(other) == after
    return json.loads((bench / "base/evaluation.json").read_text()), asked(server), after


def test_no_question_is_asked_twice(scored):
    _, before, after = scored
    assert 200 < len(before) < 3 * CASES
    assert len({*before, *after}) == len(before) + len(after) == 3 * CASES


def test_the_table_is_what_the_server_said(scored):
    result, before, after = scored
    number = re.compile(r"to place (\d+)\.")
    place = {urls: int(found[1]) for urls, question in [*before, *after] if (found := number.search(question))}
    assert sorted(place.values()) == [*range(CASES)]
    rubric, said = load_rubric(WorldTasksBench.rubric, fps=8.0), {i: {} for i in range(CASES)}
    for urls, question in [*before, *after]:
        i = place[urls]
        told = (f"[{AGENTS[i % 3]}]: Move on to place {i}.", AGENTS[i % 3])
        [name] = [name for name in rubric.names if rubric.render(name, *told, 5) == question]
        said[i][name] = float(truth(urls, question) > 0)
    found = {int(number.search(v["task"])[1]): v["scores"] for v in result["verdicts"]["base"]}
    assert found == said
    [row] = result["rows"]
    assert (row["n"], row["invalid"]) == (CASES, 0)
    for question in rubric.names:
        yes = sum(scores[question] for scores in said.values())
        assert row[question] == yes / CASES and row["ci95"][question] == list(wilson_interval(yes, CASES))
    assert row["all"] == np.mean([min(scores.values()) for scores in said.values()])
    assert row["average"] == pytest.approx(np.mean([list(scores.values()) for scores in said.values()]))
    agents = {row["group"]: row["n"] for row in result["by_agent"]}
    assert agents == {"First person view": 134, "Man in blue shirt": 66}
    assert {row["group"]: row["n"] for row in result["by_kind"]} == dict.fromkeys(KINDS, 50)


def test_the_papers_figures_stand_beside(scored, bench):
    text = (bench / "base/evaluation.md").read_text()
    assert "| base, here | 0." in text and "*LTX-2 8-step + WMSD, the paper's figure* | 0.605" in text
    assert "*kind: navigation* | 0.310 | 0.760" in text and "| main | base | task |" in text
    page = (bench / "base/evaluation.html").read_text()
    assert "Task completed" in page and "LTX-2 8-step + WMSD" in page and "no measurement of this project" in page


def test_clips_of_all_cases_are_kept_and_shown(scored, bench):
    result, folder = scored[0], bench / "base/evaluation_clips"
    ids = [v["id"] for v in result["verdicts"]["base"]]
    assert result["clips"] == CASES and sorted(p.stem for p in (folder / "base").iterdir()) == sorted(ids)
    entries = json.loads((folder / "clips.json").read_text())
    assert [entry["id"] for entry in entries] == ids and entries[7]["task"] == f"[{AGENTS[1]}]: Move on to place 7."
    assert load_strip(folder / f"base/{ids[0]}.png").shape == (5, 32, 32, 3)
    assert not (bench / "base/.evaluation_clips.new").exists()  # of the one that was stopped
    page = (bench / "base/evaluation.html").read_text()
    assert len(page) < 15_000_000 and page.count('class="card task"') == CASES
    agents = re.findall(r'<option value="(.*?)"', page.split('name="agent"')[1].split("</select>")[0])
    assert agents == ["", "first person view", "man in blue shirt"]  # two spellings, one agent


def test_several_noises_and_another_run_are_compared_case_by_case(scored, bench, capsys):
    with FakeServer() as server:
        more = ["--noises", "2", "--limit", "30", "--clips", "4", "--against", f"first={bench / 'base'}"]
        assert evaluate(bench, server, "twice", *CONFIG, f"--config.data={bench / 'data'}", *more) == 0
        clips = {urls for urls, _ in asked(server)}
    result = json.loads((bench / "twice/evaluation.json").read_text())
    kept = [entry["id"] for entry in json.loads((bench / "twice/evaluation_clips/clips.json").read_text())]
    assert kept == [result["verdicts"]["base"][i]["id"] for i in (0, 10, 19, 29)]  # evenly
    [row] = result["rows"]
    assert (row["n"], row["clips"], result["noises"], len(clips)) == (30, 60, 2, 60)
    known = {v["id"]: v["scores"] for v in scored[0]["verdicts"]["base"]}
    first = [v for v in result["verdicts"]["base"] if "noise" not in v]
    assert [known[v["id"]] for v in first] == [v["scores"] for v in first]  # the first noise is that of one noise
    assert result["against"]["rows"][0]["name"] == "first: base"
    for entry in result["against"]["paired"]:  # paired on the same case and noise, where nothing differs
        assert entry["n"] == 30 and entry["difference"] == 0 and entry["ci95"][0] < 0 < entry["ci95"][1]
    assert "| base − first: base |" in capsys.readouterr().out


def test_what_is_missing_is_said(bench, tmp_path, capsys):
    flags = ["evaluate", *CONFIG, f"--config.data={bench / 'data'}", "--workdir", str(tmp_path / "x")]
    assert cli.main([*flags, "--config.benchmark.factory="]) == 2
    said = capsys.readouterr().err
    assert (
        "--config.benchmark.factory=world_distill.evaluation:WorldTasksBench" in said and "options.model=NAME" in said
    )
    again = ["evaluate", "--workdir", str(tmp_path / "x"), BENCH]
    assert cli.main(again) == 2
    assert "config.benchmark.options: a judge needs the name of its model" in capsys.readouterr().err
    with FakeServer() as server:
        again += [f"--config.benchmark.options.servers={server.url}", "--config.benchmark.options.model=judge"]
        assert cli.main([*again, "--roles", "executor"]) == 2
        assert "holds no trained Executor" in capsys.readouterr().err
        assert cli.main([*again, "--against", str(tmp_path)]) == 2
        assert "holds no evaluation" in capsys.readouterr().err
        (tmp_path / "results.json").write_text('{"rows": [], "verdicts": {}, "benchmark": {"questions": ["physics"]}}')
        assert cli.main([*again, "--against", str(tmp_path)]) == 2
        assert "its benchmark asks physics, and this one task, agent, consistency" in capsys.readouterr().err
        assert not asked(server)
