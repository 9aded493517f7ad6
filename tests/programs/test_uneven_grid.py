"""A distilled sampler's uneven grid, from the config to the log: CPS in a window, times by dt, losses by step."""

import json

import pytest
from small import check_advantages, make_inputs, small_config

from world_distill import build
from world_distill.programs import train
from world_distill.training.step_programs import make_programs

# LTX-2's eight steps; only the last four lower the noise by much.
GRID = {
    "sampler.steps": 8, "sampler.shift": 1.0, "sampler.window": (4, 4),
    "sampler.explicit": (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909, 0.725, 0.422),
}  # fmt: skip
CPS = GRID | {"objective.rl": "flow_grpo", "sampler.sde": "cps", "sampler.eta": 0.8}


@pytest.mark.once
def test_training_with_cps_and_times_by_dt(tmp_path):
    make_inputs(tmp_path)
    one_update = {"objective.updates": 1, "objective.minibatches": 1, "objective.draws": 4}
    config = small_config(
        tmp_path, **CPS, **one_update, **{"objective.times": "by_dt", "objective.log_by_step": True}, steps=2
    )
    train.train(config, tmp_path / "run")
    check_advantages(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        # The update's log-probabilities are those of the rollout, computed again.
        assert abs(line["train/ratio"] - 1) < 1e-6 and abs(line["train/ratio_max"] - 1) < 1e-6
        assert line["train/rl_gradient_norm"] > 1e-5 and line["train/anchor_gradient_norm"] > 1e-5
        ratios = [line[f"train/ratio/step_{i}"] for i in range(8)]
        assert [ratio is not None for ratio in ratios] == [4 <= i <= 6 for i in range(8)]
        # Of 32 strata the first four steps share less than one.
        anchors = [line[f"train/anchor/step_{i}"] for i in range(8)]
        assert None not in anchors[4:] and anchors[:4].count(None) >= 3


def test_a_grid_whose_noise_is_above_its_levels_is_refused_before_anything_is_compiled(tmp_path):
    flow_grpo = CPS | {"sampler.sde": "flow_grpo", "sampler.eta": 0.7}
    with pytest.raises(ValueError, match="step 4: std 1.12, t_next 0.909"):
        programs_of(tmp_path, **flow_grpo)
    programs_of(tmp_path, **flow_grpo | {"sampler.eta": 0.4})
    programs_of(tmp_path, **flow_grpo | {"sampler.window": (0, 3)})
    programs_of(tmp_path, **CPS)
    with pytest.raises(ValueError, match="sampler.sde = cps has no effect without noise"):
        programs_of(tmp_path, **GRID, **{"sampler.sde": "cps"})
    with pytest.raises(ValueError, match="CPS takes eta from 0 to 1"):
        programs_of(tmp_path, **CPS | {"sampler.eta": 1.2})


def programs_of(folder, **overrides):
    config = small_config(folder, **overrides)
    return make_programs(config, build.start_devices(config))
