"""The commands that answer with no model, run on files of every format: `answers(folder)`.

Each is typed as a user would, on a file that `round_trips.py` wrote, in a process that has not seen
the model. What is wrong is told in one line; nothing is where the file answers as the model does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from randomise import difference, outputs

import bntools

__all__ = [
    "ALLOW",
    "ANSWER_VERBS",
    "QUICK",
    "SLOW",
    "WEIGHTS",
    "Case",
    "answers",
    "health",
    "run_onnx",
]

ALLOW = ("round_trips.Odd", "round_trips.Moving")
WEIGHTS = ("state dict", "safetensors")
SHIPPED = {"certificate.json", "model.onnx", "model.pt", "report.html"}
SLOW, QUICK = frozenset({"export", "ship"}), ("torch.export",)
# An export is rounded otherwise than the model, of which the check in bntools takes care.
LIMIT = 1e-4


@dataclass(frozen=True)
class Case:
    """A file of one format, what its model gave for an input, and the same model as torch.save."""

    file: Path
    arch: str
    format: str
    reference: Path
    input: torch.Tensor
    outputs: list[torch.Tensor]

    def run(self, verb: str, *more: Any) -> tuple[str, Any]:
        """What is wrong with a command on the file, and its JSON."""
        onnx = self.format == "ONNX" and verb != "verify"
        options = [] if onnx else [o for name in ALLOW for o in ("--allow", name)]
        options += ["--arch", self.arch] if self.format in WEIGHTS else []
        options += ["--trust"] if self.format == "TorchScript" else []
        line = [verb, *more, *options, "--json"]
        done = CliRunner().invoke(program, [str(each) for each in line])
        if done.exit_code != 0:
            return f"exit code {done.exit_code}: {done.stderr.strip()[-300:]}", None
        return "", json.loads(done.stdout)

    @property
    def inputs(self) -> list[Any]:
        """The option that gives the input."""
        path = self.file.with_name("input.npy")
        np.save(path, self.input.numpy())
        return ["--inputs", path]


def _inspect(case: Case) -> str:
    """The report from the file is that from the model, with the names that its format has."""
    problem, found = case.run("inspect", case.file, *case.inputs)
    if problem:
        return problem
    model = bntools.load(case.reference, None, ALLOW)
    expected = bntools.inspect(model, case.input).to_dict()
    if case.format in ("torch.save", *WEIGHTS):
        same = {key: value for key, value in found.items() if key != "model"} == _plain(expected)
        return "" if same else "the report differs"
    folds = case.format != "TorchScript"  # there torch's pass decides what folds
    wanted = health(expected, folds=folds)
    return "" if wanted and health(found, folds=folds) == wanted else "the layers differ"


def health(report: dict[str, Any], *, folds: bool) -> list[Any]:
    """What an inspection says of each batch norm, whatever its format calls it."""
    rows = []
    for layer in report["layers"]:
        if layer["mean"] is None:
            continue
        row = [layer[key] for key in ("path", "channels", "mean", "variance", "gamma", "frozen")]
        if folds:
            row += [layer["eps"], layer["momentum"]]
            row += [layer["decision"][key] for key in ("action", "hosts", "reason")]
            row += [[f["severity"], f["code"]] for f in _findings(report, layer["path"])]
        rows.append(row)
    return _plain(rows)


def _findings(report: dict[str, Any], path: str) -> Iterator[dict[str, Any]]:
    return (finding for finding in report["findings"] if finding["path"] == path)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _verify(case: Case) -> str:
    """The file is the same as the model, as reference and as candidate."""
    for pair in ((case.reference, case.file), (case.file, case.reference)):
        problem, found = case.run("verify", *pair, *case.inputs)
        if problem or not found["equivalent"]:
            return problem or "not equivalent"
    return ""


def _diff(case: Case) -> str:
    """No statistic has moved, and every layer with statistics was compared."""
    problem, found = case.run("diff", case.reference, case.file)
    if problem:
        return problem
    moved = [layer["path"] for layer in found["layers"] if layer["kl_max"] != 0]
    left = found["uncompared"]
    return "" if found["layers"] and not moved and not left else f"differs: {moved or left}"


def _export(case: Case) -> str:
    """ONNX Runtime gives what the model gave, folded and with every norm."""
    for more in ((), ("--no-fold",)):
        target = case.file.with_name(f"{case.file.name}.exported.onnx")
        problem, _ = case.run("export", case.file, "-o", target, "-f", *case.inputs, *more)
        if problem:
            return problem
        error = difference(run_onnx(target, case.input), case.outputs)
        target.unlink()
        if not error < LIMIT:
            return f"the ONNX file {' '.join(more)} is off by {error:.2g}"
    return ""


def _ship(case: Case) -> str:
    """The folder is there, whole; both models in it give what the model gave."""
    folder = case.file.with_name(f"{case.file.name}.shipped")
    problem, found = case.run("ship", case.file, "-o", folder, *case.inputs)
    if problem:
        return problem
    names = {path.name for path in folder.iterdir()}
    if names != SHIPPED or found["output"] != str(folder):
        return f"the folder holds {sorted(names)}"
    shipped = outputs(bntools.load(folder / "model.pt", None, ALLOW), case.input)
    for given in (shipped, run_onnx(folder / "model.onnx", case.input)):
        if not difference(given, case.outputs) < LIMIT:
            return f"what was shipped is off by {difference(given, case.outputs):.2g}"
    return ""


ANSWER_VERBS: dict[str, Callable[[Case], str]] = {
    "diff": _diff,
    "export": _export,
    "inspect": _inspect,
    "ship": _ship,
    "verify": _verify,
}


def run_onnx(source: bytes | Path, x: torch.Tensor) -> list[torch.Tensor]:
    """What ONNX Runtime gives for an input."""
    import onnxruntime

    model = source if isinstance(source, bytes) else str(source)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(each) for each in found]


def answers(
    folder: Path, verbs_of: dict[str, frozenset[str]], *, quick: bool = False
) -> list[dict[str, str]]:
    """Every command that a format supports, on the files in a folder as they were first written.

    `quick` exports and ships programs only.
    """
    found = []
    for note in sorted(folder.glob("*.base*.json")):
        told = json.loads(note.read_text())
        file, name = folder / told["file"], told["format"]
        reference = folder / f"{file.name.partition('.')[0]}.torch.save.base.pt"
        expected = torch.load(file.with_name(f"{file.name}.expected"), weights_only=True)
        case = Case(file, told["arch"], name, reference, expected["input"], expected["outputs"])
        slow = SLOW if quick and name not in QUICK else frozenset()
        for verb in sorted(verbs_of[name] & ANSWER_VERBS.keys() - slow):
            problem = ANSWER_VERBS[verb](case)
            found.append({"arch": case.arch, "format": name, "verb": verb, "problem": problem})
    return found
