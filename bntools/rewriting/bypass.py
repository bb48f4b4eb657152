"""One submodule's call in the place of everything that a forward does between two values."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from bntools.errors import SurgeryError
from bntools.modules import get_module, named_tensors
from bntools.rewriting.tracing import cannot

__all__ = ["Bypass"]

_MOST = 10_000
_LONGEST = 1_000


@dataclass(frozen=True)
class Bypass:
    """`output` is what the submodule `host` makes of `input`; `calls` are not made any more.

    `input` and `output` are the names of the two values in the traced forward, `calls` the paths of
    the submodules that are called in between, `steps` all that happens there, a line for each
    operation. A forward of another version is compared with these, so that the change is made where
    it was planned, or not at all.
    """

    input: str
    output: str
    host: str
    calls: tuple[str, ...]
    steps: tuple[str, ...]

    @classmethod
    def of(cls, data: Any) -> Bypass:
        """Read what `stored` gives; raises ValueError for anything else."""
        if not isinstance(data, Mapping):
            raise ValueError("a merge is a mapping")  # noqa: TRY004 - all that a file gets wrong is one error
        names = [data.get(key) for key in ("input", "output", "host")]
        calls, steps = data.get("calls"), data.get("steps")
        for lines in (calls, steps):
            if not isinstance(lines, (list, tuple)) or not 0 < len(lines) <= _MOST:
                raise ValueError("a merge names the calls that it stands for")
            names.extend(lines)
        for name in names:
            if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
                raise ValueError("a merge names values and submodules by short strings")
        source, target, host = map(str, names[:3])
        return cls(source, target, host, tuple(calls or ()), tuple(steps or ()))

    @classmethod
    def between(cls, module: nn.Module, graph: Graph, names: tuple[str, str], host: str) -> Bypass:
        """The change that lets `host` stand for all between two values; raises SurgeryError."""
        nodes = {node.name: node for node in graph.nodes}
        found = _between(module, nodes[names[0]], nodes[names[1]])
        return cls(*names, host, _calls(found), _steps(graph, found))

    def stored(self) -> dict[str, Any]:
        """The change as JSON data."""
        return {
            "input": self.input,
            "output": self.output,
            "host": self.host,
            "calls": list(self.calls),
            "steps": list(self.steps),
        }

    def apply(self, module: nn.Module, graph: Graph) -> list[Any]:
        """Put the call of the host in its place, and erase what nobody uses then."""
        nodes = {node.name: node for node in graph.nodes}
        source, target = nodes.get(self.input), nodes.get(self.output)
        if source is None or target is None or source is target:
            raise cannot(module, f"it has no values {self.input} and {self.output}")
        between = _between(module, source, target)
        steps = _steps(graph, between)
        if _calls(between) != self.calls or steps != self.steps:
            said = "; ".join(steps)[:200]
            raise cannot(module, f"between {self.input} and {self.output} it does {said}")
        _has(module, self.host)
        with graph.inserting_before(_after(graph, source)):
            call = graph.call_module(self.host, (source,))
        if not target.users:
            raise cannot(module, f"it reads {target.name} by another name")
        target.replace_all_uses_with(call)
        for node in reversed(list(graph.nodes)):
            if node in between and not node.users:
                graph.erase_node(node)
        self._gone(module, graph, call)
        graph.lint()
        return [self.host, *steps]

    def _gone(self, module: nn.Module, graph: Graph, call: Node) -> None:
        """The submodules called in between must have no other call: they may become empty."""
        parts = {id(get_module(module, path)): path for path in self.calls}
        for node in graph.nodes:
            if node is call or node.op != "call_module":
                continue
            path = parts.get(id(get_module(module, str(node.target))))
            if path is not None and any(True for _ in named_tensors(get_module(module, path))):
                raise cannot(module, f"what {path} gives is used elsewhere as well")


def _calls(between: set[Node]) -> tuple[str, ...]:
    return tuple(sorted({str(node.target) for node in between if node.op == "call_module"}))


def _steps(graph: Graph, between: set[Node]) -> tuple[str, ...]:
    """Each operation as a line: its name, what it calls, and on which values."""
    return tuple(
        f"{node.name} = {_target(node)}({', '.join(each.name for each in node.all_input_nodes)})"
        for node in graph.nodes
        if node in between
    )


def _target(node: Node) -> str:
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _has(module: nn.Module, path: str) -> None:
    try:
        get_module(module, path)
    except Exception as error:
        raise SurgeryError(f"Cannot merge into {path}: there is no such layer.") from error


def _between(module: nn.Module, source: Node, target: Node) -> set[Node]:
    """The target and all that goes into it, back to the source; constants are among it."""
    found: dict[Node, None] = {}
    reached, stack = False, [target]
    while stack:
        node = stack.pop()
        if node is source or _is_same_item(node, source):
            reached = True
        elif node not in found:
            if node.op == "placeholder":
                raise cannot(module, f"{target.name} also depends on {node.name}")
            found[node] = None
            stack.extend(node.all_input_nodes)
    if not reached:
        raise cannot(module, f"{target.name} does not depend on {source.name}")
    return set(found)


def _is_same_item(node: Node, other: Node) -> bool:
    """Whether both are `x[0]`, written twice."""
    if node.target is not operator.getitem or other.target is not operator.getitem:
        return False
    return bool(node.args == other.args)


def _after(graph: Graph, source: Node) -> Node:
    """Where to put a call on a value as soon as it is there; arguments come first."""
    nodes: list[Node] = list(graph.nodes)
    rest = nodes[nodes.index(source) + 1 :]
    return next(node for node in rest if node.op != "placeholder")
