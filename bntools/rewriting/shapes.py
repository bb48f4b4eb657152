"""The shape of a convolution or linear layer, as plain data: read off, checked, and built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bntools.errors import SurgeryError

__all__ = ["Shape"]

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_LARGEST = 1 << 20
_AXES = ("kernel", "stride", "padding", "dilation")


@dataclass(frozen=True)
class Shape:
    """A convolution with zero padding, or, without axes, a linear layer."""

    inputs: int
    outputs: int
    groups: int
    bias: bool
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @classmethod
    def from_options(cls, data: Any) -> Shape:
        """Read what `to_options` gives; raises SurgeryError for anything else."""
        if not isinstance(data, Mapping):
            raise _none("it has no shape")
        axes = {name: _sizes(data.get(name), least=name != "padding") for name in _AXES}
        rank = len(axes["kernel"])
        if rank not in (0, *_CONVOLUTIONS) or any(len(sizes) != rank for sizes in axes.values()):
            raise _none("its axes do not agree")
        inputs, outputs, groups = _sizes(
            [data.get(name) for name in ("inputs", "outputs", "groups")], least=1
        )
        if inputs % groups or outputs % groups or (rank == 0 and groups != 1):
            raise _none("its groups do not divide its channels")
        if not isinstance(data.get("bias"), bool):
            raise _none("it does not say whether it has a bias")
        return cls(inputs, outputs, groups, data["bias"], **axes)

    def to_options(self) -> dict[str, Any]:
        """The shape as JSON data."""
        sizes = {name: list(getattr(self, name)) for name in _AXES}
        return {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "groups": self.groups,
            "bias": self.bias,
            **sizes,
        }

    @property
    def parameters(self) -> int:
        """The number of values in weight and bias."""
        weight = self.outputs * (self.inputs // self.groups) * math.prod(self.kernel)
        return weight + self.outputs * self.bias

    @property
    def kind(self) -> type[nn.Module]:
        """The class of torch.nn that such a layer has."""
        return _CONVOLUTIONS[len(self.kernel)] if self.kernel else nn.Linear

    def is_that_of(self, module: nn.Module) -> bool:
        """Whether a layer is exactly a layer of torch.nn with this shape."""
        if type(module) is not self.kind or "forward" in module.__dict__:
            return False
        if (module._parameters.get("bias") is not None) is not self.bias:
            return False
        if not self.kernel:
            widths: tuple[Any, Any] = (module.in_features, module.out_features)
            return widths == (self.inputs, self.outputs)
        mine = self.inputs, self.outputs, self.groups, *self._axes(), "zeros"
        names = ("in_channels", "out_channels", "groups", "kernel_size", "stride", "padding")
        return mine == tuple(getattr(module, name) for name in (*names, "dilation", "padding_mode"))

    def build(self, like: Tensor) -> nn.Module:
        """A layer of zeros with the dtype, device and grad flag of a weight."""
        meta: dict[str, Any] = {"device": "meta", "bias": self.bias}
        if self.kernel:
            kernel, stride, padding, dilation = self._axes()
            layer = self.kind(
                self.inputs, self.outputs, kernel, stride, padding, dilation, self.groups, **meta
            )
        else:
            layer = self.kind(self.inputs, self.outputs, **meta)
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                zeros = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
                layer._parameters[name] = nn.Parameter(zeros, requires_grad=like.requires_grad)
        return layer

    def _axes(self) -> tuple[tuple[int, ...], ...]:
        return self.kernel, self.stride, self.padding, self.dilation


def _sizes(data: Any, *, least: int) -> tuple[int, ...]:
    if not isinstance(data, (list, tuple)) or len(data) > 3:
        raise _none("its sizes are no lists")
    if not all(type(size) is int and least <= size <= _LARGEST for size in data):
        raise _none("its sizes are no sensible numbers")
    return tuple(data)


def _none(why: str) -> SurgeryError:
    return SurgeryError(f"Cannot make the layer that a merge needs: {why}.")
