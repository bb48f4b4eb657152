"""Which parameters a linear call has, and whether they may absorb an affine."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bntools.absorb import overflows
from bntools.affine import Affine
from bntools.dataflow.graph import Kind, Node
from bntools.dataflow.reach import Refused, bias_beside, weight_name, weight_uses
from bntools.planning.folds import Absorption, HostFold, output_layout
from bntools.planning.state import PlanState
from bntools.report import Reason

__all__ = ["check_range", "host_folds"]


def host_folds(
    state: PlanState, affines: dict[Node, Affine], *, before: bool = False
) -> tuple[HostFold, ...]:
    """The hosts behind the linear calls; every call of a host must be among them."""
    found: dict[str, HostFold] = {}
    where = "after" if before else "before"
    for node, affine in affines.items():
        host = _host(state, node, affine, before=before)
        known = found.setdefault(host.weight, host)
        if not known.same_as(host) or known.bias != host.bias:
            detail = f"{host.path} is called more than once, and not alike"
            raise Refused(Reason.HOST_SHARED, detail)
        for call in _calls(state, host):
            if call not in affines:
                detail = f"{host.path} is called more than once, and not always {where} it"
                raise Refused(Reason.HOST_SHARED, detail)
        check_range(state, host)
    return tuple(found.values())


def _calls(state: PlanState, host: HostFold) -> Iterable[Node]:
    if host.registered:
        linear = state.graph.of_kind(Kind.LINEAR)
        return [other for other in linear if other.linear.host == host.path]
    return weight_uses(state.graph, host.weight)


def _host(state: PlanState, node: Node, affine: Affine, *, before: bool) -> HostFold:
    linear = node.linear
    if linear.host is not None:
        path, layout = linear.host, linear.layout
        return HostFold(path, path, None, False, layout, affine, registered=True, before=before)
    name = weight_name(node)
    path = state.graph.owners[name]
    if path in state.graph.sealed:
        raise Refused(Reason.SCRIPTED, f"{path} is compiled by TorchScript and cannot be edited")
    _check_plain(state.graph.tensors[name], name)
    if name in state.graph.tied:
        also = ", ".join(state.graph.tied[name])
        raise Refused(Reason.TIED_WEIGHT, f"the weight {name} is also {also}")
    bias, gains = _bias(state, node, name, needed=bool(affine.shift.any()))
    entry = linear.entry if before else None
    if entry is None or entry.layout is None:
        layout = linear.layout
        return HostFold(path, name, bias, gains, layout, affine, outputs=affine.channels)
    outputs = entry.layout.outputs(state.graph.tensors[name])
    return HostFold(path, name, bias, gains, entry.layout, affine, before=True, outputs=outputs)


def _check_plain(weight: Tensor, name: str) -> None:
    """Refuse sparse and quantised weights, which a fold would make plain ones of."""
    own = type(weight).__torch_dispatch__ != Tensor.__torch_dispatch__
    if own or weight.layout is not torch.strided:
        kind = type(weight).__name__ if own else str(weight.layout).removeprefix("torch.")
        detail = f"the weight {name} is a {kind} tensor, which keeps its numbers in another form"
        raise Refused(Reason.COMPUTED_WEIGHT, detail)


def _bias(state: PlanState, node: Node, weight: str, *, needed: bool) -> tuple[str | None, bool]:
    path, passed = state.graph.owners[weight], node.linear.bias
    if passed is None:
        name = bias_beside(state.graph, weight)
        if not needed:
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


def check_range(state: PlanState, host: HostFold) -> None:
    """Refuse a host that would not have room for what it absorbs."""
    if host.registered:
        return
    held = state.holding(host)
    weight = state.graph.tensors[host.weight]
    name = held.host.bias
    bias = None if name is None else state.graph.tensors.get(name)
    if held.before is None:
        after = held.after or host
        too_large = overflows(weight, bias, after.affine, output_layout(after))
    else:
        too_large = not _is_small(weight, held) and not _is_finite(held, weight, bias)
    if too_large:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise Refused(Reason.NON_FINITE, f"the folded {host.weight} would overflow {dtype}")


def _is_small(weight: Tensor, held: Absorption) -> bool:
    """Whether no weight of float32 or float64 can overflow (one over 1e22 is not looked for)."""
    sides = [side.affine for side in (held.before, held.after) if side is not None]
    largest = (max(float(a.scale.abs().max()), float(a.shift.abs().max()), 1.0) for a in sides)
    return torch.finfo(weight.dtype).max > 1e30 and math.prod(largest) < 1e8


def _is_finite(held: Absorption, weight: Tensor, bias: Tensor | None) -> bool:
    with torch.no_grad():
        new = held.absorbed(weight, bias)
    return all(bool(t.isfinite().all()) for t in (new.weight, new.bias) if t is not None)
