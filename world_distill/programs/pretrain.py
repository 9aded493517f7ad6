"""`world-distill pretrain`: trains the sandbox's base model, by plain flow matching on captioned clips.

    loss = E t^p |v(x_t, t | scene, caption) - (eps - x_0)|^2,    t = shift(u), u ~ U(0, 1) stratified over the batch

t v is the error of the clean latents: p = 2 weighs it alike at all times, and p = 0 spends the network on the detail of
small times. Some captions are replaced by the empty text, which classifier-free guidance needs. The clips come from a
factory that the config names, and are a pure function of (seed, step), so a run that is interrupted continues bit for
bit. The result is the exponential average of the weights.
"""

import concurrent.futures
import functools
import json
import re
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from ml_collections import ConfigDict, FrozenConfigDict

import world_distill
from world_distill import build, console
from world_distill.core import flow, losses, sampling, schedules
from world_distill.data.records.batches import pad_texts
from world_distill.devices.sharding import batch_sharding, replicated
from world_distill.errors import UserError
from world_distill.interfaces import ModelFamily
from world_distill.storage.checkpoints import Checkpointer, make_metadata
from world_distill.storage.metric_log import MetricLog
from world_distill.storage.weight_files import load_weights, save_weights
from world_distill.structs import Condition, PyTree, Texts
from world_distill.training import optimizers
from world_distill.weights import base_model


@struct.dataclass
class PretrainState:
    """What pretraining changes; `average` is what is kept in the end."""

    step: jax.Array
    weights: PyTree
    average: PyTree
    opt_state: PyTree


def make_step(family: ModelFamily, optimizer: optax.GradientTransformation, settings):
    """(state, clips [b F H W 3] uint8, texts, key) -> (state, metrics)."""

    def step(state: PretrainState, clips, texts: Texts, key):
        count = clips.shape[0]
        time_key, noise_key = jax.random.split(jax.random.fold_in(key, state.step))
        clean = family.codec.encode(state.weights, clips)
        scene = {name: clean[name][:, : shape.shape[0]] for name, shape in family.encoders.scenes.items()}
        condition = Condition(texts, scene)
        u = (jnp.arange(count) + jax.random.uniform(time_key, (count,))) / count
        # A share of the batch is not shifted: the last sampling steps need the small times too.
        plain = jnp.arange(count) % settings.plain_every == 0
        t = jnp.where(plain, u, flow.shift_times(u, settings.shift))
        keys = sampling.sample_keys(noise_key, jnp.arange(count))
        eps = sampling.draw_noise(keys, 0, family.latents)
        x_t = sampling.pin(flow.interpolate(clean, eps, t), scene, family.latents)

        def loss(weights):
            v = family.denoise(weights, None, x_t, t, condition)
            rows = losses.velocity_gap(v, flow.velocity(clean, eps), sampling.counted(family.latents))
            return (rows * t**settings.loss_power).mean(), (rows * jnp.square(t)).mean()

        (value, clean_error), gradients = jax.value_and_grad(loss, has_aux=True)(state.weights)
        changes, opt_state = optimizer.update(gradients, state.opt_state, state.weights)
        weights = optax.apply_updates(state.weights, changes)
        decay = jnp.minimum(settings.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        average = schedules.ema_update(state.average, weights, decay)
        metrics = {"loss": value, "clean_error": clean_error, "gradient_norm": optax.tree.norm(gradients)}
        return PretrainState(state.step + 1, weights, average, opt_state), metrics

    return step


def started_from(loaded: PyTree, new: PyTree, fresh: str) -> PyTree:
    """The `loaded` weights, but the `new` ones where the pattern `fresh` matches a weight's whole dotted name.

    Raises:
      UserError: a pattern that matches no weight.
    """
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_leaves_with_path(new)
    ]
    if fresh and not any(re.fullmatch(fresh, name) for name in names):
        raise UserError(f"pretrain.fresh={fresh!r} matches no weight; there are: {', '.join(names)}")
    old, tree = jax.tree.flatten(loaded)
    chosen = [n if re.fullmatch(fresh, k) else o for k, o, n in zip(names, old, jax.tree.leaves(new), strict=True)]
    return tree.unflatten([jax.device_put(x, y.sharding) for x, y in zip(chosen, jax.tree.leaves(new), strict=True)])


def drop_captions(captions: Sequence[str], share: float, seed: int, step: int) -> list[str]:
    """The captions of update `step`, each replaced by the empty text with probability `share`.

    Classifier-free guidance needs a model that knows the empty text. The choice is a function of (seed, step, row).
    """
    dropped = np.random.default_rng([seed, 4, step]).random(len(captions)) < share
    return ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]


def load_batch(config, family: ModelFamily, source, step: int) -> tuple[np.ndarray, Texts]:
    """Clips [b F H W 3] uint8 of update `step` from the factory's `source`, and their captions."""
    clips, captions = source.batch(config.seed, step, config.pretrain.batch)
    captions = drop_captions(captions, config.pretrain.drop_text, config.seed, step)
    return clips, encode_captions(config, family, captions)


def encode_captions(config, family: ModelFamily, captions: Sequence[str]) -> Texts:
    """Padded states of captions, on the host."""
    lengths = build.text_lengths(family, config)
    states = family.encoders.text(captions)
    return {name: pad_texts(states[name], length) for name, length in lengths.items()}


def make_training(config, family: ModelFamily, mesh: jax.sharding.Mesh):
    """(first state, jitted step) of the config's pretraining, on the mesh; see `make_step`."""
    init, step = _programs(family, FrozenConfigDict(config.pretrain), mesh)
    weights = jax.jit(family.init_base, out_shardings=replicated(mesh))(
        jax.random.fold_in(jax.random.key(config.seed), 0)
    )
    if config.pretrain.start:
        loaded = base_model.load_base(family, ConfigDict({"base": config.pretrain.start}), mesh)
        weights = started_from(loaded, weights, config.pretrain.fresh)
    return init(weights), step


@functools.lru_cache(maxsize=4)
def _programs(family: ModelFamily, settings: FrozenConfigDict, mesh: jax.sharding.Mesh):
    """(weights -> first state, step), jitted; the same ones for the same settings."""
    optimizer = optimizers.make_optimizer(
        name=settings.optimizer, learning_rate=settings.learning_rate, grad_clip=settings.grad_clip,
        warmup_steps=settings.warmup, decay_steps=settings.steps, axes=family.base_axes(),
    )  # fmt: skip
    everywhere, rows = replicated(mesh), batch_sharding(mesh)

    def init(weights):
        return PretrainState(
            jnp.zeros((), jnp.int32), weights, jax.tree.map(jnp.copy, weights), optimizer.init(weights)
        )

    # A base of this kind is small: every device holds all of it, the batch is split.
    step = jax.jit(
        make_step(family, optimizer, settings),
        in_shardings=(everywhere, rows, rows, everywhere), out_shardings=everywhere, donate_argnums=0,
    )  # fmt: skip
    return jax.jit(init, out_shardings=everywhere), step


def pretrain(config, workdir, *, command: str) -> dict:
    """Runs (or continues) pretraining; returns steps, last loss and the path of the weights."""
    settings = config.pretrain
    mesh = build.start_devices(config)
    family = build.make_family(config, mesh)
    if family.int8_kernels():
        raise UserError(
            "model.int8 is for kernels that stay frozen, and `pretrain` trains them: set model.int8 = False"
        )
    source = build.make(config, "clips")
    state, step_fn = make_training(config, family, mesh)
    rows = batch_sharding(mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    metadata = make_metadata(config.to_dict())
    step_key = jax.random.fold_in(jax.random.key(config.seed), 1)
    load = functools.partial(load_batch, config, family, source)

    with (
        Checkpointer(workdir / "pretrain", keep=1, save_every=settings.save_every) as checkpointer,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        restored = checkpointer.restore_latest(state, expect=metadata)
        if restored is not None:
            state = restored[0]
        first = int(state.step)
        log = MetricLog(workdir, first, name="pretrain")
        ahead = [pool.submit(load, step) for step in range(first, min(first + 3, settings.steps))]
        window, started, loss = [], time.perf_counter(), float("nan")
        for step in range(first, settings.steps):
            batch = ahead.pop(0).result()
            if step + 3 < settings.steps:
                ahead.append(pool.submit(load, step + 3))
            state, metrics = step_fn(state, *(jax.device_put(x, rows) for x in batch), step_key)
            window.append(metrics)
            if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                line = {name: float(np.mean([m[name] for m in jax.device_get(window)])) for name in metrics}
                loss = line["loss"]
                if not np.isfinite(loss):
                    raise FloatingPointError(f"the pretraining loss is {loss} at step {step + 1}")
                rate = len(window) * settings.batch / (time.perf_counter() - started)
                console.say(
                    f"step {step + 1}/{settings.steps}  loss {loss:.4f}  clean {line['clean_error']:.5f}  "
                    f"{rate:.0f} clips/s"
                )
                log.write(step + 1, line)
                window, started = [], time.perf_counter()
            checkpointer.save(step + 1, state, b"{}", metadata, force=step + 1 == settings.steps)
    log.close()
    weights = workdir / "base.safetensors"
    facts = describe(config, family, command)
    save_weights(weights, jax.device_get(state.average), facts)
    return {"steps": settings.steps, "loss": loss, "weights": str(weights), "seed": config.seed}


def describe(config, family: ModelFamily, command: str) -> dict[str, str]:
    """Metadata of the weights: how they were made; `start` is the metadata of the file that they started from."""
    facts = {"command": command, "seed": config.seed, "steps": config.pretrain.steps}
    facts["version"] = world_distill.__version__
    if config.pretrain.start:
        start = base_model.base_path(family, config.pretrain.start)
        assert start is not None  # it is named
        facts["start"] = json.dumps(load_weights(start)[1])
    return {name: str(value) for name, value in facts.items()}
