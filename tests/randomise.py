"""Statistics and affine parameters that show mistakes: fresh models (0, 1, 1, 0) hide every bug."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

__all__ = [
    "cast",
    "difference",
    "named_modules",
    "norms",
    "outputs",
    "randomise",
    "run",
    "settle",
    "truth_error",
]


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, under its first name; classes may shadow `modules`."""
    return nn.Module.named_modules(model)


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold running statistics, or are batch norms without any."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    return {
        path: module
        for path, module in named_modules(model)
        if isinstance(module, batch_norm) or isinstance(_tensor(module, "running_var"), Tensor)
    }


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw statistics and affine parameters of every norm, and small noise for all-zero vectors."""
    random = torch.Generator().manual_seed(seed)
    done = set()
    for module in norms(model).values():
        for name, draw in _DRAWS.items():
            tensor = _tensor(module, name)
            if tensor is not None:
                tensor.copy_(draw(tensor.shape, random))
                done.add(id(tensor))
    for tensor in model.parameters():
        if is_lazy(tensor) or id(tensor) in done or tensor.ndim > 1:
            continue
        if tensor.is_floating_point() and not tensor.any():
            tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.1)


@torch.no_grad()
def settle(model: nn.Module, inputs: Any) -> None:
    """Give every norm the statistics of what it sees in one eval forward, so deep nets stay finite.

    Channels that are constant, or one value long, get a variance of 1; random affine parameters
    stay.
    """
    nn.Module.train(model, False)
    with ExitStack() as hooks:
        for module in norms(model).values():
            if isinstance(_tensor(module, "running_var"), Tensor):
                handle = module.register_forward_pre_hook(_take_statistics)
                hooks.callback(handle.remove)
        run(model, inputs)


def run(model: nn.Module, inputs: Any) -> Any:
    """Call a model the way bntools does, with a tensor, positional or keyword arguments.

    The model gets copies, as it may write to its inputs.
    """
    inputs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """The same inputs with every floating-point tensor in another dtype."""

    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return tree_map(one, inputs)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Every tensor and number that a forward returns, also inside dataclasses and other objects."""
    return list(_leaves(run(model, inputs)))


def difference(candidate: list[Tensor], truth: list[Tensor]) -> float:
    """The worst relative L2 difference over outputs; inf for other shapes or NaN elsewhere."""
    if len(candidate) != len(truth) or not truth:
        return float("inf")
    return max(_relative(a, b) for a, b in zip(candidate, truth, strict=True))


def truth_error(model: nn.Module, folded: nn.Module, inputs: Any) -> float:
    """How far a fold is from its model, both run in float64; cast a model before folding it.

    The cast copies: both models and the inputs stay as they are.
    """
    exact = cast(inputs, torch.float64)
    truth = outputs(_in_float64(model), exact)
    return difference(outputs(_in_float64(folded), exact), truth)


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) and not is_lazy(value) else None


def _gamma(shape: torch.Size, random: torch.Generator) -> Tensor:
    size = torch.rand(shape, generator=random) + 0.5
    return torch.where(torch.rand(shape, generator=random) < 0.1, -size, size)


_DRAWS: dict[str, Callable[[torch.Size, torch.Generator], Tensor]] = {
    "running_mean": lambda shape, random: torch.randn(shape, generator=random) * 0.5,
    "running_var": lambda shape, random: torch.rand(shape, generator=random) * 3.75 + 0.25,
    "weight": _gamma,
    "bias": lambda shape, random: torch.randn(shape, generator=random) * 0.5,
    "num_batches_tracked": lambda shape, random: torch.full(shape, 100),
}


def _take_statistics(module: Any, args: tuple[Any, ...]) -> None:
    x = args[0].detach().double().transpose(0, 1).flatten(1)
    if x.shape[0] != module.running_var.numel():
        return
    variance = x.var(dim=1, correction=0)
    module.running_mean.copy_(x.mean(dim=1).nan_to_num())
    usable = variance.isfinite() & (variance > 1e-6)
    module.running_var.copy_(torch.where(usable, variance, 1.0))


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, (bool, int, float)):
        yield torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif hasattr(value, "__dict__"):
        yield from _leaves(vars(value))


def _relative(candidate: Tensor, truth: Tensor) -> float:
    if candidate.shape != truth.shape:
        return float("inf")
    a, b = candidate.double(), truth.double()
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    a, b = a[finite], b[finite]
    if not a.isfinite().all() or not b.numel():
        return float("inf")
    return float((a - b).norm()) / max(float(b.norm()), 1e-300)


def _in_float64(model: nn.Module) -> nn.Module:
    state = [*model.parameters(), *model.buffers()]
    if all(t.dtype == torch.float64 for t in state if t.is_floating_point()):
        return model
    return copy.deepcopy(model).double()
