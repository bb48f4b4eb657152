"""Numbers for the constants of an affine with which it does nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bntools.dataflow.arithmetic import Call, Leaf, Numbers
from bntools.dataflow.graph import Kind, Value
from bntools.norms.handwritten import constant_like

__all__ = ["Wanted", "neutral_constants"]

Wanted = dict[Value, tuple[float, float]]
"""For a leaf the number that it is to give together with a literal that is added to it."""


def neutral_constants(
    calls: Sequence[tuple[Call, Value]],
    numbers: Numbers,
    apply: Callable[[Numbers, Tensor], Tensor],
    sample: Tensor,
) -> Wanted | None:
    """What leaves have to be so that calls, each with its data, give what went in; None if nothing.

    `apply` carries the calls out; the answer is tried, in float64 and in the dtype of `sample`.
    """
    equations = _Equations(numbers)
    scale = 1.0
    for call, value in calls:
        factor = equations.neutralise(call, value)
        if factor is None:
            return None
        scale *= factor
    if scale != 1.0 and not equations.compensated(calls, scale):
        return None
    wanted = equations.wanted
    for dtype in (sample.dtype, torch.float64):
        given = {v: constant_like(_in(numbers.leaves[v], dtype), *w) for v, w in wanted.items()}
        data = sample.to(dtype)
        if not torch.equal(apply(numbers.other(given, dtype), data), data):
            return None
    return wanted


def _in(leaf: Leaf, dtype: torch.dtype) -> Tensor:
    return leaf.tensor.detach().to("cpu", dtype)


class _Equations:
    """What is wanted of leaves, so that expressions of them have given numbers."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self.wanted: Wanted = {}

    def neutralise(self, call: Call, data: Value) -> float | None:
        """Make one operation the identity, but for a literal factor, which is returned."""
        name, operands = call.operation, call.operands
        others = [each for each in operands if each is not data]
        if name == "neg":
            return -1.0
        if name in ("mul", "div"):
            number = self.literal(others[0])
            if number is not None:
                return number if name == "mul" else 1 / number if number else None
            return 1.0 if self.solve(others[0], 1.0) else None
        if name in ("add", "sub", "rsub"):
            factor = call.coefficients[call.operands.index(data)]
            return factor if self.solve(others[0], 0.0) else None
        return self._combined(call, data)

    def _combined(self, call: Call, data: Value) -> float | None:
        """An addcmul, addcdiv or batch norm."""
        if call.operation not in ("addcmul", "addcdiv"):
            return self._batch_norm(call)
        first, left, right = call.operands
        if first is data:
            return 1.0 if self._either(left, right, quotient=call.operation == "addcdiv") else None
        factor = right if left is data else left
        if (left is not data and call.operation == "addcdiv") or not self.solve(first, 0.0):
            return None
        target = call.factor if call.operation == "addcdiv" else 1 / call.factor
        return 1.0 if self.solve(factor, target) else None

    def _either(self, left: Any, right: Any, *, quotient: bool) -> bool:
        return self.solve(left, 0.0) or (not quotient and self.solve(right, 0.0))

    def _batch_norm(self, call: Call) -> float | None:
        _, weight, bias, mean, variance = call.args[:5]
        eps = float(call.kwargs["eps"])
        solved = self.solve(mean, 0.0) and self.solve(variance, 1.0, eps)
        solved = solved and (weight is None or self.solve(weight, 1.0))
        return 1.0 if solved and (bias is None or self.solve(bias, 0.0)) else None

    def compensated(self, calls: Sequence[tuple[Call, Value]], scale: float) -> bool:
        """Let one constant undo the literal factors of the others."""
        for call, data in calls:
            others = [each for each in call.operands if each is not data]
            if call.operation not in ("mul", "div") or self.literal(others[0]) is not None:
                continue
            used = self.numbers.leaves_of(others[0])
            kept = {v: w for v, w in self.wanted.items() if v not in used}
            before, self.wanted = self.wanted, kept
            if self.solve(others[0], 1 / scale if call.operation == "mul" else scale):
                return True
            self.wanted = before
        return False

    def solve(self, operand: Any, target: float, plus: float = 0.0) -> bool:
        """Want `operand + plus == target`; nothing is changed where that cannot be had."""
        before = dict(self.wanted)
        if self._solve(operand, target, plus):
            return True
        self.wanted = before
        return False

    def _solve(self, operand: Any, target: float, plus: float) -> bool:
        if not math.isfinite(target):
            return False
        number = self.literal(operand)
        if number is not None:
            return number + plus == target
        if not isinstance(operand, Value) or operand not in self.numbers.constants:
            return False
        if operand in self.numbers.leaves:
            return self.wanted.setdefault(operand, (target, plus)) == (target, plus)
        node = operand.producer
        if node is None or not self.numbers.leaves_of(operand):
            return False
        call = self.numbers.calls.get(node)
        if call is None:
            same = node.kind is Kind.MOVE
            return same and all(self._solve(each, target, plus) for each in node.inputs)
        return _SOLVERS[call.operation](self, call, target, plus)

    def literal(self, operand: Any) -> float | None:
        """The number of a literal, or of a constant without leaves that is one number."""
        if isinstance(operand, (int, float)):
            return float(operand)
        if operand in self.numbers.constants and not self.numbers.leaves_of(operand):
            values = self.numbers.of(operand)
            if values.numel() and bool((values == values.flatten()[0]).all()):
                return float(values.flatten()[0])
        return None


def _sum(equations: _Equations, call: Call, target: float, plus: float) -> bool:
    left, right = call.operands
    k, m = call.coefficients
    known_left, known_right = equations.literal(left), equations.literal(right)
    if known_right is not None:
        added = m * known_right
        if k == 1.0:
            return equations.solve(left, target, plus + added)
        return equations.solve(left, (target - plus - added) / k)
    if known_left is not None:
        added = k * known_left
        if m == 1.0:
            return equations.solve(right, target, plus + added)
        return equations.solve(right, (target - plus - added) / m)
    return equations.solve(left, (target - plus) / k) and equations.solve(right, 0.0)


def _product(equations: _Equations, call: Call, target: float, plus: float) -> bool:
    target -= plus
    left, right = call.operands
    known_left, known_right = equations.literal(left), equations.literal(right)
    divides = call.operation == "div"
    if known_right is not None:
        if known_right == 0:
            return False
        return equations.solve(left, target * known_right if divides else target / known_right)
    if known_left is not None:
        if target == 0 or known_left == 0:
            return not divides and target == 0 and equations.solve(right, 0.0)
        return equations.solve(right, known_left / target if divides else target / known_left)
    if target == 0:
        return equations.solve(left, 0.0) or (not divides and equations.solve(right, 0.0))
    return equations.solve(left, target) and equations.solve(right, 1.0)


def _inverted(
    function: Callable[[float], float],
) -> Callable[[_Equations, Call, float, float], bool]:
    """Solve `f(x) = target` by the inverse of f."""

    def solve(equations: _Equations, call: Call, target: float, plus: float) -> bool:
        try:
            return equations.solve(call.operands[0], function(target - plus))
        except (ValueError, ZeroDivisionError, OverflowError):
            return False

    return solve


def _power(equations: _Equations, call: Call, target: float, plus: float) -> bool:
    base, exponent = call.operands
    if not isinstance(exponent, (int, float)) or not exponent or target - plus <= 0:
        return False
    return equations.solve(base, (target - plus) ** (1 / exponent))


def _root(target: float) -> float:
    if target < 0:
        raise ValueError(target)
    return target * target


_SOLVERS: Mapping[str, Callable[[_Equations, Call, float, float], bool]] = {
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    **dict.fromkeys(("mul", "div"), _product),
    **dict.fromkeys(("addcmul", "addcdiv"), lambda *_: False),
    "neg": _inverted(lambda target: -target),
    "reciprocal": _inverted(lambda target: 1 / target),
    "sqrt": _inverted(_root),
    "rsqrt": _inverted(lambda target: 1 / _root(target)),
    "square": _inverted(math.sqrt),
    "exp": _inverted(math.log),
    "pow": _power,
}
