"""Carrying a plan out on an ONNX model: new initialisers, and norms that are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from onnx import ModelProto
from torch import Tensor

from bntools.errors import PlanError
from bntools.onnx_graph.building import OnnxGraph, Term, bias_of
from bntools.onnx_graph.linears import LinearCall
from bntools.onnx_graph.tensors import FLOATS, tensor_of
from bntools.onnx_graph.values import Knowledge
from bntools.onnx_surgery.editing import Draft
from bntools.planning import Absorption, NormFold, absorptions
from bntools.resources import one_thread

__all__ = ["FoldedOnnx", "fold_proto"]


@dataclass(frozen=True)
class FoldedOnnx:
    """A folded model, and how many subnormal values became zero."""

    proto: ModelProto
    flushed: int


def fold_proto(
    proto: ModelProto, graph: OnnxGraph, folds: Sequence[NormFold], *, exact: bool = False
) -> FoldedOnnx:
    """Carry folds out on a copy of a model.

    With `exact` new weights stay in float64, for a model that is to be made double as a whole.
    """
    draft, flushed = Draft(proto), 0
    with torch.no_grad(), one_thread():
        for absorption in absorptions(folds).values():
            term = graph.terms.get(absorption.host.path)
            if term is not None:
                flushed += _scale(draft, graph.known, term, absorption, exact=exact)
                continue
            call = graph.hosts[absorption.host.path]
            flushed += _absorb(draft, graph.known, call, absorption, exact=exact)
    for fold in folds:
        site = graph.sites[fold.layer.path]
        draft.bypass(site.nodes, site.data, site.output)
    return FoldedOnnx(draft.finished(), flushed)


def _absorb(
    draft: Draft, known: Knowledge, call: LinearCall, absorption: Absorption, *, exact: bool
) -> int:
    """Give one linear layer its new weight and bias; how many values were flushed."""
    weight, bias = _tensor(known, call.weight, exact=exact), None
    stored = dtype = _dtype(known, call.weight)
    if call.weight_factor != 1.0:
        weight = weight.double() * call.weight_factor
    if call.bias is not None:
        dtype = _dtype(known, call.bias)
        bias = _tensor(known, call.bias, exact=True)
        bias = bias_of(bias, call, known[call.output].shape or ())
    new = absorption.absorbed(weight, bias)
    rounded = new.weight if exact else new.weight.to(stored)
    draft.put(call.node, call.weight_position, call.weight, rounded)
    if call.weight_factor != 1.0:
        draft.drop(call.node, "alpha")
    if new.bias is not None:
        _set_bias(draft, known, call, new.bias if exact else new.bias.to(dtype))
    return new.flushed


def _scale(
    draft: Draft, known: Knowledge, term: Term, absorption: Absorption, *, exact: bool
) -> int:
    """Give a sum another constant."""
    new = absorption.absorbed(_tensor(known, term.name, exact=exact), None)
    draft.put(term.node, term.position, term.name, new.weight)
    return new.flushed


def _tensor(known: Knowledge, name: str, *, exact: bool) -> Tensor:
    """A constant in its own type, or in float64: as it is before the model rounds it."""
    one = known[name]
    if one.array is None:
        raise PlanError("Cannot carry out this plan: it is of another model.")
    return torch.from_numpy(one.wide()) if exact else tensor_of(one.array, one.element)


def _dtype(known: Knowledge, name: str) -> torch.dtype:
    return FLOATS[known[name].element]


def _set_bias(draft: Draft, known: Knowledge, call: LinearCall, bias: Tensor) -> None:
    node = draft.node(call.node)
    if node.op_type == "MatMul":
        _set_addition(draft, known, call, bias)
        return
    if call.factor != 1.0:  # what the layer multiplied its bias with is in the bias now
        draft.drop(call.node, "beta")
    draft.put(call.node, 2, call.bias, bias)


def _set_addition(draft: Draft, known: Knowledge, call: LinearCall, bias: Tensor) -> None:
    """The bias of a product with a constant matrix is an addition behind it."""
    if call.addition is not None and call.bias is not None:
        place = list(draft.node(call.addition).input).index(call.bias)
        draft.put(call.addition, place, call.bias, bias.reshape(known[call.bias].shape or ()))
        return
    rank = len(known[call.output].shape or ())
    draft.add_behind(call.node, bias.reshape([-1] + [1] * (rank - 1 - call.channel_dim)))
