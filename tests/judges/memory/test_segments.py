"""Judgment caches of several hosts, brought together through a folder or a bucket."""

import gzip
import json
import math
import pathlib
import subprocess
import sys

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.effort import FUZZ
from world_distill.judges.memory import segments
from world_distill.judges.memory.cache import CacheError, JudgmentCache
from world_distill.judges.memory.entries import About, Entry, flat, from_line, to_line
from world_distill.judges.memory.segments import SyncedCache, list_segments, read_segment, write_segment

REGISTRY = sys.modules["fsspec.registry"]  # `fsspec.registry` is something else
ROOT = pathlib.Path(__file__).resolve().parents[3]


class Bucket(MemoryFileSystem):
    """What `gs://` is here: objects in memory."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]


@pytest.fixture(params=["folder", "gs"])
def address(request, tmp_path):
    if request.param == "folder":
        yield str(tmp_path / "shared")
        return
    fsspec.register_implementation("gs", Bucket, clobber=True)
    Bucket.store.clear()
    yield f"gs://bucket/{tmp_path.name}"
    REGISTRY._registry.pop("gs")


def opened(path, address, **kwargs):
    return SyncedCache(path, address, wait=1.0, **{"sleep": lambda _: None} | kwargs)


def put(cache, first, count, value=1.0):
    keys = {f"k{i}": value + i for i in range(first, first + count)}
    about = {k: About("0" * 64, "task", f"Is {k} done? é", f"[a]: {k}.", "a", "r1", "v") for k in keys}
    return cache.put_many(keys, judge_name="j", about=about)


def content(cache):
    return {e.key: flat(e) for e in cache.entries()}


def test_hosts_get_each_others_judgments(tmp_path, address):
    one, two = opened(tmp_path / "1", address), opened(tmp_path / "2", address)
    put(one, 0, 5)
    put(two, 5, 5)
    for cache in (one, two, one):
        cache.sync()
    assert content(one) == content(two) and len(one) == 10
    assert len(list_segments(address)) == 2  # nobody sends on what came from others
    one.sync()
    assert len(list_segments(address)) == 2
    # A host that comes later, or lost its disk, has all of it from the start.
    assert content(opened(tmp_path / "3", address)) == content(one)


def test_first_answers_stay_and_conflicts_are_told(tmp_path, address, monkeypatch):
    said = []
    monkeypatch.setattr(segments.logging, "warning", lambda message, *args: said.append(message % args))
    one, two = opened(tmp_path / "1", address), opened(tmp_path / "2", address)
    put(one, 0, 3)
    put(two, 2, 3, value=9.0)
    for cache in (one, two, one):
        cache.sync()
    assert one.get_many(["k2"]) == {"k2": 3.0} and two.get_many(["k2"]) == {"k2": 11.0}
    assert len(one) == len(two) == 5 and len(said) == 2 and all("1 judgments of" in text for text in said)


def test_what_cannot_be_sent_is_kept_retried_and_sent_later(tmp_path, address, monkeypatch):
    said, waits = [], []
    monkeypatch.setattr(segments.logging, "warning", lambda message, *args: said.append(message % args))
    cache = opened(tmp_path / "1", address, sleep=waits.append)
    put(cache, 0, 4)
    with monkeypatch.context() as patch:
        broken = lambda *_, **__: (_ for _ in ()).throw(TimeoutError("no route"))  # noqa: E731
        patch.setattr(fsspec.core, "url_to_fs", broken)
        cache.sync()
        cache.close()
        assert waits == [1.0, 2.0, 4.0] * 2
        assert any("judgments cannot be sent to" in text and "safe in" in text for text in said)
        with pytest.raises(CacheError, match="cannot be read .TimeoutError: no route"):
            opened(tmp_path / "2", address)
    assert list_segments(address) == []
    again = opened(tmp_path / "1", address)  # what a killed run left is sent at the next start
    assert len(list_segments(address)) == 1 and len(again) == 4
    put(again, 4, 1)
    again.close()
    assert len(opened(tmp_path / "2", address)) == 5


def test_a_damaged_segment_is_left_out_until_it_is_whole(tmp_path, address, monkeypatch):
    said = []
    monkeypatch.setattr(segments.logging, "warning", lambda message, *args: said.append(message % args))
    put(opened(tmp_path / "1", address), 0, 1)
    with opened(tmp_path / "1", address):
        pass
    [name] = list_segments(address)
    files, folder = segments._folder(address)
    whole = files.cat_file(f"{folder}/{name}")
    files.pipe_file(f"{folder}/.{name}.aside", whole[:9])  # being written
    files.pipe_file(f"{folder}/{name}", whole[:-7])
    other = opened(tmp_path / "2", address)
    assert len(other) == 0 and "is left out: its content is not" in said[0]
    files.pipe_file(f"{folder}/{name}", whole)
    other.sync()
    assert len(other) == 1


def test_a_large_cache_goes_in_parts_and_the_same_entries_make_the_same_segment(tmp_path, address, monkeypatch):
    monkeypatch.setattr(segments, "_ENTRIES", 10)
    cache = opened(tmp_path / "1", address)
    put(cache, 0, 35)
    cache.sync()
    assert len(list_segments(address)) == 4 and len(opened(tmp_path / "2", address)) == 35
    first = list_segments(address)[0]
    entries = read_segment(address, first)
    assert write_segment(address, entries) == first and len(list_segments(address)) == 4
    assert write_segment(address, entries, host="../x y") != first and "..-" not in "".join(list_segments(address))


def test_another_address_gets_everything(tmp_path):
    with opened(tmp_path / "1", str(tmp_path / "a")) as cache:
        put(cache, 0, 3)
    with opened(tmp_path / "1", str(tmp_path / "b")):
        pass
    assert len(opened(tmp_path / "2", str(tmp_path / "b"))) == 3


@pytest.mark.parametrize("bad", ["gcs3://x/y", "s3://key:secret@host/x"])
def test_addresses_that_will_not_do(tmp_path, bad):
    with pytest.raises(CacheError) as caught:
        SyncedCache(tmp_path / "c", bad)
    assert "secret" not in str(caught.value) and bad.split(":")[0] in str(caught.value)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    absent = {"class": "no_such_library.Files", "err": "install no_such_library"}
    monkeypatch.setitem(REGISTRY.known_implementations, "far", absent)
    with pytest.raises(CacheError, match="far://bucket/x' cannot be read .ImportError: install no_such_library"):
        opened(tmp_path / "c", "far://bucket/x")


HOST = """
import sys
from world_distill.judges.memory.segments import SyncedCache
path, address, n = sys.argv[1:]
with SyncedCache(path, address) as cache:
    for i in range(20):
        cache.put_many({f"{n}-{i}": float(i), f"all-{i}": 1.0}, judge_name="j")
        if i % 5 == 4:
            cache.sync()
"""


def test_hosts_at_the_same_time(tmp_path):
    shared = tmp_path / "shared"
    hosts = [subprocess.Popen([sys.executable, "-c", HOST, str(tmp_path / n), str(shared), n], cwd=ROOT) for n in "abc"]
    assert [host.wait() for host in hosts] == [0] * 3
    assert len(opened(tmp_path / "all", str(shared))) == 80


# ---- Lines


texts = st.none() | st.text(max_size=20)
entries = st.builds(
    Entry,
    st.text(min_size=1, max_size=70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(min_size=1, max_size=20),
    st.floats(0, 1e12),
    st.builds(About, st.none() | st.binary(min_size=32, max_size=32).map(bytes.hex), *[texts] * 6),
)


@given(entries)
@settings(max_examples=100, deadline=None)
def test_a_line_is_exactly_its_entry(entry):
    line = to_line(entry)
    assert from_line(line) == entry and line.count("\n") == 0


GOOD = flat(Entry("k", 1.0, "j", 2.0, About(clip="0" * 64)))
BAD = [
    "", "[]", "null", "{", "[" * 100_000,
    *(
        json.dumps(GOOD | change)
        for change in (
            {"log_odds": math.nan}, {"log_odds": "1"}, {"log_odds": None}, {"log_odds": True}, {"log_odds": 10**400},
            {"key": ""}, {"key": 3}, {"judge": None}, {"clip": "xyz"}, {"task": ["a"]}, {"text": "\ud800"},
            {"created": math.inf},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_what_is_no_judgment_is_refused(line):
    with pytest.raises(ValueError):
        from_line(line)
    if line:
        with pytest.raises(ValueError, match="line 2: "):
            segments.read_lines(f"{json.dumps(GOOD)}\n{line}\n".encode())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return JudgmentCache(tmp_path_factory.mktemp("store") / "c")


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from(list(GOOD)), json_values), st.binary(max_size=5))
@settings(max_examples=200 * FUZZ, deadline=None)
def test_damaged_lines_are_refused_or_make_an_entry_that_can_be_stored(store, changes, noise):
    line = json.dumps(GOOD | changes).encode() + noise
    try:
        found = segments.read_lines(line)
    except ValueError:
        return
    added = store.add(found, source="s")
    assert added.new + added.known + len(added.conflicts) == len(found)


def test_a_segment_is_plain_gzip(tmp_path):
    put(opened(tmp_path / "1", str(tmp_path / "s")), 0, 1)
    opened(tmp_path / "1", str(tmp_path / "s")).close()
    [path] = (tmp_path / "s/segments").glob("*.jsonl.gz")
    assert json.loads(gzip.decompress(path.read_bytes()))["text"] == "Is k0 done? é"
