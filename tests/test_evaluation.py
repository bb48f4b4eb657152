"""Accuracy and metrics: what is counted, in which mode, and every mistake."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bntools
from bntools.errors import DataError, LoadError


class Answers(nn.Module):
    """Gives its input back in another form."""

    def __init__(self, form=lambda x: x):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)


RIGHT = (torch.eye(4), torch.tensor([0, 1, 2, 0]))


def test_the_share_of_right_answers_over_all_batches():
    batches = [RIGHT, (torch.eye(4)[:2], torch.tensor([0, 1]))]
    assert bntools.accuracy(Answers(), batches) == 5 / 6
    assert bntools.Accuracy(batches)(Answers()) == 5 / 6


@pytest.mark.parametrize(
    "form",
    [
        lambda x: (x, None),
        lambda x: [x],
        lambda x: {"out": x, "aux": -x},
        lambda x: SimpleNamespace(logits=x),
    ],
    ids=["tuple", "list", "dict", "logits"],
)
def test_the_first_output_counts(form):
    assert bntools.accuracy(Answers(form), [RIGHT]) == 0.75


def test_every_position_of_dense_labels_counts_but_those_below_zero():
    outputs = torch.zeros(1, 3, 2, 2)
    outputs[0, 1] = 1.0
    labels = torch.tensor([[[1, 1], [2, -1]]])
    assert bntools.accuracy(Answers(), [(outputs, labels)]) == 2 / 3


def test_a_model_runs_in_its_own_dtype_and_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.9)).to(torch.bfloat16)
    model[2].eval()
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    first = bntools.accuracy(model, [RIGHT])
    assert bntools.accuracy(model, [RIGHT]) == first
    assert [m.training for m in model.modules()] == flags == [True, True, True, False]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_mode_flags_come_back_when_the_model_fails():
    def fail(x):
        raise RuntimeError("no luck today")

    model = Answers(fail).train()
    with pytest.raises(RuntimeError, match="no luck today"):
        bntools.accuracy(model, [RIGHT])
    assert model.training


MISTAKES = {
    "no batch": ([], "there is no batch"),
    "no label": ([torch.eye(4)], "there are no labels. Give class folders"),
    "all left out": ([(torch.eye(2), torch.tensor([-1, -1]))], "no sample has a label"),
    "one-hot": ([(torch.eye(4), torch.eye(4))], "the labels are float32 of shape 4x4"),
    "too few": ([(torch.eye(4), torch.tensor([1, 2]))], r"gives 4x4, and the labels are int64 of"),
    "too large": (
        [(torch.eye(2), torch.tensor([0, 5]))],
        "there is a class 5, and the model has 2",
    ),
    "no classes": ([(torch.zeros(3), torch.zeros(3).long())], "the model gives 3, and the labels"),
}


@pytest.mark.parametrize(("batches", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_cannot_be_evaluated_is_explained(batches, message):
    with pytest.raises(DataError, match=message):
        bntools.accuracy(Answers(), batches)


@pytest.mark.parametrize("output", [None, "text", {}, ()])
def test_an_output_that_is_no_tensor_is_explained(output):
    with pytest.raises(DataError, match=r"accuracy takes a tensor \(N, classes\).*--metric"):
        bntools.accuracy(Answers(lambda x: output), [RIGHT])


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.py").write_text(
        "def alone(model): return 1 if not model.training else 0\n"
        "def on(model, batches): return len(list(batches))\n"
        "def optional(model, k=3): return k\n"
        "def text(model): return 'high'\n"
        "class Inner:\n"
        "    @staticmethod\n"
        "    def score(model): return 7\n"
        "number = 3\n"
    )
    yield
    sys.modules.pop("scores", None)


def test_a_metric_takes_a_model_and_maybe_batches(metrics):
    model = Answers().train()
    assert bntools.read_metric("scores:alone")(model) == 1
    assert model.training
    assert bntools.read_metric("scores:on", [1, 2])(model) == 2
    assert bntools.read_metric("scores:on")(model, [1, 2, 3]) == 3
    assert bntools.read_metric("scores:optional", [1])(model) == 3
    assert bntools.read_metric("scores:Inner.score")(model) == 7


def test_a_metric_that_is_none_is_explained(metrics):
    with pytest.raises(LoadError, match="Cannot use scores:number: it is no function"):
        bntools.read_metric("scores:number")
    with pytest.raises(DataError, match="scores:text: it raised ValueError: could not convert"):
        bntools.read_metric("scores:text")(Answers())
