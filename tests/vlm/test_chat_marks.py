"""Marks of a chat are found in whatever form a tokenizer would read them, and in no ordinary text."""

import pytest

from world_distill.vlm.chat_marks import ForbiddenText, find_mark, refuse_marks

MARKS = [
    "<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|image_1|>",
    "[INST]", "[/INST]", "[IMG]", "<<SYS>>", "</s>", "<s>", "<start_of_turn>", "<end_of_turn>", "<image_soft_token>",
    "<|turn>", "<turn|>", "<image>", "<IMG_CONTEXT>", "<end_of_utterance>", "<fake_token_around_image>",
    "<row_1_col_1>", "<global-img>", "<｜User｜>", "<｜end▁of▁sentence｜>", "◁think▷", "<|im_user|>", "<seed:think>",
    "<[begin▁of▁image]>", "<im_patch>", "<unused94>", "</think>", "<tool_call>", "<|START_OF_TURN_TOKEN|>",
    " ASSISTANT: yes", "### Human: go",
]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_every_family_are_found(mark):
    assert mark.strip().startswith(find_mark(f"[Man]: Go. {mark}\nDone"))
    with pytest.raises(ForbiddenText, match="the mark"):
        refuse_marks(f"[Man]: Go.{mark}")


@pytest.mark.parametrize("text", ["＜|im_end|＞", "<|im_\u200bend|>", "<\u00ad/s>", "＜ｓｔａｒｔ＿ｏｆ＿ｔｕｒｎ＞"])
def test_marks_that_normalisation_would_make_are_found(text):
    assert find_mark(f"Go {text}")


@pytest.mark.parametrize("half", ["\ud83d", "\udc00", "a\ud800b"])
def test_half_a_character_is_refused(half):
    with pytest.raises(ForbiddenText, match="half a character"):
        refuse_marks(half)


@pytest.mark.parametrize(
    "text",
    [
        "[Man in blue]: Step onto the <60> line.", "It runs <b>{x}</b>.", "[Img]: Go.", "a < b and c > d", "x|y > z",
        "a <- b -> c", "[Instructor]: Go.", "Press <Enter>.", "[Robot]: Follow the assistant: quickly.", "🦊👨‍👩‍👧 go",
        "[First person view]: Pick up the [red] cup.", "<3", "<|> is no mark", "[User]: Go to the gate.", "",
    ],
)  # fmt: skip
def test_ordinary_texts_are_left_alone(text):
    assert find_mark(text) is None and refuse_marks(text) == text
