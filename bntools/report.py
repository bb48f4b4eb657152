"""What bntools answers: plans, decisions, certificates. Plain frozen data, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from bntools import tables

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
]

SCHEMA_VERSION = 1
NOTHING = "the model has no norm layer to fold"


class Action(str, Enum):
    """What a plan does with a norm layer."""

    FOLD = "fold"
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
    SKIPPED = "skipped"
    CHECK_FAILED = "check-failed"


class Severity(str, Enum):
    """How bad a finding is."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def as_json(value: Any) -> Any:
    """Turn report data into JSON data: enums by value, dataclasses by field, no NaN or infinity."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
class OutputError:
    """How far one output of a candidate is from the float64 truth.

    `error` and `reference_error` are relative L2 errors of the candidate and of the untouched
    reference in its own dtype; `limit` is what `error` may reach; `max_abs` is the largest
    absolute difference. `passed` is False for a NaN, an empty output or a shape mismatch.
    """

    name: str
    error: float
    reference_error: float
    limit: float
    max_abs: float
    passed: bool
    note: str = ""

    @property
    def ratio(self) -> float:
        """The error as a multiple of the reference's own error."""
        if self.reference_error == 0:
            return 0.0 if self.error == 0 else float("inf")
        return self.error / self.reference_error


@dataclass(frozen=True)
class Equivalence:
    """The judgement of `verify`: falsy where the candidate differs from the reference.

    `truth` is "float64", or the dtype of the reference where it cannot run in float64;
    `factor` and `eps_factor` are k and c in `limit = max(k * reference error, c * eps)`, unless
    the limit is `absolute`.
    """

    outputs: tuple[OutputError, ...]
    truth: str
    dtype: str
    factor: float
    eps_factor: float
    inputs: str = ""
    notes: tuple[str, ...] = ()
    absolute: bool = False

    def __bool__(self) -> bool:
        return bool(self.outputs) and all(output.passed for output in self.outputs)

    @property
    def worst(self) -> OutputError | None:
        """The output that comes nearest to its limit, or exceeds it most."""
        if not self.outputs:
            return None
        return max(
            self.outputs, key=lambda o: (not o.passed, o.error / o.limit if o.limit else 0.0)
        )

    def summary(self) -> str:
        """One line, such as "worst error 0.9x that of the original float32 model (limit 4x)"."""
        worst = self.worst
        if worst is None:
            return "no output to compare: not equivalent"
        if worst.note and not worst.passed:
            return f"{worst.name}: {worst.note}"
        if self.absolute or not worst.reference_error:
            return f"worst error {worst.error:.2g} relative (limit {worst.limit:.2g})"
        return (
            f"worst error {worst.ratio:.2g}x that of the original {self.dtype} model"
            f" (limit {worst.limit / worst.reference_error:.2g}x)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The judgement as JSON data."""
        return {"schema": SCHEMA_VERSION, "equivalent": bool(self), **as_json(self)}

    def __str__(self) -> str:
        verdict = "equivalent" if self else "NOT equivalent"
        return tables.text(
            tables.outputs(self.outputs), f"{verdict}: {self.summary()}", *self.notes
        )


@dataclass(frozen=True)
class Check:
    """The proof that comes with a fold, on fresh inputs other than the recorded ones.

    `float64` compares fold and original both in float64 (None where the model cannot run in it);
    `native` judges the delivered model in its own dtype; `rolled_back` names the norm layers
    whose fold failed and was undone; `peak_bytes` is what the check needed at most above the
    two models, parameters and activations, as far as tensors go.
    """

    native: Equivalence
    float64: Equivalence | None
    seed: int
    inputs: str
    rolled_back: tuple[str, ...] = ()
    peak_bytes: int | None = None

    def __bool__(self) -> bool:
        return bool(self.native) and (self.float64 is None or bool(self.float64))


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


@dataclass(frozen=True)
class Result:
    """What a surgery returns: the new model, its certificate, and the recipe that rebuilds it."""

    model: Any
    report: Report
    recipe: Any = None

    def to_dict(self) -> dict[str, Any]:
        """The certificate and the recipe as JSON data (the model stays where it is)."""
        recipe = self.recipe.to_dict() if self.recipe is not None else None
        return {**self.report.to_dict(), "recipe": recipe}

    def __str__(self) -> str:
        return str(self.report)


@dataclass(frozen=True)
class Range:
    """The smallest and the largest of the finite values of a tensor."""

    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """Something that the doctor noticed about a layer: a stable code, and a sentence."""

    path: str
    severity: Severity
    code: str
    message: str


@dataclass(frozen=True)
class LayerHealth:
    """One norm layer as the doctor sees it; None where a layer has no such thing."""

    path: str
    kind: str
    channels: int | None = None
    eps: float | None = None
    momentum: float | None = None
    batches_tracked: int | None = None
    mean: Range | None = None
    variance: Range | None = None
    gamma: Range | None = None
    frozen: bool = False
    decision: Decision | None = None
    input_dependent: bool = False


@dataclass(frozen=True)
class Inspection:
    """Every norm layer, its health, and where it would fold or why not.

    Layers with `input_dependent` set (LayerNorm, GroupNorm and the like) are listed, but do not
    count in "n of m".
    """

    layers: tuple[LayerHealth, ...]
    findings: tuple[Finding, ...] = ()
    inputs: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that make the model wrong."""
        return tuple(f for f in self.findings if f.severity is Severity.ERROR)

    def worst(self) -> Severity | None:
        """The highest severity found, or None for a healthy model."""
        order = list(Severity)
        return max((f.severity for f in self.findings), key=order.index, default=None)

    def summary(self) -> str:
        """The last line that the command line prints."""
        counts = [sum(f.severity is s for f in self.findings) for s in reversed(Severity)]
        nouns = zip(counts, ("error", "warning", "note"), strict=True)
        found = ", ".join(f"{n} {noun}{'' if n == 1 else 's'}" for n, noun in nouns)
        return f"{self._folds()}; {found}"

    def _folds(self) -> str:
        counted = [layer for layer in self.layers if not layer.input_dependent]
        decided = [layer.decision for layer in counted if layer.decision is not None]
        if decided:
            folds = sum(decision.action is Action.FOLD for decision in decided)
            return f"{folds} of {len(decided)} norm layers would fold"
        if counted:
            return f"{len(counted)} norm layer{'s' * (len(counted) > 1)}, health only"
        return "the model has no norm layer to fold"

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        return tables.text(
            tables.layers(self.layers),
            tables.findings(self.findings),
            *self.warnings,
            self.summary(),
        )
