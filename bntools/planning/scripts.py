"""TorchScript: what torch's own pass folds, as a plan.

A compiled module cannot be edited layer by layer. `torch._C._jit_pass_fold_convbn` folds what its
patterns find, all or nothing, on a copy that keeps methods, attributes and parameters. What it did
is read off two recordings, before and after; whether it did it right is for the check.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from bntools.dataflow.graph import Graph, Kind, Node
from bntools.dataflow.recorder import record
from bntools.equivalence import in_float64
from bntools.errors import PlanError
from bntools.examples import Examples
from bntools.observing import Observation
from bntools.report import Action, Decision, Reason
from bntools.selection import Patterns

__all__ = ["ADVICE", "is_scripted", "plan_script"]

ADVICE = "fold the model that it was made from, or export that (torch.export) and fold the .pt2"
_PATIENCE = 120.0
_LEFT = f"torch's pass for TorchScript leaves it; {ADVICE}"


def is_scripted(model: nn.Module) -> bool:
    """Whether a whole model is TorchScript."""
    return isinstance(model, torch.jit.ScriptModule)


def plan_script(
    seen: Observation, only: Patterns, skip: Patterns
) -> tuple[tuple[Decision, ...], nn.Module | None]:
    """What torch's pass folds in a compiled model, and a copy in float64 in which it has.

    Raises `PlanError` for a selection of layers.
    """
    if only not in ("*", ("*",), ["*"]) or tuple(skip):
        raise PlanError(
            "Cannot select norm layers in TorchScript: torch folds all that it can. Leave out only"
            f" and skip (--only, --skip), or {ADVICE}."
        )
    before = seen.graphs[0]
    folded, why = _folded(seen.model)
    after = _recorded(folded, seen.examples) if folded is not None else None
    if folded is not None and after is None:
        folded, why = None, "what torch's pass makes of the model does not run"
    return _decisions(before, after, why), folded


def _decisions(before: Graph, after: Graph | None, why: str) -> tuple[Decision, ...]:
    """One decision for every norm layer, in the order in which they run."""
    ran = _norms(before)
    left = _norms(after) if after is not None else ran
    order = {path: node.order for path, node in ran.items()}
    layers = sorted(before.layers, key=lambda layer: order.get(layer.path, len(before.nodes)))
    return tuple(_decision(layer.path, layer.kind, ran, left, why) for layer in layers)


def _decision(
    path: str, kind: str, ran: dict[str, Node], left: dict[str, Node], why: str
) -> Decision:
    if path not in ran:
        detail = "it did not run, or it normalises each batch by itself"
        return Decision(path, kind, Action.KEEP, (), Reason.NOT_EXECUTED, detail)
    if path in left:
        detail = f"{why}; {ADVICE}" if why else _LEFT
        return Decision(path, kind, Action.KEEP, (), Reason.SCRIPTED, detail)
    return Decision(path, kind, Action.FOLD, _hosts(ran[path]))


def _norms(graph: Graph) -> dict[str, Node]:
    """The norm layers that ran with their running statistics, by path."""
    return {node.norm.owner: node for node in graph.of_kind(Kind.AFFINE)}


def _hosts(node: Node) -> tuple[str, ...]:
    """The layer whose weight made what the norm takes."""
    producer = node.inputs[0].producer
    used = producer.inputs if producer is not None else []
    names = (v.parameter for v in used if v.parameter is not None and len(v.shape) > 1)
    return tuple(name.rpartition(".")[0] for name in names)[:1]


def _folded(model: nn.Module) -> tuple[nn.Module | None, str]:
    """A copy in float64 in which torch's pass has folded what it can, or why there is none."""
    try:
        exact: Any = in_float64(model)
        exact.eval()
        if not _survives(lambda: _fold(exact)):
            return None, "torch's pass crashes on the model"
        return _fold(exact), ""
    except Exception as error:  # noqa: BLE001 - torch asserts anything here
        return None, f"torch's pass fails on the model ({' '.join(str(error).split())[:80]})"


def _fold(exact: Any) -> nn.Module:
    folded = torch._C._jit_pass_fold_convbn(exact._c)  # noqa: SLF001 - the pass has no public name
    wrap: Any = torch.jit._recursive.wrap_cpp_module  # noqa: SLF001 - nor has this
    wrapped: nn.Module = wrap(folded)
    return wrapped


def _survives(work: Callable[[], object]) -> bool:
    """Whether something leaves a process alive: tried in a child, as a crash has no exception."""
    if not hasattr(os, "fork"):
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child starts none
        child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            torch.set_num_threads(1)
            with suppress(Exception):  # that is told by the parent
                work()
        finally:
            os._exit(0)
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _recorded(model: nn.Module, examples: Examples) -> Graph | None:
    fed = examples.cast(torch.float64, "cpu")
    try:
        return record(model, fed.args, fed.kwargs)
    except Exception:  # noqa: BLE001 - it does not run in float64, or not any more
        return None
