"""The sizes that a program takes: fixed ones, free ones, and what must hold between them.

Expressions come from files. They are parsed by `ast` and never evaluated as code: what is not
arithmetic on the sizes of inputs is not understood, and said so.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Port", "Range", "check_guards", "check_sizes", "hints", "understood"]

_MOST_NODES = 200
_SYMBOL = re.compile(r"[A-Za-z_]\w*")
Environment = Mapping[str, Any]


class _NotUnderstoodError(Exception):
    """An expression is none that this module knows."""


@dataclass(frozen=True)
class Range:
    """What a free size may be; None is unbounded."""

    least: int | None = None
    most: int | None = None


@dataclass(frozen=True)
class Port:
    """One flat input: a tensor of these sizes (a number, or an expression), or a constant.

    `hint` are the sizes of the input that the program was made with. `number` says that the
    constant may be any other integer.
    """

    name: str
    sizes: tuple[int | str, ...] | None = None
    hint: tuple[int, ...] = ()
    dtype: Any = None
    constant: Any = None
    number: bool = False

    @property
    def free(self) -> tuple[str | None, ...]:
        """For each dimension the name of its symbol, None where it is fixed or computed."""
        return tuple(
            symbol_in(size) if isinstance(size, str) else None for size in self.sizes or ()
        )

    def __str__(self) -> str:
        if self.sizes is None:
            return f"{self.name}={self.constant!r}"
        shown = (str(s) if isinstance(s, int) else symbol_in(s) or "?" for s in self.sizes)
        return f"{self.name} {'x'.join(shown) or 'scalar'}"


def hints(sizes: Sequence[Any]) -> tuple[tuple[int | str, ...], tuple[int, ...]]:
    """Serialised sizes as numbers and expressions, and the numbers that they had."""
    given: list[int | str] = []
    had: list[int] = []
    for size in sizes:
        ((kind, value),) = size.items()
        if kind == "as_int":
            number, shown = int(value), int(value)
            given.append(shown)
        else:
            given.append(str(value["expr_str"]))
            number = int((value.get("hint") or {"as_int": 2})["as_int"])
        had.append(number)
    if any(not 0 <= number < 2**40 for number in had):
        raise ValueError("an input has an impossible size")
    return tuple(given), tuple(had)


def symbol_in(expression: str) -> str | None:
    """The name of the free size, where an expression is nothing but that."""
    if _SYMBOL.fullmatch(expression):
        return expression
    try:
        node = _parsed(expression)
    except _NotUnderstoodError:
        return None
    if _is_call(node, "Symbol") and isinstance(node.args[0], ast.Constant):
        return str(node.args[0].value)
    return None


def check_sizes(ports: Sequence[Port], values: Sequence[Any], ranges: Mapping[str, Range]) -> None:
    """Whether inputs are what the program takes; raises ValueError where not."""
    symbols: dict[str, Any] = {}
    computed: list[tuple[str, str, Any]] = []
    for port, value in zip(ports, values, strict=True):
        if port.sizes is None:
            _check_constant(port, value)
            continue
        for index, size in enumerate(_shape(port, value)):
            wanted, free, where = port.sizes[index], port.free[index], f"{port.name}.size({index})"
            if isinstance(wanted, int):
                _check_equal(where, wanted, size)
            elif free is None:
                computed.append((where, wanted, size))
            elif symbols.setdefault(free, size) != size:
                raise ValueError(f"{where} must be {symbols[free]} as well, and is {size}")
    _check_ranges(symbols, ranges)
    for where, expression, size in computed:
        wanted = _value(expression, symbols)
        if wanted is not None:
            _check_equal(where, wanted, size)


def _shape(port: Port, value: Any) -> torch.Size:
    rank = len(port.sizes or ())
    if not isinstance(value, Tensor) or value.dim() != rank:
        raise ValueError(f"{port.name} must be a tensor of {rank} dimensions")
    return value.shape


def _check_equal(where: str, wanted: Any, size: Any) -> None:
    if size != wanted:
        raise ValueError(f"{where} must be {wanted}, and is {size}")


def _check_constant(port: Port, value: Any) -> None:
    if port.number:
        if not isinstance(value, (int, torch.SymInt)):
            raise ValueError(f"{port.name} must be an integer, and is {value!r}")
        return
    same = type(value) is type(port.constant) and value == port.constant
    if not same and value is not port.constant:
        raise ValueError(f"{port.name} is fixed at {port.constant!r}, and is {value!r}")


def _check_ranges(symbols: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    for symbol, size in symbols.items():
        allowed = ranges.get(symbol, Range())
        # torch writes 2 for "not checked for 0 and 1" and does not insist on it either
        if allowed.least is not None and allowed.least > 2 and size < allowed.least:
            raise ValueError(f"a size must be at least {allowed.least}, and is {size}")
        if allowed.most is not None and size > allowed.most:
            raise ValueError(f"a size must be at most {allowed.most}, and is {size}")


def check_guards(guards: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Whether the conditions on inputs hold that torch.export found; raises ValueError."""
    for guard in guards:
        if _value(guard, {"L": arguments}) is False:
            raise ValueError(f"{guard} does not hold")


def understood(expression: str) -> bool:
    """Whether an expression is one that this module can check."""
    try:
        _check_known(_parsed(expression))
    except _NotUnderstoodError:
        return False
    return True


def _value(expression: str, names: Environment) -> Any:
    """The value of an expression; None where it is not understood or has none."""
    try:
        return _evaluated(_parsed(expression), names)
    except (_NotUnderstoodError, KeyError, IndexError, TypeError, ZeroDivisionError):
        return None


@cache
def _parsed(expression: str) -> Any:
    try:
        node = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _NotUnderstoodError from error
    if sum(1 for _ in ast.walk(node)) > _MOST_NODES:
        raise _NotUnderstoodError
    return node


def _is_call(node: Any, name: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == name
        and bool(node.args)
    )


def _modulo(a: Any, b: Any) -> Any:
    return a % b


def _sum(*terms: Any) -> Any:
    return sum(terms)


def _power(base: Any, exponent: Any) -> Any:
    if not isinstance(exponent, int) or not -8 <= exponent <= 8:
        raise _NotUnderstoodError
    return base**exponent


def _product(*factors: Any) -> Any:
    return math.prod(factors)


def _identity(value: Any) -> Any:
    return value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Integer": _identity, "Add": _sum, "Mul": _product, "Pow": _power, "PowByNatural": _power,
    "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "Mod": _modulo,
    "PythonMod": _modulo, "Max": max, "Min": min, "Eq": operator.eq, "Ne": operator.ne,
    "Lt": operator.lt, "Le": operator.le, "Gt": operator.gt, "Ge": operator.ge,
    "Equality": operator.eq, "Unequality": operator.ne, "StrictLessThan": operator.lt,
    "LessThan": operator.le, "StrictGreaterThan": operator.gt, "GreaterThan": operator.ge,
}  # fmt: skip
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Div: operator.truediv,
    ast.Pow: _power,
}  # fmt: skip
_COMPARED: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_KNOWN = (
    ast.Constant, ast.Name, ast.Load, ast.BinOp, ast.UnaryOp, ast.USub, ast.Not, ast.Compare,
    ast.BoolOp, ast.And, ast.Or, ast.Subscript, ast.Attribute, ast.Call, ast.keyword,
    ast.operator, ast.cmpop,
)  # fmt: skip


def _check_known(node: ast.AST) -> None:
    if not all(isinstance(part, _KNOWN) for part in ast.walk(node)):
        raise _NotUnderstoodError


def _evaluated(node: Any, names: Environment) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, str, bool):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_evaluated(node.left, names), _evaluated(node.right, names))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        value = _evaluated(node.operand, names)
        return -value if isinstance(node.op, ast.USub) else not value
    if isinstance(node, ast.BoolOp):
        values = [_evaluated(value, names) for value in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.Compare):
        return _compared(node, names)
    if isinstance(node, ast.Subscript):
        return _evaluated(node.value, names)[_evaluated(node.slice, names)]
    if isinstance(node, ast.Call):
        return _called(node, names)
    raise _NotUnderstoodError


def _compared(node: ast.Compare, names: Environment) -> bool:
    left = _evaluated(node.left, names)
    for sign, right in zip(node.ops, node.comparators, strict=True):
        value = _evaluated(right, names)
        if type(sign) not in _COMPARED:
            raise _NotUnderstoodError
        if not _COMPARED[type(sign)](left, value):
            return False
        left = value
    return True


def _called(node: ast.Call, names: Environment) -> Any:
    """`x.size()`, `x.dim()`, `Symbol('s0', ...)`, or a function of numbers."""
    if isinstance(node.func, ast.Attribute):
        owner = _evaluated(node.func.value, names)
        if isinstance(owner, Tensor) and node.func.attr in ("size", "dim") and not node.args:
            return owner.shape if node.func.attr == "size" else owner.dim()
        raise _NotUnderstoodError
    if _is_call(node, "Symbol"):
        return names[_evaluated(node.args[0], {})]
    if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS or node.keywords:
        raise _NotUnderstoodError
    return _FUNCTIONS[node.func.id](*(_evaluated(arg, names) for arg in node.args))
