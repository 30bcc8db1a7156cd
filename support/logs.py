"""What the logs of training say (docs/logs.md): a step of sft.py, an iteration of rl.py and its actions, and what these
take of time, memory and operations."""
import ctypes, json, resource, timeit
from collections import Counter
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import torch

from model import IGNORE, as_trees
from reward import KINDS
from support.distributed import num_parameters
from support.sandbox import SLOTS


def append_lines(path, values):
    with open(path, "a") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def log_step(cfg, figures, num_updates, left_s):
    """Writes the figures of a step to log.jsonl, and about a hundred times in a run prints them."""
    append_lines(Path(cfg.out, "log.jsonl"), [figures])
    if "valid_loss" in figures or figures["step"] % max(1, num_updates // 100) == 0:
        texts = [f"{name} {value:.4g}" for name, value in figures.items() if name != "step" and value is not None]
        print(f"step {figures['step']}/{num_updates}  {'  '.join(texts)}  ETA {timedelta(seconds=int(left_s))}",
              flush=True)


def action_stats(cfg, transitions, rewards_of_groups, logp_old, logp_ref, logp_diff):
    """Returns {name: number} about an iteration's actions. The log-probs are those of the actions learned from. To log
    something else, add a line such as "undo": fmean(step["action"] == "Undo Edit Script" for step in steps). env.Step
    tells what a step has."""
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


def log_iteration(cfg, stats, transitions):
    """Writes an iteration's statistics to log.jsonl and its actions to samples.jsonl, and prints a line."""
    append_lines(Path(cfg.out, "log.jsonl"), [stats])
    append_lines(Path(cfg.out, "samples.jsonl"), [
        {"iteration": stats["iteration"], "state": transition.state, "reply": transition.step["reply"],
         "kind": transition.step["kind"], "reward": transition.reward, "advantage": transition.advantage}
        for transition in transitions])
    names = ("reward", "reward_edits", "valid", "kl", "entropy", "clip_fraction", "explained_variance", "logp_diff_max")
    numbers = [f"{name} {stats[name]:.3g}" for name in names if stats.get(name) is not None]
    left = timedelta(seconds=int(stats["seconds"] * (cfg.iterations - stats["iteration"])))
    seconds = " + ".join(f"{stats[name]:.1f}" for name in ("sample_s", "execute_s", "logprobs_s", "update_s"))
    print(f"iteration {stats['iteration']}/{cfg.iterations}", *numbers, f"{seconds} s", f"ETA {left}", sep="  ",
          flush=True)


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
    x = torch.randn(1024, 1024, dtype=dtype)
    seconds = min(timeit.repeat(lambda: x @ x, number=1, repeat=5))
    return 2 * 1024**3 / seconds * (SLOTS.cpus if threads else 1)


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
