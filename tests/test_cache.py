"""What the environment keeps of runs: its cache of results, its blobs, and what full disks and clocks do to them."""

import contextlib, ctypes, json, os, subprocess, sys, tempfile, textwrap, time
from pathlib import Path

import pytest

import env
import tasks
from support import sandbox
from test_env import make, put, run, task  # noqa: F401  (fixtures)
from test_execute import wait_until
from support.storage import ResultCache

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="scripts can be executed on Linux only")


# ------------------------------------------------------------------------------------------------------ what is kept

def entries(trajectory):
    return [path for path in trajectory.cache.folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("outcome, code, limit, warm, runs", [
    ("timeout", -9, "cpu", True, 1), ("timeout", -9, "cpu", False, 2), ("timeout", -9, "wall", True, 2),
    ("timeout", 0, "wall", True, 2), ("out of memory", -9, "memory", True, 1), ("out of memory", -9, "", True, 2),
    ("out of memory", 1, "", True, 1), ("killed", -11, "", True, 2), ("too many processes", -9, "processes", True, 1)])
def test_only_an_end_that_comes_again_is_kept(make, monkeypatch, outcome, code, limit, warm, runs):
    """Not one by wall time, by imports that a warm script does not make, or because the machine had no memory."""
    trajectory = make()
    sandbox.protection()        # is found out by running a script
    ended = sandbox.Result(outcome, code, "", "", 1.0, 1, "off", "It ended.", warm=warm, limit=limit)
    monkeypatch.setattr(env, "execute", lambda *args, **more: ended)
    assert trajectory.score()[1].outcome == trajectory.score()[1].outcome == outcome
    assert trajectory.cache.counts["runs"] == runs


def test_that_a_gpu_had_no_memory_is_not_kept():
    """Another process may have had it."""
    ended = sandbox.Result("out of memory", 1, "", "", 1.0, 1, "off", "It ended.", warm=True)
    assert sandbox.comes_again(ended, None) and not sandbox.comes_again(ended, "0")


@pytest.mark.parametrize("keep", [0, 10, 65, 200, -1])
def test_half_an_entry_is_none(make, keep):
    trajectory = make()
    first = trajectory.score()
    path, = entries(trajectory)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert trajectory.cache.get(path.name) is None
    again = trajectory.score()
    assert again[0] == first[0] == 0.5 and trajectory.cache.counts["runs"] == 2
    assert trajectory.cache.get(path.name) and trajectory.score()[0] == 0.5 and trajectory.cache.counts["runs"] == 2


def test_an_entry_whose_files_are_gone_is_none(make):
    trajectory = make()
    run(trajectory)
    trajectory.blobs.path(trajectory.files["submission.csv"]).unlink()
    del trajectory.files["submission.csv"]
    step = run(trajectory)
    assert step.score == 0.5 and trajectory.cache.counts["runs"] == 2
    assert trajectory.blobs.path(step.snapshot["submission.csv"])


def test_what_a_run_depends_on_is_in_its_key(make, task, monkeypatch):
    trajectory = make()
    keys = {trajectory._key("train.py", {"train.py": "1"})}
    for change in (lambda: setattr(task, "time_limit_s", 0.5), lambda: setattr(task, "memory_limit_bytes", 2 << 30),
                   lambda: setattr(trajectory, "threads", 2), lambda: setattr(trajectory, "gpu", "0"),
                   lambda: setattr(trajectory, "sandbox", "off"),
                   lambda: trajectory.info.update(sha256={"public/train.csv": "2"}),
                   lambda: monkeypatch.setattr(env, "describe", lambda python: ("", (), ["3.99"])),
                   lambda: setattr(trajectory, "graders", "other")):
        change()
        keys.add(trajectory._key("train.py", {"train.py": "1"}))
    keys |= {trajectory._key("train.py", {"train.py": "2"}), trajectory._key("b.py", {"train.py": "1"})}
    assert len(keys) == 11


def test_the_tasks_own_grader_is_in_the_key(make, task):
    keys = set()
    for text in ("1", "2"):
        (task.folder / "task.py").write_text(text)
        keys.add(make()._key("train.py", {}))
    assert len(keys) == 2


def test_writers_that_are_killed_leave_whole_entries(tmp_path):
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(env.__file__).parent)!r})
        from env import ResultCache
        cache = ResultCache({str(tmp_path)!r})
        print(flush=True)
        while True:
            for key in ("aa1", "aa2"):
                cache.put(key, {{"score": 1, "filler": "x" * 300_000}})
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    cache = ResultCache(tmp_path)
    seen = 0
    for writer in writers:
        writer.stdout.readline()
    assert wait_until(lambda: cache.get("aa1") and cache.get("aa2"))
    end = time.monotonic() + 1
    while time.monotonic() < end:
        seen += cache.get("aa1") is not None
    for writer in writers:
        writer.kill()
        writer.wait()
    assert seen and cache.get("aa1")["score"] == cache.get("aa2")["score"] == 1


# --------------------------------------------------------------------------------------------------------------- faults

def test_full_file_system(make, tmp_path, monkeypatch):
    """The workspace lies on a tmpfs of 1 MiB, mounted in a mount namespace of a process that we fork."""
    small = tmp_path / "small"
    trajectory = make()
    small.mkdir()
    put(trajectory, train="print('begun')\nwith open('model.bin', 'wb') as file: file.write(b'x' * (4 << 20))")
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            libc = ctypes.CDLL(None, use_errno=True)
            uid = os.getuid()
            gid = os.getgid()
            assert libc.unshare(0x20000 | 0x10000000) == 0, "unshare"
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                Path(f"/proc/self/{name}").write_text(text)
            assert libc.mount(b"tmpfs", str(small).encode(), b"tmpfs", 0, b"size=1m") == 0, "mount"
            sandbox._servers.clear()    # they see the file tree without it
            tempfile.tempdir = str(small)
            step = run(trajectory)
            (tmp_path / "step").write_text(json.dumps([step.outcome, step.kind, step.reward, step.observation,
                                                       sorted(step.snapshot), os.listdir(small)]))
        os._exit(0)
    os.waitpid(child, 0)
    outcome, kind, reward, observation, files, left = json.loads((tmp_path / "step").read_text())
    assert (outcome, kind, reward, files, left) == ("disk full", "limit", 0.5, ["train.py"], [])
    assert "begun" in observation and "OSError: [Errno 28] No space left on device Write less to disk." in observation


def test_full_disk_of_ours_is_an_error_and_leaves_nothing_half(tmp_path):
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(env.__file__).parent)!r})
        from env import Blobs, ResultCache
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        FOLDER = {str(tmp_path)!r}
        for write, what in ((Blobs(FOLDER).put, [b"x" * 5000]), (ResultCache(FOLDER).put, ["aa1", "x" * 5000])):
            try:
                write(*what)
            except OSError as error:
                print(error.errno)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.split() == ["27", "27"] and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_clock_that_jumps_changes_nothing(make, monkeypatch):
    trajectory = make(seconds=100)
    now = iter([0, 1e12, -1e12] * 100_000)
    monkeypatch.setattr(time, "time", lambda: next(now))
    step = run(trajectory)
    assert step.outcome == "ok" and 0 < step.script_seconds < 60 and 0 < step.time_left_s <= 100 and not step.ended
