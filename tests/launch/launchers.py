"""Calls the scripts of launch/ and reads what they print."""

import os
import pathlib
import shlex
import subprocess

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SETTINGS = {
    "NAME": "run-1", "PROJECT": "my-project", "ZONE": "us-east5-a", "CLUSTER": "my-cluster", "TYPE": "v5p-16",
    "IMAGE": "us-docker.pkg.dev/my-project/images/world-distill:1", "GPUS": "8",
}  # fmt: skip
AWKWARD = ["world-distill", "train", "--workdir", "gs://b/it's a run", '--config.x="$HOME"', "a  b;c", ""]


def call(script: str, *words: str, env: dict[str, str] = SETTINGS, path: str = "") -> subprocess.CompletedProcess:
    """Runs a script with these settings alone; `path` is searched for commands first."""
    kept = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}
    return subprocess.run([LAUNCH / script, *words], env=kept | env, capture_output=True, text=True, timeout=60)


def dry(script: str, *words: str, **settings: str) -> list[list[str]]:
    """Words of each command that the script would run."""
    done = call(script, "--dry-run", *words, env=SETTINGS | settings)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def flag(words: list[str], name: str) -> str:
    """Value of `--name=value`, which is there once."""
    (value,) = [word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")]
    return value
