"""Jobs in threads, and their progress."""
import json, sys, threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from tqdm import tqdm


class Progress:
    """What the threads of one run share: they write their lines here, and are stopped here."""

    def __init__(self, records, num_steps):
        """records: {path: its lines so far} of every trajectory, each of at most num_steps."""
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.num_steps = num_steps
        self.num_tokens = 0
        self.steps = {path: sum(line["type"] == "step" for line in lines) for path, lines in records.items()}
        self.over = {path for path, lines in records.items() if lines and lines[-1].get("ended")}
        self.bar = tqdm(total=self.total(), initial=sum(self.steps.values()), unit="step", ncols=0, miniters=1,
                        mininterval=0.5 if sys.stderr.isatty() else 30.0)
        self.count(0)

    def total(self):
        """Returns the number of steps, supposing that an open trajectory takes all its steps."""
        return sum(number if path in self.over else self.num_steps for path, number in self.steps.items())

    def write(self, path, line):
        """Appends a line to a trajectory's file, unless all was stopped: each line is whole, and none follows."""
        with self.lock:
            if self.stop.is_set():
                return
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            is_step = line["type"] == "step"
            self.steps[path] += is_step
            self.num_tokens += line.get("tokens") or 0
            if line.get("ended"):
                self.over.add(path)
            self.count(is_step)

    def count(self, num_new):
        self.bar.total = self.total()
        postfix = f"{len(self.over)}/{len(self.steps)} trajectories"
        elapsed = self.bar.format_dict["elapsed"]       # 0 under TQDM_DISABLE
        if self.num_tokens and elapsed:     # not every server tells them
            postfix += f", {self.num_tokens / elapsed:.1f} tokens/s"
        self.bar.set_postfix_str(postfix, refresh=False)
        self.bar.update(num_new)

    def close(self):
        """Stops all threads, not in the middle of a line."""
        with self.lock:
            self.stop.set()
            self.bar.close()


def run_parallel(jobs, work, parallel, progress=None):
    """Returns [work(*job) for each job], so many at a time. The first error stops all, also a Progress, and is
    raised."""
    failed = threading.Event()

    def run(job):
        if failed.is_set():     # else this thread might begin another job before the main thread hears of the error
            return None
        try:
            return work(*job)
        except BaseException:
            failed.set()
            raise

    threads = ThreadPoolExecutor(parallel)
    futures = [threads.submit(run, job) for job in jobs]
    try:
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        if progress:
            progress.close()
        threads.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]
