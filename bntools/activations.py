"""The activation after a norm: which it is, where it is called, and how it could be removed there.

Decided on the recorded dataflow, at every call of the norm: names and order say nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bntools.dataflow.graph import Frame, Graph, Node
from bntools.dataflow.layers import has_hooks
from bntools.dataflow.operations import ACTIVATION_OPS
from bntools.dataflow.reach import Refused, describe
from bntools.modules import get_module
from bntools.report import Reason
from bntools.rewriting import is_taken, why_not_removable

__all__ = ["Followers", "Following", "activation_calls", "recognised"]

_KNOWN = (
    nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Hardswish(),
    nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(), nn.ELU(),
)  # fmt: skip
_TAKEN = "ReLU, ReLU6, LeakyReLU, PReLU, SiLU, GELU, Hardswish, ELU, sigmoid or tanh"


@dataclass(frozen=True, eq=False)
class Following:
    """An activation that is the only user of what a norm gives, and can go with it.

    `module` is a copy of it, not in place. Where `after` is None, the module at `path` becomes an
    Identity; else the forward of the module at `path` loses the activation after its submodule
    `after`. `stacks` are the module paths under which the calls that go were seen.
    """

    kind: str
    module: nn.Module
    path: str
    after: str | None
    stacks: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        if self.after is None:
            return f"{self.kind} ({self.path})"
        return f"{self.kind} (in {self.path or 'the model'}, after {self.after})"

    def same_as(self, other: Following) -> bool:
        """Whether both go in the same way."""
        mine = (self.kind, self.path, self.after, self.stacks)
        return mine == (other.kind, other.path, other.after, other.stacks)


class Followers:
    """The activations after the norms of one recording."""

    def __init__(
        self, model: nn.Module, graph: Graph, known: dict[tuple[str, str], str] | None = None
    ) -> None:
        self.model = model
        self.graph = graph
        self._known = {} if known is None else known
        """Why a module's forward cannot lose what follows a submodule; tracing it takes time."""

    def of(self, norm: str) -> Following | None:
        """The activation after a norm at each of its calls; None where none follows.

        Raises `Refused` where one follows and cannot be taken.
        """
        frames = self.graph.frames.get(norm, [])
        if not frames:
            raise Refused(Reason.NOT_EXECUTED, "it did not run, so that what follows was not seen")
        nodes = [_activation(frame) for frame in frames]
        found = [node for node in nodes if node is not None]
        if not found:
            return None
        if len(found) < len(nodes):
            raise _stays("an activation follows at some of its calls, and not at others")
        modules = [_module_of(self.model, self.graph, node) for node in found]
        places = {self._place(f, found, node) for f, node in zip(frames, found, strict=True)}
        if len(places) > 1 or len({_kind(node) for node in found}) > 1:
            raise _stays("it is called more than once, with activations at different places")
        path, after = places.pop()
        stacks = tuple(node.stack for node in found)
        return Following(_kind(found[0]), modules[0], path, after, stacks)

    def _place(self, frame: Frame, calls: Sequence[Node], node: Node) -> tuple[str, str | None]:
        """What could become an Identity, or the module whose forward could be rewritten."""
        norm, activation = (*frame.stack[1:], frame.path), node.stack[1:]
        depth = 0
        while depth < min(len(norm), len(activation)) and norm[depth] == activation[depth]:
            depth += 1
        block = norm[depth - 1]
        if depth == len(norm):
            raise _stays(f"{describe(node)} follows inside of the layer itself")
        after = norm[depth].removeprefix(f"{block}.") if block else norm[depth]
        if len(activation) > depth:
            leaf = activation[-1]
            if has_hooks(get_module(self.model, leaf)):
                raise _stays(f"{leaf} has hooks, which would be lost with it")
            if _is_only(self.graph, leaf, calls) and _can_go(get_module(self.model, leaf)):
                return leaf, None
            if len(activation) > depth + 1:
                raise _stays(f"{describe(node)} runs deep inside of {activation[depth]}")
        why = self._why_not(block, after)
        if why:
            raise _stays(f"{describe(node)} cannot be removed: {why}")
        return block, after

    def _why_not(self, block: str, after: str) -> str:
        if block in self.graph.sealed:
            return "TorchScript cannot be edited"
        if (block, after) not in self._known:
            why = why_not_removable(get_module(self.model, block), after)
            self._known[block, after] = why
        return self._known[block, after]


def activation_calls(graph: Graph) -> Iterator[tuple[str, ...]]:
    """Where activations ran: the paths of the modules that were running, for each call."""
    return (node.stack for node in graph.nodes if _is_activation(node))


def recognised(module: nn.Module) -> nn.Module | None:
    """A copy, not in place, of an activation module that may be taken; None for all others."""
    if is_taken(module):
        return _own(module)
    if next(module.parameters(), None) is not None:
        return None
    x = torch.linspace(-8, 8, 801, device="cpu")
    try:
        with torch.no_grad():
            y = module(x.clone())
            return next((copy.copy(k) for k in _KNOWN if torch.allclose(k(x), y, atol=1e-6)), None)
    except Exception:  # noqa: BLE001 - a module of others may raise anything
        return None


def _stays(why: str) -> Refused:
    return Refused(Reason.ACTIVATION_STAYS, why)


def _is_activation(node: Node) -> bool:
    return node.name.rstrip("_") in ACTIVATION_OPS


def _kind(node: Node) -> str:
    return "prelu" if node.name == "_prelu_kernel" else node.name.rstrip("_")


def _activation(frame: Frame) -> Node | None:
    """The activation that is the only user of what one call of a norm gives."""
    if len(frame.outputs) != 1:
        return None
    value = frame.outputs[0]
    found = [node for node in value.consumers if _is_activation(node) and node.inputs[0] is value]
    if not found:
        return None
    others = [node for node in value.consumers if node is not found[0]]
    if others:
        raise Refused(
            Reason.USED_ELSEWHERE,
            f"{describe(others[0])} also uses what {describe(found[0])} takes",
        )
    return found[0]


def _module_of(model: nn.Module, graph: Graph, node: Node) -> nn.Module:
    """A module that does what an activation did."""
    made = _functional(graph, node)
    if made is None:
        raise _stays(f"{describe(node)} follows, and only {_TAKEN} can be taken")
    module = get_module(model, node.module)
    if is_taken(module):
        return recognised(module) or made
    return made


def _functional(graph: Graph, node: Node) -> nn.Module | None:
    kind, given = _kind(node), node.literals
    if kind == "prelu":
        return _prelu(graph, node)
    if kind == "hardtanh":
        return nn.ReLU6() if given == (0, 6) else None
    if kind == "leaky_relu":
        return nn.LeakyReLU(float(given[0]) if given else 0.01)
    if kind == "elu":
        scaled = any(float(factor) != 1 for factor in given[1:])
        return None if scaled else nn.ELU(float(given[0]) if given else 1.0)
    if kind == "gelu":
        return nn.GELU(approximate=str(given[0]) if given else "none")
    simple = {
        "relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish, "sigmoid": nn.Sigmoid,
        "tanh": nn.Tanh,
    }  # fmt: skip
    return simple[kind]() if kind in simple else None


def _prelu(graph: Graph, node: Node) -> nn.Module | None:
    weight = node.inputs[1]
    while weight.parameter is None and weight.producer is not None and weight.producer.inputs:
        weight = weight.producer.inputs[0]
    if weight.parameter is None:
        return None
    values = graph.tensors[weight.parameter].detach()
    made = nn.PReLU(values.numel(), device=values.device, dtype=values.dtype)
    made.weight.data.copy_(values.flatten())
    return made


def _own(module: nn.Module) -> nn.Module:
    own = copy.deepcopy(module)
    if "inplace" in own.__dict__:
        own.__dict__["inplace"] = False
    return own


def _is_only(graph: Graph, leaf: str, calls: Sequence[Node]) -> bool:
    """Whether a module does nothing in the forward but these activation calls."""
    ran = [node for node in graph.nodes if leaf in node.stack[1:]]
    return all(n in calls or all(value.constant for value in n.inputs) for n in ran)


def _can_go(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if is_taken(module):
        return True
    return not (module._modules or module._parameters or module._buffers)
