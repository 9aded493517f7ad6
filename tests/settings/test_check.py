"""Settings that have no effect together, or cannot work together, are refused with the reason."""

import dataclasses

import pytest

from world_distill import build
from world_distill.core import sampling
from world_distill.settings.check import RULES, check, check_noise
from world_distill.settings.loading import load_config, packaged_configs, section
from world_distill.settings.objective import Objective, Phase
from world_distill.settings.rollout import RolloutSettings


def parts(variant="wmsd", **changes) -> tuple[Objective, RolloutSettings]:
    config = load_config(f"sandbox:{variant}")
    objective, settings = section(config.objective, Objective), RolloutSettings(**config.rollout.to_dict())
    mine = {name: value for name, value in changes.items() if name in {f.name for f in dataclasses.fields(Objective)}}
    rest = {name: value for name, value in changes.items() if name not in mine}
    return dataclasses.replace(objective, **mine), dataclasses.replace(settings, **rest)


GUIDED_GRPO = "rollout.guidance above 1 does not go with objective.rl = flow_grpo"
TIMES_OF_NONE = "objective.times has no effect"
SFT = {"kind": "sft", "rl": "none", "beta_d": 0.0}
NOTHING = {"task": 0.0, "agent": 0.0, "consistency": 0.0, "distill": 0.0}
REFUSED = [
    ({"group": 1}, "group = 1"),
    ({"min_valid": 5, "group": 4}, "min_valid is above"),
    ({"weights": NOTHING}, "every rollout.weights is 0"),
    ({"rl_weight": 0.0}, "rl_weight is 0 in every step"),
    ({"rl_weight": 0.0, "rl": "none", "beta_d": 0.0}, "would learn nothing"),
    ({"beta_d": ((0, 0.0), (5, 1.0)), "rl_weight": ((5, 0.0), (6, 1.0))}, "would learn nothing"),
    ({"rl": "none", "beta_old": 1.0}, "beta_old and objective.beta_base"),
    ({"rl": "none", "beta_base": 1.0}, "beta_old and objective.beta_base"),
    ({"grpo_beta": 0.1}, "grpo_beta belongs to Flow-GRPO"),
    ({"awm_old": "current"}, "awm_ratio_temperature has no effect"),
    ({"weights": NOTHING | {"distill": 1.0}, "role": "demonstrator"}, "about the Executor's rollouts"),
    ({"distill_min_time": 0.5}, "distill_min_time bounds Eq. 9"),
    ({"std": "none", "std_floor": 0.1}, "std_floor has no effect"),
    ({"staleness": 1, "awm_old": "current", "awm_ratio_temperature": 1.0}, "staleness = 1 needs"),
    ({"kind": "sft"}, "which nobody judges: set objective.rl = none"),
    (SFT | {"beta_d": 0.1}, "computes no Demonstrator"),
    (SFT | {"role": "demonstrator"}, "rollout.role has no effect"),
    (SFT | {"staleness": 1}, "rollout.staleness has no effect"),
    (SFT | {"times": "by_dt"}, "objective.times and objective.keep_fraction are about the sampler's times"),
    (SFT | {"keep_fraction": 0.5}, "objective.times and objective.keep_fraction are about the sampler's times"),
    (SFT | {"sft_times": "grid", "sft_shift": 2.0}, "takes the sampler's times as they are"),
    ({"sft_power": 1.0}, "belong to objective.kind = sft"),
]


@pytest.mark.parametrize("changes, reason", REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_settings_without_effect_are_refused(changes, reason):
    check(*parts(), stochastic=False)
    with pytest.raises(ValueError, match=reason):
        check(*parts(**changes), stochastic=False)


def test_fine_tuning_takes_its_own_settings():
    for changes in ({}, {"sft_times": "grid", "times": "by_dt", "keep_fraction": 0.9}, {"sft_times": "stretched"}):
        check(*parts(**SFT | changes), stochastic=False)
    with pytest.raises(ValueError, match="demonstrator.guidance has no effect"):
        check(*parts(**SFT), stochastic=False, guidance=2.0)


def test_flow_grpo_wants_noise_and_its_own_rollouts():
    check(*parts("wmsd_grpo"), stochastic=True)
    for objective, stochastic, reason in (
        (parts("wmsd_grpo"), False, "needs stochastic steps"),
        (parts(), True, "sampler.eta above 0"),
        (parts("wmsd_grpo", role="demonstrator"), True, "the Executor's own log-probabilities"),
        (parts("wmsd_grpo", beta_base=1.0), True, "belong to AWM"),
        (parts("wmsd_grpo", guidance=2.0), True, GUIDED_GRPO),
    ):
        with pytest.raises(ValueError, match=reason):
            check(*objective, stochastic=stochastic)


def test_the_stochastic_step_and_the_law_of_times_are_refused_where_nothing_reads_them():
    check(*parts("wmsd_grpo"), stochastic=True, sde="cps")
    with pytest.raises(ValueError, match="sampler.sde = cps has no effect without noise"):
        check(*parts(), stochastic=False, sde="cps")
    check(*parts("wmsd_grpo"), stochastic=True, window=(4, 4))
    with pytest.raises(ValueError, match=r"sampler\.window = \(4, 4\) has no effect without noise"):
        check(*parts(), stochastic=False, window=(4, 4))
    alone = {"beta_d": 0.0, "rl_weight": 1.0}
    for variant, changes in (("wmsd", {}), ("wmsd", alone), ("wmsd_grpo", {}), ("wmsd_nft", alone)):
        check(*parts(variant, times="by_dt", **changes), stochastic=variant == "wmsd_grpo")
    check(*parts("wmsd", times="by_dt", rl="none", beta_d=1.0), stochastic=False)
    with pytest.raises(ValueError, match=TIMES_OF_NONE):
        check(*parts("wmsd_grpo", times="by_dt", **alone), stochastic=True)


DISTILLED = {"steps": 8, "shift": 1.0, "explicit": (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909, 0.725, 0.422)}


def look_at_noise(**changes) -> None:
    config = load_config("sandbox:wmsd_grpo", {f"sampler.{name}": value for name, value in changes.items()})
    grid, table = build.sampler_grid(config)
    stds = sampling.step_stds(grid, table, config.sampler.sde)
    check_noise(grid, stds, eta=config.sampler.eta)


def test_noise_above_the_level_that_it_lands_on_is_refused_by_step():
    with pytest.raises(ValueError) as error:
        look_at_noise(**DISTILLED)
    text = str(error.value)
    for step, std, level in ((4, 1.12, 0.909), (5, 0.949, 0.725), (6, 0.626, 0.422)):
        assert f"\n    step {step}: std {std}, t_next {level}\n" in text
    assert text.count("    step") == 3  # step 3 is .4 onto .975, and step 7, into 0, has no noise
    assert "sampler.eta to 0.47 or less" in text and "sampler.sde = cps" in text and "sampler.window" in text
    look_at_noise(**DISTILLED, eta=0.47)
    with pytest.raises(ValueError, match="step 6: std 0.429, t_next 0.422") as error:
        look_at_noise(**DISTILLED, eta=0.48)
    assert str(error.value).count("    step") == 1
    look_at_noise(**DISTILLED, eta=1.0, sde="cps")


def test_a_window_is_all_that_the_check_of_noise_looks_at():
    look_at_noise(**DISTILLED, window=(0, 4))
    look_at_noise(**DISTILLED, window=(4, 4), eta=0.4)
    with pytest.raises(ValueError, match="step 4: std 1.12, t_next 0.909") as error:
        look_at_noise(**DISTILLED, window=(3, 2))
    assert str(error.value).count("    step") == 1 and "sampler.eta to 0.56 or less" in str(error.value)


def test_every_reason_is_given_at_once_and_every_rule_is_tried():
    with pytest.raises(ValueError) as error:
        check(*parts(group=1, grpo_beta=1.0), stochastic=True)
    assert all(word in str(error.value) for word in ("group = 1", "grpo_beta", "sampler.eta"))
    tried = [reason for _, reason in REFUSED] + ["the Executor's own log-probabilities", GUIDED_GRPO, TIMES_OF_NONE]
    assert not [rule.reason for rule in RULES if not any(reason in rule.reason for reason in tried)]


@pytest.mark.parametrize(
    "changes",
    [
        {"rl": "ppo"}, {"updates": 0}, {"awm_ratio_temperature": 0.0}, {"awm_clip": -0.1}, {"grpo_clip": -1e-3},
        {"beta_d": -0.01}, {"beta_d": ((0, 1.0), (9, -1.0))}, {"rl_weight": -1.0}, {"ema_decay": 1.5},
        {"old_maximum": 1.0}, {"nft_beta": 0.0}, {"nft_old": "current"}, {"keep_fraction": 0.0}, {"awm_power": 0.0},
        {"awm_weighting": "snr"}, {"times": "dt"},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=rf"objective\.{name}"):
        parts(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": -1.0}, {"negative_scale": -0.5}, {"std_floor": -1.0}, {"min_valid": 0}, {"std": "all"},
        {"distill_min_time": 1.0}, {"weights": {"task": -1.0}}, {"role": "teacher"}, {"tasks": 0}, {"group": 0},
        {"normalise": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_rollout_values_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=r"rollout\."):
        parts(**changes)


def test_every_packaged_variant_is_accepted():
    variants = {"sandbox": load_config("sandbox").ablation.variants, "wan22_5b": ("distill", "wmsd", "debug")}
    assert variants.keys() <= packaged_configs().keys()
    for name, those in variants.items():
        for variant in those:
            config = load_config(f"{name}:{variant}")
            check(section(config.objective, Objective), RolloutSettings(**config.rollout.to_dict()),
                  stochastic=config.sampler.eta > 0)  # fmt: skip


def test_phases_follow_the_schedules():
    objective, _ = parts(rl_weight=((10, 0.0), (11, 1.0)), beta_d=((0, 1.0), (20, 1.0), (21, 0.0)))
    assert [objective.phase(step) for step in (0, 10, 11, 20, 21, 99)] == [
        Phase(False, True), Phase(False, True), Phase(True, True), Phase(True, True), Phase(True, False),
        Phase(True, False),
    ]  # fmt: skip
    assert objective.in_phase(Phase(True, True)) == objective
    distilling = dataclasses.replace(objective, beta_old=1.0).in_phase(Phase(False, True))
    assert distilling.rl == "none" and distilling.anchored and not distilling.beta_old
    assert not objective.in_phase(Phase(True, False)).anchored
