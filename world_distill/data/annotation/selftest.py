"""What an annotator's server can do, found out before it is asked about pictures.

    1. the model is among those that it serves
    2. two pictures of one colour, to be described in the form of the real answers: a model that does not see, or does
       not write what can be parsed, is of no use

Servers differ in the fields that they take. The second is asked with all of them at first, and with a lesser form of
the one that a refusal names. Where it names none, it is asked with the least, and then with one more after the other:
what is not refused stays.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from world_distill.data.annotation.loose_json import find_values
from world_distill.data.annotation.pair_parsing import answer_part
from world_distill.data.annotation.request import LEAST, MORE, Form, Settings, text_of
from world_distill.data.annotation.thoughts import split_thoughts
from world_distill.errors import UserError
from world_distill.vlm.client import Client, Failure, Refused, Server
from world_distill.vlm.complaints import named_fields
from world_distill.vlm.options import check_model
from world_distill.vlm.replies import MalformedAnswer, first_choice, thoughts

PROBE = (
    "This picture has one colour all over. Answer with one JSON object and nothing else, with these keys in this "
    'order: "scene": the name of the colour, red or blue; "possible": false; "pairs": [].'
)
_COLOURS = {"red": (220, 30, 30), "blue": (30, 40, 220)}
_SIDE = 64  # pixels; vision encoders need more than one of their patches


async def find_form(client: Client, server: Server, settings: Settings) -> Form:
    """The form in which a server is to be asked.

    Raises:
      UserError: it is of no use; the message says why and what to do.
      Failure: it could not be reached.
    """
    await check_model(client, server, settings.model, "annotator")
    form: Form | None = Form()
    while form is not None:
        problem = await _problem(client, server, settings, form)
        if problem is None:
            logging.info("annotator: %s is asked for %s", server.label, form)
            return form
        if isinstance(problem, Refused):
            named = form.lesser(problem.words)
            form = named or await _built_up(client, server, settings, problem)
        else:
            # What a server makes of a schema may be the reason.
            form, last = form.without_schema(), problem
            if form is None:
                raise _no_use(client, server, last)
    raise AssertionError


async def _built_up(client: Client, server: Server, settings: Settings, refusal: Exception) -> Form:
    """From the least that a server may take to the most that this one takes. Raises UserError if there is none."""
    form: Form | None = None
    for least in (LEAST, dataclasses.replace(LEAST, length="max_completion_tokens")):
        if (problem := await _problem(client, server, settings, least)) is None:
            form = least
            break
        refusal = problem
    if form is None:
        raise _no_use(client, server, refusal)
    for more in MORE:
        fuller = dataclasses.replace(form, **more)
        # One way to ask for JSON is enough.
        if not ("output" in more and form.output != LEAST.output) and (
            await _problem(client, server, settings, fuller) is None
        ):
            form = fuller
    return form


def _no_use(client: Client, server: Server, why: Exception) -> UserError:
    return UserError(
        f"annotator server {server.label}: {client.clean(str(why))[:800]}\n  This came of a small picture and a "
        "question, asked in several ways: the model has to take pictures and to write JSON, and max_tokens has to fit "
        "into its context and to hold its thoughts, if it has any (annotator.options.thinking)"
    )


async def _problem(client: Client, server: Server, settings: Settings, form: Form) -> Exception | None:
    """Why a server cannot be asked in this form; None if it can. Raises what no other form would mend."""
    try:
        await _probe(client, server, settings, form)
    except Refused as error:
        if not error.of_one_request or error.status == 413:
            raise
        if named := named_fields(error.words, list(settings.extra)):
            where = "annotator.options.extra"
            raise UserError(f"{error}\n  The field {named[0]!r} comes from {where}: leave it out there") from None
        return error
    except _Unreadable as error:
        return error
    return None


class _Unreadable(Exception):
    """Answers came, but not of the form that was asked for."""


async def _probe(client: Client, server: Server, settings: Settings, form: Form) -> None:
    where = f"annotator server {server.label}: {settings.model}"
    for colour, pixels in _COLOURS.items():
        url = settings.url(np.full((_SIDE, _SIDE, 3), pixels, np.uint8))
        thought, text = await _answer(client, server, settings.body(form, url, before="", after=PROBE, seed=0))
        if thought and not settings.thinking and colour == "red":
            logging.warning(
                "%s thinks before it answers, though annotator.options.thinking is off: this takes tokens", where
            )
        if _colour(text) != colour:
            raise UserError(
                f"{where} answered {text[:80]!r} about a {colour} picture: it does not see it, or does not follow; "
                "take another model"
            )


def _colour(text: str) -> str | None:
    """The colour that an answer names: in its last object's "scene", or else anywhere; None if it is not clear."""
    scenes = [str(value["scene"]) for value, _ in find_values(text) if isinstance(value, dict) and value.get("scene")]
    said = (scenes[-1:] or [text])[0].lower()
    said = re.sub(r"(?:\b(?:not|no|never|without|rather than|instead of|nor)|n't)(?: \w+)? (?:red|blue)\b", "", said)
    named = set(re.findall(r"\b(red|blue)(?:dish|ish)?\b", said))
    return named.pop() if len(named) == 1 else None


async def _answer(client: Client, server: Server, body: Mapping[str, Any]) -> tuple[bool, str]:
    """(whether the model thought, its answer), with JSON in it."""
    damaged = unreadable = ""
    for _ in range(3):
        reply = await client.send_patiently(server, "/chat/completions", body)
        try:
            choice = first_choice(reply)
        except MalformedAnswer as error:
            damaged = client.clean(str(error))[:300]
            continue
        try:
            written, finished = text_of(choice)
        except MalformedAnswer as error:
            unreadable = str(error)
            continue
        written = client.clean(written)
        text = answer_part(written, finished=finished)
        if any(whole for _, whole in find_values(text)):
            return bool(thoughts(choice) or split_thoughts(written)[0] != written), text
        unreadable = f"no JSON in the answer {text[:80]!r}" if text else "an answer of thoughts alone, or empty"
    if unreadable:
        raise _Unreadable(unreadable)
    raise Failure(f"{server.label}: {damaged}, three times", own=True)
