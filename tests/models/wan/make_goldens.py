"""Writes goldens/ from diffusers: random weights, inputs, what diffusers makes of them, and the full size's names.

    pip install -e '.[torch]' && python tests/models/wan/make_goldens.py

Every parameter is drawn anew: tables and gates that start at zero would hide what lies behind them.
"""

import gzip
import json
import pathlib
from typing import Any

import diffusers
import jax
import numpy as np
import peft
import PIL.Image
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from world_distill.core import sampling
from world_distill.structs import LatentSpec

FOLDER = pathlib.Path(__file__).parent / "goldens"
TRANSFORMER = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 20, "freq_dim": 32,
    "ffn_dim": 48, "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
    "rope_max_seq_len": 64, "in_channels": 6, "out_channels": 6,
}  # fmt: skip

VAES = {
    "2.1": {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1,
        "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
    },
    "2.2": {
        "base_dim": 4, "decoder_base_dim": 6, "z_dim": 6, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1,
        "temperal_downsample": [False, True, True], "is_residual": True, "in_channels": 12, "out_channels": 12,
        "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 6, "latents_std": [1.0] * 6,
    },
}  # fmt: skip

# (steps, shift) of the schedules that are kept.
SCHEDULES = ((1, 5.0), (2, 5.0), (8, 5.0), (50, 5.0), (20, 3.0), (10, 1.0))


class Euler(diffusers.FlowMatchEulerDiscreteScheduler):
    """Euler on the even grid, shifted once: left alone, diffusers shifts a grid that is shifted already."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(sigmas=np.linspace(1, 0, num_inference_steps + 1)[:-1], device=device)


def scheduler(name: str, shift: float) -> diffusers.SchedulerMixin:
    """Wan's default ("unipc"), or Euler's method ("euler")."""
    if name == "euler":
        return Euler(shift=shift)
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


def redraw(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The module with matrices of unit gain, norm gains near 1 and small biases, all random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(1 + 0.1 * noise if name.endswith(("weight", "gamma")) else 0.1 * noise)
    return module.eval()


def transformer(seed: int, grid: tuple[int, int, int], tokens: int) -> dict[str, np.ndarray]:
    """Weights (`w:NAME`), inputs and the velocity for latents of a grid, the first frame at time 0."""
    model = redraw(diffusers.WanTransformer3DModel(**TRANSFORMER), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    f, h, w = grid
    x = torch.randn(2, TRANSFORMER["in_channels"], f, h, w, generator=generator)
    text = torch.randn(2, tokens, TRANSFORMER["text_dim"], generator=generator)
    t = torch.tensor([0.9375, 0.41])
    times = torch.cat([torch.zeros(2, 1), t[:, None].expand(2, f - 1)], dim=1)
    by_token = (1000 * times).repeat_interleave((h // 2) * (w // 2), dim=1)
    with torch.no_grad():
        v = model(hidden_states=x, timestep=by_token, encoder_hidden_states=text).sample
    arrays = {"x": x, "t": t, "text": text, "v": v}
    return {k: a.numpy() for k, a in arrays.items()} | {f"w:{k}": a.numpy() for k, a in model.state_dict().items()}


def vae(version: str, seed: int, clip: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Weights, a clip, its latents, and the clip that these decode to."""
    model = redraw(diffusers.AutoencoderKLWan(**VAES[version]), seed)
    # Weights that float16 holds exactly: the file is half as large, and nothing is lost.
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(1, 3, *clip, generator=generator).clamp(-1, 1)
    with torch.no_grad():
        z = model.encode(x).latent_dist.mode()
        y = model.decode(z).sample
    arrays = {"x": x, "z": z, "y": y}
    weights = {f"w:{k}": v.half().numpy() for k, v in model.state_dict().items()}
    return {k: a.numpy() for k, a in arrays.items()} | weights


def schedules() -> dict[str, np.ndarray]:
    """`NAME_STEPS_SHIFT:sigmas` and `:timesteps` of both solvers."""
    arrays = {}
    for name in ("euler", "unipc"):
        for steps, shift in SCHEDULES:
            solver = scheduler(name, shift)
            solver.set_timesteps(steps)
            arrays[f"{name}_{steps}_{shift}:sigmas"] = solver.sigmas.numpy()
            arrays[f"{name}_{steps}_{shift}:timesteps"] = solver.timesteps.numpy()
    return arrays


def loops(seed: int, grid: tuple[int, int, int], tokens: int, steps: int = 8) -> tuple[dict, dict]:
    """Clips of diffusers' pipeline, one scene with two texts; and the transformer's weights.

    Returns:
      (noise, text, negative text, `NAME_SCALE` for the latents of each solver with guidance of that scale; weights).
      The noise is that of our own rollouts with the key `seed`. Frame 0 of the latents is the scene.
    """
    model = redraw(diffusers.WanTransformer3DModel(**TRANSFORMER), seed)
    codec = redraw(diffusers.AutoencoderKLWan(**VAES["2.2"]), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    f, h, w = grid
    keys = sampling.sample_keys(jax.random.key(seed, impl="threefry2x32"), np.arange(2))
    shape = (f, h, w, TRANSFORMER["in_channels"])
    noise = np.moveaxis(np.array(sampling.draw_noise(keys, 0, {"video": LatentSpec(shape)})["video"]), -1, 1)
    text = torch.randn(2, tokens, TRANSFORMER["text_dim"], generator=generator)
    negative = torch.randn(1, tokens, TRANSFORMER["text_dim"], generator=generator)
    image = np.random.default_rng(seed).integers(256, size=(16 * h, 16 * w, 3), dtype=np.uint8)
    arrays = {"noise": noise, "text": text.numpy(), "negative": negative[0].numpy()}
    for name in ("euler", "unipc"):
        pipeline = diffusers.WanImageToVideoPipeline(
            tokenizer=None, text_encoder=None, vae=codec, transformer=model, scheduler=scheduler(name, 5.0),
            expand_timesteps=True,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        for scale in (1, 5):
            arrays[f"{name}_{scale}"] = pipeline(
                image=PIL.Image.fromarray(image), height=16 * h, width=16 * w, num_frames=4 * f - 3,
                num_inference_steps=steps, guidance_scale=float(scale), latents=torch.from_numpy(noise),
                prompt_embeds=text, negative_prompt_embeds=negative.expand(2, -1, -1), output_type="latent",
            ).frames.numpy()  # fmt: skip
    return arrays, {name: array.numpy() for name, array in model.state_dict().items()}


# A change a B of strength alpha / rank in a few layers: the two blocks differ in what is adapted.
LORA = {"r": 3, "lora_alpha": 6, "target_modules": [
    "condition_embedder.text_embedder.linear_1", "blocks.0.attn1.to_q", "blocks.0.attn2.to_v", "blocks.0.ffn.net.2",
    "blocks.1.attn1.to_q", "blocks.1.attn1.to_out.0", "blocks.1.attn2.to_k", "blocks.1.ffn.net.0.proj",
]}  # fmt: skip


def lora_gradients(golden: dict[str, np.ndarray], seed: int, lora: dict[str, Any] = LORA) -> dict[str, np.ndarray]:
    """LoRA factors (`KEY`), random weights of the velocity (`weights`), its weighted sum's gradients (`grad:KEY`).

    Args:
      golden: what `transformer` returned; its network and inputs are used.
      seed: of factors and weights.
      lora: settings of PEFT.
    """
    model = diffusers.WanTransformer3DModel(**TRANSFORMER)
    model.load_state_dict({key[2:]: torch.from_numpy(x) for key, x in golden.items() if key.startswith("w:")})
    model.add_adapter(peft.LoraConfig(**lora))
    generator = torch.Generator().manual_seed(seed)
    factors = {k.replace(".default", ""): p for k, p in model.named_parameters() if "lora_" in k}
    with torch.no_grad():
        for factor in factors.values():
            factor.copy_(torch.randn(factor.shape, generator=generator) / factor.shape[1] ** 0.5)
    x, t, text = (torch.from_numpy(golden[key]) for key in ("x", "t", "text"))
    times = torch.cat([torch.zeros(len(x), 1), t[:, None].expand(-1, x.shape[2] - 1)], dim=1)
    by_token = (1000 * times).repeat_interleave((x.shape[3] // 2) * (x.shape[4] // 2), dim=1)
    weights = torch.randn(x.shape, generator=generator)
    v = model(hidden_states=x, timestep=by_token, encoder_hidden_states=text).sample
    (v * weights).sum().backward()
    arrays = factors | {f"grad:{key}": factor.grad for key, factor in factors.items()} | {"weights": weights}
    return {key: x.detach().numpy() for key, x in arrays.items()}


def rope(grid: tuple[int, int, int], rows: int, seed: int) -> dict[str, np.ndarray]:
    """Random rows of the rotary tables for heads of 128, a column for each pair, with the rows' numbers."""
    f, h, w = grid
    embed = WanRotaryPosEmbed(128, (1, 2, 2), 1024)
    cos, sin = (x[0, :, 0, ::2].numpy() for x in embed(torch.empty(1, 48, f, 2 * h, 2 * w)))
    row = np.sort(np.random.default_rng(seed).choice(f * h * w, rows, replace=False))
    row[-1] = f * h * w - 1
    return {"row": row, "cos": cos[row], "sin": sin[row]}


def official_shapes() -> dict[str, dict[str, list[int]]]:
    """Name -> shape of every tensor of Wan2.2-TI2V-5B, built without weights."""
    transformer = {
        "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 48, "out_channels": 48, "text_dim": 4096,
        "freq_dim": 256, "ffn_dim": 14336, "num_layers": 30, "cross_attn_norm": True, "rope_max_seq_len": 1024,
    }  # fmt: skip
    autoencoder = VAES["2.2"] | {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "num_res_blocks": 2,
        "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
    }  # fmt: skip
    with torch.device("meta"):
        models = {
            "transformer": diffusers.WanTransformer3DModel(**transformer),
            "vae": diffusers.AutoencoderKLWan(**autoencoder),
        }
    return {part: {k: list(v.shape) for k, v in model.state_dict().items()} for part, model in models.items()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for seed, grid, tokens in ((0, (3, 4, 6), 11), (1, (2, 10, 4), 5)):
        f, h, w = grid
        np.savez_compressed(FOLDER / f"transformer_{f}x{h}x{w}.npz", **transformer(seed, grid, tokens))
    # The weights are those of transformer_3x4x6.npz, which has the same seed.
    np.savez_compressed(FOLDER / "samplers.npz", **schedules(), **loops(0, (3, 4, 6), 11)[0])
    for version, seed, clip in (("2.1", 2, (9, 16, 24)), ("2.2", 3, (13, 32, 48))):
        np.savez_compressed(FOLDER / f"vae_{version}.npz", **vae(version, seed, clip))
    with np.load(FOLDER / "transformer_3x4x6.npz") as golden:
        np.savez_compressed(FOLDER / "lora_gradients.npz", **lora_gradients(dict(golden), seed=4))
    np.savez_compressed(FOLDER / "rope_31x22x40.npz", **rope((31, 22, 40), rows=200, seed=5))
    text = json.dumps(official_shapes(), separators=(",", ":"))
    (FOLDER / "ti2v_5b_shapes.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
