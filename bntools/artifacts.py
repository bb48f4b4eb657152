"""An ONNX model as a file, with external data where it is large: staged, checked, published."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from bntools.errors import ExportError, SaveError
from bntools.writing import check_writable, sync_folder, unfinished, write_atomically

__all__ = ["LARGEST", "Artifact", "check_publishable", "publish", "staged"]

LARGEST = 2**31 - 2**26
"""Weights of more bytes go to a file of their own: a protobuf message holds 2 GiB."""
_SMALL = 1024


@dataclass(frozen=True)
class Artifact:
    """A model as the bytes of its file, and `data`, where its large weights are in a second file.

    `source` is what a session opens: the bytes, or the staged file beside its data.
    """

    content: bytes
    source: bytes | Path
    data: Path | None = None

    @property
    def size(self) -> int:
        """The size of both files, without metadata."""
        return len(self.content) + (self.data.stat().st_size if self.data is not None else 0)


def check_publishable(path: Path, *, force: bool) -> None:
    """Find out before long work whether `path`, and data beside it, could be written.

    Raises `SaveError`.
    """
    check_writable(path, force=force)
    if not force and _data_of(path.resolve()).exists():
        check_writable(_data_of(path.resolve()))


@contextmanager
def staged(model: Any, path: Path, *, largest: int | None = None) -> Iterator[Artifact]:
    """A graph as a file that is valid for onnx's checker; large ones in a folder beside `path`.

    Raises `ExportError` where the checker refuses it, `SaveError` where there is no room.
    """
    weights = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if weights <= (LARGEST if largest is None else largest):
        content = ir.to_proto(model).SerializeToString()
        _check(content)
        yield Artifact(content, content)
        return
    final = path.resolve()
    with _folder_beside(final) as folder:
        file = folder / final.name
        data = folder / _free_name(final)
        try:
            ir.save(model, file, external_data=data.name, size_threshold_bytes=_SMALL)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise SaveError(f"Cannot write {data.name} beside {path}: {reason}.") from error
        _check(file)
        yield Artifact(file.read_bytes(), file, data)


def publish(
    artifact: Artifact, path: Path, metadata: Mapping[str, str], *, force: bool = False
) -> Path | None:
    """Put a checked model in its place, data first; returns where its data are, if it has any.

    The new model refers to data under a name that no file had, so that at every moment the model
    in place, old or new, finds its own. Data that only the old model used are removed at the end.
    Raises `SaveError`; nothing is left behind then.
    """
    properties = onnx.ModelProto()
    onnx.helper.set_model_props(properties, dict(metadata))
    # In protobuf the concatenation of two messages is their union: the bytes that were checked
    # and run are published as they are, and their metadata behind them.
    pieces = (artifact.content, properties.SerializeToString())
    final = path.resolve()
    before = _external_data(final)
    moved = final.parent / artifact.data.name if artifact.data is not None else None
    try:
        if moved is not None and artifact.data is not None:
            _move(artifact.data, moved)
        write_atomically(path, lambda stream: [*map(stream.write, pieces)], force=force)
    except BaseException:
        if moved is not None:
            moved.unlink(missing_ok=True)
        raise
    for old in before - {moved}:
        with suppress(OSError):
            old.unlink(missing_ok=True)
    return moved


def _move(staged_data: Path, final: Path) -> None:
    try:
        with staged_data.open("rb") as stream:
            os.fsync(stream.fileno())
        if final.exists():
            raise SaveError(f"Cannot write {final}: it exists. Choose another name.")
        staged_data.rename(final)
        sync_folder(final.parent)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SaveError(f"Cannot write {final}: {reason}.") from error


def _check(model: bytes | Path) -> None:
    source = model if isinstance(model, bytes) else str(model)
    try:
        onnx.checker.check_model(source, full_check=True)
    except Exception as error:
        why = " ".join(str(error).split())[:300].rstrip(". ")
        raise ExportError(
            f"Cannot export the model: torch's exporter made a file that ONNX refuses ({why})."
            " Try another --opset."
        ) from error


def _data_of(final: Path) -> Path:
    return final.with_name(f"{final.name}.data")


def _free_name(final: Path) -> str:
    name, count = _data_of(final).name, 1
    while (final.parent / name).exists():
        count += 1
        name = f"{final.name}.{count}.data"
    return name


def _external_data(file: Path) -> set[Path]:
    """The data files that an ONNX file refers to, as far as they are beside it and named so."""
    if not file.is_file():
        return set()
    try:
        graph = onnx.load(str(file), load_external_data=False).graph
    except Exception:  # noqa: BLE001 - what is there need not be an ONNX file
        return set()
    names = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    ours = {n for n in names if n == Path(n).name and n.startswith(f"{file.name}.")}
    return {file.parent / name for name in ours if name.endswith(".data")}


@contextmanager
def _folder_beside(final: Path) -> Iterator[Path]:
    # On the same file system as the target, so that publishing is a rename.
    with unfinished(final) as folder:
        try:
            folder.mkdir()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise SaveError(f"Cannot write {final}: {reason}.") from error
        yield folder
