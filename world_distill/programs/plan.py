"""`world-distill plan`: does a config fit and compile on a slice of TPUs, or on this machine's GPUs, and what will a
step cost there?

XLA's compiler for TPUs runs without one: every phase of a training step is traced with abstract weights, at the
config's real sizes, and compiled for the topology. What is printed of memory, cycles and collectives is the compiler's;
operations are counted from the traced programs (`flops`).

Times are predictions. On TPUs they are ranges: the compiler's cycles (`cycles`) by the clock, attention kernels at a
share of the peak (`chips.Chip.attention`, at worst half of it), and the time in which chips wait for collectives, over
all links or over the two of one axis of the torus. Where the compiler estimates no cycles, as for GPUs, they are the
operations by the peak and an assumed utilisation.
"""

import dataclasses
import functools
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from world_distill import build
from world_distill.data.records import fit
from world_distill.devices import chips, flops
from world_distill.devices import cycles as cycles_lib
from world_distill.devices.sharding import batch_sharding, kept_rows, make_mesh, replicated
from world_distill.errors import UserError, did_you_mean
from world_distill.programs import plan_text
from world_distill.settings import objective
from world_distill.settings.loading import override
from world_distill.settings.rollout import RolloutSettings
from world_distill.structs import Condition, PyTree, Rollout, Texts, Tokens, TrainBatch
from world_distill.training.step_programs import FINE_TUNING, Programs, make_programs
from world_distill.weights import base_model

LOCAL = "local"
PHASES = ("rollout", "demonstrator", "update", "decode", "encode")  # names of what `make_plan` compiles
GIB = 2**30
KERNEL_SHARE = 0.7  # of the peak, at which attention kernels run at best where `chips` does not say
# What the compiler allocates, in peaks: buffers leave gaps. 1.037 in the rollout and in the update of `wan22_5b:wmsd`
# for v5e:2x2, by the compiler's own memory report (`XLA_FLAGS=--xla_dump_to=FOLDER`).
ALLOCATED = 1.05
UTILISATION = 0.4  # share of the peak that times assume without an estimate


@dataclasses.dataclass
class Phase:
    """One compiled program of a step; memory in GiB a device, `None` where the compiler refused."""

    name: str
    flops: float  # of one call, over all devices
    calls: int  # in a step
    compile_seconds: float
    arguments: float | None = None
    temporaries: float | None = None
    output: float | None = None
    peak: float | None = None
    host: float = 0.0  # what it leaves in the host's memory
    beside: float = 0.0  # what else lies in the memory meanwhile: parts of the base and of the state not read here
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)  # in the program's text: a loop's count once
    needed: float = 0.0  # of `flops`, what the model needs: without what a backward pass computes again
    cycles: dict[str, float] = dataclasses.field(default_factory=dict)  # by `cycles.KINDS`, of one call on one chip
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)  # runs of Pallas kernels in a call
    kernel_flops: float = 0.0  # of `flops`, those in kernels
    sent: float = 0.0  # bytes that a chip sends in a call
    endless: int = 0  # loops whose turns are not known; `cycles` and `sent` have one turn of each
    unknown: int = 0  # instructions whose cycles the compiler does not know; `cycles` has none of them
    unread: int = 0  # collectives whose groups of chips cannot be read; `sent` has none of them
    seconds: tuple[float, float] | None = None  # of one call, at best and at worst
    expensive: list[cycles_lib.Instruction] = dataclasses.field(default_factory=list)
    problem: str = ""
    largest: list[str] = dataclasses.field(default_factory=list)


def topology(name: str, slices: int = 1) -> list[Any]:
    """Devices of a TPU topology that need not exist; or, as "local", those of this machine.

    Raises:
      UserError: the compiler is not installed, or knows no such topology; slices of "local".
    """
    if name == LOCAL:
        if slices > 1:
            raise UserError(f"--slices {slices}: the devices of this machine (--topology {LOCAL}) are one slice")
        return list(jax.devices())
    # Off a TPU VM, libtpu would look for its surroundings.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    extra = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices)
    except Exception as error:  # whatever the plug-in raises
        if "libtpu" in str(error) or "Unknown platform" in str(error) or "not found" in str(error):
            raise UserError(f"the compiler for TPUs is missing: pip install -e '.[tpu]' ({error})") from error
        raise UserError(
            f"--topology {name}: {str(error).splitlines()[0]} (such as v5e:2x4, v5p:2x2x2, v6e:4x4 or tpu7x:2x2x1)"
        ) from error


def make_plan(config, devices: list[Any], only: tuple[str, ...] = (), *, say=lambda text: None) -> list[Phase]:
    """Every phase of a step, compiled for the devices; one that is refused ends those that need its result.

    Raises:
      UserError: `only` names something that is none of `PHASES`.
    """
    if unknown := [name for name in only if name not in PHASES]:
        raise UserError(f"no phase {unknown[0]!r}; {did_you_mean(unknown[0], PHASES)}")
    found = []
    for phase in _phases(config, devices, only):
        say(f"{phase.name}: {'does not fit' if phase.problem else 'compiled'} in {phase.compile_seconds:.0f} s")
        found.append(phase)
    return found


def _phases(config, devices: list[Any], only: tuple[str, ...]) -> Iterator[Phase]:
    mesh = make_mesh(**config.mesh.to_dict(), devices=devices)
    programs = make_programs(config, mesh)
    family, sft = programs.family, programs.objective.sft
    base = base_model.abstract_base(family, mesh)
    wanted = lambda name: not only or name in only  # noqa: E731
    yield from (_of_fine_tuning if sft else _of_rollouts)(config, programs, base, wanted)
    size = family.encoders.image_size
    if wanted("encode") and size:
        images = _shape((config.encode_batch, 1, *size, 3), np.uint8, replicated(mesh))
        if sft:  # the videos' clips, one on each device
            rows = mesh.shape["data"] * mesh.shape["fsdp"]
            images = _shape((rows, fit.clip_shape(family)[0], *size, 3), np.uint8, batch_sharding(mesh))
        yield _compile("encode", jax.jit(family.codec.encode), (base, images), base, calls=0)[0]


def _of_fine_tuning(config, programs: Programs, base: PyTree, wanted: Callable[[str], bool]) -> Iterator[Phase]:
    """The update alone: clips of records stand in the rollouts' place."""
    mesh, family, settings, state = programs.mesh, programs.family, programs.rollout_settings, programs.state
    rows = settings.tasks * settings.group
    shapes = {name: (rows, *spec.shape) for name, spec in family.latents.items()}
    clips = {name: _shape(shape, jnp.float32, kept_rows(mesh, shape)) for name, shape in shapes.items()}
    if wanted("update"):
        task = _condition(config, family, mesh, rows)
        given = state, base, _batch(programs, Rollout(clips), task, None, None, False, None)
        yield _compile("update", programs.update[FINE_TUNING], given, (base, state))[0]


def _of_rollouts(config, programs: Programs, base: PyTree, wanted: Callable[[str], bool]) -> Iterator[Phase]:
    """The phases of a step in which every loss has a weight."""
    mesh, family, settings, state = programs.mesh, programs.family, programs.rollout_settings, programs.state
    active = programs.objective.rl != "none"
    in_force = objective.Phase(rl=active, anchor=programs.objective.anchored)

    # Each phase takes what the one before gives, laid out as the compiler chose.
    key = jax.eval_shape(lambda: jax.random.key(0))
    task, solution = (_condition(config, family, mesh, settings.tasks * settings.group) for _ in range(2))
    negative = _texts(config, family, (), lambda shape: replicated(mesh)) if programs.guidance.used else None
    at = (_abstract(key, replicated(mesh)), _abstract(jnp.int32(0), replicated(mesh)))
    given = (state.lora, base, task, solution, *at, negative)
    held = (base, state)
    phase, rollout = _compile("rollout", programs.roll[active], given, held)
    if wanted("rollout"):
        yield phase
    if rollout is not None:
        held += (rollout, task, solution)
        shown = None
        if programs.demonstrates(in_force):
            phase, result = _compile("demonstrator", programs.demonstrate, (base, rollout, solution, negative), held)
            shown = None if result is None else result[0]
            if wanted("demonstrator"):
                yield phase
        if wanted("update") and (shown is not None or not programs.demonstrates(in_force)):
            read = shown if programs.objective.uses_visited else None
            given = state, base, _batch(programs, rollout, task, solution, read, active, negative)
            yield _compile("update", programs.update[in_force], given, (base, state))[0]  # the rollout is gone by then
        if wanted("decode"):
            judged = active and bool(settings.questions)
            yield _compile("decode", programs.decode, (base, rollout.latents), held, calls=int(judged))[0]


def _condition(config, family, mesh, rows: int) -> Condition:
    lie = functools.partial(kept_rows, mesh)
    scene = {}
    for name, x in family.encoders.scenes.items():
        shape = (rows, *x.shape)
        scene[name] = _shape(shape, x.dtype, lie(shape))
    return Condition(_texts(config, family, (rows,), lie), scene)


def _texts(config, family, rows: tuple[int, ...], lie: Callable[[tuple[int, ...]], jax.sharding.Sharding]) -> Texts:
    texts = {}
    for name, length in build.text_lengths(family, config).items():
        spec = family.encoders.texts[name]
        shape = (*rows, length)
        states = (*shape, spec.width)
        texts[name] = Tokens(_shape(states, spec.dtype, lie(states)), _shape(shape, jnp.bool_, lie(shape)))
    return texts


def _batch(programs: Programs, rollout, task, solution, shown, active: bool, negative) -> TrainBatch:
    rows = batch_sharding(programs.mesh)
    count = jax.tree.leaves(rollout.latents)[0].shape[0]
    # With the final latents behind the visited states; None where there are none.
    states = jax.tree.map(lambda x: _shape((x.shape[0] + 1, *x.shape[1:]), x.dtype, x.sharding), rollout.states)
    return TrainBatch(
        task=task, solution=solution, latents=rollout.latents, states=states, demonstrator=shown,
        log_probs=rollout.log_probs if programs.keeps_log_probs and active else None,
        advantages=_shape((count,), jnp.float32, rows), valid=_shape((count,), jnp.bool_, rows), negative=negative,
    )  # fmt: skip


def _shape(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding) -> Any:
    """What stands for an array."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _abstract(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return _shape(x.shape, x.dtype, sharding)


def _compile(name: str, function: Any, given: tuple, held: PyTree, *, calls: int = 1) -> tuple[Phase, PyTree | None]:
    """The phase, and its abstract result as the compiler lays it out (None if it refuses).

    `held` is what lies in the memory all the time, read by this program or not.
    """
    traced = function.trace(*given)
    phase = Phase(name, flops.count(traced.jaxpr), calls, 0.0)
    phase.needed, phase.kernel_flops = flops.count(traced.jaxpr, remat=False), flops.count(traced.jaxpr, kernels=True)
    started = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        phase.problem = _refusal(str(error))
        phase.largest = _largest(traced.jaxpr)
        return phase, None
    finally:
        phase.compile_seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    arguments = phase.arguments = memory.argument_size_in_bytes / GIB
    temporaries = phase.temporaries = memory.temp_size_in_bytes / GIB
    output = phase.output = (memory.output_size_in_bytes - memory.alias_size_in_bytes) / GIB
    phase.host = memory.host_output_size_in_bytes / GIB
    phase.peak = memory.peak_memory_in_bytes / GIB
    if phase.host:  # a part of the compiler's peak; the other figures are an upper bound for what is not
        phase.peak = min(phase.peak, arguments + temporaries + output)
    phase.beside = max(_bytes((given, held)) / GIB - arguments, 0.0)
    _predict(phase, cycles_lib.estimate(compiled.as_text()), jax.tree.leaves(given)[0].sharding)
    result = jax.tree.map(_abstract, traced.out_info, compiled.output_shardings)
    return phase, result


def _refusal(error: str) -> str:
    """Why the compiler refuses a program, from the text of its error."""
    lines = error.removeprefix("RESOURCE_EXHAUSTED: ").splitlines()
    if "vmem" not in error.lower():
        return lines[0]
    instruction = re.search(r"on stack for %?([\w.\-]+)", error)
    sizes = re.search(r"with size ([\d.]+\w) and limit ([\d.]+\w)", error)
    needs = f" ({sizes[1]} of {sizes[2]})" if sizes else ""
    return (
        f"not for want of HBM: one instruction{f' ({instruction[1]})' if instruction else ''} needs more of a chip's "
        f"fast memory, VMEM, than there is{needs}. Fewer rows, smaller pieces (model.piece) or bfloat16 make it smaller"
    )


def _predict(phase: Phase, estimate: cycles_lib.Estimate, sharding: jax.sharding.Sharding) -> None:
    """Writes into the phase what the compiler estimates, and the seconds that follow for this kind of chip."""
    phase.cycles, phase.kernels, phase.endless = estimate.cycles, estimate.kernels, estimate.endless
    phase.unknown, phase.unread = estimate.unknown, estimate.unread
    phase.collectives = estimate.counts
    phase.sent = sum(collective.sent * collective.runs for collective in estimate.collectives)
    phase.expensive = estimate.largest()
    devices = list(sharding.device_set)
    chip = chips.chip(devices[0].device_kind)
    if not estimate.total or chip is None or not chip.ghz:
        return
    hertz, kernels = chip.ghz * 1e9, phase.kernel_flops / len(devices) / (chip.tflops * 1e12)
    best = chip.attention or KERNEL_SHARE
    links = (chip.sends * 1e9, chip.sends * 1e9 * min(2 / chip.links, 1.0))
    low, high = (
        estimate.total / hertz + kernels / share + estimate.waiting(hertz, bandwidth)
        for share, bandwidth in zip((best, best / 2), links, strict=True)
    )
    phase.seconds = low, high


def _bytes(tree: PyTree) -> float:
    """On one device, of all different arrays of a tree."""
    arrays = {id(x): x for x in jax.tree.leaves(tree)}.values()
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * getattr(x.dtype, "itemsize", 4) for x in arrays)


def _largest(jaxpr: Any, count: int = 5) -> list[str]:
    """The largest arrays that a program makes, whole, with what makes them."""
    seen: dict[str, float] = {}

    def visit(jaxpr: Any) -> None:
        for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            for variable in equation.outvars:
                if hasattr(variable.aval, "shape"):
                    size = float(np.prod(variable.aval.shape)) * getattr(variable.aval.dtype, "itemsize", 4) / GIB
                    seen.setdefault(f"{variable.aval.str_short()} of {equation.primitive.name}", size)
            for inner in flops.inner(equation.params):
                visit(inner)

    visit(jaxpr)
    best = sorted(seen.items(), key=lambda item: -item[1])[:count]
    return [f"{size:.1f} GiB over all chips: {what}" for what, size in best]


def summary(config, devices: list[Any], plan: list[Phase], utilisation: float = UTILISATION) -> dict[str, Any]:
    """The plan as plain values, with predictions.

    Args:
      config: of the run.
      devices: that the plan is for.
      plan: from `make_plan`.
      utilisation: share of the peak that times assume where the compiler estimates no cycles.
    """
    chip = chips.chip(devices[0].device_kind)
    result: dict[str, Any] = {
        "devices": len(devices),
        "kind": devices[0].device_kind,
        "chip": dataclasses.asdict(chip) if chip else None,
        "mesh": {k: int(v) for k, v in make_mesh(**config.mesh.to_dict(), devices=devices).shape.items()},
        "rollouts_per_step": config.rollout.tasks * config.rollout.group,
        "rows": rows_of(config),
        "phases": [dataclasses.asdict(phase) | {"fits": _fits(phase, chip)} for phase in plan],
    }
    result["fits"] = all(phase["fits"] for phase in result["phases"])
    if chip is None:
        return result
    peak = len(devices) * chip.tflops * 1e12
    result["estimated"] = all(phase.seconds or phase.problem for phase in plan)
    if not result["estimated"]:
        result["utilisation"] = utilisation
        for phase in result["phases"]:
            phase["seconds"] = (phase["flops"] / (peak * utilisation),) * 2
    low, high = (sum(p["seconds"][i] * p["calls"] for p in result["phases"] if p["seconds"]) for i in (0, 1))
    asked = len(RolloutSettings(**config.rollout.to_dict()).questions) if config.objective.rl != "none" else 0
    rates = [result["rollouts_per_step"] / seconds if seconds else 0.0 for seconds in (high, low)]
    needed = sum(p.needed * p.calls for p in plan) / peak
    return result | {
        "step_seconds": (low, high),
        "rollouts_per_second": tuple(rates),
        "judge_requests_per_second": tuple(asked * rate for rate in rates),
        "mfu": tuple(needed / seconds if seconds else 0.0 for seconds in (high, low)),
    }


def _fits(phase: Phase, chip: chips.Chip | None) -> bool:
    if phase.peak is None:
        return False
    return chip is None or phase.peak * ALLOCATED + phase.beside <= chip.hbm_gib


def rows_of(config) -> str:
    """What the rows of a step are: "rollouts", or in fine-tuning the "clips" of records."""
    return "clips" if config.objective.kind == "sft" else "rollouts"


def search(config, devices: list[Any], only: tuple[str, ...], utilisation: float, *, say=lambda text: None) -> dict:
    """Compiles candidates from the cheapest in communication to the most saving in memory, until one fits.

    Returns:
      `tried`: the summaries of all that were compiled, each with its `change`; `fits`: whether the last one fits.
    """
    tried: list[dict[str, Any]] = []
    for change in candidates(config, len(devices)):
        trial = config.copy_and_resolve_references()
        override(trial, change)
        text = " ".join(f"--config.{key}={value}" for key, value in change.items())
        try:
            result = summary(trial, devices, make_plan(trial, devices, only), utilisation)
        except ValueError as error:
            say(f"{text}: {error}")
            continue
        peak = max((phase["peak"] or 0.0) + phase["beside"] for phase in result["phases"])
        tried.append(result | {"change": change})
        say(f"{text}: {'fits, ' + format(peak, '.2f') + ' GiB at most' if result['fits'] else 'does not fit'}")
        if result["fits"]:
            for line in plan_text.describe(result):
                say(line)
            break
    return {"tried": tried, "fits": bool(tried) and tried[-1]["fits"]}


def candidates(config, devices: int) -> Iterator[dict[str, Any]]:
    """Changes of a config to try, the best first: less remat and larger micro-batches before smaller ones.

    Meshes keep the rows of a step busy: data and fsdp together are no more than the rollouts. Chips that share a clip
    share heads first, which spreads the weights too, and tokens where heads do not divide.
    """
    rows = config.rollout.tasks * config.rollout.group
    shards = [n for n in range(devices, 0, -1) if devices % n == 0 and rows % n == 0]
    per_update = rows // config.objective.minibatches
    for fsdp, remat in itertools.product(shards, ("attention", "full", "offload")):
        shared = devices // fsdp
        tensor = math.gcd(config.model.get("heads", 1), shared)
        for micro in sorted({per_update, max(per_update // 4, fsdp), fsdp}, reverse=True):
            if per_update % micro == 0 and micro % fsdp == 0:
                yield {
                    "mesh.data": 1, "mesh.fsdp": fsdp, "mesh.context": shared // tensor, "mesh.tensor": tensor,
                    "model.remat": remat, "model.rows": fsdp, "rollout.micro_batch": fsdp,
                    "objective.micro_batch": 0 if micro == per_update else micro,
                }  # fmt: skip
