"""The warning that one of the two losses cannot matter."""

import pytest

from world_distill.training.balance import STEPS, Balance


def warnings(caplog, ratios, **changes):
    balance = Balance()
    for step, ratio in enumerate(ratios):
        balance.watch(step, {"train/anchor_to_rl": ratio, "train/beta_d": 0.01, "train/rl_weight": 1.0} | changes)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("ratio, named", [(0.0005, "objective.beta_d = 0.01"), (500.0, "objective.rl_weight = 1")])
def test_a_loss_that_cannot_matter_is_named_once(caplog, ratio, named):
    found = warnings(caplog, [ratio] * 3 * STEPS)
    assert len(found) == 1 and named in found[0]


@pytest.mark.parametrize(
    "ratios, changes",
    [
        ([0.1] * 20, {}),
        ([0.0005] * (STEPS - 1) + [0.1] + [0.0005] * (STEPS - 1), {}),  # never often enough in a row
        ([0.0] * 20, {"train/beta_d": 0.0}),  # as asked
        ([1e30] * 20, {"train/rl_weight": 0.0}),
    ],
)
def test_nothing_is_said_where_nothing_is_wrong(caplog, ratios, changes):
    assert not warnings(caplog, ratios, **changes)


def test_steps_without_both_gradients_are_passed_over():
    Balance().watch(1, {"train/beta_d": 1.0})
