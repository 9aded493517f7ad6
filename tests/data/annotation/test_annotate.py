"""Annotation: bad images are named, bad tasks counted, and a restarted job asks nothing twice."""

import collections
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data.annotation.writing import Writer, five_images, image_file, run
from world_distill.data.annotation import annotate
from world_distill.data.annotation.annotate import check_pair
from world_distill.data.images.decode import read_image
from world_distill.data.images.filters import Filters
from world_distill.data.images.png import ImageError, decode_png
from world_distill.data.images.reader import find_images
from world_distill.data.images.unused import Unused
from world_distill.data.records.reader import AnnotatedRecord, RecordError, RecordReader
from world_distill.interfaces import TaskPair

ROOT = pathlib.Path(__file__).resolve().parents[3]
GOOD = TaskPair("[Red disc]: Go to the pad.", "The red disc moves right until it lies on the pad.", "red disc", "move")


@pytest.fixture
def images(tmp_path):
    return five_images(tmp_path)


def test_records_card_and_counts(images, tmp_path):
    seen = []
    counts = run(images, Writer(), tmp_path / "out", shards=2, licence="CC0", progress=lambda *a: seen.append(a))
    common = dict(images=5, bad_images=0, repeated_images=0, asked=5, failed=0, nothing_to_do=0, pairs=10, kept=10)
    assert counts == common | dict(remembered=0)
    assert seen == [(i, 5) for i in range(1, 6)]
    reader = RecordReader(tmp_path / "out", "set", AnnotatedRecord)
    assert [r.agent for r in reader] == [f"fox {10 * i}" for i in range(1, 6) for _ in range(2)]
    assert len({r.id for r in reader}) == 10 and len({r.image_id for r in reader}) == 5
    assert reader[2].source == {"file": "2.png", "annotator": "writer-1", "licence": "CC0"}
    np.testing.assert_array_equal(decode_png(reader[2].image_png), np.full((20, 24, 3), 20))
    card = json.loads((tmp_path / "out/set.card.json").read_text())
    assert card == dict(
        name="set", licence="CC0", annotator="writer-1", seed=3, max_pairs=2, validated=True, min_side=16, max_side=0,
        filters=vars(Filters()), counts=common, kinds={"k": 10}, licences={"CC0": 5},
    )  # fmt: skip
    assert (tmp_path / "out/set.rejected.jsonl").read_text() == ""


def test_order_and_bytes_depend_on_nothing_but_the_input(images, tmp_path):
    run(images, Writer(), tmp_path / "a")
    run(images[::-1], Writer(), tmp_path / "b")
    run(images, Writer(), tmp_path / "c", seed=4)
    a, b, c = (RecordReader(tmp_path / x, "set").fingerprint for x in "abc")
    assert a == b != c


def test_each_image_has_its_own_seed(images, tmp_path):
    writer = Writer()
    run(images, writer, tmp_path)
    assert len({seed for _, seed in writer.asked}) == 5


def test_restart_asks_only_what_is_left(images, tmp_path):
    with pytest.raises(ConnectionError) as caught:
        run(images, Writer(stop_after=3), tmp_path / "a")
    assert "4.png" in "".join(caught.value.__notes__)
    assert not (tmp_path / "a/set.json").exists()
    second = Writer()
    counts = run(images, second, tmp_path / "a")
    assert (len(second.asked), counts["asked"], counts["remembered"]) == (2, 2, 3)
    run(images, Writer(), tmp_path / "b")
    assert RecordReader(tmp_path / "a", "set").fingerprint == RecordReader(tmp_path / "b", "set").fingerprint
    third = Writer()
    run(images, third, tmp_path / "a")
    assert third.asked == []


@pytest.mark.parametrize("change", [{"seed": 4}, {"max_pairs": 3}])
def test_answers_to_other_questions_are_not_reused(images, tmp_path, change):
    run(images, Writer(), tmp_path)
    again = Writer()
    run(images, again, tmp_path, **change)
    assert len(again.asked) == 5
    other = Writer()
    other.name = "writer-2"
    run(images, other, tmp_path)
    assert len(other.asked) == 5


def test_torn_last_line_of_the_journal_is_asked_again(images, tmp_path):
    run(images, Writer(), tmp_path)
    journal = tmp_path / "set.journal.jsonl"
    data = journal.read_bytes()
    before = RecordReader(tmp_path, "set").fingerprint
    start = data[:-1].rfind(b"\n") + 1
    for length in (start + 1, start + 30, len(data) - 2, len(data) - 1):
        journal.write_bytes(data[:length])
        writer = Writer()
        run(images, writer, tmp_path)
        assert len(writer.asked) == 1
        assert journal.read_bytes() == data
        assert RecordReader(tmp_path, "set").fingerprint == before


def test_damaged_line_of_the_journal_is_named(images, tmp_path):
    run(images, Writer(), tmp_path)
    journal = tmp_path / "set.journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:2], "{}\n", *lines[2:]]))
    with pytest.raises(RecordError, match=r"set.journal.jsonl, line 3: damaged .*delete the line"):
        run(images, Writer(), tmp_path)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_annotate import Writer, run
class Killed(Writer):
    def annotate(self, image, **keywords):
        if len(self.asked) == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().annotate(image, **keywords)
run({images!r}, Killed(), {folder!r})
"""


def test_killed_between_answers_loses_none(images, tmp_path):
    code = KILLED.format(
        tests=os.path.dirname(__file__), images=[str(i) for i in images], folder=str(tmp_path), after=4
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    writer = Writer()
    run(images, writer, tmp_path)
    assert len(writer.asked) == 1


def test_drafts_of_killed_jobs_are_removed_and_nothing_else(images, tmp_path):
    drafts = [f".set.{end}.123-0a1b2c3d.tmp" for end in ("card.json", "rejected.jsonl", "json")]
    others = [".set-2.card.json.123-0a1b2c3d.tmp", "set.card.json.tmp", ".other.card.json.1-0a.tmp"]
    for file in drafts + others:
        (tmp_path / file).write_text("")
    run(images, Writer(), tmp_path)
    assert not set(drafts) & set(os.listdir(tmp_path)) and set(others) < set(os.listdir(tmp_path))


def test_two_jobs_at_once_are_refused(images, tmp_path):
    class Nested(Writer):
        def annotate(self, image, **keywords):
            with pytest.raises(RecordError, match="set.journal.jsonl: another process"):
                run(images, Writer(), tmp_path)
            return super().annotate(image, **keywords)

    assert run(images, Nested(), tmp_path)["kept"] == 10


# ---- Tasks


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"agent": " Red  Disc"}, None),
        ({"task": "Go to the pad."}, "task_format"),
        ({"task": "[]: Go."}, "task_format"),
        ({"task": "[red disc]:  "}, "task_format"),
        ({"task": "[red disc]: Go.\nStop."}, "task_format"),
        ({"agent": "blue disc"}, "agent"),
        ({"agent": ""}, "agent"),
        ({"solution": " \n"}, "solution_empty"),
        ({"solution": "[red disc]:  go to the pad"}, "solution_repeats_task"),
        ({"solution": "Go to the PAD."}, "solution_repeats_task"),
    ],
)
def test_check_pair(changes, reason):
    assert check_pair(TaskPair(**vars(GOOD) | changes)) == reason


def test_rejections_are_counted(images, tmp_path):
    other = TaskPair(**vars(GOOD) | {"task": "[Red disc]: Leave."})
    third = TaskPair(**vars(GOOD) | {"task": "[Red disc]: Turn."})
    same = TaskPair(**vars(GOOD) | {"task": "[red disc]: go to the pad"})
    bad = TaskPair(**vars(GOOD) | {"solution": ""})
    counts = run(images[:1], Writer([GOOD, same, bad, bad, other, third]), tmp_path)
    assert counts["rejected_repeated"] == 1 and counts["rejected_solution_empty"] == 2
    assert counts["rejected_above_max_pairs"] == 1 and (counts["pairs"], counts["kept"]) == (6, 2)
    assert [r.task for r in RecordReader(tmp_path, "set")] == [GOOD.task, other.task]
    counts = run(images[:1], Writer([same, GOOD]), tmp_path / "b", validate=False)
    assert counts["kept"] == 2 and not [k for k in counts if k.startswith("rejected")]


def test_nothing_left_is_an_error_with_the_reasons(images, tmp_path):
    with pytest.raises(RecordError, match=r"no task is left.*rejected_task_format 5.*set.rejected.jsonl"):
        run(images, Writer([TaskPair("x", "y", "z", "k")]), tmp_path)
    assert json.loads((tmp_path / "set.card.json").read_text())["counts"]["rejected_task_format"] == 5
    with pytest.raises(RecordError, match=r"no task is left.*filtered_dark 5\).*config.filters says which"):
        run(images, Writer(), tmp_path / "dark", filters=Filters(min_mean=100.0))
    lines = [json.loads(line) for line in (tmp_path / "dark/set.rejected.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["dark"] * 5 and not (tmp_path / "dark/set.json").exists()


def test_what_was_passed_over_is_listed_and_counted(images, tmp_path):
    folder = images[0].parent
    (folder / "x.jsonl").write_text('{"image": "1.png"}\n{no\n')
    (folder / "bad.png").write_text("no image")
    unused = Unused()
    sources = find_images(folder / "x.jsonl", skip_bad=True, unused=unused)
    sources += find_images(folder / "bad.png", unused=unused)
    run(sources, Writer(), tmp_path, filters=Filters(broken=True), unused=unused)
    lines = [json.loads(line) for line in (tmp_path / "set.rejected.jsonl").read_text().splitlines()]
    assert [(line["file"], line["reason"]) for line in lines] == [("x.jsonl:2", "row"), ("bad.png", "broken")]
    assert unused.line() == "not used: 1 .png (broken), 1 rows (not_json)"


def test_records_hold_no_private_tags(images, tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0), 3: "E", 4: (4.0, 5.0, 6.0)})
    path = image_file(images[0].parent, "gps.jpg", value=90, exif=exif, comment=b"Secret", quality=95)
    run([path], Writer(), tmp_path)
    (record, _) = RecordReader(tmp_path, "set")
    assert record.image_png.startswith(b"\xff\xd8") and b"Exif" not in record.image_png
    assert b"Secret" not in record.image_png
    np.testing.assert_array_equal(decode_png(record.image_png), read_image(path))


# ---- Images


def test_bad_images_are_named_or_counted(images, tmp_path):
    folder = images[0].parent
    (folder / "text.png").write_text("no image")
    cut = image_file(folder, "cut.png", value=99, size=(64, 64))
    cut.write_bytes(cut.read_bytes()[:80])
    tiny = image_file(folder, "tiny.png", value=98, size=(15, 40))
    wide = folder / "wide.png"
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(wide)
    bad = {
        folder / "text.png": "no picture, but text",
        cut: "not a whole",
        tiny: "40x15 pixels",
        wide: "more than 8 bits",
    }
    for path, message in bad.items():
        with pytest.raises(ImageError, match=f"{path.name}: .*{message}"):
            run([*images, path], Writer(), tmp_path / path.stem)
        with pytest.raises(ImageError, match=message):
            read_image(path)
    gone = [folder / "gone1.png", folder / "gone2.png"]
    writer = Writer()
    with pytest.raises(ImageError, match="2 of 7 images are missing: .*gone1.png.*gone2.png"):
        run([*images, *gone], writer, tmp_path / "gone")
    assert writer.asked == []
    again = folder / "again.png"
    again.write_bytes(images[0].read_bytes())
    counts = run([*images, *bad, *gone, again], Writer(), tmp_path / "all", filters=Filters(broken=True))
    assert (counts["bad_images"], counts["repeated_images"], counts["asked"], counts["kept"]) == (6, 1, 5, 10)
    assert RecordReader(tmp_path / "all", "set")[0].source["file"] == "1.png"


def test_images_are_upright_and_on_white(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :10] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))
    clear = np.zeros((20, 30, 4), np.uint8)
    clear[:, 15:] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    seen = read_image(tmp_path / "clear.png")
    assert (seen[:, :15] == 255).all() and (seen[:, 15:] == (10, 20, 30)).all()
    Image.fromarray(clear[..., 3]).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (20, 30, 3)


def test_image_that_changes_on_the_way_is_noticed(images, tmp_path, monkeypatch):
    def write(*args):
        image_file(images[2].parent, images[2].name, value=77)
        return real(*args)

    real = annotate.write_records
    monkeypatch.setattr(annotate, "write_records", write)
    with pytest.raises(ImageError, match="3.png has changed"):
        run(images, Writer(), tmp_path)


def test_unwritable_folder_is_named(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="file/out/set.journal.jsonl: cannot be written"):
        run(images, Writer(), tmp_path / "file/out")


def test_broken_images_are_listed_with_what_is_wrong_but_not_where_they_lie(images, tmp_path):
    (images[0].parent / "0.png").write_text("no image")
    run([images[0].parent / "0.png", *images], Writer(), tmp_path, filters=Filters(broken=True))
    (line,) = map(json.loads, (tmp_path / "set.rejected.jsonl").read_text().splitlines())
    assert (line["file"], line["reason"]) == ("0.png", "broken") and line["value"] == "no picture, but text: 'no image'"


# ---- Filters and sizes


def patches(i):
    """An image [40 60 3]."""
    return np.kron(np.random.default_rng(i).integers(0, 256, (4, 6, 3), np.uint8), np.ones((10, 10, 1), np.uint8))


@pytest.fixture
def pictures(tmp_path):
    """0: fine; 1: nearly 0; 2: dark; 3: the bytes of 0; 4: fine; 5: small; 6: nearly 4."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, pixels in enumerate([patches(0), patches(0) // 2 + 60, patches(2) // 30, None, patches(4), patches(5)[:30]]):
        if pixels is not None:
            Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes((folder / "0.png").read_bytes())
    Image.fromarray(patches(4)).resize((90, 60)).save(folder / "6.png")
    return find_images(folder)


STRICT = Filters(min_side=32, min_mean=20.0, near=6)


def test_filtered_images_are_not_asked_about_but_counted_and_listed(pictures, tmp_path):
    writer = Writer()
    counts = run(pictures, writer, tmp_path, filters=STRICT)
    assert len(writer.asked) == counts["asked"] == 2
    filtered = {k.removeprefix("filtered_"): v for k, v in counts.items() if k.startswith("filtered")}
    assert (filtered, counts["repeated_images"]) == ({"tiny": 1, "dark": 1, "duplicate": 2}, 1)
    lines = [json.loads(line) for line in (tmp_path / "set.rejected.jsonl").read_text().splitlines()]
    assert [(line["file"], line["reason"], line.get("of")) for line in lines] == [
        ("1.png", "duplicate", "0.png"), ("2.png", "dark", None), ("3.png", "repeated", "0.png"),
        ("5.png", "tiny", None), ("6.png", "duplicate", "4.png"),
    ]  # fmt: skip
    assert 0 < lines[1]["value"] < 20 and lines[3]["value"] == 30
    card = json.loads((tmp_path / "set.card.json").read_text())
    assert card["filters"] == vars(STRICT) and card["counts"]["filtered_duplicate"] == 2


def test_images_are_shrunk_for_annotator_and_records_alike(pictures, tmp_path):
    writer = Writer()
    run(pictures, writer, tmp_path, max_side=30)
    assert {shape for shape, _ in writer.asked} == {(20, 30, 3), (15, 30, 3)}
    assert {decode_png(r.image_png).shape for r in RecordReader(tmp_path, "set")} == {(20, 30, 3), (15, 30, 3)}
    again = Writer()
    run(pictures, again, tmp_path, max_side=45)  # another picture, so another question
    assert len(again.asked) == len(writer.asked)


def test_sources_keep_what_is_said_about_them(images, tmp_path):
    rows = [{"image": p.name, "license": f"L{i % 2}", "id": i, "annotator": "me"} for i, p in enumerate(images)]
    path = images[0].parent / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(find_images(path), Writer(), tmp_path, licence="none")
    first = RecordReader(tmp_path, "set")[0].source
    assert first == {"id": "0", "licence": "L0", "annotator": "writer-1", "file": "1.png"}
    assert json.loads((tmp_path / "set.card.json").read_text())["licences"] == {"L0": 3, "L1": 2}


# ---- Parts on several machines


def test_parts_make_the_set_that_one_machine_makes(pictures, tmp_path):
    options = dict(filters=STRICT, licence="CC0")
    whole = run(pictures, Writer(), tmp_path / "one", **options)
    for order in ((0, 1, 2), (2, 0, 1)):
        out, writer, total = tmp_path / f"parts{order[0]}", Writer(), collections.Counter()
        for left, only in zip((2, 1, 0), order, strict=True):
            counts = run(pictures, writer, out, shards=3, only=only, **options)
            assert counts["shards_missing"] == left
            assert (out / "set.json").exists() == (out / "set.card.json").exists() == (left == 0)
            total.update(counts)
        assert len(writer.asked) == 2 and {k: total[k] for k in whole} == whole
        assert list(RecordReader(out, "set")) == list(RecordReader(tmp_path / "one", "set"))
        for name in ("set.card.json", "set.rejected.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    again = Writer()
    run(pictures, again, out, **options)  # now on one machine
    run(pictures, again, out, shards=2, only=0, **options)
    assert again.asked == []


def test_part_that_does_not_exist_is_refused(images, tmp_path):
    with pytest.raises(RecordError, match="no shard 2 among 2"):
        run(images, Writer(), tmp_path, shards=2, only=2)


def test_parts_of_other_settings_are_not_put_together(images, tmp_path):
    run(images, Writer(), tmp_path, shards=2, only=0)
    counts = run(images, Writer(), tmp_path, shards=2, only=1, licence="CC0")
    assert counts["shards_missing"] == 1 and not (tmp_path / "set.json").exists()
