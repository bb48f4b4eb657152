"""What batch norms are replaced by: small frozen dataclasses that build the new layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from bntools import norms
from bntools.building import (
    as_eval_affine,
    carried,
    channels_of,
    eps_of,
    group_norm,
    has_no_affine,
    normalised,
    place_of,
    rank_of,
)
from bntools.errors import TargetError
from bntools.norms.frozen import freeze_module, is_frozen

__all__ = [
    "Resolution",
    "Shape",
    "Site",
    "Target",
    "ToEvoNormB0",
    "ToEvoNormS0",
    "ToGroupNorm",
    "ToInstanceNorm",
    "ToLayerNorm",
    "divisors",
]

_GROUPS = 32


@dataclass(frozen=True)
class Shape:
    """What a norm layer is given: channels, positions per channel, and the rank of its maps.

    Positions and rank are None where the layer did not run.
    """

    channels: int
    positions: int | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Resolution:
    """A target as it fits one layer: `target` is None where it does not, and `note` says why."""

    target: Target | None
    note: str = ""


@dataclass(frozen=True)
class Target:
    """What all targets have in common; `name` is that of the command line and of recipes."""

    name: ClassVar[str] = ""
    takes_activation: ClassVar[bool] = False

    def resolved(self, shape: Shape) -> Resolution:
        """This target as it fits a layer."""
        del shape
        return Resolution(self)

    def candidates(self, shape: Shape) -> tuple[int, ...]:
        """The group counts to choose from by fit; empty where there is no choice."""
        del shape
        return ()

    def build(self, norm: nn.Module, activation: nn.Module | None = None) -> nn.Module:
        """The new layer, with the affine, eps, dtype, device and grad flags of the old one.

        `activation` is what the new layer stands for besides the norm (EvoNorm only).
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The target as JSON data."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        return {"name": self.name, **{k: v for k, v in given.items() if v is not None}}


@dataclass(frozen=True)
class _Grouped(Target):
    """Channels are normalised in groups; `groups` is resolved to the nearest divisor of C.

    `groups="auto"` takes what fits the data best (the default count where nothing is fitted);
    `channels_per_group`, where given, decides.
    """

    groups: int | Literal["auto"] | None = _GROUPS
    channels_per_group: int | None = None

    def __post_init__(self) -> None:
        for name in ("groups", "channels_per_group"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is None or (whole and value > 0) or (name, value) == ("groups", "auto"):
                continue
            also = " or 'auto'" if name == "groups" else ""
            raise TargetError(f"Cannot use {name}={value!r}: it is a whole number from 1 on{also}.")

    def resolved(self, shape: Shape) -> Resolution:
        """The nearest divisor of the channels that leaves at least two values in a group."""
        possible, wanted = _group_counts(shape), self._wanted(shape.channels)
        if not possible:
            return Resolution(
                None, "it has one channel and 1x1 maps: there is nothing to normalise"
            )
        groups = min(possible, key=lambda n: (abs(n - wanted), n))
        note = ""
        if shape.channels % wanted:
            note = f"{groups} groups, as {wanted} do not divide {shape.channels} channels"
        elif groups != wanted:
            note = f"{groups} groups, as {wanted} would have one value each on 1x1 maps"
        return Resolution(replace(self, groups=groups, channels_per_group=None), note)

    def candidates(self, shape: Shape) -> tuple[int, ...]:
        """All divisors that leave at least two values in a group, for "auto"."""
        automatic = self.groups == "auto" and self.channels_per_group is None
        return _group_counts(shape) if automatic else ()

    def _wanted(self, channels: int) -> int:
        if self.channels_per_group is not None:
            return max(1, round(channels / self.channels_per_group))
        return self.groups if isinstance(self.groups, int) else min(_GROUPS, channels)

    def _count(self, norm: nn.Module) -> int:
        found = self.resolved(Shape(channels_of(norm))).target
        groups = found.groups if isinstance(found, _Grouped) else 1
        return groups if isinstance(groups, int) else 1


@dataclass(frozen=True)
class ToGroupNorm(_Grouped):
    """Group normalisation: over the positions and channels of each group of each sample.

    Source: Wu & He, "Group Normalization" (2018).

    Example:
        >>> import torch, bntools
        >>> bntools.ToGroupNorm(groups=5).build(torch.nn.BatchNorm2d(24)).num_groups
        4
    """

    name = "groupnorm"
    affine: bool | None = None

    def build(self, norm: nn.Module, activation: nn.Module | None = None) -> nn.Module:
        """A GroupNorm of the same channels."""
        del activation
        return group_norm(norm, self._count(norm), affine=self.affine)


@dataclass(frozen=True)
class ToLayerNorm(Target):
    """Layer normalisation: of each sample over channels and positions, or of each position.

    `over="sample"` is group normalisation with one group, `over="channels"` normalises every
    position over its channels. Source: Ba, Kiros, Hinton, "Layer Normalization" (2016).

    Example:
        >>> import torch, bntools
        >>> bntools.ToLayerNorm().build(torch.nn.BatchNorm2d(24, affine=False)).num_groups
        1
    """

    name = "layernorm"
    over: Literal["sample", "channels"] = "sample"
    affine: bool | None = None

    def __post_init__(self) -> None:
        if self.over not in ("sample", "channels"):
            raise TargetError(f"Cannot use over={self.over!r}: it is 'sample' or 'channels'.")

    def resolved(self, shape: Shape) -> Resolution:
        """Itself, where there is more than one value to normalise."""
        if shape.channels * (1 if self.over == "channels" else shape.positions or 2) > 1:
            return Resolution(self)
        return Resolution(None, "it has one channel: every value would be normalised to zero")

    def build(self, norm: nn.Module, activation: nn.Module | None = None) -> nn.Module:
        """A GroupNorm with one group, or a ChannelLayerNorm."""
        del activation
        if self.over == "sample":
            return group_norm(norm, 1, affine=self.affine)
        new = norms.ChannelLayerNorm(channels_of(norm), eps=eps_of(norm), **place_of(norm))
        return carried(new, norm, fixed=has_no_affine(norm) and not self.affine)


@dataclass(frozen=True)
class ToInstanceNorm(Target):
    """Instance normalisation: every channel of every sample over its positions.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization" (2016).

    Example:
        >>> import torch, bntools
        >>> type(bntools.ToInstanceNorm().build(torch.nn.BatchNorm3d(24))).__name__
        'InstanceNorm3d'
    """

    name = "instancenorm"
    affine: bool | None = None
    rank: int | None = None

    def resolved(self, shape: Shape) -> Resolution:
        """Itself, unless its maps are, or may be, 1x1: the variance of one value is zero."""
        if shape.positions is None:
            return Resolution(None, "it did not run: if its maps are 1x1, it would give its bias")
        if shape.positions == 1:
            return Resolution(None, "its maps are 1x1: an instance norm would give its bias alone")
        return Resolution(replace(self, rank=shape.rank))

    def build(self, norm: nn.Module, activation: nn.Module | None = None) -> nn.Module:
        """An InstanceNorm without running statistics."""
        del activation
        cls = _INSTANCE_NORMS[self.rank or rank_of(norm)]
        fixed = has_no_affine(norm) and not self.affine
        new = cls(channels_of(norm), eps=eps_of(norm), affine=not fixed, **place_of(norm))
        return carried(new, norm)


@dataclass(frozen=True)
class _ToEvoNorm(Target):
    """What both EvoNorms have in common.

    `nonlinearity` is the form with (True) or without it; by default it is the form with it where
    an activation is taken. Without it an EvoNorm is an affine map, and starts as the one that the
    batch norm is in eval mode.
    """

    takes_activation = True
    _: KW_ONLY
    nonlinearity: bool | None = None
    rank: int | None = None

    def _classes(self) -> Mapping[int, type[nn.Module]]:
        raise NotImplementedError

    def _made(self, norm: nn.Module, activation: nn.Module | None, **options: Any) -> nn.Module:
        active = self.nonlinearity
        active = activation is not None if active is None else active
        cls: Any = self._classes()[self.rank or rank_of(norm)]
        new = cls(
            channels_of(norm), eps=eps_of(norm), nonlinearity=active, **options, **place_of(norm)
        )
        new = carried(new, norm)
        if active and not any(p.requires_grad for p in (new.weight, new.bias)):
            new.v.requires_grad_(False)
        if not active:
            as_eval_affine(new, norm)
        return new


@dataclass(frozen=True)
class ToEvoNormS0(_ToEvoNorm, _Grouped):
    """EvoNorm-S0: normalisation and activation in one, over the groups of each sample.

    Source: Liu et al., "Evolving Normalization-Activation Layers" (2020).

    Example:
        >>> import torch, bntools
        >>> bntools.ToEvoNormS0().build(torch.nn.BatchNorm2d(24), torch.nn.ReLU()).groups
        24
    """

    name = "evonorm-s0"

    def resolved(self, shape: Shape) -> Resolution:
        """The nearest divisor of the channels that leaves at least two values in a group."""
        found = super().resolved(shape)
        if not isinstance(found.target, ToEvoNormS0):
            return found
        return replace(found, target=replace(found.target, rank=shape.rank))

    def build(self, norm: nn.Module, activation: nn.Module | None = None) -> nn.Module:
        """An EvoNorm-S0; without an activation to take, its form without nonlinearity."""
        return self._made(norm, activation, groups=self._count(norm))

    def _classes(self) -> Mapping[int, type[nn.Module]]:
        return {1: norms.EvoNorm1dS0, 2: norms.EvoNorm2dS0, 3: norms.EvoNorm3dS0}


@dataclass(frozen=True)
class ToEvoNormB0(_ToEvoNorm):
    """EvoNorm-B0: normalisation and activation in one, by batch and instance variance.

    Its running variance starts as that of the batch norm. Source: Liu et al., "Evolving
    Normalization-Activation Layers" (2020).
    """

    name = "evonorm-b0"

    def resolved(self, shape: Shape) -> Resolution:
        """Itself, for the rank of the maps."""
        return Resolution(replace(self, rank=shape.rank))

    def build(self, norm: nn.Module, activation: nn.Module | None = None) -> nn.Module:
        """An EvoNorm-B0; without an activation to take, its form without nonlinearity."""
        new = self._made(norm, activation)
        for name in ("running_var", "num_batches_tracked"):
            mine, theirs = getattr(new, name, None), getattr(norm, name, None)
            if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
                mine.copy_(theirs)
        if hasattr(norm, "momentum"):
            new.momentum = norm.momentum
        if is_frozen(norm) and getattr(new, "running_var", None) is not None:
            freeze_module(new)
        return new

    def _classes(self) -> Mapping[int, type[nn.Module]]:
        return {1: norms.EvoNorm1dB0, 2: norms.EvoNorm2dB0, 3: norms.EvoNorm3dB0}


@dataclass(frozen=True, eq=False)
class Site:
    """One replaced norm, for those who fit it; sites are in execution order.

    `path` is the norm's path in the original; `layer` that of the new norm in the replaced model,
    which differs where something else stays in its place (the activation of a BatchNormAct2d).
    `activation` was taken with the norm: a module of its own, not in place, or None. `groups`
    are the counts to choose from, empty where `target` has the last word.
    """

    path: str
    layer: str
    target: Target
    activation: nn.Module | None = None
    groups: tuple[int, ...] = ()

    def teach(self, norm: nn.Module, x: Tensor) -> Tensor:
        """What the new layer should give for the input `x` of the old norm: norm and activation.

        The norm's statistics are the running ones where it has them; nothing is written.
        """
        y = normalised(norm, x)
        return y if self.activation is None else self.activation(y)


_INSTANCE_NORMS: dict[int, Callable[..., nn.Module]] = {
    1: nn.InstanceNorm1d,
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}


def divisors(number: int) -> tuple[int, ...]:
    """The divisors of a number, from 1 to itself."""
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def _group_counts(shape: Shape) -> tuple[int, ...]:
    each = 2 if shape.positions is None else shape.positions
    return tuple(n for n in divisors(shape.channels) if shape.channels // n * each > 1)
