"""Writing models, and the results of surgeries, in the format that the file's name asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from bntools.errors import SaveError
from bntools.formats.interface import Saved
from bntools.formats.scripted import is_script
from bntools.formats.table import written_as
from bntools.originals import originals_of
from bntools.recipe import architecture_of, recipe_of
from bntools.report import Result
from bntools.writing import StrPath

__all__ = ["check_format", "save"]


def save(
    result_or_model: Result[Any] | nn.Module,
    path: StrPath,
    *,
    force: bool = False,
    state_dict: bool = False,
    example_inputs: Any = None,
) -> tuple[str, ...]:
    """Write a model, or the result of a surgery, in the format that the name ends with.

    - `.safetensors`: the weights; the recipe, the version of bntools and, where it is known, the
      name of the architecture are in the metadata.
    - `.pt2` and `.onnx`: the program that torch.export records on `example_inputs` (inferred where
      they are not given). An ONNX file is written only if ONNX Runtime computes the same with it.
    - anything else: a dict as torch.save writes it, with the whole module under "model", or with
      `state_dict` its weights under "state_dict" and the architecture's name under "bntools_arch";
      the edits that were made to it under "bntools_recipe" (None for a plain model), and
      "bntools_version".

    Weights go back into an architecture by `bntools.load(path, arch)`, which re-applies the recipe.
    An existing file is replaced only with `force`, keeps its permissions, and is untouched if
    anything fails. Returned are notes on what the file has fixed (the batch size of a program).

    Raises SaveError; ExportError and InputError for programs that cannot be exported.

    Example:
        >>> import tempfile, torch, bntools
        >>> from pathlib import Path
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "model.pt"
        >>> bntools.save(torch.nn.Linear(2, 1), path)
        ()
        >>> bntools.load(path)
        Linear(in_features=2, out_features=1, bias=True)
        >>> folder.cleanup()
    """
    target, chosen = Path(path), written_as(path)
    if _is_onnx(result_or_model):
        _write_onnx(result_or_model, target, force=force)
        return ()
    saved = _parts(result_or_model, example_inputs, state_dict=state_dict)
    if is_script(saved.model) and chosen.key == "torch.save":  # which cannot pickle it
        chosen = written_as("model.ts")
    originals = originals_of(saved.model) is not None
    check_format(target, state_dict=state_dict, keep_originals=originals)
    if chosen.write is None:
        return _export(saved, target, force=force)
    return chosen.write(saved, target, force) or ()


def check_format(path: StrPath, *, state_dict: bool = False, keep_originals: bool = False) -> None:
    """Find out before long work whether the format that a name asks for can hold a result.

    Raises SaveError.
    """
    chosen = written_as(path)
    cure = "Name a .pt or .safetensors file."
    if chosen.write is None and chosen.key != "ONNX":
        raise SaveError(f"Cannot write {path}: bntools does not write {chosen.name}. {cure}")
    if state_dict and not chosen.holds_weights:
        raise SaveError(f"Cannot write {path} as a state dict: it is to be {chosen.name}. {cure}")
    if keep_originals and "originals" not in chosen.carries:
        raise SaveError(
            f"Cannot keep the originals in {path}: {chosen.name} has no place for them. {cure}"
        )


def _export(saved: Saved, target: Path, *, force: bool) -> tuple[str, ...]:
    # onnx takes a second to import, and most files are of another format
    from bntools.publishing import ExportOptions, export_onnx  # noqa: PLC0415

    options = ExportOptions(source=type(saved.model).__name__)
    result = export_onnx(
        saved.model, saved.example_inputs, target, fold=False, force=force, options=options
    )
    if result.report.path is None:
        raise SaveError(
            f"Cannot write {target}: ONNX Runtime computes something else with it. Write a .pt "
            "file, and look at it with: bntools export"
        )
    return tuple(result.report.notes)


def _is_onnx(result_or_model: Any) -> bool:
    model = result_or_model.model if isinstance(result_or_model, Result) else result_or_model
    return type(model).__name__ == "ModelProto"  # without importing onnx


def _write_onnx(result_or_model: Any, target: Path, *, force: bool) -> None:
    from bntools.onnx_surgery.writing import write_onnx  # noqa: PLC0415 - onnx takes a second

    given = result_or_model
    write_onnx(given.model if isinstance(given, Result) else given, target, force=force)


def _parts(
    result_or_model: Result[Any] | nn.Module, example_inputs: Any, *, state_dict: bool
) -> Saved:
    model = result_or_model.model if isinstance(result_or_model, Result) else result_or_model
    if not isinstance(model, nn.Module):
        raise SaveError(
            f"Cannot save a {type(model).__name__}: give an nn.Module or the Result of a surgery."
        )
    own = result_or_model.recipe if isinstance(result_or_model, Result) else None
    recipe = own or recipe_of(model)
    data = recipe.to_dict() if recipe.edits else None
    return Saved(model, data, architecture_of(model), state_dict, example_inputs)
