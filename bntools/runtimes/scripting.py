"""From a PyTorch model to TorchScript: compiled where torch.jit.script can, else traced."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from bntools.errors import SaveError
from bntools.examples import Examples
from bntools.modules import duplicate
from bntools.outputs import Outputs, flatten
from bntools.runtimes.capturing import differing, run_once, runnable
from bntools.runtimes.exporting import quietly

__all__ = ["scripted"]

_SEED = 40


def scripted(
    model: nn.Module, example_inputs: Any, target: str
) -> tuple[torch.jit.ScriptModule, tuple[str, ...]]:
    """A model in eval mode as TorchScript, compared with it, and what the user should know.

    Raises `SaveError`, which names `target`.
    """
    if isinstance(model, torch.jit.ScriptModule):
        return model, ()
    with quietly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = duplicate(model)
        source.eval()
        examples = runnable(source, example_inputs, target, tool="TorchScript")
        made, notes = _compiled(source, examples, target)
        _check(source, made, examples, target)
    return made, notes


def _compiled(source: nn.Module, examples: Examples, target: str) -> tuple[Any, tuple[str, ...]]:
    try:
        made = torch.jit.script(source)
        flatten(run_once(made, examples))
    except Exception:  # noqa: BLE001 - the compiler raises anything for code that it does not know
        try:
            with torch.no_grad():
                traced = _traced(source, examples)
        except Exception as error:
            raise SaveError(
                f"Cannot write {target}: TorchScript can neither compile nor trace the model"
                f" ({' '.join(str(error).split())[:200]}). Save a program or the model: -o NAME.pt2"
                " or NAME.pt."
            ) from error
        return traced, ("the model was traced: it does what it did for inputs like these",)
    return made, ()


def _traced(source: nn.Module, examples: Examples) -> Any:
    named = {"example_kwarg_inputs": examples.kwargs} if examples.kwargs else {}
    args = None if named else examples.args
    trace: Any = torch.jit.trace
    return trace(source, args, strict=False, check_trace=False, **named)


def _check(source: nn.Module, made: Any, examples: Examples, target: str) -> None:
    others = [examples, examples.varied(_SEED)]
    doubled = examples.doubled()
    if doubled is not None:
        others.append(doubled)
    for other in others:
        wanted = _given(source, other)
        if wanted is None:  # another batch is more than the model has to take
            continue
        try:
            wrong = differing(wanted, flatten(run_once(made, other)))
        except Exception as error:  # noqa: BLE001 - as a trace of a fixed size does
            wrong = f"result ({' '.join(str(error).split())[:120]})"
        if wrong:
            raise SaveError(
                f"Cannot write {target}: TorchScript gives another {wrong} than the model for"
                f" {other}. Save a program or the model: -o NAME.pt2 or NAME.pt."
            )


def _given(source: nn.Module, examples: Examples) -> Outputs | None:
    try:
        return flatten(run_once(source, examples))
    except Exception:  # noqa: BLE001 - models raise anything
        return None
