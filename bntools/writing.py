"""Writing files: the old one or the new one is there, whole, whatever happens."""

from __future__ import annotations

import atexit
import errno
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bntools.errors import SaveError

__all__ = [
    "StrPath",
    "Writer",
    "check_writable",
    "failed",
    "sync_folder",
    "unfinished",
    "write_atomically",
    "write_report",
    "write_text_atomically",
]

StrPath = str | os.PathLike[str]
Writer = Callable[[IO[bytes]], object]


def write_report(path: StrPath, result: Any, *, force: bool = False) -> None:
    """Write what `result.to_dict()` gives as JSON; numbers that are not finite become null.

    Raises SaveError.
    """
    data = result.to_dict()
    write_text_atomically(path, json.dumps(data, indent=2, allow_nan=False) + "\n", force=force)


def write_text_atomically(path: StrPath, text: str, *, force: bool = False) -> None:
    """Write a text file (UTF-8) as a whole or not at all.

    Raises SaveError.
    """
    write_atomically(path, lambda stream: stream.write(text.encode()), force=force)


def check_writable(path: StrPath, *, force: bool = False) -> None:
    """Find out before long work whether `path` could be written.

    Raises SaveError for what exists (without `force`), and for a folder that is missing or closed.
    """
    target = Path(path)
    try:
        mode = target.stat().st_mode if target.exists() else None
        if mode is not None and stat.S_ISDIR(mode):
            raise SaveError(f"Cannot write {target}: it is a folder. Give a file name in it.")
        if mode is not None and stat.S_ISREG(mode) and not force:
            raise _exists(target)
        folder = target.resolve().parent
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise failed(target, error) from error
    if mode is not None and not stat.S_ISREG(mode):
        return
    if not folder.is_dir():
        raise SaveError(f"Cannot write {target}: there is no folder {folder}. Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SaveError(f"Cannot write {target}: the folder {folder} cannot be written to.")
    try:  # what the permissions promise, a network or a special file system may refuse
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise failed(target, error) from error


def write_atomically(path: StrPath, write: Writer, *, force: bool = False) -> None:
    """Let `write` fill a temporary file beside `path`, which takes its place when all is on disk.

    A link is followed and stays. Devices and pipes are written to directly.
    Raises SaveError; whatever `write` raises besides OSError passes. The temporary file is removed
    in any case.
    """
    target = Path(path)
    check_writable(target, force=force)
    try:
        if target.exists() and not target.is_file():
            with target.open("wb") as stream:
                _watched(stream, write)
            return
        final = target.resolve()
        with _temporary(final) as (temporary, stream):
            _watched(stream, write)
            stream.flush()
            _sync(stream.fileno())
            _inherit(temporary, final)
            _publish(temporary, final, force=force)
        sync_folder(final.parent)
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError as error:
        raise failed(target, error) from error


class _Watched:
    """A stream that remembers its first failure, which C++ writers turn into other errors."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.failure: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            return self.stream.write(data)
        except BaseException as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self.stream.flush()


def _watched(stream: IO[bytes], write: Writer) -> None:
    watched: Any = _Watched(stream)
    try:
        write(watched)
    except BaseException as error:
        if watched.failure is not None and watched.failure is not error:
            raise watched.failure from None
        raise


_UNFINISHED: set[Path] = set()


@contextmanager
def unfinished(final: Path) -> Iterator[Path]:
    """A name beside a file or folder, for what is to take its place; gone after the block.

    An interruption can come between any two steps, here too: what is then left goes with the
    process. Only `kill -9` leaves something, under a name that says whose it is.
    """
    # Not `tempfile`: its files are for the owner alone, these get the permissions of the umask.
    path = final.parent / f".bntools-{secrets.token_hex(8)}.tmp"
    _UNFINISHED.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _UNFINISHED.discard(path)


@atexit.register
def _remove_unfinished() -> None:
    for path in tuple(_UNFINISHED):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


@contextmanager
def _temporary(final: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    with unfinished(final) as path, path.open("xb") as stream:
        yield path, stream


def _inherit(temporary: Path, final: Path) -> None:
    """Give a file the permissions of the one that it replaces, and its owner where that may be."""
    try:
        old = final.stat()
    except FileNotFoundError:
        return
    with suppress(OSError):  # another owner is for the superuser alone
        os.chown(temporary, old.st_uid, old.st_gid)
    with suppress(OSError):  # a file system without permissions
        temporary.chmod(stat.S_IMODE(old.st_mode))


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have nothing to wait for
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _publish(temporary: Path, final: Path, *, force: bool) -> None:
    if not force:
        try:
            # Unlike a rename, a link never replaces what another process wrote in the meantime.
            os.link(temporary, final)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if final.exists():
                raise FileExistsError from None
        else:
            return
    temporary.replace(final)


def sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exists(target: Path) -> SaveError:
    return SaveError(
        f"Cannot write {target}: it exists. Choose another name, or replace it with --force "
        "(in Python force=True)."
    )


def failed(target: Path, error: Exception) -> SaveError:
    """The error about a target that the system refuses to write."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return SaveError(f"Cannot write {target}: {reason[:1].lower()}{reason[1:]}.")
