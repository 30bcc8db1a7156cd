"""What docs/real-run.sh needs besides the programs: how long its parts take, whether RL has something to learn from,
and the comparison of agents.

    python docs/real_run.py plan MODEL STATES SAMPLES TRAJECTORIES ITERATIONS
    python docs/real_run.py gate FOLDER
    python docs/real_run.py compare FOLDER AGENT AGENT ...      # one table; the last agent less the one before
"""
import sys, time
from functools import partial
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import support  # noqa: F401  before numpy

import numpy as np
import pandas
from scipy.stats import permutation_test

import sample
from support.cli import exit_status, format_table
from support.files import parse_json, read_bytes
from support.sandbox import SLOTS
from support.states import RESULTS, STATES_HASH

# Settings that agents which are compared share, beside the data of each task.
SHARED = (STATES_HASH, "samples", "steps", "temperature", "seed", "scaffold", "max_new_tokens", "sandbox", "python",
          "gpu", "threads")
NUM_COMPARISONS = 3     # that a p of a secondary measure is corrected for


# -- Comparing agents

def sign_flip_p(differences):
    """Returns the two-sided p of an exact permutation test: the share of all choices of signs of the differences under
    which their sum is at least as far from 0."""
    if len(differences) < 2:
        return 1.0
    test = permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
    return float(test.pvalue)


def read_complete(path):
    """Returns the content of states.json or of a results.json of our own. ValueError: not all of it was measured."""
    raw = read_bytes(path)
    results = parse_json(raw, RESULTS, path) if raw else {}
    if not results.get("complete") or not results["tasks"]:
        raise ValueError(f"{path} is not complete; run its eval.py again")
    return results


def mean_gap(entry):
    """Returns the mean share of the gap that trajectories closed on a task; None where there is no gap, or where the
    starter alone was run."""
    gap = entry["figures"]["best-validation"]["gap"][0] if "figures" in entry else None
    return None if gap is None else gap / 100


MEASURES = {    # name -> what follows the split in the folder's name, the file there, the figure of a task in that file
    "reward of a step": ("", "states.json", lambda entry: entry["reward"]),
    "gap closed": ("-trajectories", "results.json", mean_gap)}


def measures_of(folder):
    """Returns ({measure: {task: figure}}, {folder: what it was measured under}) of an agent's folder with held-out and
    held-in (of measure_states), held-out-trajectories and held-in-trajectories (of eval.py), as far as they are there.
    The first measure is the primary one. ValueError: one of them is not complete, or none is there."""
    measures = {}
    under = {}
    for split in ("held-out", "held-in"):
        for name, (ending, file, figure) in MEASURES.items():
            part = split + ending
            measure = measures.setdefault(f"{split}, {name}", {})
            if Path(folder, part).is_dir():
                results = read_complete(Path(folder, part, file))
                figures = {id: figure(entry) for id, entry in results["tasks"].items()}
                measure |= {id: value for id, value in figures.items() if value is not None}
                under[part] = {name: value for name, value in results["settings"].items()
                               if name in SHARED or name.startswith("data of ")}
    if not any(measures.values()):
        raise ValueError(f"{folder} holds nothing measured; expected folders such as held-out in it")
    return measures, under


def compare_agents(folder, names):
    """Returns the table of agents, folders in `folder`, and of the last less the one before: the mean difference over
    the tasks that both have, and its p, which is corrected (Bonferroni) but for the first measure. An agent without
    one of these tasks has no mean. ValueError: their states or settings differ."""
    agents = {}
    first = {}      # folder -> what it was measured under
    for name in names:
        agents[name], under = measures_of(Path(folder, name))
        for part, value in under.items():
            before = first.setdefault(part, value)
            if differing := sorted(what for what in before | value if before.get(what) != value.get(what)):
                raise ValueError(f"{Path(folder, name, part)} was measured in other states, or under other settings, "
                                 f"than those before it: {', '.join(differing)}")
    rows = [("measure", "tasks", *names, f"{names[-1]} less {names[-2]}", "p", "corrected")]
    for number, measure in enumerate(agents[names[-1]]):
        table = pandas.DataFrame({name: agents[name][measure] for name in names}, dtype=float)
        table = table.dropna(subset=names[-2:])
        means = ["-" if np.isnan(mean) else f"{mean:.3f}" for mean in table.mean(skipna=False)]
        row = [measure, str(len(table)), *means, "-", "-", "-"]
        if len(table):
            differences = table[names[-1]] - table[names[-2]]
            p = sign_flip_p(list(differences))
            row[-3:-1] = [f"{differences.mean():+.3f}", f"{p:.4f}"]
            if number:
                row[-1] = f"{min(1.0, NUM_COMPARISONS * p):.4f}"
        rows.append(row)
    return format_table(rows)


# -- The gate

LEAST_VALID = 0.5       # share of actions, and ...
LEAST_SPREAD = 0.05     # ... standard deviation of the rewards in a state, that RL can learn from


def gate(folder):
    """Returns in words that RL has something to learn from in a folder of measured states. ValueError: it has not."""
    entries = read_complete(Path(folder, "states.json"))["tasks"].values()
    valid = fmean(entry["valid"] for entry in entries)
    spread = fmean(entry["spread"] for entry in entries)
    text = (f"{valid:.0%} of the actions are valid ({LEAST_VALID:.0%} are needed); the rewards in a state spread by "
            f"{spread:.3f} ({LEAST_SPREAD} is needed)")
    if valid < LEAST_VALID or spread < LEAST_SPREAD:
        raise ValueError(f"RL has nothing to learn from: {text}")
    return text


# -- The plan

PROMPT_TOKENS = 800     # of a medium prompt with tries
ACTION_TOKENS = 70
SCRIPT_S = 2.0          # seconds of a script on a miniature
LEARNED = 324           # expert states: 9 tasks, 4 trajectories, 9 steps


def plan_parts(model, num_states, num_samples, num_trajectories, num_iterations):
    """Returns in words how long the parts of docs/real-run.sh take here, by how fast prompts are read and replies are
    sampled. A trained token costs three that are read, an update and its reference four."""
    # 1. Seconds a token.
    engine = sample.load(model, rows=8, context=1280)
    words = engine.tokenizer.encode("x = rows['size'] * 2\n" * 100)

    def measure(start, n, length):
        began = time.monotonic()
        engine.generate([words[start:start + PROMPT_TOKENS]], n=n, max_new_tokens=length, temperature=1.0)
        return time.monotonic() - began
    measure(2, 1, 1)        # the first pass is slower
    read_s = measure(0, 1, 1) / PROMPT_TOKENS
    write_s = max(1e-9, measure(1, 8, 16) - read_s * PROMPT_TOKENS) / (8 * 16)

    # 2. Seconds of the parts.
    script_s = SCRIPT_S / SLOTS.cpus
    state_s = PROMPT_TOKENS * read_s
    action_s = ACTION_TOKENS * write_s + script_s
    measure_s = 19 * num_states * (state_s + num_samples * action_s)     # of an agent on all tasks
    learn_s = 8 * (PROMPT_TOKENS + 8 * ACTION_TOKENS) * 4 * read_s
    parts = {
        "states, expert": (19 * 2 * 9 + LEARNED) * script_s,
        "gate": measure_s * 9 / 19,
        "fine-tuning": 2 * LEARNED * (PROMPT_TOKENS + ACTION_TOKENS) * 3 * read_s,
        "RL": num_iterations * (8 * (state_s + 8 * action_s) + learn_s),
        "states of four agents": 4 * measure_s,
        "trajectories of four agents": 4 * 19 * 9 * num_trajectories * (state_s + action_s)}
    rows = [[name, f"{seconds / 60:.0f}"] for name, seconds in [*parts.items(), ("all", sum(parts.values()))]]
    return (f"It reads {1 / read_s:.0f} and samples {1 / write_s:.0f} tokens a second. Minutes, about:\n"
            + format_table(rows))


def main(args):
    command, *rest = args or [""]
    if command == "compare" and len(rest) >= 3:
        work = partial(compare_agents, rest[0], rest[1:])
    elif command == "gate" and len(rest) == 1:
        work = partial(gate, *rest)
    elif command == "plan" and len(rest) == 5 and all(word.isdecimal() for word in rest[1:]):
        work = partial(plan_parts, rest[0], *map(int, rest[1:]))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return exit_status("real_run.py", lambda: print(work()), rest[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
