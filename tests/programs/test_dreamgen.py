"""DreamGen Bench from made folders to the table, and its clips as upstream's scripts read them."""

import csv
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.benchmark_sets import SPLITS, instruction, save_dreamgen
from tests.programs.test_worldtasks import CONFIG, asked
from tests.vlm.fake_server import FakeServer
from world_distill import cli
from world_distill.data.records.reader import RecordReader
from world_distill.errors import UserError
from world_distill.evaluation import DreamGenBench, dreamgen
from world_distill.evaluation.dreamgen import ClipFolder, file_name, instruction_of

pytestmark = pytest.mark.once

SCORED = "--config.benchmark.factory=world_distill.evaluation:DreamGenBench"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """(folder, evaluation.json, questions that were answered) of an evaluation that was stopped and called again."""
    folder = tmp_path_factory.mktemp("dreamgen")
    save_dreamgen(folder / "EVAL-175")
    Image.new("RGB", (32, 32)).save(folder / "EVAL-175/gr1_env/readme.png")
    data = str(folder / "data")
    flags = ["--folder", str(folder / "EVAL-175"), "--dreamgen", "--out", data, "--name", "dreamgen"]
    assert cli.main(["import-tasks", *flags]) == 0
    assert cli.main(["encode", *CONFIG, "--records", data, "--name", "dreamgen"]) == 0

    def evaluate(server, *more):
        flags = ["evaluate", "--workdir", str(folder / "base"), "--split", "dreamgen", SCORED]
        flags += [f"--config.benchmark.options.servers={server.url}", "--config.benchmark.options.model=judge", *more]
        return cli.main([*flags, "--export-clips", str(folder / "clips")])

    with FakeServer(fault=lambda number, body: "quota" if number > 100 else None) as server:
        assert evaluate(server, *CONFIG, f"--config.data={data}") == 2
    with FakeServer() as other:
        assert evaluate(other) == 0
    return folder, json.loads((folder / "base/evaluation.json").read_text()), asked(server) + asked(other)


def test_the_folders_are_read(scored):
    folder, *_ = scored
    records = list(RecordReader(folder / "data", "dreamgen"))
    assert len(records) == sum(SPLITS.values()) == 126
    for record in records:
        split, _, i = record.id.rpartition("-")
        assert record.task == f"[robot]: {instruction(split, int(i))}" and record.agent == "robot"
        assert record.kind == {"object": "object", "behavior": "behaviour", "env": "environment"}[split[4:]]


def test_the_table_has_the_splits_beside_the_papers(scored):
    folder, result, questions = scored
    assert len(questions) == len(set(questions)) == 2 * 126  # nothing was asked twice
    assert {len(urls) for urls, _ in questions} == {49} and len({len(set(urls)) for urls, _ in questions}) == 1
    [row] = result["rows"]
    assert row["n"] == 126 and list(result["benchmark"]["questions"]) == ["instruction", "physics"]
    assert {row["group"]: row["n"] for row in result["by_kind"]} == {"object": 50, "behaviour": 47, "environment": 29}
    [judged] = result["judges"]
    assert judged["yes"]["instruction"] == row["instruction"] and 0 < judged["probability"]["instruction"] < 1
    text = (folder / "base/evaluation.md").read_text()
    assert "| instruction | object | behaviour | environment |" in text and "of 47 |" in text
    assert "| *WMSD on LTX-2, without robot data, the paper's figure* | 70.0 % | 57.4 % | 58.6 % |" in text


def upstream(path):
    """(instruction, prompt is known) as upstream's scripts are documented to read a clip's path."""
    words = pathlib.Path(path).stem.split("_")[1:]
    if "hunyuan" in path:
        words = words[:-4]
    known = any(word in path for word in ("cogvideo", "hunyuan", "wan", "cosmos"))
    return " ".join(words), known


def test_upstream_reads_every_clip_as_it_was_meant(scored):
    folder, result, _ = scored
    root = folder / "clips/base"
    paths = sorted(root.glob("**/*.mp4"))
    manifest = {str(root / entry["file"]): entry for entry in json.loads((root / "manifest.json").read_text())}
    assert len(paths) == 126 == len(manifest)
    for path in map(str, paths):
        entry = manifest[path]
        meant = instruction(entry["split"], entry["index"])
        assert entry["instruction"] == meant
        assert upstream(path) == (meant.replace(",", ""), True) == (entry["read_back"], True)
        assert f"as_wan_{entry['split']}/{entry['index']}_Use_the_" in path
    for question in ("instruction", "physics"):
        head, *lines = (root / f"{question}.csv").read_text().splitlines()
        assert head == "video_path,prompt,prediction" and len(lines) == 126
        cells = [line.split(",") for line in lines]  # as a script reads them that knows no quotes
        assert all(len(row) == 3 and manifest[row[0]]["read_back"] == row[1] for row in cells)
        rate = np.mean([int(row[2]) for row in cells])
        assert rate == pytest.approx(result["rows"][0][question])


def test_paths_that_upstream_misreads_are_refused(tmp_path):
    for name in ("hunyuan_clips", "My-CogVideo", "a,b", "a[1]", "what?", 'a"b', "a\nb"):
        with pytest.raises(UserError, match="DreamGen Bench's scripts"):
            ClipFolder(tmp_path / name, 8.0)
    assert instruction_of(file_name("3", "Put a/b_c,  d.")) == "Put a b c d."
    with pytest.raises(UserError, match="too long"):
        file_name("3", "word " * 60)


# What upstream's scripts make of an instruction that a file name cannot hold word for word.
ODD = {
    "Don't drop the robot's cup; it's 3.5 cm wide...": None,
    "Pick up object_2, then put_it_down.": "Pick up object 2 then put it down.",
    "Move 10  blocks\tto\u00a0zone 4": "Move 10 blocks to zone 4",
    "Hebe die TASSE über den Würfel; 把杯子放在桌上 ☕": None,
    "\"Take it\", said the sign: press 'go' (twice) & wait!": "'Take it' said the sign: press 'go' (twice) & wait!",
    "Put clip.mp4 left/right of [it], or is it * or ?": "Put clip.mp4 left right of [it] or is it * or ?",
    "100% #5 = yes ~ {x} \\ back | < > ; :": None,
    "wave " + "and wave " * 26 + "now": None,  # 248 bytes, with all that stands before and behind
}


def test_odd_instructions_are_read_as_the_manifest_says(tmp_path, capsys):
    folder, clip = ClipFolder(tmp_path / "clips", 8.0), np.zeros((2, 8, 8, 3), np.uint8)
    cases = {f"gr1_env-{i}": text for i, text in enumerate(ODD)}
    left_out = {"gr1_env-90": "Ask the Hunyuan model.", "gr1_env-91": "long " * 60, "gr1_env-92": "half \ud800."}
    again = {"gr1_env-0.2": next(iter(ODD)), "odd kind-x": "Go."}  # a second picture of one number; no number at all
    for record, text in {**cases, **left_out, **again}.items():
        folder.write("base", record, f"[robot]: {text}", "robot", "a/b [c]", clip)
    root = tmp_path / "clips/base"
    (root / "as_wan_gr1_env/7_of_another_call.mp4").write_bytes(b"")
    records = [*cases, *left_out, *again]
    verdicts = [{"id": record, "scores": {"instruction": float(i % 2)}} for i, record in enumerate(records)]
    [manifest] = folder.finish({"verdicts": {"base": verdicts}}, ["instruction"])
    said = capsys.readouterr().err
    assert (
        "clips of 3 cases are not exported: gr1_env-90: " in said and "1 clips that are not of this evaluation" in said
    )
    entries = {entry["id"]: entry for entry in json.loads(manifest.read_text())}
    assert entries.keys() == {*cases, *again} and len({entry["file"] for entry in entries.values()}) == len(entries)
    for record, text in {**cases, **again}.items():
        entry = entries[record]
        assert (root / entry["file"]).is_file() and entry["instruction"] == text.strip()
        told = (ODD.get(text) or text).strip()
        assert upstream(str(root / entry["file"])) == (told, True) == (entry["read_back"], True)
    head, *lines = (root / "instruction.csv").read_text().splitlines()
    by_path = {str(root / entry["file"]): record for record, entry in entries.items()}
    for path, prompt, verdict in csv.reader(lines):  # quotes are signs like others, or a reader would join lines
        assert prompt == entries[by_path.pop(path)]["read_back"] and verdict in "01"
    assert not by_path


def test_its_frames_are_upstreams():
    bench = DreamGenBench(model="m", servers="http://a/v1")
    assert bench.questions == ("instruction", "physics") and "49x448" in bench.judges["main"].name
    assert bench.shown(np.zeros((1, 1, 33, 39, 3), np.uint8)).shape[2:4] == (9, 11)  # cut, not rounded
    clip = np.arange(93, dtype=np.uint8)[None, :, None, None, None] * np.ones((1, 93, 40, 60, 3), np.uint8)
    shown = bench.shown(clip)
    assert shown.shape == (1, 49, 12, 18, 3)
    assert shown[0, :, 0, 0, 0].tolist() == np.linspace(0, 92, 49).astype(int).tolist()
    assert bench.shown(clip[:, :5])[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] + [4] * 44
    assert dreamgen.PAPER.keys() == bench.describe()["paper_splits"].keys()


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "cat.png")
    flags = ["import-tasks", "--folder", str(tmp_path), "--dreamgen", "--out", str(tmp_path / "out")]
    assert cli.main(flags) == 2
    assert "holds no picture INDEX_instruction.png" in capsys.readouterr().err
