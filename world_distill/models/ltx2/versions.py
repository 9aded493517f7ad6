"""Which LTX-2 a published model is: version 2.0 (19B) is built here, and a later one is named and refused.

2.3 gates its attentions, has other connectors and another decoder of the picture. 2.5 has another text encoder, too.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

TAKE = "Lightricks/LTX-2, or its files ltx-2-19b-dev.safetensors and ltx-2-19b-distilled.safetensors"

# Version -> settings that the versions before it lack, newest first: in diffusers' config.json of the transformer, and
# in the header of a single file.
_SETTINGS: dict[str, dict[str, Any]] = {
    "2.5": {"ff_bias": False, "use_keyframes_abs_pos_embedding": True, "use_prompt_adaln_single": False},
    "2.3": {
        "gated_attn": True, "cross_attn_mod": True, "perturbed_attn": True, "use_prompt_embeddings": False,
        "apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True,
    },
}  # fmt: skip
# The same for names of tensors: some that are there, and some that are gone.
_THERE = {"2.5": "keyframes_abs_pos_embedding", "2.3": "attn1.to_gate_logits.weight"}


def check_version(
    where: str, transformer: Mapping[str, Any], *, names: Collection[str] = (), declared: str = ""
) -> None:
    """Raises ValueError for a version after 2.0, which the message names.

    Args:
      where: what holds the transformer's settings, for the message.
      transformer: its settings, in diffusers' words or in those of the original code.
      names: of tensors.
      declared: what the file says about its version.
    """
    version, reason = _later(where, transformer, names, declared)
    if version:
        raise ValueError(
            f"it is LTX-{version} ({reason}). Of LTX-2, version 2.0 (19B) is built here, joint or without audio: take"
            f" {TAKE}"
        )


def _later(
    where: str, transformer: Mapping[str, Any], names: Collection[str], declared: str
) -> tuple[str, str] | tuple[None, None]:
    """(version, how one sees it) of a version after 2.0; Nones for 2.0."""
    if (match := re.match(r"v?(\d+)\.(\d+)", declared)) and (int(match[1]), int(match[2])) > (2, 0):
        return f"{match[1]}.{match[2]}", f"model_version = {declared}"
    for version, settings in _SETTINGS.items():
        for key, value in settings.items():
            if key in transformer and transformer[key] == value:
                return version, f"{where} has {key} = {value}"
        if name := next((name for name in names if _THERE[version] in name), None):
            return version, f"it holds {name}"
    return None, None
