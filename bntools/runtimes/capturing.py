"""From a PyTorch model to an exported program (torch.export), its sizes free where they can be."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from bntools.errors import ExportError, SaveError
from bntools.examples import Examples, candidates, given
from bntools.modules import preserved
from bntools.outputs import flatten
from bntools.programs.program import Program
from bntools.runtimes.exporting import captured, quietly
from bntools.runtimes.refusals import explained
from bntools.tolerance import relative_error

__all__ = ["Captured", "capture", "differing", "run_once", "runnable"]

_SEED = 30
_MOST_EPS = 256


@dataclass(frozen=True)
class Captured:
    """An exported program as torch.export saves it, and what the user should know about it."""

    data: memoryview
    notes: tuple[str, ...] = field(default_factory=tuple)


def capture(
    model: nn.Module, example_inputs: Any, target: str, texts: Mapping[str, str]
) -> Captured:
    """Export a model in eval mode, with `texts` beside it, and compare what torch reads back.

    The batch is free where the model allows it, and so is what an exported program left free; what
    stays fixed is in the notes. Raises `SaveError`, which names `target`.
    """
    with preserved(model), quietly():
        if model.training:
            model.eval()
        examples = runnable(model, example_inputs, target, tool="torch.export")
        try:
            program, _ = captured(model, examples.copied(), _free(model, examples))
        except Exception as error:
            raise _refused(explained(error, model), target) from error
        whole = io.BytesIO()  # torch wants to seek in what it writes
        try:
            torch.export.save(program, whole, extra_files=dict(texts))
            whole.seek(0)
            again = torch.export.load(whole)
        except Exception as error:
            raise SaveError(
                f"Cannot write {target}: torch.export cannot save the program, or not read it back"
                f" ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Save the model:"
                " -o NAME.pt."
            ) from error
        notes = tuple(_notes(program, examples))
        _check(model, again, examples, target)
    return Captured(whole.getbuffer(), notes)


def runnable(model: nn.Module, example_inputs: Any, target: str, *, tool: str) -> Examples:
    """Inputs that the model takes, in a batch of two where it takes that: one is never free."""
    options = candidates(model) if example_inputs is None else iter([given(example_inputs)])
    failure: Exception | None = None
    for examples in options:
        wide = examples.doubled() if examples.batch == 1 else None
        for each in (wide, examples):
            if each is None:
                continue
            try:
                run_once(model, each)
            except Exception as error:  # noqa: BLE001 - models raise anything
                failure = failure or error
            else:
                return each
    why = f" ({' '.join(str(failure).split())[:200]})" if failure is not None else ""
    raise SaveError(
        f"Cannot write {target}: {tool} runs the model, and it runs on none of the inputs"
        f" tried{why}. Give example inputs (--input-shape, --inputs; in Python example_inputs)."
    )


def run_once(model: nn.Module, examples: Examples) -> Any:
    """What a model gives, and is as it was afterwards."""
    fed = examples.copied()
    with preserved(model), torch.no_grad():
        return model(*fed.args, **fed.kwargs)


def _free(model: nn.Module, examples: Examples) -> Any:
    """The sizes that are free: those of the program that the model is, else the batch."""
    free = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, sizes in _free_sizes(model, examples):
        if sizes:
            free[tensor] = sizes
    try:
        return free.dynamic_shapes(model, examples.args, examples.kwargs)  # type: ignore[no-untyped-call]
    except ValueError:  # a tensor that is given twice
        return None


def _free_sizes(model: nn.Module, examples: Examples) -> Iterator[tuple[Tensor, dict[int, Any]]]:
    any_size = torch.export.Dim.AUTO
    if isinstance(model, Program):
        ready = model.prepared
        flat = ready.bound(examples.args, examples.kwargs)
        for port, value in zip(ready.ports, flat, strict=True):
            sizes = {}
            for index, name in enumerate(port.free):
                limits = ready.ranges.get(name or "")
                if name and limits is not None:
                    least = limits.least if limits.least and limits.least > 2 else None
                    sizes[index] = any_size(min=least, max=limits.most)
                elif name:
                    sizes[index] = any_size
            if isinstance(value, Tensor):
                yield value, sizes
        return
    batch = examples.shared_size
    for tensor in examples.tensors():
        if tensor.dim():
            yield tensor, {0: any_size} if tensor.shape[0] == batch else {}


def _notes(program: torch.export.ExportedProgram, examples: Examples) -> Iterator[str]:
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    shapes = [v.shape for name in names if isinstance(v := values.get(str(name)), Tensor)]
    fixed = [shape[0] for shape in shapes if shape and is_concrete_int(shape[0])]
    if fixed and examples.shared_size is not None:
        size = int(fixed[0])
        yield f"the batch size is fixed at {size}: the model, or torch.export, leaves no other"


def _check(
    model: nn.Module, program: torch.export.ExportedProgram, examples: Examples, target: str
) -> None:
    """The program gives what the model gives, on the same inputs and on others."""
    ran = program.module()
    for other in (examples, examples.varied(_SEED)):
        wanted = flatten(run_once(model, other))
        fed = other.copied()
        with torch.no_grad():
            found = flatten(ran(*fed.args, **fed.kwargs))
        wrong = differing(wanted, found)
        if wrong:
            raise SaveError(
                f"Cannot write {target}: torch.export's program gives another {wrong} than the"
                " model, which does something that a graph does not hold (random numbers, a state"
                " of its own). Save the model: -o NAME.pt."
            )


def differing(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first output that is another one beyond rounding, or ""."""
    if wanted.keys() != found.keys():
        return f"set of outputs ({len(found)} in place of {len(wanted)})"
    for name, tensor in wanted.items():
        other = found[name]
        if tensor.shape != other.shape:
            return name
        if torch.equal(tensor, other) or bool(tensor.isnan().all()):
            continue
        eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
        if relative_error(other, tensor) > _MOST_EPS * eps:
            return name
    return ""


def _refused(error: ExportError, target: str) -> SaveError:
    why = str(error).removeprefix("Cannot export the model: ")
    return SaveError(f"Cannot write {target}: {why}")
