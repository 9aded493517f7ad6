"""What a VLM is sent about a picture, in the form that its server takes, and how its answer is read."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from world_distill.data.annotation.pair_parsing import Parsed, parse_pairs, without_example
from world_distill.data.annotation.prompt import Prompt
from world_distill.errors import UserError
from world_distill.vlm.complaints import named_fields
from world_distill.vlm.frames import data_urls
from world_distill.vlm.replies import first_choice, thoughts, written

_TEXT = {"type": "string"}
_PAIR = {"task": _TEXT, "solution": _TEXT, "kind": _TEXT}


def _object(**properties) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


SCHEMA = _object(scene=_TEXT, possible={"type": "boolean"}, pairs={"type": "array", "items": _object(**_PAIR)})


OUTPUTS = {"json_schema": "structured_outputs", "structured_outputs": "words"}  # what comes after what


@dataclasses.dataclass(frozen=True)
class Form:
    """How a server is asked.

    Attributes:
      thinking: it takes fields of the chat template.
      output: how the form of the answer is asked for: "json_schema", "structured_outputs" or "words" of the prompt.
      length: name of the field with the longest answer.
      seed, temperature: it takes them.
    """

    thinking: bool = True
    output: str = "json_schema"
    length: str = "max_tokens"
    seed: bool = True
    temperature: bool = True

    def lesser(self, words: str) -> "Form | None":
        """The form without the field that a refusal in these words names; None if it names none that can go."""
        steps: dict[str, dict[str, Any]] = {}  # what to do about each field
        if self.thinking:
            steps |= dict.fromkeys(("chat_template_kwargs", "enable_thinking"), {"thinking": False})
        if self.output == "json_schema":
            steps |= dict.fromkeys(("response_format", "json_schema"), {"output": OUTPUTS[self.output]})
        if self.output == "structured_outputs":
            steps |= dict.fromkeys(("structured_outputs", "guided_json"), {"output": OUTPUTS[self.output]})
        if self.length == "max_tokens":
            steps["max_tokens"] = {"length": "max_completion_tokens"}
        steps |= {name: {name: False} for name in ("seed", "temperature") if getattr(self, name)}
        named = named_fields(words, steps)
        return dataclasses.replace(self, **steps[named[0]]) if named else None

    def without_schema(self) -> "Form | None":
        """The form that asks for JSON in the next way; None if words are all that is left."""
        return dataclasses.replace(self, output=OUTPUTS[self.output]) if self.output in OUTPUTS else None


LEAST = Form(thinking=False, output="words", seed=False, temperature=False)
# What is added to it, the most useful first.
MORE: tuple[dict[str, Any], ...] = (
    {"output": "json_schema"}, {"output": "structured_outputs"}, {"thinking": True}, {"seed": True},
    {"temperature": True},
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is sent: whatever changes an answer.

    Attributes:
      model: as the server calls it.
      prompt: the texts.
      seconds: length of a clip.
      max_side: pixels of the picture's longer side, at most.
      quality: of JPEG; 0: PNG.
      max_tokens: of an answer, thoughts included.
      temperature: of sampling.
      thinking: the model may think before it answers, where it can.
      extra: more fields of the request.
    """

    model: str
    prompt: Prompt
    seconds: float
    max_side: int
    quality: int
    max_tokens: int
    temperature: float
    thinking: bool
    extra: Mapping[str, Any]

    def __post_init__(self):
        if not self.model:
            raise UserError("an annotator needs the name of its model, as the server lists it at /v1/models")
        if self.max_side < 1 or not 0 <= self.quality <= 100 or self.max_tokens < 1:
            raise UserError(
                "an annotator needs max_side and max_tokens of at least 1 and a quality of 0 to 100, not "
                f"{self.max_side}, {self.max_tokens}, {self.quality}"
            )
        if not self.seconds > 0 or not 0 <= self.temperature <= 2:
            raise UserError(
                f"an annotator needs seconds above 0, temperature of 0 to 2, not {self.seconds}, {self.temperature}"
            )

    @property
    def version(self) -> str:
        """One line that changes when answers may; free of addresses and keys."""
        picture = f"{self.max_side} jpeg{self.quality}" if self.quality else f"{self.max_side} png"
        thinking = " thinking" if self.thinking else ""
        extra = f" {json.dumps(dict(self.extra), sort_keys=True)}" if self.extra else ""
        return (
            f"server-1 {self.model} prompt-{self.prompt.version} {self.seconds:g}s {picture} "
            f"temperature-{self.temperature:g} {self.max_tokens}{thinking}{extra}"
        )

    def url(self, image: np.ndarray) -> str:
        """The picture [H W 3] uint8 as a data URL."""
        return data_urls(image[None], frames=2, max_side=self.max_side, quality=self.quality)[0]

    def body(self, form: Form, url: str, *, before: str, after: str, seed: int) -> dict[str, Any]:
        """A request: the instructions come first, so that the beginning is the same for all pictures."""
        texts = [{"type": "text", "text": text} for text in (before, after) if text]
        content = [*texts[:-1], {"type": "image_url", "image_url": {"url": url}}, texts[-1]]
        fields: dict[str, Any] = {form.length: self.max_tokens}
        if form.temperature:
            fields["temperature"] = self.temperature
        if form.seed:
            fields["seed"] = seed
        if form.thinking:
            fields["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        if form.output == "json_schema":
            schema = {"name": "tasks", "strict": True, "schema": SCHEMA}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form.output == "structured_outputs":
            fields["structured_outputs"] = {"json": SCHEMA}
        return {"model": self.model, "messages": [{"role": "user", "content": content}]} | fields | dict(self.extra)


def read_pairs(reply: str, clean: Callable[[str], str], prompt: Prompt) -> Parsed:
    """Reads the body of a reply to `prompt`.

    Raises MalformedAnswer if there is no answer in it, or the model declines.
    """
    choice = first_choice(reply)
    text, finished = text_of(choice)
    parsed = without_example(parse_pairs(clean(text), finished=finished), prompt)
    if choice.get("finish_reason") == "length":
        return dataclasses.replace(parsed, cut_off=True)
    return parsed


def text_of(choice: dict[str, Any]) -> tuple[str, bool]:
    """(what was written, whether the model ended it by itself).

    Some servers take a whole answer for a thought: where nothing else was written, it is given as an unclosed one.
    """
    text, finished = written(choice), choice.get("finish_reason") != "length"
    if not text.strip() and choice.get("finish_reason") == "stop" and (reasoning := thoughts(choice)):
        text = f"<think>{reasoning}"
    return text, finished
