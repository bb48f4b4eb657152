"""Every zoo model: the plan is right, the numbers agree, and the argument is untouched."""

from __future__ import annotations

import functools
import inspect
import json
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import zoo_folds  # noqa: F401 (fills the zoo)
import zoo_forward  # noqa: F401 (fills the zoo)
import zoo_keeps  # noqa: F401 (fills the zoo)
from randomise import cast, difference, named_modules, norms, outputs, run, truth_error
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import CASES, IMAGE, Case, Net

import bntools
from bntools.errors import BNToolsError, PlanError
from bntools.report import Action, Decision, Reason, Result
from bntools.surgery.folding import fold_copy

AVAILABLE = [case for case in CASES.values() if case.available]
every_case = pytest.mark.parametrize("case", AVAILABLE, ids=lambda case: case.name)


@dataclass(frozen=True)
class Folded:
    """A fold, and what was there before and after it; made once for all tests."""

    before: dict[str, Any]
    after: dict[str, Any]
    truth: list[Tensor]
    reference: list[Tensor]
    candidate: list[Tensor]
    result: Result


def folded(case: Case, *, exact: bool) -> Folded:
    return _folded(case.name, exact)


@functools.cache
def _folded(name: str, exact: bool) -> Folded:
    case = CASES[name]
    model, original, inputs = case.prepare(), case.prepare(), case.example()
    if exact:
        model, original, inputs = model.double(), original.double(), cast(inputs, torch.float64)
    reference = truth = outputs(original, inputs)
    if case.float64 and not exact:
        truth = outputs(case.prepare().double(), cast(inputs, torch.float64))
    before = fingerprint(model, inputs)
    result = bntools.fold(model, inputs)
    after = fingerprint(model, inputs)
    candidate = outputs(result.model, inputs)
    for tensor in [*result.model.parameters(), *result.model.buffers()]:
        if not is_lazy(tensor):
            tensor.detach().zero_()
    later = changes(after, fingerprint(model, inputs))
    after["shared"] = [name for name in later if name.startswith("tensor")]
    return Folded({**before, "shared": []}, after, truth, reference, candidate, result)


def fingerprint(model: nn.Module, inputs: Any = ()) -> dict[str, Any]:
    """Whatever a caller may find changed: modules, attributes, hooks, bits, generators, inputs."""
    parts: dict[str, Any] = {"inputs": [bits(t) for t in tree_leaves(inputs) if torch.is_tensor(t)]}
    for path, module in named_modules(model):
        parts[path] = id(module), type(module), module.training
        for name, value in vars(module).items():
            length = len(value) if isinstance(value, (dict, list)) else None
            hooks = tuple(value.items()) if name.endswith("hooks") and value else ()
            parts[f"{path}:{name}"] = id(value), length, hooks
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts[f"tensor {name}"] = (
            id(tensor),
            tensor.requires_grad,
            tensor.grad is None,
            bits(tensor),
        )
    parts["generators"] = (
        random.getstate(),
        torch.get_rng_state().numpy().tobytes(),
        str(np.random.get_state()),  # noqa: NPY002 (a model may draw from the global generator)
    )
    return parts


def bits(tensor: Tensor) -> Any:
    if is_lazy(tensor):
        return "uninitialised"
    content = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tensor.shape, tensor.stride(), zlib.crc32(content)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


def agree(decisions: tuple[Decision, ...], case: Case) -> None:
    """Each layer of the case once, with an outcome that it admits; a sentence where kept."""
    assert sorted(d.path for d in decisions) == sorted(case.expected)
    for decision in decisions:
        expected = case.expected[decision.path]
        assert expected.admits(decision), f"{decision} instead of {expected}"
        assert (decision.reason is None) == (decision.action is Action.FOLD)
        assert decision.hosts if decision.action is Action.FOLD else len(decision.detail) > 10


# Every zoo model


@every_case
def test_plan_has_every_norm_layer_once_with_its_outcome(case):
    agree(bntools.plan_fold(case.prepare(), case.example()).decisions, case)


@every_case
def test_float64_fold_is_exact(case):
    if not case.float64:
        pytest.skip("the model itself rounds to another dtype")
    fold = folded(case, exact=True)
    agree(fold.result.report.decisions, case)
    assert difference(fold.candidate, fold.truth) <= 1e-10


@every_case
def test_fold_in_its_own_dtype_is_as_good_as_the_original(case):
    fold = folded(case, exact=False)
    agree(fold.result.report.decisions, case)
    eps = torch.finfo(case.dtype if case.float64 else torch.bfloat16).eps
    limit = max(4 * difference(fold.reference, fold.truth), 32 * eps)
    assert difference(fold.candidate, fold.truth) <= limit
    assert [t.dtype for t in fold.candidate] == [t.dtype for t in fold.reference]


@every_case
@pytest.mark.parametrize("exact", [False, True], ids=["own", "float64"])
def test_argument_is_untouched_by_a_fold_and_by_writes_to_its_result(case, exact):
    if exact and not case.float64:
        pytest.skip("the model itself rounds to another dtype")
    fold = folded(case, exact=exact)
    assert changes(fold.before, fold.after) == []


@every_case
def test_folded_norms_are_gone_and_kept_ones_are_there(case):
    fold = folded(case, exact=False)
    left = norms(fold.result.model)
    decisions = [d for d in fold.result.report.decisions if not d.affine]
    own = {d.path: d.action for d in decisions if case.expected[d.path].reasons}
    for path, outcome in case.expected.items():
        if not outcome.reasons:
            assert path not in left, f"{path} is still a norm layer"
        elif own.get(path) is Action.KEEP:
            assert path in left, f"{path} is gone"


@every_case
def test_certificate_is_json(case):
    report = folded(case, exact=False).result.to_dict()
    assert len(json.loads(json.dumps(report))["decisions"]) == len(case.expected)


# The zoo itself


def test_zoo_has_a_model_for_every_reason():
    definite = [set(o.reasons) for c in CASES.values() for o in c.expected.values() if not o.hosts]
    seen = set().union(*(reasons for reasons in definite if len(reasons) == 1))
    seen |= {o.forward for c in CASES.values() for o in c.expected.values()}
    of_a_fold = set(Reason) - _OF_FREEZE - _OF_REPLACE - _OF_CONVERSION - _OF_MERGING - _OF_ONNX
    elsewhere = {Reason.CHECK_FAILED, Reason.SKIPPED, Reason.PAD_VALUE}  # test_pad_forward.py
    assert of_a_fold - seen == {*elsewhere, *_ALWAYS_ONE_OF_TWO}
    assert set().union(*definite) >= _ALWAYS_ONE_OF_TWO


_ALWAYS_ONE_OF_TWO = {Reason.FIXED_WEIGHT}
# Their models are in test_freeze.py, test_replace.py and test_replace_activations.py.
_OF_FREEZE = {
    Reason.UNINITIALIZED,
    Reason.ALREADY_FROZEN,
    Reason.NOT_FROZEN,
    Reason.NO_SUCH_FORM,
}
_OF_CONVERSION = {Reason.NOT_BATCH_NORM}  # test_to_batchnorm.py
_OF_MERGING = {  # test_merging.py
    Reason.OTHER_GEOMETRY,
    Reason.COSTS_MORE,
    Reason.PADDED_BETWEEN,
    Reason.NOT_REWRITABLE,
}
_OF_ONNX = {Reason.CONTROL_FLOW}  # test_onnx_fold.py
_OF_REPLACE = {Reason.ONE_VALUE, Reason.NO_ACTIVATION, Reason.ACTIVATION_STAYS}


def test_zoo_models_are_short():
    builders = [c.build for c in CASES.values() if not isinstance(c.build, functools.partial)]
    long = [b.__name__ for b in builders if len(inspect.getsource(b).splitlines()) > 20]
    assert long == []


# Purity when something goes wrong


class Interruption(KeyboardInterrupt):
    """Ctrl-C, at a moment of our choice."""


class InterruptAt(TorchDispatchMode):
    """Raise at the n-th operation, whoever runs it: the model, the recorder, or the arithmetic."""

    def __init__(self, moment: int) -> None:
        super().__init__()
        self.moment, self.count = moment, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.moment:
            raise Interruption("stop")
        return func(*args, **(kwargs or {}))


def hostile() -> tuple[nn.Module, Tensor]:
    """Something of everything that a forward or a fold could leave behind."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls.append(1)
        m.last = m.first(x)
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return m.second(m.last + 0 * noise).flatten(1)

    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model = Net(forward, first=first, second=second, calls=[], last=None)
    model.eval()
    run(model, IMAGE())
    second[2].train()
    first[2].train()
    first[0].weight.requires_grad_(False)
    first.register_forward_hook(lambda *_: None)
    return model, IMAGE()


@pytest.mark.parametrize("verb", ["plan_fold", "fold"])
def test_argument_is_untouched_when_something_raises_at_any_operation(verb):
    model, inputs = hostile()
    before = fingerprint(model)
    with InterruptAt(0) as counter:
        getattr(bntools, verb)(model, inputs)
    assert counter.count > 20
    for moment in range(1, counter.count + 1, max(1, counter.count // 16)):
        with (
            pytest.raises(Interruption, match="stop"),
            InterruptAt(moment),
        ):
            getattr(bntools, verb)(model, inputs)
        assert changes(before, fingerprint(model)) == [], f"operation {moment} of {counter.count}"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_argument_is_untouched_when_its_own_forward_raises(error):
    model, inputs = hostile()
    fail = {"in": -1}

    def raise_sometimes(*_: Any) -> None:
        fail["in"] -= 1
        if fail["in"] == 0:
            raise error("no such image")

    model.second[1].register_forward_hook(raise_sometimes)
    before = fingerprint(model)
    for call in range(1, 4):
        fail["in"] = call
        with suppress(error, BNToolsError):
            bntools.fold(model, inputs)
        assert changes(before, fingerprint(model)) == []
        assert call > 1 or fail["in"] <= 0, "the forward never ran"


def test_argument_is_untouched_when_the_inputs_do_not_fit():
    model, _ = hostile()
    before = fingerprint(model)
    with pytest.raises(BNToolsError, match=r"\w"):
        bntools.fold(model, torch.zeros(2, 5, 8, 8))
    assert changes(before, fingerprint(model)) == []


def test_lazy_norm_in_the_way_stays_uninitialised():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.LazyBatchNorm2d()).eval()
    before = fingerprint(model)
    with suppress(BNToolsError):
        bntools.plan_fold(model, IMAGE())
    with suppress(BNToolsError):
        bntools.fold(model, IMAGE())
    assert changes(before, fingerprint(model)) == []


# Modes, wrappers, hooks, remainders


def test_root_in_training_mode_is_folded_as_its_eval_version():
    model = CASES["dropout_and_identity_between"].prepare()
    truth = outputs(model, IMAGE())
    model.train()
    before = fingerprint(model)
    result = bntools.fold(model, IMAGE())
    assert changes(before, fingerprint(model)) == []
    assert [d.action for d in result.report.decisions] == [Action.FOLD]
    assert result.report.warnings
    assert not any(module.training for _, module in named_modules(result.model))
    assert difference(outputs(result.model, IMAGE()), truth) < 1e-5


def test_norm_in_training_mode_below_an_eval_root_stays_so():
    result = bntools.fold(CASES["norm_in_training_mode"].prepare(), IMAGE())
    assert [module.training for _, module in named_modules(result.model)] == [False, False, True]


def test_activation_of_a_fused_norm_remains():
    case = CASES["batch_norm_with_activation"]
    if not case.available:
        pytest.skip("needs timm")
    result = folded(case, exact=False).result
    assert any(isinstance(module, nn.SiLU) for _, module in named_modules(result.model))


def test_hooks_still_run_after_a_fold():
    model = CASES["nested_containers"].prepare()
    seen = []
    model.blocks[0].register_forward_hook(lambda module, *_: seen.append(module))
    result = bntools.fold(model, IMAGE())
    seen.clear()
    run(result.model, IMAGE())
    assert seen == [result.model.blocks[0]]


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda m: torch.compile(m, backend="eager")],
    ids=["parallel", "compiled"],
)
def test_wrapped_models_fold_like_what_they_wrap(wrap):
    case = CASES["nested_containers"]
    model = case.prepare()
    result = bntools.fold(wrap(model), IMAGE())
    assert len(result.report.folds) == len(case.expected)
    assert difference(outputs(result.model, IMAGE()), outputs(model, IMAGE())) < 1e-5


def test_model_without_norms_has_an_empty_plan():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).eval()
    assert bntools.plan_fold(model, IMAGE()).decisions == ()
    assert (
        difference(outputs(bntools.fold(model, IMAGE()).model, IMAGE()), outputs(model, IMAGE()))
        == 0
    )


# Choosing layers


@pytest.mark.parametrize(
    ("options", "folds"),
    [
        ({"only": "blocks.*"}, {"blocks.0.1", "blocks.1.1"}),
        ({"skip": ("blocks.1.*", "heads*")}, {"blocks.0.1"}),
        ({"only": "blocks.*", "skip": ("*.1.1",)}, {"blocks.0.1"}),
    ],
    ids=["only", "skip", "both"],
)
def test_layers_that_are_not_chosen_are_skipped(options, folds):
    model = CASES["nested_containers"].prepare()
    plan = bntools.plan_fold(model, IMAGE(), **options)
    assert {d.path for d in plan.folds} == folds
    assert {d.reason for d in plan.kept} == {Reason.SKIPPED}
    result = bntools.fold(model, IMAGE(), **options)
    assert [(d.path, d.action) for d in result.report.decisions] == [
        (d.path, d.action) for d in plan.decisions
    ]
    assert difference(outputs(result.model, IMAGE()), outputs(model, IMAGE())) < 1e-5


def test_pattern_that_selects_nothing_is_an_error():
    with pytest.raises(PlanError, match=r"blcoks"):
        bntools.plan_fold(CASES["nested_containers"].prepare(), IMAGE(), only="blcoks.*")


def test_plan_is_repeatable_and_can_be_given_to_fold():
    case = CASES["nested_containers"]
    model = case.prepare()
    plan = bntools.plan_fold(model, IMAGE())
    assert bntools.plan_fold(model, IMAGE()).decisions == plan.decisions
    result = bntools.fold(model, IMAGE(), plan=plan)
    agree(result.report.decisions, case)


def test_plan_of_another_model_is_refused():
    plan = bntools.plan_fold(CASES["nested_containers"].prepare(), IMAGE())
    with pytest.raises(BNToolsError, match=r"\w"):
        bntools.fold(CASES["linear"].prepare(), CASES["linear"].example(), plan=plan)


# The check


class Mistaken(nn.Module):
    """A norm of which bntools is told something wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 1.0]).reshape(4, 1, 1))
        self.offset = nn.Parameter(torch.tensor([0.1, 0.0, -1.0, 1.0]).reshape(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.offset


@pytest.fixture
def mistaken() -> nn.Module:
    bntools.register_norm(
        Mistaken, affine=lambda m: bntools.Affine(m.gain.flatten(), m.offset.flatten() + 1e-3)
    )
    wrong = nn.Sequential(nn.Conv2d(4, 4, 3), Mistaken(), nn.ReLU())
    right = [nn.Sequential(nn.Conv2d(c, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for c in (3, 4)]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(right[0], wrong, right[1]).eval()


def test_fold_that_fails_its_check_is_rolled_back_and_the_rest_delivered(mistaken):
    result = bntools.fold(mistaken, IMAGE())
    reasons = {d.path: d.reason for d in result.report.decisions}
    assert reasons == {"0.1": None, "1.1": Reason.CHECK_FAILED, "2.1": None}
    assert result.report.check
    assert result.report.check.rolled_back == ("1.1",)
    assert isinstance(result.model[1][1], Mistaken)
    assert difference(outputs(result.model, IMAGE()), outputs(mistaken, IMAGE())) < 1e-5


def test_without_its_check_that_fold_would_be_wrong(mistaken):
    """Otherwise the test above would show nothing."""
    plan = bntools.plan_fold(mistaken, IMAGE())
    assert len(plan.folds) == 3
    folded = fold_copy(mistaken, plan.compiled.folds).model
    assert difference(outputs(folded, IMAGE()), outputs(mistaken, IMAGE())) > 1e-5


@contextmanager
def changed(model: nn.Module, name: str, channel: int, by: float) -> Iterator[nn.Module]:
    tensor = dict(model.named_parameters())[name].data
    before = tensor.clone()
    tensor[channel] += by
    yield model
    tensor.copy_(before)


def test_verify_accepts_a_fold_and_catches_a_dropped_bias():
    model = CASES["one_relu_for_all"].prepare()
    result = bntools.fold(model, IMAGE())
    assert bntools.verify(model, result.model, IMAGE())
    result.model.conv2.bias = None
    assert not bntools.verify(model, result.model, IMAGE())


@pytest.mark.parametrize("name", ["conv1.bias", "conv2.bias", "conv2.weight"])
def test_verify_catches_a_small_fault_in_one_channel(name):
    model = CASES["one_relu_for_all"].prepare()
    candidate = bntools.fold(model, IMAGE()).model
    with changed(candidate, name, 2, 1e-3):
        assert not bntools.verify(model, candidate, IMAGE())
    assert bntools.verify(model, candidate, IMAGE())


def test_verify_catches_a_wrong_eps_a_dropped_norm_and_swapped_channels():
    model, other = (CASES["one_relu_for_all"].prepare() for _ in range(2))
    other.bn1.eps = 1e-3
    assert not bntools.verify(model, other, IMAGE())
    other.bn1 = nn.Identity()
    assert not bntools.verify(model, other, IMAGE())
    other.bn1 = model.bn1
    other.conv2.weight.data = other.conv2.weight.data[[1, 0, 2, 3, 4, 5]]
    assert not bntools.verify(model, other, IMAGE())


def test_truth_error_sees_what_a_fold_changes():
    model = CASES["conv2d"].prepare()
    result = bntools.fold(model.double(), cast(IMAGE(), torch.float64))
    assert truth_error(model, result.model, IMAGE()) < 1e-12
    with changed(result.model, "0.bias", 1, 1e-6):
        assert truth_error(model, result.model, IMAGE()) > 1e-8


# Subnormal numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_subnormal_weights_are_flushed_and_counted(dtype):
    model = CASES["conv2d"].prepare().to(dtype)
    model[1].weight.data[2] = 1e-38
    result = bntools.fold(model, cast(IMAGE(), dtype))
    weight = result.model[0].weight
    small = (weight != 0) & (weight.abs().double() < torch.finfo(torch.float32).tiny)
    assert 20 < result.report.flushed <= 27  # some are zero anyway in bfloat16
    assert not small.any()


def test_subnormal_weights_of_half_precision_are_not_flushed():
    case = CASES["half_precision_subnormals"]
    result = bntools.fold(case.prepare(), case.example())
    assert result.report.flushed == 0
    weight = result.model[0].weight
    assert ((weight != 0) & (weight.abs() < torch.finfo(torch.float16).tiny)).any()
