"""The inputs of a comparison: batches that were given, or random ones of several sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bntools.errors import BNToolsError, InputError
from bntools.examples import Examples, candidates, given, required
from bntools.runtimes.sessions import Port
from bntools.subjects import OnnxSubject, Subject, TorchSubject

__all__ = ["Batches", "batches_of", "first_examples", "repeatable"]

_SIZES = (64, 224, 32, 28, 128, 256, 16, 8, 96, 299, 384, 512, 1)
_ODD = (3, 1)


@dataclass(frozen=True)
class Batches:
    """Batches that can be gone through again, and what they are in words."""

    source: Iterable[Any]
    described: str
    takes: int = 1

    def __iter__(self) -> Iterator[Examples]:
        for batch in self.source:
            yield _examples(batch, self.takes)


def first_examples(reference: Subject, candidate: Subject | None, inputs: Any) -> Examples | None:
    """The inputs, or what can be inferred from the models; None for an iterable of batches.

    Raises `InputError`.
    """
    if inputs is None:
        return _inferred(reference, candidate)
    return None if _is_iterable(inputs) else given(inputs)


def batches_of(
    reference: Subject, candidate: Subject | None, inputs: Any, first: Examples | None, seed: int
) -> Batches:
    """What to compare on: what was given, or where values are random, several batches and sizes.

    The first batch has the size that was given or inferred; others have odd sizes, where the batch
    is dynamic.
    """
    if first is None:
        described = str(getattr(inputs, "described", "")) or "batches that were given"
        return Batches(inputs, described, _takes(reference))
    if not first.drawn:
        return Batches([first], str(first))
    found = [first.varied(seed)]
    sizes = [first.batch]
    for size in _ODD:
        other = _of_size(first, size)
        if size in sizes or other is None or not _both_take(reference, candidate, other):
            continue
        found.append(other.varied(seed + len(found)))
        sizes.append(size)
    odd = f", and batches of {' and '.join(map(str, sizes[1:]))}" if len(sizes) > 1 else ""
    return Batches(found, f"{first}{odd}{' (inferred)' if first.inferred else ''}")


class _Kept:
    """Batches of an iterator, which can be gone through again."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = list(batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def repeatable(inputs: Any) -> Any:
    """Inputs that can be gone through again: what an iterator gives is kept."""
    return _Kept(inputs) if _is_iterable(inputs) and iter(inputs) is inputs else inputs


def _examples(batch: Any, takes: int) -> Examples:
    """A batch of a loader: a list or tuple of more than a model takes ends in labels."""
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return Examples(tuple(batch[:takes]))
    return given(batch)


def _takes(subject: Subject) -> int:
    """How many positional inputs a model insists on: what else is in a batch are labels."""
    if isinstance(subject, OnnxSubject):
        return len(subject.session.inputs)
    return required(subject.model)


def _is_iterable(inputs: Any) -> bool:
    known = (Tensor, tuple, dict, list, str, bytes, Examples, nn.Module)
    return isinstance(inputs, Iterable) and not isinstance(inputs, known)


def _of_size(examples: Examples, size: int) -> Examples | None:
    """The same inputs in a batch of another size."""
    batch = examples.batch
    if not batch:
        return None
    times = -(-size // batch)
    return examples.mapped(lambda t: torch.cat([t] * times)[:size])


def _both_take(reference: Subject, candidate: Subject | None, examples: Examples) -> bool:
    """Whether the reference, and a candidate in ONNX Runtime, run on inputs of this size."""
    asked = [reference, *([candidate] if isinstance(candidate, OnnxSubject) else [])]
    return all(_runs(subject, examples) for subject in asked)


def _runs(subject: Subject, examples: Examples) -> bool:
    try:
        subject.outputs(examples)
    except BNToolsError:
        return False
    return True


def _inferred(reference: Subject, candidate: Subject | None) -> Examples:
    failure: BNToolsError | None = None
    for examples in _options(reference, candidate):
        try:
            reference.outputs(examples, "reference")
            if isinstance(candidate, OnnxSubject):
                candidate.outputs(examples)
        except BNToolsError as error:  # noqa: PERF203 - the first failure is told
            failure = failure or error
        else:
            return replace(examples, inferred=True, drawn=True)
    why = f": {failure}" if failure else " from the model."
    raise InputError(
        f"Cannot infer an input{why} Give example inputs (--input-shape, --inputs, --data)."
    )


def _options(reference: Subject, candidate: Subject | None) -> Iterator[Examples]:
    for subject in (candidate, reference):
        if isinstance(subject, OnnxSubject):
            yield from _of_ports(subject.session.inputs)
            return
    if isinstance(reference, TorchSubject):
        yield from candidates(reference.model)


def _of_ports(ports: tuple[Port, ...]) -> Iterator[Examples]:
    """Inputs for an ONNX model: a batch of two where that is free, and other free sizes tried."""
    free = any(size is None for port in ports for size in port.shape[1:])
    generator = torch.Generator().manual_seed(0)
    for size in _SIZES if free else (0,):
        for batch in (2, 1):
            yield Examples(
                kwargs={port.name: _drawn(port, batch, size, generator) for port in ports}
            )


def _drawn(port: Port, batch: int, size: int, generator: torch.Generator) -> Tensor:
    shape = [
        fixed if fixed is not None else batch if axis == 0 else size
        for axis, fixed in enumerate(port.shape)
    ]
    if port.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device="cpu").to(port.dtype)
    high = 2 if port.dtype == torch.bool else 10
    return torch.randint(0, high, shape, generator=generator, device="cpu").to(port.dtype)
