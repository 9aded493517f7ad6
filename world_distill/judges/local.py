"""A vision-language model in this process as the judge.

The score is log p(yes) - log p(no) of the first answer token (`answers`), from the model's own probabilities of every
spelling that is one token. What the model does with a clip is done once for all questions about it, if continuing from
there gives what the whole gives, which the self-test finds out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from absl import logging

from world_distill.errors import UserError
from world_distill.interfaces import JudgeAnswer, JudgeRequest
from world_distill.judges.answering import AnswersEach, Done
from world_distill.judges.answers import SPELLINGS, WORDS, NoVerdict, Reading
from world_distill.judges.selftest import INTRO, PROBES, probe_clip, text_part
from world_distill.vlm.chat_marks import ForbiddenText
from world_distill.vlm.frames import chosen_frames, chosen_images, frame_labels
from world_distill.vlm.local import LocalVLM, Message

# Between log-odds of the same question, from the clip's part alone and from the whole; half precision has steps of
# 1/8 at logits of 16 to 32.
_ROUNDING = {"float32": 0.01, "float16": 0.25, "bfloat16": 0.5}


class LocalJudge(AnswersEach):
    """`interfaces.Judge`.

    Attributes:
      name: changes with whatever changes answers.
    """

    def __init__(
        self,
        model: str = "",
        *,
        revision: str = "",
        dtype: str = "bfloat16",
        device: str = "",
        device_map: str = "",
        frames: int = 16,
        max_side: int = 448,
        min_mass: float = 0.5,
        batch: int = 1,
        share: bool = True,
    ):
        """Nothing is loaded yet: a run whose answers are all remembered does not need the weights.

        Args:
          model: a folder in transformers' layout, or a name on the hub.
          revision: of a model on the hub; empty: the newest.
          dtype: "bfloat16", "float16" or "float32".
          device: as PyTorch calls it; empty: a GPU if PyTorch sees one.
          device_map: "auto" spreads the layers over all GPUs.
          frames: of a clip that are shown at most: two thirds evenly over time, and those that change most.
          max_side: pixels; larger frames are shrunk.
          min_mass: probability that yes and no together need, or the answer does not count.
          batch: questions about one clip that are computed at once. With 1 an answer depends on its clip and its
            question alone, to the last bit.
          share: do the clip's part once for all its questions.

        Raises:
          UserError: a value is out of range, or there is no such model.
        """
        if frames < 2 or max_side < 1 or not 0 < min_mass < 1 or batch < 1:
            raise UserError(
                "a judge needs frames of at least 2, max_side and batch of at least 1 and a min_mass between 0 and 1, "
                f"not {frames}, {max_side}, {batch}, {min_mass}"
            )
        self._vlm = LocalVLM(model, revision=revision, dtype=dtype, device=device, device_map=device_map)
        self._frames, self._max_side, self._min_mass = frames, max_side, min_mass
        self._batch, self._share, self._rounding = batch, share, _ROUNDING[dtype]
        self._ids: dict[str, list[int]] = {}  # of the words; known once the model has passed its test
        self._masses: list[float] = []
        self._no_verdict = 0
        self.name = f"local-2 {self._vlm.name} {frames}x{max_side} mass>{min_mass:g}"

    def ask_each(self, requests: Sequence[JudgeRequest], done: Done) -> None:
        """Calls `done(number of the request, answer)` for each, clip by clip.

        Raises:
          UserError: the model cannot be loaded, or fails its self-test.
        """
        if requests and not self._ids:
            self.check()
        clips: dict[int, list[int]] = {}  # the requests of each array
        for i, request in enumerate(requests):
            clips.setdefault(id(request.clip), []).append(i)
        for numbers in clips.values():
            questions = [requests[i].question for i in numbers]
            for number, answer in zip(numbers, self._judge(requests[numbers[0]].clip, questions), strict=True):
                done(number, answer)

    def check(self) -> list[str]:
        """Tests the model; one line that says how it is asked.

        Raises:
          UserError: it cannot be loaded, or cannot judge; the message says why and what to do.
        """
        ids = self._token_ids()
        questions = [question for question, _ in PROBES]
        conversations = self._conversations(probe_clip(self._frames), questions)
        whole = [self._vlm.next_token_log_probs(conversation) for conversation in conversations]
        readings = [self._probe(ids, *probe, row) for probe, row in zip(PROBES, whole, strict=True)]
        if self._share and self._vlm.shares:
            self._share = self._sharing_works(ids, conversations, readings)
        self._share = self._share and self._vlm.shares
        self._ids = ids
        how = "once for all its questions" if self._share else "again for each question"
        count = sum(map(len, ids.values()))
        return [f"{self._vlm.name}: read by {count} spellings, a clip is seen {how}"]

    def health(self) -> dict[str, float]:
        """Since the last call: answers, mass of yes and no, and how many had no verdict."""
        masses, self._masses = self._masses, []
        no_verdict, self._no_verdict = self._no_verdict, 0
        return {
            "answers": len(masses), "mass_mean": sum(masses) / len(masses) if masses else math.nan,
            "mass_min": min(masses, default=math.nan), "no_verdict": no_verdict,
        }  # fmt: skip

    def _judge(self, clip: np.ndarray, questions: Sequence[str]) -> list[JudgeAnswer]:
        """Answers about one clip."""
        answers: dict[int, JudgeAnswer] = {}
        sound = {}
        for i, conversation in enumerate(self._conversations(clip, questions)):
            try:
                sound[i] = self._vlm.checked(conversation)
            except ForbiddenText as error:
                answers[i] = JudgeAnswer(None, str(error))
        for i, row in zip(sound, self._log_probs(list(sound.values())), strict=True):
            try:
                reading = self._read(self._ids, row)
            except NoVerdict as error:
                self._no_verdict += 1
                answers[i] = JudgeAnswer(None, str(error))
            else:
                self._masses.append(reading.mass)
                answers[i] = JudgeAnswer(reading.log_odds)
        return [answers[i] for i in range(len(questions))]

    def _conversations(self, clip: np.ndarray, questions: Sequence[str]) -> list[list[Message]]:
        """What is asked about a clip: the frames first, so that the beginning is the same for all questions."""
        numbers = chosen_frames(clip, self._frames)
        images = chosen_images(clip, frames=numbers, max_side=self._max_side)
        parts: list[Message] = [text_part(INTRO)]
        for label, image in zip(frame_labels(clip, numbers), images, strict=True):
            parts += [text_part(label), {"type": "image", "image": image}]
        return [[{"role": "user", "content": [*parts, text_part(question)]}] for question in questions]

    def _log_probs(self, conversations: Sequence[Sequence[Message]]) -> Iterable[np.ndarray]:
        if self._share and conversations:
            return self._vlm.shared_log_probs(conversations, batch=self._batch)
        return [self._vlm.next_token_log_probs(conversation) for conversation in conversations]

    def _read(self, ids: Mapping[str, Sequence[int]], log_probs: np.ndarray) -> Reading:
        """Log-odds and mass from log-probabilities [vocab]. Raises NoVerdict if yes and no have too little of it."""
        if np.isnan(log_probs).any():
            raise NoVerdict("the model's numbers are not finite: another dtype may help")
        by_word = {word: log_probs[ids[word]].astype(np.float64) for word in WORDS}
        sums = {word: float(np.logaddexp.reduce(values)) for word, values in by_word.items()}
        mass = min(sum(map(math.exp, sums.values())), 1.0)
        if mass < self._min_mass or not all(map(math.isfinite, sums.values())):
            begun = self._vlm.token_text(int(log_probs.argmax()))
            raise NoVerdict(f"the answer began with {begun!r}: yes and no have a probability of {mass:.2g} together")
        return Reading(sums["yes"] - sums["no"], mass, bounded=False)

    def _token_ids(self) -> dict[str, list[int]]:
        """Tokens of each word."""
        found = {word: [self._vlm.single_token(spelling) for spelling in SPELLINGS[word]] for word in WORDS}
        ids = {word: sorted({token for token in tokens if token is not None}) for word, tokens in found.items()}
        if missing := [word for word in WORDS if not ids[word]]:
            raise UserError(
                f"judge {self._vlm.name}: {' and '.join(missing)} is more than one token: its first token does not "
                "answer; take another model"
            )
        return ids

    def _probe(self, ids: Mapping[str, Sequence[int]], question: str, sign: int, log_probs: np.ndarray) -> Reading:
        where = f"judge {self._vlm.name}"
        try:
            reading = self._read(ids, log_probs)
        except NoVerdict as error:
            raise UserError(
                f"{where} does not answer {question!r} with yes or no at once: {error}. Take an instruction-tuned "
                "model, and one whose thinking can be turned off"
            ) from error
        if reading.log_odds * sign <= 0:
            raise UserError(
                f"{where} answered {question!r} about red pictures with log-odds {reading.log_odds:.2f}: it does not "
                "see them, or does not follow; take another model"
            )
        return reading

    def _sharing_works(
        self, ids: Mapping[str, Sequence[int]], conversations: Sequence[Sequence[Message]], whole: Sequence[Reading]
    ) -> bool:
        """Whether going on from the clip's part gives what the whole gives: not every model class can."""
        try:
            rows = self._vlm.shared_log_probs(conversations, batch=self._batch)
            parts = [self._read(ids, row) for row in rows]
        except Exception as error:  # a model class may fail in any way at what it was not made for
            logging.warning("judge %s: a clip is seen again for each question (%r)", self._vlm.name, error)
            return False
        gap = max(abs(part.log_odds - all_.log_odds) for part, all_ in zip(parts, whole, strict=True))
        if gap > self._rounding:
            logging.warning("judge %s: a clip is seen again for each question (%.3g apart)", self._vlm.name, gap)
        return gap <= self._rounding
