"""Calibration and evaluation data as batches that can be run through again and again."""

from __future__ import annotations

import math
import os
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import torch
from torch import Tensor

from bntools.arrays import read_arrays
from bntools.datasets import BatchSource, from_function, torchvision_dataset
from bntools.errors import DataError
from bntools.preprocessing import Preprocessing
from bntools.shards import ShardSource, is_shards
from bntools.sources import ArraySource, Fetched, FolderSource, Source

__all__ = ["Data", "read_data"]

Batch = Any
T = TypeVar("T")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_TORCHVISION = "torchvision:"
_BUFFER = 1000


@dataclass(frozen=True)
class _Cut:
    """Which samples, in which order, in batches of which size; `rank` of `world` gets its share."""

    batch_size: int
    max_samples: int | None
    shuffle: bool | None
    seed: int
    rank: int = 0
    world: int = 1

    def share(self, count: int) -> tuple[int, int]:
        """The first and the last but one of `count` samples that are this rank's."""
        low, high = (count * (self.rank + i) // self.world for i in (0, 1))
        return low, high


@dataclass(eq=False)
class Data:
    """Batches of a source; every iteration gives the same samples in the same order.

    A batch is a tensor (N, ...), or a pair of it and the labels (N,) where labels are known; a
    function of the user's decides that itself. `samples` is how many there are, None where only
    reading would tell; `described` says what and from where; `notes` is what the user should know;
    `broken` names what was skipped so far.
    """

    source: Source | BatchSource
    cut: _Cut
    preprocessing: Preprocessing
    workers: int = 0
    skip_broken: bool = False
    broken: dict[str, None] = field(default_factory=dict)

    @property
    def samples(self) -> int | None:
        """How many samples an iteration has, over all shards and with the broken ones."""
        size = None if isinstance(self.source, BatchSource) else self.source.size
        return size if size is None else min(size, self.cut.max_samples or size)

    @property
    def batch_size(self) -> int:
        """The samples of a global batch."""
        return self.cut.batch_size

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return self.source.notes

    @property
    def described(self) -> str:
        """What the data are, in a few words."""
        parts = [self.source.described, str(self.preprocessing)]
        if self.cut.max_samples is not None:
            count = "up to " if self.samples is None else ""
            parts.append(f"{count}{self.samples or self.cut.max_samples} of them")
        if self._is_shuffled():
            parts.append(f"shuffled with seed {self.cut.seed}")
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        return self.described

    def __len__(self) -> int:
        if self.samples is None:
            raise TypeError(f"{self.source.described}: only reading them tells how many there are")
        return math.ceil(self.samples / self.cut.batch_size)

    def shard(self, rank: int, world: int) -> Data:
        """What process `rank` of `world` takes of each batch: the same number, or one less.

        All shards have the same number of batches; a part may be empty, of shape (0, ...).
        """
        return replace(self, cut=replace(self.cut, rank=rank, world=world))

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.source, BatchSource):
            return self._given(self.source)
        return self._read(self.source)

    def _given(self, source: BatchSource) -> Iterator[Batch]:
        left = self.cut.max_samples
        for batch in source.batches():
            count = _count(batch, source.described)
            taken = count if left is None else min(count, left)
            low, high = self.cut.share(taken)
            yield batch if (low, high) == (0, count) else _sliced(batch, low, high)
            if left is not None:
                left -= taken
                if not left:
                    return

    def _read(self, source: Source) -> Iterator[Batch]:
        def fetch(tickets: list[Any]) -> Fetched:
            low, high = self.cut.share(len(tickets))
            fetched = source.read(tickets[low:high], self.preprocessing)
            if fetched.images is None and self.cut.world > 1:
                return replace(_nothing(source, tickets, self.preprocessing), broken=fetched.broken)
            return fetched

        for fetched in _ahead(self._whole(source), fetch, self.workers):
            if fetched.broken:
                self._note_broken(fetched.broken)
            if fetched.images is not None:
                yield (
                    fetched.images if fetched.labels is None else (fetched.images, fetched.labels)
                )

    def _whole(self, source: Source) -> Iterator[list[Any]]:
        """The tickets of each global batch."""
        ordered = islice(self._ordered(source), self.cut.max_samples)
        while batch := list(islice(ordered, self.cut.batch_size)):
            yield batch

    def _ordered(self, source: Source) -> Iterable[Any]:
        if not self._is_shuffled():
            return source.tickets()
        if source.size is None:
            return _shuffled(source.tickets(), self.cut.seed)
        generator = torch.Generator().manual_seed(self.cut.seed)
        order: list[int] = torch.randperm(source.size, generator=generator).tolist()
        return order

    def _is_shuffled(self) -> bool:
        if isinstance(self.source, BatchSource):
            return False
        if self.cut.shuffle is None:
            return _is_sorted(self.source.labels)
        return self.cut.shuffle

    def _note_broken(self, broken: tuple[str, ...]) -> None:
        if not self.skip_broken:
            raise DataError(
                f"Cannot read {broken[0].rstrip('.')}. Take it out, or leave out what is broken"
                " with --skip-broken (in Python skip_broken=True)."
            )
        self.broken.update(dict.fromkeys(broken))


def read_data(
    source: str | os.PathLike[str],
    *,
    batch_size: int = 32,
    max_samples: int | None = None,
    shuffle: bool | None = None,
    seed: int = 0,
    workers: int = 0,
    preprocessing: Preprocessing | None = None,
    skip_broken: bool = False,
) -> Data:
    """Data for calibration or evaluation, read batch by batch at every iteration.

    `source` is a folder of images, class folders giving labels; arrays in `.npz`, `.npy`, `.pt` or
    `.safetensors` ("file.npz?images=x_test&labels=y_test"); `.tar` shards ("train-{000..009}.tar");
    "torchvision:FashionMNIST?root=DIR&split=train"; or "package.module:function", which returns
    batches, or a torch Dataset of samples. Nothing in a file is run, and nothing is downloaded.

    Images become float32 (N, C, H, W) in [0, 1], and are then prepared as `preprocessing` says;
    other arrays are what the model takes. `shuffle=None` draws at random, by `seed`, what is sorted
    by class. `workers` threads read ahead. With `skip_broken`, images that cannot be read are left
    out and named in `.broken`; otherwise the first is an error.

    Raises DataError, at once or on iteration.

    Example:
        >>> import tempfile, numpy, bntools
        >>> from pathlib import Path
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "few.npz"
        >>> numpy.savez(path, images=numpy.zeros((5, 8, 8), "uint8"), labels=numpy.arange(5)[::-1])
        >>> data = bntools.read_data(path, batch_size=4)
        >>> [tuple(images.shape) for images, labels in data]
        [(4, 1, 8, 8), (1, 1, 8, 8)]
        >>> folder.cleanup()
    """
    if batch_size < 1 or (max_samples is not None and max_samples < 1) or workers < 0:
        raise DataError("Cannot read data: batch_size and max_samples are 1 or more, workers 0.")
    prepared = preprocessing or Preprocessing()
    opened = _opened(str(source), prepared)
    if isinstance(opened, BatchSource) and (shuffle or skip_broken):
        raise DataError(
            f"Cannot shuffle or check the {opened.described}: they are taken as they are. Do it"
            " there, or return a torch Dataset of samples."
        )
    return Data(
        opened, _Cut(batch_size, max_samples, shuffle, seed), prepared, workers, skip_broken
    )


# ---- sources by their names ----------------------------------------------------------------------


def _opened(source: str, preprocessing: Preprocessing) -> Source | BatchSource:
    name, options = _located(source)
    path = Path(name)
    if name and os.path.isdir(path):
        return FolderSource(path)
    if is_shards(name):
        return ShardSource(name)
    if os.path.isfile(path):
        arrays = read_arrays(path, options.pop("images", None), options.pop("labels", None))
        if options:
            raise DataError(
                f"Cannot read the data {source}: a file has the options images and labels, and"
                f" not {next(iter(options))!r}."
            )
        return ArraySource(arrays, preprocessing)
    if name.startswith(_TORCHVISION):
        return torchvision_dataset(name.removeprefix(_TORCHVISION), options)
    if _FUNCTION.fullmatch(name) and not options:
        module, _, function = name.partition(":")
        return from_function(module, function, preprocessing)
    raise DataError(f"Cannot read the data {source}: there is no such file or folder.")


def _located(source: str) -> tuple[str, dict[str, str]]:
    """The name and the options behind it; a file whose own name has a "?" is found first."""
    if os.path.exists(source):
        return source, {}
    name, _, query = source.partition("?")
    return name, dict(parse_qsl(query, keep_blank_values=True))


# ---- orders and batches --------------------------------------------------------------------------


def _is_sorted(labels: Tensor | None) -> bool:
    """Whether the samples come class by class, which makes a batch a bad sample of the whole."""
    if labels is None or labels.ndim != 1 or len(labels) < 2:
        return False
    return bool((labels[1:] >= labels[:-1]).all()) and bool(labels[0] != labels[-1])


def _shuffled(items: Iterator[T], seed: int) -> Iterator[T]:
    """A stream in random order, as far as a buffer reaches."""
    draw = random.Random(seed)  # noqa: S311 - an order, no secret
    buffer = list(islice(items, _BUFFER))
    for item in items:
        place = draw.randrange(_BUFFER)
        buffer[place], item = item, buffer[place]  # noqa: PLW2901 - the one that leaves
        yield item
    draw.shuffle(buffer)
    yield from buffer


def _nothing(source: Source, tickets: Sequence[Any], preprocessing: Preprocessing) -> Fetched:
    """An empty batch of the shape that the others have; nothing where all are broken."""
    for ticket in tickets:
        found = source.read([ticket], preprocessing)
        if found.images is not None:
            return Fetched(found.images[:0], None if found.labels is None else found.labels[:0])
    return Fetched(None)


def _count(batch: Batch, described: str) -> int:
    first = next(_tensors(batch), None)
    if first is None or not first.ndim:
        raise DataError(
            f"Cannot use the {described}: a batch is a {type(batch).__name__} without a tensor"
            " whose first axis counts samples."
        )
    return len(first)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from chain.from_iterable(map(_tensors, batch.values()))
    elif isinstance(batch, (list, tuple)):
        yield from chain.from_iterable(map(_tensors, batch))


def _sliced(batch: Batch, low: int, high: int) -> Batch:
    if isinstance(batch, Tensor):
        return batch[low:high] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _sliced(value, low, high) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_sliced(value, low, high) for value in batch)
    return batch


def _ahead(
    tickets: Iterator[list[Any]], read: Callable[[list[Any]], Fetched], workers: int
) -> Iterator[Fetched]:
    """Read batches in their order; threads read ahead, as many batches as there are threads."""
    if not workers:
        yield from map(read, tickets)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="bntools-data")
    waiting: deque[Future[Fetched]] = deque()
    try:
        for ticket in tickets:
            waiting.append(pool.submit(read, ticket))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
