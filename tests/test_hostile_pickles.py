"""Files that run code when torch or pickle reads them: none of it runs here."""

from __future__ import annotations

import contextlib
import copyreg
import cProfile
import functools
import os
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from hostile import (
    BIRD,
    EXTENSION,
    SHELL,
    SING,
    SINGING,
    Calls,
    dumped,
    legacy,
    model_with,
    raw,
    write_legacy,
    write_tar,
    write_zip,
)
from torch import nn

from bntools.arrays import read_arrays
from bntools.errors import BNToolsError, LoadError
from bntools.formats import soundness
from bntools.inputs import read_inputs
from bntools.loading import load
from bntools.rewriting import Rewritten, tracing

WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy], ids=["zip", "legacy"])
PAYLOADS = pytest.mark.parametrize("payload", SINGING.values(), ids=SINGING.keys())


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that exists once any code of a payload has run, also by importing `songbird`."""
    song = tmp_path / "song"
    monkeypatch.setenv("CANARY", str(song))
    nest = tmp_path / "nest"
    nest.mkdir()
    for name in ("songbird.py", "hubconf.py"):
        (nest / name).write_text(BIRD)
    monkeypatch.syspath_prepend(nest)
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("builtins", "exec", EXTENSION)
    yield song
    copyreg.remove_extension("builtins", "exec", EXTENSION)
    sys.modules.pop("songbird", None)


def unpickle(path, then=lambda _: None):
    """What plain torch.load does with a file, and what is then done with its content."""
    with contextlib.suppress(Exception):
        then(torch.load(path, weights_only=False))


@WRITERS
@PAYLOADS
@pytest.mark.filterwarnings("ignore")
def test_plain_unpickling_runs_it(write, payload, canary, tmp_path):
    """Each payload could fail the test below."""
    unpickle(write(tmp_path / "model.pt", payload))
    assert canary.exists()


@WRITERS
@PAYLOADS
def test_reading_a_model_runs_nothing(write, payload, canary, tmp_path):
    """And says in one line what the file wants."""
    with pytest.raises(LoadError, match=r"Cannot load .*model\.pt: its? ") as caught:
        load(write(tmp_path / "model.pt", payload))
    assert not canary.exists()
    assert "songbird" not in sys.modules
    assert "\n" not in str(caught.value)


@WRITERS
@PAYLOADS
@pytest.mark.parametrize("read", [read_inputs, read_arrays], ids=["inputs", "data"])
def test_reading_inputs_and_data_runs_nothing(read, write, payload, canary, tmp_path):
    """Their files come from strangers as well."""
    with pytest.raises(BNToolsError, match=r"Cannot (read|use) the (inputs|data) .*model\.pt"):
        read(write(tmp_path / "model.pt", payload))
    assert not canary.exists()
    assert "songbird" not in sys.modules


@pytest.mark.parametrize("place", range(5))
def test_no_pickle_of_an_old_file_runs(place, canary, tmp_path):
    """There are five: a number, a version, the system, the content, and the names of storages."""
    path = tmp_path / "model.pt"
    path.write_bytes(legacy(SINGING["exec"], place))
    with pytest.raises(LoadError, match=r"Cannot load .*model\.pt: it"):
        load(path)
    assert not canary.exists()
    unpickle(path)
    assert canary.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_file_from_before_torch_0_2_runs_nothing(canary, tmp_path):
    """It is a tar archive of pickles."""
    path = write_tar(tmp_path / "model.pt", SINGING["exec"])
    with pytest.raises(LoadError, match="a compressed or packed file"):
        load(path)
    assert not canary.exists()
    unpickle(path)
    assert canary.exists()


@pytest.mark.parametrize(
    "name", ["byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"]
)
def test_code_in_an_optional_record_is_not_looked_at(name, canary, tmp_path):
    """Whatever torch makes of the record."""
    for payload in (SINGING["exec"], SING.encode()):
        path = write_zip(tmp_path / "model.pt", raw(b"}"), **{name: payload})
        with pytest.raises(LoadError, match=r"Cannot load .*model\.pt: it"):
            load(path)
        assert not canary.exists()


@pytest.mark.parametrize("name", ["constants.pkl", "data/sample_inputs/model.pt"])
def test_a_program_with_a_hostile_part_runs_nothing(name, canary, tmp_path):
    """TorchScript and torch.export archives hold pickles as well."""
    marks = {"constants.pkl": raw(b")"), "archive_format": b"pt2", "archive_version": b"0"}
    others = {**marks, name: SINGING["exec"]} if "sample" in name else {name: SINGING["exec"]}
    path = write_zip(tmp_path / "model.pt2", SINGING["exec"], **others)
    with pytest.raises(LoadError, match=r"Cannot load .*model\.pt2: it"):
        load(path)
    assert not canary.exists()


# ---- what runs only when the model does ----------------------------------------------------------


SINGER = functools.partial(cProfile.run, SING)
WITH_CODE = {
    "as its forward": model_with(forward=SINGER),
    "as a hook": model_with(_forward_pre_hooks=OrderedDict({0: SINGER})),
    "as another method": model_with(_slow_forward=SINGER, forward=SINGER),
}


LATER = {how: dumped(model) for how, model in WITH_CODE.items()}


@pytest.mark.parametrize("payload", LATER.values(), ids=LATER.keys())
def test_code_that_would_run_with_the_model_does_not_get_into_it(payload, canary, tmp_path):
    """A file may keep no function in a model, but the harmless ones of a list."""
    path = write_zip(tmp_path / "model.pt", payload)
    with pytest.raises(LoadError, match=r"it asks for cProfile\.run"):
        load(path)
    unpickle(path, lambda read: read(os.devnull))
    assert canary.exists()


SYSTEM = f"getattr(__import__('os'), 'system')({SHELL!r})"
BREAKING_OUT = f'a")\n{SYSTEM}\n("'


class Renamed:
    """Pickles as a module whose forward is to be traced again, with a child of a hostile name."""

    def __reduce__(self):
        inner = nn.Sequential(OrderedDict(a=nn.ReLU()))
        inner._modules[BREAKING_OUT] = nn.ReLU()
        return Rewritten, (), {"module": inner, "removed": []}


def test_the_name_of_a_module_does_not_become_code(canary, tmp_path, monkeypatch):
    """torch.fx writes names into the source that it generates, and runs it."""
    path = write_zip(tmp_path / "model.pt", dumped(Renamed()))
    with pytest.raises(LoadError, match="a name in it could change the code"):
        load(path)
    assert not canary.exists()
    for place in (tracing, soundness):
        monkeypatch.setattr(place, "bad_name", lambda _: None)
    with contextlib.suppress(TypeError):
        load(path)(torch.zeros(1))
    assert canary.exists()


@pytest.mark.parametrize("name", ["a.b", 'a"b', "a'b", "a\nb", "a\\b", "", "a\x1b[2Jb"])
def test_a_model_with_a_part_that_cannot_be_named_is_refused(name, tmp_path):
    """Such a name could not be given in Python."""
    model = nn.Sequential(nn.ReLU())
    model._modules[name] = nn.ReLU()
    with pytest.raises(LoadError, match=r"a part of the model is called .*, which is no name"):
        load(write_zip(tmp_path / "model.pt", dumped(model)))


def test_names_that_models_do_have_are_accepted(tmp_path):
    """nn.ModuleDict takes nearly any text."""
    names = ["0", "layer-1", "a b", "größe", "2x2", "conv/relu", "(x)"]
    model = nn.ModuleDict({name: nn.ReLU() for name in names})
    assert list(load(write_zip(tmp_path / "model.pt", dumped(model)))) == names


def test_the_shell_and_the_source_sing(canary):
    """The two songs of the payloads are really songs."""
    for sing in (lambda: os.system(SHELL), lambda: exec(SING)):
        sing()
        assert canary.exists()
        canary.unlink()


def test_a_second_pickle_of_the_same_name_does_not_slip_through(canary, tmp_path):
    """Readers that ignore case take one, the others the other."""
    path = tmp_path / "model.pt"
    torch.save({"w": torch.zeros(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/DATA.pkl", SINGING["exec"])
    with pytest.raises(LoadError, match="two files of one name"):
        load(path)
    assert not canary.exists()


def test_what_is_called_is_listed_with_all_else_that_the_file_wants(tmp_path):
    """One run tells the user everything."""
    payload = dumped([Calls(os.system, SHELL), Calls(exec, SING), Calls(Renamed)])
    with pytest.raises(LoadError) as caught:
        load(write_zip(tmp_path / "model.pt", payload))
    assert "asks for builtins.exec, posix.system, which can run any code" in str(caught.value)
    assert "(besides, it wants hostile" not in str(caught.value)
    assert ".Renamed)" in str(caught.value)
