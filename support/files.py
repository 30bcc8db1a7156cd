"""Files on disk: written whole, held by one process, and checked where others may have made them.

A form says which values from JSON are accepted: (words, test) for a value; [form] for a list of such; {name: form} for
an object with these entries, where "name?" may be missing and `str` stands for all names.
"""
import contextlib, fcntl, hashlib, json, os, stat, sys, uuid
from pathlib import Path


# -- Forms of values from JSON

def is_text(value):
    """Returns whether a value is a text that can be written: it has no half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_number(value):
    """Returns whether a value is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def maybe(form):
    return f"{form[0]} or null", lambda value: value is None or form[1](value)


def one_of(*values):
    return f"one of {', '.join(values)}", lambda value: value in values


def some_of(*values):
    def is_some(value):
        return (isinstance(value, list) and all(name in values for name in value)
                and 0 < len(value) == len(set(value)))
    return f"a list of some of {', '.join(values)}, each once", is_some


def up_to(most):
    return f"a whole number from 1 to {most}", lambda value: type(value) is int and 1 <= value <= most


def is_value(value):
    items = value if isinstance(value, list) else [value]
    return all(item is None or any(form[1](item) for form in (TEXT, FLAG, NUMBER)) for item in items)


TEXT = "a text", is_text
WORD = "a few printable characters", lambda value: isinstance(value, str) and value.isprintable() and len(value) <= 100
FLAG = "true or false", lambda value: isinstance(value, bool)
NUMBER = "a number", lambda value: type(value) is float or type(value) is int and abs(value) < 1e300
COUNT = "a whole number of at least 0", lambda value: type(value) is int and 0 <= value < 2**53
VALUE = "a text, a number, true, false, null or a list of these", is_value


def check_form(value, form, where):
    """Raises ValueError unless a value from JSON has a form."""
    if isinstance(form, tuple):
        words, is_right = form
        if not is_right(value):
            shown = {list: "a list", dict: "an object"}.get(type(value)) or shorten(ascii(value), 80)
            raise ValueError(f"{where}: expected {words}, found {shown}")
    elif isinstance(form, list):
        check_form(value, ("a list", lambda value: isinstance(value, list)), where)
        for i, item in enumerate(value):
            check_form(item, form[0], f"{where}, entry {i}")
    else:
        check_form(value, ("an object", lambda value: isinstance(value, dict)), where)
        for name, inner in form.items():
            keys = list(value) if name is str else [name.removesuffix("?")]
            for key in keys:
                if key in value:
                    check_form(value[key], inner, f"{where}, {shorten(ascii(key), 80)}")
                elif not name.endswith("?"):
                    raise ValueError(f"{where}: {name!r} is missing")


# -- Reading and writing

def read_bytes(path, most=1 << 28):
    """Returns the content of a file, None where there is none. ValueError: it is no ordinary file, or larger."""
    def opener(path, flags):        # waits for nobody at the other end of a pipe
        return os.open(path, flags | os.O_NONBLOCK)
    try:
        with open(path, "rb", opener=opener) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode) or state.st_size > most:
                raise ValueError(f"{path}: expected an ordinary file of at most {most:,} bytes")
            return file.read(most)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(raw, form, where):
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is not JSON") from None
    check_form(value, form, where)
    return value


def read_json_lines(path, form, mend=False):
    """Returns the lines of a file of JSON lines, [] where there is none. A last line that was cut short is left out,
    and with mend removed from the file."""
    raw = read_bytes(path) or b""
    whole = raw.rfind(b"\n") + 1
    if mend and whole < len(raw):
        os.truncate(path, whole)
    return [parse_json(line, form, f"{path}, line {i}") for i, line in enumerate(raw[:whole].splitlines(), 1)]


def begin_log(path, goes_on):
    """Readies a file of JSON lines for more: without a last line that was cut short, or where no run goes on, without
    any."""
    if not goes_on:
        path.unlink(missing_ok=True)
    elif path.exists():     # however large it is, and whatever else is wrong with it
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


@contextlib.contextmanager
def atomic_file(path):
    """Opens a new file for writing bytes, which takes the place of `path` when the block ends without an error: `path`
    is whole or as it was, also with many writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomic(path, value):
    """Writes bytes, or a value as JSON."""
    with atomic_file(path) as file:
        if isinstance(value, bytes):    # pages and copies, often thousands, which can be made again
            file.write(value)
        else:
            file.write((json.dumps(value, indent=1) + "\n").encode())
            file.flush()
            sync(file.name)


@contextlib.contextmanager
def folder_lock(folder, program):
    """Makes a folder and holds it for this process; ValueError if another one does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    refuse_links_out(folder)
    with Path(folder, "lock").open("w") as lock:        # let go however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another {program} writes to {folder}; wait for it, or give another folder") from None
        try:
            yield
        finally:    # closing alone would leave it to a process forked meanwhile, which has the same open file
            fcntl.flock(lock, fcntl.LOCK_UN)


def refuse_links_out(folder):
    """ValueError where something in a folder leads out of it, or is neither a file nor a folder: it may come from
    others, and what is written to it must not end up elsewhere."""
    root = os.path.realpath(folder)
    todo = [root]
    while todo:
        try:
            entries = list(os.scandir(todo.pop()))
        except FileNotFoundError:       # removed meanwhile
            continue
        except OSError as error:
            raise ValueError(f"{ascii(error.filename)} cannot be read: {error.strerror}") from None
        for entry in entries:
            if entry.is_symlink():
                if not Path(os.path.realpath(entry.path)).is_relative_to(root):
                    raise ValueError(f"{ascii(entry.path)} is a link that leads out of {folder}; remove it, or put "
                                     "there what it leads to")
            elif entry.is_dir():
                todo.append(entry.path)
            elif not entry.is_file():
                raise ValueError(f"{ascii(entry.path)} is neither a file nor a folder; remove it")


def hash_json(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def shorten(text, limit):
    """Returns the text; where it is longer than `limit` characters its middle is cut out, which is marked."""
    half = limit // 2
    cut = len(text) - limit
    return text if cut <= 0 else f"{text[:half]} ... {cut:,} characters cut ... {text[half + cut:]}"


def sync(path):
    """Returns when the contents of a file or the names of a folder are on the disk. Without it a rename may outlive
    them in a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
