"""Operations that a per-channel affine passes: pooling, interpolation, activations, sums.

Each is decided from its arguments alone, so that it holds for every size of image: an affine
`s * x + t` goes through f where f(s * x + t) = s * f(x) + gain * t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bntools.dataflow.graph import MIXED, ZERO, Pass, Sum, Value

__all__ = ["PASSING_OPS", "SUM_OPS", "ZERO_OPS", "agreed", "passing_call", "sum_call"]

SUM_OPS = frozenset({"add", "sub", "rsub"})
ZERO_OPS = frozenset({"zeros", "new_zeros", "zeros_like"})
_POOLS = {2: F.max_pool2d, 3: F.max_pool3d}
_MAX_POOLS = {
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "max_pool2d": 2, "max_pool3d": 3,
    "mkldnn_max_pool2d": 2, "mkldnn_max_pool3d": 3,
}  # fmt: skip
_MEAN_POOLS = {"avg_pool2d": 2, "avg_pool3d": 3}
_ADAPTIVE = {
    "_adaptive_avg_pool2d": False, "_adaptive_avg_pool3d": False, "adaptive_avg_pool2d": False,
    "adaptive_avg_pool3d": False, "adaptive_max_pool2d": True, "adaptive_max_pool3d": True,
    "mkldnn_adaptive_avg_pool2d": False,
}  # fmt: skip
_REDUCTIONS = {"mean", "sum", "amax"}
# the weights of every interpolated value sum to one, at the borders too
_INTERPOLATIONS = {
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
}  # fmt: skip
_RECTIFIERS = {"relu", "leaky_relu", "_prelu_kernel", "clamp_min", "clamp", "threshold"}
_SCALINGS = {"mul", "div", "neg"}
PASSING_OPS = frozenset({
    *_MAX_POOLS, *_MEAN_POOLS, *_ADAPTIVE, *_REDUCTIONS, *_INTERPOLATIONS, *_RECTIFIERS, *_SCALINGS,
})  # fmt: skip

Arguments = Sequence[Any]
Call = Callable[[Tensor], Tensor]


def agreed(labels: Tensor, largest: Call) -> Tensor:
    """The labels of a reduction, where `largest` gives the largest of what each output is from.

    One label, where all agree on it; zeros agree with everything.
    """
    high = largest(labels)
    low = -largest((-labels).masked_fill(labels == ZERO, -math.inf))
    return torch.where((low == high) | (high == ZERO), high, float(MIXED))


def passing_call(name: str, args: Arguments, kwargs: dict[str, Any]) -> Pass | None:
    """What passes a call of one of `PASSING_OPS` (a name without its last underscore)."""
    if name in _MAX_POOLS:
        return _max_pool(_MAX_POOLS[name], args)
    if name in _MEAN_POOLS:
        return _mean_pool(_MEAN_POOLS[name], args)
    if name in _ADAPTIVE:
        return _adaptive(args[1], largest=_ADAPTIVE[name])
    if name in _REDUCTIONS:
        return _reduction(name, args, kwargs)
    if name in _INTERPOLATIONS:
        return _interpolation(args)
    if name in _SCALINGS:
        return _scaling(name, args, kwargs)
    return _rectifier(name, args, kwargs)


def sum_call(
    name: str, args: Arguments, kwargs: dict[str, Any], inputs: Sequence[Value]
) -> Sum | None:
    """The coefficients of a sum; None where it adds a number, or is of one tensor and a constant.

    A number and a constant per channel are affine maps of their own.
    """
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    numbers = [arg for arg in args[:2] if not isinstance(arg, Tensor)]
    if not isinstance(alpha, (int, float)) or any(number != 0 for number in numbers):
        return None
    if all(value.constant for value in inputs):
        return None
    first, second = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[name]
    coefficients = [float(first), float(second)]
    kept = [k for k, arg in zip(coefficients, args, strict=False) if isinstance(arg, Tensor)]
    return Sum(tuple(kept)) if len(kept) == len(inputs) else None


def _unchanged(labels: Sequence[Tensor]) -> list[Tensor]:
    return [labels[0]]


def _reduced(largest: Call) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    return lambda labels: [agreed(labels[0], largest)]


def _argument(args: Arguments, position: int, otherwise: Any) -> Any:
    return args[position] if len(args) > position else otherwise


@dataclass(frozen=True)
class _Windows:
    """The windows of a pooling layer; PyTorch clips those that `ceil_mode` adds at the border."""

    rank: int
    kernel: Any
    stride: Any
    padding: Any
    dilation: Any = 1
    ceil: bool = False

    def largest(self, labels: Tensor) -> Tensor:
        """The largest label in each window; padding has none."""
        pool = _POOLS[self.rank]
        stride = self.stride or self.kernel
        return pool(labels, self.kernel, stride, self.padding, self.dilation, self.ceil)

    @property
    def padded(self) -> bool:
        """Whether a window can reach over the border of the image."""
        return any(self.padding) if isinstance(self.padding, (list, tuple)) else bool(self.padding)

    @property
    def size(self) -> int:
        """The number of values in a full window."""
        return math.prod(self._axes(self.kernel))

    @property
    def cut(self) -> bool:
        """Whether a window is cut off at some size of image."""
        sides = zip(self._axes(self.kernel), self._axes(self.stride or self.kernel), strict=True)
        return self.padded or (self.ceil and any(k > 1 and step > 1 for k, step in sides))

    def _axes(self, value: Any) -> list[int]:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        return values * (self.rank if len(values) == 1 else 1)


def _max_pool(rank: int, args: Arguments) -> Pass:
    windows = _Windows(
        rank, args[1], _argument(args, 2, None), _argument(args, 3, 0), _argument(args, 4, 1),
        bool(_argument(args, 5, otherwise=False)),
    )  # fmt: skip
    return Pass(_reduced(windows.largest), monotone=True)


def _mean_pool(rank: int, args: Arguments) -> Pass:
    ceil = bool(_argument(args, 4, otherwise=False))
    windows = _Windows(rank, args[1], _argument(args, 2, None), _argument(args, 3, 0), ceil=ceil)
    divisor = _argument(args, 6, None)
    gain: float | None = 1.0
    limit = ""
    if divisor is not None:
        gain = windows.size / divisor
        if windows.cut:
            gain, limit = None, "its divisor stays the same where its windows are cut off"
    elif windows.padded and bool(_argument(args, 5, otherwise=True)):
        gain, limit = None, "it counts the zeros of its padding"
    return Pass(_reduced(windows.largest), gain, limit=limit)


def _adaptive(size: Sequence[int], *, largest: bool) -> Pass:
    pool = F.adaptive_max_pool2d if len(size) == 2 else F.adaptive_max_pool3d
    return Pass(_reduced(lambda labels: pool(labels, tuple(size))), monotone=largest)


def _reduction(name: str, args: Arguments, kwargs: dict[str, Any]) -> Pass | None:
    dims = _argument(args, 1, kwargs.get("dim"))
    keep = bool(_argument(args, 2, kwargs.get("keepdim", False)))
    if kwargs.get("dtype") not in (None, args[0].dtype):
        return None
    over = dims if isinstance(dims, (list, tuple)) else [] if dims is None else [dims]

    def largest(labels: Tensor) -> Tensor:
        return labels.amax(tuple(over), keep)

    if name == "sum":
        return Pass(_reduced(largest), None, limit="how many values it adds depends on the size")
    return Pass(_reduced(largest), monotone=name == "amax")


def _interpolation(args: Arguments) -> Pass:
    """Weights that sum to one; every output counts as made from all of its image."""
    size = list(args[1])
    axes = tuple(range(-len(size), 0))

    def largest(labels: Tensor) -> Tensor:
        whole = labels.amax(axes, keepdim=True)
        return whole.expand(*labels.shape[: -len(size)], *size)

    return Pass(_reduced(largest))


def _rectifier(name: str, args: Arguments, kwargs: dict[str, Any]) -> Pass | None:
    """Whatever keeps its form when its input is scaled: kinks at zero alone."""
    numbers = [*args[1:], *kwargs.values()]
    if name in ("clamp_min", "clamp", "threshold") and not _cuts_at_zero(name, args, kwargs):
        return None
    if name == "_prelu_kernel":
        numbers = []
    if any(isinstance(number, Tensor) for number in numbers):
        return None
    return Pass(_unchanged, None, monotone=True, limit="only zero stays zero there")


def _cuts_at_zero(name: str, args: Arguments, kwargs: dict[str, Any]) -> bool:
    if name == "threshold":
        return not any(isinstance(a, Tensor) or a != 0 for a in args[1:3]) and len(args) > 2
    low = _argument(args, 1, kwargs.get("min"))
    high = _argument(args, 2, kwargs.get("max"))
    return not isinstance(low, Tensor) and low == 0 and high is None


def _scaling(name: str, args: Arguments, kwargs: dict[str, Any]) -> Pass | None:
    if name == "neg":
        return Pass(_unchanged, -1.0)
    number = args[1]
    if kwargs.get("rounding_mode") is not None or isinstance(number, (Tensor, bool, complex)):
        return None
    if name == "div" and number == 0:
        return None
    gain = float(number) if name == "mul" else 1 / float(number)
    return Pass(_unchanged, gain) if math.isfinite(gain) else None
