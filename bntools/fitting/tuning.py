"""Gradient steps on a few parameters: relative to their size, seeded, the best kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bntools.errors import FitError

__all__ = ["Schedule", "Tuned", "given_parameters", "tuned"]

_LIKE = {"bias": "weight"}
_LEAST = 0.05
"""Of the median size, what a value near zero moves in units of."""

Named = Mapping[tuple[nn.Module, str], Tensor]
"""Parameters by their owner and name."""
Loss = Callable[[int], Tensor]
"""The loss on a batch, by its number."""


@dataclass(frozen=True)
class Schedule:
    """How many steps, how large at first (relative to the parameters), and by which seed."""

    steps: int
    rate: float
    seed: int
    tell: Callable[[int], None]
    """Is told the number of steps done."""


@dataclass(frozen=True, eq=False)
class Tuned:
    """The best parameters that were found, and the mean loss with those before and with these."""

    values: Named
    before: float
    after: float


def tuned(
    parameters: Named, loss: Loss, training: Sequence[int], judging: Sequence[int], how: Schedule
) -> Tuned:
    """Minimise a loss over batches by Adam, with a warm-up and a cosine, and keep the best.

    Every value moves in units of its own size, a bias in those of its weight, so that one rate
    suits all: v is in the thousands where an input is small. Batches come in an order drawn by the
    seed; `judging` are those on which the best is found.
    """
    start = {key: value.detach().clone() for key, value in parameters.items()}
    units = {
        (m, name): _unit(start.get((m, _LIKE.get(name, name)), v)) for (m, name), v in start.items()
    }
    moves = {key: torch.zeros_like(value, requires_grad=True) for key, value in start.items()}
    optimiser = torch.optim.Adam(list(moves.values()), lr=how.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _pace(step / how.steps))

    def current() -> dict[tuple[nn.Module, str], Tensor]:
        return {key: start[key] + units[key] * moves[key] for key in start}

    best = before = _mean_loss(start, loss, judging)
    kept: Named = start
    order = _endless(training, how.seed)
    every = max(1, how.steps // 4)
    for step in range(1, how.steps + 1):
        optimiser.zero_grad()
        with torch.enable_grad(), given_parameters(current()):
            loss(next(order)).backward()  # type: ignore[no-untyped-call] # torch has no types there
        optimiser.step()
        schedule.step()
        how.tell(step)
        if step % every == 0 or step == how.steps:
            with torch.no_grad():
                found = current()
            now = _mean_loss(found, loss, judging)
            if now < best:
                best, kept = now, found
    return Tuned(kept, before, best)


@contextmanager
def given_parameters(values: Named) -> Iterator[None]:
    """Modules have other tensors in the place of parameters inside."""
    before = {(module, name): module._parameters[name] for module, name in values}
    try:
        for (module, name), tensor in values.items():
            module._parameters[name] = tensor  # type: ignore[assignment] # a result has a gradient
        yield
    finally:
        for (module, name), parameter in before.items():
            module._parameters[name] = parameter


def _mean_loss(values: Named, loss: Loss, batches: Sequence[int]) -> float:
    with torch.no_grad(), given_parameters(values):
        mean = sum(float(loss(number)) for number in batches) / len(batches)
    if not math.isfinite(mean) and values:
        return math.inf
    return mean


def _pace(done: float) -> float:
    """Up to the full step size in the first tenth, and down to zero along a cosine."""
    return min(1.0, 0.1 + 9 * done) * 0.5 * (1 + math.cos(math.pi * done))


def _unit(values: Tensor) -> Tensor:
    size = values.abs()
    least = _LEAST * size.median()
    return torch.where(size + least > 0, size + least, 1.0)


def _endless(batches: Sequence[int], seed: int) -> Iterator[int]:
    if not batches:
        raise FitError("Cannot distill on no samples: the batches are empty.")
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(batches), generator=generator, device="cpu").tolist():
            yield batches[index]
