"""Padded convolutions that absorb a norm before them: what they pad with, and how exactly."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bntools.dataflow.graph import Entry
from bntools.dataflow.reach import Refused
from bntools.planning.folds import HostFold, input_layout
from bntools.planning.state import PlanState
from bntools.report import Reason

__all__ = ["padded"]

_ROUNDINGS = 2  # of a weight and of a pad value, each at most half of eps


def padded(state: PlanState, host: HostFold, entry: Entry) -> HostFold:
    """A host as it absorbs what comes before a call that is not even, or `Refused`."""
    before = state.holding(host).before
    if before is None or not before.affine.shift.any():
        return host
    if not entry.padding:
        detail = f"not every output of {host.path} sees all of its weight, and the shift is not 0"
        raise Refused(Reason.PADDED, detail)
    if host.registered or not state.options.pad_forward:
        detail = f"{host.path} pads with zeros, which the shift would have to reach as well"
        raise Refused(Reason.PADDED, detail if host.registered else f"{detail} (--pad-forward)")
    whole = replace(host, padding=entry.padding)
    _check_values(state, whole)
    return whole


def _check_values(state: PlanState, host: HostFold) -> None:
    """Refuse a pad that, once it is rounded, is not what the norm maps to zero.

    A weight that underflows, or a pad value that overflows, would make a difference; roundings make
    one of an eps or so of what the shift gives. Compared is what the kernel taps give for the pad.
    """
    held = state.holding(host)
    values = held.pad_values()
    if values is None:
        return
    if not bool(values.isfinite().all()):
        raise Refused(Reason.PAD_VALUE, "a scale is 0, so that no value is mapped to zero")
    weight = state.graph.tensors[host.weight].detach()
    with torch.no_grad():
        rounded = held.absorbed(weight, None).weight.double()
        exact = held.absorbed(weight.double(), None).weight
        pads = values.to(weight.dtype).double()
        spread = [_by_channel(each, host, weight) for each in (values, pads)]
        wanted = exact * spread[0]
        error = (rounded * spread[1] - wanted).flatten(1).abs().sum(1)
        allowed = _ROUNDINGS * torch.finfo(weight.dtype).eps * wanted.flatten(1).abs().sum(1)
    if not bool((error <= allowed).all()):
        detail = "-shift / scale is out of the range in which its dtype is exact"
        raise Refused(Reason.PAD_VALUE, detail)


def _by_channel(values: Tensor, host: HostFold, weight: Tensor) -> Tensor:
    """A value per input channel, in the shape of a convolution's weight (of its first axes)."""
    groups = input_layout(host).groups
    rows = values.to(weight.device).reshape(groups, 1, -1)
    rows = rows.expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])
    return rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
