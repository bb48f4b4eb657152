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
from bntools.planning.folds import HostFold, NormFold, Outcome

__all__ = [
    "Compiled",
    "HostFold",
    "NormFold",
    "Outcome",
    "Patterns",
    "compiled_for",
    "compiled_of",
    "plan_fold",
    "plan_observed",
    "replan",
]
