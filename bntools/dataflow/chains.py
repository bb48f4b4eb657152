"""Whose a chain of arithmetic is, and what takes its place in the graph.

A module whose every call is one chain and nothing else becomes an Identity when the chain folds;
of any other chain the constants are given numbers with which it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from bntools.dataflow.affines import Chain, Chains, kept_only
from bntools.dataflow.arithmetic import Call, Numbers
from bntools.dataflow.graph import Frame, Kind, Node, Norm, NormLayer, Value
from bntools.dataflow.neutral import neutral_constants
from bntools.report import Reason

__all__ = ["Recorded", "agreed_layers", "with_chains"]

_SUMS = {"add", "sub", "rsub"}
Refusal = tuple[Reason, str]


@dataclass(frozen=True)
class Recorded:
    """A recording in which chains are looked for.

    `frames` are the calls of norm layers and hosts, `own` those of modules that did arithmetic
    themselves, `called` says how often each module was called. `kind` gives the class name of a
    module that may become an Identity, and what rules that out; None for one that has submodules.
    What the `is_standard` layers of torch do is no chain (an InstanceNorm in eval mode).
    """

    nodes: list[Node]
    frames: dict[str, list[Frame]]
    own: Mapping[str, list[Frame]]
    called: Mapping[str, int]
    layers: tuple[NormLayer, ...]
    sealed: frozenset[str]
    kind: Callable[[str], tuple[str, Refusal | None] | None]
    is_standard: Callable[[str], bool]


@dataclass(eq=False)
class _Group:
    """The chains that are one affine of the model: of one module, by the same constants."""

    owner: str
    chains: list[Chain]
    whole: bool


def with_chains(
    recorded: Recorded, numbers: Numbers
) -> tuple[list[Node], dict[str, list[Frame]], tuple[NormLayer, ...]]:
    """The nodes, frames and layers of a recording in which each chain is one AFFINE node."""
    chains = Chains(recorded.nodes, numbers)
    finding = _Finding(recorded, chains)
    groups = finding.groups()
    if not groups:
        return recorded.nodes, recorded.frames, recorded.layers
    known = {layer.path for layer in recorded.layers}
    layers = tuple(finding.layer(group, groups) for group in groups if group.owner not in known)
    return *finding.rebuilt(groups), (*recorded.layers, *layers)


class _Finding:
    """Looks for the chains of one recording that count, and for their owners."""

    def __init__(self, recorded: Recorded, chains: Chains) -> None:
        self.recorded = recorded
        self.chains = chains
        self.numbers = chains.numbers
        self.places = {node: i for i, node in enumerate(recorded.nodes)}
        self.norms = {layer.path for layer in recorded.layers}

    def groups(self) -> list[_Group]:
        """The affines of the model that are chains."""
        owned = {n.norm.owner for n in self.recorded.nodes if n.kind is Kind.AFFINE}
        by_hand = {
            layer.path
            for layer in self.recorded.layers
            if not layer.plain and layer.path not in owned and layer.path in self.recorded.own
        }
        found = self.chains.found(self.norms - by_hand)
        if not found:
            return []
        wholes = {path for path in self.recorded.own if self._is_whole(path, found)}
        groups: dict[object, _Group] = {}
        names: dict[str, int] = {}
        for chain in found:
            path = chain.nodes[0].module
            whole = path in wholes
            if not self._counts(chain, path, whole=whole):
                continue
            key: object = path if whole else (path, chain.operations, tuple(chain.leaves))
            if key not in groups:
                groups[key] = _Group(path if whole else _name(path, chain, names), [], whole)
            groups[key].chains.append(chain)
        return list(groups.values())

    def _counts(self, chain: Chain, path: str, *, whole: bool) -> bool:
        """Whether a chain is an affine of the model, and not a literal or what norm layers do."""
        if self.recorded.is_standard(path):
            return False
        holders = {self.numbers.leaves[leaf].path for leaf in chain.leaves}
        if (holders - {path} if whole else {*holders, path}) & self.norms:
            return False
        if not whole:  # sums and literals are left to the planner, which moves affines through them
            scales = any(_scales(call, data) for call, data in chain.calls)
            return bool(chain.leaves) and scales
        return bool(chain.leaves) or chain.axis is not None or bool(chain.shift.any())

    def _is_whole(self, path: str, found: Iterable[Chain]) -> bool:
        """Whether all calls of a module are a chain each, and nothing else."""
        frames = self.recorded.own[path]
        if len(frames) != self.recorded.called.get(path) or self.recorded.kind(path) is None:
            return False
        return all(self._is_a_chain(frame, path, found) for frame in frames)

    def _is_a_chain(self, frame: Frame, path: str, found: Iterable[Chain]) -> bool:
        inside = range(frame.start, frame.stop)
        mine = [c for c in found if c.nodes[0].module == path and self.places[c.nodes[0]] in inside]
        if len(mine) != 1:
            return False
        chain = mine[0]
        if frame.inputs != (chain.data,) or frame.outputs != (chain.out,):
            return False
        others = [n for n in self.recorded.nodes[frame.start : frame.stop] if n not in chain.nodes]
        return all(self.numbers.constants.issuperset(n.inputs) and not n.writes for n in others)

    # layers

    def layer(self, group: _Group, groups: Iterable[_Group]) -> NormLayer:
        """What the plan shows of a chain."""
        chain = group.chains[0]
        if group.whole:
            name, refusal = self.recorded.kind(group.owner) or ("", None)
            refusal = refusal or next(self._read_elsewhere(group, groups), None)
            kind = f"{name} ({chain.operations})"
            return NormLayer(group.owner, kind, plain=False, refusal=refusal, chain=True)
        kind = f"affine ({chain.operations})"
        constants, refusal = self._neutral(group, groups)
        return NormLayer(
            group.owner, kind, plain=False, refusal=refusal, chain=True, neutral=constants
        )

    def _neutral(
        self, group: _Group, groups: Iterable[_Group]
    ) -> tuple[tuple[tuple[str, str, float, float], ...], Refusal | None]:
        """The numbers with which a chain does nothing, or why it cannot be had."""
        chain = group.chains[0]
        held = [self.numbers.leaves[leaf] for leaf in chain.leaves]
        for leaf in held:
            if leaf.path in self.recorded.sealed:
                return (), (Reason.SCRIPTED, f"{leaf.name} is compiled by TorchScript")
            if leaf.also:
                also = ", ".join(leaf.also)
                return (), (Reason.SHARED_STATISTICS, f"its constant {leaf.name} is also {also}")
        refusal = next(self._read_elsewhere(group, groups), None)
        if refusal is not None:
            return (), refusal
        sample = _sample(chain)
        wanted = neutral_constants(chain.calls, self.numbers, chain.apply, sample)
        if wanted is None:
            why = "no numbers of its constants make it do nothing, and its module does more"
            return (), (Reason.NOT_NEUTRAL, why)
        found = [(self.numbers.leaves[value], number) for value, number in wanted.items()]
        return tuple((leaf.path, leaf.attribute, *number) for leaf, number in found), None

    def _read_elsewhere(self, group: _Group, groups: Iterable[_Group]) -> Iterator[Refusal]:
        """Who else reads the constants of a chain."""
        gone = self.chains.idle(chain for each in groups for chain in each.chains)
        gone |= {node for each in groups for chain in each.chains for node in chain.nodes}
        for value in {leaf: None for chain in group.chains for leaf in chain.leaves}:
            leaf = self.numbers.leaves[value]
            holders = {leaf.path, *(name.rpartition(".")[0] for name in leaf.also)}
            if group.whole and group.owner not in holders:
                continue
            for node in self.chains.uses.get(value, ()):
                if node not in gone and not kept_only(node):
                    what = node.module or "the model itself"
                    detail = f"{what} reads its constant {leaf.name} as well"
                    yield Reason.SHARED_STATISTICS, detail
            for other in groups:
                reads = any(value in chain.leaves for chain in other.chains)
                apart = group.whole and other.whole and other.owner in holders
                if other is not group and reads and not apart:
                    detail = f"{other.owner} reads its constant {leaf.name} as well"
                    yield Reason.SHARED_STATISTICS, detail

    # the new graph

    def rebuilt(self, groups: Iterable[_Group]) -> tuple[list[Node], dict[str, list[Frame]]]:
        """The nodes with one AFFINE for each chain, and the calls at their new places."""
        gone = self.chains.idle(chain for group in groups for chain in group.chains)
        made: dict[Node, Node] = {}
        for group in groups:
            for chain in group.chains:
                gone.update(chain.nodes)
                made[chain.nodes[-1]] = self._affine(group, chain)
        nodes: list[Node] = []
        places = [0]
        for node in self.recorded.nodes:
            if node in made:
                nodes.append(made[node])
            elif node not in gone:
                nodes.append(node)
            places.append(len(nodes))
        frames = {
            path: [replace(f, start=places[f.start], stop=places[f.stop]) for f in calls]
            for path, calls in self._calls(groups).items()
        }
        return nodes, frames

    def _calls(self, groups: Iterable[_Group]) -> dict[str, list[Frame]]:
        frames = dict(self.recorded.frames)
        for group in groups:
            if group.whole:
                frames[group.owner] = self.recorded.own[group.owner]
                continue
            frames[group.owner] = [
                Frame(group.owner, (c.data,), (c.out,), at, at + 1, c.nodes[-1].stack)
                for c in group.chains
                for at in [self.places[c.nodes[-1]]]
            ]
        return frames

    def _affine(self, group: _Group, chain: Chain) -> Node:
        dim = chain.axis
        if dim is None:
            dim = _likely_axis(chain, self.chains.uses)
        node = Node(
            Kind.AFFINE, f"affine ({chain.operations})", [chain.data, *chain.leaves], [chain.out],
            group.owner, Norm(group.owner, chain.affine(dim), dim), stack=chain.nodes[-1].stack,
        )  # fmt: skip
        node.writes = [value for value in chain.nodes[0].writes if value is chain.data]
        chain.out.producer = node
        return node


def _scales(call: Call, data: Value) -> bool:
    """Whether an operation on data does more than to add, and to multiply by a literal."""
    if call.operation in ("mul", "div"):
        return any(value is not data for value in call.values())
    return call.operation not in _SUMS | {"neg"}


def _name(path: str, chain: Chain, names: dict[str, int]) -> str:
    name = f"{path} ({chain.operations})".lstrip()
    names[name] = names.get(name, 0) + 1
    return name if names[name] == 1 else f"{name} #{names[name]}"


def _sample(chain: Chain) -> torch.Tensor:
    """Data on which a chain is tried: small, but for the channels."""
    axis = 1 if chain.calls[0][0].operation == "batch_norm" else chain.axis
    shape = [n if i == axis else min(n, 2) for i, n in enumerate(chain.data.shape)]
    numbers = torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64, device="cpu")
    return (numbers.reshape(shape) * 0.7183 % 4 - 2).to(chain.calls[0][0].dtypes[-1])


def _likely_axis(chain: Chain, uses: Mapping[Value, list[Node]]) -> int:
    """The channels of what a map that is alike for all of them comes from, or goes to."""
    rank, value = len(chain.data.shape), chain.data
    while value.producer is not None and len(value.shape) == rank:
        node = value.producer
        if node.kind is Kind.LINEAR:
            return node.linear.channel_dim
        if node.kind not in (Kind.MOVE, Kind.PASS):
            break
        value = node.inputs[0]
    for node in uses.get(chain.out, ()):
        if node.kind is Kind.LINEAR and node.linear.entry is not None:
            return node.linear.entry.channel_dim
    return rank - 1 if rank in (1, 3) else 1


def agreed_layers(
    first: tuple[NormLayer, ...], second: tuple[NormLayer, ...]
) -> tuple[tuple[NormLayer, ...], tuple[NormLayer, ...]]:
    """The layers of two recordings, chains that are not in both, or not alike, being refused."""
    known = [{layer.path: layer for layer in layers} for layers in (first, second)]
    odd = [
        path
        for path in dict.fromkeys(path for layers in known for path in layers)
        if known[0].get(path) != known[1].get(path)
        and any(layers[path].chain for layers in known if path in layers)
    ]
    if not odd:
        return first, second
    refusal = Reason.DATA_DEPENDENT, "it is another one, or none, for other inputs"
    refused = [replace(known[0].get(p) or known[1][p], refusal=refusal, neutral=()) for p in odd]
    return tuple(  # type: ignore[return-value]  # two in, two out
        (*(layer for layer in layers if layer.path not in odd), *refused)
        for layers in (first, second)
    )
