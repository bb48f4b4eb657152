"""CPU time of planning and folding, beside torch.fx's fuse on the same model in the same process.

    pytest tests/benchmarks --benchmark-timer=time.process_time -s

Times are never asserted; the ratios are printed for the README.
"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from measures import built, cpu_seconds, fx_fuse, plan_and_fold

MODELS = ["resnet50", "resnet152", "efficientnet_b0"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tool", [plan_and_fold, fx_fuse], ids=["bntools", "fx"])
def test_fold(benchmark, name, tool):
    benchmark.group = name
    benchmark.pedantic(tool, args=(built(name),), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", MODELS)
def test_ratio_to_fx(name):
    model = built(name)
    image = torch.rand(1, 3, 224, 224)
    inferred, given, fx = cpu_seconds(
        lambda: plan_and_fold(model), lambda: plan_and_fold(model, image), lambda: fx_fuse(model)
    )
    print(
        f"\n{name}: plan and fold {inferred:.3f} CPU s, with a 224 px example {given:.3f},"
        f" torch.fx fuse {fx:.3f}: ratio {inferred / fx:.2f} and {given / fx:.2f}"
    )


def test_help_needs_no_torch():
    command = [sys.executable, "-m", "bntools_cli", "--help"]
    subprocess.run(command, capture_output=True, check=True)
    start = time.process_time(), sum(_children())
    subprocess.run(command, capture_output=True, check=True)
    print(f"\nbntools --help: {sum(_children()) - start[1]:.3f} CPU s")


def _children() -> tuple[float, float]:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime, usage.ru_stime
