"""The pool of states that rl.py plays in: every prefix of every recorded trajectory."""
import random
from dataclasses import dataclass
from pathlib import Path

import tasks
from env import NOTHING
from support.cli import RunError
from support.conversations import InvalidConversation, read_learnable
from support.files import hash_json, refuse_links_out
from support.pretrained import hash_checkpoint
from support.records import steps_of
from support.storage import Blobs, MissingBlob, check_state


BASE_CHANCE = 0.3   # of a state that was not sampled yet, or whose actions all earned the same: a policy that is not
                    # shown a state for an iteration may lose it there, such as a first reply. rl.py adds up to 1 to it
VALIDATION_STATES = 16      # that --validate-every looks at


@dataclass(frozen=True)
class State:
    """The state before step `index` of a recorded trajectory."""
    file: Path
    head: dict      # the file's header
    steps: list     # its step records
    index: int

    @property
    def name(self):
        return f"{self.file.stem}, step {self.index}"

    @property
    def contents(self):
        """The hash of all that the policy can see there: the messages, or what a shorter prompt is made from."""
        lines = [self.head, *self.steps[:self.index]]
        seen = [line["messages"] for line in lines]
        if self.head["prompt_format"] != "full":
            seen = [self.head["steps"] - self.index, *(lines[-1][name] for name in NOTHING)]
        return hash_json([self.head["data_seed"], self.snapshot, seen])

    @property
    def snapshot(self):
        return (self.steps[self.index - 1] if self.index else self.head)["snapshot"]


def load_pool(cfg, tokenizer, log=print):
    """Returns {task id: {name: State}}: every prefix of every trajectory in cfg.trajectories, of the tasks of cfg.task.
    What is damaged is left out and reported by `log`. ValueError: a held-out task, other data, or no state."""
    refuse_links_out(cfg.trajectories)      # results of scripts are added there
    forbidden = tasks.held_out_hashes(cfg.data)
    tokenizer_id = tokenizer.fingerprint()
    blobs = Blobs(Path(cfg.trajectories, "blobs"))

    pool = {}
    left_out = []       # a line for each state or file
    for file in sorted(Path(cfg.trajectories).glob("*.jsonl")):
        try:
            head, *lines = read_learnable(file, forbidden, tokenizer_id)
        except InvalidConversation as error:
            left_out.append(f"{file}: {error}")
            continue
        steps = steps_of(lines)
        task = head["task"]
        if task not in tasks.names(cfg.task):
            continue
        data = tasks.seeded(cfg.data, head["data_seed"])
        data_sha256 = tasks.info(task, data)["sha256"]
        tasks.refuse_held_out(task, data_sha256, forbidden)
        if head.get("data_sha256", data_sha256) != data_sha256:
            raise ValueError(f"{file} was collected on other data than {Path(data, task)} holds; prepare those "
                             "again, or collect anew")
        for index in range(len(steps)):
            state = State(file, head, steps, index)
            try:
                check_state(state.snapshot, blobs)
                pool.setdefault(task, {})[state.name] = state
            except MissingBlob as error:
                left_out.append(f"{state.name}: {error}")
    summary = f"{cfg.trajectories}: {sum(map(len, pool.values()))} states of {len(pool)} tasks"
    if left_out:
        summary = "\n  ".join([f"{summary}; left out: {len(left_out)}, such as", *left_out[:5]])
    if not pool:
        raise ValueError("there is no state to start from; collect trajectories with: python sft.py --collect "
                         f"--trajectories {cfg.trajectories}. {summary}")
    log(summary)
    return pool


def hold_back(pool):
    """Returns the pool without a trajectory of each task, and the names of some of their states."""
    rng = random.Random("validation")
    names = []
    for task, states in sorted(pool.items()):
        files = sorted({state.file for state in states.values()})
        if len(files) > 1:
            file = rng.choice(files)
            trained = {name: state for name, state in states.items() if state.file != file}
            seen = {state.contents for state in trained.values()}       # trajectories of a task begin alike
            names += [name for name, state in states.items() if state.file == file and state.contents not in seen]
            pool = {**pool, task: trained}
    if not names:
        raise ValueError("--validate-every holds back a trajectory of each task that has two, and there is none; "
                         "collect more, or leave it out")
    return pool, rng.sample(names, min(VALIDATION_STATES, len(names)))


def sample_states(pool, num, rng, chances, fits):
    """Returns the names of `num` States: the tasks in turn, in random order, and of each a state drawn by its chance.
    chances: {name: relative chance}, BASE_CHANCE where there is none. fits(name, its place in the list) returns False
    where it sets the chance to 0. RunError: no state has a chance any more."""
    names = []
    turn = []
    while len(names) < num:
        live = [task for task in sorted(pool) if any(chances.get(name, BASE_CHANCE) for name in pool[task])]
        if not live:
            raise RunError("no state of the pool can be played any more; the reasons stand above")
        turn = [task for task in turn if task in live] or rng.sample(live, len(live))
        states = list(pool[turn[-1]])
        name = rng.choices(states, [chances.get(name, BASE_CHANCE) for name in states])[0]
        if fits(name, len(names)):
            names.append(name)
            turn.pop()
    return names


def hash_inputs(cfg, folder, pool):
    """Returns {description: sha256} of what must be the same when a run is continued: the model in `folder`, which the
    reference is made from, the states, and the data that give the rewards."""
    states = {state.name: state for states in pool.values() for state in states.values()}
    records = {state.file.stem: [state.head, state.steps] for state in states.values()}
    data = {}
    for id, seed in sorted({(state.head["task"], state.head["data_seed"]) for state in states.values()}):
        info = tasks.info(id, tasks.seeded(cfg.data, seed))
        data[f"{id}, seed {seed}"] = [info[name] for name in ("sha256", "m_init", "m_best")]
    return {"--model of sha256": hash_checkpoint(folder), "data of sha256": hash_json(data)[:16],
            "states of sha256": hash_json([list(states), records])[:16]}
