"""Rows of unknown field names: several plausible layouts, and random ones."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.effort import FUZZ
from world_distill.data import field_names
from world_distill.data.images.files import File
from world_distill.data.images.rows import parse_line
from world_distill.data.worldtasks.fields import ALIASES, Item, Schema, Unusable

TASK, SOLUTION = "[Person in blue shirt]: Move forward.", "Description: A person walks."
OTHER = "[First person view]: Turn left."


def read(*rows, **options):
    schema, file = Schema(**options), File("x/rows.jsonl", "rows.jsonl")
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return [item for n, line in enumerate(lines, 1) for item in schema.items(parse_line(file, n, line))], schema


def texts(found):
    return [(i.image, i.task, i.solution) if isinstance(i, Item) else i.reason for i in found]


WHOLE = ("a.png", TASK, "A person walks.")
LAYOUTS = {
    "row per pair": {"image": "a.png", "task": TASK, "solution": SOLUTION},
    "prompts": {"file_name": "a.png", "task_prompt": TASK, "solution_prompt": SOLUTION},
    "other case": {"Image-Path": "a.png", "Task Prompt": TASK, "Detailed Prompt": SOLUTION},
    "caption": {"image_path": " a.png ", "prompt": TASK, "caption": f"{SOLUTION}\n"},
    "object for the image": {"image": {"bytes": None, "path": "a.png"}, "instruction": TASK, "description": SOLUTION},
    "list of objects": {"image": "a.png", "tasks": [{"task": TASK, "solution": SOLUTION}]},
    "list under another name": {"image": "a.png", "pairs": [{"prompt": TASK, "caption": SOLUTION}]},
    "objects by number": {"image": "a.png", "annotations": {"0": {"task": TASK, "solution": SOLUTION}}},
    "one object": {"image": "a.png", "task": {"task": TASK, "solution": SOLUTION}},
    "list of pairs": {"image": ["a.png"], "task_solution_pairs": [[TASK, SOLUTION]]},
    "two lists": {"image": "a.png", "tasks": [TASK], "solutions": [SOLUTION]},
    "two lists, singular": {"image": "a.png", "task": [TASK], "solution": [SOLUTION]},
    "image's own caption": {"image": "a.png", "caption": "A room.", "tasks": [{"task": TASK, "solution": SOLUTION}]},
    "agent beside": {"image": "a.png", "task": "Move  forward.", "actor": "Person in blue shirt", "caption": SOLUTION},
    "boxes beside": {"image": "a.png", "task": TASK, "solution": SOLUTION, "annotations": [{"box": 1}], "items": {}},
}  # fmt: skip


ANSWER = f"<think>Let me see.</think>\n```json\n{json.dumps({'pairs': [{'task': TASK, 'solution': SOLUTION}]})}\n```"
LAYOUTS |= {
    "task to solution": {"image": "a.png", "tasks": {TASK: SOLUTION}},
    "task to object": {"image": "a.png", "tasks": {TASK: {"caption": SOLUTION}}},
    "numbered fields": {"image": "a.png", "task_0": TASK, "solution_0": SOLUTION},
    "numbered, other names": {"image": "a.png", "Prompt1": TASK, "Detailed-Prompt1": SOLUTION, "prompt_note": "x"},
    "lists by number": {"image": "a.png", "tasks": {"0": TASK}, "solutions": {"0": SOLUTION}},
    "JSON in a text": {"image": "a.png", "response": json.dumps([{"task": TASK, "solution": SOLUTION}])},
    "map as JSON in a text": {"image": "a.png", "tasks": json.dumps({TASK: SOLUTION})},
    "list as JSON in a text": {"image": "a.png", "task": json.dumps([TASK]), "solution": json.dumps([SOLUTION])},
    "a model's answer": {"image": "a.png", "response": ANSWER},
    "an answer in lines": {"image": "a.png", "output": f"Sure:\n{TASK}\n{SOLUTION}"},
    "a conversation": {
        "id": "x", "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat now?"}, {"from": "gpt", "value": ANSWER}],
    },
    "messages": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": "?"}, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ],
    },
    "labels": {"image": "a.png", "task": f"Task: {TASK}", "solution": "**Detailed description:** A person walks."},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    found, schema = read(LAYOUTS[layout])
    assert texts(found) == [WHOLE] and found[0].agent == "Person in blue shirt"
    assert schema.report()["fields"]["task"].popitem()[1] == 1


def test_numbered_fields_are_in_the_order_of_their_numbers_and_none_is_reported_unused():
    row = {"image": "a.png", "licence": "CC0", "source_url": "u"}
    for i in (2, 10, 0, 1):
        row |= {f"task_{i}": f"[hand]: Do {i}.", f"solution_{i}": f"Solution: It does {i}."}
    found, schema = read(row)
    assert texts(found) == [("a.png", f"[hand]: Do {i}.", f"It does {i}.") for i in (0, 1, 2, 10)]
    assert schema.report()["unused"] == {} and found[0].origin == {"licence": "CC0", "url": "u"}
    found, _ = read({"image": "a.png", "task_0": TASK, "task_1": OTHER, "solution_1": SOLUTION})
    assert texts(found) == ["no_solution", ("a.png", OTHER, "A person walks.")]


@pytest.mark.parametrize(
    "text, kept",
    [
        ("Description: A hand.", "A hand."),
        ("**Solution 2:** A hand.", "A hand."),
        ("caption :A hand.", "A hand."),
        ("Description:", "Description:"),
        ("The description: a hand.", "The description: a hand."),
        ("Prompted: a hand.", "Prompted: a hand."),
        ("A hand: it moves.", "A hand: it moves."),
    ],
)
def test_labels_in_front_of_texts(text, kept):
    assert field_names.without_label(text) == kept


def test_eight_tasks_a_row_keep_their_numbers_and_what_is_the_images():
    tasks = [{"id": f"t{i}", "task": f"[hand]: Do {i}.", "solution": SOLUTION} for i in range(8)]
    found, schema = read({"image": "a.png", "id": "100_4", "category": "push", "tasks": tasks})
    assert [(i.line, i.number, i.id, i.kind) for i in found] == [(1, n, f"t{n}", "push") for n in range(8)]
    assert schema.report()["rows_with_a_list"] == 1


@pytest.mark.parametrize(
    "row, reasons",
    [
        (b"{", ["not_json"]),
        (b"[" * 100_000, ["not_json"]),
        (b'"text"', ["not_an_object"]),
        (b'{"image": "a", "task": "[a]: b", "task": "[a]: c", "solution": "s"}', ["repeated_key"]),
        ({"image": "a", "task": TASK, "Task": OTHER, "solution": "s"}, ["repeated_key"]),
        ({"image": "a", "note": 1, "Note": 2, "task": TASK, "solution": "s"}, [("a", TASK, "s")]),
        ({"task": TASK, "solution": SOLUTION}, ["no_image"]),
        ({"image": 3, "task": TASK, "solution": SOLUTION}, ["no_image"]),
        ({"image": "a", "solution": SOLUTION}, ["no_task"]),
        ({"image": "a", "task": TASK, "solution": " "}, ["no_solution"]),
        ({"image": "a", "task": "Move.", "solution": SOLUTION}, ["no_agent"]),
        ({"image": "a", "task": "[ ]: Move.", "solution": SOLUTION}, ["no_agent"]),
        ({"image": "a", "tasks": [TASK, OTHER], "solutions": [SOLUTION]}, ["uneven_lists"]),
        ({"image": "a", "tasks": [TASK, None], "solutions": ["s", "s"]}, [("a", TASK, "s"), "no_task"]),
        ({"image": "a", "tasks": [{"task": TASK, "solution": "s"}, 7]}, [("a", TASK, "s"), "no_task"]),
        # The caption of an image is no solution of its tasks.
        ({"image": "a", "caption": "A room.", "tasks": [{"task": TASK}]}, ["no_solution"]),
    ],
)
def test_what_cannot_be_used_has_a_reason(row, reasons):
    found, _ = read(row)
    assert texts(found) == reasons
    assert all(isinstance(i, Item) or i.as_json()["line"] == 1 for i in found)


def test_of_several_texts_the_task_is_the_one_that_names_an_agent():
    found, schema = read({"image": "a", "task": "navigation", "prompt": TASK, "solution": "s"})
    assert texts(found) == [("a", TASK, "s")]
    assert schema.report()["ambiguous"] == [{"field": "task", "taken": "prompt", "not": "task", "tasks": 1}]


def test_agent_of_tasks_without_one():
    found, _ = read({"image": "a", "task": "Move.", "solution": "s"}, agent="robot")
    assert (found[0].task, found[0].agent) == ("[robot]: Move.", "robot")
    found, _ = read({"image": "a", "task": TASK, "solution": "s"}, agent="robot")
    assert found[0].agent == "Person in blue shirt"


def test_a_benchmark_needs_no_solution():
    found, _ = read({"image": "a", "task": TASK}, {"image": "a", "task": OTHER, "solution": "s"}, needs_solution=False)
    assert [i.solution for i in found] == ["", "s"]


def test_ambiguous_names_are_reported_and_may_be_settled():
    row = {"image": "a", "task": TASK, "prompt": SOLUTION, "caption": "A room.", "note": 1, "image_id": "100_4"}
    found, schema = read(row, row)
    report = schema.report()
    assert texts(found) == [("a", TASK, "A room.")] * 2 and found[0].id == "100_4"
    assert report["ambiguous"] == [{"field": "task", "taken": "task", "not": "prompt", "tasks": 2}]
    assert report["unused"] == {"note": 2, "prompt": 2}
    found, schema = read(row, fields={"solution": "Prompt"})
    assert texts(found) == [("a", TASK, "A person walks.")] and schema.report()["ambiguous"] == []
    assert texts(read({"image": "a", "what": [[TASK, "s"]]}, fields={"tasks": "what", "task": "w"})[0]) == [
        ("a", TASK, "s")
    ]
    with pytest.raises(ValueError, match="no field picture"):
        Schema({"picture": "a"})


NAMES = st.sampled_from(sorted({name for names in ALIASES.values() for name in names})) | st.text(max_size=6)
TEXTS = st.text(max_size=12) | st.sampled_from([TASK, SOLUTION, "a.png", "../a", "/etc/a"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=4) | st.dictionaries(NAMES, v, max_size=4), max_leaves=8)


@settings(max_examples=200 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(NAMES, VALUES, max_size=8), st.booleans())
@example({"task": {"task": TASK}, "image": "a", "tasks": {}}, False)
def test_any_row_is_items_or_reasons(row, bench):
    found, schema = read(json.dumps(row).encode("utf-8", "surrogatepass"), needs_solution=not bench)
    assert found
    for item in found:
        if isinstance(item, Unusable):
            assert json.dumps(item.as_json()) and item.reason.isidentifier()
        else:
            assert item.task.startswith(f"[{item.agent}]: ") and item.agent and item.image
            assert "\n" not in item.task and (item.solution or bench)
            (item.task + item.solution + item.id + item.kind).encode()
    json.dumps(schema.report()).encode()


@settings(max_examples=200 * FUZZ, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_items_or_reasons(line):
    assert read(line)[0]
