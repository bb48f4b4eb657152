"""bfloat16 graphs for runtimes that store it and do not compute in it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

__all__ = ["compute_in_float32"]

_BF16, _F32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_TYPED = ("to", "dtype", "output_dtype")


def compute_in_float32(model: ir.Model) -> bool:
    """Keep weights, inputs and outputs in bfloat16, and compute in float32; True if it had any.

    ONNX Runtime has no bfloat16 kernels for the CPU, and a file that cannot run there cannot be
    checked there. The weights take the same room; each is cast when the session is made.
    """
    stored = [v for v in model.graph.initializers.values() if v.dtype == _BF16]
    inputs = [v for v in model.graph.inputs if v.dtype == _BF16]
    outputs = [i for i, v in enumerate(model.graph.outputs) if v.dtype == _BF16]
    inner = [v for node in _nodes(model) for v in node.outputs if v.dtype == _BF16]
    if not (stored or inputs or inner):
        return False
    for node in _nodes(model):
        _widen_attributes(node)
    for value in inner:
        value.dtype = _F32
    for value in (*stored, *inputs):
        _widen(model.graph, value)
    for index in outputs:
        model.graph.outputs[index] = _narrowed(model.graph, model.graph.outputs[index], index)
    return True


def _widen(graph: ir.Graph, value: ir.Value) -> None:
    """Cast a stored value, and let everything use the result."""
    wide = ir.Value(name=f"{value.name}_float32", shape=value.shape, type=ir.TensorType(_F32))
    cast = ir.node("Cast", [value], {"to": int(_F32)}, outputs=[wide])
    uses = [(node, index) for node, index in value.uses() if node is not cast]
    for node, index in uses:
        node.replace_input_with(index, wide)
    if len(graph):
        graph.insert_before(graph[0], cast)
    else:
        graph.append(cast)


def _narrowed(graph: ir.Graph, value: ir.Value, index: int) -> ir.Value:
    """An output in bfloat16 again."""
    if value.dtype == _BF16:  # an input or a constant that is returned as it is
        return value
    narrow = ir.Value(
        name=f"{value.name}_bfloat16_{index}", shape=value.shape, type=ir.TensorType(_BF16)
    )
    graph.append(ir.node("Cast", [value], {"to": int(_BF16)}, outputs=[narrow]))
    return narrow


def _widen_attributes(node: Any) -> None:
    for name, attribute in node.attributes.items():
        if name in _TYPED and attribute.type == ir.AttributeType.INT and attribute.value == _BF16:
            node.attributes[name] = ir.AttrInt64(name, int(_F32))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _BF16:
            wide = ir.tensor(attribute.value.numpy().astype("float32"))
            node.attributes[name] = ir.AttrTensor(name, wide)


def _nodes(model: ir.Model) -> list[Any]:
    return list(ir.traversal.RecursiveGraphIterator(model.graph))
