"""Writing a folder: all of its files or none, in place of what was there or of nothing."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bntools.errors import SaveError
from bntools.writing import failed, sync_folder, unfinished

__all__ = ["Staging", "check_folder", "staged_folder"]


def check_folder(folder: Path, marker: str, *, force: bool = False) -> None:
    """Find out before long work whether `folder` could be made, or replaced with `force`.

    Only an empty folder, or one that holds the file `marker`, is ever replaced.
    Raises `SaveError`.
    """
    try:
        final = folder.resolve()
        exists = final.exists()
        full = exists and final.is_dir() and any(final.iterdir())
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise failed(folder, error) from error
    if exists and not final.is_dir():
        raise SaveError(f"Cannot write {folder}: it is a file. Give the name of a folder.")
    if exists and final == Path.cwd():
        # whoever works in it would be left in a folder that is no more
        raise SaveError(f"Cannot write {folder}: it is the current folder. Give the name of one.")
    if full and not force:
        raise SaveError(
            f"Cannot write {folder}: it exists. Choose another name, or replace it with --force"
            " (in Python force=True)."
        )
    if full and not (final / marker).is_file():
        raise SaveError(
            f"Cannot replace {folder}: it holds other files, and no {marker}. Choose another name."
        )
    if not final.parent.is_dir():
        raise SaveError(f"Cannot write {folder}: there is no folder {final.parent}. Make it first.")
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise SaveError(f"Cannot write {folder}: {final.parent} cannot be written to.")


@dataclass(frozen=True)
class Staging:
    """A folder beside the one that it is for; what is put into `path` counts once published."""

    path: Path
    folder: Path
    marker: str
    force: bool

    def publish(self) -> None:
        """Let the folder take its place. Raises `SaveError`."""
        check_folder(self.folder, self.marker, force=self.force)
        try:
            _publish(self.path, self.folder.resolve())
        except OSError as error:
            raise failed(self.folder, error) from error


@contextmanager
def staged_folder(folder: Path, marker: str, *, force: bool = False) -> Iterator[Staging]:
    """A folder to fill and to publish; what is not published is gone after the block.

    `check_folder` says what may be replaced. Raises `SaveError`.
    """
    check_folder(folder, marker, force=force)
    with unfinished(folder.resolve()) as staged:
        try:
            staged.mkdir()
        except OSError as error:
            raise failed(folder, error) from error
        yield Staging(staged, folder, marker, force)


def _publish(staged: Path, final: Path) -> None:
    """Two renames: should the second one fail, the first is taken back."""
    for path in staged.iterdir():
        _sync(path)
    sync_folder(staged)
    old = _beside(final) if final.exists() else None
    if old is not None:
        final.rename(old)
    try:
        staged.rename(final)
    except BaseException:
        if old is not None:
            with suppress(OSError):
                old.rename(final)
        raise
    sync_folder(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _beside(final: Path) -> Path:
    # On the same file system, so that publishing is a rename.
    return final.parent / f".bntools-{secrets.token_hex(8)}.tmp"
