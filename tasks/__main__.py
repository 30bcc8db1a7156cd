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
    parser = argparse.ArgumentParser(prog="python -m tasks", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(dest="command", required=True)
    commands = {"list": run_list, "prepare": run_prepare, "grade": run_grade, "check": run_check}
    at = {name: parsers.add_parser(name, description=run.__doc__, allow_abbrev=False) for name, run in commands.items()}
    for one in at.values():
        one.add_argument("--data", default="data", help="folder of the prepared tasks (default: data)")
    for one in (at["prepare"], at["grade"]):
        one.add_argument("ids", metavar="ID", nargs=1)
    at["prepare"].add_argument("--raw", help="folder with the publisher's files as they come; without it: a miniature")
    at["prepare"].add_argument("--variant", help="which of the task's splits (default: the one there, or its first)")
    at["prepare"].add_argument("--seed", type=int, default=0, help="of the miniature (default: 0)")
    at["prepare"].add_argument("--force", action="store_true", help="prepare again what is prepared already")
    at["grade"].add_argument("file")
    for one in (at["list"], at["check"]):
        one.add_argument("ids", metavar="ID", nargs="*", default=["all"])
    at["check"].add_argument("--ideas", action="store_true", help="run each task's ideas on its miniature instead")
    at["check"].add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                             help="tasks checked at a time (default: the number of cores)")
    for one in (at["prepare"], at["check"]):
        one.add_argument("--python", default=sys.executable, help="interpreter that runs the starters")
    args, unknown = parser.parse_known_args(argv)
    one = at[args.command]
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], one._option_string_actions, n=2)
        one.error(f"unknown argument {unknown[0]}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    try:
        try:
            ids = [id for which in args.ids for id in tasks.names(which)]
        except ValueError as error:
            one.error(str(error))
        if len(ids) > 1 and (args.command == "grade" or getattr(args, "raw", None)):
            one.error("this needs one task")
        return commands[args.command](args, ids)
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


def run_list(args, ids):
    """A row of figures a task, then what to get and where the figures come from, a paragraph each.

    aim: whether the metric should go up or down. m_init is our starter's score on the real data, m_best the best known
    one; the weakest and ML-Agent are averages of the paper's Table 1. "-": not measured, or not in that table.
    """
    chosen = [tasks.load(id) for id in ids]
    figures = {"m_init": ">8", "m_best": ">7", "weakest": ">7", "ML-Agent": ">8"}
    for split in ("held-in", "held-out"):
        rows = [{split: task.id, "modality": task.modality, "metric": task.metric, "aim": task.direction,
                 "m_init": task.m_init, "m_best": task.m_best, "weakest": task.weakest(),
                 "ML-Agent": task.published["ML-Agent"][0] if task.published else None}
                for task in chosen if task.split == split]
        if rows:
            width = max(map(len, ids))
            print_table({split: f"<{width}", "modality": "<8", "metric": "<19", "aim": "<4", **figures}, rows)
            print()
    for task in chosen:
        prepared = (Path(args.data) / task.id / "task.json").exists()
        state = kind(tasks.info(task.id, args.data)) if prepared else "not prepared"
        medals = "/".join(f"{task.medals[name]:g}" for name in ("gold", "silver", "bronze") if name in task.medals)
        medals += f" ({task.medals_metric})" if task.medals_metric else ""
        published = ", ".join(f"{model} {average:g}/{best:g}" for model, (average, best) in task.published.items())
        facts = [f"{task.id} ({state}): get {task.download}, {task.size}.", f"Follows {task.source}.",
                 f"m_best: {task.m_best_source}.", f"Gold/silver/bronze: {medals}." if medals else "",
                 f"Table 1, average/best of 8: {published}." if published else ""]
        print(textwrap.fill(" ".join(filter(None, facts)), 120, subsequent_indent="    ", break_on_hyphens=False))
    return 0


def run_prepare(args, ids):
    """Turns the publisher's files into public data, private answers and task.json; without --raw, a miniature."""
    for id in ids:
        home = tasks.prepare(id, args.raw, args.data, args.variant, args.force, args.seed, python=args.python)
        facts = tasks.info(id, args.data)
        warning = " (scores do not compare with published ones)" if facts["miniature"] else ""
        print(f"{id}: {kind(facts)}{warning} in {home}")
        for name, rows in facts["rows"].items():
            print(f"    {name}: {rows} rows")
    return 0


def run_grade(args, ids):
    """Prints the score of a submission, or why it is not valid; and whether it was made with the private answers."""
    task, facts = tasks.load(ids[0]), tasks.info(ids[0], args.data)
    score, canary_p = tasks.judge(task.id, args.file, args.data)
    print(f"{task.id} ({kind(facts)}): {task.metric} {score:.6g} "
          f"(the starter has {facts['m_init']:.6g}, the best known is {facts['m_best']:.6g})")
    if tasks.flagged(canary_p):
        print("FLAGGED: it holds answers that were planted among the private ones, which no honest submission has "
              f"(p = {canary_p:.1g}). The score is not to be trusted.")
    further = tasks.also(task.id, args.file, args.data) if task.also else {}
    for name, value in further.items():
        print(f"{name} {value:.6g}")
    return 0


def run_check(args, ids):
    """Proves tasks sound: always the miniature, made aside where --data has none or a stale one; and the real data
    prepared in --data."""
    kinds = [kind(tasks.info(id, args.data)) for id in ids if (Path(args.data) / id / "task.json").exists()]
    columns = {"task": f"<{max(map(len, ids))}", "data": f"<{max(map(len, ['miniature', *kinds]))}",
               **(IDEA_COLUMNS if args.ideas else CHECK_COLUMNS)}
    num_rows, failures = 0, []
    known = []

    def results():
        jobs = min(args.jobs, len(ids))
        if jobs <= 1:
            for id in ids:
                yield id, check_one(id, args.data, args.python, args.ideas)
            return
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)      # of one starter: more would fight over the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        with ProcessPoolExecutor(jobs) as pool:
            runs = {pool.submit(check_one, id, args.data, args.python, args.ideas): id for id in ids}
            for run in as_completed(runs):
                yield runs[run], run.result()

    def rows():
        nonlocal num_rows
        for id, checked in results():
            for row, failed in checked:
                failures.extend(f"{id} ({row['data']}): {failure}" for failure in failed)
                known.extend(f"{id} ({row['data']}), known: {one}" for one in row.get("known", []))
                num_rows += 1
                yield row
    print_table(columns, rows())
    print("".join(f"{line}\n" for line in known), end="")
    print("\n".join(failures) or f"All {num_rows} are sound.")
    return 1 if failures else 0


def check_one(id, data, python, ideas):
    """[(row, failures)] of checking one task: its miniature, and unless ideas are run its real data in `data` too."""
    checked = []
    with tempfile.TemporaryDirectory() as aside:
        try:
            facts = tasks.info(id, data) if (Path(data) / id / "task.json").exists() else None
            if facts and facts["miniature"] and facts["code"] == tasks.hash_code(tasks.load(id)):
                places = [data]
            else:               # none there, a stale one, or real data
                tasks.prepare(id, data=aside, say=lambda line: None, python=python)
                places = [aside, data] if facts and not facts["miniature"] and not ideas else [aside]
            for place in places:
                row, failed = (check_ideas if ideas else check)(id, place, python)
                checked.append(({**row, "data": kind(tasks.info(id, place))}, failed))
        except (ValueError, RuntimeError, ModuleNotFoundError) as error:
            lacks = f". {tasks.INSTALL}" if isinstance(error, ModuleNotFoundError) else ""
            checked.append(({"task": id, "data": "-", "verdict": "FAILED"}, [f"{error}{lacks}"]))
    return checked


def kind(facts):
    """What data a prepared task holds: "miniature", or "real" and which split."""
    return "miniature" if facts["miniature"] else f"real, {facts['variant']}"


def print_table(columns, rows):
    """Prints a line for each row, a dict, as soon as it comes. columns: {name: format such as "<8" or ">8"}."""
    print("  ".join(format(name, align) for name, align in columns.items()).rstrip())
    for row in rows:
        cells = {name: "-" if row.get(name) is None else row[name] for name in columns}
        texts = {name: f"{cell:.5g}" if isinstance(cell, float) else str(cell) for name, cell in cells.items()}
        print("  ".join(format(texts[name], align) for name, align in columns.items()).rstrip(), flush=True)


CHECK_COLUMNS = {"train": ">7", "test": ">7", **dict.fromkeys(["sample", "shuffled", "starter", "m_best"], ">8"),
                 "seconds": ">7", "verdict": "<7"}
IDEA_COLUMNS = {"starter": ">8", "best": ">8", **dict.fromkeys(["better", "same", "worse"], ">6"), "seconds": ">7",
                "verdict": "<7", "best idea": ""}


if __name__ == "__main__":
    sys.exit(main())
