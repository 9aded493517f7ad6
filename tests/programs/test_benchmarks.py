"""A run whose benchmark has questions of its own: log, tables, report and ablation follow it; so does another one."""

import json

import numpy as np
import pytest
from hash_judge import HashJudge
from small import HASH, make_inputs, small_config

from world_distill import cli
from world_distill.core.measures import Measures
from world_distill.errors import UserError
from world_distill.evaluation.scoring import Verdict
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.entries import About
from world_distill.programs import ablate, train
from world_distill.reports import report
from world_distill.storage.metric_log import read_log
from world_distill.training import run_folder

pytestmark = pytest.mark.once

WORDS = ("bright", "sharp_edges")
ASKING = {"benchmark.factory": "world_distill.evaluation:VlmBenchmark"}


class Graded:
    """Grades clips in quarters; the second question about the first clip has no answer."""

    name, questions = "graded-1", WORDS

    def __init__(self, **options):
        pass

    def check(self, clips, cases):
        grades = [round(4 * (HashJudge.log_odds(clip, "") / 5 + 0.5)) / 4 for clip in clips]
        return {"bright": np.array(grades), "sharp_edges": np.array([np.nan, *[1.0] * (len(cases) - 1)])}


class TooHigh(Graded):
    """Returns what is no score."""

    score = 3.0

    def check(self, clips, cases):
        return {word: np.full(len(clips), self.score) for word in WORDS}


class Silent(TooHigh):
    """Has no answer."""

    score = np.nan


GRADED = {"benchmark.factory": f"{__name__}:Graded"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def rubric(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rubric")
    for word in WORDS:
        (folder / f"{word}.txt").write_text(f"Is it {word}? {{task}}")
    return folder


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train.train(small_config(inputs, steps=2, evaluate_every=1, **GRADED), folder)
    return folder


def test_the_log_and_the_tables_have_its_columns(run, capsys):
    lines = [line for line in read_log(run / "metrics.jsonl") if "validation/bright" in line]
    assert len(lines) == 2 and all("validation/all" in line and "validation/task" not in line for line in lines)
    assert cli.main(["evaluate", "--workdir", str(run)]) == 0
    assert "| name | bright | sharp edges | average | both | n |" in capsys.readouterr().out
    result = json.loads((run / "evaluation.json").read_text())
    assert result["benchmark"] == {"name": "graded-1", "questions": list(WORDS)}
    clips = [Verdict.from_json(v) for v in result["verdicts"]["executor"]]
    there = [v.scores["bright"] for v in clips if not np.isnan(v.scores["sharp_edges"])]
    [row] = [row for row in result["rows"] if row["name"] == "executor"]
    assert row["bright"] == pytest.approx(np.mean(there)) == row["all"]  # the other question is always yes
    assert row["n"] == len(there) and {e["measure"] for e in result["paired"]} == set(Measures(WORDS).names)


def test_the_report_has_its_words(run):
    page = report.build(run).read_text()
    assert "Sharp edges" in page and "Average of the two" in page and "Task completed, by model" not in page
    assert "Bright: on " in page


def test_a_finished_run_is_scored_by_another_benchmark(run, rubric, capsys):
    flags = [f"--config.benchmark.factory={ASKING['benchmark.factory']}", f"--config.benchmark.options.judge={HASH}"]
    before = (run / "config.json").read_text()
    assert cli.main(["evaluate", "--workdir", str(run), *flags, f"--config.benchmark.options.rubric={rubric}"]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert result["benchmark"]["judges"] == {"main": "hash-1"} and result["benchmark"]["questions"] == list(WORDS)
    assert {v for role in result["verdicts"].values() for clip in role for v in clip["scores"].values()} == {0, 1}
    with JudgmentCache(run / "benchmark.sqlite") as cache:
        assert len(cache) == 2 * 3 * len(result["verdicts"]["base"])
        assert {entry.about.record for entry in cache.entries()} == {v["id"] for v in result["verdicts"]["base"]}
    assert (run / "config.json").read_text() == before
    assert cli.main(["evaluate", "--workdir", str(run), "--config.sampler.steps=2"]) == 2
    assert "is part of what was trained" in capsys.readouterr().err


def test_training_asks_a_vlm_once_and_goes_on(inputs, rubric, tmp_path, monkeypatch):
    asked = []
    ask = HashJudge.ask
    monkeypatch.setattr(HashJudge, "ask", lambda self, requests: asked.extend(requests) or ask(self, requests))
    config = small_config(inputs, steps=1, evaluate_every=1, **ASKING)
    with config.unlocked():
        config.objective.rl = "none"
        config.benchmark.options = {"judge": HASH, "rubric": str(rubric)}
    train.train(config, tmp_path)
    assert len(asked) == 2 * 2  # two validation tasks, two questions
    (tmp_path / "metrics.jsonl").unlink()
    with config.unlocked():
        config.checkpoints = str(tmp_path / "others")  # trains the same again
    train.train(config, tmp_path)
    assert len(asked) == 4
    assert not (tmp_path / "judgments.sqlite").exists()  # nobody was asked about a reward


def test_a_score_that_is_none_is_refused(inputs, run):
    with pytest.raises(UserError, match="graded-1: the score of bright is 3 for .*scores are from 0 to 1"):
        from world_distill.programs.evaluate import evaluate

        evaluate(run, {"benchmark.factory": f"{__name__}:TooHigh"})


def test_a_benchmark_without_answers_stops_nothing(inputs, tmp_path):
    settings = {"objective.rl": "none", "benchmark.factory": f"{__name__}:Silent"}
    row = train.train(small_config(inputs, steps=1, evaluate_every=1, **settings), tmp_path)["validation"]
    assert (row["n"], row["invalid"], row["bright"]) == (0, 2, None)
    assert [line["validation/all"] for line in read_log(tmp_path / "metrics.jsonl") if "validation/all" in line] == [
        None
    ]


def test_an_ablation_follows_its_benchmark(inputs, tmp_path):
    claims = [ablate.Ordering("awm", "base", metric, "a claim") for metric in (*WORDS, "all")]
    settings = {"steps": 2, "evaluate_every": 1, **GRADED}
    result = ablate.ablate(
        lambda variant, seed: small_config(inputs, seed=seed, **settings), ["awm"], [0], tmp_path, "awm", claims
    )
    assert result["benchmark"] == {"questions": list(WORDS)}
    assert [line["metric"] for line in result["orderings"]] == [*WORDS, "all"]
    assert "| name | steps | bright | sharp edges | average | both | n |" in ablate.table(result)
    assert "Sharp edges" in (tmp_path / "ablation.html").read_text()
    assert [step for step, _ in result["curves"]["awm"]] == [1, 2]
    with pytest.raises(KeyError, match="task"):
        ablate.compare(ablate.Ordering("awm", "base", "task", ""), {"awm": [[]], "base": [[]]}, Measures(WORDS))


def test_a_benchmark_is_no_part_of_what_is_trained(inputs, run):
    config = small_config(inputs, steps=2, evaluate_every=1)
    run_folder.check_folder(config, run)
    assert "benchmark" not in run_folder.fixed_settings(config)


def test_its_memory_is_apart_from_the_rewards(inputs, tmp_path):
    shared = tmp_path / "shared"
    config = small_config(inputs, **{"judge.cache": f"{shared}/"})
    with (
        run_folder.open_cache(config, tmp_path) as rewards,
        run_folder.open_cache(config, tmp_path, "benchmark") as own,
    ):
        assert (rewards.path.name, own.path.name) == ("judgments.sqlite", "benchmark.sqlite")
        assert (rewards.address, own.address) == (str(shared), str(shared / "benchmark"))
        about = {"k": About("00" * 32, "task", "Is it?", "t", "a", "r", "v")}
        own.put_many({"k": 1.0}, judge_name="j", about=about)
        own.sync()
        rewards.sync()
        assert (len(rewards), len(own)) == (0, 1)
    config = small_config(inputs, **{"judge.cache": str(tmp_path / "all.sqlite")})
    with run_folder.open_cache(config, tmp_path, "benchmark") as own:
        assert own.path == tmp_path / "benchmark.sqlite"
