"""Supervised fine-tuning from MP4 files to a trained Executor, in the sandbox's world."""

import json

import numpy as np
import pytest
from small import make_inputs, small_config

from tests.runs import after_two_steps, assert_same, final_states, lasting
from world_distill import build, cli
from world_distill.data.records.reader import RecordError, RecordReader
from world_distill.errors import UserError
from world_distill.evaluation.scoring import Evaluator
from world_distill.programs import demonstrate, dry_run, evaluate, plan, prepare, train
from world_distill.settings.loading import load_config
from world_distill.storage.metric_log import read_log
from world_distill.storage.video_files import save_mp4
from world_distill.training import run_folder

pytest.importorskip("av", reason="PyAV is in the extra `test`")
SFT = {
    "objective.kind": "sft", "objective.rl": "none", "objective.beta_d": ((0, 0.0),), "objective.sft_power": 2.0,
    "optimizer.learning_rate": ((0, 1e-2),), "train_set": "films",
}  # fmt: skip


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with base and records of the sandbox, and one of MP4 files with captions, imported and encoded."""
    folder = tmp_path_factory.mktemp("films")
    make_inputs(folder)
    config = small_config(folder)
    family = build.make_family(config)
    clips, captions = build.make(config, "clips").batch(0, 0, 6)
    for i, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        save_mp4(folder / "mp4" / f"{i}.mp4", clip, family.fps)
        (folder / "mp4" / f"{i}.txt").write_text(caption)
    save_mp4(folder / "mp4" / "short.mp4", clips[0][:5], family.fps)
    (folder / "mp4" / "short.txt").write_text("A disc moves.")
    assert cli.main(["import-videos", "--videos", str(folder / "mp4"), "--out", str(folder / "data"), "--name", "films"]) == 0
    encode(folder)
    return folder, clips, captions


def encode(folder, *flags, **changes):
    overrides = {key: value for key, value in small_config(folder, **changes).items() if key == "base"}
    config = small_config(folder, **changes)
    reader = RecordReader(folder / "data", "films_annotated")
    encoder = prepare.Encoder(config)
    del overrides, flags
    return encoder.encode(reader, folder / "data", name="films", batch=4, clips=encoder.clips_of(reader), shards=2)


def test_films_come_back_as_clips(films):
    folder, clips, captions = films
    reader = RecordReader(folder / "data", "films", clips=True)
    family = build.make_family(small_config(folder))
    found = {record.task: record for record in reader}
    assert found.keys() == set(captions) and reader.metadata["clip"] == "9 frames 30x30 at 4 a second"
    for clip, caption in zip(clips, captions, strict=True):
        record = found[caption]
        back = np.asarray(family.codec.decode({}, {"video": record.clip["video"][None]}))[0]
        assert back.shape == clip.shape
        assert np.abs(back.astype(int) - clip.astype(int)).mean() < 4  # what H.264 loses
        # The first latent frame is the scene, bit for bit.
        np.testing.assert_array_equal(record.clip["video"][:1], record.scene["video"])
    [line] = map(json.loads, (folder / "data" / "films.left_out.jsonl").read_text().splitlines())
    assert line["what"] == "video" and "short.mp4 lasts 1.25 s, and 9 frames at 4 a second need" in line["why"]


def test_fine_tuning_lowers_its_loss_and_brings_the_clips_to_those_of_the_set(films, tmp_path):
    folder, clips, captions = films
    config = small_config(folder, **SFT, **{"steps": 40, "save_every": 40, "objective.draws": 4, "optimizer.learning_rate": ((0, 2e-2),)})
    train.train(config, tmp_path)
    log = read_log(tmp_path / "metrics.jsonl")
    first, last = (np.mean([line["train/sft"] for line in part]) for part in (log[:5], log[-5:]))
    print(first, last, [round(l["train/sft"],3) for l in log][::4])
    opened = run_folder.open_run(tmp_path)
    reader = RecordReader(folder / "data", "films")
    distance = {}
    for name, lora in (("base", None), ("executor", opened.executor)):
        made = {}
        evaluator = opened.evaluator(build.make(config, "benchmark"))
        evaluator.run(reader, opened.base, lora, text="task", keep=made.__setitem__)
        gaps = [np.abs(made[r.id].astype(float) - clips[captions.index(r.task)])[1:].mean() for r in reader]
        distance[name] = float(np.mean(gaps))
    print(distance)
    assert last < 0.7 * first
    assert distance["executor"] < 0.7 * distance["base"]
