"""Real servers' replies, recorded by `tests/by_hand/judge_servers.py ask --record FILE`, are judged as they were."""

import json
import pathlib

import numpy as np
import pytest

from world_distill.data.annotation.server import ServerAnnotator
from world_distill.errors import UserError
from world_distill.interfaces import JudgeRequest
from world_distill.judges.answers import SPELLINGS, WORDS, read_answer
from world_distill.judges.server import ServerJudge
from world_distill.vlm.client import Client, Failure, Refused

RECORDED = pathlib.Path(__file__).parent / "recorded"


@pytest.fixture
def replay(monkeypatch):
    """Lets every server answer as in a file, in its order, and checks that the same is asked."""

    def start(name):
        lines = [json.loads(line) for line in (RECORDED / name).read_text().splitlines()]

        async def send(self, server, path, body=None):
            line = lines.pop(0)
            path = path.replace("http://server", "http://localhost:8123") if "localhost" in line["path"] else path
            assert (line["path"], line["fields"]) == (path, sorted(set(body or {}) - {"messages"}))
            kind, _, words = (line["problem"] or "").partition(": ")
            if kind == "Failure":
                raise Failure(words, own="status 500" in words)
            if kind:
                raise Refused(line["problem"], 400 if "status 400" in line["problem"] else 404)
            return line["reply"]

        monkeypatch.setattr(Client, "send", send)
        return lines

    return start


def test_transformers_serve_annotates_and_cannot_judge(replay):
    left = replay("transformers_serve.jsonl")
    with pytest.raises(UserError, match="tiny gives no log-probabilities, and cannot judge"):
        ServerJudge("http://server/v1", "tiny").check()
    annotator = ServerAnnotator("http://server/v1", "tiny", temperature=0, max_tokens=80)
    assert annotator.check() == ["http://server/v1: tiny, asked for json_schema"] and not left
    annotator.close()


def test_vllm_judges_and_annotates(replay):
    left = replay("vllm.jsonl")
    judge = ServerJudge("http://server/v1", "tiny")
    assert judge.check() == ["http://server/v1: tiny, read by token numbers of 12 spellings"]
    (refused,) = judge.ask([JudgeRequest(np.zeros((2, 8, 8, 3), np.uint8), "long " * 200_000)])
    assert refused.log_odds is None and refused.error.endswith("(vLLM: --max-model-len)")
    annotator = ServerAnnotator("http://server/v1", "tiny", temperature=0, max_tokens=80)
    assert annotator.check() == ["http://server/v1: tiny, asked for json_schema"] and not left
    annotator.close()


@pytest.mark.parametrize("line, log_odds", [(13, 10.03), (14, -11.48)])
def test_what_vllm_says_of_red_pictures_is_read(line, log_odds):
    recorded = [json.loads(text) for text in (RECORDED / "vllm.jsonl").read_text().splitlines()]
    tokens = [json.loads(one["reply"])["tokens"] for one in recorded if one["path"].endswith("/tokenize")]
    words = [word for word in WORDS for _ in SPELLINGS[word]]
    ids = {number: one for (number,), one in zip(tokens, words, strict=True)}
    reading = read_answer(recorded[line]["reply"], ids, min_mass=0.5)
    assert reading.numbered and not reading.bounded and not reading.sampled_only and reading.mass > 0.99
    assert reading.log_odds == pytest.approx(log_odds, abs=0.01)


def test_what_vllm_says_before_it_dies_is_told(replay):
    left = replay("vllm_dies.jsonl")
    with pytest.raises(UserError, match="ConnectError.*before that: .*status 500: EngineCore encountered an issue"):
        ServerJudge("http://server/v1", "tiny", backoff=0.001).check()
    assert not left
