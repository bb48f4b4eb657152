"""From pixels to what a model takes: size, channels, range and normalisation."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from bntools.errors import DataError
from bntools.imports import one_line, quiet

__all__ = ["ChannelsError", "Preprocessing"]

_LUMA = (0.299, 0.587, 0.114)
_TIMM = "timm:"


class ChannelsError(DataError):
    """As many means or deviations were given as no image of these data has channels."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every image; without any of it, pixels become floats in [0, 1].

    `size` (height, width) resizes the shorter way until the image covers it, with antialiasing,
    and crops the centre. `mean` and `std`, in units of [0, 1], normalise: one value, or one for
    every channel. `grayscale` gives one channel, False three; by default image files have three
    and arrays what they have. `preset` stands for all of these: the evaluation transforms of
    torchvision weights ("ResNet50_Weights.IMAGENET1K_V2") or of a timm model ("timm:resnet18");
    nothing is downloaded.

    Raises DataError.

    Example:
        >>> import torch, bntools
        >>> halved = bntools.Preprocessing(size=(2, 2), mean=(0.5,), std=(0.5,))
        >>> halved.batch(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)).unique().tolist()
        [1.0]
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    grayscale: bool | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.preset is not None:
            if (self.size, self.mean, self.std) != (None, None, None) or self.grayscale:
                raise DataError(
                    f"Cannot use the preset {self.preset} with a size, mean, std or grayscale of"
                    " your own: it has them. Give the one or the others."
                )
            _ = self._transform
        if self.size is not None and min(self.size) < 1:
            raise DataError(f"Cannot resize to {_sized(self.size)}: give sizes of 1 or more.")
        numbers = (*(self.mean or ()), *(self.std or ()))
        if any(not np.isfinite(number) for number in numbers) or min(self.std or (1,)) <= 0:
            raise DataError(
                "Cannot normalise: mean and std are finite numbers, std above 0. Change them."
            )

    def __str__(self) -> str:
        if self.preset is not None:
            return f"preset {self.preset}"
        parts = [
            "" if self.size is None else f"size {_sized(self.size)}",
            "" if self.mean is None else f"mean {_listed(self.mean)}",
            "" if self.std is None else f"std {_listed(self.std)}",
            {None: "", True: "grayscale", False: "RGB"}[self.grayscale],
        ]
        return ", ".join(part for part in parts if part)

    def image(self, image: Image.Image) -> Tensor:
        """One decoded image as a float tensor (C, H, W)."""
        image = _eight_bit(image)
        if self.preset is not None:
            prepared: Tensor = self._transform(_converted(image, "RGB"))
            return prepared
        image = _converted(image, "L" if self.grayscale else "RGB")
        return self._normalised(F.pil_to_tensor(self._resized(image)))

    def batch(self, images: Tensor) -> Tensor:
        """A batch (N, C, H, W): of bytes, or of floats, which are taken as they are."""
        if self.grayscale is not None:
            images = _with_channels(images, 1 if self.grayscale else 3)
        if self.preset is None:
            return self._normalised(self._resized(images))
        if images.shape[1] != 3:
            raise DataError(
                f"Cannot use the preset {self.preset}: it is for 3 channels, and the images have"
                f" {images.shape[1]}. Make them three with --rgb (in Python grayscale=False)."
            )
        if not self.preset.startswith(_TIMM):
            whole: Tensor = self._transform(images)
            return whole
        if images.dtype != torch.uint8:
            raise DataError(
                f"Cannot use the preset {self.preset} on {images.dtype} arrays: timm's transforms"
                " are for bytes. Give uint8 images, or --size, --mean and --std."
            )
        return torch.stack([self._transform(F.to_pil_image(image)) for image in images])

    @cached_property
    def _transform(self) -> Callable[[Any], Tensor]:
        preset = self.preset or ""
        return _of_timm(preset) if preset.startswith(_TIMM) else _of_torchvision(preset)

    def _resized(self, image: Any) -> Any:
        if self.size is None:
            return image
        height, width = F.get_size(image)
        scale = max(self.size[0] / height, self.size[1] / width)
        covering = [
            max(round(height * scale), self.size[0]),
            max(round(width * scale), self.size[1]),
        ]
        if covering != [height, width]:
            image = F.resize(image, covering, antialias=True)
        return F.center_crop(image, list(self.size))

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        if self.mean is None and self.std is None:
            return images
        channels = images.shape[-3]
        shift = _per_channel("mean", self.mean or (0.0,), channels)
        scale = _per_channel("std", self.std or (1.0,), channels)
        return images.sub(shift).div_(scale)


def _sized(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _per_channel(name: str, values: tuple[float, ...], channels: int) -> Tensor:
    if len(values) not in (1, channels):
        raise ChannelsError(
            f"Cannot normalise: {name} has {len(values)} values, and the images have {channels}"
            f" channel{'s' * (channels > 1)}. Give one value for all, or one for each."
        )
    return torch.tensor(values).view(-1, 1, 1)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit: Pillow would clip it to white."""
    if not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image).astype(np.uint16)
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in ("I", "F"):
        raise DataError("its pixels have 32 bits, of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return image.convert(mode)


def _with_channels(images: Tensor, channels: int) -> Tensor:
    found = images.shape[1]
    if found == channels:
        return images
    if found == 1:
        return images.expand(-1, channels, -1, -1)
    if found != 3:
        raise DataError(f"Cannot make {channels} of {found} channels. Convert the images.")
    luma = torch.tensor(_LUMA).view(1, 3, 1, 1)
    grey = images.to(torch.float32).mul(luma).sum(1, keepdim=True)
    return grey.round().to(images.dtype) if images.dtype == torch.uint8 else grey


def _of_torchvision(preset: str) -> Callable[[Any], Tensor]:
    models: Any = importlib.import_module("torchvision.models")
    try:
        transform: Callable[[Any], Tensor] = models.get_weight(preset).transforms()
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"Cannot use the preset {preset}: {_nearest(preset, models)}.") from error
    if "Image" not in type(transform).__name__ and "Segmentation" not in type(transform).__name__:
        raise DataError(f"Cannot use the preset {preset}: it is not for images alone.")
    return transform


def _nearest(preset: str, models: Any) -> str:
    names = [
        str(weight) for name in models.list_models() for weight in models.get_model_weights(name)
    ]
    near = difflib.get_close_matches(preset, names, n=2, cutoff=0.5)
    hint = f"; near are {', '.join(near)}" if near else ""
    return (
        "it is the name of torchvision weights, such as ResNet50_Weights.IMAGENET1K_V2, or"
        f" timm:NAME{hint}"
    )


def _of_timm(preset: str) -> Callable[[Any], Tensor]:
    name = preset.removeprefix(_TIMM)
    try:
        with quiet():
            data: Any = importlib.import_module("timm.data")
            models: Any = importlib.import_module("timm.models")
            found = models.get_pretrained_cfg(name)
    except ImportError as error:
        raise DataError(
            f"Cannot use the preset {preset}: {one_line(error)}. Install it with: pip install timm"
        ) from error
    except RuntimeError as error:
        raise DataError(f"Cannot use the preset {preset}: {one_line(error)}.") from error
    if found is None:
        near = difflib.get_close_matches(name, models.list_models(), n=3)
        hint = f"; near are {', '.join(near)}" if near else ""
        raise DataError(f"Cannot use the preset {preset}: timm has no such model{hint}.")
    config = data.resolve_data_config(pretrained_cfg=found.to_dict())
    transform: Callable[[Any], Tensor] = data.create_transform(**config, is_training=False)
    return transform
