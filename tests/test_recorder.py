"""The recorder: what it sees of a forward, and that nobody sees the recorder afterwards."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import Net

from bntools.dataflow.graph import Graph, Kind, Node, Value
from bntools.dataflow.guard import Guard, storage_key, untouched, unwritten
from bntools.dataflow.layers import Ownership
from bntools.dataflow.recorder import record
from bntools.dataflow.tape import tensors_in
from bntools.dataflow.versions import Versions
from bntools.resources import one_thread

X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


def recorded(forward: Callable[..., Any], *args: Any, **parts: Any) -> Graph:
    """The graph of a function of a module and inputs (X by default)."""
    return record(Net(forward, **parts).eval(), args or (X.clone(),))


def kinds(nodes: list[Node]) -> list[Kind]:
    """The kinds of the operations that use anything; the kernel of a norm also makes an empty."""
    return [node.kind for node in nodes if node.inputs]


def named(graph: Graph, name: str) -> list[Node]:
    return [node for node in graph.nodes if node.name == name]


def only(graph: Graph, name: str) -> Node:
    (node,) = named(graph, name)
    return node


def ancestors(value: Value) -> set[str]:
    """The names of all operations that a value depends on."""
    found: set[str] = set()
    stack = [value]
    while stack:
        node = stack.pop().producer
        if node is not None and node.name not in found:
            found.add(node.name)
            stack.extend(node.inputs)
    return found


def layers() -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)}


# Graphs


def test_conv_and_norm_become_a_linear_and_an_affine_node():
    graph = recorded(lambda m, x: m.bn(m.conv(x)), **layers())
    assert kinds(graph.nodes) == [Kind.LINEAR, Kind.AFFINE, Kind.OUTPUT]
    linear, norm, output = (node for node in graph.nodes if node.inputs)
    assert (linear.module, norm.module, norm.norm.owner) == ("conv", "bn", "bn")
    assert norm.inputs[0] is linear.outputs[0]
    assert linear.outputs[0].consumers == [norm]
    assert output.inputs == [norm.outputs[0]]
    assert linear.linear.weight is graph.parameters["conv.weight"]
    assert [node.order for node in graph.nodes] == list(range(len(graph.nodes)))


def test_linear_function_is_one_node_whatever_the_rank_of_its_input():
    for shape in [(4,), (2, 4), (2, 5, 4), (2, 3, 5, 4)]:
        graph = recorded(lambda m, x: m.fc(x), torch.zeros(shape), fc=nn.Linear(4, 6))
        (node,) = graph.of_kind(Kind.LINEAR)
        assert node.linear.channel_dim == len(shape) - 1
        assert node.linear.weight is graph.parameters["fc.weight"]
        assert [n.kind for n in graph.nodes] == [Kind.LINEAR, Kind.OUTPUT]


def test_inputs_parameters_and_what_follows_from_them_alone_are_told_apart():
    graph = recorded(lambda m, x: x * (m.conv.weight.sum() + 1), **layers())
    add, product = only(graph, "add"), only(graph, "mul")
    assert add.outputs[0].constant
    assert not product.outputs[0].constant
    assert [value.constant for value in product.inputs] == [False, True]


def test_random_numbers_are_no_constants():
    graph = recorded(lambda m, x: x + torch.rand(()))
    assert not only(graph, "rand").outputs[0].constant


def test_shape_of_a_tensor_is_no_dependence_on_its_values():
    graph = recorded(lambda m, x: torch.zeros_like(m.conv(x)) + 1, **layers())
    assert only(graph, "zeros_like").inputs == []


# Versions


def test_write_gives_a_new_version_of_what_is_written():
    graph = recorded(lambda m, x: m.conv(x).add_(1) * 2, **layers())
    conv, add, mul = (only(graph, name) for name in ("convolution", "add_", "mul"))
    assert add.inputs == [conv.outputs[0]]
    assert add.outputs[0] is not conv.outputs[0]
    assert mul.inputs == [add.outputs[0]]
    assert [n.name for n in conv.outputs[0].consumers] == ["add_"]


def test_write_through_a_view_gives_the_base_a_new_version():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y[:, 0].zero_()
        return y * 2

    graph = recorded(forward, **layers())
    (read,) = only(graph, "mul").inputs
    assert read.producer.kind is Kind.OPAQUE
    assert {"a write through an alias", "zero_", "convolution"} <= ancestors(read)


def test_write_to_the_base_gives_every_view_a_new_version():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        flat, part = y.flatten(1), y[:, :2]
        y.mul_(3)
        return flat.sum() + part.sum()

    graph = recorded(forward, **layers())
    for node in named(graph, "sum"):
        assert "mul_" in ancestors(node.inputs[0])


def test_write_before_a_view_is_taken_is_seen_by_the_view():
    graph = recorded(lambda m, x: m.conv(x).relu_()[:, 1] + 1, **layers())
    assert {"relu_", "select"} <= ancestors(only(graph, "add").inputs[0])


def test_output_argument_is_written():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        torch.add(x, 1, out=y)
        return y * 2

    assert "add" in ancestors(only(recorded(forward), "mul").inputs[0])


def test_replaced_data_is_a_new_version():
    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = m.conv(x), m.conv(x).exp()
        y.data = z
        return y * 2

    graph = recorded(forward, **layers())
    assert {"a replaced .data", "exp"} <= ancestors(only(graph, "mul").inputs[0])


def test_alias_that_no_operation_made_is_opaque_and_depends_on_what_it_aliases():
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(m.conv(x).numpy()) * 2

    graph = recorded(forward, **layers())
    assert "an unrecorded alias" in ancestors(only(graph, "mul").inputs[0])
    alias = only(graph, "an unrecorded alias")
    assert alias.kind is Kind.OPAQUE
    assert "convolution" in ancestors(alias.outputs[0])


def test_write_through_an_unrecorded_alias_is_seen():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        torch.utils.dlpack.from_dlpack(y.detach()).zero_()
        return y * 2

    graph = recorded(forward, **layers())
    assert "zero_" in ancestors(only(graph, "mul").inputs[0])


def versions_of(model: nn.Module) -> Versions:
    return Versions(Ownership(model))


def test_versions_know_tensors_by_identity_and_aliases_by_memory():
    versions = versions_of(nn.Linear(2, 2))
    base, other = torch.zeros(4), torch.zeros(4)
    view = base[:2]
    for tensor in (base, view, other):
        versions.bind(tensor, Value(tuple(tensor.shape)))
    assert versions.get(view) is not versions.get(base)
    assert [t is base for t in versions.aliases(view)] == [True]
    assert versions.aliases(other) == []
    assert versions.get(base[:1]) is None
    assert [t.shape for t in versions.aliases(base[:1])] == [(4,), (2,)]


def test_binding_again_replaces_the_version_and_adds_no_alias():
    versions = versions_of(nn.Linear(2, 2))
    base = torch.zeros(4)
    view = base[:2]
    first, second = Value((4,)), Value((4,))
    versions.bind(base, first)
    versions.bind(view, Value((2,)))
    versions.bind(base, second)
    assert versions.get(base) is second
    assert len(versions.aliases(view)) == 1


def test_dead_tensors_are_nobody_and_alias_nothing():
    versions = versions_of(nn.Linear(2, 2))
    base = torch.zeros(4)
    view = base[:2]
    for tensor in (base, view):
        versions.bind(tensor, Value(tuple(tensor.shape)))
    key = id(view)
    del view, tensor
    gc.collect()
    assert versions.aliases(base) == []
    assert versions._values[key][0].ref() is None


def test_memory_that_is_reused_belongs_to_its_new_tensor_only():
    versions = versions_of(nn.Linear(2, 2))
    owner = torch.zeros(64)
    versions.bind(owner, Value((64,)))
    old = storage_key(owner)
    owner.data = torch.zeros(32)
    versions.moved(owner)
    newcomer = torch.zeros(0).set_(torch.zeros(64).untyped_storage())
    versions._aliases[storage_key(newcomer)] = versions._aliases.pop(old)
    assert versions.aliases(newcomer) == []


def test_values_do_not_mix_where_memory_is_reused_within_a_forward():
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(30):
            y = m.conv(x)
            del y
            z = torch.ones(2, 4, 4, 4) + 1
            z.mul_(2)
        return z

    graph = recorded(forward, **layers())
    returned = only(graph, "returned").inputs[0]
    assert "convolution" not in ancestors(returned)
    assert named(graph, "a write through an alias") == []


def test_parameters_are_known_by_name_and_tied_ones_by_their_first():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    graph = recorded(lambda m, x: m.b(m.a(x)), torch.zeros(1, 3), a=first, b=second)
    assert set(graph.parameters) == {"a.weight", "a.bias", "b.bias"}
    assert graph.tied == {"a.weight": ("b.weight",)}
    used = [node.linear.weight for node in graph.of_kind(Kind.LINEAR)]
    assert used == [graph.parameters["a.weight"]] * 2
    assert graph.owners["b.bias"] == "b"


# Who else sees a value


@pytest.mark.parametrize(
    ("leave", "name"),
    [
        (lambda y: y.numpy(), "numpy()"),
        (lambda y: y.tolist(), "tolist()"),
        (np.asarray, "numpy()"),
        (torch.utils.dlpack.from_dlpack, "dlpack"),
        (lambda y: y.data_ptr(), "data_ptr()"),
        (lambda y: y.untyped_storage(), "untyped_storage()"),
    ],
    ids=["numpy", "tolist", "asarray", "dlpack", "data_ptr", "storage"],
)
def test_tensor_that_leaves_torch_is_used(leave, name):
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        leave(y)
        return m.bn(y)

    graph = recorded(forward, **layers())
    outside = [n for n in only(graph, "convolution").outputs[0].consumers if n.kind is Kind.OUTPUT]
    assert name in [node.name for node in outside]


@pytest.mark.parametrize(
    "read",
    [Tensor.item, float, bool, lambda y: f"{y}"],
    ids=["item", "float", "bool", "format"],
)
def test_number_read_from_a_tensor_is_a_use_of_it(read):
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        read(y[0, 0, 0, 0])
        return m.bn(y)

    conv = only(recorded(forward, **layers()), "convolution")
    assert len(conv.outputs[0].consumers) > 1


def test_returned_values_are_found_in_any_container():
    class Box:
        def __init__(self, item: Tensor) -> None:
            self.item = item

    def forward(m: Any, x: Tensor) -> Any:
        return {"a": [x + 1, (x + 2,)], "b": Box(x + 3), "c": None, "d": {"e": {4: x + 4}}}

    graph = recorded(forward)
    assert only(graph, "returned").inputs == [n.outputs[0] for n in named(graph, "add")]


def test_tensors_are_found_in_order_and_cycles_end():
    a, b, c = (torch.zeros(n) for n in (1, 2, 3))
    loop: list[Any] = [a, {"b": b}]
    loop.append(loop)
    assert [t.numel() for t in tensors_in((loop, c, "text", 3, None))] == [1, 2, 3]
    assert list(tensors_in(nn.Linear(2, 2))) == []


def test_value_that_the_model_keeps_is_a_survivor():
    kept: list[Tensor] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        kept.append(y)
        return m.bn(y)

    graph = recorded(forward, **layers())
    survivor = only(graph, "kept after the forward")
    assert survivor.kind is Kind.OUTPUT
    assert survivor.inputs == [only(graph, "convolution").outputs[0]]


def test_value_that_only_a_cycle_holds_is_no_survivor():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        loop: list[Any] = [y]
        loop.append(loop)
        return m.bn(y)

    assert named(recorded(forward, **layers()), "kept after the forward") == []


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_use_what_they_are_given(kind):
    parts = layers()
    where = "conv" if kind == "register_forward_hook" else "bn"
    getattr(parts[where], kind)(lambda *_: None)
    graph = recorded(lambda m, x: m.bn(m.conv(x)), **parts)
    uses = [n for n in only(graph, "convolution").outputs[0].consumers if n.kind is Kind.OUTPUT]
    assert len(uses) == 1
    assert uses[0].name.endswith(f"hook of {where}")


# Frames


def test_frames_say_what_went_into_a_norm_and_what_came_out():
    graph = recorded(lambda m, x: m.bn(m.conv(x)).relu(), **layers())
    assert list(graph.frames) == ["bn"]
    (frame,) = graph.frames["bn"]
    assert frame.inputs == tuple(only(graph, "convolution").outputs)
    assert kinds(graph.inside(frame)) == [Kind.AFFINE]
    assert frame.outputs == (graph.inside(frame)[-1].outputs[0],)


def test_every_call_of_a_norm_has_its_frame():
    graph = recorded(lambda m, x: m.bn(m.bn(m.conv(x))), **layers())
    first, second = graph.frames["bn"]
    assert first.outputs == second.inputs
    assert first.stop <= second.start


def test_norm_that_does_not_run_has_no_frame():
    graph = recorded(lambda m, x: m.conv(x), **layers())
    assert graph.frames == {}
    assert [layer.path for layer in graph.layers] == ["bn"]


def test_operations_belong_to_the_innermost_module():
    inner = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh()))
    graph = recorded(lambda m, x: m.body(x) + 1, body=inner)
    modules = {node.name: node.module for node in graph.nodes}
    assert modules == {"relu": "body.0", "tanh": "body.1.0", "add": "", "returned": ""}


# Inference mode, no grad


def test_operations_are_seen_inside_inference_mode():
    @torch.inference_mode()
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.conv(x)).relu()

    graph = recorded(forward, **layers())
    assert kinds(graph.nodes) == [Kind.LINEAR, Kind.AFFINE, Kind.PASS, Kind.OUTPUT]
    assert not torch.is_inference_mode_enabled()


def test_writes_inside_inference_mode_are_undone():
    model = Net(lambda m, x: m.body(x), body=nn.Sequential(nn.Linear(4, 4))).eval()
    model.register_buffer("count", torch.zeros(()))

    @torch.inference_mode()
    def forward(m: Any, x: Tensor) -> Tensor:
        m.count.add_(1)
        return m.body(x)

    model.run = forward
    record(model, (X,))
    assert model.count == 0


def test_recording_takes_no_gradients_and_leaves_the_mode_alone():
    seen = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            recorded(lambda m, x: seen.append(torch.is_grad_enabled()) or m.conv(x), **layers())
            assert torch.is_grad_enabled() is enabled
    assert seen == [False, False]


# Nothing is left behind


class StopError(Exception):
    """What a forward raises here."""


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_everything_is_restored_when_the_forward_raises(error):
    def forward(m: Any, x: Tensor) -> Tensor:
        m.note = "new"
        m.conv.weight.zero_()
        m.bn.running_mean.add_(5)
        m.bn.eps = 7.0
        raise error("stop")

    call, threads = nn.Module.__call__, torch.get_num_threads()
    model = Net(forward, **layers()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    with pytest.raises(error, match="stop"):
        record(model, (X,))
    assert nn.Module.__call__ is call
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert model.training
    assert not hasattr(model, "note")
    assert model.bn.eps == 1e-5
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    after = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    assert after == states


def test_recording_again_after_a_failure_sees_the_same():
    fail = [True]

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        if fail.pop():
            raise StopError("stop")
        return m.bn(y)

    model = Net(forward, **layers()).eval()
    with pytest.raises(StopError, match="stop"):
        record(model, (X,))
    fail.append(False)
    graph = record(model, (X,))
    assert kinds(graph.nodes) == [Kind.LINEAR, Kind.AFFINE, Kind.OUTPUT]


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.bn.running_mean.fill_(9),
        lambda m: m.bn.num_batches_tracked.add_(1),
        lambda m: m.conv.weight.data.mul_(2),
        lambda m: m.conv.weight.detach()[0].zero_(),
        lambda m: torch.nn.init.ones_(m.conv.bias),
        lambda m: m.bn.running_var.copy_(m.bn.running_mean),
        lambda m: m.bn.running_var.resize_(0),
        lambda m: m.conv.weight.t_() if m.conv.weight.dim() < 3 else m.conv.weight.transpose_(0, 1),
        lambda m: setattr(m.conv.weight, "data", torch.zeros(4, 3, 1, 1)),
        lambda m: m.loose.add_(1),
    ],
)
def test_whatever_a_forward_writes_to_the_model_is_undone(write):
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        write(m)
        return y

    model = Net(forward, **layers()).eval()
    model.loose = torch.arange(3.0)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers()), "loose": model.loose}
    before = {name: (t.clone(), t.shape, t.stride()) for name, t in held.items()}
    record(model, (X,))
    for name, tensor in held.items():
        content, shape, stride = before[name]
        assert (tensor.shape, tensor.stride()) == (shape, stride), name
        assert torch.equal(tensor, content), name


def test_forward_sees_its_own_writes_while_it_runs():
    seen = []

    def forward(m: Any, x: Tensor) -> Tensor:
        m.bn.running_mean.fill_(9)
        seen.append(m.bn.running_mean.tolist())
        return m.bn(m.conv(x))

    graph = recorded(forward, **layers())
    assert seen == [[9.0] * 4]
    (norm,) = graph.of_kind(Kind.AFFINE)
    assert norm.norm.owner == "bn"


def test_guard_copies_before_the_first_write_only_and_whatever_shares_the_memory():
    base = torch.arange(4.0)
    guard = Guard([base, base[:2], torch.zeros(2)])
    guard.keep([base[1:]])
    base.add_(1)
    guard.keep([base])
    base.add_(1)
    guard.restore()
    assert base.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_unwritten_undoes_writes_also_when_something_raises():
    model, seen = nn.BatchNorm1d(3), []

    def write_and_raise() -> None:
        with unwritten(model):
            model(torch.randn(5, 3))
            seen.append(int(model.num_batches_tracked))
            raise StopError("stop")

    with pytest.raises(StopError, match="stop"):
        write_and_raise()
    assert seen == [1]
    assert model.num_batches_tracked == 0
    assert model.running_mean.tolist() == [0.0, 0.0, 0.0]


def test_untouched_names_the_tensors_that_operations_use():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with untouched(model) as used:
        _ = model[1].bias + 1
        _ = torch.stack([model[0].weight[0], torch.zeros(2)])
    assert used == ["1.bias", "0.weight"]
    with untouched(model) as used:
        nn.Linear(2, 2)(torch.zeros(1, 2))
    assert used == []


# Threads


def test_small_inputs_are_recorded_on_one_thread_and_large_ones_on_all():
    seen = []
    torch.set_num_threads(2)
    model = Net(lambda m, x: seen.append(torch.get_num_threads()) or x).eval()
    record(model, (torch.zeros(8),))
    record(model, (torch.zeros(1 << 16),))
    assert seen == [1, 2]
    assert torch.get_num_threads() == 2


def test_one_thread_is_undone_when_something_raises():
    def work_and_raise() -> None:
        with one_thread():
            assert torch.get_num_threads() == 1
            raise StopError("stop")

    torch.set_num_threads(2)
    with pytest.raises(StopError, match="stop"):
        work_and_raise()
    assert torch.get_num_threads() == 2


def test_calls_of_other_threads_and_other_models_are_none_of_its_business():
    stranger, results = nn.Linear(4, 4), []

    def forward(m: Any, x: Tensor) -> Tensor:
        other = threading.Thread(target=lambda: results.append(m.conv(x).shape))
        other.start()
        other.join()
        stranger(torch.zeros(1, 4))
        return m.bn(m.conv(x))

    graph = recorded(forward, **layers())
    assert results == [(2, 4, 4, 4)]
    assert len(named(graph, "convolution")) == 1
    assert only(graph, "linear").module == ""


def test_models_can_be_recorded_in_several_threads():
    graphs: list[Graph] = []

    def work() -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
        graphs.extend(record(model, (X.clone(),)) for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(4)]
    call = nn.Module.__call__
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert nn.Module.__call__ is call
    assert len(graphs) == 20
    seen = {tuple(kinds(graph.nodes)) for graph in graphs}
    assert seen == {(Kind.LINEAR, Kind.AFFINE, Kind.PASS, Kind.OUTPUT)}


def test_recording_holds_no_activations_afterwards():
    seen = []

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x)).relu()
        seen.extend(weakref.ref(t) for t in (x, y))
        return y.sum()

    graph = recorded(forward, **layers())
    gc.collect()
    assert [reference() for reference in seen] == [None, None]
    assert len(graph.nodes) > 3


def test_recording_does_not_import_dynamo():
    code = (
        "import sys, torch; from bntools.dataflow.recorder import record;"
        "record(torch.nn.ReLU(), (torch.zeros(2),)); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
