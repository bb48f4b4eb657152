"""One plan of several recordings of a model: a fold has to come out the same in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace

from bntools.dataflow.graph import Graph
from bntools.dataflow.reach import Refused
from bntools.planning.deciding import decide
from bntools.planning.folds import Kept, NormFold, Outcome
from bntools.planning.options import PlanOptions
from bntools.report import Action, Decision, Reason

__all__ = ["decisions_of", "settled"]

Refusing = Callable[[Mapping[str, Outcome]], Mapping[str, Refused]]


def settled(
    graphs: Sequence[Graph],
    chosen: Set[str],
    refused: Mapping[str, Refused],
    options: PlanOptions,
    refusing: Refusing | None = None,
) -> dict[str, Outcome]:
    """What is decided on every graph; `refusing` says what else rules folds out."""
    forced = dict(refused)
    while True:
        outcomes = [decide(graph, chosen, forced, options) for graph in graphs]
        refusals = _differences(outcomes)
        if not refusals and refusing is not None:
            refusals = dict(refusing(outcomes[0]))
        if not refusals:
            return outcomes[0]
        forced.update(refusals)


def decisions_of(
    graph: Graph, outcome: Mapping[str, Outcome]
) -> tuple[tuple[Decision, ...], tuple[NormFold, ...]]:
    """The decisions for the user and the folds to be made, in execution order."""
    decisions = []
    for layer in graph.layers:
        found = outcome[layer.path]
        if isinstance(found, NormFold):
            hosts = tuple(dict.fromkeys(host.path for host in found.hosts))
            folded = Decision(layer.path, layer.kind, Action.FOLD, hosts, detail=found.via)
            decisions.append(replace(folded, forward=found.forward, affine=layer.chain))
        else:
            kept = Decision(layer.path, layer.kind, Action.KEEP, (), found.reason, found.detail)
            onward = found.forward if isinstance(found, Kept) else None
            if onward is not None:
                kept = replace(kept, forward_reason=onward.reason, forward_detail=onward.detail)
            decisions.append(replace(kept, affine=layer.chain))
    order = _execution_order(graph)
    decisions.sort(key=lambda d: order.get(d.path, len(graph.nodes)))
    folds = [f for f in outcome.values() if isinstance(f, NormFold)]
    folds.sort(key=lambda f: order[f.layer.path])
    return tuple(decisions), tuple(folds)


def _execution_order(graph: Graph) -> dict[str, int]:
    return {path: frames[0].start for path, frames in graph.frames.items()}


def _differences(outcomes: Sequence[dict[str, Outcome]]) -> dict[str, Refused]:
    found: dict[str, Refused] = {}
    for path, first in outcomes[0].items():
        for other in (outcome[path] for outcome in outcomes[1:]):
            if isinstance(first, NormFold):
                if isinstance(other, Refused):
                    found[path] = _differs(other, forward=first.forward)
                elif first.forward is not other.forward:
                    why = "for some inputs it folds backward, for others not"
                    found[path] = Kept(Refused(Reason.DATA_DEPENDENT, why))
                elif not _same_hosts(first, other):
                    found[path] = Refused(Reason.DATA_DEPENDENT, "its hosts depend on the input")
            elif isinstance(other, NormFold):
                found[path] = _differs(first, forward=other.forward)
    return found


def _differs(refused: Refused, *, forward: bool) -> Refused:
    """What to say of a fold in one direction that another recording refuses."""
    onward = refused.forward if isinstance(refused, Kept) else None
    if forward and onward is not None:
        if onward.reason is Reason.BIAS_NOT_USED:
            return refused
        refused = onward
    elif refused.reason is Reason.BIAS_NOT_USED:
        return Kept(refused)
    return Refused(
        Reason.DATA_DEPENDENT, f"for some inputs it folds, for others not: {refused.detail}"
    )


def _same_hosts(a: NormFold, b: NormFold) -> bool:
    return len(a.hosts) == len(b.hosts) and all(
        x.same_as(y) for x, y in zip(a.hosts, b.hosts, strict=True)
    )
