"""Whether a norm layer folds backward into its hosts, on one graph.

A norm folds into a linear layer (its host) when all that the norm sees comes from hosts through
data movement, each channel unmixed, and nobody else sees those channels before the norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import nn

from bntools.absorb import OutputLayout, overflows
from bntools.affine import Affine
from bntools.dataflow.graph import Frame, Graph, Kind, Node, NormLayer
from bntools.dataflow.reach import (
    Refused,
    affines_at,
    describe,
    meets,
    passes,
    reach,
    sources,
    weight_name,
    weight_uses,
)
from bntools.report import Reason

__all__ = ["BackwardPlanner", "HostFold", "NormFold", "Outcome", "bias_beside"]


_CURE = "teach bntools what it does with register_norm(...)"
_AFFINE_REASONS = {
    Reason.COMPUTED_AFFINE: "its weight, bias or statistics are computed at run time",
    Reason.NO_STATISTICS: "it has no running statistics",
    Reason.TRAINING_MODE: "it stays in training mode and normalises with batch statistics",
    Reason.NON_FINITE: "its statistics give NaN or infinite values",
}


@dataclass(frozen=True, eq=False)
class HostFold:
    """What a host absorbs: an affine per output channel of one weight.

    `bias` is the name of its bias; `gains_bias` says that the host has none yet. A registered host
    has the name of its path as `weight`, and no bias.
    """

    path: str
    weight: str
    bias: str | None
    gains_bias: bool
    layout: OutputLayout
    affine: Affine
    registered: bool = False

    def same_as(self, other: HostFold) -> bool:
        """Whether both folds do the same to the same host (one may have been given a bias)."""
        mine, theirs = (
            (self.path, self.weight, self.layout),
            (other.path, other.weight, other.layout),
        )
        return mine == theirs and self.affine.same_as(other.affine)


@dataclass(frozen=True, eq=False)
class NormFold:
    """The fold of one norm layer into its hosts.

    `turn` orders the folds of one plan: a host absorbs them from the lowest to the highest.
    """

    layer: NormLayer
    hosts: tuple[HostFold, ...]
    via: str = ""
    turn: int = 0


Outcome = NormFold | Refused


def bias_beside(graph: Graph, weight: str) -> str:
    """The name that the bias of a weight's layer has, whether it is there or not."""
    owner = graph.owners[weight]
    return f"{owner}.bias" if owner else "bias"


class BackwardPlanner:
    """Decides on the norm layers of one graph, until nothing changes any more."""

    def __init__(self, graph: Graph, chosen: Set[str], forced: Mapping[str, Refused]) -> None:
        self.graph = graph
        self.chosen = chosen
        self.forced = forced
        self.sites: dict[str, list[Node]] = {}
        for node in graph.of_kind(Kind.AFFINE):
            self.sites.setdefault(node.norm.owner, []).append(node)
        self.folded: set[Node] = set()
        self.absorbed: dict[str, Affine] = {}

    def run(self) -> dict[str, Outcome]:
        """An outcome for every layer."""
        outcomes: dict[str, Outcome] = {}
        pending = list(self.graph.layers)
        changed = True
        while changed:
            changed = False
            for layer in list(pending):
                outcome = self._outcome(layer)
                outcomes[layer.path] = outcome
                if isinstance(outcome, NormFold):
                    pending.remove(layer)
                    self._accept(outcome)
                    changed = True
        return outcomes

    def _accept(self, fold: NormFold) -> None:
        self.folded.update(self.sites[fold.layer.path])
        for host in fold.hosts:
            before = self.absorbed.get(host.weight)
            self.absorbed[host.weight] = before.then(host.affine) if before else host.affine

    def _outcome(self, layer: NormLayer) -> Outcome:
        refused = self._refused_beforehand(layer) or self._odd_calls(layer)
        if refused:
            return refused
        try:
            return self._fold(layer)
        except Refused as refusal:
            return refusal

    def _refused_beforehand(self, layer: NormLayer) -> Refused | None:
        if layer.path not in self.chosen:
            return Refused(Reason.SKIPPED, "it was left out by --only or --skip")
        if layer.path in self.forced:
            return self.forced[layer.path]
        if layer.refusal is not None:
            return Refused(*layer.refusal)
        sites = self.sites.get(layer.path, [])
        if not sites and layer.path not in self.graph.frames:
            return Refused(Reason.NOT_EXECUTED, "it did not run in the recorded forward")
        for node in sites:
            affine = node.norm.affine
            if isinstance(affine, Reason):
                return Refused(affine, _AFFINE_REASONS.get(affine, affine.value))
            if not affine.is_finite():
                return Refused(Reason.NON_FINITE, "its statistics give NaN or infinite values")
        return None

    def _odd_calls(self, layer: NormLayer) -> Refused | None:
        """Refuse a layer that does more than its norm, or whose norm others call or read."""
        sites, frames = self.sites.get(layer.path, []), self.graph.frames.get(layer.path, [])
        if len(sites) != len(frames) or any(node.module != layer.path for node in sites):
            detail = "code outside of its own forward uses its statistics"
            if not sites:
                return Refused(Reason.MORE_THAN_NORM, f"its forward is no batch norm: {_CURE}")
            return Refused(Reason.OUTSIDE_FORWARD, detail)
        for node, frame in zip(sites, frames, strict=True):
            if not self._only_norms(layer, node, frame):
                return Refused(Reason.MORE_THAN_NORM, f"its forward does more than norm: {_CURE}")
            for value in node.inputs[1:]:
                others = [c for c in value.consumers if c.kind is not Kind.AFFINE]
                if others:
                    detail = f"{describe(others[0])} reads its parameters or statistics as well"
                    return Refused(Reason.SHARED_STATISTICS, detail)
        return None

    def _only_norms(self, layer: NormLayer, node: Node, frame: Frame) -> bool:
        if frame.inputs != (node.inputs[0],):
            return False
        if layer.remainder:
            return True
        if frame.outputs != (node.outputs[0],):
            return False
        return layer.plain or all(
            other is node or all(value.constant for value in other.inputs)
            for other in self.graph.inside(frame)
        )

    def _fold(self, layer: NormLayer) -> NormFold:
        sites = self.sites[layer.path]
        origins = {site: sources(site.inputs[0], self.folded) for site in sites}
        via: set[str] = set()
        for site, hosts in origins.items():
            for host in hosts:
                via |= self._exclusive(host, site, sites)
        self._not_written_through(origins)
        self._not_by_stride(origins)
        affines: dict[Node, Affine] = {}
        for site, hosts in origins.items():
            for node, affine in affines_at(site, hosts, self.folded).items():
                if not affines.setdefault(node, affine).same_as(affine):
                    raise Refused(Reason.CHANNEL_MISMATCH, "its calls see the channels differently")
        detail = f"through {', '.join(sorted(via))}" if via else ""
        return NormFold(layer, self._hosts(affines), detail, turn=len(self.folded))

    def _exclusive(self, host: Node, site: Node, sites: Sequence[Node]) -> set[str]:
        """Nobody but this norm may see what it sees of the host; returns the moves in between."""
        reached = reach(host.outputs[0], self.folded)
        for end in reached.ends:
            if end.node in sites and end.value is end.node.inputs[0]:
                continue
            if meets(end, host, [site], self.folded):
                raise Refused(*_other_use(host, end.node))
        return {move.name.strip("_") for move in reached.moves if move.kind is Kind.MOVE}

    def _not_written_through(self, origins: dict[Node, list[Node]]) -> None:
        """After the fold, two calls on one tensor, or one on an expanded one, give no copies."""
        calls = [host for hosts in origins.values() for host in hosts]
        for site in origins:
            if len(set(calls)) == len(calls) and not _expanded(site, self.folded):
                continue
            ends = reach(site.outputs[0], self.folded).ends
            if any(end.value in end.node.writes for end in ends):
                detail = (
                    "what it gives is written in place, and would be shared memory after a fold"
                )
                raise Refused(Reason.WRITTEN_IN_PLACE, detail)

    def _not_by_stride(self, origins: dict[Node, list[Node]]) -> None:
        """After the fold, movement before the norm decides on the strides of what it gives."""
        for site, hosts in origins.items():
            if any(host.outputs[0] is site.inputs[0] for host in hosts):
                continue
            for end in reach(site.outputs[0], self.folded).ends:
                if end.node.name == "as_strided":
                    detail = "what it gives is read by stride, and would have other strides"
                    raise Refused(Reason.WRITTEN_IN_PLACE, detail)

    def _hosts(self, affines: dict[Node, Affine]) -> tuple[HostFold, ...]:
        """The hosts behind the linear calls; every call of a host must be among them."""
        found: dict[str, HostFold] = {}
        for node, affine in affines.items():
            host = self._host(node, affine)
            known = found.setdefault(host.weight, host)
            if not known.same_as(host) or known.bias != host.bias:
                detail = f"{host.path} is called more than once, and not alike"
                raise Refused(Reason.HOST_SHARED, detail)
            for call in self._calls(host):
                if call not in affines:
                    detail = f"{host.path} is called more than once, and not always before it"
                    raise Refused(Reason.HOST_SHARED, detail)
            self._fits(host)
        return tuple(found.values())

    def _calls(self, host: HostFold) -> Iterable[Node]:
        if host.registered:
            linear = self.graph.of_kind(Kind.LINEAR)
            return [other for other in linear if other.linear.host == host.path]
        return weight_uses(self.graph, host.weight)

    def _host(self, node: Node, affine: Affine) -> HostFold:
        linear = node.linear
        if linear.host is not None:
            path = linear.host
            return HostFold(path, path, None, False, linear.layout, affine, registered=True)
        name = weight_name(node)
        path = self.graph.owners[name]
        if path in self.graph.sealed:
            raise Refused(
                Reason.SCRIPTED, f"{path} is compiled by TorchScript and cannot be edited"
            )
        if name in self.graph.tied:
            also = ", ".join(self.graph.tied[name])
            raise Refused(Reason.TIED_WEIGHT, f"the weight {name} is also {also}")
        bias, gains = self._bias(node, name, needed=bool(affine.shift.any()))
        return HostFold(path, name, bias, gains, linear.layout, affine)

    def _bias(self, node: Node, weight: str, *, needed: bool) -> tuple[str | None, bool]:
        path, passed = self.graph.owners[weight], node.linear.bias
        if passed is None:
            name = bias_beside(self.graph, weight)
            if not needed and name not in self.graph.parameters:
                return None, False
            if name in self.graph.absent and self._may_gain_bias(weight):
                return name, True
            why = "ignores its bias" if name in self.graph.parameters else "has no bias"
            raise Refused(Reason.BIAS_NOT_USED, f"the recorded call of {path} {why}")
        bias = passed.parameter
        if bias is None:
            raise Refused(Reason.COMPUTED_WEIGHT, f"the bias of {path} is computed at run time")
        calls = weight_uses(self.graph, weight)
        only = all(c in calls and c.inputs.count(passed) == 1 for c in passed.consumers)
        if bias in self.graph.tied or not only:
            raise Refused(Reason.TIED_WEIGHT, f"the bias {bias} is used elsewhere as well")
        return bias, False

    def _may_gain_bias(self, weight: str) -> bool:
        """The parameter `weight` beside it says what dtype a new bias has."""
        beside = bias_beside(self.graph, weight).removesuffix("bias") + "weight"
        return isinstance(self.graph.tensors.get(beside), nn.Parameter)

    def _fits(self, host: HostFold) -> None:
        if host.registered:
            return
        before = self.absorbed.get(host.weight)
        affine = before.then(host.affine) if before else host.affine
        weight = self.graph.tensors[host.weight]
        bias = None if host.bias is None else self.graph.tensors.get(host.bias)
        if overflows(weight, bias, affine, host.layout):
            dtype = str(weight.dtype).removeprefix("torch.")
            raise Refused(Reason.NON_FINITE, f"the folded {host.weight} would overflow {dtype}")


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
