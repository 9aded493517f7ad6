"""A CLIP model in this process, run by transformers: how well pictures fit a text.

The score is the cosine between the features of picture and text, times the model's logit scale (Radford et al. 2021).
PickScore (arXiv 2305.01569) is this score of a CLIP that was trained on people's choices.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from world_distill.errors import UserError
from world_distill.vlm.local import DTYPES
from world_distill.vlm.local_files import identity


class PictureText:
    """One model; its calls wait for each other.

    Attributes:
      name: changes with the weights, the processor and the dtype, and not with where the model's folder lies.
    """

    def __init__(
        self, model: str, *, processor: str = "", revision: str = "", dtype: str = "float32", device: str = ""
    ):
        """Nothing is loaded yet.

        Args:
          model: a folder in transformers' layout, or a name on the hub.
          processor: the same, of tokenizer and picture processor; empty: the model's own.
          revision: of a model on the hub; empty: the newest.
          dtype: of weights and computation.
          device: as PyTorch calls it; empty: a GPU if PyTorch sees one.

        Raises:
          UserError: no model, an unknown dtype, or a model that cannot be found.
        """
        if not model or dtype not in DTYPES:
            raise UserError(f"a CLIP model needs a model and a dtype of {', '.join(DTYPES)}, not {model!r}, {dtype!r}")
        self._source: dict[str, Any] = {"pretrained_model_name_or_path": model}
        self._source |= {"revision": revision} if revision else {}
        self._reader = {"pretrained_model_name_or_path": processor} if processor else self._source
        self._dtype, self._device, self._model = dtype, device, None
        self.name = f"{identity(model, self._source)} {f'{processor} ' if processor else ''}{dtype}"
        self._lock = threading.RLock()

    def scores(self, pictures: Sequence[Image.Image], text: str) -> np.ndarray:
        """How well each picture fits the text [n] float32; what is beyond the model's longest text is left out.

        Raises:
          UserError: PyTorch is missing, or the model cannot be read, lacks weights or is no CLIP.
        """
        with self._lock:
            model = self._load()
            import torch

            # Tokenizers of some repositories do not know how long a text may be.
            longest = model.config.text_config.max_position_embeddings
            tokens = self._tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
            pixels = self._pictures(images=list(pictures), return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                out = model(
                    input_ids=tokens["input_ids"].to(model.device),
                    attention_mask=tokens["attention_mask"].to(model.device),
                    pixel_values=pixels.to(model.device, model.dtype),
                )
            return out.logits_per_image[:, 0].float().cpu().numpy()

    def _load(self) -> Any:
        """The model, whose weights are read once."""
        if self._model is not None:
            return self._model
        try:
            import torch
        except ImportError as error:
            raise UserError(
                "a CLIP model needs torch, which is in the extra `torch`: pip install -e '.[torch]'"
            ) from error
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

        where = self._source["pretrained_model_name_or_path"]
        try:
            kind = AutoConfig.from_pretrained(**self._source).model_type
            if kind != "clip":  # SigLIP's scores have another form
                raise UserError(f"{where} is of type {kind!r}, and this score is of CLIP models")
            self._tokenizer = AutoTokenizer.from_pretrained(**self._reader)
            self._pictures = AutoImageProcessor.from_pretrained(**self._reader, backend="pil")
            loaded: Any = CLIPModel.from_pretrained(
                **self._source, dtype=getattr(torch, self._dtype), output_loading_info=True
            )
            model, found = loaded
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, SafetensorError) as error:
            raise UserError(f"the CLIP model {where} cannot be read: {error}") from error
        if found["missing_keys"]:  # transformers draws these at random and says so in its log only
            raise UserError(f"the CLIP model {where} lacks weights: {', '.join(sorted(found['missing_keys'])[:10])}")
        model.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.eval().requires_grad_(False)
        return self._model
