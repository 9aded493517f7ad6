"""Videos with texts to annotated records: folders, tables, and what is left out, counted and listed."""

import json
import shutil

import numpy as np
import pytest

from tests.data.videos import making
from world_distill import cli
from world_distill.data.images.png import decode_png
from world_distill.data.records.reader import AnnotatedRecord, RecordReader
from world_distill.data.videos.decode import first_frame
from world_distill.data.videos.find import LeftOut, find_videos
from world_distill.errors import UserError

pytest.importorskip("av", reason="PyAV is in the extra `test`")
TASK, CAPTION = "[robot arm]: Put the red cube on the plate.", "A robot arm grips a red cube and sets it on a plate."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three videos."""
    folder = tmp_path_factory.mktemp("made")
    return [making.write(folder / f"{i}.mp4", first=i, count=4) for i in range(3)]


@pytest.fixture
def clips(made, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    return [shutil.copy(path, folder / path.name) for path in made]


def call(videos, out, *flags):
    return cli.main(["import-videos", "--videos", str(videos), "--out", str(out), *flags])


def read(out, name="train"):
    return list(RecordReader(out, f"{name}_annotated", AnnotatedRecord))


def left_out(out, name="train"):
    lines = (out / f"{name}_annotated.left_out.jsonl").read_text().splitlines()
    return {line["video"] or line["where"]: line["reason"] for line in map(json.loads, lines)}


def test_a_folder_with_texts_beside_the_videos(clips, tmp_path, capsys):
    folder, out = clips[0].parent, tmp_path / "out"
    (folder / "0.txt").write_text(f"{CAPTION}\n")
    (folder / "1.txt").write_text(TASK)
    (folder / "broken.mp4").write_bytes(b"nothing")
    (folder / "broken.txt").write_text(CAPTION)
    (folder / "empty.mp4").touch()
    (folder / "empty.txt").write_text(CAPTION)
    (folder / "notes.pdf").touch()
    (folder / "alone.txt").write_text(CAPTION)
    (folder / "rows.jsonl").touch()
    assert call(folder, out, "--licence", "CC0") == 0
    caption, task = read(out)
    assert (caption.task, caption.solution, caption.agent, caption.kind) == (CAPTION, CAPTION, "", "video")
    assert (task.task, task.solution, task.agent) == (TASK, "", "robot arm")
    assert caption.source == {"video": "0.mp4", "rows": "0.txt", "licence": "CC0"}
    np.testing.assert_array_equal(decode_png(task.image_png), first_frame(clips[1]))
    assert left_out(out) == {"2.mp4": "no_text", "broken.mp4": "damaged", "empty.mp4": "damaged"}
    said = capsys.readouterr().out
    assert "records: 2" in said and "left_out: 3" in said and "left_out_damaged: 2" in said
    for line in (
        "1 .pdf (no video by its name)",
        "1 .txt (no video beside it)",
        "1 .jsonl (rows: name the file itself)",
    ):
        assert line in said
    assert "next: world-distill encode" in said
    assert RecordReader(out, "train_annotated").metadata["videos"] == str(folder)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "metadata.csv"])
def test_tables_name_videos_and_their_texts(clips, tmp_path, kind):
    folder, out = clips[0].parent, tmp_path / "out"
    rows = [
        {"file_name": "0.mp4", "task": TASK, "caption": CAPTION, "category": "place", "license": "CC-BY"},
        {"file_name": "1.mp4", "task": "", "caption": CAPTION, "category": "", "license": ""},
        {"file_name": "1.mp4", "task": TASK, "caption": "", "category": "", "license": ""},
        {"file_name": "1.mp4", "task": TASK, "caption": "again", "category": "", "license": ""},
        {"file_name": "gone.mp4", "task": TASK, "caption": "", "category": "", "license": ""},
        {"file_name": "2.mp4", "task": "", "caption": "", "category": "", "license": ""},
        {"file_name": "", "task": TASK, "caption": "", "category": "", "license": ""},
    ]
    table = folder / (kind if kind == "metadata.csv" else f"rows.{kind}")
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    else:
        lines = [",".join(rows[0]), *(",".join(f'"{cell}"' for cell in row.values()) for row in rows)]
        table.write_text("\n".join(lines))
    assert call(folder if kind == "metadata.csv" else table, out) == 0
    first, second, third = read(out)
    assert (first.task, first.solution, first.kind) == (TASK, CAPTION, "place")
    assert first.source["licence"] == "CC-BY" and first.source["rows"].startswith(f"{table.name}:")
    assert (second.task, second.solution, third.task, third.solution) == (CAPTION, CAPTION, TASK, "")
    # Records of one video share its first frame, and later its clip.
    assert second.image_id == third.image_id != first.image_id and second.id != third.id
    reasons = sorted(left_out(out).values())
    expected = ["missing", "no_text", "no_video", "repeated"] + (["not_json"] if kind == "jsonl" else [])
    assert set(reasons) == set(expected)


def test_no_video_outside_of_the_folder_is_read(clips, made, tmp_path):
    table = clips[0].parent / "rows.jsonl"
    paths = ["0.mp4", str(made[1]), f"../../{made[2].parent.name}/2.mp4"]
    table.write_text("".join(json.dumps({"path": path, "caption": CAPTION}) + "\n" for path in paths))
    _, found = find_videos(table)
    assert [item.reason if isinstance(item, LeftOut) else item.name for item in found][:2] == ["0.mp4", "outside"]
    root, found = find_videos(table, root=made[0].parent)
    assert root == made[0].parent and [getattr(item, "name", "") for item in found[:2]] == ["", "1.mp4"]


def test_importing_again_gives_the_same_bytes(clips, tmp_path):
    folder = clips[0].parent
    for path in clips:
        path.with_suffix(".txt").write_text(f"{CAPTION} {path.name}")
    for out in ("a", "b"):
        assert call(folder, tmp_path / out, "--shards", "2") == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) == 5


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("gs://bucket/clips", "copy them first"),
        ("gone", "gone: no such file or folder"),
        ("", "no videos"),
        ("list.jsonl", "no such file"),
    ],
)
def test_what_is_no_input_says_so(tmp_path, spec, reason):
    with pytest.raises(UserError, match=reason):
        find_videos(spec if "://" in spec else tmp_path / spec)


def test_no_usable_video_at_all_is_an_error_that_names_the_list(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_text(CAPTION)
    assert call(tmp_path, tmp_path / "out") == 2
    assert "no video can be used (damaged 1)" in capsys.readouterr().err
    assert left_out(tmp_path / "out") == {"a.mp4": "damaged"}
