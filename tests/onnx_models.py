"""Small ONNX models for tests, written node by node: torch's exporter takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF, BFLOAT16, INT64 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.INT64,
)
Value = tuple[str, int, Sequence[int | str]]


def onnx_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    weights: dict[str, Any] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def node(kind: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        kind,
        inputs.split(),
        outputs.split(),
        name=name or f"{kind.lower()}_{outputs}",
        **attributes,
    )


def linear(seed: int = 0, bias: float = 0.0) -> onnx.ModelProto:
    """Give y = relu(x @ w + b) for x of any batch and four features, six outputs."""
    random = np.random.default_rng(seed)
    weights = {
        "w": random.standard_normal((4, 6)).astype(np.float32),
        "b": (random.standard_normal(6) + bias).astype(np.float32),
    }
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "a"), node("Relu", "a", "y")]
    return onnx_model(nodes, [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n", 6])], weights)


def same(kind: int, operation: str = "Identity") -> onnx.ModelProto:
    """Give y = operation(x) for x of any batch and four features of a type."""
    return onnx_model([node(operation, "x", "y")], [("x", kind, ["n", 4])], [("y", kind, ["n", 4])])
