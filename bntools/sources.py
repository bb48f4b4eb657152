"""Where calibration data come from: samples by number, samples one after another, or batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bntools.arrays import ArrayFile
from bntools.errors import DataError
from bntools.imports import one_line
from bntools.preprocessing import ChannelsError, Preprocessing

__all__ = [
    "EXTENSIONS",
    "ArraySource",
    "Fetched",
    "FolderSource",
    "Source",
    "decoded",
    "stacked",
]

EXTENSIONS = {
    ".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
_HIDDEN = (".", "__MACOSX")


@dataclass(frozen=True)
class Fetched:
    """A batch as it was read: None where every sample of it is broken, which `broken` names."""

    images: Any
    labels: Tensor | None = None
    broken: tuple[str, ...] = ()


class Source(Protocol):
    """Samples, each of which has a ticket (its number, or its bytes) until it is read."""

    described: str
    notes: tuple[str, ...]

    @property
    def size(self) -> int | None:
        """How many samples there are; None where only reading them would tell."""

    @property
    def labels(self) -> Tensor | None:
        """The labels of all samples, where they are known without reading."""

    def tickets(self) -> Iterator[Any]:
        """One for each sample, in the order of the source; the same at every call."""

    def read(self, tickets: Sequence[Any], preprocessing: Preprocessing) -> Fetched:
        """Read and prepare some samples. Raises DataError for what is not about one of them."""


# ---- arrays --------------------------------------------------------------------------------------


class ArraySource:
    """Arrays in memory, or mapped into it."""

    def __init__(self, arrays: ArrayFile, preprocessing: Preprocessing) -> None:
        self.images, self.labels = arrays.images, arrays.labels
        self.described = arrays.described
        self.notes: tuple[str, ...] = ()
        self.size: int | None = len(self.images)
        is_image = self.images.ndim == 4 and (
            self.images.is_floating_point() or self.images.dtype == torch.uint8
        )
        if not is_image and preprocessing != Preprocessing():
            shape = "x".join(map(str, self.images.shape))
            raise DataError(
                f"Cannot prepare {self.described} ({preprocessing}): arrays of shape {shape} are"
                " no images. Leave the options for images out."
            )
        self.is_image = is_image

    def tickets(self) -> Iterator[int]:
        """The numbers of the rows."""
        return iter(range(len(self.images)))

    def read(self, tickets: Sequence[int], preprocessing: Preprocessing) -> Fetched:
        """Some rows, prepared together."""
        rows = torch.as_tensor(tickets, dtype=torch.int64)
        images = self.images[rows]
        if images.is_floating_point():
            images = images.float()
        if self.is_image:
            images = preprocessing.batch(images)
        return Fetched(images, None if self.labels is None else self.labels[rows])


# ---- image files ---------------------------------------------------------------------------------


class FolderSource:
    """The images below a folder, in the order of their names.

    Where they lie in two or more folders of their own, these are classes, numbered in the order of
    their names as by torchvision's ImageFolder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _images_below(folder)
        if not self.files:
            hint = f" Its shards are read as {folder}/*.tar." if any(folder.glob("*.tar")) else ""
            raise DataError(
                f"Cannot use the data {folder}: no image is in it or below it"
                f" ({', '.join(sorted(EXTENSIONS))}).{hint}"
            )
        classes = _classes(folder, self.files)
        self.size: int | None = len(self.files)
        self.labels = _labels(folder, self.files, classes)
        below = f" in {len(classes)} class folders" if classes else ""
        self.described = f"{self.size} image{'s' * (self.size > 1)}{below} of {folder}"
        self.notes = _class_notes(classes, self.files, folder)

    def tickets(self) -> Iterator[int]:
        """The numbers of the files."""
        return iter(range(len(self.files)))

    def read(self, tickets: Sequence[int], preprocessing: Preprocessing) -> Fetched:
        """Decode some files."""
        names = [str(self.files[i]) for i in tickets]
        images = [decoded(self.files[i], preprocessing) for i in tickets]
        labels = None if self.labels is None else [int(self.labels[i]) for i in tickets]
        return stacked(names, images, labels)


def decoded(file: Path | IO[bytes], preprocessing: Preprocessing) -> Tensor | str:
    """An image file as a tensor, or in a few words why there is none."""
    try:
        with Image.open(file) as image:
            return preprocessing.image(image)
    except UnidentifiedImageError:
        return "it is no image"
    except (ChannelsError, MemoryError):  # about what was asked for, not about this image
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise anything on a damaged file
        strerror = error.strerror if isinstance(error, OSError) else None
        return strerror.lower() if strerror else one_line(error)


def stacked(
    names: Sequence[str], images: Sequence[Tensor | str], labels: Sequence[int | None] | None
) -> Fetched:
    """The samples that could be read as one batch; the others are in its `broken`."""
    broken = tuple(
        f"{name}: {image}"
        for name, image in zip(names, images, strict=True)
        if isinstance(image, str)
    )
    good = [i for i, image in enumerate(images) if isinstance(image, Tensor)]
    kept = [image for image in images if isinstance(image, Tensor)]
    if not kept:
        return Fetched(None, None, broken)
    for i, image in zip(good, kept, strict=True):
        if image.shape != kept[0].shape:
            raise DataError(
                f"Cannot make a batch of {names[good[0]]} ({_shape(kept[0])}) and {names[i]}"
                f" ({_shape(image)}): a batch has one size. Give --size (in Python"
                " Preprocessing(size=...)) or --batch-size 1."
            )
    chosen = [label for i in good if labels and (label := labels[i]) is not None]
    if chosen and len(chosen) < len(kept):
        raise DataError(f"Cannot use the labels: {names[good[0]]} or one near it has none.")
    return Fetched(torch.stack(kept), torch.tensor(chosen) if chosen else None, broken)


def _shape(image: Tensor) -> str:
    return "x".join(map(str, image.shape))


def _images_below(folder: Path) -> list[Path]:
    try:
        found = sorted(folder.rglob("*"))
    except OSError as error:
        raise DataError(f"Cannot read the data {folder}: {error.strerror}.") from error
    return [
        path
        for path in found
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(_HIDDEN) for part in path.relative_to(folder).parts)
        and path.is_file()
    ]


def _classes(folder: Path, files: Sequence[Path]) -> list[str]:
    """The folders that are classes, empty ones too: they keep their number."""
    if any(len(file.relative_to(folder).parts) == 1 for file in files):
        return []
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(_HIDDEN)
    )
    return names if len(names) > 1 else []


def _labels(folder: Path, files: Sequence[Path], classes: Sequence[str]) -> Tensor | None:
    if not classes:
        return None
    numbers = {name: i for i, name in enumerate(classes)}
    return torch.tensor([numbers[file.relative_to(folder).parts[0]] for file in files])


def _class_notes(classes: list[str], files: Sequence[Path], folder: Path) -> tuple[str, ...]:
    notes = []
    other = next(
        (f"{n} is {i}" for i, n in enumerate(classes) if n.isdecimal() and int(n) != i), ""
    )
    if other:
        notes.append(
            "the classes are numbered in the order of the folders' names, as by torchvision's"
            f" ImageFolder: {other}"
        )
    used = {file.relative_to(folder).parts[0] for file in files}
    if empty := [name for name in classes if name not in used]:
        notes.append(f"{len(empty)} class folders have no image, such as {empty[0]}")
    return tuple(notes)
