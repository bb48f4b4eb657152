"""Who owns which tensor of a model, and which of its modules are norm layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bntools.dataflow.graph import NormLayer
from bntools.modules import is_unmade, named_modules
from bntools.registry import norm_rule
from bntools.report import Reason

__all__ = [
    "BatchNorm",
    "Ownership",
    "editing_refusal",
    "has_hooks",
    "is_norm_layer",
    "may_have_chains",
    "norm_layers",
]

BatchNorm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - the base of all has no other name
_STANDARD = (BatchNorm.forward, nn.SyncBatchNorm.forward)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_BATCH_NORM_NAMES = {
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "FrozenBatchNorm2d",
}  # fmt: skip
_STATISTICS = {"running_mean", "running_var"}


class Ownership:
    """The canonical name of each module and tensor: the first path under which it is found.

    `absent` are the registered parameters that are None (the bias of a conv without one); `tied`
    maps a tensor's name to its names in other modules, or under other attributes; `sealed` are the
    paths of modules that cannot be edited (TorchScript).
    """

    def __init__(self, model: nn.Module) -> None:
        self.paths: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}
        self.owners: dict[str, str] = {}
        self.absent: set[str] = set()
        self.tied: dict[str, tuple[str, ...]] = {}
        self.sealed: set[str] = set()
        for path, module in named_modules(model):
            if id(module) not in self.paths:
                self.paths[id(module)] = path
                self._add(path, module)

    def _add(self, path: str, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            self.sealed.add(path)
        prefix = f"{path}." if path else ""
        for table in (module._parameters, module._buffers):
            for attribute, tensor in table.items():
                name = prefix + attribute
                if tensor is None or is_lazy(tensor):
                    self.absent.add(name)
                    continue
                known = self.names.setdefault(id(tensor), name)
                if known != name:
                    self.tied[known] = (*self.tied.get(known, ()), name)
                    continue
                self.tensors[name] = tensor
                self.owners[name] = path

    def owner_of(self, name: str | None) -> str | None:
        """The path of the module that holds a tensor; None for a name that nobody holds."""
        return self.owners.get(name) if name is not None else None


def is_norm_layer(module: nn.Module) -> bool:
    """Whether a module counts as a norm layer: batch norms, registered and recognised classes."""
    if isinstance(module, BatchNorm) or norm_rule(module) is not None:
        return True
    return _is_scripted_norm(module)


def _is_scripted_norm(module: nn.Module) -> bool:
    """Whether TorchScript was a batch norm: by its name, or by what it holds (timm's, a user's)."""
    name = _scripted_name(module)
    if not name or name.startswith("InstanceNorm"):
        return False
    held = dict(module.named_buffers(recurse=False))
    return name in _BATCH_NORM_NAMES or held.keys() >= _STATISTICS


def may_have_chains(model: nn.Module) -> bool:
    """Whether a module that is none of torch's holds a tensor, or could be arithmetic alone."""
    for _, module in named_modules(model):
        own = not type(module).__module__.startswith("torch.nn.modules.")
        if own and not isinstance(module, torch.jit.ScriptModule):
            attributes = (*module._parameters.values(), *module._buffers.values())
            plain = (isinstance(value, Tensor) for value in module.__dict__.values())
            if not module._modules or any(t is not None for t in attributes) or any(plain):
                return True
    return False


def norm_layers(model: nn.Module) -> tuple[NormLayer, ...]:
    """Every norm layer of a model, each once, under its first path."""
    found: dict[int, NormLayer] = {}
    for path, module in named_modules(model):
        if id(module) not in found and is_norm_layer(module):
            found[id(module)] = _norm_layer(path, module)
    return tuple(found.values())


def _norm_layer(path: str, module: nn.Module) -> NormLayer:
    name = _scripted_name(module)
    if name:
        detail = "it is compiled by TorchScript and cannot be edited; fold before scripting"
        return NormLayer(path, name, refusal=(Reason.SCRIPTED, detail))
    rule = norm_rule(module)
    standard = getattr(type(module), "forward", None) in _STANDARD
    return NormLayer(
        path,
        type(module).__name__,
        plain=(standard or rule is not None) and "forward" not in module.__dict__,
        remainder=rule is not None and rule.remainder is not None,
        refusal=_refusal(module),
    )


def _refusal(module: nn.Module) -> tuple[Reason, str] | None:
    if isinstance(module, BatchNorm):
        if module.running_mean is None or module.running_var is None:
            return Reason.NO_STATISTICS, (
                "it has no running statistics (track_running_stats=False) and normalises each"
                " batch by itself"
            )
        if module.training:
            return Reason.TRAINING_MODE, (
                "it stays in training mode and normalises with batch statistics; call eval() on it"
            )
    return editing_refusal(module)


def editing_refusal(module: nn.Module) -> tuple[Reason, str] | None:
    """What would be lost if something else took a layer's place, or None."""
    if type(module).__call__ is not nn.Module.__call__:
        return Reason.MORE_THAN_NORM, "its class overrides __call__, which would be lost with it"
    if not is_unmade(module) and has_hooks(module):
        return Reason.HOOKS, "it has hooks, which would be lost with it; remove them first"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after a module."""
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def _scripted_name(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", ""))
    return ""
