"""`bntools unfold`: a folded model becomes the one that it was folded from."""

from __future__ import annotations

from pathlib import Path

import click

import bntools

from .options import Answer, Job, file_option, state_dict_option, stored_options

__all__ = ["unfold"]

_HELP = """Bring back the BatchNorm layers of a model that was folded with --keep-originals.

\b
Examples:
  bntools fold model.pt --keep-originals -o small.pt
  bntools unfold small.pt -o model.pt
  bntools unfold small.safetensors --arch timm:resnet18

Every layer and every weight that the fold removed or changed is what it was, to the bit, so that
the model can be trained or recalibrated and folded again. What was edited elsewhere stays. A model
of which the folded weights were changed since is refused.
"""


@click.command("unfold", help=_HELP, short_help="Bring back the BatchNorm of a folded model.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    callback=file_option,
    help="Where to write the result; beside MODEL by default: model.unfolded.pt.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would come back.")
@state_dict_option
@stored_options("seed", "only", "skip", "device")
def unfold(job: Job, output: Path | None, dry_run: bool) -> None:
    """Unfold and save."""
    output = output or job.beside(".unfolded.pt")
    job.check_distinct(output)
    job.check_writable(job.report)
    if not dry_run:
        job.check_output(output)
    model = job.load()
    with job.console.working("unfolding"):
        result = bntools.unfold(model)
    written = job.save(result, output, dry_run=dry_run)
    answer = Answer(result, {"model": job.model, "output": written})
    job.write_report(answer)
    job.show(answer, str(result))
