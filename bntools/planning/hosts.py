"""Which parameters a linear call has, and whether they may absorb an affine."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from bntools.absorb import overflows
from bntools.affine import Affine
from bntools.dataflow.graph import Kind, Node
from bntools.dataflow.reach import Refused, bias_beside, weight_name, weight_uses
from bntools.planning.folds import HostFold
from bntools.planning.state import PlanState
from bntools.report import Reason

__all__ = ["host_folds"]


def host_folds(state: PlanState, affines: dict[Node, Affine]) -> tuple[HostFold, ...]:
    """The hosts behind the linear calls; every call of a host must be among them."""
    found: dict[str, HostFold] = {}
    for node, affine in affines.items():
        host = _host(state, node, affine)
        known = found.setdefault(host.weight, host)
        if not known.same_as(host) or known.bias != host.bias:
            detail = f"{host.path} is called more than once, and not alike"
            raise Refused(Reason.HOST_SHARED, detail)
        for call in _calls(state, host):
            if call not in affines:
                detail = f"{host.path} is called more than once, and not always before it"
                raise Refused(Reason.HOST_SHARED, detail)
        _fits(state, host)
    return tuple(found.values())


def _calls(state: PlanState, host: HostFold) -> Iterable[Node]:
    if host.registered:
        linear = state.graph.of_kind(Kind.LINEAR)
        return [other for other in linear if other.linear.host == host.path]
    return weight_uses(state.graph, host.weight)


def _host(state: PlanState, node: Node, affine: Affine) -> HostFold:
    linear = node.linear
    if linear.host is not None:
        path = linear.host
        return HostFold(path, path, None, False, linear.layout, affine, registered=True)
    name = weight_name(node)
    path = state.graph.owners[name]
    if path in state.graph.sealed:
        raise Refused(Reason.SCRIPTED, f"{path} is compiled by TorchScript and cannot be edited")
    if name in state.graph.tied:
        also = ", ".join(state.graph.tied[name])
        raise Refused(Reason.TIED_WEIGHT, f"the weight {name} is also {also}")
    bias, gains = _bias(state, node, name, needed=bool(affine.shift.any()))
    return HostFold(path, name, bias, gains, linear.layout, affine)


def _bias(state: PlanState, node: Node, weight: str, *, needed: bool) -> tuple[str | None, bool]:
    path, passed = state.graph.owners[weight], node.linear.bias
    if passed is None:
        name = bias_beside(state.graph, weight)
        if not needed and name not in state.graph.parameters:
            return None, False
        if name in state.graph.absent and _may_gain_bias(state, weight):
            return name, True
        why = "ignores its bias" if name in state.graph.parameters else "has no bias"
        raise Refused(Reason.BIAS_NOT_USED, f"the recorded call of {path} {why}")
    bias = passed.parameter
    if bias is None:
        raise Refused(Reason.COMPUTED_WEIGHT, f"the bias of {path} is computed at run time")
    calls = weight_uses(state.graph, weight)
    only = all(c in calls and c.inputs.count(passed) == 1 for c in passed.consumers)
    if bias in state.graph.tied or not only:
        raise Refused(Reason.TIED_WEIGHT, f"the bias {bias} is used elsewhere as well")
    return bias, False


def _may_gain_bias(state: PlanState, weight: str) -> bool:
    """The parameter `weight` beside it says what dtype a new bias has."""
    beside = bias_beside(state.graph, weight).removesuffix("bias") + "weight"
    return isinstance(state.graph.tensors.get(beside), nn.Parameter)


def _fits(state: PlanState, host: HostFold) -> None:
    if host.registered:
        return
    before = state.absorbed.get(host.weight)
    affine = before.then(host.affine) if before else host.affine
    weight = state.graph.tensors[host.weight]
    bias = None if host.bias is None else state.graph.tensors.get(host.bias)
    if overflows(weight, bias, affine, host.layout):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise Refused(Reason.NON_FINITE, f"the folded {host.weight} would overflow {dtype}")
