"""Both networks over all data at once, in lock-step: every forward is paused at each new layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bntools.dataflow.guard import Guard
from bntools.dataflow.operations import operation
from bntools.errors import BNToolsError, FitError
from bntools.examples import Examples, given
from bntools.fitting.lanes import Finished, Lane, Stop
from bntools.fitting.spilling import Held, Spill
from bntools.modules import loose_tensors, named_tensors, preserved

__all__ = ["Budget", "Forward", "Pair", "Stage", "plain_forward", "rows_in", "still"]

Forward = Callable[[nn.Module, Any], Any]
_MOST = 1024
"""Batches at a time: each has two threads."""


@dataclass(frozen=True)
class Budget:
    """How many bytes of activations stay in memory, and where the rest goes."""

    cache_bytes: int
    cache_dir: Path | None = None


@dataclass(eq=False)
class _Side:
    """One network's forward of one batch: the lane, what it holds, and where it stands."""

    lane: Lane
    held: Held
    at: Stop | Finished | None = None


@dataclass(eq=False)
class Pair:
    """One batch in both networks."""

    number: int
    samples: int
    old: _Side
    new: _Side

    @property
    def layer(self) -> str | None:
        """The layer at which the new network stands; None at its end."""
        return self.new.at.layer if isinstance(self.new.at, Stop) else None


@dataclass(eq=False)
class Stage:
    """The two networks, what their lanes stop at, and the budget for what these hold.

    `old` and `new` have the layers at which each network stops, under the same names.
    """

    original: nn.Module
    replaced: nn.Module
    spill: Spill
    forward: Forward | None
    guard: Guard
    pairs: list[Pair] = field(default_factory=list)

    def admit(self, batches: Iterable[Any]) -> Any:
        """Start every batch; the new network runs to its first layer. Returns the first batch."""
        first = None
        for number, batch in enumerate(batches):
            samples = rows_in(batch)
            if samples == 0:
                continue
            if len(self.pairs) == _MOST:
                raise FitError(
                    f"Cannot fit to more than {_MOST} batches: each is held until the end. Give"
                    " larger batches, or fewer samples."
                )
            pair = Pair(
                number,
                samples,
                self._side(self.original, batch),
                self._side(self.replaced, batch),
            )
            first = batch if not self.pairs else first
            self.pairs.append(pair)
            self.go_on(pair)
            self.settle(pair)
        return first

    def go_on(self, pair: Pair) -> None:
        """The new network runs to its next layer."""
        self._advance(pair.new, pair, "the new network")

    def bring(self, pair: Pair) -> tuple[Stop, Stop]:
        """The stops of the new and the old network at the same layer and call, in memory."""
        wanted = pair.new.at
        if not isinstance(wanted, Stop):
            raise FitError("Cannot go on: the forward is over.")
        self.spill.fetch(pair.new.held)
        while True:
            at = pair.old.at
            if isinstance(at, Stop) and (at.layer, at.call) == (wanted.layer, wanted.call):
                self.spill.fetch(pair.old.held)
                return wanted, at
            if isinstance(at, Finished):
                raise FitError(
                    f"Cannot fit {wanted.layer}: the original does not come to the norm there in"
                    f" call {wanted.call + 1} on batch {pair.number}. Skip it with --skip."
                )
            self._advance(pair.old, pair, "the original")

    def finish(self, pair: Pair) -> tuple[Any, Any]:
        """What both networks return."""
        for side, name in ((pair.new, "the new network"), (pair.old, "the original")):
            while not isinstance(side.at, Finished):
                self._advance(side, pair, name)
            self.spill.fetch(side.held)
        if not isinstance(pair.new.at, Finished) or not isinstance(pair.old.at, Finished):
            raise FitError("Cannot go on: a forward is not over.")
        return pair.new.at.value, pair.old.at.value

    def settle(self, pair: Pair) -> None:
        """Put away what exceeds the budget."""
        self.spill.settle(pair.new.held)
        self.spill.settle(pair.old.held)

    def dismiss(self, pair: Pair) -> None:
        """A batch is done with."""
        for side in (pair.new, pair.old):
            side.lane.close()
            side.at = None
            self.spill.forget(side.held)

    def close(self) -> None:
        """End all forwards."""
        while self.pairs:
            self.dismiss(self.pairs.pop())

    def _side(self, model: nn.Module, batch: Any) -> _Side:
        held = Held()

        def run() -> Any:
            return plain_forward(model, batch, self.forward)

        return _Side(Lane(run, self.spill.kernel(held, self._before)), held)

    def _before(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        written = list(operation(function).written(args, kwargs))
        if written:
            self.guard.keep(written)

    def _advance(self, side: _Side, pair: Pair, name: str) -> None:
        self.spill.fetch(side.held)
        side.at = None
        try:
            side.at = side.lane.advance()
        except BNToolsError:
            raise
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise FitError(
                f"Cannot run {name} on batch {pair.number}: {type(error).__name__}: {why}. Give"
                " batches that it accepts."
            ) from error


@contextmanager
def still(
    original: nn.Module, replaced: nn.Module, forward: Forward | None, budget: Budget
) -> Iterator[Stage]:
    """A stage for two networks, of which nothing is changed at the end.

    Both are in eval mode meanwhile. Threads end, files are deleted, and what was written to
    parameters, buffers and attributes is undone, whatever happens.
    """
    models = (original, replaced)
    guard = Guard(
        t for m in models for t in (*(x for *_, x in named_tensors(m)), *loose_tensors(m))
    )
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in models:
            stack.enter_context(preserved(model))
        stack.callback(guard.restore)
        for model in models:
            nn.Module.train(model, False)
        spill = stack.enter_context(Spill(budget.cache_bytes, budget.cache_dir))
        stage = Stage(original, replaced, spill, forward, guard)
        stack.callback(stage.close)
        yield stage


def _examples_of(batch: Any) -> Examples:
    """A batch as arguments: of a tuple or list the first item, as labels follow."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    return given(batch)


def rows_in(batch: Any) -> int:
    """The samples in a batch, by the first tensor in it."""
    return next((t.shape[0] if t.dim() else 1 for t in _leaves(batch)), 1)


def plain_forward(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """A model's output for a batch."""
    if forward is not None:
        return forward(model, batch)
    examples = _examples_of(batch).copied()
    like = next((t for *_, t in named_tensors(model) if t.is_floating_point()), None)
    if like is not None:
        examples = examples.cast(like.dtype, like.device)
    return model(*examples.args, **examples.kwargs)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
