"""Taps on norm layers: each takes the moments of what it sees, and normalises with them.

A tapped layer stays in eval mode. Before its own forward runs, the moments of its input go into
its running statistics, which are scratch copies in float32 or wider: it then normalises with the
batch, as in training, whatever its class does besides. The layer's own buffers are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bntools.calibration.course import Course
from bntools.distributed import Exchange
from bntools.errors import CalibrationError
from bntools.moments import Moments, Statistics, moments_of
from bntools.statistics import BatchNorm, TrackedNorm

__all__ = ["LastNorm", "Tap", "Taps"]

_STANDARD = {BatchNorm.forward}
_STANDARD_NAMES = {("timm.layers.norm_act", "BatchNormAct2d")}
_WIDE = (torch.float32, torch.float64)


class LastNorm(BaseException):
    """Ends a forward behind its last norm layer; no Exception, so that no model swallows it."""


@dataclass(eq=False)
class Tap:
    """One set of running statistics, and the layers that hold it (more than one where tied).

    `original` are those that the model came with, `mean` and `variance` scratch copies in use.
    """

    index: int
    norms: list[TrackedNorm]
    mean: Tensor | None
    variance: Tensor
    original: Statistics

    @property
    def first(self) -> TrackedNorm:
        """The layer by which the statistics are named."""
        return self.norms[0]

    @property
    def path(self) -> str:
        """The path of that layer."""
        return self.first.path or "the model"

    def write(self, mean: Tensor, variance: Tensor) -> None:
        """Make these the statistics that the layer normalises with."""
        if self.mean is not None:
            self.mean.copy_(mean)
        self.variance.copy_(variance)


class Taps:
    """The taps of a model. What they see in one forward is in `calls`, in execution order.

    `from_batch`: layers normalise with the moments of the batch, else with what was written to
    them. `kernels`: where a layer is an ordinary batch norm, its own training kernel gives the
    moments, so that they are PyTorch's to the bit. `needs_deviation`: a batch must have two values
    per channel. `stop_after` so many calls the forward ends with `LastNorm`.
    """

    def __init__(
        self, model: nn.Module, norms: Sequence[TrackedNorm], exchange: Exchange | None = None
    ) -> None:
        self.calls: list[tuple[Tap, Moments]] = []
        self.from_batch = True
        self.kernels = False
        self.needs_deviation = False
        self.stop_after: int | None = None
        self.mask: Tensor | None = None
        self.batch = ""
        self.taps = _grouped(norms)
        self.course = Course(model, [norm.module for norm in norms])
        self._exchange = exchange

    def install(self) -> None:
        """Put the taps on; `modules.preserved` takes them off."""
        for tap in self.taps:
            for norm in tap.norms:
                _open(norm.module, tap)
                norm.module.__dict__["forward"] = self._tapped(tap, norm.module)

    def _tapped(self, tap: Tap, module: nn.Module) -> Callable[..., Any]:
        original: Callable[..., Any] = module.forward
        ordinary = _is_ordinary(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else next(iter(kwargs.values()))
            last = self.stop_after is not None and len(self.calls) + 1 >= self.stop_after
            if ordinary and self._wants_kernel(x, tap) and not last:
                return self._by_kernel(tap, module, original, (args, kwargs))
            with self.course.unwatched():
                self._see(tap, x.detach(), kernel=ordinary and self._wants_kernel(x, tap))
            if last:
                raise LastNorm
            return original(*args, **kwargs)

        return forward

    def _wants_kernel(self, x: Tensor, tap: Tap) -> bool:
        """Whether the kernel of the layer gives the moments; it has no mask and no neighbours."""
        return (
            self.kernels
            and self.from_batch
            and self.mask is None
            and self._exchange is None
            and x.dtype in _WIDE
            and x.dtype == tap.variance.dtype
            and x.is_contiguous()
            and x.numel() > x.shape[1]
        )

    def _by_kernel(
        self, tap: Tap, module: Any, original: Callable[..., Any], given: tuple[Any, Any]
    ) -> Any:
        """Let the layer train for one step with momentum 1: its statistics are the batch's."""
        _clear(tap)
        momentum, module.momentum, module.training = module.momentum, 1.0, True
        try:
            out = original(*given[0], **given[1])
        finally:
            module.momentum, module.training = momentum, False
        x = given[0][0] if given[0] else next(iter(given[1].values()))
        with self.course.unwatched():
            self._note(tap, _read(tap, x))
        return out

    def _see(self, tap: Tap, x: Tensor, *, kernel: bool) -> None:
        if kernel:
            _clear(tap)
            torch.batch_norm_update_stats(x, tap.mean, tap.variance, 1.0)
            self._note(tap, _read(tap, x))
            return
        moments = moments_of(x, None if self.mask is None else resized(self.mask, x, tap.path))
        if self._exchange is not None:
            moments = self._exchange.merge(tap.index, moments)
        self._note(tap, moments)
        if self.from_batch and moments.count:
            tap.write(moments.mean, moments.variance())

    def missed(self, index: int, moments: Moments) -> None:
        """What the other processes saw at a layer that this one did not run."""
        tap = self.taps[index]
        self._note(tap, moments.to(tap.variance.device))

    def _note(self, tap: Tap, moments: Moments) -> None:
        if self.needs_deviation and moments.count == 1 and tap.first.rule.correction:
            raise CalibrationError(
                f"Cannot take the variance of {self.batch} at {tap.path}: it has one value per"
                ' channel. Use larger batches, leave the last one out, or use method "pooled".'
            )
        if moments.count:
            self.calls.append((tap, moments))


def _grouped(norms: Sequence[TrackedNorm]) -> list[Tap]:
    taps: dict[int, Tap] = {}
    for norm in norms:
        known = taps.get(id(norm.variance))
        if known is not None:
            known.norms.append(norm)
            continue
        assert norm.variance is not None, "only layers that have statistics are tapped"  # noqa: S101
        mean = None if norm.mean is None else _widened(norm.mean)
        taps[id(norm.variance)] = Tap(
            len(taps), [norm], mean, _widened(norm.variance), norm.statistics()
        )
    return list(taps.values())


def _widened(tensor: Tensor) -> Tensor:
    dtype = tensor.dtype if tensor.dtype in _WIDE else torch.float32
    return tensor.detach().to(dtype, copy=True)


def _open(module: nn.Module, tap: Tap) -> None:
    """Give a layer scratch statistics; in half precision, its affine in float32 beside them."""
    if tap.mean is not None:
        module._buffers["running_mean"] = tap.mean
    module._buffers["running_var"] = tap.variance
    counter = module._buffers.get("num_batches_tracked")
    if counter is not None:
        module._buffers["num_batches_tracked"] = counter.detach().clone()
    if not isinstance(module, BatchNorm):
        return
    for name in ("weight", "bias"):
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.dtype not in _WIDE:
            wide = parameter.detach().float()
            module._parameters[name] = nn.Parameter(wide, requires_grad=False)


def _is_ordinary(module: nn.Module) -> bool:
    """Whether all that a training step of this class does is a batch norm's."""
    if not isinstance(module, BatchNorm) or "forward" in module.__dict__:
        return False
    forward = type(module).forward
    if forward in _STANDARD:
        return True
    owner = next((cls for cls in type(module).__mro__ if "forward" in vars(cls)), None)
    return owner is not None and (owner.__module__, owner.__name__) in _STANDARD_NAMES


def _clear(tap: Tap) -> None:
    """A NaN of the last batch would stay: kernels add 0 times the old statistics."""
    if tap.mean is not None:
        tap.mean.zero_()
    tap.variance.zero_()


def _read(tap: Tap, x: Tensor) -> Moments:
    """The moments that a kernel left in the statistics with momentum 1."""
    count = x.numel() // x.shape[1]
    assert tap.mean is not None, "ordinary batch norms have a mean"  # noqa: S101
    variance = tap.variance.double()
    return Moments(count, tap.mean.double(), variance * (count - 1))


def resized(mask: Tensor, x: Tensor, path: str) -> Tensor:
    """A mask (N, ...) at the resolution of an activation (N, C, ...): nearest positions count.

    Positions that were put into the batch axis ((N * L, C)) are found by their number. A layer
    behind a pooling to (N, C) counts the samples in which anything does.
    """
    mask = mask.to(x.device, torch.bool)
    shape = (x.shape[0], *x.shape[2:])
    if mask.shape == shape:
        return mask
    if x.dim() == 2 and x.shape[0] == mask.numel():
        return mask.reshape(-1)
    if x.shape[0] != mask.shape[0]:
        raise CalibrationError(
            f"Cannot use the mask at {path}: it is {_sizes(mask.shape)} and the activation"
            f" {_sizes(x.shape)}. Give one of (samples, ...) whose axes belong to the input's."
        )
    if x.dim() == 2:
        return mask.flatten(1).any(1)
    if mask.dim() != x.dim() - 1:
        raise CalibrationError(
            f"Cannot use the mask at {path}: it has {mask.dim() - 1} axes beside the samples, the"
            f" activation {x.dim() - 2}. Give one of (samples, ...) whose axes belong to the"
            " input's."
        )
    floats = mask.unsqueeze(1).float()
    return nn.functional.interpolate(floats, size=shape[1:], mode="nearest-exact")[:, 0] > 0.5


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
