"""eval.py: the arithmetic of the table, and that no interruption loses or changes anything. The task runs in a moment
and the policy follows a script, so every score is known beforehand."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import eval as evaluation
import rl
import sample
import sft
import tasks
from common import act, add_task
from model import Config, Qwen2
from test_execute import parent, processes, wait_until
from support import cli, disclosure, endpoint, files, records, report, tables
from support.sandbox import OWNER
from support.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
MINIATURE = "* Miniature data are made up from a seed: scores on them do not compare with published ones."

# It predicts VALUE where all answers are 10, so it scores |VALUE - 10|, at first 7; it prints |VALUE - 9.5|.
STARTER = '''VALUE = 3
print("validation MAE:", abs(VALUE - 9.5))
open("submission.csv", "w").write("id,y\\n" + "".join(f"{i},{VALUE}\\n" for i in (1, 2)))
'''


def edit(old, new):
    return act("Replace In Script", script_name="train.py", find=f"VALUE = {old}", replace=f"VALUE = {new}")


RUN = act("Execute Script", script_name="train.py")
END = act("Final Answer", final_answer="done")
SCRIPTS = [  # of four trajectories
    [edit(3, 8), edit(8, 9), RUN, END],         # scores 2, 1, 1
    ["no format at all", edit(3, "1 / 0"), END],    # none: failed
    [edit(3, "9.5"), edit("9.5", 6), END],      # 0.5 (prints 0), 4 (prints 3.5)
    [END],                                      # none: failed
]
STEPS = 4 + 3 + 3 + 1


class Scripted:
    """A policy that follows SCRIPTS; it knows the trajectory and the step from the seed it is given."""
    context = 4096

    def __init__(self, scripts=SCRIPTS, fail_at=None, error=None, task="tiny-task"):
        self.calls = 0
        self.fail_at = fail_at
        self.error = error
        self.lock = threading.Lock()
        self.replies = {zlib.crc32(f"0 {task} {k} {turn} policy".encode()): reply
                        for k, script in enumerate(scripts) for turn, reply in enumerate(script)}

    def chat(self, messages, *, seed, max_new_tokens, temperature, top_p, stop):
        with self.lock:
            if self.calls == self.fail_at:
                raise self.error
            self.calls += 1
        return endpoint.Completion(self.replies[seed], [1, 2, 3], [0.0] * 3, "stop", 100, 50, 0.01)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The folder that holds the task; also what a started eval.py needs in its environment."""
    folder = tmp_path / "tasks" / "tiny-task"
    add_task(folder.parent, folder.name, 10, "held-out", STARTER, '{"ML-Agent": (0.5, 0.25)}')
    monkeypatch.setattr(tasks, "FOLDERS", [*tasks.FOLDERS, folder.parent])
    monkeypatch.setenv("ML_AGENT_TASKS", str(folder.parent))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return folder


def settings(tmp_path, out="out", **more):
    more = {"task": "tiny-task", "model": "scripted", "coder": "none", "trajectories": 4, "steps": 5, **more}
    return evaluation.Settings(data=str(tmp_path / "data"), out=str(tmp_path / out), **more)


def play(cfg, policy):
    run, = evaluation.evaluate(cfg, load=lambda spec, **options: policy)
    return run["results"]


def text_of(results):
    return tables.format_report([{"name": "scripted", "results": results}])


def file_of(s, k):
    return records.trajectory_path(Path(s.out, "trajectories"), "tiny-task", k)


def masked(out):
    """results.json with what depends on the clock taken out."""
    def mask(value):
        if isinstance(value, dict):
            return {key: mask(each) for key, each in value.items() if key != "seconds" or not isinstance(each, float)}
        return [mask(each) for each in value] if isinstance(value, list) else value
    return mask(json.loads(Path(out, "results.json").read_text()))


# -- the tables

def test_scores_by_hand(tmp_path, task):
    found = play(settings(tmp_path), Scripted())["tasks"]["tiny-task"]
    played = found["trajectories"]
    assert [one["best-validation"] for one in played] == [1, None, 0.5, None]
    assert [one["last-valid"] for one in played] == [1, None, 4, None]
    assert [one["oracle"] for one in played] == [1, None, 0.5, None]
    assert [one["ended"] for one in played] == ["final answer"] * 4
    assert found["starter"] == 7 and found["printed"] == 6.5 and found["miniature"] and found["published"] == {}
    # 1, failed: 7, 4, failed: 7. Squared distances from 4.75: 14.0625 + 5.0625 + 0.5625 + 5.0625 = 24.75
    last = found["figures"]["last-valid"]
    assert (last["average"], last["best"], last["failed"]) == (4.75, 1, 2)
    assert last["standard_error"] == pytest.approx((24.75 / 3) ** 0.5 / 2)
    assert last["gain"] == (pytest.approx(100 * 2.25 / 7), None)
    # 1, 7, 0.5, 7; the best known score is 0
    assert found["figures"]["best-validation"]["gap"] == (pytest.approx(100 * 3.125 / 7), None)


def step(printed=None, score=None, action="Replace In Script", change=("3", "4"), valid=True, outcome="ok", name="X"):
    """A recorded step, of what is read of it."""
    before, after = change
    observation = f"train.py is saved. The difference:\n@@ -1 +1 @@\n-{name} = {before}\n+{name} = {after}  # of 9\n"
    return {"type": "step", "printed": printed, "score": score, "action": action, "valid": valid, "outcome": outcome,
            "observation": observation}


def summary(*steps, direction="up", starter=5.0, printed=0.5):
    return tables.summarize_trajectory([{"type": "header"}, *steps], direction, starter, printed)


@pytest.mark.parametrize("direction, printed, chosen", [
    ("up", [0.4, 0.6, 0.6], 1), ("up", [0.4, 0.5, 0.3], None), ("down", [0.6, 0.5, 0.7], None),
    ("down", [0.4, 0.2, 0.2], 1), ("up", [None, math.nan, 0.7], 2), ("up", [None, None, None], None)])
def test_the_best_printed_score_counts_and_of_equal_ones_the_earliest(direction, printed, chosen):
    """None: the starter, which printed 0.5 and scores 5; the others score 0, 1 and 2."""
    found = summary(*map(step, printed, (0.0, 1.0, 2.0)), direction=direction)
    assert found["best-validation"] == (5.0 if chosen is None else chosen)
    assert found["last-valid"] == 2.0


def test_a_failed_run_is_no_candidate():
    assert summary(step(0.9, None), step(0.6, 1.0))["best-validation"] == 1.0
    assert summary(step(0.9, None))["best-validation"] is None
    assert summary(step(0.1, 3.0), printed=None)["best-validation"] == 3.0      # what the starter is worth is unknown


def test_how_it_is_counted_may_change_afterwards_without_playing_again(tmp_path, task):
    play(settings(tmp_path), Scripted())
    text = text_of(play(settings(tmp_path, final="last-valid"), None))
    row = next(line for line in text.splitlines() if line.startswith("tiny-task"))
    assert re.split(r" {2,}", row)[4:10] == ["4.7500", "1.0000", "1.4361", "+32.1", "+32.1", "+44.6"]
    assert "scripted: the last valid submission counts." in text and "best-validation gain" in text


def result(scores, starter, m_best, direction="down", split="held-out", last=None):
    """What results.json says of a task."""
    trajectories = [{"k": k, "best-validation": score, "last-valid": score if last is None else last, "oracle": score,
                     "ended": "steps", "steps": 1, "valid": 1, "worse": 0, "taken_back": 0, "better": 0, "continued": 0}
                    for k, score in enumerate(scores)]
    return {"metric": "MAE", "direction": direction, "split": split, "starter": starter, "printed": 0.5, "seconds": 1.0,
            "m_best": m_best, "miniature": True, "published": {}, "trajectories": trajectories}


def run_of(name, model="m", **results):
    return {"name": name, "results": {"settings": {"model": model}, "final": "best-validation", "tasks": results}}


@pytest.mark.parametrize("direction, m_best, best, gain, gap", [
    ("up", 6, 6, 50, 25),               # of the gap of 4 the scores 1, 6, 2 close -1/4, 1 and 0
    ("down", -1, 1, -50, -200 / 9)])    # of 3 they close 1/3, -4/3, which counts as -1, and 0
def test_figures_in_both_directions(direction, m_best, best, gain, gap):
    a = tables.task_figures(result([1, 6, None], 2, m_best, direction), "best-validation")
    assert (a["average"], a["best"], a["failed"]) == (3, best, 1)
    assert a["gain"][0] == gain and a["gap"][0] == pytest.approx(gap)
    assert a["standard_error"] == pytest.approx(((4 + 9 + 1) / 2) ** 0.5 / 3 ** 0.5)


def test_a_figure_that_is_not_defined_is_none():
    a = tables.task_figures(result([3], 0, 6, "up"), "best-validation")
    assert (a["average"], a["gain"], a["standard_error"], a["gap"]) == (3, (None, None), None, (50, None))
    for m_best in (2, 3):       # not better than the starter
        assert tables.gap_closed(1, result([], 2, m_best)) is None
    assert tables.gain(-1, result([], -2, 0, "up")) == 50      # better is positive, below zero too
    assert str(tables.gain(5, result([], 5, 0))) == "0.0"


@pytest.mark.parametrize("score, gap", [(3, 50), (4, 100), (9, 100), (2, 0), (1, -50), (-7, -100)])
def test_the_gap_closed_has_a_floor_and_a_ceiling(score, gap):
    assert tables.gap_closed(score, result([], 2, 4, "up")) == gap
    assert tables.gap_closed(-score, result([], -2, -4)) == gap


def test_the_interval_is_about_right():
    scores = [float(i % 10) for i in range(400)]        # average 4.5, standard deviation 2.872
    mean, (low, high) = tables.mean_and_interval([[scores]])
    assert mean == 4.5
    assert low == pytest.approx(4.5 - 1.96 * 2.872 / 20, abs=0.02)
    assert high == pytest.approx(4.5 + 1.96 * 2.872 / 20, abs=0.02)


@pytest.mark.parametrize("groups, mean, interval", [
    ([[[7.0]]], 7, None), ([[[0, 100, 100, 100]]], 75, None),
    # of 5 draws up to 2 are the fifth with probability 2944/3125, up to 3 with 3104/3125, and none with 1024/3125
    ([[[0, 0, 0, 0, 5]]], 1, [0, 3]),
    ([[[0, 0, 0, 0, 5], [1, 1]]], 0, None),     # of the other run there are too few
    ([[[50, 50]], [[0, 0]]], 25, [0, 50]),      # that of the tasks: 0 with 1/4
    # Both tasks drawn are the first with 1/4, and the average of its two draws is 0 with 1/4, 5 with 1/2: so the mean
    # is 0 with 1/64 and 2.5 with 4/64, and it is 100 with 1/4.
    ([[[0, 10]], [[100]]], 52.5, [2.5, 100]),
    ([[[60], [50]], [[10], [0]]], 10, [10, 10]),        # the same tasks for both: always 10
    # The trajectories are drawn apart: one task's difference is -10 with 1/16, -5 with 4/16; the mean is -10 with 1/256,
    # -7.5 with 8/256.
    ([[[0, 10], [0, 10]]] * 2, 0, [-7.5, 7.5])])
def test_means_and_intervals_by_hand(groups, mean, interval):
    found_mean, found_interval = tables.mean_and_interval(groups)
    assert found_mean == mean and found_interval == interval


def test_means_over_tasks_beside_random_edits_by_hand():
    """Gains of 50 and 25 %, gaps of 50 and 50 %; random edits 20 and 25, 20 and 50."""
    others = {"third": result([1, 1], 0, 0.5), "fourth": result([1, 2], 3, 1, split="held-in")}
    agent = run_of("agent", first=result([5], 10, 0, last=10), second=result([3], 4, 2, last=4), **others)
    chance = run_of("chance", tables.RANDOM, first=result([8], 10, 0), second=result([3], 4, 2), **others)
    rows = tables.build_means([chance, agent])
    assert rows[0] == {"tasks": "2 held-out", "agent": "starter", "gain %": "+0.0", "gap %": "+0.0"}
    assert rows[1] == {
        "tasks": "2 held-out", "agent": "chance", "gain %": "+22.5 (+20.0 to +25.0)", "gap %": "+35.0 (+20.0 to +50.0)",
        "largest task": "71%", "last-valid gain": "+22.5", "last-valid gap": "+35.0"}
    assert rows[2:] == [{
        "tasks": "2 held-out", "agent": "agent", "gain %": "+37.5 (+25.0 to +50.0)",
        "gain over random": "+15.0 (+0.0 to +30.0)", "gap %": "+50.0 (+50.0 to +50.0)",
        "gap over random": "+15.0 (+0.0 to +30.0)", "largest task": "50%", "last-valid gain": "+0.0",
        "last-valid gap": "+0.0"}]
    # a mean is of what all have played, on the same data
    del chance["results"]["tasks"]["second"]
    assert tables.build_means([chance, agent]) == []
    chance["results"]["tasks"]["second"] = result([3], 4.5, 2)
    assert tables.build_means([chance, agent]) == []


def test_gains_divided_by_those_of_a_reference_by_hand():
    """On the second task the interval of the reference's gain holds 0, on the third it is below, on the fourth there is
    none."""
    agent = run_of("agent", first=result([5, 7], 10, 0), second=result([4], 4, 2), third=result([3], 4, 2),
                   fourth=result([4] * 5, 4, 2), other=result([1], 4, 2))
    best = run_of("best", first=result([2] * 5, 10, 0), second=result([3, 5] * 3, 4, 2),
                  third=result([5] * 5, 4, 2), fourth=result([3] * 4, 4, 2))
    heads, *rows = tables.build_ratios([agent, best], "best")
    assert heads == {"task": "first", "gain of the reference %": "+80.0 (+80.0 to +80.0)", "agent": "0.50",
                     "best": "1.00"}
    assert rows == [
        {"task": "second", "gain of the reference %": "+0.0 (-16.7 to +16.7)", "agent": "-", "best": "-"},      # a draw
        {"task": "third", "gain of the reference %": "-25.0 (-25.0 to -25.0)", "agent": "-", "best": "-"},
        {"task": "fourth", "gain of the reference %": "+25.0", "agent": "-", "best": "-"},
        {"task": "won, of 4", "agent": "1", "best": "2"}]
    with pytest.raises(ValueError, match="--reference: none holds no evaluation"):
        tables.build_ratios([agent, best], "none")
    with pytest.raises(ValueError, match="--reference must be one of --compare"):
        evaluation.Settings(reference="runs/a")


def test_what_an_agent_does_by_hand(tmp_path, task):
    results = play(settings(tmp_path), Scripted())
    played = results["tasks"]["tiny-task"]["trajectories"]
    # VALUE 3 to 8 to 9: better twice, once it goes on upwards. 1 / 0: failed, not taken back. 9.5: better, then down.
    names = ("steps", "valid", "worse", "taken_back", "better", "continued")
    assert [[one[name] for name in names] for one in played] == [
        [4, 4, 0, 0, 2, 1], [3, 2, 1, 0, 0, 0], [3, 3, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0]]
    assert tables.build_habits([{"name": "scripted", "results": results}]) == [
        {"tasks": "held-out", "agent": "scripted", "valid actions": "91% of 11", "taken back after worse": "0% of 2",
         "gone on after better": "33% of 3"}]


UNDO = {"action": "Undo Edit Script"}
BACK = {"action": "Set Constant Inversely"}


@pytest.mark.parametrize("steps, counts", [
    # worse, taken back, better, continued; the starter printed 0.5, more is better
    ([step(0.4, 1), step(0.5, 1, **UNDO), step(0.6, 1)], (1, 1, 0, 0)),     # nothing follows the last
    ([step(0.4, 1), step(0.4, 1, "Execute Script"), step(0.5, 1, **UNDO)], (1, 1, 0, 0)),       # it looks first
    ([step(0.5, 1), step(0.4, 1), step(0.4, 1, valid=False, **UNDO)], (1, 0, 0, 0)),        # 0.5 is no worse
    ([step(None, None, outcome="error"), step(0.5, 1, **UNDO), step(0.9, 1)], (1, 1, 0, 0)),
    # the other way is better, and goes on; it is worse too, and is taken back; it is refused
    ([step(0.4, 1), step(0.6, 1, change=("4", "2"), **BACK), step(0.7, 1, change=("2", "1"))], (1, 1, 1, 1)),
    ([step(0.4, 1), step(0.3, 1, **BACK), step(0.5, 1, **UNDO), step(0.9, 1)], (2, 2, 0, 0)),
    ([step(0.4, 1), step(0.4, 1, valid=False, **BACK)], (1, 0, 0, 0)),
    ([step(0.6, 1), step(0.55, 1), step(0.6, 1, **UNDO)], (1, 1, 1, 1)),        # worse than the best before it
    ([step(0.6, 1, change=("3", "2.5e0")), step(0.7, 1, change=("2.5e0", "1")), step(0.7, 1)], (0, 0, 2, 1)),
    ([step(0.6, 1), step(0.7, 1, name="Y"), step(0.7, 1, change=("\"a\"", "\"b\""))], (0, 0, 2, 0)),
    ([step(0.6, 1, change=("\"a\"", "\"b\"")), step(0.6, 1)], (0, 0, 0, 0))])      # no constant with a number
def test_taken_back_after_worse_and_gone_on_after_better(steps, counts):
    found = tables.count_habits(steps, "up", 0.5)
    assert tuple(found[name] for name in ("worse", "taken_back", "better", "continued")) == counts


def test_the_report_says_what_was_measured(tmp_path, task):
    results = play(settings(tmp_path), Scripted())
    text = text_of(results)
    row = next(line for line in text.splitlines() if line.startswith("tiny-task"))
    # squared distances of 1, 7, 0.5, 7 from 3.875: 8.265625 + 2 * 9.765625 + 11.390625 = 39.1875
    assert re.split(r" {2,}", row) == [
        "tiny-task *", "scripted", "MAE (down)", "7.0000", "3.8750", "0.5000", f"{(39.1875 / 3) ** 0.5 / 2:.4f}",
        "+44.6", "+44.6", "+32.1", "2/4", "3.8750"]
    assert text.startswith(MINIATURE) and "ML-Agent (paper)" not in text
    assert "of equal ones the earliest, counts. How they ended: final answer 4." in text
    assert "(oracle) is no" in text
    assert "is not counted" not in text
    results["settings"]["clock"] = "scripts"
    assert "1800 s a trajectory; the time that the model took to reply is not counted;" in text_of(results)


def test_published_figures_stand_below_real_data_only(tmp_path, task):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "truth.csv").write_text("id,y\n1,10\n2,10\n")
    results = play(settings(tmp_path, raw=str(raw)), Scripted())
    text = text_of(results)
    rows = [re.split(r" {2,}", line) for line in text.splitlines() if line.startswith("tiny-task ")]
    assert [row[:2] for row in rows] == [["tiny-task", "scripted"], ["tiny-task", "ML-Agent (paper)"]]
    assert rows[1][2:] == ["0.5000", "0.2500"] and rows[0][4:6] == ["3.8750", "0.5000"]
    assert "iniature" not in text and "iniature" not in json.dumps(results["settings"])


# -- nothing is lost

@pytest.fixture
def whole(tmp_path, task, _found=[]):
    """The masked results.json of a run that nothing has interrupted, made once."""
    if not _found:
        play(settings(tmp_path, "whole"), Scripted())
        _found.append(masked(tmp_path / "whole"))
    return _found[0]


@pytest.mark.parametrize("at", [0, 1, 2, 5, 8, STEPS - 1])
def test_a_run_broken_off_anywhere_ends_as_if_it_had_not_been(at, tmp_path, task, whole, monkeypatch):
    s = settings(tmp_path)
    parallel = 1 + at % 4
    monkeypatch.setattr(evaluation, "TOKENS_TOGETHER", parallel * s.context)
    down = endpoint.EndpointError("http://there is down")
    with pytest.raises(endpoint.EndpointError):
        play(s, Scripted(fail_at=at, error=down))
    half = masked(s.out)
    assert not half["complete"]
    again = Scripted()
    play(s, again)
    assert again.calls <= STEPS - at + parallel       # what was recorded was not played again
    assert masked(s.out) == whole
    for file in Path(s.out, "trajectories").iterdir():
        assert records.replay(file, data=s.data) == 0


def test_a_line_cut_short_is_dropped_and_its_step_played_again(tmp_path, task):
    s = settings(tmp_path, trajectories=1)
    play(s, Scripted())
    whole = masked(s.out)
    path = file_of(s, 0)
    lines = path.read_bytes().splitlines(keepends=True)
    for keep in range(len(lines)):
        path.write_bytes(b"".join(lines[:keep]) + lines[keep][:-1])
        policy = Scripted()
        play(s, policy)
        assert policy.calls == len(lines) - max(keep, 1)
        assert masked(s.out) == whole


def test_a_damaged_line_is_named(tmp_path, task):
    s = settings(tmp_path, trajectories=1)
    play(s, Scripted())
    path = file_of(s, 0)
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(ValueError, match="tiny-task-0.jsonl, line 1 is not JSON"):
        play(s, Scripted())
    path.write_text(path.read_text().removeprefix("not json\n").replace('"snapshot": {', '"snapshot": {"../x": "", '))
    with pytest.raises(ValueError, match="tiny-task-0.jsonl, line 1 is no record .* snapshot has '../x'"):
        play(s, Scripted())


def test_a_finished_run_needs_no_model(tmp_path, task):
    play(settings(tmp_path), Scripted())
    assert play(settings(tmp_path), None)["complete"]


def test_more_trajectories_extend_a_run(tmp_path, task):
    play(settings(tmp_path, trajectories=2), Scripted())
    policy = Scripted()
    play(settings(tmp_path), policy)
    assert policy.calls == len(SCRIPTS[2]) + len(SCRIPTS[3])


def test_what_is_disclosed_is_of_the_trajectories_in_the_table(tmp_path, task):
    """Of four that are there two are asked for: of 4 and of 3 replies, each of 3 tokens."""
    for num, replies in ((4, STEPS), (2, 7)):
        results = play(settings(tmp_path, trajectories=num), Scripted())
        assert len(results["tasks"]["tiny-task"]["trajectories"]) == num
        found = results["disclosure"]
        assert found["replies"] == found["models"]["scripted"] == replies and found["tokens"]["written"] == 3 * replies
        assert len(report.read_run(tmp_path / "out", "scripted")["trajectories"]) == num      # and what the page draws


def test_an_edit_for_which_the_disk_was_full_says_nothing_of_the_sandbox():
    ran = {"type": "step", "outcome": "ok", "sandbox": "namespaces+landlock+seccomp"}
    full = {"type": "step", "outcome": "disk full", "sandbox": ""}
    labels = lambda *steps: disclosure.disclose([steps], "model", "none")["labels"]
    assert labels(ran, full) == labels(ran) != labels(ran, {**ran, "sandbox": "off"}) != labels(full)


@pytest.mark.parametrize("change, words", [
    ({"temperature": 0.1}, "temperature 0.7 (now 0.1)"), ({"steps": 6}, "steps 5 (now 6)"),
    ({"model": "other"}, "model scripted (now other)"), ({"seed": 1}, "seed 0 (now 1)")])
def test_other_settings_in_the_same_folder_are_refused(change, words, tmp_path, task):
    play(settings(tmp_path), Scripted())
    texts = lambda: [Path(tmp_path, "out", name).read_text() for name in ("results.json", "report.html")]
    before = texts()
    with pytest.raises(ValueError, match=re.escape(words)):
        play(settings(tmp_path, **change), Scripted())
    assert texts() == before


def test_other_data_or_weights_under_the_same_name_are_refused(tmp_path, task):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("weights")
    play(settings(tmp_path, model=str(model)), Scripted())
    (model / "model.safetensors").write_text("other weights")
    with pytest.raises(ValueError, match=f"files of {model}"):
        play(settings(tmp_path, model=str(model)), Scripted())
    (model / "model.safetensors").write_text("weights")
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "truth.csv").write_text("id,y\n1,10\n2,11\n")
    with pytest.raises(ValueError, match="data of tiny-task miniature .*now real "):
        play(settings(tmp_path, model=str(model), raw=str(raw)), Scripted())


def test_a_baseline_is_no_run_that_could_be_in_the_way(tmp_path, task):
    results = play(settings(tmp_path, model=""), None)
    assert results["tasks"]["tiny-task"]["starter"] == 7 and results["tasks"]["tiny-task"]["printed"] == 6.5
    assert play(settings(tmp_path), Scripted())["complete"]


def test_a_second_process_on_the_same_folder_is_refused(tmp_path, task):
    import fcntl
    s = settings(tmp_path)
    Path(s.out).mkdir()
    with Path(s.out, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another eval.py"):
            play(s, Scripted())


# -- what sft.py and rl.py have made

@pytest.fixture
def made(tmp_path, task, monkeypatch):
    """As if both had run in the present folder, which is a new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "FOLDERS", [task.parent])        # which is then all tasks
    for name in ("sft", "rl"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "agent.json").write_text('{"steps": 4, "max_new_tokens": 96}')
    return {"runs/sft": Scripted(), "runs/rl": Scripted([[edit(3, 9), END], [edit(3, 8), END]])}


def play_all(made):
    cfg = cli.parse(evaluation.Settings, ["--trajectories=2", "--coder=none"], evaluation.fill)
    return evaluation.evaluate(cfg, evaluation.agents_made(cfg), load=lambda spec, **options: made[spec])


def test_the_agents_that_were_made_stand_in_one_table_with_random_edits(made, tmp_path):
    runs = play_all(made)
    rows = [row for table in tables.build_tables(runs) for row in table["rows"] if row.get("task") == "tiny-task *"]
    assert [row["agent"] for row in rows] == ["random edits", "fine-tuned", "after RL"]
    # 1 and 7 (failed): 4 on average, of 7; 1 and 2: 1.5
    columns = ("metric", "starter", "average", "best", "gain %")
    assert [[row[column] for column in columns] for row in rows[1:]] == [
        ["MAE (down)", "7.0000", "4.0000", "1.0000", "+42.9"],
        ["MAE (down)", "7.0000", "1.5000", "1.0000", "+78.6"]]
    assert [run["results"]["settings"]["steps"] for run in runs] == [4, 4, 4]      # as agent.json says
    assert Path("runs/eval/report.html").is_file()
    for name in ("random-edits", "sft", "rl"):
        assert json.loads(Path("runs/eval", name, "results.json").read_text())["complete"]
        assert records.replay(Path("runs/eval", name, "trajectories", "tiny-task-0.jsonl"), log=print) == 0
    assert play_all({}) == runs         # nothing is left to play


def test_random_edits_need_no_model_and_take_back_what_is_no_better(tmp_path, task):
    """Of one constant, with the scores of |VALUE - 9.5| printed: what it keeps scores better than the starter."""
    found = play(settings(tmp_path, model=tables.RANDOM, steps=8), None)["tasks"]["tiny-task"]["trajectories"]
    assert all(one["valid"] == one["steps"] == 8 and one["taken_back"] == one["worse"] for one in found)
    assert sum(one["worse"] for one in found) > 0 and min(one["best-validation"] for one in found) < 7
    again = play(settings(tmp_path, "again", model=tables.RANDOM, steps=8), None)
    assert again["tasks"]["tiny-task"]["trajectories"] == found         # the same seed
    other = play(settings(tmp_path, "other", model=tables.RANDOM, steps=8, seed=1), None)
    assert other["tasks"]["tiny-task"]["trajectories"] != found
    file = file_of(settings(tmp_path, "again"), 0)
    lines = file.read_text().splitlines(keepends=True)[:3]      # of a loop that acted otherwise, and was interrupted
    lines[1] = json.dumps({**json.loads(lines[1]), "reply": "another"}) + "\n"
    file.write_text("".join(lines))
    with pytest.raises(cli.RunError, match="begun by another version of the scripted agent"):
        play(settings(tmp_path, "again", model=tables.RANDOM, steps=8), None)


def test_what_is_typed_holds_for_the_agents_that_were_made(made):
    argv = ["--trajectories=2", "--temperature=0.7", "--steps=15", "--dtype", "auto"]
    agents = evaluation.agents_made(cli.parse(evaluation.Settings, argv, evaluation.fill))
    for name, cfg in agents.items():
        assert (cfg.temperature, cfg.steps, cfg.dtype, cfg.trajectories) == (0.7, 15, "auto", 2)
        assert (cfg.max_new_tokens, cfg.task) == (96, "all")        # of agent.json, and of the miniature
        model = evaluation.MADE.get(name, tables.RANDOM)
        assert (cfg.model, cfg.out) == (model, str(Path("runs/eval", Path(model).name)))
    cfg = cli.parse(evaluation.Settings, [], evaluation.fill)
    assert (cfg.temperature, cfg.steps, cfg.dtype, cfg.trajectories) == (1.0, 4, "float64", 3)


def test_agents_that_act_in_two_ways_do_not_stand_in_one_table(made, capsys):
    Path("runs/rl/agent.json").write_text('{"steps": 5, "max_new_tokens": 96}')
    with pytest.raises(SystemExit) as end:
        evaluation.main([])
    assert end.value.code == 2 and "runs/sft/agent.json and runs/rl/agent.json differ" in capsys.readouterr().err


def test_what_is_there_is_evaluated_and_what_is_not_is_named(made, monkeypatch, capsys):
    evaluate = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda cfg, agents, exports: evaluate(
        cfg, agents, load=lambda spec, **options: made[spec]))
    Path("runs/rl/agent.json").unlink()
    assert evaluation.main(["--trajectories", "2", "--coder", "none"]) == 0
    said = capsys.readouterr().out
    assert "+42.9" in said and "Not there yet: after RL. Make runs/rl with: python rl.py" in said
    Path("runs/sft/agent.json").unlink()
    assert evaluation.main([]) == 2
    assert "python sft.py, then python rl.py" in capsys.readouterr().err


@pytest.fixture
def exported(made):
    """The exports of two runs of rl.py: of runs/rl after 0, 2 and 4 iterations, of runs/episode after 0 and 1."""
    scripts = {}
    for run, iterations, seconds in (("runs/rl", (0, 2, 4), 60), ("runs/episode", (0, 1), 240)):
        for i in iterations:
            folder = Path(run, "exports", f"{i:06d}")
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            (folder / "agent.json").write_text('{"steps": 4, "max_new_tokens": 96}')
            scripts[str(folder)] = Scripted([[edit(3, 3 + i), END], [edit(3, 3 + i), END]])
        lines = [{"iteration": i, "updates": 2 * i, "seconds": seconds, "runs": 8, "sampled_tokens": 100 * i}
                 for i in (1, 2, 3, 4)]
        lines.insert(1, {**lines[1], "seconds": 1e6})       # lost when the run was killed, and done again
        Path(run, "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return scripts


def test_the_exports_of_two_runs_are_a_series_of_points(exported, monkeypatch, capsys):
    evaluate = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda cfg, agents, exports: evaluate(
        cfg, agents, exports=exports, load=lambda spec, **options: exported[spec]))
    argv = ["--exports", "runs/rl,runs/episode", "--trajectories=2", "--coder=none", "--out", "runs/curve"]
    assert evaluation.main(argv) == 0
    results = Path("runs/curve/exports.json")
    assert not Path("runs/curve/results.json").exists()
    points = json.loads(results.read_text())
    assert points["complete"] and "runs/rl, 4" in capsys.readouterr().out
    figures = [[point[name] for name in ("run", "iteration", "updates", "seconds", "scripts", "tokens")]
               for point in points["exports"]]
    assert figures == [["runs/rl", 0, 0, 0, 0, 0], ["runs/rl", 2, 4, 120, 16, 300], ["runs/rl", 4, 8, 240, 32, 1000],
                       ["runs/episode", 0, 0, 0, 0, 0], ["runs/episode", 1, 2, 240, 8, 100]]
    gains = [point["gain"]["held-out"] for point in points["exports"]]      # of 7: 0, 2, 4, and 0, 1 fewer
    assert [mean for mean, _ in gains] == pytest.approx([0, 200 / 7, 400 / 7, 0, 100 / 7])
    page = Path("runs/curve/report.html").read_text()
    assert '"exports": [{"run": "runs/rl", "iteration": 0' in page and '"trajectories": []' in page
    # The same command has nothing left to play; a damaged end of an export's evaluation is played again.
    for policy in exported.values():
        policy.calls = 0
    cut = Path("runs/curve/runs-rl/000004/trajectories/tiny-task-1.jsonl")
    cut.write_bytes(cut.read_bytes()[:-1])
    assert evaluation.main(argv) == 0 and json.loads(results.read_text()) == points
    assert [policy.calls for policy in exported.values()] == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("argv, words", [
    (["--exports", "runs/sft"], "runs/sft holds no exports"), (["--exports", "runs/rl", "--model", "m"], "takes no"),
    (["--exports", "runs/rl,runs/other"], "000000/agent.json differ")])
def test_exports_that_make_no_series_are_one_sentence(argv, words, exported, capsys):
    Path("runs/other/exports/000000").mkdir(parents=True)
    Path("runs/other/exports/000000/config.json").write_text("{}")
    Path("runs/other/exports/000000/agent.json").write_text('{"steps": 5}')
    with pytest.raises(SystemExit) as end:
        evaluation.main(argv)
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("held", ["trajectories/tiny-task-0.jsonl", "random-edits/results.json"])
def test_a_series_does_not_replace_an_evaluation(held, exported, capsys):
    """Its report belongs to the trajectories beside it, or to those of the agents."""
    for name in (held, "report.html"):
        files.write_atomic(Path("runs/held", name), {})
    assert evaluation.main(["--exports", "runs/rl", "--out", "runs/held", "--trajectories=1"]) == 2
    assert "runs/held holds an evaluation" in capsys.readouterr().err
    assert json.loads(Path("runs/held/report.html").read_text()) == {}


def test_a_log_that_does_not_tell_what_training_took_is_one_sentence(exported, capsys):
    Path("runs/rl/log.jsonl").write_text('{"iteration": 1, "reward": 0.5}\n')
    assert evaluation.main(["--exports", "runs/rl"]) == 2
    assert "runs/rl/log.jsonl does not tell" in capsys.readouterr().err


def test_in_float64_a_reply_does_not_depend_on_what_is_sampled_beside_it():
    engine = sample.load("tiny", dtype="float64", rows=8, context=64)
    prompts = [[1 + i] * (3 + i) for i in range(8)]
    together = engine.generate(prompts, max_new_tokens=20, seed=5)
    for i, prompt in enumerate(prompts):
        engine.forget()
        (alone,), = engine.generate([prompt], max_new_tokens=20, seed=5 + i)
        assert (alone.tokens, alone.logps) == (together[i][0].tokens, together[i][0].logps)


# -- what a model's folder says

AGENT = {"prompt_format": "short", "actions": ["Execute Script", "Final Answer"], "fields": ["Action", "Action Input"],
         "context": 640, "max_new_tokens": 96, "steps": 5}


def parsed(model, *more):
    return cli.parse(evaluation.Settings, ["--model", str(model), *more], evaluation.fill)


def test_a_model_says_how_it_acts_and_nothing_else(tmp_path, capsys):
    others = {"sandbox": "off", "python": "/bin/evil", "model": "http://evil/v1#m", "coder": "http://evil/v1#m",
              "out": "/evil", "data": "/evil", "raw": "/evil", "gpu": "0", "seed": 5, "task": "all", "__init__": 1,
              "temperature": 0.0, "trajectories": 1000, "sandbox\n\x1b[31m": "off", "preset": "tiny"}
    (tmp_path / "agent.json").write_text(json.dumps({**others, **AGENT}))
    s = parsed(tmp_path, "--task=tiny-task")
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("typed: ")]
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in AGENT.items()}
    assert s == evaluation.Settings(model=str(tmp_path), task="tiny-task", **tuples)
    assert len(said) == 2 and "ignored: '__init__', 'coder'" in said[0] and "\x1b" not in said[0]
    assert said[1] == (f"{tmp_path}/agent.json: --prompt-format short, --actions Execute Script,Final Answer, "
                       "--fields Action,Action Input, --context 640, --max-new-tokens 96, --steps 5")


def test_a_model_alone_acts_on_a_small_task_which_is_said(tmp_path, capsys):
    assert parsed(tmp_path).task == "leaf-classification"
    assert capsys.readouterr().err.splitlines()[-1] == "no --task: --task leaf-classification"


def test_what_is_typed_holds_also_where_it_is_the_default(tmp_path, capsys):
    (tmp_path / "agent.json").write_text(json.dumps(AGENT))
    default = evaluation.Settings()
    for name in AGENT:
        value = getattr(default, name)
        s = parsed(tmp_path, f"{cli.flag_of(name)}={','.join(value) if isinstance(value, tuple) else value}")
        assert getattr(s, name) == value
        assert [other for other in AGENT if getattr(s, other) != getattr(default, other)] == [
            other for other in AGENT if other != name]
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{tmp_path}/agent.json")]
        assert len(said) == 1 and f"{cli.flag_of(name)} " not in said[0]


@pytest.mark.parametrize("name, value", [
    ("prompt_format", "long"), ("prompt_format", ["short"]), ("actions", []), ("actions", "Execute Script"),
    ("actions", ["Fly"]),
    ("actions", [["Execute Script"]]), ("actions", ["Final Answer"] * 2), ("actions", {"Final Answer": 1}),
    ("fields", ["Action"]), ("fields", ["Action Input", "Action"]), ("context", 0), ("context", "640"),
    ("context", 640.0), ("context", 10**9), ("context", True), ("context", math.nan), ("steps", -1), ("steps", None),
    ("steps", 10**4000), ("max_new_tokens", {}), ("max_new_tokens", 1e300)])
def test_a_wrong_entry_is_one_sentence(name, value, tmp_path, capsys):
    (tmp_path / "agent.json").write_text(json.dumps({name: value}))
    with pytest.raises(SystemExit) as end:
        evaluation.main(["--model", str(tmp_path)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"{tmp_path}/agent.json, '{name}': expected " in last and len(last) < 600


def agent_file(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**30)
    elif kind in ("loop", "device"):
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    else:
        path.write_bytes({"empty": b"", "text": b"steps: 5", "list": b"[]", "null": b"null", "bytes": b"\xff\xfe{}",
                          "number": b"1" * 9000, "deep": b"[" * 60_000, "deeper": b'{"a":' * 12_000}[kind])


@pytest.mark.parametrize("kind", ["pipe", "folder", "huge", "loop", "device", "empty", "text", "list", "null", "bytes",
                                  "number", "deep", "deeper"])
@pytest.mark.parametrize("program", ["eval", "rl"])
def test_a_file_that_is_no_agent_json_is_one_sentence(kind, program, tmp_path, capsys):
    agent_file(tmp_path / "agent.json", kind)
    with pytest.raises(SystemExit) as end:
        (evaluation if program == "eval" else rl).main(["--model", str(tmp_path)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"error: {tmp_path}/agent.json" in last and "Traceback" not in last


def test_a_model_of_the_hub_says_it_too(tmp_path, monkeypatch):
    (tmp_path / "agent.json").write_text('{"steps": 5}')
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda path, allow_patterns: asked.append(
        (path, allow_patterns)) or str(tmp_path))
    assert parsed("someone/agent").steps == 5 and asked == [("someone/agent", ["*.json"])]
    assert parsed("someone/agent", "--steps=15").steps == 15
    with pytest.raises(SystemExit):     # the folder holds no config.json, which tells the recipe
        rl.main(["--model", "someone/agent"])
    assert asked[-1] == ("someone/agent", ["*.json"])


def test_only_what_was_checked_is_written_on(tmp_path):
    """A model that is trained from another one keeps how it acts, and gets nothing else of its agent.json."""
    first = tmp_path / "first"
    own = tmp_path / "own.jsonl"
    Qwen2.from_scratch(Config.preset("tiny")).save_pretrained(first)
    Tokenizer.of_bytes().save(first)
    (first / "agent.json").write_text(json.dumps({"steps": 5, "sandbox": "off", "context": 99}))
    line = {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "Yes."}]}
    own.write_text(f"{json.dumps(line)}\n" * 3)
    assert sft.main(["--model", str(first), "--trajectories", str(own), "--out", str(tmp_path / "second"),
                     "--updates=1", "--batch=1"]) == 0
    assert json.loads((tmp_path / "second" / "agent.json").read_text()) == {"steps": 5, "context": 99}


@pytest.mark.parametrize("change, words", [
    ({"snapshot": {"train.py": "0" * 64}}, "its last state cannot be restored: .*blob"),
    ({"snapshot": {"train.py": 3}}, "snapshot"), ({"seconds_left": math.inf}, "seconds_left"),
    ({"type": "header"}, "type.*header"), ({"messages": [{"role": "user"}]}, "messages.*(message|content)")])
def test_a_record_of_others_that_is_gone_on_with_is_data(change, words, tmp_path, task):
    """What a trajectory's last line says may be anything; going on from it is then refused in a sentence."""
    s = settings(tmp_path, trajectories=1)
    with pytest.raises(endpoint.EndpointError):
        play(s, Scripted(fail_at=2, error=endpoint.EndpointError("down")))
    *lines, last = file_of(s, 0).read_text().splitlines()
    file_of(s, 0).write_text("\n".join([*lines, json.dumps({**json.loads(last), **change}), ""]))
    with pytest.raises((ValueError, cli.RunError), match=words) as error:
        play(s, Scripted())
    assert str(file_of(s, 0)) in str(error.value)


def test_a_record_cannot_give_itself_more_time(tmp_path, task):
    s = settings(tmp_path, trajectories=1, seconds=1000)
    with pytest.raises(endpoint.EndpointError):
        play(s, Scripted(fail_at=2, error=endpoint.EndpointError("down")))
    *lines, last = file_of(s, 0).read_text().splitlines()
    file_of(s, 0).write_text("\n".join([*lines, json.dumps({**json.loads(last), "seconds_left": 1e6}), ""]))
    play(s, Scripted())
    assert all(line["seconds_left"] <= 1000 for line in records.read_record(file_of(s, 0))[3:])


# -- ends and errors

def test_a_conversation_that_outgrows_the_context_ends_and_keeps_its_score(tmp_path, task):
    s = settings(tmp_path, trajectories=1)
    result = play(s, Scripted(fail_at=2, error=cli.ContextFull("5000 tokens")))
    one = result["tasks"]["tiny-task"]["trajectories"][0]
    assert (one["ended"], one["last-valid"], one["steps"]) == ("context full", 1, 2)
    assert play(s, None)["complete"]        # it is over: nothing is asked again


def test_a_reply_longer_than_the_context_is_refused(tmp_path, task):
    with pytest.raises(ValueError, match="leaves no room in a context of 4096"):
        play(settings(tmp_path, max_new_tokens=4096), Scripted())


def test_the_step_limit_ends_a_trajectory(tmp_path, task):
    one = play(settings(tmp_path, trajectories=1, steps=2), Scripted())["tasks"]["tiny-task"]["trajectories"][0]
    assert (one["ended"], one["last-valid"], one["steps"]) == ("steps", 1, 2)


def test_time_spent_before_an_interruption_counts(tmp_path, task):
    s = settings(tmp_path, trajectories=1, seconds=1000)
    with pytest.raises(endpoint.EndpointError):
        play(s, Scripted(fail_at=1, error=endpoint.EndpointError("down")))
    path = file_of(s, 0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert 900 < lines[1]["seconds_left"] < 1000
    lines[1]["seconds_left"] = 0.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = play(s, Scripted())["tasks"]["tiny-task"]["trajectories"][0]
    assert (one["ended"], one["steps"]) == ("time", 2)


def test_our_own_bugs_are_raised_not_scored(tmp_path, task):
    with pytest.raises(RuntimeError) as error:
        play(settings(tmp_path), Scripted(fail_at=3, error=ValueError("a bug")))
    assert str(error.value.__cause__) == "a bug" and not isinstance(error.value, cli.RunError)


def test_the_coder_is_asked_with_its_own_seed(tmp_path, task):
    asked = []

    class Coder(Scripted):
        def chat(self, messages, **options):
            if len(messages) == 1:
                asked.append(options["seed"])
                script = STARTER.replace("VALUE = 3", "VALUE = 9")
                return endpoint.Completion(f"```python\n{script}```", [], [], "stop")
            return super().chat(messages, **options)
    ai = act("Edit Script (AI)", script_name="train.py", edit_instruction="use 9", save_name="train.py")
    results = play(settings(tmp_path, coder="model", trajectories=1), Coder([[ai, END]]))
    assert results["tasks"]["tiny-task"]["trajectories"][0]["last-valid"] == 1
    assert asked == [zlib.crc32(b"0 tiny-task 0 0 coder")]


# -- the command

class Speaker(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that answers with SCRIPTS[0]; `server.hold_at` replies are given before it hangs. At
    a reply that is None it goes down."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        self.server.turns.append(turn)
        if turn == self.server.hold_at:
            self.server.held.set()
            self.server.go.wait(600)
        choice = {"message": {"content": self.server.script[turn]}, "finish_reason": "stop"}
        self.server.is_up &= self.server.script[turn] is not None
        data = json.dumps({"choices": [choice] if self.server.is_up else []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), Speaker)
    http.daemon_threads = True
    http.script = SCRIPTS[0]
    http.hold_at = None
    http.turns = []
    http.held = threading.Event()
    http.go = threading.Event()
    http.is_up = True
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield http
    http.go.set()
    http.shutdown()
    http.server_close()


def command(tmp_path, *more, port=None):
    model = ["--model", f"http://127.0.0.1:{port}/v1#scripted", "--coder", "none"] if port else []
    return [sys.executable, str(ROOT / "eval.py"), "--task", "tiny-task", "--data", str(tmp_path / "data"),
            "--out", str(tmp_path / "out"), "--trajectories", "1", "--steps", "5", *model, *more]


def test_without_a_model_the_command_scores_the_starter_and_says_how_to_get_one(tmp_path, task, capsys):
    assert evaluation.main(command(tmp_path)[2:]) == 0
    said = capsys.readouterr().out
    assert MINIATURE in said and "7.0000" in said and "--model" in said


@pytest.mark.parametrize("flags, words", [
    (["--task", "tiny-tusk"], "tiny-task"), (["--modle", "x"], "did you mean --model"),
    (["--steps", "0"], "--steps must be above 0"), (["--final", "best"], "last-valid or best-validation"),
    (["--actions", "Fly"], "--actions: expected a list of some of"), (["--raw", "/nowhere"], "truth.csv from nowhere"),
    (["--model", "/no/such/model"], "/no/such/model")])
def test_bad_arguments_end_with_status_2_and_a_reason(flags, words, tmp_path, task, capsys):
    try:
        status = evaluation.main([*command(tmp_path)[2:], *flags])
    except SystemExit as end:
        status = end.code
    assert status == 2 and words in capsys.readouterr().err


def test_the_process_ends_with_that_status(tmp_path, task):
    run = subprocess.run(command(tmp_path, "--steps", "0"), capture_output=True, text=True, timeout=600)
    assert run.returncode == 2 and "Traceback" not in run.stderr


def test_ctrl_c_while_waiting_for_a_reply_leaves_what_can_be_continued(tmp_path, task, server, capsys):
    server.hold_at = 2
    with subprocess.Popen(command(tmp_path, port=server.server_port), stderr=subprocess.PIPE, text=True) as run:
        assert server.held.wait(600)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=600)
    assert run.returncode == 1 and "interrupted" in said and "the same command goes on" in said
    lines = records.read_record(tmp_path / "out" / "trajectories" / "tiny-task-0.jsonl")
    assert [line["type"] for line in lines] == ["header", "step", "step"]
    server.hold_at = None
    server.turns.clear()
    assert evaluation.main(command(tmp_path, port=server.server_port)[2:]) == 0
    assert server.turns == [2, 3]
    again = capsys.readouterr()
    assert "1/1 trajectories" in again.err and "1.0000" in again.out


def scripts_below(pid):
    """Process ids of the train.py that run below a process."""
    def below(child):
        return child == pid or bool(child) and below(parent(child))
    return {child for child in processes("train.py") if below(child)}


def test_ctrl_c_while_a_script_runs_ends_the_script(tmp_path, task, server):
    server.script = [edit(3, 8), edit(8, "3\nimport time\ntime.sleep(600)"), END]
    with subprocess.Popen(command(tmp_path, port=server.server_port), stderr=subprocess.PIPE, text=True) as run:
        assert wait_until(lambda: server.turns == [0, 1])
        assert wait_until(lambda: scripts_below(run.pid))
        script = scripts_below(run.pid)
        run.send_signal(signal.SIGTERM)     # ends it as Ctrl-C does
        run.communicate(timeout=600)
    assert run.returncode == 1
    assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in script))
    lines = records.read_record(tmp_path / "out" / "trajectories" / "tiny-task-0.jsonl")
    assert [line.get("score") for line in lines] == [None, 2.0]


def test_an_endpoint_that_stays_down_ends_the_command_clearly(tmp_path, task, server, monkeypatch, capsys):
    monkeypatch.setattr(sample.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    server.script = [*SCRIPTS[0][:2], None]
    argv = command(tmp_path, port=server.server_port)[2:]
    assert evaluation.main(argv) == 1
    said = capsys.readouterr()
    assert f"http://127.0.0.1:{server.server_port}/v1/chat/completions answered, but not with" in said.err
    assert "the same command goes on" in said.err and "1.0000" not in said.out
    server.script = SCRIPTS[0]
    server.is_up = True
    assert evaluation.main(argv) == 0
    assert "1.0000" in capsys.readouterr().out


def test_what_a_killed_program_leaves_is_removed_by_the_next(tmp_path):
    """The folder of a program that still runs stays, and so does what is not of these programs, or another user's. A
    pipe in place of its lock is not waited for."""
    code = f"""
import os, signal, sys, tempfile
sys.path.insert(0, {str(Path(evaluation.__file__).parent)!r})
from support import cli
for line in sys.stdin:
    if (program := os.fork()) == 0:
        cli.run_main(lambda: (print(os.getpid(), tempfile.gettempdir(), flush=True), signal.pause()))
    if line == "wait\\n":
        os.waitpid(program, 0)
"""
    programs = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                env={**os.environ, "TMPDIR": str(tmp_path)}, start_new_session=True)
    guard = threading.Timer(600, os.killpg, (programs.pid, signal.SIGKILL))     # if one of them does not begin
    guard.start()

    def start(line="go on"):
        programs.stdin.write(line + "\n")
        programs.stdin.flush()
        said = programs.stdout.readline().split()
        assert len(said) == 2, "the program ended; what it said stands above"
        return int(said[0]), Path(said[1])
    stay = ["ml-agent-mine", "ml-agent-run-of-a-script", *["ml-agent-program-of-another"] * (os.geteuid() == 0)]
    for name in stay:
        (tmp_path / name).mkdir()
        (tmp_path / name / OWNER).touch()
        if name.endswith("another"):
            os.chown(tmp_path / name, 65534, 65534)
    (tmp_path / "ml-agent-program-link").symlink_to("ml-agent-mine")
    (tmp_path / "ml-agent-program-pipe").mkdir()
    os.mkfifo(tmp_path / "ml-agent-program-pipe" / OWNER)
    (alive, used) = start()
    (killed, left) = start("wait")
    (left / "run").mkdir()
    os.kill(killed, signal.SIGKILL)
    third, own = start()
    assert left.parent == tmp_path and not left.exists() and used.is_dir() and own.is_dir()
    for pid in (alive, third):
        os.kill(pid, signal.SIGTERM)
    programs.communicate()      # until all have ended
    guard.cancel()
    assert {path.name for path in tmp_path.iterdir()} == {*stay, "ml-agent-program-link"}
    assert all((tmp_path / name / OWNER).exists() for name in stay)


def test_a_program_ends_its_scripts_before_it_deletes_their_folders(tmp_path):
    """Else a script that misses its files would end with an error, and that would be recorded as its result."""
    code = f"""
import sys, tempfile, threading, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from support import cli, sandbox

def call():
    try:
        print(sandbox.execute("a.py", folder, sandbox="off", timeout_s=600, memory_bytes=1 << 30))
    finally:
        print("came back", flush=True)

def main():
    global folder
    folder = Path(tempfile.mkdtemp())
    folder.joinpath("a.py").write_text("while open('a.py'): open('started', 'w')")
    thread.start()
    while not folder.joinpath("started").exists():
        time.sleep(0.01)
    raise KeyboardInterrupt

def remove(folder, remove=cli.remove):
    remove(folder)
    thread.join(0.5)
thread = threading.Thread(target=call)
cli.remove = remove
cli.run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, text=True,
                          capture_output=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "") and list(tmp_path.iterdir()) == []


PIPED = """
import select, signal, threading
from support import cli

def work():
    threading.Thread(target=threading.Event().wait).start()     # it waits for a reply that never comes
    try:
        print("ready", flush=True)
        print("what is still in the buffer")
        signal.pause()
    finally:
        pipe = select.poll()
        pipe.register(1, 0)
        pipe.poll()     # returns when nobody reads any more
cli.run_main(lambda: cli.exit_status("program", work, "runs"))
"""


@pytest.mark.parametrize("stderr", [subprocess.STDOUT, subprocess.DEVNULL], ids=["both", "stdout"])
def test_ctrl_c_ends_a_program_at_once_whose_output_nobody_reads_any_more(stderr, tmp_path):
    """As in `program 2>&1 | tee log` and `program | tee log`, where Ctrl-C ends both: what it says last cannot be
    written, and a thread still waits."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": ""}
    program = subprocess.Popen([sys.executable, "-c", PIPED], stdout=subprocess.PIPE, stderr=stderr, env=environment,
                               process_group=0)
    try:
        (tmp_path / "log").touch()
        with subprocess.Popen(["tee", tmp_path / "log"], stdin=program.stdout, stdout=subprocess.DEVNULL,
                              process_group=program.pid):
            program.stdout.close()
            assert wait_until(lambda: "ready" in (tmp_path / "log").read_text())
            os.killpg(program.pid, signal.SIGINT)
        assert program.wait(600) == 1
    finally:
        program.kill()
        program.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_file_in_place_of_a_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()

    def work():
        with files.folder_lock(tmp_path / "file", "eval.py"):
            pass
    assert cli.exit_status("eval.py", work, tmp_path) == 1
    assert "eval.py: [Errno 17] File exists" in capsys.readouterr().err


def test_a_folder_is_free_though_a_process_forked_meanwhile_lives_on(tmp_path):
    """A script that is being started has the lock's file open for a moment, too."""
    with files.folder_lock(tmp_path, "eval.py"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        with pytest.raises(ValueError, match="another eval.py"), files.folder_lock(tmp_path, "eval.py"):
            pass
    try:
        with files.folder_lock(tmp_path, "eval.py"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
