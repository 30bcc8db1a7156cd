"""What the programs share: settings from a dataclass, exit status, a folder for what scripts leave."""
import argparse, contextlib, dataclasses, difflib, fcntl, inspect, os, re, signal, sys, tempfile, traceback, typing
from pathlib import Path

from support.sandbox import Unprotected, _remove


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
    about, name = {}, None  # field -> its trailing comment
    for line in inspect.getsource(cls).splitlines():
        if found := re.match(r"    (\w+)\s*:\s*\S.*?(?:  # (.*))?$", line):
            name, about[found[1]] = found[1], found[2] or ""
        elif name and (found := re.match(r"     +# ?(.*)", line)):
            about[name] += " " + found[1]
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
                tell(f"{source}: {said}")
        return cls(**values)
    except ValueError as error:
        parser.error(str(error))


def tell(text):
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


class Failed(RuntimeError):
    """The run cannot go on, for a reason that is not a bug; the message is for the user."""


def attempt(program, work, kept):
    """The exit status of work(): 0 done, 1 failed or interrupted, 2 bad settings, with the message on the error
    stream. kept: the folder where what was done stays."""
    try:
        work()
        return 0
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except (Failed, Unprotected, OSError) as error:      # a wrong path, a full disk
        print(f"{program}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
    print(f"What was done is kept in {kept}; the same command goes on from there.", file=sys.stderr)
    return 1


def one_process(what):
    """ValueError, said once, where torchrun has started several processes of a program that runs in one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if os.environ.get("RANK") != "0":
            sys.exit(2)
        raise ValueError(f"{what} runs in one process; start it with python instead of torchrun")


def run_program(main):
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


def layout(rows):
    """Rows of texts, those without any left out, as lines with aligned columns; the first two are set to the left."""
    rows = [row for row in rows if any(row)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
