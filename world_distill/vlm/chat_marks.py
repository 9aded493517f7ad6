"""The marks that order a chat, which no text of a task may hold.

A tokenizer turns `<|im_end|>` into the token that ends a turn, wherever it stands: a task that holds it could pass for
another speaker, or for a picture. Local models know their own marks; a server does not tell them. So the marks of all
families are refused, wherever a text comes from.
"""

import re
import unicodedata

# Single words that are marks only between angle brackets.
_WORDS = (
    "s", "bos", "eos", "pad", "unk", "mask", "sep", "cls", "image", "images", "img", "video", "audio", "patch", "slice",
    "quad", "ref", "box", "point", "think", "thinking", "thought", "reasoning", "answer", "response", "system", "user",
    "assistant", "human", "model", "tool", "function",
)  # fmt: skip
# Mistral's, which look like a task's agent: only these words.
_BRACKETED = (
    "INST", "IMG", "IMG_BREAK", "IMG_END", "SYSTEM_PROMPT", "AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS",
    "TOOL_CONTENT", "TOOL_CALL", "CALL_ID", "ARGS", "THINK", "AUDIO", "BEGIN_AUDIO", "MODEL_SETTINGS", "PREFIX",
    "MIDDLE", "SUFFIX", "CLS", "SEP", "PAD", "UNK", "MASK", "gMASK", "sop",
)  # fmt: skip
_MARK = re.compile(
    r"<[|｜][^\s<>|｜][^<>|｜\n]{0,60}[|｜]?>"  # <|im_end|> <|eot_id|> <｜User｜>: Qwen, Llama, DeepSeek
    r"|<[A-Za-z_]{1,30}[|｜]>"  # <turn|>: Gemma 4
    r"|</?\[?[A-Za-z0-9]{1,20}(?:[_:▁-][A-Za-z0-9]{1,20}){1,6}\]?/?>"  # <start_of_turn> <seed:think> <row_1_col_1>
    rf"|</?(?:{'|'.join(_WORDS)})\s*/?>"  # </s> <image> </think>
    r"|<<\s*/?\s*SYS\s*>>"  # Llama 2
    rf"|\[/?(?-i:{'|'.join(_BRACKETED)})\]"  # [INST] [/INST]
    r"|◁\s*/?\s*\w{1,30}\s*▷"  # ◁think▷: Kimi
    r"|<unused\d{1,4}>"  # MedGemma's thoughts
    r"|(?<![\w\[])(?-i:USER|ASSISTANT|SYSTEM|###\s?(?:Human|Assistant|System|Instruction|Response)):",  # Vicuna
    re.IGNORECASE,
)
_HALF = re.compile("[\ud800-\udfff]")


class ForbiddenText(ValueError):
    """A text holds a mark that orders a chat, or half a character: it is not sent to a model."""


def find_mark(text: str) -> str | None:
    """The first mark in a text, or "half a character" for a lone surrogate; None if it has neither.

    Also found are marks that a tokenizer's normalisation would make: with full-width letters or invisible characters.
    """
    if _HALF.search(text):
        return "half a character"
    match = _MARK.search(text)
    if match is None and not text.isascii():
        visible = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc") or c in "\n\t")
        match = _MARK.search(unicodedata.normalize("NFKC", visible))
    return match[0] if match else None


def refuse_marks(text: str) -> str:
    """The same text. Raises ForbiddenText, naming the mark, if it has one."""
    if (mark := find_mark(text)) is not None:
        shown = mark if mark == "half a character" else f"the mark {mark!r}"
        raise ForbiddenText(f"a text for the VLM has {shown} in it, which could pass for another speaker or a picture")
    return text
