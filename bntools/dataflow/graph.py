"""The neutral graph: values and the few kinds of operation that a planner needs to tell apart.

A `Value` is one version of a tensor: an operation that writes in place makes a new version. The
recorder builds the graph from a module that runs; other front ends may build it from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from bntools.absorb import InputLayout, OutputLayout
from bntools.affine import Affine
from bntools.report import Reason

if TYPE_CHECKING:
    from bntools.dataflow.arithmetic import Numbers

__all__ = [
    "ELSEWHERE",
    "MIXED",
    "WRITTEN_ALIAS",
    "ZERO",
    "Entry",
    "Frame",
    "Graph",
    "Kind",
    "Linear",
    "Move",
    "Node",
    "Norm",
    "NormLayer",
    "Pass",
    "Sum",
    "Value",
]

# what labels say of elements that are no channel of a linear call
ELSEWHERE, MIXED, ZERO = -1, -2, -3
WRITTEN_ALIAS = "a write through an alias"
_VIEWS = {"squeeze", "unsqueeze", "view"}  # of indices, which are no data to move


class Kind(Enum):
    """What an operation is to a per-channel affine.

    LINEAR can absorb an affine, AFFINE is one, MOVE only moves data, PASS and SUM commute with one
    under conditions, OPAQUE does anything; OUTPUT uses values outside of the recorded forward.
    Values without a producer are parameters, inputs of the model, and tensors whose origin was not
    seen.
    """

    LINEAR = "linear"
    AFFINE = "affine"
    MOVE = "move"
    PASS = "pass"  # noqa: S105 - a kind of operation, no password
    SUM = "sum"
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
class Entry:
    """How a linear call takes its data: `position` among the node's inputs, axis of the channels.

    `layout` says where the input channels are in the weight (None for a registered host). In an
    `even` call every output sees the whole weight, so that a constant per channel gives a constant;
    `padding` are the zeros at both ends of each spatial axis of a convolution that is not.
    """

    position: int = 0
    channel_dim: int = 1
    layout: InputLayout | None = None
    even: bool = True
    padding: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer's call: `inputs` of the node are data, weight and, where passed, bias.

    `weight` and `bias` are the values used; `channel_dim` is the axis of the output's channels.
    `host` is the path of a registered host that was called as a whole (weight is then None).
    `entry` is the input's side; None where nothing can be absorbed there.
    """

    weight: Value | None
    bias: Value | None
    layout: OutputLayout
    channel_dim: int
    host: str | None = None
    entry: Entry | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """An affine per channel, applied by the norm layer `owner` along `channel_dim` of its input.

    `affine` is the map, or the reason why it is not known. `linear` is the layer as a host, with a
    weight and a bias for each channel, by which it scales and shifts in the end; None without them.
    """

    owner: str
    affine: Affine | Reason
    channel_dim: int = 1
    linear: Linear | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """Data movement: `apply` does to tensors of labels what the operation does to its inputs.

    `partial` movement may drop elements (a slice); all other movement keeps every one. Elements
    that come from nowhere (padding) get the label ZERO where they are 0, else ELSEWHERE.
    """

    apply: Callable[[Sequence[Tensor]], list[Tensor]]
    partial: bool


@dataclass(frozen=True, slots=True)
class Pass:
    """An operation f on the first input, with f(s * x + t) = s * f(x) + gain * t in each channel.

    Where `gain` is None only t = 0 passes, for the reason `limit`; a `monotone` f needs s >= 0.
    `apply` does to a tensor of labels what f does to x, and returns the labels of the first output:
    what comes from one channel (zeros aside) has its label, everything else is MIXED. Any other
    output (the indices of a max-pool) is no channel's.
    """

    apply: Callable[[Sequence[Tensor]], list[Tensor]]
    gain: float | None = 1.0
    monotone: bool = False
    limit: str = ""


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum of all inputs, broadcast, each times its coefficient (`x + x` has two inputs)."""

    coefficients: tuple[float, ...]


@dataclass(eq=False, slots=True)
class Node:
    """One operation. `name` is for messages, `module` the path of the module that ran it.

    `stack` are the paths of all modules that were running, from the model down; `literals` the
    arguments that are no tensors, the first one apart.
    Nothing comes of an `idle` one: its outputs are used by idle operations alone, if at all.
    """

    kind: Kind
    name: str
    inputs: list[Value]
    outputs: list[Value]
    module: str = ""
    detail: Linear | Norm | Move | Pass | Sum | None = None
    writes: list[Value] = field(default_factory=list)
    order: int = -1
    stack: tuple[str, ...] = ()
    literals: tuple[Any, ...] = ()
    idle: bool = False

    @property
    def linear(self) -> Linear:
        """The detail of a LINEAR node, or what a norm that stays is as one."""
        return cast("Linear", self.norm.linear if self.kind is Kind.AFFINE else self.detail)

    @property
    def norm(self) -> Norm:
        """The detail of an AFFINE node."""
        return cast("Norm", self.detail)

    @property
    def move(self) -> Move:
        """The detail of a MOVE node."""
        return cast("Move", self.detail)

    @property
    def passing(self) -> Pass:
        """The detail of a PASS node."""
        return cast("Pass", self.detail)

    @property
    def sum(self) -> Sum:
        """The detail of a SUM node."""
        return cast("Sum", self.detail)


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
    A `chain` is an affine of arithmetic; it has a module of its own or, with `neutral`, constants
    with which it does nothing: (path, attribute, value, plus), see `norms.handwritten`.
    """

    path: str
    kind: str
    plain: bool = True
    remainder: bool = False
    refusal: tuple[Reason, str] | None = None
    chain: bool = False
    neutral: tuple[tuple[str, str, float, float], ...] = ()


@dataclass(slots=True)
class Graph:
    """Everything that one forward did, in order, linked both ways.

    `parameters` maps the name of each parameter and buffer to its value as the forward found it,
    `tensors` to its number, `owners` to the path of the layer that holds it; `tied` maps a name to
    the other names of the same tensor; `absent` are names that a layer could hold, but does not
    (the bias of a conv without one); `sealed` are the paths of layers that cannot be edited.
    `calls` has, where asked for, what each module call gave, in the order in which they ended;
    `lent` are biases that layers had during the recording only. `numbers` computes the constants of
    the forward again, for other numbers of what the model holds.
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
    lent: frozenset[str] = frozenset()
    numbers: Numbers | None = None

    def link(self) -> Graph:
        """Connect producers and consumers once all nodes are there."""
        for order, node in enumerate(self.nodes):
            node.order = order
            for value in node.outputs:
                value.producer = node
            for value in dict.fromkeys(node.inputs):
                value.consumers.append(node)
        for node in reversed(self.nodes):
            node.idle = _is_idle(node)
        return self

    def of_kind(self, kind: Kind) -> Iterator[Node]:
        """The nodes of a kind, in execution order."""
        return (node for node in self.nodes if node.kind is kind)

    def inside(self, frame: Frame) -> list[Node]:
        """The nodes that ran during a module's call."""
        return self.nodes[frame.start : frame.stop]


def _is_idle(node: Node) -> bool:
    """Whether nothing comes of an operation; its users are known.

    Only of operations that are understood: memory is shared in ways that no value shows. A write
    to an alias counts where it came through views that were seen.
    """
    if node.writes or not node.outputs:
        return False
    understood = node.kind not in (Kind.OPAQUE, Kind.OUTPUT) or node.name in _VIEWS
    if node.name == WRITTEN_ALIAS:
        writer = node.inputs[1].producer
        understood = writer is not None and writer.kind in (Kind.PASS, Kind.SUM)
    return understood and all(user.idle for value in node.outputs for user in value.consumers)
