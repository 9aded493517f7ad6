"""`world-distill generate`: clips from images and texts, with the base, the Demonstrator or a trained Executor.

Every clip is three files, written in this order: NAME.mp4, NAME.png (a contact sheet) and NAME.json (every setting). A
clip whose JSON is there is done: called again after an interruption, only the missing ones are made. Clip k of any
image starts from the noise of (seed, k), whatever else is made with it.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import world_distill
from world_distill import arguments, components, runs, video_io
from world_distill.config import UserError, load_config, override
from world_distill.core import flow, sampling, unipc
from world_distill.core.guidance import guided
from world_distill.data.encode import fit_image
from world_distill.data.images import read_image
from world_distill.data.pipeline import pad_texts
from world_distill.data.records import EncodedRecord, RecordReader
from world_distill.interfaces import ModelFamily
from world_distill.lora_files import read_lora
from world_distill.sharding import batch_sharding, tree_shardings
from world_distill.structs import Condition, PyTree

HELP = """\
Generate clips from images and texts.

--task is what an Executor is told (or the base, without --executor), --solution what the Demonstrator is told; with
both, both make a clip from the same noise. --executor is the folder of a run, whose config is used where --config is
not given, or a LoRA file in diffusers' or ComfyUI's layout. Several images take one text for all, or one each.
Encoded records (--records) need no text encoder.

  world-distill generate --config wan22_5b --config.base=weights/wan22-5b --executor executor.safetensors \\
      --config.model.text_encoder=Wan2.2-TI2V-5B-Diffusers \\
      --image kitchen.png --task "[hand]: Pick up the cup." --out clips
  world-distill generate --executor runs/wan --records data --name test --limit 16 --out clips
"""
SHEET_FRAMES = 8  # of a clip on its contact sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE.py[:ARG]", help="config of model and sampler (default: that of the --executor run)")
    add("--out", type=pathlib.Path, required=True, help="folder for the clips; an interrupted call continues there")
    add("--image", type=pathlib.Path, action="append", default=[], help="scene image; may be repeated")
    add("--task", action="append", default=[], help="task, `[agent]: imperative.`; one, or one for each image")
    add("--solution", action="append", default=[], help="solution for the Demonstrator; one, or one for each image")
    add("--records", type=pathlib.Path, help="folder of encoded records, in place of images and texts")
    add("--name", default="test", help="name of the record set (default: test)")
    add("--limit", type=int, default=0, help="take the first N records only (default: all)")
    add("--text", choices=("task", "solution", "both"), default="task", help="text of records (default: task)")
    add("--executor", type=pathlib.Path, help="folder of a run, or a LoRA file")
    add(
        "--sampler", choices=("euler", "unipc"), default="euler", help="euler, as in training (default), or Wan's unipc"
    )
    add("--steps", type=int, help="sampler steps (default: config.sampler.steps)")
    add("--shift", type=float, help="of the sampler's times (default: config.sampler.shift)")
    add("--sigmas", help="for euler: times with commas between, falling from 1; the 0 at the end is added")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance scale (default: 1, none)")
    add("--negative", default="", help="what guidance leads away from (default: the empty text)")
    add("--frames", type=int, help="of a clip (default: config.model.frames)")
    add("--size", metavar="HxW", help="height and width in pixels (default: config.model.size)")
    add("--count", type=int, default=1, help="clips of each image and text (default: 1)")
    add("--batch", type=int, default=0, help="clips made at once (default: one a device)")
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    arguments.add_json(parser)


@dataclasses.dataclass(frozen=True)
class Job:
    """One clip to be made."""

    name: str  # of its files, without suffix
    role: str  # base, executor or demonstrator
    prompt: str
    number: int  # of the clip among those of its image and text
    source: dict[str, Any]  # what the JSON says about where scene and text come from
    load: Callable[[], tuple[np.ndarray, np.ndarray]]  # scene's latent [1 h w c] and text's states [l d]


def run(args: argparse.Namespace) -> int:
    made, kept = generate(args, resolve_config(args))
    arguments.say(f"{args.out}: {made} clips made, {kept} were there")
    if args.json:
        arguments.write_json(args.json, {"made": made, "kept": kept})
    return 0


def generate(args: argparse.Namespace, config) -> tuple[int, int]:
    """Makes the clips that are not there yet; returns how many were made, and how many were there.

    Raises:
      UserError: flags or files that do not fit together, or clips of other settings in the folder.
    """
    video_io.require_mp4()
    settings = _settings(args, config)
    mesh = components.start_devices(config)
    family = components.make_family(config, mesh)
    lora, settings["executor"] = _load_executor(args.executor, config, family, mesh)
    base = functools.cache(lambda: components.load_base(family, config, mesh))
    rows = args.batch or len(mesh.devices.flat)
    jobs = list(_jobs(args, family, base))
    waiting = [job for job in jobs if not _is_done(args.out, job, settings)]
    if not waiting:
        return 0, len(jobs)
    sample = make_sampler(family, mesh, settings, _negative(args, family, config.text_length))
    with tqdm(total=len(waiting), unit="clip", disable=None) as progress:
        for role in dict.fromkeys(job.role for job in waiting):
            of_role = [job for job in waiting if job.role == role]
            for start in range(0, len(of_role), rows):
                batch = of_role[start : start + rows]
                filled = batch + batch[-1:] * (rows - len(batch))
                clips = sample(base(), lora if role == "executor" else None, filled, config.text_length, args.seed)
                for job, clip in zip(batch, clips, strict=False):
                    _write(args.out, job, clip, settings, family.fps)
                    progress.update(1)
    return len(waiting), len(jobs) - len(waiting)


# ---- What is asked for


def resolve_config(args: argparse.Namespace) -> Any:
    """The config of --config, or of the --executor run, with what the other flags change in it."""
    overrides = dict(args.overrides)
    if args.frames:
        overrides["model.frames"] = str(args.frames)
    if args.size:
        overrides["model.size"] = str(_size(args.size))
    is_run = args.executor is not None and args.executor.is_dir()
    if args.config is None and not is_run:
        raise UserError("--config is needed: which model is it? (Only the folder of a run brings its own.)")
    if args.config is None:
        config = runs.read_config(args.executor)
        override(config, overrides)
        return config
    config = load_config(args.config, overrides)
    if is_run:
        config.executor = runs.read_config(args.executor).executor  # its rank, and the scale that it was trained with
    return config


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError as error:
        raise UserError(f"--size {text}: expected HEIGHTxWIDTH in pixels, such as 480x832") from error
    return height, width


def _settings(args: argparse.Namespace, config) -> dict[str, Any]:
    """All that decides a clip, besides its scene and its text."""
    sampler = config.sampler
    if args.guidance < 1:
        raise UserError(f"--guidance {args.guidance}: the scale is at least 1, which is no guidance")
    settings = {
        "sampler": args.sampler,
        "steps": args.steps or sampler.steps,
        "shift": sampler.shift if args.shift is None else args.shift,
        "sigmas": list(sampler.explicit) or None,
        "guidance": args.guidance,
        "negative": args.negative if args.guidance != 1 else None,
        "seed": args.seed,
        "model": config.model.to_dict(),
        "base": config.base,
        "version": world_distill.__version__,
    }
    if args.steps or args.shift is not None:
        settings["sigmas"] = None
    if args.sigmas:
        if args.sampler != "euler":
            raise UserError("--sigmas is for --sampler euler; unipc makes its own from --steps and --shift")
        try:
            given = [float(value) for value in args.sigmas.split(",")]
        except ValueError as error:
            raise UserError(f"--sigmas {args.sigmas}: expected numbers with commas between") from error
        settings["sigmas"] = given if given[-1] == 0 else [*given, 0.0]
    if settings["sigmas"]:
        settings |= {"steps": len(settings["sigmas"]) - 1, "shift": None}
    return settings


def _jobs(args: argparse.Namespace, family: ModelFamily, base: Callable[[], PyTree]) -> Iterator[Job]:
    """Everything that is asked for, done or not; nothing is encoded before `Job.load`."""
    if (args.records is None) == (not args.image):
        raise UserError("give either --image with --task or --solution, or --records")
    inputs = _from_records(args, family) if args.records else _from_images(args, family, base)
    told = "executor" if args.executor else "base"
    names = set()
    for name, kind, prompt, source, load in inputs:
        role = told if kind == "task" else "demonstrator"
        while f"{name}.{role}" in names:  # pictures of one name in two folders
            name += "+"
        names.add(f"{name}.{role}")
        for number in range(args.count):
            yield Job(f"{name}.{role}.{number}", role, prompt, number, source, load)


def _from_records(args: argparse.Namespace, family: ModelFamily) -> Iterator[tuple]:
    reader = RecordReader(args.records, args.name, EncodedRecord)
    kinds = ("task", "solution") if args.text == "both" else (args.text,)
    for i in range(min(args.limit or len(reader), len(reader))):
        record = reader[i]
        if record.scene.shape[1:] != family.latent_shape[1:]:
            raise UserError(
                f"{reader.index_path}: scenes are {record.scene.shape[1:]} latents, and this model and size have"
                f" {family.latent_shape[1:]}: encode the records for it, or take the size that they were encoded for"
            )
        source = {"records": str(args.records), "name": args.name, "id": record.id}
        for kind in kinds:

            def load(i=i, kind=kind):
                return reader[i].scene, getattr(reader[i], f"{kind}_text")

            yield record.id, kind, getattr(record, kind), source, load


def _from_images(args: argparse.Namespace, family: ModelFamily, base: Callable[[], PyTree]) -> Iterator[tuple]:
    texts = {"task": args.task, "solution": args.solution}
    if not any(texts.values()):
        raise UserError("--image needs --task, --solution or both")
    for kind, given in texts.items():
        if len(given) not in (0, 1, len(args.image)):
            raise UserError(f"{len(given)} --{kind} for {len(args.image)} --image: give one, or one for each image")
    prompts = [(kind, given) for kind, given in texts.items() if given]
    unique = list(dict.fromkeys(text for _, given in prompts for text in given))
    states = functools.cache(lambda: dict(zip(unique, family.encode_text(unique), strict=True)))
    for i, path in enumerate(args.image):
        image = read_image(path)
        fitted = image if family.image_size is None else fit_image(image, family.image_size)
        scene = functools.cache(lambda fitted=fitted: family.encode_scene(base(), fitted[None])[0])
        source = {"image": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for kind, given in prompts:
            text = given[i % len(given)]
            yield path.stem, kind, text, source, lambda scene=scene, text=text: (scene(), states()[text])


def _negative(args: argparse.Namespace, family: ModelFamily, length: int) -> tuple[np.ndarray, np.ndarray] | None:
    """States [l d] and mask [l] of the negative text, if guidance is on."""
    if args.guidance == 1:
        return None
    states, mask = pad_texts(family.encode_text([args.negative]), length)
    return states[0], mask[0]


def _load_executor(
    path: pathlib.Path | None, config, family: ModelFamily, mesh: jax.sharding.Mesh
) -> tuple[PyTree | None, dict[str, Any] | None]:
    """(weights, what tells them from any others)."""
    if path is None:
        return None, None
    if path.is_dir():
        trained = runs.read_config(path)
        with trained.unlocked():
            trained.model = config.model  # that the Executor fits it is checked when it is read
        lora, step = runs.load_executor(trained, mesh, path)
        if lora is None:
            raise UserError(f"{path} has no checkpoint yet: there is no Executor")
        return lora, {"run": str(path), "step": step}
    if family.linears is None:
        raise UserError(f"--executor {path}: model family {family.name} has no LoRA files; name the folder of a run")
    lora = read_lora(path, family.linears, family.kernel_shapes(), scale=family.lora_scale)
    placed = jax.device_put(lora, tree_shardings(mesh, family.lora_axes(lora), lora))
    return placed, {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


# ---- Sampling


@functools.lru_cache(maxsize=4)
def _program(
    family: ModelFamily, sampler: str, steps: int, shift: float | None, sigmas: tuple[float, ...] | None, scale: float
) -> Callable[..., jax.Array]:
    """(base, lora, condition, negative text or None, key, numbers of the clips) -> clips."""
    options = {"latent_shape": family.latent_shape, "frame_mask": family.free_frames}
    if sampler == "unipc":
        schedule = unipc.unipc_schedule(steps, shift)
    else:
        grid = flow.sampling_times(steps, shift or 1.0, sigmas)

    @jax.jit
    def sample(base, lora, condition, negative, key, numbers):
        denoise = family.denoise if negative is None else guided(family.denoise, scale, *negative)
        keys = sampling.sample_keys(key, numbers)
        if sampler == "unipc":
            rollout = unipc.unipc_rollout(denoise, base, lora, condition, keys, schedule=schedule, **options)
        else:
            rollout = sampling.rollout(denoise, base, lora, condition, keys, times=grid, keep_states=False, **options)
        return family.decode(base, rollout.latents)

    return sample


def make_sampler(
    family: ModelFamily,
    mesh: jax.sharding.Mesh,
    settings: dict[str, Any],
    negative: tuple[np.ndarray, np.ndarray] | None,
) -> Callable[..., np.ndarray]:
    """(base, lora, jobs, text_length, seed) -> clips [b F H W 3] uint8, compiled once for each role."""
    how = (settings[name] for name in ("sampler", "steps", "shift", "sigmas", "guidance"))
    sample = _program(family, *(tuple(x) if isinstance(x, list) else x for x in how))
    rows = batch_sharding(mesh)

    def clips(base, lora, jobs: Sequence[Job], text_length: int, seed: int) -> np.ndarray:
        scenes, texts = zip(*(job.load() for job in jobs), strict=True)
        text, mask = pad_texts(texts, text_length)
        scene = np.stack(scenes).astype(np.float32)
        fits = len(jobs) % math.prod(mesh.shape[axis] for axis in ("data", "fsdp")) == 0
        put = (lambda x: jax.device_put(x, rows)) if fits else jax.device_put
        condition = Condition(put(text), put(mask), put(scene))
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
    other = [key for key in wanted if found.get(key) != wanted[key]]
    if other:
        changes = ", ".join(f"{key} {found.get(key)!r} -> {wanted[key]!r}" for key in other)
        raise UserError(f"{path} is of a clip with other settings ({changes}); take another --out")
    return True


def _write(folder: pathlib.Path, job: Job, clip: np.ndarray, settings: dict[str, Any], fps: float) -> None:
    video_io.save_mp4(folder / f"{job.name}.mp4", clip, fps)
    shown = np.unique(np.linspace(0, len(clip) - 1, SHEET_FRAMES).round().astype(int))
    video_io.save_sheet(folder / f"{job.name}.png", [clip[shown]], [job.prompt])
    shape = {"frames": len(clip), "height": clip.shape[1], "width": clip.shape[2], "fps": fps}
    arguments.write_json(folder / f"{job.name}.json", _describe(job, settings) | shape)
