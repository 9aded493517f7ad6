"""Rubrics: what is written in a template is what a judge reads, and nothing in a task can change it."""

import pytest

from world_distill.judges.rubric import Rubric, load_rubric


def test_shipped_rubric():
    rubric = load_rubric()
    assert rubric.names == ("agent", "consistency", "task")
    task, agent = "[Man in blue]: Step {back} & stop.", "Man in blue"
    texts = {name: rubric.render(name, task, agent) for name in rubric.names}
    assert all(text.endswith("Answer yes or no.") for text in texts.values())
    assert task in texts["task"] and task in texts["agent"]
    assert task not in texts["consistency"]  # a judge of physics must not see what was wanted
    assert texts["agent"].count(agent) > texts["task"].count(agent)


@pytest.mark.parametrize("nasty", ["{task}", "{agent}", "{", "}}", "{0}", "{agent.__class__}", "%s", "\\n", "{{task}}"])
def test_braces_in_tasks_and_agents_are_text(nasty):
    rubric = Rubric({"q": "A {task} B {agent} C {{x}}"})
    assert rubric.render("q", nasty, "me") == f"A {nasty} B me C {{x}}"
    assert rubric.render("q", "go", nasty) == f"A go B {nasty} C {{x}}"


@pytest.mark.parametrize(
    "template",
    ["{other}", "{}", "{0}", "{task.x}", "{task[0]}", "{task!r}", "{task:>9}", "{task", "task}", "{ task }", "", " \n"],
)
def test_bad_templates_name_the_question(template):
    with pytest.raises(ValueError, match="question 'why'"):
        Rubric({"good": "fine {task}?", "why": template})


def test_unknown_question_and_empty_rubric():
    with pytest.raises(KeyError, match="no question 'b'; the rubric has a"):
        Rubric({"a": "x"}).render("b", "t", "a")
    with pytest.raises(ValueError, match="without questions"):
        Rubric({})


def test_version_follows_the_content():
    base = Rubric({"a": "x {task}", "b": "y"})
    assert base.version == Rubric({"b": "y", "a": "x {task}"}).version
    others = [{"a": "x {task}"}, {"a": "x {agent}", "b": "y"}, {"a": "y", "b": "x {task}"}, {"c": "x {task}", "b": "y"}]
    assert len({base.version, *(Rubric(q).version for q in others)}) == 5


def test_rubric_from_a_folder(tmp_path):
    (tmp_path / "done.txt").write_text("\nIs {task} done? ü\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("{nothing}")
    rubric = load_rubric(tmp_path)
    assert rubric.names == ("done",) and rubric.render("done", "it", "") == "Is it done? ü"
    (tmp_path / "bad.txt").write_text("{who}")
    with pytest.raises(ValueError, match=f"{tmp_path}: question 'bad' has unknown fields"):
        load_rubric(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="bad.txt: not UTF-8"):
        load_rubric(tmp_path)


def test_missing_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"{folder}: no rubric there"):
            load_rubric(folder)
