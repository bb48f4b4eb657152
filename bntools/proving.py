"""The proof of a fold: on fresh inputs, in float64 and in the model's dtype, with a way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bntools.dataflow.guard import rounding, untouched
from bntools.equivalence import Outputs, Truth, compare, find_truth, in_float64, run
from bntools.errors import InputError
from bntools.examples import Examples
from bntools.measuring import pooled
from bntools.planning import NormFold
from bntools.report import Equivalence, OutputError
from bntools.surgery.folding import Folded, fold_copy, fold_in_place
from bntools.tolerance import float64_limit, relative_error

__all__ = ["Proof", "Prover"]

_DRAWS = 8


@dataclass(frozen=True)
class Proof:
    """The outcome of one check: in the model's dtype, and in float64 where the model runs in it.

    `layers` has both errors of what each folded norm layer gives, on a sample of its values.
    """

    native: Equivalence
    float64: Equivalence | None
    layers: dict[str, tuple[float | None, float]] = field(default_factory=dict)

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
        self.watch = tuple(watch)
        truth = find_truth(model, examples, keep=True, watch=self.watch)
        self.double = truth.double
        self.by_layer = not any(_says_something(t) for t in truth.exact.values())
        self.truth = replace(self._of_layers(truth) if self.by_layer else truth, double=None)

    def check(self, folds: Sequence[NormFold], folded: Folded) -> Proof:
        """Compare a folded copy, and the same folds made in float64, with the truth."""
        exact, exact_layers = self._in_float64(folds) if self.truth.is_float64 else (None, {})
        if exact is not None and not exact and self._rounds():
            # its float64 copy rounds to a smaller dtype on its way: there is no float64 truth
            own = {name: self.truth.native[name] for name in self.truth.exact}
            self.truth = replace(self.truth, exact=own, is_float64=False)
            exact = None
        with untouched(self.model) as shared:
            outputs, layers = run(folded.model, self.examples, watch=self.watch)
        if shared:
            return Proof(self.nothing(f"the copy still uses the original's {shared[0]}"), exact)
        native = compare(self.truth, self._judged(outputs, layers), inputs=str(self.examples))
        if not native and exact and not self.by_layer:
            native = self._on_more_inputs(native, folded)
        return Proof(native, exact, self._layer_errors(folds, exact_layers, layers))

    def _on_more_inputs(self, first: Equivalence, folded: Folded) -> Equivalence:
        """Judge again over several inputs a fold that is exact in float64.

        In a network that amplifies rounding the error of one input has a heavy tail: the
        reference's own error on that input says too little. The largest errors are compared.
        """
        judged = [first]
        for draw in range(1, _DRAWS):
            examples = self.examples.varied(draw)
            given, _ = run(folded.model, examples)
            judged.append(compare(find_truth(self.model, examples), given))
        rows = zip(*(each.outputs for each in judged), strict=True)
        outputs = tuple(pooled(row) for row in rows)
        return replace(first, outputs=outputs, notes=(*first.notes, f"over {_DRAWS} inputs"))

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

    def _rounds(self) -> bool:
        with rounding() as casts:
            run(in_float64(self.model), self.examples.cast(torch.float64, "cpu"))
        return bool(casts)

    def _in_float64(self, folds: Sequence[NormFold]) -> tuple[Equivalence, Outputs]:
        double, self.double = self.double, None
        if double is None:
            double = in_float64(self.model)
        double = fold_in_place(double, folds)
        examples = self.examples.cast(torch.float64, "cpu")
        outputs, layers = run(double, examples, watch=self.watch)
        noise = (o.reference_error for o in compare(self.truth, self.truth.exact).outputs)
        allowed = float64_limit(max(noise, default=0.0), self.truth.coarsest)
        judged = self._judged(outputs, layers)
        return compare(self.truth, judged, inputs=str(self.examples), allowed=allowed), layers

    def _judged(self, outputs: Outputs, layers: Outputs) -> Outputs:
        if not self.by_layer:
            return outputs
        return {path: t for path, t in layers.items() if path in self.truth.exact}

    def _of_layers(self, truth: Truth) -> Truth:
        sound = {path: t for path, t in truth.layers.items() if _says_something(t)}
        if not sound:
            raise InputError(
                f"Cannot check the fold on {self.examples}: all that the model gives is empty or"
                " NaN. Give real example inputs (--inputs)."
            )
        return replace(truth, exact=sound, native={p: truth.native_layers[p] for p in sound})

    def _layer_errors(
        self, folds: Sequence[NormFold], exact: Outputs, native: Outputs
    ) -> dict[str, tuple[float | None, float]]:
        paths = [f.layer.path for f in folds if f.layer.path in self.truth.layers]
        return {
            path: (
                relative_error(exact[path], self.truth.layers[path]) if path in exact else None,
                relative_error(native[path], self.truth.layers[path]),
            )
            for path in paths
            if path in native and native[path].shape == self.truth.layers[path].shape
        }


def _says_something(tensor: Tensor) -> bool:
    return bool(tensor.numel()) and not bool(tensor.isnan().any())
