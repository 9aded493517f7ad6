"""A vision-language model in this process, run by transformers: what it would say next, and what it says.

Any image-text model of transformers. Its own processor makes the inputs of a chat. The families of
Qwen2-VL to Qwen3.5 take pictures in one way: the chat template leaves one token for a picture, which becomes as many as
the picture has patches. For them the part of a conversation up to its last picture can be computed once and gone on
from. Pictures are cut up by Pillow and not by torchvision, so that they are the same wherever the model runs.

Messages are a chat's, with parts {"type": "text", "text": str} and {"type": "image", "image": PIL image}. Models that
could think before they answer are kept from it.
"""

import copy
import dataclasses
import inspect
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from world_distill.errors import UserError
from world_distill.vlm.chat_marks import ForbiddenText, find_mark, refuse_marks
from world_distill.vlm.local_files import SHARING, check_kind, identity

Message = Mapping[str, Any]
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    images: list[Any]


class LocalVLM:
    """One model; its calls wait for each other.

    Attributes:
      name: changes with the weights and the dtype, and not with where the model's folder lies.
    """

    def __init__(
        self, model: str, *, revision: str = "", dtype: str = "bfloat16", device: str = "", device_map: str = ""
    ):
        """Nothing is loaded yet.

        Args:
          model: a folder in transformers' layout, or a name on the hub.
          revision: of a model on the hub; empty: the newest.
          dtype: of weights and computation.
          device: as PyTorch calls it; empty: a GPU if PyTorch sees one.
          device_map: "auto" spreads the layers over all GPUs.

        Raises:
          UserError: no model, an unknown dtype, both of device and device_map, or a model that cannot be found.
        """
        if not model or dtype not in DTYPES or (device and device_map):
            raise UserError(
                f"a VLM in process needs a model, a dtype of {', '.join(DTYPES)}, and a device or a device_map, not "
                f"{model!r}, {dtype!r}, {device!r} and {device_map!r}"
            )
        self._source = {"pretrained_model_name_or_path": model} | ({"revision": revision} if revision else {})
        self._dtype, self._device, self._device_map = dtype, device, device_map
        self.name = f"{identity(model, self._source)} {dtype}"
        self._lock = threading.RLock()
        self._processor: Any = None  # of a class that is not in `SHARING`
        self._model: Any = None

    def __repr__(self) -> str:
        return f"LocalVLM({self.name!r})"

    @property
    def shares(self) -> bool:
        """Whether `shared_log_probs` can be called."""
        self.load()
        return self._processor is None

    def load(self) -> None:
        """Reads the weights, once.

        Raises:
          UserError: PyTorch is missing, or the model cannot be read, lacks weights or is of another kind.
        """
        with self._lock:
            if self._model is None:
                self._load()

    def next_token_log_probs(self, messages: Sequence[Message]) -> np.ndarray:
        """Log-probabilities [vocab] float32 of the first token of the answer.

        Raises:
          ForbiddenText: see there.
        """
        with self._lock:
            inputs = self._ready(messages)
            return self._log_probs(self._forward(inputs, use_cache=False).logits)[0, -1]

    def shared_log_probs(self, conversations: Sequence[Sequence[Message]], *, batch: int = 1) -> np.ndarray:
        """Log-probabilities [n vocab] float32 for conversations that are the same up to their last picture.

        That part is computed once, and the rest of each goes on from it. With `batch=1` a conversation's numbers are
        the same to the last bit whatever is asked beside it; with more, only up to rounding.

        Raises:
          ForbiddenText: see there.
          ValueError: they differ before the last picture, or there is none, or this class cannot go on from a part.
        """
        with self._lock:
            if not self.shares:
                raise ValueError(f"{self.name} computes whole conversations only")
            prompts = [self._encode(messages) for messages in conversations]
            images = prompts[0].images
            if any(list(map(id, p.images)) != list(map(id, images)) for p in prompts):
                raise ValueError("these conversations do not show the same pictures")
            vision = self._see(images)
            ids = [self._expand(p.ids, vision) for p in prompts]
            cut = 1 + max((i for i, token in enumerate(ids[0]) if token == self._image_token), default=-1)
            if not cut or any(row[:cut] != ids[0][:cut] for row in ids):
                raise ValueError("these conversations have no common beginning up to their last picture")
            out = self._forward(self._inputs(ids[0][:cut], vision), use_cache=True)
            cache = out[_cache_name(self._model)]
            start = cut + int(self._model.model.rope_deltas.max())  # positions of pictures are fewer than their tokens
            rests = [row[cut:] for row in ids]
            parts = [self._continue(cache, rests[i : i + batch], start) for i in range(0, len(rests), batch)]
            return np.concatenate(parts)

    def generate(self, messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int) -> str:
        """An answer; temperature 0 takes the likeliest token each time.

        Raises:
          ForbiddenText: see there.
        """
        import torch

        with self._lock:
            inputs = self._ready(messages)
            how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {
                "do_sample": False, "temperature": None, "top_p": None, "top_k": None,
            }  # fmt: skip
            devices = range(torch.cuda.device_count()) if self._model.device.type == "cuda" else ()
            with torch.inference_mode(), torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
                tokens = self._model.generate(**inputs, max_new_tokens=max_tokens, **how)
            # Marks of thoughts are special tokens of some models: the parser needs them.
            answer = self._tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
            return self._without_ends(answer).strip()

    def checked(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The same messages. Raises ForbiddenText (see there)."""
        self.load()
        for part in _parts(messages):
            if part["type"] != "text":
                continue
            refuse_marks(part["text"])
            for mark in self._marks:
                if mark in part["text"]:
                    raise ForbiddenText(f"a text for the VLM has the mark {mark!r} in it")
        return messages

    def single_token(self, text: str) -> int | None:
        """The number of the one token that is `text`, if there is such a token."""
        self.load()
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids[0] if len(ids) == 1 and self.token_text(ids[0]) == text else None

    def token_text(self, token: int) -> str:
        """What a token is, written out."""
        self.load()
        return self._tokenizer.decode([token])

    def _load(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise UserError(
                "a VLM in process needs torch, which is in the extra `torch`: pip install -e '.[torch]'"
            ) from error
        from safetensors import SafetensorError
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        where = self._source["pretrained_model_name_or_path"]
        kind = check_kind(self._source)
        # Without a map the weights are read into main memory first.
        placed = {"device_map": self._device_map} if self._device_map else {}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(**self._source)
            if kind in SHARING:
                self._processor = None
                self._images = AutoImageProcessor.from_pretrained(**self._source, backend="pil")
            else:
                self._processor = AutoProcessor.from_pretrained(**self._source, backend="pil")
            if not self._template():
                raise UserError(f"the VLM {where} has no chat template: take the instruction-tuned model")
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                **self._source, dtype=getattr(torch, self._dtype), output_loading_info=True, **placed
            )
            model, found = loaded
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, SafetensorError) as error:
            missing = "" if kind in SHARING or find_spec("torchvision") else (
                "\n  Processors of many classes need torchvision, which is not installed: pip install torchvision"
            )  # fmt: skip
            raise UserError(f"the VLM {where} cannot be read: {error}{missing}") from error
        if found["missing_keys"]:  # transformers draws these at random and says so in its log only
            raise UserError(f"the VLM {where} lacks weights: {', '.join(sorted(found['missing_keys'])[:10])}")
        self._image_token = getattr(model.config, "image_token_id", None)
        if not self._device_map:
            model.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # Added tokens that are no marks: line breaks, HTML.
        added = [token for token in self._tokenizer.added_tokens_decoder.values() if token.content.strip()]
        self._marks = [token.content for token in added if token.special or find_mark(token.content)]
        self._model = model.eval().requires_grad_(False)

    def _template(self) -> str:
        return str(getattr(self._processor, "chat_template", None) or self._tokenizer.chat_template or "")

    def _text(self, messages: Sequence[Message]) -> str:
        """The conversation as the model reads it, up to where its answer begins."""
        writer = self._processor if getattr(self._processor, "chat_template", None) else self._tokenizer
        template = self._template()
        # Processors complain about what their template does not know.
        thinking = {"enable_thinking": False} if "enable_thinking" in template else {}
        text = writer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **thinking)
        return close_thinking(text, template)

    def _ready(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The model's inputs for a whole conversation."""
        self.load()
        if self._processor is None:
            prompt = self._encode(messages)
            vision = self._see(prompt.images)
            return self._inputs(self._expand(prompt.ids, vision), vision)
        text, images = self._text(self.checked(messages)), _images(messages)
        if images and text == self._text(_without_images(messages)):
            raise UserError(f"{self.name}: its chat template has no room for pictures")
        # The template writes the first token itself, or the tokenizer does: never both.
        first = self._tokenizer.bos_token
        made = self._processor(
            text=[text], images=[images] if images else None, return_tensors="pt",
            add_special_tokens=not (first and text.startswith(first)),
        )  # fmt: skip
        return dict(made.to(self._model.device, self._model.dtype))

    def _without_ends(self, answer: str) -> str:
        """An answer without the marks that end it."""
        ends = {self._tokenizer.eos_token, self._tokenizer.pad_token, "<|im_end|>", "<end_of_turn>", "<|eot_id|>"}
        for end in ends - {None}:
            answer = answer.replace(end, "")
        return answer

    def _encode(self, messages: Sequence[Message]) -> _Prompt:
        """Token numbers, with one for each picture, and the pictures."""
        ids = self._tokenizer(self._text(self.checked(messages)), add_special_tokens=False).input_ids
        images = _images(messages)
        if (left := ids.count(self._image_token)) != len(images):
            raise UserError(f"{self.name}: its chat template has room for {left} pictures of {len(images)}")
        return _Prompt(ids, images)

    def _see(self, images: Sequence[Any]) -> dict[str, Any]:
        """The model's inputs for pictures; {} for none."""
        if not images:
            return {}
        seen = self._images(images=list(images), return_tensors="pt")
        return {name: seen[name].to(self._model.device) for name in ("pixel_values", "image_grid_thw")}

    def _expand(self, ids: Sequence[int], vision: Mapping[str, Any]) -> list[int]:
        """Puts as many tokens in a picture's place as it has merged patches."""
        if not vision:
            return list(ids)
        counts = iter((vision["image_grid_thw"].prod(dim=1) // self._images.merge_size**2).tolist())
        return [t for token in ids for t in [token] * (next(counts) if token == self._image_token else 1)]

    def _inputs(self, ids: Sequence[int], vision: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        tokens = torch.tensor([list(ids)], device=self._model.device)
        if not vision:
            return {"input_ids": tokens}
        return {"input_ids": tokens, "mm_token_type_ids": (tokens == self._image_token).int(), **vision}

    def _forward(self, inputs: Mapping[str, Any], *, use_cache: bool) -> Any:
        import torch

        fewer = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self._model.forward).parameters else {}
        with torch.inference_mode():
            return self._model(**inputs, use_cache=use_cache, **fewer)

    def _continue(self, cache: Any, rests: Sequence[Sequence[int]], start: int) -> np.ndarray:
        """Log-probabilities [n vocab] behind each rest, from the position `start`; the cache stays as it is."""
        import torch

        device = self._model.device
        longest = max(map(len, rests))
        # What fills up the shorter rows stands behind their last token, which therefore does not see it: no mask.
        tokens = torch.tensor([[*rest, *[0] * (longest - len(rest))] for rest in rests], device=device)
        cache = copy.deepcopy(cache)
        if len(rests) > 1:
            cache.reorder_cache(torch.zeros(len(rests), dtype=torch.long, device=device))
        positions = torch.arange(start, start + longest, device=device).expand(3, len(rests), longest)
        lasts = sorted({len(rest) - 1 for rest in rests})
        with torch.inference_mode():
            logits = self._model(
                input_ids=tokens, position_ids=positions, use_cache=True, **{_cache_name(self._model): cache},
                logits_to_keep=torch.tensor(lasts, device=device),
            ).logits  # fmt: skip
        rows = [lasts.index(len(rest) - 1) for rest in rests]
        return self._log_probs(logits)[np.arange(len(rests)), rows]

    @staticmethod
    def _log_probs(logits: Any) -> np.ndarray:
        return logits.float().log_softmax(-1).cpu().numpy()


def _parts(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    return [part for message in messages for part in message["content"]]


def _images(messages: Sequence[Message]) -> list[Any]:
    return [part["image"] for part in _parts(messages) if part["type"] == "image"]


def _without_images(messages: Sequence[Message]) -> list[Message]:
    return [m | {"content": [part for part in m["content"] if part["type"] != "image"]} for m in map(dict, messages)]


def _cache_name(model: Any) -> str:
    """What transformers calls the cache: `past_key_values` before 5.2x, and after that `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def close_thinking(prompt: str, template: str) -> str:
    """A prompt behind which the answer follows at once.

    Templates that know `enable_thinking` see to it themselves. Others open a thought, which is closed here, or know
    thoughts in what was said before, and then an empty one is put in; a model that never thinks gets none.
    """
    empty = "<think>\n\n</think>\n\n"
    if prompt.rstrip().endswith("<think>"):
        return prompt.rstrip().removesuffix("<think>") + empty
    if "<think>" in template and "enable_thinking" not in template:
        return prompt + empty
    return prompt
