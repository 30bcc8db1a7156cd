"""The command line of the tasks.

    python -m tasks list [ID ...]
    python -m tasks prepare ID [--raw DIR] [--variant NAME] [--force]      without --raw: a miniature made from a seed
    python -m tasks grade ID submission.csv
    python -m tasks check [ID ...] [--ideas] [--jobs N]

ID may also be held-in, held-out, paper or all (with prepare only where no --raw is given, and not with grade).
Exit status: 0 done, 1 failed, 2 bad arguments, a raw folder with other files among them.
"""
import argparse
import difflib
import os
import sys
import tempfile
import textwrap
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import tasks
from tasks.check import check, check_ideas


def main(argv=None):
    parsers = build_parsers()
    args, unknown = parsers[None].parse_known_args(argv)
    parser = parsers[args.command]
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    try:
        try:
            ids = [id for which in args.ids for id in tasks.names(which)]
        except ValueError as error:
            parser.error(str(error))
        if len(ids) > 1 and (args.command == "grade" or getattr(args, "raw", None)):
            parser.error("this needs one task")
        return args.run(args, ids)
    except tasks.InvalidSubmission as error:
        print(f"The submission is not valid. {error}", file=sys.stderr)
    except tasks.MissingRaw as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"The module {error.name} is missing. {tasks.INSTALL}", file=sys.stderr)
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
    return 1


def build_parsers():
    """{command: its parser}, and under None the parser of all."""
    main_parser = argparse.ArgumentParser(prog="python -m tasks", description=__doc__, allow_abbrev=False,
                                          formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main_parser.add_subparsers(dest="command", required=True)
    parsers = {None: main_parser}
    for name, run in {"list": run_list, "prepare": run_prepare, "grade": run_grade, "check": run_check}.items():
        parser = parsers[name] = commands.add_parser(name, description=run.__doc__, allow_abbrev=False)
        parser.set_defaults(run=run)
        parser.add_argument("--data", default="data", help="folder of the prepared tasks (default: data)")
        if name in ("prepare", "grade"):
            parser.add_argument("ids", metavar="ID", nargs=1)
        else:
            parser.add_argument("ids", metavar="ID", nargs="*", default=["all"])
        if name in ("prepare", "check"):
            parser.add_argument("--python", default=sys.executable, help="interpreter that runs the starters")
    add = parsers["prepare"].add_argument
    add("--raw", help="folder with the publisher's files as they come; without it: a miniature")
    add("--variant", help="which of the task's splits (default: the one there, or its first)")
    add("--seed", type=int, default=0, help="of the miniature (default: 0)")
    add("--force", action="store_true", help="prepare again what is prepared already")
    parsers["grade"].add_argument("file")
    add = parsers["check"].add_argument
    add("--ideas", action="store_true", help="run each task's ideas on its miniature instead")
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="tasks checked at a time (default: the number of cores)")
    return parsers


def run_list(args, ids):
    """A row of figures a task, then what to get and where the figures come from, a paragraph each.

    aim: whether the metric should go up or down. m_init is our starter's score on the real data, m_best the best known
    one; the weakest and ML-Agent are averages of the paper's Table 1. "-": not measured, or not in that table.
    """
    chosen = [tasks.load(id) for id in ids]
    for split in ("held-in", "held-out"):
        rows = [[split, "modality", "metric", "aim", "m_init", "m_best", "weakest", "ML-Agent"]]
        rows += [[task.id, task.modality, task.metric, task.direction, task.m_init, task.m_best, task.weakest(),
                  task.published.get("ML-Agent", [None])[0]] for task in chosen if task.split == split]
        if len(rows) > 1:
            print(tasks.format_table(rows, num_left=4), end="\n\n")
    for task in chosen:
        medals = "/".join(f"{task.medals[name]:g}" for name in ("gold", "silver", "bronze") if name in task.medals)
        scores = ", ".join(f"{model} {average:g}/{best:g}" for model, (average, best) in task.published.items())
        text = (f"{task.id} ({kind(task.id, args.data) or 'not prepared'}): get {task.download}, {task.size}. "
                f"Follows {task.source}. m_best: {task.m_best_source}.")
        if medals:
            text += f" Gold/silver/bronze, {task.medals_metric or task.metric}: {medals}."
        if scores:
            text += f" Table 1, average/best of 8: {scores}."
        print(textwrap.fill(text, 120, subsequent_indent="    ", break_on_hyphens=False))
    return 0


def run_prepare(args, ids):
    """Turns the publisher's files into public data, private answers and task.json; without --raw, a miniature."""
    for id in ids:
        home = tasks.prepare(id, args.raw, args.data, args.variant, args.force, args.seed, python=args.python)
        facts = tasks.info(id, args.data)
        warning = " (scores do not compare with published ones)" if facts["miniature"] else ""
        print(f"{id}: {kind(id, args.data)}{warning} in {home}")
        for name, rows in facts["rows"].items():
            print(f"    {name}: {rows} rows")
    return 0


def run_grade(args, ids):
    """Prints the score of a submission, or why it is not valid."""
    task = tasks.load(ids[0])
    facts = tasks.info(task.id, args.data)
    score = tasks.grade(task.id, args.file, args.data)
    print(f"{task.id} ({kind(task.id, args.data)}): {task.metric} {score:.6g} "
          f"(the starter has {facts['m_init']:.6g}, the best known is {facts['m_best']:.6g})")
    for name, value in tasks.also(task.id, args.file, args.data).items():
        print(f"{name} {value:.6g}")
    return 0


def run_check(args, ids):
    """Proves tasks sound: always the miniature, made aside where --data has none or a stale one; and the real data
    prepared in --data."""
    num_jobs = max(1, min(args.jobs, len(ids)))
    threads = max(1, len(os.sched_getaffinity(0)) // num_jobs)      # of the proofs: more would fight over the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    rows = []
    known = []
    failures = []
    for id, checked in check_all(ids, num_jobs, args.data, args.python, args.ideas):
        for data, row, faults in checked:
            name = f"{id} ({data})"
            known += [f"{name}, known: {sentence}" for sentence in row.pop("known", [])]
            failures += [f"{name}: {sentence}" for sentence in faults]
            rows.append({"task": id, "data": data, **row, "verdict": "FAILED" if faults else "ok"})
            print(f"{len(rows)}. {name}: {rows[-1]['verdict']}", file=sys.stderr, flush=True)
    columns = max(rows, key=len)
    print(tasks.format_table([list(columns), *([row.get(name) for name in columns] for row in rows)]))
    print("\n".join(known + (failures or [f"All {len(rows)} are sound."])))
    return 1 if failures else 0


def check_all(ids, num_jobs, *options):
    """Yields (id, what check_one returns) for each task as it is done."""
    if num_jobs == 1:
        for id in ids:
            yield id, check_one(id, *options)
        return
    with ProcessPoolExecutor(num_jobs) as pool:
        runs = {pool.submit(check_one, id, *options): id for id in ids}
        for run in as_completed(runs):
            yield runs[run], run.result()


def check_one(id, data, python, ideas):
    """[(which data, row, failures)] of checking one task: its miniature, and unless ideas are run its real data in
    `data` too."""
    proofs = check_ideas if ideas else check
    checked = []
    with tempfile.TemporaryDirectory() as aside:
        try:
            there = kind(id, data)
            if there == "miniature" and tasks.info(id, data)["code"] == tasks.hash_code(tasks.load(id)):
                folders = [data]
            else:
                tasks.prepare(id, data=aside, say=lambda line: None, python=python)
                folders = [aside, data] if there not in (None, "miniature") and not ideas else [aside]
            for folder in folders:
                checked.append((kind(id, folder), *proofs(id, folder, python)))
        except ModuleNotFoundError as error:
            checked.append(("-", {}, [f"{error}. {tasks.INSTALL}"]))
        except (ValueError, RuntimeError) as error:
            checked.append(("-", {}, [str(error)]))
    return checked


def kind(id, data):
    """What data of a task are prepared: "miniature", or "real" and which split, or None."""
    if not (Path(data) / id / "task.json").exists():
        return None
    facts = tasks.info(id, data)
    return "miniature" if facts["miniature"] else f"real, {facts['variant']}"


if __name__ == "__main__":
    sys.exit(main())
