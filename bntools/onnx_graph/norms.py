"""BatchNormalization nodes: the map that each applies, or why it is not known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from onnx import NodeProto
from torch import Tensor

from bntools.affine import Affine
from bntools.onnx_graph.attributes import attribute, is_standard
from bntools.onnx_graph.reading import inner_graphs, nodes_in
from bntools.onnx_graph.tensors import FLOATS
from bntools.onnx_graph.values import Knowledge
from bntools.report import Reason

__all__ = ["NormCall", "inner_norms", "norm_call"]

_PARTS = ("gamma", "beta", "mean", "variance")


@dataclass(frozen=True, eq=False)
class NormCall:
    """One BatchNormalization: `values` are its constants in float64, as far as they are known."""

    affine: Affine | Reason
    values: dict[str, Tensor]
    eps: float
    momentum: float
    refusal: tuple[Reason, str] | None = None


def norm_call(node: NodeProto, known: Knowledge) -> NormCall:
    """Read a BatchNormalization node of any opset."""
    eps = float(attribute(node, "epsilon", 1e-5))
    momentum = float(attribute(node, "momentum", 0.9))
    values: dict[str, Tensor] = {}
    for part, name in zip(_PARTS, node.input[1:], strict=False):
        one = known[name]
        if one.constant and one.array is not None and one.element in FLOATS:
            values[part] = torch.from_numpy(one.wide())
    affine: Affine | Reason = Reason.COMPUTED_AFFINE
    if len(values) == len(_PARTS) and len({tensor.shape for tensor in values.values()}) == 1:
        affine = Affine.of_batch_norm(
            values["mean"], values["variance"], values["gamma"], values["beta"], eps=eps
        )
    return NormCall(affine, values, eps, momentum, _refusal(node, values))


def _refusal(node: NodeProto, values: dict[str, Tensor]) -> tuple[Reason, str] | None:
    outputs = len([name for name in node.output if name])
    tested = any(each.name == "is_test" for each in node.attribute)  # opset 6 and before
    training = attribute(node, "training_mode", 0) or (tested and not attribute(node, "is_test", 0))
    if training or outputs > 1:
        return (
            Reason.TRAINING_MODE,
            "it normalises with the statistics of each batch (training_mode=1)",
        )
    if not attribute(node, "spatial", 1) or any(tensor.dim() != 1 for tensor in values.values()):
        return Reason.CHANNEL_MISMATCH, "its statistics are not one number per channel"
    return None


def inner_norms(node: NodeProto) -> Iterator[NodeProto]:
    """The BatchNormalization nodes in the branches and bodies of a node."""
    for graph in inner_graphs(node):
        for inner in nodes_in(graph):
            if is_standard(inner) and inner.op_type == "BatchNormalization":
                yield inner
