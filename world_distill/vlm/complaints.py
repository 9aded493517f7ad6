"""What a server's refusal says: its own words, the field that it means, and what would help.

Servers put their words into the body in many forms: {"error": {"message"}}, a list of that, FastAPI's
{"detail": [{"loc", "msg"}]}, an event stream, a page of a gateway, JSON of another server as a text inside their own.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

_SHOWN = 400  # characters
_KEYS = (
    "error", "errors", "detail", "details", "message", "msg", "error_description", "description", "fieldViolations",
    "reason", "title", "metadata", "raw", "failed_generation",
)  # fmt: skip
_DATA_URL = re.compile(r"data:image/[^\s'\"]{40,}")
_EVENT = re.compile(r"^data:[ \t]*(\{.*|\[.*)$", re.MULTILINE)
_PAGE = re.compile(r"<(?:!doctype|html|head|body|\?xml)", re.IGNORECASE)

# Words, what they mean, and the flag of each kind of server that mends it ("" for all).
_ADVICE: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        r"at most \d+ image|image count \d+ exceeds|too many images|images?.{0,30}exceeds?.{0,20}(?:limit|max)"
        r"|limit.mm|number of images",
        "the server takes fewer pictures a request than are sent: allow more, or send fewer frames",
        {"vllm": "--limit-mm-per-prompt '{\"image\": N}'", "sglang": "--limit-mm-data-per-request '{\"image\": N}'"},
    ),
    (
        r"mmproj|image input is not supported|images? (?:is|are) not supported|support(?:s)? image input"
        r"|(?:not|doesn.t|does not) support (?:image|vision|visual|multi.?modal|pictures)|not (?:a )?multi.?modal"
        r"|(?:multi.?modal|vision|image_url).{0,60}(?:not (?:supported|enabled)|unsupported|only supported)"
        r"|unknown (?:content )?(?:part )?type.{0,20}image|no (?:multi.?modal|vision)",
        "the model, as it is served, takes no pictures: serve a vision-language model",
        {"llamacpp": "--mmproj FILE, beside --model", "sglang": "--enable-multimodal",
         "vllm": "no --language-model-only", "transformers": "a model of the class image-text-to-text"},
    ),
    (
        r"context (?:length|size|window)|max_?model_?len|prompt is too long|input.{0,30}too long|longer than the max"
        r"|exceeds?.{0,40}(?:tokens|context|length|seq)|too many tokens|session.?len",
        "the request is longer than the server's context: make that longer, or take fewer frames or a smaller max_side",
        {"vllm": "--max-model-len", "sglang": "--context-length", "llamacpp": "-c (shared by the -np slots)",
         "lmdeploy": "--session-len"},
    ),
    (
        r"log_?probs",
        "the server does not give log-probabilities as they are asked for",
        {"vllm": "--max-logprobs 20", "sglang": "no --speculative-algorithm that excludes them"},
    ),
    (
        r"chat.?template(?!_kwargs)",
        "the model as served has no chat template: take an instruction-tuned model, or give it a template",
        {"vllm": "--chat-template FILE", "sglang": "--chat-template FILE", "lmdeploy": "--chat-template FILE",
         "llamacpp": "--jinja --chat-template-file FILE"},
    ),
    (
        r"content.?filter|safety|moderation|policy|blocked",
        "a filter of the server holds requests back",
        {},
    ),
)  # fmt: skip
_NAMES = {
    "vllm": "vLLM", "sglang": "SGLang", "llamacpp": "llama.cpp", "lmdeploy": "LMDeploy",
    "transformers": "transformers serve",
}  # fmt: skip
_NEVER = re.compile(rf"{_ADVICE[1][0]}|not implemented|unsupported|not supported", re.IGNORECASE)


def server_words(body: str) -> str:
    """The message in the body of a refusal; the beginning of the body where none is known to be one; "" for none."""
    text = _DATA_URL.sub("data:image/...", body.strip()[:200_000])
    values = [value for part in (_EVENT.findall(text) or [text]) if (value := _json(part)) is not None]
    found = [words for value in values for words in _messages(value, 0)]
    if not found:
        begun = " ".join(text[: 2 * _SHOWN].split())
        return f"a page that begins {begun[:200]!r}" if is_page(body) else begun[:_SHOWN]
    return "; ".join(dict.fromkeys(found))[:_SHOWN]


def is_page(body: str) -> bool:
    """Whether the body is a page for people: of a gateway or a proxy, and not of a model's server."""
    return _PAGE.match(body.lstrip()[:20]) is not None


def named_fields(words: str, fields: Collection[str]) -> list[str]:
    """Those of a request's fields that a refusal names, in the order of `fields`; quoted names before others."""
    whole = {name: re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])") for name in fields}
    quoted = {name: re.compile(rf"(?:['\"`]|body\.|param |name: ){re.escape(name)}(?![\w-])") for name in fields}
    for patterns in (quoted, whole):
        if found := [name for name in fields if patterns[name].search(words)]:
            return found
    return []


def is_final(words: str) -> bool:
    """Whether a server's error of status 500 will not pass by itself: it says that it cannot do such a thing."""
    return _NEVER.search(words) is not None


def advice(words: str, kind: str = "") -> str:
    """What a refusal in these words asks for, with the flag of this kind of server, or of all; "" if not known."""
    for pattern, text, flags in _ADVICE:
        if re.search(pattern, words, re.IGNORECASE):
            chosen = {kind: flags[kind]} if kind in flags else flags
            shown = ", ".join(f"{_NAMES[name]}: {flag}" for name, flag in chosen.items())
            return f"{text} ({shown})" if shown else text
    return ""


def server_kind(models: Any) -> str:
    """The kind of server, by its list of models: "vllm", "sglang", "llamacpp", "lmdeploy", or "" for any other."""
    try:
        owner = str(models["data"][0].get("owned_by", "")).lower().replace(".", "")
    except (KeyError, IndexError, TypeError, AttributeError):
        return ""
    return owner if owner in _NAMES else ""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _messages(value: Any, depth: int) -> Iterator[str]:
    """What is said, from the outside in."""
    if depth > 8:
        return
    if isinstance(value, str) and value.strip():
        inner = _json(value) if value.lstrip()[:1] in "{[" else None
        nested = list(_messages(inner, depth + 1)) if isinstance(inner, (dict, list)) else []
        yield from nested or [" ".join(value.split())]
    elif isinstance(value, list):
        for item in value[:20]:
            yield from _messages(item, depth + 1)
    elif isinstance(value, Mapping):
        place = value.get("loc") or value.get("field")
        text = ".".join(map(str, place)) if isinstance(place, list) else place
        before = f"{text}: " if isinstance(text, str) and text else ""
        for key in _KEYS:
            for words in _messages(value.get(key), depth + 1):
                yield before + words
        if isinstance(value.get("param"), str) and value["param"]:
            yield f"param {value['param']}"
