"""The environment: an agent edits a training script, runs it, and is rewarded by what the script's submission scores.

    env = Env("leaf-classification", out="runs/x")       # the task must be prepared: python -m tasks prepare leaf-classification
    env.reset()                                          # -> chat messages: the rules, then the task
    while not env.done:
        step = env.step(policy(env.messages))            # -> Step: what was done, what the agent sees, the reward
    python env.py replay runs/x/trajectories/FILE        # runs a recorded trajectory again and prints what differs

State. A state is the chat messages and the workspace, and the workspace is a plain dict {path: sha256} over a store of blobs. It becomes a folder only while a
script runs: the files are copied to a temporary folder, the script runs there, and the files it leaves are stored. So a snapshot costs nothing, any recorded state
comes back exactly, and no `..`, symlink or daemon can reach a workspace that does not exist. Kept are regular files with their contents; modes, times and empty
folders are not. A script that was stopped (time, memory, a signal) leaves the workspace as it was. Paths that start with `.undo/` hold what edits have replaced.

Actions have MLAgentBench's names and arguments, and one is ours: Replace In Script, an edit that the policy writes itself. Every edit is scored by running the entry
script in a copy of the workspace and grading its submission here, in the parent, against answers the script is never given. Printed metrics are noted, not believed.

Sandbox: off. What `execute` does protect: a script gets a clean environment, a time limit, and limits on memory, file size, output and processes; nothing it started
survives it, unless it attacks its supervisor. What it does not protect yet: a script may read whatever this user may read (the answers too), write outside its folder
(changed public data are noticed and stop the run), and use the network. Scripts can be executed on Linux only; everything else works anywhere.
"""
import ast, dataclasses, difflib, hashlib, json, marshal, math, os, re, shutil, subprocess, sys, tempfile, threading, time, uuid
from dataclasses import dataclass, field
from pathlib import Path

import tasks
from reward import reward

OUTCOMES = {                           # how a run can end -> the kind of reward (reward.KINDS) it leads to; the two names in brackets come from grading
    "ok": "scored",                    # exit code 0 (and a valid submission)
    "error": "failed",                 # exit code above 0
    "killed": "failed",                # ended by a signal that is not ours: a crash, or its own doing
    "too many processes": "failed",    # more processes at once than allowed
    "no submission": "failed",         # exit code 0 but no submission.csv (grading)
    "invalid submission": "failed",    # the grader refused submission.csv (grading)
    "timeout": "limit",                # longer than the time limit
    "out of memory": "limit",          # more memory than allowed, or MemoryError and the like ended the script
    "disk full": "limit",              # a file above the size limit, a full disk, or more left in the workspace than allowed
}
ADVICE = {                             # what the agent reads about an outcome, beside the output
    "error": "Find the cause in the error above and change the script.",
    "killed": "Change the script so that it does not crash.",
    "too many processes": "Use fewer processes (n_jobs, num_workers).",
    "no submission": "The script must write submission.csv to the current folder.",
    "invalid submission": "Correct what the script writes to submission.csv.",
    "timeout": "Make it faster: a smaller model, fewer rounds or folds.",
    "out of memory": "Use less memory: smaller batches, a smaller model, smaller types.",
    "disk full": "Write less to disk.",
}
UNDO = ".undo/"                        # where the workspace keeps replaced texts: .undo/<number>/<path>
FIELDS = ("Reflection", "Research Plan and Status", "Fact Check", "Thought", "Action", "Action Input")
MAX_REPLY = 100_000                    # characters of a reply; a longer one is refused unread
MAX_OBSERVATION = 5_000                # characters of an observation, about 1,500 tokens
MAX_LINES = 200                        # lines shown by one Inspect Script Lines
MAX_READ = 10 << 20                    # bytes of a file that an action looks at
MAX_SCRIPT = 1 << 20                   # bytes of a file that an action may edit
MAX_CODER = 20_000                     # characters of a file that Understand File shows to the coder
MAX_FILES, MAX_BYTES = 1_000, 1 << 30  # what a script may leave in the workspace


# ---------------------------------------------------------------------------------------------------------------------------- running a script

@dataclass(frozen=True)
class Result:
    """How a run ended: outcome (a key of OUTCOMES), exit code (minus the signal's number if a signal ended it), the two streams (head and tail kept), wall seconds,
    largest resident memory of all its processes together, the sandbox layers that were active, and one sentence where the outcome needs one."""
    outcome: str
    exit_code: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int
    sandbox: str
    detail: str = ""


def _supervise(job):
    """The whole program of the small process that stands between us and one script. Its code object is sent to a bare interpreter, so it imports for itself, and only
    what starts fast. It adopts every orphan below it (PR_SET_CHILD_SUBREAPER): a process that double-forks or calls setsid stays its descendant, and the kernel's
    "no child left" is the proof that nothing survived. Its standard input is a pipe that nobody writes to: its end means that our parent is dead or has given up.
    """
    import _signal as signal, ctypes, os, resource, select, sys, time  # _signal: the signal module costs 4 ms for its enums
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    if prctl(36, 1, 0, 0, 0):  # PR_SET_CHILD_SUBREAPER
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
    out, err, ready = os.pipe(), os.pipe(), os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: dies with its supervisor
            os.chdir(job["cwd"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out[1], 1)
            os.dup2(err[1], 2)
            for name in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these two; a new program expects the default
                signal.signal(name, signal.SIG_DFL)
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")  # when the machine runs out of memory this goes first
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"],) * 2)
            if job["address_bytes"]:
                resource.setrlimit(resource.RLIMIT_AS, (job["address_bytes"],) * 2)
            os.execve(job["command"][0], job["command"], job["env"])
        except BaseException as error:
            os.write(ready[1], repr(error).encode())
        os._exit(127)
    for pipe in (out, err, ready):
        os.close(pipe[1])
    if failure := os.read(ready[0], 1000):  # empty when exec closed the pipe
        raise RuntimeError(f"{job['command'][0]} could not be started: {failure.decode()}")

    page, half = resource.getpagesize(), max(1, job["output_bytes"] // 2)
    kept = {out[0]: [b"", b"", 0], err[0]: [b"", b"", 0]}  # pipe -> head, tail, bytes seen

    def keep(pipe):
        """Reads once; False at the end of the stream. The middle of a long stream is dropped as it comes."""
        chunk = os.read(pipe, 1 << 16)
        head, tail, seen = kept[pipe]
        room = half - len(head)
        kept[pipe] = [head + chunk[:room], (tail + chunk[room:])[-half:], seen + len(chunk)]
        return bool(chunk)

    def descendants():
        """{pid: resident bytes} of all processes below this one."""
        parents, resident = {}, {}
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    with open(f"/proc/{name}/stat", "rb") as file:
                        values = file.read().rpartition(b")")[2].split()  # the name before ")" may hold anything
                except OSError:
                    continue  # ended meanwhile
                parents[int(name)], resident[int(name)] = int(values[1]), int(values[21]) * page
        found, ring = {}, {os.getpid()}
        while ring:
            ring = {pid for pid, parent in parents.items() if parent in ring}
            found |= {pid: resident[pid] for pid in ring}
        return found

    def proportional(pids):
        """Bytes of memory with shared pages counted once, or None where the kernel does not tell: forked workers share most of theirs."""
        total = 0
        for pid in pids:
            try:
                with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                    total += int(file.read().partition(b"\nPss:")[2].split()[0]) << 10
            except ProcessLookupError:
                continue
            except (OSError, IndexError):
                return None
        return total

    def oom_kills():
        with open("/proc/vmstat", "rb") as file:
            return int((file.read().partition(b"\noom_kill ")[2].split() or [0])[0])

    status, why, peak, kills = None, "", 0, oom_kills()
    poll = select.poll()
    exited = os.pidfd_open(child)
    for descriptor in (0, exited, out[0], err[0]):
        poll.register(descriptor, select.POLLIN)
    deadline, look = started + job["timeout_s"], 0.0
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
            why = "timeout"
        elif now >= look:
            tree = descendants()
            used = sum(tree.values())
            if used > job["memory_bytes"] and len(tree) > 1:
                used = proportional(tree) or used
            peak = max(peak, used)
            why = "memory" if used > job["memory_bytes"] else "processes" if len(tree) > job["processes"] else ""
            look = time.monotonic() + max(0.05, 20 * (time.monotonic() - now))  # at most a twentieth of one core
    seconds = time.monotonic() - started

    while True:  # end all that is left: freeze, so that nothing forks while it is killed, then kill; again until the kernel says there is no child
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid:
            status = ended if pid == child else status
            continue
        frozen = None
        while frozen != (frozen := set(descendants())):
            for pid in frozen:
                try:
                    os.kill(pid, signal.SIGSTOP)
                except ProcessLookupError:
                    pass
        for pid in frozen:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.001)
    for pipe in kept:
        while keep(pipe):  # all writers are dead: this ends
            pass
    if why == "parent":
        import shutil
        shutil.rmtree(job["env"]["TMPDIR"], ignore_errors=True)
        return
    peak = max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)
    streams = [head + (b"\n... %d bytes of output cut ...\n" % cut if (cut := seen - len(head) - len(tail)) else b"") + tail for head, tail, seen in kept.values()]
    sys.stdout.write(repr((os.waitstatus_to_exitcode(status), why, seconds, peak, oom_kills() > kills, *streams)))


LAUNCH = "import marshal, sys; code, job = marshal.loads(bytes.fromhex(sys.argv[1])); type(lambda: 0)(code, globals())(job)"
_warned = set()


def execute(script, cwd, *, python=None, timeout_s, memory_bytes, output_bytes=1 << 16, file_bytes=4 << 30, processes=256, threads=1, gpu=None):
    """Runs `python script` in the folder `cwd` and returns its Result; when it returns, also by an exception, nothing the script started is alive.

    python: the interpreter for the script (default: this one). timeout_s: wall seconds. memory_bytes: resident memory of all its processes together; without a GPU
    the address space is limited too, 4 GiB above it, so that one huge allocation fails inside the script. output_bytes: kept of each stream, head and tail.
    file_bytes: largest file it may write. threads: for OpenMP and BLAS. gpu: value of CUDA_VISIBLE_DEVICES, None hides all. Safe to call from many threads.
    ValueError: no such script, folder or interpreter. RuntimeError: not on Linux, or the interpreter does not start.

    Outcomes are told from what the kernel reports and, for exit code 1, from the exception's own line at the end of the error stream (`_exception`). A script can
    raise MemoryError for no reason and be `out of memory`; that is worth 0.5, no more than doing nothing.
    """
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"scripts can be executed on Linux only (processes are supervised through /proc); this is {sys.platform}")
    cwd = os.path.abspath(cwd)
    if not os.path.isfile(os.path.join(cwd, script)):
        raise ValueError(f"there is no script {script!r} in {cwd}")
    program = shutil.which(python or sys.executable)
    if program is None:
        raise ValueError(f"python must be an interpreter that can be run; found {python!r}")
    if "off" not in _warned:
        _warned.add("off")
        print("env: sandbox off: scripts run as this user, with its files and the network in reach", file=sys.stderr)
    temporary, token = tempfile.mkdtemp(prefix="ml-agent-tmp-"), f"ML_AGENT_RUN={uuid.uuid4().hex}"
    environment = dict(
        [token.split("=")], PATH=f"{os.path.dirname(os.path.abspath(program))}:/usr/local/bin:/usr/bin:/bin", HOME=temporary, TMPDIR=temporary, LANG="C.UTF-8",
        PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1", PYTHONNOUSERSITE="1", PYTHONHASHSEED="0", PYTHONUTF8="1", MPLBACKEND="Agg", CUDA_VISIBLE_DEVICES=gpu or "",
        **{name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "LOKY_MAX_CPU_COUNT")},
        **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ})  # some CUDA and conda installations need it to start
    job = dict(command=[os.path.abspath(program), script], cwd=cwd, env=environment, timeout_s=float(timeout_s), memory_bytes=int(memory_bytes), file_bytes=file_bytes,
               address_bytes=0 if gpu else int(memory_bytes) + (4 << 30), output_bytes=output_bytes, processes=processes)
    code = marshal.dumps((_supervise.__code__, job)).hex()
    alive, hold = os.pipe()  # `hold` stays open here; the supervisor sees it close when we die
    supervisor, started = None, time.monotonic()
    try:
        supervisor = subprocess.Popen([sys.executable, "-I", "-S", "-c", LAUNCH, code], stdin=alive, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      start_new_session=True, env={name: value for name, value in environment.items() if name == "LD_LIBRARY_PATH"})
        try:
            report, trouble = supervisor.communicate(timeout=timeout_s + 30)
        except subprocess.TimeoutExpired:  # only if something stopped or blocked the supervisor
            report, trouble = b"", b""
        if trouble and not report:
            raise RuntimeError("the script's supervisor failed: " + trouble.decode(errors="replace").strip().splitlines()[-1])
    finally:
        os.close(alive)
        os.close(hold)
        if supervisor:
            try:
                supervisor.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                supervisor.kill()
                supervisor.communicate()
            if supervisor.returncode:
                _kill_marked(token.encode())
        _remove(temporary)
    if not report:  # the script killed or stopped its supervisor
        return Result("killed", -9, "", "", time.monotonic() - started, 0, "off", "The script attacked the process that supervises it.")
    exit_code, why, seconds, peak, oom, stdout, stderr = ast.literal_eval(report.decode())
    stdout, stderr = (_tidy(stream.decode("utf-8", "replace")) for stream in (stdout, stderr))
    outcome, detail = _outcome(exit_code, why, oom, stderr)
    limit = {"timeout": f"It ran longer than its limit of {timeout_s:.0f} s.", "memory": f"It used more than {memory_bytes / 2**30:.2f} GiB of memory.",
             "processes": f"It had more than {processes} processes."}
    return Result(outcome, exit_code, stdout, stderr, seconds, peak, "off", limit.get(why, detail))


def _outcome(exit_code, why, oom, stderr):
    """(outcome, detail) of a run that wrote no submission we look at. why: the limit we enforced, or "". oom: the kernel killed some process for lack of memory."""
    if why:
        return {"timeout": "timeout", "memory": "out of memory", "processes": "too many processes"}[why], ""
    if exit_code == 0:
        return "ok", ""
    if exit_code < 0:
        if exit_code == -25:  # SIGXFSZ
            return "disk full", "A file grew above the size limit."
        if exit_code == -9 and oom or exit_code == -6 and "std::bad_alloc" in stderr[-500:]:
            return "out of memory", "The machine ran out of memory."
        return "killed", f"It was ended by signal {-exit_code}."
    name, _, message = (line := _exception(stderr)).partition(": ")
    if exit_code == 1:
        if name.endswith(("MemoryError", "OutOfMemoryError")) or "[Errno 12]" in message or name == "RuntimeError" and \
                re.search("CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory", message):
            return "out of memory", line
        if name == "OSError" and re.match(r"\[Errno (27|28|122)\]|\d+ requested and \d+ written", message):  # too large, no space, quota; the last is numpy's
            return "disk full", line
    return "error", line


def _exception(stderr):
    """The line `Type: message` of the traceback that ends the error stream, "" if there is none. It must follow Python's own header and indented lines, so text that a
    script prints among its output does not count."""
    body = stderr.rpartition("Traceback (most recent call last):\n")[2] if "Traceback (most recent call last):\n" in stderr else ""
    return next((line[:500] for line in body.split("\n") if line and not line[0].isspace()), "")


def _tidy(text):
    """The text as a terminal would leave it: of what a progress bar wrote over itself the last state stays."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def _kill_marked(token):
    """Kills the processes that carry the run's token in their environment: the second net, for when a script has killed its supervisor."""
    again = True
    while again:
        again = False
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if token in file.read():
                        os.kill(int(name), 9)
                        again = True
            except OSError:
                continue  # ended, or another user's
        time.sleep(0.01)


def _remove(folder):
    """Deletes a folder, also where a script took away permissions."""
    for path, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(inner := os.path.join(path, name)):
                os.chmod(inner, 0o700)
    shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------------------------- blobs

class Blobs:
    """Contents by their sha256, in <folder>/<aa>/<sha256>; written aside and renamed, so a blob that is there is whole. Safe for many writers."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, sha):
        path = self.folder / sha[:2] / sha
        if not path.is_file():
            raise ValueError(f"the blob {sha} is missing in {self.folder}: this state cannot be restored")
        return path

    def put(self, content):
        """Stores bytes, or the file at a path; returns the sha256."""
        if isinstance(content, bytes):
            sha = hashlib.sha256(content).hexdigest()
        else:
            with open(content, "rb") as file:
                sha = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
        path = self.folder / sha[:2] / sha
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"{sha}.{uuid.uuid4().hex}")
            if isinstance(content, bytes):
                aside.write_bytes(content)
            else:
                shutil.copyfile(content, aside)
            os.replace(aside, path)
        return sha

    def get(self, sha, limit=-1):
        """The bytes (at most `limit` of them); ValueError if the blob is missing or, read whole, not what its name says."""
        with open(self.path(sha), "rb") as file:
            content = file.read(limit)
        if limit < 0 and hashlib.sha256(content).hexdigest() != sha:
            raise ValueError(f"the blob {sha} in {self.folder} is damaged: delete it and make the state again")
        return content


# ---------------------------------------------------------------------------------------------------------------------------- what the model reads and writes

ACTIONS = {  # name: (argument: explanation, what it does)
    "List Files": ({"dir_path": 'folder; "." is the workspace'}, "names and sizes of the files in a folder."),
    "Inspect Script Lines": ({"script_name": "file", "start_line_number": "first line, from 1", "end_line_number": "last line"},
                             f"shows these lines exactly, at most {MAX_LINES}. Look before you edit."),
    "Understand File": ({"file_name": "file", "things_to_look_for": "what to look for and report"}, "has a helper read a file and report."),
    "Edit Script (AI)": ({"script_name": "file to start from", "edit_instruction": "what to change, step by step", "save_name": "file to write"},
                         "has a helper rewrite the script; check the difference it returns."),
    "Replace In Script": ({"script_name": "file", "find": "exact text that occurs once", "replace": "the text to put there"},
                          "your own edit of a script; copy `find` exactly, spaces included."),
    "Undo Edit Script": ({"script_name": "file"}, "takes back the last edit of this file."),
    "Copy File": ({"source": "file", "destination": "file"}, "copies a file."),
    "Execute Script": ({"script_name": "file"}, "runs a Python script; returns what it prints."),
    "Final Answer": ({"final_answer": "what you did and the result"}, "ends the work. Use it once, when there is nothing left to improve."),
}
DEFAULT_ACTIONS = tuple(ACTIONS)
NEEDS_CODER = ("Understand File", "Edit Script (AI)")
EXPLAIN = {
    "Reflection": "what the last observation means; for an error, its cause",
    "Research Plan and Status": "the whole plan, what is done, and the results that observations confirmed",
    "Fact Check": "for each new claim: guessed, or confirmed by which observation",
    "Thought": "what you do now and why",
    "Action": "the name of one tool",
    "Action Input": "one JSON object with exactly that tool's keys",
}


def system_prompt(actions=DEFAULT_ACTIONS, fields=FIELDS):
    """The first message: the tools, the rules, the format. The same for all tasks, so that its cache is shared."""
    tools = "\n".join(f"- {name} {json.dumps(ACTIONS[name][0])}: {ACTIONS[name][1]}" for name in actions)
    entries = "\n".join(f"{name}: ({EXPLAIN[name]})" for name in fields)
    return f"""You are a machine-learning engineer. You improve a training script, step by step, so that the predictions it writes score better on hidden test data. \
Each of your replies uses one tool; the next message is its observation.

Tools, with the keys of their Action Input:
{tools}

Rules:
- Run the script as it is first, so that you know the score to beat. Then change one thing, run again, and compare the validation scores.
- Only scores that a run has printed count. Undo changes that do not help.
- The script must write submission.csv in the form the task asks for. Only files in the workspace can be named; data/ is read-only.
- Nothing can be installed or downloaded.

Answer in exactly this form, every entry on its own line and nothing after the JSON:
{entries}

Example of the last two entries:
Action: Inspect Script Lines
Action Input: {{"script_name": "train.py", "start_line_number": "1", "end_line_number": "60"}}
In JSON a line break inside a text is written \\n, a double quote \\", a backslash \\\\."""


def parse(reply, fields=FIELDS, actions=DEFAULT_ACTIONS):
    """(fields, action, args, error) of a reply, for any string; error is "" when the action may be executed, else one sentence.

    Every entry of `fields` must begin a line, in order; markdown signs before and around its name, and other case, are let pass. Of a repeated entry the first counts.
    Text after a line that starts with "Observation:" is the model's invention and is not read. The Action must be a known name, exactly; signs of quoting round it are
    let pass. Action Input: the first JSON object after the header; code fences before it, raw line breaks inside its texts and anything after it are let pass. Its keys
    must be exactly the tool's, its values texts (line numbers may be whole numbers). All searches are for fixed text or anchored to a line, so time is linear.
    """
    if len(reply) > MAX_REPLY:
        return {}, None, {}, f"The reply is longer than {MAX_REPLY:,} characters."
    if not reply.strip():
        return {}, None, {}, "The reply is empty."
    text, spans = cut_observation(reply), []
    for name in fields:
        header = re.compile(rf"^[ \t>*#-]{{0,8}}{re.escape(name)}[ \t*]{{0,8}}:[ \t*]{{0,8}}", re.MULTILINE | re.IGNORECASE)
        found = header.search(text, spans[-1][2] if spans else 0)
        if not found:
            return {}, None, {}, f'The entry "{name}:" is missing; expected are, in this order and each on its own line: {", ".join(fields)}.'
        spans.append((name, found.start(), found.end()))
    ends = [start for _, start, _ in spans[1:]] + [len(text)]
    values = {name: text[begin:end].strip() for (name, _, begin), end in zip(spans, ends)}
    action, source = values["Action"].strip("`*\"'[] \t\n"), values.pop("Action Input")
    if action not in actions:
        return values, None, {}, f"There is no tool {clip(action, 60)!r}; the tools are: {', '.join(actions)}."
    keys = ACTIONS[action][0]
    shape = f"expected is {json.dumps(keys)}"
    if "{" not in source:
        return values, action, {}, f"The Action Input holds no JSON object; {shape}."
    try:
        args = json.JSONDecoder(strict=False).raw_decode(source, source.index("{"))[0]
    except (ValueError, RecursionError) as error:
        return values, action, {}, f"The Action Input is not valid JSON ({clip(str(error), 100)}); {shape}."
    if set(args) != set(keys):
        return values, action, {}, f"The Action Input of {action} has the keys {clip(', '.join(map(repr, args)), 200) or 'none'}; {shape}."
    for key, value in args.items():
        if key.endswith("line_number") and type(value) is int:
            args[key] = value = str(value)
        if type(value) is not str:
            return values, action, {}, f'"{key}" must be a text in double quotes; found {clip(repr(value), 60)}.'
        if key.endswith("line_number") and not re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
            return values, action, {}, f'"{key}" must be a whole number; found {clip(repr(value), 60)}.'
        if any("\ud800" <= c <= "\udfff" for c in value):
            return values, action, {}, f'"{key}" holds half of a surrogate pair, which is no character.'
    return values, action, args, ""


def cut_observation(reply):
    """The reply up to a line that starts with "Observation:"."""
    found = re.search(r"^[ \t*]{0,8}Observation[ \t*]{0,8}:", reply, re.MULTILINE)
    return reply[:found.start()] if found else reply


def clip(text, limit):
    """The text with its middle cut out, and the cut marked, if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    mark = f" ... {len(text) - limit:,} characters cut ... "
    mark = mark.replace(" ... ", "\n... ", 1)[:-1] + "\n" if "\n" in text else mark
    return text[:limit // 2] + mark + text[len(text) - (limit - limit // 2):]


def printed_metric(stdout, metric=""):
    """The validation score that a script printed: the last number of the last line that mentions "validation" or the metric's name; None if there is none."""
    for line in reversed(stdout.splitlines()):
        if "validation" in line.lower() or metric and metric.lower() in line.lower():
            numbers = re.findall(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?(?![\w])", line[-1000:])
            if numbers and math.isfinite(value := float(numbers[-1])):
                return value
    return None


# ---------------------------------------------------------------------------------------------------------------------------- the environment

class Refused(ValueError):
    """An action whose arguments cannot be carried out; the message is for the agent."""


@dataclass
class Step:
    """One action and what it led to; `record` makes it a line of a trajectory file."""
    index: int                         # 0 for the first
    reply: str                         # as it came, at most MAX_REPLY + 1 characters
    fields: dict = field(default_factory=dict)      # entry: text, without the Action Input
    action: str | None = None
    args: dict = field(default_factory=dict)
    valid: bool = False                # the reply parsed and the arguments were accepted
    error: str = ""                    # why not, one sentence
    observation: str = ""              # what the agent sees
    kind: str = "not an edit"          # the kind of reward, one of reward.KINDS
    outcome: str | None = None         # how the script ended, a key of OUTCOMES; None if none ran
    detail: str = ""                   # the executor's or grader's sentence about it
    printed: float | None = None       # the validation score the script printed; not to be believed
    score: float | None = None         # the graded score of the submission this step's run wrote
    m_before: float | None = None      # the graded score of the entry script before this step
    reward: float = 0.0
    seconds: float = 0.0               # the whole step
    script_seconds: float = 0.0        # the run alone (of the first run, if its result was known)
    peak_bytes: int = 0
    sandbox: str = ""                  # layers active in the run
    coder: list = field(default_factory=list)       # what the coder replied, for replay
    messages: list = field(default_factory=list)    # the two chat messages this step added
    snapshot: dict = field(default_factory=dict)    # the workspace after the step
    ended: str = ""                    # why the trajectory is over after this step: "final answer", "steps", "time", or "" if it goes on


_slots = threading.BoundedSemaphore(os.cpu_count() or 1)  # scripts that run at once, all Envs together; more would make timeouts depend on the load


class Env:
    """One trajectory on one task.

    task: a Task or its id. data: the folder of prepared data. out: where `blobs/` is kept; many Envs may share it. actions: names from ACTIONS; those that need a coder
    are left out when there is none. fields: the entries of a reply, ending in "Action", "Action Input". steps, seconds: limits of the trajectory; waiting for a free
    slot to run a script does not count. coder: callable(messages) -> str, a second model for the (AI) actions; a ValueError of it (a text that does not fit) goes to
    the agent, other errors are the caller's. python, gpu, threads: see execute. cache: a dict that Envs may share, so that a state is scored once.
    """

    def __init__(self, task, data="data", *, out, actions=DEFAULT_ACTIONS, fields=FIELDS, steps=15, seconds=1800, coder=None, python=None, gpu=None, threads=1, cache=None):
        self.task = tasks.load(task) if isinstance(task, str) else task
        self.data, self.out = Path(data), Path(out)
        self.info = tasks.info(self.task.id, data=data)
        self.public = (self.data / self.task.id / "public").resolve()
        self.blobs = Blobs(self.out / "blobs")
        if unknown := [name for name in actions if name not in ACTIONS]:
            raise ValueError(f"unknown actions {unknown}; known are: {', '.join(ACTIONS)}")
        if unknown := [name for name in fields if name not in FIELDS] or list(fields[-2:]) != ["Action", "Action Input"]:
            raise ValueError(f"fields must come from {FIELDS} and end in 'Action', 'Action Input'; found {tuple(fields)}")
        self.actions = tuple(name for name in actions if coder or name not in NEEDS_CODER)
        self.fields, self.steps, self.seconds, self.coder = tuple(fields), steps, seconds, coder
        self.python, self.gpu, self.threads = python, gpu, threads
        self.cache = {} if cache is None else cache
        self.reset()

    # ---- state

    def reset(self):
        """Back to the starter; returns the messages."""
        starter = {self.task.entry: self.blobs.put((self.task.folder / self.task.entry).read_bytes())}
        problem = f"""Task: {self.task.id}

{self.task.problem.strip()}

The workspace holds {self.task.entry} (the script to improve) and data/ (read-only). The metric is {self.task.metric}; \
{"higher" if self.task.direction == "up" else "lower"} is better. You have {self.steps} steps and {self.seconds / 60:.0f} minutes; \
one run of a script may take {self.task.time_limit_s:.0f} s."""
        self.restore(starter, [{"role": "system", "content": system_prompt(self.actions, self.fields)}, {"role": "user", "content": problem}])
        return self.messages

    def snapshot(self):
        """The workspace as {path: sha256}; what edits have replaced is in it, under .undo/."""
        return dict(self.files)

    def restore(self, snapshot, messages=None, *, index=0, m_before=None):
        """Continues from a recorded state: the workspace before step `index`, the messages so far, and the score it had (default: the starter's). The clock starts anew.
        ValueError: a blob is missing."""
        for sha in snapshot.values():
            self.blobs.path(sha)
        self.files = dict(snapshot)
        self.messages = [dict(message) for message in (self.messages if messages is None else messages)]
        self.index, self.m_before = index, self.info["m_init"] if m_before is None else m_before
        self.ended, self.scores, self.deadline = "", [], time.monotonic() + self.seconds

    @property
    def done(self):
        return bool(self.ended)

    @property
    def failed(self):
        """True when the trajectory is over and no run of it left a valid submission."""
        return self.done and not self.scores

    def close(self):
        """Ends the trajectory. Nothing else has to be freed: an Env holds no folder and no process between steps."""
        self.ended = self.ended or "closed"

    # ---- one step

    def step(self, reply, tokens=None):
        """Carries out one reply, whatever it is, and returns the Step. tokens: the reply's ids as sampled, kept in the messages so that the text is never encoded again.
        When the trajectory is over nothing is done and the Step says so."""
        started = time.monotonic()
        reply = reply[:MAX_REPLY + 1].encode("utf-8", "replace").decode()
        step = Step(self.index, reply, m_before=self.m_before, ended=self.ended)
        if self.done:
            step.kind, step.error, step.snapshot = "invalid", "The trajectory is over; nothing was done.", self.snapshot()
            step.observation = step.error
            return step
        step.fields, step.action, step.args, step.error = parse(reply, self.fields, self.actions)
        if started > self.deadline:
            step.kind, step.error = "limit", "The time for this work is over; nothing was done."
        if not step.error:
            try:
                step.observation = getattr(self, "_" + re.sub(r"\W+", "_", step.action.lower()).strip("_"))(step, **step.args)
                step.valid = True
            except Refused as error:
                step.error = str(error)
        if step.error:
            step.kind = "invalid" if step.kind != "limit" else "limit"
            step.observation = f"Nothing was done. {step.error}"
        self.index += 1
        if not self.ended:
            self.ended = "time" if time.monotonic() > self.deadline else "steps" if self.index >= self.steps else ""
        if step.score is not None:
            self.scores.append(step.score)
        left = max(0, self.deadline - time.monotonic()) / 60
        step.observation = clip(step.observation, MAX_OBSERVATION)
        if not self.ended:
            step.observation += f"\n[{self.steps - self.index} steps and {left:.0f} min left]"
        step.reward = reward(step.kind, step.m_before, step.score, m_init=self.info["m_init"], m_best=self.info["m_best"],
                             direction=self.task.direction, alpha=self.task.alpha)
        said = {"role": "assistant", "content": cut_observation(clip(reply, MAX_REPLY))}
        if tokens is not None and said["content"] == reply:
            said["tokens"] = list(tokens)
        step.messages = [said, {"role": "user", "content": step.observation}]
        self.messages += step.messages
        step.snapshot, step.ended, step.seconds = self.snapshot(), self.ended, time.monotonic() - started
        return step

    # ---- files. A path here is the normalised text of a path below the workspace; "data/..." are the public files, which exist outside it and are only read

    def _path(self, text, write=False):
        """The normalised path, "" for the workspace itself; Refused if it leaves the workspace, or may not be written."""
        shown = clip(repr(text), 80)
        if len(text) > 300 or any(len(part.encode()) > 100 for part in text.split("/")) or not text.isprintable():
            raise Refused(f"{shown} is not a usable file name.")
        if text.startswith(("/", "~")) or ".." in text.split("/"):
            raise Refused(f"{shown} is outside the workspace; name files relative to it, such as {self.task.entry!r}.")
        path = "/".join(part for part in text.strip().split("/") if part not in ("", "."))
        if (path + "/").startswith(UNDO):
            raise Refused(f"{shown} is reserved.")
        if write:
            if not path or text.rstrip().endswith("/") or any(name.startswith(path + "/") for name in self.files):
                raise Refused(f"{shown} is a folder, not a file.")
            if self._read_only(path):
                raise Refused(f"{shown} is read-only.")
            if blocker := next((name for name in self.files if path.startswith(name + "/")), None):
                raise Refused(f"{shown} cannot be written: {blocker!r} is a file.")
        return path

    def _read_only(self, path):
        return any(path == name or path.startswith(name + "/") for name in self.task.read_only)

    def _in_data(self, path):
        """The real path of "data" or "data/...", or None for a path of the workspace. Symlinks in the data folder are followed only inside it."""
        if path != "data" and not path.startswith("data/"):
            return None
        real = (self.public / path[5:]).resolve()
        if real != self.public and self.public not in real.parents:
            raise Refused(f"{path!r} leads outside the data folder.")
        return real

    def _file(self, path):
        """Where the contents of a file lie; Refused if there is no such file."""
        real = self._in_data(path)
        if real and real.is_file():
            return real
        if path in self.files:
            return self.blobs.path(self.files[path])
        folder = path == "" or real and real.is_dir() or any(name.startswith(path + "/") for name in self.files)
        here = ", ".join([name for name in sorted(self.files) if not name.startswith(UNDO)][:20])
        raise Refused(f"{path or '.'!r} is a folder, not a file." if folder else f"There is no file {path!r}; the workspace holds {here}, data/.")

    def _text(self, path, whole=False):
        """(text, size in bytes) of a file; only its first MAX_READ bytes are looked at. whole: for editing, the file must be UTF-8 and at most MAX_SCRIPT bytes."""
        file = self._file(path)
        size = file.stat().st_size
        with open(file, "rb") as handle:
            content = handle.read(MAX_READ)
        try:
            text = content.decode("utf-8", "strict" if whole else "replace")
        except UnicodeDecodeError:
            raise Refused(f"{path!r} is not a text file in UTF-8; it cannot be edited.") from None
        if b"\0" in content[:8192] or text.count("\ufffd") > len(text) // 10:
            raise Refused(f"{path!r} is a binary file of {size:,} bytes that starts with {content[:8].hex(' ')}; it cannot be shown. Use a script to read it.")
        if whole and size > MAX_SCRIPT:
            raise Refused(f"{path!r} has {size:,} bytes; only files up to {MAX_SCRIPT:,} bytes can be edited.")
        return text, size

    def _write(self, path, sha):
        """Puts a blob at a path; what was there is kept for Undo Edit Script."""
        if path in self.files:
            number = 1 + max([int(name.split("/")[1]) for name in self.files if name.startswith(UNDO)], default=0)
            self.files[f"{UNDO}{number}/{path}"] = self.files[path]
        self.files[path] = sha

    def _edited(self, step, path, old, new, write):
        """The observation of an edit: the difference. Carries it out by write() and scores it, unless nothing changes."""
        if old == new:
            return f"{path} is unchanged: the edit makes no difference."
        write()
        self._score_into(step)
        diff = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=2)
        return f"{path} was saved. The difference:\n" + "\n".join(line for line in diff if not line.startswith(("---", "+++")))

    # ---- actions: each takes the Step to fill and its arguments, and returns the observation

    def _list_files(self, step, dir_path):
        path = self._path(dir_path)
        real = self._in_data(path)
        if real and real.is_dir():
            entries = {entry.name + "/" * entry.is_dir(): entry.stat().st_size for entry in real.iterdir() if entry.exists()}
        else:
            below = {name[len(path) + bool(path):]: sha for name, sha in self.files.items() if not path or name.startswith(path + "/")}
            if not below:
                raise Refused(f"There is no folder {path!r}.")
            entries = {name.split("/")[0] + "/" * ("/" in name): 0 if "/" in name else self.blobs.path(sha).stat().st_size
                       for name, sha in below.items() if not name.startswith(UNDO)}
            if not path:
                entries["data/"] = 0
        names = sorted(entries)
        lines = [name if name.endswith("/") else f"{name}  {entries[name]:,} bytes" for name in names[:100]]
        return "\n".join(lines + [f"... and {len(names) - 100:,} more"] * (len(names) > 100)) or "The folder is empty."

    def _inspect_script_lines(self, step, script_name, start_line_number, end_line_number):
        path = self._path(script_name)
        text, size = self._text(path)
        lines = text.splitlines()
        first, last = int(start_line_number), min(int(end_line_number), len(lines), int(start_line_number) + MAX_LINES - 1)
        if not 1 <= first <= max(last, 1):
            raise Refused(f"Lines {first} to {int(end_line_number)} cannot be shown: {path} has {len(lines)} lines.")
        shown, room = [], MAX_OBSERVATION - 200
        for line in lines[first - 1:last]:
            room -= len(line) + 1
            if room < 0 and shown:
                break
            shown.append(clip(line, MAX_OBSERVATION - 1000))
        more = " It is larger than what is looked at; counted are its first 10 MiB." if size > MAX_READ else ""
        return f"Lines {first} to {first + len(shown) - 1} of {len(lines)} of {path}:{more}\n" + "\n".join(shown)

    def _understand_file(self, step, file_name, things_to_look_for):
        path = self._path(file_name)
        text, size = self._text(path)
        return self._ask(step, f"Read the file {path} ({size:,} bytes). Report shortly and quote the lines that matter. Say what you could not find; guess nothing.\n\n"
                               f"Look for: {things_to_look_for}\n\n```\n{clip(text, MAX_CODER)}\n```")

    def _edit_script_ai(self, step, script_name, edit_instruction, save_name):
        path, target = self._path(script_name, write=True), self._path(save_name, write=True)
        old = self._text(path, whole=True)[0]
        answer = self._ask(step, f"Here is the Python script {path}:\n```python\n{old}\n```\n\nEdit it as follows and change nothing else:\n{edit_instruction}\n\n"
                                 "Answer with the whole edited file in one ```python block.")
        opening = re.search(r"^[ \t]*```(?:python|py)?[ \t]*\n", answer, re.MULTILINE)
        if not opening:
            return "The helper returned no code; nothing was changed. Try a simpler instruction."
        new = re.split(r"^[ \t]*```", answer[opening.end():], maxsplit=1, flags=re.MULTILINE)[0].rstrip() + "\n"
        if target != path and target not in self.files:
            return self._edited(step, target, "", new, lambda: self._write(target, self.blobs.put(new.encode("utf-8", "replace"))))
        old = self._text(target, whole=True)[0]
        return self._edited(step, target, old, new, lambda: self._write(target, self.blobs.put(new.encode("utf-8", "replace"))))

    def _ask(self, step, question):
        """One question to the coder; its reply is kept in the step."""
        try:
            answer = self.coder([{"role": "user", "content": question}])
        except ValueError as error:
            raise Refused(f"The helper could not read this: {clip(str(error), 200)}") from error
        step.coder.append(answer)
        return answer

    def _replace_in_script(self, step, script_name, find, replace):
        path = self._path(script_name, write=True)
        old = self._text(path, whole=True)[0]
        if not find:
            raise Refused('"find" is empty; give the text that is to be replaced.')
        if (count := old.count(find)) != 1:
            raise Refused(f'"find" does not occur in {path}; copy it exactly as Inspect Script Lines shows it.' if not count else
                          f'"find" occurs {count} times in {path}; it must occur once: take in more of the lines around it.')
        new = old.replace(find, replace)
        return self._edited(step, path, old, new, lambda: self._write(path, self.blobs.put(new.encode())))

    def _undo_edit_script(self, step, script_name):
        path = self._path(script_name, write=True)
        backups = [name for name in self.files if name.startswith(UNDO) and name.split("/", 2)[2] == path]
        if not backups:
            raise Refused(f"There is no edit of {path!r} to undo.")
        newest = max(backups, key=lambda name: int(name.split("/")[1]))
        sha = self.files.pop(newest)
        old, new = (self.blobs.get(each).decode("utf-8", "replace") if each else "" for each in (self.files.get(path), sha))
        return self._edited(step, path, old, new, lambda: self.files.__setitem__(path, sha))

    def _copy_file(self, step, source, destination):
        origin, target = self._path(source), self._path(destination, write=True)
        file = self._file(origin)
        if file.stat().st_size > MAX_BYTES // 4:
            raise Refused(f"{origin!r} is too large to be copied; scripts can read it where it is.")
        sha = self.blobs.put(file)
        if sha != self.files.get(target):
            self._write(target, sha)
            if target == self.task.entry:
                self._score_into(step)
        return f"{origin} was copied to {target}."

    def _execute_script(self, step, script_name):
        path = self._path(script_name)
        if path not in self.files:
            self._file(path)
            raise Refused(f"{path!r} is data; only scripts in the workspace can be executed.")
        result, score, files = self._run(path, self._time_left())
        kept = {name: sha for name, sha in self.files.items() if name.startswith(UNDO)}
        self.files = self.files if files is None else files | kept
        self._fill(step, result, score)
        if step.kind == "scored":
            step.kind = "not an edit"
        if score is not None and path == self.task.entry:
            self.m_before = score
        room = MAX_OBSERVATION - 700
        parts = [f"{path} ran to the end in {result.seconds:.1f} s." if result.outcome == "ok" else f"{path} ended after {result.seconds:.1f} s: {result.outcome}."]
        if result.exit_code == 0:
            parts += [clip(result.stdout.strip() or result.stderr.strip() or "It printed nothing.", room)]
        else:  # what it printed before the error stays
            parts += [clip(result.stdout.strip(), room // 2)] if result.stdout.strip() else []
            parts += ["Errors:\n" + clip(result.stderr.strip(), room // 2)] if result.stderr.strip() else []
        if result.outcome != "ok":
            missing = re.match(r"ModuleNotFoundError: No module named '([^']{1,60})'", result.detail)
            advice = f"The package {missing[1]} is not installed and cannot be; do without it." if missing else ADVICE[result.outcome]
            parts += [advice if result.outcome == "error" else f"{clip(result.detail, 300)} {advice}".strip()]
        return "\n".join(parts)

    def _final_answer(self, step, final_answer):
        self.ended = "final answer"
        return "The work is ended."

    # ---- running and scoring

    def score(self):
        """(graded score or None, Result): runs the entry script in a copy of the workspace, with the task's own time limit, and grades its submission."""
        result, score, _ = self._run(self.task.entry, self.task.time_limit_s)
        return score, result

    def _score_into(self, step):
        """Scores the workspace after an edit. The agent sees nothing of it."""
        if self.task.entry not in self.files:
            step.kind, step.outcome = "failed", "error"
            return
        result, score, _ = self._run(self.task.entry, self._time_left())
        self._fill(step, result, score)
        if score is not None:
            self.m_before = score

    def _fill(self, step, result, score):
        step.outcome, step.detail, step.kind, step.score = result.outcome, result.detail, OUTCOMES[result.outcome], score
        step.printed, step.script_seconds = printed_metric(result.stdout, self.task.metric), result.seconds
        step.peak_bytes, step.sandbox = result.peak_bytes, result.sandbox

    def _time_left(self):
        return max(0.0, min(self.task.time_limit_s, self.deadline - time.monotonic()))

    def _run(self, script, timeout_s):
        """(Result, graded score or None, files afterwards or None if the workspace stays as it was): one script, in a temporary copy of the workspace. A function of the
        state alone, so its answer is kept: running a script after its edit was scored costs nothing. The entry script starts without an old submission.csv; after another
        script the submission is graded if it has changed."""
        before = {path: sha for path, sha in self.files.items() if not path.startswith(UNDO)}
        if script == self.task.entry:
            before.pop("submission.csv", None)
        key = (self.task.id, str(self.public), self.python, self.gpu, self.threads, script, tuple(sorted(before.items())))
        if key in self.cache:
            return self.cache[key]
        waited = time.monotonic()
        with _slots:
            self.deadline += time.monotonic() - waited
            folder = Path(tempfile.mkdtemp(prefix="ml-agent-run-"))
            try:
                public = _stamps(self.public)
                self._build(folder, before)
                result = execute(script, folder, python=self.python, timeout_s=timeout_s, memory_bytes=self.task.memory_limit_bytes, gpu=self.gpu, threads=self.threads)
                if _stamps(self.public) != public:
                    raise RuntimeError(f"the script {script} has changed the public data in {self.public}; prepare the task again: "
                                       f"python -m tasks prepare {self.task.id} --force")
                plain = {name: getattr(result, name).replace(f"{folder}/", "") for name in ("stdout", "stderr", "detail")}  # the folder's name is random
                result, score, after = dataclasses.replace(result, **plain), None, None
                if result.outcome in ("ok", "error"):
                    after, problem = self._collect(folder, before)
                    if problem:
                        result = dataclasses.replace(result, outcome="disk full", detail=problem)
                if result.outcome == "ok" and (script == self.task.entry or after.get("submission.csv") != before.get("submission.csv")):
                    result, score = self._grade(result, folder / "submission.csv")
            finally:
                _remove(folder)
        if result.outcome != "timeout" or timeout_s >= self.task.time_limit_s:
            self.cache[key] = result, score, after
        return result, score, after

    def _grade(self, result, submission):
        """(result, score) with what the grader found."""
        if not os.path.lexists(submission):
            return dataclasses.replace(result, outcome="no submission", detail="The script ended without writing submission.csv."), None
        try:
            score = float(tasks.grade(self.task.id, submission, data=self.data))
        except tasks.InvalidSubmission as error:
            return dataclasses.replace(result, outcome="invalid submission", detail=f"submission.csv is not valid: {error}"), None
        if not math.isfinite(score):
            return dataclasses.replace(result, outcome="invalid submission", detail="submission.csv is not valid: its score is not a finite number"), None
        return result, score

    def _build(self, folder, files):
        """Writes the files to the folder. `data` is a real folder whose entries are links to the public files: what a script adds to it is dropped, not shared."""
        for path, sha in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.blobs.path(sha), folder / path)
        (folder / "data").mkdir()
        for name in os.listdir(self.public):
            (folder / "data" / name).symlink_to(self.public / name)

    def _collect(self, folder, before):
        """({path: sha256} of the regular files a script has left, or None; what is wrong, or ""). Symlinks, pipes and names that are not UTF-8 are left out."""
        found, total = {}, 0
        for parent, folders, names in os.walk(folder):
            inside = os.path.relpath(parent, folder) + "/" if parent != str(folder) else ""
            folders[:] = [name for name in folders if not self._read_only(inside + name) and not f"{inside}{name}/".startswith(UNDO)]
            for name in names:
                path, file = inside + name, os.path.join(parent, name)
                if os.path.islink(file) or not os.path.isfile(file) or self._read_only(path) or not path.isprintable():
                    continue
                found[path] = file
                total += os.path.getsize(file)
                if len(found) > MAX_FILES or total > MAX_BYTES:
                    return None, f"The script left more than {MAX_FILES:,} files or {MAX_BYTES >> 20:,} MiB in the workspace; nothing was kept."
        for file in found.values():
            os.chmod(file, 0o600)
        same = {path: sha for path, sha in before.items() if self._read_only(path)}
        return {path: self.blobs.put(file) for path, file in found.items()} | same, ""


def _stamps(folder):
    """Name, size and time of change of the entries of a folder: enough to see that a script has written to shared data."""
    return sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(folder))


# ---------------------------------------------------------------------------------------------------------------------------- records and replay

def header(env, **more):
    """The first line of a trajectory file, to be written right after reset(): what it takes to restore the first state. more: the caller's own entries (model, seed)."""
    return {"type": "header", "task": env.task.id, "data": str(env.data), "actions": list(env.actions), "fields": list(env.fields), "steps": env.steps,
            "seconds": env.seconds, "python": env.python, "gpu": env.gpu, "threads": env.threads, "miniature": bool(env.info.get("miniature")),
            "m_init": env.info["m_init"], "m_best": env.info["m_best"], "snapshot": env.snapshot(), "messages": env.messages, **more}


def record(step, **more):
    """One further line of a trajectory file. The state before step i: the snapshot of step i - 1, and the header's messages with those of all steps before i."""
    return {"type": "step", **dataclasses.asdict(step), **more}


def read_trajectory(path):
    """(header, [step, ...]) of a trajectory file. ValueError names the line that is no record."""
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
            expected = "header" if number == 1 else "step"
            if records[-1]["type"] != expected:
                raise ValueError(f'expected type "{expected}", found {records[-1]["type"]!r}')
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no record of a trajectory: {error}") from error
    if not records:
        raise ValueError(f"{path} is empty")
    return records[0], records[1:]


COMPARED = ("fields", "action", "args", "valid", "error", "observation", "kind", "outcome", "detail", "printed", "score", "m_before", "reward", "snapshot", "ended")


def replay(path, say=print):
    """Restores each recorded state, carries out its reply again, and says what differs. Times are masked, figures compared to 6 digits. Returns the number of differences."""
    head, steps = read_trajectory(path)
    folder = next((parent for parent in Path(path).resolve().parents if (parent / "blobs").is_dir()), None)
    if folder is None:
        raise ValueError(f"no folder `blobs` beside {path} or above it: the recorded states cannot be restored")
    answers = []
    env = Env(head["task"], head["data"], out=folder, actions=head["actions"], fields=head["fields"], steps=head["steps"], seconds=head["seconds"], python=head["python"],
              gpu=head["gpu"], threads=head["threads"], coder=(lambda messages: answers.pop(0)) if set(NEEDS_CODER) & set(head["actions"]) else None)
    snapshot, messages, count = head["snapshot"], head["messages"], 0
    for old in steps:
        env.restore(snapshot, messages, index=old["index"], m_before=old["m_before"])
        answers[:] = old["coder"]
        new = record(env.step(old["reply"]))
        for name in COMPARED:
            before, now = _masked(old[name]), _masked(new[name])
            if name == "snapshot" and before != now:
                before, now = ({key: each[key][:12] for key in each if before.get(key) != now.get(key)} for each in (before, now))
            if before != now:
                count += 1
                say(f"step {old['index']}, {name}:\n  recorded: {clip(repr(before), 500)}\n  replayed: {clip(repr(now), 500)}")
        snapshot, messages = old["snapshot"], messages + old["messages"]
    say(f"{len(steps)} steps replayed, {count} differences")
    return count


def _masked(value):
    """The value with all that depends on the clock masked, and figures rounded to 6 digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return re.sub(r"\d[\d.,]* ?(?=(?:ms|s|sec|seconds|min|minutes)\b)", "# ", value) if isinstance(value, str) else value


def main(args):
    if len(args) != 2 or args[0] != "replay":
        print("usage: python env.py replay FILE      (a trajectory file, as eval.py and sft.py write them)", file=sys.stderr)
        return 2
    try:
        return 1 if replay(args[1]) else 0
    except (ValueError, OSError) as error:
        print(f"env.py replay: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
