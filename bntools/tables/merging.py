"""What merging did, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bntools.tables.layout import named, plain, table

if TYPE_CHECKING:
    from bntools.report.merging import Merge, MergeReport

__all__ = ["merges"]


def merges(report: MergeReport | None) -> str:
    """Every merge with what became one layer, and what could not merge; then the sizes."""
    if report is None:
        return ""
    rows = [[named(row.into), _of(row), _outcome(row)] for row in report.merges]
    rows += [[named(row.path or "the model"), _of(row), _outcome(row)] for row in report.left]
    shown = table(["into", "merged", "outcome"], rows) if rows else ""
    return "\n\n".join(filter(None, (shown, report.saved() if report.merges else "")))


def _of(row: Merge) -> str:
    return plain(", ".join(_relative(path, row.path) for path in row.layers))


def _relative(path: str, parent: str) -> str:
    return path.removeprefix(f"{parent}.") if parent else path


def _outcome(row: Merge) -> str:
    if row.reason is not None:
        return f"left, {row.reason.value}: {plain(row.detail)}"
    if row.rewritten is None:
        return "merged"
    return f"merged, rewriting {plain(row.rewritten) or 'the model'}"
