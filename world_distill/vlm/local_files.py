"""Which model lies in a folder or on the hub, found out without reading its weights."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from world_distill.errors import UserError

_ENDS = 1 << 20  # bytes of each end of a weight file that tell it from others
# Classes whose pictures are expanded here, and whose conversations can go on from a shared part.
SHARING = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
WORKS = (
    "any image-text model of transformers works (Qwen2-VL to Qwen3.5, InternVL, Gemma 3, SmolVLM, LLaVA-OneVision, "
    "...; of a model with code of its own, take the copy whose name ends in -hf)"
)


def check_kind(source: Mapping[str, Any]) -> str:
    """The type of a model, by its config alone. Raises UserError if it is none that takes pictures and writes text."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    where = source["pretrained_model_name_or_path"]
    try:
        kind = AutoConfig.from_pretrained(**source).model_type
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"the config of the VLM {where} cannot be read: {error}\n  But {WORKS}") from error
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UserError(f"the VLM {where} is of type {kind!r}, which does not take pictures and write text; {WORKS}")
    return kind


def identity(model: str, source: Mapping[str, Any]) -> str:
    """A model's name with what tells its weights from others."""
    folder = pathlib.Path(model)
    if folder.is_dir():
        try:
            kind = json.loads((folder / "config.json").read_text())["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} is no model in transformers' layout (config.json: {error!r})") from error
        return f"{kind}@{_digest(folder)}"
    from transformers import AutoConfig

    try:
        commit = AutoConfig.from_pretrained(**source)._commit_hash
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the VLM {model} is neither a folder nor a model on the hub: {error}") from error
    return f"{model}@{(commit or source.get('revision', 'unknown'))[:12]}"


def _digest(folder: pathlib.Path) -> str:
    """12 hex digits of all small files, and of sizes and both ends of the weights."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".jinja", ".txt", ".safetensors", ".bin")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_ENDS) if file.suffix in (".safetensors", ".bin") else stream.read())
            stream.seek(max(0, size - _ENDS))
            digest.update(stream.read())
    return digest.hexdigest()[:12]
