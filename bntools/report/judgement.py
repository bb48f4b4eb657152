"""What `verify` answers, and the proof that comes with a surgery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bntools import tables
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["Check", "Equivalence", "OutputError"]


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
