"""Rollouts that run a step ahead of the updates, judged over HTTP meanwhile."""

import json
import threading

import jax
import numpy as np
import pytest
from small import VARIANTS, check_advantages, make_inputs, small_config

from tests.vlm.fake_server import FakeServer
from world_distill.programs import train
from world_distill.training.collect import Collector
from world_distill.training.prefetch import Experience

AHEAD = {**VARIANTS["awm"], "rollout.staleness": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def served(inputs, server, **overrides):
    """A run's config whose judge is the server."""
    config = small_config(inputs, **AHEAD, **overrides)
    with config.unlocked():
        config.judge.factory = "world_distill.judges:ServerJudge"
        config.judge.options = {"servers": (server.url,), "model": "judge", "backoff": 0.01, "timeout": 10.0}
    return config


def run(config, folder):
    """Every array of the newest checkpoint, and the lines of the log."""
    seen = []
    take = Experience.take

    def remembering(self, state, step):
        seen.append((step, jax.device_get(state.lora), jax.device_get(state.lora_rolled)))
        return take(self, state, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experience, "take", remembering)
        train.train(config, folder)
    check_advantages(config, folder)
    return seen, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_reads_the_clips_of_the_executor_of_a_step_ago(inputs, tmp_path):
    rolled, finishing = [], []
    begin, judge = Collector.begin, Collector.judge

    def rolling(self, lora, base, tasks, key, step):
        rolled.append((step, jax.device_get(lora)))
        return begin(self, lora, base, tasks, key, step)

    def judging(self, pending):
        finishing.append((pending.step, threading.current_thread() is threading.main_thread()))
        return judge(self, pending)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "begin", rolling)
        patch.setattr(Collector, "judge", judging)
        seen, lines = run(small_config(inputs, **AHEAD), tmp_path)
    assert [step for step, _ in rolled] == [0, 1, 2, 3]
    assert finishing == [(step, False) for step in range(4)]
    for (_, lora), (*_, then), (_, before, _) in zip(rolled, seen, [seen[0], *seen], strict=False):
        jax.tree.map(np.testing.assert_array_equal, lora, then)
        jax.tree.map(np.testing.assert_array_equal, lora, before)
    # The first step is on-policy; later ones begin a step away from the policy that rolled, and the ratio shows it.
    assert all(line["time/judge_wait"] >= 0 for line in lines)
    changed = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, seen[2][1:]), strict=True)]
    assert max(changed) > 1e-4


def test_faults_of_the_judge_do_not_change_the_weights(inputs, tmp_path):
    """One request in five fails in some way, and the run ends as the one without faults, bit for bit."""
    kinds = (500, "busy", "reset", "truncated", "cut")
    with FakeServer() as server:
        good, lines = run(served(inputs, server), tmp_path / "good")
        asked = server.chats
    with FakeServer(fault=lambda n, body: kinds[n // 5 % len(kinds)] if n > 5 and n % 5 == 0 else None) as server:
        faulty, noisy = run(served(inputs, server), tmp_path / "faulty")
        assert server.chats >= asked * 1.2
    for one, other in zip(good, faulty, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert sum(line["judge/retries"] for line in noisy) >= asked // 5 > 10
    assert all(line["judge/invalid"] == 0 for line in noisy)
    assert [line["reward/total"] for line in lines] == [line["reward/total"] for line in noisy]


def test_the_plain_gradient_cannot_correct_for_an_older_policy(inputs, tmp_path):
    config = small_config(inputs, **AHEAD | {"objective.awm_old": "current"})
    with pytest.raises(ValueError, match=r"set objective\.awm_old"):
        train.train(config, tmp_path)
