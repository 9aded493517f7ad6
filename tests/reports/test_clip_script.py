"""The script of a report's clips, in a browser: filter, search, order, portions, slider."""

import json

import pytest

from tests.report_runs import RATES, make_run
from world_distill.reports import report

TASKS = 36
PORTION = 24  # of clips.js
QUESTIONS = ("task", "agent", "consistency")
# Numbers of the cards that are shown once the form has these choices; `all` asks for every portion.
CHOOSE = """((choices, all) => {
  const form = document.getElementById('filter'), more = document.getElementById('more');
  for (const field of form.elements)
    if (field.name) field.value = choices[field.name] ?? field.options?.[0].value ?? '';
  form.dispatchEvent(new Event('input'));
  while (all && !more.hidden) more.click();
  const shown = [...document.querySelectorAll('.task')].filter(card => card.checkVisibility());
  return shown.map(card => +card.dataset.number);
})(%s, %s)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(results, page) of a run in which all models pass a task, and an answer is missing."""
    folder = tmp_path_factory.mktemp("run")
    results = make_run(folder, kept=TASKS, clip=(5, 6, 6))
    for verdicts in results["verdicts"].values():
        verdicts[5]["scores"] = dict.fromkeys(QUESTIONS, 1.0)
    results["verdicts"]["base"][3]["scores"]["agent"] = None
    (folder / "results.json").write_text(json.dumps(results))
    return results, report.build(folder)


@pytest.fixture
def choose(browser, page):
    """A function from choices to the cards that they show."""
    browser.show(page[1])
    return lambda choices, all=True: browser.js(CHOOSE % (json.dumps(choices), json.dumps(all)))


def marks(results, number, roles=tuple(RATES), questions=QUESTIONS):
    """The kinds of a task's marks, by role and question."""
    scores = {role: results["verdicts"][role][number]["scores"] for role in roles}
    kinds = {None: "none", 0.0: "no", 1.0: "yes"}
    return {(role, question): kinds[scores[role][question]] for role in roles for question in questions}


def test_failures_come_first_and_all_are_counted(browser, page, choose):
    results, _ = page
    failures = [list(marks(results, i, ("executor",)).values()).count("no") for i in range(TASKS)]
    first = sorted(range(TASKS), key=lambda i: (-failures[i], i))
    said = "document.querySelector('#filter output').textContent"
    assert browser.js(said) == f"{TASKS} of {TASKS} tasks, {PORTION} shown"
    assert choose({}) == first and browser.js(said) == f"{TASKS} of {TASKS} tasks"
    assert choose({"order": "record"}) == [*range(TASKS)] != first
    base = [list(marks(results, i, ("base",), ("task",)).values()).count("no") for i in range(TASKS)]
    by_base = sorted(range(TASKS), key=lambda i: (-base[i], i))
    assert choose({"model": "base", "question": "0"}) == by_base


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
def test_tasks_are_chosen_by_their_verdicts(page, choose, name):
    results, _ = page
    chosen, fits = CHOICES[name]

    def of(number):
        return lambda role, question: [
            kind for (r, q), kind in marks(results, number).items() if role in ("*", r) and question in ("*", q)
        ]

    found = choose(chosen | {"order": "record"})
    assert found == [i for i in range(TASKS) if fits(of(i))]
    assert name == "not judged of another model" or 0 < len(found) < TASKS


def test_tasks_are_chosen_by_kind_agent_and_words(page, choose):
    results, _ = page
    about = [(v["kind"], v["agent"]) for v in results["verdicts"]["base"][:TASKS]]
    found = choose({"kind": "beside", "agent": "red disc", "order": "record"})
    assert found == [i for i in range(TASKS) if about[i] == ("beside", "red disc")] != []
    found = choose({"words": " STOPS  blue", "order": "record"})  # of the solution and of the agent
    assert found == [i for i in range(TASKS) if about[i][1] == "blue square"] != []
    assert choose({"words": "record: r17"}) == [17] and choose({"words": "blue elephant"}) == []


def test_all_tasks_come_back_with_one_button(browser, choose):
    choose({"words": "blue", "verdict": "no"})
    browser.js("document.querySelector('#filter [type=reset]').click(); new Promise(done => setTimeout(done))")
    assert browser.js("document.querySelector('#filter output').textContent").startswith(f"{TASKS} of {TASKS} tasks")


def test_further_tasks_are_shown_on_request(browser, choose):
    count = "[...document.querySelectorAll('.task')].filter(card => card.checkVisibility()).length"
    more = "document.getElementById('more')"
    browser.js("document.getElementById('filter').reset(); new Promise(done => setTimeout(done))")
    assert browser.js(f"[{count}, {more}.textContent]") == [PORTION, f"Show {TASKS - PORTION} more tasks"]
    focused = "[...document.querySelectorAll('.task')].indexOf(document.activeElement.closest('.task'))"
    assert browser.js(f"{more}.click(); [{count}, {more}.hidden, {focused}]") == [TASKS, True, PORTION]
    assert len(choose({}, all=False)) == PORTION, "another choice begins from the first ones"
    few = {"model": "demonstrator", "question": "2", "verdict": "yes"}
    assert PORTION < len(choose(few, all=False)) <= PORTION + 8, "a few more need no request"


def test_a_model_is_shown_alone_and_larger_with_the_start_image(browser, choose):
    figures = "[...document.querySelector('.task').querySelectorAll('figure')]"
    width = f"{figures}[0].firstElementChild.getBoundingClientRect().width"
    small = browser.js(width)
    choose({"model": "base"})
    shown = browser.js(f"{figures}.map(figure => [figure.dataset.model, figure.checkVisibility()])")
    assert shown == [["", True], ["demonstrator", False], ["base", True], ["executor", False]]
    assert browser.js(width) == 2 * small


def test_the_slider_holds_all_films_of_a_task_at_a_frame(browser, choose):
    places = "[...films.querySelectorAll('.film')].map(film => getComputedStyle(film).backgroundPositionX)"
    state = f"""(() => {{
      const films = document.querySelector('.films'), [slider, play] = films.querySelector('.scrub').children;
      const moving = films.getAnimations({{subtree: true}}).length;
      return [moving, play.checkVisibility(), slider.getAttribute('aria-valuetext'),
        document.activeElement === slider, {places}];
    }})()"""
    moving, *rest = browser.js(state)
    assert moving == 3 and rest[:3] == [False, "frame 1 of 5", False]
    browser.js("document.querySelector('.scrub input').focus()")
    for _ in range(3):
        browser.press("ArrowRight", 39)
    assert browser.js(state) == [0, True, "frame 4 of 5", True, ["75%"] * 3]
    browser.press("Tab", 9)
    browser.press("Enter", 13, "\r")
    moving, shown, said, focused, _ = browser.js(state)
    assert (moving, shown, said, focused) == (3, False, "frame 4 of 5", True)
