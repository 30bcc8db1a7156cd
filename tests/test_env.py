"""The environment on a task made by hand: its script needs no library, and its grader reads one number."""

import dataclasses, json, os, random, re, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace

import pytest

import env as env_module
import tasks
from env import ACTIONS, FIELDS, LOOKS, Env, parse, shorten, system_prompt
from reward import KINDS
from support import parallel, prompts, records, sandbox, scripts, storage, workspace
from support.endpoint import Completion
from support.play import AgentSettings, ask_coder_model, play_trajectory
from support.scripts import printed_metric
from support.records import header, record
from test_execute import becomes_empty

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="scripts can be executed on Linux only")
STARTER = """\
VALUE = 0.50
rows = open("data/train.csv").read().split()
print("rows:", len(rows))
print(f"validation accuracy: {VALUE:.2f}")
with open("submission.csv", "w") as file:
    file.write(str(VALUE))
"""
SHORT = ("Thought", "Action", "Action Input")


def grade(id, path, data="data"):
    """The score is the number in the file, from 0 to 1."""
    text = Path(path).read_bytes()[:100].decode("utf-8", "replace")
    if Path(path).is_symlink() or not re.fullmatch(r"[01]\.?\d*", text):
        raise tasks.InvalidSubmission("expected one number from 0 to 1")
    return float(text)


@pytest.fixture
def task(tmp_path, monkeypatch):
    folder = tmp_path / "tasks" / "made"
    data = tmp_path / "data" / "made"
    for each in (folder, data / "public" / "images", data / "private"):
        each.mkdir(parents=True)
    (folder / "train.py").write_text(STARTER)
    (data / "public" / "train.csv").write_text("a b c\n")
    (data / "public" / "images" / "1.bin").write_bytes(b"\x89PNG\0\0")
    (data / "private" / "answers.csv").write_text("the secret answers")
    (data / "public" / "link.csv").symlink_to(data / "private" / "answers.csv")
    task = SimpleNamespace(id="made", folder=folder, problem="Raise VALUE.\n", entry="train.py", metric="accuracy",
                           direction="up", alpha=8.0, time_limit_s=20.0, memory_limit_bytes=1 << 30)
    info = {"id": "made", "m_init": 0.5, "m_best": 0.9, "miniature": True}
    monkeypatch.setattr(tasks, "load", lambda id: task)
    monkeypatch.setattr(tasks, "info", lambda id, data="data": info)
    monkeypatch.setattr(tasks, "grade", grade)
    return task


@pytest.fixture
def make(task, tmp_path):
    return lambda **options: Env(task, tmp_path / "data", **{"out": tmp_path / "out", "fields": SHORT, **options})


def say(action, **args):
    return f"Thought: go on\nAction: {action}\nAction Input: {json.dumps(args)}"


def do(env, action, **args):
    return env.step(say(action, **args))


def edit(env, find, replace):
    return do(env, "Replace In Script", script_name="train.py", find=find, replace=replace)


def undo(env):
    return do(env, "Undo Edit Script", script_name="train.py")


def run(env, name="train.py"):
    return do(env, "Execute Script", script_name=name)


def show(env, name, first, last):
    return do(env, "Inspect Script Lines", script_name=name, start_line_number=first, end_line_number=last)


def files(env, folder):
    return do(env, "List Files", dir_path=folder)


def put(env, **files):
    """Files straight into the workspace: put(env, train='...') writes train.py."""
    for name, text in files.items():
        env.files[f"{name}.py"] = env.blobs.put(text.encode())


def lines_of(values):
    return "".join(json.dumps(value) + "\n" for value in values)


def text_of(env, path):
    return env.blobs.path(env.files[path]).read_text()


# -- replies

GOOD = say("Inspect Script Lines", script_name="train.py", start_line_number=1, end_line_number="9")


@pytest.mark.parametrize("reply, word", [
    ("", "empty"),
    (" \n\t", "empty"),
    ("I think we should look at the data first.", "Thought"),
    ("Thought: t\nAction: List Files", "Action Input"),
    ("Action: List Files\nThought: t\nAction Input: {}", "Action"),
    ("Thought: t\nAction: List Files\nAction Input: dir_path", "JSON"),
    ("Thought: t\nAction: List Files\nAction Input: [1]", "JSON"),
    ('Thought: t\nAction: List Files\nAction Input: {"dir_path": ".', "JSON"),
    ('Thought: t\nAction: List Files\nAction Input: {"dir_path": "."', "JSON"),
    ("Thought: t\nAction: List Files\nAction Input: {'dir_path': '.'}", "JSON"),
    ('Thought: t\nAction: List Files\nAction Input: ' + '{"a":' * 9000, "JSON"),
    ('Thought: t\nAction: Delete File\nAction Input: {"file": "x"}', "Delete File"),
    ('Thought: t\nAction: list files\nAction Input: {"dir_path": "."}', "list files"),
    ('Thought: t\nAction: List Files\nAction Input: {}', "keys none"),
    ('Thought: t\nAction: List Files\nAction Input: {"path": "."}', "'path'"),
    ('Thought: t\nAction: List Files\nAction Input: {"dir_path": ".", "more": 1}', "'more'"),
    ('Thought: t\nAction: List Files\nAction Input: {"dir_path": 1}', "text"),
    ('Thought: t\nAction: List Files\nAction Input: {"dir_path": NaN}', "text"),
    ('Thought: t\nAction: List Files\nAction Input: {"dir_path": 1e999}', "text"),
    ('Thought: t\nAction: List Files\nAction Input: {"dir_path": ["."]}', "text"),
    ('Thought: t\nAction: Execute Script\0\nAction Input: {"script_name": "train.py"}', "Execute Script"),
    ('Thought: t\nAction: List Files\nAction Input: {"dir_path": null}', "text"),
    ('Thought: t\nAction: List Files\nAction Input: {"dir_path": "\\ud800"}', "text"),
    (GOOD.replace('"9"', '"nine"'), "whole number"),
    (GOOD.replace('"9"', "true"), "text"),
    (GOOD.replace('"9"', "1.5"), "whole number"),
    (GOOD.replace('"9"', "-1"), "whole number"),
    (GOOD.replace('"9"', "1" + "0" * 5000), "JSON"),
    ("x" * 50_001, "longer"),
    ("Observation: " + GOOD, "Thought"),
])
def test_bad_reply(make, reply, word):
    assert word in parse(reply, SHORT)[3]
    env = make()
    before = env.snapshot()
    step = env.step(reply)
    assert (step.valid, step.kind, step.reward, step.outcome) == (False, "invalid", 0.0, None)
    assert word in step.error and step.error in step.observation and "Nothing was done" in step.observation
    assert env.snapshot() == before and env.index == 1 and not env.done


@pytest.mark.parametrize("change", [
    lambda reply: reply,
    lambda reply: "Sure, here is the next step.\n\n" + reply,
    lambda reply: reply.replace("Action Input: ", "Action Input:\n```json\n") + "\n```",
    lambda reply: reply + "\n\nObservation: Lines 1 to 9\n" + say("Final Answer", final_answer="x"),
    lambda reply: reply + "\n\n" + say("Final Answer", final_answer="x"),
    lambda reply: reply + "\nI hope that {this} helps.",
    lambda reply: reply.replace("Thought:", "**Thought:**").replace("Action:", "**Action**:"),
    lambda reply: reply.replace("Action Input:", "## action input :"),
    lambda reply: reply.replace("Inspect Script Lines", '`Inspect Script Lines`'),
    lambda reply: reply.replace("\n", "\r\n"),
])
def test_what_passes(change):
    fields, action, args, error = parse(change(GOOD), SHORT)
    assert (action, error) == ("Inspect Script Lines", "")
    assert args == {"script_name": "train.py", "start_line_number": "1", "end_line_number": "9"}
    assert fields["Thought"] == "go on" and set(fields) == {"Thought", "Action"}


def test_raw_line_breaks_in_texts_pass():
    reply = say("Replace In Script", script_name="train.py", find="LINES", replace="c").replace("LINES", "a\n\tb")
    assert parse(reply, SHORT)[2:] == ({"script_name": "train.py", "find": "a\n\tb", "replace": "c"}, "")


def test_six_fields_are_all_expected_and_kept():
    reply = "\n".join(f"{name}: about {name}\nmore" for name in FIELDS[:4]) + "\n" + GOOD.split("\n", 1)[1]
    fields, action, _, error = parse(reply)
    assert error == "" and action == "Inspect Script Lines" and fields["Fact Check"] == "about Fact Check\nmore"
    for name in FIELDS:
        assert f'"{name}:" is missing' in parse(reply.replace(f"{name}:", "Other:"))[3]


def test_a_reply_of_megabytes_is_refused_fast_and_kept_short(make):
    env = make(steps=4)
    for reply in ("Action:" * 2_000_000, " " * 5_000_000, say("List Files") + "{" * 3_000_000):
        began = time.process_time()
        step = env.step(reply)
        assert time.process_time() - began < 5 and not step.valid and len(json.dumps(record(step))) < 200_000
    assert sum(len(message["content"]) for message in env.messages[2:]) < 30_000


def test_long_replies_take_linear_time():
    for reply in ("Thought: " * 5_000, "\n" * 49_000, "Thought:\n" + "\t" * 49_000, "*>#-" * 12_000,
                  GOOD + "\nObservation" * 4_000, GOOD.replace("{", "{" + " " * 49_000)):
        began = time.process_time()
        parse(reply, SHORT)
        assert time.process_time() - began < 2


def test_garbage_never_raises(make):
    draw = random.Random(0)
    env = make(steps=10 ** 9, coder=lambda messages: draw.choice(["", "```python\nX = 2\n```", "no"]))
    env.task.time_limit_s = 1.0
    pieces = [f"\nAction: {name}\n" for name in ACTIONS] + [f"{name}:" for name in FIELDS] + [
        "\n", ":", "{", "}", '"', "\\", "```", "\0", "\ud83d", "é", "1", "\nThought: ", "\nThought: ", "Observation:",
        "\nObservation:", " ", "[" * 50, "\\u0000", '\nAction Input: {"dir_path": "."}',
        '\nAction Input: {"script_name": "../x"}']
    values = ["train.py"] * 12 + ["1"] * 12 + [
        ".", "data", "data/images/1.bin", "", "\0", "a/b", "train.py/x", "..", "0", "é" * 200, "x" * 99, "-1", 9, None,
        [], "VALUE = 0.50"]
    seen = set()
    for i in range(500):
        if i % 3 == 0:
            reply = "".join(draw.choice(pieces) for _ in range(draw.randint(0, 60)))
        else:  # the form is right and the values are not
            name = draw.choice([name for name in ACTIONS if name not in ("Final Answer", "Execute Script")])
            if scripts.inverse(env.seen["change"]) and draw.random() < 0.5:
                name = draw.choice(["Set Constant Again", "Set Constant Inversely"])
            likely = ["1", "*2"] * 30 if name == "Set Constant" else []
            reply = say(name, **{key: draw.choice(likely + values) for key in ACTIONS[name][0]})
            reply = reply if draw.random() < 0.8 else reply[:draw.randint(0, len(reply))]
        step = env.step(reply)
        assert step.kind in KINDS and 0 <= step.reward <= 1 and step.valid == (not step.error)
        assert json.loads(json.dumps(record(step)))["index"] == i
        seen.add((step.action, step.valid))
    worked, refused = ({action for action, valid in seen if valid == wanted} for wanted in (True, False))
    assert worked >= set(ACTIONS) - {"Replace In Script", "Final Answer", "Execute Script"}  # they were really tried
    assert refused >= {None, "List Files", "Replace In Script", "Edit Script (AI)"}


# -- paths

@pytest.mark.parametrize("path", [
    "/etc/passwd", "../private/answers.csv", "data/../../private/answers.csv", "a/../../x", "~/x", "..",
    " ..", " ../private/answers.csv", "./ /../..", "data/link.csv", ".undo/1/train.py", "x\0y", "x\ny", "a" * 101,
    "a/" * 200 + "b", "", ".", "absent.py"])
def test_no_action_reads_outside(make, path):
    env = make(coder=lambda messages: pytest.fail("the coder was asked about a file that must not be read"))
    for action, (args, *_) in ACTIONS.items():
        read = {"script_name", "file_name", "source"} & args.keys()
        if not read:
            continue
        before = env.snapshot()
        step = do(env, action, **{name: path if name in read else "1" for name in args})
        assert (step.valid, step.kind) == (False, "invalid") and env.snapshot() == before, action
        assert "secret" not in step.observation and "root:" not in step.observation


@pytest.mark.parametrize("path", [
    "/tmp/x", " /tmp/x", "../x", " ../x", ".. ", "data", "data/train.csv", "data/new.csv", "./data/train.csv",
    "data//x", ".undo/9/x", "", ".", "x/", "folder", "train.py/x", "x\0"])
def test_no_action_writes_outside_or_to_data(make, task, tmp_path, path):
    env = make(coder=lambda messages: "```python\nVALUE = 1\n```")
    env.files["folder/file.py"] = env.files["train.py"]
    before = env.snapshot()
    public = sorted((str(p), p.stat().st_mtime_ns) for p in (tmp_path / "data").rglob("*"))
    for action, (args, *_) in ACTIONS.items():
        written = {"destination", "save_name"} & args.keys() or {"script_name", "file_name"} & args.keys()
        if action in LOOKS or not written:
            continue
        step = do(env, action, **{name: path if name in written else "train.py" for name in args})
        assert (step.valid, step.kind) == (False, "invalid") and env.snapshot() == before, action
    assert public == sorted((str(p), p.stat().st_mtime_ns) for p in (tmp_path / "data").rglob("*"))


def test_links_that_a_script_leaves_are_not_followed(make, tmp_path):
    env = make()
    put(env, links=f"""
import os
os.symlink('{tmp_path}/data/made/private/answers.csv', 'a.csv')
os.symlink('/etc', 'etc')
os.mkfifo('pipe')
open('real', 'w').write('x')
""")
    step = run(env, "links.py")
    assert step.outcome == "ok" and set(env.files) == {"train.py", "links.py", "real"}
    assert not show(env, "a.csv", "1", "2").valid
    assert not files(env, "etc").valid


def test_submission_that_is_a_link_is_not_graded(make, tmp_path):
    (tmp_path / "perfect").write_text("1.0")
    env = make()
    put(env, train=f"import os\nos.symlink('{tmp_path}/perfect', 'submission.csv')")
    step = run(env)
    assert (step.outcome, step.score, step.kind) == ("invalid submission", None, "failed")


def test_script_that_adds_to_data_shares_nothing(make, tmp_path):
    env = make()
    put(env, extra="""
import os
open('data/new.csv', 'w').write('x')
os.remove('data/train.csv')
print(sorted(os.listdir('data')))
""")
    step = run(env, "extra.py")
    assert step.outcome == "ok" and "'new.csv'" in step.observation and set(env.files) == {"train.py", "extra.py"}
    assert sorted(os.listdir(tmp_path / "data" / "made" / "public")) == ["images", "link.csv", "train.csv"]


def test_script_that_changes_public_data_stops_us(make, tmp_path):
    spoil = "open('data/train.csv', 'w').write('spoiled')"
    env = make()
    put(env, spoil=spoil)
    step = run(env, "spoil.py")
    assert step.outcome == "error" and "Errno" in step.observation
    env = make(sandbox="off")
    put(env, spoil=spoil)
    with pytest.raises(RuntimeError, match="changed the public data"):
        run(env, "spoil.py")


# -- actions

def test_list_and_inspect(make):
    env = make()
    assert files(env, ".").observation.startswith(f"data/\ntrain.py  {len(STARTER)} bytes\n[14 steps and 30 min left]")
    assert files(env, "data").observation.startswith("images/\nlink.csv  18 bytes\ntrain.csv  6 bytes\n[")
    assert "1.bin" in files(env, "./data/images/").observation
    assert not files(env, "absent").valid
    step = show(env, "train.py", "2", "3")
    assert step.observation.startswith("\n".join(["Lines 2 to 3 of 6 of train.py:", *STARTER.splitlines()[1:3], "["]))
    assert (step.kind, step.reward, step.valid) == ("not an edit", 0.5, True)
    assert "Lines 5 to 6 of 6" in show(env, "train.py", "5", "900").observation
    for first, last in ((0, 5), (7, 9), (5, 4)):
        assert "6 lines" in show(env, "train.py", first, last).error
    assert show(env, "data/train.csv", "1", "1").observation.startswith("Lines 1 to 1 of 1 of data/train.csv:\na b c\n")
    step = show(env, "data/images/1.bin", "1", "1")
    assert not step.valid and "binary file of 6 bytes" in step.observation


def test_a_long_file_is_shown_in_whole_lines(make):
    env = make()
    put(env, long="\n".join(f"line {i} " + "x" * 90 for i in range(1, 1001)))
    shown = show(env, "long.py", "11", "900").observation.splitlines()
    first, last = map(int, re.match(r"Lines (\d+) to (\d+) of 1,000", shown[0]).groups())
    assert first == 11 and 30 < last < 70 and shown[1].startswith("line 11 ")
    assert shown[-2] == f"line {last} " + "x" * 90
    put(env, wide="x" * 200_000)
    assert len(show(env, "wide.py", "1", "1").observation) < 5_100


def test_of_a_file_that_is_not_read_whole_the_observation_says_so(make, monkeypatch):
    monkeypatch.setattr(workspace, "MAX_READ", 1 << 20)
    env = make()
    put(env, whole="x\n" * (1 << 19), big="x\n" * ((1 << 19) + 1))
    assert show(env, "whole.py", 1, 1).observation.startswith("Lines 1 to 1 of 524,288 of whole.py:\nx\n")
    for first in (1, 524_288):
        said = f"Lines {first} to {first} of 524,288 of the first 1 MiB of big.py:\nx\n"
        assert show(env, "big.py", first, first).observation.startswith(said)
    assert "the first 1 MiB of big.py has 524,288 lines" in show(env, "big.py", 524_289, 524_289).error


def test_replace_edits_scores_and_rewards(make):
    env = make()
    step = edit(env, "VALUE = 0.50", "VALUE = 0.60")
    assert text_of(env, "train.py") == STARTER.replace("0.50", "0.60")
    assert (step.kind, step.outcome, step.printed) == ("scored", "ok", 0.6)
    assert (step.m_before, step.score, step.m_after) == (0.5, 0.6, 0.6)
    assert step.reward == pytest.approx(0.8807970780)  # x = 8 * 0.1 / 0.4 = 2
    assert "-VALUE = 0.50\n+VALUE = 0.60" in step.observation
    assert "validation" not in step.observation
    assert "submission.csv" not in env.files
    step = edit(env, "VALUE = 0.60", "VALUE = 0.55")
    assert (step.m_before, step.score) == (0.6, 0.55) and step.reward == pytest.approx(0.2689414214)  # x = -1
    step = edit(env, "VALUE = 0.55", "VALUE = 1/0")
    assert (step.kind, step.outcome, step.reward, step.score, step.m_after) == ("failed", "error", 0.0, None, 0.55)
    step = edit(env, "VALUE = 1/0", "VALUE = 0.70")
    assert (step.m_before, step.score) == (0.55, 0.7)


def test_the_printed_metric_is_not_believed(make):
    step = edit(make(), "{VALUE:.2f}", "0.99")
    assert (step.printed, step.score, step.reward) == (0.99, 0.5, 0.5)


@pytest.mark.parametrize("find, word", [
    ("absent", "does not occur"), ("", "does not occur"), ("VALUE", "more than once")])
def test_find_must_occur_once(make, find, word):
    env = make()
    step = edit(env, find, "x")
    assert (step.kind, step.valid) == ("invalid", False) and word in step.error and text_of(env, "train.py") == STARTER


def test_an_edit_that_changes_nothing_is_no_edit(make):
    env = make()
    step = edit(env, "VALUE = 0.50", "VALUE = 0.50")
    assert (step.kind, step.valid, step.outcome) == ("not an edit", True, None) and list(env.files) == ["train.py"]


SCRIPT = """\
SEED = 3
VALID_FRACTION = 0.2
NUM_TREES = 100   # trees
ODD = 5-3
RATE = 1e-3
DROPOUT = 0.0
OFFSET = 0
NEGATIVE = -1
TEXT = "5"
def f():
    LOCAL = 3
LEAF = 1#rows
"""


def test_the_numbered_constants_of_a_script():
    found = scripts.constants(SCRIPT)
    assert [each[:2] for each in found] == [
        ("DROPOUT", "0.0"), ("LEAF", "1"), ("NUM_TREES", "100"), ("OFFSET", "0"), ("RATE", "1e-3")]
    assert all(SCRIPT[start:end] == text for _, text, start, end in found)
    assert scripts.constants("A = 1.2.3\nB = 007\nC = 1 2\nd = 1\nE=1\n") == []


@pytest.mark.parametrize("number, value, line", [
    (3, "*2", "NUM_TREES = 200   # trees"), ("3", "/3", "NUM_TREES = 33   # trees"),
    (3, "/1000", "NUM_TREES = 1   # trees"), (3, 64, "NUM_TREES = 64   # trees"),
    (3, " * 1.5 ", "NUM_TREES = 150   # trees"), (5, "*2", "RATE = 0.002"), (5, "/3", "RATE = 0.000333"),
    (5, "*1e5", "RATE = 100.0"), (5, "/1000", "RATE = 1e-06"), (5, 5e-4, "RATE = 0.0005"),
    (1, "0.5", "DROPOUT = 0.5"), (4, "*2", "OFFSET = 1"), (4, "-7", "OFFSET = -7"), (5, "-7", "RATE = -7"),
    (2, "*2", "LEAF = 2#rows")])
def test_a_constant_is_set(make, number, value, line):
    env = make()
    put(env, train=SCRIPT)
    step = do(env, "Set Constant", constant=number, value=value)
    lines = zip(SCRIPT.splitlines(), text_of(env, "train.py").splitlines())
    changed = [after for before, after in lines if after != before]
    assert step.valid and changed == [line] and f"\n+{line}" in step.observation
    new_value = re.match(r"\w+ = ([^ #]+)", line)[1]       # a negative one is no longer among the constants
    assert re.match(rf"{line.split()[0]} = \S+ -> {re.escape(new_value)}:", env.seen["tries"][-1])
    assert undo(env).valid and text_of(env, "train.py") == SCRIPT


@pytest.mark.parametrize("number, value, word", [
    (0, "*2", "no constant 0; there is 1 DROPOUT, 2 LEAF, 3 NUM_TREES"), ("6", "*2", "no constant 6"),
    (3, "100", "NUM_TREES is 100 already"), (3, "1e2", "is 100 already"), (3, "*1.001", "is 100 already"),
    (1, "*2", "DROPOUT is 0.0 already"), (2, "/2", "LEAF is 1 already"), (3, "much", "must be a number, or a factor"),
    (3, "*0", "a factor above 0"), (3, "*-2", "a factor above 0"), (3, "*1e99", "out of bounds"),
    (3, float("inf"), "must be a number"), (3, "1/0", "must be a number"), ("one", "*2", "no constant one")])
def test_what_sets_no_constant_changes_nothing_and_says_why(make, number, value, word):
    env = make()
    put(env, train=SCRIPT)
    step = do(env, "Set Constant", constant=number, value=value)
    assert (step.kind, step.valid) == ("invalid", False) and word in step.error and text_of(env, "train.py") == SCRIPT


def test_a_constant_is_that_of_the_script_as_it_is_now(make):
    """And the edit is scored and rewarded as any other."""
    env = make()
    step = do(env, "Set Constant", constant=1, value="0.6")
    assert (step.kind, step.score, step.printed) == ("scored", 0.6, 0.6) and step.reward == pytest.approx(0.8807970780)
    edit(env, "VALUE = 0.6", "VALUE = 0.6\nFIRST = 9")
    assert do(env, "Set Constant", constant=2, value="0.7").score == 0.7
    put(env, train="print(1)")
    step = do(env, "Set Constant", constant=1, value="*2")
    assert step.error == "There is no constant 1; there is none in the script."


def test_a_change_is_made_again_also_after_restore(make):
    """The last factor once more; a number is there already, and after another edit there is nothing to repeat."""
    env = make(prompt_format="short", steps=20)
    other = make(prompt_format="short", steps=20)
    nothing = "The last edit was no Set Constant by a factor."
    assert do(env, "Set Constant Again").error == nothing
    assert do(env, "Set Constant", constant=1, value="*1.2").score == 0.6
    assert do(env, "Set Constant Again").score == 0.72
    assert "Last: 0.72, better than 0.6, after Set Constant 1 *1.2" in env.prompt()[0]["content"]
    other.restore(env.snapshot(), env.messages, index=3, m_before=0.72, seen=env.seen)
    for one in (env, other):
        assert do(one, "Set Constant Again").score == 0.864 and one.seen["change"] == {"constant": "1", "value": "*1.2"}
    undo(env)
    assert env.seen["change"] == {} and do(env, "Set Constant Again").error == nothing
    do(env, "Set Constant", constant=1, value="0.5")
    assert do(env, "Set Constant Again").error == nothing
    do(env, "Set Constant", constant=7, value="*2")       # it was refused, so it is not made again
    assert env.seen["change"]["value"] == "0.5"


LOW = STARTER.replace("0.50", "0.20") + "WIDTH = 4\n"


def test_the_other_way_takes_the_change_back_first(make):
    """One step; one undo then leads to the first version; a restored state can do it too."""
    env = make(prompt_format="short", steps=20)
    other = make(prompt_format="short", steps=20)
    last = lambda: env.prompt()[0]["content"].split("\n")[-1]
    put(env, train=LOW)
    run(env)
    assert do(env, "Set Constant", constant=1, value="/2").score == 0.1
    assert last() == "Last: 0.1, worse than 0.2, after Set Constant 1 /2, inversely is untried"
    other.restore(env.snapshot(), env.messages, index=env.index, m_before=0.1, seen=env.seen)
    for one in (env, other):
        step = do(one, "Set Constant Inversely")
        assert (step.score, step.m_before, step.valid) == (0.4, 0.1, True)
        assert text_of(one, "train.py") == LOW.replace("0.20", "0.4") and one.seen["change"] == {
            "constant": "1", "value": "*2"}
        assert step.tried == [{"constant": "1", "value": "/2"}]
    assert last() == "Last: 0.4, better than 0.2, after Set Constant 1 *2, again is untried"
    assert do(env, "Set Constant Again").score == 0.8
    assert last() == "Last: 0.8, better than 0.4, after Set Constant 1 *2"      # 1.6 is no share
    undo(env)
    undo(env)
    assert text_of(env, "train.py") == LOW and not undo(env).valid


@pytest.mark.parametrize("value", [" *2", "*2 ", " * 2\t", "*2"])
def test_blanks_in_a_factor_mean_nothing(make, value):
    """It can be taken back and made the other way, and is not offered or accepted again."""
    env = make(prompt_format="short", steps=20)
    constant = lambda: env.prompt()[0]["content"].split("\n")[3]
    put(env, train=LOW)
    run(env)
    assert constant() == "2 WIDTH = 4 *2 /2 *5 /5"
    step = do(env, "Set Constant", constant=2, value=value)
    assert (step.valid, step.change) == (True, {"constant": "2", "value": "*2"}) and step.tried == [step.change]
    assert text_of(env, "train.py") == LOW.replace("WIDTH = 4", "WIDTH = 8")
    step = do(env, "Set Constant Inversely")
    assert step.valid and text_of(env, "train.py") == LOW.replace("WIDTH = 4", "WIDTH = 2")
    assert step.tried == [{"constant": "2", "value": "*2"}, {"constant": "2", "value": "/2"}]
    assert undo(env).valid and constant() == "2 WIDTH = 4 *5 /5"
    assert "was tried on this script" in do(env, "Set Constant", constant=2, value="*2").error


def test_the_other_way_is_refused_where_there_is_none_and_nothing_is_done(make):
    env = make(steps=30)
    put(env, train=LOW)
    run(env)

    def refused(error):
        before = env.snapshot(), env.m_before, env.seen
        step = do(env, "Set Constant Inversely")
        assert (step.valid, step.kind, step.error) == (False, "invalid", error)
        assert (env.snapshot(), env.m_before, env.seen) == before
    none = "The last edit was no Set Constant by a factor."
    refused(none)
    do(env, "Set Constant", constant=1, value="0.1")
    refused(none)
    undo(env)
    do(env, "Set Constant", constant=1, value="/5")
    undo(env)
    refused(none)
    do(env, "Set Constant", constant=1, value="/2")
    edit(env, "WIDTH = 4", "WIDTH = 1")
    refused(none)
    do(env, "Set Constant", constant=2, value="*2")
    refused("WIDTH is 1 already.")
    for _ in range(3):
        undo(env)
    assert text_of(env, "train.py") == LOW
    for value in ("*2", "/2"):      # both are no better
        do(env, "Set Constant", constant=2, value=value)
        if value == "*2":
            undo(env)
    refused("Constant 2 *2 was tried on this script, and is no better.")


def test_a_full_disk_at_a_constant_is_an_outcome(make, monkeypatch):
    env = make(prompt_format="short")

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(env.blobs, "put", full)
    step = do(env, "Set Constant", constant=1, value="/2")
    assert (step.kind, step.outcome) == ("limit", "disk full") and text_of(env, "train.py") == STARTER


def test_the_agent_is_told_what_its_edit_does(make):
    """Worked out by hand: the printed score against the best printed before, never the graded one."""
    env = make(prompt_format="short", steps=20)

    def seen(step):
        line = next((line for line in step.observation.splitlines() if line.startswith("The run of train.py: ")), "")
        prompt = env.prompt()[0]["content"].split("\n")
        return line[len("The run of train.py: "):], prompt[-1], prompt[1]

    assert env.prompt()[0]["content"] == (
        "accuracy, higher is better, 20 steps left\nBest: none\n1 VALUE = 0.50 /2 /5\nLast: nothing")
    by_this = "by this script"
    earlier = "by an earlier script"
    assert seen(run(env)) == ("", "Last: 0.5, after Execute Script", f"Best: 0.5, {by_this}")
    told = "0.7, better than 0.5"
    assert seen(edit(env, "0.50", "0.70")) == (told, f"Last: {told}, after Replace In Script", f"Best: 0.7, {by_this}")
    told = "0.14, worse than 0.7"
    assert seen(do(env, "Set Constant", constant=1, value="/5")) == (
        told, f"Last: {told}, after Set Constant 1 /5", f"Best: 0.7, {earlier}")
    told = "0.7, equal to 0.7"
    assert seen(undo(env)) == (told, f"Last: {told}, after Undo Edit Script", f"Best: 0.7, {by_this}")
    told = "failed, ZeroDivisionError: division by zero"
    assert seen(edit(env, "VALUE = 0.70", "VALUE = 1/0")) == (
        told, f"Last: {told}, after Replace In Script", f"Best: 0.7, {earlier}")
    before = env.prompt()
    step = do(env, "Set Constant", constant=1, value="*2")
    assert step.error == "There is no constant 1; there is none in the script." and not step.valid
    assert env.prompt()[0]["content"] == before[0]["content"].replace(*(f"{20 - n} steps left" for n in (5, 6)))
    step = edit(env, "print(f", "str(f")
    undo(env)
    put(env, train=STARTER.replace("print(f", "str(f"))
    assert seen(edit(env, "0.50", "0.60"))[0] == "no score was printed"
    put(env, better=STARTER.replace("{VALUE:.2f}", "0.99"))
    step = do(env, "Copy File", source="better.py", destination="train.py")
    told = "0.99, better than 0.7"
    assert seen(step) == (told, f"Last: {told}, after Copy File", f"Best: 0.99, {by_this}") and step.score == 0.5
    put(env, other="print('validation accuracy: 5')")
    assert seen(run(env, "other.py"))[2] == f"Best: 0.99, {by_this}"     # a run of another script says nothing
    assert (step.best_printed, step.best_script) == (0.99, env.files["train.py"])


def test_a_short_prompt_tells_what_is_untried_with_the_best_script(make):
    """What was no better for the best script is no more offered, and refused; what another script was tried with is; a
    better score begins anew, without what leads back; and a state that is restored has the same prompt."""
    env = make(prompt_format="short", steps=20)

    def line(step):
        assert step.valid, step.error
        return env.prompt()[0]["content"].split("\n")[2]
    assert line(run(env)) == "1 VALUE = 0.50 /2 /5"      # twice as much would be no share
    assert line(do(env, "Set Constant", constant=1, value="/5")) == "1 VALUE = 0.1 *2 /2 *5"
    assert line(do(env, "Set Constant", constant=1, value="/2")) == "1 VALUE = 0.05 *2 /2 *5"     # of a worse script
    undo(env)
    assert line(undo(env)) == "1 VALUE = 0.50 /2"
    assert line(do(env, "Set Constant", constant="1", value="0.4")) == "1 VALUE = 0.4 *2 /2"
    step = undo(env)
    again = make(prompt_format="short", steps=20)
    again.restore(step.snapshot, index=env.index, seen=dataclasses.asdict(step))
    assert again.prompt() == env.prompt() and step.tried == [
        {"constant": "1", "value": "/5"}, {"constant": "1", "value": "0.4"}]
    assert line(do(env, "Set Constant", constant=1, value=0.6)) == "1 VALUE = 0.6 /2 /5"
    assert line(do(env, "Set Constant", constant=1, value="/2")) == "1 VALUE = 0.3 *2 /5"
    undo(env)
    before = env.snapshot()
    step = do(env, "Set Constant", constant=1, value="/2")
    assert step.error == "Constant 1 /2 was tried on this script, and is no better."
    assert (step.valid, env.snapshot()) == (False, before)
    assert do(env, "Set Constant", constant=1, value="*1.2").tried == [{"constant": "1", "value": "/1.2"}]
    hidden = make(prompt_format="short", show_scores=False)
    run(hidden)
    assert do(hidden, "Set Constant", constant=1, value="/5").tried == []


def test_without_show_scores_the_agent_has_to_run_the_script_to_know(make):
    env = make(prompt_format="short", show_scores=False)
    assert "every edit is run at once" in make().messages[0]["content"]
    assert "every edit is run at once" not in env.messages[0]["content"]
    step = edit(env, "0.50", "0.70")
    assert step.printed == 0.7 and "0.7, " not in step.observation and "The run of" not in step.observation
    assert env.prompt()[0]["content"].split("\n")[1:] == [
        "Best: none", "1 VALUE = 0.70 /2 /5", "Last: train.py is saved. The difference:, after Replace In Script"]
    run(env)
    assert env.prompt()[0]["content"].split("\n")[1:] == [
        "Best: 0.7, by this script", "1 VALUE = 0.70 /2 /5", "Last: 0.7, after Execute Script"]


def test_undo_goes_back_step_by_step_also_after_restore(make):
    env = make()
    for old, new in (("0.50", "0.60"), ("0.60", "0.70")):
        edit(env, old, new)
    other = make()
    other.restore(env.snapshot(), env.messages, index=2, m_before=0.7)
    for one in (env, other):
        step = undo(one)
        assert (step.kind, step.score, step.m_before) == ("scored", 0.6, 0.7) and "+VALUE = 0.60" in step.observation
        step = undo(one)
        assert text_of(one, "train.py") == STARTER and step.score == 0.5 and one.snapshot().keys() == {"train.py"}
        assert "no edit" in undo(one).error


def test_what_edits_replaced_is_hidden_from_agent_and_scripts(make):
    env = make()
    edit(env, "0.50", "0.60")
    put(env, walk="import os\nfor each in os.walk('.'): print(each)")
    assert "undo" not in files(env, "").observation
    assert "undo" not in run(env, "walk.py").observation
    assert sum(name.startswith(".undo/") for name in env.files) == 1


def test_copy(make):
    env = make()
    step = do(env, "Copy File", source="data/train.csv", destination="sub/mine.csv")
    assert (step.kind, step.valid) == ("not an edit", True) and text_of(env, "sub/mine.csv") == "a b c\n"
    put(env, better=STARTER.replace("0.50", "0.80"))
    step = do(env, "Copy File", source="better.py", destination="train.py")
    assert (step.kind, step.score) == ("scored", 0.8) and env.m_before == 0.8
    assert undo(env).score == 0.5
    put(env, train=STARTER.replace("0.50", "0.60"), helper="")
    step = do(env, "Copy File", source="better.py", destination="helper.py")       # which train.py might import
    assert (step.kind, step.score) == ("scored", 0.6)


def test_a_constant_set_below_zero_is_not_set_again(make):
    """It is no longer among those that have a number, so its number is the next one's."""
    env = make()
    put(env, train="ALPHA = 1\nBETA = 2\nGAMMA = 3\n" + STARTER)
    assert do(env, "Set Constant", constant=2, value="-5").valid
    step = do(env, "Set Constant Again")
    assert "no Set Constant by a factor" in step.error and "GAMMA = 3\n" in text_of(env, "train.py")


def test_execute_grades_the_submission_and_keeps_the_files(make):
    env = make()
    step = run(env)
    assert step.observation.startswith("train.py ran to the end in ")
    assert "\nrows: 3\nvalidation accuracy: 0.50\n[" in step.observation
    assert (step.kind, step.outcome, step.sandbox) == ("not an edit", "ok", "namespaces+landlock+seccomp")
    assert (step.score, step.printed, step.reward) == (0.5, 0.5, 0.5)
    assert text_of(env, "submission.csv") == "0.5"


def test_an_old_submission_is_never_graded(make):
    env = make()
    run(env)
    put(env, train="print('validation accuracy: 0.99')")
    step = run(env)
    assert (step.outcome, step.kind) == ("no submission", "failed")
    assert (step.score, step.printed, step.reward) == (None, 0.99, 0.0)
    assert "must write submission.csv" in step.observation and "submission.csv" not in env.files


def test_other_scripts_are_graded_only_for_a_new_submission(make):
    env = make()
    run(env)
    put(env, look="print(open('submission.csv').read())", blend="open('submission.csv', 'w').write('0.85')")
    step = run(env, "look.py")
    assert (step.outcome, step.kind, step.score) == ("ok", "not an edit", None) and "\n0.5\n" in step.observation
    step = run(env, "blend.py")
    assert (step.score, step.m_after, step.reward) == (0.85, 0.5, 0.5)  # the entry script still scores 0.5


@pytest.mark.parametrize("code, outcome, kind, word", [
    ("print('before'); import absent_package", "error", "failed", "No module named 'absent_package'"),
    ("print('before'); {}['key']", "error", "failed", "KeyError: 'key'"),
    ("print('before'); open('submission.csv', 'w').write('many')", "invalid submission", "failed", "expected one numb"),
    ("print('before', flush=True)\nwhile True: pass", "timeout", "limit", "faster"),
    ("print('before'); bytearray(1 << 45)", "out of memory", "limit", "less memory"),
    ("print('before'); import os; os.abort()", "killed", "failed", "signal 6"),
    ("print('before')\nfor i in range(1001): open(str(i), 'w')", "disk full", "limit", "1000 files"),
])
def test_bad_scripts_tell_what_to_do_and_keep_what_they_printed(make, task, code, outcome, kind, word):
    task.time_limit_s = 0.5 if outcome == "timeout" else 20.0
    env = make()
    put(env, train=code)
    before = env.snapshot()
    step = run(env)
    while outcome == "timeout" and "before" not in step.observation:    # on a busy machine it had not even begun
        task.time_limit_s *= 3
        step = run(env)
    assert (step.outcome, step.kind, step.score) == (outcome, kind, None)
    assert step.reward == (0.0 if kind == "failed" else 0.5)
    assert "\nbefore\n" in step.observation and word in step.observation and step.valid
    assert "ml-agent" not in step.observation
    if outcome not in ("invalid submission", "error"):
        assert env.snapshot() == before
    step = edit(env, "'before'", "'other'")
    assert (step.outcome, step.kind) == (outcome, kind)
    assert f"\nThe run of train.py: failed, {step.detail}\n[" in step.observation
    env = make(show_scores=False)
    put(env, train=code)
    step = edit(env, "'before'", "'other'")
    assert (step.outcome, step.kind) == (outcome, kind)
    assert step.detail not in step.observation      # an edit leads to the same, in silence


def test_no_output_shows_the_random_name_of_the_folder_of_a_run(make):
    env = make()
    put(env, train="""import os, sys
print("here:", os.getcwd())
print("there:", os.path.abspath("x.csv"))
print("error:", os.getcwd(), file=sys.stderr)
raise ValueError(f"nothing in {os.getcwd()}")
""")
    step = run(env)
    assert step.outcome == "error" and step.detail == "ValueError: nothing in ."
    assert "\nhere: .\nthere: x.csv\n" in step.observation and "\nerror: .\n" in step.observation
    result = env.score()[1]
    for said in (step.observation, step.news, result.stdout, result.stderr, result.detail):
        assert "ml-agent-run-" not in said


def test_long_output_is_cut_in_the_middle(make):
    env = make()
    put(env, train="""
print('first', 'x' * 100000, 'validation accuracy: 0.25', sep='\\n')
open('submission.csv', 'w').write('0.5')
""")
    step = run(env)
    assert len(step.observation) < 5_100 and "\nfirst\n" in step.observation
    assert "validation accuracy: 0.25" in step.observation
    assert "characters cut" in step.observation and step.printed == 0.25


def test_results_are_kept_so_a_scored_edit_runs_at_once(make, monkeypatch):
    runs = []
    execute = env_module.execute
    monkeypatch.setattr(env_module, "execute", lambda *args, **options: runs.append(args) or execute(*args, **options))
    env = make()
    edit(env, "0.50", "0.60")
    step = run(env)
    assert len(runs) == 1 and step.score == 0.6 and text_of(env, "submission.csv") == "0.6"
    assert env.score()[0] == 0.6 and env.score()[1].outcome == "ok" and len(runs) == 1
    other = make()
    edit(other, "0.50", "0.60")
    assert len(runs) == 1
    put(other, helper="x = 1")
    assert other.score()[0] == 0.6 and len(runs) == 2


def test_the_same_script_in_many_threads_runs_once(make, tmp_path, monkeypatch):
    runs = []
    steps = []
    execute = env_module.execute
    cache = env_module.ResultCache(tmp_path / "kept")
    monkeypatch.setattr(env_module, "execute", lambda *args, **options: runs.append(args) or execute(*args, **options))
    threads = [threading.Thread(target=lambda: steps.append(run(make(cache=cache)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1 and [step.score for step in steps] == [0.5] * 6
    assert cache.counts["runs"] == 1 and cache.counts["hits"] == 5


def test_ai_actions_use_the_coder(make):
    asked = []
    replies = ["Here:\n```python\n" + STARTER.replace("0.50", "0.75") + "```\nDone.", "no code", "```python\nVALUE = 1",
               "it has six lines", ValueError("5000 tokens do not fit")]

    def coder(messages):
        asked.append(messages)
        if isinstance(reply := replies.pop(0), Exception):
            raise reply
        return reply
    env = make(coder=coder)
    args = dict(script_name="train.py", edit_instruction="Raise VALUE to 0.75.", save_name="train.py")
    step = do(env, "Edit Script (AI)", **args)
    assert (step.kind, step.score, len(step.coder)) == ("scored", 0.75, 1)
    assert text_of(env, "train.py") == STARTER.replace("0.50", "0.75")
    assert STARTER in asked[0][0]["content"] and "Raise VALUE to 0.75." in asked[0][0]["content"]
    assert "+VALUE = 0.75" in step.observation
    for _ in range(2):
        step = do(env, "Edit Script (AI)", **args)
        assert (step.kind, step.valid) == ("not an edit", True) and "nothing was changed" in step.observation
    step = do(env, "Understand File", file_name="data/train.csv", things_to_look_for="columns")
    assert step.observation.startswith("it has six lines\n") and "a b c" in asked[-1][0]["content"]
    step = do(env, "Understand File", file_name="data/train.csv", things_to_look_for="columns")
    assert (step.kind, step.valid) == ("invalid", False) and "5000 tokens" in step.error


def test_ai_edit_can_be_saved_elsewhere(make):
    env = make(coder=lambda messages: "```python\nprint(2)\n```")
    step = do(env, "Edit Script (AI)", script_name="train.py", edit_instruction="x", save_name="lib/second.py")
    assert text_of(env, "lib/second.py") == "print(2)\n" and text_of(env, "train.py") == STARTER
    assert (step.kind, step.score) == ("scored", 0.5)


def test_without_a_coder_its_actions_are_not_offered_and_refused(make):
    env = make()
    assert "Edit Script (AI)" not in env.messages[0]["content"]
    step = do(env, "Edit Script (AI)", script_name="train.py", edit_instruction="x", save_name="train.py")
    assert (step.kind, step.valid) == ("invalid", False) and "no tool" in step.error


def test_only_chosen_actions(make):
    env = make(actions=["List Files", "Final Answer"])
    assert env.actions == ("List Files", "Final Answer") and not run(env).valid
    with pytest.raises(ValueError, match="Delete"):
        AgentSettings(actions=["Delete"])
    with pytest.raises(ValueError, match="once"):
        AgentSettings(actions=["List Files", "Final Answer", "List Files"])
    for fields in (("Action", "Thought"), ("Thought", "Thought", "Action", "Action Input"), ("x", *FIELDS)):
        with pytest.raises(ValueError, match="fields"):
            AgentSettings(fields=fields)


def test_an_action_is_an_entry_and_a_method(make, monkeypatch):
    def count_lines(env, step, file_name):
        return f"{len(text_of(env, file_name).splitlines())} lines"
    monkeypatch.setitem(ACTIONS, "Count Lines", env_module.Action({"file_name": "file"}, "counts the lines of a file."))
    monkeypatch.setattr(Env, "_count_lines", count_lines, raising=False)
    env = make(actions=list(ACTIONS))
    assert '- Count Lines {"file_name": "file"}: counts the lines of a file.' in env.messages[0]["content"]
    step = do(env, "Count Lines", file_name="train.py")
    assert step.valid and step.observation.startswith("6 lines\n")
    records.check_record(json.loads(json.dumps(record(step))), first=False)


# -- the trajectory

def test_prompt_names_every_tool_and_argument():
    prompt = system_prompt()
    for name, action in ACTIONS.items():
        assert f"- {name} {{" in prompt and all(f'"{key}"' in prompt for key in action.args)
    assert all(f"\n{name}: (" in prompt for name in FIELDS) and len(prompt) < 4_800  # about 850 tokens
    for fields in (FIELDS, SHORT):
        examples = system_prompt(fields=fields).split("Examples of a reply:\n\n")[1].split("\n\n")
        assert [parse(each, fields)[1::2] for each in examples] == [("Replace In Script", ""), ("Execute Script", "")]
    assert "Replace In Script" not in system_prompt(actions=("Execute Script",))


def test_messages_grow_by_reply_and_observation(make):
    env = make()
    first = env.reset()
    assert [message["role"] for message in first] == ["system", "user"] and "Raise VALUE." in first[1]["content"]
    step = env.step(GOOD, tokens=[1, 2, 3])
    assert env.messages[2] == {"role": "assistant", "content": GOOD, "tokens": [1, 2, 3]}
    assert env.messages[3:] == [{"role": "user", "content": step.observation}]
    assert step.messages == env.messages[2:]
    invented = GOOD + "\nObservation: all is well"
    step = env.step(invented, tokens=[4])
    assert step.messages[0] == {"role": "assistant", "content": GOOD + "\n"} and step.reply == invented


def test_a_reply_that_cannot_be_read_is_dropped_from_the_conversation(make):
    env = make()
    before = list(env.messages)
    step = env.step("I shall raise VALUE.", tokens=[1])
    assert env.messages == before + step.messages and [message["role"] for message in step.messages] == ["user"]
    assert step.observation in step.messages[0]["content"] and step.reply == "I shall raise VALUE."


def test_limits_of_steps_and_the_final_answer(make):
    env = make(steps=2)
    assert files(env, ".").ended == "" and not env.done
    assert env.step("nonsense").ended == "steps" and env.done
    env.reset()
    run(env)
    step = do(env, "Final Answer", final_answer="0.5")
    assert (step.ended, step.kind, step.reward) == ("final answer", "not an edit", 0.5)
    assert "left]" not in step.observation
    before = list(env.messages)
    with pytest.raises(ValueError, match="is over"):
        do(env, "Final Answer", final_answer="more")
    assert env.messages == before and env.index == 2


def test_limit_of_time(make, task):
    env = make()
    put(env, train="while True: pass")
    env.deadline = time.monotonic() + 1
    step = run(env)  # the task would give it 20 s
    assert (step.outcome, step.kind, step.ended) == ("timeout", "limit", "time") and step.script_seconds < 20
    env = make(seconds=0.0)
    step = files(env, ".")
    assert (step.kind, step.reward, step.valid, step.ended) == ("limit", 0.5, False, "time")
    assert "over" in step.observation


@pytest.mark.parametrize("starter_s, allowed_s", [(0.1, 1.5), (0.5, 1.5), (2.5, 7.5)])
def test_a_slow_machine_allows_more_seconds(make, task, monkeypatch, starter_s, allowed_s):
    limits = []

    def watched(*arguments, **options):
        limits.append((options["cpu_s"], options["timeout_s"]))
        return sandbox.execute(*arguments, **options)

    monkeypatch.setattr(env_module, "execute", watched)
    monkeypatch.setitem(tasks.info("made"), "starter_seconds", starter_s)
    env = make()
    env.score()
    assert limits == [(allowed_s, 4 * (allowed_s + 10))]
    assert env.time_limit_s == 1.5      # the agent is told the same anywhere
    limits.clear()
    monkeypatch.setitem(tasks.info("made"), "miniature", False)
    make().score()
    assert limits == [(20, 4 * (20 + 10))]      # ten seconds for imports of a cold script


def test_a_timeout_for_lack_of_time_is_not_remembered(make, task):
    env = make()
    put(env, train="import time; time.sleep(1); open('submission.csv', 'w').write('0.6')")
    env.deadline = time.monotonic() + 0.5
    assert run(env).outcome == "timeout"
    assert env.score()[0] == 0.6


def test_snapshot_and_restore(make):
    env = make()
    run(env)
    edit(env, "0.50", "0.60")
    state = env.snapshot()
    messages = list(env.messages)
    seen = dict(env.seen)
    first = edit(env, "0.60", "0.70")
    put(env, extra="print(1)")
    env.restore(state, messages, index=2, m_before=0.6, seen=seen)
    assert env.snapshot() == state and env.messages == messages and "extra.py" not in env.files
    second = edit(env, "0.60", "0.70")
    times = dict(seconds=0, script_seconds=0, time_left_s=0, seconds_left=0)
    assert record(first, **times) == record(second, **times)
    missing = dict(state, absent="0" * 64)
    with pytest.raises(ValueError, match="0000 is missing"):
        env.restore(missing)


def test_no_folder_is_left(make, tmp_path, monkeypatch):
    monkeypatch.setattr(env_module.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    env = make()
    put(env, locked="import os\nos.makedirs('a/b')\nos.chmod('a/b', 0)\nos.chmod('a', 0)")
    run(env, "locked.py")
    run(env)
    assert becomes_empty(tmp_path / "temporary")
    assert not [path for path in (tmp_path / "out" / "blobs").iterdir() if path.is_file()]


def test_four_trajectories_in_threads(make):
    results = {}

    def work(i):
        env = make()
        for j in range(3):
            old = f"0.{50 + 4 * (j - 1) + i}" if j else "0.50"
            new = f"0.{50 + 4 * j + i}"
            results[i, j] = edit(env, old, new).score
    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert results == {(i, j): (50 + 4 * j + i) / 100 for i in range(1, 5) for j in range(3)}


@pytest.mark.parametrize("text, value", [
    ("validation log loss: 0.0812", 0.0812), ("Validation accuracy 90.5 %", 90.5), ("accuracy = 1e-3.", 1e-3),
    ("epoch 1 validation 0.3\nepoch 2 validation 0.2\nsaved 7 files", 0.2), ("loss 0.4", None), ("", None),
    ("validation: nan", None), ("validation score of fold3x", None), ("validation -.5", -0.5),
    ("validation 1e999", None), ("validation accuracy: 0.3\nvalidation accuracy: inf", None),
    ("fold 3 validation: NaN", None), ("validation accuracy: 0.91 (12.5s)", 0.91),
    ("validation 0.91, best so far: inf", 0.91), ("accuracy 0.8 in validation", 0.8)])
def test_printed_metric(text, value):
    assert printed_metric(text, "accuracy") == value


def test_a_number_in_the_name_of_a_metric_is_no_score():
    assert printed_metric("validation 0.4123 map@5", "MAP@5") == 0.4123
    assert printed_metric("validation MAP@5: nan", "MAP@5") is printed_metric("Validation MAP@5:\n0.41", "MAP@5") is None


def test_clip_keeps_head_and_tail():
    assert shorten("abc", 3) == "abc"
    assert shorten("a" * 10 + "b" * 90, 20) == "a" * 10 + " ... 80 characters cut ... " + "b" * 10


# -- replay

@pytest.fixture
def recorded(make, tmp_path):
    """A trajectory file with edits, runs, failures and a second model's reply."""
    env = make(coder=lambda messages: "```python\n" + STARTER.replace("0.50", "0.75") + "```", steps=8)
    lines = [header(env, model="by hand")]
    for reply in (say("List Files", dir_path="."), say("Execute Script", script_name="train.py"),
                  say("Replace In Script", script_name="train.py", find="0.50", replace="0.60"), "nonsense",
                  say("Edit Script (AI)", script_name="train.py", edit_instruction="Raise it.", save_name="train.py"),
                  say("Undo Edit Script", script_name="train.py"),
                  say("Replace In Script", script_name="train.py", find="VALUE = 0.60", replace="VALUE = oh"),
                  say("Execute Script", script_name="train.py")):
        lines.append(record(env.step(reply), tokens=7))
    path = tmp_path / "out" / "trajectories" / "made-0.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, [*lines, {"type": "end", "ended": "context full"}])) + "\n")
    return path


def test_replay_reproduces(recorded, tmp_path, capsys):
    assert records.main(["replay", str(recorded), "--data", str(tmp_path / "data")]) == 0
    assert "8 steps replayed, 0 differences" in capsys.readouterr().out


@pytest.mark.parametrize("index, name, value", [
    (2, "observation", "rows: 4"), (3, "score", 0.61), (1, "snapshot", {"train.py": "f" * 64})])
def test_replay_detects_a_planted_difference(recorded, tmp_path, capsys, index, name, value):
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert lines[index][name] != value
    lines[index][name] = value
    recorded.write_text(lines_of(lines))
    if name == "snapshot":  # the state of the next step is gone
        assert records.main(["replay", str(recorded), "--data", str(tmp_path / "data")]) == 2
        assert "missing" in capsys.readouterr().err
    else:
        assert records.main(["replay", str(recorded), "--data", str(tmp_path / "data")]) == 1
        assert f"step {index - 1}, {name}" in capsys.readouterr().out


def test_replay_says_what_is_wrong_with_a_file(recorded, tmp_path, capsys):
    whole = recorded.read_text()
    recorded.write_text(whole + '{"type": "st')      # as a kill leaves it
    assert records.main(["replay", str(recorded), "--data", str(tmp_path / "data")]) == 0
    assert "8 steps replayed, 0 differences" in capsys.readouterr().out
    recorded.write_text(whole + '{"type": "st\n')
    assert records.main(["replay", str(recorded), "--data", str(tmp_path / "data")]) == 2
    assert "line 11 is not JSON" in capsys.readouterr().err
    (tmp_path / "empty").write_text("")
    assert records.main(["replay", str(tmp_path / "empty")]) == 2 and "empty" in capsys.readouterr().err
    assert records.main(["replay", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err == (
        f"env.py replay: {tmp_path}/absent does not exist or is empty; a trajectory starts with a header\n")
    assert records.main([]) == 2


def test_a_step_is_a_line_of_json(recorded):
    line = json.loads(recorded.read_text().splitlines()[1])
    assert line["type"] == "step" and {each.name for each in dataclasses.fields(env_module.Step)} <= set(line)


def test_the_forms_name_all_that_is_written(make):
    forms = records.FORMS
    names = {name for name in forms["step"] if not name.endswith("?")} | {"node"}
    assert names == {each.name for each in dataclasses.fields(env_module.Step)}
    assert {name for name in forms["header"] if not name.endswith("?")} == set(header(make())) - {"type"}


# -- nothing is had for nothing

def test_a_run_changes_no_score_that_an_edit_is_compared_with(make):
    env = make()
    put(env, train=STARTER.replace("0.50", "0.30"))
    step = run(env)
    assert (step.score, step.m_before, step.m_after, step.reward, env.m_before) == (0.3, 0.5, 0.5, 0.5, 0.5)
    step = edit(env, "rows =", "# a comment\nrows =")
    assert (step.m_before, step.m_top, step.m_after) == (0.5, 0.5, 0.3)
    assert step.reward == pytest.approx(0.0179862100)       # x = 8 * -0.2 / 0.4 = -4
    step = edit(env, "0.30", "0.50")
    assert (step.m_before, step.m_top, step.m_after) == (0.3, 0.5, 0.5)
    assert step.reward == pytest.approx(0.9820137900)       # what the fall has cost, and no more
    step = edit(env, "0.50", "0.55")
    assert (step.m_top, env.m_top) == (0.5, 0.55) and step.reward == pytest.approx(0.7310585786)


def test_a_script_that_alternates_by_a_file_earns_nothing(make):
    env = make(steps=99)
    put(env, train="""import os
good = os.path.exists("flag")
with open("submission.csv", "w") as file:
    file.write("0.5" if good else "0.1")
os.remove("flag") if good else open("flag", "w").close()
# 0
""")
    rewards = []
    scores = []
    for i in range(6):
        step = edit(env, f"# {i}", f"# {i + 1}")
        rewards.append(step.reward)
        scores.append(step.score)
        assert run(env).reward == 0.5
    assert scores == [0.1, 0.5, 0.1, 0.5, 0.1, 0.5] and sum(rewards) == pytest.approx(3.0)


def test_a_restored_state_has_the_best_score_it_had(make):
    env = make()
    other = make()
    for old, new in (("0.50", "0.70"), ("0.70", "0.60")):
        edit(env, old, new)
    other.restore(env.snapshot(), env.messages, index=2, m_before=0.6, m_top=0.7)
    assert edit(env, "0.60", "0.65").reward == edit(other, "0.60", "0.65").reward == pytest.approx(
        0.5 + 0.2689414214 - 0.1192029220)
    other.restore(env.snapshot(), m_before=0.6)
    assert other.m_top == 0.6
    other.restore(env.snapshot(), m_before=0.4)
    assert other.m_top == 0.5


# -- what comes from others

SHA = "0" * 64
BAD_PATHS = ["../x", "a/../../x", "/etc/x", "./x", "a//b", "a/", "", ".", "data", "data/x", ".undo", ".undo/x",
             ".undo/1", ".undo/1/", ".undo/1/../x", ".undo/0/x",
             ".undo/-1/x", ".undo/1e3/x", ".undo/\u0661/x", ".undo/1/data/x",
             ".undo/1/.undo/1/x", "x\0", "a\nb", "\ud800", "\u202e", "é" * 51, "a/" * 150 + "b", "-c.py", "~/x", 7,
             None]
BAD_HASHES = ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 63 + "\n", "0" * 64 + "\n", "../" * 21 + "0", "/x/y",
              b"0" * 64, 0, None, [SHA]]
BAD_SNAPSHOTS = [{path: SHA} for path in BAD_PATHS] + [{"x": sha} for sha in BAD_HASHES] + [
    {"a": SHA, "a/b": SHA}, {"a/b/c": SHA, "a": SHA}, [], [["a", SHA]], None, "a"]


@pytest.mark.parametrize("snapshot", BAD_SNAPSHOTS, ids=lambda each: ascii(each)[:40])
def test_a_snapshot_that_is_none_is_refused(make, snapshot):
    with pytest.raises(ValueError, match="snapshot"):
        storage.check_snapshot(snapshot)
    env = make()
    before = env.snapshot()
    with pytest.raises(ValueError, match="snapshot"):
        env.restore(snapshot)
    assert env.snapshot() == before


def test_snapshots_of_ours_are_accepted(make):
    env = make()
    for path in ("a/b/c.py", "data.csv", "data2/x", ".undox", ".hidden", "é/ü.py", "a b", "a" * 100, "...", "x~",
                 "a/-c"):
        env.files[path] = env.files["train.py"]
    env.files[".undo/12/a/b/c.py"] = env.files["train.py"]
    storage.check_snapshot(env.snapshot())
    env.restore(env.snapshot())
    assert run(env).outcome == "ok"


def test_a_blob_that_is_not_what_it_is_named_by_is_never_used(make, tmp_path):
    env = make()
    state = env.snapshot()
    blobs = env.blobs
    place = blobs.path(state["train.py"])
    place.write_text("print('planted')")
    with pytest.raises(storage.MissingBlob, match="damaged"):
        env.restore(state)
    with pytest.raises(storage.MissingBlob, match="damaged"):
        env_module.recorded_prompt(vars(env), env.task, env.seen, state, blobs, 1)
    env.reset()     # which stores it again
    assert place.read_text() == STARTER and run(env).outcome == "ok"
    secret = tmp_path / "data" / "made" / "private" / "answers.csv"
    sha = tasks.hash_files(secret)
    (blobs.folder / sha[:2]).mkdir(exist_ok=True)
    (blobs.folder / sha[:2] / sha).symlink_to(secret)
    with pytest.raises(storage.MissingBlob, match="missing"):
        env.restore({**state, "x": sha})


def test_a_state_with_too_large_files_is_gone(make, monkeypatch):
    env = make()
    state = {"a": env.blobs.put(b"x" * 600), "b": env.blobs.put(b"x" * 600), ".undo/1/a": env.blobs.put(b"y" * 600)}
    env.restore(state)
    monkeypatch.setattr(storage, "MAX_BYTES", 1000)
    with pytest.raises(storage.MissingBlob, match="more than"):
        env.restore(state)


@pytest.mark.parametrize("change", [
    lambda entry: entry.pop("score"), lambda entry: entry.pop("after"),
    lambda entry: entry.update(after={"../x": SHA}), lambda entry: entry.update(after={"train.py": "../../x"}),
    lambda entry: entry.update(after={"x": SHA}), lambda entry: entry.clear(),
    lambda entry: entry.update(after=[]), lambda entry: entry.update(result=[1]),
    lambda entry: entry["result"].update(more=1), lambda entry: entry["result"].pop("stdout")])
def test_a_cache_entry_that_a_run_does_not_give_counts_as_absent(make, change):
    env = make()
    assert env.score()[0] == 0.5 and env.cache.counts["runs"] == 1
    place, = [path for path in env.cache.folder.rglob("*") if path.is_file()]
    entry = json.loads(place.read_bytes())
    change(entry)
    env.cache.put(place.name, entry)
    assert env.score()[0] == 0.5 and env.cache.counts == {"runs": 2, "hits": 0}
    assert env.score()[0] == 0.5 and env.cache.counts["hits"] == 1      # it has been put right


def test_a_cache_entry_may_be_any_file(make, tmp_path):
    cache = env_module.ResultCache(tmp_path / "kept")
    cache.put("aa", 1)
    place = tmp_path / "kept" / "aa" / "aa"
    for text in (b"[" * 100_000, b"\xff", b""):
        place.write_bytes(text)
        assert cache.get("aa") is None
    place.unlink()
    os.mkfifo(place)
    assert cache.get("aa") is None
    place.unlink()
    place.mkdir()
    assert cache.get("aa") is None


HEADER_ERRORS = [("data_seed", -1), ("data_seed", "../x"), ("data_seed", None), ("show_scores", 1), ("task", "../x"),
                 ("task", ".."), ("task", 5), ("task", None), ("data", 5), ("prompt_format", "long"),
                 ("actions", "List Files"), ("actions", ["rm"]), ("actions", [["List Files"]]), ("fields", ["x"]),
                 ("fields", []), ("steps", 0), ("steps", "8"), ("steps", 1.5), ("steps", True), ("seconds", -1),
                 ("seconds", "9"), ("threads", 0), ("threads", None), ("python", 5), ("gpu", 0), ("sandbox", None),
                 ("m_init", None), ("m_init", "0.5"), ("m_init", float("nan")), ("m_init", 10 ** 400), ("m_best", [])]
STEP_ERRORS = [("index", "1"), ("reply", 5), ("reply", None), ("coder", "x"), ("coder", [5]), ("kind", "great"),
               ("outcome", "fine"), ("fields", []), ("args", {"a": 5}), ("valid", 1), ("m_after", "0.5"),
               ("m_before", float("inf")), ("m_top", {}), ("score", True), ("score", "0.5"), ("reward", "1"),
               ("change", {"constant": "1"}), ("change", {"constant": 1, "value": "*2"}), ("best_printed", "1"),
               ("change", {"constant": "x", "value": "*2"}), ("tried", [{}]), ("tried", {}), ("tried", ["1 *2"]),
               ("best_script", 5), ("news", None), ("time_left_s", None), ("seconds", float("nan")), ("ended", None),
               ("observation", ["x"]), ("printed", "1")]
BOTH_ERRORS = [("messages", {}), ("messages", ["x"]), ("messages", [{"role": "user"}]),
               ("messages", [{"role": "root", "content": "x"}]), ("messages", [{"role": "user", "content": None}]),
               ("messages", [{"role": "user", "content": "\ud800"}]),
               ("messages", [{"role": "user", "content": "x", "tokens": [1.5]}]),
               ("messages", [{"role": "user", "content": "x", "tokens": [-1]}]),
               ("snapshot", []), ("snapshot", {"../x": SHA}), ("snapshot", {"x": "../x"}), ("snapshot", None),
               ("type", 5)]


@pytest.mark.parametrize("line, name, value", [(0, *each) for each in HEADER_ERRORS + BOTH_ERRORS] + [
    (2, *each) for each in STEP_ERRORS + BOTH_ERRORS + [("messages", [])]], ids=ascii)
def test_wrong_types_in_a_trajectory_are_one_clear_sentence(some_lines, tmp_path, line, name, value):
    lines = [dict(each) for each in some_lines]
    lines[line][name] = value
    path = tmp_path / "x.jsonl"
    path.write_text(lines_of(lines))
    with pytest.raises(ValueError) as error:
        records.read_trajectory(path)
    said = str(error.value)
    assert said.startswith(f"{path}, line {line + 1} is no record of a trajectory: ") and name in said.lower()
    assert "\n" not in said and len(said) < 400


@pytest.mark.parametrize("line, name", [(0, "task"), (0, "messages"), (0, "snapshot"), (0, "m_init"), (2, "messages"),
                                        (2, "snapshot"), (2, "m_before"), (2, "m_after"),
                                        (2, "ended")])
def test_what_a_record_lacks_is_named(some_lines, tmp_path, line, name):
    lines = [dict(each) for each in some_lines]
    del lines[line][name]
    path = tmp_path / "x.jsonl"
    path.write_text(lines_of(lines))
    with pytest.raises(ValueError, match=f"line {line + 1} .*'{name}' is missing"):
        records.read_trajectory(path)


@pytest.mark.parametrize("ended", ["", 5, None, ["steps"]])
def test_an_end_has_a_reason(some_lines, tmp_path, ended):
    path = tmp_path / "x.jsonl"
    path.write_text(lines_of([*some_lines, {"type": "end", "ended": "steps"}]))
    assert records.end_reason(records.read_records(path)) == "steps"
    path.write_text(lines_of([*some_lines, {"type": "end", "ended": ended}]))
    with pytest.raises(ValueError, match="line 4 is no record of a trajectory: .*ended.*: expected a reason, found"):
        records.read_records(path)


@pytest.mark.parametrize("content", [b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b"{}",
                                     b'{"type": "step"}', b'{"type": ' + b"1" * 5000 + b"}"])
def test_lines_that_are_no_record_are_named(tmp_path, content):
    (tmp_path / "x").write_bytes(content + b"\n")
    with pytest.raises(ValueError, match="x, line 1(: expected an object| is no record| is not JSON)"):
        records.read_trajectory(tmp_path / "x")


SOME_LINES = []


@pytest.fixture
def some_lines(request):
    """A header and two steps, made once; each test has a copy."""
    if not SOME_LINES:
        env = request.getfixturevalue("make")()
        lines = [header(env), record(files(env, ".")), record(edit(env, "0.50", "0.60"))]
        SOME_LINES.append(json.dumps(lines))
    return json.loads(SOME_LINES[0])


def test_a_line_break_of_unicode_in_a_text_ends_no_line(some_lines, tmp_path):
    some_lines[1]["observation"] = "a\u2028b\x85c"
    (tmp_path / "x").write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in some_lines), "utf-8")
    assert records.read_trajectory(tmp_path / "x")[1][0]["observation"] == "a\u2028b\x85c"


# -- replay

@pytest.mark.parametrize("change", [
    dict(sandbox="off", python="PROGRAM", gpu="0", threads=64, data="/nowhere"), dict(sandbox="none")])
def test_a_file_does_not_choose_how_scripts_are_run(recorded, tmp_path, monkeypatch, capsys, change):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    program.chmod(0o755)
    change = {name: str(program) if value == "PROGRAM" else value for name, value in change.items()}
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    lines[0].update(change)
    recorded.write_text(lines_of(lines))
    seen = []
    execute = env_module.execute
    monkeypatch.setattr(env_module, "execute",
                        lambda *args, **options: seen.append(options) or execute(*args, **options))
    assert records.main(["replay", str(recorded), "--data", str(tmp_path / "data")]) == 0
    said = capsys.readouterr().out
    for name, value in change.items():
        assert f"recorded with {name} {value!r}" in said and f"--{name}" in said
    ours = {"sandbox": "on", "python": sys.executable, "gpu": None, "threads": 1}
    assert seen and all({name: each[name] for name in ours} == ours for each in seen)
    assert not (tmp_path / "was-run").exists()


def test_a_replay_writes_nothing_elsewhere(recorded, tmp_path):
    blobs = next(parent for parent in recorded.parents if (parent / "blobs").is_dir()) / "blobs"
    (blobs / "aa-away").symlink_to("/")
    with pytest.raises(ValueError, match="is a link that leads out of"):
        records.replay(recorded, data=tmp_path / "data")


def test_what_is_typed_for_a_replay_is_what_happens(recorded, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(env_module.Env, "__init__",
                        lambda self, *args, **options: seen.append((args, options)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        records.main(["replay", str(recorded), "--data=d", "--sandbox", "off", "--python", "p", "--gpu", "1",
                         "--threads", "2"])
    (args, options), = seen
    assert args[1] == "d"
    assert [options[name] for name in ("sandbox", "python", "gpu", "threads")] == ["off", "p", "1", 2]
    for wrong in (["--sandbx", "off"], ["--sand", "off"], ["--sandbox", "maybe"], ["--threads", "0"],
                  ["--threads", "x"], ["more"]):
        with pytest.raises(SystemExit, match="2"):
            records.main(["replay", str(recorded), *wrong])
        assert "error: " in capsys.readouterr().err and len(seen) == 1
    assert records.main(["play", str(recorded)]) == 2


def test_an_error_of_the_coder_is_replayed(make, tmp_path, capsys):
    def coder(messages):
        raise ValueError("5000 tokens do not fit")
    env = make(coder=coder)
    lines = [header(env), record(do(env, "Understand File", file_name="train.py", things_to_look_for="x"))]
    path = tmp_path / "out" / "x.jsonl"
    path.write_text(lines_of(lines))
    assert records.main(["replay", str(path), "--data", str(tmp_path / "data")]) == 0
    assert "1 steps replayed, 0 differences" in capsys.readouterr().out


# -- what scripts and coders may leave

def deep(folder, num=1200):
    here = os.open(folder, os.O_RDONLY)
    for _ in range(num):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def trees(folder, kind):
    """Leaves something in a folder as a script might; returns the paths that are to be kept."""
    folder.mkdir()
    (folder / "train.py").write_text("x")
    if kind == "deep":
        deep(folder)
    elif kind == "odd names":
        for name in (b"\xff", b"\xed\xa0\x80", b"a\nb", b"n" * 101, b"-c.py", b"~x", b"\xe2\x80\xae", b".undo",
                     b"\x1b[2J"):
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text("x")
        (folder / "fine.csv").write_text("x")
        return ["train.py", "fine.csv"]
    elif kind == "data":
        (folder / "data").write_text("x")
    elif kind == "in data":
        (folder / "data" / "a").mkdir(parents=True)
        (folder / "data" / "a" / "b").write_text("x")
    elif kind == "undo":
        (folder / ".undo" / "1").mkdir(parents=True)
        (folder / ".undo" / "1" / "train.py").write_text("x")
    elif kind == "no files":
        os.mkfifo(folder / "pipe")
        (folder / "link").symlink_to("/etc/passwd")
        (folder / "loop").symlink_to(".")
        (folder / "away").symlink_to("/etc")
        os.mknod(folder / "socket", 0o140600)
    elif kind == "long":
        path = folder.joinpath(*["p" * 90] * 3)
        path.mkdir(parents=True)
        (path / ("q" * 27)).write_text("x")
        (path / ("q" * 28)).write_text("x")
        (path / ("r" * 26)).mkdir()
        (path / ("r" * 26) / "s").write_text("x")
        return ["train.py", "/".join(["p" * 90] * 3 + ["q" * 27])]
    elif kind == "below":
        (folder / "a" / "b" / "c").mkdir(parents=True)
        for name in ("a/x", "a/b/x", "a/b/c/x"):
            (folder / name).write_text(name)
        return ["train.py", "a/x", "a/b/x", "a/b/c/x"]
    elif kind == "the same names":
        for name in ("a/x", "b/a/x", "a/b/x"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        return ["train.py", "a/x", "b/a/x", "a/b/x"]
    return ["train.py"]


@pytest.mark.parametrize("kind", ["deep", "odd names", "data", "in data", "undo", "no files", "long", "below",
                                  "the same names"])
def test_whatever_is_left_is_collected_or_dropped(make, tmp_path, kind):
    env = make()
    expected = trees(tmp_path / "left", kind)
    opened = len(os.listdir("/proc/self/fd"))
    found = storage.collect_folder(tmp_path / "left", env.blobs)
    assert sorted(found) == sorted(expected) and len(os.listdir("/proc/self/fd")) == opened
    assert all(env.blobs.path(sha).read_text() == (tmp_path / "left" / path).read_text() for path, sha in found.items())
    env.restore(found)
    (tmp_path / "built").mkdir()
    storage.build_folder(tmp_path / "built", found, env.blobs, env.public)
    assert (tmp_path / "built" / "data" / "train.csv").read_text() == "a b c\n"
    subprocess.run(["rm", "-rf", tmp_path / "left"], check=True)    # pytest itself cannot remove the deep one


@pytest.mark.parametrize("leave", [
    lambda folder: [(folder / f"f{i}").write_text("") for i in range(1001)],
    lambda folder: [(folder / f"d{i}").mkdir() for i in range(10_001)],
    lambda folder: os.truncate(folder / "train.py", 4 << 30),
    lambda folder: [os.truncate((folder / f"f{i}").write_text("x") and folder / f"f{i}", 150 << 20) for i in (1, 2)]])
def test_too_much_is_not_kept(make, tmp_path, leave):
    trees(tmp_path / "left", "")
    leave(tmp_path / "left")
    assert storage.collect_folder(tmp_path / "left", make().blobs) is None


def test_a_file_that_changes_while_it_is_collected(make, tmp_path, monkeypatch):
    """One becomes a link between look and open, one is gone, a folder becomes a link: they are not there."""
    env = make()
    secret = tmp_path / "data" / "made" / "private" / "answers.csv"
    folder = tmp_path / "left"
    trees(folder, "below")
    (folder / "gone").write_text("x")
    walk = storage.walk

    def changing(where, *below):
        for path, parent, entry in walk(where, *below):
            if path in ("train.py", "gone"):
                os.remove(folder / path)
                path == "train.py" and os.symlink(secret, folder / path)
            if path == "a":
                os.rename(folder / "a", folder / "z")
                os.symlink(secret.parent, folder / "a")
            yield path, parent, entry
    monkeypatch.setattr(storage, "walk", changing)
    found = storage.collect_folder(folder, env.blobs)
    assert "train.py" not in found and "gone" not in found
    assert not [path for path in env.blobs.folder.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


def test_what_a_script_has_made_unreadable_is_left_out_and_what_fails_in_our_store_is_not(make, tmp_path, monkeypatch):
    """Its files would be missing in silence."""
    env = make()
    folder = tmp_path / "left"
    trees(folder, "below")
    plain_open = storage.open_regular

    def open_regular(path, parent=None):        # whoever runs this: root may read what nobody may
        if path == "x" and os.path.samestat(os.fstat(parent), os.stat(folder / "a" / "b")):
            raise PermissionError(13, "Permission denied")
        return plain_open(path, parent)
    monkeypatch.setattr(storage, "open_regular", open_regular)
    assert sorted(storage.collect_folder(folder, env.blobs)) == ["a/b/c/x", "a/x", "train.py"]

    def put_file(file):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(env.blobs, "put_file", put_file)
    for number in (5, 13, 24, 28):      # also such as a script's own files may give
        opened = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError) as error:
            storage.collect_folder(folder, env.blobs)
        assert error.value.errno == number and len(os.listdir("/proc/self/fd")) == opened
    number = 5
    with pytest.raises(OSError, match="Input/output error"):
        run(env)


def test_a_folder_that_is_gone_or_locked_is_collected(make, tmp_path):
    env = make()
    assert storage.collect_folder(tmp_path / "absent", env.blobs) == {}
    trees(tmp_path / "left", "below")
    os.chmod(tmp_path / "left", 0)
    assert len(storage.collect_folder(tmp_path / "left", env.blobs)) == 4


@pytest.mark.parametrize("code", [
    "shutil.rmtree('data', ignore_errors=True); open('data', 'w').write('x')",
    "shutil.rmtree('data'); os.symlink('/', 'data')",
    "os.remove('train.py'); os.mkdir('train.py'); open('train.py/data', 'w').write('x')",
    "os.makedirs('data/x/y'); open('data/x/y/z', 'w').write('x')"])
def test_after_any_run_there_is_another(make, code):
    env = make()
    put(env, odd=f"import os, shutil\n{code}", fine="print(sorted(__import__('os').listdir('data')))")
    assert run(env, "odd.py").outcome == "ok"
    assert "['images', 'link.csv', 'train.csv']" in run(env, "fine.py").observation
    for step in (edit(env, "0.50", "0.60"), undo(env), run(env)):
        assert step.kind in KINDS


def test_a_full_disk_of_ours_is_an_outcome(make, monkeypatch):
    env = make()
    before = env.snapshot()
    for number in env_module.NO_SPACE:
        def put(content):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(env.blobs, "put", put)
        monkeypatch.setattr(env.blobs, "put_file", put)
        step = edit(env, "0.50", "0.60")
        assert (step.kind, step.outcome, step.reward, step.m_after) == ("limit", "disk full", 0.5, 0.5)
        assert "could not store" in step.detail and step.detail in step.observation and env.snapshot() == before
        step = run(env)
        assert (step.kind, step.outcome, step.reward) == ("limit", "disk full", 0.5) and env.snapshot() == before

    def put(content):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(env.blobs, "put", put)
    with pytest.raises(PermissionError):
        edit(env, "0.50", "0.60")


def test_a_workspace_cannot_grow_without_end(make, monkeypatch):
    env = make(steps=99)
    monkeypatch.setattr(storage, "MAX_FILES", 3)
    copies = [do(env, "Copy File", source="train.py", destination=f"c{i}.py").valid for i in range(4)]
    assert copies == [True, True, False, False] and len(env.files) == 3
    monkeypatch.setattr(storage, "MAX_BYTES", 3 * len(STARTER) + 4)
    assert "full" in do(env, "Replace In Script", script_name="c1.py", find="rows:", replace="rows:" + "x" * 5).error
    for i in range(4):
        assert do(env, "Replace In Script", script_name="c1.py", find=f"{i}.5", replace=f"{i + 1}.5").valid
    assert sorted(path for path in env.files if path.startswith(".undo")) == [f".undo/{i}/c1.py" for i in (1, 2, 3, 4)]
    assert env.index == 9


def test_an_edit_makes_no_script_too_large_for_the_next(make, monkeypatch):
    env = make(coder=lambda messages: f"```\n{'x' * 990}\n```")
    monkeypatch.setattr(workspace, "MAX_SCRIPT", 990)
    step = do(env, "Edit Script (AI)", script_name="train.py", edit_instruction="x", save_name="train.py")
    assert (step.valid, step.kind) == (False, "invalid") and "longer" in step.error
    monkeypatch.setattr(workspace, "MAX_SCRIPT", len(STARTER) + 3)
    assert edit(env, "rows:", "rows:xyz").valid
    assert "a script may have" in edit(env, "rows:", "rows:!").error and env.index == 3


def test_a_script_that_is_too_large_to_be_edited_is_run(make, monkeypatch):
    env = make(steps=99)
    put(env, big="x = 1\n" * 1000)
    monkeypatch.setattr(workspace, "MAX_SCRIPT", 5000)
    assert run(env, "big.py").outcome == "ok"
    step = do(env, "Copy File", source="big.py", destination="train.py")
    assert (step.kind, step.outcome, step.reward) == ("failed", "no submission", 0.0)
    assert "cannot be edited" in edit(env, "x = 1", "x = 2").error
    assert undo(env).score == 0.5


@pytest.mark.parametrize("name", ["-c.py", "-m", "--help", "-", "./-c.py", " -c", "~/x", "./~x"])
def test_a_name_that_is_an_option_names_no_file(make, name):
    env = make()
    assert not do(env, "Copy File", source="train.py", destination=name).valid and list(env.files) == ["train.py"]
    env.files[name.strip().removeprefix("./")] = env.files["train.py"]
    step = run(env, name)
    assert (step.valid, step.outcome) == (False, None)


@pytest.mark.parametrize("answer, kind", [
    ("```\n" + "x = 1\n" * 10_000_000, "invalid"), ("```\n" * 3_000_000, "invalid"), ("", "not an edit"),
    ("```\nprint('\ud800')\n```", "failed"), (ValueError("\ud800" * 1000), "invalid")],
    ids=lambda each: ascii(each)[:20])
def test_a_coder_may_answer_anything(make, answer, kind):
    def coder(messages):
        if isinstance(answer, Exception):
            raise answer
        return answer
    env = make(coder=coder)
    for action, args in (("Edit Script (AI)", dict(script_name="train.py", edit_instruction="x", save_name="train.py")),
                         ("Understand File", dict(file_name="train.py", things_to_look_for="x"))):
        step = do(env, action, **args)
        assert step.kind == kind or action == "Understand File"
        line = json.dumps([record(step), env.messages], ensure_ascii=False).encode()
        assert len(line) < 8 * workspace.MAX_SCRIPT
        records.check_record(json.loads(line)[0], False)


def test_a_text_that_overlaps_itself_does_not_occur_once(make):
    env = make()
    put(env, train="VALUE = 'aaa'\n" + STARTER)
    assert "occurs more than once" in edit(env, "aa", "b").error
    assert text_of(env, "train.py").startswith("VALUE = 'aaa'")
    assert edit(env, "aaa", "b").valid


def test_undo_of_what_cannot_be_shown(make):
    """A binary file that was replaced comes back, and what is said is what was done."""
    env = make()
    env.files["x.bin"] = binary = env.blobs.put(b"\0\xff" * 100)
    for source, target in (("train.py", "x.bin"), ("data/images/1.bin", "x.bin")):
        assert do(env, "Copy File", source=source, destination=target).valid
    for expected in (env.blobs.put(STARTER.encode()), binary):
        step = do(env, "Undo Edit Script", script_name="x.bin")
        assert step.valid and step.kind == "scored" and env.files["x.bin"] == expected


# -- in linear time: with quadratic work each of these would take minutes

BLANKS = " " * 500_000
LONG = [BLANKS, "A = 1" + BLANKS + "\n", ("A = 1" + " " * 50_000 + "x\n") * 10, "A = 1\n" + "\n" * 500_000,
        "#" * 500_000, "A" * 500_000, "A = " * 100_000, "\t \n" * 200_000, "1" * 500_000, "1." * 250_000,
        "A = 1\n" * 80_000, "validation " + "1" * 500_000, "validation 1x\n" * 40_000, "`" * 500_000,
        "```\n" * 100_000, "Observation" * 40_000, "Action: " * 60_000,
        " \t*" * 150_000, "\r" * 300_000, "\u2028" * 300_000]


@pytest.mark.parametrize("text", LONG, ids=lambda text: ascii(text)[:16])
def test_work_on_any_text_is_linear(task, text):
    began = time.process_time()
    prompts.short_prompt(task, env_module.NOTHING | {"news": text}, text, True, 1)
    env_module.cut_observation(text)
    scripts.difference(text, text + "\nx")
    scripts.difference("x\n" + text, text)
    printed_metric(text, "validation")
    records._masked(text)
    parse(text[:50_000])
    env_module.shorten(text, 100)
    assert time.process_time() - began < 20


@pytest.mark.parametrize("old, new", [
    ("x\n" * 250_000, "x\ny\n" * 200_000), ("x\n" * 500_000, "x\n" * 400_000), ("x\ny\n" * 900, "y\nx\n" * 99),
    ("".join(f"{i % 97}\n" for i in range(200_000)), "".join(f"{i % 89}\n" for i in range(200_000)))])
def test_texts_that_difflib_takes_for_ever_for_are_compared(old, new):
    began = time.process_time()
    found = scripts.difference(old, new)
    assert time.process_time() - began < 20 and found


def test_the_difference_of_ordinary_scripts_is_difflibs(make):
    draw = random.Random(0)
    for _ in range(200):
        old = [draw.choice(["x = 1", "y = 2", "", f"z = {draw.random()}"]) for _ in range(draw.randint(0, 60))]
        new = [line for line in old if draw.random() < 0.9]
        new[draw.randint(0, len(new)):0] = ["new"] * draw.randint(0, 3)
        expected = list(scripts.difflib.unified_diff(old, new, lineterm="", n=2))[2:]
        assert scripts.difference(*("".join(f"{line}\n" for line in lines) for lines in (old, new))) == expected


def test_long_scripts_are_not_compared():
    found = scripts.difference("x\n" * 5000, "y\n" * 4999)
    assert found == ["(too long to be shown: 5,000 lines before, 4,999 after)"]


def test_a_folder_of_many_files_is_listed_in_part(make, tmp_path):
    env = make()
    for i in range(300):
        (tmp_path / "data" / "made" / "public" / "images" / f"{i:05}.png").touch()
    lines = files(env, "data/images").observation.splitlines()
    assert lines[0] == "00000.png  0 bytes" and lines[99:101] == ["00099.png  0 bytes", "... and 201 more"]


def test_every_kind_of_attack_leaves_a_step_and_nothing_else(tmp_path):
    import soak
    rows, wrong = soak.soak(tmp_path, 0, limit=0.4, slack=60, each=True)
    assert wrong == [] and set(rows) == set(soak.NAMES) and len(soak.NAMES) > 90


# -- jobs in threads

def test_the_line_of_progress(tmp_path):
    begun = {tmp_path / "a": [], tmp_path / "b": [{"type": "header"}, {"type": "step", "ended": ""}]}
    run = parallel.Progress(begun, 4)
    seconds = 0
    run.bar._time = lambda: run.bar.start_t + seconds
    run.bar.smoothing = 0
    assert str(run.bar).strip().startswith("12% 1/8 [00:00<") and str(run.bar).endswith(", 0/2 trajectories]")
    seconds = 60        # 4 of 7 steps are done, three of them in a minute
    for number in range(3):
        run.write(tmp_path / "a", {"type": "step", "tokens": 200, "ended": "steps" if number == 2 else ""})
    assert str(run.bar).strip() == "57% 4/7 [01:00<01:00, 20.00s/step, 1/2 trajectories, 10.0 tokens/s]"
    run.stop.set()
    run.write(tmp_path / "a", {"type": "step", "ended": ""})
    assert len((tmp_path / "a").read_text().splitlines()) == 3


def test_progress_may_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    code = ("from pathlib import Path; from support.parallel import Progress; import sys; file = Path(sys.argv[1]); "
            "Progress({file: []}, 3).write(file, {'type': 'step', 'tokens': 5})")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, cwd=Path(__file__).parents[1])
    assert json.loads((tmp_path / "a").read_text())["tokens"] == 5


def test_the_first_error_stops_all():
    begun = []

    def work(number):
        begun.append(number)
        if number == 1:
            raise ValueError("the first")
        time.sleep(0.2)
        return number
    with pytest.raises(ValueError, match="the first"):
        parallel.run_parallel([(number,) for number in range(50)], work, 2)
    assert len(begun) < 5
    assert parallel.run_parallel([(number,) for number in (2, 3, 4)], work, 2) == [2, 3, 4]


def test_a_pipe_in_place_of_a_trajectory_is_an_error_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "toy-0.jsonl")
    with pytest.raises(ValueError, match="expected an ordinary file"):
        records.read_trajectory(tmp_path / "toy-0.jsonl")


class Blocks:
    """A model whose replies end where one of the texts to stop at begins, as an engine's and a server's do. Each letter
    is a token; an engine, which has a context, returns them, and a server counts them."""

    def __init__(self, text, no_reply="", context=None):
        self.text = text
        self.no_reply = no_reply
        self.context = context
        self.limits = []

    def chat(self, messages, max_new_tokens, stop=(), **options):
        self.limits.append(max_new_tokens)
        text = self.text.partition(stop)[0] if stop else self.text
        tokens = list(text.encode())
        if self.context:
            return Completion(text, tokens, [0.0] * len(tokens), "stop", 100, no_reply=self.no_reply)
        return Completion(text, [], [], "stop", 100, num_tokens=len(tokens), no_reply=self.no_reply)


@pytest.mark.parametrize("text, no_reply, expected, asked", [
    ("```python\nx = 1\n```\nThat is all.", "", "```python\nx = 1\n```\n", 1),
    ("Sure:\n```\nx = 1\n```\n", "", "Sure:\n```\nx = 1\n```\n", 2), ("", "a refusal", "", 1)])
def test_a_whole_script_ends_with_its_block_however_that_opens(text, no_reply, expected, asked):
    model = Blocks(text, no_reply)
    question = [{"role": "user", "content": f"Change x. {env_module.WHOLE_SCRIPT}"}]
    completion = ask_coder_model(model, question)
    assert (completion.text, len(model.limits), completion.prompt_tokens) == (expected, asked, 100 * asked)


@pytest.fixture
def ask_coder(task, tmp_path):
    """Plays one Edit Script (AI) with a model as the coder; returns the record of the step."""
    def play(model, **more):
        cfg = SimpleNamespace(**{
            "data": str(tmp_path / "data"), "python": None, "gpu": "", "threads": 1, "sandbox": "on", "clock": "all",
            "actions": env_module.DEFAULT_ACTIONS, "fields": SHORT, "prompt_format": "full", "show_scores": True,
            "steps": 1, "seconds": 1800.0, "seed": 0, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 100,
            "coder": "model", **more})
        lines = []
        run = SimpleNamespace(stop=threading.Event(), write=lambda path, line: lines.append(line))
        reply = say("Edit Script (AI)", script_name="train.py", edit_instruction="x", save_name="new.py")
        play_trajectory(cfg, task, 0, tmp_path / "made-0.jsonl", lambda env, lines, seed: (reply, None, {}), model,
                        tmp_path / "out", env_module.ResultCache(tmp_path / "kept"), run, {})
        _, step = lines
        assert step["ended"] == "steps" and step["valid"]
        return step
    return play


@pytest.mark.parametrize("context", [16_384, None])
def test_tokens_of_a_coder_that_is_asked_twice_are_those_of_both_replies(ask_coder, context):
    """The first, cut at its bare ```, has 5 letters and the second 20. One that ends with its block has 15."""
    step = ask_coder(Blocks("Sure:\n```\nx = 1\n```\n", context=context))
    assert (step["coder_tokens"], step["coder_prompt_tokens"], step["coder_replies"]) == (5 + 20, 200, 1)
    step = ask_coder(Blocks("```python\nx = 1\n```\nThat is all.", context=context))
    assert (step["coder_tokens"], step["coder_prompt_tokens"], step["coder_replies"]) == (15, 100, 1)


@pytest.mark.parametrize("context, coder, max_new_tokens, limit", [
    (16_384, "model", 100, 4096), (8192, "model", 100, 4096), (4097, "model", 100, 2048), (4096, "tiny", 9000, 2048),
    (16_384, "model", 9000, 8192), (32_768, "expert", 9000, 9000), (32_768, "tiny", 9000, 4096),
    (None, "model", 9000, 9000)])
def test_a_coder_may_write_half_its_context_at_most(ask_coder, context, coder, max_new_tokens, limit):
    """The other half is for the script that it reads. What a server's is nobody knows here."""
    model = Blocks("```python\nx = 1\n```\n", context=context)
    ask_coder(model, coder=coder, max_new_tokens=max_new_tokens)
    assert model.limits == [limit]
