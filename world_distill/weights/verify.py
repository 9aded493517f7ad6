"""`world-distill convert --verify`: a converted model held to diffusers, in float32 on the CPU, on random inputs.

Ours is read from the checkpoint, theirs from the published files, one part and one of the two at a time. What the
conversion rounded is rounded on their side as well, so that the difference remains one of networks and layouts.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from world_distill import models
from world_distill.devices.sharding import make_mesh
from world_distill.errors import UserError
from world_distill.models.tensor_map import Entry
from world_distill.models.wan import vae
from world_distill.models.wan.family import WanFamily, make_codec
from world_distill.storage import array_store
from world_distill.structs import PyTree
from world_distill.weights import base_model, published

TOLERANCE = 5e-4  # of the largest value
GRID = (3, 4, 6)  # tokens: frames, rows, columns
TOKENS = 32  # of text
TIME = 0.625  # of the frames after the first, which is clean


def check_installed() -> None:
    """Raises a UserError if there is nothing to compare with."""
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--verify needs {error.name}, which is in the extra `torch`: pip install -e '.[torch]'"
        ) from error


def check_same_model(source: pathlib.Path, dest: pathlib.Path, dtype: str) -> None:
    """Raises a UserError if the checkpoint DEST is no conversion of SOURCE to `dtype` ("keep": any)."""
    family, model = published.describe(source)
    _, metadata = array_store.describe(dest)
    # As JSON has it, where tuples are lists.
    if metadata.get("family") != family or metadata.get("model") != json.loads(json.dumps(model.sizes)):
        raise UserError(f"{dest} is there already, and holds another model than {source}")
    stored = {str(kind) for name, kind in array_store.types(dest).items() if name.startswith("transformer.")}
    if dtype not in ("keep", *stored):
        raise UserError(f"{dest} is there already, and its transformer is {', '.join(sorted(stored))}, not {dtype}")


def compare(source: pathlib.Path, dest: pathlib.Path) -> dict[str, Any]:
    """Largest differences between the checkpoint DEST and diffusers with the folder SOURCE.

    Returns:
      `transformer`, `vae_encode`, `vae_decode`: `difference`, and `relative` to diffusers' largest value;
      `rounded`: parts whose weights were rounded on their side, as the conversion rounded ours; `tolerance`.

    Raises:
      UserError, ConvertedError: DEST cannot be read.
    """
    name, model = published.describe(source)
    codec = make_codec(model.sizes["vae"])
    side = 2 * codec.space * model.sizes["patch"]
    sizes = {"size": (side, side), "frames": 1 + codec.time, "dtype": "float32", "remat": "none"}
    family = models.build(name, **model.sizes, **sizes)
    types, results, rounded = array_store.types(dest), {}, []
    for part, (inputs, ours, theirs) in {
        "transformer": (_transformer_inputs, _our_transformer, _their_transformer),
        "vae": (_vae_inputs, _our_vae, _their_vae),
    }.items():
        x = inputs(family)
        found = ours(family, _load_ours(family, dest, part), **x)
        network = _load_theirs(source, part)
        if _round(network, model.entries[part], {k.removeprefix(f"{part}."): v for k, v in types.items()}):
            rounded.append(part)
        expected = theirs(network, **x)
        del network  # before the next part is read
        results |= {key: _difference(found[key], expected[key]) for key in expected}
    return results | {"rounded": rounded, "tolerance": TOLERANCE}


def lines(results: Mapping[str, Any]) -> list[str]:
    """The differences, for people."""
    text = [
        f"{key}: largest difference from diffusers {x['difference']:.2e}, {x['relative']:.2e} of the largest value"
        for key, x in results.items()
        if isinstance(x, dict)
    ]
    if results["rounded"]:
        text.append(f"the conversion rounded the weights of {', '.join(results['rounded'])}; so were diffusers' here")
    return text


def failures(results: Mapping[str, Any]) -> list[str]:
    """What differs by more than the tolerance, or is not finite."""
    return [k for k, x in results.items() if isinstance(x, dict) and not x["relative"] <= results["tolerance"]]


def _difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    difference = float(np.abs(ours - theirs).max())
    return {"difference": difference, "relative": difference / float(np.abs(theirs).max())}


def _load_ours(family: WanFamily, dest: pathlib.Path, part: str) -> PyTree:
    mesh = make_mesh(devices=jax.devices("cpu")[:1])
    return base_model.load_base(family, ConfigDict({"base": str(dest)}), mesh, parts=(part,))[part]


def _load_theirs(source: pathlib.Path, part: str) -> Any:
    import diffusers
    import torch

    classes: Any = diffusers  # it makes its names when they are asked for
    kind = classes.WanTransformer3DModel if part == "transformer" else classes.AutoencoderKLWan
    return kind.from_pretrained(source / part, torch_dtype=torch.float32, local_files_only=True).eval()


def _round(network: Any, entries: Iterable[Entry], types: Mapping[str, np.dtype]) -> bool:
    """Rounds their weights to the types that ours are stored in; returns whether that changed any."""
    import torch

    weights, changed = network.state_dict(), False
    for entry in entries:
        for name in entry.names:
            rounded = weights[name].to(getattr(torch, str(types[entry.path]))).float()
            changed |= not torch.equal(rounded, weights[name])
            weights[name].copy_(rounded)
    return changed


# Each part's random inputs, and what the two make of them; ours has channels last -------------------------------------


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def _transformer_inputs(family: WanFamily) -> dict[str, np.ndarray]:
    config, (f, h, w) = family.config, GRID
    return {
        "x": _normal(1, f, h * config.patch, w * config.patch, config.channels),
        "t": np.array([[0.0] + [TIME] * (f - 1)], np.float32),
        "text": _normal(1, TOKENS, config.text_width),
    }


def _our_transformer(family: WanFamily, weights: PyTree, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    return {"transformer": np.asarray(jax.jit(family.network)(weights, *inputs.values()))}


def _their_transformer(network: Any, x: np.ndarray, t: np.ndarray, text: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    by_token = torch.from_numpy(1000 * t).repeat_interleave(GRID[1] * GRID[2], dim=1)
    states, words = torch.from_numpy(np.moveaxis(x, -1, 1)), torch.from_numpy(text)
    with torch.inference_mode():
        v = network(hidden_states=states, timestep=by_token, encoder_hidden_states=words).sample
    return {"transformer": np.moveaxis(v.numpy(), 1, -1)}


def _vae_inputs(family: WanFamily) -> dict[str, np.ndarray]:
    assert family.image_size is not None
    clip = _normal(1, 1 + family.codec.time, *family.image_size, 3)
    return {"clip": np.clip(clip / 2, -1, 1), "latents": _normal(1, *family.latent_shape)}


def _our_vae(family: WanFamily, weights: PyTree, clip: np.ndarray, latents: np.ndarray) -> dict[str, np.ndarray]:
    encode, decode = (jax.jit(f, static_argnums=2) for f in (vae.encode, vae.decode))
    return {
        "vae_encode": np.asarray(encode(weights, clip, family.codec)),
        "vae_decode": np.asarray(decode(weights, latents, family.codec)),
    }


def _their_vae(network: Any, clip: np.ndarray, latents: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    mean, std = (np.array(network.config[f"latents_{name}"], np.float32) for name in ("mean", "std"))
    with torch.inference_mode():
        encoded = network.encode(torch.from_numpy(np.moveaxis(clip, -1, 1))).latent_dist.mode()
        decoded = network.decode(torch.from_numpy(np.moveaxis(latents * std + mean, -1, 1))).sample
    encoded, decoded = (np.moveaxis(x.numpy(), 1, -1) for x in (encoded, decoded))
    return {"vae_encode": (encoded - mean) / std, "vae_decode": decoded}
