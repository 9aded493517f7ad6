"""Settings of guidance: what is refused and why, what it costs, and the records that bring the negative text."""

import hashlib

import numpy as np
import pytest

from tests.programs.test_prepare import encode, folder  # noqa: F401  (a fixture)
from world_distill import cli
from world_distill.data.records.negative import load_negative, negative_path, read_negative, write_negative
from world_distill.data.records.reader import RecordError, RecordReader
from world_distill.devices.sharding import make_mesh
from world_distill.errors import UserError
from world_distill.programs import ablate, equal_compute
from world_distill.settings.check import check as check_settings
from world_distill.settings.guidance import Guidance
from world_distill.settings.loading import load_config, section
from world_distill.settings.objective import Objective
from world_distill.settings.rollout import RolloutSettings
from world_distill.training.forwards import per_rollout
from world_distill.training.step_programs import make_programs

LENGTH = 40
BLUR = ("--config.demonstrator.guidance=2", "--config.demonstrator.negative=a blurred picture")


def check(spec, **changes):
    config = load_config(spec, {name.replace("__", "."): value for name, value in changes.items()})
    objective, collection = section(config.objective, Objective), RolloutSettings(**config.rollout.to_dict())
    guidance = Guidance.of(config).demonstrator
    check_settings(objective, collection, stochastic=config.sampler.eta > 0, guidance=guidance)


@pytest.mark.parametrize("scale", [0.0, 0.9, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["demonstrator", "rollout"])
def test_scales_below_1_are_refused(name, scale):
    with pytest.raises(ValueError, match=rf"{name}\.guidance is at least 1"):
        Guidance(**{name: scale})


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match=r"demonstrator\.negative has no effect without guidance"):
        Guidance(negative="blur")
    Guidance(rollout=2.0, negative="blur")
    for spec in ("sandbox:rl_only", "wan22_5b:wmsd"):
        changes = {} if spec == "sandbox:rl_only" else {"objective__beta_d": ((0, 0.0),)}
        with pytest.raises(ValueError, match=r"demonstrator\.guidance has no effect"):
            check(spec, demonstrator__guidance=2.0, **changes)
    # Each of these uses the Demonstrator: for the anchor, for Eq. 9, for rollouts.
    check("sandbox:wmsd", demonstrator__guidance=2.0)
    check("sandbox:rl_only", demonstrator__guidance=2.0, rollout__weights__distill=1.0)
    check("sandbox:rl_only", demonstrator__guidance=2.0, rollout__role="demonstrator")


def test_guided_rollouts_do_not_go_with_flow_grpo():
    with pytest.raises(ValueError, match=r"rollout\.guidance above 1 does not go with objective\.rl = flow_grpo"):
        check("sandbox:wmsd_grpo", rollout__guidance=2.0)
    check("sandbox:wmsd_grpo", demonstrator__guidance=2.0)
    check("sandbox:wmsd", rollout__guidance=2.0)


def test_a_config_of_an_earlier_version_is_named():
    config = load_config("sandbox").copy_and_resolve_references().unlock()
    del config["demonstrator"]
    del config.rollout["guidance"]
    with pytest.raises(UserError, match="lacks demonstrator.guidance"):
        make_programs(config, make_mesh())


def test_wan_is_guided_as_it_is_published():
    found = Guidance.of(load_config("wan22_5b"))
    assert (found.demonstrator, found.rollout, found.scale("solution"), found.scale("task")) == (5.0, 1.0, 5.0, 1.0)
    # sample_neg_prompt of the published configuration.
    assert hashlib.sha256(found.negative.encode()).hexdigest()[:16] == "ce96e0324e4b54ce"
    assert not Guidance.of(load_config("sandbox")).used


def test_a_guided_velocity_is_two_forwards():
    sizes = {"sampler.steps": 6, "rollout.tasks": 8, "rollout.group": 8, "objective.updates": 4,
             "objective.minibatches": 1, "objective.awm_old": "start"}  # fmt: skip

    def forwards(variant, step=0, **changes):
        config = load_config(f"sandbox:{variant}", sizes | changes)
        objective, collection = section(config.objective, Objective), RolloutSettings(**config.rollout.to_dict())
        return per_rollout(objective, collection, 6, objective.phase(step), config.demonstrator.guidance)

    shown, rolled = {"demonstrator.guidance": 2.0}, {"rollout.guidance": 2.0}
    plain = forwards("on_policy")
    assert forwards("on_policy", **rolled) == plain + 6
    assert forwards("on_policy", **shown, **rolled) == plain + 4 + 6
    assert forwards("off_policy", **shown) == forwards("off_policy") + 6
    assert forwards("off_policy", **rolled) == forwards("off_policy")  # the Executor rolls nothing
    # The Demonstrator at the four states that updates read; at those of four re-noised clips.
    assert plain == 6 + 4 + 12 and forwards("on_policy", **shown) == 6 + 8 + 12
    again = {"objective.anchor_states": "renoised"}
    assert forwards("wmsd", 10_000, **again, **shown) == forwards("wmsd", 10_000, **again) + 4


def test_an_ablation_leaves_out_guidance_that_a_variant_has_no_use_for():
    changes = {"demonstrator.guidance": 2.0, "demonstrator.negative": "blur"}
    kept = equal_compute.without_idle_guidance(load_config("sandbox:wmsd", changes))
    assert (kept.demonstrator.guidance, kept.demonstrator.negative) == (2.0, "blur")
    plain = equal_compute.without_idle_guidance(load_config("sandbox:rl_only", changes))
    assert (plain.demonstrator.guidance, plain.demonstrator.negative) == (1.0, "")
    rolled = equal_compute.without_idle_guidance(load_config("sandbox:rl_only", changes | {"rollout.guidance": 3.0}))
    assert (rolled.demonstrator.guidance, rolled.demonstrator.negative) == (1.0, "blur")
    # A variant with another Demonstrator is compared with its own.
    assert ablate.RECORDS.match("demonstrator.guidance: 1.0 -> 2.0")


# ---- Records


def load(folder, guidance, length=LENGTH, name="train"):  # noqa: F811
    return load_negative(RecordReader(folder, name), guidance, {"text": length}, make_mesh())


def contents(folder):  # noqa: F811
    """Bytes of all files of the record set, without the negative text."""
    files = (folder / "train.json", *folder.glob("train-*"))
    return {path.name: path.read_bytes() for path in files}


def test_encode_keeps_the_negative_text_beside_the_records(capsys, folder):  # noqa: F811
    encode(capsys, folder, *BLUR)
    found = load(folder, Guidance(2.0, 1.0, "a blurred picture"))["text"]
    assert found.states.shape == (LENGTH, 64) and found.states.dtype == np.float32
    assert np.asarray(found.mask).tolist() == [True] * 3 + [False] * (LENGTH - 3)
    assert np.abs(found.states[:3]).min() > 0 and np.abs(found.states[3:]).max() == 0
    assert load(folder, Guidance()) is None


def test_records_of_an_earlier_version_open_and_say_what_guidance_needs(capsys, folder):  # noqa: F811
    encode(capsys, folder, "--shards", "2")
    before = contents(folder)
    negative_path(folder, "train").unlink()
    assert load(folder, Guidance()) is None
    with pytest.raises(RecordError, match=r"there is no .*train\.negative: call `world-distill encode`"):
        load(folder, Guidance(2.0))
    said, counts = encode(capsys, folder, "--shards", "2")
    assert said.startswith(f"encoded the negative text; {folder}/train is complete with 6 records\nnext: ")
    assert counts["encoded"] == 0
    assert contents(folder) == before
    assert np.asarray(load(folder, Guidance(2.0))["text"].mask).sum() == 1  # the empty text


def test_another_negative_text_is_an_error_until_it_is_encoded(capsys, folder):  # noqa: F811
    encode(capsys, folder)
    with pytest.raises(RecordError, match=r"negative text '', and config.demonstrator.negative is 'a blurred picture'"):
        load(folder, Guidance(2.0, 1.0, "a blurred picture"))
    said, counts = encode(capsys, folder, *BLUR)
    assert said.startswith("encoded the negative text;") and counts["encoded"] == 0
    load(folder, Guidance(2.0, 1.0, "a blurred picture"))
    with pytest.raises(RecordError, match="'a blurred picture', and config.demonstrator.negative is ''"):
        load(folder, Guidance(2.0))


def test_shards_by_several_machines_have_one_negative_text(capsys, folder):  # noqa: F811
    path, seen = negative_path(folder, "train"), set()
    for shard in (2, 0, 1):
        encode(capsys, folder, "--shard", f"{shard}/3", *BLUR)
        seen.add((path.read_bytes(), path.stat().st_mtime_ns))
    assert len(seen) == 1  # written by the first alone
    load(folder, Guidance(2.0, 1.0, "a blurred picture"))


def test_a_text_by_another_encoder_or_too_long_is_refused(capsys, folder):  # noqa: F811
    encode(capsys, folder, *BLUR)
    guidance, kept = Guidance(2.0, 1.0, "a blurred picture"), read_negative(folder, "train")
    with pytest.raises(RecordError, match="has 3 tokens, and texts are padded to 2: raise config.text_length"):
        load(folder, guidance, length=2)
    states = kept.states["text"]
    others = (
        {"text": states[:, :32]},
        {"text": states.astype("f2")},
        {"clip": states},
        {**kept.states, "clip": states},
    )
    for change in ({"text_encoder": "words-32"}, *({"states": other} for other in others)):
        write_negative(folder, "train", type(kept)(**vars(kept) | change))
        with pytest.raises(
            RecordError, match=r"has states by text encoder .*, the records by 'words-64' \(text: 64 wide"
        ):
            load(folder, guidance)


def test_a_negative_text_without_guidance_stops_encode(capsys, folder):  # noqa: F811
    assert cli.main(["encode", "--records", str(folder), BLUR[1]]) == 2
    assert "demonstrator.negative has no effect without guidance" in capsys.readouterr().err
