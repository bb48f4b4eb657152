"""What became of hand-written batch norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bntools import tables
from bntools.report.decisions import Action, Decision
from bntools.report.judgement import Equivalence
from bntools.report.schema import SCHEMA_VERSION, as_json

__all__ = ["ConversionReport", "ConvertedNorm"]


@dataclass(frozen=True)
class ConvertedNorm:
    """A hand-written batch norm and what was found out about it.

    `tensors` are the names of its mean, variance, gamma and beta by role. `momentum` is that of
    PyTorch, the weight of the new value; `unbiased` says which variance it kept. `mode_by` lists
    what decided on its mode: "gradients" and "mode", that is, train() and eval(). A `frozen` one
    keeps to its statistics also in training. `error` is the relative L2 error of its output, in
    float64, against the one that it replaces.
    """

    path: str
    becomes: str
    tensors: dict[str, str]
    eps: float
    momentum: float | None
    unbiased: bool | None
    mode_by: tuple[str, ...]
    frozen: bool
    error: float


@dataclass(frozen=True)
class ConversionReport:
    """One decision for every affine that is no norm layer, in execution order, and the proof."""

    decisions: tuple[Decision, ...]
    converted: tuple[ConvertedNorm, ...] = ()
    check: Equivalence | None = None
    inputs: str = ""
    warnings: tuple[str, ...] = ()
    verb: str = "to-batchnorm"

    @property
    def kept(self) -> tuple[Decision, ...]:
        """What was left alone, each with its reason."""
        return tuple(d for d in self.decisions if d.action is Action.KEEP)

    def summary(self) -> str:
        """The last line that the command line prints."""
        if not self.decisions:
            return "the model has no hand-written batch norm"
        line = f"converted {len(self.converted)} of {len(self.decisions)} hand-written affines"
        if not self.converted or self.check is None:
            return f"{line}; the model is unchanged"
        return f"{line}; {self.check.summary()}"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {"schema": SCHEMA_VERSION, "summary": self.summary(), **as_json(self)}

    def __str__(self) -> str:
        return tables.text(tables.decisions(self.decisions), *self.warnings, self.summary())
