"""Storage of what runs leave: files by their contents, states of a workspace, and the results of scripts.

A state of a workspace is a snapshot: a dict {path: sha256} whose contents lie in a store of blobs. Both may come from
others, so each is checked before it is used.
"""
import contextlib, functools, hashlib, io, json, os, re, shutil, stat, threading, weakref
from pathlib import Path

from support.files import atomic_file, read_bytes, shorten, write_atomic

MAX_FILES = 1_000           # files that a script may leave in the workspace
MAX_BYTES = 1 << 28         # bytes that these files may have together
UNDO = ".undo/"             # `.undo/<number>/<path>` is what edit <number> replaced at <path>
HASH = re.compile("[0-9a-f]{64}")
UNDO_PATH = re.compile(r"\.undo/[1-9][0-9]{0,8}/(.+)")


# -- Snapshots

def is_path(text):
    """Returns whether a text is a normalised path below a folder that does not begin like an option of a program."""
    if not text.isprintable() or not 0 < len(text) <= 300 or text[0] in "/~-":
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 100 for part in text.split("/"))


def is_usable(path):
    """Returns whether a text can name a file of the workspace; public data and replaced files are none."""
    return is_path(path) and path.split("/")[0] not in ("data", ".undo")


def check_snapshot(snapshot):
    """Raises ValueError, one sentence, unless a value from anybody is a snapshot as Env.snapshot returns it."""
    if type(snapshot) is not dict:
        raise ValueError("a snapshot must be {path: sha256}")
    folders = set()
    for path, sha in snapshot.items():
        replaced = UNDO_PATH.fullmatch(path) if isinstance(path, str) else None
        is_named = isinstance(path, str) and is_usable(replaced[1] if replaced else path)
        if not is_named or not isinstance(sha, str) or not HASH.fullmatch(sha):
            raise ValueError(f"a snapshot has {shorten(ascii(path), 80)}: {shorten(ascii(sha), 80)}, expected the path "
                             "of a file in a workspace and a sha256")
        folders.update(path[:i] for i, letter in enumerate(path) if letter == "/")
    if both := folders & snapshot.keys():
        raise ValueError(f"a snapshot has {min(both)} both as a file and as a folder")


def check_state(snapshot, blobs):
    """Raises ValueError unless a value is a snapshot whose blobs are there and sound, and not too large together."""
    check_snapshot(snapshot)
    for sha in snapshot.values():
        blobs.path(sha)
    if not fits(without_undo(snapshot), blobs):
        raise MissingBlob(f"the files of this state are more than {MAX_FILES} or have more than {MAX_BYTES >> 20} MiB")


def fits(files, blobs):
    """Returns whether the files of a workspace are not too many and not too large."""
    return len(files) <= MAX_FILES and sum(blobs.path(sha).stat().st_size for sha in files.values()) <= MAX_BYTES


def without_undo(snapshot):
    """Returns a snapshot without what edits have replaced."""
    return {path: sha for path, sha in snapshot.items() if not path.startswith(UNDO)}


def build_folder(folder, snapshot, blobs, public):
    """Writes the files of a snapshot to a folder. `data` becomes a folder of links to the public files: what a script
    adds to it is lost."""
    for path, sha in snapshot.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(blobs.path(sha), folder / path)
    (folder / "data").mkdir()
    for name in os.listdir(public):
        (folder / "data" / name).symlink_to(public / name)


def stamps_of(folder):
    """Returns names, sizes and times of a folder's entries, to see that a script has written to shared data. What lies
    in its folders, often thousands of pictures, is not looked at."""
    states = [(path.name, path.lstat()) for path in folder.iterdir()]
    return sorted((name, state.st_size, state.st_mtime_ns) for name, state in states)


def collect_folder(folder, blobs):
    """Stores the regular files that a script has left, and returns them as a snapshot; None if they are too many or too
    large. Links, pipes, files that cannot be read, and files without a usable name are left out."""
    with contextlib.suppress(OSError):      # the script may have locked it
        os.chmod(folder, 0o700)
    snapshot = {}
    num_bytes = 0
    for number, (path, parent, entry) in enumerate(walk(folder), 1):
        file = None
        with contextlib.suppress(OSError):      # it may not be read, or is gone meanwhile
            if path and entry.is_file(follow_symlinks=False):
                file = open_regular(entry.name, parent)
        if file:
            with file:      # what fails from here on is our store
                num_bytes += os.fstat(file.fileno()).st_size
                if len(snapshot) == MAX_FILES or num_bytes > MAX_BYTES:
                    return None
                snapshot[path] = blobs.put_file(file)
        if number > 10 * MAX_FILES:
            return None
    return snapshot


def walk(name, parent=None, prefix=""):
    """Yields (path, descriptor of its folder, os.DirEntry) of everything below a folder. The path is "" where the name
    is not usable; such a folder is not entered, so the tree is never too deep. No link is followed."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError:     # it is gone, or may not be read
        return
    try:
        with os.scandir(descriptor) as entries:
            for entry in entries:
                path = prefix + entry.name
                if not is_usable(path):
                    path = ""
                yield path, descriptor, entry
                if path and entry.is_dir(follow_symlinks=False):
                    yield from walk(entry.name, descriptor, path + "/")
    finally:
        os.close(descriptor)


def open_regular(path, parent=None):
    """Opens a regular file for reading. OSError: it is anything else; no link is followed, and no pipe waited for.
    parent: the descriptor of the folder that the path is relative to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return open(descriptor, "rb")


# -- Blobs

class MissingBlob(ValueError):
    """A recorded state cannot be restored."""


class Blobs:
    """Contents by their sha256, in <folder>/<aa>/<sha256>. Each is read once before it is used. Many processes may
    write at once."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, sha):
        """Returns the path of a blob. MissingBlob: it is missing, or its contents are not those it is named by."""
        path = self.folder / sha[:2] / sha
        with contextlib.suppress(OSError):      # which is not remembered: it may be readable the next time
            state = os.lstat(path)
            if (stat.S_ISREG(state.st_mode) and state.st_size <= MAX_BYTES
                    and is_sound(path, state.st_ino, state.st_size, state.st_ctime_ns)):
                return path
        raise MissingBlob(f"the blob {sha} is missing in {self.folder} or damaged there: this state cannot be restored")

    def put(self, content):
        """Stores bytes, or the file at a path, and returns the sha256."""
        with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as source:
            return self.put_file(source)

    def put_file(self, source):
        """Stores an open file and returns its sha256."""
        sha = hashlib.file_digest(source, "sha256").hexdigest()
        try:
            self.path(sha)
        except MissingBlob:
            source.seek(0)
            with atomic_file(self.folder / sha[:2] / sha) as target:
                shutil.copyfileobj(source, target)
        return sha


@functools.lru_cache(maxsize=10_000)
def is_sound(path, inode, size, time_of_change):
    """Returns whether the contents of a blob are those it is named by; read once while it stays the same file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == path.name


# -- Results of scripts

class ResultCache:
    """Results of runs by a key, as JSON in <folder>/<aa>/<key>. What is no JSON counts as absent. Many processes may
    write at once."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.counts = {"runs": 0, "hits": 0}
        self.lock = threading.Lock()
        self.key_locks = weakref.WeakValueDictionary()

    def key_lock(self, key):
        """Returns a lock: who wants a result which another thread is computing waits for it there."""
        with self.lock:
            return self.key_locks.setdefault(key, threading.Lock())

    def count(self, name):
        with self.lock:
            self.counts[name] += 1

    def get(self, key):
        """Returns the entry, a value from JSON, or None if there is none."""
        try:
            return json.loads(read_bytes(self.folder / key[:2] / key) or b"null")
        except (ValueError, RecursionError):
            return None

    def put(self, key, entry):
        write_atomic(self.folder / key[:2] / key, json.dumps(entry).encode())
