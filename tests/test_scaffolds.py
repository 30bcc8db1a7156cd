"""Other papers' scaffolds: AIDE's search and MLAgentBench's loop."""
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

import env
import eval as evaluation
import tasks
from common import add_task
from support.tokenizer import Tokenizer
from support import aide, cli, conversations, endpoint, mlagentbench, pool, records, storage, workspace
from test_eval import (
    ROOT, STARTER, Scripted, exported, file_of, made, play, settings, task, text_of)    # noqa: F401
from test_report import drawn, needs_node

ORIGINAL = json.loads((Path(__file__).parent / "aide_nodes.json").read_text())
assert sum(len(world["steps"]) for world in ORIGINAL["worlds"]) == 480      # all that was recorded


# -- the search

@pytest.mark.parametrize("world", ORIGINAL["worlds"])
def test_the_search_is_that_of_the_original_node_by_node(world):
    """What aideml chose in worlds whose reviewer, scripts and random source followed a list."""
    direction = "down" if world["lower_is_better"] else "up"
    knobs = [world[name] for name in ("num_drafts", "debug_prob", "max_debug_depth")]
    nodes = []
    for step in world["steps"]:
        is_bug, failed, metric, roll, pick, operator, parent, buggy, best = step
        rng = SimpleNamespace(random=lambda: roll, choice=lambda nodes: nodes[int(pick * len(nodes))])
        assert aide.choose(nodes, direction, rng, knobs) == (operator.capitalize(), parent)
        node = aide.Node(parent, metric=metric, buggy=is_bug or failed or metric is None)
        nodes.append(node)
        assert (node.buggy, aide.best_node(nodes, direction)) == (buggy, best)


# -- plan, script and verdict

@pytest.mark.parametrize("reply, plan, script", [
    ("A plan.\n```python\nx = 1\n```\nmore", "A plan.", "x = 1\n"),
    ("A plan.\n```\nx = 1\n```\nthen\n```python\ny = 2\n```", "A plan.", "x = 1\n\ny = 2\n"),
    ("A plan.\n```python\nx = (\n```\n```python\ny = 2\n```", "A plan.", "y = 2\n"),     # one does not compile
    ("```python\nx = 1\n```", "", "x = 1\n"), ("x = 1", "x = 1", ""), ("A plan in words.", "A plan in words.", ""),
    ("A plan.\n```python\nx = 1", "A plan.", ""), ("", "", ""),
    ("A plan.\n```python\n" + "(" * 5000 + "\n```", "A plan.", ""), ("A plan.\n```\nx\0 = 1\n```", "A plan.", ""),
    ("A plan.\n```\n" + "#" * 60_000 + "\n```", "A plan.", "")])
def test_plan_and_script_of_a_reply(reply, plan, script):
    assert aide.plan_and_script(reply) == (plan, script)


@pytest.mark.parametrize("reply, verdict", [
    ('```json\n{"is_bug": false, "summary": "fine", "metric": 0.5, "lower_is_better": true}\n```',
     (False, "fine", 0.5)),
    ('{"is_bug": true} and {"is_bug": false, "metric": 1}', (False, "", 1)),      # the last; a whole number
    *((f'{{"is_bug": false, "metric": {word}}}', (False, "", None)) for word in ("NaN", '"1"', "true", "1e999")),
    ('{"is_bug": false, "metric": 2, "more": {"is": "nested"}}', (False, "", 2)),
    ('{"is_bug": "no", "metric": 1}', None), ("it works", None), ("[" * 3000 + "{" * 3000, None), ("", None)])
def test_the_verdict_of_a_reviewer(reply, verdict):
    found = aide.read_review(reply)
    assert (found and tuple(found[name] for name in ("is_bug", "summary", "metric"))) == verdict


# -- AIDE in the environment

def solution(value, printed=None, extra=""):
    """A reply whose script predicts a value where all answers are 10, and prints another."""
    printed = abs(value - 9.5) if printed is None else printed
    return f"""I predict {value}.
```python
{extra}
print("validation MAE:", {printed})
open("submission.csv", "w").write("id,y\\n1,{value}\\n2,{value}\\n")
```"""


BROKEN = "I divide.\n```python\nprint(1 / 0)\n```"
SILENT = "I write nothing.\n```python\nprint('validation MAE: 0.001')\n```"
WILD = solution(99, 0.25)       # prints well and predicts badly
# of the task whose starter scores 7: the draws of seed 0 are below
REPLIES = [solution(3), BROKEN, solution(8), SILENT, "no script at all", solution(9), solution(6), solution(9.25),
           BROKEN, solution(7)]


class Model:
    """Coder and reviewer. The coder follows a list, by the seed of each step; the reviewer reports the number that
    stands in the output, or follows a function. All prompts are kept."""
    context = 16_384

    def __init__(self, replies=REPLIES, review=None, kill_at=None, task="tiny-task"):
        self.replies = replies
        self.seeds = [zlib.crc32(f"0 {task} 0 {i} policy".encode()) for i in range(len(replies))]
        self.review = review or (lambda output: json.dumps(
            {"is_bug": False, "summary": "It ran.", "metric": float(output.split("MAE: ")[1].split()[0]),
             "lower_is_better": True}))
        self.prompts = []
        self.review_seeds = []
        self.kill_at = kill_at

    def chat(self, messages, *, seed, max_new_tokens, temperature, top_p, stop):
        (message,) = messages
        assert message["role"] == "user"
        self.prompts.append(message["content"])
        if '"is_bug"' in message["content"]:
            self.review_seeds.append(seed)
            text = self.review(message["content"].split("# Execution output")[1])
        else:
            index = next(i for i, first in enumerate(self.seeds) if 0 <= seed - first < aide.TRIES)
            if index == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            text = self.replies[index]
        return endpoint.Completion(text, [1, 2, 3], [0.0] * 3, "stop", 100, 50, 0.01,
                                   no_reply="" if text else "The reply was empty.")


def aide_settings(tmp_path, out="out", **more):
    return settings(tmp_path, out, **{"scaffold": "aide", "trajectories": 1, "steps": 10, "coder": "model", **more})


def steps_of(cfg):
    return [line for line in records.read_record(file_of(cfg, 0)) if line["type"] == "step"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A whole search, which no test changes: (settings, the model, the recorded steps)."""
    folder = tmp_path_factory.mktemp("tree")
    add_task(folder / "tasks", "tiny-task", 10, "held-out", STARTER)
    model = Model()
    cfg = aide_settings(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "FOLDERS", [folder / "tasks"])
        play(cfg, model)
    return cfg, model, steps_of(cfg)


def test_replay_from_the_command_line(tree, task):
    done = subprocess.run([sys.executable, "env.py", "replay", file_of(tree[0], 0), "--data", tree[0].data], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "10 steps replayed, 0 differences\n"), done.stderr


def test_a_search_by_hand(tree):
    """By the draws of seed 0. A working node prints |value - 9.5| and scores |value - 10|."""
    cfg, model, steps = tree
    found = [(step["action"], step["node"]["parent"], step["node"].get("metric"), step["score"], step["node"]["best"])
             for step in steps]
    assert found == [
        ("Draft", None, 6.5, 7.0, 0), ("Draft", None, None, None, 0), ("Draft", None, 1.5, 2.0, 2),
        ("Draft", None, None, None, 2), ("Draft", None, None, None, 2), ("Improve", 2, 0.5, 1.0, 5),
        ("Improve", 5, 3.5, 4.0, 5), ("Improve", 5, 0.25, 0.75, 7), ("Improve", 7, None, None, 7),
        ("Debug", 1, 2.5, 3.0, 7)]
    assert [step["outcome"] for step in steps if step["node"]["buggy"]] == ["error", "no submission", "error", "error"]
    # what a step is compared with is the node it is made from, and what stays is the best
    assert [step["m_before"] for step in steps] == [7, 7, 7, 7, 7, 2, 1, 1, 0.75, 7]
    assert [step["m_after"] for step in steps] == [7, 7, 2, 2, 2, 1, 1, 0.75, 0.75, 0.75]
    results = json.loads(Path(cfg.out, "results.json").read_text())
    (played,) = results["tasks"]["tiny-task"]["trajectories"]
    assert (played["best-validation"], played["last-valid"], played["ended"]) == (0.75, 3.0, "steps")
    work = results["tasks"]["tiny-task"]["work"]
    assert work.pop("seconds") > 0
    assert work == {"scripts": 10, "nodes": 10, "buggy": 4, "unreviewed": 0, "unprinted": 0}
    words = "5 drafts, debugging with probability 0.5 to depth 3, reviewer: scripted; 4 of 10 nodes buggy"
    assert words in text_of(results)


def test_a_reply_without_a_script_is_asked_for_three_times_and_is_one_buggy_node(tree):
    cfg, model, steps = tree
    assert len(model.prompts) == 10 + 2 + 6      # one a node, two more tries of node 4, a review of each that ran
    assert steps[4]["node"]["buggy"] and not steps[4]["valid"]
    assert steps[4]["dropped"] == ["no script at all"] * 2 and steps[4]["tokens"] == 9


def test_each_prompt_has_its_sections_and_no_graded_score(tree):
    cfg, model, steps = tree
    shown = {step["action"]: step["messages"][0]["content"] for step in steps} | {"Review": model.prompts[-1]}
    headings = {name: re.findall("^# (.*)", text, re.M) for name, text in shown.items()}
    both = ["Response format", "Solution sketch", "Implementation"]
    assert headings == {
        "Draft": ["Introduction", "Task description", "Memory", *both, "Installed packages", "Data overview"],
        "Improve": ["Introduction", "Task description", "Memory", "Previous solution", *both],
        "Debug": ["Introduction", "Task description", "Previous solution", "Execution output", *both, "Data overview"],
        "Review": ["Introduction", "Task description", "Previous solution", "Execution output", "Response format"]}
    # the memory has the working nodes in order, and nothing of the others
    memory = re.search("# Memory(.*)# Previous", steps[8]["messages"][0]["content"], re.S)[1]
    designs = [f"Design: I predict {value}.\nResults: It ran.\nValidation score: {metric}"
               for value, metric in ((3, 6.5), (8, 1.5), (9, 0.5), (6, 3.5), (9.25, 0.25))]
    assert memory.strip() == "\n\n---\n\n".join(designs)
    assert "print(1 / 0)" in shown["Debug"] and "ZeroDivisionError" in shown["Debug"]
    assert "- id: 2 values: 1, 2" in shown["Draft"] and re.search(r" 0 steps and \d+ min are left", shown["Debug"])
    assert all("best score" not in prompt for prompt in model.prompts)


def test_no_prompt_tells_a_graded_score(tmp_path, task):
    """Scores that stand nowhere else: all graded ones end in .0625."""
    model = Model([solution(value + 0.0625, printed=value) for value in range(8)])
    cfg = aide_settings(tmp_path, steps=8)
    play(cfg, model)
    scores = {step["score"] for step in steps_of(cfg)}
    assert scores == {10 - value - 0.0625 for value in range(8)}
    assert not any(str(score) in prompt for prompt in model.prompts for score in scores)


def lines_without_clocks(cfg):
    free = ("seconds", "seconds_left", "time_left_s", "script_seconds")
    lines = [{name: value for name, value in line.items() if name not in free}
             for line in records.read_record(file_of(cfg, 0))]
    return records._masked(json.dumps(lines).replace(cfg.data, "data"))


def killed(folder):
    """In a process of its own, which is killed while node 7 is asked for."""
    tasks.FOLDERS.append(Path(folder, "tasks"))
    play(aide_settings(Path(folder), "killed"), Model(kill_at=7))


def test_a_killed_search_goes_on_as_if_nothing_had_been(tree, forks, tmp_path, task):
    forks.start("import sys, test_scaffolds; test_scaffolds.killed(sys.argv[1])", tmp_path)
    (status, said), = forks.end()
    assert status == -signal.SIGKILL, said
    cfg = aide_settings(tmp_path, "killed")
    assert len(steps_of(cfg)) == 7
    model = Model()
    play(cfg, model)
    assert lines_without_clocks(cfg) == lines_without_clocks(tree[0])
    assert len(model.prompts) == 3 + 2      # three nodes, of which two ran and were reviewed


def test_a_script_that_prints_better_than_it_predicts_is_believed_and_graded(tmp_path, task):
    cfg = aide_settings(tmp_path, steps=2)
    results = play(cfg, Model([solution(9), WILD]))
    (played,) = results["tasks"]["tiny-task"]["trajectories"]
    assert (played["best-validation"], played["oracle"]) == (89.0, 1.0)
    assert "89.0000" in text_of(results)


def test_of_equal_scores_the_first_counts_and_no_starter_is_a_candidate(tmp_path, task):
    cfg = aide_settings(tmp_path, steps=3)
    results = play(cfg, Model([solution(2, printed=9), solution(1, printed=8), solution(0, printed=8)]))
    assert results["tasks"]["tiny-task"]["printed"] == 6.5      # of the starter, which is better
    assert results["tasks"]["tiny-task"]["trajectories"][0]["best-validation"] == 9.0


def test_where_no_node_works_the_trajectory_has_failed(tmp_path, task):
    cfg = aide_settings(tmp_path, steps=6)
    results = play(cfg, Model([BROKEN] * 6))
    assert [step["action"] for step in steps_of(cfg)] == ["Draft"] * 6     # by the draws of seed 0
    (played,) = results["tasks"]["tiny-task"]["trajectories"]
    assert played["best-validation"] is None
    figures = results["tasks"]["tiny-task"]["figures"]["best-validation"]
    assert (figures["average"], figures["failed"]) == (7.0, 1)


def test_what_the_reviewer_says_of_the_direction_changes_nothing(tree, tmp_path, task):
    def flipped(output):
        return Model().review(output).replace('"lower_is_better": true', '"lower_is_better": false')
    cfg = aide_settings(tmp_path, "flipped")
    play(cfg, Model(review=flipped))
    assert '"lower_is_better": false' in steps_of(cfg)[0]["coder"][0]
    assert [step["node"] for step in steps_of(cfg)] == [step["node"] for step in tree[2]]


@pytest.mark.parametrize("review, coder, num_reviews, node", [
    (lambda output: "I have no idea.", "model", 3, {"metric": 0.5, "buggy": False, "review": "script"}),
    (None, "none", 0, {"metric": 0.5, "buggy": False, "review": "script"}),
    (lambda output: '{"is_bug": true, "metric": 0.5}', "model", 1, {"metric": 0.5, "buggy": True, "review": "model"}),
    (lambda output: '{"is_bug": false, "metric": null}', "model", 1, {"metric": None, "buggy": True}),
    (lambda output: '{"is_bug": false, "metric": 0.125}', "model", 1, {"metric": 0.125, "is_printed": False}),
    (lambda output: '{"is_bug": false, "metric": -0.5}', "model", 1, {"metric": -0.5, "is_printed": True}),
    (lambda output: f'{{"is_bug": false, "metric": {output.split("limit: ")[1].split()[0]}}}', "model", 1,
     {"metric": tasks.MINIATURE_S, "is_printed": False})])      # a number that we have added
def test_a_verdict_or_none(review, coder, num_reviews, node, tmp_path, task):
    cfg = aide_settings(tmp_path, steps=1, coder=coder)
    model = Model([solution(9)], review)
    play(cfg, model)
    (step,) = steps_of(cfg)
    assert len(set(model.review_seeds)) == num_reviews      # each of them may come out differently
    assert {name: step["node"][name] for name in node} == node
    assert len(step["coder"]) == num_reviews
    assert records.replay(file_of(cfg, 0), data=cfg.data) == 0


def test_an_empty_reply_of_the_reviewer_is_one_of_three_tries(tmp_path, task):
    """A step's replies: none and a verdict; none, one without a verdict, and none."""
    replies = iter(["", '{"is_bug": false, "metric": 0.125}', "", "I have no idea.", ""])
    cfg = aide_settings(tmp_path, steps=2)
    play(cfg, Model([solution(9)] * 2, lambda output: next(replies)))
    first, second = steps_of(cfg)
    assert (first["node"]["review"], first["node"]["metric"], len(first["coder"])) == ("model", 0.125, 1)
    assert (second["node"]["review"], second["node"]["metric"], len(second["coder"])) == ("script", 0.5, 1)
    assert next(replies, None) is None and records.replay(file_of(cfg, 0), data=cfg.data) == 0


def test_a_reviewer_is_not_asked_again_what_is_too_long_for_it(tmp_path, task):
    asked = []

    def too_long(output):
        asked.append(output)
        raise cli.ContextFull("the conversation is longer than it takes")
    cfg = aide_settings(tmp_path, steps=1)
    play(cfg, Model([solution(9)], too_long))
    assert len(asked) == 1 and steps_of(cfg)[0]["node"]["review"] == "script"


def test_the_first_look_at_the_data_costs_no_time(tmp_path, task, monkeypatch):
    cfg = aide_settings(tmp_path)
    tasks.prepare("tiny-task", data=cfg.data, log=lambda line: None)
    clock = [1000.0]

    def preview(public):
        clock[0] += 50
        return "one large table"
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(aide, "preview", preview)
    made = aide.Env("tiny-task", cfg.data, out=tmp_path / "out", seconds=600)
    assert "one large table" in made.messages[0]["content"] and made.deadline == 1050 + 600
    made.restore(made.snapshot(), made.messages, seconds=70)
    assert made.deadline == 1050 + 70


def test_a_step_without_a_node_is_a_difference_and_no_crash(tmp_path, task):
    """The first step lacks it, and the second looks back at it; what that one says of itself is as recorded."""
    cfg = aide_settings(tmp_path, steps=2)
    play(cfg, Model([solution(8), solution(9)]))
    lines = [json.loads(line) for line in file_of(cfg, 0).read_text().splitlines()]
    assert lines[2]["node"]["best"] == 1
    del lines[1]["node"]
    file_of(cfg, 0).write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = []
    assert records.replay(file_of(cfg, 0), said.append, data=cfg.data) == 1
    assert said[0].startswith("step 0, node:\n  recorded: None\n  replayed: {'metric': 1.5")


def test_the_setting_of_mle_bench_always_debugs(tmp_path, task):
    cfg = aide_settings(tmp_path, search="mle-bench", steps=9)
    play(cfg, Model([BROKEN] * 9))
    assert [step["action"] for step in steps_of(cfg)] == ["Draft"] * 5 + ["Debug"] * 4


@pytest.mark.parametrize("change, words", [
    ({"parent": 6}, "names as its parent a later step"), ({"best": 7}, "names as its best a later step"),
    ({"metric": "1"}, "expected a finite number"), ({"buggy": 1}, "expected true or false")])
def test_a_tree_of_others_is_checked(change, words, tree, tmp_path):
    lines = file_of(tree[0], 0).read_text().splitlines()
    line = json.loads(lines[7])     # of step 6
    line["node"] |= change
    path = tmp_path / "tiny-task-0.jsonl"
    path.write_text("\n".join([*lines[:7], json.dumps(line), *lines[8:], ""]))
    with pytest.raises(ValueError, match=words):
        records.read_record(path)


def test_it_is_neither_trained_on_nor_a_start_of_training(tmp_path, task):
    add_task(task.parent, "learned-task", 10, "held-in", STARTER)
    cfg = aide_settings(tmp_path, steps=1, task="learned-task")
    play(cfg, Model([solution(9)], task="learned-task"))
    folder = Path(cfg.out, "trajectories")
    with pytest.raises(ValueError, match="of the scaffold aide"):
        conversations.read_conversations(folder, cfg.data, log=lambda line: None)
    training = SimpleNamespace(trajectories=folder, data=cfg.data, task="all")
    with pytest.raises(ValueError, match="of the scaffold aide"):
        pool.load_pool(training, Tokenizer.of_bytes())


def test_settings_that_do_not_go_together(capsys):
    for flags, words in [(["--scaffold", "aide"], "needs a --model"), (["--search", "mle", "--model", "x"], "must be"),
                         (["--search", "mle-bench", "--model", "x"], "is for --scaffold aide alone, found ml-agent"),
                         (["--scaffold", "tree", "--model", "x"], "must be")]:
        with pytest.raises(SystemExit):
            cli.parse(evaluation.Settings, flags, evaluation.fill)
        assert words in capsys.readouterr().err
    flags = ["--scaffold", "aide", "--model", "x", "--temperature", "0.1"]
    cfg = cli.parse(evaluation.Settings, flags, evaluation.fill)
    assert (cfg.temperature, cfg.max_new_tokens, cfg.search) == (0.1, 4096, "aide")


def test_exports_are_evaluated_with_a_scaffold(exported):
    flags = ["--exports", "runs/rl", "--scaffold", "aide", "--steps", "1", "--trajectories", "1"]
    cfg = cli.parse(evaluation.Settings, flags, evaluation.fill)
    assert (cfg.temperature, cfg.max_new_tokens, cfg.context) == (0.5, 4096, 16_384)
    agents, taken = evaluation.agents_exported(cfg)
    runs = evaluation.evaluate(cfg, agents, load=lambda spec, **options: Model([solution(9)]), exports=taken)
    assert [run["results"]["tasks"]["tiny-task"]["work"]["nodes"] for run in runs] == [1, 1, 1]


def test_the_preview_of_the_data_by_hand(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(31):
        (tmp_path / "images" / f"{i:02}.png").write_bytes(b"0123")
    rows = "".join(f"{i},{i / 4},{'yes' if i % 3 else ''},{i % 2 == 0},word {i}\n" for i in range(12))
    (tmp_path / "train.csv").write_text("id,x,y,flag,text\n" + rows)
    (tmp_path / "notes.txt").write_text("Read me.\n")
    assert aide.preview(tmp_path) == """\
data/
  notes.txt (9 bytes)
  train.csv (285 bytes)
data/images/
  00.png (4 bytes)
  01.png (4 bytes)
  02.png (4 bytes)
  03.png (4 bytes)
  ... and 27 other files

data/notes.txt:
Read me.


data/train.csv has 12 rows and 5 columns.
- id: from 0 to 11
- x: from 0 to 2.75
- y: 1 values: yes, 4 blank
- flag: 2 values: True, False
- text: 12 values: word 0, word 1, word 2, word 3"""


def test_the_preview_of_wide_tables_is_cut_in_each(tmp_path):
    wide = ",".join(f"column{i}" for i in range(400))
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(f"{wide}\n{wide}\n")
    text = aide.preview(tmp_path)
    assert 5900 < len(text) <= 6000
    for name in "ab":
        assert f"data/{name}.csv has 1 rows and 400 columns.\n- column0: 1 values: column0\n" in text
    assert text.count("characters cut") == 2 and text.endswith("- column399: 1 values: column399")


@pytest.mark.parametrize("text, line", [
    ('[{"id": 1, "name": "a"}]', "data/a.json holds records: id (int), name (str)."),
    ('{"id": 1', ""), ("", ""), ("[1, 2]", ""), ('[{"text": "' + "a" * (1 << 20) + '"}]', "")])
def test_the_preview_of_records(tmp_path, text, line):
    """What is no record, or a longer one than is read, is left out; the file is named all the same."""
    (tmp_path / "a.json").write_text(text)
    tree, _, records = aide.preview(tmp_path).partition("\n\n")
    assert tree == f"data/\n  a.json ({len(text):,} bytes)" and records == line


@needs_node
def test_the_report_draws_the_tree(tree):
    page = drawn(Path(tree[0].out, "report.html"), "#tiny-task-0-7")
    (svg,) = page.all("svg", class_="tree")
    links = page.all("a", svg)
    assert [link.attributes["href"] for link in links] == [f"#tiny-task-0-{i}" for i in range(10)]
    assert page.texts("title", links[7]) == ["step 7: Improve, works, reported 0.2500, graded 0.7500"]
    places = []
    for link in links:
        circle = page.all("circle", link)[0]
        places.append([float(circle.attributes[name]) for name in ("cx", "cy")])
    assert [page.all("circle", link)[0].attributes["class"] for link in links] == [
        "dot k0" if i in (1, 3, 4, 8) else "dot k4" for i in range(10)]
    assert [len(page.all("circle", link, class_="best")) for link in links] == [0] * 7 + [1, 0, 0]
    edges = page.points(svg, class_="zero")
    assert sorted(edges) == sorted([*places[parent], *places[child]]
                                   for parent, child in ((2, 5), (5, 6), (5, 7), (7, 8), (1, 9)))
    assert len({tuple(place) for place in places}) == 10
    assert page.texts("text", svg)[-2:] == ["9", "2.5000"]
    first = page.all("section", id="tiny-task-0-0")[0]
    script = page.all("details", first, class_="diff")[0]
    assert page.texts("summary", script) == ["Script"] and len(page.texts("span", script, class_="add")) == 2


def test_runs_of_different_scaffolds_stand_side_by_side(tree, tmp_path, task):
    ours = settings(tmp_path, "ours", trajectories=1)
    play(ours, Scripted())
    path = evaluation.compare(settings(tmp_path, "new", model="", task="", compare=(tree[0].out, ours.out)))
    rows = re.findall('"average": "([^"]*)"', path.read_text())
    assert rows == ["0.7500", "1.0000"]
    assert "Scaffold: aide" in path.read_text() and "Scaffold: ml-agent" in path.read_text()


# -- MLAgentBench's loop

HEAD = "Reflection: none\nResearch Plan and Status: **1. edit**\nFact Check: none\nThought: do it\n"
EDIT = {"script_name": "train.py", "edit_instruction": "Set it.", "save_name": "train.py"}


def said(action, source):
    return f"{HEAD}Action: {action}\nAction Input: {source}"


LIST = said("List Files", '{"dir_path": "."}')
EXECUTE = said("Execute Script", '{"script_name": "train.py"}')
FINAL = said("Final Answer", '{"final_answer": "done"}')
NO_INPUT = said("Execute Script", "no json")


class Assistant:
    """Follows a list of replies, whichever seed is asked for; as a coder it writes the scripts of another list, of each
    up to a text that ends it."""
    context = 16_384

    def __init__(self, replies, scripts=(), kill_at=None):
        self.replies = list(replies)
        self.scripts = list(scripts)
        self.prompts = []
        self.questions = []
        self.kill_at = kill_at

    def chat(self, messages, *, stop, **options):
        if "You are a helpful research assistant" not in messages[0]["content"]:
            self.questions.append(messages[0]["content"])
            text = self.scripts.pop(0)
            if stop:
                text = text.partition(stop)[0]
        else:
            if len(self.prompts) == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            assert stop == ("Observation:",)
            self.prompts.append(messages[0]["content"])
            text = self.replies.pop(0)
        return endpoint.Completion(text, [1, 2, 3], [0.0] * 3, "stop", 100, 50, 0.01)


def loop(tmp_path, replies, scripts=(), **more):
    """Plays these replies: (settings, the model, the steps)."""
    more = {"scaffold": "mlagentbench", "trajectories": 1, "coder": "model", "final": "last-valid",
            "actions": tuple(mlagentbench.TOOLS), **more}
    cfg = settings(tmp_path, **more)
    model = Assistant(replies, scripts)
    play(cfg, model)
    assert records.replay(file_of(cfg, 0), data=cfg.data) == 0
    return cfg, model, steps_of(cfg)


# an edit, unreadable replies, an error that is forgotten, and one that is not
LONG_LOOP = [LIST, "x", said("Edit Script (AI)", json.dumps(EDIT)), EXECUTE, NO_INPUT, "x", "y", EXECUTE, LIST,
             NO_INPUT, FINAL]
NEW_SCRIPT = f"```python\n{STARTER.replace('VALUE = 3', 'VALUE = 8')}```\n"


def killed_loop(folder):
    """In a process of its own, which is killed while the reply after the forgotten error is asked for."""
    tasks.FOLDERS.append(Path(folder, "tasks"))
    cfg = aide_settings(Path(folder), "killed", scaffold="mlagentbench", actions=tuple(mlagentbench.TOOLS))
    play(cfg, Assistant(LONG_LOOP, [NEW_SCRIPT], kill_at=7))


def test_a_killed_loop_goes_on_as_if_nothing_had_been(forks, tmp_path, task):
    forks.start("import sys, test_scaffolds; test_scaffolds.killed_loop(sys.argv[1])", tmp_path)
    more = {"scaffold": "mlagentbench", "actions": tuple(mlagentbench.TOOLS)}
    whole = aide_settings(tmp_path, "whole", **more)
    uninterrupted = Assistant(LONG_LOOP, [NEW_SCRIPT])
    play(whole, uninterrupted)
    (status, said), = forks.end()
    assert status == -signal.SIGKILL, said
    cfg = aide_settings(tmp_path, "killed", **more)
    assert [step["action"] for step in steps_of(cfg)] == [
        "List Files", "Edit Script (AI)", "Execute Script", "Execute Script"]
    model = Assistant(LONG_LOOP[5:])        # the replies that were dropped are asked for again
    play(cfg, model)
    assert lines_without_clocks(cfg) == lines_without_clocks(whole)
    assert model.prompts == uninterrupted.prompts[5:]


def test_a_report_with_blocks_of_code_comes_whole(tmp_path, task):
    look = said("Understand File", '{"file_name": "train.py", "things_to_look_for": "all"}')
    report = "Line 1:\n```\nVALUE = 3\n```\nLine 2:\n```\nprint()\n```\nNo more."
    cfg, model, steps = loop(tmp_path, [look, FINAL], [report])
    assert steps[0]["observation"] == report


ASKED_AGAIN = "it is asked for again"
ERROR = "the step shows an error"


@pytest.mark.parametrize("reply, expected", [
    (said("Execute Script", '\n```json\n{"script_name": "a"}\n```'), {"script_name": "a"}),
    (said("Execute Script", '{"script_name": "a"}\nNow I wait.'), {"script_name": "a"}),
    (said("Execute Script", '{"script_name": "a"}\nObservation: it ran\n') + FINAL, {"script_name": "a"}),
    (EXECUTE.replace("\n", " "), {"script_name": "train.py"}),
    (said("Execute Script", '{"script_name": "a",}'), {"script_name": "a\","}),
    (said("Inspect Script Lines", '{"script_name": "a", "start_line_number": 1, "end_line_number": "2"}'),
     {"script_name": "a", "start_line_number": "1", "end_line_number": "2"}),
    (said("Edit Script (AI)", '{"script_name": "a", "edit_instruction": "1.\n2.", "save_name": "b"}'),
     {"script_name": "a", "edit_instruction": "1.\n2.", "save_name": "b"}),
    (said("Edit Script (AI)", '{"script_name": "a", "edit_instruction": """Set it\nto 5.""", "save_name": "b"}'),
     {"script_name": "a", "edit_instruction": "Set it\nto 5.", "save_name": "b"}),
    (said("Edit Script (AI)", '{"script_name": "a", "edit_instruction": "Print "yes" now.", "save_name": "b"}'),
     {"script_name": "a", "edit_instruction": 'Print "yes" now.', "save_name": "b"}),
    (said("Edit Script (AI)", '{"script_name": "a", "edit_instruction": "Match \\d+.", "save_name": "b"}'),
     {"script_name": "a", "edit_instruction": "Match \\d+.", "save_name": "b"}),
    (FINAL + "\n" + EXECUTE, {"script_name": "train.py"}),      # of repeated headers the last
    (EXECUTE.replace("Fact Check: none\n", ""), ASKED_AGAIN), (EXECUTE.replace("Action:", "action:"), ASKED_AGAIN),
    (EXECUTE.replace("Action:", "**Action**:"), ASKED_AGAIN), (said("`Execute Script`", "{}"), ASKED_AGAIN),
    (said("Execute Script.", '{"script_name": "a"}'), ASKED_AGAIN),
    (said("Read File", '{"file_name": "a"}'), ASKED_AGAIN),
    (said("Set Constant", '{"constant": "1", "value": "2"}'), ASKED_AGAIN), ("prose", ASKED_AGAIN), ("", ASKED_AGAIN),
    (HEAD.replace("do it", "the Observation: said so") + "Action: List Files\nAction Input: {}", ASKED_AGAIN),
    ("x" * 60_000 + EXECUTE, ASKED_AGAIN), (said("Execute Script", "{'script_name': 'a'}"), ERROR),
    (said("Edit Script (AI)", '{"script_name": "a", "edit_instruction": "b"}'), ERROR),
    (said("Final Answer", "I am done."), ERROR), (said("Execute Script", "[" * 40_000), ERROR), (NO_INPUT, ERROR)])
def test_what_is_read_asked_for_again_or_an_error(reply, expected, loop_env):
    fields, action, args, error = loop_env.read(reply)
    if expected == ASKED_AGAIN:
        assert action is None and not loop_env.is_readable(reply)
    elif expected == ERROR:
        assert error.startswith("ActionInputParsingError") and loop_env.is_readable(reply)
    else:
        assert (args, error) == (expected, "")


@pytest.fixture
def loop_env(tmp_path, task):
    cfg = settings(tmp_path)
    tasks.prepare("tiny-task", data=cfg.data, log=lambda line: None)
    return mlagentbench.Env("tiny-task", cfg.data, out=tmp_path / "out", actions=tuple(mlagentbench.TOOLS),
                            coder=lambda messages: "")


def test_reading_takes_linear_time(loop_env):
    for text in ('"script_name":' * 3000, '",' * 20_000, "{" * 40_000, "Action:" * 7000, "\\" * 40_000):
        assert loop_env.read(said("Execute Script", text)[:50_000])


def test_five_replies_are_free_and_then_the_run_ends(tmp_path, task):
    cfg, model, steps = loop(tmp_path, ["x"] * 4 + [EXECUTE] + ["y"] * 5)
    assert [step["action"] for step in steps] == ["Execute Script", None]
    assert steps[0]["dropped"] == ["x"] * 4
    assert [prompt.count("not in the right form") for prompt in model.prompts] == [0, 1, 2, 3, 4] * 2
    assert steps[1]["ended"] == "no valid reply"
    results = json.loads(Path(cfg.out, "results.json").read_text())
    assert results["tasks"]["tiny-task"]["trajectories"][0]["last-valid"] == 7.0


def test_the_last_three_steps_are_shown_and_errors_are_forgotten(tmp_path, task):
    cfg, model, steps = loop(tmp_path, [NO_INPUT, NO_INPUT, LIST, EXECUTE, LIST, LIST, NO_INPUT, FINAL], steps=6)
    shown = [re.findall("Assistant:\n.*?Action:  ([^\n]*)", prompt, re.S) for prompt in model.prompts]
    assert shown == [
        [], ["Execute Script"], ["Execute Script"] * 2, ["List Files"], ["List Files", "Execute Script"],
        ["List Files", "Execute Script", "List Files"], ["Execute Script", "List Files", "List Files"],
        ["List Files", "List Files", "Execute Script"]]
    assert [prompt.count("ActionInputParsingError: ") for prompt in model.prompts] == [0, 1, 2, 0, 0, 0, 0, 1]
    assert len(steps) == 8 and steps[-1]["ended"] == "final answer"       # three of them did not count
    assert "validation MAE: 6.5" in model.prompts[4]
    assert "**" not in re.search("Assistant:.*", model.prompts[4], re.S)[0]
    assert "steps and" not in "".join(model.prompts)


def test_an_edit_runs_nothing_and_the_last_executed_script_counts(tmp_path, task):
    edit = said("Edit Script (AI)", json.dumps(EDIT))
    scripts = [f"```python\n{STARTER.replace('VALUE = 3', f'VALUE = {value}')}```\n" for value in (8, 9)]
    undo = said("Undo Edit Script", '{"script_name": "train.py"}')
    cfg, model, steps = loop(tmp_path, [edit, EXECUTE, edit, undo, FINAL], scripts)
    assert [step["score"] for step in steps] == [None, 2.0, None, None, None]
    assert [step["outcome"] for step in steps] == [None, "ok", None, None, None]
    assert "+VALUE = 8" in steps[0]["observation"] and "run" not in steps[0]["observation"]
    assert steps[1]["observation"] == "The script has been executed. Here is the output:\nvalidation MAE: 1.5\n"
    assert steps[3]["observation"].endswith(STARTER.replace("VALUE = 3", "VALUE = 8"))
    results = json.loads(Path(cfg.out, "results.json").read_text())
    assert results["tasks"]["tiny-task"]["trajectories"][0]["last-valid"] == 2.0
    assert "Scaffold: mlagentbench" in text_of(results)


def test_an_edit_shows_the_difference_to_the_script_that_it_started_from(tmp_path, task):
    """Three times into another file: a new one, the same again, and a reply without a script."""
    edit = said("Edit Script (AI)", json.dumps(EDIT | {"save_name": "new.py"}))
    cfg, model, steps = loop(tmp_path, [edit] * 3 + [FINAL], [NEW_SCRIPT, NEW_SCRIPT, "No ```."])
    lines = ["new.py is saved. The difference to train.py:", "@@ -1,3 +1,3 @@", "-VALUE = 3", "+VALUE = 8"]
    assert [step["observation"].splitlines()[:4] for step in steps[:2]] == [lines] * 2
    assert steps[2]["observation"].startswith("The helper returned no whole script")


def test_an_argument_of_a_wrong_type_is_an_error_and_its_record_can_be_read(tmp_path, task):
    wrong = [said("List Files", f'{{"dir_path": {value}}}') for value in ('["."]', "7", "null", '{"a": "b"}')]
    lines = '{"script_name": "train.py", "start_line_number": "first", "end_line_number": "9"}'
    cfg, model, steps = loop(tmp_path, [*wrong, said("Inspect Script Lines", lines), FINAL], steps=6)
    assert [line["type"] for line in records.read_records(file_of(cfg, 0))] == ["header", *["step"] * 6]
    for step in steps[:4]:
        assert (step["action"], step["args"], step["valid"], step["kind"]) == ("List Files", {}, False, "invalid")
        assert step["observation"].startswith('EnvError: "dir_path" must be a text')
    assert steps[4]["args"] == {} and "must be a whole number" in steps[4]["observation"]
    assert [prompt.count("EnvError: ") for prompt in model.prompts] == [0, 1, 2, 3, 3, 3]      # none is forgotten
    (played,) = json.loads(Path(cfg.out, "results.json").read_text())["tasks"]["tiny-task"]["trajectories"]
    assert (played["ended"], played["steps"]) == ("final answer", 6)


def test_a_script_that_leaves_too_much_is_told_so(tmp_path, task, monkeypatch):
    monkeypatch.setattr(storage, "MAX_FILES", 5)
    script = f"```python\n{STARTER}for i in range(5):\n    open(f'{{i}}.bin', 'w')\n```\n"
    cfg, model, steps = loop(tmp_path, [said("Edit Script (AI)", json.dumps(EDIT)), EXECUTE, FINAL], [script])
    assert steps[1]["outcome"] == "disk full"
    assert steps[1]["observation"] == ("The script has been executed. Here is the output:\nvalidation MAE: 6.5\n\n"
                                       "It left more than 5 files or 256 MiB.")


def test_of_a_file_that_is_not_read_whole_the_lines_say_so(loop_env, monkeypatch):
    monkeypatch.setattr(workspace, "MAX_READ", 1 << 20)
    for size, words in ((1 << 20, "the file"), ((1 << 20) + 2, "what is read of the file, its first 1 MiB,")):
        loop_env.files["big.py"] = loop_env.blobs.put(b"x\n" * (size // 2))
        source = '{"script_name": "big.py", "start_line_number": "1", "end_line_number": "1"}'
        step = loop_env.step(said("Inspect Script Lines", source))
        assert step.observation == f"Here are the lines ({words} ends at line 524289):\n\nx"


def test_a_script_that_fails_shows_its_errors_alone(tmp_path, task):
    new = said("Edit Script (AI)", json.dumps(EDIT | {"script_name": "new.py", "save_name": "new.py"}))
    script = "```python\nprint('before')\nprint(1 / 0)\n```\n"
    run = said("Execute Script", '{"script_name": "new.py"}')
    look = said("Inspect Script Lines", '{"script_name": "new.py", "start_line_number": 1, "end_line_number": 102}')
    absent = said("List Files", '{"dir_path": "no"}')
    cfg, model, steps = loop(tmp_path, [new, run, look, absent, FINAL], [script])
    assert "before" not in steps[1]["observation"] and "ZeroDivisionError" in steps[1]["observation"]
    assert steps[2]["observation"].startswith("EnvError: At most 100 lines")
    assert steps[3]["observation"].startswith("EnvError: There is no folder")


def test_a_long_observation_is_summarised_by_the_coder(tmp_path, task):
    long = 'print("a" * 15_000)\n' + STARTER
    edit = said("Edit Script (AI)", json.dumps(EDIT))
    cfg, model, steps = loop(tmp_path, [edit, EXECUTE, FINAL],
                             [f"```python\n{long}```\n", "head", "first part", "second part", "It printed a lot."])
    assert steps[1]["observation"] == "It printed a lot." and "It printed a lot." in model.prompts[2]
    assert "first part" in model.questions[-1] and "second part" in model.questions[-1]


@pytest.mark.parametrize("text, blocks", [
    ("", [(1, 1, "")]), ("\n", [(1, 1, "\n")]), ("abc\ndefg", [(1, 1, "abc\n"), (2, 2, "defg")]),
    ("ab\ncd\n" + "e" * 20 + "\nf\n", [(1, 2, "ab\ncd\n"), (3, 3, "e" * 8), (3, 3, "e" * 8), (3, 4, "eeee\nf\n")]),
    ("ab\n" * 99, [(1, 2, "ab\nab\n"), (3, 4, "ab\nab\n"), (5, 6, "ab\nab\n"), (7, 7, "ab\n")])])
def test_the_coder_reads_whole_lines_and_is_told_their_numbers(text, blocks, loop_env, monkeypatch):
    """Blocks of at most 8 characters; of the last text 21 characters are read."""
    monkeypatch.setattr(mlagentbench, "BLOCK", 8)
    monkeypatch.setattr(mlagentbench, "MAX_TEXT", 21 if text.startswith("ab\nab") else 99)
    asked = []
    loop_env.coder = lambda messages: asked.append(messages[0]["content"]) or "a report"
    loop_env.read_in_blocks(env.Step(0, ""), text, "What is it?")
    found = re.findall("Lines ([0-9]+) to ([0-9]+):\n```\n(.*?)\n```", "".join(asked), re.S)
    assert [(int(first), int(last), block) for first, last, block in found] == blocks


def test_the_prompt_has_the_parts_of_the_original(tmp_path, task):
    cfg, model, steps = loop(tmp_path, [FINAL])
    prompt = model.prompts[0]
    assert re.findall("^- ([A-Z][A-Za-z ()]+):$", prompt, re.M) == [
        "List Files", "Copy File", "Undo Edit Script", "Execute Script", "Final Answer", "Understand File",
        "Inspect Script Lines", "Edit Script (AI)"]
    rules = prompt.split("do not forget them:")[1].split("Always answer")[0]
    assert len(re.findall("^- ", rules, re.M)) == 9
    form = prompt.split("in exactly this form:")[1]
    assert [line.partition(":")[0] for line in form.strip().splitlines()[:7]] == [*env.FIELDS, "Observation"]
    assert "Predict y." in prompt and "lower is better" not in prompt and "min left" not in prompt
    assert "Now let's start!" in prompt


def test_it_needs_a_coder_and_its_own_actions(tmp_path):
    right = {"scaffold": "mlagentbench", "coder": "model", "actions": tuple(mlagentbench.TOOLS)}
    settings(tmp_path, **right)
    for wrong in ({"coder": "none"}, {"actions": ("Set Constant", "Final Answer")}):
        with pytest.raises(ValueError, match="needs a --coder, and --actions among"):
            settings(tmp_path, **right | wrong)


@pytest.mark.parametrize("scaffold, ended, num_steps", [("aide", "no reply", 4), ("mlagentbench", "no valid reply", 2)])
def test_a_server_that_gives_no_replies_ends_one_trajectory(scaffold, ended, num_steps, tmp_path, task):
    """The first reply is one; then nothing comes. It is asked for again as any reply that cannot be read."""
    class Silent(Model):
        def chat(self, messages, **options):
            if '"is_bug"' in messages[0]["content"] or not self.prompts:
                said = super().chat(messages, **options)
                said.text = said.text if scaffold == "aide" else LIST
                return said
            return endpoint.Completion("", [], [], "stop", 100, num_tokens=7, no_reply="it refused")
    more = {} if scaffold == "aide" else {"actions": tuple(mlagentbench.TOOLS)}
    cfg = aide_settings(tmp_path, scaffold=scaffold, **more)
    results = play(cfg, Silent())
    assert results["tasks"]["tiny-task"]["trajectories"][0]["ended"] == ended
    steps = steps_of(cfg)
    assert len(steps) == num_steps
    num_tries = {"aide": 3, "mlagentbench": 5}[scaffold]
    assert steps[-1]["tokens"] == 7 * num_tries and steps[-1]["no_reply"] == "it refused"
    assert records.replay(file_of(cfg, 0), data=cfg.data) == 0
