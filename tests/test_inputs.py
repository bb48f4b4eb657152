"""Example inputs from shapes and from files: what they become, and what each mistake is told."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import bntools
from bntools.errors import InputError
from bntools.inputs import read_inputs, shaped_inputs


@pytest.mark.parametrize(
    ("spec", "shape", "dtype"),
    [
        ("1x3x8x8", (1, 3, 8, 8), torch.float32),
        ("1X128:int64", (1, 128), torch.int64),
        ("2x5:float16", (2, 5), torch.float16),
        ("2x5:bfloat16", (2, 5), torch.bfloat16),
        ("3:float64", (3,), torch.float64),
        ("1x10:bool", (1, 10), torch.bool),
        ("4:uint8", (4,), torch.uint8),
        ("4:complex64", (4,), torch.complex64),
        ("scalar", (), torch.float32),
        (" scalar:int32 ", (), torch.int32),
    ],
)
def test_a_description_becomes_a_tensor(spec, shape, dtype):
    (tensor,) = shaped_inputs([spec]).args
    assert tuple(tensor.shape) == shape
    assert tensor.dtype == dtype


def test_descriptions_become_arguments_in_their_order():
    examples = shaped_inputs(["1x2", "3:int64"])
    assert str(examples) == "1x2 float32, 3 int64"
    assert not examples.kwargs
    assert not examples.inferred


def test_integers_are_digits_and_booleans_are_both():
    numbers, flags = shaped_inputs(["1000:int64", "1000:bool"]).args
    assert sorted(set(numbers.tolist())) == list(range(10))
    assert set(flags.tolist()) == {True, False}


def test_the_seed_decides_the_values():
    first, same, other = (shaped_inputs(["2x3"], seed=seed).args[0] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_random_state_of_the_caller_stays():
    before = torch.get_rng_state()
    shaped_inputs(["2x3", "2:bool"])
    assert torch.equal(before, torch.get_rng_state())


def test_floats_without_a_type_take_the_one_given_or_the_models():
    half = nn.Linear(2, 2).to(torch.bfloat16)
    specs = ["2", "2:float32", "2:int64"]
    assert str(shaped_inputs(specs, dtype=torch.float64)) == "2 float64, 2 float32, 2 int64"
    assert str(shaped_inputs(specs, like=half)) == "2 bfloat16, 2 float32, 2 int64"
    assert str(shaped_inputs(specs, like=nn.ReLU())) == "2 float32, 2 float32, 2 int64"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("1,3,8,8", "a shape is numbers with x between them. Write it like 1x3x224x224"),
        ("", "a shape is numbers"),
        ("1x3x", "a shape is numbers"),
        ("1x-3", "a shape is numbers"),
        ("axb", "a shape is numbers"),
        ("1x3:", "there is no type ''. Write one of float32, float16"),
        ("1x3:int", "there is no type 'int'. Write one of float32"),
        ("1x0x3", "it is empty. Give sizes of 1 or more"),
        ("99999x99999", "it has 1e\\+10 values. Give less"),
    ],
)
def test_a_description_that_is_none_is_explained(spec, message):
    with pytest.raises(InputError, match=f"^Cannot make an input '{spec}': {message}"):
        shaped_inputs([spec])


def test_arrays_by_number_are_positional_and_others_are_named(tmp_path):
    path = tmp_path / "inputs.npz"
    np.savez(path, mask=np.ones(2, bool), arg1=np.zeros(3), arg0=np.zeros((1, 2), np.int32))
    examples = read_inputs(path)
    assert str(examples) == "1x2 int32, 3 float64, mask=2 bool"


def test_arrays_without_names_are_positional(tmp_path):
    path = tmp_path / "inputs.npz"
    np.savez_compressed(path, np.zeros(1), np.ones(2), *[np.zeros(3)] * 9)
    assert [t.numel() for t in read_inputs(path).args] == [1, 2, *[3] * 9]


def test_one_array_is_one_argument(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6, dtype=">f4").reshape(2, 3))
    (tensor,) = read_inputs(tmp_path / "x.npy").args
    assert torch.equal(tensor, torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(1, 3), "1x3 float32"),
        ((torch.zeros(2), torch.ones(2, dtype=torch.int64)), "2 float32, 2 int64"),
        ([torch.zeros(2), torch.zeros(3)], "[2 float32, 3 float32]"),
        ({"x": torch.zeros(2), "scale": 2.0}, "x=2 float32, scale=2.0"),
        (nn.Parameter(torch.zeros(2)), "2 float32"),
    ],
    ids=["tensor", "tuple", "list", "dict", "parameter"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_torch_file_means_what_the_same_value_means_in_python(tmp_path, content, said, zipped):
    path = tmp_path / "inputs.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    examples = read_inputs(path)
    assert str(examples) == said
    assert not any(tensor.requires_grad for tensor in examples.tensors())


def test_floats_of_a_file_become_those_of_the_model(tmp_path):
    np.savez(tmp_path / "inputs.npz", np.zeros(2), np.zeros(2, int))
    model = nn.Linear(2, 2).half()
    assert str(read_inputs(tmp_path / "inputs.npz", like=model)) == "2 float16, 2 int64"


def write_npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def write_bytes(data):
    return lambda path: path.write_bytes(data)


def write_torch(content):
    return lambda path: torch.save(content, path)


MISTAKES = {
    "missing": (lambda path: None, "no such file or directory"),
    "a folder": (lambda path: path.mkdir(), "is a directory"),
    "empty": (write_bytes(b""), "it is empty. Save them with numpy.savez"),
    "text": (write_bytes(b"1 2 3\n"), "it is neither arrays .* or it is damaged. Save them"),
    "a truncated zip": (write_bytes(b"PK\x03\x04abc"), "it is damaged or incomplete"),
    "a truncated array": (write_bytes(b"\x93NUMPY\x01\x00"), "it is neither arrays"),
    "a gap": (write_npz(arg0=np.zeros(1), arg2=np.zeros(1)), "its .* count from arg0 without"),
    "counted twice": (write_npz(arg0=np.zeros(1), arr_0=np.zeros(1)), ".* count from arg0"),
    "counted from one": (write_npz(arg1=np.zeros(1)), "its arrays are arg1: positional"),
    "texts": (write_npz(arg0=np.array(["a"])), "arg0 has the type <U1, which torch does not have"),
    "objects": (write_npz(arg0=np.array([{}], object)), "it holds Python objects"),
    "no argument name": (write_npz(**{"conv.weight": np.zeros(1)}), "'conv.weight' is no argument"),
    "a state dict": (write_torch({"0.weight": torch.zeros(1)}), "'0.weight' is no argument name"),
    "a number": (write_torch(3), "it holds a int. Save them"),
    "no tensor": (write_torch({"a": 1}), "it holds no tensor"),
    "a model": (
        write_torch(nn.ReLU()),
        r"it holds more than tensors .*torch\.nn\.modules\.activation",
    ),
}


@pytest.mark.parametrize(("write", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_file_that_holds_no_inputs_is_explained(tmp_path, write, message):
    path = tmp_path / "inputs.npz"
    write(path)
    with pytest.raises(InputError, match=f"^Cannot read the inputs .*: {message}") as caught:
        read_inputs(path)
    assert "\n" not in str(caught.value)
    assert ".." not in str(caught.value)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["torch", "legacy", "npz", "pickle"])
def test_nothing_in_a_file_of_inputs_is_run(tmp_path, kind):
    path, canary = tmp_path / "inputs", tmp_path / "canary"
    evil = Touch(canary)
    with path.open("wb") as stream:
        if kind == "npz":
            np.savez(stream, arg0=np.array([evil], object))
        elif kind == "pickle":
            pickle.dump(evil, stream)
        else:
            torch.save(evil, stream, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(InputError, match="Cannot read the inputs"):
        read_inputs(path)
    assert not canary.exists()


def test_both_give_what_every_function_takes(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    np.savez(tmp_path / "inputs.npz", np.random.default_rng(0).normal(size=(2, 3)))
    for examples in (
        bntools.shaped_inputs(["2x3"], like=model),
        bntools.read_inputs(tmp_path / "inputs.npz", like=model),
    ):
        assert len(bntools.plan_fold(model, examples).folds) == 1
