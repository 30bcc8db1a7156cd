"""Runs a script under limits, in a sandbox: execute.

A script gets a clean environment, and limits on time, memory, file size, output and processes; nothing it started
survives it. A sandbox of two layers (_supervise) keeps it from the answers, other files, other processes and the
network; each is tried before it is trusted (protection), and where none holds nothing runs, unless told so with
sandbox="off". Scripts that use numpy or torch are forked from a process that has imported them, which saves most of
their time, and live under the same layers and limits. Linux only.
"""
import atexit, contextlib, ctypes, errno, fcntl, functools, gc, glob, importlib
import inspect, itertools, json, os, platform, re, resource, select, shutil, signal, socket, stat
import struct, subprocess, sys, tempfile, threading, time, uuid, weakref
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

NO_SPACE = (27, 28, 122)    # EFBIG, ENOSPC, EDQUOT


# ---------------------------------------------------------------------------------------------------------------------
# Running a script

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
    canary_p: float | None = None       # of the graded submission, see tasks.judge
    warm: bool = False  # it was forked from a process that had the libraries imported already
    limit: str = ""     # the limit that ended it: "wall", "cpu", "memory", "processes"


class Unprotected(RuntimeError):
    """This machine cannot keep scripts from the answers; the message says why."""


class Stopped(RuntimeError):
    """A run was called off; it has no outcome."""


def execute(script, cwd, *, timeout_s, memory_bytes, cpu_s=None, python=None, sandbox="on", readable=(), hidden=(),
            output_bytes=1 << 16, file_bytes=4 << 30, processes=256, threads=1, gpu=None, warm=True, temporary=False,
            stop=None):
    """Runs `python script` in the folder `cwd` and returns its Result. When it returns, also by an exception, nothing
    that the script started is alive. Safe to call from many threads.

    timeout_s: wall seconds. cpu_s: seconds of processor time of all its processes together, those that have ended
    too; None: any. memory_bytes: memory of all its processes together, with what they keep in /dev/shm, pipes and
    sockets; without a GPU each address space is limited too, 4 GiB above it, so that one huge allocation fails inside
    the script. processes: at once; of threads there may be four times as many. python: the interpreter (default: this
    one). sandbox: "on" uses every layer that holds here, "off" none, names as in Result.sandbox those.
    readable: files and folders that the script may read beside the interpreter and the system's libraries; it may write
    to cwd and to its TMPDIR. hidden: what it must not reach. output_bytes: kept of each stream, half from the start,
    half from the end. file_bytes: the largest file it may write. threads: for OpenMP and BLAS. gpu: value of
    CUDA_VISIBLE_DEVICES; None hides all. warm: from the second script on that mentions numpy, pandas, scikit-learn or
    torch they are forked from a process that has imported these, as soon as it has; False starts each anew. temporary:
    cwd is to be deleted if we are killed meanwhile. stop: a threading.Event; once it is set the script is ended.
    ValueError: no such script, folder or interpreter, or something hidden lies where the script may read. RuntimeError:
    not on Linux, or the interpreter does not start. OSError: no space is left. Unprotected: see protection. Stopped:
    stop was set.
    """
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"scripts can be executed on Linux only (they are supervised through /proc); "
                           f"this is {sys.platform}")
    if sandbox not in ("on", "off") and not {*LAYERS, FILTER}.issuperset(sandbox.split("+")):
        raise ValueError(f"sandbox must be 'on' or 'off'; found {sandbox!r}")
    cwd = os.path.realpath(cwd)
    if not os.path.isfile(os.path.join(cwd, script)):
        raise ValueError(f"there is no script {script!r} in {cwd}")
    program, folders, _ = describe(python or sys.executable)
    folders = [*folders, *map(str, readable)]
    layers = protection() if sandbox == "on" else () if sandbox == "off" else tuple(sandbox.split("+"))
    if not layers and hidden and "off" not in _seen:     # without anything hidden the script is our own
        print("sandbox off: scripts run as this user, with its files, the answers and the network in reach",
              file=sys.stderr)
        _seen.add("off")
    for secret, folder in itertools.product(hidden if layers else (), [*folders, cwd]):
        if Path(secret).resolve().is_relative_to(os.path.realpath(folder)):
            raise ValueError(f"{secret} must be kept from scripts, but lies below {folder}, which they may read; keep "
                             "the prepared data (--data) somewhere else")

    base = os.path.join(tempfile.gettempdir(), f"ml-agent-tmp-{uuid.uuid4().hex}")
    private = os.path.join(base, "tmp")
    shown = [(path, "read") for path in folders] + [(path, "device") for path in DEVICES]
    if gpu:
        shown += [(path, "read") for pattern in GPU_LIBRARIES for path in glob.glob(pattern)]
        shown += [(path, "device") for pattern in GPU_DEVICES for path in glob.glob(pattern)]
    shown = {path: right for path, right in shown if os.path.exists(path)} | {cwd: "write", private: "write"}
    # a name that starts with "-" is no option of the interpreter
    command = [program, f"./{script}" if script.startswith("-") else script]
    serial = bool(layers) and "namespaces" not in layers        # no /dev/shm and so no semaphores
    variables = _environment(program, threads, serial, gpu, private)
    with open(os.path.join(cwd, script), "rb") as file:
        key = _warm_key(program, file.read(1 << 20), threads, serial) if warm else None
    job = dict(command=command, cwd=cwd, env=variables, layers=layers,
               timeout_s=float(timeout_s), cpu_s=cpu_s, memory_bytes=int(memory_bytes), output_bytes=output_bytes,
               filter=_filter(layers, gpu), keyctl=_number(250, 219), perf=_number(298, 241),
               file_bytes=file_bytes, address_bytes=0 if gpu else int(memory_bytes) + (4 << 30), processes=processes,
               mark=uuid.uuid4().int >> 67, root=os.path.join(base, "root"), temporary=temporary,
               proc=PROC, masked=MASKED,
               shared_bytes=int(memory_bytes) // 2, shown=sorted(shown.items()))    # a folder before what is in it
    started, layers = time.monotonic(), "+".join(layers) or "off"
    report, warm = _run(job, key, stop)
    if report is None:
        return Result("killed", -9, "", "", time.monotonic() - started, 0, layers, "It attacked its supervisor.",
                      warm=warm)
    exit_code, why, seconds, peak, oom, *streams = report
    # of a line that was written over, as progress bars do, a terminal shows the last state
    stdout, stderr = ("\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")) for text in streams)
    if cpu_s and exit_code == -signal.SIGXCPU:
        why = "cpu"
    limits = {"wall": ("timeout", f"It ran longer than its limit of {timeout_s:.3g} s."),
              "cpu": ("timeout", f"It used more than its limit of {cpu_s or 0:.3g} s of processor time."),
              "memory": ("out of memory", f"It used more than its limit of {memory_bytes / 2**30:.2f} GiB."),
              "processes": ("too many processes",
                            f"It had more than {processes} processes, or {4 * processes} threads.")}
    outcome, detail = limits[why] if why else _outcome(exit_code, oom, stderr)
    return Result(outcome, exit_code, stdout, stderr, seconds, peak, layers, detail, warm=warm, limit=why)


def _outcome(exit_code, oom, stderr):
    """(outcome, detail) of a script that ended within its limits. oom: meanwhile the kernel has killed some process for
    lack of memory.

    It is told from what the kernel reports and, for exit code 1, from the line `Type: message` of the traceback that
    ends the error stream, the first that is not indented after Python's own header. So words that a script prints do
    not count. It can raise MemoryError for no reason; that is worth 0.5, no more than doing nothing.
    """
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
    if name.endswith(("MemoryError", "OutOfMemoryError")) or name in ("OSError", "RuntimeError") and re.search(
            r"\[Errno 12\]|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory", message):
        return "out of memory", line
    # file too large, no space, quota; the last is numpy's own wording
    if name == "OSError" and re.match(r"\[Errno (27|28|122)\]|\d+ requested and \d+ written", message):
        return "disk full", line
    return "error", line


# what scripts may see beside the interpreter: not all of /usr, since some keep their own work there
LIBRARIES = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32",
             "/usr/lib64", "/usr/libexec", "/usr/include", "/usr/share", "/usr/local/bin", "/usr/local/lib",
             "/usr/local/lib64", "/usr/local/share", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/etc/fonts",
             "/etc/alternatives", "/sys/devices/system", "/sys/fs/cgroup/cpu.max",
             "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us")
DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")    # not zero: shared, it is memory of nobody
GPU_LIBRARIES = ("/sys", "/usr/local/cuda*", "/opt/rocm*", "/etc/OpenCL", "/run/opengl-driver")
GPU_DEVICES = ("/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/dxg")
PROC = tuple(f"/proc/{name}" for name in ("cpuinfo", "meminfo", "stat", "loadavg", "version", "filesystems", "devices",
                                          "driver", "sys/vm", "sys/kernel/osrelease"))    # what tells of no process
MASKED = tuple(f"/proc/{name}" for name in ("keys", "key-users", "timer_list", "sched_debug", "kcore"))   # the user's
ABOUT_PYTHON = """import importlib.metadata as metadata, json, sys
found = sorted({f"{each.metadata['Name']}=={each.version}" for each in metadata.distributions()})
print(json.dumps([sys.executable, [sys.prefix, sys.base_prefix, sys.exec_prefix], [sys.version, *found]]))"""


@functools.cache
def describe(python):
    """(executable, all it needs to read, versions of itself and of its packages) of an interpreter. ValueError: it
    cannot be run."""
    try:
        done = subprocess.run([shutil.which(python) or python, "-c", ABOUT_PYTHON], env={"PYTHONNOUSERSITE": "1"},
                              cwd="/", capture_output=True, text=True, check=True, timeout=60)
        program, folders, versions = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ValueError(f"python must be an interpreter that can be run; {python!r} cannot: {error}") from None
    folders = [each for each in folders if each not in ("/usr", "/usr/local")]  # of those LIBRARIES has what it needs
    folders += [os.path.realpath(each) for each in folders] + [os.path.dirname(os.path.realpath(program))]
    libraries = filter(os.path.isabs, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    return program, (*folders, *libraries, *LIBRARIES), versions


def _environment(program, threads, serial, gpu=None, private="/nonexistent"):
    """The environment variables of a script. serial: joblib is to use one process."""
    inherited = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # some CUDA set-ups
    counts = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
    return dict(**inherited, PATH=f"{os.path.dirname(program)}:/usr/local/bin:/usr/bin:/bin", HOME=private,
                TMPDIR=private, USER="agent", LANG="C.UTF-8", MPLBACKEND="Agg", CUDA_VISIBLE_DEVICES=gpu or "",
                PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1", PYTHONNOUSERSITE="1", PYTHONHASHSEED="0",
                PYTHONUTF8="1", JOBLIB_MULTIPROCESSING="0" if serial else "1", **dict.fromkeys(counts, str(threads)))


LAYERS = ("namespaces", "landlock")     # each is enough to hide the answers
FILTER = "seccomp"                      # goes with either, for what they leave open
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

# What the filter (seccomp) refuses, by reason: system call -> its number on x86_64, on aarch64; -1: there is none.
REFUSED = (
    # keyrings: the user's secrets, and a place where things outlive a run
    dict(add_key=(248, 217), request_key=(249, 218), keyctl=(250, 219)),
    # memory and messages that belong to no process
    dict(shmget=(29, 194), shmat=(30, 196), shmctl=(31, 195), shmdt=(67, 197), semget=(64, 190), semop=(65, 193),
         semtimedop=(220, 192), semctl=(66, 191), msgget=(68, 186), msgsnd=(69, 189), msgrcv=(70, 188),
         msgctl=(71, 187), mq_open=(240, 180), mq_unlink=(241, 181), mq_timedsend=(242, 182),
         mq_timedreceive=(243, 183), mq_notify=(244, 184), mq_getsetattr=(245, 185), io_setup=(206, 0),
         io_destroy=(207, 1), io_getevents=(208, 4), io_submit=(209, 2), io_cancel=(210, 3), vmsplice=(278, 75)),
    # memory and descriptors of other processes
    dict(ptrace=(101, 117), process_vm_readv=(310, 270), process_vm_writev=(311, 271), kcmp=(312, 272),
         pidfd_getfd=(438, 438), process_madvise=(440, 440), process_mrelease=(448, 448), get_robust_list=(274, 100)),
    # mounts and namespaces, files by number instead of by path
    dict(mount=(165, 40), umount2=(166, 39), pivot_root=(155, 41), chroot=(161, 51), open_tree=(428, 428),
         move_mount=(429, 429), fsopen=(430, 430), fsconfig=(431, 431), fsmount=(432, 432), fspick=(433, 433),
         mount_setattr=(442, 442), open_tree_attr=(467, 467), unshare=(272, 97), setns=(308, 268),
         open_by_handle_at=(304, 265), quotactl=(179, 60), quotactl_fd=(443, 443)),
    # the machine
    dict(kexec_load=(246, 104), kexec_file_load=(320, 294), init_module=(175, 105), finit_module=(313, 273),
         delete_module=(176, 106), swapon=(167, 224), swapoff=(168, 225), reboot=(169, 142), acct=(163, 89),
         syslog=(103, 116), settimeofday=(164, 170), clock_settime=(227, 112), sethostname=(170, 161),
         setdomainname=(171, 162), personality=(135, 92)),
    # what a script has no use for and kernels had holes in
    dict(bpf=(321, 280), perf_event_open=(298, 241), userfaultfd=(323, 282), io_uring_setup=(425, 425),
         io_uring_enter=(426, 426), io_uring_register=(427, 427), fanotify_init=(300, 262), vhangup=(153, 58),
         lookup_dcookie=(212, 18), modify_ldt=(154, -1), iopl=(172, -1), ioperm=(173, -1), uselib=(134, -1)))
# without a GPU, whose driver may need them: files in memory
REFUSED_CPU = (dict(memfd_create=(319, 279), memfd_secret=(447, 447)),)
# with Landlock alone, which knows neither who is called on a socket nor the attributes of files
REFUSED_ALONE = (
    dict(setsid=(112, 157), setpgid=(109, 154)),    # one signal to the group ends all, however fast they fork
    dict(connect=(42, 203), inotify_add_watch=(254, 27)),       # which tells the names of what it must not list
    dict(chown=(92, -1), fchown=(93, 55), lchown=(94, -1), fchownat=(260, 54), setxattr=(188, 5), lsetxattr=(189, 6),
         fsetxattr=(190, 7), setxattrat=(463, 463), removexattr=(197, 14), lremovexattr=(198, 15),
         fremovexattr=(199, 16), removexattrat=(466, 466), file_setattr=(469, 469)))
# done by nobody but reported as done: to copy a file with its mode and times must not fail
IGNORED_ALONE = (dict(chmod=(90, -1), fchmod=(91, 52), fchmodat=(268, 53), fchmodat2=(452, 452), utime=(132, -1),
                      utimes=(235, -1), futimesat=(261, -1), utimensat=(280, 88)),)
# refused by the value of an argument: (call, numbers, which argument, bits of it, "is" or "is not", value)
ARGUMENTS = (
    ("prlimit64", (302, 261), 0, ~0, "is not", 0),                  # limits of another process
    ("prlimit64", (302, 261), 1, ~0, "is", 15), ("setrlimit", (160, 164), 0, ~0, "is", 15),     # RLIMIT_RTTIME
    *(("clone", (56, 220), 0, 1 << bit, "is", 1 << bit) for bit in (17, 25, 26, 27, 28, 29, 30)),   # namespaces
    ("socket", (41, 198), 0, ~0, "is not", socket.AF_UNIX), ("socketpair", (53, 199), 0, ~0, "is not", socket.AF_UNIX),
    ("setsockopt", (54, 208), 2, ~0, "is", socket.SO_SNDBUF), ("setsockopt", (54, 208), 2, ~0, "is", socket.SO_RCVBUF),
    ("fcntl", (72, 25), 1, ~0, "is", 1031),                         # F_SETPIPE_SZ: pipes hold memory too
    # F_SETLEASE, F_SET_RW_HINT, F_SET_FILE_RW_HINT: what can be left on public data
    *(("fcntl", (72, 25), 1, ~0, "is", number) for number in (1024, 1036, 1038)),
    ("mmap", (9, 222), 3, 0x40000, "is", 0x40000))                  # MAP_HUGETLB: not counted as resident
ARGUMENTS_CPU = (("mmap", (9, 222), 3, 0x21, "is", 0x21),)          # MAP_SHARED | MAP_ANONYMOUS: may be kept unmapped
ARGUMENTS_ALONE = (
    *((call, numbers, 0, ~0, "is not", 0) for call, numbers in dict(
        sched_setaffinity=(203, 122), sched_setparam=(142, 118), sched_setscheduler=(144, 119),
        sched_setattr=(314, 274), migrate_pages=(256, 238), move_pages=(279, 239), setpriority=(141, 140)).items()),
    ("setpriority", (141, 140), 1, ~0, "is not", 0), ("ioprio_set", (251, 30), 0, ~0, "is not", 1),
    ("ioprio_set", (251, 30), 1, ~0, "is not", 0),                  # all of other processes
    ("socket", (41, 198), 1, 2, "is", 2), ("socketpair", (53, 199), 1, 2, "is", 2),     # datagrams need no connection
    ("ioctl", (16, 29), 1, ~0, "is", 0x40086602), ("ioctl", (16, 29), 1, ~0, "is", 0x401c5820))     # chattr
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # which number of the pairs above, AUDIT_ARCH
LAST_CALL = 469     # a later one is to the script as on an older kernel, and so are those of the x32 ABI


def _number(*numbers):
    """Of the numbers of a system call that of this machine; -1 where it is not known."""
    return numbers[MACHINES[platform.machine()][0]] if platform.machine() in MACHINES else -1


def _filter(layers, gpu):
    """The program of the filter, in hexadecimal: sock_filter structures. Without layers it only keeps the mark of a
    run. "": the numbers of this machine's system calls are not known."""
    if platform.machine() not in MACHINES:
        return ""
    (which, arch), alone = MACHINES[platform.machine()], "namespaces" not in layers
    refuse, ignore, unknown = 0x50000 | errno.EPERM, 0x50000, 0x50000 | errno.ENOSYS    # SECCOMP_RET_ERRNO
    load, equal, above, mask, done = 0x20, 0x15, 0x25, 0x54, 0x06                       # of BPF
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (done, 0, 0, refuse), (load, 0, 0, 0),
               (above, 0, 1, LAST_CALL), (done, 0, 0, unknown), (equal, 0, 1, 435), (done, 0, 0, unknown)]  # clone3
    calls = [(refuse, REFUSED), (refuse, () if gpu else REFUSED_CPU), (refuse, REFUSED_ALONE if alone else ()),
             (ignore, IGNORED_ALONE if alone else ())]
    arguments = [*ARGUMENTS, *(() if gpu else ARGUMENTS_CPU), *(ARGUMENTS_ALONE if alone else ())]
    if not layers:
        calls, arguments = [], [each for each in ARGUMENTS if each[5] == 15]
    for answer, groups in calls:
        for number in [numbers[which] for group in groups for numbers in group.values() if numbers[which] >= 0]:
            program += [(equal, 0, 1, number), (done, 0, 0, answer)]
    for _, numbers, index, bits, relation, value in arguments:      # the kernel reads the low half of these arguments
        program += [(equal, 0, 5, numbers[which]), (load, 0, 0, 16 + 8 * index), (mask, 0, 0, bits & 0xFFFFFFFF),
                    (equal, 0, 1, value) if relation == "is" else (equal, 1, 0, value), (done, 0, 0, refuse),
                    (load, 0, 0, 0)]
    program.append((done, 0, 0, 0x7FFF0000))                        # SECCOMP_RET_ALLOW
    return b"".join(struct.pack("=HBBI", *each) for each in program).hex()


def protection():
    """What holds on this machine, such as ("namespaces", "landlock", "seccomp"). Each is tried by a script that
    attempts what it must be denied. Unprotected: there is no layer; the message says why, and what can be done."""
    with _probing:      # many threads may ask first
        return _probe()


@functools.cache
def _probe():
    held, trouble = [], []
    with tempfile.TemporaryDirectory(prefix="ml-agent-probe-") as folder, socket.create_server(("127.0.0.1", 0)) as own:
        answers, work = Path(folder, "answers"), Path(folder, "work")
        answers.write_text("secret")
        work.mkdir()
        known = {"answers": str(answers), "parent": os.getpid(), "port": own.getsockname()[1],
                 "keyctl": _number(250, 219)}
        (work / "probe.py").write_text(f"globals().update({known!r})\n{PROBE}")
        for layer in (FILTER, *LAYERS):
            try:
                result = execute("probe.py", work, sandbox=layer, timeout_s=30, memory_bytes=1 << 30)
            except RuntimeError as error:
                trouble.append(f"{layer}: {error}")
                continue
            done = set(result.stdout.splitlines())
            if "work" in done and not done & DENIES[layer]:
                held.append(layer)
            else:
                could = done & DENIES[layer] if "work" in done else ["not work"]
                trouble.append(f"{layer}: a script could {', '.join(sorted(could))}")
    held.sort(key=(*LAYERS, FILTER).index)
    if not set(LAYERS) & set(held):
        raise Unprotected(
            f"scripts cannot be kept from the answers on this machine ({'; '.join(trouble)}). One of two layers is "
            "needed: user namespaces (in a container allow them, as with `docker run --security-opt "
            "seccomp=unconfined`; on Ubuntu 24.04 `sysctl kernel.apparmor_restrict_unprivileged_userns=0`), or "
            "Landlock (Linux 5.13 or later with landlock in /sys/kernel/security/lsm). With `--sandbox off` scripts "
            "run unprotected: they can read the answers and all your files, write where you can write and use the "
            "network, and every result says so.")
    print(f"sandbox: {'+'.join(held)}{' without ' * bool(trouble)}{'; '.join(trouble)}", file=sys.stderr)
    return tuple(held)


class Slots:
    """Who may run now. With more scripts at once than the machine has cores, timeouts would depend on the load."""

    def __init__(self, cpus):
        self.cpus, self.free, self.busy, self.changed = cpus, cpus, set(), threading.Condition()

    @contextlib.contextmanager
    def take(self, threads=1, gpus=None, stop=None):
        """Waits for as many cores as the script has threads and for one of the GPUs, "0,1" say; gives the GPU's name,
        None without GPUs. Stopped: the event `stop` was set meanwhile."""
        threads, names = min(threads, self.cpus), [name for name in (gpus or "").split(",") if name]
        with self.changed:
            while self.free < threads or names and self.busy.issuperset(names):
                if stop and stop.is_set():
                    raise Stopped("the run was called off before it began")
                self.changed.wait(0.1 if stop else None)
            gpu = next((name for name in names if name not in self.busy), None)
            self.free -= threads
            self.busy |= {gpu} - {None}
        try:
            yield gpu
        finally:
            with self.changed:
                self.free += threads
                self.busy -= {gpu}
                self.changed.notify_all()


# of this process, for all Envs together; under torchrun the machine's processes share its cores
SLOTS = Slots(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def execute_many(jobs, gpus=None, stop=None):
    """Runs many scripts, as many at once as there are slots, and yields (index, Result) as they end. jobs: dicts with
    the arguments of execute; taken from the iterable as slots come free, so it may be endless. gpus: "0,1", of which
    each script gets one. To close the generator, or to set the threading.Event `stop`, ends what runs; then Stopped is
    raised. What execute raises for one job ends the others too."""
    stop, jobs, running = stop or threading.Event(), enumerate(jobs), set()

    def run(index, job):
        with SLOTS.take(job.get("threads", 1), gpus, stop) as gpu:
            return index, execute(**job, gpu=gpu, stop=stop)
    with futures.ThreadPoolExecutor(SLOTS.cpus) as pool:
        try:
            while True:
                running |= {pool.submit(run, *each) for each in itertools.islice(jobs, SLOTS.cpus - len(running))}
                if not running:
                    return
                done, running = futures.wait(running, return_when=futures.FIRST_COMPLETED)
                for each in done:
                    yield each.result()
        finally:
            stop.set()


# ---------------------------------------------------------------------------------------------------------------------
# The processes that stand between us and a script. To start an interpreter for each run would take longer than all the
# rest, so supervisors are forked from a server: a bare one, or a warm one that has imported libraries.

# what a warm one imports, by what a script's text mentions; torch.optim would import the last one when it is used
TABLES = ("numpy", "pandas", "scipy.sparse", "sklearn.ensemble", "sklearn.linear_model", "sklearn.neural_network",
          "sklearn.model_selection", "sklearn.pipeline", "sklearn.feature_extraction.text")
WARM = {rb"\btorch": (*TABLES, "torch", "torch._dynamo"), rb"\b(numpy|pandas|scipy|sklearn)\b": TABLES}
_servers, _lock = {}, threading.Lock()      # None: the bare one; (interpreter, libraries, threads, serial): a warm one
_seen = set()       # the keys of runs that a warm one could have taken; "off" once that was said


def _patiently(start, seconds=10):
    """What `start` returns, which starts a process. Where there is no room for one, as beside a script's fork bomb, it
    is tried again for so many seconds; then RuntimeError."""
    ended = time.monotonic() + seconds
    while True:
        try:
            return start()
        except OSError as error:
            if error.errno not in (11, 12):     # EAGAIN, ENOMEM
                raise
            if time.monotonic() > ended:
                raise RuntimeError(f"no process can be started on this machine ({error.strerror}): it has too many, or "
                                   "too little memory") from None
        time.sleep(0.1)


class _Server:
    """A process that runs _serve; its source is sent to another interpreter."""

    def __init__(self, key):
        self.key, self.up = key, True if key is None else None    # whether it takes runs; None while it imports
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        imports = ("import atexit, contextlib, ctypes, fcntl, gc, importlib, json, os, resource, select, signal, "
                   "socket, stat, struct, sys, time, weakref")
        source = "\n".join([imports, *map(inspect.getsource, (_patiently, _remove, _supervise, _import, _be_script,
                                                           _serve)),
                            f"_be_script(_serve({theirs.fileno()}, {key and key[1]!r}))"])
        # the warm one has the flags of `python script`, and is not to look for a GPU
        command = [key[0], "-c", source] if key else [sys.executable, "-I", "-S", "-c", source]
        env = {**_environment(key[0], *key[2:]), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"} if key else {}
        with theirs:
            _patiently(lambda: subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", env=env,
                stderr=subprocess.DEVNULL if key else None, pass_fds=[theirs.fileno()], start_new_session=True))

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


def _warm_key(program, text, threads, serial):
    """The key of the server that is to take a script of that text: a warm one that is up, else None, the bare one."""
    libraries = next((libraries for mention, libraries in WARM.items() if re.search(mention, text)), None)
    key = program, libraries, threads, serial
    with _lock:
        if libraries and key not in _servers and key in _seen:     # one run alone is over before they are imported
            _servers[key] = _Server(key)
        _seen.add(key)
        return key if key in _servers and _servers[key].is_up() else None


def _request(key, what=b"run"):
    """Has the server of that key fork a supervisor, or the bare one if it is gone; or have it delete the folder `what`.
    Returns the new process's id, a socket to it, and whether it is warm."""
    for _ in range(5):
        ours, theirs = socket.socketpair()
        with theirs, _lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            key = key if key in _servers else None
            server = _servers[key] = _servers.get(key) or _Server(key)
            socket.send_fds(server.requests, [what], [theirs.fileno()])
        if answer := ours.recv(1000):
            if answer.strip().isdigit():
                return int(answer), ours, key is not None
            ours.close()
            raise RuntimeError(answer.decode())
        ours.close()
        with _lock:     # somebody has killed the server
            if _servers.get(key) is server:
                _servers.pop(key).requests.close()
    raise RuntimeError("the process that starts scripts does not stay alive")


def _run(job, key, stop=None):
    """Has a job done by a supervisor; returns (its report, or None if the script has killed it; whether it was
    warm). Stopped: the event `stop` was set meanwhile. OSError: there is no space left for the run's folders."""
    supervisor, connection, warm = _request(key)
    report, base = None, os.path.dirname(job["root"])
    try:
        with contextlib.suppress(ConnectionError, TimeoutError, ValueError):    # it was killed, or stopped
            connection.sendall(json.dumps(job).encode() + b"\n")
            connection.settimeout(10)
            ended = time.monotonic() + job["timeout_s"] + 30
            while not select.select([connection], [], [], 0.1 if stop else 1)[0]:
                if stop and stop.is_set():
                    raise Stopped("the run was called off")
                if time.monotonic() > ended or _is_stopped(supervisor):
                    raise TimeoutError
            report, base = json.load(connection.makefile())
    finally:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)     # which tells it to end all
        try:
            if _is_stopped(supervisor):
                raise TimeoutError
            while connection.recv(1 << 16):
                pass
        except (ConnectionError, TimeoutError):
            with contextlib.suppress(ProcessLookupError):
                os.kill(supervisor, signal.SIGKILL)
        connection.close()
        if not isinstance(report, list):
            _kill_marked(job["mark"])
        _discard(base)
    if isinstance(report, dict):
        full = report["errno"] in NO_SPACE
        raise OSError(report["errno"], report["error"]) if full else RuntimeError(report["error"])
    return report, warm


def _is_stopped(pid):
    """Whether somebody has stopped the process, which then will not answer."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] in b"Tt"
    return False


_deleting = []      # sockets to the processes that delete what took us too long


def _discard(folder):
    """Deletes a folder as _remove does. What takes longer than a moment is left to a process, which at the end of this
    one is waited for."""
    if rest := folder and _remove(folder, 0.5):
        try:
            _deleting.append(_request(None, os.fsencode(rest))[1])
        except RuntimeError:        # no process can be started
            _remove(rest)
        done = select.select(_deleting, [], [], 0)[0]
        _deleting[:] = [each for each in _deleting if each not in done]


@atexit.register
def _wait_for_deleting():
    for each in _deleting:
        with contextlib.suppress(OSError):
            each.recv(1)


def _kill_marked(mark):
    """Kills the processes with this mark among their limits: the second net, if a script killed its supervisor."""
    killed, found = set(), None
    while found != killed:
        killed |= found or set()
        found = set(killed)
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if f" {mark} " in Path(f"/proc/{name}/limits").read_text():
                    group = os.getpgid(int(name))       # at once with those that it forks meanwhile
                    os.kill(-group if group != os.getpgrp() else int(name), signal.SIGKILL)
                    found.add(int(name))
        time.sleep(0.01)


def _remove(folder, seconds=1e9):
    """Deletes a folder, if it is there, with all that a script may have left in it. Never raises: what cannot be
    deleted stays, and is said on stderr. Returns "", or when `seconds` are over the path of what is left.

    The folder is renamed first, so that its name is free at once. Folders in it are moved up into it before they are
    emptied: so nothing is recursive, no path grows, two descriptors are enough, and no other file system is entered,
    since the kernel does not rename a mount. No link is followed.
    """
    token, number, pending, trouble, ended = f".gone-{os.urandom(8).hex()}-", 0, [], [], time.monotonic() + seconds
    (above, name), libc = os.path.split(folder), ctypes.CDLL(None)

    def loosen(name, parent):
        """Takes away what a script may have put on an entry or its folder: a mount, a mode, the flags of chattr."""
        def plain(file):
            with contextlib.suppress(OSError):
                flags = bytearray(8)
                fcntl.ioctl(file, 0x80086601, flags)                        # FS_IOC_GETFLAGS
                flags[0] &= ~0x30                                           # immutable, append only
                fcntl.ioctl(file, 0x40086602, flags)                        # FS_IOC_SETFLAGS

        libc.umount2(b"/proc/self/fd/%d/%s" % (parent, os.fsencode(name)), 2 | 8)   # MNT_DETACH | UMOUNT_NOFOLLOW
        plain(parent)
        with contextlib.suppress(OSError):
            entry = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent)
            try:
                mode, itself = os.fstat(entry).st_mode, f"/proc/self/fd/{entry}"
                if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
                    with contextlib.suppress(OSError):
                        os.chmod(itself, 0o700)
                    file = os.open(itself, os.O_RDONLY)
                    plain(file)
                    os.close(file)
                    os.chmod(itself, 0o700)
            finally:
                os.close(entry)

    def tried(action, name, parent, **more):
        """Whether the action on an entry succeeded, or the entry is gone."""
        for again in (False, True):
            try:
                action(name, **more)
            except FileNotFoundError:
                pass
            except OSError as error:
                if again:
                    trouble.append(error)
                    return False
                loosen(name, parent)
                continue
            return True

    def opened(name, parent):
        """A descriptor of a folder."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            return os.open(name, flags, dir_fd=parent)
        except OSError:
            loosen(name, parent)
            return os.open(name, flags, dir_fd=parent)

    def empty(name, top, moved):
        """Deletes the files of a folder in `top`, or of `top` itself, and moves its folders up. False: time is up."""
        nonlocal number
        here = opened(name, top)
        try:
            os.fchmod(here, 0o700)
            with os.scandir(here) as entries:
                for entry in entries:
                    if time.monotonic() > ended:
                        return False
                    if not entry.is_dir(follow_symlinks=False):
                        tried(os.unlink, entry.name, here, dir_fd=here)
                    elif name != "." or not entry.name.startswith(moved):
                        with contextlib.suppress(OSError):
                            os.rmdir(entry.name, dir_fd=here)
                            continue
                        number += 1
                        to = f"{moved}{number}"
                        if tried(os.rename, entry.name, here, dst=to, src_dir_fd=here, dst_dir_fd=top):
                            pending.append(to)
        finally:
            os.close(here)
        return True

    if not os.path.lexists(folder):
        return ""
    try:
        parent = os.open(above, os.O_PATH | os.O_DIRECTORY)
        try:
            tried(os.rename, name, parent, dst=token, src_dir_fd=parent, dst_dir_fd=parent)
            if not stat.S_ISDIR(os.lstat(token, dir_fd=parent).st_mode):
                os.unlink(token, dir_fd=parent)
                return ""
            top = opened(token, parent)
            try:
                for turn in range(10):      # files may appear while we delete
                    pending.append(".")
                    while pending:
                        name = pending.pop()
                        try:
                            if not empty(name, top, f"{token}{turn}-"):
                                return os.path.join(above, token)
                        except OSError as error:
                            trouble.append(error)
                        if name != ".":
                            tried(os.rmdir, name, top, dir_fd=top)
                    if tried(os.rmdir, token, parent, dir_fd=parent):
                        return ""
            finally:
                os.close(top)
        finally:
            os.close(parent)
    except OSError as error:
        trouble.append(error)
    print(f"{folder} could not be deleted: {trouble[0]}", file=sys.stderr)
    return ""


def _supervise(job):
    """The work of the small process that stands between us and one script: runs it and returns (exit code, why it was
    stopped or "", seconds, peak bytes, whether the kernel killed for lack of memory, stdout, stderr), or None when our
    parent is gone, which the end of its standard input tells. RuntimeError: the script could not be started, or a layer
    not be put up.

    A script is an interpreter that is started anew or, with job["warm"], a fork of this process: then the function
    returns in the script's process too, and what it returns there is the job (_be_script).

    Two layers keep the script in, each enough to hide the answers, and job["layers"] names those to put up.
    namespaces: the script's parent is process 1 of a world of its own: no other processes, no network, and a file tree
    in which job["shown"] is all there is. When process 1 ends, the kernel ends all others with it.
    landlock: the script may open what lies below job["shown"] and nothing else, may not connect, and may not signal
    anyone outside. It holds for root too. Either way it has no capability and cannot gain one, and
    seccomp: the kernel refuses the calls of job["filter"].

    Without namespaces this process adopts every orphan below it (a child subreaper): who double-forks or calls setsid
    stays its descendant, and the kernel's "no child left" is the proof that nothing survived.
    """
    libc, boxed = ctypes.CDLL(None, use_errno=True), "namespaces" in job["layers"]
    NO_SUCH_FOLDER = -100   # AT_FDCWD; the paths are absolute

    def call(function, *values):
        """Calls the C function of that name or the system call of that number; OSError if it fails."""
        values = [ctypes.c_long(each) if isinstance(each, int) else os.fsencode(each) if isinstance(each, str) else each
                  for each in values]
        done = libc.syscall(ctypes.c_long(function), *values) if isinstance(function, int) else (
            getattr(libc, function)(*values))
        if done < 0:
            raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
        return done

    def put(path, text):
        with open(path, "w") as file:
            file.write(text)

    def enter_namespaces():
        """User, network and IPC namespaces for this process, and a PID namespace for its children."""
        uid, gid = os.geteuid(), os.getegid()
        call("unshare", 0x10000000 | 0x40000000 | 0x08000000 | 0x20000000)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            put(f"/proc/self/{name}", text)

    def build_root():
        """Makes the file tree in a mount namespace of our own and enters it. Returns whether /proc is a fresh one."""
        root, bind = job["root"], 0x1000 | 0x4000                           # MS_BIND | MS_REC
        call("unshare", 0x20000)                                            # CLONE_NEWNS
        call("mount", None, "/", None, 0x4000 | 0x40000, None)              # MS_REC | MS_PRIVATE: nothing comes or goes
        call("mount", "tmpfs", root, "tmpfs", 2 | 4, "mode=755,size=1m")    # MS_NOSUID | MS_NODEV

        def show(path):
            target = root + path
            os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
            if not os.path.exists(target):
                put(target, "")
            call("mount", path, target, None, bind, None)

        def protect(target, add, clear):
            call(442, NO_SUCH_FOLDER, target, 0x8000, (ctypes.c_uint64 * 4)(add, clear), 32)  # mount_setattr, recursive

        for path, _ in job["shown"]:
            show(path)
        os.makedirs(f"{root}/proc", exist_ok=True)
        fresh = True
        try:
            call("mount", "proc", f"{root}/proc", "proc", 2 | 4 | 8, None)
        except OSError:     # inside a container whose own /proc is masked
            fresh = False
            for path in job["proc"]:
                show(path)
        for path in job["masked"]:
            with contextlib.suppress(OSError):
                call("mount", "/dev/null", root + path, None, bind, None)
        with contextlib.suppress(OSError):      # holds for root too: from Linux 6.14 on, each world has its own
            put(f"{root}/proc/sys/kernel/pid_max", str(max(400, 4 * job["processes"])))
        os.makedirs(f"{root}/dev/shm", exist_ok=True)
        protect(root, 1 | 2, 0)                                             # read-only, no set-uid programs
        call("mount", "tmpfs", f"{root}/dev/shm", "tmpfs", 2 | 4, f"mode=1777,size={job['shared_bytes']}")
        shared = os.open(f"{root}/dev/shm", os.O_PATH)
        socket.send_fds(ready[1], [b"shared"], [shared])                    # so that it can be counted
        os.close(shared)
        for path, rights in job["shown"]:
            if rights == "write":
                protect(root + path, 0, 1)
        os.chroot(root)     # this also forbids namespaces below this one
        return fresh

    def lock(fresh):
        """Landlock, as far as this kernel knows it. Raises OSError where it does not."""
        abi = call(444, None, 0, 1)                                         # landlock_create_ruleset: the version
        every = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
        rights = {"read": 1 | 4 | 8, "device": 2 | 4 | 8 | 1 << 14 | 1 << 15, "write": every & ~(1 << 6 | 1 << 11)}
        of_files = 1 | 2 | 4 | 1 << 14 | 1 << 15                            # the others have a meaning for folders only
        handled = (ctypes.c_uint64 * 3)(every, 3, 3)                        # TCP; signals and abstract sockets
        rules = call(444, handled, 24 if abi >= 6 else 16 if abi >= 4 else 8, 0)
        own = ["/proc"] if fresh else ["/proc/self", *job["proc"]]
        for path, right in [*job["shown"], *((path, "read") for path in own), ("/dev/shm", "write" if boxed else "")]:
            if right and os.path.exists(path):
                allowed, file = rights[right] & every, os.open(path, os.O_PATH | os.O_CLOEXEC)
                allowed &= every if os.path.isdir(path) else of_files
                call(445, rules, 1, allowed.to_bytes(8, sys.byteorder) + file.to_bytes(4, sys.byteorder), 0)
        call(446, rules, 0)                                                 # landlock_restrict_self

    def be_first(script):
        """Process 1: adopts orphans, tells the script's status and ends, and all others with it."""
        call("prctl", 4, 0, 0, 0, 0)                                        # PR_SET_DUMPABLE: nobody traces us
        os.closerange(0, ended[1])
        os.closerange(ended[1] + 1, 1 << 16)
        while True:
            pid, status = os.wait()
            if pid == script:
                os.write(ended[1], b"%d" % status)
                os._exit(0)

    def rename():
        """Gives this fork the environment of the script, and its command in /proc."""
        os.environ.clear()
        os.environ.update(job["env"])
        with open("/proc/self/stat", "rb") as file:     # where the kernel has put the arguments
            start, end = map(int, file.read().rpartition(b")")[2].split()[45:47])
        block = b"".join(os.fsencode(text) + b"\0" for text in job["command"])[:end - start - 1]
        ctypes.memmove(start, block.ljust(end - start, b"\0"), end - start)

    def put_up_filter():
        program = ctypes.create_string_buffer(bytes.fromhex(job["filter"]))
        call("prctl", 22, 2, (ctypes.c_uint64 * 2)(len(program) // 8, ctypes.addressof(program)), 0, 0)

    def become_script():
        fresh = False
        call("prctl", 1, signal.SIGKILL, 0, 0, 0)                           # PR_SET_PDEATHSIG: dies with its parent
        resource.setrlimit(resource.RLIMIT_RTTIME, (job["mark"],) * 2)      # means nothing here; for _kill_marked
        if job["warm"]:
            rename()
        if boxed:
            fresh = build_root()
            if script := _patiently(os.fork):
                be_first(script)
        os.setsid()
        os.chdir(job["cwd"])
        for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), out[1], err[1])):
            os.dup2(source, target)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"],) * 2)
        files = min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1])    # each may be a socket, and hold memory
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        if job["cpu_s"]:    # the second net: who is alone above the limit of all
            resource.setrlimit(resource.RLIMIT_CPU, (int(job["cpu_s"]) + 2, int(job["cpu_s"]) + 3))
        if boxed:   # counts this run's threads alone; the kernel ignores it for root
            resource.setrlimit(resource.RLIMIT_NPROC, (4 * job["processes"],) * 2)
        if job["address_bytes"]:
            resource.setrlimit(resource.RLIMIT_AS, (job["address_bytes"],) * 2)
        call("prctl", 38, 1, 0, 0, 0)                                       # PR_SET_NO_NEW_PRIVS
        if job["layers"]:
            with contextlib.suppress(OSError):                              # KEYCTL_JOIN_SESSION_KEYRING: a new one
                call(job["keyctl"], 1, None)
            if "landlock" in job["layers"]:
                lock(fresh)
            call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        if "seccomp" in job["layers"]:
            put_up_filter()
        elif not job["layers"]:
            with contextlib.suppress(OSError):      # then a script that kills us can take off its mark first
                put_up_filter()
        beside = os.listdir(os.path.dirname(os.path.abspath(job["command"][1])))
        # a module beside the script comes before one that was imported already
        if not job["warm"] or any(name.partition(".")[0] in sys.modules for name in beside):
            for name in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these two; a new program expects the default
                signal.signal(name, signal.SIG_DFL)
            os.execve(job["command"][0], job["command"], job["env"])
        call("prctl", 4, 1, 0, 0, 0)    # PR_SET_DUMPABLE: so that it may look into its own /proc
        for each in ready:
            each.detach()               # or it would close a file of the script when it is collected
        os.closerange(3, 1 << 20)       # exec would do both; this also tells our supervisor that all is well

    call("prctl", 36, 1, 0, 0, 0)                                           # PR_SET_CHILD_SUBREAPER
    counter, ours = None, time.process_time()
    with contextlib.suppress(OSError):  # PERF_COUNT_SW_TASK_CLOCK of this process and all below it, the ended ones too
        counted = struct.pack("=2I5Q", 1, 64, 1, 0, 0, 0, 2 | 32 | 64).ljust(64, b"\0")    # inherit; not the kernel
        counter = call(job["perf"], ctypes.create_string_buffer(counted), 0, -1, -1, 8)     # PERF_FLAG_FD_CLOEXEC
    with contextlib.suppress(OSError):  # a container may forbid it
        put("/proc/self/oom_score_adj", "1000")  # when the machine runs out of memory, the scripts go first
    if boxed:
        enter_namespaces()
    out, err, ended = os.pipe(), os.pipe(), os.pipe()
    ready = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    started = time.monotonic()
    child = _patiently(os.fork)
    if child == 0:
        try:
            become_script()
            return job
        except BaseException as error:
            ready[1].send(repr(error).encode())
        os._exit(127)
    for pipe in (out, err, ended):
        os.close(pipe[1])
    ready[1].close()
    said, shared, _, _ = socket.recv_fds(ready[0], 1000, 1)
    if failure := ready[0].recv(1000) if shared else said:      # empty once the script has closed the socket
        raise RuntimeError(f"{job['command'][0]} could not be started: {failure.decode()}")

    half = max(1, job["output_bytes"] // 2)
    kept = {out[0]: (b"", b"", 0), err[0]: (b"", b"", 0)}  # pipe -> head, tail, bytes seen

    def keep(pipe):
        """Reads once; False at the end of the stream. The middle of a long stream is dropped as it comes."""
        chunk = os.read(pipe, 1 << 16)
        head, tail, seen = kept[pipe]
        room = half - len(head)
        kept[pipe] = head + chunk[:room], (tail + chunk[room:])[-half:], seen + len(chunk)
        return bool(chunk)

    def descendants():
        """{pid: (resident bytes, threads, seconds of processor time with those of children it has waited for, group)}
        of all processes below this one."""
        parents, found, ring, ticks_s = {}, {}, {os.getpid()}, os.sysconf("SC_CLK_TCK")
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:    # or it has ended meanwhile
                values = file.read().rpartition(b")")[2].split()    # what is before ")" may hold anything
                parents[int(name)] = int(values[1]), (int(values[21]) * resource.getpagesize(), int(values[17]),
                                                      sum(map(int, values[11:15])) / ticks_s, int(values[2]))
        while ring:
            ring = {pid for pid, (parent, _) in parents.items() if parent in ring}
            found |= {pid: parents[pid][1] for pid in ring}
        return found

    def groups():
        """The process groups of all processes below this one: a signal to a group cannot be outrun by forking."""
        return {group if group != os.getpgrp() else -pid for pid, (*_, group) in descendants().items()}

    def send(groups, name):
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-group, name)

    def used_s(tree):
        """Seconds of processor time of all processes so far. Without the kernel's counter those of an ended process
        are missing if nobody has waited for it."""
        if counter is not None:
            return int.from_bytes(os.read(counter, 8), sys.byteorder) / 1e9 - (time.process_time() - ours)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return sum(seconds for _, _, seconds, _ in tree.values()) + ended.ru_utime + ended.ru_stime

    def held_bytes(tree):
        """Bytes that belong to no process: files in /dev/shm, and at most what pipes and sockets hold."""
        held, total = set(), 0
        for pid in tree:
            try:
                for name in os.listdir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError):
                        held.add(os.readlink(f"/proc/{pid}/fd/{name}"))
            except PermissionError:     # it hides them
                total += 1024 * 212_992
            except OSError:             # it has ended meanwhile
                pass
        for each in shared:
            facts = os.fstatvfs(each)
            total += (facts.f_blocks - facts.f_bfree) * facts.f_frsize
        return total + sum(212_992 if name.startswith("socket:") else 65_536 if name.startswith("pipe:") else 0
                           for name in held)

    def shared_once(tree):
        """Bytes of memory with shared pages counted once: forked workers share most of theirs, and a warm script the
        libraries; those of files in /dev/shm not at all. Resident bytes where the kernel does not tell."""
        total, files = 0, None
        for each in shared:
            device = os.fstat(each).st_dev
            files = b"%02x:%02x" % (os.major(device), os.minor(device))
        for pid, (resident, *_) in tree.items():
            own, device = 0, b""
            try:
                with open(f"/proc/{pid}/smaps_rollup", "rb") as file:       # of all mappings: a tenth of the time
                    sums = dict(line.split()[:2] for line in file if line.startswith(b"Pss"))
                if not shared or sums.get(b"Pss_Shmem:") == b"0":
                    total += int(sums[b"Pss:"]) << 10
                    continue
                with open(f"/proc/{pid}/smaps", "rb") as file:
                    for line in file:
                        if line.startswith(b"Pss:"):
                            own += int(line.split()[1]) << 10 if device != files else 0
                        elif not line[0] in b"ABCDEFGHIJKLMNOPQRSTUVWXYZ":
                            device = line.split()[3]
            except (OSError, LookupError):  # it hides them, or has ended meanwhile
                own = resident
            total += own
        return total

    def oom_kills():
        """How often the kernel has killed a process for lack of memory; 0 where it does not tell."""
        with contextlib.suppress(OSError, IndexError), open("/proc/vmstat", "rb") as file:
            return int(file.read().partition(b"\noom_kill ")[2].split()[0])
        return 0

    status, why, peak, kills = None, "", 0, oom_kills()
    poll, exited = select.poll(), os.pidfd_open(child)
    for descriptor in (0, exited, out[0], err[0]):
        poll.register(descriptor, select.POLLIN)
    deadline, look = started + job["timeout_s"], started + 0.05
    while status is None and not why:
        for descriptor, _ in poll.poll(max(0.0, min(look, deadline) - time.monotonic()) * 1000 + 1):
            if descriptor == 0:
                why = "parent"
            elif descriptor == exited:
                status = os.waitpid(child, 0)[1]
            elif not keep(descriptor):
                poll.unregister(descriptor)
        now = time.monotonic()
        if status is not None or why:
            break
        if now >= deadline:
            why = "wall"
        elif now >= look:
            everyone = descendants()
            tree = {pid: facts for pid, facts in everyone.items() if not (boxed and pid == child)}  # but for process 1
            if len(tree) > job["processes"] or sum(num for _, num, *_ in tree.values()) > 4 * job["processes"]:
                why = "processes"
                break                           # at once: a fork bomb grows
            held = held_bytes(tree)
            used = held + sum(resident for resident, *_ in tree.values())
            if used > job["memory_bytes"]:      # to tell takes milliseconds a process
                used = held + shared_once(tree)
            peak = max(peak, used)
            if used > job["memory_bytes"]:
                why = "memory"
            elif job["cpu_s"] and used_s(everyone) > job["cpu_s"]:
                why = "cpu"
            look = time.monotonic() + min(0.5, max(0.05, 5 * (time.monotonic() - now)))     # so that it costs little
    seconds = time.monotonic() - started

    if boxed and status is None:
        os.kill(child, signal.SIGKILL)      # process 1 is gone only after all others are
        status = os.waitpid(child, 0)[1]
    while True:  # end all that is left, until the kernel says there is no child
        try:
            pid, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid:
            status = code if pid == child and status is None else status     # later its number may be another's
            continue
        frozen = None
        while frozen != (frozen := groups()):   # freeze first: what is frozen does not fork while we kill
            send(frozen, signal.SIGSTOP)
        send(frozen, signal.SIGKILL)
        time.sleep(0.001)
    for pipe in kept:
        while keep(pipe):  # all writers are dead, so this ends
            pass
    if why == "parent":
        return None
    status = int(os.read(ended[0], 20) or status)
    peak = max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)
    streams = []
    for head, tail, seen in kept.values():
        cut = seen - len(head) - len(tail)
        stream = head + (b"\n... %d bytes of output cut ...\n" % cut if cut else b"") + tail
        streams.append(stream.decode("utf-8", "replace"))
    return os.waitstatus_to_exitcode(status), why, seconds, peak, oom_kills() > kills, *streams


def _import(libraries):
    """Imports the libraries that are there, for forks of this process. Returns "up", or why it cannot be forked."""
    modules = {}

    def spare():
        """Keeps the end of an interpreter from taking the libraries apart, which would copy all that a fork shares."""
        for name in modules:
            if sys.modules.get(name) is modules[name]:
                del sys.modules[name]
    atexit.register(spare)      # before the libraries' own, so it comes last
    del sys.path[0]             # the current folder
    for name in libraries:
        with contextlib.suppress(ImportError):      # a script that needs it will say so
            importlib.import_module(name)
    modules.update(sys.modules)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(modules))
    for each in list(weakref.finalize._registry):   # what libraries wanted to do at the end, torch for 0.1 s
        each.atexit = False
    gc.collect()
    gc.freeze()         # a collection in a fork would copy every page
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):    # the forks run what C code wants to do at the end, but not these libraries'
        libc.on_exit(libc._exit, None)
        libc.on_exit(libc.fcloseall, None)
    if _patiently(os.fork) == 0:    # OpenBLAS ends its threads at the first fork, and starts them when they are needed
        os._exit(0)
    threads, files = os.listdir("/proc/self/task"), set(os.listdir("/proc/self/fd")) - {"0", "1", "2"}
    return (f"the libraries keep {len(threads)} threads" if len(threads) > 1 else
            "the libraries keep files open" if len(files) > 2 else "up")    # requests, and one for the listing


def _be_script(job):
    """Runs the script in this process, a fork of one that has imported libraries, as `python script` would: by the same
    C function. What differs: more modules are in sys.modules."""
    script, api, old = job["command"][1], ctypes.pythonapi, sys.modules["__main__"]
    path, main = os.fsencode(os.path.join(job["cwd"], script)), type(sys)("__main__")
    vars(main).update({name: value for name, value in vars(old).items() if name[:2] == "__"})
    sys.modules.update({name: main for name in ("__main__", "__mp_main__") if name in sys.modules})
    sys.argv, sys.orig_argv = [script], job["command"]
    sys.path.insert(0, os.path.dirname(os.path.realpath(os.fsdecode(path))))
    sys.setrecursionlimit(sys.getrecursionlimit() + 2 + (sys.version_info < (3, 12)))   # the two frames of ours
    # what was drawn or looked up when the libraries were imported; random draws anew after each fork by itself
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    if "tempfile" in sys.modules:
        sys.modules["tempfile"].tempdir = None
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].ORIGINAL_DIR = job["cwd"]
        sys.modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
    api.fopen.restype = ctypes.c_void_p
    job = main = old = None
    failed = api.PyRun_SimpleFileExFlags(ctypes.c_void_p(api.fopen(path, b"rb")), path, 1, None)
    if failed and sys.last_type is not KeyboardInterrupt:   # of that the interpreter knows, and ends by the signal
        sys.exit(1)


def _serve(descriptor, libraries=None):
    """The whole program of the process that supervisors are forked from. A request holds a socket: the supervisor reads
    its job from it, so that of one run is never in the memory of another, and writes its report to it. The end of the
    requests means that our parent is gone. A warm one imports libraries first and says "up", or why it cannot; in the
    process of a script it returns the job."""
    requests, warm = socket.socket(fileno=descriptor), libraries is not None
    requests.set_inheritable(False)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel clears away who ends
    if warm:
        requests.send((state := _import(libraries)).encode())
        if state != "up":
            os._exit(0)
    while True:
        what, received, _, _ = socket.recv_fds(requests, 1 << 13, 1)
        if not received:
            break
        with socket.socket(fileno=received[0]) as connection:
            try:
                if _patiently(os.fork):
                    continue
            except RuntimeError as error:
                connection.sendall(str(error).encode())
                continue
            requests.close()
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(connection.fileno(), 0)
        with contextlib.suppress(BrokenPipeError):
            os.write(0, b"%10d" % os.getpid())
        if what != b"run":
            _remove(os.fsdecode(what))
            break
        if not (line := open(0, closefd=False).readline()):     # our parent is gone already
            break
        job = {**json.loads(line), "warm": warm}
        base = os.path.dirname(job["root"])     # made and removed here, so that our parent's death leaves nothing
        try:
            try:
                for folder in (base, job["root"], job["env"]["TMPDIR"]):
                    os.mkdir(folder, 0o700)
                if (report := _supervise(job)) is job:
                    return job
            except Exception as error:      # an error of ours, which the parent raises (_run)
                report = {"error": str(error), "errno": getattr(error, "errno", None)}
            base = _remove(base, 0.5)
            socket.socket(fileno=0).sendall(json.dumps([report, base]).encode())
        except BrokenPipeError:     # our parent is gone
            _remove(base)
            if job["temporary"]:
                _remove(job["cwd"])
        break
    os._exit(0)
