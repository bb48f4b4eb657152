"""How each kind of new layer is fitted: what of it is solved for, and from which moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bntools.errors import FitError
from bntools.fitting.regression import JointMoments, Line, Rows, pieces, rows_of, solve
from bntools.fitting.search import Sample, best_v, sampled
from bntools.modules import duplicate
from bntools.moments import Moments, moments_of
from bntools.norms import ChannelLayerNorm, EvoNormS0
from bntools.norms.evonorm import EvoNorm

__all__ = ["Fitter", "NotAffineError", "Solution", "fitter_for"]

_INSTANCE_NORMS = nn.modules.instancenorm._InstanceNorm  # noqa: SLF001 - it has no other name


@dataclass(frozen=True, eq=False)
class Solution:
    """What a layer is to have: new contents of its tensors by name, and its number of groups."""

    tensors: Mapping[str, Tensor]
    groups: int | None
    line: Line
    moments: JointMoments
    carried: Tensor | None = None
    """The summed squared error per channel of the affine that the layer came with."""

    @property
    def error(self) -> float:
        """The error relative to the target's deviation from its channel means."""
        return _relative(self.line.error, self.moments.m2_target)

    @property
    def carried_error(self) -> float | None:
        """The same for the affine that the layer came with."""
        return None if self.carried is None else _relative(self.carried, self.moments.m2_target)

    def apply(self, layer: nn.Module) -> None:
        """Change the layer; raises `FitError` where a value overflows its dtype."""
        with torch.no_grad():
            for name, values in self.tensors.items():
                getattr(layer, name).copy_(values.reshape(getattr(layer, name).shape))
        if self.groups is not None:
            setattr(
                layer, "num_groups" if isinstance(layer, nn.GroupNorm) else "groups", self.groups
            )

    def fits(self, layer: nn.Module) -> bool:
        """Whether all values are finite in the layer's dtypes."""
        return all(
            bool(values.to(getattr(layer, name).dtype).isfinite().all())
            for name, values in self.tensors.items()
        )


class NotAffineError(FitError):
    """A layer of unknown class is no per-channel affine after something: it cannot be fitted."""


class Fitter:
    """Collects what one layer is fitted from: pairs of its inputs and what it should give.

    `looks` says whether `look` must have seen all pairs, and `choose` been called, before `add`.
    """

    looks = False
    least = 1e-4
    """The deviation, relative to its size, under which a normalised input counts as constant."""

    def __init__(self, layer: nn.Module, groups: tuple[int, ...]) -> None:
        self.layer = layer
        self.candidates = groups or self._own_groups()
        self.moments: JointMoments | None = None

    def look(self, x: Tensor, target: Tensor, share: float, generator: torch.Generator) -> None:
        """See a batch of pairs before anything is chosen; `share` is its part of all samples."""

    def choose(self) -> None:
        """Choose what no closed form gives."""

    @property
    def count(self) -> int:
        """The values per channel that were collected."""
        return 0 if self.moments is None else self.moments.count

    @property
    def unknowns(self) -> int:
        """What is fitted per channel."""
        return sum(t is not None for t in _affine(self.layer)) + self.looks

    def add(self, x: Tensor, target: Tensor) -> bool:
        """Collect the moments of a batch of pairs; False where one is not finite."""
        base = self._prepared(x)
        for some_x, some_target in pieces(base, target):
            found = self._moments(some_x, some_target)
            self.moments = found if self.moments is None else self.moments.merge(found)
        return self.moments is None or self.moments.is_finite

    def solution(self) -> Solution:
        """Solve for the affine."""
        if self.moments is None:
            raise FitError("Cannot fit a layer that has seen nothing.")
        weight, bias = _affine(self.layer)
        found = [self.moments]
        if self.moments.base.dim() > 1:
            found = [self.moments.chosen(k) for k in range(len(self.candidates))]
        lines = [
            solve(m, weight=weight is not None, bias=bias is not None, least=self.least)
            for m in found
        ]
        best = min(range(len(lines)), key=lambda k: float(lines[k].error.sum()))
        return self._solution(lines[best], found[best], best)

    def _solution(self, line: Line, moments: JointMoments, index: int) -> Solution:
        groups = self.candidates[index] if self.candidates else None
        return Solution(
            {**self._affine_of(line), **self._chosen()},
            groups,
            line,
            moments,
            self._carried(moments, groups),
        )

    def _affine_of(self, line: Line) -> dict[str, Tensor]:
        weight, bias = _affine(self.layer)
        found = {"weight": line.weight} if weight is not None else {}
        return {**found, "bias": line.bias} if bias is not None else found

    def _carried(self, moments: JointMoments, groups: int | None) -> Tensor | None:
        if groups is not None and groups not in self._own_groups():
            return None
        weight, bias = _affine(self.layer)
        like = moments.base
        scale = torch.ones_like(like) if weight is None else weight.detach().to(like).flatten()
        shift = torch.zeros_like(like) if bias is None else bias.detach().to(like).flatten()
        return moments.error_of(scale, shift)

    def _own_groups(self) -> tuple[int, ...]:
        return ()

    def _chosen(self) -> dict[str, Tensor]:
        return {}

    def _prepared(self, x: Tensor) -> Tensor:
        """What the moments are taken of."""
        return x

    def _moments(self, x: Tensor, target: Tensor) -> JointMoments:
        raise NotImplementedError


class _Grouped(Fitter):
    """GroupNorm and InstanceNorm: every number of groups from one look at the data.

    Within a sample and channel both are affine maps, so that moments within these give the moments
    of every normalised form.
    """

    def _own_groups(self) -> tuple[int, ...]:
        if isinstance(self.layer, nn.GroupNorm):
            return (self.layer.num_groups,)
        return ()

    def _moments(self, x: Tensor, target: Tensor) -> JointMoments:
        rows, eps = rows_of(x, target), float(self.layer.eps)  # type: ignore[arg-type]
        counts = self.candidates or (x.shape[1],)
        return _stacked([rows.normalised(groups, eps).pooled() for groups in counts])


class _Plain(Fitter):
    """Any layer that is a per-channel affine after something: this is run as it is."""

    def __init__(self, layer: nn.Module, groups: tuple[int, ...]) -> None:
        super().__init__(layer, groups)
        self._base: nn.Module | None = None

    def _prepared(self, x: Tensor) -> Tensor:
        if self._base is None:
            self._base = _without_affine(self.layer, x.dtype)
            self._ready(x)
        found = self._base(_widened(x))
        if not isinstance(found, Tensor) or found.shape != x.shape:
            raise NotAffineError("its output has another shape than its input")
        return found

    def _moments(self, x: Tensor, target: Tensor) -> JointMoments:
        return rows_of(x, target).pooled()

    def _ready(self, x: Tensor) -> None:
        """Before the first use: see that the layer is affine in weight and bias, if not known."""
        if not isinstance(self.layer, (EvoNorm, ChannelLayerNorm)):
            self._check(x)

    def _check(self, x: Tensor) -> None:
        weight, bias = _affine(self.layer)
        channels = [1, -1] + [1] * (x.dim() - 2)
        with_affine = _widened_copy(self.layer, x.dtype)(_widened(x))
        expected = self._base(_widened(x)) if self._base is not None else with_affine
        if weight is not None:
            expected = expected * weight.detach().to(expected).view(channels)
        if bias is not None:
            expected = expected + bias.detach().to(expected).view(channels)
        scale = float(with_affine.abs().max())
        if not torch.allclose(with_affine, expected, rtol=1e-3, atol=1e-4 * scale):
            raise NotAffineError("its output is not a per-channel `weight * ... + bias`")


class _Affine(_Plain):
    """EvoNorms without nonlinearity, which normalise nothing: their inputs have any mean."""

    least = 1e-6


class _Searched(_Plain):
    """EvoNorms: v is searched on a sample, and the affine is solved for on everything."""

    looks = True

    def __init__(self, layer: nn.Module, groups: tuple[int, ...]) -> None:
        super().__init__(layer, groups)
        self._samples: list[Sample] = []
        self._v: Tensor | None = None

    def look(self, x: Tensor, target: Tensor, share: float, generator: torch.Generator) -> None:
        """Keep some values of each channel."""
        self._samples.append(sampled(x, target, share, generator))

    def _chosen(self) -> dict[str, Tensor]:
        return {} if self._v is None else {"v": self._v}

    def _carried(self, moments: JointMoments, groups: int | None) -> Tensor | None:
        del moments, groups  # these are for another v
        return None

    def _ready(self, x: Tensor) -> None:
        del x
        if self._base is not None:
            self._fix(self._base)

    def _fix(self, base: nn.Module) -> None:
        """Give a layer what was chosen."""
        for name, values in self._chosen().items():
            getattr(base, name).copy_(values)


class _EvoS0(_Searched):
    def _own_groups(self) -> tuple[int, ...]:
        return (int(self.layer.groups),)  # type: ignore[arg-type]

    def choose(self) -> None:
        """Search v for each number of groups, and take the best."""
        sample = Sample.joined(self._samples)
        self._samples = []
        eps = float(self.layer.eps)  # type: ignore[arg-type]
        unit = _unit(sample.x)
        rows = Rows(1, sample.means, sample.means, sample.variances, sample.means, sample.means)
        results = []
        for groups in self.candidates:
            rstd = (rows.statistics(groups)[1] + eps).rsqrt()[sample.rows].t()

            def shape(x: Tensor, v: Tensor, part: slice, rstd: Tensor = rstd) -> Tensor:
                return x * torch.sigmoid(v * x) * rstd[part]

            v, error = best_v(sample, shape, unit)
            results.append((float(error.sum()), groups, v))
        _, groups, self._v = min(results, key=lambda found: found[0])
        self.candidates = (groups,)

    def _fix(self, base: nn.Module) -> None:
        super()._fix(base)
        if isinstance(base, EvoNormS0):
            base.groups = self.candidates[0]


class _EvoB0(_Searched):
    def __init__(self, layer: nn.Module, groups: tuple[int, ...]) -> None:
        super().__init__(layer, groups)
        self._seen: Moments | None = None

    def look(self, x: Tensor, target: Tensor, share: float, generator: torch.Generator) -> None:
        """Keep some values of each channel, and the variance of all."""
        super().look(x, target, share, generator)
        found = moments_of(x)
        self._seen = found if self._seen is None else self._seen.merge(found)

    def choose(self) -> None:
        """Take the variance of what the layer sees, and search v."""
        if self._seen is None:
            raise FitError("Cannot fit a layer that has seen nothing.")
        sample = Sample.joined(self._samples)
        self._samples = []
        eps = float(self.layer.eps)  # type: ignore[arg-type]
        variance = self._seen.variance()
        batch = (variance + eps).sqrt().unsqueeze(1)
        own = (sample.variances + eps).sqrt()[sample.rows].t()

        def shape(x: Tensor, v: Tensor, part: slice) -> Tensor:
            return x / torch.maximum(batch[part], v * x + own[part])

        self._v, _ = best_v(sample, shape, torch.ones_like(variance))

    def _chosen(self) -> dict[str, Tensor]:
        chosen = super()._chosen()
        if self._seen is not None and isinstance(self.layer.running_var, Tensor):
            chosen["running_var"] = self._seen.variance()
        return chosen


def fitter_for(layer: nn.Module, groups: tuple[int, ...], name: str) -> Fitter:
    """What fits a layer; raises `FitError` for one with nothing to fit."""
    weight, bias = _affine(layer)
    if weight is None and bias is None:
        raise FitError(
            f"Cannot fit {name}: it has neither weight nor bias. Make it with an affine, or skip it"
            " with --skip."
        )
    return _family(layer)(layer, groups)


def _family(layer: nn.Module) -> Callable[[nn.Module, tuple[int, ...]], Fitter]:
    if isinstance(layer, EvoNorm):
        active = _EvoS0 if isinstance(layer, EvoNormS0) else _EvoB0
        return active if layer.nonlinearity else _Affine
    if type(layer) is nn.GroupNorm:
        return _Grouped
    if isinstance(layer, _INSTANCE_NORMS) and not layer.track_running_stats:
        return _Grouped
    return _Plain


def _affine(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return weight, bias


def _without_affine(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    base = _widened_copy(layer, dtype)
    weight, bias = _affine(base)
    with torch.no_grad():
        if weight is not None:
            weight.fill_(1)
        if bias is not None:
            bias.zero_()
    return base


def _widened_copy(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    copied = duplicate(layer)
    copied.__dict__.pop("forward", None)  # no stop
    return copied.to(torch.promote_types(dtype, torch.float32))


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    deviation = x.std(1, correction=0)
    return torch.where(deviation > 0, 1 / deviation.clamp(min=1e-30), 1.0)


def _stacked(found: list[JointMoments]) -> JointMoments:
    if len(found) == 1:
        return found[0]
    names = ("base", "target", "m2_base", "m2_target", "m_both")
    parts = (torch.stack([getattr(m, name) for m in found]) for name in names)
    return JointMoments(found[0].count, *parts)


def _relative(error: Tensor, total: Tensor) -> float:
    whole = float(total.sum())
    return (float(error.sum()) / whole) ** 0.5 if whole > 0 else 0.0
