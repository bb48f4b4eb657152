"""What a pickle may name, call and create: the allow-list.

Every global is judged by what would be done with it: a class may be created empty, an enumerated
function may be mentioned, and only the few rebuilding functions that torch itself writes may be
called. `bntools.pickles` follows a file's instructions and asks here.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from bntools.errors import LoadError
from bntools.imports import import_object
from bntools.placeholders import Arguments, Global, Listed, Made, Sequenced, Table

__all__ = [
    "DOTTED",
    "REBUILD",
    "AllowList",
    "Grant",
    "Leftover",
    "Refusal",
    "TensorsOnly",
    "is_standard",
]

_PACKAGES = (
    "torch.nn",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "timm.models",
    "timm.layers",
    "bntools",
)
# Classes elsewhere, or that are no modules but part of one: plain data and tensor arithmetic.
_DETECTION = "BalancedPositiveNegativeSampler BoxCoder BoxLinearCoder Matcher SSDMatcher"
_PRUNING = "CustomFromMask Identity L1Unstructured LnStructured PruningContainer RandomStructured"
_OTHER_CLASSES = frozenset(
    {
        *(f"torchvision.models.detection._utils.{name}" for name in _DETECTION.split()),
        *(f"torch.nn.utils.prune.{name}" for name in _PRUNING.split()),
        "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional",
        "torch.ao.quantization.stubs.DeQuantStub",
        "torch.ao.quantization.stubs.QuantStub",
        "torch.nn.modules.module._WrappedHook",
        "torch.nn.utils.prune.RandomUnstructured",
        "torch.nn.utils.spectral_norm.SpectralNorm",
        "torch.nn.utils.spectral_norm.SpectralNormLoadStateDictPreHook",
        "torch.nn.utils.spectral_norm.SpectralNormStateDictHook",
        "torch.nn.utils.weight_norm.WeightNorm",
    }
)
# Modules whose class cannot be named in a pickle: created by a call without arguments.
_CALLED_EMPTY = frozenset({"bntools.rewriting.Rewritten"})
# Makes an empty frozen layer of a class that is given to it, and may be in a file by itself.
REBUILD = "bntools.norms.frozen.rebuild"
# They join process groups, or run a graph's own code.
_REFUSED_CLASSES = (
    torch.fx.GraphModule,
    torch.jit.ScriptModule,
    nn.parallel.DistributedDataParallel,
)
_MOST_LAYERS = 1000
# Classes that models keep as values (`self._norm_layer = nn.BatchNorm2d`) and may call later.
_MENTIONED_CLASSES = re.compile(
    r"torch\.nn\.modules\.\w+\.\w+|torchvision\.ops\.misc\.\w+"
    r"|timm\.layers\.(evo_norm|frozen_bn|norm|norm_act|split_batchnorm)\.\w+|timm\.models\.nextvit\.Next\w+Block"
)

_FUNCTIONAL = (
    "adaptive_avg_pool2d celu dropout elu glu hardsigmoid hardswish hardtanh leaky_relu log_softmax"
    " mish normalize relu relu6 selu sigmoid silu softmax softmin softsign tanh tanhshrink"
)
_NATIVE = "avg_pool2d elu_ gelu hardtanh_ leaky_relu_ log_sigmoid silu_ softplus softshrink"
_TIMM = "gelu gelu_tanh hard_mish hard_sigmoid hard_swish mish quick_gelu sigmoid swish tanh"
_BOXES = "box_area box_iou complete_box_iou distance_box_iou generalized_box_iou"
_FUNCTIONS = frozenset(
    {
        *(f"torch.nn.functional.{name}" for name in _FUNCTIONAL.split()),
        *(f"torch._C._nn.{name}" for name in _NATIVE.split()),
        *(f"timm.layers.activations.{name}" for name in _TIMM.split()),
        *(f"torchvision.ops.boxes.{name}" for name in _BOXES.split()),
        "torchvision.models.optical_flow.raft._pass_through_h",
    }
)
# `torch.relu` is pickled as getattr(torch._C._VariableFunctionsClass, "relu").
_TORCH_NAMESPACE = "torch._C._VariableFunctionsClass"
_GENERAL = (
    "abs celu celu_ cos flatten hardshrink log_softmax prelu relu relu_ rrelu selu selu_ sigmoid"
    " sigmoid_ sin softmax square tanh tanh_"
)
_TORCH_FUNCTIONS = frozenset(_GENERAL.split())

# What training scripts put beside the weights: replaced by an inert stand-in, never imported.
_LEFTOVERS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|datetime\.(date|datetime|time|timedelta|timezone)"
    r"|pathlib\.\w*Path|pathlib\._local\.\w*Path"
    r"|numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
    r"|torch\.optim\.(\w+\.)*[A-Z]\w*|torch\.(cuda\.)?amp\.grad_scaler\.GradScaler"
)
_DATA_TYPES = re.compile(r"torch\.([a-z]\w*|\w+Storage|storage\.(Untyped|Typed)Storage)")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class Refusal(Exception):  # noqa: N818 - a verdict about a file, turned into a LoadError by the loader
    """A file asks for what it may not have; the text is the sentence about it.

    `options` are those of the command line that would let it, where there are any; `wanted` are the
    names that it asks for and may not have.
    """

    def __init__(
        self, sentence: str, options: tuple[str, ...] = (), wanted: tuple[str, ...] = ()
    ) -> None:
        super().__init__(sentence)
        self.options = options
        self.wanted = wanted


class Leftover:
    """Stands for an object beside the weights that is not needed, whatever its pickle says."""

    wanted = ""

    def __new__(cls, *_: Any) -> Leftover:
        """Take any arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""


@dataclass(frozen=True)
class Grant:
    """What a file may do with one global: create it (empty), call it, mention it as a value.

    `target` is what torch gets under that name, None where torch knows it by itself;
    `call` judges the arguments, of which only strings, numbers, tuples and globals are known;
    `module` says that it is a network's class, whose state is a dict of attributes; `state` judges
    that dict.
    """

    target: Any = None
    create: bool = False
    call: Callable[[Arguments], bool] | None = None
    mention: bool = False
    with_arguments: bool = False
    module: bool = False
    state: Callable[[Mapping[str, Any]], bool] | None = None


def _anything(_: Arguments) -> bool:
    return True


def _nothing(arguments: Arguments) -> bool:
    return not arguments


def _one(arguments: Arguments) -> bool:
    return len(arguments) == 1


def _one_class(arguments: Arguments) -> bool:
    return len(arguments) == 1 and isinstance(arguments[0], Global)


# What is iterated over must be written out in the file: a tensor of a few bytes has any length.
def _one_list(arguments: Arguments) -> bool:
    return len(arguments) == 1 and isinstance(arguments[0], Listed)


def _one_list_of_pairs_or_nothing(arguments: Arguments) -> bool:
    return not arguments or (_one_list(arguments) and arguments[0].plain)


def _one_dict(arguments: Arguments) -> bool:
    return len(arguments) == 1 and isinstance(arguments[0], Table)


def _one_tuple(arguments: Arguments) -> bool:
    return len(arguments) == 1 and isinstance(arguments[0], Sequenced)


def _one_name(arguments: Arguments) -> bool:
    return len(arguments) == 1 and isinstance(arguments[0], (str, int))


def _latin1(arguments: Arguments) -> bool:
    return arguments[1:] == ("latin1",)


def _rebuilds_a_tensor(arguments: Arguments) -> bool:
    first = arguments[0] if arguments else None
    return isinstance(first, Global) and first.name.startswith("torch._utils._rebuild_")


def _an_attribute(arguments: Arguments) -> bool:
    if len(arguments) != 2 or not isinstance(arguments[1], str):
        return False
    owner, name = arguments
    if isinstance(owner, Global):
        return owner.name == _TORCH_NAMESPACE and name in _TORCH_FUNCTIONS
    return isinstance(owner, Made) and name.startswith("forward")


def attribute(owner: Any, name: str) -> Any:
    """Stand in for `getattr` in a file: a harmless torch function, or a module's own forward."""
    if owner is _TORCH_NAMESPACE and name in _TORCH_FUNCTIONS:
        return getattr(torch, name)
    method = getattr(type(owner), name, None)
    own = isinstance(owner, nn.Module) and name.startswith("forward")
    if own and isinstance(method, types.FunctionType):
        return types.MethodType(method, owner)
    raise Refusal(f"it asks for the attribute {name!r} of a {type(owner).__name__}")


_DATA: dict[str, Grant] = {
    "_codecs.encode": Grant(call=_latin1),
    "builtins.complex": Grant(call=_anything),
    "builtins.frozenset": Grant(target=frozenset, call=_one_list),
    "builtins.getattr": Grant(target=attribute, call=_an_attribute),
    "builtins.set": Grant(call=_one_list),
    "builtins.slice": Grant(target=slice, call=_anything),
    "collections.Counter": Grant(call=_one_dict),
    "collections.OrderedDict": Grant(call=_one_list_of_pairs_or_nothing),
    "functools.partial": Grant(target=functools.partial, call=_one),
    "torch.Size": Grant(call=_one_tuple),
    "torch.Tensor": Grant(mention=True),
    "torch._tensor._rebuild_from_type_v2": Grant(call=_rebuilds_a_tensor),
    "torch._utils._rebuild_meta_tensor_no_storage": Grant(call=_anything, mention=True),
    "torch._utils._rebuild_parameter": Grant(call=_anything, mention=True),
    "torch._utils._rebuild_parameter_with_state": Grant(call=_anything, mention=True),
    "torch._utils._rebuild_tensor": Grant(call=_anything, mention=True),
    "torch._utils._rebuild_tensor_v2": Grant(call=_anything, mention=True),
    "torch._utils._rebuild_tensor_v3": Grant(call=_anything, mention=True),
    "torch.device": Grant(call=_anything),
    "torch.nn.parameter.Parameter": Grant(mention=True),
    _TORCH_NAMESPACE: Grant(target=_TORCH_NAMESPACE, mention=True),
}


class AllowList:
    """Decides what a file may name; `allow` are the classes that the user vouches for."""

    def __init__(self, allow: Sequence[str] = ()) -> None:
        self.allow = (allow,) if isinstance(allow, str) else tuple(allow)
        for name in self.allow:
            self._check(name)
        self._known: dict[str, Grant | None] = {}

    def grant(self, name: str) -> Grant | None:
        """What the file may do with the global, or None where it may not name it."""
        if name not in self._known:
            self._known[name] = self._judge(name)
        return self._known[name]

    def _judge(self, name: str) -> Grant | None:
        chosen = self._named_by_user(name)
        if chosen is not None:
            return _granted_by_user(chosen)
        if name in _DATA:
            return _DATA[name]
        if name in _FUNCTIONS:
            return _library_function(name)
        if name == REBUILD:
            return Grant(_library_object(name), call=_one_class)
        if _LEFTOVERS.fullmatch(name):
            return _left_out(name)
        return _data_type(name) or _library_class(name)

    def _named_by_user(self, name: str) -> str | None:
        if name in self.allow:
            return name
        script, _, cls = name.rpartition(".")
        if script != "__main__":
            return None
        return next((choice for choice in self.allow if choice.rpartition(".")[2] == cls), None)

    def _check(self, name: str) -> None:
        if not DOTTED.fullmatch(name):
            raise LoadError(f"Cannot allow {name!r}: give the full name of a class, package.Class.")
        if is_standard(name) and not _LEFTOVERS.fullmatch(name):
            raise LoadError(
                f"Cannot allow {name}: what is in Python's standard library can run any code."
            )


class TensorsOnly(AllowList):
    """Allows tensors and plain values, for files that are no models."""

    def _judge(self, name: str) -> Grant | None:
        return _DATA.get(name) or _data_type(name)


def is_standard(name: str) -> bool:
    """Whether a global is in Python's standard library."""
    top = name.partition(".")[0]
    return top in sys.stdlib_module_names and top != "__main__"


def _granted_by_user(name: str) -> Grant:
    target = import_object(*name.rpartition(".")[::2], what=f"allow {name}")
    if not isinstance(target, type):
        return Grant(target, mention=True)
    module = issubclass(target, nn.Module)
    return Grant(
        target,
        create=True,
        call=None if module else _anything,
        mention=True,
        with_arguments=not module,
        module=module,
        state=_state_rule(target),
    )


def _left_out(name: str) -> Grant:
    stand_in = type("Leftover", (Leftover,), {"wanted": name})
    return Grant(stand_in, create=True, call=_anything, mention=True, with_arguments=True)


def _data_type(name: str) -> Grant | None:
    if not _DATA_TYPES.fullmatch(name):
        return None
    value = getattr(torch, name.removeprefix("torch."), None)
    if name.endswith("Storage"):
        return Grant(mention=True) if hasattr(torch, name.rpartition(".")[2]) else None
    return Grant(mention=True) if isinstance(value, (torch.dtype, torch.qscheme)) else None


def _library_function(name: str) -> Grant | None:
    target = _library_object(name)
    return Grant(target, mention=True) if callable(target) else None


def _library_class(name: str) -> Grant | None:
    if not _is_library(name):
        return None
    target = _library_object(name)
    if not isinstance(target, type):
        return None
    # The class may go by an older name; it is judged by where it is really defined.
    origin = f"{target.__module__}.{target.__qualname__}"
    if not _is_library(origin) or _library_object(origin) is not target:
        return None
    if issubclass(target, Enum):
        return Grant(target, call=_one_name)
    if origin in _OTHER_CLASSES:
        return Grant(target, create=True)
    if origin in _CALLED_EMPTY:
        return Grant(target, create=True, call=_nothing, module=True)
    if issubclass(target, nn.Module) and not issubclass(target, _REFUSED_CLASSES):
        mention = bool(_MENTIONED_CLASSES.fullmatch(origin))
        rule = _state_rule(target)
        return Grant(target, create=True, mention=mention, module=True, state=rule)
    return None


def _state_rule(target: type) -> Callable[[Mapping[str, Any]], bool] | None:
    return _has_few_layers if issubclass(target, nn.RNNBase) else None


def _has_few_layers(state: Mapping[str, Any]) -> bool:
    # The __setstate__ of recurrent layers counts up to this number, whatever it is.
    layers = state.get("num_layers", 0)
    return type(layers) is int and layers <= _MOST_LAYERS


def _is_library(name: str) -> bool:
    inside = any(name.startswith(f"{package}.") for package in _PACKAGES)
    return name in _OTHER_CLASSES or (inside and bool(DOTTED.fullmatch(name)))


def _library_object(name: str) -> Any:
    module, _, attribute_name = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute_name, None)
    except Exception:  # noqa: BLE001 - a module that cannot be imported grants nothing
        return None
