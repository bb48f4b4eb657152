"""What of a file is looked at to tell its format, before anything in it is read."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bntools.archives import Member, directory
from bntools.errors import LoadError, UntrustedError
from bntools.imports import one_line
from bntools.trust import Refusal

__all__ = ["Probe", "explained", "holds", "is_text", "probe_file", "similar", "starts"]

_HEAD = 512
_LONGEST = 10_000


@dataclass(frozen=True)
class Probe:
    """A file by its first bytes, its size and, for a zip archive, its list of members."""

    path: Path
    head: bytes
    size: int

    @cached_property
    def archive(self) -> tuple[Member, ...] | None:
        """The members of a zip archive; None where it is none. Raises Refusal for a bad one."""
        if not self.head.startswith(b"PK"):
            return None
        with self.path.open("rb") as stream:
            return directory(stream)

    @cached_property
    def members(self) -> dict[str, int]:
        """The sizes of an archive's files by their names, without the folder that all are in."""
        return {m.name.partition("/")[2] or m.name: m.size for m in self.archive or ()}

    def fails(self, problem: str, options: tuple[str, ...] = ()) -> LoadError:
        """The error about this file, safe to print whatever names the file has chosen.

        `options` are those of the command line that would let the file have what it wants.
        """
        text = "".join(c if c.isprintable() else "?" for c in problem)
        message = f"Cannot load {self.path}: {text[:_LONGEST]}."
        return UntrustedError(message, options) if options else LoadError(message)

    def wants_trust(self, problem: str) -> LoadError:
        """The error that reading this file can run code that is in it: `problem` says why."""
        return self.fails(
            f"{problem}. If you trust whoever made it as you trust a program, add --trust (in"
            " Python trust=True)",
            ("--trust",),
        )


def probe_file(path: Path) -> Probe:
    """Look at a file; raises `LoadError` for what is no regular file, or is empty."""
    if os.path.isdir(path):
        raise LoadError(f"Cannot load {path}: it is a folder. Give a file in it.")
    if not os.path.isfile(path):
        raise LoadError(f"Cannot load {path}: it is no regular file.")
    try:
        with path.open("rb") as stream:
            probe = Probe(path, stream.read(_HEAD), path.stat().st_size)
    except OSError as error:
        raise LoadError(f"Cannot load {path}: {error.strerror}.") from error
    if not probe.head:
        raise probe.fails("it is empty")
    return probe


def similar(path: Path) -> str:
    """The end of the error that there is no such file: a file with nearly this name, if any."""
    with suppress(OSError):
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
        if near:
            return f"; did you mean {path.parent / near[0]}?"
    return ". Check the path."


@contextmanager
def explained(probe: Probe) -> Iterator[None]:
    """Whatever goes wrong in reading a file becomes a LoadError of one line."""
    try:
        yield
    except LoadError:
        raise
    except Refusal as error:
        raise probe.fails(str(error), error.options) from None
    except OSError as error:
        raise probe.fails(error.strerror or str(error)) from error
    except MemoryError as error:
        raise probe.fails("it needs more memory than there is") from error
    except Exception as error:
        detail = f"{type(error).__name__}: {one_line(error)}"
        raise probe.fails(f"it is damaged or incomplete ({detail}). Copy it again") from error


def holds(*names: str) -> Callable[[Probe], bool]:
    """Matches an archive that has one of these members."""
    return lambda probe: any(name in probe.members for name in names)


def starts(*heads: bytes) -> Callable[[Probe], bool]:
    """Matches a file that starts with one of these."""
    return lambda probe: probe.head.startswith(heads)


def is_text(probe: Probe) -> bool:
    """Whether a file starts like text."""
    return not re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", probe.head)
