"""Latents of two streams: a picture with a pinned frame, and a sound of which one moment does not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from world_distill.core import flow, losses, metrics, sampling, unipc
from world_distill.structs import Condition, LatentSpec, Tokens

B = 3
STREAMS = {
    "video": LatentSpec((3, 2, 2, 4), moves=np.array([False, True, True])),
    "audio": LatentSpec((5, 2), counts=np.array([True, True, True, False, True])),
}
COUNTS = sampling.counted(STREAMS)


def draw(seed, scale=1.0):
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * random.normal(size=(B, *spec.shape)), jnp.float32) for name, spec in STREAMS.items()
    }


def counted(latents):
    """The entries that count, all streams behind each other [b m]."""
    return np.concatenate(
        [np.asarray(latents[name])[:, spec.counts].reshape(B, -1) for name, spec in STREAMS.items()], axis=1
    ).astype(np.float64)


def keys():
    return sampling.sample_keys(jax.random.key(3), np.arange(B))


def condition():
    scene = jnp.asarray(np.random.default_rng(9).normal(size=(B, 1, 2, 2, 4)), jnp.float32)
    text = Tokens(jnp.zeros((B, 1, 1)), jnp.ones((B, 1), bool))
    return Condition({"text": text}, {"video": scene, "glance": jnp.ones((B, 7))})


def denoise(base, lora, x, t, condition):
    """Each stream hears the other one."""
    loud = jnp.mean(x["audio"], axis=(1, 2))[:, None, None, None, None]
    bright = jnp.mean(x["video"], axis=(1, 2, 3, 4))[:, None, None]
    return {"video": jnp.sin(2 * x["video"] + loud), "audio": jnp.cos(x["audio"]) * bright}


def test_means_weigh_all_counted_entries_alike():
    x = draw(0)
    np.testing.assert_allclose(flow.masked_mean(x, COUNTS), counted(x).mean(1), atol=1e-6)
    everywhere = np.concatenate([np.asarray(v).reshape(B, -1) for v in x.values()], axis=1)
    np.testing.assert_allclose(flow.masked_mean(x, None), everywhere.mean(1), atol=1e-6)
    silent = COUNTS | {"audio": np.zeros(5, bool)}
    np.testing.assert_array_equal(flow.masked_mean(x, silent), flow.masked_mean(x["video"], COUNTS["video"]))


def test_a_stream_that_does_not_count_may_be_anything():
    x = draw(0) | {"audio": jnp.full((B, 5, 2), jnp.nan)}
    assert np.isfinite(flow.masked_mean(x, COUNTS | {"audio": np.zeros(5, bool)})).all()


@pytest.mark.parametrize(
    "counts, message",
    [({"video": COUNTS["video"]}, "not the same"), ({k: 0 * v for k, v in COUNTS.items()}, "no place")],
)
def test_bad_places_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        flow.masked_mean(draw(0), counts)


def test_losses_are_those_of_one_long_vector():
    v, r = draw(1), draw(2)
    long_v, long_r = (jnp.asarray(counted(x)[..., None], jnp.float32) for x in (v, r))  # one channel
    for loss in (losses.velocity_gap, losses.decoupled_gap):
        np.testing.assert_allclose(loss(v, r, COUNTS), loss(long_v, long_r, None), rtol=1e-5)
    t, a = jnp.float32([0.2, 0.5, 0.9]), jnp.float32([0.3, -0.6, 1.0])
    ours = losses.nft_loss(v, r, draw(4), t, a, 0.7, COUNTS)
    target = jnp.asarray(counted(draw(4))[..., None], jnp.float32)
    np.testing.assert_allclose(ours, losses.nft_loss(long_v, long_r, target, t, a, 0.7, None), rtol=1e-5)
    found = metrics.velocity_diagnostics(v, r, COUNTS)
    flat = metrics.velocity_diagnostics(long_v, long_r, None)
    for name in ("cosine", "norm_ratio"):
        np.testing.assert_allclose(found[name], flat[name], rtol=1e-5)


def test_the_dc_share_is_each_streams_own():
    v = draw(1)
    shifted = {"video": v["video"] + 2.0, "audio": v["audio"] - 3.0}
    np.testing.assert_allclose(metrics.velocity_diagnostics(shifted, v, COUNTS)["dc"], 1, atol=1e-4)
    # Half of the sound's moments that count go up, half go down: no constant offset is left of it.
    waving = v["audio"] + 3.0 * jnp.asarray([1.0, -1.0, 1.0, 9.0, -1.0])[None, :, None]
    found = metrics.velocity_diagnostics({"video": v["video"], "audio": waving}, v, COUNTS)["dc"]
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_the_first_stream_draws_the_noise_that_it_draws_alone():
    both = sampling.draw_noise(keys(), 2, STREAMS)
    alone = sampling.draw_noise(keys(), 2, {"video": STREAMS["video"]})
    np.testing.assert_array_equal(both["video"], alone["video"])
    audio = sampling.draw_noise(keys(), 2, {"audio": STREAMS["audio"]})["audio"]
    assert not np.isin(both["audio"], both["video"]).any() and not np.isin(both["audio"], audio).any()


def test_a_rollout_is_the_plain_loop_over_streams():
    times = flow.sampling_times(5, 2.0)
    g = sampling.flow_grpo_diffusion(times, 0.7)
    c = condition()
    roll = jax.jit(
        lambda: sampling.rollout(
            denoise, None, None, c, keys(), times=times, streams=STREAMS, diffusion=g, keep_states=True
        )
    )
    out = jax.device_get(roll())
    x = jax.tree.map(np.array, sampling.draw_noise(keys(), 0, STREAMS))
    x["video"][:, :1] = c.scene["video"]
    for i in range(5):
        t, dt = float(times[i]), float(times[i + 1] - times[i])
        for name in STREAMS:
            np.testing.assert_allclose(out.states[name][i], x[name], atol=3e-5)
        v = jax.device_get(denoise(None, None, x, None, c))
        noise = jax.device_get(sampling.draw_noise(keys(), i + 1, STREAMS))
        mean, following = {}, {}
        for name, spec in STREAMS.items():
            places = (1, -1, *[1] * (x[name].ndim - 2))
            loud = g[i] * spec.counts.reshape(places)  # uncounted places take the Euler step
            mean[name] = x[name] + (v[name] + loud**2 / (2 * t) * (x[name] + (1 - t) * v[name])) * dt
            moved = mean[name] + loud * np.sqrt(-dt) * noise[name]
            following[name] = np.where(spec.moves.reshape(places), moved, x[name])
        std = g[i] * np.sqrt(-dt)
        if std:
            z = (counted(following) - counted(mean)) / std
            expected = (-(z**2) / 2 - np.log(std) - np.log(2 * np.pi) / 2).mean(1)
            np.testing.assert_allclose(out.log_probs[i], expected, atol=3e-4)
        x = following
    for name in STREAMS:
        np.testing.assert_allclose(out.latents[name], x[name], atol=3e-5)
    np.testing.assert_array_equal(out.velocities["video"][:, :, 0], 0)
    assert (out.velocities["audio"] != 0).all()


def test_unipc_carries_every_stream():
    schedule = unipc.unipc_schedule(12, 3.0)

    def towards(base, lora, x, t, c):
        return {name: (x[name] - goal[name]) / flow.broadcast_time(t, x[name].ndim) for name in x}

    goal, c = draw(5), condition()
    exact = schedule._replace(times_told=schedule.times[:-1])
    out = unipc.unipc_rollout(towards, None, None, c, keys(), schedule=exact, streams=STREAMS).latents
    np.testing.assert_allclose(out["audio"], goal["audio"], atol=1e-5)
    np.testing.assert_allclose(out["video"][:, 1:], goal["video"][:, 1:], atol=1e-5)
    np.testing.assert_array_equal(out["video"][:, :1], c.scene["video"])


def test_a_pinned_place_cannot_count():
    with pytest.raises(ValueError, match=r"pinned places count: \[0\]"):
        LatentSpec((2, 3), moves=np.array([False, True]), counts=np.array([True, True]))
    with pytest.raises(ValueError, match="2 places"):
        LatentSpec((2, 3), moves=np.array([True]))
