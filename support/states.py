"""The reward of single actions in fixed recorded states: cheaper than whole trajectories and of less variance, and what
step-wise RL optimises.

    python eval.py --record-states 4 --states held-out.jsonl --task held-out --prompt-format medium ...   # once
    python eval.py --states held-out.jsonl --max-new-tokens 160 --model runs/rl --out runs/eval/rl/held-out # each model

States are of the scripted expert on miniatures of STATES_SEED, on which nothing is trained, or of held-out tasks' real
data. A line of a file of states holds all that it takes to restore one.
"""
import json, random, shutil, threading, zlib
from functools import partial
from pathlib import Path
from statistics import fmean

import pandas

import tasks
from env import NOTHING
from support import miniature, tables
from support.cli import ContextFull, RunError, announce
from support.distributed import check_same
from support.files import (
    COUNT, FLAG, TEXT, folder_lock, hash_json, parse_json, read_bytes, read_json_lines, write_atomic)
from support.ideas import choose_ideas
from support.parallel import Progress, run_parallel
from support.play import (
    LEARNED_SEEDS, make_env, model_policy, play_trajectory, prepare_task, prepare_tasks)
from support.pretrained import hash_checkpoint
from support.records import AGENT, FINITE, FORMS, MESSAGE, TASK_ID, read_record, state_after, trajectory_path
from support.sandbox import SLOTS
from support.scripts import untried
from support.storage import UNDO, Blobs, ResultCache
from support.workspace import script_text

STATES_SEED = 4         # of the miniatures; training has LEARNED_SEEDS, and whole trajectories are played on 0
RECORDED = 2            # trajectories of a task that its states are drawn from
STATES_HASH = "states of sha256"
ROWS = 16               # actions that are sampled at the same time
STATE = {
    "task": TASK_ID, "data_seed": COUNT, "data_sha256": {str: TEXT}, "index": COUNT, "m_before": FINITE,
    "m_top": FINITE, "messages": [MESSAGE], "files": {str: TEXT},
    "agent": {name: FORMS["header"][name] for name in AGENT}, "seen": {name: FORMS["header"][name] for name in NOTHING}}
RESULTS = {"settings": {}, "complete": FLAG, "tasks": {}}      # of our own files


# -- A file of states

def record_states(cfg):
    """Plays the scripted expert on the tasks of cfg.task and writes cfg.record_states states of each to cfg.states.
    ValueError: that file is there, or training learns from a task's data."""
    if Path(cfg.states).exists():
        raise ValueError(f"{cfg.states} is there already; states are recorded once")
    with folder_lock(cfg.out, "eval.py"):
        # 1. Trajectories of the expert. After a run that was broken off they begin anew, with its results of scripts.
        infos = prepare_tasks(cfg, (STATES_SEED,))
        for task, info in infos:
            refuse_learned(task, info)
        folder = Path(cfg.out, "expert")        # in no evaluation's way
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        jobs = [(task, k, trajectory_path(folder, task.id, k), info.get("seed", 0))
                for task, info in infos for k in range(RECORDED)]
        progress = Progress({path: [] for _, _, path, _ in jobs}, cfg.steps)
        play = partial(play_expert, cfg, ResultCache(Path(cfg.out, "cache")), progress)
        run_parallel(jobs, play, SLOTS.cpus, progress)

        # 2. States in them.
        lines = []
        for task, info in infos:
            prefixes = []
            for k in range(RECORDED):
                records = read_record(trajectory_path(folder, task.id, k))
                prefixes += [(records, index) for index in range(2 if k else 0, len(records) - 1)]  # all begin alike
            rng = random.Random(f"{cfg.seed} {task.id} states")
            for records, index in rng.sample(prefixes, min(cfg.record_states, len(prefixes))):
                lines.append(describe_state(cfg, task, info, records[0], records[1:index + 1]))
    write_atomic(Path(cfg.states), "".join(json.dumps(line) + "\n" for line in lines).encode())
    announce(f"Written to {cfg.states}: {len(lines)} states of {len(infos)} tasks")


def play_expert(cfg, cache, progress, task, k, path, seed):
    rng = random.Random(f"{cfg.seed} {task.id} {k} states")
    ideas = choose_ideas(cfg, task, None) if tasks.ideas(task.id) else []
    ideas = rng.sample(ideas, min(3, len(ideas)))
    policy = miniature.scripted_policy(cfg, task, ideas, rng)
    play_trajectory(cfg, task, k, path, policy, None, cfg.out, cache, progress, {}, seed)


def refuse_learned(task, info):
    """Raises ValueError where training learns from the data of a task."""
    if task.split == "held-in" and (not info["miniature"] or info.get("seed", 0) in LEARNED_SEEDS):
        raise ValueError(f"the data of {task.id} are real, or of a seed that is trained on; give another --data, for "
                         f"miniatures of seed {STATES_SEED}")


def describe_state(cfg, task, info, head, steps):
    """Returns the line of the state after the recorded `steps`, without files that scripts wrote: the entry script,
    which is what an action changes, starts without them."""
    last = [head, *steps][-1]
    blobs = Blobs(Path(cfg.out, "blobs"))
    files = {path: blobs.path(sha).read_text() for path, sha in last["snapshot"].items()
             if path == task.entry or path.startswith(UNDO) and path.endswith(f"/{task.entry}")}
    return {"task": task.id, "data_seed": head["data_seed"], "data_sha256": info["sha256"],
            **state_after(task, head, steps), "files": files,
            "agent": {name: head[name] for name in AGENT}, "seen": {name: last[name] for name in NOTHING}}


def read_states(cfg):
    """Returns [(number, state)] of the tasks of cfg.task in cfg.states. ValueError: it is no such file."""
    names = tasks.names(cfg.task)
    states = [(i, state) for i, state in enumerate(read_json_lines(cfg.states, STATE)) if state["task"] in names]
    if not states:
        raise ValueError(f"there is no state of --task {cfg.task} in {cfg.states}; record some with --record-states 4")
    return states


# -- Actions in them

def measure_states(cfg, load):
    """Samples cfg.samples actions in each state of cfg.states, as far as they are not in actions.jsonl of cfg.out, and
    returns what states.json there then holds. load: as eval.load_models. ValueError: other settings or another model
    were measured there."""
    with folder_lock(cfg.out, "eval.py"):
        # 1. What is measured, and what of it is done.
        states = read_states(cfg)
        identity = {name: getattr(cfg, name) for name in ("task", "model", "samples", "temperature", "seed", "dtype",
                                                          "max_new_tokens", "sandbox", "python", "gpu",
                                                          "threads")}
        identity[STATES_HASH] = hash_json([state for _, state in states])[:16]
        if Path(cfg.model).is_dir():
            identity["--model of sha256"] = hash_checkpoint(cfg.model)
        prepare_data(cfg, states)
        path = Path(cfg.out, "states.json")
        if raw := read_bytes(path):
            check_same(parse_json(raw, RESULTS, path)["settings"], identity, cfg.out)
        write_atomic(path, {"settings": identity, "complete": False, "tasks": {}})
        actions_file = Path(cfg.out, "actions.jsonl")
        actions = read_json_lines(actions_file, {}, mend=True)

        # 2. The actions that are lacking; those of a state follow each other and share its prefix.
        done = {(line["state"], line["number"]) for line in actions}
        jobs = [(i, state, number) for i, state in states for number in range(cfg.samples)]
        jobs = [job for job in jobs if (job[0], job[2]) not in done]
        if jobs and cfg.model == tables.RANDOM:
            policy = random_edit
        elif jobs:
            model, _ = load(cfg, min(ROWS, len(jobs)))
            policy = model_policy(cfg, model)
        cache = ResultCache(Path(cfg.out, "cache"))
        lock = threading.Lock()
        file = actions_file.open("a")

        def act(i, state, number):
            line = take_action(cfg, cache, policy, i, state, number)
            with lock:
                file.write(json.dumps(line) + "\n")
                file.flush()
                actions.append(line)
                announce(f"{len(actions)} of {len(states) * cfg.samples} actions, mean reward "
                         f"{fmean(action['reward'] for action in actions):.3f}")
        run_parallel(jobs, act, ROWS, file)     # which closes it at the end, and after an error before it is raised

        # 3. Their means.
        results = {"settings": identity, "complete": True, "tasks": summarize_actions(states, actions)}
        write_atomic(path, results)
        return results


def prepare_data(cfg, states):
    """Prepares the data of all states. ValueError: one was recorded on other data, or training learns from them."""
    shas = {(state["task"], state["data_seed"]): state["data_sha256"] for _, state in states}
    for (id, seed), sha256 in sorted(shas.items()):
        task, info = prepare_task(cfg, id, "", seed)
        refuse_learned(task, info)
        if info["sha256"] != sha256:
            raise ValueError(f"the states of {id} in {cfg.states} were recorded on other data than --data {cfg.data} "
                             "has")


def take_action(cfg, cache, policy, i, state, number):
    env = make_env(cfg, state["task"], cfg.out, cache, state["data_seed"], **state["agent"])
    files = {path: env.blobs.put(text.encode()) for path, text in state["files"].items()}
    env.restore(files, state["messages"], index=state["index"], m_before=state["m_before"], m_top=state["m_top"],
                seen=state["seen"])
    try:
        text, tokens, _ = policy(env, None, zlib.crc32(f"{cfg.seed} {i} {number} states".encode()))
    except ContextFull as error:
        raise RunError(f"state {i} of {cfg.states}: {error}; give a larger --context") from None
    step = env.step(text, tokens=tokens)
    is_edit = step.outcome is not None and step.action != "Execute Script"
    return {"state": i, "number": number, "action": step.action, "kind": step.kind, "valid": step.valid,
            "ran": is_edit and step.kind == "scored", "reward": step.reward, "reply": step.reply}


def random_edit(env, lines, seed):
    """The policy without a model: a random change of a constant."""
    action, args = miniature.RUN
    offered = untried(script_text(env.blobs, env.files[env.task.entry]), env.seen["tried"])
    if offered:
        action, args = miniature.set_action(random.Random(seed).choice(offered))
    return miniature.reply_of(env, miniature.START, "try it", action, args), None, {}


def summarize_actions(states, actions):
    """Returns {task: means}. spread: the standard deviation of the rewards in a state."""
    task_of = {i: state["task"] for i, state in states}
    table = pandas.DataFrame(actions)
    found = {}
    for id, own in table.groupby(table["state"].map(task_of)):
        rewards = own["reward"]
        found[id] = {"split": tasks.load(id).split, "states": own["state"].nunique(), "actions": len(own),
                     "reward": rewards.mean(), "spread": rewards.groupby(own["state"]).std(ddof=0).mean(),
                     "valid": own["valid"].mean(), "ran": own["ran"].mean(),
                     "reward_ran": rewards[own["ran"]].mean() if own["ran"].any() else None}
    return found


def format_states(results):
    """Returns the table of states.json, with means over the tasks of each split, and what to compare them with."""
    table = pandas.DataFrame.from_dict(results["tasks"], orient="index").astype({"reward_ran": float})
    means = table.groupby("split").mean()
    means.index = [f"mean, {split}" for split in means.index]
    text = pandas.concat([table, means]).to_string(float_format="{:.3f}".format, na_rep="-")
    return (f"{text}\n\nA valid action that changes nothing earns 0.5; measure --model {tables.RANDOM} for what chance "
            "earns.")
