"""Removing an activation from one call site: of a Sequential, or of a traced forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from bntools.modules import get_module
from bntools.rewriting.tracing import cannot

__all__ = ["TAKEN_MODULES", "Removal", "is_sequential", "is_taken", "slots_after"]

_NAMES = {
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "silu", "gelu", "hardswish", "elu",
    "sigmoid", "tanh",
}  # fmt: skip
TAKEN_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.ELU,
    nn.Sigmoid, nn.Tanh,
)  # fmt: skip
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def is_taken(module: nn.Module) -> bool:
    """Whether a module is one of the activations that may be removed, or inherits its forward."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    return any(type(module).forward is cls.forward for cls in TAKEN_MODULES)


def is_sequential(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other: a place in it may be emptied."""
    return type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def slots_after(module: nn.Module, child: str) -> list[str]:
    """The names under which a Sequential calls the activations after a child."""
    wanted, names = get_module(module, child), list(module._modules)
    found = []
    for place, name in enumerate(names):
        if module._modules[name] is not wanted:
            continue
        rest = (n for n in names[place + 1 :] if not isinstance(module._modules[n], _PASSING))
        after = next(rest, None)
        if after is None or not is_taken(get_module(module, after)):
            raise cannot(module, f"what follows {name} in it is no activation alone")
        found.append(after)
    return found


@dataclass(frozen=True)
class Removal:
    """The activation that takes what a child gives goes, at every call of that child."""

    child: str

    def stored(self) -> str:
        """The path of the child."""
        return self.child

    def apply(self, module: nn.Module, graph: Graph) -> list[Any]:
        """Erase the activations; returns what they were."""
        wanted = get_module(module, self.child)
        calls = [
            node
            for node in graph.nodes
            if node.op == "call_module" and get_module(module, str(node.target)) is wanted
        ]
        if not calls:
            raise cannot(module, f"its forward does not call {self.child}")
        gone = []
        for call in calls:
            users = list(call.users)
            if len(users) != 1 or not _is_activation(module, users[0], call):
                said = ", ".join(_name_of(user) for user in users) or "nothing"
                why = f"what it does with {self.child} is {said}, no activation alone"
                raise cannot(module, why)
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
