"""The same as `test_wan_loops.py`, with diffusers at work beside us: other weights, scenes, texts, sizes."""

import pytest

from tests.models.wan.wan_loops import CASES, compare, compare_demonstrator

pytestmark = pytest.mark.torch
pytest.importorskip("torch", reason="torch is in the extra `torch`")
pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")


@pytest.fixture(scope="module", params=[(11, (2, 2, 10), 7), (12, (4, 6, 4), 3)], ids=["wide", "long"])
def case(request):
    """(seed, diffusers' clips, diffusers' weights)."""
    from tests.models.wan import make_goldens

    seed, grid, tokens = request.param
    return seed, *make_goldens.loops(seed, grid, tokens)


@pytest.mark.parametrize("solver, scale", CASES)
def test_clips_are_those_of_diffusers(case, solver, scale):
    compare(solver, scale, *case)


def test_the_guided_demonstrator_is_that_of_diffusers(case):
    compare_demonstrator(*case)
