"""What an export answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bntools import tables
from bntools.report.judgement import Equivalence
from bntools.report.placement import Placement
from bntools.report.plans import Report
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["ExportReport"]


@dataclass(frozen=True)
class ExportReport:
    """The certificate of an export: what is in the file, and the proof; falsy where it failed.

    `path` is the file, or None where the check failed and none was written; `data` its external
    data, where it has any; `bytes` is the size of both. `checks` judges what ONNX Runtime computes
    at each batch size that was tried, against the original model; `fold` is the certificate of the
    fold, None where none was asked for; `example` describes the input. `seconds`
    is the time by step.
    """

    path: str | None
    data: str | None
    bytes: int
    dtype: str
    opset: int
    dynamic_batch: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: dict[str, int]
    checks: tuple[Equivalence, ...]
    placement: Placement
    fold: Report | None = None
    example: str = ""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.checks) and all(self.checks)

    @property
    def worst(self) -> Equivalence:
        """The check that comes nearest to its limit, or exceeds it most."""

        def nearness(check: Equivalence) -> tuple[bool, float]:
            worst = check.worst
            if worst is None:
                return True, 0.0
            return not check, worst.error / worst.limit if worst.limit else 0.0

        return max(self.checks, key=nearness)

    def summary(self) -> str:
        """The last line that the command line prints."""
        nodes = sum(self.operators.values())
        batch = "any batch size" if self.dynamic_batch else "a fixed batch size"
        line = f"{nodes} nodes, opset {self.opset}, {batch}; {self._folded()}"
        verdict = "" if self else "NOT equivalent: "
        return f"{line}; {verdict}{self.worst.summary()}"

    def _folded(self) -> str:
        kept = self.operators.get("BatchNormalization", 0)
        left = f"{kept} BatchNormalization node{'' if kept == 1 else 's'}"
        if self.fold is None or not self.fold.decisions:
            return left
        return f"folded {self.fold.counted()}"

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON data."""
        return {
            "schema": SCHEMA_VERSION,
            "verb": "export",
            "summary": self.summary(),
            "equivalent": bool(self),
            **as_json(self),
        }

    def __str__(self) -> str:
        decisions = tables.decisions(self.fold.decisions) if self.fold is not None else ""
        worst = tables.outputs(self.worst.outputs)
        return tables.text(decisions, worst, *self.warnings, *self.notes, self.summary())
