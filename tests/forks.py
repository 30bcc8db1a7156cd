"""The processes that tests start, each a fork of one interpreter that has imported what they need: to import torch for
every one of them would take longer than most of them run. This file is also that interpreter's program."""
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def known_peak(device, dtype, threads=None):
    """In place of logs.peak_flops, which would measure it at the start of each run."""
    return 1e12


class Forks:
    """Runs Python code in processes of its own; `folder` holds what they say."""

    def __init__(self, folder):
        self.folder = folder
        self.num = 0
        path = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.driver = subprocess.Popen([sys.executable, __file__], env={**os.environ, **path}, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, code, *argv, world=1):
        """`code` runs in `world` processes that are joined as torchrun joins them, but by a file: a port that was free
        when it was looked for may be taken when it is needed. It knows its rank, and `argv` as sys.argv[1:]."""
        self.num += 1
        print(json.dumps([code, ["-c", *map(str, argv)], world, f"{self.folder}/{self.num}"]), file=self.driver.stdin,
              flush=True)

    def end(self):
        """[(exit status, output)] of the processes of the last run."""
        codes = json.loads(self.driver.stdout.readline())
        return [(code, Path(f"{self.folder}/{self.num}-{rank}").read_text()) for rank, code in enumerate(codes)]

    def __call__(self, code, *argv, world=1):
        """Runs them all to a good end: what they said."""
        self.start(code, *argv, world=world)
        done = self.end()
        assert not any(status for status, _ in done), "\n".join(
            f"---- process {rank} of {world}, exit status {status}\n{said}" for rank, (status, said) in enumerate(done))
        return "".join(said for _, said in done)

    def close(self):
        self.driver.stdin.close()
        self.driver.wait(600)


def be_one(code, argv, rank, world, name, first):
    """In the process itself. first: the process of rank 0, 0 for that."""
    import torch
    os.setpgid(0, first)
    log = os.open(f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, target)
    sys.argv = argv
    status = 1
    try:
        if world > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
            torch.distributed.init_process_group("gloo", init_method=f"file://{name}-store", rank=rank,
                                                 world_size=world, timeout=timedelta(minutes=10))
        exec(code, {"rank": rank})
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def begin(code, argv, world, name):
    """Forks the processes: their ids. They are one group, which has the first one's."""
    children = []
    for rank in range(world):
        children.append(os.fork())
        if not children[-1]:
            be_one(code, argv, rank, world, name, children[0])
        os.setpgid(children[-1], children[0])       # whichever of the two is first
    return children


if __name__ == "__main__":
    import pytest, torch                            # noqa: E401, F401
    import env, eval, rl, sample, sft, tasks        # noqa: E401, F401
    from support import logs, sandbox
    torch.set_num_threads(1)
    logs.peak_flops = known_peak
    sandbox.describe(sys.executable)
    sandbox.protection()            # asked once for all
    sandbox._servers.clear()        # each has its own
    for line in sys.stdin:
        code, argv, world, name = json.loads(line)
        children = begin(code, argv, world, name)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
