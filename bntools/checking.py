"""Whether activations that were removed are gone, and all others still there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from bntools.activations import Following, activation_calls
from bntools.dataflow.graph import Graph
from bntools.dataflow.guard import unwritten
from bntools.dataflow.reach import Refused
from bntools.dataflow.recorder import record
from bntools.dataflow.twins import first_difference
from bntools.equivalence import run
from bntools.examples import Examples
from bntools.modules import get_module, named_modules, preserved
from bntools.observing import Observation
from bntools.outputs import Outputs, flatten
from bntools.report import Reason
from bntools.rewriting import Rewritten

__all__ = ["Refusals", "does_the_same", "still_running", "used_in_training", "wrongly_traced"]

Refusals = dict[str, Refused]
_ROUNDING = 1e-4  # the same operations in the same order: only a GPU may round otherwise
Taken = Mapping[str, Following]


def wrongly_traced(seen: Observation, copied: nn.Module, taken: Taken) -> Refusals:
    """The norms in modules whose forward is another one as torch.fx sees it.

    `copied` is a copy of the model in which these forwards were traced, and nothing removed.
    """
    blocks = sorted({f.path for f in taken.values() if f.after is not None})
    wrong = _with_other_numbers(seen, copied, blocks)
    why = "its forward fails, or gives other numbers, when torch.fx traces it"
    if not wrong:
        wrong = _otherwise(seen, copied, blocks)
        why = "torch.fx sees other values in its forward, which writes in place"
    return {
        norm: Refused(Reason.ACTIVATION_STAYS, f"{found} cannot be removed: {why}")
        for norm, found in taken.items()
        if found.after is not None and found.path in wrong
    }


def _otherwise(seen: Observation, copied: nn.Module, blocks: Sequence[str]) -> set[str]:
    """Where the operations, or the values that they take, are others: the numbers may not tell."""
    for examples in (seen.examples, seen.second) if blocks else ():
        both = (examples.copied(), examples.copied())
        graph, twin = (
            record(model, fed.args, fed.kwargs)
            for model, fed in zip((seen.model, copied), both, strict=True)
        )
        node = first_difference(graph, twin)
        if node is not None:
            ran = [path for path in node.stack if path in blocks]
            return set(ran[-1:] or blocks)
    return set()


def _with_other_numbers(seen: Observation, copied: nn.Module, blocks: Sequence[str]) -> set[str]:
    wrong: set[str] = set()
    for examples in (seen.examples, seen.second) if blocks else ():
        _, mine = run(seen.model, examples, watch=blocks)
        try:
            _, theirs = run(copied, examples, watch=blocks)
        except Exception:  # noqa: BLE001 - a forward that was traced may raise anything
            wrong.update(b for b in blocks if not _runs_alone(copied, blocks, b, examples))
        else:
            wrong.update(b for b in blocks if not _same(mine.get(b), theirs.get(b)))
    return wrong


def _runs_alone(copied: nn.Module, blocks: Sequence[str], block: str, examples: Examples) -> bool:
    """Whether the model runs where only this one of the blocks has its traced forward."""
    others = [get_module(copied, path) for path in blocks if path != block]
    traced = [(module, type(module)) for module in others if isinstance(module, Rewritten)]
    try:
        for module, cls in traced:
            module.__class__ = cls.__mro__[2]
        run(copied, examples)
    except Exception:  # noqa: BLE001 - as above
        return False
    finally:
        for module, cls in traced:
            module.__class__ = cls
    return True


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
                if not isinstance(module, torch.jit.ScriptModule):
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


def does_the_same(seen: Observation, standing_in: nn.Module) -> bool:
    """Whether a copy gives what the model gives, in eval mode and in training mode.

    In the copy the norms do the work of the activations that were removed. A model that does not
    run in training mode on these inputs, or gives other numbers each time, says nothing there.
    """
    return all(
        _alike(seen.model, standing_in, examples, training=training)
        for training, examples in (
            (False, seen.examples),
            (False, seen.second),
            (True, seen.second),
        )
    )


def _alike(model: nn.Module, copied: nn.Module, examples: Examples, *, training: bool) -> bool:
    try:
        mine = _given(model, examples, training=training)
    except Exception:  # noqa: BLE001 - a model may raise anything in training mode
        return True
    try:
        theirs = _given(copied, examples, training=training)
    except Exception:  # noqa: BLE001 - as above
        return False
    if _close(mine, theirs):
        return True
    return not _close(mine, _given(model, examples, training=training))


def _given(model: nn.Module, examples: Examples, *, training: bool) -> Outputs:
    """The outputs of one forward in a mode; every trace of it is undone."""
    if not training:
        return run(model, examples)[0]
    fed = examples.copied()
    with preserved(model), unwritten(model), torch.no_grad():
        torch.manual_seed(0)
        for _, module in named_modules(model):
            if not isinstance(module, torch.jit.ScriptModule):
                module.training = True
        return flatten(model(*fed.args, **fed.kwargs))


def _close(a: Outputs, b: Outputs) -> bool:
    if a.keys() != b.keys():
        return False
    return all(
        x.shape == b[name].shape
        and torch.allclose(
            x.cpu().double(), b[name].cpu().double(), rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True
        )
        for name, x in a.items()
    )


def still_running(before: Graph, after: Graph, taken: Taken, norms: Set[str]) -> Refusals:
    """The norms whose activation still runs after the surgery, or with which others went.

    Compared are the numbers of calls of activations in, and directly below, the modules that were
    changed: a module that is there under two names may go by the other one afterwards.
    """
    had, has = (_outside(activation_calls(graph), norms) for graph in (before, after))
    gone = [stack for found in taken.values() for stack in found.stacks]
    refused: Refusals = {}
    for norm, found in taken.items():
        for place in _places(found):
            counts = [sum(_is_at(stack, place) for stack in calls) for calls in (had, has, gone)]
            if counts[1] != counts[0] - counts[2]:
                where = place[-1] or "the model itself"
                refused[norm] = Refused(
                    Reason.ACTIVATION_STAYS,
                    f"the activations in {where} did not come out as planned",
                )
    return refused


def _own_caller(model: nn.Module, found: Following) -> bool:
    """Whether code other than a plain Sequential's calls an activation module."""
    callers = (get_module(model, stack[-2]) for stack in found.stacks)
    return any(type(caller).forward is not nn.Sequential.forward for caller in callers)


def _outside(stacks: Iterable[tuple[str, ...]], norms: Set[str]) -> list[tuple[str, ...]]:
    return [stack for stack in stacks if norms.isdisjoint(stack)]


def _places(found: Following) -> set[tuple[str, ...]]:
    """The calls of the module in which an activation went: who was running then."""
    if found.after is None:
        return {stack[:-1] for stack in found.stacks}
    return {_up_to(stack, found.path) for stack in found.stacks}


def _is_at(stack: tuple[str, ...], place: tuple[str, ...]) -> bool:
    return stack[: len(place)] == place and len(stack) <= len(place) + 1


def _up_to(stack: tuple[str, ...], path: str) -> tuple[str, ...]:
    """The part of a stack that ends with a module (the model's own path is there twice)."""
    last = max(index for index, each in enumerate(stack) if each == path)
    return stack[: last + 1]


def _same(a: Any, b: Any) -> bool:
    return a is not None and b is not None and torch.equal(a, b)
