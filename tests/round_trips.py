"""Write models by every verb in every format, and read them in another process.

    python tests/round_trips.py write FOLDER [ARCH ...]
    python tests/round_trips.py read FOLDER
    python tests/round_trips.py answer FOLDER [--quick]

For each architecture and format a file is made, and from it, by each verb that gives a model, a
second one. The outputs before saving are written beside; reading them compares, and prints one JSON
object with the relative error of every file (0 for equal bits) and what else was found. The verbs
that answer with no model are typed as commands on the first files (`round_trip_answers.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from randomise import difference, outputs, randomise, settle
from round_trip_answers import ALLOW, WEIGHTS, answers, run_onnx
from torch import nn

import bntools
from bntools.formats.table import supported
from bntools.recipe import recipe_of

__all__ = ["ARCHITECTURES", "ENDINGS", "MODEL_VERBS", "read", "verbs_of", "write"]

SAMPLE = Path(__file__).parent.parent / "samples" / "digits_cnn.pt"
ENDINGS = {
    "torch.save": ".pt",
    "state dict": ".pth",
    "safetensors": ".safetensors",
    "torch.export": ".pt2",
    "TorchScript": ".ts",
    "ONNX": ".onnx",
}
ARCHITECTURES = {
    "round_trips:sample": (4, 1, 8, 8),
    "round_trips:odd": (4, 3, 16, 16),
    "torchvision:resnet18": (2, 3, 64, 64),
    "torchvision:mobilenet_v3_small": (2, 3, 64, 64),
    "torchvision:shufflenet_v2_x0_5": (2, 3, 64, 64),
    "timm:resnet10t": (2, 3, 64, 64),
    "timm:mobilenetv3_small_050": (2, 3, 64, 64),
    "timm:regnetx_002": (2, 3, 64, 64),
}


def sample() -> nn.Module:
    """The trained network of the samples."""
    return bntools.load(SAMPLE)


class Moving(nn.Module):
    """A batch norm written by hand, as in teaching code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 2.0, channels).reshape(1, -1, 1, 1))
        self.beta = nn.Parameter(torch.linspace(-1.0, 1.0, channels).reshape(1, -1, 1, 1))
        self.register_buffer("mean", torch.linspace(-0.2, 0.3, channels).reshape(1, -1, 1, 1))
        self.register_buffer("var", torch.linspace(0.5, 1.5, channels).reshape(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / torch.sqrt(self.var + 1e-5) * self.gamma + self.beta


class Odd(nn.Module):
    """What the real networks lack: a SyncBatchNorm, a tied weight, a hand-written norm, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.sync = nn.SyncBatchNorm(8)
        self.up = nn.ConvTranspose2d(8, 8, 2, groups=2)
        self.norm = nn.BatchNorm2d(8, momentum=None)
        self.hand = nn.Conv2d(8, 4, 3)
        self.moving = Moving(4)
        self.one = nn.Linear(4, 4, bias=False)
        self.other = nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.up(self.sync(self.stem(x)).relu())).relu()
        return self.other(self.one(self.moving(self.hand(x)).mean((2, 3))).tanh())


def odd() -> nn.Module:
    """A network of odd parts."""
    return Odd().eval()


def _inputs(arch: str, seed: int = 1) -> torch.Tensor:
    return torch.rand(ARCHITECTURES[arch], generator=torch.Generator().manual_seed(seed))


def _recalibrate(model: Any, x: torch.Tensor) -> Any:
    return bntools.recalibrate(model, [x * 1.5 + 0.1, x.flip(0) + 0.2])


def _unfold(model: Any, x: torch.Tensor) -> Any:
    return bntools.unfold(bntools.fold(model, x, keep_originals=True).model)


MODEL_VERBS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "fold": bntools.fold,
    "freeze": lambda model, _: bntools.freeze(model),
    "recalibrate": _recalibrate,
    "replace": lambda model, x: bntools.replace(model, bntools.ToGroupNorm(groups=2), x),
    "to-batchnorm": bntools.to_batchnorm,
    "unfold": _unfold,
    "unfreeze": lambda model, _: bntools.unfreeze(bntools.freeze(model).model),
    "unsync": bntools.unsync,
}


def verbs_of() -> dict[str, frozenset[str]]:
    """The verbs that take each format, by the table of formats; a state dict is one of its own."""
    found = {entry.key: entry.verbs for entry in supported()}
    return {**found, "state dict": found["torch.save"]}


def _cases() -> Iterator[tuple[str, str, frozenset[str]]]:
    """(name, ending, verbs) of every format."""
    by_name = verbs_of()
    for name, ending in ENDINGS.items():
        yield name, ending, by_name[name]


def _load(file: Path, arch: str, name: str) -> Any:
    return bntools.load(file, arch if name in WEIGHTS else None, ALLOW, trust=name == "TorchScript")


def write(folder: Path, archs: list[str]) -> None:
    """Write every file, and what its model gives."""
    for number, arch in enumerate(archs):
        torch.manual_seed(number)
        model, x = bntools.load(arch), _inputs(arch)
        if arch != "round_trips:sample":
            randomise(model)
            # statistics of two tiny images would magnify every rounding
            settle(model, torch.cat([_inputs(arch, seed) for seed in range(1, 8)]))
        for name, ending, verbs in _cases():
            base = folder / f"{number}.{name.replace(' ', '-')}"
            if name == "ONNX":
                _write_onnx(model, arch, x, base)
                continue
            origin = base.with_name(f"{base.name}.base{ending}")
            bntools.save(model, origin, state_dict=name == "state dict", example_inputs=x)
            _note(origin, arch, name, "base", model, x, recipe_of(model).to_dict())
            for verb in sorted(verbs & MODEL_VERBS.keys()):
                result = MODEL_VERBS[verb](_load(origin, arch, name), x)
                file = base.with_name(f"{base.name}.{verb}{ending}")
                bntools.save(result, file, state_dict=name == "state dict", example_inputs=x)
                _note(file, arch, name, verb, result.model, x, result.recipe.to_dict())


def _note(
    file: Path, arch: str, name: str, verb: str, model: Any, x: torch.Tensor, recipe: Any
) -> None:
    content = {"outputs": [t.detach().clone() for t in outputs(model, x)], "input": x}
    torch.save(content, file.with_name(f"{file.name}.expected"))
    told = {"arch": arch, "format": name, "verb": verb, "recipe": recipe, "file": file.name}
    file.with_name(f"{file.name}.json").write_text(json.dumps(told))


def _write_onnx(model: Any, arch: str, x: torch.Tensor, base: Path) -> None:
    """The model with its norms, and folded as a file, as ONNX Runtime runs them."""
    origin = base.with_name(f"{base.name}.base.onnx")
    bntools.save(model, origin, example_inputs=x)
    result = bntools.fold_onnx(origin)
    bntools.save(result, base.with_name(f"{base.name}.fold.onnx"))
    for file, source in (("base", origin.read_bytes()), ("fold", result.model.SerializeToString())):
        told = {"arch": arch, "format": "ONNX", "verb": file, "recipe": None}
        named = base.with_name(f"{base.name}.{file}.onnx")
        content = {"outputs": run_onnx(source, x), "input": x}
        torch.save(content, named.with_name(f"{named.name}.expected"))
        named.with_name(f"{named.name}.json").write_text(json.dumps({**told, "file": named.name}))


def read(folder: Path) -> list[dict[str, Any]]:
    """Compare what every file gives with what its model gave before it was saved."""
    found = []
    for note in sorted(folder.glob("*.json")):
        told = json.loads(note.read_text())
        file = folder / told["file"]
        expected = torch.load(file.with_name(f"{file.name}.expected"), weights_only=True)
        x, before = expected["input"], expected["outputs"]
        if told["format"] == "ONNX":
            after, recipe = run_onnx(file, x), None
        else:
            model = _load(file, told["arch"], told["format"])
            after, recipe = outputs(model, x), recipe_of(model).to_dict()
        bits = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        told["error"] = 0.0 if bits else difference(after, before)
        told["same_recipe"] = recipe == told.pop("recipe")
        found.append(told)
    return found


def _main(arguments: list[str]) -> None:
    task, folder, *archs = arguments
    if task == "write":
        write(Path(folder), archs or list(ARCHITECTURES))
        return
    if task == "read":
        found = read(Path(folder))
    else:
        found = answers(Path(folder), verbs_of(), quick="--quick" in archs)
    sys.stdout.write(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _main(sys.argv[1:])
