"""Writes files whole or not at all, whatever happens meanwhile; and locks folders.

A file is written beside its place, flushed to disk and renamed; a line is appended whole or not at all. All
that Twig writes into a run folder goes through here. Knows nothing of what the bytes mean.
"""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

_BINARY = getattr(os, "O_BINARY", 0)  # on Windows: no translation of line ends
_FLUSHABLE = os.O_RDWR | _BINARY if os.name == "nt" else os.O_RDONLY  # Windows flushes only what is writable
LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_PATIENCE = 0.1  # seconds: whoever only looks whether a folder is taken has it for much less


def write_whole(path: Path, data: bytes | str) -> None:
    """Writes a file whole: readers, also after a crash, see the old content or the new."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        write_flushed(draft, data)
        os.replace(draft, path)
        flush_folder(path.parent)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)  # what a full disk left of it
        raise


def write_flushed(path: Path, data: bytes | str) -> None:
    """Writes a file and waits until the disk has it; for files in a draft folder, which nobody reads."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
    try:
        _write_all(handle, _encoded(data))
        os.fsync(handle)
    finally:
        os.close(handle)


def append_whole(path: Path, text: str) -> None:
    """Appends text to a file; if that fails, the file is as before."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
    try:
        size = os.fstat(handle).st_size
        try:
            _write_all(handle, _encoded(text))
        except OSError:
            with suppress(OSError):
                os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def put_folder(draft: Path, target: Path) -> None:
    """Renames the finished folder `draft` to `target`, and removes an older `target`.

    A crash leaves the old one, the new one or, between the two renames, neither; never a mixture. If `draft`
    cannot be renamed, the older one returns to its place. Raises OSError.
    """
    flush_folder(draft)
    gone = _set_aside(target)
    try:
        os.replace(draft, target)
        flush_folder(target.parent)
    finally:
        if target.exists():
            shutil.rmtree(gone, ignore_errors=True)
        else:
            with suppress(OSError):
                os.replace(gone, target)


def remove_folder(folder: Path) -> None:
    """Removes a folder if it exists: it is renamed first, so nobody sees half of it."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def clear_leftovers(folder: Path, pattern: str, put_back: bool = False) -> None:
    """Removes the drafts and the folders set aside that a killed process left of those named `pattern`.

    With `put_back`, a folder that was set aside returns to its place if nothing came there.
    """
    for path in [*folder.glob(f".{pattern}.tmp"), *folder.glob(f".{pattern}.old")]:
        target = path.with_name(path.stem.removeprefix("."))
        if put_back and path.suffix == ".old" and not target.exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until the disk has a file, if it exists."""
    with suppress(FileNotFoundError):
        handle = os.open(path, _FLUSHABLE)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def flush_folder(path: Path) -> None:
    """Waits until the disk has a folder's list of names."""
    if os.name == "nt":
        return  # Windows cannot open a folder to flush it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FolderLock:
    """Keeps other processes out of a folder until `release`, or while this object lives.

    The lock is the operating system's (flock, LockFileEx), so it ends with the process, however that ends; a
    forked process does not keep it. On a network file system it works as far as that supports flock: NFS
    since version 4 does, Lustre only if mounted with `flock`. A file system without locks keeps nobody out.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = FileLock(folder / LOCK, blocking=False, thread_local=False)

    def take(self) -> bool:
        """Takes the folder and returns True, or False if another lock has it; raises OSError."""
        if self._lock.is_locked:
            return True
        try:
            self._lock.acquire(timeout=_PATIENCE, poll_interval=_PATIENCE / 4, blocking=True)
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def release(self) -> None:
        """Lets others in."""
        self._lock.release()


def in_use(folder: Path) -> bool:
    """Returns whether a process has a folder's lock; False if it cannot be told. Creates nothing."""
    if not (folder / LOCK).exists():
        return False
    lock = FolderLock(folder)
    try:
        return not lock.take()
    except OSError:
        return False
    finally:
        lock.release()


def _set_aside(folder: Path) -> Path:
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, gone)
    return gone


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _encoded(data: bytes | str) -> bytes:
    # Half of a surrogate pair, which UTF-8 cannot encode, is written as an escape.
    return data if isinstance(data, bytes) else data.encode("utf-8", "backslashreplace")
