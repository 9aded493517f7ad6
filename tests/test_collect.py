"""Collecting experience: which tasks a step has, and what is rolled from them."""

import dataclasses

import numpy as np
import pytest

from world_distill.collection import Collection
from world_distill.config import load_config
from world_distill.data.pipeline import concatenate


def collection(**changes) -> Collection:
    settings = Collection(**load_config("sandbox").rollout.to_dict())
    return dataclasses.replace(settings, tasks=2, group=3, **changes)


def batches():
    for start in range(0, 100, 2):
        yield {"ids": [f"r{start}", f"r{start + 1}"], "scene": np.arange(start, start + 2)[:, None]}


def test_every_rollout_has_a_task_of_its_own_while_there_is_no_rl():
    stream, settings = batches(), collection(spread=True)
    alone = settings.draw(stream, active=False)
    assert alone["ids"] == [f"r{i}" for i in range(6)]
    np.testing.assert_array_equal(alone["scene"][:, 0], np.arange(6))
    assert settings.group_in(False) * len(alone["ids"]) == 6
    grouped = settings.draw(stream, active=True)  # goes on where that stopped: no task is passed over
    assert grouped["ids"] == ["r6", "r7"]
    assert settings.group_in(True) * len(grouped["ids"]) == 6


@pytest.mark.parametrize("active", [True, False])
def test_groups_stay_together_where_that_is_asked_for(active):
    settings = collection(spread=False)
    assert settings.draw(batches(), active)["ids"] == ["r0", "r1"] and settings.group_in(active) == 3


def test_batches_are_joined_in_order():
    first, second = {"ids": ["a"], "x": np.ones((1, 2))}, {"ids": ["b", "c"], "x": np.zeros((2, 2))}
    joined = concatenate([first, second])
    assert joined["ids"] == ["a", "b", "c"]
    np.testing.assert_array_equal(joined["x"], [[1, 1], [0, 0], [0, 0]])


@pytest.mark.parametrize("change", [{"role": "teacher"}, {"tasks": 0}, {"group": 0}], ids=str)
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=r"rollout\."):
        dataclasses.replace(collection(), **change)
