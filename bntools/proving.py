"""The proof of a fold: on fresh inputs, in float64 and in the model's dtype, with a way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from bntools.backward import NormFold
from bntools.dataflow.guard import untouched
from bntools.equivalence import Outputs, Truth, compare, find_truth, in_float64, run
from bntools.errors import InputError
from bntools.examples import Examples
from bntools.report import Equivalence, OutputError
from bntools.surgery.folding import Folded, fold_copy, fold_in_place
from bntools.tolerance import float64_limit

__all__ = ["Proof", "Prover"]


@dataclass(frozen=True)
class Proof:
    """The outcome of one check: in the model's dtype, and in float64 where the model runs in it."""

    native: Equivalence
    float64: Equivalence | None

    def __bool__(self) -> bool:
        return bool(self.native) and (self.float64 is None or bool(self.float64))

    @property
    def failure(self) -> OutputError | None:
        """The output that fails most, or None."""
        for judged in (self.float64, self.native):
            if judged is not None and not judged:
                return judged.worst
        return None


class Prover:
    """Checks folds of one model on one set of inputs; the truth is found once.

    Where the model's outputs say nothing (all are empty or NaN), the outputs of the folded norm
    layers are compared instead.
    """

    def __init__(self, model: nn.Module, examples: Examples, watch: Sequence[str]) -> None:
        self.model = model
        self.examples = examples
        self.watch: tuple[str, ...] = ()
        self.truth = find_truth(model, examples, keep=True)
        self.double = self.truth.double
        if not any(t.numel() and not t.isnan().any() for t in self.truth.exact.values()):
            self.watch = tuple(watch)
            self.truth = self._watched_truth()

    def check(self, folds: Sequence[NormFold], folded: Folded) -> Proof:
        """Compare a folded copy, and the same folds made in float64, with the truth."""
        float64 = None
        if self.truth.is_float64:
            float64 = self._in_float64(folds)
        with untouched(self.model) as shared:
            outputs = run(folded.model, self.examples, watch=self.watch)
        if shared:
            return Proof(self.nothing(f"the copy still uses the original's {shared[0]}"), float64)
        return Proof(compare(self.truth, self._kept(outputs), inputs=str(self.examples)), float64)

    def blame(self, folds: Sequence[NormFold]) -> dict[str, str]:
        """Which layers' folds to undo, and why, when the check of all of them fails.

        The first fold that makes it fail, found by bisection; all of them, where it fails without
        any (the copy is no copy).
        """
        without = self._failure(())
        if without:
            return {fold.layer.path: without for fold in folds}
        good, bad = 0, len(folds)
        while bad - good > 1:
            middle = (good + bad) // 2
            failure = self._failure(folds[:middle])
            good, bad = (good, middle) if failure else (middle, bad)
        why = self._failure(folds[:bad]) or "it fails together with others only"
        return {folds[bad - 1].layer.path: why}

    def nothing(self, why: str = "no output") -> Equivalence:
        """The judgement of a folded model that gives no output of its own."""
        missing = compare(self.truth, {}, inputs=str(self.examples))
        return replace(missing, outputs=tuple(replace(o, note=why) for o in missing.outputs))

    def _failure(self, folds: Sequence[NormFold]) -> str:
        try:
            proof = self.check(folds, fold_copy(self.model, folds))
        except Exception as error:  # noqa: BLE001 - whatever a fold breaks is its failure
            return f"the folded model raises {type(error).__name__}: {' '.join(str(error).split())}"
        worst = proof.failure
        if worst is None:
            return ""
        if worst.note:
            return f"{worst.name}: {worst.note}"
        return f"{worst.name} is off by {worst.error:.2g} (limit {worst.limit:.2g})"

    def _in_float64(self, folds: Sequence[NormFold]) -> Equivalence:
        double, self.double = self.double, None
        if double is None:
            double = in_float64(self.model)
        double = fold_in_place(double, folds)
        outputs = run(double, self.examples.cast(torch.float64, "cpu"), watch=self.watch)
        noise = (o.reference_error for o in compare(self.truth, self.truth.exact).outputs)
        allowed = float64_limit(max(noise, default=0.0), self.truth.coarsest)
        return compare(self.truth, self._kept(outputs), inputs=str(self.examples), allowed=allowed)

    def _watched_truth(self) -> Truth:
        truth = self.truth
        native = run(self.model, self.examples, watch=self.watch)
        exact = native
        if self.double is not None:
            double = self.examples.cast(torch.float64, "cpu")
            exact = run(self.double, double, watch=self.watch)
        sound = {n: t for n, t in exact.items() if t.numel() and not t.isnan().any()}
        if not sound:
            raise InputError(
                f"Cannot check the fold on {self.examples}: all that the model gives is empty or"
                " NaN. Give real example inputs (--inputs)."
            )
        return replace(truth, exact=sound, native={n: native[n] for n in sound})

    def _kept(self, outputs: Outputs) -> Outputs:
        return (
            {n: t for n, t in outputs.items() if n in self.truth.exact} if self.watch else outputs
        )
