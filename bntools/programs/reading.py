"""Reading the graph that torch.export wrote as JSON, before anything in it is lifted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bntools.programs.lifting import Source
from bntools.programs.program import PLAN_VERSION
from bntools.programs.sizes import hints
from bntools.trust import Refusal

__all__ = ["read_program"]

_SCHEMA = 8
_PATH = re.compile(r"[^\s;,()\[\]]+")


def read_program(data: Mapping[str, Any], tensors: dict[str, Tensor]) -> Source:
    """What torch wrote about a program, in the form that `bntools.programs` has."""
    version = data["schema_version"]
    if version["major"] != _SCHEMA:
        raise Refusal(
            f"torch {data.get('torch_version', '')} wrote it in the schema {version['major']}, and"
            f" bntools reads {_SCHEMA}. Load it there and save it with a newer torch"
        )
    module, graph = data["graph_module"], data["graph_module"]["graph"]
    signature, values = module["signature"], graph["tensor_values"]
    held: list[tuple[str, str]] = []
    ports: list[dict[str, Any]] = []
    transient: set[str] = set()
    for spec in signature["input_specs"]:
        ((kind, content),) = spec.items()
        if kind in _HELD:
            name = content[_HELD[kind]]
            held.append((content["arg"]["name"], name))
            if kind == "tensor_constant" or (kind == "buffer" and not content["persistent"]):
                transient.add(name)
        else:
            ports.append(_port(kind, content, values))
    (root,) = (call["signature"] for call in module["module_call_graph"] if call["fqn"] == "")
    outputs, writes = _outputs(signature["output_specs"])
    plan = {
        "version": PLAN_VERSION,
        "tensors": held,
        "ports": ports,
        "in_spec": root["in_spec"],
        "out_spec": root["out_spec"],
        "names": root.get("forward_arg_names") or [],
        "named_tuples": module.get("treespec_namedtuple_fields", {}),
        "graph": {**_graph(graph), "outputs": outputs},
        "writes": writes,
        "ranges": {
            name: [limits.get("min_val"), limits.get("max_val")]
            for name, limits in data["range_constraints"].items()
        },
        "guards": data.get("guards_code", []),
        "home": _home(values, held),
    }
    missing = [name for _, name in held if name not in tensors]
    if missing:
        raise ValueError(f"the tensor {missing[0]} is missing")
    return Source(plan, tensors, frozenset(transient))


_HELD = {
    "parameter": "parameter_name",
    "buffer": "buffer_name",
    "tensor_constant": "tensor_constant_name",
}
_WRITES = {"buffer_mutation": "buffer_name", "parameter_mutation": "parameter_name"}


def _port(kind: str, content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "constant_input":
        ((sort, constant),) = content["value"].items()
        return {"name": content["name"] or "constant", "constant": _unless_none(sort, constant)}
    if kind != "user_input":
        raise Refusal(f"its program takes a {kind}, which only its own code can make")
    ((sort, argument),) = content["arg"].items()
    if sort == "as_tensor":
        meta = values[argument["name"]]
        sizes, hint = hints(meta["sizes"])
        return {"name": argument["name"], "sizes": sizes, "hint": hint, "dtype": meta["dtype"]}
    if sort == "as_sym_int" and "as_name" in argument:
        return {"name": argument["as_name"], "constant": 2, "number": True}
    raise Refusal(f"its program takes an input of the kind {sort}, which bntools does not know")


def _unless_none(sort: str, constant: Any) -> Any:
    return None if sort == "as_none" else constant


def _outputs(specs: Sequence[Any]) -> tuple[list[Any], list[tuple[str, str]]]:
    """What is returned, then what buffers and inputs are written with."""
    returned, written = [], []
    writes: list[tuple[str, str]] = []
    for spec in specs:
        ((kind, content),) = spec.items()
        if kind in ("user_output", "loss_output"):
            argument = content["arg"]
            returned.append(argument if kind == "user_output" else {"as_tensor": argument})
        elif kind in _WRITES:
            written.append({"as_tensor": content["arg"]})
            writes.append(("tensor", content[_WRITES[kind]]))
        elif kind == "user_input_mutation":
            written.append({"as_tensor": content["arg"]})
            writes.append(("input", content["user_input_name"]))
        else:
            raise Refusal(f"its program gives a {kind}: it is one for training, not a network")
    return [*returned, *written], writes


def _graph(graph: Mapping[str, Any]) -> dict[str, Any]:
    """A graph without what it says about how it came to be."""
    shapes = {
        name: [size.get("as_int") for size in meta["sizes"]]
        for name, meta in graph["tensor_values"].items()
    }
    nodes = [_node(node) for node in graph["nodes"]]
    return {
        "inputs": graph["inputs"],
        "outputs": graph["outputs"],
        "nodes": nodes,
        "shapes": shapes,
    }


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    inputs = [{"name": i["name"], "arg": _argument(i["arg"])} for i in node["inputs"]]
    where = _path(node.get("metadata", {}))
    return {"target": node["target"], "inputs": inputs, "outputs": node["outputs"], "where": where}


def _argument(argument: Mapping[str, Any]) -> Any:
    if "as_graph" not in argument:
        return argument
    return {"as_graph": {"graph": _graph(argument["as_graph"]["graph"])}}


def _path(metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """The path and the class of the innermost module that a node comes from."""
    stack = str(metadata.get("nn_module_stack", "")).rpartition(";")[2].split(",")
    if len(stack) != 3 or not _PATH.fullmatch(stack[1]) or ".." in f".{stack[1]}.":
        return None
    return stack[1].partition("@")[0], stack[2].rpartition(".")[2]


def _home(values: Mapping[str, Any], held: Sequence[tuple[str, str]]) -> str:
    """The kind of device on which the weights of the program were."""
    devices = [values[name]["device"]["type"] for name, _ in held if name in values]
    return str(max(set(devices), key=devices.count)) if devices else "cpu"
