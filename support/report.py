"""Reads what is left of runs, and writes the page that shows them: one HTML file that needs no network."""
import base64, hashlib, html, json, math, re
from pathlib import Path

from support.aide import SEARCHES
from support.disclosure import FINAL, FORM
from support.files import (
    COUNT, FLAG, NUMBER, TEXT, VALUE, WORD, maybe, one_of, parse_json, read_bytes, read_json_lines, shorten,
    write_atomic)

LONGEST_TEXT = 20_000       # characters of one text on the page
CURVES = {      # entry of a training log -> heading of its figure
    "reward": "mean reward", "reward_edits": "mean reward of edits that ran", "valid": "valid replies, share",
    "kl": "divergence from the first model, nats a token", "entropy": "entropy, nats a token",
    "cache_hits": "runs known already, share", "loss": "training loss", "valid_loss": "validation loss"}
SHARES = ("share_invalid", "share_failed", "share_not_an_edit", "share_limit", "share_scored")
STEP = ("action", "args", "coder", "detail", "ended", "fields", "kind", "m_after", "m_before", "no_reply", "node",
        "observation", "outcome", "printed", "reply", "reward", "sandbox", "score", "seconds",
        "thought", "valid")     # is shown of a step

# Files may come from others. Each entry that is used has a form here, and no other entry has an effect.
LOG = {f"{name}?": maybe(NUMBER)
       for name in (*CURVES, *SHARES, "iteration", "step", "updates", "seconds", "runs", "sampled_tokens")}
PAIR = "two numbers", lambda value: isinstance(value, list) and len(value) == 2 and all(map(NUMBER[1], value))
TRAJECTORY = {
    "ended": WORD, **dict.fromkeys((*FINAL, "oracle"), maybe(NUMBER)),
    **dict.fromkeys(("k", "steps", "valid", "worse", "taken_back", "better", "continued"), COUNT)}
WORK = {"seconds": NUMBER, **dict.fromkeys(("scripts", "nodes", "buggy", "unreviewed", "unprinted"), COUNT)}
FIGURE = "a number or null, and an interval", lambda value: (
    isinstance(value, list) and len(value) == 2 and (value[0] is None or NUMBER[1](value[0])))
TASK = {
    "metric": WORD, "direction": one_of("up", "down"), "split": WORD, "miniature": FLAG, "starter": NUMBER,
    "m_best": NUMBER, "printed": maybe(NUMBER), "seconds": NUMBER, "published": {str: PAIR},
    "trajectories?": [TRAJECTORY], "work?": WORK, "figures?": {str: {"gap": FIGURE}}}
RESULTS = {
    "complete": FLAG, "final": one_of(*FINAL), "versions": {str: TEXT}, "tasks": {str: TASK},
    "disclosure?": FORM, "settings": {
        "model": TEXT, "coder?": TEXT, "steps": COUNT, "seconds?": NUMBER, "scaffold?": TEXT,
        "search?": one_of(*SEARCHES), str: VALUE}}


def read_results(folder):
    """Returns what results.json in a folder of eval.py says, None where there is none. ValueError: it says something
    that eval.py does not write."""
    path = Path(folder, "results.json")
    content = read_bytes(path)
    if content is None:
        return None
    results = parse_json(content, RESULTS, path)
    for task in results["tasks"]:
        if not re.fullmatch(r"[\w.-]{1,100}", task, re.ASCII):
            raise ValueError(f"{path}: {shorten(ascii(task), 80)} is no task")
    return results


def read_log(folder):
    """Returns the entries of LOG in a training run's log.jsonl. Of a line that is there twice, since the run was killed
    and went on, the last counts."""
    lines = read_json_lines(Path(folder, "log.jsonl"), LOG)
    lines = {line.get("iteration", line.get("step")): line for line in lines}.values()
    return [{name: line[name] for name in (entry.removesuffix("?") for entry in LOG) if name in line} for line in lines]


def for_browsers(value):
    """Returns a value as JSON that every browser reads: long texts are cut, and NaN and infinities become texts."""
    if isinstance(value, dict):
        return {for_browsers(name): for_browsers(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_browsers(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return shorten(value, LONGEST_TEXT) if isinstance(value, str) else value


def write_page(path, data):
    """Writes the template beside this file with `data` in it as JSON, of which its script draws everything. data: see
    eval.write_report."""
    template = Path(__file__).with_suffix(".html").read_text()
    hashes = {}
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    text = json.dumps(for_browsers({**data, "curves": CURVES}), ensure_ascii=False)
    parts = {
        "title": html.escape(data["title"]),
        # a browser runs what we wrote, and nothing that might have got in
        "policy": f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
                  "base-uri 'none'; form-action 'none'",
        "data": text.replace("<", "\\u003c")}
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    write_atomic(path, page.encode("utf-8", "replace"))     # half a surrogate pair is no character
