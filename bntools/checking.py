"""Whether activations that were removed are gone, and all others still there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import nn

from bntools.activations import Following, activation_calls
from bntools.dataflow.graph import Graph
from bntools.dataflow.guard import unwritten
from bntools.dataflow.reach import Refused
from bntools.equivalence import run
from bntools.modules import get_module, named_modules, preserved
from bntools.observing import Observation
from bntools.report import Reason

__all__ = ["Refusals", "still_running", "used_in_training", "wrongly_traced"]

Refusals = dict[str, Refused]
Taken = Mapping[str, Following]


def wrongly_traced(seen: Observation, copied: nn.Module, taken: Taken) -> Refusals:
    """The norms in modules whose forward gives other numbers as torch.fx sees it.

    `copied` is a copy of the model in which these forwards were traced, and nothing removed.
    """
    blocks = sorted({f.path for f in taken.values() if f.after is not None})
    wrong: set[str] = set()
    for examples in (seen.examples, seen.second) if blocks else ():
        _, mine = run(seen.model, examples, watch=blocks)
        _, theirs = run(copied, examples, watch=blocks)
        wrong.update(b for b in blocks if not _same(mine.get(b), theirs.get(b)))
    why = "its forward gives other numbers when torch.fx traces it"
    return {
        norm: Refused(Reason.ACTIVATION_STAYS, f"{found} cannot be removed: {why}")
        for norm, found in taken.items()
        if found.after is not None and found.path in wrong
    }


def used_in_training(seen: Observation, taken: Taken) -> Refusals:
    """The norms whose activation module is called more often in training mode.

    A model that does not run in training mode on these inputs says nothing.
    """
    parts = {f.path: f for f in taken.values() if f.after is None and _own_caller(seen.model, f)}
    counts: Counter[str] = Counter()
    if not parts:
        return {}
    handles = [
        get_module(seen.model, path).register_forward_pre_hook(
            lambda *_, path=path: counts.update([path])
        )
        for path in parts
    ]
    fed = seen.second.copied()
    try:
        with preserved(seen.model), unwritten(seen.model), torch.no_grad():
            for _, module in named_modules(seen.model):
                module.training = True
            seen.model(*fed.args, **fed.kwargs)
    except Exception:  # noqa: BLE001 - a model may raise anything in training mode
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {
        norm: Refused(Reason.ACTIVATION_STAYS, f"{found} is used elsewhere in training mode")
        for norm, found in taken.items()
        if found.path in parts and counts[found.path] > len(found.stacks)
    }


def still_running(before: Graph, after: Graph, taken: Taken, norms: Set[str]) -> Refusals:
    """The norms whose activation still runs after the surgery, or with which others went.

    Compared are the calls of activations in and directly below the modules that were changed.
    """
    had, has = (Counter(_outside(activation_calls(g), norms)) for g in (before, after))
    gone = Counter(stack for found in taken.values() for stack in found.stacks)
    refused: Refusals = {}
    for norm, found in taken.items():
        near = _near(found)
        wrong = [s for s in had.keys() | has.keys() if near(s) and has[s] != had[s] - gone[s]]
        if wrong:
            where = wrong[0][-1] or "the model itself"
            refused[norm] = Refused(
                Reason.ACTIVATION_STAYS, f"the activations in {where} did not come out as planned"
            )
    return refused


def _own_caller(model: nn.Module, found: Following) -> bool:
    """Whether code other than a plain Sequential's calls an activation module."""
    callers = (get_module(model, stack[-2]) for stack in found.stacks)
    return any(type(caller).forward is not nn.Sequential.forward for caller in callers)


def _outside(stacks: Iterable[tuple[str, ...]], norms: Set[str]) -> list[tuple[str, ...]]:
    return [stack for stack in stacks if norms.isdisjoint(stack)]


def _near(found: Following) -> Any:
    callers = {stack[: -1 if found.after is None else None] for stack in found.stacks}
    places = {c if found.after is None else _up_to(c, found.path) for c in callers}
    return lambda stack: any(stack[: len(p)] == p and len(stack) <= len(p) + 1 for p in places)


def _up_to(stack: tuple[str, ...], path: str) -> tuple[str, ...]:
    """The part of a stack that ends with a module (the model's own path is there twice)."""
    last = max(index for index, each in enumerate(stack) if each == path)
    return stack[: last + 1]


def _same(a: Any, b: Any) -> bool:
    return a is not None and b is not None and torch.equal(a, b)
