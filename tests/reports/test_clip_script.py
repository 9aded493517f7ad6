"""The script of a report's clips, run by Node on the elements of a page: filter, order, slider."""

import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from tests.report_runs import RATES, Checker, make_run
from world_distill.reports import report

NODE = shutil.which("node")
ELEMENTS = pathlib.Path(__file__).with_name("few_elements.js").read_text()
TASKS = 12
QUESTIONS = ("task", "agent", "consistency")

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


class Tree(html.parser.HTMLParser):
    """[tag, attributes, children] of a page."""

    def __init__(self, text):
        super().__init__()
        self.root = ["html", {}, []]
        self.open = [self.root]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        element = [tag, {name: value or "" for name, value in attrs}, []]
        self.open[-1][2].append(element)
        if tag not in Checker.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        self.open.pop()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(results, page) of a run in which all models pass a task, and an answer is missing."""
    folder = tmp_path_factory.mktemp("run")
    results = make_run(folder, kept=TASKS, clip=(5, 6, 6))
    for verdicts in results["verdicts"].values():
        verdicts[5]["scores"] = dict.fromkeys(QUESTIONS, 1.0)
    results["verdicts"]["base"][3]["scores"]["agent"] = None
    (folder / "results.json").write_text(json.dumps(results))
    return results, report.build(folder).read_text()


def run(text, script):
    """What the script, after those of the page, gives as JSON."""
    [own] = re.findall(r"<script>(.*?)</script>", text, re.S)
    tree = json.dumps(Tree(text).root)
    code = f"const tree = {tree};\n{ELEMENTS}\n{own}\nconsole.log(JSON.stringify((() => {{{script}}})()));"
    done = subprocess.run([NODE, "-"], input=code, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def marks(results, number, roles=tuple(RATES), questions=QUESTIONS):
    """The kinds of a task's marks, by role and question."""
    scores = {role: results["verdicts"][role][number]["scores"] for role in roles}
    kinds = {None: "none", 0.0: "no", 1.0: "yes"}
    return {(role, question): kinds[scores[role][question]] for role in roles for question in questions}


def test_failures_come_first_and_all_are_counted(page):
    results, text = page
    failures = [list(marks(results, i, ("executor",)).values()).count("no") for i in range(TASKS)]
    first = sorted(range(TASKS), key=lambda i: (-failures[i], i))
    found = run(text, "return [form.hidden, choose({}), form.querySelector('output').textContent]")
    assert found == [False, first, f"{TASKS} of {TASKS} tasks"]
    assert run(text, "return choose({order: 'record'})") == [*range(TASKS)] != first
    base = [list(marks(results, i, ("base",), ("task",)).values()).count("no") for i in range(TASKS)]
    by_base = sorted(range(TASKS), key=lambda i: (-base[i], i))
    assert run(text, "return choose({model: 'base', question: '0'})") == by_base


CHOICES = {
    "a question that some model fails": ({"verdict": "no", "question": "0"}, lambda m: "no" in m("*", "task")),
    "the model that passes": ({"verdict": "yes", "model": "executor"}, lambda m: set(m("executor", "*")) == {"yes"}),
    "not judged": ({"verdict": "none"}, lambda m: "none" in m("*", "*")),
    "not judged of another model": ({"verdict": "none", "model": "executor"}, lambda m: "none" in m("executor", "*")),
    "models differ": ({"verdict": "differ", "question": "2"}, lambda m: len(set(m("*", "consistency"))) > 1),
    "models differ at all": (
        {"verdict": "differ", "model": "base"}, lambda m: any(len(set(m("*", q))) > 1 for q in QUESTIONS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_tasks_are_chosen_by_their_verdicts(page, name):
    results, text = page
    chosen, fits = CHOICES[name]

    def of(number):
        return lambda role, question: [
            kind for (r, q), kind in marks(results, number).items() if role in ("*", r) and question in ("*", q)
        ]

    found = run(text, f"return choose({json.dumps(chosen | {'order': 'record'})})")
    assert found == [i for i in range(TASKS) if fits(of(i))]
    assert name == "not judged of another model" or 0 < len(found) < TASKS


def test_tasks_are_chosen_by_kind_and_agent(page):
    results, text = page
    about = [(v["kind"], v["agent"]) for v in results["verdicts"]["base"][:TASKS]]
    found = run(text, "return choose({kind: 'beside', agent: 'red disc', order: 'record'})")
    assert found == [i for i in range(TASKS) if about[i] == ("beside", "red disc")] != []


def test_a_model_is_shown_alone_with_the_start_image(page):
    figures = "list.children[0].querySelectorAll('figure')"
    shown = run(page[1], f"choose({{model: 'base'}}); return {figures}.map(f => [f.dataset.model, f.hidden])")
    assert shown == [["", False], ["demonstrator", True], ["base", False], ["executor", True]]


def test_the_slider_holds_all_films_of_a_task_at_a_frame(page):
    script = """
    const row = list.querySelector('.scrub'), [slider, play] = row.children, films = row.parentNode;
    const places = () => films.querySelectorAll('.film').map(film => film.style.backgroundPosition);
    const state = () => [films.classList.contains('held'), play.hidden, places()];
    const before = [row.hidden, ...state()];
    slider.value = '3';
    list.listeners.input({target: slider});
    const held = [...state(), slider.attributes['aria-valuetext']];
    list.listeners.click({target: play});
    return [before, held, [...state(), slider.focused]];
    """
    before, held, after = run(page[1], script)
    assert before == [False, False, True, ["", "", ""]]
    assert held == [True, False, ["75% 0"] * 3, "frame 4 of 5"]
    assert after == [False, True, ["", "", ""], 1]
