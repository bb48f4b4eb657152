"""Datasets of torchvision, and what a function of the user gives."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from bntools.arrays import as_labels
from bntools.errors import DataError
from bntools.imports import import_object, one_line, quiet, working_folder_first
from bntools.preprocessing import Preprocessing
from bntools.sources import Fetched, Source, stacked

__all__ = ["BatchSource", "DatasetSource", "from_function", "torchvision_dataset"]


class DatasetSource:
    """A dataset that is asked for its samples by number: an image, or a tuple that begins with it.

    A second element that is a number is its label.
    """

    def __init__(self, dataset: Any, described: str) -> None:
        self.dataset = dataset
        self.notes: tuple[str, ...] = ()
        self.size: int | None = len(dataset)
        if not self.size:
            raise DataError(f"Cannot use the data {described}: there is no sample.")
        self.described = f"{self.size} samples of {described}"
        self.labels = _all_labels(dataset, self.size)
        self.name = described
        self._one_at_a_time = Lock()

    def tickets(self) -> Iterator[int]:
        """The numbers of the samples."""
        return iter(range(self.size or 0))

    def read(self, tickets: Sequence[int], preprocessing: Preprocessing) -> Fetched:
        """Ask the dataset for some samples."""
        samples = [self._sample(i, preprocessing) for i in tickets]
        names = [f"sample {i} of {self.name}" for i in tickets]
        return stacked(names, [image for image, _ in samples], [label for _, label in samples])

    def _sample(self, i: int, preprocessing: Preprocessing) -> tuple[Tensor | str, int | None]:
        try:
            with self._one_at_a_time:  # many datasets keep a file, or use the random state
                image, label = _parts(self.dataset[i])
            return _prepared(image, preprocessing), label
        except MemoryError:  # about what was asked for, not about this sample
            raise
        except Exception as error:  # noqa: BLE001 - datasets raise anything
            return one_line(error), None


def _parts(sample: Any) -> tuple[Any, Any]:
    if not isinstance(sample, (tuple, list)):
        return sample, None
    label = sample[1] if len(sample) > 1 else None
    number = isinstance(label, (int, np.integer)) or (isinstance(label, Tensor) and not label.ndim)
    return sample[0], int(label) if number and label is not None else None


def _prepared(image: Any, preprocessing: Preprocessing) -> Tensor:
    if isinstance(image, Image.Image):
        return preprocessing.image(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
    if not isinstance(image, Tensor):
        raise DataError(f"it begins with a {type(image).__name__}, which is no image and no tensor")
    if image.ndim == 3 and (image.is_floating_point() or image.dtype == torch.uint8):
        return preprocessing.batch(image.unsqueeze(0))[0]
    if preprocessing != Preprocessing():
        raise DataError("it is no image: leave the options for images out")
    return image


def _all_labels(dataset: Any, size: int) -> Tensor | None:
    for name in ("targets", "labels"):
        found = getattr(dataset, name, None)
        if isinstance(found, (list, tuple, np.ndarray, Tensor)):
            try:
                return as_labels(np.asarray(found), size)
            except Exception:  # noqa: BLE001 - not labels of the usual kind
                return None
    return None


# ---- torchvision ---------------------------------------------------------------------------------


def torchvision_dataset(name: str, options: dict[str, str]) -> DatasetSource:
    """The dataset `torchvision.datasets.NAME`; it is downloaded only with the option download=true.

    An option "split" becomes the argument `train` where the dataset has that one.
    """
    asked = f"torchvision:{name}"
    datasets: Any = importlib.import_module("torchvision.datasets")
    cls = getattr(datasets, name, None) if name in datasets.__all__ else None
    if cls is None:
        near = difflib.get_close_matches(name, datasets.__all__, n=3)
        hint = f"; near are {', '.join(near)}" if near else ""
        raise DataError(f"Cannot use the data {asked}: torchvision has no such dataset{hint}.")
    arguments = _arguments(cls, options, asked)
    try:
        with quiet():
            dataset = cls(**arguments)
    except Exception as error:
        problem = one_line(error).rstrip(".")
        if "download" in problem:
            problem = "it is not there. Name its folder with root=DIR, or add download=true"
        raise DataError(f"Cannot use the data {asked}: {problem}.") from error
    listed = "&".join(f"{key}={value}" for key, value in options.items())
    return DatasetSource(dataset, f"{asked}?{listed}" if listed else asked)


def _arguments(cls: Any, options: dict[str, str], asked: str) -> dict[str, Any]:
    known = inspect.signature(cls).parameters
    given: dict[str, Any] = {key: _value(text) for key, text in options.items()}
    if "split" in given and "split" not in known and "train" in known:
        given["train"] = given.pop("split") == "train"
    for key in given:
        if key not in known:
            raise DataError(
                f"Cannot use the data {asked}: it has no option {key!r}, only {', '.join(known)}."
            )
    if "root" in known and "root" not in given and known["root"].default is inspect.Parameter.empty:
        raise DataError(f"Cannot use the data {asked}: say where it is, with {asked}?root=DIR.")
    return given


def _value(text: str) -> Any:
    """An option's value: true, false, a whole number, several of them, or a text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    parts = text.split(",")
    if all(part.isdecimal() for part in parts):
        numbers = tuple(map(int, parts))
        return numbers if len(numbers) > 1 else numbers[0]
    return text


# ---- functions of the user -----------------------------------------------------------------------


class BatchSource:
    """What a function gives: batches as the model takes them. It is called for every iteration."""

    def __init__(self, function: Any, described: str, first: Any) -> None:
        self.function = function
        self.described = f"batches of {described}"
        self.notes: tuple[str, ...] = ()
        self.name = described
        self._first: Any = first

    def batches(self) -> Iterator[Any]:
        """The batches of a fresh call."""
        found, self._first = self._first, None
        if found is None or isinstance(found, Iterator):
            found = found if found is not None else _called(self.function, self.name)
        yield from found


def from_function(module: str, name: str, preprocessing: Preprocessing) -> Source | BatchSource:
    """What `module:name()` returns: a Dataset of samples, or an iterable of batches."""
    described = f"{module}:{name}"
    function = import_object(module, name, what=f"use the data {described}")
    found = _called(function, described) if callable(function) else function
    if isinstance(found, Dataset) and not isinstance(found, IterableDataset):
        return DatasetSource(found, described)
    if isinstance(found, (Tensor, str, bytes, dict)) or not isinstance(found, Iterable):
        raise DataError(
            f"Cannot use the data {described}: it gives a {type(found).__name__}, and not batches."
            " Return an iterable of tensors or of pairs (inputs, labels)."
        )
    if preprocessing != Preprocessing():
        raise DataError(
            f"Cannot prepare the data {described} ({preprocessing}): its batches are taken as they"
            " are. Prepare them there, or return a torch Dataset of images."
        )
    return BatchSource(function if callable(function) else lambda: found, described, found)


def _called(function: Any, described: str) -> Any:
    try:
        with working_folder_first():
            return function()
    except Exception as error:
        raise DataError(
            f"Cannot use the data {described}: it raised {type(error).__name__}: {one_line(error)}."
        ) from error
