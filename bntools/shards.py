"""WebDataset shards: tar files with an image, and mostly a class, for every key."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from bntools.errors import DataError
from bntools.imports import one_line
from bntools.preprocessing import Preprocessing
from bntools.sources import EXTENSIONS, Fetched, decoded, stacked

__all__ = ["ShardSource", "is_shards"]

_ENDINGS = (".tar", ".tar.gz", ".tgz")


def is_shards(source: str) -> bool:
    """Whether a source is tar files: one, or a pattern such as train-{000..009}.tar or *.tar."""
    return source.endswith(_ENDINGS)


class ShardSource:
    """Local tar shards in the order of their names, read as a stream."""

    def __init__(self, pattern: str) -> None:
        self.files = _files(pattern)
        count = len(self.files)
        self.described = f"{pattern}{f' ({count} shards)' if count > 1 else ''}"
        self.notes: tuple[str, ...] = ()
        self.size: int | None = None
        self.labels: Tensor | None = None
        self._library = _webdataset()

    def tickets(self) -> Iterator[dict[str, Any]]:
        """Every sample as its bytes by extension."""
        found = False
        for file in self.files:
            for sample in self._samples(file):
                found = True
                yield sample
        if not found:
            raise DataError(f"Cannot use the data {self.described}: there is no sample in it.")

    def _samples(self, file: Path) -> Iterator[dict[str, Any]]:
        # Not `WebDataset(files)`: it leaves files open when the reader stops early.
        unpack, group = self._library.tariterators.tar_file_expander, self._library.tariterators
        with file.open("rb") as stream:
            samples = iter(group.group_by_keys(unpack([{"url": str(file), "stream": stream}])))
            while True:
                try:
                    sample = next(samples)
                except StopIteration:
                    return
                except Exception as error:
                    problem = one_line(error).partition(" @ ")[0]
                    raise DataError(f"Cannot read the data {file}: {problem}.") from error
                yield sample

    def read(self, tickets: Sequence[dict[str, Any]], preprocessing: Preprocessing) -> Fetched:
        """Decode some samples."""
        names = [f"{sample['__key__']} in {sample['__url__']}" for sample in tickets]
        images = [_decoded(sample, preprocessing) for sample in tickets]
        labels = [_label(sample, name) for name, sample in zip(names, tickets, strict=True)]
        return stacked(names, images, labels)


def _decoded(sample: dict[str, Any], preprocessing: Preprocessing) -> Tensor | str:
    for key, value in sample.items():
        if f".{key.rpartition('.')[2]}" in EXTENSIONS:
            return decoded(BytesIO(value), preprocessing)
    return f"it has no image, only {', '.join(key for key in sample if key[0] != '_')}"


def _label(sample: dict[str, Any], name: str) -> int | None:
    if "cls" not in sample:
        return None
    try:
        return int(sample["cls"])
    except ValueError:
        raise DataError(
            f"Cannot use the class of {name}: {sample['cls'][:20]!r} is no number."
        ) from None


def _files(pattern: str) -> list[Path]:
    parts = map(Path, _webdataset().shardlists.expand_urls(pattern))
    files = [file for part in parts for file in (sorted(part.parent.glob(part.name)) or [part])]
    for file in files:
        if not file.is_file():
            raise DataError(f"Cannot read the data {pattern}: there is no file {file}.")
    return files


def _webdataset() -> Any:
    try:
        return importlib.import_module("webdataset")
    except ImportError as error:
        raise DataError(
            f"Cannot read tar shards: {one_line(error)}. Install it with: pip install webdataset"
        ) from error
