"""Plan, fold and prove an ONNX model, with roll-back."""

from __future__ import annotations

import json
import os
from typing import Any

import onnx
from onnx import ModelProto

from bntools.dataflow.reach import Refused
from bntools.onnx_graph.reading import read_onnx
from bntools.onnx_surgery.folding import FoldedOnnx, fold_proto
from bntools.onnx_surgery.planning import compiled_of, planned, replanned, viewed
from bntools.onnx_surgery.proving import OnnxProver
from bntools.onnx_surgery.writing import check_valid
from bntools.pipeline import timed, versions
from bntools.proving import Proof
from bntools.report import Check, Plan, Reason, Report, Result, as_json
from bntools.selection import Patterns

__all__ = ["OnnxModel", "fold_onnx", "plan_onnx"]

OnnxModel = str | os.PathLike[str] | ModelProto
_MOST_CULPRITS = 16


def plan_onnx(
    model: OnnxModel, example_inputs: Any = None, *, only: Patterns = "*", skip: Patterns = ()
) -> Plan:
    """Decide, for every norm of an ONNX model, whether it folds, where to, or why not.

    `model` is the path of a file or a `ModelProto`. Beside BatchNormalization nodes, chains of Mul,
    Div, Add and Sub by one constant per channel count (a FrozenBatchNorm2d, a LayerScale, the
    normalisation of an input). Layers are called by the module paths that torch's exporter notes
    in a file, else by the names of their nodes. `example_inputs`, which are named by keyword or in
    the order of the model's inputs, say which sizes to look at where these are open.

    Raises `LoadError` for a file that is no valid ONNX model, `InputError` for inputs that do not
    fit, `PlanError` where a pattern selects nothing.

    Example:
        >>> import torch, bntools
        >>> from onnx import parser
        >>> model = parser.parse_model('''<ir_version: 9, opset_import: ["" : 18]>
        ...   g (float[N,1,4,4] x) => (float[N,1,2,2] y)
        ...   <float[1,1,3,3] w = {1,1,1,1,1,1,1,1,1}, float[1] a = {2}, float[1] b = {1}>
        ...   { c = Conv(x, w)  y = BatchNormalization(c, a, b, b, a) }''')
        >>> [(d.path, d.kind, d.hosts) for d in bntools.plan_onnx(model).folds]
        [('y', 'BatchNormalization', ('c',))]
    """
    return planned(viewed(read_onnx(model), example_inputs), only=only, skip=skip)


def fold_onnx(
    model: OnnxModel,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    only: Patterns = "*",
    skip: Patterns = (),
    seed: int = 0,
) -> Result[Report]:
    """Fold the norms of an ONNX model into its linear layers, and prove the result.

    The result's `model` is a new `ModelProto`; the argument is left as it was. Names of inputs and
    outputs, opset, metadata and doc strings stay. It is judged on fresh inputs drawn from `seed`,
    in ONNX Runtime with its optimisations off, against the original in float64, and the same folds
    made in float64 have to agree to 1e-10; a fold that fails is undone and reported. `plan` is one
    of `plan_onnx`, whose other arguments these are.

    Raises as `plan_onnx` does, `NondeterministicError` where two runs on the same input differ,
    `RuntimeUnavailableError` where nothing here can run the model.

    Example:
        >>> import torch, bntools
        >>> from onnx import parser
        >>> model = parser.parse_model('''<ir_version: 9, opset_import: ["" : 18]>
        ...   g (float[N,1,4,4] x) => (float[N,1,2,2] y)
        ...   <float[1,1,3,3] w = {1,1,1,1,1,1,1,1,1}, float[1] a = {2}, float[1] b = {1}>
        ...   { c = Conv(x, w)  y = BatchNormalization(c, a, b, b, a) }''')
        >>> result = bntools.fold_onnx(model)
        >>> [node.op_type for node in result.model.graph.node], bool(result.report.check)
        (['Conv'], True)
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "plan"):
        if plan is None:
            plan = plan_onnx(model, example_inputs, only=only, skip=skip)
    with timed(seconds, "fold"):
        folded = _folded(plan)
    check = None
    if plan.folds:
        with timed(seconds, "check"):
            plan, folded, check = _proven(plan, folded, seed)
    report = Report(
        "fold", plan.decisions, check, plan.inputs, plan.warnings, folded.flushed, seconds,
        versions() | {"onnx": onnx.__version__},
    )  # fmt: skip
    if plan.folds:
        _sign(folded.proto, report)
    return Result(folded.proto, report)


def _folded(plan: Plan) -> FoldedOnnx:
    compiled = compiled_of(plan)
    return fold_proto(compiled.view.source.proto, compiled.graph, compiled.folds)


def _proven(plan: Plan, folded: FoldedOnnx, seed: int) -> tuple[Plan, FoldedOnnx, Check]:
    """Check a fold, and undo one after the other the folds that make the check fail."""
    prover = OnnxProver(compiled_of(plan).view, seed)
    refused: dict[str, Refused] = {}
    proof = _attempt(prover, plan, folded)
    while not proof and compiled_of(plan).folds:
        blamed = prover.blame(compiled_of(plan).folds)
        if len(refused) >= _MOST_CULPRITS:
            blamed = {d.path: "too many folds fail their check" for d in plan.folds}
        for path, why in blamed.items():
            refused[path] = Refused(Reason.CHECK_FAILED, f"undone: {why}")
        plan = replanned(plan, refused)
        folded = _folded(plan)
        proof = _attempt(prover, plan, folded)
    inputs = str(prover.examples)
    return plan, folded, Check(proof.native, proof.float64, seed, inputs, tuple(refused))


def _attempt(prover: OnnxProver, plan: Plan, folded: FoldedOnnx) -> Proof:
    try:
        if not compiled_of(plan).view.source.complaint:
            check_valid(folded.proto)
        return prover.check(compiled_of(plan).folds, folded)
    except Exception:
        if not compiled_of(plan).folds:
            raise
        return Proof(prover.nothing(), None)


def _sign(proto: ModelProto, report: Report) -> None:
    """Note in the file what was done to it; notes of an earlier fold are replaced."""
    done = {d.path: list(d.hosts) for d in report.folds}
    checked = report.check
    judged = checked.native.outputs if checked is not None else ()
    figures = [as_json({"name": o.name, "error": o.error, "limit": o.limit}) for o in judged]
    notes = {
        "bntools_version": report.versions.get("bntools", "unknown"),
        "bntools_folded": json.dumps(done),
        "bntools_verification": json.dumps({"inputs": report.inputs, "outputs": figures}),
    }
    for place in range(len(proto.metadata_props) - 1, -1, -1):
        if proto.metadata_props[place].key in notes:
            del proto.metadata_props[place]
    for key, value in notes.items():
        proto.metadata_props.add(key=key, value=value)
