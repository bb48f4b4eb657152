"""What freezing, unfreezing and converting norm layers did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bntools import tables
from bntools.report.decisions import Action, Decision
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["FreezeReport"]

_DONE = {"freeze": "froze", "unfreeze": "unfroze", "unsync": "converted"}


@dataclass(frozen=True)
class FreezeReport:
    """One decision for every layer with running statistics, in the order of the model's modules.

    `verb` is "freeze", "unfreeze" or "unsync"; `form` is what frozen layers were made, "bntools" or
    "torchvision"; `affine` says whether gradients of weight and bias were stopped, too.
    """

    verb: str
    decisions: tuple[Decision, ...]
    form: str = "bntools"
    affine: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def changed(self) -> tuple[Decision, ...]:
        """The layers that were changed."""
        return tuple(d for d in self.decisions if d.action is not Action.KEEP)

    @property
    def kept(self) -> tuple[Decision, ...]:
        """The layers that were left alone, each with its reason."""
        return tuple(d for d in self.decisions if d.action is Action.KEEP)

    def summary(self) -> str:
        """The last line that the command line prints."""
        if not self.decisions:
            kind = "SyncBatchNorm" if self.verb == "unsync" else "norm"
            return f"the model has no {kind} layer to {self.verb}"
        unchanged = "" if self.changed else "; the model is unchanged"
        count = f"{len(self.changed)} of {len(self.decisions)} norm layers"
        return f"{_DONE[self.verb]} {count}{unchanged}"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        return tables.text(tables.decisions(self.decisions), *self.warnings, self.summary())
