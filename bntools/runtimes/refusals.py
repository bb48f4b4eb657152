"""Why torch's exporter cannot export a model, in one line that names the module."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from bntools.errors import ExportError
from bntools.modules import named_modules

__all__ = ["decides_by_numbers", "explained"]

_NOT_OF_THE_MODEL = ("torch.", "bntools.runtimes.")
_BY_NUMBERS = ("GuardOnDataDependentSymNode", "DataDependentOutputException")


def explained(error: Exception, model: nn.Module) -> ExportError:
    """The error to raise for one that torch's exporter raised."""
    chain = list(_chain(error))
    node = next(filter(None, map(_node_of, chain)), None)
    if node is not None and any(type(e).__name__ == "DispatchError" for e in chain):
        return _unsupported(node, model)
    if decides_by_numbers(error):
        return ExportError(
            f"Cannot export the model: {_place(chain, model)} decides by the numbers in a tensor,"
            " which one traced path cannot show. Write it with torch.where or torch.cond, or take"
            " that part out of the model."
        )
    if any(isinstance(module, torch.jit.ScriptModule) for _, module in named_modules(model)):
        path = next(p for p, m in named_modules(model) if isinstance(m, torch.jit.ScriptModule))
        return ExportError(
            f"Cannot export the model: {_called(path, model)} is TorchScript, which torch's"
            " exporter does not take. Export the model that it was made from."
        )
    last = chain[-1] if node is None else chain[0]
    at = _at_node(node, model) if node is not None else _place(chain, model)
    return ExportError(
        f"Cannot export the model: torch's exporter fails at {at}: {type(last).__name__}:"
        f" {_line(last)}. Rewrite that part, or export the rest of the model."
    )


def decides_by_numbers(error: BaseException) -> bool:
    """Whether a forward reads numbers out of tensors, where a trace has none."""
    return any(type(e).__name__ in _BY_NUMBERS or _reads_memory(e) for e in _chain(error))


def _unsupported(node: torch.fx.Node, model: nn.Module) -> ExportError:
    return ExportError(
        f"Cannot export the model: there is no ONNX form of {_operation(node)}, which"
        f" {_at_node(node, model)} calls. Replace the operation, or leave it out of the model."
    )


def _operation(node: torch.fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _at_node(node: torch.fx.Node, model: nn.Module) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(path) for path, _ in reversed(list(stack.values()))), "")
    return _called(path, model)


def _called(path: str, model: nn.Module) -> str:
    """A module by its path and class."""
    module = dict(named_modules(model)).get(path)
    kind = type(module).__name__ if module is not None else ""
    if not path:
        return f"the model itself ({kind})" if kind else "the model itself"
    return f"{path} ({kind})" if kind else path


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _frames(error: BaseException) -> Iterator[TracebackType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _node_of(error: BaseException) -> torch.fx.Node | None:
    """The node that was being translated: a local of the exporter's own loop."""
    for trace in _frames(error):
        node = trace.tb_frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node) and node.op == "call_function":
            return node
    return None


def _place(chain: list[BaseException], model: nn.Module) -> str:
    """The innermost module of the model that was running, with its line of code."""
    paths = {id(module): path for path, module in named_modules(model)}
    found = ""
    for error in chain:
        for trace in _frames(error):
            frame: Any = trace.tb_frame
            owner = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
            own = not str(frame.f_globals.get("__name__", "")).startswith(_NOT_OF_THE_MODEL)
            if own and id(owner) in paths and isinstance(owner, nn.Module):
                code = linecache.getline(frame.f_code.co_filename, trace.tb_lineno).strip()
                where = f"{Path(frame.f_code.co_filename).name}, line {trace.tb_lineno}"
                shown = f": {code}" if code else ""
                found = f"{_called(paths[id(owner)], model)} ({where}{shown})"
        if found:
            return found
    return _called("", model)


def _reads_memory(error: BaseException) -> bool:
    text = str(error)
    return "FakeTensor" in text and ("data pointer" in text or "numpy" in text)


def _line(error: BaseException) -> str:
    """The first sentence or so of a message, without colours and pictures."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    first = text.split("\n\n", maxsplit=1)[0]
    return " ".join(first.split())[:240].rstrip(". ") or "no message"
