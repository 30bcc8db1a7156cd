"""Step-wise PPO (ML-Agent, arXiv 2505.23723): the policy takes one action in a recorded state and is rewarded.

    python rl.py                                        # goes on from runs/sft, on miniatures, on a laptop's CPU
    torchrun --nproc_per_node 8 rl.py                   # on eight GPUs; the recipe is that of the model's size
    python rl.py --rollout episode --states 4           # whole trajectories instead, for comparison

Each step of a whole trajectory runs a training script, which is slow. So the states come from expert trajectories, and
only the action is new. `iterate` is one iteration. A killed run continues exactly with the same command.
"""
import math, random, time, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev

import support  # noqa: F401  before torch

import torch
import torch.distributed as dist
import torch.nn as nn

import tasks
from model import Linear, Qwen2, at_targets, use_kernels
from support import cli, logs, recipes, sampling
from support.cli import RunError, exit_status, run_main
from support.distributed import (
    add_gradients, build_model, compute_type, copy_weights, epoch_order, export_model, format_plan, gather, joined,
    load_state, map_rows, optimizer_step, packed_rows, rank0_broadcast, rank_and_size, row_threads, save_state)
from support.miniature import Disguised
from support.play import LEARNED_SEEDS, ask_coder_model, make_env, prepare_tasks, read_agent, write_agent
from support.pool import BASE_CHANCE, hash_inputs, hold_back, load_pool, sample_states
from support.records import AGENT, restore_record
from support.sandbox import SLOTS, protection
from support.storage import ResultCache
from support.tokenizer import open_checkpoint

DUAL_CLIP = 3.0             # the loss of a bad action grows up to this ratio (arXiv 1912.09729)
VALUE_CLIP = 0.2            # a value may move this far from value_old within an iteration
TIS_CAP = 2.0               # truncated importance sampling: cap of a token's pi_old / pi_sampler (arXiv 2510.26788)
WARM_UP_STEPS = 4           # of the critic alone, before the first update: its head begins at zero
ROUNDING = 1e-5             # log-probs of the same weights, computed in another order, differ by less
EPS = 1e-4                  # is added to a standard deviation that is divided by


@dataclass
class Settings(cli.TaskSettings):
    preset: str = ""  # settings for a size of model, which flags override: tiny, 0.5b, 1.5b, 7b; empty: by the
        # number of weights
    model: str = "runs/sft"  # what is trained: a folder or a hub id; the reference and the critic begin as it too
    trajectories: str = "runs/trajectories"  # the recorded states; results of new scripts are added to its cache. Where
        # they offer (AI) actions, the policy itself carries these out
    out: str = "runs/rl"  # the actor as a Hugging Face folder, log.jsonl and checkpoints; a run there is continued
    task: str = "held-in"  # a task's id, or held-in for all that may be trained on
    rollout: str = "step"  # step: one action in a recorded state; episode: whole trajectories from the start
    iterations: int = 40  # rollouts, each followed by --epochs passes of updates
    states: int = 32  # of an iteration, over all processes; with --rollout episode: starts of trajectories
    samples: int = 4  # actions sampled in each state
    steps: int = 15  # replies of a trajectory, with --rollout episode
    advantage: str = "gae"  # gae: against a critic's values; rloo, grpo: against the state's other actions
    epochs: int = 1  # passes over an iteration's actions
    minibatches: int = 1  # optimizer steps of a pass
    lr: float = 1e-6  # of the actor
    critic_lr: float = 1e-5  # of the critic
    clip_low: float = 0.2  # the ratio of new to old probability counts from 1 - this ...
    clip_high: float = 0.2  # ... to 1 + this
    kl: float = 1e-3  # weight of the divergence from the reference: with gae in the reward, else in the loss
    lam: float = 1.0  # lambda of GAE
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    max_batch: int = 8  # actions sampled at the same time, on each process
    max_row_tokens: int = 16384  # tokens of a packed row in training, if no single example has more
    save_every: int = 10  # iterations between checkpoints
    export_every: int = 0  # iterations between copies of the actor in exports/ of --out, 000000 at the start; 0: none
    validate_every: int = 0  # iterations between two looks at fixed states that are never trained on; 0: none
    plan: bool = False  # print memory per GPU by part for these settings, and end; --model may then be a size: 7b
    gpus: int = 8  # that --plan plans for; torchrun --nproc_per_node decides how many there really are

    def __post_init__(self):
        super().__post_init__()
        cli.check_choices(self, rollout=("step", "episode"), advantage=tuple(ADVANTAGES),
                          dtype=("auto", "float32", "bfloat16"))
        cli.check_positive(self, "iterations", "states", "samples", "steps", "epochs", "minibatches",
                           "temperature", "max_batch", "max_row_tokens", "save_every", "gpus")
        cli.check_range(self, math.inf, "validate_every", "export_every")
        cli.check_range(self, 1, "lr", "critic_lr", "clip_low", "clip_high", "kl", "lam")
        if self.context <= self.max_new_tokens:
            raise ValueError(f"--context must be above --max-new-tokens {self.max_new_tokens}, found {self.context}")
        if self.minibatches > self.states:
            raise ValueError(f"--minibatches must be at most --states {self.states}, found {self.minibatches}")
        if not self.has_critic and self.samples < 2:
            raise ValueError(f"--advantage {self.advantage} needs --samples of at least 2, found {self.samples}")

    @property
    def has_critic(self):
        return self.advantage == "gae"


# Settings that may change when a run is continued; with others it is refused. The kind of device may not, see train().
FREE = {"preset", "model", "trajectories", "out", "iterations", "max_batch", "data", "raw", "python", "gpu", "device",
        "save_every", "export_every", "plan", "gpus"}


# -- Rollouts

@dataclass
class Transition:
    """One action of the policy in a state, and its reward."""
    state: str          # the State's name
    group: int          # the state's number within the iteration; all its actions share it
    episode_id: int     # the steps of a trajectory share it, in order; a single action has its own
    prompt: list        # token ids that the policy saw
    tokens: list        # token ids of the action, with the end of turn
    logp_sampler: list  # their log-probs when they were sampled
    step: dict          # env.Step as a dict
    luck: list          # positions of the tokens that have no advantage, see miniature.Disguised
    advantage: float | None = None      # the mean over its tokens; None where it is not learned from

    @property
    def reward(self):
        return self.step["reward"]

    @property
    def example(self):
        """(token ids, loss_mask): the policy is trained on the tokens that it chose."""
        loss_mask = [False] * len(self.prompt) + [True] * len(self.tokens)
        return self.prompt + self.tokens, loss_mask


class RolloutWorker:
    """Samples actions with an engine and carries them out, on one process of several. Seeds and the order of the
    Transitions depend on the numbers of state and action alone, so neither the number of processes nor which script
    ends first matters. (For whole trajectories they do: observations tell the time left.)
    """

    def __init__(self, cfg, engine, pool):
        self.cfg = cfg
        self.engine = engine
        self.pool = pool
        self.states = {name: state for states in pool.values() for name, state in states.items()}
        self.chances = {}       # name of a state -> its relative chance to be sampled; 0: it does not fit the context
        self.held_back = []     # names of the states that validate
        if cfg.validate_every:
            self.pool, self.held_back = hold_back(pool)
        self.cache = ResultCache(Path(cfg.trajectories, "cache"))
        self.threads = ThreadPoolExecutor(SLOTS.cpus + 2 if cfg.rollout == "step" else cfg.states * cfg.samples)
        self.options = dict(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, stop=("\nObservation:",))

    def begin(self, name, group=None, iteration="validation"):
        """Returns an Env in a state, or with --rollout episode at the start of its trajectory, and the prompt's token
        ids there. MissingBlob: a file of the state is gone."""
        state = self.states[name]
        recorded = {key: state.head[key] for key in AGENT}     # how its agent acted: actions, form of prompt, steps ...
        from_start = self.cfg.rollout == "episode" and name not in self.held_back
        if from_start:
            recorded["steps"] = self.cfg.steps
        env = make_env(self.cfg, state.head["task"], self.cfg.trajectories, self.cache, state.head["data_seed"],
                       coder=lambda messages: ask_coder_model(self.engine, messages).text, **recorded)
        if not from_start:
            restore_record(env, state.head, state.steps[:state.index])
        if iteration != "validation" and env.prompt_format == "short":      # validation shows a policy as it is used
            env = Disguised(env, f"{self.cfg.seed} {iteration} {group}")
        return env, self.engine.tokenizer.chat(env.prompt())

    def validate(self):
        """Returns the mean reward of --samples actions in each state held back, of the same random numbers every time;
        None: no state fits."""
        self.held_back = [name for name in self.held_back if self.fits(name)]
        transitions = results_of(self.submit_actions(self.own_starts(self.held_back), "validation"))
        self.engine.refresh()       # else the next iteration would sample otherwise than after a resume
        return fmean(transition.reward for transition in transitions) if transitions else None

    def own_starts(self, names):
        """Returns this process's share of the states, [(number among those of all processes, name)]."""
        rank, world_size = rank_and_size()
        per_rank = math.ceil(len(names) / world_size)
        return list(enumerate(names))[rank * per_rank:(rank + 1) * per_rank]

    def fits(self, name, *which):
        """Returns whether prompt and action fit the context; else the state is not drawn again. which: as in begin."""
        num = len(self.begin(name, *which)[1]) + self.cfg.max_new_tokens
        if num <= self.engine.context:
            return True
        self.chances[name] = 0.0
        cli.announce(f"left out: {name}: prompt and action take {num} tokens, and --context is {self.engine.context}")
        return False

    def sample_states(self, iteration):
        """Returns the names of an iteration's states, of all processes."""
        def fits(name, group):
            return self.fits(name, group, iteration)
        rng = random.Random(f"{self.cfg.seed} {iteration}")
        return rank0_broadcast(partial(sample_states, self.pool, self.cfg.states, rng, self.chances, fits))

    def run(self, names, iteration):
        """Returns the Transitions of all processes, in the order of the states `names`, and statistics of the work.
        RunError: the weights are not finite."""
        before = self.counts()
        began = time.monotonic()
        starts = self.own_starts(names)
        if self.cfg.rollout == "episode":
            futures = [self.threads.submit(self.play_episode, name, group, number, iteration)
                       for group, name in starts for number in range(self.cfg.samples)]
        else:
            futures = self.submit_actions(starts, iteration)
        sampled = time.monotonic()
        transitions = results_of(futures)
        executed = time.monotonic()
        if not self.cfg.has_critic:     # prefer states whose actions earned different rewards
            rewards = group_rewards(transitions)
            for transition in transitions:
                self.chances[transition.state] = BASE_CHANCE + 2 * pstdev(rewards[transition.group])
        counts = sum(gather([self.counts() - before]), Counter())
        return transitions, logs.rollout_stats(counts, self.chances, sampled - began, executed - sampled)

    def counts(self):
        return Counter(self.cache.counts, sampled_tokens=self.engine.sampled_tokens)

    def submit_actions(self, starts, iteration):
        """Samples actions in these states, has each carried out at once, and returns in order the futures of
        lists of Transitions."""
        futures = {}

        def on_reply(i, j, reply):
            group, name = starts[i]
            futures[i, j] = self.threads.submit(self.execute_action, name, group, j, reply, iteration)
        if starts:
            seed = zlib.crc32(f"{self.cfg.seed} {iteration}".encode()) + starts[0][0] * self.cfg.samples
            prompts = [self.begin(name, group, iteration)[1] for group, name in starts]
            self.engine.generate(prompts, n=self.cfg.samples, seed=seed, on_completion=on_reply, **self.options)
        return [futures[key] for key in sorted(futures)]

    def execute_action(self, name, group, number, reply, iteration):
        """Returns [the Transition] of an action in a state."""
        env, prompt = self.begin(name, group, iteration)
        return [self.act(env, prompt, reply, name, group, number)]

    def act(self, env, prompt, reply, name, group, number):
        """Carries an action out and returns its Transition."""
        try:
            step = vars(env.step(reply.text, self.engine.tokenizer.spelling(reply.tokens, reply.text)))
        except Exception as error:
            error.add_note(f"It happened in the state {name}.")
            raise
        pieces = [self.engine.tokenizer.bytes[token] for token in reply.tokens]
        luck = env.luck(pieces) if isinstance(env, Disguised) else []
        return Transition(name, group, group * self.cfg.samples + number, prompt, reply.tokens, reply.logps, step, luck)

    def play_episode(self, name, group, number, iteration):
        """Returns the Transitions of a trajectory from the start; it ends where it outgrows the context."""
        transitions = []
        env, prompt = self.begin(name, group, iteration)
        while not env.done and len(prompt) + self.cfg.max_new_tokens <= self.engine.context:
            seed = zlib.crc32(f"{self.cfg.seed} {iteration} {group} {number} {env.index}".encode())
            reply = self.engine.submit(prompt, seed=seed, **self.options).result()
            transitions.append(self.act(env, prompt, reply, name, group, number))
            prompt = self.engine.tokenizer.chat(env.prompt())
        return transitions

    def samples_from(self, actor):
        """Returns whether the engine's model is the actor itself, and no copy in another dtype."""
        return self.engine.model is actor

    def refresh(self, actor):
        """Brings the actor's present weights to the engine."""
        if not self.samples_from(actor):
            copy_weights(actor, self.engine.model)
        self.engine.refresh()


def results_of(futures):
    """Returns the Transitions of all processes. futures: of lists of Transitions, of this process."""
    return gather([transition for future in futures for transition in future.result()])


def group_rewards(transitions):
    """Returns {group: the rewards of its actions, or what each of its trajectories has earned}."""
    rewards = {}
    for transition in transitions:
        rewards.setdefault(transition.group, Counter())[transition.episode_id] += transition.reward
    return {group: list(totals.values()) for group, totals in rewards.items()}


# -- Advantages and losses

def token_rewards(transitions, logp_old, logp_ref, kl):
    """Returns the reward of each token, a list of (N_i,): -kl * (logp_old - logp_ref) (arXiv 1909.08593, equation 2;
    without logp_ref 0), plus the action's reward at its last token."""
    rewards = [torch.zeros_like(old) for old in logp_old]
    if logp_ref:
        rewards = [kl * (ref - old) for ref, old in zip(logp_ref, logp_old)]
    for reward, transition in zip(rewards, transitions):
        reward[-1] += transition.reward
    return rewards


def gae(rewards, values, gamma=1.0, lam=1.0):
    """Returns the advantages of one episode's tokens, (N,), from their rewards and values, (N,).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1} (arXiv 1506.02438, equations 11 and 16).
    The value behind the last token is 0: nothing is cut off there. A single action is an episode of its own, and the
    prompts of a trajectory tell the steps left.
    """
    adv = []
    next_adv = 0.0
    next_value = 0.0
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist())):
        next_adv = reward + gamma * next_value - value + gamma * lam * next_adv
        next_value = value
        adv.append(next_adv)
    return torch.tensor(adv[::-1], dtype=rewards.dtype)


def gae_of_episodes(transitions, rewards, values, lam):
    """GAE against the critic's values, along the tokens of each episode."""
    episodes = {}
    for i, transition in enumerate(transitions):
        episodes.setdefault(transition.episode_id, []).append(i)
    adv = {}
    for indices in episodes.values():
        episode = gae(torch.cat([rewards[i] for i in indices]), torch.cat([values[i] for i in indices]), lam=lam)
        adv |= zip(indices, episode.split([len(rewards[i]) for i in indices]))
    return [adv[i] for i in range(len(transitions))]


def group_returns(transitions, rewards):
    """Returns for each action its return (what it and the later ones of its trajectory earned), and those of all
    trajectories of its group from that step on, 0 of one that has ended before."""
    groups = {}         # group -> trajectory -> what each of its actions earned
    for transition, token_reward in zip(transitions, rewards):
        episodes = groups.setdefault(transition.group, {})
        episodes.setdefault(transition.episode_id, []).append(token_reward.sum().item())
    returns = []
    num_before = Counter()
    for transition in transitions:
        step = num_before[transition.episode_id]
        num_before[transition.episode_id] += 1
        episodes = groups[transition.group]
        own = sum(episodes[transition.episode_id][step:])
        returns.append((own, [sum(earned[step:]) for earned in episodes.values()]))
    return returns


def rloo(transitions, rewards, values, lam):
    """The return less the mean return of the group's others (leave-one-out, arXiv 2402.14740)."""
    adv = []
    for token_reward, (own, group) in zip(rewards, group_returns(transitions, rewards)):
        baseline = (sum(group) - own) / max(1, len(group) - 1)
        adv.append(torch.full_like(token_reward, own - baseline))
    return adv


def grpo(transitions, rewards, values, lam):
    """The return less the mean return of the group, over its standard deviation (arXiv 2402.03300)."""
    adv = []
    for token_reward, (own, group) in zip(rewards, group_returns(transitions, rewards)):
        adv.append(torch.full_like(token_reward, (own - fmean(group)) / (pstdev(group) + EPS)))
    return adv


# To try another advantage, write a function and enter it here; its key is then a value of --advantage. It receives the
# Transitions, the rewards of their tokens (see token_rewards), the critic's values (or None) and --lam, and returns the
# advantages of the tokens, a list of (N_i,), which train the actor as they are. Only gae has a critic
# (Settings.has_critic): its advantages plus the values are what the critic learns, and they are whitened for the actor.
ADVANTAGES = {"gae": gae_of_episodes, "rloo": rloo, "grpo": grpo}


def whiten(adv):
    """Returns the advantages, a list of (N_i,), less their mean over all tokens, over their standard deviation."""
    tokens = torch.cat(adv)
    tokens = (tokens - tokens.mean()) / (tokens.std(correction=0) + EPS)
    return list(tokens.split([len(a) for a in adv]))


def importance_weights(logp_old, logp_sampler, cap=TIS_CAP):
    """Returns the weight pi_old / pi_sampler of each token, at most `cap`, a list of (N_i,) (arXiv 2510.26788)."""
    return [(old - sampler).exp().clamp(max=cap) for old, sampler in zip(logp_old, logp_sampler)]


def policy_loss(logp, logp_old, adv, clip_low, clip_high):
    """Returns the loss of each token, (N,), and whether the ratio's clip decided it, (N,).

    With r = exp(logp - logp_old): -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and where A < 0 at most
    -DUAL_CLIP A (arXiv 1707.06347, equation 7; arXiv 1912.09729, equation 5). The logarithm of r is held
    within 10, so that exp does not overflow.
    """
    ratio = (logp - logp_old).clamp(-10, 10).exp()
    plain = ratio * adv
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * adv
    gain = torch.minimum(plain, clipped)
    gain = torch.where(adv < 0, torch.maximum(gain, DUAL_CLIP * adv), gain)
    return -gain, clipped < plain


def divergence(logp, logp_ref):
    """Returns half the squared difference of the log-probs at each token, (N,). Its mean gradient over the policy's own
    tokens is that of KL(policy || reference) (k2 in joschu.net/blog/kl-approx.html; arXiv 2510.01555)."""
    return 0.5 * (logp - logp_ref) ** 2


def value_loss(value, value_old, ret, max_change):
    """Returns half the squared error of each value, or of the value moved from the old one by at most max_change,
    whichever is larger, (N,)."""
    moved = value_old + (value - value_old).clamp(-max_change, max_change)
    return 0.5 * torch.maximum((value - ret) ** 2, (moved - ret) ** 2)


# -- PPO

class Critic(Qwen2):
    """The value of the state before each token: the language model's backbone with a head of one row."""

    def __init__(self, config):
        nn.Module.__init__(self)
        self.config = config
        self.model = Qwen2(config).model
        self.score = Linear(config.hidden_size, 1)

    def tie(self):
        """It has no output head."""

    def forward(self, tokens, lengths=None, targets=None):
        """tokens (B, T) int64, as for Qwen2 -> the values at the N targets, (N,) fp32; rounded as under FSDP."""
        x, _ = at_targets(self.hidden_states(tokens, lengths=lengths), targets)
        return x.float() @ self.score.weight[0].to(x.dtype).float() + self.score.bias.to(x.dtype).float()


class PPOTrainer:
    """The actor, the reference (if --kl is not 0), the critic (with --advantage gae) and their updates. Examples are
    (token ids, loss_mask). "Per token" means a list of (N_i,) fp32 tensors on the CPU, of the examples of all
    processes; N_i counts the tokens of loss_mask."""

    def __init__(self, cfg, config, folder, num_token_ids, device):
        self.cfg = cfg
        self.num_token_ids = num_token_ids
        self.device = device
        self.threads = row_threads(config, device)
        self.flops = 0      # operations of this process since the last line of the log
        build = partial(build_model, config, folder, device, cfg.seed, compute=compute_type(cfg.dtype, device, config),
                        kernels=cfg.kernels)
        self.actor = build()
        self.reference = build().requires_grad_(False) if cfg.kl else None
        self.critic = build(make=Critic) if cfg.has_critic else None
        # What a checkpoint holds; the reference is made again from --model.
        self.models = nn.ModuleDict({"actor": self.actor})
        groups = [{"params": list(self.actor.parameters()), "lr": cfg.lr}]
        if self.critic:
            self.models["critic"] = self.critic
            groups.append({"params": list(self.critic.parameters()), "lr": cfg.critic_lr})
        # A step leaves a model alone that has no gradients, so one optimizer serves both.
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0, fused=True)

    def forward(self, model, inputs):
        """Returns the log-probs of the targets and the entropies, each (N,)."""
        tokens, lengths, targets = inputs
        logp, entropy, _ = model(tokens, lengths=lengths, targets=targets, num_token_ids=self.num_token_ids,
                                 temperature=self.cfg.temperature)
        return logp, entropy

    def cat(self, values, row):
        """Returns the per-token values of a row's examples as one tensor on the device."""
        return torch.cat([torch.zeros(0), *(values[i] for i in row.examples)]).to(self.device)

    def per_token(self, examples, forward, indices=None):
        """Returns forward(inputs) per token, of the examples `indices`, by default all."""
        indices = range(len(examples)) if indices is None else indices
        rows = packed_rows(examples, indices, *rank_and_size(), self.cfg.max_row_tokens)
        self.flops += logs.flops_of(self.actor.config, rows) / 3       # forward alone
        outputs = map_rows(lambda row: forward(row.inputs(self.device)).float().cpu(), rows, self.threads)
        results = []
        for row, output in zip(rows, outputs):
            results += zip(row.examples, output.split([sum(examples[i][1]) for i in row.examples]))
        return [values for _, values in sorted(gather(results), key=lambda result: result[0])]

    def logprobs(self, model, examples, indices=None):
        return self.per_token(examples, lambda inputs: self.forward(model, inputs)[0], indices)

    def values(self, examples):
        return self.per_token(examples, lambda inputs: self.critic(*inputs))

    def minibatches(self, groups, iteration):
        """Returns the indices of the examples of each optimizer step of an iteration. The actions of a state stay
        together, so that it is read once. groups: the number of the state of each example."""
        states = sorted(set(groups))
        parts = min(self.cfg.minibatches, len(states))
        batches = []
        for epoch in range(self.cfg.epochs):
            order = epoch_order(len(states), self.cfg.seed, iteration * self.cfg.epochs + epoch)
            for part in range(parts):
                drawn = {states[i] for i in order[part::parts]}
                batches.append([i for i, group in enumerate(groups) if group in drawn])
        return batches

    def update(self, model, examples, batches, loss_of):
        """Makes an optimizer step of a model for each of the batches, lists of indices. loss_of(row, num_tokens)
        returns a row's part of the loss, a mean over the tokens of all processes, and of statistics, a tensor. Returns
        the statistics, of all processes, and the gradients' norm, each the mean over steps."""
        sums = 0
        norms = []
        for batch in batches:
            num_tokens = sum(sum(examples[i][1]) for i in batch)        # of all processes

            def scaled_loss(row):
                loss, statistics = loss_of(row, num_tokens)
                return loss * rank_and_size()[1], statistics.detach()       # gradients are averaged over processes

            rows = packed_rows(examples, batch, *rank_and_size(), self.cfg.max_row_tokens)
            self.flops += logs.flops_of(self.actor.config, rows)
            sums = sums + add_gradients(model, rows, scaled_loss, self.threads).double()
            norms.append(optimizer_step(model, self.optimizer))
        if dist.is_initialized():
            dist.all_reduce(sums)
        return (sums / len(batches)).tolist(), torch.stack(norms).mean().item()

    def update_actor(self, examples, logp_old, adv, is_weight, batches, logp_ref=None):
        """Updates the actor by PPO's objective and returns statistics. logp_old, adv, is_weight: per token, and
        logp_ref, where the divergence is in the loss."""
        ratios = []

        def loss_of(row, num_tokens):
            logp, entropy = self.forward(self.actor, row.inputs(self.device))
            row_logp_old = self.cat(logp_old, row)
            loss, clipped = policy_loss(logp, row_logp_old, self.cat(adv, row), self.cfg.clip_low, self.cfg.clip_high)
            loss = (self.cat(is_weight, row) * loss).sum() / num_tokens
            kl = 0.0
            if logp_ref:
                kl = divergence(logp, self.cat(logp_ref, row)).sum() / num_tokens
            log_ratio = torch.cat([logp.detach() - row_logp_old, logp.new_zeros(1)])        # also of an empty row
            ratios.append(log_ratio.exp().max())
            return loss + self.cfg.kl * kl, torch.stack([loss * num_tokens, entropy.sum(), clipped.sum()]) / num_tokens

        (loss, entropy, clip_fraction), grad_norm = self.update(self.actor, examples, batches, loss_of)
        ratio_max = torch.stack(ratios).max()
        if dist.is_initialized():
            dist.all_reduce(ratio_max, dist.ReduceOp.MAX)
        num_updates = self.optimizer.state[next(self.actor.parameters())]["step"].item()
        return {"updates": int(num_updates), "policy_loss": loss, "entropy": entropy, "clip_fraction": clip_fraction,
                "ratio_max": ratio_max.item(), "grad_norm": grad_norm}

    def update_critic(self, examples, ret, value_old, batches, max_change=math.inf):
        """Brings the critic's values to the returns and returns statistics. max_change: see value_loss."""
        def loss_of(row, num_tokens):
            value = self.critic(*row.inputs(self.device))
            row_value_old = self.cat(value_old, row)
            loss = value_loss(value, row_value_old, self.cat(ret, row), max_change).sum() / num_tokens
            clipped = (value - row_value_old).abs() > max_change
            return loss, torch.stack([loss, clipped.sum() / num_tokens])

        (loss, clip_fraction), _ = self.update(self.critic, examples, batches, loss_of)
        variance = torch.cat(ret).var(correction=0)
        unexplained = (torch.cat(ret) - torch.cat(value_old)).var(correction=0)
        return {"value_loss": loss, "value_clip_fraction": clip_fraction,
                "explained_variance": (1 - unexplained / variance).item() if variance > 1e-6 else None}


# -- The loop

def iterate(cfg, worker, trainer, iteration):
    """One iteration of PPO. Returns the Transitions and statistics. RunError: nothing can be played, something is
    not finite, or sampler and trainer do not agree."""
    # 1. States of the pool, the tasks in turn; the same on all processes.
    names = worker.sample_states(iteration)

    # 2. Rollout: actions in each state, carried out, graded and rewarded while the engine samples on. Without a critic,
    # states whose actions all earned the same teach nothing but to stay with the reference.
    transitions, stats = worker.run(names, iteration)
    rewards_of_groups = group_rewards(transitions)
    learned = transitions
    if not cfg.has_critic and not cfg.kl:
        learned = [t for t in transitions if len(set(rewards_of_groups[t.group])) > 1] or transitions
    examples = [transition.example for transition in learned]
    logp_sampler = [torch.tensor(transition.logp_sampler) for transition in learned]

    # 3. Log-probs of the actor before the update and of the reference; the critic's values.
    began = time.monotonic()
    logp_old, logp_diff = sampling.old_logprobs(worker, trainer, learned, examples, logp_sampler, iteration)
    logp_ref = None
    if trainer.reference:       # rounding is no difference: whiten would make it large where all rewards are equal
        logp_ref = [torch.where((ref - old).abs() < ROUNDING, old, ref)
                    for ref, old in zip(trainer.logprobs(trainer.reference, examples), logp_old)]
    values = trainer.values(examples) if trainer.critic else None
    stats["logprobs_s"] = time.monotonic() - began
    stats |= logs.action_stats(cfg, transitions, rewards_of_groups, logp_old, logp_ref, logp_diff)

    # 4. Advantages. The critic's head begins at zero, so a few steps of the critic alone come first. A group of equal
    # actions has no advantages, so where groups are compared a reward could not bring them back to the reference.
    rewards = token_rewards(learned, logp_old, logp_ref if trainer.critic else None, cfg.kl)
    adv = ADVANTAGES[cfg.advantage](learned, rewards, values, cfg.lam)
    if trainer.critic and iteration == 0:
        ret = [a + value for a, value in zip(adv, values)]
        trainer.update_critic(examples, ret, values, [list(range(len(examples)))] * WARM_UP_STEPS)
        values = trainer.values(examples)
        adv = ADVANTAGES[cfg.advantage](learned, rewards, values, cfg.lam)

    # 5. PPO updates, of the critic and of the actor.
    batches = trainer.minibatches([transition.group for transition in learned], iteration)
    if trainer.critic:
        ret = [a + value for a, value in zip(adv, values)]
        adv = whiten(adv)
        # The return of a trajectory is a sum over as many rewards as it has steps, so its values may move farther.
        max_change = VALUE_CLIP * (cfg.steps if cfg.rollout == "episode" else 1)
        stats |= trainer.update_critic(examples, ret, values, batches, max_change)
    for transition, token_adv in zip(learned, adv):
        token_adv[transition.luck] = 0.0
        transition.advantage = token_adv.mean().item()
    is_weight = importance_weights(logp_old, logp_sampler)
    stats |= trainer.update_actor(examples, logp_old, adv, is_weight, batches, None if trainer.critic else logp_ref)

    # 6. The sampler gets the new weights.
    worker.refresh(trainer.actor)
    return transitions, stats


def train(cfg, rank, device):
    """Trains cfg.model up to cfg.iterations, from the newest checkpoint in cfg.out on. Every process runs this."""
    # 1. What is trained, and on what.
    tasks.refuse_held_out_names(tasks.names(cfg.task))
    folder, config, tokenizer = open_checkpoint(cfg.model)
    rank0_broadcast(lambda: len(prepare_tasks(cfg, LEARNED_SEEDS)))        # a Task itself cannot be sent
    if cfg.sandbox == "on":
        protection()        # tries the sandbox, before many threads ask at once
    pool = load_pool(cfg, tokenizer, cli.announce)
    use_kernels(cfg.kernels, device)
    trainer = PPOTrainer(cfg, config, folder, tokenizer.size, device)

    # 2. Where a run was stopped, it goes on. origin: what must be as it was, besides the settings.
    origin = {"products in": f"{trainer.actor.compute_dtype} on {device.type}".removeprefix("torch."),
              **rank0_broadcast(lambda: hash_inputs(cfg, folder, pool))}
    state = load_state(cfg, sorted(vars(cfg).keys() - FREE), trainer.models, trainer.optimizer, origin)
    worker = RolloutWorker(cfg, sampling.make_engine(cfg, trainer.actor, tokenizer), pool)
    if state:
        worker.chances = state["chances"]
    log = logs.Log(cfg, "iteration", cfg.iterations, state, trainer.actor, trainer.threads)
    agent = read_agent(folder)

    def export(out):
        export_model(trainer.actor, tokenizer, out)
        if rank == 0 and agent:
            write_agent(out, agent)

    # 3. The iterations.
    if cfg.export_every and log.first == 0:
        export(Path(cfg.out, "exports", "000000"))
    for iteration in range(log.first, cfg.iterations):
        start = time.monotonic()
        try:
            transitions, stats = iterate(cfg, worker, trainer, iteration)
            logs.trim_memory()
            seconds = time.monotonic() - start
            if cfg.validate_every and (iteration + 1) % cfg.validate_every == 0:
                stats["validation_reward"] = worker.validate()
        except RunError as error:
            raise RunError(f"iteration {iteration + 1}, rank {rank}: {error}; checkpoints are in {cfg.out}") from None
        update_s = seconds - stats["sample_s"] - stats["execute_s"] - stats["logprobs_s"]
        stats |= {"iteration": iteration + 1, "update_s": update_s, "seconds": seconds,
                  "elapsed_s": time.monotonic() - log.began, **log.work(trainer.flops, stats["logprobs_s"] + update_s)}
        trainer.flops = 0
        log.write(stats, logs.SHOWN)
        log.write_samples(iteration + 1, transitions)
        if cfg.export_every and (iteration + 1) % cfg.export_every == 0:    # before the checkpoint, so none is missed
            export(Path(cfg.out, "exports", f"{iteration + 1:06d}"))
        if (iteration + 1) % cfg.save_every == 0 or iteration + 1 == cfg.iterations:
            save_state(cfg, iteration + 1, trainer.models, trainer.optimizer, origin, chances=worker.chances)

    # 4. The actor as a Hugging Face folder.
    export(cfg.out)
    if rank == 0:
        print(f"Written to {cfg.out}: the model, log.jsonl, checkpoints")
        if cfg.preset == "tiny":
            print("\nNext: python eval.py")


# -- As a program

def run(cfg):
    if cfg.plan:
        print(format_plan(cfg, cfg.has_critic, reference=cfg.kl > 0, sampled_tokens=cfg.max_batch * cfg.context))
        return
    with joined(cfg, "rl.py") as (rank, _, device):
        train(cfg, rank, device)


def main(argv=None):
    cfg = cli.parse(Settings, argv, recipes.fill_rl)
    return exit_status("rl.py", partial(run, cfg), cfg.out)


if __name__ == "__main__":
    run_main(main)
