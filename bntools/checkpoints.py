"""Weights: where checkpoints hide them, and how they get into an architecture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bntools.architectures import LIBRARIES, build
from bntools.errors import BNToolsError, LoadError
from bntools.modules import loose_tensors, named_modules
from bntools.recipe import Recipe, apply_edits, mark, mark_architecture
from bntools.trust import Refusal

__all__ = ["Built", "build_with_weights", "fill_exactly", "find_weights", "some"]

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
_DRAWS = (
    *(Tensor.uniform_, Tensor.normal_),
    *(nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_),
)
# How torch's own modules load, who call it so, and what users can put before and after it.
_LOADING, _HOOKS = (
    "_load_from_state_dict",
    ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_PLAIN_LOADING = tuple(getattr(c, _LOADING) for c in (nn.Module, nn.BatchNorm2d, nn.InstanceNorm2d))


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


@dataclass(frozen=True)
class Built:
    """A model with its weights, what to say of it, and its number of classes if one was given."""

    model: nn.Module
    notes: list[str]
    classes: int | None = None


def build_with_weights(
    arch: str, weights: Mapping[str, Any], recipe: Recipe | None = None, *, exact: bool = False
) -> Built:
    """The architecture, with a recipe re-applied, and the weights of a state dict, strictly.

    `exact` gives every tensor of the model the type that it has in the file.
    """
    edits = Recipe() if recipe is None else recipe
    model, misfit = _edited(_to_fill(arch), edits)
    classes: int | None = None
    state, notes = _renamed(weights, model.state_dict().keys())
    for count in _class_counts(arch, _misshapen(model, state)):
        with suppress(LoadError):  # not every architecture has classes
            other, _ = _edited(_to_fill(arch, count), edits)
            if not _misshapen(other, state):
                model, classes = other, count
                notes.append(f"built {arch} with {classes} classes, as in the file")
                break
    if exact:
        _take_types(model, state)
    else:
        notes += _fit_precision(model, state)
    _fill(model, state, arch, misfit)
    mark_architecture(model, arch)
    return Built(model, notes, classes)


def _to_fill(arch: str, classes: int | None = None) -> nn.Module:
    """The architecture without random numbers in its parameters, which all get others.

    Where it has tensors that no file holds, they are as ever: drawn in the same order.
    """
    with _Undrawn():
        model = build(arch, classes)
    modules = [module for _, module in named_modules(model)]
    complete = all(_loads_plainly(m) and not m._non_persistent_buffers_set for m in modules)
    if complete and next(loose_tensors(model), None) is None:
        return model
    return build(arch, classes)


class _Undrawn(TorchFunctionMode):
    """Leaves parameters as they are where they would be drawn: their memory is not touched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        given = kwargs or {}
        target = args[0] if args else given.get("tensor")
        if func in _DRAWS and isinstance(target, nn.Parameter):
            return target
        return func(*args, **given)


def _edited(model: nn.Module, recipe: Recipe) -> tuple[nn.Module, str]:
    """The model after a recipe, or as far as it got and why it does not fit."""
    if not recipe.edits:
        return model, ""
    try:
        model = apply_edits(model, recipe)
    except BNToolsError as error:
        return model, str(error)
    mark(model, recipe)
    return model, ""


def fill_exactly(module: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Load a state dict, strictly, in the types that its tensors have. Raises Refusal."""
    _take_types(module, state)
    _fill(module, state, what, "")


def _take_types(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Let every tensor of the model, and what is tied to it, have its type in the file."""
    expected = model.state_dict(keep_vars=True)
    for name, tensor in expected.items():
        saved = state.get(name)
        if not isinstance(tensor, Tensor) or not isinstance(saved, Tensor):
            continue
        same_kind = saved.is_floating_point() == tensor.is_floating_point()
        if saved.dtype != tensor.dtype and same_kind and not nn.parameter.is_lazy(tensor):
            tensor.data = tensor.data.to(saved.dtype)


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


def _fill(model: nn.Module, state: Mapping[str, Any], arch: str, misfit: str) -> None:
    wrong = _misshapen(model, state)
    if wrong:
        missing, unexpected = _differing(model, state)
    else:
        missing, unexpected = _differing(model, state) if misfit else _loaded(model, state)
    shapes = [f"{k} {a} in the file, {b} in the architecture" for k, (a, b) in wrong.items()]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    problems = [f"{len(names)} {kind} ({some(names)})" for kind, names in kinds.items() if names]
    if problems or misfit:
        why = f"weights are {', '.join(problems)}" if problems else ""
        told = f"its recipe cannot be re-applied ({misfit.rstrip('.')})" if misfit else ""
        raise Refusal(
            f"it does not fit {arch}: {'; '.join(filter(None, [told, why]))}. Name the architecture"
            " that it was saved from; one with other options needs --arch package.module:factory"
        )


def _loaded(model: nn.Module, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Load a state dict; tensors that are alike in type and layout are taken, and not copied."""
    taken = _take(model, state)
    missing, unexpected = model.load_state_dict(
        {name: value for name, value in state.items() if name not in taken}, strict=False
    )
    return [name for name in missing if name not in taken], list(unexpected)


def _take(model: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """Give parameters and buffers the memory of the file's tensors; the names of those that did.

    Only where loading is plain copying: in modules of torch.nn, whose own way of loading nobody has
    changed, one tensor at a time, so that the memory of the architecture goes as the file's comes.
    """
    taken: set[str] = set()
    if not all(_loads_plainly(module) for _, module in named_modules(model)):
        return taken
    own = Counter(id(t) for t in model.state_dict(keep_vars=True).values())
    ours = Counter(_memory(value) for value in state.values() if isinstance(value, Tensor))
    for path, module in named_modules(model):
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                full = f"{path}.{name}" if path else name
                value = state.get(full)
                if tensor is None or not isinstance(value, Tensor) or own[id(tensor)] != 1:
                    continue
                if _is_alike(tensor, value) and ours[_memory(value)] == 1:
                    tensor.data = value.detach()
                    taken.add(full)
    return taken


def _loads_plainly(module: nn.Module) -> bool:
    hooked = any(vars(module).get(name) for name in _HOOKS)
    return getattr(type(module), _LOADING) in _PLAIN_LOADING and not hooked


def _is_alike(tensor: Tensor, value: Tensor) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and (value.dtype, value.device, value.shape) == (tensor.dtype, tensor.device, tensor.shape)
        and value.layout is torch.strided
        and tensor.layout is torch.strided
        and value.stride() == tensor.stride()
        and value.untyped_storage().nbytes() == value.numel() * value.dtype.itemsize
    )


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr() if value.layout is torch.strided else id(value)


def _differing(model: nn.Module, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    expected = model.state_dict().keys()
    missing = [name for name in expected if name not in state]
    return missing, [name for name in state if name not in expected]
