"""The command line of the tasks:

    python -m tasks list
    python -m tasks prepare ID [--raw DIR] [--variant NAME] [--force]      without --raw: a miniature made up from a seed
    python -m tasks grade ID submission.csv
    python -m tasks check [ID ...]
ID may also be held-in, held-out, paper or all, where no --raw is given. Exit status: 0 done, 1 failed, 2 bad arguments.
"""
import argparse, difflib, sys, tempfile
from pathlib import Path

import tasks
from tasks.check import check


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = {name: commands.add_parser(name) for name in ("list", "prepare", "grade", "check")}
    for command in one.values():
        command.add_argument("--data", default="data", help="folder of the prepared tasks (default: data)")
    one["prepare"].add_argument("id")
    one["prepare"].add_argument("--raw", help="folder with the publisher's files as they come; without it a miniature is made")
    one["prepare"].add_argument("--variant", help="which of the task's splits (default: its first)")
    one["prepare"].add_argument("--seed", type=int, default=0, help="of the miniature (default: 0)")
    one["prepare"].add_argument("--force", action="store_true", help="prepare again what is prepared already")
    one["grade"].add_argument("id")
    one["grade"].add_argument("file")
    one["check"].add_argument("ids", nargs="*", default=["all"], metavar="ID")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], [flag for action in one[args.command]._actions for flag in action.option_strings], n=2)
        one[args.command].error(f"unknown argument {unknown[0]}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    try:
        ids = [id for which in getattr(args, "ids", [getattr(args, "id", "all")]) for id in tasks.names(which)]
    except ValueError as error:
        one[args.command].error(str(error))
    try:
        return {"list": run_list, "prepare": run_prepare, "grade": run_grade, "check": run_check}[args.command](args, ids)
    except tasks.InvalidSubmission as error:
        print(f"The submission is not valid. {error}", file=sys.stderr)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
    return 1


def run_list(args, ids):
    """One row a task. Published figures are the averages of Table 1: the weakest of its models, then ML-Agent."""
    rows = []
    for task in map(tasks.load, ids):
        state = "-"
        if (Path(args.data) / task.id / "task.json").exists():
            facts = tasks.info(task.id, args.data)
            state = "miniature" if facts["miniature"] else f"real, {facts['variant']}"
        rows.append({"task": task.id, "modality": task.modality, "metric": task.metric, "better": task.direction, "split": task.split, "follows": task.source,
                     "m_init": task.m_init, "m_best": task.m_best, "m_best from": task.m_best_source, "weakest": task.weakest(),
                     "ML-Agent": task.published.get("ML-Agent", [None])[0], "gold/silver/bronze": "/".join(f"{task.medals[m]:g}" for m in list(task.medals)[:3]) or None,
                     "prepared": state, "size": task.size, "download": task.download})
    print_table(rows)
    return 0


def run_prepare(args, ids):
    if args.raw is not None and len(ids) > 1:
        raise ValueError("--raw is the folder of one task; name that task.")
    for id in ids:
        home = tasks.prepare(id, raw=args.raw, data=args.data, variant=args.variant, force=args.force, seed=args.seed)
        facts = tasks.info(id, args.data)
        print(f"{id}: {'MINIATURE, scores do not compare with published ones' if facts['miniature'] else 'real data'}, variant {facts['variant']}, in {home}: "
              + ", ".join(f"{name} {rows} rows" for name, rows in facts["rows"].items()))
    return 0


def run_grade(args, ids):
    if len(ids) > 1:
        raise ValueError("grade needs one task.")
    task, facts = tasks.load(ids[0]), tasks.info(ids[0], args.data)
    score = tasks.grade(task.id, args.file, args.data)
    print(f"{task.id}{' (miniature)' if facts['miniature'] else ''}: {task.metric} {score:.6g}   starter {facts['m_init']:.6g}, best known {facts['m_best']:.6g}")
    return 0


def run_check(args, ids):
    """Checks the miniature of every task, in a temporary folder where it is not prepared in --data, and real data where they are prepared."""
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        for id in ids:
            prepared = (Path(args.data) / id / "task.json").exists()
            places = [args.data] if prepared else []
            if not prepared or not tasks.info(id, args.data)["miniature"]:
                tasks.prepare(id, data=folder, say=lambda line: None)
                places.insert(0, folder)
            for place in places:
                row, failed = check(id, place)
                rows.append(row)
                failures += [f"{id} ({row['data']}): {failure}" for failure in failed]
                if sys.stderr.isatty():
                    print(f"checked {id} ({row['data']}): {row['verdict']}", file=sys.stderr)
    print_table(rows)
    print("\n".join(failures) or f"All {len(rows)} are sound.")
    return 1 if failures else 0


def print_table(rows):
    """Prints dicts with the same keys as aligned columns; numbers to the right, None as "-"."""
    cells = [list(rows[0])] + [["-" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    right = [isinstance(value, (int, float)) for value in rows[0].values()]
    for line in cells:
        print("  ".join(text.rjust(width) if r else text.ljust(width) for text, width, r in zip(line, widths, right)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
