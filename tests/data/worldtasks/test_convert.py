"""Importing a WorldTasks-like folder: pictures found and refused, files left behind, the same bytes every time."""

import json

import numpy as np
import pytest
from PIL import Image

from world_distill import cli
from world_distill.data.images.lookup import ImageLookup
from world_distill.data.images.png import decode_png
from world_distill.data.records.reader import AnnotatedRecord, RecordReader
from world_distill.data.worldtasks import convert

TASK, SOLUTION = "[hand]: Push the red cup to the left edge.", "A hand enters, and the cup slides over the table."


def picture(path, seed=0, size=(24, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)


def rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Four images in shards, a jpeg among them, with two tasks each, and three rows that are of no use."""
    folder = tmp_path / "WorldTasks"
    names = [f"shard_00{i % 2}/{i}_1.{'jpg' if i == 3 else 'png'}" for i in range(4)]
    for i, name in enumerate(names):
        picture(folder / "train" / "images" / name, i)
    good = [
        {"id": n, "image": name.rpartition("/")[2], "task": f"[hand]: Push cup {n % 2}.", "solution": SOLUTION}
        for n, name in enumerate(name for name in names for _ in range(2))
    ]
    bad = [{"image": "gone.png", "task": TASK, "solution": SOLUTION}, {"image": "0_1.png", "task": TASK}, good[0]]
    rows(folder / "train" / "train.jsonl", *good, *bad)
    return folder


def call(folder, *flags, out=None):
    out = out or folder.parent / "out"
    return cli.main(["import-tasks", "--folder", str(folder), "--out", str(out), *flags])


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_import(folder, capsys):
    figures = folder.parent / "figures.json"
    assert call(folder, "--licence", "other", "--shards", "2", "--json", str(figures)) == 0
    said, out = capsys.readouterr().out, folder.parent / "out"
    records = list(RecordReader(out, "train_annotated", AnnotatedRecord))
    assert [(r.task, r.solution, r.agent) for r in records[:2]] == [
        ("[hand]: Push cup 0.", SOLUTION, "hand"), ("[hand]: Push cup 1.", SOLUTION, "hand"),
    ]  # fmt: skip
    assert [r.id for r in records] == [f"{r.image_id}-{n % 2}" for n, r in enumerate(records)]
    assert len({r.image_id for r in records}) == 4
    origin = {"file": "train/images/shard_001/3_1.jpg", "rows": "train/train.jsonl", "line": "8"}
    assert records[7].source == origin | {"licence": "other", "id": "7"}
    first = folder / "train/images/shard_000/0_1.png"
    assert records[0].image_png == first.read_bytes()  # as it was
    with Image.open(folder / "train/images/shard_001/3_1.jpg") as image:
        assert np.array_equal(decode_png(records[7].image_png), np.array(image))
    lines = [json.loads(line) for line in (out / "train_annotated.unusable.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in lines] == [
        (9, "image_missing"), (10, "no_solution"), (11, "repeated"),
    ]  # fmt: skip
    assert lines[0]["value"] == "gone.png" and lines[1]["keys"] == ["image", "task"]
    card = json.loads((out / "train_annotated.card.json").read_text())
    assert card == json.loads(figures.read_text())
    assert (card["counts"]["kept"], card["counts"]["images"], card["counts"]["unusable_repeated"]) == (8, 4, 1)
    assert card["licence"] == "other" and card["example"]["image"] == "train/images/shard_000/0_1.png"
    assert "image    from 'image' (11)" in said and "kept: 8" in said and str(folder) not in json.dumps(card)


def test_again_gives_the_same_bytes_and_an_interrupted_one_leaves_nothing(folder, monkeypatch):
    out = folder.parent / "out"
    assert call(folder) == 0
    first = files(out)
    real = convert.as_kept

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "as_kept", stop)
    assert call(folder) == 130 and files(out) == first
    assert call(folder, out=folder.parent / "new") == 130 and files(folder.parent / "new") == {}
    monkeypatch.setattr(convert, "as_kept", real)
    assert call(folder, out=folder.parent / "new") == 0 and files(folder.parent / "new") == first


def test_benchmark_rows_need_no_solution(folder):
    picture(folder / "bench/images/7.png", 7)
    rows(folder / "bench/bench.jsonl", {"image_id": 7, "image": "7", "prompt": TASK})
    assert call(folder, "--bench", "--name", "test") == 0
    (record,) = RecordReader(folder.parent / "out", "test_annotated")
    assert (record.task, record.solution, record.source["id"]) == (TASK, "", "7")


def test_without_bench_a_task_needs_a_solution(folder):
    rows(folder / "train/train.jsonl", {"image": "0_1.png", "task": TASK})
    assert call(folder) == 2


def test_strict_leaves_out_what_breaks_a_rule(folder):
    leak = {"image": "0_1.png", "task": "[hand]: Is the cup red?", "solution": SOLUTION}
    rows(folder / "train/train.jsonl", leak, {"image": "0_1.png", "task": TASK, "solution": SOLUTION})
    assert call(folder) == 0
    card = json.loads((folder.parent / "out/train_annotated.card.json").read_text())
    assert card["counts"]["kept"] == 2 and card["broken_rules"] == {"task_question": 1}
    assert call(folder, "--strict") == 0
    card = json.loads((folder.parent / "out/train_annotated.card.json").read_text())
    assert card["counts"]["kept"] == 1 and card["counts"]["unusable_rule_task_question"] == 1


def test_no_usable_row_says_what_was_there(folder, capsys):
    rows(folder / "train/train.jsonl", {"bild": "0_1.png", "do\x1b[31m": TASK})
    assert call(folder) == 2
    said = capsys.readouterr()
    assert "no row can be used (no_image 1)" in said.err and "not used: 'bild' (1), 'do?[31m' (1)" in said.out
    assert "image    from nothing" in said.out
    assert [*files(folder.parent / "out")] == ["train_annotated.unusable.jsonl"]
    assert (
        call(folder, "--field", "image=bild", "--field", "task=Do\x1b[31m", "--bench", "--rows", "train/train.jsonl")
        == 0
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--field", "picture=a"), "--field picture=a: expected"),
        (("--rows", "../secret.jsonl"), "no such file"),
        (("--rows", "none.jsonl"), "no such file"),
        (("--max-side", "-1"), "at least 0"),
    ],
)
def test_refusals(folder, capsys, flags, message):
    (folder.parent / "secret.jsonl").write_text("{}")
    assert call(folder, *flags) == 2 and message in capsys.readouterr().err


# ---- Pictures


def test_nothing_outside_of_the_folder_is_read(folder):
    picture(folder.parent / "secret.png", 9)
    (folder / "train/images/link.png").symlink_to(folder.parent / "secret.png")
    (folder / "train/images/shard_009").symlink_to(folder.parent)
    (folder / "train/images/loop.png").symlink_to("loop.png")
    lookup = ImageLookup(folder, folder / "train")
    outside = [
        "../secret.png",
        "images/../../../secret.png",
        str(folder.parent / "secret.png"),
        "link.png",
        "..\\secret.png",
    ]
    outside += [
        "shard_009/secret.png",
        "C:\\secret.png",
        "file:///etc/passwd",
        "https://x.org/a.png",
        "a\0b",
    ]
    assert {name: lookup.find(name) for name in outside} == dict.fromkeys(outside, "image_outside")
    for name in ("loop.png", ".", "images", "x" * 5000, "\ud800.png", "none.png", "secret.png"):
        assert lookup.find(name) == "image_missing", name


@pytest.mark.parametrize(
    "name, found",
    [
        ("shard_001/1_1.png", "train/images/shard_001/1_1.png"),
        ("images/shard_001/1_1.png", "train/images/shard_001/1_1.png"),
        ("train/images/shard_001/1_1.png", "train/images/shard_001/1_1.png"),
        ("./1_1", "train/images/shard_001/1_1.png"),
        ("frames/of/video/3_1.jpg", "train/images/shard_001/3_1.jpg"),
    ],
)
def test_where_pictures_are_found(folder, name, found):
    assert ImageLookup(folder, folder / "train").find(name).path == folder / found


def test_a_name_of_several_shards_is_ambiguous(folder):
    picture(folder / "train/images/shard_001/0_1.png", 5)
    lookup = ImageLookup(folder, folder / "train")
    assert lookup.find("0_1.png") == "image_ambiguous"
    assert lookup.find("shard_001/0_1.png").path == folder / "train/images/shard_001/0_1.png"


def test_a_broken_picture_is_listed_with_no_path_of_the_machine(folder):
    (folder / "train/images/shard_000/0_1.png").write_bytes(b"\x89PNG no")
    picture(folder / "train/images/shard_001/1_1.png", 0, (4, 4))
    assert call(folder) == 0
    text = (folder.parent / "out/train_annotated.unusable.jsonl").read_text()
    assert text.count("image_broken") == 5 and str(folder) not in text and "4x4 pixels" in text
