"""Lets `pytest` from the root import the top-level modules, and keeps torch from fighting over two cores."""
import dataclasses
import functools
import os
import shutil
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the scripts that tests start
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run on the CPU; read when triton is first imported

import tasks  # noqa: E402
from forks import Forks, known_peak  # noqa: E402
from support import logs  # noqa: E402

torch.set_num_threads(1)

# A shell starts background jobs with Ctrl-C ignored, and children would inherit that; some tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)


RUN = ["home-data-for-ml-course", "spaceship-titanic", "leaf-classification"]    # tasks whose starters are run once
SHARE = os.environ.get("ML_AGENT_SHARE")    # a folder; the runs of pytest that were given the same divide the files


def part_of(item):
    """What is not divided: a file, or those that need `data`, which takes long to draw."""
    return "data" if item.path.name.startswith(("test_sandbox", "test_tasks")) else item.path.stem


@functools.cache
def is_ours(part):
    """Whether this run of pytest is the first that comes to a part."""
    try:
        Path(SHARE, part).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def pytest_collection_modifyitems(items):
    """The longest part comes first, so that the runs end together."""
    if SHARE:
        items.sort(key=lambda item: part_of(item) != "data")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """What another run has begun is passed over; True: nothing more is to be done with it."""
    return True if SHARE and not is_ours(part_of(item)) else None


@pytest.fixture(scope="session", autouse=True)
def measured_peak():
    """logs.peak_flops as it is; the runs of other tests are told what it would find, since on a CPU without products in
    bf16 it takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        measured = logs.peak_flops
        patch.setattr(logs, "peak_flops", known_peak)
        yield measured


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Runs code in processes of its own; see forks.Forks."""
    found = Forks(tmp_path_factory.mktemp("forks"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder with all miniatures, in place of most starters' scores 0.5; beside them, in `raw`, what each was
    prepared from."""
    folder = tmp_path_factory.mktemp("data")
    run = tasks.run_starter
    load = tasks.load

    def load_to_keep(id):
        task = load(id)

        def miniature(raw, seed):
            task.miniature(raw, seed)
            shutil.copytree(raw, folder / "raw" / id)
        return dataclasses.replace(task, miniature=miniature)

    def run_or_not(task, *args):
        return run(task, *args) if task.id in RUN else (0.5, 0.0, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "run_starter", run_or_not)
        patch.setattr(tasks, "load", load_to_keep)
        for id in tasks.names():
            tasks.prepare(id, data=folder, log=lambda line: None)
    return folder
