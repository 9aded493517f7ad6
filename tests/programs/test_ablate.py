"""Equal compute, paired comparisons, resuming."""

import json

import jax
import numpy as np
import pytest
from small import VARIANTS, make_inputs, small_config

from world_distill.cli.command import main
from world_distill.core.measures import QUESTIONS
from world_distill.errors import UserError
from world_distill.evaluation.scoring import Verdict
from world_distill.programs import ablate, equal_compute, train
from world_distill.programs.ablate import Ordering
from world_distill.settings.loading import load_config, section
from world_distill.settings.objective import Objective
from world_distill.settings.rollout import RolloutSettings
from world_distill.storage.metric_log import read_log
from world_distill.training import run_folder
from world_distill.training.forwards import per_step


def cost(config, step: int) -> float:
    objective, settings = section(config.objective, Objective), RolloutSettings(**config.rollout.to_dict())
    return per_step(objective, settings, config.sampler.steps, objective.phase(step), config.demonstrator.guidance)


def test_every_variant_gets_the_reference_compute():
    reference = load_config("sandbox")
    budget = sum(cost(reference, s) for s in range(reference.steps))
    for name in reference.ablation.variants:
        config = load_config(f"sandbox:{name}")
        steps = equal_compute.equal_steps(config, reference)
        spent = sum(cost(config, s) for s in range(steps))
        assert spent == pytest.approx(budget, abs=cost(config, steps)), name


def test_no_variant_spends_its_compute_before_rl_begins():
    """A dearer Demonstrator leaves fewer steps, and those at the end are RL's."""
    reference = load_config("sandbox")
    for name in ("wmsd", "wmsd_guided", "wmsd_grpo", "judge_free", "beta_0"):
        config = load_config(f"sandbox:{name}")
        objective = section(config.objective, Objective)
        with_rl = sum(objective.rl_active(step) for step in range(equal_compute.equal_steps(config, reference)))
        assert with_rl >= 10, name


def verdicts(rng, rate, count=200):
    return [
        Verdict(str(i), "", "", "", {q: float(rng.random() < rate) for q in ("task", "agent", "consistency")})
        for i in range(count)
    ]


def test_orderings_hold_are_reversed_or_not_resolved():
    rng = np.random.default_rng(0)
    pool = {"high": [verdicts(rng, 0.9)], "low": [verdicts(rng, 0.5)], "same": [verdicts(rng, 0.5)]}
    outcome = lambda a, b: ablate.compare(Ordering(a, b, "task", "claim"), pool)["outcome"]  # noqa: E731
    assert outcome("high", "low") == "holds"
    assert outcome("low", "high") == "reversed"
    assert outcome("low", "same") == "not resolved"
    line = ablate.compare(Ordering("high", "low", "all", "claim"), pool)
    exact = np.mean([all(v.scores.values()) for v in pool["high"][0]]) - np.mean(
        [all(v.scores.values()) for v in pool["low"][0]]
    )
    assert line["difference"] == pytest.approx(exact)
    assert line["ci95"][0] < exact < line["ci95"][1]
    both = {name: seeds * 2 for name, seeds in pool.items()}
    line = ablate.compare(Ordering("high", "low", "all", "claim"), both)
    assert line["by_seed"] == pytest.approx([exact, exact]) and line["n"] == 400
    assert ablate.sentence(line).endswith(f"; by seed {100 * exact:+.1f}, {100 * exact:+.1f})")


def test_ablation_runs_and_continues(tmp_path, monkeypatch):
    make_inputs(tmp_path)

    def variant_config(variant, seed):
        others = VARIANTS["distill"] | {"annotator.options.kinds": ("beside",)}
        changes = {"awm": {}, "others": others, "again": others | {"objective.beta_d": ((0, 0.5),)}}
        return small_config(tmp_path, seed=seed, steps=2, **changes[variant])

    orderings = [Ordering("awm", "demonstrator", "task", "a claim")]
    run = lambda: ablate.ablate(  # noqa: E731
        variant_config, ["awm", "others", "again"], [0, 1], tmp_path / "ablation", "awm", orderings
    )
    result = run()
    rows = {row["name"]: row["n"] for row in result["rows"]}
    names = ["base", "demonstrator", "awm", "base:others", "demonstrator:others", "others", "again"]
    assert rows == dict.fromkeys(names, 8)
    scores = json.loads((tmp_path / "ablation/runs/others/0/results.json").read_text())
    assert {verdict["kind"] for verdict in scores["verdicts"]["executor"]} == {"beside"}
    # Variants with the same records and the same Demonstrator are compared with one.
    assert sorted(folder.name for folder in (tmp_path / "ablation/data").iterdir()) == [
        "0",
        "0-others",
        "1",
        "1-others",
    ]
    assert result["steps"]["others"] > result["steps"]["awm"] == 2
    assert [name for _, name in result["sweep"]] == ["awm"]
    assert json.loads((tmp_path / "ablation" / "ablation.json").read_text())["rows"] == result["rows"]
    assert "a claim" in (tmp_path / "ablation" / "ablation.html").read_text()
    monkeypatch.setattr(ablate.train, "train", None)  # nothing is trained twice
    assert run()["rows"] == result["rows"]

    def other_config(variant, seed):
        config = variant_config(variant, seed)
        with config.unlocked():
            config.rollout.group = 4
        return config

    with pytest.raises(UserError, match=r"rollout\.group"):  # results of other settings are not taken for these
        ablate.ablate(other_config, ["awm"], [0], tmp_path / "ablation", "awm", orderings)


def test_variants_of_another_demonstrator_share_their_beginning(tmp_path, monkeypatch):
    """Two variants whose Demonstrator is guided branch off one run of theirs, and not off the reference's."""
    make_inputs(tmp_path)
    guided = {
        "demonstrator.guidance": 2.0,
        "objective.rl_weight": ((1, 0.0), (2, 1.0)),
        "objective.beta_d": ((0, 1.0),),
    }
    late = {"objective.beta_d": ((1, 1.0), (2, 0.1))}
    stems = []

    def score(config, folder, roles, beginning):
        stems.append((folder.parent.name, beginning and (beginning[0].demonstrator.guidance, *beginning[1:])))
        verdict = {"id": "", "kind": "", "agent": "", "task": "", "scores": dict.fromkeys(QUESTIONS, 1.0)}
        return {"verdicts": {role: [verdict] for role in roles}}

    monkeypatch.setattr(ablate, "_score", score)
    monkeypatch.setattr(ablate, "_curve", lambda *_: [])
    changes = {"awm": {}, "guided": guided, "guided_late": guided | late}
    ablate.ablate(
        lambda variant, seed: small_config(tmp_path, seed=seed, steps=3, **changes[variant]),
        list(changes), [0], tmp_path / "ablation", "awm", [],
    )  # fmt: skip
    stem = tmp_path / "ablation/stems/0-guided"
    assert stems == [("awm", None), ("guided", (2.0, stem, 2)), ("guided_late", (2.0, stem, 2))]


@pytest.mark.parametrize("flags, kinds", [([], 4), (["--config", "sandbox"], 2)], ids=["default", "simple"])
def test_every_variant_has_the_kinds_of_task_of_the_config(monkeypatch, flags, kinds):
    asked = []

    def fake(variant_config, variants, seeds, *rest):
        asked.extend(variant_config(v, s) for v in variants for s in seeds)
        return {"rows": [], "steps": {}, "orderings": []}

    monkeypatch.setattr(ablate, "ablate", fake)
    assert main(["ablate", "--seeds", "3,5", "--variants", "wmsd,on_policy_guided", *flags]) == 0
    assert [len(config.annotator.options.kinds) for config in asked] == [kinds] * 4
    assert [config.objective.rl for config in asked] == ["awm"] * 2 + ["none"] * 2
    assert [config.seed for config in asked] == [3, 5] * 2


def test_variants_are_not_named_in_the_config(capsys):
    assert main(["ablate", "--config", "sandbox:wmsd,kinds=full"]) == 2
    assert "--variants wmsd" in capsys.readouterr().err


def test_branches_are_the_runs_that_they_stand_for(tmp_path):
    """A run that goes on from a shared beginning ends with the same bits as one that makes all its steps itself."""
    make_inputs(tmp_path)
    late = {"objective.rl_weight": ((1, 0.0), (2, 1.0)), "steps": 3}
    first = small_config(tmp_path, **late)
    branch = small_config(tmp_path, **late, **{"objective.beta_d": ((1, 1.0), (2, 0.1))})
    other = small_config(
        tmp_path, **late, **{"objective.rl": "flow_grpo", "sampler.eta": 0.7, "objective.beta_d": ((0, 1.0),)}
    )
    with first.unlocked():
        first.objective.beta_d = ((0, 1.0),)
    assert [ablate.shared_steps(config, first) for config in (first, branch, other)] == [2, 2, 2]
    train.train(branch, tmp_path / "whole")
    with first.unlocked():
        first.steps = 2
    train.train(first, tmp_path / "stem")
    train.train(branch, tmp_path / "branch", stem=tmp_path / "stem")
    whole, branched = (jax.tree.leaves(run_folder.open_run(tmp_path / name).executor) for name in ("whole", "branch"))
    for a, b in zip(whole, branched, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    logs = [read_log(tmp_path / name / "metrics.jsonl") for name in ("whole", "branch")]
    assert [line["train/anchor"] for line in logs[0]] == [line["train/anchor"] for line in logs[1]]
    with pytest.raises(UserError, match="holds no checkpoint to branch off"):
        train.train(branch, tmp_path / "other", stem=tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [{"objective.rl_weight": ((0, 1.0),)}, {"sampler.steps": 4}, {"seed": 1}, {"objective.beta_d": ((0, 0.5),)},
     {"optimizer.learning_rate": ((0, 1e-3),)}, {"rollout.role": "demonstrator"}, {"objective.times": "by_dt"}],
    ids=str,
)  # fmt: skip
def test_runs_that_begin_differently_share_nothing(tmp_path, change):
    late = {"objective.rl_weight": ((1, 0.0), (2, 1.0)), "objective.beta_d": ((0, 1.0),)}
    assert ablate.shared_steps(small_config(tmp_path, **late | change), small_config(tmp_path, **late)) == 0


def test_runs_that_differ_in_the_stochastic_step_begin_alike(tmp_path):
    """While L_RL has no weight, rollouts follow the ODE."""
    late = {"objective.rl_weight": ((1, 0.0), (2, 1.0)), "objective.rl": "flow_grpo", "sampler.eta": 0.7}
    cps = small_config(tmp_path, **late, **{"sampler.sde": "cps", "sampler.window": (0, 1)})
    assert ablate.shared_steps(cps, small_config(tmp_path, **late)) == 2


def test_benchmark_measures_every_part_beside_its_prediction(tmp_path, monkeypatch):
    from world_distill.devices import chips
    from world_distill.programs import benchmark

    monkeypatch.setattr(chips, "chip", lambda kind: chips.Chip("cpu", tflops=1e-3, hbm_gib=1.0, bandwidth=1.0))

    make_inputs(tmp_path)
    config = small_config(tmp_path, **{"pretrain.optimizer": "adam"})  # Muon takes longer to compile
    result = benchmark.measure(config, tmp_path / "bench", repeats=2)
    assert set(result["parts"]) == {"rollout", "decode", "judge", "update"}  # updates compute the Demonstrator
    assert all(part["samples_per_second"] > 0 for part in result["parts"].values())
    assert result["step_seconds"] > 0
    assert result["pretraining"]["samples_per_second"] > 0
    assert set(result["predicted"]) == {"rollout", "decode", "update"}
    assert all(result["predicted"][name][0] > 0 for name in ("rollout", "update"))  # to decode takes no product here
    low, high = result["predicted_step"]
    assert low == high == pytest.approx(sum(low for low, _ in result["predicted"].values()))
