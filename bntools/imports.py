"""Importing what the user names, from the working folder or the Python path."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bntools.errors import LoadError

__all__ = ["import_object", "one_line", "quiet", "working_folder_first"]


def one_line(error: Exception) -> str:
    """The message of an error, short and in one line."""
    text = " ".join(str(error).split())
    return f"{text[:160]}..." if len(text) > 160 else text


@contextmanager
def working_folder_first() -> Iterator[None]:
    """Imports look in the working folder first, as with `python -m`."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def import_object(module: str, name: str, *, what: str) -> Any:
    """Import what the user named, from the working folder or the Python path.

    Raises LoadError, which begins with "Cannot {what}".
    """
    try:
        with working_folder_first():
            found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise LoadError(
            f"Cannot {what}: no module named {error.name!r} here or on the Python path."
        ) from error
    except Exception as error:
        raise LoadError(
            f"Cannot {what}: importing {module} raised {type(error).__name__}: {one_line(error)}."
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise LoadError(f"Cannot {what}: {module} has no {name!r}.")
        found = getattr(found, part)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """What torch and the model libraries warn about while a model is read says nothing here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
