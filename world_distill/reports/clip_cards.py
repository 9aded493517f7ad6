"""The clips of a report: side by side on the page, and exported as GIF, MP4 and a contact sheet."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from world_distill.errors import UserError
from world_distill.reports import page
from world_distill.reports.page import Film
from world_distill.reports.run_data import Clip, Contents
from world_distill.reports.sections import name_of, rate
from world_distill.storage import video_files

MAX_TASKS = 24  # that go into the page
SHOWN = (
    ("demonstrator", "told the solution"),
    ("base", "told the task"),
    ("executor", "told the task"),
)
_EXPORT_WIDTH = 300  # pixels, of small clips
_MARKS = {"task": "task completed", "agent": "intended agent", "consistency": "consistent"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with its agent set apart; None where the task does not begin with it."""

    agent: str | None
    text: str


@dataclasses.dataclass(frozen=True)
class Mark:
    """A verdict: `kind` is "yes", "no" or "none"."""

    kind: str
    question: str
    word: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """A film with its caption and verdicts."""

    name: str
    told: str
    film: Film
    marks: Sequence[Mark] = ()


@dataclasses.dataclass(frozen=True)
class Card:
    """A task and its films, each `width` CSS pixels wide."""

    task: Task
    kind: str
    solution: str
    width: int
    figures: Sequence[Figure]


@dataclasses.dataclass(frozen=True)
class Example:
    """The film at the top of the page."""

    task: Task
    film: Film


def clips(contents: Contents) -> Markup:
    """One card a task: start image, Demonstrator, base and Executor, with verdicts and the solution.

    Clips that cannot be read are left out, and named in `contents.notes`.
    """
    shown = contents.clips[:MAX_TASKS]
    text = "All clips of a task begin with the same image. They stop while a pointer rests on them, or after a tap. "
    text += _share(contents, shown)
    if len(contents.clips) > len(shown):
        text += f" These are the first {len(shown)} of {len(contents.clips)} tasks whose clips were kept."
    cards = [card for clip in shown if (card := _card(contents, clip))]
    return page.render("clips.html", text=text, cards=cards)


def example(contents: Contents) -> Example | None:
    """A clip of the Executor for the top of the page: of the first task that it solves, if there is one."""
    verdicts = contents.verdicts.get("executor", {})
    for clip in contents.clips[:MAX_TASKS]:
        scores = verdicts.get(clip.id, {})
        if "executor" not in clip.films or not all(scores.get(q, 0) > 0.5 for q in contents.measures.questions):
            continue
        try:
            frames = clip.load("executor")
        except (OSError, ValueError):
            continue  # the clips' own part says so
        film = Film(page.sprite(frames), f"Clip of the Executor: {clip.task}", len(frames) / clip.fps)
        return Example(_task(clip), film)
    return None


def _share(contents: Contents, shown: list[Clip]) -> str:
    """How the Executor does on the clips shown, against all: whether they flatter it."""
    row, verdicts = contents.row("executor"), contents.verdicts.get("executor", {})
    questions = contents.measures.questions
    judged = [verdicts[clip.id] for clip in shown if set(questions) <= set(verdicts.get(clip.id, ()))]
    whole = row and row.rates[contents.measures.names[-1]]  # all at once, or the only question
    if not judged or row is None or whole is None:
        return ""
    passed = sum(all(scores[q] > 0.5 for q in questions) for scores in judged)
    what = "the question" if len(questions) == 1 else f"all {contents.measures.count} questions"
    return (
        f"Here the Executor passes {what} in {passed} of {len(judged)} tasks; "
        f"over all {row.count or ''} tasks it is {rate(whole)}."
    )


def _card(contents: Contents, clip: Clip) -> Card | None:
    films: dict[str, np.ndarray] = {}
    for role in clip.films:
        try:
            films[role] = clip.load(role)
        except (OSError, ValueError) as error:
            reason = str(error).removeprefix(f"{clip.films[role]}: ")
            contents.notes.append(f"The clip of the {name_of(role)} for {clip.id} is left out: {reason}.")
    if not films:
        return None
    sprites = {role: page.sprite(film) for role, film in films.items()}
    start = page.sprite(next(iter(films.values()))[:1])
    figures = [Figure("Start image", "what all are given", Film(start, "start image", 1))]
    for role, told in SHOWN:
        if role not in sprites:
            continue
        description = f"Clip of the {name_of(role)}, {told}: {clip.task}"
        film = Film(sprites[role], description, len(films[role]) / clip.fps)
        figures.append(Figure(name_of(role), told, film, _marks(contents, role, clip)))
    return Card(_task(clip), clip.kind, clip.solution, max(s.shown_width for s in sprites.values()), figures)


def _task(clip: Clip) -> Task:
    lead = f"[{clip.agent}]:"
    if clip.task.startswith(lead):
        return Task(clip.agent, clip.task[len(lead) :].strip())
    return Task(None, clip.task)


def _marks(contents: Contents, role: str, clip: Clip) -> list[Mark]:
    scores = contents.verdicts.get(role, {}).get(clip.id)
    if scores is None:
        return []
    marks = []
    for question in contents.measures.questions:
        score = scores.get(question)
        kind, word = ("none", "not judged") if score is None else ("yes", "yes") if score > 0.5 else ("no", "no")
        name = _MARKS.get(question, question.replace("_", " "))
        if score is not None and 0 < score < 1:
            name, word = f"{name} {rate(score)}", rate(score)
        marks.append(Mark(kind, name, word))
    return marks


# Exports ------------------------------------------------------------------------------------------------------------


def export(contents: Contents, folder: pathlib.Path, suffix: str) -> int:
    """Writes all kept clips as ROLE-ID.gif or ROLE-ID.mp4; returns how many.

    Raises:
      ValueError: a clip is damaged.
      UserError: no clips; or MP4 without PyAV.
    """
    _need_clips(contents)
    written = 0
    for clip in contents.clips:
        for role in clip.films:
            frames = clip.load(role)
            path, scale = folder / f"{role}-{clip.id}.{suffix}", max(1, _EXPORT_WIDTH // frames.shape[2])
            if suffix == "gif":
                video_files.save_gif(path, frames, clip.fps, scale, hold=1.0)
            else:
                video_files.save_mp4(path, frames, clip.fps, scale)
            written += 1
    return written


def export_sheet(contents: Contents, path: pathlib.Path, ids: tuple[str, ...] = ()) -> None:
    """Writes all frames of the kept clips (of the tasks `ids`, if given) into one PNG, one row a clip.

    Raises:
      UserError: as `export`; or no clips were kept of a task.
    """
    _need_clips(contents)
    kept = {clip.id: clip for clip in contents.clips}
    unknown = [i for i in ids if i not in kept]
    if unknown:
        raise UserError(f"no clips of {', '.join(unknown)} were kept; there are: {', '.join(kept)}")
    chosen = [kept[i] for i in ids] if ids else contents.clips
    rows = [(clip, role) for clip in chosen for role, _ in SHOWN if role in clip.films]
    frames = [clip.load(role) for clip, role in rows]
    labels = [f"{name_of(role)}: {clip.task}" for clip, role in rows]
    video_files.save_sheet(path, frames, labels, max(1, 60 // frames[0].shape[2]))


def _need_clips(contents: Contents) -> None:
    if not contents.clips:
        raise UserError(f"{contents.folder} holds no clips to export; quickstart keeps some")
