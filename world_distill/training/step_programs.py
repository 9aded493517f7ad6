"""The compiled programs of a training step: pure functions of weights and a batch, made once for settings and a mesh.

    init          the base                                  -> the first state
    roll          an Executor, the base, conditions, a key  -> a rollout of each row
    decode        the base, final latents                   -> RGB clips [t r ...], see `sharding.map_turns`
    demonstrate   the base, rollouts, their solutions       -> the Demonstrator's velocities there, Eq. 9's reward
    motion        final latents                             -> how much each clip moves
    update        a state, the base, a batch                -> the next state, metrics        (step.py)

With guidance, `roll` and `demonstrate` also take the states of the negative text. Supervised fine-tuning
(`objective.kind` = sft) runs `update` alone.

`train` runs them, `benchmark` times each alone, `plan` compiles them for machines that are not there. Runs of one
process that have the same settings share them, so that the second neither traces nor compiles: seeds of an ablation, a
run that goes on.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from world_distill import build
from world_distill.core import flow, losses, sampling
from world_distill.core.guidance import with_guidance
from world_distill.core.schedules import piecewise_linear
from world_distill.core.texts import read_once
from world_distill.devices.sharding import (
    batch_sharding,
    kept_rows,
    like_weights,
    map_rows,
    map_turns,
    platform_of,
    replicated,
    rows_at_once,
    spread_kept,
    tree_shardings,
)
from world_distill.errors import UserError
from world_distill.interfaces import Denoise, ModelFamily
from world_distill.settings import old_configs
from world_distill.settings.check import check, check_noise
from world_distill.settings.guidance import Guidance
from world_distill.settings.loading import section
from world_distill.settings.objective import Objective, Phase
from world_distill.settings.rollout import DISTILL, RolloutSettings
from world_distill.structs import Condition, Latents, PyTree, Rollout, Texts, TrainState
from world_distill.training import forwards, optimizers
from world_distill.training.step import init_state, make_train_step
from world_distill.training.step_losses import in_shape
from world_distill.weights import base_model

PHASES = (Phase(True, True), Phase(True, False), Phase(False, True))
FINE_TUNING = Phase(False, False)  # the one phase of supervised fine-tuning
# All that the programs are made from; seeds, judges and records are not.
SECTIONS = (*build.FAMILY_SECTIONS, "demonstrator", "rollout", "objective", "optimizer", "sampler")


@dataclasses.dataclass(frozen=True)
class Programs:
    """See the module's text. Holds no weights.

    Attributes:
      state: shapes and shardings of the state.
      roll: by whether L_RL has a weight in the step.
      update: by which losses have a weight in the step.
      finish: rollouts -> visited states [k+1 b n p], the final latents last; None if no loss reads them.
    """

    mesh: jax.sharding.Mesh
    family: ModelFamily
    rollout_settings: RolloutSettings
    objective: Objective
    guidance: Guidance
    steps: int  # of the sampler
    optimizer: optax.GradientTransformation
    state: TrainState
    roll: Mapping[bool, Any]
    decode: Any
    demonstrate: Any
    motion: Any
    finish: Any | None
    update: Mapping[Phase, Any]
    _init: Any

    def init(self, base: PyTree, seed: int) -> TrainState:
        """The first state of a run, on the mesh."""
        return self._init(base, jax.random.fold_in(jax.random.key(seed), 2))

    def rewards_distillation(self, phase: Phase) -> bool:
        """See `forwards.rewards_distillation`."""
        return forwards.rewards_distillation(self.rollout_settings, phase)

    def demonstrates(self, phase: Phase) -> bool:
        """Whether `demonstrate` runs in a step: see `forwards.demonstrates_all`."""
        return forwards.demonstrates_all(self.objective, self.rollout_settings, self.steps, phase)

    def forwards(self, phase: Phase) -> float:
        """Forward passes of the model that a step costs."""
        return forwards.per_step(self.objective, self.rollout_settings, self.steps, phase, self.guidance.demonstrator)

    @property
    def keeps_log_probs(self) -> bool:
        """Whether a batch has the rollouts' log-probabilities."""
        return self.objective.rl == "flow_grpo"


def make_programs(config: ConfigDict, mesh: jax.sharding.Mesh) -> Programs:
    """The programs of a config; the same ones for the same settings.

    Raises:
      UserError: a section of the config has unknown or missing keys.
      ValueError: settings that do not go together.
    """
    return _make(FrozenConfigDict({name: config[name] for name in SECTIONS if name in config}), mesh)


@functools.lru_cache(maxsize=16)
def _make(config: FrozenConfigDict, mesh: jax.sharding.Mesh) -> Programs:
    old_configs.refuse(config)
    guidance = Guidance.of(config)
    objective, settings = section(config.objective, Objective), RolloutSettings(**config.rollout.to_dict())
    rows = settings.tasks * settings.group
    settings = dataclasses.replace(settings, micro_batch=rows_at_once(mesh, rows, settings.micro_batch))
    in_update = rows_at_once(mesh, rows // objective.minibatches, objective.micro_batch)
    objective = dataclasses.replace(objective, micro_batch=in_update)
    _check_rows(mesh, rows, objective.minibatches, config.model.get("heads", 1))
    grid, diffusion = build.sampler_grid(config)
    sde = config.sampler.sde
    check(
        objective, settings, stochastic=diffusion is not None, guidance=guidance.demonstrator, sde=sde,
        window=config.sampler.window,
    )  # fmt: skip
    if diffusion is not None and config.sampler.explicit:
        check_noise(grid, sampling.step_stds(grid, diffusion, sde), eta=config.sampler.eta)
    distills = objective.rl != "none" and settings.weights.get(DISTILL, 0.0) != 0
    family = build.make_family(config, mesh)
    optimizer = _make_optimizer(config, family, mesh)
    init, state = _make_state(config, family, mesh, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    keep_states = objective.uses_visited or distills or objective.rl == "flow_grpo"
    keep_velocities = distills or (objective.uses_visited and settings.role == "demonstrator")
    roll = functools.partial(
        _roll, family, mesh, settings, guidance, grid=grid, sde=sde, keep_states=keep_states,
        keep_velocities=keep_velocities,
    )  # fmt: skip

    def demonstrate(base, rollout, solution, negative=None):
        denoise = with_guidance(family.denoise, guidance.demonstrator, negative)
        return _demonstrate(family, mesh, denoise, settings, grid, base, rollout, solution)

    def decode(base, latents):
        count = len(jax.tree.leaves(latents)[0])
        rows = rows_at_once(mesh, count, getattr(family.codec, "rows", 0))
        # All clips of a step would take much of a device's memory: each turn's go to the host's.
        leaves = 0 < rows < count and platform_of(mesh) != "gpu"

        def some(latents):
            clips = family.codec.decode(base, latents)
            if jax.process_count() > 1:  # each is looked at by one process
                clips = jax.lax.with_sharding_constraint(clips, batch_sharding(mesh))
            return jax.device_put(clips, jax.memory.Space.Host) if leaves else clips

        return map_turns(some, rows, latents)

    def motion(latents):
        """[b] root mean square of the differences between the picture's neighbouring latent frames."""
        picture = latents[next(iter(family.latents))]
        return jnp.sqrt(flow.masked_mean(jnp.square(jnp.diff(picture, axis=1)), None))

    def finish(rollout):
        states = jax.tree.map(
            lambda states, last: jnp.concatenate([states, last.reshape(1, *states.shape[1:])]),
            rollout.states, rollout.latents,
        )  # fmt: skip
        return spread_kept(mesh, states)

    def train_step(phase):
        # While a schedule holds a loss at weight 0, its forward passes are left out.
        noise = diffusion if phase.rl else None
        return jax.jit(
            make_train_step(family, objective.in_phase(phase), optimizer, grid, noise, guidance.demonstrator, sde),
            out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0,
        )

    return Programs(
        mesh=mesh,
        family=family,
        rollout_settings=settings,
        objective=objective,
        guidance=guidance,
        steps=len(grid) - 1,
        optimizer=optimizer,
        state=state,
        # Only RL by Flow-GRPO needs stochastic steps: while a schedule holds it at weight 0, rollouts follow the ODE.
        roll={
            active: jax.jit(functools.partial(roll, diffusion=diffusion if active else None))
            for active in (True, False)
        },
        # A program of its own: it takes as long to compile as a step, and its memory is free again for the next one.
        decode=jax.jit(decode),
        demonstrate=jax.jit(demonstrate),
        motion=jax.jit(motion),
        finish=jax.jit(finish) if keep_states else None,
        update={phase: train_step(phase) for phase in ((FINE_TUNING,) if objective.sft else PHASES)},
        _init=init,
    )


def _check_rows(mesh: jax.sharding.Mesh, rows: int, minibatches: int, heads: int) -> None:
    """Raises UserError for rollouts that the accelerators along data and fsdp do not divide: each would have all."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if platform_of(mesh) == "cpu":  # small models, and devices that are often one
        return
    per_update = rows // minibatches
    all_rows = "rollout.tasks x rollout.group"
    for count, what in ((rows, all_rows), (per_update, f"{all_rows} / objective.minibatches")):
        if count % ways:
            most = math.gcd(rows, per_update, ways)
            data = mesh.shape["data"] if most % mesh.shape["data"] == 0 else 1
            shared = mesh.size // most
            tensor = math.gcd(heads, shared)
            settings = {"data": data, "fsdp": most // data, "context": shared // tensor, "tensor": tensor}
            raise UserError(
                f"{count} rollouts ({what}) do not divide by mesh.data x mesh.fsdp = {ways}, and every device would "
                f"compute all of them. Let {shared} devices share a clip: "
                + " ".join(f"--config.mesh.{axis}={size}" for axis, size in settings.items())
            )


def _make_optimizer(config, family: ModelFamily, mesh: jax.sharding.Mesh) -> optax.GradientTransformation:
    """The config's optimiser; its learning rate may be (training step, rate) points."""
    settings = config.optimizer.to_dict()
    if not isinstance(settings["learning_rate"], float):
        by_step = piecewise_linear(settings["learning_rate"])
        # The optimiser counts updates, several a step.
        settings["learning_rate"] = lambda count: by_step(count // config.objective.updates)
    executor = base_model.abstract_executor(family, mesh, config.executor.rank)
    return optimizers.make_optimizer(**settings, axes=family.lora_axes(executor))


def _make_state(config, family: ModelFamily, mesh: jax.sharding.Mesh, optimizer) -> tuple[Any, TrainState]:
    """(program that makes the first state of the base and a key, the state's shapes and shardings)."""

    def init(base, key):
        ahead = config.rollout.staleness > 0
        return init_state(family, base, optimizer, key, rank=config.executor.rank or None, ahead=ahead)

    shapes = jax.eval_shape(init, base_model.abstract_base(family, mesh), jax.random.key(0))
    weights = tree_shardings(mesh, family.lora_axes(shapes.lora), shapes.lora)
    everywhere: Any = replicated(mesh)
    moments = like_weights(shapes.opt_state, shapes.lora, weights, everywhere)
    rolled = None if shapes.lora_rolled is None else weights
    shardings = TrainState(everywhere, weights, weights, weights, moments, everywhere, rolled)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return jax.jit(init, out_shardings=shardings), abstract


def _roll(
    family: ModelFamily,
    mesh: jax.sharding.Mesh,
    settings: RolloutSettings,
    guidance: Guidance,
    lora: PyTree,
    base: PyTree,
    task: Condition,
    solution: Condition,
    key: jax.Array,
    first_row: jax.Array,
    negative: Texts | None = None,
    *,
    grid: np.ndarray,
    sde: sampling.Sde,
    keep_states: bool,
    keep_velocities: bool,
    diffusion: np.ndarray | None,
) -> Rollout:
    """A rollout of every row, row i from the noise of `first_row` + i.

    `Rollout.velocities` are those that made the clips: with guidance, the guided ones.
    """
    lie = lambda x: jax.lax.with_sharding_constraint(x, kept_rows(mesh, x.shape))  # noqa: E731
    task, solution = jax.tree.map(lie, (task, solution))
    rows = first_row + jnp.arange(jax.tree.leaves(task)[0].shape[0])
    keys = sampling.sample_keys(key, rows)
    executor = settings.role == "executor"
    scale = guidance.rollout if executor else guidance.demonstrator

    def some(condition, keys):
        condition, told = read_once(functools.partial(family.read_texts, base), condition, negative)
        denoise = with_guidance(family.denoise, scale, told)
        rollout = sampling.rollout(
            denoise, base, lora if executor else None, condition, keys, times=grid, streams=family.latents,
            diffusion=diffusion, sde=sde, keep_states=keep_states,
        )  # fmt: skip
        return _steps_first(_kept(mesh, rollout if keep_velocities else dataclasses.replace(rollout, velocities=None)))

    rollout = _steps_first(map_rows(some, settings.micro_batch or 0, task if executor else solution, keys))
    states, velocities = spread_kept(mesh, (rollout.states, rollout.velocities))
    return dataclasses.replace(rollout, states=states, velocities=velocities)


def _demonstrate(
    family: ModelFamily,
    mesh: jax.sharding.Mesh,
    denoise: Denoise,
    settings: RolloutSettings,
    grid: np.ndarray,
    base: PyTree,
    rollout: Rollout,
    solution: Condition,
) -> tuple[Latents | None, jax.Array | None]:
    """(the Demonstrator's velocities at the visited states [k b n p], Eq. 9's reward [b] where velocities are kept).

    The reward compares the velocity that made the clip (`Rollout.velocities`, guided if the rollout was) with the
    Demonstrator's, which is guided if `denoise` is: how far the clip was led from where the Demonstrator leads.
    """

    def at(state_and_time):
        state, t = state_and_time

        def some(x, solution):
            rows = jax.tree.leaves(x)[0].shape[0]
            v = denoise(base, None, in_shape(x, family.latents), jnp.full((rows,), t), solution)
            return jax.tree.map(lambda v, x: v.reshape(x.shape), v, x)

        return map_rows(some, settings.micro_batch or 0, state, solution)

    def at_all(states):
        return spread_kept(mesh, jax.lax.map(at, (states, jnp.asarray(grid[:-1], jnp.float32))))

    shown: Any
    if settings.role == "demonstrator":
        shown = rollout.velocities
    else:
        shown = at_all(rollout.states)
    if rollout.velocities is None:
        return shown, None
    reward = losses.distillation_reward(
        in_shape(rollout.velocities, family.latents), in_shape(shown, family.latents), grid,
        sampling.counted(family.latents), settings.distill_min_time,
    )  # fmt: skip
    return shown, reward


def _kept(mesh: jax.sharding.Mesh, rollout: Rollout) -> Rollout:
    """States and velocities as they are kept, [k b n p]: a TPU would fill up c, the last axis of [.. h w c], to 128."""
    flat = jax.tree.map(lambda x: x.reshape(*x.shape[:3], -1), (rollout.states, rollout.velocities))
    states, velocities = spread_kept(mesh, flat)
    return dataclasses.replace(rollout, states=states, velocities=velocities)


def _steps_first(rollout: Rollout) -> Rollout:
    """States [k b ...] become [b k ...], and the other way round; clips stay as they are."""
    none: Any = None
    swapped = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), dataclasses.replace(rollout, latents=none))
    return dataclasses.replace(swapped, latents=rollout.latents)
