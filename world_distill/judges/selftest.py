"""What a server can do, found out before it is asked about clips: an answer of the wrong form is no reward.

    1. the model is among those that it serves
    2. which spellings of yes and no are one token, where the server can say (`/tokenize` of vLLM and SGLang)
    3. pictures of one colour, as many as a clip will have: "are they red?" must be yes, "are they blue?" no, by the
       first token, which a model that thinks first, or a server without log-probabilities, does not give

The second is a hint: a server that cannot say is asked all the same. Servers differ in the fields that they take. A
field that a refusal names is left out; where none is named, the third is asked with ever fewer until it is not refused.
Some servers give probabilities after sampling, which at temperature 0 are 1 and 0. They are asked at temperature 1 as
well, since only the first token's probabilities are read, and never the token that was drawn.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from world_distill.errors import UserError
from world_distill.judges.answers import SPELLINGS, WORDS, MalformedAnswer, NoLogProbs, NoVerdict, Reading, read_answer
from world_distill.vlm.client import Client, Failure, Refused, Server
from world_distill.vlm.complaints import named_fields
from world_distill.vlm.frames import chosen_frames, data_urls, frame_labels
from world_distill.vlm.options import check_model

PROBES = (("Are these pictures red? Answer yes or no.", 1), ("Are these pictures blue? Answer yes or no.", -1))
INTRO = "These pictures are frames of one video, in the order of time, each after its number."
_COLOUR = (220, 30, 30)
_SIDE = 64  # pixels; vision encoders need more than one of their patches


def probe_clip(frames: int) -> np.ndarray:
    """The red pictures [frames H W 3] uint8 that `PROBES` ask about."""
    return np.full((frames, _SIDE, _SIDE, 3), _COLOUR, np.uint8)


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is sent and how the answer is read: whatever changes an answer.

    Attributes:
      model: as the server calls it.
      frames: at most so many of a clip.
      max_side: pixels of a frame's longer side, at most.
      quality: of JPEG; 0: PNG.
      min_mass: probability that yes and no together need.
      extra: more fields of the request.
    """

    model: str
    frames: int
    max_side: int
    quality: int
    min_mass: float
    extra: Mapping[str, Any]

    def __post_init__(self):
        if not self.model:
            raise UserError("a judge needs the name of its model, as the server lists it at /v1/models")
        if self.frames < 2 or self.max_side < 1 or not 0 <= self.quality <= 100 or not 0 < self.min_mass < 1:
            raise UserError(
                "a judge needs frames of at least 2, max_side of at least 1, a quality of 0 to 100 and a min_mass "
                f"between 0 and 1, not {self.frames}, {self.max_side}, {self.quality}, {self.min_mass}"
            )

    @property
    def version(self) -> str:
        """One line that changes when an answer may; free of addresses and keys."""
        picture = f"jpeg{self.quality}" if self.quality else "png"
        extra = f" {json.dumps(dict(self.extra), sort_keys=True)}" if self.extra else ""
        return f"server-2 {self.model} {self.frames}x{self.max_side} {picture} mass>{self.min_mass:g}{extra}"

    def pictures(self, clip: np.ndarray) -> list[dict[str, Any]]:
        """The parts of a message that show a clip [F H W 3] uint8."""
        numbers = chosen_frames(clip, self.frames)
        urls = data_urls(clip, frames=numbers, max_side=self.max_side, quality=self.quality)
        parts: list[dict[str, Any]] = []
        for label, url in zip(frame_labels(clip, numbers), urls, strict=True):
            parts += [text_part(label), {"type": "image_url", "image_url": {"url": url}}]
        return parts


def text_part(text: str) -> dict[str, str]:
    """A part of a message."""
    return {"type": "text", "text": text}


@dataclasses.dataclass(frozen=True)
class Form:
    """Fields of a request that a server takes, and the words of its token numbers."""

    fields: Mapping[str, Any]
    ids: Mapping[int, str]


def make_body(rules: Rules, form: Form, pictures: Sequence[dict[str, Any]], question: str) -> dict[str, Any]:
    """The request: the clip first and the question last, so that the beginning is the same for all questions."""
    content = [text_part(INTRO), *pictures, text_part(question)]
    return (
        {"model": rules.model, "messages": [{"role": "user", "content": content}]}
        | dict(form.fields)
        | dict(rules.extra)
    )


async def find_form(client: Client, server: Server, rules: Rules) -> Form:
    """The form in which a server is to be asked.

    Raises:
      UserError: it cannot judge; the message says why and what to do.
      Failure: it could not be reached.
    """
    await check_model(client, server, rules.model, "judge")
    ids = await _token_ids(client, server, rules)
    refusal: Exception | None = None
    waiting, tried = _forms(ids), []
    while waiting:
        form = waiting.pop(0)
        if form in tried:
            continue
        tried.append(form)
        try:
            numbered = await _probe(client, server, rules, form)
        except Refused as error:
            if not error.of_one_request or error.status == 413:
                raise
            refusal = refusal if isinstance(refusal, _AfterSampling) else error
            _refuse_extra(error, rules.extra)
            if lesser := _without(form, named_fields(error.words, list(form.fields))):
                waiting.insert(0, lesser)
        except _AfterSampling as error:
            refusal = error
            waiting = [other for other in waiting if other.fields.get("temperature") == 1]
        else:
            if form.ids and not numbered:  # it ignores what it does not know, and gives the likeliest tokens
                fields = {name: value for name, value in form.fields.items() if name not in _EXACT}
                form = Form(fields, {})
            logging.info("judge: %s is asked with %s", server.label, ", ".join(sorted(form.fields)))
            return form
    raise UserError(
        f"{refusal}\n  This is the answer to {rules.frames} small pictures and a question, asked for log-probabilities"
        " in several ways: the server has to take that many images and give logprobs; one that gives none cannot judge"
    ) from None


_BEFORE_SAMPLING = {"vllm": "--logprobs-mode raw_logprobs"}
_EXACT = ("logprob_token_ids", "return_tokens_as_token_ids")


def _forms(ids: Mapping[int, str]) -> list[Form]:
    """From the most that a server may know to the least, and then at temperature 1."""
    plain = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    fewer = plain | {"top_logprobs": 5}
    newer = {"max_completion_tokens": 1, "logprobs": True, "top_logprobs": 20}
    no_thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    drawn = {"temperature": 1, "top_p": 1}
    forms = [Form(fields, {}) for fields in (plain | no_thinking, fewer | no_thinking, plain, fewer, newer)]
    forms += [Form(fields | drawn, {}) for fields in (plain | no_thinking, plain, fewer)]
    if ids:
        exact = dict(zip(_EXACT, (sorted(ids), True), strict=True))
        forms.insert(0, Form(plain | no_thinking | exact, ids))
    return forms


def _without(form: Form, named: Sequence[str]) -> Form | None:
    """The form without the field that a refusal names first, or with another value of it; None if none is left."""
    for name in named:
        if name in ("logprobs", "max_completion_tokens"):  # without them there is no answer, or one without an end
            continue
        fields = {key: value for key, value in form.fields.items() if key != name}
        if name == "top_logprobs":
            if form.fields[name] <= 5:
                continue
            fields[name] = 5
        elif name == "max_tokens":
            fields["max_completion_tokens"] = 1
        ids = {} if name in _EXACT else form.ids
        return Form({key: value for key, value in fields.items() if ids or key not in _EXACT}, ids)
    return None


def _refuse_extra(error: Refused, extra: Mapping[str, Any]) -> None:
    """Raises UserError if the refusal names a field that the user has put in."""
    if named := named_fields(error.words, list(extra)):
        where = "judge.options.extra"
        raise UserError(f"{error}\n  The field {named[0]!r} comes from {where}: leave it out there") from None


class _AfterSampling(Exception):
    """The server's probabilities are those after sampling."""


async def _token_ids(client: Client, server: Server, rules: Rules) -> dict[int, str]:
    """The word of each token that spells yes or no; {} where the server cannot say."""
    ids = {}
    root = server.url.removesuffix("/v1")
    for word in WORDS:
        for spelling in SPELLINGS[word]:
            body = {"model": rules.model, "prompt": spelling, "add_special_tokens": False}
            try:
                tokens = json.loads(await client.send_patiently(server, f"{root}/tokenize", body))["tokens"]
                # llama.cpp reads its text from another field, and makes no tokens of none.
                if not tokens or not all(type(token) is int for token in tokens):
                    return {}
                if len(tokens) == 1:
                    ids[tokens[0]] = word
            except (Refused, Failure, ValueError, KeyError, TypeError, RecursionError):
                return {}
    missing = set(WORDS) - set(ids.values())
    # A server that makes several of every spelling puts a mark before each: it cannot say either.
    if len(missing) == 1:
        raise UserError(
            f"judge server {server.label}: {missing.pop()} is more than one token for {rules.model}: "
            "its first token does not answer; take another model"
        )
    return ids


async def _probe(client: Client, server: Server, rules: Rules, form: Form) -> bool:
    """Whether tokens come by their numbers. Raises as `find_form` does, Refused, or _AfterSampling."""
    pictures = rules.pictures(probe_clip(rules.frames))
    bodies = [make_body(rules, form, pictures, question) for question, _ in PROBES]
    readings = [await _ask(client, server, rules, form, body) for body in bodies]
    if all(reading.sampled_only for reading in readings):
        flag = f": start it with {_BEFORE_SAMPLING[server.kind]}" if server.kind in _BEFORE_SAMPLING else ""
        raise _AfterSampling(
            f"judge server {server.label}: {rules.model} gives probabilities after sampling: one token has all, the "
            f"others none, and every answer would be as certain as the next{flag}"
        )
    for (question, sign), reading in zip(PROBES, readings, strict=True):
        if reading.log_odds * sign <= 0:
            raise UserError(
                f"judge server {server.label}: {rules.model} answered {question!r} about red pictures with log-odds "
                f"{reading.log_odds:.2f}: it does not see them, or does not follow; take another model"
            )
    return all(reading.numbered for reading in readings)


async def _ask(client: Client, server: Server, rules: Rules, form: Form, body: Mapping[str, Any]) -> Reading:
    where = f"judge server {server.label}: {rules.model}"
    malformed = ""
    for _ in range(3):
        reply = await client.send_patiently(server, "/chat/completions", body)
        try:
            return read_answer(reply, form.ids, min_mass=rules.min_mass)
        except NoLogProbs as error:
            raise UserError(
                f"{where} gives no log-probabilities, and cannot judge: the score is log p(yes) - log p(no) of the "
                "first token. Take a server or a hosted model with `logprobs` (launch/serve_judge.sh starts one)"
            ) from error
        except NoVerdict as error:
            raise UserError(
                f"{where} does not answer with yes or no at once: {error}. If it thinks before it answers, thinking "
                "has to be off: with a chat template that knows enable_thinking, or a field of the request in "
                'judge.options.extra (such as {"reasoning_effort": "none"}), or another model'
            ) from error
        except MalformedAnswer as error:
            malformed = client.clean(str(error))[:300]
    raise Failure(f"{server.label}: {malformed}, three times", own=True)
