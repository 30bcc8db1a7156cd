"""What the logs of training say (docs/logs.md): a step of sft.py, an iteration of rl.py and its actions, and what these
take of time, memory and operations."""
import ctypes, json, resource, shutil, time, timeit
from collections import Counter
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import torch

from model import IGNORE, as_trees
from reward import KINDS
from support.distributed import gather, num_parameters, rank_and_size
from support.files import begin_log
from support.sandbox import SLOTS


# The figures of an iteration of rl.py that are printed.
SHOWN = ("reward", "reward_edits", "valid", "kl", "entropy", "clip_fraction", "explained_variance", "logp_diff_max",
         "sample_s", "execute_s", "logprobs_s", "update_s")


class Log:
    """The log.jsonl of a run, which is begun, or goes on from a state (see load_state) until step `last`. unit: what a
    step is called. model: which is trained. threads: of row_threads."""

    def __init__(self, cfg, unit, last, state, model, threads):
        self.out = cfg.out
        self.unit = unit
        self.last = last
        self.first = state["step"] if state else 0
        self.is_writer = rank_and_size()[0] == 0
        if self.is_writer:
            if self.first >= last:
                print(f"{cfg.out} is already trained, for {self.first} {unit}s; to begin anew give another --out")
            elif state:
                print(f"{cfg.out}: going on after {unit} {self.first}", flush=True)
            for name in ("log.jsonl", "samples.jsonl"):
                begin_log(Path(cfg.out, name), state)
            for folder in Path(cfg.out, "exports").glob("[0-9]" * 6):
                if not state or int(folder.name) > self.first:      # of iterations that come anew
                    shutil.rmtree(folder)
        self.device = next(model.parameters()).device
        self.peak = peak_flops(self.device, model.compute_dtype, threads)
        self.began = time.monotonic()

    def work(self, flops, seconds):
        """Returns the share of the peak that these operations have reached, the mean over processes, and the memory of
        this one. flops: of this process. Every process must call this."""
        flops = sum(gather([flops])) / rank_and_size()[1]
        mfu = flops / seconds / self.peak if self.peak else None
        return {"mfu": mfu, "peak_gib": peak_memory(self.device) / 2**30}

    def write(self, figures, shown=None):
        """Appends the figures of a step and prints them: those that are `shown`, every time; without it all of them,
        about a hundred times in a run."""
        self.append("log.jsonl", [figures])
        step = figures[self.unit]
        if self.is_writer and (shown or "valid_loss" in figures or step % max(1, self.last // 100) == 0):
            left_s = (time.monotonic() - self.began) / (step - self.first) * (self.last - step)
            texts = [f"{name} {figures[name]:.4g}" for name in shown or figures
                     if name != self.unit and figures.get(name) is not None]
            print(f"{self.unit} {step}/{self.last}", *texts, f"ETA {timedelta(seconds=int(left_s))}", sep="  ",
                  flush=True)

    def write_samples(self, iteration, transitions):
        """Appends the actions of an iteration to samples.jsonl."""
        self.append("samples.jsonl", [
            {"iteration": iteration, "state": transition.state, "reply": transition.step["reply"],
             "kind": transition.step["kind"], "reward": transition.reward, "advantage": transition.advantage}
            for transition in transitions])

    def append(self, name, lines):
        if self.is_writer:
            with open(Path(self.out, name), "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def rollout_stats(counts, chances, sample_s, execute_s):
    """Returns {name: number} about the work of a rollout. counts: of runs, hits of the cache and sampled tokens, of
    all processes. chances: of the states, see RolloutWorker."""
    return {"left_out": sum(chance == 0 for chance in chances.values()), "runs": counts["runs"],
            "sampled_tokens": counts["sampled_tokens"],
            "cache_hits": counts["hits"] / max(1, counts["hits"] + counts["runs"]),
            "sample_s": sample_s, "execute_s": execute_s,
            "sampled_tokens_s": counts["sampled_tokens"] / (sample_s + execute_s)}


def action_stats(cfg, transitions, rewards_of_groups, logp_old, logp_ref, logp_diff):
    """Returns {name: number} about an iteration's actions. The log-probs are those of the actions learned from. To log
    something else, add a line such as "undo": fmean(step["valid"] and step["action"] in UNDOES for step in steps).
    env.Step tells what a step has (an invalid one may have an action, too); `from env import UNDOES` what takes an edit
    back."""
    steps = [transition.step for transition in transitions]
    rewards = torch.tensor([step["reward"] for step in steps])
    kinds = Counter(step["kind"] for step in steps)
    edits = [step["reward"] for step in steps if step["outcome"] and step["action"] != "Execute Script"]
    logp_old = torch.cat(logp_old)
    by_task = {}
    for transition in transitions:
        by_task.setdefault(transition.state.rpartition("-")[0], []).append(transition.reward)
    stats = {
        "reward": rewards.mean().item(), "reward_std": rewards.std(correction=0).item(),
        "reward_min": rewards.min().item(), "reward_max": rewards.max().item(),
        **{f"share_{kind.replace(' ', '_')}": kinds[kind] / len(steps) for kind in KINDS},
        "reward_of_tasks": {task: fmean(rewards_of_task) for task, rewards_of_task in sorted(by_task.items())},
        "valid": fmean(step["valid"] for step in steps),
        "reward_edits": sum(edits) / len(edits) if edits else None,
        "zero_variance_groups": fmean(len(set(rewards)) == 1 for rewards in rewards_of_groups.values()),
        "truncated": fmean(len(transition.tokens) >= cfg.max_new_tokens for transition in transitions),
        "action_tokens": fmean(len(transition.tokens) for transition in transitions),
        "logp_diff_mean": logp_diff.mean().item(), "logp_diff_max": logp_diff.max().item()}
    if logp_ref:
        diff = (torch.cat(logp_ref) - logp_old).clamp(-10, 10)
        stats |= {"kl": -diff.mean().item(), "kl_k3": (diff.exp() - 1 - diff).mean().item()}
    return stats


def peak_memory(device):
    """Returns the most bytes that the GPU has held, or the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def trim_memory():
    """Gives freed memory back to the system. The C library keeps it in pieces of odd sizes, more with every step whose
    rows have other lengths: 15 GiB instead of 12 after 34 updates of a 0.5B."""
    ctypes.CDLL(None).malloc_trim(0)


def peak_flops(device, dtype, threads=None):
    """Returns the operations a second of a device: the vendor's of a known GPU, None of another; measured on a CPU, of
    all of `threads` (of row_threads) where they compute rows."""
    if device.type == "cuda":
        vendor = {"H100": 989e12, "H200": 989e12, "A100": 312e12}       # dense bfloat16
        name = torch.cuda.get_device_name(device)
        return next((flops for key, flops in vendor.items() if key in name), None)
    x = torch.randn(512, 512, dtype=dtype)      # no larger: a CPU without units for bfloat16 takes 0.3 s
    seconds = min(timeit.repeat(lambda: x @ x, number=1, repeat=4))
    return 2 * 512**3 / seconds * (SLOTS.cpus if threads else 1)


def flops_of(config, rows):
    """Returns the operations of a training step over packed rows: 6 a token for each weight, and 12 for each pair of
    tokens that attend, unit of width and layer (PaLM, arXiv 2204.02311, appendix B)."""
    block, table, _, _ = num_parameters(config)
    num_tokens = sum(len(row.tokens) for row in rows)
    num_targets = sum(target != IGNORE for row in rows for target in row.targets)
    pairs = 0
    for row in rows:
        for prefix, branches in as_trees(row.lengths):
            pairs += prefix * prefix / 2 + sum(length * (prefix + length / 2) for length in branches)
    return (6 * num_tokens * block * config.num_hidden_layers + 6 * num_targets * table
            + 12 * pairs * config.hidden_size * config.num_hidden_layers)
