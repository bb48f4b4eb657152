"""ONNX Runtime sessions: they run where they were asked to, or say in one line why not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto
from onnx_models import BFLOAT16, FLOAT, HALF, INT64, linear, node, onnx_model, same

from bntools.errors import InputError, LoadError, RuntimeUnavailableError
from bntools.runtimes import providers
from bntools.runtimes.hosting import data_nodes
from bntools.runtimes.precision import tf32
from bntools.runtimes.sessions import open_session

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def opened(model: onnx.ModelProto, **how):
    return open_session(model.SerializeToString(), **how)


def told(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "]", "'", "onnxruntime"))
    return message


# What goes in comes out


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (FLOAT, torch.float32),
        (TensorProto.DOUBLE, torch.float64),
        (HALF, torch.float16),
        (BFLOAT16, torch.bfloat16),
        (INT64, torch.int64),
        (TensorProto.INT8, torch.int8),
        (TensorProto.UINT8, torch.uint8),
        (TensorProto.BOOL, torch.bool),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [3, 0])
def test_values_of_every_dtype_pass_through_unchanged(kind, dtype, rows):
    session = opened(same(kind))
    x = (X[:rows] * 10).to(dtype)
    y = session.run({"x": x})["y"]
    assert y.dtype == dtype
    assert torch.equal(y, x)


def test_inputs_that_are_views_are_read_as_they_look():
    y = opened(same(FLOAT)).run({"x": X.T[:, :3].T[:, :4].flip(0)})["y"]
    assert torch.equal(y, X.flip(0))


def test_ports_say_what_the_model_takes_and_gives():
    session = opened(linear())
    (port,) = session.inputs
    assert (port.name, port.dtype, port.shape, port.symbols) == (
        "x",
        torch.float32,
        (None, 4),
        ("n", None),
    )
    assert session.expected == "x: nx4 float32"
    assert [p.name for p in session.outputs] == ["y"]


def test_result_stays_when_the_session_is_gone():
    session = opened(same(BFLOAT16))
    y = session.run({"x": X.bfloat16()})["y"]
    del session
    assert torch.equal(y, X.bfloat16())


def test_metadata_of_the_file_can_be_read():
    model = linear()
    onnx.helper.set_model_props(model, {"bntools_version": "1"})
    assert opened(model).metadata == {"bntools_version": "1"}


@pytest.mark.parametrize(
    ("feeds", "says"),
    [
        ({}, "it lacks x"),
        ({"x": X, "z": X}, "there is no z"),
        ({"z": X}, "it lacks x and there is no z"),
        ({"x": X.double()}, "x is float64"),
        ({"x": X.long()}, "x is int64"),
        ({"x": X[:, :3]}, r"shape \(3, 3\)"),
        ({"x": X[0]}, r"shape \(4,\)"),
    ],
)
def test_wrong_inputs_are_an_error_that_says_what_is_expected(feeds, says):
    with pytest.raises(InputError, match=says) as caught:
        opened(linear()).run(feeds)
    assert "x: nx4 float32" in told(caught)


def test_inputs_that_fail_in_the_graph_are_an_error_of_one_line(capfd):
    model = onnx_model(
        [node("Add", "x z", "y")],
        [("x", FLOAT, ["n", "c"]), ("z", FLOAT, ["n", "d"])],
        [("y", FLOAT, ["n", "c"])],
    )
    with pytest.raises(InputError, match="x 3x4 float32, z 3x3 float32") as caught:
        opened(model).run({"x": X, "z": X[:, :3]})
    told(caught)
    assert capfd.readouterr() == ("", "")


# Files


def write_large(folder: Path) -> Path:
    path = folder / "large.onnx"
    onnx.save(linear(), path, save_as_external_data=True, location="large.data", size_threshold=0)
    return path


def test_weights_in_a_second_file_are_found_beside_the_first(tmp_path):
    path = write_large(tmp_path)
    expected = opened(linear()).run({"x": X})["y"]
    assert torch.equal(open_session(path).run({"x": X})["y"], expected)
    session = open_session(path.read_bytes(), beside=tmp_path)
    assert torch.equal(session.run({"x": X})["y"], expected)


def test_missing_second_file_is_a_load_error(tmp_path, capfd):
    path = write_large(tmp_path)
    (tmp_path / "large.data").unlink()
    with pytest.raises(LoadError, match=r"large\.onnx") as caught:
        open_session(path)
    assert "large.data" in told(caught)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x08\x09\x12"], ids=["empty", "text", "cut"]
)
def test_damaged_file_is_a_load_error_of_one_line(tmp_path, content, capfd):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"Cannot load .*broken\.onnx") as caught:
        open_session(path)
    told(caught)
    assert capfd.readouterr() == ("", "")


def test_cut_file_is_a_load_error(tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(linear().SerializeToString()[:100])
    with pytest.raises(LoadError, match="damaged"):
        open_session(path)


def test_missing_file_and_folder_are_load_errors(tmp_path):
    for path in (tmp_path / "nothing.onnx", tmp_path):
        with pytest.raises(LoadError, match="no such file"):
            open_session(path)


def test_graph_that_makes_no_sense_is_a_load_error():
    model = onnx_model([node("Relu", "nowhere", "y")], [("x", FLOAT, [4])], [("y", FLOAT, [4])])
    with pytest.raises(LoadError, match="refuses it") as caught:
        opened(model)
    told(caught)


def test_operation_without_a_kernel_is_named():
    model = onnx_model([node("Add", "x x", "y")], [("x", BFLOAT16, [4])], [("y", BFLOAT16, [4])])
    with pytest.raises(RuntimeUnavailableError, match="Add") as caught:
        opened(model)
    told(caught)


# Providers


def test_session_on_the_cpu_says_where_its_nodes_ran():
    placement = opened(linear(), optimise=False).placement
    assert (placement.runtime, placement.provider, placement.tf32) == ("ONNX Runtime", "cpu", None)
    assert placement.nodes == {"CPU": 3}
    assert placement.versions["onnxruntime"]
    assert "3 on CPU" in str(placement)


def test_there_are_three_providers():
    with pytest.raises(InputError, match="cpu, cuda, auto"):
        opened(linear(), provider="tpu")


def test_missing_package_is_an_error_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeUnavailableError, match="pip install onnxruntime"):
        opened(linear())


class FakeNode(SimpleNamespace):
    """What ONNX Runtime tells of a node."""


class FakeRuntime:
    """ONNX Runtime with a CUDA provider, of which a test decides what it does."""

    __version__ = "9.9"
    cuda_version = "13.0"
    __file__ = "/nowhere/onnxruntime/__init__.py"

    def __init__(self, *, gets="CUDA", on_cpu=(), available=True, raises=None):
        import onnxruntime

        self.real = onnxruntime
        self.gets, self.on_cpu, self.available, self.raises = gets, on_cpu, available, raises
        self.opened: list[tuple[dict[str, str], list]] = []
        self.severities: list[int] = []
        self.GraphOptimizationLevel = onnxruntime.GraphOptimizationLevel

    def SessionOptions(self):  # noqa: N802 - its name there
        settings: dict[str, str] = {}
        return SimpleNamespace(
            settings=settings, add_session_config_entry=settings.__setitem__, log_severity_level=2
        )

    def get_available_providers(self):
        return ["CPUExecutionProvider", *(["CUDAExecutionProvider"] if self.available else [])]

    def set_default_logger_severity(self, level):
        self.severities.append(level)

    def preload_dlls(self):
        sys.stdout.write("Failed to load libcublas.so.13: cannot open shared object file\n")

    def InferenceSession(self, source, options, providers):  # noqa: N802 - its name there
        self.opened.append((options.settings, providers))
        sys.stdout.write("EP Error, falling back")
        on_gpu = self.gets == "CUDA" and providers != ["CPUExecutionProvider"]
        if options.settings.get("session.disable_cpu_ep_fallback") == "1" and (
            self.on_cpu or not on_gpu
        ):
            raise RuntimeError("This session contains graph nodes that are assigned to the CPU")
        if self.raises is not None:
            raise self.raises
        real = self.real.InferenceSession(source, providers=["CPUExecutionProvider"])
        nodes = [
            FakeNode(name=n.name, op_type=n.op_type)
            for n in onnx.load_from_string(source).graph.node
        ]
        parts = {
            "CUDAExecutionProvider": [n for n in nodes if n.name not in self.on_cpu],
            "CPUExecutionProvider": [n for n in nodes if n.name in self.on_cpu],
        }
        if not on_gpu:
            parts = {"CPUExecutionProvider": nodes}
        return SimpleNamespace(
            get_inputs=real.get_inputs,
            get_outputs=real.get_outputs,
            get_providers=lambda: [name for name, part in parts.items() if part],
            get_provider_graph_assignment_info=lambda: [
                SimpleNamespace(ep_name=name, get_nodes=lambda part=part: part)
                for name, part in parts.items()
            ],
        )


@pytest.fixture
def fake(monkeypatch):
    def install(**behaviour) -> FakeRuntime:
        runtime = FakeRuntime(**behaviour)
        monkeypatch.setattr(providers, "_onnxruntime", lambda: runtime)
        return runtime

    return install


def shaped() -> onnx.ModelProto:
    """Reshapes by a shape that is computed, and then adds."""
    return onnx_model(
        [
            node("Shape", "x", "s"),
            node("Gather", "s zero", "g"),
            node("Unsqueeze", "g axis", "u"),
            node("Concat", "u minus", "c", axis=0),
            node("Reshape", "x c", "r"),
            node("Add", "r r", "y"),
        ],
        [("x", FLOAT, ["n", 2, 2])],
        [("y", FLOAT, ["n", 4])],
        {
            "zero": torch.tensor(0).numpy(),
            "axis": torch.tensor([0]).numpy(),
            "minus": torch.tensor([-1]).numpy(),
        },
    )


def test_cuda_is_asked_for_without_tf32_and_without_a_fallback(fake, capfd):
    runtime = fake()
    placement = opened(linear(), provider="cuda").placement
    ((settings, asked),) = runtime.opened
    assert settings["session.disable_cpu_ep_fallback"] == "1"
    assert settings["session.record_ep_graph_assignment_info"] == "1"
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"})]
    assert (placement.provider, placement.nodes, placement.tf32) == ("cuda", {"CUDA": 3}, False)
    assert placement.versions == {"onnxruntime": "9.9", "CUDA": "13.0"}
    assert runtime.severities == [4, 2]
    assert capfd.readouterr() == ("", "")


def test_tf32_is_on_where_it_is_allowed(fake):
    runtime = fake()
    assert opened(linear(), provider="cuda", allow_tf32=True).placement.tf32 is True
    assert runtime.opened[0][1] == [("CUDAExecutionProvider", {"use_tf32": "1"})]


def test_package_without_cuda_is_an_error_that_names_the_other(fake):
    fake(available=False)
    with pytest.raises(RuntimeUnavailableError, match=r"onnxruntime-gpu\[cuda,cudnn\]") as caught:
        opened(linear(), provider="cuda")
    assert "onnxruntime 9.9" in told(caught)


def test_session_that_silently_got_the_cpu_is_an_error_that_names_the_library(fake):
    fake(gets="CPU")
    with pytest.raises(RuntimeUnavailableError, match=r"libcublas\.so\.13 is missing") as caught:
        opened(linear(), provider="cuda")
    told(caught)


def test_library_that_the_provider_itself_lacks_is_named(fake, tmp_path, monkeypatch):
    runtime = fake(gets="CPU")
    folder = tmp_path / "capi"
    folder.mkdir()
    (folder / "libonnxruntime_providers_cuda.so").write_bytes(b"")
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "__init__.py"))

    def load(_):
        raise OSError("libcudnn.so.9: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(providers.ctypes, "CDLL", load)
    with pytest.raises(RuntimeUnavailableError, match=r"library libcudnn\.so\.9 is missing"):
        opened(linear(), provider="cuda")
    missing = "libcuda.so.1: cannot open shared object file: No such file or directory"
    monkeypatch.setattr(providers.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError(missing)))
    with pytest.raises(RuntimeUnavailableError, match="no NVIDIA driver"):
        opened(linear(), provider="cuda")


def test_node_with_data_on_the_cpu_is_an_error_that_names_it(fake):
    fake(on_cpu=("matmul_m",))
    with pytest.raises(RuntimeUnavailableError, match=r"matmul_m \(MatMul\)") as caught:
        opened(linear(), provider="cuda")
    told(caught)


def test_shape_arithmetic_may_stay_on_the_host(fake):
    fake(on_cpu=("shape_s", "gather_g", "unsqueeze_u", "concat_c"))
    placement = opened(shaped(), provider="cuda").placement
    assert placement.nodes == {"CUDA": 2, "CPU": 4}
    assert placement.host == 4
    assert "4 of them shape arithmetic" in str(placement)
    fake(on_cpu=("shape_s", "add_y"))
    with pytest.raises(RuntimeUnavailableError, match=r"add_y \(Add\)"):
        opened(shaped(), provider="cuda")


def test_auto_picks_cuda_where_it_works_and_says_so(fake):
    fake()
    placement = opened(linear(), provider="auto").placement
    assert placement.provider == "cuda"
    assert "picked because CUDA works" in str(placement)


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ({"available": False}, "package for the CPU"),
        ({"gets": "CPU"}, "libcublas"),
        ({"on_cpu": ("matmul_m",)}, "matmul_m"),
    ],
    ids=["package", "library", "node"],
)
def test_auto_picks_the_cpu_where_cuda_does_not_work_and_says_why(fake, behaviour, says):
    fake(**behaviour)
    placement = opened(linear(), provider="auto").placement
    assert placement.provider == "cpu"
    assert placement.reason.startswith("picked because ")
    assert says in placement.reason


def test_file_that_is_damaged_stays_a_load_error_with_cuda(fake):
    fake(raises=ValueError("what a file"))
    for provider in ("cuda", "auto"):
        with pytest.raises(LoadError, match="what a file"):
            opened(linear(), provider=provider)


def test_nodes_that_only_handle_shapes_are_told_from_those_with_data():
    content = shaped().SerializeToString()
    every = [(n.name, n.op_type) for n in shaped().graph.node]
    assert data_nodes(content, every) == [("reshape_r", "Reshape"), ("add_y", "Add")]
    # a node that the optimiser made counts by its operation
    made = [("new", "Add"), ("new", "Gather"), ("new", "Conv"), ("", "Concat")]
    assert data_nodes(content, made) == [("new", "Add"), ("new", "Conv")]


# TF32 in PyTorch


def precisions():
    return [
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    ]


def fail_inside(allowed):
    expected = "tf32" if allowed else "ieee"
    with tf32(allowed):
        assert torch.backends.cudnn.conv.fp32_precision == expected
        assert torch.backends.cudnn.rnn.fp32_precision == expected
        assert torch.backends.cuda.matmul.fp32_precision == expected
        raise ZeroDivisionError("zero")


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_switched_inside_and_restored_after(allowed):
    before = precisions()
    with pytest.raises(ZeroDivisionError, match="zero"):
        fail_inside(allowed)
    assert precisions() == before
