"""AIDE's tree search over whole scripts, as a scaffold (eval.py --scaffold aide).

A node is a plan, a script, its output, a verdict, a score that a reviewer reads in the output, and the node that it was
made from. A step makes one node: `choose` says whether to draft, debug or improve, the coder replies with plan and
script, the script runs once, the reviewer judges the output. The result is the working node with the best reported
score. There is no conversation: every request is a new prompt. The search is that of WecoAI's aideml; what differs:

- The reviewer's verdict is JSON in its reply, asked for up to three times, instead of a forced function call. Without
  one the outcome of the run and the printed score decide. A run that failed is not reviewed, as it is buggy anyway.
- The task knows whether higher is better; the reviewer's word on it is recorded and has no effect.
- Whole numbers are scores too, NaN and infinities are none.
- A missing or invalid submission makes a node buggy, and its output says why.
- Every script starts in a new workspace and in the sandbox: nothing is installed, downloaded, or left to later nodes.
- The output is stdout, then stderr. The prompts tell the steps and the time that are left, as in MLE-bench's fork.
- Each prompt is one user message. Scripts are not formatted.
"""
import functools, json, math, random, re, threading, zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import env
from env import InvalidAction, OUTCOMES, better_word, plain, printed_metric, script_text
from reward import best_of
from support.files import COUNT, FLAG, TEXT, check_form, is_number, maybe, one_of, shorten
from support.sandbox import describe

SEARCHES = {        # name -> num_drafts, debug_prob, max_debug_depth
    "aide": (5, 0.5, 3),
    "mle-bench": (5, 1.0, 20)}
TRIES = 3               # of the coder and of the reviewer
MAX_PREVIEW = 6_000     # characters


# ---------------------------------------------------------------------------------------------------------------------
# The search

@dataclass
class Node:
    """One solution. Node i is made by step i."""
    parent: int | None      # the node it was made from; None: a draft
    plan: str = ""
    summary: str = ""       # what the reviewer found
    metric: float | None = None     # the score that the reviewer reported, not to be believed
    buggy: bool = True
    review: str = "none"    # who judged: "model", or "script" where the reviewer gave no verdict; "none": not asked
    lower_is_better: bool | None = None     # as the reviewer says
    is_printed: bool = False        # the output shows the reported score
    best: int | None = None         # the best node so far


def debug_depth(nodes, i):
    """Returns how many debugging steps led to node i."""
    depth = 0
    parent = nodes[i].parent
    while parent is not None and nodes[parent].buggy:
        depth += 1
        parent = nodes[parent].parent
    return depth


def best_node(nodes, direction):
    """Returns the index of the working node with the best reported score, of equal ones the first; None: none works."""
    best = None
    for i, node in enumerate(nodes):
        if not node.buggy and (best is None or node.metric != nodes[best].metric
                               and best_of(direction, node.metric, nodes[best].metric) == node.metric):
            best = i
    return best


def choose(nodes, direction, rng, num_drafts=5, debug_prob=0.5, max_debug_depth=3):
    """Returns ("Draft", None), ("Debug", index of a node) or ("Improve", index of a node).

    The order of the draws is that of the original: past the drafts one random(), then at most one choice()."""
    if sum(node.parent is None for node in nodes) < num_drafts:     # the buggy ones too
        return "Draft", None
    if rng.random() < debug_prob:
        parents = {node.parent for node in nodes}
        broken = [i for i, node in enumerate(nodes)
                  if node.buggy and i not in parents and debug_depth(nodes, i) <= max_debug_depth]
        if broken:
            return "Debug", rng.choice(broken)
    best = best_node(nodes, direction)
    if best is None:
        return "Draft", None
    return "Improve", best
