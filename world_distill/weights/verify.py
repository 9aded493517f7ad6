"""`world-distill convert --verify`: a converted model held to diffusers, in float32 on the CPU, on random inputs.

Ours is read from the checkpoint, theirs from the published files, one part and one of the two at a time. What the
conversion rounded is rounded on their side as well, so that the difference remains one of networks and layouts.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from world_distill import models
from world_distill.devices.sharding import make_mesh
from world_distill.errors import UserError
from world_distill.interfaces import ModelFamily
from world_distill.models.parity import PartParity
from world_distill.models.tensor_map import Entry
from world_distill.storage import array_store
from world_distill.structs import PyTree
from world_distill.weights import base_model, merging, sources
from world_distill.weights.merging import Merge, Merged

TOLERANCE = 5e-4  # of the largest value


def check_installed() -> None:
    """Raises a UserError if there is nothing to compare with."""
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--verify needs {error.name}, which is in the extra `torch`: pip install -e '.[torch]'"
        ) from error


def check_same_model(
    source: pathlib.Path,
    dest: pathlib.Path,
    dtype: str,
    vae: pathlib.Path | None = None,
    merges: Sequence[Merge] = (),
) -> None:
    """Raises a UserError if the checkpoint DEST is no conversion of SOURCE with `merges` to `dtype` ("keep": any)."""
    found = sources.open_source(source, vae)
    family, model = found.family, found.model
    _, metadata = array_store.describe(dest)
    # As JSON has it, where tuples are lists.
    if metadata.get("family") != family or metadata.get("model") != json.loads(json.dumps(model.sizes)):
        raise UserError(f"{dest} is there already, and holds another model than {source}")
    have, want = metadata.get("merged", []), Merged(merges, model.layout, found.files).metadata()
    if have != want:
        named = [merging.text({"merged": some}) or "nothing" for some in (have, want)]
        raise UserError(f"{dest} is there already, and {named[0]} is merged into it, not {named[1]}")
    stored = {str(kind) for name, kind in array_store.types(dest).items() if name.startswith("transformer.")}
    if dtype not in ("keep", *stored):
        raise UserError(f"{dest} is there already, and its transformer is {', '.join(sorted(stored))}, not {dtype}")


def compare(
    source: pathlib.Path, dest: pathlib.Path, vae: pathlib.Path | None = None, merges: Sequence[Merge] = ()
) -> dict[str, Any]:
    """Largest differences between the checkpoint DEST and diffusers with the model SOURCE, `merges` added to it.

    Returns:
      for every result of the family's comparison (Wan: `transformer`, `vae_encode`, `vae_decode`): `difference`, and
      `relative` to diffusers' largest value;
      `rounded`: parts whose weights were rounded on their side, as the conversion rounded ours; `tolerance`.

    Raises:
      UserError, ConvertedError: DEST cannot be read.
    """
    opened = sources.open_source(source, vae)
    family, parts = models.parity_of(opened.family, opened.model.sizes)
    assert family.published is not None
    entries, merged = family.published.entries(), Merged(merges, opened.model.layout, opened.files)
    types, results, rounded = array_store.types(dest), {}, []
    for part, parity in parts.items():
        x = parity.inputs(family)
        found = parity.ours(family, _load_ours(family, dest, part), **x)
        network = _load_theirs(opened, source, family, part, parity)
        _merge(network, part, entries[part], merged)
        if _round(network, entries[part], {k.removeprefix(f"{part}."): v for k, v in types.items()}):
            rounded.append(part)
        expected = parity.theirs(network, **x)
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


def _load_theirs(
    opened: sources.Source, source: pathlib.Path, family: ModelFamily, part: str, parity: PartParity
) -> Any:
    if opened.layout == "diffusers":
        return parity.load(source)
    assert family.published is not None
    config = family.published.configs(opened.model.constants.__getitem__)[part]
    names = [name for entry in opened.model.entries[part] for name in entry.names]
    return parity.build(config, {name: opened.files[part][name] for name in names})


def _load_ours(family: ModelFamily, dest: pathlib.Path, part: str) -> PyTree:
    mesh = make_mesh(devices=jax.devices("cpu")[:1])
    return base_model.load_base(family, ConfigDict({"base": str(dest)}), mesh, parts=(part,))[part]


def _merge(network: Any, part: str, entries: Iterable[Entry], merged: Merged) -> None:
    """Adds to their weights what was merged into ours."""
    import torch

    weights = network.state_dict()
    for name, key in merged.named(part, entries).items() if merged.changes(part) else ():
        weights[name].copy_(torch.from_numpy(merged.add(key, weights[name].numpy())))


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
