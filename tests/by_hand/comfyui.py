"""Our files in ComfyUI's own model code: `python tests/by_hand/comfyui.py COMFYUI`, a folder with its repository.

To be run by hand, with the extra `torch` and ComfyUI's requirements installed; ComfyUI is under the GPL, and nothing of
it is in this repository. A small random Wan is exported as a LoRA file in our default layout, and merged for ComfyUI in
float32 and in bfloat16. ComfyUI's detection, loader, LoRA patcher and network then take them, and everything is
compared: names, weights, and the velocity that its network computes with the velocity of ours. Prints the largest
differences, and ends with exit code 1 if one is above its tolerance.
"""

import argparse
import importlib.machinery
import pathlib
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from world_distill.models.lora import merge  # noqa: E402
from world_distill.models.wan.family import build  # noqa: E402
from world_distill.weights.lora_files import write_lora  # noqa: E402
from world_distill.weights.lora_layouts import LoraModel  # noqa: E402
from world_distill.weights.merged_model import COMFY_PREFIX, write_merged_file  # noqa: E402

# ComfyUI takes heads of 128 and Wan2.2's 48 channels for granted.
SIZES = {"channels": 48, "width": 256, "depth": 2, "heads": 2, "mlp": 512, "text_width": 4096, "time_width": 256}
SCALE = 0.5
TOLERANCE = {"lora weights": 1e-5, "merged weights": 1e-6, "merged bfloat16": 1e-2, "velocity": 1e-4, "vae names": 0.0}
OPTIONAL = ("torchaudio", "torchsde", "torchvision", "kornia")  # that Wan's code imports and does not use


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=pathlib.Path)
    comfy = import_comfyui(parser.parse_args().comfyui)
    family, base, lora = make_model()
    read, found = flatten_dict(base, sep=".").__getitem__, {}
    merged = merge(base["transformer"], lora, SCALE)
    wanted = originals(family, merged)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: pathlib.Path(folder) / f"{name}.safetensors" for name in ("lora", "merged", "half")}
        write_lora(files["lora"], jax.device_get(lora), LoraModel.of(family), scale=SCALE, layout="comfy")
        write_merged_file(files["merged"], family, read, lora)
        write_merged_file(files["half"], family, read, lora, dtype="bfloat16")

        # The merged file, as "Load Diffusion Model" reads it.
        network, prefix = load(comfy, files["merged"])
        assert prefix == COMFY_PREFIX, prefix
        found["merged weights"] = difference({k: v.numpy() for k, v in network.state_dict().items()}, wanted)
        half, _ = load(comfy, files["half"])
        found["merged bfloat16"] = difference({k: v.float().numpy() for k, v in half.state_dict().items()}, wanted)

        # The LoRA on the base's weights, as "Load LoRA" adds it.
        plain = originals(family, base["transformer"])
        network.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in plain.items()})
        patched = add_lora(comfy, network, files["lora"])
        found["lora weights"] = difference(patched, wanted)
        network.load_state_dict({name: torch.from_numpy(x) for name, x in patched.items()})
        found["velocity"] = difference({"v": velocity(network)}, {"v": our_velocity(family, merged)})
    found["vae names"] = vae_names(comfy)

    for name, value in found.items():
        sys.stdout.write(f"{name:16} {value:.1e} of the largest value, {TOLERANCE[name]:.0e} allowed\n")
    return int(any(not value <= TOLERANCE[name] for name, value in found.items()))


def import_comfyui(folder: pathlib.Path):
    """The package `comfy` of a checkout, set to the CPU."""
    sys.path.insert(0, str(folder))
    sys.argv = [sys.argv[0], "--cpu"]
    for name in OPTIONAL:
        try:
            __import__(name)
        except ImportError:
            stand_in = mock.MagicMock(__path__=[], __spec__=importlib.machinery.ModuleSpec(name, None))
            sys.modules[name] = stand_in
            sys.modules |= {f"{name}.{part}": mock.MagicMock() for part in ("functional", "transforms")}
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.ldm.wan.model
    import comfy.ldm.wan.vae2_2
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_detection
    import comfy.ops
    import comfy.utils

    return comfy


def make_model():
    """(family, base, Executor), all random."""
    vae = {"channels": 48, "encoder_width": 4, "decoder_width": 4, "blocks": 1}
    family = build(**SIZES, vae=vae, size=(64, 64), frames=5, dtype="float32", lora_scale=SCALE, remat="none")
    rng, shapes = np.random.default_rng(0), jax.eval_shape(family.init_base, jax.random.key(0))
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) / max(x.shape[-2:]) ** 0.5, jnp.float32)  # noqa: E731
    lora = jax.eval_shape(lambda: family.init_lora(jax.random.key(0), shapes, rank=4))
    return family, jax.tree.map(draw, shapes), jax.tree.map(draw, lora)


def originals(family, transformer) -> dict[str, np.ndarray]:
    """Our transformer's arrays under their original names."""
    flat = flatten_dict(jax.device_get(transformer), sep=".")
    entries = family.published.entries("original")["transformer"]
    return {name: x for entry in entries for name, x in entry.scatter(np.asarray(flat[entry.path])).items()}


def load(comfy, path: pathlib.Path):
    """(network, prefix) that ComfyUI finds in a file; every tensor has to have its place."""
    tensors = comfy.utils.load_torch_file(str(path))
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    settings = comfy.model_detection.detect_unet_config(tensors, prefix)
    assert comfy.model_detection.model_config_from_unet(dict(tensors), prefix) is not None, settings
    settings = {name: value for name, value in settings.items() if name != "image_model"}
    network = comfy.ldm.wan.model.WanModel(
        operations=comfy.ops.disable_weight_init, text_dim=SIZES["text_width"], **settings
    )
    network.load_state_dict({name.removeprefix(prefix): x for name, x in tensors.items()}, strict=True)
    return network.float().eval(), prefix


def add_lora(comfy, network, path: pathlib.Path) -> dict[str, np.ndarray]:
    """The network's weights with a LoRA file added by ComfyUI; every tensor of the file has to be used."""
    model = torch.nn.Module()
    model.diffusion_model, model.model_config = network, mock.Mock(unet_config={})
    tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(path)))
    patches = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model, {}))
    weights = {f"diffusion_model.{name}": x.clone() for name, x in network.state_dict().items()}
    assert 2 * len(patches) == len(tensors), f"{len(patches)} layers of {len(tensors)} tensors"
    for name, patch in patches.items():
        weights[name] = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weights[name], name)
    return {name.removeprefix("diffusion_model."): x.numpy() for name, x in weights.items()}


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents [b f h w c] with a clean first frame, time of each frame, text states [b l e]."""
    rng = np.random.default_rng(1)
    x, text = rng.normal(size=(1, 3, 8, 12, 48)), rng.normal(size=(1, 512, SIZES["text_width"]))
    return x.astype(np.float32), np.array([[0.0, 0.625, 0.625]], np.float32), text.astype(np.float32)


def velocity(network) -> np.ndarray:
    x, t, text = inputs()
    with torch.no_grad():
        latents = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
        v = network(latents, torch.from_numpy(1000 * t), torch.from_numpy(text))
    return np.moveaxis(v.numpy(), 1, -1)


def our_velocity(family, transformer) -> np.ndarray:
    return np.asarray(jax.jit(family.network)(transformer, *inputs()))


def vae_names(comfy) -> float:
    """How many names and shapes of the published autoencoder differ between ComfyUI's network and our table."""
    theirs = comfy.ldm.wan.vae2_2.WanVAE(
        dim=160, dec_dim=256, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], dropout=0.0,
    )  # fmt: skip
    shapes = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    entries = build().published.entries("original")["vae"]
    return float(len(shapes.items() ^ {name: entry.shape for entry in entries for name in entry.names}.items()))


def difference(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest difference, of the largest value of its array; the names have to be the same."""
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:5]
    return max(float(np.abs(found[name] - x).max() / np.abs(x).max()) for name, x in wanted.items())


if __name__ == "__main__":
    sys.exit(main())
