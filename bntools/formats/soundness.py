"""Whether a model that came out of a file is whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from bntools.formats.probe import Probe
from bntools.modules import bad_name
from bntools.trust import Leftover

__all__ = ["check_sound"]

_DEEPEST = 200
_TABLES = {"_parameters": Tensor, "_buffers": Tensor, "_modules": nn.Module}
_END: Any = object()


def check_sound(model: nn.Module, probe: Probe) -> None:
    """Find what is no part of a network, or damaged, or without values; raises LoadError."""
    for value, depth in _contents(model):
        if isinstance(value, Leftover):
            raise probe.fails(
                f"the model holds a {value.wanted}, which is no part of a network. If you trust "
                f"the file, add --allow {value.wanted} (in Python allow=({value.wanted!r},))",
                ("--allow", value.wanted),
            )
        if depth > _DEEPEST:
            raise probe.fails("what it holds is nested beyond any sensible depth")
        if isinstance(value, nn.Module) and not _is_sound(value):
            raise probe.fails(f"it is damaged: a {type(value).__name__} in it is incomplete")
        if isinstance(value, nn.Module) and (name := bad_name(value)) is not None:
            raise probe.fails(f"a part of the model is called {name!r}, which is no name")
        if isinstance(value, Tensor) and value.is_meta:
            raise probe.fails("its tensors have no values (device 'meta'). Save it with weights")
    if _has_cycle(model):
        raise probe.fails("a part of the model contains itself")


def _contents(root: Any) -> Iterator[tuple[Any, int]]:
    """Everything in the attributes, lists, tuples and dicts below a module, each once.

    With it comes the depth at which whoever walks there (`copy.deepcopy`, `pickle`) finds it.
    """
    seen: set[int] = set()
    stack = [(root, 0)]
    while stack:
        value, depth = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value, depth
        inner: Iterable[Any] = ()
        if isinstance(value, nn.Module):
            inner = vars(value).values()
        elif isinstance(value, Mapping):
            inner = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            inner = value
        stack.extend((each, depth + 1) for each in reversed(list(inner)))


def _has_cycle(root: nn.Module) -> bool:
    """Whether a module is below itself, where `Module.train` and others would not end."""
    stack = [(root, iter(list(root._modules.values())))]
    above, done = {id(root)}, set()
    while stack:
        module, children = stack[-1]
        child = next(children, _END)
        if child is _END:
            stack.pop()
            above.discard(id(module))
            done.add(id(module))
        elif child is not None and id(child) in above:
            return True
        elif child is not None and id(child) not in done:
            above.add(id(child))
            stack.append((child, iter(list(child._modules.values()))))
    return False


def _is_sound(module: nn.Module) -> bool:
    state = vars(module)
    if type(state.get("training")) is not bool:
        return False
    return all(
        isinstance(state.get(table), dict)
        and all(
            isinstance(k, str) and (v is None or isinstance(v, kind))
            for k, v in state[table].items()
        )
        for table, kind in _TABLES.items()
    )
