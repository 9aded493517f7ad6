"""Rows of texts against LTX-2's own pipeline, on a small random Gemma 3 and a tokenizer of a few words."""

import json
import re
import shutil
import types

import numpy as np
import pytest

from world_distill.errors import UserError
from world_distill.interfaces import TextError
from world_distill.models.ltx2.encoders import LTX2Encoders
from world_distill.models.ltx2.text import PROJECTIONS, GemmaTextEncoder, projection_digest, read_projection

pytestmark = pytest.mark.torch
TEXTS = ["[red disc]: Go to the blue ring.", "  The red disc moves three steps right, then it stops.\n", "ring"]
WIDTH, LAYERS, ROW = 16, 3, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra `torch`")
    pytest.importorskip("diffusers")
    import tokenizers
    import transformers
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("ltx2")
    pieces = sorted({c for text in TEXTS for c in text} | {"\u2581", "\u2581the", "\u2581disc", "\u2581ring"})
    vocabulary = [("<pad>", 0.0), ("<bos>", 0.0), ("<unk>", 0.0), *((piece, -(len(piece) ** -1.0)) for piece in pieces)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "tokenizer")
    text = {
        "vocab_size": len(vocabulary), "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 16, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    network = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1 * noise)
    network.save_pretrained(folder / "text_encoder")
    (folder / "connectors").mkdir()
    kernel = torch.randn(ROW, WIDTH * (LAYERS + 1)) / 8
    save_file({"text_proj_in.weight": kernel}, folder / "connectors" / "diffusion_pytorch_model.safetensors")
    return folder


def rows_of_the_pipeline(folder, length):
    """Rows [b length d] float32 and their mask [b length], by the published code, which pads on the left."""
    import torch
    import transformers
    from diffusers import LTX2ImageToVideoPipeline
    from diffusers.pipelines.ltx2.connectors import per_layer_masked_mean_norm

    part = transformers.Gemma3ForConditionalGeneration.from_pretrained(folder / "text_encoder").float().eval()
    pipeline = LTX2ImageToVideoPipeline.__new__(LTX2ImageToVideoPipeline)
    pipeline.__dict__["_internal_dict"] = {}
    pipeline.text_encoder, pipeline.tokenizer = part, transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    with torch.no_grad():
        packed, mask = pipeline._get_gemma_prompt_embeds(TEXTS, max_sequence_length=length, device="cpu")
        states = packed.unflatten(2, (WIDTH, LAYERS + 1))
        normal = per_layer_masked_mean_norm(states, mask.sum(dim=-1), "cpu", padding_side="left")
        rows = normal.float() @ torch.from_numpy(read_projection(folder / "connectors"))
    return rows.numpy(), mask.bool().numpy()


def test_rows_are_the_pipelines(folder):
    encoder = GemmaTextEncoder(folder, dtype="float32", batch=2)
    rows = encoder.encode(TEXTS)
    expected, mask = rows_of_the_pipeline(folder, 128)
    assert len({len(row) for row in rows}) == len(TEXTS) and np.abs(expected[mask]).max() > 1
    for row, want, real in zip(rows, expected, mask, strict=True):
        assert row.dtype.name == "bfloat16"
        # bfloat16 keeps 8 bits.
        np.testing.assert_allclose(row.astype(np.float32), want[real], rtol=2**-8, atol=2e-5)


def test_a_text_that_is_too_long_or_empty_is_named(folder):
    encoder = GemmaTextEncoder(folder, dtype="float32", max_length=12)
    assert len(encoder.encode(["ring", ""])[1]) == 1  # the opening token
    with pytest.raises(TextError, match="shorten it, nothing is cut here"):
        encoder.encode(TEXTS[:1])
    with pytest.raises(TextError, match="without characters"):
        encoder.encode(["  "])


def projection_file(path, kernel, name=PROJECTIONS[1], dtype=np.float32):
    from safetensors.numpy import save_file

    save_file({name: kernel.astype(dtype)}, path)
    return path


def test_a_projection_of_another_encoder_is_refused(folder, tmp_path):
    path = projection_file(tmp_path / "distilled.safetensors", np.ones((ROW, WIDTH * LAYERS)))
    with pytest.raises(ValueError, match=r"takes 48 numbers a token, and .* gives 4 states of 16"):
        GemmaTextEncoder(folder, projection=path, dtype="float32")
    with pytest.raises(ValueError, match="holds no text projection"):
        read_projection(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"text_proj_in.weight has shape \[3\], not"):
        read_projection(projection_file(tmp_path / "flat.safetensors", np.ones(3), PROJECTIONS[0]))


def encoders(folder, width=ROW, **changes):
    codec = types.SimpleNamespace(parts=())
    return LTX2Encoders(codec, (64, 64), str(folder), width, **changes)


def test_rows_of_another_width_than_the_models_are_refused(folder):
    [row] = encoders(folder).text(["ring"])["text"]
    assert row.shape[1] == ROW
    with pytest.raises(ValueError, match=r"makes rows of 24 numbers, and config\.model\.connectors\.width = 32"):
        encoders(folder, 32).text(["ring"])


def test_a_projection_has_one_digest_in_every_layout_and_type(folder, tmp_path):
    kernel = read_projection(folder / "connectors").T.astype("bfloat16")
    digest = projection_digest(folder / "connectors")
    assert re.fullmatch("[0-9a-f]{16}", digest) and encoders(folder).text_weights == digest
    single = projection_file(tmp_path / "single.safetensors", kernel, dtype="bfloat16")
    assert encoders(folder, text_projection=str(single)).text_weights == digest
    changed = kernel.copy()
    changed[3, 5] += 1
    for name, other in (("changed", changed), ("reshaped", kernel.reshape(2 * ROW, -1)), ("turned", kernel[::-1])):
        path = projection_file(tmp_path / f"{name}.safetensors", other, dtype="bfloat16")
        assert projection_digest(path) not in ("", digest)
    damaged = copy_of(folder, tmp_path / "damaged")
    cut(next((damaged / "connectors").iterdir()))
    for unknown in (damaged, tmp_path / "nothing", "words", ""):
        assert encoders(unknown).text_weights == ""


def copy_of(folder, to, part=""):
    shutil.copytree(folder, to)
    return to / part


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "connectors"])
def test_a_part_that_is_missing_is_named(folder, tmp_path, part):
    shutil.rmtree(copy_of(folder, tmp_path / "copy", part))
    words = "holds no text projection" if part == "connectors" else f"has no {part}/: give the folder of LTX-2"
    with pytest.raises(ValueError, match=words):
        GemmaTextEncoder(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"no text_encoder/"):
        GemmaTextEncoder(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: cut(f / "text_encoder" / "model.safetensors"), "text encoder or tokenizer cannot be read"),
        (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "text encoder or tokenizer cannot be read"),
        (lambda f: (f / "text_encoder" / "config.json").write_text("{"), "text encoder or tokenizer cannot be read"),
        (lambda f: (f / "text_encoder" / "config.json").unlink(), "text encoder or tokenizer cannot be read"),
        (lambda f: cut(f / "tokenizer" / "tokenizer.json"), "text encoder or tokenizer cannot be read"),
        (lambda f: cut(next((f / "connectors").iterdir())), "no whole safetensors file"),
        (
            lambda f: next((f / "connectors").iterdir()).write_text("version https://git-lfs.github.com/spec/v1"),
            "pointer of Git LFS",
        ),
        (lambda f: deeper(f / "text_encoder" / "config.json"), r"lacks weights: .*layers\.3"),
    ],
)
def test_a_damaged_part_is_named(folder, tmp_path, damage, words):
    copy = copy_of(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises((ValueError, UserError), match=words):
        GemmaTextEncoder(copy, dtype="float32")


def deeper(config):
    """A config with a layer more than there are weights for."""
    settings = json.loads(config.read_text())
    settings["text_config"]["num_hidden_layers"] = LAYERS + 1
    settings["text_config"].pop("layer_types", None)
    config.write_text(json.dumps(settings))


def test_another_encoder_and_an_unknown_type_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="dtype 'float8' of a text encoder"):
        GemmaTextEncoder(folder, dtype="float8")
    import transformers

    copy = copy_of(folder, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder")
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).save_pretrained(copy / "text_encoder")
    with pytest.raises(ValueError, match=r"cannot be read \(it is umt5, not Gemma 3\)"):
        GemmaTextEncoder(copy, dtype="float32")
