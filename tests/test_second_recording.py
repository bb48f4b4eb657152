"""What one recording cannot tell: other batches, other sizes, other surroundings."""

from __future__ import annotations

import pytest
import torch
from test_redteam import conv_and_norm, linear_and_norm, right_without_check
from torch import nn
from zoo import Net, rand

import bntools
from bntools.report import Reason


def kept(plan: bntools.Plan) -> list[Reason | None]:
    return [decision.reason for decision in plan.kept]


def test_axis_that_is_the_channel_in_a_batch_of_one_only_is_kept():
    model = linear_and_norm(lambda m, x: m.bn(m.fc(x).squeeze(0)))
    plan = right_without_check(model, rand(1, 4, 4)(), rand(3, 4, 4)())
    assert kept(plan) == [Reason.DATA_DEPENDENT]


def test_view_that_keeps_the_channel_at_one_pixel_only_is_kept():
    model = conv_and_norm(lambda m, x: m.bn(m.conv(x).view(-1, 6)[..., None, None]))
    plan = right_without_check(model, rand(2, 3, 3, 3)(), rand(2, 3, 5, 5)())
    assert kept(plan) == [Reason.DATA_DEPENDENT]


def test_reshape_that_is_a_transpose_at_length_one_only_is_kept():
    model = linear_and_norm(lambda m, x: m.bn(m.fc(x).reshape(x.shape[0], 4, -1)))
    plan = right_without_check(model, rand(2, 1, 4)(), rand(2, 3, 4)())
    assert kept(plan) == [Reason.DATA_DEPENDENT]


def test_columns_with_vocabularies_of_their_own_can_be_recorded_again():
    model = Net(
        lambda m, x: m.bn(m.fc(m.small(x[:, 0]) + m.large(x[:, 1]))),
        small=nn.Embedding(2, 4),
        large=nn.Embedding(900, 4),
        fc=nn.Linear(4, 4),
        bn=nn.BatchNorm1d(4),
    ).eval()
    result = bntools.fold(model, torch.tensor([[0, 800], [1, 3], [0, 7]]))
    assert [decision.path for decision in result.report.folds] == ["bn"]


def test_numbers_read_from_the_data_are_told():
    model = conv_and_norm(lambda m, x: m.bn(m.conv(x)) * float(x.mean().item() > 0)).eval()
    plan = bntools.plan_fold(model, rand(2, 3, 8, 8)())
    assert "reads numbers from tensors" in plan.warnings[0]
    quiet = conv_and_norm(lambda m, x: m.bn(m.conv(x))).eval()
    assert bntools.plan_fold(quiet, rand(2, 3, 8, 8)()).warnings == ()


@pytest.mark.parametrize("surroundings", [torch.inference_mode, lambda: torch.device("meta")])
def test_surroundings_of_the_caller_do_not_matter(surroundings):
    model = conv_and_norm(lambda m, x: m.bn(m.conv(x))).eval()
    inputs = rand(2, 3, 8, 8)()
    with surroundings():
        result = bntools.fold(model, inputs)
    assert len(result.report.folds) == 1
    assert not any(p.is_inference() or p.is_meta for p in result.model.parameters())


def test_random_state_of_the_caller_stays():
    model = conv_and_norm(lambda m, x: m.bn(m.conv(x))).eval()
    before = torch.random.get_rng_state()
    bntools.fold(model)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("wrap", [torch.Tensor.to_sparse, torch.conj_physical])
def test_outputs_that_are_not_plain_can_be_judged(wrap):
    model = conv_and_norm(lambda m, x: wrap(m.bn(m.conv(x)))).eval()
    assert bntools.fold(model, rand(1, 3, 8, 8)()).report.check


def test_order_of_many_values_may_differ_where_rounding_decides():
    model = conv_and_norm(lambda m, x: m.bn(m.conv(x)).flatten().topk(2000)).eval()
    result = bntools.fold(model, rand(2, 3, 34, 34)())
    assert result.report.check
    assert not result.report.check.rolled_back
