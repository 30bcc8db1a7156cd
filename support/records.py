"""Records of trajectories, and their replay (python env.py replay FILE).

A trajectory file holds one JSON object a line: a header, the steps, and at most an "end". It may come from others.
"""
import dataclasses, importlib, json, re, sys, tempfile
from pathlib import Path

import tasks
from env import CANNOT_TAKE, DEFAULT_ACTIONS, FIELDS, OUTCOMES, PROMPTS, SCAFFOLDS, Step
from reward import KINDS, best_of
from support import cli
from support.files import (
    COUNT, FLAG, NUMBER, TEXT, WORD, check_form, is_number, maybe, one_of, read_json_lines, refuse_links_out, shorten,
    some_of, up_to)
from support.sandbox import SandboxUnavailable
from support.storage import ResultCache, check_snapshot

COMPARED = ("fields", "action", "args", "valid", "error", "observation", "kind", "outcome", "detail", "printed",
            "score", "m_before", "m_after", "m_top", "reward", "news", "change", "best_printed", "best_script",
            "tried", "node", "snapshot", "ended")
AGENT = ("actions", "fields", "prompt_format", "show_scores", "steps", "seconds")   # what an Env takes from a record


# -- Forms

def is_tokens(value):
    return type(value) is list and all(type(token) is int and 0 <= token < 1 << 31 for token in value)


def is_change(value):
    return (type(value) is dict and set(value) == {"constant", "value"} and all(map(TEXT[1], value.values()))
            and re.fullmatch(r"\s*[0-9]{1,9}\s*", value["constant"]) is not None)


CHANGE = "the arguments of Set Constant", is_change
LAST_CHANGE = "the arguments of Set Constant or {}", lambda value: value == {} or is_change(value)
FINITE = "a finite number", is_number
POSITIVE = "a number above 0", lambda value: is_number(value) and value > 0
TASK_ID = "the id of a task", lambda value: isinstance(value, str) and re.fullmatch(r"\w[\w.-]{0,99}", value)
MESSAGE = {"role": one_of("system", "user", "assistant"), "content": TEXT, "tokens?": ("token ids", is_tokens)}
FILES = "files", lambda value: True     # see check_snapshot
NODE = {        # what a scaffold that searches says of a step, see support/aide.py
    "parent?": maybe(COUNT), "best?": maybe(COUNT), "metric?": maybe(FINITE), "buggy?": FLAG,
    "review?": one_of("model", "script"), "is_printed?": FLAG}
ANSWER = {      # of the model
    "tokens?": COUNT, "prompt_tokens?": COUNT, "cached_tokens?": COUNT, "thought?": TEXT,
    "no_reply?": TEXT, "answered_by?": WORD, "refused?": [WORD], "dropped?": [TEXT], "coder_tokens?": COUNT,
    "coder_replies?": COUNT, "coder_prompt_tokens?": COUNT, "coder_answered_by?": WORD}
FORM_OF_TYPE = {
    int: COUNT, float: FINITE, str: TEXT, bool: FLAG, dict: {str: TEXT}, list: [TEXT],
    float | None: maybe(FINITE), str | None: maybe(TEXT)}
AGENT_FORMAT = {      # of agent.json in the folder of a model: how it was trained to act
    "prompt_format": one_of(*PROMPTS),
    "actions": some_of(*DEFAULT_ACTIONS),
    "fields": (f"some of {', '.join(FIELDS)}, each once, with the last two at the end", lambda value: (
        some_of(*FIELDS)[1](value) and value[-2:] == list(FIELDS[-2:]))),
    "context": up_to(1 << 20),
    "max_new_tokens": up_to(1 << 20),
    "steps": up_to(1 << 20),
    "show_scores": FLAG,
}
FORMS = {       # type of a record -> its form
    "header": {name: AGENT_FORMAT[name] for name in AGENT if name in AGENT_FORMAT} | {
        "actions": ("a list of actions", lambda value: value == [] or AGENT_FORMAT["actions"][1](value)),
        "steps": up_to(1 << 53),
        "task": TASK_ID, "data": TEXT, "data_seed": COUNT, "seconds": POSITIVE, "python": maybe(TEXT),
        "gpu": maybe(TEXT), "threads": up_to(1 << 20), "sandbox": TEXT, "news": TEXT, "change": LAST_CHANGE,
        "best_printed": maybe(FINITE), "best_script": maybe(TEXT), "tried": [CHANGE], "tries": [TEXT],
        "m_init": FINITE, "m_best": FINITE, "miniature": FLAG, "m_after": FINITE, "seconds_left": FINITE,
        "messages": [MESSAGE], "snapshot": FILES, "tokenizer?": maybe(TEXT), "data_sha256?": {str: TEXT},
        "scaffold?": one_of(*SCAFFOLDS), "search?": [FINITE], "draws?": TEXT},
    "step": {each.name: FORM_OF_TYPE[each.type] for each in dataclasses.fields(Step) if each.name != "node"} | {
        "change": LAST_CHANGE, "tried": [CHANGE], "kind": one_of(*KINDS), "outcome": maybe(one_of(*OUTCOMES)),
        "printed": maybe(NUMBER), "messages": [MESSAGE], "snapshot": FILES, "node?": NODE, **ANSWER},
    "end": {"ended": ("a reason", lambda value: TEXT[1](value) and value != "")}}


# -- Records

def header(env, **entries):
    """Returns the first line, to be written right after reset()."""
    settings = {name: getattr(env, name) for name in (*AGENT, *env.own, "python", "gpu", "threads", "sandbox")}
    return {"type": "header", "task": env.task.id, "data": str(env.data), "data_seed": env.info.get("seed", 0),
            **settings, "m_init": env.info["m_init"], "m_best": env.info["m_best"],
            "miniature": env.info["miniature"],
            "m_after": env.m_before, "seconds_left": env.seconds, **env.seen, "snapshot": env.snapshot(),
            "messages": list(env.messages), **entries}


def record(step, **entries):
    """Returns the line of a step. The state before step i: see restore_record."""
    return {"type": "step", **dataclasses.asdict(step), **entries}


def restore_record(env, head, steps, seconds=None):
    """Puts an Env into the state after the recorded `steps` of a trajectory. seconds: that are left; default: all."""
    last = [head, *steps][-1]
    env.restore(last["snapshot"], **state_after(env.task, head, steps), seconds=seconds, seen=last, past=steps)


def state_after(task, head, steps):
    """Returns what Env.restore takes of the state after the recorded `steps`, besides files and what was seen."""
    return {"index": len(steps), "m_before": [head, *steps][-1]["m_after"],
            "m_top": best_of(task.direction, head["m_init"], *(step["m_after"] for step in steps)),
            "messages": [message for line in (head, *steps) for message in line["messages"]]}


def check_record(line, first):
    """Raises ValueError, one sentence, unless a line is such as header() or record() returns, or an end. first: it must
    be the header."""
    kind = line.get("type") if type(line) is dict else None
    if kind not in (["header"] if first else ["step", "end"]):
        raise ValueError(f"its type is {shorten(ascii(kind), 60)}")
    check_form(line, FORMS[kind], "its entries")
    if kind != "end":
        check_snapshot(line["snapshot"])
        if not line["messages"]:
            raise ValueError("it has no messages")


def check_node(node, index):
    """Raises ValueError unless the node of step `index` hangs on earlier ones."""
    for name, last in (("parent", index - 1), ("best", index)):
        if node.get(name) is not None and node[name] > last:
            raise ValueError(f'its entry "node" names as its {name} a later step')


def read_records(path, mend=False):
    """Returns the lines of a trajectory file, [] where there is none; a last line that was cut short is left out, and
    with mend removed from the file. ValueError names the line that is no record, and the reason."""
    lines = read_json_lines(path, {}, mend)
    for number, line in enumerate(lines, 1):
        try:
            check_record(line, number == 1)
            if line["type"] == "step":
                check_node(line.get("node", {}), number - 2)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no record of a trajectory: {error}") from None
    return lines


def read_trajectory(path):
    """Returns (header, [step, ...]) of a trajectory file. ValueError: as read_records, or there is no line."""
    lines = read_records(path)
    if not lines:
        raise ValueError(f"{path} does not exist or is empty; a trajectory starts with a header")
    return lines[0], steps_of(lines)


def read_record(path, mend=True):
    """Returns the lines of a file <task>-<k>.jsonl, as read_records; it must be of that task."""
    lines = read_records(path, mend)
    if lines and lines[0]["task"] != path.stem.rpartition("-")[0]:
        raise ValueError(f"{path} is a trajectory of {lines[0]['task']}; delete that file to play it again")
    return lines


def steps_of(lines):
    return [line for line in lines if line["type"] == "step"]


def end_reason(lines):
    """Returns why a trajectory is over; "" if it is not."""
    return lines[-1].get("ended", "") if lines else ""


def trajectory_path(folder, id, k):
    return Path(folder, f"{id}-{k}.jsonl")


def trajectory_files(folder):
    """Returns the trajectory files in a folder of eval.py or of sft.py --collect, in order."""
    paths = [*Path(folder).glob("trajectories/*-*.jsonl"), *Path(folder).glob("*-*.jsonl")]
    numbered = [(*match.groups(), path) for path in paths
                if (match := re.fullmatch(r"([\w.-]+)-([0-9]{1,9})", path.stem, re.ASCII))]
    return [path for *_, path in sorted(numbered, key=lambda entry: (entry[0], int(entry[1]), entry[2]))]


# -- Replay

def env_of(scaffold):
    """Returns the Env of a scaffold, None for ours; those of other papers stand on env.py."""
    return importlib.import_module("env" if scaffold in (None, SCAFFOLDS[0]) else f"support.{scaffold}").Env


def replay(path, log=print, *, data="data", sandbox="on", python=sys.executable, gpu=None, threads=1):
    """Restores every recorded state, carries out its reply again, says what differs and returns the number of
    differences. Where the file tells of other options, that is said, and not obeyed: a file must not choose a program,
    a folder or a weaker sandbox."""
    head, steps = read_trajectory(path)
    Env = env_of(head.get("scaffold"))
    out = next((parent for parent in Path(path).resolve().parents if (parent / "blobs").is_dir()), None)
    if out is None:
        raise ValueError(f"there is no folder `blobs` beside {path} or above it, so no state can be restored")
    refuse_links_out(out)
    data = str(tasks.seeded(data, head["data_seed"]))
    options = {"sandbox": sandbox, "python": python, "gpu": gpu or None, "threads": threads}
    for name, value in (options | {"data": data}).items():
        if head[name] != value:
            log(f"it was recorded with {name} {shorten(ascii(head[name]), 100)}; here it is {value!r}, as --{name} "
                "says")
    num_differences = 0
    answers = []        # of the coder in this step

    def recorded_coder(messages):
        if not answers:     # it raised an error then
            raise ValueError(step["error"].removeprefix(CANNOT_TAKE))
        return answers.pop(0)

    with tempfile.TemporaryDirectory(prefix="ml-agent-replay-") as empty:     # every script is really run again
        agent = {name: head[name] for name in (*AGENT, *Env.own) if name in head}
        env = Env(head["task"], data, out=out, coder=recorded_coder, cache=ResultCache(empty), **agent, **options)
        for number, step in enumerate(steps):
            restore_record(env, head, steps[:number], step["time_left_s"])
            answers[:] = step["coder"]
            replayed = json.loads(json.dumps(record(env.step(step["reply"]))))
            for name in COMPARED:
                if _masked(step.get(name, {})) != _masked(replayed[name]):
                    num_differences += 1
                    log(f"step {step['index']}, {name}:\n  recorded: {shorten(repr(step.get(name)), 1000)}\n"
                        f"  replayed: {shorten(repr(replayed[name]), 1000)}")
    log(f"{len(steps)} steps replayed, {num_differences} differences")
    return num_differences


def _masked(value):
    """Returns the value with times masked and figures rounded to 6 digits."""
    if isinstance(value, str):
        return re.sub(r"\d[\d.,]{0,30} ?(?=(?:ms|s|sec|seconds|min|minutes)\b)", "# ", value)
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(args):
    """Runs `env.py replay`. Returns the exit status: 0 no difference, 1 some, 2 it cannot be run."""
    if len(args) < 2 or args[0] != "replay" or args[1].startswith("-"):
        print("usage: python env.py replay FILE [--data D] [--sandbox on|off] [--python P] [--gpu G] [--threads N]",
              file=sys.stderr)
        return 2
    cfg = cli.parse(cli.ScriptSettings, args[2:])
    try:
        return 1 if replay(args[1], **vars(cfg)) else 0
    except (ValueError, OSError, SandboxUnavailable) as error:
        print(f"env.py replay: {error}", file=sys.stderr)
        return 2
