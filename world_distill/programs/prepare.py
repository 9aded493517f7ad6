"""`world-distill scenes | annotate | encode`: from images to the records that training reads.

    scenes    images            drawn by a world, or your own folder of pictures
    annotate  images -> tasks   a VLM writes tasks and solutions (`NAME_annotated` records)
    encode    tasks -> arrays   scene latents and text states (`NAME` records)

Every stage can be called again after an interruption, and then goes on.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from world_distill import build
from world_distill.data.annotation.annotate import annotate_images
from world_distill.data.images.filters import Filters
from world_distill.data.records import fit
from world_distill.data.records.clips import ClipSource
from world_distill.data.records.encode import encode_records
from world_distill.data.records.negative import keep_negative
from world_distill.data.records.reader import RecordError, RecordReader
from world_distill.data.records.splits import Splits, check_names
from world_distill.data.videos.convert import VIDEOS
from world_distill.devices import hosts
from world_distill.devices.sharding import batch_sharding
from world_distill.errors import UserError
from world_distill.settings.guidance import Guidance
from world_distill.settings.loading import section
from world_distill.structs import PyTree
from world_distill.weights import base_model

SPLITS = ("train", "validation", "test")
SUMMED = ("encoded", "left_out", "bytes", "estimated_bytes", "shards_kept")  # counts of a process's own shards


def make_records(config, folder: pathlib.Path, *, say=lambda text: None) -> None:
    """Scenes, tasks and encoded records of all three splits in `folder`; what is there already is kept.

    On a CPU it leaves a process with one device, whatever `config.host_devices` says: the figures of the sandbox were
    measured so.
    """
    # Making records starts JAX. Where they are there already, it is started all the same: a run that goes on in a new
    # process would otherwise have more devices than it began with, and group its sums in another way.
    jax.devices()
    encoder = Encoder(config)
    for split in SPLITS:
        if is_complete(folder, split):
            if encoder.guidance.used:  # records of an earlier version have no negative text
                encoder.keep_negative(folder, split)
            continue
        make_scenes = build.make_partial(config, "scenes")
        paths = make_scenes(str(folder / "scenes" / split), config.scenes[split], split=split, seed=config.seed)
        pairs = config.annotator.pairs if split == "train" else config.annotator.test_pairs
        if not is_complete(folder, f"{split}_annotated"):
            annotate_images(
                paths, build.make(config, "annotator"), folder, name=f"{split}_annotated", max_pairs=pairs,
                seed=config.seed, filters=section(config.filters, Filters), max_side=config.annotator.max_side,
                max_failures=config.annotator.max_failures,
            )  # fmt: skip
        reader = RecordReader(folder, f"{split}_annotated")
        encoder.keep_negative(folder, split)
        encoder.encode(reader, folder, name=split, batch=config.encode_batch)
        say(f"{split}: {len(paths)} scenes, {len(reader)} tasks")


class Encoder:
    """The encoders of a config's family. Their weights are read when there is something to encode, and once."""

    def __init__(self, config):
        self._config, self._family = config, build.make_family(config)
        self.guidance = Guidance.of(config)

    @functools.cached_property
    def _codec(self) -> PyTree:
        return base_model.load_codec(self._family, self._config)

    def encode(
        self,
        reader: RecordReader,
        folder: pathlib.Path,
        *,
        name: str,
        metadata: Mapping[str, str] | None = None,
        clips: ClipSource | None = None,
        batch: int = 8,
        **options,
    ) -> dict[str, int]:
        """`encode_records` with these encoders; its other `options` and its counts."""
        encoders = self._family.encoders
        weights = pathlib.Path(base_model.base_path(self._family, self._config.base) or "").name
        metadata = {**(metadata or {}), **self._identity, "weights": weights}
        size = encoders.image_size
        if clips is not None:
            metadata |= fit.clip_identity(self._family)
            size = clips.size
            # Whole calls of the clips' encoder.
            batch = -(-batch // clips.rows) * clips.rows
        return encode_records(
            reader, folder, name=name, encode_scene=lambda images: encoders.scene(self._codec, images),
            encode_text=encoders.text, size=size, scenes=encoders.scenes, metadata=metadata, clips=clips,
            lengths=build.text_lengths(self._family, self._config), batch=batch, **options,
        )  # fmt: skip

    def clips_of(self, reader: RecordReader, videos: pathlib.Path | None = None) -> ClipSource | None:
        """What gives annotated records the clips of their videos; None where they are of pictures.

        `videos` is the folder of the videos, if they have moved since they were imported.

        Raises:
          UserError: the folder is not there, or is given for records of pictures.
        """
        if VIDEOS not in reader.metadata:
            if videos is not None:
                raise UserError(f"--videos {videos}: {reader.index_path} was not imported from videos")
            return None
        root = pathlib.Path(reader.metadata[VIDEOS]) if videos is None else videos
        if not root.is_dir():
            raise UserError(
                f"{root}, the folder of the videos of {reader.index_path}, is not there: name it with --videos, or take"
                " --no-clips, which encodes their first frames alone"
            )
        frames, height, width = fit.clip_shape(self._family)
        mesh = build.own_devices(self._config)
        # A clip on each device, or on those that share one along context and tensor.
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        encode = jax.jit(build.make_family(self._config, mesh).codec.encode)

        def on_all_devices(clips: np.ndarray) -> dict[str, np.ndarray]:
            return jax.device_get(encode(self._codec, jax.device_put(clips, batch_sharding(mesh))))

        return ClipSource(
            root.resolve(), frames, self._family.fps, (height, width), rows=rows, encode=on_all_devices,
            latents=fit.clip_latents(self._family),
        )  # fmt: skip

    def keep_negative(self, folder: pathlib.Path, name: str) -> bool:
        """Encodes the config's negative text for a record set that lacks it; returns whether it did.

        To be called before `encode`, so that a set that is complete has it.
        """
        text, encode = self.guidance.negative, self._family.encoders.text
        return keep_negative(folder, name, text, text_encoder=fit.text_encoder(self._identity), encode_text=encode)

    def encode_split(
        self,
        reader: RecordReader,
        folder: pathlib.Path,
        *,
        name: str,
        splits: Splits,
        progress: Callable[[], contextlib.AbstractContextManager],
        **options,
    ) -> dict[str, dict[str, int]]:
        """Encodes record set `name` and those that are split off from it, with their negative texts.

        The sets that are split off come first, so that the training set never holds an image of theirs. `progress` is
        entered for each set and gives `encode_records` its own; other `options` are that function's. All processes of
        a job call this together, each with its own shards in `only`.

        Returns:
          Its counts by set, over all processes of the job, and in `negative` whether a negative text was encoded.

        Raises:
          RecordError: see `encode_records`, `splits.check_names` and `Splits.check`.
        """
        check_names(folder, name, splits)
        if splits:
            splits.check(reader.heads().image_id)
        counts = {}
        if hosts.place_in_job()[1] > 1:
            _ = self._codec  # reading a checkpoint waits for all processes, also for those that find nothing to encode
        for part in (*splits.names, name):
            of_part = part if part in splits.names else None
            negative = self.keep_negative(folder, part)
            with progress() as show:
                found = self.encode(
                    reader, folder, name=part, chosen=lambda image, of_part=of_part: splits.set_of(image) == of_part,
                    metadata=splits.metadata(reader.index_path.stem), progress=show, **options,
                )  # fmt: skip
            counts[part] = found | {"negative": int(negative)}
        return {part: _of_job(found) for part, found in counts.items()}

    @functools.cached_property
    def _identity(self) -> dict[str, str]:
        """`fit.identity` of encoders that belong to the base."""
        fit.check_encoders(self._family, base_model.origin(self._config.base))
        return fit.identity(self._family)


def _of_job(counts: dict[str, int]) -> dict[str, int]:
    """Counts of a set over all processes, each of which wrote its own shards; waits for the others."""
    process, processes = hosts.place_in_job()
    if processes == 1:
        return counts
    keys = (*SUMMED, "shards_missing", "negative")
    own = np.array([[counts.get(key, 0) for key in keys]], np.float64)
    every = dict(zip(keys, hosts.join_rows(np.array([process]), own, processes).T.astype(int), strict=True))
    # Whoever ended last saw all shards.
    whole = {"shards_missing": int(every["shards_missing"].min()), "negative": int(every["negative"].max())}
    return counts | {key: int(every[key].sum()) for key in SUMMED} | whole


def is_complete(folder: pathlib.Path, name: str) -> bool:
    """Whether a whole record set is there."""
    try:
        RecordReader(folder, name)
    except (RecordError, OSError):
        return False
    return True
