"""Reports as text: tables as wide as the terminal, and 100 columns where there is none."""

from __future__ import annotations

import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import StringIO
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from bntools.report import Decision, Finding, LayerHealth, OutputError, Range

__all__ = ["WIDTH", "decisions", "findings", "layers", "outputs", "plain", "text"]

WIDTH = 100
_NARROWEST = 40
_LEAST = 28
_GAP = 2
_ALIKE = 5
_SHORT = 10
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


def decisions(rows: Sequence[Decision]) -> str:
    """Every norm layer in execution order with its host, or the reason why it is kept."""
    if not rows:
        return ""
    head = ["norm layer", "kind", "outcome"]
    cells = [[_named(row.path), plain(row.kind), _outcome(row)] for row in rows]
    kinds = {row[1] for row in cells}
    if len(kinds) > 1 or len(rows) == 1 or _fits(head, cells, wrapping=False):
        return text(_table(head, cells), _tally(rows))
    table = _table([head[0], head[2]], [[row[0], row[2]] for row in cells])
    return text(table, text(_told({"kind": kinds.pop()}), _tally(rows)))


def layers(rows: Sequence[LayerHealth]) -> str:
    """Every norm layer with its statistics, and where it would fold or why not."""
    if not rows:
        return ""
    shared, columns = _split(rows, _HEALTH)
    head = ["norm layer", *columns, "outcome"]
    cells = [
        [_named(row.path), *(tell(row) for tell in columns.values()), _future(row)] for row in rows
    ]
    tally = _tally([row.decision for row in rows if row.decision is not None])
    health = [row[:-1] for row in cells]
    if not columns or _fits(head, cells) or not _fits(head[:-1], health):
        return text(_table(head, cells), text(_told(shared), tally))
    future = _table([head[0], head[-1]], [[row[0], row[-1]] for row in cells])
    return text(_grid(head[:-1], health), _told(shared), future, tally)


def findings(rows: Sequence[Finding]) -> str:
    """The findings, the worst first; many of one kind take few lines."""
    if not rows:
        return ""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for row in rows:
        groups.setdefault((row.severity.value, row.code), []).append(row)
    cells = [cell for group in groups.values() for cell in _group(group)]
    return _table(["finding", "layer", "what"], cells, title=2)


def outputs(rows: Sequence[OutputError]) -> str:
    """Every output with its error beside the original's own, and the limit."""
    if not rows:
        return ""
    head = ["output", "error", "original's", "limit", "largest gap", "verdict"]
    return _table(
        head,
        [
            [
                plain(row.name),
                *(f"{x:.2g}" for x in (row.error, row.reference_error, row.limit, row.max_abs)),
                "same" if row.passed else f"DIFFERS {plain(row.note)}".rstrip(),
            ]
            for row in rows
        ],
    )


def plain(value: str) -> str:
    """A text in which nothing steers a terminal: names come from files that others wrote."""
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


# ---- cells ---------------------------------------------------------------------------------------


def _named(path: str) -> str:
    return plain(path) or "(the model)"


def _outcome(decision: Decision) -> str:
    detail = plain(decision.detail)
    if decision.reason is None:
        hosts = ", ".join(map(_named, decision.hosts))
        return f"-> {hosts} ({detail})" if detail else f"-> {hosts}"
    kept = f"kept, {decision.reason.value}"
    return f"{kept}: {detail}" if detail else kept


def _future(layer: LayerHealth) -> str:
    if layer.decision is not None:
        return _outcome(layer.decision)
    return "depends on the input: not counted" if layer.input_dependent else "not planned"


def _range(values: Range | None) -> str:
    if values is None:
        return "-"
    if values.low == values.high:
        return f"{values.low:.2g}"
    return f"{values.low:.2g}..{values.high:.2g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.10g}"


_HEALTH: dict[str, Callable[[LayerHealth], str]] = {
    "kind": lambda x: plain(x.kind) + (" (frozen)" if x.frozen and "Frozen" not in x.kind else ""),
    "eps": lambda x: _number(x.eps),
    "momentum": lambda x: _number(x.momentum),
    "batches": lambda x: _number(x.batches_tracked),
    "channels": lambda x: _number(x.channels),
    "mean": lambda x: _range(x.mean),
    "variance": lambda x: _range(x.variance),
    "gamma": lambda x: _range(x.gamma),
}


def _split(
    rows: Sequence[LayerHealth], facts: dict[str, Callable[[LayerHealth], str]]
) -> tuple[dict[str, str], dict[str, Callable[[LayerHealth], str]]]:
    """The facts that all rows share, which are told once, and those that take a column."""
    values = {name: {tell(row) for row in rows} for name, tell in facts.items()}
    shared = {name: found.pop() for name, found in values.items() if len(found) == 1 < len(rows)}
    return shared, {name: tell for name, tell in facts.items() if name not in shared}


def _told(shared: dict[str, str]) -> str:
    facts = _facts(shared.items())
    return _wrapped(f"all of them: {facts}") if facts else ""


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    """Names with their values, which a line break does not part."""
    told = (v if name == "kind" else f"{name}{_TIE}{v}" for name, v in facts if v not in ("", "-"))
    return ", ".join(told)


def _tally(decided: Sequence[Decision]) -> str:
    """How many layers are kept for each reason: in a long table they are far apart."""
    reasons = Counter(d.reason.value for d in decided if d.reason is not None)
    if len(decided) <= _SHORT or not reasons:
        return ""
    counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    return _wrapped(f"kept {reasons.total()} of {len(decided)}: {counts}")


def _group(alike: Sequence[Finding]) -> Iterator[list[str]]:
    """Rows for findings of one code: each, or where they are many, an example and some names."""
    first = alike[0]
    severity, says = first.severity.value, f"{first.code}: {plain(first.message)}"
    if len(alike) <= _ALIKE:
        for row in alike:
            yield [severity, _named(row.path), f"{row.code}: {plain(row.message)}"]
    elif len({row.message for row in alike}) == 1:
        yield [severity, f"{len(alike)} layers", f"{says} ({_some(alike)})"]
    else:
        yield [severity, _named(first.path), says]
        others = alike[1:]
        yield [severity, f"{len(others)} more", f"{first.code}, of their own: {_some(others)}"]


def _some(rows: Sequence[Finding]) -> str:
    names = ", ".join(_named(row.path) for row in rows[:_ALIKE])
    return f"{names}, ..." if len(rows) > _ALIKE else names


# ---- layout --------------------------------------------------------------------------------------


def _width() -> int:
    """What COLUMNS says, or the columns of the terminal."""
    asked = os.environ.get("COLUMNS", "")
    columns = int(asked) if asked.isdecimal() else 0
    if not columns and sys.stdout is not None and sys.stdout.isatty():
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    return max(columns, _NARROWEST) if columns else WIDTH


def _wrapped(value: str, indent: str = "") -> str:
    filled = textwrap.fill(
        value,
        _width(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    return filled.replace(_TIE, " ")


def _fits(head: Sequence[str], rows: Rows, *, wrapping: bool = True) -> bool:
    """Whether a line has room for all cells, with a sentence in the last column wrapped or not."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    if wrapping and head[-1] in _SENTENCES:
        widths[-1] = min(widths[-1], _LEAST)
    return sum(widths) + _GAP * len(widths[1:]) <= _width()


def _table(head: Sequence[str], rows: Rows, *, title: int = 1) -> str:
    """A table, or where the columns have no room, a block of lines for every row.

    The first `title` cells are the first line of a block.
    """
    if _fits(head, rows):
        return _grid(head, rows)
    return "\n".join(_block(head, row, title) for row in rows)


def _grid(head: Sequence[str], rows: Rows) -> str:
    rule = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    table = Table(box=rule, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in head[:-1]:
        table.add_column(Text(name), no_wrap=True)
    table.add_column(Text(head[-1]), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    stream = StringIO()
    # Plain text wherever it is asked for, also in a notebook: it may go to a file.
    console = Console(
        file=stream, width=_width(), color_system=None, force_terminal=False, force_jupyter=False
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _block(head: Sequence[str], row: Sequence[str], title: int) -> str:
    cells = list(zip(head, row, strict=True))[title:]
    sentence = " ".join(value for name, value in cells if name in _SENTENCES)
    facts = _facts((name, value) for name, value in cells if name not in _SENTENCES)
    first = "  ".join(row[:title])
    if not facts and len(first) + _GAP + len(sentence) <= _width():
        return f"{first}  {sentence}"
    parts = [_wrapped(part, "    ") for part in (facts, sentence) if part]
    return "\n".join([textwrap.fill(first, _width(), break_long_words=False), *parts])
