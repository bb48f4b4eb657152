"""Whether a norm layer folds backward into its hosts, on one graph.

A norm folds into linear layers (its hosts) when all that the norm sees comes from them through
operations that its affine passes, each channel unmixed, and nobody else sees those channels before
the norm. What folds nowhere may still go into a norm layer that stays, which scales and shifts each
channel as well as any linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from bntools.affine import Affine
from bntools.dataflow.graph import Kind, Node, NormLayer, Value
from bntools.dataflow.reach import End, Origins, Refused, crosses, describe, origins, reach
from bntools.planning.constants import constant_folds
from bntools.planning.folds import HostFold, NormFold
from bntools.planning.hosts import host_folds
from bntools.planning.passage import Passage
from bntools.planning.state import PlanState
from bntools.report import Reason

__all__ = ["fold_backward"]


def fold_backward(
    state: PlanState, layer: NormLayer, standing: frozenset[Node] = frozenset()
) -> NormFold:
    """The fold of one norm layer into what comes before it, or `Refused`.

    `standing` are the calls of norm layers that stay and can be hosts.
    """
    sites = state.sites[layer.path]
    found = {site: origins(site.inputs[0], state.folded, standing) for site in sites}
    if standing and not any(standing.intersection(origin.hosts) for origin in found.values()):
        raise Refused(Reason.NOT_AFTER_LINEAR, "it follows no norm that stays")
    passages = [Passage(state, site, origin) for site, origin in found.items()]
    for passage in passages:
        _exclusive(state, passage, sites)
    _not_written_through(state, found)
    _not_by_stride(state, found)
    via = {n.name.strip("_") for o in found.values() for n in o.nodes if n.kind is not Kind.AFFINE}
    detail = f"through {', '.join(sorted(via))}" if via else ""
    if standing:
        detail = f"into a norm that stays, {detail}".removesuffix(", ")
    return NormFold(layer, _hosts(state, passages), detail, turn=len(state.folded))


def _hosts(state: PlanState, passages: Sequence[Passage]) -> tuple[HostFold, ...]:
    """What each host absorbs; in a sum, another layer takes the shift where one has no bias."""
    choices = max(passage.choices for passage in passages)
    for choice in range(choices):
        affines = _affines(passages, choice)
        hosts = {value.producer: a for value, a in affines.items() if _is_host(value)}
        constants = {value: a for value, a in affines.items() if not _is_host(value)}
        try:
            found = host_folds(state, {node: a for node, a in hosts.items() if node is not None})
        except Refused as refused:
            if refused.reason is not Reason.BIAS_NOT_USED or choice + 1 == choices:
                raise
        else:
            return found + constant_folds(state, constants)
    raise AssertionError("there is always a choice")


def _affines(passages: Sequence[Passage], choice: int) -> dict[Value, Affine]:
    affines: dict[Value, Affine] = {}
    for passage in passages:
        for value, affine in passage.affines(choice).items():
            if not affines.setdefault(value, affine).same_as(affine):
                raise Refused(Reason.CHANNEL_MISMATCH, "its calls see the channels differently")
    return affines


def _is_host(value: Value) -> bool:
    return value.producer is not None  # parameters that are added have none


def _exclusive(state: PlanState, passage: Passage, sites: Sequence[Node]) -> None:
    """Nobody but this norm may see what it sees of its hosts."""
    for value in passage.values:
        for end in reach(value, state.folded, passage.nodes).ends:
            if end.node in sites and end.value is end.node.inputs[0]:
                continue
            if passage.meets(end):
                raise Refused(*_other_use(value, end))
    unseen = passage.outputs_used_besides
    if unseen is not None:
        raise Refused(Reason.USED_ELSEWHERE, f"the indices that {describe(unseen)} gives are used")


def _not_written_through(state: PlanState, found: Mapping[Node, Origins]) -> None:
    """After the fold, two calls on one tensor, or one on an expanded one, give no copies."""
    calls = [host for origin in found.values() for host in origin.hosts]
    for site in found:
        if len(set(calls)) == len(calls) and not _expanded(site, state.folded):
            continue
        ends = reach(site.outputs[0], state.folded).ends
        if any(end.value in end.node.writes for end in ends):
            detail = "what it gives is written in place, and would be shared memory after a fold"
            raise Refused(Reason.WRITTEN_IN_PLACE, detail)


def _not_by_stride(state: PlanState, found: Mapping[Node, Origins]) -> None:
    """After the fold, movement before the norm decides on the strides of what it gives."""
    for site, origin in found.items():
        if any(host.outputs[0] is site.inputs[0] for host in origin.hosts):
            continue
        for end in reach(site.outputs[0], state.folded).ends:
            if end.node.name == "as_strided":
                detail = "what it gives is read by stride, and would have other strides"
                raise Refused(Reason.WRITTEN_IN_PLACE, detail)


def _expanded(site: Node, folded: Set[Node]) -> bool:
    node = site.inputs[0].producer
    while node is not None and crosses(node, folded):
        if node.name == "expand":
            return True
        node = node.inputs[0].producer
    return False


def _other_use(value: Value, end: End) -> tuple[Reason, str]:
    user = end.node
    if value.parameter is not None:
        return Reason.TIED_WEIGHT, f"{value.parameter}, which is added, is also used elsewhere"
    what = _name(value)
    if user.kind is not Kind.OUTPUT:
        return Reason.USED_ELSEWHERE, f"{describe(user)} also uses the output of {what}"
    if "hook" in user.name:
        return Reason.HOOKS, f"{user.name} would see another output of {what}"
    if user.name == "returned":
        return Reason.RETURNED, f"the model returns the output of {what} as well"
    if user.name.startswith("kept"):
        return Reason.RETURNED, f"the output of {what} is kept after the forward"
    return Reason.USED_ELSEWHERE, f"the output of {what} leaves the graph by {user.name}"


def _name(value: Value) -> str:
    host = value.producer
    if host is None:
        return "the layer before"
    return host.linear.host or host.module or "the layer before"
