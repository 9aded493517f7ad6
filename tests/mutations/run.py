"""Breaks the code in small ways, one at a time, and says which of them no test notices.

    python tests/mutations/run.py                       all of them
    python tests/mutations/run.py --only NAME ...       these (or whole areas: data, judges, ...)
    python tests/mutations/run.py --list                what there is
    python tests/mutations/run.py --resume FILE         keep results in FILE, and take from there what is known

All happens in copies of the tree, in a temporary folder that is removed at the end. First, all the named tests run on
an unchanged copy, where they have to pass. Then every mutation is applied alone, and its tests have to fail:

    killed      a test failed, as it should
    SURVIVED    all passed: no test would notice this mistake
    ERROR       the tests did not run, or ran out of time

Exit code 0: all are killed. 1: one survived. 2: a mutation is stale, a test fails on the unchanged copy, or an error.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree

from mutation import FOLDER, ROOT, Mutation, load, problem

KILLED, SURVIVED, ERROR = "killed", "SURVIVED", "ERROR"
MADE = {".venv", "build", "__pycache__", ".pytest_cache", ".ruff_cache"}  # by tools, in a tree without git


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of mutations or areas (default: all)")
    parser.add_argument("--list", action="store_true", help="print names and what they break, and end")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutations at a time (default: 1)")
    parser.add_argument("--resume", type=pathlib.Path, metavar="FILE", help="results of earlier calls on this tree")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="seconds a mutation (default: 900)")
    args = parser.parse_args()

    chosen = load()
    if args.only:
        if unknown := set(args.only) - {m.name for m in chosen} - {m.area for m in chosen}:
            parser.error(f"no mutation or area {', '.join(sorted(unknown))}; see --list")
        chosen = [m for m in chosen if {m.name, m.area} & set(args.only)]
    if args.list:
        width = max(len(m.name) for m in chosen)
        for m in chosen:
            print(f"{m.area:12}{m.name:{width + 2}}{m.breaks}")
        return 0
    stale = [(m, why) for m in chosen if (why := problem(m))]
    for m, why in stale:
        print(f"stale: {m.area}/{m.name}: {why}")
    if stale:
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is removed
    with tempfile.TemporaryDirectory(prefix="mutations-") as work:
        return Session(pathlib.Path(work), args).run(chosen)


@dataclasses.dataclass(frozen=True)
class Result:
    status: str
    seconds: float
    note: str = ""  # which test noticed, or what went wrong


class Session:
    """Copies of the tree, and the tests that run in them."""

    def __init__(self, work: pathlib.Path, args: argparse.Namespace):
        self._work, self._timeout, self._jobs, self._resume = work, args.timeout, args.jobs, args.resume
        self._lock, self._closed = threading.Lock(), False
        self._groups: set[int] = set()  # process groups that run
        self._copies: queue.SimpleQueue[pathlib.Path] = queue.SimpleQueue()
        for number in range(args.jobs):
            copy_tree(work / f"tree-{number}")
            self._copies.put(work / f"tree-{number}")
        # Programs are looked up by their own text, so those of a mutation are not those of the unchanged code.
        self._environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "TMPDIR": str(work / "tmp"),
            "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in tests/conftest.py, for `warm`
        }  # fmt: skip
        (work / "tmp").mkdir()
        self._warm: dict[pathlib.Path, subprocess.Popen] = {}  # by the copy
        self._tree = digest(work / "tree-0")
        self._known = self._read_results()

    def run(self, chosen: list[Mutation]) -> int:
        """Runs all that is not known yet and prints the table; returns the exit code."""
        results = {m.name: self._known[self._key(m)] for m in chosen if self._key(m) in self._known}
        if results:
            print(f"{len(results)} of {len(chosen)} are known from {self._resume}", flush=True)
        waiting = [m for m in chosen if m.name not in results]
        try:
            tests = sorted({test for m in waiting for test in m.tests})
            if tests and (failed := self._unchanged(tests)):
                print(f"these tests do not pass on the unchanged code, and can show nothing:\n{failed}")
                return 2
            with concurrent.futures.ThreadPoolExecutor(self._jobs) as pool:
                try:
                    jobs = {pool.submit(self._try, m): m for m in waiting}
                    for job in concurrent.futures.as_completed(jobs):
                        m, result = jobs[job], job.result()
                        results[m.name] = result
                        self._keep(self._key(m), result)
                        print(f"[{len(results)}/{len(chosen)}]", line(m, result), flush=True)
                except BaseException:
                    self.close()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            self.close()
        return summarise(chosen, results)

    def close(self) -> None:
        """Ends what runs."""
        with self._lock:
            self._closed = True
            for group in self._groups:
                end(group)

    def _unchanged(self, tests: list[str]) -> str:
        """What does not pass in an unchanged copy; empty if all does."""
        key = hashlib.sha256(json.dumps([self._tree, tests]).encode()).hexdigest()
        if key in self._known:
            return ""
        print(f"{len(tests)} tests on the unchanged code ...", flush=True)
        copy, started = self._copies.get(), time.monotonic()
        outcome = self._pytest(copy, tests, timeout=None)
        self._copies.put(copy)
        wrong = outcome.failed + outcome.skipped + ([] if outcome.code == 0 else [outcome.output])
        if not wrong:
            seconds = time.monotonic() - started
            print(f"... pass, {seconds:.0f} s", flush=True)
            self._keep(key, Result(KILLED, seconds))
        return "\n".join(wrong)

    def _try(self, mutation: Mutation) -> Result:
        copy, started = self._copies.get(), time.monotonic()
        path = copy / mutation.file
        before = path.read_bytes()
        try:
            mutation.apply(copy)
            forget_compiled(path)
            outcome = self._pytest(copy, list(mutation.tests), timeout=self._timeout)
        finally:
            path.write_bytes(before)
            forget_compiled(path)
            self._copies.put(copy)
        seconds = time.monotonic() - started
        if outcome.failed:
            return Result(KILLED, seconds, outcome.failed[0])
        if outcome.code == 0:
            return Result(SURVIVED, seconds)
        return Result(ERROR, seconds, outcome.output)

    def _pytest(self, copy: pathlib.Path, tests: list[str], *, timeout: float | None) -> "Outcome":
        report = copy.with_suffix(".xml")
        report.unlink(missing_ok=True)
        flags = ["-n", "0", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *(["-x"] if timeout else [])]
        said = copy.with_suffix(".log")
        with self._lock:
            if self._closed:
                return Outcome(-1, "not begun")
            warm = self._warm.get(copy) or self._start(copy)
        warm.stdin.write(json.dumps([str(said), *flags, *tests]).encode() + b"\n")
        group = int(warm.stdout.readline() or 0)
        with self._lock:
            self._groups.add(group)
        try:
            if not select.select([warm.stdout], [], [], timeout)[0]:
                return Outcome(-1, f"not done after {timeout:.0f} s")
        finally:
            end(group)
            code = int(warm.stdout.readline() or -1)
            with self._lock:
                self._groups.discard(group)
        return Outcome(code, "\n".join(said.read_text().splitlines()[-30:]), *outcomes(report))

    def _start(self, copy: pathlib.Path) -> subprocess.Popen:
        """The process that starts the tests of a copy."""
        self._warm[copy] = process = subprocess.Popen(
            [sys.executable, FOLDER / "warm.py"], cwd=copy, env=self._environment | {"PYTHONPATH": str(copy)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip
        self._groups.add(process.pid)
        return process

    def _key(self, mutation: Mutation) -> str:
        return hashlib.sha256(json.dumps([self._tree, dataclasses.astuple(mutation)]).encode()).hexdigest()

    def _read_results(self) -> dict[str, Result]:
        if self._resume is None or not self._resume.exists():
            return {}
        lines = map(json.loads, self._resume.read_text().splitlines())
        return {entry.pop("key"): Result(**entry) for entry in lines}

    def _keep(self, key: str, result: Result) -> None:
        if self._resume is not None and result.status != ERROR:
            with self._resume.open("a") as file:
                file.write(json.dumps({"key": key} | dataclasses.asdict(result)) + "\n")


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    output: str  # the end of it
    failed: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)


def outcomes(report: pathlib.Path) -> tuple[list[str], list[str]]:
    """(tests that failed, tests that were skipped) of a JUnit report; a file that cannot be imported is neither."""
    failed, skipped = [], []
    if report.exists():
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            error = case.find("error")
            ran = case.find("failure") is not None or error is not None and "collection" not in error.get("message", "")
            failed += [case.get("name")] * ran
            skipped += [f"{case.get('name')} is skipped"] * (case.find("skipped") is not None)
    return failed, skipped


def end(group: int) -> None:
    """Kills the processes of a group."""
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(group, signal.SIGKILL)


def forget_compiled(path: pathlib.Path) -> None:
    """Removes the bytecode of a module: Python misses a change that keeps its size within a second."""
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def copy_tree(target: pathlib.Path) -> None:
    """The files of the tree as they are, those that git does not know yet among them."""
    for name in names():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def names() -> list[str]:
    """Names of the tree's files, without those that git ignores; an unpacked archive has no git."""
    if not (ROOT / ".git").exists():
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        return [str(path) for path in paths if not MADE.intersection(path.parts)]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name]


def digest(tree: pathlib.Path) -> str:
    """Changes with every file of a tree but the mutations themselves."""
    lists = tree / FOLDER.relative_to(ROOT)
    files = sorted(p for p in tree.rglob("*") if p.is_file() and lists not in p.parents)
    sums = [[str(p.relative_to(tree)), hashlib.sha256(p.read_bytes()).hexdigest()] for p in files]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def line(mutation: Mutation, result: Result) -> str:
    return f"{result.status:9}{result.seconds:6.1f} s  {mutation.area}/{mutation.name}"


def summarise(chosen: list[Mutation], results: dict[str, Result]) -> int:
    """Prints the table; returns the exit code."""
    width = max((len(f"{m.area}/{m.name}") for m in chosen), default=0)
    print(f"\n{'':9}{'s':>6}  {'mutation':{width}}  noticed by")
    for m in chosen:
        result = results[m.name]
        note = result.note.splitlines()[-1] if result.note else m.breaks
        print(f"{result.status:9}{result.seconds:6.1f}  {f'{m.area}/{m.name}':{width}}  {note}")
    for m in chosen:
        if results[m.name].status == ERROR:
            print(f"\n{m.area}/{m.name}:\n{results[m.name].note}")
    counts = {status: sum(r.status == status for r in results.values()) for status in (KILLED, SURVIVED, ERROR)}
    seconds = sum(r.seconds for r in results.values())
    print(f"\n{len(chosen)} mutations: " + ", ".join(f"{n} {s}" for s, n in counts.items()) + f"; {seconds:.0f} s")
    return 2 if counts[ERROR] else 1 if counts[SURVIVED] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
