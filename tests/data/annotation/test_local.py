"""The annotator in this process: asked with the picture, asked again, and never without a word where it fails."""

import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is in the extra `torch`")

from tests.vlm import tiny_vlm  # noqa: E402
from world_distill.data.annotation.local import LocalAnnotator  # noqa: E402
from world_distill.errors import UserError  # noqa: E402
from world_distill.interfaces import AnnotationError  # noqa: E402
from world_distill.vlm.local import LocalVLM  # noqa: E402

pytestmark = pytest.mark.torch

PAIRS = [{"task": f"[disc {i}]: Go right.", "solution": f"The disc {i} rolls on.", "kind": "go"} for i in range(3)]
ASKED = {"max_pairs": 2, "seed": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_vlm.save(tmp_path_factory.mktemp("vlm"), "qwen3_5")


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (40, 80, 3), np.uint8)


def answering(monkeypatch, *answers):
    """Lets the model give these answers in turn; returns what it was asked."""
    asked, queue = [], list(answers)

    def generate(self, messages, **options):
        asked.append((messages, options))
        return queue.pop(0)

    monkeypatch.setattr(LocalVLM, "generate", generate)
    return asked


def test_pairs_are_read_from_its_answer(folder, monkeypatch):
    asked = answering(monkeypatch, "Here:\n" + json.dumps({"possible": True, "pairs": PAIRS}))
    first, second, _ = LocalAnnotator(folder, max_side=40, seconds=3.5, max_tokens=99).annotate(image(), **ASKED)
    assert (first.agent, second.task, second.kind) == ("disc 0", "[disc 1]: Go right.", "go")
    ((messages, options),) = asked
    before, picture, after = messages[0]["content"]
    assert picture["image"].size == (40, 20) and "3.5 seconds" in before["text"] and "2 tasks" in after["text"]
    assert options == {"max_tokens": 99, "temperature": 0.7, "seed": 7}


def test_nothing_to_do_is_an_answer(folder, monkeypatch):
    asked = answering(monkeypatch, '{"possible": false, "pairs": []}')
    assert LocalAnnotator(folder).annotate(image(), **ASKED) == [] and len(asked) == 1


def test_it_is_asked_again_with_another_seed(folder, monkeypatch):
    asked = answering(monkeypatch, "I see a disc.", '{"pairs": [{"task": "[di', json.dumps({"pairs": PAIRS}))
    assert len(LocalAnnotator(folder).annotate(image(), **ASKED)) == 3
    assert len({options["seed"] for _, options in asked}) == 3
    answering(monkeypatch, "I see a disc.")
    with pytest.raises(AnnotationError, match="no answer of 1 .*it begins with 'I see a disc.'"):
        LocalAnnotator(folder, temperature=0).annotate(image(), **ASKED)


def test_of_answers_that_are_all_cut_off_the_longest_is_taken(folder, monkeypatch):
    whole = json.dumps({"pairs": PAIRS})
    answering(monkeypatch, whole[:150], whole[:-20], whole[:100])
    pairs = LocalAnnotator(folder).annotate(image(), **ASKED)
    assert [pair.agent for pair in pairs] == ["disc 0", "disc 1"]


def test_an_untrained_model_is_not_understood_and_says_the_same_again(folder):
    options = {"dtype": "float32", "max_tokens": 6, "tries": 2, "max_side": 28, "temperature": 1.0}
    annotator = LocalAnnotator(folder, **options)
    errors = []
    for seed in (0, 0, 1):
        with pytest.raises(AnnotationError) as caught:
            annotator.annotate(image(), max_pairs=2, seed=seed)
        errors.append(str(caught.value))
    assert errors[0] == errors[1] != errors[2]


def test_the_name_follows_what_changes_answers(folder, tmp_path):
    for name in ("instructions", "format", "request"):
        (tmp_path / f"{name}.txt").write_text("Write tasks.")
    base = LocalAnnotator(folder).name
    for options in ({"temperature": 1.0}, {"seconds": 2}, {"max_side": 9}, {"prompt": str(tmp_path)}, {"tries": 1}):
        assert LocalAnnotator(folder, **options).name != base
    assert LocalAnnotator(folder, device="cpu").name == base and str(tmp_path) not in base


BAD = ({"tries": 0}, {"seconds": 0}, {"temperature": -1}, {"max_tokens": 0}, {"model": ""}, {"prompt": "/nowhere"})


@pytest.mark.parametrize("options", BAD)
def test_options_out_of_range(folder, options):
    with pytest.raises(UserError, match="needs"):
        LocalAnnotator(**{"model": folder} | options)
