"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["atomic_write", "remove_leftovers"]


def atomic_write(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Writes a file in one step: whoever reads ``path`` sees the old content or all of the new.

    Raises OSError that names ``path``; then what was there is unchanged and nothing is left beside it. (A
    process that is killed may leave a file for :func:`remove_leftovers`.)
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                # Else a power cut could leave the new name with none of the new content.
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        gone = not path.parent.is_dir()
        rest = f"there is no folder {path.parent}" if gone else "what was there before is unchanged"
        why = f"cannot be written ({error.strerror or error}); {rest}"
        raise OSError(error.errno, why, str(path)) from error


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Removes what :func:`atomic_write` left of these files where its process was killed.

    Only for a folder that nobody else writes to. What cannot be removed stays.
    """
    unfinished = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):
        for name in filter(unfinished.fullmatch, os.listdir(folder)):
            with suppress(OSError):
                (folder / name).unlink()
