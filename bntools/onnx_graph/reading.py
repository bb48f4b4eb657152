"""Reading ONNX files that nobody has to trust: checked, complete, and with functions inlined."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from bntools.errors import BNToolsError, LoadError
from bntools.onnx_graph.tensors import array_of
from bntools.runtimes.sessions import open_session

__all__ = ["OnnxSource", "inner_graphs", "nodes_in", "read_onnx", "tensors_in"]

_DEEPEST = 32
_CHECKED = 2**31 - 2**26


@dataclass(frozen=True, eq=False)
class OnnxSource:
    """An ONNX model as it is folded: whole, valid, its functions inlined.

    `proto` is a copy of what was given; `name` is for messages; `external` says whether its weights
    were in files of their own, `inlined` how many functions it had, `complaint` what onnx's checker
    has against a file that ONNX Runtime takes.
    """

    proto: ModelProto
    name: str
    external: bool = False
    inlined: int = 0
    complaint: str = ""


def read_onnx(model: str | os.PathLike[str] | ModelProto) -> OnnxSource:
    """The model in a file, with its external data, or a copy of one in memory.

    External data are read only from files below the model's folder. Raises `LoadError`.
    """
    if isinstance(model, ModelProto):
        proto = ModelProto()
        proto.CopyFrom(model)
        name, external = "the ONNX model", False
        if any(True for tensor in tensors_in(proto) if _is_external(tensor)):
            raise LoadError(
                "Cannot read the ONNX model: its weights are in other files. Load them with"
                " onnx.load(path), or give the path."
            )
    else:
        path = Path(model)
        name = str(path)
        proto = _parsed(path)
        external = _with_data(proto, path)
    complaint = _check(proto, name)
    inlined = len(proto.functions)
    if inlined:
        proto = _inlined(proto, name)
    return OnnxSource(proto, name, external, inlined, complaint)


def _parsed(path: Path) -> ModelProto:
    if not os.path.isfile(path):
        raise LoadError(f"Cannot load {path}: there is no such file.")
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, RecursionError, ValueError) as error:
        raise LoadError(
            f"Cannot load {path}: it is no ONNX model, or damaged. Export or copy it again."
        ) from error
    except OSError as error:
        raise LoadError(f"Cannot load {path}: {(error.strerror or str(error)).lower()}.") from error
    if not proto.graph.node and not proto.graph.output:
        raise LoadError(f"Cannot load {path}: it is no ONNX model, or an empty one.")
    return proto


def _with_data(proto: ModelProto, path: Path) -> bool:
    """Read the tensors that are in other files; whether there were any."""
    found = [tensor for tensor in tensors_in(proto) if _is_external(tensor)]
    for tensor in found:
        _check_location(tensor, path)
        try:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        except Exception as error:
            why = " ".join(str(error).split())[:200].rstrip(". ")
            raise LoadError(
                f"Cannot load {path}: the data of {tensor.name} cannot be read ({why}). Copy the"
                " files together."
            ) from error
        _check_size(tensor, path)
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    return bool(found)


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _check_location(tensor: TensorProto, path: Path) -> None:
    """Refuse what does not name a plain file below the model's own folder."""
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    if not isinstance(location, str) or not location.isprintable():  # protobuf gives bytes then
        raise LoadError(f"Cannot load {path}: it is damaged: its data are in {location!r}.")
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    within = location and not posix.is_absolute() and not windows.anchor
    if not within or ".." in posix.parts or ".." in windows.parts or "\0" in location:
        raise LoadError(
            f"Cannot load {path}: the data of {tensor.name} are outside of its folder"
            f" ({location[:100]!r}), which no honest file says."
        )
    folder = path.parent.resolve()
    file = folder / location
    if not file.is_file():
        raise LoadError(
            f"Cannot load {path}: the data of {tensor.name} are in {location}, which is not there."
            " Copy the files together."
        )
    if file.is_symlink() or folder not in file.resolve().parents:
        raise LoadError(
            f"Cannot load {path}: the data of {tensor.name} are behind a link ({location}). Put the"
            " file itself beside the model."
        )


def _check_size(tensor: TensorProto, path: Path) -> None:
    count = 1
    for size in tensor.dims:
        count *= size
    try:
        bits = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    except (KeyError, TypeError):
        return  # the checker has something to say about that
    if len(tensor.raw_data) * 8 < count * min(bits, 4 if bits == 8 else bits):
        raise LoadError(f"Cannot load {path}: the data of {tensor.name} are incomplete.")


def _check(proto: ModelProto, name: str) -> str:
    """Refuse what neither onnx's checker nor ONNX Runtime takes; what the checker finds."""
    _check_depth(proto.graph, name)
    if not all(isinstance(each, str) for each in _texts(proto)):  # protobuf gives bytes then
        raise LoadError(f"Cannot load {name}: it is damaged: names in it are no text.")
    for tensor in tensors_in(proto):
        _check_numbers(tensor, name)
    if _weights(proto) > _CHECKED:  # a message of protobuf holds no more; the result is checked
        return ""
    why = _complaint(proto)
    if why:
        try:
            open_session(proto.SerializeToString(), optimise=False)
        except BNToolsError as error:
            raise LoadError(
                f"Cannot load {name}: ONNX's checker refuses it ({_plain(why)}). Export it again."
            ) from error
    return why


def _plain(text: str) -> str:
    """Text that may have names from a file in it, safe to print."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _check_numbers(tensor: TensorProto, name: str) -> None:
    try:
        if tensor.data_type != TensorProto.STRING:
            array_of(tensor)
    except Exception as error:  # numpy and onnx raise what they please
        raise LoadError(
            f"Cannot load {name}: it is damaged: the numbers of {tensor.name or 'a constant'} do"
            " not fit its shape."
        ) from error


def _complaint(proto: ModelProto) -> str:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # noqa: BLE001 - it raises whatever its C++ parts raise
        return " ".join(str(error).split())[:300].rstrip(". ")
    return ""


def _weights(proto: ModelProto) -> int:
    return sum(len(tensor.raw_data) for tensor in tensors_in(proto))


def _check_depth(graph: GraphProto, name: str) -> None:
    level = [graph]
    for _ in range(_DEEPEST):
        level = [inner for each in level for node in each.node for inner in inner_graphs(node)]
        if not level:
            return
    raise LoadError(f"Cannot load {name}: its branches and loops are nested over {_DEEPEST} deep.")


def _texts(proto: ModelProto) -> Iterator[object]:
    """Every name in a model, and its other texts."""
    for each in (*proto.metadata_props, *proto.opset_import):
        yield from (each.key, each.value) if hasattr(each, "key") else (each.domain,)
    nodes: list[NodeProto] = []
    for function in proto.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
        nodes.extend(function.node)
    graphs = [proto.graph]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            for value in (*graph.input, *graph.output, *graph.value_info):
                yield value.name
                yield from (size.dim_param for size in value.type.tensor_type.shape.dim)
            yield from (each.name for each in graph.initializer)
            nodes.extend(graph.node)
            continue
        node = nodes.pop()
        graphs.extend(inner_graphs(node))
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for note in node.metadata_props:
            yield from (note.key, note.value)
        yield from (attribute.name for attribute in node.attribute)


def _inlined(proto: ModelProto, name: str) -> ModelProto:
    """The same model without functions: what is inside can be folded only so."""
    import onnx.inliner  # noqa: PLC0415 - few files need it

    try:
        return onnx.inliner.inline_local_functions(proto)
    except Exception as error:
        why = " ".join(str(error).split())[:200].rstrip(". ")
        raise LoadError(f"Cannot load {name}: its functions cannot be inlined ({why}).") from error


def inner_graphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's attributes: branches, and bodies of loops."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def nodes_in(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node of a graph, and those of the graphs in it."""
    pending = [graph]
    while pending:
        for node in pending.pop().node:
            yield node
            pending.extend(inner_graphs(node))


def tensors_in(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a model holds: initialisers and attributes, inner graphs included."""
    graphs, nodes = [proto.graph], [node for each in proto.functions for node in each.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
            continue
        node = nodes.pop()
        graphs.extend(inner_graphs(node))
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
