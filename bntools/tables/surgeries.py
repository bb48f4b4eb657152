"""What became of norm layers and of their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bntools.tables.layout import named, number, plain, span, table

if TYPE_CHECKING:
    from bntools.report import BlockDistillation, LayerDrift, LayerFit, Replacement

__all__ = ["blocks", "drift", "fits", "replacements", "steps"]


def replacements(rows: Sequence[Replacement]) -> str:
    """Every norm layer in execution order with what it became, or the reason why it is kept."""
    if not rows:
        return ""
    head = ["norm layer", "kind", "outcome"]
    return table(head, [[named(row.path), plain(row.kind), _became(row)] for row in rows])


def _became(row: Replacement) -> str:
    if row.reason is not None:
        return f"kept, {row.reason.value}: {plain(row.detail)}"
    taken = f" with {row.activation}" if row.activation else ""
    note = f"; {row.note}" if row.note else ""
    return plain(f"-> {row.becomes}{taken}{note}")


def drift(rows: Sequence[LayerDrift]) -> str:
    """Every norm layer with its statistics before and after, and the divergence of its channels."""
    if not rows:
        return ""
    head = ["norm layer", "mean", "-> mean", "variance", "-> variance", "median KL", "max KL"]
    return table(
        head,
        [
            [
                named(row.path),
                *(span(s) for s in (row.mean_before, row.mean_after)),
                *(span(s) for s in (row.variance_before, row.variance_after)),
                *(f"{x:.2g}" for x in (row.kl_median, row.kl_max)),
            ]
            for row in rows
        ],
    )


def fits(rows: Sequence[LayerFit]) -> str:
    """Every new norm layer with its fit error, beside that of the affine that was carried over."""
    if not rows:
        return ""
    head = ["norm layer", "kind", "groups", "fit error", "carried over", "values"]
    return table(
        head,
        [
            [
                named(row.path),
                plain(row.kind),
                number(row.groups),
                f"{row.error:.2g}",
                "-" if row.carried_error is None else f"{row.carried_error:.2g}",
                str(row.elements),
            ]
            for row in rows
        ],
    )


def blocks(rows: Sequence[BlockDistillation]) -> str:
    """Every block that was tuned, with the error of its output before and after."""
    if not rows:
        return ""
    head = ["block", "norm layers", "error before", "after"]
    return table(
        head,
        [
            [named(row.path), str(len(row.layers)), f"{row.before:.2g}", f"{row.after:.2g}"]
            for row in rows
        ],
    )


def steps(rows: Sequence[tuple[str, str]]) -> str:
    """The steps of a whole way with what each says about itself."""
    return table(["step", "outcome"], [[name, plain(said)] for name, said in rows])
