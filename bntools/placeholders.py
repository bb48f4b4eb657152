"""What stands for an object while a pickle is followed without being run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "SHARED",
    "Arguments",
    "Global",
    "Listed",
    "Made",
    "Sequenced",
    "Stored",
    "Table",
    "is_special",
]

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Global:
    """What a pickle names, by its full name."""

    name: str


@dataclass(frozen=True, eq=False)
class Sequenced:
    """A tuple in a pickle: its items, where it starts, how large and how deep it is in all."""

    items: Arguments
    start: int
    weight: int
    depth: int

    @property
    def names_a_class(self) -> bool:
        """Whether it can be the persistent id of a class, in a file from before torch 1.6."""
        items = self.items
        return len(items) == 4 and items[0] == "module" and isinstance(items[1], Global)


@dataclass(eq=False)
class Made:
    """An object that a call or a class gives; `origin` is the global's name, if it is one.

    Its state is set once, as all pickles do that are written by pickling.
    """

    origin: str = ""
    has_state: bool = False


@dataclass(eq=False)
class Listed:
    """A list, and whether all that is in it are lists and tuples that the file writes out."""

    plain: bool = True

    def add(self, values: Arguments) -> None:
        """Note what is appended."""
        self.plain = self.plain and all(isinstance(v, (Listed, Sequenced)) for v in values)


@dataclass(eq=False)
class Table:
    """A dict, with what is known under the keys that are text."""

    entries: dict[str, Any] = field(default_factory=dict)

    def add(self, values: Arguments) -> None:
        """Note what is set: keys and values in turn."""
        pairs = zip(values[::2], values[1::2], strict=True)
        self.entries.update({key: value for key, value in pairs if isinstance(key, str)})


@dataclass(frozen=True, eq=False)
class Stored:
    """The numbers of a tensor: so many bytes in items of one size."""

    size: int
    item_size: int


SHARED = Made()
"""The members of an Enum: the whole process shares them, so no file may set their state."""


def is_special(entries: Mapping[str, Any]) -> str | None:
    """A name among attributes to which Python itself gives a meaning, such as __setstate__."""
    return next((key for key in entries if key.startswith("__") and key.endswith("__")), None)
