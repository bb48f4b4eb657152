"""A merge that is decided: the edit that makes it, and the numbers that go into its host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bntools.dataflow.graph import Kind, Node
from bntools.dataflow.reach import Refused
from bntools.merging.filters import Filter
from bntools.merging.steps import Program
from bntools.modules import get_module
from bntools.recipe import Edit, Recipe, apply_edits, set_tensors
from bntools.report import Merge, Reason
from bntools.resources import one_thread
from bntools.rewriting import Shape

__all__ = ["Key", "Planned", "Undone", "carry_out", "check_cost", "merged_shape", "tensor_of"]


@dataclass(frozen=True, eq=False)
class Planned:
    """One merge. `host` is the path of the layer that computes all of it from then on.

    `norms` are the paths of the norm layers that go into it.
    """

    row: Merge
    edit: Edit
    host: str
    program: Program
    norms: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """What tells one merge from all others of a model."""
        options = self.edit.options
        which = str(options.get("output", options.get("first")))
        return self.edit.path, which, self.host

    def same_as(self, other: Planned) -> bool:
        """Whether two recordings led to the same merge."""
        return self.key == other.key and self.program == other.program


def carry_out(model: nn.Module, merge: Planned) -> nn.Module:
    """Make a merge on a model that is ours, in the precision that its tensors have.

    Raises SurgeryError where its forward cannot be rewritten; the model is as it was then.
    """
    old = tensor_of(model)(f"{merge.host}.weight")
    with torch.no_grad(), one_thread():
        filter_ = merge.program.evaluate(tensor_of(model)).balanced()
    model = apply_edits(model, Recipe((merge.edit,)))
    tensors = {f"{merge.host}.weight": filter_.weight}
    if merge.edit.options["layer"]["bias"]:
        tensors[f"{merge.host}.bias"] = filter_.bias
    set_tensors(model, {n: t.to(old.device, old.dtype, copy=True) for n, t in tensors.items()})
    return model


Key = tuple[str, str, str]


@dataclass(frozen=True)
class Undone:
    """Merges that failed their check, with the reason, and `unmade` those that cannot be made.

    With `kept` all others stay out as well.
    """

    failed: Mapping[Key, str] = field(default_factory=dict)
    kept: frozenset[Key] | None = None
    unmade: Mapping[Key, str] = field(default_factory=dict)

    def check(self, merge: Planned) -> Planned:
        """The merge, where it may be made."""
        if merge.key in self.failed:
            raise Refused(Reason.CHECK_FAILED, f"undone: {self.failed[merge.key]}")
        if merge.key in self.unmade:
            raise Refused(Reason.NOT_REWRITABLE, self.unmade[merge.key])
        if self.kept is not None and merge.key not in self.kept:
            raise Refused(Reason.CHECK_FAILED, "left out while another one is looked for")
        return merge


def tensor_of(model: nn.Module) -> Callable[[str], Tensor]:
    """The tensors of a model by name."""

    def find(name: str) -> Tensor:
        path, _, attribute = name.rpartition(".")
        module = get_module(model, path)
        found = module._parameters.get(attribute)
        tensor = found if found is not None else module._buffers[attribute]
        if tensor is None:
            raise KeyError(name)
        return tensor

    return find


def merged_shape(filter_: Filter, *, bias: bool) -> Shape:
    """The layer that a filter is, where it is finite; a bias only where one is needed."""
    if not bool(filter_.weight.isfinite().all() and filter_.bias.isfinite().all()):
        raise Refused(Reason.NON_FINITE, "the merged layer would have NaN or infinite values")
    return Shape(
        filter_.in_channels,
        filter_.out_channels,
        filter_.groups,
        bias or bool(filter_.bias.any()),
        filter_.kernel,
        filter_.stride,
        filter_.before,
        filter_.dilation,
    )


def check_cost(filter_: Filter, nodes: Sequence[Node], *, smaller: bool = False) -> None:
    """One layer may not have more weights, or take more operations, than those it replaces."""
    linear = [node for node in nodes if node.kind is Kind.LINEAR]
    old = sum(_numel(node) for node in linear)
    work = sum(_numel(node) * _positions(node) for node in linear)
    new = filter_.regrouped(1).weight.numel() if not filter_.kernel else filter_.weight.numel()
    now = new * _positions(nodes[-1])
    if new > old or (smaller and new == old):
        raise Refused(Reason.COSTS_MORE, f"one layer would have {new} weights in place of {old}")
    if now > work:
        detail = f"one layer would take {now} multiplications in place of {work}"
        raise Refused(Reason.COSTS_MORE, detail)


def _numel(node: Node) -> int:
    weight = node.linear.weight
    return 0 if weight is None else torch.Size(weight.shape).numel()


def _positions(node: Node) -> int:
    """At how many places a layer is applied; the values of one call, so that it is no ratio."""
    shape = node.outputs[0].shape
    axis = node.linear.channel_dim if node.kind is Kind.LINEAR else _axis(shape)
    return torch.Size(shape).numel() // max(1, shape[axis])


def _axis(shape: tuple[int, ...]) -> int:
    return 1 if len(shape) > 2 else len(shape) - 1
