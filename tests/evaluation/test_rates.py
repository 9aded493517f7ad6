"""Tables from planted verdicts: graded, missing and contradictory ones, several noises, pairs of models, judges."""

import dataclasses
import json
import math

import numpy as np
import pytest

from world_distill.core.measures import Measures
from world_distill.core.metrics import wilson_interval
from world_distill.evaluation import comparison, worldtasks
from world_distill.evaluation.scoring import Verdict, breakdown, case_numbers, markdown, said, summarise

TWO = Measures(("instruction", "physics"))


def verdict(i, instruction, physics, *, noise=0, agent="robot", kind="pick", **details):
    scores = {"instruction": instruction, "physics": physics}
    named = {name.replace("__", "/"): value for name, value in details.items()}
    return Verdict(f"r{i}", f"Task {i}.", agent, kind, scores, named, noise)


def test_graded_scores_are_averaged_as_what_they_are():
    row = summarise("x", [verdict(0, 0.75, 1), verdict(1, 0.75, 0), verdict(2, 0, 1), verdict(3, math.nan, 1)], TWO)
    assert (row["n"], row["invalid"]) == (3, 1)
    assert row["instruction"] == 0.5 and row["physics"] == pytest.approx(2 / 3)
    assert row["all"] == 0.25 and row["average"] == pytest.approx(1.75 / 3)
    assert row["ci95"]["physics"] == list(wilson_interval(2, 3))
    for low, high in row["ci95"].values():
        assert 0 <= low < high <= 1
    assert list(row)[3:7] == ["instruction", "physics", "average", "all"]
    assert said(row, TWO) == "instruction 50.0 %, physics 66.7 %, average 58.3 %, both 25.0 %"
    assert markdown([row], measures=TWO).splitlines()[0] == "| name | instruction | physics | average | both | n |"


def test_clips_from_several_noises_are_one_case():
    first = [verdict(0, 1, 1), verdict(1, 0, 1), verdict(2, 1, math.nan), verdict(3, math.nan, 0)]
    second = [dataclasses.replace(v, noise=1) for v in first]
    second[0] = verdict(0, 0, 1, noise=1)
    second[2] = verdict(2, 1, 1, noise=1)
    assert case_numbers([*first, *second]).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    row = summarise("x", [*first, *second], TWO)
    assert (row["n"], row["clips"], row["invalid"]) == (3, 5, 3)  # case 3 has no clip that counts
    assert row["instruction"] == pytest.approx(np.mean([0.5, 0, 1]))  # a case once, whatever its clips
    values = np.array([0.5, 0, 1])
    low, high = row["ci95"]["instruction"]
    half = 1.96 * values.std(ddof=1) / math.sqrt(3)  # over 3 cases, not 5 clips
    assert (low, high) == (max(0.5 - half, 0), min(0.5 + half, 1))
    # The same task in another seed's verdicts is another case.
    assert case_numbers([*first, *second, *first, *second]).max() == 7
    assert "clips" not in summarise("x", [*first, *first], TWO)


def test_spellings_of_an_agent_are_one():
    agents = ["First person view", "First-person view", "first-person  View", "First person view", "Man"]
    rows = breakdown("x", [verdict(i, i % 2, 1, agent=a) for i, a in enumerate(agents)], "agent", TWO)
    assert [(row["group"], row["n"], row["instruction"]) for row in rows] == [
        ("First person view", 4, 0.5), ("Man", 1, 0.0),
    ]  # fmt: skip


def test_models_are_paired_by_case_and_noise():
    before = [verdict(i, 0, 1, noise=j) for j in (0, 1) for i in range(4)]
    after = [verdict(i, int(i != 1 or j), 1, noise=j) for j in (0, 1) for i in (3, 2, 1, 0, 9)]
    after[0] = dataclasses.replace(after[0], scores={"instruction": math.nan, "physics": 1})  # case 3, noise 0
    found = {entry["measure"]: entry for entry in comparison.paired(before, after, TWO)}
    instruction = found["instruction"]
    assert instruction["n"] == 4 and instruction["difference"] == pytest.approx(np.mean([1, 0.5, 1, 1]))
    assert found["physics"]["difference"] == 0 and found["physics"]["ci95"][0] < 0 < found["physics"]["ci95"][1]
    assert comparison.paired(before, [verdict(9, 1, 1)], TWO) == []
    roles = comparison.paired_roles({"executor": after, "base": before}, TWO)
    assert {(e["before"], e["after"]) for e in roles} == {("base", "executor")}
    text = comparison.paired_table(roles, TWO)
    assert "| Executor − base | +87.5 [" in text and text.splitlines()[-1].endswith("| 4 |")


def test_judges_side_by_side():
    log_odds = [(2.0, 1.0), (3.0, -1.0), (-1.0, -2.0), (-4.0, -0.5), (math.nan, 1.0), (1.0, math.nan)]
    clips = [verdict(i, a > 0, 1, main__instruction=a, other__instruction=b) for i, (a, b) in enumerate(log_odds)]
    measures = Measures(("instruction",))
    main, other = comparison.judges({"base": clips}, ("main", "other"), measures)
    assert main["yes"]["instruction"] == 0.6 and main["n"]["instruction"] == other["n"]["instruction"] == 5
    soft = np.mean([1 / (1 + math.exp(-x)) for x in (2, 3, -1, -4, 1)])
    assert main["probability"]["instruction"] == pytest.approx(soft)
    [row] = comparison.agreement({"base": clips}, ("main", "other"), measures)
    assert row["n"] == 4 and row["same"] == 0.75 and row["yes"] == [0.5, 0.25]
    assert row["kappa"] == pytest.approx((0.75 - 0.5) / (1 - 0.5)) and row["correlation"] == pytest.approx(0)
    silent = [verdict(0, 1, 1, main__instruction=1.0)]
    [row] = comparison.agreement({"base": silent}, ("main", "other"), measures)
    assert row["n"] == 0 and "| 0 |" in comparison.agreement_table([row])
    assert "| main | base | instruction | 60.0 % |" in comparison.judges_table([main, other])


def test_the_papers_figures_are_marked_as_its_own():
    scores = [Verdict(str(i), "", "", "", {"task": i % 2, "agent": 1, "consistency": 0}) for i in range(4)]
    lines = worldtasks.paper_table([summarise("base", scores)], worldtasks.PAPER, Measures()).splitlines()
    assert lines[0] == "| model | Task | Agent | Consistency | Avg | n |"
    assert lines[2].startswith("| base, here | 0.500 [") and lines[2].endswith("| 4 |")
    assert "| *LTX-2 8-step + WMSD, the paper's figure* | 0.605 | 0.691 | 0.882 | 0.726 | 200 |" in lines
    for row in worldtasks.PAPER:  # its averages are near the means of its rates, and not always equal to them
        assert row["average"] == pytest.approx(np.mean([row[q] for q in Measures().questions]), abs=5e-3)


def test_verdicts_come_back_from_a_file_as_they_were():
    plain, rich = verdict(0, 1, 0), verdict(1, 0.5, 0, noise=1, main__physics=-3.0)
    assert plain.to_json().keys() == {"id", "task", "agent", "kind", "scores"}  # as in files of earlier versions
    for v in (plain, rich):
        assert Verdict.from_json(json.loads(json.dumps(v.to_json()))) == v
    missing = Verdict.from_json(plain.to_json() | {"scores": {"instruction": None, "physics": 1}})
    assert math.isnan(missing.scores["instruction"])
