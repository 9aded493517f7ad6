"""The page of the paper's table: rows, differences, commands, and clips of the same case side by side."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.report_runs import HOSTILE, Checker, make_table, pixel_of, text_of
from world_distill import cli
from world_distill.errors import UserError
from world_distill.evaluation.worldtasks import PAPER
from world_distill.reports import paper_table

ROWS = {"base": "Base model", "demonstrator": "Demonstrator", "sft": "SFT", "wmsd": "WMSD"}
SIGNS = {1: "▲", -1: "▼", 0: "≈"}


def change(folder, **fields):
    """Changes fields of the table's file."""
    path = folder / paper_table.RESULTS
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def section(text, anchor):
    return text.split(f'<section id="{anchor}"')[1].split("</section>")[0]


def cells(text):
    """The cells of each row of the tables in a text, by what stands first in it."""
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', text)
    return [(re.sub("<.*?>", "", name), re.findall(r"<td>(.*?)</td>", line)) for name, line in rows]


def cards(text):
    """By record: of each figure its model, caption, the pixel of its clip and its marks."""
    found = {}
    for card in text.split('<div class="card task"')[1:]:
        record = re.search(r"record: (.*?)</p>", card)[1]
        for model, figure in re.findall(r'<figure data-model="(\w*)">(.*?)</figure>', card, re.S):
            image = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,(.*?)\)", figure)[1])))
            marks = re.findall(r'<li class="(\w+)"', figure)
            caption = re.search(r"<b>(.*?)</b>", figure)[1]
            found.setdefault(record, {})[model] = caption, int(np.asarray(image)[0, 0, 0]), marks
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    result = make_table(folder)
    return folder, result, paper_table.build(folder).read_text()


def test_rows_have_intervals_cases_seeds_and_steps(whole):
    _, result, text = whole
    Checker(text)
    found = cells(section(text, "rows"))
    assert [name for name, _ in found[:4]] == list(ROWS.values())
    for row, (_, line) in zip(result["rows"], found, strict=False):
        assert line[:2] == [str(row["steps"] or "–"), "0, 1"] and line[-1] == str(row["n"]) == "9"
        low, high = row["ci95"]["task"]
        assert line[2] == f"{100 * row['task']:.1f}\u00a0%<small>{100 * low:.1f} to {100 * high:.1f}</small>"
    seeds = found[4:]
    assert [(name, line[0]) for name, line in seeds] == [(name, s) for name in ROWS.values() for s in "01"]
    assert seeds[1][1][1].startswith(f"{100 * result['by_seed'][1]['task']:.1f}")


def test_differences_say_whether_their_interval_holds_zero(whole):
    _, result, text = whole
    over_cases, over_seeds = section(text, "differences").split("another training run")
    pairs = list(dict.fromkeys((e["before"], e["after"]) for e in result["paired"]))
    for part, mean, bounds in ((over_cases, "difference", "ci95"), (over_seeds, "mean_of_seeds", "ci95_seeds")):
        found = cells(part)
        assert [name for name, _ in found] == [ROWS[after] for _, after in pairs]
        for (before, after), (_, line) in zip(pairs, found, strict=True):
            [entry] = [
                e for e in result["paired"] if (e["before"], e["after"], e["measure"]) == (before, after, "task")
            ]
            low, high = (100 * min(max(x, -1), 1) for x in entry[bounds])
            if low == high:
                continue
            sign = SIGNS[int(low > 0) - int(high < 0)]
            figure = re.match(r"(.) ([+\u2212]?)([\d.]+)", line[0])
            assert figure[1] == sign and float(figure[3]) == pytest.approx(abs(100 * entry[mean]), abs=0.051)
            ends = [
                float(x.replace("\u2212", "-")) for x in re.search("<small>(.*?)</small>", line[0])[1].split(" to ")
            ]
            assert ends == pytest.approx([low, high], abs=0.051)
    assert len({line[0][0] for _, line in cells(over_cases)}) > 1


def test_seeds_that_agree_are_no_proof(tmp_path):
    result = make_table(tmp_path)
    alike = {"mean_of_seeds": 0.25, "ci95_seeds": [0.25, 0.25]}
    change(tmp_path, paired=[entry | alike for entry in result["paired"]])
    over_seeds = section(paper_table.build(tmp_path).read_text(), "differences").split("another training run")[1]
    assert {cell for _, line in cells(over_seeds) for cell in line[:-1]} == {"+25.0<small>alike in all seeds</small>"}


def test_clips_of_a_case_are_of_one_seed_and_have_their_verdicts(whole):
    folder, _, text = whole
    found = cards(text)
    assert sorted(found) == [*(f"both-{i}" for i in range(3)), *(f"s{s}-{i}" for s in (0, 1) for i in range(3))]
    for record, figures in found.items():
        seed = 1 if record.startswith("s1") else 0  # the first that has it
        assert list(figures) == ["", *ROWS]
        for row in ROWS:
            caption, pixel, marks = figures[row]
            assert (caption, pixel) == (ROWS[row], pixel_of(row, seed))
            scores = json.loads((folder / f"runs/{row}/{seed}/evaluation.json").read_text())["verdicts"]
            [verdict] = [v for of_role in scores.values() for v in of_role if v["id"] == record]
            assert marks == ["yes" if score else "no" for score in verdict["scores"].values()]
    assert 'data-lead="wmsd"' in text and "Tasks at which WMSD fails come first." in text_of(text)


def test_every_row_has_its_commands(whole):
    _, result, text = whole
    part = text_of(section(text, "commands").join(["<p>", "</p>"]))
    for line in result["commands"]:
        for call in line["calls"]:
            assert " ".join(call.split()) in part


def test_the_papers_figures_are_marked(tmp_path):
    make_table(tmp_path)
    groups = {"kind": {"navigation": [0.31, 0.76]}}
    about = {"name": "WorldTasks-Bench by a judge", "paper": list(PAPER), "paper_groups": groups}
    change(tmp_path, benchmark=about)
    text = paper_table.build(tmp_path).read_text()
    table = section(text, "rows")
    assert table.index("Measured here") < table.index("The paper&#39;s figures") < table.index("LTX-2 (paper)")
    found = dict(cells(table.split("Each seed")[0]))
    assert [line[0] for name, line in found.items() if "paper" in name] == ["–"] * len(PAPER)
    assert found["LTX-2 8-step + WMSD (paper)"][2:4] == ["60.5\u00a0%", "69.1\u00a0%"]
    assert "no measurement of this project" in text_of(text) and "WorldTasks-Bench by a judge" in text_of(text)
    assert dict(cells(section(text, "kinds")))["navigation"] == ["31.0\u00a0%", "76.0\u00a0%"]


def test_what_is_missing_is_named_and_leaves_the_rest(tmp_path):
    make_table(tmp_path)
    change(tmp_path, failed=[{"row": "on_policy", "seed": 1, "why": "no memory"}])
    (tmp_path / "runs/sft/0/evaluation.json").write_text("{")
    (tmp_path / "runs/wmsd/0/evaluation_clips/executor/both-1.png").write_bytes(b"half")
    text = paper_table.build(tmp_path).read_text()
    missing = text_of(section(text, "missing").join(["<p>", "</p>"]))
    assert "On-policy with seed 1 failed: no memory" in missing and "Clips of SFT with seed 0 are left out" in missing
    found = cards(text)
    # Of a task that all rows have with the second seed, that seed's clips are shown.
    assert {record: figures["base"][1] for record, figures in found.items() if record.startswith("both")} == {
        f"both-{i}": pixel_of("base", 1) for i in range(3)
    }
    assert list(found["s0-0"]) == ["", "base", "demonstrator", "wmsd"]


def test_of_many_tasks_some_are_shown_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_table, "CLIPS", 4 * 3)
    make_table(tmp_path, count=12)
    text = paper_table.build(tmp_path).read_text()
    assert list(cards(text)) and len(cards(text)) == 3 and "3 of the 18 tasks whose clips were kept" in text_of(text)
    assert {"s0-0", "s1-5"} <= set(cards(text)), "from the first to the last"


def test_tables_without_clips_and_damaged_ones(tmp_path):
    make_table(tmp_path, seeds=(0,))
    for path in tmp_path.glob("runs/*/*/evaluation_clips/clips.json"):
        path.unlink()
    text = paper_table.build(tmp_path).read_text()
    assert 'id="clips"' not in text and "No clips were kept" in text_of(text) and "training run would" not in text
    with pytest.raises(UserError, match=r"holds no reproduce\.json"):
        paper_table.build(tmp_path / "runs")
    change(tmp_path, rows=[{"name": "base", "task": 3}])
    with pytest.raises(UserError, match="task is 3, not a rate"):
        paper_table.build(tmp_path)
    change(tmp_path, rows=3)
    with pytest.raises(UserError, match=r"reproduce\.json is no table"):
        paper_table.build(tmp_path)


def test_the_verb_report_makes_the_page_of_a_table(tmp_path, capsys):
    make_table(tmp_path, seeds=(0,))
    out, figures = tmp_path / "page.html", tmp_path / "figures.json"
    assert cli.main(["report", "--workdir", str(tmp_path), "--out", str(out), "--json", str(figures)]) == 0
    assert str(out) in capsys.readouterr().out and "The paper's table" in out.read_text()
    assert len(json.loads(figures.read_text())["rows"]) == 4
    assert cli.main(["report", "--workdir", str(tmp_path), "--gifs", str(tmp_path / "gifs")]) == 2
    assert "take the folder of one run" in capsys.readouterr().err


def test_page_fits_a_phone_and_its_clips_can_be_chosen(browser, tmp_path):
    make_table(tmp_path)
    change(tmp_path, benchmark={"paper": [*PAPER, dict(PAPER[0]) | {"name": "A model " + HOSTILE * 3}]})
    path = paper_table.build(tmp_path)
    for width in (390, 1280):
        browser.show(path, width)
        browser.js("for (const part of document.querySelectorAll('details')) part.open = true")
        assert browser.js("document.documentElement.scrollWidth") <= width and browser.complaints == []
        # A long name leaves room for the figures beside it.
        name = browser.js(
            "Math.max(...[...document.querySelectorAll('tbody th:not(.group)')].map(th => th.offsetWidth))"
        )
        assert name < width * 0.6
    browser.js("document.querySelector('[name=model]').value = 'sft'")
    browser.js("document.getElementById('filter').dispatchEvent(new Event('input'))")
    shown = "[...document.querySelectorAll('.task figure')].filter(f => f.checkVisibility()).map(f => f.dataset.model)"
    assert browser.js(shown) == ["", "sft"] * 9
