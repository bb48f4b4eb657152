"""`bntools verify`: whether two models give the same, in PyTorch or ONNX Runtime."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import bntools
from bntools.report import Equivalence

from .data_options import DataJob, data_options
from .options import Answer, Pair, file_option, is_same, pair_options

if TYPE_CHECKING:
    from torch import nn

__all__ = ["verify"]

_HELP = """Judge whether CANDIDATE gives what REFERENCE gives: PyTorch or ONNX, in either order.

\b
Examples:
  bntools verify model.pt model.folded.pt
  bntools verify model.pt model.onnx --provider cuda
  bntools verify model.pt model.folded.pt --runtime onnxruntime --dtype float16
  bntools verify model.pt model.onnx --data photos/ --preset ResNet50_Weights.IMAGENET1K_V2

The truth is the reference in float64 on the CPU. What the candidate may be off follows from what
the reference itself is off in its own dtype. With --provider cuda nothing runs elsewhere.

Exit codes: 0 equivalent, 1 not equivalent, 3 could not run.
"""


@click.command("verify", help=_HELP, short_help="Judge whether two models give the same.")
@click.option(
    "--runtime",
    type=click.Choice(["torch", "onnxruntime"]),
    help="Where the candidate runs: onnxruntime exports a PyTorch candidate first. By default"
    " ONNX files run in ONNX Runtime and all others in PyTorch.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "auto"]),
    default="cpu",
    help="The device of the candidate (default cpu); auto takes CUDA where it works, and says so.",
)
@click.option(
    "--allow-tf32", is_flag=True, help="Let CUDA round float32 products to TF32, and judge by that."
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32", "float64"]),
    help="Cast a PyTorch candidate to this, and judge the candidate by its precision.",
)
@click.option("--per-layer", is_flag=True, help="Also find the first layer that differs.")
@click.option(
    "--plot",
    metavar="FILE",
    callback=file_option,
    help="Draw the error by depth (.png or .svg; needs matplotlib); takes --per-layer along.",
)
@data_options("--data", required=False)
@pair_options
def verify(job: Pair, *, data: DataJob, plot: Path | None, **asked: Any) -> None:
    """Judge, and tell by the exit code."""
    _check(job, data, plot)
    job.check_writable(job.report)
    if plot is not None:
        bntools.check_plot(plot, force=job.force)
        asked["per_layer"] = True
    models = [_opened(job, source) for source in (job.reference, job.candidate)]
    inputs = data.read(job) if data.source else job.examples(_first_module(models))
    with job.console.working("comparing"):
        result = _judged(models, inputs, data, seed=job.seed, **asked)
    _say(job, result)
    if plot is not None and result.layers is not None:
        bntools.write_plot(result.layers, plot, force=job.force)
        job.console.note(f"wrote {plot}")
    answer = Answer(result, {"reference": job.reference, "candidate": job.candidate})
    job.write_report(answer)
    job.show(answer, str(result))
    if not result:
        click.get_current_context().exit(1)


def _judged(
    models: list[nn.Module | Path], inputs: Any, data: DataJob, **asked: Any
) -> Equivalence:
    """The judgement; where data do not suit the model, the error says which option would help."""
    with data.explained() if data.source else nullcontext():
        return bntools.verify(models[0], models[1], inputs, **asked)


def _check(job: Pair, data: DataJob, plot: Path | None) -> None:
    """Find what contradicts."""
    if data.source and (job.inputs or job.input_shape):
        raise click.UsageError("Give --data, --inputs or --input-shape: one of them.")
    for name, model in job.models.items():
        if plot is not None and is_same(plot, Path(model)):
            raise click.UsageError(f"--plot names the file of {name}.")
    if plot is not None and job.report is not None and is_same(plot, job.report):
        raise click.UsageError("--plot and --report name the same file.")


def _opened(job: Pair, source: str) -> nn.Module | Path:
    """A module; an ONNX model stays a file, which ONNX Runtime opens."""
    return Path(source) if bntools.is_onnx(source) else job.read(source)


def _first_module(models: list[nn.Module | Path]) -> nn.Module | None:
    return next((model for model in models if not isinstance(model, Path)), None)


def _say(job: Pair, result: Equivalence) -> None:
    job.say_inputs(result.inputs)
    if result.placement is not None:
        job.console.note(f"candidate: {result.placement}")
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.seconds.items())
    job.console.detail(f"time: {spent}")
