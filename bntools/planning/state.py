"""How far a plan has come: what is folded, and what hosts have absorbed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from bntools.affine import Affine
from bntools.dataflow.graph import Graph, Kind, Node, NormLayer
from bntools.dataflow.reach import Refused
from bntools.planning.folds import Absorption, HostFold, NormFold
from bntools.planning.options import PlanOptions

__all__ = ["PlanState"]


class PlanState:
    """The plan of one graph while it is made.

    `sites` are the calls of each norm layer, `folded` those that are gone, `absorbed` what the
    hosts hold by then on either side, by the names of their weights. Layers outside of `chosen` and
    those in `forced` stay.
    """

    def __init__(
        self,
        graph: Graph,
        chosen: Set[str],
        forced: Mapping[str, Refused],
        options: PlanOptions,
    ) -> None:
        self.graph = graph
        self.chosen = chosen
        self.forced = forced
        self.options = options
        self.sites: dict[str, list[Node]] = {}
        for node in graph.of_kind(Kind.AFFINE):
            self.sites.setdefault(node.norm.owner, []).append(node)
        self.folded: set[Node] = set()
        self.absorbed: dict[str, Absorption] = {}

    def holding(self, host: HostFold) -> Absorption:
        """What a host would hold with one fold more."""
        return self.absorbed.get(host.weight, Absorption()).then(host)

    def hosts(self, layer: NormLayer) -> bool:
        """Whether a norm layer, which stays, has absorbed another one."""
        linears = (node.norm.linear for node in self.sites[layer.path])
        weights = (linear.weight for linear in linears if linear is not None)
        return any(w is not None and w.parameter in self.absorbed for w in weights)

    def standing(self, paths: Iterable[str]) -> frozenset[Node]:
        """The calls of norm layers that can absorb others, of those that are not gone."""
        calls = {
            node
            for path in paths
            for node in self.sites[path]
            if node.norm.linear is not None and isinstance(node.norm.affine, Affine)
        }
        return frozenset(calls - self.folded)

    def accept(self, fold: NormFold) -> None:
        """Take a fold into the plan."""
        self.folded.update(self.sites[fold.layer.path])
        for host in fold.hosts:
            self.absorbed[host.weight] = self.holding(host)
