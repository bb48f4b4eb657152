"""Which layers can be frozen, unfrozen or converted, and why the others cannot."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bntools.norms.conversion import FORMS, from_frozen_batchnorm
from bntools.norms.evonorm import EvoNormB0
from bntools.norms.frozen import (
    Frozen,
    FrozenNorm,
    freeze_module,
    frozen_class,
    is_frozen,
    thawed_class,
)
from bntools.report import Reason

__all__ = ["DIMS", "Refusal", "counts", "freezing", "kind_of", "unfreezing", "unsyncing"]

# Why a layer is left alone; in place of it a sentence says what a layer would become.
Refusal = tuple[Reason, str]

_BatchNorm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - the base of all has no other name
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
# The dimensions of the batch norm for inputs of each rank.
DIMS = {2: 1, 3: 1, 4: 2, 5: 3}
_AGREES = 1e-5


def counts(module: nn.Module) -> bool:
    """Whether a layer has running statistics, or is of a class that could have."""
    if isinstance(module, (_BatchNorm, EvoNormB0)) or is_frozen(module):
        return True
    if "BatchNorm" in kind_of(module) and isinstance(module, torch.jit.ScriptModule):
        return True
    return isinstance(getattr(module, "running_var", None), Tensor)


def kind_of(module: nn.Module) -> str:
    """The name of a layer's class, from before TorchScript compiled it."""
    return str(getattr(module, "original_name", type(module).__name__))


def freezing(module: nn.Module, *, affine: bool, form: str) -> Refusal | str:
    """Why a layer cannot be frozen in a form, or what it would become."""
    if isinstance(module, torch.jit.ScriptModule):
        return Reason.SCRIPTED, "it is compiled by TorchScript; freeze before scripting"
    if is_frozen(module) and not isinstance(module, Frozen):
        return Reason.ALREADY_FROZEN, "it has no other mode; unfreeze makes it a batch norm"
    if any(t is not None and is_lazy(t) for t in _tensors(module)):
        return Reason.UNINITIALIZED, "it is lazy: run the model once on an example, then freeze"
    if not _has_statistics(module):
        return Reason.NO_STATISTICS, _without_statistics(module)
    if "parametrizations" in module._modules:
        return Reason.COMPUTED_AFFINE, "its tensors are parametrized; remove that first"
    if "forward" in module.__dict__:
        return Reason.MORE_THAN_NORM, "its forward was set on the layer itself; remove that first"
    if form != FORMS[0]:
        return _freezing_as_torchvision(module)
    if isinstance(module, Frozen):
        return _freezing_again(module, affine=affine)
    return _freezing_by_class(module, affine=affine)


def _freezing_again(module: nn.Module, *, affine: bool) -> Refusal | str:
    if affine and "_grad_before" not in module.__dict__:
        return f"{kind_of(module)}, its affine too"
    return Reason.ALREADY_FROZEN, "it is frozen as it is"


def _freezing_by_class(module: nn.Module, *, affine: bool) -> Refusal | str:
    try:
        cls = frozen_class(type(module))
        problem = _moves_anyway(module) if issubclass(cls, FrozenNorm) else ""
    except TypeError as error:
        return Reason.MORE_THAN_NORM, f"no class can be derived from its own: {error}"
    if problem:
        return Reason.MORE_THAN_NORM, problem
    return f"{cls.__name__}{', its affine too' if affine and _has_affine(module) else ''}"


def _freezing_as_torchvision(module: nn.Module) -> Refusal | str:
    cls = thawed_class(type(module)) or type(module)
    if any(module.__dict__.get(name) for name in _HOOKS):
        return Reason.HOOKS, "it has hooks, which would be lost with it; remove them first"
    if cls is nn.BatchNorm2d:
        return "torchvision's FrozenBatchNorm2d"
    if f"{cls.__module__}.{cls.__name__}" == "timm.layers.norm_act.BatchNormAct2d":
        return "timm's FrozenBatchNormAct2d"
    if issubclass(cls, nn.SyncBatchNorm):
        return Reason.NO_SUCH_FORM, "it takes inputs of any rank; make it a BatchNorm2d first"
    return Reason.NO_SUCH_FORM, f"torchvision has no frozen form of a {cls.__name__}"


def unfreezing(module: nn.Module) -> Refusal | str:
    """Why a layer cannot be unfrozen, or what it would become."""
    if isinstance(module, torch.jit.ScriptModule):
        return Reason.SCRIPTED, "it is compiled by TorchScript; unfreeze before scripting"
    if not is_frozen(module):
        return Reason.NOT_FROZEN, "it is not frozen"
    if isinstance(module, Frozen):
        cls = thawed_class(type(module))
        if cls is None:
            return Reason.MORE_THAN_NORM, "its class was written frozen, and is no other's"
        return cls.__name__
    if any(module.__dict__.get(name) for name in _HOOKS):
        return Reason.HOOKS, "it has hooks, which would be lost with it; remove them first"
    return _unfreezing_foreign(module)


def _unfreezing_foreign(module: nn.Module) -> Refusal | str:
    try:
        made = from_frozen_batchnorm(module).eval()
        own = copy.deepcopy(module).eval().double()
        given: Any = module.running_var
        x = torch.randn(2, given.numel(), 3, 3, generator=torch.Generator().manual_seed(0))
        x = x.to(given.device, torch.float64)
        with torch.no_grad():
            gap = (made.double()(x) - own(x.clone())).norm() / own(x.clone()).norm()
    except Exception as error:  # noqa: BLE001 - foreign code raises anything
        told = " ".join(str(error).split())[:100]
        return Reason.MORE_THAN_NORM, f"it is no batch norm of (N, C, H, W): {told}"
    if not gap <= _AGREES:
        return Reason.MORE_THAN_NORM, "its forward gives something else than a batch norm"
    return type(made).__name__


def unsyncing(module: nn.Module, ranks: frozenset[int]) -> Refusal | str:
    """Why a SyncBatchNorm that sees inputs of these ranks stays one, or what it would become."""
    dims = {DIMS[rank] for rank in ranks}
    if not dims:
        return Reason.NOT_EXECUTED, "it did not run, so the dimensions of its inputs are unknown"
    if len(dims) > 1:
        return Reason.DATA_DEPENDENT, "its inputs are of more than one rank"
    cls = thawed_class(type(module)) or type(module)
    frozen = "Frozen" if isinstance(module, Frozen) else ""
    name = f"{cls.__module__}.{cls.__name__}"
    if cls is nn.SyncBatchNorm:
        return f"{frozen}BatchNorm{dims.pop()}d"
    if name == "timm.layers.norm_act.SyncBatchNormAct" and dims == {2}:
        return f"{frozen}BatchNormAct2d"
    return Reason.MORE_THAN_NORM, f"{cls.__name__} has no counterpart without synchronisation"


def _tensors(module: nn.Module) -> Iterator[Tensor | None]:
    yield from module._parameters.values()
    yield from module._buffers.values()


def _has_affine(module: nn.Module) -> bool:
    return any(module._parameters.get(name) is not None for name in ("weight", "bias", "v"))


def _has_statistics(module: nn.Module) -> bool:
    needed = ["running_var"]
    if isinstance(module, _BatchNorm):
        needed.append("running_mean")
    return all(isinstance(getattr(module, name, None), Tensor) for name in needed)


def _without_statistics(module: nn.Module) -> str:
    if isinstance(module, EvoNormB0) and not module.nonlinearity:
        return "it has no running statistics: without its nonlinearity it is an affine"
    return (
        "it has no running statistics (track_running_stats=False) and normalises each batch by"
        " itself"
    )


def _moves_anyway(module: nn.Module) -> str:
    """What a frozen copy does that it should not; "" where it behaves, or runs on no input.

    Raises TypeError where the layer cannot be given another class.
    """
    trial = _copied(module)
    if trial is None:
        return ""
    freeze_module(trial)
    statistics: Any = module.running_var
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for rank in DIMS:
            x = torch.randn([4, statistics.numel()] + [3] * (rank - 2), generator=random)
            with suppress(Exception):  # a layer of another rank, or code that raises anything
                return _moved(trial, x.to(statistics.device, statistics.dtype))
    return ""


def _copied(module: nn.Module) -> nn.Module | None:
    try:
        return copy.deepcopy(module)
    except Exception:  # noqa: BLE001 - a layer may fail to be copied in any way
        return None


def _moved(trial: Any, x: Tensor) -> str:
    before = {name: t.clone() for name, t in trial._buffers.items() if t is not None}
    trial.train().forward(x.clone())
    if any(not torch.equal(t, trial._buffers[name]) for name, t in before.items()):
        return "its forward changes its statistics in eval mode, too"
    trial.eval()
    together, alone = trial.forward(x.clone())[:1], trial.forward(x[:1].clone())
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4):
        return "its forward uses the statistics of the batch in eval mode, too"
    return ""
