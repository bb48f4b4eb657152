"""Weights go into an architecture without a second copy, where that is plain copying."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bntools import checkpoints
from bntools.checkpoints import build_with_weights


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4, bias=False))
        nn.init.trunc_normal_(self[2].weight)


class Tied(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self[2].weight


class Drawing(Plain):
    """Has random numbers that no file holds, drawn after those that files hold."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__()
        self.register_buffer("noise", torch.randn(3), persistent=False)


class Doubling(Plain):
    """Changes what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self._double)

    def _double(self, _, state, prefix, *__):
        state[f"{prefix}0.bias"] = state[f"{prefix}0.bias"] * 2


def filled(cls: type[nn.Module], state, monkeypatch) -> nn.Module:
    monkeypatch.setattr(checkpoints, "build", lambda *_: cls().eval())
    return build_with_weights("tests:net", state).model


def random_state(model: nn.Module):
    torch.manual_seed(1)
    return {
        k: torch.rand_like(v) if v.is_floating_point() else v + 7
        for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize("cls", [Plain, Tied, Drawing, Doubling])
def test_a_filled_architecture_is_what_load_state_dict_makes_of_it(cls, monkeypatch):
    """With its ties, its flags, what it draws and what it does to what it loads."""
    state = random_state(cls())
    if cls is Tied:
        state["again.weight"] = state["2.weight"]
    expected = cls().eval()
    expected.load_state_dict({k: v.clone() for k, v in state.items()})
    found = filled(cls, state, monkeypatch)
    wanted, got = expected.state_dict(keep_vars=True), found.state_dict(keep_vars=True)
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name])
        assert type(tensor) is type(got[name])
        assert tensor.requires_grad == got[name].requires_grad
    if cls is Tied:
        assert found.again.weight is found[2].weight
    if cls is Drawing:
        assert torch.equal(found.noise, expected.noise)


def test_the_memory_of_the_file_is_taken_where_it_may_be(monkeypatch):
    """Not what is tied, of another layout, a part of something larger, or changed on the way."""
    state = random_state(Plain())
    taken = filled(Plain, state, monkeypatch)
    assert taken[0].weight.data_ptr() == state["0.weight"].data_ptr()
    parts = {**state, "2.weight": torch.rand(5, 4)[:4], "0.weight": state["0.weight"].half()}
    copied = filled(Plain, parts, monkeypatch)
    assert copied[2].weight.data_ptr() != parts["2.weight"].data_ptr()
    assert copied[0].weight.dtype == torch.float32
    doubled = filled(Doubling, random_state(Doubling()), monkeypatch)
    assert not {t.data_ptr() for t in doubled.state_dict().values()} & {
        t.data_ptr() for t in state.values()
    }


def test_parameters_are_not_drawn_only_to_be_replaced():
    """The memory of what is drawn would be touched."""
    weight, square = nn.Parameter(torch.zeros(9)), nn.Parameter(torch.zeros(3, 3))
    with checkpoints._Undrawn():
        nn.init.uniform_(weight)
        nn.init.normal_(weight)
        nn.init.xavier_normal_(square)
        nn.init.kaiming_uniform_(square)
        other = torch.zeros(9).uniform_()
    assert not weight.any()
    assert not square.any()
    assert other.any()
