"""Sizes that only a run shows: those behind operations whose output depends on numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto, TensorProto, helper
from torch import Tensor

from bntools.errors import BNToolsError
from bntools.onnx_graph.values import Known
from bntools.runtimes.sessions import open_session

__all__ = ["observed"]

_ELEMENTS = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE,
    "bfloat16": TensorProto.BFLOAT16, "int64": TensorProto.INT64, "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8,
}  # fmt: skip
_TOLD = 1 << 12


def observed(
    proto: ModelProto, feeds: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Known]:
    """Run a model in ONNX Runtime as it is written, and look at some of its values.

    Nothing where it does not run. The numbers of small integer tensors are kept too: sizes.
    """
    watched = ModelProto()
    watched.CopyFrom(proto)
    known = {value.name for value in watched.graph.output}
    wanted = [name for name in names if name not in known]
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    try:
        given = open_session(watched.SerializeToString(), optimise=False).run(feeds)
    except (BNToolsError, ValueError):  # ValueError: larger than a message can be
        return {}
    return {name: _seen(given[name]) for name in names if name in given}


def _seen(tensor: Tensor) -> Known:
    name = str(tensor.dtype).removeprefix("torch.")
    small = not tensor.is_floating_point() and tensor.numel() <= _TOLD and tensor.dim() <= 1
    return Known(_ELEMENTS.get(name, 0), tuple(tensor.shape), tensor.numpy() if small else None)
