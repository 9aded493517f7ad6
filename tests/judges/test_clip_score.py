"""ClipScore beside the CLIP model's own parts, on small random weights."""

import json

import numpy as np
import pytest
from PIL import Image

from world_distill.errors import UserError
from world_distill.judges import ClipScore
from world_distill.judges.ask import has_rate, judge_clips
from world_distill.judges.rubric import rubric_for

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SIDE, LONGEST = 28, 24


def save(folder, seed=0):
    """A CLIP of random weights, its tokenizer of single characters and its picture processor, as a folder."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    part = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.CLIPConfig(
        text_config=part | {
            "vocab_size": len(words), "max_position_embeddings": LONGEST, "bos_token_id": 0, "eos_token_id": 1,
        },
        vision_config=part | {"image_size": SIDE, "patch_size": 14}, projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = tf.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    tf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("clip"))


def clips(count=3, frames=7):
    return np.random.default_rng(1).integers(0, 256, (count, frames, 36, 44, 3), np.uint8)


def by_hand(folder, clip, text, numbers):
    """Cosine times the logit scale, each step on its own, in float64."""
    import transformers as tf

    model = tf.CLIPModel.from_pretrained(folder).double().eval()
    tokens = tf.AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=LONGEST, return_tensors="pt")
    reader = tf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = reader(images=[Image.fromarray(clip[i]) for i in numbers], return_tensors="pt")["pixel_values"].double()
    with torch.no_grad():
        states = model.text_model(**tokens).pooler_output @ model.text_projection.weight.T
        seen = model.vision_model(pixel_values=pixels).pooler_output @ model.visual_projection.weight.T
    cosines = torch.nn.functional.cosine_similarity(seen, states, dim=-1)
    return float(np.exp(3.0) * cosines.mean())


def test_scores_are_cosines_times_the_logit_scale(folder):
    judge = ClipScore(folder, frames=3)
    assert "clip_score" in judge.check()[0]
    made, tasks = clips(), ["[hand]: Pick.", "[hand]: Put it down.", "x" * 40]
    scores = judge_clips(judge, None, made, tasks, [""] * 3, rubric_for(judge), ["clip_score"]).scores["clip_score"]
    expected = [by_hand(folder, clip, task, [0, 3, 6]) for clip, task in zip(made, tasks, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(scores) > 0.1  # clips and tasks matter
    assert abs(by_hand(folder, made[0], tasks[0], [0, 1, 2]) - expected[0]) > 1e-3  # so do the frames
    assert not has_rate(judge, "clip_score")


def test_a_name_a_threshold_and_a_version(folder, tmp_path):
    judge = ClipScore(folder, frames=3, measure="task", threshold=2.0)
    made = clips(1)
    scores = judge_clips(judge, None, made, ["pick"], [""], rubric_for(judge), ["task"]).scores["task"]
    np.testing.assert_allclose(scores, [by_hand(folder, made[0], "pick", [0, 3, 6]) - 2.0], rtol=1e-4, atol=1e-4)
    assert has_rate(judge, "task")
    other = save(tmp_path / "other", seed=1)
    assert len({ClipScore(f, frames=n).name for f in (folder, other) for n in (3, 4)}) == 4


def test_what_is_no_clip_model_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="needs a model"):
        ClipScore()
    with pytest.raises(UserError, match="frames of at least 2"):
        ClipScore(folder, frames=1)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(UserError, match="is of type 'siglip'"):
        ClipScore(str(tmp_path)).check()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="cannot be read"):
        ClipScore(str(tmp_path)).check()
