"""How far a candidate is from its reference, by output and by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bntools.tables.layout import named, plain, table, wrapped

if TYPE_CHECKING:
    from bntools.report import LayerError, NotCompared, OutputError

__all__ = ["depth", "not_compared", "outputs"]


def outputs(rows: Sequence[OutputError]) -> str:
    """Every output with its error beside the original's own, and the limit."""
    if not rows:
        return ""
    tellers = {name: tell for name, tell in _OUTPUT.items() if any(map(tell, rows))}
    head = ["output", *tellers, "verdict"]
    return table(
        head,
        [
            [
                plain(row.name),
                *(tell(row) for tell in tellers.values()),
                "same" if row.passed else f"DIFFERS {plain(row.note)}".rstrip(),
            ]
            for row in rows
        ],
    )


_OUTPUT: dict[str, Callable[[OutputError], str]] = {
    "error": lambda x: f"{x.error:.2g}",
    "original's": lambda x: f"{x.reference_error:.2g}",
    "limit": lambda x: f"{x.limit:.2g}",
    "largest gap": lambda x: f"{x.max_abs:.2g}",
    "of scale": lambda x: "" if x.max_scaled is None else f"{x.max_scaled:.2g}",
    "cosine": lambda x: "" if x.cosine is None else f"{x.cosine:.6f}",
    "top-1": lambda x: "" if x.top1 is None else f"{x.top1:.2%}".replace(".00%", "%"),
}


def depth(rows: Sequence[LayerError]) -> str:
    """Every layer in execution order with its error beside the reference's own, and the limit."""
    if not rows:
        return ""
    head = ["layer", "at", "error", "original's", "limit", "verdict"]
    return table(head, [_layer_cells(row) for row in rows])


def _layer_cells(row: LayerError) -> list[str]:
    numbers = (f"{x:.2g}" for x in (row.error, row.reference_error, row.limit))
    verdict = "same" if row.agrees else f"DIFFERS {plain(row.note)}".rstrip()
    return [plain(row.title), row.where or "all", *numbers, verdict]


def not_compared(rows: Sequence[NotCompared]) -> str:
    """The layers that were not compared, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reasons.setdefault(plain(row.why), []).append(named(row.path))
    return "\n".join(
        wrapped(f"not compared, {why}: {', '.join(paths)}") for why, paths in reasons.items()
    )
