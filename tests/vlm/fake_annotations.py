"""The fake server as an annotator's: its tasks are a hash of picture and seed, and it sees the colour of a picture."""

import base64
import hashlib
import io
import json

import numpy as np
from PIL import Image

from tests.vlm.fake_server import FakeServer, parts_of
from world_distill.data.annotation.selftest import PROBE
from world_distill.interfaces import TaskPair

STYLES = ("vllm_new", "vllm_old", "hosted", "plain")
CONTENT_FAULTS = ("cut_json", "thinks", "declines", "declines_apart", "other_schema", "filtered", "empty")


def truth(url, seed, max_pairs):
    """What the model writes about a picture; for one of eight that there is nothing to do."""
    digest = hashlib.sha256(f"{url} {seed}".encode()).hexdigest()
    if digest[0] in "01":
        return []
    agent = f"Fox {digest[:6]}"
    return [
        TaskPair(
            f"[{agent}]: Walk to gate {digest[8:12]} {i}.",
            f"{agent} turns to the left, trots past the log and stops at the gate ({i}). The camera is fixed.",
            agent,
            "navigation",
        )
        for i in range(max_pairs)
    ]


def colour_of(url):
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))))
    red, _, blue = pixels.reshape(-1, 3).mean(0)
    return "red" if red > blue else "blue"


class AnnotationServer(FakeServer):
    """Styles: `vllm_new` takes a JSON schema; `vllm_old` takes `structured_outputs` alone; `hosted` takes a JSON schema
    and none of vLLM's fields, and counts tokens otherwise; `plain` takes neither, and answers in prose.
    """

    blind = False
    max_pairs = 3

    def _refusal(self, body):
        output = body.get("response_format", {}).get("type")
        if output == "json_schema" and self.style in ("vllm_old", "plain"):
            return "response_format: json_schema is not supported"
        if "structured_outputs" in body and self.style in ("hosted", "plain"):
            return "Extra inputs are not permitted: structured_outputs"
        if self.style == "hosted" and "chat_template_kwargs" in body:
            return "Unrecognized request argument supplied: chat_template_kwargs"
        if self.style == "hosted" and "max_tokens" in body:
            return "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        if self.style == "hosted" and body.get("temperature", 1) != 1:
            return "Unsupported value: 'temperature' does not support 0.7 with this model."
        return None

    def _reply(self, body, fault):
        (url,), question = parts_of(body)
        if question == PROBE:
            scene = "red" if self.blind else colour_of(url)
            content = json.dumps({"scene": scene, "possible": False, "pairs": []})
        else:
            pairs = [
                {"task": p.task, "solution": p.solution, "kind": p.kind}
                for p in truth(url, body.get("seed"), self.max_pairs)
            ]
            content = json.dumps({"scene": "A fox.", "possible": bool(pairs), "pairs": pairs})
        if self.style == "plain":
            content = f"Here is what I see:\n```json\n{content[:-1]},}}\n```\nDone."
        message, finish = {"role": "assistant", "content": content, "refusal": None}, "stop"
        match fault:
            case "cut_json":
                message["content"], finish = content[: len(content) // 2], "length"
            case "thinks":
                message["content"], finish = f"<think>Let me see. {content[:100]}", "length"
            case "thinks_apart":
                message["reasoning"] = f"Perhaps {content}"
            case "declines":
                message["content"] = "I'm sorry, but I cannot help with this picture."
            case "declines_apart":
                message["content"], message["refusal"] = None, "I cannot help with that."
            case "other_schema":
                message["content"] = json.dumps({"answer": {"actions": ["walk", "sit"], "who": "fox"}})
            case "filtered":
                message["content"], finish = "", "content_filter"
            case "empty":
                message["content"] = None
            case "tells_key":
                message["content"] = content.replace("gate", f"gate {self.key}")
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 70, "completion_tokens": 30, "total_tokens": 100},
        }
