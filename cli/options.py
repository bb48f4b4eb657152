"""The options that all commands share, and what they stand for."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import bntools
from bntools.errors import BNToolsError, InputError
from bntools.report import Result

from .console import Console
from .values import Whole, file_option, input_file, named

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Answer",
    "Common",
    "Job",
    "Pair",
    "file_option",
    "is_same",
    "options_without",
    "pair_options",
    "shared_options",
    "state_dict_option",
    "stored_options",
]

_SUFFIXES = {".pt", ".pth", ".tar", ".bin", ".ckpt", ".pkl", ".pt2", ".safetensors", ".onnx"}
_RECORDED = {".pt2", ".onnx"}
_STATE_DICT = "bntools.state_dict"


@dataclass(frozen=True)
class Common:
    """What the options ask for that every command has."""

    arch: str | None
    allow: tuple[str, ...]
    trust: bool
    input_shape: tuple[str, ...]
    inputs: Path | None
    seed: int
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

    def check_writable(self, *paths: Path | None) -> None:
        """Find out before long work whether results can be written."""
        for path in paths:
            if path is not None:
                bntools.check_writable(path, force=self.force)

    def read(self, source: str) -> nn.Module:
        """A model, with notes on how it was read."""
        bntools.check_takes(source, click.get_current_context().info_name or "")
        if self.trust:
            self.console.warn_of_trust(source)
        with self.console.working(f"loading {source}"):
            loaded = bntools.read_model(source, self.arch, self.allow, trust=self.trust)
        for note in loaded.notes:
            self.console.note(f"note: {note}")
        return loaded.model

    def examples(self, model: nn.Module | None) -> Any:
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
class Job(Common):
    """What the options of a command on one model ask for."""

    model: str
    only: tuple[str, ...]
    skip: tuple[str, ...]
    device: str | None

    @property
    def models(self) -> dict[str, str]:
        """The files that the command reads."""
        return {"MODEL": self.model}

    def beside(self, ending: str) -> Path:
        """The name of a result: the model's own with another ending."""
        path = Path(self.model.rpartition(":")[2]) if self._is_name() else Path(self.model)
        while path.suffix in _SUFFIXES:
            path = path.with_suffix("")
        return path.with_name(path.name + ending)

    def _is_name(self) -> bool:
        return ":" in self.model and not os.path.exists(self.model)

    def load(self) -> nn.Module:
        """The model, on the device that was asked for."""
        model = self.read(self.model)
        return model if self.device is None else _moved(model, self.device)

    def check_distinct(self, output: Path) -> None:
        """Refuse a report that would replace the result."""
        if self.report is not None and is_same(self.report, output):
            raise click.UsageError("--output and --report name the same file.")

    def check_output(self, output: Path, *, keep_originals: bool = False) -> None:
        """Find out before long work whether a model can be written."""
        self.check_writable(output)
        state_dict = bool(click.get_current_context().meta.get(_STATE_DICT))
        bntools.check_format(output, state_dict=state_dict, keep_originals=keep_originals)

    def save(self, result: Result[Any], output: Path, *, dry_run: bool = False) -> str | None:
        """Write the model of a surgery, or say what would be written; the name of the file."""
        if dry_run:
            exists = ", which exists: that takes --force" if os.path.exists(output) else ""
            self.console.note(f"would write {output}{'' if self.force else exists}")
            return None
        if self.device is not None:
            result.model.cpu()
        recorded = output.suffix.lower() in _RECORDED and hasattr(result.model, "forward")
        with self.console.working(f"writing {output}"):
            notes = bntools.save(
                result,
                output,
                force=self.force,
                state_dict=bool(click.get_current_context().meta.get(_STATE_DICT)),
                example_inputs=self.examples(result.model) if recorded else None,
            )
        for note in notes:
            self.console.note(f"note: {note}")
        self.console.note(f"wrote {output}")
        return str(output)


@dataclass(frozen=True)
class Pair(Common):
    """What the options of a command on two models ask for."""

    reference: str
    candidate: str

    @property
    def models(self) -> dict[str, str]:
        """The files that the command reads."""
        return {"REFERENCE": self.reference, "CANDIDATE": self.candidate}


@dataclass(frozen=True)
class Answer:
    """The JSON document of a command: a result's own, and which files it is about."""

    result: Any
    files: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """The document."""
        return {**self.result.to_dict(), **self.files}


def _moved(model: nn.Module, device: str) -> nn.Module:
    if device.partition(":")[0] == "meta":
        raise BNToolsError(
            "Cannot use the device meta: it holds no numbers. Choose another, such as --device cpu."
        )
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = " ".join(str(error).split())[:200]
        raise BNToolsError(
            f"Cannot use the device {device}: {why}. Choose another, such as --device cpu."
        ) from error


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_STATE_DICT] = value


# For the commands that write a model: `Job.save` looks it up.
state_dict_option = click.option(
    "--state-dict",
    is_flag=True,
    expose_value=False,
    callback=_remember,
    help="Write the weights with their recipe in place of the whole module; a .safetensors file"
    " always is that. --arch builds the module again.",
)


def _option(*names: str, **settings: Any) -> tuple[str, Callable[..., Any]]:
    """An option and the field that it fills."""
    field = next((n for n in names if n.isidentifier()), names[-1].lstrip("-").replace("-", "_"))
    return field, click.option(*names, **settings)


_OPTIONS = dict(
    [
        _option(
            "--arch",
            metavar="NAME",
            help="The architecture of a state dict: torchvision:NAME, timm:NAME or"
            " package.module:factory.",
        ),
        _option(
            "--allow",
            multiple=True,
            metavar="CLASS",
            help="A class (package.Class) that the file may hold besides those of torch.nn,"
            " torchvision and timm; repeatable.",
        ),
        _option(
            "--trust",
            is_flag=True,
            help="Let a file that needs it (TorchScript, a full pickle) run its own code. Only for"
            " files that you would run as programs.",
        ),
        _option(
            "--input-shape",
            multiple=True,
            metavar="SHAPE",
            help="Shape of a random input, such as 1x3x224x224 or 1x128:int64; repeat it for"
            " several arguments. By default it is inferred.",
        ),
        _option(
            "--inputs",
            metavar="FILE",
            callback=input_file,
            help="Inputs from a file: .npz (arg0, arg1, ... are positional, others keywords), .npy,"
            " or .pt (tensor, tuple of arguments, dict of keywords).",
        ),
        _option(
            "--only",
            multiple=True,
            metavar="GLOB",
            help="Only the norm layers whose path matches, such as 'layer1.*'; repeatable.",
        ),
        _option(
            "--skip",
            multiple=True,
            metavar="GLOB",
            help="Not the norm layers that match; repeatable.",
        ),
        _option(
            "--seed",
            type=Whole(0, 2**32 - 1),
            metavar="N",
            default=0,
            help="Seed of all that is random: inputs, orders (default 0).",
        ),
        _option("--device", metavar="NAME", help="Run the model there: cpu, cuda, cuda:1, mps."),
        _option("--json", "as_json", is_flag=True, help="Print JSON in place of tables."),
        _option(
            "--report",
            metavar="FILE",
            callback=file_option,
            help="Also write the JSON report to a file.",
        ),
        _option("-f", "--force", is_flag=True, help="Replace files that exist."),
        _option("-q", "--quiet", is_flag=True, help="Only the summary, warnings and errors."),
        _option("-v", "--verbose", is_flag=True, help="More about the run; tracebacks of errors."),
    ]
)
# What stands in a job for an option that a command does not have.
_ABSENT: dict[str, Any] = {
    "input_shape": (),
    "inputs": None,
    "seed": 0,
    "only": (),
    "skip": (),
    "device": None,
}
_ON_ONE = [click.argument("model", metavar="MODEL", callback=named)]
_ON_TWO = [
    click.argument("reference", metavar="REFERENCE", callback=named),
    click.argument("candidate", metavar="CANDIDATE", callback=named),
]


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command on one model the options that all have; it is called with them as a `Job`."""
    return _with_options(command, Job, _ON_ONE)


Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def options_without(*without: str) -> Decorator:
    """The same without the options whose fields are named."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        return _with_options(command, Job, _ON_ONE, without)

    return decorate


def stored_options(*without: str) -> Decorator:
    """The same for a command that runs the model on no input of its own, or not at all.

    It has no --input-shape and --inputs, nor the options whose fields are named.
    """
    return options_without("input_shape", "inputs", *without)


def pair_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command on two models the options that all have; it is called with a `Pair`."""
    return _with_options(command, Pair, _ON_TWO)


def _with_options(
    command: Callable[..., None],
    kind: type[Job] | type[Pair],
    arguments: list[Any],
    without: tuple[str, ...] = (),
) -> Callable[..., None]:
    absent = {name: _ABSENT[name] for name in without}

    @functools.wraps(command)
    def run(**values: Any) -> None:
        values.update(absent)
        job = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        _check(job)
        job.console.quiet, job.console.verbose = job.quiet, job.verbose
        command(job, **values)

    wanted = {field.name for field in fields(kind)}.difference(without)
    for option in reversed([*arguments, *(o for name, o in _OPTIONS.items() if name in wanted)]):
        option(run)
    return run


def _check(job: Job | Pair) -> None:
    """Find the options that contradict each other."""
    if job.quiet and job.verbose:
        raise click.UsageError("--quiet and --verbose contradict each other.")
    if job.input_shape and job.inputs:
        raise click.UsageError("Give --input-shape or --inputs, not both.")
    for name, model in job.models.items():
        if job.report is not None and is_same(job.report, Path(model)):
            whose = "the model" if name == "MODEL" else name
            raise click.UsageError(f"--report names the file of {whose}.")
    if job.input_shape:
        try:
            bntools.shaped_inputs(job.input_shape)
        except InputError as error:
            raise click.BadParameter(str(error), param_hint="--input-shape") from error


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths name one file, which need not exist."""
    return one.resolve() == other.resolve()
