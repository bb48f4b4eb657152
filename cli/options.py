"""The options that all commands share, and what they stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import bntools
from bntools.errors import BNToolsError, InputError

from .console import Console

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Answer", "Job", "file_option", "is_same", "shared_options"]

_SUFFIXES = {".pt", ".pth", ".tar", ".bin", ".ckpt", ".pkl"}


@dataclass(frozen=True)
class Job:
    """What the shared options ask for."""

    model: str
    arch: str | None
    allow: tuple[str, ...]
    input_shape: tuple[str, ...]
    inputs: Path | None
    only: tuple[str, ...]
    skip: tuple[str, ...]
    seed: int
    device: str | None
    as_json: bool
    report: Path | None
    force: bool
    quiet: bool
    verbose: bool

    @property
    def console(self) -> Console:
        """The streams of this run."""
        console: Console = click.get_current_context().obj
        return console

    def beside(self, ending: str) -> Path:
        """The name of a result: the model's own with another ending."""
        path = Path(self.model.rpartition(":")[2]) if self._is_name() else Path(self.model)
        while path.suffix in _SUFFIXES:
            path = path.with_suffix("")
        return path.with_name(path.name + ending)

    def _is_name(self) -> bool:
        return ":" in self.model and not Path(self.model).exists()

    def check_writable(self, *paths: Path | None) -> None:
        """Find out before long work whether results can be written."""
        for path in paths:
            if path is not None:
                bntools.check_writable(path, force=self.force)

    def load(self) -> nn.Module:
        """The model, on the device that was asked for."""
        with self.console.working(f"loading {self.model}"):
            loaded = bntools.read_model(self.model, self.arch, self.allow)
            model = loaded.model if self.device is None else _moved(loaded.model, self.device)
        for note in loaded.notes:
            self.console.note(f"note: {note}")
        return model

    def examples(self, model: nn.Module) -> Any:
        """The inputs that were given, as this model takes them; None where they are inferred."""
        if self.input_shape:
            return bntools.shaped_inputs(self.input_shape, seed=self.seed, like=model)
        return None if self.inputs is None else bntools.read_inputs(self.inputs, like=model)

    def say_inputs(self, inputs: str) -> None:
        """Tell what the model was run on."""
        inferred = " (inferred)"
        if inputs.endswith(inferred):
            inputs = f"{inputs.removesuffix(')')}; override with --input-shape)"
        if inputs:
            self.console.note(f"input: {inputs}")

    def write_report(self, answer: Answer) -> None:
        """Write the JSON report, if one was asked for."""
        if self.report is not None:
            bntools.write_report(self.report, answer, force=self.force)
            self.console.note(f"wrote {self.report}")

    def show(self, answer: Answer, table: str) -> None:
        """Print the answer in the form that was asked for."""
        if self.as_json:
            self.console.document(answer.to_dict())
        else:
            self.console.table(table)


@dataclass(frozen=True)
class Answer:
    """The JSON document of a command: a result's own, and which files it is about."""

    result: Any
    files: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """The document."""
        return {**self.result.to_dict(), **self.files}


def _moved(model: nn.Module, device: str) -> nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = " ".join(str(error).split())[:200]
        raise BNToolsError(
            f"Cannot use the device {device}: {why}. Choose another, such as --device cpu."
        ) from error


def file_option(_: click.Context, option: click.Parameter, value: str | None) -> Path | None:
    """Turn the value of an option into a path."""
    if value == "-":
        raise click.BadParameter("it is a file; --json prints the report on stdout.", param=option)
    return None if value is None else Path(value)


_SHARED = [
    click.argument("model", metavar="MODEL"),
    click.option(
        "--arch",
        metavar="NAME",
        help="The architecture of a state dict: torchvision:NAME, timm:NAME or"
        " package.module:factory.",
    ),
    click.option(
        "--allow",
        multiple=True,
        metavar="CLASS",
        help="A class (package.Class) that the file may hold besides those of torch.nn, torchvision"
        " and timm; repeatable.",
    ),
    click.option(
        "--input-shape",
        multiple=True,
        metavar="SHAPE",
        help="Shape of a random input, such as 1x3x224x224 or 1x128:int64; repeat it for several"
        " arguments. By default it is inferred.",
    ),
    click.option(
        "--inputs",
        metavar="FILE",
        callback=file_option,
        help="Inputs from a file: .npz (arg0, arg1, ... are positional, others keywords), .npy, or"
        " .pt (tensor, tuple of arguments, dict of keywords).",
    ),
    click.option(
        "--only",
        multiple=True,
        metavar="GLOB",
        help="Only the norm layers whose path matches, such as 'layer1.*'; repeatable.",
    ),
    click.option(
        "--skip", multiple=True, metavar="GLOB", help="Not the norm layers that match; repeatable."
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=0,
        help="Seed of random inputs (default 0).",
    ),
    click.option("--device", metavar="NAME", help="Run the model there: cpu, cuda, cuda:1, mps."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables."),
    click.option(
        "--report",
        metavar="FILE",
        callback=file_option,
        help="Also write the JSON report to a file.",
    ),
    click.option("-f", "--force", is_flag=True, help="Replace files that exist."),
    click.option("-q", "--quiet", is_flag=True, help="Only the summary, warnings and errors."),
    click.option("-v", "--verbose", is_flag=True, help="More about the run; tracebacks of errors."),
]


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that all have; it is called with them as a `Job`."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        job = Job(**{field.name: values.pop(field.name) for field in fields(Job)})
        _check(job)
        job.console.quiet, job.console.verbose = job.quiet, job.verbose
        command(job, **values)

    for option in reversed(_SHARED):
        option(run)
    return run


def _check(job: Job) -> None:
    """Find the options that contradict each other."""
    if job.quiet and job.verbose:
        raise click.UsageError("--quiet and --verbose contradict each other.")
    if job.input_shape and job.inputs:
        raise click.UsageError("Give --input-shape or --inputs, not both.")
    if job.report is not None and is_same(job.report, Path(job.model)):
        raise click.UsageError("--report names the file of the model.")
    if job.input_shape:
        try:
            bntools.shaped_inputs(job.input_shape)
        except InputError as error:
            raise click.BadParameter(str(error), param_hint="--input-shape") from error


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths name one file, which need not exist."""
    return one.resolve() == other.resolve()
