"""Norm layers: their health, what happens to them, and what the doctor found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from bntools.tables.layout import (
    grid,
    has_room,
    named,
    number,
    plain,
    span,
    table,
    text,
    told,
    wrapped,
)

if TYPE_CHECKING:
    from bntools.report import Decision, Finding, LayerHealth

__all__ = ["decisions", "findings", "layers"]

_ALIKE = 5


_SHORT = 10


def decisions(rows: Sequence[Decision]) -> str:
    """Every norm layer in execution order with its host, or the reason why it is kept."""
    if not rows:
        return ""
    head = ["norm layer", "kind", "outcome"]
    cells = [[named(row.path), plain(row.kind), _outcome(row)] for row in rows]
    kinds = {row[1] for row in cells}
    if len(kinds) > 1 or len(rows) == 1 or has_room(head, cells, wrapping=False):
        return text(table(head, cells), _tally(rows))
    shown = table([head[0], head[2]], [[row[0], row[2]] for row in cells])
    return text(shown, text(told({"kind": kinds.pop()}), _tally(rows)))


def layers(rows: Sequence[LayerHealth]) -> str:
    """Every norm layer with its statistics, and where it would fold or why not."""
    if not rows:
        return ""
    shared, columns = _split(rows, _HEALTH)
    head = ["norm layer", *columns, "outcome"]
    cells = [
        [named(row.path), *(tell(row) for tell in columns.values()), _future(row)] for row in rows
    ]
    tally = _tally([row.decision for row in rows if row.decision is not None])
    health = [row[:-1] for row in cells]
    if not columns or has_room(head, cells) or not has_room(head[:-1], health):
        return text(table(head, cells), text(told(shared), tally))
    future = table([head[0], head[-1]], [[row[0], row[-1]] for row in cells])
    return text(grid(head[:-1], health), told(shared), future, tally)


def findings(rows: Sequence[Finding]) -> str:
    """The findings, the worst first; many of one kind take few lines."""
    if not rows:
        return ""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for row in rows:
        groups.setdefault((row.severity.value, row.code), []).append(row)
    cells = [cell for group in groups.values() for cell in _group(group)]
    return table(["finding", "layer", "what"], cells, title=2)


def _outcome(decision: Decision) -> str:
    detail = plain(decision.detail)
    if decision.reason is None and not decision.hosts:
        return f"-> {detail}"
    if decision.reason is None:
        hosts = ", ".join(map(named, decision.hosts))
        return f"-> {hosts} ({detail})" if detail else f"-> {hosts}"
    kept = f"kept, {decision.reason.value}"
    told = f"{kept}: {detail}" if detail else kept
    onward = decision.forward_reason
    if onward is None or onward.value == "not-before-linear":  # true of nearly all, and no news
        return told
    return f"{told}; forward, {onward.value}: {plain(decision.forward_detail)}"


def _future(layer: LayerHealth) -> str:
    if layer.decision is not None:
        return _outcome(layer.decision)
    return "depends on the input: not counted" if layer.input_dependent else "not planned"


_HEALTH: dict[str, Callable[[LayerHealth], str]] = {
    "kind": lambda x: plain(x.kind) + (" (frozen)" if x.frozen and "Frozen" not in x.kind else ""),
    "eps": lambda x: number(x.eps),
    "momentum": lambda x: number(x.momentum),
    "batches": lambda x: number(x.batches_tracked),
    "channels": lambda x: number(x.channels),
    "mean": lambda x: span(x.mean),
    "variance": lambda x: span(x.variance),
    "gamma": lambda x: span(x.gamma),
}


def _split(
    rows: Sequence[LayerHealth], facts: dict[str, Callable[[LayerHealth], str]]
) -> tuple[dict[str, str], dict[str, Callable[[LayerHealth], str]]]:
    """The facts that all rows share, which are told once, and those that take a column."""
    values = {name: {tell(row) for row in rows} for name, tell in facts.items()}
    shared = {name: found.pop() for name, found in values.items() if len(found) == 1 < len(rows)}
    return shared, {name: tell for name, tell in facts.items() if name not in shared}


def _tally(decided: Sequence[Decision]) -> str:
    """How many layers are kept for each reason: in a long table they are far apart."""
    reasons = Counter(d.reason.value for d in decided if d.reason is not None)
    if len(decided) <= _SHORT or not reasons:
        return ""
    counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    return wrapped(f"kept {reasons.total()} of {len(decided)}: {counts}")


def _group(alike: Sequence[Finding]) -> Iterator[list[str]]:
    """Rows for findings of one code: each, or where they are many, an example and some names."""
    first = alike[0]
    severity, says = first.severity.value, f"{first.code}: {plain(first.message)}"
    if len(alike) <= _ALIKE:
        for row in alike:
            yield [severity, named(row.path), f"{row.code}: {plain(row.message)}"]
    elif len({row.message for row in alike}) == 1:
        yield [severity, f"{len(alike)} layers", f"{says} ({_some(alike)})"]
    else:
        yield [severity, named(first.path), says]
        others = alike[1:]
        yield [severity, f"{len(others)} more", f"{first.code}, of their own: {_some(others)}"]


def _some(rows: Sequence[Finding]) -> str:
    names = ", ".join(named(row.path) for row in rows[:_ALIKE])
    return f"{names}, ..." if len(rows) > _ALIKE else names
