"""Seeing a module's own forward with torch.fx, all of its children as leaves, in every case."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Tracer

from bntools.errors import SurgeryError
from bntools.modules import bad_name, named_modules, preserved

__all__ = ["KEY", "Change", "all_cases", "by_case", "cannot", "eval_case", "own_names"]

KEY = "_bntools_removed"
_MOST_OPTIONAL = 2
_TABLES = ("_parameters", "_buffers", "_modules")
Forward = tuple[str, Callable[..., Any]]


class Change(Protocol):
    """A change of a forward: made on its graph, and stored as plain data, never as code."""

    def apply(self, module: nn.Module, graph: Graph) -> list[Any]:
        """Change the graph, and say what was changed; raises SurgeryError where it does not fit."""

    def stored(self) -> Any:
        """The change as JSON data."""


@dataclass(frozen=True)
class _Case:
    """What a forward may decide on: the mode, and which optional arguments are None."""

    training: bool
    absent: tuple[bool, ...] = ()


class _Leaves(Tracer):
    """Traces a module's own forward and nothing of its children's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m, module_qualified_name
        return True


def cannot(module: nn.Module, why: str) -> SurgeryError:
    """The error of a forward that cannot be rewritten."""
    name = type(module).__name__
    return SurgeryError(f"Cannot rewrite the forward of a {name}: {why}.")


def own_names(base: type) -> set[str]:
    """The names that the classes below nn.Module define."""
    found: set[str] = set()
    for cls in base.__mro__:
        if cls is nn.Module:
            break
        found.update(vars(cls))
    return found


def all_cases(
    module: nn.Module, base: type[nn.Module], changes: Sequence[Change]
) -> dict[_Case, Forward]:
    """The forward in every case; raises where the changes are not the same in all of them."""
    forwards: dict[_Case, Forward] = {}
    first: list[Any] | None = None
    for case in _cases(base):
        shell, graph, done = _traced(module, base, changes, case)
        first = done if first is None else first
        if done != first:
            raise cannot(module, "what changes depends on the mode or the arguments")
        made = GraphModule(shell, graph, base.__name__)
        forwards[case] = made.code, type(made).forward
    return forwards


def eval_case(
    module: nn.Module, base: type[nn.Module], changes: Sequence[Change]
) -> tuple[nn.Module, Graph]:
    """The forward in eval mode without its optional arguments, and the object it was traced on."""
    case = _Case(training=False, absent=(True,) * len(_optional(base)))
    shell, graph, _ = _traced(module, base, changes, case)
    return shell, graph


def by_case(base: type[nn.Module], forwards: Mapping[_Case, Forward]) -> Callable[..., Any]:
    """One forward, which asks for the case only where that makes a difference."""
    if len({code for code, _ in forwards.values()}) == 1:
        return next(iter(forwards.values()))[1]
    optional = _optional(base)
    table = {(case.training, case.absent): run for case, (_, run) in forwards.items()}

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        absent = tuple(
            (args[place] if len(args) > place else kwargs.get(name)) is None
            for place, name in optional
        )
        return table[self.training, absent](self, *args, **kwargs)

    return forward


def _optional(base: type[nn.Module]) -> list[tuple[int, str]]:
    """The arguments that are None by default, with their places; of many only the first few."""
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    found = [(i, p.name) for i, p in enumerate(parameters) if p.default is None]
    return found[:_MOST_OPTIONAL]


def _cases(base: type[nn.Module]) -> list[_Case]:
    absent = product((False, True), repeat=len(_optional(base)))
    return [_Case(training, which) for which in absent for training in (False, True)]


def _traced(
    module: nn.Module, base: type[nn.Module], changes: Sequence[Change], case: _Case
) -> tuple[nn.Module, Graph, list[Any]]:
    """The object and graph of a forward in one case, changed, and what was changed."""
    for _, part in named_modules(module):
        scripted = isinstance(part, torch.jit.ScriptModule)
        if not scripted and (name := bad_name(part)) is not None:
            raise cannot(module, f"a name in it could change the code ({name[:40]!r})")
    shell = _shell(module, base, training=case.training)
    optional = zip(_optional(base), case.absent, strict=True)
    fixed = {name: None for (_, name), absent in optional if absent}
    before = dict(shell.__dict__)
    tables = {name: dict(before[name]) for name in _TABLES}
    with preserved(module), torch.no_grad():
        for _, part in named_modules(module):
            if not isinstance(part, torch.jit.ScriptModule):
                part.training = case.training  # a forward may ask its children, too
        try:
            graph = _Leaves().trace(shell, concrete_args=fixed or None)
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise cannot(module, f"torch.fx cannot trace its forward ({why})") from error
    now = shell.__dict__
    same = now.keys() == before.keys() and all(now[k] is v for k, v in before.items())
    if not same or any(now[name] != table for name, table in tables.items()):
        raise cannot(module, "its forward sets attributes, or makes tensors of its own")
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") == "_assert_is_none":
            graph.erase_node(node)  # this forward is called in no other case
    done = [each for change in changes for each in change.apply(shell, graph)]
    return shell, graph, done


def _shell(module: nn.Module, base: type[nn.Module], *, training: bool) -> nn.Module:
    """The same module as another object, so that a trace may set attributes."""
    shell: nn.Module = object.__new__(base)
    shell.__dict__.update({k: v for k, v in module.__dict__.items() if k != KEY})
    for name in _TABLES:
        shell.__dict__[name] = dict(module.__dict__[name])
    shell.__dict__["training"] = training
    return shell
