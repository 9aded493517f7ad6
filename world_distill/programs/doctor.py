"""`world-distill doctor`: what an installation has and lacks, in words with remedies. It never raises.

JAX is asked in a process of its own: a driver that is not there, a TPU that another program holds, or a plugin of
another version may hang or end the process that looks.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import world_distill

OK, NOTE, PROBLEM = "ok", "note", "problem"
HUB = "https://huggingface.co"
JAX_SECONDS = 90  # until it is said that JAX hangs
GIB = 2**30

# Extra -> modules, and what they are for. What `setup.py` installs for it.
EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "vlm": (("openai", "av", "pyarrow"), "VLM servers, MP4 files, judgments as Parquet"),
    "data": (("pyarrow", "pillow_heif"), "Parquet and Arrow tables, HEIC pictures"),
    "torch": (("torch", "diffusers", "peft"), "text encoders, VLMs in this process, convert --verify"),
    "colab": (("ipywidgets", "matplotlib"), "the notebooks"),
    "completion": (("shtab",), "world-distill completion"),
}
_PLUGINS = (  # accelerator plugins of JAX, which have to be of its version
    "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-rocm60-plugin",
    "jax-rocm7-plugin",
)  # fmt: skip

_ASK = """
import json, jax
devices = jax.devices()
stats = devices[0].memory_stats() or {}
print(json.dumps({"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices),
                  "bytes": stats.get("bytes_limit", 0)}))
"""


class Finding(NamedTuple):
    """One line of the doctor: how it is, with what, what was found, and what to do."""

    state: str
    name: str
    says: str
    remedy: str = ""


def line(finding: Finding) -> str:
    """A finding for a terminal."""
    rest = f"\n{'':9}{'':18}-> {finding.remedy}" if finding.remedy else ""
    return f"{finding.state:<9}{finding.name:<18}{finding.says}{rest}"


def findings(*, offline: bool = False) -> Iterator[Finding]:
    """Every check's findings, in order. A check that fails is a finding itself."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        python, jax_versions, accelerators, extras, video, disk, memory, variables,
    ]  # fmt: skip
    for check in (*checks, *(() if offline else (hub,))):
        try:
            yield from check()
        except Exception as error:  # whatever it is: the other checks may say why
            yield Finding(NOTE, check.__name__, f"could not be checked ({type(error).__name__}: {error})")


def python() -> Iterator[Finding]:
    """The interpreter and the package."""
    yield Finding(OK, "python", f"{platform.python_version()}, {sys.executable}")
    where = pathlib.Path(world_distill.__file__).parent
    yield Finding(OK, "world-distill", f"{world_distill.__version__}, {where}")
    if sys.prefix == sys.base_prefix and "COLAB_RELEASE_TAG" not in os.environ:
        yield Finding(
            NOTE, "environment", "no virtual environment: other programs' packages may not go with these",
            "python3 -m venv .venv && . .venv/bin/activate",
        )  # fmt: skip


def jax_versions(version: Callable[[str], str | None] | None = None) -> Iterator[Finding]:
    """JAX, jaxlib and plugins, which have to be of one version."""
    version = version or _version
    jax, jaxlib = version("jax"), version("jaxlib")
    if jax is None or jaxlib is None:
        yield Finding(PROBLEM, "jax", f"jax {jax or 'missing'}, jaxlib {jaxlib or 'missing'}", "pip install -e .")
        return
    if _numbers(jaxlib) > _numbers(jax) or _numbers(jaxlib)[:2] != _numbers(jax)[:2]:
        yield Finding(PROBLEM, "jax", f"jax {jax} beside jaxlib {jaxlib}", f"pip install -U jax=={jax} jaxlib=={jax}")
    elif _numbers(jax) < (0, 10):
        yield Finding(PROBLEM, "jax", f"{jax} is older than 0.10", "pip install -U -e .")
    else:
        yield Finding(OK, "jax", f"{jax}, jaxlib {jaxlib}")
    plugins = {name: found for name in _PLUGINS if (found := version(name))}
    other = [name for name, found in plugins.items() if _numbers(found)[:2] != _numbers(jaxlib)[:2]]
    for name in other:
        yield Finding(
            PROBLEM, "jax plugin", f"{name} {plugins[name]} is of another JAX than {jaxlib}: JAX ends or ignores it",
            f"pip uninstall -y {name}, or for the right one: pip install -U 'jax[{_extra(name)}]=={jax}'",
        )  # fmt: skip
    kinds = sorted({_extra(name) for name in plugins})
    if len(kinds) > 1:
        names = " ".join(name for name in plugins if _extra(name) != kinds[-1])
        yield Finding(
            PROBLEM, "jax plugin", f"plugins for {' and '.join(kinds)} are there together", f"pip uninstall -y {names}"
        )
    if plugins and not other and len(kinds) == 1:
        yield Finding(OK, "jax plugin", ", ".join(f"{name} {found}" for name, found in plugins.items()))
    if libtpu := version("libtpu"):
        yield Finding(OK, "libtpu", f"{libtpu} (the compiler for TPUs, which `plan` uses)")


def accelerators(ask: Callable[[], tuple[int, str, str]] | None = None) -> Iterator[Finding]:
    """What JAX finds, against what the machine has."""
    code, out, err = (ask or _ask_jax)()
    last = err.strip().splitlines()[-1:] or [""]
    if code:
        yield Finding(
            PROBLEM, "accelerator", f"JAX does not start: {last[0] or f'exit code {code}'}",
            "another program may hold the device; JAX_PLATFORMS=cpu world-distill quickstart runs without one",
        )  # fmt: skip
        return
    found = json.loads(out.strip().splitlines()[-1])
    memory = f", {found['bytes'] / GIB:.0f} GiB each" if found["bytes"] else ""
    says = f"{found['count']} x {found['kind']} ({found['platform']}){memory}"
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if found["platform"] == "cpu" and not wanted:
        has = "a TPU" if _has_tpu() else "an NVIDIA GPU" if shutil.which("nvidia-smi") else ""
        if has:
            extra = "tpu" if has == "a TPU" else "cuda12"
            yield Finding(
                PROBLEM, "accelerator", f"the machine has {has}, and JAX uses the CPU", f"pip install -e '.[{extra}]'"
            )
            return
        says += ": enough for the sandbox, not for large models"
    yield Finding(OK, "accelerator", says + (f", by JAX_PLATFORMS={wanted}" if wanted else ""))


def extras() -> Iterator[Finding]:
    """Optional packages."""
    for name, (modules, purpose) in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            lacks = "" if len(missing) == len(modules) else f" ({', '.join(missing)} missing)"
            yield Finding(NOTE, f"extra {name}", f"not installed{lacks}: {purpose}", f"pip install -e '.[{name}]'")
        else:
            yield Finding(OK, f"extra {name}", purpose)


def video() -> Iterator[Finding]:
    """Whether MP4 files can be written."""
    if importlib.util.find_spec("av") is None:
        yield Finding(NOTE, "video", "PyAV is missing: clips cannot be MP4 files", "pip install -e '.[vlm]'")
        return
    import av
    from av.codec import Codec

    try:
        Codec("libx264", "w")
    except Exception as error:  # of a class that PyAV's versions name differently
        yield Finding(
            PROBLEM, "video", f"PyAV {av.__version__} cannot write H.264 ({error})",
            "pip install -U --only-binary :all: av",
        )  # fmt: skip
        return
    ffmpeg = shutil.which("ffmpeg")
    yield Finding(OK, "video", f"PyAV {av.__version__} writes H.264; ffmpeg {ffmpeg or 'is not there, nor needed'}")


def disk(here: pathlib.Path | None = None, cache: pathlib.Path | None = None) -> Iterator[Finding]:
    """Space and write access where runs and downloads go."""
    for name, folder, enough, what in (
        ("this folder", here or pathlib.Path.cwd(), 5, "runs"),
        ("hub cache", cache or _hub_cache(), 40, "published weights (Wan2.2-TI2V-5B: 34 GB)"),
    ):
        there = folder
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free / GIB
        try:
            with tempfile.NamedTemporaryFile(dir=there):
                pass
        except OSError as error:
            what_to_do = "set HF_HOME to a folder of yours" if name == "hub cache" else "call it in a folder of yours"
            yield Finding(PROBLEM, name, f"{there} cannot be written: {error.strerror}", what_to_do)
            continue
        few = f": {what} may need {enough} GB" if free < enough else ""
        yield Finding(NOTE if few else OK, name, f"{folder}, {free:.0f} GiB free{few}")


def memory() -> Iterator[Finding]:
    """The machine's memory, and the number of files that a process may open."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding(OK if pages >= 3 else NOTE, "memory", f"{pages:.1f} GiB, {os.cpu_count()} CPU cores")
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 1024:
        yield Finding(NOTE, "open files", f"at most {files} at once: large sets have more shards", "ulimit -n 4096")


def variables(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Settings of the environment that change what JAX does."""
    from world_distill.devices.hosts import VARIABLES  # imports JAX, which may not start

    given = [name for name in VARIABLES if environment.get(name)]
    if given and len(given) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in given)
        yield Finding(
            PROBLEM, "job", f"{' and '.join(given)} set, but not {missing}", "set all three, or none (launch/README.md)"
        )
    flags = [name for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "LIBTPU_INIT_ARGS", "HF_HUB_OFFLINE")]
    if found := [f"{name}={environment[name]}" for name in flags if environment.get(name)]:
        yield Finding(NOTE, "environment", f"set: {' '.join(found)}")
    if environment.get("PYTHONPATH"):
        yield Finding(NOTE, "environment", f"PYTHONPATH={environment['PYTHONPATH']} comes before installed packages")


def hub(address: str = HUB, seconds: float = 5.0) -> Iterator[Finding]:
    """Whether published weights can be fetched."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding(NOTE, "hub", "HF_HUB_OFFLINE is set: only what is in the cache", "unset HF_HUB_OFFLINE")
        return
    address = os.environ.get("HF_ENDPOINT") or address
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds).close()
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        yield Finding(
            NOTE, "hub", f"{address} does not answer ({reason})",
            "only published weights need it; behind a proxy set HTTPS_PROXY, with a mirror HF_ENDPOINT",
        )  # fmt: skip
        return
    yield Finding(OK, "hub", f"{address} answers")


def _ask_jax() -> tuple[int, str, str]:
    try:
        done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=JAX_SECONDS)
    except subprocess.TimeoutExpired:
        return 1, "", f"it hangs for more than {JAX_SECONDS} s"
    return done.returncode, done.stdout, done.stderr


def _has_tpu() -> bool:
    return any(pathlib.Path("/dev").glob("accel*")) or "TPU_NAME" in os.environ


def _hub_cache() -> pathlib.Path:
    home = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME")
    return pathlib.Path(home) if home else pathlib.Path.home() / ".cache" / "huggingface"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(plugin: str) -> str:
    return plugin.split("-")[1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
