"""The report of a synthetic run: all that the folder holds is on the page, and nothing else gets in."""

import base64
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from tests.report_runs import HOSTILE, Checker, make_evaluation, make_run, text_of
from world_distill.reports import clip_cards, page, report, run_data
from world_distill.storage import video_files


def cards_of(text):
    """Cards by their number, in the order of the page."""
    cards = text.split('<div class="card task"')[1:]
    return {int(re.search(r'data-number="(\d+)"', card)[1]): card for card in cards}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "my run"
    results = make_run(folder)
    return folder, results, report.build(folder).read_text()


# ---- What is on the page


def test_every_part_is_there(whole):
    _, _, text = whole
    checker = Checker(text)
    assert re.findall(r'<section id="(\w+)"', text) == ["result", "clips", "training", "breakdown", "settings"]
    for anchor in re.findall(r'href="#(\w+)"', text):
        assert f'id="{anchor}"' in text
    assert text.startswith("<!DOCTYPE html>") and 'name="viewport"' in text and checker.tags.count("h1") == 1
    assert "my run" in text_of(text)


def test_page_needs_nothing_from_outside(whole):
    _, _, text = whole
    for name, value in Checker(text).attributes:
        assert name not in ("src", "srcset", "onclick", "onerror", "onload"), name
        assert name != "href" or value.startswith("#")
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert set(re.findall(r"url\((.{11})", text)) == {"data:image/"}
    assert "default-src 'none'" in text


def test_drawings_are_well_formed(whole):
    _, _, text = whole
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) >= 5 + 5 + 2
    for drawing in drawings:
        assert ET.fromstring(drawing)[0].text


def test_figures_are_those_of_the_file(whole):
    folder, results, text = whole
    cells = re.findall(r"<tr>(.*?)</tr>", text.split('id="breakdown"')[0], re.S)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in cells if "<td>" in row]
    for row, found in zip(results["rows"], rows, strict=True):
        for measure, cell in zip(("task", "agent", "consistency", "average", "all"), found, strict=False):
            low, high = row["ci95"][measure]
            assert cell == f"{100 * row[measure]:.1f}\u00a0%<small>{100 * low:.1f} to {100 * high:.1f}</small>"
            assert f"{100 * row[measure]:.1f}\u00a0%, 95 % interval {100 * low:.1f}" in text, "on the bar too"
        assert found[-1] == str(row["n"])
    executor = next(row for row in results["rows"] if row["name"] == "executor")
    assert f"told only the task, completes {100 * executor['task']:.1f} %" in text_of(text)
    after = text_of(text).split("Break-down")[-1]
    for row in results["by_kind"] + results["by_agent"]:
        assert f"{100 * row['all']:.1f} %" in after


def test_clips_have_texts_verdicts_and_exact_pixels(whole):
    folder, results, text = whole
    cards = cards_of(text)
    assert sorted(cards) == [0, 1, 2, 3]
    names = ["Start image", "Demonstrator", "Base model", "Executor"]
    for i, card in cards.items():
        agent = ("red disc", "blue square")[i % 2]
        assert f'<span class="agent">{agent}</span> Go.' in card and f"The {agent} moves, then stops." in card
        assert re.findall(r"<figcaption><b>(.*?)</b>", card) == names
        marks = re.findall(r'<li class="(\w+)"', card)
        expected = [
            "yes" if score else "no"
            for role in ("demonstrator", "base", "executor")
            for score in results["verdicts"][role][i]["scores"].values()
        ]
        assert marks == expected
    uris = re.findall(r"url\(data:image/png;base64,(.*?)\)", cards[0])
    strip = np.array(Image.open(io.BytesIO(base64.b64decode(uris[1]))))  # after the start image
    clip = video_files.load_strip(folder / "clips/demonstrator/r0.png")
    np.testing.assert_array_equal(strip, np.concatenate(list(clip), axis=1))


def test_curves_have_their_last_values(whole):
    _, _, text = whole
    said = re.findall(r"<title>(.*?)</title>", text)
    assert "training, step 60: 100.0\u00a0%" in said and "validation, step 40: 50.0\u00a0%" in said
    assert "anchor, step 1: 1" in said and "Reward over training steps" in said
    assert "reward/odd over training steps" in said, "figures that the page does not know are shown as well"
    assert not any("validation/all" in s for s in said), "never finite: not drawn"
    assert "The judge had no answer for 2.0 % of the clips." in text_of(text)


def test_settings_and_command(whole):
    folder, _, text = whole
    assert "objective.rl = &#39;awm&#39;" in text and "seed = 3" in text and "empty = {}" in text
    assert str(folder.parent) not in text, "where it lay on this machine is nobody's business"
    assert "world-distill quickstart --seed 3" in report.html(report.read(folder), "world-distill quickstart --seed 3")


def test_building_again_gives_the_same_page(whole, tmp_path):
    folder, _, text = whole
    assert report.build(str(folder), str(tmp_path / "deep/page.html")).read_text() == text


def test_motion_is_optional(whole):
    _, _, text = whole
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "prefers-reduced-motion:reduce" in style and "prefers-color-scheme:dark" in style
    assert "steps(var(--n),jump-none)" in style and "image-rendering:pixelated" in style
    assert ".films:hover .film{animation-play-state:paused}" in style
    assert style.count("{") == style.count("}")


def test_page_of_many_noisy_clips_stays_small(tmp_path):
    make_run(tmp_path, kept=24, noise=True)
    assert report.build(tmp_path).stat().st_size < 3_000_000


def test_only_so_many_tasks_go_in(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_cards, "MAX_TASKS", 24)
    make_run(tmp_path, kept=30, clip=(2, 3, 3))
    text = report.build(tmp_path).read_text()
    assert text.count('class="card task"') == 24 and "the first 24 of 30" in text_of(text)


def test_failures_come_first(whole):
    _, results, text = whole
    failures = [sum(not s for s in v["scores"].values()) for v in results["verdicts"]["executor"][:4]]
    assert len(set(failures)) > 1
    assert list(cards_of(text)) == sorted(range(4), key=lambda i: (-failures[i], i))
    assert "Tasks at which the Executor fails come first." in text_of(text)


@pytest.mark.parametrize("noise", [False, True])
def test_page_of_200_cases_stays_below_15_mb(tmp_path, noise):
    make_evaluation(tmp_path, shape=(9, 56, 104), noise=noise)
    path = report.build(tmp_path, source="evaluation.json")
    text = path.read_text()
    assert 400_000 < path.stat().st_size < 15_000_000
    assert len(cards_of(text)) == 200 and text.count("data:image/webp") >= 800
    frames = max(int(n) for n in re.findall(r"--n:(\d+)", text.split('id="cards"')[1]))
    assert frames == (5 if noise else 9), "detail goes down only as far as it must"


def test_tasks_that_do_not_fit_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_cards, "BUDGET", 40_000)
    make_run(tmp_path, kept=24, clip=(4, 64, 120), noise=True)
    text = report.build(tmp_path).read_text()
    shown = text.count('class="card task"')
    assert 0 < shown < 24 and f"the first {shown} of 24" in text_of(text) and len(text) < 400_000


def test_evaluations_show_their_own_clips_and_older_ones_the_runs(tmp_path):
    make_run(tmp_path / "old", kept=1)
    make_evaluation(tmp_path / "new", shape=(2, 90, 120))
    shutil.copytree(tmp_path / "old/clips", tmp_path / "new/clips", dirs_exist_ok=True)
    assert len(report.read(tmp_path / "new", "evaluation.json").clips) == 200
    results = json.loads((tmp_path / "new/evaluation.json").read_text())
    del results["clips"]  # as earlier versions wrote it, or `--clips 0`
    (tmp_path / "new/evaluation.json").write_text(json.dumps(results))
    assert [clip.id for clip in report.read(tmp_path / "new", "evaluation.json").clips] == ["r0"]


def test_cards_say_what_they_can_be_chosen_by(whole):
    _, results, text = whole
    form = text.split('id="filter"')[1].split("</form>")[0]
    values = {
        name: re.findall(r'<option value="(.*?)"', part)
        for name, part in re.findall(r'<select name="(\w+)">(.*?)</select>', form, re.S)
    }
    assert values == {
        "model": ["", "demonstrator", "base", "executor"], "question": ["", "0", "1", "2"],
        "verdict": ["", "no", "yes", "none", "differ"], "kind": ["", "beside", "go"],
        "agent": ["", "blue square", "red disc"], "order": ["failures", "record"],
    }  # fmt: skip
    for i, card in cards_of(text).items():
        verdict = results["verdicts"]["base"][i]
        assert f'data-kind="{verdict["kind"]}" data-agent="{verdict["agent"]}"' in card
        assert re.findall(r'<figure data-model="(\w*)"', card) == ["", "demonstrator", "base", "executor"]
        assert 'type="range" min="0" max="8"' in card


def test_one_task_needs_no_filter(tmp_path):
    make_run(tmp_path, kept=1)
    assert 'id="filter"' not in report.build(tmp_path).read_text()


def test_large_clips_are_made_smaller(tmp_path):
    make_run(tmp_path, kept=1, clip=(40, 39, 260))
    text = report.build(tmp_path).read_text()
    assert "aspect-ratio:240/36" in text and "--n:16" in text and "data:image/webp" in text
    assert 'class="frame film"' in text, "not enlarged to squares"
    assert "--s:14.29" in text, "16 of 40 frames still take 10 seconds"


def test_clip_of_one_frame_does_not_move(tmp_path):
    make_run(tmp_path, kept=1, clip=(1, 6, 6))
    assert 'class="frame crisp film"' not in report.build(tmp_path).read_text()


def test_nothing_is_compared_with_what_is_missing(whole):
    _, _, text = whole
    assert run_data.changes(run_data.Contents("f"), "demonstrator", "executor") == []
    assert "From Demonstrator to Executor" in text_of(text) and "From Base model to Executor" in text_of(text)


def test_clips_shown_are_compared_with_all(whole):
    _, results, text = whole
    shown = results["verdicts"]["executor"][:4]
    passed = sum(all(v["scores"].values()) for v in shown)
    row = next(row for row in results["rows"] if row["name"] == "executor")
    assert (
        f"passes all three questions in {passed} of 4 tasks; over all 100 tasks it is {100 * row['all']:.1f} %"
        in text_of(text)
    )


def test_film_steps_through_all_frames():
    image = page.sprite(np.zeros((5, 20, 30, 3), np.uint8))
    assert (image.frames, image.shown_width, image.crisp) == (5, 150, True)
    film = page.TEMPLATES.get_template("pieces.html").module.film(page.Film(image, 'a "film"', 1.4))
    assert "--n:5;--s:2.00" in film and "aspect-ratio:30/20" in film and 'aria-label="a &#34;film&#34;"' in film


# ---- What must not get in


def test_hostile_data_stays_text(tmp_path):
    make_run(tmp_path, text=HOSTILE)
    results = json.loads((tmp_path / "results.json").read_text())
    results |= {"split": HOSTILE, "command": HOSTILE}
    results["rows"].append(results["rows"][0] | {"name": HOSTILE})
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = report.build(tmp_path).read_text()
    checker = Checker(text)
    assert "img" not in checker.tags and checker.tags.count("script") == 1 and checker.tags.count("style") == 1
    assert not any(name.startswith("on") for name, _ in checker.attributes)
    assert "onerror=alert(1)>" in text_of(text), "it is shown, as text"
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(drawing)


@pytest.mark.parametrize("record", ["../../secret", "a/b", "..", ".", "", "a\\b", ".hidden", "c:x", "a\0b"])
def test_record_cannot_name_a_file_elsewhere(tmp_path, record):
    with pytest.raises(ValueError, match="no file name"):
        run_data.clip_path(tmp_path, "base", record)
    make_run(tmp_path, kept=1)
    entries = json.loads((tmp_path / "clips/clips.json").read_text())
    (tmp_path / "clips/clips.json").write_text(json.dumps([*entries, entries[0] | {"id": record}]))
    contents = report.read(tmp_path)
    assert len(contents.clips) == 1 and "cannot be used" in contents.notes[0]
