"""Gemma 3, the text encoder of LTX-2 (Gemma Team, arXiv 2503.19786; HaCohen et al., arXiv 2601.03233), by transformers.

LTX-2 reads the states of all layers of Gemma, 49 for each token. They are normalised and projected to one row a token
here, once a text: a text of 60 tokens is then half a megabyte, and its states would be 23. What comes behind the rows,
the connectors, is a part of the base and runs on the device.

The projection belongs to the checkpoint: that of the distilled model is another than that of the one it was made from.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from world_distill.models.ltx2.connectors import project_states
from world_distill.models.text_encoders import TorchTextEncoder
from world_distill.storage.safetensors_folder import TensorFileError, digest, find_tensor

MAX_LENGTH = 1024  # tokens that the model was trained with
# The projection's name in `connectors/` of diffusers' layout, and in the original file.
PROJECTIONS = ("text_proj_in.weight", "text_embedding_projection.aggregate_embed.weight")


class GemmaTextEncoder(TorchTextEncoder):
    """Frozen Gemma 3, and LTX-2's projection of its states in JAX; see `TorchTextEncoder` for its other arguments.

    Args:
      projection: a safetensors file, or a folder of them, that holds the projection; None takes `connectors/` of
        `folder`.
      dtype: of Gemma's weights and computation: "bfloat16" (24 GB for Gemma-3-12B) or "float32" (twice that).

    Raises:
      UserError: PyTorch is not installed, or the projection's file is damaged.
      ValueError: an unknown dtype, a folder without these parts, weights that lack some of the encoder's, or a
        projection that is not there or of another encoder.
    """

    title, model, network_class = "Gemma 3", "LTX-2", "AutoModel"
    model_types = ("gemma3", "gemma3_text")
    tokenizer_options = {"padding_side": "left"}  # noqa: RUF012  (never changed)

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        projection: str | os.PathLike | None = None,
        max_length: int = MAX_LENGTH,
        dtype: str = "bfloat16",
        batch: int = 4,
    ):
        folder = pathlib.Path(folder)
        self.check_folder(folder)
        # Read before Gemma, which takes minutes.
        kernel = read_projection(pathlib.Path(projection) if projection else folder / "connectors")
        super().__init__(folder, max_length=max_length, dtype=dtype, batch=batch)
        # The vision tower is not asked.
        self.network = getattr(self.network, "language_model", self.network)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        sizes = self.network.config
        states = sizes.hidden_size * (sizes.num_hidden_layers + 1)
        if kernel.shape[0] != states:
            raise ValueError(
                f"the projection takes {kernel.shape[0]} numbers a token, and the text encoder of {folder} gives"
                f" {sizes.num_hidden_layers + 1} states of {sizes.hidden_size}: they are of two models"
            )
        self.width = kernel.shape[1]
        self._project: Callable[..., jax.Array] = functools.partial(jax.jit(project_states), kernel=jnp.asarray(kernel))

    def tidy(self, text: str) -> str:
        return text.strip()

    def states(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Rows [l d] bfloat16 of each text."""
        import torch

        # Gemma's positions are relative, so a text's states do not depend on how much stands in front of it. Lengths
        # are multiples of 64: each is a program of its own.
        tokens = self.tokenizer(
            texts, padding=True, pad_to_multiple_of=64, return_attention_mask=True, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            found = self.network(tokens.input_ids, tokens.attention_mask, output_hidden_states=True)
            states = torch.stack(found.hidden_states, dim=-1).float().cpu().numpy()
        mask = tokens.attention_mask.bool().cpu().numpy()
        rows = np.asarray(self._project(states, mask)).astype(jnp.bfloat16)
        return [row[real] for row, real in zip(rows, mask, strict=True)]


def projection_digest(path: pathlib.Path) -> str:
    """`safetensors_folder.digest` of the projection that `read_projection` reads; "" where there is none."""
    try:
        return digest(read_projection(path).T)
    except (ValueError, TensorFileError):
        return ""  # `GemmaTextEncoder` says what is wrong; training needs none


def read_projection(path: pathlib.Path) -> np.ndarray:
    """The kernel [i o] of LTX-2's text projection, from a safetensors file or a folder of them.

    Raises:
      ValueError: none of the files holds it.
      TensorFileError: one of them is damaged.
    """
    found = find_tensor(path, PROJECTIONS)
    if found is None:
        raise ValueError(
            f"{path} holds no text projection ({' or '.join(PROJECTIONS)}): it stands in connectors/ of diffusers'"
            " layout, and in the original single file"
        )
    if found.tensor.ndim != 2:
        raise ValueError(f"{found.file}: {found.name} has shape {list(found.tensor.shape)}, not [rows, states]")
    return found.tensor.T
