"""Time from a .pt file to a verified .onnx, step by step, and beside torch's exporter alone.

    pytest tests/benchmarks/test_export.py -s

"ours" is what is neither torch's exporter nor a forward pass, PyTorch's or ONNX Runtime's.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from measures import built

import bntools
from bntools import equivalence, judging, observing
from bntools.runtimes import exporting, sessions

MODELS = ["resnet50", "mobilenet_v3_small"]
IMAGE = (1, 3, 224, 224)


class Stopwatch:
    """The time inside of functions that are replaced while it runs; nested calls count once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._deep = 0

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            self._deep += 1
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self._deep -= 1
                if not self._deep:
                    spent = time.perf_counter() - start
                    self.seconds[name] = self.seconds.get(name, 0.0) + spent

        return run


@contextlib.contextmanager
def watching() -> Iterator[Stopwatch]:
    """Time spent in torch's exporter and in forward passes."""
    watch = Stopwatch()
    places = [
        ("exporter", exporting, "_program"),
        ("forwards", equivalence, "forward"),
        ("forwards", observing, "_recorded"),
        ("forwards", sessions.Session, "run"),
    ]
    before = [(owner, name, getattr(owner, name)) for _, owner, name in places]
    try:
        for (label, owner, name), (_, _, function) in zip(places, before, strict=True):
            setattr(owner, name, watch.watched(label, function))
        yield watch
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def exported(file: Path, target: Path) -> tuple[dict[str, float], float, Stopwatch]:
    """The steps, the whole, and the parts of others, of one export."""
    with watching() as watch:
        start = time.perf_counter()
        model = bntools.load(file)
        loaded = time.perf_counter() - start
        result = bntools.export_onnx(model, torch.rand(IMAGE), target, provider="cpu", force=True)
        total = time.perf_counter() - start
    assert result.report
    return {"load": loaded, **result.report.seconds}, total, watch


def torch_alone(model: torch.nn.Module, target: Path) -> float:
    """torch.onnx.export as its users call it, without any check."""
    start = time.perf_counter()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim.AUTO},)
        torch.onnx.export(
            model, (torch.rand(2, *IMAGE[1:]),), target, dynamo=True, dynamic_shapes=shapes,
            verbose=False, external_data=False,
        )  # fmt: skip
    return time.perf_counter() - start


@pytest.mark.parametrize("name", MODELS)
def test_from_pt_to_verified_onnx(name, tmp_path):
    torch.set_num_threads(2)
    file = tmp_path / "model.pt"
    model = built(name).eval()
    torch.save(model, file)
    exported(file, tmp_path / "warm.onnx")  # what is imported at the first use is nobody's time
    alone = torch_alone(model, tmp_path / "alone.onnx")
    steps, total, watch = exported(file, tmp_path / "model.onnx")
    ours = total - sum(watch.seconds.values())
    told = ", ".join(f"{step} {seconds:.2f}" for step, seconds in steps.items())
    print(
        f"\n{name}: {total:.2f} s from .pt to a verified .onnx ({told}); in torch's exporter"
        f" {watch.seconds['exporter']:.2f}, in forward passes {watch.seconds['forwards']:.2f}, ours"
        f" {ours:.2f} ({100 * ours / total:.0f} %); torch.onnx.export alone {alone:.2f}"
    )


def test_the_truth_is_shared(tmp_path, monkeypatch):
    """One truth is found for the check of the fold, and the check of the file shares it."""
    found: list[str] = []
    right = judging.find_truth
    monkeypatch.setattr(
        judging, "find_truth", lambda m, x, **o: (found.append(str(x)), right(m, x, **o))[1]
    )
    bntools.export_onnx(
        built("resnet18").eval(), torch.rand(IMAGE), tmp_path / "m.onnx", provider="cpu"
    )
    print(f"\nfurther float64 truths for the file: {', '.join(found)}")
