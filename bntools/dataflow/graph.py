"""The neutral graph: values and the few kinds of operation that a planner needs to tell apart.

A `Value` is one version of a tensor: an operation that writes in place makes a new version. The
recorder builds the graph from a module that runs; other front ends may build it from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

from torch import Tensor

from bntools.absorb import OutputLayout
from bntools.affine import Affine
from bntools.report import Reason

__all__ = ["Frame", "Graph", "Kind", "Linear", "Move", "Node", "Norm", "NormLayer", "Value"]


class Kind(Enum):
    """What an operation is to a per-channel affine.

    LINEAR can absorb an affine, AFFINE is one, MOVE only moves data, OPAQUE does anything; OUTPUT
    uses values outside of the recorded forward. Values without a producer are parameters, inputs
    of the model, and tensors whose origin was not seen.
    """

    LINEAR = "linear"
    AFFINE = "affine"
    MOVE = "move"
    OPAQUE = "opaque"
    OUTPUT = "output"


@dataclass(eq=False, slots=True)
class Value:
    """One version of a tensor.

    `constant` values follow from parameters, buffers and literals alone; `parameter` is the name
    of the parameter or buffer that the value is, as it was before the forward.
    """

    shape: tuple[int, ...]
    constant: bool = False
    parameter: str | None = None
    producer: Node | None = None
    consumers: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer's call: `inputs` of the node are data, weight and, where passed, bias.

    `weight` and `bias` are the values used; `channel_dim` is the axis of the output's channels.
    `host` is the path of a registered host that was called as a whole (weight is then None).
    """

    weight: Value | None
    bias: Value | None
    layout: OutputLayout
    channel_dim: int
    host: str | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """An affine per channel, applied by the norm layer `owner` along `channel_dim` of its input.

    `affine` is the map, or the reason why it is not known.
    """

    owner: str
    affine: Affine | Reason
    channel_dim: int = 1


@dataclass(frozen=True, slots=True)
class Move:
    """Data movement: `apply` does to tensors of labels what the operation does to its inputs.

    `partial` movement may drop elements (a slice); all other movement keeps every one. Elements
    that come from nowhere (padding) get the label -1.
    """

    apply: Callable[[Sequence[Tensor]], list[Tensor]]
    partial: bool


@dataclass(eq=False, slots=True)
class Node:
    """One operation. `name` is for messages, `module` the path of the module that ran it.

    `stack` are the paths of all modules that were running, from the model down; `literals` the
    arguments of an activation that are no tensors.
    """

    kind: Kind
    name: str
    inputs: list[Value]
    outputs: list[Value]
    module: str = ""
    detail: Linear | Norm | Move | None = None
    writes: list[Value] = field(default_factory=list)
    order: int = -1
    stack: tuple[str, ...] = ()
    literals: tuple[Any, ...] = ()

    @property
    def linear(self) -> Linear:
        """The detail of a LINEAR node."""
        return cast("Linear", self.detail)

    @property
    def norm(self) -> Norm:
        """The detail of an AFFINE node."""
        return cast("Norm", self.detail)

    @property
    def move(self) -> Move:
        """The detail of a MOVE node."""
        return cast("Move", self.detail)


@dataclass(frozen=True, slots=True)
class Frame:
    """One call of a module: the values that went in and came out, and the nodes in between.

    `stack` are the paths of the modules that were running, from the model down to the caller.
    """

    path: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    start: int
    stop: int
    stack: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NormLayer:
    """A norm layer of the model, whether it ran or not.

    `plain` layers do nothing but normalise; others are looked at in the graph. `remainder` says
    that something stays in the layer's place. `refusal` is what rules a fold out beforehand.
    """

    path: str
    kind: str
    plain: bool = True
    remainder: bool = False
    refusal: tuple[Reason, str] | None = None


@dataclass(slots=True)
class Graph:
    """Everything that one forward did, in order, linked both ways.

    `parameters` maps the name of each parameter and buffer to its value as the forward found it,
    `tensors` to its number, `owners` to the path of the layer that holds it; `tied` maps a name to
    the other names of the same tensor; `absent` are names that a layer could hold, but does not
    (the bias of a conv without one); `sealed` are the paths of layers that cannot be edited.
    `calls` has, where asked for, what each module call gave, in the order in which they ended.
    """

    nodes: list[Node]
    frames: dict[str, list[Frame]]
    layers: tuple[NormLayer, ...]
    parameters: dict[str, Value]
    tensors: dict[str, Tensor]
    owners: dict[str, str]
    tied: dict[str, tuple[str, ...]]
    absent: frozenset[str]
    sealed: frozenset[str] = frozenset()
    calls: tuple[tuple[str, tuple[Value, ...]], ...] = ()

    def link(self) -> Graph:
        """Connect producers and consumers once all nodes are there."""
        for order, node in enumerate(self.nodes):
            node.order = order
            for value in node.outputs:
                value.producer = node
            for value in dict.fromkeys(node.inputs):
                value.consumers.append(node)
        return self

    def of_kind(self, kind: Kind) -> Iterator[Node]:
        """The nodes of a kind, in execution order."""
        return (node for node in self.nodes if node.kind is kind)

    def inside(self, frame: Frame) -> list[Node]:
        """The nodes that ran during a module's call."""
        return self.nodes[frame.start : frame.stop]
