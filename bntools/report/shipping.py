"""What a shipment answers: every step, every proof, and what is in the folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from bntools import tables
from bntools.report.diagnosis import Inspection
from bntools.report.exporting import ExportReport
from bntools.report.judgement import Equivalence
from bntools.report.plans import Report
from bntools.report.recalibration import RecalibrationReport
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["ShipReport", "ShipStep", "Shipped"]


class ShipStep(str, Enum):
    """The steps of a shipment, in their order."""

    INSPECT = "inspect"
    RECALIBRATE = "recalibrate"
    FOLD = "fold"
    EXPORT = "export"
    VERIFY = "verify"


@dataclass(frozen=True)
class Shipped:
    """A file of the folder: its name, its size in bytes, and its SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ShipReport:
    """The certificate of a shipment; falsy where a step failed its check.

    `folder` is where everything is, or None where a step `failed` and nothing was written.
    `inspection` is of the model as it came, `recalibration` None without data. `checks` judges the
    ONNX file against the original (recalibrated, before the fold) on each provider there is;
    `unavailable` has the others, with what they lack. `files` are those of the folder but for the
    certificate itself and the page. `seconds` is the time by step.
    """

    source: str
    folder: str | None
    inspection: Inspection
    recalibration: RecalibrationReport | None = None
    fold: Report | None = None
    export: ExportReport | None = None
    checks: tuple[Equivalence, ...] = ()
    unavailable: dict[str, str] = field(default_factory=dict)
    failed: ShipStep | None = None
    files: tuple[Shipped, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.failed is None

    @property
    def steps(self) -> dict[ShipStep, str]:
        """What each step that was taken says about itself."""
        done = {
            ShipStep.INSPECT: self.inspection.summary(),
            ShipStep.RECALIBRATE: self.recalibration and self.recalibration.summary(),
            ShipStep.FOLD: self.fold and self.fold.summary(),
            ShipStep.EXPORT: self.export and self.export.summary(),
            ShipStep.VERIFY: "; ".join(_judged(check) for check in self.checks),
        }
        return {step: said for step, said in done.items() if said}

    def summary(self) -> str:
        """The last line that the command line prints."""
        if self.failed is not None:
            return f"not shipped: {self.failed.value} failed: {self.steps.get(self.failed, '')}"
        where = ", ".join(check.placement.provider for check in self.checks if check.placement)
        size = sum(file.size for file in self.files)
        return f"shipped {len(self.files)} files, {size:,} bytes; verified on {where}"

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON data."""
        return {
            "schema": SCHEMA_VERSION,
            "verb": "ship",
            "summary": self.summary(),
            "shipped": bool(self),
            **as_json(self),
        }

    def __str__(self) -> str:
        rows = [(step.value, said) for step, said in self.steps.items()]
        missing = [f"not verified on {name}: {why}" for name, why in self.unavailable.items()]
        return tables.text(
            tables.steps(rows), tables.findings(self.inspection.errors), *missing, self.summary()
        )


def _judged(check: Equivalence) -> str:
    where = check.placement.provider if check.placement is not None else "torch"
    return f"{where}: {'equivalent' if check else 'NOT equivalent'}, {check.summary()}"
