"""What eval.py, sft.py and rl.py share: the settings of an agent and its agent.json, preparing tasks, and playing a
trajectory, from its last recorded step on if there is one."""
import sys, time, zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tasks
from env import DEFAULT_ACTIONS, FIELDS, PROMPTS, WHOLE_SCRIPT, Env
from support import cli
from support.cli import ContextFull, RunError
from support.files import parse_json, read_bytes, shorten, write_atomic
from support.parallel import run_parallel
from support.records import AGENT, AGENT_FORMAT, header, read_record, record, restore_record
from support.sandbox import SLOTS

LEARNED_SEEDS = (1, 2, 3)   # of the miniatures that are learned from; what is reported is measured on seed 0
CODER_TOKENS = 4096     # tokens that a reply of the coder may have: it writes whole scripts
CODE_END = "\n```\n"    # the line that ends a script in a reply
MAX_NO_REPLIES = 3      # steps in a row without a text from the server, after which a trajectory is over


# -- Settings of an agent

@dataclass
class AgentSettings(cli.TaskSettings):
    """Settings of every program in which an agent acts."""
    actions: tuple[str, ...] = DEFAULT_ACTIONS  # what the agent may do
    fields: tuple[str, ...] = FIELDS  # entries of a reply; a weak model does better with "Thought,Action,Action Input"
    prompt_format: str = "full"  # what the model is shown of a state: full (the conversation), medium (the script
        # without comments, the best score and the last tries, for some hundred million weights), or short (the script's
        # constants, the best score and what the last step brought, for a few million)
    show_scores: bool = True  # after an edit the agent is told what the script now prints; without it, as in the paper,
        # it has to run the script to know
    steps: int = 15  # replies that a trajectory may have
    seconds: float = 1800.0  # that a trajectory may take
    clock: str = "all"  # what counts of these seconds: all, or scripts, without the time that the model takes to reply
    reply_seconds: float = 600.0  # that a server may take for one reply
    top_p = 1.0     # no setting: replies are sampled from all tokens

    def __post_init__(self):
        super().__post_init__()
        cli.check_choices(self, clock=("all", "scripts"), prompt_format=PROMPTS)
        cli.check_positive(self, "steps", "seconds", "reply_seconds")
        for name in ("actions", "fields"):
            expected, is_right = AGENT_FORMAT[name]
            value = list(getattr(self, name))
            if not is_right(value):
                raise ValueError(f"{cli.flag_of(name)}: expected {expected}, found {shorten(ascii(value), 200)}")


def read_agent(folder):
    """Returns {name: value} of the settings in agent.json, which lies beside a model's weights and says how it was
    trained to act (records.AGENT_FORMAT); {} where there is none. ValueError: an entry is not of its
    form. Others are ignored, which is announced."""
    path = Path(folder, "agent.json")
    raw = read_bytes(path, 1 << 16)
    if raw is None:
        return {}
    values = parse_json(raw, {f"{name}?": form for name, form in AGENT_FORMAT.items()}, path)
    if ignored := sorted(values.keys() - AGENT_FORMAT.keys()):
        names = shorten(", ".join(map(ascii, ignored)), 200)
        cli.announce(f"{path} may say {', '.join(AGENT_FORMAT)}; ignored: {names}")
    return {name: tuple(values[name]) if isinstance(values[name], list) else values[name]
            for name in AGENT_FORMAT if name in values}


def write_agent(folder, agent):
    write_atomic(Path(folder, "agent.json"), agent)


# -- One trajectory

def make_env(cfg, task, out, cache, data_seed=0, make=Env, **options):
    """Returns the Env of a task by a program's settings. data_seed: of its miniature. make: the Env of a scaffold."""
    return make(task, tasks.seeded(cfg.data, data_seed), out=out, python=cfg.python, gpu=cfg.gpu or None,
               threads=cfg.threads, sandbox=cfg.sandbox, cache=cache, **options)


def ask_coder_model(model, messages, max_new_tokens=CODER_TOKENS, **options):
    """Returns the Completion of the model that carries out the (AI) actions; it may take half of the context. Of a
    whole script it ends with the block, without the text after it; other replies may hold several blocks."""
    if model.context:       # else it is a server's
        max_new_tokens = min(max_new_tokens, model.context // 2)
    stop = CODE_END if messages[-1]["content"].endswith(WHOLE_SCRIPT) else ()
    completion = model.chat(messages, max_new_tokens=max_new_tokens, stop=stop, **options)
    if stop and completion.finish == "stop" and not completion.no_reply:
        if "```" in completion.text:
            completion.text += CODE_END
        else:       # a bare ``` that opened the block has ended it: asked once more, without a stop
            first = completion
            completion = model.chat(messages, max_new_tokens=max_new_tokens, **options)
            completion.prompt_tokens += first.prompt_tokens
            completion.num_tokens = sum(len(each.tokens) or each.num_tokens for each in (first, completion))
    return completion


def model_policy(cfg, model, hint=""):
    """Returns a policy for play_trajectory. hint: the ideas that an expert is told; they are not recorded."""
    tokenizer = getattr(model, "tokenizer", None)       # a server keeps its own

    def reply(env, lines, seed):
        messages = [dict(message) for message in env.prompt()]
        first = next(message for message in messages if message["role"] == "user")
        first["content"] += hint
        tried = []      # more than one where the scaffold asks again for what it cannot read
        while not tried or len(tried) < env.num_tries and not env.is_readable(tried[-1].text):
            first["content"] += env.reminder if tried else ""
            tried.append(model.chat(messages, max_new_tokens=cfg.max_new_tokens, stop=env.stop,
                                    seed=seed + len(tried), temperature=cfg.temperature, top_p=cfg.top_p))
        last = tried[-1]
        tokens = tokenizer.spelling(last.tokens, last.text) if tokenizer else None
        entries = {
            "finish": last.finish, "tokens": sum(len(each.tokens) or each.num_tokens for each in tried),
            "prompt_tokens": sum(each.prompt_tokens for each in tried),
            "cached_tokens": sum(each.cached_tokens for each in tried), "dropped": [each.text for each in tried[:-1]]}
        for name in ("thought", "no_reply", "answered_by", "refused"):      # what a server says besides
            if getattr(last, name):
                entries[name] = getattr(last, name)
        return last.text, tokens, entries
    return reply


def play_trajectory(cfg, task, k, path, reply, coder, out, cache, run, about, data_seed=0, make=Env):
    """Plays trajectory k of a task to its end, from the last step in its file `path`; each step adds a line.

    reply(env, lines, seed): the policy; returns (text, token ids or None, {further entries of the step's line}).
    coder: a model of sample.load, or None. out: the folder of the blobs. run: a Progress, which writes the lines and
    may stop the work. about: further entries of the header. data_seed, make: see make_env.
    """
    def seed_of(speaker):   # differs between trajectories, steps and speakers; the same again after an interruption
        return zlib.crc32(f"{cfg.seed} {task.id} {k} {env.index} {speaker}".encode())

    def timed(function, *args, **options):      # to wait for a model does not count with --clock scripts
        asked = time.monotonic()
        try:
            return function(*args, **options)
        finally:
            if cfg.clock == "scripts":
                env.deadline += time.monotonic() - asked

    def ask_coder(messages):
        seed = seed_of("coder") + counts["coder_replies"]       # a question that is repeated gets another answer
        counts["coder_replies"] += 1
        # The model that acts may think here as long as for a reply.
        limit = max(CODER_TOKENS, cfg.max_new_tokens) if cfg.coder in ("model", "expert") else CODER_TOKENS
        completion = timed(ask_coder_model, coder, messages, limit, seed=seed, temperature=cfg.temperature,
                           top_p=cfg.top_p)
        counts["coder_tokens"] += completion.num_tokens or len(completion.tokens)
        counts["coder_prompt_tokens"] += completion.prompt_tokens
        if completion.answered_by:
            counts["coder_answered_by"] = completion.answered_by
        if completion.no_reply:
            raise ValueError(completion.no_reply)
        return completion.text

    # 1. The first state, or the last recorded one.
    counts = Counter()      # of the coder's replies in one step
    agent = {name: getattr(cfg, name) for name in AGENT}
    env = make_env(cfg, task, out, cache, data_seed, make, coder=ask_coder if coder else None, **agent)
    lines = read_record(path)
    if lines:
        try:
            restore_record(env, lines[0], lines[1:], min(lines[-1]["seconds_left"], env.seconds))
        except ValueError as error:
            raise RunError(f"{path}: its last state cannot be restored: {error}. Delete it to play it anew") from None
    else:
        lines = [header(env, k=k, seed=cfg.seed, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                        top_p=cfg.top_p, **about)]
        run.write(path, lines[0])

    # 2. State -> prompt -> reply -> step -> record.
    while not (env.done or run.stop.is_set()):
        last = [line.get("no_reply") for line in lines[-MAX_NO_REPLIES:]]
        if all(last):       # with fewer steps the header is among these lines, and has no such entry
            run.write(path, {"type": "end", "ended": "no reply", "detail": last[-1]})
            return
        try:
            text, tokens, entries = timed(reply, env, lines, seed_of("policy"))
        except ContextFull as error:
            if len(lines) == 1:
                raise RunError(f"{path}: not even the first prompt fits: {error}. Give a larger --context (or server), "
                               "or a smaller --max-new-tokens, and another --out") from None
            run.write(path, {"type": "end", "ended": "context full", "detail": str(error)})
            return
        counts.clear()
        step = env.step(text, tokens=tokens)
        lines.append(record(step, **entries, **counts))
        run.write(path, lines[-1])


# -- Tasks

def prepare_tasks(cfg, seeds=(0,)):
    """Prepares the tasks of cfg.task on first use, and returns [(task, the contents of its task.json)], one of a task,
    and where its data are miniatures one for each of the seeds. ValueError: raw files are missing. RunError: a starter
    does not run."""
    ids = tasks.names(cfg.task)
    jobs = []
    for id in ids:
        raw = cfg.raw
        if raw and len(ids) > 1:
            raw = Path(raw, id)
        is_real = raw or Path(cfg.data, id, "task.json").is_file() and not tasks.info(id, cfg.data)["miniature"]
        jobs += [(cfg, id, raw, seed) for seed in ((0,) if is_real else seeds)]
    if len(jobs) == 1:        # in this thread, where a request to end removes what is half prepared
        return [prepare_task(*jobs[0])]
    return run_parallel(jobs, prepare_task, SLOTS.cpus)


def prepare_task(cfg, id, raw, seed):
    """Prepares a task and returns (task, its task.json). raw: the publisher's folder of this task, or empty."""
    task = tasks.load(id)
    data = tasks.seeded(cfg.data, seed)
    try:
        tasks.prepare(id, raw or None, data, seed=seed, python=cfg.python,
                      log=lambda line: print(line, file=sys.stderr))
    except RuntimeError as error:
        raise RunError(str(error)) from error
    return task, tasks.info(id, data)
