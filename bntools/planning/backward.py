"""Whether a norm layer folds backward into its hosts, on one graph.

A norm folds into a linear layer (its host) when all that the norm sees comes from hosts through
data movement, each channel unmixed, and nobody else sees those channels before the norm.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from bntools.affine import Affine
from bntools.dataflow.graph import Kind, Node, NormLayer
from bntools.dataflow.reach import (
    Refused,
    affines_at,
    describe,
    meets,
    passes,
    reach,
    sources,
)
from bntools.planning.folds import NormFold
from bntools.planning.hosts import host_folds
from bntools.planning.state import PlanState
from bntools.report import Reason

__all__ = ["fold_backward"]


def fold_backward(state: PlanState, layer: NormLayer) -> NormFold:
    """The fold of one norm layer into what comes before it, or `Refused`."""
    sites = state.sites[layer.path]
    origins = {site: sources(site.inputs[0], state.folded) for site in sites}
    via: set[str] = set()
    for site, hosts in origins.items():
        for host in hosts:
            via |= _exclusive(state, host, site, sites)
    _not_written_through(state, origins)
    _not_by_stride(state, origins)
    affines: dict[Node, Affine] = {}
    for site, hosts in origins.items():
        for node, affine in affines_at(site, hosts, state.folded).items():
            if not affines.setdefault(node, affine).same_as(affine):
                raise Refused(Reason.CHANNEL_MISMATCH, "its calls see the channels differently")
    detail = f"through {', '.join(sorted(via))}" if via else ""
    return NormFold(layer, host_folds(state, affines), detail, turn=len(state.folded))


def _exclusive(state: PlanState, host: Node, site: Node, sites: Sequence[Node]) -> set[str]:
    """Nobody but this norm may see what it sees of the host; returns the moves in between."""
    reached = reach(host.outputs[0], state.folded)
    for end in reached.ends:
        if end.node in sites and end.value is end.node.inputs[0]:
            continue
        if meets(end, host, [site], state.folded):
            raise Refused(*_other_use(host, end.node))
    return {move.name.strip("_") for move in reached.moves if move.kind is Kind.MOVE}


def _not_written_through(state: PlanState, origins: dict[Node, list[Node]]) -> None:
    """After the fold, two calls on one tensor, or one on an expanded one, give no copies."""
    calls = [host for hosts in origins.values() for host in hosts]
    for site in origins:
        if len(set(calls)) == len(calls) and not _expanded(site, state.folded):
            continue
        ends = reach(site.outputs[0], state.folded).ends
        if any(end.value in end.node.writes for end in ends):
            detail = "what it gives is written in place, and would be shared memory after a fold"
            raise Refused(Reason.WRITTEN_IN_PLACE, detail)


def _not_by_stride(state: PlanState, origins: dict[Node, list[Node]]) -> None:
    """After the fold, movement before the norm decides on the strides of what it gives."""
    for site, hosts in origins.items():
        if any(host.outputs[0] is site.inputs[0] for host in hosts):
            continue
        for end in reach(site.outputs[0], state.folded).ends:
            if end.node.name == "as_strided":
                detail = "what it gives is read by stride, and would have other strides"
                raise Refused(Reason.WRITTEN_IN_PLACE, detail)


def _expanded(site: Node, folded: Set[Node]) -> bool:
    node = site.inputs[0].producer
    while node is not None and passes(node, folded):
        if node.name == "expand":
            return True
        node = node.inputs[0].producer
    return False


def _other_use(host: Node, user: Node) -> tuple[Reason, str]:
    what = host.linear.host or host.module or "the layer before"
    if user.kind is not Kind.OUTPUT:
        return Reason.USED_ELSEWHERE, f"{describe(user)} also uses the output of {what}"
    if "hook" in user.name:
        return Reason.HOOKS, f"{user.name} would see another output of {what}"
    if user.name == "returned":
        return Reason.RETURNED, f"the model returns the output of {what} as well"
    if user.name.startswith("kept"):
        return Reason.RETURNED, f"the output of {what} is kept after the forward"
    return Reason.USED_ELSEWHERE, f"the output of {what} leaves the graph by {user.name}"
