"""What a VLM thought before or while it answered, told from the answer.

Families mark their thoughts differently; servers leave the marks in, take them out, or put the thoughts elsewhere:

    <think>...</think>                          Qwen, DeepSeek, GLM, InternVL; also thinking, thought, reasoning, ...
    <seed:think>...</seed:think>                any such word with its family before it
    ◁think▷...◁/think▷                          Kimi
    [THINK]...[/THINK]                          Mistral
    <|START_THINKING|>...<|END_THINKING|>       Cohere
    <|channel|>analysis<|message|>...<|end|>    gpt-oss; <|channel>thought ...<channel|> of Gemma 4
    <unused94>thought ...<unused95>             MedGemma
    [BEGIN FINAL RESPONSE]                      Apriel: all before it is thought
"""

import re

_WORD = r"(?:think|thinking|thought|thoughts|reason|reasoning|reflection|scratchpad|analysis|inner_monologue|planning)"
_OPENS = re.compile(
    rf"<(?:[a-z]{{1,20}}:)?{_WORD}\b[^<>/]{{0,40}}>|◁{_WORD}▷|\[THINK\]|<\|START_THINKING\|>|<\|think\|>"
    r"|<\|channel\|>\s*(?:analysis|commentary|thought)[^<]{0,60}<\|message\|>"
    r"|<\|channel>\s*(?:analysis|commentary|thought)\b|<unused94>",
    re.IGNORECASE,
)
_CLOSES = re.compile(
    rf"</(?:[a-z]{{1,20}}:)?{_WORD}\b[^<>]{{0,40}}>|◁/{_WORD}▷|\[/THINK\]|<\|END_THINKING\|>"
    r"|<\|end\|>|<\|channel\|>\s*final[^<]{0,60}<\|message\|>|<channel\|>|<unused95>"
    r"|assistantfinal\b|\[BEGIN FINAL RESPONSE\]",
    re.IGNORECASE,
)
# What stands around an answer and is none of it.
_AROUND = re.compile(
    r"</?(?:answer|response|output|final_answer)>|<\|(?:begin|end)_of_box\|>|<\|(?:START|END)_RESPONSE\|>"
    r"|\[END FINAL RESPONSE\]|<\|start\|>\s*(?:assistant)?|<\|(?:return|im_end|eot_id|end)\|>"
    r"|<\|channel\|>\s*final[^<]{0,60}<\|message\|>",
    re.IGNORECASE,
)


def split_thoughts(text: str) -> tuple[str, str]:
    """(the text without thoughts, the last thought if it is not closed, else "")."""
    marks = [(m.start(), m.end(), opens) for opens, p in ((True, _OPENS), (False, _CLOSES)) for m in p.finditer(text)]
    kept: list[str] = []
    start, inside = 0, False
    for begin, end, opens in sorted(marks):
        if begin < start:
            continue
        if not opens:
            # Begun or not: some templates open the thoughts themselves. But what ends a turn ends no thought that was
            # not begun.
            if inside or text[begin:end].lower() != "<|end|>":
                start, inside = end, False
        elif not inside:
            kept.append(text[start:begin])
            start, inside = end, True
    open_thought = text[start:] if inside else ""
    answer = "\n".join(kept if inside else [*kept, text[start:]])
    return _AROUND.sub("\n", answer), open_thought


def without_thoughts(text: str) -> str:
    """The text without what the model thought before or while it answered."""
    return split_thoughts(text)[0]
