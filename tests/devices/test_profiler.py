"""Which steps are traced."""

import pytest

from world_distill.cli.arguments import parse_steps
from world_distill.devices.profiler import Profiler
from world_distill.errors import UserError


@pytest.mark.parametrize(
    ("steps", "message"),
    [("5:3", "5:3"), ("0", "from 1 on"), ("two", "'two' is not a step"), (",", "names no step")],
)
def test_steps_to_profile_that_are_none_are_named(steps, message):
    with pytest.raises(UserError, match=message):
        parse_steps(steps)


def test_steps_to_profile_have_to_be_ahead(tmp_path):
    assert parse_steps("3:5,8") == {3, 4, 5, 8} and parse_steps("") == frozenset()
    with pytest.raises(UserError, match="step 3, 9 cannot be traced: the run makes steps 4 to 8"):
        Profiler(tmp_path, parse_steps("3,8:9"), first=4, last=8)
