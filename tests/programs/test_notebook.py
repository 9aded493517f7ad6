"""The Python API: the lines of the package's docstring work, and a step is the training loop's own."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from hash_judge import HashJudge
from small import SMALL, random_weights, redraw

import world_distill as wd
from world_distill import build
from world_distill.sandbox.scenes import write_scenes
from world_distill.storage.weight_files import save_weights

TASK, SOLUTION = "[red disc]: Go to the blue ring.", "The red disc moves two steps right, then stops."
OTHER = "[red disc]: Go beside the crate."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = wd.load_config("sandbox", {**SMALL, "host_devices": 2})
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_weights(
        path, random_weights(build.make_family(config), 7), {}
    )  # layers that start at zero would hide the text
    return wd.load(config, base=str(path))


@pytest.fixture(scope="module")
def images(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return write_scenes(str(folder), 2, split="train", seed=0, world=model.config.world.to_dict())


@pytest.fixture(scope="module")
def pairs(model, images):
    both = zip(images, (TASK, OTHER), strict=True)
    return [(model.tell(image, task=task), model.tell(image, solution=SOLUTION)) for image, task in both]


@pytest.fixture(scope="module")
def distiller(model):
    return wd.Trainer(model, wd.Objective(rl="none", beta_d=1.0, updates=2, minibatches=2))


def test_importing_the_package_loads_no_jax_and_every_name_is_there():
    code = "import sys, world_distill as wd; assert 'jax' not in sys.modules; print(*wd.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in done.stdout.split():
        assert getattr(wd, name) is not None and (name.startswith("__") or name in wd.__doc__)
    with pytest.raises(AttributeError, match="has no attribute 'rolout'"):
        wd.rolout  # noqa: B018


def test_clips_depend_on_what_is_told_the_seed_and_the_executor(model, distiller, pairs):
    told, shown = pairs[0]
    clips = wd.rollout(model, told, seed=0).clips
    config = model.config.model
    assert clips.shape == (1, config.frames, config.size, config.size, 3) and clips.dtype == np.uint8
    np.testing.assert_array_equal(wd.rollout(model, told, seed=0).clips, clips)
    np.testing.assert_array_equal(wd.rollout(model, [told, pairs[1][0]], seed=0).clips[:1], clips)
    executor = redraw(distiller.init().lora, 3)
    others = (
        wd.rollout(model, shown, seed=0), wd.rollout(model, told, seed=1), wd.rollout(model, told, executor=executor),
        wd.rollout(model, told, steps=5), wd.rollout(model, told, guidance=3.0, negative="a still picture"),
    )  # fmt: skip
    for other in others:
        assert (other.clips != clips).any()
    with pytest.raises(ValueError, match="all told tasks, or all told solutions"):
        wd.rollout(model, [told, shown])


def test_a_judge_is_asked_about_the_task_and_its_agent(model, pairs):
    asked = []

    class Judge(HashJudge):
        def ask(self, requests):
            asked.extend(r.question for r in requests)
            return super().ask(requests)

    told = pairs[0][0]
    scores = wd.judge(Judge(), wd.rollout(model, told).clips, told).scores
    assert set(scores) == {"task", "agent", "consistency"} and all(np.isfinite(v).all() for v in scores.values())
    assert any(told.text in text for text in asked) and any("red disc" in text for text in asked)
    with pytest.raises(ValueError, match="asked about the task"):
        wd.judge(HashJudge(), wd.rollout(model, told).clips, pairs[0][1])


def test_steps_train_are_repeatable_and_leave_the_base(model, pairs):
    settings = wd.RolloutSettings(group=4, normalise="none", std="group"), HashJudge()
    trainer = wd.Trainer(model, wd.Objective(beta_d=0.1, updates=2, minibatches=2, draws=1), *settings)
    before = jax.device_get(model.base)

    def run(seed):
        state = trainer.init(seed)
        for _ in range(2):
            state, metrics = trainer.step(state, pairs)
        return jax.device_get(state.lora), int(state.step), metrics

    (lora, step, metrics), (again, _, _), (other, _, _) = run(0), run(0), run(1)
    assert step == 2 and metrics["reward/zero_std_ratio"] == 0.0 and metrics["train/rl_gradient_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, lora, again)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(lora), jax.tree.leaves(other), strict=True))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(lora))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(model.base))


def test_each_step_has_noise_of_its_own(distiller, pairs, monkeypatch):
    seen, begin = [], distiller._collector.begin
    monkeypatch.setattr(distiller._collector, "begin", lambda *args: seen.append(begin(*args)) or seen[-1])
    state = distiller.init()
    for _ in range(2):
        state, _ = distiller.step(state, pairs[:1])
    first, second = (np.asarray(pending.batch.states["video"][0]) for pending in seen)  # pure noise
    assert np.abs(first - second).max() > 0.1


def test_distillation_needs_no_judge_and_rl_does(model, distiller, pairs):
    state, metrics = distiller.step(distiller.init(), pairs[:1])
    # At first the Executor equals the base: the gap is between what the base does told the task, and the solution.
    assert metrics["train/anchor"] > 1e-3 and "reward/total" not in metrics
    with pytest.raises(ValueError, match="needs a judge"):
        wd.Trainer(model, wd.Objective(rl="awm"))
    with pytest.raises(ValueError, match="takes \\(task, solution\\) pairs"):
        distiller.step(state, [pairs[0][::-1]])
    small = wd.Trainer(model, wd.Objective(rl="none", beta_d=1.0, minibatches=3), wd.RolloutSettings(group=2))
    with pytest.raises(ValueError, match="2 rows, which do not divide by objective.minibatches = 3"):
        small.step(small.init(), pairs[:1])


def test_what_is_told_is_checked(model, images):
    with pytest.raises(ValueError, match="either a task or a solution"):
        model.tell(images[0], task=TASK, solution=SOLUTION)
    with pytest.raises(ValueError, match="tokens, and config.text_length is"):
        model.tell(images[0], task="go " * 100)
    assert model.tell(images[0], task="Go on.", agent="fox").agent == "fox"
    with pytest.raises(wd.UserError, match="no published layout"):
        wd.save_lora(model, {}, "x.safetensors")
