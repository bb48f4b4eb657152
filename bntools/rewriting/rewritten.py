"""Modules whose forward was rewritten: how they are made, and made again out of a file.

The submodule's own `forward` is traced with torch.fx, all of its children as leaves, in eval and in
training mode, and with optional arguments given and None; other attributes that the forward asks
count as they are. The children stay where they are and keep their names. The object gets a subclass
of its class, of which nothing but `forward` is new. What is stored is what was changed, never code:
a file traces the class again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from bntools.errors import SurgeryError
from bntools.rewriting.bypass import Bypass
from bntools.rewriting.removal import Removal, is_sequential, slots_after
from bntools.rewriting.tracing import (
    KEY,
    Change,
    all_cases,
    by_case,
    cannot,
    eval_case,
    own_names,
)

__all__ = [
    "Rewritten",
    "base_of",
    "changes_of",
    "own_graph",
    "remove_activation_after",
    "retrace",
    "rewrite",
    "why_not",
    "why_not_removable",
]

_BY_HAND = {"__call__", "__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__"}


class Rewritten(nn.Module):
    """Marks a module whose forward was rewritten, and makes it again out of a file.

    Pickles hold the module as it was, with what was changed: the paths after which activations were
    removed, and the sums of branches that became one call.
    """

    __module__ = "bntools.rewriting"  # the name that files have for it

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__mro__[2]
        plain: nn.Module = object.__new__(base)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k != KEY})
        return Rewritten, (), {"module": plain, "removed": list(self.__dict__[KEY])}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        plain, removed = state.get("module"), state.get("removed")
        if not isinstance(plain, nn.Module) or not isinstance(removed, list):
            raise cannot(self, "what was stored of it is damaged")
        self.__class__ = _pending(type(plain))  # type: ignore[assignment] # a subclass, made just now
        self.__dict__.clear()
        self.__dict__.update(plain.__dict__)
        try:
            changes = [_change_of(stored) for stored in removed]
        except ValueError as error:
            raise cannot(self, f"what was stored of it is damaged: {error}") from error
        _rewrite(self, changes)


def rewrite(module: nn.Module, change: Change) -> None:
    """Make one more change to a module's forward; raises SurgeryError where it cannot be made."""
    if isinstance(module, GraphModule):
        change.apply(module, module.graph)
        module.recompile()
    else:
        _rewrite(module, [*changes_of(module), change])


def why_not(module: nn.Module, change: Change) -> str:
    """Why `rewrite` would refuse; empty where it would not. Nothing changes."""
    try:
        if isinstance(module, GraphModule):
            change.apply(*own_graph(module))
        else:
            all_cases(module, base_of(module), [*changes_of(module), change])
    except SurgeryError as error:
        return str(error).partition(": ")[2].rstrip(".")
    return ""


def remove_activation_after(module: nn.Module, child: str) -> None:
    """Remove the activation that `forward` applies to what the submodule at `child` gives.

    It has to be the only user of that, at every call. Raises SurgeryError where the forward cannot
    be traced, or applies no activation there.
    """
    if is_sequential(module):
        for name in slots_after(module, child):
            module._modules[name] = nn.Identity().train(module.training)
    else:
        rewrite(module, Removal(child))


def why_not_removable(module: nn.Module, child: str) -> str:
    """Why `remove_activation_after` would refuse; empty where it would not. Nothing changes."""
    if not is_sequential(module):
        return why_not(module, Removal(child))
    try:
        slots_after(module, child)
    except SurgeryError as error:
        return str(error).partition(": ")[2].rstrip(".")
    return ""


def retrace(module: nn.Module) -> None:
    """Give a module its own forward again as torch.fx sees it, with nothing removed."""
    if not isinstance(module, GraphModule) and not is_sequential(module):
        _rewrite(module, changes_of(module))


def changes_of(module: nn.Module) -> list[Change]:
    """The changes that a module's forward has been through."""
    return [_change_of(stored) for stored in module.__dict__.get(KEY, ())]


def own_graph(module: nn.Module) -> tuple[nn.Module, Graph]:
    """A module's own forward in eval mode as a graph, and the object whose children it calls.

    Raises SurgeryError where it cannot be traced.
    """
    if isinstance(module, GraphModule):
        graph = Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        return module, graph
    return eval_case(module, base_of(module), changes_of(module))


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was rewritten; raises where it cannot be."""
    base = type(module).__mro__[2] if isinstance(module, Rewritten) else type(module)
    own = sorted(_BY_HAND & own_names(base)) or sorted({"forward"} & module.__dict__.keys())
    if own:
        raise cannot(module, f"it has its own {own[0]}, which would be lost")
    return base


def _change_of(stored: Any) -> Change:
    return Removal(stored) if isinstance(stored, str) else Bypass.of(stored)


def _rewrite(module: nn.Module, changes: Sequence[Change]) -> None:
    """Give a module the forward of its class with some changes."""
    base = base_of(module)
    forwards = all_cases(module, base, changes)
    namespace = {
        "forward": by_case(base, forwards),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    module.__class__ = type(base.__name__, (Rewritten, base), namespace)
    module.__dict__[KEY] = tuple(change.stored() for change in changes)


def _pending(base: type[nn.Module]) -> type[nn.Module]:
    return type(base.__name__, (Rewritten, base), {})
