"""What merging did: which layers became one, where, and what that saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bntools.report.decisions import Reason
from bntools.report.schema import as_json

__all__ = ["Merge", "MergeReport", "Size"]


@dataclass(frozen=True)
class Size:
    """The size of a model: its convolutions and linear layers as called in one forward.

    `flops` are two for each multiplication of a weight, at the recorded input; `parameters` are all
    of the model's.
    """

    convolutions: int
    linear: int
    parameters: int
    flops: int


@dataclass(frozen=True)
class Merge:
    """One merge, or with a `reason` what was not merged and why.

    `path` is the module in which the layers meet, `layers` the paths of what became one layer,
    norms included, `into` the path of that layer; `rewritten` is the path of the module whose
    forward was rewritten, None where none was.
    """

    path: str
    kind: str
    layers: tuple[str, ...]
    into: str = ""
    rewritten: str | None = None
    reason: Reason | None = None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The merge as JSON data."""
        return dict(as_json(self))


@dataclass(frozen=True)
class MergeReport:
    """All merges, what was left and why, and the size of the model before and after."""

    merges: tuple[Merge, ...] = ()
    left: tuple[Merge, ...] = ()
    before: Size | None = None
    after: Size | None = None

    def summary(self) -> str:
        """One line."""
        if not self.merges:
            return "nothing merged"
        count = sum(len(merge.layers) for merge in self.merges)
        return f"merged {count} layers into {len(self.merges)}"

    def to_dict(self) -> dict[str, Any]:
        """The merges as JSON data."""
        return {"summary": self.summary(), **as_json(self)}

    def saved(self) -> str:
        """How the size of the model changed, in words."""
        if self.before is None or self.after is None:
            return ""
        names = {
            "convolutions": "convolutions",
            "linear": "linear layers",
            "parameters": "parameters",
            "flops": "FLOPs",
        }
        pairs = (
            (what, getattr(self.before, n), getattr(self.after, n)) for n, what in names.items()
        )
        return ", ".join(_change(what, *sizes) for what, *sizes in pairs if any(sizes))


def _change(what: str, before: int, after: int) -> str:
    if before == after:
        return f"{what} {before:,}"
    share = f" ({100 * (after - before) / before:+.1f} %)" if before else ""
    return f"{what} {before:,} -> {after:,}{share}"
