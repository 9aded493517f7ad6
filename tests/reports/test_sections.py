"""Reports of runs that lack parts or are damaged; what changed, in words; the verb."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.report_runs import RATES, make_run, text_of
from world_distill import cli
from world_distill.core.measures import QUESTIONS, Measures
from world_distill.errors import UserError
from world_distill.evaluation.scoring import Verdict, summarise
from world_distill.reports import report, run_data, sections
from world_distill.reports.run_data import Change

# ---- What is missing or damaged


@pytest.mark.parametrize(
    "missing, section, sentence",
    [
        ("results.json", "result", "no results yet; world-distill evaluate --workdir"),
        ("metrics.jsonl", "training", "no log of a training"),
        ("clips", "clips", "No clips were kept"),
        ("config.json", None, "The folder has no config.json"),
    ],
)
def test_missing_part_is_left_out_with_a_sentence(tmp_path, missing, section, sentence):
    make_run(tmp_path, kept=1)
    path = tmp_path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = report.build(tmp_path).read_text()
    assert f'<section id="{section}"' not in text and f'href="#{section}"' not in text
    assert sentence in text_of(text)


def test_nothing_to_report_on_says_what_to_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="nothing to report on.*world-distill quickstart"):
        report.build(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        report.build(tmp_path / "nowhere")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_rows_alone_are_enough(tmp_path):
    rows = [{"name": "executor", "task": 0.5, "agent": None, "consistency": 1, "average": 0.75, "all": 0.5}]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    text = text_of(report.build(tmp_path).read_text())
    assert "told only the task, completes 50.0 %" in text and "no answer" in text


def test_newer_figures_win(tmp_path):
    results = make_run(tmp_path, kept=0)
    newer = {"rows": results["rows"][:1], "step": 61}
    (tmp_path / "evaluation.json").write_text(json.dumps(newer))
    assert report.read(tmp_path).source == "evaluation.json"
    (tmp_path / "evaluation.json").write_text(json.dumps(newer | {"step": 60}))
    assert report.read(tmp_path).source == "results.json"
    (tmp_path / "results.json").unlink()
    assert report.read(tmp_path).source == "evaluation.json"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("results.json", '{"rows": [', "results.json: damaged, not JSON"),
        ("results.json", "[]", "no list `rows`"),
        ("results.json", '{"rows": [1]}', "a row without a name"),
        ("results.json", '{"rows": [{"name": "base", "task": "high"}]}', "task is 'high', not a rate"),
        ("results.json", '{"rows": [{"name": "base", "task": 63.9}]}', "task is 63.9, not a rate"),
        ("results.json", '{"rows": [{"name": "base", "ci95": {"task": [1]}}]}', "not \\[low, high\\]"),
        ("results.json", '{"rows": [], "verdicts": {"base": [{}]}}', "`verdicts` are damaged"),
        ("metrics.jsonl", '{"loss": 1}\n', "a line without a step"),
        ("clips/clips.json", "{}", "not a list of tasks"),
        ("clips/clips.json", "\xff", "damaged"),
        ("config.json", "{", "config.json: damaged"),
    ],
)
def test_damaged_figures_stop_the_report(tmp_path, name, content, message):
    make_run(tmp_path, kept=1, clip=(2, 3, 3))
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        report.build(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_half_written_log_line_is_dropped(tmp_path):
    make_run(tmp_path, kept=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "rate/ta')
    assert report.read(tmp_path).log["rate/task"][-1] == (60, 1.0)


def test_what_the_rewards_agree_on_stands_in_a_table(tmp_path):
    make_run(tmp_path)
    assert "What the rewards agree on" not in report.html(run_data.read(tmp_path))
    lines = [
        {"step": 1, "within_group/task~motion": 0.5, "within_group/task~distill": -0.25},
        {"step": 2, "within_group/task~motion": 0.25, "within_group/task~distill": None},  # no advantages in this step
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    contents = run_data.read(tmp_path)
    assert run_data.within_group(contents) == {("task", "motion"): 0.375, ("task", "distill"): -0.25}
    page = report.html(contents)
    rows = dict(re.findall(r'<tr><th scope="row">(task|motion|distill)</th>(.*?)</tr>', page))
    assert rows["task"] == "<td></td><td>+0.38</td><td>-0.25</td>"  # beside itself, motion and distill
    assert rows["distill"] == "<td>-0.25</td><td></td><td></td>"


def test_damaged_clip_leaves_a_gap_and_a_note(tmp_path):
    make_run(tmp_path, kept=2)
    (tmp_path / "clips/executor/r0.png").write_bytes(b"half")
    (tmp_path / "clips/base/r1.png").unlink()
    contents = report.read(tmp_path)
    text = report.html(contents)
    cards = sorted(text.split('<div class="card task"')[1:], key=lambda card: card.split("data-number")[1])
    assert [re.findall(r"<figcaption><b>(.*?)</b>", card) for card in cards] == [
        ["Start image", "Demonstrator", "Base model"], ["Start image", "Demonstrator", "Executor"],
    ]  # fmt: skip
    assert "The clip of the Executor for r0 is left out: damaged" in text_of(text)
    assert report.html(contents) == text, "making the page changes nothing"


def test_unjudged_clip_is_neither_right_nor_wrong(tmp_path):
    results = make_run(tmp_path, kept=1)
    results["verdicts"]["executor"][0]["scores"]["agent"] = None
    (tmp_path / "results.json").write_text(json.dumps(results))
    card = report.build(tmp_path).read_text().split('<div class="card task"')[1]
    assert re.findall(r'<li class="(\w+)"', card)[-2] == "none" and "not judged" in card


def test_breakdown_by_agent_whose_name_took_the_rates_place(tmp_path):
    results = make_run(tmp_path, kept=0)
    results["by_agent"] = [row | {"agent": row.pop("group")} for row in results["by_agent"]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    rows = report.read(tmp_path).by_agent
    assert {row.group for row in rows} == {"red disc", "blue square"} and rows[0].rates["agent"] is None
    assert "red disc" in report.build(tmp_path).read_text()


# ---- What changed, in words


def contents(before, after, verdicts=None):
    def row(name, values):
        rates, intervals = {}, {}
        for measure, (rate, half) in zip(Measures().names, values, strict=True):
            rates[measure] = rate
            if half is not None:
                intervals[measure] = (rate - half, rate + half)
        return run_data.Row(name, rates, intervals, 100, 0)

    rows = [row("demonstrator", before), row("executor", after)]
    return run_data.Contents("folder", rows=rows, verdicts=verdicts or {})


def test_words_say_what_the_intervals_allow():
    before = [(0.5, 0.05), (0.5, 0.05), (0.5, 0.05), (0.5, None), (0.5, 0.1)]
    after = [(0.7, 0.05), (0.3, 0.05), (0.55, 0.05), (0.9, 0.05), (0.5, 0.1)]
    found = run_data.changes(contents(before, after), "demonstrator", "executor")
    assert [c.verdict for c in found] == ["up", "down", "overlap", "unknown", "overlap"]
    said = [sections.sentence(c).replace("\u00a0", " ") for c in found]
    assert said[0] == "50.0 % → 70.0 %, better by 20.0 points; the intervals are apart."
    assert said[1] == "50.0 % → 30.0 %, worse by 20.0 points; the intervals are apart."
    assert said[2] == "50.0 % → 55.0 %, 5.0 points higher, but the intervals overlap: no clear difference."
    assert said[3] == "50.0 % → 90.0 %, 40.0 points higher; without intervals, this may be chance."
    assert said[4] == "50.0 % → 50.0 %, the same, and the intervals overlap: no clear difference."
    assert sections.summary("demonstrator", "executor", found) == (
        "The Executor is above the Demonstrator on task completion, is below it on the intended agent, does not differ"
        " clearly on consistency and all three at once, and cannot be compared, for want of intervals, on the average."
    )
    worse = [c for c in found if c.verdict == "down"]
    assert sections.summary("base", "executor", worse) == "The Executor is below the Base model on the intended agent."


def test_pairs_are_compared_task_by_task():
    rng = np.random.default_rng(0)
    luck = rng.random(200)  # tasks differ in difficulty, alike for both

    def side(rate):
        return {f"r{i}": {q: float(x < rate) for q in QUESTIONS} for i, x in enumerate(luck)}

    verdicts = {"demonstrator": side(0.5), "executor": side(0.56) | {"other": {"task": 1.0}}}
    gap = float((luck < 0.56).mean() - (luck < 0.5).mean())
    wide = [(0.5, 0.07)] * 5
    found = run_data.changes(contents(wide, [(0.5 + gap, 0.07)] * 5, verdicts), "demonstrator", "executor")
    for change in found:
        mean, low, high = change.paired
        assert change.verdict == "up" and mean == pytest.approx(gap) and 0 < low < mean < high
        assert f"better by {100 * gap:.1f} points; paired by task" in sections.sentence(change)
        assert sections.sentence(change).endswith("points, above 0.")
    back = run_data.changes(contents(wide, wide, {
        "demonstrator": verdicts["executor"], "executor": verdicts["demonstrator"],
    }), "demonstrator", "executor")  # fmt: skip
    assert {c.verdict for c in back} == {"down"} and sections.sentence(back[0]).endswith("points, below 0.")
    no_more = Change("task", 0.5, 0.51, "overlap", (0.01, -0.02, 0.04))
    assert sections.sentence(no_more).endswith(
        "1.0 points higher, no clear difference; paired by task, the difference is \u22122.0 to +4.0 points."
    )


def test_intervals_that_are_apart_do_not_outvote_the_pairs():
    apart = [(0.5, 0.01)] * 5, [(0.6, 0.01)] * 5
    sides = [{"r0": (0, 1), "r1": (1, 0), "r2": (0, 1), "r3": (1, 0)} for _ in range(2)]
    verdicts = {
        role: {record: dict.fromkeys(QUESTIONS, float(pair[i])) for record, pair in side.items()}
        for i, (role, side) in enumerate(zip(("demonstrator", "executor"), sides, strict=True))
    }
    assert {c.verdict for c in run_data.changes(contents(*apart), "demonstrator", "executor")} == {"up"}
    assert {c.verdict for c in run_data.changes(contents(*apart, verdicts), "demonstrator", "executor")} == {"overlap"}


def test_differences_of_the_results_count_before_those_of_the_first_noise(tmp_path):
    results = make_run(tmp_path, kept=0)
    entry = {"before": "demonstrator", "after": "executor", "measure": "task", "difference": -0.5}
    results["paired"] = [entry | {"ci95": [-0.6, -0.4], "n": 100}]
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = run_data.changes(report.read(tmp_path), "demonstrator", "executor")
    assert found[0].paired == (-0.5, -0.6, -0.4) and found[0].verdict == "down"
    assert found[1].paired not in (None, found[0].paired)
    results["paired"] = [entry]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="`paired` is damaged"):
        report.read(tmp_path)


def test_intervals_of_few_cases_lie_in_bounds_and_are_never_empty(tmp_path):
    for count in (1, 2, 3):
        make_run(tmp_path / str(count), count=count, kept=0)
        found = report.read(tmp_path / str(count))
        for row in (*found.rows, *found.by_kind):
            for low, high in row.intervals.values():
                assert 0 <= low < high <= 1
        for change in run_data.changes(found, "base", "executor"):
            assert (change.paired is None) == (count == 1)
            assert change.paired is None or -1 <= change.paired[1] < change.paired[2] <= 1
        assert "95 % interval" in text_of(report.html(found))


# ---- Words that follow what was measured


def with_results(folder, scores, roles=("base", "demonstrator", "executor"), **more):
    """A report's text; each role's clips of the tasks a, b, ... have these scores, by question."""
    questions = list(scores[0])
    verdicts = {role: [Verdict(chr(97 + i), "Go.", "", "", s) for i, s in enumerate(scores)] for role in roles}
    rows = [summarise(role, seen, Measures(tuple(questions))) for role, seen in verdicts.items()]
    results = {"rows": rows, "benchmark": {"name": "x", "questions": questions}} | more
    results["verdicts"] = {role: [v.to_json() for v in seen] for role, seen in verdicts.items()}
    (folder / "results.json").write_text(json.dumps(results))
    return text_of(report.build(folder).read_text())


def test_two_questions_are_both_and_one_has_no_average(tmp_path):
    make_run(tmp_path, kept=1)
    clips = json.loads((tmp_path / "clips/clips.json").read_text())
    (tmp_path / "clips/clips.json").write_text(json.dumps([clips[0] | {"id": "a"}]))
    for path in tmp_path.glob("clips/*/r0.png"):
        path.rename(path.with_name("a.png"))
    text = with_results(tmp_path, [{"made": 1.0, "sound": 0.0}, {"made": 1.0, "sound": 1.0}])
    assert "Both at once" in text and "share of clips that pass both" in text and "all two" not in text.lower()
    assert "Here the Executor passes both questions in 0 of 1 tasks; over all 2 tasks it is 50.0 %." in text
    text = with_results(tmp_path, [{"made": 1.0}])
    assert "Here the Executor passes the question in 1 of 1 tasks." in text, "all tasks are shown"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "validation/average": 0.5, "rate/task": 1}) + "\n")
    assert "Average of the" not in with_results(tmp_path, [{"made": 1.0}])


def test_graded_scores_are_means_and_no_shares(tmp_path):
    text = with_results(tmp_path, [{"made": 0.75, "sound": 0.5}, {"made": 0.25, "sound": 1.0}])
    assert "A bar is the mean score of the clips." in text and "share of clips" not in text
    assert "mean of each clip's lowest score" in text and "pass both" not in text
    assert "A bar is the share of clips" in with_results(tmp_path, [{"made": 1.0, "sound": 0.0}] * 2)


def test_without_an_executor_nothing_is_said_of_training(tmp_path):
    text = with_results(tmp_path, [{"task": 1.0}] * 2, roles=("base", "demonstrator"))
    assert "the untrained model, told only the task, completes 100.0 %" in text and "told the same" not in text
    assert "The words below" not in text, "there are none"
    assert "The words below" in with_results(tmp_path, [{"task": 1.0}] * 2)


def test_an_empty_evaluation_is_named(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(UserError, match=r"no rows in evaluation\.json, no metrics\.jsonl and no clips"):
        report.build(tmp_path)


# ---- Where RL begins


def with_log(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return report.read(folder)


def test_the_start_of_rl_is_marked_in_every_curve(tmp_path):
    make_run(tmp_path, kept=0)
    lines = [{"step": step, "train/rl_weight": float(step > 12), "rate/task": 0.5} for step in range(1, 21)]
    found = with_log(tmp_path, lines)
    text = report.html(found)
    assert run_data.rl_start(found) == 13 and "RL begins at step 13, at the dotted line." in text_of(text)
    drawings = re.findall(r"<svg.*?</svg>", text.split('id="training"')[1].split("</section>")[0], re.S)
    assert len(drawings) == 2 and all("RL begins at step 13</title>" in drawing for drawing in drawings)
    for drawing in drawings:
        assert f'd="M{48 + 12 / 19 * 264:.1f} 16V150"' in drawing
    from_the_first = with_log(tmp_path, lines[12:])
    text = report.html(from_the_first)
    assert "RL has a weight from the first step on." in text_of(text) and 'class="mark"' not in text


def test_earlier_logs_tell_by_their_correlations(tmp_path):
    make_run(tmp_path, kept=0)
    pair = "within_group/task~motion"
    lines = [{"step": step, "rate/task": 0.5, pair: 0.1 if step > 3 else None} for step in range(1, 6)]
    assert run_data.rl_start(with_log(tmp_path, lines)) == 4
    assert run_data.rl_start(with_log(tmp_path, [{"step": 1, "rate/task": 0.5}])) is None


@pytest.mark.parametrize("objective", [{"rl": "none"}, {"rl": "awm", "kind": "sft"}, None])
def test_without_rl_nothing_is_marked(tmp_path, objective):
    make_run(tmp_path, kept=0)
    (tmp_path / "config.json").write_text(json.dumps({"objective": objective}))
    assert run_data.rl_start(with_log(tmp_path, [{"step": 1, "train/rl_weight": 1.0}])) is None


# ---- Negative controls

CONTROL = {
    "control": "still", "question": "task", "n": 8, "no_answer": 0, "score": -2.0, "plain_score": 1.5, "rate": 0.125,
    "plain_rate": 0.75, "difference": -0.625, "low": -0.9, "high": -0.2, "passes": False,
}  # fmt: skip


def with_controls(folder, rows, **more):
    found = {"judge": "the judge", "rubric": "1", "clips": 8, "rows": rows, "failed": {}} | more
    (folder / "controls.json").write_text(json.dumps(found))
    return report.html(report.read(folder))


def test_negative_controls_stand_in_a_table(tmp_path):
    make_run(tmp_path, kept=0)
    assert 'id="controls"' not in report.html(report.read(tmp_path)), "a run without them says nothing of them"
    graded = CONTROL | {"control": "yes", "rate": None, "plain_rate": None, "difference": 0.5, "passes": True}
    silent = CONTROL | dict.fromkeys(("score", "plain_score", "rate", "plain_rate", "difference", "low", "high"))
    silent |= {"control": "odd", "n": 0, "passes": None}
    text = with_controls(tmp_path, [CONTROL, graded, silent], failed={"instruction": "the server refuses"})
    part = text.split('<section id="controls"')[1].split("</section>")[0].replace("\u00a0", " ")
    rows = re.findall(r"<tr><th scope=\"row\">task</th>(.*?)</tr>", part)
    assert [re.sub("<.*?>", "|", row) for row in rows] == [
        "|75.0 %||12.5 %||\u221262.5|\u221290.0 to \u221220.0|||held||8|",
        "|1.5||\u22122||0.5|\u22120.9 to \u22120.2|||passes||8|",
        "|–||–||–||no answers||0|",
    ]
    assert "still: the first frame for the whole length" in part and "<b>1 passes.</b>" in part
    assert "Control instruction was not asked: the server refuses" in part


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"judge": 1, "rows": [{}], "failed": {}}', '{"judge": 1, "rows": []}', "null"]
)
def test_damaged_controls_are_left_out_with_a_note(tmp_path, content):
    make_run(tmp_path, kept=0)
    (tmp_path / "controls.json").write_text(content)
    text = report.html(report.read(tmp_path))
    assert 'id="controls"' not in text
    assert ("negative controls are left out" in text_of(text)) == (content != "null")


# ---- The verb


def test_verb_writes_page_figures_and_clips(tmp_path, capsys):
    results = make_run(tmp_path / "run", kept=2)
    flags = ["--out", tmp_path / "p.html", "--json", tmp_path / "f.json", "--gifs", tmp_path / "gifs"]
    flags += ["--sheet", tmp_path / "sheet.png"]
    assert cli.main(["report", "--workdir", str(tmp_path / "run"), *map(str, flags)]) == 0
    assert "6 clips in" in capsys.readouterr().out
    assert not (tmp_path / "run/report.html").exists() and (tmp_path / "p.html").stat().st_size > 10_000
    figures = json.loads((tmp_path / "f.json").read_text())
    assert [row["rates"]["task"] for row in figures["rows"]] == [row["task"] for row in results["rows"]]
    assert figures["log"]["rate/task"]["last"] == [60, 1.0] and figures["clips"] == 2
    assert figures["changes"]["demonstrator to executor"][0]["verdict"] in ("up", "overlap")
    gifs = {p.name for p in (tmp_path / "gifs").iterdir()}
    assert gifs == {f"{role}-r{i}.gif" for role in RATES for i in (0, 1)}
    with Image.open(tmp_path / "gifs/base-r0.gif") as image:
        assert image.size == (300, 300) and image.n_frames == 9
    whole = Image.open(tmp_path / "sheet.png").size
    assert whole[0] > 9 * 60
    again = ["report", "--workdir", str(tmp_path / "run"), "--sheet", str(tmp_path / "sheet.png"), "--tasks"]
    assert cli.main([*again, "r1"]) == 0
    assert Image.open(tmp_path / "sheet.png").size[1] < whole[1]
    assert cli.main([*again, "r1,nobody"]) == 2
    assert "no clips of nobody were kept; there are: r0, r1" in capsys.readouterr().err


def test_verb_without_clips_cannot_export_any(tmp_path, capsys):
    make_run(tmp_path, kept=0)
    for flag in ("--gifs", "--mp4", "--sheet"):
        assert cli.main(["report", "--workdir", str(tmp_path), flag, str(tmp_path / "x")]) == 2
        assert "no clips to export" in capsys.readouterr().err


def test_verb_names_its_trouble(tmp_path, capsys):
    assert cli.main(["report", "--workdir", str(tmp_path)]) == 2
    assert "nothing to report on" in capsys.readouterr().err
    make_run(tmp_path, kept=0)
    assert cli.main(["report", "--workdir", str(tmp_path), "--out", str(tmp_path / "results.json/page.html")]) == 2
    assert "page.html" in capsys.readouterr().err
