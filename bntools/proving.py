"""The proof of a fold: on fresh inputs, in float64 and in the model's dtype, with a way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

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
from bntools.watching import jittered

__all__ = ["Proof", "Prover", "first_failing", "watched"]

_DRAWS = 8


@dataclass(frozen=True)
class Proof:
    """The outcome of one check: in the model's dtype, and in float64 where the model runs in it.

    `layers` has both errors of what each folded norm layer gives, on a sample of its values; of one
    that folds forward, of what its hosts give.
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
    layers are compared instead, of those that fold forward the outputs of their hosts. `watch` are
    the layers whose outputs are sampled: see `watched`.
    """

    def __init__(self, model: nn.Module, examples: Examples, watch: Sequence[str]) -> None:
        self.model = model
        self.examples = examples
        self.watch = tuple(watch)
        truth = find_truth(model, examples, keep=True, watch=self.watch)
        self.double = truth.double
        self.by_layer = not any(_says_something(t) for t in truth.exact.values())
        self.truth = replace(self._of_layers(truth) if self.by_layer else truth, double=None)

    def check(
        self, folds: Sequence[NormFold], folded: Folded, *, double: nn.Module | None = None
    ) -> Proof:
        """Compare a folded copy, and the same folds made in float64, with the truth.

        `double` is the float64 copy where more was done to `folded` than these folds.
        """
        wide = self.truth.is_float64
        exact, exact_layers = self._in_float64(folds, double) if wide else (None, {})
        if exact is not None and not exact and self._rounds():
            # its float64 copy rounds to a smaller dtype on its way: there is no float64 truth
            own = {name: self.truth.native[name] for name in self.truth.exact}
            self.truth = replace(self.truth, exact=own, is_float64=False)
            exact = None
        with untouched(self.model) as shared:
            outputs, layers = run(folded.model, self.examples, watch=self.watch)
        if shared:
            return Proof(self.nothing(f"the copy still uses the original's {shared[0]}"), exact)
        truth = self._truth(folds)
        allowed = self._float64_limit(truth) if truth.coarsest == torch.float64 else None
        judged = self._judged(truth, outputs, layers)
        native = compare(truth, judged, inputs=str(self.examples), allowed=allowed)
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
        # a fold may need those before it: backward in execution order, forward in their turn
        onward = sorted((fold for fold in folds if fold.forward), key=lambda fold: fold.turn)
        ordered = [*(fold for fold in folds if not fold.forward), *onward]
        return first_failing(ordered, self._failure)

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

    def _in_float64(
        self, folds: Sequence[NormFold], made: nn.Module | None
    ) -> tuple[Equivalence, Outputs]:
        double, self.double = self.double, None
        if made is None:
            made = fold_in_place(in_float64(self.model) if double is None else double, folds)
        examples = self.examples.cast(torch.float64, "cpu")
        outputs, layers = run(made, examples, watch=self.watch)
        truth = self._truth(folds)
        judged = self._judged(truth, outputs, layers)
        allowed = self._float64_limit(truth)
        return compare(truth, judged, inputs=str(self.examples), allowed=allowed), layers

    def _float64_limit(self, truth: Truth) -> float:
        """What a fold in float64 may be off, by the model's amplification of rounding."""
        if truth.coarsest == torch.float64:
            return float64_limit(self._own_noise, truth.coarsest)
        noise = (o.reference_error for o in compare(truth, truth.exact).outputs)
        return float64_limit(max(noise, default=0.0), truth.coarsest)

    @cached_property
    def _own_noise(self) -> float:
        """The rounding of a model that is float64 itself: it is its own truth, and shows none.

        So it runs once more with every parameter off by about one rounding.
        """
        moved = run(jittered(self.model, seed=0), self.examples, watch=self.watch)
        judged = compare(self.truth, self._judged(self.truth, *moved))
        return max((o.error for o in judged.outputs), default=0.0)

    def _truth(self, folds: Sequence[NormFold]) -> Truth:
        """The truth, of layers only those that give the same with these folds as without."""
        if not self.by_layer:
            return self.truth
        other = _changed(folds)
        exact = {path: t for path, t in self.truth.exact.items() if path not in other}
        return replace(self.truth, exact=exact)

    def _judged(self, truth: Truth, outputs: Outputs, layers: Outputs) -> Outputs:
        if not self.by_layer:
            return outputs
        return {path: t for path, t in layers.items() if path in truth.exact}

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
        truth = self.truth.layers
        found: dict[str, tuple[float | None, float]] = {}
        for norm, paths in _told_by(folds).items():
            told = [p for p in paths if p in native and p in truth]
            if not told or any(native[p].shape != truth[p].shape for p in told):
                continue
            wide = [relative_error(exact[p], truth[p]) for p in told if p in exact]
            own = max(relative_error(native[p], truth[p]) for p in told)
            found[norm] = max(wide, default=None), own
        return found


def first_failing(
    ordered: Sequence[NormFold], failure: Callable[[Sequence[NormFold]], str]
) -> dict[str, str]:
    """The first fold that makes a check of all of them fail, and why, by bisection."""
    good, bad = 0, len(ordered)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if failure(ordered[:middle]) else (middle, bad)
    why = failure(ordered[:bad]) or "it fails together with others only"
    return {ordered[bad - 1].layer.path: why}


def watched(folds: Sequence[NormFold]) -> list[str]:
    """The layers whose outputs a check of folds, or of some of them, compares."""
    hosts = [host.path for fold in folds if fold.forward for host in fold.hosts if host.is_layer]
    return list(dict.fromkeys([*(fold.layer.path for fold in folds), *hosts]))


def _told_by(folds: Sequence[NormFold]) -> dict[str, tuple[str, ...]]:
    """For each norm layer the layers whose outputs tell what its fold did.

    Its own, or where it folds forward those of its hosts; where a host absorbs what comes after it
    as well, its own output is another, and that of the last such norm tells.
    """
    last: dict[str, str] = {}
    for fold in sorted(folds, key=lambda each: each.turn):
        if not fold.forward:
            last.update({host.path: fold.layer.path for host in fold.hosts})
    return {
        fold.layer.path: tuple(
            dict.fromkeys(last.get(h.path, h.path) for h in fold.hosts if h.is_layer)
        )
        if fold.forward
        else (fold.layer.path,)
        for fold in folds
    }


def _changed(folds: Sequence[NormFold]) -> set[str]:
    """The layers that give something else once these folds are made."""
    before = {fold.layer.path for fold in folds if fold.forward}
    return before | {host.path for fold in folds if not fold.forward for host in fold.hosts}


def _says_something(tensor: Tensor) -> bool:
    return bool(tensor.numel()) and not bool(tensor.isnan().any())
