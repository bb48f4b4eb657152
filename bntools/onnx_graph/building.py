"""From an ONNX model to the neutral graph: the same that a recording of a PyTorch model gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from onnx import NodeProto
from torch import Tensor, nn

from bntools.dataflow.graph import Frame, Graph, Kind, Linear, Node, Norm, NormLayer, Value
from bntools.onnx_graph.attributes import is_standard
from bntools.onnx_graph.chains import Chain, chains
from bntools.onnx_graph.linears import LinearCall, linear_call
from bntools.onnx_graph.movement import movement
from bntools.onnx_graph.naming import Paths, class_of, module_of
from bntools.onnx_graph.norms import NormCall, inner_norms, norm_call
from bntools.onnx_graph.reading import OnnxSource
from bntools.onnx_graph.tensors import FLOATS, tensor_of
from bntools.onnx_graph.uses import Uses, input_names
from bntools.onnx_graph.values import Knowledge
from bntools.report import Reason

__all__ = ["OnnxGraph", "Site", "Term", "bias_of", "built"]

_MOST_TERMS = 1 << 20
_BY_SHAPE = {"Shape", "Size", "EyeLike", "RandomNormalLike", "RandomUniformLike"}


@dataclass(frozen=True, eq=False)
class Site:
    """Where in a file a norm layer is: its nodes, which go when it folds, and both of its ends.

    `call` has the numbers of a BatchNormalization node; `trivial` says that it is a chain with the
    same numbers for all channels, of which nobody wants to hear unless it folds.
    """

    nodes: tuple[int, ...]
    data: str
    output: str
    call: NormCall | None = None
    trivial: bool = False


@dataclass(frozen=True)
class Term:
    """A constant that is added: an input of a node."""

    node: int
    position: int
    name: str


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """The neutral graph of a file, and where in the file its layers are, by their paths."""

    graph: Graph
    known: Knowledge
    hosts: dict[str, LinearCall]
    terms: dict[str, Term]
    sites: dict[str, Site]


def built(source: OnnxSource, known: Knowledge) -> OnnxGraph:
    """The neutral graph of a model for inputs of one size."""
    return _Builder(source, known).build()


@dataclass
class _Builder:
    source: OnnxSource
    known: Knowledge
    values: dict[str, Value] = field(default_factory=dict)
    made: list[Node] = field(default_factory=list)
    layers: list[NormLayer] = field(default_factory=list)
    frames: dict[str, list[Frame]] = field(default_factory=dict)
    parameters: dict[str, Value] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    hosts: dict[str, LinearCall] = field(default_factory=dict)
    terms: dict[str, Term] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    chained: list[NormLayer] = field(default_factory=list)
    host_paths: Paths = field(default_factory=Paths)
    norm_paths: Paths = field(default_factory=Paths)

    @property
    def nodes(self) -> Sequence[NodeProto]:
        listed: Sequence[NodeProto] = self.source.proto.graph.node
        return listed

    def build(self) -> OnnxGraph:
        nodes, known = self.nodes, self.known
        uses = Uses(self.source.proto.graph)
        linears = {
            index: call
            for index in range(len(nodes))
            if (call := linear_call(nodes, index, known, uses)) is not None
        }
        taken: dict[int, object] = dict(linears)
        taken.update({c.addition: c for c in linears.values() if c.addition is not None})
        ends = {chain.nodes[-1]: chain for chain in chains(nodes, known, uses, taken)}
        inside = {index for chain in ends.values() for index in chain.nodes}
        for index, node in enumerate(nodes):
            if index in linears:
                self._linear(node, linears[index])
            elif index in ends:
                self._chain(ends[index])
            elif index not in inside and index not in taken:
                self._other(index, node)
            for path in inner_norms(node):
                self._inner(path)
        returned = [self._value(name) for name in uses.outputs]
        self.made.append(Node(Kind.OUTPUT, "returned", returned, []))
        graph = Graph(
            self.made, self.frames, (*self.layers, *self.chained), self.parameters, self.tensors,
            self.owners, {}, frozenset(self.absent),
        ).link()  # fmt: skip
        return OnnxGraph(graph, self.known, self.hosts, self.terms, self.sites)

    def _value(self, name: str) -> Value:
        if name not in self.values:
            known = self.known[name]
            shape = known.shape if known.shape is not None and known.complete else ()
            self.values[name] = Value(shape, constant=known.constant)
        return self.values[name]

    # what nodes become

    def _linear(self, node: NodeProto, call: LinearCall) -> None:
        path = self.host_paths.of(node)
        self.hosts[path] = call
        weight = self._parameter(path, "weight", call.weight, call) or self._value(call.weight)
        inputs, bias = [self._value(call.data), weight], None
        if call.bias is None:
            self.absent.add(f"{path}.bias")
        else:
            plain = call.bias_is_plain
            bias = self._parameter(path, "bias", call.bias, call) if plain else None
            bias = bias or self._value(call.bias)
            inputs.append(bias)
        detail = Linear(weight, bias, call.layout, call.channel_dim, entry=call.entry)
        self._add(Kind.LINEAR, node.op_type, path, inputs, [call.output], detail=detail)

    def _parameter(self, path: str, part: str, name: str, call: LinearCall) -> Value | None:
        """A constant as a parameter of one layer alone: other users keep what they have."""
        known = self.known[name]
        if not known.constant or known.array is None or known.element not in FLOATS:
            return None
        return self._owned(path, f"{path}.{part}", name, call)

    def _owned(self, path: str, owned: str, name: str, call: LinearCall | None = None) -> Value:
        known = self.known[name]
        assert known.array is not None  # noqa: S101 - the callers have looked
        tensor = tensor_of(known.array, known.element)
        if call is not None and call.weight != name:
            tensor = bias_of(tensor, call, self.known[call.output].shape or ())
        elif call is not None and call.weight_factor != 1.0:
            tensor = (tensor.double() * call.weight_factor).to(tensor.dtype)
        value = Value(tuple(tensor.shape), constant=True, parameter=owned)
        self.parameters[owned], self.owners[owned] = value, path
        self.tensors[owned] = nn.Parameter(tensor, requires_grad=False)
        return value

    def _chain(self, chain: Chain) -> None:
        nodes = [self.nodes[index] for index in chain.nodes]
        shape = self.known[chain.output].shape or ()
        axis = self._axis(chain, len(shape))
        operations = ", ".join(dict.fromkeys(node.op_type.lower() for node in nodes))
        path, whole = self._chain_path(chain, nodes)
        path = self.norm_paths.unique(path if whole else f"{path} ({operations})")
        named = class_of(nodes[-1]) if whole else ""
        layer = NormLayer(path, named or f"affine ({operations})")
        self.chained.append(layer)
        norm = Norm(path, chain.affine(shape[axis]), axis)
        site = Site(chain.nodes, chain.data, chain.output, trivial=chain.axis is None)
        self._norm(path, norm, site, operations)

    def _chain_path(self, chain: Chain, nodes: Sequence[NodeProto]) -> tuple[str, bool]:
        """The module of a chain, and whether it does nothing else, as a FrozenBatchNorm2d."""
        module = module_of(nodes[-1])
        if not module or any(module_of(node) != module for node in nodes):
            return module or nodes[-1].name or chain.output, False
        own = {
            index
            for index, node in enumerate(self.nodes)
            if module_of(node) == module
            and not all(self.known[name].constant for name in node.output if name)
        }
        return module, own == set(chain.nodes)

    def _axis(self, chain: Chain, rank: int) -> int:
        """Where the channels are; those of a chain that has no say in it, as in what it follows."""
        if chain.axis is not None:
            return chain.axis
        before = self._value(chain.data).producer
        if before is not None and before.kind is Kind.LINEAR:
            return before.linear.channel_dim
        if before is not None and before.kind is Kind.AFFINE:
            return before.norm.channel_dim
        return min(1, rank - 1)

    def _other(self, index: int, node: NodeProto) -> None:
        if all(self.known[name].constant for name in node.output if name):
            return
        if is_standard(node) and node.op_type == "BatchNormalization":
            self._batch_norm(index, node)
            return
        if is_standard(node) and node.op_type in _BY_SHAPE:
            return
        if self._is_only_picked(node):
            return
        found = movement(node, self.known, self.source.proto)
        where = module_of(node) or node.name or node.output[0]
        if found is None:
            inputs = [self._value(name) for name in input_names(node)]
            self._add(Kind.OPAQUE, node.op_type, where, inputs, [n for n in node.output if n])
            return
        inputs = [self._value(name) for name in found.data]
        if found.kind is Kind.SUM:
            inputs = [self._term(index, place, name) for place, name in enumerate(found.data)]
        several = node.op_type in ("Split", "MaxPool")
        outputs = [name for name in node.output if name] if several else [node.output[0]]
        self._add(found.kind, node.op_type, where, inputs, outputs, detail=found.detail)

    def _term(self, node: int, place: int, name: str) -> Value:
        """A term of a sum; a constant is a parameter, which a norm behind the sum may scale."""
        known = self.known[name]
        small = known.array is not None and known.array.size <= _MOST_TERMS
        if not (known.constant and small):
            return self._value(name)
        path = self.host_paths.unique(name)
        value = self._owned(path, path, name)
        self.terms[path] = Term(node, place, name)
        return value

    def _is_only_picked(self, node: NodeProto) -> bool:
        """Whether all that uses the parts of a split is known: each is a slice of its data then."""
        if node.op_type != "SplitToSequence" or node.output[0] not in self.known.splits:
            return False
        users = [user for user in self.nodes if node.output[0] in input_names(user)]
        outputs = {value.name for value in self.source.proto.graph.output}
        return node.output[0] not in outputs and all(
            user.op_type == "SequenceAt" and user.output[0] in self.known.parts for user in users
        )

    def _batch_norm(self, index: int, node: NodeProto) -> None:
        call = norm_call(node, self.known)
        path = self.norm_paths.of(node)
        layer = NormLayer(path, node.op_type)
        if call.refusal is not None:
            layer = replace(layer, refusal=call.refusal)
        self.layers.append(layer)
        site = Site((index,), node.input[0], node.output[0], call)
        self._norm(path, Norm(path, call.affine), site, node.op_type)

    def _norm(self, path: str, norm: Norm, site: Site, name: str) -> None:
        self.sites[path] = site
        data = self._value(site.data)
        node = self._add(Kind.AFFINE, name, path, [data], [site.output], detail=norm)
        start = len(self.made) - 1
        frame = Frame(path, (data,), (node.outputs[0],), start, start + 1)
        self.frames.setdefault(path, []).append(frame)

    def _inner(self, node: NodeProto) -> None:
        path = self.norm_paths.of(node)
        why = "it is inside of a branch or loop, which is left as it is"
        refusal = Reason.CONTROL_FLOW, why
        self.layers.append(NormLayer(path, node.op_type, refusal=refusal))

    def _add(
        self, kind: Kind, name: str, module: str, inputs: list[Value], outputs: Sequence[str], *,
        detail: object = None,
    ) -> Node:  # fmt: skip
        results = [self._value(output) for output in outputs]
        node = Node(kind, name, inputs, results, module, detail)  # type: ignore[arg-type]
        for value in results:
            value.producer = node
        self.made.append(node)
        return node


def bias_of(tensor: Tensor, call: LinearCall, out: tuple[int, ...]) -> Tensor:
    """A bias as the layer adds it: one number per output channel, with Gemm's factor in it."""
    plain = tensor.reshape(-1)
    channels = out[call.channel_dim] if len(out) > call.channel_dim else plain.numel()
    if plain.numel() == 1 and channels != 1:
        plain = plain.expand(channels).clone()
    if call.factor == 1.0:
        return plain
    return (plain.to(torch.float64) * call.factor).to(tensor.dtype)
