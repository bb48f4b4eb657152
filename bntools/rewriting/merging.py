"""The edits of a merge: one layer takes over from several, the others become Identity.

What the layer computes is in its tensors; these edits make its place. They come from files as well,
so that a layer is made only where it is no larger than what it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bntools.errors import SurgeryError
from bntools.modules import get_module, named_modules, named_tensors, replace_modules
from bntools.rewriting.bypass import Bypass
from bntools.rewriting.rewritten import rewrite
from bntools.rewriting.shapes import Shape

__all__ = ["MERGES", "merge_branches", "merge_linear"]


def merge_branches(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Let one layer of `module` stand for a sum of branches in its forward.

    Options: those of a `Bypass`, and `layer`, the `Shape` of the host from then on. Submodules with
    parameters that are not called any more become Identity. Raises SurgeryError, and the module is
    as it was.
    """
    try:
        change = Bypass.of(options)
    except ValueError as error:
        raise SurgeryError(f"Cannot merge branches: {error}.") from error
    shape = Shape.from_options(options.get("layer"))
    with _undone(module):
        replaced = [tensor for path in change.calls for tensor in _tensors(module, path)]
        _put(module, change.host, shape, replaced)
        for path in change.calls:
            _clear(module, path, change.host)
        rewrite(module, change)


def merge_linear(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Let the layer `second` of `module` do what the layer `first`, right before it, does as well.

    Options: both paths, and `layer`, the `Shape` of the second from then on; the first becomes
    Identity. Raises SurgeryError, and the module is as it was.
    """
    first, second = options.get("first"), options.get("second")
    if not isinstance(first, str) or not isinstance(second, str) or not first or not second:
        raise SurgeryError("Cannot merge two layers: their paths are missing.")
    shape = Shape.from_options(options.get("layer"))
    with _undone(module):
        if not isinstance(get_module(module, first), _LAYERS):
            raise SurgeryError(f"Cannot merge {first} into {second}: it is no linear layer.")
        replaced = [t for path in (first, second) for t in _tensors(module, path)]
        _put(module, second, shape, replaced)
        _set(module, first, nn.Identity())


_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# What recipes call these edits.
MERGES = {"merge-branches": merge_branches, "merge-linear": merge_linear}


@contextmanager
def _undone(module: nn.Module) -> Iterator[None]:
    """Whatever fails leaves every submodule at its place."""
    before = [(part, dict(part._modules)) for _, part in named_modules(module)]
    try:
        yield
    except BaseException:
        for part, children in before:
            part._modules.clear()
            part._modules.update(children)
        raise


def _tensors(module: nn.Module, path: str) -> list[Tensor]:
    return [tensor for *_, tensor in named_tensors(get_module(module, path))]


def _put(module: nn.Module, path: str, shape: Shape, replaced: list[Tensor]) -> None:
    """Make the layer at `path` one of a shape, with room for no more than it replaces."""
    old = get_module(module, path)
    weight = old._parameters.get("weight")
    if not isinstance(old, _LAYERS) or weight is None:
        raise SurgeryError(f"Cannot merge into {path}: it is no convolution or linear layer.")
    values = sum({id(t): t.numel() for t in (*replaced, weight)}.values())
    if shape.parameters > values + shape.outputs:
        raise SurgeryError(
            f"Cannot merge into {path}: {shape.parameters} parameters are more than the"
            f" {values} that they replace."
        )
    if shape.is_that_of(old):
        return
    new = shape.build(weight)
    new.training = old.training
    _set(module, path, new)


def _clear(module: nn.Module, path: str, host: str) -> None:
    """Empty the place of a submodule with tensors, but for the way to the host."""
    part = get_module(module, path)
    if path == host or not _tensors(module, path):
        return
    if not host.startswith(f"{path}."):
        _set(module, path, nn.Identity().train(part.training))
        return
    for name, child in list(part._modules.items()):
        if child is not None:
            _clear(module, f"{path}.{name}", host)


def _set(module: nn.Module, path: str, new: nn.Module) -> None:
    """Under every name that the old one has: torch.fx calls it by the first."""
    replace_modules(module, {path: new})
