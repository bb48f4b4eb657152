"""What a surgery removed or changed, kept beside its result so that it can be brought back.

Kept is the difference of the two models, and whole: the arithmetic of a fold has an inverse only
where no scale is zero and no value was rounded, and merges have none at all. So it costs about as
much memory as the layers that were changed, and what comes back is the same to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bntools.errors import SurgeryError
from bntools.modules import duplicate, get_module, named_modules, replace_modules

__all__ = ["Originals", "bring_back", "keep_originals", "originals_of", "put_originals"]

_KEY = "bntools_originals"
_TABLES = ("_parameters", "_buffers")
_SIMPLE = (bool, int, float, str, tuple, type(None))
_MOST = 100
_MODES = frozenset({"training", "_mode_asked"})


class Originals(nn.Module):
    """What one surgery removed or changed, and `earlier`, what the ones before it did.

    The surgery made the edits of the recipe from number `before` to number `after`. `layers` are
    the modules that were replaced, by path; `tensors` those that have other contents, by name;
    `absent` names the tensors that were added; `values` are the other attributes that changed, by
    path and name; `digests` tell whether a tensor is still what the surgery made it, by name.

    It is a module only so that a file may hold it: it is no part of the model that has it, whose
    copies share it.
    """

    def __init__(self, before: int, after: int, earlier: Originals | None = None) -> None:
        super().__init__()
        self.before = before
        self.after = after
        self.earlier = [] if earlier is None else [earlier]
        self.layers: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.absent: list[str] = []
        self.values: dict[str, dict[str, Any]] = {}
        self.digests: dict[str, str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Originals:
        return self

    @property
    def chain(self) -> list[Originals]:
        """These and all earlier ones, the latest first."""
        found = [self]
        while found[-1].earlier:
            found.append(found[-1].earlier[0])
        return found

    def is_sound(self) -> bool:
        """Whether everything has the type that it should have; false for much that files hold."""
        seen: list[Any] = []
        step: Any = self
        while isinstance(step, Originals) and len(seen) < _MOST and step not in seen:
            if not _is_sound(vars(step)):
                return False
            seen.append(step)
            if not step.earlier:
                return True
            step = step.earlier[0]
        return False

    def all_tensors(self) -> dict[str, Tensor]:
        """Everything that is kept of this surgery, by its name in the model before it."""
        found = {name: tensor.detach() for name, tensor in self.tensors.items()}
        for path, layer in self.layers.items():
            prefix = f"{path}." if path else ""
            found.update({prefix + k: v.detach() for k, v in layer.state_dict().items()})
        return found

    def nbytes(self) -> int:
        """How many bytes all of it takes."""
        return sum(t.nbytes for step in self.chain for t in step.all_tensors().values())


def _is_sound(state: dict[str, Any]) -> bool:
    kinds = {"layers": nn.Module, "tensors": Tensor, "values": dict, "digests": str}
    earlier, absent = state.get("earlier"), state.get("absent")
    return (
        all(type(state.get(name)) is int and state[name] >= 0 for name in ("before", "after"))
        and isinstance(earlier, list)
        and len(earlier) < 2
        and isinstance(absent, list)
        and all(isinstance(name, str) for name in absent)
        and all(_maps_names(state.get(name), kind) for name, kind in kinds.items())
        and all(_maps_names(values, _SIMPLE) for values in state["values"].values())
    )


def _maps_names(table: Any, kind: Any) -> bool:
    return isinstance(table, dict) and all(
        isinstance(name, str) and isinstance(value, kind) for name, value in table.items()
    )


def originals_of(model: nn.Module) -> Originals | None:
    """What a model has kept of the surgeries that made it."""
    found = model.__dict__.get(_KEY)
    return found if isinstance(found, Originals) else None


def put_originals(model: nn.Module, originals: Originals | None) -> None:
    """Note on a model, which is ours, what was kept; None takes the note away."""
    model.__dict__.pop(_KEY, None)
    if originals is not None:
        model.__dict__[_KEY] = originals


def keep_originals(source: nn.Module, result: nn.Module, before: int, after: int) -> Originals:
    """Keep what of `source` is not in `result` as it was; the copies share nothing with it."""
    kept = Originals(before, after, originals_of(source))
    with torch.no_grad():
        for path, old, new in _pairs(source, result):
            if _other_kind(old, new):
                kept.layers[path] = _eval(duplicate(old))
            else:
                _keep_tensors(kept, path, old, new)
                _keep_values(kept, path, old, new)
    put_originals(result, kept)
    return kept


def _eval(module: nn.Module) -> nn.Module:
    return module.eval() if module.training else module


def _pairs(source: nn.Module, result: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Every (path, module before, module after), none inside one that was replaced, each once."""
    stack: list[tuple[str, nn.Module, nn.Module]] = [("", source, result)]
    seen: set[int] = set()
    while stack:
        path, old, new = stack.pop()
        if id(old) in seen:
            continue
        seen.add(id(old))
        yield path, old, new
        if _other_kind(old, new):
            continue
        for name, child in old._modules.items():
            twin = new._modules[name]
            if child is not None and twin is not None:
                stack.append((f"{path}.{name}" if path else name, child, twin))


def _other_kind(old: nn.Module, new: nn.Module) -> bool:
    """Whether a module was replaced by one of another class, or with other submodules."""
    names = {
        tuple((name, child is None) for name, child in module._modules.items())
        for module in (old, new)
    }
    return type(old) is not type(new) or len(names) > 1


def _keep_tensors(kept: Originals, path: str, old: nn.Module, new: nn.Module) -> None:
    for table in _TABLES:
        mine, theirs = old.__dict__[table], new.__dict__[table]
        for attribute in dict.fromkeys((*mine, *theirs)):
            was, now = mine.get(attribute), theirs.get(attribute)
            if _is_same(was, now):
                continue
            name = f"{path}.{attribute}" if path else attribute
            if was is None:
                kept.absent.append(name)
            else:
                copied = was.detach().clone(memory_format=torch.preserve_format)
                kept.tensors[name] = (
                    nn.Parameter(copied, requires_grad=was.requires_grad)
                    if isinstance(was, nn.Parameter)
                    else copied
                )
            if now is not None:
                kept.digests[name] = digest(now)


def _keep_values(kept: Originals, path: str, old: nn.Module, new: nn.Module) -> None:
    changed = {
        name: value
        for name, value in vars(old).items()
        if isinstance(value, _SIMPLE)
        and name not in _MODES
        and (name not in vars(new) or vars(new)[name] != value)
        and not name.startswith("bntools_")
    }
    if changed:
        kept.values[path] = changed


def _is_same(was: Tensor | None, now: Tensor | None) -> bool:
    if was is None or now is None or was is now:
        return was is now
    if is_lazy(was) or is_lazy(now):
        return is_lazy(was) and is_lazy(now)
    alike = was.dtype == now.dtype and was.shape == now.shape and was.device == now.device
    return alike and torch.equal(_bits(was), _bits(now))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def digest(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's contents, in order, and of its type and shape."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        found.update(_bits(tensor).cpu().numpy().data)
    return found.hexdigest()


def bring_back(model: nn.Module, kept: Originals) -> nn.Module:
    """Undo one surgery on a model, in place; returns the model, or what takes its place.

    Raises `SurgeryError` where the model is not what the surgery made of it; it is then unchanged.
    """
    _check_unchanged(model, kept)
    new = {path: duplicate(layer) for path, layer in kept.layers.items()}
    for name in kept.absent:
        module, attribute = _owner(model, name)
        module._parameters[attribute] = None
    made: dict[int, Tensor] = {}
    for name, tensor in kept.tensors.items():
        module, attribute = _owner(model, name)
        table: dict[str, Any] = (
            module._buffers if attribute in module._buffers else module._parameters
        )
        if id(tensor) not in made:
            made[id(tensor)] = _copied(tensor, table.get(attribute))
        table[attribute] = made[id(tensor)]
    for path, values in kept.values.items():
        attributes = vars(get_module(model, path))
        if any(not isinstance(attributes.get(name), _SIMPLE) for name in values):
            raise SurgeryError(f"Cannot unfold {path}: it has other attributes than were kept.")
        attributes.update(values)
    return replace_modules(model, new)


def _copied(tensor: Tensor, like: Tensor | None) -> Tensor:
    copied = tensor.detach().clone(memory_format=torch.preserve_format)
    if like is not None:
        copied = copied.to(like.device)
    if isinstance(tensor, nn.Parameter) or isinstance(like, nn.Parameter):
        grad = like.requires_grad if like is not None else tensor.requires_grad
        return nn.Parameter(copied, requires_grad=grad and copied.is_floating_point())
    return copied


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return get_module(model, path), attribute


def _check_unchanged(model: nn.Module, kept: Originals) -> None:
    paths = {path for path, _ in named_modules(model)}
    missing = [path for path in kept.layers if path not in paths]
    if missing:
        raise SurgeryError(f"Cannot unfold {missing[0]}: the model has no such layer any more.")
    for name, wanted in kept.digests.items():
        module, attribute = _owner(model, name)
        tables: Mapping[str, Tensor | None] = {**module._parameters, **module._buffers}
        found = tables.get(attribute)
        if found is None or digest(found) != wanted:
            raise SurgeryError(
                f"Cannot unfold the model: {name} is not what the fold made it (trained, cast or"
                " moved to another type since), and the originals kept do not fit it. Unfold first,"
                " then change it."
            )
