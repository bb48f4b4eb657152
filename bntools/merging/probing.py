"""Which name a value has in the forward of a module: the forward runs with a probe after each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from bntools.dataflow.graph import Graph, Node, Value
from bntools.errors import SurgeryError
from bntools.modules import get_module
from bntools.rewriting import own_graph

__all__ = ["Probed", "probed"]

_PROBES = "bntools_probes"


class _Probe(nn.Module):
    """Lets a tensor be seen; a container of one is no tensor."""

    def forward(self, value: Any) -> Tensor | None:
        return value if isinstance(value, Tensor) else None


@contextmanager
def probed(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, str]]:
    """Let modules run as torch.fx sees them, each value through an Identity of its name.

    Yields, by path, why a module cannot run so. The model is ours, and is as it was afterwards.
    """
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    failures: dict[str, str] = {}
    try:
        for path in paths:
            module = get_module(model, path)
            cls = type(module)
            try:
                forward = _with_probes(module)
            except SurgeryError as error:
                failures[path] = str(error).partition(": ")[2].rstrip(".")
                continue
            classes.append((module, cls))
            module.__class__ = type(cls.__name__, (cls,), {"forward": forward})
        yield failures
    finally:
        for module, cls in classes:
            module.__class__ = cls
            module._modules.pop(_PROBES, None)


def _with_probes(module: nn.Module) -> object:
    """The forward of a module with probes, which the module gets as children."""
    shell, graph = own_graph(module)
    probes = nn.Module()
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for node in list(graph.nodes):
        if node.op == "output":
            continue
        with graph.inserting_after(last[0] if node.op == "placeholder" else node):
            probes.add_module(node.name, _Probe())
            graph.call_module(f"{_PROBES}.{node.name}", (node,))
    shell._modules[_PROBES] = module._modules[_PROBES] = probes
    return type(GraphModule(shell, graph, type(module).__name__)).forward


@dataclass(frozen=True, eq=False)
class Probed:
    """Two recordings on one input: of the model as it is, and of the same with probes.

    Both have the same operations on the same values, in the same order.
    """

    graph: Graph
    twin: Graph

    def names(self, path: str) -> dict[Value, str]:
        """The first name that each value of the twin has in the forward of a module."""
        prefix = f"{path}.{_PROBES}." if path else f"{_PROBES}."
        found: dict[Value, str] = {}
        for called, values in self.twin.calls:
            if called.startswith(prefix) and len(values) == 1:
                found.setdefault(values[0], called.removeprefix(prefix))
        return found

    def calls(self, path: str) -> int:
        """How often a module was called."""
        return sum(called == path for called, _ in self.twin.calls)

    def twin_of(self, node: Node) -> Node:
        """The same operation in the other recording."""
        return self.twin.nodes[node.order]
