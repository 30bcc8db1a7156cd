"""A scripted adversary drives Env.step: python tests/soak.py --steps 2000 --seed 0

Each step is one of the KINDS below: a hostile script (run by an edit, or put there and executed), a hostile reply, or a
hostile answer of the coder. After each step it must hold that nothing was raised, the Step is well-formed, and our side
took at most a second more than the script's limit or the time that was left; at the end that no process, file or folder
is left and that memory has not grown. It prints what did not hold, and then ends with 1.
"""
import argparse
import collections
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import env as env_module  # noqa: E402
import tasks  # noqa: E402
from common import act, add_task  # noqa: E402
from env import ACTIONS, Env
from reward import KINDS as REWARD_KINDS  # noqa: E402
from support import sandbox
from support.storage import check_snapshot
from support.records import check_record, record

HEAD = "import contextlib, os, shutil, signal, socket, stat, subprocess, sys, threading, time\n"
SUBMIT = 'open("submission.csv", "w").write("id,y\\n1,{0}\\n2,{0}\\n")\n'
STARTER = HEAD + SUBMIT.format(3) + 'print("validation MAE: 7")\n'

# what a script does; half of the time it then writes a submission that is valid
SCRIPTS = {
    "folders, deep": "for i in range(3000):\n    os.mkdir('d'); os.chdir('d')\n",
    "folders, deep, in TMPDIR":
        "os.chdir(os.environ['TMPDIR'])\nfor i in range(3000):\n    os.mkdir('d'); os.chdir('d')\n",
    "folders, long names": "for i in range(40):\n    os.mkdir('d' * 250); os.chdir('d' * 250)\n",
    "folders, many": "for i in range(10_100): os.mkdir(f'd{i}')\n",
    "files, many": "for i in range(3_000): open(f'f{i}', 'w').close()\n",
    "files, a few more than may be": "for i in range(1001): open(f'f{i}', 'w').close()\n",
    "files in many folders":
        "for i in range(500):\n    os.makedirs(f'a{i}/b/c'); open(f'a{i}/b/c/file', 'w').write('x' * i)\n",
    "names, odd":
        "for name in (b'\\xff\\xfe', b'a\\nb', b'\\xed\\xa0\\x80', b'n' * 255, b'~', b' ', b'a b ', b'\\\\', b'*',"
                  " b'con:', b'\\x1b[2J', '\\u202e\\u2028'.encode(), b'data ', b'...'):\n"
        "    open(name, 'w').write('x')\n",
    "names of options": "for name in ('-c.py', '-m', '--help', '-', '-I'): open(name, 'w').write('print(1)')\n",
    "names of modules": "for name in ('json', 'numpy', 'sitecustomize', 'os'): open(name + '.py', 'w').write('1/0')\n",
    "a file where data was": "shutil.rmtree('data', ignore_errors=True)\nopen('data', 'w').write('x')\n",
    "files in data":
        "open('data/new.csv', 'w').write('x'); os.makedirs('data/a/b'); open('data/a/b/c', 'w').write('x')\n",
    "data is a link": "shutil.rmtree('data')\nos.symlink('/', 'data')\n",
    "writes to public data": "open('data/sample_submission.csv', 'a').write('x')\n",
    "what edits replaced": "os.makedirs('.undo/1'); open('.undo/1/train.py', 'w').write('print(1)')\n",
    "a file .undo": "open('.undo', 'w').write('x')\n",
    "the script is a folder": "os.remove('train.py'); os.mkdir('train.py'); open('train.py/x', 'w').write('x')\n",
    "the script is gone": "for name in os.listdir('.'):\n    if name != 'data': os.remove(name)\n",
    "the script is huge": "os.truncate('train.py', 100 << 20)\n",
    "the script is binary": "open('train.py', 'wb').write(b'\\0\\xff' * 1000)\n",
    "the script is blank": "open('train.py', 'w').write(' ' * 300_000)\n",
    "the folder is gone":
        "os.chdir('/'); shutil.rmtree(os.path.dirname(os.path.abspath(__file__)), ignore_errors=True)\n",
    "nothing may be read": "for name in os.listdir('.'):\n    if name != 'data': os.chmod(name, 0)\nos.chmod('.', 0)\n",
    "folders may not be read": "os.makedirs('a/b/c'); os.chmod('a/b', 0); os.chmod('a', 0)\n",
    "a sparse file": "open('big', 'wb').truncate((4 << 30) - 1)\n",
    "a file as large as may be": "open('big', 'wb').truncate((1 << 28) - 1_000_000)\n",
    "sparse files": "for i in range(20): open(f'big{i}', 'wb').truncate(1 << 30)\n",
    "pipes and sockets": "os.mkfifo('pipe'); socket.socket(socket.AF_UNIX).bind('socket')\n",
    "links":
        "os.symlink('.', 'self'); os.symlink('b', 'a'); os.symlink('a', 'b'); os.symlink('/etc/passwd', 'c.csv')\n",
    "hard links": "open('one', 'w').write('x' * 1000)\nfor i in range(900): os.link('one', f'l{i}')\n",
    "a file that grows":
        "if os.fork() == 0:\n    os.setsid()\n    while True: open('grows', 'a').write('x' * 100_000)\n",
    "files that come and go":
        "if os.fork() == 0:\n    os.setsid()\n    while True:\n        open('there', 'w').close()\n"
                              "        os.remove('there'); os.symlink('/etc/passwd', 'there'); os.remove('there')\n",
    "submission, sparse": "open('submission.csv', 'wb').truncate(4 << 30)\n",
    "submission, a pipe": "os.mkfifo('submission.csv')\n",
    "submission, a link": "os.symlink('/etc/passwd', 'submission.csv')\n",
    "submission, a folder": "os.mkdir('submission.csv')\n",
    "submission, a device": "os.symlink('/dev/zero', 'submission.csv')\n",
    "submission, zeros": "open('submission.csv', 'wb').write(b'id,y\\n1,\\0\\n2,3\\n')\n",
    "submission, one line": "open('submission.csv', 'w').write('1' * (100 << 20))\n",
    "submission, quotes": "open('submission.csv', 'w').write('id,y\\n' + '\"' * 4_000_000)\n",
    "submission, columns": "open('submission.csv', 'w').write(',' * 4_000_000)\n",
    "submission, figures": "open('submission.csv', 'w').write('id,y\\n1,nan\\n2,' + '9' * 400_000)\n",
    "submission, not UTF-8": "open('submission.csv', 'wb').write(b'id,y\\n1,\\xff\\n2,3\\n')\n",
    "forks": "for i in range(400):\n    if os.fork() == 0:\n        time.sleep(60)\n",
    "forks, without end": "while True:\n    if os.fork() == 0: time.sleep(60)\n    time.sleep(1e-4)\n",
    "threads": "for i in range(400): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n",
    "a thread that stays": "threading.Thread(target=time.sleep, args=(60,)).start()\n",
    "a daemon": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\n    os._exit(0)\n",
    "memory, step by step": "kept = []\nwhile True: kept.append(bytearray(1 << 20))\n",
    "memory, at once": "bytearray(1 << 45)\n",
    "output, without end": "while True: os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)\n",
    "output, one line of returns": "sys.stdout.write('validation MAE: 1\\r' * 100_000)\n",
    "output, empty lines": "sys.stdout.write('\\n' * 1_000_000)\n",
    "output, not UTF-8": "os.write(1, bytes(range(256)) * 100 + b'\\xed\\xa0\\x80'); os.write(2, b'\\x1b[2J\\x00')\n",
    "output, digits": "print('validation MAE: ' + '1' * 60_000)\nprint('validation ' + '1.' * 30_000)\n",
    "output, a forged end":
        "print('Traceback (most recent call last):\\nMemoryError: ', file=sys.stderr); sys.exit(1)\n",
    "loops": "while True: pass\n",
    "sleeps": "time.sleep(60)\n",
    "closes all": "os.closerange(0, 4096)\n",
    "kills all":
        "for pid in (os.getppid(), -1):\n    with contextlib.suppress(OSError): os.kill(pid, signal.SIGKILL)\n",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)\n",
    "ignores signals":
        "for i in range(1, 65):\n    with contextlib.suppress(OSError, ValueError): signal.signal(i, signal.SIG_IGN)\n"
                       "time.sleep(60)\n",
    "crashes": "import ctypes\nctypes.string_at(0)\n",
    "aborts": "os.abort()\n",
    "recursion": "def f(): return f()\nf()\n",
    "an error of a megabyte": "raise ValueError('x' * 1_000_000 + '\\n' * 1000)\n",
    "an odd exit code": "os._exit(255)\n",
    "hangs at the end": "import atexit\natexit.register(time.sleep, 60)\n",
    "becomes another program": "os.execv('/bin/sleep', ['/bin/sleep', '60'])\n",
    "of root":
        "for call in ('mount', 'unshare', 'chroot'):\n"
        "    subprocess.run([call, '-r', '/', '/'], capture_output=True)\n",
    "is elsewhere":
        "for folder in ('/tmp', '/dev/shm', '/var/tmp', '..', '/'):\n    with contextlib.suppress(OSError):\n"
                    "        open(folder + '/ml-agent-soak-escaped', 'w').write('x')\n",
    "has libraries": "import numpy\nnumpy.random.seed(0)\nos._exit(0)\n",
    "is not Python": "this is ( not\n",
}
TEXTS = {   # whole scripts whose text is the attack; the newline at the end is ours
    "text, zeros": "x = 1\0\n" * 5,
    "text, blanks": STARTER + " " * 200_000 + "A = 1" + " " * 200_000 + "#",
    "text, equal lines": STARTER + "pass\n" * 150_000,
    "text, two lines in turn": STARTER + "".join("pass\n" if i % 3 else f"x = {i}\n" for i in range(60_000)),
    "text, line ends": STARTER + "\x0b\x0c\x1c\x85\u2028\r" * 20_000,
    "text, one constant": "A" * 500_000 + " = 1\n" + STARTER,
    "text, constants": STARTER + "".join(f"N{i} = {i}\n" for i in range(30_000)),
    "text, an encoding": "# -*- coding: utf-7 -*-\n" + STARTER,
    "text, digits": "N = 9" + "1e-." * 100_000 + "\n" + STARTER,
    "text, a surrogate": "x = '\ud800'\n" + STARTER,
}
REPLIES = {
    "reply, empty": lambda draw: draw.choice(["", " ", "\n" * 40_000, "\0"]),
    "reply, huge": lambda draw: draw.choice(["x", "Action:", "{", "\u20ac", "\n"]) * 3_000_000,
    "reply, headers":
        lambda draw: "".join(draw.choice(["\nAction:", "\nThought: ", "Fact Check", ":", "\nAction Input:",
                                                        "\nObservation", "**", "{", '"']) for _ in range(5_000)),
    "reply, nested": lambda draw: act("List Files") [:-2] + draw.choice(['{"a":', "["]) * 20_000,
    "reply, half a pair": lambda draw: act("List Files", dir_path=draw.choice(["\ud800", "\udcff.py"])) + "\udfff",
    "reply, a wrong type":
        lambda draw: act(draw.choice(list(ACTIONS)), script_name=draw.choice([None, 1, [], {}, 1e999])),
    "reply, paths": lambda draw: act("Copy File", source="train.py", destination=draw.choice(
        ["../x", "/etc/x", "data/x", ".undo/1/x", "a/" * 140 + "b", "\u00e9" * 51, "-c.py", "./-m", "~/x", "./~x", "x/",
         "train.py/x", ".", "", "\u202e", "a//b/./c.py", "submission.csv"])),
    "reply, reads":
        lambda draw: act("Inspect Script Lines", script_name=draw.choice(PLACES), start_line_number=draw.choice(
        ["1", "0", "999999999", 3, True]), end_line_number="999999999"),
    "reply, lists":
        lambda draw: act("List Files", dir_path=draw.choice([".", "data", "data/..", "a0", "big", "", ".undo"])),
    "reply, runs": lambda draw: act("Execute Script", script_name=draw.choice(PLACES)),
    "reply, undoes": lambda draw: act("Undo Edit Script", script_name=draw.choice(PLACES)),
    "reply, copies": lambda draw: act("Copy File", source=draw.choice(PLACES), destination=draw.choice(PLACES)),
    "reply, replaces": lambda draw: act("Replace In Script", script_name="train.py", find=draw.choice(
        ["import", "7", "", " ", "\n", "x" * 20_000, "id,y"]), replace=draw.choice(["", "9", "\0", "y" * 20_000])),
    "reply, ends": lambda draw: act("Final Answer", final_answer="x" * 40_000),
}
PLACES = [*["train.py"] * 12, "other.py", "lib/part.py", "submission.csv", "data/sample_submission.csv", "data", "big",
          "-c.py", ".undo/1/train.py", "train.py/x", "data/../train.py", "f1", "l1", "b", ".", ""]
CODERS = {
    "coder, huge": lambda draw: "```python\n" + draw.choice(["x = 1\n", "x", "\u20ac"]) * 20_000_000,
    "coder, half a pair": lambda draw: "```python\nprint('\ud800')\n```",
    "coder, no block": lambda draw: draw.choice(["", "no", "```", "``` ```", " " * 500_000 + "```"]),
    "coder, blocks": lambda draw: "```\nx\n" * 100_000,
    "coder, an error": lambda draw: ValueError("\ud800" + "x" * 1_000_000),
}
NAMES = [*SCRIPTS, *TEXTS, *REPLIES, *CODERS]


def turns(name, draw, world):
    """The replies of one kind, as a generator; what the coder would answer is put into `world.answer`."""
    if name in REPLIES:
        yield REPLIES[name](draw)
        return
    if name in CODERS:
        world.answer = CODERS[name](draw)
        if draw.random() < 0.2:
            yield act("Understand File", file_name=draw.choice(PLACES), things_to_look_for="all")
        else:
            yield edit(draw.choice(["train.py", "other.py"]))
        return
    ending = draw.choice(["", SUBMIT.format(draw.randint(0, 20))])
    text = TEXTS.get(name) or f"{HEAD}# {draw.random()}\n{ending}{SCRIPTS[name]}{ending}"
    if draw.random() < 0.5:
        world.answer = f"```python\n{text}\n```"
        yield edit("train.py")
        if draw.random() < 0.7:
            yield act("Execute Script", script_name="train.py")
    else:
        place = draw.choice(["train.py", "other.py", "lib/part.py"])
        if not any(path.startswith(place + "/") or place.startswith(path + "/") for path in world.files):
            world.files[place] = world.blobs.put(text.encode("utf-8", "replace"))
        yield act("Execute Script", script_name=place)


def edit(target):
    return act("Edit Script (AI)", script_name="train.py", edit_instruction="x", save_name=target)


@contextlib.contextmanager
def made(home, limit, memory):
    """A function that makes an Env on a tiny task, with files of its own below `home`."""
    add_task(home / "tasks", "soak", 10, "held-in", STARTER)
    folders = tasks.FOLDERS
    import_s = sandbox.IMPORT_S
    sandbox.IMPORT_S = 0         # the scripts import nothing that is slow
    tempfile.tempdir = str(home / "tmp")
    tasks.FOLDERS = [home / "tasks"]
    (home / "tmp").mkdir()
    try:
        tasks.prepare("soak", data=home / "data", log=lambda line: None)
        task = dataclasses.replace(tasks.load("soak"), time_limit_s=limit / sandbox.WALL_FACTOR, memory_limit_bytes=memory)

        def make(**options):
            world = Env(task, home / "data", out=home / "out", **options, coder=lambda messages: answer(world))
            world.answer = ""
            return world
        yield make
    finally:
        tasks.FOLDERS = folders
        sandbox.IMPORT_S = import_s
        tempfile.tempdir = None


def answer(world):
    if isinstance(world.answer, Exception):
        raise world.answer
    return world.answer


def waited():
    """Seconds that this process has waited for a core."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def resident():
    """MiB of memory that this process holds, after what it does not need is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def left_over(home):
    """Processes and files that should be gone: scripts know themselves by their TMPDIR."""
    found = [str(path) for path in (home / "tmp").iterdir()]
    found += [f"{folder}/ml-agent-soak-escaped" for folder in ("/tmp", "/dev/shm", "/var/tmp", "/", home / "tmp")
              if os.path.lexists(f"{folder}/ml-agent-soak-escaped")]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"{home}/tmp/ml-agent-" in Path(f"/proc/{pid}/environ").read_text("utf-8", "replace"):
                found.append(f"process {pid}")
    return found


def wrong_with(step, world):
    """What is not as it should be with a Step, "" if nothing."""
    try:
        line = json.loads(json.dumps(record(step), ensure_ascii=False).encode())
        check_record(line, first=False)
        check_snapshot(step.snapshot)
        json.dumps(world.messages, ensure_ascii=False).encode()
    except ValueError as error:
        return str(error)
    if step.kind not in REWARD_KINDS or not 0 <= step.reward <= 1:
        return f"kind {step.kind}, reward {step.reward}"
    if len(step.observation) > env_module.MAX_OBSERVATION + 200:
        return f"an observation of {len(step.observation)} characters"
    return ""


def soak(home, steps, seed=0, limit=2.0, memory=200 << 20, slack=1.0, each=False, log=lambda line: None):
    """Plays that many steps below the folder `home`, or with `each` every kind once. Returns ({kind: its steps}, what
    did not hold), and says that also as it comes. limit: wall seconds of a script."""
    draw = random.Random(seed)
    wrong = []
    begun = 0.0
    counts = collections.Counter()

    def fail(what):
        wrong.append(f"step {num}, {name}: {what}")
        log(wrong[-1])

    with made(home, limit, memory) as make:
        kinds = iter(draw.sample(NAMES, len(NAMES)) if each else iter(lambda: draw.choice(NAMES), None))
        world = None
        num = 0
        told = 0
        while num < steps or each:
            if (name := next(kinds, None)) is None:
                break
            if world is None or world.done or each or draw.random() < 0.15:
                seconds = 1800 if each else draw.choice([1800, 5, 60])
                world = make(prompt_format=draw.choice(env_module.PROMPTS), seconds=seconds)
            for reply in turns(name, draw, world):
                if not each and draw.random() < 0.1:        # as a run that goes on restores it
                    world.restore(json.loads(json.dumps(world.snapshot())), json.loads(json.dumps(world.messages)),
                                  index=world.index, m_before=world.m_before, m_top=world.m_top,
                                  seconds=world.deadline - time.monotonic())
                started = time.monotonic()
                before = waited()
                allowed = max(0.0, min(limit, world.deadline - started))
                try:
                    step = world.step(reply)
                    world.prompt()
                except Exception as error:
                    fail(f"{type(error).__name__}: {error}")
                    world = None
                    break
                took = time.monotonic() - started
                over = took - (waited() - before) - (allowed if step.script_seconds else 0.0)
                counts[name] += 1
                if over > slack:
                    fail(f"{over:.2f} s over its limit ({took:.2f} s)")
                if found := wrong_with(step, world):
                    fail(found)
                num += 1
                if world.done:
                    break
            if not each and not begun and num >= min(300, steps // 4):
                begun = resident()
            if num >= told + 100:
                told = num
                log(f"{num} steps, {resident():.0f} MiB")
        world = None
        end = time.monotonic() + 600    # a process that was killed takes a moment to go, a large folder some seconds
        while (found := left_over(home)) and time.monotonic() < end:
            time.sleep(0.05)
        wrong += [f"left over: {each}" for each in found]
        if not each and (grown := resident() - begun) > 16:
            wrong.append(f"memory has grown by {grown:.0f} MiB, from {begun:.0f}")
    return counts, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=2.0, help="wall seconds of a script")
    s = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        counts, wrong = soak(home, s.steps, s.seed, s.limit,
                           log=lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        sandbox.remove(home)
    print("\n".join([f"{sum(counts.values())} steps of {len(counts)} kinds, {len(wrong)} things are wrong", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
