"""Module trees: paths, replacing by path, copies, and forwards that leave no trace."""

from __future__ import annotations

import copy
import random
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from bntools.errors import PlanError, SurgeryError

__all__ = [
    "bad_name",
    "duplicate",
    "floating_tensors",
    "get_module",
    "is_unmade",
    "loose_tensors",
    "named_modules",
    "named_tensors",
    "preserved",
    "replace_modules",
    "unwrap",
]

_Snapshot = tuple[dict[str, Any], list[Any], list[Any], list[tuple[Any, str, Any]]]
_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
_SIMPLE = frozenset({bool, int, float, str, type(None)})
_QUOTED = re.compile(r"[\x00-\x1f\x7f-\x9f.\"'\\\u2028\u2029]")
_CONTAINERS = frozenset({list, dict, set, OrderedDict, defaultdict, Counter, deque})


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (path, module) once, a shared module under the first of its paths.

    Unlike `nn.Module.named_modules` it does not mind classes that shadow its methods.
    """
    stack: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[int] = set()
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        for name, child in reversed(list(module._modules.items())):
            if child is not None:
                stack.append((f"{path}.{name}" if path else name, child))


def bad_name(module: nn.Module) -> str | None:
    """The name of a child, parameter or buffer that could change the code in which it is written.

    torch.fx puts names between quotes into the source that it generates, as they are. None where
    all names are as `add_module` and others take them, without quotes and control characters.
    """
    tables = (module._parameters, module._buffers, module._modules)
    names = (name for table in tables for name in table)
    return next((name for name in names if not name or _QUOTED.search(name)), None)


def _made_tensors(module: nn.Module) -> Iterator[Tensor]:
    for table in (module._parameters, module._buffers):
        for tensor in table.values():
            if tensor is not None and not is_lazy(tensor):
                yield tensor


def is_unmade(module: nn.Module) -> bool:
    """Whether a module has lazy parameters or buffers that no forward has made yet."""
    tables = (module._parameters, module._buffers)
    return any(t is not None and is_lazy(t) for table in tables for t in table.values())


def _may_hold(value: Any) -> bool:
    """An empty hook table holds nothing; whether a tensor is true is another question."""
    return type(value) is not OrderedDict or bool(value)


def loose_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that modules keep without registering them, in lists and dicts as well."""
    for module in {id(module): module for _, module in named_modules(model)}.values():
        for name, value in module.__dict__.items():
            if type(value) in _SIMPLE or name in _TABLES or not _may_hold(value):
                continue
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, dict):
                yield from (item for item in value.values() if isinstance(item, Tensor))
            elif isinstance(value, (list, tuple)):
                yield from (item for item in value if isinstance(item, Tensor))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every (path of the owner, owner, name, tensor) of parameters and buffers, tied ones included.

    Lazy parameters that no forward has made yet are left out.
    """
    for path, module in named_modules(model):
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and not is_lazy(tensor):
                    yield path, module, name, tensor


def floating_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The floating parameters and buffers; the first of them says what dtype inputs have."""
    return (tensor for *_, tensor in named_tensors(model) if tensor.is_floating_point())


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; "" is the model itself."""
    module = model
    for name in path.split(".") if path else ():
        child = _child(module, name)
        if child is None:
            raise PlanError(f"Cannot find {path!r} in the model: there is no {name!r}.")
        module = child
    return module


def _child(module: nn.Module, name: str) -> nn.Module | None:
    children = module._modules
    return children[name] if name in children else None  # noqa: SIM401 - TorchScript has no get


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """Put modules in the place of those at the given paths, under every name that these have.

    Returns the model, which is another one where the path "" is given.
    """
    by_id = {id(get_module(model, path)): module for path, module in new.items()}
    for _, parent in list(named_modules(model)):
        for name, child in parent._modules.items():
            if id(child) in by_id:
                parent._modules[name] = by_id[id(child)]
    return by_id.get(id(model), model)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and `torch.compile` wrappers."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        made = "bntools.from_exported(program)" if kind == "ExportedProgram" else "an nn.Module"
        raise PlanError(f"Cannot use a {kind} as a model: give {made}.")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
            continue
        inner = _child(model, "_orig_mod")
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def duplicate(model: nn.Module, replacing: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy of a model; tensors whose `id` is in `replacing` are taken from there, not copied.

    Models that `copy.deepcopy` cannot copy, or that give it something else by hooks of their own,
    are copied module by module, and share the attributes that cannot be copied (locks, open files,
    generators).
    """
    memo = {**_lazy_buffers(model), **(replacing or {})}
    with torch.random.fork_rng(devices=[]):
        try:
            copied = copy.deepcopy(model, dict(memo))
        except Exception:  # noqa: BLE001 - a model may fail to be copied in any way
            return _duplicate_by_module(model, memo)
    return copied if _is_true_copy(copied, model, memo) else _duplicate_by_module(model, memo)


def _is_true_copy(copied: Any, model: nn.Module, memo: Mapping[int, Any]) -> bool:
    """Whether a copy has the same paths, shares nothing, and holds the replacements."""
    if not isinstance(copied, nn.Module):
        return False
    originals = dict(named_modules(model))
    copies = dict(named_modules(copied))
    if originals.keys() != copies.keys():
        return False
    for path, module in originals.items():
        twin = copies[path]
        if twin is module:
            return False
        for table in ("_parameters", "_buffers"):
            if not _are_copies(vars(module).get(table, {}), vars(twin).get(table, {}), memo):
                return False
    return True


def _are_copies(mine: Any, theirs: Any, memo: Mapping[int, Any]) -> bool:
    if mine.keys() != theirs.keys():
        return False
    for name, tensor in mine.items():
        wanted = memo.get(id(tensor))
        decided = tensor is not None and (theirs[name] is tensor or wanted is not None)
        if decided and theirs[name] is not wanted:
            return False
    return True


def _lazy_buffers(model: nn.Module) -> dict[int, Tensor]:
    """New lazy buffers for those of a model: torch cannot copy them."""
    return {
        id(buffer): UninitializedBuffer(device=buffer.device, dtype=buffer.dtype)  # type: ignore[call-arg]
        for _, module in named_modules(model)
        for buffer in module._buffers.values()
        if buffer is not None and is_lazy(buffer)
    }


def _duplicate_by_module(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    originals = {id(module): module for _, module in named_modules(model)}
    for key, module in originals.items():
        memo[key] = object.__new__(type(module))  # a GraphModule's __new__ makes another class
    for key, module in originals.items():
        memo[key].__dict__.update({k: _copied(v, memo) for k, v in module.__dict__.items()})
    result = memo[id(model)]
    if not isinstance(result, nn.Module):
        raise SurgeryError(f"Cannot copy the model: {type(model).__name__} makes no module.")
    return result


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, dict):
        same = OrderedDict() if isinstance(value, OrderedDict) else {}
        same.update({k: _copied(v, memo) for k, v in value.items()})
        return same
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001 - a lock, an open file: it is shared
        return value


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Whatever a forward or a mode change does to modules and RNG is undone at the end.

    Restored are each module's attributes (also training flags, registered tensors and submodules,
    lists, dicts, sets and generators in them; `.data`, `.grad` and grad flags), and the state of
    torch's, Python's and NumPy's generators. The contents of tensors are not: who writes them
    restores them.
    """
    modules = {id(module): module for _, module in named_modules(model)}
    storages = [_held(t) for module in modules.values() for t in _made_tensors(module)]
    before = [(module, _snapshot(module)) for module in modules.values()]
    states = random.getstate(), _numpy_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for module, state in before:
                _restore(module, state)
            for held in storages:
                _give_back(*held)
            random.setstate(states[0])
            _set_numpy_state(states[1])


def _held(tensor: Tensor) -> tuple[Tensor, Tensor, bool, Tensor | None]:
    return tensor, tensor.detach(), tensor.requires_grad, tensor.grad if tensor.is_leaf else None


def _give_back(tensor: Tensor, same: Tensor, grad_flag: bool, grad: Tensor | None) -> None:  # noqa: FBT001
    """Undo what changed a tensor without changing its contents."""
    if _moved(tensor, same) or not _laid_out_alike(tensor, same):
        tensor.data = same
    if tensor.is_leaf:
        if tensor.requires_grad is not grad_flag:
            tensor.requires_grad_(grad_flag)
        if tensor.grad is not grad:
            tensor.grad = grad


def _moved(tensor: Tensor, same: Tensor) -> bool:
    """Whether a tensor lies elsewhere now; a sparse one has no memory of its own to tell by."""
    if tensor.layout is torch.strided and same.layout is torch.strided:
        return tensor.data_ptr() != same.data_ptr()
    return tensor.layout is not same.layout


def _laid_out_alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return a.layout is not torch.strided or a.stride() == b.stride()


def _snapshot(module: nn.Module) -> _Snapshot:
    attributes = dict(module.__dict__)
    containers: list[Any] = []
    generators: list[tuple[Any, str, Any]] = []
    pending = [value for value in attributes.values() if type(value) not in _SIMPLE]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            containers.append(value)
            if value:
                pending.extend(value.values() if isinstance(value, dict) else value)
        elif type(value).__name__ in _GENERATORS:
            generators.extend(_state_of(value))
    # most of them are empty hook tables: a copy of each would set off the garbage collector
    contents = [value.copy() if value else () for value in containers]
    return attributes, containers, contents, generators


_GENERATORS = {"Generator", "Random", "RandomState", "MT19937", "PCG64"}


def _state_of(generator: Any) -> Iterator[tuple[Any, str, Any]]:
    """(object, setter, state) of a random generator that a module keeps."""
    if isinstance(generator, torch.Generator):
        yield generator, "set_state", generator.get_state()
    elif isinstance(generator, random.Random):
        yield generator, "setstate", generator.getstate()
    elif hasattr(generator, "bit_generator"):
        yield generator.bit_generator, "state", generator.bit_generator.state


def _restore(module: nn.Module, state: _Snapshot) -> None:
    before, containers, contents, generators = state
    for generator, setter, value in generators:
        if setter == "state":
            generator.state = value
        else:
            getattr(generator, setter)(value)
    now = module.__dict__
    if len(now) != len(before) or any(now.get(k, now) is not v for k, v in before.items()):
        now.clear()
        now.update(before)
    for value, content in zip(containers, contents, strict=True):
        if (value or content) and not _same_items(value, content):
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(content)


def _same_items(value: Any, content: Any) -> bool:
    if isinstance(value, set) or len(value) != len(content):
        return bool(value == content)
    if isinstance(value, dict):
        return all(content.get(key, value) is item for key, item in value.items())
    return all(a is b for a, b in zip(value, content, strict=True))


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return numpy.random.get_state() if numpy is not None else None


def _set_numpy_state(state: Any) -> None:
    if state is not None:
        sys.modules["numpy"].random.set_state(state)
