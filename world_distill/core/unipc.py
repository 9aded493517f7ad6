"""UniPC for flow models (Zhao et al., arXiv 2302.04867): the solver that Wan2.2 is published with, for inference.

Second order, B(h) = e^h - 1 ("bh2"), on predictions of x_0; the last step is of first order. One step goes from t to
t', with the time convention of `core/flow.py`. Write lambda = log((1 - t) / t), h = lambda' - lambda, E = e^-h - 1,
m = x_0 as predicted at t, m- and lambda- for the step before, r = (lambda- - lambda) / h:

    predict:  x' = t'/t x - (1 - t') E [ m + (m- - m) / (2 r) ]                       (1)
    correct:  x' = t'/t x - (1 - t') E [ m + a (m- - m) / r + c (m' - m) ]            (2)
              a + c = -1/h - 1/E,   r a + c = 2/h^2 + 2/(h E) - 1/E                   (3)

The network looks at what (1) predicted and gives m', with which (2) goes the same step again: no call is spent on the
correction. A step of first order has no m-: it drops that term, and c = 1/2. That is the first step, which has no
step before it, and the last one (t' = 0, h infinite), which is x' = m.

States and predictions enter linearly, with factors that depend on the grid alone: `unipc_schedule` makes tables of
them in float64, and a rollout is one `lax.scan` over their rows.

The grid is diffusers' (`UniPCMultistepScheduler` with `use_flow_sigmas`, 1000 training timesteps): k even times from
1 towards 1/1000, shifted, the first one 1e-6 below 1, where lambda is finite. Times are rounded to float32 before
lambda is taken, which moves its first value by a hundredth. The network is told times cut down to thousandths.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from world_distill.core.flow import clean_from_velocity, shift_times
from world_distill.core.sampling import Streams, initial_noise, pin
from world_distill.structs import Condition, PyTree, Rollout

TRAINING_TIMESTEPS = 1000


class UniPCSchedule(NamedTuple):
    """The grid and the factors of every step: float32 host tables, a pytree.

    As an argument of a jitted function, schedules of equally many steps share one compilation.
    """

    times: np.ndarray  # [k+1] falls strictly to exactly 0
    times_told: np.ndarray  # [k] what the network is told in place of times[:-1]
    corrector: np.ndarray  # [k 4] factors of x one step back, and of x_0 as predicted here, one and two steps back
    predictor: np.ndarray  # [k 3] factors of x here, and of x_0 as predicted here and one step back


def unipc_schedule(steps: int, shift: float = 1.0) -> UniPCSchedule:
    """Tables for `steps` steps on the grid with time shift `shift`, equation (5) of `core/flow.py`.

    Raises:
        ValueError: fewer than one step, a shift that is not positive, or times that float32 cannot tell apart.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got steps={steps}")
    if not 0 < shift < np.inf:
        raise ValueError(f"the time shift must be positive and finite, got {shift}")
    even = np.linspace(1.0, 1 / TRAINING_TIMESTEPS, steps + 1, dtype=np.float64)[:-1]
    t = np.asarray(shift_times(even, shift))
    t[0] = 1 - 1e-6
    told = np.trunc(t * TRAINING_TIMESTEPS) / TRAINING_TIMESTEPS
    times = np.append(t, 0.0).astype(np.float32)
    if not (np.diff(times) < 0).all():
        raise ValueError(f"shift={shift} leaves no room for {steps} steps: take fewer, or a smaller shift")
    corrector, predictor = _factors(times.astype(np.float64))
    return UniPCSchedule(times, *(table.astype(np.float32) for table in (told, corrector, predictor)))


def _factors(t: Float[np.ndarray, " n"]) -> tuple[Float[np.ndarray, "k 4"], Float[np.ndarray, "k 3"]]:
    """Equations (1) to (3) with their terms sorted by what they multiply."""
    k = len(t) - 1
    with np.errstate(divide="ignore"):
        log_ratio = np.log1p(-t) - np.log(t)  # lambda, infinite at t = 0
    corrector, predictor = np.zeros((k, 4)), np.zeros((k, 3))
    corrector[0, 0] = 1.0  # nothing to correct yet: x one step back is where the rollout starts
    for i in range(k):
        h = log_ratio[i + 1] - log_ratio[i]
        e = np.expm1(-h)
        scale = -(1 - t[i + 1]) * e
        second_order = 0 < i < k - 1
        r = (log_ratio[i - 1] - log_ratio[i]) / h if second_order else np.inf
        predictor[i] = [t[i + 1] / t[i], scale * (1 - 0.5 / r), scale * 0.5 / r]
        if i == k - 1:
            break  # no network call follows that could correct the last step
        a, c = 0.0, 0.5
        if second_order:
            total, moment = -1 / h - 1 / e, 2 / h**2 + 2 / (h * e) - 1 / e
            a = (total - moment) / (1 - r)
            c = total - a
        corrector[i + 1] = [t[i + 1] / t[i], scale * c, scale * (1 - a / r - c), scale * a / r]
    return corrector, predictor


def unipc_rollout(
    denoise: Callable[..., PyTree],
    base: PyTree,
    lora: PyTree | None,
    condition: Condition,
    keys: Key[Array, " b"],
    *,
    schedule: UniPCSchedule,
    streams: Streams,
) -> Rollout:
    """Sample one clip per key with UniPC, from the noise that `sampling.rollout` starts from. Traceable.

    Pinned places hold the scene's latents whenever the network looks, and at the end. States are float32.

    Args:
        denoise: (base, lora, x_t, t [b], condition) -> velocity, see `interfaces.Denoise`; with guidance, what
            `guidance.guided` returns.
        base: frozen weights, handed on to `denoise`.
        lora: the Executor's weights, handed on to `denoise`; None samples from the Demonstrator.
        condition: scene and text of every row.
        keys: one typed PRNG key a sample, from `sampling.sample_keys`.
        schedule: from `unipc_schedule`.
        streams: the model's latents, `interfaces.ModelFamily.latents`.
    """
    rows = keys.shape[0]

    def step(carry, inputs):
        x, last_x, last_clean, older_clean = carry
        t, told = (jnp.broadcast_to(value, (rows,)) for value in inputs[:2])
        correct, predict = inputs[2:]
        v = denoise(base, lora, x, told, condition)
        clean = clean_from_velocity(x, v, t)
        x = jax.tree.map(
            lambda *terms: sum(factor * term for factor, term in zip(correct, terms, strict=True)),
            last_x, clean, last_clean, older_clean,
        )  # fmt: skip
        x_next = jax.tree.map(
            lambda *terms: sum(factor * term for factor, term in zip(predict, terms, strict=True)), x, clean, last_clean
        )
        return (pin(x_next, condition.scene, streams), x, clean, last_clean), None

    start = initial_noise(keys, condition.scene, streams)
    nothing = jax.tree.map(jnp.zeros_like, start)
    tables = (schedule.times[:-1], schedule.times_told, schedule.corrector, schedule.predictor)
    (latents, *_), _ = jax.lax.scan(step, (start, start, nothing, nothing), jax.tree.map(jnp.asarray, tables))
    return Rollout(latents=latents)
