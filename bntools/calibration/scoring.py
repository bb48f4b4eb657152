"""Whether new statistics help: a score before and after, or what can be seen without labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from bntools.calibration.feeding import Batch, Feeder
from bntools.dataflow.guard import unwritten
from bntools.errors import InputError
from bntools.modules import named_modules, preserved
from bntools.report import Comparison

__all__ = ["Held", "Score", "compared", "predictions", "scored", "undisturbed"]

Score = Callable[..., Any]


@contextmanager
def undisturbed(model: nn.Module, *, inplace: bool) -> Iterator[None]:
    """Run a model in eval mode, without gradients, and leave it as it was, buffers included.

    What is not a copy of ours (`inplace`) is watched for writes to anything.
    """
    kept = unwritten(model) if inplace else _buffers_kept(model)
    with preserved(model), kept, torch.no_grad():
        model.eval()
        for _, module in named_modules(model):
            if module.training:  # its class overrides `train`
                module.training = False
        yield


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    buffers = [
        (buffer, buffer._version, buffer.detach().clone())
        for _, module in named_modules(model)
        for buffer in module._buffers.values()
        if buffer is not None and not is_lazy(buffer) and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, content in buffers:
                if buffer._version != version:
                    buffer.copy_(content)


@dataclass(frozen=True, eq=False)
class Held:
    """Which batches give statistics, and which are held out for a score that wants some."""

    calibration: Any
    held_out: Any = None

    @classmethod
    def of(cls, batches: Any, evaluate: Score | None, share: float) -> Held:
        """Hold batches out, evenly through the data, for an `evaluate` with two parameters."""
        if evaluate is None or not _wants_batches(evaluate):
            return cls(batches)
        if not callable(batches) and hasattr(batches, "__next__"):
            raise InputError(
                "Cannot hold batches out of an iterator: it can be gone through once. Give a list"
                " or a loader."
            )
        every = max(2, round(1 / share))
        return cls(_Part(batches, every, held=False), _Part(batches, every, held=True))


@dataclass(frozen=True, eq=False)
class _Part:
    """Every n-th batch, or all others."""

    batches: Any
    every: int
    held: bool

    def __iter__(self) -> Iterator[Any]:
        source: Iterable[Any] = self.batches() if callable(self.batches) else self.batches
        for number, batch in enumerate(source, 1):
            if (number % self.every == 0) is self.held:
                yield batch


def _wants_batches(evaluate: Score) -> bool:
    try:
        parameters = inspect.signature(evaluate).parameters.values()
    except (TypeError, ValueError):
        return False
    wanted = [
        p for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    return len(wanted) >= 2


def scored(model: nn.Module, evaluate: Score, held: Held, *, inplace: bool) -> float:
    """The score of a model in eval mode, which is as it was afterwards.

    Raises InputError for a score that is no number.
    """
    with undisturbed(model, inplace=inplace):
        given = evaluate(model) if held.held_out is None else evaluate(model, held.held_out)
    try:
        score = float(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Cannot judge the model: evaluate returned a {type(given).__name__}. Return a number,"
            " higher for better."
        ) from error
    if score != score:  # noqa: PLR0124 - NaN
        raise InputError("Cannot judge the model: evaluate returned NaN. Return a number.")
    return score


# ---- without labels ------------------------------------------------------------------------------


def predictions(feeder: Feeder, batch: Batch, most: int) -> Tensor | None:
    """The class probabilities (N, K, ...) for the first samples of a batch; None without any.

    They are the softmax of the first floating output of two axes or more, float64 on the CPU.
    """
    if feeder.options.forward is None:
        batch = batch.first(most)
    with undisturbed(feeder.model, inplace=feeder.options.inplace), feeder.layout_kept():
        feeder.lay_out(batch.content)
        out = feeder.run(batch)
    leaves = tree_leaves(vars(out) if hasattr(out, "logits") else out)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() >= 2:
            if leaf.shape[0] == batch.samples and leaf.shape[1] >= 2:
                return leaf[:most].detach().cpu().double().softmax(1)
            return None
    return None


def compared(before: Tensor | None, after: Tensor | None) -> Comparison | None:
    """What two sets of predictions for the same inputs have in common."""
    if before is None or after is None or before.shape != after.shape:
        return None
    same = (before.argmax(1) == after.argmax(1)).double().mean()
    return Comparison(
        samples=before.shape[0],
        agreement=float(same),
        entropy_before=_entropy(before),
        entropy_after=_entropy(after),
        confidence_before=float(before.max(1).values.mean()),
        confidence_after=float(after.max(1).values.mean()),
    )


def _entropy(probabilities: Tensor) -> float:
    return float(-torch.special.xlogy(probabilities, probabilities).sum(1).mean())
