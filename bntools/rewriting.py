"""Rewriting the forward of one submodule, where an activation goes from one call site alone.

The submodule's own `forward` is traced with torch.fx, all of its children as leaves; the children
stay where they are and keep their names. The object gets a subclass of its class, of which nothing
but `forward` is new. What is stored is which activations went, never code: a file or a copy traces
the class again.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer

from bntools.errors import SurgeryError
from bntools.modules import get_module, preserved

__all__ = ["TAKEN_MODULES", "Rewritten", "remove_activation_after", "retrace", "why_not_removable"]

_NAMES = {
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "silu", "gelu", "hardswish", "elu",
    "sigmoid", "tanh",
}  # fmt: skip
_KEY = "_bntools_removed"
_Forward = tuple[str, Callable[..., Any]]
TAKEN_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.ELU,
    nn.Sigmoid, nn.Tanh,
)  # fmt: skip
_BY_HAND = {"__call__", "__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__"}
_TABLES = ("_parameters", "_buffers", "_modules")


class Rewritten(nn.Module):
    """Marks a module whose forward was rewritten, and makes it again out of a file.

    Pickles hold the module as it was, with the paths after which activations were removed.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__mro__[2]
        plain: nn.Module = object.__new__(base)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k != _KEY})
        return Rewritten, (), {"module": plain, "removed": list(self.__dict__[_KEY])}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        plain, removed = state.get("module"), state.get("removed")
        if not isinstance(plain, nn.Module) or not isinstance(removed, list):
            raise _cannot(self, "what was stored of it is damaged")
        self.__class__ = _pending(type(plain))  # type: ignore[assignment] # a subclass, made just now
        self.__dict__.clear()
        self.__dict__.update(plain.__dict__)
        _rewrite(self, [str(path) for path in removed])


def remove_activation_after(module: nn.Module, child: str) -> None:
    """Remove the activation that `forward` applies to what the submodule at `child` gives.

    It has to be the only user of that, at every call. Raises SurgeryError where the forward cannot
    be traced, or applies no activation there.
    """
    if isinstance(module, GraphModule):
        _edit(module, module.graph, child)
        module.recompile()
    else:
        _rewrite(module, [*module.__dict__.get(_KEY, ()), child])


def why_not_removable(module: nn.Module, child: str) -> str:
    """Why `remove_activation_after` would refuse; empty where it would not. Nothing changes."""
    try:
        if isinstance(module, GraphModule):
            graph = Graph()
            graph.output(graph.graph_copy(module.graph, {}))
            _edit(module, graph, child)
        else:
            base = _base(module)
            for training in (False, True):
                _traced(module, base, [*module.__dict__.get(_KEY, ()), child], training=training)
    except SurgeryError as error:
        return str(error).partition(": ")[2].rstrip(".")
    return ""


def retrace(module: nn.Module) -> None:
    """Give a module its own forward again as torch.fx sees it, with nothing removed."""
    if not isinstance(module, GraphModule):
        _rewrite(module, [*module.__dict__.get(_KEY, ())])


def _rewrite(module: nn.Module, removed: Sequence[str]) -> None:
    """Give a module the forward of its class without the activations after some children."""
    base, forwards = _forwards(module, removed)
    namespace = {
        "forward": _by_mode(base, *forwards),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    module.__class__ = type(base.__name__, (Rewritten, base), namespace)
    module.__dict__[_KEY] = tuple(removed)


def _forwards(
    module: nn.Module, removed: Sequence[str]
) -> tuple[type[nn.Module], tuple[_Forward, _Forward]]:
    """The class of a module, and its forward in eval and in training mode."""
    base = _base(module)
    evaluating = _forward(module, base, removed, training=False)
    return base, (evaluating, _forward(module, base, removed, training=True))


def _base(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was rewritten; raises where it cannot be."""
    base = type(module).__mro__[2] if isinstance(module, Rewritten) else type(module)
    own = sorted(_BY_HAND & _defined(base)) or sorted({"forward"} & module.__dict__.keys())
    if own:
        raise _cannot(module, f"it has its own {own[0]}, which would be lost")
    return base


def _pending(base: type[nn.Module]) -> type[nn.Module]:
    return type(base.__name__, (Rewritten, base), {})


def _defined(base: type) -> set[str]:
    """The names that the classes below nn.Module define."""
    found: set[str] = set()
    for cls in base.__mro__:
        if cls is nn.Module:
            break
        found.update(vars(cls))
    return found


class _Leaves(Tracer):
    """Traces a module's own forward and nothing of its children's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m, module_qualified_name
        return True


def _forward(
    module: nn.Module, base: type[nn.Module], removed: Sequence[str], *, training: bool
) -> _Forward:
    """The code and the function of a forward in one mode, activations removed."""
    shell, graph = _traced(module, base, removed, training=training)
    made = GraphModule(shell, graph, base.__name__)
    return made.code, type(made).forward


def _traced(
    module: nn.Module, base: type[nn.Module], removed: Sequence[str], *, training: bool
) -> tuple[nn.Module, Graph]:
    """The graph of a forward in one mode, activations removed, and the object that it is of."""
    shell = _shell(module, base, training=training)
    before = dict(shell.__dict__)
    tables = {name: dict(before[name]) for name in _TABLES}
    with preserved(module), torch.no_grad():
        try:
            graph = _Leaves().trace(shell)
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise _cannot(module, f"torch.fx cannot trace its forward ({why})") from error
    now = shell.__dict__
    same = now.keys() == before.keys() and all(now[k] is v for k, v in before.items())
    if not same or any(now[name] != table for name, table in tables.items()):
        raise _cannot(module, "its forward sets attributes, or makes tensors of its own")
    for child in removed:
        _edit(shell, graph, child)
    return shell, graph


def _shell(module: nn.Module, base: type[nn.Module], *, training: bool) -> nn.Module:
    """The same module as another object, so that a trace may set attributes."""
    shell: nn.Module = object.__new__(base)
    shell.__dict__.update({k: v for k, v in module.__dict__.items() if k != _KEY})
    for name in _TABLES:
        shell.__dict__[name] = dict(module.__dict__[name])
    shell.__dict__["training"] = training
    return shell


def _by_mode(
    base: type[nn.Module],
    evaluating: _Forward,
    training: _Forward,
) -> Callable[..., Any]:
    """One forward, which asks for the mode only where the two differ."""
    if evaluating[0] == training[0]:
        return evaluating[1]

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (training if self.training else evaluating)[1](self, *args, **kwargs)

    return forward


def _edit(module: nn.Module, graph: Graph, child: str) -> None:
    """Erase the activations that take what a child gives."""
    wanted = get_module(module, child)
    calls = [
        node
        for node in graph.nodes
        if node.op == "call_module" and get_module(module, str(node.target)) is wanted
    ]
    if not calls:
        raise _cannot(module, f"its forward does not call {child}")
    for call in calls:
        users = list(call.users)
        if len(users) != 1 or not _is_activation(module, users[0], call):
            said = ", ".join(str(user.target) for user in users) or "nothing"
            raise _cannot(module, f"what it does with {child} is {said}, no activation alone")
        users[0].replace_all_uses_with(call)
        graph.erase_node(users[0])
    graph.lint()


def _is_activation(module: nn.Module, node: Node, data: Node) -> bool:
    if not node.args or node.args[0] is not data or node.all_input_nodes.count(data) != 1:
        return False
    if node.op == "call_module":
        found = get_module(module, str(node.target))
        return any(type(found).forward is cls.forward for cls in TAKEN_MODULES)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name.rstrip("_") in _NAMES


def _cannot(module: nn.Module, why: str) -> SurgeryError:
    name = type(module).__name__
    return SurgeryError(f"Cannot rewrite the forward of a {name}: {why}.")
