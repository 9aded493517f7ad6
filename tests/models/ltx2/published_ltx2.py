"""A small LTX-2 as others have it: a folder of diffusers, Lightricks' single file, LoRA files; every value drawn.

The original names are written here once more, from diffusers' names by its conversion script, backwards.
"""

import json
import re

import numpy as np
import safetensors.numpy

from tests.models.ltx2.small_vae import CONFIG as CODEC
from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.ltx2.connectors import ConnectorConfig
from world_distill.models.ltx2.layout import LTX2Published

NETWORK = LTX2Config(
    channels=4, width=16, audio_channels=5, audio_width=8, depth=2, heads=2, text_width=24
)  # fmt: skip
TEXTS = ConnectorConfig(width=24, heads=3, depth=2, registers=4, states=3)
LAYOUT = LTX2Published(NETWORK, TEXTS, CODEC)
# As the header of the single file says it, of the published keys those that a reader needs.
CONFIG = {
    "transformer": {
        "_class_name": "AVTransformer3DModel", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 24, "norm_eps": 1e-6,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_in_channels": 5, "audio_out_channels": 5,
        "audio_cross_attention_dim": 8, "positional_embedding_theta": 10000.0, "rope_type": "split",
        "positional_embedding_max_pos": [20, 2048, 2048], "audio_positional_embedding_max_pos": [20],
        "frequencies_precision": "float64", "timestep_scale_multiplier": 1000, "qk_norm": "rms_norm",
        "av_ca_timestep_scale_multiplier": 1000.0, "use_embeddings_connector": True, "connector_num_layers": 2,
        "connector_attention_head_dim": 8, "connector_num_attention_heads": 3, "connector_num_learnable_registers": 4,
        "connector_positional_embedding_max_pos": [4096],
    },
    "vae": {
        "_class_name": "CausalVideoAutoencoder", "latent_channels": 4, "patch_size": 4, "norm_layer": "pixel_norm",
        "latent_log_var": "uniform", "causal_decoder": False, "timestep_conditioning": False,
        "encoder_blocks": [
            ["res_x", {"num_layers": 1}], ["compress_space_res", {"multiplier": 2}], ["res_x", {"num_layers": 2}],
            ["compress_time_res", {"multiplier": 2}], ["res_x", {"num_layers": 1}],
            ["compress_all_res", {"multiplier": 2}], ["res_x", {"num_layers": 2}],
            ["compress_all_res", {"multiplier": 2}], ["res_x", {"num_layers": 1}],
        ],
        "decoder_blocks": [["res_x", {"num_layers": 1}], ["compress_all", {"residual": True, "multiplier": 2}]],
    },
}  # fmt: skip
BESIDE = {
    "audio_vae.decoder.conv_in.conv.weight": (3, 2), "audio_vae.per_channel_statistics.mean-of-means": (2,),
    "vocoder.conv_pre.bias": (5,), "vae.per_channel_statistics.channel": (4,),
    "vae.per_channel_statistics.mean-of-stds": (4,),
}  # fmt: skip

_TOP = {
    "proj_in": "patchify_proj", "audio_proj_in": "audio_patchify_proj", "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single", "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single", "video_connector": "video_embeddings_connector",
    "audio_connector": "audio_embeddings_connector",
}  # fmt: skip
_INSIDE = {
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio", "norm_q": "q_norm", "norm_k": "k_norm",
}  # fmt: skip


def original_name(part, name):
    """The name in the single file of a tensor, or of a layer, that diffusers calls so."""
    if part == "vae":
        name = name.replace("latents_mean", "per_channel_statistics.mean-of-means")
        name = name.replace("latents_std", "per_channel_statistics.std-of-means").replace("resnets", "res_blocks")
        step = r"blocks\.(\d+)\.(?:down|up)samplers\.0"
        name = re.sub(step, lambda m: f"blocks.{2 * int(m[1]) + 1}", name)
        shift = 0 if name.startswith("encoder") else 2
        name = re.sub(r"blocks\.(\d+)\.res", lambda m: f"blocks.{2 * int(m[1]) + shift}.res", name)
        return "vae." + name.replace("encoder.mid_block", "encoder.down_blocks.8").replace("mid_block", "up_blocks.0")
    if name.startswith("text_proj_in"):
        return name.replace("text_proj_in", "text_embedding_projection.aggregate_embed")
    first, *rest = name.split(".")
    rest = [_INSIDE.get(word, word) for word in rest]
    if part == "connectors":
        rest = ["transformer_1d_blocks" if word == "transformer_blocks" else word for word in rest]
    return "model.diffusion_model." + ".".join([_TOP.get(first, first), *rest])


def draw(seed=0):
    """Part -> tensors under diffusers' names; the text projection is among the connectors, as in its folder."""
    rng, found = np.random.default_rng(seed), {}
    for part, entries in LAYOUT.entries().items():
        more = LAYOUT.apart()["text_projection"] if part == "connectors" else []
        shapes = {name: entry.shape for entry in (*entries, *more) for name in entry.names}
        found[part] = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return found


def originals(weights):
    """The tensors of a single file, with those that are not converted."""
    found = {original_name(part, name): x for part, tensors in weights.items() for name, x in tensors.items()}
    return found | {name: np.ones(shape, np.float32) for name, shape in BESIDE.items()}


def save_single(path, tensors, config=CONFIG, /, **header):
    metadata = header | ({} if config is None else {"config": json.dumps(config)})
    safetensors.numpy.save_file({k: np.ascontiguousarray(x) for k, x in tensors.items()}, path, metadata=metadata)
    return path


def save_folder(folder, weights):
    for part, config in LAYOUT.configs({}.__getitem__).items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        safetensors.numpy.save_file(weights[part], folder / part / "diffusion_pytorch_model.safetensors")
    return folder


def linear_layers():
    """diffusers' name -> [out, in] of every linear layer of the transformer, from the shapes alone."""
    entries = LAYOUT.entries()["transformer"]
    return {
        name.removesuffix(".weight"): entry.shape
        for entry in entries if len(entry.shape) == 2 and entry.name.endswith(".weight") for name in entry.names
    }  # fmt: skip


def lora(layers, rank=2, seed=5, name="diffusion_model.{}", words=("lora_A", "lora_B")):
    """(tensors of a LoRA file, change of each layer's weight at strength 1)."""
    rng, tensors, changes = np.random.default_rng(seed), {}, {}
    for layer, (o, i) in layers.items():
        down, up = (0.3 * rng.normal(size=shape).astype(np.float32) for shape in ((rank, i), (o, rank)))
        key = name.format(layer)
        tensors |= {f"{key}.{words[0]}.weight": down, f"{key}.{words[1]}.weight": up}
        changes[layer] = up @ down
    return tensors, changes
