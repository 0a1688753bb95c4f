"""Files and folders that are either there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = ".partial-"
_REPLACED = _TEMPORARY + "replaced-"


def check_writable(folder: str | Path) -> Path:
    """Return the path of a folder that can be made and written to; nothing is created.

    Raises:
        OSError: A file is in the way, or permission is lacking.
    """
    path = Path(folder)
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"{path}: expected a folder to write to, but {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: cannot be written, {existing} gives no permission")
    return path


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` at the end, and vanishes on any error.

    An existing `target` is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=target.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp makes it private
        for file in temporary.iterdir():
            if file.is_file():
                _sync(file)
        _sync(temporary)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=_REPLACED, dir=target.parent))
            target.rename(old / target.name)
            temporary.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path whose file becomes `target` at the end, and vanishes on any error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays, because writers choose their format by it.
    temporary = target.with_name(f"{_TEMPORARY}{os.getpid()}-{target.name}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written; what it was about to replace comes back.

    Several processes may do so at once.
    """
    for left in folder.glob(f"{_TEMPORARY}*") if folder.is_dir() else ():
        if left.is_dir():
            if left.name.startswith(_REPLACED):
                with suppress(FileNotFoundError):  # another process was first
                    for old in left.iterdir():
                        if not (folder / old.name).exists():
                            old.rename(folder / old.name)
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Ask the system to bring the file, or the folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
