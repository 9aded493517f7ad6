"""A vision-language model in this process, run by transformers: what it would say next, and what it says.

Qwen2.5-VL, Qwen3-VL and Qwen3.5, which take pictures in the same way: the chat template leaves one token for a picture,
which becomes as many as the picture has patches. Pictures are cut up by Pillow and not by torchvision, so that they
are the same wherever the model runs.

Messages are a chat's, with parts {"type": "text", "text": str} and {"type": "image", "image": PIL image}. Models that
could think before they answer are kept from it.
"""

import copy
import dataclasses
import hashlib
import json
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from world_distill.errors import UserError

Message = Mapping[str, Any]
DTYPES = ("bfloat16", "float16", "float32")
_ENDS = 1 << 20  # bytes of each end of a weight file that tell it from others


class ForbiddenText(ValueError):
    """A text holds one of the marks that order a chat: it could pass for another speaker, or for a picture."""


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
        self.name = f"{_identity(model, self._source)} {dtype}"
        self._lock = threading.RLock()
        self._model: Any = None

    def __repr__(self) -> str:
        return f"LocalVLM({self.name!r})"

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
            self.load()
            prompt = self._encode(messages)
            vision = self._see(prompt.images)
            return self._log_probs(self._forward(self._expand(prompt.ids, vision), vision).logits)[0, -1]

    def shared_log_probs(self, conversations: Sequence[Sequence[Message]], *, batch: int = 1) -> np.ndarray:
        """Log-probabilities [n vocab] float32 for conversations that are the same up to their last picture.

        That part is computed once, and the rest of each goes on from it. With `batch=1` a conversation's numbers are
        the same to the last bit whatever is asked beside it; with more, only up to rounding.

        Raises:
          ForbiddenText: see there.
          ValueError: they differ before the last picture, or there is none.
        """
        with self._lock:
            self.load()
            prompts = [self._encode(messages) for messages in conversations]
            images = prompts[0].images
            if any(list(map(id, p.images)) != list(map(id, images)) for p in prompts):
                raise ValueError("these conversations do not show the same pictures")
            vision = self._see(images)
            ids = [self._expand(p.ids, vision) for p in prompts]
            cut = 1 + max((i for i, token in enumerate(ids[0]) if token == self._image_token), default=-1)
            if not cut or any(row[:cut] != ids[0][:cut] for row in ids):
                raise ValueError("these conversations have no common beginning up to their last picture")
            cache = self._forward(ids[0][:cut], vision).past_key_values
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
            self.load()
            prompt = self._encode(messages)
            vision = self._see(prompt.images)
            ids = self._expand(prompt.ids, vision)
            how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {
                "do_sample": False, "temperature": None, "top_p": None, "top_k": None,
            }  # fmt: skip
            devices = range(torch.cuda.device_count()) if self._model.device.type == "cuda" else ()
            with torch.inference_mode(), torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                inputs = self._inputs(ids, vision)
                ones = torch.ones_like(inputs["input_ids"])
                tokens = self._model.generate(**inputs, attention_mask=ones, max_new_tokens=max_tokens, **how)
            return self._tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True).strip()

    def checked(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The same messages. Raises ForbiddenText (see there)."""
        self.load()
        for part in _parts(messages):
            for mark in self._marks:
                if part["type"] == "text" and mark in part["text"]:
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
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        where = self._source["pretrained_model_name_or_path"]
        # Without a map the weights are read into main memory first.
        placed = {"device_map": self._device_map} if self._device_map else {}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(**self._source)
            self._images = AutoImageProcessor.from_pretrained(**self._source, backend="pil")
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                **self._source, dtype=getattr(torch, self._dtype), output_loading_info=True, **placed
            )
            model, found = loaded
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
            raise UserError(f"the VLM {where} cannot be read: {error}") from error
        if found["missing_keys"]:  # transformers draws these at random and says so in its log only
            raise UserError(f"the VLM {where} lacks weights: {', '.join(sorted(found['missing_keys'])[:10])}")
        self._image_token = getattr(model.config, "image_token_id", None)
        if self._image_token is None or not hasattr(getattr(model, "model", None), "rope_deltas"):
            raise UserError(f"the VLM {where} is a {type(model).__name__}: Qwen2.5-VL, Qwen3-VL and Qwen3.5 are known")
        if not self._tokenizer.chat_template:
            raise UserError(f"the VLM {where} has no chat template: take the instruction-tuned model")
        if not self._device_map:
            model.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._marks = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
        self._model = model.eval().requires_grad_(False)

    def _encode(self, messages: Sequence[Message]) -> _Prompt:
        """Token numbers, with one for each picture, and the pictures."""
        text = close_thinking(
            self._tokenizer.apply_chat_template(
                self.checked(messages), tokenize=False, add_generation_prompt=True, enable_thinking=False
            ),
            str(self._tokenizer.chat_template),
        )
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        images = [part["image"] for part in _parts(messages) if part["type"] == "image"]
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

    def _forward(self, ids: Sequence[int], vision: Mapping[str, Any]) -> Any:
        import torch

        with torch.inference_mode():
            return self._model(**self._inputs(ids, vision), use_cache=True, logits_to_keep=1)

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
                input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=torch.tensor(lasts, device=device),
            ).logits  # fmt: skip
        rows = [lasts.index(len(rest) - 1) for rest in rests]
        return self._log_probs(logits)[np.arange(len(rests)), rows]

    @staticmethod
    def _log_probs(logits: Any) -> np.ndarray:
        return logits.float().log_softmax(-1).cpu().numpy()


def _parts(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    return [part for message in messages for part in message["content"]]


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


def _identity(model: str, source: Mapping[str, Any]) -> str:
    """A model's name with what tells its weights from others."""
    folder = pathlib.Path(model)
    if folder.is_dir():
        try:
            kind = json.loads((folder / "config.json").read_text())["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} is no model in transformers' layout (config.json: {error!r})") from error
        return f"{kind}@{_digest(folder)}"
    from transformers import AutoConfig

    try:
        commit = AutoConfig.from_pretrained(**source)._commit_hash
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the VLM {model} is neither a folder nor a model on the hub: {error}") from error
    return f"{model}@{(commit or source.get('revision', 'unknown'))[:12]}"


def _digest(folder: pathlib.Path) -> str:
    """12 hex digits of all small files, and of sizes and both ends of the weights."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".jinja", ".txt", ".safetensors", ".bin")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_ENDS) if file.suffix in (".safetensors", ".bin") else stream.read())
            stream.seek(max(0, size - _ENDS))
            digest.update(stream.read())
    return digest.hexdigest()[:12]
