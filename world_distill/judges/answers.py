"""What a server's reply says: log p(yes) - log p(no) of the first answer token.

A tokenizer has several tokens for one word ("yes", "Yes", " yes", ...). Their probabilities are added, so that

    log_odds = log sum p(spellings of yes) - log sum p(spellings of no),     mass = sum of both sums

The mass is what the model gave to an answer of the form that was asked for: where it is small, the odds are between two
things that the model was not going to say. A reply holds the likeliest tokens only, or chosen ones. If one of the two
words is not among them, its probability is at most that of the least likely token given, and at most what the given
ones leave of 1: the lesser of the two bounds stands in for it, and the reading is marked `bounded`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from world_distill.vlm.replies import MalformedAnswer, NoVerdict, first_choice, said

WORDS = ("yes", "no")
SPELLINGS = {w: tuple(gap + form for form in (w, w.title(), w.upper()) for gap in ("", " ")) for w in WORDS}

_ID = "token_id:"  # how vLLM writes a token as its number
_MARKS = str.maketrans("▁Ġ", "  ")  # how vocabularies write a leading space
_LEAST_REST = 1e-4  # of 1, below which what is left is rounding
_NONE = -200.0  # log-probability that no model gives to one of its 20 likeliest tokens: a mark for none


class NoLogProbs(MalformedAnswer):
    """A whole chat completion, but without log-probabilities."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """One answer.

    Attributes:
      log_odds: of yes over no.
      mass: probability of yes and no together.
      bounded: one of the words was not given, and its probability is a bound.
      sampled_only: one token has all the probability, and the others have none: this is what sampling took, or a filter
        before it left over, and not what the model would say.
      numbered: tokens were given by their numbers.
    """

    log_odds: float
    mass: float
    bounded: bool
    sampled_only: bool = False
    numbered: bool = False


def read_answer(text: str, ids: Mapping[int, str], *, min_mass: float) -> Reading:
    """Reads the body of a reply of `/chat/completions`.

    Args:
      text: JSON.
      ids: the word ("yes" or "no") of each token number, for servers that give numbers.
      min_mass: probability that yes and no together need.

    Raises:
      MalformedAnswer: not such a reply, or its numbers are no log-probabilities.
      NoLogProbs: a reply without log-probabilities.
      NoVerdict: yes and no have less than `min_mass` together.
    """
    choice = first_choice(text)
    first = _first_token(choice)
    others = first.get("top_logprobs") or []
    if not isinstance(others, list):
        raise MalformedAnswer("top_logprobs is not a list")
    # JSON has no minus infinity: some servers write null for it.
    others = [e | {"logprob": -1e4} if isinstance(e, dict) and e.get("logprob", 0) is None else e for e in others]
    tokens = list(dict.fromkeys(map(_token, others)))
    sampled = _token(first)  # which the list may or may not repeat
    if sampled[0] not in {token for token, _ in tokens}:
        tokens.append(sampled)
    total = math.fsum(math.exp(log_prob) for _, log_prob in tokens)
    if total > 1.02:
        raise MalformedAnswer(f"the probabilities of different tokens add up to {total:.3g}")
    by_word: dict[str, list[float]] = {word: [] for word in WORDS}
    for token, log_prob in tokens:
        if word := _word(token, ids):
            by_word[word].append(math.exp(log_prob))
    sums = {word: math.fsum(values) for word, values in by_word.items()}
    mass = min(sum(sums.values()), 1.0)
    if not mass >= min_mass or not mass:
        begun = str(said(choice) or sampled[0])[:40]
        raise NoVerdict(f"the answer began with {begun!r}: yes and no have a probability of {mass:.2g} together")
    # A probability of exactly 0 is what a server writes that leaves tokens out.
    least = min((math.exp(log_prob) for _, log_prob in tokens if log_prob > _NONE), default=1.0)
    bound = min(least, max(1 - total, _LEAST_REST))
    log_odds = math.log(sums["yes"] or bound) - math.log(sums["no"] or bound)
    certain = [log_prob for _, log_prob in tokens if log_prob > _NONE]
    return Reading(
        log_odds, mass, bounded=not all(sums.values()), sampled_only=len(certain) == 1 and certain[0] > -1e-9,
        numbered=sampled[0].startswith(_ID),
    )  # fmt: skip


def _first_token(choice: dict[str, Any]) -> dict[str, Any]:
    log_probs = choice.get("logprobs")
    content = log_probs.get("content") if isinstance(log_probs, dict) else None
    if content is None and isinstance(log_probs, dict) and log_probs.get("tokens"):
        content = _of_completions(log_probs)
    if not content:
        raise NoLogProbs("a reply without log-probabilities")
    if not (isinstance(content, list) and isinstance(content[0], dict)):
        raise MalformedAnswer("logprobs.content is not a list of tokens")
    return content[0]


def _of_completions(log_probs: dict[str, Any]) -> list[dict[str, Any]]:
    """The first token from the form of `/completions`, which some servers give for chats, too."""
    tokens, values, tops = (log_probs.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not (isinstance(tokens, list) and isinstance(values, list) and values):
        raise MalformedAnswer("logprobs.tokens without logprobs.token_logprobs")
    top = tops[0] if isinstance(tops, list) and tops and isinstance(tops[0], dict) else {}
    listed = [{"token": token, "logprob": value} for token, value in top.items()]
    return [{"token": tokens[0], "logprob": values[0], "top_logprobs": listed}]


def _token(entry: Any) -> tuple[str, float]:
    if not isinstance(entry, dict):
        raise MalformedAnswer("a token that is not an object")
    token, log_prob = entry.get("token"), entry.get("logprob")
    if not isinstance(token, str) or isinstance(log_prob, bool) or not isinstance(log_prob, (int, float)):
        raise MalformedAnswer("a token without text or number")
    # math.exp would overflow first for integers of any length, which JSON may hold.
    if not log_prob <= 1e-3:
        raise MalformedAnswer(f"{str(log_prob)[:20]} is no log-probability")
    return token, max(min(log_prob, 0.0), -1e4)


def _word(token: str, ids: Mapping[int, str]) -> str | None:
    if token.startswith(_ID):
        number = token.removeprefix(_ID)
        return ids.get(int(number)) if number.isascii() and number.isdecimal() and len(number) < 10 else None
    text = token.translate(_MARKS).strip(" ").lower()
    return text if text in WORDS else None
