"""What one GPU does, in under 8 minutes: right numbers, the whole method, and speed beside PyTorch.

    python tests/benchmarks/gpu.py                  # prints JSON; --out FILE writes it as well
    python tests/benchmarks/gpu.py --dry-run        # the same at small sizes, on a CPU

    parity      Wan's velocity and LoRA's gradients on the GPU against the CPU: float32, and bfloat16 with cuDNN
    quickstart  `world-distill quickstart`, with its table
    speed       forward and training steps at the layer width of Wan2.2-TI2V-5B, as ratios to diffusers as it is and
                under `torch.compile`, and as shares of the GPU's peak (`wan_speed.py`; needs the extra `torch`)

A part that fails or takes too long is reported with the end of what it said, and does not stop the others; the exit
status is then 1.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
# Largest difference from the CPU's float32, as a share of the largest value.
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}
SECONDS = {"parity": 90, "quickstart": 240, "speed": 300}  # that each may take


def parity(args: argparse.Namespace) -> dict:
    """Differences from the same numbers on a CPU, by type: of the velocity, and of LoRA's gradients."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from world_distill.models.functional import Functional
    from world_distill.models.lora import init_lora
    from world_distill.models.wan.modeling import WanConfig, WanDiT

    config = WanConfig(channels=48, width=256, depth=2, heads=2, mlp=512, text_width=64, time_width=64)
    draw = np.random.default_rng(0).normal
    x, text = (draw(size=shape).astype(np.float32) for shape in [(2, 3, 12, 16, 48), (2, 16, 64)])
    t = np.array([[0.0, 0.9], [0.0, 0.3]], np.float32)

    # On the CPU, since random numbers are drawn in another order elsewhere.
    with jax.default_device(jax.devices("cpu")[0]):
        weights = Functional(lambda rngs: WanDiT(config, rngs=rngs)).init(jax.random.key(0))
        lora = init_lora(jax.random.key(1), weights, rank=8, targets=r"blocks\..*")
    # No factor is zero, so that each has a gradient.
    weights, lora = jax.tree.map(
        lambda w: np.asarray(w) + 0.02 * draw(size=w.shape).astype(np.float32), (weights, lora)
    )

    def run(device, dtype, attention):
        network = Functional(lambda rngs: WanDiT(dataclasses.replace(config, attention=attention), rngs=rngs))

        def loss(lora, weights):
            velocity = network(weights, x, t, text, lora, times=(0, 1, 1)).astype(jnp.float32)
            return (velocity**2).mean(), velocity

        with jax.default_device(device), jax.default_matmul_precision("highest"):
            placed = jax.tree.map(lambda w: jax.device_put(w.astype(dtype), device), weights)
            gradients, velocity = jax.jit(jax.grad(loss, has_aux=True))(jax.device_put(lora, device), placed)
        return jax.device_get((velocity, gradients))

    def apart(one, other):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)

    device = jax.devices("cpu" if args.dry_run else "gpu")[0]
    expected = run(jax.devices("cpu")[0], jnp.float32, "xla")
    found = {"device": device.device_kind}
    for dtype, attention in ((jnp.float32, "xla"), (jnp.bfloat16, "xla" if args.dry_run else "cudnn")):
        velocity, gradients = run(device, dtype, attention)
        name = jnp.dtype(dtype).name
        found[name] = {
            "attention": attention,
            "velocity": apart(velocity, expected[0]),
            "gradients": apart(gradients, expected[1]),
        }
        if not max(found[name]["velocity"], found[name]["gradients"]) <= LIMITS[name]:
            raise SystemExit(f"parity: {name} on {device.device_kind} is off: {json.dumps(found)}")
    return found


SMALL = (
    "scenes.train=6", "scenes.validation=2", "scenes.test=4", "annotator.pairs=2", "annotator.test_pairs=1", "steps=2",
    "rollout.tasks=4", "rollout.group=2", "evaluate_tasks=4", "evaluate_batch=8", "host_devices=1",
)  # fmt: skip


def quickstart(args: argparse.Namespace, folder: pathlib.Path) -> dict:
    """Minutes and the table's rows."""
    started = time.monotonic()
    flags = [f"--config.{setting}" for setting in SMALL] if args.dry_run else []
    _run("quickstart", [sys.executable, "-m", "world_distill", "quickstart", "--workdir", folder, *flags])
    results = json.loads((folder / "results.json").read_text())
    return {"minutes": (time.monotonic() - started) / 60, "rows": results["rows"]}


def speed(args: argparse.Namespace, folder: pathlib.Path) -> dict:
    """Seconds of each part by framework, their ratios to ours, and ours as a share of the peak."""
    size, repeats = ("tiny", 2) if args.dry_run else ("wan5b", 5)
    command = [HERE / "wan_speed.py", "--size", size, "--repeats", str(repeats), "--json", folder / "speed.json"]
    _run("speed", [sys.executable, *command])
    return read_speed(json.loads((folder / "speed.json").read_text()))


def read_speed(measured: dict) -> dict:
    """From the figures of `wan_speed.py`; `mfu` is None on a device whose peak is not known (`devices/chips.py`)."""
    about, clock = measured["about"]["ours"], "wall"
    found = {"device": about["device"], "check": measured["check"], "parts": {}}
    for part, operations in about["operations"].items():
        row = measured["parts"][part]
        ours = row["ours"][clock]
        found["parts"][part] = {
            "seconds": {name: taken[clock] for name, taken in row.items()},
            "peak_mib": {name: taken["peak"] for name, taken in row.items()},
            "times_faster_than": {name: taken[clock] / ours for name, taken in row.items() if name != "ours"},
            "mfu": operations / ours / (about["tflops"] * 1e12) if about["tflops"] else None,
        }
    return found


def _run(part: str, command: list) -> str:
    """What a process printed. RuntimeError with the end of its output, if it fails or takes too long."""
    try:
        done = subprocess.run(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=SECONDS[part],
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {SECONDS[part]} s") from error
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--out", type=pathlib.Path, help="also write the figures to this file")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), help="parts (default: all)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(parity(args)))
        return 0
    if args.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"
    # This process touches no GPU, and each part leaves room for the other framework.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found, failed = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            started = time.monotonic()
            try:
                if part == "parity":
                    child = [sys.executable, __file__, "--child", *(["--dry-run"] if args.dry_run else [])]
                    found[part] = json.loads(_run(part, child).splitlines()[-1])
                elif part == "quickstart":
                    found[part] = quickstart(args, pathlib.Path(folder) / "run")
                else:
                    found[part] = speed(args, pathlib.Path(folder))
            except RuntimeError as error:
                failed[part] = str(error)
            print(f"{part}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    text = json.dumps(found | ({"failed": failed} if failed else {}), indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
