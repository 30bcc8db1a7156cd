"""Medium prompts and their expert, the reward of single actions in recorded states, and the exact comparison of agents.
The tasks run in a moment, so every score is known beforehand."""
import itertools
import json
import re
import shutil
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

import env
import eval as evaluation
import sft
import tasks
from docs import real_run, seeds
from support import (
    cli, collection, conversations, endpoint, miniature, play, prompts, records, scripts, states, storage, tables)
from support.cli import RunError
from support.files import write_atomic
from test_collect import IDEAS, add_toys, drive, idea, settings, toys  # noqa: F401  (a fixture)
from test_eval import result, run_of

MEDIUM = {name: value for name, value in prompts.MEDIUM_AGENT.items() if name != "context"}


def say(action, **args):
    return f"Thought: try it\nAction: {action}\nAction Input: {json.dumps(args)}"


@pytest.fixture
def world(toys):
    tasks.prepare("toy-a", data=toys / "data", log=lambda line: None)
    agent = {name: MEDIUM[name] for name in ("prompt_format", "fields", "actions")}
    return env.Env("toy-a", toys / "data", out=toys / "hand", steps=8, **agent)


# -- medium prompts

SCRIPT = '''"""About this."""
import os

# a comment
RATE = 0.5      # of learning


def load(path):
    """Reads it."""
    text = """kept # here"""
    return text + "# and here"
'''


def test_code_on_the_line_of_a_string_stays():
    for text in ('class Odd(Exception): "doc"\n', 'x = 1; "doc"\n', 'def f():\n    """doc"""; return 1\n'):
        assert scripts.without_comments(text) == text


def test_a_text_keeps_its_empty_lines_and_a_class_its_only_statement():
    for text in ('class Stop(Exception):\n    """Ends it."""\nx = 1\n', 'def f():\n    "doc"\n',
                 'x = """a \n\n    # b\n"""\n'):
        assert scripts.without_comments(text) == text
    assert scripts.without_comments('def f():\n    """a\n\n    b"""\n\n    return 1\n') == "def f():\n    return 1\n"


def test_a_script_without_comments():
    assert scripts.without_comments(SCRIPT) == (
        'import os\nRATE = 0.5\ndef load(path):\n    text = """kept # here"""\n    return text + "# and here"\n')


def test_no_starter_loses_more_than_comments():
    for id in tasks.names("all"):
        task = tasks.load(id)
        shorter = scripts.without_comments(task.starter)
        compile(shorter, id, "exec")
        kept, found = ([each[:2] for each in scripts.constants(text)] for text in (shorter, task.starter))
        assert kept == found
        assert '"""' not in shorter and not any(line.lstrip().startswith("#") for line in shorter.splitlines())


def test_a_medium_prompt_by_hand(world):
    """toy-a is to predict 10; GAIN * VALUE + SHIFT is 3 at first. The score it prints is the graded one."""
    script = ('from math import fabs\nVALUE = 3\nSHIFT = 0\nGAIN = 1\nvalue = GAIN * VALUE + SHIFT\n'
              'print("validation MAE:", fabs(value - 10))\n'
              'open("submission.csv", "w").write("id,y\\n" + "".join(f"{i},{value}\\n" for i in (1, 2)))')

    def shown(steps_left, best, tries, value):
        now = script.replace("VALUE = 3", f"VALUE = {value}")
        return (f"The score is MAE; lower is better. {steps_left} steps left. Best score: {best}.\n"
                f"Tries so far:\n{tries}\n\ntrain.py now:\n```python\n{now}\n```\n"
                "Use one tool, with names and lines of this script, and reply in this form:\n"
                "Thought: (why, in one short sentence)\nAction: (the name of the tool)\nAction Input: (its JSON)")

    system, user = world.prompt()
    assert user == {"role": "user", "content": shown(8, "none", "none", 3)}
    world.step(say("Execute Script", script_name="train.py"))
    assert world.prompt()[1]["content"] == shown(7, "7, by this script", "Execute Script: 7", 3)
    world.step(say("Set Constant", constant="VALUE", value="8"))
    tries = "Execute Script: 7\nVALUE = 3 -> 8: 2, better than 7"
    assert world.prompt()[1]["content"] == shown(6, "2, by this script", tries, 8)
    world.step(say("Set Constant", constant="NOTHING", value="8"))
    world.step("no format at all")
    assert world.prompt()[1]["content"] == shown(4, "2, by this script", tries, 8)      # slips are not told
    world.step(say("Replace In Script", script_name="train.py", find="VALUE = 8", replace="VALUE = 30"))
    tries += "\nReplace In Script, try it: 20, worse than 2"
    assert world.prompt()[1]["content"] == shown(3, "2, by an earlier script", tries, 30)


def test_examples_in_a_medium_prompt_can_be_carried_out():
    """What a model copies from them is a valid action at every step of every task's starter."""
    for id in tasks.names("all"):
        script = scripts.without_comments(tasks.load(id).starter)
        for steps_left in range(1, 9):
            examples = prompts.medium_edits(script, steps_left)
            args = examples["Set Constant"][1]
            assert scripts.set_constant(script, **args) != script
            args = examples["Replace In Script"][1]
            assert args["find"] != args["replace"] and args["find"] in script
    assert prompts.medium_edits("print(1)\n", 3) == {}


def test_a_long_script_is_cut_at_a_line_and_the_prompt_says_so():
    task = SimpleNamespace(metric="MAE", direction="down", entry="train.py")
    script = "".join(f"NUMBER_{i} = {i}\n" for i in range(1000))
    actions = {name: env.ACTIONS[name].args for name in MEDIUM["actions"]}
    fields = {name: env.EXPLAIN[name] for name in MEDIUM["fields"]}
    text = prompts.medium_prompt(task, env.NOTHING, script, False, 3, actions, fields)[1]["content"]
    shown = text.partition("```python\n")[2].partition("\n```")[0].splitlines()
    assert shown[-1] == "... (the rest is not shown)" and len("\n".join(shown[:-1])) <= prompts.SCRIPT_ROOM
    assert all(line in script.splitlines() for line in shown[:-1])


@pytest.mark.parametrize("name", ["VALUE", " VALUE "])
def test_a_constant_has_a_number_and_a_name(world, name):
    step = world.step(say("Set Constant", constant=name, value="8"))
    assert step.valid and step.score == 2 and step.change == {"constant": "3", "value": "8"}


@pytest.mark.parametrize("name, word", [
    ("RATE", "no constant RATE"), ("value", "no constant value"), ("VALUE = 3", "no constant VALUE = 3")])
def test_another_name_is_no_constant(world, name, word):
    step = world.step(say("Set Constant", constant=name, value="8"))
    assert not step.valid and word in step.error


# -- the expert

def test_an_idea_becomes_actions_that_give_the_same_script():
    """For every idea of every task; applied to the whole starter, it gives the same lines."""
    num = 0
    for id in tasks.names("all"):
        task = tasks.load(id)
        for idea in tasks.ideas(id):
            script = scripts.without_comments(task.starter)
            actions = miniature.idea_actions(task.starter, idea)
            for action, args in actions:
                assert action == "Set Constant" or script.count(args["find"]) == 1
                script = miniature.carry_out(script, action, args)
            if actions:
                num += 1
                assert script == scripts.without_comments(tasks.apply(task.starter, idea))
                assert len(actions) <= miniature.MAX_PARTS
    assert num > 100


def collect_medium(toys, **more):
    cfg = settings(toys, "medium", **{**MEDIUM, "num": 3, "steps": 9, **more})
    sft.collect(cfg)
    return cfg


def test_the_expert_takes_back_what_is_no_better_and_learns_no_failed_edit(toys):
    collect_medium(toys, seed=2)
    num_failed = 0
    replies = []
    for file in sorted((toys / "medium").glob("*.jsonl")):
        head, steps = records.read_trajectory(file)
        assert all(step["valid"] for step in steps) and steps[0]["action"] == "Execute Script"
        best = steps[0]["printed"]
        for step, following in itertools.pairwise(steps):
            if step["action"] in ("Execute Script", "Undo Edit Script"):
                continue
            is_better = step["outcome"] == "ok" and step["printed"] < best
            num_failed += step["kind"] == "failed"
            if is_better:
                best = step["printed"]
            elif "two parts" not in following["reply"] and following["fields"]["Thought"] != step["fields"]["Thought"]:
                assert following["action"] == "Undo Edit Script"
        replies += [step["reply"] for step in steps if step["kind"] != "failed"]
        assert records.replay(file, log=lambda line: None, data=toys / "data") == 0
    found, _ = conversations.read_conversations(toys / "medium", toys / "data", log=lambda line: None)
    assert num_failed and sorted(talk.messages[-1]["content"] for talk in found) == sorted(replies)
    assert {tuple(message["role"] for message in talk.messages) for talk in found} == {("system", "user", "assistant")}


LETTERS = {"Execute Script": "R", "Undo Edit Script": "U", "Set Constant": "E", "Replace In Script": "E"}


def test_without_shown_scores_the_script_is_run_after_the_edits_of_an_idea(toys):
    """All of them, since a part alone does not run; what is no better is taken back whole, and what is better stays: of
    8 instead of 3 where 10 is right."""
    steps = drive(toys, [IDEAS[0], IDEAS[4]], steps=14, show_scores=False, **{
        name: MEDIUM[name] for name in ("prompt_format", "fields", "actions")})
    assert all(step.valid for step in steps)
    tries = re.findall("(E+)(R?)(U*)", "".join(LETTERS[step.action] for step in steps)[1:])
    assert steps[0].action == "Execute Script" and sum(map(len, itertools.chain(*tries))) == len(steps) - 1
    best = steps[0].printed
    number = 0      # of the step that has run the script
    for edits, run, undone in tries[:-1]:      # the last may be cut short
        number += len(edits) + 1
        is_better = steps[number].outcome == "ok" and steps[number].printed < best
        assert run and len(undone) == (0 if is_better else len(edits))
        best = steps[number].printed if is_better else best
        number += len(undone)
    assert best < 7 and "EE" in {edits for edits, *_ in tries[:-1]}


def test_ideas_are_tried_also_where_all_constants_are(toys):
    """A is 1, so *2 and *5 are all that it offers; both are worse. Then the idea is tried, against chance."""
    class Later:
        """In place of a random generator: rather a constant than an idea, and the first one."""
        random = staticmethod(lambda: 0.9)
        choice = staticmethod(lambda offered: offered[0])
    task = SimpleNamespace(starter="A = 1\nprint('x')\n", better=lambda a, b: a > b)
    cfg = settings(toys, **{name: MEDIUM[name] for name in ("prompt_format", "fields", "actions")})
    expert = miniature.follow_ideas(cfg, task, [idea("Say y", ("print('x')", "print('y')"))], Later)
    replies = [next(expert)]
    while len(replies) < 9:
        printed = 5.0 if len(replies) == 1 else 4.0
        replies.append(expert.send({**miniature.START, "outcome": "ok", "printed": printed}))
    done = [env.parse(reply, cfg.fields, cfg.actions)[1:3] for reply in replies]
    back = miniature.UNDO
    assert done == [
        miniature.RUN, ("Set Constant", {"constant": "A", "value": "2"}), back,
        ("Set Constant", {"constant": "A", "value": "5"}), back,
        ("Replace In Script", {"script_name": "train.py", "find": "print('x')", "replace": "print('y')"}), back,
        miniature.RUN, miniature.RUN]


def test_recorded_medium_prompts_are_those_that_were_shown(toys):
    cfg = collect_medium(toys, num=1, task="toy-a")
    head, steps = records.read_trajectory(toys / "medium" / "toy-a-0.jsonl")
    agent = {name: getattr(cfg, name) for name in records.AGENT}
    played = env.Env("toy-a", toys / "data" / "seed-1", out=toys / "again", **agent)
    found, _ = conversations.read_conversations(toys / "medium", toys / "data", log=lambda line: None)
    shown = []
    for step in steps:
        prompt = played.prompt()
        played.step(step["reply"])
        if step["kind"] != "failed":
            shown.append(prompt)
    assert [talk.messages[:-1] for talk in found] == shown
    shutil.rmtree(toys / "medium" / "blobs")        # with the scripts that the prompts show
    with pytest.raises(ValueError, match="left out, a missing blob: 1 "):
        conversations.read_conversations(toys / "medium", toys / "data", log=lambda line: None)


def test_trajectories_of_another_form_are_not_trained_on(toys):
    cfg = collect_medium(toys, num=1)
    with pytest.raises(ValueError, match="collected with --prompt-format medium, found full here"):
        collection.collected_format(replace(cfg, prompt_format="full"))
    assert collection.collected_format(cfg)["prompt_format"] == "medium"


# -- recorded states

class Copying:
    """A model that sets VALUE to its number of the call in the state, and counts its calls."""
    context = 4096

    def __init__(self, fail_after=None):
        self.calls = 0
        self.fail_after = fail_after
        self.lock = threading.Lock()

    def chat(self, messages, *, seed, max_new_tokens, temperature, top_p, stop):
        with self.lock:
            if self.calls == self.fail_after:
                raise RunError("the model is gone")
            self.calls += 1
        text = say("Set Constant", constant="VALUE", value=str(9 + seed % 2)) if seed % 3 else "no format"
        return endpoint.Completion(text, [1], [0.0], "stop", 10, 0, 0.01)


def state_settings(toys, out="measured", **more):
    return evaluation.Settings(**{"task": "all", "data": str(toys / "data"), "out": str(toys / out), "steps": 6,
                                  "states": str(toys / "states.jsonl"),
                                  "model": "" if "record_states" in more else "none", **MEDIUM, **more})


def measure(cfg, model):
    def load(spec, timeout_s, **options):
        assert timeout_s == cfg.reply_seconds       # of a server
        return model
    return states.measure_states(cfg, partial(evaluation.load_models, load=load))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with the recorded states of three toys, which the tests add to and leave as it is."""
    folder = tmp_path_factory.mktemp("recorded")
    add_toys(folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "FOLDERS", [folder / "tasks"])
        states.record_states(state_settings(folder, "recorded", record_states=3))
        yield folder


def test_states_are_recorded_once_and_of_data_that_nothing_is_trained_on(recorded):
    lines = [json.loads(line) for line in (recorded / "states.jsonl").read_text().splitlines()]
    assert {(line["task"], line["data_seed"]) for line in lines} == {
        (id, states.STATES_SEED) for id in ("toy-a", "toy-b", "toy-out")}
    assert states.STATES_SEED not in (0, *play.LEARNED_SEEDS)
    assert len(lines) == 9 and len({(line["task"], line["index"], str(line["seen"])) for line in lines}) == 9
    with pytest.raises(ValueError, match="recorded once"):
        states.record_states(state_settings(recorded, "recorded", record_states=3))
    with pytest.raises(ValueError, match="ml-agent alone, found aide"):
        evaluation.Settings(states="states.jsonl", model="tiny", scaffold="aide")
    with pytest.raises(ValueError, match="either --model or --record-states"):
        state_settings(recorded, record_states=3, model="tiny")
    with pytest.raises(ValueError, match="--compare takes no --model, --task or --states"):
        evaluation.Settings(compare=("runs/a",), states="states.jsonl", record_states=3)


def test_recording_that_was_killed_begins_anew_and_gives_the_same(recorded):
    file = recorded / "states.jsonl"
    whole = file.read_bytes()
    file.unlink()
    path = recorded / "recorded" / "expert" / "toy-b-1.jsonl"
    path.write_bytes(path.read_bytes()[:-100])      # cut short by a kill
    states.record_states(state_settings(recorded, "recorded", record_states=3))
    assert file.read_bytes() == whole


def test_a_task_without_ideas_has_states(toys):
    """Its constants are tried."""
    (toys / "tasks" / "toy-a" / "ideas.json").unlink()
    states.record_states(state_settings(toys, "recorded", task="toy-a", record_states=2, steps=3))
    lines = [json.loads(line) for line in (toys / "states.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["toy-a"] * 2
    actions = {step["action"] for file in (toys / "recorded" / "expert").glob("*.jsonl")
               for step in records.read_trajectory(file)[1]}
    assert {"Execute Script", "Set Constant"} <= actions <= {"Execute Script", "Set Constant", "Undo Edit Script"}


def test_a_model_says_how_long_its_actions_in_states_are(tmp_path):
    """All else of how it acts stands in a state."""
    (tmp_path / "agent.json").write_text('{"max_new_tokens": 96, "steps": 5, "context": 640, "show_scores": false}')
    flags = ["--states", "states.jsonl", "--model", str(tmp_path)]
    cfg = cli.parse(evaluation.Settings, flags, evaluation.fill)
    assert cfg == evaluation.Settings(states="states.jsonl", model=str(tmp_path), task="all", max_new_tokens=96)
    assert cli.parse(evaluation.Settings, [*flags, "--max-new-tokens=64"], evaluation.fill).max_new_tokens == 64


def test_an_action_in_a_state_is_rewarded_as_in_its_trajectory(recorded):
    """The expert's own next action, in the restored state, earns what it earned when it was recorded."""
    cfg = state_settings(recorded, "rewarded")
    files_of = {}
    for file in (recorded / "recorded" / "expert").glob("*.jsonl"):
        head, steps = records.read_trajectory(file)
        for step in steps:
            before = (steps[step["index"] - 1] if step["index"] else head)
            files_of[head["task"], step["index"], str(before["seen"] if "seen" in before else before["tries"])] = step
    numbered = states.read_states(cfg)
    states.prepare_data(cfg, numbered)
    cache = storage.ResultCache(recorded / "rewarded" / "cache")
    for i, state in numbered:
        step = files_of[state["task"], state["index"], str(state["seen"]["tries"])]
        line = states.take_action(cfg, cache, lambda env, lines, seed: (step["reply"], None, {}), i, state, 0)
        assert line["reward"] == pytest.approx(step["reward"]) and line["kind"] == step["kind"]


def test_means_by_hand_and_a_run_that_was_broken_off_goes_on(recorded):
    cfg = state_settings(recorded, samples=4)
    broken = Copying(fail_after=20)     # more than are asked at the same time, so that some are carried out
    with pytest.raises(RunError):
        measure(cfg, broken)
    path = recorded / "measured" / "actions.jsonl"
    before = path.read_text().splitlines()
    path.write_text("\n".join(before) + '\n{"state": 1, "num')       # cut short by a kill
    model = Copying()
    results = measure(cfg, model)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert 0 < len(before) <= 20 and model.calls == 36 - len(before)
    assert sorted((line["state"], line["number"]) for line in lines) == list(itertools.product(range(9), range(4)))
    numbers = [i for i, state in states.read_states(cfg) if state["task"] == "toy-a"]
    own = [line for line in lines if line["state"] in numbers]
    entry = results["tasks"]["toy-a"]
    assert entry["reward"] == pytest.approx(sum(line["reward"] for line in own) / 12) and entry["actions"] == 12
    assert entry["valid"] == pytest.approx(sum(line["reply"] != "no format" and line["valid"] for line in own) / 12)
    ran = [line["reward"] for line in own if line["kind"] == "scored"]
    assert entry["reward_ran"] == pytest.approx(sum(ran) / len(ran))
    assert measure(cfg, None) == results        # nothing is left to do
    for change in ({"samples": 5}, {"python": "/bin/python3"}, {"gpu": "0"}, {"threads": 2}):
        with pytest.raises(ValueError, match=f"is of a run with {next(iter(change))}"):
            measure(replace(cfg, **change), Copying())


def test_random_edits_are_measured_without_a_model(recorded):
    results = measure(state_settings(recorded, "random", model=tables.RANDOM, samples=2), None)
    assert all(entry["valid"] == 1 for entry in results["tasks"].values())
    assert "changes nothing earns 0.5; measure --model random-edits" in states.format_states(results).splitlines()[-1]


@pytest.mark.parametrize("change, word", [
    ({"data_seed": 1}, "trained on"), ({"files": {"../x": "a"}}, "snapshot|path|file"), ({"index": -1}, "index"),
    ({"data_sha256": {}}, "other data")])
def test_a_file_of_states_is_checked(recorded, change, word, tmp_path):
    lines = [json.loads(line) for line in (recorded / "states.jsonl").read_text().splitlines()]
    path = tmp_path / "states.jsonl"
    path.write_text("".join(json.dumps(line | change) + "\n" for line in lines if line["task"] == "toy-a"))
    with pytest.raises(ValueError, match=word):
        measure(state_settings(recorded, "checked", states=str(path)), Copying())


# -- the comparison

@pytest.mark.parametrize("place", ["second/sft", "first/rl"])
@pytest.mark.parametrize("change", [{"starter": 8}, {"m_best": 1}, {"miniature": False}])
def test_seeds_or_agents_on_other_data_are_not_pooled(place, change, tmp_path, capsys):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        for agent in seeds.AGENTS.values():
            played = {"a": result([5.0], 10, 0, split="held-in"), "b": result([5.0], 10, 0)}
            results = run_of("x", **played)["results"] | {"complete": True, "versions": {}}
            results["settings"]["steps"] = 9
            write_atomic(folder / agent / "results.json", results)
    seeds.main(folders)
    assert capsys.readouterr().out.count("+50.0") > 9
    path = tmp_path / place / "results.json"
    results = json.loads(path.read_text())
    results["tasks"]["b"] |= change
    write_atomic(path, results)
    with pytest.raises(SystemExit, match=f"{place}: b has other data"):
        seeds.main(folders)



def test_the_sign_flip_test_by_hand():
    """1, 2, 3: of 8 choices of signs two have a sum of 6 or -6. 1, -1, 4: of the sums 4, 6, -4, 2, -2, 4, -6, -4 six
    are at least 4 from 0."""
    assert real_run.sign_flip_p([1, 2, 3]) == 2 / 8
    assert real_run.sign_flip_p([1, -1, 4]) == 6 / 8
    assert real_run.sign_flip_p([0.1] * 10) == 2 / 1024
    assert real_run.sign_flip_p([0, 0]) == 1


def write_measured(folder, rewards, complete=True, **settings):
    folder.mkdir(parents=True)
    entries = {id: {"split": "held-out", "reward": reward, "valid": valid, "spread": spread}
               for id, (reward, valid, spread) in rewards.items()}
    (folder / "states.json").write_text(json.dumps({"settings": settings, "complete": complete, "tasks": entries}))


def test_the_table_of_agents_by_hand(tmp_path):
    write_measured(tmp_path / "sft" / "held-out", {"a": (0.4, 1, 0), "b": (0.5, 1, 0), "c": (0.6, 1, 0)})
    write_measured(tmp_path / "rl" / "held-out",
                   {"a": (0.5, 1, 0), "b": (0.7, 1, 0), "c": (0.9, 1, 0), "d": (0.1, 1, 0)})
    write_measured(tmp_path / "sft" / "held-in", {"e": (0.4, 1, 0)})
    write_measured(tmp_path / "rl" / "held-in", {"e": (0.5, 1, 0)})
    write_measured(tmp_path / "base" / "held-out", {"a": (0.1, 1, 0), "b": (0.1, 1, 0)})
    lines = [line.split() for line in real_run.compare_agents(tmp_path, ["base", "sft", "rl"]).splitlines()]
    # held-out: +0.1, +0.2, +0.3 over the three tasks that sft and rl share, p 2/8; base lacks one of them
    assert lines[1][-7:] == ["3", "-", "0.500", "0.700", "+0.200", "0.2500", "-"]
    assert lines[3][-7:] == ["1", "-", "0.400", "0.500", "+0.100", "1.0000", "1.0000"]


@pytest.mark.parametrize("valid, spread, status", [(0.9, 0.2, 0), (0.4, 0.2, 2), (0.9, 0.0, 2)])
def test_the_gate(tmp_path, valid, spread, status, capsys):
    write_measured(tmp_path / "held-in", {"a": (0.5, valid, spread), "b": (0.5, valid, spread)})
    assert real_run.main(["gate", str(tmp_path / "held-in")]) == status
    assert f"{valid:.0%} of the actions are valid" in "".join(capsys.readouterr())


@pytest.mark.parametrize("rl", [{"complete": False}, {"states of sha256": "b"}, {"samples": 4}, {"max_new_tokens": 64},
                                {"sandbox": "off"}, {"python": "/bin/python3"}, {"gpu": "0"}, {"threads": 2}])
def test_agents_that_are_not_comparable_are_refused(rl, tmp_path):
    """A measure that was broken off, one in other states, or one of fewer, shorter or less guarded actions in each."""
    rewards = {"a": (0.4, 1, 0.1)}
    under = {"states of sha256": "a", "samples": 8, "max_new_tokens": 160, "sandbox": "on"}
    write_measured(tmp_path / "sft" / "held-out", rewards, **under)
    write_measured(tmp_path / "rl" / "held-out", rewards, **{**under, **rl})
    with pytest.raises(ValueError, match="rl/held-out.*(is not complete|other states)"):
        real_run.compare_agents(tmp_path, ["sft", "rl"])
    with pytest.raises(ValueError, match="rll holds nothing measured"):
        real_run.compare_agents(tmp_path, ["sft", "rll"])


UNDER = {"model": "m", "steps": 9, "max_new_tokens": 160, "sandbox": "on"}


@pytest.mark.parametrize("rl", [{"complete": False}, *({"settings": {**UNDER, **change}} for change in (
    {"steps": 15}, {"max_new_tokens": 64}, {"sandbox": "off"}))])
def test_trajectories_that_are_not_comparable_are_refused(rl, tmp_path):
    """Those of an evaluation that was broken off, of more steps or shorter replies, or without a sandbox."""
    task = {"metric": "accuracy", "direction": "up", "split": "held-out", "miniature": True, "starter": 0.5,
            "m_best": 1.0, "printed": 0.5, "seconds": 1.0, "published": {},
            "figures": {"best-validation": {"gap": [20.0, [10.0, 30.0]]}}}
    results = {"settings": UNDER, "complete": True, "final": "best-validation", "versions": {}, "tasks": {"a": task}}
    for name, entries in (("sft", results), ("other", results), ("rl", {**results, **rl})):
        folder = tmp_path / name / "held-out-trajectories"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(entries))
    assert "0.200  0.200" in real_run.compare_agents(tmp_path, ["sft", "other"])
    with pytest.raises(ValueError, match="rl/held-out-trajectories.*(is not complete|other settings)"):
        real_run.compare_agents(tmp_path, ["sft", "rl"])


def test_a_starter_alone_has_closed_no_gap_and_without_results_nothing_is_complete(tmp_path):
    for name in ("sft", "rl"):
        write_measured(tmp_path / name / "held-out", {"a": (0.4, 1, 0)})
        folder = tmp_path / name / "held-out-trajectories"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"settings": UNDER, "complete": True, "tasks": {"a": {}}}))
    lines = real_run.compare_agents(tmp_path, ["sft", "rl"]).splitlines()
    assert lines[2].split()[-6:] == ["0", "-", "-", "-", "-", "-"]
    (folder / "results.json").unlink()      # broken off before the first
    with pytest.raises(ValueError, match="rl/held-out-trajectories/results.json is not complete"):
        real_run.compare_agents(tmp_path, ["sft", "rl"])


def test_the_gate_judges_no_measure_that_was_broken_off(tmp_path, capsys):
    write_measured(tmp_path / "held-in", {"a": (0.5, 0.9, 0.2)}, complete=False)
    assert real_run.main(["gate", str(tmp_path / "held-in")]) == 2
    assert "is not complete" in capsys.readouterr().err

