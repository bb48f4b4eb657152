"""Running a serialised graph: step after step, each value let go after its last use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bntools.programs.operators import HIGHER_ORDER, is_overload, operator_of, schema_of
from bntools.programs.values import DEVICE, Subgraph, filled, name_of, names_in, read
from bntools.trust import Refusal

__all__ = ["Graph", "Run", "read_graph"]

_DEEPEST = 20
Values = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One call: an operation, a submodule by its path, or a subgraph under some condition."""

    call: Callable[..., Any] | None
    module: str
    special: str
    args: list[Any]
    kwargs: dict[str, Any]
    outputs: list[Any]
    single: bool
    done: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """Steps, the names of what goes in, and templates of what comes out."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: list[Any]
    single: bool = False


@dataclass(frozen=True)
class Run:
    """What the steps of one run need besides values: the modules that they call, the device."""

    module: Callable[[str], nn.Module]
    place: Callable[[Any], torch.device]

    def graph(self, graph: Graph, arguments: Sequence[Any]) -> list[Any]:
        """What a graph gives for the values of its inputs."""
        values: Values = {DEVICE: self.place, **dict(zip(graph.inputs, arguments, strict=True))}
        for step in graph.steps:
            given = self._called(step, values)
            if step.outputs:
                _bind(step, given, values)
            for name in step.done:
                del values[name]
        return [filled(template, values) for template in graph.outputs]

    def _called(self, step: Step, values: Values) -> Any:
        args = [filled(template, values) for template in step.args]
        if step.special:
            return self._special(step.special, args)
        if step.call is None:
            return self.module(step.module)(*args)
        return step.call(*args, **{name: filled(t, values) for name, t in step.kwargs.items()})

    def _special(self, name: str, args: list[Any]) -> Any:
        if name == "cond":
            chosen, yes, no, operands = args
            if not torch.compiler.is_exporting():
                return self.graph(yes if chosen else no, operands)
            return torch.cond(chosen, self._branch(yes), self._branch(no), tuple(operands))
        if name == "wrap_with_set_grad_enabled":
            wanted = torch.enable_grad() if args[0] else torch.no_grad()
            with wanted if torch.is_grad_enabled() != args[0] else nullcontext():
                return self.graph(args[1], args[2:])
        kind, dtype, enabled, cached, graph, *operands = args
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached):
            return self.graph(graph, operands)

    def _branch(self, graph: Graph) -> Callable[..., Any]:
        return lambda *operands: tuple(self.graph(graph, operands))


def _bind(step: Step, given: Any, values: Values) -> None:
    """Give the results of a call their names."""
    if step.single:
        results = given if isinstance(step.outputs[0], list) else [given]
        names = step.outputs[0] if isinstance(step.outputs[0], list) else step.outputs
    else:
        results, names = given, step.outputs
    if len(results) != len(names):
        raise ValueError("an operation gives another number of results than the file says")
    for name, result in zip(names, results, strict=True):
        if isinstance(name, list):
            values.update(zip(name, result, strict=True))
        elif name is not None:
            values[name] = result


def read_graph(
    data: Mapping[str, Any], inputs: Sequence[str], modules: Callable[[str], bool], depth: int = 0
) -> Graph:
    """Read a serialised graph; `modules` says whether the program has one at a path.

    Raises `Refusal` for operations that may not run, ValueError for a damaged graph.
    """
    if depth > _DEEPEST:
        raise ValueError("its graphs nest too deep")
    known = set(inputs)
    drafts = []
    for node in data["nodes"]:
        draft = _draft(node, modules, depth)
        missing = names_in([*draft.args, *draft.kwargs.values()]) - known
        if missing:
            raise ValueError(f"the value {min(missing)} is used before it is computed")
        known |= set(_flat(draft.outputs))
        drafts.append(draft)
    outputs = [read(argument) for argument in data["outputs"]]
    if names_in(outputs) - known:
        raise ValueError("an output is never computed")
    steps = tuple(_with_last_uses(drafts, names_in(outputs) | set(inputs)))
    return Graph(tuple(inputs), steps, outputs, bool(data.get("is_single_tensor_return")))


def _draft(node: Mapping[str, Any], modules: Callable[[str], bool], depth: int) -> Step:
    outputs = [read(argument) for argument in node["outputs"]]
    if "module" in node:
        if not modules(node["module"]):
            raise ValueError("a submodule is missing")
        args = [read(item["arg"]) for item in node["inputs"]]
        return Step(None, node["module"], "", args, {}, outputs, single=True, done=())
    target = node["target"]
    if target in HIGHER_ORDER:
        return _special(node, target.rpartition(".")[2], outputs, modules, depth)
    call = operator_of(target)
    args, kwargs = _arguments(call, node["inputs"])
    single = not is_overload(call) or len(schema_of(call).returns) == 1
    return Step(call, "", "", args, kwargs, outputs, single=single, done=())


def _special(
    node: Mapping[str, Any],
    name: str,
    outputs: list[Any],
    modules: Callable[[str], bool],
    depth: int,
) -> Step:
    args = [read(item["arg"]) for item in node["inputs"]]
    for index, value in enumerate(args):
        if isinstance(value, Subgraph):
            inputs = [name_of(item["as_tensor"]["name"]) for item in value.data["inputs"]]
            args[index] = read_graph(value.data, inputs, modules, depth + 1)
    first = {"cond": 1, "wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}[name]
    if not isinstance(args[first], Graph):
        raise Refusal(f"it is damaged: a call of {name} is not complete")
    return Step(None, "", name, args, {}, outputs, single=False, done=())


def _arguments(call: Any, inputs: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by position as far as they go without a gap, the rest by name."""
    if not is_overload(call):
        return [read(item["arg"]) for item in inputs], {}
    given = {item["name"]: read(item["arg"]) for item in inputs}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    gap = False
    for argument in schema_of(call).arguments:
        if argument.name not in given:
            gap = True
        elif gap or argument.kwarg_only:
            kwargs[argument.name] = given[argument.name]
        else:
            args.append(given[argument.name])
    unknown = given.keys() - {argument.name for argument in schema_of(call).arguments}
    if unknown:
        raise ValueError(f"{call} has no argument {min(unknown)}")
    return args, kwargs


def _with_last_uses(drafts: Sequence[Step], kept: set[str]) -> Iterator[Step]:
    """The steps, each with the values that nobody takes after it."""
    seen = set(kept)
    done: list[tuple[str, ...]] = []
    for step in reversed(drafts):
        names = names_in([*step.args, *step.kwargs.values()]) | set(_flat(step.outputs))
        done.append(tuple(sorted(names - seen)))
        seen |= names
    for step, last in zip(drafts, reversed(done), strict=True):
        yield Step(
            step.call, step.module, step.special, step.args, step.kwargs, step.outputs,
            step.single, last,
        )  # fmt: skip


def _flat(names: Any) -> Iterator[str]:
    for name in names if isinstance(names, list) else [names]:
        if isinstance(name, list):
            yield from _flat(name)
        elif name is not None:
            yield name
