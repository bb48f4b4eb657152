"""What a pickle may name, call and create: the allow-list, and the scan that holds a file to it.

Nothing here runs any part of a file. `examine` follows the pickle's own instructions with
placeholders in place of objects, so that every global is judged by what would be done with it:
a class may be created empty, an enumerated function may be mentioned, and only the few rebuilding
functions that torch itself writes may be called.
"""

from __future__ import annotations

import functools
import importlib
import pickletools
import re
import sys
import types
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from bntools.errors import LoadError

__all__ = [
    "AllowList",
    "Examined",
    "Leftover",
    "Refusal",
    "examine",
    "import_object",
    "one_line",
    "working_folder_first",
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
# Its __setstate__ joins a process group.
_REFUSED_CLASSES = frozenset({"torch.nn.parallel.distributed.DistributedDataParallel"})
# Classes that models keep as values (`self._norm_layer = nn.BatchNorm2d`) and may call later.
_MENTIONED_CLASSES = re.compile(
    r"torch\.nn\.modules\.\w+\.\w+|torchvision\.ops\.misc\.\w+"
    r"|timm\.layers\.(norm|norm_act|frozen_bn)\.\w+|timm\.models\.nextvit\.Next\w+Block"
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
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

_MAX_TUPLE_DEPTH = 100
_MAX_TUPLE_WEIGHT = 1_000_000

Arguments = tuple[Any, ...]


class Refusal(Exception):  # noqa: N818 - a verdict about a file, turned into a LoadError by the loader
    """A file asks for what it may not have; the text is the sentence about it."""


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
    `call` judges the arguments, of which only strings, numbers, tuples and globals are known.
    """

    target: Any = None
    create: bool = False
    call: Callable[[Arguments], bool] | None = None
    mention: bool = False
    with_arguments: bool = False


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True, eq=False)
class _Tuple:
    items: Arguments
    start: int
    weight: int
    depth: int

    @property
    def names_a_class(self) -> bool:
        """Whether it can be the persistent id of a class, in a file from before torch 1.6."""
        items = self.items
        return len(items) == 4 and items[0] == "module" and isinstance(items[1], _Global)


class _Object:
    """An object of which the scan knows no more than this."""


_LIST, _DICT, _UNKNOWN = _Object(), _Object(), _Object()
# The members of an Enum are shared by the whole process: no file may set their state.
_SHARED = _Object()


def _anything(_: Arguments) -> bool:
    return True


def _one(arguments: Arguments) -> bool:
    return len(arguments) == 1


# What is iterated over must be written out in the file: a tensor of a few bytes has any length.
def _one_list(arguments: Arguments) -> bool:
    return len(arguments) == 1 and arguments[0] is _LIST


def _one_list_or_nothing(arguments: Arguments) -> bool:
    return not arguments or _one_list(arguments)


def _one_dict(arguments: Arguments) -> bool:
    return len(arguments) == 1 and arguments[0] is _DICT


def _one_tuple(arguments: Arguments) -> bool:
    return len(arguments) == 1 and isinstance(arguments[0], _Tuple)


def _one_name(arguments: Arguments) -> bool:
    return len(arguments) == 1 and isinstance(arguments[0], (str, int))


def _latin1(arguments: Arguments) -> bool:
    return arguments[1:] == ("latin1",)


def _rebuilds_a_tensor(arguments: Arguments) -> bool:
    first = arguments[0] if arguments else None
    return isinstance(first, _Global) and first.name.startswith("torch._utils._rebuild_")


def _an_attribute(arguments: Arguments) -> bool:
    if len(arguments) != 2 or not isinstance(arguments[1], str):
        return False
    owner, name = arguments
    if isinstance(owner, _Global):
        return owner.name == _TORCH_NAMESPACE and name in _TORCH_FUNCTIONS
    return owner is _UNKNOWN and name.startswith("forward")


def attribute(owner: Any, name: str) -> Any:
    """Stand in for `getattr` in a file: a harmless torch function, or a module's own forward."""
    if owner is _TORCH_NAMESPACE and name in _TORCH_FUNCTIONS:
        return getattr(torch, name)
    method = getattr(type(owner), name, None)
    own = isinstance(owner, nn.Module) and name.startswith("forward")
    if own and isinstance(method, types.FunctionType):
        return types.MethodType(method, owner)
    raise Refusal(f"it asks for the attribute {name!r} of a {type(owner).__name__}")


def container_class(_kind: str, cls: type, _file: str, _source: str) -> type:
    """Stand in for the persistent ids by which files from before torch 1.6 name their classes."""
    return cls


_CONTAINER = "bntools.trust.container_class"

_DATA: dict[str, Grant] = {
    "_codecs.encode": Grant(call=_latin1),
    "builtins.complex": Grant(call=_anything),
    "builtins.frozenset": Grant(target=frozenset, call=_one_list),
    "builtins.getattr": Grant(target=attribute, call=_an_attribute),
    "builtins.set": Grant(call=_one_list),
    "builtins.slice": Grant(target=slice, call=_anything),
    "collections.Counter": Grant(call=_one_dict),
    "collections.OrderedDict": Grant(call=_one_list_or_nothing),
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
        if not _DOTTED.fullmatch(name):
            raise LoadError(f"Cannot allow {name!r}: give the full name of a class, package.Class.")
        if _is_standard(name) and not _LEFTOVERS.fullmatch(name):
            raise LoadError(
                f"Cannot allow {name}: what is in Python's standard library can run any code."
            )


def _is_standard(name: str) -> bool:
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
    if issubclass(target, nn.Module) and origin not in _REFUSED_CLASSES:
        return Grant(target, create=True, mention=bool(_MENTIONED_CLASSES.fullmatch(origin)))
    return None


def _is_library(name: str) -> bool:
    inside = any(name.startswith(f"{package}.") for package in _PACKAGES)
    return name in _OTHER_CLASSES or (inside and bool(_DOTTED.fullmatch(name)))


def _library_object(name: str) -> Any:
    module, _, attribute_name = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute_name, None)
    except Exception:  # noqa: BLE001 - a module that cannot be imported grants nothing
        return None


def one_line(error: Exception) -> str:
    """The message of an error, short and in one line."""
    text = " ".join(str(error).split())
    return f"{text[:160]}..." if len(text) > 160 else text


@contextmanager
def working_folder_first() -> Iterator[None]:
    """Imports look in the working folder first, as with `python -m`."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def import_object(module: str, name: str, *, what: str) -> Any:
    """Import what the user named, from the working folder or the Python path.

    Raises LoadError, which begins with "Cannot {what}".
    """
    try:
        with working_folder_first():
            found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise LoadError(
            f"Cannot {what}: no module named {error.name!r} here or on the Python path."
        ) from error
    except Exception as error:
        raise LoadError(
            f"Cannot {what}: importing {module} raised {type(error).__name__}: {one_line(error)}."
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise LoadError(f"Cannot {what}: {module} has no {name!r}.")
        found = getattr(found, part)
    return found


@dataclass
class Examined:
    """What one pickle asks for, once it is found acceptable.

    `grants` are (object, name) pairs for `torch.serialization.safe_globals`; `storages` says how
    many bytes each tensor storage claims; `edits` are the (start, position) pairs of persistent
    ids that name a class, which `rewritten` turns into what torch can read.
    """

    grants: list[Callable[..., Any] | tuple[Any, str]] = field(default_factory=list)
    storages: dict[str, int] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    edits: list[tuple[int, int]] = field(default_factory=list)

    def rewritten(self, data: bytes) -> bytes:
        """The bytes of a file with its class ids (from before torch 1.6) made plain."""
        call = "c{}\n{}\n".format(*_CONTAINER.rsplit(".", 1)).encode()
        pieces, done = [], 0
        for position, new, skip in sorted(
            [(start, call, 0) for start, _ in self.edits] + [(p, b"R", 1) for _, p in self.edits]
        ):
            pieces += [data[done:position], new]
            done = position + skip
        return b"".join([*pieces, data[done:]])


def examine(stream: IO[bytes], allowed: AllowList) -> Examined:
    """Follow one pickle without running it, and say what it asks for.

    Raises Refusal for what may not be; ValueError, KeyError or IndexError for a broken pickle.
    """
    scan = _Scan(allowed)
    for opcode, argument, position in pickletools.genops(stream):
        scan.step(opcode.name, argument, position or 0)
    return scan.finish()


_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "BINFLOAT": 0.0,
    "EMPTY_DICT": _DICT,
    "EMPTY_LIST": _LIST,
    "EMPTY_SET": _UNKNOWN,
}
_LITERALS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINSTRING"})
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONSUMED = {"APPEND": 1, "SETITEM": 2}


class _Scan:
    """The pickle machine of `torch.load(weights_only=True)`, with placeholders for objects."""

    def __init__(self, allowed: AllowList) -> None:
        self.allowed = allowed
        self.stack: list[Any] = []
        self.marks: list[tuple[list[Any], int]] = []
        self.memo: dict[int, Any] = {}
        self.examined = Examined()
        self.names: dict[str, set[str]] = {}
        self.forbidden: list[str] = []
        self.special: dict[str, Callable[[Any, int], None]] = {
            "PROTO": self._proto,
            "STOP": self._stop,
            "GLOBAL": self._global,
            "MARK": self._mark,
            "REDUCE": self._reduce,
            "NEWOBJ": self._newobj,
            "BUILD": self._build,
            "BINPERSID": self._persistent,
        }

    def step(self, name: str, argument: Any, position: int) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in self.special:
            self.special[name](argument, position)
        else:
            self._contain(name, position)

    def finish(self) -> Examined:
        """What was found, or the Refusal."""
        unknown = {n: uses for n, uses in self.names.items() if self.allowed.grant(n) is None}
        for name, uses in self.names.items():
            grant = self.allowed.grant(name)
            if grant is None:
                continue
            if grant.target is not None:
                self.examined.grants.append((grant.target, name))
            if isinstance(grant.target, type) and issubclass(grant.target, Leftover):
                self.examined.leftovers.append(name)
            if "mention" in uses and not grant.mention:
                self.forbidden.append(f"it keeps {name} as a value")
        if self.examined.edits:
            self.examined.grants.append((container_class, _CONTAINER))
        if unknown or self.forbidden:
            raise Refusal(_refusal(unknown, self.forbidden))
        return self.examined

    def _contain(self, name: str, position: int) -> None:
        """Tuples, and what goes into lists, dicts and objects."""
        if name in _TUPLES:
            count = _TUPLES[name]
            self._push_tuple(self._pop(count), position)
        elif name in _CONSUMED:
            self._mention(self._pop(_CONSUMED[name]))
            self._top()
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items = self.stack
            self.stack, start = self.marks.pop()
            if name == "TUPLE":
                self._push_tuple(items, start)
            else:
                self._mention(items)
                self._top()
        else:
            raise Refusal(
                f"its pickle has the instruction {name}, which torch.save's default protocol 2 "
                "does not write. Save it again with torch.save(model, path)"
            )

    def _top(self) -> Any:
        return self.stack[-1]

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError("stack underflow")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _push_tuple(self, items: list[Any], start: int) -> None:
        inner = [item for item in items if isinstance(item, _Tuple)]
        weight = len(items) + 1 + sum(item.weight for item in inner)
        depth = 1 + max((item.depth for item in inner), default=0)
        if weight > _MAX_TUPLE_WEIGHT or depth > _MAX_TUPLE_DEPTH:
            raise Refusal("its pickle nests tuples beyond any sensible size")
        found = _Tuple(tuple(items), start, weight, depth)
        if not found.names_a_class:
            self._mention(items)
        self.stack.append(found)

    def _mention(self, values: Sequence[Any]) -> None:
        """Globals that are kept as values; those in a tuple were seen when it was made."""
        for value in values:
            if isinstance(value, _Global):
                self._use(value, "mention")
            elif isinstance(value, _Tuple) and value.names_a_class:
                self._use(value.items[1], "mention")

    def _use(self, found: _Global, how: str) -> Grant | None:
        self.names.setdefault(found.name, set()).add(how)
        return self.allowed.grant(found.name)

    def _proto(self, argument: Any, _: int) -> None:
        if argument != 2:
            raise Refusal(
                f"it was written with pickle protocol {argument}. Save it again with the default: "
                "torch.save(model, path)"
            )

    def _stop(self, _: Any, __: int) -> None:
        self._mention(self._pop(1))

    def _mark(self, _: Any, position: int) -> None:
        self.marks.append((self.stack, position))
        self.stack = []

    def _global(self, argument: str, _: int) -> None:
        module, name = argument.split(" ", 1)
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        found = _Global(f"{module}.{name}")
        self.names.setdefault(found.name, set())
        self.stack.append(found)

    def _reduce(self, _: Any, __: int) -> None:
        function, arguments = self._pop(2)
        self.stack.append(_UNKNOWN)
        if not isinstance(function, _Global) or not isinstance(arguments, _Tuple):
            self.forbidden.append("it calls something that it has computed")
            return
        grant = self._use(function, "call")
        self._mention([arguments])
        if grant is None:
            return
        if grant.call is None or not grant.call(arguments.items):
            self.forbidden.append(f"it calls {function.name}")
        if isinstance(grant.target, type) and issubclass(grant.target, Enum):
            self.stack[-1] = _SHARED

    def _newobj(self, _: Any, __: int) -> None:
        cls, arguments = self._pop(2)
        self.stack.append(_UNKNOWN)
        if not isinstance(cls, _Global) or not isinstance(arguments, _Tuple):
            self.forbidden.append("it creates something that it has computed")
            return
        grant = self._use(cls, "create")
        self._mention([arguments])
        if grant is None:
            return
        if not grant.create or (arguments.items and not grant.with_arguments):
            self.forbidden.append(f"it creates {cls.name} in a way that torch.save does not write")

    def _build(self, _: Any, __: int) -> None:
        state = self._pop(1)
        self._mention(state)
        if self._top() is _SHARED:
            self.forbidden.append("it changes a constant of a library")
        if state[0] is _UNKNOWN:
            self.forbidden.append("it sets a state that it has computed")

    def _persistent(self, _: Any, position: int) -> None:
        (identity,) = self._pop(1)
        items = identity.items if isinstance(identity, _Tuple) else ()
        if isinstance(identity, _Tuple) and identity.names_a_class:
            self.examined.edits.append((identity.start, position))
            self.stack.append(items[1])
            return
        self.stack.append(_UNKNOWN)
        if len(items) < 5 or items[0] != "storage" or not isinstance(items[1], _Global):
            raise Refusal("it has a persistent id that is no tensor storage")
        _, kind, key, _, count = items[:5]
        if not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise Refusal("it has a tensor storage without a valid size")
        claimed = count * _item_size(kind.name)
        self.examined.storages[key] = max(claimed, self.examined.storages.get(key, 0))


def _item_size(storage: str) -> int:
    dtype = getattr(getattr(torch, storage.rpartition(".")[2], None), "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 1


def _refusal(unknown: dict[str, set[str]], forbidden: list[str]) -> str:
    hostile = [n for n, uses in unknown.items() if not _can_be_allowed(n, uses)]
    if hostile or forbidden:
        asks = [f"it asks for {', '.join(sorted(hostile))}"] if hostile else []
        return (
            f"{'; '.join([*asks, *dict.fromkeys(forbidden)])}, which can run any code, and was not "
            "run. If you made the file, save model.state_dict() instead and load it with --arch; "
            "if not, do not use it"
        )
    names = sorted(unknown)
    options = [n.replace("__main__.", "MODULE.") for n in names]
    script = " (MODULE is the importable file that defines it)" if options != names else ""
    return (
        f"it holds objects of classes that bntools does not know: {', '.join(names)}. If you trust "
        f"the file, add {' '.join(f'--allow {n}' for n in options)}{script}; "
        f"in Python allow=({', '.join(repr(n) for n in options)},)"
    )


def _can_be_allowed(name: str, uses: set[str]) -> bool:
    # Only names are offered for pasting into a shell; and what is only called is a function,
    # unless it looks like a class.
    looks_like_a_class = uses != {"call"} or name.rpartition(".")[2][:1].isupper()
    return bool(_DOTTED.fullmatch(name)) and looks_like_a_class and not _is_standard(name)
