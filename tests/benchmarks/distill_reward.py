"""What Eq. 9's reward pays for, state by state: a run's Executor rolls, the judge answers, both are compared in groups.

    python tests/benchmarks/distill_reward.py WORKDIR [--tasks 64] [--group 8] [--seed 1] [--json FILE]

WORKDIR is the folder of a run, as `train` and `quickstart` leave it. Its newest Executor rolls every task of `--tasks`
in `--group` ways. Two tables follow. The first has a row for each state of the sampler: the share of the reward's
variance inside groups that comes from this state, and the correlation inside groups of minus the velocity gap there
with each answer of the judge (log-odds, clipped as in training), with their weighted sum, and with how much the clip
moves. The second has the same correlations for the whole reward, integrated from a lower bound to 1
(`rollout.distill_min_time`).
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from world_distill import build
from world_distill.core.losses import distillation_reward, velocity_gap
from world_distill.core.metrics import within_group_correlations
from world_distill.core.sampling import counted
from world_distill.data.records.batches import task_batches
from world_distill.data.records.negative import load_negative
from world_distill.data.records.reader import RecordReader
from world_distill.devices import hosts
from world_distill.devices.sharding import rows_or_whole
from world_distill.evaluation.scoring import QUESTIONS
from world_distill.judges.ask import judge_clips
from world_distill.judges.rubric import load_rubric
from world_distill.settings.objective import Phase
from world_distill.settings.rollout import DISTILL
from world_distill.training import run_folder
from world_distill.training.step_losses import in_shape
from world_distill.training.step_programs import make_programs
from world_distill.weights import base_model

BATCH = 16  # tasks at once
WEIGHTS = {"task": 1.0, "agent": 1.0, "consistency": 2.0}  # of the sum; those of `sandbox:wmsd`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--tasks", type=int, default=64, help=f"a multiple of {BATCH}")
    parser.add_argument("--group", type=int, default=8, help="rollouts of each task")
    parser.add_argument("--seed", type=int, default=1, help="of tasks and noise; that of training has seen these tasks")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if args.tasks < BATCH or args.tasks % BATCH or args.group < 2:
        parser.error(f"--tasks is a multiple of {BATCH} and --group at least 2, not {args.tasks} and {args.group}")
    gaps, rewards, values, grid = measure(args.workdir, args.tasks, args.group, args.seed)
    groups = np.repeat(np.arange(args.tasks), args.group)
    states = [
        (f"t = {t:.2f}", -gap, share) for t, gap, share in zip(grid[:-1], gaps, shares(gaps, grid, groups), strict=True)
    ]
    bounds = [(f"from {bound:.2f}", reward, 1.0) for bound, reward in rewards.items()]
    lines = [
        {"reward": name, "share": share, **correlations(reward, values, groups)}
        for name, reward, share in (*states, *bounds)
    ]
    for line in lines:
        figures = "  ".join(f"{key} {value:+.2f}" for key, value in line.items() if key not in ("reward", "share"))
        sys.stdout.write(f"{line['reward']:10}  variance {line['share']:4.0%}  {figures}\n")
    rates = {name: float((values[name] > 0).mean()) for name in QUESTIONS}
    sys.stdout.write("judged true: " + ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items()) + "\n")
    if args.json:
        args.json.write_text(json.dumps({"lines": lines, "rates": rates}, indent=1))


def measure(workdir: pathlib.Path, tasks: int, group: int, seed: int):
    """(gap at each state [k b], {bound: Eq. 9 from there [b]}, {answer, sum, motion: [b]}, sampling times [k + 1])."""
    config = run_folder.read_config(workdir)
    mesh = build.start_devices(config)
    executor, _ = run_folder.load_executor(config, mesh, workdir)
    with config.unlocked():
        config.rollout.update(tasks=BATCH, group=group, spread=False, role="executor", micro_batch=0)
        config.rollout.weights = ConfigDict(WEIGHTS | {DISTILL: 1.0})  # so that states and velocities are kept
        config.objective.rl = "awm"
        config.objective.rl_weight = config.objective.beta_d = ((0, 1.0),)
    programs = make_programs(config, mesh)
    family, (grid, _) = programs.family, build.sampler_grid(config)
    base = base_model.load_base(family, config, mesh)
    reader = RecordReader(run_folder.data_folder(config, workdir), config.train_set)
    lengths = build.text_lengths(family, config)
    negative = load_negative(reader, programs.guidance, lengths, mesh)
    batches = task_batches(reader, tasks_per_step=BATCH, seed=seed, lengths=lengths)
    judge, rubric = build.make(config, "judge"), load_rubric(config.judge.rubric or None)
    bounds = sorted([0.0, *(float(np.mean(pair)) for pair in zip(grid[:-2], grid[1:-1], strict=True))])

    @jax.jit
    def compare(rollout, shown):
        v_e, v_d = (in_shape(v, family.latents) for v in (rollout.velocities, shown))
        counts = counted(family.latents)
        gaps = jax.vmap(lambda e, d: velocity_gap(e, d, counts))(v_e, v_d)
        return gaps, jnp.stack([distillation_reward(v_e, v_d, grid, counts, b) for b in bounds])

    found = []
    for step in range(tasks // BATCH):
        batch = batches.take()
        rows = rows_or_whole(mesh, BATCH * group)
        told = batch.condition("task"), batch.condition("solution")
        task, solution = jax.device_put(jax.tree.map(lambda x: np.repeat(x, group, axis=0), told), rows)
        key = jax.random.fold_in(jax.random.key(seed), step)
        given = task, solution, key, jnp.zeros((), jnp.int32), negative
        rollout = programs.roll[Phase(True, True).rl](executor, base, *given)
        shown, _ = programs.demonstrate(base, rollout, solution, negative)
        numbers, clips = hosts.own_rows(programs.decode(base, rollout.latents), axes=2)
        clips = clips[np.argsort(numbers)]
        texts = ([x for x in values for _ in range(group)] for values in (batch.task, batch.agent))
        scores = judge_clips(judge, None, clips, *texts, rubric, QUESTIONS).scores
        scores = {name: np.clip(scores[name], -config.rollout.clip, config.rollout.clip) for name in QUESTIONS}
        found.append((*map(np.asarray, compare(rollout, shown)), scores, np.asarray(programs.motion(rollout.latents))))
    gaps, rewards, scores, motion = zip(*found, strict=True)
    values = {name: np.concatenate([part[name] for part in scores]) for name in QUESTIONS}
    values["sum"] = sum(WEIGHTS[name] * values[name] for name in QUESTIONS)
    values["motion"] = np.concatenate(motion)
    by_bound = dict(zip(bounds, np.concatenate(rewards, axis=1), strict=True))
    return np.concatenate(gaps, axis=1), by_bound, values, grid


def shares(gaps: np.ndarray, grid: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Share of Eq. 9's variance inside groups that each state brings [k]: its covariance with the whole."""
    parts = gaps * (grid[:-1] - grid[1:])[:, None]
    size = np.bincount(groups)
    inside = np.stack([part - (np.bincount(groups, part) / size)[groups] for part in parts])
    whole = inside.sum(axis=0)
    return inside @ whole / (whole @ whole)


def correlations(reward: np.ndarray, values: dict[str, np.ndarray], groups: np.ndarray) -> dict[str, float]:
    """Correlation of a reward with each value inside groups."""
    valid = np.ones(len(groups), bool)
    pairs = {name: within_group_correlations({"reward": reward, name: v}, groups, valid) for name, v in values.items()}
    return {name: found["reward", name] for name, found in pairs.items()}


if __name__ == "__main__":
    main()
