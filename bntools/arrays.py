"""Images and labels in a file of arrays (.npy, .npz, .pt, .safetensors), which is never run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bntools.archives import holds_arrays, is_archive
from bntools.errors import DataError
from bntools.imports import one_line
from bntools.trust import Refusal, TensorsOnly
from bntools.unpickling import refused, unpickle

__all__ = ["ArrayFile", "as_images", "as_labels", "read_arrays"]

_IMAGES = ("images", "image", "x", "inputs", "input", "data", "pixel_values", "arr_0")
_LABELS = ("labels", "label", "y", "targets", "target", "classes")
_PARTS = ("train", "test", "val", "valid", "validation")
_SAVE = "Save it with numpy.savez(path, images=x, labels=y)"


@dataclass(frozen=True)
class ArrayFile:
    """The arrays of a file that count as images and labels, and how they are called there."""

    images: Tensor
    labels: Tensor | None
    described: str


def read_arrays(file: Path, images: str | None = None, labels: str | None = None) -> ArrayFile:
    """Read the arrays by their names in the file, or guess which are meant.

    The first axis counts samples. Bytes are images (N, H, W), (N, H, W, C) or (N, C, H, W) and
    become (N, C, H, W); anything else is what the model takes. Labels "" means none.

    Raises DataError.
    """
    with _explained(file), _opened(file) as arrays:
        pixels, classes = _chosen(list(arrays), images, labels)
        read = as_images(arrays[pixels])
        known = None if classes is None else as_labels(arrays[classes], len(read), classes)
    named = "" if pixels == _ONLY else f" ({pixels}{f' with {classes}' if classes else ''})"
    return ArrayFile(read, known, f"{len(read)} samples of {file}{named}")


def as_images(values: Any) -> Tensor:
    """An array as a batch of inputs: bytes as (N, C, H, W), anything else as it is."""
    tensor = values.detach() if isinstance(values, Tensor) else _tensor(values)
    shape = "x".join(map(str, tensor.shape)) or "a single number"
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise _UnfitError(f"its array of shape {shape} has no samples: the first axis counts them")
    if tensor.dtype == torch.uint8:
        return _channels_first(tensor, shape)
    if tensor.dtype == torch.bool or tensor.is_complex() or tensor.is_quantized:
        raise _UnfitError(
            f"its array is {_typed(tensor)}: a model takes floats, bytes or whole numbers"
        )
    return tensor


def as_labels(values: Any, samples: int, name: str = "labels") -> Tensor:
    """Labels as a tensor with one entry for each sample; whole numbers as int64."""
    tensor = values.detach() if isinstance(values, Tensor) else _tensor(values)
    count = len(tensor) if tensor.ndim else 0
    if count != samples:
        raise _UnfitError(f"its labels {name} are {count}, and its samples {samples}")
    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.long()


class _UnfitError(Exception):
    """What is wrong with an array; the message has no file in it yet."""


# ---- which arrays --------------------------------------------------------------------------------

_ONLY, _SECOND = "(the array)", "(the second)"


def _chosen(names: list[str], images: str | None, labels: str | None) -> tuple[str, str | None]:
    for wanted in (images, labels):
        if wanted and wanted not in names:
            raise _UnfitError(f"it has no array {wanted!r}, only {_some(names)}")
    pixels = images or _guessed(names)
    if labels is not None:
        return pixels, labels or None
    partners = _partners(pixels, names)
    return pixels, partners[0] if partners else None


def _guessed(names: list[str]) -> str:
    if len(names) == 1 or names[0] == _ONLY:
        return names[0]
    known = [name for name in names if _is_images(name)]
    if len(known) == 1:
        return known[0]
    pixels = (known or names)[0]
    labels = _partners(pixels, names)
    raise _UnfitError(
        f"it has the arrays {_some(names)}: say which behind the name, such as"
        f" ?images={pixels}{f'&labels={labels[0]}' if labels else ''}"
    )


def _split(name: str) -> tuple[str, str]:
    """A name without its part of the data, and that part: of "x_train" and "train_x" x, train."""
    words = re.split(r"[_.]", name.lower())
    if len(words) > 1 and words[-1] in _PARTS:
        return "_".join(words[:-1]), words[-1]
    if len(words) > 1 and words[0] in _PARTS:
        return "_".join(words[1:]), words[0]
    return name.lower(), ""


def _is_images(name: str) -> bool:
    return _split(name)[0] in _IMAGES


def _partners(pixels: str, names: list[str]) -> list[str]:
    """Which arrays are labels of the same part of the data, the likeliest first."""
    if pixels in _BESIDE:
        return [name for name in names if name == _BESIDE[pixels]]
    found = [(_split(name), name) for name in names if name != pixels]
    part = _split(pixels)[1]
    return [
        name for label in _LABELS for (word, own), name in found if (word, own) == (label, part)
    ]


_BESIDE = {"arr_0": "arr_1", _ONLY: _SECOND}


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


# ---- shapes and types ----------------------------------------------------------------------------


def _channels_first(images: Tensor, shape: str) -> Tensor:
    if images.ndim == 3:
        return images.unsqueeze(1)
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images.permute(0, 3, 1, 2)
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    raise _UnfitError(
        f"its bytes of shape {shape} are no images: these are (N, H, W), (N, H, W, C) or"
        " (N, C, H, W) with 1 or 3 channels. Give floats, as the model takes them"
    )


def _tensor(array: Any) -> Tensor:
    array = np.asarray(array)
    if array.dtype == np.uint16:
        raise _UnfitError(
            "its array is uint16, of unknown range. Give floats, as the model takes them"
        )
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise _UnfitError(f"its array is {array.dtype}, which torch does not have") from error


def _typed(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Whatever goes wrong in reading becomes a DataError of one line."""
    try:
        yield
    except _UnfitError as error:
        raise DataError(f"Cannot use the data {file}: {error}.") from error.__cause__
    except Refusal as error:
        raise DataError(f"Cannot read the data {file}: {refused(error)}. {_SAVE}.") from None
    except OSError as error:
        reason = (error.strerror or one_line(error)).lower()
        raise DataError(f"Cannot read the data {file}: {reason}.") from error
    except MemoryError as error:
        raise DataError(
            f"Cannot read the data {file}: it needs more memory than there is."
        ) from error
    except Exception as error:
        raise DataError(f"Cannot read the data {file}: {_problem(error)}. {_SAVE}.") from error


def _problem(error: Exception) -> str:
    if "Object arrays" in str(error):
        return "it holds Python objects, which are not read"
    return "it is neither arrays (.npz, .npy, .safetensors) nor tensors of torch.save, or damaged"


@contextmanager
def _opened(file: Path) -> Iterator[Mapping[str, Any]]:
    """The arrays of a file by their names, read as they are asked for where the format can."""
    with file.open("rb") as stream:
        head = stream.read(9)
    if not head:
        raise _UnfitError("it is empty")
    if head.startswith(b"\x93NUMPY"):
        # "c": on the disk nothing changes, and torch does not warn of memory that is read-only
        yield {_ONLY: np.load(file, mmap_mode="c", allow_pickle=False)}
    elif is_archive(head) and _is_npz(file):
        with np.load(file, allow_pickle=False) as arrays:
            yield _Lazy(list(arrays.files), arrays.__getitem__)
    elif head[8:9] == b"{":
        with _safetensors(file) as tensors:
            yield _Lazy(list(tensors.keys()), tensors.get_tensor)
    else:
        with file.open("rb") as stream:
            content, _ = unpickle(stream, TensorsOnly())
        yield _named(content)


class _Lazy(Mapping[str, Any]):
    """Arrays by name, of which none is read before it is asked for."""

    def __init__(self, names: list[str], read: Any) -> None:
        self.names, self.read = names, read

    def __getitem__(self, name: str) -> Any:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _is_npz(file: Path) -> bool:
    with file.open("rb") as stream:
        return holds_arrays(stream)


@contextmanager
def _safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise _UnfitError(f"it is a damaged safetensors file ({one_line(error)})") from error


def _named(content: Any) -> Mapping[str, Any]:
    """What torch.save wrote: a tensor, a pair of images and labels, or tensors by name."""
    if isinstance(content, Tensor):
        return {_ONLY: content}
    if isinstance(content, (tuple, list)):
        tensors = [value for value in content if isinstance(value, Tensor)]
        if len(tensors) == len(content) and 1 <= len(tensors) <= 2:
            return dict(zip((_ONLY, _SECOND), tensors, strict=False))
    if isinstance(content, Mapping):
        named = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if named:
            return named
    raise _UnfitError(
        "it holds no tensor, pair (images, labels) or dict of tensors. Save it with"
        " torch.save((images, labels), path)"
    )
