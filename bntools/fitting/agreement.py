"""How near the outputs of two networks are, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from bntools.report.fit import Agreement

__all__ = ["Agreements", "floating"]


class Agreements:
    """Sums over batches: squared distance and size, and samples with the same top-1."""

    def __init__(self) -> None:
        self._distance = 0.0
        self._size = 0.0
        self._same = 0
        self._rows = 0
        self._samples = 0
        self._comparable = True
        self.is_finite = True
        """Whether the new network is finite wherever the original is."""

    def add(self, new: Any, old: Any, samples: int) -> None:
        """Take in what both networks gave for one batch."""
        mine, theirs = floating(new), floating(old)
        self._samples += samples
        for name, truth in theirs.items():
            found = mine.get(name)
            if found is None or found.shape != truth.shape:  # detections: as many as were found
                self._comparable = False
                continue
            a, b = _exact(found), _exact(truth)
            self.is_finite &= not bool((b.isfinite() & ~a.isfinite()).any())
            self._distance += float((a - b).square().sum())
            self._size += float(b.square().sum())
        if len(mine) == len(theirs) == 1:
            self._compare_classes(*mine.values(), *theirs.values())

    def result(self) -> Agreement:
        """The agreement over all batches."""
        whole = self._comparable and self._rows == self._samples > 0
        error = (self._distance / self._size) ** 0.5 if self._size else self._distance
        return Agreement(
            error if self._comparable else float("nan"),
            self._same / self._rows if whole else None,
            self._samples,
        )

    def _compare_classes(self, new: Tensor, old: Tensor) -> None:
        if old.dim() == 2 and old.shape[1] > 1 and new.shape == old.shape:
            self._same += int((new.argmax(1) == old.argmax(1)).sum())
            self._rows += old.shape[0]


def floating(value: Any) -> dict[str, Tensor]:
    """The floating tensors in an output, by place, with their gradients."""
    return {name: t for name, t in _leaves("output", value) if t.is_floating_point()}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from _leaves(f"{name}.{part.name}", getattr(value, part.name))


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
