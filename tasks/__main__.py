"""The command line of the tasks.

    python -m tasks list [ID ...]
    python -m tasks prepare ID [--raw DIR] [--variant NAME] [--force]      without --raw: a miniature made from a seed
    python -m tasks grade ID submission.csv
    python -m tasks check [ID ...] [--ideas]

ID may also be held-in, held-out, paper or all (with prepare only where no --raw is given, and not with grade).
Exit status: 0 done, 1 failed, 2 bad arguments, a raw folder with other files among them.
"""
import argparse
import sys
from pathlib import Path

import pandas as pd

import tasks
from support.cli import run_main
from tasks.check import check, check_ideas


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tasks", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (run_list, run_prepare, run_grade, run_check):
        command = commands.add_parser(run.__name__.removeprefix("run_"), description=run.__doc__, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument("--data", default="data", help="folder of the prepared tasks (default: data)")
        command.add_argument("ids", metavar="ID", nargs="*" if run in (run_list, run_check) else 1, default=["all"])
        if run in (run_prepare, run_check):
            command.add_argument("--python", default=sys.executable, help="interpreter that runs the starters")
        if run is run_prepare:
            command.add_argument("--raw", help="folder with the publisher's files as they come (default: a miniature)")
            command.add_argument("--variant", help="which of the task's splits (default: the one there, or its first)")
            command.add_argument("--force", action="store_true", help="prepare again what is prepared already")
        if run is run_check:
            command.add_argument("--ideas", action="store_true", help="run each task's ideas instead")
        if run is run_grade:
            command.add_argument("file")
    args = parser.parse_args(argv)
    try:
        ids = [id for which in args.ids for id in tasks.names(which)]
        if len(ids) > 1 and (args.run is run_grade or getattr(args, "raw", None)):
            raise ValueError("This needs one task.")
        return args.run(args, ids)
    except tasks.InvalidSubmission as error:
        print(f"The submission is not valid. {error}", file=sys.stderr)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except (RuntimeError, OSError, MemoryError) as error:
        print(error, file=sys.stderr)
    return 1


def run_list(args, ids):
    """A row of figures a task, then what to get and where the figures come from.

    aim: whether the metric should go up or down. m_init is our starter's score on the real data, m_best the best known
    one, gold Kaggle's; ML-Agent is its average in the paper's Table 1. "-": not measured, or not in that table.
    """
    rows = []
    sources = []
    for task in map(tasks.load, ids):
        rows.append({"task": task.id, "split": task.split, "metric": task.metric, "aim": task.direction,
                     "m_init": task.m_init, "m_best": task.m_best, "gold": task.gold,
                     "ML-Agent": task.published.get("ML-Agent", [None])[0]})
        sources.append(f"\n{task.id} ({prepared(task.id, args.data)}) follows {task.source}. "
                       f"m_best: {task.m_best_source}.\n    Get {task.download}, {task.size}.")
    print_table(rows)
    print("\n".join(sources))
    return 0


def run_prepare(args, ids):
    """Turns the publisher's files into public data, private answers and task.json; without --raw, a miniature."""
    if args.raw and not Path(args.raw).is_dir():
        raise ValueError(f"There is no folder {args.raw}; --raw is the folder of the publisher's files.")
    for id in ids:
        home = tasks.prepare(id, args.raw, args.data, args.variant, args.force, python=args.python)
        print(f"{id}: {prepared(id, args.data)} in {home}")
    return 0


def run_grade(args, ids):
    """Prints the score of a submission, or why it is not valid."""
    [id] = ids
    facts = tasks.info(id, args.data)
    score = tasks.grade(id, args.file, args.data)
    print(f"{id} ({prepared(id, args.data)}): {tasks.load(id).metric} {score:.6g} "
          f"(the starter has {facts['m_init']:.6g}, the best known is {facts['m_best']:.6g})")
    return 0


def run_check(args, ids):
    """Proves the tasks in --data sound; where one is not there, or its miniature is stale, the miniature is made."""
    rows = []
    failures = []
    for id in ids:
        print(f"checking {id}", file=sys.stderr, flush=True)
        try:
            tasks.prepare(id, data=args.data, log=lambda line: None, python=args.python)
            figures, faults = (check_ideas if args.ideas else check)(id, args.data, args.python)
        except (ValueError, RuntimeError, OSError) as error:
            failures.append(f"{id}: {error}")
            continue
        rows.append({"task": id, "data": prepared(id, args.data), **figures, "failures": len(faults)})
        failures += [f"{id}: {fault}" for fault in faults]
    if rows:
        print_table(rows)
    print("\n".join(failures or [f"All {len(rows)} are sound."]))
    return 1 if failures else 0


def prepared(id, data):
    """Which data of a task are prepared, in words."""
    if not (Path(data) / id / "task.json").exists():
        return "not prepared"
    try:
        facts = tasks.info(id, data)
    except ValueError:
        return "damaged: delete its folder and prepare it again"
    return "miniature" if facts["miniature"] else f"real, {facts['variant']}"


def print_table(rows):
    """Prints the rows, dicts of which the first value is a name, with aligned columns; floats with five digits."""
    print(pd.DataFrame(rows).to_string(index=False, na_rep="-", float_format="{:.5g}".format))


if __name__ == "__main__":
    run_main(main)
