"""Borders that are written into slices, kernels that are computed, stacks that are added up."""

from __future__ import annotations

import pytest
import torch
from branch_models import PublishedDiverseBranch, Sum, branches, conv_bn
from randomise import difference, outputs
from test_merging import is_same, layer_count, left_reasons, merged
from torch import nn
from torch.nn import functional as F

import bntools
from bntools.errors import BNToolsError
from bntools.report import Reason

MAPS = (2, 6, 9, 11)
PUBLISHED = {
    "plain": {},
    "with stride": {"stride": 2},
    "in groups": {"groups": 2},
    "5x5": {"kernel": 5},
    "1x1": {"kernel": 1},
    "depthwise": {"groups": 6},
}


def learned(model: nn.Module) -> nn.Module:
    """The kernels that start as zeros are that no more."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_diverse_branch_block_becomes_one_convolution(name):
    """Borders of what norms give for zeros, a kernel plus a fixed one, a pooling branch."""
    model = learned(PublishedDiverseBranch(6, 6, **PUBLISHED[name]))
    result = merged(model, MAPS)
    assert layer_count(result.model) == 1
    assert not list(result.model.avg.parameters())
    assert {d.action.value for d in result.report.decisions} <= {"fold", "merge"}
    assert result.report.merging.left == ()
    assert result.report.check.float64.outputs[0].error < 1e-14
    assert is_same(model, result, (1, 6, 13, 8))


def test_a_net_of_published_blocks_merges_block_by_block():
    """Each is rewritten by itself; no convolution of one has to do with those of another."""
    model = nn.Sequential(
        learned(PublishedDiverseBranch(6, 8, stride=2)), learned(PublishedDiverseBranch(8, 8))
    )
    result = merged(model, MAPS)
    assert [row.rewritten for row in result.report.merging.merges] == ["0", "1"]
    assert layer_count(result.model) == 2
    assert is_same(model, result, MAPS)


class Written(nn.Module):
    """A norm, and what `write` makes of it."""

    def __init__(self, write) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.write = write

    def forward(self, x):
        return self.write(self, x)


def three() -> dict[str, nn.Module]:
    return {
        "a": nn.Conv2d(6, 6, 3, padding=1),
        "b": nn.Conv2d(6, 6, 1, bias=False),
        "c": nn.Conv2d(6, 6, 3),
    }


def bordered(write) -> nn.Module:
    """A 3x3 beside a 1x1, norm, border and 3x3; `write` makes the border of what the norm gives."""
    layers = three()
    return Sum(lambda s, x: s.a(x) + s.c(s.n(s.b(x))), **layers, n=Written(write))


def values_of(norm: nn.BatchNorm2d) -> torch.Tensor:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return norm.bias - norm.running_mean * scale


def _by_fill(s, u):
    out = F.pad(s.norm(u), [1] * 4, value=3.0)
    for axis in (2, 3):
        for end in (0, -1):
            out.select(axis, end)[...] = values_of(s.norm).view(1, -1, 1)
    return out


def _nested(s, u):
    """A slice of a slice, rows first; corners are written twice."""
    v, out = values_of(s.norm).view(-1, 1, 1), F.pad(s.norm(u), (1, 1, 1, 1))
    out[..., :1, :][:, :, :, :] = v
    out[..., -1, :] = v[..., 0]
    out[:, :, :, 0].copy_(v[..., 0].expand_as(out[:, :, :, 0]))
    out[..., -1:] = v
    return out


def _rows_only(s, u):
    out = F.pad(s.norm(u), (0, 0, 1, 1))
    out[:, :, :1] = out[:, :, -1:] = values_of(s.norm).view(1, -1, 1, 1)
    return F.pad(out, (1, 1)) * 1


WRITTEN = {"select": _by_fill, "slices of slices": _nested}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_border_is_known_however_it_is_written(name):
    """Rows and columns by index, by slice, by copy_, over another number."""
    model = bordered(WRITTEN[name])
    result = merged(model, MAPS)
    assert result.report.merging.left == ()
    assert layer_count(result.model) == 1
    assert is_same(model, result, (1, 6, 8, 10))


def _wrong_value(s, u):
    out = F.pad(s.norm(u), [1] * 4)
    v = (values_of(s.norm) * (1 + 1e-7)).view(1, -1, 1, 1)
    out[:, :, :1] = out[:, :, -1:] = v
    out[..., :1] = out[..., -1:] = v
    return out


def _one_side_missing(s, u):
    out = F.pad(s.norm(u), [1] * 4)
    v = values_of(s.norm).view(1, -1, 1, 1)
    out[:, :, :1] = out[:, :, -1:] = v
    out[..., :1] = v
    return out


def _too_wide(s, u):
    out = F.pad(s.norm(u), [1] * 4)
    v = values_of(s.norm).view(1, -1, 1, 1)
    out[:, :, :2] = out[:, :, -1:] = v
    out[..., :1] = out[..., -1:] = v
    return out


def _of_the_input(s, u):
    out = F.pad(s.norm(u), [1] * 4)
    out[:, :, :1] = u.mean()
    return out


def _seen_before(s, u):
    out = F.pad(s.norm(u), [1] * 4)
    early = out * 2
    v = values_of(s.norm).view(1, -1, 1, 1)
    out[:, :, :1] = out[:, :, -1:] = v
    out[..., :1] = out[..., -1:] = v
    return out + early


def _no_padding(s, u):
    out = s.norm(F.pad(u, [1] * 4))
    out[:, :, :1] = 0.0
    return out


def _a_gradient(s, u):
    out = F.pad(s.norm(u), [1] * 4)
    out[:, :, 0, 1:7] = s.norm.weight
    return out


def _of_a_range(s, u):
    out = F.pad(s.norm(u), [1] * 4)
    out[:, :, :1] = torch.arange(float(out.shape[-1]))
    return out


STAYS = {
    "another value": (_wrong_value, Reason.PADDED_BETWEEN),
    "a side that is missing": (_one_side_missing, Reason.PADDED_BETWEEN),
    "a border over the map": (_too_wide, Reason.NOT_REWRITABLE),
    "values of the input": (_of_the_input, None),
    "padding that is seen before": (_seen_before, Reason.USED_ELSEWHERE),
    "no padding": (_no_padding, Reason.NOT_REWRITABLE),
    "more than one value a channel": (_a_gradient, Reason.PADDED_BETWEEN),
    "values that are made on the way": (_of_a_range, Reason.NOT_REWRITABLE),
    "rows written, columns zero": (_rows_only, Reason.PADDED_BETWEEN),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_the_border_of_a_norm_stays_and_is_right(name):
    """One part in 10^7 is another number; what is seen too early is no border."""
    write, reason = STAYS[name]
    model = bordered(write)
    result = merged(model, MAPS)
    assert result.report.merging.merges == ()
    assert left_reasons(result) == ([] if reason is None else [reason])
    assert is_same(model, result, MAPS)


def test_a_bias_before_the_norm_moves_what_it_gives_for_zeros():
    """The border of the norm alone is another number then."""
    model = bordered(_nested)
    model.b = nn.Conv2d(6, 6, 1)
    result = merged(model, MAPS)
    assert left_reasons(result) == [Reason.PADDED_BETWEEN]
    assert is_same(model, result, MAPS)


def test_a_border_in_the_forward_that_would_change_says_so():
    """torch.fx traces no write to an index: only those in submodules can go."""

    def forward(s, x):
        return s.a(x) + s.c(_by_fill(s, s.b(x)))

    model = Sum(forward, **three(), norm=nn.BatchNorm2d(6))
    result = merged(model, MAPS)
    assert left_reasons(result) == [Reason.NOT_REWRITABLE]
    assert "torch.fx cannot trace" in result.report.merging.left[0].detail
    assert is_same(model, result, MAPS)


class AsksItsNorm(nn.Module):
    """Reads what its norm holds, for nothing: without the norm its forward would fail."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        assert self.norm.weight.sum().isfinite().shape == ()
        return self.norm(x)


def test_a_norm_that_alone_cannot_go_merges_with_the_code_that_asks_for_it():
    """Its fold is undone; the sum takes it along, and nothing asks for it any more."""
    model = Sum(lambda s, x: s.a(x) + s.n(s.b(x)), **branches(), n=AsksItsNorm())
    result = merged(model, MAPS)
    assert result.report.merging.left == ()
    assert result.report.decisions[0].action.value == "merge"
    assert result.report.check.rolled_back == ()
    assert layer_count(result.model) == 1
    assert is_same(model, result, MAPS)


@pytest.mark.parametrize("shape", [(2, 6, 13), (2, 6, 6)])
def test_one_number_for_all_channels_merges_in_every_rank(shape):
    """Whichever axis a recording takes it for: here no layer comes before, or after."""

    def forward(s, x):
        return s.a(x) + F.avg_pool1d(x, 1) * s.gamma

    model = Sum(forward, a=nn.Conv1d(6, 6, 3, padding=1))
    model.gamma = nn.Parameter(torch.tensor([1.7]))
    result = merged(model, shape)
    assert result.report.merging.left == ()
    assert len(result.report.merging.merges) == 1
    assert is_same(model, result, shape)


def test_a_norm_that_has_taken_up_another_affine_merges_to_the_last_bit():
    """What it holds then is rounded; the kernel comes from the numbers of the original."""
    model = Sum(lambda s, x: s.a(x) + s.g(s.n(x)), **branches(), n=nn.BatchNorm2d(6))
    model.g = NormedScale()
    result = merged(model, MAPS)
    assert result.report.merging.left == ()
    assert result.report.check.float64.outputs[0].error < 1e-14
    assert is_same(model, result, MAPS)


class NormedScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x):
        return self.gamma * x


def test_a_kernel_that_other_code_reads_stays():
    """`a.weight` takes part in another sum: it may not change."""

    def forward(s, x):
        return F.conv2d(x, s.a.weight * 2) + s.b(x) + s.a.weight.mean()

    model = Sum(forward, a=nn.Conv2d(6, 6, 1, bias=False), b=nn.Conv2d(6, 6, 1))
    result = merged(model, MAPS)
    assert left_reasons(result) == [Reason.TIED_WEIGHT]
    assert is_same(model, result, MAPS)


def test_a_kernel_times_a_number_merges():
    """Weight scaling as in equalised learning rates."""

    def forward(s, x):
        return F.conv2d(x, s.a.weight * 2) + s.b(x)

    model = Sum(forward, a=nn.Conv2d(6, 6, 1, bias=False), b=nn.Conv2d(6, 6, 3, padding=1))
    result = merged(model, MAPS)
    assert layer_count(result.model) == 2  # what is not called is left as it is
    assert len(result.report.merging.merges) == 1
    assert is_same(model, result, MAPS)


def _stacked(s, x):
    return torch.stack([s.a(x), s.b(x), x]).sum(0)


def _averaged(s, x):
    return torch.stack((s.a(x), s.b(x), s.b(x)), dim=-1).mean(-1)


def _listed(s, x):
    return sum([s.a(x), s.b(x), x])


STACKS = {"a stack": _stacked, "the mean of a stack": _averaged, "a list": _listed}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_that_is_added_up_is_a_sum(name):
    model = Sum(STACKS[name], **branches())
    result = merged(model)
    assert layer_count(result.model) == 1
    assert result.report.merging.left == ()
    assert is_same(model, result)


def _kept(s, x):
    stack = torch.stack([s.a(x), s.b(x), x])
    return stack.sum(0), stack


@pytest.mark.parametrize(
    "forward",
    [
        _kept,
        lambda s, x: torch.stack([s.a(x), s.b(x), x]).sum(1),
        lambda s, x: torch.stack([s.a(x), s.b(x), x]).sum((0, 1)),
        lambda s, x: torch.stack([s.a(x), s.b(x), x]).sum(0, keepdim=True),
        lambda s, x: torch.stack([s.a(x), s.b(x), x]).amax(0),
    ],
)
def test_other_stacks_are_left(forward):
    model = Sum(forward, **branches())
    result = merged(model)
    assert result.report.merging.merges == ()
    assert is_same(model, result)


class Added(nn.Module):
    """A parameter among the branches, added or multiplied."""

    def __init__(self, shape, forward) -> None:
        super().__init__()
        for name, layer in branches().items():
            self.add_module(name, layer)
        self.constant = nn.Parameter(torch.rand(shape) + 0.5)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


CONSTANTS = {
    "added": lambda s, x: s.a(x) + s.constant + s.b(x),
    "taken away": lambda s, x: s.a(x) - (s.constant - s.b(x)),
    "multiplied": lambda s, x: s.a(x) * s.constant + s.b(x),
    "divided by": lambda s, x: s.a(x) / s.constant + s.b(x),
}


@pytest.mark.parametrize("how", CONSTANTS)
@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1,), ()])
def test_constants_of_a_channel_merge(how, shape):
    """One value for each channel, or one for all."""
    model = Added(shape, CONSTANTS[how])
    result = merged(model)
    assert result.report.merging.left == ()
    assert layer_count(result.model) == 1
    assert is_same(model, result)


@pytest.mark.parametrize("how", CONSTANTS)
@pytest.mark.parametrize("shape", [(6, 9, 11), (9, 11), (1, 1, 1, 11), (6, 1, 11)])
def test_constants_of_places_are_refused_by_name(how, shape):
    """They vary from place to place, and say so."""
    model = Added(shape, CONSTANTS[how])
    result = merged(model)
    assert left_reasons(result) == [Reason.CHANNEL_MISMATCH]
    said = result.report.merging.left[0].detail
    assert "none of one value per channel" in said or "another axis than" in said
    assert layer_count(result.model) == 2
    assert is_same(model, result)


POOLS = {
    "1d": (nn.Conv1d(6, 6, 3, padding=1), nn.AvgPool1d(3, 1, 1), (2, 6, 13)),
    "1d with stride": (nn.Conv1d(6, 6, 4, 2, 1), nn.AvgPool1d(4, 2, 1), (2, 6, 14)),
    "1d unpadded": (nn.Conv1d(6, 6, 3), nn.AvgPool1d(3, 1, 0, False, False), (2, 6, 14)),
    "3d": (nn.Conv3d(6, 6, 3, padding=1), nn.AvgPool3d(3, 1, 1), (2, 6, 7, 6, 5)),
    "3d with stride": (nn.Conv3d(6, 6, 3, 2, 1), nn.AvgPool3d(3, 2, 1), (1, 6, 7, 6, 5)),
    "3d with a divisor": (
        nn.Conv3d(6, 6, (1, 3, 3), padding=(0, 1, 1)),
        nn.AvgPool3d((1, 3, 3), 1, (0, 1, 1), divisor_override=4),
        (1, 6, 7, 6, 5),
    ),
}


@pytest.mark.parametrize("name", POOLS)
def test_average_pooling_merges_in_every_rank(name):
    """A 1d pooling runs as one of rows."""
    layer, pool, shape = POOLS[name]
    model = Sum(lambda s, x: s.a(x) + s.p(x), a=layer, p=pool)
    result = merged(model, shape)
    assert result.report.merging.left == ()
    assert layer_count(result.model) == 1
    assert is_same(model, result, shape)


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        (nn.AvgPool1d(3, 1, 1, count_include_pad=False), "count_include_pad"),
        (nn.AvgPool1d(3, 1, 1, ceil_mode=True), "ceil_mode"),
    ],
)
def test_1d_pooling_that_is_no_filter_stays(pool, said):
    model = Sum(lambda s, x: s.a(x) + s.p(x), a=nn.Conv1d(6, 6, 3, padding=1), p=pool)
    result = merged(model, (2, 6, 13))
    assert left_reasons(result) == [Reason.OTHER_GEOMETRY]
    assert said in result.report.merging.left[0].detail
    assert is_same(model, result, (2, 6, 13))


def test_other_rows_are_no_pooling_of_signals():
    """`unsqueeze(1)` makes channels of a batch: the shapes alone look alike."""

    def forward(s, x):
        return s.a(x) + F.avg_pool2d(x.unsqueeze(0), (1, 3), 1, (0, 1)).squeeze(0)

    model = Sum(forward, a=nn.Conv1d(1, 1, 3, padding=1))
    result = merged(model, (1, 1, 9))
    assert result.report.merging.merges == ()
    assert is_same(model, result, (1, 1, 9))


def test_a_published_block_is_unfolded_and_replays(tmp_path):
    """The originals come back to the bit; the recipe fits a fresh block."""
    model = learned(PublishedDiverseBranch(6, 6))
    result = merged(model, MAPS, keep_originals=True)
    back = bntools.unfold(result.model)
    back = getattr(back, "model", back)
    x = torch.randn(MAPS)
    assert difference(outputs(back, x), outputs(model, x)) == 0
    plain = merged(model, MAPS)
    path = tmp_path / "block.pt"
    bntools.save(plain, path)
    names = ("PublishedDiverseBranch", "NormAndBorder", "FixedPlusLearned")
    loaded = bntools.load(path, allow=[f"branch_models.{name}" for name in names])
    assert difference(outputs(loaded, x), outputs(plain.model, x)) == 0


def test_a_recipe_of_a_published_block_does_not_fit_another():
    """A block whose border is another one has another forward: nothing merges there."""
    recipe = merged(learned(PublishedDiverseBranch(6, 6)), MAPS).recipe
    other = nn.Sequential(conv_bn(6, 6, 3, padding=1)).eval()
    with pytest.raises(BNToolsError, match=r"Cannot|There is no"):
        bntools.recipe.apply_edits(other, recipe)
