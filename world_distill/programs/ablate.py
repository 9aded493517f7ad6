"""`world-distill ablate`: the paper's variants side by side, at equal compute, over several seeds.

Every run is an ordinary run of `train` in its own folder, WORKDIR/runs/VARIANT/SEED, so an interrupted ablation goes on
where it stopped and any run can be looked at by itself. Runs with the same seed share scenes, tasks, test set and the
starting noise of their test clips, so comparisons between variants are paired, clip by clip. A variant with records of
its own (other kinds of task), or with a Demonstrator of its own (other guidance), is compared with the base and the
Demonstrator on those: rows `base:VARIANT` and `demonstrator:VARIANT`.

Compute is counted in forward passes of the model a rollout (a backward pass counts as two, and so does a guided
velocity); every variant gets as many steps as the reference variant's forwards pay for, and the last point of its
learning-rate schedule is moved to its own last step. Judging and decoding are not counted. Steps that several variants
have in common (distillation before RL) are trained once and counted for each.
"""

import copy
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from world_distill import console
from world_distill.core.measures import AVERAGE, Measures
from world_distill.core.metrics import score_difference
from world_distill.core.schedules import piecewise_linear
from world_distill.errors import UserError
from world_distill.evaluation.scoring import Verdict, markdown, scores_of, summarise
from world_distill.programs import equal_compute, prepare, train
from world_distill.programs.evaluate import evaluate_roles
from world_distill.reports import ablation
from world_distill.settings.loading import diff, section
from world_distill.settings.objective import Objective
from world_distill.storage import atomic
from world_distill.storage.metric_log import read_log
from world_distill.training import run_folder


@dataclasses.dataclass(frozen=True)
class Ordering:
    """A claim: `better` is above `worse` on `metric`. Names of variants or of roles."""

    better: str
    worse: str
    metric: str
    claim: str


# What records are made of, and the Demonstrator: keys that start like this.
RECORDS = re.compile(r"(seed|world|scenes|annotator|model|base|text_length|demonstrator)\b")
# What has no effect on a training step in which L_RL has no weight.
LATE = re.compile(
    r"objective\.(rl|rl_weight|beta_d|beta_old|beta_base|awm_.*|nft_.*|grpo_.*|skip_first|keep_fraction)|judge\..*"
    r"|rollout\.(weights\..*|distill_min_time|clip|normalise|std|std_floor|min_valid|negative_scale)|sampler\.(eta|sde|window)"
    r"|optimizer\.learning_rate|" + "|".join(rf"{key}(\..*)?" for key in run_folder.FREE_KEYS)
)


def shared_steps(config, reference) -> int:
    """First steps that are the same in both runs: before L_RL has a weight in either, with everything else equal."""
    if any(not LATE.fullmatch(line.split(":")[0]) for line in diff(config, reference)):
        return 0
    both = (config, reference)
    objectives = [section(c.objective, Objective) for c in both]
    beta_d = [piecewise_linear(c.objective.beta_d) for c in both]
    rate = [piecewise_linear(c.optimizer.learning_rate) for c in both]
    for step in range(min(c.steps for c in both)):
        same = all(float(a(step)) == float(b(step)) for a, b in (beta_d, rate))
        if not same or any(o.rl_active(step) for o in objectives):
            return step
    return min(c.steps for c in both)


def _leaders(configs: Mapping[str, Any], reference: str, first) -> dict[str, str]:
    """Variant -> the first one that has the same records and the same Demonstrator; the reference's is the reference.

    `first` is the reference's config.
    """
    leaders, seen = {reference: reference}, {}
    for variant, config in configs.items():
        own = tuple(line for line in diff(config, first) if RECORDS.match(line))
        leaders[variant] = seen.setdefault(own, variant) if own else reference
    return leaders


def _only_anchor(config, reference) -> bool:
    """Whether two configs differ in nothing but the anchor's weight."""
    return all(line.startswith("objective.beta_d:") for line in diff(config, reference))


def _last_weight(config) -> float:
    """The anchor's weight at the end of the run."""
    return float(piecewise_linear(config.objective.beta_d)(config.steps))


def _curve(folders: Sequence[pathlib.Path], measure: str = AVERAGE) -> list[tuple[int, float]]:
    """(step, measure on validation tasks), mean over runs of one variant, at the steps that all of them have."""
    key = f"validation/{measure}"
    logs = [read_log(folder / "metrics.jsonl") for folder in folders]
    scores = [{line["step"]: line[key] for line in log if line.get(key) is not None} for log in logs]
    steps = sorted(set.intersection(*map(set, scores)))
    return [(step, float(np.mean([by_step[step] for by_step in scores]))) for step in steps]


def ablate(
    variant_config,
    variants: Sequence[str],
    seeds: Sequence[int],
    workdir: pathlib.Path,
    reference: str,
    orderings: Sequence[Ordering],
) -> dict[str, Any]:
    """Trains and scores every (variant, seed) that is not done yet, and compares them.

    Args:
      variant_config: (variant, seed) -> config.
      variants: names.
      seeds: of the runs.
      workdir: folder of the ablation.
      reference: the variant whose compute every other gets.
      orderings: what to compare.

    Returns:
      rows (pooled over seeds), by_seed, orderings, steps of each variant, `sweep` (what differs in the anchor's weight
      alone: weight and variant) and `curves` (step and average on validation tasks, mean of the seeds); also written to
      ablation.json, with ablation.md and ablation.html.
    """
    verdicts: dict[str, list[list[Verdict]]] = {"base": [], "demonstrator": []}
    measures: Measures | None = None
    steps: dict[str, int] = {}
    sweep: list[tuple[float, str]] = []
    total, done = len(seeds) * len(variants), 0
    for seed in seeds:
        first = variant_config(reference, seed)
        configs = {variant: variant_config(variant, seed) for variant in variants}
        if not sweep:
            sweep = sorted((_last_weight(config), v) for v, config in configs.items() if _only_anchor(config, first))
        leaders = _leaders(configs, reference, first)
        data = {v: workdir / "data" / (str(seed) if of == reference else f"{seed}-{of}") for v, of in leaders.items()}
        for variant, config in (*configs.items(), (reference, first)):
            prepare.make_records(config, data[variant])
            with config.unlocked():
                config.data = str(data[variant])
        # Runs that begin alike share their beginning: training is deterministic, so nothing but time changes.
        beginnings = {of: copy.deepcopy(first if of == reference else configs[of]) for of in set(leaders.values())}
        common = {of: shared_steps(config, config) for of, config in beginnings.items()}
        branches = {
            of: [v for v, c in configs.items() if leaders[v] == of and 0 < common[of] <= shared_steps(c, config)]
            for of, config in beginnings.items()
        }
        for variant, config in configs.items():
            with config.unlocked():
                config.steps = equal_compute.equal_steps(config, first)
                config.optimizer.learning_rate = equal_compute.until(config.optimizer.learning_rate, config.steps)
            steps[variant] = config.steps
            done += 1
            console.say(f"run {done}/{total}: {variant}, seed {seed}, {config.steps} steps")
            folder, of = workdir / "runs" / variant / str(seed), leaders[variant]
            everyone = variant == next(v for v in configs if leaders[v] == of)
            roles = ("base", "demonstrator", "executor") if everyone else ("executor",)
            stem = workdir / "stems" / (str(seed) if of == reference else f"{seed}-{of}")
            shares = variant in branches[of] and (len(branches[of]) > 1 or stem.exists())
            scores = _score(config, folder, roles, (beginnings[of], stem, common[of]) if shares else None)
            of_run = Measures.of(scores)
            if measures not in (None, of_run):
                raise UserError(f"{folder} was scored on {', '.join(of_run.names)}, and others on other measures")
            measures = of_run
            for role in roles:
                name = variant if role == "executor" else role if of == reference else f"{role}:{of}"
                verdicts.setdefault(name, []).append([Verdict.from_json(v) for v in scores["verdicts"][role]])
    names = [name for name, by_seed in verdicts.items() if by_seed]
    measures = measures or Measures()
    course = AVERAGE if AVERAGE in measures.names else measures.headline
    result = {
        "seeds": list(seeds),
        "reference": reference,
        "steps": steps,
        "rows": [summarise(n, [v for seed in verdicts[n] for v in seed], measures) for n in names],
        "by_seed": [
            summarise(n, part, measures) | {"seed": seed}
            for n in names
            for seed, part in zip(seeds, verdicts[n], strict=True)
        ],
        "sweep": sweep,
        "curves": {v: _curve([workdir / "runs" / v / str(seed) for seed in seeds], course) for v in variants},
        "orderings": [
            compare(o, verdicts, measures) for o in orderings if o.better in verdicts and o.worse in verdicts
        ],
    }
    if measures != Measures():
        result["benchmark"] = {"questions": list(measures.questions)}
    atomic.write_json(workdir / "ablation.json", result)
    lines = "\n".join(f"- {sentence(line)}" for line in result["orderings"])
    atomic.write_text(workdir / "ablation.md", f"{table(result)}\n\n{lines}\n")
    atomic.write_text(workdir / "ablation.html", ablation.document(result))
    return result


def _score(config, folder: pathlib.Path, roles: Sequence[str], beginning: tuple | None) -> dict[str, Any]:
    """The run's scores on the test tasks; trains it first where that is not done.

    `beginning` is the config, the folder and the number of steps that this run shares with others, or None.
    """
    path = folder / "results.json"
    if path.exists():
        run_folder.check_folder(config, folder)  # results of other settings are not these
        scores = json.loads(path.read_text())
        if scores["step"] == config.steps and set(roles) <= set(scores["verdicts"]):
            return scores
    stem = None
    if beginning is not None:
        shared, stem, common = beginning
        shared = copy.deepcopy(shared)
        with shared.unlocked():
            shared.steps = common
        train.train(shared, stem)  # returns at once where that is done
    train.train(config, folder, stem=stem)
    opened = run_folder.open_run(folder)
    with run_folder.open_benchmark(opened.config, folder) as benchmark:
        scores = evaluate_roles(opened, roles=roles, split="test", benchmark=benchmark)
    atomic.write_json(path, scores)
    return scores


def compare(
    ordering: Ordering,
    verdicts: Mapping[str, list[list[Verdict]]],
    measures: Measures = Measures(),  # noqa: B008
) -> dict[str, Any]:
    """Paired difference over all seeds' test clips, with its interval, and the difference of each seed.

    The interval is over clips: how much another training run would change shows in the seeds' differences.

    Raises KeyError for a metric that the benchmark does not have.
    """
    pairs = []
    for better, worse in zip(verdicts[ordering.better], verdicts[ordering.worse], strict=True):
        a, b = (measures.values(scores_of(side, measures), ordering.metric) for side in (better, worse))
        both = np.isfinite(a) & np.isfinite(b)
        pairs.append((a[both], b[both]))
    a, b = map(np.concatenate, zip(*pairs, strict=True))
    difference, low, high = score_difference(a, b)
    outcome = "holds" if low > 0 else "reversed" if high < 0 else "not resolved"
    return dataclasses.asdict(ordering) | {
        "difference": difference, "ci95": [low, high], "n": len(a), "outcome": outcome,
        "by_seed": [float((a - b).mean()) if len(a) else None for a, b in pairs],
    }  # fmt: skip


def sentence(line: Mapping[str, Any]) -> str:
    low, high = line["ci95"]
    return (
        f"{line['outcome']}: {line['claim']} ({line['better']} - {line['worse']}, {line['metric']}: "
        f"{console.points(line['difference'])} [{console.points(low)}, {console.points(high)}] points{_seeds(line)})"
    )


def _seeds(line: Mapping[str, Any]) -> str:
    """The seeds' own differences, where there are several."""
    found = ["–" if d is None else console.points(d) for d in line["by_seed"]]
    return f"; by seed {', '.join(found)}" if len(found) > 1 else ""


def table(result: Mapping[str, Any]) -> str:
    rows = [row | {"steps": result["steps"].get(row["name"], "–")} for row in result["rows"]]
    return markdown(rows, first=("name", "steps"), measures=Measures.of(result))
