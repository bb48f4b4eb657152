"""One decision for every norm layer of a graph, until nothing changes any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from typing import cast

from bntools.dataflow.graph import Frame, Graph, Kind, Node, NormLayer
from bntools.dataflow.reach import Refused, describe
from bntools.planning.backward import fold_backward
from bntools.planning.folds import Kept, NormFold, Outcome
from bntools.planning.forward import fold_forward
from bntools.planning.options import PlanOptions
from bntools.planning.state import PlanState
from bntools.report import Reason

__all__ = ["decide"]

_DEFAULT = PlanOptions()
_CURE = "teach bntools what it does with register_norm(...)"
_AFFINE_REASONS = {
    Reason.COMPUTED_AFFINE: "its weight, bias or statistics are computed at run time",
    Reason.NO_STATISTICS: "it has no running statistics",
    Reason.TRAINING_MODE: "it stays in training mode and normalises with batch statistics",
    Reason.NON_FINITE: "its statistics give NaN or infinite values",
}


def decide(
    graph: Graph,
    chosen: Set[str],
    forced: Mapping[str, Refused],
    options: PlanOptions = _DEFAULT,
) -> dict[str, Outcome]:
    """An outcome for every layer; those outside of `chosen` and those in `forced` stay."""
    state = PlanState(graph, chosen, forced, options)
    outcomes = _settled(state, graph.layers, _backward)
    open_layers = [x for x in graph.layers if _is_open(outcomes[x.path])]
    # no fold forward lets another one through backward: nothing but linear layers come after it
    outcomes |= _settled(state, open_layers, partial(_forward, outcomes))
    left = [x for x in open_layers if isinstance(outcomes[x.path], Kept)]
    for fold in (fold_backward, fold_forward):
        outcomes |= _settled(state, left, partial(_onto_norms, fold, outcomes))
        left = [x for x in left if isinstance(outcomes[x.path], Kept)]
    return outcomes | {x.path: _told_again(outcomes, state, x) for x in left if state.hosts(x)}


def _settled(
    state: PlanState,
    layers: Iterable[NormLayer],
    decided: Callable[[PlanState, NormLayer], Outcome],
) -> dict[str, Outcome]:
    """Decide on layers again and again, as one fold may let another one through."""
    outcomes: dict[str, Outcome] = {}
    pending = list(layers)
    changed = True
    while changed:
        changed = False
        for layer in list(pending):
            outcome = decided(state, layer)
            outcomes[layer.path] = outcome
            if isinstance(outcome, NormFold):
                pending.remove(layer)
                state.accept(outcome)
                changed = True
    return outcomes


def _backward(state: PlanState, layer: NormLayer) -> Outcome:
    refused = _refused_beforehand(state, layer) or _odd_calls(state, layer)
    if refused:
        return refused
    if layer.path in state.forced:
        return state.forced[layer.path]
    try:
        return fold_backward(state, layer)
    except Refused as refusal:
        return Kept(refusal)


def _forward(backward: Mapping[str, Outcome], state: PlanState, layer: NormLayer) -> Outcome:
    try:
        return fold_forward(state, layer)
    except Refused as refusal:
        return Kept(cast("Refused", backward[layer.path]), refusal)


def _onto_norms(
    fold: Callable[[PlanState, NormLayer, frozenset[Node]], NormFold],
    kept: Mapping[str, Outcome],
    state: PlanState,
    layer: NormLayer,
) -> Outcome:
    """Let a norm that stays absorb another one: of some in a row at most one is left."""
    if state.hosts(layer):
        return kept[layer.path]
    hosts = state.standing(path for path in kept if path != layer.path and _is_left(kept[path]))
    try:
        return fold(state, layer, hosts) if hosts else kept[layer.path]
    except Refused:
        return kept[layer.path]


def _told_again(kept: Mapping[str, Outcome], state: PlanState, layer: NormLayer) -> Outcome:
    """What stops a norm that stays, now that others have gone into it."""
    before, after = (fold(state, layer) for fold in (_backward, partial(_forward, kept)))
    if isinstance(before, Refused) and isinstance(after, Kept):
        return Kept(before, after.forward)
    return kept[layer.path]


def _is_left(outcome: Outcome) -> bool:
    """Whether a layer has been tried in both directions, and stays."""
    return isinstance(outcome, Kept) and outcome.forward is not None


def _is_open(outcome: Outcome) -> bool:
    """Whether a layer may still fold forward."""
    return isinstance(outcome, Kept) and outcome.forward is None


def _refused_beforehand(state: PlanState, layer: NormLayer) -> Refused | None:
    if layer.path not in state.chosen:
        return Refused(Reason.SKIPPED, "it was left out by --only or --skip")
    forced = state.forced.get(layer.path)
    if forced is not None and not _is_open(forced):
        return forced
    if layer.refusal is not None:
        return Refused(*layer.refusal)
    sites = state.sites.get(layer.path, [])
    if not sites and layer.path not in state.graph.frames:
        return Refused(Reason.NOT_EXECUTED, "it did not run in the recorded forward")
    for node in sites:
        affine = node.norm.affine
        if isinstance(affine, Reason):
            return Refused(affine, _AFFINE_REASONS.get(affine, affine.value))
        if not affine.is_finite():
            return Refused(Reason.NON_FINITE, "its statistics give NaN or infinite values")
    return None


def _odd_calls(state: PlanState, layer: NormLayer) -> Refused | None:
    """Refuse a layer that does more than its norm, or whose norm others call or read."""
    sites, frames = state.sites.get(layer.path, []), state.graph.frames.get(layer.path, [])
    if len(sites) != len(frames) or any(node.module != layer.path for node in sites):
        detail = "code outside of its own forward uses its statistics"
        if not sites:
            return Refused(Reason.MORE_THAN_NORM, f"its forward is no batch norm: {_CURE}")
        return Refused(Reason.OUTSIDE_FORWARD, detail)
    for node, frame in zip(sites, frames, strict=True):
        if not _only_norms(state, layer, node, frame):
            return Refused(Reason.MORE_THAN_NORM, f"its forward does more than norm: {_CURE}")
        for value in node.inputs[1:]:
            others = [c for c in value.consumers if c.kind is not Kind.AFFINE]
            if others:
                detail = f"{describe(others[0])} reads its parameters or statistics as well"
                return Refused(Reason.SHARED_STATISTICS, detail)
    return None


def _only_norms(state: PlanState, layer: NormLayer, node: Node, frame: Frame) -> bool:
    if frame.inputs != (node.inputs[0],):
        return False
    if layer.remainder:
        return True
    if frame.outputs != (node.outputs[0],):
        return False
    return layer.plain or all(
        other is node or all(value.constant for value in other.inputs)
        for other in state.graph.inside(frame)
    )
