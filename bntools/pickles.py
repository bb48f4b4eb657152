"""What a pickle asks for, found without running it, and held to the allow-list.

`examine` follows the pickle's own instructions with placeholders in place of objects. It is the
machine of `torch.load(weights_only=True)`: what passes here means the same there.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import IO, Any

from bntools.norms.frozen import frozen_class
from bntools.pickled_tensors import repeated_bytes, stored
from bntools.placeholders import (
    SHARED,
    Global,
    Listed,
    Made,
    Sequenced,
    Table,
    is_special,
)
from bntools.trust import REBUILD, AllowList, Grant, Leftover, Refusal
from bntools.wanted import refusal

__all__ = ["LARGEST_PICKLE", "Examined", "container_class", "examine", "too_long"]

LARGEST_PICKLE = 2**26

_MAX_TUPLE_DEPTH = 100
_WITH_STATE = {"torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_parameter_with_state"}
_MAX_TUPLE_WEIGHT = 1_000_000
_MOST_STEPS = 3_000_000
_LONGEST_NAME = 10_000
_TRUST = "if you made it, add --trust, which runs whatever is in it"


def container_class(_kind: str, cls: type, _file: str, _source: str) -> type:
    """Stand in for the persistent ids by which files from before torch 1.6 name their classes."""
    return cls


_CONTAINER = "bntools.pickles.container_class"


@dataclass
class Examined:
    """What one pickle asks for, once it is found acceptable.

    `grants` are (object, name) pairs for `torch.serialization.safe_globals`; `storages` says how
    many bytes each tensor storage claims; `edits` are the (start, position) pairs of persistent
    ids that name a class, which `rewritten` turns into what torch can read; `repeated` is how many
    bytes tensors show again and again.
    """

    grants: list[Callable[..., Any] | tuple[Any, str]] = field(default_factory=list)
    storages: dict[str, int] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    edits: list[tuple[int, int]] = field(default_factory=list)
    repeated: int = 0

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
    bounded: Any = _Bounded(stream)
    for count, (opcode, argument, position) in enumerate(pickletools.genops(bounded)):
        if count > _MOST_STEPS:
            raise Refusal(
                f"its pickle has over {_MOST_STEPS:,} instructions: no network needs them"
            )
        scan.step(opcode.name, argument, position or 0)
    return scan.finish()


class _Bounded:
    """A stream of which no more is read than a pickle may be long."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.end = stream.tell() + LARGEST_PICKLE

    def tell(self) -> int:
        return self.stream.tell()

    def read(self, count: int) -> bytes:
        if count > self.end - self.stream.tell():
            raise Refusal(too_long())
        return self.stream.read(count)

    def readline(self) -> bytes:
        line = self.stream.readline(_LONGEST_NAME)
        if len(line) == _LONGEST_NAME:
            raise Refusal("its pickle has a name beyond any sensible length")
        return line


def too_long() -> str:
    """What is said about a pickle that is too long to be followed."""
    return (
        f"its pickle is over {LARGEST_PICKLE >> 20} MiB long without the tensors: no network needs"
        " that"
    )


_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "BINFLOAT": 0.0,
}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": Table,
    "EMPTY_LIST": Listed,
    "EMPTY_SET": Made,
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
        self.rebuilt: set[str] = set()
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
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
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
            raise refusal(unknown, self.forbidden)
        self._grant_rebuilt()
        return self.examined

    def _grant_rebuilt(self) -> None:
        """Torch sets the state of what `rebuild` gives only if it knows its class."""
        for name in sorted(self.rebuilt):
            grant = self.allowed.grant(name)
            if grant is None or not isinstance(grant.target, type):
                raise Refusal(f"it rebuilds {name}, which is no class")
            try:
                self.examined.grants.append((frozen_class(grant.target), f"{REBUILD}({name})"))
            except TypeError as error:
                raise Refusal(f"it rebuilds {name}, which cannot be frozen") from error

    def _contain(self, name: str, position: int) -> None:
        """Tuples, and what goes into lists, dicts and objects."""
        if name in _TUPLES:
            count = _TUPLES[name]
            self._push_tuple(self._pop(count), position)
        elif name in _CONSUMED:
            self._put(self._pop(_CONSUMED[name]))
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items = self.stack
            self.stack, start = self.marks.pop()
            if name == "TUPLE":
                self._push_tuple(items, start)
            else:
                self._put(items)
        else:
            raise Refusal(
                f"its pickle has the instruction {name}, which torch.save's default protocol 2 "
                f"does not write. Save it again with torch.save(model, path); or {_TRUST}"
            )

    def _put(self, items: list[Any]) -> None:
        """Put what was taken from the stack into the list or dict that is now on top."""
        self._mention(items)
        container = self._top()
        if isinstance(container, (Listed, Table)):
            container.add(tuple(items))

    def _top(self) -> Any:
        return self.stack[-1]

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError("stack underflow")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _push_tuple(self, items: list[Any], start: int) -> None:
        inner = [item for item in items if isinstance(item, Sequenced)]
        weight = len(items) + 1 + sum(item.weight for item in inner)
        depth = 1 + max((item.depth for item in inner), default=0)
        if weight > _MAX_TUPLE_WEIGHT or depth > _MAX_TUPLE_DEPTH:
            raise Refusal("its pickle nests tuples beyond any sensible size")
        found = Sequenced(tuple(items), start, weight, depth)
        if not found.names_a_class:
            self._mention(items)
        self.stack.append(found)

    def _mention(self, values: Sequence[Any]) -> None:
        """Globals that are kept as values; those in a tuple were seen when it was made."""
        for value in values:
            if isinstance(value, Global):
                self._use(value, "mention")
            elif isinstance(value, Sequenced) and value.names_a_class:
                self._use(value.items[1], "mention")

    def _use(self, found: Global, how: str) -> Grant | None:
        self.names.setdefault(found.name, set()).add(how)
        return self.allowed.grant(found.name)

    def _proto(self, argument: Any, _: int) -> None:
        if argument != 2:
            raise Refusal(
                f"it was written with pickle protocol {argument}. Save it again with the default: "
                f"torch.save(model, path); or {_TRUST}"
            )

    def _stop(self, _: Any, __: int) -> None:
        self._mention(self._pop(1))

    def _mark(self, _: Any, position: int) -> None:
        self.marks.append((self.stack, position))
        self.stack = []

    def _global(self, argument: str, _: int) -> None:
        module, name = argument.split(" ", 1)
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        found = Global(f"{module}.{name}")
        self.names.setdefault(found.name, set())
        self.stack.append(found)

    def _reduce(self, _: Any, __: int) -> None:
        function, arguments = self._pop(2)
        self.stack.append(Made())
        if not isinstance(function, Global) or not isinstance(arguments, Sequenced):
            self.forbidden.append("it calls something that it has computed")
            return
        grant = self._use(function, "call")
        self._mention([arguments])
        if grant is None:
            return
        self.stack[-1] = Made(function.name)
        if grant.call is None or not grant.call(arguments.items):
            self.forbidden.append(f"it calls {function.name}")
        elif function.name == REBUILD:
            self.rebuilt.add(arguments.items[0].name)
        else:
            self._check_tensor(function.name, arguments.items)
        if isinstance(grant.target, type) and issubclass(grant.target, Enum):
            self.stack[-1] = SHARED

    def _check_tensor(self, function: str, arguments: tuple[Any, ...]) -> None:
        self.examined.repeated += repeated_bytes(function, arguments)
        if function in _WITH_STATE:
            self._check_attributes(arguments[-1])

    def _newobj(self, _: Any, __: int) -> None:
        cls, arguments = self._pop(2)
        self.stack.append(Made())
        if not isinstance(cls, Global) or not isinstance(arguments, Sequenced):
            self.forbidden.append("it creates something that it has computed")
            return
        self.stack[-1] = Made(cls.name)
        grant = self._use(cls, "create")
        self._mention([arguments])
        if grant is None:
            return
        if not grant.create or (arguments.items and not grant.with_arguments):
            self.forbidden.append(f"it creates {cls.name} in a way that torch.save does not write")

    def _build(self, _: Any, __: int) -> None:
        state = self._pop(1)
        self._mention(state)
        made = self._top()
        if made is SHARED:
            self.forbidden.append("it changes a constant of a library")
        elif isinstance(made, Made):
            if made.has_state:
                self.forbidden.append(f"it sets the state of a {made.origin} twice")
            made.has_state = True
            self._check_state(made.origin, state[0])

    def _check_state(self, origin: str, state: Any) -> None:
        if isinstance(state, Made):
            self.forbidden.append("it sets a state that it has computed")
            return
        grant = self.allowed.grant(origin) if origin else None
        if grant is None or (origin in self.allowed.allow and not grant.module):
            return
        if (grant.module or origin == REBUILD) and not isinstance(state, Table):
            self.forbidden.append(f"it sets the state of a {origin} to something else than a dict")
        elif grant.state is not None and not grant.state(state.entries):
            self.forbidden.append(f"it gives a {origin} more layers than any network has")
        self._check_attributes(state)

    def _check_attributes(self, state: Any) -> None:
        """No attribute may take the place of what Python looks up, such as __setstate__."""
        for part in state.items if isinstance(state, Sequenced) else (state,):
            name = is_special(part.entries) if isinstance(part, Table) else None
            if name is not None:
                self.forbidden.append(f"it sets the attribute {name}")

    def _persistent(self, _: Any, position: int) -> None:
        (identity,) = self._pop(1)
        items = identity.items if isinstance(identity, Sequenced) else ()
        if isinstance(identity, Sequenced) and identity.names_a_class:
            self.examined.edits.append((identity.start, position))
            self.stack.append(items[1])
            return
        if len(items) < 5 or items[0] != "storage" or not isinstance(items[1], Global):
            raise Refusal("it has a persistent id that is no tensor storage")
        key, claimed, found = stored(items[1].name, items)
        self.stack.append(found)
        self.examined.storages[key] = max(claimed, self.examined.storages.get(key, 0))
