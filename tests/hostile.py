"""Pickles that try to run code. Each plants a canary: a file that exists once any of it has run."""

from __future__ import annotations

import builtins
import cProfile
import functools
import importlib
import io
import marshal
import operator
import os
import pickle
import runpy
import subprocess
import tarfile
import timeit
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

MAGIC = 0x1950A86A20F9469CFC6C
SING = "open(__import__('os').environ['CANARY'], 'w').close()"
SHELL = 'touch "$CANARY"'
BIRD = """
import os
open(os.environ["CANARY"], "w").close()
def sing(*_): pass
class Bird: pass
"""
EXTENSION = 0x77
"""The number under which the tests register `exec` in copyreg."""


def write_zip(path: Path, payload: bytes, **others: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        for name, content in others.items():
            archive.writestr(f"archive/{name}", content)
    return path


def legacy(payload: bytes, place: int = 3) -> bytes:
    """The pickles of a file from before torch 1.6, of which one is the payload."""
    parts: list[object] = [MAGIC, 1001, {"little_endian": True}, {}, []]
    pickled = [pickle.dumps(part, 2) for part in parts]
    pickled[place] = payload
    return b"".join(pickled)


def write_legacy(path: Path, payload: bytes) -> Path:
    path.write_bytes(legacy(payload))
    return path


def write_tar(path: Path, payload: bytes) -> Path:
    """The format from before torch 0.2."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    return path


class Calls:
    """Pickles as a call of `function`, and a state that its result is given."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def raw(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def dumped(value, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)


def model_with(**attributes) -> nn.Module:
    model = nn.ReLU()
    model.__dict__.update(attributes)
    return model


def storage_id(kind: bytes, *, key: bytes = text("0"), count: bytes = b"K\x01") -> bytes:
    return b"(" + text("storage") + kind + key + text("cpu") + count + b"tQ"


SHORT = b"\x8c"  # SHORT_BINUNICODE
EXEC, SYSTEM, GETATTR = named("builtins.exec"), named("posix.system"), named("builtins.getattr")
RELU = named("torch.nn.modules.activation.ReLU") + b")\x81"
PARTIAL = named("functools.partial") + named("builtins.set") + b"\x85R"
CALL, CALL_SHELL = text(SING) + b"\x85R", text(SHELL) + b"\x85R"
RUN = EXEC + CALL
HARMLESS = named("collections.OrderedDict")
COMPILED = marshal.dumps(compile(SING, "x", "exec"))
PARTIAL_STATE = b"(" + EXEC + text(SING) + b"\x85}Nt"

# What plain unpickling runs.
CALLS = {
    "os.system": dumped(Calls(os.system, SHELL)),
    "exec": dumped(Calls(exec, SING)),
    "eval": dumped(Calls(eval, SING)),
    "compile and exec": dumped(Calls(exec, Calls(compile, SING, "x", "exec"))),
    "import_module": dumped(Calls(importlib.import_module, "songbird")),
    "__import__": dumped(Calls(builtins.__import__, "songbird")),
    "a module that sings when imported": raw(named("songbird.sing") + b")R"),
    "getoutput": dumped(Calls(subprocess.getoutput, SHELL)),
    "getoutput by its name in Python 2": raw(named("commands.getoutput") + CALL_SHELL),
    "eval by its name in Python 2": raw(named("__builtin__.eval") + CALL),
    "getattr of a module": dumped(Calls(getattr, Calls(__import__, "songbird"), "sing")),
    "getattr chain from torch": raw(
        GETATTR + named("torch.serialization.os") + text("system") + b"\x86R" + CALL_SHELL
    ),
    "attrgetter": dumped(Calls(operator.attrgetter("sing"), Calls(__import__, "songbird"))),
    "methodcaller": dumped(Calls(operator.methodcaller("system", SHELL), Calls(__import__, "os"))),
    "partial": dumped(Calls(functools.partial(exec, SING))),
    "partial by its state": raw(PARTIAL + b"q\x00" + PARTIAL_STATE + b"bh\x00)R"),
    "functools.reduce": dumped(Calls(functools.reduce, exec, [SING, {}])),
    "map": dumped(Calls(list, Calls(map, exec, [SING]))),
    "timeit": dumped(Calls(timeit.timeit, SING, "pass", timeit.default_timer, 1)),
    "cProfile": dumped(Calls(cProfile.run, SING, os.devnull)),
    "in a dict of another module": raw(
        EXEC + b"(" + text(SING) + named("torch.serialization.__dict__") + b"tR"
    ),
    "runpy": dumped(Calls(runpy.run_module, "songbird")),
    "marshal": dumped(Calls(exec, Calls(marshal.loads, COMPILED))),
    "copyreg": raw(
        named("copyreg._reconstructor")
        + (named("songbird.Bird") + named("builtins.object") + b"N\x87R")
        + named("songbird.Bird")
        + named("builtins.object")
        + b"N\x87R"
    ),
    "pickle.loads": dumped(Calls(pickle.loads, dumped(Calls(exec, SING)))),
    "torch's storages of old": dumped(
        Calls(torch.storage._load_from_bytes, legacy(dumped(Calls(exec, SING))))
    ),
    "torch's dotted import": dumped(Calls(torch._utils._import_dotted_name, "songbird")),
    "torch.hub": dumped(Calls(torch.hub._load_local, "nest", "sing")),
    "nested in arguments": dumped(Calls(OrderedDict, [("a", Calls(os.system, SHELL))])),
    "beside weights": dumped({"state_dict": {"a": 1}, "args": Calls(os.system, SHELL)}),
    "in a module's attributes": dumped(model_with(note=Calls(exec, SING))),
    "as a dict key": dumped({Calls(exec, SING): 1}),
    "in a set": dumped({Calls(exec, SING)}),
    "through a state": dumped(Calls(OrderedDict, state={"_metadata": Calls(exec, SING)})),
}

# Tricks of the pickle machine: another instruction, or another order, for the same call.
MACHINE = {
    "INST": raw(b"(" + text(SHELL) + b"iposix\nsystem\n"),
    "OBJ": raw(b"(" + SYSTEM + text(SHELL) + b"o"),
    "STACK_GLOBAL": b"\x80\x04"
    + SHORT
    + b"\x05posix"
    + SHORT
    + b"\x06system\x93"
    + CALL_SHELL
    + b".",
    "STACK_GLOBAL in protocol 2": raw(text("posix") + text("system") + b"\x93" + CALL_SHELL),
    "STACK_GLOBAL of memoised parts": b"\x80\x04"
    + (SHORT + b"\x05posix\x94" + SHORT + b"\x06system\x9400h\x00h\x01\x93" + CALL_SHELL + b"."),
    "NEWOBJ": raw(named("songbird.Bird") + b")\x81"),
    "NEWOBJ_EX": b"\x80\x04" + named("songbird.Bird") + b")}\x92.",
    "EXT1": raw(b"\x82" + bytes([EXTENSION]) + CALL),
    "EXT2": raw(b"\x83" + bytes([EXTENSION, 0]) + CALL),
    "EXT4": raw(b"\x84" + bytes([EXTENSION, 0, 0, 0]) + CALL),
    "protocol 0": b"cposix\nsystem\n(S'" + SHELL.encode() + b"'\ntR.",
    "protocol 1": b"cposix\nsystem\nU" + bytes([len(SHELL)]) + SHELL.encode() + b"\x85R.",
    "protocol 5": dumped(Calls(exec, SING), 5),
    "two protocols": b"\x80\x02\x80\x05" + RUN + b".",
    "a frame": b"\x80\x04\x95" + len(RUN + b".").to_bytes(8, "little") + RUN + b".",
    "DUP": raw(EXEC + b"20" + CALL),
    "POP": raw(RUN + b"0}"),
    "POP_MARK": raw(b"(" + RUN + b"1}"),
    "memoised and called later": raw(EXEC + b"q\x00" + HARMLESS + b")Rh\x00" + CALL),
    "a memo that is overwritten": raw(b"](" + HARMLESS + b"q\x00" + EXEC + b"q\x00eh\x00" + CALL),
    "a memo overwritten by its long form": raw(
        b"](" + HARMLESS + b"q\x07" + EXEC + b"r\x07\x00\x00\x00eh\x07" + CALL
    ),
    "a memo put in a tuple": raw(EXEC + b"q\x00(" + HARMLESS + b"q\x01h\x00q\x01th\x01" + CALL),
    "a memo of protocol 0": raw(EXEC + b"p7\n0g7\n" + CALL),
    "MEMOIZE": b"\x80\x04" + EXEC + b"\x940h\x00" + CALL + b".",
    "the argument from the memo": raw(text(SING) + b"\x85q\x00" + EXEC + b"h\x00R"),
    "a state set twice": raw(RELU + b"}" + text("__setstate__") + EXEC + b"sb" + text(SING) + b"b"),
    "a state of pairs": raw(
        RELU + b"](" + text("__setstate__") + EXEC + b"\x86eb" + text(SING) + b"b"
    ),
    "a state in slots": raw(
        named("torchvision.models.detection._utils.BoxCoder")
        + (b")\x81N}" + text("__setstate__") + EXEC + b"s\x86b" + text(SING) + b"b")
    ),
}

# In what torch adds to pickles.
TORCH = {
    "through _rebuild_from_type_v2": raw(
        named("torch._tensor._rebuild_from_type_v2")
        + (b"(" + EXEC + named("torch.Tensor") + text(SING) + b"\x85NtR")
    ),
    "in the hooks of a tensor": raw(
        named("torch._utils._rebuild_parameter") + b"(N\x89" + RUN + b"tR"
    ),
    "as the class of a storage": raw(storage_id(named("songbird.sing"))),
    "in the place of a storage's class": raw(storage_id(RUN)),
    "as the key of a storage": raw(storage_id(named("torch.FloatStorage"), key=RUN)),
    "as the size of a storage": raw(storage_id(named("torch.FloatStorage"), count=RUN)),
    "in a persistent id of text": raw(RUN + text("storage") + b"Q"),
    "as the state of a parameter": raw(
        named("torch._utils._rebuild_parameter_with_state") + b"(N\x89N}" + text("a") + RUN + b"stR"
    ),
}
SINGING = {**CALLS, **MACHINE, **TORCH}
