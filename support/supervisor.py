"""Starts one script under its limits and in its sandbox, watches it, and ends all that it started. It uses the standard
library alone, and is started by its path:

    python -I -S support/supervisor.py              # does the job that it reads from the socket 0
    python - 3 numpy pandas < support/supervisor.py # has forks that do so, one for each request on the socket 3; their
                                                    # scripts are forks too, and have these libraries

job.layers names the layers to put up; each is enough to hide the answers.
namespaces: a world with no other processes, no network, and no files but job.shown. When its process 1, the script's
parent, ends, the kernel ends all others with it.
landlock: the script may open what lies below job.shown and nothing else, connect to nobody, and signal nobody outside.
With either, a script has no capability and cannot gain one, and seccomp refuses the calls listed below.
"""
import atexit
import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
import time
import weakref
from collections import namedtuple
from types import SimpleNamespace

# -- Names of the kernel's numbers

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
PF_EXITING = 4

CLONE_FILES = 1 << 10
CLONE_THREAD = 1 << 16
CLONE_NEWNS = 1 << 17
CLONE_NEWIPC = 1 << 27
CLONE_NEWUSER = 1 << 28
CLONE_NEWPID = 1 << 29
CLONE_NEWNET = 1 << 30

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 1 << 12
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
AT_RECURSIVE = 0x8000

LANDLOCK_GET_VERSION = 1
LANDLOCK_PATH_BENEATH = 1
LANDLOCK_TCP = 3
LANDLOCK_SIGNALS_AND_ABSTRACT_SOCKETS = 3
LANDLOCK_EXECUTE = 1
LANDLOCK_WRITE_FILE = 2
LANDLOCK_READ_FILE = 4
LANDLOCK_READ_DIR = 8
LANDLOCK_MAKE_CHAR = 1 << 6
LANDLOCK_MAKE_BLOCK = 1 << 11
LANDLOCK_TRUNCATE = 1 << 14
LANDLOCK_IOCTL_DEV = 1 << 15

SOCKET_BYTES = 212_992  # the most that one holds
PIPE_BYTES = 65_536
MAX_FILES = 1024        # that a process opens

# -- The filter (seccomp). {where it holds: system calls that are refused}, each call with its numbers on x86_64 and on
# aarch64 (-: there is none), or the one of both. Not listed is what needs a capability, such as to mount, and what
# needs an object that only a refused call makes.

CALLS = {"any layer": """
    # keyrings: secrets, and a place where things outlive a run
    add_key 248 217, request_key 249 218, keyctl 250 219
    # memory and messages that belong to no process
    shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191
    msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180, mq_unlink 241 181
    io_setup 206 0, vmsplice 278 75
    # memory and descriptors of other processes
    ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, pidfd_getfd 438
    process_madvise 440, process_mrelease 448, get_robust_list 274 100
    # namespaces, in which a script would have all capabilities
    unshare 272 97, setns 308 268
    # what a script has no use for and kernels had holes in
    bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, io_uring_setup 425, fanotify_init 300 262
    modify_ldt 154 -, personality 135 92, syslog 103 116, quotactl 179 60, quotactl_fd 443, uselib 134 -
""", "no GPU": """
    # files in memory
    memfd_create 319 279, memfd_secret 447
""", "landlock alone": """
    # without a session of its own, one signal to the group ends all, however fast they fork
    setsid 112 157, setpgid 109 154
    # Landlock knows neither who is called on a socket nor the attributes of files; a watch tells names in a folder
    connect 42 203, inotify_add_watch 254 27
    chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7
    setxattrat 463, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, removexattrat 466, file_setattr 469
""", "landlock alone, reported as done": """
    # to copy a file with its mode and times must not fail
    chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452, utime 132 -, utimes 235 -, futimesat 261 -
    utimensat 280 88
""", "named": """
    # in ARGUMENTS
    prlimit64 302 261, setrlimit 160 164, clone 56 220, socket 41 198, socketpair 53 199, setsockopt 54 208
    close_range 436, fcntl 72 25, mmap 9 222, ioctl 16 29, sched_setaffinity 203 122, sched_setparam 142 118
    sched_setscheduler 144 119, sched_setattr 314 274, migrate_pages 256 238, move_pages 279 239
    setpriority 141 140, ioprio_set 251 30
    # what we call ourselves
    landlock_create_ruleset 444, landlock_add_rule 445, landlock_restrict_self 446, mount_setattr 442
"""}
# {where it holds: (system call, number of an argument, relation, value)}: refused where the relation holds. "has": all
# bits of the value are set; a number: of these bits just those of the value are
ARGUMENTS = {
    "always": [
        ("prlimit64", 1, "is", resource.RLIMIT_RTTIME),     # the mark of a run
        ("setrlimit", 0, "is", resource.RLIMIT_RTTIME),
        ("close_range", 2, "has", 2),       # CLOSE_RANGE_UNSHARE: a thread's own files, where nobody looks for sockets
        ("clone", 0, CLONE_FILES | CLONE_THREAD, CLONE_THREAD)],
    "any layer": [
        ("prlimit64", 0, "is not", 0),      # limits of another process
        ("socket", 0, "is not", socket.AF_UNIX),
        ("socketpair", 0, "is not", socket.AF_UNIX),
        ("setsockopt", 2, "is", socket.SO_SNDBUF),
        ("setsockopt", 2, "is", socket.SO_RCVBUF),
        ("fcntl", 1, "is", 1031),           # F_SETPIPE_SZ: pipes hold memory too
        ("fcntl", 1, "is", 1024),           # F_SETLEASE, F_SET_RW_HINT, F_SET_FILE_RW_HINT: they stay on public data
        ("fcntl", 1, "is", 1036),
        ("fcntl", 1, "is", 1038),
        ("mmap", 3, "has", 0x40000),        # MAP_HUGETLB is not counted as resident
        ("clone", 0, "has", CLONE_NEWUSER)],
    "no GPU": [
        ("mmap", 3, "has", 0x21)],          # MAP_SHARED_ANONYMOUS may be kept unmapped
    "landlock alone": [
        *((name, 0, "is not", 0) for name in ("sched_setaffinity", "sched_setparam", "sched_setscheduler",
                                              "sched_setattr", "migrate_pages", "move_pages")),     # other processes'
        ("setpriority", 0, "is not", os.PRIO_PROCESS),
        ("setpriority", 1, "is not", 0),
        ("ioprio_set", 0, "is not", 1),     # IOPRIO_WHO_PROCESS
        ("ioprio_set", 1, "is not", 0),
        ("socket", 1, "has", socket.SOCK_DGRAM),            # datagrams need no connection
        ("socketpair", 1, "has", socket.SOCK_DGRAM),
        ("ioctl", 1, "is", 0x40086602),     # FS_IOC_SETFLAGS and FS_IOC_FSSETXATTR: chattr
        ("ioctl", 1, "is", 0x401C5820)]}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}     # column of the table, AUDIT_ARCH
CLONE3 = 435
LAST_CALL = 469     # a later one is to the script as on an older kernel, and so are those of the x32 ABI


def numbers_in(table, column):
    """{system call: its number} in a column of a table; those that the machine lacks are left out."""
    numbers = {}
    for line in table.splitlines():
        for entry in filter(str.strip, line.partition("#")[0].split(",")):
            name, *both = entry.split()
            if both[column % len(both)] != "-":
                numbers[name] = int(both[column % len(both)])
    return numbers


COLUMN, ARCHITECTURE = MACHINES.get(platform.machine(), (None, None))
NUMBERS = {} if COLUMN is None else numbers_in("".join(CALLS.values()), COLUMN)


def filter_program(layers, gpu):
    """The program of the filter: bytes of sock_filter structures. Without layers it only keeps the mark of a run."""
    if COLUMN is None:
        raise OSError(errno.ENOSYS, f"the system calls of {platform.machine()} are not known")
    load = 0x20
    equal = 0x15
    above = 0x25
    mask = 0x54
    answer = 0x06
    allow = 0x7FFF0000
    ignore = 0x50000
    refuse = ignore | errno.EPERM
    unknown = ignore | errno.ENOSYS
    # Where what it asks about is.
    number_at = 0
    machine_at = 4
    arguments_at = 16
    scopes = ["always"]
    if layers:
        scopes.append("any layer")
    if layers and not gpu:
        scopes.append("no GPU")
    if layers and "namespaces" not in layers:
        scopes += ["landlock alone", "landlock alone, reported as done"]
    program = [(load, 0, 0, machine_at), (equal, 1, 0, ARCHITECTURE), (answer, 0, 0, refuse),
               (load, 0, 0, number_at), (above, 0, 1, LAST_CALL), (answer, 0, 0, unknown),
               (equal, 0, 1, CLONE3), (answer, 0, 0, unknown)]
    for scope in scopes:
        verdict = ignore if scope.endswith("done") else refuse
        for number in numbers_in(CALLS.get(scope, ""), COLUMN).values():
            program += [(equal, 0, 1, number), (answer, 0, 0, verdict)]
        for name, index, relation, value in ARGUMENTS.get(scope, ()):
            bits = {"has": value, "is": 0xFFFFFFFF, "is not": 0xFFFFFFFF}.get(relation, relation)   # of the low half
            jump = (equal, 1, 0, value) if relation == "is not" else (equal, 0, 1, value)
            program += [(equal, 0, 5, NUMBERS[name]), (load, 0, 0, arguments_at + 8 * index), (mask, 0, 0, bits), jump,
                        (answer, 0, 0, refuse), (load, 0, 0, number_at)]
    program.append((answer, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


# -- Small tools

libc = ctypes.CDLL(None, use_errno=True)
START_S = 10    # see patiently


def call(name, *values):
    """Calls the C function or the system call of that name; OSError if it fails."""
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in values]
    values = [os.fsencode(value) if isinstance(value, str) else value for value in values]
    if hasattr(libc, name):
        result = getattr(libc, name)(*values)
    else:
        result = libc.syscall(ctypes.c_long(NUMBERS.get(name, -1)), *values)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(option, value, rules=0):
    call("prctl", option, value, rules, 0, 0)


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def stat_of(folder):
    """What /proc tells of a process or thread, from its state on."""
    with open(f"{folder}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()      # its name may hold a ")"


def patiently(start, *args, **options):
    """Calls `start`, which starts a process; where there is no room for one, as beside a fork bomb, for START_S seconds
    again."""
    ended = time.monotonic() + START_S
    while True:
        try:
            return start(*args, **options)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM):
                raise
            if time.monotonic() > ended:
                raise RuntimeError(f"no process can be started on this machine ({error.strerror}): it has too many, or "
                                   "too little memory") from None
        time.sleep(0.1)


# -- The script's side, from the fork on

PROC = [f"/proc/{name}" for name in ("cpuinfo", "meminfo", "stat", "loadavg", "version", "filesystems", "devices",
                                     "driver", "sys/vm", "sys/kernel/osrelease")]       # tells of no process
MASKED = [f"/proc/{name}" for name in ("keys", "key-users", "timer_list", "sched_debug", "kcore")]      # the user's


def become_script(job, run):
    """Turns this fork of a supervisor into the script: a new interpreter, or a warm one, which goes on with what it has
    imported; then alone this function returns."""
    # 1. Its world. It dies with its parent
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):                  # a container may forbid it
        write("/proc/self/oom_score_adj", "1000")       # when memory runs out, scripts go first
    if job.warm:
        rename(job)
    if job.boxed:
        build_root(job)
        if script := patiently(os.fork):
            be_first(script, run.ended)
    os.setsid()
    os.chdir(job.cwd)
    for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), run.out, run.err)):
        os.dup2(source, target)
    # 2. Its limits
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: job.file_bytes,
              resource.RLIMIT_NOFILE: min(MAX_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])}
    if job.boxed:       # of this run's threads alone; root has no such limit
        limits[resource.RLIMIT_NPROC] = 4 * job.processes
    if job.address_bytes:
        limits[resource.RLIMIT_AS] = job.address_bytes
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    # 3. Its rights
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if "landlock" in job.layers:
        restrict_files(job)
    if job.layers:
        call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())   # version 3: none
    if "seccomp" in job.layers:
        put_up_filter(job)
    elif not job.layers:
        with contextlib.suppress(OSError):      # so that a script that kills us cannot take off its mark first
            put_up_filter(job)
    # 4. Its program
    if not job.warm:
        for name in (signal.SIGPIPE, signal.SIGXFSZ):       # Python ignores them; a new program expects the default
            signal.signal(name, signal.SIG_DFL)
        os.execve(job.command[0], job.command, job.env)
    prctl(PR_SET_DUMPABLE, 1)       # it may look into its own /proc
    os.closerange(3, 1 << 20)       # exec would do both; this tells the supervisor that all is well


def rename(job):
    """Gives this fork the environment of the script, and its command in /proc."""
    os.environ.clear()
    os.environ.update(job.env)
    start, end = map(int, stat_of("/proc/self")[45:47])     # where the kernel has put the arguments
    block = b"".join(os.fsencode(text) + b"\0" for text in job.command)[:end - start - 1]
    ctypes.memmove(start, block.ljust(end - start, b"\0"), end - start)


def build_root(job):
    """Makes the file tree and enters it."""
    root = job.root
    call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path, _ in job.shown:
        show(path, root)
    os.makedirs(f"{root}/proc", exist_ok=True)
    try:
        call("mount", "proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    except OSError:     # inside a container whose own /proc is masked
        for path in PROC:
            show(path, root)
    for path in MASKED:
        with contextlib.suppress(OSError):
            call("mount", "/dev/null", root + path, None, MS_BIND | MS_REC, None)
    with contextlib.suppress(OSError):      # for root too; from Linux 6.14 on, each world has its own
        write(f"{root}/proc/sys/kernel/pid_max", str(max(400, 4 * job.processes)))
    os.makedirs(f"{root}/dev/shm", exist_ok=True)
    protect(root, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0)
    call("mount", "tmpfs", f"{root}/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV,
         f"mode=1777,size={job.memory_bytes // 2},nr_inodes={job.memory_bytes >> 14}")      # an empty file takes 1 KiB
    for path, right in job.shown:
        if right == "write":
            protect(root + path, 0, MOUNT_ATTR_RDONLY)
    os.chroot(root)     # this also forbids namespaces below this one


def show(path, root):
    """Binds a file or folder into the tree, at the same place."""
    target = root + path
    os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
    if not os.path.exists(target):
        write(target, "")
    call("mount", path, target, None, MS_BIND | MS_REC, None)


def protect(target, add, clear):
    """Sets and clears attributes of a mount and of all below it."""
    call("mount_setattr", 0, target, AT_RECURSIVE, (ctypes.c_uint64 * 4)(add, clear), 32)


def be_first(script, ended):
    """Process 1: tells the script's status and ends, and all others with it."""
    prctl(PR_SET_DUMPABLE, 0)       # nobody traces it
    os.closerange(0, ended)
    os.closerange(ended + 1, 1 << 16)
    while True:
        pid, status = os.wait()
        if pid == script:
            os.write(ended, b"%d" % status)
            os._exit(0)


def restrict_files(job):
    version = call("landlock_create_ruleset", None, 0, LANDLOCK_GET_VERSION)
    if version < 3:     # it does not keep anyone from emptying a file
        raise OSError(errno.EOPNOTSUPP, "this kernel's Landlock does not know truncation; it is too old (Linux 6.2)")
    every = (1 << (15 if version < 5 else 16)) - 1
    of_devices = LANDLOCK_READ_FILE | LANDLOCK_WRITE_FILE | LANDLOCK_TRUNCATE | LANDLOCK_IOCTL_DEV
    rights = {"read": LANDLOCK_EXECUTE | LANDLOCK_READ_FILE | LANDLOCK_READ_DIR,
              "write": every & ~(LANDLOCK_MAKE_CHAR | LANDLOCK_MAKE_BLOCK),
              "device": of_devices | LANDLOCK_READ_DIR}
    handled = (ctypes.c_uint64 * 3)(every, LANDLOCK_TCP, LANDLOCK_SIGNALS_AND_ABSTRACT_SOCKETS)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = call("landlock_create_ruleset", handled, size, 0)
    rest = {"/proc": "read", "/dev/shm": "write"}       # of its own world
    if not job.boxed:
        rest = dict.fromkeys(["/proc/self", *PROC], "read")
    for path, right in [*job.shown, *rest.items()]:
        if os.path.exists(path):
            allowed = rights[right] & every
            if not os.path.isdir(path):
                allowed &= of_devices | LANDLOCK_EXECUTE
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call("landlock_add_rule", rules, LANDLOCK_PATH_BENEATH, struct.pack("=QI", allowed, file), 0)
    call("landlock_restrict_self", rules, 0)


def put_up_filter(job):
    program = ctypes.create_string_buffer(filter_program(job.layers, job.gpu))
    rules = (ctypes.c_uint64 * 2)(len(program) // 8, ctypes.addressof(program))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, rules)


def run_script(job):
    """Runs the script in this process as `python script` would, by the same C function; but more is in sys.modules."""
    path = os.fsencode(os.path.join(job.cwd, job.command[1]))
    main = type(sys)("__main__")
    for name in ("__annotations__", "__builtins__"):
        if name in globals():
            setattr(main, name, globals()[name])
    sys.modules.update({name: main for name in ("__main__", "__mp_main__") if name in sys.modules})
    sys.argv = [job.command[1]]
    sys.orig_argv = job.command
    sys.path.insert(0, os.path.dirname(os.path.realpath(os.fsdecode(path))))
    sys.setrecursionlimit(sys.getrecursionlimit() + 2 + (sys.version_info < (3, 12)))       # the two frames of ours
    # what was drawn or looked up when the libraries were imported; random does this by itself
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    if "tempfile" in sys.modules:
        sys.modules["tempfile"].tempdir = None
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].ORIGINAL_DIR = job.cwd
        sys.modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
    del job, main
    ctypes.pythonapi.fopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(ctypes.pythonapi.fopen(path, b"rb"))
    if ctypes.pythonapi.PyRun_SimpleFileExFlags(file, path, 1, None) == 0:
        streams = [vars(sys).get(name) for name in ("stdout", "stderr")]
        if streams == [sys.__stdout__, sys.__stderr__] and None not in streams:     # else the end may fail to write
            sys.last_object = LastObject(streams)
    elif sys.last_type is not KeyboardInterrupt:
        sys.exit(1)     # the interpreter ends an interrupted one by the signal


class LastObject:
    """What a script that has come to its end keeps in `sys`, which the interpreter takes apart last. It ends the
    process there: what is left to do would touch, and so copy, every name that forks share (25 to 50 ms)."""

    def __init__(self, streams):
        self.streams = [stream for stream in streams if not stream.closed]
        self.libc = libc        # the names of this file are gone at the end

    def __del__(self):
        for stream in self.streams:
            stream.flush()
        self.libc.fcloseall()
        self.libc._exit(0)


# -- The supervisor's side

Process = namedtuple("Process", "parent group threads cpu_s resident folder")


class Stream:
    """What comes out of a pipe, without the middle where it is long."""

    def __init__(self, pipe, size):
        self.pipe = pipe
        self.half = size // 2
        self.head = b""
        self.tail = b""
        self.seen = 0

    def read(self):
        """Reads once; returns False at the end of the stream."""
        chunk = os.read(self.pipe, 1 << 16)
        room = self.half - len(self.head)
        self.head += chunk[:room]
        self.tail = (self.tail + chunk[room:])[-self.half:]
        self.seen += len(chunk)
        return bool(chunk)

    def text(self):
        """Of a line that was written over, as progress bars do, this has the last state, as a terminal shows it."""
        cut = self.seen - len(self.head) - len(self.tail)
        mark = b"\n... %d bytes of output cut ...\n" % cut if cut else b""
        lines = (self.head + mark + self.tail).decode("utf-8", "replace").split("\n")
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def start(job):
    """Starts the script of a job; returns what watch needs, or None in the process of a warm script.

    Without namespaces this process adopts every orphan below it (a child subreaper): who double-forks or calls setsid
    stays its descendant, and the kernel's "no child left" is the proof that nothing survived.
    """
    run = SimpleNamespace(counter=None, own_cpu_s=time.process_time())
    # 1. This process
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    with contextlib.suppress(OSError):
        run.counter = count_cpu_time()
    if job.boxed:
        user = os.geteuid()
        group = os.getegid()
        # the last one is for children
        call("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{user} {user} 1")
        write("/proc/self/gid_map", f"{group} {group} 1")
    # 2. The script
    out, run.out = os.pipe()
    err, run.err = os.pipe()
    run.status, run.ended = os.pipe()
    failure, run.failure = os.pipe()
    run.started = time.monotonic()
    run.child = patiently(os.fork)
    if run.child == 0:
        try:
            become_script(job, run)
            return None
        except BaseException as error:
            os.write(run.failure, repr(error).encode())
        os._exit(127)
    # 3. What it says until it is the script
    for descriptor in (run.out, run.err, run.ended, run.failure):
        os.close(descriptor)
    if message := os.read(failure, 1000):
        raise RuntimeError(f"{job.command[0]} could not be started: {message.decode()}")
    run.streams = {pipe: Stream(pipe, job.output_bytes) for pipe in (out, err)}
    return run


def count_cpu_time():
    """The kernel's counter of processor time of this process and of all below it, those that have ended too."""
    task_clock = 1
    enabled_of_all = 2
    without_kernel = 32 | 64
    close_on_exec = 8
    event = struct.pack("=2I5Q", 1, 64, task_clock, 0, 0, 0, enabled_of_all | without_kernel).ljust(64, b"\0")
    return call("perf_event_open", ctypes.create_string_buffer(event), 0, -1, -1, close_on_exec)


def watch(job, run):
    """Waits until the script ends or is above a limit, ends all that it started, and returns the report; None where
    our parent is gone or calls the run off, as the end of its socket tells."""
    status = None
    limit = ""
    peak = 0
    kills = oom_kills()
    exited = os.pidfd_open(run.child)
    poll = select.poll()
    for descriptor in (0, exited, *run.streams):
        poll.register(descriptor, select.POLLIN)
    # 1. Until it ends, or is above a limit
    deadline = run.started + job.timeout_s
    look = run.started + 0.05
    while not limit:
        for descriptor, _ in poll.poll(max(0.0, min(look, deadline) - time.monotonic()) * 1000 + 1):
            if descriptor == 0:
                limit = "parent"
            elif descriptor == exited:
                status = os.waitpid(run.child, 0)[1]
            elif not run.streams[descriptor].read():
                poll.unregister(descriptor)
        now = time.monotonic()
        if status is not None or limit:
            break
        if now >= deadline:
            limit = "wall"
        elif now >= look:
            limit, used = exceeded(job, run)
            peak = max(peak, used)
            look = time.monotonic() + min(0.5, max(0.05, 5 * (time.monotonic() - now)))     # so that it costs little
    seconds = time.monotonic() - run.started
    # 2. The end of all that it started
    status = end_all(run, status, job.boxed)
    for stream in run.streams.values():
        while stream.read():        # all writers are dead, so this ends
            pass
    if limit == "parent":
        return None
    # 3. The report
    status = int(os.read(run.status, 20) or status)     # of process 1 it is not the script's
    stdout, stderr = (stream.text() for stream in run.streams.values())
    peak = max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)
    return dict(exit_code=os.waitstatus_to_exitcode(status), limit=limit, seconds=seconds, peak_bytes=peak,
                cpu_s=cpu_seconds(run, {}), oom=oom_kills() > kills, stdout=stdout, stderr=stderr, warm=job.warm)


def exceeded(job, run):
    """(the limit that the processes are above, or "", bytes of memory they use)"""
    processes = descendants()
    cpu_s = cpu_seconds(run, processes)
    if job.boxed:
        processes.pop(run.child, None)
    if len(processes) > job.processes or sum(process.threads for process in processes.values()) > 4 * job.processes:
        return "processes", 0       # at once: a fork bomb grows
    held = held_bytes(processes)
    shared = 0
    if job.boxed:       # the files in /dev/shm, which belong to no process
        facts = os.statvfs(f"{job.root}/dev/shm")
        shared = (facts.f_blocks - facts.f_bfree) * facts.f_frsize
    used = held + shared + sum(process.resident for process in processes.values())
    for _ in range(2):      # what is shared just while it is counted, as at a fork, counts more than once
        if used > job.memory_bytes:     # to tell takes milliseconds a process
            private, mapped = counted_once(processes)
            used = held + private + max(shared, mapped)
            processes = descendants()
    if used > job.memory_bytes:
        return "memory", used
    if job.cpu_s and cpu_s > job.cpu_s:
        return "cpu", used
    return "", used


def descendants():
    """{pid: Process} of all processes below this one."""
    processes = {}
    ticks = os.sysconf("SC_CLK_TCK")
    for name in filter(str.isdigit, os.listdir("/proc")):
        folder = f"/proc/{name}"
        with contextlib.suppress(OSError):          # it has ended
            state, *values = stat_of(folder)[:22]
            values = list(map(int, values))
            cpu_s = sum(values[10:14]) / ticks      # with that of children it has waited for
            if state == b"Z" and values[16] > 1:    # its first thread alone has ended
                for thread in os.listdir(f"{folder}/task"):
                    with contextlib.suppress(OSError):
                        values[20] = int(stat_of(f"{folder}/task/{thread}")[21])
                    if values[20]:                  # it lives
                        folder += f"/task/{thread}"
                        break
            processes[int(name)] = Process(values[0], values[1], values[16], cpu_s, values[20] * resource.getpagesize(),
                                           folder)
    below = {}
    ring = {os.getpid()}
    while ring:
        ring = {pid for pid, process in processes.items() if process.parent in ring}
        below.update({pid: processes[pid] for pid in ring})
    return below


def cpu_seconds(run, processes):
    """Processor time of all processes so far. Without the kernel's counter, which does not see a program whose file may
    not be read, that of an ended process is missing if nobody has waited for it."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = sum(process.cpu_s for process in processes.values()) + ended.ru_utime + ended.ru_stime
    if run.counter is not None:
        counted = int.from_bytes(os.read(run.counter, 8), sys.byteorder) / 1e9
        cpu_s = max(cpu_s, counted - (time.process_time() - run.own_cpu_s))     # without ours
    return cpu_s


def held_bytes(processes):
    """The most that the pipes and sockets of the processes hold."""
    links = set()
    hidden = 0
    for process in processes.values():
        folder = f"{process.folder}/fd"
        try:
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):
                    links.add(os.readlink(f"{folder}/{name}"))
        except PermissionError:     # it hides them, or has ended unwaited for: then it has none
            with contextlib.suppress(OSError):
                if not int(stat_of(process.folder)[6]) & PF_EXITING:
                    hidden += MAX_FILES * SOCKET_BYTES
        except OSError:             # it has ended
            pass
    sizes = {"socket": SOCKET_BYTES, "pipe": PIPE_BYTES}
    return hidden + sum(sizes.get(link.partition(":")[0], 0) for link in links)


def counted_once(processes):
    """(bytes of the processes' own memory, bytes of files in memory that they have mapped), shared pages counted once.
    Resident bytes where the kernel does not tell."""
    private = 0
    mapped = 0
    for process in processes.values():
        try:
            with open(f"{process.folder}/smaps_rollup", "rb") as file:
                sums = dict(line.split()[:2] for line in file if line.startswith(b"Pss"))
            files = int(sums.get(b"Pss_Shmem:", 0)) << 10
            private += (int(sums[b"Pss:"]) << 10) - files
            mapped += files
        except ProcessLookupError:          # it has ended
            pass
        except (OSError, LookupError):      # it hides them
            private += process.resident
    return private, mapped


def oom_kills():
    with contextlib.suppress(OSError, IndexError), open("/proc/vmstat", "rb") as file:
        return int(file.read().partition(b"\noom_kill ")[2].split()[0])
    return 0


def end_all(run, status, boxed):
    """Ends all processes below this one, until the kernel says that there is no child; returns the first one's status,
    which is `status` if it has been waited for."""
    if boxed and status is None:
        os.kill(run.child, signal.SIGKILL)      # process 1 is gone only after all others are
        status = os.waitpid(run.child, 0)[1]
    while True:
        try:
            pid, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == run.child and status is None:     # later its number may be another's
            status = code
        if pid == 0:
            # a signal to a group cannot be outrun by forking; the script has left ours
            for group in {process.group for process in descendants().values()} - {os.getpgrp()}:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            time.sleep(0.001)


# -- The program

def supervise(warm):
    """Reads a job from the socket 0, does it, and writes the report. Returns the job in a warm script's process."""
    with open(0, closefd=False) as file:
        line = file.readline()
    if not line:        # our parent is gone already
        os._exit(0)
    job = SimpleNamespace(**json.loads(line))
    job.boxed = "namespaces" in job.layers
    # a limit that means nothing here, which all that we start inherits (sandbox._kill_marked)
    resource.setrlimit(resource.RLIMIT_RTTIME, (job.mark, job.mark))
    try:
        os.write(0, b"+")
        for folder in (job.base, job.root, job.env["TMPDIR"]):
            os.mkdir(folder, 0o700)
        # a module beside the script comes before one that was imported already
        beside = os.listdir(os.path.dirname(os.path.join(job.cwd, job.command[1])))
        job.warm = warm and not any(name.partition(".")[0] in sys.modules for name in beside)
        if job.cpu_s and not job.warm:
            job.cpu_s += job.import_s
        run = start(job)
        if run is None:
            return job
        report = watch(job, run)
    except Exception as error:      # an error of ours, which the parent raises (sandbox._run)
        report = {"error": str(error), "errno": getattr(error, "errno", None)}
    with contextlib.suppress(ConnectionError):
        socket.socket(fileno=0).sendall(json.dumps(report).encode())
    os._exit(0)


def serve(requests, libraries):
    """Imports libraries, says "up" or why this process cannot be forked, and forks a supervisor for each request; it
    returns in these alone. A request holds the socket with the job, so that one run's is never in another's memory."""
    requests.set_inheritable(False)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)       # the kernel clears away who ends
    state = import_libraries(libraries)
    requests.send(state.encode())
    received = state == "up"
    while received:     # until our parent is gone
        _, received, _, _ = socket.recv_fds(requests, 1, 1)
        for connection in received:
            with contextlib.suppress(OSError):      # no room: the end of the socket tells our parent
                if os.fork() == 0:
                    requests.close()
                    os.dup2(connection, 0)
                    os.close(connection)
                    os.setsid()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    return
            os.close(connection)
    os._exit(0)


def import_libraries(names):
    modules = {}
    atexit.register(spare, modules)     # before the libraries' own, so it comes last
    for name in names:
        with contextlib.suppress(ImportError):      # a script that needs it will say so
            importlib.import_module(name)
    modules.update(sys.modules)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(modules))
    for finalizer in list(weakref.finalize._registry):      # what libraries do at the end, torch for 0.1 s
        finalizer.atexit = False
    gc.collect()
    gc.freeze()         # a collection in a fork would copy every page
    libc.on_exit(libc._exit, None)      # and what their C code does; what a fork's own does goes before
    libc.on_exit(libc.fcloseall, None)
    if patiently(os.fork) == 0:     # OpenBLAS ends its threads at the first fork
        os._exit(0)
    # the streams, requests, and one for the listing
    if len(os.listdir("/proc/self/task")) > 1 or len(os.listdir("/proc/self/fd")) > 5:
        return "the libraries keep threads or files open"
    return "up"


def spare(modules):
    """Keeps the end of an interpreter from taking the libraries apart, which would copy what forks share."""
    for name in modules:
        if sys.modules.get(name) is modules[name]:
            del sys.modules[name]


if __name__ == "__main__":
    is_server = len(sys.argv) > 1
    if is_server:
        del sys.path[0]     # the current folder
        serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
    run_script(supervise(is_server))
