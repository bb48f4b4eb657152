"""Random sums of branches: of every rank, written in many ways, with traps that must not matter.

A block is drawn from one number. Its plain branches fit each other, so that they have to merge;
traps are whatever rules that out for a branch or for all, or only looks as if it did.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """What all branches of a sum share; `kernel` and `padding` are those of the largest."""

    rank: int
    inputs: int
    outputs: int
    kernel: Sizes
    padding: Sizes
    stride: Sizes
    dilation: Sizes

    def smaller(self, draw: random.Random) -> tuple[Sizes, Sizes]:
        """The kernel and padding of a layer that looks at the middle of the same places."""
        kernel, padding = [], []
        for size, zeros, step in zip(self.kernel, self.padding, self.dilation, strict=True):
            most = min((size - 1) // 2, zeros // step)
            less = draw.randint(0, most)
            kernel.append(size - 2 * less)
            padding.append(zeros - step * less)
        return tuple(kernel), tuple(padding)

    @property
    def is_even(self) -> bool:
        """Whether the input itself is a branch that fits."""
        sizes = zip(self.kernel, self.padding, self.dilation, self.stride, strict=True)
        alike = all(2 * p == d * (k - 1) and k % 2 and s == 1 for k, p, d, s in sizes)
        return alike and self.inputs == self.outputs


@dataclass
class Drawn:
    """A block, the shape of an input, and the traps in it."""

    model: nn.Module
    shape: Sizes
    geometry: Geometry
    traps: list[str] = field(default_factory=list)


class Border(nn.Module):
    """A norm, and around it what the norm gives for zeros."""

    def __init__(self, rank: int, channels: int, width: Sizes) -> None:
        super().__init__()
        self.norm = NORMS[rank](channels)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        values = (norm.bias - norm.running_mean * scale).view(1, -1, *[1] * len(self.width))
        out = F.pad(norm(x), [w for width in reversed(self.width) for w in (width, width)])
        for axis, width in enumerate(self.width, 2):
            if width:
                out.narrow(axis, 0, width)[...] = values
                out[(slice(None),) * axis + (slice(-width, None),)] = values
        return out


class Scale(nn.Module):
    """LayerScale, or a number."""

    def __init__(self, rank: int, channels: int, *, learned: bool) -> None:
        super().__init__()
        shape = (channels, *[1] * rank) if learned else (1,)
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class Block(nn.Module):
    """The sum of some branches, added up by `add`."""

    def __init__(self, branches: list[nn.Module], add: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.add = add
        self.before = self.after = nn.Identity()

    def forward(self, x: Tensor) -> object:
        x = self.before(x)
        return self.after(self.add([branch(x) for branch in self.branches]))


def _in_place(terms: list[Tensor]) -> Tensor:
    whole = terms[0] * 1
    for term in terms[1:]:
        whole += term
    return whole


def _chain(terms: list[Tensor]) -> Tensor:
    whole = terms[0]
    for term in terms[1:]:
        whole = whole + term
    return whole


def _signed(terms: list[Tensor]) -> Tensor:
    whole = terms[0]
    for i, term in enumerate(terms[1:]):
        whole = torch.sub(whole, term, alpha=0.5) if i % 2 else torch.add(whole, term, alpha=2)
    return whole / 3 if len(terms) > 1 else whole


def _nested(terms: list[Tensor]) -> Tensor:
    while len(terms) > 1:
        terms = [*terms[2:], terms[0] + terms[1]]
    return terms[0]


ADDERS = [
    _chain, _in_place, _signed, _nested, sum,
    lambda terms: torch.stack(terms).sum(0), lambda terms: torch.stack(terms, -1).mean(-1),
]  # fmt: skip


def draw(seed: int) -> Drawn:
    """A block of one geometry."""
    random_ = random.Random(seed)
    torch.manual_seed(seed)
    geometry = _geometry(random_)
    branches = [_conv(random_, geometry, largest=True)]
    branches += [_branch(random_, geometry) for _ in range(random_.randint(1, 3))]
    random_.shuffle(branches)
    model = Block(branches, random_.choice(ADDERS))
    size = [max(k * d, 3) + random_.randint(1, 4) for k, d in _spans(geometry)]
    drawn = Drawn(model, (random_.randint(1, 3), geometry.inputs, *size), geometry)
    if random_.random() < 0.4:
        name = random_.choice(list(TRAPS))
        if TRAPS[name](random_, drawn):
            drawn.traps.append(name)
    return drawn


def _spans(geometry: Geometry) -> list[tuple[int, int]]:
    return list(zip(geometry.kernel, geometry.dilation, strict=True))


def _geometry(random_: random.Random) -> Geometry:
    rank = random_.choice([1, 2, 2, 3])
    inputs = random_.choice([2, 4, 6])
    outputs = random_.choice([inputs, inputs, 4, 8])

    def some(options: list[int]) -> Sizes:
        alike = random_.random() < 0.6
        first = random_.choice(options)
        return tuple(first if alike else random_.choice(options) for _ in range(rank))

    kernel, dilation = some([1, 2, 3, 3, 5]), some([1, 1, 1, 2])
    same = random_.random() < 0.7
    padding = tuple(
        d * (k - 1) // 2 if same else random_.randint(0, d * (k - 1))
        for k, d in zip(kernel, dilation, strict=True)
    )
    return Geometry(rank, inputs, outputs, kernel, padding, some([1, 1, 2, 3]), dilation)


def _groups(random_: random.Random, inputs: int, outputs: int) -> int:
    return random_.choice([g for g in (1, 1, 2, 4, 6) if inputs % g == outputs % g == 0])


def _conv(random_: random.Random, g: Geometry, *, largest: bool = False) -> nn.Module:
    kernel, padding = (g.kernel, g.padding) if largest else g.smaller(random_)
    groups = 1 if largest else _groups(random_, g.inputs, g.outputs)
    dilation = g.dilation
    if not largest and random_.random() < 0.2:
        kernel, dilation = _spread(kernel, dilation)
    layer = CONVOLUTIONS[g.rank](
        g.inputs, g.outputs, kernel, g.stride, padding, dilation, groups,
        bias=random_.random() < 0.5,
    )  # fmt: skip
    return _followed(random_, g, layer)


def _spread(kernel: Sizes, dilation: Sizes) -> tuple[Sizes, Sizes]:
    """A kernel that reaches as far with half of the steps, where there is one."""
    half = [k % 2 == 1 and k > 1 for k in kernel]
    return (
        tuple((k + 1) // 2 if h else k for k, h in zip(kernel, half, strict=True)),
        tuple(2 * d if h else d for d, h in zip(dilation, half, strict=True)),
    )


def _followed(random_: random.Random, g: Geometry, layer: nn.Module) -> nn.Module:
    """With a norm, a scale or a dropout after it, or alone."""
    more = {
        "norm": lambda: NORMS[g.rank](g.outputs),
        "plain norm": lambda: NORMS[g.rank](g.outputs, affine=False),
        "scale": lambda: Scale(g.rank, g.outputs, learned=random_.random() < 0.7),
        "dropout": lambda: nn.Dropout(0.5),
    }
    chosen = [more[random_.choice(list(more))]() for _ in range(random_.randint(0, 2))]
    return nn.Sequential(layer, *chosen) if chosen else layer


def _branch(random_: random.Random, g: Geometry) -> nn.Module:
    kinds = [_conv, _conv, _pointwise_first, _pointwise_last]
    pooled = all(d == 1 for d in g.dilation)
    if pooled and g.inputs == g.outputs:
        kinds.append(_pool)
    if g.is_even:
        kinds += [_identity, _identity]
    kinds.append(_bordered)
    return random_.choice(kinds)(random_, g)


def _identity(random_: random.Random, g: Geometry) -> nn.Module:
    return random_.choice(
        [nn.Identity(), NORMS[g.rank](g.inputs), Scale(g.rank, g.inputs, learned=True)]
    )


def _pool(random_: random.Random, g: Geometry) -> nn.Module:
    kernel, padding = g.smaller(random_)
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        return _conv(random_, g)
    return _followed(random_, g, POOLS[g.rank](kernel, g.stride, padding))


def _pointwise_first(random_: random.Random, g: Geometry) -> nn.Module:
    """A 1x1 before: with a bias only where what follows is not padded."""
    kernel, padding = g.smaller(random_)
    middle = random_.choice([g.inputs, 2 * g.inputs])
    first = CONVOLUTIONS[g.rank](g.inputs, middle, 1, bias=not any(padding))
    second = CONVOLUTIONS[g.rank](middle, g.outputs, kernel, g.stride, padding, g.dilation)
    return _followed(random_, g, nn.Sequential(first, second))


def _pointwise_last(random_: random.Random, g: Geometry) -> nn.Module:
    kernel, padding = g.smaller(random_)
    middle = 2 * g.outputs
    first = CONVOLUTIONS[g.rank](g.inputs, middle, kernel, g.stride, padding, g.dilation)
    between = [NORMS[g.rank](middle)] if random_.random() < 0.5 else []
    last = CONVOLUTIONS[g.rank](middle, g.outputs, 1, groups=_groups(random_, middle, g.outputs))
    return nn.Sequential(first, *between, last)


def _bordered(random_: random.Random, g: Geometry) -> nn.Module:
    """As in diverse-branch blocks: 1x1, norm, a border of what it gives for zeros, unpadded."""
    kernel, padding = g.smaller(random_)
    first = CONVOLUTIONS[g.rank](g.inputs, g.inputs, 1, bias=False)
    last = CONVOLUTIONS[g.rank](g.inputs, g.outputs, kernel, g.stride, 0, g.dilation)
    return nn.Sequential(first, Border(g.rank, g.inputs, padding), last)


# Traps: each changes a block, and says whether it could.


def _hook(random_: random.Random, drawn: Drawn) -> bool:
    layer = random_.choice([m for m in drawn.model.modules() if not m._modules])
    layer.register_forward_hook(lambda _, __, out: out * 1.5)
    return True


def _activation(random_: random.Random, drawn: Drawn) -> bool:
    branches = drawn.model.branches
    at = random_.randrange(len(branches))
    branches[at] = nn.Sequential(branches[at], nn.ReLU())
    return True


def _shared(random_: random.Random, drawn: Drawn) -> bool:
    """One branch is there twice: that is the same layer in two places of one sum."""
    branches = drawn.model.branches
    branches.append(branches[random_.randrange(len(branches))])
    return True


def _reused(_: random.Random, drawn: Drawn) -> bool:
    """What a branch gives is also returned."""
    model, seen = drawn.model, []
    first = model.branches[0]

    class Also(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = first

        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.inner(x))
            return seen[-1]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = model

        def forward(self, x: Tensor) -> list[Tensor]:
            seen.clear()
            out = self.block(x)
            return [out, torch.sigmoid(seen.pop())]

    model.branches[0] = Also()
    drawn.model = Both()
    return True


def _twice(_: random.Random, drawn: Drawn) -> bool:
    """The block runs twice."""
    if not drawn.geometry.is_even:
        return False
    drawn.model = nn.Sequential(drawn.model, nn.Tanh(), drawn.model)
    return True


def _tied(_: random.Random, drawn: Drawn) -> bool:
    layers = [m for m in drawn.model.modules() if isinstance(m, tuple(CONVOLUTIONS.values()))]
    first = layers[0]
    same = [m for m in layers[1:] if m.weight.shape == first.weight.shape]
    for other in same[:1]:
        other.weight = first.weight
    return bool(same)


def _modes(random_: random.Random, drawn: Drawn) -> bool:
    """Training mode, and parameters that are frozen: neither matters."""
    drawn.model.train()
    for parameter in drawn.model.parameters():
        parameter.requires_grad_(random_.random() < 0.5)
    return True


def _misfit(_: random.Random, drawn: Drawn) -> bool:
    """A branch that fits at one size of input only, where there is one."""
    g = drawn.geometry
    if set(g.stride) != {2} or any(p for p in g.padding) or set(g.kernel) != {3}:
        return False
    odd = CONVOLUTIONS[g.rank](g.inputs, g.outputs, 2, g.stride, 0)
    drawn.model.branches.append(odd)
    drawn.shape = (*drawn.shape[:2], *(7 for _ in range(g.rank)))
    return True


def _other_input(_: random.Random, drawn: Drawn) -> bool:
    """One branch takes what another function makes of the input."""
    drawn.model.branches[0] = nn.Sequential(nn.Tanh(), drawn.model.branches[0])
    return True


def _weight_norm(_: random.Random, drawn: Drawn) -> bool:
    layers = [m for m in drawn.model.modules() if isinstance(m, tuple(CONVOLUTIONS.values()))]
    nn.utils.parametrizations.weight_norm(layers[0])
    return True


def _surroundings(_: random.Random, drawn: Drawn) -> bool:
    """Something before and after, in place: it stays, and nothing changes for the sum."""
    drawn.model.before = nn.ReLU()
    drawn.model.after = nn.ReLU(inplace=True)
    return True


TRAPS: dict[str, Callable[[random.Random, Drawn], bool]] = {
    "hook": _hook,
    "activation": _activation,
    "shared": _shared,
    "reused": _reused,
    "twice": _twice,
    "tied": _tied,
    "modes": _modes,
    "misfit": _misfit,
    "other input": _other_input,
    "weight norm": _weight_norm,
    "surroundings": _surroundings,
}
HARMLESS = {"modes", "surroundings"}
