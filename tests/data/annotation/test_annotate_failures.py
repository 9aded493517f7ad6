"""Threads, answers that fail, and servers that are away: what was answered is kept."""

import asyncio
import json
import os
import threading
import time
import types

import pytest

from tests.data.annotation.writing import Writer, five_images, image_file, run
from world_distill.data.annotation import asking
from world_distill.data.records.reader import RecordError
from world_distill.errors import Unreachable
from world_distill.interfaces import AnnotationError
from world_distill.vlm.client import Client, Limits


@pytest.fixture
def images(tmp_path):
    return five_images(tmp_path)


class Threads(Writer):
    """Answers only once all its threads have a question."""

    concurrency = 3

    def __init__(self, fail=(), **options):
        super().__init__(**options)
        self.barrier, self.fail = threading.Barrier(self.concurrency), set(fail)

    def annotate(self, image, **keywords):
        self.barrier.wait(timeout=20)
        if int(image.mean()) in self.fail:
            raise AnnotationError("no JSON in the answer")
        return super().annotate(image, **keywords)


def test_threads_change_nothing_in_the_files(images, tmp_path):
    images = [*images, image_file(images[0].parent, "6.png", value=60)]
    seen = []
    counts = run(images, Threads(), tmp_path / "a", progress=lambda *a: seen.append(a))
    assert counts == run(images, Writer(), tmp_path / "b") and seen == [(i, 6) for i in range(1, 7)]
    for name in os.listdir(tmp_path / "a"):
        if not name.endswith("journal.jsonl"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class Failing(Writer):
    def __init__(self, *values):
        super().__init__()
        self.values = values

    def annotate(self, image, **keywords):
        pairs = super().annotate(image, **keywords)
        if int(image.mean()) in self.values:
            raise AnnotationError("no JSON in the answer")
        return pairs


def test_failed_images_are_left_out_and_asked_again(images, tmp_path):
    counts = run(images, Failing(20, 40), tmp_path, max_failures=0.5)
    assert (counts["asked"], counts["failed"], counts["kept"]) == (3, 2, 6)
    lines = [json.loads(line) for line in (tmp_path / "set.rejected.jsonl").read_text().splitlines()]
    assert lines == [{"file": f"{i}.png", "reason": "failed", "value": "no JSON in the answer"} for i in (2, 4)]
    assert json.loads((tmp_path / "set.card.json").read_text())["counts"]["asked"] == 5
    again = Writer()
    assert run(images, again, tmp_path)["kept"] == 10 and len(again.asked) == 2
    run(images, Writer(), tmp_path / "alone")
    for name in ("set.card.json", "set.rejected.jsonl", "set.json", "set-00000-of-00001.arrayrecord"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_too_many_failures_stop_the_job_and_keep_the_answers(images, tmp_path):
    with pytest.raises(RecordError, match=r"failed on 2 of 5 images, more than the share of 0.3.*no JSON in"):
        run(images, Failing(20, 40), tmp_path, max_failures=0.3)
    assert not (tmp_path / "set.json").exists()
    many = [image_file(images[0].parent, f"x{i}.png", value=i) for i in range(100, 160)]
    failing = Failing(*range(100, 160))
    with pytest.raises(RecordError, match="more than the share of 0.2"):
        run([*images, *many], failing, tmp_path, max_failures=0.2)
    assert len(failing.asked) < 15  # long before the end
    first = Writer()
    with pytest.raises(RecordError, match="failed on 1 of"):
        run(images, Failing(20), tmp_path / "b", max_failures=0.0)
    assert run(images, first, tmp_path)["remembered"] == 5


class Away(Writer):
    """An annotator whose server answers after some looks at it."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def check(self):
        self.looks -= 1
        if self.looks > 0:
            raise Unreachable("no annotator server: cannot be reached: nobody at :9")
        return ["there"]


def test_a_server_that_is_not_there_is_said_within_a_minute(images, tmp_path, monkeypatch):
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(asking, "time", clock)
    with pytest.raises(Unreachable, match="no annotator server"):
        run(images, Away(10**6), tmp_path)
    assert 55 <= now[0] <= 70
    late = Away(5)
    assert run(images, late, tmp_path)["kept"] == 10 and late.looks == 0  # waited for, and looked at once
    again = Away(10**6)
    assert run(images, again, tmp_path)["remembered"] == 5  # nothing to ask, so nobody is looked for


def test_an_address_that_keeps_silent_is_given_up_soon():
    pytest.importorskip("openai")
    limits = Limits(1, 0, timeout=300, give_up_after=1800, tries=1, backoff=1, backoff_limit=1, tokens_per_minute=0)

    async def timeout():
        client = Client(["http://localhost:9/v1"], None, limits)
        async with client.session():
            (server,) = client.servers
            return client._clients[server].timeout

    found = asyncio.run(timeout())
    assert (found.connect, found.read) == (20, 300)


def test_no_answer_under_way_is_lost_when_one_thread_stops(images, tmp_path):
    class Stopping(Threads):
        def annotate(self, image, **keywords):
            pairs = super().annotate(image, **keywords)
            if int(image.mean()) == 10:
                raise ConnectionError("the server is gone")
            time.sleep(0.2)
            return pairs

    with pytest.raises(ConnectionError):
        run(images, Stopping(), tmp_path)
    writer = Writer()
    assert run(images, writer, tmp_path)["remembered"] == 2 and len(writer.asked) == 3
