"""Writing models and reports: the old file or the new one is there, whole, whatever happens."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from bntools.errors import SaveError
from bntools.modules import named_modules
from bntools.recipe import recipe_of
from bntools.report import Result
from bntools.rewriting import Rewritten

__all__ = [
    "check_writable",
    "save",
    "sync_folder",
    "write_atomically",
    "write_report",
    "write_text_atomically",
]

StrPath = str | os.PathLike[str]
Writer = Callable[[IO[bytes]], object]


def save(result_or_model: Result[Any] | nn.Module, path: StrPath, *, force: bool = False) -> None:
    """Write a model, or the result of a surgery, to a file that `bntools.load` reads.

    The file is a dict with the whole module under "model", the edits that were made to it under
    "bntools_recipe" (None for a plain model), and "bntools_version". An existing file is replaced
    only with `force`, keeps its permissions, and is untouched if anything fails.

    Raises SaveError.

    Example:
        >>> import tempfile, torch, bntools
        >>> from pathlib import Path
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "model.pt"
        >>> bntools.save(torch.nn.Linear(2, 1), path)
        >>> bntools.load(path)
        Linear(in_features=2, out_features=1, bias=True)
        >>> folder.cleanup()
    """
    model, recipe = _parts(result_or_model)
    content = {"model": model, "bntools_recipe": recipe, "bntools_version": _version()}

    def write(stream: IO[bytes]) -> None:
        try:
            torch.save(content, stream)
        except (SaveError, OSError):
            raise
        except Exception as error:
            raise _unpicklable(Path(path), model, error) from error

    write_atomically(path, write, force=force)


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
        raise _failed(target, error) from error
    if mode is not None and not stat.S_ISREG(mode):
        return
    if not folder.is_dir():
        raise SaveError(f"Cannot write {target}: there is no folder {folder}. Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SaveError(f"Cannot write {target}: the folder {folder} cannot be written to.")


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
        with _temporary(final.parent) as (temporary, stream):
            _watched(stream, write)
            stream.flush()
            os.fsync(stream.fileno())
            if final.exists():
                with suppress(OSError):  # a file system without permissions
                    temporary.chmod(stat.S_IMODE(final.stat().st_mode))
            _publish(temporary, final, force=force)
        sync_folder(final.parent)
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError as error:
        raise _failed(target, error) from error


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


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    # Not `tempfile`: its files are for the owner alone, these get the permissions of the umask.
    path = folder / f".bntools-{secrets.token_hex(8)}.tmp"
    try:
        with path.open("xb") as stream:
            yield path, stream
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


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


def _parts(result_or_model: Result[Any] | nn.Module) -> tuple[nn.Module, dict[str, Any] | None]:
    model = result_or_model.model if isinstance(result_or_model, Result) else result_or_model
    if not isinstance(model, nn.Module):
        raise SaveError(
            f"Cannot save a {type(model).__name__}: give an nn.Module or the Result of a surgery."
        )
    own = result_or_model.recipe if isinstance(result_or_model, Result) else None
    recipe = own or recipe_of(model)
    return model, recipe.to_dict() if recipe.edits else None


def _version() -> str:
    try:
        return version("bntools")
    except PackageNotFoundError:
        return "unknown"


def _exists(target: Path) -> SaveError:
    return SaveError(
        f"Cannot write {target}: it exists. Choose another name, or replace it with --force "
        "(in Python force=True)."
    )


def _failed(target: Path, error: Exception) -> SaveError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return SaveError(f"Cannot write {target}: {reason[:1].lower()}{reason[1:]}.")


# ---- what cannot be pickled ----------------------------------------------------------------------


def _unpicklable(target: Path, model: nn.Module, error: Exception) -> SaveError:
    culprit = _culprit(model) or " ".join(str(error).split())[:200]
    return SaveError(f"Cannot write {target}: {culprit}.")


def _culprit(model: nn.Module) -> str:
    """What in a model cannot be saved, by its path."""
    for path, module in named_modules(model):
        cls, at = type(module), f" at {path}" if path else ""
        cls = cls.__mro__[2] if isinstance(module, Rewritten) else cls
        if isinstance(module, torch.jit.ScriptModule):
            return f"the module{at} is TorchScript, which is saved with torch.jit.save"
        if _found(cls) is not cls:
            return (
                f"the class {cls.__module__}.{cls.__qualname__}{at} cannot be found by that name. "
                "Define it at the top level of a module"
            )
        for name, value in vars(module).items():
            if not _pickles(value):
                place = f"{path}.{name}" if path else name
                return f"the attribute {place} ({_described(value)}) cannot be pickled"
    return ""


def _found(cls: type) -> Any:
    return getattr(sys.modules.get(cls.__module__), cls.__qualname__, None)


def _described(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return f"{type(value).__name__} {name}" if name else type(value).__name__


class _ShallowPickler(pickle.Pickler):
    """Pickles values without the tensors and modules in them."""

    def persistent_id(self, value: Any) -> str | None:
        return "skipped" if isinstance(value, (torch.Tensor, nn.Module)) else None


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


def _pickles(value: Any) -> bool:
    try:
        _ShallowPickler(_Nowhere(), protocol=2).dump(value)
    except Exception:  # noqa: BLE001 - pickling runs what any class defines
        return False
    return True
