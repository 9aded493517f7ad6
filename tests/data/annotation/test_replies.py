"""A reply of a server is read for what the model answered, and for nothing else."""

import json

import pytest

from world_distill.data.annotation.prompt import load_prompt
from world_distill.data.annotation.request import read_pairs


def read(message, **fields):
    return read_pairs(json.dumps({"choices": [{"message": message} | fields]}), str, load_prompt())


def test_only_what_is_written_is_read():
    assert read({"content": [{"type": "text", "text": "[]"}]}).nothing_to_do
    for message in (None, 3, {"content": 3}, {"content": [3, {"type": "text"}]}, {"reasoning": "[]"}):
        parsed = read(message)
        assert not parsed.pairs and not parsed.nothing_to_do and parsed.problems == ("it is empty",)


def test_an_answer_of_the_longest_length_counts_as_cut_off():
    lines = {"content": "[Fox]: Run to the gate.\nDescription: The fox runs to the"}
    assert read(lines, finish_reason="length").cut_off and not read(lines, finish_reason="stop").cut_off


PAIR = {
    "task": "[Man in blue]: Close the door.", "kind": "interaction",
    "solution": "The man in blue turns and pulls the door shut with his right hand; the camera remains fixed.",
}  # fmt: skip


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_an_answer_that_was_taken_for_a_thought_is_read_if_it_was_finished(field):
    answer = json.dumps({"pairs": [PAIR]})
    for text in (answer, f"Let me see.\n{answer}"):
        (pair,) = read({"content": None, field: text}, finish_reason="stop").pairs
        assert pair.task == PAIR["task"]
    for text, finish in ((answer, "length"), (f"{answer} Is that right?", "stop"), (PAIR["task"], "stop")):
        assert not read({"content": None, field: text}, finish_reason=finish).pairs
    assert read({"content": "[]", field: answer}, finish_reason="stop").nothing_to_do


def test_the_prompts_own_example_is_no_answer():
    example = load_prompt().format.partition("for another picture:")[2]
    parsed = read({"content": example})
    assert not parsed.pairs and not parsed.nothing_to_do and "repeat the prompt's own example" in parsed.problems[0]
    (shown,) = json.loads(example)["pairs"]
    changed = PAIR | {"solution": shown["solution"].upper().replace("'", "\u2019")}
    assert not read({"content": json.dumps({"pairs": [changed]})}).pairs
    both = read({"content": json.dumps({"pairs": [shown, PAIR]})})
    assert [pair.task for pair in both.pairs] == [PAIR["task"]] and len(both.problems) == 1
