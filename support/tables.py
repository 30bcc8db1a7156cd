"""From recorded trajectories to tables: scores, gains and their intervals, rows for the screen and for the page."""
import re
from collections import Counter

import numpy as np

from env import LOOKS, UNDOES
from reward import best_of
from support.cli import format_table
from support.disclosure import FINAL, count_work, notes, warnings
from support.records import end_reason, steps_of

RANDOM = "random-edits"         # as --model: constants changed at random, kept where the printed score is better
NUM_BOOTSTRAP = 10_000
MIN_TRAJECTORIES = 5            # of a task alone: the bootstrap of fewer is far too narrow


# -- What a trajectory scored, and what it shows of learning

def summarize_trajectory(lines, direction, starter, printed):
    """Returns what results.json says of a trajectory, from its record: its score by each rule, its best score, which an
    oracle would choose (None: it failed), and counts. starter, printed: the starter's graded and printed score."""
    steps = steps_of(lines)
    valid = [step for step in steps if step["score"] is not None]
    chosen = starter if valid else None
    best = printed
    for step in valid:
        if best_of(direction, best, step["printed"]) != best:       # of equal ones the earliest stays
            best = step["printed"]
            chosen = step["score"]
    if nodes := [step["node"] for step in steps if step.get("node")]:       # a search has its own choice
        best = nodes[-1].get("best")
        chosen = None if best is None else steps[best]["score"]
    return {"best-validation": chosen, "last-valid": valid[-1]["score"] if valid else None,
            "oracle": best_of(direction, *(step["score"] for step in valid)), "ended": end_reason(lines),
            "steps": len(steps), "valid": sum(step["valid"] for step in steps),
            **count_habits(steps, direction, printed)}


HABITS = {      # column -> the counts of a trajectory whose ratio it is
    "valid actions": ("valid", "steps"),
    "taken back after worse": ("taken_back", "worse"),
    "gone on after better": ("continued", "better")}


def count_habits(steps, direction, best):
    """Returns counts of a trajectory's edits: "worse" ones, which printed a worse score than the best before or failed,
    and of these those "taken_back" next; "better" ones of one constant, and of these those after which the same
    constant was "continued" in the same direction. Steps that only look or run are passed over, and an edit after which
    nothing came does not count. best: what the starter printed."""
    counts = dict.fromkeys(("worse", "taken_back", "better", "continued"), 0)
    steps = [step for step in steps if step["action"] not in LOOKS and not step.get("node")]
    for step, following in zip(steps, steps[1:]):
        if not step["valid"] or step["outcome"] is None or step["action"] == "Undo Edit Script":
            continue
        printed = step["printed"] if step["score"] is not None else None
        before = best
        best = best_of(direction, before, printed)
        if printed is None or printed != best:
            counts["worse"] += 1
            counts["taken_back"] += following["valid"] and following["action"] in UNDOES
        elif before is not None and best != before and changed_constant(step):
            counts["better"] += 1
            counts["continued"] += changed_constant(following) == changed_constant(step)
    return counts


def changed_constant(step):
    """Returns (name, whether its number rose) of the one constant that an edit changed; None where its difference is no
    line `NAME = number`."""
    number = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d{1,3})?"
    changes = re.findall(rf"^([-+])(\w+) = ({number})[ \t]*(?:#.*)?$", step["observation"], re.MULTILINE)
    if [sign for sign, *_ in changes] != ["-", "+"] or changes[0][1] != changes[1][1]:
        return None
    return changes[0][1], float(changes[1][2]) > float(changes[0][2])


# -- Statistics

def gain(score, result):
    """Returns the gain of a score p over the starter's b, sign * (p - b) / |b| in per cent; None where b is 0."""
    starter = result["starter"]
    difference = score - starter if result["direction"] == "up" else starter - score
    return 100 * difference / abs(starter) if starter else None


def gap_closed(score, result):
    """Returns the share of the gap from the starter's to the best known score that a score closes, in per cent from
    -100 to 100; None where the best known score is not better than the starter's."""
    starter = result["starter"]
    if best_of(result["direction"], starter, result["m_best"]) == starter:
        return None
    share = (score - starter) / (result["m_best"] - starter)
    return 100 * min(1.0, max(-1.0, share))


FIGURES = {"gain": gain, "gap": gap_closed}


def final_scores(result, rule):
    """Returns the scores of a task's trajectories by a rule, the starter's where one has failed."""
    scores = [trajectory[rule] for trajectory in result["trajectories"]]
    return [result["starter"] if score is None else score for score in scores]


def figure_values(run, tasks_played, figure, rule=None):
    """Returns for each task the figure of each of a run's trajectories. tasks_played: [{name of a run: result}]; rule:
    by default the run's own."""
    results = [by_run[run["name"]] for by_run in tasks_played]
    return [[figure(score, result) for score in final_scores(result, rule or run["results"]["final"])]
            for result in results]


def bootstrap(groups):
    """Returns (10,000,) means over tasks drawn with replacement, and of each over its trajectories drawn with
    replacement. groups: for each task a list of the trajectories' values; or two, whose means' difference counts."""
    rng = np.random.default_rng(0)
    means = np.zeros(NUM_BOOTSTRAP)
    for _ in groups:
        drawn = rng.integers(0, len(groups), NUM_BOOTSTRAP)
        for i, lists in enumerate(groups):
            places = np.flatnonzero(drawn == i)
            for values, sign in zip(lists, (1, -1)):
                picks = rng.integers(0, len(values), (len(places), len(values)))
                means[places] += sign * np.array(values, dtype=float)[picks].mean(1)
    return means / len(groups)


def mean_and_interval(groups):
    """Returns (mean, [low, high]) of bootstrap's groups: the interval of 95 %, or None of one task with fewer than
    MIN_TRAJECTORIES trajectories."""
    mean = float(np.mean([np.mean(own) - sum(map(np.mean, other)) for own, *other in groups]))
    if len(groups) == 1 and min(map(len, groups[0])) < MIN_TRAJECTORIES:
        return mean, None
    return mean, np.quantile(bootstrap(groups), [0.025, 0.975]).tolist()


def task_figures(result, rule):
    """Returns the statistics of a task's trajectories by a rule; of gain and gap with intervals."""
    scores = np.array(final_scores(result, rule), dtype=float)
    error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    figures = {"average": float(scores.mean()), "best": best_of(result["direction"], *scores.tolist()),
               "standard_error": error,
               "failed": sum(trajectory[rule] is None for trajectory in result["trajectories"])}
    for name, figure in FIGURES.items():
        values = [figure(score, result) for score in scores.tolist()]
        figures[name] = (None, None) if None in values else mean_and_interval([[values]])
    return figures


def played_result(records, result):
    """Returns what results.json says of the trajectories that are over. records: the lines of each; result: what it
    says of the starter."""
    played = []
    steps = []
    for k, lines in enumerate(records):
        if end_reason(lines):
            summary = summarize_trajectory(lines, result["direction"], result["starter"], result["printed"])
            played.append({"k": k, **summary})
            steps += steps_of(lines)
    if not played:
        return {}
    figures = {rule: task_figures(result | {"trajectories": played}, rule) for rule in FINAL}
    return {"trajectories": played, "figures": figures, "work": count_work(steps)}


# -- The tables: lists of rows {column: text}, for the screen and for the page

def format_number(x):
    if x is None:
        return "-"
    return f"{x:.1f}" if abs(x) >= 1000 else f"{x:.4f}"


def format_mean(mean, interval=None):
    text = "-" if mean is None else f"{mean:+.1f}"
    return f"{text} ({interval[0]:+.1f} to {interval[1]:+.1f})" if interval else text


def other_rule(rule):
    """Returns the rule that stands beside a run's own: there are two for what counts of a trajectory."""
    return next(name for name in FINAL if name != rule)


def format_result(result, rule):
    """Returns {column: text} of what an agent, or the starter alone, scored on a task."""
    row = {"metric": f"{result['metric']} ({result['direction']})", "starter": format_number(result["starter"])}
    if not result.get("trajectories"):      # the starter alone was run
        row["it printed"] = format_number(result["printed"])
        row["seconds"] = f"{result['seconds']:.1f}"
        return row
    figures = task_figures(result, rule)
    row |= {"average": format_number(figures["average"]), "best": format_number(figures["best"]),
            "std. error": format_number(figures["standard_error"])}
    for name in FIGURES:
        row[f"{name} %"] = format_mean(*figures[name])
    gains = [gain(score, result) for score in final_scores(result, other_rule(rule))]
    row[f"{other_rule(rule)} gain"] = format_mean(None if None in gains else np.mean(gains))
    row["failed"] = f"{figures['failed']}/{len(result['trajectories'])}"
    row["(oracle)"] = format_number(np.mean(final_scores(result, "oracle")))
    return row


def split_results(runs):
    """Returns {split: {task: {name of a run: result}}}."""
    splits = {}
    for run in runs:
        for task, result in run["results"]["tasks"].items():
            splits.setdefault(result["split"], {}).setdefault(task, {})[run["name"]] = result
    return splits


def common_results(runs):
    """Returns split_results of the tasks that all runs have played on the same data, and whose figures are known."""
    def is_common(by_run):
        played = [result for result in by_run.values() if result.get("trajectories")]
        data = {(result["starter"], result["m_best"], result["miniature"]) for result in played}
        known = all(figure(result["starter"], result) is not None for result in played for figure in FIGURES.values())
        return known and len(played) == len(runs) and len(data) == 1
    return {split: {task: by_run for task, by_run in by_task.items() if is_common(by_run)}
            for split, by_task in split_results(runs).items()}


def build_table(runs):
    """Returns Table 1 of runs [{"name", "results"}]: a row for each task and agent, also the paper's agents."""
    rules = {run["name"]: run["results"]["final"] for run in runs}
    rows = []
    for results_by_task in split_results(runs).values():
        for task, results in results_by_task.items():
            published = {}
            for name, result in results.items():
                label = f"{task} *" if result["miniature"] else task
                rows.append({"task": label, "agent": name, **format_result(result, rules[name])})
                published |= result["published"]
            for model, figures in published.items():
                texts = map(format_number, figures)
                rows.append({"task": task, "agent": f"{model} (paper)", **dict(zip(("average", "best"), texts))})
    return rows


def build_means(runs):
    """Returns a row for each split and agent: means over the tasks that all runs have, if there are two."""
    rival = next((run for run in runs if run["results"]["settings"].get("model") == RANDOM), None)
    rows = []
    for split, by_task in common_results(runs).items():
        if len(by_task) < 2:
            continue
        label = f"{len(by_task)} {split}"
        rows.append({"tasks": label, "agent": "starter"} | {f"{name} %": "+0.0" for name in FIGURES})
        for run in runs:
            rows.append({"tasks": label, "agent": run["name"], **format_means(run, rival, list(by_task.values()))})
    return rows


def format_means(run, rival, tasks_played):
    """Returns {column: text} of a run's means. rival: the run of random edits or None."""
    rule = other_rule(run["results"]["final"])
    row = {}
    beside = {}
    for name, figure in FIGURES.items():
        own = figure_values(run, tasks_played, figure)
        row[f"{name} %"] = format_mean(*mean_and_interval(list(zip(own))))
        if rival and run is not rival:
            theirs = figure_values(rival, tasks_played, figure)
            row[f"{name} over random"] = format_mean(*mean_and_interval(list(zip(own, theirs))))
        others = figure_values(run, tasks_played, figure, rule)
        beside[f"{rule} {name}"] = format_mean(np.mean(list(map(np.mean, others))))
    shares = list(map(np.mean, own))        # of the gap, the last figure
    if sum(shares) > 0:
        row["largest task"] = f"{max(shares) / sum(shares):.0%}"
    return row | beside


def build_series(runs, exports):
    """Returns the points of Figure 4, of the exports that are complete: what `exports` says of each, {name of its run:
    {name: value}}, and its gain {split: (mean, interval)}."""
    played = [run for run in runs if run["results"].get("complete")]
    points = {run["name"]: exports[run["name"]] | {"gain": {}} for run in played}
    for split, by_task in common_results(played).items():
        if not by_task:
            continue
        for run in played:
            values = figure_values(run, by_task.values(), gain)
            points[run["name"]]["gain"][split] = mean_and_interval(list(zip(values)))
    return list(points.values())


def build_ratios(runs, reference):
    """Returns the layout of Figure 3: a row for each task that all runs have, with each gain over that of the run named
    `reference`, "-" where that has no interval above 0; the last row counts the tasks on which a run gained more than
    every other. ValueError: there is no such run of an agent."""
    names = [run["name"] for run in runs]
    if reference not in names:
        raise ValueError(f"--reference: {reference} holds no evaluation of an agent")
    rows = []
    won = Counter()
    for by_task in common_results(runs).values():
        for task, by_run in by_task.items():
            figures = {run["name"]: task_figures(by_run[run["name"]], run["results"]["final"])["gain"] for run in runs}
            mean, interval = figures[reference]
            row = {"task": task, "gain of the reference %": format_mean(mean, interval)}
            for name, (own, _) in figures.items():
                row[name] = f"{own / mean:.2f}" if interval and interval[0] > 0 else "-"
            rows.append(row)
            best, *others = sorted(names, key=lambda name: figures[name][0], reverse=True)
            if others and figures[best][0] > figures[others[0]][0]:
                won[best] += 1
    return [*rows, {"task": f"won, of {len(rows)}"} | {name: str(won[name]) for name in names}]


def build_habits(runs):
    """Returns a row for each split and agent: what it did, as shares."""
    rows = []
    for split, by_task in split_results(runs).items():
        for run in runs:
            own = [by_run.get(run["name"], {}) for by_run in by_task.values()]
            played = [trajectory for result in own for trajectory in result.get("trajectories", ())]
            row = {"tasks": split, "agent": run["name"]}
            for habit, (part, whole) in HABITS.items():
                num = sum(trajectory[whole] for trajectory in played)
                row[habit] = f"{sum(trajectory[part] for trajectory in played) / num:.0%} of {num}" if num else "-"
            if played:
                rows.append(row)
    return rows


def build_tables(runs, reference=""):
    """Returns the tables of runs that have rows: [{"title", "columns", "rows"}]. reference: see build_ratios."""
    tables = {"Mean gain over the starter, and mean share of the gap to the best known score that was closed, in %":
              build_means(runs), "What the agents do": build_habits(runs), "Task by task": build_table(runs)}
    if reference:
        title = f"Gain divided by that of {reference} (-: that has no interval, or none above 0)"
        tables[title] = build_ratios(runs, reference)
    found = []
    for title, rows in tables.items():
        if rows:
            rows_by_length = sorted(rows, key=len, reverse=True)    # the longest has the columns in their order
            columns = dict.fromkeys(column for row in rows_by_length for column in row)
            found.append({"title": title, "columns": list(columns), "rows": rows})
    return found


def format_report(runs, reference=""):
    texts = []
    for table in build_tables(runs, reference):
        columns = table["columns"]
        rows = [[row.get(column, "") for column in columns] for row in table["rows"]]
        texts.append(f"{table['title']}\n\n{format_table([columns, *rows])}")
    return "\n\n".join([*warnings(runs), *texts, *notes(runs)])
