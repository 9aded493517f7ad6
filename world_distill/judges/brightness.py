"""A judge without a model, for dry runs: it likes bright clips.

Its answers have nothing to do with the task. But they differ from clip to clip, come at once, and RL can raise them: if
`reward/total` does not rise with this judge, it will not with another.
"""

from collections.abc import Sequence

import numpy as np

from world_distill.interfaces import JudgeAnswer, JudgeRequest


class Brightness:
    """`interfaces.Judge`: log-odds from -10 (black) to 10 (white), by the mean over the frames after the first."""

    name = "brightness-1"

    def ask(self, requests: Sequence[JudgeRequest]) -> list[JudgeAnswer]:
        return [JudgeAnswer(float(20 * np.mean(request.clip[1:]) / 255 - 10)) for request in requests]
