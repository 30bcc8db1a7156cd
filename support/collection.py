"""The manifest of a folder of collected trajectories: how their agent acted, on which data and ideas, and counts."""
from collections import Counter
from pathlib import Path

import tasks
from support.cli import flag_of, format_table
from support.distributed import check_same
from support.files import FLAG, TEXT, VALUE, hash_json, parse_json, read_bytes
from support.play import read_agent
from support.pretrained import hash_checkpoint
from support.records import AGENT, AGENT_FORMAT, end_reason, read_record, steps_of

SAME = ("expert", "coder", *AGENT, "ideas", "max_new_tokens", "temperature", "context", "threads", "gpu", "sandbox",
        "seed")     # what trajectories of a folder agree in
IDEA_FORM = {"title": TEXT, "instruction": TEXT, "edits?": [{"find": TEXT, "replace": TEXT}]}
MANIFEST = {"settings": {str: VALUE}, "tasks": {str: {"data": TEXT, "miniature": FLAG, "ideas?": [IDEA_FORM]}},
            "complete?": FLAG}
COUNTS = ("trajectories", "steps", "valid", "rose")     # rose: trajectories whose last score is better than the first


def read_manifest(folder):
    """Returns what manifest.json in a folder of trajectories holds; None: there is no such file or folder."""
    path = Path(folder, "manifest.json")
    raw = read_bytes(path) if path.parent.is_dir() else None
    return parse_json(raw, MANIFEST, path) if raw else None


def open_manifest(cfg, infos):
    """Returns what manifest.json of the folder holds, with an entry for each task. ValueError: the folder is of other
    settings, another expert or other data."""
    settings = {flag_of(name): getattr(cfg, name) for name in SAME}
    settings |= {flag_of(name): list(getattr(cfg, name)) for name in ("actions", "fields")}      # as JSON has them
    if Path(cfg.expert).is_dir():       # a model that was trained anew in the same folder is another model
        settings["--expert of sha256"] = hash_checkpoint(cfg.expert)
    manifest = read_manifest(cfg.trajectories) or {"settings": settings, "tasks": {}}
    check_same(manifest["settings"], settings, cfg.trajectories, "--trajectories")
    for id in infos:
        hashes = [info["sha256"] for info in infos[id]]
        entry = {"data": hash_json(hashes)[:16], "miniature": infos[id][0]["miniature"]}
        if id not in manifest["tasks"] and files_of(cfg.trajectories, id):
            raise ValueError(f"manifest.json does not tell of {id}, of which {cfg.trajectories} has trajectories; "
                             "delete them, or give another --trajectories")
        manifest["tasks"].setdefault(id, entry)
        check_same(manifest["tasks"][id], entry, f"{cfg.trajectories}, {id},", "--trajectories")
    return manifest


def files_of(folder, id):
    """Returns the files of a task's trajectories, not those of one whose id begins alike."""
    return [path for path in Path(folder).glob(f"{id}-*.jsonl") if path.stem.rpartition("-")[0] == id]


def count_trajectories(manifest, folder):
    """Writes into a manifest the counts of each task's finished trajectories, and whether all that were begun are."""
    manifest["complete"] = True
    for id, entry in manifest["tasks"].items():
        counts = Counter(dict.fromkeys(COUNTS, 0))
        for path in files_of(folder, id):
            records = read_record(path)
            if not end_reason(records):
                manifest["complete"] = False
                continue
            scores = [line["m_after"] for line in records if "m_after" in line]
            steps = steps_of(records)
            counts.update(trajectories=1, steps=len(steps), valid=sum(step["valid"] for step in steps),
                          rose=int(tasks.load(id).better(scores[-1], scores[0])))
        entry["counts"] = dict(counts)


def report(manifest):
    """Returns the counts of a manifest as text."""
    rows = [("task", "data", *COUNTS)]
    for id, entry in manifest["tasks"].items():
        data = "miniature" if entry["miniature"] else "real"
        rows.append((id, data, *(str(entry["counts"][name]) for name in COUNTS)))
    return format_table(rows)


def collected_format(cfg):
    """Returns {setting: value} of how the agent of the trajectories acted, but for its number of steps. ValueError:
    their prompts are of another form than --prompt-format."""
    manifest = read_manifest(cfg.trajectories)
    settings = manifest["settings"] if manifest else {}
    found = settings.get("--prompt-format", cfg.prompt_format)
    if found != cfg.prompt_format:
        raise ValueError(f"{cfg.trajectories} was collected with --prompt-format {found}, found "
                         f"{cfg.prompt_format} here; give the same, or other --trajectories")
    learned = {}
    for name in (AGENT_FORMAT.keys() & AGENT) - {"steps"}:
        value = settings.get(flag_of(name))
        if value is not None:
            learned[name] = tuple(value) if isinstance(value, list) else value      # as a program's settings have it
    return learned


def agent_of(cfg, learned, folder):
    """Returns how the agent of a fine-tuned model acts, for its agent.json. learned: see collected_format. folder: of
    the model that training began with, or None."""
    agent = read_agent(folder) if folder else {}
    if cfg.prompt_format != "full":
        agent = {name: getattr(cfg, name) for name in AGENT_FORMAT}
    elif learned and agent.get("prompt_format") != "full":      # its lengths are of other prompts
        agent = {}
    return agent | learned


def is_collected(path):
    """Returns whether there is something to train on: a file, or a folder whose collection was not broken off."""
    manifest = read_manifest(path)
    if manifest is None:
        return path.is_file() or any(path.glob("*.jsonl"))
    return manifest.get("complete", False)
