"""Synthetic runs for the tests of reports, and a reader of pages."""

import html.parser
import json
import re

import numpy as np

from world_distill.programs import paper_rows, reproduce
from world_distill.programs.evaluate import Verdict, summarise
from world_distill.reports import run_data
from world_distill.storage import atomic, video_files

QUESTIONS = ("task", "agent", "consistency")
SEEDS = {"base": 0, "demonstrator": 1, "executor": 2}
RATES = {"base": (0.1, 0.5, 0.7), "demonstrator": (0.6, 0.95, 0.8), "executor": (0.9, 0.97, 0.5)}
HOSTILE = "</script></style><img src=x onerror=alert(1)>&\"'\x00\ud800"


CASES = 200  # of `make_evaluation`


def make_evaluation(folder, *, shape=(12, 90, 160), noise=False):
    """A run's folder as evaluate leaves it: `CASES` cases, with a clip of each role in WebP."""
    results = make_run(folder, count=CASES, kept=0)
    for name in ("results.json", "clips/clips.json"):
        (folder / name).unlink()
    atomic.write_json(folder / "evaluation.json", results | {"clips": CASES})
    clips, rng = folder / "evaluation_clips", np.random.default_rng(1)
    entries = []
    for role in RATES:
        frames = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        if not noise:
            frames = np.broadcast_to(frames[:, :1, :1], frames.shape)
        first = run_data.clip_path(clips, role, "r0", ".webp")
        video_files.save_small_strip(first, frames)
        for number in range(1, CASES):
            run_data.clip_path(clips, role, f"r{number}", ".webp").write_bytes(first.read_bytes())
    for verdict in results["verdicts"]["base"]:
        entry = {name: verdict[name] for name in ("id", "task", "agent", "kind")}
        entries.append(entry | {"solution": "It moves, then stops. " * 40, "fps": 6})
    atomic.write_json(clips / "clips.json", entries)
    return results


def make_run(folder, *, count=100, kept=4, steps=60, text="", clip=(9, 30, 30), noise=False):
    """A run's folder as quickstart leaves it."""
    rng = np.random.default_rng(0)
    kinds, agents = ("go", "beside"), ("red disc", "blue square")
    verdicts = {}
    for role, rates in RATES.items():
        draw = np.random.default_rng(SEEDS[role]).random((count, 3)) < rates
        verdicts[role] = [
            Verdict(f"r{i}", f"[{agents[i % 2]}]: Go.{text}", agents[i % 2] + text, kinds[i // 2 % 2] + text,
                    dict(zip(("task", "agent", "consistency"), map(float, row), strict=True)))
            for i, row in enumerate(draw)
        ]  # fmt: skip

    def groups(by):
        values = sorted({getattr(v, by) for v in verdicts["base"]})
        return [
            summarise(role, [v for v in seen if getattr(v, by) == value]) | {"group": value}
            for role, seen in verdicts.items()
            for value in values
        ]

    results = {
        "split": "test", "seed": 3, "step": steps,
        "rows": [summarise(role, seen) for role, seen in verdicts.items()],
        "by_kind": groups("kind"), "by_agent": groups("agent"),
        "verdicts": {role: [v.to_json() for v in seen] for role, seen in verdicts.items()},
    }  # fmt: skip
    atomic.write_json(folder / "results.json", results)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "train/anchor": 1 / step, "rate/task": step / steps, "reward/total": rng.normal()}
        lines.append(
            line | {"train/beta_d": 0.1, "judge/invalid": 0.02, "reward/odd" + text: None if step == 9 else 1.5}
        )
        if step % 20 == 0:
            lines.append({"step": step, "validation/task": 0.5, "validation/average": 0.6, "validation/all": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = []
    for verdict in verdicts["base"][:kept]:
        entry = {name: getattr(verdict, name) for name in ("id", "task", "agent", "kind")}
        entries.append(entry | {"solution": f"The {verdict.agent} moves, then stops.{text}", "fps": 4})
        for role in RATES:
            frames = rng.integers(0, 256 if noise else 2, (*clip, 3), dtype=np.uint8) * (1 if noise else 255)
            video_files.save_strip(run_data.clip_path(folder / "clips", role, verdict.id), frames)
    atomic.write_json(folder / "clips/clips.json", entries)
    atomic.write_json(folder / "config.json", {"seed": 3, "objective": {"rl": "awm"}, "name": f"x{text}", "empty": {}})
    return results


def make_table(folder, *, rows=("base", "demonstrator", "sft", "wmsd"), seeds=(0, 1), count=6, clip=(5, 12, 12)):
    """A folder as reproduce leaves it; returns its result. All pixels of a row's clip have the value of `pixel_of`."""
    study = paper_rows.Study("sandbox", folder, {}, seeds=seeds, rows=rows)
    runs, found = paper_rows.make_runs(study), {}
    for number, run in enumerate(runs):
        draw = np.random.default_rng(number).random((count, 3)) < RATES[run.role]
        ids = [f"s{run.seed}-{i}" for i in range(count // 2)] + [f"both-{i}" for i in range(count - count // 2)]
        scores = [dict(zip(QUESTIONS, map(float, row), strict=True)) for row in draw]
        verdicts = [
            Verdict(name, "[red disc]: Go.", "red disc", ("go", "beside")[n % 2], scores[n])
            for n, name in enumerate(ids)
        ]
        scores = {
            "split": "test", "seed": run.seed, "step": run.steps, "rows": [summarise(run.role, verdicts)],
            "verdicts": {run.role: [v.to_json() for v in verdicts]}, "clips": count, "noises": 1,
        }  # fmt: skip
        atomic.write_json(run.folder / "evaluation.json", scores)
        clips = run.folder / "evaluation_clips"
        about = [{name: getattr(v, name) for name in ("id", "task", "agent", "kind")} for v in verdicts]
        atomic.write_json(clips / "clips.json", [entry | {"solution": "It goes.", "fps": 4} for entry in about])
        for verdict in verdicts:
            frames = np.full((*clip, 3), pixel_of(run.row, run.seed), np.uint8)
            video_files.save_strip(run_data.clip_path(clips, run.role, verdict.id), frames)
        found.setdefault(run.row, {})[run.seed] = scores
    result = reproduce.compare(study, runs, found) | {"failed": []}
    atomic.write_json(folder / reproduce.RESULTS, result)
    return json.loads((folder / reproduce.RESULTS).read_text())


def pixel_of(row, seed):
    """The value of all pixels of the clips that `make_table` makes."""
    return 20 * ["base", "demonstrator", "sft", "off_policy", "on_policy", "wmsd"].index(row) + 7 * seed + 1


class Checker(html.parser.HTMLParser):
    """Elements must nest; collects tags, attributes and text."""

    VOID = {"meta", "br", "img", "input", "link", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.said = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def text_of(page_text):
    return re.sub(r"\s+", " ", "".join(Checker(page_text).said).replace("\u00a0", " "))
