"""From a serialised graph to a `Program`: calls with one layer's tensors become that layer again.

torch.export takes modules apart: `self.conv(x)` is `aten.conv2d(x, p_conv_weight, ...)` in its
graph. Where all tensors of a call are those of one path, under the names that the layer gives them,
and every such call there is made alike, the layer is put back at its path with the same options.
What does not fit stays the call that it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bntools.programs.layers import ROLES, UNKNOWN, Call, layer_of, leaf_of
from bntools.programs.populating import populate
from bntools.programs.program import Program, Scope
from bntools.programs.values import Name, read

__all__ = ["Source", "lifted"]

Node = dict[str, Any]
_ADD = "torch.ops.aten.add_.Tensor"
_TURNED = {
    "torch.ops.aten.t.default": (),
    "torch.ops.aten.permute.default": ([1, 0],),
    "torch.ops.aten.transpose.int": (0, 1),
}
_FULL_MATRIX = {"torch.ops.aten.addmm.default": "bias", "torch.ops.aten.mm.default": None}
# They assert what torch.export saw, dtypes among it, which say nothing of another precision.
_MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # noqa: SLF001 - the bases have no other names
_DROPPED = ("torch.ops.aten._assert_tensor_metadata.default",)


@dataclass
class Source:
    """What a file holds: the plan without lifting, and the tensors by their full names.

    Nodes have, where the file says so, the path and the class name of their module under "where";
    graphs have the shapes of values under "shapes" (None for free sizes). `transient` are the names
    of buffers that are no part of a state dict.
    """

    plan: dict[str, Any]
    tensors: dict[str, Tensor]
    transient: frozenset[str]


def lifted(source: Source) -> Program:
    """The program, with the layers that its calls are as submodules."""
    named = dict(source.plan["tensors"])
    graphs = list(_graphs(source.plan["graph"], named))
    owners = _owners(source.tensors)
    calls: list[_Layer] = []
    for graph, known in graphs:
        found = _Found(graph, source.tensors, owners, known)
        calls += [call for node in graph["nodes"] if (call := found.call(node)) is not None]
    layers = _agreed(calls)
    _drop_counters(graphs, calls, layers)
    by_node = {id(call.node): call for call in calls if call.path in layers}
    modules = {path: call.built() for path, call in layers.items()}
    for graph, known in graphs:
        graph["nodes"] = [_plain(node, by_node.get(id(node))) for node in graph["nodes"]]
        _drop_idle(graph, known)
        del graph["shapes"]
    used, plan = _used(source.plan["graph"]), source.plan
    written = {name for kind, name in plan["writes"] if kind == "tensor"}
    held = [[n, path] for n, path in named.items() if n in used or path in written]
    program = Program(json.dumps({**plan, "tensors": held, "modules": sorted(modules)}))
    populate(program, modules, source.tensors, source.transient)
    _set_modes(program, layers)
    return program


def _set_modes(program: Program, layers: Mapping[str, Call]) -> None:
    # where only some are in training mode, eval() is not what the file says: the root has it then
    modes = [call.training for call in layers.values() if issubclass(call.cls, _MODAL)]
    program.training = bool(modes) and all(modes)
    for scope in program.modules():
        scope.training = program.training if isinstance(scope, Scope) else scope.training


def _graphs(
    graph: dict[str, Any], named: Mapping[str, str]
) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """A graph and those that are arguments in it, each with what it calls the program's tensors."""
    yield graph, dict(named)
    for node in graph["nodes"]:
        arguments = [item["arg"] for item in node["inputs"]]
        for argument in arguments:
            if "as_graph" not in argument:
                continue
            inner = argument["as_graph"]["graph"]
            operands = [name for other in arguments for name in _tensor_names(other)]
            local = [item["as_tensor"]["name"] for item in inner["inputs"]]
            # the operands are the last arguments, and the same for all branches
            pairs = zip(local, operands[len(operands) - len(local) :], strict=True)
            yield from _graphs(inner, {n: named[o] for n, o in pairs if o in named})


def _tensor_names(argument: Mapping[str, Any]) -> list[str]:
    """The tensors that an argument is or lists."""
    if "as_tensor" in argument:
        return [argument["as_tensor"]["name"]]
    return [item["name"] for item in argument.get("as_tensors", ())]


def _owners(tensors: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """The names under which each tensor is there."""
    found: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(id(tensor), []).append(name)
    return found


@dataclass(frozen=True)
class _Layer:
    """A call that is one of a layer at a path, on one value."""

    node: Node
    path: str
    call: Call
    data: Any
    counts: str | None = None


class _Found:
    """Recognises calls of layers in one graph."""

    def __init__(
        self,
        graph: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        owners: Mapping[int, list[str]],
        named: Mapping[str, str],
    ) -> None:
        self.shapes: Mapping[str, Sequence[int | None]] = graph["shapes"]
        self.tensors = tensors
        self.owners = owners
        self.named = named
        self.used = _used(graph)
        self.turned = {
            node["outputs"][0]["as_tensor"]["name"]: name
            for node in graph["nodes"]
            if (name := _turned(node)) in named
        }

    def call(self, node: Node) -> _Layer | None:
        """The layer that a node calls, or None."""
        if not node["inputs"] or not node["outputs"] or "as_tensor" not in node["outputs"][0]:
            return None
        if any(_names(output) & self.used.keys() for output in node["outputs"][1:]):
            return None
        if node["target"] in _FULL_MATRIX:
            return self._matrix(node)
        arguments = {item["name"]: item["arg"] for item in node["inputs"]}
        first = node["inputs"][0]["arg"]
        if "as_tensor" not in first or first["as_tensor"]["name"] in self.named:
            return None
        given = {role: arguments[role] for role in ROLES if "as_tensor" in arguments.get(role, {})}
        values = {
            name: _constant(argument)
            for name, argument in arguments.items()
            if name not in given and argument is not first and "as_none" not in argument
        }
        names = {role: argument["as_tensor"]["name"] for role, argument in given.items()}
        if names:
            return self._layer(node, node["target"], first, names, values)
        return self._leaf(node, values)

    def _layer(
        self,
        node: Node,
        target: str,
        data: Any,
        names: Mapping[str, str],
        values: Mapping[str, Any],
    ) -> _Layer | None:
        """The layer that owns exactly these tensors, under the names of their roles."""
        if not all(name in self.named for name in names.values()):
            return None
        tensors = {role: self.tensors[self.named[name]] for role, name in names.items()}
        shape = self.shapes.get(data["as_tensor"]["name"], ())
        call = layer_of(target, values, tensors, shape)
        path = self._path(tensors) if call is not None else ""
        if call is None or not path:
            return None
        counter = f"{path}.num_batches_tracked"
        counts = counter if call.training and counter in self.tensors else None
        return _Layer(node, path, call, data, counts)

    def _path(self, tensors: Mapping[str, Tensor]) -> str:
        """The first path that owns the tensors and no other ones in these roles, or ""."""
        paths: list[list[str]] = []
        for role, tensor in tensors.items():
            split = [name.rpartition(".") for name in self.owners[id(tensor)]]
            paths.append([path for path, _, attribute in split if attribute == role])
        others = [role for role in ROLES if role not in tensors]
        for path in paths[0]:
            owned = all(path in each for each in paths)
            if path and owned and not any(f"{path}.{role}" in self.tensors for role in others):
                return path
        return ""

    def _leaf(self, node: Node, values: Mapping[str, Any]) -> _Layer | None:
        call = leaf_of(node["target"], values)
        if call is None:
            return None
        path, kind = node.get("where") or ("", "")
        if not path or kind != call.cls.__name__ or self._is_taken(path):
            if not call.training:
                return None
            path = str(read(node["outputs"][0]))  # a function, which eval() would not reach
        return _Layer(node, path, call, node["inputs"][0]["arg"])

    def _matrix(self, node: Node) -> _Layer | None:
        """`x @ weight.t()`, with or without a bias: `F.linear` after decomposition."""
        arguments = {item["name"]: item["arg"] for item in node["inputs"]}
        if arguments.keys() & {"beta", "alpha"}:
            return None
        plain = node["target"] == "torch.ops.aten.mm.default"
        data = arguments.get("self" if plain else "mat1", {})
        turned = arguments.get("mat2", {}).get("as_tensor", {}).get("name")
        if "as_tensor" not in data or turned not in self.turned:
            return None
        names = {"weight": str(self.turned[turned])}
        if not plain:
            names["bias"] = str(arguments["self"].get("as_tensor", {}).get("name"))
        return self._layer(node, "torch.ops.aten.linear.default", data, names, {})

    def _is_taken(self, path: str) -> bool:
        """Whether there are tensors at a path, or below: it is no layer without any."""
        return any(name.startswith(f"{path}.") for name in self.tensors)


def _turned(node: Node) -> str | None:
    """The matrix that a node transposes."""
    if node.get("target") not in _TURNED or len(node["outputs"]) != 1:
        return None
    first, *rest = (read(item["arg"]) for item in node["inputs"])
    if tuple(rest) != _TURNED[node["target"]] or "as_tensor" not in node["outputs"][0]:
        return None
    return first if isinstance(first, Name) else None


def _constant(argument: Any) -> Any:
    value = read(argument)
    known = not isinstance(value, Name) and not (
        isinstance(value, list) and any(isinstance(item, Name) for item in value)
    )
    return value if known else UNKNOWN


def _agreed(calls: Sequence[_Layer]) -> dict[str, Call]:
    """The layers whose calls are all made alike."""
    found: dict[str, Call] = {}
    differing = set()
    for layer in calls:
        if found.setdefault(layer.path, layer.call) != layer.call:
            differing.add(layer.path)
    return {path: call for path, call in found.items() if path not in differing}


def _drop_counters(
    graphs: Sequence[tuple[dict[str, Any], Mapping[str, str]]],
    calls: Sequence[_Layer],
    layers: dict[str, Call],
) -> None:
    """A norm in training mode counts its batches itself; one that does not stays a call."""
    wanted = Counter(call.counts for call in calls if call.counts and call.path in layers)
    counting = [
        (node, name)
        for graph, named in graphs
        for node in graph["nodes"]
        if (name := _counted(node, named)) in wanted
    ]
    counted = Counter(name for _, name in counting)
    for call in calls:
        if call.counts and counted[call.counts] != wanted[call.counts]:
            layers.pop(call.path, None)
    for node, name in counting:
        if str(name).rpartition(".")[0] in layers:
            node["target"] = _DROPPED[0]


def _counted(node: Node, named: Mapping[str, str]) -> str | None:
    """The counter that a node adds one to."""
    if node["target"] != _ADD or len(node["inputs"]) != 2:
        return None
    target, one = (item["arg"] for item in node["inputs"])
    if one.get("as_int") != 1 or "as_tensor" not in target:
        return None
    return named.get(target["as_tensor"]["name"])


def _plain(node: Node, layer: _Layer | None) -> Node:
    """A node as the program has it: a call of a layer, or the operation."""
    if layer is not None:
        return {
            "module": layer.path,
            "inputs": [{"arg": layer.data}],
            "outputs": [node["outputs"][0]],
        }
    return {key: value for key, value in node.items() if key != "where"}


def _drop_idle(graph: dict[str, Any], named: Mapping[str, str]) -> None:
    """Leave out assertions, and transposed weights that became a layer's."""
    used = _used(graph)
    graph["nodes"] = [
        node
        for node in graph["nodes"]
        if node.get("target") not in _DROPPED
        and not (
            _turned(node) in named and not any(_names(o) & used.keys() for o in node["outputs"])
        )
    ]


def _used(graph: Mapping[str, Any]) -> Counter[str]:
    """How often each value of a graph is taken."""
    used: Counter[str] = Counter()
    for node in graph["nodes"]:
        for item in node["inputs"]:
            used.update(_names(item["arg"]))
    for output in graph["outputs"]:
        used.update(_names(output))
    return used


def _names(argument: Any) -> set[str]:
    return set(_all_names(argument))


def _all_names(argument: Any) -> Iterator[str]:
    """Every text in an argument under "name" or "as_name"."""
    stack = [argument]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from (v for k, v in item.items() if k in ("name", "as_name") and type(v) is str)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
