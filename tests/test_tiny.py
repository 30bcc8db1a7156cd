"""The small agent of `python sft.py`: short prompts that any record can give again, ideas made of a script's numbers, a
tokenizer of its own, texts whose names are drawn anew, and the whole command in its smallest form."""
import json
import random
import re

import pytest
import torch

import env
import eval as evaluation
import sample
import sft
import tasks
from model import Config, Qwen2
from sample import Tokenizer
from support.miniature import draw_model, train_tokenizer
from test_collect import STARTER, settings, toys, whole  # noqa: F401  (fixtures)
from support import cli, miniature


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


# ---- short prompts

def test_a_short_prompt_by_hand(short):
    folder, s = short
    world = env.Env("toy-a", folder / "data", out=folder / "hand", prompt_format="short", fields=s.fields)
    head = "Task: toy-a\nMAE, lower is better\nLast: {}\n"
    script = ("VALUE = 3\nSHIFT = 0\nGAIN = 1\nvalue = GAIN * VALUE + SHIFT\n"       # no comment, no import, whole lines
              'print("validation MAE:", fabs(value - 10))\n'
              'open("submission.csv", "w").write("id,y\\n" + "".join(f"{i},{value}\\n" for i in (1, 2)))')
    assert script in STARTER.replace("ANSWER", "10").replace("       # what is predicted", "")
    assert world.prompt() == [{"role": "user", "content": head.format("nothing") + script}]

    def after(action, **args):
        world.step(f"Action: {action}\nAction Input: {json.dumps(args)}")
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
    assert "\nLast: Nothing was done. The entry \"Action:\" is missing" in world.prompt()[0]["content"]


def test_every_prompt_can_be_made_again_from_the_record(short):
    """By restoring the state, and by reading for training: both give what the policy was shown."""
    folder, s = short
    file = sorted((folder / "short").glob("toy-a-*.jsonl"))[0]
    head, steps = env.read_trajectory(file)
    assert head["prompt_format"] == "short" and env.replay(file, log=lambda line: None, data=folder / "data") == 0
    played = env.Env("toy-a", folder / "data", out=folder / "again", prompt_format="short", fields=s.fields, actions=s.actions,
                     steps=s.steps)
    restored = env.Env("toy-a", folder / "data", out=folder / "short", prompt_format=head["prompt_format"], fields=head["fields"])
    snapshot, messages, shown = head["snapshot"], head["messages"], []
    for step in steps:
        restored.restore(snapshot, messages, index=step["index"], m_before=step["m_before"])
        shown.append(played.prompt())
        assert restored.prompt() == shown[-1]
        played.step(step["reply"])
        snapshot, messages = step["snapshot"], messages + step["messages"]
    found, left_out = sft.read_conversations(file, data=str(folder / "data"), log=lambda line: None)
    assert [one.messages for one in found] == [
        [*prompt, {"role": "assistant", "content": step["reply"]}] for prompt, step in zip(shown, steps)]
    assert all(one.assistant_turns == [1] for one in found) and not left_out and len({str(each) for each in shown}) > 4


def test_a_short_prompt_shows_whole_lines_and_never_more_than_its_limit():
    lines = "".join(f"NAME_{i} = {i}\n" for i in range(200))
    shown = env.shown_lines('"""Doc."""\nimport os\n' + lines)
    assert lines.startswith(shown + "\n") and env.SHORT_SCRIPT - 15 < len(shown) <= env.SHORT_SCRIPT
    assert env.shown_lines("import os\nx = 1\n") == "import os\nx = 1"
    assert env.shown_lines("A = 1  # one\n\n\n# two\nB = 2\n   # three\ndef f():\n    pass") == (
        "A = 1\nB = 2\ndef f():\n    pass")
    assert len(env.shown_lines("y" * 5000)) == env.SHORT_SCRIPT and env.shown_lines("") == ""


# ---- the scripted expert with short prompts

def test_ideas_made_of_a_scripts_numbers():
    ideas = miniature.constants("SEED = 3\nSIDE = 4   # pixels\nRATE = 0.5\nSHIFT = 0\nNAME = 'x'\nTWICE = 2\nNOT_TWICE = 2\n"
                          "def f():\n    LOCAL = 3\n")
    edits = [one["edits"][0]["replace"] for one in ideas]
    assert edits == ["SIDE = 8", "SIDE = 2", "RATE = 0.25", "RATE = 0.05", "SHIFT = 1", "SHIFT = 2", "SHIFT = 5",
                     "NOT_TWICE = 4", "NOT_TWICE = 1"]
    assert [one["title"] for one in ideas[:2]] == ["SIDE 8", "SIDE 2"]
    odd = miniature.constants(f"A = 5-3\nB = 1.2.3\nC = {'9' * 400}\nD = 1e\nE = 1e999\nF = 2\n")
    assert [one["title"] for one in odd] == ["F 4", "F 1"]


def test_the_short_expert_tries_runs_and_takes_back(short):
    """A run that is no better than the best before it, or fails, is followed by as many steps back as there were edits;
    an edit is sometimes run and sometimes followed by another."""
    folder, s = short
    pairs = set()
    for file in (folder / "short").glob("*.jsonl"):
        _, steps = env.read_trajectory(file)
        names = [step["action"] for step in steps]
        pairs |= set(zip(names, names[1:]))
        assert all(step["valid"] for step in steps)
        assert steps[-1]["ended"] == ("final answer" if "Final Answer" in names else "steps")
        best, new, owed = None, 0, 0
        for step in steps:
            if step["action"] == "Undo Edit Script":
                owed -= 1
                assert owed >= 0
                continue
            assert owed == 0
            new += step["action"] == "Replace In Script"
            if step["action"] == "Execute Script":
                good = step["outcome"] == "ok" and (best is None or step["m_after"] < best)
                best, owed, new = step["m_after"] if good else best, 0 if good else new, 0
    assert pairs >= {("Replace In Script", "Execute Script"), ("Replace In Script", "Replace In Script")}


# ---- tokenizer, texts drawn anew, weights that copy

@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["EPOCHS = 12345\nC = 0.25 and so on, EPOCHS", "the cat, EPOCHS = 7"] * 9, 300,
                           ['Action: Go\nAction Input: {"find": "', '"}'])


def test_the_trained_tokenizer_gives_every_text_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again, rng = Tokenizer.from_pretrained(tmp_path), random.Random(1)
    texts = ["", " ", "\n\n  x", "naïve 中文 🙂\u2028\x00", "<|im_end|>", 'Action: Go\nAction Input: {"find": "a"}'] + [
        "".join(map(chr, rng.choices([*range(32, 200), 9, 10, 13, 0x4e2d, 0x1f642, 0x301], k=50))) for _ in range(200)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text and again.encode(text) == tokenizer.encode(text)
    raw = bytes(range(256))     # every byte has a token
    assert {one for one in tokenizer.bytes if len(one) == 1} == {bytes([b]) for b in raw}
    assert again.size == tokenizer.size and again.system is None


def test_digits_stand_alone_and_a_phrase_is_one_token(tokenizer):
    pieces = [tokenizer.bytes[i].decode() for i in tokenizer.encode("EPOCHS = 12345, 0.25")]
    assert [one for one in pieces if any(c.isdigit() for c in one)] == list("12345025") and "EPOCHS" in pieces
    assert len(tokenizer.encode('Action: Go\nAction Input: {"find": "')) == 1
    named = tokenizer.encode("EPOCHS")
    assert tokenizer.encode('Action: Go\nAction Input: {"find": "EPOCHS"}')[1:-1] == named     # the same to be copied


def test_a_conversation_has_no_system_message_unless_given_one(tokenizer):
    ids = tokenizer.chat([{"role": "user", "content": "the cat"}])
    assert b"".join(tokenizer.bytes[i] for i in ids) == b"<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"


def test_transformers_opens_what_was_saved(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = draw_model(Config(vocab_size=tokenizer.size), 1)
    for own in (tokenizer, Tokenizer.of_bytes()):
        own.save(tmp_path)
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for messages in ([{"role": "user", "content": "EPOCHS = 5 cat\n"}], [
                {"role": "user", "content": "a"}, {"role": "assistant", "content": 'Action: Go\nAction Input: {"find": "x"}'},
                {"role": "user", "content": "b 12"}]):
            ids = peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
            assert list(ids) == own.chat(messages)
        if own is tokenizer:
            model.save_pretrained(tmp_path)
            other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
            assert other.generation_config.eos_token_id == own.end
            assert torch.allclose(other(torch.tensor([ids])).logits, model(torch.tensor([ids])), atol=2e-5)


def test_names_drawn_anew_still_fit():
    """The edit of every copy fits the script of that copy as it fitted the first, and copies do differ."""
    script = "EPOCHS = 5\nRATE = 0.25\nSIDE_A = 12\nOFF = 0.0\nfor i in range(EPOCHS):\n    step(RATE, SIDE_A)"
    prompt = {"role": "user", "content": f"Task: x\nMAE, lower is better\nLast: nothing\n{script}"}
    names, moved, cropped, drilled = set(), 0, 0, 0
    for seed in range(300):
        for find, put in (("EPOCHS = 5", "EPOCHS = 50"), ("step(RATE, SIDE_A)", "step(RATE, SIDE_A, 1)")):
            args = {"script_name": "train.py", "find": find, "replace": put}
            reply = {"role": "assistant", "content": f"Action: Replace In Script\nAction Input: {json.dumps(args)}"}
            user, robot, *more = miniature.augment_constants([prompt, reply], random.Random(seed))
            shown = user["content"].split("\n", 3)[3]
            fields, action, new, error = env.parse(robot["content"], miniature.SHORT_FIELDS, miniature.SHORT_ACTIONS)
            assert not error and shown.count(new["find"]) == 1 and new["find"] != new["replace"]
            assert new["replace"].startswith(new["find"][:4]) and user["content"].startswith("Task: x\nMAE, lower")
            moved += new["find"] != find
            cropped += len(shown.splitlines()) < 6
            if find.startswith("EPOCHS"):
                name = new["find"].split(" = ")[0]
                assert new["replace"] == f"{name} = 50" and (("range(" in shown) <= (f"range({name})" in shown))
                names.add(name)
            texts = [new["find"]]
            for each in more:       # an edit of another constant, as good
                fields, action, args, error = env.parse(each["content"], miniature.SHORT_FIELDS, miniature.SHORT_ACTIONS)
                texts.append(args["find"])
                assert not error and shown.split("\n").count(args["find"]) == 1
                assert args["replace"].split(" = ")[0] == args["find"].split(" = ")[0] != args["replace"]
            assert len(set(texts)) == len(texts)
            drilled += len(more)
    assert drilled > 500
    assert len(names) > 150 and 100 < cropped < 500 and moved > 300


def test_copies_are_of_what_is_trained_on_and_not_longer_than_it_may_be(tmp_path, monkeypatch):
    """Three of ten conversations lose their reply to the cut: the copies are of the others that do not validate."""
    lines = []
    for i in range(10):
        script = f"NAME{i} = 5" + "\nx = 1" * (60 if i in (0, 4, 7) else i)
        reply = 'Action: Replace In Script\nAction Input: ' + json.dumps(
            {"script_name": "train.py", "find": f"NAME{i} = 5", "replace": f"NAME{i} = 6"})
        lines.append(json.dumps({"messages": [{"role": "user", "content": f"Task: own\nMAE\nLast: {i}.\n{script}"},
                                              {"role": "assistant", "content": reply}]}))
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    t = Tokenizer.of_bytes()
    s = sft.Settings(trajectories=str(tmp_path / "own.jsonl"), copies=8, max_row_tokens=270)
    monkeypatch.setattr(sft, "VALIDATION_SHARE", 0.3)
    train, valid = sft.build_dataset(s, t, log=lambda line: None)
    last = lambda texts: {int(re.search(r"Last: (\d)\.", t.decode(ids))[1]) for ids, _ in texts}
    assert len(valid) == 2 and len(last(train)) == 5 and last(train) | last(valid) == {1, 2, 3, 5, 6, 8, 9}
    assert max(len(ids) for ids, _ in train) <= 271 and all(any(chosen) for _, chosen in train)


def test_weights_that_copy():
    """Of random tokens said twice the second time is mostly right before any training; plain weights get none right."""
    config, g = Config(vocab_size=500), torch.Generator().manual_seed(3)
    once = torch.randint(500, (8, 50), generator=g)
    twice = torch.cat([once, once], 1)
    model, plain = draw_model(config, 0), Qwen2.from_scratch(config, 0)
    right = [(net(twice)[:, 50:-1].argmax(-1) == twice[:, 51:]).float().mean().item() for net in (model, plain)]
    assert right[0] > 0.5 and right[1] < 0.05
    # "x = p", "y = q", ...: what follows " = " is told by the token before it alone
    order = torch.stack([torch.randperm(498, generator=g)[:30] for _ in range(8)]) + 2
    lines = torch.stack([order[:, :15], torch.ones(8, 15).long(), order[:, 15:], torch.zeros(8, 15).long()], 2)
    again = torch.stack([each[torch.randperm(15, generator=g)] for each in lines])
    shuffled = torch.cat([lines.flatten(1), again.flatten(1)], 1)
    assert (model(shuffled).argmax(-1)[:, 61:-1:4] == shuffled[:, 62::4]).float().mean() > 0.2       # by " = " alone: 1 / 15


# ---- the command

CODE = ("import sys, tasks; from pathlib import Path; tasks.FOLDERS[:] = [Path(sys.argv.pop(1))]; "
        "import sft, {0}; from support import miniature; miniature.NUM_STATES = 8; sys.exit({0}.main(sys.argv[1:]))")    # 8 states, not 64


def test_the_command_without_arguments_in_its_smallest_form(forks, whole, tmp_path):
    """Collects, trains, shows a reply; the second time it does nothing again; eval.py takes its settings from the folder."""
    folder, _ = whole
    def run(program, *flags):
        return forks(CODE.format(program), folder / "tasks", *flags)

    out = tmp_path / "sft"
    flags = [f"--data={folder / 'data'}", f"--trajectories={tmp_path / 'trajectories'}", f"--out={out}", "--num=1",
             "--copies=2", "--batch=4", "--max-new-tokens=24", "--dtype=bfloat16"]
    said = run("sft", *flags)
    assert re.search(r"held-out +\d+%", said) and "One state:\nTask: toy-" in said and "Its reply:" in said
    before = {path: path.read_bytes() for path in [out / "log.jsonl", out / "model.safetensors",
                                                   *(tmp_path / "trajectories").glob("*.jsonl")]}
    again = run("sft", *flags)
    assert said.count("1. Collecting") == again.count("1. Collecting") == 1
    assert "already trained" in again and again.split("One state:")[1] == said.split("One state:")[1]
    assert {path: path.read_bytes() for path in before} == before
    s = cli.parse(evaluation.Settings, ["--model", str(out), "--steps=3"], evaluation.fill)
    assert (s.prompt_format, s.fields, s.steps, s.context) == ("short", miniature.SHORT_FIELDS, 3, miniature.TINY["context"])
    run("eval", f"--model={out}", f"--data={folder / 'data'}", f"--out={tmp_path / 'eval'}", "--task=toy-out",
        "--trajectories=1")
    head, steps = env.read_trajectory(tmp_path / "eval" / "trajectories" / "toy-out-0.jsonl")
    assert head["prompt_format"] == "short" and len(steps) == miniature.AGENT_STEPS


def test_of_two_processes_the_first_collects_and_both_train(forks, whole, tmp_path):
    folder, _ = whole
    flags = [f"--data={folder / 'data'}", f"--trajectories={tmp_path / 'trajectories'}", f"--out={tmp_path / 'sft'}",
             "--num=1", "--copies=2", "--batch=4", "--max-new-tokens=24"]
    said = forks(CODE.format("sft"), folder / "tasks", *flags, world=2)
    for part in ("1. Collecting", "2 processes, cpu", "Its reply:", "Next: python rl.py"):
        assert said.count(part) == 1
    assert json.loads((tmp_path / "sft" / "agent.json").read_text())["steps"] == miniature.AGENT_STEPS
    assert (tmp_path / "sft" / "checkpoints").is_dir() and (tmp_path / "sft" / "model.safetensors").is_file()


def test_a_recipe_collects_first_where_nothing_was_collected(toys, tmp_path, capsys):
    """And goes on with a collection that was broken off. One trajectory is too few to train on."""
    flags = ["--preset=7b", "--model=tiny", f"--data={toys / 'data'}", f"--trajectories={tmp_path / 'pool'}", "--num=1",
             "--updates=1", "--batch=1", "--max-row-tokens=500", "--task=toy-a", "--seed=3"]
    folder = tmp_path / "pool"
    assert not sft.is_collected(folder)
    for out, collects in (("first", True), ("second", False)):
        assert sft.main([*flags, f"--out={tmp_path / out}"]) == 2
        captured = capsys.readouterr()
        assert ("1. Collecting" in captured.out) == collects and "too few to train on" in captured.err
        assert sft.is_collected(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    assert not sft.is_collected(folder)


@pytest.mark.parametrize("torchrun, cuda, flags, preset, said", [
    (False, False, [], "tiny", "the paper in miniature, as torchrun did not start it .for Qwen2.5-7B: torchrun"),
    (False, True, [], "tiny", "the paper in miniature, as torchrun did not start it"),
    (True, False, [], "tiny", "the paper in miniature on all processes, as there is no CUDA here .for Qwen2.5-7B: --preset"),
    (True, True, [], "7b", "the paper's run, as .* there is CUDA .for the miniature: python sft.py.: .*7b"),
    (True, True, ["--device=cpu"], "tiny", "the paper in miniature on all processes"),
    (True, True, ["--model=tiny"], "", "typed: --model tiny")])
def test_the_command_says_what_it_runs_and_why(torchrun, cuda, flags, preset, said, monkeypatch, capsys):
    """By how it was started and whether there is CUDA; what was typed holds."""
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    cfg = cli.parse(sft.Settings, flags, sft.fill)
    lines = capsys.readouterr().err.splitlines()
    assert cfg.preset == preset and any(re.match(said, line) for line in lines[:2])
    assert cfg.model == ("Qwen/Qwen2.5-7B" if preset == "7b" else "tiny")
    assert (cfg.lr, cfg.batch) == ((1.5e-3, 8) if preset == "tiny" else (2e-5, 64))


@pytest.mark.parametrize("program, flags, what", [("sft", ["--collect"], "collecting"), ("eval", [], "an evaluation")])
def test_what_runs_in_one_process_says_so_once(forks, tmp_path, program, flags, what):
    forks.start(CODE.format(program), tmp_path, f"--data={tmp_path}", f"--out={tmp_path}", *flags, world=2)
    (first, said), (second, quiet) = forks.end()
    assert (first, second, quiet) == (2, 2, "")
    assert said.splitlines()[-1] == f"{program}.py: {what} runs in one process; start it with python instead of torchrun"
    assert said.count("runs in one process") == 1
