"""The options of the commands that read data: which, how prepared, how many at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import click
from click.core import ParameterSource

import bntools
from bntools.errors import BNToolsError

from .values import Whole, named

if TYPE_CHECKING:
    from bntools import Data

    from .console import Console

__all__ = ["Asking", "DataJob", "data_options"]


class Asking(Protocol):
    """A job of any command, as far as reading data needs it."""

    @property
    def seed(self) -> int:
        """What random orders are drawn by."""

    @property
    def console(self) -> Console:
        """The streams of the run."""


@dataclass(frozen=True)
class DataJob:
    """What the options for data ask for."""

    source: str | None
    batch_size: int
    max_samples: int | None
    shuffle: bool | None
    workers: int
    preset: str | None
    size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    grayscale: bool | None
    skip_broken: bool

    def read(self, job: Asking, source: str | None = None) -> Data:
        """Open the source (or another, prepared alike), and tell what it is."""
        data = self.open(source or self.source or "", job.seed)
        job.console.note(f"data: {data.described}")
        for note in data.notes:
            job.console.note(f"note: {note}")
        return data

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error of the model about what it was given also says the option that would help."""
        try:
            yield
        except BNToolsError as error:
            cure = next((cure for pattern, cure in _CURES if re.search(pattern, str(error))), None)
            if cure is None:
                raise
            raise type(error)(f"{str(error).rstrip('.')}. {cure}") from error

    def open(self, source: str, seed: int) -> Data:
        """Open a source."""
        return bntools.read_data(
            source,
            batch_size=self.batch_size,
            max_samples=self.max_samples,
            shuffle=self.shuffle,
            seed=seed,
            workers=self.workers,
            preprocessing=bntools.Preprocessing(
                size=self.size,
                mean=self.mean,
                std=self.std,
                grayscale=self.grayscale,
                preset=self.preset,
            ),
            skip_broken=self.skip_broken,
        )


_CURES = (
    (r"have 3 channels, but got 1 ", "Give --rgb to make three channels of one."),
    (r"have 1 channels, but got 3 ", "Give --grayscale to make one channel of three."),
    (r"to have \d+ channels, but got", "Arrays of floats are (N, C, H, W)."),
    (r"shapes cannot be multiplied|size of tensor|normalized_shape", "Is the --size right?"),
)


def _size(_: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise click.BadParameter(
            f"{value!r} is no size such as 224 or 224x320 (height x width).", param=option
        )
    return int(parts[0]), int(parts[-1])


def _numbers(
    _: click.Context, option: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no list of numbers such as 0.5 or 0.485,0.456,0.406.", param=option
        ) from None


def _source(name: str, *, required: bool) -> Callable[..., Any]:
    return click.option(
        name,
        "source",
        metavar="SOURCE",
        callback=named,
        required=required,
        help="Data: a folder of images (class folders give labels), arrays in .npz, .npy, .pt"
        " or .safetensors (FILE?images=NAME&labels=NAME), .tar shards,"
        " torchvision:NAME?root=DIR&split=train, or package.module:function.",
    )


_OPTIONS = [
    click.option(
        "--batch-size",
        type=Whole(1),
        metavar="N",
        default=32,
        help="Samples of a batch, over all processes (default 32).",
    ),
    click.option(
        "--max-samples",
        type=Whole(1),
        metavar="N",
        help="Use no more samples than these.",
    ),
    click.option(
        "--shuffle/--no-shuffle",
        default=None,
        help="Whether to draw the samples in random order (--seed). By default only what is"
        " sorted by class is.",
    ),
    click.option(
        "--workers",
        type=Whole(0, 256),
        metavar="N",
        default=0,
        help="Threads that read and decode ahead (default 0).",
    ),
    click.option(
        "--preset",
        metavar="NAME",
        help="Prepare images as for these weights of torchvision, such as"
        " ResNet50_Weights.IMAGENET1K_V2, or as for timm:NAME; downloads nothing.",
    ),
    click.option(
        "--size",
        metavar="SIZE",
        callback=_size,
        help="Resize images to cover this (224, or height x width: 224x320), and crop the centre.",
    ),
    click.option(
        "--mean",
        metavar="NUMBERS",
        callback=_numbers,
        help="Subtract from pixels in [0, 1]: one number, or R,G,B.",
    ),
    click.option("--std", metavar="NUMBERS", callback=_numbers, help="Divide by, after --mean."),
    click.option(
        "--grayscale/--rgb",
        default=None,
        help="One channel, or three. By default image files have three, and arrays what they have.",
    ),
    click.option(
        "--skip-broken",
        is_flag=True,
        help="Leave out images that cannot be read, and name them.",
    ),
]


def _check_wanted(data: DataJob, name: str) -> None:
    """Without data the options that say how to read them would change nothing."""
    if data.source is not None:
        return
    context = click.get_current_context()
    for field in fields(DataJob):
        if context.get_parameter_source(field.name) is ParameterSource.COMMANDLINE:
            option = "--" + field.name.replace("_", "-")
            raise click.UsageError(f"{option} is about data: give {name}, or leave it out.")


def data_options(
    name: str = "--data", *, required: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options for data; it is called with them as a `DataJob` named `data`.

    Put it above `shared_options`: the job comes first.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*arguments: Any, **values: Any) -> None:
            data = DataJob(**{field.name: values.pop(field.name) for field in fields(DataJob)})
            _check_wanted(data, name)
            if data.preset is not None and (data.size or data.mean or data.std or data.grayscale):
                raise click.UsageError(
                    "--preset has the size, mean, std and channels: leave these options out."
                )
            command(*arguments, data=data, **values)

        for option in (*reversed(_OPTIONS), _source(name, required=required)):
            option(run)
        return run

    return decorate
