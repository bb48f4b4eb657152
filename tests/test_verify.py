"""`verify`: what is equal passes, what is not does not, and neither model is touched."""

from __future__ import annotations

import copy
import functools
import json
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from randomise import norms, randomise, settle
from torch import Tensor, nn

import bntools
from bntools.errors import InputError, NondeterministicError, PlanError
from bntools.report import Equivalence
from bntools.tolerance import relative_error

SAMPLE = Path(__file__).parent.parent / "samples" / "digits_cnn.pt"
NETWORKS = ["digits", "resnet18", "mobilenet_v3_small"]
every_network = pytest.mark.parametrize("name", NETWORKS)
BF16, FP16 = torch.bfloat16, torch.float16


@functools.cache
def _network(name: str) -> tuple[nn.Module, Tensor]:
    random = torch.Generator().manual_seed(5)
    if name == "digits":
        return bntools.load(str(SAMPLE)), torch.rand((4, 1, 8, 8), generator=random)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = getattr(torchvision.models, name)(weights=None)
    x = torch.randn((2, 3, 64, 64), generator=random)
    model.eval()
    randomise(model, 5)
    settle(model, x)
    return model, x


def network(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, a copy of it to harm, and inputs."""
    model, x = _network(name)
    return model, copy.deepcopy(model), x


# Equal models


@every_network
def test_network_equals_itself_without_any_error_of_its_own(name):
    model, twin, x = network(name)
    result = bntools.verify(model, twin, x)
    assert result
    assert result.truth == "float64"
    assert result.worst.error == result.worst.reference_error > 0
    assert bntools.verify(model, model, x)


@every_network
def test_network_equals_its_fold(name):
    model, _, x = network(name)
    folded = bntools.fold(model, x).model
    assert len(norms(folded)) < len(norms(model))
    assert bntools.verify(model, folded, x)
    assert bntools.verify(folded, model, x)


@every_network
def test_network_equals_itself_in_float64(name):
    model, twin, x = network(name)
    result = bntools.verify(model, twin.double(), x)
    assert result
    assert result.worst.error == 0


@every_network
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_candidate_in_half_the_precision_is_judged_by_that_precision(name, dtype):
    model, twin, x = network(name)
    result = bntools.verify(model, twin.to(dtype), x)
    assert result
    assert result.worst.limit == pytest.approx(8 * torch.finfo(dtype).eps)
    last = list(norms(twin))[-1]
    twin.get_submodule(last).bias.data.add_(1.0)
    assert not bntools.verify(model, twin, x)


def test_reference_in_half_precision_is_judged_by_its_own_error():
    model, twin, x = network("digits")
    model = copy.deepcopy(model).to(BF16)
    result = bntools.verify(model, twin.to(BF16), x)
    assert result
    assert result.dtype == "bfloat16"
    assert result.worst.limit > 4 * result.worst.reference_error * 0.99


# Planted faults


def places(name: str) -> list[str]:
    """All norm layers of the small network; the first, middle and last ones of large ones."""
    paths = list(norms(_network(name)[0]))
    return paths if len(paths) < 12 else [paths[0], paths[len(paths) // 2], paths[-1]]


SITES = [(name, path) for name in NETWORKS for path in places(name)]
every_site = pytest.mark.parametrize(("name", "path"), SITES, ids=lambda value: value)


@every_site
def test_wrong_eps_in_one_norm_is_caught(name, path):
    model, twin, x = network(name)
    norm = twin.get_submodule(path)
    norm.eps = 1e-3 if norm.eps < 1e-4 else 1e-5
    assert not bntools.verify(model, twin, x)


@every_site
def test_dropped_norm_is_caught(name, path):
    model, twin, x = network(name)
    parent, _, child = path.rpartition(".")
    setattr(twin.get_submodule(parent), child, nn.Identity())
    assert not bntools.verify(model, twin, x)


@every_site
@torch.no_grad()
def test_two_swapped_channels_are_caught(name, path):
    model, twin, x = network(name)
    norm = twin.get_submodule(path)
    order = list(range(norm.num_features))
    order[0], order[-1] = order[-1], order[0]
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.copy_(tensor[order])
    assert not bntools.verify(model, twin, x)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_weights_of_one_layer_rounded_to_bfloat16_are_caught(name):
    model, twin, x = network(name)
    layers = [m for m in twin.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        exact = layer.weight.clone()
        layer.weight.copy_(exact.to(BF16))
        assert not bntools.verify(model, twin, x)
        layer.weight.copy_(exact)
    assert bntools.verify(model, twin, x)


@every_network
@torch.no_grad()
def test_small_fault_in_one_channel_is_caught_wherever_it_matters(name):
    """A shift of a thousandth of the output's deviation; what it changes is measured in float64."""
    model, twin, x = network(name)
    limit = bntools.verify(model, twin, x).worst.limit
    truth = copy.deepcopy(model).double()(x.double())
    mattered = 0
    for path in places(name)[-3:]:
        norm = twin.get_submodule(path)
        for channel in (0, norm.num_features // 2, norm.num_features - 1):
            before = norm.bias.clone()
            norm.bias[channel] += 1e-3 * float(norm.weight[channel].abs())
            change = relative_error(copy.deepcopy(twin).double()(x.double()), truth)
            if change >= 10 * limit:
                mattered += 1
                assert not bntools.verify(model, twin, x), f"{path}[{channel}]: {change:.1g}"
            norm.bias.copy_(before)
    assert mattered >= 3


# Outputs of every kind


class Giving(nn.Module):
    """A linear layer, and whatever a test makes of what it gives."""

    def __init__(self, give: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.give = give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.linear(x))


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def giving(give: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Giving(give).eval()


def judged(reference: Any, candidate: Any) -> Equivalence:
    return bntools.verify(giving(reference), giving(candidate), X)


def with_one(value: float) -> Any:
    return lambda y: y.masked_fill(torch.arange(6) == 2, value)


@dataclass
class Answer:
    logits: Tensor
    note: str = "a note"
    loss: Tensor | None = None


class Slotted:
    """Holds a tensor where `vars` does not show it."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


Pair = namedtuple("Pair", "first second")

KINDS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, y + 1),
    "list": lambda y: [y, [y + 1]],
    "dict": lambda y: {"a": y, "b": {"c": y + 1}},
    "named tuple": lambda y: Pair(y, y + 1),
    "dataclass": Answer,
    "nested": lambda y: {"all": [Answer(y), (y + 1, None)]},
    "complex": lambda y: torch.complex(y, y + 1),
    "scalar": lambda y: y.sum(),
    "list of dicts": lambda y: [{"boxes": row} for row in y],
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_outputs_of_every_kind_are_compared(kind):
    give = KINDS[kind]
    assert judged(give, give)
    assert not judged(give, lambda y: give(y + 1e-4))


def test_fault_in_any_part_of_the_output_is_caught_and_named():
    result = judged(KINDS["nested"], lambda y: {"all": [Answer(y), (y + 1.001, None)]})
    assert not result
    passed = {o.name: o.passed for o in result.outputs}
    names = ["output.all[0].logits", "output.all[0].note", "output.all[1][0]"]
    assert passed == dict(zip(names, [True, True, False], strict=True))
    assert result.worst.name == "output.all[1][0]"


@pytest.mark.parametrize(
    "wrap",
    [Slotted, lambda y: float(y.sum()), lambda y: int(y.sum() * 1e3), lambda y: str(y.tolist())],
    ids=["slots", "float", "int", "text"],
)
def test_fault_beside_a_right_tensor_is_never_overlooked(wrap):
    """Equal only where all was compared: what cannot be compared must not pass for equal."""
    assert not judged(lambda y: (y, wrap(y)), lambda y: (y, wrap(y + 1)))


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (lambda y: {"a": {"b": y}, "a.b": y}, lambda y: {"a": {"b": y + 1}, "a.b": y}),
        (lambda y: {1: y, "1": y}, lambda y: {1: y + 1, "1": y}),
        (lambda y: {"a": [y], "a[0]": y}, lambda y: {"a": [y + 1], "a[0]": y}),
    ],
    ids=["dots", "numbers", "brackets"],
)
def test_outputs_whose_names_read_alike_are_all_compared(reference, candidate):
    assert judged(reference, reference)
    assert not judged(reference, candidate)


class Spectral(nn.Module):
    """Has a complex parameter, like Fourier neural operators."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.mix = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(self.linear(x)) @ self.mix)


def test_models_with_complex_parameters_are_judged_in_double_precision():
    model = Spectral().eval()
    result = bntools.verify(model, copy.deepcopy(model), X)
    assert result, str(result)
    assert result.truth == "float64"
    other = copy.deepcopy(model)
    other.mix.data[0, 0] += 1e-3j
    assert not bntools.verify(model, other, X)


def test_fault_in_the_imaginary_part_is_caught():
    assert not judged(KINDS["complex"], lambda y: torch.complex(y, y + 1.001))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_candidate_with_one_value_that_is_not_finite_fails(value):
    result = judged(lambda y: y, with_one(value))
    assert not result
    assert result.worst.error == float("inf")


def test_reference_that_gives_nan_can_be_equal_to_nothing():
    result = judged(with_one(float("nan")), with_one(float("nan")))
    assert not result
    assert "the reference itself gives NaN" in result.summary()


def test_same_infinities_are_equal_and_others_are_not():
    infinity = float("inf")
    assert judged(with_one(infinity), with_one(infinity))
    assert not judged(with_one(infinity), with_one(-infinity))
    assert not judged(with_one(infinity), lambda y: y)


@pytest.mark.parametrize(
    "give",
    [lambda y: None, lambda y: y[:0], lambda y: [], lambda y: object()],
    ids=["none", "empty tensor", "empty list", "nothing known"],
)
def test_nothing_to_compare_is_not_equal(give):
    result = judged(give, give)
    assert not result
    assert result.summary()
    json.dumps(result.to_dict(), allow_nan=False)


def test_empty_output_beside_a_good_one_is_not_equal():
    result = judged(lambda y: (y, y[:0]), lambda y: (y, y[:0]))
    assert not result
    assert "empty" in result.worst.note


def test_another_shape_is_not_equal_even_where_it_could_be_broadcast():
    for other in (lambda y: y[:1], lambda y: y[:, :1], lambda y: y.T, lambda y: y[None]):
        result = judged(lambda y: y, other)
        assert not result
        assert "shape" in result.worst.note
    assert not judged(lambda y: y.sum(), lambda y: y.sum().reshape(1))


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (lambda y: {"a": y, "b": y}, lambda y: {"a": y}),
        (lambda y: {"a": y}, lambda y: {"a": y, "b": y}),
        (lambda y: (y, y), lambda y: (y,)),
        (lambda y: {"a": y}, lambda y: {"b": y}),
        (lambda y: y, lambda y: None),
    ],
    ids=["missing", "extra", "shorter", "renamed", "none"],
)
def test_missing_and_extra_outputs_are_not_equal(reference, candidate):
    assert not judged(reference, candidate)


def test_tuple_and_list_are_equal_and_so_are_an_object_and_a_dict():
    assert judged(lambda y: (y, y), lambda y: [y, y])
    assert judged(Answer, lambda y: {"logits": y, "note": "a note"})
    assert not judged(Answer, lambda y: {"logits": y, "note": "another"})


@pytest.mark.parametrize(
    "give",
    [lambda y: y.argmax(1), lambda y: y > 0, lambda y: (y, y.argmax(1)), lambda y: (9 * y).int()],
    ids=["argmax", "mask", "both", "rounded"],
)
def test_integer_outputs_must_be_the_same(give):
    assert judged(give, give)
    assert not judged(give, lambda y: give(-y))


def test_integers_may_differ_as_often_as_those_of_the_reference_do_and_no_further():
    """In float32 most ranks of a close race are not those of float64."""

    def race(y: Tensor, by: int = 0) -> Tensor:
        steps = torch.arange(400).to(y) % 20
        order = (1 + steps * (torch.finfo(torch.float32).eps / 4)).argsort(stable=True)
        return torch.cat([order, torch.arange(4000)]) + by

    result = judged(race, race)
    assert result
    assert 0 < result.worst.reference_error < 0.1
    assert not judged(race, lambda y: race(y, 1))


@pytest.mark.parametrize(("wrong", "passes"), [(0, True), (5, True), (6, False), (500, False)])
def test_near_ties_excuse_five_integers_in_a_thousand(wrong, passes):
    def ranks(y: Tensor, wrong: int = 0) -> Tensor:
        return torch.arange(1000) + (torch.arange(1000) < wrong)

    assert bool(judged(ranks, lambda y: ranks(y, wrong))) is passes


# References that do not play along


def test_nondeterministic_reference_is_an_error_that_names_the_output():
    with pytest.raises(NondeterministicError, match=r"output\[1\]"):
        judged(lambda y: (y, y + torch.rand_like(y)), lambda y: (y, y))


def test_dropout_that_stays_on_is_an_error():
    noisy = nn.Sequential(nn.Linear(4, 6), nn.Dropout()).eval()
    noisy[1].train()
    noisy[1].forward = lambda y: nn.functional.dropout(y, 0.5, True)
    with pytest.raises(NondeterministicError, match="dropout"):
        bntools.verify(noisy, noisy, X)


def test_reference_whose_outputs_change_shape_is_an_error():
    calls = iter(range(9))
    changing = giving(lambda y: y)
    changing.give = lambda y: y[: 1 + next(calls) % 2]
    with pytest.raises(NondeterministicError, match="output"):
        bntools.verify(changing, giving(lambda y: y), X)


class OnlyFloat32(nn.Module):
    """Casts its input, whatever dtype the model has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float())


def test_reference_that_cannot_run_in_float64_is_judged_and_it_is_said():
    model = OnlyFloat32().eval()
    result = bntools.verify(model, copy.deepcopy(model), X)
    assert result
    assert result.truth == "float32"
    assert "float64" in "".join(result.notes)
    assert "float64" in str(result)
    other = copy.deepcopy(model)
    other.linear.bias.data[2] += 1e-3
    assert not bntools.verify(model, other, X)


def test_reference_that_does_not_run_on_the_inputs_is_an_error():
    model = giving(lambda y: y)
    with pytest.raises(InputError, match="3x5 float32"):
        bntools.verify(model, model, torch.zeros(3, 5))


@pytest.mark.parametrize("inputs", ["image", 3, {1, 2}], ids=str)
def test_what_is_no_input_is_an_error(inputs):
    with pytest.raises(InputError, match="example inputs"):
        bntools.verify(giving(lambda y: y), giving(lambda y: y), inputs)


def test_what_is_no_module_is_an_error():
    with pytest.raises(PlanError, match=r"nn\.Module"):
        bntools.verify(giving(lambda y: y), lambda y: y, X)


@pytest.mark.parametrize("inputs", [X, (X,), {"x": X}], ids=["tensor", "tuple", "dict"])
def test_inputs_are_a_tensor_a_tuple_or_a_dict(inputs):
    model = giving(lambda y: y)
    assert bntools.verify(model, copy.deepcopy(model), inputs)


def test_list_is_one_argument():
    model = giving(lambda y: y)
    model.forward = lambda xs: model.linear(torch.stack(xs))
    assert bntools.verify(model, model, [X, X])


# Purity


def state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {p: (id(m), m.training, len(vars(m))) for p, m in model.named_modules()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name} (tensor)"] = (id(tensor), tensor.requires_grad, tensor.tolist())
    return found


class Writing(nn.Module):
    """Counts its calls in an attribute and a buffer, and writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        y = self.body(x)
        x.zero_()
        return y


@pytest.mark.parametrize("training", [False, True])
def test_verify_leaves_models_inputs_and_generators_as_they_were(training):
    model, x = Writing().train(training), X.clone()
    twin = copy.deepcopy(model)
    before = state(model), state(twin), model.calls, torch.get_rng_state().tolist()
    assert bntools.verify(model, twin, x)
    assert (state(model), state(twin), model.calls, torch.get_rng_state().tolist()) == before
    assert torch.equal(x, X)


def test_models_in_training_mode_are_judged_as_their_eval_versions():
    model = Writing().train()
    twin = copy.deepcopy(model).eval()
    assert bntools.verify(model, twin, X)
    assert bntools.verify(twin, model, X)
    assert model.training
    assert not twin.training


def test_verify_leaves_models_alone_when_the_candidate_raises():
    model, broken = Writing(), Writing()
    broken.body[2].register_forward_hook(lambda *_: 1 / 0)
    before = state(model), state(broken)
    with pytest.raises(InputError, match="run the candidate on 3x4 float32: ZeroDivisionError"):
        bntools.verify(model, broken, X)
    assert (state(model), state(broken)) == before


def test_wrappers_are_looked_through():
    model = giving(lambda y: y)
    assert bntools.verify(nn.DataParallel(model), copy.deepcopy(model), X)
    assert bntools.verify(model, nn.DataParallel(copy.deepcopy(model)), X)


# The answer


def test_answer_says_what_was_compared_with_which_limit():
    model, twin, x = network("digits")
    result = bntools.verify(model, twin, x)
    assert result.inputs == "4x1x8x8 float32"
    assert (result.dtype, result.factor, result.eps_factor) == ("float32", 4.0, 8.0)
    assert result.summary().startswith("worst error 1x that of the original float32 model (limit ")
    (output,) = result.outputs
    eps = torch.finfo(torch.float32).eps
    assert output.limit == max(4 * output.reference_error, 8 * eps)
    assert output.ratio == 1.0


def test_answer_as_text_has_a_row_per_output_and_the_verdict():
    text = str(judged(KINDS["dict"], KINDS["dict"]))
    assert "output.a" in text
    assert "output.b.c" in text
    assert "\nequivalent: " in text
    assert "NOT equivalent: output: NaN" in str(judged(lambda y: y, with_one(float("nan"))))


def test_answer_as_data_is_json_without_nan():
    for result in (judged(lambda y: y, lambda y: y), judged(lambda y: y, with_one(float("nan")))):
        data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert data["equivalent"] is bool(result)
        assert data["schema"] == 1
        assert [o["name"] for o in data["outputs"]] == ["output"]
    assert data["outputs"][0]["error"] is None
    assert data["outputs"][0]["note"] == "NaN"


def test_answer_without_outputs_says_so():
    result = judged(lambda y: None, lambda y: None)
    assert result.worst is None
    assert result.summary() == "no output to compare: not equivalent"
    assert "no output to compare" in str(result)
