"""The weights of a model as a file holds them: by name, with the recipe beside."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bntools.architectures import build
from bntools.checkpoints import build_with_weights, some
from bntools.errors import SaveError
from bntools.formats.interface import Loaded, Request
from bntools.formats.kept import kept_whole
from bntools.formats.probe import Probe
from bntools.modules import unwrap
from bntools.originals import put_originals
from bntools.recipe import Recipe, apply_edits
from bntools.trust import Refusal

__all__ = ["Weights", "placed", "state_of"]

# Only names are offered for pasting into a shell.
_PLAIN = re.compile(r"[A-Za-z_][\w.]*:[\w.\-]+")
_NAME_IT = (
    "Name the architecture, such as --arch torchvision:resnet50, --arch timm:NAME or "
    "--arch package.module:factory (in Python arch=...)"
)


@dataclass(frozen=True)
class Weights:
    """What a file without a module holds, and whether bntools wrote it.

    `kept` are the data and the tensors of `kept_parts`.
    """

    tensors: Mapping[str, Any]
    recipe: dict[str, Any] | None = None
    arch: str | None = None
    ours: bool = False
    kept: tuple[Any, Mapping[str, Any]] | None = None


def placed(weights: Weights, probe: Probe, request: Request) -> Loaded:
    """The architecture that was asked for, with the recipe of the file and its weights."""
    recipe = Recipe() if weights.recipe is None else Recipe.from_dict(weights.recipe)
    if request.arch is None:
        cut = f", cut by {_counted(recipe)}" if recipe.edits else ""
        cure = (
            f"It was saved from {weights.arch}: add --arch {weights.arch} (in Python "
            f"arch={weights.arch!r})"
            if weights.arch is not None and _PLAIN.fullmatch(weights.arch)
            else _NAME_IT
        )
        raise probe.fails(
            f"it holds weights only ({len(weights.tensors)} tensors: {some(weights.tensors)})"
            f"{cut}, and not the model. {cure}"
        )
    arch = request.arch
    try:
        built = build_with_weights(arch, weights.tensors, recipe, exact=weights.ours)
    except Refusal as error:
        told = f"; the file says that it is of {weights.arch}" if weights.arch else ""
        raise Refusal(f"{error}{told}" if weights.arch != arch else str(error)) from error
    model, notes = built.model, built.notes
    if recipe.edits:
        notes.append(f"re-applied the recipe of the file to {arch}: {_counted(recipe)}")
    if weights.kept is not None:

        def before(edits: Recipe) -> nn.Module:
            return apply_edits(build(arch, built.classes), edits)

        kept = kept_whole(*weights.kept, recipe, before)
        put_originals(model, kept)
        notes.append(f"the originals of its fold are in it ({kept.nbytes() / 2**20:.1f} MiB)")
    return Loaded(model, tuple(notes), weights.recipe)


def _counted(recipe: Recipe) -> str:
    kinds = Counter(edit.kind for edit in recipe.edits)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def state_of(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model, detached. Raises `SaveError` where it cannot be had."""
    try:
        state = unwrap(model).state_dict()
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise SaveError(f"Cannot save the weights of the model: {why}.") from error
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}
