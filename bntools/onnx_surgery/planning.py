"""From an ONNX model to a plan, by the planner that plans PyTorch models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bntools.dataflow.reach import Refused
from bntools.errors import InputError, PlanError
from bntools.examples import Examples, given
from bntools.onnx_graph.building import OnnxGraph, built
from bntools.onnx_graph.observing import observed
from bntools.onnx_graph.reading import OnnxSource
from bntools.onnx_graph.sizes import (
    Intake,
    Sizes,
    candidates,
    drawn,
    given_sizes,
    intakes,
    open_names,
)
from bntools.onnx_graph.tensors import dtype_name
from bntools.onnx_graph.values import Knowledge
from bntools.planning import NormFold, Outcome, PlanOptions
from bntools.planning.agreement import decisions_of, settled
from bntools.report import Action, Decision, Plan, Reason
from bntools.selection import Patterns, select

__all__ = ["OnnxCompiled", "compiled_of", "planned", "replanned", "viewed"]

_SEED = 30


@dataclass(frozen=True, eq=False)
class View:
    """A model as the planner sees it: a graph for each size of inputs that was looked at.

    `tensors` are the example inputs, where some were given.
    """

    source: OnnxSource
    inputs: tuple[Intake, ...]
    sizes: Sizes
    graphs: tuple[OnnxGraph, ...]
    tensors: dict[str, torch.Tensor] | None = None

    @property
    def described(self) -> str:
        """The inputs in words."""
        told = [f"{i.name}={_told(self.sizes[i.name], i)}" for i in self.inputs]
        return ", ".join(told) + ("" if self.tensors is not None else " (inferred)")

    def examples(self, seed: int) -> Examples:
        """Inputs of these sizes: those that were given, varied, or random ones."""
        if self.tensors is not None:
            return Examples(kwargs=dict(self.tensors)).varied(_SEED + seed)
        tensors = drawn(self.inputs, self.sizes, _SEED + seed)
        return Examples(kwargs=dict(tensors), inferred=True, drawn=True)

    def others(self) -> Iterator[Sizes]:
        """Further sizes that may be tried, where the first do not run."""
        if self.tensors is None:
            yield from candidates(self.inputs)


@dataclass(frozen=True, eq=False)
class OnnxCompiled:
    """A plan in the form that can be carried out on the file that it was made for."""

    view: View
    chosen: frozenset[str]
    folds: tuple[NormFold, ...]

    @property
    def graph(self) -> OnnxGraph:
        """Where in the file the layers are."""
        return self.view.graphs[0]


def _told(sizes: tuple[int, ...], intake: Intake) -> str:
    return " ".join([*(["x".join(map(str, sizes))] if sizes else []), dtype_name(intake.element)])


def viewed(source: OnnxSource, example_inputs: Any = None) -> View:
    """Look at a model for two sizes of its inputs, where sizes are open.

    Raises `InputError` for inputs that do not fit.
    """
    proto = source.proto
    inputs, tensors = intakes(proto), None
    if example_inputs is not None:
        sizes, tensors = given_sizes(inputs, given(example_inputs))
        known = _known(source, inputs, sizes)
    else:
        sizes, known = _inferred(source, inputs)
    graphs = [built(source, known)]
    other = _other_sizes(inputs, sizes)
    if other is not None:
        second = _known(source, inputs, other)
        if second.consistent:
            graphs.append(built(source, second))
    return View(source, inputs, sizes, tuple(graphs), tensors)


def _inferred(source: OnnxSource, inputs: tuple[Intake, ...]) -> tuple[Sizes, Knowledge]:
    first: Sizes | None = None
    for sizes in candidates(inputs):
        known = Knowledge(source.proto, sizes, open_names(source.proto))
        first = first or sizes
        if known.consistent:
            return sizes, _completed(source, inputs, sizes, known)
    if first is None:
        raise InputError("Cannot infer an input: the ONNX model has none. Check the file.")
    return first, _known(source, inputs, first)


def _known(source: OnnxSource, inputs: tuple[Intake, ...], sizes: Sizes) -> Knowledge:
    known = Knowledge(source.proto, sizes, open_names(source.proto))
    return _completed(source, inputs, sizes, known)


def _completed(
    source: OnnxSource, inputs: tuple[Intake, ...], sizes: Sizes, known: Knowledge
) -> Knowledge:
    """The same, with what cannot be inferred taken from a run."""
    if not known.incomplete:
        return known
    names = open_names(source.proto)
    seen = observed(source.proto, drawn(inputs, sizes, _SEED), known.incomplete)
    return Knowledge(source.proto, sizes, names, seen) if seen else known


def _other_sizes(inputs: tuple[Intake, ...], sizes: Sizes) -> Sizes | None:
    """Other sizes wherever they are open; None where all are fixed."""
    if all(isinstance(size, int) for intake in inputs for size in intake.shape):
        return None
    batches = {intake.shape[0] for intake in inputs if intake.shape}

    def other(wanted: int | str, size: int, axis: int) -> int:
        if isinstance(wanted, int):
            return size
        return size + 1 if axis == 0 or (wanted and wanted in batches) else 2 * size

    return {
        intake.name: tuple(
            other(wanted, size, axis)
            for axis, (wanted, size) in enumerate(
                zip(intake.shape, sizes[intake.name], strict=True)
            )
        )
        for intake in inputs
    }


def planned(view: View, *, only: Patterns = "*", skip: Patterns = ()) -> Plan:
    """The plan of a model.

    Raises `PlanError` where a pattern selects nothing.
    """
    paths = [layer.path for layer in view.graphs[0].graph.layers]
    return _plan(view, frozenset(select(paths, only, skip)), {})


def replanned(plan: Plan, refused: Mapping[str, Refused]) -> Plan:
    """The same plan with some layers ruled out, and with them whatever folds through them."""
    compiled = compiled_of(plan)
    return _plan(compiled.view, compiled.chosen, refused)


def compiled_of(plan: Plan) -> OnnxCompiled:
    """What a plan of an ONNX model keeps."""
    if not isinstance(plan.compiled, OnnxCompiled):
        raise PlanError("Cannot carry out this plan: it was not made by plan_onnx in this process.")
    return plan.compiled


def _plan(view: View, chosen: frozenset[str], refused: Mapping[str, Refused]) -> Plan:
    graphs = [each.graph for each in view.graphs]
    outcome: dict[str, Outcome] = settled(graphs, chosen, refused, PlanOptions())
    decisions, folds = decisions_of(graphs[0], outcome)
    told = tuple(_worded(view, each) for each in decisions if not _is_trivial(view, each))
    warnings = []
    if view.source.inlined:
        warnings.append(f"{view.source.inlined} local functions of the model are inlined")
    if view.source.complaint:
        warnings.append(f"onnx's checker refuses the file ({view.source.complaint})")
    return Plan(told, view.described, tuple(warnings), OnnxCompiled(view, chosen, folds))


def _is_trivial(view: View, decision: Decision) -> bool:
    """Arithmetic with one number for all channels is no news unless it folds."""
    site = view.graphs[0].sites.get(decision.path)
    return decision.action is Action.KEEP and site is not None and site.trivial


def _worded(view: View, decision: Decision) -> Decision:
    """Sentences about parameters, in the words of ONNX files."""
    if decision.reason is Reason.FIXED_WEIGHT and open_names(view.source.proto):
        why = (
            "a weight beside it is also an input, so a caller may override it; take it out of them"
        )
        return replace(decision, detail=why)
    if decision.reason is Reason.COMPUTED_AFFINE and open_names(view.source.proto):
        why = "its numbers are inputs as well, so a caller may override them; take them out of them"
        return replace(decision, detail=why)
    if decision.reason in (Reason.COMPUTED_WEIGHT, Reason.FIXED_WEIGHT):
        text = decision.detail.partition(";")[0].replace(
            "is no parameter of the model", "is no constant"
        )
        return replace(decision, detail=text)
    return decision
