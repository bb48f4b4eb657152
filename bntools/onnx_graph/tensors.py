"""Tensors of ONNX files as tensors of PyTorch and NumPy, and back, bfloat16 included."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

__all__ = ["FLOATS", "Array", "array_of", "dtype_name", "proto_of", "tensor_of", "torch_dtype"]

Array = NDArray[Any]
FLOATS: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
}
"""The element types that a fold can compute with."""
_OTHERS: dict[int, torch.dtype] = {
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


def torch_dtype(element: int) -> torch.dtype | None:
    """The torch dtype of an ONNX element type; None where there is none."""
    return FLOATS.get(element) or _OTHERS.get(element)


def dtype_name(element: int) -> str:
    """The name of an element type, such as "float32"."""
    found = torch_dtype(element)
    named = TensorProto.DataType.Name(element).lower() if element else "of an unknown type"
    return str(found).removeprefix("torch.") if found is not None else named


def array_of(proto: TensorProto) -> Array:
    """The numbers of a tensor in a file, without a copy where they are stored raw."""
    return numpy_helper.to_array(proto)


def tensor_of(array: Array, element: int) -> Tensor:
    """An array of a floating element type as a tensor, which is not to be written to."""
    plain = np.require(array, requirements="C")
    if element == TensorProto.BFLOAT16:
        plain = plain.view(np.int16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is read-only: nobody writes to it
        tensor = torch.from_numpy(plain)
    return tensor.view(torch.bfloat16) if element == TensorProto.BFLOAT16 else tensor


def proto_of(tensor: Tensor, name: str) -> TensorProto:
    """A tensor as one of a file, in its own dtype."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype != torch.bfloat16:
        return numpy_helper.from_array(plain.numpy(), name)
    raw = plain.view(torch.int16).numpy().tobytes()
    return helper.make_tensor(name, TensorProto.BFLOAT16, list(plain.shape), raw, raw=True)
