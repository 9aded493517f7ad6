"""A benchmark that asks a vision-language model: for any model family, about any pictures and tasks.

Its questions are files of a folder of its own, apart from those of the reward, and answers are kept by their content:
whoever edits one gets new answers, and the old ones stay. A verdict is yes (1) where the log-odds of the answer are
above 0, no (0) otherwise, and NaN where there is no answer. The log-odds of each answer are kept beside it, and so are
those of other judges that are asked the same.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from world_distill import build
from world_distill.errors import UserError, did_you_mean
from world_distill.interfaces import Cases, Judge
from world_distill.judges.ask import judge_clips
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import load_rubric

RUBRICS = pathlib.Path(__file__).with_name("rubrics")
MAIN = "main"  # what the judge whose verdicts count is called beside others


class VlmBenchmark:
    """`interfaces.Benchmark`.

    Attributes:
      judges: by name; the first one, `MAIN`, gives the verdicts.
      name: changes with whatever changes a verdict.
    """

    rubric: ClassVar[pathlib.Path] = RUBRICS / "worldtasks"  # questions where the options name none
    order: ClassVar[tuple[str, ...]] = ("task", "agent", "consistency")  # of questions with these names
    shows: ClassVar[tuple[int, float]] = (0, 1.0)  # `even_frames` and `scale` where the options name none

    def __init__(
        self,
        judge: str | Judge = "world_distill.judges:ServerJudge",
        *,
        rubric: str = "",
        questions: Sequence[str] = (),
        even_frames: int | None = None,
        scale: float | None = None,
        beside: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ):
        """Nobody is asked yet.

        Args:
          judge: address of the judge. Its own options, such as `model`, `frames` and `max_side`, stand beside these.
          rubric: folder of question files, NAME.txt. Empty: those of this benchmark.
          questions: which of them are asked, in the order of tables. Empty: all.
          even_frames: frames that the judge is shown, evenly over the clip; a shorter clip ends with its last frame
            again and again. 0: the judge chooses, as `frames` says. None: this benchmark's own, 0 or DreamGen's 49.
          scale: factor on the sides of frames, before the judge sees them. None: this benchmark's own, 1 or
            DreamGen's 0.3.
          beside: other judges that are asked the same, by name, each with the options in which it differs.
          options: those of the judge.

        Raises:
          UserError: no such judge or question, a value out of range, or two judges that are one.
        """
        even_frames = self.shows[0] if even_frames is None else even_frames
        scale = self.shows[1] if scale is None else scale
        if even_frames < 0 or not 0 < scale <= 1:
            raise UserError(f"a benchmark needs even_frames >= 0 and 0 < scale <= 1, not {even_frames} and {scale}")
        self._rubric = load_rubric(rubric or self.rubric)
        self.questions = self._chosen(tuple(questions))
        self._even_frames, self._scale, self._cache = even_frames, scale, None
        self.judges: dict[str, Judge] = {MAIN: self._make(judge, options)}
        for label, changes in (beside or {}).items():
            other = {"judge": judge, **dict(changes)}
            address = other.pop("judge")
            self.judges[label] = self._make(address, options | other if address == judge else other)
        self._check_judges(beside or {})
        self.details = tuple(f"{label}/{question}" for label in self.judges for question in self.questions)
        shown = f" {even_frames} frames" * bool(even_frames) + f" x{scale:g}" * (scale != 1)
        self.name = f"vlm {self.judges[MAIN].name}{shown} rubric {self._rubric.version}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def begin(self, cache: JudgmentCache | None, fps: float) -> None:
        """Answers come from `cache` where it has them; questions tell the length of clips of `fps` frames a second."""
        # Of some of a clip's frames, the rate is another.
        self._cache = cache
        self._rubric = dataclasses.replace(self._rubric, fps=0.0 if self._even_frames else fps)

    def check(self, clips: np.ndarray, cases: Cases) -> dict[str, np.ndarray]:
        """Verdicts [b] by question, and log-odds [b] of each judge by `JUDGE/QUESTION`. Raises as `judge_clips`."""
        shown, found = self.shown(clips), {}
        for label, judge in self.judges.items():
            judgment = judge_clips(
                judge, self._cache, shown, cases.tasks, cases.agents, self._rubric, self.questions, records=cases.ids
            )
            found |= {f"{label}/{question}": judgment.scores[question] for question in self.questions}
        return {question: verdicts(found[f"{MAIN}/{question}"]) for question in self.questions} | found

    def describe(self) -> dict[str, Any]:
        """The names of the judges, and the version of the questions."""
        return {"judges": {label: judge.name for label, judge in self.judges.items()}, "rubric": self._rubric.version}

    def shown(self, clips: np.ndarray) -> np.ndarray:
        """What judges see of clips [b F H W 3] uint8: [b f h w 3]."""
        if self._even_frames:
            clips = clips[:, even_frames(clips.shape[1], self._even_frames)]
        if self._scale == 1:
            return clips
        height, width = (max(1, int(self._scale * side)) for side in clips.shape[2:4])
        frames = [
            np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
            for frame in clips.reshape(-1, *clips.shape[2:])
        ]
        return np.stack(frames).reshape(*clips.shape[:2], height, width, 3)

    def _make(self, judge: str | Judge, options: Mapping[str, Any]) -> Judge:
        if not isinstance(judge, str):
            if options:
                raise UserError(f"options {', '.join(options)} are of a judge that is to be made; this one is there")
            return judge
        factory = build.load_part(judge, "config.benchmark.options.judge")
        if self._even_frames and "frames" in build.parameters(factory):
            options = {**options, "frames": self._even_frames}  # all that are left
        try:
            return factory(**options)
        except UserError as error:
            raise UserError(f"config.benchmark.options: {error}") from error

    def _chosen(self, questions: tuple[str, ...]) -> tuple[str, ...]:
        names = self._rubric.names
        if unknown := [name for name in questions if name not in names]:
            raise UserError(f"the benchmark's rubric has no question {unknown[0]!r}; {did_you_mean(unknown[0], names)}")
        first = tuple(name for name in self.order if name in names)
        return questions or (*first, *(name for name in names if name not in first))

    def _check_judges(self, beside: Mapping[str, Any]) -> None:
        if wrong := [label for label in beside if label == MAIN or "/" in label]:
            raise UserError(f"config.benchmark.options.beside: a judge cannot be called {wrong[0]!r}")
        names: dict[str, str] = {}
        for label, judge in self.judges.items():
            if judge.name in names:
                raise UserError(
                    f"config.benchmark.options.beside.{label} is the judge {names[judge.name]!r} again ({judge.name}):"
                    f" give it another model (--config.benchmark.options.beside.{label}.model=NAME)"
                )
            names[judge.name] = label


def verdicts(log_odds: np.ndarray) -> np.ndarray:
    """1 where log-odds are above 0, 0 where they are not, NaN where there are none."""
    return np.where(np.isfinite(log_odds), log_odds > 0, np.nan)


def even_frames(count: int, wanted: int) -> list[int]:
    """Numbers of `wanted` frames of a clip of `count`, evenly from the first to the last.

    A shorter clip has all of its frames, and then the last one again.
    """
    if count < wanted:
        return [min(i, count - 1) for i in range(wanted)]
    return np.linspace(0, count - 1, wanted).astype(int).tolist()
