"""What an unfold brought back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bntools import tables
from bntools.report.decisions import Decision
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["UnfoldReport"]


@dataclass(frozen=True)
class UnfoldReport:
    """Every layer that came back, in the order of the model's modules, to the bit.

    `tensors` names the weights and biases that have their old values again; `removed` the biases
    that the fold had added; `originals_bytes` is what was kept for all of that.
    """

    decisions: tuple[Decision, ...]
    tensors: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    originals_bytes: int = 0
    verb: str = "unfold"

    def summary(self) -> str:
        """The last line that the command line prints."""
        added = f", removed {len(self.removed)} added biases" if self.removed else ""
        return (
            f"brought back {len(self.decisions)} layers and {len(self.tensors)} tensors{added}"
            f" ({self.originals_bytes / 2**20:.1f} MiB were kept)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        return tables.text(tables.decisions(self.decisions), self.summary())
