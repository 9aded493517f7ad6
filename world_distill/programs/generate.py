"""Clips from images and texts, with the base, the Demonstrator or a trained Executor.

Every clip is three files, written in this order: NAME.mp4, NAME.png (a contact sheet) and NAME.json (every setting). A
clip whose JSON is there is done: called again after an interruption, only the missing ones are made. Clip k of any
image starts from the noise of (seed, k), whatever else is made with it.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import world_distill
from world_distill import build, console
from world_distill.core import flow
from world_distill.data.images.decode import read_image
from world_distill.data.records.batches import Arrays, pad, scene_problem, stack_scenes
from world_distill.data.records.encoder_calls import fit_image, scene_arrays, text_states
from world_distill.data.records.fit import check_encoders, check_fit
from world_distill.data.records.negative import pad_negative
from world_distill.data.records.reader import EncodedRecord, RecordReader
from world_distill.devices.sharding import batch_sharding
from world_distill.errors import UserError
from world_distill.evaluation import clip_sampler
from world_distill.interfaces import ModelFamily
from world_distill.settings.loading import load_config, override
from world_distill.storage import atomic, video_files
from world_distill.structs import Condition, PyTree, Texts
from world_distill.training import run_folder
from world_distill.weights import base_model
from world_distill.weights.lora_files import combine, load_lora, lora_file

_SHOWN = 8  # settings that a message names
SHEET_FRAMES = 8  # of a clip on its contact sheet


@dataclasses.dataclass(frozen=True)
class Request:
    """What `generate` is asked for.

    Attributes:
      out: folder of the clips.
      images: scene images; `tasks` and `solutions` are texts for them, one for all or one each.
      records: folder of encoded records in place of images and texts; `name` is the record set, `text` which text of
        a record is told (task, solution or both), `limit` how many records are taken, 0 for all.
      executors: folders of runs, or LoRA files, whose changes are added up; empty is the base.
      strengths: of the executors, one for all or one each; empty: 1.
      alphas: of LoRA files that do not say it, one for all or one each, None for a file that does; empty: None.
      without: parts of LoRA files that are left out (`weights.lora_names.LEFT_OUT`).
      sampler: euler or unipc.
      steps: of the sampler; 0 takes the config's.
      shift: of the sampler's times; None takes the config's.
      times: Euler's own times, falling from 1; the 0 at the end is added. Empty: a shifted grid.
      guidance: scale of classifier-free guidance, away from the text `negative`; 1 is none.
      count: clips of each image and text.
      batch: clips made at once; 0 is one a device.
      seed: of the noise.
    """

    out: pathlib.Path
    images: tuple[pathlib.Path, ...] = ()
    tasks: tuple[str, ...] = ()
    solutions: tuple[str, ...] = ()
    records: pathlib.Path | None = None
    name: str = "test"
    text: str = "task"
    limit: int = 0
    executors: tuple[pathlib.Path, ...] = ()
    strengths: tuple[float, ...] = ()
    alphas: tuple[float | None, ...] = ()
    without: tuple[str, ...] = ()
    sampler: str = "euler"
    steps: int = 0
    shift: float | None = None
    times: tuple[float, ...] = ()
    guidance: float = 1.0
    negative: str = ""
    count: int = 1
    batch: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.guidance < 1:
            raise UserError(f"--guidance {self.guidance}: the scale is at least 1, which is no guidance")
        for flag, given in (("strength", self.strengths), ("alpha", self.alphas)):
            if len(given) not in (0, 1, len(self.executors)):
                raise UserError(
                    f"{len(given)} --{flag} for {len(self.executors)} --executor: give one, or one for each"
                )
        if self.times and self.sampler != "euler":
            raise UserError("--sigmas is for --sampler euler; unipc makes its own from --steps and --shift")
        listed = len(self.times) - (self.times[-1] == 0) if self.times else 0
        if listed and (self.shift is not None or self.steps not in (0, listed)):
            raise UserError(f"--sigmas lists {listed} steps as they are: leave out --steps and --shift")
        if (self.records is None) == (not self.images):
            raise UserError("give either --image with --task or --solution, or --records")
        if self.images and not self.tasks and not self.solutions:
            raise UserError("--image needs --task, --solution or both")
        for kind, given in (("task", self.tasks), ("solution", self.solutions)):
            if len(given) not in (0, 1, len(self.images)) and self.images:
                raise UserError(
                    f"{len(given)} --{kind} for {len(self.images)} --image: give one, or one for each image"
                )


@dataclasses.dataclass(frozen=True)
class Job:
    """One clip to be made."""

    name: str  # of its files, without suffix
    role: str  # base, executor or demonstrator
    prompt: str
    number: int  # of the clip among those of its image and text
    source: dict[str, Any]  # what the JSON says about where scene and text come from
    load: Callable[[], tuple[Arrays, Arrays]]  # the scene's arrays and the text's states [l d], by name


def generate(request: Request, config) -> tuple[int, int]:
    """Makes the clips that are not there yet; returns how many were made, and how many were there.

    Raises:
      UserError: flags or files that do not fit together, or clips of other settings in the folder.
    """
    video_files.require_pyav()
    settings = _settings(request, config)
    mesh = build.start_devices(config)
    family = build.make_family(config, mesh)
    lora, settings["executor"] = _load_executors(request, config, family, mesh)
    base = functools.cache(lambda: base_model.load_base(family, config, mesh))
    rows = request.batch or len(mesh.devices.flat)
    jobs = list(_jobs(request, family, base, base_model.origin(config.base)))
    waiting = [job for job in jobs if not _is_done(request.out, job, settings)]
    if not waiting:
        return 0, len(jobs)
    request.out.mkdir(parents=True, exist_ok=True)  # before the sampler is compiled
    lengths = build.text_lengths(family, config)
    sample = _sampler(family, mesh, settings, lengths, _negative(request, family, lengths))
    written = 0
    with console.Progress("clip", len(waiting)) as progress:
        progress.note("compiling the sampler")
        for role in dict.fromkeys(job.role for job in waiting):
            of_role = [job for job in waiting if job.role == role]
            for start in range(0, len(of_role), rows):
                batch = of_role[start : start + rows]
                filled = batch + batch[-1:] * (rows - len(batch))
                clips = sample(base(), lora if role == "executor" else None, filled, request.seed)
                for job, clip in zip(batch, clips, strict=False):
                    _write(request.out, job, clip, settings, family.fps)
                    written += 1
                    progress.at(written)
    return len(waiting), len(jobs) - len(waiting)


# ---- What is asked for


def resolve_config(config: str | None, executors: Sequence[pathlib.Path], overrides: Mapping[str, Any]) -> Any:
    """The config named `config`, or else that of the first run among `executors`, with the overrides.

    Raises:
      UserError: neither is given, or an override does not fit.
    """
    run = next((path for path in executors if is_run(path)), None)
    if config is None:
        if run is None:
            for path in executors:
                if not path.exists():
                    raise UserError(f"--executor {path} is not there: it is a LoRA file or the folder of a run")
            raise UserError("--config is needed: which model is it? (Only the folder of a run brings its own.)")
        loaded = run_folder.read_config(run)
        override(loaded, overrides)
        return loaded
    loaded = load_config(config, overrides)
    if run is not None:
        # The rank of the run's LoRA, and the scale that it was trained with.
        loaded.executor = run_folder.read_config(run).executor
    return loaded


def _settings(request: Request, config) -> dict[str, Any]:
    """All that decides a clip, besides its scene and its text."""
    given = config.sampler
    settings = {
        "sampler": request.sampler,
        "steps": request.steps or given.steps,
        "shift": given.shift if request.shift is None else request.shift,
        "sigmas": None,
        "guidance": request.guidance,
        "negative": request.negative if request.guidance != 1 else None,
        "seed": request.seed,
        "model": config.model.to_dict(),
        "base": config.base,
        "version": world_distill.__version__,
    }
    own = () if request.steps or request.shift is not None else given.explicit
    if own and request.sampler == "unipc":
        raise UserError(
            "--sampler unipc makes its own grid of times, and this model was distilled for a listed one"
            " (config.sampler.explicit): take --sampler euler, or give --steps and --shift"
        )
    if times := list(request.times or own):
        times += [] if times[-1] == 0 else [0.0]
        settings |= {"sigmas": times, "steps": len(times) - 1, "shift": None}
    return settings


def _jobs(
    request: Request, family: ModelFamily, base: Callable[[], PyTree], origin: Mapping[str, Any]
) -> Iterator[Job]:
    """Everything that is asked for, done or not; nothing is encoded before `Job.load`.

    `origin` is the metadata of the base's checkpoint.
    """
    check_encoders(family, origin)
    inputs = _from_records(request, family, origin) if request.records else _from_images(request, family, base)
    told = "executor" if request.executors else "base"
    names = set()
    for name, kind, prompt, source, load in inputs:
        role = told if kind == "task" else "demonstrator"
        while f"{name}.{role}" in names:  # pictures of one name in two folders
            name += "+"
        names.add(f"{name}.{role}")
        for number in range(request.count):
            yield Job(f"{name}.{role}.{number}", role, prompt, number, source, load)


def _from_records(request: Request, family: ModelFamily, origin: Mapping[str, Any]) -> Iterator[tuple]:
    assert request.records is not None
    reader = RecordReader(request.records, request.name, EncodedRecord)
    kinds = ("task", "solution") if request.text == "both" else (request.text,)
    for i in range(min(request.limit or len(reader), len(reader))):
        record = reader[i]
        if i == 0:
            check_fit(reader, family, origin)
        if problem := scene_problem(record.scene, family.encoders.scenes):
            raise UserError(f"{reader.index_path}: {problem}")
        source = {"records": str(request.records), "name": request.name, "id": record.id}
        for kind in kinds:

            def load(i=i, kind=kind):
                return reader[i].scene, getattr(reader[i], f"{kind}_states")

            yield record.id, kind, getattr(record, kind), source, load


def _from_images(request: Request, family: ModelFamily, base: Callable[[], PyTree]) -> Iterator[tuple]:
    prompts = [(kind, given) for kind, given in (("task", request.tasks), ("solution", request.solutions)) if given]
    unique = list(dict.fromkeys(text for _, given in prompts for text in given))
    encoders = family.encoders
    states = functools.cache(lambda: dict(zip(unique, text_states(unique, encoders.text), strict=True)))
    for i, path in enumerate(request.images):
        image = read_image(path)
        fitted = image if encoders.image_size is None else fit_image(image, encoders.image_size)
        scene = functools.cache(
            lambda fitted=fitted: scene_arrays(fitted, lambda images: encoders.scene(base(), images))
        )
        source = {"image": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for kind, given in prompts:
            text = given[i % len(given)]
            yield path.stem, kind, text, source, lambda scene=scene, text=text: (scene(), states()[text])


def _negative(request: Request, family: ModelFamily, lengths: Mapping[str, int]) -> Texts | None:
    """The negative text's states, if guidance is on."""
    if request.guidance == 1:
        return None
    (states,) = text_states([request.negative], family.encoders.text)
    return pad_negative(states, lengths)


def is_run(path: pathlib.Path) -> bool:
    """Whether a path is taken for the folder of a run, and not for a LoRA."""
    return path.is_dir() and ((path / "config.json").is_file() or not list(path.glob("*.safetensors")))


def _load_executors(
    request: Request, config, family: ModelFamily, mesh: jax.sharding.Mesh
) -> tuple[PyTree | None, Any]:
    """(weights, what tells them from any others)."""
    if not request.executors:
        return None, None
    count = len(request.executors)
    strengths = request.strengths if len(request.strengths) == count else (request.strengths or (1.0,)) * count
    alphas = request.alphas if len(request.alphas) == count else (request.alphas or (None,)) * count
    found = [
        _load_executor(path, request.without, alpha, config, family, mesh)
        for path, alpha in zip(request.executors, alphas, strict=True)
    ]
    if len(found) == 1 and strengths == (1.0,):
        return found[0]
    try:
        weights = combine([weights for weights, _ in found], strengths)
    except ValueError as error:
        raise UserError(f"--executor {', '.join(map(str, request.executors))}: {error}") from error
    named = [known | {"strength": strength} for (_, known), strength in zip(found, strengths, strict=True)]
    return weights, named if len(named) > 1 else named[0]


def _load_executor(
    path: pathlib.Path,
    without: Sequence[str],
    alpha: float | None,
    config,
    family: ModelFamily,
    mesh: jax.sharding.Mesh,
) -> tuple[PyTree, dict[str, Any]]:
    if is_run(path):
        if alpha is not None:
            raise UserError(f"{path} is the folder of a run, which says its alpha: --alpha is for LoRA files")
        trained = run_folder.read_config(path)
        scale = build.make_family(trained).lora_scale
        with trained.unlocked():
            trained.model = config.model  # that the Executor fits it is checked when it is read
        lora, step = run_folder.load_executor(trained, mesh, path)
        if lora is None:
            raise UserError(f"{path} has no checkpoint yet: there is no Executor")
        if "full" not in lora and scale != family.lora_scale:  # trained with another alpha / rank than is used here
            lora = combine([lora], [scale / family.lora_scale])
        return lora, {"run": str(path), "step": step}
    lora = load_lora(path, family, mesh, without=without, alpha=alpha)
    known = {"file": str(path), "sha256": hashlib.sha256(lora_file(path).read_bytes()).hexdigest()}
    known |= {} if alpha is None else {"alpha": alpha}
    return lora, known | ({"without": sorted(without)} if without else {})


# ---- Sampling


def _sampler(
    family: ModelFamily,
    mesh: jax.sharding.Mesh,
    settings: dict[str, Any],
    lengths: Mapping[str, int],
    negative: Texts | None,
) -> Callable[..., np.ndarray]:
    """(base, lora, jobs, seed) -> clips [b F H W 3] uint8, compiled once for each role."""
    steps, shift, times = (settings[name] for name in ("steps", "shift", "sigmas"))
    if settings["sampler"] == "unipc":
        schedule: clip_sampler.Times | clip_sampler.UniPC = clip_sampler.UniPC(steps, shift)
    else:
        schedule = tuple(flow.sampling_times(steps, shift or 1.0, times and tuple(times)).tolist())
    sample = clip_sampler.make_sampler(family, mesh, schedule, settings["guidance"])
    rows = batch_sharding(mesh)

    def clips(base, lora, jobs: Sequence[Job], seed: int) -> np.ndarray:
        scenes, texts = zip(*(job.load() for job in jobs), strict=True)
        fits = len(jobs) % math.prod(mesh.shape[axis] for axis in ("data", "fsdp")) == 0
        condition = jax.device_put(Condition(pad(texts, lengths), stack_scenes(scenes)), rows if fits else None)
        numbers = np.array([job.number for job in jobs], np.int32)
        return np.asarray(sample(base, lora, condition, negative, jax.random.key(seed), numbers))

    return clips


# ---- Files


def _describe(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    described = {"role": job.role, "prompt": job.prompt, "number": job.number, "source": job.source, **settings}
    if job.role != "executor":
        described["executor"] = None
    return json.loads(json.dumps(described))  # as it comes back from the file


def _is_done(folder: pathlib.Path, job: Job, settings: dict[str, Any]) -> bool:
    path = folder / f"{job.name}.json"
    if not path.exists():
        return False
    try:
        found, wanted = json.loads(path.read_text()), _describe(job, settings)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON ({error}); delete it, and the clip is made again") from error
    have, want = (flatten_dict({key: x.get(key) for key in wanted}, sep=".") for x in (found, wanted))
    changes = [f"{key} {have.get(key)!r} -> {want.get(key)!r}" for key in have | want if have.get(key) != want.get(key)]
    if changes:
        shown = ", ".join(changes[:_SHOWN]) + (f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else "")
        raise UserError(f"{path} is of a clip with other settings ({shown}); take another --out")
    return True


def _write(folder: pathlib.Path, job: Job, clip: np.ndarray, settings: dict[str, Any], fps: float) -> None:
    video_files.save_mp4(folder / f"{job.name}.mp4", clip, fps)
    shown = np.unique(np.linspace(0, len(clip) - 1, SHEET_FRAMES).round().astype(int))
    video_files.save_sheet(folder / f"{job.name}.png", [clip[shown]], [job.prompt])
    shape = {"frames": len(clip), "height": clip.shape[1], "width": clip.shape[2], "fps": fps}
    atomic.write_json(folder / f"{job.name}.json", _describe(job, settings) | shape)
