"""Runs the agent on tasks and prints what it scored, in the layout of the paper's Table 1.

    python eval.py                                                   # what sft.py and rl.py made, on all miniatures
    python eval.py --task leaf-classification                        # no model, no data: the starter on the miniature
    python eval.py --task leaf-classification --model DIR --raw RAW  # 8 trajectories of 15 steps on the real data
    python eval.py --task held-out --model http://host:8000/v1#name  # all of them, through an OpenAI-compatible server
    python eval.py --compare runs/a,runs/b --log runs/rl/log.jsonl   # runs nothing: draws what was run before

All trajectories of all tasks run together, a thread each, through one model. --out receives results.json (settings,
versions, every score, what was flagged), trajectories/TASK-K.jsonl (a line a step; `python env.py replay FILE` runs it
again), blobs/ (the files of every step) and report.html, a page that shows all of it. Ctrl-C keeps what is done, and
the same command goes on from there.

A trajectory's score is that of its final submission, the last valid one. A trajectory that left none has failed; it
counts at the starter's score. The gain of a score p over the starter's b is sign * (p - b) / |b|, in per cent.
Exit status: 0 done, 1 failed or interrupted, 2 bad arguments.
"""
import base64, hashlib, html, json, math, re, sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import sample
import tasks
from env import (
    DEFAULT_ACTIONS, FIELDS, PROMPTS, Progress, ResultCache, end_reason, make_env, model_policy, play_trajectory,
    prepare_tasks, printed_metric, read_agent, read_record, run_parallel, trajectory_files, trajectory_path)
from model import hash_checkpoint
from reward import KINDS
from support import cli
from support.cli import RunError, exit_status, format_table, refuse_torchrun, run_main
from support.files import (
    COUNT, FLAG, NUMBER, TEXT, VALUE, WORD, folder_lock, maybe, one_of, parse_json, read_bytes, read_json_lines,
    refuse_links_out, shorten, write_atomic)

FINAL = {"last-valid": "the last valid submission",
         "best-validation": "the valid submission whose script printed the best score"}
FIGURES = ("average", "best", "gain %", "95 % interval", "best gain %", "std. error", "failed")  # of an agent on a task
MADE = {"fine-tuned": ("runs/sft", "python sft.py"), "after RL": ("runs/rl", "python rl.py")}   # what is made by what
POOL = "runs/trajectories"      # where both left what scripts gave
# float64, so that what is sampled does not hang on which replies were sampled together, as rounding would have it
TOGETHER = {"task": "all", "temperature": 1.0, "parallel": 160, "dtype": "float64"}
NO_MODEL = """
No --model was given, so only the starter scripts ran. To run an agent, add one of
  --model Qwen/Qwen2.5-0.5B-Instruct       a model on the Hugging Face hub, downloaded when first used
  --model models/qwen                      a folder; hf download Qwen/Qwen2.5-7B-Instruct --local-dir models/qwen
  --model http://localhost:8000/v1#name    any OpenAI-compatible server; its key is read from OPENAI_API_KEY
"""


@dataclass
class Settings:
    task: str = ""  # a task's id, held-in, held-out, paper (those of Table 1) or all; empty: leaf-classification, or
        # without --model too the paper in miniature: what sft.py and rl.py have made, on all tasks
    model: str = ""  # a folder, a hub id, tiny (random weights), or http://host:port/v1#name; empty: starters alone
    coder: str = "model"  # who carries out the (AI) actions: model (the same one), none, or another, as in --model;
        # the key of a server on another host is read from OPENAI_API_KEY_CODER
    raw: str = ""  # folder of the publisher's files, prepared on first use; for several tasks, the folder that holds
        # one such folder per task id. Empty: the data prepared before, else the miniature
    data: str = "data"  # where prepared tasks are kept
    out: str = "runs/eval"  # where the results go; a run that is there already is continued
    trajectories: int = 8  # per task
    steps: int = 15  # replies a trajectory may have
    seconds: float = 1800.0  # a trajectory may take
    actions: tuple[str, ...] = DEFAULT_ACTIONS  # what the agent may do
    fields: tuple[str, ...] = FIELDS  # entries of a reply; a weak model does better with "Thought,Action,Action Input"
    prompt: str = "full"  # what the model is shown of a state: full (the conversation), or short (a message: the task,
        # what the last step brought and the head of the script, for a model of a few million weights)
    final: str = "last-valid"  # what counts of a trajectory: last-valid, or best-validation (by the printed score)
    parallel: int = 8  # trajectories that run at the same time
    max_new_tokens: int = 1024  # a reply may have
    temperature: float = 0.7  # of sampling; 0 always takes the most likely token
    top_p: float = 1.0  # sample from the most likely tokens that together reach this probability
    context: int = 16384  # tokens of one conversation; a trajectory that outgrows it ends
    dtype: str = "auto"  # of the weights: auto, float64, float32 or bfloat16
    device: str = "auto"  # of the model: auto, cpu or cuda
    python: str = sys.executable  # the interpreter that runs the tasks' scripts
    gpu: str = ""  # GPUs for the scripts, such as 0 or 0,1: each script gets one of them; empty hides all
    threads: int = 1  # that a script may use for numerics
    sandbox: str = "on"  # on, or off: scripts can then read the answers and your files; every row says so
    recheck: float = 0.0  # share of the results known from an earlier run that are run again and compared, 0 to 1
    seed: int = 0  # of sampling and of the bootstrap
    log: tuple[str, ...] = ()  # log.jsonl of training runs, such as runs/rl/log.jsonl, to be drawn in the report
    compare: tuple[str, ...] = ()  # draws these folders side by side into compare.html in --out, and runs nothing: the
        # --out of eval.py, of training (its log.jsonl), or collected trajectories

    def __post_init__(self):
        if self.model and not self.task:
            self.task = "leaf-classification"
        for name in ("trajectories", "steps", "seconds", "parallel", "max_new_tokens", "context", "threads"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, found {getattr(self, name)}")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError("expected --temperature of at least 0 and --top-p above 0 and up to 1, found "
                             f"{self.temperature} and {self.top_p}")
        if not 0 <= self.recheck <= 1:
            raise ValueError(f"--recheck must be from 0 to 1, found {self.recheck}")
        for name, allowed in {"sandbox": ("on", "off"), "prompt": PROMPTS, "final": FINAL}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} must be {' or '.join(allowed)}, found {getattr(self, name)!r}")
        if unknown := set(self.actions) - set(DEFAULT_ACTIONS):
            raise ValueError(f"there is no action {min(unknown)!r}; the actions are: {','.join(DEFAULT_ACTIONS)}")
        if not set(self.fields) <= set(FIELDS) or self.fields[-2:] != FIELDS[-2:]:
            raise ValueError(f"--fields must be taken from {','.join(FIELDS)} and end in the last two")
        for spec in filter(sample.is_server, (self.model, self.coder)):
            sample.address(spec)
        if self.compare and (self.model or self.task):
            raise ValueError("--compare runs nothing, so it takes no --model and no --task")
        for path in self.log:
            if not Path(path).is_file():
                raise ValueError(f"--log: there is no file {path}; rl.py and sft.py write a log.jsonl to their --out")
        for path in self.compare:
            if not (any(Path(path, name).is_file() for name in ("results.json", "log.jsonl")) or trajectory_files(path)):
                raise ValueError(f"--compare: {path} holds no results.json, log.jsonl or trajectories")


# ---------------------------------------------------------------------------------------------------------------------
# Files that others may have made: a model's agent.json, and whatever lies in a folder that is gone on with or compared.
# They are data: each entry that is used has a form, and no other entry has an effect.


SUMMARY = {**dict.fromkeys(("average", "best"), NUMBER), **dict.fromkeys(("failed", "trajectories"), COUNT),
           **dict.fromkeys(("gain", "best_gain", "standard_error"), maybe(NUMBER)),
           "interval": maybe(("two numbers", lambda value: isinstance(value, list) and len(value) == 2
                              and all(map(NUMBER[1], value))))}
PLAYED = {"k": COUNT, "score": maybe(NUMBER), "oracle": maybe(NUMBER), "ended": WORD, "steps": COUNT,
          "valid_replies": COUNT}
RESULTS = {
    "complete": FLAG, "settings": {"model": TEXT, "steps": COUNT, str: VALUE}, "final": one_of(*FINAL),
    "versions": {str: TEXT}, "rechecked?": {"runs": COUNT, "moved": [{str: VALUE}]}, "tasks": {str: {
        "metric": WORD, "direction": one_of("up", "down"), "split": WORD, "miniature": FLAG, "starter": NUMBER,
        "published": {str: [NUMBER]}, "flagged": COUNT, "printed?": maybe(NUMBER), "seconds?": NUMBER,
        "trajectories?": [PLAYED], "score_summary?": SUMMARY, "oracle_summary?": SUMMARY}}}


# ---------------------------------------------------------------------------------------------------------------------
# One trajectory. Its file: a header, a line for each step, and a line of type "end" if it outgrew the context.


# ---------------------------------------------------------------------------------------------------------------------
# All of them together


# ---------------------------------------------------------------------------------------------------------------------
# From records to the table

def outcome(lines, direction, final):
    """What the record of a trajectory came to: the score of its final submission by the rule `final` (None: it failed),
    its best score (which an oracle would choose), and counts."""
    steps, sign = [line for line in lines if line["type"] == "step"], 1 if direction == "up" else -1
    valid = [step for step in steps if step["score"] is not None]
    printed = [step for step in valid if step["printed"] is not None]
    chosen, oracle = valid[-1] if valid else {}, max(valid, key=lambda step: sign * step["score"], default={})
    if final == "best-validation" and printed:
        chosen = max(printed, key=lambda step: (sign * step["printed"], step["index"]))
    return {"score": chosen.get("score"), "oracle": oracle.get("score"), "ended": end_reason(lines), "steps": len(steps),
            "valid_replies": sum(step["valid"] for step in steps),
            "flagged": sum(tasks.flagged(step.get("canary_p")) for step in steps),
            "sandbox": sorted({step["sandbox"] for step in steps if step["sandbox"]})}


def gain(score, starter, direction):
    """Relative gain of a score over the starter's, in per cent; None where the starter's is 0."""
    worse, better = (starter, score) if direction == "up" else (score, starter)
    return None if starter == 0 else 100 * (better - worse) / abs(starter)


def bootstrap(values, seed):
    """The averages of 10,000 samples that are drawn from the values with replacement, each as many as there are."""
    values = np.array(values, dtype=float)
    return values[np.random.default_rng(seed).integers(0, len(values), (10_000, len(values)))].mean(1)


def middle(averages):
    """[low, high] of the middle 95 %."""
    return np.quantile(averages, [0.025, 0.975]).tolist()


def summary(scores, starter, direction, seed=0):
    """Statistics of a task's trajectories. scores: one a trajectory, None where it failed, which counts as `starter`.
    The interval is the middle 95 % of the averages of 10,000 bootstrap samples; it and the error need two scores."""
    values = np.array([starter if score is None else score for score in scores], dtype=float)
    n, average = len(values), float(values.mean())
    best = float(values.max() if direction == "up" else values.min())
    return {"average": average, "best": best, "gain": gain(average, starter, direction),
            "best_gain": gain(best, starter, direction),
            "standard_error": float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
            "interval": middle(bootstrap(values, seed)) if n > 1 else None,
            "failed": sum(score is None for score in scores), "trajectories": n}


def mean_gain(found, name, seed=0):
    """(mean, low, high) of the gains on several tasks in per cent. found: what results.json says of each. The interval
    tells how it would vary with other trajectories on the same tasks: each task's are drawn anew, with replacement."""
    averages = []
    for i, one in enumerate(found):
        gains = [gain(one["starter"] if each[name] is None else each[name], one["starter"], one["direction"])
                 for each in one["trajectories"]]
        averages.append(bootstrap(gains, seed + i))
    return float(np.mean([one[f"{name}_summary"]["gain"] for one in found])), *middle(np.mean(averages, 0))


def about(task, info):
    """What results.json says of a task whatever was run."""
    return {"metric": task.metric, "direction": task.direction, "split": task.split, "miniature": info["miniature"],
            "starter": info["m_init"], "published": {} if info["miniature"] else task.published}


def collect(s, infos):
    """What results.json says of each task: its finished trajectories and, if there are any, their statistics."""
    found = {}
    for task, info in infos:
        records = [read_record(trajectory_path(Path(s.out, "trajectories"), task.id, k)) for k in range(s.trajectories)]
        done = [{"k": k, **outcome(lines, task.direction, s.final)}
                for k, lines in enumerate(records) if end_reason(lines)]
        found[task.id] = {**about(task, info), "trajectories": done, "flagged": sum(one["flagged"] for one in done)}
        for name in ("score", "oracle") if done else ():
            scores = [one[name] for one in done]
            found[task.id][f"{name}_summary"] = summary(scores, info["m_init"], task.direction, s.seed)
    return found


def number(x, form=".4f"):
    return "-" if x is None else f"{x:{'.1f' if abs(x) >= 1000 else form}}"


def warnings(run):
    """What has to be said of a run before any of its results is shown, a list of texts."""
    results, parts = run["results"], []
    found = results["tasks"].items()
    if any(one["miniature"] for _, one in found) or any(one["head"]["miniature"] for one in run.get("played", ())):
        parts.append("Miniature data are made up from a seed: scores on them do not compare with published ones.")
    if counts := [f"{id} ({n} submission{'s' * (n > 1)})" for id, one in found if (n := one["flagged"])]:
        parts.append("FLAGGED: submissions that hold answers planted among the private ones, which no honest script\n"
                     f"has. These scores are not to be trusted: {', '.join(counts)}.")
    if not results.get("complete", True):
        parts.append(f"{run['name']} is not complete; this is what was done when it stopped.")
    if results["settings"].get("sandbox") == "off":
        parts.append("The sandbox was off: scripts could read the answers.")
    return parts


def interval(*ends):
    return " to ".join(number(x, "+.1f") for x in sorted(ends)) or "-"


def cells(a, *ends):
    """The cells of a task's statistics, in the order of FIGURES. a: what summary gave; ends: of the gain's interval."""
    return [number(a["average"]), number(a["best"]), number(a["gain"], "+.1f"), interval(*ends),
            number(a["best_gain"], "+.1f"), number(a["standard_error"]), f"{a['failed']}/{a['trajectories']}"]


def table(runs, name="score"):
    """Table 1 of one run or several, [{"name", "results"}]: (rows of cells, their columns of published figures, groups
    of rows for gain_chart). The first two rows are heads: the runs' names, and what stands in the columns. name: score,
    or oracle. A task stands in one row for all runs that had the same data; a mean, below the tasks of its split, is
    over those that all runs have, where the starter's score is not 0."""
    found, small = {}, all(one["miniature"] for run in runs for one in run["results"]["tasks"].values())
    for n, run in enumerate(runs):
        for id, one in run["results"]["tasks"].items():
            about = (id + " (miniature)" * (one["miniature"] and not small)
                     + " (sandbox off)" * (run["results"]["settings"].get("sandbox") == "off")
                     + " (FLAGGED)" * (one["flagged"] > 0), f"{one['metric']} ({one['direction']})",
                     number(one["starter"]))
            row = found.setdefault((id, one["miniature"], about[2]), {**one, "first": about, "runs": {}})
            row["first"] = max(row["first"], about)     # the one that warns
            row["runs"][n] = one
    heads, found = ("task" + " (miniature)" * small, "metric", "starter"), list(found.values())
    if not any(f"{name}_summary" in one for row in found for one in row["runs"].values()):
        return [[""] * 5, (*heads, "it printed", "seconds"), *((*row["first"], number(row.get("printed")), number(
            row.get("seconds"), ".1f")) for row in found)], [[]] * (2 + len(found)), []
    models = list(dict.fromkeys(model for row in found for model in row["published"]))
    chosen = FIGURES[:4 if len(runs) > 1 else None]
    names = [run["name"] * (i == 0 and len(runs) > 1) for run in runs for i in range(len(chosen))]
    rows = [["", "", "", *names], [*heads, *chosen * len(runs)]]
    published, groups = [["published"] * len(models), models], []
    for split in dict.fromkeys(row["split"] for row in found):
        common, gains = [], []
        for row in (row for row in found if row["split"] == split):
            bars, mine = {}, []
            for n in range(len(runs)):
                a = row["runs"].get(n, {}).get(f"{name}_summary")
                if a and a["gain"] is not None:
                    scores = [a["average"], *(a["interval"] or ())]
                    bars[n] = [gain(x, row["starter"], row["direction"]) for x in scores]
                mine += cells(a, *bars.get(n, [None])[1:])[:len(chosen)] if a else ["-"] * len(chosen)
            rows.append([*row["first"], *mine])
            published.append([" / ".join(map(number, row["published"].get(model, [None]))) for model in models])
            gains.append((row["first"][0], bars))
            common += [row] * (len(bars) == len(runs))
        if len(common) > 1:
            means = {n: mean_gain([row["runs"][n] for row in common], name) for n in range(len(runs))}
            gains.append((f"mean of {len(common)} {split} tasks", means))
            rows.append([gains[-1][0], "", "", *(cell for mean, *ends in means.values() for cell in (
                "", "", number(mean, "+.1f"), interval(*ends), "", "", "")[:len(chosen)])])
            published.append([""] * len(models))
        groups.append(gains)
    return rows, published, groups


def report(runs):
    """The tables of one run or several, as text."""
    parts = list(dict.fromkeys(text for run in runs for text in warnings(run)))
    rows, published, _ = table(runs)
    if again := runs[0]["results"].get("rechecked"):
        parts.append(f"{again['runs']} known results were run again; {len(again['moved'])} came out differently.")
    if not any(run["results"]["settings"]["model"] for run in runs):
        return "\n\n".join([*parts, format_table(rows)])
    about, name = [], "{}: ".format if len(runs) > 1 else lambda name: ""
    for run in runs:
        results, s = run["results"], run["results"]["settings"]
        played = [each for one in results["tasks"].values() for each in one.get("trajectories", ())]
        ends = Counter(each["ended"] for each in played)
        valid, steps = (sum(each[name] for each in played) for name in ("valid_replies", "steps"))
        about.append(f"{name(run['name'])}model {s['model']}, at most {s['steps']} steps. How they ended: "
                     + ", ".join(f"{end} {count}" for end, count in ends.most_common())
                     + f". Valid replies: {valid} of {steps}.")
    rules = " or ".join(dict.fromkeys(FINAL[run["results"]["final"]] for run in runs))
    parts += ["\n".join(about), f"Counted is {rules} of each trajectory; one without any has failed and counts at the\n"
              "starter's score. The interval is that of the gain: the middle 95 % of bootstrap samples of the "
              f"trajectories.\n\n{format_table(rows)}"]
    if len(runs) == 1:
        parts.append("Not a result: the best graded step of each trajectory, which no agent can know.\n"
                     + format_table(table(runs, "oracle")[0]))
    if any(published):
        parts.append("Published in Table 1 of the paper: average / best over 8 trajectories.\n" + format_table(
            [(*row[:2], *more) for row, more in zip(rows[1:], published[1:]) if set(more) - {"", "-"}]))
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The report: one HTML page that needs nothing else, and the same bytes for the same files. Texts of the agent get into
# it as JSON alone; the page makes the steps of a trajectory of it when that is opened.

SHOWN = 20_000      # characters of one text on the page
DRAWN = {"reward": "mean reward", "reward_edits": "mean reward of edits that ran", "valid": "valid replies, share",
         "kl": "divergence from the first model, nats a token", "entropy": "entropy, nats a token",
         "cache_hits": "runs known already, share", "loss": "training loss", "valid_loss": "validation loss"}
SHARES = {kind: f"share_{kind.replace(' ', '_')}" for kind in KINDS}
LOG = {f"{name}?": maybe(NUMBER) for name in (*DRAWN, *SHARES.values(), "iteration", "step", "seconds")}
WIDTH, HEIGHT, LEFT, BASE = 360, 200, 52, 170       # of a chart; where its frame begins, and where it ends below
STYLE = """
:root { --bg: #fff; --soft: #f3f4f6; --line: #d5d8de; --text: #1d2129; --dim: #616976; --link: #0b57c2; --bad: #b3261e;
  --add: #dff5e3; --del: #fde3e1; --c0: #2563c9; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #a87900;
  --c5: #0c8599; --c6: #c2255c; --c7: #666f7c; --k0: #c92a2a; --k1: #e8830c; --k2: #8d96a3; --k3: #8b5cf6;
  --k4: #2a8f52 }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --bg: #14171c; --soft: #1f242c;
  --line: #39404b; --text: #e4e7ec; --dim: #9aa3b0; --link: #7fb2ff; --bad: #ff8a80; --add: #16391f; --del: #4a1f1d;
  --c0: #6ea8fe; --c1: #ff9d66; --c2: #69db7c; --c3: #da92f0; --c4: #e5c04b; --c5: #4fd0e3; --c6: #f783ac;
  --c7: #adb5bd; --k0: #e5484d; --k3: #a184f7; --k4: #35a864 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 12px 16px 60px; max-width: 1250px; background: var(--bg); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.5em; margin: .4em 0 } h2 { font-size: 1.15em; margin: 1.8em 0 .5em } a { color: var(--link) }
p, .dim { color: var(--dim) } summary { cursor: pointer }
.loud { border: 2px solid; border-radius: 6px; padding: 8px 12px; color: var(--bad); font-weight: 600; margin: 8px 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: 3px 6px; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line) }
.mean td { font-weight: 600; border-bottom: 2px solid } td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 16px }
figure { margin: 0; min-width: 0; break-inside: avoid } figcaption { font-size: 13px }
svg { width: 100%; display: block } svg text { font-size: 11px; fill: var(--dim) }
.grid { stroke: var(--line) } .dash { stroke-dasharray: 4 3 }
.is { fill: none; stroke: currentColor; stroke-width: 2 } .thin { stroke-width: 1; opacity: .45 }
.of { fill: currentColor } .key { white-space: nowrap; color: var(--dim); margin-right: 8px }
.filters { display: flex; flex-wrap: wrap; gap: 8px; margin: 8px 0 } .filters select { font: inherit; max-width: 100% }
.t { border-top: 1px solid var(--line); padding: 5px 0 } .t > summary { overflow-wrap: anywhere }
.strip { white-space: nowrap } .strip a { text-decoration: none; font-size: 18px; line-height: 1 }
.step { margin: 12px 0 12px 8px; padding-left: 10px; border-left: 3px solid var(--line) }
.here { border-left-color: var(--link) } .step summary { font-size: 13px; color: var(--dim) }
.chips { display: flex; flex-wrap: wrap; gap: 6px; align-items: baseline; margin-bottom: 4px }
.chip { border: 1px solid; border-radius: 10px; padding: 0 8px; font-size: 13px; overflow-wrap: anywhere }
.bad { color: var(--bad); font-weight: 600 } .at { color: var(--dim) }
pre { margin: 2px 0 8px; padding: 8px; background: var(--soft); border-radius: 4px; overflow: auto; max-height: 30em;
  font: 12.5px/1.4 ui-monospace, Consolas, monospace; tab-size: 4 }
.text pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit }
pre span { display: block; min-height: 1.4em; width: max-content; min-width: 100% }
.add { background: var(--add) } .del { background: var(--del) }
@media (max-width: 600px) { body { padding: 8px } table { font-size: 12px } .step { margin-left: 0 }
  td:nth-child(-n+2), th:nth-child(-n+2) { white-space: normal; min-width: 5.5em }
  td:first-child, th:first-child { position: sticky; left: 0; background: var(--bg); min-width: 8em } }
@media print { .filters { display: none } body { font-size: 11px; max-width: none } .wide { overflow: visible }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: none } pre span { width: auto }
  table { font-size: 8.5px } th, td { padding: 2px 3px } * { print-color-adjust: exact } }
""" + "".join(f".{name} {{ color: var(--{name}) }}\n" for name in "c0 c1 c2 c3 c4 c5 c6 c7 k0 k1 k2 k3 k4".split())
SCRIPT = """
"use strict";
const $ = id => document.getElementById(id), all = document.querySelectorAll(".t"),
  picks = [...document.querySelectorAll("select")];
function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}
function fill(t) {       // texts are only ever set as text, so nothing in them is read as HTML
  const source = t.querySelector("script");
  if (!source) return;
  source.remove();
  JSON.parse(source.textContent).forEach(([chips, parts], i) => {
    const step = t.appendChild(make("section", "step")), head = step.appendChild(make("div", "chips"));
    step.id = t.id + "-" + i;
    head.appendChild(make("a", "", "step " + i)).href = "#" + step.id;
    for (const [name, text] of chips) head.append(make("span", "chip " + name, text));
    for (const [label, kind, text] of parts) {
      const box = step.appendChild(make("details", kind)), pre = make("pre");
      box.open = !kind.startsWith("fold");
      box.append(make("summary", "", label), pre);
      if (kind != "diff") { pre.textContent = text; continue; }
      const colours = {"+": "add", "-": "del", "@": "at"};
      for (const line of text.split("\\n")) pre.append(make("span", colours[line[0]], line + "\\n"));
    }
  });
}
function go() {         // #?task=...&outcome=... filters; #task-k and #task-k-step open
  const hash = location.hash.slice(1), t = hash && ($(hash) || $(hash.replace(/-[0-9]+$/, "")))?.closest(".t");
  const wanted = new URLSearchParams(hash);
  if (hash[0] == "?") for (const pick of picks) pick.value = wanted.get(pick.name) || "";
  for (const each of all)
    each.hidden = each != t && picks.some(pick => pick.value && !each.dataset[pick.name].includes(`|${pick.value}|`));
  $("count").textContent = `${[...all].filter(each => !each.hidden).length} of ${all.length}`;
  if (!t) return;
  t.open = true;
  fill(t);
  for (const old of document.querySelectorAll(".here")) old.classList.remove("here");
  ($(hash) || t).classList.add("here");
  ($(hash) || t).scrollIntoView();
}
for (const t of all) t.addEventListener("toggle", () => t.open && fill(t));
for (const pick of picks) pick.addEventListener("change", () => {
  location.hash = "?" + new URLSearchParams(picks.filter(each => each.value).map(each => [each.name, each.value]));
});
addEventListener("hashchange", go);
go();
"""


def key(look, name):
    """An entry of a legend."""
    return f'<span class="key"><span class="{look.split()[0]}">&#9632;</span> {html.escape(name)}</span> '


def finite(*values):
    """Whether all are numbers that can be drawn."""
    return all(value is not None and abs(value) < 1e100 for value in values)


def read_results(folder):
    """What results.json in a folder of eval.py says, None where there is none. ValueError: eval.py never wrote that."""
    path = Path(folder, "results.json")
    if (raw := read_bytes(path)) is None:
        return None
    results = parse_json(raw, RESULTS, path)
    for id, one in results["tasks"].items():
        sums = [one[name] for name in ("score_summary", "oracle_summary") if name in one]
        if not re.fullmatch(r"[\w.-]{1,100}", id, re.ASCII) or sums and not one.get("trajectories") or any(
                (each["gain"] is None) != (one["starter"] == 0) for each in sums):
            raise ValueError(f"{path}: what it says of the task {shorten(ascii(id), 80)} does not fit together")
    return results


def read_run(folder, name):
    """What the page shows of a folder: name, results, and of each trajectory that was begun the task, k, header and
    steps, the score that counts, its gain, and how it went."""
    refuse_links_out(folder)
    results, played = read_results(folder) or {"settings": {}, "tasks": {}}, []
    for path in trajectory_files(folder):
        lines, (id, _, k) = read_record(path, mend=False), path.stem.rpartition("-")
        if lines:
            one, steps = results["tasks"].get(id), [line for line in lines if line["type"] == "step"]
            counted = {each["k"]: each["score"] for each in (one or {}).get("trajectories", ())}
            scores = [step["score"] for step in steps if step["score"] is not None]
            score = counted.get(int(k), scores[-1] if scores else None)
            start, direction = lines[0]["m_init"], one["direction"] if one else tasks.load(id).direction
            state = ("unfinished" if not end_reason(lines) else "failed" if score is None else
                     "better" if score != start and (score > start) == (direction == "up") else "not better")
            played.append({"task": id, "k": int(k), "head": lines[0], "steps": steps, "score": score, "state": state,
                           "direction": direction, "gain": None if score is None else gain(score, start, direction)})
    return {"name": name, "results": results, "played": played}


def made_worse(step):
    """Whether a step was an edit that made the score worse."""
    return step["kind"] == "scored" and step["reward"] < 0.5


def shown_step(step):
    """[[[class, text] of each label], [[heading, kind, text] of each part]] of a step. What an edit changed is in the
    observation."""
    edited = "\n@@ -" in step["observation"]
    look = "bad" if made_worse(step) else f"k{KINDS.index(step['kind'])}"
    labels = [["", step["action"] or "no action"], [look, f"{step['kind']}, reward {step['reward']:.3f}"]]
    if step["score"] is not None:
        labels.append(["", f"score {number(step['score'])}, before {number(step['m_before'])}"])
    if step["printed"] is not None:
        labels.append(["dim", f"printed {number(step['printed'])}"])
    if step["outcome"]:
        said = [step["outcome"], shorten(step["detail"], 300)]
        labels.append(["dim" if step["outcome"] == "ok" else "bad", ". ".join(filter(None, said))])
    seconds = f"{step['seconds']:.1f} s" + f", script {step['script_seconds']:.1f} s" * bool(step["outcome"])
    labels.append(["dim", seconds])
    if tasks.flagged(step.get("canary_p")):
        labels.append(["bad", "FLAGGED: holds planted answers"])
    if step["sandbox"] == "off":
        labels.append(["bad", "sandbox off"])
    if step["ended"]:
        labels.append(["", f"ends: {step['ended']}"])
    parts = [[name, "text" if name == "Thought" else "fold text", text] for name, text in step["fields"].items()
             if name != "Action" and text.strip()]
    if not step["valid"]:
        parts.append(["Reply, as it came", "text", step["reply"]])
    if step["args"]:
        parts.append(["Action Input", "fold" if edited else "code",
                      "\n".join(f"{name}: {value}" for name, value in step["args"].items())])
    parts += [["A reply of the coder", "fold", text] for text in step["coder"]]
    parts.append(["Observation", "diff" if edited else "code", step["observation"]])
    return [labels, [[heading, kind, shorten(text, SHOWN)] for heading, kind, text in parts]]


def span(values):
    """(low, high) a little outside of all values."""
    low, high = min(values), max(values)
    room = next(room for room in (0.05 * (high - low), 0.05 * abs(low), 0.5) if room > 1e-300)
    return low - room, high + room


def ticks(low, high):
    """Two to six round numbers from low to high."""
    size = 10 ** math.floor(math.log10((high - low) / 5))
    size *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * size) <= 5)
    return [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]


def chart(title, x_name, lines=(), dots=(), bars=(), xs=None, ys=None):
    """A figure in SVG, "" if there is nothing to draw. lines: [(classes, name, [(x, y)])]; dots: [(class, title, x, y,
    link)]; bars: [(class, name, [(x, low, high)])]. xs, ys: what the axes show, (low, high), by default all; what lies
    outside is drawn at the edge."""
    lines = [(look, name, [p for p in points if finite(*p)]) for look, name, points in lines]
    dots = [dot for dot in dots if finite(*dot[2:4])]
    bars = [(look, name, [box for box in boxes if finite(*box)]) for look, name, boxes in bars]
    points = [p for line in lines for p in line[2]] + [dot[2:4] for dot in dots]
    points += [(x + side, y) for bar in bars for x, *ends in bar[2] for side, y in zip((-0.5, 0.5), ends)]
    if not points:
        return ""
    (x0, x1), (y0, y1) = (low_high or span(values) for low_high, values in zip((xs, ys), zip(*points)))

    def at(x, y):
        return (f"{LEFT + (min(max(x, x0), x1) - x0) / (x1 - x0) * (WIDTH - LEFT - 8):.1f}",
                f"{BASE - (min(max(y, y0), y1) - y0) / (y1 - y0) * (BASE - 8):.1f}")
    svg, names = [], {}
    for y in ticks(y0, y1):
        svg.append(f'<path class="grid" d="M{LEFT} {at(x0, y)[1]}H{WIDTH - 8}"/>'
                   f'<text x="{LEFT - 5}" y="{float(at(x0, y)[1]) + 4:.1f}" text-anchor="end">{y:.5g}</text>')
    svg += [f'<text x="{at(x, y0)[0]}" y="{BASE + 14}" text-anchor="middle">{x:.5g}</text>' for x in ticks(x0, x1)]
    svg.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 3}" text-anchor="end">{html.escape(x_name)}</text>')
    for look, name, boxes in bars:
        names[look] = name
        svg.append(f'<path class="of {look}" d="' + "".join("M{} {}V{}H{}V{}z".format(
            *at(x - 0.45, low), at(x, high)[1], *at(x + 0.45, low)) for x, low, high in boxes if high > low) + '"/>')
    for look, name, points in lines:
        if points and "thin" not in look:
            names[look] = name
        svg.append(f'<path class="is {look}" d="M{"L".join(" ".join(at(*p)) for p in points)}"><title>'
                   f'{html.escape(name)}</title></path>' * bool(points))
    for look, name, x, y, link in dots:
        svg.append('<a href="#{}"><circle class="of {}" cx="{}" cy="{}" r="3"><title>{}</title></circle></a>'.format(
            link, look, *at(x, y), html.escape(name)))
    legend = "".join(map(key, names, names.values()))
    return (f'<figure><figcaption><b>{html.escape(title)}</b></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'role="img">{"".join(svg)}</svg><figcaption>{legend}</figcaption></figure>')


def kinds_chart(title, x_name, rows):
    """Reward kinds as stacked shares; rows: [(x, {kind: share or count})]."""
    bars, below = [], [0.0] * len(rows)
    for i, kind in enumerate(KINDS):
        above = [low + counts.get(kind, 0) / (sum(counts.values()) or 1) for low, (_, counts) in zip(below, rows)]
        bars.append((f"k{i}", kind, [(x, low, high) for (x, _), low, high in zip(rows, below, above)]))
        below = above
    return chart(title, x_name, bars=bars if rows else (), ys=(0, 1))


def training_charts(logs):
    """Figure 4 in our data: what training logs say, [(name, [line as a dict])]. A line that is there twice, since a run
    was killed and went on, counts as it came last."""
    runs, found = [], []
    for name, lines in logs:
        lines = list({line.get("iteration", line.get("step")): line for line in lines}.values())
        minutes = np.cumsum([line.get("seconds") or 0 for line in lines]) / 60
        runs.append((name, [{**line, "minutes": m} for line, m in zip(lines, minutes.tolist())]))
    for y, title in DRAWN.items():
        for x in ("iteration", "step", "minutes")[:3 if y == "reward" else 2]:
            found.append(chart(title, x, [(f"c{i % 8}", name, [(line.get(x), line.get(y)) for line in lines])
                                          for i, (name, lines) in enumerate(runs)]))
    for name, lines in runs:
        rows = [(line.get("iteration"), {kind: line.get(SHARES[kind]) or 0 for kind in KINDS})
                for line in lines if "share_scored" in line]
        found.append(kinds_chart("kinds of reward" + f": {name}" * (len(runs) > 1), "iteration", rows))
    return found


def task_charts(runs):
    """(score by step, printed against graded) of every task: two lists of charts."""
    groups, curves, scatters = {}, [], []
    for n, run in enumerate(runs):
        for one in run["played"]:
            head = one["head"]
            groups.setdefault((one["task"], head["miniature"], head["m_init"]), {}).setdefault(n, []).append(one)
    for (id, miniature, start), found in sorted(groups.items()):
        if not finite(start):
            continue
        lines, dots = [], []
        for n, played in found.items():
            look, length = f"c{n % 8}", max(len(one["steps"]) for one in played)
            rows = [[start, *(step["m_after"] for step in one["steps"])] for one in played]
            rows = [row + row[-1:] * (length + 1 - len(row)) for row in rows]
            lines += [(f"{look} thin", f"{id} {one['k']}", list(enumerate(row))) for one, row in zip(played, rows)]
            lines.append((look, runs[n]["name"], [(x, sum(ys) / len(ys)) for x, ys in enumerate(zip(*rows))]))
            dots += [(look, f"{id} {one['k']}, step {i}: printed {number(step['printed'])}, graded "
                      f"{number(step['score'])}", step["score"], step["printed"], f"{anchor(runs, n, one)}-{i}")
                     for one in played for i, step in enumerate(one["steps"]) if finite(step["score"], step["printed"])]
        # all that is better than the starter, and of what is worse no more than twice as far
        values = [start, *(y for line in lines for _, y in line[2] if finite(y)), *(dot[2] for dot in dots)]
        better, worse = (max, min) if played[0]["direction"] == "up" else (min, max)
        room = max(2 * abs(better(values) - start), 0.1 * abs(start))
        ys = span([better(y, worse(start - room, start + room)) for y in values])
        title = id + " (miniature)" * miniature
        last = max(x for line in lines for x, _ in line[2])
        curves.append(chart(title, "step", [*lines, ("c7 dash", "starter", [(0, start), (last, start)])], ys=ys))
        equal = ("c7 dash", "equal", [(ys[0], ys[0]), (ys[1], ys[1])])
        scatters.append(chart(title, "graded", [equal] if dots else [], dots, xs=ys, ys=ys))
    return curves, scatters


def gain_chart(runs, rows):
    """Figure 3 in our data: the gain of each run on each task with its interval, one below the other. rows: [(task as
    it is shown, {run: (gain, low, high) in per cent})]. Gains below -100 are drawn there."""
    values = [0, *(max(-100, x) for _, found in rows for one in found.values() for x in one if finite(x))]
    if len(values) < 2:
        return ""
    (low, high), svg, y = span(values), [], 4

    def at(x):
        return f"{8 + (min(max(x, low), high) - low) / (high - low) * (WIDTH - 64):.1f}"
    for title, found in rows:
        y += 21
        svg.append(f'<text y="{y}">{html.escape(title)}</text>')
        for n, (value, *ends) in found.items():
            y += 12
            whisker = f'<path class="is" d="M{at(ends[0])} {y}H{at(ends[1])}"/>' if ends and finite(*ends) else ""
            dot = f'<circle class="of" cx="{at(value)}" cy="{y}" r="4"/>' if finite(value) else ""
            svg.append(f'<g class="c{n % 8}">{whisker}{dot}</g>'
                       f'<text x="{WIDTH}" y="{y + 4}" text-anchor="end">{number(value, "+.1f")}</text>')
    legend = "".join(key(f"c{n % 8}", run["name"]) for n, run in enumerate(runs) if run["results"]["tasks"])
    return (f'<figure><svg viewBox="0 0 {WIDTH} {y + 22}" role="img"><path class="grid" d="M{at(0)} 8V{y + 8}"/>'
            f'<text x="{at(0)}" y="{y + 20}" text-anchor="middle">0</text>{"".join(svg)}</svg>'
            f'<figcaption>{legend}</figcaption></figure>')


def anchor(runs, n, one):
    """The id of a trajectory on the page."""
    return html.escape(f"{n + 1}/" * (len(runs) > 1) + f"{one['task']}-{one['k']}")


def shown_trajectory(runs, n, one):
    """(a trajectory as HTML: a line, and its steps as JSON; {filter: its values})."""
    id, head, steps = anchor(runs, n, one), one["head"], one["steps"]
    strip = "".join(f'<a class="k{KINDS.index(step["kind"])}" href="#{id}-{i}" title="step {i}: {step["kind"]}, reward '
                    f'{step["reward"]:.3f}">&#963{3 if made_worse(step) else 2};</a>' for i, step in enumerate(steps))
    flagged = ["flagged"] * any(tasks.flagged(step.get("canary_p")) for step in steps)
    edits = [f"an edit {'above' if step['reward'] > 0.5 else 'below'} 0.5" for step in steps if step["kind"] == "scored"
             and step["reward"] != 0.5]
    values = {"run": [runs[n]["name"]], "task": [one["task"]], "reward": edits + [step["kind"] for step in steps],
              "outcome": [one["state"], *flagged, *(f"script: {step['outcome']}" for step in steps if step["outcome"])]}
    values = {name: sorted(set(each)) for name, each in values.items()}
    data = " ".join(f'data-{name}="|{html.escape("|".join(each))}|"' for name, each in values.items())
    name = f"{runs[n]['name']}: " * (len(runs) > 1) + f"{one['task']} {one['k']}" + " (miniature)" * head["miniature"]
    words = (f"{one['state']}: score {number(one['score'])}, starter {number(head['m_init'])}, gain "
             f"{number(one['gain'], '+.1f')} %; {sum(step['seconds'] for step in steps):.0f} s"
             + "".join(f"; idea: {idea}" for idea in head.get("ideas", ())))
    text = json.dumps([shown_step(step) for step in steps], ensure_ascii=False).replace("<", "\\u003c")
    return (f'<details class="t" id="{id}" {data}><summary><b>{html.escape(name)}</b> <span class="strip">{strip}'
            f'</span> {html.escape(words)}{" <b class=bad>FLAGGED</b>" * len(flagged)}</summary>'
            f'<script type="application/json">{text}</script></details>'), values


def page(title, runs, logs):
    """The report as bytes. runs: what read_run gave; logs: [(name, lines)] of training runs."""
    rows, published, groups = table(runs)
    loud = dict.fromkeys(text for run in runs for text in warnings(run))
    body = [f"<h1>{html.escape(title)}</h1>", *(f'<p class="loud">{html.escape(text)}</p>' for text in loud)]
    if len(rows) > 2:
        body.append('<h2>Results</h2><div class="wide"><table>')
        for i, row in enumerate([*row, *more] for row, more in zip(rows, published)):
            tag = "th" if i < 2 else "td"
            cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            body.append(f"<tr{' class=mean' * (not row[1])}>{cells}</tr>" * any(row))
        body.append("</table></div>")
    if groups:
        rules = " or ".join(dict.fromkeys(FINAL[run["results"]["final"]] for run in runs if run["results"]["tasks"]))
        body.append(f"<p>Counted is {rules} of each trajectory; one without any has failed and counts at the starter's "
                    "score. The gain of a score p over the starter's b is (p - b) / |b|, or (b - p) / |b| where lower "
                    "is better. The interval is that of the gain: the middle 95 % of bootstrap samples of the "
                    "trajectories.</p>")
    curves, scatters = task_charts(runs)
    kinds = []
    for run in runs:
        steps = [Counter() for _ in range(max((len(one["steps"]) for one in run["played"]), default=0))]
        for i, step in ((i, step) for one in run["played"] for i, step in enumerate(one["steps"])):
            steps[i][step["kind"]] += 1
        name = "kinds of reward" + f": {run['name']}" * (len(runs) > 1)
        kinds.append(kinds_chart(name, "step", list(enumerate(steps))))
    for heading, about, figures in (
            ("Gain over the starter", "In per cent, with its interval.", [gain_chart(runs, gains) for gains in groups]),
            ("Training", "By iteration, and by the time it took.", training_charts(logs)),
            ("Score by step", "The graded score of the script after each step, which the agent never sees: every "
             "trajectory thin, their average thick. What is far worse than the starter lies at the edge.", curves),
            ("Reward by step", "Invalid and failed steps earn 0, limits and what is no edit 0.5, scored edits 0 to 1.",
             kinds),
            ("Printed against graded", "Across what the grader gave, upwards what the script printed as its validation "
             "score. A point leads to its step.", scatters)):
        if any(figures):
            body.append(f'<h2>{heading}</h2><p>{about}</p><div class="charts">{"".join(figures)}</div>')
    shown = [shown_trajectory(runs, n, one) for n, run in enumerate(runs) for one in run["played"]]
    if shown:
        body.append('<h2>Trajectories <span id="count" class="dim"></span></h2><div class="filters">')
        for name in ("run", "task", "outcome", "reward")[len(runs) == 1:]:
            options = ["", *sorted({value for _, values in shown for value in values[name]})]
            body.append(f'<select name="{name}" aria-label="{name}">' + "".join(
                f'<option value="{html.escape(one)}">{html.escape(one) or f"any {name}"}</option>' for one in options)
                + "</select>")
        body += ["</div><noscript>The steps are shown with JavaScript.</noscript><p>A square a step, in the colour of "
                 "its kind of reward; a hollow one is an edit that made the score worse.</p>", *(x for x, _ in shown)]
    for run in runs:
        if (results := run["results"])["settings"]:
            about = {name: results[name] for name in ("settings", "versions", "rechecked") if name in results}
            text = report([run]) + "\n\n" if results["complete"] else ""
            body.append(f"<details><summary>{html.escape(run['name'])}: as text, settings, versions</summary><pre>"
                        f"{html.escape(text + json.dumps(about, indent=1))}</pre></details>")
    script = SCRIPT if shown else ""
    own = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in (script, STYLE)]
    policy = (f"default-src 'none'; script-src 'sha256-{own[0]}'; style-src 'sha256-{own[1]}'; base-uri 'none'; "
              "form-action 'none'")     # a browser runs what we wrote, and nothing that might have got in
    text = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width='
            f'device-width, initial-scale=1"><meta http-equiv="Content-Security-Policy" content="{policy}"><title>'
            f'{html.escape(title)}</title><style>{STYLE}</style></head><body>\n'
            + "\n".join(body) + f"\n<script>{script}</script></body></html>\n")
    return text.encode("utf-8", "replace")      # half a surrogate pair is no character


def write_report(s, agents=None):
    """Writes report.html of s.out, or compare.html of the folders in s.compare, and returns its path. agents: {name:
    settings} of what was evaluated; by default s alone."""
    path = Path(s.out, "compare.html" if s.compare else "report.html")
    folders = {folder: folder for folder in s.compare} or {
        name: one.out for name, one in (agents or {s.model or "starters": s}).items()}
    logs = [*map(Path, s.log), *(log for folder in s.compare if (log := Path(folder, "log.jsonl")).is_file())]
    logs = [(str(log.parent), read_json_lines(log, LOG)) for log in dict.fromkeys(logs)]
    what = (f"{', '.join(s.compare)} side by side" if s.compare else
            f"{s.model or 'the starters'} on {s.task}" if s.task else "the paper in miniature")
    write_atomic(path, page(f"ML-Agent: {what}", [read_run(folder, name) for name, folder in folders.items()], logs))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The command


def conditions(s, infos):
    """All that the trajectories depend on, {name: value}: a run is continued only under the same."""
    # these say where, how many, or how it is counted
    free = ("out", "data", "raw", "parallel", "final", "trajectories", "recheck", "log", "compare")
    same = {name: value for name, value in json.loads(json.dumps(asdict(s))).items() if name not in free}

    def short(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
    for task, info in infos:
        kind = "miniature" if info["miniature"] else "real"
        same[f"data of {task.id}"] = f"{kind} {short([info['sha256'], info['m_init']])}"
    for name in [s.model, s.coder][:1 if s.coder in ("model", "none") else 2]:
        if name and Path(name).is_dir():    # a model trained anew in the same folder is another model
            same[f"files of {name}"] = hash_checkpoint(name)
    return same


def check_same(s, now):
    """ValueError naming what differs where --out holds trajectories made under other conditions."""
    if not any(Path(s.out, "trajectories").glob("*.jsonl")):
        return
    then = (read_results(s.out) or {"settings": {}})["settings"]
    differ = [f"{shorten(name, 80)} was {shorten(repr(then.get(name)), 200)} and is {now.get(name)!r}"
              for name in {**then, **now} if then.get(name) != now.get(name)]
    if differ:
        raise ValueError(f"{s.out} holds a run with other settings: {'; '.join(differ)}. "
                         "Give another --out, or delete that folder.")


def baseline(s, infos, cache):
    """Runs each starter once; what results.json says of each task."""
    found = {}
    for task, info in infos:
        score, result = make_env(s, task, s.out, cache).score()
        if score is None:
            raise RunError(f"the starter of {task.id}: {result.outcome}. {result.detail}\n{result.stderr}")
        found[task.id] = {**about(task, info), "starter": score, "printed": printed_metric(result.stdout, task.metric),
                          "seconds": result.seconds, "sandbox": result.sandbox,
                          "flagged": int(tasks.flagged(result.canary_p))}
    return found


class Agent:
    """The evaluation of one agent: the settings s, and what s.out holds."""

    def __init__(self, s):
        Path(s.out, "trajectories").mkdir(parents=True, exist_ok=True)
        self.s, self.infos, self.path = s, prepare_tasks(s), Path(s.out, "results.json")
        self.results = {"complete": False, "settings": conditions(s, self.infos), "final": s.final, "tasks": {},
                        "versions": {name: version(name) for name in ("torch", "tokenizers", "numpy", "pandas",
                                                                      "scikit-learn")}}
        check_same(s, self.results["settings"])
        self.save()
        found = [(task, k, trajectory_path(Path(s.out, "trajectories"), task.id, k))
                 for k in range(s.trajectories) for task, _ in self.infos if s.model]
        self.records = {path: read_record(path) for *_, path in found}
        self.jobs = [(self, task, k, path) for task, k, path in found if not end_reason(self.records[path])]

    def save(self, **more):
        self.results.update(more)
        write_atomic(self.path, self.results)

    def load(self, load):
        """Loads the model and the coder, if there is anything to play."""
        s, options = self.s, dict(dtype=self.s.dtype, device=self.s.device, context=self.s.context,
                                  rows=min(self.s.parallel, len(self.jobs)))
        if self.jobs:
            self.policy = load(s.model, **options)
            if self.policy.context and s.max_new_tokens >= self.policy.context:
                raise ValueError(f"--max-new-tokens {s.max_new_tokens} leaves no room in a context of "
                                 f"{self.policy.context}")
            self.coder = (self.policy if s.coder == "model" else None if s.coder == "none" else
                          load(s.coder, **options, key=sample.coder_key(s.coder, s.model)))

    def play(self, task, k, path, cache, run, home):
        play_trajectory(self.s, task, k, path, model_policy(self.s, self.policy), self.coder, home, cache, run,
                   {"model": self.s.model, "coder": self.s.coder})


def evaluate(s, agents=None, load=sample.load):
    """Plays what the settings of each agent, {name: settings}, say, all together, and returns [{"name", "results"}],
    what results.json of each then holds. By default s is the only agent. s.out receives the files of all, what scripts
    gave, and the report. ValueError: something is wrong with the settings."""
    agents = agents or {s.model or "starters": s}
    with folder_lock(s.out, "eval.py"):
        found = {name: Agent(one) for name, one in agents.items()}
        jobs = [job for one in found.values() for job in one.jobs]
        records = {path: lines for one in found.values() for path, lines in one.records.items()}
        cache, done = ResultCache(Path(s.out, "cache")), False
        if jobs:
            run = Progress(records, max(one.steps for one in agents.values()))
            if any(records.values()):
                print(f"{s.out}: {len(run.over)} of {len(records)} trajectories are done; going on", file=sys.stderr)
            for one in found.values():
                one.load(load)
        try:
            if jobs:
                run_parallel(jobs, lambda one, *job: one.play(*job, cache, run, s.out), sum(
                    one.parallel for one in agents.values()), run)
            done = True
        except ValueError as error:     # with its traceback: it is nothing that settings could put right
            raise RuntimeError("a trajectory could not be played") from error
        finally:
            again = {}
            for one in found.values():
                one.save(tasks=collect(one.s, one.infos) if one.s.model else baseline(one.s, one.infos, cache),
                         complete=done, **again)
            write_report(s, agents)
        return [{"name": name, "results": one.results} for name, one in found.items()]


def miniature(s, argv=None):
    """{name: settings} of the agents that sft.py and rl.py have made, for the miniatures of all tasks. argv: the
    command line that gave s."""
    found = {name: folder for name, (folder, _) in MADE.items() if Path(folder, "agent.json").is_file()}
    if not found:
        raise ValueError("there is no agent to evaluate in runs/sft or runs/rl. Make them with: python sft.py, then "
                         "python rl.py. Or run a starter alone: python eval.py --task leaf-classification")
    with folder_lock(s.out, "eval.py"):       # scripts that ran while they learned need not run again
        refuse_links_out(POOL)
        for path in (*Path(POOL).glob("blobs/??/*"), *Path(POOL).glob("cache/??/*")):
            if not (known := Path(s.out, *path.parts[-3:])).exists():
                write_atomic(known, path.read_bytes())
    torch.set_num_threads(1)        # threads that wait for each other are slow beside scripts on every core

    def agent(folder):
        more = f"the paper in miniature, and {folder}/agent.json", {**TOGETHER, **read_agent(folder)}
        one = cli.parse(Settings, argv, lambda typed: [more])
        return replace(one, model=folder, out=str(Path(s.out, Path(folder).name)))
    return {name: agent(folder) for name, folder in found.items()}


def fill(values):
    """For cli.parse: what holds where nothing was typed."""
    if values["task"] or values["model"] or values["compare"]:
        folder = sample.small_files(values["model"])
        return [(f"{values['model']}/agent.json", read_agent(folder))] if folder else []
    logs = tuple(log for folder, _ in MADE.values() if Path(log := f"{folder}/log.jsonl").is_file())
    return [("the paper in miniature", {"log": logs})]


def main(argv=None):
    s = cli.parse(Settings, argv, fill)

    def work():
        refuse_torchrun("an evaluation")
        if s.compare:
            return print(f"Written to {write_report(s)}")
        if s.task:
            print("\n" + report(evaluate(s)))
            return print(f"{NO_MODEL * (not s.model)}\nWritten to {s.out}: report.html, results.json"
                         + ", trajectories, blobs" * bool(s.model))
        agents = miniature(s, argv)
        print("\n" + report(evaluate(s, agents)))
        for name, (folder, command) in MADE.items():
            if name not in agents:
                print(f"\nNot there yet: {name}. Make {folder} with: {command}, and run this again.")
        print(f"\nEvery trajectory step by step, and how it was trained: {s.out}/report.html")
    return exit_status("eval.py", work, s.out)


if __name__ == "__main__":
    run_main(main)
