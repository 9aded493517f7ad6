"""`world-distill ablate`."""

import argparse

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

HELP = """\
Train the variants of a config over several seeds at equal compute, and say which claims about them hold.

Ends with a table, a list of claims (holds, not resolved, reversed; each with its difference and 95 % interval), a
page with plots (ablation.html) and ablation.json in WORKDIR. Interrupted, it continues run by run.

All kinds of task are learnt, as in the README's table; --config sandbox:kinds=simple leaves out the two harder ones.

  world-distill ablate --workdir runs/ablation
  world-distill ablate --seeds 0 --variants on_policy,wmsd --workdir runs/small
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox:kinds=full")
    arguments.add_workdir(parser, default="runs/ablation")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    parser.add_argument("--variants", default="", help="comma-separated (default: those of config.ablation.variants)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.programs import ablate, equal_compute
    from world_distill.settings.loading import load_config

    config = arguments.config_from(args)
    seeds = arguments.seeds(args.seeds)
    variants = args.variants.split(",") if args.variants else list(config.ablation.variants)
    name, _, rest = args.config.partition(":")
    if bare := [part for part in rest.split(",") if part and "=" not in part]:
        raise UserError(f"--config {args.config}: variants are named with --variants, as in --variants {bare[0]}")

    def variant_config(variant: str, seed: int):
        address = f"{name}:{variant},{rest}" if rest else f"{name}:{variant}"
        return equal_compute.without_idle_guidance(load_config(address, dict(args.overrides) | {"seed": seed}))

    orderings = [ablate.Ordering(*o) for o in config.ablation.orderings]
    result = ablate.ablate(variant_config, variants, seeds, args.workdir, config.ablation.reference, orderings)
    console.say(ablate.table(result))
    console.say()
    for line in result["orderings"]:
        console.say(ablate.sentence(line))
    console.say()
    held = [line["outcome"] for line in result["orderings"]]
    console.finish(
        f"{held.count('holds')} of {len(held)} claims hold", args.workdir / "ablation.json",
        args.workdir / "ablation.html",
    )  # fmt: skip
    if args.json:
        atomic.write_json(args.json, result)
    return 0
