"""A folder that one run at a time writes to.

The lock is a file that the operating system frees when its process ends, however it ends.
"""

from __future__ import annotations

import errno
import os
import platform
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from .._files import atomic_write, remove_leftovers

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

__all__ = ["OwnedFolder"]

# What flock says on file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: set[int] = set()


def _forget() -> None:
    """A forked child shares its parent's locks, and would keep them when the parent has died."""
    for file in _held:
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class OwnedFolder:
    """A context in which nobody else, in this process or another, owns ``path`` for the same purpose.

    Args:
        path: the folder; made if it does not exist.
        purpose: names the lock, ``.<purpose>.lock``; different purposes do not exclude each other.
        files: the names that :meth:`write` will be given. What an earlier, killed owner left of unfinished
            ones is removed.
        owner: a name that only one owner at a time has. Where there are no locks, the owner takes over the
            lock that an earlier one of its name left behind.

    Entering raises OSError: ``path`` is something else than a folder, cannot be written, or has an owner.
    Where the system or the file system has no locks, the lock's existence stands in for it: then a killed
    process leaves it behind, and the message says so.
    """

    _file: int
    _process: int

    def __init__(self, path: Path, purpose: str, files: tuple[str, ...], owner: str | None = None) -> None:
        self.path, self._purpose, self._files = path, purpose, files
        self._mark = "" if owner is None else f" ({owner})"
        self._lock = path / f".{purpose}.lock"

    def __enter__(self) -> OwnedFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, "is there, and is not a folder", str(self.path)) from None
        try:
            self._file = self._take()
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise
            why = f"cannot be written ({error.strerror or error})"
            raise OSError(error.errno, why, str(self.path)) from error
        _held.add(self._file)
        self._process = os.getpid()
        with suppress(OSError):  # only for the message that others get
            os.ftruncate(self._file, 0)
            os.write(self._file, f"process {self._process} on {platform.node()}{self._mark}".encode())
        remove_leftovers(self.path, self._files)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._process:  # a forked child, which has let go already
            return
        ours = self._is_ours(self._file)
        # Before the lock is free: after that it may be another's. A system without locks may refuse to
        # remove an open file.
        if ours and fcntl is not None:
            self._remove_lock()
        _held.discard(self._file)
        os.close(self._file)
        if ours and fcntl is None:
            self._remove_lock()

    def _remove_lock(self) -> None:
        with suppress(OSError):
            self._lock.unlink()

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Writes a file of the folder in one step. Raises OSError, also where the folder is another's now."""
        if not self._is_ours(self._file):
            why = f"cannot be written: {self.path} or its lock was deleted or replaced in the meantime"
            raise OSError(errno.ENOENT, why, str(self.path / name))
        atomic_write(self.path / name, data)

    def _is_ours(self, file: int) -> bool:
        """Whether the lock's name still leads to the file that we have open."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._lock))
        except OSError:
            return False

    def _take(self) -> int:
        for _ in range(100):  # times that an owner lets go between two of our steps
            created = True
            try:
                file = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                created = False
                try:
                    file = os.open(self._lock, os.O_RDWR)
                except FileNotFoundError:
                    continue
            try:
                if not self._flock(file) and not created and not self._was_ours(file):
                    raise self._busy(file, f"; if that process is gone, delete {self._lock}")
                if self._is_ours(file):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)
        raise OSError(errno.EIO, "its lock cannot be opened", str(self._lock))

    def _flock(self, file: int) -> bool:
        """Locks; False where there are no locks. Raises OSError where another has it."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._busy(file) from None
            raise
        return True

    def _was_ours(self, file: int) -> bool:
        """Whether one of the same name left the lock."""
        return self._mark != "" and self._owner_in(file).endswith(self._mark)

    @staticmethod
    def _owner_in(file: int) -> str:
        os.lseek(file, 0, os.SEEK_SET)
        return os.read(file, 300).decode(errors="replace")

    def _busy(self, file: int, remedy: str = "") -> OSError:
        owner = self._owner_in(file)
        why = (
            f"{owner or 'another process'} is writing to it ({self._purpose}): wait for its end, or choose "
            f"another folder with --out{remedy}"
        )
        return OSError(errno.EBUSY, why, str(self.path))
