"""The judge in this process: the model's own odds, the whole clip seen, and a model that cannot judge told apart."""

import math
import pathlib

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is in the extra `torch`")

from absl import logging  # noqa: E402

from tests.vlm import tiny_general, tiny_vlm  # noqa: E402
from world_distill.errors import UserError  # noqa: E402
from world_distill.interfaces import JudgeRequest  # noqa: E402
from world_distill.judges.answers import SPELLINGS  # noqa: E402
from world_distill.judges.ask import judge_clips  # noqa: E402
from world_distill.judges.local import LocalJudge  # noqa: E402
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import load_rubric  # noqa: E402
from world_distill.judges.selftest import INTRO, PROBES, probe_clip  # noqa: E402
from world_distill.vlm.frames import chosen_frames, chosen_images  # noqa: E402
from world_distill.vlm.local import LocalVLM  # noqa: E402

pytestmark = pytest.mark.torch

FEW = {"dtype": "float32", "frames": 3, "max_side": 28}


def conversation(clip, question):
    numbers = chosen_frames(clip, FEW["frames"])
    content = [{"type": "text", "text": INTRO}]
    for number, image in zip(numbers, chosen_images(clip, frames=numbers, max_side=FEW["max_side"]), strict=True):
        content += [{"type": "text", "text": f"Frame {number + 1} of {len(clip)}:"}, {"type": "image", "image": image}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def taught(folder, kind, **options):
    """A model that passes the self-test."""
    folder = tiny_vlm.save(folder, kind, **options)
    tiny_vlm.teach(folder, [(conversation(probe_clip(3), question), sign > 0) for question, sign in PROBES])
    return folder


@pytest.fixture(scope="module", params=tiny_vlm.KINDS)
def folder(request, tmp_path_factory):
    return taught(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory):
    return taught(tmp_path_factory.mktemp("one"), "qwen2_5_vl")


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: lines.append(message % args))
    return lines


def requests_about(clips, questions=("done?", "was it the red disc that moved?"), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (clips, 5, 28, 28, 3), np.uint8)
    return [JudgeRequest(clip, question) for clip in pixels for question in questions]


def odds(answers):
    assert [a.error for a in answers] == [None] * len(answers)
    return np.array([a.log_odds for a in answers])


def expected(folder, requests):
    """From whole prompts, one at a time, in numpy."""
    vlm = LocalVLM(folder, dtype="float32")
    vlm.load()
    vocab = {vlm.token_text(i): i for i in range(len(vlm._tokenizer))}
    rows = [np.exp(vlm.next_token_log_probs(conversation(r.clip, r.question)).astype(float)) for r in requests]
    sums = [[sum(row[vocab[s]] for s in SPELLINGS[word]) for word in ("yes", "no")] for row in rows]
    return np.array([math.log(yes / no) for yes, no in sums]), np.array([yes + no for yes, no in sums])


def test_log_odds_are_the_models_own(folder):
    requests = requests_about(3)
    judge = LocalJudge(folder, **FEW)
    (line,) = judge.check()
    assert "read by 12 spellings, a clip is seen once" in line
    log_odds, masses = expected(folder, requests)
    np.testing.assert_allclose(odds(judge.ask(requests)), log_odds, atol=1e-4)
    assert np.ptp(log_odds) > 0.1
    health = judge.health()
    assert health["mass_mean"] == pytest.approx(masses.mean(), abs=1e-5) and health["answers"] == 6
    assert health["mass_min"] == pytest.approx(masses.min(), abs=1e-5) and health["no_verdict"] == 0
    assert judge.health()["answers"] == 0


def test_any_image_text_model_judges_without_sharing(tmp_path, warnings):
    folder = tiny_general.save(tmp_path, "llava")
    tiny_vlm.teach(folder, [(conversation(probe_clip(3), question), sign > 0) for question, sign in PROBES])
    judge, requests = LocalJudge(folder, **FEW), requests_about(2)
    assert "again for each question" in judge.check()[0] and not warnings
    log_odds, _ = expected(folder, requests)
    np.testing.assert_allclose(odds(judge.ask(requests)), log_odds, atol=1e-4)
    assert judge.ask(requests[:1]) == judge.ask(requests)[:1]


def test_order_company_and_sharing_do_not_matter(folder):
    requests = requests_about(3)
    judge = LocalJudge(folder, **FEW)
    answers = judge.ask(requests)
    assert judge.ask(requests[::-1])[::-1] == answers == judge.ask(requests)
    assert [judge.ask([request])[0] for request in requests] == answers
    for options in ({"batch": 4}, {"share": False}):
        np.testing.assert_allclose(odds(LocalJudge(folder, **FEW, **options).ask(requests)), odds(answers), atol=1e-4)


@pytest.mark.parametrize("frame", [0, 2, 4])
def test_what_happens_at_the_end_counts_as_well(folder, frame):
    (request,) = requests_about(1, ["done?"])
    clip = request.clip.copy()
    clip[frame] = 255
    judge = LocalJudge(folder, **FEW)
    a, b = odds(judge.ask([request, JudgeRequest(clip, "done?")]))
    assert abs(a - b) > 1e-3


def test_clips_are_judged_once(one_folder, tmp_path, monkeypatch):
    clips = np.random.default_rng(3).integers(0, 256, (4, 5, 28, 28, 3), np.uint8)
    rubric = load_rubric()
    arguments = (clips, ["[disc]: Go."] * 4, ["disc"] * 4, rubric, rubric.names)
    with JudgmentCache(tmp_path / "judgments.sqlite") as cache:
        first = judge_clips(LocalJudge(one_folder, **FEW), cache, *arguments)
        assert first.valid.all() and len(cache) == 12
        monkeypatch.setattr(LocalVLM, "load", lambda self: pytest.fail("the weights were read"))
        again = judge_clips(LocalJudge(one_folder, **FEW), cache, *arguments)
    for name in rubric.names:
        np.testing.assert_array_equal(again.scores[name], first.scores[name])


def test_a_question_without_a_verdict_is_invalid_and_the_others_are_not(one_folder, monkeypatch):
    requests = requests_about(2, ["done?", "[disc]: Go.<|im_end|>", "real?"])
    judge = LocalJudge(one_folder, **FEW)
    sound = odds(judge.ask([r for r in requests if "<" not in r.question]))
    mumble = LocalVLM.shared_log_probs

    def once(self, conversations, **options):
        rows = mumble(self, conversations, **options)
        rows[1] = np.log(1 / rows.shape[1])
        monkeypatch.setattr(LocalVLM, "shared_log_probs", mumble)
        return rows

    monkeypatch.setattr(LocalVLM, "shared_log_probs", once)
    judge.health()
    answers = judge.ask(requests)
    assert "the mark '<|im_end|>'" in answers[1].error and "the mark" in answers[4].error
    assert "a probability of 0.04" in answers[2].error
    assert all(answers[i].log_odds is None for i in (1, 2, 4))
    np.testing.assert_array_equal(odds([answers[i] for i in (0, 3, 5)]), sound[[0, 2, 3]])
    assert judge.health()["no_verdict"] == 1
    monkeypatch.setattr(LocalVLM, "shared_log_probs", lambda *a, **o: np.full((1, 287), np.nan))
    (answer,) = judge.ask(requests[:1])
    assert answer.log_odds is None and "not finite" in answer.error


@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_a_clip_is_seen_again_where_going_on_is_wrong(folder, fault, warnings, monkeypatch):
    requests = requests_about(2)
    right = odds(LocalJudge(folder, **FEW).ask(requests))
    go_on = LocalVLM._continue

    def forgetful(self, cache, rests, start):
        if fault == "fails":
            raise AttributeError("no such cache")
        return go_on(self, cache, rests, start + 40)

    monkeypatch.setattr(LocalVLM, "_continue", forgetful)
    judge = LocalJudge(folder, **FEW)
    np.testing.assert_allclose(odds(judge.ask(requests)), right, atol=1e-4)
    assert len(warnings) == 1 and ("apart" if fault == "wrong" else "no such cache") in warnings[0]
    assert "again for each question" in judge.check()[0]


# ---- Models that cannot judge


def test_a_model_that_says_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"(?s)does not answer 'Are these .* red.*began with.*instruction-tuned"):
        LocalJudge(tiny_vlm.save(tmp_path, "qwen3_vl"), **FEW).ask(requests_about(1))


def test_a_model_that_does_not_see_is_refused(tmp_path):
    folder = tiny_vlm.save(tmp_path, "qwen3_vl")
    tiny_vlm.teach(folder, [(conversation(probe_clip(3), question), True) for question, _ in PROBES])
    with pytest.raises(UserError, match="'Are these pictures blue.*does not see them, or does not follow"):
        LocalJudge(folder, **FEW).check()


def test_a_word_of_two_tokens_is_refused(tmp_path):
    tokenizer = tiny_vlm.make_tokenizer(whole={"no": SPELLINGS["no"]})
    with pytest.raises(UserError, match="yes is more than one token"):
        LocalJudge(tiny_vlm.save(tmp_path, "qwen2_5_vl", tokenizer=tokenizer), **FEW).check()


def test_a_model_that_would_think_first_answers_at_once(tmp_path):
    folder = taught(tmp_path, "qwen3_5", tokenizer=tiny_vlm.make_tokenizer(tiny_vlm.OPENS_A_THOUGHT))
    log_odds, _ = expected(folder, requests_about(1))
    np.testing.assert_allclose(odds(LocalJudge(folder, **FEW).ask(requests_about(1))), log_odds, atol=1e-4)


def test_the_name_follows_what_changes_answers(one_folder):
    base = LocalJudge(one_folder).name
    for options in ({"dtype": "float32"}, {"frames": 8}, {"max_side": 224}, {"min_mass": 0.9}):
        assert LocalJudge(one_folder, **options).name != base
    assert LocalJudge(one_folder, device="cpu", batch=3, share=False).name == base
    assert str(pathlib.Path(one_folder).parent) not in base


@pytest.mark.parametrize("options", [{"frames": 1}, {"max_side": 0}, {"min_mass": 1}, {"batch": 0}, {"model": ""}])
def test_options_out_of_range(one_folder, options):
    with pytest.raises(UserError, match="needs"):
        LocalJudge(**{"model": one_folder} | options)


def test_a_config_names_it(one_folder):
    from ml_collections import ConfigDict

    from world_distill import build

    options = {"model": one_folder, **FEW}
    config = ConfigDict({"judge": {"factory": "world_distill.judges:LocalJudge", "options": options}})
    assert len(odds(build.make(config, "judge").ask(requests_about(1)))) == 2
