"""Transformer and connectors with diffusers at work beside us: other weights, sizes, lengths and clips."""

import dataclasses

import numpy as np
import pytest

from tests.models.ltx2 import small_ltx2
from tests.models.ltx2.small_ltx2 import CONFIG, CONNECTORS, OFF, check_gradients, split, velocity, weights_of

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="torch is in the extra `torch`")
pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
pytest.importorskip("peft", reason="peft is in the extra `torch`")


@pytest.mark.parametrize(
    ("seed", "grid", "moments", "tokens"), [(21, (1, 1, 1), 2, 1), (22, (5, 4, 3), 31, 64), (23, (2, 1, 9), 3, 5)]
)
def test_velocities_are_those_of_diffusers(seed, grid, moments, tokens):
    from tests.models.ltx2 import make_goldens

    arrays, theirs = split(make_goldens.transformer(seed, grid, moments, tokens))
    found = velocity(CONFIG, arrays, weights_of(CONFIG, theirs))
    for name, v in found.items():
        np.testing.assert_allclose(v, arrays[f"v_{name}"], atol=5e-5, err_msg=name)
    alone = velocity(OFF, arrays, weights_of(OFF, theirs))["video"]
    np.testing.assert_allclose(alone, arrays["isolated"], atol=5e-5)


@pytest.mark.parametrize(("length", "lengths"), [(4, (4, 1)), (24, (13, 24, 2, 9))])
def test_connectors_are_those_of_diffusers(length, lengths):
    import jax

    from tests.models.ltx2 import make_goldens
    from tests.models.ltx2.test_ltx2_connectors import assert_same, stored

    arrays, theirs = split(make_goldens.connectors(31, length, lengths))
    config = dataclasses.replace(CONNECTORS, length=length)
    weights, kernel = small_ltx2.connector_weights(config, theirs)
    assert_same(jax.jit(small_ltx2.connectors(config))(weights, *stored(arrays, kernel, length)), arrays)


@pytest.mark.parametrize("layout", ["diffusers", "comfy"])
def test_diffusers_loads_our_lora_of_all_layers_in_either_layout(tmp_path, layout):
    import diffusers

    from tests.models.ltx2 import make_goldens
    from world_distill.weights.lora_files import FILE_NAME, read_lora, write_lora

    arrays, theirs = small_ltx2.load("transformer.npz")
    weights = weights_of(CONFIG, theirs)
    lora = small_ltx2.random_lora(weights, targets=".*")
    write_lora(tmp_path / FILE_NAME, lora, small_ltx2.MODEL, scale=0.1, layout=layout)
    model = diffusers.LTX2VideoTransformer3DModel(**make_goldens.TRANSFORMER).eval()
    model.load_state_dict({name: torch.from_numpy(x) for name, x in theirs.items()})
    pipeline = diffusers.LTX2ImageToVideoPipeline(*[None] * 6, transformer=model, vocoder=None)
    pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        wanted = make_goldens.run(model, {name: torch.from_numpy(x) for name, x in arrays.items()})
    again = read_lora(tmp_path / FILE_NAME, small_ltx2.MODEL, scale=1.0).tree
    for own, scale in ((lora, 0.1), (again, 1.0)):
        for name, v in velocity(CONFIG, arrays, weights, own, scale).items():
            assert np.abs(v - arrays[f"v_{name}"]).max() > 0.1
            np.testing.assert_allclose(v, wanted[name], atol=5e-5, err_msg=name)


def test_gradients_of_all_layers_are_those_of_torch():
    from tests.models.ltx2 import make_goldens

    golden, theirs = small_ltx2.load("transformer.npz")
    full = golden | {f"w:{name}": x for name, x in theirs.items()}
    # Weak: strong factors in all layers at once make far more of a rounding.
    lora = {"r": 4, "lora_alpha": 1, "target_modules": "all-linear"}
    arrays = make_goldens.lora_gradients(full, seed=11, lora=lora)
    assert sum(name.endswith("lora_A.weight") and "grad:" not in name for name in arrays) == 26 + 2 * 28
    check_gradients(weights_of(CONFIG, theirs), golden, arrays, alpha=1, rank=4)
