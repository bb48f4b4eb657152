"""What a program out of a file may call: tensor arithmetic, and nothing that reaches further."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from bntools.trust import Refusal

__all__ = ["HIGHER_ORDER", "is_overload", "operator_of", "schema_of", "trust_namespace"]

_ATEN = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)")
# Operations that read or write files, or give a tensor other memory.
_REFUSED = frozenset({"from_file", "save", "set_", "set", "set_data", "resize_", "rename_"})
# Names that start with an underscore are internal; these are what torch.export leaves in graphs.
_INTERNAL = re.compile(
    r"_(adaptive_avg_pool[23]d|add_relu_?|aminmax|assert_async|assert_scalar|batch_norm_no_update"
    r"|batch_norm_with_update|cdist_forward|cast_\w+|conj(_physical)?|convolution|conv_depthwise2d"
    r"|convolution_mode|efficientzerotensor|embedding_bag(_forward_only)?|euclidean_dist"
    r"|fft_(c2c|c2r|r2c)|foreach_\w+|functional_assert_\w+|fused_rms_norm|fused_sdp_choice|grouped_mm|int_mm"
    r"|is_all_true|is_any_true|linalg_\w+|local_scalar_dense|log_softmax|logcumsumexp"
    r"|native_batch_norm_legit\w*|native_multi_head_attention|neg_view|pad_circular|pad_enum"
    r"|pdist_forward|prelu_kernel|reshape_alias|reshape_copy|safe_softmax|scaled_dot_product_\w+"
    r"|shape_as_tensor|softmax|stack|sym_constrain_range\w*|functional_sym_constrain_range\w*"
    r"|to_copy|transformer_encoder_layer_fwd|trilinear|unique2?|unsafe_index|unsafe_index_put"
    r"|unsafe_view|upsample_\w+|weight_norm(_interface)?|assert_tensor_metadata)"
)
# They do not look at their indices before they follow them; these do, and give the same.
_CHECKED = {
    "_unsafe_index.Tensor": "index.Tensor",
    "_unsafe_index_put.default": "index_put.default",
}
_NAMESPACES = {"aten", "torchvision", "prims"}
HIGHER_ORDER = frozenset(
    f"torch.ops.higher_order.{name}"
    for name in ("cond", "wrap_with_autocast", "wrap_with_set_grad_enabled")
)
_MOST_BITS = 4096


def _power(base: Any, exponent: Any) -> Any:
    _check_small(base, exponent)
    return base**exponent


def _shifted(value: Any, by: Any) -> Any:
    _check_small(2, by)
    return value << by


def _check_small(base: Any, exponent: Any) -> None:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and base.bit_length() * abs(exponent) > _MOST_BITS:
        raise ValueError("a size in it is beyond any memory")


# Arithmetic on sizes.
_ON_NUMBERS: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in (
            *("eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv"),
            *("mod", "truediv", "and_", "or_", "rshift", "not_", "abs"),
        )
    },
    "_operator.pow": _power,
    "_operator.lshift": _shifted,
    "math.trunc": math.trunc,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_not", "sym_int", "sym_float", "sym_ite", "sym_max", "sym_min")
    },
    "torch._sym_sqrt": getattr(torch, "_sym_sqrt"),  # noqa: B009 - the stubs do not have it
    "torch.sym_sqrt": getattr(torch, "sym_sqrt"),  # noqa: B009 - the stubs do not have it
}


def trust_namespace(name: str) -> None:
    """Let programs of this process call the operations of a further library, such as "mylib"."""
    _NAMESPACES.add(name)
    operator_of.cache_clear()


def is_overload(function: Any) -> bool:
    """Whether a function is an operation with a schema."""
    return isinstance(function, torch._ops.OpOverload)  # noqa: SLF001 - it has no public name


def schema_of(overload: Any) -> Any:
    """The arguments and results of an operation."""
    return overload._schema  # noqa: SLF001 - torch's own way to ask for it


@cache
def operator_of(target: str) -> Callable[..., Any]:
    """What a serialised graph calls by this name.

    Raises `Refusal` for whatever is no operation on tensors or sizes, and for what is not known.
    """
    if target in _ON_NUMBERS:
        return _ON_NUMBERS[target]
    match = _ATEN.fullmatch(target)
    if match is None:
        raise Refusal(
            f"its graph calls {target!r}, which is no operation on tensors, and was not run"
        )
    namespace, name, overload = match.groups()
    if namespace not in _NAMESPACES:
        raise Refusal(
            f"its graph calls {target}, an operation of the library {namespace!r}. Import what"
            " defines it and, if you trust the file, add --trust"
        )
    if namespace == "aten":
        name, _, overload = _CHECKED.get(f"{name}.{overload}", f"{name}.{overload}").partition(".")
    found: Any = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not is_overload(found) or not _is_arithmetic(namespace, name, found):
        raise Refusal(f"its graph calls {target}, which bntools does not run")
    call: Callable[..., Any] = found
    return call


def _is_arithmetic(namespace: str, name: str, found: Any) -> bool:
    if namespace not in ("aten", "prims"):
        return True
    compliant = torch.Tag.pt2_compliant_tag in found.tags
    if name in _REFUSED or (namespace == "aten" and not compliant):
        return False
    plain = all("Storage" not in str(argument.type) for argument in schema_of(found).arguments)
    return plain and (not name.startswith("_") or bool(_INTERNAL.fullmatch(name)))
