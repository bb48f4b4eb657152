"""Several processes that calibrate one model: moments are merged before anything uses them.

Each process runs its own batches. The processes meet at every norm layer: each says where it is,
and then the moments of all are merged, so that a layer normalises with those of the global batch.
A process without a batch, or whose forward is over, goes on meeting the others with nothing to
add. Whoever fails says so, and all stop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

import torch
from torch import Tensor
from torch import distributed as dist

from bntools.errors import DistributedError
from bntools.moments import Moments

__all__ = ["Exchange", "Processes", "exchange", "processes"]


@dataclass(frozen=True)
class Processes:
    """Which process of how many this is; the one of rank 0 writes the result."""

    rank: int = 0
    count: int = 1


@contextmanager
def processes(*, timeout: float = 600.0) -> Iterator[Processes]:
    """Join the processes that `torchrun` started; alone, there is nothing to join.

    Uses nccl where every process of this machine has a CUDA device of its own, else gloo. A process
    that does not answer within `timeout` seconds ends the run. Processes that are joined already
    (`torch.distributed.init_process_group`) stay joined.

    Raises DistributedError.

    Example:
        >>> import bntools
        >>> with bntools.processes() as here:
        ...     print(here)
        Processes(rank=0, count=1)
    """
    if _joined():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield Processes()
        return
    with _told("join the other processes"):
        dist.init_process_group(_backend(), timeout=timedelta(seconds=timeout))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        with suppress(Exception):
            dist.destroy_process_group()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _backend() -> str:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if not torch.cuda.is_available() or torch.cuda.device_count() < local:
        return "gloo"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return "nccl"


@contextmanager
def _told(what: str) -> Iterator[None]:
    """A lost connection or a timeout becomes one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise DistributedError(
            f"Cannot {what}: a process died or did not answer in time ({why})."
            " Nothing is changed. Start all of them again."
        ) from error


def exchange() -> Exchange | None:
    """How this process meets the others; None where it is alone."""
    if not _joined() or dist.get_world_size() == 1:
        return None
    return Exchange()


class _Where(IntEnum):
    """What a process says when all meet."""

    BATCH = 1
    EMPTY = 2
    STOP = 3
    LAYER = 4
    DONE = 5
    VALUE = 6
    FAILED = 7


class Exchange:
    """The meetings of several processes, which all call these methods in one order."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()
        nccl = dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"
        self._names: Sequence[str] = ()

    def name_layers(self, names: Sequence[str]) -> None:
        """The layers by which the processes know each other's place, the same in all."""
        self._names = tuple(names)

    def begin(self, samples: int | None, *, stop: bool = False) -> int | None:
        """Meet before a batch: the samples of all processes, None where nobody has any left.

        `samples` is None for a process that has run out; one without a sample in this global batch
        goes on with 0.
        """
        where = _Where.STOP if stop else _Where.EMPTY if samples is None else _Where.BATCH
        met = self._meet(where, samples or 0)
        places = {place for place, _ in met}
        if _Where.STOP in places or places == {_Where.EMPTY}:
            return None
        return sum(number for _, number in met)

    def merge(self, layer: int, own: Moments) -> Moments:
        """Meet at a layer: the moments of the global batch, the same in all processes."""
        self._at(self._meet(_Where.LAYER, layer))
        return self._merged(own)

    def finish(self, missed: Callable[[int, Moments], None], channels: Sequence[int]) -> None:
        """Meet the others until all are through their forwards; `missed` gets what they saw.

        `channels` are those of each layer.
        """
        while True:
            met = self._meet(_Where.DONE, 0)
            layer = self._at(met)
            if layer is None:
                return
            zeros = torch.zeros(channels[layer], dtype=torch.float64)
            missed(layer, self._merged(Moments(0, zeros, zeros)))

    def agree(self, value: float) -> float:
        """The value that process 0 has."""
        self._meet(_Where.VALUE, 0)
        shared = torch.tensor([value], dtype=torch.float64, device=self._device)
        with _told("agree with the other processes"):
            dist.broadcast(shared, 0)
        return float(shared)

    def fail(self) -> None:
        """Tell the others that this process cannot go on; whoever cannot be told finds out."""
        with suppress(DistributedError):
            self._meet(_Where.FAILED, 0)

    def _meet(self, where: _Where, number: int) -> list[tuple[_Where, int]]:
        own = torch.tensor([where, number], dtype=torch.int64, device=self._device)
        met = [(_Where(place), number) for place, number in self._gathered(own).tolist()]
        failed = [rank for rank, (place, _) in enumerate(met) if place is _Where.FAILED]
        if failed and where is not _Where.FAILED:
            raise DistributedError(
                f"Cannot go on: process {failed[0]} of {self.count} failed, for the reason that it"
                " gives itself. Nothing is changed."
            )
        return met

    def _at(self, met: Sequence[tuple[_Where, int]]) -> int | None:
        """The layer at which processes are; None where all are through."""
        layers = {number: rank for rank, (place, number) in enumerate(met) if place is _Where.LAYER}
        if len(layers) > 1:
            (one, rank), (other, second) = list(layers.items())[:2]
            raise DistributedError(
                f"Cannot merge statistics: process {rank} is at {self._name(one)} and process"
                f" {second} at {self._name(other)}. The model takes another way for other inputs;"
                " use one process."
            )
        return next(iter(layers), None)

    def _name(self, layer: int) -> str:
        return self._names[layer] if layer < len(self._names) else f"layer {layer}"

    def _merged(self, own: Moments) -> Moments:
        count = torch.tensor([own.count], dtype=torch.float64, device=own.mean.device)
        packed = torch.cat([count, own.mean, own.m2]).to(self._device)
        channels = own.mean.numel()
        merged: Moments | None = None
        for row in self._gathered(packed):
            mean, m2 = row[1 : channels + 1], row[channels + 1 :]
            part = Moments(int(row[0]), mean, m2)
            merged = part if merged is None else merged.merge(part)
        return (merged or own).to(own.mean.device)

    def _gathered(self, own: Tensor) -> Tensor:
        rows = [torch.empty_like(own) for _ in range(self.count)]
        with _told("reach the other processes"):
            dist.all_gather(rows, own)
        return torch.stack(rows)
