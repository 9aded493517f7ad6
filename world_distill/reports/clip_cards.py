"""The clips of a report: side by side on the page, and exported as GIF, MP4 and a contact sheet."""

import concurrent.futures
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from world_distill import console
from world_distill.core.measures import ALL, grouping_key
from world_distill.errors import UserError
from world_distill.reports import page
from world_distill.reports.page import Film
from world_distill.reports.run_data import Clip, Contents
from world_distill.reports.sections import name_of, named, rate
from world_distill.storage import video_files

MAX_TASKS = 400  # that go into the page
BUDGET = 11_000_000  # characters of all clips in the page, which is to stay below 15 MB
_SAMPLE = 8  # tasks by whose clips the page's detail is chosen
# What is shown side by side, and what each model is told.
MODELS = (
    ("demonstrator", "told the solution"),
    ("base", "told the task"),
    ("executor", "told the task"),
)
LEADS = ("executor", "base", "demonstrator")
_EXPORT_WIDTH = 300  # pixels, of small clips
_MARKS = {"task": "task completed", "agent": "intended agent", "consistency": "consistent"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with its agent set apart; None where the task does not begin with it."""

    agent: str | None
    text: str


@dataclasses.dataclass(frozen=True)
class Mark:
    """A verdict: `kind` is "yes", "no" or "none"; `number` is the question's."""

    kind: str
    question: str
    word: str
    number: int


@dataclasses.dataclass(frozen=True)
class Figure:
    """A film with its caption and verdicts; `role` is the model's, and "" for the start image."""

    role: str
    name: str
    told: str
    film: Film
    marks: Sequence[Mark] = ()


@dataclasses.dataclass(frozen=True)
class Card:
    """A task and its films, each `width` CSS pixels wide; `number` is its place in the record set."""

    number: int
    id: str
    task: Task
    kind: str
    kind_key: str
    agent_key: str
    solution: str
    width: int
    figures: Sequence[Figure]

    @property
    def size(self) -> int:
        """Characters of its films."""
        return sum(len(figure.film.sprite.uri) for figure in self.figures)

    @property
    def last(self) -> int:
        """Number of the last frame, from 0, of its longest film."""
        return max(figure.film.sprite.frames for figure in self.figures) - 1


@dataclasses.dataclass(frozen=True)
class Filter:
    """What the cards can be chosen by: (value, text) pairs; `lead` is the role whose failures come first."""

    lead: str
    models: Sequence[tuple[str, str]]
    questions: Sequence[tuple[str, str]]
    kinds: Sequence[tuple[str, str]]
    agents: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Example:
    """The film at the top of the page."""

    task: Task
    film: Film


def clips(contents: Contents, models: Sequence[tuple[str, str]] = MODELS, leads: Sequence[str] = LEADS) -> Markup:
    """One card a task: the start image and the models' clips, with verdicts and the solution; failures first.

    The detail is the finest by which all clips fit into `BUDGET`. Clips that cannot be read are left out, and named in
    `contents.notes`.

    Args:
      contents: clips with their films by model, and verdicts by model.
      models: the models in the order of the page, each with what it is told.
      leads: the first of them that was judged is the one whose failures come first.
    """
    shown = contents.clips[:MAX_TASKS]
    text = "All clips of a task begin with the same image. They stop while a pointer rests on them, or after a tap. "
    cards, notes = _cards(contents, models, shown)
    contents.notes.extend(notes)
    fit = list(itertools.takewhile(lambda size: size <= BUDGET, itertools.accumulate(card.size for card in cards)))
    if len(fit) < len(cards):
        cards = cards[: len(fit)]
        shown = [shown[card.number] for card in cards]
    lead = next((model for model in leads if contents.verdicts.get(model)), "")
    text += _share(contents, lead, shown)
    if len(contents.clips) > len(shown):
        text += f" These are the first {len(shown)} of {len(contents.clips)} tasks whose clips were kept."
    if lead and len(cards) > 1:
        text += f" Tasks at which {named(lead)} fails come first."
    cards.sort(key=lambda card: (-_failures(card, lead), card.number))
    return page.render("clips.html", text=text, cards=cards, filter=_filter(contents, models, shown, lead))


def _cards(
    contents: Contents, models: Sequence[tuple[str, str]], shown: Sequence[Clip]
) -> tuple[list[Card], list[str]]:
    """Cards of the finest detail by which they fit, or of the coarsest; and a sentence for each clip left out."""
    stride = max(1, len(shown) // _SAMPLE)
    cards, notes = [], []
    with concurrent.futures.ThreadPoolExecutor() as pool:  # Pillow works outside of the interpreter's lock

        def make(numbers: Sequence[int], detail: page.Detail) -> tuple[list[Card], list[str]]:
            found: list[tuple[Card | None, list[str]]] = []
            with console.Progress("card", len(numbers), shown=len(numbers) > 2 * _SAMPLE) as progress:
                for made in pool.map(lambda number: _card(contents, models, number, shown[number], detail), numbers):
                    found.append(made)
                    progress.at(len(found))
            return [card for card, _ in found if card], [note for _, notes in found for note in notes]

        for detail in page.DETAILS:
            if detail != page.DETAILS[-1] and len(shown) > 2 * _SAMPLE:
                sample, _ = make(range(0, len(shown), stride), detail)
                if sum(card.size for card in sample) / (len(sample) or 1) * len(shown) > BUDGET:
                    continue
            cards, notes = make(range(len(shown)), detail)
            if sum(card.size for card in cards) <= BUDGET:
                break
    return cards, notes


def _failures(card: Card, role: str) -> int:
    return sum(mark.kind == "no" for figure in card.figures if figure.role == role for mark in figure.marks)


def _filter(contents: Contents, models: Sequence[tuple[str, str]], shown: Sequence[Clip], lead: str) -> Filter:
    roles = [role for role, _ in models if any(role in clip.films for clip in shown)]
    questions = [(str(i), _mark_name(question)) for i, question in enumerate(contents.measures.questions)]
    return Filter(
        lead,
        [(role, name_of(role)) for role in roles],
        questions if contents.verdicts else [],
        _values([clip.kind for clip in shown]),
        _values([clip.agent for clip in shown]),
    )


def _values(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and spellings of what differs in more than its writing, in alphabetical order; [] of a single one."""
    spelt = {grouping_key(text): text for text in reversed(texts)}
    return sorted(spelt.items(), key=lambda item: item[0]) if len(spelt) > 1 else []


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


def _share(contents: Contents, lead: str, shown: list[Clip]) -> str:
    """How a model does on the clips shown, against all: whether they flatter it."""
    row, verdicts = contents.row(lead), contents.verdicts.get(lead, {})
    questions = contents.measures.questions
    judged = [verdicts[clip.id] for clip in shown if set(questions) <= set(verdicts.get(clip.id, ()))]
    whole = row and row.rates[contents.measures.names[-1]]  # all at once, or the only question
    if not judged or row is None or whole is None or contents.graded:
        return ""
    passed = sum(all(scores[q] > 0.5 for q in questions) for scores in judged)
    what = "the question" if len(questions) == 1 else f"{contents.measures.label(ALL)} questions"
    text = f"Here {named(lead)} passes {what} in {passed} of {len(judged)} tasks"
    return f"{text}." if len(judged) == row.count else f"{text}; over all {row.count or ''} tasks it is {rate(whole)}."


def _card(
    contents: Contents, models: Sequence[tuple[str, str]], number: int, clip: Clip, detail: page.Detail
) -> tuple[Card | None, list[str]]:
    """The card of a task, if it has a clip that can be read, and a sentence for each one that cannot."""
    films: dict[str, np.ndarray] = {}
    notes = []
    for role in clip.films:
        try:
            films[role] = clip.load(role)
        except (OSError, ValueError) as error:
            reason = str(error).removeprefix(f"{clip.films[role]}: ")
            notes.append(f"The clip of {named(role)} for {clip.id} is left out: {reason}.")
    if not films:
        return None, notes
    sprites = {role: page.sprite(film, detail) for role, film in films.items()}
    start = page.sprite(next(iter(films.values()))[:1], detail)
    figures = [Figure("", "Start image", "what all are given", Film(start, "start image", 1))]
    for role, told in models:
        if role not in sprites:
            continue
        description = f"Clip of {named(role)}, {told}: {clip.task}"
        film = Film(sprites[role], description, len(films[role]) / clip.fps)
        figures.append(Figure(role, name_of(role), told, film, _marks(contents, role, clip)))
    width, keys = max(s.shown_width for s in sprites.values()), (grouping_key(clip.kind), grouping_key(clip.agent))
    return Card(number, clip.id, _task(clip), clip.kind, *keys, clip.solution, width, figures), notes


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
    for number, question in enumerate(contents.measures.questions):
        score = scores.get(question)
        kind, word = ("none", "not judged") if score is None else ("yes", "yes") if score > 0.5 else ("no", "no")
        name = _mark_name(question)
        if score is not None and contents.graded:
            name, word = f"{name} {rate(score)}", rate(score)
        marks.append(Mark(kind, name, word, number))
    return marks


def _mark_name(question: str) -> str:
    return _MARKS.get(question, question.replace("_", " "))


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
    rows = [(clip, role) for clip in chosen for role, _ in MODELS if role in clip.films]
    frames = [clip.load(role) for clip, role in rows]
    labels = [f"{name_of(role)}: {clip.task}" for clip, role in rows]
    video_files.save_sheet(path, frames, labels, max(1, 60 // frames[0].shape[2]))


def _need_clips(contents: Contents) -> None:
    if not contents.clips:
        raise UserError(f"{contents.folder} holds no clips to export; world-distill evaluate keeps them")
