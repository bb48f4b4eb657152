"""Rewriting the forward of one submodule, where an activation goes from one call site alone.

The submodule's own `forward` is traced with torch.fx, all of its children as leaves, in eval and in
training mode, and with optional arguments given and None; other attributes that the forward asks
count as they are. The children stay where they are and keep their names. The object gets a subclass
of its class, of which nothing but `forward` is new. What is stored is which activations went, never
code: a file traces the class again.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx.node import map_arg

from bntools.errors import SurgeryError
from bntools.modules import get_module, named_modules, preserved

__all__ = [
    "TAKEN_MODULES",
    "Rewritten",
    "is_taken",
    "remove_activation_after",
    "retrace",
    "why_not_removable",
]

_NAMES = {
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "silu", "gelu", "hardswish", "elu",
    "sigmoid", "tanh",
}  # fmt: skip
_KEY = "_bntools_removed"
_MOST_OPTIONAL = 2
_Forward = tuple[str, Callable[..., Any]]
TAKEN_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.ELU,
    nn.Sigmoid, nn.Tanh,
)  # fmt: skip
_BY_HAND = {"__call__", "__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__"}
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
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
    if _is_sequential(module):
        for name in _slots_after(module, child):
            module._modules[name] = nn.Identity().train(module.training)
    elif isinstance(module, GraphModule):
        _edit(module, module.graph, child)
        module.recompile()
    else:
        _rewrite(module, [*module.__dict__.get(_KEY, ()), child])


def is_taken(module: nn.Module) -> bool:
    """Whether a module is one of the activations that may be removed, or inherits its forward."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    return any(type(module).forward is cls.forward for cls in TAKEN_MODULES)


def why_not_removable(module: nn.Module, child: str) -> str:
    """Why `remove_activation_after` would refuse; empty where it would not. Nothing changes."""
    try:
        if _is_sequential(module):
            _slots_after(module, child)
        elif isinstance(module, GraphModule):
            graph = Graph()
            graph.output(graph.graph_copy(module.graph, {}))
            _edit(module, graph, child)
        else:
            _all_cases(module, _base(module), [*module.__dict__.get(_KEY, ()), child])
    except SurgeryError as error:
        return str(error).partition(": ")[2].rstrip(".")
    return ""


def retrace(module: nn.Module) -> None:
    """Give a module its own forward again as torch.fx sees it, with nothing removed."""
    if not isinstance(module, GraphModule) and not _is_sequential(module):
        _rewrite(module, [*module.__dict__.get(_KEY, ())])


def _is_sequential(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other: a place in it may be emptied."""
    return type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def _slots_after(module: nn.Module, child: str) -> list[str]:
    """The names under which a Sequential calls the activations after a child."""
    wanted, names = get_module(module, child), list(module._modules)
    found = []
    for place, name in enumerate(names):
        if module._modules[name] is not wanted:
            continue
        rest = (n for n in names[place + 1 :] if not isinstance(module._modules[n], _PASSING))
        after = next(rest, None)
        if after is None or not is_taken(get_module(module, after)):
            raise _cannot(module, f"what follows {name} in it is no activation alone")
        found.append(after)
    return found


def _rewrite(module: nn.Module, removed: Sequence[str]) -> None:
    """Give a module the forward of its class without the activations after some children."""
    base = _base(module)
    forwards = _all_cases(module, base, removed)
    namespace = {
        "forward": _by_case(base, forwards),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    module.__class__ = type(base.__name__, (Rewritten, base), namespace)
    module.__dict__[_KEY] = tuple(removed)


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


@dataclass(frozen=True)
class _Case:
    """What a forward may decide on: the mode, and which optional arguments are None."""

    training: bool
    absent: tuple[bool, ...] = ()


def _optional(base: type[nn.Module]) -> list[tuple[int, str]]:
    """The arguments that are None by default, with their places; of many only the first few."""
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    found = [(i, p.name) for i, p in enumerate(parameters) if p.default is None]
    return found[:_MOST_OPTIONAL]


def _cases(base: type[nn.Module]) -> list[_Case]:
    absent = product((False, True), repeat=len(_optional(base)))
    return [_Case(training, which) for which in absent for training in (False, True)]


def _all_cases(
    module: nn.Module, base: type[nn.Module], removed: Sequence[str]
) -> dict[_Case, _Forward]:
    """The forward in every case; raises where not the same activations go in all of them."""
    forwards: dict[_Case, _Forward] = {}
    first: list[Any] | None = None
    for case in _cases(base):
        shell, graph, gone = _traced(module, base, removed, case)
        first = gone if first is None else first
        if gone != first:
            raise _cannot(module, "which activation follows depends on the mode or the arguments")
        made = GraphModule(shell, graph, base.__name__)
        forwards[case] = made.code, type(made).forward
    return forwards


def _traced(
    module: nn.Module, base: type[nn.Module], removed: Sequence[str], case: _Case
) -> tuple[nn.Module, Graph, list[Any]]:
    """The object and graph of a forward in one case, activations removed, and what these were."""
    shell = _shell(module, base, training=case.training)
    optional = zip(_optional(base), case.absent, strict=True)
    fixed = {name: None for (_, name), absent in optional if absent}
    before = dict(shell.__dict__)
    tables = {name: dict(before[name]) for name in _TABLES}
    with preserved(module), torch.no_grad():
        for _, part in named_modules(module):
            if not isinstance(part, torch.jit.ScriptModule):
                part.training = case.training  # a forward may ask its children, too
        try:
            graph = _Leaves().trace(shell, concrete_args=fixed or None)
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise _cannot(module, f"torch.fx cannot trace its forward ({why})") from error
    now = shell.__dict__
    same = now.keys() == before.keys() and all(now[k] is v for k, v in before.items())
    if not same or any(now[name] != table for name, table in tables.items()):
        raise _cannot(module, "its forward sets attributes, or makes tensors of its own")
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") == "_assert_is_none":
            graph.erase_node(node)  # this forward is called in no other case
    gone = [each for child in removed for each in _edit(shell, graph, child)]
    return shell, graph, gone


def _shell(module: nn.Module, base: type[nn.Module], *, training: bool) -> nn.Module:
    """The same module as another object, so that a trace may set attributes."""
    shell: nn.Module = object.__new__(base)
    shell.__dict__.update({k: v for k, v in module.__dict__.items() if k != _KEY})
    for name in _TABLES:
        shell.__dict__[name] = dict(module.__dict__[name])
    shell.__dict__["training"] = training
    return shell


def _by_case(base: type[nn.Module], forwards: Mapping[_Case, _Forward]) -> Callable[..., Any]:
    """One forward, which asks for the case only where that makes a difference."""
    if len({code for code, _ in forwards.values()}) == 1:
        return next(iter(forwards.values()))[1]
    optional = _optional(base)
    table = {(case.training, case.absent): run for case, (_, run) in forwards.items()}

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        absent = tuple(
            (args[place] if len(args) > place else kwargs.get(name)) is None
            for place, name in optional
        )
        return table[self.training, absent](self, *args, **kwargs)

    return forward


def _edit(module: nn.Module, graph: Graph, child: str) -> list[Any]:
    """Erase the activations that take what a child gives; returns what they were."""
    wanted = get_module(module, child)
    calls = [
        node
        for node in graph.nodes
        if node.op == "call_module" and get_module(module, str(node.target)) is wanted
    ]
    if not calls:
        raise _cannot(module, f"its forward does not call {child}")
    gone = []
    for call in calls:
        users = list(call.users)
        if len(users) != 1 or not _is_activation(module, users[0], call):
            said = ", ".join(_name_of(user) for user in users) or "nothing"
            raise _cannot(module, f"what it does with {child} is {said}, no activation alone")
        options = {key: value for key, value in users[0].kwargs.items() if key != "inplace"}
        gone.append(map_arg((_name_of(users[0]), users[0].args[1:], options), str))
        users[0].replace_all_uses_with(call)
        graph.erase_node(users[0])
    graph.lint()
    return gone


def _name_of(node: Node) -> str:
    """What a node calls, whether in place or not."""
    if isinstance(node.target, str):
        return node.target.rstrip("_")
    return str(getattr(node.target, "__name__", node.target)).rstrip("_")


def _is_activation(module: nn.Module, node: Node, data: Node) -> bool:
    if not node.args or node.args[0] is not data or node.all_input_nodes.count(data) != 1:
        return False
    if node.op == "call_module":
        return is_taken(get_module(module, str(node.target)))
    return node.op in ("call_function", "call_method") and _name_of(node) in _NAMES


def _cannot(module: nn.Module, why: str) -> SurgeryError:
    name = type(module).__name__
    return SurgeryError(f"Cannot rewrite the forward of a {name}: {why}.")
