"""Jobs in threads, and their progress."""
import json, sys, threading, time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from tqdm import tqdm


class Progress:
    """What the threads of one run share: they write their lines here, and are stopped here."""

    def __init__(self, records, num_steps):
        """records: {path: its lines so far} of every trajectory, each of at most num_steps."""
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.start = time.monotonic()
        self.num_steps = num_steps
        self.tokens = 0
        self.over = {path for path, lines in records.items() if lines and lines[-1].get("ended")}
        self.steps = {path: sum(line["type"] == "step" for line in lines) for path, lines in records.items()}
        self.steps_before = sum(self.steps.values())

    def write(self, path, line):
        """Appends a line to a trajectory's file, unless all was stopped: each line is whole, and none follows."""
        with self.lock:
            if self.stop.is_set():
                return
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.steps[path] += line["type"] == "step"
            self.tokens += line.get("tokens") or 0
            if line.get("ended"):
                self.over.add(path)

    def line(self):
        """Returns the progress in one line. The total supposes that an open trajectory takes all its steps."""
        with self.lock:
            steps = sum(self.steps.values())
            total = sum(n if path in self.over else self.num_steps for path, n in self.steps.items())
            seconds = time.monotonic() - self.start
            postfix = f"{len(self.over)}/{len(self.steps)} trajectories"
            if self.tokens:     # an endpoint does not tell them
                postfix += f", {self.tokens / seconds:.1f} tokens/s"
        return tqdm.format_meter(steps, total, seconds, initial=self.steps_before, unit="step", postfix=postfix,
                                 ncols=0).strip()


def run_parallel(jobs, work, parallel, run=None):
    """Returns [work(*job) for each job], so many at a time. The first error stops all and is raised. run: a Progress,
    whose line is shown: rewritten in place in a terminal, now and then in a log."""
    is_terminal = sys.stderr.isatty()
    pause = 0.5 if is_terminal else 30.0
    failed = threading.Event()
    threads = ThreadPoolExecutor(parallel)
    futures = [threads.submit(run_job, work, job, failed) for job in jobs]
    running = set(futures)
    try:
        while running:
            finished, running = wait(running, pause, FIRST_EXCEPTION)
            for future in finished:
                future.result()
            if run and running:
                show(run.line(), is_terminal)
    finally:
        if run:
            with run.lock:      # not in the middle of a line
                run.stop.set()
            show(run.line() + ("\n" if is_terminal else ""), is_terminal)
        threads.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


def run_job(work, job, failed):
    """Does a job, unless another has failed: its thread must not begin the next one before the main thread hears."""
    if failed.is_set():
        return None
    try:
        return work(*job)
    except BaseException:
        failed.set()
        raise


def show(line, is_terminal):
    if is_terminal:
        print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)
