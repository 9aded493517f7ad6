"""Planning for TPUs, with their compiler where it is installed."""

import dataclasses
import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest

from world_distill import cli
from world_distill.devices import chips, cycles
from world_distill.devices.sharding import make_mesh
from world_distill.errors import UserError
from world_distill.programs import plan
from world_distill.settings.loading import load_config

NO_COMPILER = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is in the extra `tpu`")


def needs_compiler(test):
    return pytest.mark.tpu(NO_COMPILER(test))


def test_candidates_use_every_chip_and_divide_the_rows():
    config = load_config("wan22_5b:wmsd")
    found = list(plan.candidates(config, 16))
    assert found[0]["mesh.fsdp"] == 16 and found[0]["model.remat"] == "attention"
    for change in found:
        assert change["mesh.fsdp"] * change["mesh.tensor"] * change["mesh.context"] == 16
        assert 64 % change["mesh.fsdp"] == 0
    shared = {change["mesh.fsdp"]: (change["mesh.tensor"], change["mesh.context"]) for change in found}
    assert shared == {16: (1, 1), 8: (2, 1), 4: (4, 1), 2: (8, 1), 1: (8, 2)}  # 24 heads


def test_the_table_of_chips_knows_what_jax_calls_them():
    assert chips.chip("TPU v5 lite").name == "v5e" and chips.chip("cpu") is None


def test_the_devices_of_this_machine_are_a_topology(tmp_path, capsys):
    path = tmp_path / "plan.json"
    flags = ["--config", "wan22_5b:debug", "--topology", "local", "--phases", "rollout", "--json", str(path)]
    assert cli.main(["plan", *flags, "--config.mesh.data=2", "--config.mesh.fsdp=4"]) == 0
    result = json.loads(path.read_text())
    assert result["devices"] == 8 and result["chip"] is None and result["fits"]
    [rollout] = result["phases"]
    assert rollout["peak"] > 0 and rollout["collectives"] and rollout["flops"] > 0
    assert cli.main(["plan", "--config", "wan22_5b:debug", "--topology", "local", "--slices", "2"]) == 2
    assert "--slices 2" in capsys.readouterr().err


def test_want_of_vmem_is_told_from_want_of_hbm():
    """In the words of the compiler."""
    vmem = (
        "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while allocating"
        " on stack for %fusion.12 = f32[8]{0} fusion(%p), kind=kLoop. Scoped allocation with size 16.72M and limit"
        " 16.00M exceeded scoped vmem limit by 740.0K."
    )
    found = plan._refusal(vmem)
    assert "not for want of HBM" in found and "(fusion.12)" in found and "(16.72M of 16.00M)" in found
    hbm = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.00G of 15.75G hbm.\nLargest allocations:"
    assert plan._refusal(hbm) == "Ran out of memory in memory space hbm. Used 40.00G of 15.75G hbm."


@needs_compiler
def test_a_topology_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="v5e:77x1"):
        plan.topology("v5e:77x1")


@needs_compiler
def test_slices_are_split_along_data():
    devices = plan.topology("v5e:2x2", slices=2)
    mesh = make_mesh(data=2, fsdp=4, devices=devices)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match=r"2 slices need mesh\.data to be a multiple of 2"):
        make_mesh(data=1, fsdp=8, devices=devices)


@needs_compiler
@pytest.mark.parametrize("name", ["v5e:16x16", "v6e:16x16", "v5p:8x8x8", "tpu7x:4x4x4"])
def test_an_axis_need_not_be_a_product_of_those_of_the_torus(name):
    devices = plan.topology(name)
    mesh = make_mesh(fsdp=64, data=-1, devices=devices)
    assert mesh.shape["fsdp"] == 64 and {d.id for d in mesh.devices.flat} == {d.id for d in devices}
    assert make_mesh(data=2, fsdp=-1, tensor=4, devices=devices).size == len(devices)


@needs_compiler
def test_an_estimate_follows_the_turns_of_a_loop_and_is_close_to_the_peak_of_the_matrix_units():
    [device, *_] = plan.topology("v5p:2x2x1")
    sharding = jax.sharding.SingleDeviceSharding(device)

    def estimate(turns):
        def run(x, w):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=turns)[0]

        given = (jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=sharding) for _ in range(2))
        return cycles.estimate(jax.jit(run).lower(*given).compile().as_text())

    three, nine = estimate(3), estimate(9)
    assert three.endless == nine.endless == 0
    assert nine.cycles["products"] == 3 * three.cycles["products"]
    ideal = 3 * 2 * 4096**3 / (459e12 / 1.75e9)
    assert ideal < three.cycles["products"] < 1.1 * ideal


@pytest.fixture
def lines_of_code():
    """Programs say where they were traced, which the tests' settings leave out."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 10)
    yield
    jax.config.update("jax_traceback_in_locations_limit", before)


@needs_compiler
def test_the_most_expensive_instructions_are_explained(lines_of_code, capsys):
    flags = ["--config", "wan22_5b:debug", "--topology", "v5e:2x2", "--config.objective.rl=none"]
    flags += ["--config.objective.minibatches=1"]
    assert cli.main(["plan", *flags, "--phases", "rollout", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "rollout: the most expensive instructions" in text and re.search(r" x \w+ .* world_distill/models/", text)
    assert "predicted from the compiler's cycles" in text
    for more, words in ((["--utilisation", "0.5"], "the compiler for v5e"), (["--explain", "--search"], "--explain")):
        assert cli.main(["plan", *flags, *more]) == 2
        assert words in capsys.readouterr().err


def test_a_phase_needs_room_for_gaps_between_its_buffers_beside_what_lies_there():
    chip = chips.chip("TPU v5 lite")
    phase = plan.Phase("update", 1e15, 1, 0.0, arguments=8.0, temporaries=4.0, output=0.0, peak=10.0)
    fits = lambda beside: plan._fits(dataclasses.replace(phase, beside=beside), chip)  # noqa: E731
    assert fits(chip.hbm_gib - 10.6) and not fits(chip.hbm_gib - 10.4)


@needs_compiler
@pytest.mark.parametrize("rollouts, minibatches, count", [((2, 3), 1, 6), ((2, 8), 4, 4)])
def test_rollouts_that_every_chip_would_compute_are_refused(rollouts, minibatches, count, capsys):
    sizes = {"rollout.tasks": rollouts[0], "rollout.group": rollouts[1], "objective.minibatches": minibatches}
    flags = [f"--config.{key}={value}" for key, value in sizes.items()]
    assert cli.main(["plan", "--config", "wan22_5b:debug", "--topology", "v5e:2x4", *flags]) == 2
    error = capsys.readouterr().err
    assert f"{count} rollouts (rollout.tasks x rollout.group" in error and "mesh.fsdp = 8" in error
    most = math.gcd(count, 8)
    assert f"--config.mesh.fsdp={most} --config.mesh.context={4 // most} --config.mesh.tensor=2" in error  # 2 heads


@needs_compiler
def test_phases_of_a_small_model_compile_for_a_slice(tmp_path):
    path = tmp_path / "plan.json"
    flags = ["--topology", "v5e:2x2", "--phases", "demonstrator,update", "--json", str(path)]
    # As many reads of a rollout as it has states: then the Demonstrator is a phase of its own.
    overrides = ["--config.objective.rl=none", "--config.mesh.context=2", "--config.objective.draws=4"]
    assert cli.main(["plan", "--config", "wan22_5b:debug", *flags, *overrides]) == 0
    found = json.loads(path.read_text())
    assert found["mesh"] == {"data": 1, "fsdp": 2, "context": 2, "tensor": 1} and found["fits"]
    phases = {phase["name"]: phase for phase in found["phases"]}
    assert phases["update"]["collectives"]["all-to-all"] > 0  # tokens for heads
    for phase in phases.values():
        low, high = phase["seconds"]
        cycles = sum(phase["cycles"].values())
        assert cycles / 1.5e9 <= low <= high and phase["sent"] > 0
        assert phase["expensive"][0]["cycles"] >= phase["expensive"][1]["cycles"] > 0
    assert phases["update"]["flops"] > phases["update"]["needed"] > 0  # the debug config computes again
    low, high = found["step_seconds"]
    assert low == sum(phase["seconds"][0] * phase["calls"] for phase in found["phases"]) <= high
    assert found["rollouts_per_second"] == pytest.approx([found["rollouts_per_step"] / s for s in (high, low)])
    assert phases["update"]["flops"] > phases["demonstrator"]["flops"] > 1e6


@needs_compiler
def test_tensor_parallel_blocks_scatter_their_sums():
    flags = {"mesh.fsdp": 1, "mesh.tensor": 4, "objective.rl": "none", "model.width": 512, "model.heads": 4}
    config = load_config("wan22_5b:debug", flags | {"model.size": (256, 256), "model.depth": 2})
    rollout, update = plan.make_plan(config, plan.topology("v5e:2x2"), ("rollout", "update"))
    assert rollout.collectives["reduce-scatter"] >= 3  # attention, cross-attention, MLP
    assert update.collectives["reduce-scatter"] >= 9  # these, twice, and their gradients


@needs_compiler
def test_weights_and_factors_along_fsdp_are_gathered_before_their_products():
    """Else the compiler deals the columns of a product out to the devices that share its weights."""
    flags = {
        "mesh.fsdp": 4,
        "objective.rl": "none",
        "objective.minibatches": 1,
        "model.width": 1024,
        "model.heads": 8,
        "model.mlp": 4096,
    }
    flags |= {"model.size": (256, 256), "model.depth": 2, "model.dtype": "bfloat16", "executor.rank": 32}
    config = load_config("wan22_5b:debug", flags)
    [rollout] = plan.make_plan(config, plan.topology("v5e:2x2"), ("rollout",))
    counts = rollout.collectives
    assert counts["all-gather"] > 10 and not counts.keys() & {"all-to-all", "collective-permute"}
    assert counts["reduce-scatter"] == 1  # of the text's first layer; with factors in parts, of the blocks' sums too


@needs_compiler
def test_what_does_not_fit_is_said_with_the_largest_arrays(capsys):
    flags = ["--topology", "v5e:2x2", "--phases", "rollout", "--config.objective.rl=none"]
    sizes = ["--config.model.depth=30", "--config.model.size=(3072,3072)", "--config.rollout.tasks=64"]
    sizes.append("--config.rollout.micro_batch=0")  # all at once: by itself it would take a clip a chip
    assert cli.main(["plan", "--config", "wan22_5b:debug", *flags, *sizes]) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text and "GiB over all chips" in text
