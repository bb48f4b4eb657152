"""Which module of a model draws random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from bntools.modules import named_modules
from bntools.outputs import flatten

__all__ = ["random_module"]


@dataclass(frozen=True)
class _Call:
    path: str
    module: nn.Module
    given: list[Tensor]
    gave: list[Tensor]


def random_module(model: nn.Module, forward: Callable[[int], Any]) -> str:
    """Name the module whose own code gives something else for the same input and another seed.

    `forward` runs the model with a seed. The first call that gives other values for the same
    input is to blame; where its input differs already, the module around it. "" where that cannot
    be told.
    """
    try:
        calls = [_recorded(model, forward, seed) for seed in (0, 1)]
    except Exception:  # noqa: BLE001 - models raise anything; then nobody is named
        return ""
    for one, other in zip_longest(*calls):
        if one is None or other is None or one.path != other.path:
            return ""
        if _same(one.gave, other.gave):
            continue
        if _same(one.given, other.given):
            return _named(one.path, one.module)
        parent = one.path.rpartition(".")[0]
        return _named(parent, dict(named_modules(model)).get(parent, model))
    return _named("", model)


def _named(path: str, module: nn.Module) -> str:
    mode = ", in training mode" if module.training and not isinstance(module, nn.Sequential) else ""
    return f"{path or 'the model itself'} ({type(module).__name__}{mode})"


def _recorded(model: nn.Module, forward: Callable[[int], Any], seed: int) -> list[_Call]:
    calls: list[_Call] = []
    with _hooked(model, calls):
        forward(seed)
    return calls


@contextmanager
def _hooked(model: nn.Module, calls: list[_Call]) -> Iterator[None]:
    handles = []
    try:
        for path, module in named_modules(model):
            pending: list[list[Tensor]] = []

            def before(
                _: nn.Module, args: Any, kwargs: Any, pending: list[list[Tensor]] = pending
            ) -> None:
                pending.append(_marks((args, kwargs)))

            def after(
                module: nn.Module,
                _: Any,
                out: Any,
                path: str = path,
                pending: list[list[Tensor]] = pending,
            ) -> None:
                calls.append(_Call(path, module, pending.pop(), _marks(out)))

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _marks(value: Any) -> list[Tensor]:
    """A few numbers that tell two values apart."""
    found = []
    for tensor in flatten(value).values():
        exact = tensor.detach().double().flatten()
        weights = torch.linspace(1, 2, max(1, exact.numel()), dtype=exact.dtype)
        found.append(torch.stack([exact.sum(), (exact * weights.to(exact.device)).sum()]).cpu())
    return found


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.allclose(a, b, rtol=1e-6, atol=0, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )
