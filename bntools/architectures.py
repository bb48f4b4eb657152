"""Architectures by name, with random weights: torchvision's, timm's, and the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from bntools.errors import LoadError
from bntools.imports import import_object, one_line, quiet, working_folder_first

__all__ = ["LIBRARIES", "build"]


def build(arch: str, classes: int | None = None) -> nn.Module:
    """The architecture with random weights, in eval mode."""
    provider, _, name = arch.partition(":")
    options = {} if classes is None else {"num_classes": classes}
    if not provider or not name:
        raise LoadError(
            f"Cannot build {arch!r}: an architecture is torchvision:NAME, timm:NAME or "
            f"package.module:factory{_nearest(arch)}"
        )
    if provider in LIBRARIES:
        model = LIBRARIES[provider](name, options)
    else:
        model = _from_factory(provider, name)
    return model.eval()


def _from_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    models: Any = _imported("torchvision.models")
    if name.lower() not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    weights = {key: None for key in ("weights", "weights_backbone") if key in parameters}
    with quiet(), _building(f"torchvision:{name}"):
        model = models.get_model(name, **weights, **options)
    return _checked(model, f"torchvision:{name}")


def _from_timm(name: str, options: dict[str, Any]) -> nn.Module:
    timm: Any = _imported("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    with quiet(), _building(f"timm:{name}"):
        model = timm.create_model(name, pretrained=False, **options)
    return _checked(model, f"timm:{name}")


LIBRARIES: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}


def _from_factory(module: str, name: str) -> nn.Module:
    arch = f"{module}:{name}"
    factory = import_object(module, name, what=f"build {arch}")
    if isinstance(factory, nn.Module) or not callable(factory):
        return _checked(factory, arch)
    with working_folder_first(), _building(arch):
        model = factory()
    return _checked(model, arch)


@contextmanager
def _building(arch: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        detail = f"{type(error).__name__}: {one_line(error)}"
        raise LoadError(f"Cannot build {arch}: it raised {detail}.") from error


def _checked(model: Any, arch: str) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    raise LoadError(f"Cannot build {arch}: it gave a {type(model).__name__}, not an nn.Module.")


def _imported(library: str) -> Any:
    try:
        with quiet():
            return importlib.import_module(library)
    except ImportError as error:
        name = library.partition(".")[0]
        raise LoadError(
            f"Cannot build {name} models: {one_line(error)}. Install it with: pip install {name}"
        ) from error


def _unknown(library: str, name: str, names: Sequence[str]) -> LoadError:
    near = [f"{library}:{n}" for n in difflib.get_close_matches(name.lower(), names, n=3)]
    hint = f"; near are {', '.join(near)}" if near else ""
    return LoadError(f"Cannot build {library}:{name}: {library} has no such model{hint}.")


def _nearest(name: str) -> str:
    with suppress(LoadError):
        if name.lower() in _imported("torchvision.models").list_models():
            return f"; did you mean torchvision:{name}?"
        if _imported("timm").is_model(name):
            return f"; did you mean timm:{name}?"
    return "."
