"""`bntools diff`: how far the running statistics of two models are apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import bntools

from .console import Console
from .options import Answer, is_same
from .values import file_option, named

if TYPE_CHECKING:
    from torch import nn

__all__ = ["diff"]

_HELP = """Show how far the running statistics of two models are apart, layer by layer.

\b
Examples:
  bntools diff model.pt model.recalibrated.pt
  bntools diff old.pth new.pth --arch torchvision:resnet18 --sort drift
  bntools diff a.pt b.pt --plot drift.png --json

The drift of a channel is the symmetric Kullback-Leibler divergence, in nats, between the Gaussians
of its mean and variance in A and in B: 0 where they are equal, about 0.5 where the mean is off by
one standard deviation.
"""


@click.command("diff", help=_HELP, short_help="Compare the running statistics of two models.")
@click.argument("first", metavar="A", callback=named)
@click.argument("second", metavar="B", callback=named)
@click.option(
    "--arch",
    metavar="NAME",
    help="The architecture of state dicts: torchvision:NAME, timm:NAME or package.module:factory.",
)
@click.option(
    "--allow",
    multiple=True,
    metavar="CLASS",
    help="A class (package.Class) that the files may hold besides those of torch.nn, torchvision"
    " and timm; repeatable.",
)
@click.option(
    "--trust",
    is_flag=True,
    help="Let a file that needs it (TorchScript, a full pickle) run its own code. Only for files"
    " that you would run as programs.",
)
@click.option(
    "--only", multiple=True, metavar="GLOB", help="Only the norm layers that match; repeatable."
)
@click.option(
    "--skip", multiple=True, metavar="GLOB", help="Not the norm layers that match; repeatable."
)
@click.option(
    "--sort",
    type=click.Choice(["depth", "drift"]),
    default="depth",
    help="Layers as in the model (the default), or those that drifted most first.",
)
@click.option(
    "--plot",
    metavar="FILE",
    callback=file_option,
    help="Draw the drift by layer depth, old against new (.png or .svg; needs matplotlib).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")
@click.option(
    "--report", metavar="FILE", callback=file_option, help="Also write the JSON report to a file."
)
@click.option("-f", "--force", is_flag=True, help="Replace files that exist.")
@click.option("-q", "--quiet", is_flag=True, help="Only the summary, warnings and errors.")
@click.option("-v", "--verbose", is_flag=True, help="More about the run; tracebacks of errors.")
def diff(**values: Any) -> None:
    """Compare two models."""
    _compare(click.get_current_context().obj, _Asked(**values))


@dataclass(frozen=True)
class _Asked:
    """What the options ask for."""

    first: str
    second: str
    arch: str | None
    allow: tuple[str, ...]
    trust: bool
    only: tuple[str, ...]
    skip: tuple[str, ...]
    sort: str
    plot: Path | None
    as_json: bool
    report: Path | None
    force: bool
    quiet: bool
    verbose: bool

    def check(self) -> None:
        """Find what contradicts, and whether the files can be written."""
        if self.quiet and self.verbose:
            raise click.UsageError("--quiet and --verbose contradict each other.")
        written = {"--plot": self.plot, "--report": self.report}
        for option, path in written.items():
            if path is not None and any(is_same(path, Path(m)) for m in (self.first, self.second)):
                raise click.UsageError(f"{option} names the file of a model.")
        if self.plot is not None and self.report is not None and is_same(self.plot, self.report):
            raise click.UsageError("--plot and --report name the same file.")
        if self.plot is not None:
            bntools.check_plot(self.plot, force=self.force)
        if self.report is not None:
            bntools.check_writable(self.report, force=self.force)

    def load(self, source: str, console: Console) -> nn.Module:
        """One of the models."""
        bntools.check_takes(source, "diff")
        if self.trust:
            console.warn_of_trust(source)
        with console.working(f"loading {source}"):
            loaded = bntools.read_model(source, self.arch, self.allow, trust=self.trust)
        for note in loaded.notes:
            console.note(f"note: {note}")
        return loaded.model


def _compare(console: Console, asked: _Asked) -> None:
    console.quiet, console.verbose = asked.quiet, asked.verbose
    asked.check()
    models = [asked.load(source, console) for source in (asked.first, asked.second)]
    found = bntools.diff(*models, only=asked.only or "*", skip=asked.skip)
    if asked.sort == "drift":
        found = found.by_drift()
    answer = Answer(found, {"a": asked.first, "b": asked.second})
    if asked.plot is not None:
        bntools.write_plot(found, asked.plot, force=asked.force)
        console.note(f"wrote {asked.plot}")
    if asked.report is not None:
        bntools.write_report(asked.report, answer, force=asked.force)
        console.note(f"wrote {asked.report}")
    if asked.as_json:
        console.document(answer.to_dict())
    else:
        console.table(str(found))
