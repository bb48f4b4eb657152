"""One operation on data and constants, as a map `scale * x + shift`."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bntools.affine import Affine
from bntools.dataflow.arithmetic import Call, Numbers, collapsed
from bntools.dataflow.graph import Value

__all__ = ["batch_norm_of", "carried_out", "composed", "data_of", "stepped"]

Step = tuple[Tensor, Tensor]
_CHAINED = {"add", "sub", "rsub", "mul", "div", "neg", "addcmul", "addcdiv", "batch_norm"}


def batch_norm_of(
    data: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    *,
    eps: float,
) -> Tensor:
    """An eval-mode batch norm in the order of the kernels' arguments."""
    return F.batch_norm(data, mean, variance, weight, bias, training=False, eps=eps)


def data_of(call: Call, constants: Set[Value]) -> Value | None:
    """The one operand of a call that is no constant, where it is used once and keeps its dtype."""
    if call.operation not in _CHAINED or call.kwargs.keys() - {"alpha", "value", "eps"}:
        return None
    values = [each for each in call.values() if each not in constants]
    if len(values) != 1 or values[0] not in call.operands:
        return None
    place = list(call.values()).index(values[0])
    kept = call.dtypes[place] == call.dtypes[-1] and call.dtypes[-1].is_floating_point
    return values[0] if kept else None


def stepped(call: Call, data: Value, numbers: Numbers) -> Step | None:
    """The map of one operation, as tensors with an axis for each of the data; None for no map."""
    rank = len(data.shape)
    if call.operation == "batch_norm":
        return _batch_norm(call, numbers, rank)
    operands = [each if each is data else _number(each, numbers, rank) for each in call.operands]
    one = torch.ones([1] * rank, dtype=torch.float64)
    zero = torch.zeros_like(one)
    at = next(i for i, each in enumerate(operands) if each is data)
    others: list[Any] = [each for each in operands if each is not data]
    name = call.operation
    if name == "neg":
        return -one, zero
    if name in ("add", "sub", "rsub"):
        own, other = call.coefficients if at == 0 else call.coefficients[::-1]
        return own * one, other * others[0]
    if name == "mul":
        return others[0], zero
    if name == "div":
        return (1 / others[0], zero) if at == 0 else None
    return _combined(call, at, others, one)


def _combined(call: Call, at: int, others: list[Any], one: Tensor) -> Step | None:
    """The map of `first + value * left * right`, or of `first + value * left / right`."""
    first, second = others
    divides = call.operation == "addcdiv"
    if at == 0:
        return one, call.factor * (first / second if divides else first * second)
    if at == 2 and divides:
        return None
    return call.factor * (1 / second if divides else second), first


def _batch_norm(call: Call, numbers: Numbers, rank: int) -> Step | None:
    weight, bias, mean, variance = (
        None if each is None else numbers.of(each) for each in call.args[1:5]
    )
    if mean is None or variance is None or rank < 2:
        return None
    affine = Affine.of_batch_norm(mean, variance, weight, bias, eps=call.kwargs["eps"])
    shape = [-1 if axis == 1 else 1 for axis in range(rank)]
    return affine.scale.reshape(shape), affine.shift.reshape(shape)


def _number(operand: Any, numbers: Numbers, rank: int) -> Tensor:
    if isinstance(operand, Value):
        return collapsed(numbers.of(operand), rank)
    return torch.full([1] * rank, float(operand), dtype=torch.float64)


def composed(first: Step, second: Step) -> Step:
    """One map after the other."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def carried_out(call: Call, data: Value, given: Tensor, numbers: Numbers) -> Tensor:
    """What an operation makes of other data."""
    flat = call.operation == "batch_norm"
    others = {value: numbers.of(value) for value in call.values() if value is not data}
    ranked = others if flat else {v: collapsed(t, given.dim()) for v, t in others.items()}
    return call.run({**ranked, data: given})
