"""The layout: imports point down, the CLI uses the public API, torch is not imported early."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module or package of bntools may import those with a lower number.
LAYERS = {
    "errors": 0,
    "resources": 0,
    "tables": 0,
    "affine": 10,
    "moments": 10,
    "report": 10,
    "distributed": 20,
    "imports": 20,
    "plots": 20,
    "registry": 20,
    "tolerance": 20,
    "measuring": 25,
    "outputs": 25,
    "detections": 26,
    "absorb": 30,
    "preprocessing": 30,
    "archives": 35,
    "unpickling": 45,
    "arrays": 48,
    "health": 30,
    "modules": 30,
    "norms": 30,
    "trust": 30,
    "placeholders": 25,
    "pickled_tensors": 35,
    "wanted": 35,
    "architectures": 40,
    "pickles": 40,
    "selection": 40,
    "statistics": 42,
    "building": 35,
    "targets": 40,
    "rewriting": 42,
    "naming": 43,
    "activations": 60,
    "checking": 79,
    "replacing": 103,
    "recipe": 45,
    "originals": 46,
    "applying": 91,
    "checkpoints": 50,
    "programs": 48,
    "scripted": 95,
    "dataflow": 50,
    "examples": 60,
    "sources": 65,
    "datasets": 67,
    "shards": 67,
    "inputs": 70,
    "data": 70,
    "runtimes": 70,
    "equivalence": 75,
    "randomness": 74,
    "subjects": 78,
    "batches": 79,
    "fitting": 77,
    "distilling": 78,
    "verifying": 97,
    "observing": 75,
    "latency": 76,
    "calibration": 78,
    "planning": 79,
    "evaluation": 78,
    "drift": 80,
    "watching": 81,
    "onnx_graph": 77,
    "scopes": 82,
    "baseline": 83,
    "depth": 85,
    "surgery": 80,
    "inspection": 90,
    "identifying": 76,
    "handwritten": 92,
    "loading": 90,
    "proving": 90,
    "saving": 106,
    "writing": 20,
    "formats": 88,
    "artifacts": 95,
    "merging": 94,
    "judging": 95,
    "drawing": 96,
    "folders": 96,
    "page": 96,
    "shipping": 108,
    "pipeline": 100,
    "publishing": 105,
    "calibrating": 100,
    "recalibrating": 102,
    "onnx_surgery": 102,
    "__init__": 110,
}
SIBLINGS_MAY_IMPORT_EACH_OTHER = {
    "tables",
    "calibration",
    "dataflow",
    "fitting",
    "formats",
    "merging",
    "norms",
    "onnx_graph",
    "onnx_surgery",
    "planning",
    "plots",
    "programs",
    "report",
    "rewriting",
    "runtimes",
}
OPEN_TO_CLI = {"errors", "report"}


def package_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name; a package is named by its `__init__`, so that every name has a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node, deferred imports included, but for what only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if is_for_types_only(node):
            continue
        yield node
        yield from running_nodes(node)


def imported_names(source: str, importer: str) -> set[str]:
    """What a module imports or reaches through `bntools`: `from a import b` counts as `a.b`."""
    names = set()
    for node in running_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = importer.split(".")[: -node.level] if node.level else []
            origin = ".".join([*package, *filter(None, [node.module])])
            names.update(f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "bntools":
            names.add(f"bntools.{node.attr}")
    return names


def imported_parts(source: str, importer: str) -> set[str]:
    """The keys of LAYERS that a module imports; a public name comes from `__init__`."""
    parts = set()
    for name in imported_names(source, importer):
        package, _, rest = name.partition(".")
        if package == "bntools":
            part = rest.split(".")[0]
            parts.add(part if part in LAYERS else "__init__")
    return parts


def upward_imports(source: str, importer: str) -> list[str]:
    """The imports of a module of bntools that do not point down."""
    own = importer.split(".")[1]
    return [
        f"{importer} (layer {LAYERS[own]}) imports {part} (layer {LAYERS[part]})"
        for part in sorted(imported_parts(source, importer))
        if LAYERS[part] >= LAYERS[own]
        and not (part == own and own in SIBLINGS_MAY_IMPORT_EACH_OTHER)
    ]


def internals_used(source: str, importer: str) -> list[str]:
    """The imports of a module of the command line that are not public."""
    return [
        f"{importer} imports bntools.{part}"
        for part in sorted(imported_parts(source, importer) - OPEN_TO_CLI - {"__init__"})
    ]


def print_calls(source: str) -> list[int]:
    """The line numbers of calls of `print`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]


def modules_imported_by(*arguments: str) -> set[str]:
    """The top-level modules that a fresh interpreter imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_every_module_has_a_layer():
    """A new module of bntools says where it belongs."""
    parts = {module_name(path).split(".")[1] for path in package_files("bntools")}
    assert sorted(parts - set(LAYERS)) == []


def test_imports_point_down():
    """No module imports one of its own layer or of a higher one."""
    files = package_files("bntools")
    assert [
        line for f in files for line in upward_imports(f.read_text("utf-8"), module_name(f))
    ] == []


def test_the_command_line_imports_only_the_public_api():
    """What the commands can do, a user of the API can do."""
    files = package_files("cli")
    assert [
        line for f in files for line in internals_used(f.read_text("utf-8"), module_name(f))
    ] == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("bntools.affine", "from bntools import planning"),
        ("bntools.affine", "import bntools.planning as p"),
        ("bntools.affine", "from bntools.dataflow.graph import Graph"),
        ("bntools.affine", "from bntools import fold"),
        ("bntools.affine", "def late():\n    from .absorb import absorb_after"),
        ("bntools.affine", "from bntools.registry import register_norm"),
        ("bntools.surgery.folding", "from bntools.surgery import freezing"),
        ("bntools.surgery.folding", "from . import freezing"),
        ("bntools.surgery.folding", "from ..pipeline import fold"),
        ("bntools.dataflow.graph", "from bntools.planning import plan_fold"),
    ],
)
def test_an_import_that_does_not_point_down_is_found(importer: str, source: str):
    """The check sees every way of writing an import."""
    assert len(upward_imports(source, importer)) == 1


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("bntools.absorb", "from bntools.affine import Affine\nimport torch.nn"),
        ("bntools.dataflow.recorder", "from bntools.dataflow.graph import Graph"),
        ("bntools.dataflow.recorder", "from .graph import Graph"),
        ("bntools.surgery.folding", "from bntools import errors\nfrom .. import recipe"),
        ("bntools.tables", "if TYPE_CHECKING:\n    from bntools.report import Plan"),
        ("bntools.__init__", "from . import pipeline"),
    ],
)
def test_an_import_that_points_down_is_allowed(importer: str, source: str):
    """So are siblings in dataflow, and imports for types only."""
    assert upward_imports(source, importer) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import bntools\nbntools.fold(model)\nfrom . import options", 0),
        ("from bntools import fold\nfrom bntools.errors import BNToolsError", 0),
        ("from bntools import report", 0),
        ("from bntools import planning", 1),
        ("from bntools.dataflow import recorder", 1),
        ("import bntools\nbntools.loading.load(path)", 1),
    ],
)
def test_an_import_of_internals_is_found(source: str, count: int):
    """The check tells the public names from the modules behind them."""
    assert len(internals_used(source, "cli.main")) == count


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import bntools"),
        ("-m", "bntools_cli", "--help"),
        ("-m", "bntools_cli", "--version"),
    ],
    ids=["import", "help", "version"],
)
def test_torch_is_not_imported_before_it_is_needed(arguments: tuple[str, ...]):
    """Importing torch takes seconds."""
    imported = modules_imported_by(*arguments)
    assert "bntools" in imported
    assert "torch" not in imported


def test_a_module_that_imports_torch_is_found():
    """The check sees what is imported on the way."""
    assert "torch" in modules_imported_by("-c", "import bntools.affine")


def test_no_module_is_named_utils():
    """A module is named after what it holds."""
    folders = ["bntools", "cli", "samples", "tests"]
    assert [f for folder in folders for f in package_files(folder) if f.stem == "utils"] == []


def test_the_library_does_not_print():
    """What there is to say is returned, raised or logged."""
    assert print_calls("def f():\n    print(1)") == [2]
    found = {module_name(f): print_calls(f.read_text("utf-8")) for f in package_files("bntools")}
    assert {name: lines for name, lines in found.items() if lines} == {}
