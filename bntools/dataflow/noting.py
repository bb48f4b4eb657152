"""Notes of a recording from which chains of arithmetic are found: operations, tensors and calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bntools.dataflow.arithmetic import ARITHMETIC, Call, Leaf, Numbers
from bntools.dataflow.chains import Recorded, with_chains
from bntools.dataflow.graph import Frame, Node, NormLayer, Value
from bntools.dataflow.layers import Ownership, editing_refusal
from bntools.dataflow.operations import batch_norm_call, operation
from bntools.dataflow.stepping import batch_norm_of
from bntools.modules import get_module, named_modules
from bntools.report import Reason

__all__ = ["NOTED", "Notes"]

_SMALL = 1 << 16
_LONGEST = 64
_INPLACE = frozenset(f"{name}_" for name in ARITHMETIC)
NOTED = ARITHMETIC | _INPLACE | {"lift_fresh"}


class Notes:
    """What a tape notes besides its nodes: the arguments of arithmetic, and plain tensors."""

    def __init__(self, model: nn.Module, owners: Ownership) -> None:
        self._model = model
        self._owners = owners
        self._calls: dict[Node, Call] = {}
        self._order: list[Node] = []
        self._snapshots: dict[Value, Tensor] = {}
        self._leaves: dict[Value, Leaf] = {}
        self._loose: dict[int, Leaf] | None = None
        self._own: dict[str, list[Frame]] = {}
        self._called: dict[str, int] = {}

    @property
    def position(self) -> int:
        """How many operations are noted."""
        return len(self._order)

    def stranger(self, tensor: Tensor, value: Value) -> None:
        """A tensor that is seen for the first time: one that a module keeps unregistered, maybe."""
        if self._loose is None:
            self._loose = {id(leaf.tensor): leaf for leaf in _loose(self._model)}
        leaf = self._loose.get(id(tensor))
        if leaf is not None:
            self._leaves[value] = leaf

    def operation(
        self, node: Node, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        """Note an operation, where it may be part of a chain; values come from `node`."""
        name = operation(func).name
        if name in ARITHMETIC or (name in _INPLACE and len(node.writes) == 1):
            if isinstance(out, Tensor):
                values = iter(node.inputs)
                self._add(node, Call(
                    name, func,
                    tuple(next(values) if isinstance(a, Tensor) else a for a in args),
                    {k: next(values) if isinstance(v, Tensor) else v for k, v in kwargs.items()},
                    (*_dtypes((*args, *kwargs.values())), out.dtype),
                ))  # fmt: skip
        elif name == "lift_fresh" and args[0].numel() <= _SMALL:
            self._snapshots[node.inputs[0]] = args[0].detach().clone()
        elif operation(func).kind == "norm":
            self._batch_norm(node, name, args, out)

    def _batch_norm(self, node: Node, name: str, args: Sequence[Any], out: Any) -> None:
        call = batch_norm_call(name, args)
        if call.training or call.mean is None or call.variance is None:
            return
        values = iter(node.inputs)
        given = (call.data, call.weight, call.bias, call.mean, call.variance)
        first = out if isinstance(out, Tensor) else out[0]
        operands = tuple(None if t is None else next(values) for t in given)
        dtypes = (*_dtypes(given), first.dtype)
        self._add(node, Call("batch_norm", batch_norm_of, operands, {"eps": call.eps}, dtypes))

    def _add(self, node: Node, call: Call) -> None:
        self._calls[node] = call
        self._order.append(node)

    def called(self, path: str) -> None:
        """Note that a module was called."""
        self._called[path] = self._called.get(path, 0) + 1

    def did_arithmetic(self, path: str, since: int) -> bool:
        """Whether a module itself did, since a position, and what it did may be all there is."""
        done = self._order[since : since + _LONGEST]
        return any(node.module == path for node in done)

    def frame(self, frame: Frame) -> None:
        """Note a call of a module that did arithmetic."""
        self._own.setdefault(frame.path, []).append(frame)

    def numbers(
        self,
        nodes: list[Node],
        parameters: Mapping[str, Value],
        dropped: Mapping[Value, Value],
    ) -> Numbers:
        """What computes the constants again.

        `dropped` are values within layers that have become one node; arithmetic with them is none.
        """
        if dropped:
            calls = self._calls.items()
            self._calls = {n: c for n, c in calls if dropped.keys().isdisjoint(c.values())}
        leaves = {value: self._held(name) for name, value in parameters.items()}
        return Numbers(nodes, self._calls, {**leaves, **self._leaves}, self._snapshots)

    def read(
        self,
        nodes: list[Node],
        frames: dict[str, list[Frame]],
        layers: tuple[NormLayer, ...],
        numbers: Numbers,
    ) -> tuple[list[Node], dict[str, list[Frame]], tuple[NormLayer, ...]]:
        """Nodes, calls and layers with the chains that there are."""
        if not any(map(self._may_be_chained, self._calls.values())):
            return nodes, frames, layers
        sealed = frozenset(self._owners.sealed)
        recorded = Recorded(
            nodes, frames, self._own, self._called, layers, sealed, self._kind, self._is_standard
        )
        with torch.no_grad():
            return with_chains(recorded, numbers)

    def _may_be_chained(self, call: Call) -> bool:
        """Whether an operation has more than data for operands: most only add data to data."""
        values = list(call.values())
        if len(values) == 1:
            return call.operation in ("add", "sub", "rsub")
        return any(v.constant or v in self._leaves or v in self._snapshots for v in values) or (
            bool(self._leaves) or bool(self._snapshots)
        )

    def _is_standard(self, path: str) -> bool:
        return type(get_module(self._model, path)).__module__.startswith("torch.nn.modules.")

    def _held(self, name: str) -> Leaf:
        path, _, attribute = name.rpartition(".")
        also = self._owners.tied.get(name, ())
        return Leaf(path, attribute, self._owners.tensors[name], also)

    def _kind(self, path: str) -> tuple[str, tuple[Reason, str] | None] | None:
        module = get_module(self._model, path)
        if module._modules:
            return None
        if path in self._owners.sealed:
            return type(module).__name__, (Reason.SCRIPTED, "it is compiled by TorchScript")
        return type(module).__name__, editing_refusal(module)


def _dtypes(given: Sequence[Any]) -> tuple[torch.dtype, ...]:
    return tuple(each.dtype for each in given if isinstance(each, Tensor))


def _loose(model: nn.Module) -> Iterator[Leaf]:
    """The tensors that modules keep as plain attributes."""
    found: dict[int, Leaf] = {}
    for path, module in named_modules(model):
        for attribute, tensor in module.__dict__.items():
            if isinstance(tensor, Tensor):
                leaf = Leaf(path, attribute, tensor, registered=False)
                known = found.setdefault(id(tensor), leaf)
                if known is not leaf:
                    also = (*known.also, leaf.name)
                    found[id(tensor)] = Leaf(known.path, known.attribute, tensor, also, False)
    return iter(found.values())
