"""`bntools recalibrate`: re-estimate running statistics on data; keep them only if they help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import bntools
from bntools.report import RecalibrationReport, Result

from .data_options import DataJob, data_options
from .options import Answer, Job, is_same, state_dict_option, stored_options
from .progress import progress_bar
from .recalibrate_options import Asked, recalibrate_options

if TYPE_CHECKING:
    from torch import nn

    from bntools import Data

__all__ = ["recalibrate"]

_HELP = """Re-estimate the running statistics of the norm layers on data.

\b
Examples:
  bntools recalibrate model.pt --data images/ --size 224 --mean 0.485,0.456,0.406 --std 0.2
  bntools recalibrate weights.pth --arch timm:resnet18 --preset timm:resnet18 --data val/ \\
      --eval-data val/ --prior auto --plot drift.png
  bntools recalibrate model.pt --data x.npz --method pooled --passes converge
  torchrun --nproc-per-node=2 -m bntools_cli recalibrate model.pt --data images/

Where a score can be measured (--eval-data, --metric), it is, before and after, and statistics that
make it worse are not written. The model of the file is changed only in its statistics.
"""


@click.command("recalibrate", help=_HELP, short_help="Re-estimate running statistics on data.")
@recalibrate_options
@data_options("--data", required=True)
@state_dict_option
@stored_options()
def recalibrate(job: Job, *, data: DataJob, asked: Asked) -> None:
    """Recalibrate, judge and save."""
    output = asked.output or job.beside(".recalibrated.pt")
    _check_names(job, asked, output)
    with bntools.processes() as here:
        if here.rank:
            job.console.quiet = True
        run = _Run(job, data, asked, output, here.rank, here.count)
        accepted = run.go()
    if not accepted:
        click.get_current_context().exit(1)


def _check_names(job: Job, asked: Asked, output: Path) -> None:
    written = {"--output": output, "--report": job.report, "--plot": asked.plot}
    known = [(option, path) for option, path in written.items() if path is not None]
    for i, (option, path) in enumerate(known):
        for other, second in known[:i]:
            if is_same(path, second):
                raise click.UsageError(f"{other} and {option} name the same file.")
    if asked.plot is not None and is_same(asked.plot, Path(job.model)):
        raise click.UsageError("--plot names the file of the model.")


@dataclass(frozen=True)
class _Run:
    """One process of a recalibration; the one of rank 0 alone says and writes something."""

    job: Job
    data: DataJob
    asked: Asked
    output: Path
    rank: int
    count: int

    def go(self) -> bool:
        """Whether the result is good enough to be kept."""
        self._check_writable()
        model = self.job.load()
        calibration = self.data.read(self.job)
        evaluate = self._evaluate()
        with self.data.explained():
            result = self._recalibrate(model, calibration.shard(self.rank, self.count), evaluate)
        if not self.rank:
            self._deliver(result, calibration)
        return result.report.accepted

    def _check_writable(self) -> None:
        if self.rank:
            return
        if not self.asked.dry_run:
            self.job.check_output(self.output)
        self.job.check_writable(self.job.report)
        if self.asked.plot is not None:
            bntools.check_plot(self.asked.plot, force=self.job.force)

    def _evaluate(self) -> Callable[..., float] | None:
        data = None
        if self.asked.eval_data is not None:
            whole = replace(self.data, max_samples=None, shuffle=False)
            data = whole.open(self.asked.eval_data, self.job.seed)
            self.job.console.note(f"evaluation: {data.described}")
        if self.asked.metric is not None:
            return bntools.read_metric(self.asked.metric, data)
        if data is not None:
            return bntools.Accuracy(data)
        # With two parameters it is called with batches that are held out.
        return bntools.accuracy if self.asked.prior == "auto" else None

    def _recalibrate(
        self, model: nn.Module, data: Data, evaluate: Callable[..., float] | None
    ) -> Result[RecalibrationReport]:
        asked = self.asked
        with (
            self.job.console.hushed(),
            progress_bar(self.job.console, self._samples(data)) as progress,
        ):
            return bntools.recalibrate(
                model,
                data,
                method=asked.method,  # type: ignore[arg-type]  # click.Choice has checked it
                momentum=asked.momentum,
                passes=asked.passes,  # type: ignore[arg-type]  # and _NumberOr this
                prior=asked.prior,  # type: ignore[arg-type]
                only=self.job.only or "*",
                skip=self.job.skip,
                evaluate=evaluate,
                options=self._options(progress),
            )

    def _samples(self, data: Data) -> int | None:
        limit = self.asked.max_batches
        if data.samples is None or limit is None:
            return data.samples
        return min(data.samples, limit * data.batch_size)

    def _options(self, progress: Any) -> bntools.RecalibrationOptions:
        import torch

        asked = self.asked
        given: dict[str, Any] = {
            "max_passes": asked.max_passes,
            "tolerance": asked.tolerance,
            "mask": asked.mask and bntools.read_function(asked.mask),
            "forward": asked.forward and bntools.read_function(asked.forward),
            "autocast": asked.autocast and getattr(torch, asked.autocast),
        }
        return bntools.RecalibrationOptions(
            device=self.job.device,
            max_batches=asked.max_batches,
            max_error=asked.max_error,
            skip_nonfinite=asked.skip_nonfinite,
            keep_partial=asked.keep_partial,
            add_statistics=asked.add_statistics,
            gate=asked.gate,
            progress=progress,
            **{name: value for name, value in given.items() if value is not None},
        )

    def _deliver(self, result: Result[RecalibrationReport], data: Data) -> None:
        job, report = self.job, result.report
        _say(job, report, data)
        written = self._save(result) if report.accepted else None
        if report.accepted and self.asked.plot is not None and report.layers:
            bntools.write_plot(report, self.asked.plot, force=job.force)
            job.console.note(f"wrote {self.asked.plot}")
        answer = Answer(
            result,
            {"model": job.model, "data": data.described, "output": written},
        )
        if report.accepted:
            job.write_report(answer)
        else:
            job.console.error("failed: the score is worse than before, so nothing was written")
        job.show(answer, str(replace(report, warnings=())))

    def _save(self, result: Result[RecalibrationReport]) -> str | None:
        job = self.job
        if not result.report.layers:
            job.console.note("nothing was recalibrated, so no model is written")
            return None
        return job.save(result, self.output, dry_run=self.asked.dry_run)


def _say(job: Job, report: RecalibrationReport, data: Data) -> None:
    for warning in report.warnings:
        job.console.warn(warning)
    if data.broken:
        names = list(data.broken)
        job.console.warn(f"left out {len(names)} broken: {'; '.join(names[:5])}")
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    job.console.detail(f"time: {spent}\nversions: {versions}")
