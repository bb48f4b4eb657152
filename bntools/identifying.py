"""Which tensor of a hand-written batch norm is its mean, variance, gamma and beta.

The module is asked, not read: a copy of it in float64 runs with other numbers in its tensors, and
how the map that it applies changes tells what each of them is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bntools.equivalence import in_float64
from bntools.modules import preserved

__all__ = ["Identity", "NotABatchNorm", "Training", "identify", "observe_training"]

_SAME = 1e-9
_SIZE = 5
_LARGE = 1030  # more than ghosts of a batch have


class NotABatchNorm(Exception):  # noqa: N818 - an answer, no error
    """What a module applies is no batch norm of its own tensors; the text says why."""


@dataclass(frozen=True)
class Identity:
    """The names of a batch norm's tensors, and its eps.

    The weight of the batch norm is `gamma` plus `offset`, which is 1 where gamma starts at zero.
    """

    mean: str
    variance: str
    gamma: str | None
    beta: str | None
    eps: float
    offset: float = 0.0

    def roles(self) -> dict[str, str]:
        """The names by role."""
        found = {"mean": self.mean, "variance": self.variance}
        found.update({"gamma": self.gamma} if self.gamma is not None else {})
        found.update({"beta": self.beta} if self.beta is not None else {})
        return found


@dataclass(frozen=True)
class Training:
    """How a module normalises and what it keeps while it is trained.

    `observed` is False where that could not be seen. `batch` says that it uses the statistics of
    the batch, `odd` that it does neither that nor what it does in eval mode; `by` lists what
    decides on that: "gradients", "mode", or both. `momentum` is that of PyTorch, the weight of the
    new value, and None where the statistics do not follow such a rule; `unbiased` says which
    variance is kept.
    """

    observed: bool
    batch: bool = False
    by: tuple[str, ...] = ()
    momentum: float | None = None
    unbiased: bool | None = None
    moves: bool = False
    odd: bool = False


def identify(module: nn.Module, channels: int, rank: int) -> Identity:
    """What the tensors of a module are that applies a map per channel, along axis 1, in eval mode.

    Raises `NotABatchNorm`.
    """
    probe = _Probe(module, channels, rank)
    roles: dict[str, str] = {}
    eps = offset = 0.0
    for name in probe.names:
        role, number = probe.role(name)
        if role is None:
            continue
        if role in roles:
            raise NotABatchNorm(f"both {roles[role]} and {name} work like its {role}")
        roles[role] = name
        eps = number if role == "variance" else eps
        offset = number if role == "gamma" else offset
    missing = [role for role in ("mean", "variance") if role not in roles]
    if missing:
        raise NotABatchNorm(f"none of its tensors works like a {' or a '.join(missing)}")
    found = Identity(
        roles["mean"], roles["variance"], roles.get("gamma"), roles.get("beta"), eps, offset
    )
    probe.confirm(found)
    return found


class _Probe:
    """A copy of a module in float64, in which tensors are given other numbers."""

    def __init__(self, module: nn.Module, channels: int, rank: int) -> None:
        self.module = in_float64(module).eval()
        self.shape = [2, channels, *[3] * (rank - 2)]
        self.channels = channels
        self.names = [name for name, tensor in _held(self.module) if _fits(tensor, channels)]
        generator = torch.Generator().manual_seed(7)
        self.numbers = {
            name: torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
            for name in self.names
        }

    def map(self, **others: Tensor | float) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, with some numbers being others."""
        with preserved(self.module), torch.no_grad():
            for name in self.names:
                number = others.get(name, self.numbers[name])
                tensor = _get(self.module, name)
                values = torch.as_tensor(number, dtype=torch.float64).expand(self.channels)
                _put(self.module, name, values.reshape(tensor.shape).clone())
            zero = torch.zeros(self.shape, dtype=torch.float64)
            at_zero, at_one = (self.module(zero + x).movedim(1, 0).flatten(1) for x in (0.0, 1.0))
        return at_one[:, 0] - at_zero[:, 0], at_zero[:, 0]

    def role(self, name: str) -> tuple[str | None, float]:
        """What a tensor is, with the eps of a variance, and the offset of a gamma."""
        scale, shift = self.map()
        number = self.numbers[name]
        scale_2, shift_2 = self.map(**{name: 2 * number})
        if _same(scale, scale_2):
            if _same(shift, shift_2):
                return None, 0.0
            slope = (shift_2 - shift) / number
            if _same(slope, torch.ones_like(slope)):
                return "beta", 0.0
            if _same(slope, -scale):
                return "mean", 0.0
            raise NotABatchNorm(f"{name} works neither like a mean nor like a beta")
        at = [self.map(**{name: x})[0] for x in (0.0, 1.0, 3.0)]
        if _same(at[2] - at[0], 3 * (at[1] - at[0])):
            return "gamma", self._offset(at)
        return "variance", self._eps(name, at)

    def _offset(self, at: list[Tensor]) -> float:
        return _single("gamma", at[0] / (at[1] - at[0]))

    def _eps(self, name: str, at: list[Tensor]) -> float:
        ratio = (at[1] / at[0]) ** 2  # eps / (1 + eps); 0 where 0 divides by 0
        eps = ratio.nan_to_num(0.0) / (1 - ratio.nan_to_num(0.0))
        expected = at[1] * ((1 + eps) / (3 + eps)).sqrt()
        if not bool(eps.isfinite().all()) or not _same(at[2], expected):
            raise NotABatchNorm(f"{name} does not work like a variance: 1/sqrt({name} + eps)")
        return _single("eps", eps)

    def confirm(self, found: Identity) -> None:
        """Compare the map with that of a batch norm, with all numbers at once."""
        one, zero = (torch.full([self.channels], x, dtype=torch.float64) for x in (1.0, 0.0))
        gamma = one if found.gamma is None else self.numbers[found.gamma] + found.offset
        beta = zero if found.beta is None else self.numbers[found.beta]
        scale = gamma / (self.numbers[found.variance] + found.eps).sqrt()
        shift = beta - self.numbers[found.mean] * scale
        own = self.map()
        if not _same(own[0], scale) or not _same(own[1], shift):
            raise NotABatchNorm("with its tensors a batch norm would give something else")


def _single(what: str, numbers: Tensor) -> float:
    """The one number that all channels have, as it was written."""
    if not _same(numbers, numbers[:1].expand_as(numbers)):
        raise NotABatchNorm(f"its {what} differs between channels")
    number = float(numbers.mean())
    written = float(f"{number:.9g}")
    return written if math.isclose(number, written, rel_tol=1e-10, abs_tol=1e-14) else number


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=_SAME, atol=_SAME)


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floating tensors that a module holds itself, registered or not."""
    for table in (module._parameters, module._buffers, module.__dict__):
        for name, tensor in table.items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                yield name, tensor


def _fits(tensor: Tensor, channels: int) -> bool:
    return tensor.numel() == channels and sum(size > 1 for size in tensor.shape) <= 1


def _get(module: nn.Module, name: str) -> Tensor:
    return dict(_held(module))[name]


def _put(module: nn.Module, name: str, values: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(values)
    elif name in module._buffers:
        module._buffers[name] = values
    else:
        module.__dict__[name] = values


def observe_training(module: nn.Module, found: Identity, channels: int, rank: int) -> Training:
    """Run copies of a batch norm in training, and see what it normalises with and what it keeps."""
    generator = torch.Generator().manual_seed(11)
    shape = [_SIZE, channels, *[4] * (rank - 2)]
    data = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.7 + 0.6
    flat = data.movedim(1, 0).flatten(1)
    try:
        step = _step(module, found, data, training=True, gradients=True)
    except Exception:  # noqa: BLE001 - a module may raise anything in training
        return Training(observed=False)
    moves = not all(_same(_START[role] + 0 * new, new) for role, new in step.after.items())
    if step.kind == "other" or _other_when_large(module, found, step.kind, channels, rank):
        return Training(observed=True, moves=moves, odd=True)
    if step.kind == "own":
        return Training(observed=True, moves=moves)
    modes = (("gradients", False, True), ("mode", True, False))
    by = tuple(name for name, *mode in modes if _uses_batch(module, found, data, *mode))
    if not moves:
        return Training(observed=True, batch=True, by=by, momentum=0.0)
    known = Training(observed=True, batch=True, by=by, moves=True)
    weight = _weight("mean", step, flat.mean(1))
    for unbiased in (False, True):
        variance = flat.var(1, unbiased=unbiased)
        if weight is not None and weight == _weight("variance", step, variance):
            return replace(known, momentum=weight, unbiased=unbiased)
    return known


def _other_when_large(
    module: nn.Module, found: Identity, kind: str, channels: int, rank: int
) -> bool:
    """Whether a large batch is treated otherwise: in parts, or at last at all."""
    generator = torch.Generator().manual_seed(13)
    shape = [_LARGE, channels, *[1] * (rank - 2)]
    data = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.7 + 0.6
    try:
        return _step(module, found, data, training=True, gradients=True).kind != kind
    except Exception:  # noqa: BLE001 - it may want larger images
        return False


_START = {"mean": 0.3, "variance": 0.7}
_GAMMA, _BETA = 1.3, 0.2


@dataclass(frozen=True)
class _Step:
    """A forward: whether it normalised with the "batch", its "own" numbers, or "other" ones.

    `after` are the statistics afterwards, `later` those after a second forward, on other data.
    """

    kind: str
    after: Mapping[str, Tensor]
    later: Mapping[str, Tensor]


def _step(
    module: nn.Module, found: Identity, data: Tensor, *, training: bool, gradients: bool
) -> _Step:
    twin = in_float64(module)
    twin.train(training)
    numbers = {**_START, "gamma": _GAMMA - found.offset, "beta": _BETA}
    for role, name in found.roles().items():
        _put(twin, name, torch.full_like(_get(twin, name).detach(), numbers[role]))
    seen: list[dict[str, Tensor]] = []
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
        out = twin(data.clone()).detach()
        seen.append(_statistics(twin, found))
        twin(_later(data))
        seen.append(_statistics(twin, found))
    axes = [axis for axis in range(data.dim()) if axis != 1]
    variance, mean = torch.var_mean(data, axes, unbiased=False, keepdim=True)
    kind = "other"
    for name, m, v in (("batch", mean, variance), ("own", _START["mean"], _START["variance"])):
        gamma, beta = 1.0 if found.gamma is None else _GAMMA, 0.0 if found.beta is None else _BETA
        normal = (data - m) / torch.as_tensor(v + found.eps, dtype=data.dtype).sqrt() * gamma + beta
        if out.shape == normal.shape and _same(out, normal):
            kind = name
    return _Step(kind, *seen)


def _later(data: Tensor) -> Tensor:
    return 0.5 * data - 0.4


def _statistics(module: nn.Module, found: Identity) -> dict[str, Tensor]:
    roles = found.roles()
    return {role: _get(module, roles[role]).detach().flatten().clone() for role in _START}


def _uses_batch(
    module: nn.Module,
    found: Identity,
    data: Tensor,
    training: bool,  # noqa: FBT001 - one of a row of modes
    gradients: bool,  # noqa: FBT001 - the same
) -> bool:
    try:
        return _step(module, found, data, training=training, gradients=gradients).kind == "batch"
    except Exception:  # noqa: BLE001 - a module may raise anything in training
        return False


def _weight(role: str, step: _Step, new: Tensor) -> float | None:
    """The w for which `after = (1 - w) * before + w * new`, twice; None where there is none."""
    later = _later(new) if role == "mean" else 0.25 * new
    first = _moved(_START[role] + 0 * new, step.after[role], new)
    second = _moved(step.after[role], step.later[role], later)
    same = first is not None and second is not None and math.isclose(first, second, rel_tol=1e-8)
    return first if same else None


def _moved(before: Tensor, after: Tensor, new: Tensor) -> float | None:
    change, whole = after - before, new - before
    weight = float((change * whole).sum() / (whole * whole).sum().clamp_min(1e-300))
    if not 0 <= weight <= 1 or not _same(change, weight * whole):
        return None
    return float(f"{weight:.9g}")
