"""The judges of the small runs tell clips and questions apart, and one of them only as far as a viewer could."""

import numpy as np
import pytest
from hash_judge import MOST, HashJudge, PatternJudge

from world_distill.interfaces import JudgeRequest

CLIPS = np.random.default_rng(0).integers(256, size=(200, 5, 12, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize("judge", [HashJudge(), PatternJudge()], ids=lambda judge: judge.name)
def test_answers_are_spread_and_depend_on_clip_and_question(judge):
    ask = lambda clips, question: [a.log_odds for a in judge.ask([JudgeRequest(c, question) for c in clips])]  # noqa: E731
    first = ask(CLIPS, "Is it done?")
    assert first == ask(CLIPS, "Is it done?") and len(set(first)) == len(first)
    assert np.abs(first).max() <= MOST and np.std(first) > 1
    assert abs(np.corrcoef(first, ask(CLIPS, "Is it real?"))[0, 1]) < 0.3


def test_one_byte_more_is_another_hash_and_the_same_pattern():
    other = CLIPS.copy()
    other[:, 2, 3, 4] ^= 1
    for judge, far in ((HashJudge(), True), (PatternJudge(), False)):
        gaps = [judge.log_odds(a, "q") - judge.log_odds(b, "q") for a, b in zip(CLIPS, other, strict=True)]
        assert (np.median(np.abs(gaps)) > 0.5) if far else (np.abs(gaps).max() < 5e-3)
