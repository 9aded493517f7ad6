"""How fast Wan's transformer is here and in diffusers: forward, and forward and backward.

    python tests/benchmarks/wan_speed.py
    python tests/benchmarks/wan_speed.py --threads 4 --remat full --json speed.json
    python tests/benchmarks/wan_speed.py --size wan5b        # layers of Wan2.2-TI2V-5B, for a GPU

Each framework runs in a process of its own, and they take turns, so that a busy machine slows both. Before that both
compute the same velocity and gradients from the same weights. On CPUs: float32, and seconds of CPU time. On a GPU that
both see: bfloat16, seconds of wall time, memory of the GPU, and a third process with `torch.compile`. Without diffusers
only ours runs.

A ratio on a CPU is to a good part that of the matrix products: their rates stand beside it.
"""

import argparse
import dataclasses
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

TIMES = np.array([[0.0, 0.9]], np.float32)  # of the first frame, and of the others
CHANNELS, TIME_WIDTH, RANK = 48, 256, 32


@dataclasses.dataclass(frozen=True)
class Size:
    """A transformer and what it reads; `grid` has latents, of which 2 x 2 pixels are a token."""

    width: int
    depth: int
    heads: int
    mlp: int
    text_width: int
    grid: tuple[int, int, int]
    text_tokens: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] // 4

    @property
    def of_frames(self) -> tuple[int, ...]:
        """Which of the times each frame has."""
        return (0,) + (1,) * (self.grid[0] - 1)

    @property
    def operations(self) -> dict[str, float]:
        """Floating-point operations of one call of each of `RATES`."""
        attention = 4 * self.tokens**2 * self.width
        return {
            "product": 2 * self.tokens * self.width * self.mlp,
            "attention": attention,
            "attention_grad": 3 * attention,
        }


SIZES = {
    "tiny": Size(64, 2, 2, 128, 32, (2, 8, 8), 8),
    "medium": Size(1024, 4, 8, 4096, 512, (5, 40, 40), 128),
    "wan5b": Size(3072, 4, 24, 14336, 4096, (13, 30, 52), 512),  # 4 of 30 layers, 480 x 832 pixels, 49 frames
}
PARTS = {
    "forward": "forward",
    "all": "forward + backward, all parameters",
    "lora": f"forward + backward, LoRA r = {RANK}",
}
RATES = {
    "product": "matrix product",
    "attention": "attention, forward",
    "attention_grad": "attention, forward + backward",
}


def draw(size: Size) -> tuple[np.ndarray, ...]:
    """Latents [1 f h w c], text [1 l e], then q, k, v [1 n h e]."""
    rng = np.random.default_rng(0)
    heads = (1, size.tokens, size.heads, size.width // size.heads)
    shapes = [(1, *size.grid, CHANNELS), (1, size.text_tokens, size.text_width), heads, heads, heads]
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def ours(args: argparse.Namespace) -> tuple[dict, dict]:
    """Part -> function that runs it once and waits for it; and what the process is."""
    import jax
    import jax.numpy as jnp

    from world_distill.devices.chips import chip
    from world_distill.devices.flops import count
    from world_distill.models.attention import attend
    from world_distill.models.functional import Functional
    from world_distill.models.lora import init_lora
    from world_distill.models.tensor_map import assemble
    from world_distill.models.wan.modeling import WanConfig, WanDiT
    from world_distill.models.wan.published import transformer_entries

    size, dtype = SIZES[args.size], jnp.bfloat16 if args.gpu else jnp.float32
    config = WanConfig(
        channels=CHANNELS, width=size.width, depth=size.depth, heads=size.heads, mlp=size.mlp,
        text_width=size.text_width, time_width=TIME_WIDTH, remat=args.remat, attention=args.attention,
    )  # fmt: skip
    network = Functional(lambda rngs: WanDiT(config, rngs=rngs))
    if args.weights.exists():
        with np.load(args.weights) as file:
            weights = assemble(transformer_entries(config), dict(file))
    else:
        weights = jax.jit(network.init)(jax.random.key(0))
    weights = jax.tree.map(lambda w: jnp.asarray(w, dtype), weights)
    lora = init_lora(jax.random.key(1), weights, rank=RANK, targets=r"blocks\..*")
    x, text, *qkv = (jnp.asarray(y) for y in draw(size))
    t, qkv = jnp.asarray(TIMES), [y.astype(dtype) for y in qkv]
    a, b = jnp.ones((size.tokens, size.width), dtype), jnp.ones((size.width, size.mlp), dtype)

    def of(network):
        def forward(weights, x, lora=None):
            return network(weights, x, t, text, lora, times=size.of_frames)

        squared = lambda *given: (forward(*given) ** 2).mean()  # noqa: E731
        by_lora = jax.grad(lambda lora, weights, x: squared(weights, x, lora))
        return jax.jit(forward), jax.jit(jax.grad(squared)), jax.jit(by_lora)

    forward, grad, lora_grad = of(network)
    product = jax.jit(jnp.matmul)
    attention = jax.jit(lambda q, k, v: attend(q, k, v, args.attention))
    attention_grad = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum(), (0, 1, 2)))
    runs = {
        "forward": lambda: forward(weights, x),
        "all": lambda: grad(weights, x),
        "lora": lambda: lora_grad(lora, weights, x),
        "product": lambda: product(a, b),
        "attention": lambda: attention(*qkv),
        "attention_grad": lambda: attention_grad(*qkv),
    }
    runs = {name: lambda run=run: jax.block_until_ready(run()) for name, run in runs.items()}

    def check():
        norm = sum(float((g.astype(jnp.float32) ** 2).sum()) for g in jax.tree.leaves(grad(weights, x))) ** 0.5
        return np.asarray(forward(weights, x)), norm

    # Attention by cuDNN is no product in a trace, so operations are those of the same model with `xla`.
    plain = of(Functional(lambda rngs: WanDiT(dataclasses.replace(config, attention="xla"), rngs=rngs)))
    traced = [plain[0].trace(weights, x), plain[1].trace(weights, x), plain[2].trace(lora, weights, x)]
    device = jax.local_devices()[0]
    about = {
        "name": f"jax {jax.__version__}, remat {args.remat}",
        "parameters": sum(w.size for w in jax.tree.leaves(weights)),
        "factors": sum(f.size for f in jax.tree.leaves(lora)),
        "operations": {part: count(one.jaxpr, remat=False) for part, one in zip(PARTS, traced, strict=True)},
        "device": device.device_kind,
        "tflops": known.tflops if (known := chip(device.device_kind)) else None,
    }
    return runs | {"check": check}, about


def theirs(args: argparse.Namespace) -> tuple[dict, dict]:
    """As `ours`, of diffusers. The adapter comes with the first call of "lora", which has to be the last part."""
    import diffusers
    import peft
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if args.gpu else ("cpu", torch.float32)
    size = SIZES[args.size]
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=size.heads, attention_head_dim=size.width // size.heads,
        in_channels=CHANNELS, out_channels=CHANNELS, text_dim=size.text_width, freq_dim=TIME_WIDTH,
        ffn_dim=size.mlp, num_layers=size.depth, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6,
        rope_max_seq_len=64,
    )  # fmt: skip
    if not args.weights.exists():
        np.savez(args.weights, **{name: w.numpy() for name, w in model.state_dict().items()})
    model.to(device, dtype)
    count = sum(w.numel() for w in model.parameters())
    latents, text, *qkv = (torch.from_numpy(y).to(device, dtype) for y in draw(size))
    inputs = {
        "hidden_states": latents.moveaxis(-1, 1).contiguous(),
        "timestep": torch.from_numpy(1000 * TIMES[:, size.of_frames])
        .repeat_interleave(size.tokens // size.grid[0], 1)
        .to(device),
        "encoder_hidden_states": text,
    }
    network = torch.compile(model) if args.compile else model
    qkv = [y.transpose(1, 2).contiguous().requires_grad_() for y in qkv]
    a = torch.ones(size.tokens, size.width, device=device, dtype=dtype)
    b = torch.ones(size.width, size.mlp, device=device, dtype=dtype)

    @torch.no_grad()
    def forward():
        return network(**inputs).sample

    def grad():
        model.zero_grad()
        network(**inputs).sample.float().square().mean().backward()

    def lora():
        if not model._hf_peft_config_loaded:
            model.zero_grad()
            model.requires_grad_(False)
            targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
            model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        grad()

    def attention_grad():
        return torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*qkv).float().sum(), qkv)

    runs = {
        "forward": forward,
        "all": grad,
        "lora": lora,
        "product": torch.no_grad()(lambda: a @ b),
        "attention": torch.no_grad()(lambda: torch.nn.functional.scaled_dot_product_attention(*qkv)),
        "attention_grad": attention_grad,
    }

    def waited(run):
        run()
        if args.gpu:
            torch.cuda.synchronize()

    def check():
        grad()
        norm = sum(float(w.grad.float().square().sum()) for w in model.parameters()) ** 0.5
        return forward().float().cpu().moveaxis(1, -1).numpy(), norm

    name = f"torch {torch.__version__}, diffusers {diffusers.__version__}{', compiled' if args.compile else ''}"
    runs = {part: lambda run=run: waited(run) for part, run in runs.items()}
    return runs | {"check": check}, {"name": name, "parameters": count}


def serve(args: argparse.Namespace) -> None:
    """A framework's process: a part's name in, a line of JSON with what it took out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    runs, about = {"ours": ours, "theirs": theirs}[args.child](args)
    peak = (GpuPeak if args.gpu else HostPeak)(args.child)
    _answer(out, about)
    for line in sys.stdin:
        part = line.strip()
        if part == "check":
            velocity, norm = runs["check"]()
            path = args.weights.with_name(f"velocity_{os.getpid()}.npy")
            np.save(path, velocity)
            _answer(out, {"velocity": str(path), "norm": norm})
            continue
        peak.reset()
        cpu, wall = time.process_time(), time.perf_counter()
        runs[part]()
        taken = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        _answer(out, taken | {"peak": peak.mib()})


def _answer(out, answer: dict) -> None:
    print(json.dumps(answer), file=out, flush=True)


class HostPeak:
    """MiB of this process that are resident at most; None where they cannot be told."""

    def __init__(self, framework: str):
        del framework

    def reset(self) -> None:
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not on Linux
            pass

    def mib(self) -> float | None:
        try:
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


class GpuPeak:
    """MiB of the GPU that a framework holds at most. JAX cannot forget a peak: its own is that of all parts so far."""

    def __init__(self, framework: str):
        self._ours = framework == "ours"

    def reset(self) -> None:
        if not self._ours:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def mib(self) -> float | None:
        if self._ours:
            import jax

            stats = jax.local_devices()[0].memory_stats() or {}
            return stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else None
        import torch

        return torch.cuda.max_memory_allocated() / 2**20


class Child:
    """A framework's process, seen from here."""

    def __init__(self, kind: str, args: argparse.Namespace, weights: pathlib.Path, *flags: str):
        command = [sys.executable, __file__, "--child", kind, "--weights", str(weights), "--remat", args.remat]
        command += ["--size", args.size]
        command += ["--threads", str(args.threads), *flags, *(["--gpu"] if args.gpu else [])]
        command += ["--attention", args.attention] if args.attention else []
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": str(args.threads)}
        if args.threads == 1:
            env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.about = self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a framework's process ended early; its own message stands above")
        return json.loads(line)

    def ask(self, part: str) -> dict:
        print(part, file=self.process.stdin, flush=True)
        return self._read()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(args: argparse.Namespace, folder: pathlib.Path) -> dict:
    """Medians of all parts for each framework, and how far apart their numbers are."""
    if args.threads < len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else []):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])  # children inherit it
    weights, children = folder / "weights.npz", {}
    if args.diffusers:
        children["diffusers"] = Child("theirs", args, weights)
        if args.gpu:
            children["compiled"] = Child("theirs", args, weights, "--compile")
    children["ours"] = Child("ours", args, weights)
    about = {name: child.about for name, child in children.items()}
    result: dict = {"size": args.size, "about": about, "parts": {}}
    checks = {name: child.ask("check") for name, child in children.items()}
    result["check"] = {
        name: {
            "largest_difference": float(np.abs(np.load(check["velocity"]) - np.load(checks["ours"]["velocity"])).max()),
            "largest_velocity": float(np.abs(np.load(check["velocity"])).max()),
            "gradient_norms": [check["norm"], checks["ours"]["norm"]],
        }
        for name, check in checks.items()
        if name != "ours"
    }
    for part in (*RATES, *PARTS):  # "lora" last
        for child in children.values():
            child.ask(part)  # compiles
        turns = {name: [] for name in children}
        for _ in range(args.repeats):
            for name, child in children.items():
                turns[name].append(child.ask(part))
        result["parts"][part] = {name: _median(taken) for name, taken in turns.items()}
    for child in children.values():
        child.end()
    return result


def _median(taken: list[dict]) -> dict:
    """Medians of seconds, the highest peak; and the turns themselves."""
    peaks = [t["peak"] for t in taken if t["peak"] is not None]
    seconds = {key: statistics.median(t[key] for t in taken) for key in ("cpu", "wall")}
    return seconds | {"peak": max(peaks, default=None), "turns": taken}


def show(result: dict, clock: str) -> None:
    names = list(result["about"])
    for name in names:
        about = result["about"][name]
        print(f"{name}: {about['name']}, {about['parameters'] / 1e6:.1f} M parameters")
    for name, check in result["check"].items():
        a, b = check["gradient_norms"]
        print(f"ours and {name}: velocities differ by {check['largest_difference']:.1e} of at most "
              f"{check['largest_velocity']:.1f}, norms of the gradient by {abs(a / b - 1):.1e} of it")  # fmt: skip
    print(f"\n{f'{clock} seconds (wall; peak MiB)':36}" + "".join(f"{name:>28}" for name in names))
    for part, label in PARTS.items():
        row = result["parts"][part]
        print(f"{label:36}" + "".join(_cell(row[name], clock) for name in names) + _ratios(row, clock))
    operations = SIZES[result["size"]].operations
    for part, label in RATES.items():
        row = result["parts"][part]
        rates = "".join(f"{operations[part] / row[name][clock] / 1e9:21.0f} GFLOP/s" for name in names)
        print(f"{label:36}{rates}{_ratios(row, clock)}")


def _cell(taken: dict, clock: str) -> str:
    peak = "" if taken["peak"] is None else f"; {taken['peak']:.0f}"
    return f"{taken[clock]:.2f} ({taken['wall']:.2f}{peak})".rjust(28)


def _ratios(row: dict, clock: str) -> str:
    return "".join(f"   {row[n][clock] / row['ours'][clock]:.2f} x" for n in row if n != "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="cores that each may use (default: 1)")
    parser.add_argument("--size", default="medium", choices=SIZES, help="of the model (default: medium)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of every part (default: 5)")
    parser.add_argument("--remat", default="dots", choices=["none", "dots", "full"], help="ours (default: dots)")
    parser.add_argument("--attention", choices=["blocked", "xla", "cudnn"], help="ours (default: by device)")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    for flag in ("--child", "--weights"):
        parser.add_argument(flag, type=pathlib.Path if flag == "--weights" else str, help=argparse.SUPPRESS)
    for flag in ("--gpu", "--compile"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return serve(args)
    args.diffusers = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "peft"))
    args.gpu = _sees_gpu(args.diffusers)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, pathlib.Path(folder))
    show(result, "wall" if args.gpu else "cpu")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


def _sees_gpu(diffusers: bool) -> bool:
    """Whether each framework has one; asked in another process, since asking takes memory of it."""
    code = "import jax; print(jax.default_backend() == 'gpu')"
    if diffusers:
        code += "; import torch; print(torch.cuda.is_available())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return "False" not in told


if __name__ == "__main__":
    main()
