"""Published models in diffusers' layout: from the hub, which family they belong to, and where each tensor goes."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from world_distill.errors import UserError
from world_distill.models.ltx2 import layout as ltx2
from world_distill.models.tensor_map import Published
from world_distill.models.wan import published as wan


class _Reader(NamedTuple):
    """What is read of one family's published folder."""

    family: str
    parts: tuple[str, ...]  # folders
    describe: Callable[..., Published]  # takes the config.json of each part by its name, and `index`


# By the class of the transformer in diffusers.
_READERS = {
    "LTX2VideoTransformer3DModel": _Reader("ltx2", ("transformer", "connectors", "vae"), ltx2.describe),
    "WanTransformer3DModel": _Reader("wan", ("transformer", "vae"), wan.describe),
}
_PARTS = tuple(dict.fromkeys(part for reader in _READERS.values() for part in reader.parts))

# Of a model on the Hugging Face hub, no more than what is converted; its text encoder is the larger part.
_HUB_FILES = (
    "model_index.json",
    "README.md",  # its licence
    *(f"{part}/*.{kind}" for part in _PARTS for kind in ("safetensors", "json")),
)


def download(name: str, revision: str | None = None) -> pathlib.Path:
    """The folder of a model on the Hugging Face hub: what is converted of it, at a branch, tag or commit.

    Raises:
      UserError: it cannot be had from the hub.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES))
        return pathlib.Path(folder)
    except Exception as error:  # no network, no such model, no permission: many kinds, and httpx's among them
        why = " ".join(str(error).split())[:300] or type(error).__name__
        at = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{name} is no folder here, and the Hugging Face hub gave no model of that name ({why}). Download it"
            f" where there is a network (`hf download {name}{at}`), and name the folder"
        ) from error


def describe(folder: pathlib.Path) -> tuple[str, Published]:
    """(family, what there is to convert) of a diffusers folder.

    Raises:
      UserError: no diffusers folder, or of no family that is known, or with parts that are not built here.
    """
    kind = read_config(folder / "transformer" / "config.json").get("_class_name")
    if kind not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise UserError(f"{folder}/transformer is a {kind}; what can be converted: {known}")
    file = folder / "model_index.json"
    index = read_config(file) if file.exists() else None
    if index and any(index.get("transformer_2") or ()):
        raise UserError(f"{folder} has two transformers, one for the noisier half; such a model is not built here")
    reader = _READERS[kind]
    configs = {part: read_config(folder / part / "config.json") for part in reader.parts}
    try:
        model = reader.describe(**configs, index=index)
    except KeyError as error:
        raise UserError(f"{folder}: a config.json of it lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from error
    return reader.family, model


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file's dict. Raises UserError where it is missing or another kind of file."""
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path} is not there; a model in diffusers' layout is a folder with transformer/, vae/ and, of LTX-2,"
            " connectors/. Where only the transformer was published, put the other folders of its base beside it"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is no config: its JSON is a {type(config).__name__}")
    return config
