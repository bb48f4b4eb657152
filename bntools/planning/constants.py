"""Parameters that are added to what a host gives: a norm after the sum scales them as well."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bntools.absorb import OutputLayout
from bntools.affine import Affine
from bntools.dataflow.graph import Value
from bntools.dataflow.reach import Refused
from bntools.planning.folds import HostFold
from bntools.planning.hosts import check_range
from bntools.planning.state import PlanState
from bntools.report import Reason

__all__ = ["constant_folds"]


def constant_folds(state: PlanState, affines: Mapping[Value, Affine]) -> tuple[HostFold, ...]:
    """What the parameters absorb; `affines` has a scale for each of their elements."""
    return tuple(_constant_fold(state, value, affine) for value, affine in affines.items())


def _constant_fold(state: PlanState, value: Value, affine: Affine) -> HostFold:
    name = value.parameter or ""
    if state.graph.owners[name] in state.graph.sealed:
        raise Refused(Reason.SCRIPTED, f"{name} is compiled by TorchScript and cannot be edited")
    if name in state.graph.tied:
        also = ", ".join(state.graph.tied[name])
        raise Refused(Reason.TIED_WEIGHT, f"{name}, which is added, is also {also}")
    axis, scale = _along_an_axis(affine.scale.reshape(value.shape), name)
    layout = OutputLayout(axis)
    host = HostFold(name, name, None, False, layout, Affine(scale, torch.zeros_like(scale)))
    check_range(state, host)
    return host


def _along_an_axis(scales: Tensor, name: str) -> tuple[int, Tensor]:
    """The axis along which the scales of a tensor differ, and what they are there."""
    for axis in range(min(scales.dim(), 2)):
        rows = scales.movedim(axis, 0).flatten(1) if scales.dim() > 1 else scales.unsqueeze(1)
        if bool((rows == rows[:, :1]).all()):
            return axis, rows[:, 0]
    raise Refused(Reason.CHANNEL_MISMATCH, f"{name} is added, and its channels have no axis there")
