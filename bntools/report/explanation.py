"""The way from a norm layer to what absorbs it, or to what stands in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bntools import tables
from bntools.report.decisions import Action, Decision, Reason
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["Explanation", "Step", "Way"]


@dataclass(frozen=True)
class Step:
    """One operation on the way: its name, the path of the module that ran it, and what held there.

    `role` is "passes", "absorbs", "is reached" (a linear layer that does not absorb) or "stops".
    """

    operation: str
    module: str
    role: str
    says: str


@dataclass(frozen=True)
class Way:
    """What was found in one direction ("backward" or "forward"), from the norm on.

    Where the layer folds that way `reason` is None; else `reason` and `detail` say why not.
    """

    direction: str
    steps: tuple[Step, ...]
    reason: Reason | None = None
    detail: str = ""


@dataclass(frozen=True)
class Explanation:
    """Why a norm layer folds where it does, or stays: its decision, and the ways that were tried.

    A plan that was read from elsewhere has no ways; the decision's own sentences are then all.
    """

    decision: Decision
    ways: tuple[Way, ...] = ()
    calls: int = 1

    def summary(self) -> str:
        """One line: what happens to the layer."""
        decision = self.decision
        name = decision.path or "the model itself"
        if decision.action is Action.FOLD:
            direction = "forward" if decision.forward else "backward"
            return f"{name} folds {direction} into {', '.join(decision.hosts) or 'what is there'}"
        reason = decision.reason.value if decision.reason is not None else "no reason"
        return f"{name} is kept: {reason}"

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        return tables.explanation(self)
