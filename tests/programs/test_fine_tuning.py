"""Supervised fine-tuning from MP4 files to a trained Executor, in the sandbox's world, for Wan and for LTX-2."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import make_inputs, small_config

from tests.data.videos import making
from tests.runs import after_two_steps, assert_same, final_states, lasting
from world_distill import build, cli
from world_distill.cli.demonstrate import fine_tuning
from world_distill.data.records.batches import fixed_batches
from world_distill.data.records.reader import EncodedRecord, RecordError, RecordReader
from world_distill.errors import UserError
from world_distill.programs import demonstrate, dry_run, evaluate, plan, plan_text, prepare, train
from world_distill.programs.benchmark import measure
from world_distill.settings.loading import load_config
from world_distill.settings.objective import Phase
from world_distill.storage.metric_log import read_log
from world_distill.storage.video_files import save_mp4
from world_distill.training import run_folder
from world_distill.training.step_programs import make_programs

pytest.importorskip("av", reason="PyAV is in the extra `test`")
SFT = {
    "objective.kind": "sft", "objective.rl": "none", "objective.beta_d": ((0, 0.0),), "objective.sft_power": 2.0,
    "optimizer.learning_rate": ((0, 1e-2),), "train_set": "films",
}  # fmt: skip


def write_films(folder, family, config, count=6):
    """MP4 files of the sandbox's clips with their captions, and one that is too short; returns clips and captions."""
    clips, captions = build.make(config, "clips").batch(0, 0, count)
    for i, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        save_mp4(folder / f"{i}.mp4", clip, family.fps)
        (folder / f"{i}.txt").write_text(caption)
    save_mp4(folder / "short.mp4", clips[0][:5], family.fps)
    (folder / "short.txt").write_text("A disc moves.")
    return clips, captions


def imported(videos, data):
    assert cli.main(["import-videos", "--videos", str(videos), "--out", str(data), "--name", "films"]) == 0
    return RecordReader(data, "films_annotated")


def encode(config, data, **options):
    reader, encoder = RecordReader(data, "films_annotated"), prepare.Encoder(config)
    options = {"name": "films", "batch": 4, "clips": encoder.clips_of(reader)} | options
    return encoder.encode(reader, data, **options)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """(folder with base, records of the sandbox and encoded films; the films' clips; their captions)."""
    folder = tmp_path_factory.mktemp("films")
    make_inputs(folder)
    config = small_config(folder)
    clips, captions = write_films(folder / "mp4", build.make_family(config), config)
    imported(folder / "mp4", folder / "data")
    assert encode(config, folder / "data")["left_out"] == 1
    return folder, clips, captions


@pytest.fixture(scope="module")
def run(films, tmp_path_factory):
    """(config, folder) of a finished run of four steps."""
    config, folder = small_config(films[0], **SFT), tmp_path_factory.mktemp("run")
    train.train(config, folder)
    return config, folder


def test_films_come_back_as_clips(films):
    folder, clips, captions = films
    reader = RecordReader(folder / "data", "films", clips=True)
    family = build.make_family(small_config(folder))
    found = {record.task: record for record in reader}
    assert found.keys() == set(captions) and reader.metadata["clip"] == "9 frames 30x30 at 4 a second"
    for clip, caption in zip(clips, captions, strict=True):
        record = found[caption]
        back = np.asarray(family.codec.decode({}, {"video": jnp.asarray(record.clip["video"])[None]}))[0]
        assert back.shape == clip.shape
        assert np.abs(back.astype(int) - clip.astype(int)).mean() < 6  # what H.264 loses
        np.testing.assert_allclose(record.clip["video"][:1], record.scene["video"], atol=1e-6)
    [line] = map(json.loads, (folder / "data" / "films.left_out.jsonl").read_text().splitlines())
    assert line["what"] == "video" and "short.mp4 lasts 1.25 s, and 9 frames at 4 a second need" in line["why"]


def test_encoding_goes_on_at_the_first_unfinished_shard(films, tmp_path, monkeypatch):
    folder, config = films[0], small_config(films[0])
    for file in (folder / "data").glob("films_annotated*"):
        shutil.copy(file, tmp_path)
    whole = encode(config, tmp_path, shards=3)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("films-*")}
    assert whole["shards_missing"] == 0 and len(files) == 6
    for path in tmp_path.glob("films-00001*"):
        path.unlink()
    asked = []
    source = prepare.Encoder(config).clips_of(RecordReader(tmp_path, "films_annotated"))
    monkeypatch.setattr(type(source), "read", watched(asked, type(source).read))
    assert encode(config, tmp_path, shards=3)["shards_kept"] == 2
    assert len(asked) == 2  # the two videos of that shard
    assert files == {path.name: path.read_bytes() for path in tmp_path.glob("films-*")}
    encode(config, tmp_path, shards=3)
    assert len(asked) == 2
    # Clips of another length are other records.
    encode(small_config(folder, **{"model.frames": 5, "world.frames": 5}), tmp_path, shards=3)
    assert len(asked) == 9 and RecordReader(tmp_path, "films").metadata["clip"].startswith("5 frames")


def watched(calls, function):
    def call(self, *args):
        calls.append(args)
        return function(self, *args)

    return call


def test_what_happened_to_the_videos_since_is_said(films, tmp_path):
    config = small_config(films[0])
    shutil.copytree(films[0] / "mp4", tmp_path / "mp4")
    reader = imported(tmp_path / "mp4", tmp_path)
    (tmp_path / "mp4" / "0.mp4").unlink()
    shutil.copy(tmp_path / "mp4" / "2.mp4", tmp_path / "mp4" / "1.mp4")
    assert encode(config, tmp_path)["left_out"] == 3
    why = " ".join(json.loads(line)["why"] for line in (tmp_path / "films.left_out.jsonl").read_text().splitlines())
    assert "0.mp4 is not in" in why and "1.mp4 has changed since it was imported" in why
    os.rename(tmp_path / "mp4", tmp_path / "moved")
    with pytest.raises(UserError, match="is not there: name it with --videos, or take --no-clips"):
        prepare.Encoder(config).clips_of(reader)
    assert prepare.Encoder(config).clips_of(reader, tmp_path / "moved").root == (tmp_path / "moved").resolve()
    # Their first frames are records all the same.
    flags = ["encode", "--config", "sandbox", f"--config.base={config.base}", "--records", str(tmp_path)]
    assert cli.main([*flags, "--name", "films", "--no-clips"]) == 0
    assert len(RecordReader(tmp_path, "films")) == 7 and not RecordReader(tmp_path, "films").has_clips
    assert cli.main([*flags, "--name", "films", "--videos", str(tmp_path / "moved")]) == 0
    assert len(RecordReader(tmp_path, "films", clips=True)) == 4
    with pytest.raises(UserError, match="was not imported from videos"):
        prepare.Encoder(config).clips_of(RecordReader(films[0] / "data", "train_annotated"), tmp_path)


def test_fine_tuning_lowers_its_loss_and_brings_the_clips_to_those_of_the_set(films, tmp_path):
    folder, clips, captions = films
    more = {"steps": 25, "save_every": 25, "objective.draws": 4, "optimizer.learning_rate": ((0, 2e-2),)}
    config = small_config(folder, **SFT | more)
    train.train(config, tmp_path)
    losses = [line["train/sft"] for line in read_log(tmp_path / "metrics.jsonl")]
    opened, reader = run_folder.open_run(tmp_path), RecordReader(folder / "data", "films")

    def distance(lora):
        """Of the clips that a model makes of the tasks, from those of the set."""
        [batch] = fixed_batches(reader, len(reader), lengths=build.text_lengths(opened.family, config))
        evaluator = run_folder.make_evaluator(config, opened.family, opened.mesh, None)
        made = evaluator.clips(batch, opened.base, lora, text="task", rows=np.arange(len(reader)))
        shown = clips[[captions.index(task) for task in batch.task]]
        return np.abs(made.astype(float) - shown)[:, 1:].mean()

    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert distance(opened.executor) < 0.6 * distance(None)


def test_resumed_fine_tuning_equals_uninterrupted_bit_for_bit(run, tmp_path):
    config, folder = run
    resumed = after_two_steps(folder, tmp_path / "run")
    train.train(config, resumed)
    assert_same(*final_states(config, folder, resumed))
    one, other = (
        [lasting(json.loads(line)) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder, resumed)
    )
    assert one == other and [line["step"] for line in one] == [1, 2, 3, 4]


def test_only_the_update_runs_and_nobody_is_asked(run):
    config, folder = run
    made = make_programs(config, build.start_devices(config))
    assert list(made.update) == [Phase(False, False)] and made.update[Phase(False, False)]._cache_size() == 1
    assert [f._cache_size() for f in (*made.roll.values(), made.decode, made.demonstrate, made.motion)] == [0] * 5
    assert not (folder / "judgments.sqlite").exists()
    line = read_log(folder / "metrics.jsonl")[-1]
    # Two updates of eight rows in two parts: three forwards each, the backward pass included.
    assert line["train/forwards"] == 8 * 3 * 2 / 2
    assert "train/anchor" not in line and "time/rollout" not in line and line["time/update"] > 0


def test_devices_do_not_change_a_run(films, run, tmp_path):
    config = small_config(films[0], **SFT, host_devices=8)
    train.train(config, tmp_path)
    [wide], [one] = final_states(config, tmp_path), final_states(run[0], run[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), wide[0].lora, one[0].lora)
    assert wide[1] == one[1]


def test_a_run_is_evaluated_and_exported_as_any_other(run, films, tmp_path):
    config, folder = run
    opened = run_folder.open_run(folder)
    rows = evaluate.evaluate_roles(opened, roles=("base", "executor"), split="test")["rows"]
    assert [row["name"] for row in rows] == ["base", "executor"] and all(row["n"] for row in rows)
    assert cli.main(["report", "--workdir", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "Fine-tuning loss" in (tmp_path / "page.html").read_text()


def test_full_differences_are_fine_tuned_too(films, tmp_path):
    train.train(small_config(films[0], **SFT | {"executor.rank": 0, "steps": 1}), tmp_path)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(run_folder.open_run(tmp_path).executor))


def test_tasks_without_solutions_are_enough(films, tmp_path):
    making.write(tmp_path / "mp4" / "a.mp4", fps=4, count=9)
    (tmp_path / "mp4" / "a.txt").write_text("[grey wall]: Get lighter.")
    data = tmp_path / "data"
    imported(tmp_path / "mp4", data)
    config = small_config(films[0], **SFT, steps=1)
    encode(config, data)
    assert RecordReader(data, "films")[0].solution == ""
    config.data = str(data)
    train.train(config, tmp_path / "run")
    assert read_log(tmp_path / "run" / "metrics.jsonl")[0]["train/sft"] > 0


def test_other_records_and_settings_are_refused_with_the_reason(films, tmp_path):
    folder = films[0]
    with pytest.raises(RecordError, match="holds no clips to learn from: `world-distill import-videos`"):
        train.train(small_config(folder, **SFT | {"train_set": "train"}), tmp_path)
    with pytest.raises(RecordError, match=r"latents \{'video': \(3, 5, 5, 432\)\}, and this model has .*\(2, 5, 5"):
        train.train(small_config(folder, **SFT, **{"model.frames": 5}), tmp_path)
    with pytest.raises(ValueError, match="computes no Demonstrator"):
        train.train(small_config(folder, **SFT | {"objective.beta_d": ((0, 0.1),)}), tmp_path)
    with pytest.raises(UserError, match="has one part, the update"):
        measure(small_config(folder, **SFT), tmp_path, 1)


def test_plan_and_dry_run_know_the_one_program(films, tmp_path):
    config = small_config(films[0], **SFT)
    said = []
    result = dry_run.dry_run(config, tmp_path, say=said.append)
    assert [phase["name"] for phase in result["phases"]] == ["update"] and result["fits"]
    rows = config.rollout.tasks * config.rollout.group
    assert f"{config.steps} steps of {rows} clips" in said and any(f", {rows} clips a step" in line for line in said)
    assert "judge: none, since objective.kind = sft" in said and "rollouts" not in " ".join(said)
    timed = {"estimated": True, "step_seconds": (1, 2), "rollouts_per_second": (3, 4), "mfu": (0.1, 0.2)}
    lines = plan_text.describe(result | timed | {"judge_requests_per_second": (0, 0)})
    assert any("1 to 2 s a step, 3 to 4 clips a second, MFU" in line for line in lines)
    config = load_config("wan22_5b:debug_sft")
    phases = plan.make_plan(config, jax.devices()[:1])
    assert [phase.name for phase in phases] == ["update", "encode"]


# ---- The Demonstrator's clips


def test_the_demonstrators_clips_become_records_and_are_learnt(films, run, tmp_path, capsys):
    folder, config = films[0], small_config(films[0])
    reader = RecordReader(folder / "data", "train")
    counts = demonstrate.demonstrate(config, reader, folder / "data", name="shown", shards=2)
    assert counts["written"] == len(reader) and counts["shards_missing"] == 0
    shown = RecordReader(folder / "data", "shown", EncodedRecord, clips=True)
    assert [r.to_bytes() for r in shown] == [r.to_bytes() for r in reader]
    opened = run_folder.open_run(run[1])
    decode = lambda record: opened.family.codec.decode({}, {"video": jnp.asarray(record.clip["video"])[None]})  # noqa: E731
    made = {}
    evaluator = opened.evaluator(build.make(config, "benchmark"))
    evaluator._key = jax.random.fold_in(jax.random.key(config.seed), 5)
    evaluator.run(reader, opened.base, None, text="solution", keep=made.__setitem__)
    for record in shown:
        np.testing.assert_allclose(np.asarray(decode(record))[0].astype(int), made[record.id].astype(int), atol=1)

    # A killed job goes on, and makes the same clips; another seed makes others.
    files = {path.name: path.read_bytes() for path in (folder / "data").glob("shown-*")}
    next((folder / "data").glob("shown-00001*.note")).unlink()
    again = demonstrate.demonstrate(config, reader, folder / "data", name="shown", shards=2)
    assert 0 < again["written"] < len(reader)
    assert files == {path.name: path.read_bytes() for path in (folder / "data").glob("shown-*")}
    other = demonstrate.demonstrate(small_config(folder, seed=1), reader, folder / "data", name="other")
    first = RecordReader(folder / "data", "other", clips=True)[0].clip["video"]
    assert other["written"] == len(reader) and np.abs(first - shown[0].clip["video"]).max() > 0.1

    train.train(small_config(folder, **SFT | {"train_set": "shown", "steps": 1}), tmp_path)
    assert read_log(tmp_path / "metrics.jsonl")[0]["train/sft"] > 0


def test_the_verb_says_what_comes_next(films, capsys):
    folder = films[0]
    config = small_config(folder)
    flags = ["--config", "sandbox", f"--config.base={config.base}", "--config.model.width=32"]
    flags += ["--config.model.heads=2", "--config.model.depth=2", "--config.model.unroll=1", "--config.sampler.steps=3"]
    assert cli.main(["demonstrate", *flags, "--data", str(folder / "data"), "--out", "told", "--shard", "0/2"]) == 0
    assert "1 of 2 shards are still to be written" in capsys.readouterr().out
    assert cli.main(["demonstrate", *flags, "--data", str(folder / "data"), "--out", "told", "--shard", "1/2"]) == 0
    said = capsys.readouterr().out
    assert "--config sandbox:sft" in said and "--config.train_set=told" in said
    assert cli.main(["demonstrate", *flags, "--data", str(folder / "data"), "--out", "train"]) == 2
    assert "would replace the old ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ("sandbox", "sandbox:sft"),
        ("sandbox:kinds=full", "sandbox:sft,kinds=full"),
        ("wan22_5b:wmsd", "wan22_5b:sft"),
        ("wan22_5b:debug", "wan22_5b:debug_sft"),
        ("ltx2:variant=debug,audio=off", "ltx2:debug_sft,audio=off"),
    ],
)
def test_the_config_that_comes_next_is_of_the_same_model(config, variant):
    assert fine_tuning(config) == variant
    load_config(variant)


# ---- Other families

TINY = {
    "model.size": (64, 64), "steps": 2, "save_every": 1, "host_devices": 8, "mesh.data": 2, "encode_batch": 2,
    "train_set": "films",
}  # fmt: skip


@pytest.mark.parametrize("name", ["wan22_5b:debug_sft", "ltx2:debug_sft"])
def test_other_families_are_fine_tuned_on_mp4s(name, tmp_path, capsys):
    for i in range(3):
        making.write(tmp_path / "mp4" / f"{i}.mp4", size=(64, 96), first=8 * i, count=12, sound=i == 1)
        (tmp_path / "mp4" / f"{i}.txt").write_text(f"The grey gets lighter, for the time number {i}.")
    data = tmp_path / "data"
    imported(tmp_path / "mp4", data)
    changes = [f"--config.{key}={value}" for key, value in TINY.items()]
    assert cli.main(["encode", "--config", name, *changes, "--records", str(data), "--name", "films"]) == 0
    config = load_config(name, TINY | {"data": str(data)})
    record, family = RecordReader(data, "films", clips=True)[0], build.make_family(config)
    assert record.clip.keys() == {"video"} and record.clip["video"].shape == family.latents["video"].shape
    np.testing.assert_allclose(record.clip["video"][:1], record.scene["video"], atol=1e-4)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.train(config, whole)
    one = load_config(name, TINY | {"data": str(data), "steps": 1})
    train.train(one, stopped)
    train.train(config, stopped)
    assert_same(*final_states(config, whole, stopped))
    lines = read_log(whole / "metrics.jsonl")
    assert len(lines) == 2 and all(np.isfinite(line["train/sft"]) and line["train/gradient_norm"] > 0 for line in lines)
    assert cli.main(["export", "--workdir", str(whole), "--out", str(tmp_path / "lora.safetensors")]) == 0
    assert ("audio" in family.latents) == name.startswith("ltx2")  # of which the clips have none
