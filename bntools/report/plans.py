"""What a plan decides, and what a surgery returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from bntools import tables
from bntools.errors import PlanError
from bntools.report.decisions import Action, Decision, Reason
from bntools.report.explanation import Explanation
from bntools.report.judgement import Check
from bntools.report.latency import Latency
from bntools.report.schema import SCHEMA_VERSION, as_json

if TYPE_CHECKING:
    from bntools.report.merging import MergeReport

__all__ = ["Action", "Decision", "Plan", "Reason", "Report", "Result"]

NOTHING = "the model has no norm layer to fold"


class _Decided:
    """What plans and reports have in common: one decision for every norm layer."""

    decisions: tuple[Decision, ...]

    @property
    def folds(self) -> tuple[Decision, ...]:
        """The decisions that fold."""
        return tuple(d for d in self.decisions if d.action is Action.FOLD)

    @property
    def kept(self) -> tuple[Decision, ...]:
        """The decisions that keep."""
        return tuple(d for d in self.decisions if d.action is Action.KEEP)

    def counted(self) -> str:
        """How many of the norm layers fold, and how many of the affines, where there are any."""
        said = []
        for noun, affine in (("norm layers", False), ("affines", True)):
            count = sum(d.affine is affine for d in self.decisions)
            if count:
                folds = sum(d.affine is affine for d in self.folds)
                said.append(f"{folds} of {count} {noun}")
        return " and ".join(said)


@dataclass(frozen=True)
class Plan(_Decided):
    """One decision for every norm layer, in execution order; making it changes nothing.

    `inputs` describes the inputs that were recorded, `warnings` what the user should know.
    """

    decisions: tuple[Decision, ...]
    inputs: str = ""
    warnings: tuple[str, ...] = ()
    compiled: Any = field(default=None, repr=False, compare=False)

    def summary(self) -> str:
        """The last line that the command line prints."""
        if not self.decisions:
            return NOTHING
        return f"{self.counted()} would fold"

    def explain(self, path: str) -> Explanation:
        """The way from a norm layer to what absorbs it, op by op; of one that stays, what stops it.

        Raises `PlanError` where the plan has no such layer.

        Example:
            >>> import torch, bntools
            >>> layers = [torch.nn.BatchNorm2d(3), torch.nn.GELU(), torch.nn.Conv2d(3, 8, 3)]
            >>> plan = bntools.plan_fold(torch.nn.Sequential(*layers), torch.zeros(1, 3, 8, 8))
            >>> print(plan.explain("0").summary())
            0 is kept: not-after-linear
        """
        decision = next((d for d in self.decisions if d.path == path), None)
        if decision is None:
            known = ", ".join(d.path for d in self.decisions[:3]) or "none"
            raise PlanError(f"Cannot explain {path!r}: the plan has no such norm layer ({known}).")
        if self.compiled is None:
            return Explanation(decision)
        explanation: Explanation = self.compiled.explain(decision)
        return explanation

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        return tables.text(tables.decisions(self.decisions), *self.warnings, self.summary())


@dataclass(frozen=True)
class Report(_Decided):
    """The certificate of a surgery: what happened to each norm layer and why, and the proof.

    `latency` compares the result with the fold without padded convolutions, where there are any.
    """

    verb: str
    decisions: tuple[Decision, ...]
    check: Check | None = None
    inputs: str = ""
    warnings: tuple[str, ...] = ()
    flushed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    originals_bytes: int = 0
    merging: MergeReport | None = None
    latency: Latency | None = None

    @property
    def changed(self) -> bool:
        """Whether the result is another model: a norm layer folded, or layers merged."""
        return bool(self.folds) or (self.merging is not None and bool(self.merging.merges))

    def summary(self) -> str:
        """The last line that the command line prints."""
        if self.merging is not None and self.merging.merges:
            return self._merged(self.merging)
        if not self.decisions:
            return NOTHING
        line = f"folded {self.counted()}"
        if not self.folds or self.check is None:
            return f"{line}; the model is unchanged"
        return f"{line}; {self.check.native.summary()}"

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def _merged(self, merging: MergeReport) -> str:
        line = f"folded {self.counted() or '0 of 0 norm layers'}"
        verdict = "" if self.check is None else f"; {self.check.native.summary()}"
        return f"{line}; {merging.summary()}{verdict}"

    def __str__(self) -> str:
        flushed = f"{self.flushed} folded values were subnormal in float32 and are zero now"
        kept = f"the originals travel along: {self.originals_bytes / 2**20:.1f} MiB"
        said = [*([flushed] if self.flushed else []), *([kept] if self.originals_bytes else [])]
        if self.latency is not None:
            said.append(f"with its padding forward the model is {self.latency.summary()}")
        notes = (*self.warnings, *said)
        shown = [tables.decisions(self.decisions), tables.merges(self.merging)]
        return tables.text(*filter(None, shown), *notes, self.summary())


R_co = TypeVar("R_co", bound="Certificate", covariant=True)


class Certificate(Protocol):
    """What every report can do."""

    def summary(self) -> str:
        """The last line that the command line prints."""

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON data."""


@dataclass(frozen=True)
class Result(Generic[R_co]):
    """What a surgery returns: the new model, its certificate, and the recipe that rebuilds it."""

    model: Any
    report: R_co
    recipe: Any = None

    def to_dict(self) -> dict[str, Any]:
        """The certificate and the recipe as JSON data (the model stays where it is)."""
        recipe = self.recipe.to_dict() if self.recipe is not None else None
        return {**self.report.to_dict(), "recipe": recipe}

    def __str__(self) -> str:
        return str(self.report)
