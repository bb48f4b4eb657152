"""The tape of a recording: turns calls and operations into the nodes of a graph."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bntools.absorb import OutputLayout
from bntools.affine import Affine
from bntools.dataflow.graph import (
    WRITTEN_ALIAS,
    Entry,
    Frame,
    Graph,
    Kind,
    Linear,
    Move,
    Node,
    Norm,
    Value,
)
from bntools.dataflow.layers import Ownership, norm_layers
from bntools.dataflow.noting import NOTED, Notes
from bntools.dataflow.operations import (
    batch_norm_call,
    linear_call,
    literals,
    move,
    operation,
    passing,
    tensors_of,
    unstacked,
)
from bntools.dataflow.versions import Versions
from bntools.registry import NormRule, host_rule, norm_rule
from bntools.report import Reason

__all__ = ["Tape", "tensors_in"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers and plain objects, in order, as often as it is there.

    Also in what a generator, an iterator or a closure still holds. Modules are not entered.
    """
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            yield item
            continue
        if id(item) in seen or isinstance(item, _CLOSED):
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            stack.extend(reversed((*item.values(), *_held_keys(item))))
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(reversed(list(item)))
        elif isinstance(item, types.FunctionType):
            stack.extend((*(item.__closure__ or ()), item.__defaults__))
        elif type(item).__module__ in _BUILT_IN:
            stack.extend(reversed(gc.get_referents(item)))
        else:
            stack.extend(reversed([*_slots(item), *getattr(item, "__dict__", {}).values()]))


_CLOSED = (str, bytes, int, float, type(None), nn.Module, type, types.ModuleType, types.CodeType)
_BUILT_IN = {"builtins", "collections", "functools", "itertools", "types"}


def _held_keys(item: dict[Any, Any]) -> Iterator[Any]:
    return (key for key in item if isinstance(key, (Tensor, tuple)))


def _slots(item: Any) -> Iterator[Any]:
    """What an object keeps in the slots of its classes."""
    for cls in type(item).__mro__:
        names = cls.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if not name.startswith("__") and hasattr(item, name):
                yield getattr(item, name)


@dataclass(frozen=True, slots=True)
class _Late:
    """An affine that is computed after the recording: a rule's own operations are no model's."""

    node: Node
    module: nn.Module
    rule: NormRule


class Tape:
    """The nodes, values and module calls of one forward, while it runs."""

    def __init__(self, model: nn.Module, *, calls: bool = False) -> None:
        self.owners = Ownership(model)
        self._calls: list[tuple[str, list[Value]]] | None = [] if calls else None
        self.layers = norm_layers(model)
        self._notes = Notes(model, self.owners)
        self._versions = Versions(self.owners)
        self._nodes: list[Node] = []
        self._frames: dict[str, list[Frame]] = {}
        self._stack: tuple[str, ...] = ("",)
        self._late: list[_Late] = []
        self._dropped: dict[Value, Value] = {}
        self._watched = {layer.path for layer in self.layers}

    @property
    def position(self) -> int:
        """Where the next node will be."""
        return len(self._nodes)

    def finish(self) -> Graph:
        """The graph, once the outputs are released: what is still alive was kept by someone."""
        if any(True for _ in self._versions.survivors()):
            gc.collect()
            self._add(Kind.OUTPUT, "kept after the forward", list(self._versions.survivors()))
        for late in self._late:
            norm = Norm(late.node.module, late.rule.affine(late.module), late.rule.channel_dim)
            late.node.detail = norm
        for node in self._nodes:
            node.inputs = [self._dropped.get(value, value) for value in node.inputs]
        owners, parameters = self.owners, self._versions.parameters
        numbers = self._notes.numbers(self._nodes, parameters, self._dropped)
        nodes, frames, layers = self._notes.read(self._nodes, self._frames, self.layers, numbers)
        calls = tuple((path, tuple(values)) for path, values in self._calls or ())
        return Graph(
            nodes, frames, layers, parameters, owners.tensors,
            owners.owners, owners.tied, frozenset(owners.absent), frozenset(owners.sealed),
            calls, numbers=numbers,
        ).link()  # fmt: skip

    # values

    def source(self, tensor: Tensor) -> None:
        """Make a tensor known as an input of the model."""
        if self._versions.get(tensor) is None:
            self._versions.bind(tensor, Value(_shape(tensor)))

    def value(self, tensor: Tensor) -> Value:
        """The current version of a tensor; one never seen is opaque, and uses what it aliases."""
        value = self._versions.get(tensor)
        if value is None:
            value = Value(_shape(tensor))
            relatives = [self.value(alias) for alias in self._versions.aliases(tensor)]
            if relatives:
                self._add(Kind.OPAQUE, "an unrecorded alias", relatives, value)
            else:
                self._notes.stranger(tensor, value)
            self._versions.bind(tensor, value)
        return value

    def use(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Say that something outside of the graph sees these tensors."""
        self._add(Kind.OUTPUT, name, [self.value(tensor) for tensor in tensors])

    def overwrite(self, tensor: Tensor, data: Tensor) -> None:
        """Note that a tensor was given other memory (`.data = ...`)."""
        old, new = self.value(tensor), Value(_shape(tensor))
        self._add(Kind.OPAQUE, "a replaced .data", [old, self.value(data)], new)
        self._versions.bind(tensor, new)
        self._versions.moved(tensor)

    # operations

    def operation(
        self, func: Any, args: Sequence[Any], kwargs: Any, out: Any, written: Sequence[Tensor]
    ) -> None:
        """Turn one call into a node, and the tensors that it wrote into new versions."""
        known = operation(func)
        inputs = [] if known.shape_only else [self.value(t) for t in tensors_of(args, kwargs)]
        node = self._classify(func, args, kwargs, inputs)
        node.literals = literals(args, kwargs)
        node.writes = [self.value(tensor) for tensor in written]
        constant = not known.random and all(value.constant for value in inputs)
        for tensor in (*written, *(t for t in _results(out) if not _among(t, written))):
            value = Value(_shape(tensor), constant=constant, producer=node)
            node.outputs.append(value)
            self._versions.bind(tensor, value)
        self._nodes.append(node)
        if known.name in NOTED or (known.kind == "norm" and node.kind is Kind.OPAQUE):
            self._notes.operation(node, func, args, kwargs, out)
        for tensor in written:
            for alias in self._versions.aliases(tensor):
                if not _among(alias, written):
                    self._rewritten(alias, by=self.value(tensor))

    def linear_function(self, start: int, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
        """Replace the operations of one `F.linear` by one LINEAR node."""
        found = linear_call("linear", args, kwargs, self.value)
        if found is not None:
            inputs = [self.value(tensor) for tensor in tensors_in((args, kwargs))]
            node = self._node(Kind.LINEAR, "linear", inputs, found)
            self._replace(start, [node], self.value(out))

    def circular_pad(self, start: int, data: Tensor, pads: Sequence[int], out: Tensor) -> None:
        """Replace the operations of one circular padding by one MOVE node."""
        if not data.dtype.is_floating_point:
            return
        detail = Move(lambda x: [F.pad(x[0], list(pads), mode="circular")], partial=False)
        node = self._node(Kind.MOVE, "circular_pad", [self.value(data)], detail)
        self._replace(start, [node], self.value(out))

    def _classify(self, func: Any, args: Sequence[Any], kwargs: Any, inputs: list[Value]) -> Node:
        known = operation(func)
        if known.kind == "linear":
            linear = linear_call(known.name, args, kwargs, self.value)
            if linear is not None:
                return self._node(Kind.LINEAR, known.name, inputs, linear)
        elif known.kind == "norm":
            norm = self._norm(known.name, args)
            if norm is not None:
                return self._node(Kind.AFFINE, known.name, inputs, norm)
        elif known.kind == "move" and _moves_floats(args, kwargs):
            data = 1 if isinstance(args[0], Tensor) else len(args[0])
            if all(value.constant for value in inputs[data:]):
                detail = move(func, known.name, args, kwargs)
                return self._node(Kind.MOVE, known.name, inputs[:data], detail)
        terms = unstacked(known.name, args, kwargs, inputs)
        if terms is not None:
            return self._node(Kind.SUM, known.name, *terms)
        through = passing(known, args, kwargs, inputs)
        if through is not None:
            return self._node(through[0], known.name, inputs, through[1])
        return self._node(Kind.OPAQUE, known.name, inputs)

    def _norm(self, name: str, args: Sequence[Any]) -> Norm | None:
        call = batch_norm_call(name, args)
        if call.training or call.mean is None or call.variance is None:
            return None
        owner = self.owners.owner_of(self._versions.parameter_name(call.mean))
        if owner is None or owner not in self._watched:
            return None
        used = (call.mean, call.variance, call.weight, call.bias)
        if any(t is not None and self.value(t).parameter is None for t in used):
            return Norm(owner, Reason.COMPUTED_AFFINE)
        affine = Affine.of_batch_norm(
            call.mean, call.variance, call.weight, call.bias, eps=call.eps
        )
        if call.weight is None or call.bias is None:
            return Norm(owner, affine)
        weight, bias = self.value(call.weight), self.value(call.bias)
        return Norm(owner, affine, linear=Linear(weight, bias, OutputLayout(), 1, entry=Entry()))

    def _rewritten(self, alias: Tensor, by: Value) -> None:
        value = Value(_shape(alias))
        self._add(Kind.OPAQUE, WRITTEN_ALIAS, [self.value(alias), by], value)
        self._versions.bind(alias, value)

    def _node(self, kind: Kind, name: str, inputs: list[Value], detail: Any = None) -> Node:
        return Node(kind, name, inputs, [], self._stack[-1], detail, stack=self._stack)

    def _add(self, kind: Kind, name: str, inputs: list[Value], output: Value | None = None) -> None:
        if not inputs:
            return
        node = self._node(kind, name, inputs)
        if output is not None:
            node.outputs.append(output)
            output.producer = node
        self._nodes.append(node)

    def _replace(self, start: int, nodes: list[Node], out: Value) -> None:
        """Put nodes in the place of all since `start`; the last of them gives `out`."""
        nodes[-1].outputs.append(out)
        out.producer = nodes[-1]
        out.constant = all(value.constant for value in nodes[0].inputs)
        self._nodes[start:] = nodes

    # calls

    def call(
        self, module: nn.Module, path: str, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a module's call, and note what a planner has to know about it."""
        whole = path in self._watched or host_rule(module) is not None
        inputs: list[Value] = []
        if module._forward_pre_hooks or module._forward_hooks or whole:
            inputs = self._seen((args, kwargs))
        if module._forward_pre_hooks or module._forward_hooks:  # both are given the arguments
            which = "pre-hook" if module._forward_pre_hooks else "hook"
            self._add(Kind.OUTPUT, f"a forward {which} of {path or 'the model'}", inputs)
        start, noted = self.position, self._notes.position
        self._notes.called(path)
        caller = self._stack
        self._stack = (*caller, path)
        try:
            out = run(module, *args, **kwargs)
        finally:
            self._stack = caller
        if whole:
            outputs = self._seen(out)
            if len(inputs) == len(outputs) == 1 and self._closed(start, inputs[0]):
                self._as_one(module, path, start, inputs[0], outputs[0])
            if not isinstance(out, Tensor) or not _only_tensors(args, kwargs):
                inputs = outputs = []  # an Identity would give something else
            frame = Frame(path, tuple(inputs), tuple(outputs), start, self.position, caller)
            self._frames.setdefault(path, []).append(frame)
        if self._notes.did_arithmetic(path, noted):
            self._notes.frame(self._own_frame(path, start, args, kwargs, out))
        if self._calls is not None:
            self._calls.append((path, self._seen(out)))
        if module._forward_hooks:
            self.use(f"a forward hook of {path or 'the model'}", tensors_in(out))
        return out

    def _own_frame(self, path: str, start: int, args: Any, kwargs: Any, out: Any) -> Frame:
        """The call that has just ended; inputs as they were before it wrote to them."""
        inputs, outputs = self._seen(args), self._seen(out)
        for node in reversed(self._nodes[start:]):
            if len(inputs) == len(node.writes) == 1 and inputs[0] in node.outputs:
                inputs = node.writes
        if kwargs or not isinstance(out, Tensor) or not _only_tensors(args, {}):
            inputs = outputs = []  # an Identity would take or give something else
        return Frame(path, tuple(inputs), tuple(outputs), start, self.position, self._stack)

    def _seen(self, values: Any) -> list[Value]:
        """The values of the tensors in arguments or results."""
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - looking at tensors is no function of the model
            return [self.value(tensor) for tensor in tensors_in(values)]

    def _as_one(self, module: nn.Module, path: str, start: int, data: Value, out: Value) -> None:
        """Make a registered layer one node, where no operation inside says what it does."""
        if "forward" in module.__dict__:
            return  # it is not what its class was registered as
        inside = self._nodes[start:]
        norm, host = norm_rule(module), host_rule(module)
        if host is not None:
            entry = None if host.before is None else Entry(0, host.input_dim(len(data.shape)))
            axis = host.channel_dim % len(out.shape)
            linear = Linear(None, None, OutputLayout(), axis, path, entry)
            nodes = [Node(Kind.LINEAR, type(module).__name__, [data], [], path, linear)]
        elif norm is not None and not any(n.kind is Kind.AFFINE for n in inside):
            nodes = [Node(Kind.AFFINE, type(module).__name__, [data], [], path)]
            self._late.append(_Late(nodes[0], module, norm))
            if norm.remainder is not None:
                normed = Value(data.shape, producer=nodes[0])
                nodes[0].outputs.append(normed)
                nodes.append(Node(Kind.OPAQUE, f"the remainder of {path}", [normed], [], path))
        else:
            return
        self._dropped.update({v: data for node in inside for v in node.outputs if v is not out})
        self._replace(start, nodes, out)

    def _closed(self, start: int, data: Value) -> bool:
        """Whether what ran since `start` depends on `data` and constants alone, and writes none."""
        known = {data}
        for node in self._nodes[start:]:
            if not all(value.constant or value in known for value in node.inputs):
                return False
            if any(value is data or value.parameter for value in node.writes):
                return False
            known.update(node.outputs)
        return True


def _only_tensors(args: Any, kwargs: Any) -> bool:
    return all(isinstance(value, Tensor) for value in (*args, *kwargs.values()))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return () if tensor.is_nested else tuple(tensor.shape)  # a nested one has no sizes


def _among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(tensor is other for other in others)


def _results(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, (list, tuple)):
        return [tensor for item in out for tensor in _results(item)]
    return []


def _moves_floats(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether real numbers are moved, and arrive as they were: a narrowing cast rounds them."""
    first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
    to = kwargs.get("dtype") or first.dtype
    if not (first.dtype.is_floating_point and to.is_floating_point):
        return False
    before, after = torch.finfo(first.dtype), torch.finfo(to)
    return after.eps <= before.eps and after.max >= before.max
