"""A limit on tokens a minute, for requests whose tokens are known only once they are answered.

A request goes when those before it are paid for at the limit's rate, and is charged an estimate; its reply says what it
really used, and the account is corrected. Estimates learn from this: what a picture costs differs between models.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

_IMAGE = 500.0  # tokens, at first
_CHARACTERS = 4.0  # a token, of English text
_LEARN = 0.2  # share of the last reply in the correction of the next estimates
_MOST = 10_000_000  # tokens of one request that are believed


class TokenBudget:
    """The account of all requests together; one event loop at a time."""

    def __init__(self, per_minute: float):
        """`per_minute` 0: no limit."""
        self._rate = per_minute / 60  # tokens a second
        self._paid_at = 0.0  # when all that was charged is paid for
        self._factor = 1.0  # tokens used over tokens estimated

    def open(self) -> None:
        """To be called on the event loop on which requests will wait."""
        self._turn = asyncio.Lock()

    async def charge(self, body: Mapping[str, Any] | None) -> float:
        """Waits until a chat request may go; returns its estimate, for `settle`."""
        if not self._rate or not body or "messages" not in body:
            return 0.0
        async with self._turn:
            # Replies that come in meanwhile change the date.
            while (wait := self._paid_at - time.monotonic()) > 0:
                await asyncio.sleep(min(wait, 0.5))
            tokens = estimate(body) * self._factor
            self._paid_at = max(self._paid_at, time.monotonic()) + tokens / self._rate
            return tokens

    def settle(self, charged: float, used: int | None) -> None:
        """Corrects the account by what a request used; None: unknown, 0: it was not taken."""
        if not charged or used is None:
            return
        self._paid_at += (used - charged) / self._rate
        if used:
            self._factor *= 1 + _LEARN * (min(max(used / charged, 0.01), 100) - 1)


def estimate(body: Mapping[str, Any]) -> float:
    """Tokens of a chat request and the longest answer to it, roughly."""
    tokens = float(body.get("max_tokens") or body.get("max_completion_tokens") or 0)
    for message in body["messages"]:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            tokens += len(part["text"]) / _CHARACTERS if part["type"] == "text" else _IMAGE
    return tokens


def used_tokens(reply: str) -> int | None:
    """The tokens that the body of a reply says were used, if it does."""
    try:
        total = json.loads(reply)["usage"]["total_tokens"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return total if type(total) is int and 0 < total < _MOST else None
