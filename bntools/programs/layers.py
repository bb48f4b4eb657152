"""The layers behind operations: which `nn.Module` makes just this call with just these tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["ROLES", "UNKNOWN", "Call", "layer_of", "leaf_of"]

ROLES = ("weight", "bias", "running_mean", "running_var")
"""The arguments that are a layer's own tensors, under the same names."""
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_CONV_DEFAULTS: dict[str, Any] = {
    "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call as a layer: its class, how the layer is built, and whether it is in training mode.

    `bias` says whether the call passes one; layers of one path are the same where these are equal.
    """

    cls: type[nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    training: bool = False

    def built(self) -> nn.Module:
        """The layer, without tensors."""
        layer = self.cls(**self.options)
        return layer.train(self.training)


Arguments = Mapping[str, Any]
Shape = Sequence[int | None]
Rule = Callable[[Arguments, Mapping[str, Tensor], Shape], Call | None]


def layer_of(
    target: str, values: Arguments, tensors: Mapping[str, Tensor], shape: Shape
) -> Call | None:
    """The layer that a call is, or None.

    `values` are its plain arguments by name, `tensors` its own tensors by role, `shape` that of the
    input. The layers are on the meta device.
    """
    rule = _RULES.get(target.removeprefix("torch.ops.aten."))
    if rule is None or any(isinstance(value, _Unknown) for value in values.values()):
        return None
    return rule(values, tensors, shape)


class _Unknown:
    """Stands for an argument that is no constant."""


UNKNOWN = _Unknown()


def _convolution(dims: int, *, transposed: bool) -> Rule:
    def rule(values: Arguments, tensors: Mapping[str, Tensor], shape: Shape) -> Call | None:
        del shape
        weight = tensors.get("weight")
        settings = {name: values.get(name, default) for name, default in _CONV_DEFAULTS.items()}
        if weight is None or weight.dim() != dims + 2 or type(settings["groups"]) is not int:
            return None
        groups = settings["groups"]
        sizes = {name: _per_dim(settings[name], dims) for name in settings if name != "groups"}
        if None in sizes.values() or groups < 1:
            return None
        channels = {"in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0]}
        if transposed:
            channels = {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * groups}
        else:
            sizes.pop("output_padding")
        options = {
            **channels,
            "kernel_size": tuple(weight.shape[2:]),
            **sizes,
            "groups": groups,
            "bias": "bias" in tensors,
            "dtype": weight.dtype,
            "device": "meta",
        }
        return Call((_TRANSPOSED if transposed else _CONVS)[dims], options)

    return rule


def _per_dim(value: Any, dims: int) -> Any:
    """A setting for each dimension; a text such as "same" stays, None is not understood."""
    if isinstance(value, str):
        return value
    given = [value] if type(value) is int else value
    if not isinstance(given, list) or len(given) not in (1, dims):
        return None
    return tuple(given * dims if len(given) == 1 else given)


def _general(values: Arguments, tensors: Mapping[str, Tensor], shape: Shape) -> Call | None:
    """`aten.convolution`, which is every convolution after decomposition."""
    dims = tensors["weight"].dim() - 2 if "weight" in tensors else 0
    transposed = values.get("transposed")
    plain = {k: v for k, v in values.items() if k != "transposed"}
    if dims not in _CONVS or not isinstance(transposed, bool):
        return None
    return _convolution(dims, transposed=transposed)(plain, tensors, shape)


def _linear(values: Arguments, tensors: Mapping[str, Tensor], shape: Shape) -> Call | None:
    del values, shape
    weight = tensors.get("weight")
    if weight is None or weight.dim() != 2:
        return None
    options = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": "bias" in tensors,
        "dtype": weight.dtype,
        "device": "meta",
    }
    return Call(nn.Linear, options)


def _batch_norm(values: Arguments, tensors: Mapping[str, Tensor], shape: Shape) -> Call | None:
    like = next(iter(tensors.values()))
    eps, momentum, training = (values.get(k) for k in ("eps", "momentum", "training"))
    affine, tracked = (
        {"weight", "bias"} & tensors.keys(),
        {"running_mean", "running_var"} & tensors.keys(),
    )
    if len(shape) not in _BATCH_NORMS or len(affine) == 1 or len(tracked) == 1:
        return None
    if not isinstance(eps, float) or not isinstance(momentum, float) or not (tracked or training):
        return None
    options = {
        "num_features": like.shape[0],
        "eps": eps,
        # what torch passes in eval mode for None, the average of all batches
        "momentum": None if momentum == 0 and not training else momentum,
        "affine": bool(affine),
        "track_running_stats": bool(tracked),
        "dtype": like.dtype,
        "device": "meta",
    }
    # without running statistics a norm is the same in both modes
    return Call(_BATCH_NORMS[len(shape)], options, training=training is True and bool(tracked))


def _inference_norm(values: Arguments, tensors: Mapping[str, Tensor], shape: Shape) -> Call | None:
    return _batch_norm({**values, "training": False}, tensors, shape)


_RULES: dict[str, Rule] = {
    "conv1d.default": _convolution(1, transposed=False),
    "conv2d.default": _convolution(2, transposed=False),
    "conv3d.default": _convolution(3, transposed=False),
    "conv1d.padding": _convolution(1, transposed=False),
    "conv2d.padding": _convolution(2, transposed=False),
    "conv3d.padding": _convolution(3, transposed=False),
    "conv_transpose1d.default": _convolution(1, transposed=True),
    "conv_transpose2d.input": _convolution(2, transposed=True),
    "conv_transpose3d.input": _convolution(3, transposed=True),
    "convolution.default": _general,
    "linear.default": _linear,
    "batch_norm.default": _batch_norm,
    "_native_batch_norm_legit_no_training.default": _inference_norm,
}


# ---- layers without tensors ----------------------------------------------------------------------


def _dropout(cls: type[nn.Module]) -> Callable[[Arguments], Call]:
    return lambda v: Call(cls, {"p": float(v["p"])}, training=v["train"] is True)


def _plain(cls: type[nn.Module], **renamed: str) -> Callable[[Arguments], Call]:
    """A layer whose options are arguments of the call, here under the names of the layer."""
    return lambda v: Call(cls, {ours: v[theirs] for ours, theirs in renamed.items() if theirs in v})


def _in_place(rule: Callable[[Arguments], Call]) -> Callable[[Arguments], Call]:
    def inplace(values: Arguments) -> Call:
        made = rule(values)
        return Call(made.cls, {**made.options, "inplace": True}, made.training)

    return inplace


def _clipped(values: Arguments) -> Call:
    low, high = values.get("min_val", -1.0), values.get("max_val", 1.0)
    if (low, high) == (0.0, 6.0):
        return Call(nn.ReLU6)
    return Call(nn.Hardtanh, {"min_val": low, "max_val": high})


_LEAVES: dict[str, Callable[[Arguments], Call]] = {
    "dropout": _dropout(nn.Dropout),
    "feature_dropout": _dropout(nn.Dropout2d),
    "alpha_dropout": _dropout(nn.AlphaDropout),
    "relu": _plain(nn.ReLU),
    "relu6": _plain(nn.ReLU6),
    "hardtanh": _clipped,
    "leaky_relu": _plain(nn.LeakyReLU, negative_slope="negative_slope"),
    "silu": _plain(nn.SiLU),
    "gelu": _plain(nn.GELU, approximate="approximate"),
    "hardswish": _plain(nn.Hardswish),
    "hardsigmoid": _plain(nn.Hardsigmoid),
    "sigmoid": _plain(nn.Sigmoid),
    "tanh": _plain(nn.Tanh),
    "mish": _plain(nn.Mish),
}
_NEVER_IN_PLACE = {"gelu", "sigmoid", "tanh"}


def leaf_of(target: str, values: Arguments) -> Call | None:
    """The dropout or activation layer that a call is, or None."""
    name, _, overload = target.removeprefix("torch.ops.aten.").partition(".")
    plain = name.removesuffix("_")
    rule = _LEAVES.get(plain)
    if rule is None or overload != "default":
        return None
    if any(isinstance(value, _Unknown) for value in values.values()):
        return None
    if name == plain:
        return rule(values)
    return None if plain in _NEVER_IN_PLACE else _in_place(rule)(values)
