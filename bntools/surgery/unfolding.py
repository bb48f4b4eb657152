"""Unfolding: what a fold has kept comes back, and the recipe loses the edits of the fold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bntools.errors import BNToolsError, SurgeryError
from bntools.modules import duplicate, named_modules, unwrap
from bntools.originals import Originals, bring_back, originals_of, put_originals
from bntools.recipe import Edit, Recipe, mark, recipe_of
from bntools.report import Action, Decision, Result, UnfoldReport

__all__ = ["unfold"]

_FOLDING = frozenset({"drop-norm", "neutralise", "merge-branches", "merge-linear", "pad-forward"})


@torch.inference_mode(mode=False)
def unfold(model: nn.Module, recipe: Recipe | None = None) -> Result[UnfoldReport]:
    """Bring back what a fold with `keep_originals` removed or changed, to the bit.

    The BatchNorm layers stand where they stood, the weights have their old values, and the recipe
    loses the edits of the fold, so that the result loads into the original class. What was edited
    elsewhere since then stays. `recipe` is the one of the model where it is not noted on it.
    The argument is left as it was. Recalibrating or training the result is recalibrating or
    training the original; fold again afterwards.

    Raises `SurgeryError` where nothing was folded, where the originals were not kept, and where
    what the fold made was changed since (trained, cast, replaced).

    Example:
        >>> import torch, bntools
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> folded = bntools.fold(model, torch.rand(1, 3, 8, 8), keep_originals=True).model
        >>> again = bntools.unfold(folded).model
        >>> torch.equal(again[0].weight, model[0].weight), type(again[1]).__name__
        (True, 'BatchNorm2d')
    """
    source = unwrap(model)
    edits = (recipe_of(source) if recipe is None else recipe).edits
    kept = _kept(source, edits)
    work = _copied(source)
    chain = kept.chain
    try:
        for step in chain:
            edits = _without(edits, step)
            work = bring_back(work, step)
        size = kept.nbytes()
    except BNToolsError:
        raise
    except Exception as error:  # the originals come from a file
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise SurgeryError(
            f"Cannot unfold the model: its originals are damaged ({why})."
        ) from error
    put_originals(work, None)
    mark(work, Recipe(edits))
    _set_mode(work, training=source.training)
    return Result(work, _report(work, chain, size), Recipe(edits))


def _kept(source: nn.Module, edits: Sequence[Edit]) -> Originals:
    kept = originals_of(source)
    if kept is not None:
        return kept
    if not any(edit.kind in _FOLDING for edit in edits):
        raise SurgeryError("Cannot unfold the model: nothing was folded in it.")
    raise SurgeryError(
        "Cannot unfold the model: its originals were not kept, and a fold cannot be undone from its"
        " result alone. Fold the original again with --keep-originals (keep_originals=True)."
    )


def _copied(model: nn.Module) -> nn.Module:
    try:
        return duplicate(model)
    except RecursionError as error:
        raise SurgeryError(f"Cannot copy the model: {error}.") from error


def _without(edits: tuple[Edit, ...], kept: Originals) -> tuple[Edit, ...]:
    """The edits without those of one surgery; later ones must be of other layers."""
    later = edits[kept.after :]
    if not 0 <= kept.before <= kept.after <= len(edits):
        raise SurgeryError("Cannot unfold the model: its originals belong to another recipe.")
    for edit in later:
        for path in kept.layers:
            if edit.path == path or edit.path.startswith(f"{path}.") or not path:
                raise SurgeryError(
                    f"Cannot unfold {path or 'the model'}: {edit.path or 'the model'} was changed"
                    f" since the fold ({edit.kind}). Unfold first, then change it."
                )
    return (*edits[: kept.before], *later)


def _set_mode(model: nn.Module, *, training: bool) -> None:
    """What comes back is in the mode of the model, as its other layers."""
    if training:
        model.train()


def _report(model: nn.Module, chain: Sequence[Originals], size: int) -> UnfoldReport:
    layers = {path: layer for step in chain for path, layer in step.layers.items()}
    order = [path for path, _ in named_modules(model)]
    rows = tuple(
        Decision(path, type(layers[path]).__name__, Action.UNFOLD, detail="as before the fold")
        for path in order
        if path in layers
    )
    tensors = dict.fromkeys(name for step in chain for name in step.tensors)
    removed = dict.fromkeys(name for step in chain for name in step.absent)
    return UnfoldReport(rows, tuple(tensors), tuple(removed), size)
