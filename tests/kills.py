"""Kills a training of several processes at random moments, half of them while it saves, starts it again each time by
the same command, and compares it with one that was left alone: figures of every step, and the model's bytes.

    python tests/kills.py --program sft --processes 2 --kills 5 --seed 0
    python tests/kills.py --program rl --advantage rloo     # other flags are the program's
"""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import torch                                            # noqa: E402
import env, rl, sft                                     # noqa: E402, E401, F401
import test_rl_run, test_train                          # noqa: E402, E401
from support import sandbox                             # noqa: E402
from forks import begin                                 # noqa: E402

CLOCK = test_rl_run.FREE | {"tokens_s"}     # figures that depend on the clock, on memory, or on what the cache knows
PREPARE = {
    "sft": """
import sys, test_train as t
from pathlib import Path
folder = Path(sys.argv[1])
t.conversations(folder / "own.jsonl")
t.Qwen2.from_scratch(t.SMALL).save_pretrained(folder / "model")
t.Tokenizer.of_bytes().save(folder / "model")
""",
    "rl": """
import sys, tasks, test_rl_run
from pathlib import Path
tasks.FOLDERS[:] = [Path(sys.argv[1], "tasks")]
test_rl_run.make(Path(sys.argv[1]))
"""}
RUN = {
    "sft": "import sys, sft\nfrom support import cli\ncli.run_main(lambda: sft.main(sys.argv[2:]))",
    "rl": "import sys, rl, tasks\nfrom pathlib import Path\ntasks.FOLDERS.append(Path(sys.argv[1], 'tasks'))\n"
          "from support import cli\ncli.run_main(lambda: rl.main(sys.argv[2:]))"}


def flags_of(program, folder, steps):
    """The command's flags but --out."""
    flags = {"model": folder / "model", "save-every": 2}
    if program == "sft":
        flags |= {"trajectories": folder / "own.jsonl", "updates": steps, "batch": 4, "lr": 1e-3}
    else:
        flags |= {"trajectories": folder / "pool", "data": folder / "data", "task": "toy-a", "iterations": steps,
                  "preset": "7b", "states": 4, "samples": 2, "max-new-tokens": 8,
                  "context": 1000, "lr": 3e-3, "critic-lr": 1e-3, "kl": 0.1}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def statuses(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def lines_of(out):
    """The lines of a log without what depends on the clock."""
    log = Path(out, "log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def parts(out):
    """What is half written or half deleted there now, also by an earlier kill."""
    found = set()
    for path in Path(out, "checkpoints").glob("*.part"):
        try:
            found.add((path, path.stat().st_ino))
        except FileNotFoundError:
            pass
    return found


def kill(children, out, rng, seconds):
    """Kills the group of processes: around a save, or somewhere in one of its next steps, which take about so many
    seconds each. Says where."""
    before = len(lines_of(out))
    left = parts(out)
    wanted = rng.randint(0, 2)
    what = rng.choice(["save", "step"])
    pause = rng.uniform(0, 0.02) if what == "save" else rng.uniform(0, seconds)
    while True:
        assert os.waitpid(children[0], os.WNOHANG) == (0, 0), "it ended before it was killed"
        new = len(lines_of(out)) - before if Path(out, "log.jsonl").exists() else 0
        if new >= wanted and (what == "step" or parts(out) - left):
            break
        time.sleep(0.001)
    time.sleep(pause)
    os.killpg(children[0], signal.SIGKILL)
    assert set(statuses(children)) == {-signal.SIGKILL}
    where = "while it saved" if parts(out) - left else "in a step"
    return f"{where}, {len(lines_of(out)) - before} steps after its start"


def check(program, processes, kills, seed, more, folder, log=print):
    """more: flags of the program. AssertionError where a run that is killed so often is not the one left alone."""
    steps = 3 * kills + 4
    rng = random.Random(f"{program} {processes} {seed}")
    assert statuses(begin(PREPARE[program], ["-c", str(folder)], 1, f"{folder}/prepare")) == [0]

    def start(out):
        argv = ["-c", str(folder), *flags_of(program, folder, steps), "--out", str(folder / out), *more]
        start.num = getattr(start, "num", 0) + 1
        return begin(RUN[program], argv, processes, f"{folder}/{out}-{start.num}")

    began = time.monotonic()
    assert set(statuses(start("whole"))) == {0}, Path(f"{folder}/whole-1-0").read_text()
    seconds = (time.monotonic() - began) / steps
    for number in range(kills):
        log(f"  kill {number + 1}: {kill(start('torn'), folder / 'torn', rng, seconds)}")
    children = start("torn")
    assert set(statuses(children)) == {0}, Path(f"{folder}/torn-{start.num}-0").read_text()
    name = "step" if program == "sft" else "iteration"
    whole = lines_of(folder / "whole")
    torn = lines_of(folder / "torn")
    figures = {line[name]: line for line in whole}
    assert len(whole) == len(figures) == steps and {line[name] for line in torn} == set(figures)
    for line in torn:       # those of a step that was done again are all of them equal
        assert line == figures[line[name]], (line, figures[line[name]])
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / "whole" / file).read_bytes() == (folder / "torn" / file).read_bytes(), file
    assert not parts(folder / "torn"), "a part of a checkpoint is left"
    log(f"{' '.join([f'{program}.py', *more])}, {processes} processes, {kills} kills, seed {seed}: {steps} steps, of "
        f"which {len(torn) - steps} were done again; figures and weights are bit for bit those of a run left alone")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", choices=("sft", "rl"), default="sft")
    for name, default in (("processes", 2), ("kills", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    s, more = parser.parse_known_args()
    torch.set_num_threads(1)
    sandbox.describe(sys.executable)
    sandbox.protection()
    sandbox._servers.clear()        # each process has its own
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        check(s.program, s.processes, s.kills, s.seed, more, Path(folder))


if __name__ == "__main__":
    main()
