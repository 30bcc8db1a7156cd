"""Lets `pytest` from the root import the top-level modules, and keeps torch from fighting over two cores."""
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the scripts that tests start
os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run on the CPU; read when triton is first imported
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

from forks import Forks  # noqa: E402

torch.set_num_threads(1)

# A shell starts background jobs with Ctrl-C ignored, and children would inherit that; some tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Runs code in processes of its own; see forks.Forks."""
    found = Forks(tmp_path_factory.mktemp("forks"))
    yield found
    found.close()
