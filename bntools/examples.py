"""Example inputs: given by the caller, or inferred from the first layer that runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bntools.errors import InputError
from bntools.modules import floating_tensors, named_modules, preserved
from bntools.programs.program import Program

__all__ = ["Examples", "candidates", "given", "required"]

_SIZES = {
    1: (256, 1024, 64, 16000),
    2: (64, 224, 32, 28, 128, 256, 96, 299, 384, 8, 512),
    3: (32, 64, 112),
}
_LARGE = 1 << 16
_FRAMES = {32: 8, 64: 16, 112: 16}
_CONVS = nn.modules.conv._ConvNd  # noqa: SLF001
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm  # noqa: SLF001
_TRANSPOSED = nn.modules.conv._ConvTransposeNd  # noqa: SLF001


@dataclass(frozen=True)
class Examples:
    """The arguments of one forward; `drawn` are random, so that others say as much."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inferred: bool = False
    drawn: bool = False

    def __str__(self) -> str:
        return ", ".join([*map(_described, self.args), *self._named()])

    def _named(self) -> Iterator[str]:
        return (f"{name}={_described(value)}" for name, value in self.kwargs.items())

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Examples:
        """The same arguments with every tensor changed."""
        args, kwargs = _mapped(self.args, change), _mapped(self.kwargs, change)
        return replace(self, args=args, kwargs=kwargs)

    def cast(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Examples:
        """Floating tensors in another dtype, all tensors on a device."""
        return self.mapped(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))

    def copied(self) -> Examples:
        """The same values in other memory, for a forward that may write to its inputs."""
        return self.mapped(Tensor.clone)

    def varied(self, seed: int) -> Examples:
        """Other values of the same shapes: floats with the same mean, deviation and range.

        Integers and booleans are the same elements in another order.
        """
        generator = torch.Generator().manual_seed(seed)
        return self.mapped(lambda t: _varied(t, generator))

    def doubled(self) -> Examples | None:
        """Twice the batch; None where the tensors do not share a first dimension."""
        if self.batch is None:
            return None
        return self.mapped(lambda t: torch.cat([t, t]))

    def resized(self) -> list[Examples]:
        """Inputs of other sizes that the model may take: smaller images, or larger small ones.

        Sequences, of which either axis may be the longer one, grow along each in turn.
        """
        ranks = {tensor.dim() for tensor in self.tensors()}
        if ranks == {4} and all(min(t.shape[2:]) >= 64 for t in self.tensors()):
            return [self.mapped(lambda t: t[..., : t.shape[2] // 2, : t.shape[3] // 2].clone())]
        if len(ranks) != 1 or sum(t.numel() for t in self.tensors()) > _LARGE:
            return []
        if ranks == {4}:
            return [self.mapped(lambda t: t.repeat(1, 1, 2, 2))]
        if ranks == {3}:
            return [
                self.mapped(lambda t: t.repeat(1, 2, 1)),
                self.mapped(lambda t: t.repeat(1, 1, 2)),
            ]
        return []

    @property
    def batch(self) -> int | None:
        """The first dimension that all tensors share, or None."""
        sizes = {tensor.shape[0] if tensor.dim() > 1 else None for tensor in self.tensors()}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def shared_size(self) -> int | None:
        """The first dimension of all tensors that have dimensions, or None where these differ."""
        sizes = {tensor.shape[0] for tensor in self.tensors() if tensor.dim()}
        return sizes.pop() if len(sizes) == 1 else None

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.mapped(note)
        return found


def given(example_inputs: Any) -> Examples:
    """Example inputs as the caller wrote them: a tensor, a tuple of arguments, or a dict.

    A list is one argument that is a list (the images of a detection model).
    """
    if isinstance(example_inputs, Examples):
        return example_inputs
    if isinstance(example_inputs, tuple):
        return Examples(example_inputs)
    if isinstance(example_inputs, dict):
        return Examples(kwargs=dict(example_inputs))
    if isinstance(example_inputs, (Tensor, list)):
        return Examples((example_inputs,))
    raise InputError(
        f"Cannot use example inputs of type {type(example_inputs).__name__}: give a tensor, a tuple"
        " of positional arguments, a list of tensors as one argument, or a dict of keywords."
    )


def candidates(model: nn.Module) -> Iterator[Examples]:
    """Inputs that a model may take, the likeliest first; the caller tries them."""
    if isinstance(model, Program):
        args, kwargs = model.examples()
        yield Examples(args, kwargs, inferred=True)
        return
    generator = torch.Generator().manual_seed(0)
    like = next(floating_tensors(model), torch.zeros(1, device="cpu"))
    for shape, dtype in _shapes(model):
        if dtype == torch.int64:
            first = torch.randint(0, 10, shape, generator=generator, device="cpu").to(like.device)
        else:
            first = torch.randn(shape, generator=generator, device="cpu")
            first = first.to(like.device, like.dtype)
        yield Examples(tuple(first.clone() for _ in range(required(model))), inferred=True)
        if len(shape) == 4:
            yield Examples((list(first),), inferred=True)


def _shapes(model: nn.Module) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    guess = _first_registered(model)
    if guess is None:
        return
    layer, channels = guess
    if isinstance(layer, nn.Embedding):
        yield (1, 16), torch.int64
        return
    rank = _spatial_rank(layer)
    if rank == 2 and channels == 3 and not getattr(layer, "transposed", False):
        size = _SIZES[rank][0]
        yield (1, 3, size, size), torch.float32  # most models, without a probe
    for count in _channel_counts(model, layer, channels):
        if rank == 0:
            yield (2, count), torch.float32
            yield (1, 16, count), torch.float32
            continue
        for size in _sizes(model, layer, rank):
            frames = (_FRAMES.get(size, size),) if rank == 3 else ()
            yield (1, count, *frames, *[size] * min(rank, 2)), torch.float32


def _sizes(model: nn.Module, layer: nn.Module, rank: int) -> Sequence[int]:
    if getattr(layer, "transposed", False):
        return (1, 4, 8, *_SIZES[rank])
    configured = getattr(model, "pretrained_cfg", None) or {}
    size = configured.get("input_size", (0,))[-1] if isinstance(configured, dict) else 0
    own = (int(size),) if size else ()
    return tuple(dict.fromkeys((_SIZES[rank][0], *own, *_SIZES[rank][1:])))


def _first_registered(model: nn.Module) -> tuple[nn.Module, int] | None:
    for _, module in named_modules(model):
        layer = _uncompiled(module)
        channels = _expected(layer)
        if channels:
            return layer, channels
    return None


def _uncompiled(module: nn.Module) -> nn.Module:
    """A layer of the class that a TorchScript module was compiled from, as far as shapes tell."""
    if not isinstance(module, torch.jit.ScriptModule):
        return module
    cls: Any = getattr(nn, str(getattr(module, "original_name", "")), nn.Identity)
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or not isinstance(cls, type) or weight.dim() == 0:
        return module
    if issubclass(cls, _BATCH_NORMS):
        return cls(weight.shape[0], device="meta")
    if issubclass(cls, (nn.Linear, nn.Embedding)) and weight.dim() == 2:
        return cls(weight.shape[1], weight.shape[0], device="meta")
    if issubclass(cls, _CONVS) and weight.dim() > 2:
        ins, outs = (0, 1) if issubclass(cls, _TRANSPOSED) else (1, 0)
        build: Any = cls
        return build(weight.shape[ins], weight.shape[outs], tuple(weight.shape[2:]), device="meta")  # type: ignore[no-any-return] # one of nn's
    return module


def _expected(module: nn.Module) -> int:
    if isinstance(module, _CONVS):
        return module.in_channels
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, _BATCH_NORMS):
        return module.num_features
    return 1 if isinstance(module, nn.Embedding) else 0


def _spatial_rank(layer: nn.Module) -> int:
    if isinstance(layer, _CONVS):
        return len(layer.kernel_size)
    name = type(layer).__name__
    return 0 if isinstance(layer, nn.Linear) or "1d" in name else 3 if "3d" in name else 2


def _channel_counts(model: nn.Module, layer: nn.Module, channels: int) -> Sequence[int]:
    """What the first layer that really runs says, and then what the first registered one says."""
    rank = _spatial_rank(layer)
    if rank == 0:
        return (channels,)
    ran = _first_run(model, torch.zeros(1, channels, *[_SIZES[rank][0]] * rank, device="cpu"))
    if ran is not None and _spatial_rank(ran[0]) == rank and ran[1] != ran[2]:
        return tuple(dict.fromkeys((ran[1], channels, 3, 1)))
    return tuple(dict.fromkeys((channels, 3, 1)))


class _Stop(BaseException):
    """Ends a forward at its first layer; no Exception, so that no model code swallows it."""

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.module = module
        self.inputs = inputs


def _first_run(model: nn.Module, example: Tensor) -> tuple[nn.Module, int, int] | None:
    """The first layer that runs, the channels that it expects, and those that it was given."""

    def stop(module: nn.Module, inputs: Any) -> None:
        if _expected(module):
            raise _Stop(module, inputs)

    like = next(floating_tensors(model), example)
    hook = nn.modules.module.register_module_forward_pre_hook(stop)
    try:
        with preserved(model), torch.no_grad():
            model(example.to(like))
    except _Stop as stopped:
        seen = stopped.inputs[0] if stopped.inputs else None
        if isinstance(seen, Tensor) and seen.dim() > 1:
            return stopped.module, _expected(stopped.module), seen.shape[1]
    except Exception:  # noqa: BLE001 - a probe: whatever it raises, the guess was wrong
        return None
    finally:
        hook.remove()
    return None


def required(model: nn.Module) -> int:
    """How many positional arguments `forward` insists on, at least one."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return max(1, len(needed))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        shape = "x".join(map(str, value.shape)) or "scalar"
        return f"{shape} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_described(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _reordered(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Rows in another order, as each column may have values of its own; one row within itself."""
    rows = tensor if tensor.dim() > 1 else tensor.reshape(1, -1)
    if rows.shape[0] > 1 and bool((rows != rows[:1]).any()):
        order = torch.randperm(rows.shape[0], generator=generator, device="cpu")
        return rows[order.to(rows.device)].reshape(tensor.shape)
    order = torch.randperm(tensor.numel(), generator=generator, device="cpu")
    return tensor.flatten()[order.to(tensor.device)].reshape(tensor.shape)


def _varied(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.numel():
        return tensor
    if not tensor.is_floating_point():
        return _reordered(tensor, generator)
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
    noise = noise.to(tensor.device)
    exact = tensor.double()
    low, high = exact.min(), exact.max()
    if low == high or tensor.numel() == 1:
        return (noise + exact).to(tensor.dtype)
    return (noise * exact.std() + exact.mean()).clamp(low, high).to(tensor.dtype)
