"""Step-wise PPO: a state comes from the pool of expert trajectories, the policy takes one action, and is rewarded.

    python rl.py                                        # goes on from runs/sft, on miniatures, on a laptop's CPU
    torchrun --nproc_per_node 8 rl.py --preset 7b       # the same on eight GPUs
    python rl.py --rollout episode --advantage gae --choose uniform     # whole trajectories instead, for comparison

The method is that of ML-Agent (arXiv 2505.23723): sampling whole trajectories is slow, since each step runs a training
script, and most of what they meet repeats. So the states are recorded ones, and only the action is new. An iteration:

1. Draw --states recorded states, tasks in turn (draw).
2. Sample --num actions for each. While the engine samples on, each action is carried out in a restored workspace, its
   script is run and graded, and reward.py makes of all that one number R (start, finish).
3. Log-probs of the actor and of the reference, the model this run began with, and the critic's values. The reward of a
   token is -kl * (logp_old - logp_ref), and R more at the action's last token (arXiv 1909.08593, equation 2).
4. Advantages by GAE (arXiv 1506.02438, equation 16), whitened over all tokens of all processes; or the mean of the
   state's other actions as baseline (--advantage group, without a critic).
5. Updates by the clipped objective of PPO (arXiv 1707.06347, equation 7), in fp32 master weights.

--out receives the actor as a Hugging Face folder, checkpoints, and log.jsonl, a line an iteration. A killed run goes
on exactly with the same command. Exit status: 0 done, 1 failed, 2 bad arguments.
"""
import contextlib, json, math, random, statistics, sys, time, zlib
from collections import Counter
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor

import sample
import tasks
from env import (
    CODER_TOKENS, CODE_END, NEEDS_CODER, Blobs, Env, MissingBlob, ResultCache, best_before, prepare_tasks,
    read_agent, read_trajectory)
from model import IGNORE, Config, Linear, Qwen2, find_folder, hash_checkpoint, use_kernels
from reward import KINDS
from support import cli
from support.cli import RunError, exit_status, run_main
from support.distributed import (
    build_model, collate_packed, compute_type, epoch_order, explain_dist_errors, export_model, flops_of,
    full_tensor, gib, init_distributed, load_state, num_weights, peak_flops, plan_memory, peak_memory, rank0_broadcast,
    save_state, shape_of, shard_across_ranks, sharded_parameters)
from support.files import fingerprint, folder_lock, hash_json, refuse_links_out, shorten, write_atomic
from support.sandbox import SLOTS, protection


SMALL = 50e6    # weights; for a model of fewer the recipe is tiny, else 7b
RECIPES = {     # --preset: what differs from the defaults, which are for 7B
    "tiny": dict(advantage="group", choose="learnable", iterations=16, num=8, epochs=2, minibatches=4, lr=2e-4,
                 kl=0.05, length=1024, recompute=False),
    "7b": dict(critic="shared", rows=16),       # of 80 GB each: --plan
}


@dataclass
class Settings:
    preset: str = ""  # settings for a size of model, which flags override: tiny (what sft.py makes) or 7b; empty: by
        # the number of weights
    model: str = "runs/sft"  # what is trained: a folder or a hub id; the reference and the critic begin as it too
    trajectories: str = "runs/trajectories"  # the pool of states; what new scripts give is added to its blobs and cache
    out: str = "runs/rl"  # the actor as a Hugging Face folder, log.jsonl and checkpoints; a run there is continued
    task: str = "held-in"  # a task's id, or held-in for all that may be trained on
    rollout: str = "step"  # step: one action in a recorded state; episode: whole trajectories from the start
    iterations: int = 40  # rollouts, each followed by --epochs passes of updates
    states: int = 32  # drawn in an iteration, over all processes; with --rollout episode: trajectories
    num: int = 4  # actions sampled in each state
    choose: str = "uniform"  # states of a task: uniform, or learnable (rather those whose actions' rewards differed)
    steps: int = 15  # replies of a trajectory, with --rollout episode
    skip_equal: bool = True  # with --advantage group: leave out of the update states whose actions all earned the same,
        # and with them what --kl would do there
    advantage: str = "gae"  # gae: against the critic's values; group: against the mean of the state's actions
    critic: str = "own"  # own: a second backbone; shared: a second head on the actor's
    epochs: int = 1  # passes over an iteration's actions
    minibatches: int = 1  # optimizer steps of a pass
    value_steps: int = 4  # steps of the critic alone before the first update: its head begins at zero
    lr: float = 1e-6  # of the actor
    critic_lr: float = 1e-5  # of the critic
    value_weight: float = 0.1  # of the value loss, where the critic shares the actor's backbone
    clip: float = 1.0  # largest norm of a step's gradient, actor and critic apart
    clip_low: float = 0.2  # the ratio of new to old probability counts from 1 - this ...
    clip_high: float = 0.2  # ... to 1 + this
    dual_clip: float = 3.0  # a bad action's loss counts up to this ratio (arXiv 1912.09729)
    value_clip: float = 0.2  # a value may move this far from the old one within an iteration; times --steps with
        # --rollout episode, whose returns are sums over as many rewards
    kl: float = 1e-3  # weight of the divergence from the reference, in the reward
    gamma: float = 1.0  # discount of a token
    lam: float = 1.0  # lambda of GAE
    truncate: float = 2.0  # cap of the weight trainer / sampler probability of a token (arXiv 2510.26788); 0: no weight
    overlap: bool = False  # sample the next iteration while the last scripts of this one run: one update behind
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    max_new_tokens: int = 1024  # of an action
    context: int = 16384  # tokens of prompt and action; states that do not fit are left out
    rows: int = 64  # actions sampled at the same time, on each process
    length: int = 16384  # tokens of a packed row in training, if no single text has more
    recompute: bool = True  # compute a block's activations again in backward: a third more time, far less memory
    dtype: str = "auto"  # of products and activations, as in sft.py; weights are kept and updated in float32
    kernels: str = "torch"  # torch, or triton, on CUDA, which has not been measured on a GPU yet
    coder: str = "auto"  # who carries out the (AI) actions: none, model (the policy), another, as in --model, or auto:
        # the policy if the pool's expert had a coder, else none. It samples with seed 0 at temperature 1, so that the
        # same request has the same answer. The key of a server is read from OPENAI_API_KEY_CODER, or else
        # OPENAI_API_KEY
    data: str = "data"  # where prepared tasks are kept
    raw: str = ""  # folder of the publisher's files, as in eval.py
    python: str = sys.executable  # the interpreter that runs the tasks' scripts
    gpu: str = ""  # CUDA_VISIBLE_DEVICES of the scripts; empty hides all GPUs from them
    threads: int = 1  # that a script may use for numerics
    sandbox: str = "on"  # on, or off: scripts can then read the answers and all your files
    save_every: int = 10  # iterations between checkpoints
    show_every: int = 10  # iterations between whole samples that are printed
    seed: int = 0  # of the states drawn and of sampling
    plan: bool = False  # print memory per GPU by part for these settings, and end; --model may then be a size: 7b
    gpus: int = 8  # that --plan plans for; torchrun --nproc_per_node decides how many there really are

    def __post_init__(self):
        choices = {"rollout": ("step", "episode"), "advantage": ("gae", "group"), "critic": ("own", "shared"),
                   "choose": ("uniform", "learnable"), "sandbox": ("on", "off")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} must be {' or '.join(allowed)}, found {getattr(self, name)!r}")
        positive = ("iterations", "states", "num", "steps", "epochs", "minibatches", "rows", "max_new_tokens", "length",
                    "threads", "temperature", "clip", "value_clip", "save_every", "show_every")
        bounds = {**dict.fromkeys(positive, (1e-9, math.inf)), "dual_clip": (1 + self.clip_high, math.inf),
                  **dict.fromkeys(("value_steps", "lr", "critic_lr", "value_weight", "clip_high", "kl", "truncate"),
                                  (0, math.inf)),
                  **dict.fromkeys(("clip_low", "gamma", "lam"), (0, 1)), "context": (self.max_new_tokens + 1, math.inf)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                right = "above 0" if low == 1e-9 else f"{low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
                raise ValueError(f"--{name.replace('_', '-')} must be {right}, found {getattr(self, name)}")
        if sample.is_server(self.coder):
            sample.address(self.coder)
        compute_type(self.dtype, torch.device("cpu"))
        if self.minibatches > self.states:
            raise ValueError(f"--minibatches {self.minibatches} are more than --states {self.states}; some would be "
                             "empty")
        if self.advantage == "group" and (self.rollout == "episode" or self.num < 2):
            raise ValueError("--advantage group compares actions of one state: it needs --rollout step and --num of at "
                             f"least 2, found {self.rollout} and {self.num}")
        if self.rollout == "episode" and self.overlap:
            raise ValueError("--overlap is for --rollout step; episodes run and sample at the same time anyway")
        if self.choose == "learnable" and (self.rollout == "episode" or self.num < 2):
            raise ValueError("--choose learnable compares actions of one state: it needs --rollout step and --num of "
                             f"at least 2, found {self.rollout} and {self.num}")
        if self.overlap and self.coder == "model":
            raise ValueError("--overlap lets scripts run while the policy is updated, so the policy cannot be their "
                             "--coder; expected none, or another model")


FREE = {"preset", "model", "trajectories", "out", "iterations", "rows", "data", "raw", "python", "gpu", "save_every",
        "show_every", "plan", "gpus"}       # settings that a run which goes on may have other than it began


# ---------------------------------------------------------------------------------------------------------------------
# The pool of states

@dataclass(frozen=True)
class State:
    """The state before step `index` of a recorded trajectory."""
    file: Path
    head: dict      # the file's header
    steps: list     # its step records
    index: int

    @property
    def name(self):
        """What it is called in checkpoints and messages; the same whatever else is in the pool."""
        return f"{self.file.stem}, step {self.index}"

    @property
    def snapshot(self):
        return (self.steps[self.index - 1] if self.index else self.head)["snapshot"]

    @property
    def messages(self):
        return [*self.head["messages"], *(each for step in self.steps[:self.index] for each in step["messages"])]

    @property
    def m_before(self):
        return self.steps[self.index]["m_before"]

    @property
    def m_top(self):
        return best_before(tasks.load(self.head["task"]), self.head, self.steps[:self.index])


def pool(s, tokenizer, say=print):
    """{task id: {name: State}}: every prefix of every trajectory in the folder s.trajectories, of the tasks of s.task.

    States whose files are gone, and files that are no trajectory, are left out, named and counted. ValueError: a
    held-out task, other data than those of the trajectories, a link that leads out of the folder, or no state at all.
    """
    refuse_links_out(s.trajectories)      # what scripts give is added there
    wanted, found, left_out, blobs = set(tasks.names(s.task)), {}, {}, Blobs(Path(s.trajectories, "blobs"))
    forbidden, there, own = tasks.held_out_hashes(s.data), cache(blobs.has), fingerprint(tokenizer)
    for file in sorted(Path(s.trajectories).glob("*.jsonl")):
        try:
            head, steps = read_trajectory(file)
            if lacking := [step for step in steps if "m_before" not in step]:
                raise ValueError(f"{file}: {len(lacking)} of its steps do not tell the score before them")
        except (ValueError, OSError) as error:
            left_out.setdefault("no record of a trajectory", []).append(str(error))
            continue
        tasks.refuse_held_out(head["task"], head.get("data_sha256", {}), forbidden)
        if head["task"] not in wanted:
            continue
        now = tasks.info(head["task"], s.data)["sha256"]
        tasks.refuse_held_out(head["task"], now, forbidden)
        if head.get("data_sha256", now) != now:
            raise ValueError(f"{file} was collected on other data than {Path(s.data, head['task'])} holds; prepare "
                             "those again, or collect anew")
        if head.get("tokenizer") != own:        # ids of another tokenizer say nothing to this model
            for message in (message for line in (head, *steps) for message in line["messages"]):
                message.pop("tokens", None)
        for state in (State(file, head, steps, i) for i in range(len(steps))):
            if all(map(there, state.snapshot.values())):
                found.setdefault(head["task"], {})[state.name] = state
            else:
                left_out.setdefault("a missing blob", []).append(state.name)
    lines = [f"{s.trajectories}: {sum(map(len, found.values()))} states of {len(found)} tasks"]
    lines += [f"  left out, {why}: {len(where)} ({', '.join(where[:5])}{', ...' * (len(where) > 5)})"
              for why, where in left_out.items()]
    if not found:
        raise ValueError("there is no state to start from; collect trajectories with: python sft.py --collect "
                         f"--trajectories {s.trajectories}. " + "\n".join(lines))
    say("\n".join(lines))
    return found


def with_coder(s, found):
    """The settings, --coder auto replaced by what the pool's prompts call for. ValueError: they offer the model tools
    that it would not have."""
    needed = sorted({name for states in found.values() for state in states.values()
                     for name in NEEDS_CODER if name in state.head.get("actions", ())})
    if needed and s.coder == "none":
        raise ValueError(f"the states of {s.trajectories} were collected with a coder: they offer {', '.join(needed)}, "
                         "which --coder none does not have; give --coder model, or collect with --coder none")
    return replace(s, coder="model" if needed else "none") if s.coder == "auto" else s


def inputs(s, folder, found):
    """{what: its sha256, shortened} of what a run that goes on must have as it began: the model in `folder`, from which
    the reference is made anew, the pool's states, the data they are rewarded by, and a coder of its own."""
    states = [state for each in found.values() for state in each.values()]
    names = [state.name for state in states]
    files = {state.file.stem: [state.head, state.steps] for state in states}
    data = {id: [tasks.info(id, s.data)[name] for name in ("sha256", "m_init", "m_best")] for id in found}
    own = s.coder not in ("none", "model") and Path(s.coder).is_dir()
    return {"--model of sha256": hash_checkpoint(folder), "states of sha256": hash_json([names, files])[:16],
            "data of sha256": hash_json(data)[:16], **({"--coder of sha256": hash_checkpoint(s.coder)} if own else {})}


def draw(found, num, rng, weights, usable=lambda state: True):
    """Names of num States: the tasks in turn, in random order, and of each a state with a chance in proportion to its
    weight. weights: {name: weight}, 1 where there is none; usable may set some to 0, and another state of that task is
    drawn then. RunError: no state has a weight any more."""
    names, turn = [], []
    while len(names) < num:
        if not turn:
            live = [task for task in sorted(found) if any(weights.get(name, 1.0) for name in found[task])]
            if not live:
                raise RunError("no state of the pool can be played any more; the reasons stand above")
            turn = rng.sample(live, len(live))
        states = found[turn[-1]]
        chances = [weights.get(name, 1.0) for name in states]
        if not any(chances):
            turn.pop()
        elif usable(states[name := rng.choices(list(states), chances)[0]]):
            names.append(name)
            turn.pop()
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts

@dataclass
class Sample:
    """One action of the policy, and what came of it."""
    group: int          # the place of its state among those of the iteration; all its actions share it
    chain: int          # steps of one trajectory share it, in order; a single action is a chain of its own
    prompt: list        # token ids that the policy saw
    tokens: list        # and those it chose, the end of turn included
    logps: list         # their log-probs when they were sampled
    step: dict          # env.Step as a dict; None where the state's files are gone
    task: str
    state: str = ""     # the name of its State

    @property
    def text(self):
        """(ids, chosen), as training takes them."""
        return self.prompt + self.tokens, [False] * len(self.prompt) + [True] * len(self.tokens)


class Rollout:
    """Samples actions with an engine and carries them out, on one process of several.

    Every process plays a run of neighbouring states. Seeds depend on the place of state and action alone, and the order
    of the Samples on nothing else, so they are the same whatever the number of processes and whichever script ends
    first. (Not so whole trajectories: their observations tell the time left.)
    """

    def __init__(self, s, engine, found, rank=0, world=1):
        self.s, self.engine, self.found, self.rank, self.world = s, engine, found, rank, world
        self.states = {name: state for states in found.values() for name, state in states.items()}
        self.weights = {}       # name of a state -> weight in drawing; 0: it cannot be played
        self.begun = None       # of the next iteration: (actions that are sampled, futures of their Samples)
        self.cache = ResultCache(Path(s.trajectories, "cache"))
        self.threads = ThreadPoolExecutor(SLOTS.cpus + 2 if s.rollout == "step" else s.states * s.num)
        other = s.coder not in ("auto", "none", "model")
        self.coder = engine if s.coder == "model" else sample.load(
            s.coder, context=s.context, key=sample.coder_key(s.coder, s.model)) if other else None
        self.options = dict(max_new_tokens=s.max_new_tokens, temperature=s.temperature, stop=("\nObservation:",))

    def save(self):
        """What a later process needs, as plain values."""
        return {"weights": self.weights, "begun": self.begun and self.begun[0]}

    def load(self, saved):
        self.weights = saved["weights"]
        self.begun = saved["begun"] and (saved["begun"], self.carry_out(saved["begun"]))

    def env(self, head, **more):
        """An Env with the settings of a trajectory's header, in its first state."""
        ask = self.coder and (lambda messages: self.coder.chat(messages, max_new_tokens=CODER_TOKENS, stop=CODE_END)
                              .text + CODE_END)
        settings = {name: head[name] for name in ("actions", "fields", "prompt", "steps", "seconds") if name in head}
        return Env(head["task"], self.s.data, out=self.s.trajectories, coder=ask, cache=self.cache,
                   python=self.s.python, gpu=self.s.gpu or None, threads=self.s.threads, sandbox=self.s.sandbox,
                   **settings | more)

    def at(self, state):
        """An Env in this state. env.Gone: a file of it is missing."""
        env = self.env(state.head)
        env.restore(state.snapshot, state.messages, index=state.index, m_before=state.m_before, m_top=state.m_top)
        return env

    def prompt(self, env):
        return self.engine.tokenizer.chat(env.prompt())

    def usable(self, state):
        """Whether the state can be played: its files are there, and prompt and action fit the context."""
        try:
            length, room = len(self.prompt(self.at(state))) + self.s.max_new_tokens, self.engine.context
        except MissingBlob as error:
            return self.leave_out(state.name, error)
        return length <= room or self.leave_out(state.name, f"prompt and action take {length} tokens, and --context "
                                                            f"is {room}")

    def leave_out(self, name, why):
        self.weights[name] = 0.0
        if self.rank == 0:
            print(f"left out: {name}: {why}", file=sys.stderr)

    def draw(self, iteration):
        """The names of an iteration's states, drawn by the first process for all; this process's share of them, and the
        place where that begins."""
        s, rng = self.s, random.Random(f"{self.s.seed} {iteration}")
        usable = self.usable if s.rollout == "step" else lambda state: True
        names = rank0_broadcast(lambda: draw(self.found, s.states, rng, self.weights, usable))
        first = self.rank * -(-len(names) // self.world)
        return names[first:first + -(-len(names) // self.world)], first

    def collect(self, iteration, clock):
        """The Samples of an iteration, of all processes, in the order of their states. clock: a list that receives the
        times at which all was sampled and all was carried out. RunError: there is none."""
        try:
            if self.s.rollout == "episode":
                futures = self.episodes(iteration)
            else:
                _, futures = self.begun or self.start(iteration)
                self.begun = None
                if self.s.overlap and iteration + 1 < self.s.iterations:    # by the weights of before this update
                    self.begun = self.start(iteration + 1)
            clock.append(time.monotonic())
            wait(futures, return_when=FIRST_EXCEPTION)
            samples = gather([one for future in futures for one in future.result()])
            clock.append(time.monotonic())
        except FloatingPointError as error:
            raise RunError(f"iteration {iteration + 1}, sampling, rank {self.rank}: {error}. The checkpoints in "
                         f"{self.s.out} are from before") from None
        gone = {one.state for one in samples if one.step is None}
        for name in sorted(gone):
            self.leave_out(name, "its files are gone")
        samples = numbered([one for one in samples if one.state not in gone])
        if not samples:
            raise RunError(f"iteration {iteration + 1} has no action: the files of its states are gone, or every "
                         "conversation outgrew --context")
        if self.s.choose == "learnable":
            for group in {one.group: one.state for one in samples}.items():
                rewards = [one.step["reward"] for one in samples if one.group == group[0]]
                self.weights[group[1]] = 0.1 + 2 * statistics.pstdev(rewards)
        return samples

    def start(self, iteration):
        """Draws states and samples their actions; returns these, [[name, group, number, tokens, logps, text], ...], and
        the futures of their Samples, whose scripts may still run."""
        s, (names, first), done = self.s, self.draw(iteration), {}

        def each(i, j, reply):
            action = [names[i], first + i, j, reply.tokens, reply.logps, reply.text]
            done[i, j] = action, *self.carry_out([action])
        if names:
            self.engine.generate([self.prompt(self.at(self.states[name])) for name in names], n=s.num, each=each,
                                 seed=zlib.crc32(f"{s.seed} {iteration}".encode()) + first * s.num, **self.options)
        in_order = [done[key] for key in sorted(done)]
        return [action for action, _ in in_order], [future for _, future in in_order]

    def carry_out(self, actions):
        return [self.threads.submit(self.act, *action) for action in actions]

    def act(self, name, group, number, tokens, logps, text):
        """[Sample] of one action: carried out, run, graded, rewarded."""
        try:
            if name not in self.states:     # it was left out when this run went on
                raise MissingBlob(name)
            env = self.at(self.states[name])
            prompt = self.prompt(env)
            step = vars(env.step(text, self.engine.tokenizer.spelling(tokens, text)))
            return [Sample(group, number, prompt, tokens, logps, step, env.task.id, name)]
        except MissingBlob:
            return [Sample(group, number, [], tokens, logps, None, "", name)]
        except Exception as error:
            error.add_note(f"It happened in the state {name}.")
            raise

    def episodes(self, iteration):
        """The futures of the Samples of s.states * s.num whole trajectories: s.num of each start that is drawn."""
        names, first = self.draw(iteration)
        return [self.threads.submit(self.play, iteration, name, first + i, k)
                for i, name in enumerate(names) for k in range(self.s.num)]

    def play(self, iteration, name, group, k):
        """[Sample, ...] of a trajectory from the start; it ends where it outgrows the context."""
        s, found = self.s, []
        env = self.env(self.states[name].head, steps=self.s.steps)
        while not env.done:
            prompt = self.prompt(env)
            if len(prompt) + s.max_new_tokens > self.engine.context:
                break
            seed = zlib.crc32(f"{s.seed} {iteration} {group} {k} {env.index}".encode())
            reply = self.engine.submit(prompt, seed=seed, **self.options).result()
            step = env.step(reply.text, self.engine.tokenizer.spelling(reply.tokens, reply.text))
            found.append(Sample(group, k, prompt, reply.tokens, reply.logps, vars(step), env.task.id, name))
        return found


def numbered(samples):
    """The Samples with chains numbered through, where they had a number within their group."""
    numbers = {}
    for one in samples:
        one.chain = numbers.setdefault((one.group, one.chain), len(numbers))
    return samples


def gather(values):
    """The lists of all processes, one after the other, on all."""
    if not dist.is_initialized():
        return values
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for each in lists for value in each]


# ---------------------------------------------------------------------------------------------------------------------
# PPO

class Critic(Qwen2):
    """The value of the state before each chosen token: the language model's backbone with a linear head of one row."""

    def __init__(self, config):
        nn.Module.__init__(self)
        self.config, self.model = config, Qwen2(config).model
        self.score = Linear(config.hidden_size, 1)

    def tie(self):
        """There is no output head."""

    def forward(self, tokens, lengths=None, targets=None):
        """(B, T) int64, as for Qwen2 -> the values at the N targets, (N,) fp32."""
        return value_of(self.score, self.hidden(tokens, lengths=lengths)[targets != IGNORE])


class Shared(Qwen2):
    """Actor and critic on one backbone: the language model with a second head, of one row."""

    def __init__(self, config):
        super().__init__(config)
        self.score = Linear(config.hidden_size, 1)

    def forward(self, tokens, window=None, lengths=None, targets=None, temperature=1.0, size=None):
        """As Qwen2, with targets also the values at them, (N,) fp32: logp, entropy, first, value."""
        if targets is None:
            return super().forward(tokens, window, lengths)
        x, kept = self.hidden(tokens, window, lengths), targets != IGNORE
        return *self.lm_head(x[kept], targets[kept], temperature, size), value_of(self.score, x[kept])


def value_of(score, x):
    return x.float() @ score.weight[0].float() + score.bias.float()


def gae(rewards, values, gamma=1.0, lam=1.0):
    """(advantages, returns) of one chain of tokens, both (N,), from its rewards and values, (N,).

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1} (arXiv 1506.02438, equations 11 and 16), and
    the return is A_t + V_t. Behind the last token there is nothing, and its value is 0: an action is a whole episode,
    and a full prompt tells a trajectory how many steps it has left, so that to end there is part of its task. A short
    prompt does not: values are then averages over where in its trajectory such a state may stand.
    """
    advantages, following, after = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist())):
        following, after = reward + gamma * after - value + gamma * lam * following, value
        advantages.append(following)
    advantages = torch.tensor(advantages[::-1], dtype=rewards.dtype)
    return advantages, advantages + values


def whiten(x):
    """x less its mean, over its standard deviation. Where that is next to nothing, all rewards being equal, the result
    is next to nothing too, and no noise is blown up."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-4)


def importance(old, sampled, cap):
    """The weight of each token, pi_old / pi_sampler and at most cap (arXiv 2510.26788): it corrects the expectation
    where sampler and trainer differ, by rounding or by an update (--overlap). cap 0: 1 for all. Lists of (N,)."""
    return [(o - torch.tensor(each)).exp().clamp(max=cap) if cap else torch.ones(len(o))
            for o, each in zip(old, sampled)]


def policy_loss(logp, logp_old, advantage, s):
    """The loss of each token, (N,), and whether the ratio's clip decided it.

    With r = exp(logp - logp_old): -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and where A < 0 at most
    -dual_clip A (arXiv 1707.06347, equation 7; arXiv 1912.09729, equation 5). The difference is kept within 10 before
    exp, which must not overflow; beyond that no gradient is left but those below A e^-10.
    """
    ratio = (logp - logp_old).clamp(-10, 10).exp()
    plain, clipped = ratio * advantage, ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * advantage
    gain = torch.minimum(plain, clipped)
    gain = torch.where(advantage < 0, torch.maximum(gain, s.dual_clip * advantage), gain)
    return -gain, clipped < plain


def value_loss(value, value_old, returns, clip):
    """Half the squared error of each value, or of the value moved from the old one by at most clip, whichever is
    larger, (N,)."""
    moved = value_old + (value - value_old).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns) ** 2, (moved - returns) ** 2)


class Learner:
    """The actor, the critic and the reference, and how they are trained; on one process of several."""

    def __init__(self, s, config, folder, size, rank, world, device):
        self.s, self.config, self.size, self.rank, self.world, self.device = s, config, size, rank, world, device
        made = dict(device=device, seed=s.seed, recompute=s.recompute, compute=compute_type(s.dtype, device))
        critic = s.critic if s.advantage == "gae" else ""
        self.actor = build_model(config, folder, make=Shared if critic == "shared" else Qwen2, **made)
        self.critic = build_model(config, folder, make=Critic, **made) if critic == "own" else None
        self.reference = build_model(config, folder, **made).requires_grad_(False) if s.kl else None
        self.models = nn.ModuleDict({name: model for name in ("actor", "critic") if (model := getattr(self, name))})
        heads = [p for name, p in self.models.named_parameters() if "score." in name]
        self.slow = [p for p in self.actor.parameters() if not any(p is head for head in heads)]
        fast = [p for p in self.models.parameters() if not any(p is one for one in self.slow)]
        groups = [{"params": self.slow, "lr": s.lr}] + [{"params": fast, "lr": s.critic_lr}] * bool(fast)
        self.optimizer = torch.optim.AdamW(groups, lr=s.lr, weight_decay=0, fused=True)

    def act(self, tokens, lengths, targets):
        """logp, entropy, and of a shared critic the value, each (N,), of the actor."""
        logp, entropy, _, *value = self.actor(tokens, lengths=lengths, targets=targets, size=self.size,
                                              temperature=self.s.temperature)
        return logp, entropy, *value

    @torch.no_grad()
    def measure(self, texts, forward):
        """What forward(tokens, lengths, targets) says of the chosen tokens of each text: a list of (N,) tensors on the
        CPU, for all texts on all processes, each having computed its share."""
        found = []
        for row in shard_across_ranks([len(ids) - 1 for ids, _ in texts], range(len(texts)), self.rank, self.world, self.s.length):
            values = forward(*collate_packed([texts[i] for i in row], self.device)).float().cpu()
            found += zip(row, values.split([sum(texts[i][1]) for i in row])) if row else []
        return [values for _, values in sorted(gather(found), key=lambda one: one[0])]

    def advantages(self, samples, old, ref, values):
        """(advantages, returns) of every sample's tokens, two lists of (N,), from the trainer's log-probs of old
        and of the reference, and the values. The KL penalty is k1 of arXiv 1909.08593, in the reward."""
        s, chains = self.s, {}
        rewards = [s.kl * (ref[i] - old[i]) if ref else torch.zeros_like(old[i]) for i in range(len(samples))]
        for i, one in enumerate(samples):
            rewards[i][-1] += one.step["reward"]
            chains.setdefault(one.chain, []).append(i)
        if s.advantage == "group":      # the mean of the other actions of the state
            total, count = Counter(), Counter(one.group for one in samples)
            for one in samples:
                total[one.group] += one.step["reward"]
            values = [torch.full_like(old[i], (total[one.group] - one.step["reward"]) / max(1, count[one.group] - 1))
                      for i, one in enumerate(samples)]
        advantages, returns = [None] * len(samples), [None] * len(samples)
        for chain in chains.values():
            found = gae(torch.cat([rewards[i] for i in chain]), torch.cat([values[i] for i in chain]), s.gamma,
                        1.0 if s.advantage == "group" else s.lam)
            for i, a, r in zip(chain, *(x.split([len(old[i]) for i in chain]) for x in found)):
                advantages[i], returns[i] = a, r
        if s.advantage == "gae":
            advantages = list(whiten(torch.cat(advantages)).split([len(a) for a in advantages]))
        return advantages, returns

    def step(self, samples, iteration):
        """Learns from one iteration's samples, after a warm-up of the critic in the first; returns figures."""
        s, everything = self.s, samples
        if s.advantage == "group" and s.skip_equal:     # in the others nothing is better than anything
            earned = by_group(samples)
            samples = [one for one in samples if len(earned[one.group]) > 1] or samples
        texts = [one.text for one in samples]
        old = self.measure(texts, lambda *row: self.act(*row)[0])
        ref = self.reference and self.measure(texts, lambda tokens, lengths, targets: self.reference(
            tokens, lengths=lengths, targets=targets, size=self.size, temperature=s.temperature)[0])
        weights = importance(old, [one.logps for one in samples], s.truncate)
        judge = self.critic or (lambda *row: self.act(*row)[2])
        for policy in [False, True] if iteration == 0 and s.advantage == "gae" and s.value_steps else [True]:
            values = self.measure(texts, judge) if s.advantage == "gae" else None
            advantages, returns = self.advantages(samples, old, ref, values)
            found = self.update(texts, old, advantages, returns, values or old, weights, iteration, policy)
        return figures_of(everything, samples, old, ref, values, returns, s) | found

    def update(self, texts, old, advantages, returns, values, weights, iteration, policy=True):
        """The passes over one iteration's actions; policy False: of the critic alone, s.value_steps of them. Returns
        figures. RunError: a loss or a gradient that is not finite; no parameter has been changed by it."""
        s, sums, norms = self.s, torch.zeros(5, device=self.device, dtype=torch.float64), []
        largest = torch.ones((), device=self.device)
        limit = s.value_clip * (s.steps if s.rollout == "episode" else 1)
        limit = limit if policy else math.inf               # the warm-up has no old values worth keeping to
        parts = min(s.minibatches, len(texts))
        for number in range(s.epochs * parts if policy else s.value_steps):
            epoch, m = divmod(number, parts) if policy else (number, 0)
            order = epoch_order(len(texts), s.seed, iteration * s.epochs + epoch)
            chosen = order[m::parts] if policy else order
            num = sum(len(old[i]) for i in chosen)
            for row in shard_across_ranks([len(ids) - 1 for ids, _ in texts], chosen, self.rank, self.world, s.length):
                tokens, lengths, targets = collate_packed([texts[i] for i in row], self.device)
                a, o, r, v, w = (torch.cat([torch.zeros(0), *(x[i] for i in row)]).to(self.device)
                                 for x in (advantages, old, returns, values, weights))
                loss, value = torch.zeros((), device=self.device), None
                if policy or not self.critic:
                    logp, entropy, *value = self.act(tokens, lengths, targets)
                    value = value[0] if value else None
                    each, cut = policy_loss(logp, o, a, s)
                    loss = (w * each).sum() / num if policy else 0.0 * logp.sum()
                    sums[:3] += torch.stack([entropy.sum(), cut.sum(), w.mul(each).sum()]).detach() / num
                    if len(logp):
                        largest = torch.maximum(largest, (logp.detach() - o).exp().max())
                if s.advantage == "gae":
                    value = self.critic(tokens, lengths, targets) if self.critic else value
                    error = value_loss(value, v, r, limit).sum() / num
                    sums[3] += error.detach()
                    sums[4] += ((value - v).abs() > limit).sum() / num
                    loss = loss + error * (1.0 if self.critic else s.value_weight)
                (loss * self.world).backward()
            if not policy:      # of a shared backbone only the critic's head
                for p in self.slow:
                    p.grad = None
            norms.append(torch.stack([full_tensor(nn.utils.clip_grad_norm_(model.parameters(), s.clip)) for model in
                                      ([self.actor] if policy or not self.critic else [])
                                      + ([self.critic] if self.critic else [])]))
            if not torch.isfinite(norms[-1]).all():
                raise RunError(f"iteration {iteration + 1}, step {number + 1}, rank {self.rank}: gradient norms "
                             f"{norms[-1].tolist()} of actor and critic, in actions {chosen[:20]}. The checkpoints in "
                             f"{s.out} are from before")
            self.optimizer.step()
            self.optimizer.zero_grad()
        steps = len(norms)
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        entropy, cut, loss, error, cut_value = (sums / steps).tolist()
        norm = torch.stack(norms).mean(0).tolist()
        return {"policy_loss": loss, "value_loss": error, "entropy": entropy, "clip_fraction": cut,
                "value_clip_fraction": cut_value, "ratio_max": largest.item(), "grad_norm": norm[0],
                "critic_grad_norm": norm[-1]}


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def sampler(s, learner, tokenizer):
    """(engine, refresh): what samples from the actor, and a function that brings it the actor's present weights. It has
    the trained module itself where that is whole and computes in its weights' dtype; else a copy in the dtype that it
    computes in (--dtype), filled in place."""
    actor, dtype = learner.actor, learner.actor.compute
    whole = not any(isinstance(p, DTensor) or p.dtype is not dtype for _, p in sharded_parameters(actor))
    model = actor if whole else Qwen2._empty(learner.config, dtype, learner.device).requires_grad_(False)
    copies = dict(model.named_parameters())

    @torch.no_grad()
    def fill():
        for name, p in sharded_parameters(actor) if not whole else ():
            p = full_tensor(p)
            if name in copies:
                copies[name].copy_(p)

    def refresh():
        fill()
        engine.refresh()
    fill()
    engine = sample.Engine(model, tokenizer, s.rows, s.context, name=s.model, repeatable=True)
    return engine, refresh


def by_group(samples):
    """{group: the rewards that its actions earned, a set}."""
    earned = {}
    for one in samples:
        earned.setdefault(one.group, set()).add(one.step["reward"])
    return earned


def figures_of(samples, learned, old, ref, values, returns, s):
    """What the log says of an iteration's samples, and of those that were learned from, as {name: number}."""
    rewards = torch.tensor([one.step["reward"] for one in samples])
    kinds = Counter(one.step["kind"] for one in samples)
    edits = [one.step["reward"] for one in samples if one.step["outcome"] and one.step["action"] != "Execute Script"]
    groups = by_group(samples)
    gap = (torch.cat(old) - torch.cat([torch.tensor(one.logps) for one in learned])).abs()
    found = {"reward": rewards.mean().item(), "reward_std": rewards.std(correction=0).item(),
             "reward_min": rewards.min().item(), "reward_max": rewards.max().item(),
             **{f"share_{kind.replace(' ', '_')}": kinds[kind] / len(samples) for kind in KINDS},
             "valid": sum(one.step["valid"] for one in samples) / len(samples),
             "reward_edits": sum(edits) / len(edits) if edits else None,
             "equal_groups": sum(len(each) == 1 for each in groups.values()) / len(groups),
             "truncated": sum(len(one.tokens) >= s.max_new_tokens for one in samples) / len(samples),
             "action_tokens": sum(len(one.tokens) for one in samples) / len(samples),
             "gap_mean": gap.mean().item(), "gap_max": gap.max().item()}
    if ref:
        d = (torch.cat(ref) - torch.cat(old)).clamp(-10, 10)
        found |= {"kl": -d.mean().item(), "kl_k3": (d.exp() - 1 - d).mean().item()}
    if values:
        value, target = torch.cat(values), torch.cat(returns)
        spread = target.var(correction=0)
        error = (target - value).var(correction=0)
        found["explained_variance"] = (1 - error / spread).item() if spread > 1e-6 else None
    return found


def shown(one):
    """A sample as text: the state in short, the action, what came of it."""
    step = one.step
    score = "" if step["score"] is None else f", score {step['m_before']:.6g} -> {step['score']:.6g}"
    outcome = f", the script: {step['outcome']}" if step["outcome"] else ""
    return (f"--- {one.task}, step {step['index']}, {len(one.prompt)} prompt tokens\n"
            f"{shorten(step['reply'].strip(), 1200)}\n--- {step['kind']}{outcome}{score}"
            f"{', ' * bool(step['error'])}{step['error']}; reward {step['reward']:.3f}")


def learn(s, rank, world, device):
    """Trains s.model on the pool and writes s.out, as process `rank` of `world`."""
    if refused := [id for id in tasks.names(s.task) if tasks.load(id).split != "held-in"]:
        raise ValueError(f"{', '.join(refused)}: held out, for evaluation; nothing of it may be trained on. The "
                         f"held-in tasks are: {', '.join(tasks.names('held-in'))}")
    say = print if rank == 0 else lambda line: None
    if s.model == Settings.model and not Path(s.model, "config.json").exists():
        raise ValueError(f"there is no {s.model} to go on from; make it with: python sft.py, or give another --model")
    folder = find_folder(s.model)
    tokenizer, config = sample.Tokenizer.from_pretrained(folder), Config.from_pretrained(folder)
    rank0_broadcast(lambda: prepare_tasks(s) and None)
    if s.sandbox == "on":
        protection()        # here, before many threads ask at once
    found = pool(s, tokenizer, say)
    s = with_coder(s, found)
    use_kernels(s.kernels, device)
    learner = Learner(s, config, folder, tokenizer.size, rank, world, device)
    origin = {"products in": str(learner.actor.compute).removeprefix("torch."),
              **rank0_broadcast(lambda: inputs(s, folder, found))}
    # with overlap the last iteration samples no other, so a run that was to be longer is another from there on
    names = sorted(vars(s).keys() - (FREE - {"iterations"} if s.overlap else FREE))
    state = load_state(s, names, learner.models, learner.optimizer, origin) or {"step": 0}
    engine, refresh = sampler(s, learner, tokenizer)
    rollout = Rollout(s, engine, found, rank, world)
    if done := state["step"]:
        rollout.load(state["rollout"])
        say(f"{s.out}: going on after iteration {done}")
    log, meter = open(Path(s.out, "log.jsonl"), "a") if rank == 0 else None, Meter(s, learner, rollout, done)
    for iteration in range(done, s.iterations):
        meter.start()
        samples = rollout.collect(iteration, meter.clock)
        figures = learner.step(samples, iteration)
        refresh()
        figures = {"iteration": iteration + 1, **figures, **meter.figures(samples)}
        if rank == 0:
            report(figures, s, log, meter.left(iteration + 1))
            if (iteration + 1) % s.show_every == 0 or iteration == 0:
                print(shown(random.Random(iteration).choice(samples)), flush=True)
        if (iteration + 1) % s.save_every == 0 or iteration + 1 == s.iterations:
            save_state(s, iteration + 1, learner.models, learner.optimizer, origin, rollout=rollout.save())
    export_model(learner.actor, tokenizer, s.out, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if rank == 0 and (agent := read_agent(folder)):
        write_atomic(Path(s.out, "agent.json"), agent)
    say(f"Written to {s.out}: the model, log.jsonl, checkpoints" + "\n\nNext: python eval.py" * (s.preset == "tiny"))


def plan(s):
    """What --plan prints: memory of one GPU by part, at the peak of an update. Reads no weights and needs no GPU."""
    c = shape_of(s.model)
    compute = compute_type(s.dtype, torch.device("cuda"))
    total = num_weights(c)[-1]
    table = plan_memory(c, s.length, s.gpus, compute, s.recompute, critic=s.advantage == "gae" and s.critic == "own",
                        reference=s.kl > 0, sampled_tokens=s.rows * s.context)
    return "\n".join([f"{s.model}: {total:,} weights; {s.gpus} GPUs, rows of {s.length:,} tokens, {s.rows} x "
                      f"{s.context:,} tokens sampled, recompute {'on' if s.recompute else 'off'}", "", "GiB per GPU",
                      *gib(table)])


class Meter:
    """What an iteration took."""

    def __init__(self, s, learner, rollout, done):
        self.s, self.learner, self.rollout, self.done = s, learner, rollout, done
        self.peak, self.began = peak_flops(learner.device), time.monotonic()

    def start(self):
        self.clock, self.sampled = [time.monotonic()], self.rollout.engine.sampled_tokens
        self.before = dict(self.rollout.cache.counts)

    def figures(self, samples):
        """What the log says of it as {name: number}. The clock has: the start, all sampled, all carried out."""
        start, sampled, executed, now = *self.clock, time.monotonic()
        runs, hits = (self.rollout.cache.counts[name] - self.before[name] for name in ("runs", "hits"))
        learner, tokens = self.learner, self.rollout.engine.sampled_tokens - self.sampled
        passes = (3 * self.s.epochs + 1) * (1 + bool(learner.critic)) + bool(learner.reference)      # of a forward
        flops = flops_of(learner.config, [[one.text for one in samples]]) / 3 * passes / learner.world
        return {"left_out": sum(weight == 0 for weight in self.rollout.weights.values()), "runs": runs,
                "cache_hits": hits / max(1, hits + runs), "sample_s": sampled - start,
                "execute_s": executed - sampled, "update_s": now - executed, "seconds": now - start,
                "elapsed_s": now - self.began, "sampled_tokens_s": tokens * learner.world / (executed - start),
                "mfu": flops / (now - executed) / self.peak if self.peak else None,
                "peak_gib": peak_memory(learner.device) / 2**30}

    def left(self, done):
        """The time that the other iterations will take, if they take as long as those so far."""
        share = (self.s.iterations - done) / (done - self.done)
        return timedelta(seconds=int((time.monotonic() - self.began) * share))


def report(f, s, log, left):
    """Writes an iteration's figures to the log and to the screen, and warns where not to edit is the best policy."""
    log.write(json.dumps(f) + "\n")
    log.flush()
    form = lambda name, how: "-" if f.get(name) is None else format(f[name], how)
    print(f"iteration {f['iteration']:>4}/{s.iterations}  reward {f['reward']:.3f}  edits "
          f"{form('reward_edits', '.3f')}  valid {f['valid']:4.0%}  kl {form('kl', '.4f')}  entropy "
          f"{f['entropy']:.3f}  clip {f['clip_fraction']:.3f}  ev {form('explained_variance', '.2f')}  gap "
          f"{f['gap_max']:.1e}  hits {f['cache_hits']:4.0%}  "
          f"{f['sample_s']:.1f} + {f['execute_s']:.1f} + {f['update_s']:.1f} s  ETA {left}", flush=True)
    if f["reward_edits"] is not None and f["reward_edits"] < 0.5 and f["iteration"] % s.show_every == 0:
        print("  edits earn less than 0.5 on average, which is what an action that is no edit earns: the policy learns "
              "not to edit while this lasts", file=sys.stderr)


def fill(values):
    """For cli.parse: what holds where nothing was typed, by what the model's folder says and by its size."""
    model, name, there = values["model"], values["preset"], Path(values["model"]).is_dir()
    folder = None if not there and (values["plan"] or model == Settings.model) else sample.small_files(model)
    found = [(f"{model}/agent.json", read_agent(folder))] if folder else []
    if folder is None and (model == Settings.model or not values["plan"]):      # no such model, as is said later
        return [cli.preset(name, RECIPES)] if name else []
    config = Config.from_pretrained(folder) if folder else shape_of(model)      # of a plan for "7b"
    num = num_weights(config)[-1]
    fitting = "tiny" if num < SMALL else "7b"
    if not name:
        why = f"{model} has {num:,} weights, {'' if fitting == 'tiny' else 'not '}below {SMALL:,.0f}"
        return [*found, (f"{why}, so (another --preset may be typed)", {"preset": fitting, **RECIPES[fitting]})]
    if name == "tiny" != fitting:
        cli.announce(f"rl.py: WARNING: --preset tiny is for less than {SMALL:,.0f} weights, and {model} has {num:,}; "
                    f"such a learning rate ({RECIPES['tiny']['lr']:g}, of 7b {Settings.lr:g}) may ruin it")
    return [*found, cli.preset(name, RECIPES)]


def main(argv=None):
    s = cli.parse(Settings, argv, fill)

    def work():
        if s.plan:
            return print(plan(s))
        rank, world, device = init_distributed()
        with explain_dist_errors(rank), contextlib.ExitStack() as held:
            rank0_broadcast(lambda: held.enter_context(folder_lock(s.out, "rl.py")))
            learn(s, rank, world, device)
    return exit_status("rl.py", work, s.out)


if __name__ == "__main__":
    run_main(main)
