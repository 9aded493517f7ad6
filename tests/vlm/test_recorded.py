"""Real servers' replies, recorded by `tests/by_hand/judge_servers.py ask --record FILE`, are judged as they were."""

import json
import pathlib

import pytest

from world_distill.data.annotation.server import ServerAnnotator
from world_distill.errors import UserError
from world_distill.judges.server import ServerJudge
from world_distill.vlm.client import Client, Refused

RECORDED = pathlib.Path(__file__).parent / "recorded"


@pytest.fixture
def replay(monkeypatch):
    """Lets every server answer as in a file, in its order, and checks that the same is asked."""

    def start(name):
        lines = [json.loads(line) for line in (RECORDED / name).read_text().splitlines()]

        async def send(self, server, path, body=None):
            line = lines.pop(0)
            assert (line["path"], line["fields"]) == (path, sorted(set(body or {}) - {"messages"}))
            if line["problem"]:
                raise Refused(line["problem"], 404)
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
