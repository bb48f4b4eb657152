"""Convolutions that pad each channel with a value of its own, in the place of zeros.

A norm before a convolution that pads with zeros cannot go into its weight and bias alone: the zeros
came after the norm. What can is a norm before a convolution that pads with the value that the norm
maps to zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ChannelPadConv1d", "ChannelPadConv2d", "ChannelPadConv3d", "pad_channels", "padding_of"]


def channel_pad(x: Tensor, values: Tensor, padding: Sequence[int]) -> Tensor:
    """Pad (N, C, ...) with one value per channel, `padding[i]` at both ends of spatial axis i."""
    for axis, width in enumerate(padding, start=2):
        if width:
            shape = list(x.shape)
            shape[axis] = width
            border = values.reshape(1, -1, *[1] * len(padding)).expand(shape)
            x = torch.cat([border, x, border], axis)
    return x


class _ChannelPad:
    """What the padded convolutions have in common; they are convolutions without a padding."""

    pad_value: Tensor
    pads: tuple[int, ...]

    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002 - as torch's convolutions name it
        """Pad and convolve an input of shape (N, C, ...), or (C, ...)."""
        batched = input if input.dim() > len(self.pads) + 1 else input.unsqueeze(0)
        padded = channel_pad(batched, self.pad_value, self.pads)
        out = self._conv_forward(padded, self.weight, self.bias)
        result: Tensor = out if batched is input else out.squeeze(0)
        return result

    def extra_repr(self: Any) -> str:
        """What the convolution says, and what it pads."""
        whole: Any = super()
        return f"{whole.extra_repr()}, pads={tuple(self.pads)}"


class ChannelPadConv1d(_ChannelPad, nn.Conv1d):
    """A Conv1d that pads each channel with a value of its own."""


class ChannelPadConv2d(_ChannelPad, nn.Conv2d):
    """A Conv2d that pads each channel with a value of its own.

    Example:
        >>> import torch
        >>> from bntools.norms import pad_channels
        >>> conv = pad_channels(torch.nn.Conv2d(2, 4, 3, padding=1), [1, 1])
        >>> conv.pad_value.copy_(torch.tensor([5.0, -1.0]))
        tensor([ 5., -1.])
        >>> conv
        ChannelPadConv2d(2, 4, kernel_size=(3, 3), stride=(1, 1), pads=(1, 1))
    """


class ChannelPadConv3d(_ChannelPad, nn.Conv3d):
    """A Conv3d that pads each channel with a value of its own."""


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ChannelPadConv1d,
    nn.Conv2d: ChannelPadConv2d,
    nn.Conv3d: ChannelPadConv3d,
}


def padding_of(module: nn.Module) -> tuple[int, ...] | None:
    """How many zeros a plain convolution pads at both ends of each axis; None for anything else.

    A convolution of ours that pads already counts with what it pads.
    """
    conv: Any = module
    if type(module) in _CLASSES.values():
        return tuple(conv.pads)
    plain = type(module) in _CLASSES and "forward" not in module.__dict__
    if not plain or conv.padding_mode != "zeros":
        return None
    if conv.padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)
    return None if isinstance(conv.padding, str) else tuple(conv.padding)


def pad_channels(module: nn.Module, padding: Sequence[int]) -> nn.Module:
    """Make a plain convolution pad each channel with values of its own (zeros at first), in place.

    `padding` is what it pads at both ends of each spatial axis. It stays the same object with the
    same parameters and hooks, and an instance of its class; `state_dict` gains `pad_value` of shape
    (C,). Raises TypeError for other layers.
    """
    conv: Any = module
    if padding_of(module) != tuple(padding):
        raise TypeError(f"expected a convolution that pads with {list(padding)} zeros")
    if type(module) in _CLASSES:
        object.__setattr__(module, "__class__", _CLASSES[type(module)])
        conv.pads = tuple(padding)
        conv.padding = (0,) * len(conv.pads)
        values = torch.zeros(conv.in_channels, dtype=conv.weight.dtype, device=conv.weight.device)
        module.register_buffer("pad_value", values)
    return module


def pad_channels_edit(module: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The same as a recipe's edit, whose option `padding` is a list of whole numbers."""
    padding = options["padding"]
    if not isinstance(padding, list) or any(type(width) is not int for width in padding):
        raise TypeError("its padding is no list of whole numbers")
    return pad_channels(module, padding)
