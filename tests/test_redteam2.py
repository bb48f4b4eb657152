"""What a second attacker found, where the first had not looked; each as small as it gets."""

from __future__ import annotations

import collections
import copy
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_folds import Net as OnnxNet
from randomise import difference, outputs, randomise
from test_redteam import conv_and_norm, ready, right_without_check
from torch import Tensor, nn
from torch.utils import _pytree
from zoo import IMAGE, Net

import bntools
from bntools.errors import InputError, LoadError, SaveError, SurgeryError
from bntools.outputs import flatten
from bntools.report import Action, Reason

# Outputs within something


@dataclass(slots=True)
class Slots:
    """Has no __dict__."""

    first: Tensor
    second: Tensor


class Callable_:  # noqa: N801 - it is about its __call__
    """An object that can be called, and holds tensors."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.held = first, second

    def __call__(self) -> None: ...


_HIDING: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "slots": Slots,
    "deque": lambda y, z: collections.deque([y, z]),
    "generator": lambda y, z: (z, (t for t in [y])),
    "generator of both": lambda y, z: (t for t in [y, z]),
    "iterator": lambda y, z: (z, iter([y])),
    "partial": lambda y, z: (z, functools.partial(torch.add, y)),
    "closure": lambda y, z: (z, lambda: y),
    "default": lambda y, z: (z, lambda held=y: held),
    "view of a dict": lambda y, z: (z, {"a": y}.values()),
    "proxy of a dict": lambda y, z: (z, types.MappingProxyType({"a": y})),
    "key of a dict": lambda y, z: {z: 1, y: 2},
    "set": lambda y, z: {y, z},
    "object with a call": lambda y, z: (z, Callable_(y, z)),
}


@pytest.mark.parametrize("how", _HIDING)
def test_output_of_a_host_that_is_returned_within_something_is_seen(how: str):
    """It was folded away: the caller got another one, and the check had not looked there."""
    hide = _HIDING[how]

    def forward(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        return hide(y, m.bn(y))

    model = ready(conv_and_norm(forward))
    (decision,) = bntools.plan_fold(model, IMAGE().double()).decisions
    assert decision.reason is Reason.RETURNED


def test_the_same_is_folded_where_only_the_normed_output_is_returned():
    """The test above says something: it is not the container that is refused."""
    model = ready(conv_and_norm(lambda m, x: collections.deque([m.bn(m.conv(x))])))
    (decision,) = bntools.plan_fold(model, IMAGE().double()).decisions
    assert decision.action is Action.FOLD


_LEFT_OUT: dict[str, tuple[Any, Any]] = {
    "array": (np.arange(3.0), np.array([0.0, 1.0, 5.0])),
    "reversed array": (np.arange(3)[::-1], np.array([2, 1, 7])),
    "number of NumPy": (np.float32(1.5), np.float32(2.5)),
    "deque": (collections.deque([torch.ones(2)]), collections.deque([torch.zeros(2)])),
    "bytes": (b"cat", b"dog"),
    "set": ({"a", "b"}, {"a", "c"}),
    "range": (range(3), range(1, 4)),
    "view": ({"a": torch.ones(2)}.values(), {"a": torch.zeros(2)}.values()),
    "slots": (Slots(torch.ones(2), torch.ones(2)), Slots(torch.ones(2), torch.zeros(2))),
}


@pytest.mark.parametrize("kind", _LEFT_OUT)
def test_what_a_model_gives_beside_tensors_is_compared(kind: str):
    """Two models that differ in nothing else were called equivalent."""
    one, other = _LEFT_OUT[kind]
    x = torch.randn(3, 4)
    model = Net(lambda m, x: (m.fc(x), one), fc=nn.Linear(4, 4)).eval()
    twin = Net(lambda m, x: (m.fc(x), other), fc=copy.deepcopy(model.fc)).eval()
    assert bntools.verify(model, copy.deepcopy(model), x)
    assert not bntools.verify(model, twin, x)


@pytest.mark.parametrize(
    ("value", "why"), [(iter([1]), "read only once"), ({torch.ones(1)}, "no order")]
)
def test_what_cannot_be_compared_is_refused(value: Any, why: str):
    """An iterator is empty the second time; tensors in a set have no order."""
    with pytest.raises(InputError, match=why):
        flatten((torch.ones(1), value))


@pytest.mark.parametrize("values", [[2**60], list(range(2**60, 2**60 + 500))], ids=len)
def test_whole_numbers_beyond_float64_are_compared_exactly(values: list[int]):
    """2^60 and 2^60 + 1 are one number in float64."""
    x = torch.randn(3, 4)
    model = Net(lambda m, x: (m.fc(x), torch.tensor(values)), fc=nn.Linear(4, 4)).eval()
    fc = copy.deepcopy(model.fc)
    twin = Net(lambda m, x: (m.fc(x), torch.tensor(values) + 1), fc=fc).eval()
    assert bntools.verify(model, copy.deepcopy(model), x)
    assert not bntools.verify(model, twin, x)


# Tensors of other kinds


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_no_crash():
    """They have no sizes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        images = torch.nested.nested_tensor([*m.bn(m.conv(x))])
        return torch.nested.to_padded_tensor(images, 0.0)

    right_without_check(conv_and_norm(forward), IMAGE())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_weights_are_kept():
    """`Cannot access data pointer of Tensor that doesn't have storage`, of inputs that run."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    randomise(model)
    sparse = model[0].weight.detach().to_sparse_csr()
    model[0].weight = nn.Parameter(sparse, requires_grad=False)
    x = torch.randn(3, 4)
    (decision,) = bntools.plan_fold(model, x).decisions
    assert decision.action is Action.KEEP
    assert difference(outputs(bntools.fold(model, x).model, x), outputs(model, x)) < 1e-6


class Quantised(Tensor):
    """Eight bits and a scale, which every operation takes for the numbers that they mean."""

    @staticmethod
    def __new__(cls, whole: Tensor, scale: Tensor):
        """A wrapper."""
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole: Tensor, scale: Tensor) -> None:
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Detached and cloned it stays what it is."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].whole.clone(), args[0].scale.clone())

        def plain(value: Any) -> Any:
            return value.whole * value.scale if isinstance(value, cls) else value

        return func(*_pytree.tree_map(plain, args), **_pytree.tree_map(plain, kwargs or {}))


def test_weights_that_keep_their_numbers_in_another_form_stay():
    """A fold made a plain float32 weight of one that had 8 bits."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    randomise(model)
    whole = torch.randint(-127, 127, model[0].weight.shape).to(torch.int8)
    model[0].weight = nn.Parameter(Quantised(whole, torch.tensor(0.01)), requires_grad=False)
    (decision,) = bntools.plan_fold(model, IMAGE()).decisions
    assert decision.reason is Reason.COMPUTED_WEIGHT
    assert "Quantised" in decision.detail


# Memory that is written between a norm and the layer that it folds forward into


def _other_data(y: Tensor, x: Tensor) -> None:
    y.data = x


def _by_numpy(y: Tensor, x: Tensor) -> None:
    del x
    y.numpy()[:] = 0


def _by_dlpack(y: Tensor, x: Tensor) -> None:
    del x
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(y)).mul_(2)


@pytest.mark.parametrize("write", [_other_data, _by_numpy, _by_dlpack])
def test_data_that_are_replaced_before_the_host_runs_are_seen(write: Callable[..., None]):
    """The norm gives a copy, an Identity the memory itself."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        z = m.bn(y)
        write(y, x)
        return m.last(z)

    model = Net(forward, bn=nn.BatchNorm2d(3), last=nn.Conv2d(3, 2, 1))
    right_without_check(model, IMAGE())


def test_an_array_that_was_taken_before_the_norm_may_be_written_after_it():
    """Who has the memory writes to it whenever he likes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        array = y.numpy()
        z = m.bn(y)
        array[:] = 0
        return m.last(z)

    model = Net(forward, bn=nn.BatchNorm2d(3), last=nn.Conv2d(3, 2, 1))
    right_without_check(model, IMAGE())


# Merging


class Asking(nn.Module):
    """To torch.fx, which lets a stand-in through the forward, everything has every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Any) -> Tensor:
        """As in DETR, where images may come with masks."""
        if hasattr(x, "tensors"):
            x = x.tensors
        return self.wide(x) + self.point(x)


class Plain(Asking):
    """The same, asking nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """A sum of branches."""
        return self.wide(x) + self.point(x)


def test_a_forward_that_runs_otherwise_when_it_is_traced_stays():
    """Not a crash: the block next to it merges."""
    model = nn.Sequential(Asking(), nn.ReLU(), Plain()).eval()
    result = bntools.fold(model, IMAGE(), merge_branches=True)
    merging = result.report.merging
    assert [merge.rewritten for merge in merging.merges] == ["2"]
    assert {left.reason for left in merging.left} == {Reason.NOT_REWRITABLE}
    assert not result.report.check.rolled_back
    assert difference(outputs(result.model, IMAGE()), outputs(model, IMAGE())) < 1e-5


# Batch norms by hand


class ByHand(nn.Module):
    """A batch norm in eval mode; what it does in training is `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.steps = kind, 0
        self.gain, self.offset = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Each kind is a line, or a function."""
        if not self.training:
            return self.affine(self.normal(x, self.mean, self.var))
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        if self.kind == "layer norm":
            return self.affine((x - x.mean()) / x.std())
        if self.kind == "noise":
            return self.affine(self.normal(x, self.mean, self.var) + torch.randn_like(x))
        if self.kind == "unbiased":
            return self.affine(self.normal(x, mean, x.var((0, 2, 3))))
        if self.kind == "large batches" and len(x) < 64:
            return self.affine(self.normal(x, self.mean, self.var))
        self.steps += 1
        shrinking = {"cumulative": 1 / self.steps, "warm-up": max(0.1, 1 / self.steps)}
        weight = shrinking.get(self.kind, 0.1)
        self.mean = (1 - weight) * self.mean + weight * mean.detach()
        self.var = (1 - weight) * self.var + weight * var.detach()
        if self.kind == "no affine":
            return self.normal(x, mean, var)
        if self.kind == "ghosts":
            parts = x.split(64)
            return self.affine(torch.cat([self.normal(p, *self.of_batch(p)) for p in parts]))
        return self.affine(self.normal(x, mean, var))

    @staticmethod
    def of_batch(x: Tensor) -> tuple[Tensor, Tensor]:
        """Its statistics."""
        return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)

    @staticmethod
    def normal(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Without the affine."""
        return (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]

    def affine(self, x: Tensor) -> Tensor:
        """Gamma and beta."""
        return x * self.gain[:, None, None] + self.offset[:, None, None]


@pytest.mark.parametrize(
    "kind", ["ghosts", "layer norm", "noise", "unbiased", "large batches", "no affine"]
)
def test_what_trains_otherwise_than_a_batch_norm_is_none(kind: str):
    """They became BatchNorm layers, frozen ones some of them, and trained to something else."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ByHand(kind))
    (decision,) = bntools.to_batchnorm(model, torch.rand(2, 3, 8, 8)).report.decisions
    assert decision.reason is Reason.NOT_BATCH_NORM
    assert "in training" in decision.detail


@pytest.mark.parametrize("kind", ["cumulative", "warm-up"])
def test_a_momentum_that_changes_is_not_that_of_the_first_step(kind: str):
    """Of a cumulative average that is 1, by which each batch would replace all before it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ByHand(kind))
    result = bntools.to_batchnorm(model, torch.rand(2, 3, 8, 8))
    assert result.model[1].momentum == 0.1
    assert any("momentum could not be found" in said for said in result.report.warnings)


def test_a_momentum_that_stays_is_found():
    """The tests above say something."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ByHand("plain"))
    result = bntools.to_batchnorm(model, torch.rand(2, 3, 8, 8))
    assert result.model[1].momentum == pytest.approx(0.1)
    assert not any("momentum" in said for said in result.report.warnings)


def test_dtypes_that_no_batch_norm_takes_together_are_an_error_in_words():
    """Statistics in float32, data in float64."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3).double(), ByHand("plain"))
    with pytest.raises(SurgeryError, match=r"Cannot convert the model: with .* it raises"):
        bntools.to_batchnorm(model, torch.rand(2, 3, 8, 8).double())


# Recipes


def _recipe(**edit: Any) -> dict[str, Any]:
    return {"version": 1, "edits": [edit]}


_FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "a convolution": ({"edit": "drop-norm", "path": "0"}, "Conv2d is no norm layer"),
    "an activation": ({"edit": "drop-norm", "path": "2"}, "ReLU is no norm layer"),
    "a group norm": ({"edit": "drop-norm", "path": "3"}, "GroupNorm is no norm layer"),
    "the model": ({"edit": "drop-norm", "path": ""}, "Sequential is no norm layer"),
    "a part with layers": ({"edit": "drop-norm", "path": "4"}, "Plain is no norm layer"),
    "no activation": ({"edit": "remove-activation", "path": "0"}, "Conv2d is no activation"),
    "all of it": ({"edit": "remove-activation", "path": ""}, "Sequential is no activation"),
    "a bias of another size": (
        {"edit": "add-bias", "path": "0", "channels": 5},
        "it has 6 channels, not 5",
    ),
}


@pytest.mark.parametrize("which", _FOREIGN)
def test_a_recipe_of_another_architecture_does_not_take_layers_away(which: str):
    """A convolution became an Identity, silently."""
    edit, why = _FOREIGN[which]
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.GroupNorm(2, 6), Plain()
    )
    with pytest.raises(SurgeryError, match=why):
        bntools.apply_recipe(model, _recipe(**edit))


@pytest.mark.parametrize("version", [True, 1.0])
def test_a_version_is_a_whole_number(version: object):
    """True is 1, and 1.0 as well."""
    with pytest.raises(LoadError, match="another version"):
        bntools.apply_recipe(nn.ReLU(), {"version": version, "edits": []})


# Folders


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shell that sits in it was left in a folder that is no more."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaveError, match="it is the current folder"):
        bntools.ship(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), ".")
    assert tmp_path.stat().st_ino == Path.cwd().stat().st_ino


# ONNX


def _sloped(before: bool) -> onnx.ModelProto:
    net = OnnxNet("n", 3, 8, 8)
    if before:
        net.bn("x", "c", 3, positive=True).add("PRelu", "c c", "p").conv("p", "y", (4, 3, 1, 1))
        zeros, name = np.zeros(3), "c"
    else:
        net.conv("x", "c", (6, 3, 3, 3)).add("PRelu", "c c", "p").bn("p", "y", 6, positive=True)
        zeros, name = np.zeros(6), "y"
    return net.weight(f"{name}_beta", value=zeros).weight(f"{name}_mean", value=zeros).model()


@pytest.mark.parametrize("before", [False, True])
def test_slopes_that_are_data_stop_a_fold(before: bool):
    """A PRelu of c with c as its slope squares what is negative."""
    plan = bntools.plan_onnx(_sloped(before))
    assert not plan.folds


def test_slopes_that_are_constants_do_not():
    """The test above says something."""
    net = OnnxNet("n", 3, 8, 8).conv("x", "c", (6, 3, 3, 3)).weight("s", 6, 1, 1)
    net.add("PRelu", "c s", "p").bn("p", "y", 6, positive=True)
    net.weight("y_beta", value=np.zeros(6)).weight("y_mean", value=np.zeros(6))
    assert len(bntools.plan_onnx(net.model()).folds) == 1


class Branching(nn.Module):
    """An operator of functions, which modes of torch do not see into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return torch.cond(y.sum() > 0, lambda a: a * 2, lambda a: a * 3, (y,))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo asks for it
def test_forward_with_an_operator_of_functions_is_refused_with_the_way_on(tmp_path):
    """Other inputs would not help; the exported program is data, and folds."""
    model, x = Branching().eval(), torch.rand(1, 3, 8, 8)
    randomise(model)
    with pytest.raises(InputError, match=r"calls torch.cond .* give the .pt2"):
        bntools.fold(model, x)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    assert len(bntools.fold(bntools.load(tmp_path / "model.pt2")).report.folds) == 1
