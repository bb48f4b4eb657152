"""An ONNX model made double, and run: what it would give without rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from bntools.runtimes.kernels import KERNELS

__all__ = ["DoubleModel", "random_nodes", "read_model"]

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_TYPED = {
    "Cast": "to", "ConstantOfShape": "", "EyeLike": "dtype", "Range": "", "HannWindow":
    "output_datatype", "HammingWindow": "output_datatype", "BlackmanWindow": "output_datatype",
    "SequenceEmpty": "dtype", "DequantizeLinear": "output_dtype",
}  # fmt: skip


def read_model(source: Path | bytes, beside: Path | None = None) -> ModelProto:
    """The ONNX model in a file or in bytes, with its external data."""
    if isinstance(source, Path):
        return onnx.load(source)
    proto = onnx.load_model_from_string(source)
    if beside is not None:
        onnx.external_data_helper.load_external_data_for_model(proto, str(beside))
    return proto


class DoubleModel:
    """An ONNX model in float64, run node by node by onnx's reference evaluator.

    Convolutions, pools and resizing are torch's in float64: those of the evaluator take hours.
    """

    def __init__(self, proto: ModelProto) -> None:
        """Make `proto` double; it is changed."""
        _widen_graph(proto.graph)
        for function in proto.functions:
            _widen_nodes(function.node)
        self._evaluator = ReferenceEvaluator(proto, new_ops=list(KERNELS))
        self._outputs = [value.name for value in proto.graph.output]
        self._last = _last_uses(proto.graph)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One forward: floating inputs in float64, and everything that follows from them."""
        results: dict[str, Any] = {"": None, **self._evaluator.rt_inits_}
        for name, tensor in feeds.items():
            wide = tensor.double() if tensor.is_floating_point() else tensor
            results[name] = wide.detach().cpu().numpy()
        with np.errstate(all="ignore"):
            for index, node in enumerate(self._evaluator.rt_nodes_):
                self._step(index, node, results)
        return {name: _tensor(results[name]) for name in self._outputs}

    def _step(self, index: int, node: Any, results: dict[str, Any]) -> None:
        inputs = [results[name] for name in node.input]
        context = {"context": results} if node.need_context() else {}
        results.update(zip(node.output, node.run(*inputs, **context), strict=False))
        for name in self._last.get(index, ()):
            results.pop(name, None)


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError("an output is no tensor")
    return torch.from_numpy(np.array(value))


def _last_uses(graph: GraphProto) -> dict[int, list[str]]:
    """Which values are used for the last time by each node, so that they can be let go."""
    if any(a.type == AttributeProto.GRAPH for node in graph.node for a in node.attribute):
        return {}  # inner graphs use values of the outer one
    kept = {value.name for value in graph.output} | {each.name for each in graph.initializer}
    last = {name: i for i, node in enumerate(graph.node) for name in (*node.input, *node.output)}
    found: dict[int, list[str]] = {}
    for name, index in last.items():
        if name and name not in kept:
            found.setdefault(index, []).append(name)
    return found


def _widen_graph(graph: GraphProto) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _FLOATS:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    del graph.value_info[:]
    _widen_nodes(graph.node)


def _widen_nodes(nodes: Any) -> None:
    for node in nodes:
        for attribute in _attributes(node):
            if attribute.type == AttributeProto.GRAPH:
                _widen_graph(attribute.g)
            elif attribute.type == AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            elif attribute.name == _TYPED.get(node.op_type) and attribute.i in _FLOATS:
                attribute.i = TensorProto.DOUBLE


def _attributes(node: NodeProto) -> Iterator[AttributeProto]:
    if node.op_type == "Constant":  # these forms give float32 whatever the rest has
        for attribute in node.attribute:
            if attribute.name in ("value_float", "value_floats"):
                values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                attribute.t.CopyFrom(numpy_helper.from_array(np.array(values, np.float64)))
                attribute.name, attribute.type = "value", AttributeProto.TENSOR
    if node.op_type == "ConstantOfShape" and not node.attribute:
        zero = numpy_helper.from_array(np.zeros(1))
        node.attribute.append(onnx.helper.make_attribute("value", zero))
    yield from node.attribute


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(_to_double(tensor)))
        tensor.name = name


def _to_double(tensor: TensorProto) -> np.ndarray[Any, np.dtype[np.float64]]:
    return numpy_helper.to_array(tensor).astype(np.float64)


_RANDOM = {
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli",
    "Multinomial",
}  # fmt: skip


def random_nodes(proto: ModelProto) -> list[str]:
    """The nodes that draw random numbers, such as "drop (Dropout in training mode)"."""
    found = []
    for node in _all_nodes(proto):
        training = node.op_type == "Dropout" and len(node.input) > 2 and bool(node.input[2])
        if node.op_type in _RANDOM or training:
            mode = " in training mode" if training else ""
            found.append(f"{node.name or node.output[0]} ({node.op_type}{mode})")
    return found


def _all_nodes(proto: ModelProto) -> Iterator[NodeProto]:
    pending = [proto.graph.node, *(function.node for function in proto.functions)]
    while pending:
        for node in pending.pop():
            yield node
            inner = (a.g.node for a in node.attribute if a.type == AttributeProto.GRAPH)
            pending.extend(inner)
