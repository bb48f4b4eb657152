"""The layers of a model as points to compare at: what each module call gives, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bntools.dataflow.graph import Graph, Kind, Node, Value
from bntools.dataflow.guard import unwritten
from bntools.dataflow.reach import Refused, carried, crosses, origins, reach, results
from bntools.dataflow.recorder import record
from bntools.dataflow.tape import tensors_in
from bntools.equivalence import in_float64
from bntools.errors import InputError
from bntools.examples import Examples
from bntools.modules import duplicate, floating_tensors, named_modules, named_tensors, preserved
from bntools.planning import NormFold
from bntools.planning.deciding import decide
from bntools.planning.folds import Kept
from bntools.report import Reason
from bntools.runtimes.precision import tf32

__all__ = ["Folded", "Key", "Layered", "Point", "See", "TorchLayers", "jittered", "run_watched"]


class Key(NamedTuple):
    """One tensor that a module gives: its path, the call (from 1), and which of its tensors."""

    path: str
    call: int
    output: int


class Point(NamedTuple):
    """A tensor that can be compared; `value` is the same for points that are the same tensor."""

    key: Key
    kind: str
    size: int
    value: Hashable


@dataclass(frozen=True)
class Folded:
    """What folding some norms changes on the way to them.

    `changed` are the values between hosts and norms, which hold something else by design;
    `carried` maps those that hold a norm's output instead to that output and the norm's path.
    """

    changed: Set[Hashable] = frozenset()
    carried: dict[Hashable, tuple[Hashable, str]] = field(default_factory=dict)


See = Callable[[Key, Tensor], None]


class Layered(Protocol):
    """A model of which the layers can be looked at while it runs."""

    @property
    def points(self) -> tuple[Point, ...]:
        """The points in execution order."""

    @property
    def dtype(self) -> torch.dtype:
        """The first floating dtype of its parameters."""

    @property
    def eps(self) -> float:
        """One rounding of the coarsest dtype among its parameters."""

    @property
    def tf32(self) -> bool:
        """Whether its products may be rounded to TF32."""

    @property
    def norms(self) -> Set[str]:
        """The paths of the norm layers that ran."""

    @property
    def keeps(self) -> Set[str]:
        """The paths of modules that hold something of their own, so that no norm there is gone."""

    def folded(self, norms: Set[str]) -> Folded:
        """What differs by design in a model in which these norms are folded."""

    def in_dtype(self, dtype: torch.dtype) -> Layered | None:
        """The same model in a coarser dtype, if it runs in that."""

    def visit(self, wanted: Collection[Key], see: See) -> None:
        """Run, and show the tensors at the wanted points, while they are as the layer gave them."""

    def visit_jittered(self, wanted: Collection[Key], see: See, *, seed: int) -> None:
        """The same with every parameter off by about one rounding."""

    def exactly(self) -> Callable[[Collection[Key], See], None] | None:
        """The same in float64, if the model runs in that."""


class TorchLayers:
    """A PyTorch model on some inputs."""

    def __init__(self, model: nn.Module, examples: Examples, *, allow_tf32: bool = False) -> None:
        self.model = model
        self.tf32 = allow_tf32 and any(t.is_cuda for *_, t in named_tensors(model))
        self.examples = examples
        fed = examples.copied()
        try:
            self._graph = record(model, fed.args, fed.kwargs, calls=True)
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise InputError(
                f"Cannot run the model on {examples}: {type(error).__name__}: {why}."
                " Give inputs that it accepts."
            ) from error
        self.points = tuple(_points(model, self._graph))
        self._sites = _sites(self._graph)

    @property
    def norms(self) -> Set[str]:
        """The paths of the norm layers that ran."""
        return self._sites.keys()

    @property
    def keeps(self) -> Set[str]:
        """The paths of the modules that hold parameters or buffers of their own."""
        return {path for path, *_ in named_tensors(self.model)}

    @property
    def dtype(self) -> torch.dtype:
        """The first floating dtype of its parameters."""
        return next((t.dtype for t in floating_tensors(self.model)), torch.float32)

    def folded(self, norms: Set[str]) -> Folded:
        """What differs by design in a model in which these norms are folded."""
        gone = {node for path in norms for node in self._sites.get(path, ())}
        forward = self._forward(norms)
        gone -= forward
        changed: set[Hashable] = set(_onward(forward, gone | forward))
        norms_left = set(self._graph.of_kind(Kind.AFFINE)) - gone - forward
        while kept := {node for node in gone if not _hosts(node, gone | forward, norms_left)}:
            gone -= kept
        carried: dict[Hashable, tuple[Hashable, str]] = {}
        for node in sorted(gone, key=lambda each: each.order):
            between = set(_between(node.inputs[0], gone))
            changed.update(between)
            through = {value.producer for value in between if value.producer is not None}
            for host in _hosts(node, gone, norms_left):
                ways = reach(host.outputs[0], frozenset(), through).nodes
                changed.update(value for way in ways for value in way.outputs)
            origin = _origin(node, gone)
            if origin is not None:
                carried[origin] = node.outputs[0], node.norm.owner
        for node in self._graph.nodes:
            unused = node.idle or not any(value.consumers for value in node.outputs)
            if unused and any(value in changed for value in node.inputs):
                changed.update(node.outputs)
        return Folded(changed, carried)

    def _forward(self, norms: Set[str]) -> set[Node]:
        """The calls of the norms that fold into what comes after them."""
        stays = Refused(Reason.SKIPPED, "it is there")
        forced = {path: Kept(stays, stays) for path in self._sites if path not in norms}
        outcomes = decide(self._graph, self._sites.keys(), forced).items()
        paths = [path for path, fold in outcomes if isinstance(fold, NormFold) and fold.forward]
        return {node for path in paths for node in self._sites.get(path, ())}

    @property
    def eps(self) -> float:
        """One rounding of the coarsest dtype among its parameters."""
        dtypes = {t.dtype for t in floating_tensors(self.model)} or {torch.float32}
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def in_dtype(self, dtype: torch.dtype) -> TorchLayers | None:
        """The same model in a coarser dtype, if it runs in that."""
        try:
            return TorchLayers(duplicate(self.model).to(dtype), self.examples.cast(dtype))
        except Exception:  # noqa: BLE001 - models raise anything in a dtype that is not theirs
            return None

    def visit(self, wanted: Collection[Key], see: See) -> None:
        """Run, and show the tensors at the wanted points, while they are as the layer gave them."""
        with tf32(self.tf32):
            run_watched(self.model, self.examples, wanted, see)

    def visit_jittered(self, wanted: Collection[Key], see: See, *, seed: int) -> None:
        """The same with every parameter off by about one rounding.

        Random numbers come from another seed: what draws them shows by a large error.
        """
        model = jittered(self.model, seed)
        with tf32(self.tf32):
            run_watched(model, self.examples, wanted, see, seed=seed)

    def exactly(self) -> Callable[[Collection[Key], See], None] | None:
        """The same in float64, if the model runs in that."""
        double = in_float64(self.model)
        examples = self.examples.cast(torch.float64, "cpu")
        try:
            run_watched(double, examples, (Key("", 1, 0),), lambda _, __: None)
        except Exception:  # noqa: BLE001 - a dtype or device is hard-coded somewhere in the model
            return None

        def visit(wanted: Collection[Key], see: See) -> None:
            run_watched(double, examples, wanted, see)

        return visit


@torch.no_grad()
def jittered(model: nn.Module, seed: int) -> nn.Module:
    """A copy in which every floating parameter and buffer is off by about one rounding."""
    generator = torch.Generator().manual_seed(seed)
    moved: dict[int, Tensor] = {}
    for *_, tensor in named_tensors(model):
        if tensor.is_floating_point() and tensor.layout is torch.strided:
            noise = torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor)
            new = tensor + tensor * noise * (torch.finfo(tensor.dtype).eps / 2)
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(new, requires_grad=False) if is_parameter else new
    return duplicate(model, moved)


def _sites(graph: Graph) -> dict[str, list[Node]]:
    sites: dict[str, list[Node]] = {}
    for node in graph.of_kind(Kind.AFFINE):
        sites.setdefault(node.norm.owner, []).append(node)
    return sites


def _points(model: nn.Module, graph: Graph) -> Iterator[Point]:
    modules = dict(named_modules(model))
    calls: Counter[str] = Counter()
    for path, values in graph.calls:
        if isinstance(modules[path], torch.jit.ScriptModule):
            continue  # no hook sees what it gives
        calls[path] += 1
        kind = type(modules[path]).__name__
        for output, value in enumerate(values):
            size = 1
            for length in value.shape:
                size *= length
            yield Point(Key(path, calls[path], output), kind, size, value)


def _hosts(norm: Node, gone: Set[Node], left: Set[Node]) -> list[Node]:
    """The layers that can have absorbed a norm; none where all on the way to it has to agree.

    The norms that are `left` are among those.

    A layer that something else than this norm uses as well cannot have: the norm is gone as nobody
    uses what it gives, or wrongly.
    """
    same = {node for node in gone if node.norm.owner == norm.norm.owner}
    try:
        found = origins(norm.inputs[0], gone, left)
    except Refused:
        return []
    hosts = list(found.hosts)
    values = [*(host.outputs[0] for host in hosts), *found.constants]
    ends = [end for value in values for end in reach(value, gone - same, found.nodes).ends]
    return hosts if all(end.node in same or end.partial for end in ends) else []


def _onward(norms: Set[Node], gone: Set[Node]) -> Iterator[Value]:
    """What norms that fold forward give, up to the layers that absorb them."""
    for norm in norms:
        yield norm.outputs[0]
        for node in reach(norm.outputs[0], gone, None).nodes:
            yield from results(node)


def _between(value: Value, gone: Set[Node]) -> Iterator[Value]:
    """The values from a norm's input back to the outputs of its hosts."""
    seen: set[Value] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        yield item
        node = item.producer
        if node is not None and crosses(node, gone, None):
            stack.extend(carried(node))


def _origin(norm: Node, gone: Set[Node]) -> Value | None:
    """The output of the one host that comes to a norm as it is, or through other folded norms."""
    value = norm.inputs[0]
    while value.producer is not None and value.producer in gone:
        value = value.producer.inputs[0]
    absorbing = (Kind.LINEAR, Kind.AFFINE)
    return value if value.producer is not None and value.producer.kind in absorbing else None


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether it is part of a batch that vmap has under way."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # noqa: SLF001 - no public name


class _Enough(BaseException):
    """Ends a forward of which the rest is not wanted; no Exception, so that no code swallows it."""


def run_watched(
    model: nn.Module, examples: Examples, wanted: Collection[Key], see: See, *, seed: int = 0
) -> None:
    """One forward in eval mode that leaves no trace, and ends after the last wanted point."""
    try:
        with preserved(model), unwritten(model), torch.no_grad(), _showing(model, wanted, see):
            torch.default_generator.manual_seed(seed)
            if model.training:
                model.eval()
            fed = examples.copied()
            model(*fed.args, **fed.kwargs)
    except _Enough:
        return


@contextmanager
def _showing(model: nn.Module, wanted: Collection[Key], see: See) -> Iterator[None]:
    paths = {key.path for key in wanted}
    missing = set(wanted)
    calls: Counter[str] = Counter()
    handles = []
    for path, module in named_modules(model):
        if path in paths:

            def show(_: nn.Module, __: Any, out: Any, path: str = path) -> None:
                calls[path] += 1
                for output, tensor in enumerate(tensors_in(out)):
                    key = Key(path, calls[path], output)
                    if key in missing and not _is_wrapped(tensor):
                        missing.discard(key)
                        with torch.inference_mode(mode=False), torch.no_grad():
                            see(key, tensor.detach())
                if not missing:
                    raise _Enough

            handles.append(module.register_forward_hook(show))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
