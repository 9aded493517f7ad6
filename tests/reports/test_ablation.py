"""The page of an ablation says what the figures say."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from world_distill.evaluation.scoring import Verdict, summarise
from world_distill.programs import ablate
from world_distill.programs.ablate import Ordering
from world_distill.reports import ablation

RATES = {"base": 0.1, "demonstrator": 0.5, "wmsd": 0.9, "beta_0": 0.6, "beta_0.1": 0.6, "rl<only>": 0.2}
ORDERINGS = [
    Ordering("wmsd", "demonstrator", "task", "RL adds"),
    Ordering("rl<only>", "wmsd", "all", "RL alone is enough"),
    Ordering("beta_0", "beta_0.1", "average", "more is better"),
]


def make_result(rates=RATES):
    rng = np.random.default_rng(0)
    pool = {
        name: [[
            Verdict(str(i), "", "", "", {q: float(rng.random() < rate) for q in ("task", "agent", "consistency")})
            for i in range(300)
        ]]
        for name, rate in rates.items()
    }  # fmt: skip
    return {
        "seeds": [0, 3],
        "reference": "wmsd",
        "steps": {"wmsd": 10, "beta_0": 11, "beta_0.1": 10, "rl<only>": 20},
        "rows": [summarise(name, seeds[0]) for name, seeds in pool.items()],
        "sweep": [(0.0, "beta_0"), (0.01, "wmsd"), (0.1, "beta_0.1")],
        "curves": {
            name: [(5, 0.3), (10, rate)] for name, rate in rates.items() if name not in ("base", "demonstrator")
        },
        "orderings": [ablate.compare(o, pool) for o in ORDERINGS if {o.better, o.worse} <= set(pool)],
    }


def charts_of(page):
    """Every chart of the page by its title, as XML."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    return {root[0].text: root for root in found}


def test_orderings_are_told_by_outcome():
    page = ablation.document(make_result())
    assert "Claims that hold here: 1 of 3; not resolved: 1; reversed: 1." in page
    items = re.findall(r'<li class="(\w*)">.*?<b>(.*?)</b>: ([a-z ]+)', page)
    assert items == [
        ("up", "RL adds", "holds"), ("down", "RL alone is enough", "reversed"), ("", "More is better", "not resolved"),
    ]  # fmt: skip


def test_every_variant_has_bars_a_course_and_a_row():
    page = ablation.document(make_result())
    charts = charts_of(page)
    bars = charts["Task completed, by variant"]
    texts = [node.text for node in bars.iter() if node.tag.endswith("text")]
    assert [t for t in texts if t in RATES] == list(RATES)
    course = next(root for title, root in charts.items() if title.startswith("Average on validation"))
    tips = [node.text for node in course.iter() if node.tag.endswith("title")]
    assert any(tip.startswith("wmsd, step 10: 90.0") for tip in tips)
    table = page[page.index('id="table"') :]
    assert all(name.replace("<", "&lt;").replace(">", "&gt;") in table for name in RATES)
    assert "rl<only>" not in page


def test_the_sweep_names_its_weights_and_shows_intervals():
    result = make_result()
    chart = charts_of(ablation.document(result))["Average of the three, by the anchor's weight"]
    texts = [node.text for node in chart.iter() if node.tag.endswith("text")]
    assert {"0", "0.01", "0.1"} <= set(texts)
    # the line, the Demonstrator's level, and a whisker for each weight
    assert sum(node.tag.endswith("path") for node in chart.iter()) == 2 + 3
    tips = [node.text for node in chart.iter() if node.tag.endswith("title")]
    average = next(row["average"] for row in result["rows"] if row["name"] == "wmsd")
    assert any(tip.startswith(f"Executor, weight of the anchor in RL 0.01: {100 * average:.1f}") for tip in tips)


@pytest.mark.parametrize("names", [["wmsd"], ["base", "demonstrator", "rl<only>"]], ids=str)
def test_a_part_of_the_variants_makes_a_page_too(names):
    result = make_result({name: RATES[name] for name in names})
    page = ablation.document(result | {"sweep": [], "curves": {name: [] for name in names}})
    assert 'id="sweep"' not in page and 'id="course"' not in page and 'id="rates"' in page
