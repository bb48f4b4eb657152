"""Observing a model: at least two recordings of its forward, on different inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bntools.dataflow.chains import agreed_layers
from bntools.dataflow.graph import Graph, Kind, Node
from bntools.dataflow.guard import unwritten
from bntools.dataflow.reach import bias_beside
from bntools.dataflow.recorder import record
from bntools.errors import BNToolsError, InputError
from bntools.examples import Examples, candidates, given
from bntools.modules import (
    duplicate,
    get_module,
    is_unmade,
    named_modules,
    named_tensors,
    preserved,
    unwrap,
)

__all__ = ["Observation", "observe"]

_SEED = 20


@dataclass(frozen=True)
class Observation:
    """What the forwards of a model did.

    `source` is the caller's model without its wrappers; `model` the one that ran, which is another
    only where lazy parameters had to be made. `examples` and `second` are the two inputs.
    """

    source: nn.Module
    model: nn.Module
    examples: Examples
    second: Examples
    graphs: tuple[Graph, Graph]
    warnings: tuple[str, ...]

    def fresh(self, seed: int) -> Examples:
        """Inputs that were not recorded; inferred ones in a batch of two where that runs."""
        doubled = self.examples.doubled() if self.examples.inferred else None
        batched = doubled is not None and self.second.batch == doubled.batch
        base = doubled if batched and doubled is not None else self.examples
        return base.varied(seed + _SEED + 1)


def observe(model: nn.Module, example_inputs: Any = None) -> Observation:
    """Record a model twice, the second time with other values, and where it can with another size.

    In the second recording, layers without a bias have one of zeros: whether the forward passes it
    on tells whether a fold may give them one.
    """
    source = unwrap(model)
    if any(tensor.is_meta for *_, tensor in named_tensors(source)):
        raise InputError(
            "Cannot run a model on the meta device: it has no numbers. Load them first."
        )
    ready, graph, examples = _first(source, example_inputs)
    again, second = _second(ready, graph, examples)
    again.lent = frozenset(_missing_biases(graph))
    graph.layers, again.layers = agreed_layers(graph.layers, again.layers)
    warnings = tuple(_warnings(source, graph))
    return Observation(source, ready, examples, second, (graph, again), warnings)


def _warnings(model: nn.Module, graph: Graph) -> Iterator[str]:
    if model.training:
        yield "the model is in training mode: its eval() version is used, and the result is that"
    reading = next(filter(_reads_numbers, graph.nodes), None)
    if reading is not None:
        where = reading.module or "the model itself"
        yield f"{where} reads numbers from tensors: paths not taken were not seen"


def _reads_numbers(node: Node) -> bool:
    if node.name not in ("_local_scalar_dense", "tolist()", "numpy()"):
        return False
    return not all(value.constant for value in node.inputs)


def _first(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, Graph, Examples]:
    options = candidates(model) if example_inputs is None else iter([given(example_inputs)])
    failure: tuple[Examples, Exception] | None = None
    for examples in options:
        try:
            ready = _materialised(model, examples)
            return ready, _recorded(ready, examples), examples
        except Exception as error:  # noqa: PERF203 - models raise anything; the first is told
            if not isinstance(error, BNToolsError) and _runs(model, examples):
                raise  # the recorder's fault, not the model's
            failure = failure or (examples, error)
    raise InputError(_does_not_run(example_inputs, failure)) from (failure[1] if failure else None)


def _runs(model: nn.Module, examples: Examples) -> bool:
    try:
        with preserved(model), unwritten(model), torch.no_grad():
            if model.training:
                model.eval()
            fed = examples.copied()
            model(*fed.args, **fed.kwargs)
    except Exception:  # noqa: BLE001 - models raise anything
        return False
    return True


def _does_not_run(example_inputs: Any, failure: tuple[Examples, Exception] | None) -> str:
    if failure is None:
        return (
            "Cannot infer an input: the model has no conv, linear, norm or embedding layer."
            " Give example inputs (--input-shape, --inputs)."
        )
    examples, error = failure
    if "HigherOrderOperator" in str(error):
        return (
            "Cannot record the model: its forward calls torch.cond or another operator of"
            " functions, of which no dataflow is seen. Export it (torch.export) and give the .pt2."
        )
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if example_inputs is None:
        return (
            f"Cannot infer an input: the model runs on none of the shapes tried, such as {examples}"
            f" ({why}). Give example inputs (--input-shape, --inputs)."
        )
    return f"Cannot run the model on {examples}: {why}. Give inputs that it accepts."


def _second(model: nn.Module, graph: Graph, examples: Examples) -> tuple[Graph, Examples]:
    """Another size and twice the batch where the model takes it, else the same shapes."""
    options = [*(other.doubled() for other in examples.resized()), examples.doubled(), examples]
    failure: Exception | None = None
    with _with_biases(model, _missing_biases(graph)):
        for option in options:
            if option is None:
                continue
            varied = option.varied(_SEED)
            try:
                return _recorded(model, varied), varied
            except Exception as error:  # noqa: BLE001 - models raise anything
                failure = error
    raise InputError(
        f"Cannot run the model a second time on {examples} with other values: {failure}."
        " Give inputs of which the values may vary."
    )


def _recorded(model: nn.Module, examples: Examples) -> Graph:
    fed = examples.copied()
    return record(model, fed.args, fed.kwargs)


def _missing_biases(graph: Graph) -> dict[str, Tensor]:
    """Zeros for the biases that layers could gain: registered as None beside a weight in use."""
    found: dict[str, Tensor] = {}
    for node in graph.of_kind(Kind.LINEAR):
        weight = node.linear.weight
        if weight is None or weight.parameter is None or node.linear.bias is not None:
            continue
        name = bias_beside(graph, weight.parameter)
        if name in graph.absent:
            tensor = graph.tensors[weight.parameter].detach()
            found[name] = tensor.new_zeros(node.linear.layout.channels(tensor))
    return found


@contextmanager
def _with_biases(model: nn.Module, biases: dict[str, Tensor]) -> Iterator[None]:
    owners = [(get_module(model, name.rpartition(".")[0]), t) for name, t in biases.items()]
    tables = [(owner._parameters, dict(owner._parameters)) for owner, _ in owners]
    for owner, tensor in owners:
        owner._parameters["bias"] = nn.Parameter(tensor, requires_grad=False)
    try:
        yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)


def _materialised(model: nn.Module, examples: Examples) -> nn.Module:
    """The model, or a copy with its lazy parameters made by one forward from a fixed seed."""
    if not any(is_unmade(module) for _, module in named_modules(model)):
        return model
    made = duplicate(model)
    modes = [(module, module.training) for _, module in named_modules(made)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        made.eval()
        fed = examples.copied()
        made(*fed.args, **fed.kwargs)
    for module, training in modes:
        module.training = training
    return made
