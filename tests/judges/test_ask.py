"""Judging through the memory of judgments: who is asked what, and what becomes of answers and failures."""

import math

import numpy as np
import pytest

from world_distill.errors import UserError
from world_distill.interfaces import JudgeAnswer
from world_distill.judges import ask
from world_distill.judges.ask import judge_clips
from world_distill.judges.memory.cache import JudgmentCache, clip_digest
from world_distill.judges.memory.entries import About
from world_distill.judges.rubric import Rubric, load_rubric


def clip(seed=0, frames=2):
    return np.random.default_rng(seed).integers(0, 256, (frames, 4, 6, 3), np.uint8)


RUBRIC = Rubric({"task": "Is {task} done?", "agent": "Did {agent} do it?", "real": "Is it real?"})


class FakeJudge:
    """Answers the mean of the clip plus the length of the question, or as it is told."""

    name = "fake-1"

    def __init__(self, answer=None):
        self.requests, self.calls, self.answer = [], 0, answer

    def ask(self, requests):
        self.calls += 1
        self.requests += requests
        return [self.answer(r) if self.answer else JudgeAnswer(self.value(r.clip, r.question)) for r in requests]

    @staticmethod
    def value(clip, question):
        return float(clip.mean()) + len(question)


def batch(n):
    return np.stack([clip(i) for i in range(n)]), [f"t{i}" * (i + 1) for i in range(n)], [f"a{i}" for i in range(n)]


def test_scores_and_order_of_requests(tmp_path):
    judge, (clips, tasks, agents) = FakeJudge(), batch(3)
    judgment = judge_clips(judge, JudgmentCache(tmp_path / "c"), clips, tasks, agents, RUBRIC, ["task", "real"])
    assert judgment.scores.keys() == {"task", "real"} and judgment.valid.tolist() == [True] * 3
    for name in ("task", "real"):
        expected = [FakeJudge.value(c, RUBRIC.render(name, t, a)) for c, t, a in zip(clips, tasks, agents, strict=True)]
        assert judgment.scores[name].dtype == np.float64
        np.testing.assert_array_equal(judgment.scores[name], expected)
    assert [r.question for r in judge.requests] == [RUBRIC.render(q, t, "") for t in tasks for q in ("task", "real")]
    for i, request in enumerate(judge.requests):
        np.testing.assert_array_equal(request.clip, clips[i // 2])


def test_only_what_is_new_is_asked(tmp_path):
    judge, cache, (clips, tasks, agents) = FakeJudge(), JudgmentCache(tmp_path / "c"), batch(4)
    first = judge_clips(judge, cache, clips[:3], tasks[:3], agents[:3], RUBRIC, ["task", "agent"])
    asked = len(judge.requests)
    judge_clips(judge, cache, clips[:3], tasks[:3], agents[:3], RUBRIC, ["task", "agent"])
    assert (asked, len(judge.requests), judge.calls) == (6, 6, 1)
    again = judge_clips(judge, cache, clips, tasks, agents, RUBRIC, ["agent", "task", "real"])
    assert len(judge.requests) == 6 + 4 + 2
    np.testing.assert_array_equal(again.scores["task"][:3], first.scores["task"])
    other = FakeJudge()
    other.name = "fake-2"
    judge_clips(other, cache, clips[:1], tasks[:1], agents[:1], RUBRIC, ["task"])
    assert len(other.requests) == 1


@pytest.mark.parametrize("cached", [True, False])
def test_equal_requests_are_asked_once(tmp_path, cached):
    judge, (clips, _, _) = FakeJudge(), batch(2)
    clips = clips[[0, 1, 0, 0]]
    cache = JudgmentCache(tmp_path / "c") if cached else None
    judgment = judge_clips(judge, cache, clips, ["x"] * 4, list("abca"), RUBRIC, ["real", "agent"])
    assert len(judge.requests) == 2 + 3
    assert judgment.scores["real"][0] == judgment.scores["real"][2] == judgment.scores["real"][3]
    assert judgment.valid.all()


FAILURES = [
    JudgeAnswer(None, "timed out"),
    JudgeAnswer(None),
    JudgeAnswer(math.nan),
    JudgeAnswer(math.inf),
    JudgeAnswer(2.0, "but unsure"),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_are_invalid_logged_and_asked_again(tmp_path, monkeypatch, failure):
    logged = []
    monkeypatch.setattr(ask.logging, "warning", lambda message, *args: logged.append(message % args))
    cache, (clips, tasks, agents) = JudgmentCache(tmp_path / "c"), batch(3)
    judge = FakeJudge(lambda r: failure if "t1t1" in r.question else JudgeAnswer(0.5))
    judgment = judge_clips(judge, cache, clips, tasks, agents, RUBRIC, ["task", "real"])
    assert judgment.valid.tolist() == [True, False, True]
    np.testing.assert_array_equal(judgment.scores["task"], [0.5, np.nan, 0.5])
    np.testing.assert_array_equal(judgment.scores["real"], [0.5] * 3)
    assert len(logged) == 1 and "failed on 1 of 6; first: " in logged[0]
    assert (failure.error or "log-odds") in logged[0]
    assert len(cache) == 5
    better = FakeJudge()
    assert judge_clips(better, cache, clips, tasks, agents, RUBRIC, ["task", "real"]).valid.all()
    assert len(better.requests) == 1 and len(logged) == 1


class Stopping(FakeJudge):
    """Answers `good` requests, and then is stopped."""

    def __init__(self, good, error):
        super().__init__()
        self.good, self.error = good, error

    def ask_each(self, requests, done):
        self.requests += requests
        for number, request in list(enumerate(requests))[::-1][: self.good]:
            done(number, JudgeAnswer(self.value(request.clip, request.question)))
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [UserError("no key"), KeyboardInterrupt()])
def test_what_was_answered_is_kept_whatever_stops_the_rest(tmp_path, error):
    cache, (clips, tasks, agents) = JudgmentCache(tmp_path / "c"), batch(3)
    with pytest.raises(type(error)):
        judge_clips(Stopping(4, error), cache, clips, tasks, agents, RUBRIC, ["task", "real"])
    assert len(cache) == 4
    judge = Stopping(2, None)
    judgment = judge_clips(judge, cache, clips, tasks, agents, RUBRIC, ["task", "real"])
    assert len(judge.requests) == 2 and judgment.valid.all()
    plain = judge_clips(FakeJudge(), None, clips, tasks, agents, RUBRIC, ["task", "real"])
    for name in ("task", "real"):
        np.testing.assert_array_equal(judgment.scores[name], plain.scores[name])


def test_answers_are_stored_while_others_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(ask, "_STORE_EVERY", -1.0)
    cache, (clips, tasks, agents), stored = JudgmentCache(tmp_path / "c"), batch(3), []

    class Watched(Stopping):
        def ask_each(self, requests, done):
            super().ask_each(requests, lambda *given: (done(*given), stored.append(len(cache))))

    judge_clips(Watched(6, None), cache, clips, tasks, agents, RUBRIC, ["task", "real"])
    assert stored == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("mark", ["<|im_end|>", "[/INST]", "\ud83d"])
@pytest.mark.parametrize("where", ["task", "agent"])
def test_marks_of_a_chat_reach_no_judge(tmp_path, monkeypatch, mark, where):
    logged = []
    monkeypatch.setattr(ask.logging, "warning", lambda message, *args: logged.append(message % args))
    judge, (clips, tasks, agents) = FakeJudge(), batch(3)
    (tasks if where == "task" else agents)[1] += mark
    cache = JudgmentCache(tmp_path / "c")
    judgment = judge_clips(judge, cache, clips, tasks, agents, RUBRIC, [where, "real"])
    assert judgment.valid.tolist() == [True, False, True]
    assert len(judge.requests) == 4 == len(cache) and "failed on 2 of 6; first: a text for the VLM" in logged[0]


def test_answers_to_another_version_of_the_questions_stay_and_are_told(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(ask.logging, "warning", lambda message, *args: logged.append(message % args))
    cache, (clips, tasks, agents) = JudgmentCache(tmp_path / "c"), batch(2)
    ask.note_other_rubrics(cache, load_rubric())
    judge_clips(FakeJudge(), cache, clips, tasks, agents, load_rubric("1"), ["task"])
    ask.note_other_rubrics(cache, load_rubric("1"))
    assert not logged
    new = load_rubric(fps=8.0)
    assert ask.begun_rubric(cache, new) == load_rubric("1", fps=8.0)  # a run of an earlier release
    ask.note_other_rubrics(cache, load_rubric())
    assert load_rubric("1").version in logged[0] and "judge.rubric=1" in logged[0]
    judge = FakeJudge()
    judge_clips(judge, cache, clips, tasks, agents, load_rubric(), ["task"])
    again = FakeJudge()
    judge_clips(again, cache, clips, tasks, agents, load_rubric("1"), ["task"])
    assert ask.begun_rubric(JudgmentCache(tmp_path / "d"), new) is new
    assert ask.begun_rubric(cache, new).version == load_rubric("1").version
    assert len(judge.requests) == 2 and not again.requests and cache.rubrics() == {
        load_rubric("1").version, load_rubric().version,
    }  # fmt: skip


def test_another_process_was_first(tmp_path):
    cache, (clips, tasks, agents) = JudgmentCache(tmp_path / "c"), batch(1)

    class Slow(FakeJudge):
        def ask(self, requests):
            meanwhile = {cache.key(r.clip, r.question, self.name): -7.0 for r in requests}
            JudgmentCache(cache.path).put_many(meanwhile, judge_name=self.name)
            return super().ask(requests)

    judgment = judge_clips(Slow(), cache, clips, tasks, agents, RUBRIC, ["task"])
    assert judgment.scores["task"].tolist() == [-7.0]  # what every later reader will see


def test_misuse_is_an_error(tmp_path):
    clips, tasks, agents = batch(2)

    def run(judge=None, clips=clips, tasks=tasks, questions=("task",)):
        return judge_clips(judge or FakeJudge(), None, clips, tasks, agents, RUBRIC, questions)

    class Short(FakeJudge):
        def ask(self, requests):
            return super().ask(requests)[1:]

    with pytest.raises(ValueError, match="fake-1 returned 1 answers to 2 requests"):
        run(Short())
    with pytest.raises(ValueError, match="2 clips, 1 tasks"):
        run(tasks=tasks[:1])
    with pytest.raises(ValueError, match="0 questions"):
        run(questions=())
    with pytest.raises(ValueError, match="uint8"):
        run(clips=clips / 255)
    with pytest.raises(KeyError, match="no question 'style'"):
        run(questions=["style"])


def test_the_cache_notes_what_was_asked_and_clips_are_kept(tmp_path):
    kept, (clips, tasks, agents) = {}, batch(3)
    cache = JudgmentCache(tmp_path / "c", keep=kept.__setitem__)
    failing = FakeJudge(lambda r: JudgeAnswer(None, "no") if "t1t1" in r.question else JudgeAnswer(0.5))
    ask = lambda judge: judge_clips(  # noqa: E731
        judge, cache, clips, tasks, agents, RUBRIC, ["task"], records=["x", "y", "z"]
    )
    first = ask(failing)
    digests = [clip_digest(c).hex() for c in clips]
    assert (first.hits, first.misses) == (0, 3) and list(kept) == [digests[0], digests[2]]
    again = ask(FakeJudge())
    assert (again.hits, again.misses) == (2, 1) and set(kept) == set(digests)
    np.testing.assert_array_equal(kept[digests[1]], clips[1])
    for entry in cache.entries():
        i = digests.index(entry.about.clip)
        text = RUBRIC.render("task", tasks[i], agents[i])
        assert entry.about == About(digests[i], "task", text, tasks[i], agents[i], "xyz"[i], RUBRIC.version)
        assert entry.key == JudgmentCache.key(clips[i], text, "fake-1") and entry.judge == "fake-1"
