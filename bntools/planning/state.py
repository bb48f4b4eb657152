"""How far a plan has come: what is folded, and what hosts have absorbed."""

from __future__ import annotations

from collections.abc import Mapping, Set

from bntools.affine import Affine
from bntools.dataflow.graph import Graph, Kind, Node
from bntools.dataflow.reach import Refused
from bntools.planning.folds import NormFold

__all__ = ["PlanState"]


class PlanState:
    """The plan of one graph while it is made.

    `sites` are the calls of each norm layer, `folded` those that are gone, `absorbed` what the
    hosts hold by then, by the names of their weights. Layers outside of `chosen` and those in
    `forced` stay.
    """

    def __init__(self, graph: Graph, chosen: Set[str], forced: Mapping[str, Refused]) -> None:
        self.graph = graph
        self.chosen = chosen
        self.forced = forced
        self.sites: dict[str, list[Node]] = {}
        for node in graph.of_kind(Kind.AFFINE):
            self.sites.setdefault(node.norm.owner, []).append(node)
        self.folded: set[Node] = set()
        self.absorbed: dict[str, Affine] = {}

    def accept(self, fold: NormFold) -> None:
        """Take a fold into the plan."""
        self.folded.update(self.sites[fold.layer.path])
        for host in fold.hosts:
            before = self.absorbed.get(host.weight)
            self.absorbed[host.weight] = before.then(host.affine) if before else host.affine
