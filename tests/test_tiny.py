"""The small agent of `python sft.py`: short prompts that any record can give again, the search over a script's numbers,
a tokenizer of its own, figures of what it replies, and the whole command in its smallest form."""
import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import env
import eval as evaluation
import sft
import tasks
from model import Config, Qwen2
from support.tokenizer import Tokenizer
from support.miniature import train_tokenizer
from test_collect import STARTER, settings, toys, whole  # noqa: F401  (fixtures)
from support import cli, collection, miniature, prompts, recipes, records, scripts, storage
from support.records import restore_record


@pytest.fixture(scope="module")
def short(whole):
    """The folder of the toy tasks, with 3 trajectories of each collected under short prompts in "short"."""
    folder, _ = whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "FOLDERS", [folder / "tasks"])
        s = settings(folder, "short", prompt_format="short", fields=miniature.SHORT_FIELDS,
                     actions=miniature.SHORT_ACTIONS, num=3, steps=8)
        sft.collect(s)
        yield folder, s


# -- short prompts

def test_a_short_prompt_by_hand(short):
    """All but the score, which test_env.py works out."""
    folder, s = short
    agent = {name: getattr(s, name) for name in records.AGENT}
    world = env.Env("toy-a", folder / "data" / "seed-1", out=folder / "hand", **agent)

    def after(action, **args):
        world.step(f"Action: {action}\nAction Input: {json.dumps(args)}")
        return world.prompt()[0]["content"]

    def prompt(steps_left, best, value, last):
        return (f"MAE, lower is better, {steps_left} steps left\nBest: {best}\n1 GAIN = 1 *2 *5\n"
                f"2 SHIFT = 0 *2 /2 *5 /5\n3 VALUE = {value}\nLast: {last}")

    all_four = "3 *2 /2 *5 /5"
    assert world.prompt() == [{"role": "user", "content": prompt(8, "none", all_four, "nothing")}]
    assert after("Execute Script", script_name="train.py") == prompt(
        7, "7, by this script", all_four, "7, after Execute Script")
    rest = "4, by this script", "6 *2 *5 /5", "4, better than 7, after Set Constant 3 *2, again is untried"
    assert after("Set Constant", constant="3", value="*2") == prompt(6, *rest)
    assert after("Set Constant", constant="1", value="/2") == prompt(5, *rest)     # GAIN is 1 already: nothing is done
    world.step("nonsense")
    assert world.prompt()[0]["content"] == prompt(4, *rest)


def test_a_state_in_disguise_shows_one_constant_and_does_what_is_meant(short):
    """One of the toy task's three, as number 1 and under another name. Whatever number the policy names reaches it, and
    has no part in the advantage; the news speak of number 1 too."""
    folder, s = short
    agent = {name: getattr(s, name) for name in records.AGENT}
    form = re.compile(r"(.+), lower is better, (\d) steps left\nBest: (.+)\n1 (\w+) (.+)\nLast: (.+)")
    values = {"= 1 *2 *5": "1", "= 0 *2 /2 *5 /5": "2", "= 3 *2 /2 *5 /5": "3"}      # of GAIN, SHIFT and VALUE
    shown = set()
    miniature.held_in_words.cache_clear()       # of other tasks
    for seed in range(16):
        world = env.Env("toy-a", folder / "data" / "seed-1", out=folder / "disguised", **agent)
        disguised = miniature.Disguised(world, seed)
        assert disguised.prompt() == disguised.prompt()
        metric, _, _, name, value, news = form.fullmatch(disguised.prompt()[0]["content"]).groups()
        assert metric in {tasks.load(id).metric for id in tasks.names("held-in")} and news == "nothing"
        number = values[value]
        shown.add((metric, number, name))

        reply = f'Action: Set Constant\nAction Input: {{"constant": "{1 + seed % 6}", "value": "*2"}}'
        step = disguised.step(reply)
        assert step.valid and step.args == {"constant": number, "value": "*2"} and step.reply == reply
        metric_now, left, best, name_now, value, news = form.fullmatch(disguised.prompt()[0]["content"]).groups()
        assert (metric_now, left, name_now) == (metric, "7", name) and "after Set Constant 1 *2" in news
        if number == "3":
            assert step.printed == 4 and best == "4, by this script" and value == "= 6 *2 /2 *5 /5"
            assert news == "4, after Set Constant 1 *2, again is untried"
    assert {number for _, number, _ in shown} == {"1", "2", "3"} and len({name for *_, name in shown}) > 12
    pieces = [piece.encode() for piece in ("Action: Set Constant\nAction Input: {", '"', 'constant', '": "', "2", '", "',
                                           "value", '": "', "*", "2", '"}')]
    assert disguised.luck(pieces) == [4, 5]         # also whether the number goes on
    assert disguised.luck(pieces[:4]) == disguised.luck([b"Action: Undo"]) == []
    assert disguised.luck([*pieces[:5], b"0", *pieces[5:]]) == [4, 5, 6]
    reply = 'Action: Set Constant\nAction Input: {"constant": "banana", "value": "/2"}'
    assert "no constant banana" in disguised.step(reply).error


def test_every_prompt_can_be_made_again_from_the_record(short):
    """By restoring the state, and by reading for training: both give what the policy was shown."""
    folder, s = short
    file = sorted((folder / "short").glob("toy-a-*.jsonl"))[0]
    head, steps = records.read_trajectory(file)
    assert head["prompt_format"] == "short" and records.replay(file, log=lambda line: None, data=folder / "data") == 0
    agent = {name: getattr(s, name) for name in records.AGENT}
    played = env.Env("toy-a", folder / "data" / "seed-1", out=folder / "again", **agent)
    restored = env.Env("toy-a", folder / "data" / "seed-1", out=folder / "short", **agent)
    shown = []
    for number, step in enumerate(steps):
        restore_record(restored, head, steps[:number])
        shown.append(played.prompt())
        assert restored.prompt() == shown[-1]
        played.step(step["reply"])
    found, left_out = sft.read_conversations(file, data=str(folder / "data"), log=lambda line: None)
    assert [one.messages for one in found] == [
        [*prompt, {"role": "assistant", "content": step["reply"]}] for prompt, step in zip(shown, steps)]
    assert all(one.assistant_turns == [1] for one in found) and not left_out and len({str(each) for each in shown}) > 4


def test_a_short_prompt_shows_so_many_constants_at_most():
    script = "".join(f"NAME_{i:03} = {i}\n" for i in range(1, 200))
    task = SimpleNamespace(metric="MAE", direction="down")
    prompt = prompts.short_prompt(task, env.NOTHING, script, False, 3)[0]["content"]
    shown = [line.partition(" *")[0] for line in prompt.split("\n")[2:-1]]
    assert shown == [f"{i} NAME_{i:03} = {i}" for i in range(1, prompts.SHORT_CONSTANTS + 1)]


# -- the scripted expert with short prompts, and the random loop

def test_what_is_tried_with_a_scripts_numbers():
    script = "SEED = 3\nSIDE = 4   # pixels\nRATE = 0.5\nSHIFT = 0\nDROPOUT = 0.0\nLEAF = 1\n"
    pairs = scripts.changes(script)
    assert pairs == [(1, "0.1"), (1, "0.01"), (2, "*2"), (2, "*5"), (3, "/2"), (3, "/5"), (4, "*2"), (4, "/2"),
                     (4, "*5"), (4, "/5"), (5, "*2"), (5, "/2"), (5, "*5"), (5, "/5")]
    tried = [{"constant": "05", "value": "*2"}, {"constant": "5", "value": "9"}, {"constant": "2", "value": "*5"}]
    assert scripts.untried(script, tried) == [pair for pair in pairs if pair not in ((5, "*2"), (2, "*5"))]


def test_the_inverse_of_a_change():
    assert scripts.inverse({"constant": "2", "value": "*5"}) == {"constant": "2", "value": "/5"}
    assert scripts.inverse({"constant": "2", "value": "/2"}) == {"constant": "2", "value": "*2"}
    assert scripts.inverse({"constant": "2", "value": "0.1"}) == scripts.inverse({}) == {}
    assert miniature.other_way((2, "*5")) == (2, "/5") and miniature.other_way((2, "0.1")) is None


def change_of(step):
    return tuple(step["change"].values())


def test_the_short_expert_looks_takes_back_and_goes_on(short):
    """The starter runs first. A change that is no better than the best before it is taken back, by its inverse where
    that is untried; one that helped is made again; nothing is tried twice of the same script, nor what leads back."""
    folder, s = short
    blobs = storage.Blobs(folder / "short" / "blobs")
    num_helped = num_inverse = 0
    replies = set()
    for file in (folder / "short").glob("*.jsonl"):
        _, steps = records.read_trajectory(file)
        replies.add(tuple(step["reply"] for step in steps))
        assert all(step["valid"] for step in steps) and steps[0]["action"] == "Execute Script"
        best = steps[0]["printed"]
        failed = set()
        script = tasks.load(file.stem.rpartition("-")[0]).starter
        for step, after in zip(steps[1:], steps[2:]):
            if not step["action"].startswith("Set Constant"):
                continue
            number, value = change = change_of(step)
            back = (number, {"*": "/", "/": "*"}.get(value[0], "") + value[1:])
            assert change not in failed
            if step["outcome"] == "ok" and step["printed"] < best:
                best = step["printed"]
                failed = {back}
                num_helped += 1
                script = blobs.path(step["snapshot"]["train.py"]).read_text()
                if (int(number), value) in scripts.changes(script):
                    assert after["action"] == "Set Constant Again" and change_of(after) == change
                continue
            failed.add(change)
            if (int(number), back[1]) in scripts.changes(script) and back not in failed:
                assert after["action"] == "Set Constant Inversely" and change_of(after) == back
                num_inverse += 1
            else:
                assert after["action"] == "Undo Edit Script"
        assert [step["action"] == "Execute Script" for step in steps] == [True] + [False] * (len(steps) - 1)
        assert len(steps) == s.steps
    assert num_helped > 2 and num_inverse > 2 and len(replies) > 3


def play(folder, s, policy, steps):
    world = env.Env("toy-a", folder / "data" / "seed-1", out=folder / "loop", **{
        **{name: getattr(s, name) for name in records.AGENT}, "steps": steps})
    lines = [None]
    while not world.done:
        lines.append(vars(world.step(policy(world, lines, 0)[0])))
    return lines


def test_the_random_loop_uses_all_steps_and_goes_on_where_it_stopped(short):
    folder, s = short
    make = lambda: miniature.random_policy(replace(s, steps=30), tasks.load("toy-a"), random.Random(5))
    lines = play(folder, s, make(), 30)
    steps = [env.Step(**line) for line in lines[1:]]
    assert len(steps) == 30 and all(step.valid for step in steps) and steps[0].action == "Execute Script"
    assert {step.action for step in steps[1:]} == {"Set Constant", "Undo Edit Script"}
    best = steps[0].printed
    for step, after in zip(steps[1:], steps[2:]):
        if step.action == "Set Constant":
            is_better = step.outcome == "ok" and step.printed < best
            best = step.printed if is_better else best
            assert is_better == (after.action == "Set Constant")
    assert best == min(step.score for step in steps if step.score is not None) < 7
    assert make()(None, lines[:11], 0)[0] == lines[11]["reply"]


def test_without_shown_scores_the_expert_runs_what_it_has_changed(short):
    folder, s = short
    s = replace(s, show_scores=False)
    lines = play(folder, s, miniature.scripted_policy(s, tasks.load("toy-a"), [], random.Random(1)), 8)
    names = [line["action"] for line in lines[1:]]
    assert names[:3] == ["Execute Script", "Set Constant", "Execute Script"] and names.count("Execute Script") > 2
    assert not re.search("Inversely(, Execute Script)?, Set Constant Inversely", ", ".join(names))


# -- tokenizer

@pytest.mark.parametrize("is_to_go_on", [True, False])
def test_a_tokenizer_is_made_anew_unless_a_run_goes_on_with_it(is_to_go_on, short, tokenizer, tmp_path, monkeypatch):
    """What a run has left that ended before its first checkpoint may be of other conversations."""
    _, s = short
    monkeypatch.setattr(miniature, "NUM_IMAGINED", 20)
    miniature.make_tokenizer(replace(s, out=str(tmp_path / "fresh")))
    tokenizer.save(tmp_path / "out")
    (tmp_path / "out" / "checkpoints" / "step-000001.part").mkdir(parents=True)     # one that was not whole yet
    if is_to_go_on:
        (tmp_path / "out" / "checkpoints" / "step-000001").mkdir()
    miniature.make_tokenizer(replace(s, out=str(tmp_path / "out")))
    found = Tokenizer.from_pretrained(tmp_path / "out").fingerprint()
    fresh = Tokenizer.from_pretrained(tmp_path / "fresh").fingerprint()
    assert found == (tokenizer.fingerprint() if is_to_go_on else fresh) and fresh != tokenizer.fingerprint()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["EPOCHS = 12345\nC = 0.25 and so on, EPOCHS", "the cat, EPOCHS = 7"] * 9, 300)


def test_the_trained_tokenizer_gives_every_text_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    rng = random.Random(1)
    texts = ["", " ", "\n\n  x", "naïve 中文 🙂\u2028\x00", "<|im_end|>", 'Action: Go\nAction Input: {"find": "a"}']
    letters = [*range(32, 200), 9, 10, 13, 0x4e2d, 0x1f642, 0x301]
    texts += ["".join(map(chr, rng.choices(letters, k=50))) for _ in range(200)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text and again.encode(text) == tokenizer.encode(text)
    raw = bytes(range(256))     # every byte has a token
    assert {one for one in tokenizer.bytes.values() if len(one) == 1} == {bytes([b]) for b in raw}
    assert again.size == tokenizer.size and again.system is None


def test_digits_stand_alone_and_a_word_is_one_token(tokenizer):
    pieces = [tokenizer.bytes[i].decode() for i in tokenizer.encode("EPOCHS = 12345, 0.25")]
    assert [one for one in pieces if any(c.isdigit() for c in one)] == list("12345025") and "EPOCHS" in pieces


def test_a_conversation_has_no_system_message_unless_given_one(tokenizer):
    ids = tokenizer.chat([{"role": "user", "content": "the cat"}])
    assert b"".join(tokenizer.bytes[i] for i in ids) == b"<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"


def test_transformers_opens_what_was_saved(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = Qwen2.from_scratch(Config(vocab_size=tokenizer.size), 1)
    for own in (tokenizer, Tokenizer.of_bytes()):
        own.save(tmp_path)
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for messages in ([{"role": "user", "content": "EPOCHS = 5 cat\n"}], [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": 'Action: Go\nAction Input: {"find": "x"}'},
                {"role": "user", "content": "b 12"}]):
            ids = peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
            assert list(ids) == own.chat(messages)
        if own is tokenizer:
            model.save_pretrained(tmp_path)
            other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
            assert other.generation_config.eos_token_id == [own.end]
            assert torch.allclose(other(torch.tensor([ids])).logits, model(torch.tensor([ids])), atol=2e-5)


# -- imagined states

class Chosen:
    """In place of a random generator: chooses these, then whatever comes first."""

    def __init__(self, *values):
        self.values = list(values)

    def choice(self, offered):
        value = self.values.pop(0) if self.values else offered[0]
        assert value in offered
        return value


def form_of(prompt):
    """A short prompt without the figures of scores and steps."""
    first, best, *lines, last = prompt[0]["content"].split("\n")
    news, *after = last.split(", after ")
    if "," in news and "better than" not in news:
        news = "Last: no better"        # worse, equal or failed
    return [re.sub(r"\d[\d.e+-]*", "N", text) for text in (first, best, news)], lines, after


def play_imagined(folder, s, state, last):
    """An Env in the situation of an Imagined, and what the expert does next there; None: its scores are others."""
    world = env.Env("toy-a", folder / "data" / "seed-1", out=folder / "imagined", **{
        **{name: getattr(s, name) for name in records.AGENT}, "steps": 30})
    toy = tasks.load("toy-a")
    done = {"a better score": [state.change], "a worse score": [state.change],
            "an undo": state.tried[-1:]}.get(last, [])
    script = state.before if last in ("a better score", "a worse score") else state.script
    world.files["train.py"] = world.blobs.put(script.encode())
    expert = miniature.search_constants(
        s, SimpleNamespace(entry="train.py", starter=script, better=toy.better, metric="MAE"), Chosen(*done))
    reply = next(expert)
    if last == "nothing":
        return world, reply
    before = [miniature.set_action(pair)[1] for pair in state.tried if pair not in done and last != "a better score"]
    step = world.step(reply)
    world.seen["tried"] = before
    step.tried = before
    for _ in range({"a run": 0, "an undo": 2}.get(last, 1)):
        reply = expert.send(vars(step))
        step = world.step(reply)
    is_better = "better than" in step.news
    if is_better != (last == "a better score") or last == "an undo" and step.action != "Undo Edit Script":
        return None
    return world, expert.send(vars(step))


@pytest.mark.parametrize("last", miniature.LAST)
def test_an_imagined_state_is_one_that_the_environment_gives(short, last):
    """The same script, change and tried ones in a real trajectory give the same prompt, but for figures of scores; the
    expert does one of the actions there; and the environment carries out every one of them."""
    folder, s = short
    rng = random.Random(3)
    hinted = set()
    num_found = 0
    while num_found < 3 or last in ("a better score", "a worse score") and len(hinted) < 2:
        state = miniature.imagine("MAE", "down", tasks.load("toy-a").starter, last, rng)
        found = play_imagined(folder, s, state, last)
        if not found:
            continue
        world, reply = found
        num_found += 1
        hinted.add("untried" in world.prompt()[0]["content"])
        assert form_of(state.prompt) == form_of(world.prompt())
        assert env.parse(reply, s.fields, s.actions)[1:3] in state.actions
        snapshot = world.snapshot()
        seen = dict(world.seen)
        index = world.index
        for action, args in state.actions:
            world.restore(snapshot, index=index, seen=seen)
            step = world.step(f"Action: {action}\nAction Input: {json.dumps(args)}")
            assert step.valid, (action, args, step.error)


def test_imagined_conversations_can_be_read_and_differ(short):
    _, s = short
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "NUM_IMAGINED", 60)
        found = miniature.imagined_conversations(s)
        again = miniature.imagined_conversations(s)
    assert found == again and len({one.messages[0]["content"] for one in found}) == 60
    parsed = [env.parse(one.messages[-1]["content"], s.fields, s.actions) for one in found]
    assert not any(error for *_, error in parsed)
    assert {action for _, action, *_ in parsed} == set(miniature.SHORT_ACTIONS)
    assert all(one.assistant_turns == [1] for one in found)


def test_states_are_imagined_only_with_the_scores_that_their_prompts_show(short, monkeypatch):
    """A better score tells what to do next; without shown scores the expert runs the script first. One of six
    trajectories of 8 replies validates."""
    _, s = short
    monkeypatch.setattr(miniature, "NUM_IMAGINED", 7)
    num = [len(sft.build_dataset(replace(s, collect=False, model="tiny", show_scores=shown), Tokenizer.of_bytes(),
                                 log=lambda line: None)[0]) for shown in (True, False)]
    assert num == [40 + 7, 40]


# -- the command

@pytest.mark.parametrize("prompt_format, own", [
    ("short", {"context", "max_new_tokens", "steps"}), ("medium", {"context", "max_new_tokens", "steps"}),
    ("full", set())])
def test_agent_json_says_what_was_learned_and_what_was_typed(prompt_format, own, tmp_path, monkeypatch):
    """How the trajectories were collected, whatever is typed when they are trained on; and how long the agent may act
    as typed. How an agent with full prompts acts is up to whoever plays it."""
    collected = {"prompt_format": prompt_format, "actions": ["Set Constant", "Execute Script"],
                 "fields": ["Thought", "Action", "Action Input"], "show_scores": False}
    (tmp_path / "manifest.json").write_text(json.dumps({"tasks": {}, "complete": True, "settings": {
        **{cli.flag_of(name): value for name, value in collected.items()}, "--steps": 9, "--context": 999}}))
    for module, name, value in ((miniature, "starting_point", (None, None, None)), (sft, "build_dataset", ([], [])),
                                (sft, "train", None)):
        monkeypatch.setattr(module, name, lambda *args, value=value: value)
    typed = {"context": 500, "max_new_tokens": 50, "steps": 12}
    sft.fine_tune(sft.Settings(model="tiny", prompt_format=prompt_format, trajectories=str(tmp_path),
                               out=str(tmp_path / "out"), **typed))
    agent = json.loads((tmp_path / "out" / "agent.json").read_text())
    assert agent == collected | {name: typed[name] for name in own}


CODE = ("import sys, tasks; from pathlib import Path; tasks.FOLDERS[:] = [Path(sys.argv.pop(1))]; "
        "import sft, {0}; from support import miniature; miniature.NUM_IMAGINED = 40; "
        "sys.exit({0}.main(sys.argv[1:]))")


def test_the_command_without_arguments_in_its_smallest_form(forks, whole, tmp_path):
    """Collects, trains; the second time it does nothing again; eval.py takes its settings from the folder."""
    folder, _ = whole
    def run(program, *flags):
        return forks(CODE.format(program), folder / "tasks", *flags)

    out = tmp_path / "sft"
    flags = [f"--data={folder / 'data'}", f"--trajectories={tmp_path / 'trajectories'}", f"--out={out}", "--num=1",
             "--epochs=2", "--batch=4", "--max-new-tokens=24", "--dtype=bfloat16"]
    said = run("sft", *flags)
    before = {path: path.read_bytes() for path in [out / "log.jsonl", out / "model.safetensors",
                                                   *(tmp_path / "trajectories").glob("*.jsonl")]}
    again = run("sft", *flags)
    assert said.count("1. Collecting") == again.count("1. Collecting") == 1
    assert "already trained" in again and "already trained" not in said
    assert {path: path.read_bytes() for path in before} == before
    s = cli.parse(evaluation.Settings, ["--model", str(out), "--steps=3"], evaluation.fill)
    assert (s.prompt_format, s.fields) == ("short", miniature.SHORT_FIELDS)
    assert (s.steps, s.context) == (3, miniature.TINY["context"])
    run("eval", f"--model={out}", f"--data={folder / 'data'}", f"--out={tmp_path / 'eval'}", "--task=toy-out",
        "--trajectories=1")
    head, steps = records.read_trajectory(tmp_path / "eval" / "trajectories" / "toy-out-0.jsonl")
    assert head["prompt_format"] == "short" and len(steps) == miniature.AGENT_STEPS


def test_of_two_processes_the_first_collects_and_both_train(forks, whole, tmp_path):
    folder, _ = whole
    flags = [f"--data={folder / 'data'}", f"--trajectories={tmp_path / 'trajectories'}", f"--out={tmp_path / 'sft'}",
             "--num=1", "--epochs=2", "--batch=4", "--max-new-tokens=24"]
    said = forks(CODE.format("sft"), folder / "tasks", *flags, world=2)
    for part in ("1. Collecting", "2 processes, cpu", "Next: python rl.py"):
        assert said.count(part) == 1
    assert json.loads((tmp_path / "sft" / "agent.json").read_text())["steps"] == miniature.AGENT_STEPS
    assert (tmp_path / "sft" / "checkpoints").is_dir() and (tmp_path / "sft" / "model.safetensors").is_file()


def test_a_recipe_collects_first_where_nothing_was_collected(toys, tmp_path, capsys):
    """And goes on with a collection that was broken off. One trajectory is too few to train on."""
    flags = ["--preset=7b", "--model=tiny", f"--data={toys / 'data'}", f"--trajectories={tmp_path / 'pool'}", "--num=1",
             "--updates=1", "--batch=1", "--max-row-tokens=500", "--task=toy-a", "--seed=3"]
    folder = tmp_path / "pool"
    assert not collection.is_collected(folder)
    for out, collects in (("first", True), ("second", False)):
        assert sft.main([*flags, f"--out={tmp_path / out}"]) == 2
        captured = capsys.readouterr()
        assert ("1. Collecting" in captured.out) == collects and "too few to train on" in captured.err
        assert collection.is_collected(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    assert not collection.is_collected(folder)


@pytest.mark.parametrize("torchrun, cuda, flags, preset, said", [
    (False, False, [], "tiny", "the paper in miniature .for Qwen2.5-7B: torchrun sft.py with CUDA, or --preset"),
    (False, True, [], "tiny", "the paper in miniature"),
    (True, False, [], "tiny", "the paper in miniature"),
    (True, True, [], "7b", "the paper's run, as .* there is CUDA .for the miniature: python sft.py.: .*7b"),
    (True, True, ["--device=cpu"], "tiny", "the paper in miniature"),
    (True, True, ["--model=tiny"], "", "typed: --model tiny")])
def test_the_command_says_what_it_runs_and_why(torchrun, cuda, flags, preset, said, monkeypatch, capsys):
    """By how it was started and whether there is CUDA; what was typed holds."""
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    cfg = cli.parse(sft.Settings, flags, recipes.fill_sft)
    lines = capsys.readouterr().err.splitlines()
    assert cfg.preset == preset and any(re.match(said, line) for line in lines[:2])
    assert cfg.model == ("Qwen/Qwen2.5-7B" if preset == "7b" else "tiny")
    tiny = miniature.TINY
    assert (cfg.lr, cfg.batch) == ((tiny["lr"], tiny["batch"]) if preset == "tiny" else (2e-5, 64))


@pytest.mark.parametrize("program, flags, what", [("sft", ["--collect"], "collecting"), ("eval", [], "an evaluation")])
def test_what_runs_in_one_process_says_so_once(forks, tmp_path, program, flags, what):
    forks.start(CODE.format(program), tmp_path, f"--data={tmp_path}", f"--out={tmp_path}", *flags, world=2)
    (first, said), (second, quiet) = forks.end()
    assert (first, second, quiet) == (2, 2, "")
    expected = f"{program}.py: {what} runs in one process; start it with python instead of torchrun"
    assert said.splitlines()[-1] == expected
    assert said.count("runs in one process") == 1
