"""Training in processes of its own, one or several to a job, as fault tests start, kill and start again."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import time

from world_distill.devices import hosts

ROOT = pathlib.Path(__file__).resolve().parents[1]
CODE = """
    import pathlib, sys
    sys.path[:0] = [{tests!r}, {root!r}]
    from small import small_config
    from world_distill import cli
    from world_distill.cli import arguments
    from world_distill.devices import hosts
    from world_distill.programs import train
    hosts.SILENCE_SECONDS = 10
    inputs, workdir = map(pathlib.Path, sys.argv[1:3])
    {before}
    config = small_config(inputs, **{overrides!r})
    arguments.config_from = lambda args: config
    sys.exit(cli.main(["train", "--config", "sandbox", "--workdir", str(workdir)]))
"""


def start(inputs, workdir, *overrides, before="", environment=()):
    """A process that trains for each set of overrides, sharing the CPU devices; `before` is code that it runs first."""
    places = dict(tests=str(ROOT / "tests"), root=str(ROOT), before=before)
    codes = [textwrap.dedent(CODE).format(**places, overrides=given) for given in overrides]
    return start_scripts(codes, str(inputs), str(workdir), environment=environment)


VERB = """
    import sys
    sys.path[:0] = [{tests!r}, {root!r}]
    from world_distill import cli
    from world_distill.devices import hosts
    hosts.SILENCE_SECONDS = 10
    {before}
    sys.exit(cli.main(sys.argv[1:]))
"""


def start_verb(*arguments, count=1, before=""):
    """`count` processes of one job that call a verb; `before` is code that they run first."""
    code = textwrap.dedent(VERB).format(tests=str(ROOT / "tests"), root=str(ROOT), before=before)
    return start_scripts([code] * count, *map(str, arguments))


def start_scripts(codes, *arguments, environment=()):
    """A process for each Python script; several are one job."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    jobs = []
    for index, code in enumerate(codes):
        flags = os.environ["XLA_FLAGS"]
        if len(codes) > 1:
            flags = flags.replace("--xla_force_host_platform_device_count=8", "")
        values = (f"localhost:{port}", str(len(codes)), str(index))
        variables = dict(zip(hosts.VARIABLES, values, strict=True)) | {"XLA_FLAGS": flags} | dict(environment)
        command = [sys.executable, "-c", code, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        jobs.append(subprocess.Popen(command, env=os.environ | variables, text=True, **pipes))
    return jobs


def finish(jobs, timeout=600):
    """(exit codes, what each said)."""
    try:
        said = [job.communicate(timeout=timeout)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [job.returncode for job in jobs], said


def logged(workdir) -> int:
    """Steps that a run has logged."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition, jobs, timeout=200):
    """Until it holds, or a process has ended."""
    deadline = time.monotonic() + timeout
    while not condition() and all(job.poll() is None for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.01)
