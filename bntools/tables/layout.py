"""Text and tables as wide as the terminal, and 100 columns where there is none."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from io import StringIO
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from bntools.report import Range, Spread

__all__ = [
    "GAP",
    "WIDTH",
    "Rows",
    "facts",
    "grid",
    "has_room",
    "named",
    "number",
    "plain",
    "span",
    "table",
    "text",
    "told",
    "width",
    "wrapped",
]

WIDTH = 100


_NARROWEST = 40


_LEAST = 28


GAP = 2


_TIE = "\xa0"


_SENTENCES = ("outcome", "what", "verdict")


Rows = Sequence[Sequence[str]]


def text(*parts: str) -> str:
    """The parts that are not empty below each other, tables set off by a blank line."""
    shown = [part for part in parts if part]
    pieces = shown[:1]
    for above, part in pairwise(shown):
        pieces += ["\n\n" if "\n" in above or "\n" in part else "\n", part]
    return "".join(pieces)


def plain(value: str) -> str:
    """A text in which nothing steers a terminal: names come from files that others wrote."""
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def named(path: str) -> str:
    """The path of a layer as it is shown."""
    return plain(path) or "(the model)"


def span(values: Range | Spread | None) -> str:
    """The smallest and the largest value."""
    if values is None:
        return "-"
    if values.low == values.high:
        return f"{values.low:.2g}"
    return f"{values.low:.2g}..{values.high:.2g}"


def number(value: float | None) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:.10g}"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with their values, which a line break does not part."""
    cells = (v if name == "kind" else f"{name}{_TIE}{v}" for name, v in pairs if v not in ("", "-"))
    return ", ".join(cells)


def told(shared: dict[str, str]) -> str:
    """What all rows share, in one line."""
    said = facts(shared.items())
    return wrapped(f"all of them: {said}") if said else ""


def width() -> int:
    """What COLUMNS says, or the columns of the terminal."""
    asked = os.environ.get("COLUMNS", "")
    columns = int(asked) if asked.isdecimal() else 0
    if not columns and sys.stdout is not None and sys.stdout.isatty():
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    return max(columns, _NARROWEST) if columns else WIDTH


def wrapped(value: str, indent: str = "") -> str:
    """A text in lines of the width that there is."""
    filled = textwrap.fill(
        value,
        width(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    return filled.replace(_TIE, " ")


def has_room(head: Sequence[str], rows: Rows, *, wrapping: bool = True) -> bool:
    """Whether a line has room for all cells, with a sentence in the last column wrapped or not."""
    sizes = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    if wrapping and head[-1] in _SENTENCES:
        sizes[-1] = min(sizes[-1], _LEAST)
    return sum(sizes) + GAP * len(sizes[1:]) <= width()


def table(head: Sequence[str], rows: Rows, *, title: int = 1) -> str:
    """A table, or where the columns have no room, a block of lines for every row.

    The first `title` cells are the first line of a block.
    """
    if has_room(head, rows):
        return grid(head, rows)
    return "\n".join(_block(head, row, title) for row in rows)


def grid(head: Sequence[str], rows: Rows) -> str:
    """A table, whatever room there is; what is too long for the last column is wrapped."""
    rule = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    drawn = Table(box=rule, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in head[:-1]:
        drawn.add_column(Text(name), no_wrap=True)
    drawn.add_column(Text(head[-1]), overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    stream = StringIO()
    # Plain text wherever it is asked for, also in a notebook: it may go to a file.
    console = Console(
        file=stream, width=width(), color_system=None, force_terminal=False, force_jupyter=False
    )
    console.print(drawn)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _block(head: Sequence[str], row: Sequence[str], title: int) -> str:
    cells = list(zip(head, row, strict=True))[title:]
    sentence = " ".join(value for name, value in cells if name in _SENTENCES)
    said = facts((name, value) for name, value in cells if name not in _SENTENCES)
    first = "  ".join(row[:title])
    if not said and len(first) + GAP + len(sentence) <= width():
        return f"{first}  {sentence}"
    parts = [wrapped(part, "    ") for part in (said, sentence) if part]
    return "\n".join([textwrap.fill(first, width(), break_long_words=False), *parts])
