"""Writing ONNX models: whole and checked, or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import ModelProto

from bntools.artifacts import LARGEST, Artifact, check_publishable, publish, staged
from bntools.errors import SaveError
from bntools.onnx_graph.reading import tensors_in

__all__ = ["as_source", "check_valid", "is_large", "staged_proto", "write_onnx"]


def is_large(proto: ModelProto, largest: int = LARGEST) -> bool:
    """Whether the weights of a model take a file of their own."""
    return sum(len(tensor.raw_data) for tensor in tensors_in(proto)) > largest


@contextmanager
def staged_proto(proto: ModelProto, path: Path, *, largest: int = LARGEST) -> Iterator[Artifact]:
    """A model as a file, with its weights beside it where they are large."""
    if is_large(proto, largest):
        with staged(ir.from_proto(proto), path, largest=0) as artifact:
            yield artifact
        return
    content = proto.SerializeToString()
    yield Artifact(content, content)


@contextmanager
def as_source(proto: ModelProto) -> Iterator[bytes | Path]:
    """What a session can open: bytes, or a file in a temporary folder where they are too many."""
    if not is_large(proto):
        yield proto.SerializeToString()
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        staged_proto(proto, Path(folder) / "model.onnx") as artifact,
    ):
        yield artifact.source


def check_valid(proto: ModelProto) -> None:
    """Let onnx's checker look at all of a model; it raises what it finds."""
    with as_source(proto) as source:
        onnx.checker.check_model(
            source if isinstance(source, bytes) else str(source), full_check=True
        )


def write_onnx(proto: ModelProto, path: Path, *, force: bool = False) -> Path | None:
    """Put a model in its place; returns where its weights are, if they are in another file.

    Raises `SaveError`; nothing is left behind then.
    """
    if path.suffix != ".onnx":
        raise SaveError(
            f"Cannot write {path}: it is an ONNX model. Give a name that ends with .onnx."
        )
    check_publishable(path, force=force)
    try:
        with staged_proto(proto, path) as artifact:
            return publish(artifact, path, {}, force=force)
    except ValueError as error:  # protobuf: no message holds so much
        raise SaveError(f"Cannot write {path}: it is too large for one file ({error}).") from error
