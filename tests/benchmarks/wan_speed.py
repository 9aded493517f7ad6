"""Speed and memory of the Wan transformer: ours and diffusers', in turns, on the same weights and inputs.

    pip install -e '.[torch]' && python tests/benchmarks/wan_speed.py [--threads 1] [--repeats 5] [--json PATH]

Forward, forward and backward for all parameters, and for LoRA of rank 32, of a model of 4 layers and 8 heads of 128 on
2,000 video tokens (the first frame clean) and 128 text tokens. On CPUs in float32, pinned to as many cores as there are
threads, in CPU seconds; on GPUs in bfloat16, in seconds, diffusers' under `torch.compile`. Each side lives in a process
of its own, and they take turns; the median counts. Beside it stand the rates of plain matrix products and of attention
at the model's sizes: on some CPUs the ratio is mostly theirs. Without torch, ours alone.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

SIZES = {"heads": 8, "width": 1024, "mlp": 4096, "depth": 4, "channels": 16, "text_width": 1024, "time_width": 256}
GRID, TOKENS, RANK = (5, 20, 20), 128, 32
TARGETS = r"blocks\.(self_attention|cross_attention)\.(q|k|v|out)|blocks\.mlp\.(up|down)"
THEIR_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
JOBS = ("forward", "backward", "lora", "matmul", "attention")
FLOPS = {"matmul": 2 * 2000 * 1024 * 4096, "attention": 4 * 2000 * 2000 * 1024}


def inputs() -> dict[str, np.ndarray]:
    """Latents [1 f h w c], times [1 f], text [1 l e], and weights of the loss, float32."""
    rng = np.random.default_rng(0)
    f, h, w = GRID
    shape = (1, f, 2 * h, 2 * w, SIZES["channels"])
    times = np.concatenate([[0.0], np.full(f - 1, 0.625)])[None]
    arrays = {"x": rng.normal(size=shape), "t": times, "text": rng.normal(size=(1, TOKENS, SIZES["text_width"]))}
    arrays |= {"c": rng.normal(size=shape), "m": rng.normal(size=(2000, 1024)), "n": rng.normal(size=(1024, 4096))}
    arrays |= {"qkv": rng.normal(size=(3, 1, 2000, 8, 128))}
    return {name: x.astype(np.float32) for name, x in arrays.items()}


# ---- Ours


def ours(folder: pathlib.Path) -> tuple[dict, str]:
    """(jobs, what they run on)."""
    import jax
    import jax.numpy as jnp

    from world_distill.models.functional import Functional
    from world_distill.models.layers import attend_by_head
    from world_distill.models.lora import init_lora
    from world_distill.models.params import assemble
    from world_distill.models.wan.modeling import WanConfig, WanDiT
    from world_distill.models.wan.params import transformer_entries

    gpu = jax.default_backend() == "gpu"
    config = WanConfig(**SIZES, remat="none" if gpu else os.environ.get("REMAT", "dots"))
    network = Functional(lambda rngs: WanDiT(config, rngs=rngs))
    if (folder / "weights.npz").exists():
        with np.load(folder / "weights.npz") as file:
            weights = assemble(transformer_entries(config), dict(file))
    else:
        weights = jax.jit(network.init)(jax.random.key(0))
    dtype = jnp.bfloat16 if gpu else jnp.float32
    weights = jax.tree.map(lambda x: jnp.asarray(x, dtype), weights)
    lora = init_lora(jax.random.key(1), weights, rank=RANK, targets=TARGETS)
    a = {name: jnp.asarray(x) for name, x in inputs().items()}
    q, k, v = a["qkv"].astype(dtype)

    def loss(weights, lora):
        return jnp.vdot(network(weights, a["x"], a["t"], a["text"], lora), a["c"])

    forward = jax.jit(lambda w: network(w, a["x"], a["t"], a["text"]))
    backward, by_lora = jax.jit(jax.grad(loss)), jax.jit(jax.grad(loss, argnums=1))
    attend = jax.jit(jax.nn.dot_product_attention if gpu else attend_by_head)
    product = jax.jit(jnp.matmul)
    m, n = a["m"].astype(dtype), a["n"].astype(dtype)
    np.save(folder / "ours.npy", np.asarray(forward(weights)))
    jobs = {
        "forward": lambda: forward(weights),
        "backward": lambda: backward(weights, None),
        "lora": lambda: by_lora(weights, lora),
        "matmul": lambda: product(m, n),
        "attention": lambda: attend(q, k, v),
    }
    count = sum(x.size for x in jax.tree.leaves(weights))
    ready = {name: lambda job=job: jax.block_until_ready(job()) for name, job in jobs.items()}
    return ready, f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {count / 1e6:.1f} M parameters"


# ---- Theirs


def theirs(folder: pathlib.Path) -> tuple[dict, str]:
    """(jobs, what they run on); leaves its weights in the folder."""
    import diffusers
    import peft
    import torch

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def make():
        torch.manual_seed(0)
        model = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=SIZES["heads"], attention_head_dim=128,
            in_channels=SIZES["channels"], out_channels=SIZES["channels"], text_dim=SIZES["text_width"],
            freq_dim=SIZES["time_width"], ffn_dim=SIZES["mlp"], num_layers=SIZES["depth"], cross_attn_norm=True,
        )  # fmt: skip
        return model

    model = make()
    np.savez(folder / "weights.npz", **{name: x.numpy() for name, x in model.state_dict().items()})
    model = model.to(device, dtype)
    adapted = make().to(device, dtype)
    adapted.requires_grad_(False)
    adapted.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=THEIR_TARGETS))
    a = {name: torch.from_numpy(x).to(device) for name, x in inputs().items()}
    x, c = (a[name].permute(0, 4, 1, 2, 3).contiguous() for name in ("x", "c"))
    times = (1000 * a["t"]).repeat_interleave(GRID[1] * GRID[2], dim=1)
    text, m, n = a["text"].to(dtype), a["m"].to(dtype), a["n"].to(dtype)
    q, k, v = a["qkv"].to(dtype).transpose(2, 3)

    def run(network):
        return network(hidden_states=x.to(dtype), timestep=times, encoder_hidden_states=text, return_dict=False)[0]

    compiled = [torch.compile(network) if gpu else network for network in (model, adapted)]

    def gradients(network):
        network.zero_grad()
        (run(network).float() * c).sum().backward()

    def forward():
        with torch.no_grad():
            return run(compiled[0])

    jobs = {
        "forward": forward,
        "backward": lambda: gradients(compiled[0]),
        "lora": lambda: gradients(compiled[1]),
        "matmul": lambda: m @ n,
        "attention": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
    }
    np.save(folder / "theirs.npy", forward().float().cpu().numpy().transpose(0, 2, 3, 4, 1))
    wait = torch.cuda.synchronize if gpu else lambda: None
    ready = {name: lambda job=job: (job(), wait()) for name, job in jobs.items()}
    name = torch.cuda.get_device_name() if gpu else "cpu"
    return ready, f"torch {torch.__version__}, diffusers {diffusers.__version__}, {name}"


# ---- Taking turns


def work(side: str, folder: pathlib.Path) -> None:
    """A side's process: runs the jobs whose names it reads, and prints their figures as JSON lines."""
    jobs, text = {"ours": ours, "theirs": theirs}[side](folder)
    print(json.dumps({"text": text}), flush=True)
    for line in sys.stdin:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        cpu, wall = time.process_time(), time.perf_counter()
        jobs[line.strip()]()
        figures = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "peak": _peak()}
        print(json.dumps(figures), flush=True)


def _peak() -> int:
    """Largest resident memory, bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


class Side:
    """A process that waits for jobs."""

    def __init__(self, name: str, folder: str, cores: list[int]):
        flags = f"--xla_cpu_multi_thread_eigen={'true' if len(cores) > 1 else 'false'}"
        environment = os.environ | {"XLA_FLAGS": flags, "OMP_NUM_THREADS": str(len(cores)), "NPROC": str(len(cores))}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--folder", folder], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
        self.text = self._read()["text"]

    def run(self, job: str) -> dict[str, float]:
        self.process.stdin.write(f"{job}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side's process ended early; see its error above")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.folder)
    cores = sorted(os.sched_getaffinity(0))[-args.threads :]
    names = [name for name in ("theirs", "ours") if name == "ours" or importlib.util.find_spec("diffusers")]
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: Side(name, folder, cores) for name in names}  # theirs first: it leaves the weights
        for name, side in sides.items():
            print(f"{name}: {side.text}")
        outputs = [np.load(pathlib.Path(folder) / f"{name}.npy") for name in names]
        difference = float(np.abs(outputs[0] - outputs[-1]).max())
        if len(sides) == 2:
            print(f"largest difference of the velocities {difference:.1e}, of {np.abs(outputs[0]).max():.1f}")
        results = {"difference": difference, "threads": args.threads}
        for job in JOBS:
            turns = {name: [] for name in sides}
            for turn in range(args.repeats + 1):
                for name, side in sides.items():
                    figures = side.run(job)
                    if turn:  # the first one compiles
                        turns[name].append(figures)
            gpu = "cpu" not in sides["ours"].text.lower()
            clock = "wall" if gpu else "cpu"
            seconds = {name: statistics.median(f[clock] for f in turn) for name, turn in turns.items()}
            peak = {name: max(f["peak"] for f in turn) / 2**20 for name, turn in turns.items()}
            results[job] = {"seconds": seconds, "peak_mib": peak}
            line = f"{job:>10}  " + "  ".join(f"{name} {seconds[name]:7.3f} s {peak[name]:6.0f} MiB" for name in sides)
            if job in FLOPS:
                line += "  " + "  ".join(f"{name} {FLOPS[job] / seconds[name] / 1e9:.0f} GF/s" for name in sides)
            if len(sides) == 2:
                line += f"  ours / theirs {seconds['ours'] / seconds['theirs']:.2f}"
            print(line, flush=True)
        for side in sides.values():
            side.process.stdin.close()
            side.process.wait()
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
