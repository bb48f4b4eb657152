"""What each ATen operation is in the neutral graph: one table, and a builder for each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bntools.absorb import InputLayout, OutputLayout
from bntools.dataflow.graph import ELSEWHERE, ZERO, Entry, Kind, Linear, Move, Pass, Sum, Value
from bntools.dataflow.passing import PASSING_OPS, SUM_OPS, passing_call, sum_call

__all__ = [
    "ACTIVATION_OPS",
    "BatchNormCall",
    "Operation",
    "batch_norm_call",
    "linear_call",
    "literals",
    "move",
    "operation",
    "passing",
    "tensors_of",
    "unstacked",
]

_WHOLE = {
    "view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "squeeze",
    "unsqueeze", "expand", "clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "_to_copy",
    "cat", "stack", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "native_channel_shuffle", "roll", "flip", "repeat", "constant_pad_nd", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "movedim", "unflatten", "flatten", "contiguous",
}  # fmt: skip
_PARTIAL = {
    "slice", "select", "split", "split_with_sizes", "unbind", "narrow", "chunk", "index_select",
    "index", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "diagonal",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
}  # fmt: skip
_VIEWS = {"view", "_unsafe_view", "_reshape_alias"}
_UNCHANGED = {"clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "_to_copy", "contiguous"}
_SHAPE_ONLY = {
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros",
    "new_ones", "new_empty", "new_full", "new_empty_strided",
}  # fmt: skip
_BATCH_NORMS = {
    "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm",
    "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update", "_batch_norm_no_update",
}  # fmt: skip
# what is called an activation, and is applied to one value after the other
ACTIVATION_OPS = frozenset({
    "relu", "hardtanh", "leaky_relu", "_prelu_kernel", "silu", "gelu", "hardswish", "elu",
    "sigmoid", "tanh", "hardsigmoid", "mish", "softplus", "celu", "selu", "log_sigmoid_forward",
    "threshold", "hardshrink", "softshrink", "relu6", "clamp", "clamp_min", "rrelu_with_noise",
})  # fmt: skip
# training mode writes these positions, and the schemas of the CPU and CUDA kernels do not say so
_UNDECLARED_WRITES = {
    "native_batch_norm": (3, 4), "cudnn_batch_norm": (3, 4), "miopen_batch_norm": (3, 4),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operation:
    """What is known of an ATen overload: its short name, what it writes, what it is."""

    name: str
    writes: tuple[int | str, ...]
    random: bool
    kind: str  # "linear", "norm", "move", "pass", "sum" or "opaque"
    shape_only: bool

    def written(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
        """The tensors that this call writes to."""
        positions: Sequence[int | str] = self.writes
        if self.kind == "norm" and _is_training(self.name, args):
            positions = (*positions, *_UNDECLARED_WRITES.get(self.name, ()))
        for position in positions:
            value = kwargs.get(position) if isinstance(position, str) else args[position]
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (item for item in value if isinstance(item, Tensor))


@cache
def operation(func: Any) -> Operation:
    """Look an overload up (`aten.add_.Tensor`)."""
    schema = func._schema  # noqa: SLF001 - torch's own way to ask for it
    name = schema.name.split("::")[-1]
    writes: list[int | str] = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.append(argument.name if argument.kwarg_only else index)
    return Operation(
        name,
        tuple(writes),
        torch.Tag.nondeterministic_seeded in func.tags,
        _kind(func, name, writes),
        name in _SHAPE_ONLY,
    )


def literals(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of an operation after the first that are no tensors, keyword ones last."""
    return tuple(arg for arg in (*args[1:], *kwargs.values()) if not isinstance(arg, Tensor))


def tensors_of(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of an operation, which has no deeper nesting than lists."""
    found: list[Tensor] = []
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found.extend(item for item in arg if isinstance(item, Tensor))
    return found


def _kind(func: Any, name: str, writes: Sequence[int | str]) -> str:
    if func.namespace != "aten":
        return "opaque"
    if name in _BATCH_NORMS:
        return "norm"
    if not writes or writes == [0]:  # in place: a new version of the first argument
        base = name.removesuffix("_")
        if base in PASSING_OPS or base in SUM_OPS:
            return "pass" if base in PASSING_OPS else "sum"
    if writes:
        return "opaque"
    if name in ("convolution", "addmm", "mm"):
        return "linear"
    return "move" if name in _WHOLE or name in _PARTIAL else "opaque"


def passing(
    known: Operation, args: Sequence[Any], kwargs: dict[str, Any], inputs: Sequence[Value]
) -> tuple[Kind, Pass | Sum] | None:
    """What a call is that an affine may pass; None for one that it cannot, or of constants."""
    if known.kind not in ("pass", "sum") or all(value.constant for value in inputs):
        return None
    if not all(tensor.dtype.is_floating_point for tensor in tensors_of(args, kwargs)):
        return None
    name = known.name.removesuffix("_")
    if known.kind == "pass":
        through = passing_call(name, args, kwargs)
        fits = through is not None and all(value.constant for value in inputs[1:])
        return (Kind.PASS, through) if through is not None and fits else None
    total = sum_call(name, args, kwargs, inputs)
    return (Kind.SUM, total) if total is not None else None


def unstacked(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], inputs: Sequence[Value]
) -> tuple[list[Value], Sum] | None:
    """The sum or mean over a stack of tensors as the sum that it is, of these; None for others."""
    stack = inputs[0].producer if inputs else None
    if name not in ("sum", "mean") or stack is None or stack.name != "stack":
        return None
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    over = list(given) if isinstance(given, (list, tuple)) else [given]
    whole = len(args) == 2 and not kwargs and stack.kind is Kind.MOVE
    rank, axis = len(inputs[0].shape), stack.literals[0] if stack.literals else 0
    if not whole or len(over) != 1 or over[0] is None or over[0] % rank != axis % rank:
        return None
    terms = list(stack.inputs)
    return terms, Sum((1.0 if name == "sum" else 1 / len(terms),) * len(terms))


def linear_call(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], value: Callable[[Tensor], Value]
) -> Linear | None:
    """The linear layer in a call; None where the call is something else.

    `x @ W` counts where only W is constant.
    """
    if name == "convolution":
        weight, bias = args[1:3]
        layout = OutputLayout(1, args[8]) if args[6] else OutputLayout()
        own = value(bias) if bias is not None else None
        return Linear(value(weight), own, layout, 1, entry=_convolution_entry(args))
    if name == "linear":
        given = [*args, *(kwargs.get(key) for key in _LINEAR[len(args) :])]
        data, weight, bias = given[0], given[1], given[2]
        if weight.dim() != 2:
            return None
        own = value(bias) if bias is not None else None
        position = next(i for i, t in enumerate(tensors_of(args, kwargs)) if t is data)
        entry = Entry(position, data.dim() - 1, InputLayout())
        return Linear(value(weight), own, OutputLayout(), data.dim() - 1, entry=entry)
    if name == "addmm":
        bias, data, weight = args[:3]
        if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1 or bias.dim() != 1:
            return None
    else:
        (data, weight), bias = args[:2], None
    if value(data).constant or not value(weight).constant:
        return None
    used, axis = _untransposed(value(weight))
    own = value(bias) if bias is not None else None
    entry = Entry(1 if name == "addmm" else 0, 1, InputLayout(1 - axis))
    return Linear(used, own, OutputLayout(axis), 1, entry=entry)


def _convolution_entry(args: Sequence[Any]) -> Entry:
    """How `aten::convolution` takes its data."""
    weight, stride, padding, dilation, transposed, output_padding, groups = args[1], *args[3:9]
    if not transposed:
        even = not any(padding)
        zeros = tuple(padding) * (1 if len(padding) > 1 else weight.dim() - 2)
        return Entry(0, 1, InputLayout(1, groups), even, () if even else zeros)
    kernel = weight.shape[2:]
    dilation, padding = (list(x) * (1 if len(x) > 1 else len(kernel)) for x in (dilation, padding))
    sizes = zip(padding, dilation, kernel, strict=True)
    covered = all(zeros >= step * (size - 1) for zeros, step, size in sizes)
    even = covered and not any(output_padding) and all(step == 1 for step in stride)
    return Entry(0, 1, InputLayout(0, groups), even)


_LINEAR = ("input", "weight", "bias")


def _untransposed(weight: Value) -> tuple[Value, int]:
    node = weight.producer
    if node is not None and node.name == "t":
        return node.inputs[0], 0
    return weight, 1


@dataclass(frozen=True, slots=True)
class BatchNormCall:
    """The arguments of a batch norm kernel, whichever it was."""

    data: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    training: bool
    eps: float


def batch_norm_call(name: str, args: Sequence[Any]) -> BatchNormCall:
    """Read the arguments of a batch norm kernel."""
    data, weight, bias, mean, variance = args[:5]
    eps = args[6] if "no_training" in name or "update" in name else args[7]
    return BatchNormCall(data, weight, bias, mean, variance, _is_training(name, args), float(eps))


def _is_training(name: str, args: Sequence[Any]) -> bool:
    if name in ("_native_batch_norm_legit_no_training", "_batch_norm_no_update"):
        return False
    return name == "_batch_norm_with_update" or bool(args[5]) or args[3] is None


def move(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Move:
    """What a data movement does, as a function of tensors of labels.

    The data is the first argument; tensors among the others (indices) are kept by value.
    """
    joins = not isinstance(args[0], Tensor)
    rest = [_by_value(arg) for arg in args[1:]]

    def apply(labels: Sequence[Tensor]) -> list[Tensor]:
        if name in _UNCHANGED:
            return [labels[0]]
        if name in _VIEWS:
            return [labels[0].reshape(rest[0])]
        if name == "constant_pad_nd":
            return [func(labels[0], rest[0], ELSEWHERE if any(rest[1:]) else ZERO)]
        result = func(list(labels) if joins else labels[0], *rest, **kwargs)
        return [result] if isinstance(result, Tensor) else list(result)

    return Move(apply, partial=name in _PARTIAL)


def _by_value(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.detach().cpu().clone()
    if isinstance(arg, (list, tuple)):
        return [_by_value(item) for item in arg]
    return arg
