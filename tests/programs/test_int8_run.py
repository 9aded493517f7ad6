"""Training over a base whose kernels are int8: on any mesh, and with the same setting to the end."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import PATTERN, make_inputs, small_config

from tests.runs import final_states
from world_distill import build
from world_distill.devices.sharding import batch_sharding, make_mesh
from world_distill.errors import UserError
from world_distill.programs import plan, pretrain, train
from world_distill.settings.loading import from_json, load_config, to_json
from world_distill.training import run_folder
from world_distill.training.step_programs import make_programs
from world_distill.weights import base_model

INT8 = {"model.int8": True, "model.merge_lora": False}
EIGHT = {"host_devices": 8, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "rollout.micro_batch": 4}


@pytest.mark.once
def test_eight_devices_train_as_one_does_and_the_setting_stays(tmp_path):
    make_inputs(tmp_path)
    found = []
    for name, devices in (("one", {}), ("eight", EIGHT)):
        config = small_config(tmp_path, **INT8, **devices, **{"judge.factory": PATTERN, "steps": 2})
        train.train(config, tmp_path / name)
        [(state, _)] = final_states(config, tmp_path / name)
        found.append(state)
    one, eight = found
    assert one.step == eight.step == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one.lora, eight.lora)
    assert max(np.abs(x).max() for x in jax.tree.leaves(one.lora)) > 1e-4

    opened = run_folder.open_run(tmp_path / "eight")
    assert opened.base["blocks"]["mlp"]["up"]["kernel"].values.dtype == np.int8
    config = small_config(tmp_path, **EIGHT, **{"judge.factory": PATTERN, "steps": 4, "model.merge_lora": False})
    with pytest.raises(UserError, match="model.int8: true -> false"):
        train.train(config, tmp_path / "eight")


def test_full_weights_and_pretraining_are_refused(tmp_path):
    config = small_config(tmp_path, **INT8, **{"executor.rank": 0})
    mesh = build.start_devices(config)
    with pytest.raises(ValueError, match="executor.rank = 0 trains every weight, and model.int8"):
        make_programs(config, mesh)
    with pytest.raises(UserError, match="model.int8 is for kernels that stay frozen"):
        pretrain.pretrain(load_config("sandbox", INT8), tmp_path, command="")


def test_a_run_that_was_begun_before_the_setting_has_it_off():
    for name in ("sandbox", "wan22_5b:debug"):
        config = load_config(name)
        text = to_json(config).replace('"int8": false,', "", 1)
        assert "int8" not in text and from_json(text).model.int8 is False


def test_a_base_of_14_billion_takes_half_the_memory():
    """Of four chips that share heads and hidden units, with the autoencoder."""
    sizes = []
    for on in (False, True):
        config = load_config("wan_sizes:14b", {"mesh.fsdp": -1, "mesh.tensor": 4, "model.int8": on})
        mesh = make_mesh(**config.mesh.to_dict(), devices=jax.devices()[:4])
        base = base_model.abstract_base(build.make_family(config, mesh), mesh)["transformer"]["blocks"]
        sizes.append(
            sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(base)) / 2**30
        )
    assert sizes[0] == pytest.approx(6.54, abs=0.02) and sizes[1] == pytest.approx(3.28, abs=0.02)


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is in the extra `tpu`")
def test_a_tpu_holds_no_stack_of_wide_kernels():
    """Its compiler could take the conversion of all blocks' kernels out of the loop over blocks."""
    wide = {"model.dtype": "bfloat16", "model.remat": "full", "mesh.fsdp": 2, "mesh.tensor": 2}
    config = load_config("wan22_5b:mid", {"model.int8": True, **wide})
    mesh = make_mesh(**config.mesh.to_dict(), devices=plan.topology("v5e:2x2"))
    family = build.make_family(config, mesh)
    base, lora = base_model.abstract_base(family, mesh), base_model.abstract_executor(family, mesh, 4)
    condition = plan._condition(config, family, mesh, 2)
    lie = batch_sharding(mesh)
    x = {name: jax.ShapeDtypeStruct((2, *s.shape), jnp.float32, sharding=lie) for name, s in family.latents.items()}
    t = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=lie)

    def loss(lora, base, *given):
        return sum(jnp.mean(jnp.square(v)) for v in family.denoise(base, lora, *given).values())

    text = jax.jit(jax.grad(loss)).lower(lora, base, x, t, condition).compile().as_text()
    kernels = [x for x in jax.tree.leaves(base) if x.dtype == jnp.int8]
    stacks = {",".join(map(str, x.sharding.shard_shape(x.shape))) for x in kernels}
    stacks |= {",".join(map(str, x.shape)) for x in kernels}
    assert {kind for kind, shape in re.findall(r"\b([a-z]\w*)\[([\d,]+)\]", text) if shape in stacks} == {"s8"}
