"""The truth about one model on any input, found once and shared by all its candidates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from bntools.equivalence import Comparison, Outputs, Truth, dtype_of, find_truth, run
from bntools.errors import ExportError, InputError
from bntools.examples import Examples
from bntools.modules import duplicate, floating_tensors
from bntools.report import Equivalence
from bntools.runtimes.precision import TF32_EPS

__all__ = ["Judge", "resized", "sizes_that_run"]

Candidate = Callable[[Examples], Outputs]
_DRAWS = 8
_SIZES = (1, 3)


class Judge:
    """Judges candidates for a model, in its own dtype or in another one to which both are cast.

    The truth is always the model as it is, in float64; with a `dtype` the error that a candidate
    may make is that of the model when it is cast, run by PyTorch.
    """

    def __init__(self, reference: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.reference = reference
        self.dtype = dtype or dtype_of(reference)
        dtypes = {tensor.dtype for tensor in floating_tensors(reference)}
        self._cast = dtype is not None and dtypes != {dtype}
        self._other = duplicate(reference).to(self.dtype) if self._cast else None
        self._known: list[tuple[Examples, Truth]] = []

    def cast(self, candidate: nn.Module) -> nn.Module:
        """A candidate, which is changed, on the CPU in the dtype in which it is judged."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scripted modules look at .grad of what is no leaf
            return candidate.to("cpu", self.dtype) if self._cast else candidate.to("cpu")

    def rounded(self, examples: Examples) -> Examples:
        """The same numbers for the truth as for a candidate of another dtype."""
        if not self._cast:
            return examples
        return examples.cast(self.dtype).cast(dtype_of(self.reference))

    def know(self, examples: Examples, truth: Truth) -> None:
        """Keep a truth that was found elsewhere."""
        self._known.append((examples, self._in_dtype(examples, truth)))

    def truth(self, examples: Examples) -> Truth:
        """What the model gives in float64, and in the dtype of the candidate.

        Raises as `find_truth` does.
        """
        for known, truth in self._known:
            if known is examples:
                return truth
        self.know(examples, find_truth(self.reference, examples))
        return self._known[-1][1]

    def compare(
        self,
        candidate: Candidate,
        examples: Examples,
        *,
        only: Iterable[str],
        tf32: bool = False,
    ) -> Equivalence:
        """Judge the outputs of these names on one input; where that fails, over several.

        In a network that amplifies rounding, one input's own error says too little.
        """
        wanted = tuple(only)
        truth = self.truth(examples)
        eps = TF32_EPS if tf32 else 0.0
        comparison = Comparison(eps=eps, coarser=max(1.0, eps / torch.finfo(truth.measured).eps))
        comparison.add(_of(truth, wanted), candidate(examples.cast(self.dtype, "cpu")))
        judged = comparison.result(str(examples))
        if judged or any(output.note for output in judged.outputs):
            return judged
        for draw in range(1, _DRAWS):
            other = self.rounded(examples.varied(draw))
            truth = self._in_dtype(other, find_truth(self.reference, other))
            comparison.add(_of(truth, wanted), candidate(other.cast(self.dtype, "cpu")))
        return comparison.result(str(examples), [f"over {_DRAWS} inputs"])

    def _in_dtype(self, examples: Examples, truth: Truth) -> Truth:
        if self._other is None:
            return truth
        name = str(self.dtype).removeprefix("torch.")
        try:
            native, _ = run(self._other, examples.cast(self.dtype))
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise ExportError(
                f"Cannot use {name}: PyTorch cannot run the model so ({type(error).__name__}:"
                f" {why}). Choose another --dtype."
            ) from error
        for path, tensor in native.items():
            exact = truth.exact.get(path)
            if exact is not None and bool(exact.isfinite().all() and not tensor.isfinite().all()):
                raise ExportError(
                    f"Cannot use {name}: the model itself overflows in it ({path} is not finite)."
                    " Choose another --dtype."
                )
        return replace(truth, native=native, dtype=self.dtype, coarsest=self.dtype)


def _of(truth: Truth, wanted: tuple[str, ...]) -> Truth:
    """The part of a truth that some outputs are about."""
    exact = {path: truth.exact[path] for path in wanted if path in truth.exact}
    return replace(truth, exact=exact, native={path: truth.native[path] for path in exact})


def sizes_that_run(judge: Judge, base: Examples, batch: int, *, seed: int) -> list[Examples]:
    """Inputs of other batch sizes that the model takes; their truth is known then.

    One sample and three, as far as `base` is not that; where it takes neither, twice as many.
    """
    found: list[Examples] = []
    for size in (*_SIZES, 2 * batch):
        if size == batch or (size not in _SIZES and found):
            continue
        examples = judge.rounded(resized(base, batch, size).varied(seed + size))
        try:
            judge.truth(examples)
        except InputError:  # the model does not run at this size
            continue
        found.append(examples)
    return found


def resized(examples: Examples, batch: int, size: int) -> Examples:
    """The arguments of a forward at another batch size, their samples repeated."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] != batch:
            return tensor
        return torch.cat([tensor] * -(-size // batch))[:size]

    return examples.mapped(change)
