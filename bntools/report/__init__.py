"""What bntools answers: plans, decisions, certificates. Plain frozen data, without torch."""

from __future__ import annotations

from bntools.report.conversion import ConversionReport, ConvertedNorm
from bntools.report.decisions import Action, Decision, Reason
from bntools.report.depth import DepthReport, LayerError, NotCompared
from bntools.report.diagnosis import Finding, Inspection, LayerHealth, Range, Severity
from bntools.report.difference import Difference, Uncompared
from bntools.report.drift import LayerDrift, Spread
from bntools.report.explanation import Explanation, Step, Way
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
from bntools.report.latency import Latency
from bntools.report.merging import Merge, MergeReport, Size
from bntools.report.placement import Placement
from bntools.report.plans import Plan, Report, Result
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
from bntools.report.shipping import Shipped, ShipReport, ShipStep
from bntools.report.unfolding import UnfoldReport

__all__ = [
    "SCHEMA_VERSION",
    "Action",
    "Agreement",
    "BlockDistillation",
    "Check",
    "Comparison",
    "ConversionReport",
    "ConvertedNorm",
    "Decision",
    "DepthReport",
    "Difference",
    "DistillReport",
    "Equivalence",
    "Explanation",
    "ExportReport",
    "Finding",
    "FitProgress",
    "FitReport",
    "FreezeReport",
    "Inspection",
    "Latency",
    "LayerDrift",
    "LayerError",
    "LayerFit",
    "LayerHealth",
    "LayerStatistics",
    "LeftAlone",
    "Merge",
    "MergeReport",
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
    "ShipReport",
    "ShipStep",
    "Shipped",
    "Size",
    "SliceError",
    "Spread",
    "Step",
    "Uncompared",
    "UnfoldReport",
    "Way",
    "as_json",
]
