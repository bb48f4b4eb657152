"""How long forwards take: two versions of a model, side by side."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from bntools.equivalence import device_of, dtype_of
from bntools.examples import Examples
from bntools.modules import duplicate
from bntools.report import Latency

__all__ = ["compare_latency"]

_LEAST, _MOST, _SECONDS = 5, 51, 3.0


def compare_latency(
    before: nn.Module, after: nn.Module, examples: Examples, *, seconds: float = _SECONDS
) -> Latency:
    """Time eager forwards of two models in turns, on copies of them.

    The medians of at least 5 runs each, and of as many more as fit into `seconds` (51 at most).
    """
    models = [duplicate(model).eval() for model in (before, after)]
    for model in models:
        _timed(model, examples)  # the first run is slower
    rows: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(rows) < _MOST:
        rows.append((_timed(models[0], examples), _timed(models[1], examples)))
        if len(rows) >= _LEAST and time.perf_counter() - start > seconds:
            break
    spent = [1000 * statistics.median(column) for column in zip(*rows, strict=True)]
    return Latency(
        before_ms=spent[0],
        after_ms=spent[1],
        ratio=spent[0] / spent[1],
        runs=len(rows),
        threads=torch.get_num_threads(),
        device=device_of(after).type,
        inputs=str(examples),
    )


def _timed(model: nn.Module, examples: Examples) -> float:
    device = device_of(model)
    fed = examples.cast(dtype_of(model), device).copied()
    with torch.inference_mode():
        _wait(device)
        start = time.perf_counter()
        model(*fed.args, **fed.kwargs)
        _wait(device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
