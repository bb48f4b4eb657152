"""An EvoNorm takes the activation with it: at that call site, and at no other."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from randomise import randomise, settle
from replace_models import Dropping, Functional, Looping, Odd, Residual, Twice
from torch import nn
from torch.nn import functional as F

import bntools
from bntools import rewriting
from bntools.errors import LoadError, SaveError, SurgeryError
from bntools.recipe import apply_edits
from bntools.report import Action, Reason
from bntools.rewriting import Rewritten, remove_activation_after, retrace, why_not_removable

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 + 0.3


def ready(model: nn.Module, x: torch.Tensor = X) -> nn.Module:
    model.eval()
    randomise(model)
    settle(model, x)
    return model


def replaced(model: nn.Module, target="evonorm-s0", **options):
    return bntools.replace(model, target, X, options=bntools.ReplaceOptions(**options))


def calls_of(function, model, *args, **kwargs) -> int:
    """How often a function of torch is called in a forward."""
    count = 0

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += getattr(func, "__name__", "").rstrip("_") == function
            return func(*args, **(kwargs or {}))

    with Counting(), torch.no_grad():
        model(*args, **kwargs)
    return count


# The ways of calling an activation


def test_a_module_shared_between_call_sites_goes_at_one_of_them():
    model = ready(Residual())
    result = replaced(model)
    assert [row.activation for row in result.report.layers] == [
        "relu (in the model, after bn1)",
        "",
    ]
    new = result.model
    assert isinstance(new, Residual)
    assert new.state_dict().keys() >= {"conv1.weight", "bn1.v", "bn2.weight", "head.bias"}
    with torch.no_grad():
        out = new.bn1(new.conv1(X))
        out = new.bn2(new.conv2(out)) + out
        assert torch.equal(new(X), new.head(F.relu(out).mean((2, 3))))
    assert calls_of("relu", model, X) == calls_of("relu", new, X) + 1


def test_a_module_of_its_own_becomes_an_identity():
    model = ready(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)))
    new = replaced(model).model
    assert [type(m).__name__ for m in new] == ["Conv2d", "EvoNorm2dS0", "Identity"]
    assert type(model[2]) is nn.ReLU6


def test_a_module_that_fills_several_places_of_a_sequential_goes_from_one():
    act = nn.ReLU()
    model = ready(nn.Sequential(nn.BatchNorm2d(3), act, nn.Conv2d(3, 3, 1), act))
    new = replaced(model).model
    with torch.no_grad():
        assert torch.equal(new(X), F.relu(new[2](new[0](X))))
    assert list(new.state_dict()) == ["0.weight", "0.bias", "0.v", "2.weight", "2.bias"]
    assert type(new) is nn.Sequential
    with torch.no_grad():
        assert torch.equal(new.append(nn.Tanh())(X), F.relu(new[2](new[0](X))).tanh())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_function_goes_from_the_forward_that_calls_it(inplace):
    model = ready(Functional(F.relu, inplace=inplace))
    new = replaced(model).model
    with torch.no_grad():
        assert torch.equal(new(X, scale=3.0), new.bn(new.conv(X)) * 3.0)


@pytest.mark.parametrize(
    ("function", "options", "own"),
    [
        (F.relu6, {}, nn.ReLU6()),
        (F.leaky_relu, {"negative_slope": 0.3}, nn.LeakyReLU(0.3)),
        (F.silu, {"inplace": True}, nn.SiLU()),
        (F.gelu, {"approximate": "tanh"}, nn.GELU(approximate="tanh")),
        (F.hardswish, {}, nn.Hardswish()),
        (F.elu, {"alpha": 0.5}, nn.ELU(0.5)),
        (torch.sigmoid, {}, nn.Sigmoid()),
        (lambda y: y.tanh(), {}, nn.Tanh()),
        (lambda y: y.relu_(), {}, nn.ReLU()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_activation_that_may_be_taken_is_known_with_its_arguments(function, options, own):
    from bntools.activations import Followers
    from bntools.observing import observe

    model = ready(Functional(function, **options))
    found = Followers(model, observe(model, X).graphs[0]).of("bn")
    y = torch.linspace(-8, 8, 101)
    assert torch.equal(found.module(y), own(y))
    assert len(replaced(model).report.replaced) == 1


def test_a_prelu_goes_and_what_it_learned_is_what_is_fitted_to():
    prelu = nn.PReLU(8)
    prelu.weight.data.uniform_(-1, 1)
    model = ready(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), prelu))
    from bntools.activations import Followers
    from bntools.observing import observe

    found = Followers(model, observe(model, X).graphs[0]).of("1")
    y = torch.randn(2, 8, 4, 4)
    assert torch.equal(found.module(y), prelu(y))
    assert found.module.weight is not prelu.weight
    assert "2.weight" not in replaced(model).model.state_dict()


def test_a_block_that_runs_twice_loses_the_activation_at_both_calls():
    model = ready(Twice())
    new = replaced(model).model
    with torch.no_grad():
        assert torch.equal(new(X), new.unit(X) + F.relu(X) + new.unit(2 * X))


def test_what_depends_on_the_mode_still_does():
    new = replaced(ready(Dropping())).model
    with torch.no_grad():
        assert torch.equal(new(X), new.bn(new.conv(X)))
        new.train()
        y = new(X)
        assert bool((y == 0).any())
        kept = y != 0
        torch.testing.assert_close(y[kept], 2 * (new.bn(new.conv(X)) + 1)[kept])
        new.eval()
        assert torch.equal(new(X), new.bn(new.conv(X)))


def test_a_graph_module_is_edited_in_place_of_its_class():
    model = torch.fx.symbolic_trace(ready(Residual()))
    new = replaced(model).model
    assert calls_of("relu", model, X) == calls_of("relu", new, X) + 1


# What is left alone, and why


@pytest.mark.parametrize(
    ("model", "reason", "said"),
    [
        (Functional(F.mish), Reason.ACTIVATION_STAYS, "mish"),
        (Functional(F.hardtanh), Reason.ACTIVATION_STAYS, "hardtanh"),
        (Functional(F.selu), Reason.ACTIVATION_STAYS, "elu"),
        (Looping(), Reason.ACTIVATION_STAYS, "torch.fx cannot trace"),
        (Odd("hand-written swish"), Reason.USED_ELSEWHERE, "also uses"),
        (Odd("used elsewhere"), Reason.USED_ELSEWHERE, "also uses"),
        (Odd("returned"), Reason.USED_ELSEWHERE, "also uses"),
        (Odd("only in training elsewhere"), Reason.ACTIVATION_STAYS, "in training mode"),
        (Odd("some calls"), Reason.ACTIVATION_STAYS, "some of its calls"),
        (Odd("different activations"), Reason.ACTIVATION_STAYS, "more than once"),
        (Odd("another in training"), Reason.ACTIVATION_STAYS, "depends on the mode"),
        (Odd("none in training"), Reason.ACTIVATION_STAYS, "does something else besides"),
        (Odd("asked for"), Reason.ACTIVATION_STAYS, "does something else besides"),
    ],
    ids=lambda value: getattr(value, "kind", "") or type(value).__name__,
)
def test_an_activation_that_cannot_go_keeps_the_layer_with_a_reason(model, reason, said):
    model = ready(model)
    before = copy.deepcopy(model.state_dict())
    result = replaced(model)
    row = result.report.layers[0]
    assert (row.action, row.reason) == (Action.KEEP, reason), row
    assert said in row.detail
    assert type(result.model.bn) is nn.BatchNorm2d
    for mine, its in zip(_flat(model(X)), _flat(result.model(X)), strict=True):
        assert torch.equal(mine, its)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def _flat(out):
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_an_activation_with_hooks_stays(register):
    """They would never be called again."""
    model = ready(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    getattr(model[2], register)(lambda *_: None)
    result = replaced(model)
    assert result.report.layers[0].action is Action.KEEP
    assert type(result.model[2]) is nn.ReLU


def test_one_activation_that_cannot_go_does_not_keep_the_others():
    model = ready(nn.Sequential(Odd("asked for"), nn.BatchNorm2d(3), nn.Tanh()))
    rows = {row.path: row.reason for row in replaced(model).report.layers}
    assert rows == {"0.bn": Reason.ACTIVATION_STAYS, "1": None}


def test_a_forward_that_asks_the_norm_for_its_mode_still_does():
    model = ready(Odd("asks the norm"))
    new = replaced(model).model
    with torch.no_grad():
        ratio = new.train()(X) / torch.where((y := new.bn(X)) == 0, 1, y)
    assert new.bn.nonlinearity
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0))


class ByName(nn.Module):
    """Names the argument of its norm, and asks it for its channels."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn(input=x)) * self.bn.num_features


def test_a_new_layer_answers_to_what_the_code_around_a_batch_norm_asks():
    assert replaced(ByName().eval()).model.bn.nonlinearity
    over = bntools.ToLayerNorm(over="channels")
    assert bntools.replace(ByName().eval(), over, X).model.bn.num_features == 3


@pytest.mark.parametrize("model", [Looping(), Functional(F.mish), Odd("used elsewhere")])
def test_keep_activation_replaces_the_layer_all_the_same(model):
    model = ready(model)
    result = replaced(model, keep_activation=True)
    assert result.model.bn.nonlinearity
    assert type(result.model) is type(model)
    assert "stays" in result.report.layers[0].note


def test_keep_activation_leaves_calls_that_could_go():
    model = ready(Residual())
    new = replaced(model, keep_activation=True).model
    assert calls_of("relu", model, X) == calls_of("relu", new, X)
    assert [new.bn1.nonlinearity, new.bn2.nonlinearity] == [True, False]


def test_where_no_activation_follows_the_caller_chooses():
    model = ready(Odd("no activation"))
    affine = replaced(model)
    assert not affine.model.bn.nonlinearity
    torch.testing.assert_close(affine.model(X), model(X), rtol=1e-4, atol=1e-4)
    row = replaced(model, no_activation="keep").report.layers[0]
    assert row.reason is Reason.NO_ACTIVATION


def test_scripted_callers_are_left_alone():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.rest = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)))

        def forward(self, x):
            return self.rest(self.bn(x))

    row = replaced(ready(Outer())).report.layers[0]
    assert row.reason is Reason.ACTIVATION_STAYS
    assert "no activation alone" in row.detail


def test_a_forward_that_torch_fx_sees_otherwise_is_left_alone():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            y = F.relu(self.bn(x))
            return y if isinstance(x, torch.Tensor) else y * 2

    row = replaced(ready(Asks())).report.layers[0]
    assert row.reason is Reason.ACTIVATION_STAYS
    assert "other numbers" in row.detail


class WritesItsInput(nn.Module):
    """What the caller keeps changes with it; torch.fx traces `x += y` as `x + y`."""

    def __init__(self, through=lambda x: x):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.through = through

    def forward(self, x):
        y = F.relu(self.bn(x))
        view = self.through(x)
        view += 1
        return y


class KeepsItsInput(nn.Module):
    """Reads what the block has written to, where a difference of one is far below any tolerance."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        u = torch.sigmoid(x)
        return self.block(u), (u > 1e6) * 1.0


@pytest.mark.parametrize("through", [lambda x: x, lambda x: x[:, 1:], lambda x: x.view(-1)])
def test_a_forward_that_writes_to_an_alias_of_its_input_is_left_alone(through):
    """Its own result is the same as traced, and so is the model's, on these inputs."""
    block = WritesItsInput(through)
    retraced = copy.deepcopy(block).eval()
    retrace(retraced)
    mine, theirs = X.clone(), X.clone()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(block).eval()(mine), retraced(theirs))
    assert not torch.equal(mine, theirs)
    row = replaced(ready(KeepsItsInput(block))).report.layers[0]
    assert row.reason is Reason.ACTIVATION_STAYS
    assert "writes in place" in row.detail


def test_a_forward_that_writes_to_memory_of_its_own_may_change():
    """`out += x` of a residual block: nobody sees `out` before it is whole."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            out = F.relu(self.bn(x)) * 2
            out += x
            return out

    row = replaced(ready(KeepsItsInput(Residual()))).report.layers[0]
    assert row.action is Action.REPLACE


class Optional(nn.Module):
    """An argument that may be None, as in timm's residual blocks."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x, shortcut=None, scale=None):
        if shortcut is None:
            shortcut = x
        y = F.relu(self.bn(x)) + shortcut
        return y if scale is None else y * scale


@pytest.mark.parametrize(
    "given", [{}, {"shortcut": X + 1}, {"scale": X}, {"shortcut": X, "scale": X}]
)
def test_optional_arguments_may_be_given_or_not(given):
    new = replaced(ready(Optional())).model
    shortcut = given.get("shortcut", X)
    with torch.no_grad():
        expected = (new.bn(X) + shortcut) * given.get("scale", torch.ones(1))
        assert torch.equal(new(X, **given), expected)
        assert torch.equal(new(X, given.get("shortcut"), given.get("scale")), expected)
        assert torch.equal(copy.deepcopy(new)(X, **given), expected)


def test_a_forward_that_fails_as_traced_is_left_alone_and_no_other():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x, a=None, b=None, c=None):
            y = F.relu(self.bn(x))
            return y + c if c is not None else y

    model = ready(nn.Sequential(Many(), Functional()))
    rows = replaced(model).report.layers
    assert rows[0].reason is Reason.ACTIVATION_STAYS
    assert "fails" in rows[0].detail
    assert rows[1].action is Action.REPLACE


def test_an_activation_that_still_runs_would_be_noticed(monkeypatch):
    """The check after the surgery can fail: here nothing is removed."""
    from bntools import recipe

    monkeypatch.setattr(recipe, "remove_activation_after", lambda module, child: None)
    rows = replaced(ready(Residual())).report.layers
    assert rows[0].reason is Reason.ACTIVATION_STAYS
    assert "did not come out as planned" in rows[0].detail


def test_an_activation_too_many_that_goes_would_be_noticed(monkeypatch):
    from bntools import recipe

    def greedy(module, child):
        module.relu = nn.Identity()

    monkeypatch.setattr(recipe, "remove_activation_after", greedy)
    rows = replaced(ready(Residual())).report.layers
    assert rows[0].reason is Reason.ACTIVATION_STAYS


# Rewritten modules


def test_a_rewritten_module_is_copied_pickled_and_trained_like_any():
    new = replaced(ready(Residual())).model
    assert isinstance(new, (Rewritten, Residual))
    copied = copy.deepcopy(new)
    assert copied.conv1 is not new.conv1
    loaded = pickle.loads(pickle.dumps(new))
    stream = io.BytesIO()
    torch.save(new, stream)
    stream.seek(0)
    reloaded = torch.load(stream, weights_only=False)
    for other in (copied, loaded, reloaded):
        assert torch.equal(other(X), new(X))
        assert type(other).__name__ == "Residual"
        assert other.state_dict().keys() == new.state_dict().keys()
    copied.bn1.weight.data.zero_()
    assert not torch.equal(copied(X), new(X))
    new.train()
    new(X).sum().backward()
    assert new.bn1.v.grad.isfinite().all()


def test_no_code_is_stored_and_the_safe_loader_reads_it(tmp_path):
    from torchvision.models import resnet18

    model = ready(resnet18(), torch.randn(2, 3, 32, 32))
    result = bntools.replace(model, "evonorm-s0", torch.randn(1, 3, 32, 32), only="layer1.*")
    bntools.save(result, tmp_path / "m.pt")
    again = bntools.load(tmp_path / "m.pt")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), result.model(x))
    content = (tmp_path / "m.pt").read_bytes()
    assert b"def forward" not in content
    assert b"GraphModule" not in content


def test_a_damaged_file_of_a_rewritten_module_is_refused(tmp_path, monkeypatch):
    from torchvision.models import resnet18

    result = bntools.replace(resnet18().eval(), "evonorm-s0", torch.randn(1, 3, 32, 32))
    own = Rewritten.__reduce_ex__
    for damage in ({"removed": ["nowhere"]}, {"removed": "bn1"}, {"module": 3}):

        def damaged(self, protocol, damage=damage):
            function, arguments, state = own(self, protocol)
            return function, arguments, {**state, **damage}

        monkeypatch.setattr(Rewritten, "__reduce_ex__", damaged)
        bntools.save(result, tmp_path / "m.pt", force=True)
        with pytest.raises(LoadError, match="Cannot load"):
            bntools.load(tmp_path / "m.pt")


def test_a_rewritten_module_is_made_by_no_other_call(tmp_path):
    class Evil:
        def __reduce__(self):
            return Rewritten, (3,)

    torch.save({"model": Evil()}, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"it calls bntools\.rewriting\.Rewritten"):
        bntools.load(tmp_path / "m.pt")


def test_what_cannot_be_saved_is_not_blamed_on_a_rewritten_module(tmp_path):
    new = replaced(ready(Residual())).model
    new.lock = (i for i in ())
    with pytest.raises(SaveError, match="the attribute lock"):
        bntools.save(new, tmp_path / "m.pt")


def test_a_second_rewrite_adds_to_the_first():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return F.relu(self.b(F.relu(self.a(x))))

    model = ready(Two())
    remove_activation_after(model, "a")
    assert torch.equal(model(X), F.relu(model.b(model.a(X))))
    remove_activation_after(model, "b")
    assert torch.equal(model(X), model.b(model.a(X)))
    assert type(model).__mro__[1:3] == (Rewritten, Two)


def test_a_retraced_module_gives_the_same_to_the_bit():
    model = ready(Residual())
    y = model(X)
    retrace(model)
    assert torch.equal(model(X), y)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: setattr(m, "forward", lambda x: x), "its own forward"),
        (lambda m: None, "does not call head2"),
    ],
)
def test_what_cannot_be_rewritten_says_why_and_stays(change, said):
    model = ready(Residual())
    model.head2 = nn.Linear(1, 1)
    change(model)
    assert said in why_not_removable(model, "head2")
    with pytest.raises(SurgeryError, match=said):
        remove_activation_after(model, "head2")
    assert type(model) is Residual


def test_a_forward_that_keeps_something_is_not_rewritten():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.last = None

        def forward(self, x):
            self.last = F.relu(self.bn(x))
            return self.last

    model = ready(Keeps())
    assert "sets attributes" in why_not_removable(model, "bn")
    assert model.last is None or isinstance(model.last, torch.Tensor)
    assert replaced(model).report.layers[0].action is Action.KEEP


def test_a_recipe_removes_the_same_activation_from_a_fresh_model():
    model = ready(Twice())
    result = replaced(model)
    fresh = apply_edits(copy.deepcopy(model), result.recipe)
    assert torch.equal(fresh(X), result.model(X))


@pytest.mark.slow
def test_a_rewritten_module_compiles():
    new = replaced(ready(Residual())).model
    torch.testing.assert_close(torch.compile(new, backend="eager")(X), new(X))


def test_taken_modules_are_those_of_the_issue():
    names = {cls.__name__ for cls in rewriting.TAKEN_MODULES} - {"Hardtanh"}
    listed = "ReLU ReLU6 LeakyReLU PReLU SiLU GELU Hardswish ELU Sigmoid Tanh"
    assert " ".join(sorted(names)) == " ".join(sorted(listed.split()))
