"""What an exported graph is rid of: computed constants, local paths, names that clash."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

__all__ = ["clean", "name_ends", "operators", "training_norm"]

_KEPT = ("namespace", "pkg.torch.onnx.class_hierarchy", "pkg.torch.onnx.name_scopes")
"""The metadata of a node that says which module it is of. The rest has local paths, or is noise."""
_UNSAFE = re.compile(r"\W+")


def clean(model: ir.Model) -> None:
    """Compute what is constant (a conv without a bias gets a computed one), and drop what is noise.

    No node is fused with another, no norm is folded: that is done before, where it is proven.
    """
    optimizer.inline(model)
    optimizer.fold_constants(model, onnx_shape_inference=False)
    _drop_zero_biases(model)
    passes = ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )
    passes(model)
    _drop_notes(model)


def _drop_zero_biases(model: ir.Model) -> None:
    """A conv without a bias gets zeros from torch's exporter, of a wrong shape in three dimensions.

    (onnxscript 0.7, `aten_conv3d`: (C, 2) in the place of (C,), which ONNX Runtime refuses.)
    """
    for node in _nodes(model):
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3:
            continue
        bias = node.inputs[2]
        zeros = None if bias is None else ir.convenience.get_const_tensor(bias)
        if zeros is not None and not zeros.numpy().any():
            node.resize_inputs(2)


def _drop_notes(model: ir.Model) -> None:
    model.graph.metadata_props.clear()
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None
    for node in _nodes(model):
        node.doc_string = None
        for key in [key for key in node.metadata_props if key not in _KEPT]:
            del node.metadata_props[key]


def name_ends(model: ir.Model, paths: Sequence[str], *, batch: str | None) -> None:
    """Give outputs the names of their paths, each its own value, and free dimensions one name.

    "output.boxes[0]" becomes boxes_0. A name that an input or another value has is changed there,
    unless it is an input.
    """
    _separate(model.graph)
    taken = {str(value.name) for value in model.graph.inputs}
    outputs = list(model.graph.outputs)
    for value, path in zip(outputs, paths, strict=True):
        value.name = _unique(_short(path), taken)
        taken.add(value.name)
    for value in _values(model):
        if value.name in taken and not value.is_graph_input() and value not in outputs:
            value.name = _unique(f"{value.name}_inner", taken)
            taken.add(value.name)
    common.NameFixPass()(model)
    if batch is not None:
        _rename_first_dimension(model, batch)


def _separate(graph: ir.Graph) -> None:
    """An output that is also an input, a constant or another output becomes a copy of it."""
    seen: set[ir.Value] = set()
    for index, value in enumerate(list(graph.outputs)):
        if value in seen or value.is_graph_input() or value.is_initializer():
            copy = ir.Value(name=f"{value.name}_copy_{index}", shape=value.shape, type=value.type)
            graph.append(ir.node("Identity", [value], outputs=[copy]))
            graph.outputs[index] = copy
        seen.add(value)


def _short(path: str) -> str:
    inner = path.removeprefix("output")
    return _UNSAFE.sub("_", inner).strip("_") if inner[:1] == "." else _plain(path)


def _plain(path: str) -> str:
    return _UNSAFE.sub("_", path).strip("_")


def _unique(name: str, taken: set[str]) -> str:
    name = name or "output"
    if name in taken:
        name = f"output_{name}" if not name.startswith("output") else name
    count, base = 1, name
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


def _rename_first_dimension(model: ir.Model, batch: str) -> None:
    """All first dimensions of the inputs that are free are one batch, and so say all shapes."""
    symbols = {
        str(value.shape[0].value)
        for value in model.graph.inputs
        if value.shape and isinstance(value.shape[0], ir.SymbolicDim) and value.shape[0].value
    }
    if not symbols:
        return
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(symbols)))})(?!\w)")
    for value in _values(model):
        if value.shape is not None:
            sizes = [d.value if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            value.shape = ir.Shape(
                [pattern.sub(batch, d) if isinstance(d, str) else d for d in sizes]
            )


def operators(model: ir.Model) -> dict[str, int]:
    """How many nodes of each kind a graph has, the most frequent first."""
    counts: dict[str, int] = {}
    for node in _nodes(model):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def training_norm(model: ir.Model) -> str | None:
    """The module in which a norm uses the statistics of its batch; None where none does.

    A norm of weights (weight standardisation) does not count: it gives the same for every batch.
    """
    for node in _nodes(model):
        if node.op_type != "BatchNormalization":
            continue
        mode = node.attributes.get("training_mode")
        operation = _told(node, "class_hierarchy", -1)
        in_training = "_batch_norm" in operation and "no_training" not in operation
        if ((mode is not None and mode.value) or in_training) and _sees_input(node):
            return _told(node, "name_scopes", -2)
    return None


def _told(node: Any, key: str, place: int) -> str:
    found = ast.literal_eval(node.metadata_props.get(f"pkg.torch.onnx.{key}", "[]"))
    return str(found[place]) if len(found) >= abs(place) else ""


def _sees_input(node: Any) -> bool:
    """Whether an input of the graph reaches a node."""
    pending, seen = list(node.inputs), set()
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if value.is_graph_input():
            return True
        before = value.producer()
        pending.extend(before.inputs if before is not None else ())
    return False


def _nodes(model: ir.Model) -> Iterator[Any]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in _nodes(model):
        yield from node.outputs
