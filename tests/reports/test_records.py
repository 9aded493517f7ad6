"""The verb `inspect`: what it shows, that it shows texts harmlessly, and which calls it refuses."""

import html.parser
import json

import numpy as np
import pytest

from world_distill import cli
from world_distill.data.images.png import encode_png
from world_distill.data.records.reader import AnnotatedRecord, EncodedRecord, RecordReader, write_records
from world_distill.reports import records

EVIL = "<script>alert('x')</script>\x1b[2J\"><img src=x onerror=alert(1)> &amp; ü"


def image(i):
    return encode_png(np.full((40, 400, 3), 20 * i, np.uint8))


@pytest.fixture
def folder(tmp_path):
    def make(i):
        return AnnotatedRecord(
            f"r{i}", f"i{i // 2}", image(i // 2), f"[fox {i}]: Take the {'cup' if i % 2 else 'hat'}.",
            EVIL if i == 3 else "It goes.\nThen stops.", f"fox {i}", EVIL if i == 3 else "take", {EVIL: EVIL},
        )  # fmt: skip

    write_records(tmp_path, "train_annotated", [make(i) for i in range(8)])
    latent, text = np.zeros((1, 2, 3, 4), np.float32), np.zeros((5, 6), np.float32)
    fields = dict(task="[fox]: Go.", solution="It goes.", agent="fox", kind=EVIL, scene={"video": latent})
    pictures = (image(1), b"", b"damaged")
    records = [
        EncodedRecord(
            f"e{i}", f"i{i}", image_png=p, task_states={"text": text}, solution_states={"text": text[:4]}, **fields
        )
        for i, p in enumerate(pictures)
    ]
    write_records(tmp_path, "train", records)
    return tmp_path


def inspect(capsys, folder, *flags):
    assert cli.main(["inspect", "--records", str(folder), "--json", str(folder / "f.json"), *flags]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    return out.splitlines(), json.loads((folder / "f.json").read_text())


def test_table_and_counts(capsys, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines, figures = inspect(capsys, folder, "--limit", "4")
    assert lines[0] == "train_annotated: 8 AnnotatedRecords about 4 images, 8 agents; 8 match"
    assert lines[1] == "on the disk: 131 kB, 16.4 kB a record"
    assert lines[2].startswith("kinds: take 7, <script>")
    assert lines[3].split() == ["id", "kind", "task", "solution"] and len(lines) == 8
    assert lines[4].split()[:2] == ["r0", "take"] and lines[4].endswith("It goes. Then stops.")
    assert lines[7].endswith("…") and max(map(len, lines[3:])) <= 100
    assert (figures["records"], figures["images"], figures["matching"]) == (8, 4, 8) and figures["kinds"]["take"] == 7


def test_choice_of_records(capsys, folder):
    lines, figures = inspect(capsys, folder, "--task", "CUP|nothing", "--limit", "0")
    assert figures["matching"] == 4 and [line.split()[0] for line in lines[4:]] == ["r1", "r3", "r5", "r7"]
    first, again, other = (
        inspect(capsys, folder, "--random", "--limit", "3", "--seed", s)[0][4:] for s in ("1", "1", "2")
    )
    assert first == again != other and len(first) == 3 and first == sorted(first)


def test_wide_characters_take_two_columns_and_accents_none():
    def columns(text):
        wide = sum("\u3000" <= c <= "\uffee" for c in text)
        return len(text) + wide - text.count("\u0301")

    for text in ("狐狸拿起杯子然后放下" * 9, "e\u0301" * 90, "short", "杯", "a杯" * 10):
        assert columns(records._cell(text, 20)) == 20
    assert records._cell("杯" * 10, 20) == "杯" * 10 and records._cell("杯" * 11, 20) == "杯" * 9 + "… "


def test_only_the_records_that_are_shown_are_read(capsys, folder, monkeypatch):
    read = []
    real = RecordReader._stored
    monkeypatch.setattr(RecordReader, "_stored", lambda self, shard, row: read.append(row) or real(self, shard, row))
    inspect(capsys, folder, "--limit", "2", "--task", "hat")
    assert read == [0, 2]


class Page(html.parser.HTMLParser):
    """Collects tags, what pictures show, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.handlers, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key == "src"]
        self.handlers += [key for key, _ in attributes if key.startswith("on")]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name, pictures", [("train_annotated", 4), ("train", 1)])
def test_page_holds_pictures_and_nothing_that_runs(capsys, folder, name, pictures):
    inspect(capsys, folder, "--name", name, "--html", str(folder / "page.html"))
    page = Page((folder / "page.html").read_text())
    assert page.tags.count("script") == 1 and page.handlers == []  # the page's own
    assert len(page.sources) == page.tags.count("img") == pictures
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert EVIL.replace("\x1b", "") in page.text
    if name == "train":
        assert "scene video 1x2x3x4, text: 5 and 4 tokens" in page.text
        assert "no picture" in page.text and "the picture is damaged" in page.text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task", "("], "--task (: not a regular expression"),
        (["--limit=-1"], "--limit is at least 0"),
        (["--name", "other"], "other.json: no readable index"),
    ],
)
def test_wrong_calls(capsys, folder, flags, message):
    assert cli.main(["inspect", "--records", str(folder), *flags]) == 2
    assert message in capsys.readouterr().err
