"""What the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from bntools import tables
from bntools.report.decisions import Decision
from bntools.report.explanation import Explanation
from bntools.report.plans import Plan
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["Finding", "Inspection", "LayerHealth", "Range", "Severity"]


class Severity(str, Enum):
    """How bad a finding is."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Range:
    """The smallest and the largest of the finite values of a tensor."""

    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """Something that the doctor noticed about a layer: a stable code, and a sentence."""

    path: str
    severity: Severity
    code: str
    message: str


@dataclass(frozen=True)
class LayerHealth:
    """One norm layer as the doctor sees it; None where a layer has no such thing.

    An `affine` is no norm layer, but arithmetic with constants; `gamma` is its scale.
    """

    path: str
    kind: str
    channels: int | None = None
    eps: float | None = None
    momentum: float | None = None
    batches_tracked: int | None = None
    mean: Range | None = None
    variance: Range | None = None
    gamma: Range | None = None
    frozen: bool = False
    decision: Decision | None = None
    input_dependent: bool = False
    affine: bool = False


@dataclass(frozen=True)
class Inspection:
    """Every norm layer, its health, and where it would fold or why not.

    Layers with `input_dependent` set (LayerNorm, GroupNorm and the like) are listed, but do not
    count in "n of m".
    """

    layers: tuple[LayerHealth, ...]
    findings: tuple[Finding, ...] = ()
    inputs: str = ""
    warnings: tuple[str, ...] = ()
    plan: Plan | None = field(default=None, repr=False, compare=False)

    def explain(self, path: str) -> Explanation:
        """The way from a norm layer to what absorbs it, or to what stops it: `Plan.explain`.

        Raises `PlanError` where no plan has the layer.
        """
        decided = (layer.decision for layer in self.layers)
        plan = self.plan or Plan(tuple(d for d in decided if d is not None))
        return plan.explain(path)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that make the model wrong."""
        return tuple(f for f in self.findings if f.severity is Severity.ERROR)

    def worst(self) -> Severity | None:
        """The highest severity found, or None for a healthy model."""
        order = list(Severity)
        return max((f.severity for f in self.findings), key=order.index, default=None)

    def summary(self) -> str:
        """The last line that the command line prints."""
        counts = [sum(f.severity is s for f in self.findings) for s in reversed(Severity)]
        nouns = zip(counts, ("error", "warning", "note"), strict=True)
        found = ", ".join(f"{n} {noun}{'' if n == 1 else 's'}" for n, noun in nouns)
        return f"{self._folds()}; {found}"

    def _folds(self) -> str:
        counted = [layer for layer in self.layers if not layer.input_dependent]
        decided = [layer.decision for layer in counted if layer.decision is not None]
        if decided:
            return Plan(tuple(decided)).summary()
        if counted:
            return f"{len(counted)} norm layer{'s' * (len(counted) > 1)}, health only"
        return "the model has no norm layer to fold"

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        return tables.text(
            tables.layers(self.layers),
            tables.findings(self.findings),
            *self.warnings,
            self.summary(),
        )
