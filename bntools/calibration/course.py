"""How many norm layers run in a forward: what comes after the last of them need not be done."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from bntools.dataflow.guard import Watch
from bntools.modules import named_modules

__all__ = ["Course"]

_LEAVING = frozenset(
    {
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        torch.Tensor.__array__,
        torch.Tensor.__dlpack__,
        torch.Tensor.__reduce_ex__,
        torch.Tensor.untyped_storage,
        torch.Tensor.storage,
        torch.Tensor.data_ptr,
    }
)
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_TELLING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Course:
    """Knows after how many norm calls a forward may end, for inputs of each form.

    The first batch of every form runs to its end, watched: if no number, shape or random state
    came out of a tensor and no module remembered anything, the way through the model depends on
    the form of the input alone, and the number of calls is that of every batch of this form.
    """

    def __init__(self, model: nn.Module, ours: Collection[nn.Module] = ()) -> None:
        """`ours` are modules of which we change the buffers ourselves."""
        self._model = model
        self._ours = frozenset(map(id, ours))
        self._calls: dict[Any, int | None] = {}
        self._watch: _Numbers | None = None

    def length(self, raw: Any) -> int | None:
        """The number of norm calls of a batch like this one; None where it is not known."""
        form = _form(raw)
        return None if form is None else self._calls.get(form)

    @contextmanager
    def noted(self, raw: Any, calls: Sequence[Any]) -> Iterator[None]:
        """Run a forward, whose norm calls grow `calls`; the first of its form is watched."""
        form = _form(raw)
        if form is None or form in self._calls:
            yield
            return
        before = self._remembered()
        self._watch = _Numbers()
        try:
            with _Functions(self._watch), self._watch:
                yield
            fixed = not self._watch.numbers and _same(before, self._remembered())
            self._calls[form] = len(calls) if fixed else None
        finally:
            self._watch = None

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """What happens inside is ours, not the model's."""
        watch = self._watch
        if watch is None:
            yield
            return
        watch.paused = True
        try:
            yield
        finally:
            watch.paused = False

    def _remembered(self) -> list[Any]:
        """What a forward may leave behind: plain attributes of modules, and random states."""
        kept: list[Any] = [torch.get_rng_state(), random.getstate()]
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            _, keys, position, *_ = numpy.random.get_state()
            kept.append((keys.tobytes(), position))
        for _, module in named_modules(self._model):
            for name, value in module.__dict__.items():
                if isinstance(value, _PLAIN):
                    kept.append((name, value))
                elif isinstance(value, (list, set, dict)):
                    kept.append((name, len(value)))
            if id(module) not in self._ours:
                kept.extend((name, _state(tensor)) for name, tensor in module._buffers.items())
        return kept


class _Numbers(Watch):  # type: ignore[no-untyped-call]
    """Notes operations whose result is a number, or has a shape that depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = False
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.paused and not self.numbers:
            foreign = func.namespace not in ("aten", "prim", "prims", "mkldnn")
            self.numbers = foreign or any(tag in func.tags for tag in _TELLING)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Notes tensors that leave torch."""

    def __init__(self, watch: _Numbers) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LEAVING and not self.watch.paused:
            self.watch.numbers = True
        return func(*args, **(kwargs or {}))


def _form(raw: Any) -> Any:
    """What may decide the way through a model, numbers in tensors apart; None where unknown."""
    leaves, structure = tree_flatten(raw)
    form: list[Any] = [str(structure)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            form.append((tuple(leaf.shape), leaf.dtype))
        elif isinstance(leaf, _PLAIN):
            form.append((type(leaf), leaf))
        else:
            return None
    return tuple(form)


def _state(tensor: Tensor | None) -> Any:
    if tensor is None or tensor.is_inference():
        return None
    return id(tensor), tensor._version


def _same(a: list[Any], b: list[Any]) -> bool:
    if len(a) != len(b):
        return False
    return torch.equal(a[0], b[0]) and all(x == y for x, y in zip(a[1:], b[1:], strict=True))
