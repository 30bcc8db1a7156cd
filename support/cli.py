"""What the programs share: settings from a dataclass, exit status, a folder for what scripts leave."""
import argparse, contextlib, dataclasses, difflib, fcntl, inspect, math, os, re, signal, sys, tempfile, traceback, typing
from dataclasses import dataclass
from pathlib import Path

from support.sandbox import Unprotected, _remove


@dataclass
class ModelSettings:
    """Settings of every program that runs a model."""
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # that products are computed in: float32, bfloat16, float64, or auto, which is bfloat16 where the
        # hardware multiplies it; weights that are trained are kept and updated in float32
    kernels: str = "torch"  # torch, or triton, on CUDA, which has not been measured on a GPU yet
    seed: int = 0  # of all that is drawn at random

    def __post_init__(self):
        check_choices(self, device=("auto", "cpu", "cuda"), dtype=("auto", "float64", "float32", "bfloat16"),
                      kernels=("torch", "triton"))


@dataclass
class TaskSettings(ModelSettings):
    """Settings of every program that runs the scripts of tasks."""
    data: str = "data"  # where prepared tasks are kept
    raw: str = ""  # folder of the publisher's files, prepared on first use; for several tasks, the folder that holds
        # one such folder per task id. Empty: the data prepared before, else the miniature
    python: str = sys.executable  # the interpreter that runs the tasks' scripts
    gpu: str = ""  # GPUs for the scripts, such as 0 or 0,1: each script gets one of them; empty hides all
    threads: int = 1  # that a script may use for numerics
    sandbox: str = "on"  # on, or off: scripts can then read the answers and all your files; every row says so
    context: int = 16384  # tokens of one conversation; a trajectory that outgrows it ends
    max_new_tokens: int = 1024  # of one reply

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, sandbox=("on", "off"))
        check_positive(self, "threads", "context", "max_new_tokens")


def check_choices(cfg, **choices):
    """Raises ValueError for a setting that is not one of those allowed, {name: values}."""
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            expected = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            raise ValueError(f"--{name.replace('_', '-')} must be {expected}, found {getattr(cfg, name)!r}")


def check_positive(cfg, *names):
    """Raises ValueError for a setting that is not a finite number above 0."""
    for name in names:
        if not 0 < getattr(cfg, name) < math.inf:       # nor NaN
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, found {getattr(cfg, name)}")


def parse(cls, argv=None, fill=None):
    """An instance of the dataclass `cls`, filled from the command line (`argv`, by default sys.argv[1:]).

    fill: a function of all settings, {name: value} as typed or by default, that gives [(where from, {name: value})]:
    settings that hold where none was typed, the first that has one. What they change is said on the error stream. What
    was typed holds, also where it is what the default would have been.

    A field reads `name: type = default  # help text`; comment lines below it, indented deeper, continue the text.
    Types: int, float, str, bool (--name / --no-name), X | None (the word `none`) and tuple[X, ...] (a comma list).
    --max-new-tokens and --max_new_tokens are one flag and --x=1 works. A name that does not exist (near ones are
    listed), a value of the wrong type or a ValueError of fill or the class's own __post_init__ ends the program with
    status 2.
    """
    about = {}      # field -> its trailing comment
    for base in reversed(cls.__mro__[:-1]):
        name = None
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    (\w+)\s*:\s*\S.*?(?:  # (.*))?$", line):
                name = match[1]
                about[name] = match[2] or ""
            elif name and (match := re.match(r"     +# ?(.*)", line)):
                about[name] += " " + match[1]
            else:
                name = None

    def convert(text, kind):
        inner = typing.get_args(kind)
        if typing.get_origin(kind) is tuple:
            return tuple(convert(word.strip(), inner[0]) for word in text.split(",") if word.strip())
        if inner:  # X | None
            return None if text.lower() == "none" else convert(text, inner[0])
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, found {text!r}") from None

    parser = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        kind, default = kinds[one.name], one.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        needed = default is dataclasses.MISSING
        text = (about.get(one.name, "") + (" (required)" if needed else f" (default: {shown})")).replace("%", "%%")
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            letters = re.findall("int|float|str", str(kind))[0].upper() + ",..." * (typing.get_origin(kind) is tuple)
            how = {"type": lambda text, kind=kind: convert(text, kind), "metavar": letters}
        parser.add_argument("--" + one.name.replace("_", "-"), required=needed, default=argparse.SUPPRESS, help=text,
                            **how)

    argv = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), word)
            for word in (sys.argv[1:] if argv is None else argv)]
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(flag, ["--" + name.replace("_", "-") for name in kinds], n=3)
        parser.error(f"there is no {flag}" + (f"; did you mean {' or '.join(near)}?" if near else "; see --help"))
    default = {one.name: one.default for one in dataclasses.fields(cls)}
    values = vars(typed)
    try:
        for source, more in fill({**default, **values}) if fill else ():
            new = {name: value for name, value in more.items() if name in default and name not in values}
            values.update(new)
            said = ", ".join(as_flag(name, value) for name, value in new.items() if value != default[name])
            if said:
                announce(f"{source}: {said}")
        return cls(**values)
    except ValueError as error:
        parser.error(str(error))


def announce(text):
    """Says something on the error stream; of several processes under torchrun the first one says it."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def as_flag(name, value):
    """A setting as one would type it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {','.join(map(str, value)) if isinstance(value, tuple) else value}"


def preset(name, recipes):
    """What parse's fill gives for --preset NAME; recipes: {name: settings}. ValueError: there is no such one."""
    if name not in recipes:
        raise ValueError(f"there is no --preset {name}; there is {', '.join(recipes)}")
    return f"--preset {name}", recipes[name]


class ContextFull(ValueError):
    """The prompt and the reply asked for do not fit the model's context."""


class RunError(RuntimeError):
    """The run cannot go on, for a reason that is not a bug; the message is for the user."""


def exit_status(program, work, kept):
    """The exit status of work(): 0 done, 1 failed or interrupted, 2 bad settings, with the message on the error
    stream. kept: the folder where what was done stays."""
    try:
        work()
        return 0
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except (RunError, Unprotected, OSError) as error:      # a wrong path, a full disk
        print(f"{program}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
    print(f"What was done is kept in {kept}; the same command goes on from there.", file=sys.stderr)
    return 1


def refuse_torchrun(what):
    """ValueError, said once, where torchrun has started several processes of a program that runs in one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if os.environ.get("RANK") != "0":
            sys.exit(2)
        raise ValueError(f"{what} runs in one process; start it with python instead of torchrun")


def run_main(main):
    """Ends the process with main()'s status. A batch system's request to end is a Ctrl-C; the scripts' folders lie
    below one that is removed, and a second Ctrl-C does not leave it behind. What a kill -9 leaves, the next start
    removes: a folder whose file `owner` nobody holds."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 1
    for file in Path(tempfile.gettempdir()).glob("ml-agent-*/owner"):
        with contextlib.suppress(OSError), file.open() as owner:    # held, or another user's
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(file.parent)
    tempfile.tempdir = tempfile.mkdtemp(prefix="ml-agent-")
    try:
        owner = Path(tempfile.tempdir, "starts").open("w")
        fcntl.flock(owner, fcntl.LOCK_EX)
        os.rename(owner.name, Path(tempfile.tempdir, "owner"))      # so it is never seen before it is held
        try:
            code = main()
        except SystemExit as error:
            code = error.code
        except KeyboardInterrupt:       # before the work began
            pass
        except BaseException:
            traceback.print_exc()
    finally:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        _remove(tempfile.tempdir)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)      # threads may still wait for a reply or a script; the scripts end when we do


def format_table(rows):
    """Rows of texts, those without any left out, as lines with aligned columns; the first two are set to the left."""
    rows = [row for row in rows if any(row)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
