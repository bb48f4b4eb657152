"""The doctor for ONNX files: the statistics of every norm, and where it would fold or why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bntools.affine import Affine
from bntools.dataflow.graph import Kind
from bntools.health import NormFacts, findings
from bntools.onnx_graph.building import OnnxGraph
from bntools.onnx_graph.reading import read_onnx
from bntools.onnx_surgery.pipeline import OnnxModel
from bntools.onnx_surgery.planning import compiled_of, planned, viewed
from bntools.planning import absorptions
from bntools.report import Decision, Inspection, LayerHealth, Range, Reason

__all__ = ["inspect_onnx"]


def inspect_onnx(model: OnnxModel, example_inputs: Any = None) -> Inspection:
    """Examine every norm of an ONNX model: its statistics, and where it would fold or why not.

    The findings are those of `inspect`; the arguments and the names of layers those of
    `plan_onnx`. Raises as that does.

    Example:
        >>> import torch, bntools
        >>> from onnx import parser
        >>> model = parser.parse_model('''<ir_version: 9, opset_import: ["" : 18]>
        ...   g (float[N,1,4,4] x) => (float[N,1,2,2] y)
        ...   <float[1,1,3,3] w = {1,1,1,1,1,1,1,1,1}, float[1] a = {-2}, float[1] b = {1}>
        ...   { c = Conv(x, w)  y = BatchNormalization(c, b, b, b, a) }''')
        >>> [(f.path, f.severity.value, f.code) for f in bntools.inspect_onnx(model).errors]
        [('y', 'error', 'negative-variance')]
    """
    view = viewed(read_onnx(model), example_inputs)
    plan = planned(view)
    compiled = compiled_of(plan)
    flushed: Counter[str] = Counter()
    biased: dict[str, tuple[str, ...]] = {}
    tensors = compiled.graph.graph.tensors
    last = {}
    for fold in compiled.folds:
        own = [host for host in fold.hosts if host.bias is not None and not host.gains_bias]
        biased[fold.layer.path] = tuple(host.path for host in own)
        last.update({host.weight: fold.layer.path for host in fold.hosts})
    for weight, absorption in absorptions(compiled.folds).items():
        bias = tensors.get(absorption.host.bias) if absorption.host.bias is not None else None
        with torch.no_grad():
            flushed[last[weight]] += absorption.absorbed(tensors[weight], bias).flushed
    seen = _Seen(compiled.graph, biased, flushed)
    facts = [seen.facts(decision) for decision in plan.decisions]
    return Inspection(
        tuple(each.health for each in facts),
        findings(facts, training=False),
        inputs=plan.inputs,
        warnings=plan.warnings,
    )


class _Seen:
    """What a plan knows about the norms of a file."""

    def __init__(
        self, graph: OnnxGraph, biased: Mapping[str, tuple[str, ...]], flushed: Counter[str]
    ) -> None:
        self._graph = graph
        self._biased = biased
        self._flushed = flushed
        self._affines = {
            node.norm.owner: node.norm.affine
            for node in graph.graph.of_kind(Kind.AFFINE)
            if isinstance(node.norm.affine, Affine)
        }

    def facts(self, decision: Decision) -> NormFacts:
        site = self._graph.sites.get(decision.path)
        call = site.call if site is not None else None
        values = {name: tensor.flatten() for name, tensor in (call.values if call else {}).items()}
        affine = self._affines.get(decision.path)
        health = LayerHealth(
            decision.path,
            decision.kind,
            channels=affine.channels if affine is not None else None,
            eps=float(str(np.float32(call.eps))) if call is not None else None,
            momentum=_momentum(call.momentum) if call is not None else None,
            mean=_range(values.get("mean")),
            variance=_range(values.get("variance")),
            gamma=_range(values.get("gamma")),
            decision=decision,
        )
        return NormFacts(
            health,
            values,
            affine=affine,
            in_training=decision.reason is Reason.TRAINING_MODE,
            biased=self._biased.get(decision.path, ()),
            flushed=self._flushed[decision.path],
        )


def _momentum(given: float) -> float | None:
    """As torch counts it; 1 is what exporters write for None, the average of all batches."""
    return None if given == 1 else round(1.0 - given, 6)


def _range(values: Tensor | None) -> Range | None:
    finite = values[values.isfinite()] if values is not None else None
    if finite is None or not len(finite):
        return None
    return Range(float(finite.min()), float(finite.max()))
