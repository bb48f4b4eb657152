"""The arguments of a serialised graph: constants, and the names of values that come at run time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "DEVICE",
    "Name",
    "Place",
    "Subgraph",
    "dtype_of",
    "filled",
    "name_of",
    "names_in",
    "read",
]

DEVICE = ""
"""Under this name an environment has the device on which the program runs."""
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 9: torch.complex32,
    10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
    28: torch.uint16, 29: torch.float8_e4m3fn, 30: torch.float8_e5m2, 31: torch.float8_e4m3fnuz,
    32: torch.float8_e5m2fnuz, 34: torch.uint32, 35: torch.uint64,
}  # fmt: skip
_MEMORY_FORMATS = {
    1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d,
    4: torch.preserve_format,
}  # fmt: skip
_LAYOUTS = {1: torch.sparse_coo, 2: torch.sparse_csr, 7: torch.strided}


class Name(str):
    """The name of a value that is computed when the program runs."""

    __slots__ = ()


@dataclass(frozen=True)
class Place:
    """A device that a graph names: where the program's own weights were, it follows them."""

    type: str
    index: int | None

    def now(self, current: torch.device, home: str) -> torch.device:
        """The device at run time."""
        if self.type == home:
            return current
        return (
            torch.device(self.type) if self.index is None else torch.device(self.type, self.index)
        )


@dataclass(frozen=True)
class Subgraph:
    """A graph that is an argument, as the branches of `torch.cond` are."""

    data: Any


def name_of(value: Any) -> Name:
    """A checked name of a value in a graph."""
    if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value):
        raise ValueError(f"{value!r} is no name of a value")
    return Name(value)


def dtype_of(number: Any) -> torch.dtype:
    """The dtype of a serialised number."""
    return _DTYPES[number]


def read(argument: Any) -> Any:
    """Turn one serialised argument (`{"as_int": 3}`) into a value, a `Name`, or a list of them."""
    if not isinstance(argument, Mapping) or len(argument) != 1:
        raise ValueError("an argument is not of one kind")
    ((kind, value),) = argument.items()
    reader = _READERS.get(kind)
    if reader is None:
        raise ValueError(f"arguments of the kind {kind!r} are not known")
    return reader(value)


def filled(template: Any, values: Mapping[str, Any]) -> Any:
    """The value of what `read` gave."""
    if isinstance(template, Name):
        return values[template]
    if isinstance(template, list):
        return [filled(item, values) for item in template]
    if isinstance(template, Place):
        return values[DEVICE](template)
    return template


def names_in(template: Any) -> set[str]:
    """The names of the values that a template takes."""
    if isinstance(template, Name):
        return {template}
    if isinstance(template, list):
        return set().union(*(names_in(item) for item in template))
    return set()


def _plain(*kinds: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) not in kinds:
            raise ValueError(f"{value!r} is no {kinds[0].__name__}")
        return kinds[0](value)

    return check


def _each(reader: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def read_list(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ValueError("a list is none")  # noqa: TRY004 - a damaged file, and no caller's type
        return [reader(item) for item in value]

    return read_list


def _tensor(value: Any) -> Name:
    return name_of(value["name"])


def _symbol(value: Any) -> Any:
    """A number that may be computed: `{"as_name": "s0"}`, or a constant."""
    ((kind, content),) = value.items()
    if kind == "as_name":
        return name_of(content)
    return {"as_int": _int, "as_float": _float, "as_bool": _bool}[kind](content)


def _device(value: Any) -> Place:
    index = value.get("index")
    torch.device(value["type"])  # a RuntimeError for what is no device
    return Place(value["type"], None if index is None else _int(index))


def _float_or_word(value: Any) -> float:
    """JSON has no infinities: they are written as texts."""
    if isinstance(value, str) and value in ("Infinity", "-Infinity", "NaN", "inf", "-inf", "nan"):
        return float(value)
    return float(_plain(float, int)(value))


def _nothing(_: Any) -> None:
    return None


_int, _bool, _text = _plain(int), _plain(bool), _plain(str)
_float = _float_or_word
_READERS: dict[str, Callable[[Any], Any]] = {
    "as_none": _nothing,
    "as_tensor": _tensor,
    "as_tensors": _each(_tensor),
    "as_nested_tensors": _each(_each(_tensor)),
    "as_optional_tensor": read,
    "as_optional_tensors": _each(read),
    "as_int": _int,
    "as_ints": _each(_int),
    "as_int_lists": _each(_each(_int)),
    "as_float": _float,
    "as_floats": _each(_float),
    "as_float_lists": _each(_each(_float)),
    "as_bool": _bool,
    "as_bools": _each(_bool),
    "as_string": _text,
    "as_strings": _each(_text),
    "as_complex": lambda value: complex(_float(value["real"]), _float(value["imag"])),
    "as_sym_int": _symbol,
    "as_sym_float": _symbol,
    "as_sym_bool": _symbol,
    "as_sym_ints": _each(_symbol),
    "as_sym_floats": _each(_symbol),
    "as_sym_bools": _each(_symbol),
    "as_scalar_type": dtype_of,
    "as_memory_format": _MEMORY_FORMATS.__getitem__,
    "as_layout": _LAYOUTS.__getitem__,
    "as_device": _device,
    "as_graph": lambda value: Subgraph(value["graph"]),
}
