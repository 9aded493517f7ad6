"""`world-distill train --dry-run`: opens all that a run reads, and says what it would take; writes nothing."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from world_distill import console
from world_distill.programs import plan, plan_text
from world_distill.programs.run_inputs import open_inputs
from world_distill.training import run_folder

PHASES = tuple(name for name in plan.PHASES if name != "encode")  # that is `world-distill encode`'s


def dry_run(config, workdir: pathlib.Path, *, say: Callable[[str], None] = console.say) -> dict[str, Any]:
    """Opens records, judges and weights, compiles every phase of a step for the devices that are there.

    Returns:
      `plan.summary` of it, with `steps` that are left to train, `records`, `state_bytes` (of one checkpoint), and
      `seconds` that the steps will take at worst (None where the device's peak is not known).

    Raises:
      UserError, RecordError: as `train` would, before its first step.
    """
    inputs = open_inputs(config, workdir, writes=False)
    programs, mesh = inputs.programs, inputs.mesh
    if config.executor.start:
        state = programs.init(inputs.base, config.seed)
        run_folder.start_from_file(config.executor.start, config, programs.family, state)
    done = _newest(epath.Path(run_folder.checkpoint_folder(config, workdir)))
    left = max(config.steps - done, 0)
    rows = config.rollout.tasks * config.rollout.group
    say(f"records: {len(inputs.reader)} tasks in {inputs.reader.index_path}")
    say(f"validation: {_validation(inputs, config)}")
    why = "objective.kind = sft" if config.objective.kind == "sft" else "objective.rl = none"
    say(f"judge: {inputs.judge.name if inputs.judge else f'none, since {why}'}")
    say(f"weights: {config.base or 'none named'}, {console.memory(_bytes(inputs.base))} over all devices")
    say(f"{left} steps of {rows} {plan.rows_of(config)}" + (f", after step {done}" if done else ""))

    devices = list(mesh.devices.flat)
    result = plan.summary(config, devices, plan.make_plan(config, devices, PHASES, say=say))
    for line in plan_text.describe(result):
        say(line)
    bytes_ = _bytes(programs.state)
    seconds = result["step_seconds"][1] * left if "step_seconds" in result else None
    say(f"memory: {_memory(result, devices)}")
    say(f"time: {_time(result, seconds, left)}")
    say(f"disk: {console.disk(bytes_ * (config.keep + 1))} for {config.keep} checkpoints, beside clips and logs")
    more = {"steps": left, "records": len(inputs.reader), "state_bytes": bytes_, "seconds": seconds}
    return result | more


def _validation(inputs, config) -> str:
    if inputs.validation is None:
        return "never, since evaluate_every = 0"
    return f"{len(inputs.validation)} tasks, every {config.evaluate_every} steps"


def _newest(folder: epath.Path) -> int:
    """The newest step that a folder or bucket has a checkpoint of; 0: none."""
    if not folder.exists():
        return 0
    return max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0)


def _bytes(tree: Any) -> int:
    return sum(x.size * getattr(x.dtype, "itemsize", 4) for x in jax.tree.leaves(tree))


def _memory(result: dict[str, Any], devices: list[Any]) -> str:
    need = max(((phase["peak"] or 0.0) + phase["beside"] for phase in result["phases"]), default=0.0) * 2**30
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    if devices[0].platform == "cpu":  # which all devices share
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f"{console.memory(need * len(devices))} at the peak, of {console.memory(machine)} of this machine"
    return f"{console.memory(need)} at the peak of a device" + (f", which has {console.memory(limit)}" if limit else "")


def _time(result: dict[str, Any], seconds: float | None, steps: int) -> str:
    compiling = console.duration(sum(phase["compile_seconds"] for phase in result["phases"]))
    if seconds is None:
        return f"{compiling} to compile; no peak of {result['kind']} is known: the first steps of the run say the rest"
    estimated = result["estimated"]
    how = "the compiler's cycles" if estimated else f"{console.percent(result['utilisation'])} of the devices' peak"
    return (
        f"{compiling} to compile, then {console.duration(seconds)} for {steps} steps, predicted from {how},"
        " without the judge's time and evaluations"
    )
