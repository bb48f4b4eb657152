"""Freezing: norm layers that keep to their running statistics, and those that move again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from bntools.dataflow.guard import unwritten
from bntools.errors import InputError, PlanError, SurgeryError
from bntools.examples import Examples, candidates, given
from bntools.modules import duplicate, named_modules, named_tensors, preserved, unwrap
from bntools.norms.conversion import FORMS
from bntools.norms.eligibility import (
    DIMS,
    Refusal,
    counts,
    freezing,
    kind_of,
    unfreezing,
    unsyncing,
)
from bntools.recipe import Edit, Recipe, apply_edits, mark, recipe_of
from bntools.report import Action, Decision, FreezeReport, Reason, Result
from bntools.selection import Patterns, select

__all__ = ["freeze", "unfreeze", "unsync"]


def freeze(
    model: nn.Module,
    *,
    affine: bool = False,
    only: Patterns = "*",
    skip: Patterns = (),
    inplace: bool = False,
    form: str = "bntools",
) -> Result[FreezeReport]:
    """Fix the running statistics of norm layers, through any later `model.train()`.

    A frozen layer normalises by its running statistics and never updates them: in training mode,
    copied, pickled, compiled or wrapped. It stays an instance of its class (`FrozenBatchNorm2d` is
    a `BatchNorm2d`), and the `state_dict` keys stay. `affine` also stops the gradients of weight
    and bias. With the form "torchvision" layers become torchvision's FrozenBatchNorm2d (timm's for
    those with an activation), in which the affine are buffers.

    The argument is left as it was, unless `inplace`. `only` and `skip` are globs on layer paths.

    Raises `PlanError` where a pattern selects nothing, `SurgeryError` for a model that cannot be
    copied.

    Example:
        >>> import torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> frozen = bntools.freeze(model).model.train()
        >>> _ = frozen(torch.rand(4, 3, 8, 8))
        >>> bool(frozen[1].running_mean.any()), isinstance(frozen[1], torch.nn.BatchNorm2d)
        (False, True)
    """
    if form not in FORMS:
        raise PlanError(f"Cannot freeze to the form {form!r}: choose one of {', '.join(FORMS)}.")
    layers = _layers(model)

    def answer(module: nn.Module) -> Refusal | str:
        return freezing(module, affine=affine, form=form)

    decisions = _decisions(layers, select(list(layers), only, skip), answer, Action.FREEZE)
    warnings = tuple(_tied(model, layers, decisions)) if affine else ()
    options = {"affine": affine} if form == FORMS[0] else {"form": form}
    edits = [Edit("freeze", d.path, options=options) for d in decisions if d.reason is None]
    report = FreezeReport("freeze", decisions, form, affine, warnings)
    return _carried_out(model, edits, report, inplace=inplace)


def unfreeze(
    model: nn.Module,
    *,
    only: Patterns = "*",
    skip: Patterns = (),
    inplace: bool = False,
) -> Result[FreezeReport]:
    """Let frozen norm layers move again: their statistics, and the gradients that were stopped.

    What `freeze` made becomes the class that it was, in the mode that it was last set to; the
    FrozenBatchNorm2d of torchvision and detectron becomes a BatchNorm2d with an affine to train.
    The other arguments and errors are those of `freeze`.

    Example:
        >>> import torch, bntools
        >>> frozen = bntools.freeze(torch.nn.Sequential(torch.nn.BatchNorm1d(8)), affine=True).model
        >>> model = bntools.unfreeze(frozen).model
        >>> type(model[0]).__name__, model[0].training, model[0].weight.requires_grad
        ('BatchNorm1d', True, True)
    """
    layers = _layers(model)
    chosen = select(list(layers), only, skip)
    decisions = _decisions(layers, chosen, unfreezing, Action.UNFREEZE)
    edits = [Edit("unfreeze", d.path) for d in decisions if d.reason is None]
    report = FreezeReport("unfreeze", decisions)
    return _carried_out(model, edits, report, inplace=inplace)


def unsync(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    only: Patterns = "*",
    skip: Patterns = (),
    inplace: bool = False,
) -> Result[FreezeReport]:
    """Make SyncBatchNorm layers BatchNorm layers, of the dimensions that their inputs have.

    timm's SyncBatchNormAct becomes a BatchNormAct2d and keeps its activation; frozen layers stay
    frozen. The model is run in eval mode to see the inputs of its layers: `example_inputs` is a
    tensor, a tuple of positional or a dict of keyword arguments, and is inferred where it is not
    given. The other arguments and errors are those of `freeze`.

    Raises `InputError` where the model does not run.

    Example:
        >>> import torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SyncBatchNorm(8))
        >>> type(bntools.unsync(model, torch.zeros(1, 3)).model[1]).__name__
        'BatchNorm1d'
    """
    layers = {p: m for p, m in _layers(model).items() if isinstance(m, nn.SyncBatchNorm)}
    chosen = select(list(layers), only, skip)
    ranks = _input_ranks(unwrap(model), layers.values(), example_inputs) if chosen else {}

    def answer(module: nn.Module) -> Refusal | str:
        return unsyncing(module, frozenset(ranks[id(module)]))

    decisions = _decisions(layers, chosen, answer, Action.CONVERT)
    edits = [
        Edit("unsync", d.path, options={"dims": DIMS[min(ranks[id(layers[d.path])])]})
        for d in decisions
        if d.reason is None
    ]
    report = FreezeReport("unsync", decisions)
    return _carried_out(model, edits, report, inplace=inplace)


def _input_ranks(
    model: nn.Module, layers: Iterable[nn.Module], example_inputs: Any
) -> dict[int, set[int]]:
    """The ranks of what layers, by their ids, are given in a forward on inputs that run."""
    failure: Exception | None = None
    for examples in candidates(model) if example_inputs is None else [given(example_inputs)]:
        ranks: dict[int, set[int]] = {id(layer): set() for layer in layers}
        try:
            _run(model, layers, examples, ranks)
        except Exception as error:  # noqa: BLE001 - models raise anything
            failure = failure or error
        else:
            return ranks
    told = " ".join(str(failure).split())[:200] if failure is not None else "no input was found"
    raise InputError(f"Cannot run the model: {told}. Give example inputs (--input-shape).")


def _run(
    model: nn.Module, layers: Iterable[nn.Module], examples: Examples, ranks: dict[int, set[int]]
) -> None:
    def note(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        ranks[id(layer)].add((*inputs, *named.values())[0].dim())

    with preserved(model), unwritten(model), torch.no_grad():
        model.eval()
        for layer in layers:
            # `preserved` takes it away
            layer.register_forward_pre_hook(note, with_kwargs=True)
        fed = examples.copied()
        model(*fed.args, **fed.kwargs)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in named_modules(unwrap(model)) if counts(module)}


def _decisions(
    layers: Mapping[str, nn.Module],
    chosen: set[str],
    answer: Callable[[nn.Module], Refusal | str],
    action: Action,
) -> tuple[Decision, ...]:
    skipped = Reason.SKIPPED, "it was left out by --only or --skip"
    return tuple(
        _decision(path, module, answer(module) if path in chosen else skipped, action)
        for path, module in layers.items()
    )


def _decision(path: str, module: nn.Module, told: Refusal | str, action: Action) -> Decision:
    if isinstance(told, str):
        return Decision(path, kind_of(module), action, detail=told)
    return Decision(path, kind_of(module), Action.KEEP, reason=told[0], detail=told[1])


def _tied(
    model: nn.Module, layers: Mapping[str, nn.Module], decisions: tuple[Decision, ...]
) -> Iterator[str]:
    """What else loses its gradients with an affine."""
    frozen = {id(layers[d.path]) for d in decisions if d.reason is None}
    own = {
        id(parameter): d.path
        for d in decisions
        if d.reason is None
        for parameter in layers[d.path]._parameters.values()
        if parameter is not None
    }
    for path, owner, name, tensor in named_tensors(unwrap(model)):
        if id(tensor) in own and id(owner) not in frozen:
            yield f"{path}.{name} is a parameter of {own[id(tensor)]}, too: its gradients stop"


def _carried_out(
    model: nn.Module, edits: list[Edit], report: FreezeReport, *, inplace: bool
) -> Result[FreezeReport]:
    source = unwrap(model)
    recipe = Recipe(tuple(edits))
    target = source if inplace else _copied(source)
    changed = apply_edits(target, recipe)
    whole = recipe_of(source).then(recipe)
    if edits:
        mark(changed, whole)
    return Result(model if inplace and changed is source else changed, report, whole)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return duplicate(model)
    except RecursionError as error:
        raise SurgeryError(f"Cannot copy the model: {error}.") from error
