"""What a norm folds back through: every rule at several sizes of image, every flag, every refusal.

Folds are made without the check that `fold` would make, and compared in float64; a norm that is
kept has to be kept for its reason. A padded or uneven operation lets pass scales, but no shifts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from randomise import difference, outputs, randomise
from test_traps import changes, fingerprint
from torch import Tensor, nn
from zoo import Net

import bntools
from bntools.report import Decision, Reason
from bntools.surgery.folding import fold_copy

Change = Callable[[Tensor], Tensor]
SIZES = ((2, 3, 12, 12), (1, 3, 13, 11), (3, 3, 9, 16))


@torch.no_grad()
def shaped(norm: Any, *, shift: bool, negative: bool) -> None:
    """Give a norm scales of one sign, or of both, and a shift or exactly none."""
    weight = norm.weight.abs()
    weight[::3] *= -1 if negative else 1
    norm.weight.copy_(weight)
    if not shift:
        norm.running_mean.zero_()
        norm.bias.zero_()


def ready(model: nn.Module, *, shift: bool = True, negative: bool = False) -> nn.Module:
    """A model in float64 and eval mode, with statistics that show mistakes."""
    model = model.double().eval()
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            shaped(module, shift=shift, negative=negative)
    return model


def decided(model: nn.Module, *examples: Tensor) -> Decision:
    """What becomes of the norm `bn`, after comparing the unchecked fold at every size."""
    examples = tuple(example.double() for example in examples)
    truths = [outputs(model, example) for example in examples]
    before = fingerprint(model)
    plan = bntools.plan_fold(model, examples[0])
    folded = fold_copy(model, plan.compiled.folds).model
    assert changes(before, fingerprint(model)) == []
    for example, truth in zip(examples, truths, strict=True):
        assert difference(outputs(folded, example), truth) < 1e-10, str(plan)
    return next(d for d in plan.decisions if d.path == "bn")


def images(*sizes: tuple[int, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(5)
    return [torch.randn(size, generator=random) + 0.3 for size in sizes or SIZES]


def after(change: Change, channels: int = 6, **parts: Any) -> nn.Module:
    """A conv, something, and a norm."""
    return Net(
        lambda m, x: m.bn(change(m.conv(x)) if not parts else change(m, m.conv(x))),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(channels),
        **parts,
    )


# One operation between a conv and a norm: does a shift pass, and does a negative scale?


def _in_place(function: Callable[[Tensor], Any]) -> Change:
    def run(y: Tensor) -> Tensor:
        function(y)
        return y

    return run


_ANY, _POSITIVE, _NO_SHIFT, _NEITHER = (True, True), (True, False), (False, True), (False, False)
_OPERATIONS: dict[str, tuple[tuple[bool, bool], Change]] = {
    "average pool": (_ANY, lambda y: F.avg_pool2d(y, 2)),
    "overlapping average pool": (_ANY, lambda y: F.avg_pool2d(y, 3, 1)),
    "adaptive average pool": (_ANY, lambda y: F.adaptive_avg_pool2d(y, 3)),
    "adaptive average pool of uneven windows": (_ANY, lambda y: F.adaptive_avg_pool2d(y, (4, 7))),
    "adaptive average pool to one": (_ANY, lambda y: F.adaptive_avg_pool2d(y, 1)),
    "area interpolation": (_ANY, lambda y: F.interpolate(y, 5, mode="area")),
    "mean": (_ANY, lambda y: y.mean((2, 3), keepdim=True)),
    "mean of the last axis": (_ANY, lambda y: y.mean(-1, keepdim=True)),
    "mean without the axes": (_ANY, lambda y: y.mean((2, 3))[..., None, None]),
    "mean of the batch": (_ANY, lambda y: y.mean(0, keepdim=True)),
    "mean of pixels": (_ANY, lambda y: y.flatten(2).mean(2).unflatten(1, (6, 1, 1))),
    "sum over the image": (_NO_SHIFT, lambda y: y.sum((2, 3), keepdim=True)),
    "sum over rows": (_NO_SHIFT, lambda y: y.sum(2, keepdim=True)),
    "nearest": (_ANY, lambda y: F.interpolate(y, scale_factor=2)),
    "nearest, smaller": (_ANY, lambda y: F.interpolate(y, size=5)),
    "nearest exact": (_ANY, lambda y: F.interpolate(y, size=7, mode="nearest-exact")),
    "bilinear": (_ANY, lambda y: F.interpolate(y, scale_factor=1.7, mode="bilinear")),
    "bilinear at the corners": (
        _ANY,
        lambda y: F.interpolate(y, size=(5, 15), mode="bilinear", align_corners=True),
    ),
    "bilinear, antialiased": (
        _ANY,
        lambda y: F.interpolate(y, size=5, mode="bilinear", antialias=True),
    ),
    "bicubic": (_ANY, lambda y: F.interpolate(y, scale_factor=2, mode="bicubic")),
    "bicubic, antialiased": (
        _ANY,
        lambda y: F.interpolate(y, size=(4, 15), mode="bicubic", antialias=True),
    ),
    "max pool": (_POSITIVE, lambda y: F.max_pool2d(y, 2)),
    "padded max pool": (_POSITIVE, lambda y: F.max_pool2d(y, 3, 2, 1)),
    "dilated max pool": (_POSITIVE, lambda y: F.max_pool2d(y, 3, 2, 1, 2, ceil_mode=True)),
    "adaptive max pool": (_POSITIVE, lambda y: F.adaptive_max_pool2d(y, (3, 4))),
    "largest of the image": (_POSITIVE, lambda y: y.amax((2, 3), keepdim=True)),
    "relu": (_NEITHER, F.relu),
    "relu in place": (_NEITHER, _in_place(torch.relu_)),
    "leaky relu": (_NEITHER, lambda y: F.leaky_relu(y, 0.2)),
    "leaky relu in place": (_NEITHER, _in_place(lambda y: F.leaky_relu_(y, 0.3))),
    "leaky relu that folds over": (_NEITHER, lambda y: F.leaky_relu(y, -0.5)),
    "clamp at zero": (_NEITHER, lambda y: y.clamp(min=0)),
    "clamp_min at zero": (_NEITHER, lambda y: y.clamp_min(0)),
    "threshold at zero": (_NEITHER, lambda y: F.threshold(y, 0, 0)),
    "zero padding": (_NO_SHIFT, lambda y: F.pad(y, (1, 2, 0, 1))),
    "padding of ones": ((False, False), lambda y: F.pad(y, (1, 2, 0, 1), value=1.0)),
    "reflection": (_ANY, lambda y: F.pad(y, (1, 2, 2, 1), mode="reflect")),
    "replication": (_ANY, lambda y: F.pad(y, (1, 2, 2, 1), mode="replicate")),
    "circular padding": (_ANY, lambda y: F.pad(y, (1, 2, 2, 1), mode="circular")),
    "zero padding, then a mean": (
        _NO_SHIFT,
        lambda y: F.pad(y, (1, 1)).mean((2, 3), keepdim=True),
    ),
    "zero padding, then a max pool": (_NEITHER, lambda y: F.max_pool2d(F.pad(y, (1, 1)), 2)),
    "times a number": (_ANY, lambda y: y * 3),
    "times a negative number": (_ANY, lambda y: -0.25 * y),
    "over a number": (_ANY, lambda y: y / 7),
    "minus itself": (_NO_SHIFT, lambda y: y - y.flip(3)),
    "negated": (_ANY, lambda y: -y),
    "times a number in place": (_ANY, _in_place(lambda y: y.mul_(5))),
    "twice itself": (_ANY, lambda y: y + y),
    "twice itself in place": (_ANY, _in_place(lambda y: y.add_(y))),
    "itself and a half": (_ANY, lambda y: torch.add(y, y, alpha=0.5)),
    "its mirror image too": (_ANY, lambda y: y + y.flip(3)),
    "itself three times, less one": (_ANY, lambda y: torch.sub(y, y.flip(2), alpha=-2)),
    "reversed difference": (_ANY, lambda y: torch.rsub(y, y.flip(2), alpha=3)),
    "sum of a list": (_ANY, lambda y: sum([y, y, y.flip(2)])),
    "plus its own mean": (_ANY, lambda y: y + y.mean((2, 3), keepdim=True)),
    "minus its own mean": (_NO_SHIFT, lambda y: y - y.mean((2, 3), keepdim=True)),
    "plus zero": (_ANY, lambda y: y + 0),
    "permuted": (_ANY, lambda y: y.movedim(1, -1).contiguous().movedim(-1, 1)),
    "flattened and back": (_ANY, lambda y: y.flatten(1).unflatten(1, (6, *y.shape[2:]))),
    "identity": (_ANY, nn.Identity()),
    "dropout": (_ANY, nn.Dropout2d(0.5).eval()),
    "a chain": (
        _POSITIVE,
        lambda y: F.interpolate(F.avg_pool2d(F.max_pool2d(y * 2, 2), 2), 6, mode="bilinear"),
    ),
}


@pytest.mark.parametrize("name", _OPERATIONS)
def test_shift_and_negative_scale_pass_an_operation_or_do_not(name):
    (shifts, negatives), change = _OPERATIONS[name]
    for shift, negative in itertools.product((False, True), repeat=2):
        found = decided(ready(after(change), shift=shift, negative=negative), *images())
        allowed = (shifts or not shift) and (negatives or not negative)
        if name == "padding of ones":
            assert found.reason is Reason.NOT_AFTER_LINEAR
        elif allowed:
            assert found.hosts == ("conv",), found
        else:
            stopped = {Reason.SHIFT_STOPPED, Reason.PADDED} if shift and not shifts else set()
            turned = {Reason.NEGATIVE_SCALE} if negative and not negatives else set()
            assert found.reason in stopped | turned, found


_NEVER: dict[str, Change] = {
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "clamp elsewhere": lambda y: y.clamp(min=0.1),
    "clamp on both sides": lambda y: y.clamp(0, 6),
    "threshold elsewhere": lambda y: F.threshold(y, 0.0, 1.0),
    "softplus": F.softplus,
    "abs": torch.abs,
    "square": torch.square,
    "lp pool": lambda y: F.lp_pool2d(y, 2, 2),
    "instance norm": F.instance_norm,
    "softmax": lambda y: y.softmax(1),
    "rounded": torch.round,
    "rounded division": lambda y: torch.div(y, 2, rounding_mode="floor"),
    "to half and back": lambda y: y.half().double(),
    "mean in another dtype": lambda y: y.mean((2, 3), keepdim=True, dtype=torch.float32).double(),
    "times zero": lambda y: y * 0,
}


@pytest.mark.parametrize("name", _NEVER)
def test_other_functions_let_nothing_pass(name):
    model = ready(after(_NEVER[name]), shift=name == "times zero")
    plan = bntools.plan_fold(model, images()[0].double())
    assert [d.path for d in plan.kept] == ["bn"]


# Average pooling: every flag, against the weights that its windows really have


def _fits(kernel: Any, padding: int) -> bool:
    smallest = kernel if isinstance(kernel, int) else min(kernel)
    return padding <= smallest / 2


@pytest.mark.parametrize("divisor", [None, 3, 4])
@pytest.mark.parametrize("included", [False, True])
def test_average_pool_lets_a_shift_pass_where_all_windows_weigh_the_same(included, divisor):
    for kernel, stride, padding, ceil in itertools.product(
        (1, 2, 3, (3, 2)), (1, 2, 3), (0, 1), (False, True)
    ):
        if not _fits(kernel, padding):
            continue
        pool = nn.AvgPool2d(
            kernel, stride, padding, ceil_mode=ceil, count_include_pad=included,
            divisor_override=divisor,
        )  # fmt: skip
        weights = [
            pool(torch.ones(1, 1, h, w, dtype=torch.float64)) for h in (7, 8, 9) for w in (7, 8, 9)
        ]
        seen = torch.cat([weight.flatten() for weight in weights])
        even = bool((seen - seen[0]).abs().max() < 1e-12)
        model = Net(lambda m, x: m.bn(m.pool(m.conv(x))), conv=nn.Conv2d(3, 6, 3), pool=pool,
                    bn=nn.BatchNorm2d(6))  # fmt: skip
        examples = images((2, 3, 9, 9), (1, 3, 10, 11), (1, 3, 11, 10))
        found = decided(ready(model), *examples)
        assert (found.hosts == ("conv",)) is even, (pool, found)
        if not even:
            assert found.reason is Reason.SHIFT_STOPPED
            assert decided(ready(model, shift=False, negative=True), *examples).hosts == ("conv",)


@pytest.mark.parametrize("rank", [1, 3])
def test_pooling_and_interpolation_of_other_ranks(rank):
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if rank == 1 else (nn.Conv3d, nn.BatchNorm3d)
    pools = {
        1: (F.avg_pool1d, F.max_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d, "linear"),
        3: (F.avg_pool3d, F.max_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d, "trilinear"),
    }[rank]
    changes: list[Change] = [
        lambda y: pools[0](y, 2, ceil_mode=True),
        lambda y: pools[1](y, 3, 2, 1),
        lambda y: pools[2](y, 3),
        lambda y: pools[3](y, 3),
        lambda y: F.interpolate(y, scale_factor=1.5, mode=pools[4]),
        lambda y: F.interpolate(y, scale_factor=2),
        lambda y: F.interpolate(y, scale_factor=2, mode="nearest-exact"),
    ]
    for change in changes:
        model = Net(lambda m, x, f=change: m.bn(f(m.conv(x))), conv=conv(3, 4, 3), bn=norm(4))
        examples = images((2, 3, *[8] * rank), (1, 3, *[9] * rank))
        assert decided(ready(model), *examples).hosts == ("conv",)
    padded = Net(lambda m, x: m.bn(pools[0](m.conv(x), 2, 2, 1)), conv=conv(3, 4, 3), bn=norm(4))
    assert decided(ready(padded), *images((2, 3, *[8] * rank))).reason is Reason.SHIFT_STOPPED


# Activations


@pytest.mark.parametrize("slopes", [1, 6])
def test_prelu_passes_scales_of_zero_and_more(slopes):
    def model(**kind: bool) -> nn.Module:
        return ready(after(lambda m, y: m.act(y), act=nn.PReLU(slopes)), **kind)

    assert decided(model(shift=False), *images()).hosts == ("conv",)
    assert decided(model(shift=True), *images()).reason is Reason.SHIFT_STOPPED
    assert decided(model(shift=False, negative=True), *images()).reason is Reason.NEGATIVE_SCALE


def test_slope_of_a_prelu_that_is_computed_from_the_data_stops_a_norm():
    model = after(lambda y: torch.prelu(y, y.mean((0, 2, 3))))
    assert decided(ready(model, shift=False), *images()).reason is Reason.NOT_AFTER_LINEAR


def test_scale_of_exactly_zero_passes_an_activation_and_a_max_pool():
    for change in (F.relu, lambda y: F.max_pool2d(y, 2)):
        model = ready(after(change), shift=False)
        model.bn.weight.data[1] = 0.0
        assert decided(model, *images()).hosts == ("conv",)


def test_refusal_names_the_channel_and_the_operation():
    model = ready(after(F.relu), shift=False)
    model.bn.weight.data[4] = -1.0
    model.bn.running_var.fill_(1.0)
    detail = decided(model, *images()).detail
    assert detail.startswith("scale 4 is -1, and relu in the model itself")
    model = ready(after(lambda y: F.avg_pool2d(y, 3, 1, 1)))
    assert "avg_pool2d in the model itself: it counts the zeros" in decided(model, *images()).detail


def test_negative_scale_of_a_channel_that_no_activation_sees_is_no_matter():
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = m.conv(x).chunk(2, 1)
        return m.bn(torch.cat([first.relu(), second], 1))

    model = ready(Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)), shift=False)
    model.bn.weight.data[4] = -1.0
    assert decided(model, *images()).hosts == ("conv",)
    model.bn.weight.data[1] = -1.0
    assert decided(model, *images()).reason is Reason.NEGATIVE_SCALE


def test_shift_of_the_channels_that_no_activation_sees_passes():
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = m.conv(x).chunk(2, 1)
        return m.bn(torch.cat([first.relu(), second], 1))

    model = ready(Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)))
    assert decided(model, *images()).reason is Reason.SHIFT_STOPPED
    model.bn.running_mean[:3] = 0.0
    model.bn.bias.data[:3] = 0.0
    assert decided(model, *images()).hosts == ("conv",)


# Pooling that more than its values are used of


def test_max_pool_of_which_the_indices_are_used_is_kept():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        largest, indices = F.max_pool2d(y, 2, return_indices=True)
        return F.max_unpool2d(m.bn(largest), indices, 2, output_size=y.shape)

    model = Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))
    assert decided(ready(model), *images()).reason is Reason.USED_ELSEWHERE


def test_old_name_of_what_a_view_wrote_does_no_harm_where_nobody_looks():
    def forward(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        z = y.movedim(1, -1)
        z.mul_(2)
        return m.bn(z.movedim(-1, 1)), y.shape[0]

    def looking(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y.movedim(1, -1).mul_(2)
        return m.bn(y)

    parts = {"conv": nn.Conv2d(3, 6, 3), "bn": nn.BatchNorm2d(6)}
    assert decided(ready(Net(forward, **parts)), *images()).hosts == ("conv",)
    found = decided(ready(Net(looking, **parts)), *images())
    assert found.reason is Reason.NOT_AFTER_LINEAR


def test_indices_that_are_dropped_do_no_harm():
    def forward(m: Any, x: Tensor) -> Tensor:
        y, indices = F.max_pool2d(m.conv(x), 2, return_indices=True)
        indices.squeeze(0)
        return m.bn(y)

    model = Net(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))
    assert decided(ready(model), *images()).hosts == ("conv",)


# Sums


def two(forward: Callable[..., Any], second: nn.Module | None = None, **more: Any) -> nn.Module:
    return Net(
        forward,
        a=nn.Conv2d(3, 6, 3),
        b=second or nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
        **more,
    )


_SUMS: dict[str, Callable[..., Any]] = {
    "plain": lambda m, x: m.bn(m.a(x) + m.b(x)),
    "in place": lambda m, x: m.bn(m.a(x).add_(m.b(x))),
    "difference": lambda m, x: m.bn(m.a(x) - m.b(x)),
    "alpha": lambda m, x: m.bn(torch.add(m.a(x), m.b(x), alpha=-0.3)),
    "subtracted in place": lambda m, x: m.bn(m.a(x).sub_(m.b(x), alpha=2)),
    "rsub": lambda m, x: m.bn(torch.rsub(m.a(x), m.b(x), alpha=2)),
    "scaled": lambda m, x: m.bn(0.2 * m.a(x) + m.b(x) / 3),
    "through pools": lambda m, x: m.bn(F.avg_pool2d(m.a(x), 2) + F.max_pool2d(m.b(x), 2)),
    "one of them once per image": lambda m, x: m.bn(m.a(x) + m.b(x).mean((2, 3), keepdim=True)),
    "one of them twice": lambda m, x: m.bn(m.a(x) + (y := m.b(x)) + y),
    "one of them cancels": lambda m, x: m.bn(m.a(x) - (y := m.b(x)) + m.a(x.flip(3)) + y.flip(3)),
    "of sums": lambda m, x: m.bn((m.a(x) + m.b(x)) - 2 * (m.a(x.flip(2)) + m.b(x))),
    "sum list": lambda m, x: m.bn(sum([m.a(x), m.b(x)])),
    "sum and concatenation": lambda m, x: m.bn(torch.cat([m.a(x) + (y := m.b(x)), y], 3)),
    "concatenation of both, then a sum": lambda m, x: m.bn(
        (z := torch.cat([m.a(x), m.b(x)], 1))[:, :6] + 3 * z[:, 6:]
    ),
    "first without a shift": lambda m, x: m.bn(F.avg_pool2d(m.a(x), 3, 1, 1) + m.b(x)),
    "a sum and a relu": lambda m, x: m.bn(m.a(x).relu() + m.b(x)),
}


@pytest.mark.parametrize("name", _SUMS)
def test_norm_after_a_sum_folds_into_all_that_is_added(name):
    found = decided(ready(two(_SUMS[name])), *images())
    assert sorted(found.hosts) == ["a", "b"], found


def test_only_one_layer_of_a_sum_takes_the_shift():
    model = ready(two(lambda m, x: m.bn(m.a(x) + m.b(x)), nn.Conv2d(3, 6, 3, bias=False)))
    assert sorted(decided(model, *images()).hosts) == ["a", "b"]
    folded = bntools.fold(model, images()[0].double()).model
    assert folded.b.bias is None


def test_shift_of_a_sum_goes_where_there_is_a_bias():
    """The first host's call has no bias and cannot get one."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(F.conv2d(x, m.a.weight) + m.b(x))

    assert sorted(decided(ready(two(forward)), *images()).hosts) == ["a", "b"]

    def neither(m: Any, x: Tensor) -> Tensor:
        return m.bn(F.conv2d(x, m.a.weight) + F.conv2d(x, m.b.weight))

    assert decided(ready(two(neither)), *images()).reason is Reason.BIAS_NOT_USED
    assert sorted(decided(ready(two(neither), shift=False), *images()).hosts) == ["a", "b"]


_KEPT_SUMS: dict[str, tuple[tuple[Reason, ...], Callable[..., Any]]] = {
    "of a host and the input": (
        (Reason.NOT_AFTER_LINEAR,),
        lambda m, x: m.bn(m.a(x) + x[:, :1, 2:, 2:] + m.b(x)),
    ),
    "of which an operand is returned": (
        (Reason.RETURNED,),
        lambda m, x: (m.bn((y := m.a(x)) + m.b(x)), y),
    ),
    "of which an operand is used": (
        (Reason.USED_ELSEWHERE,),
        lambda m, x: m.bn((y := m.a(x)) + m.b(x)) + y.tanh(),
    ),
    "that is used": (
        (Reason.USED_ELSEWHERE,),
        lambda m, x: m.bn(y := m.a(x) + m.b(x)) + y.tanh(),
    ),
    "of which an operand is seen by another norm": (
        (Reason.USED_ELSEWHERE,),
        lambda m, x: m.bn((y := m.a(x)) + m.b(x)) + m.other(y),
    ),
    "of channels in another order": (
        (Reason.CHANNEL_MISMATCH,),
        lambda m, x: m.bn((y := m.a(x)) + y.flip(1) + m.b(x)),
    ),
    "of another channel axis": (
        (Reason.CHANNEL_MISMATCH,),
        lambda m, x: m.bn(m.a(x)[:, :, :6, :6] + m.b(x)[:, :, :6, :6].transpose(1, 2)),
    ),
    "over the channels": (
        (Reason.CHANNEL_MISMATCH,),
        lambda m, x: m.bn(m.a(x) + m.b(x).mean(1, keepdim=True)),
    ),
    "that cancels": (
        (Reason.SHIFT_STOPPED,),
        lambda m, x: m.bn((y := m.a(x)) - y + (z := m.b(x)) - z),
    ),
    "with a padded operand of ones": (
        (Reason.NOT_AFTER_LINEAR, Reason.CHANNEL_MISMATCH),
        lambda m, x: m.bn(m.a(x) + F.pad(m.b(x)[:, :, 1:], (0, 0, 1, 0), value=1.0)),
    ),
    "written through an alias": (
        (Reason.USED_ELSEWHERE, Reason.NOT_AFTER_LINEAR, Reason.RETURNED),
        lambda m, x: (v := (y := m.a(x)).view(-1), v.add_(1), m.bn(y + m.b(x)))[2],
    ),
    "into an alias": (
        (Reason.USED_ELSEWHERE, Reason.NOT_AFTER_LINEAR, Reason.RETURNED),
        lambda m, x: (v := (y := m.a(x)).view(y.shape), v.add_(m.b(x)), m.bn(y))[2],
    ),
}


@pytest.mark.parametrize("name", _KEPT_SUMS)
def test_norm_after_a_sum_is_kept(name):
    reasons, forward = _KEPT_SUMS[name]
    model = ready(two(forward, other=nn.BatchNorm2d(6)))
    sizes = [(2, 3, 8, 8), (1, 3, 8, 8)]
    assert decided(model, *images(*sizes)).reason in reasons


def test_layer_that_is_summed_with_itself_at_other_places_takes_its_part_of_the_shift():
    model = Net(
        lambda m, x: m.bn(m.a(x) + m.a(x.flip(3))), a=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)
    )
    assert decided(ready(model), *images()).hosts == ("a",)
    less = Net(
        lambda m, x: m.bn(m.a(x) - m.a(x.flip(3))), a=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)
    )
    assert decided(ready(less), *images()).reason is Reason.SHIFT_STOPPED
    assert decided(ready(less, shift=False), *images()).hosts == ("a",)


def test_sum_of_zeros_and_a_host_is_the_host():
    model = two(lambda m, x: m.bn(m.a(x) + torch.zeros_like(y := m.b(x)) + y))
    assert sorted(decided(ready(model), *images()).hosts) == ["a", "b"]


# Parameters that are added


def placed(shape: tuple[int, ...], forward: Callable[..., Any]) -> nn.Module:
    return Net(
        forward,
        conv=nn.Conv2d(3, 6, 3, padding=1),
        place=nn.Parameter(torch.randn(shape)),
        bn=nn.BatchNorm2d(6),
    )


_PLACES: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "whole": ((1, 6, 8, 8), lambda m, x: m.bn(m.conv(x) + m.place)),
    "without the batch": ((6, 8, 8), lambda m, x: m.bn(m.conv(x) + m.place)),
    "subtracted": ((6, 8, 1), lambda m, x: m.bn(m.place - m.conv(x))),
    "rows": ((6, 64), lambda m, x: m.bn(m.conv(x) + m.place.view(6, 8, 8))),
    "pixels by channels": (
        (64, 6),
        lambda m, x: m.bn((m.conv(x).flatten(2).mT + m.place).mT.unflatten(2, (8, 8))),
    ),
    "pooled": ((1, 6, 8, 8), lambda m, x: m.bn(F.avg_pool2d(m.conv(x) + m.place, 2))),
}


@pytest.mark.parametrize("name", _PLACES)
def test_parameter_that_is_added_is_scaled(name):
    shape, forward = _PLACES[name]
    found = decided(ready(placed(shape, forward)), *images((2, 3, 8, 8), (1, 3, 8, 8)))
    assert sorted(found.hosts) == ["conv", "place"], found


_KEPT_PLACES: dict[str, tuple[Reason, tuple[int, ...], Callable[..., Any]]] = {
    "shared by the channels": (
        Reason.CHANNEL_MISMATCH,
        (8, 8),
        lambda m, x: m.bn(m.conv(x) + m.place),
    ),
    "used elsewhere": (
        Reason.TIED_WEIGHT,
        (6, 8, 8),
        lambda m, x: m.bn(m.conv(x) + m.place) * m.place,
    ),
    "computed": (
        Reason.NOT_AFTER_LINEAR,
        (6, 8, 8),
        lambda m, x: m.bn(m.conv(x) + m.place.exp()),
    ),
    "channels last of three": (
        Reason.CHANNEL_MISMATCH,
        (8, 8, 6),
        lambda m, x: m.bn((m.conv(x).movedim(1, -1) + m.place).movedim(-1, 1)),
    ),
}


@pytest.mark.parametrize("name", _KEPT_PLACES)
def test_parameter_that_cannot_be_scaled_keeps_the_norm(name):
    reason, shape, forward = _KEPT_PLACES[name]
    found = decided(ready(placed(shape, forward)), *images((2, 3, 8, 8), (1, 3, 8, 8)))
    assert found.reason is reason, found


def test_parameter_that_is_added_under_two_names_keeps_the_norm():
    model = placed((6, 8, 8), lambda m, x: m.bn(m.conv(x) + m.place))
    model.conv.register_parameter("twin", model.place)
    assert decided(ready(model), *images((2, 3, 8, 8))).reason is Reason.TIED_WEIGHT


# Channels stay channels


def test_pooling_over_channels_mixes_them():
    for change in (
        lambda y: y.mean(1, keepdim=True).expand_as(y),
        lambda y: F.avg_pool3d(y.unsqueeze(1), (2, 1, 1)).squeeze(1).repeat(1, 2, 1, 1),
        lambda y: F.max_pool3d(y.unsqueeze(1), (3, 1, 1), (1, 1, 1), (1, 0, 0)).squeeze(1),
        lambda y: (
            F.adaptive_avg_pool2d(y.transpose(1, 2), (3, 5)).transpose(1, 2).repeat(1, 2, 1, 1)
        ),
        lambda y: F.interpolate(y.transpose(1, 2), (6, 5), mode="bilinear").transpose(1, 2),
    ):
        found = decided(ready(after(change)), *images())
        assert found.reason is Reason.CHANNEL_MISMATCH, found


def test_pooling_along_another_axis_than_the_image_keeps_the_channels():
    model = after(lambda y: F.avg_pool2d(y.movedim(1, -1), (2, 1)).movedim(-1, 1))
    assert decided(ready(model), *images()).hosts == ("conv",)


def test_norm_of_vectors_after_a_pool_and_a_flatten_folds_into_the_conv():
    model = Net(
        lambda m, x: m.bn(F.dropout(m.conv(x).mean((2, 3)).flatten(1), 0.5, m.training)),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm1d(6),
    )
    assert decided(ready(model), *images()).hosts == ("conv",)


def test_norm_of_vectors_that_come_from_several_pixels_each_is_kept():
    model = Net(
        lambda m, x: m.bn(F.adaptive_avg_pool2d(m.conv(x), (1, 2)).flatten(1)),
        conv=nn.Conv2d(3, 3, 3),
        bn=nn.BatchNorm1d(6),
    )
    assert decided(ready(model), *images()).reason is Reason.CHANNEL_MISMATCH


def test_norm_after_two_others_on_the_way_folds_with_them():
    model = Net(
        lambda m, x: m.bn(F.avg_pool2d(m.first(m.a(x)), 2) + m.second(F.max_pool2d(m.b(x), 2))),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(3, 6, 3),
        first=nn.BatchNorm2d(6),
        second=nn.BatchNorm2d(6),
        bn=nn.BatchNorm2d(6),
    )
    model = ready(model)
    assert sorted(decided(model, *images()).hosts) == ["a", "b"]
    assert len(bntools.fold(model, images()[0].double()).report.folds) == 3


def test_other_use_of_channels_beside_those_of_the_norm_does_no_harm():
    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.a(x) + m.b(x)
        return m.bn(F.max_pool2d(z[:, :4], 2)).sum() + z[:, 4:].tanh().sum()

    model = Net(forward, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(4))
    assert sorted(decided(ready(model), *images()).hosts) == ["a", "b"]

    def touching(m: Any, x: Tensor) -> Tensor:
        z = m.a(x) + (y := m.b(x))
        return m.bn(F.max_pool2d(z[:, :4], 2)).sum() + y[:, 3:].tanh().sum()

    model = Net(touching, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(4))
    assert decided(ready(model), *images()).reason is Reason.USED_ELSEWHERE


def test_this_comparison_would_see_a_wrong_gain():
    """Dividing by nine or by four makes a difference that the limit of 1e-10 shows."""
    model = ready(after(lambda y: F.avg_pool2d(y, 3, 1, divisor_override=4)))
    plan = bntools.plan_fold(model, images()[0].double())
    host = plan.compiled.folds[0].hosts[0]
    host.affine.shift.mul_(4 / 9)
    folded = fold_copy(model, plan.compiled.folds).model
    x = images()[0].double()
    assert difference(outputs(folded, x), outputs(model, x)) > 1e-4
    assert math.isfinite(float(host.affine.shift.sum()))
