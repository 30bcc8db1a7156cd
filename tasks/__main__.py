"""The command line of the tasks.

    python -m tasks list
    python -m tasks prepare ID [--raw DIR] [--variant NAME] [--force]      without --raw: a miniature made from a seed
    python -m tasks grade ID submission.csv
    python -m tasks check [ID ...]

ID may also be held-in, held-out, paper or all (with prepare only where no --raw is given, and not with grade).
Exit status: 0 done, 1 failed, 2 bad arguments.
"""
import argparse
import difflib
import sys
import tempfile
from pathlib import Path

import tasks
from tasks.check import check


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
    at["check"].add_argument("ids", metavar="ID", nargs="*", default=["all"])
    for one in (at["prepare"], at["check"]):
        one.add_argument("--python", default=sys.executable, help="interpreter that runs the starters")
    args, unknown = parser.parse_known_args(argv)
    one = at[args.command]
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], one._option_string_actions, n=2)
        one.error(f"unknown argument {unknown[0]}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    try:
        ids = [id for which in getattr(args, "ids", ["all"]) for id in tasks.names(which)]
    except ValueError as error:
        one.error(str(error))
    if len(ids) > 1 and (args.command == "grade" or getattr(args, "raw", None)):
        one.error("this needs one task")
    try:
        return commands[args.command](args, ids)
    except tasks.InvalidSubmission as error:
        print(f"The submission is not valid. {error}", file=sys.stderr)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
    return 1


def run_list(args, ids):
    """One row a task. The weakest and ML-Agent are averages of the paper's Table 1; m_init is our starter's score."""
    rows = []
    for task in map(tasks.load, ids):
        prepared = (Path(args.data) / task.id / "task.json").exists()
        medals = "/".join(f"{task.medals[name]:g}" for name in ("gold", "silver", "bronze") if name in task.medals)
        rows.append({
            "task": task.id, "modality": task.modality, "metric": task.metric, "better": task.direction,
            "split": task.split, "follows": task.source, "m_init": task.m_init, "m_best": task.m_best,
            "m_best from": task.m_best_source, "weakest": task.weakest(),
            "ML-Agent": task.published["ML-Agent"][0] if task.published else None, "gold/silver/bronze": medals or None,
            "prepared": kind(tasks.info(task.id, args.data)) if prepared else None,
            "size": task.size, "download": task.download})
    print_table(rows)
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
    """Prints the score of a submission, or why it is not valid."""
    task, facts = tasks.load(ids[0]), tasks.info(ids[0], args.data)
    score = tasks.grade(task.id, args.file, args.data)
    print(f"{task.id} ({kind(facts)}): {task.metric} {score:.6g} "
          f"(the starter has {facts['m_init']:.6g}, the best known is {facts['m_best']:.6g})")
    return 0


def run_check(args, ids):
    """Proves tasks sound: always the miniature, made aside where --data lacks it; and real data prepared in --data."""
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as aside:
        for id in ids:
            places = [args.data] if (Path(args.data) / id / "task.json").exists() else []
            if not places or not tasks.info(id, args.data)["miniature"]:
                tasks.prepare(id, data=aside, say=lambda line: None, python=args.python)
                places.insert(0, aside)
            for place in places:
                row, failed = check(id, place, args.python)
                rows.append(row)
                failures += [f"{id} ({row['data']}): {failure}" for failure in failed]
                tasks.progress(ids.index(id) + 1, len(ids), "tasks checked")
    print_table(rows)
    print("\n".join(failures) or f"All {len(rows)} are sound.")
    return 1 if failures else 0


def kind(facts):
    """What data a prepared task holds: "miniature", or "real" and which split."""
    return "miniature" if facts["miniature"] else f"real, {facts['variant']}"


def print_table(rows):
    """Prints dicts with the same keys as aligned columns, numbers to the right, None as "-"."""
    names = list(rows[0])
    cells = [[f"{value:.5g}" if isinstance(value, float) else "-" if value is None else str(value)
              for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells)]
    right = [any(isinstance(row[name], (int, float)) for row in rows) for name in names]
    for line in [names, *cells]:
        print("  ".join(f"{text:>{w}}" if r else f"{text:<{w}}" for text, w, r in zip(line, widths, right)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
