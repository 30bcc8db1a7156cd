"""The table of docs/miniature.md: several seeds of `python sft.py && python rl.py && python eval.py`, pooled.

    for seed in 1 2 3 4 5; do
        mkdir -p runs/seed-$seed
        (cd runs/seed-$seed && for program in sft rl eval; do python ../../$program.py --seed $seed; done)
    done
    python docs/seeds.py runs/seed-*/runs/eval

For each split and figure it prints an agent's mean over the tasks, the intervals of 95 % (over tasks, then over all
seeds' trajectories), the differences between agents, and the means by seed.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval import FIGURES, FINAL, HABITS, final_scores, mean_and_interval
from support.report import read_results

AGENTS = {"random edits": "random-edits", "fine-tuned": "sft", "after RL": "rl"}     # name -> its folder
PAIRS = [("fine-tuned", "random edits"), ("after RL", "random edits"), ("after RL", "fine-tuned")]


def values_of(folders, agent, split, figure, rule):
    """Returns {task: a list for each seed, of its trajectories' figures}."""
    values = {}
    for folder in folders:
        for task, result in read_results(Path(folder, AGENTS[agent]))["tasks"].items():
            if result["split"] == split:
                scores = final_scores(result, rule)
                values.setdefault(task, []).append([figure(score, result) for score in scores])
    return values


def pooled(values):
    return {task: np.concatenate(by_seed) for task, by_seed in values.items()}


def shown(groups):
    mean, (low, high) = mean_and_interval(groups)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def main(folders):
    for split in ("held-in", "held-out"):
        for name, figure in FIGURES.items():
            for rule in FINAL:
                values = {agent: values_of(folders, agent, split, figure, rule) for agent in AGENTS}
                pools = {agent: pooled(values[agent]) for agent in AGENTS}
                print(f"\n{split}, {name} in per cent, {rule}")
                for agent in AGENTS:
                    by_seed = [np.mean([each[i] for each in values[agent].values()]) for i in range(len(folders))]
                    print(f"  {agent:<25}", shown([[pool] for pool in pools[agent].values()]),
                          "by seed", *(f"{mean:.1f}" for mean in by_seed))
                for agent, other in PAIRS:
                    print(f"  {agent + ' less ' + other:<25}",
                          shown([[pools[agent][task], pools[other][task]] for task in pools[agent]]))
        for agent, folder in AGENTS.items():
            counts = {habit: np.zeros(2) for habit in HABITS}
            for path in folders:
                for result in read_results(Path(path, folder))["tasks"].values():
                    if result["split"] == split:
                        for habit, (part, whole) in HABITS.items():
                            for trajectory in result["trajectories"]:
                                counts[habit] += (trajectory[part], trajectory[whole])
            print(f"  {agent:<25}", *(f"{habit} {part / max(1, whole):.0%} " for habit, (part, whole) in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
