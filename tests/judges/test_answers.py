"""What replies say: the score over all spellings, its mass, and nothing read into what is no answer."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.effort import FUZZ
from world_distill.judges.answers import MalformedAnswer, NoLogProbs, NoVerdict, read_answer


def reply(probabilities, sampled=None, **choice):
    entries = [{"token": t, "logprob": math.log(p) if p else -9999.0, "bytes": None} for t, p in probabilities]
    first = dict(entries[0] if sampled is None else sampled) | {"top_logprobs": entries}
    message = {"role": "assistant", "content": first["token"]}
    return json.dumps({"choices": [{"index": 0, "message": message, "logprobs": {"content": [first]}} | choice]})


def read(probabilities, ids=None, min_mass=0.5, **keywords):
    return read_answer(reply(probabilities, **keywords), ids or {}, min_mass=min_mass)


def test_spellings_are_added_up():
    reading = read([("Yes", 0.4), (" yes", 0.2), ("▁YES", 0.1), ("No", 0.15), ("Ġno", 0.05), ("Yesterday", 0.05)])
    assert reading.log_odds == pytest.approx(math.log(0.7 / 0.2)) and reading.mass == pytest.approx(0.9)
    assert not reading.bounded


def test_token_numbers_are_looked_up():
    reading = read([("token_id:9", 0.6), ("token_id:7", 0.3), ("token_id:5", 0.1)], ids={9: "no", 7: "yes"})
    assert reading.log_odds == pytest.approx(math.log(0.3 / 0.6)) and reading.mass == pytest.approx(0.9)


def test_the_sampled_token_counts_once_whether_repeated_or_not():
    listed = [("Yes", 0.6), ("No", 0.3)]
    again = read(listed, sampled={"token": "Yes", "logprob": math.log(0.6) + 1e-9})
    assert again.mass == pytest.approx(0.9)
    apart = read([("No", 0.3), ("Maybe", 0.05)], sampled={"token": "Yes", "logprob": math.log(0.6)})
    assert apart.log_odds == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "others, bound",
    [
        ([("Sure", 0.01)], 0.01),  # less likely than the least likely one that is listed
        ([("Sure", 0.04)], 0.01),  # or than what is left
        ([("Sure", 0.05)], 1e-4),  # and what is left is not known better than this
        ([("Sure", 0.01), ("No", 0.0)], 0.01),  # a server's mark for what it left out is no probability
    ],
)
def test_a_word_that_is_not_listed_is_bounded(others, bound):
    for word, sign in (("Yes", 1), ("No", -1)):
        rest = [(t if t != "No" else {"Yes": "No", "No": "Yes"}[word], p) for t, p in others]
        reading = read([(word, 0.95), *rest])
        assert reading.bounded and reading.log_odds == pytest.approx(sign * math.log(0.95 / bound), rel=1e-6)


def test_little_mass_is_no_verdict():
    with pytest.raises(NoVerdict, match=r"began with '<think>': yes and no have a probability of 0.005 together"):
        read([("<think>", 0.99), ("Yes", 0.004), ("no", 0.001)])
    with pytest.raises(NoVerdict):
        read([("Yesterday", 0.5), ("Nobody", 0.5)], min_mass=1e-9)
    assert read([("<think>", 0.4), ("Yes", 0.6)], min_mass=0.6 - 1e-9).bounded


FIRST = {"token": "Yes", "logprob": -0.1, "top_logprobs": []}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "7", "<html>", "[" * 10**5,
        '{"choices": []}', '{"choices": [3]}', '{"error": {"message": "no"}}',
        *(
            json.dumps({"choices": [{"logprobs": {"content": [FIRST | change]}}]})
            for change in (
                {"token": 3}, {"logprob": None}, {"logprob": "-1"}, {"logprob": True}, {"logprob": 0.5},
                {"logprob": math.nan}, {"logprob": 10**400}, {"top_logprobs": {"Yes": -1}}, {"top_logprobs": ["Yes"]},
                {"top_logprobs": [{"token": "No", "logprob": 0.0}]},
            )
        ),
        json.dumps({"choices": [{"logprobs": {"content": ["Yes"]}}]}),
    ],
)  # fmt: skip
def test_damage_is_named_and_never_read(text):
    with pytest.raises(MalformedAnswer):
        read_answer(text, {}, min_mass=0.5)


@pytest.mark.parametrize("log_probs", [None, {}, {"content": None}, {"content": []}, "none"])
def test_missing_log_probabilities_are_told_apart(log_probs):
    with pytest.raises(NoLogProbs):
        read_answer(json.dumps({"choices": [{"logprobs": log_probs}]}), {}, min_mass=0.5)


TOKENS = st.one_of(
    st.sampled_from(["Yes", "no", " YES", "▁No", "token_id:7", "token_id:", "token_id:²", ""]), st.text()
)
NUMBERS = st.one_of(st.floats(-20, 0), st.floats(), st.integers(), st.none(), st.booleans(), st.text(max_size=3))
ENTRIES = st.fixed_dictionaries({"token": TOKENS, "logprob": NUMBERS})
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
REPLIES = st.builds(
    lambda first, top: {"choices": [{"logprobs": {"content": [first | {"top_logprobs": top}]}}]},
    ENTRIES,
    st.lists(st.one_of(ENTRIES, JSON), max_size=6),
)


@settings(max_examples=150 * FUZZ, deadline=None)
@given(st.one_of(REPLIES, JSON, st.builds(lambda x: {"choices": [{"logprobs": x}]}, JSON)), st.integers(0, 40))
def test_whatever_comes_is_read_rightly_or_refused(value, cut):
    text = json.dumps(value)
    for part in (text, text[: len(text) - cut]):
        try:
            reading = read_answer(part, {7: "yes"}, min_mass=0.5)
        except (MalformedAnswer, NoVerdict):
            continue
        # What is accepted has yes or no in it, with the probability that it says.
        first = json.loads(part)["choices"][0]["logprobs"]["content"][0]
        words = {"yes": 0.0, "no": 0.0}
        for entry in [first, *first["top_logprobs"]]:
            text_of = entry["token"].strip("▁ ").lower().replace("token_id:7", "yes")
            if text_of in words:
                words[text_of] += math.exp(min(entry["logprob"], 0.0))
        assert math.isfinite(reading.log_odds) and 0.5 <= reading.mass <= 1.0
        assert sum(words.values()) >= reading.mass - 1e-6 and reading.bounded == (min(words.values()) == 0)
        tokens = [entry["token"] for entry in [first, *first["top_logprobs"]]]
        if not reading.bounded and len(set(tokens)) == len(tokens):
            assert reading.log_odds == pytest.approx(math.log(words["yes"] / words["no"]), abs=1e-9)
