"""Runs pytest again and again, each time in a fork of a process that has imported the slow libraries already.

Its working folder is the tree. A line on standard input is a JSON list: the file for what pytest says, and pytest's
arguments. It answers with two lines: the process group of the fork, and pytest's exit code at its end.
"""

import contextlib
import gc
import importlib
import json
import os
import sys

# Imported by nearly every test. Nothing of the tree itself, which changes; nothing that starts threads by itself.
LIBRARIES = (
    "jax", "flax.nnx", "optax", "hypothesis", "beartype", "jaxtyping", "ml_collections", "einops", "scipy.stats",
    "scipy.ndimage", "safetensors.numpy", "PIL.Image", "absl.logging", "tqdm", "orbax.checkpoint", "grain",
)  # fmt: skip


def main() -> None:
    sys.path[0] = os.getcwd()  # as `python -m pytest`
    import pytest

    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # what forks share is not copied by being looked at
    for line in sys.stdin:
        path, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            with open(path, "w") as file, open(os.devnull) as nothing:
                for target, source in ((0, nothing), (1, file), (2, file)):
                    os.dup2(source.fileno(), target)
            code = int(pytest.main(arguments))
            sys.stdout.flush()
            os._exit(code)  # an orderly end would take apart all that was imported
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
