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
import contextlib, hashlib, json, math, os, random, re, resource, shutil, sys, time, zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sklearn.feature_extraction.text import TfidfVectorizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import sample
import tasks
from env import (
    DEFAULT_ACTIONS, FIELDS, PROMPTS, Blobs, Cache, Gone, check_record, clip, parse, printed_metric, prompt_of,
    short_prompt, shown_lines)
from model import (
    IGNORE, Config, Qwen2, find_folder, hash_checkpoint, load_tensors, sync, use_kernels, write_checkpoint)
from eval import (
    AGENT, FLAG, NUMBER, TEXT, VALUE, Failed, Run, alone, attempt, ended, file_of, from_json, layout, one_process,
    prepare, read_agent, read_bytes, read_record, run_program, spoken, together, trajectory, write)
from support.miniature_tokenizer import train_tokenizer


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
    optimizer_state: str = "float32"  # what AdamW's two moments are kept in: float32, bfloat16 or int8
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
        if self.optimizer_state not in STATES:
            raise ValueError(f"expected --optimizer-state {', '.join(STATES)}, found {self.optimizer_state!r}")
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
    one edit, whose text the prompt shows, and the script's own numbers. Failed: the expert writes none."""
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
    answers = [] if raw is None else from_json(raw, {"answers": [TEXT]}, path)["answers"]
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
        write(path, {"task": task.id, "expert": s.expert, "answers": answers})
    if not found:
        raise Failed(f"{s.expert} has written no idea for {task.id} that could be read in {len(answers)} answers, kept "
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


def fitting(idea, script):
    """The idea's edits for this script as [(find, replace)], [] where one would not find its text once. An import that
    gives way to another is kept beside it until the end, so that the script runs between the edits where it can."""
    for keep_imports in (True, False):
        text, edits = script, []
        for number, edit in enumerate(idea["edits"], 1):
            find, put = edit["find"], edit["replace"]
            imports = all(line.startswith(("import ", "from ")) for line in find.splitlines())
            if keep_imports and imports and find.endswith("\n") and find not in put and number < len(idea["edits"]):
                put = find + put
            if text.count(find) != 1:
                break
            if find != put:
                edits.append((find, put))
            text = text.replace(find, put)
        else:
            return edits
    return []


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
            part = f"{tell('part', i=i, n=len(edits), line=f'`{clip(old, 120)}`')}" if len(edits) > 1 else ""
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
            reflection = tell("failed", detail=clip(step["detail"] or "It printed no score.", 300))
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


SHORT_ACTIONS = ("Replace In Script", "Undo Edit Script", "Execute Script", "Final Answer")
SHORT_FIELDS = ("Action", "Action Input")      # each word more is one more that a model of a million weights gets wrong


def constants(script):
    """Ideas made of a script's named numbers, "NAME = 5" at the start of a line: each multiplied and divided."""
    found = []
    for name, text in re.findall(r"^([A-Z][A-Z0-9_]*) = (\d[\d.e-]*)(?=\s)", script, re.MULTILINE):
        if not re.fullmatch(r"\d{1,15}(\.\d{0,15})?(e-?\d{1,2})?", text):    # 5-3, or a number beyond all bounds
            continue
        old, whole = float(text), text.isdigit()
        factors = (2, 0.5) if whole else (2, 0.5, 3, 0.1)       # three times as many of something takes too long
        values = [old * factor for factor in factors] if old else [1, 2, 5] if whole else [0.1, 0.01, 0.5]
        for value in dict.fromkeys(max(1, round(value)) if whole else value for value in values):
            new, find = f"{value:.3g}" if not whole else str(value), f"{name} = {text}"
            if name != "SEED" and float(new) != old and script.count(find) == 1 and not 0 < old < 1 <= value:
                found.append({"title": f"{name} {new}", "instruction": f"Set {name} to {new} instead of {text}.",
                              "edits": [{"find": find, "replace": f"{name} = {new}"}]})
    return found


def scripted_short(task, fields, steps, ideas, rng):
    """As scripted, for short prompts: they show the script, so it is not read, and a thought is the idea's title. Now
    and then it does not run the starter, or goes on to another idea before it runs the last: what always follows is not
    explored, and rl.py learns only from what is tried."""
    script, best, new = (task.folder / task.entry).read_text(), None, 0
    kept = script       # what the last good run had; since then there were `new` edits

    def reply(thought, action, **args):
        values = {"Thought": thought, "Action": action, "Action Input": json.dumps(args, ensure_ascii=False)}
        return "\n".join(f"{name}: {values[name]}" for name in fields if name in values)

    def run():
        return reply("run it", "Execute Script", script_name=task.entry)

    if rng.random() < 0.5:
        step = yield run()
        best = printed_metric(step["observation"], task.metric)
    for idea in ideas:
        edits = fitting(idea, script)
        for find, put in edits:
            step = yield reply(idea["title"], "Replace In Script", script_name=task.entry, find=find, replace=put)
            script = script.replace(find, put)
        new += len(edits)
        if not edits or rng.random() < 0.5:
            continue
        step = yield run()
        score = printed_metric(step["observation"], task.metric) if step["outcome"] == "ok" else None
        if score is not None and (best is None or task.better(score, best)):
            best, kept = score, script
        else:
            for _ in range(new):
                step = yield reply("take it back", "Undo Edit Script", script_name=task.entry)
            script = kept
        new = 0
    yield reply("end", "Final Answer", final_answer=f"{task.metric} {best}")


# ---------------------------------------------------------------------------------------------------------------------
# Collecting

# what the trajectories of one folder agree in
SAME = ("expert", "coder", "actions", "fields", "prompt", "steps", "seconds", "ideas", "keep", "embed",
        "max_new_tokens", "temperature", "top_p", "context", "threads", "gpu", "sandbox", "seed")
NUM_STEPS = 15
MANIFEST = {"settings": {str: VALUE}, "tasks": {str: {
    "miniature": FLAG, "sha256": {str: TEXT}, "m_init": NUMBER, "m_best": NUMBER, "ideas": [{
        "title": TEXT, "instruction": TEXT}]}}}


def digest(value):
    return hashlib.sha256((value if isinstance(value, str) else json.dumps(value, sort_keys=True)).encode()).hexdigest()


def fingerprint(tokenizer):
    """Tells tokenizers apart: sampled token ids are of use to a model with the same one alone."""
    return digest(tokenizer.bpe.to_str())[:16]


def held_out(data):
    """{sha256: id} of the files of all held-out tasks that are prepared in the folder `data`. Sample submissions are
    left out: they hold no answer, and those of two tasks may be alike."""
    return {sha: id for id in tasks.names("held-out") if Path(data, id, "task.json").exists()
            for name, sha in tasks.info(id, data)["sha256"].items() if name != f"public/{tasks.load(id).sample}"}


def refuse_held_out(id, sha256, forbidden):
    """ValueError if a task or one of its files, {name: sha256}, is held out; also if there is no such task here, as
    nothing can then be said about it. forbidden: see held_out."""
    if tasks.load(id).split != "held-in":
        raise ValueError(f"{id} is held out: it is for evaluation, and nothing of it may be trained on")
    for name, sha in sha256.items():
        if sha in forbidden:
            raise ValueError(f"{name} of {id} is a file of {forbidden[sha]}, which is held out (sha256 {sha[:16]}...): "
                             "nothing of it may be trained on")


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
    path, rng = file_of(s.trajectories, task.id, k), random.Random(f"{s.seed} {task.id} {k}")
    num_ideas = 2 * s.steps if expert is None and s.prompt == "short" else rng.randint(1, 3)
    drawn = rng.sample(ideas, min(num_ideas, len(ideas)))
    if expert:
        reply = spoken(s, expert, "\n\nIdeas that may be worth trying:" + "".join(
            f"\n- {idea['title']}: {idea['instruction']}" for idea in drawn))
    else:
        script = scripted_short if s.prompt == "short" else scripted
        reply = followed(script(task, s.fields, s.steps, drawn, rng), path)
    tokenizer = getattr(expert, "tokenizer", None)
    trajectory(s, task, k, path, reply, expert if s.coder == "expert" else None, s.trajectories, cache, run,
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
    records = [lines for lines in records if ended(lines) and lines[0]["task"] == task.id]
    steps = [line for lines in records for line in lines if line["type"] == "step"]
    last = [([line["m_after"] for line in lines if "m_after" in line][-1], lines[0]["m_init"]) for lines in records]
    return {"trajectories": len(records), "steps": len(steps), "valid": sum(step["valid"] for step in steps),
            "rose": sum(task.better(score, start) for score, start in last),
            "ended": dict(Counter(map(ended, records))), "kinds": dict(Counter(step["kind"] for step in steps))
            }, [(step["action"], step["args"]) for step in steps if step["valid"]]


def collect(s, load=sample.load):
    """Collects s.num trajectories of each task of s.task and returns what manifest.json then holds. ValueError:
    something is wrong with the settings. Failed: the expert is of no use."""
    if refused := [id for id in tasks.names(s.task) if tasks.load(id).split != "held-in"]:
        raise ValueError(f"{', '.join(refused)}: held out, for evaluation; nothing of it may be trained on. The "
                         f"held-in tasks are: {', '.join(tasks.names('held-in'))}")
    folder = Path(s.trajectories)
    with alone(folder, "sft.py --collect"):
        infos = prepare(s)
        forbidden = held_out(s.data)
        for task, info in infos:
            refuse_held_out(task.id, info["sha256"], forbidden)
        path = folder / "manifest.json"
        same = {name: value for name, value in json.loads(json.dumps(asdict(s))).items() if name in SAME}
        for name in ("expert", "embed"):        # a model that was trained anew in the same folder is another model
            if Path(same[name] or "-").is_dir():
                same[f"{name} of sha256"] = hash_checkpoint(same[name])
        raw = read_bytes(path)
        manifest = {"settings": same, "tasks": {}} if raw is None else from_json(raw, MANIFEST, path)
        then = manifest["settings"]
        found = [f"--{name.replace('_', '-')} was {then.get(name)} and is {same[name]}"
                 for name in same if then.get(name) != same[name]]
        found += [f"the data of {task.id} were others" for task, info in infos
                  if manifest["tasks"].get(task.id, info)["sha256"] != info["sha256"]]
        needed = SHORT_ACTIONS if s.prompt == "short" else SCRIPTED
        if s.expert == "scripted" and (lacking := set(needed) - set(s.actions)):
            raise ValueError(f"the scripted expert needs the actions {','.join(needed)}; missing in --actions: "
                             f"{', '.join(sorted(lacking))}")
        paths = [file_of(folder, task.id, k) for task, _ in infos for k in range(s.num)]
        records = {path: read_record(path) for path in paths}
        found += [f"its manifest.json does not tell of {task.id}" for task, _ in infos if task.id not in manifest["tasks"]
                  and any(records[file_of(folder, task.id, k)] for k in range(s.num))]
        if found:
            raise ValueError(f"{folder} holds trajectories of another kind: {'; '.join(found)}. Give another "
                             "--trajectories, or delete that folder")
        jobs = [(task, k) for k in range(s.num) for task, _ in infos if not ended(records[file_of(folder, task.id, k)])]
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
            pools = dict(zip(wanted, together([(tasks.load(id), expert) for id in wanted],
                                              lambda task, expert: pool(s, task, expert, embedder), s.parallel)))
        for task, info in infos:
            now = {"miniature": info["miniature"], "sha256": info["sha256"], "m_init": info["m_init"],
                   "m_best": info["m_best"]}
            old = manifest["tasks"].setdefault(task.id, now)
            if task.id in pools and old.setdefault("ideas", pools[task.id]) != pools[task.id]:
                raise ValueError(f"the ideas for {task.id} have changed since {folder} was begun; give another folder")
        write(path, {**manifest, "complete": False})
        run = Run(records, playing.steps)
        if any(records.values()):
            print(f"{folder}: {len(run.over)} of {len(records)} trajectories are done; going on", file=sys.stderr)
        cache = Cache(folder / "cache")
        together(jobs, lambda task, k: collected(playing, task, k, pools[task.id], expert, cache, run), s.parallel, run)
        actions = []
        for id, about in manifest["tasks"].items():
            counts, some = counted(s, tasks.load(id))
            about["counts"], actions = counts, actions + some
        manifest.update(complete=True, diversity=diversity(actions))
        write(path, manifest)
        return manifest


def report(manifest):
    """The manifest's counts as text."""
    rows = [("task", "data", "trajectories", "steps", "valid", "score rose", "ideas")]
    for id, one in manifest["tasks"].items():
        numbers = [one["counts"][name] for name in ("trajectories", "steps", "valid", "rose")] + [len(one["ideas"])]
        rows.append((id, "miniature" if one["miniature"] else "real", *map(str, numbers)))
    d = manifest["diversity"]
    mean = "-" if d["distance"] is None else f"{d['distance']:.3f}"
    return (f"{layout(rows)}\n\nDiversity: mean distance of two actions {mean} (0: the same, 1: no word in common), "
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
    found, left_out, times, forbidden = [], defaultdict(list), Counter(), held_out(data)
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
            raise Bad(f"unknown role {clip(repr(role), 40)}")
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
        refuse_held_out(head["task"], head.get("data_sha256", {}), forbidden)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not ended(lines):
        raise Bad("not finished: collect again to go on with it")
    folder = next((parent for parent in file.resolve().parents if (parent / "blobs").is_dir()), file.parent)
    blobs = Blobs(folder / "blobs")
    try:
        for sha in {sha for line in (head, *steps) for sha in line["snapshot"].values()}:
            blobs.path(sha)
    except Gone:
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

def processes():
    """(rank, world size, device) of this process, alone or under torchrun; joins the group of all of them."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized() and world > 1:
        # A script may run for half an hour while others wait. Who dies is noticed by torchrun, or by a lost connection.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3))
    return rank, world, device


@contextlib.contextmanager
def linked(rank):
    """Failed in place of what torch raises where another process of the run has ended."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise Failed(f"rank {rank}: another process of this run has ended, and its own message says why, unless it was "
                     f"killed ({clip(str(error), 200)})") from None


def on_first(work):
    """What work() returns on the first process, or the ValueError or Failed that it raises, on all."""
    done = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            done = work()
        except (ValueError, Failed) as error:
            done = error
    if dist.is_initialized():
        box = [done]
        dist.broadcast_object_list(box)
        done = box[0]
    if isinstance(done, Exception):
        raise done
    return done


def compute_type(dtype, device):
    """The torch.dtype that --dtype names for training: auto is bfloat16 on a GPU and float32 on a CPU."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"expected --dtype auto, float32 or bfloat16, found {dtype!r}")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, dtype)


def build(config, folder, device, seed=0, recompute=False, compute=None, make=Qwen2,
          copying=False):
    """A model to train, with fp32 master weights and gradients, sharded over all processes where there are several.

    Made on the meta device; each process then reads its own rows of the checkpoint in `folder`, or draws them where
    folder is None. compute: the dtype of the products and activations; None: see compute_type. The units of FSDP2 are
    the blocks, and the rest; they are gathered in that dtype and gradients reduced in fp32. A process alone casts each
    weight where it is used. recompute: activation checkpointing, block by block. make: the class; a head `score` that
    it adds begins at zero. copying: the weights that are drawn are those of Qwen2.draw_copying.
    """
    with torch.device("meta"):
        model = make(config)
    model.compute = compute or compute_type("auto", device)
    for block in model.model.layers:
        block.recompute = recompute
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh(device.type, (world,))
        # FSDP must not cast what the blocks are given: cosines and sines of positions stay fp32
        policy = MixedPrecisionPolicy(param_dtype=model.compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in (*model.model.layers, model):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    model.tie()
    own = {}    # name -> (this process's rows, the index of the first, the whole shape)
    for name, p in model.named_parameters():
        own[name] = local(p), min(rank * -(-p.shape[0] // world), p.shape[0]), tuple(p.shape)
    with torch.no_grad():
        for name in [name for name in own if name.startswith("score.")]:
            own.pop(name)[0].zero_()
    if folder:
        load_tensors(folder, own, unused=() if hasattr(model, "lm_head") else ("lm_head.weight",))
    else:
        drawn = Qwen2.from_scratch(config, seed)
        drawn = dict((drawn.draw_copying(seed) if copying else drawn).named_parameters())
        with torch.no_grad():
            for name, (rows, first, _) in own.items():
                rows.copy_(drawn[name][first:first + len(rows)])
    return model


def shards(model):
    """Name and parameter of all that this process holds of a model, as model.named_parameters(). Where it is sharded,
    these are the shards: after a forward without a backward the root of FSDP2 stays gathered, and its parameters are
    until then other tensors, whole, in the dtype of the products and unknown to the optimizer."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model.named_parameters()


def local(x):
    """This process's rows of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(x):
    """A tensor whole on every process; where it is sharded all of them must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def export(model, tokenizer, folder, dtype):
    """Write an ordinary Hugging Face folder from a model that may be sharded, without a critic's head `score`; every
    process must call it."""
    tensors = ((name, full(p.detach())) for name, p in shards(model) if not name.startswith("score."))
    if not dist.is_initialized() or dist.get_rank() == 0:
        tokenizer.save(folder)
        write_checkpoint(folder, model.config, tensors, dtype)
    else:
        for _ in tensors:       # gathering takes all of them
            pass
    barrier()


def barrier():
    if dist.is_initialized():
        dist.barrier()


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


def save_state(s, step, model, optimizer, origin, keep=2, **more):
    """Write everything a later process needs to go on exactly after `step` steps, each process its own part. origin:
    {what: value} of all that the run hangs on besides its settings.

    Written aside and renamed when all are done, so a folder s.out/checkpoints/step-N is whole. The last `keep` stay.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    final = Path(s.out, "checkpoints", f"step-{step:06d}")
    part = final.with_suffix(".part")
    if rank == 0:
        for left in final.parent.glob("*.part"):        # by a kill
            shutil.rmtree(left)
        part.mkdir(parents=True)
    barrier()
    own = dict(shards(model))
    file = part / f"rank-{rank}.pt"
    torch.save({"step": step, "world": world, "settings": vars(s), "origin": origin, "rng": torch.get_rng_state(),
                **more, "model": {name: local(p.detach()) for name, p in own.items()},
                "optimizer": [optimizer.state[p] for p in own.values()]}, file)
    sync(file)
    barrier()
    if rank == 0:
        sync(part)
        part.rename(final)
        sync(final.parent)
        for old in sorted(final.parent.glob("step-??????"))[:-keep]:
            old.rename(old.with_suffix(".part"))        # a folder that is half deleted must not look whole
            shutil.rmtree(old.with_suffix(".part"))
    barrier()


def load_state(s, names, model, optimizer, origin):
    """The newest complete state below s.out, put into model and optimizer: what else it holds, as a dict; None where
    there is none. ValueError: it is of a run of another number of processes, or that had other settings of these names
    or another origin, see save_state."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = sorted(Path(s.out, "checkpoints").glob("step-??????"))
    if not found:
        return None
    num = len(list(found[-1].glob("rank-*.pt")))
    if num != world:
        raise ValueError(f"{found[-1]} was written by {num} processes and this run has {world}; start {num}, or give "
                         "another --out")
    state = torch.load(found[-1] / f"rank-{rank}.pt", map_location="cpu", weights_only=True)
    flags = {f"--{name.replace('_', '-')}": (state["settings"].get(name), getattr(s, name)) for name in names}
    given = {what: (state.get("origin", {}).get(what), now) for what, now in origin.items()}
    if other := [f"{what} {then} (now {now})" for what, (then, now) in {**flags, **given}.items() if then != now]:
        raise ValueError(f"{found[-1]} is of a run with {', '.join(other)}; give these again to go on with it, or "
                         "another --out to begin anew")
    weights = state.pop("model")            # the caller must not keep them alive
    moments = state.pop("optimizer")
    own = dict(shards(model))
    with torch.no_grad():
        for name, p in own.items():
            local(p).copy_(weights[name])
    for p, values in zip(own.values(), moments):
        optimizer.state[p] = {key: value.to(p.device) if torch.is_tensor(value) else value
                              for key, value in values.items()}
    torch.set_rng_state(state["rng"])
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer

STATES = ("float32", "bfloat16", "int8")
BLOCK = 256     # neighbouring values that share a scale in 8 bits


def to_bf16(x, bits):
    """fp32 x in bf16, rounded up or down at random so that the mean is x. bits: integers, even over 0..2^16 - 1."""
    return ((x.view(torch.int32) + bits) & -2**16).view(torch.float32).bfloat16()


def to_8bit(x, bits, signed):
    """(codes, scales) of fp32 x, whose length is a multiple of BLOCK: sign and logarithm of each value's share of the
    largest in its block, in 8 levels an octave down to 2^-15.75 (signed, int8) or 10 down to 2^-25.4 (uint8).

    Rounded up or down at random so that the mean is x. A signed value below the lowest level becomes it or 0, in the
    mean itself; an unsigned one always becomes it, because a second moment of 0 would make its step huge.
    """
    octave, top, kind = (8, 127, torch.int8) if signed else (10, 255, torch.uint8)
    x, u = x.view(-1, BLOCK), (bits * 2**-16).view(-1, BLOCK)
    scale = x.abs().amax(1, keepdim=True)
    share = x.abs() / scale.clamp_min(1e-45)                                    # 0 to 1
    level = (share.log2() * octave).floor().clamp_min(1 - top)
    low = (level / octave).exp2()
    code = (level + top + (u < (share / low - 1) / (2 ** (1 / octave) - 1))).clamp_max(top)
    if signed:
        code = torch.where(share < low, (u < share / low).float(), code) * x.sign()
    return torch.where(share > 0, code, 0).to(kind).view(-1), scale.view(-1)


def from_8bit(codes, scales):
    """The fp32 values that to_8bit has put into codes and scales."""
    octave, top = (8, 127) if codes.dtype is torch.int8 else (10, 255)
    code = codes.float().view(-1, BLOCK)
    return (((code.abs() - top) / octave).exp2() * code.sign() * scales[:, None]).view(-1)


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) on the rows that this process holds, with its two moments in fp32, bf16 or
    8 bits: 8, 4 or 2 bytes a weight.

    A step computes in fp32 whatever the state, and applies the new moments before they are rounded. Rounding is to a
    random neighbour, right in the mean: a second moment moves by a thousandth of itself a step, where bf16 resolves
    1/256 and 8 bits 1/14, so rounding to the nearest would hold it there. The noise that is left is 9 % of a second
    moment in bf16 and 20 % in 8 bits (tests/test_train.py), half of that in a single weight's step. The random bits
    depend on the step and the weight's place alone, so a resumed run draws the same.
    """
    def __init__(self, params, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, state="float32"):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        self.kind = state

    def begin(self, size, device):
        """The moments of `size` weights before the first step."""
        if self.kind == "int8":
            num = -(-size // BLOCK)
            codes = {"m": torch.int8, "v": torch.uint8, "m_scale": torch.float32, "v_scale": torch.float32}
            return {"step": 0, **{name: torch.zeros(num * (1 if "_" in name else BLOCK), dtype=dtype, device=device)
                                  for name, dtype in codes.items()}}
        return {"step": 0, **{name: torch.zeros(size, dtype=getattr(torch, self.kind), device=device) for name in "mv"}}

    @torch.no_grad()
    def step(self):
        place = 0
        for group in self.param_groups:
            for p in group["params"]:
                place += 1
                if p.grad is not None:
                    weight, grad = local(p), local(p.grad)
                    if not self.state[p]:
                        self.state[p] = self.begin(weight.numel(), weight.device)
                    self.update(weight.view(-1), grad.reshape(-1), self.state[p], place, group)

    def update(self, weight, grad, state, place, group):
        state["step"] += 1
        (b1, b2), step = group["betas"], state["step"]
        random = torch.Generator(weight.device).manual_seed(step * 1_000_003 + place)
        some = 2**18 if weight.device.type == "cpu" else 2**24     # at a time: what a cache holds, or bounds memory
        for start in range(0, len(weight), some):
            part, blocks = slice(start, start + some), slice(start // BLOCK, (start + some) // BLOCK)
            w, g, m, v = (x[part] for x in (weight, grad, state["m"], state["v"]))
            if self.kind == "int8":
                now = from_8bit(m, state["m_scale"][blocks]), from_8bit(v, state["v_scale"][blocks])
                g = torch.nn.functional.pad(g, (0, len(m) - len(g)))
            else:
                now = m.float(), v.float()                          # in fp32 the state itself
            now[0].lerp_(g, 1 - b1)
            now[1].mul_(b2).addcmul_(g, g, value=1 - b2)
            root = (now[1].sqrt() / math.sqrt(1 - b2**step)).add_(group["eps"])
            w.mul_(1 - group["lr"] * group["weight_decay"])
            w.addcdiv_(now[0][:len(w)], root[:len(w)], value=-group["lr"] / (1 - b1**step))
            if self.kind != "float32":
                bits = torch.empty(len(m), dtype=torch.int32, device=w.device).random_(generator=random)
                for name, x, kept, own in zip("mv", now, (m, v), (bits & 0xFFFF, bits >> 15)):
                    if self.kind == "int8":
                        codes, state[f"{name}_scale"][blocks] = to_8bit(x, own, signed=name == "m")
                        kept.copy_(codes)
                    else:
                        kept.copy_(to_bf16(x, own))


# ---------------------------------------------------------------------------------------------------------------------
# Batches

def pack(lengths, longest):
    """Indices of texts in rows of at most `longest` tokens: each text goes into the first row with room, in order."""
    rows, room = [], []
    for i, n in enumerate(lengths):
        for r, free in enumerate(room):
            if n <= free:
                rows[r].append(i)
                room[r] -= n
                break
        else:
            rows.append([i])
            room.append(longest - n)
    return rows


def batch_of(num, step, size, seed):
    """Indices of the texts, out of `num`, of optimizer step `step`: the epochs' shuffled orders, one after the other,
    cut into runs of `size`. It depends on nothing else, so a resumed run needs no memory of what it has seen."""
    places = range(step * size, (step + 1) * size)
    return [epoch_order(num, seed, place // num)[place % num] for place in places]


@lru_cache(maxsize=4)
def epoch_order(num, seed, epoch):
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def row_of(texts, device):
    """(tokens (1, T), lengths, targets (1, T)) of one packed row; targets[i] is the token after i if that was chosen.

    An empty list gives a row of one token and no target, for a process that has nothing left to do in a step.
    """
    texts = texts or [([0, 0], [False, False])]
    tokens = [t for ids, _ in texts for t in ids[:-1]]
    targets = [t if c else IGNORE for ids, chosen in texts for t, c in zip(ids[1:], chosen[1:])]
    return (torch.tensor([tokens], device=device), [len(ids) - 1 for ids, _ in texts],
            torch.tensor([targets], device=device))


# ---------------------------------------------------------------------------------------------------------------------
# Training

def peak_memory(device):
    """Bytes: what the GPU has held at most, or the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cosine(step, steps, peak):
    """The learning rate of a step: half a cosine from `peak` at step 0 towards 0 at step `steps`."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def share(lengths, chosen, rank, world, longest):
    """The packed rows of one process for the texts `chosen`, as lists of their indices; lengths: tokens of every text.
    As many rows for every process, because FSDP gathers and reduces for all of them together."""
    packed = [pack([lengths[i] for i in chosen[r::world]], longest) for r in range(world)]
    rows = [[chosen[rank::world][j] for j in row] for row in packed[rank]]
    return rows + [[]] * (max(map(len, packed)) - len(rows))


def rows_of(texts, chosen, rank, world, longest):
    """The packed rows, lists of texts, of one process; see share."""
    rows = share([len(ids) - 1 for ids, _ in texts], chosen, rank, world, longest)
    return [[texts[i] for i in row] for row in rows]


def add_gradients(model, rows, num_targets, world, device, size):
    """Add the gradients of the mean negative log-prob over all `num_targets` targets of the step, whatever process and
    row they are in; returns this process's part of that mean, a tensor.

    FSDP averages the processes' gradients where this sum needs their sum, hence the factor `world`.
    """
    total = torch.zeros((), device=device)
    for row in rows:
        tokens, lengths, targets = row_of(row, device)
        logp, _, _ = model(tokens, lengths=lengths, targets=targets, size=size)
        loss = -logp.sum() / num_targets
        (loss * world).backward()
        total += loss.detach()
    return total


@torch.no_grad()
def validate(model, texts, rank, world, device, size, longest):
    """(mean negative log-prob, share of targets that were the most likely token) over the chosen tokens of texts."""
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    for row in rows_of(texts, list(range(len(texts))), rank, world, longest):
        tokens, lengths, targets = row_of(row, device)
        logp, _, first = model(tokens, lengths=lengths, targets=targets, size=size)
        sums += torch.stack([-logp.double().sum(), first.double().sum(), torch.tensor(float(len(logp)), device=device)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return (sums[0] / sums[2]).item(), (sums[1] / sums[2]).item()


def peak_flops(device):
    """Floating-point operations a second this device can do: the vendor's figure for known GPUs, else measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = {"H100": 989e12, "H200": 989e12, "A100": 312e12}        # dense bf16
        return next((flops for key, flops in known.items() if key in name), None)
    x, best = torch.randn(1024, 1024), 0.0
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best


def flops_of(config, rows):
    """Floating-point operations of a training step over packed rows: 6 a token for each weight of the products, 12 a
    pair of tokens that see each other for each unit of width and layer (PaLM, arXiv 2204.02311, appendix B)."""
    c = config
    block = c.hidden_size * (2 * c.hidden_size + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
    lengths = [len(ids) - 1 for row in rows for ids, _ in row]
    heads = sum(sum(chosen) for row in rows for _, chosen in row)
    return (6 * sum(lengths) * block * c.num_hidden_layers + 6 * heads * c.vocab_size * c.hidden_size
            + 12 * sum(n * n / 2 for n in lengths) * c.hidden_size * c.num_hidden_layers)


def num_weights(config):
    """(of a block, of the embedding, of the head: 0 where it is the embedding, of all)."""
    c, kv = config, config.num_key_value_heads * config.head_dim
    block = c.hidden_size * (2 * c.hidden_size + 2 * kv + 3 * c.intermediate_size) + 3 * c.hidden_size + 2 * kv
    table = c.vocab_size * c.hidden_size
    head = 0 if c.tie_word_embeddings else table
    return block, table, head, c.num_hidden_layers * block + table + head + c.hidden_size


def memory_of(config, length, gpus=1, targets=None, optimizer_state="float32", recompute=True, compute=torch.bfloat16,
              device="cuda"):
    """{part: bytes} of one process at the peak of a training step of more than one packed row; the sum is the peak.

    length: tokens of a row; targets: how many of them are learned, by default all. Weights, gradients and the optimizer
    are shared out over `gpus`. "gathered" is what FSDP2 collects of the others' weights, or the copies in `compute` of
    a process alone. Activations are what autograd keeps, counted operation by operation (Block), and the work of one
    block's backward. "logits" is what the head takes beyond that work: pieces of the logits, and its new gradient
    beside the old one. It counts tensors: an allocator's own waste, the CUDA context and NCCL's buffers come on top.
    """
    c, size = config, compute.itemsize
    C, F, kv, L = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim, c.num_hidden_layers
    block, table, head, total = num_weights(c)
    targets = length if targets is None else targets
    state = {"float32": 8, "bfloat16": 4, "int8": 2 + 8 / BLOCK}[optimizer_state]
    norm = 2 * size if device == "cuda" else 8 + size       # fused on a GPU; else its input and quotient in fp32
    token = C * (2 * norm + 3 * size) + size * (2 * kv + 4 * F) + 4 * c.num_attention_heads + 8
    kept = L * length * (size * C if recompute else token)
    work = length * size * (2 * F + 2 * C) + (length * token if recompute else 0)       # of a block's backward
    gathered = size * (table + head + 2 * block) if gpus > 1 else (0 if size == 4 else size * block * (
        1 if recompute else L))
    if gpus > 1:        # gradients before they are shared out: of a block, and at the end of embedding and head
        work = max(work + (size + 4) * block, (size + 4) * (table + head) - kept)
    piece = targets * max(64, min(c.vocab_size, (2**27 if device == "cuda" else 2**24) // max(1, targets)))
    logits = piece * (8 + (size if size < 4 else 4)) + targets * C * (size + 4) + length * C * norm
    new = (size if gpus > 1 else 4) * table
    work += new if c.tie_word_embeddings else 0             # there it waits for the embedding's, which is dense
    work = max(work, new * (2 if c.tie_word_embeddings else 1) - kept)
    return {"weights": 4 * total // gpus, "gradients": 4 * total // gpus, "optimizer": int(state * total) // gpus,
            "gathered": gathered, "activations": kept + work, "logits": max(0, logits + new - work)}


def shape_of(model):
    """The Config of a folder, a published Qwen2.5 by its name, or a preset ("7b"); reads no weights."""
    named = re.fullmatch(r"(?:.*/)?Qwen2\.5-(?:Coder-|Math-)?([\d.]+b)(?:-Instruct)?", model, re.I)
    return (Config.from_pretrained(model) if Path(model).is_dir() else
            Config.preset(named[1].lower() if named else model or "tiny"))


def gib(parts):
    """{part: bytes} as lines, the sum last."""
    return [f"  {name:<14} {size / 2**30:8.2f}" for name, size in [*parts.items(), ("total", sum(parts.values()))]]


def plan(s):
    """What --plan prints: memory of one GPU by part, steps, tokens and time. Reads no weights and needs no GPU."""
    config = shape_of(s.model)
    parts = memory_of(config, s.length, s.gpus, None, s.optimizer_state, s.recompute,
                      compute_type(s.dtype, torch.device("cuda")))
    num, data = 10_000, "as many as the paper has"
    if Path(s.trajectories).exists():
        num, data = len(conversations(s.trajectories, parsed=s.parsed, rose=s.rose, per_idea=s.per_idea, data=s.data,
                                      say=lambda line: None)[0]), s.trajectories
    steps = s.steps or math.ceil(s.epochs * num / s.batch)
    row = [([0] * (s.length + 1), [True] * (s.length + 1))]
    seconds = steps * s.batch * flops_of(config, [row]) / (s.gpus * 0.4 * 989e12)
    lines = [f"{s.model or 'tiny'}: {num_weights(config)[-1]:,} weights; {s.gpus} GPUs, rows of {s.length:,} tokens, "
             f"optimizer state {s.optimizer_state}, recompute {'on' if s.recompute else 'off'}", "", "GiB per GPU"]
    return "\n".join([*lines, *gib(parts), "", f"{num:,} conversations ({data}): {steps:,} steps of {s.batch}, at most "
                      f"{steps * s.batch * s.length:,} tokens", f"about {seconds / 3600:.1f} hours at most, at 40 % of "
                      "an H100's 989 TFLOP/s per GPU"])


SCHEDULE = ("batch", "length", "lr", "warmup", "beta2", "weight_decay", "optimizer_state", "clip", "copies", "valid",
            "parsed", "rose", "per_idea", "dtype", "kernels", "seed")   # what a run that goes on must have as it began


def train(s, texts, valid, tokenizer, config, folder):
    """Fine-tune on texts, [(ids, chosen)], and write out/: checkpoints, log.jsonl, and the model as a Hugging Face
    folder. Goes on from the newest checkpoint there. Returns the model."""
    rank, world, device = processes()
    use_kernels(s.kernels, device)
    model = build(config, folder, device, s.seed, s.recompute, compute_type(s.dtype, device), copying=s.copies > 0)
    optimizer = AdamW(model.parameters(), s.lr, s.weight_decay, (0.9, s.beta2), state=s.optimizer_state)
    steps = s.steps or math.ceil(s.epochs * len(texts) / s.batch)
    origin = {"optimizer steps": steps, "products in": str(model.compute).removeprefix("torch."),
              **on_first(lambda: {"--model of sha256": hash_checkpoint(folder) if folder else "none",
                                  "texts of sha256": hash_texts(texts, valid)})}
    state = load_state(s, SCHEDULE, model, optimizer, origin)
    first, size, peak = state["step"] if state else 0, tokenizer.size, peak_flops(device)
    if first >= steps and rank == 0:
        print(f"{s.out} is already trained, for {first} steps; to begin anew give another --out, or delete it")
    log = open(Path(s.out, "log.jsonl"), "a") if rank == 0 else None
    started = time.monotonic()
    for step in range(first, steps):
        start, chosen = time.monotonic(), batch_of(len(texts), step, s.batch, s.seed)
        num_targets = sum(sum(texts[i][1]) for i in chosen)
        rows = rows_of(texts, chosen, rank, world, s.length)
        loss = add_gradients(model, rows, num_targets, world, device, size)
        norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip))
        losses = torch.zeros(world, device=device)
        losses[rank] = loss
        if dist.is_initialized():
            dist.all_reduce(losses)
        *losses, norm = torch.cat([losses, norm[None]]).tolist()        # the step's one wait for the device
        loss = sum(losses)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            ill = [r for r in range(world) if not math.isfinite(losses[r])] or range(world)
            where = "; ".join(f"rank {r}, conversations {chosen[r::world]}" for r in ill)
            raise Failed(f"step {step + 1}: loss {loss}, gradient norm {norm}; {where}. The checkpoints in {s.out} are "
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
    export(model, tokenizer, s.out, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model


DRILLS = 8              # more edits of the same script that a redrawn copy has, where it has so many constants
NUMBER = re.compile(r"([A-Z][A-Z0-9_]*) = (\d[\d.e-]*)")      # a line of a script that gives a constant


def redrawn(messages, rng):
    """A short prompt and its reply in which the constants of the script have other names, other numbers and another
    order, in both alike, and often most lines of the script are gone. The edit, if it is one, still fits the script:
    its text occurs in it once. Edits of the script's other constants follow it, as replies too: the long prompt is read
    once for up to nine texts to copy."""
    (prompt, reply), number = (one["content"] for one in messages), rng.random() < 0.7
    head, lines = prompt.split("\n")[:3], prompt.split("\n")[3:]
    before, key, args = reply.rpartition("Action Input: ")
    try:
        args = json.loads(args)
    except ValueError:      # parse() takes more forms than this one
        return messages
    places = [i for i, line in enumerate(lines) if NUMBER.fullmatch(line)]
    for i, line in zip(places, rng.sample([lines[i] for i in places], len(places))):
        lines[i] = line

    def word(_):
        return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZEAIOTRSNL", k=rng.choice((1, 2, 3, 4, 5, 6, 8))))

    def other(digits):      # the same form: 0.25 may become 0.73, never 00.1
        new = re.sub(r"\d", lambda _: rng.choice("123456789"), digits)
        return digits if re.fullmatch(r"0\.0*", digits) else "0" + new[1:] if digits.startswith("0.") else new

    changed = {}
    for i in places:
        name, digits = NUMBER.fullmatch(lines[i]).groups()
        changed[f"{name} = {digits}"] = f"{name} = {other(digits) if number else digits}"
    names = {name: "_".join(map(word, range(rng.randint(1, 3)))) for i in places if rng.random() < 0.8
             for name in [NUMBER.fullmatch(lines[i])[1]]}

    def put(text):
        for old, new in changed.items():
            text = re.sub(rf"\b{re.escape(old)}(?![\d.e])", new, text)
        return re.sub(r"\b[A-Z][A-Z0-9_]*\b", lambda found: names.get(found[0], found[0]), text)

    find, lines = put(args.get("find", "")), put("\n".join(lines)).split("\n")
    at = "\n".join(lines).find(find)
    if at >= 0 and rng.random() < 0.5:
        first = "\n".join(lines)[:at].count("\n")
        last = first + find.count("\n")
        lines = lines[rng.randint(0, first):rng.randint(last, min(last + 3, len(lines))) + 1]
    args |= {name: put(args[name]) for name in ("find", "replace") if name in args}
    if find and ("\n".join(lines).count(find) != 1 or args["replace"] == find):    # names that happen to be alike
        return messages
    replies = [args]
    if find:
        others = constants("\n".join(lines) + "\n")
        edits = {edit["find"]: edit for idea in rng.sample(others, len(others)) for edit in idea["edits"]}
        edits.pop(find, None)
        replies += [args | edit for edit in list(edits.values())[:DRILLS]]
    return [{**messages[0], "content": "\n".join(head + lines)},
            *({"role": "assistant", "content": before + key + json.dumps(each, ensure_ascii=False)} for each in replies)]


def copies_of(one, num, seed):
    """num copies of the messages of a short prompt and its reply, 7 of 10 of them redrawn; a quarter if no edit."""
    rng = random.Random(f"{seed} {one.source}")
    num = num if '"find": ' in one.messages[-1]["content"] else -(-num // 4)
    return [redrawn(one.messages, rng) if rng.random() < 0.7 else one.messages for _ in range(num)]


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
                  for copy in copies_of(one, s.copies, s.seed)]
        # of every tenth the prompt is learned too: a few names stand in it twice, which is more to learn copying from
        copies = [(ids, [True] * len(ids)) if i % 10 == 0 else (ids, chosen) for i, (ids, chosen) in enumerate(copies)]
        train = [(ids[:s.length + 1], chosen[:s.length + 1]) for ids, chosen in copies if any(chosen[:s.length + 1])]
    if not train:
        raise ValueError(f"{len(texts)} conversations are too few to train on and to validate with; collect more")
    return train, valid


# ---------------------------------------------------------------------------------------------------------------------
# The command

VOCABULARY = 1024       # ids of the tokenizer that is trained for a model from scratch


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
        train_tokenizer((message["content"] for one in found for message in one.messages), VOCABULARY,
                        [*phrases, " = "]).save(s.out)


def fine_tune(s):
    """Trains s.model on s.trajectories and writes s.out."""
    rank, world, device = processes()
    with linked(rank), contextlib.ExitStack() as held:
        on_first(lambda: held.enter_context(alone(s.out, "sft.py")))
        say = print if rank == 0 else lambda line: None
        if s.model == "tiny" and s.prompt == "short":
            on_first(lambda: own_tokenizer(s))
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
            agent = {name: getattr(s, name) for name in AGENT} | {"steps": AGENT_STEPS}
        if rank == 0 and agent:
            write(Path(s.out, "agent.json"), agent)
        say(f"Written to {s.out}: the model, log.jsonl, checkpoints")
        return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# The paper in miniature: what `python sft.py` does

AGENT_STEPS = 5         # replies of a trajectory of the small model, in evaluation
TINY = {"prompt": "short", "actions": SHORT_ACTIONS, "fields": SHORT_FIELDS, "context": 640,
        "keep": 24, "num": 5, "max_new_tokens": 96, "epochs": 1.0, "batch": 8, "copies": 56, "length": 1024,
        "lr": 1.5e-3, "warmup": 20, "beta2": 0.95, "validate_every": 500, "save_every": 500, "recompute": False}
TINY_STEPS = 8          # replies of a collected trajectory


def unseen(split, num, rng):
    """num states that nobody was in, [(script, prompt)]: the starters of a split's tasks with two numbers changed, just
    run. Of held-out tasks the scripts are shown to the model here; nothing is learned of them."""
    found, ids = [], tasks.names(split)
    while len(found) < num:
        task = tasks.load(ids[len(found) % len(ids)])
        script = (task.folder / task.entry).read_text()
        for _ in range(2):
            ideas = [idea for idea in constants(script) if idea["edits"][0]["find"] in shown_lines(script)]
            if ideas:
                edit, = rng.choice(ideas)["edits"]
                script = script.replace(edit["find"], edit["replace"])
        seen = [{"role": "assistant", "content": "Action: Execute Script"},
                {"role": "user", "content": f"{task.entry} ran to the end in 1 s.\n{task.metric}: {rng.random():.4f}"}]
        found.append((script, short_prompt(task, [{}, {}, *seen], script)))
    return found


def try_out(s, engine, split, num=64):
    """(figures, a prompt, its reply) of num sampled replies in unseen states: the shares that can be read, that edit,
    and of the edits those whose text occurs once in the script; and how many of these differ."""
    states = unseen(split, num, random.Random(s.seed))
    replies = engine.generate([prompt for _, prompt in states], max_new_tokens=s.max_new_tokens, seed=s.seed)
    read = [parse(reply.text, s.fields, s.actions) for reply, in replies]
    edits = [(args, script) for (_, action, args, error), (script, _) in zip(read, states)
             if not error and action == "Replace In Script"]
    fit = [json.dumps(args) + script for args, script in edits
           if args["find"] and script.count(args["find"]) == 1 and args["replace"] != args["find"]]
    return {"parsed": sum(not error for *_, error in read) / num, "edits": len(edits) / num,
            "valid": len(fit) / max(1, len(edits)), "distinct": len(set(fit))}, states[0][1], replies[0][0].text


def miniature(s):
    """Collects with the scripted expert on the miniatures, trains the tiny model from scratch, shows what it says. Of
    several processes the first one collects and shows; all train."""
    rank, _, device = processes()

    def collect_first():
        print("1. Collecting: a scripted expert edits and runs the starters of the held-in tasks, on miniature data.")
        print(report(collect(replace(s, steps=TINY_STEPS))))
        print("\n2. Training a model of a million weights from scratch on what it did.", flush=True)
    with linked(rank):
        on_first(collect_first)
    fine_tune(replace(s, model="tiny"))
    if rank:
        return
    engine = sample.load(s.out, "float32", device, rows=32, context=s.context)
    print("\n3. Its replies in states it has not seen, 64 of each kind:")
    rows = [("tasks", "can be read", "edits", "of them with text that occurs once", "different ones")]
    for split in ("held-in", "held-out"):
        found, prompt, text = try_out(s, engine, split)
        rows.append((split, *(f"{found[name]:.0%}" for name in ("parsed", "edits", "valid")), str(found["distinct"])))
    print(layout(rows) + f"\n\nOne state:\n{prompt[-1]['content']}\n\nIts reply:\n{text}\n\nNext: python rl.py")


def fill(values):
    """For sample.parse: what holds where nothing was typed."""
    if values["preset"]:
        return [sample.preset(values["preset"], RECIPES)]
    return [] if values["collect"] or values["model"] else [("the paper in miniature", TINY)]


def main(argv=None):
    s = sample.parse(Settings, argv, fill)
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
        one_process("collecting")
        print("\n" + report(collect(s)))
        print(f"Written to {s.trajectories}: manifest.json, trajectories, blobs")
    kept = s.trajectories if s.collect else s.out if s.model else f"{s.trajectories} and {s.out}"
    return attempt("sft.py", work, kept)


if __name__ == "__main__":
    run_program(main)
