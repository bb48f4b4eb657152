"""Norms before convolutions that pad: folded by padding with what the norm maps to zero."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from randomise import difference, outputs
from test_forward import IMAGE, checked, first, hosts, made, refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo import Net

import bntools
from bntools.errors import SurgeryError
from bntools.norms import ChannelPadConv2d, pad_channels
from bntools.recipe import Edit, Recipe, apply_edits
from bntools.report import Latency, Reason
from bntools.surgery.folding import fold_copy

CONVS: dict[str, tuple[int, dict[str, Any]]] = {
    "one pixel": (2, {"kernel_size": 1, "padding": 1}),
    "three": (2, {"kernel_size": 3, "padding": 1}),
    "uneven": (2, {"kernel_size": (3, 5), "padding": (1, 2)}),
    "one axis": (2, {"kernel_size": 3, "padding": (0, 1)}),
    "same": (2, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    "strided": (2, {"kernel_size": 3, "padding": 2, "stride": 2, "bias": False}),
    "grouped": (2, {"kernel_size": 3, "padding": 1, "groups": 2, "bias": False}),
    "depthwise": (2, {"kernel_size": 3, "padding": 1, "groups": 4}),
    "signal": (1, {"kernel_size": 3, "padding": 1}),
    "volume": (3, {"kernel_size": 3, "padding": (1, 0, 2)}),
}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def padded(**options: Any) -> nn.Sequential:
    return made(first(nn.Conv2d(4, 8, 3, padding=1, **options)))


def pads(model: nn.Module, x: Any = IMAGE) -> Any:
    return checked(model, x, pad_forward=True)


@pytest.mark.parametrize("name", CONVS)
def test_padded_convolution_absorbs_a_norm_when_asked(name):
    rank, options = CONVS[name]
    model = made(nn.Sequential(_NORMS[rank](4), _CONVS[rank](4, 8, **options), nn.Tanh()))
    x = torch.randn(2, 4, *[6] * rank, generator=torch.Generator().manual_seed(1))
    assert refused(checked(model, x), "0") is Reason.PADDED
    plan = pads(model, x)
    assert hosts(plan, "0") == ("1",)
    folded = fold_copy(model, plan.compiled.folds).model
    assert isinstance(folded[1], _CONVS[rank])
    expected = {f"1.{key}" for key in model[1].state_dict()}
    assert set(folded.state_dict()) == expected | {"1.bias", "1.pad_value"}


def test_norms_on_all_sides_of_a_padded_convolution_fold():
    model = made(first(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)))
    plan = pads(model)
    assert [(d.path, d.forward) for d in plan.folds] == [("0", True), ("1", True), ("3", False)]
    result = bntools.fold(model, IMAGE.double(), pad_forward=True)
    assert result.report.check
    assert result.report.check.rolled_back == ()


def test_concat_pads_each_part_with_its_own_values():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.conv(torch.cat([m.a(x), x.tanh(), m.b(x.exp())], 1))

    parts = {"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)}
    model = made(Net(forward, **parts, conv=nn.Conv2d(12, 5, 3, padding=1)))
    plan = pads(model)
    assert hosts(plan, "a") == hosts(plan, "b") == ("conv",)
    folded = fold_copy(model, plan.compiled.folds).model
    assert folded.conv.pad_value[4:8].tolist() == [0.0] * 4
    assert bool((folded.conv.pad_value[:4] != 0).all())


def test_convolutions_of_which_only_some_pad_absorb_together():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x)
        return m.a(y)[:, :, 1:-1, 1:-1] + m.b(y)

    parts = {"a": nn.Conv2d(4, 3, 3, padding=1), "b": nn.Conv2d(4, 3, 3)}
    assert set(hosts(pads(made(Net(forward, bn=nn.BatchNorm2d(4), **parts))), "bn")) == {"a", "b"}


def test_scale_without_shift_needs_no_other_padding():
    model = made(first(nn.Conv2d(4, 8, 3, padding=1)), shifted=False)
    folded = fold_copy(model, pads(model).compiled.folds).model
    assert type(folded[1]) is nn.Conv2d


def test_images_without_a_batch_are_padded_as_well():
    conv = pad_channels(nn.Conv2d(4, 8, 3, padding=1), [1, 1])
    torch.nn.init.normal_(conv.pad_value)
    x = torch.randn(4, 5, 5)
    assert torch.allclose(conv(x), conv(x[None])[0])


# Refused


def test_scale_of_zero_maps_no_value_to_zero():
    model = padded()
    with torch.no_grad():
        model[0].weight[2] = 0.0
    assert refused(pads(model), "0") is Reason.PAD_VALUE


def test_channel_that_is_zero_throughout_pads_with_zero():
    model = padded()
    with torch.no_grad():
        model[0].weight[2] = model[0].bias[2] = 0.0
    plan = pads(model)
    assert hosts(plan, "0") == ("1",)
    assert float(fold_copy(model, plan.compiled.folds).model[1].pad_value[2]) == 0.0


@pytest.mark.parametrize(
    ("dtype", "scale", "folds"),
    [
        (torch.float32, 1e-3, True),
        (torch.float32, 1e-30, True),
        (torch.float32, 1e-39, False),  # the folded weight is subnormal, and set to zero
        (torch.float16, 1e-2, True),
        (torch.float16, 1e-6, False),  # weights are subnormal
        (torch.bfloat16, 1e-6, True),
    ],
    ids=str,
)
def test_pad_that_cannot_be_held_exactly_is_refused(dtype, scale, folds):
    """The criterion: what the rounded taps give for the rounded pad, to two roundings."""
    model = padded()
    with torch.no_grad():
        model[0].running_var.fill_(1.0 - model[0].eps)
        model[0].weight.fill_(scale)
        model[0].bias.fill_(0.5)
        model[0].running_mean.zero_()
    model = model.to(dtype)
    plan = bntools.plan_fold(model, IMAGE.to(dtype), pad_forward=True)
    assert (len(plan.folds) == 1) is folds
    if not folds:
        assert refused(plan, "0") is Reason.PAD_VALUE
    elif dtype is torch.float32:
        result = bntools.fold(model, IMAGE, plan=plan)
        assert result.report.check.rolled_back == ()


def test_pad_value_beyond_half_precision_is_refused():
    model = padded().half()
    with torch.no_grad():
        model[0].running_mean.fill_(60000.0)
        model[0].bias.fill_(100.0)
        model[0].weight.fill_(-0.01)
        model[0].running_var.fill_(1.0)
        model[1].weight.mul_(0.1)
    plan = bntools.plan_fold(model, IMAGE.half(), pad_forward=True)
    assert refused(plan, "0") is Reason.PAD_VALUE


def functional(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(m.bn(x), m.conv.weight, m.conv.bias, padding=1)


class Own(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        return F.conv2d(input, self.weight, self.bias, padding=1)


@pytest.mark.parametrize(
    "model",
    [
        Net(functional, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 5, 3)),
        Net(lambda m, x: m.conv(m.bn(x)), bn=nn.BatchNorm2d(4), conv=Own(4, 5, 3)),
        Net(
            lambda m, x: m.conv(m.pad(m.bn(x))),
            bn=nn.BatchNorm2d(4), pad=nn.ZeroPad2d(1), conv=nn.Conv2d(4, 5, 3),
        ),
        Net(
            lambda m, x: m.conv(m.bn(x)),
            bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 5, 2, padding="same"),
        ),
    ],
    ids=["functional", "own forward", "padded before", "uneven same"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_that_is_not_the_layers_own_is_refused(model):
    plan = pads(made(model))
    (decision,) = plan.decisions
    assert Reason.PADDED in (decision.reason, decision.forward_reason)


def test_parametrised_convolution_is_refused_as_backward():
    model = first(nn.Conv2d(4, 5, 3, padding=1))
    parametrizations.weight_norm(model[1])
    assert refused(pads(made(model)), "0") is Reason.COMPUTED_WEIGHT


# What comes of it


def test_result_says_whether_it_became_faster():
    model = padded().float()
    result = bntools.fold(model, IMAGE, pad_forward=True)
    latency = result.report.latency
    assert latency.runs >= 5
    assert min(latency.before_ms, latency.after_ms, latency.ratio) > 0
    assert latency.faster is (latency.ratio > 1.03)
    assert latency.summary() in str(result.report)
    told = json.loads(json.dumps(result.to_dict()))["latency"]
    assert told["runs"] == latency.runs
    assert bntools.fold(model, IMAGE).report.latency is None


@pytest.mark.parametrize(
    ("after", "faster", "says"),
    [(5.0, True, "2.00 times as fast"), (9.9, False, "as fast as without"),
     (20.0, False, "0.50 times as fast, which is slower")],
)  # fmt: skip
def test_sentence_about_the_speed_says_what_was_measured(after, faster, says):
    latency = Latency(10.0, after, 10.0 / after, runs=7, threads=1, inputs="1x3x8x8 float32")
    assert latency.faster is faster
    told = f"(10.00 -> {after:.2f} ms; median of 7 runs on 1x3x8x8 float32, cpu, 1 thread)"
    assert latency.summary() == f"{says} {told}"


def test_result_is_saved_loaded_and_exported(tmp_path):
    model = padded().float()
    result = bntools.fold(model, IMAGE, pad_forward=True)
    bntools.save(result, tmp_path / "small.pt")
    loaded = bntools.load(tmp_path / "small.pt")
    assert type(loaded[1]) is ChannelPadConv2d
    assert torch.equal(loaded(IMAGE), result.model(IMAGE))
    edits = Recipe.from_dict(json.loads(json.dumps(result.recipe.to_dict())))
    rebuilt = apply_edits(copy.deepcopy(model), edits)
    rebuilt.load_state_dict(result.model.state_dict())
    assert torch.equal(rebuilt(IMAGE), result.model(IMAGE))


@pytest.mark.slow
def test_result_exports_to_onnx_with_any_batch(tmp_path):
    pytest.importorskip("onnxruntime")
    model = padded().float()
    folded = bntools.fold(model, IMAGE, pad_forward=True).model
    report = bntools.export_onnx(folded, IMAGE, tmp_path / "small.onnx").report
    assert report
    assert bntools.verify(model, tmp_path / "small.onnx", IMAGE)


def test_argument_stays_and_the_copy_keeps_memory_format_and_grad_flags():
    model = padded().float().to(memory_format=torch.channels_last)
    model[1].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    result = bntools.fold(model, IMAGE, pad_forward=True)
    assert type(model[1]) is nn.Conv2d
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert not result.model[1].weight.requires_grad
    assert "pad_value" in dict(result.model[1].named_buffers())


@pytest.mark.parametrize(
    "padding", [[1, 2], [2, 2], [1], "11", [1.0, 1.0], [True, True], None, [10**9, 1]]
)
def test_edit_with_another_padding_is_refused(padding):
    edit = Edit("pad-channels", "1", options={"padding": padding})
    with pytest.raises(SurgeryError, match="Cannot pad-channels 1"):
        apply_edits(padded(), Recipe((edit,)))


def test_edit_of_another_layer_is_refused():
    edit = Edit("pad-channels", "0", options={"padding": [1, 1]})
    with pytest.raises(SurgeryError, match="expected a convolution that pads"):
        apply_edits(padded(), Recipe((edit,)))


def test_kept_originals_undo_the_padding():
    model = padded().float()
    result = bntools.fold(model, IMAGE, pad_forward=True, keep_originals=True)
    back = bntools.unfold(result.model).model
    assert type(back[1]) is nn.Conv2d
    assert back.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(back(IMAGE), model(IMAGE))


def test_pad_of_a_folded_model_is_seen_by_the_next_plan():
    """Its border is no zero: a norm before it stays, and the reason is true."""
    model = padded().float()
    folded = bntools.fold(model, IMAGE, pad_forward=True).model
    again = nn.Sequential(made(nn.BatchNorm2d(4)).float(), folded).eval()
    plan = bntools.plan_fold(again, IMAGE, pad_forward=True)
    assert refused(plan, "0") is Reason.CHANNEL_MISMATCH


def test_wrong_pad_is_caught_by_the_proof(monkeypatch):
    from bntools.planning import folds

    real = folds.pad_values
    monkeypatch.setattr(folds, "pad_values", lambda affine: real(affine) * 1.001)
    result = bntools.fold(padded(), IMAGE.double(), pad_forward=True)
    assert result.report.check.rolled_back == ("0",)
    assert result.report.latency is None


def test_difference_of_the_padded_fold_is_rounding():
    model = padded().float()
    result = bntools.fold(model, IMAGE, pad_forward=True)
    error = difference(outputs(result.model, IMAGE), outputs(model, IMAGE))
    assert error < 1e-5
    assert not math.isnan(error)
