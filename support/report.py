"""Reads what is left of runs, and writes the page that shows them: one HTML file that needs no network."""
import base64, hashlib, html, json, math, re
from pathlib import Path

import tasks
from reward import KINDS, best_of
from support import tables
from support.aide import SEARCHES
from support.disclosure import FINAL, FORM, notes, warnings
from support.files import (
    COUNT, FLAG, NUMBER, TEXT, VALUE, WORD, check_form, maybe, one_of, parse_json, read_bytes, read_json_lines,
    refuse_links_out, shorten, write_atomic)
from support.records import TASK_ID, end_reason, read_record, steps_of, trajectory_files

LONGEST_TEXT = 20_000       # characters of one text on the page
CURVES = {      # entry of a training log -> heading of its figure
    "reward": "mean reward", "reward_edits": "mean reward of edits that ran", "valid": "valid replies, share",
    "kl": "divergence from the first model, nats a token", "entropy": "entropy, nats a token",
    "cache_hits": "runs known already, share", "loss": "training loss", "valid_loss": "validation loss"}
SHARES = {f"share_{kind.replace(' ', '_')}": kind for kind in KINDS}      # entry of a log of rl.py -> its words
TAKEN = {"seconds": "seconds", "scripts": "runs", "tokens": "sampled_tokens"}   # of training: entry of its log.jsonl
STEP = ("action", "args", "coder", "detail", "ended", "fields", "kind", "m_after", "m_before", "no_reply", "node",
        "observation", "outcome", "printed", "reply", "reward", "sandbox", "score", "seconds",
        "thought", "valid")     # is shown of a step

# Files may come from others. Each entry that is used has a form here, and no other entry has an effect.
LOG = {f"{name}?": maybe(NUMBER)
       for name in (*CURVES, *SHARES, "iteration", "step", "updates", "seconds", "runs", "sampled_tokens")}
PAIR = "two numbers", lambda value: isinstance(value, list) and len(value) == 2 and all(map(NUMBER[1], value))
TRAJECTORY = {
    "ended": WORD, **dict.fromkeys((*FINAL, "oracle"), maybe(NUMBER)),
    **dict.fromkeys(("k", *sum(tables.HABITS.values(), ())), COUNT)}
WORK = {"seconds": NUMBER, **dict.fromkeys(("scripts", "nodes", "buggy", "unreviewed", "unprinted"), COUNT)}
TASK = {
    "metric": WORD, "direction": one_of("up", "down"), "split": WORD, "miniature": FLAG, "starter": NUMBER,
    "m_best": NUMBER, "printed": maybe(NUMBER), "seconds": NUMBER, "published": {str: PAIR},
    "trajectories?": [TRAJECTORY], "work?": WORK}
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
    check_form(list(results["tasks"]), [TASK_ID], f"{path}, its tasks")
    return results


def read_log(folder):
    """Returns the entries of LOG in a training run's log.jsonl. Of a line that is there twice, since the run was killed
    and went on, the last counts."""
    lines = read_json_lines(Path(folder, "log.jsonl"), LOG)
    lines = {line.get("iteration", line.get("step")): line for line in lines}.values()
    return [{name: line[name] for name in (entry.removesuffix("?") for entry in LOG) if name in line} for line in lines]


def find_exports(run):
    """Returns the exports in a folder of rl.py, in the order of the iterations. ValueError: there are none."""
    folders = sorted(path.parent for path in Path(run, "exports").glob("??????/config.json"))
    if not folders:
        raise ValueError(f"--exports: {run} holds no exports; rl.py --export-every N makes them")
    return folders


def read_exports(run):
    """Returns [(folder, {name: value} of what it took to train)] of the exports in a folder of rl.py. ValueError: the
    log does not tell."""
    lines = {line.get("iteration"): line for line in read_log(run)}
    found = []
    for folder in find_exports(run):
        iteration = int(folder.name)
        try:
            before = [lines[i] for i in range(1, iteration + 1)]
            sums = {name: sum(line[entry] for line in before) for name, entry in TAKEN.items()}
            updates = before[-1]["updates"] if before else 0
        except (KeyError, TypeError):
            raise ValueError(f"{run}/log.jsonl does not tell what each iteration up to {iteration} took") from None
        found.append((folder, {"run": run, "iteration": iteration, "updates": updates, **sums}))
    return found


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
        about = results["tasks"].get(task, {})
        if results.get("complete") and int(k) not in {each["k"] for each in about.get("trajectories", ())}:
            continue        # of an earlier, longer run: no table counts it
        direction = about.get("direction") or tasks.load(task).direction
        starter = lines[0]["m_init"]
        score = tables.summarize_trajectory(lines, direction, starter, about.get("printed"))[results["final"]]
        if not end_reason(lines):
            outcome = "unfinished"
        elif score is None:
            outcome = "failed"
        else:
            outcome = "not better" if best_of(direction, score, starter) == starter else "better"
        trajectories.append({
            "task": task, "k": int(k), "miniature": lines[0]["miniature"], "starter": starter, "score": score,
            "outcome": outcome, "steps": [{name: step.get(name) for name in STEP} for step in steps_of(lines)]})
    return {"name": name, "results": results, "trajectories": trajectories}


def write_report(path, folders, trained, reference="", exports=None):
    """Writes the page of folders of eval.py, {name: folder}, and of folders where something was trained, and returns
    the runs that its tables show. exports: see tables.build_series; exports.json beside the page then receives the
    series."""
    runs = [read_run(folder, name) for name, folder in folders.items()]
    # the trajectories of all exports are too many for a page
    shown = [{"name": run["name"], "trajectories": [] if exports else run["trajectories"]} for run in runs]
    series = tables.build_series(runs, exports) if exports else []
    if exports:
        write_atomic(Path(path).with_name("exports.json"), {"complete": len(series) == len(exports), "exports": series})
    agents = [run for run in runs if run["results"]["settings"].get("model")] or runs
    write_page(path, {
        "title": f"ML-Agent: {', '.join(folders)}", "warnings": warnings(runs), "notes": notes(runs),
        "tables": tables.build_tables(agents, reference), "runs": shown, "exports": series,
        "logs": [{"name": folder, "lines": read_log(folder)} for folder in trained]})
    return agents


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
    write_report."""
    template = Path(__file__).with_suffix(".html").read_text()
    hashes = {}
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    text = json.dumps(for_browsers({**data, "curves": CURVES, "shares": SHARES}), ensure_ascii=False)
    parts = {
        "title": html.escape(data["title"]),
        # a browser runs what we wrote, and nothing that might have got in
        "policy": f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
                  "base-uri 'none'; form-action 'none'",
        "data": text.replace("<", "\\u003c")}
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    write_atomic(path, page.encode("utf-8", "replace"))     # half a surrogate pair is no character
