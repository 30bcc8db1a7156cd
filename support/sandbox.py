"""Runs a script under limits, in a sandbox: execute. Linux only. docs/sandbox.md says what is covered, and how a script
is started."""
import contextlib
import errno
import functools
import glob
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from support import supervisor
from support.supervisor import patiently

OWNER = "owner"     # the file in a program's folder that it holds a lock on, see cli.run_main
NO_SPACE = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)
SUPERVISOR = supervisor.__file__
LAYERS = ("namespaces", "landlock")     # each is enough to hide the answers
FILTER = "seccomp"                      # goes with either, for what they leave open
GIB = 1 << 30
INHERITED = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}     # CUDA may need it
WALL_FACTOR = 4     # see wall_limit
GRACE_S = 30        # for so long after its limits a supervisor is waited for

# what a warm server imports, by what a script's text mentions; torch.optim imports the last one when it is used
TABLES = ("numpy", "pandas", "scipy.sparse", "sklearn.ensemble", "sklearn.linear_model", "sklearn.neural_network",
          "sklearn.model_selection", "sklearn.pipeline", "sklearn.feature_extraction.text", "PIL.JpegImagePlugin")
IMPORT_S = 10       # processor time that libraries may take, which a warm script has imported already
WARM = {rb"\btorch": (*TABLES, "torch", "torch._dynamo"), rb"\b(numpy|pandas|scipy|sklearn)\b": TABLES}

# what scripts may see beside the interpreter: not all of /usr, since some keep their own work there
LIBRARIES = ("/bin", "/sbin", "/lib", "/lib64", "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/usr/libexec",
             "/usr/include", "/usr/share", "/usr/local/bin", "/usr/local/lib", "/usr/local/lib64", "/usr/local/share",
             "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/etc/fonts", "/etc/alternatives",
             "/sys/devices/system")
DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")    # not zero: shared, it is memory of nobody
GPU_LIBRARIES = ("/sys", "/usr/local/cuda*", "/opt/rocm*")
GPU_DEVICES = ("/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/dxg")


@dataclass(frozen=True)
class Result:
    """How a run ended."""
    outcome: str        # a key of OUTCOMES
    exit_code: int      # minus the signal's number if a signal ended it
    stdout: str         # head and tail, the cut marked
    stderr: str
    seconds: float      # wall time
    peak_bytes: int     # largest resident memory of all its processes together
    sandbox: str        # the layers that were active, such as "namespaces+landlock+seccomp", or "off"
    detail: str = ""    # one sentence about the outcome
    warm: bool = False  # it was forked from a process that had the libraries imported already
    limit: str = ""     # the limit that ended it: "wall", "cpu", "memory", "processes"
    cpu_s: float = 0.0  # processor time of all its processes


class SandboxUnavailable(RuntimeError):
    """This machine cannot keep scripts from the answers; the message says why."""


def execute(script, cwd, *, timeout_s, memory_bytes, cpu_s=None, python=None, sandbox="on", readable=(), hidden=(),
            output_bytes=1 << 16, file_bytes=4 * GIB, processes=256, threads=1, gpu=None, warm=True):
    """Runs `python script` in the folder `cwd` and returns its Result. When it returns, also by an exception, nothing
    that the script started is alive. Many threads may call it at once.

    timeout_s: wall seconds. cpu_s: processor time of all its processes, those that ended too, and IMPORT_S more for
    the libraries of a cold script; None: any.
    memory_bytes: of all its processes, with /dev/shm, pipes and sockets; without a GPU each address space is limited
    to 4 GiB more, so that a huge allocation fails inside the script. processes: at once; of threads four times as many.
    sandbox: "on" uses every layer that holds here, "off" none, names as in Result.sandbox those. readable: what it may
    read beside the interpreter and the system's libraries; it may write to cwd and to its TMPDIR. hidden: what it must
    not reach. output_bytes: kept of each stream. file_bytes: the largest file. threads: for OpenMP and BLAS. gpu: value
    of CUDA_VISIBLE_DEVICES; None hides all. warm: it may be forked from a process that has its libraries; "wait": that
    is waited for.

    ValueError: no such script, folder or interpreter, or something hidden lies where the script may read. RuntimeError:
    not on Linux, or the script could not be started. OSError: no space is left. SandboxUnavailable: see protection.
    """
    # 1. What is asked for
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"scripts can be executed on Linux only, not on {sys.platform}")
    if not {"on", "off", *LAYERS, FILTER}.issuperset(sandbox.split("+")):
        raise ValueError(f"sandbox must be 'on' or 'off'; found {sandbox!r}")
    cwd = os.path.realpath(cwd)
    if not os.path.isfile(os.path.join(cwd, script)):
        raise ValueError(f"there is no script {script!r} in {cwd}")
    program, folders, _ = describe(python or sys.executable)
    layers = tuple(sandbox.split("+"))
    if sandbox == "on":
        layers = protection()
    elif sandbox == "off":
        layers = ()
        if hidden:      # else the script is ours
            _warn_of_off()
    # 2. What the script sees: {path: right}
    base = os.path.join(tempfile.gettempdir(), f"ml-agent-{uuid.uuid4().hex[:16]}")     # sockets need short names
    private = os.path.join(base, "tmp")
    libraries = [*folders, *map(str, readable)]
    devices = list(DEVICES)
    if gpu:
        libraries += [path for pattern in GPU_LIBRARIES for path in glob.glob(pattern)]
        devices += [path for pattern in GPU_DEVICES for path in glob.glob(pattern)]
    shown = dict.fromkeys(filter(os.path.exists, libraries), "read")
    shown |= dict.fromkeys(filter(os.path.exists, devices), "device")
    shown |= {cwd: "write", private: "write"}
    for secret in hidden if layers else ():
        for path in shown:
            if Path(secret).resolve().is_relative_to(os.path.realpath(path)):
                raise ValueError(f"{secret} must be kept from scripts, but lies below {path}, which they may read; "
                                 "keep the prepared data (--data) somewhere else")
    # 3. The run
    serial = bool(layers) and "namespaces" not in layers        # no /dev/shm and so no semaphores
    with open(os.path.join(cwd, script), "rb") as file:
        text = file.read(1 << 20)
    server = _warm_server(program, text, threads, serial, warm == "wait") if warm else None
    job = dict(
        # a name that starts with "-" is no option of the interpreter
        command=[program, f"./{script}" if script.startswith("-") else script],
        cwd=cwd, env=_environment(program, threads, serial, gpu, private), base=base, root=os.path.join(base, "root"),
        shown=sorted(shown.items()),    # a folder before what is in it
        layers=layers, gpu=gpu, mark=uuid.uuid4().int >> 67, timeout_s=float(timeout_s),
        cpu_s=cpu_s, import_s=IMPORT_S if libraries_of(text) else 0, memory_bytes=int(memory_bytes),
        address_bytes=0 if gpu else int(memory_bytes) + 4 * GIB, output_bytes=output_bytes, file_bytes=file_bytes,
        processes=processes)
    started = time.monotonic()
    report = _run(job, server)
    # 4. What came of it
    layers = "+".join(layers) or "off"
    if report is None:
        return Result("killed", -9, "", "", time.monotonic() - started, 0, layers,
                      "Its supervisor is gone: the script attacked it, or the machine ended it.")
    limits = {"wall": ("timeout", f"It ran longer than its limit of {timeout_s:.3g} s."),
              "cpu": ("timeout", f"It used more than its limit of {cpu_s or 0:.3g} s of processor time."),
              "memory": ("out of memory", f"It used more than its limit of {memory_bytes / GIB:.2f} GiB."),
              "processes": ("too many processes",
                            f"It had more than {processes} processes, or {4 * processes} threads.")}
    oom = report.pop("oom")
    limit = report["limit"]
    outcome, detail = limits[limit] if limit else _outcome(report["exit_code"], oom, report["stderr"])
    return Result(outcome=outcome, sandbox=layers, detail=detail, **report)


@functools.cache
def _warn_of_off():
    print("sandbox off: scripts run as this user, with its files, the answers and the network in reach",
          file=sys.stderr)


def _outcome(exit_code, oom, stderr):
    """(outcome, detail) of a script that ended within its limits, by what the kernel reports and, for exit code 1, by
    the line `Type: message` of the traceback that ends the error stream. oom: meanwhile the kernel has killed some
    process for lack of memory."""
    if exit_code == 0:
        return "ok", ""
    if exit_code == -signal.SIGXFSZ:
        return "disk full", "A file grew above the size limit."
    if exit_code == -signal.SIGKILL and oom or exit_code == -signal.SIGABRT and "std::bad_alloc" in stderr[-500:]:
        return "out of memory", "The machine ran out of memory."
    if exit_code < 0:
        return "killed", f"It was ended by signal {-exit_code}."
    _, header, body = stderr.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in body.split("\n") if line and not line[0].isspace()] if header and exit_code == 1 else []
    line = lines[0][:500] if lines else ""
    name, _, message = line.partition(": ")
    if name.endswith("MemoryError") or name in ("OSError", "RuntimeError") and re.search(
            r"\[Errno 12\]|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory", message):
        return "out of memory", line
    # file too large, no space, quota; the last is numpy's
    if name == "OSError" and re.match(r"\[Errno (27|28|122)\]|\d+ requested and \d+ written", message):
        return "disk full", line
    return "error", line


ABOUT_PYTHON = """import importlib.metadata as metadata, json, sys
packages = sorted({f"{package.metadata['Name']}=={package.version}" for package in metadata.distributions()})
print(json.dumps([sys.executable, [sys.prefix, sys.base_prefix, sys.exec_prefix], [sys.version, *packages]]))"""


@functools.cache
def describe(python):
    """(executable, all it needs to read, versions of itself and of its packages) of an interpreter."""
    try:
        done = subprocess.run([shutil.which(python) or python, "-c", ABOUT_PYTHON],
                              env={"PYTHONNOUSERSITE": "1", **INHERITED}, cwd="/", capture_output=True, text=True,
                              check=True, timeout=60)
        program, folders, versions = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise ValueError(f"python must be an interpreter that can be run; {python!r} cannot: {said[-300:]}") from None
    folders = [folder for folder in folders if folder not in ("/usr", "/usr/local")]    # LIBRARIES has what it needs
    folders += [os.path.realpath(folder) for folder in folders] + [os.path.dirname(os.path.realpath(program))]
    libraries = filter(os.path.isabs, INHERITED.get("LD_LIBRARY_PATH", "").split(":"))
    return program, (*folders, *libraries, *LIBRARIES), versions


def _environment(program, threads, serial, gpu=None, private="/nonexistent"):
    """The environment variables of a script. serial: joblib is to use one process."""
    counts = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
    return dict(**INHERITED, PATH=f"{os.path.dirname(program)}:/usr/local/bin:/usr/bin:/bin", HOME=private,
                TMPDIR=private, USER="agent", LANG="C.UTF-8", MPLBACKEND="Agg", CUDA_VISIBLE_DEVICES=gpu or "",
                PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1", PYTHONNOUSERSITE="1", PYTHONHASHSEED="0",
                PYTHONUTF8="1", JOBLIB_MULTIPROCESSING="0" if serial else "1", **dict.fromkeys(counts, str(threads)))


# -- What holds on this machine

PROBE = """import ctypes, os, socket
def tries(name, action):
    try:
        action()
        print(name)
    except OSError:
        pass
tries("work", lambda: open("work", "w").close())
tries("read files", lambda: open(answers).read())
tries("write files", lambda: open(answers, "a").close())
tries("read another process's environment", lambda: open(f"/proc/{parent}/environ").read())
tries("signal other processes", lambda: os.kill(parent, 0))
tries("use the network", lambda: socket.create_connection(("127.0.0.1", port), 5))
if ctypes.CDLL(None).syscall(keyctl, 0, -3, 1) > 0:     # KEYCTL_GET_KEYRING_ID of the session
    print("use the kernel's keyrings")
"""
ANSWERS = {"read files", "write files", "read another process's environment"}
DENIES = {"namespaces": ANSWERS | {"signal other processes", "use the network"},
          "landlock": ANSWERS,          # and by itself, on newer kernels, the other two
          FILTER: {"use the kernel's keyrings"}}
_probing = threading.Lock()


def protection():
    """What holds on this machine, such as ("namespaces", "landlock", "seccomp"). Each is tried by a script that
    attempts what it must be denied. SandboxUnavailable: no layer holds."""
    with _probing:      # many threads may ask first
        return _probe()


@functools.cache
def _probe():
    held = []
    trouble = []
    with (socket.create_server(("127.0.0.1", 0)) as listener,
          tempfile.TemporaryDirectory(prefix="ml-agent-probe-") as folder):
        answers = Path(folder, "answers")
        answers.write_text("secret")
        work = Path(folder, "work")
        work.mkdir()
        known = {"answers": str(answers), "parent": os.getpid(), "port": listener.getsockname()[1],
                 "keyctl": supervisor.NUMBERS.get("keyctl", -1)}
        (work / "probe.py").write_text(f"globals().update({known!r})\n{PROBE}")
        for layer in (*LAYERS, FILTER):
            try:
                result = execute("probe.py", work, sandbox=layer, timeout_s=30, memory_bytes=GIB)
            except RuntimeError as error:
                trouble.append(f"{layer}: {error}")
                continue
            done = set(result.stdout.splitlines())
            could = done & DENIES[layer] if "work" in done else {"not work"}
            if could:
                trouble.append(f"{layer}: a script could {', '.join(sorted(could))}")
            else:
                held.append(layer)
    if not set(LAYERS) & set(held):
        raise SandboxUnavailable(
            f"scripts cannot be kept from the answers on this machine ({'; '.join(trouble)}). It takes user namespaces "
            "or Landlock; docs/sandbox.md says how to allow them. With `--sandbox off` scripts run unprotected, with "
            "the answers, all your files and the network in reach, and every result says so.")
    without = f" without {'; '.join(trouble)}" if trouble else ""
    print(f"sandbox: {'+'.join(held)}{without}", file=sys.stderr)
    return tuple(held)


class Slots:
    """Who may run now: with more scripts than cores, timeouts would depend on the load."""

    def __init__(self, cpus, local_rank=0):
        self.cpus = self.free = cpus
        self.local_rank = local_rank
        self.busy = set()       # names of GPUs
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, threads=1, gpus=None):
        """Waits for as many cores as the script has threads and for one of the GPUs "0,1", say; yields its name."""
        threads = min(threads, self.cpus)
        names = [name for name in (gpus or "").split(",") if name]
        if names:       # processes do not see each other's choice, so each begins with another name
            first = self.local_rank % len(names)
            names = names[first:] + names[:first]
        with self.changed:
            self.changed.wait_for(lambda: self.free >= threads and not (names and self.busy.issuperset(names)))
            gpu = next((name for name in names if name not in self.busy), None)
            self.free -= threads
            self.busy.add(gpu)
        try:
            yield gpu
        finally:
            with self.changed:
                self.free += threads
                self.busy.discard(gpu)
                self.changed.notify_all()


# of this process, for all Envs together; under torchrun the machine's processes share its cores
SLOTS = Slots(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
              int(os.environ.get("LOCAL_RANK", 0)))


# -- The processes that stand between us and a script

_servers = {}       # key of a _Server -> it, or None where one run alone has asked for it
_lock = threading.Lock()    # stop keeps it, so that no thread starts or records anything any more
_running = set()    # sockets to the supervisors


class _Server:
    """A process that imports libraries and forks a supervisor for each request, whose script is a fork as well. key:
    (interpreter, libraries, threads, serial)."""

    def __init__(self, key):
        self.key = key
        self.up = None      # whether it takes runs; None while it imports
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program, libraries, threads, serial = key
        environment = _environment(program, threads, serial)
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"      # it is not to look for a GPU
        # its program is from stdin, since a script would see the path in its frames
        with theirs, open(SUPERVISOR) as program_file:
            patiently(subprocess.Popen, [program, "-", str(theirs.fileno()), *libraries], stdin=program_file,
                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", env=environment,
                      pass_fds=[theirs.fileno()], start_new_session=True)

    def is_up(self):
        """Whether it takes runs; None while it imports. What does not work is said once."""
        if self.up is None:
            with contextlib.suppress(BlockingIOError):
                answer = self.requests.recv(1000, socket.MSG_DONTWAIT).decode() or "its process has ended"
                self.up = answer == "up"
                if not self.up:
                    print(f"scripts of {self.key[0]} start cold, each imports its libraries anew: {answer}",
                          file=sys.stderr)
        return self.up


def wall_limit(cpu_s):
    """Returns the limit by the clock that goes with one of processor time, so that no busy machine ends a script."""
    return WALL_FACTOR * (cpu_s + IMPORT_S)


def libraries_of(text):
    """What a warm server has imported for a script of that text; None: nothing."""
    return next((libraries for mention, libraries in WARM.items() if re.search(mention, text)), None)


def _warm_server(program, text, threads, serial, wait):
    """The server that has what a script of that text imports, if it is up. wait: until it is, if it can be."""
    libraries = libraries_of(text)
    if libraries is None:
        return None
    key = program, libraries, threads, serial
    while True:
        with _lock:
            if key not in _servers and not wait:
                _servers[key] = None        # one run alone is over before the libraries are imported
                return None
            server = _servers[key] = _servers.get(key) or _Server(key)
            is_up = server.is_up()
        if is_up is not None or not wait:
            return server if is_up else None
        time.sleep(0.02)


def _run(job, server=None):
    """Has a job done by a supervisor, forked from a server or started; returns its report, None if the script has
    killed or stopped it."""
    started = None
    report = None
    process = None
    connection, theirs = socket.socketpair()
    with _lock:     # stop ends it, or comes before
        _running.add(connection)
    try:
        # 1. It is started, and says so before it starts the script
        with theirs:
            if server:
                with contextlib.suppress(OSError):      # the server is gone
                    socket.send_fds(server.requests, [b"run"], [theirs.fileno()])
            else:
                process = patiently(subprocess.Popen, [sys.executable, "-I", "-S", SUPERVISOR], stdin=theirs,
                                    stdout=subprocess.DEVNULL, cwd="/", env=INHERITED, start_new_session=True)
        connection.settimeout(job["timeout_s"] + GRACE_S)
        with contextlib.suppress(OSError, ValueError):
            connection.sendall(json.dumps(job).encode() + b"\n")
            started = connection.recv(1)
            report = json.load(connection.makefile())
    finally:
        # 2. Nothing is left of it
        try:
            if report is None or "error" in report:
                connection.settimeout(GRACE_S)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)     # it ends all that it started
                    while connection.recv(1 << 16):
                        pass
                _kill_marked(job["mark"])
            connection.close()
            if process:
                process.wait()
        finally:                    # also at a second Ctrl-C: stop waits for these
            _running.remove(connection)
        discard(job["base"])
    if server and not started:
        with _lock:
            _servers.pop(server.key, None)
        return _run(job)
    if not started:
        raise RuntimeError("the process that starts scripts does not stay alive")
    # 3. What went wrong on our side
    if report and report.get("errno") in NO_SPACE:
        raise OSError(report["errno"], report["error"])
    if report and "error" in report:
        raise RuntimeError(report["error"])
    return report


def stop():
    """Ends all scripts, before this process ends. From then on no thread comes back from execute: how a script ends so
    is no result."""
    _lock.acquire()
    deadline = time.monotonic() + GRACE_S
    while _running and time.monotonic() < deadline:
        for connection in list(_running):
            with contextlib.suppress(OSError):      # it has ended meanwhile
                connection.shutdown(socket.SHUT_WR)
        time.sleep(0.01)


def _kill_marked(mark):
    """Kills the processes with this mark among their limits, a supervisor and all that its script has started."""
    killed = set()
    count = -1
    while count < len(killed):
        count = len(killed)
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if f" {mark} " in Path(f"/proc/{name}/limits").read_text():
                    os.killpg(os.getpgid(int(name)), signal.SIGKILL)    # with those that it forks meanwhile
                    killed.add(name)
        time.sleep(0.01)


def comes_again(result, gpu):
    """Returns whether the same script on the same files would end like this again."""
    if gpu and result.outcome == "out of memory":   # which another process may have had
        return False
    if result.limit:    # not of wall time, nor of processor time while the imports were slow
        return result.limit in ("memory", "processes") or result.limit == "cpu" and result.warm
    # a signal may be the kernel's, for lack of memory
    return result.exit_code >= 0 and result.outcome != "disk full"


def discard(folder):
    """Deletes a folder as remove does; what takes longer than a moment goes on in a thread."""
    thread = threading.Thread(target=remove, args=[folder])
    thread.start()
    thread.join(0.5)
    with _lock:     # for ever, if the program ends: what was read in the folder meanwhile is not whole
        pass


def remove(folder):
    """Deletes a folder, if it is there, with all that a script may have left in it. What cannot be deleted stays, and
    stderr says so.

    It is renamed first, so that its name is free at once. The folders in it are moved up before they are emptied: so
    nothing is recursive, no path grows, and no mount is entered, since the kernel does not rename one.
    """
    token = f".gone-{os.urandom(8).hex()}"
    top = os.path.join(os.path.dirname(os.path.abspath(folder)), token)
    pending = [top]
    number = 0
    try:
        os.rename(folder, top)
        while pending:
            path = pending.pop()
            with unlocked(path) as descriptor, os.scandir(descriptor) as entries:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        if path != top or entry.name != OWNER:      # goes last: by it the next program finds the rest
                            with contextlib.suppress(FileNotFoundError):    # a thread of discard was first
                                os.unlink(entry.name, dir_fd=descriptor)
                    elif not entry.name.startswith(token):
                        if not os.access(entry.name, os.W_OK, dir_fd=descriptor):   # never of a mount of another's
                            with unlocked(entry.name, descriptor):
                                pass
                        pending.append(f"{top}/{token}-{number}")
                        number += 1
                        os.rename(entry.name, pending[-1], src_dir_fd=descriptor)
            if path != top:
                os.rmdir(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(top, OWNER))
        os.rmdir(top)
    except OSError as error:
        if os.path.lexists(top) or os.path.lexists(folder):
            print(f"{folder} could not be deleted: {error}", file=sys.stderr)


@contextlib.contextmanager
def unlocked(path, parent=None):
    """Gives us all rights to a folder, and opens it. By its name a script that still runs may have put a link to a
    folder of the user's: then OSError."""
    folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{folder}", 0o700)
        descriptor = os.open(f"/proc/self/fd/{folder}", os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
