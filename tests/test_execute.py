"""The executor: one test a promise. Linux only, like the executor."""

import contextlib, ctypes, os, re, resource, signal, subprocess, sys, tempfile, textwrap, threading, time, uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from env import OUTCOMES
from support import sandbox as executor
from support.sandbox import execute
from reward import KINDS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="scripts can be executed on Linux only")
ROOT = Path(__file__).parent.parent
DAEMON = """
import os, signal, sys, time
def daemon():
    "Starts a process that leaves session and group, ignores every polite signal, and keeps writing."
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
        os.closerange(0, 3)
        while True:
            with open("pulse", "a") as file:
                file.write(f"{os.getpid()}\\n")
            time.sleep(0.01)
    while not os.path.exists("pulse") or os.path.getsize("pulse") == 0:
        time.sleep(0.01)
"""


def has_pulse(folder):
    return (folder / "pulse").exists() and (folder / "pulse").stat().st_size > 0


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Temporary folders of the runs are made here, so that a test sees what is left of them."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(params=["on", "off", "on, warm", "off, warm"])
def sandbox(request, monkeypatch):
    """For promises that have to hold without the sandbox too; they are kept by other means then."""
    mode, _, warm = request.param.partition(", ")

    def run_so(script, folder, **options):
        if warm:
            with open(folder / script, "a") as file:
                file.write("\n# numpy")
            assert warm_up(b"numpy", threads=options.get("threads", 1))
        result = executor.execute(script, folder, sandbox=mode, **options)
        assert result.warm == bool(warm) or "supervisor" in result.detail
        return result
    monkeypatch.setattr(sys.modules[__name__], "execute", run_so)
    return mode


def warm_up(text, python=None, threads=1, serial=False):
    """Starts the warm process for scripts of that text and waits until it is up; False if it does not work."""
    program = executor.describe(python or sys.executable)[0]
    return executor._warm_server(program, text, threads, serial, True) is not None


def alter_supervisor(monkeypatch, folder, code):
    """The servers are started anew, and run this code before their program."""
    program = folder / "supervisor.py"
    main = 'if __name__ == "__main__":'
    text = Path(executor.SUPERVISOR).read_text()
    assert text.count(main) == 1
    program.write_text(text.replace(main, f"{code}\n{main}"))
    monkeypatch.setattr(executor, "SUPERVISOR", str(program))
    monkeypatch.setattr(executor, "_servers", {})       # their processes end when it is collected


def run(folder, text, timeout_s=600, memory_bytes=1 << 30, **options):
    """Runs a script of that text under a name nothing else has; after every run no process of it may be left."""
    name = f"script_{uuid.uuid4().hex}.py"
    (folder / name).write_text(textwrap.dedent(text))
    result = execute(name, folder, timeout_s=timeout_s, memory_bytes=memory_bytes, **options)
    assert result.outcome in OUTCOMES
    assert result.sandbox in ("off", "namespaces+landlock+seccomp", "namespaces+seccomp", "landlock+seccomp")
    assert processes(name) == []
    return result


def run_to_limit(folder, text, has_begun, timeout_s, **options):
    """Runs a script up to its time limit. One that has not begun by then, as on a busy machine, gets longer."""
    while not has_begun(result := run(folder, text, timeout_s=timeout_s, **options)) and timeout_s < 60:
        timeout_s *= 11
    return result


def processes(word):
    """The ids of living processes with that word in their command line."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if word.encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.append(int(entry))
        except OSError:
            continue
    return found


def living(pids):
    """Those of the processes that can still do something: not gone, and not a zombie that waits to be counted."""
    found = []
    for pid in set(pids):
        try:
            found += [pid] if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX" else []
        except OSError:
            continue
    return found


def parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def wait_until(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def becomes_empty(folder):
    """Whether a folder does: what takes longer than a moment is deleted in a thread."""
    return wait_until(lambda: not any(folder.iterdir()))


def test_every_outcome_leads_to_one_reward_kind():
    assert {kind for kind, _ in OUTCOMES.values()} == {"scored", "failed", "limit"} < set(KINDS)


def test_both_streams_exit_code_and_figures(tmp_path):
    result = run(tmp_path, "import sys, time; print('out'); print('err', file=sys.stderr); time.sleep(0.2)")
    assert (result.outcome, result.exit_code, result.stdout, result.stderr) == ("ok", 0, "out\n", "err\n")
    assert 0.2 <= result.seconds < 600 and 1 << 20 < result.peak_bytes < 1 << 28


def test_environment_is_clean_and_private(tmp_path, temporary, monkeypatch, sandbox):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-word")
    monkeypatch.setenv("PYTHONPATH", "/secret-path")
    result = run(tmp_path, """
        import os, sys
        for name in ("self/environ", f"{os.getppid()}/environ", "self/cmdline", f"{os.getppid()}/cmdline"):
            try:
                print(open("/proc/" + name).read())
            except PermissionError:
                print("denied")
        print("open files:", sorted(os.listdir("/proc/self/fd")))
        private = os.environ["TMPDIR"]
        print(sys.path, repr(sys.stdin.read()), os.environ["HOME"] == private, os.listdir(private))
        open(private + "/left", "w").write("x")
        os.mkdir(private + "/locked", 0)
        print(os.environ["OMP_NUM_THREADS"], repr(os.environ["CUDA_VISIBLE_DEVICES"]), private)
    """, threads=3)
    assert result.outcome == "ok" and "secret" not in result.stdout
    assert "open files: ['0', '1', '2', '3']" in result.stdout      # the last one is for the listing
    assert "'' True []" in result.stdout and f"3 '' {temporary}" in result.stdout
    assert becomes_empty(temporary)


def test_gpu_is_shown_when_given(tmp_path):
    code = "import os, resource; print(os.environ['CUDA_VISIBLE_DEVICES'], resource.getrlimit(resource.RLIMIT_AS)[0])"
    assert run(tmp_path, code, gpu="1").stdout == "1 -1\n"  # no limit on addresses: CUDA reserves far more than it uses
    assert run(tmp_path, code).stdout == f" {(1 << 30) + (4 << 30)}\n"


def test_script_that_never_ends(tmp_path, sandbox):
    result = run_to_limit(tmp_path, "print('before')\nwhile True: pass", lambda result: result.stdout, 0.5)
    limit = float(re.search(r"limit of (\d+\.5) s", result.detail)[1])      # 0.5, or on a busy machine 5.5 or 60.5
    assert (result.outcome, result.stdout) == ("timeout", "before\n") and limit <= result.seconds < 600


def test_gigabyte_of_output_costs_neither_memory_nor_time(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run(tmp_path, """
        import os
        print("first words")
        for _ in range(1024):
            os.write(1, b"x" * (1 << 20))
        print("last words")
    """, output_bytes=10_000)
    assert result.outcome == "ok" and result.stdout.startswith("first words\nxx")
    assert result.stdout.endswith("xxlast words\n")
    assert len(result.stdout) < 10_200 and f"{(1 << 30) + 12 + 11 - 10_000} bytes of output cut" in result.stdout
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


def test_flood_on_both_streams_until_the_limit(tmp_path):
    text = "import os\nwhile True: os.write(1, b'o' * 65536); os.write(2, b'e' * 65536)"
    result = run_to_limit(tmp_path, text, lambda result: "cut" in result.stdout and "cut" in result.stderr, 1)
    assert result.outcome == "timeout" and result.stdout.strip("o\n")[:3] == result.stderr.strip("e\n")[:3] == "..."


@pytest.mark.parametrize("end, outcome", [("sys.exit(0)", "ok"), ("time.sleep(600)", "timeout"), ("1 / 0", "error"),
                                          ("os.kill(os.getpid(), 9)", "killed")])
def test_daemons_do_not_outlive_the_script(tmp_path, end, outcome, sandbox):
    text = f"{DAEMON}\nfor _ in range(3): daemon()\n{end}"
    if outcome == "timeout":
        result = run_to_limit(tmp_path, text, lambda result: has_pulse(tmp_path), 1)
    else:
        result = run(tmp_path, text)
    assert result.outcome == outcome
    pulse = (tmp_path / "pulse").read_text()
    assert pulse and (sandbox == "on" or living(pulse.split()) == [])       # the sandbox has ids of its own
    time.sleep(0.1)
    assert (tmp_path / "pulse").read_text() == pulse


def test_process_that_keeps_moving_is_caught(tmp_path, sandbox):
    """A chain of processes, each of which forks the next and ends: no list of processes is ever up to date."""
    result = run(tmp_path, """
        import os
        if os.fork() == 0:
            os.setsid()
            while True:
                if os.fork():
                    os._exit(0)
    """)
    assert result.outcome == "ok"


def test_script_that_kills_its_supervisor_is_killed_too(tmp_path, temporary, sandbox):
    result = run(tmp_path, f"""{DAEMON}
import resource
try:
    resource.setrlimit(resource.RLIMIT_RTTIME, (1, 1))      # the mark that its processes are known by
except (OSError, ValueError):
    pass
daemon()
os.kill(os.getppid(), 9)
time.sleep(60)
""")
    if sandbox == "on":     # its parent is process 1 of its world, which nobody in there can kill
        assert result.outcome == "error" and "PermissionError" in result.detail
        return
    assert result.outcome == "killed" and "supervisor" in result.detail
    assert living((tmp_path / "pulse").read_text().split()) == []
    assert becomes_empty(temporary)


def test_script_that_stops_its_supervisor_is_killed_too(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr(executor, "GRACE_S", 2)
    text = f"{DAEMON}\ndaemon()\nos.kill(os.getppid(), 19)\ntime.sleep(600)"
    result = run_to_limit(tmp_path, text, lambda result: result.outcome != "timeout", 4, sandbox="off")
    assert result.outcome == "killed" and living((tmp_path / "pulse").read_text().split()) == []
    assert becomes_empty(temporary)


def test_the_imports_of_a_cold_script_do_not_count(tmp_path):
    burn = "import time\nwhile time.process_time() < 1: pass"
    assert run(tmp_path, burn, timeout_s=600, cpu_s=0.2, warm=False).limit == "cpu"
    assert run(tmp_path, "# of numpy\n" + burn, timeout_s=600, cpu_s=0.2, warm=False).outcome == "ok"


def test_processor_time_of_all_processes_counts_together(tmp_path, sandbox):
    burn = "import os, time\nfor _ in range(2):\n    if os.fork() == 0:\n        while True: pass\n"
    result = run(tmp_path, burn + "time.sleep(600)", timeout_s=600, cpu_s=0.5)
    assert (result.outcome, result.limit) == ("timeout", "cpu") and "0.5 s of processor time" in result.detail
    cpu_s = 0.5 + 10 * run(tmp_path, "pass").cpu_s      # far above what a start takes here; to wait costs none
    assert run(tmp_path, f"import time\ntime.sleep({cpu_s + 0.1})", cpu_s=cpu_s).outcome == "ok"
    result = run(tmp_path, "import time\ntime.sleep(600)", timeout_s=0.3, cpu_s=600)
    assert (result.outcome, result.limit) == ("timeout", "wall")


def test_processor_time_without_the_kernels_counter(tmp_path, monkeypatch):
    alter_supervisor(monkeypatch, tmp_path, "def count_cpu_time(): raise OSError(1, 'not allowed')")
    burn = """
        import os
        while True:
            if os.fork() == 0:
                for _ in range(500_000): pass
                os._exit(0)
            os.wait()
    """
    assert run(tmp_path, burn, timeout_s=600, cpu_s=0.5).limit == "cpu"


@pytest.mark.parametrize("warm", [False, True])
def test_processor_time_holds_all_that_the_script_saw_itself(tmp_path, warm):
    """Nothing of the supervisor's own is taken off that was used before the script began."""
    assert not warm or warm_up(b"numpy")
    result = run(tmp_path, "import time  # numpy\nprint(time.process_time())", warm=warm)
    assert result.warm == warm and 0 < float(result.stdout) <= result.cpu_s


def test_the_machine_takes_memory_from_a_script_before_its_supervisor(tmp_path):
    text = "import os\nfor pid in (os.getpid(), os.getppid()): print(open(f'/proc/{pid}/oom_score_adj').read().strip())"
    ours = Path("/proc/self/oom_score_adj").read_text().strip()
    assert run(tmp_path, text, sandbox="off").stdout.split() == ["1000", ours]


@pytest.mark.parametrize("name", ["-c", "-V", "--help"])
def test_name_that_is_an_option_of_the_interpreter(tmp_path, name):
    (tmp_path / name).write_text("print('run')")
    assert execute(name, tmp_path, timeout_s=600, memory_bytes=1 << 30).stdout == "run\n"


def test_only_the_head_of_a_script_is_read(tmp_path):
    with open(tmp_path / "big.py", "wb") as file:
        file.write(b"raise SystemExit\n")
        file.truncate(1 << 40)
    assert execute("big.py", tmp_path, timeout_s=1, memory_bytes=1 << 30).outcome in OUTCOMES


TREES = {
    "deep": "for _ in range(1200): os.mkdir('d' * 100); os.chdir('d' * 100)",
    "wide": "for i in range(300): open(str(i), 'w').close()",
    "names": "for i in range(1, 256):\n    if i != 47: open(bytes([i]) * 200, 'w').close()\nos.mkdir(b'\\xff'); "
             "open(b'\\xff/\\n', 'w').close()",
    "no rights": "os.makedirs('a/b/c'); open('a/b/c/f', 'w').close()\n"
                 "for each in ('a/b/c/f', 'a/b/c', 'a/b', 'a', '.'): os.chmod(each, 0)",
    "not files": "import socket; os.mkfifo('a'); os.symlink('/etc', 'b'); os.symlink('nowhere', 'c')\n"
                 "socket.socket(1).bind('d'); os.mkdir('e'); os.symlink(os.getcwd(), 'e/up')",
}


@pytest.mark.parametrize("name", TREES)
def test_any_tree_is_deleted(tmp_path, name, capfd):
    (tmp_path / "tree").mkdir()
    assert subprocess.run([sys.executable, "-c", f"import os\n{TREES[name]}"], cwd=tmp_path / "tree").returncode == 0
    executor.remove(tmp_path / "tree")
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    executor.remove(tmp_path / "tree")      # what is not there is no error
    assert capfd.readouterr().err == ""


def test_what_cannot_be_deleted_is_said_and_stays(tmp_path, capfd, monkeypatch):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/stays").write_text("")

    def refuse(*args, **more):
        raise PermissionError(1, "Operation not permitted")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        executor.remove(tmp_path / "tree")
    assert capfd.readouterr().err.count("could not be deleted") == 1


def test_a_mount_that_a_script_left_is_not_entered(tmp_path, capfd):
    libc = ctypes.CDLL(None, use_errno=True)
    kept = tmp_path / "kept"
    target = tmp_path / "tree/a"
    for folder in (kept, target):
        folder.mkdir(parents=True)
    (kept / "file").write_text("kept")
    if libc.mount(str(kept).encode(), str(target).encode(), None, 4096, None):     # MS_BIND
        pytest.skip("this user cannot mount")
    executor.remove(tmp_path / "tree")
    rest, = tmp_path.glob(".gone-*/a")
    assert libc.umount(str(rest).encode()) == 0
    assert (kept / "file").read_text() == "kept" and capfd.readouterr().err.count("could not be deleted") == 1


@pytest.mark.parametrize("locked", [False, True])
def test_a_folder_that_becomes_a_link_while_it_is_deleted_is_not_followed(tmp_path, monkeypatch, locked):
    """As a script that still runs could do: before the n-th question to the system, for each n."""
    kept = tmp_path / "kept"
    (kept / "folder").mkdir(parents=True)
    (kept / "folder/file").write_text("kept")
    kept.chmod(0o755)
    num_left = 0

    def or_swap(ask):
        def asked(*args, **more):
            nonlocal num_left
            num_left -= 1
            for name in ("a", "b") if num_left == 0 else ():
                with contextlib.suppress(FileNotFoundError):    # it is deleted
                    move(name, tmp_path / f"away-{name}", src_dir_fd=script)
                    os.symlink(kept, name, dir_fd=script)
            return ask(*args, **more)
        return asked
    move = os.rename
    names = ("access", "chmod", "open", "rename", "rmdir", "scandir", "unlink")
    for num in range(1, 1000):
        for folder in ("a/c", "b"):
            (tmp_path / "tree/run" / folder).mkdir(parents=True)
        script = os.open(tmp_path / "tree/run", os.O_RDONLY)
        num_left = num
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda *args, **more: not locked)     # what root is told is always True
            for name in names:
                patch.setattr(os, name, or_swap(getattr(os, name)))
            executor.remove(tmp_path / "tree")
        os.close(script)
        assert (kept / "folder/file").read_text() == "kept" and kept.stat().st_mode & 0o777 == 0o755
        for rest in (*tmp_path.glob(".gone-*"), *tmp_path.glob("away-*")):      # where it gave up
            executor.remove(rest)
        assert {path.name for path in tmp_path.iterdir()} == {"kept", "temporary"}
        if num_left > 0:
            break
    assert num > 20


def test_a_long_deletion_holds_up_nobody(tmp_path):
    (tmp_path / "tree/a").mkdir(parents=True)
    rmdir = os.rmdir
    go_on = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rmdir", lambda path: (go_on.wait(600), rmdir(path)))
        executor.discard(tmp_path / "tree")
        assert wait_until(lambda: not (tmp_path / "tree").exists())
        assert len(list(tmp_path.glob(".gone-*"))) == 1    # its name is free
        go_on.set()
        assert wait_until(lambda: [path.name for path in tmp_path.iterdir()] == ["temporary"])


def test_deep_folders_left_by_a_script(tmp_path, temporary):
    result = run(tmp_path, """
        import os
        for place in (os.getcwd(), os.environ["TMPDIR"]):
            os.chdir(place)
            for _ in range(120):        # a longer path than the kernel takes
                os.mkdir("d" * 50)
                os.chdir("d" * 50)
    """)
    assert result.outcome == "ok" and becomes_empty(temporary)
    executor.remove(tmp_path / ("d" * 50))
    assert not (tmp_path / ("d" * 50)).exists()


@pytest.mark.parametrize("layers", ["namespaces+seccomp", "landlock+seccomp"])
def test_honest_libraries_work_in_each_layer(tmp_path, layers):
    result = run(tmp_path, """
        import asyncio, os, shutil, subprocess, tempfile
        import numpy, pandas
        from joblib import Parallel, delayed
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.model_selection import cross_val_score
        if __name__ == "__main__":
            X = numpy.random.RandomState(0).rand(200, 300)
            print(cross_val_score(RandomForestClassifier(5, n_jobs=2), X, X[:, 0] > 0.5, n_jobs=2, cv=2).mean() > 0.4)
            print(Parallel(2)(delayed(numpy.sum)(x) for x in [numpy.ones((600, 600))] * 3)[0])
            pandas.DataFrame({"a": [1]}).to_csv("a.csv")
            shutil.copy2("a.csv", "b.csv")
            shutil.copytree(os.path.dirname(asyncio.__file__), tempfile.mkdtemp() + "/copy")
            print(asyncio.run(asyncio.sleep(0.01, 5)), subprocess.run("cat a.csv | wc -l", shell=True).returncode)
    """, memory_bytes=2 << 30, sandbox=layers)
    assert result.outcome == "ok", result.stderr
    assert result.stdout.split() == ["True", "360000.0", "2", "5", "0"] or result.stdout.split() == [
        "True", "360000.0", "5", "2", "0"]


def test_memory_hog(tmp_path):
    # it grows slowly enough to be looked at in between
    text = "import time\nhoard = []\nwhile True: hoard.append(bytearray(8 << 20)); time.sleep(0.02)"
    result = run(tmp_path, text, memory_bytes=200 << 20)
    assert result.outcome == "out of memory" and 150 << 20 < result.peak_bytes < 1 << 30 and "0.20 GiB" in result.detail


def test_memory_of_all_processes_counts_together(tmp_path, sandbox):
    hog = """
        import os, time
        for _ in range(3):
            if os.fork() == 0:
                hoard = bytearray(120 << 20)
                time.sleep(60)
        time.sleep({})
    """
    assert run(tmp_path, hog.format(60), memory_bytes=300 << 20).outcome == "out of memory"
    assert run(tmp_path, hog.format(0.7), memory_bytes=600 << 20).outcome == "ok"


def test_memory_shared_by_forked_workers_counts_once(tmp_path):
    result = run(tmp_path, """
        import os, time
        hoard = bytearray(120 << 20)
        for _ in range(4):
            if os.fork() == 0:
                time.sleep(60)
        time.sleep(0.7)
    """, memory_bytes=300 << 20)
    assert result.outcome == "ok"


@pytest.mark.parametrize("code, outcome", [
    ("bytearray(1 << 40)", "out of memory"),                                              # beyond the address space
    ("raise OSError(12, 'Cannot allocate memory')", "out of memory"),
    ("class OutOfMemoryError(RuntimeError): pass\nOutOfMemoryError.__module__ = 'torch'\n"  # as torch names its own
     "raise OutOfMemoryError('CUDA out of memory. Tried\\nto')", "out of memory"),
    ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", "out of memory"),
    ("raise OSError(28, 'No space left on device')", "disk full"),
    ("open('big', 'wb').write(b'x' * (2 << 20))", "disk full"),
    ("import signal; signal.signal(25, signal.SIG_DFL); open('big', 'wb').write(b'x' * (2 << 20))", "disk full"),
    ("import numpy; numpy.zeros(1 << 20).tofile('big')", "disk full"),
    ("import sys; sys.exit('MemoryError')", "error"),                                     # words are not an outcome ...
    ("import sys; print('MemoryError', file=sys.stderr); sys.exit(1)", "error"),
    ("print('OSError: [Errno 28] No space left on device'); 1 / 0", "error"),
    ("import sys; print('CUDA out of memory', file=sys.stderr); raise ValueError('MemoryError: no')", "error"),
    ("try:\n    raise MemoryError\nexcept MemoryError:\n    raise ValueError", "error"),  # ... the last one decides
    ("try:\n    raise ValueError\nexcept ValueError:\n    raise MemoryError", "out of memory"),
    ("import os; os._exit(3)", "error"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed"),
    ("this is not Python", "error"),
    ("import sys; sys.exit(0)", "ok"),
])
def test_outcomes(tmp_path, code, outcome):
    assert run(tmp_path, code, file_bytes=1 << 20).outcome == outcome


def test_what_was_printed_before_an_error_is_kept(tmp_path):
    result = run(tmp_path, "print('epoch 1')\nraise KeyError('column')")
    assert result.stdout == "epoch 1\n" and result.detail == "KeyError: 'column'" and "Traceback" in result.stderr


def test_too_many_processes(tmp_path, sandbox):
    result = run(tmp_path, """
        import os, time
        for _ in range(60):
            if os.fork() == 0:
                time.sleep(60)
        time.sleep(60)
    """, processes=40)
    assert result.outcome == "too many processes" and "40 processes" in result.detail


def test_progress_bars_leave_their_last_state(tmp_path):
    assert run(tmp_path, r"print('10%\r50%\r100%\r\ndone', end='')").stdout == "100%\ndone"


def test_bytes_that_are_not_text(tmp_path):
    assert run(tmp_path, r"import os; os.write(1, b'\xff\x00ok\n')").stdout == "\ufffd\x00ok\n"


def test_four_threads_at_once(tmp_path, temporary, sandbox):
    folders = [tmp_path / str(i) for i in range(12)]
    for folder in folders:
        folder.mkdir()

    def execute_one(i):
        if i % 3:
            return run(folders[i], f"{DAEMON}\nprint({i})\ndaemon()")
        return run_to_limit(folders[i], f"print({i})\nimport time\ntime.sleep(600)", lambda result: result.stdout, 2)
    execute_one(0)
    descriptors = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(execute_one, range(12)))
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(12)]
    assert [result.outcome for result in results] == ["ok" if i % 3 else "timeout" for i in range(12)]
    assert becomes_empty(temporary) and wait_until(lambda: len(os.listdir("/proc/self/fd")) == descriptors)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("warm", [False, True])
def test_nothing_survives_its_parent(tmp_path, temporary, sent, warm):
    name = f"script_{uuid.uuid4().hex}.py"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text(f"{DAEMON}\ndaemon()\ntime.sleep(60)  # numpy")
    wait = "import test_execute; test_execute.warm_up(b'numpy')\n" if warm else ""
    call = (f"import sys; sys.path += ['tests']; from support import sandbox\n{wait}"
            f"sandbox.execute({name!r}, {str(folder)!r}, timeout_s=60, memory_bytes=1 << 30, warm={warm})")
    caller = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stderr=subprocess.DEVNULL,
                              env={**os.environ, "TMPDIR": str(temporary)})
    assert wait_until((folder / "pulse").exists) and len(processes(name)) >= 2
    servers = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent(pid) == caller.pid]
    assert len(servers) == 1
    caller.send_signal(sent)
    caller.wait(600)
    assert wait_until(lambda: not processes(name) and not living(servers))
    if sent == signal.SIGKILL:      # the folders are left to the next start of a program (cli.run_main)
        return
    assert list(temporary.iterdir()) == []      # who can still tidy up does so itself
    pulse = (folder / "pulse").read_text()
    time.sleep(0.1)
    assert (folder / "pulse").read_text() == pulse


@pytest.mark.parametrize("warm", [False, True])
def test_a_script_that_is_stopped_has_no_result(tmp_path, temporary, monkeypatch, warm):
    """A program stops its scripts before it deletes their folders. What becomes of them then must not be recorded."""
    monkeypatch.setattr(executor, "_lock", threading.Lock())
    assert not warm or warm_up(b"numpy")
    came_back = threading.Event()
    name = f"script_{uuid.uuid4().hex}.py"
    (tmp_path / name).write_text(f"{DAEMON}\ndaemon()\ntime.sleep(600)  # numpy")

    def call():
        try:
            execute(name, tmp_path, timeout_s=600, memory_bytes=1 << 30, warm=warm)
        finally:
            came_back.set()
    threading.Thread(target=call, daemon=True).start()      # it never ends
    assert wait_until((tmp_path / "pulse").exists)
    executor.stop()
    pulse = (tmp_path / "pulse").read_text()
    assert processes(name) == [] and becomes_empty(temporary) and not executor._running
    assert not came_back.wait(0.2) and (tmp_path / "pulse").read_text() == pulse


def test_an_interrupted_thread_of_ours_is_not_needed(tmp_path):
    """execute works in a thread that is not the main one, where signals and preexec functions cannot be used."""
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, "print(1)")))
    thread.start()
    thread.join(600)
    assert results[0].outcome == "ok"


def test_mistakes_of_the_caller_are_errors_and_not_outcomes(tmp_path, monkeypatch):
    limits = dict(timeout_s=5, memory_bytes=1 << 30)
    with pytest.raises(ValueError, match="no script 'absent.py'"):
        execute("absent.py", tmp_path, **limits)
    (tmp_path / "there.py").write_text("")
    with pytest.raises(ValueError, match="interpreter"):
        execute("there.py", tmp_path, python="/absent/python", **limits)
    broken = tmp_path / "python"
    broken.write_text("not a program")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match="Exec format error"):
        execute("there.py", tmp_path, python=str(broken), **limits)
    with pytest.raises(ValueError, match="must be kept from scripts"):
        executor.execute("there.py", tmp_path, hidden=[tmp_path / "answers"], **limits)
    monkeypatch.setattr(executor.sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="Linux only"):
        execute("there.py", tmp_path, **limits)


# ------------------------------------------------------------------------------------- forked from a warm process

LIKE_COLD = {   # every text mentions numpy, so that a warm process takes it
    "libraries": "import numpy as np, pandas as pd\nprint(np.arange(3), pd.DataFrame({'a': [1.5]}))",
    "nothing": "",
    "what a script sees of itself": """
        import gc, inspect, os, signal, sys, threading, numpy
        class Here: pass
        print(__name__, __file__, __doc__, __package__, __spec__, __builtins__, type(__loader__), __loader__.path)
        print(list(globals()), sys.modules["__main__"].Here is Here, Here.__module__, inspect.getsource(Here))
        print(sys.argv, sys.orig_argv, sys.path, sys.flags, sys.executable, sys.prefix, sys.warnoptions, sys._xoptions)
        print(os.getcwd(), sorted(os.listdir("/proc/self/fd")), sys.stdin, sys.stdout, sys.stderr, sys.stdin.read())
        print({name: signal.getsignal(name) for name in signal.valid_signals()}, signal.pthread_sigmask(0, []))
        print({name: value for name, value in os.environ.items() if value[:1] != "/"})
        print(os.popen("env | grep -v /tmp | sort").read())
        print(open("/proc/self/cmdline").read().strip("\\0"))
        print(threading.current_thread(), threading.active_count(), gc.isenabled(), gc.get_threshold(), hash("numpy"))
        print([line for line in open("/proc/self/status") if line.startswith(("Sig", "Shd", "Cap", "NoNew", "Thr"))])
        os.kill(os.getpid(), 0)
        print(os.access("/proc/self/environ", os.R_OK), oct(os.umask(0)), os.getpgrp() == os.getsid(0) == os.getpid())
        import resource
        print([resource.getrlimit(each) for each in range(15)])     # the last one is drawn anew for each run
    """,
    "traceback": "# numpy\ndef f(n):\n    g = {}\n    return g[n]\ntry:\n    f(1)\nexcept KeyError as e:\n"
                 "    raise ValueError('x\\u00e9') from e",
    "deep recursion": "# numpy\ndef f(n):\n    return f(n + 1)\nf(0)",
    "assertion in a library": "import numpy\nnumpy.zeros(3).reshape(2)",
    "no Python": "# numpy\nthis is not Python\n",
    "bad indentation": "# numpy\nif 1:\nprint(1)\n",
    "null byte": "# numpy\nprint(1)\0\n",
    "another encoding": "# -*- coding: latin-1 -*- numpy\nprint('\u00e9')",
    "words at the end": "import sys, numpy\nprint('out')\nsys.exit('MemoryError: numpy')",
    "exit code": "raise SystemExit(3)  # numpy",
    "exit code none": "raise SystemExit  # numpy",
    "exit code beyond all": "raise SystemExit(2 ** 70)  # numpy",
    "exit code negative": "raise SystemExit(-1)  # numpy",
    "interrupted": "import os, signal, time, numpy\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)",
    "hard exit": "import os, numpy\nprint(1)\nos._exit(4)",
    "signal": "import os, numpy\nos.kill(os.getpid(), 11)",
    "abort": "import os, numpy\nos.abort()",
    "too much memory": "import numpy\nnumpy.zeros(1 << 40)",
    "too large a file": "import numpy\nnumpy.zeros(1 << 22).tofile('big')",
    "warnings": "import warnings, logging, numpy\nwarnings.warn('careful')\nlogging.error('bad')\nlogging.info('no')\n"
                "def f(): warnings.warn('caller', stacklevel=2)\nf()\nprint(numpy.log(0))",
    "hooks": "# numpy\nimport sys\n"
             "sys.excepthook = lambda *a: print('hook', a[0], a[2].tb_lineno, a[2].tb_next)\n1 / 0",
    "hook that fails": "# numpy\nimport sys\ndef hook(*a): raise KeyError(1)\nsys.excepthook = hook\n1 / 0",
    "the end": """
        import atexit, threading, time, weakref, numpy
        class Loud:
            def __init__(self, name): self.name = name
            def __del__(self): print("gone", self.name, time is not None)
        loud, ring = Loud("a name"), Loud("a ring")
        ring.self = ring
        file = open("unclosed", "w")
        file.write("kept")
        atexit.register(print, "first registered")
        atexit.register(lambda: [] + 1)
        weakref.finalize(loud, print, "finalized")
        threading.Thread(target=lambda: (threading.main_thread().join(), print("a thread ends"))).start()
        open("helper.py", "w").write("file = open('helped', 'w'); file.write('kept')")
        import helper
        print("last line")
        1 / 0
    """,
    "full disk at the end": "import sys, numpy\nsys.stdout = open('/dev/full', 'w')\nprint(1)",
    "closed output": "import sys, numpy\nsys.stdout.close()",
    "no output": "import sys, numpy\ndel sys.stdout",
    "daemon thread": "import threading, time, numpy\n"
                     "threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
    "output of its own": "# numpy\nimport sys\nsys.stdout = open('log', 'w')\nprint('numpy')",
    "helper that fails": "# numpy\n"
                         "open('helper.py', 'w').write('def f():\\n    return 1 / 0')\nimport helper\nhelper.f()",
    "workers": """
        import concurrent.futures, multiprocessing, os, pickle, sys, numpy
        class Point:
            def __init__(self, x): self.x = x
        def double(point): return Point(2 * point.x)
        if __name__ == "__main__":
            print(pickle.loads(pickle.dumps(Point(3))).x, pickle.dumps(Point))
            for method in ("fork", "spawn"):
                with multiprocessing.get_context(method).Pool(2) as pool:
                    print([point.x for point in pool.map(double, [Point(1), Point(2)])])
            with concurrent.futures.ProcessPoolExecutor(2) as pool:
                print([point.x for point in pool.map(double, [Point(1), Point(2)])])
            from joblib import Parallel, delayed
            print([point.x for point in Parallel(2)(delayed(double)(Point(x)) for x in (1, 2))])
    """,
    "another program": "import os, sys, numpy\n"
                       "os.execv(sys.executable, [sys.executable, '-c', 'import sys; print(sys.path[0])'])",
}


def left(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "script.py"}


@pytest.mark.parametrize("name", LIKE_COLD)
def test_warm_is_like_cold(tmp_path, name):
    """Exit code, both streams to the last letter of a traceback, outcome and files."""
    found = []
    for warm in (False, True):
        folder = tmp_path / "same" / "folder"
        folder.mkdir(parents=True)
        text = textwrap.dedent(LIKE_COLD[name])
        (folder / "script.py").write_bytes((text if "numpy" in text else f"{text}# numpy").encode(
            "latin-1" if "latin-1" in text else "utf-8"))
        assert not warm or warm_up(b"numpy")
        result = execute("script.py", folder, timeout_s=600, memory_bytes=2 << 30, file_bytes=1 << 20, warm=warm)
        assert result.warm == warm
        shown = [re.sub(r"0x[0-9a-f]{9,}|Thread-?\w* ?\d{9,}|started \d+", "ADDRESS", text)
                 for text in (result.stdout, result.stderr)]
        found.append([result.outcome, result.exit_code, *shown, result.detail, result.sandbox, left(folder)])
        (tmp_path / "same").rename(tmp_path / str(warm))
    for cold, warm in zip(*found):
        assert cold == warm


def test_modules_beside_a_warm_script_come_first_as_cold(tmp_path):
    assert warm_up(b"numpy")
    (tmp_path / "joblib").mkdir()
    (tmp_path / "joblib" / "__init__.py").write_text("NAME = 'ours'")
    for warm in (False, True):
        result = run(tmp_path, "import numpy, joblib\nprint(joblib.NAME)", warm=warm)
        assert result.stdout == "ours\n" and not result.warm
    (tmp_path / "joblib" / "__init__.py").unlink()
    (tmp_path / "joblib").rmdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "json.py").write_text("1 / 0")
    (tmp_path / "lib" / "csv.py").write_text("NAME = 'ours'")
    (tmp_path / "lib" / "a.py").write_text("import numpy, csv\nprint(csv.NAME)")
    for warm in (False, True):
        result = execute("lib/a.py", tmp_path, timeout_s=600, memory_bytes=1 << 30, warm=warm)
        assert result.stdout == "ours\n" and not result.warm       # it was started anew


def test_random_numbers_of_warm_scripts_are_their_own(tmp_path):
    text = ("import os, random, numpy, tempfile, uuid, multiprocessing as m\n"
            "print(random.random(), numpy.random.rand(), bytes(m.current_process().authkey).hex(), uuid.uuid4())\n"
            "print(*['same'] * (tempfile.gettempdir() == os.environ['TMPDIR']), numpy.random.RandomState(1).rand())")
    assert warm_up(b"numpy")
    first, second = (run(tmp_path, text).stdout.split() for _ in range(2))
    assert all(a != b for a, b in zip(first[:4], second[:4]))
    assert first[4:] == second[4:] == ["same", "0.417022004702574"]


def test_a_warm_script_leaves_nothing_to_the_next(tmp_path):
    look = ("import builtins, json, os, signal, sys, numpy\n"
            "print(hasattr(builtins, 'mine'), hasattr(numpy, 'mine'), json.loads('1'), 'MINE' in os.environ, 'mine' in "
            "sys.modules, signal.getsignal(15), sys.getrecursionlimit(), numpy.get_printoptions()['precision'])")
    spoil = look + ("\nbuiltins.mine = numpy.mine = 1; json.loads = id\n"
                    "os.environ['MINE'] = '1'; sys.modules['mine'] = os\n"
                    "signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.setrecursionlimit(9999)\n"
                    "numpy.set_printoptions(precision=2); os.kill(os.getpid(), 9)")
    assert warm_up(b"numpy")
    before, spoilt, after = (run(tmp_path, text) for text in (look, spoil, look))
    assert before.warm and spoilt.warm and after.warm and spoilt.outcome == "killed"
    assert before.stdout == spoilt.stdout == after.stdout and before.outcome == after.outcome == "ok"


def test_job_of_one_warm_script_is_not_in_the_memory_of_the_next(tmp_path):
    """Searches its own memory for the name of the script that ran before: by its first half, then what follows there,
    so that the name as a whole is nowhere in the search itself."""
    search = """
        import sys, numpy
        sys.stdin.read()
        first, second = b"script_FIRST", b"SECOND"
        found = 0
        with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
            for line in maps.read().splitlines():
                if " rw" not in line:
                    continue
                start, end = (int(each, 16) for each in line.split()[0].split("-"))
                memory.seek(start)
                try:
                    content = memory.read(end - start)
                except OSError:
                    continue
                at = content.find(first)
                while at >= 0:
                    found += content.startswith(second, at + len(first))
                    at = content.find(first, at + 1)
        print(found > 0)
    """
    assert warm_up(b"numpy")
    secret = uuid.uuid4().hex
    own = uuid.uuid4().hex
    for name in (f"script_{secret}.py", f"script_{own}.py"):
        (tmp_path / name).write_text("# numpy")
    limits = dict(timeout_s=600, memory_bytes=2 << 30)
    assert execute(f"script_{secret}.py", tmp_path, **limits).warm
    (tmp_path / f"script_{secret}.py").unlink()     # names in the folder are read before a script runs
    seen = []
    for word in (secret, own):
        text = textwrap.dedent(search).replace("FIRST", word[:16]).replace("SECOND", word[16:])
        (tmp_path / f"script_{own}.py").write_text(text)
        seen.append(execute(f"script_{own}.py", tmp_path, **limits).stdout)
    assert seen == ["False\n", "True\n"]       # what it looks for is found where it is


def test_a_warm_script_sees_no_path_of_ours(tmp_path):
    assert warm_up(b"numpy")
    text = ("import inspect, sys, traceback, numpy\ntraceback.print_stack(file=sys.stdout)\n"
            "print(sys.path, sys.argv, [frame.filename for frame in inspect.stack()])")
    result = run(tmp_path, text)
    assert result.warm and result.outcome == "ok" and str(ROOT) not in result.stdout.replace(str(tmp_path), "")


def test_threads_of_a_warm_script(tmp_path):
    text = """
        import threadpoolctl, numpy, sklearn.ensemble, torch
        a = torch.ones(600, 600) @ torch.ones(600, 600)
        b = numpy.ones((900, 900)) @ numpy.ones((900, 900))
        print(a[0, 0].item(), b[0, 0], torch.get_num_threads(), torch.initial_seed() > 0,
              sorted((each["user_api"], each["num_threads"]) for each in threadpoolctl.threadpool_info()))
    """
    assert warm_up(b"torch", threads=2)
    cold, warm = (run(tmp_path, text, threads=2, memory_bytes=2 << 30, warm=each) for each in (False, True))
    assert warm.warm and not cold.warm and warm.outcome == "ok" and warm.stdout == cold.stdout
    assert " 2 True [('blas', 2), " in warm.stdout and "1)" not in warm.stdout


def test_torch_trains_and_draws_in_warm_scripts(tmp_path, monkeypatch):
    program = tempfile.TemporaryDirectory(prefix="ml-agent-program-", dir="/tmp", ignore_cleanup_errors=True)
    monkeypatch.setattr(tempfile, "tempdir", program.name)      # workers put a socket below, whose name must be short
    text = """
        import torch
        print(torch.rand(1).item(), torch.initial_seed())
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        data = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.randn(64, 1))
        optimizer = torch.optim.Adam(model.parameters())
        for x, y in torch.utils.data.DataLoader(data, 16, shuffle=True, num_workers=2):
            optimizer.zero_grad()
            (loss := ((model(x) - y) ** 2).mean()).backward()
            optimizer.step()
        print(loss.item())
    """
    assert warm_up(b"torch", threads=2)
    cold, first, second = (run(tmp_path, text, memory_bytes=2 << 30, threads=2, warm=warm)
                           for warm in (False, True, True))
    assert first.warm and second.warm and first.stderr == cold.stderr and first.outcome == "ok"
    lines = [result.stdout.splitlines() for result in (cold, first, second)]
    assert len({line[0] for line in lines}) == 3 and len({line[1] for line in lines}) == 1
    program.cleanup()


FULL = """
fork, refusals = os.fork, iter(range(3))
def refuse():
    if next(refusals, None) is not None:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()
os.fork = refuse
"""


def test_a_machine_without_room_for_processes_is_waited_for(tmp_path, monkeypatch):
    """As beside a script's fork bomb, each start of a process of ours fails for a moment."""
    popen = subprocess.Popen
    refusals = iter(range(3))

    def refuse(*args, **options):
        if next(refusals, None) is not None:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return popen(*args, **options)
    alter_supervisor(monkeypatch, tmp_path, FULL)
    monkeypatch.setattr(executor.subprocess, "Popen", refuse)
    for sandbox in ("on", "off"):
        assert run(tmp_path, "print(1)", sandbox=sandbox).stdout == "1\n"


def test_a_full_disk_is_told_from_other_errors(tmp_path, monkeypatch):
    alter_supervisor(monkeypatch, tmp_path,
                     "def mkdir(*args): raise OSError(28, 'No space left on device')\nos.mkdir = mkdir")
    with pytest.raises(OSError, match="No space left on device") as error:
        run(tmp_path, "print(1)")
    assert error.value.errno in executor.NO_SPACE


def test_a_machine_that_stays_without_room_is_one_sentence(tmp_path, monkeypatch):
    alter_supervisor(monkeypatch, tmp_path, FULL.replace("range(3)", "range(10**9)") + "START_S = 0.2")
    for _ in range(2):      # it goes on then
        with pytest.raises(RuntimeError, match="no process can be started on this machine"):
            run(tmp_path, "print(1)")


def test_the_second_script_starts_the_warm_process(tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "_servers", {})
    assert not run(tmp_path, "# numpy").warm and not any(executor._servers.values())
    assert not run(tmp_path, "# numpy").warm and all(executor._servers.values())        # it is still importing
    assert warm_up(b"numpy") and run(tmp_path, "# numpy").warm and not run(tmp_path, "# numpy", warm=False).warm
    assert not run(tmp_path, "pass").warm       # nothing to gain
    for server in executor._servers.values():
        server.requests.close()
    executor._servers.clear()
    assert run(tmp_path, "# numpy", warm="wait").warm


@pytest.mark.parametrize("code, why", [("import os; os._exit(0)", "has ended"), ("raise RuntimeError", "has ended"),
                                       ("import threading as t, time; t.Thread(target=time.sleep, args=(600,)).start()",
                                        "keep threads or"), ("file = open('/proc/self/stat')", "or files open")])
def test_libraries_that_cannot_be_shared_are_said_once(tmp_path, code, why, capfd):
    import venv
    venv.create(tmp_path / "venv", symlinks=True)
    python = str(tmp_path / "venv/bin/python")
    next((tmp_path / "venv").glob("lib/python*/site-packages")).joinpath("numpy.py").write_text(code)
    assert not warm_up(b"numpy", python=python) and not warm_up(b"numpy", python=python)
    result = run(tmp_path, "print(1)  # numpy", python=python)
    assert (result.stdout, result.warm) == ("1\n", False)
    said = capfd.readouterr().err
    assert said.count("start cold") == 1 and why in said
