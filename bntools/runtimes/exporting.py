"""From a PyTorch model to an ONNX graph: torch's exporter, with what it leaves undone."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from bntools.errors import ExportError
from bntools.examples import Examples
from bntools.modules import preserved
from bntools.outputs import tensors
from bntools.runtimes.bfloat16 import compute_in_float32
from bntools.runtimes.cleaning import clean, name_ends
from bntools.runtimes.refusals import decides_by_numbers, explained

__all__ = ["OPSETS", "Exported", "captured", "export", "quietly"]

OPSETS = range(17, 24)
"""What torch's exporter can be asked for: it writes 18 and later, and 17 is one step down."""
_BATCH = "batch"
_log = logging.getLogger("bntools.export")


@dataclass(frozen=True)
class Exported:
    """A model as an ONNX graph (`graph` is an `onnx_ir.Model`), and what its ends stand for.

    `paths` has a name such as "output.boxes[0]" for each output, in the order of `outputs`.
    `dynamic` says whether every input takes any batch size, `widened` whether bfloat16 is computed
    in float32, and `compiled` whether torch.export had to compile the forward, as it does where it
    cannot run it.
    """

    graph: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    paths: tuple[str, ...]
    opset: int
    dynamic: bool
    widened: bool = False
    compiled: bool = False

    def feeds(self, examples: Examples) -> dict[str, Tensor]:
        """The inputs of the graph, by name, for the arguments of a forward."""
        return dict(zip(self.inputs, examples.tensors(), strict=True))

    def named(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a session gives, by the names that the outputs of the model have."""
        return {path: given[name] for path, name in zip(self.paths, self.outputs, strict=True)}


def export(
    model: nn.Module, examples: Examples, *, opset: int | None = None, dynamic: bool = True
) -> Exported:
    """Export a model in eval mode, BatchNormalization nodes as such, and leave it as it was.

    With `dynamic` the first dimension that all inputs share is free, unless the model fixes it.
    Weights, inputs and outputs in bfloat16 stay so, and what is computed is in float32. Outputs
    that are no tensors (numbers, texts, None) are left out. A forward that decides by the numbers
    in tensors is refused: a trace of one path gives a file that is wrong for other inputs.

    Raises `ExportError` where torch's exporter cannot do it; the message names what stops it.
    """
    if opset is not None and opset not in OPSETS:
        raise ExportError(
            f"Cannot export to opset {opset}: torch's exporter writes {OPSETS[0]} to {OPSETS[-1]}."
            " Leave the choice to it, or take one of these."
        )
    fed = examples.copied()
    batch = fed.shared_size if dynamic else None
    paths: list[str] = []
    with quietly():
        with preserved(model), _returning_tensors(model, paths):
            try:
                program, compiled = _program(model, fed, opset, batch)
                if not paths:  # compiled by dynamo, which runs no side effects
                    model(*fed.args, **fed.kwargs)
            except Exception as error:
                raise explained(error, model) from error
        graph = program.model
        written = int(graph.opset_imports[""])
        if opset not in (None, written):
            raise ExportError(
                f"Cannot export to opset {opset}: operations of this model have no older form, the"
                f" oldest is opset {written}. Take that one, or a later one."
            )
        _check_ends(graph, fed, paths)
        clean(graph)
        widened = compute_in_float32(graph)
        name_ends(graph, paths, batch=_BATCH if batch else None)
    return Exported(
        graph,
        inputs=tuple(str(value.name) for value in graph.graph.inputs),
        outputs=tuple(str(value.name) for value in graph.graph.outputs),
        paths=tuple(paths),
        opset=written,
        dynamic=batch is not None and all(map(_is_free, graph.graph.inputs)),
        widened=widened,
        compiled=compiled,
    )


def _program(
    model: nn.Module, fed: Examples, opset: int | None, batch: int | None
) -> tuple[Any, bool]:
    """What torch's exporter gives, without its optimiser, and whether the forward was compiled.

    The optimiser folds norms on its own, which makes invalid models of mixed dtypes and leaves
    no BatchNormalization to compare with; and it takes most of the time.
    """
    with torch.no_grad():
        program, compiled = captured(model, fed, _shapes(model, fed, batch) if batch else None)
        graph = torch.onnx.export(
            program, dynamo=True, optimize=False, verbose=False, opset_version=opset
        )
    return graph, compiled


def captured(model: nn.Module, fed: Examples, shapes: Any) -> tuple[Any, bool]:
    """The forward as torch.export sees it when it runs it, or, where that fails, compiles it."""

    def capture(*, strict: bool) -> Any:
        return torch.export.export(
            model, fed.args, fed.kwargs, dynamic_shapes=shapes, strict=strict
        )

    try:
        return capture(strict=False), False
    except Exception as error:
        if decides_by_numbers(error):  # so it would compiled, after minutes
            raise
        try:
            return capture(strict=True), True
        except Exception:  # noqa: BLE001 - the first failure is in the model's own code
            raise error from None


def _shapes(model: nn.Module, fed: Examples, batch: int) -> Any:
    free = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in fed.tensors():
        if tensor.dim() and tensor.shape[0] == batch:
            free[tensor] = {0: torch.export.Dim.AUTO}
    return free.dynamic_shapes(model, fed.args, fed.kwargs)  # type: ignore[no-untyped-call]


@contextmanager
def _returning_tensors(model: nn.Module, paths: list[str]) -> Iterator[None]:
    """The model returns a flat list of its tensors; their names go to `paths`.

    So that everything that `verify` can compare can be exported too: objects, and numbers beside
    tensors, which the exporter takes neither of. `preserved` undoes it.
    """
    forward: Callable[..., Any] = model.forward

    @wraps(forward)
    def flat(*args: Any, **kwargs: Any) -> list[Tensor]:
        found = tensors(forward(*args, **kwargs))
        paths[:] = found
        return list(found.values())

    model.forward = flat
    yield


@contextmanager
def quietly() -> Iterator[None]:
    """Exporters print, log and warn; that goes to stderr where `bntools.export` logs debugging."""
    if _log.isEnabledFor(logging.DEBUG):
        with redirect_stdout(sys.stderr):
            yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check_ends(graph: Any, fed: Examples, paths: list[str]) -> None:
    wanted, got = len(fed.tensors()), len(graph.graph.inputs)
    if wanted != got:
        raise ExportError(
            f"Cannot export the model: it takes {wanted} tensors, and torch's exporter makes {got}"
            " inputs of them. Give each tensor once, as an argument of its own."
        )
    if not paths:
        raise ExportError(
            "Cannot export the model: it returns no tensor. Return what is to be computed."
        )
    if len(paths) != len(graph.graph.outputs):
        raise ExportError(
            f"Cannot export the model: it returns {len(paths)} tensors, and torch's exporter makes"
            f" {len(graph.graph.outputs)} outputs of them. Return each tensor once."
        )


def _is_free(value: Any) -> bool:
    """Whether an input of a graph takes any first dimension, or has none."""
    return value.shape is not None and not (value.shape and isinstance(value.shape[0], int))
