"""Every test runs on the CPU, as 8 devices, with the shape types of core and models checked."""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile

# Before the first import of JAX, which reads them once. Children of the tests inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = {"xla_force_host_platform_device_count": "8"}

# Tests compile far longer than they compute. A second module of LLVM for every part of a program only pays off on many
# cores; the older emitters of fused loops compile a train step in half the time (XLA ignores that option where it has
# no others any more).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
flags["xla_cpu_parallel_codegen_split_count"] = "1"
flags["xla_backend_extra_options"] = "xla_cpu_disable_new_fusion_emitters"
for name, value in flags.items():
    if name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{name}={value}".strip()

# Where in our code an operation was born is of use to whoever reads a program: writing that down is a tenth of tracing.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Many tests compile the same small programs. The cache lives as long as the test run: an entry of another machine may
# not run on this one.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-cache-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Tracing makes many small objects that live on: looking through them all is a tenth of the time.
gc.set_threshold(50_000, 20, 50)

import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Not on `structs`: JAX rebuilds its classes with leaves that are no arrays. Needs to come before the first import
# of either package, which is why nothing of world_distill is imported here.
jaxtyping.install_import_hook(["world_distill.core", "world_distill.models"], "beartype.beartype")

HERE = pathlib.Path(__file__).parent

# Begun first, so that the workers end together.
LONGEST = (
    "programs/test_train", "devices/test_hosts", "programs/test_wan_run", "programs/test_ablate",
    "programs/test_two_streams", "training/test_step", "programs/test_pretrain", "test_notebooks",
    "programs/test_fine_tuning",
    "training/test_prefetch", "storage/test_checkpoints", "programs/test_quickstart", "judges/test_server",
    "reports/test_report", "weights/test_convert",
)  # fmt: skip

# `once`, as single tests elsewhere: about files, processes, servers and pages, or training through programs that
# `test_train` compiles too. (Of jobs of several processes, `test_checkpoints` has one for every Python.)
ONCE = (
    "data", "judges", "launch", "reports", "sandbox", "vlm", "devices/test_hosts", "evaluation/test_held_out",
    "programs/test_fine_tuning",
    "programs/test_ablate", "programs/test_earlier_run", "programs/test_judgments", "programs/test_notebook",
    "programs/test_pretrain", "programs/test_probe", "programs/test_quickstart", "programs/test_two_streams",
    "test_layering", "test_mutations", "test_notebooks",
    "training/test_by_step", "training/test_guided_training", "training/test_policies", "training/test_prefetch",
    "training/test_step", "weights/test_convert",
)  # fmt: skip

for place in (*LONGEST, *ONCE):  # a name that has moved would be missed silently
    if not (HERE / place).is_dir() and not (HERE / f"{place}.py").is_file():
        raise pytest.UsageError(f"tests/conftest.py names {place}, which is not there")


@pytest.hookimpl(tryfirst=True)  # before -m leaves tests out
def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    order = []
    for item in items:
        name = item.path.relative_to(HERE).with_suffix("").as_posix()
        if any(name == once or name.startswith(f"{once}/") for once in ONCE):
            item.add_marker("once")
        order.append(places.get(name, len(places)))
    items[:] = [item for _, _, item in sorted(zip(order, range(len(items)), items, strict=True))]
