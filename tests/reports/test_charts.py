"""Charts are well-formed SVG that says what the data says."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from world_distill.reports import charts
from world_distill.reports.charts import Bar, Series

HOSTILE = "</svg><script>alert('x')</script>&\"\x00\x0b\ud800\ufffe"
NS = "{http://www.w3.org/2000/svg}"


def parsed(svg):
    svg.encode("utf-8")
    root = ET.fromstring(svg)
    assert root.tag == f"{NS}svg" and root.get("role") == "img" and root.get("viewBox") and not root.get("width")
    assert root[0].tag == f"{NS}title" and root[0].text, "named for screen readers"
    return root


def texts(root):
    return [e.text for e in root.iter(f"{NS}text")]


def coordinates(path):
    return np.array(re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path), float)


# ---- Numbers and ticks


@pytest.mark.parametrize(
    "low, high, most",
    [(0, 1, 4), (0.02, 0.031, 5), (-8.3, 1.2, 4), (1, 160, 4), (0, 3e-5, 5), (1e6, 4e6, 3), (-1e-9, 1e-9, 5)],
)
def test_ticks_are_round_and_cover_the_range(low, high, most):
    found = charts.ticks(low, high, most)
    steps = np.diff(found)
    assert found[0] <= low + 1e-9 * steps[0] and found[-1] >= high - 1e-9 * steps[0]
    np.testing.assert_allclose(steps, steps[0])
    assert 2 <= len(found) <= most + 3
    mantissa = steps[0] / 10.0 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-12])
def test_ticks_of_a_single_value_stand_around_it(value):
    found = charts.ticks(value, value)
    assert found[0] < value < found[-1]


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (1.0, "1"), (0.005, "0.005"), (-0.25, "\u22120.25"), (1234.5678, "1,235"), (160, "160"),
     (1.5e-5, "1.5e\u22125"), (2.4e7, "2.4e7"), (0.01234567, "0.01235"), (999999, "999,999")],
)  # fmt: skip
def test_number(value, text):
    assert charts.number(value) == text


def test_percent_keeps_its_sign_on_the_line():
    assert charts.percent(0.63914) == "63.9\u00a0%" and charts.percent(1) == "100.0\u00a0%"


def test_escape_makes_anything_harmless():
    text = charts.escape(HOSTILE)
    assert not set(text) & set("<>\"'\x00\x0b\ud800\ufffe") and "&amp;" in text
    assert charts.escape(3.5) == "3.5"


# ---- Series


def test_thin_keeps_means_and_gaps():
    points = [(float(i), float(i)) for i in range(10)]
    assert charts.thin(points, 100) == points
    assert charts.thin(points, 5) == [(i + 0.5, i + 0.5) for i in range(0, 10, 2)]
    assert charts.thin([(0, None), (1, None), (2, 4.0), (3, None)], 2) == [(0.5, None), (2.5, 4.0)]
    assert len(charts.thin([(i, 1.0) for i in range(100_001)], 200)) <= 200


def test_smooth_leaves_straight_lines_alone_and_takes_noise_off():
    line = [(float(x), 3 - 2.0 * x) for x in range(20)]
    np.testing.assert_allclose([y for _, y in charts.smooth(line, 4)], [y for _, y in line], atol=1e-9)
    rng = np.random.default_rng(0)
    noisy = [(x, np.sin(x / 30) + rng.normal(0, 0.3)) for x in range(200)]
    error = [y - np.sin(x / 30) for x, y in charts.smooth(noisy, 10)]
    assert np.std(error) < 0.15
    gap = [(0.0, 1.0), (1.0, None), (2.0, 1.0)]
    assert [y is None for _, y in charts.smooth(gap, 1)] == [False, True, False]
    assert charts.smooth([(5.0, 2.0)], 3) == [(5.0, 2.0)]


def test_only_what_goes_up_and_down_is_noisy():
    rng = np.random.default_rng(0)
    assert charts.is_noisy([(i, v) for i, v in enumerate(rng.normal(size=50))])
    assert not charts.is_noisy([(i, v) for i, v in enumerate(rng.normal(size=10))])
    assert not charts.is_noisy([(i, 1.0 if i < 40 else 0.1) for i in range(80)])
    assert not charts.is_noisy([(i, np.exp(-i / 9)) for i in range(80)])


# ---- Charts


def test_bars_have_lengths_and_whiskers_as_the_figures():
    root = parsed(charts.bars([Bar("a", 0.5, 0.25, 0.75, "red"), Bar("b", 1.0), Bar("c", 0.0, 0.0, 0.1)], title="T"))
    assert root[0].text == "T"
    groups = root.findall(f"{NS}g")
    tips = [g.find(f"{NS}title").text for g in groups]
    assert tips[0] == "a: 50.0\u00a0%, 95 % interval 25.0\u00a0% to 75.0\u00a0%" and tips[1] == "b: 100.0\u00a0%"

    def end(group):
        return sum(
            float(x) for x in re.match(r"M96 [\d.]+h([\d.]+)q([\d.]+)", group.find(f"{NS}path").get("d")).groups()
        )

    full = end(groups[1])
    assert end(groups[0]) == pytest.approx(full / 2, abs=0.2) and end(groups[2]) == 0
    assert "fill:red" in groups[0].find(f"{NS}path").get("style")
    whisker = groups[0].findall(f"{NS}path")[1].get("d")
    low, high = re.match(r"M([\d.]+) .*M[\d.]+ [\d.]+H([\d.]+)", whisker).groups()
    assert float(low) == pytest.approx(96 + full / 4, abs=0.2) and float(high) == pytest.approx(
        96 + 0.75 * full, abs=0.2
    )
    assert len(groups[1].findall(f"{NS}path")) == 1, "no interval, no whisker"
    assert {"a", "b", "c", "50.0\u00a0%", "0\u00a0%", "100\u00a0%"} <= set(texts(root))


def test_bar_without_a_value_says_so():
    root = parsed(charts.bars([Bar("a", None, None, None)], title="T"))
    assert "no answer" in texts(root) and not root.findall(f"{NS}g")


def test_lines_put_points_where_they_belong():
    root = parsed(charts.lines([Series("s", [(0, 0.0), (50, 0.5), (100, 1.0)])], title="T", limits=(0, 1)))
    (x0, y0), (x1, y1), (x2, y2) = coordinates(root.find(f"{NS}path").get("d"))
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x0 < x2 and y0 > y2, "up is more"
    tips = [c.find(f"{NS}title").text for c in root.iter(f"{NS}circle")]
    assert tips == ["s, step 0: 0", "s, step 50: 0.5", "s, step 100: 1"]
    assert {"0", "50", "100", "step", "0.5"} <= set(texts(root))


def test_lines_break_at_gaps_and_leave_out_what_is_not_finite():
    points = [(0, 1.0), (1, None), (2, float("nan")), (3, 2.0), (4, float("inf")), (5, 3.0)]
    root = parsed(charts.lines([Series("s", points)], title="T"))
    assert root.find(f"{NS}path").get("d").count("M") == 3
    assert len(list(root.iter(f"{NS}circle"))) == 3


def test_noisy_series_has_a_faint_and_a_strong_line():
    rng = np.random.default_rng(0)
    points = [(i, float(v)) for i, v in enumerate(rng.normal(size=1000))]
    paths = parsed(charts.lines([Series("s", points)], title="T")).findall(f"{NS}path")
    faint, strong = (coordinates(p.get("d"))[:, 1] for p in paths)
    assert paths[0].get("stroke-opacity") == ".35" and strong.std() < faint.std() / 2
    assert len(faint) <= 200


def test_dashed_levels_and_single_points():
    level = Series("level", [(0, 0.5), (9, 0.5)], dashed=True)
    root = parsed(charts.lines([Series("s", [(4, 0.2)], "blue"), level], title="T", across=(0, 9)))
    assert [p.get("stroke-dasharray") for p in root.findall(f"{NS}path")] == [None, "5 4"]
    assert any("fill:blue" in (c.get("style") or "") for c in root.iter(f"{NS}circle")), "a lone point is seen"


def test_values_beyond_the_limits_stay_inside():
    root = parsed(charts.lines([Series("s", [(0, -5.0), (1, 5.0)])], title="T", limits=(0, 1)))
    box = [float(x) for x in root.get("viewBox").split()]
    ys = coordinates(root.find(f"{NS}path").get("d"))[:, 1]
    assert (ys >= 0).all() and (ys <= box[3]).all()


def test_one_step_is_drawn():
    parsed(charts.lines([Series("s", [(1, 0.0)])], title="T"))


def test_nothing_to_draw_is_an_error():
    for points in ([], [(0, None)], [(0, float("nan"))]):
        with pytest.raises(ValueError, match="has no points"):
            charts.lines([Series("s", points)], title="T")


def test_hostile_text_stays_text():
    for svg in (
        charts.bars([Bar(HOSTILE, 0.5, 0.4, 0.6, HOSTILE)], title=HOSTILE),
        charts.lines([Series(HOSTILE, [(0, 1.0), (1, 2.0)], HOSTILE, dots=True)], title=HOSTILE, x_label=HOSTILE),
    ):
        root = parsed(svg)
        assert not list(root.iter(f"{NS}script"))
        assert "<script>alert('x')</script>" in root[0].text


def test_what_no_page_can_hold_is_left_out_and_nothing_else():
    assert charts.clean("a\x00b\x07c\ud800d\ufffee") == "abcde"
    kept = "tab\tline\n\u00e4 \u6f22 \U0001f600 \U00020000 \ufffd"
    assert charts.clean(kept) == kept
