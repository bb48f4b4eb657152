"""The layers of an ONNX model, by the module names that torch's exporter leaves in its nodes."""

from __future__ import annotations

import ast
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from bntools.errors import InputError, LoadError
from bntools.examples import Examples
from bntools.runtimes.sessions import Port, open_session
from bntools.runtimes.widening import DoubleModel, read_model
from bntools.watching import Folded, Key, Point, See

__all__ = ["OnnxLayers", "feeds"]

_SCOPES, _CLASSES = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"
_LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_ELEMENTWISE = {"Add", "Div", "Mul", "Sub"}
_FLOATS = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}


class _Scope(NamedTuple):
    """A module in which a node ran: its path and class."""

    path: str
    kind: str


class OnnxLayers:
    """An ONNX model on some inputs, in ONNX Runtime.

    The tensors that leave a module's nodes become outputs of a temporary model. What is an output
    cannot be fused away, so ONNX Runtime may fuse less there than in the model as it ships.
    """

    def __init__(
        self,
        model: Path | bytes,
        examples: Examples,
        *,
        provider: str = "cpu",
        allow_tf32: bool = False,
    ) -> None:
        self._proto, self._folder = _read(model)
        self._source = model
        self._examples = examples
        self._provider = provider
        self.tf32 = allow_tf32 and provider != "cpu"
        self._nodes = [n for n in self._proto.graph.node if n.op_type != "Constant"]
        self._scopes = [_scopes(node) for node in self._nodes]
        self._producer = {out: i for i, n in enumerate(self._nodes) for out in n.output}
        self.points = tuple(self._points())
        self._value_of = {point.key: str(point.value) for point in self.points}

    @property
    def dtype(self) -> torch.dtype:
        """The first floating dtype among its weights, or that of its inputs."""
        graph = self._proto.graph
        kinds = [tensor.data_type for tensor in graph.initializer]
        kinds += [value.type.tensor_type.elem_type for value in graph.input]
        return next((_FLOATS[kind] for kind in kinds if kind in _FLOATS), torch.float32)

    @property
    def eps(self) -> float:
        """One rounding of the coarsest dtype among its weights."""
        kinds = {_FLOATS.get(t.data_type, self.dtype) for t in self._proto.graph.initializer}
        return max((torch.finfo(kind).eps for kind in kinds), default=torch.finfo(self.dtype).eps)

    def in_dtype(self, _: torch.dtype) -> None:
        """An ONNX model stays in the dtype that it has."""

    @property
    def norms(self) -> Set[str]:
        """The paths of the modules that hold a BatchNormalization."""
        return {path for i in self._batch_norms() for path in self._innermost(i)}

    @property
    def keeps(self) -> Set[str]:
        """The paths of the modules that may normalise: they apply constants of many elements."""
        many = {t.name for t in self._proto.graph.initializer if math.prod(t.dims) > 1}
        applied = (
            i
            for i, node in enumerate(self._nodes)
            if node.op_type in _ELEMENTWISE and any(name in many for name in node.input)
        )
        return self.norms | {path for i in applied for path in self._innermost(i)}

    def folded(self, norms: Set[str]) -> Folded:
        """What differs by design in a model in which these norms are folded."""
        gone = [i for i in self._batch_norms() if any(path in norms for path in self._innermost(i))]
        changed: set[Hashable] = set()
        carried: dict[Hashable, tuple[Hashable, str]] = {}
        for i in gone:
            way = self._way_to(i, gone)
            if way:
                changed.update(way)
                carried[way[-1]] = self._nodes[i].output[0], *self._innermost(i)
        return Folded(changed, carried)

    def visit(self, wanted: Collection[Key], see: See) -> None:
        """Run, and show the tensors at the wanted points."""
        self._visit(self._proto, self._folder, wanted, see)

    def visit_jittered(self, wanted: Collection[Key], see: See, *, seed: int) -> None:
        """The same with every weight off by about one rounding."""
        proto = read_model(self._source)
        random = np.random.default_rng(seed)
        for tensor in proto.graph.initializer:
            if tensor.data_type in _FLOATS:
                _jitter(tensor, random)
        self._visit(proto, None, wanted, see)

    def exactly(self) -> Callable[[Collection[Key], See], None] | None:
        """The same in float64 by onnx's reference evaluator, if that has all operations."""
        proto = read_model(self._source)
        fed = feeds(self._examples, open_session(self._source).inputs)

        def visit(wanted: Collection[Key], see: See) -> None:
            values = {key: self._value_of[key] for key in wanted}
            given = DoubleModel(_watching(proto, values.values())).run(fed)
            for key, value in values.items():
                see(key, given[value])

        try:
            visit([self.points[-1].key], lambda _, __: None)
        except Exception:  # noqa: BLE001 - an operation that onnx's evaluator does not have
            return None
        return visit

    def _visit(
        self, proto: onnx.ModelProto, folder: Path | None, wanted: Collection[Key], see: See
    ) -> None:
        values = {key: self._value_of[key] for key in wanted}
        session = open_session(
            _watching(proto, values.values()).SerializeToString(),
            provider=self._provider,
            allow_tf32=self.tf32,
            beside=folder,
        )
        given = session.run(feeds(self._examples, session.inputs))
        for key, value in values.items():
            see(key, given[value])

    def _batch_norms(self) -> list[int]:
        return [i for i, node in enumerate(self._nodes) if node.op_type == "BatchNormalization"]

    def _innermost(self, index: int) -> Iterator[str]:
        yield from (scope.path for scope in self._scopes[index][-1:])

    def _is_linear(self, value: str) -> bool:
        node = self._nodes[self._producer[value]] if value in self._producer else None
        if node is None:
            return False
        behind = (self._producer.get(name) for name in node.input)
        is_biased = node.op_type == "Add" and any(
            i is not None and self._nodes[i].op_type == "MatMul" for i in behind
        )
        return node.op_type in _LINEAR or is_biased

    def _way_to(self, norm: int, gone: list[int]) -> list[str]:
        """The values from a norm back to the layer that can have absorbed it; none otherwise.

        It cannot where something else uses one of them.
        """
        returned = {value.name for value in self._proto.graph.output}
        way: list[str] = []
        user: int | None = norm
        while user in gone:
            value = self._nodes[user].input[0]
            uses = [node for node in self._nodes if value in node.input]
            same = self._nodes[user].input  # one norm may be called twice
            if value in returned or any(list(node.input) != list(same) for node in uses):
                return []
            way.append(value)
            user = self._producer.get(value)
        return way if self._is_linear(way[-1]) else []

    def _points(self) -> Iterator[Point]:
        """What leaves the nodes of each module's call, in execution order; the outputs last."""
        sizes = _sizes(self._proto.graph, self._examples)
        uses: dict[str, list[int]] = defaultdict(list)
        for i, node in enumerate(self._nodes):
            for name in node.input:
                uses[name].append(i)
        returned = {value.name for value in self._proto.graph.output}
        found: list[tuple[int, int, Point]] = []
        for scope, call, start, stop in self._calls():
            leaving = [
                name
                for node in self._nodes[start:stop]
                for name in node.output
                if name in returned or any(not start <= use < stop for use in uses[name])
            ]
            floats = [name for name in leaving if sizes.get(name, 1)]
            for output, name in enumerate(floats):
                point = Point(Key(scope.path, call, output), scope.kind, sizes.get(name, 1), name)
                found.append((stop, -start, point))
        yield from (point for *_, point in sorted(found, key=lambda each: each[:2]))
        for output, value in enumerate(self._proto.graph.output):
            yield Point(Key("", 1, output), "", sizes.get(value.name) or 1, value.name)

    def _calls(self) -> Iterator[tuple[_Scope, int, int, int]]:
        """(module, number of the call, first node, end) of each run of nodes in one module."""
        count: Counter[str] = Counter()
        open_at: dict[_Scope, int] = {}
        for i, scopes in enumerate([*self._scopes, ()]):
            for scope in [each for each in open_at if each not in scopes]:
                count[scope.path] += 1
                yield scope, count[scope.path], open_at.pop(scope), i
            for scope in scopes:
                open_at.setdefault(scope, i)


def _watching(proto: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of a model with more outputs."""
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    there = {value.name for value in watched.graph.output}
    new = dict.fromkeys(name for name in names if name not in there)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in new)
    return watched


def feeds(examples: Examples, inputs: Iterable[Port]) -> dict[str, Tensor]:
    """The tensors of example inputs under the names of a model's inputs, in its dtypes.

    Keyword arguments go by name, the others by order.
    """
    ports = list(inputs)
    named = {p.name: v for p in ports if isinstance(v := examples.kwargs.get(p.name), Tensor)}
    rest = [t for t in examples.tensors() if not any(t is each for each in named.values())]
    unnamed = [port for port in ports if port.name not in named]
    if len(rest) != len(unnamed):
        raise InputError(
            f"Cannot run the ONNX model on {examples}: it takes {', '.join(map(str, ports))}."
        )
    named.update(zip((port.name for port in unnamed), rest, strict=True))
    dtypes = {port.name: port.dtype for port in ports}
    return {name: t.to(dtypes[name]) if t.is_floating_point() else t for name, t in named.items()}


def _read(model: Path | bytes) -> tuple[onnx.ModelProto, Path | None]:
    try:
        if isinstance(model, bytes):
            return onnx.load_model_from_string(model), None
        return onnx.load(model, load_external_data=False), model.parent
    except Exception as error:
        what = "the model" if isinstance(model, bytes) else str(model)
        raise LoadError(f"Cannot load {what}: it is no ONNX model.") from error


def _jitter(tensor: onnx.TensorProto, random: np.random.Generator) -> None:
    """Move every number by about one rounding."""
    eps = torch.finfo(_FLOATS[tensor.data_type]).eps
    values = numpy_helper.to_array(tensor).astype(np.float64)
    moved = values * (1 + eps / 2 * random.standard_normal(values.shape))
    name, kind = tensor.name, tensor.data_type
    rounded = moved.astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    tensor.CopyFrom(numpy_helper.from_array(rounded, name))


def _scopes(node: onnx.NodeProto) -> tuple[_Scope, ...]:
    """The modules in which a node ran, the outermost first; the last names are the operation's."""
    found = {p.key: p.value for p in node.metadata_props if p.key in (_SCOPES, _CLASSES)}
    try:
        paths: Any = ast.literal_eval(found.get(_SCOPES, "[]"))
        kinds: Any = ast.literal_eval(found.get(_CLASSES, "[]"))
    except (SyntaxError, ValueError):
        return ()
    both = zip(paths[:-1], kinds[:-1], strict=False)
    named = (_Scope(str(path), str(kind).rpartition(".")[2]) for path, kind in both if path)
    return tuple(dict.fromkeys(named))


def _sizes(graph: onnx.GraphProto, examples: Examples) -> dict[str, int]:
    """How many numbers a value has, as far as that is written; 0 for what holds no floats."""
    batch = examples.batch or 1
    found = {}
    for value in (*graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        shape = [d.dim_value or batch for d in tensor.shape.dim]
        found[value.name] = math.prod(shape) if tensor.elem_type in (0, *_FLOATS) else 0
    return found
