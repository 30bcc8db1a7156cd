"""Ideas for a task: those that an expert writes or that are shipped, and of them the ones that differ most."""
import math, re, zlib
from pathlib import Path

import numpy as np

import tasks
from support.cli import RunError
from support.files import COUNT, TEXT, parse_json, read_bytes, shorten, write_atomic
from support.prompts import better_word

NUM_IDEAS = 10          # of a task, those that differ most
ASK = """{problem}

This is {entry}, the script to improve; its metric is {metric}, {better} is better.
```python
{script}
```
Write {count} ideas for changing it, about {kind}, each different from the others. They must work without installing \
or downloading anything. One idea a line, in this form and nothing else:
- short title: what to change in the script, in one or two sentences

These are known already:{known}"""
ASKED_AT_ONCE = 15      # ideas; longer lists repeat themselves
ASKED_ABOUT = ("anything", *tasks.IDEA_KINDS)       # in turn
IDEA = (r"^[ \t]{0,20}(?:[-*•]|\d{1,3}[.)])[ \t]{0,9}\*{0,3}([^:\n]{3,100}?)\*{0,3}[ \t]{0,9}(?:[:–—]| - )"
        r"[ \t*]{0,9}(\S[^\n]{9,600})$")


def parse_ideas(text):
    """Returns [{"title", "instruction"}] of the lines "- title: instruction" in a model's answers, the first of each
    title."""
    ideas = {}
    for title, instruction in re.findall(IDEA, text, re.MULTILINE):
        ideas.setdefault(title.strip().lower(), {"title": title.strip(), "instruction": instruction.strip()})
    return list(ideas.values())


def ask_ideas(cfg, task, expert):
    """Returns ideas that the expert writes for a task: cfg.ideas or more, fewer where it repeats itself. Its answers
    are kept in ideas/TASK.json and it is not asked for them again. RunError: none of them can be read."""
    path = Path(cfg.trajectories, "ideas", f"{task.id}.json")
    raw = read_bytes(path)
    asked = {"expert": cfg.expert, "seed": cfg.seed}
    kept = parse_json(raw, {"expert": TEXT, "seed": COUNT, "answers": [TEXT]}, path) if raw else {}
    answers = kept["answers"] if asked.items() <= kept.items() else []
    most = 3 * math.ceil(cfg.ideas / ASKED_AT_ONCE) + len(ASKED_ABOUT)
    ideas = parse_ideas("\n".join(answers))
    while len(ideas) < cfg.ideas and len(answers) < most:
        question = ASK.format(
            problem=task.problem.strip(), entry=task.entry, metric=task.metric, better=better_word(task),
            script=task.starter, count=ASKED_AT_ONCE, kind=ASKED_ABOUT[len(answers) % len(ASKED_ABOUT)],
            known="".join(f"\n- {idea['title']}" for idea in ideas[-40:]))
        seed = zlib.crc32(f"{cfg.seed} {task.id} {len(answers)} ideas".encode())
        answer = expert.chat([{"role": "user", "content": question}], temperature=1.0,
                             max_new_tokens=max(1024, cfg.max_new_tokens), seed=seed)
        answers.append(answer.text)
        write_atomic(path, {**asked, "answers": answers})
        ideas = parse_ideas("\n".join(answers))
    if not ideas:
        path.unlink(missing_ok=True)        # so that it is asked again
        raise RunError(f"{cfg.expert} has written no idea for {task.id} that could be read, but for example "
                       f"{shorten(ascii(answers[-1]), 200)}. Take the shipped ideas with --ideas 0, another --expert, "
                       "or more --max-new-tokens")
    return ideas


def tfidf_vectors(texts):
    """Returns a sparse matrix with a row of length 1 for each text."""
    from sklearn.feature_extraction.text import TfidfVectorizer     # takes a second, which most programs save
    return TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit_transform(texts)


def farthest(vectors, k):
    """Returns the indices of k rows far apart, k at least 2: the two most distant, then again and again the row whose
    nearest chosen one is farthest (Gonzalez 1985). Ties go to the first row. vectors: (N, C), rows of length 1, sparse
    or not."""
    from sklearn.metrics.pairwise import linear_kernel
    distance = np.sqrt(np.maximum(2 - 2 * linear_kernel(vectors), 0))       # |a - b|^2 = 2 - 2ab
    distance[distance < 1e-7] = 0                           # what rounding leaves of equal rows must not choose
    chosen = list(dict.fromkeys(np.unravel_index(distance.argmax(), distance.shape)))     # rows all equal: only 0
    while len(chosen) < min(k, len(distance)):
        nearest = distance[:, chosen].min(1)
        nearest[chosen] = -1
        chosen.append(nearest.argmax())
    return [int(i) for i in chosen]


def choose_ideas(cfg, task, expert):
    """Returns the ideas that the trajectories of a task draw from, those that differ most. expert: None for the
    scripted one, which with short prompts tries the script's constants instead."""
    if expert is None and cfg.prompt_format == "short":
        return []
    if expert is None or cfg.ideas == 0:
        candidates = tasks.ideas(task.id)
    else:
        candidates = ask_ideas(cfg, task, expert)
    if not candidates:
        constants = ", or try its constants alone: --prompt-format short" if expert is None else ""
        raise ValueError(f"{task.id} has no ideas.json; write one (tasks/README.md), or let an expert write ideas: "
                         f"--expert MODEL --ideas 100{constants}")
    vectors = tfidf_vectors([f"{idea['title']}. {idea['instruction']}" for idea in candidates])
    return [candidates[i] for i in farthest(vectors, NUM_IDEAS)]
