"""rl.py around its update: the pool of states, rollouts, exact resume, and what goes wrong.

The tasks are those of test_collect, which run in a moment. The model has learned a few replies, each two tokens of a
tokenizer of its own, so that it really writes actions, good ones and bad ones, after a second of training."""
import json
import os
import random
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

import env
import rl
import sample
import sft
import tasks
from model import Config, Qwen2
from support import endpoint, records, sandbox
from test_collect import add_toys
from test_collect import settings as collecting
from support import cli, distributed, files, miniature, pool, storage
from support.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
HEADS = ['Thought: a\nAction: Replace In Script\nAction Input: {"script_name": "train.py", "find": ',
         'Thought: b\nAction: Execute Script\nAction Input: {"script_name": ']
EDITS = ['"VALUE = 3 ", "replace": "VALUE = 8 "}', '"VALUE = 3 ", "replace": "VALUE = -50 "}',
         '"SHIFT = 0", "replace": "SHIFT = 1"}', '"SHIFT = 0", "replace": "SHIFT = 1 / 0"}']
REPLIES = [HEADS[0] + edit for edit in EDITS] + [HEADS[1] + '"train.py"}', "no action"]
SHAPE = Config(vocab_size=280, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=6,
               num_key_value_heads=2, max_position_embeddings=1024)


def save_model(folder, prompts):
    """Writes a model that answers those prompts with REPLIES, or close to it, and its tokenizer."""
    bpe = Tokenizer.of_bytes().bpe
    bpe.add_tokens([*HEADS, *EDITS, '"train.py"}', "no action"])
    tokenizer = Tokenizer(bpe)
    model = Qwen2.from_scratch(SHAPE)
    texts = [tokenizer.conversation([*prompt, {"role": "assistant", "content": reply}])
             for prompt in prompts for reply in REPLIES]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(36):
        batch = distributed.batch_indices(len(texts), step, 6, 0)
        rows = distributed.packed_rows(texts, batch, 0, 1, 10_000)
        sft.nll_gradients(model, rows, sum(sum(texts[i][1]) for i in batch), 1, torch.device("cpu"), tokenizer.size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two held-in tasks and a held-out one, a pool of two trajectories of each of the two, a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "FOLDERS", [tmp_path_factory.mktemp("rl") / "tasks"])
        yield make(tasks.FOLDERS[0].parent)


def make(folder, pause=0.0):
    """Fills the folder, whose "tasks" are in tasks.FOLDERS; each script sleeps `pause` seconds."""
    add_toys(folder / "tasks")
    for script in (folder / "tasks").glob("*/train.py") if pause else ():
        script.write_text(script.read_text() + f"import time\ntime.sleep({pause})\n")
    sft.collect(collecting(folder, "pool", prompt_format="short", fields=miniature.SHORT_FIELDS,
                           actions=(*miniature.SHORT_ACTIONS, "Replace In Script"), num=2, steps=6))
    rollout = playing(folder)
    save_model(folder / "model", [rollout.begin(name)[0].prompt() for name in list(rollout.states)[::4]])
    return folder


def settings(folder, **more):
    return rl.Settings(**{"model": str(folder / "model"), "trajectories": str(folder / "pool"), "states": 4,
                          "samples": 2, "data": str(folder / "data"), "out": str(folder / "out"),
                          "max_new_tokens": 8, "context": 1000, **more})


class Scripted:
    """In place of an Engine: gives prepared replies. replies: {(iteration's place i, j): text}, or one text for all."""

    def __init__(self, replies=REPLIES[0], tokenizer=None, context=1000):
        self.replies = replies
        self.context = context
        self.asked = []
        self.sampled_tokens = 0
        self.tokenizer = tokenizer or Tokenizer.of_bytes()

    def generate(self, prompts, n=1, seed=0, on_completion=None, **options):
        self.asked.append(prompts)
        for i in range(len(prompts)):
            for j in range(n):
                on_completion(i, j, self.reply(self.replies if isinstance(self.replies, str) else self.replies[i, j]))

    def submit(self, prompt, seed=0, **options):
        self.asked.append(prompt)
        future = rl.ThreadPoolExecutor(1).submit(lambda: self.reply(self.replies.pop(0)))
        return future

    def refresh(self):
        """It has no cache to drop."""

    def reply(self, text):
        tokens = self.tokenizer.encode(text) + [self.tokenizer.end]
        return endpoint.Completion(text, tokens, [-0.01 * k for k in range(len(tokens))], "stop")


def playing(folder, engine=None, **more):
    """A RolloutWorker over the folder's pool."""
    cfg = settings(folder, **more)
    engine = engine or Scripted()
    return rl.RolloutWorker(cfg, engine, pool.load_pool(cfg, engine.tokenizer, lambda line: None))


def rolled_out(rollout, iteration=0):
    return rollout.run(rollout.sample_states(iteration), iteration)[0]


def copied(folder, tmp_path):
    """A pool of one's own, to be damaged: the folder of the trajectories."""
    return Path(shutil.copytree(folder / "pool", tmp_path / "pool"))


def engine_of(folder, rows=8):
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    return sample.Engine(Qwen2.from_pretrained(folder / "model").requires_grad_(False), tokenizer, rows, 1000)


# -- the pool

def test_every_state_is_that_of_the_recorded_run(made):
    """Every prefix: played on from there, the recorded reply gives the recorded step; the messages and the prompt are
    those of a run that was never stopped."""
    rollout = playing(made)
    seen = 0
    for file in sorted((made / "pool").glob("*.jsonl")):
        head, steps = records.read_trajectory(file)
        live = env.Env(head["task"], tasks.seeded(made / "data", head["data_seed"]), out=made / "pool",
                       **{name: head[name] for name in records.AGENT})
        for step in steps:
            state = rollout.states[f"{file.stem}, step {step['index']}"]
            here = rollout.begin(state.name)[0]
            said = [records._masked(str(each.messages)) for each in (here, live)]    # without the minutes that are left
            assert said[0] == said[1] and here.prompt() == live.prompt()
            assert str(here.data) == head["data"] and head["data_seed"] == 1 + int(file.stem[-1])
            assert here.snapshot() == live.snapshot() and here.m_before == live.m_before
            live.step(step["reply"])
            now = json.loads(json.dumps(vars(here.step(step["reply"]))))
            for name in records.COMPARED:
                assert records._masked(now[name]) == records._masked(step[name]), (state.name, name)
            seen += 1
    assert seen == len(rollout.states) > 20 and len({s.steps[s.index]["m_before"] for s in rollout.states.values()}) > 3


def test_draws_are_balanced_over_tasks_and_weighted_within():
    found = {"one": {"a": "A"}, "two": {"b": "B", "c": "C"}, "many": {str(i): i for i in range(50)}}
    rng = random.Random(0)
    draw = lambda num, chances: pool.sample_states(found, num, rng, chances, lambda state, group: True)
    names = draw(3 * 400, {"b": 3 * pool.BASE_CHANCE})
    count = lambda some: sum(name in some for name in names)
    assert count("a") == count("bc") == 400 and len(set(names)) > 48
    assert 270 < count("b") < 330                               # 3 of 4: 300, and its standard deviation is 8.7
    for k in range(0, 1200, 3):                                 # each task in each turn
        assert len({{"a": 1, "b": 2, "c": 2}.get(name, 3) for name in names[k:k + 3]}) == 3
    assert {draw(4, {})[0] for _ in range(100)} > {"a"}      # whose turn comes first differs
    assert "b" not in draw(300, {"b": 0.0})
    assert set(draw(30, {"b": 0.0, "c": 0.0})) & {"a", "b", "c"} == {"a"}    # no state of a task is left


def test_a_state_that_cannot_be_used_gives_way_to_another_of_its_task():
    found = {"one": {"a": "A", "b": "B"}, "two": {"c": "C"}}
    weights = {}

    def usable(name, group):
        if name == "a":
            weights[name] = 0.0
        return name != "a"
    for seed in range(5):
        weights.clear()
        assert sorted(pool.sample_states(found, 4, random.Random(seed), weights, usable)) == ["b", "b", "c", "c"]
    with pytest.raises(cli.RunError, match="no state of the pool can be played"):
        pool.sample_states({"one": {"a": "A"}}, 1, random.Random(0), weights := {}, usable)


def test_learnable_states_are_those_whose_rewards_varied(made):
    """Two actions in each of two states; in the first one works and one does not, in the second neither does."""
    works = 'Action: Execute Script\nAction Input: {"script_name": "train.py"}'
    engine = Scripted({(0, 0): works, (0, 1): "no action", (1, 0): "no action", (1, 1): "no action"})
    rollout = playing(made, engine, advantage="rloo", states=2)
    samples = rolled_out(rollout)
    assert [one.reward for one in samples] == [0.5, 0.0, 0.0, 0.0]
    assert rollout.chances == {samples[0].state: pytest.approx(0.3 + 2 * 0.25), samples[2].state: 0.3}
    rollout = playing(made, engine, states=2)
    assert rolled_out(rollout) and rollout.chances == {}


def refused(folder, match, **more):
    with pytest.raises(ValueError, match=match):
        pool.load_pool(settings(folder, **more), Tokenizer.of_bytes(), lambda line: None)


def edit_head(path, **more):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | more), *lines[1:]]) + "\n")


def test_what_must_not_be_trained_on_is_refused(made, tmp_path):
    folder = copied(made, tmp_path)
    edit_head(folder / "toy-a-1.jsonl", task="toy-out")
    refused(made, "toy-out is held out", trajectories=str(folder))
    tasks.prepare("toy-out", None, made / "data", log=lambda line: None)
    secret = tasks.info("toy-out", made / "data")["sha256"]["private/test.csv"]
    edit_head(folder / "toy-a-1.jsonl", task="toy-a", data_sha256={"public/train.csv": secret})
    refused(made, "public/train.csv of toy-a is a file of toy-out", trajectories=str(folder))
    edit_head(folder / "toy-a-1.jsonl", data_sha256={"public/train.csv": "0" * 64})
    refused(made, "was collected on other data", trajectories=str(folder))
    refused(made, "there is no state to start from", trajectories=str(tmp_path / "nothing"))
    lines = [json.loads(line) for line in (folder / "toy-b-1.jsonl").read_text().splitlines()]
    (folder / "toy-c-1.jsonl").write_text("".join(json.dumps(
        {name: value for name, value in line.items() if name != "m_before"}) + "\n" for line in lines))
    (folder / "folder.jsonl").mkdir()
    (folder / "toy-a-1.jsonl").write_text("{}\n")
    said = []
    found = pool.load_pool(settings(made, trajectories=str(folder)), Tokenizer.of_bytes(), said.append)
    num = sum(len(records.read_trajectory(folder / f"{name}.jsonl")[1]) for name in ("toy-a-0", "toy-b-0", "toy-b-1"))
    for part in (f"{num} states of 2 tasks; left out: 3, such as", "toy-a-1.jsonl"):
        assert part in said[0]
    assert len(found["toy-a"]) == 6
    (folder / "blobs" / "away").symlink_to(tmp_path)
    refused(made, "is a link that leads out of", trajectories=str(folder))


def test_the_policy_is_the_coder_of_a_pool_that_was_collected_with_one(made, tmp_path):
    """Its states offer the (AI) actions, and one is carried out, in half of the context; where none had a coder they
    are not known."""
    folder = copied(made, tmp_path)
    edit_head(folder / "toy-a-1.jsonl", actions=env.DEFAULT_ACTIONS, fields=miniature.SHORT_FIELDS)
    edit = ('Action: Edit Script (AI)\nAction Input: {"script_name": "train.py", "edit_instruction": "x", '
            '"save_name": "train.py"}')
    engine = Scripted(edit)
    limits = []

    def chat(messages, max_new_tokens, **options):
        limits.append(max_new_tokens)
        return engine.reply("```python\nVALUE = 9\n```")
    engine.chat = chat
    rollout = playing(made, engine, trajectories=str(folder))
    step = rollout.execute_action("toy-a-1, step 0", 0, 0, engine.reply(edit), 0)[0].step
    assert step["valid"] and step["kind"] != "invalid" and step["coder"] and limits == [500]
    step = rollout.execute_action("toy-a-0, step 0", 0, 0, engine.reply(edit), 0)[0].step
    assert not step["valid"] and not step["coder"]


def test_ids_of_another_tokenizer_are_not_used(made, tmp_path):
    """The recorded ids stand in the prompt where the tokenizer is the same, else the text is encoded."""
    folder = copied(made, tmp_path)
    tokenizer = Tokenizer.of_bytes()
    path = folder / "toy-a-0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["messages"][0]["tokens"] = [7, 7, 7]
    for own, kept in ((tokenizer.fingerprint(), True), ("another", False)):
        lines[0]["tokenizer"] = own
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        here, _ = playing(made, trajectories=str(folder)).begin("toy-a-0, step 1")
        assert ([7, 7, 7] in [message.get("tokens") for message in here.messages]) == kept


def test_a_missing_blob_is_named_at_the_start_and_in_the_middle(made, tmp_path):
    folder = copied(made, tmp_path)
    said = []
    rollout = playing(made, trajectories=str(folder), states=8)
    later = max((state for name, state in rollout.states.items() if "toy-b-0" in name), key=lambda one: one.index)
    sha = next(iter(later.snapshot.values()))
    lost = {name for name, state in rollout.states.items() if sha in state.snapshot.values()}
    (folder / "blobs" / sha[:2] / sha).unlink()
    found = pool.load_pool(settings(made, trajectories=str(folder)), Tokenizer.of_bytes(), said.append)
    assert {name for states in found.values() for name in states} == set(rollout.states) - lost
    assert f"left out: {len(lost)}, such as" in said[0] and f"{min(lost)}: the blob {sha} is missing in" in said[0]
    # the rollout that began before ends with the name of the blob
    for play in (lambda name: rollout.begin(name), lambda name: rollout.run([name], 0)):
        with pytest.raises(storage.MissingBlob, match=f"the blob {sha} is missing in"):
            play(min(lost))


def test_a_prompt_that_is_too_long_is_left_out_and_said(made, capsys):
    """The prompt as it is shown, in disguise: here half of those of the first iteration fit."""
    engine = Scripted()
    rollout = playing(made, engine, states=3)
    length = lambda *state: len(rollout.begin(*state)[1]) + 8
    lengths = sorted(length(name, 0, 0) for name in rollout.states)
    engine.context = lengths[len(lengths) // 2]
    for iteration in range(8):
        for group, name in enumerate(rollout.sample_states(iteration)):
            assert length(name, group, iteration) <= engine.context
    left_out = [name for name, chance in rollout.chances.items() if chance == 0]
    assert 0 < len(left_out) == capsys.readouterr().err.count(f"--context is {engine.context}")
    with pytest.raises(cli.RunError, match="no state of the pool"):
        playing(made, Scripted(context=20)).sample_states(0)


# -- states that validate

def twins(made, tmp_path, changed):
    """A pool of two trajectories of toy-a on the same data, of which the second says something else from the step
    `changed` on, and one of toy-b: the folder, and the number of states of each of the two."""
    folder = copied(made, tmp_path)
    for name in ("toy-a-1", "toy-b-1"):
        (folder / f"{name}.jsonl").unlink()
    lines = [json.loads(line) for line in (folder / "toy-a-0.jsonl").read_text().splitlines()]
    for line in lines[1 + changed:]:
        line["messages"][0]["content"] += "!"
        line["news"] += "!"
    (folder / "toy-a-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, sum(line["type"] == "step" for line in lines)


def test_no_state_that_validates_is_also_trained_on(made, tmp_path):
    """Trajectories of a task on the same data begin alike: a state before whose step nothing differs yet is in both."""
    folder, num = twins(made, tmp_path, changed=2)
    rollout = playing(made, trajectories=str(folder), validate_every=1)
    trained = {name for states in rollout.pool.values() for name in states}
    file, = {name.partition(",")[0] for name in rollout.held_back}
    assert file in ("toy-a-0", "toy-a-1") and file not in {name.partition(",")[0] for name in trained}
    assert sorted(rollout.held_back) == [f"{file}, step {i}" for i in range(3, num)] and num == 6
    assert len(trained) == len(rollout.states) - num

    def shown(name):
        state = rollout.states[name]
        said = [message["content"] for line in [state.head, *state.steps[:state.index]] for message in line["messages"]]
        return state.head["task"], state.head["data_seed"], said
    assert not [name for name in rollout.held_back if shown(name) in map(shown, trained)]


def test_where_nothing_can_be_held_back_that_is_said(made, tmp_path):
    """The two trajectories are alike to their last action; or there is one of each task alone."""
    folder, num = twins(made, tmp_path, changed=5)
    for file in ("toy-b-0", "toy-a-1"):
        with pytest.raises(ValueError, match="--validate-every holds back .* and there is none; collect more"):
            playing(made, trajectories=str(folder), validate_every=1)
        (folder / f"{file}.jsonl").unlink()
    assert num == 6 and playing(made, trajectories=str(folder)).held_back == []


def test_states_that_validate_are_played_from_their_step_whatever_is_trained_on(made):
    """Also where whole trajectories are: one action in each, which earns the same."""
    rollout = playing(made, rollout="episode", validate_every=1, steps=3)
    for name in rollout.held_back:
        here, _ = rollout.begin(name)
        assert (here.index, here.steps) == (rollout.states[name].index, 6)
    assert max(rollout.states[name].index for name in rollout.held_back) > 2
    trained = [name for states in rollout.pool.values() for name in states]
    assert {(here.index, here.steps) for here, _ in map(rollout.begin, trained)} == {(0, 3)}
    assert rollout.validate() == playing(made, validate_every=1).validate()


# -- rollouts

def test_ids_and_log_probs_are_those_that_were_sampled(made):
    """Also ids that no encoding of the text would give."""
    engine = Scripted()
    odd = [ord(c) for c in "no action"]         # as bytes, not as the one token that stands for it
    logps = [-0.123456789 * k for k in range(10)]
    reply = endpoint.Completion("no action", [*odd, engine.tokenizer.end], logps, "stop")
    engine.reply = lambda text: reply
    one = rolled_out(playing(made, engine, states=1, samples=1))[0]
    assert one.tokens == reply.tokens and one.logp_sampler == reply.logps and one.prompt == engine.asked[0][0]
    assert one.example == (one.prompt + reply.tokens, [False] * len(one.prompt) + [True] * 10)


def test_training_is_in_disguise_and_validation_is_not(made):
    """All actions of a state see the same prompt, which is another in the next iteration; each is trained on as it was
    sampled. What validates is shown as it is used."""
    engine = Scripted()
    rollout = playing(made, engine, states=3, samples=2, validate_every=1)
    names = rollout.sample_states(0)
    plain = [rollout.begin(name)[1] for name in names]
    seen = []
    for iteration in (1, 2, 1):
        transitions = rollout.run(names, iteration)[0]
        prompts = engine.asked.pop()
        assert [one.prompt for one in transitions] == [prompt for prompt in prompts for _ in range(2)]
        seen.append(prompts)
    assert seen[0] == seen[2]
    assert all(len({*map(tuple, prompts)}) == 3 for prompts in zip(plain, *seen[:2]))
    rollout.validate()
    assert engine.asked.pop() == [rollout.begin(name)[1] for name in rollout.held_back]


def test_ids_of_a_stop_string_are_learned_from_but_not_in_the_next_prompt(made):
    """Of a trajectory whose replies were each ended by an invented observation."""
    engine = Scripted()
    reply = lambda text: endpoint.Completion(text, engine.tokenizer.encode(text + "\nObservation:"), [0.0] * (
        len(engine.tokenizer.encode(text)) + 13), "stop")
    rollout = playing(made, engine, rollout="episode", states=1, samples=1, steps=2, max_new_tokens=200)
    engine.replies = [REPLIES[4]] * 2
    engine.reply = reply
    engine.context = 5000
    for state in rollout.states.values():
        state.head["prompt_format"] = "full"
    one, two = rolled_out(rollout, 0)
    said = engine.tokenizer.decode(two.prompt)
    assert one.tokens == engine.tokenizer.encode(REPLIES[4] + "\nObservation:")
    assert f"{REPLIES[4]}<|im_end|>" in said and "\nObservation:" not in said.split("<|im_start|>assistant")[1]
    assert one.step["messages"][0]["tokens"] == engine.tokenizer.encode(REPLIES[4])


def test_actions_depend_neither_on_batching_nor_on_who_ends_first(made):
    """And all actions of a state share one prefill."""
    seen = []
    for rows, slow in ((1, False), (8, True)):
        engine = engine_of(made, rows)
        rollout = playing(made, engine, states=6, samples=4)
        execute = rollout.execute_action
        if slow:        # the first are carried out last
            rollout.execute_action = lambda *action: (time.sleep(0.1 * (action[1] == 0)), execute(*action))[1]
        samples = rolled_out(rollout, 5)
        seen.append([(one.state, one.group, one.episode_id, one.prompt, one.tokens, one.reward, one.step["snapshot"])
                     for one in samples])
        whole = sum(len(one.prompt) - 1 for one in samples)
        assert engine.prefilled_tokens <= whole / 4
    assert seen[0] == seen[1] and [each[1] for each in seen[0]] == sorted(4 * [*range(6)])
    assert [each[2] for each in seen[0]] == list(range(24)) and len({each[5] for each in seen[0]}) > 1


def test_scripts_run_while_the_engine_samples_on(made):
    engine = Scripted()
    ran = threading.Event()

    def generate(prompts, n, seed, on_completion, **options):
        on_completion(0, 0, engine.reply(REPLIES[4]))
        assert ran.wait(600), "the first action is not carried out while the second is sampled"
        on_completion(0, 1, engine.reply("no action"))
    engine.generate = generate
    rollout = playing(made, engine, states=1)
    execute = rollout.execute_action
    rollout.execute_action = lambda *action: (execute(*action), ran.set())[0]
    assert [one.step["valid"] for one in rolled_out(rollout, 0)] == [True, False]


def test_an_error_of_a_script_worker_reaches_the_caller(made, monkeypatch):
    rollout = playing(made)
    monkeypatch.setattr(env.Env, "step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        rolled_out(rollout, 0)
    rollout.threads.shutdown()      # what still waits would run in the next test
    assert "in the state toy-" in caught.value.__notes__[0]


def test_a_killed_supervisor_costs_one_reward(made, monkeypatch):
    """The script counts as killed, the others are carried out, and the result is not kept."""
    execute = sandbox._run
    first_of_all = threading.Lock()

    def kill(job):
        while not os.path.exists(job["base"]):      # the supervisor has started
            time.sleep(0.01)
        sandbox._kill_marked(job["mark"])

    def fatal(job, *server):
        if first_of_all.acquire(blocking=False):
            with open(os.path.join(job["cwd"], "train.py"), "a") as file:
                file.write("\nimport time\ntime.sleep(600)\n")        # it does not end before
            threading.Thread(target=kill, args=[job]).start()
        return execute(job, *server)
    monkeypatch.setattr(sandbox, "_run", fatal)
    edit = HEADS[0] + '"import fabs\\n", "replace": "import fabs\\nimport time\\n"}'      # which no test has run
    rollout = playing(made, Scripted(edit), states=2, samples=1)
    first, again = ([one.step["outcome"] for one in rolled_out(each)]
                    for each in (rollout, playing(made, Scripted(edit), states=2, samples=1)))
    assert first.count("killed") == 1 and "killed" not in again
    assert all(one in ("killed", other) for one, other in zip(first, again))


def test_episodes_are_whole_trajectories(made):
    """Two trajectories of three steps, played by prepared replies; then returns and advantages by hand."""
    replies = [REPLIES[0], REPLIES[4], "no action"]
    engine = Scripted()
    rollout = playing(made, engine, rollout="episode", states=2, samples=1, steps=3, max_new_tokens=200)

    def submit(prompt, seed, **options):        # which step it is stands in the prompt
        shown = engine.tokenizer.decode(prompt)
        k = 0 if "Last: nothing" in shown else 1 if "after Replace" in shown else 2
        future = rl.ThreadPoolExecutor(1).submit(engine.reply, replies[k])
        return future
    engine.submit = submit
    samples = rolled_out(rollout, 0)
    assert [one.episode_id for one in samples] == [0, 0, 0, 1, 1, 1]
    assert [one.step["index"] for one in samples] == 2 * [0, 1, 2]
    assert {one.state[:5] for one in samples} == {"toy-a", "toy-b"}
    assert [one.reward for one in samples] == pytest.approx([0.98, 0.5, 0] * 2, abs=0.02)
    assert samples[0].step["ended"] == "" and samples[2].step["ended"] == "steps"
    rewards = [one.reward for one in samples[:3]]
    zeros = [torch.zeros(len(one.tokens)) for one in samples]
    token_rewards = rl.token_rewards(samples, zeros, None, 0.0)
    returns = rl.ADVANTAGES["gae"](samples, token_rewards, zeros, 1.0)
    for i in range(3):      # from any token of step i: its reward and those of later steps
        for t in (0, len(zeros[i]) - 1):
            assert returns[i][t].item() == pytest.approx(sum(rewards[i:]), abs=1e-6)


# -- whole runs, each command as from a shell

RUN = """
import json, os, sys
import torch, env, rl, sample, sft, tasks
from pathlib import Path
from support import distributed
WHERE = {"sampling": (sample.Engine, "step"), "executing": (env.Env, "step"), "updating": (torch.optim.AdamW, "step"),
         "saving": (torch, "save"), "saved": (distributed, "sync"), "learning": (rl, "iterate")}

def after(where, n, what):
    owner, name = WHERE[where]
    inner, calls = getattr(owner, name), []

    def counted(*args, **more):
        done = inner(*args, **more)
        calls.append(1)
        if len(calls) == n:
            what(*args)
        return done
    setattr(owner, name, counted)

kill = lambda *args: os.kill(os.getpid(), 9)
tasks.FOLDERS.append(Path(sys.argv[1]))
"""


class Runs:
    """Runs rl.py with the tasks, pool and model of a folder, some code first."""

    def __init__(self, forks, folder):
        self.forks = forks
        self.folder = folder

    def __call__(self, *args, code="", world=1, **flags):
        """(exit status, output) of every process; alone, of the one."""
        flags = {"model": self.folder / "model", "trajectories": self.folder / "pool", "data": self.folder / "data",
                 "task": "toy-a", "states": 3, "samples": 2, "max-new-tokens": 8, "context": 1000, "iterations": 6,
                 "save-every": 2, "lr": 3e-3, "critic-lr": 1e-3, "kl": 0.1, **flags}
        args = [*args, *(word for name, value in flags.items() for word in (cli.flag_of(name), str(value)))]
        self.forks.start(f"{RUN}\n{code}\nrl.run_main(lambda: rl.main(['--preset', '7b', *sys.argv[2:]]))",
                         self.folder / "tasks", *args, world=world)
        found = self.forks.end()
        return found if len(found) > 1 else found[0]


@pytest.fixture(scope="module")
def run(forks, made):
    return Runs(forks, made)


# what depends on the clock, on the memory, or on what an earlier run has put into the cache
FREE = {"runs", "cache_hits", "sample_s", "execute_s", "logprobs_s", "update_s", "seconds", "elapsed_s",
        "sampled_tokens_s", "mfu", "peak_gib"}


def curve(folder):
    """{iteration: figures} of a log; an iteration that was done again counts as it was done last."""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["iteration"]: {name: line[name] for name in line if name not in FREE} for line in lines}


def weights(folder):
    return dict(Qwen2.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize("flags", [(), ("--advantage", "rloo", "--minibatches", "2", "--validate-every", "2")])
def test_a_killed_run_goes_on_bit_for_bit(made, run, flags):
    """kill -9 at a random moment of an update, of writing the second checkpoint, of sampling and of an action; the
    curve and the weights are those of a run that was left alone, and the policy has moved."""
    whole = made / f"whole{len(flags)}"
    torn = made / f"torn{len(flags)}"
    rng = random.Random(len(flags))
    code, said = run(*flags, out=whole, iterations=4)
    assert code == 0, said
    updates = (2, 3) if flags else (5, 8)       # before the second iteration has ended; a critic takes more steps
    for where, least, most in (("updating", *updates), ("saving", 2, 2), ("sampling", 3, 12), ("executing", 1, 9)):
        code, said = run(*flags, out=torn, iterations=4, code=f"after({where!r}, {rng.randint(least, most)}, kill)")
        assert code == -9 and (torn / "checkpoints/step-000002").exists() == (where != "updating"), said
    code, said = run(*flags, out=torn, iterations=4)
    assert code == 0 and "going on after iteration 2" in said, said
    assert curve(torn) == curve(whole) and sorted(curve(whole)) == [1, 2, 3, 4]
    before = weights(made / "model")
    one = weights(whole)
    other = weights(torn)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], before[name]) for name in one)
    gaps = [figures["logp_diff_max"] for figures in curve(whole).values()]
    assert max(gaps) < 1e-4


def test_every_action_is_written_down_and_fixed_states_validate(made, run):
    """samples.jsonl has the log's rewards; states that validate are of trajectories that are never trained on. Of a run
    that ended before its first checkpoint no line stays."""
    out = made / "validated"
    out.mkdir()
    for name in ("log.jsonl", "samples.jsonl"):
        (out / name).write_text('{"iteration": 1, "reward": 9}\n{"iter')
    code, said = run("--advantage", "rloo", out=out, iterations=2, **{"validate-every": 2})
    assert code == 0, said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert ["validation_reward" in figures for figures in log] == [False, True]
    for figures in log:
        lines = [line for line in samples if line["iteration"] == figures["iteration"]]
        assert len(lines) == 6 and sum(line["reward"] for line in lines) / 6 == pytest.approx(figures["reward"])
        assert figures["reward_of_tasks"] == {"toy-a": pytest.approx(figures["reward"])}
        for state in {line["state"] for line in lines}:     # equal rewards teach nothing
            rewards, learned = zip(*((line["reward"], line["advantage"] is not None) for line in lines
                                     if line["state"] == state))
            assert len(set(rewards)) == 1 or all(learned)
    rollout = playing(made, validate_every=1)
    assert rollout.held_back == playing(made, validate_every=1).held_back
    used = {name.partition(",")[0] for states in rollout.pool.values() for name in states}
    assert used and rollout.held_back and not used & {name.partition(",")[0] for name in rollout.held_back}
    assert rollout.validate() == rollout.validate()
    assert playing(made).held_back == []


def test_a_killed_run_of_two_processes_goes_on_bit_for_bit(made, run):
    """Both die while they write the second checkpoint."""
    whole = made / "whole of two"
    torn = made / "torn of two"
    killed = "after('saved', 2, lambda *_: os.killpg(0, 9)) if rank == 1 else None"
    for out, code, expected in ((whole, "", 0), (torn, killed, -9), (torn, "", 0)):
        done = run(out=out, code=code, world=2, iterations=4)
        assert [status for status, _ in done] == [expected] * 2, done
    assert "going on after iteration 2" in done[0][1] and curve(torn) == curve(whole)
    assert (torn / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [path.name for path in sorted((torn / "checkpoints").iterdir())] == ["step-000002", "step-000004"]


def test_two_processes_play_and_learn_as_one(made, run):
    """The same tokens and rewards, as the figures of the log show, whatever the number of processes."""
    found = []
    for world in (1, 2):
        done = run(out=made / f"of{world}", world=world, iterations=2, lr=1e-4)
        assert all(code == 0 for code, _ in (done if world > 1 else [done])), done
        found.append(curve(made / f"of{world}"))
    assert found[0].keys() == found[1].keys() == {1, 2}
    for i in (1, 2):
        for name, value in found[0][i].items():
            other = found[1][i][name]
            assert other == (value if value is None else pytest.approx(value, rel=2e-3, abs=1e-4)), (i, name)
        assert all(found[0][i][name] == found[1][i][name] for name in ("reward", "valid", "action_tokens"))


def test_nan_stops_the_run_and_names_the_place(made, run):
    """A weight of the critic, or of the sampler, becomes NaN after the third iteration; the checkpoint of the second
    is good."""
    sampling = f"{made / 'model'} gives logits that are not finite"
    for weight, words in (("trainer.critic.score.weight", "gradient norm nan"),
                          ("worker.engine.model.model.norm.weight", sampling)):
        out = made / f"nan-{weight}"
        code, said = run(out=out, code=f"after('learning', 3, lambda cfg, worker, trainer, *_: "
                                       f"{weight}.data.fill_(float('nan')))")
        assert code == 1 and f"iteration 4, rank 0: {words}" in said and "Traceback" not in said, said
        assert len(curve(out)) == 3 and not list(out.glob("*.safetensors"))
    code, said = run(out=out, iterations=3)
    assert code == 0 and "going on after iteration 2" in said and len(curve(out)) == 3
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000003"]       # the last iteration is saved, too


def test_equal_rewards_and_invalid_actions_are_logged_and_do_no_harm(made, run):
    """No token is an action when only the end of turn is sampled: all rewards are 0, nothing is divided by 0."""
    for flags in ((), ("--advantage", "rloo")):
        out = made / f"equal{len(flags)}"
        code, said = run(*flags, out=out, iterations=1, kl=0, code="env.Env.step.__globals__['parse'] = "
                         "lambda *a: ({}, None, {}, 'It cannot be read.')")
        assert code == 0, said
        for figures in curve(out).values():
            assert figures["reward"] == figures["valid"] == 0
            assert figures["share_invalid"] == figures["zero_variance_groups"] == 1
            assert figures["reward_edits"] is None and figures["policy_loss"] == 0
        one = weights(out)
        before = weights(made / "model")
        assert all(torch.equal(one[name], before[name]) for name in one)


def test_ctrl_c_is_said_and_the_run_goes_on(made, run):
    out = made / "interrupted"
    code, said = run(out=out, iterations=4, code="after('updating', 9, lambda *_: os.kill(os.getpid(), 2))")
    assert code == 1 and "rl.py: interrupted" in said and "the same command goes on" in said and "Traceback" not in said
    code, said = run(out=out, iterations=4)
    assert code == 0 and "going on after iteration" in said and len(curve(out)) == 4


def test_two_runs_in_one_folder_are_refused(made, run):
    with files.folder_lock(made / "held", "rl.py"):
        code, said = run(out=made / "held")
        assert code == 2 and "another rl.py writes to" in said
        done = run(out=made / "held", world=2)
        assert [code for code, _ in done] == [2, 2] and all("another rl.py writes to" in said for _, said in done)


def test_a_run_goes_on_with_what_it_began_with(made, run, tmp_path):
    """Other settings, another kind of device, another model in the same folder and another pool are refused; more
    iterations are not. A copy of the model is the same."""
    out = tmp_path / "out"
    model = tmp_path / "model"
    folder = copied(made, tmp_path)
    shutil.copytree(made / "model", model)
    given = {"out": out, "model": model, "trajectories": folder, "iterations": 1, "save-every": 1}
    assert run(**given)[0] == 0

    def refused(words, *flags, **more):
        code, said = run(*flags, **{**given, "iterations": 2, **more})
        assert code == 2 and re.search(rf"is of a run with {words}; give these again", said), said
    refused(r"--kl 0.1 \(now 0.5\)", kl=0.5)
    lines = (folder / "toy-a-0.jsonl").read_text().splitlines(keepends=True)
    (folder / "toy-a-0.jsonl").write_text("".join(lines[:-1]))
    refused(r"states of sha256 (\w{16}) \(now (?!\1)\w{16}\)")
    (folder / "toy-a-0.jsonl").write_text("".join(lines))
    saved = out / "checkpoints/step-000001/rank-0.pt"
    state = torch.load(saved)
    assert state["origin"]["products in"] == "float32 on cpu"
    state["origin"]["products in"] = "float32 on cuda"
    shutil.copy(saved, tmp_path / "saved")
    torch.save(state, saved)
    refused(r"products in float32 on cuda \(now float32 on cpu\)")
    shutil.copy(tmp_path / "saved", saved)
    Qwen2.from_scratch(SHAPE, seed=9).save_pretrained(model)
    refused(r"--model of sha256 (\w{16}) \(now (?!\1)\w{16}\)")
    code, said = run(**{**given, "model": made / "model", "iterations": 2})
    assert code == 0 and "going on after iteration 1" in said, said


def test_a_worker_that_raises_ends_the_run_and_the_same_command_goes_on(made, run):
    out = made / "raised"
    code, said = run(out=out, code="after('executing', 15, lambda *_: 1 / 0)")
    assert code == 1 and "ZeroDivisionError" in said and "It happened in the state toy-a-" in said, said
    for name, num in (("log.jsonl", 2), ("samples.jsonl", 12)):
        with (out / name).open("a") as file:
            file.write('{"iteration": 3, "rew')     # cut short by a kill
        assert len((out / name).read_text().splitlines()) == num + 1
    code, said = run(out=out, iterations=3)
    assert code == 0 and "going on after iteration 2" in said
    for name, num in (("log.jsonl", 1), ("samples.jsonl", 6)):
        lines = [json.loads(line)["iteration"] for line in (out / name).read_text().splitlines()]
        assert lines == [1] * num + [2] * num + [3] * num


def test_a_killed_process_ends_the_others_with_a_message(made, run):
    out = made / "bereft"
    (zero, said), (one, _) = run(out=out, world=2, code="after('learning', 2, kill) if rank == 1 else None")
    assert (zero, one) == (1, -9) and "another process of this run has ended" in said and "Traceback" not in said, said


def test_the_policy_is_kept_between_iterations(made, run):
    """Before the first and after every second, also where a run goes on under another --export-every, and none of an
    iteration that comes anew or of a run that left no checkpoint; the last is the model that is trained."""
    out = made / "exported"
    begun = {"iterations": 2, "export-every": 1}
    goes_on = {"iterations": 5, "export-every": 2}
    for flags, stale in ((begun, "000005"), (goes_on, "000003")):
        (out / "exports" / stale).mkdir(parents=True)
        code, said = run("--advantage", "rloo", "--minibatches", "2", out=out, **flags)
        assert code == 0, said
    folders = sorted((out / "exports").iterdir())
    assert [folder.name for folder in folders] == ["000000", "000001", "000002", "000004"]
    first, *others = map(weights, [made / "model", folders[0], folders[1], folders[2], folders[3], out])
    same = [all(torch.equal(first[name], other[name]) for name in first) for other in others]
    assert same == [True, False, False, False, False]
    log = curve(out)
    assert [log[i]["updates"] for i in (1, 2, 3, 4, 5)] == [2, 4, 6, 8, 10]
    for figures in log.values():
        assert figures["sampled_tokens"] == pytest.approx(figures["action_tokens"] * 6)
    code, said = run("--advantage", "rloo", out=made / "of two", world=2, iterations=1, **{"export-every": 1})[0]
    assert code == 0 and (made / "of two/exports/000001/model.safetensors").is_file(), said
    assert curve(made / "of two")[1]["sampled_tokens"] == log[1]["sampled_tokens"]     # of both processes


def test_episodes_run_through_the_same_log(made, run):
    code, said = run(out=made / "episodes", rollout="episode", states=2, samples=1, steps=3, iterations=2)
    figures = curve(made / "episodes")
    assert code == 0 and figures[1].keys() == figures[2].keys() >= {"reward", "explained_variance", "entropy"}, said


def test_without_a_fine_tuned_model_it_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        rl.main([])
    assert end.value.code == 2
    assert "there is no runs/sft to go on from; make it with: python sft.py" in capsys.readouterr().err


def test_the_plan_by_hand(capsys):
    """Qwen2.5-7B on 8 GPUs: 7,615,616,512 weights in fp32 for actor, critic and reference, two gradients and two
    optimizer states, a bf16 copy, and 57,344 bytes of keys and values a token. Where products are in fp32, so are the
    copy, the keys and the values."""
    total = 7_615_616_512
    gib = 2**30
    plan = ["--plan", "--preset", "7b", "--model", "7b", "--context", "16384"]
    assert rl.main([*plan, "--gpus", "8", "--max-batch", "32"]) == 0
    said = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[3:] if line[:2] == "  ")
    assert float(said["  actor"]) == float(said["  critic"]) == pytest.approx(16 * total / 8 / gib, abs=0.01)
    assert float(said["  reference"]) == pytest.approx(4 * total / 8 / gib, abs=0.01)
    assert float(said["  sampling copy"]) == pytest.approx(2 * total / gib, abs=0.01)
    assert float(said["  KV cache"]) == pytest.approx(32 * 16384 * 57_344 / gib, abs=0.01)
    assert float(said["  total"]) == pytest.approx(sum(map(float, said.values())) / 2, abs=0.05)
    for dtype, copy in (("auto", 2 * total), ("float32", 4 * total)):
        rl.main([*plan, "--gpus", "1", "--advantage", "rloo", "--kl", "0", "--max-batch", "1", "--dtype", dtype])
        said = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[3:] if line[:2] == "  ")
        assert "  critic" not in said and "  reference" not in said
        assert float(said["  sampling copy"]) == pytest.approx(copy / gib, abs=0.01)
        assert float(said["  KV cache"]) == pytest.approx(copy / total / 2 * 16384 * 57_344 / gib, abs=0.01)
