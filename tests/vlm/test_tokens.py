"""Tokens a minute: requests wait for those before them, and estimates are corrected by what was used."""

import asyncio
import json
import time

import pytest

from world_distill.errors import UserError
from world_distill.vlm.client import Limits
from world_distill.vlm.tokens import TokenBudget, estimate, used_tokens

BODY = {"max_tokens": 100, "messages": [{"role": "user", "content": "x" * 400}]}  # 200 tokens


def time_of(budget, requests, used=None):
    """Seconds that so many requests wait."""

    async def run():
        budget.open()
        started = time.monotonic()
        for _ in range(requests):
            budget.settle(await budget.charge(BODY), used)
        return time.monotonic() - started

    return asyncio.run(run())


def test_requests_wait_until_those_before_are_paid_for():
    assert 0.2 <= time_of(TokenBudget(200 * 60 * 20), 5) < 0.4  # 4 times 200 tokens at 4000 a second
    assert time_of(TokenBudget(0), 100) < 0.1


def test_what_was_used_counts_and_not_what_was_estimated():
    assert time_of(TokenBudget(200 * 60), 5, used=2) < 0.5  # estimated: 4 s
    assert time_of(TokenBudget(200 * 60 * 40), 5, used=1000) >= 4 * 1000 / 8000
    assert time_of(TokenBudget(200 * 60), 5, used=0) < 0.1  # not taken: given back


def test_estimates_learn():
    async def charges():
        budget = TokenBudget(1e9)
        budget.open()
        for _ in range(60):
            budget.settle(charged := await budget.charge(BODY), 1000)
        return charged

    assert asyncio.run(charges()) == pytest.approx(1000, rel=0.01)


def test_estimate_counts_texts_pictures_and_the_answer():
    parts = [{"type": "text", "text": "x" * 40}] + 3 * [{"type": "image_url", "image_url": {"url": "x" * 10**6}}]
    assert estimate({"messages": [{"role": "user", "content": parts}]}) == 10 + 3 * 500
    assert estimate(BODY) == estimate(BODY | {"max_tokens": None, "max_completion_tokens": 100}) == 200


@pytest.mark.parametrize("total", [None, -1, 0, 1.5, True, "9", 10**9, [], {}])
def test_only_a_plausible_count_is_believed(total):
    assert used_tokens(json.dumps({"usage": {"total_tokens": total}})) is None
    assert used_tokens(json.dumps({"usage": total})) is None
    assert used_tokens("[" * 100_000) is used_tokens("{") is None
    assert used_tokens('{"usage": {"total_tokens": 7}}') == 7


def test_a_limit_below_nothing_is_refused():
    with pytest.raises(UserError, match="tokens_per_minute"):
        Limits(1, 0, 1, 1, 1, 1, 1, tokens_per_minute=-1)
