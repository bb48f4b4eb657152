"""What `fold` and `inspect` do with an ONNX file in the place of a PyTorch model."""

from __future__ import annotations

import os

import click

import bntools
from bntools.report import Inspection, Plan, Report, Result

from .options import Job

__all__ = ["check_options", "fold_onnx", "inspect_onnx", "is_onnx", "plan_onnx"]


def is_onnx(job: Job) -> bool:
    """Whether the model is an ONNX file."""
    return os.path.isfile(job.model) and bntools.is_onnx(job.model)


def check_options(job: Job, **wanted: bool) -> None:
    """Refuse options that are for PyTorch models; `wanted` are those of the command."""
    given = {**wanted, "arch": job.arch is not None, "device": job.device is not None}
    for name, is_given in given.items():
        if is_given:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} is for PyTorch models, and {job.model} is ONNX.")


def plan_onnx(job: Job) -> Plan:
    """The plan of the file."""
    return bntools.plan_onnx(job.model, job.examples(None), only=job.only or "*", skip=job.skip)


def fold_onnx(job: Job) -> Result[Report]:
    """The folded model, and its proof."""
    return bntools.fold_onnx(
        job.model, job.examples(None), only=job.only or "*", skip=job.skip, seed=job.seed
    )


def inspect_onnx(job: Job) -> Inspection:
    """The health of the norms in the file."""
    return bntools.inspect_onnx(job.model, job.examples(None))
