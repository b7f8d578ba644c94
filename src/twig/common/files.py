"""Files that are whole or not there, whatever happens while they are written; and a folder's lock.

A file is written beside its place, flushed to disk and renamed; a line is appended whole or not at all. All
that Twig writes into a run folder goes through here. Knows nothing of what the bytes mean.
"""

import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path

_BINARY = getattr(os, "O_BINARY", 0)  # Windows: no translation of line ends
_FLUSHABLE = os.O_RDWR | _BINARY if os.name == "nt" else os.O_RDONLY  # Windows flushes what may be written
LOCK = ".lock"


def write_whole(path: Path, data: bytes | str) -> None:
    """Writes a file whole: whoever reads it, now or after a crash, finds the old content or the new."""
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
    """Writes a file and waits until the disk has it; to be used inside a draft, which nobody reads."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
    try:
        _write_all(handle, _encoded(data))
        os.fsync(handle)
    finally:
        os.close(handle)


def append_whole(path: Path, text: str) -> None:
    """Appends text to a file; where that fails the file is as before."""
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
    """Makes the finished folder `draft` the folder `target`, in place of one that was there.

    A crash leaves the old one, the new one or, between the two renames, neither; never a mixture.
    """
    flush_folder(draft)
    gone = _set_aside(target)
    os.replace(draft, target)
    flush_folder(target.parent)
    shutil.rmtree(gone, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder, if it is there: it is gone under its name at once, and never half there."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until the disk has a file; one that is not there needs no waiting."""
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
    """Keeps other processes out of a folder until `release`, or for as long as this object lives.

    The lock is the operating system's and ends with the process, however that ends. A process that was forked
    from this one does not keep it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.handle: int | None = None

    def take(self) -> bool:
        """Whether the folder is this lock's now: False where another one has it. A file system that knows no
        locks keeps nobody out."""
        if self.handle is not None:
            return True
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(handle):
            os.close(handle)
            return False
        self.handle = handle
        if hasattr(os, "register_at_fork"):
            lock = weakref.ref(self)  # what is registered stays so, and is not to keep the lock alive
            os.register_at_fork(after_in_child=lambda: _forget(lock()))
        return True

    def release(self) -> None:
        """Lets others in."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __del__(self) -> None:
        self.release()


def _forget(lock: FolderLock | None) -> None:
    # A forked process shares the lock until it closes its copy of the handle; closing does not unlock.
    if lock is not None:
        lock.release()


def _set_aside(folder: Path) -> Path:
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, gone)
    return gone


def _lock(handle: int) -> bool:
    if os.name == "nt":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    return True


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _encoded(data: bytes | str) -> bytes:
    # What no UTF-8 can say (half of a surrogate pair) is written as an escape.
    return data if isinstance(data, bytes) else data.encode("utf-8", "backslashreplace")
