"""The inputs of an ONNX model: what it takes, and sizes to look at where it leaves them open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from onnx import GraphProto, ModelProto

from bntools.errors import InputError
from bntools.examples import Examples
from bntools.onnx_graph.attributes import attribute
from bntools.onnx_graph.tensors import dtype_name, torch_dtype

__all__ = ["Intake", "Sizes", "candidates", "drawn", "given_sizes", "intakes", "open_names"]

_TRIED = (64, 224, 32, 28, 128, 256, 16, 8, 96, 299, 384, 512, 1)
_MOST = 2**28
Sizes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Intake:
    """An input of a model: `shape` has a name for each size that is open ("" where it has none)."""

    name: str
    element: int
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        sizes = "x".join(str(size) or "?" for size in self.shape) or "scalar"
        return f"{self.name}: {sizes} {dtype_name(self.element)}"


def open_names(proto: ModelProto) -> set[str]:
    """Constants that are also inputs, so that a caller may override them (since IR version 4)."""
    if proto.ir_version < 4:
        return set()
    return {value.name for value in proto.graph.input} & _constants(proto.graph)


def intakes(proto: ModelProto) -> tuple[Intake, ...]:
    """What a caller has to give.

    A size that is open is that of the weight of a convolution or product that takes the input.
    """
    constants = _constants(proto.graph)
    found = []
    for value in proto.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            raise InputError(
                f"Cannot give inputs to the ONNX model: {value.name} is no tensor. Only tensors can"
                " be given."
            )
        shape: tuple[int | str, ...] = tuple(
            size.dim_value if size.HasField("dim_value") else size.dim_param
            for size in tensor.shape.dim
        )
        known = _by_weight(proto.graph, value.name)
        if known is not None and not tensor.HasField("shape"):
            shape = known
        elif known is not None and len(known) == len(shape):
            shape = tuple(
                new if isinstance(old, str) and isinstance(new, int) else old
                for old, new in zip(shape, known, strict=True)
            )
        found.append(Intake(value.name, tensor.elem_type, shape))
    return tuple(found)


def _constants(graph: GraphProto) -> set[str]:
    return {each.name for each in graph.initializer}


def _by_weight(graph: GraphProto, name: str) -> tuple[int | str, ...] | None:
    """The shape of an input, as the weight of the first linear layer that takes it says."""
    weights = {each.name: tuple(each.dims) for each in graph.initializer}
    for node in graph.node:
        if len(node.input) < 2 or node.input[0] != name or node.input[1] not in weights:
            continue
        weight = weights[node.input[1]]
        if node.op_type == "Conv" and len(weight) > 2:
            return ("", weight[1] * int(attribute(node, "group", 1)), *[""] * (len(weight) - 2))
        if node.op_type == "ConvTranspose" and len(weight) > 2:
            return ("", weight[0], *[""] * (len(weight) - 2))
        if node.op_type == "Gemm" and len(weight) == 2 and not attribute(node, "transA", 0):
            return ("", weight[1 if attribute(node, "transB", 0) else 0])
    return None


def candidates(inputs: Sequence[Intake], *, batch: int = 2) -> Iterator[Sizes]:
    """Sizes to try: a batch where that is open, the same size for all else that is open."""
    dynamic = any(isinstance(size, str) for intake in inputs for size in intake.shape[1:])
    batches = {intake.shape[0] for intake in inputs if intake.shape}
    seen: list[Sizes] = []
    for size in _TRIED if dynamic else _TRIED[:1]:
        for count in dict.fromkeys((batch, 1)):
            found: Sizes = {
                intake.name: tuple(
                    each if isinstance(each, int)
                    else count if axis == 0 or (each and each in batches) else size
                    for axis, each in enumerate(intake.shape)
                )
                for intake in inputs
            }  # fmt: skip
            if found not in seen:
                seen.append(found)
                yield found


def given_sizes(
    inputs: Sequence[Intake], examples: Examples
) -> tuple[Sizes, dict[str, torch.Tensor]]:
    """The sizes and the tensors of example inputs, by the names of the inputs.

    Raises `InputError` where they do not fit.
    """
    named = {name: value for name, value in examples.kwargs.items() if value is not None}
    tensors = examples.tensors()
    if examples.args or set(named) != {intake.name for intake in inputs}:
        if len(tensors) != len(inputs):
            raise InputError(
                f"Cannot run the ONNX model on {examples}: that is {len(tensors)} tensors, and its"
                f" inputs are {', '.join(map(str, inputs)) or 'none'}."
            )
        named = dict(zip((intake.name for intake in inputs), tensors, strict=True))
    fed = {}
    for intake in inputs:
        fed[intake.name] = _fitting(intake, named[intake.name])
    return {name: tuple(tensor.shape) for name, tensor in fed.items()}, fed


def _fitting(intake: Intake, tensor: torch.Tensor) -> torch.Tensor:
    sizes = zip(intake.shape, tensor.shape, strict=False)
    same = len(intake.shape) == tensor.dim() and all(
        isinstance(want, str) or want == have for want, have in sizes
    )
    wanted = torch_dtype(intake.element)
    floats = wanted is not None and wanted.is_floating_point and tensor.is_floating_point()
    if (intake.shape and not same) or (not floats and wanted != tensor.dtype):
        shown = "x".join(map(str, tensor.shape)) or "scalar"
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(
            f"Cannot run the ONNX model on {shown} {dtype}: it takes {intake}. Give such inputs."
        )
    return tensor.to(wanted) if floats else tensor


def drawn(
    inputs: Sequence[Intake], sizes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, torch.Tensor]:
    """Random tensors: floats are standard normal, integers from 0 to 9."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for intake in inputs:
        shape, dtype = sizes[intake.name], torch_dtype(intake.element)
        if dtype is None:
            raise InputError(
                f"Cannot make inputs for the ONNX model: {intake.name} is"
                f" {dtype_name(intake.element)}. Give some (--inputs)."
            )
        if torch.Size(shape).numel() > _MOST:
            raise InputError(f"Cannot make inputs for the ONNX model: {intake} is too large.")
        if dtype.is_floating_point:
            tensor = torch.randn(shape, generator=generator, device="cpu")
        else:
            high = 2 if dtype == torch.bool else 10
            tensor = torch.randint(0, high, shape, generator=generator, device="cpu")
        found[intake.name] = tensor.to(dtype)
    return found
