"""Records of trajectories, and their replay.

A trajectory file holds one JSON object a line: a header, the steps, and at most an "end". It may come from others, so
each line is checked. The environment gives its words to `record_forms` and its class to `replay`.
"""
import argparse, dataclasses, json, re, sys, tempfile
from pathlib import Path

from reward import KINDS, best_of
from support.files import (
    FLAG, TEXT, check_form, is_number, maybe, one_of, read_json_lines, refuse_links_out, shorten, some_of)
from support.sandbox import SandboxUnavailable
from support.storage import ResultCache, check_snapshot

CANNOT_TAKE = "The helper cannot take this: "       # begins the error of a step whose coder has refused the question


# ---------------------------------------------------------------------------------------------------------------------
# Forms

ANY_NUMBER = "a number", lambda value: type(value) in (int, float)      # also NaN, where it is only shown
FINITE = "a finite number", is_number
POSITIVE = "a number above 0", lambda value: is_number(value) and value > 0
INTEGER = "a whole number", lambda value: type(value) is int and abs(value) < 1 << 63
SIZE = "a whole number above 0", lambda value: type(value) is int and 0 < value < 1 << 63
TASK_ID = "the id of a task", lambda value: isinstance(value, str) and re.fullmatch(r"\w[\w.-]{0,99}", value)


def is_message(message):
    if type(message) is not dict or not {"role", "content"} <= set(message) <= {"role", "content", "tokens"}:
        return False
    tokens = message.get("tokens", [])
    return (message["role"] in ("system", "user", "assistant") and TEXT[1](message["content"])
            and type(tokens) is list and all(type(token) is int and 0 <= token < 1 << 31 for token in tokens))


MESSAGE = "a message: role, content, and at most tokens", is_message


def record_forms(prompts, actions, reply_fields, outcomes):
    """Returns {type of a record: its form}, and under "cached" that of a run in the cache."""
    action_names = f"a list of some of {', '.join(actions)}", lambda value: value == [] or some_of(*actions)[1](value)
    result = {
        "outcome": one_of(*outcomes), "exit_code": INTEGER, "stdout": TEXT, "stderr": TEXT, "seconds": FINITE,
        "peak_bytes": INTEGER, "sandbox": TEXT, "detail": TEXT, "warm": FLAG, "limit": TEXT}
    cached = {"result": result, "score": maybe(FINITE), "after": ("files or null", lambda value: True)}
    header = {
        "task": TASK_ID, "data": TEXT, "prompt": one_of(*prompts), "actions": action_names, "fields": reply_fields,
        "steps": SIZE, "seconds": POSITIVE, "python": maybe(TEXT), "gpu": maybe(TEXT), "threads": SIZE, "sandbox": TEXT,
        "m_init": FINITE, "m_best": FINITE, "miniature": FLAG, "m_after": FINITE, "seconds_left": FINITE,
        "messages": [MESSAGE],
        # written by the programs
        "k?": INTEGER, "seed?": INTEGER, "max_new_tokens?": INTEGER, "temperature?": FINITE, "top_p?": FINITE,
        "model?": TEXT, "coder?": TEXT, "expert?": TEXT, "tokenizer?": maybe(TEXT), "ideas?": [TEXT],
        "data_sha256?": {str: TEXT}}
    step = {
        "index": INTEGER, "reply": TEXT, "fields": {str: TEXT}, "action": maybe(TEXT), "args": {str: TEXT}, "valid": FLAG,
        "error": TEXT, "observation": TEXT, "kind": one_of(*KINDS), "outcome": maybe(one_of(*outcomes)), "detail": TEXT,
        "printed": maybe(ANY_NUMBER), "score": maybe(FINITE), "m_before": FINITE, "m_after": FINITE,
        "m_top": maybe(FINITE), "reward": FINITE, "seconds": FINITE, "time_left_s": FINITE, "seconds_left": FINITE,
        "script_seconds": FINITE, "peak_bytes": INTEGER, "sandbox": TEXT, "coder": [TEXT], "ended": TEXT,
        "messages": [MESSAGE],
        # written by the programs
        "tokens?": maybe(INTEGER), "prompt_tokens?": maybe(INTEGER), "cached_tokens?": maybe(INTEGER),
        "sample_seconds?": maybe(FINITE), "finish?": maybe(TEXT)}
    end = {"ended": TEXT, "detail?": TEXT}
    return {"header": header, "step": step, "end": end, "cached": cached}


# ---------------------------------------------------------------------------------------------------------------------
# Records

def header(env, **entries):
    """Returns the first line, to be written right after reset(). entries: the caller's own (model, seed)."""
    return {"type": "header", "task": env.task.id, "data": str(env.data), "prompt": env.prompt_format,
            "actions": env.actions, "fields": env.fields, "steps": env.steps, "seconds": env.seconds,
            "python": env.python, "gpu": env.gpu, "threads": env.threads, "sandbox": env.sandbox,
            "m_init": env.info["m_init"], "m_best": env.info["m_best"], "miniature": bool(env.info.get("miniature")),
            "m_after": env.m_before, "seconds_left": env.seconds, "snapshot": env.snapshot(),
            "messages": list(env.messages), **entries}


def record(step, **entries):
    """Returns the line of a step. The state before step i is the snapshot of step i - 1, or the header's; the messages
    of the header and of all steps before i; m_before and m_top of step i."""
    return {"type": "step", **dataclasses.asdict(step), **entries}


def check_record(forms, line, first):
    """Raises ValueError, one sentence, unless a line from anybody is such as header() or record() returns, or an end.
    first: it must be the header."""
    if type(line) is not dict:
        raise ValueError("it is no JSON object")
    kind = line.get("type")
    if kind not in (["header"] if first else ["step", "end"]):
        raise ValueError(f"its type is {shorten(ascii(kind), 60)}")
    for name, form in forms[kind].items():
        key = name.removesuffix("?")
        if key in line:
            check_form(line[key], form, f'its entry "{key}"')
        elif key == name:
            raise ValueError(f'its entry "{key}" is missing')
    if kind != "end":
        if "snapshot" not in line:
            raise ValueError('its entry "snapshot" is missing')
        check_snapshot(line["snapshot"])
    if kind == "step" and not line["messages"]:
        raise ValueError('its entry "messages" is empty')


def read_records(forms, path, mend=False):
    """Returns the lines of a trajectory file, [] where there is none; a last line that was cut short is left out, and
    with mend removed from the file. ValueError names the line that is no record, and the reason."""
    lines = read_json_lines(path, {}, mend)
    for number, line in enumerate(lines, 1):
        try:
            check_record(forms, line, number == 1)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no record of a trajectory: {error}") from None
    return lines


def read_trajectory(forms, path):
    """Returns (header, [step, ...]) of a trajectory file. ValueError: as read_records, or there is no line."""
    lines = read_records(forms, path)
    if not lines:
        raise ValueError(f"{path} does not exist or is empty; a trajectory starts with a header")
    return lines[0], [line for line in lines if line["type"] == "step"]


def read_record(forms, path, mend=True):
    """Returns the lines of a file <task>-<k>.jsonl, as read_records; it must be of that task."""
    try:
        lines = read_records(forms, path, mend)
        if lines:
            check_form(lines[0]["task"], one_of(path.stem.rpartition("-")[0]), f"{path}, line 1, 'task'")
    except ValueError as error:
        raise ValueError(f"{error}; delete that file to play it again") from None
    return lines


def end_reason(lines):
    """Returns why a trajectory is over: "final answer", "steps", "time" or "context full"; "" if it is not."""
    return lines[-1].get("ended", "") if lines else ""


def best_before(task, head, steps):
    """Returns the best score of a recorded trajectory after `steps`: the starter's, or an edit's."""
    return best_of(task.direction, head["m_init"], *(step["m_after"] for step in steps))


def trajectory_path(folder, id, k):
    return Path(folder, f"{id}-{k}.jsonl")


def trajectory_files(folder):
    """Returns the trajectory files in a folder of eval.py or of sft.py --collect, those of a task in order."""
    paths = [*Path(folder).glob("trajectories/*-*.jsonl"), *Path(folder).glob("*-*.jsonl")]
    named = []
    for path in paths:
        id, _, k = path.stem.rpartition("-")
        if re.fullmatch(r"[\w.-]+ \d{1,9}", f"{id} {k}", re.ASCII):
            named.append((id, len(k), k, path))
    return [path for *_, path in sorted(named)]


# ---------------------------------------------------------------------------------------------------------------------
# Replay

COMPARED = ("fields", "action", "args", "valid", "error", "observation", "kind", "outcome", "detail", "printed",
            "score", "m_before", "m_after", "m_top", "reward", "snapshot", "ended")


def replay(Env, forms, path, say=print, *, data="data", sandbox="on", python=None, gpu=None, threads=1):
    """Restores every recorded state, carries out its reply again, says what differs (times masked, figures to 6 digits)
    and returns the number of differences. The other arguments are as for Env; where the file tells of others, that is
    said, and not obeyed: a file must not choose a program, a folder or a weaker sandbox."""
    head, steps = read_trajectory(forms, path)
    out = next((parent for parent in Path(path).resolve().parents if (parent / "blobs").is_dir()), None)
    if out is None:
        raise ValueError(f"there is no folder `blobs` beside {path} or above it, so no state can be restored")
    refuse_links_out(out)
    chosen = {"data": str(data), "sandbox": sandbox, "python": python or sys.executable, "gpu": gpu, "threads": threads}
    recorded = head | {"python": head["python"] or sys.executable}
    for name, value in chosen.items():
        if recorded[name] != value:
            say(f"it was recorded with {name} {shorten(ascii(recorded[name]), 100)}; here it is {value!r}, as --{name} "
                "says")
    coder = RecordedCoder()
    settings = {name: head[name] for name in ("actions", "fields", "steps", "seconds", "prompt")}
    snapshot = head["snapshot"]
    messages = head["messages"]
    num_differences = 0
    with tempfile.TemporaryDirectory(prefix="ml-agent-replay-") as empty:     # every script is really run again
        env = Env(head["task"], data, out=out, coder=coder, cache=ResultCache(empty), sandbox=sandbox, python=python,
                  gpu=gpu, threads=threads, **settings)
        for number, step in enumerate(steps):
            env.restore(snapshot, messages, index=step["index"], m_before=step["m_before"],
                        m_top=best_before(env.task, head, steps[:number]), seconds=step["time_left_s"])
            coder.answers = list(step["coder"])
            coder.error = step["error"]
            replayed = json.loads(json.dumps(record(env.step(step["reply"]))))
            for name in COMPARED:
                before, after = _masked(step[name]), _masked(replayed[name])
                if before != after:
                    num_differences += 1
                    say(f"step {step['index']}, {name}:\n  recorded: {shorten(repr(before), 1000)}\n"
                        f"  replayed: {shorten(repr(after), 1000)}")
            snapshot = step["snapshot"]
            messages = messages + step["messages"]
    say(f"{len(steps)} steps replayed, {num_differences} differences")
    return num_differences


class RecordedCoder:
    """Answers as the coder did when a step was recorded."""

    def __call__(self, messages):
        if not self.answers:     # it raised an error then
            raise ValueError(self.error.removeprefix(CANNOT_TAKE))
        return self.answers.pop(0)


def _masked(value):
    """Returns the value with times masked and figures rounded to 6 digits."""
    if isinstance(value, str):
        return re.sub(r"\d[\d.,]{0,30} ?(?=(?:ms|s|sec|seconds|min|minutes)\b)", "# ", value)
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(replay, args):
    parser = argparse.ArgumentParser("env.py", allow_abbrev=False, description="Runs a recorded trajectory again and "
                                     "says what differs. How scripts are run is said here, and never by the file.")
    parser.add_argument("command", choices=["replay"])
    parser.add_argument("file", metavar="FILE", help="a trajectory, as eval.py and sft.py write them")
    parser.add_argument("--data", default="data", help="where prepared tasks are kept (default: data)")
    parser.add_argument("--sandbox", default="on", choices=["on", "off"],
                        help="off: scripts can read the answers and all your files (default: on)")
    parser.add_argument("--python", help="the interpreter that runs the scripts (default: this one)")
    parser.add_argument("--gpu", help="CUDA_VISIBLE_DEVICES of the scripts (default: none)")
    parser.add_argument("--threads", type=int, default=1, help="that a script may use for numerics (default: 1)")
    try:
        settings = vars(parser.parse_args(args))
        settings.pop("command")
        if settings["threads"] < 1:
            parser.error(f"--threads must be at least 1, found {settings['threads']}")
    except SystemExit as end:
        return end.code
    try:
        return 1 if replay(settings.pop("file"), **settings) else 0
    except (ValueError, OSError, SandboxUnavailable) as error:
        print(f"env.py replay: {error}", file=sys.stderr)
        return 2
