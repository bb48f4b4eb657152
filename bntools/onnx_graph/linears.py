"""Which nodes of an ONNX graph are linear layers, and where their weights and biases are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from onnx import NodeProto

from bntools.absorb import InputLayout, OutputLayout
from bntools.dataflow.graph import Entry
from bntools.onnx_graph.attributes import attribute, is_standard
from bntools.onnx_graph.tensors import FLOATS
from bntools.onnx_graph.uses import Uses
from bntools.onnx_graph.values import Knowledge, Known

__all__ = ["LinearCall", "linear_call"]


@dataclass(frozen=True)
class LinearCall:
    """A linear layer: the names of its data, weight and bias, and where the channels are.

    `node` is the place of the node; `addition` that of the node that adds the bias of a MatMul.
    `factor` is what Gemm multiplies its bias with, `weight_factor` its weight.
    `output` is the value that the layer gives.
    """

    node: int
    data: str
    weight: str
    bias: str | None
    output: str
    layout: OutputLayout
    channel_dim: int
    entry: Entry
    addition: int | None = None
    factor: float = 1.0
    weight_factor: float = 1.0
    bias_is_plain: bool = True
    is_left: bool = False

    @property
    def weight_position(self) -> int:
        """Where the weight is among the inputs of the node: a product may have it on its left."""
        return 0 if self.is_left else 1


def linear_call(
    nodes: Sequence[NodeProto], index: int, known: Knowledge, uses: Uses
) -> LinearCall | None:
    """The linear layer that a node is; None where it is something else."""
    node = nodes[index]
    reader = _READERS.get(node.op_type) if is_standard(node) else None
    call = reader(node, index, known) if reader is not None else None
    if call is None or known[call.weight].element not in FLOATS:
        return None
    return _with_addition(nodes, call, known, uses) if node.op_type == "MatMul" else call


def _convolution(node: NodeProto, index: int, known: Knowledge) -> LinearCall | None:
    transposed = node.op_type == "ConvTranspose"
    groups = int(attribute(node, "group", 1))
    shape = known[node.input[1]].shape
    if shape is None or len(shape) < 3 or groups < 1:
        return None
    layout = OutputLayout(1, groups) if transposed else OutputLayout()
    entry = (
        _of_transposed(node, shape, groups) if transposed else _of_convolution(node, shape, groups)
    )
    call = LinearCall(
        index, node.input[0], node.input[1], _third(node), node.output[0], layout, 1, entry
    )
    return replace(call, bias_is_plain=_is_vector(known, call.bias))


def _of_convolution(node: NodeProto, shape: tuple[int, ...], groups: int) -> Entry:
    rank = len(shape) - 2
    pads = [int(n) for n in attribute(node, "pads", [0] * (2 * rank))]
    automatic = attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    even = not any(pads) and not (automatic and any(size != 1 for size in shape[2:]))
    alike = not automatic and pads[:rank] == pads[rank:]
    return Entry(
        0, 1, InputLayout(1, groups), even, tuple(pads[:rank]) if alike and not even else ()
    )


def _of_transposed(node: NodeProto, shape: tuple[int, ...], groups: int) -> Entry:
    """Every output sees the whole weight only where what the padding cuts off did not."""
    rank = len(shape) - 2
    pads = [int(n) for n in attribute(node, "pads", [0] * (2 * rank))]
    steps = [int(n) for n in attribute(node, "dilations", [1] * rank)]
    strides = [int(n) for n in attribute(node, "strides", [1] * rank)]
    sizes = zip(pads[:rank], pads[rank:], steps, shape[2:], strict=True)
    covered = all(min(a, b) >= step * (size - 1) for a, b, step, size in sizes)
    plain = attribute(node, "auto_pad", "NOTSET") == "NOTSET"
    more = attribute(node, "output_shape") or any(attribute(node, "output_padding", []))
    even = bool(covered and plain and not more and all(stride == 1 for stride in strides))
    return Entry(0, 1, InputLayout(0, groups), even)


def _gemm(node: NodeProto, index: int, known: Knowledge) -> LinearCall | None:
    if not known[node.input[1]].constant and known[node.input[0]].constant:
        return None
    rows = bool(attribute(node, "transB", 0))
    columns = bool(attribute(node, "transA", 0))
    entry = Entry(0, 0 if columns else 1, InputLayout(1 if rows else 0))
    bias = _third(node)
    return LinearCall(
        index, node.input[0], node.input[1], bias, node.output[0],
        OutputLayout(0 if rows else 1), 1, entry, factor=float(attribute(node, "beta", 1.0)),
        weight_factor=float(attribute(node, "alpha", 1.0)),
        bias_is_plain=_is_per_column(known, bias, known[node.output[0]]),
    )  # fmt: skip


def _matmul(node: NodeProto, index: int, known: Knowledge) -> LinearCall | None:
    first, second = node.input
    left, right, out = known[first], known[second], known[node.output[0]]
    if out.shape is None or len(out.shape) < 2:
        return None
    rank = len(out.shape)
    if right.constant and right.shape is not None and len(right.shape) == 2 and not left.constant:
        return LinearCall(
            index, first, second, None, node.output[0], OutputLayout(1), rank - 1,
            Entry(0, rank - 1, InputLayout(0)),
        )  # fmt: skip
    if left.constant and left.shape is not None and len(left.shape) == 2 and not right.constant:
        return LinearCall(
            index, second, first, None, node.output[0], OutputLayout(0), rank - 2,
            Entry(0, rank - 2, InputLayout(1)), is_left=True,
        )  # fmt: skip
    return None


def _with_addition(
    nodes: Sequence[NodeProto], call: LinearCall, known: Knowledge, uses: Uses
) -> LinearCall:
    """MatMul has no bias: an Add behind it, of a constant per channel and used by nobody else."""
    follower = uses.only_user(call.output)
    if follower is None or nodes[follower].op_type != "Add" or not is_standard(nodes[follower]):
        return call
    addition = nodes[follower]
    bias = next((name for name in addition.input if name != call.output), None)
    shape, added = known[call.output].shape, known[bias or ""]
    if bias is None or shape is None or not added.constant or added.shape is None:
        return call
    padded = (1,) * (len(shape) - len(added.shape)) + added.shape
    wanted = [size if axis == call.channel_dim else 1 for axis, size in enumerate(shape)]
    if list(padded) != wanted or added.element != known[call.weight].element:
        return call
    return replace(call, bias=bias, output=addition.output[0], addition=follower)


def _third(node: NodeProto) -> str | None:
    return node.input[2] if len(node.input) > 2 and node.input[2] else None


def _is_vector(known: Knowledge, bias: str | None) -> bool:
    shape = known[bias].shape if bias is not None else ()
    return bias is None or (shape is not None and len(shape) == 1)


def _is_per_column(known: Knowledge, bias: str | None, out: Known) -> bool:
    """Whether what Gemm adds is one number for each column, or one for all."""
    if bias is None:
        return True
    shape = known[bias].shape
    if shape is None or out.shape is None:
        return False
    return all(size == 1 for size in shape[:-1]) and (not shape or shape[-1] in (1, out.shape[-1]))


_READERS: dict[str, Callable[[NodeProto, int, Knowledge], LinearCall | None]] = {
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
