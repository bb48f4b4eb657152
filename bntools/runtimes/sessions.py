"""ONNX Runtime sessions that run where they were asked to, or raise."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bntools.errors import InputError, LoadError
from bntools.report import Placement
from bntools.runtimes.providers import Opening, open_on

__all__ = ["Port", "Session", "open_session"]

_TYPES = {
    "float": torch.float32, "double": torch.float64, "float16": torch.float16,
    "bfloat16": torch.bfloat16, "bool": torch.bool, "int8": torch.int8, "int16": torch.int16,
    "int32": torch.int32, "int64": torch.int64, "uint8": torch.uint8, "uint16": torch.uint16,
    "uint32": torch.uint32, "uint64": torch.uint64,
}  # fmt: skip
_BFLOAT16 = 16


@dataclass(frozen=True)
class Port:
    """An input or output of an ONNX model; `shape` has None where a dimension is dynamic.

    `symbols` has the names of dynamic dimensions: those of one name have one size.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]
    symbols: tuple[str | None, ...] = ()

    def __str__(self) -> str:
        sizes = [s or "?" for s in self.symbols] if self.symbols else ["?"] * len(self.shape)
        shown = (str(n) if n is not None else s for n, s in zip(self.shape, sizes, strict=True))
        return f"{self.name}: {'x'.join(shown) or 'scalar'} {_name(self.dtype)}"


class Session:
    """An ONNX model that is ready to run on one provider."""

    def __init__(self, session: Any, placement: Placement) -> None:
        self._session = session
        self.placement = placement
        self.inputs = tuple(_port(value) for value in session.get_inputs())
        self.outputs = tuple(_port(value) for value in session.get_outputs())

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata that the file carries."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One forward: tensors by input name give tensors on the CPU by output name, in order.

        Raises `InputError` where a name, dtype or shape is not what the model takes.
        """
        self._check(feeds)
        values = {name: _ort_value(tensor) for name, tensor in feeds.items()}
        names = [port.name for port in self.outputs]
        try:
            given = self._session.run_with_ort_values(names, values)
        except Exception as error:
            raise InputError(
                f"Cannot run the ONNX model on {_shown(feeds)}: {_line(error)}."
                " Give inputs that it accepts."
            ) from error
        return {name: _tensor(name, value) for name, value in zip(names, given, strict=True)}

    def _check(self, feeds: Mapping[str, Tensor]) -> None:
        names = [port.name for port in self.inputs]
        missing = [name for name in names if name not in feeds]
        unknown = [name for name in feeds if name not in names]
        if missing or unknown:
            lacks = f"it lacks {', '.join(missing)}" if missing else ""
            extra = f"there is no {', '.join(unknown)}" if unknown else ""
            raise InputError(
                f"Cannot run the ONNX model: {' and '.join(filter(None, (lacks, extra)))}."
                f" Its inputs are {self.expected}."
            )
        for port in self.inputs:
            _check_port(port, feeds[port.name])

    @property
    def expected(self) -> str:
        """What the model takes, such as "x: batchx3x224x224 float32"."""
        return ", ".join(map(str, self.inputs)) or "none"


def open_session(
    model: Path | bytes,
    *,
    provider: str = "cpu",
    allow_tf32: bool = False,
    optimise: bool = True,
    beside: Path | None = None,
) -> Session:
    """Open an ONNX model on "cpu", on "cuda", or on CUDA where that works ("auto").

    `optimise=False` runs the graph as it is written. `beside` is the folder of the external data of
    a model given as bytes. With "cuda" nothing falls back: a missing library, a session on the
    CPU, or a node with data on the CPU raises; only shape arithmetic stays on the host.

    Raises `LoadError` for a file that is no ONNX model, `RuntimeUnavailableError` for a missing
    package, library or device, or an operation that the provider does not have.
    """
    if isinstance(model, Path) and not os.path.isfile(model):
        raise LoadError(f"Cannot load {model}: there is no such file.")
    opening = Opening(model, allow_tf32=allow_tf32, optimise=optimise, beside=beside)
    return Session(*open_on(provider, opening))


def _port(value: Any) -> Port:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    if kind not in _TYPES:
        raise LoadError(
            f"Cannot compare {value.name} of the ONNX model: it is a {value.type}, and only tensors"
            " of numbers can be compared."
        )
    shape = tuple(size if isinstance(size, int) else None for size in value.shape or ())
    symbols = tuple(size if isinstance(size, str) else None for size in value.shape or ())
    return Port(value.name, _TYPES[kind], shape, symbols)


def _check_port(port: Port, tensor: Tensor) -> None:
    if tensor.dtype != port.dtype:
        raise InputError(
            f"Cannot run the ONNX model: {port.name} is {_name(tensor.dtype)}, and it takes {port}."
        )
    fits = len(port.shape) == tensor.dim() and all(
        want is None or want == have for want, have in zip(port.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"Cannot run the ONNX model: {port.name} has the shape {tuple(tensor.shape)}, and it"
            f" takes {port}. Give such inputs, or export it for these (--input-shape)."
        )


def _ort_value(tensor: Tensor) -> Any:
    import onnxruntime  # noqa: PLC0415 - an optional package, and slow to import

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:  # NumPy has no such type: its bits, and what they are
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            plain.view(torch.int16).numpy(), _BFLOAT16
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(plain.numpy())


def _tensor(name: str, value: Any) -> Tensor:
    if not value.is_tensor():
        raise InputError(f"Cannot compare {name} of the ONNX model: it is no tensor this time.")
    if value.data_type() != "tensor(bfloat16)":
        return torch.from_numpy(value.numpy()).clone()
    if not value.tensor_size_in_bytes():
        return torch.empty(value.shape(), dtype=torch.bfloat16, device="cpu")
    raw = (ctypes.c_char * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(value.shape())


def _shown(feeds: Mapping[str, Tensor]) -> str:
    return ", ".join(
        f"{name} {'x'.join(map(str, t.shape)) or 'scalar'} {_name(t.dtype)}"
        for name, t in feeds.items()
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
