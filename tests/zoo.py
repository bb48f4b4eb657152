"""Hostile models, at most 20 lines each, and what a plan has to say about their norm layers.

`zoo_folds.py` has what must fold, `zoo_keeps.py` what must be kept. Each model is a function that
the `case` decorator puts into `CASES`.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from randomise import cast, randomise
from torch import nn

from bntools.report import Action, Decision, Reason

__all__ = ["CASES", "IMAGE", "Case", "Net", "Outcome", "case", "either", "fold", "keep", "rand"]

Builder = Callable[[], nn.Module]
CASES: dict[str, Case] = {}


class Net(nn.Module):
    """Named parts, and a forward that is written beside them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


@dataclass(frozen=True)
class Outcome:
    """What a plan may say: fold into these hosts (None: not allowed), or one of the reasons.

    `forward` is the reason why it does not fold forward, where the model is about that.
    """

    hosts: tuple[str, ...] | None = None
    reasons: tuple[Reason, ...] = ()
    forward: Reason | None = None

    def admits(self, decision: Decision) -> bool:
        if decision.action is Action.FOLD:
            return self.hosts is not None and sorted(decision.hosts) == sorted(self.hosts)
        onward = self.forward in (None, decision.forward_reason)
        return onward and decision.reason in self.reasons


def fold(*hosts: str) -> Outcome:
    """The layer folds into exactly these hosts."""
    return Outcome(hosts)


def keep(*reasons: Reason, forward: Reason | None = None) -> Outcome:
    """The layer is kept for this reason, or for one of several that are as true."""
    return Outcome(None, reasons, forward)


def either(*hosts: str, reasons: tuple[Reason, ...] = tuple(Reason)) -> Outcome:
    """Folding and keeping are both right; the numbers have to be."""
    return Outcome(hosts, reasons)


@dataclass(frozen=True)
class Case:
    """One model, its example inputs, and the expected outcome of every norm layer.

    `finish` changes the randomised model in eval mode; `dtype` is the dtype of the inputs;
    `float64` is False where the model itself rounds to another dtype; `needs` names a package.
    """

    name: str
    build: Builder
    expected: Mapping[str, Outcome]
    inputs: Callable[[], Any]
    finish: Callable[[Any], Any] | None = None
    dtype: torch.dtype = torch.float32
    float64: bool = True
    needs: str = ""

    @property
    def available(self) -> bool:
        return not self.needs or importlib.util.find_spec(self.needs) is not None

    def prepare(self) -> nn.Module:
        """A model in eval mode with random statistics; the same numbers on every call."""
        seed = zlib.crc32(self.name.encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            model.eval()
            randomise(model, seed)
            if self.finish is not None:
                self.finish(model)
        return model

    def example(self) -> Any:
        return cast(self.inputs(), self.dtype)


def rand(*shape: int) -> Callable[[], torch.Tensor]:
    """A way to make an input of standard normal numbers, offset so that no mean is zero."""
    random = torch.Generator()

    def draw() -> torch.Tensor:
        return torch.randn(shape, generator=random.manual_seed(7)) + 0.3

    return draw


IMAGE = rand(2, 3, 8, 8)


def case(
    expected: Mapping[str, Outcome], inputs: Callable[[], Any] = IMAGE, **options: Any
) -> Callable[[Builder], Builder]:
    """Put the model that a function builds into the zoo, under the function's name."""

    def add(build: Builder) -> Builder:
        name = build.__name__
        assert name not in CASES, f"two zoo models are called {name}"
        CASES[name] = Case(name, build, expected, inputs, **options)
        return build

    return add
