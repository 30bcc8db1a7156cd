"""Runs the agent on tasks and prints what it scored, in the layout of the paper's Table 1.

    python eval.py                                                   # what sft.py and rl.py made, on all miniatures
    python eval.py --task leaf-classification                        # no model, no data: the starter on the miniature
    python eval.py --task leaf-classification --model DIR --raw RAW  # 8 trajectories of 15 steps on the real data
    python eval.py --task held-out --model http://host:8000/v1#name  # all of them, through an OpenAI-compatible server
    python eval.py --compare runs/a,runs/b,runs/rl                   # runs nothing: draws what was run before

All trajectories of all tasks run together through one model. --out receives results.json (settings, versions, every
score), trajectories/TASK-K.jsonl (a line a step; `python env.py replay FILE` runs it again), blobs/ (the files of every
step) and report.html, a page that shows all of it. Ctrl-C keeps what is done; the same command goes on from there.

The score of a trajectory is that of its final submission, the last valid one. A trajectory that left none has failed;
it counts at the starter's score. The gain of a score p over the starter's b is sign * (p - b) / |b|, in per cent.
Exit status: 0 done, 1 failed or interrupted, 2 bad arguments.
"""
import json, math, sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import sample
import tasks
from env import (
    AgentSettings, Progress, ResultCache, end_reason, make_env, model_policy, play_trajectory, prepare_tasks,
    printed_metric, read_agent, read_record, run_parallel, trajectory_files, trajectory_path)
from support.pretrained import hash_checkpoint
from reward import best_of
from support import cli, endpoint
from support.cli import RunError, check_choices, check_positive, exit_status, format_table, refuse_torchrun, run_main
from support.files import folder_lock, hash_json, refuse_links_out, shorten, write_atomic
from support.report import FINAL, read_log, read_results, write_page

MADE = {"fine-tuned": ("runs/sft", "python sft.py"), "after RL": ("runs/rl", "python rl.py")}   # name: folder, command
POOL = "runs/trajectories"      # where both keep the results of scripts
# float64, so that a reply does not depend on which replies are sampled beside it, as rounding would have it
MINIATURE = {"temperature": 1.0, "dtype": "float64"}
TOKENS_TOGETHER = 8 * 16_384    # of the conversations that one model holds at the same time
NUM_BOOTSTRAP = 10_000
PACKAGES = ("torch", "tokenizers", "numpy", "pandas", "scikit-learn")
FIGURES = ("average", "best", "gain %", "95 % interval", "best gain %", "std. error", "failed")  # of an agent on a task
COMPARED = FIGURES[:4]          # where several runs stand side by side
STARTER_FIGURES = ("it printed", "seconds")
NO_MODEL = """
No --model was given, so only the starter scripts ran. To run an agent, add one of
  --model Qwen/Qwen2.5-0.5B-Instruct       a model on the Hugging Face hub, downloaded when first used
  --model models/qwen                      a folder; hf download Qwen/Qwen2.5-7B-Instruct --local-dir models/qwen
  --model http://localhost:8000/v1#name    any OpenAI-compatible server; its key is read from OPENAI_API_KEY
"""


@dataclass
class Settings(AgentSettings):
    task: str = ""  # a task's id, held-in, held-out, paper (those of Table 1) or all; empty: leaf-classification, or
        # without --model too the paper in miniature: what sft.py and rl.py have made, on all tasks
    model: str = ""  # a folder, a hub id, tiny (random weights), or http://host:port/v1#name; empty: starters alone
    coder: str = "model"  # who carries out the (AI) actions: model (the same one), none, or another, as in --model;
        # the key of a server on another host is read from OPENAI_API_KEY_CODER
    out: str = "runs/eval"  # where the results go; a run that is there already is continued
    trajectories: int = 8  # per task
    final: str = "last-valid"  # what counts of a trajectory: last-valid, or best-validation (by the printed score)
    temperature: float = 0.7  # of sampling; 0 always takes the most likely token
    compare: tuple[str, ...] = ()  # draws these folders side by side into compare.html in --out, and runs nothing: the
        # --out of eval.py, of training (its log.jsonl), or collected trajectories
    top_p = 1.0     # no setting: replies are sampled from all tokens

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, final=tuple(FINAL))
        check_positive(self, "trajectories")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature must be at least 0, found {self.temperature}")
        for spec in filter(endpoint.is_server, (self.model, self.coder)):
            endpoint.address(spec)
        if self.compare and (self.model or self.task):
            raise ValueError("--compare runs nothing, so it takes no --model and no --task")
        for folder in self.compare:
            files = [Path(folder, name) for name in ("results.json", "log.jsonl")]
            if not any(map(Path.is_file, files)) and not trajectory_files(folder):
                raise ValueError(f"--compare: {folder} holds no results.json, log.jsonl or trajectories")


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def summarize_trajectory(lines, direction, final):
    """Returns what results.json says of a trajectory, from the lines of its record: the score of its final submission
    by the rule `final` (None: it failed), its best score (which an oracle would choose), and counts."""
    steps = [line for line in lines if line["type"] == "step"]
    valid = [step for step in steps if step["score"] is not None]
    printed = [step for step in valid if step["printed"] is not None]
    sign = 1 if direction == "up" else -1
    chosen = valid[-1] if valid else {}
    if final == "best-validation" and printed:      # of equal ones the latest
        chosen = max(printed, key=lambda step: (sign * step["printed"], step["index"]))
    oracle = max(valid, key=lambda step: sign * step["score"], default={})
    return {"score": chosen.get("score"), "oracle": oracle.get("score"), "ended": end_reason(lines),
            "steps": len(steps), "valid_replies": sum(step["valid"] for step in steps),
            "sandbox": sorted({step["sandbox"] for step in steps if step["sandbox"]})}


def gain(score, starter, direction):
    """Returns the relative gain of a score over the starter's, in per cent; None where the starter's is 0."""
    if starter == 0:
        return None
    difference = score - starter if direction == "up" else starter - score
    return 100 * difference / abs(starter)


def bootstrap(values, seed):
    """Returns (10,000,) averages of samples drawn from the values with replacement, each as many as there are."""
    values = np.array(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(0, len(values), (NUM_BOOTSTRAP, len(values)))
    return values[drawn].mean(1)


def percentile_interval(averages):
    """Returns [low, high] of the middle 95 %."""
    return np.quantile(averages, [0.025, 0.975]).tolist()


def summary(scores, starter, direction, seed=0):
    """Returns the statistics of a task's trajectories. scores: one for each, None where it failed, which counts as
    `starter`. The interval is that of the average, by bootstrap; it and the standard error need two scores."""
    values = np.array([starter if score is None else score for score in scores], dtype=float)
    average = float(values.mean())
    best = float(values.max() if direction == "up" else values.min())
    error = interval = None
    if len(values) > 1:
        error = float(values.std(ddof=1) / np.sqrt(len(values)))
        interval = percentile_interval(bootstrap(values, seed))
    return {"average": average, "best": best, "gain": gain(average, starter, direction),
            "best_gain": gain(best, starter, direction), "standard_error": error, "interval": interval,
            "failed": scores.count(None), "trajectories": len(scores)}


def mean_gain(results, counted="score", seed=0):
    """Returns (mean, low, high) of the gains on several tasks, in per cent. results: what results.json says of each
    task. The interval tells how the mean would vary with other trajectories on the same tasks: those of each task are
    drawn anew, with replacement."""
    averages = []
    for i, result in enumerate(results):
        scores = [trajectory[counted] for trajectory in result["trajectories"]]
        scores = [result["starter"] if score is None else score for score in scores]
        gains = [gain(score, result["starter"], result["direction"]) for score in scores]
        averages.append(bootstrap(gains, seed + i))
    mean = float(np.mean([result[f"{counted}_summary"]["gain"] for result in results]))
    return mean, *percentile_interval(np.mean(averages, 0))


# ---------------------------------------------------------------------------------------------------------------------
# The table

def format_number(x, form=".4f"):
    if x is None:
        return "-"
    return f"{x:.1f}" if abs(x) >= 1000 else f"{x:{form}}"


def format_interval(ends):
    return " to ".join(format_number(end, "+.1f") for end in sorted(ends)) or "-"


def format_figures(result, counted):
    """Returns {column: text} for what results.json says of a task."""
    figures = result.get(f"{counted}_summary")
    if figures is None:
        return {"it printed": format_number(result.get("printed")),
                "seconds": format_number(result.get("seconds"), ".1f")}
    ends = []
    if figures["interval"] and result["starter"]:
        ends = [gain(score, result["starter"], result["direction"]) for score in figures["interval"]]
    return {"average": format_number(figures["average"]), "best": format_number(figures["best"]),
            "gain %": format_number(figures["gain"], "+.1f"), "95 % interval": format_interval(ends),
            "best gain %": format_number(figures["best_gain"], "+.1f"),
            "std. error": format_number(figures["standard_error"]),
            "failed": f"{figures['failed']}/{figures['trajectories']}"}


def all_miniature(runs):
    return all(result["miniature"] for run in runs for result in run["results"]["tasks"].values())


def group_by_task(runs):
    """Returns {(split, task, metric, starter): {number of a run: what its results.json says of the task}}. Runs stand
    together where they had the same data; a task's text says where scores mean less than they seem to."""
    groups = {}
    only_miniature = all_miniature(runs)
    for n, run in enumerate(runs):
        for task, result in run["results"]["tasks"].items():
            if result["miniature"] and not only_miniature:
                task += " (miniature)"
            if run["results"]["settings"].get("sandbox") == "off":
                task += " (sandbox off)"
            metric = f"{result['metric']} ({result['direction']})"
            group = groups.setdefault((result["split"], task, metric, format_number(result["starter"])), {})
            group[n] = result
    return groups


def table(runs, counted="score"):
    """Returns Table 1 of one run or several, [{"name", "results"}], as (rows, published, means).

    rows: lists of texts; two heads, then a row for each task and, below the tasks of a split, their mean gain.
    published: for each row the texts of the paper's figures. means: [(split, number of tasks, {name of a run: (mean,
    low, high)})] over the tasks that all runs have, where the starter's score is not 0. counted: score or oracle.
    """
    # 1. What stands in the rows and columns
    groups = group_by_task(runs)
    first = {key: next(iter(group.values())) for key, group in groups.items()}
    models = list(dict.fromkeys(model for result in first.values() for model in result["published"]))
    columns = COMPARED if len(runs) > 1 else FIGURES
    if not any(run["results"]["settings"].get("model") for run in runs):
        columns = STARTER_FIGURES

    # 2. The heads; several runs are named above their columns
    heads = ["task (miniature)" if all_miniature(runs) else "task", "metric", "starter"]
    names = [""] * len(columns) * len(runs)
    if len(runs) > 1:
        names[::len(columns)] = [run["name"] for run in runs]
    rows = [["", "", "", *names], [*heads, *columns * len(runs)]]
    published = [["published"] * len(models), models]
    means = []
    for split in dict.fromkeys(key[0] for key in groups):
        # 3. A row for each task of the split
        common = []
        for key in [key for key in groups if key[0] == split]:
            results = [groups[key].get(n, {}) for n in range(len(runs))]
            texts = [format_figures(result, counted) for result in results]
            rows.append([*key[1:], *(text.get(column, "-") for text in texts for column in columns)])
            pairs = [first[key]["published"].get(model, [None]) for model in models]
            published.append([" / ".join(map(format_number, pair)) for pair in pairs])
            if all(result.get(f"{counted}_summary", {}).get("gain") is not None for result in results):
                common.append(results)

        # 4. The mean of their gains
        if common:
            mean = {run["name"]: mean_gain([results[n] for results in common], counted) for n, run in enumerate(runs)}
            means.append((split, len(common), mean))
        if len(common) > 1:
            texts = [{"gain %": format_number(value, "+.1f"), "95 % interval": format_interval(ends)}
                     for value, *ends in mean.values()]
            rows.append([f"mean of {len(common)} {split} tasks", "", "",
                         *(text.get(column, "") for text in texts for column in columns)])
            published.append([""] * len(models))
    return rows, published, means


def warnings(runs):
    """Returns the texts that have to be read before any result of these runs."""
    texts = []
    for run in runs:
        results = run["results"]
        if any(part["miniature"] for part in (*results["tasks"].values(), *run.get("trajectories", ()))):
            texts.append("Miniature data are made up from a seed: scores on them do not compare with published ones.")
        if not results.get("complete", True):
            texts.append(f"{run['name']} is not complete; this is what was done when it stopped.")
        if results["settings"].get("sandbox") == "off":
            texts.append("The sandbox was off: scripts could read the answers.")
    return list(dict.fromkeys(texts))


def counting_rule(runs):
    """Returns what one has to know to read the table."""
    rules = dict.fromkeys(FINAL[run["results"]["final"]] for run in runs if run["results"]["tasks"])
    return (f"Counted is {' or '.join(rules)} of each trajectory; one without any has failed and counts at the\n"
            "starter's score. The interval is that of the gain: the middle 95 % of bootstrap samples of the\n"
            "trajectories.")


def report(runs):
    """Returns the tables of one run or several as text."""
    parts = warnings(runs)
    rows, published, _ = table(runs)
    if not any(run["results"]["settings"]["model"] for run in runs):
        return "\n\n".join([*parts, format_table(rows)])
    for run in runs:
        settings = run["results"]["settings"]
        played = []
        for result in run["results"]["tasks"].values():
            played += result.get("trajectories", [])
        ends = Counter(trajectory["ended"] for trajectory in played).most_common()
        valid = sum(trajectory["valid_replies"] for trajectory in played)
        steps = sum(trajectory["steps"] for trajectory in played)
        parts.append(f"{run['name']}: model {settings['model']}, at most {settings['steps']} steps. How they ended: "
                     f"{', '.join(f'{end} {count}' for end, count in ends)}. Valid replies: {valid} of {steps}.")
    parts += [counting_rule(runs), format_table(rows)]
    if len(runs) == 1:
        parts.append("Not a result: the best graded step of each trajectory, which no agent can know.\n"
                     + format_table(table(runs, "oracle")[0]))
    if any(published):
        rows = [[*cells[:2], *figures] for cells, figures in zip(rows[1:], published[1:]) if set(figures) - {"", "-"}]
        parts.append("Published in Table 1 of the paper: average / best over 8 trajectories.\n" + format_table(rows))
    return "\n\n".join(parts)


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
        direction = results["tasks"].get(task, {}).get("direction") or tasks.load(task).direction
        starter = lines[0]["m_init"]
        score = summarize_trajectory(lines, direction, results["final"])["score"]
        state = "not better" if best_of(direction, score, starter) == starter else "better"
        if score is None:
            state = "failed"
        if not end_reason(lines):
            state = "unfinished"
        percent = None if score is None else gain(score, starter, direction)
        trajectories.append({
            "task": task, "k": int(k), "miniature": lines[0]["miniature"], "starter": starter, "score": score,
            "direction": direction, "state": state, "gain": format_number(percent, "+.1f"),
            "ideas": lines[0].get("ideas", []), "steps": [line for line in lines if line["type"] == "step"]})
    return {"name": name, "results": results, "trajectories": trajectories}


def write_report(path, folders, title, trained):
    """Writes the page of folders of eval.py, {name: folder}, and of folders where something was trained."""
    runs = [read_run(folder, name) for name, folder in folders.items()]
    agents = [run for run in runs if run["results"]["settings"].get("model")]
    rows, published, means = table(agents or runs)
    for run in runs:
        run["text"] = ""
        if run["results"]["settings"]:
            about = {name: run["results"][name] for name in ("settings", "versions")}
            run["text"] = f"{report([run])}\n\n{json.dumps(about, indent=1)}"
    write_page(path, {
        "title": f"ML-Agent: {title}", "warnings": warnings(runs), "means": means, "runs": runs,
        "table": [[*cells, *figures] for cells, figures in zip(rows, published)],
        "note": counting_rule(runs) if means else "",
        "logs": [{"name": folder, "lines": read_log(folder)} for folder in trained]})


def compare(cfg):
    """Writes compare.html, which shows the folders of --compare side by side, and returns its path."""
    path = Path(cfg.out, "compare.html")
    folders = {folder: folder for folder in cfg.compare}
    write_report(path, folders, f"{', '.join(folders)} side by side", trained=folders)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation

def run_identity(cfg, infos):
    """Returns {name: value} of all that the trajectories depend on. A run is continued only under the same."""
    elsewhere = ("out", "data", "raw", "final", "trajectories", "compare")      # where, how many, how they are counted
    identity = {name: value for name, value in json.loads(json.dumps(asdict(cfg))).items() if name not in elsewhere}
    for task, info in infos:
        kind = "miniature" if info["miniature"] else "real"
        identity[f"data of {task.id}"] = f"{kind} {hash_json([info['sha256'], info['m_init']])[:12]}"
    models = [cfg.model] if cfg.coder in ("model", "none") else [cfg.model, cfg.coder]
    for name in models:
        if name and Path(name).is_dir():    # a model that was trained anew in the same folder is another model
            identity[f"files of {name}"] = hash_checkpoint(name)
    return identity


def check_same(out, identity):
    """Raises ValueError, which names what differs, where `out` holds trajectories made under another identity."""
    if not any(Path(out, "trajectories").glob("*.jsonl")):
        return
    before = (read_results(out) or {"settings": {}})["settings"]
    differ = [f"{shorten(name, 80)} was {shorten(repr(before.get(name)), 200)} and is {identity.get(name)!r}"
              for name in {**before, **identity} if before.get(name) != identity.get(name)]
    if differ:
        raise ValueError(f"{out} holds a run with other settings: {'; '.join(differ)}. "
                         "Give another --out, or delete that folder.")


def task_summary(task, info):
    """Returns what results.json says of a task whatever was run."""
    return {"metric": task.metric, "direction": task.direction, "split": task.split, "miniature": info["miniature"],
            "starter": info["m_init"], "published": {} if info["miniature"] else task.published}


def collect_results(cfg, infos):
    """Returns what results.json says of each task: the trajectories that are over, and their statistics."""
    results = {}
    for task, info in infos:
        played = []
        for k in range(cfg.trajectories):
            lines = read_record(trajectory_path(Path(cfg.out, "trajectories"), task.id, k))
            if end_reason(lines):
                played.append({"k": k, **summarize_trajectory(lines, task.direction, cfg.final)})
        results[task.id] = {**task_summary(task, info), "trajectories": played}
        for counted in ("score", "oracle") if played else ():
            scores = [trajectory[counted] for trajectory in played]
            results[task.id][f"{counted}_summary"] = summary(scores, info["m_init"], task.direction, cfg.seed)
    return results


def run_starters(cfg, infos, cache):
    """Runs each starter once, and returns what results.json says of each task."""
    results = {}
    for task, info in infos:
        score, result = make_env(cfg, task, cfg.out, cache).score()
        if score is None:
            raise RunError(f"the starter of {task.id}: {result.outcome}. {result.detail}\n{result.stderr}")
        results[task.id] = {
            **task_summary(task, info), "starter": score, "printed": printed_metric(result.stdout, task.metric),
            "seconds": result.seconds, "sandbox": result.sandbox}
    return results


def load_models(cfg, num_rows, load=sample.load):
    """Returns the model that acts, and the one that carries out the (AI) actions or None. num_rows: conversations that
    each holds at the same time."""
    options = {"dtype": cfg.dtype, "device": cfg.device, "kernels": cfg.kernels, "context": cfg.context,
               "rows": num_rows}
    policy = load(cfg.model, **options)
    if policy.context and cfg.max_new_tokens >= policy.context:
        raise ValueError(f"--max-new-tokens {cfg.max_new_tokens} leaves no room in a context of {policy.context}")
    if cfg.coder == "model":
        return policy, policy
    if cfg.coder == "none":
        return policy, None
    return policy, load(cfg.coder, **options, key=endpoint.coder_key(cfg.coder, cfg.model))


def play_tasks(cfg, infos, home, cache, load):
    """Plays all trajectories that are not over, together."""
    folder = Path(cfg.out, "trajectories")
    jobs = [(task, k, trajectory_path(folder, task.id, k)) for k in range(cfg.trajectories) for task, _ in infos]
    records = {path: read_record(path) for *_, path in jobs}
    progress = Progress(records, cfg.steps)
    jobs = [job for job in jobs if job[-1] not in progress.over]
    if not jobs:
        return
    if any(records.values()):
        print(f"{cfg.out}: {len(progress.over)} of {len(records)} trajectories are done; going on", file=sys.stderr)
    num_rows = min(max(1, TOKENS_TOGETHER // cfg.context), len(jobs))
    policy, coder = load_models(cfg, num_rows, load)

    def play(task, k, path):
        play_trajectory(cfg, task, k, path, model_policy(cfg, policy), coder, home, cache, progress,
                        {"model": cfg.model, "coder": cfg.coder})
    try:
        run_parallel(jobs, play, num_rows, progress)
    except ValueError as error:     # with its traceback: it is nothing that settings could put right
        raise RuntimeError("a trajectory could not be played") from error


def open_run(cfg):
    """Makes cfg.out, or checks that what is there may be continued. Returns ([(task, what its task.json says)], what
    results.json says)."""
    Path(cfg.out, "trajectories").mkdir(parents=True, exist_ok=True)
    infos = prepare_tasks(cfg)
    identity = run_identity(cfg, infos)
    check_same(cfg.out, identity)
    results = {"complete": False, "settings": identity, "final": cfg.final, "tasks": {},
               "versions": {name: version(name) for name in PACKAGES}}
    write_atomic(Path(cfg.out, "results.json"), results)
    return infos, results


def evaluate_agent(cfg, infos, results, home, load):
    """Plays what is left of a run and completes its results. home: the folder of blobs and of what scripts gave."""
    cache = ResultCache(Path(home, "cache"))
    try:
        if cfg.model:
            play_tasks(cfg, infos, home, cache, load)
        results["complete"] = True
    finally:
        results["tasks"] = collect_results(cfg, infos) if cfg.model else run_starters(cfg, infos, cache)
        write_atomic(Path(cfg.out, "results.json"), results)


def evaluate(cfg, agents=None, load=sample.load):
    """Evaluates agents, {name: settings}, one after the other, by default the one of cfg, and returns [{"name",
    "results"}]. cfg.out receives a report of all, also after an interruption. ValueError: a setting is wrong."""
    agents = agents or {cfg.model or "starters": cfg}
    title = f"{cfg.model or 'the starters'} on {cfg.task}" if cfg.task else "the paper in miniature"
    trained = [] if cfg.task else [folder for folder, _ in MADE.values()]
    with folder_lock(cfg.out, "eval.py"):
        runs = {name: open_run(agent) for name, agent in agents.items()}
        try:
            for name, (infos, results) in runs.items():
                evaluate_agent(agents[name], infos, results, cfg.out, load)
        finally:
            folders = {name: agent.out for name, agent in agents.items()}
            write_report(Path(cfg.out, "report.html"), folders, title, trained)
        return [{"name": name, "results": results} for name, (_, results) in runs.items()]


# ---------------------------------------------------------------------------------------------------------------------
# The command

def agents_made(cfg):
    """Returns {name: settings} of the agents that sft.py and rl.py have made, for the miniatures of all tasks. Copies
    what they kept of the scripts that ran while they learned, which then need not run again."""
    agents = {}
    for name, (folder, _) in MADE.items():
        if Path(folder, "agent.json").is_file():
            agents[name] = replace(cfg, task="all", model=folder, out=str(Path(cfg.out, Path(folder).name)))
    if not agents:
        raise ValueError("there is no agent to evaluate in runs/sft or runs/rl. Make them with: python sft.py, then "
                         "python rl.py. Or run a starter alone: python eval.py --task leaf-classification")
    refuse_links_out(POOL)
    with folder_lock(cfg.out, "eval.py"):
        for path in (*Path(POOL).glob("blobs/??/*"), *Path(POOL).glob("cache/??/*")):
            target = Path(cfg.out, *path.parts[-3:])
            if not target.exists():
                write_atomic(target, path.read_bytes())
    return agents


def fill(values):
    """For cli.parse: returns the settings that hold where none was typed."""
    if values["compare"]:
        return []
    if values["task"] or values["model"]:
        folder = sample.small_files(values["model"])
        agent = read_agent(folder) if folder else {}
        return [(f"{values['model']}/agent.json", agent), ("no --task", {"task": "leaf-classification"})]
    agents = {f"{folder}/agent.json": read_agent(folder) for folder, _ in MADE.values()}
    formats = [agent for agent in agents.values() if agent]
    if formats and formats[0] != formats[-1]:
        raise ValueError(f"{' and '.join(agents)} differ, so one is of an older run. Make runs/rl anew with python "
                         "rl.py, or evaluate each with --model and --task")
    return [("the paper in miniature", MINIATURE), *agents.items()]


def main(argv=None):
    status = exit_status("eval.py", lambda: refuse_torchrun("an evaluation"), "")
    if status:      # before anything else is said
        return status
    cfg = cli.parse(Settings, argv, fill)

    def work():
        if cfg.compare:
            print(f"Written to {compare(cfg)}")
        elif cfg.task:
            print("\n" + report(evaluate(cfg)))
            print("" if cfg.model else NO_MODEL)
            print(f"Written to {cfg.out}: report.html, results.json" + (", trajectories, blobs" if cfg.model else ""))
        else:
            agents = agents_made(cfg)
            torch.set_num_threads(1)        # threads that wait for each other are slow beside scripts on every core
            print("\n" + report(evaluate(cfg, agents)))
            for name, (folder, command) in MADE.items():
                if name not in agents:
                    print(f"\nNot there yet: {name}. Make {folder} with: {command}, and run this again.")
            print(f"\nEvery trajectory step by step, and how it was trained: {cfg.out}/report.html")
    return exit_status("eval.py", work, cfg.out)


if __name__ == "__main__":
    run_main(main)
