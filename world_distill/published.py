"""Which family a folder of published weights belongs to, and where each of its tensors goes."""

import json
import pathlib

from world_distill.config import UserError
from world_distill.models.params import Published
from world_distill.models.wan import params as wan

# Class of the transformer in diffusers -> family, and what reads its folder.
_READERS = {"WanTransformer3DModel": ("wan", wan.describe)}


def describe(folder: pathlib.Path) -> tuple[str, Published]:
    """(family, what there is to convert) of a diffusers folder.

    Raises:
      UserError: no diffusers folder, or of no family that is known, or with parts that are not built here.
    """
    configs = {}
    for part in ("transformer", "vae"):
        path = folder / part / "config.json"
        try:
            configs[part] = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is not there; a model in diffusers' layout is a folder with transformer/ and vae/"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no JSON: {error}") from error
    kind = configs["transformer"].get("_class_name")
    if kind not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise UserError(f"{folder}/transformer is a {kind}; what can be converted: {known}")
    family, read = _READERS[kind]
    try:
        model = read(configs["transformer"], configs["vae"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from error
    return family, model
