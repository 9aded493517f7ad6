"""What a benchmark's questions make of the columns of tables."""

import numpy as np
import pytest

from world_distill.core.measures import Measures

SCORES = np.array([[1, 0.75, 1], [1, 1, 1], [0, 1, np.nan]])


def test_the_usual_three():
    measures = Measures()
    assert measures.names == ("task", "agent", "consistency", "average", "all")
    assert measures.headline == "task" and measures.label("all") == "all three"
    np.testing.assert_allclose(measures.values(SCORES, "average"), [2.75 / 3, 1, np.nan])
    np.testing.assert_allclose(measures.values(SCORES, "all"), [0.75, 1, np.nan])  # a grade stays what it is
    np.testing.assert_allclose(measures.values(SCORES, "agent"), [0.75, 1, 1])
    with pytest.raises(KeyError, match="style"):
        measures.values(SCORES, "style")


def test_others():
    one, two = Measures(("instruction",)), Measures(("instruction", "looks_right"))
    assert one.names == ("instruction",) and two.names[-2:] == ("average", "all")
    assert two.label("all") == "both" and two.label("looks_right") == "looks right"
    assert Measures.of({"benchmark": {"questions": ["b", "a"]}}).questions == ("b", "a")
    assert Measures.of({"rows": []}) == Measures() == Measures.of({"benchmark": None})
    row = {"name": "x", "n": 2, "invalid": 0, "b": 0.5, "a": 1.0, "average": 0.75, "all": 0.5, "ci95": {}, "clips": 4}
    assert Measures.of_row(row).questions == ("b", "a")


@pytest.mark.parametrize("questions", [(), ("task", "task"), ("average",), ("n",), ("a/b",)])
def test_names_that_tables_cannot_hold_are_refused(questions):
    with pytest.raises(ValueError):
        Measures(questions)
