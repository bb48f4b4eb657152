"""The way from a norm layer to its hosts, or to what is in between, as steps in words."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace

from bntools.absorb import InputLayout
from bntools.dataflow.graph import Graph, Kind, Node, Value
from bntools.dataflow.reach import Refused, carried, crosses, is_zero, weight_name
from bntools.planning.folds import HostFold, NormFold
from bntools.report import Action, Decision, Explanation, Step, Way

__all__ = ["explain"]


def explain(graph: Graph, folds: Sequence[NormFold], decision: Decision) -> Explanation:
    """Explain what was decided about one norm layer, by the graph that it was decided on."""
    sites = [node for node in graph.of_kind(Kind.AFFINE) if node.norm.owner == decision.path]
    own = next((fold for fold in folds if fold.layer.path == decision.path), None)
    gone = _gone(graph, folds, own)
    told = _Teller({fold.layer.path: fold for fold in folds})
    if own is not None:
        walk = _forward if own.forward else _backward
        steps = told.steps(walk(sites[0], set(gone)), own.hosts)
        return Explanation(decision, (Way(_name(forward=own.forward), steps),), len(sites))
    ways = []
    if decision.action is Action.KEEP and sites and _looked_at(decision):
        steps = _with_stops(told.steps(_backward(sites[0], gone)), decision.detail)
        ways.append(Way("backward", steps, decision.reason, decision.detail))
        if decision.forward_reason is not None:
            detail = decision.forward_detail
            steps = _with_stops(told.steps(_forward(sites[0], gone)), detail)
            ways.append(Way("forward", steps, decision.forward_reason, detail))
    return Explanation(decision, tuple(ways), max(len(sites), 1))


def _name(*, forward: bool) -> str:
    return "forward" if forward else "backward"


def _with_stops(steps: Iterable[Step], detail: str) -> tuple[Step, ...]:
    """The steps, of which those that a refusal names are what stops the fold."""
    return tuple(
        replace(step, role="stops", says=f"{step.says}; here the fold ends")
        if step.role == "passes" and re.search(re.escape(_named(step)) + r"(?![\w.])", detail)
        else step
        for step in steps
    )


def _named(step: Step) -> str:
    """A step as `describe` says it."""
    return f"{step.operation} in {step.module or 'the model itself'}"


def _looked_at(decision: Decision) -> bool:
    """Whether the graph around a layer decided; a layer that is left out was not looked at."""
    return decision.forward_reason is not None


def _gone(graph: Graph, folds: Sequence[NormFold], own: NormFold | None) -> set[Node]:
    """The calls of norms that had folded when the layer did, or by the end."""
    paths = {f.layer.path for f in folds if own is None or f.turn < own.turn}
    return {node for node in graph.of_kind(Kind.AFFINE) if node.norm.owner in paths}


def _backward(site: Node, folded: Set[Node]) -> list[tuple[Node | None, Value]]:
    """What a norm's input comes from, up to linear calls and what stops a fold; the nearest first.

    A value without a producer stands for itself.
    """
    found: list[tuple[Node | None, Value]] = []
    seen: set[Value] = set()
    queue = [(0, 0, site.inputs[0])]
    while queue:
        _, _, value = heapq.heappop(queue)
        if value in seen or is_zero(value):
            continue
        seen.add(value)
        node = value.producer
        if all(node is None or known is not node for known, _ in found):
            found.append((node, value))
        if node is not None and node.kind is not Kind.LINEAR and crosses(node, folded, None):
            for given in carried(node):
                order = given.producer.order if given.producer is not None else -1
                heapq.heappush(queue, (-order, len(seen), given))
    return found


def _forward(site: Node, folded: Set[Node]) -> list[tuple[Node | None, Value]]:
    """What uses a norm's output, up to linear calls and what stops a fold; the nearest first."""
    found: dict[Node, Value] = {}
    reached = {site.outputs[0]}
    queue = [(node.order, i, node, site.outputs[0]) for i, node in _users(site.outputs[0])]
    heapq.heapify(queue)
    while queue:
        _, _, node, value = heapq.heappop(queue)
        if node in found:
            continue
        found[node] = value
        passes = crosses(node, folded, None) and not node.writes
        if node.kind is Kind.SUM:
            passes = passes and all(v in reached or v.parameter for v in node.inputs)
        reached.update(node.outputs if passes else ())
        for out in node.outputs if passes else ():
            for i, user in _users(out):
                heapq.heappush(queue, (user.order, len(found) * 1000 + i, user, out))
    return list(found.items())


def _users(value: Value) -> Iterable[tuple[int, Node]]:
    return enumerate(value.consumers)


class _Teller:
    """Puts operations into words; `folds` are those of the plan, by the paths of their norms."""

    def __init__(self, folds: Mapping[str, NormFold]) -> None:
        self.folds = folds

    def steps(
        self, way: Iterable[tuple[Node | None, Value]], hosts: Sequence[HostFold] = ()
    ) -> tuple[Step, ...]:
        """One step for every operation; of the linear calls only `hosts` absorb, if there are any.

        A parameter that a sum adds is a host by its own name.
        """
        named = {host.weight: host for host in hosts}
        return tuple(self._step(node, value, named) for node, value in way)

    def _step(self, node: Node | None, value: Value, hosts: Mapping[str, HostFold]) -> Step:
        if node is None:
            host = hosts.get(value.parameter or "")
            what = f"parameter {value.parameter}" if value.parameter else "input of the model"
            if host is not None:
                return Step(what, "", "absorbs", "the scale goes into it")
            return Step(what, "", "stops", "it is no linear layer")
        name = node.name.strip("_")
        if node.kind is Kind.LINEAR:
            return self._linear(node, hosts)
        if node.kind is Kind.AFFINE:
            return self._norm(node, hosts)
        says = _condition(node)
        if says:
            return Step(name, node.module, "passes", says)
        what = "it leaves the forward" if node.kind is Kind.OUTPUT else "it is no such operation"
        return Step(name, node.module, "stops", f"{what} that a scale and shift pass")

    def _norm(self, node: Node, hosts: Mapping[str, HostFold]) -> Step:
        path = node.norm.owner
        fold = self.folds.get(path)
        if fold is not None:
            into = ", ".join(dict.fromkeys(host.path for host in fold.hosts))
            return Step("norm layer", path, "passes", f"it is gone, into {into}")
        host = None if node.norm.linear is None else hosts.get(weight_name(node))
        if host is not None:
            return Step("norm layer", path, "absorbs", f"it stays; {_absorbing(host)}")
        return Step("norm layer", path, "stops", "it stays, and is no linear layer")

    def _linear(self, node: Node, hosts: Mapping[str, HostFold]) -> Step:
        name, key = node.name.strip("_"), node.linear.host
        try:
            key = key or weight_name(node)
        except Refused as refused:
            return Step(name, node.module, "stops", refused.detail)
        host = hosts.get(key)
        if host is not None:
            return Step(name, host.path, "absorbs", _absorbing(host))
        return Step(name, node.linear.host or node.module, "is reached", "it is a linear layer")


def _absorbing(host: HostFold) -> str:
    side = "input" if host.before else "output"
    if host.registered:
        return f"by its registered rule, for each {side} channel"
    groups = host.layout.groups if isinstance(host.layout, InputLayout) else 1
    scaled = f"the scale goes into {host.weight}, for each {side} channel"
    grouped = f" of its {groups} groups" if groups > 1 else ""
    if host.bias is None:
        shifted = "the shift is 0"
    elif host.gains_bias:
        shifted = f"the shift goes into {host.bias}, which it gains"
    else:
        shifted = f"the shift goes into {host.bias}"
    pads = "; it pads with the value that the norm maps to 0" if host.padding else ""
    return f"{scaled}{grouped}; {shifted}{pads}"


def _condition(node: Node) -> str:
    """What holds for an operation that a scale and shift pass; empty for any other."""
    if node.kind is Kind.MOVE:
        return "it moves data and drops some" if node.move.partial else "it only moves data"
    if node.kind is Kind.SUM:
        factors = ", ".join(f"{k:g}" for k in node.sum.coefficients)
        return f"it adds its inputs, times {factors}"
    if node.kind is not Kind.PASS:
        return ""
    passing = node.passing
    if passing.gain is None:
        says = f"a scale passes, and no shift but 0: {passing.limit}"
    elif passing.gain == 1:
        says = "a scale and a shift pass as they are"
    else:
        says = f"a scale passes, and a shift times {passing.gain:g}"
    return f"{says}; no negative scale" if passing.monotone else says
