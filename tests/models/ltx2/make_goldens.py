"""Writes goldens/ from diffusers: random weights, inputs, what diffusers makes of them, and the full size's names.

    pip install -e '.[torch]' && python -m tests.models.ltx2.make_goldens

Every parameter is drawn anew: tables and gates that start at zero would hide what lies behind them. diffusers before
0.39 put the connectors' tokens in another order.
"""

import gzip
import json
import pathlib
from typing import Any

import diffusers
import numpy as np
import peft
import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from tests.models.wan.make_goldens import redraw

FOLDER = pathlib.Path(__file__).parent / "goldens"
FPS = 25.0
# 20 channels of the video's heads turn: 6 frequencies on each of three axes, and 2 are left over.
TRANSFORMER = {
    "in_channels": 6, "out_channels": 6, "num_attention_heads": 4, "attention_head_dim": 10, "cross_attention_dim": 40,
    "audio_in_channels": 5, "audio_out_channels": 5, "audio_num_attention_heads": 4, "audio_attention_head_dim": 6,
    "audio_cross_attention_dim": 24, "num_layers": 2, "caption_channels": 14, "rope_type": "split",
}  # fmt: skip
CONNECTORS = {
    "caption_channels": 24, "text_proj_in_factor": 3, "rope_type": "split",
    **{f"{stream}_connector_{key}": value for stream in ("video", "audio") for key, value in (
        ("num_attention_heads", 3), ("attention_head_dim", 8), ("num_layers", 2), ("num_learnable_registers", 4)
    )},
}  # fmt: skip


def halved(module: torch.nn.Module) -> torch.nn.Module:
    """The module with weights that float16 holds exactly: a file of them is half as large."""
    module.load_state_dict({name: x.half().float() for name, x in module.state_dict().items()})
    return module


def weights_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Its weights under `w:NAME`, as float16."""
    return {f"w:{name}": x.half().numpy() for name, x in module.state_dict().items()}


def transformer(seed: int, grid: tuple[int, int, int], moments: int, tokens: int) -> dict[str, np.ndarray]:
    """Weights (`w:NAME`), inputs, the velocities of both streams, and those of the video alone (`isolated`).

    The first frame has time 0, and so have the first two moments of sound.
    """
    model = halved(redraw(diffusers.LTX2VideoTransformer3DModel(**TRANSFORMER), seed))
    generator = torch.Generator().manual_seed(seed + 1)
    f, h, w = grid
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arrays = {
        "video": draw(2, f, h, w, TRANSFORMER["in_channels"]),
        "audio": draw(2, moments, TRANSFORMER["audio_in_channels"]),
        "video_text": draw(2, tokens, TRANSFORMER["caption_channels"]),
        "audio_text": draw(2, tokens, TRANSFORMER["caption_channels"]),
        "t": torch.tensor([0.9375, 0.41]),
    }
    with torch.no_grad():
        joint, isolated = (run(model, arrays, isolate_modalities=isolated) for isolated in (False, True))
    arrays |= {"v_video": joint["video"], "v_audio": joint["audio"], "isolated": isolated["video"]}
    return {name: x.numpy() for name, x in arrays.items()} | weights_of(model)


def run(model: torch.nn.Module, arrays: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Velocities by stream, in our layout."""
    video, audio, t = arrays["video"], arrays["audio"], 1000 * arrays["t"]
    b, f, h, w, channels = video.shape
    frames = t[:, None] * (torch.arange(f) > 0)
    output = model(
        hidden_states=video.reshape(b, -1, channels), audio_hidden_states=audio,
        encoder_hidden_states=arrays["video_text"], audio_encoder_hidden_states=arrays["audio_text"],
        timestep=frames.repeat_interleave(h * w, dim=1), audio_timestep=t[:, None] * (torch.arange(audio.shape[1]) > 1),
        sigma=t, num_frames=f, height=h, width=w, fps=FPS, audio_num_frames=audio.shape[1], **options,
    )  # fmt: skip
    return {"video": output.sample.reshape(video.shape), "audio": output.audio_sample}


# A change a B of strength alpha / rank in a few layers: the two blocks differ in what is adapted.
LORA = {"r": 3, "lora_alpha": 6, "target_modules": [
    "proj_in", "audio_proj_out", "caption_projection.linear_1", "audio_time_embed.linear",
    "av_cross_attn_video_a2v_gate.emb.timestep_embedder.linear_2", "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.audio_attn1.to_v", "transformer_blocks.0.audio_to_video_attn.to_k",
    "transformer_blocks.0.video_to_audio_attn.to_out.0", "transformer_blocks.0.audio_ff.net.2",
    "transformer_blocks.1.attn1.to_q", "transformer_blocks.1.attn2.to_k",
    "transformer_blocks.1.audio_to_video_attn.to_q", "transformer_blocks.1.ff.net.0.proj",
]}  # fmt: skip


def lora_gradients(golden: dict[str, np.ndarray], seed: int, lora: dict[str, Any] = LORA) -> dict[str, np.ndarray]:
    """LoRA factors (`KEY`), random weights of the velocities (`weights_STREAM`), their sum's gradients (`grad:KEY`).

    Args:
      golden: what `transformer` returned; its network and inputs are used.
      seed: of factors and weights.
      lora: settings of PEFT.
    """
    model = diffusers.LTX2VideoTransformer3DModel(**TRANSFORMER)
    model.load_state_dict({key[2:]: torch.from_numpy(x).float() for key, x in golden.items() if key.startswith("w:")})
    model.add_adapter(peft.LoraConfig(**lora))
    generator = torch.Generator().manual_seed(seed)
    factors = {k.replace(".default", ""): p for k, p in model.named_parameters() if "lora_" in k}
    with torch.no_grad():
        for factor in factors.values():
            factor.copy_(torch.randn(factor.shape, generator=generator) / factor.shape[1] ** 0.5)
    arrays = {key: torch.from_numpy(x) for key, x in golden.items() if not key.startswith("w:")}
    weights = {name: torch.randn(arrays[name].shape, generator=generator) for name in ("video", "audio")}
    sum((v * weights[name]).sum() for name, v in run(model, arrays).items()).backward()
    found = factors | {f"grad:{key}": factor.grad for key, factor in factors.items()}
    found |= {f"weights_{name}": x for name, x in weights.items()}
    return {key: x.detach().numpy() for key, x in found.items()}


def connectors(seed: int, length: int, lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Weights, states of texts that are padded on the left, their mask, and both streams' results."""
    model = halved(redraw(LTX2TextConnectors(**CONNECTORS), seed))
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (len(lengths), length, CONNECTORS["caption_channels"], CONNECTORS["text_proj_in_factor"])
    # Layers of other sizes and centres, and padding that is not 0.
    states = torch.randn(shape, generator=generator) * torch.tensor([1.0, 5.0, 0.2]) + torch.tensor([0.0, -3.0, 0.5])
    mask = torch.arange(length) >= length - torch.tensor(lengths)[:, None]
    with torch.no_grad():
        # The pipeline hands over the layers of a channel side by side.
        video, audio, left = model(states.flatten(2), mask.long(), padding_side="left")
    assert left.all()  # nothing is masked any more
    arrays = {"states": states, "mask": mask, "video": video, "audio": audio}
    return {name: x.numpy() for name, x in arrays.items()} | weights_of(model)


def rope(rows: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """cos and sin [n h e] of the full size (121 frames of 512x768 at 24 a second, 126 moments).

    Keys are `TABLE:cos`, `TABLE:sin` and `TABLE:row`, the numbers of random rows; None: all rows.
    """
    settings = {"rope_type": "split", "num_attention_heads": 32, "base_num_frames": 20}
    video = LTX2AudioVideoRotaryPosEmbed(4096, **settings)
    audio = LTX2AudioVideoRotaryPosEmbed(2048, scale_factors=(4,), modality="audio", **settings)
    cross = LTX2AudioVideoRotaryPosEmbed(2048, **settings)
    seen, heard = video.prepare_video_coords(1, 16, 16, 24, "cpu", fps=24.0), audio.prepare_audio_coords(1, 126, "cpu")
    found = {"video": video(seen), "audio": audio(heard), "video_time": cross(seen[:, :1]), "audio_time": cross(heard)}
    arrays = {}
    for name, tables in found.items():
        count = tables[0].shape[2]
        row = np.arange(count)
        if rows is not None:
            row = np.sort(np.random.default_rng(seed).choice(count, rows, replace=False))
            row[-1] = count - 1
        arrays[f"{name}:row"] = row
        for key, table in zip(("cos", "sin"), tables, strict=True):
            arrays[f"{name}:{key}"] = table[0].swapaxes(0, 1).numpy()[row]
    return arrays


def official_shapes() -> dict[str, dict[str, list[int]]]:
    """Name -> shape of every tensor of LTX-2 (2.0), built without weights."""
    with torch.device("meta"):
        models = {
            "transformer": diffusers.LTX2VideoTransformer3DModel(rope_type="split"),
            "connectors": LTX2TextConnectors(rope_type="split"),
        }
    return {part: {k: list(v.shape) for k, v in model.state_dict().items()} for part, model in models.items()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    golden = transformer(0, (3, 2, 5), moments=7, tokens=9)
    np.savez_compressed(FOLDER / "transformer.npz", **golden)
    np.savez_compressed(FOLDER / "lora_gradients.npz", **lora_gradients(golden, seed=4))
    np.savez_compressed(FOLDER / "connectors.npz", **connectors(2, length=12, lengths=(12, 7, 1)))
    np.savez_compressed(FOLDER / "rope.npz", **rope(rows=3, seed=5))
    text = json.dumps(official_shapes(), separators=(",", ":"))
    (FOLDER / "ltx2_shapes.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
