"""Judges for tests of training, of which no two clips get the same answer, so that every group has its advantages.

The sandbox's oracle answers nearly alike about the clips of an untrained model: a run with it trains almost without RL,
and would be the same if RL were wired up wrongly.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from world_distill.interfaces import JudgeAnswer, JudgeRequest

MOST = 2.5  # of the log-odds, which stay within what configs clip them to


class HashJudge:
    """`interfaces.Judge`: a hash of clip and question. One other bit in a clip, and the answer is any other one.

    For runs that have to be the same bit for bit. Options are those of the judge whose place it takes.
    """

    name = "hash-1"

    def __init__(self, **options):
        pass

    def ask(self, requests: Sequence[JudgeRequest]) -> list[JudgeAnswer]:
        return [JudgeAnswer(self.log_odds(r.clip, r.question)) for r in requests]

    @staticmethod
    def log_odds(clip: np.ndarray, question: str) -> float:
        """Evenly spread over -MOST to MOST."""
        digest = hashlib.sha256(np.ascontiguousarray(clip).tobytes() + question.encode()).digest()
        return MOST * (int.from_bytes(digest[:8], "little") / 2**63 - 1)


class PatternJudge(HashJudge):
    """Brightness under a random pattern that the question chooses: a byte that is off by one hardly matters.

    For runs on other devices, where a pixel may be rounded the other way.
    """

    name = "pattern-1"

    @staticmethod
    def log_odds(clip: np.ndarray, question: str) -> float:
        """Over the frames after the first, which are the model's."""
        seed = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "little")
        made = clip[1:].astype(np.float64) / 255
        pattern = np.random.default_rng(seed).normal(size=made.shape) / np.sqrt(made.size)
        return float(MOST * np.sin(5 * np.sum(pattern * made)))  # spread evenly, whatever the clips have in common
