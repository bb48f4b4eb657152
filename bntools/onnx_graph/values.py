"""What is known of every value of an ONNX graph for one size of its inputs: shape, and numbers.

Nothing is run: sizes follow from onnx's shape inference, node by node, with the numbers of all
that follows from constants and sizes (the targets of reshapes, the bounds of slices).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bntools.onnx_graph.reading import inner_graphs
from bntools.onnx_graph.sequences import Part, part_of
from bntools.onnx_graph.tensors import FLOATS, Array, array_of
from bntools.runtimes.kernels import KERNELS

__all__ = ["Knowledge", "Known", "evaluated", "used_by"]

_MOST, _MOST_PRODUCTS = 1 << 23, 1 << 18
_TOLD = 1 << 12
_CHEAP = {
    "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "CastLike",
}  # fmt: skip
_PRODUCTS = {"MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "Resize", "Upsample", "TopK"}
_WINDOWED = {"Conv", "AveragePool", "MaxPool", "LpPool"}
# a quantised weight stays one, what is random is no constant
_NEVER = {
    "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "RandomNormal", "RandomUniform",
    "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of one value.

    `element` is its ONNX element type (0: unknown), `shape` None where the rank is unknown; a size
    that is unknown is -1. `array` are its numbers; `constant` says that they are those of every
    input. `exact` are those of a constant that is computed, without the rounding in between.
    """

    element: int = 0
    shape: tuple[int, ...] | None = None
    array: Array | None = None
    constant: bool = False
    exact: Array | None = None

    def wide(self) -> Array:
        """The numbers in float64, as they were if none of the steps to them had rounded."""
        numbers = self.exact if self.exact is not None else self.array
        with np.errstate(all="ignore"):  # a NaN stays one
            return np.require(numbers, dtype=np.float64, requirements="C").copy()

    @property
    def complete(self) -> bool:
        """Whether all sizes are known."""
        return self.shape is not None and -1 not in self.shape


class Knowledge:
    """What is known of the values of a graph, by their names, for inputs of given sizes.

    `open_names` are constants that a caller may override: they count as inputs. `observed` is what
    a run has shown of values that cannot be inferred.
    """

    def __init__(
        self,
        proto: ModelProto,
        sizes: Mapping[str, Sequence[int]],
        open_names: Iterable[str] = (),
        observed: Mapping[str, Known] | None = None,
    ) -> None:
        self._proto = proto
        self._opsets = {each.domain: each.version for each in proto.opset_import}
        self._observed = observed or {}
        self.values: dict[str, Known] = {}
        self.parts: dict[str, Part] = {}
        self.splits: dict[str, NodeProto] = {}
        self.others: set[str] = set()
        self.consistent = True
        self._begin(sizes, set(open_names))
        for node in proto.graph.node:
            self._step(node)

    def __getitem__(self, name: str) -> Known:
        return self.values.get(name, _UNKNOWN)

    @property
    def incomplete(self) -> list[str]:
        """The values of nodes of which sizes are unknown."""
        names = (name for node in self._proto.graph.node for name in node.output if name)
        tensors = (name for name in names if name not in self.splits and name not in self.others)
        return [name for name in tensors if not self[name].complete]

    def _begin(self, sizes: Mapping[str, Sequence[int]], open_names: set[str]) -> None:
        for value in self._proto.graph.input:
            tensor = value.type.tensor_type
            shape = tuple(sizes[value.name]) if value.name in sizes else None
            self.values[value.name] = Known(tensor.elem_type, shape)
        for each in self._proto.graph.initializer:
            known = Known(each.data_type, tuple(each.dims))
            if each.name not in open_names:
                known = replace(known, array=array_of(each), constant=True)
            self.values[each.name] = known
        for sparse in self._proto.graph.sparse_initializer:
            self.values[sparse.values.name] = Known(sparse.values.data_type, tuple(sparse.dims))

    def _step(self, node: NodeProto) -> None:
        inner = any(True for _ in inner_graphs(node))
        if node.op_type in ("SplitToSequence", "SequenceAt") and not node.domain:
            self._step_sequence(node)
        else:
            self._note(node, {} if inner else self._inferred(node))
        for name in node.output:
            seen = self._observed.get(name)
            if name and seen is not None and not self[name].complete:
                self.values[name] = seen
        if inner or node.op_type in _NEVER or node.domain not in ("", "ai.onnx"):
            return
        arrays = self._arrays(node)
        if arrays is not None:
            told = node.input[:1] if node.op_type == "CastLike" else used_by(node)
            constant = all(self[name].constant for name in told)
            exact = self._exactly(node) if constant else None
            for place, (name, array) in enumerate(zip(node.output, arrays, strict=False)):
                if name:
                    known = self[name]
                    element = known.element or helper.np_dtype_to_tensor_dtype(array.dtype)
                    wide = exact[place] if exact is not None and element in FLOATS else None
                    self.values[name] = Known(element, array.shape, array, constant, wide)

    def _step_sequence(self, node: NodeProto) -> None:
        """Remember what is split, and follow what is picked of it."""
        if node.op_type == "SplitToSequence":
            self.splits[node.output[0]] = node
            return
        split = self.splits.get(node.input[0])
        whole = self[split.input[0]] if split is not None else _UNKNOWN
        if split is None or whole.shape is None or -1 in whole.shape:
            return
        part = part_of(split, node, whole.shape, lambda name: self[name].array)
        if part is not None:
            self.parts[node.output[0]] = part
            self.values[node.output[0]] = Known(whole.element, part.shape(whole.shape))

    def _judge(self, node: NodeProto, sizes: Sequence[int]) -> None:
        """An image that shrinks to nothing, and channels that do not fit, say: other sizes."""
        given = self[node.input[0]].shape if node.input else None
        empty = node.op_type in _WINDOWED and 0 in sizes and given is not None and 0 not in given
        if empty or any(size < 0 for size in sizes):
            self.consistent = False
        if node.op_type == "Gemm" and given is not None and len(given) == 2:
            weight = self[node.input[1]].shape or (-1, -1)
            turned = {each.name: bool(each.i) for each in node.attribute}
            rows, columns = turned.get("transB", False), turned.get("transA", False)
            if -1 not in (*given, *weight) and given[not columns] != weight[rows]:
                self.consistent = False

    def _inferred(self, node: NodeProto) -> Mapping[str, TypeProto]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = self._opsets.get(domain, self._opsets.get("ai.onnx", 1))
        try:
            schema = onnx.defs.get_schema(node.op_type, version, domain)
        except onnx.defs.SchemaError:
            return {}
        types = {name: _typed(self[name]) for name in node.input if name}
        data = {
            name: numpy_helper.from_array(array)
            for name in dict.fromkeys(node.input)
            if name and (array := self[name].array) is not None
            if array.ndim <= 1 and array.size <= _TOLD
        }
        try:
            return onnx.shape_inference.infer_node_outputs(
                schema, node, types, data,
                opset_imports=list(self._proto.opset_import),
                ir_version=self._proto.ir_version,
            )  # fmt: skip
        except Exception:  # noqa: BLE001 - what cannot be inferred is observed, or unknown
            self.consistent = False
            return {}

    def _note(self, node: NodeProto, found: Mapping[str, TypeProto]) -> None:
        for name in node.output:
            given = found.get(name)
            if not name or given is None:
                continue
            if not given.HasField("tensor_type"):
                self.others.add(name)
                continue
            tensor, shape = given.tensor_type, None
            if tensor.HasField("shape"):
                sizes = tensor.shape.dim
                shape = tuple(s.dim_value if s.HasField("dim_value") else -1 for s in sizes)
                self._judge(node, [s.dim_value for s in sizes if s.HasField("dim_value")])
            self.values[name] = Known(tensor.elem_type, shape)

    def _arrays(self, node: NodeProto) -> Sequence[Array] | None:
        """The numbers of a node's outputs, where they follow from what is known."""
        if node.op_type == "Shape":
            return self._shape_of(node)
        if node.op_type == "Size":
            known = self[node.input[0]]
            return (
                [np.array(np.prod(known.shape or (1,), dtype=np.int64))] if known.complete else None
            )
        if node.op_type == "CastLike" and self[node.input[1]].element:
            cast = helper.make_node(
                "Cast", node.input[:1], node.output, to=self[node.input[1]].element
            )
            first = self[node.input[0]].array
            return None if first is None else evaluated(cast, {node.input[0]: first}, self._proto)
        if any(self[name].array is None for name in used_by(node)):
            return None
        if node.op_type not in _CHEAP and not self._is_small(node):
            return None
        return evaluated(node, {n: self[n].array for n in used_by(node)}, self._proto)

    def _exactly(self, node: NodeProto) -> Sequence[Array] | None:
        """The same in float64 from the start; None where that is what the numbers are anyway."""
        inputs = {name: self[name] for name in used_by(node)}
        if not any(known.element in FLOATS for known in inputs.values()):
            return None
        plain = all(known.exact is None for known in inputs.values())
        if plain and node.op_type in _CHEAP - {"Cast", "CastLike"}:
            return None
        if node.op_type in ("Cast", "CastLike"):
            first = inputs[node.input[0]]
            return [first.wide()] if first.element in FLOATS else None
        feeds = {n: k.wide() if k.element in FLOATS else k.array for n, k in inputs.items()}
        return evaluated(node, feeds, self._proto)

    def _shape_of(self, node: NodeProto) -> Sequence[Array] | None:
        shape = self[node.input[0]].shape
        if shape is None:
            return None
        bounds = {each.name: each.i for each in node.attribute}
        part = shape[bounds.get("start", 0) : bounds.get("end", len(shape))]
        return None if -1 in part else [np.array(part, dtype=np.int64)]

    def _is_small(self, node: NodeProto) -> bool:
        """Whether computing a constant cannot take much time or memory, whatever a file says."""
        shapes = [self[name].shape for name in (*node.input, *node.output) if name]
        if any(shape is None or -1 in shape for shape in shapes):
            return False
        most = _MOST_PRODUCTS if node.op_type in _PRODUCTS else _MOST
        return all(float(np.prod(shape, dtype=float)) <= most for shape in shapes if shape)


_UNKNOWN = Known()


def used_by(node: NodeProto) -> list[str]:
    """The names that a node uses, each once; not those that its inner graphs use."""
    return [name for name in dict.fromkeys(node.input) if name]


def evaluated(
    node: NodeProto, feeds: Mapping[str, Any], proto: ModelProto
) -> Sequence[Array] | None:
    """What one node gives by onnx's reference evaluator; None where that cannot run it."""
    if node.op_type == "Constant":
        tensor = next((each.t for each in node.attribute if each.name == "value"), None)
        if tensor is not None:
            return [array_of(tensor)]
    inputs = [helper.make_empty_tensor_value_info(name) for name in feeds]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = helper.make_graph([node], "one node", inputs, outputs)
    imports = [each for each in proto.opset_import if each.domain in ("", "ai.onnx")]
    model = helper.make_model(graph, opset_imports=imports, ir_version=proto.ir_version)
    try:
        with np.errstate(all="ignore"):
            given = ReferenceEvaluator(model, new_ops=list(KERNELS)).run(None, dict(feeds))
    except Exception:  # noqa: BLE001 - the evaluator raises anything
        return None
    arrays = [np.asarray(value) for value in given] if isinstance(given, list) else []
    return arrays if all(array.dtype != object for array in arrays) and arrays else None


def _typed(known: Known) -> TypeProto:
    if not known.element:
        return TypeProto()
    shape = known.shape
    sizes = None if shape is None else [size if size >= 0 else None for size in shape]
    return helper.make_tensor_type_proto(known.element, sizes)
