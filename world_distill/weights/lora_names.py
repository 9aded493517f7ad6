"""The names that LoRA files use, in one table: for the reader, its errors, `inspect-weights` and the README.

A key is prefixes, the name of a layer, and what the tensor is of that layer. Prefixes come in any number and order:
they are taken away until none is left. The layer is called as in diffusers or as in the original code, with dots or
with underscores.
"""

import re
from typing import NamedTuple

# Text before the name of a layer, and who writes it. A longer one stands before what it begins with.
PREFIXES = {
    "base_model.model.": "PEFT's own folders",
    "model.": "training scripts with the whole model; checkpoints",
    "diffusion_model.": "ComfyUI, and trainers for it",
    "transformer.": "diffusers",
    "pipe.": "DiffSynth",
    "dit.": "DiffSynth",
    "unet.": "older diffusers",
    "module.": "distributed training",
    "_orig_mod.": "compiled models",
    "lora_unet__": "VideoX-Fun",
    "lora_unet_": "musubi-tuner and kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS, SimpleTuner",
}

# Beginnings of keys that belong to another part of a pipeline than the video transformer.
TEXT_ENCODER = (
    "text_encoder",
    "text_encoders.",
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "conditioner.",
    "cond_stage_model.",
    "pipe.text_encoder",
)
OTHER_TRANSFORMER = ("transformer_2.", "low_noise.", "high_noise.", "diffusion_model_2.")
# Layers of LTX-2 between the text encoder and the transformer.
TEXT_CONNECTORS = (
    "text_embedding_projection", "connectors.", "video_embeddings_connector", "audio_embeddings_connector"
)  # fmt: skip
# Layers of image-to-video models that see the image through CLIP.
IMAGE_BRANCH = re.compile(r"(k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|norm_added_k|image_embedder)([._]|$)")

# Kinds of tensors of a layer: the end of the key -> what it is. `\w+` is the name of an adapter.
_ADAPTER = r"(\.(?!weight$|bias$)\w+)?(\.weight)?"
PARTS = {
    "a": rf"\.(lora_A|lora_down|lora\.down|lora_linear_layer\.down){_ADAPTER}|_lora\.down(\.weight)?",
    "b": rf"\.(lora_B|lora_up|lora\.up|lora_linear_layer\.up){_ADAPTER}|_lora\.up(\.weight)?",
    "alpha": r"\.alpha",
    "diff": r"\.(diff|w_norm)",
    "diff_b": r"\.(diff_b|b_norm)",
    "diff_m": r"\.diff_m",
}
# Differences of what is not a factor: which of `LEFT_OUT` a part, or the layer's name, belongs to.
BIASES, NORMS, MODULATION, WEIGHTS = "biases", "norms", "modulation", "weights"
TEXT, IMAGE, CONNECTORS, AUDIO = "text-encoder", "image-branch", "text-connectors", "audio"
# What a reader may be told to leave out, and why it would be.
LEFT_OUT = {
    BIASES: "differences of biases (`diff_b`), as speed LoRAs have them",
    NORMS: "differences of norms (`norm….diff`)",
    MODULATION: "differences of the modulation tables (`diff_m`)",
    WEIGHTS: "whole differences of weights (`diff`)",
    TEXT: "LoRA of the text encoder, which is not trained or loaded with the model here",
    IMAGE: "LoRA of the image branch (`k_img`, `img_emb`, …), which this model lacks",
    AUDIO: "LoRA of LTX-2's audio stream, where the model has none (`model.audio` is off)",
    CONNECTORS: "LoRA of LTX-2's text projection and connectors, which only `convert --merge` adds to a base",
}

# Kinds of adapters that are no plain LoRA: the end of the key -> name and reason.
REFUSED = {
    r"\.(dora_scale|lora_magnitude_vector.*)": ("DoRA", "it rescales whole weights; train it as plain LoRA"),
    r"\.lokr_\w+": ("LoKr", "its changes are Kronecker products; extract plain LoRA from it"),
    r"\.hada_\w+": ("LoHa", "its changes are Hadamard products; extract plain LoRA from it"),
    r"\.(lora_B|lora_up|lora\.up)(\.\w+)?\.bias|\.(lora_A|lora_down|lora\.down)(\.\w+)?\.bias": (
        "LoRA with biases of its own (PEFT's lora_bias)", "train it without `lora_bias`"
    ),
    r"\.(lora_mid|lora_mid\.weight)": ("LoCon with a core (lora_mid)", "it is for convolutions; train plain LoRA"),
    r"\.(oft_\w+|boft_\w+)(\.\w+)*": ("OFT", "it rotates weights; extract plain LoRA from it"),
    r"\.[ab][12]\.weight": ("GLoRA", "it scales weights; extract plain LoRA from it"),
    r"\.(ia3_l|on_input)(\.\w+)*": ("(IA)3", "it scales activations"),
    r"\.vera_lambda_[bd](\.\w+)*": ("VeRA", "its factors are random and not in the file"),
    r"\.(lora_E|ranknum)(\.\w+)*": ("AdaLoRA", "it has singular values of its own; save it as plain LoRA"),
    r"\.(modules_to_save(\.\w+)*|set_weight|reshape_weight)": (
        "adapter with whole weights that replace the base's", "merge it into the model, and convert that"
    ),
}  # fmt: skip

# Keys of a header that only LoRA with reference clips has.
REFERENCES = ("reference_downscale_factor", "reference_spatial_scale_factor", "reference_temporal_scale_factor")

_PARTS = {part: re.compile(rf"(?P<layer>.+?)({ends})") for part, ends in PARTS.items()}
_REFUSED = {re.compile(rf".+({ends})"): name for ends, name in REFUSED.items()}


class Key(NamedTuple):
    """A tensor's name, taken apart. `layer` is without prefixes; `part` is of `PARTS`, or "" where it is no LoRA's."""

    layer: str
    part: str


def strip(name: str) -> str:
    """The name without the prefixes of `PREFIXES`."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name


def parse(key: str) -> Key:
    """The layer and the part that a tensor's name says."""
    for part, pattern in _PARTS.items():
        if match := pattern.fullmatch(key):
            return Key(strip(match["layer"]), part)
    return Key(strip(key), "")


def flat(name: str) -> str:
    """A layer's name with underscores in place of dots: files mix the two (`blocks_22.self_attn.k`)."""
    return name.replace(".", "_")


def refused_kind(key: str) -> tuple[str, str] | None:
    """(kind, reason) of an adapter that is no plain LoRA, by one of its keys; None where the key is another."""
    return next((name for pattern, name in _REFUSED.items() if pattern.fullmatch(key)), None)


def other_part(key: str) -> str | None:
    """`TEXT`, `IMAGE` or `CONNECTORS` where the key belongs to that part of a pipeline; None otherwise."""
    if key.removeprefix("base_model.model.").startswith(TEXT_ENCODER):
        return TEXT
    if strip(key).startswith(TEXT_CONNECTORS):
        return CONNECTORS
    return IMAGE if IMAGE_BRANCH.search(key) else None
