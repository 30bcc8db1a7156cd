"""The files of an Env: scripts by their paths, whose contents are blobs, and below data/ the public files."""
from support import storage
from support.files import shorten
from support.scripts import InvalidAction
from support.storage import UNDO, fits, without_undo

MAX_READ = 10 << 20                     # bytes that an action looks at
MAX_SCRIPT = 1 << 20                    # bytes that an action may edit


def read_start(path, limit):
    with open(path, "rb") as file:
        return file.read(limit)


def script_text(blobs, sha):
    """Returns the text of a script of the workspace; "" where there is none."""
    return read_start(blobs.path(sha), MAX_SCRIPT).decode("utf-8", "replace") if sha else ""


class Workspace:
    """Paths as an agent writes them, and what they stand for. "data/..." are the public files, which are only read. An
    Env sets task, public (the folder of the public files), blobs and files ({path: sha256})."""

    def _path(self, text, write=False):
        """Returns the normalised path, "" for the workspace. InvalidAction: it leads out of the workspace, or with
        write it is read-only or cannot be a file there."""
        shown = shorten(repr(text), 80)
        text = text.strip()
        path = "/".join(part for part in text.split("/") if part not in ("", "."))
        if text.startswith(("/", "~")) or path and not storage.is_path(path):
            raise InvalidAction(f"{shown} is no usable name; name files relative to the workspace, such as "
                                f"{self.task.entry}.")
        if f"{path}/".startswith(UNDO) or write and self._public(path):
            raise InvalidAction(f"{shown} is read-only.")
        if write and (not path or text.endswith("/") or any(
                name.startswith(f"{path}/") or path.startswith(f"{name}/") for name in self.files)):
            raise InvalidAction(f"{shown} cannot be written: it is a folder, or below a file.")
        return path

    def _public(self, path):
        """Returns the real path of "data" or "data/...", None for other paths. Links are followed inside data only."""
        if path.split("/")[0] != "data":
            return None
        real = (self.public / path[5:]).resolve()
        if not real.is_relative_to(self.public):
            raise InvalidAction(f"{path} leads outside the data folder.")
        return real

    def _file(self, path):
        """Returns where the contents of a file are."""
        public = self._public(path)
        if public and public.is_file():
            return public
        if path in self.files:
            return self.blobs.path(self.files[path])
        names = sorted(without_undo(self.files))
        raise InvalidAction(f"There is no file {path or '.'}; the workspace holds {', '.join(names[:20])}, data/.")

    def _text(self, path, edit=False):
        """Returns (text of the first MAX_READ bytes, size in bytes) of a file. InvalidAction: it is binary, or with
        edit it could not be written back as it is."""
        file = self._file(path)
        size = file.stat().st_size
        content = read_start(file, MAX_READ)
        text = content.decode("utf-8", "replace")
        if b"\0" in content[:8192] or text.count("\ufffd") > len(text) // 10:
            raise InvalidAction(f"{path} is a binary file of {size:,} bytes; read it in a script.")
        if edit and (size > MAX_SCRIPT or text.encode() != content):
            raise InvalidAction(f"{path} cannot be edited: it must be UTF-8 text of at most {MAX_SCRIPT:,} bytes.")
        return text, size

    def _write(self, path, content):
        """Puts bytes, or the file at a path, into the workspace, and keeps what was there below .undo/."""
        sha = self.blobs.put(content)
        after = without_undo(self.files) | {path: sha}
        if not fits(after, self.blobs):
            raise InvalidAction(f"The workspace is full: it may hold {storage.MAX_FILES:,} files and "
                                f"{storage.MAX_BYTES >> 20:,} MiB.")
        if path in self.files:
            number = max((number for number, _ in self._replaced()), default=0) + 1
            self.files[f"{UNDO}{number}/{path}"] = self.files[path]
        self.files[path] = sha

    def _replaced(self):
        """Returns [(number of an edit, path under .undo/)] in order."""
        return sorted((int(name.split("/")[1]), name) for name in self.files if name.startswith(UNDO))

    def _versions(self, path):
        """Returns the paths under .undo/ of what edits of this file have replaced, in order."""
        return [name for _, name in self._replaced() if name.split("/", 2)[2] == path]

    def _contents(self, path):
        """Returns {name in a folder, with "/" if it is one too: where its contents are}."""
        prefix = path + "/" if path else ""
        public = self._public(path)
        contents = {}
        if public and public.is_dir():
            for entry in public.iterdir():
                contents[entry.name + ("/" if entry.is_dir() else "")] = entry
        for name, sha in without_undo(self.files).items():
            if name.startswith(prefix):
                first, slash, _ = name[len(prefix):].partition("/")
                contents[first + slash] = self.blobs.path(sha)
        if not path:
            contents["data/"] = self.public
        if not contents:
            raise InvalidAction(f"There is no folder {path}.")
        return contents
