"""What a plan decides, and what a surgery returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

from bntools import tables
from bntools.report.judgement import Check
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["Action", "Decision", "Plan", "Reason", "Report", "Result"]

NOTHING = "the model has no norm layer to fold"


class Action(str, Enum):
    """What a plan does with a norm layer."""

    FOLD = "fold"
    REPLACE = "replace"
    FREEZE = "freeze"
    UNFREEZE = "unfreeze"
    CONVERT = "convert"
    KEEP = "keep"


class Reason(str, Enum):
    """Why a norm layer is kept. The values are stable: JSON, and anchors in the README."""

    NOT_EXECUTED = "not-executed"
    NOT_AFTER_LINEAR = "not-after-linear"
    USED_ELSEWHERE = "used-elsewhere"
    RETURNED = "returned"
    HOST_SHARED = "host-shared"
    TIED_WEIGHT = "tied-weight"
    COMPUTED_WEIGHT = "computed-weight"
    FIXED_WEIGHT = "fixed-weight"
    BIAS_NOT_USED = "bias-not-used"
    CHANNEL_MISMATCH = "channel-mismatch"
    TRAINING_MODE = "training-mode"
    NO_STATISTICS = "no-statistics"
    NON_FINITE = "non-finite"
    HOOKS = "hooks"
    SCRIPTED = "scripted"
    MORE_THAN_NORM = "more-than-norm"
    OUTSIDE_FORWARD = "outside-forward"
    SHARED_STATISTICS = "shared-statistics"
    COMPUTED_AFFINE = "computed-affine"
    WRITTEN_IN_PLACE = "written-in-place"
    DATA_DEPENDENT = "data-dependent"
    ONE_VALUE = "one-value"
    NO_ACTIVATION = "no-activation"
    ACTIVATION_STAYS = "activation-stays"
    UNINITIALIZED = "uninitialized"
    ALREADY_FROZEN = "already-frozen"
    NOT_FROZEN = "not-frozen"
    NO_SUCH_FORM = "no-such-form"
    SKIPPED = "skipped"
    CHECK_FAILED = "check-failed"


@dataclass(frozen=True)
class Decision:
    """What happens to one norm layer, and why.

    `hosts` are the paths of the layers that absorb it; `reason` is None for a fold; `detail` is a
    sentence that names the other layer or operation involved. After a checked fold, `float64_error`
    and `native_error` are the relative L2 errors of what the layer gives, against float64 truth,
    of the fold made in float64 and of the delivered one.
    """

    path: str
    kind: str
    action: Action
    hosts: tuple[str, ...] = ()
    reason: Reason | None = None
    detail: str = ""
    float64_error: float | None = None
    native_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The decision as JSON data."""
        return dict(as_json(self))


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
        return f"{len(self.folds)} of {len(self.decisions)} norm layers would fold"

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        return tables.text(tables.decisions(self.decisions), *self.warnings, self.summary())


@dataclass(frozen=True)
class Report(_Decided):
    """The certificate of a surgery: what happened to each norm layer and why, and the proof."""

    verb: str
    decisions: tuple[Decision, ...]
    check: Check | None = None
    inputs: str = ""
    warnings: tuple[str, ...] = ()
    flushed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """The last line that the command line prints."""
        if not self.decisions:
            return NOTHING
        line = f"folded {len(self.folds)} of {len(self.decisions)} norm layers"
        if not self.folds or self.check is None:
            return f"{line}; the model is unchanged"
        return f"{line}; {self.check.native.summary()}"

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        flushed = f"{self.flushed} folded values were subnormal in float32 and are zero now"
        notes = (*self.warnings, *([flushed] if self.flushed else []))
        return tables.text(tables.decisions(self.decisions), *notes, self.summary())


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
