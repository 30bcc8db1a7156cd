"""The small agent of `python sft.py`: short prompts that any record can give again, ideas made of a script's numbers, a
tokenizer of its own, texts whose names are drawn anew, and the whole command in its smallest form."""
import json
import re
from dataclasses import replace

import pytest

import env
import sft
import tasks
from test_collect import STARTER, settings, toys, whole  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def short(whole):
    """The folder of the toy tasks, with 3 trajectories of each collected under short prompts in "short"."""
    folder, _ = whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "FOLDERS", [folder / "tasks"])
        s = settings(folder, "short", prompt="short", fields=sft.SHORT_FIELDS, actions=sft.SHORT_ACTIONS, num=3, steps=8,
                     keep=100)
        sft.collect(s)
        yield folder, s


# ---- short prompts

def test_a_short_prompt_by_hand(short):
    folder, s = short
    world = env.Env("toy-a", folder / "data", out=folder / "hand", prompt="short", fields=s.fields)
    head = "Task: toy-a\nMAE, lower is better\nLast: {}\n"
    script = STARTER.split("\n", 1)[1].replace("ANSWER", "10").rstrip("\n")
    assert world.prompt() == [{"role": "user", "content": head.format("nothing") + script}]

    def after(action, **args):
        world.step(f"Thought: x\nAction: {action}\nAction Input: {json.dumps(args)}")
        return world.prompt()[0]["content"]

    assert after("Execute Script", script_name="train.py") == head.format("Execute Script: 7") + script
    change = {"script_name": "train.py", "find": "SHIFT = 0", "replace": "SHIFT = 4"}
    edited = script.replace("SHIFT = 0", "SHIFT = 4")
    assert after("Replace In Script", **change) == head.format("Replace In Script: saved") + edited
    assert after("Execute Script", script_name="train.py") == head.format("Execute Script: 3, better than 7") + edited
    assert after("Undo Edit Script", script_name="train.py") == head.format("Undo Edit Script: saved") + script
    assert after("Execute Script", script_name="train.py") == head.format("Execute Script: 7, no better than 3") + script
    assert after("Replace In Script", **change | {"find": "absent"}).startswith(
        head.format('Replace In Script: Nothing was done. "find" does not occur in train.py; copy it exactly as')[:-25])
    after("Replace In Script", **change | {"replace": "SHIFT = 1 / 0"})
    assert "\nLast: Execute Script: failed, ZeroDivisionError: division by zero" in after(
        "Execute Script", script_name="train.py")
    world.step("nonsense")
    assert "\nLast: Nothing was done. The entry \"Thought:\" is missing" in world.prompt()[0]["content"]


def test_every_prompt_can_be_made_again_from_the_record(short):
    """By restoring the state, and by reading for training: both give what the policy was shown."""
    folder, s = short
    file = sorted((folder / "short").glob("toy-a-*.jsonl"))[0]
    head, steps = env.read_trajectory(file)
    assert head["prompt"] == "short" and env.replay(file, say=lambda line: None) == 0
    played = env.Env("toy-a", folder / "data", out=folder / "again", prompt="short", fields=s.fields, actions=s.actions,
                     steps=s.steps)
    restored = env.Env("toy-a", folder / "data", out=folder / "short", prompt=head["prompt"], fields=head["fields"])
    snapshot, messages, shown = head["snapshot"], head["messages"], []
    for step in steps:
        restored.restore(snapshot, messages, index=step["index"], m_before=step["m_before"])
        shown.append(played.prompt())
        assert restored.prompt() == shown[-1]
        played.step(step["reply"])
        snapshot, messages = step["snapshot"], messages + step["messages"]
    found, left_out = sft.conversations(file, data=str(folder / "data"), say=lambda line: None)
    assert [one.messages for one in found] == [
        [*prompt, {"role": "assistant", "content": step["reply"]}] for prompt, step in zip(shown, steps)]
    assert all(one.trained == [1] for one in found) and not left_out and len({str(each) for each in shown}) > 4


def test_a_short_prompt_shows_whole_lines_and_never_more_than_its_limit():
    lines = "".join(f"NAME_{i} = {i}\n" for i in range(200))
    shown = env.shown_lines('"""Doc."""\nimport os\n' + lines)
    assert lines.startswith(shown + "\n") and env.SHORT_SCRIPT - 15 < len(shown) <= env.SHORT_SCRIPT
    assert env.shown_lines("import os\nx = 1\n") == "import os\nx = 1"
    assert len(env.shown_lines("y" * 5000)) == env.SHORT_SCRIPT and env.shown_lines("") == ""


# ---- the scripted expert with short prompts

def test_ideas_made_of_a_scripts_numbers():
    ideas = sft.constants("SEED = 3\nSIDE = 4   # pixels\nRATE = 0.5\nSHIFT = 0\nNAME = 'x'\nTWICE = 2\nNOT_TWICE = 2\n"
                          "def f():\n    LOCAL = 3\n")
    edits = [one["edits"][0]["replace"] for one in ideas]
    assert edits == ["SIDE = 8", "SIDE = 2", "SIDE = 12", "SIDE = 40", "SIDE = 1", "RATE = 0.25", "RATE = 0.05",
                     "SHIFT = 1", "SHIFT = 2", "SHIFT = 5", "NOT_TWICE = 4", "NOT_TWICE = 1", "NOT_TWICE = 6",
                     "NOT_TWICE = 20"]
    assert [one["title"] for one in ideas[:2]] == ["SIDE 8", "SIDE 2"]


def test_the_short_expert_tries_runs_and_takes_back(short):
    folder, s = short
    for file in (folder / "short").glob("*.jsonl"):
        _, steps = env.read_trajectory(file)
        names = [step["action"] for step in steps]
        assert all(step["valid"] for step in steps) and names[:3] == ["Execute Script", "Replace In Script",
                                                                      "Execute Script"]
        assert steps[-1]["ended"] == ("final answer" if "Final Answer" in names else "steps")
        for before, step in zip(steps, steps[1:]):      # what is worse than before goes
            if before["action"] == "Execute Script":
                worse = before["index"] > 0 and before["m_after"] >= min(
                    one["m_after"] for one in steps[:before["index"] - 1])
                undone = step["action"] == "Undo Edit Script"
                assert undone == worse and (undone or step["action"] in ("Replace In Script", "Final Answer"))
