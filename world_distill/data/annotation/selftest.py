"""What an annotator's server can do, found out before it is asked about pictures.

    1. the model is among those that it serves
    2. two pictures of one colour, to be described in the form of the real answers: a model that does not see, or does
       not write what can be parsed, is of no use

Servers differ in the fields that they take. The second is asked with all of them at first, and with a lesser form of
one after each refusal: of the one that the server complains about, or else of the next in order.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from world_distill.data.annotation.loose_json import find_values
from world_distill.data.annotation.pair_parsing import without_thoughts
from world_distill.data.annotation.request import OUTPUTS, Form, Settings
from world_distill.errors import UserError
from world_distill.vlm.client import Client, Failure, Refused, Server
from world_distill.vlm.options import check_model
from world_distill.vlm.replies import MalformedAnswer, first_choice, thought, written

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
    complaint = ""
    while form is not None:
        try:
            await _probe(client, server, settings, form)
        except Refused as error:
            if error.status not in (400, 422):
                raise
            complaint, form = str(error), form.lesser(str(error))
        except _Unreadable as error:
            # What a server makes of a schema may be the reason.
            complaint = str(error)
            form = dataclasses.replace(form, output=OUTPUTS[form.output]) if form.output in OUTPUTS else None
        else:
            logging.info("annotator: %s is asked for %s", server.label, form)
            return form
    raise UserError(
        f"annotator server {server.label}: {client.clean(complaint)[:600]}\n  This came of a small picture and a "
        "question, asked in several ways: the model has to take pictures and to write JSON, and max_tokens has to fit "
        "into its context and to hold its thoughts, if it has any (annotator.options.thinking)"
    )


class _Unreadable(Exception):
    """Answers came, but not of the form that was asked for."""


async def _probe(client: Client, server: Server, settings: Settings, form: Form) -> None:
    where = f"annotator server {server.label}: {settings.model}"
    for colour, pixels in _COLOURS.items():
        url = settings.url(np.full((_SIDE, _SIDE, 3), pixels, np.uint8))
        choice, text = await _answer(client, server, settings.body(form, url, before="", after=PROBE, seed=0))
        if thought(choice) and not settings.thinking and colour == "red":
            logging.warning(
                "%s thinks before it answers, though annotator.options.thinking is off: this takes tokens", where
            )
        if re.findall(r"\b(red|blue)\b", text.lower())[:1] != [colour]:
            raise UserError(
                f"{where} answered {text[:80]!r} about a {colour} picture: it does not see it, or does not follow; "
                "take another model"
            )


async def _answer(client: Client, server: Server, body: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(choice, its text), with JSON in it."""
    damaged = unreadable = ""
    for _ in range(3):
        reply = await client.send_patiently(server, "/chat/completions", body)
        try:
            choice = first_choice(reply)
        except MalformedAnswer as error:
            damaged = client.clean(str(error))[:300]
            continue
        try:
            text = without_thoughts(client.clean(written(choice))).strip()
        except MalformedAnswer as error:
            unreadable = str(error)
            continue
        if any(whole for _, whole in find_values(text)):
            return choice, text
        unreadable = f"no JSON in the answer {text[:80]!r}" if text else "an answer of thoughts alone, or empty"
    if unreadable:
        raise _Unreadable(unreadable)
    raise Failure(f"{server.label}: {damaged}, three times")
