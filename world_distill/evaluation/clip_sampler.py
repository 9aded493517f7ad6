"""The compiled sampler of clips that nobody trains on: of evaluation, `generate` and notebooks."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from world_distill.core import sampling, unipc
from world_distill.core.guidance import with_guidance
from world_distill.core.texts import read_once
from world_distill.devices.sharding import batch_sharding
from world_distill.interfaces import ModelFamily

Times = tuple[float, ...]  # of the Euler sampler, noisiest first, 0 at the end


class UniPC(NamedTuple):
    """Wan's own solver, in place of Euler's times."""

    steps: int
    shift: float


@functools.lru_cache(maxsize=16)
def make_sampler(
    family: ModelFamily, mesh: jax.sharding.Mesh, schedule: Times | UniPC, scale: float, *, decodes: bool = True
) -> Callable[..., jax.Array]:
    """(base, lora, condition, negative, key, rows) -> clips [b F H W 3] uint8, split over the mesh where b allows it.

    Row i starts from the noise of (key, rows[i]). One program for all callers with the same arguments. Without
    `decodes` it gives the clips' latents [b n ...] by stream.

    Args:
      family: of the model.
      mesh: devices.
      schedule: the sampler's times, or UniPC.
      scale: of guidance away from `negative`; 1: none.
      decodes: give clips, not latents.
    """
    streams = family.latents
    ways = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))

    @jax.jit
    def sample(base, lora, condition, negative, key, rows):
        condition, negative = read_once(functools.partial(family.read_texts, base), condition, negative)
        denoise, keys = with_guidance(family.denoise, scale, negative), sampling.sample_keys(key, rows)
        if isinstance(schedule, UniPC):
            solver = unipc.unipc_schedule(schedule.steps, schedule.shift)
            rollout = unipc.unipc_rollout(denoise, base, lora, condition, keys, schedule=solver, streams=streams)
        else:
            grid = np.asarray(schedule)
            rollout = sampling.rollout(
                denoise, base, lora, condition, keys, times=grid, streams=streams, keep_states=False
            )
        clips: Any = family.codec.decode(base, rollout.latents) if decodes else rollout.latents
        if rows.shape[0] % ways:
            return clips
        return jax.lax.with_sharding_constraint(clips, batch_sharding(mesh))

    return sample
