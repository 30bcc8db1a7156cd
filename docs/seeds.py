"""The table of docs/miniature.md: several seeds of `python sft.py && python rl.py && python eval.py`, pooled.

    for seed in 11 12 13 14 15; do
        mkdir -p runs/seed-$seed
        (cd runs/seed-$seed
         python ../../sft.py --seed $seed
         python ../../rl.py --seed $seed
         python ../../eval.py --seed $seed --trajectories 20)
    done
    python docs/seeds.py runs/seed-*/runs/eval

For each split and figure it prints an agent's mean over the tasks, the intervals of 95 % (over tasks, then over all
seeds' trajectories), the differences between agents, and the means by seed.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.report import read_results
from support.tables import FIGURES, FINAL, HABITS, final_scores, format_mean, mean_and_interval

AGENTS = {"random edits": "random-edits", "fine-tuned": "sft", "after RL": "rl"}     # name -> its folder
PAIRS = [("fine-tuned", "random edits"), ("after RL", "random edits"), ("after RL", "fine-tuned")]


def pooled(folders, agent, data):
    """Returns {task: what results.json says of it, with the trajectories of all folders, in order}. data: {task: what
    is the same wherever it was played}, which the first folder fills."""
    found = {}
    nums = set()        # of trajectories of a task in a folder
    for folder in folders:
        results = read_results(Path(folder, AGENTS[agent]))
        if not results or not results["complete"]:
            sys.exit(f"{folder}/{AGENTS[agent]} is not complete; run its eval.py again")
        for task, result in results["tasks"].items():
            own = [result[name] for name in ("starter", "m_best", "miniature")]
            if data.setdefault(task, own) != own:
                sys.exit(f"{folder}/{AGENTS[agent]}: {task} has other data than in the folders before (starter, best "
                         f"known score, miniature: {own}, not {data[task]}); such runs cannot be pooled")
            found.setdefault(task, result | {"trajectories": []})["trajectories"] += result["trajectories"]
            nums.add(len(result["trajectories"]))
    if len(nums) > 1:
        sys.exit(f"the seeds of {AGENTS[agent]} have {sorted(nums)} trajectories of a task; all must have as many")
    return found


def shown(groups):
    return format_mean(*mean_and_interval(groups))


def main(folders):
    if not folders:
        sys.exit(__doc__)
    data = {}
    pools = {agent: pooled(folders, agent, data) for agent in AGENTS}
    for split in ("held-in", "held-out"):
        own = {agent: [result for result in pool.values() if result["split"] == split] for agent, pool in pools.items()}
        for name, figure in FIGURES.items():
            for rule in FINAL:
                print(f"\n{split}, {name} in per cent, {rule}")
                values = {agent: [[figure(score, result) for score in final_scores(result, rule)] for result in results]
                          for agent, results in own.items()}
                for agent in AGENTS:
                    by_seed = np.reshape(values[agent], (len(values[agent]), len(folders), -1)).mean((0, 2))
                    print(f"  {agent:<25}", shown(list(zip(values[agent]))),
                          "by seed", *(f"{mean:.1f}" for mean in by_seed))
                for agent, other in PAIRS:
                    print(f"  {agent + ' less ' + other:<25}", shown(list(zip(values[agent], values[other]))))
        for agent, results in own.items():
            played = [trajectory for result in results for trajectory in result["trajectories"]]
            sums = {habit: [sum(each[name] for each in played) for name in names] for habit, names in HABITS.items()}
            print(f"  {agent:<25}", *(f"{habit} {part / max(1, whole):.0%} " for habit, (part, whole) in sums.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
