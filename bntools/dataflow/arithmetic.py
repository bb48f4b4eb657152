"""Arithmetic that was recorded: what was called on what, to be computed again in float64.

The numbers of constants are not read from the recording, in which they were rounded to the model's
dtype on every step, but computed anew from parameters, buffers, plain tensors and literals.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bntools.dataflow.graph import Kind, Node, Value

__all__ = ["ARITHMETIC", "Call", "Leaf", "Numbers", "collapsed"]

ARITHMETIC = frozenset({
    "add", "sub", "rsub", "mul", "div", "neg", "addcmul", "addcdiv", "reciprocal", "sqrt", "rsqrt",
    "pow", "square", "exp",
})  # fmt: skip
_PADS = {"constant_pad_nd"}


@dataclass(frozen=True, slots=True)
class Call:
    """One arithmetic operation: `args` and `kwargs` with a `Value` in the place of each tensor.

    `dtypes` are those of the tensors given and of the result, in this order.
    """

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtypes: tuple[torch.dtype, ...]

    @property
    def operation(self) -> str:
        """The name without the underscore of what writes in place."""
        return self.name.removesuffix("_")

    @property
    def operands(self) -> list[Any]:
        """The arguments that count: tensors and numbers, `alpha` and `value` apart."""
        count = {"addcmul": 3, "addcdiv": 3, "batch_norm": 5}.get(self.operation, 2)
        return list(self.args[:count])

    @property
    def factor(self) -> float:
        """The literal `alpha` of a sum, `value` of addcmul and addcdiv."""
        key = "value" if self.operation.startswith("addc") else "alpha"
        position = 3 if key == "value" else 2
        given = self.args[position] if len(self.args) > position else self.kwargs.get(key, 1)
        return float(given)

    @property
    def coefficients(self) -> tuple[float, float]:
        """What both operands of a sum or difference are multiplied with."""
        return {
            "add": (1.0, self.factor), "sub": (1.0, -self.factor), "rsub": (-self.factor, 1.0),
        }[self.operation]  # fmt: skip

    def values(self) -> Iterator[Value]:
        """The tensors among the arguments."""
        return (arg for arg in (*self.args, *self.kwargs.values()) if isinstance(arg, Value))

    def run(self, given: Mapping[Value, Tensor]) -> Tensor:
        """Carry the operation out on other numbers, never in place."""
        args = [given[arg] if isinstance(arg, Value) else arg for arg in self.args]
        kwargs = {k: given[v] if isinstance(v, Value) else v for k, v in self.kwargs.items()}
        func = self.func
        if self.name.endswith("_"):
            overload = func._overloadname  # noqa: SLF001 - it has no other name
            func = getattr(getattr(torch.ops.aten, self.operation), overload)
        result: Tensor = func(*args, **kwargs)
        return result


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor that the model holds: the path of the module, the attribute, and the tensor.

    `also` are its other names; `registered` says whether it is in the state dict.
    """

    path: str
    attribute: str
    tensor: Tensor
    also: tuple[str, ...] = ()
    registered: bool = True

    @property
    def name(self) -> str:
        """The name in the model."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute


class Numbers:
    """The numbers of constant values, computed from those that the model holds.

    `leaves` are values that the model holds, `snapshots` small tensors that the forward made from
    numbers; `constants` are all values that follow from these.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        calls: Mapping[Node, Call],
        leaves: Mapping[Value, Leaf],
        snapshots: Mapping[Value, Tensor],
    ) -> None:
        self.calls = calls
        self.leaves = leaves
        self.snapshots = snapshots
        self.dtype = torch.float64
        self.constants: set[Value] = {v for v, leaf in leaves.items() if _is_real(leaf.tensor)}
        self.constants.update(v for v, t in snapshots.items() if _is_real(t))
        for node in nodes:
            given = self.inputs(node)
            if given and self.constants.issuperset(given):
                self.constants.update(node.outputs)
        self._instead: Mapping[Value, Tensor] = {}
        self._known: dict[Value, Tensor] = {}
        self._read: dict[Value, frozenset[Value]] = {}

    def other(self, instead: Mapping[Value, Tensor], dtype: torch.dtype) -> Numbers:
        """The same constants, computed from other numbers in another dtype."""
        twin = copy.copy(self)
        twin.dtype, twin._instead, twin._known = dtype, instead, {}  # noqa: SLF001 - its own class
        return twin

    def of(self, value: Value) -> Tensor:
        """The number of a constant."""
        if value not in self._known:
            self._known[value] = self._computed(value)
        return self._known[value]

    def leaves_of(self, value: Value) -> frozenset[Value]:
        """The leaves from which a constant follows."""
        if value not in self._read:
            if value in self.leaves or value in self.snapshots or value.producer is None:
                self._read[value] = frozenset({value} & self.leaves.keys())
            else:
                given = self.inputs(value.producer)
                self._read[value] = frozenset().union(*(self.leaves_of(each) for each in given))
        return self._read[value]

    def inputs(self, node: Node) -> list[Value]:
        """What an operation computes from, where it can be computed again; else nothing."""
        call = self.calls.get(node)
        if call is not None:
            return list(call.values()) if call.operation in ARITHMETIC else []
        return node.inputs if node.kind is Kind.MOVE and node.name not in _PADS else []

    def _computed(self, value: Value) -> Tensor:
        held = self._instead.get(value, self.snapshots.get(value))
        if held is None and value in self.leaves:
            held = self.leaves[value].tensor
        if held is not None:
            return held.detach().to("cpu", self.dtype)
        node = cast("Node", value.producer)
        call, inputs = self.calls.get(node), self.inputs(node)
        with torch.no_grad():
            if call is not None:
                return call.run({each: self.of(each) for each in inputs})
            return node.move.apply([self.of(each) for each in inputs])[node.outputs.index(value)]


def _is_real(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_meta
    return tensor.is_floating_point() and plain


def collapsed(number: Tensor, rank: int) -> Tensor:
    """A constant with one axis for each of the data, of length one where it is only repeated."""
    number = number.reshape([1] * (rank - number.dim()) + list(number.shape))
    for axis, stride in enumerate(number.stride()):
        if stride == 0 and number.shape[axis] > 1:
            number = number.narrow(axis, 0, 1)
    return number
