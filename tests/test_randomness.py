"""Models that draw random numbers are refused, and the module that does is named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import bntools
from bntools.errors import InputError, NondeterministicError

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Stubborn(nn.Dropout):
    """A dropout that stays in training mode."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


class Functional(nn.Module):
    """Draws in its own forward, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.dropout(self.first(x), 0.5, True))


class Sampling(nn.Module):
    """Draws at the very end, where no module follows."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def stochastic() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), StochasticDepth(0.5, "row"), nn.Linear(4, 2)).eval()
    model[1].train()
    return model


RANDOM = {
    "dropout": (nn.Sequential(nn.Linear(4, 4), Stubborn(), nn.Linear(4, 2)).eval(),
                r"1 \(Stubborn, in training mode\)"),
    "stochastic depth": (stochastic(), r"1 \(StochasticDepth, in training"),
    "functional": (nn.Sequential(nn.ReLU(), Functional()).eval(), r"1 \(Functional\)"),
    "the model itself": (Sampling().eval(), r"the model itself \(Sampling\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_module_that_draws_is_named(kind, side):
    model, name = RANDOM[kind]
    calm = nn.Sequential(nn.Linear(4, 2)).eval()
    pair = (model, calm) if side == "reference" else (calm, model)
    if kind == "the model itself" and side == "candidate":
        pair = nn.Identity(), model
    with pytest.raises(NondeterministicError, match=name) as caught:
        bntools.verify(*pair, X)
    assert f"two forwards of the {side} on the same input differ" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_looking_for_it_leaves_no_hook_and_no_trace():
    model = RANDOM["functional"][0]
    before = torch.get_rng_state().tolist()
    with pytest.raises(NondeterministicError, match="Functional"):
        bntools.verify(model, copy.deepcopy(model), X)
    assert torch.get_rng_state().tolist() == before
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_random_candidate_is_refused_and_not_called_unequal():
    calm = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)).eval()
    noisy = copy.deepcopy(calm)
    noisy[1] = Stubborn()
    with pytest.raises(NondeterministicError, match=r"1 \(Stubborn, in training mode\)"):
        bntools.verify(calm, noisy, X)


class Giving(nn.Module):
    """Gives whatever a test makes of a linear layer."""

    def __init__(self, give) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.give = give

    def forward(self, x: Tensor):
        return self.give(self.linear(x))


def cyclic(y: Tensor) -> dict:
    out = {"y": y}
    out["again"] = [out]
    return out


def deep(y: Tensor) -> list:
    for _ in range(5000):
        y = [y]
    return y


@pytest.mark.parametrize(
    ("unmade", "says"),
    [(nn.Linear(4, 2, device="meta"), "meta device"), (nn.LazyLinear(2), "lazy parameters")],
    ids=["meta", "lazy"],
)
@pytest.mark.parametrize("side", [0, 1])
def test_model_without_numbers_is_an_error(unmade, says, side):
    pair = [nn.Linear(4, 2), nn.Linear(4, 2)]
    pair[side] = unmade
    with pytest.raises(InputError, match=says):
        bntools.verify(*pair, X)


@pytest.mark.parametrize(
    ("give", "says"),
    [(cyclic, r"output\.again\[0\]: the output contains itself"), (deep, "nested more than 200")],
)
@pytest.mark.parametrize("side", [0, 1])
def test_output_without_an_end_is_an_error(give, says, side):
    pair = [Giving(lambda y: y).eval(), Giving(lambda y: y).eval()]
    pair[side] = Giving(give).eval()
    with pytest.raises(InputError, match=says):
        bntools.verify(*pair, X)


def test_same_value_twice_is_no_cycle():
    model = Giving(lambda y: {"a": [y], "b": {"c": [y]}}).eval()
    shared = [torch.ones(1)]
    model.give = lambda y: (y, shared, shared)
    assert bntools.verify(model, copy.deepcopy(model), X)
