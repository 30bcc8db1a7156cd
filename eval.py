"""Runs the agent on tasks and prints what it scored: the means, what it learned, and the layout of the paper's Table 1.

    python eval.py                                                   # what sft.py and rl.py made, on all miniatures
    python eval.py --task leaf-classification                        # no model, no data: the starter on the miniature
    python eval.py --task leaf-classification --model DIR --raw RAW  # 8 trajectories of 15 steps on the real data
    python eval.py --task held-out --model http://host:8000/v1#name  # all of them, through an OpenAI-compatible server
    python eval.py --states FILE --model DIR --samples 8             # single actions in recorded states
    python eval.py --exports runs/rl,runs/episode                    # gain during training: rl.py --export-every
    python eval.py --compare runs/a,runs/b --reference runs/b        # runs nothing: draws what was run before

--out receives results.json (settings, versions, every score), trajectories/TASK-K.jsonl (a line a step, which
`python env.py replay FILE` runs again), blobs/ (the files of every step) and report.html, a page of scores and steps.
Ctrl-C keeps what is done; the same command goes on from there.
"""
import functools, json, math, random, re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import support  # noqa: F401  before numpy

import numpy as np

import sample
import tasks
from env import (
    SCAFFOLDS, AgentSettings, Env, make_env, model_policy, play_trajectory, prepare_tasks, printed_metric, read_agent,
    read_record)
from reward import best_of
from support import aide, cli, endpoint, miniature, mlagentbench
from support.cli import RunError, check_choices, check_positive, exit_status, format_table, refuse_torchrun, run_main
from support.disclosure import FINAL, count_work, disclose, notes, warnings
from support.distributed import check_same
from support.files import folder_lock, hash_json, refuse_links_out, write_atomic
from support.pretrained import hash_checkpoint, small_files
from support.report import STEP, read_log, read_results, write_page
from support.parallel import Progress, run_parallel
from support.sandbox import SLOTS
from support.states import format_states, measure_states, record_states
from support.storage import ResultCache
from support.records import end_reason, trajectory_files, trajectory_path

RANDOM = "random-edits"         # as --model: constants changed at random, kept where the printed score is better
MADE = {"fine-tuned": ("runs/sft", "python sft.py"), "after RL": ("runs/rl", "python rl.py")}   # name: folder, command
# float64, so that a reply does not depend on which replies are sampled beside it, as rounding would have it
MINIATURE = {"temperature": 1.0, "dtype": "float64", "trajectories": 3}
TOKENS_TOGETHER = 8 * 16_384    # of the conversations that one model holds at the same time
NUM_BOOTSTRAP = 10_000
DEFAULTS = {"aide": aide.DEFAULTS, "mlagentbench": mlagentbench.DEFAULTS}      # settings of a scaffold
TAKEN = {"seconds": "seconds", "scripts": "runs", "tokens": "sampled_tokens"}   # of training: entry of its log.jsonl
PACKAGES = ("torch", "tokenizers", "numpy", "pandas", "scikit-learn")
UNDO = "Undo Edit Script"
LOOKS = ("List Files", "Inspect Script Lines", "Understand File", "Execute Script")     # change no script
NO_MODEL = """
No --model was given, so only the starter scripts ran. To run an agent, add --model with a folder, a model of the
Hugging Face hub (Qwen/Qwen2.5-0.5B-Instruct), or any OpenAI-compatible server (http://localhost:8000/v1#name)."""


@dataclass
class Settings(AgentSettings):
    task: str = ""  # a task's id, held-in, held-out, paper (those of Table 1) or all; empty: leaf-classification, or
        # without --model too the paper in miniature: what sft.py and rl.py have made, on all tasks
    model: str = ""  # a folder, a hub id, tiny (random weights), http://host:port/v1#name, or random-edits: no model,
        # constants changed at random and changed back where the score is no better; empty: starters alone
    coder: str = "model"  # who carries out the (AI) actions: model (the same one), none, or another, as in --model
    out: str = "runs/eval"  # where the results go; a run that is there already is continued
    trajectories: int = 8  # per task
    scaffold: str = SCAFFOLDS[0]  # how the model is asked: ml-agent (the loop of this project), mlagentbench (that of
        # MLAgentBench), or aide (a search over whole scripts, whose output --coder reviews)
    search: str = "aide"  # of the scaffold aide: aide (5 drafts, debugs with probability 0.5, at most 3 deep), or
        # mle-bench (5 drafts, always debugs, at most 20 deep)
    final: str = "best-validation"  # what counts of a trajectory: best-validation (of the starter's and all valid
        # submissions that whose script printed the best score, of equal ones the earliest), or last-valid (the paper's)
    temperature: float = 0.7  # of sampling; 0 always takes the most likely token
    exports: tuple[str, ...] = ()  # evaluates all that rl.py --export-every has left in these --out of rl.py
    compare: tuple[str, ...] = ()  # draws these folders side by side into compare.html in --out, and runs nothing: the
        # --out of eval.py, of training (its log.jsonl), or collected trajectories
    reference: str = ""  # one of --compare: the gains of all are divided by its gain, as in Figure 3 of the paper
    states: str = ""  # a file of recorded states: the reward of single actions in them is measured instead
    samples: int = 8  # actions that are sampled in each state of --states
    record_states: int = 0  # states of each task, from the scripted expert, that are written to --states, once

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, final=tuple(FINAL), scaffold=SCAFFOLDS, search=tuple(aide.SEARCHES))
        check_positive(self, "trajectories", "samples")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature must be at least 0, found {self.temperature}")
        if self.record_states < 0 or self.record_states and not self.states:
            raise ValueError("--record-states must be at least 0, and needs --states FILE to write to")
        if self.states and (self.scaffold != "ml-agent" or self.coder not in ("model", "none")
                            or not (self.model or self.record_states)):
            raise ValueError("--states needs --model or --record-states, takes no --coder, and measures actions of the "
                             f"scaffold ml-agent alone, found {self.scaffold} and --coder {self.coder}")
        for spec in filter(endpoint.is_server, (self.model, self.coder)):
            endpoint.address(spec)
        if self.scaffold != SCAFFOLDS[0] and self.model in ("", RANDOM):
            raise ValueError(f"--scaffold {self.scaffold} needs a --model to ask")
        tools = mlagentbench.TOOLS
        if self.scaffold == "mlagentbench" and (self.coder == "none" or not tools.keys() >= {*self.actions}):
            raise ValueError(f"--scaffold mlagentbench needs a --coder, and --actions among {', '.join(tools)}")
        if self.compare and (self.model or self.task) or self.exports and (self.model or self.compare or self.states):
            raise ValueError("--compare takes no --model and no --task; --exports takes no --model, --compare or "
                             "--states")
        if self.reference and self.reference not in self.compare:
            raise ValueError(f"--reference must be one of --compare, found {self.reference}")
        for folder in self.compare:
            files = [Path(folder, name) for name in ("results.json", "log.jsonl")]
            if not any(map(Path.is_file, files)) and not trajectory_files(folder):
                raise ValueError(f"--compare: {folder} holds no results.json, log.jsonl or trajectories")


# ---------------------------------------------------------------------------------------------------------------------
# What a trajectory scored, and what it shows of learning

def summarize_trajectory(lines, direction, starter, printed):
    """Returns what results.json says of a trajectory, from its record: its score by each rule, its best score, which an
    oracle would choose (None: it failed), and counts. starter, printed: the starter's graded and printed score."""
    steps = [line for line in lines if line["type"] == "step"]
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
        if not step["valid"] or step["outcome"] is None or step["action"] == UNDO:
            continue
        printed = step["printed"] if step["score"] is not None else None
        before = best
        best = best_of(direction, before, printed)
        if printed is None or printed != best:
            counts["worse"] += 1
            counts["taken_back"] += following["valid"] and following["action"] in (UNDO, "Set Constant Inversely")
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


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

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
    """Returns (mean, [low, high]) of bootstrap's groups: the interval of 95 %, or None of one value alone."""
    mean = float(np.mean([np.mean(own) - sum(map(np.mean, other)) for own, *other in groups]))
    if len(groups) == 1 and len(groups[0][0]) == 1:
        return mean, None
    return mean, np.quantile(bootstrap(groups), [0.025, 0.975]).tolist()


def task_figures(result, rule):
    """Returns the statistics of a task's trajectories by a rule; of gain and gap with intervals."""
    scores = np.array(final_scores(result, rule), dtype=float)
    best = scores.max() if result["direction"] == "up" else scores.min()
    error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    figures = {"average": float(scores.mean()), "best": float(best), "standard_error": error,
               "failed": sum(trajectory[rule] is None for trajectory in result["trajectories"])}
    for name, figure in FIGURES.items():
        values = [figure(score, result) for score in scores.tolist()]
        figures[name] = (None, None) if None in values else mean_and_interval([[values]])
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# The tables: lists of rows {column: text}, for the screen and for the page

def format_number(x, form=".4f"):
    if x is None:
        return "-"
    return f"{x:.1f}" if abs(x) >= 1000 else f"{x:{form}}"


def format_mean(mean, interval=None):
    text = "-" if mean is None else f"{mean:+.1f}"
    return f"{text} ({interval[0]:+.1f} to {interval[1]:+.1f})" if interval else text


def other_rule(rule):
    return next(name for name in FINAL if name != rule)


def format_result(result, rule):
    row = {"metric": f"{result['metric']} ({result['direction']})", "starter": format_number(result["starter"])}
    if not result.get("trajectories"):      # the starter alone was run
        row["it printed"] = format_number(result["printed"])
        row["seconds"] = format_number(result["seconds"], ".1f")
        return row
    figures = task_figures(result, rule)
    row |= {"average": format_number(figures["average"]), "best": format_number(figures["best"]),
            "std. error": format_number(figures["standard_error"])}
    for name in FIGURES:
        row[f"{name} %"] = format_mean(*figures[name])
    row[f"{other_rule(rule)} gain"] = format_mean(task_figures(result, other_rule(rule))["gain"][0])
    row["failed"] = f"{figures['failed']}/{len(result['trajectories'])}"
    row["(oracle)"] = format_number(task_figures(result, "oracle")["average"])
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
    `reference`, "-" where its interval is not above 0; the last row counts the tasks on which a run gained more than
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
            total = Counter()
            for by_run in by_task.values():
                for trajectory in by_run.get(run["name"], {}).get("trajectories", ()):
                    total.update({name: trajectory[name] for pair in HABITS.values() for name in pair})
            if not total:
                continue
            shares = {habit: f"{total[part] / total[whole]:.0%} of {total[whole]}" if total[whole] else "-"
                      for habit, (part, whole) in HABITS.items()}
            rows.append({"tasks": split, "agent": run["name"], **shares})
    return rows


def build_tables(runs, reference=""):
    """Returns the tables of runs that have rows: [{"title", "columns", "rows"}]. reference: see build_ratios."""
    tables = {"Mean gain over the starter, and mean share of the gap to the best known score that was closed, in %":
              build_means(runs), "What the agents do": build_habits(runs), "Task by task": build_table(runs)}
    if reference:
        title = f"Gain divided by that of {reference} (-: its interval is not above 0)"
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


# ---------------------------------------------------------------------------------------------------------------------
# The page

def read_run(folder, name):
    """Returns what the page shows of a folder: {name, results, trajectories}."""
    refuse_links_out(folder)
    results = read_results(folder) or {"settings": {}, "tasks": {}, "final": "last-valid"}
    trajectories = []
    for path in trajectory_files(folder):
        lines = read_record(path, mend=False)
        if not lines:       # not begun
            continue
        task, _, k = path.stem.rpartition("-")
        about = results["tasks"].get(task, {})
        direction = about.get("direction") or tasks.load(task).direction
        starter = lines[0]["m_init"]
        score = summarize_trajectory(lines, direction, starter, about.get("printed"))[results["final"]]
        if not end_reason(lines):
            outcome = "unfinished"
        elif score is None:
            outcome = "failed"
        else:
            outcome = "not better" if best_of(direction, score, starter) == starter else "better"
        trajectories.append({
            "task": task, "k": int(k), "miniature": lines[0]["miniature"], "starter": starter, "score": score,
            "outcome": outcome,
            "steps": [{name: line.get(name) for name in STEP} for line in lines if line["type"] == "step"]})
    return {"name": name, "results": results, "trajectories": trajectories}


def write_report(path, folders, trained, reference="", exports=None):
    """Writes the page of folders of eval.py, {name: folder}, and of folders where something was trained, and returns
    the runs that its tables show. exports: see build_series; exports.json beside the page then receives the series."""
    runs = [read_run(folder, name) for name, folder in folders.items()]
    # the trajectories of all exports are too many for a page
    shown = [{"name": run["name"], "trajectories": [] if exports else run["trajectories"]} for run in runs]
    series = build_series(runs, exports) if exports else []
    if exports:
        write_atomic(Path(path).with_name("exports.json"), {"complete": len(series) == len(exports), "exports": series})
    agents = [run for run in runs if run["results"]["settings"].get("model")] or runs
    write_page(path, {
        "title": f"ML-Agent: {', '.join(folders)}", "warnings": warnings(runs), "notes": notes(runs),
        "tables": build_tables(agents, reference), "runs": shown, "exports": series,
        "logs": [{"name": folder, "lines": read_log(folder)} for folder in trained]})
    return agents


def compare(cfg):
    """Writes compare.html, prints its tables, and returns its path."""
    path = Path(cfg.out, "compare.html")
    runs = write_report(path, {folder: folder for folder in cfg.compare}, cfg.compare, cfg.reference)
    print("\n" + format_report(runs, cfg.reference))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation

def run_identity(cfg, infos):
    """Returns all that the trajectories depend on, {name: value}. A run is continued only under the same."""
    # where, how many, how they are counted, and how long one waits for them
    elsewhere = ("out", "data", "raw", "final", "trajectories", "exports", "compare", "reference", "reply_seconds",
                 "states", "samples", "record_states")
    identity = {name: value for name, value in json.loads(json.dumps(asdict(cfg))).items() if name not in elsewhere}
    for task, info in infos:
        kind = "miniature" if info["miniature"] else "real"
        identity[f"data of {task.id}"] = f"{kind} {hash_json([info['sha256'], info['m_init']])[:12]}"
    for name in {cfg.model} | ({cfg.coder} - {"model", "none"}):
        if name and Path(name).is_dir():     # a model that was trained anew in the same folder is another model
            identity[f"files of {name}"] = hash_checkpoint(name)
    return identity


def starter_result(cfg, task, info, home, cache):
    """Runs the starter of a task, and returns what results.json says of the task before an agent plays."""
    score, run = make_env(cfg, task, home, cache).score()
    if score is None:
        raise RunError(f"the starter of {task.id}: {run.outcome}. {run.detail}\n{run.stderr}")
    return {"metric": task.metric, "direction": task.direction, "split": task.split, "miniature": info["miniature"],
            "published": {} if info["miniature"] else task.published, "m_best": info["m_best"],
            "starter": info["m_init"] if cfg.model else score, "printed": printed_metric(run.stdout, task.metric),
            "seconds": run.seconds}


def played_result(records, task, result):
    """Returns what results.json says of the trajectories that are over. records: the lines of each; result: what it
    says of the starter."""
    played = []
    steps = []
    for k, lines in enumerate(records):
        if end_reason(lines):
            summary = summarize_trajectory(lines, task.direction, result["starter"], result["printed"])
            played.append({"k": k, **summary})
            steps += [line for line in lines if line["type"] == "step"]
    if not played:
        return {}
    figures = {rule: task_figures(result | {"trajectories": played}, rule) for rule in (*FINAL, "oracle")}
    return {"trajectories": played, "figures": figures, "work": count_work(steps)}


def load_models(cfg, num_rows, load=sample.load):
    """Returns the model that acts, and the one for the (AI) actions or None. num_rows: conversations at a time."""
    options = {"dtype": cfg.dtype, "device": cfg.device, "kernels": cfg.kernels, "context": cfg.context,
               "rows": num_rows, "timeout_s": cfg.reply_seconds}
    policy = load(cfg.model, **options)
    if policy.context and cfg.max_new_tokens >= policy.context:
        raise ValueError(f"--max-new-tokens {cfg.max_new_tokens} leaves no room in a context of {policy.context}")
    if cfg.coder == "model":
        return policy, policy
    if cfg.coder == "none":
        return policy, None
    key = endpoint.key_name(cfg.coder, cfg.model) if endpoint.is_server(cfg.coder) else None
    return policy, load(cfg.coder, **options, key=key)


def play_tasks(cfg, infos, home, cache, load):
    """Plays all trajectories that are not over, together."""
    folder = Path(cfg.out, "trajectories")
    jobs = [(task, k, trajectory_path(folder, task.id, k)) for k in range(cfg.trajectories) for task, _ in infos]
    records = {path: read_record(path) for *_, path in jobs}
    jobs = [job for job in jobs if not end_reason(records[job[-1]])]
    if not jobs:
        return
    num_rows = min(max(1, TOKENS_TOGETHER // cfg.context), len(jobs))
    model, coder = (None, None) if cfg.model == RANDOM else load_models(cfg, num_rows, load)
    progress = Progress(records, cfg.steps)

    def play(task, k, path):
        draws = f"{cfg.seed} {task.id} {k}"
        if cfg.model == RANDOM:
            policy = miniature.random_policy(cfg, task, random.Random(draws))
        else:
            policy = model_policy(cfg, model)
        search = functools.partial(aide.Env, search=aide.SEARCHES[cfg.search], draws=draws)
        make = {"ml-agent": Env, "mlagentbench": mlagentbench.Env, "aide": search}[cfg.scaffold]
        about = {"model": cfg.model, "coder": cfg.coder, "scaffold": cfg.scaffold}
        play_trajectory(cfg, task, k, path, policy, coder, home, cache, progress, about, make=make)
    try:
        run_parallel(jobs, play, num_rows, progress)
    except ValueError as error:     # with its traceback: it is nothing that settings could put right
        raise RuntimeError("a trajectory could not be played") from error


def evaluate_agent(cfg, home, load):
    """Plays what is left of a run in cfg.out and returns its results, which results.json holds too, also after an
    interruption. home: the folder of blobs/ and cache/. ValueError: a run with other settings is there."""
    folder = Path(cfg.out, "trajectories")
    folder.mkdir(parents=True, exist_ok=True)
    infos = prepare_tasks(cfg)
    identity = run_identity(cfg, infos)
    if any(folder.glob("*.jsonl")):
        before = read_results(cfg.out) or {"settings": {}}
        check_same(before["settings"], identity, cfg.out)
    cache = ResultCache(Path(home, "cache"))
    starters = run_parallel([(cfg, *pair, home, cache) for pair in infos], starter_result, SLOTS.cpus)
    results = {"complete": False, "settings": identity, "final": cfg.final,
               "tasks": {task.id: result for (task, _), result in zip(infos, starters)},
               "versions": {name: version(name) for name in PACKAGES}}
    write_atomic(Path(cfg.out, "results.json"), results)
    try:
        if cfg.model:
            play_tasks(cfg, infos, home, cache, load)
        results["complete"] = True
    finally:
        if cfg.model:
            records = []
            for task, _ in infos:
                own = [read_record(trajectory_path(folder, task.id, k)) for k in range(cfg.trajectories)]
                results["tasks"][task.id] |= played_result(own, task, results["tasks"][task.id])
                records += own
            results["disclosure"] = disclose(records, cfg.model, cfg.coder)
        write_atomic(Path(cfg.out, "results.json"), results)
    return results


def evaluate(cfg, agents=None, load=sample.load, exports=None):
    """Evaluates agents, {name: settings}, by default the one of cfg, and returns [{"name", "results"}]. cfg.out
    receives a report of all, also after an interruption. exports: see build_series."""
    agents = agents or {cfg.model or "starter": cfg}
    folders = {name: agent.out for name, agent in agents.items()}
    trained = cfg.exports or ([] if cfg.task else [folder for folder, _ in MADE.values()])
    with folder_lock(cfg.out, "eval.py"):
        if exports and trajectory_files(cfg.out):
            raise ValueError(f"{cfg.out} holds an evaluation, whose report.html the series would replace; give another "
                             "--out")
        try:
            return [{"name": name, "results": evaluate_agent(agent, cfg.out, load)} for name, agent in agents.items()]
        finally:
            write_report(Path(cfg.out, "report.html"), folders, trained, exports=exports)


# ---------------------------------------------------------------------------------------------------------------------
# The command

def agents_made(cfg):
    """Returns {name: settings} of random edits and of what sft.py and rl.py have made, for all miniatures."""
    random_agent = replace(cfg, task="all", model=RANDOM, coder="none", out=str(Path(cfg.out, RANDOM)))
    agents = {"random edits": random_agent}
    for name, (folder, command) in MADE.items():
        if Path(folder, "agent.json").is_file():
            agents[name] = replace(cfg, task="all", model=folder, out=str(Path(cfg.out, Path(folder).name)))
        else:
            print(f"Not there yet: {name}. Make {folder} with: {command}")
    if len(agents) == 1:
        raise ValueError("there is no agent to evaluate: run python sft.py, then python rl.py. Or run a starter alone: "
                         "python eval.py --task leaf-classification")
    return agents


def find_exports(run):
    """Returns the exports in a folder of rl.py, in the order of the iterations. ValueError: there are none."""
    folders = sorted(path.parent for path in Path(run, "exports").glob("??????/config.json"))
    if not folders:
        raise ValueError(f"--exports: {run} holds no exports; rl.py --export-every N makes them")
    return folders


def agents_exported(cfg):
    """Returns {name: settings} of all exports, and under each name what it took to train. ValueError: the log does not
    tell."""
    agents = {}
    taken = {}
    for run in cfg.exports:
        lines = {line.get("iteration"): line for line in read_log(run)}
        for folder in find_exports(run):
            iteration = int(folder.name)
            try:
                before = [lines[i] for i in range(1, iteration + 1)]
                sums = {name: sum(line[entry] for line in before) for name, entry in TAKEN.items()}
                updates = before[-1]["updates"] if before else 0
            except (KeyError, TypeError):
                raise ValueError(f"{run}/log.jsonl does not tell what each iteration up to {iteration} took") from None
            name = f"{run}, {iteration}"
            out = Path(cfg.out, re.sub(r"\W+", "-", run), folder.name)
            agents[name] = replace(cfg, task=cfg.task or "all", model=str(folder), out=str(out), exports=())
            taken[name] = {"run": run, "iteration": iteration, "updates": updates, **sums}
    return agents, taken


def fill(values):
    """For cli.parse: returns the settings that hold where none was typed."""
    if values["compare"]:
        return []
    model = values["model"]
    if values["states"] or not values["exports"] and (values["task"] or model):
        folder = small_files(model) if model != RANDOM else None
        agent = read_agent(folder) if folder else {}
        if values["states"]:
            length = {name: agent[name] for name in agent.keys() & {"max_new_tokens"}}      # a state has the rest
            return [("--states", {"task": "all"}), (f"{model}/agent.json", length)]
        return [(f"--scaffold {values['scaffold']}", DEFAULTS.get(values["scaffold"], {})),
                (f"{model}/agent.json", agent), ("no --task", {"task": "leaf-classification"})]
    folders = [folder for folder, _ in MADE.values()]
    if values["exports"]:
        folders = [find_exports(run)[0] for run in values["exports"]]
    agents = {f"{folder}/agent.json": read_agent(folder) for folder in folders}
    formats = [agent for agent in agents.values() if agent]
    if formats[1:] != formats[:-1]:
        raise ValueError(f"{' and '.join(agents)} differ, so one is of an older run. Train them anew, or evaluate each "
                         "with --model and --task")
    preset = {} if values["task"] else MINIATURE
    return [("the paper in miniature", preset), *agents.items()]


def main(argv=None):
    cfg = cli.parse(Settings, argv, fill)

    def work():
        refuse_torchrun("an evaluation")
        if cfg.compare:
            print(f"\nWritten to {compare(cfg)}")
        elif cfg.record_states:
            record_states(cfg)
        elif cfg.states:
            print("\n" + format_states(measure_states(cfg, sample.load, RANDOM)))
            print(f"\nWritten to {cfg.out}: states.json, and actions.jsonl with every reply")
        else:
            run(cfg)
    return exit_status("eval.py", work, cfg.out)


def run(cfg):
    agents = None
    taken = None
    if cfg.exports:
        agents, taken = agents_exported(cfg)
    elif not cfg.task:
        agents = agents_made(cfg)
    print("\n" + format_report(evaluate(cfg, agents, exports=taken)))
    if not agents and not cfg.model:
        print(NO_MODEL)
    series = ", exports.json" if cfg.exports else ""
    print(f"\nWritten to {cfg.out}: report.html{series}, and there or below the scores, results.json")


if __name__ == "__main__":
    run_main(main)
