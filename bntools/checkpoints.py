"""Weights: where checkpoints hide them, and how they get into an architecture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from bntools.architectures import LIBRARIES, build
from bntools.errors import LoadError
from bntools.trust import Refusal

__all__ = ["build_with_weights", "find_weights", "some"]

_KNOWN_KEYS = (
    "state_dict",
    "model",
    "model_state_dict",
    "ema",
    "state_dict_ema",
    "model_ema",
    "params",
)
_SHOWN = 4


def find_weights(content: Any) -> tuple[Any, list[str]]:
    """The model or the weights in a checkpoint, and what to say about the choice."""
    if _is_state_dict(content):
        return content, []
    places = dict(_places(content))
    if not places:
        raise Refusal(f"it holds {_described(content)}, and no model and no weights")
    usual = sorted((rank for rank in map(_rank, places) if rank), key=lambda rank: rank[:2])
    if not usual and len(places) > 1:
        raise Refusal(
            f"it holds several sets of weights ({some(places)}) and none under a usual name. "
            "Save the one that you want alone"
        )
    where = usual[0][2] if usual else next(iter(places))
    others = [place for place in places if place != where]
    instead = f", not those at {some([repr(place) for place in others])}" if others else ""
    return places[where], [f"took the weights at {where!r}{instead}"]


def _rank(place: str) -> tuple[int, int, str] | None:
    """How usual a place is: its depth, then the order of the usual keys."""
    key = place.rpartition(".")[2]
    return (place.count("."), _KNOWN_KEYS.index(key), place) if key in _KNOWN_KEYS else None


def _places(content: Any, above: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        # The moments of an optimizer look like weights.
        entries = [] if "param_groups" in content else list(content.items())
    elif isinstance(content, (list, tuple)):
        entries = list(enumerate(content))
    else:
        return
    for key, value in entries:
        place = f"{above}.{key}" if above else str(key)
        if isinstance(value, nn.Module) or _is_state_dict(value):
            yield place, value
        elif depth < 3:
            yield from _places(value, place, depth + 1)


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and any(isinstance(v, Tensor) and v.is_floating_point() for v in content.values())
        and all(
            isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))
            for key, value in content.items()
        )
    )


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        if "param_groups" in content or "optimizer" in content:
            return "the state of an optimizer"
        return f"a dict with the keys {some(content)}" if content else "an empty dict"
    if isinstance(content, Tensor):
        return f"a single tensor of shape {tuple(content.shape)}"
    return f"a {type(content).__name__}"


def some(names: Any) -> str:
    """The first few names, for a message."""
    shown = [str(name) for name in list(names)[:_SHOWN]]
    return ", ".join(shown) + (", ..." if len(names) > _SHOWN else "")


def build_with_weights(arch: str, weights: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    """The architecture with the weights of a state dict, strictly."""
    model = build(arch)
    state, notes = _renamed(weights, model.state_dict().keys())
    for classes in _class_counts(arch, _misshapen(model, state)):
        with suppress(LoadError):  # not every architecture has classes
            other = build(arch, classes)
            if not _misshapen(other, state):
                model = other
                notes.append(f"built {arch} with {classes} classes, as in the file")
                break
    notes += _fit_precision(model, state)
    _fill(model, state, arch)
    return model, notes


def _renamed(weights: Mapping[str, Any], expected: Iterable[str]) -> tuple[Any, list[str]]:
    """The weights under the architecture's names: without what wrappers put before them."""
    names, notes = {key: key for key in weights}, []
    compiled = "_orig_mod."
    if any(compiled in key for key in weights) and not any(compiled in key for key in expected):
        names = {key: key.replace(compiled, "") for key in names}
        notes.append(f"removed {compiled!r} from the names of the weights")
    if "n_averaged" in names and "n_averaged" not in expected:
        del names["n_averaged"]
        notes.append("left out 'n_averaged', the counter of an averaged model")
    while prefix := _shared_prefix(names.values(), expected):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
        notes.append(f"removed {prefix!r} from the names of the weights")
    if not notes:
        return weights, notes
    return {name: weights[key] for key, name in names.items()}, notes


def _shared_prefix(names: Iterable[str], expected: Iterable[str]) -> str:
    first = {name.partition(".")[0] + "." for name in names}
    prefix = first.pop() if len(first) == 1 else ""
    unknown = prefix and not any(name.startswith(prefix) for name in expected)
    return prefix if unknown and all(name.startswith(prefix) for name in names) else ""


_Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def _misshapen(model: nn.Module, state: Mapping[str, Any]) -> _Shapes:
    """The shapes in the file and in the model of the tensors that differ."""
    pairs = {
        name: (tuple(state[name].shape), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if isinstance(state.get(name), Tensor)
        and isinstance(tensor, Tensor)
        and not nn.parameter.is_lazy(tensor)
    }
    # Scalars were tensors of one element before torch 0.4, and load_state_dict takes both.
    return {k: (a, b) for k, (a, b) in pairs.items() if a != b and (a, b) != ((1,), ())}


def _class_counts(arch: str, wrong: _Shapes) -> list[int]:
    """The numbers of classes that could explain the shapes, where only a classifier differs."""
    if arch.partition(":")[0] not in LIBRARIES:
        return []
    if not all(a and b and a[1:] == b[1:] for a, b in wrong.values()):
        return []
    return sorted({a[0] for a, _ in wrong.values()})


def _fit_precision(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Let the model compute in float64 where its weights do; other types become the model's."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    types = {t.dtype for t in tensors if t.is_floating_point()}
    if types == {torch.float64}:
        model.double()
        return ["the weights are float64, and so is the model"]
    narrow = sorted(str(t).removeprefix("torch.") for t in types if t.itemsize < 4)
    return [f"weights of type {', '.join(narrow)} become float32"] if narrow else []


def _fill(model: nn.Module, state: Mapping[str, Any], arch: str) -> None:
    wrong = _misshapen(model, state)
    if wrong:
        expected = model.state_dict().keys()
        missing = [name for name in expected if name not in state]
        unexpected = [name for name in state if name not in expected]
    else:
        missing, unexpected = model.load_state_dict(state, strict=False)
    shapes = [f"{k} {a} in the file, {b} in the architecture" for k, (a, b) in wrong.items()]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    problems = [f"{len(names)} {kind} ({some(names)})" for kind, names in kinds.items() if names]
    if problems:
        raise Refusal(
            f"it does not fit {arch}: weights are {', '.join(problems)}. Name the architecture "
            "that it was saved from; one with other options needs --arch package.module:factory"
        )
