"""A vision-language model in this process as the annotator: the prompt and the parser are those of every VLM."""

import numpy as np
from absl import logging

from world_distill.data.annotation.pair_parsing import parse_pairs, without_example
from world_distill.data.annotation.prompt import load_prompt
from world_distill.errors import UserError
from world_distill.interfaces import AnnotationError, TaskPair
from world_distill.vlm.frames import chosen_images
from world_distill.vlm.local import LocalVLM, Message


class LocalAnnotator:
    """`interfaces.Annotator`.

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
        prompt: str = "",
        seconds: float = 5.0,
        max_side: int = 1024,
        max_tokens: int = 4096,
        temperature: float = 0.7,
        tries: int = 3,
    ):
        """Nothing is loaded yet.

        Args:
          model: a folder in transformers' layout, or a name on the hub.
          revision: of a model on the hub; empty: the newest.
          dtype: "bfloat16", "float16" or "float32".
          device: as PyTorch calls it; empty: a GPU if PyTorch sees one.
          device_map: "auto" spreads the layers over all GPUs.
          prompt: folder of prompt files; empty: those that ship with the package.
          seconds: the length of a clip, as the prompt tells it.
          max_side: pixels; larger pictures are shrunk.
          max_tokens: of an answer.
          temperature: of sampling; with 0 the answer is the likeliest, and asking again is no use.
          tries: answers that may be of no use, each drawn with another seed.

        Raises:
          UserError: a value is out of range, there is no such model, or the prompt cannot be used.
        """
        if max_side < 1 or max_tokens < 1 or temperature < 0 or tries < 1 or not seconds > 0:
            raise UserError(
                "an annotator needs max_side, max_tokens and tries of at least 1, seconds above 0 and a temperature of "
                f"at least 0, not {max_side}, {max_tokens}, {tries}, {seconds} and {temperature}"
            )
        try:
            self._prompt = load_prompt(prompt or None)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        self._vlm = LocalVLM(model, revision=revision, dtype=dtype, device=device, device_map=device_map)
        self._seconds, self._max_side, self._max_tokens = seconds, max_side, max_tokens
        self._temperature, self._tries = temperature, tries if temperature else 1
        self.name = (
            f"local-1 {self._vlm.name} {max_side} prompt {self._prompt.version} {seconds:g}s "
            f"temperature {temperature:g} tokens {max_tokens} tries {self._tries}"
        )

    def __repr__(self) -> str:
        return f"LocalAnnotator({self.name!r})"

    def annotate(self, image: np.ndarray, *, max_pairs: int, seed: int) -> list[TaskPair]:
        """Tasks and solutions for one image [H W 3] uint8, unchecked; [] when there is nothing to do in it.

        Of answers that are all cut off, the one with most pairs is taken.

        Raises:
          AnnotationError: no answer could be understood; it says how the last one began.
          UserError: the model cannot be loaded.
        """
        messages = self._messages(image, max_pairs)
        unusable = []
        for attempt in range(self._tries):
            text = self._vlm.generate(
                messages, max_tokens=self._max_tokens, temperature=self._temperature, seed=seed + 1_000_003 * attempt
            )
            parsed = without_example(parse_pairs(text), self._prompt)
            if (parsed.pairs or parsed.nothing_to_do) and not parsed.cut_off:
                return list(parsed.pairs)
            unusable.append(parsed)
        best = max(unusable, key=lambda one: len(one.pairs))
        if best.pairs:
            logging.warning("annotator: %d pairs of an answer that is cut off; max_tokens?", len(best.pairs))
            return list(best.pairs)
        reasons = [*unusable[-1].problems, *["the answer ends before it should: max_tokens?"] * unusable[-1].cut_off]
        raise AnnotationError(f"no answer of {self._tries} could be understood; of the last: {'; '.join(reasons)}")

    def _messages(self, image: np.ndarray, max_pairs: int) -> list[Message]:
        """The picture between the prompt's two texts."""
        numbers = {"max_pairs": max_pairs, "seconds": self._seconds}
        (picture,) = chosen_images(image[None], frames=2, max_side=self._max_side)
        before, after = self._prompt.before(**numbers), self._prompt.after(**numbers)
        parts = [{"type": "text", "text": before}, {"type": "image", "image": picture}, {"type": "text", "text": after}]
        return [{"role": "user", "content": parts}]
