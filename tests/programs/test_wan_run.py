"""Wan from scenes to a LoRA file, on 8 devices: encode, train, evaluate, export, import, generate."""

import json
import math
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small import redraw
from streams import shape_of, told, velocity_of

from tests.vlm.fake_server import FakeServer
from world_distill import build, cli
from world_distill.data.annotation.server import ServerAnnotator
from world_distill.data.records.reader import RecordReader
from world_distill.devices import hosts
from world_distill.devices.sharding import batch_sharding, make_mesh, replicated, tree_shardings
from world_distill.errors import UserError
from world_distill.evaluation import WorldTasksBench
from world_distill.judges.server import ServerJudge
from world_distill.models.lora import merge
from world_distill.programs import evaluate, export, generate, prepare, train
from world_distill.settings.loading import load_config
from world_distill.storage import array_store
from world_distill.storage.metric_log import read_log
from world_distill.storage.safetensors_folder import TensorFileError
from world_distill.training import run_folder
from world_distill.training.step_programs import make_programs
from world_distill.weights import base_model, merged_model
from world_distill.weights.lora_files import read_lora
from world_distill.weights.lora_layouts import LoraModel

SMALL = {
    "model.size": (64, 64), "world.size": 64, "model.depth": 2, "sampler.steps": 2, "steps": 2, "save_every": 1,
    "objective.updates": 1, "objective.minibatches": 1, "objective.draws": 1, "host_devices": 8, "mesh.data": 2,
    "scenes.train": 3, "scenes.validation": 1, "scenes.test": 2, "annotator.pairs": 2, "evaluate_batch": 8,
    "encode_batch": 2,
}  # fmt: skip


def config_of(**changes):
    return load_config("wan22_5b:debug", SMALL | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a finished run, judged over HTTP."""
    folder = tmp_path_factory.mktemp("wan")
    prepare.make_records(config_of(), folder / "data")
    with FakeServer() as server:
        config = config_of(**{"judge.factory": "world_distill.judges:ServerJudge"})
        with config.unlocked():
            config.judge.options = {"servers": (server.url,), "model": "judge", "frames": 4}
        train.train(config, folder)
    return folder


@pytest.fixture(scope="module")
def opened(run):
    return run_folder.open_run(run)


@pytest.fixture(scope="module")
def random():
    """As `opened`, but of weights that were never trained, all of them random."""
    config = config_of()
    mesh = build.start_devices(config)
    family, programs = build.make_family(config, mesh), make_programs(config, mesh)
    base = redraw(base_model.abstract_base(family, mesh), 1, size=0.3)
    return types.SimpleNamespace(config=config, base=base, executor=redraw(programs.state.lora, 2), family=family)


@pytest.fixture(scope="module")
def files(run):
    """LoRA files of the run's Executor, in both layouts."""
    paths = {layout: run / f"{layout}.safetensors" for layout in ("diffusers", "comfy")}
    for layout, path in paths.items():
        assert cli.main(["export", "--workdir", str(run), "--format", layout, "--out", str(path)]) == 0
    return paths


@pytest.fixture(scope="module")
def merged(run):
    """The Executor merged into the base, in diffusers' layout, and that converted back."""
    export.export_merged(run, run / "merged")
    assert cli.main(["convert", str(run / "merged"), str(run / "converted")]) == 0
    return run / "merged", run / "converted"


def call(*flags, out):
    """`world-distill generate` with these flags."""
    return cli.main(["generate", *map(str, flags), "--out", str(out)])


@pytest.mark.once
def test_training_moves_the_executor_and_leaves_the_base_in_parts(opened):
    lora = jax.tree.leaves(opened.executor)
    assert all(np.isfinite(x).all() for x in lora) and any(np.abs(x).max() > 0 for x in lora)
    kernel = opened.base["transformer"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4  # fsdp = 4
    assert {x.sharding.num_devices for x in jax.tree.leaves(opened.base)} == {8}


@pytest.mark.once
def test_training_was_judged_by_the_server(run):
    lines = read_log(run / "metrics.jsonl")
    clips = config_of().rollout.tasks * config_of().rollout.group
    assert [line["judge/answers"] for line in lines] == [3 * clips] * 2
    assert all(line["judge/mass_min"] > 0.9 and line["judge/invalid"] == 0 for line in lines)


@pytest.mark.once
def test_records_hold_scenes_of_the_model(run, opened):
    record = RecordReader(run / "data", "train")[0]
    assert record.scene["video"].shape == (1, 4, 4, 6)
    image = np.asarray(Image.open(next((run / "data" / "scenes" / "train").glob("*.png"))).convert("RGB"))
    assert image.shape == (64, 64, 3)


@pytest.mark.once
def test_the_judge_saw_the_clips_and_evaluation_runs(run, opened):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["judge/invalid"] for line in lines if "judge/invalid" in line] == [0, 0]
    rows = evaluate.evaluate_roles(opened, roles=("demonstrator", "executor"), split="test")["rows"]
    assert [row["n"] for row in rows] == [2, 2]


MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "context": 2}, {"data": 2, "fsdp": 2, "tensor": 2},
          {"data": 2, "context": 4}]  # fmt: skip  # the last one with more devices for a clip than heads


@pytest.fixture(scope="module")
def on_one_device(random):
    return value_and_gradient(build.make_family(random.config), jax.devices()[0], random)


@pytest.mark.parametrize(
    "shape", [MESHES[0], *(pytest.param(shape, marks=pytest.mark.once) for shape in MESHES[1:])], ids=str
)
def test_every_mesh_gives_the_values_and_gradients_of_one_device(shape, random, on_one_device):
    mesh = make_mesh(**{"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | shape)
    found = value_and_gradient(build.make_family(random.config, mesh), mesh, random)
    for a, b in zip(jax.tree.leaves(on_one_device), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def value_and_gradient(family, where, weights):
    """A loss of 8 rows, and its gradient with respect to the Executor, with everything on a device or a mesh."""
    base, lora = weights.base, weights.executor
    x = jax.random.normal(jax.random.key(1), (8, *shape_of(family)))
    text = jax.random.normal(jax.random.key(2), (8, 64, 20))
    condition = condition_of(text, x[:, :1])

    def loss(lora, base, x):
        v = velocity_of(family)(base, lora, x, jnp.full(8, 0.5), condition)
        return (v**2).mean()

    if isinstance(where, jax.sharding.Mesh):
        base = jax.device_put(base, tree_shardings(where, family.base_axes(), base))
        lora = jax.device_put(lora, tree_shardings(where, family.lora_axes(lora), lora))
        x, condition = jax.device_put((x, condition), batch_sharding(where))
    else:
        base, lora, x, condition = jax.device_put((base, lora, x, condition), where)
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(lora, base, x))


def condition_of(text, scene):
    return told(text, jnp.ones(text.shape[:2], bool), scene)


@pytest.mark.once
def test_clips_decoded_a_few_at_a_time_are_the_same(random):
    latents = jax.random.normal(jax.random.key(3), (4, *shape_of(random.family)))
    base = {"vae": jax.device_put(random.base["vae"], jax.devices()[0])}
    whole = jax.jit(build.make_family(config_of(**{"model.piece": 0})).codec.decode)(base, {"video": latents})
    family = build.make_family(config_of(**{"model.rows": 2, "model.piece": 1}))
    np.testing.assert_allclose(
        jax.jit(family.codec.decode)(base, {"video": latents}).astype(int), whole.astype(int), atol=1
    )
    with pytest.raises(ValueError, match="2 rows at a time do not divide 3"):
        family.codec.decode(base, {"video": latents[:3]})


def test_clips_of_a_step_go_to_the_host_by_turns_and_keep_their_numbers(random):
    mesh = make_mesh(data=1, fsdp=2, context=2, tensor=2)
    latents = jax.random.normal(jax.random.key(3), (8, *shape_of(random.family)))
    base = jax.device_put({"vae": jax.device_get(random.base["vae"])}, replicated(mesh))
    placed = {"video": jax.device_put(latents, batch_sharding(mesh))}
    turns = make_programs(config_of(**{"model.rows": 2}), mesh).decode(base, placed)
    assert turns.sharding.memory_kind == "pinned_host"
    numbers, clips = hosts.own_rows(turns, axes=2)
    whole = make_programs(config_of(**{"model.rows": 0}), mesh).decode(base, placed)
    assert turns.shape[:2] == (4, 2) and whole.shape[:2] == (1, 8) and whole.sharding.memory_kind == "device"
    assert sorted(numbers) == list(range(8)) and len(np.unique(whole[0], axis=0)) == 8
    np.testing.assert_allclose(clips.astype(int), whole[0][numbers].astype(int), atol=1)


@pytest.mark.once
def test_a_clip_is_decoded_in_parts_on_many_devices(random):
    latents = jax.random.normal(jax.random.key(3), (2, *shape_of(random.family)))
    found = []
    for shape in ({"data": 1, "context": 1, "tensor": 1}, {"data": 2, "context": 2, "tensor": 2}):
        mesh = make_mesh(fsdp=1, **shape, devices=jax.devices()[: math.prod(shape.values())])
        family = build.make_family(config_of(**{"model.piece": 2}), mesh)
        base, placed = jax.device_put(
            ({"vae": jax.device_get(random.base["vae"])}, {"video": latents}), replicated(mesh)
        )
        found.append(jax.jit(family.codec.decode).lower(base, placed).compile())
        clips = found[-1](base, placed)
        found[-1] = clips, found[-1].memory_analysis().temp_size_in_bytes
    (one, needs), (many, less) = found
    np.testing.assert_allclose(one.astype(int), many.astype(int), atol=1)
    assert less < needs / 4 and many.sharding.shard_shape(many.shape) != many.shape


@pytest.mark.parametrize("layout", ["diffusers", "comfy"])
@pytest.mark.once
def test_an_exported_lora_is_an_executor_to_start_from(opened, files, layout):
    path = str(files[layout])
    found = read_lora(path, LoraModel.of(opened.family), scale=opened.family.lora_scale).tree
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, jax.device_get(opened.executor))
    config = config_of(**{"executor.start": path})
    state = make_programs(config, opened.mesh).init(opened.base, config.seed)
    state = run_folder.start_from_file(path, config, opened.family, state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.lora), found)
    config = config_of(**{"executor.rank": 2})
    state = make_programs(config, opened.mesh).init(opened.base, config.seed)
    with pytest.raises(UserError, match=r"blocks.cross_attention.k.a is \(2, 32, 4\), not \(2, 32, 2\)"):
        run_folder.start_from_file(path, config, opened.family, state)


@pytest.mark.once
def test_merged_weights_are_base_plus_executor(opened, merged):
    want = merge(opened.base["transformer"], opened.executor, opened.family.lora_scale)
    config = config_of(base=str(merged[1]))
    found = base_model.load_base(opened.family, config, opened.mesh)
    want = array_store.by_name({"transformer": want, "vae": opened.base["vae"]})
    for name, array in array_store.by_name(found).items():
        np.testing.assert_allclose(array, want[name], atol=1e-6, err_msg=name)
        assert array.sharding == array_store.by_name(opened.base)[name].sharding
    with pytest.raises(UserError, match="exists already"):
        export.export_merged(opened.data.parent, merged[0])
    with pytest.raises(UserError, match="missing transformer.blocks|is .* not"):
        base_model.load_base(build.make_family(config_of(**{"model.mlp": 64})), config, opened.mesh)


@pytest.mark.once
def test_large_models_are_written_in_shards_with_an_index(run, merged, monkeypatch):
    monkeypatch.setattr(merged_model, "SHARD_BYTES", 30_000)
    export.export_merged(run, run / "sharded")
    assert len(list((run / "sharded" / "transformer").glob("*-of-*.safetensors"))) > 2
    assert cli.main(["convert", str(run / "sharded"), str(run / "converted_sharded")]) == 0
    assert array_store.describe(run / "converted_sharded") == (
        array_store.describe(run / "converted")[0],
        array_store.describe(run / "converted")[1] | {"source": str(run / "sharded")},
    )


@pytest.mark.once
def test_clips_are_made_once_and_interrupted_calls_go_on(run, tmp_path, capsys, monkeypatch):
    common = ("--records", run / "data", "--limit", 1, "--steps", 2, "--batch", 2, "--count", 2)
    assert call("--executor", run, *common, "--text", "both", out=tmp_path / "a") == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    record = RecordReader(run / "data", "test")[0]
    wanted = [f"{record.id}.{role}.{k}" for role in ("demonstrator", "executor") for k in range(2)]
    assert names == sorted(f"{name}.{suffix}" for name in wanted for suffix in ("json", "mp4", "png"))
    settings = json.loads((tmp_path / "a" / f"{wanted[2]}.json").read_text())
    assert settings["prompt"] == record.task and settings["steps"] == 2 and settings["frames"] == 9
    assert settings["executor"] == {"run": str(run), "step": 2}
    sheet = tmp_path / "a" / f"{wanted[3]}.png"
    before = np.asarray(Image.open(sheet)).astype(int)
    (tmp_path / "a" / f"{wanted[3]}.json").unlink()
    capsys.readouterr()
    assert call("--executor", run, *common, "--text", "both", out=tmp_path / "a") == 0
    assert "1 clips made, 3 were there" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(base_model, "load_base", None)  # nothing to do takes no weights
        assert call("--executor", run, *common, "--text", "both", out=tmp_path / "a") == 0
    assert "0 clips made, 4 were there" in capsys.readouterr().out
    # In another place of a batch, rounding may differ.
    np.testing.assert_allclose(np.asarray(Image.open(sheet)).astype(int), before, atol=1)
    assert call("--executor", run, *common, "--seed", 1, "--text", "both", out=tmp_path / "a") == 2
    assert "seed 0 -> 1" in capsys.readouterr().err


@pytest.mark.once
def test_images_guidance_and_every_kind_of_executor(run, files, merged, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = {}
    monkeypatch.setattr(generate, "_write", lambda folder, job, clip, *rest: seen.setdefault((folder, job.name), clip))
    images = sorted((run / "data" / "scenes" / "test").glob("*.png"))
    flags = ["--image", images[0], "--image", images[1], "--task", "[red disc]: Go to the blue ring.", "--batch", 1]
    flags += ["--sampler", "unipc", "--guidance", 3, "--negative", "a still picture"]
    changes = [f"--config.{key}={value}" for key, value in SMALL.items()]
    assert call(*flags, "--executor", run, out="a") == 0
    debug = ("--config", "wan22_5b:debug", *changes)
    assert call(*flags, *debug, "--executor", files["comfy"], out="b") == 0  # the other layout is read as the same tree
    assert call(*flags, *debug, f"--config.base={merged[1]}", out="c") == 0
    clips = {(str(folder), name): clip.astype(int) for (folder, name), clip in seen.items()}
    for i, image in enumerate(images[:2]):
        want = clips["a", f"{image.stem}.executor.0"]
        assert want.shape == (9, 64, 64, 3) and want.std() > 0
        for out, role in (("b", "executor"), ("c", "base")):
            np.testing.assert_allclose(clips[out, f"{image.stem}.{role}.0"], want, atol=1, err_msg=f"{out} {i}")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--size", "60x64"], "multiples of 32"),
        (["--frames", "8"], r"8 frames: their number must be 1 \+ a multiple of 4"),
        (["--size", "64"], "expected HEIGHTxWIDTH"),
        (["--guidance", "0.5"], "--guidance: must be at least 1, not 0.5"),
        (["--sigmas", "1,0.5", "--sampler", "unipc"], "is for --sampler euler"),
        (["--sigmas", "1,a"], "expected numbers"),
        (["--executor", "nothing.safetensors"], "nothing.safetensors"),
        (["--task", "a", "--task", "b", "--task", "c"], "3 --task for 1 --image"),
        (["--task", "[a]: b.", "--records", "data"], "either --image"),
    ],
)
@pytest.mark.once
def test_flags_that_do_not_fit_are_explained(run, tmp_path, capsys, flags, text):
    changes = [
        f"--config.{key}={value}" for key, value in SMALL.items() if key != "model.size" or "--size" not in flags
    ]
    image = next((run / "data" / "scenes" / "test").glob("*.png"))
    if "--task" not in flags:
        flags = [*flags, "--task", "[red disc]: Go."]
    try:
        code = call("--config", "wan22_5b:debug", *changes, "--image", image, *flags, out=tmp_path)
    except SystemExit as error:  # of a flag that means nothing by itself
        code = error.code
    assert code == 2
    assert re.search(text, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_pictures_that_are_none_and_runs_without_checkpoint_are_named(run, tmp_path, capsys):
    (tmp_path / "picture.png").write_text("no picture")
    assert call("--executor", run, "--image", tmp_path / "picture.png", "--task", "[a]: b.", out=tmp_path / "o") == 2
    assert "picture.png: no picture, but text" in capsys.readouterr().err
    shutil.copy(run / "config.json", tmp_path)
    for verb in (["export"], ["export", "--format", "merged"]):
        assert cli.main([*verb, "--workdir", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
        assert "no checkpoint yet" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.json", "picture.png"]


@pytest.mark.once
def test_lora_of_another_model_is_refused(files):
    config = config_of(**{"model.width": 64})
    family = build.make_family(config)
    with pytest.raises(TensorFileError, match=r"comfy\.safetensors"):
        read_lora(files["comfy"], LoraModel.of(family), scale=1.0)


def test_the_full_size_takes_its_place_on_a_mesh():
    config = load_config("wan22_5b:wmsd", {"host_devices": 8})
    mesh, family = build.start_devices(config), build.make_family(config)
    base = jax.eval_shape(family.init_base, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(base["transformer"]))
    assert round(count / 1e9, 2) == 5.0 and round(sum(4 * x.size for x in jax.tree.leaves(base["vae"])) / 1e9, 1) == 2.8
    assert base["transformer"]["head"]["kernel"].dtype == jnp.bfloat16
    shardings = tree_shardings(mesh, family.base_axes(), base)
    assert shardings["transformer"]["blocks"]["mlp"]["up"]["kernel"].spec[1] == "fsdp"
    state = make_programs(config, mesh).state
    assert state.lora["blocks"]["self_attention"]["q"]["a"].shape == (30, 3072, 32)
    assert shape_of(family) == (13, 30, 52, 48)
    condition = told(
        *(jax.ShapeDtypeStruct(s, d) for s, d in (((2, 512, 4096), jnp.bfloat16), ((2, 512), bool))),
        jax.ShapeDtypeStruct((2, 1, 30, 52, 48), jnp.float32),
    )  # fmt: skip
    x, t = jax.ShapeDtypeStruct((2, *shape_of(family)), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    v = jax.eval_shape(velocity_of(family), base, state.lora, x, t, condition)
    assert (v.shape, v.dtype) == (x.shape, jnp.float32)
    clips = jax.eval_shape(family.codec.decode, base, {"video": x})
    assert (clips.shape, clips.dtype) == ((2, 49, 480, 832, 3), jnp.uint8)


@pytest.mark.parametrize("name", ["wan22_5b:wmsd", "wan_sizes:13b", "wan_sizes:14b", "wan_sizes:19b"])
def test_no_device_holds_the_whole_of_a_large_array(name):
    """Base, LoRA, averages and moments: in as many parts as fsdp has devices, matrices of blocks times tensor.

    The autoencoder: in as many as there are devices but for copies (data).
    """
    mixed = {"fsdp": 2, "context": 2, "tensor": 2}
    for shape in ({"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}, mixed):
        config = load_config(name, {f"mesh.{axis}": size for axis, size in shape.items()})
        mesh = make_mesh(**config.mesh.to_dict())
        base = base_model.abstract_base(build.make_family(config, mesh), mesh)
        state = make_programs(config, mesh).state
        large = 0
        for path, x in jax.tree_util.tree_leaves_with_path((base, state)):
            if math.prod(x.shape) * getattr(x.dtype, "itemsize", 4) < 2**20:
                continue
            path, large = jax.tree_util.keystr(path), large + 1
            parts = math.prod(x.shape) // math.prod(x.sharding.shard_shape(x.shape))
            wanted = mesh.shape["fsdp"]
            if "['vae']" in path:
                wanted = mesh.size // mesh.shape["data"]
            elif "blocks" in path and path.endswith("['kernel']"):
                wanted *= mesh.shape["tensor"]
            elif path.endswith("['up']['bias']"):  # the only large vectors, 2 MiB at most
                wanted = mesh.shape["tensor"]
            assert parts >= wanted, f"{path} {x.shape} is in {parts} parts on {shape}"
        assert large > 100


def test_judge_and_annotator_are_made_from_the_config_and_an_empty_factory_is_refused():
    config = load_config(
        "wan22_5b:wmsd", {"judge.options.frames": 8, "judge.options.servers": "http://a/v1,http://b/v1"}
    )
    judge = build.make(config, "judge")
    assert isinstance(judge, ServerJudge) and judge.name.startswith("server-2 Qwen/Qwen3.5-27B 8x448")
    annotator = build.make(config, "annotator")
    assert isinstance(annotator, ServerAnnotator) and annotator.name.startswith("server-1 Qwen/Qwen3.5-27B prompt-")
    benchmark = build.make(config, "benchmark")
    assert isinstance(benchmark, WorldTasksBench) and benchmark.questions == ("task", "agent", "consistency")
    assert benchmark.judges["main"].name == judge.name.replace("8x448", "16x448")
    with pytest.raises(UserError, match="config.held_out.factory names nothing"):
        build.make(config, "held_out")
