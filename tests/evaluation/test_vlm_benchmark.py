"""A benchmark that asks VLMs: verdicts, questions of its own, memory, frames, and judges beside each other."""

import numpy as np
import pytest

from world_distill import build
from world_distill.errors import UserError
from world_distill.evaluation import VlmBenchmark, WorldTasksBench
from world_distill.evaluation.vlm_benchmark import even_frames
from world_distill.interfaces import Cases, JudgeAnswer
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import load_rubric
from world_distill.settings.loading import load_config, override


class Planted:
    """Answers by a clip's level: `answers[level]`, an error where there is none. Stops after `most` questions."""

    def __init__(self, answers, name="planted", most=10**9):
        self.answers, self.name, self.most, self.asked = answers, name, most, []

    def ask_each(self, requests, done):
        for number, request in enumerate(requests):
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append((int(request.clip.flat[0]), request.question))
            value = self.answers.get(int(request.clip.flat[0]))
            done(number, JudgeAnswer(value, None if value is not None else "refused"))


def clips(*levels, frames=5, size=8):
    return np.stack([np.full((frames, size, size, 3), level, np.uint8) for level in levels])


def cases(count):
    names = [f"r{i}" for i in range(count)]
    return Cases(names, [f"[cat]: Do {i}." for i in range(count)], ["cat"] * count, [b""] * count)


def test_a_verdict_is_the_sign_of_the_log_odds():
    judge = Planted({1: 0.1, 2: -3.0, 3: 0.0, 4: np.inf})
    benchmark = VlmBenchmark(judge)
    found = benchmark.check(clips(1, 2, 3, 4, 5), cases(5))
    assert benchmark.questions == ("task", "agent", "consistency")
    for question in benchmark.questions:
        np.testing.assert_array_equal(found[question], [1, 0, 0, np.nan, np.nan])
        np.testing.assert_array_equal(found[f"main/{question}"], [0.1, -3.0, 0.0, np.nan, np.nan])
    assert found.keys() == {*benchmark.questions, *benchmark.details}
    texts = {text for level, text in judge.asked if level == 2}
    assert len(texts) == 3 and sum("[cat]: Do 1." in text for text in texts) == 2  # consistency is not told the task


def test_the_questions_are_its_own_files(tmp_path):
    names = {"b": "Is {task} done?", "task": "Really {task}?", "a": "Is {agent} there? {length}"}
    for name, text in names.items():
        (tmp_path / f"{name}.txt").write_text(text)
    benchmark = VlmBenchmark(Planted({1: 1.0}), rubric=str(tmp_path))
    assert benchmark.questions == ("task", "a", "b") and benchmark.details[0] == "main/task"
    benchmark.begin(None, 2.0)
    benchmark.check(clips(1), cases(1))
    assert (1, "Is cat there? The video has 5 frames, 2 a second, and lasts 2.5 seconds.") in benchmark.judges[
        "main"
    ].asked
    assert VlmBenchmark(Planted({}), rubric=str(tmp_path), questions=("b",)).questions == ("b",)
    with pytest.raises(UserError, match="no question 'c'"):
        VlmBenchmark(Planted({}), rubric=str(tmp_path), questions=("c",))
    (tmp_path / "b.txt").write_text("Is {task} done now?")
    assert VlmBenchmark(Planted({}), rubric=str(tmp_path)).name != benchmark.name
    own, reward = load_rubric(VlmBenchmark.rubric), load_rubric()
    assert own.names == reward.names and not set(own.questions.values()) & set(reward.questions.values())


def test_nothing_is_asked_twice(tmp_path):
    with JudgmentCache(tmp_path / "c") as cache:
        judge = Planted({1: 1.0, 2: -1.0}, most=4)
        benchmark = VlmBenchmark(judge)
        benchmark.begin(cache, 8.0)
        with pytest.raises(KeyboardInterrupt):
            benchmark.check(clips(1, 2), cases(2))
        judge.most = 10**9
        benchmark.check(clips(1, 2), cases(2))
        assert len(judge.asked) == len(set(judge.asked)) == 6
        benchmark.check(clips(1, 2), cases(2))
        assert len(judge.asked) == 6
        assert {(e.about.record, e.about.task) for e in cache.entries()} == {
            ("r0", "[cat]: Do 0."),
            ("r1", "[cat]: Do 1."),
        }
        edited = VlmBenchmark(judge, rubric="1")  # other words are other questions
        edited.begin(cache, 8.0)
        edited.check(clips(1), cases(1))
        assert len(judge.asked) == 9


def test_judges_beside_the_first_answer_and_do_not_decide():
    benchmark = VlmBenchmark(Planted({1: 1.0, 2: 2.0}), beside={"other": {"judge": Planted({1: -1.0}, name="second")}})
    found = benchmark.check(clips(1, 2), cases(2))
    np.testing.assert_array_equal(found["task"], [1, 1])
    np.testing.assert_array_equal(found["other/task"], [-1, np.nan])
    assert benchmark.describe()["judges"] == {"main": "planted", "other": "second"}
    with pytest.raises(UserError, match="beside.other is the judge 'main' again"):
        VlmBenchmark(Planted({}), beside={"other": {}})
    with pytest.raises(UserError, match="cannot be called 'main'"):
        VlmBenchmark(Planted({}), beside={"main": {"judge": Planted({}, name="x")}})


def test_frames_are_spread_evenly_padded_and_shrunk():
    assert even_frames(5, 5) == [0, 1, 2, 3, 4] and even_frames(9, 3) == [0, 4, 8] and even_frames(97, 49)[1] == 2
    assert even_frames(3, 6) == [0, 1, 2, 2, 2, 2]  # the last one, and not the first again
    benchmark = VlmBenchmark(Planted({}), even_frames=4, scale=0.3)
    shown = benchmark.shown(
        np.arange(7, dtype=np.uint8)[None, :, None, None, None] * np.ones((2, 7, 20, 30, 3), np.uint8)
    )
    assert shown.shape == (2, 4, 6, 9, 3) and shown[1, :, 0, 0, 0].tolist() == [0, 2, 4, 6]
    server = VlmBenchmark(model="m", even_frames=49)
    assert "49x448" in server.judges["main"].name and "frames" not in Planted({}).name
    with pytest.raises(UserError, match="scale"):
        VlmBenchmark(Planted({}), scale=0)


# ---- In a config


def test_another_benchmark_is_named_by_flags_alone():
    config = load_config("sandbox")
    flags = {
        "benchmark.factory": "world_distill.evaluation:WorldTasksBench", "benchmark.options.model": "Some/VLM",
        "benchmark.options.servers": "http://a/v1,http://b/v1", "benchmark.options.timeout": "0.5",
        "benchmark.options.beside.gemma.model": "Other/VLM", "benchmark.options.even_frames": "8",
    }  # fmt: skip
    build.make_room(config, flags)
    override(config, flags)
    assert "world" not in config.benchmark.options and config.benchmark.options.servers == (
        "http://a/v1",
        "http://b/v1",
    )
    benchmark = build.make(config, "benchmark")
    assert isinstance(benchmark, WorldTasksBench)
    assert [judge.name.split()[1:3] for judge in benchmark.judges.values()] == [
        ["Some/VLM", "8x448"],
        ["Other/VLM", "8x448"],
    ]
    assert benchmark.judges["main"]._pool.limits.timeout == benchmark.judges["gemma"]._pool.limits.timeout == 0.5


def test_an_option_that_no_part_takes_is_refused():
    config = load_config("wan22_5b")
    flags = {"benchmark.options.modle": "x"}
    build.make_room(config, flags)
    with pytest.raises(UserError, match="did you mean 'benchmark.options.model'"):
        override(config, flags)


def test_another_judge_behind_the_benchmark_brings_its_own_options():
    config = load_config("wan22_5b")
    flags = {
        "benchmark.factory": "world_distill.evaluation:VlmBenchmark", "benchmark.options.device": "cpu",
        "benchmark.options.judge": "world_distill.judges:LocalJudge",
    }  # fmt: skip
    build.make_room(config, flags)
    override(config, flags)
    assert config.benchmark.options.device == "cpu" and "servers" not in config.benchmark.options


def test_other_sections_take_options_in_the_same_way():
    config = load_config("sandbox")
    flags = {"held_out.factory": "world_distill.judges:ServerJudge", "held_out.options.model": "Other/VLM"}
    build.make_room(config, flags)
    override(config, flags)
    assert build.make(config, "held_out").name.startswith("server-2 Other/VLM 16x448")
    prepared = load_config("wan22_5b")
    build.make_room(prepared, flags)
    override(prepared, flags)
    assert prepared.held_out.options.servers == prepared.judge.options.servers  # what was prepared stays
