"""The report in a real browser: it fits phones and desktops, moves or keeps still, opens quickly, and can be used."""

import io
import json

import pytest
from PIL import Image

from tests.report_runs import CASES, HOSTILE, make_evaluation, make_run
from world_distill.reports import report

SECONDS = 2.0  # in which a page of many clips opens
LAYOUT = """(() => {
  const width = () => document.documentElement.scrollWidth, films = [...document.querySelectorAll('.film')];
  const closed = width();
  for (const part of document.querySelectorAll('details')) part.open = true;
  for (const card of document.querySelectorAll('.task')) card.style.contentVisibility = 'visible';
  return {closed, open: width(), sizes: films.map(film => film.getBoundingClientRect().width)};
})()"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The page of an evaluation with a clip of each role for 200 tasks."""
    folder = tmp_path_factory.mktemp("many")
    make_evaluation(folder, shape=(6, 54, 104))
    return report.build(folder)


@pytest.mark.parametrize("still", [False, True], ids=["moving", "reduced motion"])
def test_page_fits_phones_and_desktops(browser, tmp_path, still):
    make_run(tmp_path, text=" " + "unbreakable" * 12)
    path = report.build(tmp_path)
    for width in (320, 360, 390, 768, 1280):
        browser.show(path, width, still=still)
        button, moving = browser.js("[document.getElementById('motion').textContent, document.getAnimations().length]")
        assert button == ("Play the clips" if still else "Stop the clips")
        found = browser.js(LAYOUT)
        assert max(found["closed"], found["open"]) <= width, found
        # Films outside of the view do not run.
        assert len(found["sizes"]) >= 12 and (0 if still else 1) <= moving <= (0 if still else 12)
        if width >= 360:
            assert set(found["sizes"]) <= {150, 300}, "every pixel of a clip is a whole square"
        assert browser.complaints == []


def test_page_is_drawn(browser, tmp_path):
    make_run(tmp_path)
    path = report.build(tmp_path)
    colours = {}
    for dark in (False, True):
        browser.show(path, dark=dark)
        image = Image.open(io.BytesIO(browser.shot())).convert("RGB")
        assert image.size == (1280, 900) and len(image.getcolors(1 << 24)) > 50
        colours[dark] = image.getpixel((2, 2))
    assert min(colours[False]) > 220 and max(colours[True]) < 50


def test_page_of_many_clips_opens_quickly_and_runs_those_in_view(browser, many):
    for width in (1280, 390):
        browser.show(many, width)
        times = browser.js("performance.getEntriesByType('navigation')[0].toJSON()")
        assert 0 < times["loadEventEnd"] < 1000 * SECONDS, times
        assert browser.js("document.getAnimations().length") <= 4
        browser.js("document.getElementById('cards').scrollIntoView()")
        assert 3 <= browser.js("new Promise(done => setTimeout(() => done(document.getAnimations().length), 200))") < 40


@pytest.mark.parametrize("width", [1280, 390])
def test_links_lead_to_their_part_past_many_clips(browser, many, width):
    browser.show(many, width)
    for anchor in ("breakdown", "clips", "training"):
        place = f"""document.querySelector('nav a[href="#{anchor}"]').click();
          new Promise(done => setTimeout(done, 300))
            .then(() => document.getElementById('{anchor}').getBoundingClientRect().top)"""
        assert abs(browser.js(place)) < 3, anchor
    cards = "[...document.querySelectorAll('.task')].filter(card => card.checkVisibility()).length"
    assert browser.js(cards) == 24 < CASES


def test_models_are_side_by_side_on_a_phone(browser, tmp_path):
    make_run(tmp_path, kept=1, clip=(3, 135, 240))  # wider than half a phone
    browser.show(report.build(tmp_path), 390, touch=True)
    figures = browser.js("[...document.querySelectorAll('.films figure')].map(f => f.getBoundingClientRect().toJSON())")
    assert [figure["left"] for figure in figures] == [figures[0]["left"], figures[1]["left"]] * 2
    assert figures[0]["top"] == figures[1]["top"] and figures[0]["right"] < figures[1]["left"]


def test_figures_of_bars_do_not_touch_them(browser, tmp_path):
    make_run(tmp_path, kept=0)
    results = json.loads((tmp_path / "results.json").read_text())
    for row in results["rows"]:
        row.update(task=1.0, ci95=row["ci95"] | {"task": [0.9, 1.0]})
    (tmp_path / "results.json").write_text(json.dumps(results))
    browser.show(report.build(tmp_path))
    gaps = browser.js(
        """[...document.querySelectorAll('#result svg')].flatMap(svg => [...svg.querySelectorAll('g')].map(bar => {
          const shapes = [...bar.querySelectorAll('path')].map(path => path.getBoundingClientRect().right);
          return bar.querySelector('text').getBoundingClientRect().left - Math.max(...shapes)}))"""
    )
    assert len(gaps) == 15 and min(gaps) > 3


def test_everything_that_takes_the_focus_has_a_name(browser, tmp_path):
    make_run(tmp_path)
    browser.show(report.build(tmp_path))
    browser.js(LAYOUT)  # opens everything
    browser("Accessibility.enable")
    nodes = browser("Accessibility.getFullAXTree")["nodes"]
    kinds, said = {}, []
    for node in nodes:
        properties = {p["name"]: p["value"].get("value") for p in node.get("properties", ())}
        said.append(properties.get("valuetext"))
        if properties.get("focusable") and node["role"]["value"] != "RootWebArea":
            kinds.setdefault(node["role"]["value"], []).append(node["name"]["value"])
    assert {"slider", "combobox", "searchbox", "button", "link", "group"} <= set(kinds)
    assert all(name.strip() for names in kinds.values() for name in names), kinds
    assert "red disc Go." in kinds["group"] and "Settings" in kinds["group"]
    assert len(kinds["slider"]) == said.count("frame 1 of 9") == 4


def test_hostile_text_runs_nothing(browser, tmp_path):
    make_run(tmp_path, text=HOSTILE)
    browser.show(report.build(tmp_path))
    assert browser.complaints == [] and browser.js("document.images.length") == 0
    assert browser.js("document.querySelector('.task h3').textContent.includes('<img src=x onerror=alert(1)>')")


def test_a_long_task_does_not_push_the_result_away(browser, tmp_path):
    make_run(tmp_path, text=" And then it walks on." * 200)
    browser.show(report.build(tmp_path), 390)
    assert 0 < browser.js("document.querySelector('.hero figcaption').getBoundingClientRect().height") < 220
