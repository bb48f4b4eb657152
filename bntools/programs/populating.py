"""Putting layers and tensors into a program, each under its path."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from bntools.programs.program import Program, Scope

__all__ = ["populate"]


def populate(
    program: Program,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    transient: Collection[str],
) -> None:
    """Put layers and tensors where they belong, in the order of the tensors."""
    for name in tensors:
        _scope(program, name.rpartition(".")[0])
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        scope = _scope(program, parent)
        inside = scope._modules.get(name)
        module._modules.update(inside._modules if inside is not None else {})
        scope._modules[name] = module
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = _scope(program, path)
        if not attribute or attribute in owner._modules:
            raise ValueError(f"the tensor {name} has the name of a module")
        owner._parameters.pop(attribute, None)
        owner._buffers.pop(attribute, None)
        if isinstance(tensor, nn.Parameter):
            owner._parameters[attribute] = tensor
            continue
        owner._buffers[attribute] = tensor
        if name in transient:
            owner._non_persistent_buffers_set.add(attribute)
    _join(program, modules)
    for module in modules.values():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base of all has no other name
            _settle_counter(module)


def _join(program: Program, modules: Mapping[str, nn.Module]) -> None:
    """A layer that is there under two names has its tensors under both: make it one again."""
    known = {_contents(m): m for path, m in modules.items() if m._parameters or m._buffers}
    for parent in list(program.modules()):
        for name, child in parent._modules.items():
            twin = known.get(_contents(child)) if type(child) is Scope else None
            if child is not None and twin is not None and not child._modules:
                parent._modules[name] = twin


def _contents(module: nn.Module | None) -> frozenset[tuple[str, int]]:
    if module is None:
        return frozenset()
    tensors = (*module._parameters.items(), *module._buffers.items())
    return frozenset((name, id(tensor)) for name, tensor in tensors if tensor is not None)


def _settle_counter(norm: Any) -> None:
    """A norm that was exported without its counter has none."""
    counter = norm._buffers.get("num_batches_tracked")
    if counter is not None and counter.is_meta:
        norm._buffers["num_batches_tracked"] = None


def _scope(program: Program, path: str) -> nn.Module:
    """The module at a path, made where it is missing."""
    module: nn.Module = program
    for name in path.split(".") if path else ():
        if not name:
            raise ValueError("a tensor has a path with an empty part")
        if name not in module._modules or module._modules[name] is None:
            module._modules[name] = Scope()
        found = module._modules[name]
        if found is None:  # never: made above
            raise ValueError(path)
        module = found
    return module
