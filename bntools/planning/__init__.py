"""From a model to a plan: one decision for every norm layer, and what its fold would do."""

from bntools.planning.compiling import (
    Compiled,
    Patterns,
    compiled_for,
    compiled_of,
    plan_fold,
    plan_observed,
    replan,
)
from bntools.planning.folds import Absorption, HostFold, NormFold, Outcome, absorptions
from bntools.planning.options import FoldOptions, PlanOptions
from bntools.planning.scripts import is_scripted

__all__ = [
    "Absorption",
    "Compiled",
    "FoldOptions",
    "HostFold",
    "NormFold",
    "Outcome",
    "Patterns",
    "PlanOptions",
    "absorptions",
    "compiled_for",
    "compiled_of",
    "is_scripted",
    "plan_fold",
    "plan_observed",
    "replan",
]
