"""Kept originals beside weights: as plain data and tensors, and back through the architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bntools.checkpoints import fill_exactly
from bntools.modules import get_module
from bntools.originals import Originals
from bntools.recipe import Recipe
from bntools.trust import Refusal

__all__ = ["KEPT", "kept_parts", "kept_whole"]

KEPT = "bntools_originals"
_MOST_STEPS = 100
_DAMAGED = "its kept originals are damaged. Copy it again"


def kept_parts(kept: Originals) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What is kept as JSON data, the latest surgery first, and its tensors by name."""
    steps: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, step in enumerate(kept.chain):
        steps.append(
            {
                "before": step.before,
                "after": step.after,
                "layers": list(step.layers),
                "tensors": list(step.tensors),
                "absent": list(step.absent),
                "digests": dict(step.digests),
                "values": {path: dict(values) for path, values in step.values.items()},
            }
        )
        tensors.update({f"{number}.{name}": t for name, t in step.all_tensors().items()})
    return steps, tensors


def kept_whole(
    steps: Any,
    tensors: Mapping[str, Any],
    recipe: Recipe,
    architecture: Callable[[Recipe], nn.Module],
) -> Originals:
    """What `kept_parts` took apart; the layers are those of the architecture before the surgery.

    Raises `Refusal` for data of another shape, `LoadError` where the tensors do not fit.
    """
    if not isinstance(steps, (list, tuple)) or not 0 < len(steps) <= _MOST_STEPS:
        raise Refusal(_DAMAGED)
    kept: Originals | None = None
    for number, data in reversed(list(enumerate(steps))):
        kept = _step(data, kept, len(recipe.edits))
        before = architecture(Recipe(recipe.edits[: kept.before]))
        own = {
            name.removeprefix(f"{number}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{number}.") and isinstance(tensor, Tensor)
        }
        for path in _names(data, "layers"):
            kept.layers[path] = _layer(before, path, own)
        for name in _names(data, "tensors"):
            if name not in own:
                raise Refusal(_DAMAGED)
            path, _, attribute = name.rpartition(".")
            buffers = get_module(before, path)._buffers
            found = own[name].clone()
            kept.tensors[name] = (
                found
                if attribute in buffers
                else nn.Parameter(found, requires_grad=found.is_floating_point())
            )
    if kept is None or not kept.is_sound():
        raise Refusal(_DAMAGED)
    return kept


def _step(data: Any, earlier: Originals | None, edits: int) -> Originals:
    before, after = (data.get(k) if isinstance(data, dict) else None for k in ("before", "after"))
    if type(before) is not int or type(after) is not int or not 0 <= before <= after <= edits:
        raise Refusal(_DAMAGED)
    kept = Originals(before, after, earlier)
    kept.absent = _names(data, "absent")
    digests, values = data.get("digests"), data.get("values")
    if not isinstance(digests, dict) or not isinstance(values, dict):
        raise Refusal(_DAMAGED)
    kept.digests = {str(name): str(value) for name, value in digests.items()}
    kept.values = {str(path): _simple(found) for path, found in values.items()}
    return kept


def _names(data: Mapping[str, Any], key: str) -> list[str]:
    names = data.get(key)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise Refusal(_DAMAGED)
    return list(names)


def _simple(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise Refusal(_DAMAGED)
    return {str(name): _untuple(value) for name, value in values.items()}


def _untuple(value: Any) -> Any:
    """JSON has lists where attributes had tuples."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_untuple(item) for item in value)
    return value


def _layer(model: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    layer = get_module(model, path)
    prefix = f"{path}." if path else ""
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    fill_exactly(layer, own, path or "the model")
    return layer
