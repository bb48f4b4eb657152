"""The way from a norm back to its hosts: which channels meet, and who takes how much of a shift."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from bntools.affine import Affine
from bntools.dataflow.graph import ELSEWHERE, MIXED, ZERO, Kind, Node, Value
from bntools.dataflow.labels import Labels
from bntools.dataflow.reach import End, Origins, Refused, carried, describe, is_idle, is_zero
from bntools.dataflow.shares import Shares, solve
from bntools.planning.state import PlanState
from bntools.report import Reason

__all__ = ["Passage"]

_PADS = {"constant_pad_nd", "Pad"}  # in PyTorch, in ONNX


class Passage:
    """One call of a norm, with what lies between it and what it comes from."""

    def __init__(self, state: PlanState, site: Node, origin: Origins) -> None:
        self.site = site
        self.nodes = origin.nodes
        self._folded = state.folded
        self._lent = state.graph.lent
        self._hosts = {host.outputs[0]: host for host in origin.hosts}
        self._constants = origin.constants
        self._affine = cast("Affine", site.norm.affine)
        self._value, self._dim = site.inputs[0], site.norm.channel_dim

    @property
    def values(self) -> Iterator[Value]:
        """The outputs of the hosts, and the parameters that are added to them."""
        yield from self._hosts
        yield from self._constants

    @cached_property
    def outputs_used_besides(self) -> Node | None:
        """An operation on the way of which more than the first output is used."""
        passing = (node for node in self.nodes if node.kind is Kind.PASS)
        return next((n for n in passing if not all(map(is_idle, n.outputs[1:]))), None)

    @cached_property
    def labels(self) -> Labels:
        """The channels of all hosts, and the elements of what is added, on the whole way."""
        hosts = [(value, host.linear.channel_dim) for value, host in self._hosts.items()]
        return Labels([*hosts, *((c, None) for c in self._constants)], self._folded, self.nodes)

    @cached_property
    def _seen(self) -> Tensor:
        return self.labels.of(self._value)

    @cached_property
    def _classes(self) -> Tensor:
        self._seen  # noqa: B018 - what is summed is known once the norm's input is labelled
        return self.labels.classes()

    def meets(self, end: End) -> bool:
        """Whether another user of a host's output sees a channel that the norm sees as well."""
        if not end.partial or 0 in end.value.shape or 0 in self._value.shape:
            return True
        others, mine = self.labels.of(end.value).flatten(), self._seen.flatten()
        if bool((others == MIXED).any()) or bool((mine == MIXED).any()):
            return True
        classes = self.labels.classes()
        others, mine = (classes[each[each >= 0].long()] for each in (others, mine))
        return bool(torch.isin(mine, others).any())

    # what the hosts absorb

    @property
    def choices(self) -> int:
        """How many orders there are in which hosts are asked to take a shift."""
        return len(self._hosts) if any(node.kind is Kind.SUM for node in self.nodes) else 1

    def affines(self, choice: int = 0) -> dict[Value, Affine]:
        """What each host and each added parameter has to absorb, by its own channels or elements.

        Refused where an element is not from a host, where a channel of a host meets two of the
        norm's, and where something on the way does not let the affine pass.
        """
        if len(self._value.shape) <= self._dim or (
            self._value.shape[self._dim] != self._affine.channels
        ):
            raise Refused(Reason.CHANNEL_MISMATCH, "its input has no such channel axis")
        if self._is_direct():
            return {self._value: self._affine}
        if any(0 in value.shape for value in (*self.values, self._value)):
            raise Refused(Reason.CHANNEL_MISMATCH, "it saw no elements that show its channels")
        self._check_series()
        target = self._targets()
        columns = self._columns(choice)
        shares = self._shares(columns)
        self._check_signs(target)
        found = {}
        for value, numbers in self.labels.ranges.items():
            met = target[numbers.start : numbers.stop]
            share = shares[:, columns[value]] if value in columns else torch.zeros(len(shares))
            found[value] = _by_channel(self._affine, met, share.double())
        return found

    def _check_series(self) -> None:
        """Refuse what the operations right before the norm stop, without a look at channels."""
        scales, shifted = self._affine.scale, bool(self._affine.shift.any())
        node = self._value.producer
        while node is not None and node in self.nodes and len(carried(node)) == 1:
            if node.kind is Kind.PASS and node.passing.gain is None and shifted:
                raise Refused(Reason.SHIFT_STOPPED, _stops(node))
            if node.kind is Kind.PASS and node.passing.monotone and bool((scales < 0).any()):
                raise Refused(*_negative(scales, int((scales < 0).int().argmax()), node))
            node = carried(node)[0].producer

    def _is_direct(self) -> bool:
        host = self._hosts.get(self._value)
        return len(self._hosts) == 1 and host is not None and host.linear.channel_dim == self._dim

    def _targets(self) -> Tensor:
        """For every numbered channel the norm's channel that it meets, or -1."""
        flat = self._seen.movedim(self._dim, 0).flatten(1).long()
        if bool((flat == ELSEWHERE).any()):
            raise Refused(Reason.NOT_AFTER_LINEAR, "part of what it sees is padding")
        if bool((flat == MIXED).any()):
            raise Refused(Reason.CHANNEL_MISMATCH, "channels are mixed before it")
        rows = torch.arange(flat.shape[0], device="cpu").unsqueeze(1).expand_as(flat)
        from_hosts = flat != ZERO
        met, rows = self._classes[flat[from_hosts]], rows[from_hosts]
        target = torch.full((self.labels.total,), -1, device="cpu")
        target[met] = rows
        if bool((target[met] != rows).any()):
            raise Refused(
                Reason.CHANNEL_MISMATCH,
                "its channels are not the output channels of the layer before",
            )
        return target[self._classes]

    def _check_signs(self, target: Tensor) -> None:
        if bool((self._affine.scale >= 0).all()):
            return
        for node in self.nodes:
            if node.kind is Kind.PASS and node.passing.monotone:
                labels = torch.unique(self.labels.of(node.inputs[0])).long()
                channels = target[labels[labels >= 0]]
                for channel in channels[channels >= 0].tolist():
                    if float(self._affine.scale[channel]) < 0:
                        raise Refused(*_negative(self._affine.scale, channel, node))

    def _columns(self, choice: int) -> dict[Value, int]:
        """Hosts that are calls of one layer take one shift; those that have a bias are first."""
        hosts = list(self._hosts.items())
        ranked = sorted(hosts, key=lambda item: not self._has_bias(item[1]))
        numbers: dict[object, int] = {}
        for _, host in (*ranked[choice:], *ranked[:choice]):
            numbers.setdefault(host.linear.host or host.linear.weight, len(numbers))
        return {value: numbers[host.linear.host or host.linear.weight] for value, host in hosts}

    def _has_bias(self, host: Node) -> bool:
        bias = host.linear.bias
        return bias is not None and bias.parameter not in self._lent

    def _shares(self, columns: dict[Value, int]) -> Tensor:
        """How much of the shift of each of the norm's channels each column takes."""
        width = max(columns.values()) + 1
        shares = torch.ones(self._affine.channels, width, dtype=torch.float64, device="cpu")
        shifted = self._affine.shift != 0
        if not bool(shifted.any()) or self._is_even():
            return shares
        spread = Shares(columns, self._folded, self.nodes).of(self._value)
        codes = spread.codes.movedim(self._dim, 0).flatten(1)
        solved: dict[tuple[int, ...], Tensor] = {}
        for channel in shifted.nonzero().flatten().tolist():
            kinds = tuple(torch.unique(codes[channel]).long().tolist())
            if kinds not in solved:
                answer = solve(spread.table[list(kinds)])
                if answer is None:
                    raise Refused(*self._stopped())
                solved[kinds] = answer
            shares[channel] = solved[kinds]
        return shares

    def _is_even(self) -> bool:
        """Whether every shift arrives as it is: nothing is summed, weighed or padded with zeros."""
        passing = all(n.kind is not Kind.PASS or n.passing.gain == 1 for n in self.nodes)
        return (
            passing
            and not self._constants
            and not any(node.kind is Kind.SUM or _pads(node) for node in self.nodes)
        )

    def _stopped(self) -> tuple[Reason, str]:
        """What on the way, the norm's neighbours first, does not let its shift pass."""
        for node in sorted(self.nodes, key=lambda node: -node.order):
            if node.kind is Kind.PASS and node.passing.gain is None:
                return Reason.SHIFT_STOPPED, _stops(node)
            if _pads(node):
                why = f"{describe(node)} pads with zeros, which its shift would have to reach"
                return Reason.PADDED, why
        sums = [node for node in self.nodes if node.kind is Kind.SUM]
        where = f" before {describe(sums[0])}" if sums else ""
        return Reason.SHIFT_STOPPED, f"no shift of the layers{where} arrives evenly"


def _stops(node: Node) -> str:
    return f"its shift does not pass {describe(node)}: {node.passing.limit}"


def _negative(scales: Tensor, channel: int, node: Node) -> tuple[Reason, str]:
    detail = f"scale {channel} is {float(scales[channel]):.3g}, and {describe(node)} before it"
    return Reason.NEGATIVE_SCALE, f"{detail} passes scales >= 0 only"


def _pads(node: Node) -> bool:
    """Whether an operation puts zeros beside what it carries."""
    return node.name in _PADS or any(is_zero(value) for value in carried(node))


def _by_channel(affine: Affine, target: Tensor, share: Tensor) -> Affine:
    result = Affine.identity(target.numel())
    met = target >= 0
    result.scale[met] = affine.scale[target[met]]
    result.shift[met] = affine.shift[target[met]] * share[target[met]]
    return result
