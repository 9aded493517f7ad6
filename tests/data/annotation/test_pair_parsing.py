"""Answers of VLMs: the forms that they come in are understood, and nothing else becomes a pair.

WORLD_DISTILL_FUZZ=100 fuzzes with so many times more inputs.
"""

import json
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.effort import FUZZ
from world_distill.data.annotation.loose_json import find_values
from world_distill.data.annotation.pair_parsing import parse_pairs
from world_distill.data.annotation.pair_rules import Rules, check_pair
from world_distill.data.annotation.prompt import load_prompt
from world_distill.interfaces import TaskPair

TOLD = "The fox in the snow lifts its head, trots to the left past the log, and stops at the gate. The camera is fixed."
FOX = TaskPair("[Fox in the snow]: Go to the gate.", TOLD, "Fox in the snow", "navigation")
OWL = TaskPair("[Owl]: Land on the log.", TOLD.replace("fox in the snow", "owl"), "Owl", "other")
ITEMS = [{"task": p.task, "solution": p.solution, "kind": p.kind} for p in (FOX, OWL)]
WHOLE = json.dumps({"scene": "A fox and an owl.", "possible": True, "pairs": ITEMS})
LINES = f"{FOX.task}\nDescription: {FOX.solution}\n\n{OWL.task}\nDescription: {OWL.solution}"
NUMBERED = (
    f"Here are two tasks.\n\n1. **Task:** {FOX.task}\n   **Description:** {FOX.solution}\n   Kind: Navigation\n\n"
    f"2. **[Owl]**: Land on the log.\n   - **Solution**: {OWL.solution}\n"
)


DRAFT = WHOLE.replace("gate", "fence")
THOUGHTS = [
    ("◁think▷", "◁/think▷"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"), ("<thinking>", "</thinking>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|channel>thought\n", "<channel|>"), ("<unused94>", "<unused95>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"), ("<REASONING>", "</REASONING>"),
    ("", "</think>"), ("<think>x</think>", "◁/think▷"), ("<mm:think>", "</mm:think>"),
]  # fmt: skip


def understood(text):
    parsed = parse_pairs(text)
    assert not parsed.nothing_to_do and not parsed.cut_off
    return list(parsed.pairs)


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        f"Sure! Here they are [as asked]:\n```json\n{json.dumps(ITEMS, indent=2)}\n```\nTell me if {{more}} is needed.",
        WHOLE.replace("}]", "},],").replace('"pairs"', '// two\n "pairs" /* of them */'),
        WHOLE.replace("true", "True"),
        f"<think>Is {{it}} [possible]? {ITEMS[:1]}</think>\n{WHOLE}",
        f'The fox could {{"task": "[Fox]: Run.", ... </think>{WHOLE}',
        f"{json.dumps(ITEMS[:1])} is one. </think>{WHOLE}",
        f"{WHOLE}\n<think>Was that right? {json.dumps(ITEMS)}",
        "\n".join(map(json.dumps, ITEMS)),
        json.dumps({"result": {"Task Pairs": [{"Instruction": i["task"], "Detailed-Prompt": i["solution"],
            "category": i["kind"], "id": 7} for i in ITEMS]}}),  # fmt: skip
        json.dumps([{"agent": f"[{p.agent}]", "task": p.task.split("]: ")[1], "description": p.solution, "type": p.kind}
            for p in (FOX, OWL)]),  # fmt: skip
        json.dumps([{"task": p.task, "solution": p.solution.split(" ", 9), "skill": p.kind} for p in (FOX, OWL)]),
        json.dumps([LINES.split("\n\n")[0] + "\nKind: navigation", LINES.split("\n\n")[1]]),
        NUMBERED,
        LINES.replace("\n\n", "\nKind: navigation\n\n"),
        LINES.replace("\n\n", "\nKind: navigation\n\n").replace("\n", "\r\n").replace("Go to", "G\x1eo to"),
        json.dumps(ITEMS).replace('"', "'"),
        '{"pairs": [{"task": [}, "solution": oh no}' + WHOLE[WHOLE.index("pairs") + 8 :],
        WHOLE.replace('"', "”"),
        WHOLE.replace('{"', "{“").replace('":', "”:").replace(', "', ", “").replace(': "', ": “").replace('"', "”"),
        WHOLE.replace('"', "＂"),
        f"<think>\nLet me see.\n{WHOLE}",
        f"<think>{WHOLE}",
        f"<think>Perhaps {DRAFT}.\n```json\n{WHOLE}\n```",
        *(f"{opens}Perhaps {DRAFT}{closes}{WHOLE}" for opens, closes in THOUGHTS),
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{WHOLE}<|return|>",
        f"analysisPerhaps {DRAFT}assistantfinal{WHOLE}",
        f"My thoughts: {DRAFT}\n[BEGIN FINAL RESPONSE]\n{WHOLE}\n[END FINAL RESPONSE]",
        f"<answer><|begin_of_box|>{WHOLE}<|end_of_box|></answer><|end|>",
        f"A first draft:\n{DRAFT}\nNow the left is meant, so:\n{WHOLE}",
        f"{DRAFT}\n{WHOLE}\nBoth rest on [1].",
    ],
)  # fmt: skip
def test_forms_that_are_understood(text):
    pairs = understood(text)
    assert pairs == [FOX, OWL]


def test_a_broken_item_costs_no_other():
    text = WHOLE.replace('"task": "[Owl]', '"task": "[Owl" "]').replace("}]", "}, " + json.dumps(ITEMS[0]) + "]")
    text = text.replace(', "solution": "The owl', ' "solution": "The owl')
    assert understood(text) == [FOX, FOX]


@pytest.mark.parametrize(
    "inner",
    ['the "log"', 'the sign "EXIT" above', 'the "A", then the "B"', '"that"', 'the "log" and, as it "were", there'],
)
def test_quotes_inside_a_text_need_not_be_escaped(inner):
    for text in (WHOLE, json.dumps(ITEMS, indent=1)):
        first, second = understood(text.replace("Land on the log", f"Land on {inner}"))
        assert first == FOX and second.task == f"[Owl]: Land on {inner}." and second.solution == OWL.solution


def test_a_text_that_runs_on_into_the_next_key_is_none():
    parsed = parse_pairs(
        '{"pairs": [{"task": "[Owl]: Land on the log. "solution": "It lands on the log there.", "x": 1}]}'
    )
    assert not parsed.pairs and parsed.problems


def test_a_thought_without_an_end_holds_no_answer_if_it_was_cut_off():
    text = f"<think>Perhaps {WHOLE}"
    assert understood(text) == [FOX, OWL]
    assert not parse_pairs(text, finished=False).pairs
    for later in (" or not", "?", "\n[1, 2"):
        assert not parse_pairs(text + later).pairs
    assert parse_pairs(f"{DRAFT}<think>{WHOLE}").pairs[0].task == FOX.task.replace("gate", "fence")
    assert not parse_pairs(f"<think>The list [1, 2] {json.dumps(ITEMS)}").pairs  # a list may be anything


def test_what_comes_last_counts_even_if_it_is_nothing():
    assert parse_pairs(f'{DRAFT}\nNo: {{"possible": false, "pairs": []}}').nothing_to_do
    parsed = parse_pairs(f"{DRAFT}\n{WHOLE[:-30]}")
    assert parsed.cut_off and parsed.pairs[0].task == FOX.task.replace("gate", "fence")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"possible": false, "pairs": []}',
        '{"feasible": "false"}',
        "None.",
        "```\n[]\n```",
        '{"scene": "A logo.", "possible": false, "pairs": [{"task": "[Logo]: Spin.", "solution": "It spins."}]}',
        '{"pairs": []}',
        "<think>Hm. [1]</think>Nothing to do.",
    ],
)
def test_nothing_to_do_is_told_from_nothing_understood(text):
    parsed = parse_pairs(text)
    assert parsed.nothing_to_do and not parsed.pairs and not parsed.cut_off


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "is empty"),
        ("<think>" + WHOLE + " or", "is empty"),
        ("I cannot help with that.", "begins with 'I cannot help"),
        ('{"possible": true, "pairs": []}', "no task in it"),
        ('{"error": {"message": "no"}}', "fields"),
        ("[1, 2, 3]", "no task"),
        ('[{"task": "[Fox]: Run."}]', "a task alone"),
        ('{"pairs": [{"action": "run", "who": "fox"}]}', r"fields \['action', 'who'\]"),
        ("[Fox]: Run.\n[Owl]: Fly.", "no task"),
        ('{"pairs": [', "no task"),
        ('{"pairs": ["run", "fly"]}', "not a task with"),
        ('{"task": 3, "solution": ["a"]}', "no task|fields"),
        ('[{"task": "Run.", "solution": null}]', "a task alone"),
    ],
)
def test_what_is_not_understood_is_said(text, problem):
    parsed = parse_pairs(text)
    assert not parsed.pairs and not parsed.nothing_to_do and re.search(problem, " ".join(parsed.problems))


def test_an_answer_that_is_cut_off_keeps_what_was_whole():
    for end in range(WHOLE.index("[{") + 1, len(WHOLE), 3):
        parsed = parse_pairs(WHOLE[:end])
        whole = [FOX][: WHOLE.index("}") < end] + [OWL][: end >= len(WHOLE) - 2]
        assert list(parsed.pairs) == whole and parsed.cut_off and not parsed.nothing_to_do, end


def test_texts_are_cleaned_and_stay_data():
    raw = '[{"task": "[Fox\\u0000]:  Go\\n to\\u202e the gate.", '
    raw += '"solution": "It\\ud83d runs <b>{x}</b>\\t\\ud83e\\udd8a \\u0001.\\n\\n__import__(\'os\')"}]'
    (pair,) = understood(raw)
    assert pair.task == "[Fox]: Go to the gate." and pair.solution == "It runs <b>{x}</b> 🦊 .\n\n__import__('os')"
    json.dumps(vars(pair), ensure_ascii=False).encode()


def test_long_nested_and_hostile_texts_take_no_time():
    n = 10_000
    texts = [
        "[" * n,
        '{"a":' * n,
        '{"' * n,
        '["' * n,
        "<think>" * n,
        "{" + "/*" * n,
        '{"pairs": [' + '{"task": "' * n,
        "*" * n,
        "[a]: b\n" * n,
        "[[1," * n,
        "9" * n,
        "[" + "9" * n,
        "\\" * n,
        '["' + "\\" * n,
        "- " * n,
        "\n \n" * n,
        "".join(f'["{i}" ' for i in range(n // 6)),
        "[" + '{"task":"t","solution":"s"},' * n,
        '{"task": "' + '" ' * n,
        '{"task": "' + '"/*' * n,
        '{"task": "a"' + "/**/" * n,
        '["' + '", "' * n,
        '{"a": "' + '", "b' * n,
        "◁think▷" * n,
        "<|channel|>final" * n,
        "<think>{" * n,
    ]
    for text in texts:
        started = time.process_time()
        parsed = parse_pairs(text)
        assert time.process_time() - started < 2, text[:20]
        assert len(parsed.pairs) <= 200


def test_the_prompts_own_example_is_understood_and_keeps_the_rules():
    example = load_prompt().format.partition("for another picture:")[2]
    (pair,) = understood(example)
    assert check_pair(pair) is None and pair.kind == "interaction"
    assert 40 <= len(pair.solution.split()) <= 120  # as the instructions want it


# ---- Any text at all

MANY = settings(
    max_examples=150 * FUZZ, deadline=None, derandomize=FUZZ == 1,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
WORDS = st.sampled_from(
    ["Go to the gate.", "Fox", "[Fox]: Run to the log.", "[Fox]", TOLD, "", "🦊", "\ud800", "a\x00b", "Why?"]
)
TEXTS = WORDS | st.text(max_size=40)
KEYS = (
    st.sampled_from(["task", "solution", "agent", "kind", "pairs", "Description", "possible", "tasks", "solutions"])
    | TEXTS
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=20,
)  # fmt: skip
SHARDS = st.sampled_from(
    [
        *"{}[]\"':,\n*#-/\\",
        "<think>",
        "</think>",
        "```json",
        "[Fox]: ",
        "Description: ",
        "Task: ",
        '"task":',
        '"pairs":',
        "//",
    ]
)
DAMAGE = st.lists(st.tuples(st.integers(0, 900), SHARDS | TEXTS), max_size=4)
ANSWERS = (
    VALUES.map(json.dumps)
    | st.lists(SHARDS | TEXTS, max_size=30).map("".join)
    | st.tuples(st.sampled_from([WHOLE, LINES, NUMBERED]), DAMAGE).map(lambda drawn: damaged(*drawn))
)


def damaged(text, changes):
    for at, shard in changes:
        text = text[:at] + shard + text[at + len(shard) // 2 :]
    return text


def letters(text):
    return re.sub(r"[\W_]+", "", text)


@MANY
@given(ANSWERS)
def test_any_answer_gives_sound_pairs_or_none(text):
    parsed = parse_pairs(text)
    assert parsed == parse_pairs(text)
    assert bool(parsed.pairs) + parsed.nothing_to_do < 2 and (parsed.pairs or parsed.nothing_to_do or parsed.problems)
    # All characters that the text may stand for, once its escapes are read.
    source = letters(text + json.dumps([*map(str, find_values(text))], ensure_ascii=False))
    for pair in parsed.pairs:
        json.dumps(vars(pair), ensure_ascii=False).encode()  # as the journal does
        assert set(letters(pair.solution)) <= set(source) and len(pair.kind) <= 40
        if check_pair(pair) is None:
            assert re.fullmatch(r"\[[^\[\]\n]+\]: ?\S[^\n]*", pair.task) and not pair.task.endswith("?")
            assert " ".join(pair.task[1 : pair.task.index("]")].split()).casefold().rstrip(".") == (
                " ".join(pair.agent.split()).casefold().rstrip(".")
            )
            assert 5 <= len(re.findall(r"\w+", pair.solution)) and "\n\n" not in pair.solution
            assert pair.solution.casefold() not in pair.task.casefold()
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", pair.task + pair.solution + pair.agent)


@MANY
@given(TEXTS, TEXTS, TEXTS)
def test_rules_never_fail_and_the_looser_ones_let_more_through(task, solution, agent):
    pair = TaskPair(task, solution, agent, "")
    strict, loose = check_pair(pair), check_pair(pair, Rules(english=False, solution_least=1, task_most=1000))
    assert strict is not None or loose is None
