"""Writing a folder so that a kill at any moment leaves the old one or the new one, never a mixture.

The new folder is written beside the old one, flushed to disk, and then exchanged with it in one
system call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zeropoint.errors import CheckpointError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def replace_directory(
    path: Path, *, may_replace: Callable[[Path], str | None], needed_bytes: int
) -> Iterator[Path]:
    """A temporary sibling folder to write into, which becomes `path` when the block ends without
    an error.

    may_replace: why an existing, non-empty `path` must not be replaced, or None. needed_bytes:
    checked against the free space first. Raises CheckpointError when the folder cannot be written;
    the old folder is then still there.
    """
    path = Path(os.path.abspath(path))  # not resolve(): a link is replaced, not what it points to
    temporary = None
    try:
        check_writable(path, may_replace)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        check_space(path, needed_bytes)
        prefix = f"{_prefix(path)}{os.getpid()}-"
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        install_directory(temporary, path)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be written: {e}") from e
    finally:
        if temporary is not None:
            shutil.rmtree(
                temporary, ignore_errors=True
            )  # what is left of the new one, or the old one


def check_writable(path: Path, may_replace: Callable[[Path], str | None]) -> None:
    """Raises CheckpointError when `path` must not be replaced, or its folder cannot be written."""
    parent = next(p for p in Path(os.path.abspath(path)).parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be written: no permission to write in {parent}")
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file, not a folder; choose another name")
    if any(path.iterdir()):
        reason = may_replace(path)
        if reason is not None:
            raise CheckpointError(f"{path} exists and is not empty; {reason}")


def check_space(path: Path, needed_bytes: int) -> None:
    """Raises CheckpointError when the disk of `path`, whose parent exists, has less left."""
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{path} needs {needed_bytes / 1e6:,.1f} MB, but {path.parent} has "
            f"{free / 1e6:,.1f} MB free; "
            "free some space or write to another disk"
        )


def install_directory(new: Path, path: Path) -> None:
    """Flush the folder `new` to the disk and put it in the place of `path`, which is afterwards at
    `new` if it existed. Both are absolute, and on one disk. Raises OSError.
    """
    _flush_all(new)
    _move_into_place(new, path)


def flush(path: Path) -> None:
    """Put a file, or a folder's list of its files, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prefix(path: Path) -> str:
    return f".{path.name}.partial-"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_stale(path: Path) -> None:
    """Remove what killed runs left beside `path`: temporary folders whose process is gone."""
    for stale in path.parent.iterdir():
        pid = stale.name.removeprefix(_prefix(path)).partition("-")[0]
        if stale.name.startswith(_prefix(path)) and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _flush_all(folder: Path) -> None:
    """Give every file the usual permissions, and fsync it and the folder itself."""
    mode = 0o666 & ~_umask()
    for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
        if path is not folder:
            path.chmod(mode)  # safetensors writes files that only their owner can read
        flush(path)


def _move_into_place(new: Path, path: Path) -> None:
    if path.is_symlink() or not path.exists():
        target = path.resolve() if path.is_symlink() else path
        new.rename(target) if not target.exists() else _exchange(new, target)
    elif any(path.iterdir()):
        _exchange(new, path)
    else:
        new.rename(path)  # POSIX: an empty folder is replaced atomically
    flush(path.parent)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step. Where the system cannot, in two steps: a kill between leaves
    `old` as .NAME.old.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        ok = renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0
        if ok:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(old))
    aside = old.with_name(f".{old.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)
