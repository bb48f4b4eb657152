"""Models on a CUDA device: they stay there, and fold as they do on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from onnx_models import FLOAT, linear, node, onnx_model
from randomise import randomise, settle
from torch import nn

import bntools
from bntools.errors import RuntimeUnavailableError
from bntools.report import Action
from bntools.runtimes.sessions import open_session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def images():
    return torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet(images):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = torchvision.models.resnet18(weights=None).eval()
    randomise(model, 1)
    settle(model, images)
    return model


@pytest.fixture(autouse=True)
def _exact_float32():
    """TF32 has ten bits: neither the reference nor its fold would be a float32 model."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cuda()


def devices(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in model.state_dict().values()}


@pytest.mark.parametrize("given", ["on the device", "on the host", "inferred"])
def test_model_on_the_device_folds_and_stays_there(resnet, images, given):
    model = on_gpu(resnet)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = {"on the device": images.cuda(), "inferred": None}.get(given, images)
    result = bntools.fold(model, inputs)
    assert len(result.report.folds) == len(result.report.decisions) == 20
    assert result.report.check
    assert result.report.check.float64
    assert result.report.check.rolled_back == ()
    assert devices(result.model) == devices(model) == {"cuda"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_weights_folded_on_the_device_are_those_folded_on_the_host(resnet, images):
    host = bntools.fold(resnet, images).model.state_dict()
    device = bntools.fold(on_gpu(resnet), images.cuda()).model.state_dict()
    assert host.keys() == device.keys()
    for name, tensor in host.items():
        assert torch.equal(device[name].cpu(), tensor), name


def test_plan_on_the_device_is_the_plan_on_the_host(resnet, images):
    plans = bntools.plan_fold(resnet, images), bntools.plan_fold(on_gpu(resnet), images.cuda())
    assert plans[0].decisions == plans[1].decisions
    assert {d.action for d in plans[0].decisions} == {Action.FOLD}


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), torch.zeros(2, 3, 9)),
        (nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), torch.zeros(2, 3, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), torch.zeros(2, 4, 5, 5)),
        (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), torch.zeros(2, 4)),
        (nn.ReLU(), nn.BatchNorm2d(6), torch.zeros(2, 6, 5, 5)),
    ],
    ids=["conv1d", "conv3d", "transposed", "linear", "kept"],
)
def test_kernels_of_the_device_are_recognised_like_those_of_the_host(layers):
    *parts, x = layers
    model = nn.Sequential(*parts).eval()
    randomise(model, 2)
    x = x + torch.randn(x.shape)
    host, device = bntools.plan_fold(model, x), bntools.plan_fold(on_gpu(model), x.cuda())
    assert host.decisions == device.decisions
    assert bool(host.folds) == (not isinstance(parts[0], nn.ReLU))
    if host.folds:
        assert bntools.fold(on_gpu(model), x.cuda()).report.check


def test_candidate_on_the_device_is_judged_against_a_reference_on_the_host(resnet, images):
    folded = bntools.fold(resnet, images).model
    assert bntools.verify(resnet, folded.cuda(), images)
    assert bntools.verify(resnet, on_gpu(resnet), images)
    assert bntools.verify(on_gpu(resnet), copy.deepcopy(resnet), images.cuda())
    wrong = on_gpu(resnet)
    wrong.layer3[0].bn1.eps = 1e-3
    assert not bntools.verify(resnet, wrong, images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_on_the_device_folds(resnet, images, dtype):
    model = on_gpu(resnet).to(dtype)
    result = bntools.fold(model, images.cuda().to(dtype))
    assert result.report.check
    assert len(result.report.folds) == 20
    assert {t.dtype for t in result.model.parameters()} == {dtype}


def test_generator_of_the_device_is_left_as_it_was(resnet, images):
    before = torch.cuda.get_rng_state()
    bntools.fold(on_gpu(resnet), images.cuda())
    assert torch.equal(torch.cuda.get_rng_state(), before)


# ONNX Runtime on the device


def has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


in_onnx_runtime = pytest.mark.skipif(
    not has_cuda_provider(), reason="onnxruntime has no CUDA provider (onnxruntime-gpu has)"
)


@in_onnx_runtime
def test_session_on_cuda_runs_every_node_there():
    session = open_session(linear().SerializeToString(), provider="cuda")
    placement = session.placement
    assert placement.provider == "cuda"
    assert set(placement.nodes) == {"CUDA"}
    assert placement.device == torch.cuda.get_device_name()
    assert (placement.tf32, placement.host) == (False, 0)
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    expected = open_session(linear().SerializeToString()).run({"x": x})["y"]
    assert torch.allclose(session.run({"x": x})["y"], expected, rtol=1e-6, atol=1e-6)


@in_onnx_runtime
def test_node_that_cuda_does_not_have_is_an_error_that_names_it():
    model = onnx_model(
        [node("Det", "x", "y", name="determinant")], [("x", FLOAT, [2, 3, 3])], [("y", FLOAT, [2])]
    )
    with pytest.raises(RuntimeUnavailableError, match=r"determinant \(Det\)"):
        open_session(model.SerializeToString(), provider="cuda")
    assert open_session(model.SerializeToString(), provider="auto").placement.provider == "cpu"


@in_onnx_runtime
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_fold_is_verified_in_onnx_runtime_on_the_device(resnet, images, dtype):
    folded = bntools.fold(resnet, images).model
    how = {"runtime": "onnxruntime", "provider": "cuda", "dtype": dtype}
    result = bntools.verify(resnet, folded, images, **how)
    assert result, str(result)
    assert result.placement.provider == "cuda"
    assert result.placement.nodes["CUDA"] > 20
    folded.layer3[0].conv1.bias.data[3] += 1.0
    assert not bntools.verify(resnet, folded, images, **how)


@in_onnx_runtime
def test_tf32_is_judged_by_its_own_rounding_in_onnx_runtime(resnet, images):
    reference = bntools.Reference(resnet, images)
    how = {"runtime": "onnxruntime", "provider": "cuda"}
    exact = reference.judge(resnet, **how)
    coarse = reference.judge(resnet, **how, allow_tf32=True)
    assert exact, str(exact)
    assert coarse, str(coarse)
    assert (exact.placement.tf32, coarse.placement.tf32) == (False, True)
    assert exact.worst.limit < 1e-4 < coarse.worst.limit


def test_candidate_is_moved_to_the_device_and_the_original_stays(resnet, images):
    result = bntools.verify(resnet, resnet, images, provider="cuda")
    assert result, str(result)
    assert result.placement.device == torch.cuda.get_device_name()
    assert devices(resnet) == {"cpu"}
    auto = bntools.verify(resnet, resnet, images, provider="auto")
    assert auto.placement.provider == "cuda"
    wrong = copy.deepcopy(resnet)
    wrong.layer3[0].bn1.eps = 1e-3
    assert not bntools.verify(resnet, wrong, images, provider="cuda")


def test_tf32_is_off_unless_it_is_allowed(resnet, images):
    """Whatever torch is set to: verify has its own setting, and restores torch's."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    exact = bntools.verify(resnet, resnet, images, provider="cuda")
    coarse = bntools.verify(resnet, resnet, images, provider="cuda", allow_tf32=True)
    assert torch.backends.cudnn.allow_tf32
    assert exact, str(exact)
    assert coarse, str(coarse)
    assert exact.worst.limit < 1e-4 < coarse.worst.limit
    assert exact.worst.error < coarse.worst.error
