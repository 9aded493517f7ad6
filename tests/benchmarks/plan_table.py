"""Does a training step fit, as slices grow: memory a chip, by XLA's compiler for TPUs, which needs no TPU.

Every row is a slice that makes 16 rollouts a chip, one of them on a chip at a time (weak scaling), with the weights in
up to 64 parts and copies of these parts beyond; or, `tensor 4`, what any trainer of LoRA does: one update by
distillation alone, of a clip on every four chips, over which heads and hidden units are spread. LTX-2's rows are steps
of its config as it is shipped. Needs the extra `tpu`.
A row takes minutes; with --json, what is there already is not compiled again, so that a run that was stopped goes on.

    python tests/benchmarks/plan_table.py --json plans.json
    python tests/benchmarks/plan_table.py --json plans.json --only 13b       # rows whose name has that
"""

import argparse
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from world_distill.programs import plan
from world_distill.settings.loading import load_config

ROLLOUTS, GROUP, PARTS = 16, 8, 64
PHASES = ("rollout", "demonstrator", "update")
# (config, topology, phases); decoding takes no part in scaling: each chip decodes one clip at a time.
ROWS = [
    *(("wan22_5b:wmsd", f"v5e:{shape}", PHASES) for shape in ("4x4", "8x8", "16x16")),
    *(("wan22_5b:wmsd", f"v5p:{shape}", PHASES) for shape in ("4x4x4", "8x8x8")),
    *(("wan22_5b:wmsd", f"v6e:{shape}", PHASES) for shape in ("2x2", "8x8", "16x16")),
    *((f"wan_sizes:{size}", "v5p:2x2x1", PHASES) for size in ("14b", "19b")),
    *((f"wan_sizes:{size}", "v6e:4x4", PHASES) for size in ("14b", "19b")),
    ("wan22_5b:wmsd", "2*v5p:4x4x4", PHASES),  # two slices
]
# A step of 192 rollouts as it is shipped; on four chips of v5e, heads are shared and kernels are int8.
LTX2 = [
    *((f"ltx2:{config}", topology, (*PHASES, "decode")) for topology in ("v5p:2x2x1", "v5p:4x4x4", "v6e:4x4")
      for config in ("wmsd", "wmsd,audio=off")),
]  # fmt: skip
LTX2_SMALL = [(f"ltx2:{config}", "v5e:2x2", (*PHASES, "decode")) for config in ("wmsd", "wmsd,audio=off")]
TENSOR = [
    ("wan_sizes:13b", "v5e:2x2"), ("wan_sizes:13b", "v5p:2x2x2"), ("wan_sizes:13b", "v6e:4x4"),
    ("wan_sizes:14b", "v5e:2x2"), ("wan_sizes:14b", "v5p:2x2x1"), ("wan_sizes:14b", "v6e:4x4"),
]  # fmt: skip
WHOLE = [
    ("wan_sizes:13b", "v5e:2x2", (*PHASES, "decode", "encode")),
    ("wan22_5b:wmsd", "v5e:2x2", (*PHASES, "decode", "encode")),
    ("wan22_5b:wmsd", "v5p:2x2x1", (*PHASES, "decode", "encode")),
]


def tensor_parallel(chips: int) -> dict:
    """Settings of an update of a clip on every four chips."""
    return {
        "rollout.tasks": chips // 4, "rollout.group": 1, "rollout.micro_batch": 0, "objective.rl": "none",
        "objective.updates": 1, "objective.minibatches": 1, "objective.draws": 1, "mesh.fsdp": -1, "mesh.tensor": 4,
    }  # fmt: skip


def as_shipped(chips: int) -> dict:
    """Nothing, or that chips share a clip, where an update has fewer than they are: 192 rollouts in four parts."""
    return {"mesh.fsdp": 16, "mesh.tensor": chips // 16} if chips > 48 else {}


def tensor_int8(chips: int) -> dict:
    return {"mesh.fsdp": -1, "mesh.tensor": 4, "model.int8": True}


def weak_scaling(chips: int) -> dict:
    """Settings of a step of as many rollouts on every chip of any slice."""
    parts = min(chips, PARTS)
    return {
        "rollout.tasks": ROLLOUTS * chips // GROUP, "rollout.group": GROUP, "rollout.micro_batch": chips,
        "objective.micro_batch": chips, "model.rows": chips, "model.vae_dtype": "bfloat16",
        "mesh.fsdp": parts, "mesh.data": chips // parts,
    }  # fmt: skip


def make_row(name: str, topology: str, phases: tuple[str, ...], settings) -> dict:
    """The plan of one slice, as plain values; `settings` of the number of its chips."""
    *slices, topology = topology.split("*")
    devices = plan.topology(topology, *map(int, slices))
    config = load_config(name, settings(len(devices)))
    started = time.perf_counter()
    phases = plan.make_plan(config, devices, phases, say=lambda text: print(f"  {text}", flush=True))
    result = plan.summary(config, devices, phases)
    return result | {"seconds": time.perf_counter() - started}


def table(rows: dict[str, dict]) -> str:
    """Markdown: what each phase needs of a chip's memory, and what a chip sends in a step."""
    names = (*PHASES, "decode")
    lines = [f"| config | slice | chip, GiB | {' | '.join(names)} | sent, GB | fits |", "|---" * 9 + "|"]
    for key, row in rows.items():
        name, topology, *what = key.split(" ", 2)
        phases = {phase["name"]: phase for phase in row["phases"]}

        def cell(phase, phases=phases):
            found = phases.get(phase)
            if found is None:
                return ""
            return "refused" if found["problem"] else f"{found['peak'] + found['beside']:.1f}"

        cells = " | ".join(map(cell, names))
        sent = sum(phase["sent"] * phase["calls"] for phase in phases.values()) / 1e9
        about = f"{', '.join([name, *what])} | {topology}, {row['devices']} chips | {row['chip']['hbm_gib']:.1f}"
        lines.append(f"| {about} | {cells} | {sent:,.0f} | {'yes' if row['fits'] else 'no'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="rows are added to this file as they are done")
    parser.add_argument("--only", default="", help="rows with this in their name, such as 13b or v5e:")
    args = parser.parse_args()
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    wanted = [(*row, "", weak_scaling) for row in [*WHOLE, *ROWS]]
    wanted += [(*row, PHASES, " tensor 4", tensor_parallel) for row in TENSOR]
    wanted += [(*row, "", as_shipped) for row in LTX2]
    wanted += [(*row, " tensor 4 int8", tensor_int8) for row in LTX2_SMALL]
    for name, topology, phases, what, settings in wanted:
        key = f"{name} {topology}{what}"
        if key in rows or args.only not in key:
            continue
        print(key, flush=True)
        rows[key] = make_row(name, topology, phases, settings)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
