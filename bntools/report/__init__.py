"""What bntools answers: plans, decisions, certificates. Plain frozen data, without torch."""

from __future__ import annotations

from bntools.report.diagnosis import Finding, Inspection, LayerHealth, Range, Severity
from bntools.report.judgement import Check, Equivalence, OutputError
from bntools.report.plans import Action, Decision, Plan, Reason, Report, Result
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = [
    "SCHEMA_VERSION",
    "Action",
    "Check",
    "Decision",
    "Equivalence",
    "Finding",
    "Inspection",
    "LayerHealth",
    "OutputError",
    "Plan",
    "Range",
    "Reason",
    "Report",
    "Result",
    "Severity",
    "as_json",
]
