"""Example inputs of the command line: read from a file, or described by shapes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bntools.archives import holds_arrays, is_archive
from bntools.errors import InputError
from bntools.examples import Examples, given
from bntools.modules import floating_tensors
from bntools.trust import Refusal, TensorsOnly
from bntools.unpickling import refused, unpickle

__all__ = ["read_inputs", "shaped_inputs"]

_POSITIONAL = re.compile(r"arg_?(\d+)|arr_(\d+)")
_SHAPE = re.compile(r"\d+(x\d+)*", re.IGNORECASE)
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_MOST_VALUES = 2**30
_ADVICE = "Save them with numpy.savez(path, arg0=x) or torch.save((x,), path)"


def read_inputs(path: str | os.PathLike[str], *, like: nn.Module | None = None) -> Examples:
    """Read the arguments of one forward from a file, without running anything in it.

    `.npz`: the arrays arg0, arg1, ... or arr_0, arr_1, ... are positional arguments, all others
    keyword arguments by their names. `.npy`: one positional argument. A file that `torch.save`
    wrote holds a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list,
    which is one argument. With `like`, floating values get the dtype and all the device of that
    model's first floating tensor.

    Raises InputError.

    Example:
        >>> import tempfile, torch, bntools
        >>> from pathlib import Path
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "inputs.pt"
        >>> torch.save((torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)), path)
        >>> print(bntools.read_inputs(path))
        1x3x8x8 float32, 1 int64
        >>> folder.cleanup()
    """
    file = Path(path)
    with _explained(file):
        examples = _checked(_read(file)).mapped(Tensor.detach)
    first = _first_floating(like)
    return examples if first is None else examples.cast(first.dtype, first.device)


def shaped_inputs(
    specs: Sequence[str],
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    like: nn.Module | None = None,
) -> Examples:
    """Random positional arguments from descriptions such as "1x3x224x224" or "1x128:int64".

    "scalar" is a tensor without dimensions. Floats are standard normal, integers from 0 to 9. A
    description without a dtype gets `dtype`, else that of the first floating tensor of the model
    `like`, which also gives the device, else float32.

    Raises InputError.

    Example:
        >>> import bntools
        >>> print(bntools.shaped_inputs(["1x3x224x224", "1x128:int64"]))
        1x3x224x224 float32, 1x128 int64
    """
    first = _first_floating(like)
    usual = dtype or (torch.float32 if first is None else first.dtype)
    generator = torch.Generator().manual_seed(seed)
    tensors = tuple(_drawn(*_parsed(spec, usual), generator) for spec in specs)
    examples = Examples(tensors, drawn=True)
    return examples if first is None else examples.mapped(lambda t: t.to(first.device))


def _first_floating(model: nn.Module | None) -> Tensor | None:
    return None if model is None else next(floating_tensors(model), None)


# ---- shapes --------------------------------------------------------------------------------------


def _parsed(spec: str, usual: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    shape, colon, name = spec.strip().partition(":")
    if colon and name not in _DTYPES:
        raise InputError(
            f"Cannot make an input {spec!r}: there is no type {name!r}. Write one of"
            f" {', '.join(_DTYPES)} behind the colon."
        )
    dtype = _DTYPES[name] if colon else usual
    if shape == "scalar":
        return (), dtype
    if not _SHAPE.fullmatch(shape):
        raise InputError(
            f"Cannot make an input {spec!r}: a shape is numbers with x between them."
            " Write it like 1x3x224x224, 1x128:int64 or scalar."
        )
    sizes = tuple(map(int, shape.lower().split("x")))
    if 0 in sizes:
        raise InputError(f"Cannot make an input {spec!r}: it is empty. Give sizes of 1 or more.")
    count = 1
    for size in sizes:
        count *= size
    if count > _MOST_VALUES:
        raise InputError(f"Cannot make an input {spec!r}: it has {count:.2g} values. Give less.")
    return sizes, dtype


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, device="cpu").bool()
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(0, 10, shape, generator=generator, device="cpu").to(dtype)
    wide = dtype if dtype in (torch.float64, torch.complex64) else torch.float32
    return torch.randn(shape, generator=generator, dtype=wide, device="cpu").to(dtype)


# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Whatever goes wrong in reading becomes an InputError of one line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"Cannot read the inputs {file}: {error}.") from error.__cause__
    except Refusal as error:
        raise InputError(f"Cannot read the inputs {file}: {refused(error)}. {_ADVICE}.") from None
    except OSError as error:
        raise InputError(
            f"Cannot read the inputs {file}: {(error.strerror or str(error)).lower()}."
        ) from error
    except Exception as error:
        raise InputError(f"Cannot read the inputs {file}: {_problem(error)}. {_ADVICE}.") from error


def _problem(error: Exception) -> str:
    if "Object arrays" in str(error):
        return "it holds Python objects, which are not read"
    return "it is neither arrays (.npz, .npy) nor tensors of torch.save, or it is damaged"


def _read(file: Path) -> Examples:
    with file.open("rb") as stream:
        head = stream.read(6)
    if not head:
        raise InputError(f"it is empty. {_ADVICE}")
    if head.startswith(b"\x93NUMPY"):
        return Examples((_tensor("the array", np.load(file, mmap_mode="c", allow_pickle=False)),))
    with file.open("rb") as stream:
        if is_archive(head) and holds_arrays(stream):
            return _from_arrays(file)
        content, _ = unpickle(stream, TensorsOnly())
    if not isinstance(content, (Tensor, tuple, list, dict)):
        raise InputError(f"it holds a {type(content).__name__}. {_ADVICE}")
    return given(content)


def _from_arrays(file: Path) -> Examples:
    with np.load(file, allow_pickle=False) as arrays:
        tensors = {name: _tensor(name, arrays[name]) for name in arrays.files}
    numbered = {name: _POSITIONAL.fullmatch(name) for name in tensors}
    positions = {int(m[1] or m[2]): name for name, m in numbered.items() if m}
    named = {name: tensor for name, tensor in tensors.items() if not numbered[name]}
    if sorted(positions) != list(range(len(tensors) - len(named))):
        raise InputError(
            f"its arrays are {', '.join(tensors)}: positional arguments count from arg0 without a"
            " gap. Rename them"
        )
    return Examples(tuple(tensors[positions[i]] for i in range(len(positions))), named)


def _tensor(name: str, array: Any) -> Tensor:
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise InputError(
            f"{name} has the type {array.dtype}, which torch does not have. Convert it"
        ) from error


def _checked(examples: Examples) -> Examples:
    wrong = [name for name in examples.kwargs if not str(name).isidentifier()]
    if wrong:
        raise InputError(
            f"{wrong[0]!r} is no argument name: a dict holds keyword arguments. {_ADVICE}"
        )
    if not examples.tensors():
        raise InputError(f"it holds no tensor. {_ADVICE}")
    return examples
