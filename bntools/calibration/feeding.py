"""Batches on their way to a model: what its forward is given, on which device, in which layout."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bntools.calibration.options import RecalibrationOptions
from bntools.dataflow.guard import storage_key
from bntools.errors import BNToolsError, CalibrationError, InputError
from bntools.modules import floating_tensors, loose_tensors, named_modules, named_tensors

__all__ = ["Batch", "Feeder"]

_WORTH = 64 * 64
"""Pixels from which a CPU's convolutions are faster channels last."""


@dataclass(frozen=True)
class Batch:
    """One batch on the device, counted from 1."""

    number: int
    content: Any
    samples: int

    def __str__(self) -> str:
        return f"batch {self.number}"

    def first(self, most: int) -> Batch:
        """Its first samples: of every tensor that has as many rows as the batch."""
        if self.samples <= most:
            return self

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:most] if tensor.dim() and tensor.shape[0] == self.samples else tensor

        return Batch(self.number, tree_map_only(Tensor, cut, self.content), most)


class Feeder:
    """Gives a model the batches of a loader, pass by pass.

    `may_be_empty` is for several processes: some get nothing of a last, small global batch.
    Large images go channels last on the CPU, and with them the weights of the model.
    """

    def __init__(self, batches: Any, model: nn.Module, options: RecalibrationOptions) -> None:
        self.batches = _checked(batches)
        self.model = model
        self.options = options
        like = next(floating_tensors(model), None)
        self.device = torch.device(
            options.device if options.device is not None else "cpu" if like is None else like.device
        )
        self.dtype = None if options.autocast or like is None else like.dtype
        self.may_be_empty = False
        self.waited = 0.0
        self._likes_channels_last = options.layout == "channels_last" and _likes_channels_last(
            model, self.device
        )
        self._laid_out = False
        self._strides: dict[int, tuple[nn.Parameter, tuple[int, ...]]] = {}
        self._holders: Counter[int | None] = Counter()
        self._accepted = _keywords(model)

    @property
    def repeats(self) -> bool:
        """Whether the batches can be gone through again."""
        return callable(self.batches) or not hasattr(self.batches, "__next__")

    def __iter__(self) -> Iterator[Batch]:
        source: Iterator[Any] | None = None
        number = 0
        while self.options.max_batches is None or number < self.options.max_batches:
            start = time.perf_counter()
            try:
                if source is None:
                    source = iter(self.batches() if callable(self.batches) else self.batches)
                raw = next(source)
            except StopIteration:
                return
            except BNToolsError:
                raise
            except Exception as error:
                raise CalibrationError(
                    f"Cannot read batch {number + 1}: {_told(error)}. The model is as it was."
                ) from error
            finally:
                self.waited += time.perf_counter() - start
            number += 1
            yield self.prepared(raw, number)

    def prepared(self, raw: Any, number: int) -> Batch:
        """A batch on the device, in the dtype of the model."""
        tensors = [t for t in tree_leaves(raw) if isinstance(t, Tensor) and t.dim()]
        samples = _samples(raw, tensors)
        if not samples and self.options.forward is None and not self.may_be_empty:
            raise CalibrationError(
                f"Cannot take statistics of batch {number}: it has no sample. Give tensors, (input,"
                " target) pairs, dicts of keyword arguments, or a forward= that runs the batch."
            )
        counted = samples or int(not tensors)
        return Batch(number, tree_map_only(Tensor, self._moved, raw), counted)

    def run(self, batch: Batch) -> Any:
        """One forward of the model."""
        device = self.device.type
        cast: AbstractContextManager[Any] = nullcontext()
        if self.options.autocast is not None:
            cast = torch.autocast(device, self.options.autocast)
        with cast:
            if self.options.forward is not None:
                return self.options.forward(self.model, batch.content)
            args, kwargs = self._arguments(batch.content)
            return self.model(*args, **kwargs)

    def _moved(self, tensor: Tensor) -> Tensor:
        floating = tensor.is_floating_point()
        dtype = self.dtype if floating and self.options.forward is None else None
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()  # the copy then runs beside the last batch
        moved = tensor.to(self.device, dtype or tensor.dtype, non_blocking=True)
        if self._is_large_image(moved):
            return moved.contiguous(memory_format=torch.channels_last)
        return moved

    def _is_large_image(self, tensor: Tensor) -> bool:
        if not self._likes_channels_last or tensor.dim() != 4 or not tensor.is_floating_point():
            return False
        return tensor.shape[2] * tensor.shape[3] >= _WORTH

    def lay_out(self, content: Any) -> None:
        """Put convolution weights like large images, until the end of `layout_kept`."""
        if self._laid_out or not any(
            isinstance(leaf, Tensor) and self._is_large_image(leaf) for leaf in tree_leaves(content)
        ):
            return
        self._laid_out = True
        tensors = {id(t): t for *_, t in named_tensors(self.model)}
        held = [*tensors.values(), *loose_tensors(self.model)]
        self._holders = Counter(storage_key(tensor) for tensor in held)
        for _, module in named_modules(self.model):
            weight = module._parameters.get("weight")
            if not isinstance(module, nn.Conv2d) or weight is None or weight.is_inference():
                continue
            if id(weight) not in self._strides and weight.is_contiguous():
                self._strides[id(weight)] = (weight, weight.stride())
                self._arrange(weight, weight.data.contiguous(memory_format=torch.channels_last))

    @contextmanager
    def layout_kept(self) -> Iterator[None]:
        """Give the weights back the layout that they had."""
        try:
            yield
        finally:
            for weight, strides in self._strides.values():
                wanted = torch.empty_strided(
                    weight.shape, strides, dtype=weight.dtype, device=weight.device
                )
                self._arrange(weight, wanted.copy_(weight.data))
            self._strides.clear()
            self._laid_out = False

    def _arrange(self, weight: nn.Parameter, wanted: Tensor) -> None:
        """Give a weight another layout; one that is ours keeps its memory, and needs no more."""
        if self.options.inplace or self._holders[storage_key(weight)] > 1:
            weight.data = wanted
            return
        same = weight.data.as_strided(wanted.shape, wanted.stride(), weight.storage_offset())
        weight.data = same.copy_(wanted)

    def _arguments(self, content: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(content, dict):
            known = self._accepted
            kept = {k: v for k, v in content.items() if known is None or k in known}
            return (), kept
        first = content[0] if isinstance(content, (list, tuple)) else content
        return (first if isinstance(first, tuple) else (first,)), {}


def _checked(batches: Any) -> Iterable[Any] | Callable[[], Iterable[Any]]:
    if isinstance(batches, Tensor):
        raise InputError(
            "Cannot use a tensor as batches: its rows would be taken one by one. Give a loader or a"
            " list, such as x.split(32)."
        )
    if isinstance(batches, (str, bytes, dict)) or not (
        callable(batches) or isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
    ):
        raise InputError(
            f"Cannot use a {type(batches).__name__} as batches: give a loader or a list of batches."
        )
    given: Iterable[Any] | Callable[[], Iterable[Any]] = batches
    return given


def _samples(raw: Any, tensors: Sequence[Tensor]) -> int:
    """The rows of the first tensor, or the images of a list (as detection models take them)."""
    first = raw[0] if isinstance(raw, (list, tuple)) and raw else raw
    if isinstance(first, list) and all(isinstance(item, Tensor) for item in first):
        return len(first)
    return int(tensors[0].shape[0]) if tensors else 0


def _likes_channels_last(model: nn.Module, device: torch.device) -> bool:
    if device.type != "cpu":
        return False
    return any(isinstance(module, nn.Conv2d) for _, module in named_modules(model))


def _keywords(model: nn.Module) -> frozenset[str] | None:
    """The names that `forward` takes; None where it takes any."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")
