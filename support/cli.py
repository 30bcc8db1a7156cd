"""What the programs share: settings from the command line, exit status, and one folder for all that scripts leave."""
import argparse, contextlib, dataclasses, difflib, fcntl, inspect, math, os, re, signal, sys, tempfile
import traceback, typing
from dataclasses import dataclass
from pathlib import Path

from support.sandbox import OWNER, SandboxUnavailable, remove, stop


class RunError(RuntimeError):
    """The run cannot go on, for a reason that is not a bug. The message is for the user."""


class ContextFull(ValueError):
    """The prompt and the reply asked for do not fit the model's context."""


# -- Settings

@dataclass
class ModelSettings:
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # that products are computed in: float32, bfloat16, float64, or auto, which is bfloat16 where
        # the hardware multiplies it; weights that are trained are kept and updated in float32
    kernels: str = "torch"  # torch; on CUDA also compiled (training: each block by torch.compile), or triton
        # (fused.py); neither has been measured on a GPU yet
    seed: int = 0  # of all that is drawn at random

    def __post_init__(self):
        check_choices(self, device=("auto", "cpu", "cuda"), dtype=("auto", "float64", "float32", "bfloat16"),
                      kernels=("torch", "compiled", "triton"))


@dataclass
class ScriptSettings:
    data: str = "data"  # where prepared tasks are kept
    python: str = sys.executable  # the interpreter that runs the tasks' scripts
    gpu: str = ""  # GPUs for the scripts, such as 0 or 0,1: each script gets one of them; empty hides all
    threads: int = 1  # that a script may use for numerics
    sandbox: str = "on"  # on, or off: scripts can then read the answers and all your files; every row says so

    def __post_init__(self):
        check_choices(self, sandbox=("on", "off"))
        check_positive(self, "threads")


@dataclass
class TaskSettings(ModelSettings, ScriptSettings):
    """Settings of every program in which a model acts on tasks."""
    raw: str = ""  # folder of the publisher's files, prepared on first use; for several tasks, the folder that holds
        # one such folder per task id. Empty: the data prepared before, else the miniature
    context: int = 16384  # tokens of one conversation; a trajectory that outgrows it ends
    max_new_tokens: int = 1024  # of one reply

    def __post_init__(self):
        ModelSettings.__post_init__(self)
        ScriptSettings.__post_init__(self)
        check_positive(self, "context", "max_new_tokens")


def flag_of(name):
    return f"--{name.replace('_', '-')}"


def check_choices(cfg, **choices):
    """Raises ValueError for a setting that is not one of those allowed, {name: values}."""
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            expected = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            raise ValueError(f"{flag_of(name)} must be {expected}, found {getattr(cfg, name)!r}")


def check_positive(cfg, *names):
    """Raises ValueError for a setting that is not None and not a finite number above 0."""
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not 0 < value < math.inf:      # nor NaN
            raise ValueError(f"{flag_of(name)} must be above 0, found {value}")


def check_range(cfg, most, *names):
    """Raises ValueError for a setting that is not a finite number from 0 to `most`."""
    expected = "at least 0" if most == math.inf else f"from 0 to {most}"
    for name in names:
        value = getattr(cfg, name)
        if not 0 <= value <= most or value == math.inf:
            raise ValueError(f"{flag_of(name)} must be {expected}, found {value}")


def parse(cls, argv=None, fill=None):
    """Returns an instance of the dataclass `cls`, filled from argv, by default the program's command line.

    A field reads `name: type = default  # help text`; comment lines below it that are indented deeper go on with the
    text. Types are int, float, str, bool (--name / --no-name), X | None (the word `none`) and tuple[X, ...] (a list
    with commas).

    fill: a function of {name: value}, of all settings as typed or by default. It returns [(source, {name: value})]:
        settings that hold where none was typed; the first source that has one counts.
    What came from where is said on the error stream. Mistakes, and a ValueError of `fill` or of the class, end the
    program with status 2.
    """
    parser = _parser(cls)
    typed, unknown = parser.parse_known_args(argv)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = list(map(flag_of, defaults))
        near = [name for name in known if name.startswith(flag)] if len(flag) > 2 else []
        near = near or difflib.get_close_matches(flag, known, cutoff=0.7)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
        parser.error(f"there is no {flag}; {hint}")
    values = vars(typed)
    origins = [f"typed: {_as_flags(values)}"] if values else []
    try:
        for source, settings in fill(defaults | values) if fill else []:
            filled = {name: value for name, value in settings.items() if name in defaults and name not in values}
            values |= filled
            changed = {name: value for name, value in filled.items() if value != defaults[name]}
            if changed:
                origins.append(f"{source}: {_as_flags(changed)}")
        cfg = cls(**values)
    except ValueError as error:
        parser.error(str(error))
    for line in origins:        # after the checks, which refuse a key in what was typed
        announce(line)
    return cfg


def _parser(cls):
    help_texts = _comments(cls)
    types = typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, allow_abbrev=False,
                                     usage="%(prog)s [--SETTING VALUE ...]; --help lists the settings",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(cls):
        kind = types[field.name]
        required = field.default is dataclasses.MISSING
        default = "required" if required else f"default: {_as_text(field.default)}"
        options = {"help": f"{help_texts.get(field.name, '')} ({default})".replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = lambda text, kind=kind: _convert(text, kind)
            options["metavar"] = re.search("int|float|str", str(kind))[0].upper()
        parser.add_argument(flag_of(field.name), required=required, default=argparse.SUPPRESS, **options)
    return parser


def _comments(cls):
    """Returns {field: its comment} of a dataclass and its bases."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        name = None
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    (\w+)\s*:\s*\S.*?(?:  # (.*))?$", line):
                name = match[1]
                comments[name] = match[2] or ""
            elif name and (match := re.match(r"     +# ?(.*)", line)):
                comments[name] += " " + match[1]
            else:
                name = None
    return comments


def _convert(text, kind):
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return tuple(_convert(word.strip(), inner[0]) for word in text.split(",") if word.strip())
    if inner:       # X | None
        return None if text.lower() == "none" else _convert(text, inner[0])
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {kind.__name__}, found {text!r}") from None


def _as_text(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _as_flags(values):
    """Returns {name: value} as one would type them."""
    words = []
    for name, value in values.items():
        if value is True:
            words.append(flag_of(name))
        elif value is False:
            words.append(flag_of(f"no_{name}"))
        else:
            words.append(f"{flag_of(name)} {_as_text(value)}")
    return ", ".join(words)


# -- Output

def announce(text):
    """Says something on the error stream; under torchrun the first process does."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def format_table(rows):
    """Returns rows of texts as aligned columns, the first two set to the left, without empty rows."""
    rows = [row for row in rows if any(row)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# -- A program from start to end

def exit_status(program, work, folder):
    """Runs work() and returns the exit status: 0 done, 1 failed or interrupted, 2 bad settings. folder: where all that
    was done is kept."""
    try:
        work()
        return 0
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except (RunError, SandboxUnavailable, OSError) as error:      # OSError: a wrong path, a full disk
        print(f"{program}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
    print(f"What was done is kept in {folder}; the same command goes on from there.", file=sys.stderr)
    return 1


def refuse_torchrun(what):
    """Raises ValueError, on the first process alone, where torchrun has started several of a one-process program."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if os.environ.get("RANK") != "0":
            sys.exit(2)
        raise ValueError(f"{what} runs in one process; start it with python instead of torchrun")


def run_main(main):
    """Ends the process with main()'s status; SIGTERM, a batch system's request to end, is a Ctrl-C. What scripts leave
    lies in one temporary folder, which is removed at the end, or after a kill -9 by the next start."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 1
    # 1. What killed programs have left: folders whose `owner` is locked by nobody, some of them half removed.
    temporary = Path(tempfile.gettempdir())
    for file in (*temporary.glob(f"ml-agent-program-*/{OWNER}"), *temporary.glob(f".gone-*/{OWNER}")):
        with contextlib.suppress(OSError):      # it is held, or another user's
            if file.parent.is_symlink() or file.parent.stat().st_uid != os.geteuid():
                continue
            owner = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)      # a script may have put a pipe there
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(file.parent)
            finally:
                os.close(owner)
    # 2. A folder of our own. The lock is held before it is named, so that nobody sees it unlocked.
    tempfile.tempdir = tempfile.mkdtemp(prefix="ml-agent-program-")
    try:
        owner = Path(tempfile.tempdir, "starts").open("w")
        fcntl.flock(owner, fcntl.LOCK_EX)
        os.rename(owner.name, Path(tempfile.tempdir, OWNER))
        # 3. The program.
        try:
            code = main()
        except SystemExit as error:
            code = error.code
        except KeyboardInterrupt:       # before the work began
            pass
        except BaseException:
            with contextlib.suppress(OSError):      # nobody reads it, as where Ctrl-C has ended a `| tee`
                traceback.print_exc()
    finally:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        stop()
        remove(tempfile.tempdir)
    # 4. Threads may still wait for a reply or a script, and the interpreter would wait for them.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
