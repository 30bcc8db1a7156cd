"""Exploration-enriched fine-tuning: collects trajectories of a diverse expert, and trains a model on them.

    python sft.py                                               # all in miniature: collects, trains a tiny model
    python sft.py --collect                                     # no model, no data: the scripted expert, on miniatures
    python sft.py --collect --expert http://host:8000/v1#name   # an expert behind an OpenAI-compatible server
    python env.py replay runs/trajectories/spaceship-titanic-0.jsonl    # runs one of them again
    python sft.py --model DIR                                   # fine-tunes a checkpoint on what was collected
    torchrun --nproc_per_node 8 sft.py --model Qwen/Qwen2.5-7B  # the same on eight GPUs

Collecting, for each held-in task. 1. Candidates: ideas that the expert writes (100 by default), or those shipped with
the task. 2. Of these the 10 that differ most from each other (farthest-point selection on their embeddings). 3. For
each trajectory 1 to 3 of them stand in the expert's first prompt. The recorded prompt does not have them, so that the
model learns to have the idea itself. Held-out tasks are refused, by name and by the hashes of those prepared in --data.

The folder --trajectories receives TASK-K.jsonl (a header, then a line a step), blobs/ (the files of every state),
ideas/TASK.json (what the expert wrote) and manifest.json (settings, hashes, counts). A run that was killed goes on with
the same command; a larger --num, or another --task, adds to it. Exit status: 0 done, 1 failed, 2 bad arguments.
"""
import contextlib, hashlib, json, math, os, random, re, sys, time, zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sklearn.feature_extraction.text import TfidfVectorizer

import sample
import tasks
from env import (
    AGENT_FORMAT, DEFAULT_ACTIONS, FIELDS, PROMPTS, Blobs, MissingBlob, Progress, ResultCache, check_record,
    end_reason, model_policy, play_trajectory, prepare_tasks, printed_metric, prompt_of, read_agent, read_record,
    run_parallel, shown_lines, trajectory_path)
from model import Config, Qwen2, find_folder, hash_checkpoint, use_kernels
from support import cli
from support.cli import RunError, exit_status, format_table, refuse_torchrun, run_main
from support.distributed import (
    batch_indices, build_model, collate_packed, compute_type, explain_dist_errors, export_model,
    flops_of, full_tensor, gib, init_distributed, load_state, num_weights, plan_memory,
    packed_micro_batches, peak_flops, peak_memory, rank0_broadcast, save_state, shape_of)
from support.files import (
    FLAG, NUMBER, TEXT, VALUE, fingerprint, folder_lock, parse_json, read_bytes, shorten, write_atomic)
from support.miniature import (
    AGENT_STEPS, SHORT_ACTIONS, TINY, TINY_STEPS, VOCABULARY, augmented_copies, constants, fitting, reply_stats,
    scripted_short)


RECIPES = {     # --preset: the paper's section on fine-tuning
    "7b": dict(model="Qwen/Qwen2.5-7B", lr=2e-5, epochs=2, batch=64, length=15000, weight_decay=0),
}


@dataclass
class Settings:
    collect: bool = False  # collect trajectories of an expert
    expert: str = "scripted"  # who acts: scripted (no model: it tries the ideas shipped with a task and writes down
        # what it saw), a folder, a hub id, tiny, or http://host:port/v1#name
    task: str = "held-in"  # a task's id, or held-in for all that may be trained on
    trajectories: str = "runs/trajectories"  # what is collected goes here, and what is trained on comes from here: that
        # folder, or a JSON or JSON-lines file of your own with "messages" or ShareGPT "conversations"
    model: str = ""  # what is fine-tuned: a folder, a hub id, or tiny (from scratch); empty: the paper in miniature,
        # which collects with the scripted expert and then trains a tiny model, by settings of its own
    out: str = "runs/sft"  # the model as a Hugging Face folder, log.jsonl and checkpoints; a run there is continued
    preset: str = ""  # settings of a published recipe, which other flags override: 7b, the paper's
    plan: bool = False  # print memory per GPU by part, steps and time for these settings, and end; --model may then be
        # a size alone, such as 7b
    gpus: int = 8  # that --plan plans for; torchrun --nproc_per_node decides how many there really are
    epochs: float = 2.0  # times that training sees each conversation
    batch: int = 64  # conversations of one optimizer step, over all processes
    length: int = 15000  # tokens of a conversation, which is cut there, and of a packed row
    lr: float = 2e-5  # peak learning rate; it falls along half a cosine ...
    warmup: int = 0  # ... after it has risen for so many steps
    beta2: float = 0.999  # of AdamW
    weight_decay: float = 0.0  # of AdamW
    clip: float = 1.0  # largest norm of a step's gradient
    copies: int = 0  # texts made of each conversation with an edit (of another a quarter), in most of which names and
        # numbers of the script are drawn anew, so that a small model learns to copy; 0: the conversation itself
    valid: float = 0.05  # share of the conversations that is held back to validate
    validate_every: int = 50  # steps
    save_every: int = 50  # steps between checkpoints
    recompute: bool = True  # compute a block's activations again in backward: a third more time, far less memory
    num: int = 8  # trajectories per task
    steps: int | None = None  # optimizer steps; none: as many as the epochs take. With --collect: replies that a
        # trajectory may have; none: 15
    seconds: float = 1800.0  # that a collected trajectory may take
    ideas: int = 100  # candidates that the expert writes for each task; 0: the ideas shipped with it
    keep: int = 10  # most distant of a task's candidates that are used
    embed: str = ""  # local model whose mean hidden state tells how far ideas are apart; empty: their words (TF-IDF)
    coder: str = "expert"  # who carries out the (AI) actions: expert (the same model), or none
    actions: tuple[str, ...] = DEFAULT_ACTIONS  # what the expert may do
    fields: tuple[str, ...] = FIELDS  # entries of a reply
    prompt: str = "full"  # what the expert is shown of a state: full (the conversation), or short (one message: the
        # task, what the last step brought and the head of the script); training then takes each step for itself
    parallel: int = 8  # trajectories collected at the same time
    max_new_tokens: int = 1024  # a reply of the expert may have
    temperature: float = 1.0  # of the expert
    top_p: float = 1.0  # of the expert
    context: int = 16384  # tokens of one conversation; a trajectory that outgrows it ends
    data: str = "data"  # where prepared tasks are kept
    raw: str = ""  # folder of the publisher's files, as in eval.py; empty: the data prepared before, else the miniature
    python: str = sys.executable  # the interpreter that runs the tasks' scripts
    gpu: str = ""  # CUDA_VISIBLE_DEVICES of the scripts; empty hides all GPUs from them
    threads: int = 1  # that a script may use for numerics
    sandbox: str = "on"  # on, or off: scripts can then read the answers and all your files
    parsed: bool = True  # train on the replies that were carried out alone
    rose: bool = False  # train on trajectories alone whose last score is better than the starter's
    per_idea: int = 0  # train on at most so many trajectories of one idea; 0: no limit
    dtype: str = "auto"  # that training computes in: float32, bfloat16 (several times faster on a CPU with AMX), or
        # auto, which is bfloat16 on a GPU; the weights are kept and updated in float32. Also of an expert's weights
    device: str = "auto"  # auto, cpu or cuda
    kernels: str = "torch"  # of training: torch, or triton, on CUDA, which has not been measured on a GPU yet
    seed: int = 0  # of the ideas' choice and of sampling

    def __post_init__(self):
        for name in ("gpus", "num", "seconds", "keep", "parallel", "max_new_tokens", "context", "threads", "batch",
                     "length", "lr", "epochs", "clip", "save_every"):
            if not 0 < getattr(self, name) < math.inf:      # nor NaN
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, found {getattr(self, name)}")
        if self.steps is not None and self.steps < 1 or self.ideas < 0 or self.per_idea < 0:
            raise ValueError("expected --steps of at least 1, and no --ideas or --per-idea below 0, found "
                             f"{self.steps}, {self.ideas}, {self.per_idea}")
        if self.prompt not in PROMPTS:
            raise ValueError(f"--prompt must be {' or '.join(PROMPTS)}, found {self.prompt!r}")
        if sample.is_server(self.expert):
            sample.address(self.expert)
        if self.collect and self.model or self.expert != "scripted" and self.model:
            raise ValueError("--expert acts with --collect, and --model is trained without it; give one of the two")
        compute_type(self.dtype, torch.device("cpu"))
        if self.coder not in ("expert", "none") or self.sandbox not in ("on", "off"):
            raise ValueError("expected --coder expert or none, and --sandbox on or off, found "
                             f"{self.coder!r} and {self.sandbox!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Ideas

ASK = """{problem}

This is {entry}, the script to improve; its metric is {metric}, {better} is better.
```python
{script}
```
Write {count} ideas for changing it, each different from the others{about}. They must work without installing or \
downloading anything. One idea a line, in this form and nothing else:
- short title: what to change in the script, in one or two sentences{avoid}"""
A_PROMPT = 15       # ideas asked for at once; longer lists repeat themselves


def parse_ideas(text):
    """[{"title", "instruction"}] of the lines "- title: instruction" in a model's answer."""
    form = (r"^[ \t]{0,20}(?:[-*•]|\d{1,3}[.)])[ \t]{0,9}\*{0,3}([^:\n]{3,100}?)\*{0,3}[ \t]{0,9}(?:[:–—]| - )"
            r"[ \t*]{0,9}(\S[^\n]{9,600})$")
    return [{"title": title.strip(), "instruction": what.strip()} for title, what in re.findall(form, text, re.M)]


def distinct(ideas):
    """The ideas without those whose title or instruction has the words of an earlier one."""
    seen, found = set(), []
    for idea in ideas:
        words = {" ".join(re.findall(r"\w+", idea[name].lower())) for name in ("title", "instruction")}
        if not words & seen:
            found.append(idea)
        seen |= words
    return found


def candidates(s, task, expert):
    """The ideas of a task: at least s.ideas that the expert has written, or those shipped with it. The answers are kept
    in the folder's ideas/TASK.json, so that none is asked for again. With short prompts the expert has ideas of
    one edit, whose text the prompt shows, and the script's own numbers. RunError: the expert writes none."""
    if expert is None and s.prompt == "short":
        script = (task.folder / task.entry).read_text()
        found = [idea for idea in tasks.ideas(task.id) if len(idea["edits"]) == 1
                 and idea["edits"][0]["find"] in shown_lines(script)]
        return constants(script) + found
    if expert is None or s.ideas == 0:
        if not (found := tasks.ideas(task.id)):
            raise ValueError(f"{task.id} has no ideas.json; let an expert write ideas: --expert MODEL --ideas 100")
        return found
    path = Path(s.trajectories, "ideas", f"{task.id}.json")
    raw = read_bytes(path)
    answers = [] if raw is None else parse_json(raw, {"answers": [TEXT]}, path)["answers"]
    while True:
        found = distinct([idea for answer in answers for idea in parse_ideas(answer)])
        if len(found) >= s.ideas or len(answers) >= 3 * math.ceil(s.ideas / A_PROMPT) + len(tasks.IDEA_KINDS):
            break
        kind = (None, *tasks.IDEA_KINDS)[len(answers) % (1 + len(tasks.IDEA_KINDS))]
        known = "".join(f"\n- {idea['title']}" for idea in found[-40:])
        ask = ASK.format(problem=task.problem.strip(), entry=task.entry, metric=task.metric, count=A_PROMPT,
                         better="higher" if task.direction == "up" else "lower",
                         script=(task.folder / task.entry).read_text(), about=f", all about {kind}" if kind else "",
                         avoid=f"\n\nThese are known already:{known}" if known else "")
        answers.append(expert.chat([{"role": "user", "content": ask}], temperature=1.0, max_new_tokens=1024,
                                   seed=zlib.crc32(f"{s.seed} {task.id} {len(answers)} ideas".encode())).text)
        write_atomic(path, {"task": task.id, "expert": s.expert, "answers": answers})
    if not found:
        raise RunError(f"{s.expert} has written no idea for {task.id} that could be read in {len(answers)} answers, kept "
                     f"in {path}. Take the shipped ideas with --ideas 0, or another --expert.")
    if len(found) < s.ideas:
        print(f"{task.id}: {len(found)} different ideas in {len(answers)} answers; {s.ideas} were asked for",
              file=sys.stderr)
    return found


def words(texts):
    """TF-IDF vectors of the texts, of length 1: a sparse matrix, a row a text."""
    return TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit_transform(texts)


def mean_states(texts, engine):
    """A model's last hidden states, averaged over each text's tokens, of length 1: (N, C) float64."""
    rows = [torch.tensor(engine.tokenizer.encode(text), device=engine.device) for text in texts]
    with torch.no_grad():
        vectors = np.stack([engine.model.hidden(row[None])[0].double().mean(0).cpu().numpy() for row in rows])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def farthest(vectors, k):
    """Indices of k rows far apart: first the two most distant, then again and again the row whose nearest chosen one is
    farthest. Ties go to the first row. vectors: (N, C), rows of length 1, sparse or not; the distance is Euclidean. The
    smallest distance among the chosen is at least half the best possible (Gonzalez 1985)."""
    products = vectors @ vectors.T
    products = products.toarray() if hasattr(products, "toarray") else products
    distance = np.sqrt(np.maximum(2 - 2 * products, 0))     # |a - b|^2 = 2 - 2ab
    distance[distance < 1e-7] = 0                           # equal rows: what rounding leaves must not choose
    chosen = list(dict.fromkeys(np.unravel_index(distance.argmax(), distance.shape)))[:k]     # rows all equal: only 0
    while len(chosen) < min(k, len(distance)):
        nearest = distance[:, chosen].min(1)
        nearest[chosen] = -1
        chosen.append(nearest.argmax())
    return [int(i) for i in chosen]


def pool(s, task, expert, embedder):
    """The ideas that a task's trajectories draw from."""
    found = candidates(s, task, expert)
    texts = [f"{idea['title']}. {idea['instruction']}" for idea in found]
    return [found[i] for i in farthest(mean_states(texts, embedder) if embedder else words(texts), s.keep)]


# ---------------------------------------------------------------------------------------------------------------------
# The scripted expert. It writes of nothing but what its observations have shown, in sentences chosen at random.

SCRIPTED = ("List Files", "Inspect Script Lines", "Replace In Script", "Undo Edit Script", "Copy File",
            "Execute Script", "Final Answer")       # what it does
SAY = {
    "begin": ("The work begins; there is no observation yet.", "Nothing has been run so far.",
              "I have the task and have seen nothing of the script yet."),
    "run first": ("I run {entry} as it is, to know the score to beat.", "First I need the starter's own {metric}.",
                  "Before any change I want to see what {entry} prints."),
    "list": ("I look at which files there are.", "Let me see the workspace before I go on."),
    "listed": ("The workspace holds {seen}.", "There are these files: {seen}."),
    "read": ("I read the script before I change it.", "To edit it I must see its exact lines.",
             "Next I look at how {entry} works."),
    "ran": ("{entry} runs and prints a validation {metric} of {value}; that is the score to beat.",
            "The run went through. The {metric} is {value} before any change.", "The {metric} to beat is {value}."),
    "have read": ("I have seen lines {first} to {last} of {total}.",
                  "Lines {first} to {last} of the script's {total} are known now.",
                  "The script has {total} lines; I have read {first} to {last} of them."),
    "try": ("{idea}", "What I try now is this: {idea}", "It may help to do the following. {idea}"),
    "part": ("This is change {i} of {n} for it: I replace {line}.", "Part {i} of {n}: {line} has to change."),
    "copy": ("It takes {n} edits, so I keep a copy of the script first.", "Before these {n} edits I save {entry} as "
             "{backup}, to be able to go back at once."),
    "copied": ("The copy {backup} is there.", "{entry} is saved as {backup}."),
    "edited": ("The difference shows {plus} and {minus}, as meant.", "The edit is saved: {plus}, {minus}.",
               "The script now differs by {plus} and {minus}."),
    "look": ("I look at the changed place once more before the run.", "Let me check these lines."),
    "run": ("All of it is in the script, so I run it.", "Now I run {entry} and compare with {value}.",
            "The run will show whether the {metric} of {value} is beaten."),
    "better": ("The {metric} went from {old} to {new}, which is better, so the change stays.",
               "{new} after {old}: the change helped and is kept.",
               "With {title} the {metric} is {new} instead of {old}. It stays."),
    "worse": ("The {metric} went from {old} to {new}, which is worse.", "{new} is no gain over {old}.",
              "With {title} the {metric} is {new}; {old} was better."),
    "equal": ("The {metric} is {new} as before, so the change does nothing.", "Nothing has changed: {new} again."),
    "failed": ("The script failed: {detail}", "This did not run. {detail}"),
    "undo": ("I take the change back.", "The last edit goes.", "I undo it, so that {entry} is what scored {value}."),
    "restore": ("I copy {backup} back over {entry}.", "The saved script comes back in one step."),
    "undone": ("{entry} is as it was before {title}.", "{title} is taken out again."),
    "still": ("One of the edits is taken back, there is more to undo.", "Part of {title} is still in the script."),
    "end": ("There is nothing left on my list.", "I stop here with the best script.",
            "The plan is done; I end the work."),
}


def scripted(task, fields, steps, ideas, rng):
    """Generator of the scripted expert's replies; send it the record of each step. It runs the script, reads it, and
    tries the ideas one after the other: edits, run, and back where the printed score is no better."""
    entry, backup, done = task.entry, "before.py", []
    script = (task.folder / entry).read_text()
    reflection, fact = rng.choice(SAY["begin"]), "Nothing is confirmed yet."
    say = {"entry": entry, "metric": task.metric, "backup": backup}

    def tell(what, **more):
        text = rng.choice(SAY[what])
        written = text.format(**say, **more)
        return written if text.startswith("{entry}") else written[:1].upper() + written[1:]

    def reply(now, thought, action, **args):
        plan = " ".join(f"{i}. {part}" for i, part in enumerate([*done, f"**{now}.**"], 1))
        values = (reflection, plan, fact, thought, action, json.dumps(args, ensure_ascii=False))
        return "\n".join(f"{name}: {value}" for name, value in zip(FIELDS, values) if name in fields)

    def score(step):
        return printed_metric(step["observation"], task.metric) if step["outcome"] == "ok" else None

    def show(value):
        return "none" if value is None else f"{value:.6g}"

    def lines_of(step):     # "Lines 1 to 37 of 37 of train.py:"
        found = re.match(r"Lines ([\d,]+) to ([\d,]+) of ([\d,]+)", step["observation"]).groups()
        return (int(number.replace(",", "")) for number in found)

    step = yield reply(f"Run {entry} as it is", tell("run first"), "Execute Script", script_name=entry)
    best = start = score(step)
    done.append(f"Run {entry} as it is: {task.metric} {show(best)}.")
    reflection = tell("ran", value=show(best)) if step["outcome"] == "ok" else tell("failed", detail=step["detail"])
    fact = f"The {task.metric} of {show(best)} is confirmed by the last observation."
    if rng.random() < 0.2:
        step = yield reply("Look at the files", tell("list"), "List Files", dir_path=".")
        reflection = tell("listed", seen=", ".join(re.findall(r"^[\w./-]+", step["observation"], re.M)[:6]))
    last, total = 0, 1
    while last < total:
        reach = last + rng.choice((100, 150, 200))
        step = yield reply(f"Read {entry}", tell("read"), "Inspect Script Lines", script_name=entry,
                           start_line_number=str(last + 1), end_line_number=str(reach))
        first, last, total = lines_of(step)
        reflection = tell("have read", first=first, last=last, total=total)
    done.append(f"Read {entry}.")
    for idea in ideas:
        left, edits, title = steps - step["index"] - 1, fitting(idea, script), idea["title"]
        name = title if title[:2].isupper() else title[:1].lower() + title[1:]
        whole = len(edits) > 2      # so many that a copy is the shorter way back
        spare = left - (1 + len(edits) + (2 if whole else len(edits)) + 1)
        if not edits or spare < 0:
            continue
        fact = f"The {task.metric} of {show(best)} is confirmed by its run. That {name} will help is guessed."
        thought, before = tell("try", idea=idea["instruction"]), script
        if whole:
            step = yield reply(f"Copy {entry}, then try {name}", f"{thought} {tell('copy', n=len(edits))}", "Copy File",
                               source=entry, destination=backup)
            reflection = tell("copied")
        for i, (find, put) in enumerate(edits, 1):
            old = next((line.strip() for line in find.splitlines() if line.strip() and line not in put.splitlines()),
                       find.strip())
            part = f"{tell('part', i=i, n=len(edits), line=f'`{shorten(old, 120)}`')}" if len(edits) > 1 else ""
            step = yield reply(f"Try {name}", f"{thought * (i == 1)} {part}".strip() or thought, "Replace In Script",
                               script_name=entry, find=find, replace=put)
            script = script.replace(find, put)
            changed = Counter(line[:1] for line in step["observation"].splitlines())
            plus, minus = (f"{changed[sign]} line{'s' * (changed[sign] != 1)} {how}"
                           for sign, how in (("+", "more"), ("-", "less")))
            reflection = tell("edited", plus=plus, minus=minus)
        if spare > 0 and rng.random() < 0.25:
            line = before[:before.find(edits[-1][0])].count("\n") + 1
            step = yield reply(f"Try {name}: check the edit", tell("look"), "Inspect Script Lines", script_name=entry,
                               start_line_number=str(max(1, line - 3)), end_line_number=str(line + 12))
            first, last, total = lines_of(step)
            reflection = tell("have read", first=first, last=last, total=total)
        step = yield reply(f"Try {name}: run {entry}", tell("run", value=show(best)), "Execute Script",
                           script_name=entry)
        new, values = score(step), {"title": name, "old": show(best), "new": show(score(step))}
        if new is None:
            reflection = tell("failed", detail=shorten(step["detail"] or "It printed no score.", 300))
            fact = f"That {name} does not work like this is confirmed by the last observation."
            result = "failed"
        else:
            good = best is None or task.better(new, best)
            reflection = tell("better" if good else "equal" if new == best else "worse", **values)
            fact = f"The {task.metric} of {show(new)} is confirmed by the last observation."
            result = f"{task.metric} {show(new)}"
            if good:
                best = new
                done.append(f"{title}: {result}, kept.")
                continue
        for i in range(1 if whole else len(edits)):
            if whole:
                step = yield reply(f"Take {name} back", tell("restore"), "Copy File", source=backup, destination=entry)
            else:
                step = yield reply(f"Take {name} back", tell("undo", value=show(best)), "Undo Edit Script",
                                   script_name=entry)
            reflection = tell("undone" if whole or i == len(edits) - 1 else "still", title=name)
        script = before
        done.append(f"{title}: {result}, taken back.")
    kept = [part.split(":")[0] for part in done if part.endswith("kept.")]
    fact = f"The {task.metric} of {show(best)} is confirmed by the run of the script as it is now."
    answer = (f"The validation {task.metric} went from {show(start)} to {show(best)} with: {'; '.join(kept)}." if kept
              else f"No change that I tried beat the starter's {task.metric} of {show(start)}; {entry} is as it was.")
    yield reply("End the work", tell("end"), "Final Answer", final_answer=answer)


# ---------------------------------------------------------------------------------------------------------------------
# Collecting

# what the trajectories of one folder agree in
SAME = ("expert", "coder", "actions", "fields", "prompt", "steps", "seconds", "ideas", "keep", "embed",
        "max_new_tokens", "temperature", "top_p", "context", "threads", "gpu", "sandbox", "seed")
NUM_STEPS = 15
MANIFEST = {"settings": {str: VALUE}, "tasks": {str: {
    "miniature": FLAG, "sha256": {str: TEXT}, "m_init": NUMBER, "m_best": NUMBER, "ideas": [{
        "title": TEXT, "instruction": TEXT}]}}}


def followed(speaker, path):
    """How a scripted expert replies in eval.trajectory: what is recorded brings it to where it was."""
    said, seen = next(speaker), 1

    def reply(env, lines, seed):
        nonlocal said, seen
        for line in lines[seen:]:
            if line["reply"] != said:
                raise ValueError(f"{path} was collected by another version of the scripted expert; give another "
                                 "--trajectories, or delete that file")
            said = speaker.send(line)
        seen = len(lines)
        return said, None, {}
    return reply


def collected(s, task, k, ideas, expert, cache, run):
    """Plays trajectory k of a task to its end. ideas: those of the task. expert: what sample.load gave, None for the
    scripted one. cache, run: see eval.trajectory."""
    path, rng = trajectory_path(s.trajectories, task.id, k), random.Random(f"{s.seed} {task.id} {k}")
    num_ideas = 2 * s.steps if expert is None and s.prompt == "short" else rng.randint(1, 3)
    drawn = rng.sample(ideas, min(num_ideas, len(ideas)))
    if expert:
        reply = model_policy(s, expert, "\n\nIdeas that may be worth trying:" + "".join(
            f"\n- {idea['title']}: {idea['instruction']}" for idea in drawn))
    else:
        script = scripted_short if s.prompt == "short" else scripted
        reply = followed(script(task, s.fields, s.steps, drawn, rng), path)
    tokenizer = getattr(expert, "tokenizer", None)
    play_trajectory(s, task, k, path, reply, expert if s.coder == "expert" else None, s.trajectories, cache, run,
               {"expert": s.expert, "ideas": [idea["title"] for idea in drawn],
                "data_sha256": tasks.info(task.id, s.data)["sha256"],
                "tokenizer": tokenizer and fingerprint(tokenizer)})


def entropy(counts):
    """Of the distribution with these counts, in bits."""
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n) + 0.0


def diversity(actions):
    """How much a set of actions, [(name, args)], differs: "distance", the mean cosine distance over all pairs of their
    TF-IDF vectors (0: all the same, 1: no word in common; None for fewer than two), "edits" that change a script and
    how many "distinct_edits" of them differ, and "entropy" of the action names in bits."""
    edits = [json.dumps([name, args], sort_keys=True) for name, args in actions
             if name in ("Replace In Script", "Edit Script (AI)")]
    n, distance = len(actions), None
    if n > 1:   # for rows of length 1 the sum over pairs follows from |sum of rows|^2, without n^2 products
        total = np.asarray(words([f"{name} {' '.join(args.values())}" for name, args in actions]).sum(0))
        distance = float(1 - ((total ** 2).sum() - n) / (n * (n - 1)))
    return {"actions": n, "distance": distance, "edits": len(edits), "distinct_edits": len(set(edits)),
            "entropy": entropy(Counter(name for name, _ in actions).values())}


def counted(s, task):
    """What manifest.json says of the finished trajectories in a task's files, and all their valid actions."""
    records = [read_record(path) for path in Path(s.trajectories).glob(f"{task.id}-*.jsonl")]
    records = [lines for lines in records if end_reason(lines) and lines[0]["task"] == task.id]
    steps = [line for lines in records for line in lines if line["type"] == "step"]
    last = [([line["m_after"] for line in lines if "m_after" in line][-1], lines[0]["m_init"]) for lines in records]
    return {"trajectories": len(records), "steps": len(steps), "valid": sum(step["valid"] for step in steps),
            "rose": sum(task.better(score, start) for score, start in last),
            "ended": dict(Counter(map(end_reason, records))), "kinds": dict(Counter(step["kind"] for step in steps))
            }, [(step["action"], step["args"]) for step in steps if step["valid"]]


def collect(s, load=sample.load):
    """Collects s.num trajectories of each task of s.task and returns what manifest.json then holds. ValueError:
    something is wrong with the settings. RunError: the expert is of no use."""
    if refused := [id for id in tasks.names(s.task) if tasks.load(id).split != "held-in"]:
        raise ValueError(f"{', '.join(refused)}: held out, for evaluation; nothing of it may be trained on. The "
                         f"held-in tasks are: {', '.join(tasks.names('held-in'))}")
    folder = Path(s.trajectories)
    with folder_lock(folder, "sft.py --collect"):
        infos = prepare_tasks(s)
        forbidden = tasks.held_out_hashes(s.data)
        for task, info in infos:
            tasks.refuse_held_out(task.id, info["sha256"], forbidden)
        path = folder / "manifest.json"
        same = {name: value for name, value in json.loads(json.dumps(asdict(s))).items() if name in SAME}
        for name in ("expert", "embed"):        # a model that was trained anew in the same folder is another model
            if Path(same[name] or "-").is_dir():
                same[f"{name} of sha256"] = hash_checkpoint(same[name])
        raw = read_bytes(path)
        manifest = {"settings": same, "tasks": {}} if raw is None else parse_json(raw, MANIFEST, path)
        then = manifest["settings"]
        found = [f"--{name.replace('_', '-')} was {then.get(name)} and is {same[name]}"
                 for name in same if then.get(name) != same[name]]
        found += [f"the data of {task.id} were others" for task, info in infos
                  if manifest["tasks"].get(task.id, info)["sha256"] != info["sha256"]]
        needed = SHORT_ACTIONS if s.prompt == "short" else SCRIPTED
        if s.expert == "scripted" and (lacking := set(needed) - set(s.actions)):
            raise ValueError(f"the scripted expert needs the actions {','.join(needed)}; missing in --actions: "
                             f"{', '.join(sorted(lacking))}")
        paths = [trajectory_path(folder, task.id, k) for task, _ in infos for k in range(s.num)]
        records = {path: read_record(path) for path in paths}
        found += [f"its manifest.json does not tell of {task.id}" for task, _ in infos if task.id not in manifest["tasks"]
                  and any(records[trajectory_path(folder, task.id, k)] for k in range(s.num))]
        if found:
            raise ValueError(f"{folder} holds trajectories of another kind: {'; '.join(found)}. Give another "
                             "--trajectories, or delete that folder")
        jobs = [(task, k) for k in range(s.num) for task, _ in infos if not end_reason(records[trajectory_path(folder, task.id, k)])]
        pools, playing = {}, replace(s, steps=s.steps or NUM_STEPS)
        if jobs:
            options = dict(dtype=s.dtype, device=s.device, rows=min(s.parallel, len(jobs)), context=s.context)
            expert = None if s.expert == "scripted" else load(s.expert, **options)
            if expert and expert.context and s.max_new_tokens >= expert.context:
                raise ValueError(f"--max-new-tokens {s.max_new_tokens} leaves no room in a context of {expert.context}")
            embedder = load(s.embed, **options) if s.embed else None
            if embedder and not hasattr(embedder, "model"):
                raise ValueError("--embed needs a local model; a server does not give hidden states")
            wanted = sorted({task.id for task, _ in jobs})
            pools = dict(zip(wanted, run_parallel([(tasks.load(id), expert) for id in wanted],
                                              lambda task, expert: pool(s, task, expert, embedder), s.parallel)))
        for task, info in infos:
            now = {"miniature": info["miniature"], "sha256": info["sha256"], "m_init": info["m_init"],
                   "m_best": info["m_best"]}
            old = manifest["tasks"].setdefault(task.id, now)
            if task.id in pools and old.setdefault("ideas", pools[task.id]) != pools[task.id]:
                raise ValueError(f"the ideas for {task.id} have changed since {folder} was begun; give another folder")
        write_atomic(path, {**manifest, "complete": False})
        run = Progress(records, playing.steps)
        if any(records.values()):
            print(f"{folder}: {len(run.over)} of {len(records)} trajectories are done; going on", file=sys.stderr)
        cache = ResultCache(folder / "cache")
        run_parallel(jobs, lambda task, k: collected(playing, task, k, pools[task.id], expert, cache, run), s.parallel, run)
        actions = []
        for id, about in manifest["tasks"].items():
            counts, some = counted(s, tasks.load(id))
            about["counts"], actions = counts, actions + some
        manifest.update(complete=True, diversity=diversity(actions))
        write_atomic(path, manifest)
        return manifest


def report(manifest):
    """The manifest's counts as text."""
    rows = [("task", "data", "trajectories", "steps", "valid", "score rose", "ideas")]
    for id, one in manifest["tasks"].items():
        numbers = [one["counts"][name] for name in ("trajectories", "steps", "valid", "rose")] + [len(one["ideas"])]
        rows.append((id, "miniature" if one["miniature"] else "real", *map(str, numbers)))
    d = manifest["diversity"]
    mean = "-" if d["distance"] is None else f"{d['distance']:.3f}"
    return (f"{format_table(rows)}\n\nDiversity: mean distance of two actions {mean} (0: the same, 1: no word in common), "
            f"{d['distinct_edits']} distinct edits of {d['edits']}, entropy of the action names "
            f"{d['entropy']:.2f} bits.")


# ---------------------------------------------------------------------------------------------------------------------
# Reading conversations for training

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


@dataclass
class Conversation:
    """What one training sequence is made of."""
    messages: list      # [{"role", "content"}], with "tokens" where the sampled ids are to be used; the last is trained
    trained: list       # of int: indices of the messages that are learned, all of the assistant
    source: str         # file, and line or entry, for messages to the user
    origin: str = ""    # what is held back together with it, to validate: its trajectory
    task: str = ""      # of a trajectory: its task ...
    ideas: tuple = ()   # ... and the titles of the ideas that its expert was given


class Bad(ValueError):
    """A conversation that cannot be used; the message says why."""


def conversations(path, *, parsed=True, rose=False, per_idea=0, data="data", tokenizer=None, say=print):
    """([Conversation, ...], {why left out: [source, ...]}) of a path, and says what was left out.

    path: a folder of trajectories (*.jsonl), or a file. A file holds a trajectory, or a user's own conversations: JSON
    (a list, or one) or JSON lines of {"messages": [{"role", "content"}]} or ShareGPT's {"conversations": [{"from",
    "value"}]} with an optional "system". parsed, rose, per_idea: the filters of Settings, for trajectories. data: where
    prepared tasks are, for the hashes of the held-out ones. tokenizer: that of the model to be trained; sampled token
    ids stay in the messages if the expert had the same one, and are dropped if not.
    ValueError: something held out, no such path, a JSON file that is broken as a whole, or nothing to train on.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no {path}; collect it with: python sft.py --collect --trajectories {path}")
    found, left_out, times, forbidden = [], defaultdict(list), Counter(), tasks.held_out_hashes(data)
    for file in sorted(file for file in path.glob("*.jsonl") if file.is_file()) if path.is_dir() else [path]:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error})") from None
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from None
        played = re.search(r'^\{"type": "(header|step|end)"', text, re.M)
        for source, load in [(str(file), None)] if played else entries(file, text):
            try:
                ones = (read_played(file, text, parsed, rose, forbidden, tokenizer) if played else
                        [read_own(load(), source)])
                if per_idea and any(times[ones[0].task, idea] >= per_idea for idea in ones[0].ideas):
                    raise Bad("filter: more than --per-idea trajectories of one of its ideas")
            except Bad as error:
                left_out[str(error)].append(source)
                continue
            for message in (message for one in ones for message in one.messages):
                named = re.match(r"Task: (\S+)\n", message["content"]) if message["role"] == "user" else None
                if named and named[1] in tasks.names("held-out"):
                    raise ValueError(f"{source} is about {named[1]}, which is held out: it may not be trained on")
            times.update((ones[0].task, idea) for idea in ones[0].ideas)
            found += ones
    turns = sum(len(one.trained) for one in found)
    lines = [f"{path}: {len(found)} conversations with {turns} replies to learn"]
    lines += [f"  left out, {why}: {len(where)} ({', '.join(where[:5])}{', ...' * (len(where) > 5)})"
              for why, where in left_out.items()]
    if not found:
        raise ValueError("there is nothing to train on. " + "\n".join(lines))
    say("\n".join(lines))
    return found, dict(left_out)


def entries(file, text):
    """[(source, a function that returns the entry or raises Bad)] of a user's file."""
    def line(text):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Bad("not JSON") from error
    try:
        whole = json.loads(text) if file.suffix != ".jsonl" else None
    except (ValueError, RecursionError) as error:
        if "Extra data" not in str(error):      # that is what JSON lines look like
            raise ValueError(f"{file} is not JSON: {error}. Expected a list of conversations, or one a line") from None
        whole = None
    if whole is None:
        return [(f"{file}, line {number}", lambda each=each: line(each))
                for number, each in enumerate(text.split("\n"), 1) if each.strip()]      # U+2028 ends no line of JSON
    return [(f"{file}, entry {number}", lambda each=each: each)
            for number, each in enumerate(whole if isinstance(whole, list) else [whole], 1)]


def read_own(entry, source):
    """The Conversation in an entry of a user's file. Every turn of the assistant is learned."""
    turns = entry.get("messages", entry.get("conversations")) if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Bad('no list "messages" or "conversations"')
    messages = [{"role": "system", "content": entry["system"]}] if entry.get("system") else []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise Bad(f"unknown role {shorten(repr(role), 40)}")
        messages.append({"role": ROLES[role], "content": content})
    if not all(isinstance(message["content"], str) for message in messages):
        raise Bad("a content that is no text")
    if any(re.search("[\ud800-\udfff]", message["content"]) for message in messages):
        raise Bad("half a surrogate pair, which is no character")
    trained = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"].strip()]
    if not trained:
        raise Bad("no turn of the assistant")
    return Conversation(messages[:trained[-1] + 1], trained, source, source)


def read_played(file, text, parsed, rose, forbidden, tokenizer):
    """[Conversation, ...] of a trajectory's file, which holds text: one, or with short prompts one for each reply that
    is learned. ValueError if it is of a held-out task."""
    lines = []
    for number, line in enumerate(text.rstrip().split("\n"), 1):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            raise Bad(f"broken line {number}") from None
        try:
            check_record(lines[-1], number == 1)
        except ValueError as error:
            raise Bad(f"line {number} is no record of a trajectory: {error}") from None
    head, steps = lines[0], [line for line in lines[1:] if line["type"] == "step"]
    try:
        tasks.refuse_held_out(head["task"], head.get("data_sha256", {}), forbidden)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not end_reason(lines):
        raise Bad("not finished: collect again to go on with it")
    folder = next((parent for parent in file.resolve().parents if (parent / "blobs").is_dir()), file.parent)
    blobs = Blobs(folder / "blobs")
    try:
        for sha in {sha for line in (head, *steps) for sha in line["snapshot"].values()}:
            blobs.path(sha)
    except MissingBlob:
        raise Bad("a missing blob") from None
    task, messages, trained, single = tasks.load(head["task"]), [dict(m) for m in head["messages"]], [], []
    snapshot, short = head["snapshot"], head.get("prompt") == "short"
    if rose and not (steps and task.better(steps[-1]["m_after"], head["m_init"])):
        raise Bad("filter: its score did not rise")
    for step in steps:      # a reply that could not be read is not in the messages, so it is never learned
        if step["messages"][0]["role"] == "assistant" and (step["valid"] or not parsed):
            trained.append(len(messages))
            if short:
                single.append([*prompt_of("short", task, messages, snapshot, blobs), dict(step["messages"][0])])
        messages += [dict(message) for message in step["messages"]]
        snapshot = step["snapshot"]
    if not trained:
        raise Bad("no turn of the assistant")
    ideas, same = tuple(head.get("ideas", ())), tokenizer and head.get("tokenizer") == fingerprint(tokenizer)
    found = [Conversation(one, [len(one) - 1], f"{file}, message {i}", str(file), task.id, ideas)
             for i, one in zip(trained, single)] or [
        Conversation(messages[:trained[-1] + 1], trained, str(file), str(file), task.id, ideas)]
    for one in () if same else found:
        for message in one.messages:
            message.pop("tokens", None)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Processes, sharding and checkpoints: shared with rl.py


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


# ---------------------------------------------------------------------------------------------------------------------
# Batches


# ---------------------------------------------------------------------------------------------------------------------
# Training


def draw_model(config, seed):
    return Qwen2.from_scratch(config, seed).draw_copying(seed)


def hash_texts(*parts):
    """The sha256, shortened, of lists of texts, [(ids, chosen)]."""
    sha = hashlib.sha256()
    for texts in parts:
        sha.update(f"{len(texts)} texts".encode())
        for ids, chosen in texts:
            sha.update(f"{len(ids)} ids".encode())
            sha.update(np.array(ids, np.int32))
            sha.update(np.array(chosen, np.bool_))
    return sha.hexdigest()[:16]


def cosine(step, steps, peak):
    """The learning rate of a step: half a cosine from `peak` at step 0 towards 0 at step `steps`."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def add_gradients(model, rows, num_targets, world, device, size):
    """Add the gradients of the mean negative log-prob over all `num_targets` targets of the step, whatever process and
    row they are in; returns this process's part of that mean, a tensor.

    FSDP averages the processes' gradients where this sum needs their sum, hence the factor `world`.
    """
    total = torch.zeros((), device=device)
    for row in rows:
        tokens, lengths, targets = collate_packed(row, device)
        logp, _, _ = model(tokens, lengths=lengths, targets=targets, size=size)
        loss = -logp.sum() / num_targets
        (loss * world).backward()
        total += loss.detach()
    return total


@torch.no_grad()
def validate(model, texts, rank, world, device, size, longest):
    """(mean negative log-prob, share of targets that were the most likely token) over the chosen tokens of texts."""
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    for row in packed_micro_batches(texts, list(range(len(texts))), rank, world, longest):
        tokens, lengths, targets = collate_packed(row, device)
        logp, _, first = model(tokens, lengths=lengths, targets=targets, size=size)
        sums += torch.stack([-logp.double().sum(), first.double().sum(), torch.tensor(float(len(logp)), device=device)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return (sums[0] / sums[2]).item(), (sums[1] / sums[2]).item()


def plan(s):
    """What --plan prints: memory of one GPU by part, steps, tokens and time. Reads no weights and needs no GPU."""
    config = shape_of(s.model)
    parts = plan_memory(config, s.length, s.gpus, compute_type(s.dtype, torch.device("cuda")), s.recompute)
    num, data = 10_000, "as many as the paper has"
    if Path(s.trajectories).exists():
        num, data = len(conversations(s.trajectories, parsed=s.parsed, rose=s.rose, per_idea=s.per_idea, data=s.data,
                                      say=lambda line: None)[0]), s.trajectories
    steps = s.steps or math.ceil(s.epochs * num / s.batch)
    row = [([0] * (s.length + 1), [True] * (s.length + 1))]
    seconds = steps * s.batch * flops_of(config, [row]) / (s.gpus * 0.4 * 989e12)
    lines = [f"{s.model or 'tiny'}: {num_weights(config)[-1]:,} weights; {s.gpus} GPUs, rows of {s.length:,} tokens, "
             f"recompute {'on' if s.recompute else 'off'}", "", "GiB per GPU"]
    return "\n".join([*lines, *gib(parts), "", f"{num:,} conversations ({data}): {steps:,} steps of {s.batch}, at most "
                      f"{steps * s.batch * s.length:,} tokens", f"about {seconds / 3600:.1f} hours at most, at 40 % of "
                      "an H100's 989 TFLOP/s per GPU"])


SCHEDULE = ("batch", "length", "lr", "warmup", "beta2", "weight_decay", "clip", "copies", "valid",
            "parsed", "rose", "per_idea", "dtype", "kernels", "seed")   # what a run that goes on must have as it began


def train(s, texts, valid, tokenizer, config, folder):
    """Fine-tune on texts, [(ids, chosen)], and write out/: checkpoints, log.jsonl, and the model as a Hugging Face
    folder. Goes on from the newest checkpoint there. Returns the model."""
    rank, world, device = init_distributed()
    use_kernels(s.kernels, device)
    model = build_model(config, folder, device, s.seed, s.recompute, compute_type(s.dtype, device), draw=draw_model if s.copies else Qwen2.from_scratch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, s.beta2), weight_decay=s.weight_decay,
                                  fused=True)
    steps = s.steps or math.ceil(s.epochs * len(texts) / s.batch)
    origin = {"optimizer steps": steps, "products in": str(model.compute).removeprefix("torch."),
              **rank0_broadcast(lambda: {"--model of sha256": hash_checkpoint(folder) if folder else "none",
                                  "texts of sha256": hash_texts(texts, valid)})}
    state = load_state(s, SCHEDULE, model, optimizer, origin)
    first, size, peak = state["step"] if state else 0, tokenizer.size, peak_flops(device)
    if first >= steps and rank == 0:
        print(f"{s.out} is already trained, for {first} steps; to begin anew give another --out, or delete it")
    log = open(Path(s.out, "log.jsonl"), "a") if rank == 0 else None
    started = time.monotonic()
    for step in range(first, steps):
        start, chosen = time.monotonic(), batch_indices(len(texts), step, s.batch, s.seed)
        num_targets = sum(sum(texts[i][1]) for i in chosen)
        rows = packed_micro_batches(texts, chosen, rank, world, s.length)
        loss = add_gradients(model, rows, num_targets, world, device, size)
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip))
        losses = torch.zeros(world, device=device)
        losses[rank] = loss
        if dist.is_initialized():
            dist.all_reduce(losses)
        *losses, norm = torch.cat([losses, norm[None]]).tolist()        # the step's one wait for the device
        loss = sum(losses)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            ill = [r for r in range(world) if not math.isfinite(losses[r])] or range(world)
            where = "; ".join(f"rank {r}, conversations {chosen[r::world]}" for r in ill)
            raise RunError(f"step {step + 1}: loss {loss}, gradient norm {norm}; {where}. The checkpoints in {s.out} are "
                         "from before")
        lr = cosine(step, steps, s.lr) * min(1.0, (step + 1) / (s.warmup or 1))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        seconds, tokens = time.monotonic() - start, sum(len(texts[i][0]) - 1 for i in chosen)
        figures = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr, "tokens_s": tokens / seconds,
                   "mfu": flops_of(config, rows) / seconds / peak if peak else None,
                   "peak_gib": peak_memory(device) / 2**30, "seconds": seconds}
        last = step + 1 == steps
        if last or (step + 1) % s.validate_every == 0:
            loss, right = validate(model, valid, rank, world, device, size, s.length)
            figures |= {"valid_loss": loss, "valid_accuracy": right}
        if rank == 0:
            log.write(json.dumps(figures) + "\n")
            log.flush()
            left = (time.monotonic() - started) / (step + 1 - first) * (steps - step - 1)
        if rank == 0 and (last or "valid_loss" in figures or (step + 1) % max(1, steps // 100) == 0):
            print(f"step {step + 1:>5}/{steps}  loss {figures['loss']:.4f}  norm {norm:7.3f}  lr {lr:.2e}  "
                  f"{figures['tokens_s']:8,.0f} tokens/s  MFU {figures['mfu'] or 0:4.0%}  {figures['peak_gib']:5.1f} "
                  f"GiB  {seconds:6.2f} s  ETA {timedelta(seconds=int(left))}"
                  + (f"  valid {loss:.4f}, {right:.1%} right" if "valid_loss" in figures else ""), flush=True)
        if last or (step + 1) % s.save_every == 0:
            save_state(s, step + 1, model, optimizer, origin)
    export_model(model, tokenizer, s.out, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model


def held_back(origins, share, seed):
    """Indices of about that share of the texts, at least one: all of some origins, drawn at random, as many as come
    nearest to it. Neighbouring states of one trajectory are nearly alike, so none of a trajectory that validates is
    learned from; the steps of a trajectory that is alone are held back one by one. origins: that of each text."""
    if len(set(origins)) == 1:
        origins = range(len(origins))
    wanted = max(1, round(share * len(origins)))
    groups = defaultdict(list)
    chosen = []
    for i, origin in enumerate(origins):
        groups[origin].append(i)
    for g in torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist():
        group = list(groups.values())[g]
        if chosen and len(chosen) + len(group) - wanted >= wanted - len(chosen):
            break
        chosen += group
    return set(chosen)


def texts_of(s, tokenizer, say=print):
    """(to train on, to validate with): the conversations in s.trajectories as [(ids, chosen)]. A conversation of more
    than s.length tokens is cut there. Raises ValueError where nothing is left."""
    found, _ = conversations(s.trajectories, parsed=s.parsed, rose=s.rose, per_idea=s.per_idea, data=s.data,
                             tokenizer=tokenizer, say=say)
    if s.copies and not all(len(one.messages) == 2 and one.messages[0]["content"].startswith("Task: ")
                            for one in found):
        raise ValueError("--copies are made of short prompts alone; collect with --prompt short")
    texts, cut, empty = [], [], []
    kept = []       # the conversation of each text
    for one in found:
        ids, chosen = tokenizer.conversation(one.messages, set(one.trained))
        if len(ids) > s.length + 1:
            cut.append(one.source)
        if any(chosen[:s.length + 1]):
            texts.append((ids[:s.length + 1], chosen[:s.length + 1]))
            kept.append(one)
        else:
            empty.append(one.source)
    for what, sources in ((f"cut at {s.length} tokens", cut), ("left out, no reply before the cut", empty)):
        if sources:
            say(f"  {what}: {len(sources)} ({', '.join(sources[:5])}{', ...' * (len(sources) > 5)})")
    origins = [one.origin for one in kept]
    if len(set(origins)) == 1 < len(origins):
        say(f"  all are of {origins[0]}: some of its own steps validate")
    held = held_back(origins, s.valid, s.seed)
    train, valid = ([text for i, text in enumerate(texts) if (i in held) == side] for side in (False, True))
    if s.copies:
        copies = [tokenizer.conversation(copy) for i, one in enumerate(kept) if i not in held
                  for copy in augmented_copies(one, s.copies, s.seed)]
        # of every tenth the prompt is learned too: a few names stand in it twice, which is more to learn copying from
        copies = [(ids, [True] * len(ids)) if i % 10 == 0 else (ids, chosen) for i, (ids, chosen) in enumerate(copies)]
        train = [(ids[:s.length + 1], chosen[:s.length + 1]) for ids, chosen in copies if any(chosen[:s.length + 1])]
    if not train:
        raise ValueError(f"{len(texts)} conversations are too few to train on and to validate with; collect more")
    return train, valid


# ---------------------------------------------------------------------------------------------------------------------
# The command


def own_tokenizer(s):
    """Makes the tokenizer of s.out, trained on what is in s.trajectories if there is none yet. What replies of the
    same action share is one token, so that a reply is a few decisions: which action, which text, which other text. So
    is " = ", so that a number stands right after its name but for one token, which is how far back copying looks."""
    if not Path(s.out, "tokenizer.json").exists():
        found, _ = conversations(s.trajectories, parsed=s.parsed, rose=s.rose, per_idea=s.per_idea, data=s.data,
                                 say=lambda line: None)
        replies = [one.messages[i]["content"] for one in found for i in one.trained]
        # the values of the two arguments that differ are cut out of the JSON
        pieces = Counter(piece for reply in replies for piece in
                         re.split(r'(?<="find": ").*?(?=", "replace": ")|(?<=", "replace": ").*?(?="}$)', reply))
        phrases = [piece for piece, times in pieces.items() if len(piece) > 3 and times * 50 > len(replies)]
        sample.Tokenizer.train((message["content"] for one in found for message in one.messages), VOCABULARY,
                               [*phrases, " = "]).save(s.out)


def fine_tune(s):
    """Trains s.model on s.trajectories and writes s.out."""
    rank, world, device = init_distributed()
    with explain_dist_errors(rank), contextlib.ExitStack() as held:
        rank0_broadcast(lambda: held.enter_context(folder_lock(s.out, "sft.py")))
        say = print if rank == 0 else lambda line: None
        if s.model == "tiny" and s.prompt == "short":
            rank0_broadcast(lambda: own_tokenizer(s))
            folder, tokenizer = None, sample.Tokenizer.from_pretrained(s.out)
            config = replace(Config.preset("tiny"), vocab_size=tokenizer.size)
        elif s.model == "tiny":
            folder, tokenizer, config = None, sample.Tokenizer.of_bytes(), Config.preset("tiny")
        else:
            folder = find_folder(s.model)
            tokenizer, config = sample.Tokenizer.from_pretrained(folder), Config.from_pretrained(folder)
        texts, valid = texts_of(s, tokenizer, say)
        say(f"{s.model}: training on {len(texts)} conversations of {sum(len(ids) for ids, _ in texts):,} tokens, "
            f"{sum(sum(chosen) for _, chosen in texts):,} of them to learn; {len(valid)} to validate; {world} "
            f"processes, {device}")
        model = train(s, texts, valid, tokenizer, config, folder)
        agent = read_agent(folder) if folder else {}        # eval.py and rl.py read it
        if s.prompt == "short":
            agent = {name: getattr(s, name) for name in AGENT_FORMAT if name != "prompt_format"} | {
                "prompt_format": s.prompt, "steps": AGENT_STEPS}
        if rank == 0 and agent:
            write_atomic(Path(s.out, "agent.json"), agent)
        say(f"Written to {s.out}: the model, log.jsonl, checkpoints")
        return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# The paper in miniature: what `python sft.py` does


def miniature(s):
    """Collects with the scripted expert on the miniatures, trains the tiny model from scratch, shows what it says. Of
    several processes the first one collects and shows; all train."""
    rank, _, device = init_distributed()

    def collect_first():
        print("1. Collecting: a scripted expert edits and runs the starters of the held-in tasks, on miniature data.")
        print(report(collect(replace(s, steps=TINY_STEPS))))
        print("\n2. Training a model of a million weights from scratch on what it did.", flush=True)
    with explain_dist_errors(rank):
        rank0_broadcast(collect_first)
    fine_tune(replace(s, model="tiny"))
    if rank:
        return
    engine = sample.load(s.out, "float32", device, rows=32, context=s.context)
    print("\n3. Its replies in states it has not seen, 64 of each kind:")
    rows = [("tasks", "can be read", "edits", "of them with text that occurs once", "different ones")]
    for split in ("held-in", "held-out"):
        found, prompt, text = reply_stats(s, engine, split)
        rows.append((split, *(f"{found[name]:.0%}" for name in ("parsed", "edits", "valid")), str(found["distinct"])))
    print(format_table(rows) + f"\n\nOne state:\n{prompt[-1]['content']}\n\nIts reply:\n{text}\n\nNext: python rl.py")


def fill(values):
    """For cli.parse: what holds where nothing was typed."""
    if values["preset"]:
        return [cli.preset(values["preset"], RECIPES)]
    return [] if values["collect"] or values["model"] else [("the paper in miniature", TINY)]


def main(argv=None):
    s = cli.parse(Settings, argv, fill)
    if s.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""     # before anything has looked for a GPU

    def work():
        if s.plan:
            return print(plan(s))
        if s.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: there is no GPU that torch can use")
        if not (s.collect or s.model):
            return miniature(s)
        if not s.collect:
            return fine_tune(s)
        refuse_torchrun("collecting")
        print("\n" + report(collect(s)))
        print(f"Written to {s.trajectories}: manifest.json, trajectories, blobs")
    kept = s.trajectories if s.collect else s.out if s.model else f"{s.trajectories} and {s.out}"
    return exit_status("sft.py", work, kept)


if __name__ == "__main__":
    run_main(main)
