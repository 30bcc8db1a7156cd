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
import tempfile
import textwrap
from pathlib import Path

import tasks
from support.cli import format_table
from tasks.check import check, check_ideas


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tasks", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (run_list, run_prepare, run_grade, run_check):
        command = commands.add_parser(run.__name__.removeprefix("run_"), description=run.__doc__, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument("--data", default="data", help="folder of the prepared tasks (default: data)")
        if run in (run_prepare, run_grade):
            command.add_argument("ids", metavar="ID", nargs=1)
        else:
            command.add_argument("ids", metavar="ID", nargs="*", default=["all"])
        if run in (run_prepare, run_check):
            command.add_argument("--python", default=sys.executable, help="interpreter that runs the starters")
        if run is run_prepare:
            command.add_argument("--raw", help="folder with the publisher's files as they come; without it: a miniature")
            command.add_argument("--variant", help="which of the task's splits (default: the one there, or its first)")
            command.add_argument("--seed", type=int, default=0, help="of the miniature (default: 0)")
            command.add_argument("--force", action="store_true", help="prepare again what is prepared already")
        if run is run_grade:
            command.add_argument("file")
        if run is run_check:
            command.add_argument("--ideas", action="store_true", help="run each task's ideas on its miniature instead")
    args = parser.parse_args(argv)
    try:
        try:
            ids = [id for which in args.ids for id in tasks.names(which)]
        except ValueError as error:
            parser.error(str(error))
        if len(ids) > 1 and (args.run is run_grade or getattr(args, "raw", None)):
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


def run_list(args, ids):
    """A row of figures a task, then what to get and where the figures come from, a paragraph each.

    aim: whether the metric should go up or down. m_init is our starter's score on the real data, m_best the best known
    one; ML-Agent is its average in the paper's Table 1. "-": not measured, or not in that table.
    """
    chosen = [tasks.load(id) for id in ids]
    rows = [["task", "split", "metric", "aim", "m_init", "m_best", "ML-Agent"]]
    rows += [[task.id, task.split, task.metric, task.direction, task.m_init, task.m_best,
              task.published.get("ML-Agent", [None])[0]] for task in chosen]
    print_table(rows)
    for task in chosen:
        medals = "/".join(f"{task.medals[name]:g}" for name in ("gold", "silver", "bronze") if name in task.medals)
        scores = ", ".join(f"{model} {average:g}/{best:g}" for model, (average, best) in task.published.items())
        text = (f"{task.id} ({prepared(task.id, args.data) or 'not prepared'}): get {task.download}, {task.size}. "
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
        rows = ", ".join(f"{name} {count}" for name, count in facts["rows"].items())
        print(f"{id}: {prepared(id, args.data)}{warning} in {home}; rows: {rows}")
    return 0


def run_grade(args, ids):
    """Prints the score of a submission, or why it is not valid."""
    task = tasks.load(ids[0])
    facts = tasks.info(task.id, args.data)
    score = tasks.grade(task.id, args.file, args.data)
    print(f"{task.id} ({prepared(task.id, args.data)}): {task.metric} {score:.6g} "
          f"(the starter has {facts['m_init']:.6g}, the best known is {facts['m_best']:.6g})")
    for name, value in tasks.also(task.id, args.file, args.data).items():
        print(f"{name} {value:.6g}")
    return 0


def run_check(args, ids):
    """Proves tasks sound: always the miniature, made aside where --data has none or a stale one; and the real data
    prepared in --data."""
    rows = []
    failures = []
    for id in ids:
        with tempfile.TemporaryDirectory() as aside:
            try:
                for folder in folders_to_check(id, args, aside):
                    row, faults = (check_ideas if args.ideas else check)(id, folder, args.python)
                    rows.append({"task": id, "data": prepared(id, folder), **row, "failures": len(faults)})
                    failures += [f"{id} ({prepared(id, folder)}): {fault}" for fault in faults]
            except (ValueError, RuntimeError, ModuleNotFoundError) as error:
                failures.append(f"{id}: {error}")
        print(f"{id}: checked", file=sys.stderr, flush=True)
    if rows:
        print_table([list(rows[0]), *(row.values() for row in rows)])
    print("\n".join(failures or [f"All {len(rows)} are sound."]))
    return 1 if failures else 0


def folders_to_check(id, args, aside):
    """The folders that hold the task's miniature and, where ideas are not run, its real data."""
    there = prepared(id, args.data)
    if there == "miniature" and tasks.info(id, args.data)["code"] == tasks.hash_code(tasks.load(id)):
        return [args.data]
    tasks.prepare(id, data=aside, say=lambda line: None, python=args.python)
    return [aside, args.data] if there not in (None, "miniature") and not args.ideas else [aside]


def prepared(id, data):
    """What data of a task are prepared: "miniature", or "real" and which split, or None."""
    if not (Path(data) / id / "task.json").exists():
        return None
    facts = tasks.info(id, data)
    return "miniature" if facts["miniature"] else f"real, {facts['variant']}"


def print_table(rows):
    """Prints rows of cells, floats with five digits and None as "-"."""
    texts = []
    for row in rows:
        cells = [f"{cell:.5g}" if isinstance(cell, float) else str(cell) for cell in row]
        texts.append(["-" if cell == "None" else cell for cell in cells])
    print(format_table(texts))


if __name__ == "__main__":
    sys.exit(main())
