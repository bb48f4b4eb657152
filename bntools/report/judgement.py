"""What `verify` answers, and the proof that comes with a surgery."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from bntools import tables
from bntools.report.depth import DepthReport
from bntools.report.placement import Placement
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["Check", "Equivalence", "OutputError", "SliceError"]


@dataclass(frozen=True)
class SliceError:
    """How far one slice of an output is off: a sample, a channel, or a position along an axis.

    The errors and the limit are root mean squares over the slice, in units of the root mean square
    of the whole output's truth.
    """

    kind: str
    index: int
    error: float
    reference_error: float
    limit: float

    def __str__(self) -> str:
        return f"{self.kind} {self.index} is off by {self.error:.2g} (limit {self.limit:.2g})"


@dataclass(frozen=True)
class OutputError:
    """How far one output of a candidate is from the float64 truth.

    `error` and `reference_error` are relative L2 errors of the candidate and of the untouched
    reference in its own dtype; `limit` is what `error` may reach; `max_abs` is the largest
    absolute difference, `max_scaled` the same relative to the largest value of the truth;
    `cosine` that of the angle to the truth; `top1` the share of samples with the truth's highest
    class, where the output looks like classes. `part` is the slice nearest to its own limit, or
    farthest beyond it. `why` tells where the limit comes from. `passed` is False for a NaN, an
    empty output or a shape mismatch.
    """

    name: str
    error: float
    reference_error: float
    limit: float
    max_abs: float
    passed: bool
    note: str = ""
    max_scaled: float | None = None
    cosine: float | None = None
    top1: float | None = None
    part: SliceError | None = None
    why: str = ""

    @property
    def severity(self) -> float:
        """The error as a multiple of its limit, of the whole or of the worst slice."""
        parts = [(self.error, self.limit)]
        parts += [(self.part.error, self.part.limit)] if self.part is not None else []
        return max(
            error / limit if limit else (math.inf if error else 0.0) for error, limit in parts
        )

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
    batches: int = 1
    placement: Placement | None = None
    layers: DepthReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.outputs) and all(output.passed for output in self.outputs)

    @property
    def worst(self) -> OutputError | None:
        """The output that comes nearest to its limit, or exceeds it most."""
        if not self.outputs:
            return None
        return max(self.outputs, key=lambda o: (not o.passed, o.severity))

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
        reasons = dict.fromkeys(output.why for output in self.outputs if output.why)
        return tables.text(
            str(self.layers) if self.layers is not None else "",
            tables.outputs(self.outputs),
            f"limit: {'; '.join(list(reasons)[:3])}" if reasons else "",
            *self.notes,
            f"{verdict}: {self.summary()}",
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
