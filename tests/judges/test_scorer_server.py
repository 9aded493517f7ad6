"""Scorers behind HTTP: the protocol, and what a bad server can do to a clip or a run."""

import base64
import io
import os

import numpy as np
import pytest

from tests.judges.scorers import FakeScorer, pixels
from tests.judges.test_server import after_the_test, closed_port
from world_distill.errors import UserError
from world_distill.interfaces import JudgeRequest
from world_distill.judges import ScorerServerJudge
from world_distill.judges.ask import judge_clips
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import rubric_for

QUICK = {"backoff": 0.01, "backoff_limit": 0.05, "timeout": 5, "give_up_after": 5, "frames": 3, "quality": 0}


def judge_of(*servers, **options):
    return ScorerServerJudge(
        [getattr(s, "url", s) for s in servers], "reward@1", **QUICK | {"measures": ("VQ", "TA"), "batch": 2} | options
    )


def requests_about(count, task="task {}", seed=0):
    made = np.random.default_rng(seed).integers(0, 256, (count, 5, 4, 6, 3), np.uint8)
    return [JudgeRequest(clip, "", name, task.format("x" * i)) for i, clip in enumerate(made) for name in ("VQ", "TA")]


def expected(request):
    return float(request.clip[[0, 2, 4]].mean()) if request.name == "VQ" else float(len(request.task))


def assert_right(requests, answers):
    assert [a.error for a in answers] == [None] * len(requests)
    np.testing.assert_allclose([a.log_odds for a in answers], [expected(r) for r in requests], atol=1e-9)


def test_every_number_reaches_its_clip():
    requests = requests_about(5)
    with FakeScorer() as server:
        judge = judge_of(server)
        [line] = judge.check()
        assert "reward@1, VQ" in line and "TA 31" in line
        assert_right(requests, judge.ask(requests))
        assert sorted(len(body["items"]) for body in server.bodies) == [1, 1, 2, 2]  # the test, and batches
        item = server.bodies[1]["items"][0]
    assert server.bodies[1]["model"] == "reward@1"
    assert (item["count"], item["fps"], item["numbers"]) == (5, 24.0, [0, 2, 4])
    found = [r.clip for r in requests if r.task == item["task"]][0]
    for url, number in zip(item["frames"], item["numbers"], strict=True):
        assert url.startswith("data:image/png;base64,") and np.array_equal(pixels(url), found[number])
    assert judge.health() == {"answers": 10, "no_number": 0, "refused": 0, "retries": 0}


def test_a_clip_as_a_video():
    av = pytest.importorskip("av")
    clip = np.repeat(np.linspace(0, 255, 6).astype(np.uint8)[:, None, None, None], 32, axis=1)
    clip = np.ascontiguousarray(np.broadcast_to(clip[:, :, :1], (6, 32, 48, 3)))
    with FakeScorer() as server:
        judge_of(server, form="mp4", fps=12.0).ask([JudgeRequest(clip, "", "VQ", "t")])
        item = server.bodies[-1]["items"][0]
    assert item.keys() == {"task", "fps", "count", "video"} and (item["fps"], item["count"]) == (12.0, 6)
    with av.open(io.BytesIO(base64.b64decode(item["video"].removeprefix("data:video/mp4;base64,")))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == 12
    assert len(frames) == 6 and max(abs(f.mean() - c.mean()) for f, c in zip(frames, clip, strict=True)) < 4


@pytest.mark.parametrize("fault", [500, 503, 429, "busy", "reset", "cut", "truncated", "html", "short", "columns"])
def test_what_passes_is_tried_again(fault):
    requests = requests_about(3)
    with FakeScorer(fault=lambda number, body: fault if number == 2 else None) as server:
        judge = judge_of(server)
        assert_right(requests, judge.ask(requests))
    assert judge.health()["retries"] == 1


def test_a_time_out_is_tried_again():
    requests = requests_about(2)
    with FakeScorer(fault=lambda number, body: "hang" if number == 1 else None) as server:
        assert_right(requests, judge_of(server, timeout=0.3).ask(requests))


@pytest.mark.parametrize("fault, text", [
    ("nan", "no finite number"), ("null", "no finite number"), ("string", "no finite number: 'good'"),
    ("missing", "gave no VQ, but TA"),
])  # fmt: skip
def test_what_is_no_number_is_no_answer_and_is_not_asked_again(fault, text, tmp_path):
    requests = requests_about(2)
    with FakeScorer(fault=lambda number, body: fault if number else None) as server:
        judge = judge_of(server)
        answers = judge.ask(requests)
        assert server.chats == 2
    assert answers[0].log_odds is None and text in answers[0].error
    assert [a.log_odds for a in answers[1:]] == [expected(r) for r in requests[1:]]
    assert judge.health()["no_number"] == 1


@pytest.mark.parametrize("fault, text", [
    ("short", "1 scores for 2 clips"), ("columns", "no list of scores"), (500, "status 500"),
])  # fmt: skip
def test_a_server_that_always_fails_costs_the_answers_and_no_more(fault, text):
    requests = requests_about(2)
    with FakeScorer(fault=lambda number, body: fault if number else None) as server:
        answers = judge_of(server, tries=3).ask(requests)
        assert server.chats == 4
    assert all(a.log_odds is None and "gave up after 3 attempts" in a.error and text in a.error for a in answers)


def test_a_clip_that_is_refused_costs_itself_alone():
    requests = requests_about(4)
    rude = [r if i // 2 != 1 else JudgeRequest(r.clip, "", r.name, "rude") for i, r in enumerate(requests)]
    with FakeScorer() as server:
        judge = judge_of(server, batch=4)
        answers = judge.ask(rude)
    assert_right(rude[:2] + rude[4:], answers[:2] + answers[4:])
    assert all("too rude" in a.error for a in answers[2:4]) and judge.health()["refused"] == 1


def test_it_stops_where_all_is_refused():
    requests = requests_about(12, "rude {}")
    with FakeScorer() as server, pytest.raises(UserError, match="refused 8 different questions.*too rude"):
        judge_of(server, concurrency=1).ask(requests)


@pytest.mark.parametrize("options, fault, text", [
    ({"measures": ("VQ", "MQ")}, None, "gives VQ, TA, and no MQ: set the option measures"),
    ({}, "columns", "does not answer as world_distill/judges/README.md says: no list of scores"),
    ({}, 403, "scorer's server .* refused with status 403.*this API key may not be used here"),
    ({"servers": "{url}/elsewhere"}, None, "POST ADDRESS/score has to answer"),
])  # fmt: skip
def test_a_server_that_cannot_score_is_refused_in_words(options, fault, text):
    with FakeScorer(fault=lambda number, body: fault) as server:
        where = options.pop("servers", "{url}").format(url=server.url)
        for call in ("check", "ask"):
            judge = judge_of(where, **options)
            with pytest.raises(UserError, match=f"(?s){text}"):
                judge.check() if call == "check" else judge.ask(requests_about(1))


def test_nobody_is_there():
    judge = judge_of(f"http://127.0.0.1:{closed_port()}", give_up_after=0.3)
    with pytest.raises(ConnectionError, match="cannot be reached.*start the scorer's"):
        judge.check()
    [answer] = judge.ask(requests_about(1)[:1])
    assert answer.log_odds is None and "gave up" in answer.error


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("SCORER_KEY", "sk-very-secret")
    with FakeScorer(key="sk-very-secret") as server:
        judge = judge_of(server, api_key_env="SCORER_KEY")
        assert_right(requests_about(1), judge.ask(requests_about(1)))
    with FakeScorer(key="another") as server, pytest.raises(UserError, match="API key is missing") as caught:
        judge_of(server, api_key_env="SCORER_KEY").check()
    assert "sk-very-secret" not in str(caught.value) and "sk-very-secret" not in judge.name
    os.environ.pop("SCORER_KEY")
    with pytest.raises(UserError, match="environment variable SCORER_KEY: not set"):
        judge_of("http://host", api_key_env="SCORER_KEY")


@pytest.mark.parametrize("options, text", [
    ({"model": ""}, "needs its model"), ({"batch": 0}, "batch of at least 1"), ({"form": "gif"}, "frames or mp4"),
    ({"frames": 0}, "frames and max_side"), ({"fps": 0.0}, "above 0"), ({"timeout": 0}, "above 0 seconds"),
    ({"servers": "localhost"}, "written like"),
])  # fmt: skip
def test_values_out_of_range_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        ScorerServerJudge(**{"servers": "http://host", "model": "m"} | options)


def test_the_name_follows_what_changes_numbers_and_nothing_else():
    make = lambda **o: ScorerServerJudge(**{"servers": "http://host", "model": "m"} | o)  # noqa: E731
    base = make()
    same = [{"servers": "http://user:word@other:1"}, {"timeout": 1}, {"concurrency": 1}, {"batch": 1}]
    assert {make(**o).name for o in same} == {base.name}
    other = [{"model": "n"}, {"frames": 8}, {"max_side": 64}, {"quality": 0}, {"fps": 8.0}]
    assert len({base.name, *(make(**o).name for o in other)}) == 6


def test_the_cache_asks_nothing_twice(tmp_path):
    made = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 6, 3), np.uint8)
    with FakeScorer(fault=after_the_test("nan")) as server, JudgmentCache(tmp_path / "c") as cache:
        judge = judge_of(server, batch=1)
        ask = lambda: judge_clips(judge, cache, made, list("abc"), [""] * 3, rubric_for(judge), ["VQ", "TA"])  # noqa: E731
        first, chats = ask(), server.chats
        assert chats == 4 and first.valid.sum() == 2 and first.misses == 6
        again = ask()  # for the number that was missing
        assert server.chats == 5 and again.valid.all() and again.misses == 1
        ask()
        assert server.chats == 5
