"""Whether a norm layer folds forward into its hosts, on one graph.

A norm folds into the linear layers after it when nothing else uses what it gives, when what is in
between lets its affine pass, and each input channel is of one channel of the norm, or of none. What
folds nowhere may still go into a norm layer that stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bntools.affine import Affine
from bntools.dataflow.graph import ELSEWHERE, MIXED, ZERO, Entry, Kind, Node, NormLayer, Value
from bntools.dataflow.reach import Refused, describe, is_idle, weight_name
from bntools.planning.constants import constant_folds
from bntools.planning.folds import HostFold, NormFold
from bntools.planning.hosts import host_folds
from bntools.planning.padding import padded
from bntools.planning.state import PlanState
from bntools.planning.writes import written_between
from bntools.report import Reason

__all__ = ["Way", "fold_forward", "follow"]


def fold_forward(
    state: PlanState, layer: NormLayer, standing: frozenset[Node] = frozenset()
) -> NormFold:
    """The fold of one norm layer into what comes after it, or `Refused`.

    `standing` are the calls of norm layers that stay and can be hosts.
    """
    sites = state.sites[layer.path]
    way = follow(state, sites, standing)
    if standing and not standing & way.ends.keys():
        raise Refused(Reason.NOT_BEFORE_LINEAR, "no norm that stays uses it")
    affine = _affine_of(sites)
    if way.monotone is not None and bool((affine.scale < 0).any()):
        detail = f"{describe(way.monotone)} turns round what a negative scale turns round"
        raise Refused(Reason.NEGATIVE_SCALE, detail)
    affines = {node: _at(way, sites, affine, node) for node in way.ends}
    affines.update({n: _put_before(state, n, affines[n]) for n in way.ends if n in standing})
    hosts = tuple(_uneven(state, host, affines) for host in host_folds(state, affines, before=True))
    hosts += _added(state, way, sites, affine)
    write = written_between(sites, list(way.ends), state.folded)
    if write is not None:
        detail = f"{describe(write)} writes to what it is given before {_all(hosts)} see it"
        raise Refused(Reason.WRITTEN_IN_PLACE, detail)
    names = sorted({n.name.strip("_") for n in way.steps if n.kind is not Kind.AFFINE})
    via = "forward, into a norm that stays" if standing else "forward"
    via = f"{via}, through {', '.join(names)}" if names else via
    return NormFold(layer, hosts, via, turn=len(state.folded), forward=True)


def _put_before(state: PlanState, node: Node, affine: Affine) -> Affine:
    """What has to come after a norm that stays, for it to be as if `affine` came before it."""
    held = state.absorbed.get(weight_name(node))
    own = cast("Affine", node.norm.affine)
    own = own.then(held.after.affine) if held is not None and held.after is not None else own
    shift = own.scale * affine.shift + own.shift * (1 - affine.scale)
    return Affine(affine.scale.clone(), shift)


def _uneven(state: PlanState, host: HostFold, calls: Iterable[Node]) -> HostFold:
    """A host whose calls pad; all of them, if any, have to pad alike."""
    own = [_entry(node) for node in calls if _is_call_of(node, host)]
    uneven = [entry for entry in own if not entry.even]
    if not uneven:
        return host
    if any(node.module != host.path for node in calls if _is_call_of(node, host)):
        detail = f"code outside of the forward of {host.path} pads what it is called with"
        raise Refused(Reason.PADDED, detail)
    if any(entry.padding != own[0].padding for entry in own):
        raise Refused(Reason.HOST_SHARED, f"{host.path} is called more than once, and not alike")
    return padded(state, host, uneven[0])


def _is_call_of(node: Node, host: HostFold) -> bool:
    if node.linear.host is not None or host.registered:
        return node.linear.host == host.path
    return weight_name(node) == host.weight


def _all(hosts: Sequence[HostFold]) -> str:
    return ", ".join(dict.fromkeys(host.path for host in hosts))


def _affine_of(sites: Sequence[Node]) -> Affine:
    first = sites[0].norm.affine
    for site in sites:
        affine, value, dim = site.norm.affine, site.outputs[0], site.norm.channel_dim
        if not isinstance(affine, Affine) or not isinstance(first, Affine):
            raise Refused(Reason.COMPUTED_AFFINE, "its affine is not known")
        if not first.same_as(affine):
            raise Refused(Reason.CHANNEL_MISMATCH, "its calls do not all do the same")
        whole = value.shape == site.inputs[0].shape
        if not whole or len(value.shape) <= dim or value.shape[dim] != affine.channels:
            raise Refused(Reason.CHANNEL_MISMATCH, "its output has no such channel axis")
    return cast("Affine", first)


@dataclass(frozen=True, eq=False)
class Way:
    """What a norm's output goes through, and the linear calls where it ends.

    `gains` is what the shift is multiplied by on the way to each value, or None where it cannot
    pass, which the operation in `limits` does. `monotone` is one that only passes scales >= 0.
    """

    steps: tuple[Node, ...]
    ends: dict[Node, Value]
    gains: dict[Value, float | None]
    limits: dict[Value, Node]
    monotone: Node | None


def follow(state: PlanState, sites: Sequence[Node], standing: Set[Node] = frozenset()) -> Way:
    """Follow what calls of a norm give to the linear calls that use it, or `Refused`."""
    gains: dict[Value, float | None] = {site.outputs[0]: 1.0 for site in sites}
    limits: dict[Value, Node] = {}
    ends: dict[Node, Value] = {}
    steps: dict[int, Node] = {}
    queue = {node.order: node for site in sites for node in site.outputs[0].consumers}
    while queue:
        order = min(queue)
        node = queue.pop(order)
        given = [value for value in node.inputs if value in gains]
        if not _passes(state, node, given):
            if not _is_idle(node):
                ends[node] = _taken(node, given, standing)
            continue
        steps[order] = node
        gain, limit = _gain(node, given, gains, limits)
        for out in node.outputs if node.kind is Kind.MOVE else node.outputs[:1]:
            gains[out] = gain
            if limit is not None:
                limits[out] = limit
            queue.update({user.order: user for user in out.consumers})
    if not ends:
        raise Refused(Reason.NOT_BEFORE_LINEAR, "nothing uses what it gives")
    used = _leading_to(set(ends.values()), steps.values())
    monotone = (n for n in used if n.kind is Kind.PASS and n.passing.monotone)
    return Way(used, ends, gains, limits, next(monotone, None))


def _leading_to(values: set[Value], steps: Iterable[Node]) -> tuple[Node, ...]:
    """The steps from which any of these values come; the others come to nothing."""
    used = []
    for node in reversed(list(steps)):
        if any(out in values for out in node.outputs):
            values.update(node.inputs)
            used.append(node)
    return tuple(reversed(used))


def _passes(state: PlanState, node: Node, given: Sequence[Value]) -> bool:
    if node.kind is Kind.MOVE:
        return True
    if node.kind is Kind.SUM:
        return not node.writes and all(v in given or _is_added(v, node) for v in node.inputs)
    if node.kind is Kind.PASS and not all(map(is_idle, node.outputs[1:])):
        return False  # the indices of a maximum say something else where a scale is 0
    if node.kind is Kind.PASS or node in state.folded:
        return [v for v in node.inputs if v in given] == [node.inputs[0]] and not node.writes
    return False


def _is_added(value: Value, node: Node) -> bool:
    """Whether a term of a sum is a parameter that nobody else uses."""
    users = [user for user in value.consumers if not user.idle]
    return value.parameter is not None and users == [node]


def _is_idle(node: Node) -> bool:
    """Whether nobody looks at what an operation gives, and it is one that is known well."""
    known = node.kind not in (Kind.OPAQUE, Kind.OUTPUT) and not node.writes
    return known and not any(value.consumers for value in node.outputs)


def _taken(node: Node, given: Sequence[Value], standing: Set[Node]) -> Value:
    """The value that a linear call takes as its data, and as nothing else."""
    if node.kind is not Kind.LINEAR and node not in standing:
        raise Refused(*_other_use(node))
    entry = node.linear.entry
    where = node.linear.host or node.module or "the model itself"
    if entry is None:
        raise Refused(Reason.NOT_BEFORE_LINEAR, f"{where} has no rule for a norm before it")
    data = node.inputs[entry.position]
    if [v for v in node.inputs if v in given] != [data]:
        raise Refused(Reason.NOT_BEFORE_LINEAR, f"{where} takes it as more than its data")
    return data


def _other_use(user: Node) -> tuple[Reason, str]:
    if user.kind is not Kind.OUTPUT:
        how = "writes over" if user.writes else "uses"
        return Reason.NOT_BEFORE_LINEAR, f"{describe(user)} {how} what it gives"
    if "hook" in user.name:
        return Reason.HOOKS, f"{user.name} would see another value"
    if user.name == "returned":
        return Reason.RETURNED, "the model returns what it gives"
    if user.name.startswith("kept"):
        return Reason.RETURNED, "what it gives is kept after the forward"
    return Reason.NOT_BEFORE_LINEAR, f"what it gives leaves the graph by {user.name}"


def _gain(
    node: Node,
    given: Sequence[Value],
    gains: dict[Value, float | None],
    limits: dict[Value, Node],
) -> tuple[float | None, Node | None]:
    """What becomes of the shift in one operation, and which operation does not let it pass."""
    known = {gains[value] for value in given}
    limit = next((limits[value] for value in given if value in limits), None)
    if node.kind is Kind.SUM and None not in known:
        terms = zip(node.inputs, node.sum.coefficients, strict=True)
        return sum(k * cast("float", gains[v]) for v, k in terms if v in gains), limit
    if len(known) != 1:
        return None, limit or node
    (gain,) = known
    if gain is None or node.kind is not Kind.PASS:
        return gain, limit
    factor = node.passing.gain
    return (None, node) if factor is None else (gain * factor, limit)


def _at(way: Way, sites: Sequence[Node], affine: Affine, node: Node) -> Affine:
    """What a linear call has to absorb, by its own input channels."""
    entry, value = _entry(node), way.ends[node]
    gain, shifted = way.gains[value], bool(affine.shift.any())
    if gain is None and shifted:
        raise Refused(Reason.SHIFT_STOPPED, _stopped(way.limits[value]))
    direct = any(site.outputs[0] is value for site in sites)
    if direct and sites[0].norm.channel_dim == entry.channel_dim:
        return affine
    if 0 in value.shape:
        raise Refused(Reason.CHANNEL_MISMATCH, "it saw no elements that show its channels")
    labels, zeros_pooled = _labelled(way, sites)
    target, beside_zeros = _channels(labels[value].movedim(entry.channel_dim, 0), node)
    found = Affine.identity(target.numel())
    met = target >= 0
    found.scale[met] = affine.scale[target[met]]
    found.shift[met] = affine.shift[target[met]] * (1.0 if gain is None else gain)
    if bool(found.shift[beside_zeros].any()) or (shifted and zeros_pooled):
        raise Refused(Reason.PADDED, "zeros are padded on the way, which the shift does not reach")
    return found


def _entry(node: Node) -> Entry:
    return cast("Entry", node.linear.entry)  # follow() lets no other call be an end


def _stopped(node: Node) -> str:
    why = node.passing.limit if node.kind is Kind.PASS else "it joins values shifted unlike"
    return f"its shift does not pass {describe(node)}: {why}"


def _labelled(way: Way, sites: Sequence[Node]) -> tuple[dict[Value, Tensor], bool]:
    """Which channel of the norm each element on the way is, and whether zeros were pooled."""
    known: dict[Value, Tensor] = {}
    for site in sites:
        value, axis = site.outputs[0], site.norm.channel_dim
        count = value.shape[axis]
        view = [count if i == axis else 1 for i in range(len(value.shape))]
        numbers = torch.arange(count, dtype=torch.float32, device="cpu")
        known[value] = numbers.reshape(view).expand(value.shape)
    pooled = False
    for node in way.steps:
        moved = node.inputs if node.kind is Kind.MOVE else node.inputs[:1]
        if node.kind is Kind.SUM:
            moved = [value for value in node.inputs if value in known]
        labels = [_label(known, value) for value in moved]
        pooled = pooled or (node.kind is Kind.PASS and bool((labels[0] == ZERO).any()))
        if node.kind is Kind.MOVE:
            labels = node.move.apply(labels)
        elif node.kind is Kind.PASS:
            labels = node.passing.apply(labels)
        elif node.kind is Kind.SUM:
            labels = [_joined(labels, node)]
        known.update(zip(node.outputs, labels, strict=False))
    return known, pooled


def _joined(terms: Sequence[Tensor], node: Node) -> Tensor:
    """The labels of a sum, where its terms agree; what is added to zeros is from elsewhere."""
    first, *others = (term.expand(node.outputs[0].shape) for term in terms)
    for other in others:
        first = torch.where(first == other, first, float(MIXED))
    added = len(terms) < len(node.inputs)
    return torch.where(first == ZERO, float(ELSEWHERE), first) if added else first


def _added(
    state: PlanState, way: Way, sites: Sequence[Node], affine: Affine
) -> tuple[HostFold, ...]:
    """What parameters absorb that are added on the way, as the sum is scaled after that."""
    sums = {v: n for n in way.steps if n.kind is Kind.SUM for v in n.inputs if v not in way.gains}
    if not sums or bool((affine.scale == 1).all()):
        return ()
    labels, _ = _labelled(way, sites)
    found = {}
    for value, node in sums.items():
        met = _met(labels[node.outputs[0]], value).flatten()
        scale = torch.ones(met.shape, dtype=torch.float64, device="cpu")
        scale[met >= 0] = affine.scale[met[met >= 0]]
        if not bool(scale.all()):
            detail = f"{value.parameter}, which is added to it, would be divided by a scale of 0"
            raise Refused(Reason.NON_FINITE, detail)
        found[value] = Affine(1 / scale, torch.zeros_like(scale))
    return constant_folds(state, found)


def _met(labels: Tensor, value: Value) -> Tensor:
    """Which channel of the norm each element of an added parameter meets, or less than 0."""
    shape = [1] * (labels.dim() - len(value.shape)) + list(value.shape)
    over = [i for i, length in enumerate(shape) if length == 1]
    high = labels.amax(over, keepdim=True) if over else labels
    low = labels.amin(over, keepdim=True) if over else labels
    if bool((high != low).any()) or bool((low == MIXED).any()):
        detail = f"an element of {value.parameter} is added to several of its channels"
        raise Refused(Reason.CHANNEL_MISMATCH, detail)
    return high.reshape(value.shape).long()


def _label(known: dict[Value, Tensor], value: Value) -> Tensor:
    if value in known:
        return known[value]
    return torch.tensor(float(ELSEWHERE), device="cpu").expand(value.shape)


def _channels(labels: Tensor, node: Node) -> tuple[Tensor, Tensor]:
    """For every input channel of a linear call the norm's channel, or less than 0; what is padded.

    `labels` have that axis in front.
    """
    flat = labels.flatten(1) if labels.dim() > 1 else labels.unsqueeze(1)
    zeros = flat == ZERO
    high = flat.amax(1)
    low = flat.masked_fill(zeros, math.inf).amin(1)
    low = torch.where(low.isinf(), high, low)
    if bool(((low != high) & (high != ZERO)).any()) or bool((low == MIXED).any()):
        where = node.linear.host or node.module or "the linear layer"
        raise Refused(
            Reason.CHANNEL_MISMATCH, f"an input channel of {where} has several of its channels"
        )
    return high.long(), zeros.any(1) & (high != ZERO)
