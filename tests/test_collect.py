"""sft.py --collect: distant ideas, an expert that says only what it saw, nothing lost or doubled, nothing held out, and
conversations that are read or named. The tasks run in a moment, so every score is known beforehand."""
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import env
import sft
import tasks
from common import act, add_task
from support import cli, collection, endpoint, files, ideas, miniature, storage
from support.records import AGENT, read_trajectory, replay
from support.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent

STARTER = '''from math import fabs
VALUE = 3       # what is predicted
SHIFT = 0
GAIN = 1
value = GAIN * VALUE + SHIFT
print("validation MAE:", fabs(value - ANSWER))
open("submission.csv", "w").write("id,y\\n" + "".join(f"{i},{value}\\n" for i in (1, 2)))
'''


def idea(title, *edits):
    return {"title": title, "kind": "model", "instruction": f"Do this: {title}, which may help.",
            "edits": [{"find": find, "replace": put} for find, put in edits]}


IDEAS = [
    idea("Predict eight", ("VALUE = 3 ", "VALUE = 8 ")),
    idea("Predict minus fifty", ("VALUE = 3 ", "VALUE = -50 ")),
    idea("Divide by zero", ("SHIFT = 0\n", "SHIFT = 1 / 0\n")),
    idea("Shift by one", ("SHIFT = 0\n", "SHIFT = 1\n")),
    idea("Another root", ("from math import fabs\n", "from math import sqrt\n"), ("fabs(value", "sqrt(4) * abs(value")),
    idea("Three at once", ("GAIN = 1\n", "GAIN = 2\n"), ("SHIFT = 0\n", "SHIFT = -90\n"), ("VALUE = 3 ", "VALUE = 4 ")),
]


def add_toys(folder):
    """Two held-in tasks, toy-a and toy-b, and the held-out toy-out."""
    for name, answer, split in (("toy-a", 10, "held-in"), ("toy-b", 11, "held-in"), ("toy-out", 12, "held-out")):
        add_task(folder, name, answer, split, STARTER)
        (folder / name / "ideas.json").write_text(json.dumps(IDEAS))


@pytest.fixture
def toys(tmp_path, monkeypatch):
    add_toys(tmp_path / "tasks")
    monkeypatch.setattr(tasks, "FOLDERS", [tmp_path / "tasks"])
    return tmp_path


def settings(toys, folder="out", **more):
    return sft.Settings(**{"collect": True, "num": 4, "data": str(toys / "data"),
                           "trajectories": str(toys / folder), **more})


def records(folder):
    """{file: its records} with what depends on the clock taken out."""
    def mask(value):
        if isinstance(value, dict):
            return {key: mask(each) for key, each in value.items() if not key.endswith(("seconds", "_left", "_left_s"))
                    and key != "seconds_left"}
        if isinstance(value, list):
            return [mask(each) for each in value]
        return re.sub(r"\d+\.\d s\b|\d+ min\b", "#", value) if isinstance(value, str) else value
    return {path.name: [mask(json.loads(line)) for line in path.read_text().splitlines()]
            for path in Path(folder).glob("*.jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of tasks with 4 trajectories of both toys in "out", collected once without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        add_toys(folder / "tasks")
        patch.setattr(tasks, "FOLDERS", [folder / "tasks"])
        manifest = sft.collect(settings(folder))
        yield folder, manifest


# -- ideas

@pytest.mark.parametrize("n, k", [(7, 3), (7, 4), (5, 5), (3, 6), (1, 2)])
def test_farthest_points_against_brute_force(n, k):
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(n, 4))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        d = [[float(np.linalg.norm(a - b)) for b in x] for a in x]
        chosen = ideas.farthest(x, k)
        assert len(set(chosen)) == len(chosen) == min(n, k)
        if n > 1:
            assert d[chosen[0]][chosen[1]] == max(map(max, d))
        for i in range(2, len(chosen)):     # each is the one whose nearest earlier one is farthest
            nearest = {j: min(d[j][c] for c in chosen[:i]) for j in range(n) if j not in chosen[:i]}
            assert nearest[chosen[i]] == pytest.approx(max(nearest.values()))
        if 2 <= k <= n:     # at least half of the best of all subsets
            def spread(some):
                return min(d[a][b] for a, b in itertools.combinations(some, 2))
            assert spread(chosen) >= max(map(spread, itertools.combinations(range(n), k))) / 2


def test_farthest_points_of_equal_rows_and_of_texts():
    assert ideas.farthest(np.ones((3, 1)), 2) == [0, 1]
    vectors = ideas.tfidf_vectors(["use a forest", "use a forest of trees", "scale columns", "stack models by ridge"])
    assert set(ideas.farthest(vectors, 3)) in ({0, 2, 3}, {1, 2, 3})


ANSWER = """Sure, here are ideas:
- Bigger model: use 500 trees instead of 50.
2. **Scale the inputs**: put a StandardScaler before the model.
* Scale the inputs: divide every column by its deviation.
- too short: no
no list item: this line is prose and not an idea at all
"""


def test_ideas_are_read_and_made_distinct():
    parsed = ideas.parse_ideas(ANSWER)
    assert [one["title"] for one in parsed] == ["Bigger model", "Scale the inputs"]
    assert parsed[1]["instruction"] == "put a StandardScaler before the model."


class Expert:
    """Stands for an Engine. Writes new ideas whenever it is asked for some, and follows `replies` otherwise."""
    context = 100_000
    name = "expert"
    tokenizer = Tokenizer.of_bytes()

    def __init__(self, replies=(), fail_after=None):
        self.replies = replies
        self.asked = 0
        self.prompts = []
        self.lengths = []       # max_new_tokens of each call
        self.fail_after = fail_after
        self.lock = threading.Lock()

    def chat(self, messages, *, max_new_tokens, temperature, seed, top_p=1.0, stop=()):
        with self.lock:
            self.prompts.append(messages)
            self.lengths.append(max_new_tokens)
            turn = sum(message["role"] == "assistant" for message in messages)
            if "ideas for changing" in messages[0]["content"]:
                if self.asked == self.fail_after:
                    raise endpoint.EndpointError("down")
                self.asked += 1
                text = "\n".join(f"- idea {self.asked} {i} {seed}: do thing number {i} of {seed}" for i in range(15))
            else:
                text = self.replies[turn]
        ids = self.tokenizer.encode(text)
        return endpoint.Completion(text, ids, [0.0] * len(ids), "stop")


def test_a_hundred_ideas_are_asked_for_in_several_prompts_and_never_twice(toys):
    s = settings(toys, expert="model")
    task = tasks.load("toy-a")
    with pytest.raises(endpoint.EndpointError):
        ideas.ask_ideas(s, task, Expert(fail_after=4))
    expert = Expert()
    found = ideas.ask_ideas(s, task, expert)
    assert expert.asked == 3 and len(found) == 105         # 7 answers of 15, 4 of them kept from before
    prompts = [messages[0]["content"] for messages in expert.prompts]
    assert len(set(prompts)) == 3 and all("VALUE = 3" in prompt and "known already" in prompt for prompt in prompts)
    again = Expert()
    assert ideas.ask_ideas(s, task, again) == found and again.asked == 0
    for change in ({"expert": "other"}, {"expert": "other", "seed": 1}):        # whose ideas those are not
        other = Expert()
        assert len(ideas.ask_ideas(replace(s, **change), task, other)) == 105 and other.asked == 7


@pytest.mark.parametrize("typed, asked_for", [(512, 1024), (1024, 1024), (6000, 6000)])
def test_an_expert_that_thinks_may_write_as_much_for_ideas_as_for_a_reply(typed, asked_for, toys):
    expert = Expert()
    ideas.ask_ideas(settings(toys, expert="model", max_new_tokens=typed, ideas=20), tasks.load("toy-a"), expert)
    assert expert.lengths == [asked_for] * 2


def test_an_expert_without_ideas_is_an_error(toys):
    """Its answers are not kept, so that another run asks again."""
    class Mute(Expert):
        def chat(self, messages, **options):
            self.asked += 1
            return endpoint.Completion("I have none.", [], [], "stop")
    s = settings(toys, expert="mute")
    task = tasks.load("toy-a")
    for mute in (Mute(), Mute()):
        with pytest.raises(cli.RunError, match="has written no idea for toy-a .*'I have none.'"):
            ideas.ask_ideas(s, task, mute)
        assert mute.asked == 21 + 1 + len(tasks.IDEA_KINDS)     # 3 * 7 answers of 15 ideas, and one of each kind
    assert len(ideas.ask_ideas(s, task, Expert())) == 105


# -- the scripted expert

def test_scripted_trajectories_are_real(whole):
    folder, manifest = whole
    paths = sorted((folder / "out").glob("*.jsonl"))
    assert [file.name for file in paths] == [f"toy-{x}-{k}.jsonl" for x in "ab" for k in range(4)]
    rose = 0
    actions = set()
    for file in paths:
        head, steps = read_trajectory(file)
        played = file.stem[-1] <= "1"      # half of them, to save time
        assert not played or replay(file, log=lambda text: None, data=folder / "data") == 0
        assert all(step["valid"] for step in steps) and steps[-1]["ended"] == "final answer"
        assert 1 <= len(head["ideas"]) <= 3 and set(head["ideas"]) <= {one["title"] for one in IDEAS}
        assert not any(title in message["content"] for title in head["ideas"] for message in head["messages"])
        assert steps[-1]["m_after"] <= head["m_init"]       # what did not help was taken back
        rose += steps[-1]["m_after"] < head["m_init"]
        actions |= {step["action"] for step in steps}
    assert manifest["tasks"]["toy-a"]["counts"]["rose"] + manifest["tasks"]["toy-b"]["counts"]["rose"] == rose >= 3
    assert {"Execute Script", "Inspect Script Lines", "Replace In Script", "Undo Edit Script"} <= actions
    counts = manifest["tasks"]["toy-a"]["counts"]
    assert counts["trajectories"] == 4 and counts["steps"] == counts["valid"]
    hashes = [tasks.info("toy-a", folder / "data" / f"seed-{seed}")["sha256"] for seed in (1, 2, 3)]
    assert manifest["tasks"]["toy-a"]["data"] == files.hash_json(hashes)[:16]
    heads = [read_trajectory(file)[0] for file in paths]
    assert [head["data_seed"] for head in heads] == [1, 2, 3, 1] * 2 and not (folder / "data" / "toy-a").exists()


def drive(toys, ideas, steps=15, seed=0, **more):
    """Steps of the scripted expert on toy-a with these ideas."""
    tasks.prepare("toy-a", data=toys / "data", log=lambda line: None)
    cfg = settings(toys, steps=steps, **more)
    world = env.Env("toy-a", toys / "data", out=toys / "world", **{name: getattr(cfg, name) for name in AGENT})
    policy = miniature.scripted_policy(cfg, world.task, ideas, random.Random(seed))
    lines = [None]
    while not world.done:
        lines.append(vars(world.step(policy(world, lines, 0)[0])))
    return [env.Step(**line) for line in lines[1:]]


def test_what_helps_stays_and_what_does_not_is_taken_back(toys):
    worse = IDEAS[1]
    broken = IDEAS[2]
    better = IDEAS[0]
    steps = drive(toys, [worse, broken, better])
    assert [step.score for step in steps if step.action == "Replace In Script"] == [60, None, 2]
    assert [step.m_after for step in steps if step.action == "Undo Edit Script"] == [7, 7]
    assert steps[-1].action == "Final Answer" and steps[-1].m_after == 2
    assert steps[-1].args["final_answer"] == "MAE 2.0"
    assert "division by zero" in next(step for step in steps if step.action == "Undo Edit Script" and step.index > 3
                                      ).fields["Reflection"]
    tried = [step.fields["Research Plan and Status"] for step in steps]
    assert "Last: nothing." in tried[0] and "Predict minus fifty: 60, worse than 7" in tried[3]
    assert "Divide by zero: " in tried[5] and "Predict eight: 2, better than 7" in tried[-1]


def test_an_idea_of_many_edits_goes_back_edit_by_edit(toys):
    steps = drive(toys, [IDEAS[5]])
    assert [step.action for step in steps[2:]] == ["Replace In Script"] * 3 + ["Undo Edit Script"] * 3 + [
        "Final Answer"]
    script = storage.Blobs(toys / "world" / "blobs").path(steps[-1].snapshot["train.py"]).read_text()
    assert steps[-1].m_after == 7 and script == (toys / "tasks" / "toy-a" / "train.py").read_text()


@pytest.mark.parametrize("fields, prompt_format", [
    (env.FIELDS, "full"), (("Thought", "Action", "Action Input"), "short"), (miniature.SHORT_FIELDS, "short")])
def test_the_one_expert_writes_the_fields_it_is_asked_for(fields, prompt_format, toys):
    steps = drive(toys, IDEAS[:2], fields=fields, prompt_format=prompt_format)
    assert all(step.valid and (*step.fields, "Action Input") == fields for step in steps)
    assert ("Inspect Script Lines" in {step.action for step in steps}) == (prompt_format == "full")


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_an_idea_that_would_not_end_within_the_steps_is_not_begun(steps, toys):
    found = drive(toys, [IDEAS[1], IDEAS[0]], steps)
    assert len(found) <= steps and all(step.valid for step in found)
    assert steps < 3 or found[-1].action == "Final Answer" and found[-1].m_after == 7


def test_an_idea_that_does_not_fit_is_not_tried_and_an_edit_that_changes_nothing_is_not_made(toys):
    """An idea in words alone, one whose text is not there, and one whose first edit is for its readers."""
    same = {"find": "GAIN = 1\n", "replace": "GAIN = 1\n"}
    steps = drive(toys, [{"title": "in words", "instruction": "do it"}, idea("Elsewhere", ("VALUE = 4 ", "VALUE = 5 ")),
                         {**IDEAS[0], "edits": [same, *IDEAS[0]["edits"]]}])
    assert [step.action for step in steps[2:]] == ["Replace In Script", "Final Answer"] and steps[-1].m_after == 2
    assert miniature.apply_idea("VALUE = 3 VALUE = 3 ", IDEAS[0]) == "VALUE = 3 VALUE = 3 "


# -- nothing lost, nothing doubled

@pytest.mark.parametrize("seed", range(3))
def test_cut_off_at_any_byte_the_same_set_is_collected(seed, whole, tmp_path, monkeypatch):
    folder, _ = whole
    rng = random.Random(seed)
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    for file in sorted(out.glob("*.jsonl")):
        if rng.random() < 0.5:
            raw = file.read_bytes()
            file.write_bytes(raw[:rng.randrange(len(raw))])
        if rng.random() < 0.2:
            file.unlink()
    monkeypatch.setattr(tasks, "FOLDERS", [folder / "tasks"])
    sft.collect(replace(settings(folder), trajectories=str(out)))
    assert records(out) == records(folder / "out")


def test_a_collection_is_complete_when_all_that_was_begun_has_ended(whole, tmp_path, monkeypatch):
    """Also if it was broken off and less is asked for now."""
    folder, _ = whole
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    file = max(out.glob("*.jsonl"))
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    monkeypatch.setattr(tasks, "FOLDERS", [folder / "tasks"])
    for num, is_complete in ((1, False), (4, True)):
        assert sft.collect(replace(settings(folder), trajectories=str(out), num=num))["complete"] == is_complete
        assert collection.is_collected(out) == is_complete


def test_killed_and_run_again_the_same_set_is_collected(whole, tmp_path, monkeypatch):
    folder, _ = whole
    out = tmp_path / "out"
    data = tmp_path / "data"
    flags = ["--collect", "--num=4", f"--data={data}", f"--trajectories={out}"]
    code = ("import sys, tasks, sft; from pathlib import Path; tasks.FOLDERS[:] = [Path(sys.argv.pop(1))]; "
            "sys.exit(sft.main(sys.argv[1:]))")
    run = subprocess.Popen([sys.executable, "-c", code, str(folder / "tasks"), *flags], cwd=ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while sum(file.read_bytes().count(b"\n") for file in out.glob("*.jsonl")) < 12:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    monkeypatch.setattr(tasks, "FOLDERS", [folder / "tasks"])
    manifest = sft.collect(replace(settings(folder), trajectories=str(out), data=str(data)))
    found = records(out)
    wanted = records(folder / "out")
    for lines in (*found.values(), *wanted.values()):
        lines[0].pop("data")
    assert manifest["complete"] and found == wanted


def test_a_larger_num_and_another_task_add_to_a_folder_and_other_settings_are_refused(toys):
    s = settings(toys, task="toy-a", num=1)
    sft.collect(s)
    before = (toys / "out" / "toy-a-0.jsonl").read_bytes()
    sft.collect(replace(s, num=2))
    manifest = sft.collect(replace(s, task="toy-b"))
    assert {id: one["counts"]["trajectories"] for id, one in manifest["tasks"].items()} == {"toy-a": 2, "toy-b": 1}
    assert (toys / "out" / "toy-a-0.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="--seed 0 \\(now 1\\)"):
        sft.collect(replace(s, seed=1))
    (toys / "out" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json does not tell of toy-a, of which"):
        sft.collect(s)


def test_a_task_whose_name_begins_another_ones_has_trajectories_of_its_own(toys):
    add_task(toys / "tasks", "toy", 9, "held-in", STARTER)
    (toys / "tasks" / "toy" / "ideas.json").write_text(json.dumps(IDEAS))
    for id, num in (("toy-b", 2), ("toy", 1)):
        manifest = sft.collect(settings(toys, task=id, num=num, steps=3))
    assert {id: one["counts"]["trajectories"] for id, one in manifest["tasks"].items()} == {"toy-b": 2, "toy": 1}
    found = {id: sorted(path.name for path in collection.files_of(toys / "out", id))
             for id in ("toy", "toy-b", "toy-a")}
    assert found == {"toy": ["toy-0.jsonl"], "toy-b": ["toy-b-0.jsonl", "toy-b-1.jsonl"], "toy-a": []}


def test_real_data_have_no_seeds(toys):
    raw = toys / "raw"
    raw.mkdir()
    (raw / "truth.csv").write_text("id,y\n1,10\n2,10\n")
    for flags in ({"raw": str(raw)}, {}):       # the second time they are there already
        sft.collect(settings(toys, task="toy-a", num=2, **flags))
        heads = [read_trajectory(file)[0] for file in sorted((toys / "out").glob("*.jsonl"))]
        assert [(head["data_seed"], head["miniature"]) for head in heads] == [(0, False)] * 2
    assert not list((toys / "data").glob("seed-*"))


# -- a model as the expert

REPLIES = [act("Replace In Script", script_name="train.py", find="VALUE = 3 ", replace="VALUE = 9 "),
           act("Undo Edit Script", script_name="no.py"), act("Final Answer", final_answer="done")]


def test_a_models_ideas_are_in_its_prompt_alone_and_its_tokens_are_kept(toys):
    expert = Expert(REPLIES)
    s = settings(toys, expert="model", task="toy-a", num=2, ideas=30, coder="none")
    sft.collect(s, load=lambda spec, **options: expert)
    assert expert.asked == 2
    played = [messages for messages in expert.prompts if messages[0]["role"] == "system"]
    assert len(played) == 6 and all("Ideas that may be worth trying:\n- idea" in m[1]["content"] for m in played)
    found, left_out = sft.read_conversations(s.trajectories, data=s.data, tokenizer=Expert.tokenizer,
                                             log=lambda text: None)
    assert len(found) == 2 and not left_out
    for one in found:
        assert not any("worth trying" in message["content"] for message in one.messages)
        # the second reply named a file that is not there: in the conversation, but not learned
        assert [one.messages[i]["content"] for i in one.assistant_turns] == [REPLIES[0], REPLIES[2]]
        assert Expert.tokenizer.decode(one.messages[one.assistant_turns[0]]["tokens"]) == REPLIES[0]
    every, _ = sft.read_conversations(s.trajectories, data=s.data, log=lambda text: None)
    assert not any("tokens" in message for one in every for message in one.messages)    # another tokenizer


def test_an_expert_that_was_trained_anew_is_another(toys, tmp_path):
    """Though its folder has the same name; a file that was only touched is the same."""
    folder = tmp_path / "expert"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"1")
    s = settings(toys, expert=str(folder), task="toy-a", num=1, ideas=30, coder="none")
    load = lambda spec, **options: Expert(REPLIES)
    sft.collect(s, load)
    weights.write_bytes(b"1")
    sft.collect(s, load)
    weights.write_bytes(b"2")
    with pytest.raises(ValueError, match=r"--expert of sha256 (\w+) \(now (?!\1)\w+\)"):
        sft.collect(replace(s, num=2), load)


def test_ids_of_a_stop_string_are_neither_kept_nor_learned(toys):
    """An expert that goes on to invent an observation: its turn ends with its text in the record, in what is learned
    and in its next prompt."""
    class React(Expert):
        def chat(self, messages, **options):
            said = super().chat(messages, **options)
            ids = self.tokenizer.encode(said.text + "\nObservation:")
            return replace(said, tokens=ids, logps=[0.0] * len(ids))
    expert = React(REPLIES)
    s = settings(toys, expert="model", task="toy-a", num=1, ideas=30, coder="none")
    sft.collect(s, load=lambda spec, **options: expert)
    t = Expert.tokenizer
    head, steps = read_trajectory(toys / "out" / "toy-a-0.jsonl")
    assert [t.decode(step["messages"][0]["tokens"]) for step in steps] == REPLIES
    (one,), _ = sft.read_conversations(s.trajectories, data=s.data, tokenizer=t, log=lambda text: None)
    ids, chosen = t.conversation(one.messages, set(one.assistant_turns))
    learned = t.decode([i for i, c in zip(ids, chosen) if c])
    assert learned == f"{REPLIES[0]}{t.END}{REPLIES[2]}{t.END}"
    for step in steps[:-1]:     # recorded when the stop's ids were kept
        step["messages"][0]["tokens"] += t.encode("\nObservation:")
    prompt = t.decode(t.chat([*head["messages"], *(each for step in steps for each in step["messages"])]))
    assert "\nObservation:" not in prompt.split("<|im_start|>assistant", 1)[1]


# -- held-out tasks

def test_held_out_tasks_are_refused_by_name(toys):
    for name in ("toy-out", "all"):
        with pytest.raises(ValueError, match="toy-out: held out"):
            sft.collect(settings(toys, task=name))


def test_held_out_data_under_another_name_are_refused(toys):
    tasks.prepare("toy-out", data=toys / "data", log=lambda line: None)
    add_task(toys / "tasks", "renamed", 12, "held-in", STARTER)
    with pytest.raises(ValueError, match="private/test.csv of renamed is a file of toy-out, which is held out"):
        sft.collect(settings(toys, task="renamed"))


def test_held_out_trajectories_are_refused_when_read(whole, tmp_path, monkeypatch):
    folder, _ = whole
    monkeypatch.setattr(tasks, "FOLDERS", [folder / "tasks"])
    tasks.prepare("toy-out", data=folder / "data", log=lambda line: None)
    file = folder / "out" / "toy-a-0.jsonl"
    sha = tasks.info("toy-out", folder / "data")["sha256"]["private/test.csv"]
    head, rest = file.read_text().split("\n", 1)
    shutil.copytree(folder / "out" / "blobs", tmp_path / "blobs")
    for change, words in [({"task": "toy-out"}, "toy-out is held out"), ({"task": "unheard-of"}, "There is no task"),
                          ({"data_sha256": {"private/x.csv": sha}}, "private/x.csv of toy-a is a file of toy-out")]:
        (tmp_path / "toy-a-0.jsonl").write_text(json.dumps({**json.loads(head), **change}) + "\n" + rest)
        with pytest.raises(ValueError, match=words):
            sft.read_conversations(tmp_path, data=folder / "data")
    own = tmp_path / "own.json"
    own.write_text(json.dumps([{"messages": [{"role": "user", "content": "Task: toy-out\n\nPredict."},
                                             {"role": "assistant", "content": "x"}]}]))
    with pytest.raises(ValueError, match="own.json, entry 1 is about toy-out, which is held out"):
        sft.read_conversations(own, data=folder / "data")


# -- reading

def read(path, **more):
    said = []
    found, left_out = sft.read_conversations(path, log=said.append, data="no data", **more)
    return found, left_out, "\n".join(said)


CHAT = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u\u2028v"},
                     {"role": "assistant", "content": "a"}, {"role": "user", "content": "bye"}]}
SHARED = {"system": "s", "conversations": [{"from": "human", "value": "u\u2028v"}, {"from": "gpt", "value": "a"}]}


@pytest.mark.parametrize("name, text", [
    ("list.json", json.dumps([CHAT, SHARED], indent=2)),
    ("lines.jsonl", "\ufeff" + json.dumps(CHAT, ensure_ascii=False) + "\r\n\n" + json.dumps(SHARED))])
def test_both_formats_of_a_users_file(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found, left_out, said = read(tmp_path / name)
    assert [one.messages for one in found] == [CHAT["messages"][:3]] * 2 and not left_out
    assert [one.assistant_turns for one in found] == [[2], [2]] and "2 conversations with 2 replies" in said


def test_bad_entries_of_a_users_file_are_named_and_counted(tmp_path):
    path = tmp_path / "own.jsonl"
    user = {"role": "user", "content": "u"}
    robot = {"role": "assistant", "content": "a"}
    entries = [CHAT, {"messages": [user]}, {"messages": [user, {"role": "tool", "content": "t"}, robot]}, {"text": "x"},
               {"messages": [user, {"role": "assistant", "content": None}]}, [1], {"messages": []},
               {"messages": [user, {"role": "assistant", "content": "  "}]}, {"messages": [{"role": ["x"]}, robot]}]
    more = [{"messages": [user, {**robot, "content": "\ud83d"}]}, {"messages": [user, {**robot, "content": 5}]},
            {"messages": [[user, robot]]}, {"messages": {"0": user}}, {"messages": [user, robot], "system": 7},
            {"messages": [user, {**robot, "content": [["a"]]}]}, {"messages": [{"content": "x"}, robot]}, None, 3,
            {"messages": [user, {**robot, "content": float("nan")}]}]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"messages": [\n'
                    + "".join(json.dumps(entry) + "\n" for entry in more) + "[" * 100_000 + "\n")
    found, left_out, said = read(path)
    lines = {why: [int(source.rpartition(" ")[2]) for source in where] for why, where in left_out.items()}
    assert len(found) == 1 and lines == {
        "no turn of the assistant": [2, 7, 8], "unknown role 'tool'": [3],
        'no list "messages" or "conversations"': [4, 6, 13, 14, 18, 19],
        "a content that is no text": [5, 11, 12, 15, 16, 20], "not JSON": [10, 21], "unknown role ['x']": [9],
        "unknown role None": [17]}
    assert f"left out, no turn of the assistant: 3 ({path}, line 2, {path}, line 7" in said


@pytest.mark.parametrize("name, content, words", [
    ("x.json", b"", "is not JSON"), ("x.json", b'[{"messages": [}]', "is not JSON"),
    ("x.json", json.dumps({}).encode(), "expected a list of conversations"),
    ("x.jsonl", b"", "nothing to train on"), ("x.jsonl", b"\n{}\n", "nothing to train on(.|\n)*x.jsonl, line 2"),
    ("x.json", b"[]", "nothing to train on"), ("x.json", b"[" * 100_000, "is not JSON"),
    ("x.jsonl", b"\xff\xfe", "left out, not JSON: 1"), ("x", None, "there is no"),
    ("empty", "folder", "nothing to train on")])
def test_what_cannot_be_read_at_all_is_refused(name, content, words, tmp_path):
    if content == "folder":
        (tmp_path / name / "folder.jsonl").mkdir(parents=True)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read(tmp_path / name)


def test_ids_in_a_users_file_are_not_obeyed(tmp_path):
    """What is learned is the text, whatever ids stand beside it."""
    t = Tokenizer.of_bytes()
    path = tmp_path / "own.jsonl"
    user = {"role": "user", "content": "u"}
    robot = {"role": "assistant", "content": "a"}
    for tokens in ([t.turn, 97], [10**9], "x", [97], {"a": 1}):
        path.write_text(json.dumps({"messages": [user, {**robot, "tokens": tokens}], "tokens": [1]}))
        (one,), _, _ = read(path, tokenizer=t)
        assert t.conversation(one.messages, one.assistant_turns) == t.conversation([user, robot])


def test_bad_trajectories_are_named_and_counted(whole, tmp_path, monkeypatch):
    folder, _ = whole
    monkeypatch.setattr(tasks, "FOLDERS", [folder / "tasks"])
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    files = sorted(out.glob("*.jsonl"))
    lines = [file.read_text().splitlines(keepends=True) for file in files]
    files[0].write_text("".join([*lines[0][:2], lines[0][2][:50] + "\n", *lines[0][3:]]))   # a broken line
    files[1].write_text("".join(lines[1][:-1]))                                             # its end is missing
    files[2].write_text("{" + "".join(lines[2]))                                            # a broken header
    files[3].write_text(lines[3][0] + '{"type": "step", "reply": "x"}\n')
    files[4].write_text(lines[4][0] + json.dumps({"type": "end", "ended": "context full"}) + "\n")
    files[5].write_text("".join(lines[5]).replace('"train.py": "', '"../train.py": "', 1))
    found, left_out, said = read(out)
    assert [Path(one.source).name for one in found] == [file.name for file in files[6:]]
    reasons = {Path(source).name: why for why, where in left_out.items() for source in where}
    for file, reason in zip(files[:6], (
            "line 3 is not JSON", "not finished: collect again to go on with it", "line 1 is not JSON",
            "line 2 is no record of a trajectory: its entries: 'index' is missing",
            "no turn of the assistant", "line 1 is no record of a trajectory: a snapshot has '../train.py'")):
        assert reason in reasons.pop(file.name)
    assert not reasons
    assert all(f"{file.name}" in said for file in files[:6])


def test_the_command(whole, capsys, monkeypatch):
    folder, _ = whole
    monkeypatch.setattr(tasks, "FOLDERS", [folder / "tasks"])
    flags = ["--collect", f"--data={folder / 'data'}", f"--trajectories={folder / 'out'}", "--num=4"]
    assert sft.main(flags) == 0         # all is there already
    out = capsys.readouterr().out
    assert re.search(r"toy-a +miniature +4 ", out)
    assert sft.main([*flags, "--task=toy-out"]) == 2 and "toy-out: held out" in capsys.readouterr().err
    assert sft.main([*flags, "--actions=Execute Script,Final Answer"]) == 2
    assert "the scripted expert needs --actions with" in capsys.readouterr().err
