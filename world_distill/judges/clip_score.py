"""CLIP's score of a clip's frames and its task as a learned reward; with PickScore's weights it is PickScore."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from world_distill.errors import UserError
from world_distill.judges.scorer import LearnedReward, Measures
from world_distill.vlm.frames import chosen_images, spread_frames
from world_distill.vlm.picture_text import PictureText

MEASURE = "clip_score"


class ClipScore(LearnedReward):
    """`interfaces.Judge`: the mean over frames of cosine times logit scale. It sees single pictures, and no motion."""

    def __init__(
        self,
        model: str = "",
        *,
        processor: str = "",
        revision: str = "",
        dtype: str = "float32",
        device: str = "",
        frames: int = 8,
        measure: str = MEASURE,
        threshold: float | None = None,
    ):
        """Nothing is loaded yet: a run whose answers are all remembered does not need the weights.

        PickScore is model="yuvalkirstain/PickScore_v1" with processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K".

        Args:
          model: a CLIP model: a folder in transformers' layout, or a name on the hub.
          processor: the same, of tokenizer and picture processor; empty: the model's own.
          revision: of a model on the hub; empty: the newest.
          dtype: "float32", "bfloat16" or "float16". Scores of a task's clips are close: half precision has few steps.
          device: as PyTorch calls it; empty: a GPU if PyTorch sees one.
          frames: of a clip that are scored, evenly over time.
          measure: what the number is called in `rollout.weights` and in the log.
          threshold: score above which a clip counts as a yes; None: none, and no rate.

        Raises:
          UserError: a value is out of range, or there is no such model.
        """
        if frames < 2:
            raise UserError(f"ClipScore needs frames of at least 2, not {frames}")
        self._clip = PictureText(model, processor=processor, revision=revision, dtype=dtype, device=device)
        self._frames = frames
        measures = Measures({measure: MEASURE}, {} if threshold is None else {measure: float(threshold)})
        super().__init__(f"clip-score-1 {self._clip.name} {frames}", measures, batch=1)

    def numbers(self, clips: Sequence[np.ndarray], tasks: Sequence[str]) -> list[Mapping[str, Any]]:
        found = []
        for clip, task in zip(clips, tasks, strict=True):
            pictures = chosen_images(clip, frames=spread_frames(len(clip), self._frames), max_side=max(clip.shape[1:3]))
            found.append({MEASURE: float(self._clip.scores(pictures, task).mean())})
        return found
