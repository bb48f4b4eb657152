"""Why a layer folds or stays, told op by op, from Python and the command line."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from test_forward import IMAGE, first, made
from torch import Tensor, nn
from zoo import Net

import bntools
from bntools.errors import PlanError
from bntools.report import Explanation, Plan


def explained(model: nn.Module, path: str, x: Tensor = IMAGE, **options: Any) -> Explanation:
    model = made(model)
    return bntools.plan_fold(model, x.double(), **options).explain(path)


def flat(explanation: Explanation) -> str:
    """The text, whatever the width."""
    return " ".join(str(explanation).split())


def told(explanation: Explanation, direction: str) -> list[tuple[str, str, str]]:
    way = next(way for way in explanation.ways if way.direction == direction)
    return [(step.operation, step.module, step.role) for step in way.steps]


def test_forward_fold_is_told_from_the_norm_to_its_host():
    model = first(nn.AvgPool2d(2, divisor_override=3), nn.PixelUnshuffle(2), nn.Conv2d(16, 2, 1))
    explanation = explained(model, "0")
    assert explanation.summary() == "0 folds forward into 3"
    steps = told(explanation, "forward")
    assert steps[0] == ("avg_pool2d", "1", "passes")
    assert steps[-1] == ("convolution", "3", "absorbs")
    text = flat(explanation)
    assert "a shift times 1.33333" in text
    assert "the scale goes into 3.weight, for each input channel" in text
    assert "the shift goes into 3.bias" in text


def test_backward_fold_is_told_from_the_norm_to_all_of_its_hosts():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.drop(torch.cat([m.a(x), m.b(x)], 1)))

    parts = {"a": nn.Conv2d(4, 2, 3), "b": nn.Conv2d(4, 3, 3, bias=False)}
    explanation = explained(Net(forward, **parts, drop=nn.Dropout(), bn=nn.BatchNorm2d(5)), "bn")
    assert told(explanation, "backward") == [
        ("cat", "", "passes"),
        ("convolution", "b", "absorbs"),
        ("convolution", "a", "absorbs"),
    ]
    assert "b.bias, which it gains" in flat(explanation)


def test_norm_in_between_is_told_with_where_it_went():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    steps = explained(model, "2").ways[0].steps
    assert [(s.operation, s.module, s.role) for s in steps] == [
        ("norm layer", "1", "passes"),
        ("convolution", "0", "absorbs"),
    ]
    assert steps[0].says == "it is gone, into 0"


def test_layer_that_stays_is_told_in_both_directions():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.GELU(), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.Sigmoid(),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    explanation = explained(model, "3")
    assert explanation.summary() == "3 is kept: not-after-linear"
    assert told(explanation, "backward") == [("avg_pool2d", "2", "passes"), ("gelu", "1", "stops")]
    assert told(explanation, "forward") == [("sigmoid", "4", "stops")]
    assert "gelu in 1" in flat(explanation)
    assert "sigmoid in 4" in flat(explanation)


def test_what_passes_a_scale_alone_is_where_a_shift_ends():
    explanation = explained(first(nn.LeakyReLU(), nn.Conv2d(4, 2, 1)), "0")
    way = explanation.ways[-1]
    assert way.reason is not None
    (stop, host) = way.steps
    assert (stop.role, host.role) == ("stops", "is reached")
    assert stop.says.endswith("here the fold ends")


def test_input_of_the_model_and_padding_are_named():
    explanation = explained(first(nn.Conv2d(4, 2, 3, padding=1)), "0")
    backward, forward = explanation.ways
    assert backward.steps[0].operation == "input of the model"
    assert (forward.reason.value, forward.detail) == (
        "padded",
        "1 pads with zeros, which the shift would have to reach as well (--pad-forward)",
    )
    padded = explained(first(nn.Conv2d(4, 2, 3, padding=1)), "0", pad_forward=True)
    assert "pads with the value that the norm maps to 0" in flat(padded)


def test_layer_that_was_not_looked_at_has_its_sentence_alone():
    explanation = explained(first(nn.Conv2d(4, 2, 3)), "0", skip="*")
    assert explanation.ways == ()
    assert "left out" in flat(explanation)


def test_calls_of_a_layer_are_counted():
    model = Net(
        lambda m, x: m.conv(torch.cat([m.bn(x), m.bn(x)], 1)),
        bn=nn.BatchNorm2d(4), conv=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    explanation = explained(model, "bn")
    assert explanation.calls == 2
    assert "it is called 2 times" in flat(explanation)


def test_registered_host_and_other_layers_are_told():
    explanation = explained(first(nn.Conv2d(4, 4, 1, groups=2)), "0")
    assert "of its 2 groups" in flat(explanation)


def test_unknown_layer_is_an_error():
    plan = bntools.plan_fold(made(first(nn.Conv2d(4, 2, 1))), IMAGE.double())
    with pytest.raises(PlanError, match=r"Cannot explain 'nope': .* \(0\)"):
        plan.explain("nope")


def test_plan_that_is_data_alone_tells_its_sentences():
    plan = bntools.plan_fold(made(first(nn.Conv2d(4, 2, 3, padding=1))), IMAGE.double())
    data = pickle.loads(pickle.dumps(Plan(plan.decisions, plan.inputs)))
    explanation = data.explain("0")
    assert explanation.ways == ()
    assert "forward: padded: 1 pads with zeros" in flat(explanation)
    assert "backward: it follows an input" in flat(explanation)


def test_every_layer_of_the_zoo_can_be_explained():
    """Whatever the model: no exception, JSON data, and a step that absorbs for every fold."""
    import zoo_folds  # noqa: F401 (fills the zoo)
    import zoo_keeps  # noqa: F401 (fills the zoo)
    from zoo import CASES

    for case in [case for case in CASES.values() if case.available][::3]:
        plan = bntools.plan_fold(case.prepare(), case.example())
        for decision in plan.decisions:
            explanation = plan.explain(decision.path)
            assert json.loads(json.dumps(explanation.to_dict()))["summary"]
            assert str(explanation)
            if decision in plan.folds:
                roles = [step.role for step in explanation.ways[0].steps]
                assert "absorbs" in roles, (case.name, decision.path, str(explanation))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(made(first(nn.Conv2d(4, 2, 3), nn.Tanh(), nn.BatchNorm2d(2))).float(), path)
    return path


def run(*args: Any) -> Any:
    return CliRunner().invoke(program, [str(arg) for arg in args])


def test_command_explains_the_layers_that_it_is_asked_for(file):
    result = run("inspect", file, "--input-shape", "2x4x8x8", "--explain", "0")
    assert result.exit_code == 0
    assert "0 folds forward into 1" in result.stdout
    assert "tanh" not in result.stdout
    both = run("inspect", file, "--input-shape", "2x4x8x8", "--explain", "*", "--json")
    document = json.loads(both.stdout)
    assert [e["decision"]["path"] for e in document["explanations"]] == ["0", "3"]
    assert document["explanations"][1]["ways"][0]["steps"][0]["operation"] == "tanh"
    assert document["findings"] is not None


def test_command_refuses_a_layer_that_is_none(file):
    result = run("inspect", file, "--input-shape", "2x4x8x8", "--explain", "layer9")
    assert result.exit_code == 3
    assert "Cannot explain 'layer9': no norm layer of the plan has such a path" in result.stderr


def test_command_pads_forward_and_says_what_it_brought(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(made(first(nn.Conv2d(4, 2, 3, padding=1))).float(), path)
    kept = run("fold", path, "--input-shape", "2x4x8x8", "--dry-run")
    assert "(--pad-forward)" in kept.stdout
    result = run("fold", path, "--input-shape", "2x4x8x8", "--pad-forward")
    assert result.exit_code == 0
    assert "folded 1 of 1 norm layers" in result.stdout
    assert "with its padding forward the model is" in result.stdout
    assert (tmp_path / "model.folded.pt").exists()
