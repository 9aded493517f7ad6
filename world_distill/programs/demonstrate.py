"""`world-distill demonstrate`: a record set with the Demonstrator's clips, as latents, to fine-tune on.

A clip depends on (seed, record, weights) alone. Shards are finished one after another, so a job that was cut off goes
on at the first unfinished one. Clips are neither decoded nor encoded: training reads the very latents that the sampler
made, those of all streams.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from world_distill import build
from world_distill.data.records import fit
from world_distill.data.records.batches import fixed_batches
from world_distill.data.records.negative import load_negative, read_negative, write_negative
from world_distill.data.records.reader import EncodedRecord, RecordReader
from world_distill.data.records.resumable import ResumableSet
from world_distill.devices import hosts
from world_distill.devices.sharding import rows_or_whole
from world_distill.errors import UserError
from world_distill.evaluation.clip_sampler import make_sampler
from world_distill.interfaces import ModelFamily
from world_distill.settings.guidance import Guidance
from world_distill.settings.loading import to_json
from world_distill.weights import base_model

# Sections of a config that decide a clip; with seed and base they are part of a set's request.
_SECTIONS = ("model", "demonstrator", "sampler")


def demonstrate(
    config,
    reader: RecordReader,
    folder: pathlib.Path,
    *,
    name: str,
    shards: int = 1,
    only: int | None = None,
    clip_dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes data set `name` into `folder`: the records of `reader`, each with a clip of the Demonstrator.

    Args:
      config: names model, weights, sampler and guidance.
      reader: encoded records, each with a solution.
      folder: of the new data set.
      name: of the new data set; not that of `reader` if in the same folder.
      shards: files to spread the records over.
      only: the one shard to write, from 0; None writes all. Each may be written by another job.
      clip_dtype: type that wider arrays of scenes and clips are stored in; None: their own.
      progress: called with (records done, records) of the shards that are asked for.

    Returns:
      Counts: records, written (by this call), bytes (of what it wrote), shards_missing (at 0 the set is complete).

    Raises:
      UserError: the new set would replace the old one; no such shard.
      RecordError: records of another model, or one without a solution; or the disk refuses.
    """
    if (folder / f"{name}.json").absolute() == reader.index_path.absolute():
        raise UserError(f"{reader.index_path}: the new records would replace the old ones: name them otherwise")
    if only is not None and not 0 <= only < shards:
        raise UserError(f"no shard {only} among {shards}: they are counted from 0 to {shards - 1}")
    mesh = build.start_devices(config)
    family = build.make_family(config, mesh)
    fit.check_fit(reader, family, base_model.origin(config.base))
    reader.heads().check_solutions()
    metadata = {**reader.metadata, **fit.clip_identity(family), "clips_by": f"Demonstrator, seed {config.seed}"}
    if clip_dtype is not None:
        metadata["scene_dtype"] = clip_dtype
    made_from = {key: config[key].to_dict() for key in _SECTIONS} | {"base": str(config.base), "seed": config.seed}
    request = {"records": reader.fingerprint, **made_from}
    hosts.agree("config", to_json(config))
    target = ResumableSet(folder, name, shards, request=request, metadata=metadata, sequential=True)
    parts = dict(enumerate(np.array_split(np.arange(len(reader)), shards)))
    wanted = parts if only is None else {only: parts[only]}
    missing = [shard for shard in wanted if target.note(shard) is None]
    hosts.agree("list of finished shards", str(missing))
    total = sum(map(len, wanted.values()))
    done = total - sum(len(wanted[shard]) for shard in missing)
    counts = {"records": len(reader), "written": total - done, "bytes": 0}

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    report(0)
    sampler = None
    for shard in missing:
        sampler = sampler or _Sampler(config, family, mesh, reader)
        records = sampler.records(wanted[shard], report)
        if hosts.is_main():
            counts["bytes"] += target.write(shard, records, scene_dtype=clip_dtype)["bytes"]
        else:
            collections.deque(records, maxlen=0)  # its devices take part; one process writes
    left = target.join() if hosts.is_main() else []
    kept = read_negative(reader.index_path.parent, reader.index_path.stem)
    if kept is not None and hosts.is_main():
        write_negative(folder, name, kept)
    hosts.agree("set of records", name)  # nobody reads it before it is written
    return counts | {"shards_missing": len(left)}


class _Sampler:
    """The Demonstrator with the config's sampler and guidance. Its base is read when it is made."""

    def __init__(self, config, family: ModelFamily, mesh: jax.sharding.Mesh, reader: RecordReader):
        # As in evaluation, a stochastic sampler serves RL only.
        grid, _ = build.sampler_grid(config)
        guidance = Guidance.of(config)
        self._reader, self._rows, self._lengths = reader, config.evaluate_batch, build.text_lengths(family, config)
        self._sharding = rows_or_whole(mesh, self._rows)
        self._negative = load_negative(reader, guidance, self._lengths, mesh) if guidance.demonstrator > 1 else None
        self._base = base_model.load_base(family, config, mesh)
        self._sample = make_sampler(family, mesh, tuple(grid.tolist()), guidance.demonstrator, decodes=False)
        self._key = jax.random.fold_in(jax.random.key(config.seed), 5)

    def records(self, numbers: np.ndarray, report: Callable[[int], None]) -> Iterator[EncodedRecord]:
        """The records of these numbers with their clips; `report` is told how many are done, a batch at a time."""
        batches = fixed_batches(self._reader, self._rows, lengths=self._lengths, indices=numbers.tolist())
        for start, batch in zip(range(0, len(numbers), self._rows), batches, strict=True):
            of = numbers[start : start + self._rows]
            condition = jax.tree.map(self._place, batch.condition("solution"))
            noise = np.pad(of, (0, self._rows - len(of)), mode="edge")  # rows that fill up the batch take any
            latents = self._sample(self._base, None, condition, self._negative, self._key, jnp.asarray(noise))
            clips = jax.tree.map(hosts.whole, latents)
            for row, number in enumerate(of):
                yield dataclasses.replace(self._reader[number], clip={name: x[row] for name, x in clips.items()})
            report(len(of))

    def _place(self, x: np.ndarray) -> jax.Array:
        return hosts.place(np.asarray(x), self._sharding)
