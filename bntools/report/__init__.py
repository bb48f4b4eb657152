"""What bntools answers: plans, decisions, certificates. Plain frozen data, without torch."""

from __future__ import annotations

from bntools.report.depth import DepthReport, LayerError, NotCompared
from bntools.report.diagnosis import Finding, Inspection, LayerHealth, Range, Severity
from bntools.report.difference import Difference, Uncompared
from bntools.report.drift import LayerDrift, Spread
from bntools.report.exporting import ExportReport
from bntools.report.fit import (
    Agreement,
    BlockDistillation,
    DistillReport,
    FitProgress,
    FitReport,
    LayerFit,
)
from bntools.report.freezing import FreezeReport
from bntools.report.judgement import Check, Equivalence, OutputError, SliceError
from bntools.report.placement import Placement
from bntools.report.plans import Action, Decision, Plan, Reason, Report, Result
from bntools.report.recalibration import (
    Comparison,
    LayerStatistics,
    LeftAlone,
    PassSummary,
    PriorScore,
    Progress,
    RecalibrationReport,
)
from bntools.report.replacement import Replacement, ReplacementReport
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = [
    "SCHEMA_VERSION",
    "Action",
    "Agreement",
    "BlockDistillation",
    "Check",
    "Comparison",
    "Decision",
    "DepthReport",
    "Difference",
    "DistillReport",
    "Equivalence",
    "ExportReport",
    "Finding",
    "FitProgress",
    "FitReport",
    "FreezeReport",
    "Inspection",
    "LayerDrift",
    "LayerError",
    "LayerFit",
    "LayerHealth",
    "LayerStatistics",
    "LeftAlone",
    "NotCompared",
    "OutputError",
    "PassSummary",
    "Placement",
    "Plan",
    "PriorScore",
    "Progress",
    "Range",
    "Reason",
    "RecalibrationReport",
    "Replacement",
    "ReplacementReport",
    "Report",
    "Result",
    "Severity",
    "SliceError",
    "Spread",
    "Uncompared",
    "as_json",
]
