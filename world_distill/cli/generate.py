"""`world-distill generate`."""

import argparse

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

PARTS = ("biases", "norms", "modulation", "weights", "text-encoder", "image-branch", "audio", "text-connectors")

RECIPE = "wan22_5b:official"  # the config of --recipe

HELP = """\
Generate clips from images and texts.

--task is what an Executor is told (or the base, without --executor), --solution what the Demonstrator is told; with
both, both make a clip from the same noise. --executor is the folder of a run, whose config is used where --config is
not given, or a LoRA: a file, or a folder that diffusers or PEFT saved (`world-distill inspect-weights` says what a file
is). Several are added up, each times its --strength. Several images take one text for all, or one each. Encoded records
(--records) need no text encoder.

--recipe samples as the published model's authors do: UniPC, with the guidance and the negative text of the config's
section `demonstrator`, and with --config wan22_5b:official where no config is given. A trained Executor needs no
guidance: give it --guidance 1.

  world-distill generate --config wan22_5b --config.base=weights/wan22-5b --executor executor.safetensors \\
      --config.model.text_encoder=Wan2.2-TI2V-5B-Diffusers \\
      --image kitchen.png --task "[hand]: Pick up the cup." --out clips
  world-distill generate --recipe --config.base=weights/wan22-5b --config.model.text_encoder=Wan2.2-TI2V-5B-Diffusers \\
      --image kitchen.png --solution "A hand reaches …" --out clips
  world-distill generate --executor runs/wan --records data --name test --limit 16 --out clips
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE.py[:ARG]", help="config of model and sampler (default: that of the --executor run)")
    add("--out", type=arguments.path, required=True, help="folder for the clips; an interrupted call continues there")
    add("--image", type=arguments.path, action="append", default=[], help="scene image; may be repeated")
    add("--task", action="append", default=[], help="task, `[agent]: imperative.`; one, or one for each image")
    add("--solution", action="append", default=[], help="solution for the Demonstrator; one, or one for each image")
    add("--records", type=arguments.path, help="folder of encoded records, in place of images and texts")
    add("--name", default="test", help="name of the record set (default: test)")
    add("--limit", type=arguments.LIMIT, default=0, help="take the first N records only (default: all)")
    add("--text", choices=("task", "solution", "both"), default="task", help="text of records (default: task)")
    add("--executor", type=arguments.path, action="append", default=[], help="folder of a run, or LoRA; repeatable")
    add("--strength", type=float, action="append", default=[], help="of --executor; one, or one for each (default: 1)")
    alpha = "of LoRA files that do not say it (default: their rank); one, or one for each, 0 for a file that does"
    add("--alpha", type=arguments.ALPHA, action="append", default=[], help=alpha)
    add("--without", choices=PARTS, action="append", default=[], help="part of a LoRA to leave out; may be repeated")
    add(
        "--sampler",
        choices=("euler", "unipc"),
        help="euler, as in training (default), or Wan's unipc (that of --recipe)",
    )
    add("--recipe", action="store_true", help="sample as the authors of the published model do")
    add("--steps", type=arguments.COUNT, help="sampler steps (default: config.sampler.steps)")
    add("--shift", type=arguments.POSITIVE, help="of the sampler's times (default: config.sampler.shift)")
    add("--sigmas", help="for euler: times with commas between, falling from 1; the 0 at the end is added")
    add("--guidance", type=arguments.SCALE, help="classifier-free guidance scale (default: 1, none)")
    add("--negative", help="what guidance leads away from (default: the empty text)")
    add("--frames", type=arguments.COUNT, help="of a clip (default: config.model.frames)")
    add("--size", metavar="HxW", help="height and width in pixels (default: config.model.size)")
    add("--count", type=arguments.COUNT, default=1, help="clips of each image and text (default: 1)")
    add("--batch", type=arguments.LIMIT, default=0, help="clips made at once (default: one a device)")
    add("--seed", type=arguments.SEED, default=0, help="of the noise (default: 0)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.programs import generate

    overrides = dict(args.overrides)
    if args.frames:
        overrides["model.frames"] = str(args.frames)
    if args.size:
        overrides["model.size"] = str(_size(args.size))
    default = RECIPE if args.recipe and not any(map(generate.is_run, args.executor)) else None
    config = generate.resolve_config(args.config or default, args.executor, overrides)
    if args.recipe:
        told = config.demonstrator
        recipe = {"sampler": "unipc", "guidance": told.guidance, "negative": told.negative}
    else:
        recipe = {"sampler": "euler", "guidance": 1.0, "negative": ""}
    given = {name: getattr(args, name) for name in recipe if getattr(args, name) is not None}
    request = generate.Request(
        out=args.out, images=tuple(args.image), tasks=tuple(args.task), solutions=tuple(args.solution),
        records=args.records, name=args.name, text=args.text, limit=args.limit, executors=tuple(args.executor),
        strengths=tuple(args.strength), alphas=tuple(alpha or None for alpha in args.alpha),
        without=tuple(args.without), steps=args.steps or 0, shift=args.shift, times=_times(args.sigmas),
        **(recipe | given), count=args.count, batch=args.batch, seed=args.seed,
    )  # fmt: skip
    made, kept = generate.generate(request, config)
    console.finish(f"{made} clips made, {kept} were there", args.out)
    if args.json:
        atomic.write_json(args.json, {"made": made, "kept": kept})
    return 0


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError as error:
        raise UserError(f"--size {text}: expected HEIGHTxWIDTH in pixels, such as 480x832") from error
    return height, width


def _times(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in text.split(",")) if text else ()
    except ValueError as error:
        raise UserError(f"--sigmas {text}: expected numbers with commas between") from error
