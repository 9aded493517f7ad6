"""Importing a WorldTasks-like folder: pictures found and refused, files left behind, the same bytes every time."""

import gzip
import io
import json
import tarfile

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
        (("--rows", "../secret.jsonl"), "outside of --folder"),
        (("--rows", "none.jsonl"), "no such file"),
        (("--max-side", "-1"), "at least 0"),
    ],
)
def test_refusals(folder, capsys, flags, message):
    (folder.parent / "secret.jsonl").write_text("{}")
    assert call(folder, *flags) == 2 and message in capsys.readouterr().err


# ---- Order, layouts and splits


def test_order_of_rows_costs_nothing_and_an_image_is_decoded_once(folder, monkeypatch):
    lines = (folder / "train/train.jsonl").read_text().splitlines(keepends=True)[:8]
    read = []
    real = convert.decode_image
    monkeypatch.setattr(convert, "decode_image", lambda data, *a, **k: read.append(data) or real(data, *a, **k))
    seen = []
    for order in (range(8), (7, 0, 5, 2, 1, 6, 3, 4)):
        (folder / "train/train.jsonl").write_text("".join(lines[i] for i in order))
        read.clear()
        assert call(folder) == 0 and len(read) == 4
        records = list(RecordReader(folder.parent / "out", "train_annotated"))
        ids = [r.image_id for r in records]
        assert ids == sorted(ids, key=ids.index)  # the tasks of an image side by side
        seen.append({(r.image_id, r.task, r.source["id"]) for r in records})
    assert seen[0] == seen[1] and len(seen[0]) == 8


def test_rows_are_named_below_the_folder_or_as_the_shell_completes_them(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for path in ("train/train.jsonl", f"{folder.name}/train/train.jsonl"):
        assert cli.main(["import-tasks", "--folder", folder.name, "--rows", path, "--out", "out"]) == 0
    (folder.parent / "train.jsonl").write_bytes((folder / "train/train.jsonl").read_bytes())
    assert cli.main(["import-tasks", "--folder", folder.name, "--rows", "train.jsonl", "--out", "out"]) == 2
    assert f"--image-root {folder.name}" in capsys.readouterr().err


def test_pictures_without_rows_lead_to_annotate(tmp_path, capsys):
    picture(tmp_path / "pictures/0.png")
    assert call(tmp_path / "pictures") == 2
    assert "no rows among its 1 files" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["import-videos", "annotate"])
def test_one_verb_does_not_replace_the_records_of_another(folder, tmp_path, capsys, verb):
    assert call(folder) == call(folder) == 0  # its own it may replace
    before = files(tmp_path / "out")
    flags = ["--videos"] if verb == "import-videos" else ["--images"]
    assert cli.main([verb, *flags, str(folder), "--out", str(tmp_path / "out")]) == 2
    assert f"from `world-distill import-tasks`: {verb} would replace it" in capsys.readouterr().err
    assert files(tmp_path / "out") == before
    for made, card in (("annotate", {"annotator": "x"}), ("import-videos", {"counts": {"videos": 1}})):
        (tmp_path / "out/train_annotated.card.json").write_text(json.dumps(card))
        assert call(folder) == 2 and f"from `world-distill {made}`" in capsys.readouterr().err
    (tmp_path / "out/train_annotated.json").unlink()
    assert call(folder) == 0


def test_paths_of_another_machine_and_another_root(folder, tmp_path):
    rows(folder / "train/train.jsonl", {"image": "/scratch/me/shard_001/1_1.png", "task": TASK, "solution": SOLUTION})
    assert call(folder) == 0
    (record,) = RecordReader(tmp_path / "out", "train_annotated")
    assert record.source["file"] == "train/images/shard_001/1_1.png"
    rows(tmp_path / "words/mine.jsonl", {"image": "2_1.png", "task": TASK, "solution": SOLUTION})
    assert call(tmp_path / "words") == 2
    assert call(tmp_path / "words", "--image-root", str(folder)) == 0
    (record,) = RecordReader(tmp_path / "out", "train_annotated")
    assert record.source["file"] == "train/images/shard_000/2_1.png" and record.source["rows"] == "mine.jsonl"


WORDS = {"task": TASK, "solution": SOLUTION}


def layout(kind, root):
    """A data set of two pictures; the name of the first in its records."""
    picture(root / "0.png", 0), picture(root / "1.png", 1)
    if kind == "side files":
        for i in range(2):
            (root / f"{i}.json").write_text(json.dumps(WORDS))
        return "0.png"
    if kind == "metadata":
        (root / "metadata.csv").write_text(
            f'file_name,task,solution\n0.png,{TASK},"{SOLUTION}"\n1.png,{TASK},"{SOLUTION}"\n'
        )
        return "0.png"
    if kind == "csv":
        (root / "mine.csv").write_text(f'image;Task;Caption\n0.png;{TASK};"{SOLUTION}"\n1;{TASK};"{SOLUTION}"\n')
        return "0.png"
    data = [(root / f"{i}.png").read_bytes() for i in range(2)]
    for i in range(2):
        (root / f"{i}.png").unlink()
    if kind == "webdataset":
        with tarfile.open(root / "x.tar", "w") as tar:
            for i in range(2):
                texts = json.dumps(WORDS | {"license": "CC0", "url": "u"}).encode()
                for end, content in {"png": data[i], "json": texts}.items():
                    info = tarfile.TarInfo(f"{i}.{end}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return "x.tar/0.png"
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": data[i], "path": f"{i}.png"} for i in range(2)]
    for split in ("train", "test"):
        table = pa.table({"image": cells, "task": [TASK] * 2, "solution": [f"{SOLUTION} {split}"] * 2})
        (root / "data").mkdir(exist_ok=True)
        pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    return "data/train-00000-of-00001.parquet/0.png"


@pytest.mark.parametrize("kind", ["side files", "metadata", "csv", "webdataset", "parquet"])
def test_layouts_of_data_sets(kind, tmp_path, capsys):
    name = layout(kind, tmp_path / "set")
    assert call(tmp_path / "set") == 0
    records = list(RecordReader(tmp_path / "out", "train_annotated"))
    assert [r.task for r in records] == [TASK] * 2 and records[0].source["file"] == name
    said = capsys.readouterr().out
    if kind == "webdataset":
        assert (records[0].source["licence"], records[0].source["url"]) == ("CC0", "u")
    if kind == "parquet":
        assert {r.solution for r in records} == {f"{SOLUTION} train"}  # and no task of the test set
        assert "not used: 1 .parquet (of another split: --rows says which)" in said
        assert call(tmp_path / "set", "--bench", "--name", "test") == 0
        assert RecordReader(tmp_path / "out", "test_annotated")[0].solution == f"{SOLUTION} test"
        assert call(f"{tmp_path}/set/data/te*.parquet", out=tmp_path / "out") == 0
    else:
        assert "not used" not in said


def test_a_snapshot_of_the_hubs_cache_is_links_into_blobs(tmp_path):
    hub = tmp_path / "hub/datasets--me--set"
    picture(hub / "blobs/0a1b.png", 1), picture(tmp_path / "secret.png", 2)
    (hub / "blobs/2c3d").write_text("".join(json.dumps({"image": f"{n}.png", **WORDS}) + "\n" for n in ("1", "secret")))
    snapshot = hub / "snapshots/4e5f"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to("../../blobs/2c3d")
    (snapshot / "images").mkdir()
    (snapshot / "images/1.png").symlink_to("../../../blobs/0a1b.png")
    (snapshot / "images/secret.png").symlink_to(tmp_path / "secret.png")
    for flags in ((), ("--rows", "train.jsonl")):
        assert call(snapshot, *flags, out=tmp_path / "out") == 0
        (record,) = RecordReader(tmp_path / "out", "train_annotated")
        assert (record.source["file"], record.source["rows"]) == ("images/1.png", "train.jsonl")
        assert "image_outside" in (tmp_path / "out/train_annotated.unusable.jsonl").read_text()


def test_the_closing_line_and_damaged_files(folder, capsys):
    assert call(folder) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-4] == "not used: 1 tasks (image_missing), 1 tasks (no_solution), 1 tasks (repeated)"
    assert said[-3].endswith(f"{folder.parent}/out/train_annotated.unusable.jsonl")
    assert said[-2].startswith("imported tasks: ") and said[-1].startswith("next: world-distill encode ")
    rows_gz = gzip.compress((folder / "train/train.jsonl").read_bytes() * 100, 0)
    (folder / "cut.jsonl.gz").write_bytes(rows_gz[: len(rows_gz) - 900])
    assert call(folder, "--rows", "cut.jsonl.gz") == 2
    assert "cut.jsonl.gz: damaged or cut off" in capsys.readouterr().err
    assert call(folder, "--rows", "cut.jsonl.gz", "--skip-bad") == 0
    assert "1 .jsonl.gz (damaged or cut off)" in capsys.readouterr().out


def test_pictures_that_no_row_names_are_counted(tmp_path, capsys):
    # github.com/wisdomikezogwo/quilt1m/issues/23
    layout("metadata", tmp_path / "set")
    picture(tmp_path / "set/more/2.png", 2)
    assert call(tmp_path / "set") == 0
    assert "not used: 1 .png (no row names it)" in capsys.readouterr().out


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
