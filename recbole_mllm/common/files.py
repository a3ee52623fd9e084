"""Everything that writes, replaces or removes files goes through here: whole or absent, and never anybody else's.

A file, or a folder of files, is created under a unique scratch name beside its place and then renamed; its writer holds
a lock on it, so that the next one can remove what a killed process has left. What is removed was created here under
such a name, or is named by the manifest that an earlier output has in its folder, and is unchanged since. A path that a
user gives for an output is looked at before any work begins (`check_file`, `check_folder`); no link is followed into
what was not looked at.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from glob import escape
from itertools import count
from pathlib import Path
from typing import IO, Any

from recbole_mllm.common.errors import UserError

_LOCKED, _COMPLETE = "locked", "complete"  # in a folder that is being written: its writer's lock; all files are there
_SCRATCH = f".{{}}.recbole-mllm-{'[0-9a-f]' * 8}.tmp"  # no other program's file is named so
_NO_PATH = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # of a write, which does not say to which file
_HEAD = 4096  # bytes that say of what kind a file is
_PACKED = b"\x1f\x8b"
_LINES = 20  # of a manifest that grows by lines, among which one must be ours


# Files


@contextmanager
def whole_file(path: Path, *, binary: bool = False, sweep: bool = True) -> Iterator[IO[Any]]:
    """Open a file for writing UTF-8 text, or bytes, that appears as `path` only when all of it is written.

    Args:
        path: Where it is to appear; folders above it are created.
        binary: Whether bytes are written.
        sweep: Whether to remove what killed processes had begun to write in its place, which reads the whole folder.

    Raises:
        OSError: As the system says it, with `path` where it names no file. What was at `path` stays then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if sweep:
        sweep_scratch(path.parent, path.name)
    try:
        how: dict[str, Any] = {"mode": "xb"} if binary else {"mode": "x", "encoding": "utf-8", "newline": "\n"}
        with _replacing(path) as scratch, scratch.open(**how) as file:
            _lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in _NO_PATH and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a new name beside `path`; what is written there takes its place, unless there is an error."""
    scratch = _scratch_name(path)
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        with suppress(OSError):  # gone, or left where both are one file already
            os.unlink(scratch)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


@contextmanager
def whole_text(path: Path) -> Iterator[IO[str]]:
    """Open `path` as `whole_file` does; ``.gz`` compresses, without name and time, so that a text has one form."""
    if path.suffix != ".gz":
        with whole_file(path) as file:
            yield file
        return
    with (
        whole_file(path, binary=True) as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as text,
    ):
        yield text


def open_text(path: Path) -> IO[str]:
    """Open a text that `whole_text` has written."""
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def make_once(path: Path, make: Callable[[Path], None]) -> bool:
    """Let `make` write `path` unless it is there; return whether it did.

    Processes that come meanwhile wait. The lock ends with the process that holds it, so after ``kill -9`` the next one
    starts again, and removes what the killed one has left.

    Args:
        path: Whole or absent at any time.
        make: Gets the file to write: of the same name, in a folder that is then removed.
    """
    if path.is_file():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            return False
        with staged(path.parent, path.name) as stage:
            make(stage / path.name)
            os.replace(stage / path.name, path)
    return True


def bring(path: Path, target: Path) -> None:
    """Link `path` to `target` where the file system allows, which costs no space, else copy it; whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(target) as scratch:
        try:
            os.link(path, scratch)
        except OSError:
            with path.open("rb") as given, scratch.open("xb") as copy:
                shutil.copyfileobj(given, copy)


def replace_file(fresh: Path, path: Path) -> None:
    """Put `fresh`, which was made in a folder of `staged`, in the place of `path`."""
    os.replace(fresh, path)


def remove_file(path: Path) -> None:
    """Remove a file that this project writes under that very name, if it is there; of a link, the link alone."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def remove_empty_folder(folder: Path) -> None:
    """Remove a folder that this process has created, unless there is something in it."""
    with suppress(OSError):
        os.rmdir(folder)


def set_file_aside(path: Path, word: str, beside: Sequence[str] = ()) -> Path:
    """Give a file that cannot be used a free name, ``NAME.word-N``, which is returned.

    Args:
        path: The file.
        word: What is wrong with it.
        beside: Endings of files that belong to it (``-wal``); those that are there are renamed alike.

    Raises:
        OSError: It cannot be renamed, and stays.
    """
    aside = _free_name(path, f".{word}-")
    os.rename(path, aside)
    for ending in beside:
        with suppress(FileNotFoundError):
            os.rename(path.with_name(path.name + ending), aside.with_name(aside.name + ending))
    return aside


def set_folder_aside(folder: Path) -> Path:
    """Rename an output of ours to a free name, ``NAME.N``, which is returned.

    Raises:
        UserError: It is a link.
    """
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, and must make room; move what it leads to yourself")
    aside = _free_name(folder, ".")
    os.rename(folder, aside)
    return aside


def _free_name(path: Path, ending: str) -> Path:
    names = (path.with_name(f"{path.name}{ending}{number}") for number in count(1))
    return next(name for name in names if not os.path.lexists(name))


def left_scratch(folder: Path) -> list[Path]:
    """Return what processes that are gone had begun to write in `folder`: files and folders.

    Not what `recover` will finish: it may be all that there is of an output whose earlier files are gone.
    """
    return [path for path in _left(folder) if not (path / _COMPLETE).is_file()]


def remove_scratch(path: Path) -> None:
    """Remove one of `left_scratch`, unless a process has taken it up since."""
    for left in _left(path.parent, _inside(path)):
        if left == path and not (left / _COMPLETE).is_file():
            _remove_scratch(left)


def sweep_scratch(folder: Path, name: str | None = None) -> None:
    """Remove what processes that are gone had begun to write in `folder`, in the place of `name` or of anything."""
    for left in _left(folder, name):
        _remove_scratch(left)


def _scratch_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.recbole-mllm-{secrets.token_hex(4)}.tmp")


def _left(folder: Path, name: str | None = None, *, files: bool = True) -> Iterator[Path]:
    """Yield each scratch folder, and file, whose writer is gone, locked meanwhile."""
    for path in sorted(folder.glob(_SCRATCH.format(escape(name) if name else "*"))):
        if not path.is_symlink() and (files or path.is_dir()):
            # a folder in which something lies, but not the lock that `staged` makes first, is none of ours
            lock = path / _LOCKED if path.is_dir() else path
            with suppress(OSError), lock.open("ab" if path.is_dir() and not any(path.iterdir()) else "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else a living process holds it
                yield path


def _remove_scratch(path: Path) -> None:
    """Remove a scratch file, or what `staged` has made; whatever else lies in its folder stays, and so does that."""
    if not path.is_dir():
        remove_file(path)
        return
    shutil.rmtree(path / _inside(path), ignore_errors=True)  # which refuses a link, and follows none inside
    for name in (_COMPLETE, _LOCKED):
        remove_file(path / name)
    remove_empty_folder(path)


def _inside(home: Path) -> str:
    """Return the name of the folder that `staged` makes in a scratch folder."""
    return home.name[1:].rsplit(".", 2)[0]


def _lock(descriptor: int) -> None:
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Folders


@contextmanager
def staged(place: Path, name: str) -> Iterator[Path]:
    """Yield a new, empty folder called `name`, inside a scratch folder in `place`; both are gone afterwards.

    Renaming it, or files out of it, is how all of them appear at once.
    """
    sweep_scratch(place, name)
    home = _scratch_name(place / name)
    home.mkdir(parents=True)
    with (home / _LOCKED).open("x") as file:
        try:
            _lock(file.fileno())
            (home / name).mkdir()
            yield home / name
        finally:
            _remove_scratch(home)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of folder that this project writes.

    Args:
        name: What it is called in a message.
        manifest: The file in it that says so.
        is_ours: Whether a JSON object, the manifest's or that of one of its lines, is of this kind.
        key: Ends of names of the files without which nothing in it can be used.
        rewritten: First line of each file that other commands write again, by name.
    """

    name: str
    manifest: str
    is_ours: Callable[[Mapping[str, Any]], bool]
    key: tuple[str, ...] = ()
    rewritten: Mapping[str, bytes] = field(default_factory=dict)

    def outputs(self, folder: Path) -> list[Any] | None:
        """Return what the manifest in `folder` says of its files; None where there is no manifest of this kind."""
        path = folder / self.manifest
        if path.is_symlink() or not path.is_file():
            return None
        if self.manifest.endswith(".jsonl"):  # grows from nothing; its last line may be torn
            lines = path.read_bytes().splitlines()
            return [] if not lines or any(self._read(line) is not None for line in lines[:_LINES]) else None
        return self._read(path.read_bytes())

    def _read(self, text: bytes) -> list[Any] | None:
        with suppress(ValueError, RecursionError):
            about = json.loads(text)
            if isinstance(about, dict) and self.is_ours(about) and isinstance(found := about.get("outputs", []), list):
                return found
        return None


CONVERTED = Kind(
    "a dataset that `convert` wrote",
    "manifest.json",
    lambda about: "converter" in about and "outputs" in about,
    key=(".inter",),
    rewritten={"missing_images.tsv": b"item_id\tpath\treason\n"},
)
BUILTIN = Kind("a built-in dataset", "manifest.json", lambda about: "builtin" in about)
EXPORT = Kind(
    "an export that lists its files",
    "export.json",
    lambda about: str(about.get("written_by", "")).startswith("recbole-mllm") and "outputs" in about,
    key=("config.json",),
)
BENCHMARK = Kind("a benchmark's results", "runs.jsonl", lambda about: "run_id" in about)


def outputs_of(folder: Path) -> list[dict[str, Any]]:
    """Return what a manifest says of the files in `folder`: name, size and SHA-256; a subfolder has its own list."""
    return [
        {"file": path.name, "outputs": outputs_of(path)}
        if path.is_dir()
        else {"file": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(folder.iterdir())
    ]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_new(stage: Path, folder: Path) -> None:
    """Let `stage` appear as `folder`, which is absent or empty, all of it at once.

    Raises:
        OSError: There is something by now.
    """
    os.rename(stage, folder)


def publish(stage: Path, folder: Path, kind: Kind) -> None:
    """Put the files of `stage`, its manifest among them, in the place of those an earlier output has in `folder`.

    All else in `folder` stays. Killed in between, `recover` does the rest; until then the files are absent without
    which nothing can be used, so that nobody reads old and new together.

    Args:
        stage: A folder of `staged`, in `folder` itself.
        folder: One that `check_folder` has passed.
        kind: Of both.

    Raises:
        UserError: A file is in the way that no earlier output has written.
    """
    owned, rewritten = _plain(kind.outputs(folder) or []), kind.rewritten
    for path in stage.iterdir():
        if path.name != kind.manifest and path.name not in owned and not may_replace(folder / path.name, rewritten):
            raise UserError(f"{folder / path.name} is not of an earlier output; move it away and run this again")
    (stage.parent / _COMPLETE).touch()
    _move_in(stage, folder, kind)


def recover(folder: Path, kind: Kind) -> None:
    """Finish what a killed process was putting into `folder`, and remove what it had only begun."""
    for home in _left(folder, files=False):
        if (home / _COMPLETE).is_file():
            _move_in(home / _inside(home), folder, kind)
        _remove_scratch(home)


def _move_in(stage: Path, folder: Path, kind: Kind) -> None:
    """Move what is left in `stage` to `folder`, removing what only an earlier output had; may be done twice."""
    if not (stage / kind.manifest).is_file():  # it comes last: all is done
        return
    new = _plain(kind.outputs(stage) or [])
    for name, entry in _plain(kind.outputs(folder) or []).items():
        if name not in new or (name.endswith(kind.key) and (stage / name).exists()):
            _remove_owned(folder / name, entry)
    names = {path.name for path in stage.iterdir()}
    for name in sorted(names, key=lambda name: (name == kind.manifest, name.endswith(kind.key), name)):
        _move(stage / name, folder / name)


def _move(path: Path, target: Path) -> None:
    if not path.is_dir():
        os.replace(path, target)
        return
    target.mkdir(exist_ok=True)
    for inner in sorted(path.iterdir()):
        _move(inner, target / inner.name)


def _remove_owned(path: Path, entry: Mapping[str, Any]) -> None:
    """Remove a file that a manifest names, or of a folder what it names there and the folder if nothing is left."""
    if "outputs" not in entry:
        if not path.is_dir() or path.is_symlink():
            remove_file(path)
    elif path.is_dir() and not path.is_symlink():
        for name, inner in _plain(entry["outputs"]).items():
            _remove_owned(path / name, inner)
        with suppress(OSError):
            os.rmdir(path)


def _plain(entries: Any) -> dict[str, Mapping[str, Any]]:
    """Return a manifest's entries by name, without those whose name would lead anywhere else."""
    named = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {
        name: entry
        for entry in named
        if isinstance(name := entry.get("file"), str) and name not in ("", ".", "..") and not set("/\\\0") & set(name)
    }


def _changed(folder: Path, entries: Any, rewritten: Mapping[str, bytes]) -> Iterator[str]:
    """Yield the names of files that are no longer what the manifest says was written."""
    for name, entry in _plain(entries).items():
        path = folder / name
        if not os.path.lexists(path) or (name in rewritten and may_replace(path, rewritten)):
            continue
        if "outputs" in entry:
            inside = path.is_dir() and not path.is_symlink()
            yield from (f"{name}/{n}" for n in _changed(path, entry["outputs"], {})) if inside else [name]
        elif (
            path.is_symlink()
            or not path.is_file()
            or path.stat().st_size != entry.get("bytes")
            or digest(path) != entry.get("sha256")
        ):
            yield name


def may_replace(path: Path, rewritten: Mapping[str, bytes]) -> bool:
    """Return whether there is nothing at `path`, or a file that some command of ours writes again and again."""
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_file() or path.name not in rewritten:
        return False
    return head(path).startswith(rewritten[path.name])


# What a user gives


def head(path: Path) -> bytes:
    """Return a file's first bytes, unpacked where it is gzip's; b"" where it cannot be read."""
    with suppress(OSError, EOFError, ValueError, zlib.error):
        with path.open("rb") as file:
            first = file.read(_HEAD)
        if not first.startswith(_PACKED):
            return first
        with gzip.open(path) as packed:
            return packed.read(_HEAD)
    return b""


def check_file(path: Path, option: str, is_ours: Callable[[bytes], bool], what: str) -> Path:
    """Return where the file `path` is to be written, a link followed, once nothing of anybody else's would be lost.

    Args:
        path: As given; its file may be absent, empty, or of the kind this command writes.
        option: What named it, for messages.
        is_ours: Whether a file that begins so is of that kind (`head`).
        what: What this command writes, in words.

    Raises:
        UserError: It says what is in the way.
    """
    found = _resolved(path, option)
    if found.is_dir():
        raise UserError(f"{option} {path} is a folder; give the name of a file")
    _check_writable(found.parent, path, option)
    if os.path.lexists(found):
        if not found.is_file():
            raise UserError(f"{option} {path} is no ordinary file; give another name")
        if found.stat().st_size and not is_ours(head(found)):
            raise UserError(f"{option} {path} is there already and is not {what}; give another name, or remove it")
        if not os.access(found, os.W_OK):
            raise UserError(f"{option} {path} is there already and must not be written to; give another name")
    return found if path.is_symlink() else path


def check_folder(
    path: Path, kind: Kind, option: str, *, inputs: Sequence[Path] = (), writes: Collection[str] = ()
) -> None:
    """Refuse a folder for an output that would meet, or cost, anything but an earlier output of the same kind.

    Args:
        path: As given; decided is by what it leads to.
        kind: Of the output.
        option: What named it, for messages.
        inputs: What is read, which must lie neither there nor below.
        writes: Names that the output may have beside those of the earlier one.

    Raises:
        UserError: It is a root, a mount point, the home or working folder or above one of them, no folder, cannot be
            written to, holds something else, or files of the earlier output were changed since.
    """
    found = _resolved(path, option)
    _refuse_place(found, f"{option} {path}", inputs)
    _check_writable(found, path, option)
    if not found.is_dir():
        return
    recover(found, kind)
    if begun := [path.name for path in found.glob(_SCRATCH.format("*")) if path.is_dir()]:
        raise UserError(f"{option} {path}: another process is writing there ({begun[0]}); let it finish")
    entries = sorted(entry.name for entry in found.iterdir())
    if not entries:
        return
    outputs = kind.outputs(found)
    if outputs is None:
        shown = ", ".join(entries[:3]) + (", …" if len(entries) > 3 else "")
        raise UserError(f"{option} {path} already holds {shown} and is not {kind.name}; give a new folder")
    if changed := list(_changed(found, outputs, kind.rewritten)):
        raise UserError(
            f"{option} {path}: {', '.join(changed[:3])} was changed after it was written and would be lost; move it "
            "away, or give a new folder"
        )
    owned = {*_plain(outputs), kind.manifest}
    for name in sorted(set(writes) - owned):
        if not may_replace(found / name, kind.rewritten):
            raise UserError(f"{option} {path} holds {name}, which is not of the earlier output; move it away")


def check_removable(path: Path, option: str) -> None:
    """Refuse, with a `UserError`, a folder below which nothing may be removed: none, a root, home, the working one."""
    found = _resolved(path, option)
    if not found.is_dir():
        raise UserError(f"{option} {path}: there is no such folder; give one that runs have written to")
    _refuse_place(found, f"{option} {path}", ())


def check_place(path: Path, option: str) -> None:
    """Refuse, with a `UserError`, a folder that files are to be added to and that cannot be created or written to."""
    _check_writable(_resolved(path, option), path, option)


def _resolved(path: Path, option: str) -> Path:
    try:
        os.lstat(path)
    except (OSError, ValueError) as error:  # ValueError: it holds a NUL
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{option} {str(path)[:80]!r}: {error.args[-1]}; give another name") from None
    if str(path).startswith("~"):  # a folder of that name is removed as ``rm -r ~``
        raise UserError(f"{option} {path}: the shell has left ~ as it is; write the folder in full, or ./{path}")
    for part in (path, *path.parents):
        if os.path.islink(part) and not os.path.exists(part):
            raise UserError(f"{option} {path}: {part} is a link that leads nowhere; remove it, or give another name")
    return Path(os.path.realpath(path))


def _check_writable(folder: Path, path: Path, option: str) -> None:
    """Refuse where `folder` is none, or it, or the first folder above it that is there, takes no files."""
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{option} {path}: {there} is no folder; give another name")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: the folder {there} cannot be written to; give another place")


def _refuse_place(found: Path, given: str, inputs: Sequence[Path]) -> None:
    if found.parent == found or os.path.ismount(found):
        raise UserError(f"{given} is a root or a mount point; give a folder below it")
    for place, what in ((os.path.expanduser("~"), "the home folder"), (os.curdir, "the working folder")):
        if _is_at_or_above(found, place):
            raise UserError(f"{given} is {what}, or above it; give a folder of its own")
    for source in inputs:
        if _is_at_or_above(found, source):
            raise UserError(f"{given} holds {source}, which is only read; give a folder of its own")


def _is_at_or_above(found: Path, place: str | Path) -> bool:
    with suppress(OSError):
        resolved = Path(os.path.realpath(place))
        return any(os.path.samefile(one, found) for one in (resolved, *resolved.parents) if one.exists())
    return False
