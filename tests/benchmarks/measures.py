"""What the benchmarks measure with: CPU seconds and peak memory, each against a named peer."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse

from bntools.planning import plan_fold
from bntools.surgery.folding import fold_copy


def built(name: str) -> nn.Module:
    """A torchvision model in eval mode, with random weights."""
    return torchvision.models.get_model(name, weights=None).eval()


def plan_and_fold(model: nn.Module, example_inputs=None) -> nn.Module:
    """What `bntools.fold` does before its check."""
    return fold_copy(model, plan_fold(model, example_inputs).compiled.folds).model


def fx_fuse(model: nn.Module) -> nn.Module:
    """torch.fx's fuse, its tracing and copy included."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return fuse(model)


def cpu_seconds(*functions: Callable[[], object], rounds: int = 7) -> list[float]:
    """The least CPU time of each function, called in turn so that all see the same machine."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for index, function in enumerate(functions):
            start = time.process_time()
            kept = function()
            best[index] = min(best[index], time.process_time() - start)
            del kept
    return best


class PeakMemory:
    """The growth of the process's resident memory at its highest, in bytes (Linux)."""

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._status("VmRSS")
        self.bytes = 0
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self._status("VmHWM") - self.before

    @staticmethod
    def _status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise KeyError(key)
