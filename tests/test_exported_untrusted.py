"""Exported programs from strangers: whatever torch would run, evaluate or unpickle, is refused."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._export.verifier import SpecViolationError

import bntools
from bntools.errors import LoadError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")

Data = dict[str, Any]


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The members of a sound file, by their names."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (torch.zeros(2, 3, 4, 4),), dynamic_shapes=shapes)
    path = tmp_path_factory.mktemp("sound") / "model.pt2"
    torch.export.save(program, path)
    with zipfile.ZipFile(path) as whole:
        return {info.filename: whole.read(info) for info in whole.infolist()}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def written(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "hostile.pt2"
    with zipfile.ZipFile(path, "w") as whole:
        for name, data in members.items():
            whole.writestr(name, data)
    return path


def with_json(
    members: dict[str, bytes], ending: str, change: Callable[[Data], object]
) -> dict[str, bytes]:
    """The members with one JSON file changed."""
    name = next(name for name in members if name.endswith(ending))
    content = json.loads(members[name])
    change(content)
    return {**members, name: json.dumps(content).encode()}


def pickled(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def folder_of(members: dict[str, bytes]) -> str:
    return next(iter(members)).partition("/")[0]


def refused(path: Path, canary: Path, match: str) -> None:
    """Loading, and running what is loaded, says so in one line and runs nothing."""
    with pytest.raises(LoadError, match=match) as raised:
        bntools.load(path)(torch.zeros(2, 3, 4, 4))
    assert "\n" not in str(raised.value)
    assert not canary.exists()


def test_the_canary_sings_in_torchs_own_reader(archive, canary, tmp_path):
    """So that the tests below mean something."""
    with pytest.raises(SpecViolationError, match="not an instance"):
        torch.export.load(written(tmp_path, _pickled_weight(archive, canary)))
    assert canary.exists()


def _pickled_weight(members: dict[str, bytes], canary: Path) -> dict[str, bytes]:
    """A weight that says that it is pickled: torch unpickles it without asking."""

    def change(config: Data) -> None:
        for payload in config["config"].values():
            if payload["path_name"] == "weight_0":
                payload["use_pickle"] = True

    changed = with_json(members, "model_weights_config.json", change)
    data = pickled({"canary": Canary(canary), "weight": torch.zeros(4, 3, 1, 1)})
    return {**changed, f"{folder_of(members)}/data/weights/weight_0": data}


def test_pickled_weights_are_not_read(archive, canary, tmp_path):
    """Those that the configuration says to unpickle."""
    path = written(tmp_path, _pickled_weight(archive, canary))
    refused(path, canary, "is pickled .* can run any code, and was not read")


@pytest.mark.parametrize("part", ["weights", "constants"])
def test_weights_of_older_archives_go_the_way_of_every_pickle(part, archive, canary, tmp_path):
    """`data/weights/model.pt` is unpickled in full by torch where its own check fails."""
    members = {**archive, f"{folder_of(archive)}/data/{part}/model.pt": pickled(Canary(canary))}
    refused(written(tmp_path, members), canary, "asks for .*touch|which can run any code")


def test_the_oldest_archives_are_no_way_in(archive, canary, tmp_path):
    """The layout up to torch 2.7."""
    model = next(data for name, data in archive.items() if name.endswith("model.json"))
    members = {
        "version": b"8.20",
        "serialized_exported_program.json": model,
        "serialized_state_dict.pt": pickled(Canary(canary)),
    }
    refused(written(tmp_path, members), canary, "which can run any code")


@pytest.mark.parametrize("kind", ["custom_obj_0", "opaque_obj_0"])
def test_objects_among_the_constants_are_not_read(kind, archive, canary, tmp_path):
    """Torch calls pickle.loads on some, TorchScript's unpickler on others."""

    def change(config: Data) -> None:
        config["config"]["thing"] = {
            "path_name": kind,
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }

    members = with_json(archive, "model_constants_config.json", change)
    name = f"{folder_of(archive)}/data/constants/{kind}"
    members = {**members, name: pickle.dumps(Canary(canary))}
    refused(written(tmp_path, members), canary, "thing is pickled")


def test_example_inputs_are_not_unpickled(archive, canary, tmp_path):
    """Torch unpickles them in full where its own check fails; nobody needs them."""
    name = next(name for name in archive if name.endswith("sample_inputs/model.pt"))
    path = written(tmp_path, {**archive, name: pickled(Canary(canary))})
    assert bntools.load(path)(torch.zeros(2, 3, 4, 4)).shape == (2, 4, 4, 4)
    assert not canary.exists()


def _nodes(data: Data) -> list[Data]:
    return data["graph_module"]["graph"]["nodes"]  # type: ignore[no-any-return] # it is JSON


def _calls(target: str, *arguments: Data) -> Callable[[Data], None]:
    """A change that lets the last node call something else."""

    def change(data: Data) -> None:
        node = _nodes(data)[-1]
        node["target"] = target
        inputs = [{"name": "", "arg": argument, "kind": 1} for argument in arguments]
        node["inputs"] = [*node["inputs"], *inputs] if arguments else node["inputs"]

    return change


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.hub.load_state_dict_from_url",
        "torch.serialization.load",
        "torch._C._jit_set_profiling_mode",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "math.factorial",
        "builtins.exec",
        "torch.ops.load_library",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.t",
        "torch.ops.aten.set_.source_Storage",
        "torch.ops.aten._foobar.default",
        "torch.ops.image.write_file.default",
        "torch.ops.higher_order.while_loop",
        "torch.ops.aten.__class__.default",
        "torch.ops.aten.relu.__class__",
        "#extension:thing",
    ],
)
def test_graphs_call_operations_on_tensors_alone(target, archive, canary, tmp_path):
    """Torch resolves any dotted name under torch, math and operator."""
    path = written(tmp_path, with_json(archive, "models/model.json", _calls(target)))
    refused(path, canary, "its graph calls")


def test_operations_of_other_libraries_want_trust(archive, canary, tmp_path):
    """They are somebody's code; with --trust they run, where they are registered."""
    library = torch.library.Library("bntools_test_ops", "DEF")
    library.define("halve(Tensor x) -> Tensor")
    library.impl("halve", lambda x: x / 2, "CPU")

    def change(data: Data) -> None:
        node = _nodes(data)[-1]
        node["target"] = "torch.ops.bntools_test_ops.halve.default"
        node["inputs"][0]["name"] = "x"

    path = written(tmp_path, with_json(archive, "models/model.json", change))
    refused(path, canary, "of the library 'bntools_test_ops'. .* add --trust")
    model = bntools.load(path, trust=True)
    assert model(torch.ones(2, 3, 4, 4)).shape == (2, 4, 4, 4)


def test_names_do_not_become_code(archive, canary, tmp_path):
    """Torch writes names of values into the Python source that it executes."""
    evil = f"x):\n    __import__('pathlib').Path({str(canary)!r}).touch()\n#"

    def change(data: Data) -> None:
        text = json.dumps(data).replace('"relu"', json.dumps(evil))
        data.clear()
        data.update(json.loads(text))

    refused(written(tmp_path, with_json(archive, "models/model.json", change)), canary, "no name")


def test_argument_names_do_not_become_code(archive, canary, tmp_path):
    """They are in the signature of the function that torch generates."""
    evil = f"x=__import__('pathlib').Path({str(canary)!r}).touch()"

    def change(data: Data) -> None:
        data["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [evil]

    path = written(tmp_path, with_json(archive, "models/model.json", change))
    bntools.load(path)(torch.zeros(2, 3, 4, 4))
    assert not canary.exists()


def test_sizes_are_not_evaluated(archive, canary, tmp_path):
    """Sympify evaluates Python; here an expression that is no arithmetic has no value."""
    evil = f"__import__('pathlib').Path({str(canary)!r}).touch() or Symbol('s77')"

    def change(data: Data) -> None:
        for meta in data["graph_module"]["graph"]["tensor_values"].values():
            for size in (*meta["sizes"], *meta["strides"]):
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = evil

    path = written(tmp_path, with_json(archive, "models/model.json", change))
    bntools.load(path)(torch.zeros(2, 3, 4, 4))
    assert not canary.exists()


def test_conditions_are_not_executed(archive, canary, tmp_path):
    """Torch executes guards; what is not understood here is told and not checked."""
    evil = f"__import__('pathlib').Path({str(canary)!r}).touch()"

    def change(data: Data) -> None:
        data["guards_code"] = [evil, "(lambda: 1)() == 1", "L['args_0'].size()[1] == 3"]

    read = bntools.read_model(written(tmp_path, with_json(archive, "models/model.json", change)))
    assert read.notes == ("1 conditions on the inputs are not understood and not checked",)
    read.model(torch.zeros(2, 3, 4, 4))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        ("collections.defaultdict", '{"default_factory_module": "os", "default_factory_name": 1}'),
        ("builtins.dict", '[{"__enum__": true, "fqn": "os:system", "name": "x"}]'),
        ("transformers.modeling_outputs.BaseModelOutput", "[]"),
    ],
)
def test_containers_do_not_import(kind, context, archive, canary, tmp_path):
    """Torch imports what a container's context names."""

    def change(data: Data) -> None:
        root = data["graph_module"]["module_call_graph"][0]["signature"]
        leaf = {"type": None, "context": None, "children_spec": []}
        spec = {"type": kind, "context": context, "children_spec": [leaf]}
        root["out_spec"] = json.dumps([1, spec])

    path = written(tmp_path, with_json(archive, "models/model.json", change))
    refused(path, canary, "only its own code can build|does not have the keys")


def test_a_program_in_a_whole_module_file_is_checked_as_well(archive, canary, tmp_path):
    """A .pt may hold a program with any plan: it is examined before it runs."""
    model = bntools.load(written(tmp_path, archive))
    model.plan = model.plan.replace('"module": "2"', '"target": "torch.os.system"')
    torch.save(model, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", canary, "calls 'torch.os.system'|is damaged")


def _broken(name: str, data: Data) -> None:
    graph = data["graph_module"]["graph"]
    if name == "no-signature":
        del data["graph_module"]["signature"]
    elif name == "lists-for-dicts":
        graph["tensor_values"] = []
    elif name == "unknown-value":
        graph["nodes"][0]["inputs"][0]["arg"]["as_tensor"]["name"] = "nobody"
    elif name == "two-outputs":
        graph["nodes"][0]["outputs"] *= 2
    elif name == "missing-tensor":
        data["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = "no"
    elif name == "path-with-gaps":
        text = json.dumps(data).replace('"0.weight"', '"0..weight"')
        data.clear()
        data.update(json.loads(text))
    elif name == "huge-rank":
        graph["nodes"][0]["inputs"] = [{"name": "input", "arg": {"as_int": 10**30}, "kind": 1}]


@pytest.mark.parametrize(
    "name",
    [
        "no-signature",
        "lists-for-dicts",
        "unknown-value",
        "two-outputs",
        "missing-tensor",
        "path-with-gaps",
        "huge-rank",
    ],
)
def test_damaged_graphs_are_told_in_a_line(name, archive, canary, tmp_path):
    """Nothing but a LoadError, whatever is wrong."""
    members = with_json(archive, "models/model.json", lambda data: _broken(name, data))
    path = written(tmp_path, members)
    with pytest.raises((LoadError, bntools.BNToolsError, ValueError, RuntimeError)) as raised:
        bntools.load(path)(torch.zeros(2, 3, 4, 4))
    if name not in ("two-outputs", "huge-rank"):
        assert isinstance(raised.value, LoadError)
    assert not canary.exists()


def test_weights_beyond_their_storage_are_refused(archive, canary, tmp_path):
    """No memory but the file's own is read."""

    def change(config: Data) -> None:
        for payload in config["config"].values():
            payload["tensor_meta"]["storage_offset"] = {"as_int": 10**6}

    members = with_json(archive, "model_weights_config.json", change)
    refused(written(tmp_path, members), canary, "it is damaged")


def test_compressed_archives_are_refused(archive, canary, tmp_path):
    """As torch.export never writes them."""
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as whole:
        for name, data in archive.items():
            whole.writestr(name, data)
    refused(path, canary, "compressed")
