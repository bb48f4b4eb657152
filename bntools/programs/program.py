"""A program as an `nn.Module`: a graph of operations as data, its tensors, and real submodules.

What an exported program calls with the weights of one layer is a call of that layer here
(`bntools.programs.lifting`), so that it can be inspected, folded and replaced like any other.
Nothing is compiled or evaluated: the graph is data, also in the files that hold it.
"""

from __future__ import annotations

import inspect
import json
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from bntools.errors import InputError, LoadError
from bntools.programs.interpreting import Graph, Run, read_graph
from bntools.programs.sizes import Port, Range, check_guards, check_sizes, understood
from bntools.programs.trees import Tree, read_tree
from bntools.programs.values import Place, dtype_of, name_of
from bntools.trust import Refusal

__all__ = ["PLAN_VERSION", "Prepared", "Program", "Scope"]

PLAN_VERSION = 1


class Scope(nn.Module):
    """Holds tensors and layers of a program under a path; it is not called itself."""


@dataclass(frozen=True)
class Prepared:
    """The plan of a program, checked and ready to run."""

    graph: Graph
    ports: tuple[Port, ...]
    tensors: tuple[tuple[str, str], ...]
    writes: tuple[tuple[str, str], ...]
    ranges: Mapping[str, Range]
    guards: tuple[str, ...]
    inputs: Tree
    outputs: Tree
    names: tuple[str, ...]
    home: str

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat inputs of a call, whose arguments may go by position or by name."""
        positional, named = self.inputs.children
        count = len(positional.children)
        values = dict(zip(self.names, args))  # noqa: B905 - fewer may come by position
        if len(args) > len(self.names) or values.keys() & kwargs.keys():
            raise ValueError(f"it takes {', '.join(self.names) or 'nothing'}")
        values.update(kwargs)
        missing = [name for name in self.names if name not in values]
        if missing or len(values) > len(self.names):
            raise ValueError(f"it takes {', '.join(self.names) or 'nothing'}")
        given = (
            tuple(values[name] for name in self.names[:count]),
            {key: values[key] for key in named.keys},
        )
        flat = [value for _, value in self.inputs.flat(given)]
        check_sizes(self.ports, flat, self.ranges)
        check_guards(self.guards, values)
        return flat


class _Forward:
    """`Program.forward`: it has the arguments of the exported model in its signature.

    There torch's exporters look for the names of inputs, and bntools for how many there are.
    """

    def __get__(self, program: Program | None, _: type[Program]) -> Any:
        if program is None:
            return self
        named, run = program.prepared.names, program.run

        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        if all(name.isidentifier() and not keyword.iskeyword(name) for name in named):
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters = [inspect.Parameter(name, kind) for name in named]
            forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # what inspect looks for
        return forward


class Program(nn.Module):
    """An exported program; `plan` is its graph as JSON text, the tensors are those of the module.

    Sizes that were fixed when the program was exported stay fixed. Raises `InputError` for inputs
    that it does not take.
    """

    forward: Any = _Forward()

    def __init__(self, plan: str) -> None:
        super().__init__()
        self.plan = plan

    @property
    def prepared(self) -> Prepared:
        """The plan, checked; raises `LoadError` where it calls what may not be called."""
        try:
            return _prepared(self.plan)
        except Refusal as error:
            raise LoadError(f"Cannot run the program: {error}.") from None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; arguments go by position or by name, as in the exported model."""
        ready = self.prepared
        try:
            flat = ready.bound(args, kwargs)
        except ValueError as error:
            raise InputError(
                f"Cannot run the exported program on these inputs: {error}. What was fixed when it"
                " was exported stays fixed."
            ) from None
        tensors = [self._tensor(name) for _, name in ready.tensors]
        run = Run(self._module, self._placed(ready.home))
        results = run.graph(ready.graph, [*tensors, *flat])
        given = len(results) - len(ready.writes)
        if ready.writes:
            self._write(ready, results[given:], flat)
        return ready.outputs.built(iter(results[:given]))

    def check(self) -> None:
        """Check the plan without running it; raises `Refusal` or ValueError."""
        ready = _prepared(self.plan)
        for _, name in ready.tensors:
            self._tensor(name)
        for step in ready.graph.steps:
            if step.module:
                self._module(step.module)

    def examples(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random arguments of the sizes that the program was exported with."""
        generator = torch.Generator().manual_seed(seed)
        ready = self.prepared
        like = next(self.parameters(), torch.zeros(()))
        flat = [_drawn(port, like, generator) for port in ready.ports]
        built: tuple[tuple[Any, ...], dict[str, Any]] = ready.inputs.built(iter(flat))
        return built

    def extra_repr(self) -> str:
        """The inputs and the size of the graph."""
        ready = self.prepared
        return f"{', '.join(map(str, ready.ports))}; {len(ready.graph.steps)} operations"

    def _module(self, path: str) -> nn.Module:
        module: nn.Module = self
        for name in path.split("."):
            found = module._modules.get(name)
            if found is None:
                raise ValueError(f"the program has no module {path}")
            module = found
        return module

    def _tensor(self, name: str) -> Tensor:
        path, _, attribute = name.rpartition(".")
        owner = self._module(path) if path else self
        found: Tensor | None = owner._parameters.get(attribute)
        found = found if found is not None else owner._buffers.get(attribute)
        if found is None:
            raise ValueError(f"the program has no tensor {name}")
        return found

    def _placed(self, home: str) -> Any:
        tensor = next(self.parameters(), next(self.buffers(), None))
        current = tensor.device if tensor is not None else torch.device("cpu")

        def place(wanted: Place) -> torch.device:
            return wanted.now(current, home)

        return place

    def _write(self, ready: Prepared, results: Sequence[Any], flat: Sequence[Any]) -> None:
        """Give buffers and inputs that the program writes to their new contents."""
        positions = {port.name: index for index, port in enumerate(ready.ports)}
        for (kind, name), result in zip(ready.writes, results, strict=True):
            target = flat[positions[name]] if kind == "input" else self._tensor(name)
            # not under no_grad: torch.export cannot read a region without results back
            (target.detach() if target.requires_grad else target).copy_(result)


def _drawn(port: Port, like: Tensor, generator: torch.Generator) -> Any:
    if port.sizes is None:
        return port.constant
    dtype = port.dtype
    if dtype == torch.bool:
        return torch.randint(0, 2, port.hint, generator=generator).bool().to(like.device)
    if dtype.is_floating_point or dtype.is_complex:
        wanted = like.dtype if dtype.is_floating_point and like.is_floating_point() else dtype
        drawn = torch.randn(port.hint, generator=generator)
        return drawn.to(like.device, wanted)
    return torch.randint(0, 10, port.hint, generator=generator).to(like.device, dtype)


@lru_cache(maxsize=16)
def _prepared(plan: str) -> Prepared:
    data = json.loads(plan)
    if not isinstance(data, dict) or data.get("version") != PLAN_VERSION:
        raise ValueError("its graph is of another version of bntools")
    tensors = tuple((name_of(name), str(path)) for name, path in data["tensors"])
    ports = tuple(_port(port) for port in data["ports"])
    names = [*(name for name, _ in tensors), *(port.name for port in ports)]
    if len(set(names)) < len(names):
        raise ValueError("two inputs have one name")
    writes = tuple((str(kind), str(name)) for kind, name in data["writes"])
    fields = data["named_tuples"]
    inputs, outputs = read_tree(data["in_spec"], fields), read_tree(data["out_spec"], fields)
    graph = read_graph(data["graph"], names, set(data["modules"]).__contains__)
    if inputs.kind != "tuple" or len(inputs.children) != 2 or inputs.leaves != len(ports):
        raise ValueError("its inputs are not those of its graph")
    if outputs.leaves != len(graph.outputs) - len(writes):
        raise ValueError("its outputs are not those of its graph")
    positional, named = inputs.children
    arguments = [str(name) for name in data["names"]]
    if len(arguments) != len(positional.children) + len(named.keys):
        arguments = [f"arg{i}" for i in range(len(positional.children))] + list(named.keys)
    guards = tuple(guard for guard in map(str, data["guards"]) if understood(guard))
    return Prepared(
        graph,
        ports,
        tensors,
        writes,
        {str(k): Range(*map(_bound, v)) for k, v in data["ranges"].items()},
        guards,
        inputs,
        outputs,
        tuple(arguments),
        str(data["home"]),
    )


def _bound(value: Any) -> int | None:
    return None if value is None else int(value)


def _port(data: Mapping[str, Any]) -> Port:
    name = name_of(data["name"])
    if "sizes" not in data:
        constant = data.get("constant")
        if not isinstance(constant, (int, float, bool, str, type(None))):
            raise ValueError("an input is neither a tensor nor a plain constant")
        return Port(name, constant=constant, number=bool(data.get("number")))
    sizes = tuple(size if isinstance(size, str) else int(size) for size in data["sizes"])
    hint = tuple(int(size) for size in data["hint"])
    if len(hint) != len(sizes):
        raise ValueError("an input has sizes of two ranks")
    return Port(name, sizes, hint, dtype_of(data["dtype"]))
