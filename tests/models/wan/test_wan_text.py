"""The text encoder against Wan's own pipeline, on a small random umT5 and a tokenizer of a few words."""

import json
import shutil
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from world_distill.data.records.batches import pad_texts
from world_distill.errors import UserError
from world_distill.models.wan.text import UMT5TextEncoder, clean

pytestmark = pytest.mark.torch
TEXTS = [
    "[red disc]: Go to the blue ring.",
    "The  red disc\n moves three steps right &amp;amp; one step up, then it stops beside the ring.",
    "ring",
    "\u201cThe disc\u201d doesn\u00e2\u20ac\u2122t stop.",  # broken Unicode, as ftfy mends it
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra `torch`")
    pytest.importorskip("diffusers")
    pytest.importorskip("ftfy")
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("wan")
    pieces = sorted({c for text in TEXTS for c in clean(text)} | {"\u2581", "\u2581the", "\u2581disc", "\u2581ring"})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -(len(piece) ** -1.0)) for piece in pieces)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "tokenizer")
    config = transformers.UMT5Config(
        vocab_size=len(vocabulary), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.UMT5EncoderModel(config)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.1 * noise)
    network.save_pretrained(folder / "text_encoder")
    return folder


def pipelines_states(folder, dtype, length=512):
    """[b length d] float32: what the pipeline hands to the transformer."""
    import diffusers
    import torch
    import transformers

    dtype = getattr(torch, dtype)
    part = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"), text_encoder=part,
        vae=None, scheduler=None, image_processor=None, image_encoder=None, transformer=None,
    )  # fmt: skip
    with torch.no_grad():
        return pipeline._get_t5_prompt_embeds(TEXTS, max_sequence_length=length, device="cpu").float().numpy()


def test_states_are_the_pipelines_in_float32(folder):
    states = UMT5TextEncoder(folder, dtype="float32", stored="float32", batch=3).encode(TEXTS)
    padded = pad_texts(states, 512)
    expected = pipelines_states(folder, "float32")
    assert len({len(s) for s in states}) == len(TEXTS) and np.abs(expected).max() > 1
    np.testing.assert_allclose(padded.states, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(padded.mask, np.abs(expected).max(-1) > 0)


def test_states_are_the_pipelines_in_bfloat16(folder):
    exact = pipelines_states(folder, "float32")
    own = np.abs(pipelines_states(folder, "bfloat16") - exact).max()  # what bfloat16 costs the pipeline
    states = UMT5TextEncoder(folder).encode(TEXTS)
    padded = pad_texts(states, 512).states
    assert padded.dtype == ml_dtypes.bfloat16
    assert np.abs(padded.astype(np.float32) - exact).max() < 1.5 * own


def test_stored_in_bfloat16_from_float32(folder):
    exact = UMT5TextEncoder(folder, dtype="float32", stored="float32").encode(TEXTS)
    stored = UMT5TextEncoder(folder, dtype="float32").encode(TEXTS)
    for a, b in zip(exact, stored, strict=True):
        np.testing.assert_array_equal(a.astype(ml_dtypes.bfloat16), b)


def test_texts_are_never_cut(folder):
    length = len(UMT5TextEncoder(folder).encode(TEXTS[:1])[0])
    assert len(UMT5TextEncoder(folder, max_length=length).encode(TEXTS[:1])[0]) == length
    with pytest.raises(ValueError, match=rf"a text has {length} tokens, and the encoder takes {length - 1}.*red disc"):
        UMT5TextEncoder(folder, max_length=length - 1).encode(TEXTS[:1])
    with pytest.raises(ValueError, match="without characters"):
        UMT5TextEncoder(folder).encode([" \n"])
    assert [len(states) for states in UMT5TextEncoder(folder).encode([""])] == [1]  # what guidance leads away from


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no text_encoder/: give the folder of a Wan model"):
        UMT5TextEncoder(tmp_path)
    with pytest.raises(ValueError, match="'float8' .*there are: float32, bfloat16"):
        UMT5TextEncoder(folder, dtype="float8")
    shutil.copytree(folder, tmp_path / "wan")
    config = tmp_path / "wan" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks weights: encoder\.block\.2"):
        UMT5TextEncoder(tmp_path / "wan")
    config.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        UMT5TextEncoder(tmp_path / "wan")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "ftfy", types.ModuleType("ftfy"))
    with pytest.raises(UserError, match=r"umT5 needs torch, which is in the extra `torch`: pip install"):
        UMT5TextEncoder(tmp_path)
