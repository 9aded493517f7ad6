"""The verbs `encode` and `annotate`: shards, what they say about them, and which calls they refuse."""

import dataclasses
import json
import tarfile

import numpy as np
import pytest

from world_distill import cli
from world_distill.cli.encode import share_out
from world_distill.data.images.png import encode_png
from world_distill.data.records.reader import AnnotatedRecord, EncodedRecord, RecordReader, write_records
from world_distill.errors import UserError
from world_distill.programs import prepare

COUNT = 6


@pytest.fixture
def folder(tmp_path):
    def make(i):
        image = np.random.default_rng(i // 2).integers(0, 256, (30, 30, 3), np.uint8)
        return AnnotatedRecord(f"r{i}", f"i{i // 2}", encode_png(image), f"task {i}", "It goes.", "a", "k", {})

    write_records(tmp_path, "train_annotated", [make(i) for i in range(COUNT)])
    return tmp_path


def encode(capsys, folder, *flags):
    """What the verb says, and its figures."""
    figures = folder / "figures.json"
    code = cli.main(["encode", "--records", str(folder), "--json", str(figures), "--batch", "2", *flags])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")  # no progress bar off a terminal
    return out.strip(), json.loads(figures.read_text())


def refusal(capsys, folder, *flags):
    assert cli.main(["encode", "--records", str(folder), *flags]) == 2
    return capsys.readouterr().err.strip()


def test_encode_and_again(capsys, folder):
    said, counts = encode(capsys, folder, "--shards", "2")
    first, second, third, last = said.splitlines()
    assert first.startswith("train: about 344 kB for 3 images and 6 records (scenes 130 kB, pictures 8.39 kB, texts 6")
    assert second == f"encoded 6 records; {folder}/train is complete with 6 records"
    assert third == "wrote 328 kB, 54.6 kB a record (estimate: 57.3 kB)"
    assert last.startswith("next: world-distill train ")
    assert counts.pop("estimated_bytes") == pytest.approx(327680, rel=0.1)
    assert counts == {
        "records": 6, "encoded": 6, "left_out": 0, "bytes": 327680, "negative": 1,
        "shards": 2, "shards_kept": 0, "shards_missing": 0,
    }  # fmt: skip
    reader = RecordReader(folder, "train", EncodedRecord)
    assert reader.metadata == {
        "family": "tiny", "weights": "base_3.safetensors", "text_encoder": "words-64", "image_size": "as annotated",
        "scene": "5x5x432",
    }  # fmt: skip
    said, counts = encode(capsys, folder, "--shards", "2")
    assert (
        said.startswith(f"{folder}/train is complete with 6 records: nothing to do\nnext: ") and counts["encoded"] == 0
    )
    _, counts = encode(capsys, folder, "--shards", "2", "--config.model.text_width=32")
    assert counts["encoded"] == 6  # states of another encoder


def test_shards_by_several_machines(capsys, folder):
    encode(capsys, folder, "--shards", "3")
    whole = [record.to_bytes() for record in RecordReader(folder, "train")]
    for path in folder.glob("train-*"):
        path.unlink()
    for shard, left in ((2, 2), (0, 1)):
        said, _ = encode(capsys, folder, "--shard", f"{shard}/3")
        assert f"encoded 2 records; {left} of 3 shards of {folder}/train are still to be written" in said
        assert not prepare.is_complete(folder, "train")
    assert "is complete with 6" in encode(capsys, folder, "--shard", "1/3")[0]
    assert [record.to_bytes() for record in RecordReader(folder, "train")] == whole


def test_a_validation_and_a_test_set_are_split_off_by_image(capsys, folder):
    flags = ("--validation", "0.6", "--test", "0.1")
    said, counts = encode(capsys, folder, *flags)
    assert list(counts) == ["validation", "test", "train"] and "is complete" in said
    sets = {name: {r.image_id for r in RecordReader(folder, name, EncodedRecord)} for name in counts}
    assert sets == {name: {f"i{image}"} for name, image in SPLIT.items()}
    assert all((folder / f"{name}.negative").exists() for name in sets)
    _, again = encode(capsys, folder, *flags)
    assert [(of_set["encoded"], of_set["records"]) for of_set in again.values()] == [(0, 2)] * 3
    assert (
        f"{folder}/test was split off from train_annotated with `--validation 0.6 --test 0.1`: without that, train"
        in refusal(capsys, folder, "--validation", "0.6")
    )
    assert "none of 3 images falls into validation at a share of 0.001: give --validation 0.5329" in refusal(
        capsys, folder, "--validation", "0.001", "--test", "0.1"
    )


SPLIT = {"validation": 2, "test": 1, "train": 0}  # by the hash of each name


def test_texts_that_are_too_long_for_the_config_are_left_out(capsys, folder):
    records = list(RecordReader(folder, "train_annotated"))
    records = [dataclasses.replace(r, task="go" if i % 2 else r.task, solution="It.") for i, r in enumerate(records)]
    write_records(folder, "train_annotated", records)
    said, counts = encode(capsys, folder, "--config.text_length=1")  # words
    assert counts["left_out"] == 3 and f"left out 3 records: {folder}/train.left_out.jsonl says which and why" in said
    assert RecordReader(folder, "train").longest_texts["text"]["length"] == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--validation", "1"], "a share of 1 for validation: it is from 0 to below 1"),
        (["--validation", "0.5", "--test", "0.5"], "shares of 0.5 and 0.5 leave nothing to train on"),
        (["--shard", "4/4"], "--shard 4/4: shards are counted from 0, so N = 4 has 0/4 to 3/4"),
        (["--shard", "0/0"], "--shard 0/0: shards are counted from 0, so N = 0 has none"),
        (["--shard", "2"], "--shard 2: give I/N, such as 0/4 for the first of four"),
        (["--shard=-1/4"], "--shard -1/4: give I/N, such as 0/4 for the first of four"),
        (["--shards", "0"], "--shards and --batch are at least 1"),
        (["--batch", "0"], "--shards and --batch are at least 1"),
    ],
)
def test_wrong_calls(capsys, folder, flags, message):
    assert refusal(capsys, folder, *flags) == f"error: {message}"


def test_shard_and_shards_exclude_each_other(capsys, folder):
    with pytest.raises(SystemExit):
        cli.main(["encode", "--records", str(folder), "--shards", "2", "--shard", "0/2"])
    assert "not allowed with" in capsys.readouterr().err


def test_the_processes_of_a_job_share_the_shards_out():
    assert share_out(None, None, 0, 1) == (None, 1) and share_out("1/3", None, 0, 1) == ([1], 3)
    taken = [share_out(None, 5, process, 2) for process in range(2)]
    assert [list(only) for only, _ in taken] == [[0, 2, 4], [1, 3]] and {shards for _, shards in taken} == {5}
    assert share_out(None, None, 1, 3) == (range(1, 3, 3), 3)
    with pytest.raises(UserError, match="--shards 1 for 2 processes: give at least --shards 2"):
        share_out(None, 1, 0, 2)
    with pytest.raises(UserError, match="process 1 of a job of 2, .* give --shards 4 instead"):
        share_out("0/4", None, 1, 2)


# ---- annotate


def annotate(capsys, folder, *flags):
    """The verb's figures."""
    figures = folder / "annotate.json"
    assert cli.main(["annotate", "--out", str(folder), "--name", "own", "--json", str(figures), *flags]) == 0
    out, err = capsys.readouterr()
    counts = json.loads(figures.read_text())
    assert "/s]" not in err and out.startswith("".join(f"{name}: {count}\n" for name, count in counts.items()))
    assert f"next: world-distill encode --config sandbox --records {folder} --name own" in out
    return counts


@pytest.fixture
def scenes(tmp_path, capsys):
    assert cli.main(["scenes", "--out", str(tmp_path / "scenes"), "--count", "4"]) == 0
    capsys.readouterr()
    return tmp_path / "scenes"


def test_annotate_an_archive_in_two_parts(capsys, scenes, tmp_path):
    with tarfile.open(tmp_path / "x-0.tar", "w") as tar:
        tar.add(scenes, "all")
    (tmp_path / "x-1.tar").write_bytes((tmp_path / "x-0.tar").read_bytes())
    flags = ["--images", f"{tmp_path}/x-{{0..1}}.tar", "--licence", "CC0"]
    first = annotate(capsys, tmp_path, *flags, "--shard", "0/2")
    second = annotate(capsys, tmp_path, *flags, "--shard", "1/2")
    assert (first["asked"], first["shards_missing"]) == (4, 1)
    assert (second["asked"], second["repeated_images"], second["shards_missing"]) == (0, 4, 0)
    reader = RecordReader(tmp_path, "own_annotated")
    assert len(reader) == first["kept"]
    assert reader[0].source["file"] == "x-0.tar/all/scene-00000.png" and reader[0].source["licence"] == "CC0"


def test_sandbox_keeps_all_images_and_flags_leave_some_out(capsys, scenes, tmp_path):
    (scenes / "broken.png").write_text("")
    assert cli.main(["annotate", "--images", str(scenes), "--out", str(tmp_path)]) == 2
    assert "broken.png: no picture, but an empty file (--skip-bad leaves" in capsys.readouterr().err
    counts = annotate(capsys, tmp_path, "--images", str(scenes), "--skip-bad")
    assert (counts["images"], counts["bad_images"], counts["asked"]) == (5, 1, 4)
    assert (
        cli.main(["annotate", "--images", str(scenes), "--out", str(tmp_path), "--skip-bad", "--min-side", "31"]) == 2
    )
    assert "filtered_tiny 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--images", "nowhere.tar"], "nowhere.tar: no such file or folder"),
        (["--images", "nowhere*.tar"], "--images nowhere*.tar: no images there"),
        (["--images", ".", "--max-side=-1"], "--min-side and --max-side are at least 0"),
        (["--images", ".", "--max-failures", "2"], "--max-failures is from 0 to 1"),
        (["--images", ".", "--shard", "3/3"], "shards are counted from 0"),
    ],
)
def test_wrong_calls_of_annotate(capsys, tmp_path, flags, message):
    assert cli.main(["annotate", "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
