"""What an attacker found: folds that were wrong, impure or crashed, each as small as it gets."""

from __future__ import annotations

import copy
import pickle
import random
import threading
import types
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from randomise import cast, difference, outputs, randomise
from test_traps import changes, fingerprint
from torch import Tensor, nn
from torch.utils import dlpack
from zoo import IMAGE, Net, rand

import bntools
from bntools.errors import BNToolsError
from bntools.report import Plan
from bntools.surgery.folding import fold_copy

ROWS = rand(5, 4)


def conv_and_norm(forward: Callable[..., Any], **more: Any) -> nn.Module:
    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), **more)


def linear_and_norm(forward: Callable[..., Any]) -> nn.Module:
    return Net(forward, fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))


def ready(model: nn.Module) -> nn.Module:
    model = model.double().eval()
    randomise(model)
    return model


def right_without_check(model: nn.Module, inputs: Any, *others: Any) -> Plan:
    """Plan and fold, and compare in float64 without the check that `fold` would make."""
    model = ready(model)
    examples = [cast(example, torch.float64) for example in (inputs, *others)]
    truths = [outputs(model, example) for example in examples]
    before = fingerprint(model)
    plan = bntools.plan_fold(model, examples[0])
    folded = fold_copy(model, plan.compiled.folds).model
    assert changes(before, fingerprint(model)) == []
    for example, truth in zip(examples, truths, strict=True):
        assert difference(outputs(folded, example), truth) < 1e-10, str(plan)
    return plan


# Another way to the same memory


def _second_name_by_data(y: Tensor) -> Tensor:
    z = torch.empty(0, dtype=y.dtype)
    z.data = y
    return z


def _second_name_by_storage(y: Tensor) -> Tensor:
    z = torch.empty(0, dtype=y.dtype)
    return z.set_(y.untyped_storage(), 0, y.shape, y.stride())


_NAMES: dict[str, Callable[[Tensor], Tensor]] = {
    "data": _second_name_by_data,
    "storage": _second_name_by_storage,
    "dlpack": lambda y: dlpack.from_dlpack(dlpack.to_dlpack(y)),
    "deepcopy": copy.deepcopy,
    "pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "element": lambda y: y.untyped_storage()[3],
}


@pytest.mark.parametrize("way", _NAMES)
def test_output_of_a_host_that_is_used_by_another_way_is_seen(way):
    alias = _NAMES[way]
    right_without_check(conv_and_norm(lambda m, x: m.bn(y := m.conv(x)) + alias(y)), IMAGE())


@pytest.mark.parametrize("way", ["data", "storage", "dlpack"])
def test_output_of_a_host_that_is_written_by_another_name_is_seen(way):
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        _NAMES[way](y).mul_(2)
        return m.bn(y)

    right_without_check(conv_and_norm(forward), IMAGE())


# Weights and biases in two roles


def test_weight_that_is_the_data_as_well_is_not_changed():
    def forward(m: Any, x: Tensor) -> Any:
        return x, m.bn(F.linear(m.fc.weight, m.fc.weight, m.fc.bias))

    right_without_check(linear_and_norm(forward), ROWS())


def test_bias_that_is_the_data_as_well_is_not_changed():
    def forward(m: Any, x: Tensor) -> Any:
        return x, m.bn(F.linear(m.fc.bias, m.fc.weight, m.fc.bias)[None])

    right_without_check(linear_and_norm(forward), ROWS())


@pytest.mark.parametrize("second", ["other", None])
def test_one_weight_with_two_biases_is_kept(second):
    model = Net(
        lambda m, x: m.bn(F.linear(x, m.w, m.first)) * m.bn(F.linear(x + 1, m.w, m.second)),
        w=nn.Parameter(torch.randn(4, 4)),
        first=nn.Parameter(torch.randn(4)),
        second=nn.Parameter(torch.randn(4)) if second else None,
        bn=nn.BatchNorm1d(4, affine=False),
    )
    right_without_check(model, ROWS())


def test_host_absorbs_the_inner_of_two_norms_first_though_the_outer_ran_earlier():
    model = Net(
        lambda m, x: m.outer(m.a(x)) * m.outer(m.inner(m.b(x))),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
        outer=nn.BatchNorm1d(4),
        inner=nn.BatchNorm1d(4),
    )
    assert len(right_without_check(model, ROWS()).folds) == 2


class WithBias(nn.Module):
    """A host of which the weight is a buffer, or has another name, and the bias is None."""

    def __init__(self, name: str, table: str) -> None:
        super().__init__()
        if name == "weight":
            self.register_buffer(name, torch.randn(6, 3, 3, 3))
        else:
            setattr(self, name, nn.Parameter(torch.randn(6, 3, 3, 3)))
        getattr(self, f"register_{table}")("bias", None)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, getattr(self, self.name), self.bias)


@pytest.mark.parametrize("table", ["parameter", "buffer"])
@pytest.mark.parametrize("name", ["weight", "kernel"])
def test_bias_that_cannot_be_given_is_a_reason_to_keep(name, table):
    right_without_check(nn.Sequential(WithBias(name, table), nn.BatchNorm2d(6)), IMAGE())


# Norms that an Identity does not replace


class Called(nn.BatchNorm2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x).relu()


class Tupled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


class Listed(nn.BatchNorm2d):
    def forward(self, x: Any) -> Tensor:
        return super().forward(x[0])


def test_norm_that_does_more_in_its_call_is_kept():
    assert right_without_check(nn.Sequential(nn.Conv2d(3, 6, 3), Called(6)), IMAGE()).kept


def test_norm_that_returns_a_tuple_is_kept():
    model = Net(lambda m, x: m.bn(m.conv(x))[0], conv=nn.Conv2d(3, 6, 3), bn=Tupled(6))
    assert right_without_check(model, IMAGE()).kept


def test_norm_that_takes_a_list_is_kept():
    model = Net(
        lambda m, x: torch.stack(list(m.bn([m.conv(x)]))), conv=nn.Conv2d(3, 6, 3), bn=Listed(6)
    )
    assert right_without_check(model, IMAGE()).kept


def test_registered_norm_with_a_forward_of_its_own_is_kept():
    frozen = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d
    norm = frozen(6)
    norm.forward = types.MethodType(lambda self, x: frozen.forward(self, x).relu(), norm)
    assert right_without_check(nn.Sequential(nn.Conv2d(3, 6, 3), norm), IMAGE()).kept


class Rectified(Tensor):
    """A tensor to which linear layers mean something else."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return torch.Tensor.relu(out) if func is F.linear else out


def test_linear_of_a_tensor_subclass_is_what_its_operations_are():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.fc(x.as_subclass(Rectified)).as_subclass(Tensor))

    assert right_without_check(linear_and_norm(forward), ROWS()).kept


# Shapes that show nothing


def test_pixel_that_only_larger_images_have_counts():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y).sum() + y[:, :, 1:].sum()

    right_without_check(conv_and_norm(forward), rand(2, 3, 3, 3)(), rand(2, 3, 5, 5)())


def test_call_on_nothing_says_nothing_of_the_channels():
    model = Net(
        lambda m, x: m.bn(torch.cat([m.a(x), m.b(x[5:])])),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
        bn=nn.BatchNorm1d(4),
    )
    right_without_check(model, ROWS(), rand(9, 4)())


def test_scalars_in_a_stack_do_not_crash():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y[:, :4]) + torch.stack([y[0, 5, 0, 0], x.sum()]).sum()

    model = Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(4))
    right_without_check(model, IMAGE())


def test_output_that_is_read_by_stride_keeps_its_strides():
    model = Net(
        lambda m, x: m.bn(m.fc(x).transpose(1, 2)).as_strided((2, 5), (35, 1)),
        fc=nn.Linear(6, 5),
        bn=nn.BatchNorm1d(5),
    )
    right_without_check(model, rand(2, 7, 6)())


def test_expanded_pixel_under_two_norms_is_not_written():
    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.second(m.bn(m.conv(x).expand(-1, -1, 4, 4)))
        z[:, :, 0, 0] = 7.0
        return z

    right_without_check(conv_and_norm(forward, second=nn.BatchNorm2d(6)), rand(2, 3, 3, 3)())


# Copies


class Shared(nn.Sequential):
    def __deepcopy__(self, memo: Any) -> Shared:
        return self


class Remade(nn.Sequential):
    def __deepcopy__(self, memo: Any) -> Remade:
        new = Remade(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).double().eval()
        new.load_state_dict(self.state_dict())
        return new


class Forgetful(nn.Sequential):
    def __getstate__(self) -> Any:
        return {**self.__dict__, "_modules": {"1": self[1]}}


@pytest.mark.parametrize("outer", [lambda m: m, nn.Sequential], ids=["root", "inside"])
@pytest.mark.parametrize("kind", [Shared, Remade, Forgetful])
def test_hooks_of_deepcopy_neither_share_nor_lose_anything(kind, outer):
    plan = right_without_check(outer(kind(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))), IMAGE())
    assert len(plan.folds) == 1


def test_graph_module_folds():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    assert len(right_without_check(model, IMAGE()).folds) == 1


def test_parameter_of_a_folded_norm_that_another_layer_holds_is_copied():
    model = conv_and_norm(lambda m, x: m.bn(m.conv(x)), unused=nn.BatchNorm2d(6)).eval()
    model.unused.weight = model.bn.weight
    result = bntools.fold(model, IMAGE())
    assert result.model.unused.weight is not model.bn.weight


# What a forward may leave behind


def _append(m: Any) -> None:
    m.log.append(1)


def _nested(m: Any) -> None:
    m.log["a"].append(1)


def _slice(m: Any) -> None:
    m.spare.weight.data = m.spare.weight.data[:1]


def _transpose(m: Any) -> None:
    m.spare.weight.t_()


def _count(m: Any) -> None:
    m.log[0].add_(1)


_TRACES: dict[str, tuple[Callable[[Any], Any], Callable[[], Any], Callable[[Any], Any]]] = {
    "deque": (_append, deque, list),
    "nested": (_nested, lambda: {"a": []}, lambda log: list(log["a"])),
    "defaultdict": (_nested, lambda: defaultdict(list), dict),
    "counter": (lambda m: m.log.update("a"), Counter, dict),
    "tensor": (lambda m: m.log.add_(1), lambda: torch.zeros(2), Tensor.tolist),
    "tensor in a list": (_count, lambda: [torch.zeros(2)], lambda log: log[0].tolist()),
    "generator": (
        lambda m: torch.rand((), generator=m.log),
        torch.Generator,
        lambda log: log.get_state().tolist(),
    ),
    "python's": (lambda m: m.log.random(), lambda: random.Random(1), random.Random.getstate),
    "numpy's": (
        lambda m: m.log.random(),
        lambda: np.random.default_rng(1),
        lambda log: str(log.bit_generator.state),
    ),
    "slice": (_slice, list, list),
    "transposed": (_transpose, list, list),
    "flag": (lambda m: m.conv.weight.requires_grad_(False), list, list),
    "gradient": (lambda m: setattr(m.spare.weight, "grad", torch.ones(2, 3)), list, list),
}


@pytest.mark.parametrize("trace", _TRACES)
def test_trace_that_a_forward_leaves_is_removed(trace):
    leave, make, look = _TRACES[trace]

    def forward(m: Any, x: Tensor) -> Tensor:
        leave(m)
        return m.bn(m.conv(x))

    model = conv_and_norm(forward, spare=nn.Linear(3, 2), log=make()).eval()
    before, content = fingerprint(model), look(model.log)
    bntools.fold(model, IMAGE())
    assert changes(before, fingerprint(model)) == []
    assert look(model.log) == content


def test_two_threads_leave_module_calls_as_they_were():
    original = nn.Module.__call__
    first_runs, second_is_done = threading.Event(), threading.Event()

    def wait(m: Any, x: Tensor) -> Tensor:
        first_runs.set()
        second_is_done.wait(0.3)
        return m.bn(m.conv(x))

    def plan(forward: Callable[..., Any]) -> None:
        found.append(len(bntools.plan_fold(conv_and_norm(forward).eval(), IMAGE()).folds))
        if forward is not wait:
            second_is_done.set()

    found: list[int] = []
    threads = [
        threading.Thread(target=plan, args=(wait,)),
        threading.Thread(target=plan, args=(lambda m, x: m.bn(m.conv(x)),)),
    ]
    threads[0].start()
    assert first_runs.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert nn.Module.__call__ is original
    assert found == [1, 1]


# Errors in words


@pytest.mark.parametrize("model", [None, "model", lambda x: x])
def test_what_is_no_module_is_an_error_in_words(model):
    with pytest.raises(BNToolsError, match=r"give an nn\.Module"):
        bntools.plan_fold(model, IMAGE())


def test_model_without_numbers_is_an_error_in_words():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval().to("meta")
    with pytest.raises(BNToolsError, match="meta"):
        bntools.plan_fold(model, IMAGE().to("meta"))


@pytest.mark.timeout(30)
def test_module_under_a_million_paths_takes_no_time():
    tower = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for _ in range(20):
        tower = nn.ModuleList([tower, tower])
    right_without_check(
        Net(lambda m, x: m.bn(m.fc(x)), tower=tower, fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)),
        ROWS(),
    )
