"""`world-distill generate`."""

import argparse

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

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
    add("--executor", type=arguments.path, help="folder of a run, or a LoRA file")
    add(
        "--sampler", choices=("euler", "unipc"), default="euler", help="euler, as in training (default), or Wan's unipc"
    )
    add("--steps", type=arguments.COUNT, help="sampler steps (default: config.sampler.steps)")
    add(
        "--shift",
        type=arguments.POSITIVE,
        help="of the sampler's times (default: config.sampler.shift)",
    )
    add("--sigmas", help="for euler: times with commas between, falling from 1; the 0 at the end is added")
    add(
        "--guidance",
        type=arguments.SCALE,
        default=1.0,
        help="classifier-free guidance scale (default: 1, none)",
    )
    add("--negative", default="", help="what guidance leads away from (default: the empty text)")
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
    config = generate.resolve_config(args.config, args.executor, overrides)
    request = generate.Request(
        out=args.out, images=tuple(args.image), tasks=tuple(args.task), solutions=tuple(args.solution),
        records=args.records, name=args.name, text=args.text, limit=args.limit, executor=args.executor,
        sampler=args.sampler, steps=args.steps or 0, shift=args.shift, times=_times(args.sigmas),
        guidance=args.guidance, negative=args.negative, count=args.count, batch=args.batch, seed=args.seed,
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
