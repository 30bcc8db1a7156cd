"""Runs the agent on tasks and prints what it scored, in the layout of the paper's Table 1.

    python eval.py                                                   # what sft.py and rl.py made, on all miniatures
    python eval.py --task leaf-classification                        # no model, no data: the starter on the miniature
    python eval.py --task leaf-classification --model DIR --raw RAW  # 8 trajectories of 15 steps on the real data
    python eval.py --task held-out --model http://host:8000/v1#name  # all of them, through an OpenAI-compatible server
    python eval.py --compare runs/a,runs/b,runs/rl                   # runs nothing: draws what was run before

--out receives results.json (settings, versions, every score), trajectories/TASK-K.jsonl (a line a step, which
`python env.py replay FILE` runs again), blobs/ (the files of every step) and report.html, a page that shows all of it.
Ctrl-C keeps what is done; the same command goes on from there.

The score of a trajectory is that of its final submission, the last valid one. A trajectory that left none has failed;
it counts at the starter's score. The gain of a score p over the starter's b is sign * (p - b) / |b|, in per cent.
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
    AgentSettings, make_env, model_policy, play_trajectory, prepare_tasks, printed_metric, read_agent, read_record)
from reward import best_of
from support import cli, endpoint
from support.cli import RunError, check_choices, check_positive, exit_status, format_table, refuse_torchrun, run_main
from support.distributed import check_same
from support.files import folder_lock, hash_json, refuse_links_out, write_atomic
from support.pretrained import hash_checkpoint
from support.report import FINAL, read_log, read_results, write_page
from support.parallel import Progress, run_parallel
from support.storage import ResultCache
from support.records import end_reason, trajectory_files, trajectory_path

MADE = {"fine-tuned": ("runs/sft", "python sft.py"), "after RL": ("runs/rl", "python rl.py")}   # name: folder, command
POOL = "runs/trajectories"      # where both keep the results of scripts
# float64, so that a reply does not depend on which replies are sampled beside it, as rounding would have it
MINIATURE = {"temperature": 1.0, "dtype": "float64"}
TOKENS_TOGETHER = 8 * 16_384    # of the conversations that one model holds at the same time
NUM_BOOTSTRAP = 10_000
MIDDLE = [0.025, 0.975]        # quantiles, of an interval of 95 %
PACKAGES = ("torch", "tokenizers", "numpy", "pandas", "scikit-learn")
COLUMNS = ("task", "agent", "metric", "starter", "it printed", "seconds", "average", "best", "gain %", "95 % interval",
           "best gain %", "std. error", "failed", "(oracle)")
MINIATURE_MARK = " *"
MINIATURE_WARNING = "* Miniature data are made up from a seed: scores on them do not compare with published ones."
NOTE = """A trajectory without a valid submission has failed and counts at the starter's score. The interval is that of
the gain, by bootstrap of the trajectories. (oracle) is no result: the average of the best graded step of each
trajectory, which no agent can know. (paper) is Table 1 of the paper: average and best of 8 trajectories."""
NO_MODEL = """
No --model was given, so only the starter scripts ran. To run an agent, add one of
  --model Qwen/Qwen2.5-0.5B-Instruct       a model on the Hugging Face hub, downloaded when first used
  --model models/qwen                      a folder with a model
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
    """Returns what results.json says of a trajectory, from its record: the score of its final submission by the rule
    `final` (None: it failed), its best score (which an oracle would choose), and counts."""
    steps = [line for line in lines if line["type"] == "step"]
    valid = [step for step in steps if step["score"] is not None]
    printed = [step for step in valid if step["printed"] is not None]
    sign = 1 if direction == "up" else -1
    chosen = valid[-1] if valid else {}
    if final == "best-validation" and printed:      # of equal ones the latest
        chosen = max(printed, key=lambda step: (sign * step["printed"], step["index"]))
    oracle = max(valid, key=lambda step: sign * step["score"], default={})
    return {"score": chosen.get("score"), "oracle": oracle.get("score"), "ended": end_reason(lines),
            "steps": len(steps), "valid_replies": sum(step["valid"] for step in steps)}


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


def score_statistics(scores, starter, direction, seed=0):
    """Returns the statistics of a task's trajectories. scores: one for each, None where it failed, which counts as
    `starter`. The interval is that of the average, by bootstrap; it and the standard error need two scores."""
    values = np.array([starter if score is None else score for score in scores], dtype=float)
    average = float(values.mean())
    best = float(values.max() if direction == "up" else values.min())
    error = interval = None
    if len(values) > 1:
        error = float(values.std(ddof=1) / np.sqrt(len(values)))
        interval = np.quantile(bootstrap(values, seed), MIDDLE).tolist()
    return {"average": average, "best": best, "gain": gain(average, starter, direction),
            "best_gain": gain(best, starter, direction), "standard_error": error, "interval": interval,
            "failed": scores.count(None), "trajectories": len(scores)}


def mean_gain(results):
    """Returns (mean, low, high) of the gains on several tasks, in per cent. results: what results.json says of each
    task. The interval is by bootstrap of the trajectories of each task."""
    averages = []
    for i, result in enumerate(results):
        scores = [trajectory["score"] for trajectory in result["trajectories"]]
        scores = [result["starter"] if score is None else score for score in scores]
        gains = [gain(score, result["starter"], result["direction"]) for score in scores]
        averages.append(bootstrap(gains, seed=i))
    mean = float(np.mean([result["score_summary"]["gain"] for result in results]))
    return mean, *np.quantile(np.mean(averages, 0), MIDDLE).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The table: a list of rows {column: text}, for the screen and for the page

def format_number(x, form=".4f"):
    if x is None:
        return "-"
    return f"{x:.1f}" if abs(x) >= 1000 else f"{x:{form}}"


def format_gains(mean, interval):
    ends = [format_number(end, "+.1f") for end in sorted(interval)]
    return {"gain %": format_number(mean, "+.1f"), "95 % interval": " to ".join(ends) or "-"}


def format_result(result):
    """Returns {column: text} for what results.json says of a task."""
    starter, direction = result["starter"], result["direction"]
    row = {"metric": f"{result['metric']} ({direction})", "starter": format_number(starter)}
    if "printed" in result:         # the starter alone was run
        row["it printed"] = format_number(result["printed"])
        row["seconds"] = format_number(result.get("seconds"), ".1f")
    if "score_summary" in result:
        figures = result["score_summary"]
        row["average"] = format_number(figures["average"])
        row["best"] = format_number(figures["best"])
        ends = figures["interval"] if starter else None
        row |= format_gains(figures["gain"], [gain(score, starter, direction) for score in ends or ()])
        row["best gain %"] = format_number(figures["best_gain"], "+.1f")
        row["std. error"] = format_number(figures["standard_error"])
        row["failed"] = f"{figures['failed']}/{figures['trajectories']}"
        row["(oracle)"] = format_number(result["oracle_summary"]["average"])
    return row


def build_table(runs):
    """Returns Table 1 of runs [{"name", "results"}]: a row for each task and agent, also the paper's agents, and below
    the tasks of a split the mean gains, over the tasks that all runs have with the same starter score, if not 0."""
    splits = {}         # split: {task: {name of a run: what its results.json says of the task}}
    for run in runs:
        for task, result in run["results"]["tasks"].items():
            splits.setdefault(result["split"], {}).setdefault(task, {})[run["name"]] = result
    rows = []
    for split, results_by_task in splits.items():
        common = []
        for task, results in results_by_task.items():
            published = {}
            for name, result in results.items():
                label = task + MINIATURE_MARK if result["miniature"] else task
                rows.append({"task": label, "agent": name, **format_result(result)})
                published |= result["published"]
            for model, figures in published.items():
                texts = map(format_number, figures)
                rows.append({"task": task, "agent": f"{model} (paper)", **dict(zip(("average", "best"), texts))})
            starters = {(result["starter"], result["miniature"]) for result in results.values()}
            played = [result for result in results.values() if "score_summary" in result and result["starter"]]
            if len(played) == len(runs) and len(starters) == 1:
                common.append(results)
        if len(common) > 1:
            for run in runs:
                mean, *interval = mean_gain([results[run["name"]] for results in common])
                rows.append({"task": f"mean of {len(common)} {split} tasks", "agent": run["name"],
                             **format_gains(mean, interval)})
    return rows


def table_columns(rows):
    """Returns the columns in which some row has a text."""
    return [column for column in COLUMNS if any(column in row for row in rows)]


def warnings(runs):
    """Returns the texts that have to be read before any result of these runs."""
    texts = []
    for run in runs:
        results = run["results"]
        if any(part["miniature"] for part in (*results["tasks"].values(), *run.get("trajectories", ()))):
            texts.append(MINIATURE_WARNING)
        if not results.get("complete", True):
            texts.append(f"{run['name']} is not complete; this is what was done when it stopped.")
        if results["settings"].get("sandbox") == "off":
            texts.append(f"{run['name']}: the sandbox was off, so scripts could read the answers.")
    return list(dict.fromkeys(texts))


def notes(runs):
    """Returns the texts that one has to know to read the table: how the trajectories of each agent ended, and NOTE."""
    texts = []
    for run in runs:
        if not run["results"]["settings"].get("model"):
            continue
        played = []
        for result in run["results"]["tasks"].values():
            played += result.get("trajectories", [])
        ends = Counter(trajectory["ended"] for trajectory in played).most_common()
        valid = sum(trajectory["valid_replies"] for trajectory in played)
        steps = sum(trajectory["steps"] for trajectory in played)
        texts.append(f"{run['name']}: {FINAL[run['results']['final']]} counts. How they ended: "
                     f"{', '.join(f'{end} {count}' for end, count in ends)}. Valid replies: {valid} of {steps}.")
    return [*texts, NOTE] if texts else []


def format_report(runs):
    """Returns the table of one run or several as text."""
    rows = build_table(runs)
    columns = table_columns(rows)
    table = format_table([columns, *[[row.get(column, "") for column in columns] for row in rows]])
    return "\n\n".join([*warnings(runs), *notes(runs), table])


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
        if not end_reason(lines):
            outcome = "unfinished"
        elif score is None:
            outcome = "failed"
        elif best_of(direction, score, starter) == starter:
            outcome = "not better"
        else:
            outcome = "better"
        trajectories.append({
            "task": task, "k": int(k), "miniature": lines[0]["miniature"], "starter": starter, "score": score,
            "outcome": outcome, "steps": [line for line in lines if line["type"] == "step"]})
    return {"name": name, "results": results, "trajectories": trajectories}


def write_report(path, folders, trained):
    """Writes the page of folders of eval.py, {name: folder}, and of folders where something was trained."""
    runs = [read_run(folder, name) for name, folder in folders.items()]
    for run in runs:
        about = {name: run["results"].get(name, {}) for name in ("settings", "versions")}
        run["text"] = json.dumps(about, indent=1) if about["settings"] else ""
    agents = [run for run in runs if run["results"]["settings"].get("model")]
    rows = build_table(agents or runs)
    write_page(path, {
        "title": f"ML-Agent: {', '.join(folders)}", "warnings": warnings(runs), "notes": notes(runs),
        "columns": table_columns(rows), "rows": rows, "runs": runs,
        "logs": [{"name": folder, "lines": read_log(folder)} for folder in trained]})


def compare(cfg):
    """Writes compare.html, which shows the folders of --compare side by side, and returns its path."""
    path = Path(cfg.out, "compare.html")
    write_report(path, {folder: folder for folder in cfg.compare}, cfg.compare)
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
    models = [cfg.model]
    if cfg.coder not in ("model", "none"):
        models.append(cfg.coder)
    for name in filter(None, models):
        if Path(name).is_dir():     # a model that was trained anew in the same folder is another model
            identity[f"files of {name}"] = hash_checkpoint(name)
    return identity


def played_result(cfg, task, starter):
    """Returns what results.json says of the trajectories of a task that are over, and their statistics."""
    played = []
    for k in range(cfg.trajectories):
        lines = read_record(trajectory_path(Path(cfg.out, "trajectories"), task.id, k))
        if end_reason(lines):
            played.append({"k": k, **summarize_trajectory(lines, task.direction, cfg.final)})
    result = {"trajectories": played}
    if played:
        for counted in ("score", "oracle"):
            scores = [trajectory[counted] for trajectory in played]
            result[f"{counted}_summary"] = score_statistics(scores, starter, task.direction, cfg.seed)
    return result


def starter_result(cfg, task, cache):
    """Runs the starter of a task, and returns what results.json says of it."""
    score, result = make_env(cfg, task, cfg.out, cache).score()
    if score is None:
        raise RunError(f"the starter of {task.id}: {result.outcome}. {result.detail}\n{result.stderr}")
    return {"starter": score, "printed": printed_metric(result.stdout, task.metric), "seconds": result.seconds,
            "sandbox": result.sandbox}


def collect_results(cfg, infos, cache):
    """Returns what results.json says of each task."""
    results = {}
    for task, info in infos:
        about = {"metric": task.metric, "direction": task.direction, "split": task.split, "starter": info["m_init"],
                 "miniature": info["miniature"], "published": {} if info["miniature"] else task.published}
        if cfg.model:
            about |= played_result(cfg, task, info["m_init"])
        else:
            about |= starter_result(cfg, task, cache)
        results[task.id] = about
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
    jobs = [job for job in jobs if not end_reason(records[job[-1]])]
    if not jobs:
        return
    if any(records.values()):
        print(f"{cfg.out}: {len(records) - len(jobs)} of {len(records)} trajectories are done; going on", file=sys.stderr)
    num_rows = min(max(1, TOKENS_TOGETHER // cfg.context), len(jobs))
    policy, coder = load_models(cfg, num_rows, load)
    progress = Progress(records, cfg.steps)

    def play(task, k, path):
        play_trajectory(cfg, task, k, path, model_policy(cfg, policy), coder, home, cache, progress,
                        {"model": cfg.model, "coder": cfg.coder})
    try:
        run_parallel(jobs, play, num_rows, progress)
    except ValueError as error:     # with its traceback: it is nothing that settings could put right
        raise RuntimeError("a trajectory could not be played") from error


def evaluate_agent(cfg, home, load):
    """Plays what is left of a run in cfg.out and returns its results, which results.json there holds too, also after an
    interruption. home: the folder of blobs and of what scripts gave. ValueError: a run with other settings is there."""
    Path(cfg.out, "trajectories").mkdir(parents=True, exist_ok=True)
    infos = prepare_tasks(cfg)
    identity = run_identity(cfg, infos)
    if any(Path(cfg.out, "trajectories").glob("*.jsonl")):
        check_same((read_results(cfg.out) or {"settings": {}})["settings"], identity, cfg.out)
    results = {"complete": False, "settings": identity, "final": cfg.final, "tasks": {},
               "versions": {name: version(name) for name in PACKAGES}}
    write_atomic(Path(cfg.out, "results.json"), results)
    cache = ResultCache(Path(home, "cache"))
    try:
        if cfg.model:
            play_tasks(cfg, infos, home, cache, load)
        results["complete"] = True
    finally:
        results["tasks"] = collect_results(cfg, infos, cache)
        write_atomic(Path(cfg.out, "results.json"), results)
    return results


def evaluate(cfg, agents=None, load=sample.load):
    """Evaluates agents, {name: settings}, one after the other, by default the one of cfg, and returns [{"name",
    "results"}]. cfg.out receives a report of all, also after an interruption. ValueError: a setting is wrong."""
    agents = agents or {cfg.model or "starter": cfg}
    folders = {name: agent.out for name, agent in agents.items()}
    trained = [] if cfg.task else [folder for folder, _ in MADE.values()]
    with folder_lock(cfg.out, "eval.py"):
        try:
            return [{"name": name, "results": evaluate_agent(agent, cfg.out, load)} for name, agent in agents.items()]
        finally:
            write_report(Path(cfg.out, "report.html"), folders, trained)



# ---------------------------------------------------------------------------------------------------------------------
# The command

def agents_made(cfg):
    """Returns {name: settings} of the agents that sft.py and rl.py have made, for the miniatures of all tasks. Copies
    what they kept of the scripts that ran while they learned, which then need not run again."""
    agents = {}
    for name, (folder, command) in MADE.items():
        if Path(folder, "agent.json").is_file():
            agents[name] = replace(cfg, task="all", model=folder, out=str(Path(cfg.out, Path(folder).name)))
        else:
            print(f"Not there yet: {name}. Make {folder} with: {command}")
    if not agents:
        raise ValueError("there is no agent to evaluate: run python sft.py, then python rl.py. Or run a starter alone: "
                         "python eval.py --task leaf-classification")
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
    cfg = cli.parse(Settings, argv, fill)

    def work():
        refuse_torchrun("an evaluation")
        if cfg.compare:
            print(f"Written to {compare(cfg)}")
            return
        agents = None
        if not cfg.task:
            agents = agents_made(cfg)
            torch.set_num_threads(1)        # threads that wait for each other are slow beside scripts on every core
        print("\n" + format_report(evaluate(cfg, agents)))
        if cfg.task and not cfg.model:
            print(NO_MODEL)
        print(f"\nWritten to {cfg.out}: report.html, which shows every step, and results.json")
    return exit_status("eval.py", work, cfg.out)


if __name__ == "__main__":
    run_main(main)
