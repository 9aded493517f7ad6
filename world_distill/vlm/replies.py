"""The bodies of chat completions, and what may be wrong with them."""

import json
from typing import Any

from world_distill.vlm.complaints import server_words


class MalformedAnswer(Exception):
    """Not a chat completion with log-probabilities: damaged on its way, or from another kind of server."""


class NoVerdict(Exception):
    """The model answered with something that is neither yes nor no."""


def first_choice(text: str) -> dict[str, Any]:
    """The first answer in the body of a reply of `/chat/completions`. Raises MalformedAnswer if there is none."""
    try:
        reply = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedAnswer(f"not JSON, or cut off ({type(error).__name__})") from error
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        # Some gateways report the failure of what is behind them with status 200.
        raise MalformedAnswer(f"no choices in it: {server_words(text)}")
    return choices[0]


def said(choice: dict[str, Any]) -> str | None:
    """The text of an answer; what it thought if it said nothing else."""
    message = choice.get("message")
    if not isinstance(message, dict):
        return None
    return message.get("content") or message.get("reasoning") or message.get("reasoning_content")


def written(choice: dict[str, Any]) -> str:
    """The text of an answer without what the model thought; "" if there is none.

    Raises MalformedAnswer if the model or the server declines to answer.
    """
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    if refusal := message.get("refusal"):
        raise MalformedAnswer(f"the model declines: {str(refusal)[:100]!r}")
    if choice.get("finish_reason") == "content_filter":
        raise MalformedAnswer("the server's filter held the answer back")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def thoughts(choice: dict[str, Any]) -> str:
    """What the server says that the model thought, beside the answer; "" for nothing."""
    message = choice.get("message")
    if not isinstance(message, dict):
        return ""
    texts = (message.get("reasoning_content"), message.get("reasoning"))
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")
