"""Runs the agent on tasks and prints what it scored, in the layout of the paper's Table 1.

    python eval.py --task leaf-classification                        # no model, no data: the starter on the miniature
    python eval.py --task leaf-classification --model DIR --raw RAW  # 8 trajectories of 15 steps on the real data
    python eval.py --task held-out --model http://host:8000/v1#name  # all of them, through an OpenAI-compatible server

All trajectories of all tasks run together, a thread each, through one model. --out receives results.json (settings,
versions, every score, what was flagged), trajectories/TASK-K.jsonl (a line a step; `python env.py replay FILE` runs it
again) and blobs/ (the files of every step). Ctrl-C keeps what is done, and the same command goes on from there.

A trajectory's score is that of its final submission, the last valid one. A trajectory that left none has failed; it
counts at the starter's score. The gain of a score p over the starter's b is sign * (p - b) / |b|, in per cent.
Exit status: 0 done, 1 failed or interrupted, 2 bad arguments.
"""
import fcntl, hashlib, json, os, queue, signal, sys, tempfile, threading, time, traceback, zlib
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np

import sample
import tasks
from env import DEFAULT_ACTIONS, FIELDS, PROMPTS, Cache, Env, Unprotected, header, printed_metric, record

FINAL = {"last-valid": "the last valid submission",
         "best-validation": "the valid submission whose script printed the best score"}
CODER_TOKENS = 4096     # a reply of the coder may have: it writes whole scripts
CODE_END = "\n```\n"    # the line that ends a script in a reply
NO_MODEL = """
No --model was given, so only the starter scripts ran. To run an agent, add one of
  --model Qwen/Qwen2.5-0.5B-Instruct       a model on the Hugging Face hub, downloaded when first used
  --model models/qwen                      a folder; hf download Qwen/Qwen2.5-7B-Instruct --local-dir models/qwen
  --model http://localhost:8000/v1#name    any OpenAI-compatible server; its key is read from OPENAI_API_KEY
"""


@dataclass
class Settings:
    task: str = "leaf-classification"  # a task's id, held-in, held-out, paper (those of Table 1) or all
    model: str = ""  # a folder, a hub id, tiny (random weights), or http://host:port/v1#name; empty: starters alone
    coder: str = "model"  # who carries out the (AI) actions: model (the same one), none, or another, as in --model
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
    dtype: str = "auto"  # of the weights: auto, float32 or bfloat16
    device: str = "auto"  # of the model: auto, cpu or cuda
    python: str = sys.executable  # the interpreter that runs the tasks' scripts
    gpu: str = ""  # GPUs for the scripts, such as 0 or 0,1: each script gets one of them; empty hides all
    threads: int = 1  # that a script may use for numerics
    sandbox: str = "on"  # on, or off: scripts can then read the answers and your files; every row says so
    recheck: float = 0.0  # share of the results known from an earlier run that are run again and compared, 0 to 1
    seed: int = 0  # of sampling and of the bootstrap

    def __post_init__(self):
        for name in ("trajectories", "steps", "seconds", "parallel", "max_new_tokens", "context", "threads"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, found {getattr(self, name)}")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError("expected --temperature of at least 0 and --top-p above 0 and up to 1, found "
                             f"{self.temperature} and {self.top_p}")
        if self.sandbox not in ("on", "off") or not 0 <= self.recheck <= 1:
            raise ValueError("expected --sandbox on or off and --recheck from 0 to 1, found "
                             f"{self.sandbox} and {self.recheck}")
        if self.prompt not in PROMPTS:
            raise ValueError(f"--prompt must be {' or '.join(PROMPTS)}, found {self.prompt!r}")
        if self.final not in FINAL:
            raise ValueError(f"--final must be {' or '.join(FINAL)}, found {self.final!r}")
        if unknown := set(self.actions) - set(DEFAULT_ACTIONS):
            raise ValueError(f"there is no action {min(unknown)!r}; the actions are: {','.join(DEFAULT_ACTIONS)}")
        if not set(self.fields) <= set(FIELDS) or self.fields[-2:] != FIELDS[-2:]:
            raise ValueError(f"--fields must be taken from {','.join(FIELDS)} and end in the last two")


class Failed(RuntimeError):
    """The run cannot go on, for a reason that is not a bug; the message is for the user."""


def with_agent(s):
    """The settings, those at their default replaced by what the folder of the model says of how it was trained to act:
    agent.json, which sft.py writes."""
    path = Path(s.model, "agent.json")
    if not (s.model and path.is_file()):
        return s
    default, kept = {field.name: field.default for field in fields(s)}, json.loads(path.read_text())
    return replace(s, **{name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()
                         if name in default and getattr(s, name) == default[name]})


# ---------------------------------------------------------------------------------------------------------------------
# One trajectory. Its file: a header, a line for each step, and a line of type "end" if it outgrew the context.

def file_of(s, id, k):
    return Path(s.out, "trajectories", f"{id}-{k}.jsonl")


def read_record(path):
    """The lines of a trajectory's file as dicts, [] where there is no file. A last line that was cut short is removed
    from the file; any other line that is not JSON is a ValueError."""
    raw = path.read_bytes() if path.exists() else b""
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        os.truncate(path, whole)
    lines = []
    for number, line in enumerate(raw[:whole].splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number} is not JSON; delete that file to play it again") from None
    return lines


def ended(lines):
    """Why the trajectory is over ("final answer", "steps", "time", "context full"), "" if it is not."""
    return lines[-1].get("ended", "") if lines else ""


def trajectory(s, task, k, policy, coder, cache, run):
    """Plays trajectory k of a task to its end, from the last step in its file, where it adds a line for each step.
    cache: what scripts gave before, shared by all. run: the Run that writes the lines, and that may stop it."""
    path = file_of(s, task.id, k)
    lines = read_record(path)
    sampling = dict(temperature=s.temperature, top_p=s.top_p)

    def seed(speaker):  # differs between trajectories, steps and speakers; the same again after an interruption
        return zlib.crc32(f"{s.seed} {task.id} {k} {env.index} {speaker}".encode())

    def ask_coder(messages):
        reply = coder.chat(messages, max_new_tokens=CODER_TOKENS, stop=CODE_END, seed=seed("coder"), **sampling)
        return reply.text + CODE_END * (reply.finish == "stop")     # a whole script, without what is said after it

    env = Env(task, s.data, out=s.out, actions=s.actions, fields=s.fields, steps=s.steps, seconds=s.seconds,
              coder=coder and ask_coder, prompt=s.prompt, python=s.python, gpu=s.gpu or None, threads=s.threads,
              sandbox=s.sandbox, cache=cache)
    if lines:
        last = lines[-1]
        messages = [message for line in lines for message in line["messages"]]
        env.restore(last["snapshot"], messages, index=len(lines) - 1, m_before=last["m_after"])
        env.deadline = time.monotonic() + last["seconds_left"]
    else:
        run.write(path, header(env, k=k, model=s.model, coder=s.coder, seed=s.seed, max_new_tokens=s.max_new_tokens,
                               m_after=env.m_before, seconds_left=s.seconds, **sampling))
    while not (env.done or run.stop.is_set()):
        try:
            reply = policy.chat(env.prompt(), max_new_tokens=s.max_new_tokens, stop=("\nObservation:",),
                                seed=seed("policy"), **sampling)
        except sample.ContextFull as error:
            run.write(path, {"type": "end", "ended": "context full", "detail": str(error)})
            return
        step = env.step(reply.text, tokens=reply.tokens or None)
        run.write(path, record(step, finish=reply.finish, tokens=len(reply.tokens), prompt_tokens=reply.prompt_tokens,
                               cached_tokens=reply.cached_tokens, sample_seconds=reply.seconds,
                               m_after=env.m_before, seconds_left=env.deadline - time.monotonic()))


# ---------------------------------------------------------------------------------------------------------------------
# All of them together

class Run:
    """What the threads of one run share: where they report, and how they are stopped."""

    def __init__(self, records, num_steps):
        """records: {path: the lines it holds} of every trajectory, each of at most num_steps."""
        self.stop, self.lock, self.start, self.tokens = threading.Event(), threading.Lock(), time.monotonic(), 0
        self.num_steps, self.over = num_steps, {path for path, lines in records.items() if ended(lines)}
        self.steps = {path: sum(line["type"] == "step" for line in lines) for path, lines in records.items()}
        self.share_before = self.share()

    def write(self, path, line):
        """Appends a line to a trajectory's file, unless all was stopped: each line is whole, and none follows."""
        with self.lock:
            if self.stop.is_set():
                return
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.steps[path] += line["type"] == "step"
            self.tokens += line.get("tokens", 0)
            self.over |= {path} if line.get("ended") else set()

    def share(self):
        """What is done of all, 0 to 1, if each trajectory that is not over needs all its steps."""
        done = [1.0 if path in self.over else steps / self.num_steps for path, steps in self.steps.items()]
        return sum(done) / len(done)

    def line(self):
        """The progress in one line."""
        with self.lock:
            seconds, share = time.monotonic() - self.start, self.share()
        won = share - self.share_before
        return (f"{len(self.over)}/{len(self.steps)} trajectories, {sum(self.steps.values())} steps, "
                + f"{self.tokens / seconds:.1f} tokens/s, " * bool(self.tokens)      # an endpoint does not tell
                + f"{timedelta(seconds=int(seconds))} elapsed"
                + (f", ETA {timedelta(seconds=int(seconds * (1 - share) / won))}" if won > 0 else ""))


def play(s, jobs, policy, coder, cache, run):
    """Plays the trajectories `jobs`, [(task, k)], s.parallel at a time. The first error stops all and is raised."""
    waiting, errors = queue.SimpleQueue(), []
    for job in jobs:
        waiting.put(job)

    def work():
        try:
            while not run.stop.is_set():
                trajectory(s, *waiting.get_nowait(), policy, coder, cache, run)
        except queue.Empty:
            return
        except BaseException as error:      # raised again below, in the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(s.parallel, len(jobs)))]
    for thread in threads:
        thread.start()
    # a terminal's line is rewritten in place; a log gets a line a minute
    before, after, pause = ("\r", "\033[K", 0.5) if sys.stderr.isatty() else ("", "\n", 60.0)
    shown = time.monotonic()
    try:
        while any(thread.is_alive() for thread in threads) and not errors:
            time.sleep(0.05)
            if time.monotonic() - shown > pause:
                print(before + run.line(), end=after, file=sys.stderr, flush=True)
                shown = time.monotonic()
    finally:
        with run.lock:      # not in the middle of a line
            run.stop.set()
        print(before + run.line(), end=after.strip() + "\n", file=sys.stderr, flush=True)
    if errors and isinstance(errors[0], (sample.EndpointError, Unprotected)):
        raise errors[0]
    if errors:      # with its traceback: it is nothing that settings could put right
        raise RuntimeError("a trajectory could not be played") from errors[0]


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
    return {"score": chosen.get("score"), "failed": not chosen, "step": chosen.get("index"),
            "printed": chosen.get("printed"), "oracle": oracle.get("score"), "oracle_step": oracle.get("index"),
            "ended": ended(lines), "steps": len(steps), "valid_replies": sum(step["valid"] for step in steps),
            "kinds": dict(Counter(step["kind"] for step in steps)),
            "outcomes": dict(Counter(step["outcome"] for step in steps if step["outcome"])),
            "flagged": sum(tasks.flagged(step["canary_p"]) for step in steps),
            "mean_reward": sum(step["reward"] for step in steps) / len(steps) if steps else None,
            "sandbox": sorted({step["sandbox"] for step in steps if step["sandbox"]}),
            "tokens": sum(step["tokens"] for step in steps),
            "seconds": sum(step["seconds"] + step["sample_seconds"] for step in steps)}


def gain(score, starter, direction):
    """Relative gain of a score over the starter's, in per cent; None where the starter's is 0."""
    worse, better = (starter, score) if direction == "up" else (score, starter)
    return None if starter == 0 else 100 * (better - worse) / abs(starter)


def summary(scores, starter, direction, seed=0):
    """Statistics of a task's trajectories. scores: one a trajectory, None where it failed, which counts as `starter`.
    The interval is the middle 95 % of the averages of 10,000 bootstrap samples; it and the error need two scores."""
    values = np.array([starter if score is None else score for score in scores], dtype=float)
    n, average = len(values), float(values.mean())
    best = float(values.max() if direction == "up" else values.min())
    error = interval = None
    if n > 1:
        error = float(values.std(ddof=1) / np.sqrt(n))
        averages = values[np.random.default_rng(seed).integers(0, n, (10_000, n))].mean(1)
        interval = np.quantile(averages, [0.025, 0.975]).tolist()
    return {"average": average, "best": best, "gain": gain(average, starter, direction),
            "best_gain": gain(best, starter, direction), "standard_error": error, "interval": interval,
            "failed": sum(score is None for score in scores), "trajectories": n}


def about(task, info):
    """What results.json says of a task whatever was run."""
    return {"metric": task.metric, "direction": task.direction, "miniature": info["miniature"],
            "starter": info["m_init"], "published": {} if info["miniature"] else task.published}


def collect(s, infos):
    """What results.json says of each task: its finished trajectories and, if there are any, their statistics."""
    found = {}
    for task, info in infos:
        records = [read_record(file_of(s, task.id, k)) for k in range(s.trajectories)]
        done = [{"k": k, **outcome(lines, task.direction, s.final)}
                for k, lines in enumerate(records) if ended(lines)]
        found[task.id] = {**about(task, info), "trajectories": done, "flagged": sum(one["flagged"] for one in done)}
        for name in ("score", "oracle") if done else ():
            scores = [one[name] for one in done]
            found[task.id][f"{name}_summary"] = summary(scores, info["m_init"], task.direction, s.seed)
    return found


def number(x, form=".4f"):
    return "-" if x is None else f"{x:{'.1f' if abs(x) >= 1000 else form}}"


def layout(rows):
    """Rows of texts as lines with aligned columns; the first two are set to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def report(results):
    """The tables, as text, of what results.json holds."""
    found, s, parts = results["tasks"], results["settings"], []
    bare = " (sandbox off)" * (s.get("sandbox") == "off")
    first = {id: (id + " (miniature)" * one["miniature"] + bare + " (FLAGGED)" * (one["flagged"] > 0),
                  f"{one['metric']} ({one['direction']})", number(one["starter"])) for id, one in found.items()}
    if any(one["miniature"] for one in found.values()):
        parts.append("Miniature data are made up from a seed: scores on them do not compare with published ones.")
    if flagged := {id: one["flagged"] for id, one in found.items() if one["flagged"]}:
        counts = ", ".join(f"{id} ({count} submission{'s' * (count > 1)})" for id, count in flagged.items())
        parts.append("FLAGGED: submissions that hold answers planted among the private ones, which no honest script\n"
                     f"has. These scores are not to be trusted: {counts}.")
    if again := results.get("rechecked"):
        parts.append(f"{again['runs']} known results were run again; {len(again['moved'])} came out differently.")
    if not s["model"]:
        rows = [(*first[id], number(one["printed"]), f"{one['seconds']:.1f}") for id, one in found.items()]
        return "\n\n".join([*parts, layout([("task", "metric", "starter", "it printed", "seconds"), *rows])])
    for name, what in (
            ("score", f"Model {s['model']}, at most {s['steps']} steps. Counted is {FINAL[results['final']]} of each "
                      "trajectory;\none without any has failed and counts at the starter's score."),
            ("oracle", "Not a result: the best graded step of each trajectory, which no agent can know.")):
        rows = [("task", "metric", "starter", "average", "best", "gain %", "best gain %", "std. error",
                 "95 % interval", "failed")]
        for id, one in found.items():
            a = one[f"{name}_summary"]
            rows.append((*first[id], number(a["average"]), number(a["best"]), number(a["gain"], "+.1f"),
                         number(a["best_gain"], "+.1f"), number(a["standard_error"]),
                         " to ".join(map(number, a["interval"] or [None])), f"{a['failed']}/{a['trajectories']}"))
        parts.append(f"{what}\n{layout(rows)}")
        gains = [a["gain"] for one in found.values() if (a := one[f"{name}_summary"])["gain"] is not None]
        if len(gains) > 1:
            parts[-1] += f"\nMean gain over {len(gains)} tasks: {sum(gains) / len(gains):+.1f} %"
    played = [each for one in found.values() for each in one["trajectories"]]
    ends = Counter(each["ended"] for each in played)
    valid, steps = (sum(each[name] for each in played) for name in ("valid_replies", "steps"))
    parts.append("How they ended: " + ", ".join(f"{end} {count}" for end, count in ends.most_common())
                 + f". Valid replies: {valid} of {steps}.")
    if published := {id: one["published"] for id, one in found.items() if one["published"]}:
        models = list(next(iter(published.values())))
        rows = [(*first[id][:2], *(" / ".join(map(number, figures[model])) for model in models))
                for id, figures in published.items()]
        parts.append("Published in Table 1 of the paper: average / best over 8 trajectories.\n"
                     + layout([("task", "metric", *models), *rows]))
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The command

def prepare(s):
    """Prepares the tasks, each on first use, and returns [(task, what its task.json says)]. ValueError: no such task,
    or a raw folder that lacks something. Failed: a starter that does not run."""
    chosen = [tasks.load(id) for id in tasks.names(s.task)]
    if not chosen:
        raise ValueError(f"there is no {s.task} task here yet; python -m tasks list shows those there are")
    for task in chosen:
        raw = s.raw if len(chosen) == 1 else s.raw and Path(s.raw, task.id)
        if raw and not Path(raw).is_dir():
            raise ValueError(f"there is no folder {raw}. It should hold {task.download} ({task.size})."
                             + " For several tasks --raw holds a folder for each task id." * (len(chosen) > 1))
        try:
            tasks.prepare(task.id, raw or None, s.data, python=s.python, say=lambda line: print(line, file=sys.stderr))
        except RuntimeError as error:
            raise Failed(str(error)) from error
    return [(task, tasks.info(task.id, s.data)) for task in chosen]


def conditions(s, infos):
    """All that the trajectories depend on, {name: value}: a run is continued only under the same."""
    # these say where, how many, or how it is counted
    free = ("out", "data", "raw", "parallel", "final", "trajectories", "recheck")
    same = {name: value for name, value in json.loads(json.dumps(asdict(s))).items() if name not in free}

    def short(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
    for task, info in infos:
        kind = "miniature" if info["miniature"] else "real"
        same[f"data of {task.id}"] = f"{kind} {short([info['sha256'], info['m_init']])}"
    for name in [s.model, s.coder][:1 if s.coder in ("model", "none") else 2]:
        if name and Path(name).is_dir():    # a model trained anew in the same folder is another model
            stats = {file.name: file.stat() for file in Path(name).glob("*.safetensors")}
            same[f"files of {name}"] = short({file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()})
    return same


def check_same(s, now):
    """ValueError naming what differs where --out holds trajectories made under other conditions."""
    if not any(Path(s.out, "trajectories").glob("*.jsonl")):
        return
    path = Path(s.out, "results.json")
    then = json.loads(path.read_text())["settings"] if path.exists() else {}
    differ = [f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
              for name in {**then, **now} if then.get(name) != now.get(name)]
    if differ:
        raise ValueError(f"{s.out} holds a run with other settings: {'; '.join(differ)}. "
                         "Give another --out, or delete that folder.")


def baseline(s, infos, cache):
    """Runs each starter once; what results.json says of each task."""
    found = {}
    for task, info in infos:
        env = Env(task, s.data, out=s.out, python=s.python, gpu=s.gpu or None, threads=s.threads,
                  sandbox=s.sandbox, cache=cache)
        score, result = env.score()
        if score is None:
            raise Failed(f"the starter of {task.id}: {result.outcome}. {result.detail}\n{result.stderr}")
        found[task.id] = {**about(task, info), "starter": score, "printed": printed_metric(result.stdout, task.metric),
                          "seconds": result.seconds, "sandbox": result.sandbox,
                          "flagged": int(tasks.flagged(result.canary_p))}
    return found


def rechecked(cache):
    """What results.json says of --recheck: how many known results were run again, and those that came out
    differently."""
    return {"rechecked": {"runs": cache.counts["rechecked"], "moved": cache.moved}} if cache.recheck else {}


def evaluate(s, load=sample.load):
    """Does what the settings say and returns what results.json then holds. ValueError: something is wrong with them."""
    Path(s.out, "trajectories").mkdir(parents=True, exist_ok=True)
    with Path(s.out, "lock").open("w") as lock:      # let go however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another eval.py writes to {s.out}; wait for it, or give another --out") from None
        infos = prepare(s)
        results = {"complete": False, "settings": conditions(s, infos), "final": s.final, "tasks": {}, "versions": {
            name: version(name) for name in ("torch", "tokenizers", "numpy", "pandas", "scikit-learn")}}
        check_same(s, results["settings"])
        path = Path(s.out, "results.json")

        def save(**more):
            results.update(more)
            part = path.with_suffix(".part")        # written aside and renamed: whole, or the one before
            part.write_text(json.dumps(results, indent=1) + "\n")
            part.replace(path)

        save()
        cache = Cache(Path(s.out, "cache"), s.recheck)
        if not s.model:
            save(tasks=baseline(s, infos, cache), complete=True, **rechecked(cache))
            return results
        jobs = [(task, k) for k in range(s.trajectories) for task, _ in infos]
        records = {file_of(s, task.id, k): read_record(file_of(s, task.id, k)) for task, k in jobs}
        jobs = [(task, k) for task, k in jobs if not ended(records[file_of(s, task.id, k)])]
        run = Run(records, s.steps)
        if any(records.values()):
            print(f"{s.out}: {len(run.over)} of {len(records)} trajectories are done; going on", file=sys.stderr)
        if jobs:
            options = dict(dtype=s.dtype, device=s.device, rows=min(s.parallel, len(jobs)), context=s.context)
            policy = load(s.model, **options)
            if policy.context and s.max_new_tokens >= policy.context:
                raise ValueError(f"--max-new-tokens {s.max_new_tokens} leaves no room in a context of {policy.context}")
            coder = policy if s.coder == "model" else None if s.coder == "none" else load(s.coder, **options)
            try:
                play(s, jobs, policy, coder, cache, run)
            finally:
                save(tasks=collect(s, infos), **rechecked(cache))
        save(tasks=collect(s, infos), complete=True)
        return results


def attempt(program, work, kept):
    """The exit status of work(): 0 done, 1 failed or interrupted, 2 bad settings, with the message on the error
    stream. kept: the folder where what was done stays."""
    try:
        work()
        return 0
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except (Failed, Unprotected, sample.EndpointError) as error:
        print(f"{program}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
    print(f"What was done is kept in {kept}; the same command goes on from there.", file=sys.stderr)
    return 1


def run_program(main):
    """Ends the process with main()'s status. A batch system's request to end is a Ctrl-C; the scripts' folders lie
    below one that is removed, and a second Ctrl-C does not leave it behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 1
    with tempfile.TemporaryDirectory(prefix="ml-agent-", ignore_cleanup_errors=True) as tempfile.tempdir:
        try:
            code = main()
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)      # threads may still wait for a reply or a script; the scripts end when we do


def main(argv=None):
    s = with_agent(sample.parse(Settings, argv))

    def work():
        print("\n" + report(evaluate(s)))
        print(f"{NO_MODEL * (not s.model)}\nWritten to {s.out}: results.json{', trajectories, blobs' * bool(s.model)}")
    return attempt("eval.py", work, s.out)


if __name__ == "__main__":
    run_program(main)
