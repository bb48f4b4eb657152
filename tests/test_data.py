"""Data sources: what becomes of each, in which order, on how many processes, and every mistake."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

import bntools
from bntools import Preprocessing, read_data
from bntools.errors import DataError, LoadError

GREY = Preprocessing(grayscale=True)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path, array=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(8, 8, 3) if array is None else array).save(path, **options)
    return path


def images_of(data):
    return torch.cat([batch[0] if isinstance(batch, tuple) else batch for batch in data])


def labels_of(data):
    return torch.cat([labels for _, labels in data])


@pytest.fixture
def classes(tmp_path):
    """A folder with two classes, three images each, of values 0, 10, 20 and 100, 110, 120."""
    for c, name in enumerate(("cat", "dog")):
        for i in range(3):
            write_image(
                tmp_path / name / f"{i}.png", np.full((8, 8, 3), 100 * c + 10 * i, np.uint8)
            )
    return tmp_path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder whose module `mine` can be imported."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "mine.py").write_text(text)

    yield write
    sys.modules.pop("mine", None)


# ---- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 8, 6), (5, 1, 8, 6)),
        ((5, 8, 6, 1), (5, 1, 8, 6)),
        ((5, 8, 6, 3), (5, 3, 8, 6)),
        ((5, 3, 8, 6), (5, 3, 8, 6)),
        ((5, 1, 8, 6), (5, 1, 8, 6)),
        ((5, 3, 3, 3), (5, 3, 3, 3)),
    ],
)
def test_bytes_become_channels_first_floats_in_0_to_1(tmp_path, shape, expected):
    array = pixels(*shape)
    np.save(tmp_path / "x.npy", array)
    (batch,) = read_data(tmp_path / "x.npy")
    assert tuple(batch.shape) == expected
    assert batch.dtype == torch.float32
    truth = torch.from_numpy(array)
    if len(shape) == 3:
        truth = truth[:, None]
    elif shape[3] in (1, 3):
        truth = truth.permute(0, 3, 1, 2)
    assert torch.equal(batch, truth.float() / 255)


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
def test_floats_are_what_the_model_takes(tmp_path, dtype):
    array = np.linspace(-3, 3, 24).reshape(4, 3, 2).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    (batch,) = read_data(tmp_path / "x.npy")
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.from_numpy(array.astype(np.float32)))


def test_whole_numbers_stay_whole(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.int32).reshape(2, 3))
    (batch,) = read_data(tmp_path / "x.npy")
    assert batch.dtype == torch.int32


def write_pair(path, kind):
    x, y = torch.from_numpy(pixels(5, 4, 4)), torch.tensor([3, 1, 2, 0, 1])
    if kind == "npz":
        with path.open("wb") as stream:
            np.savez(stream, images=x.numpy(), labels=y.numpy().astype(np.uint8))
    elif kind == "npz without names":
        with path.open("wb") as stream:
            np.savez(stream, x.numpy(), y.numpy())
    elif kind == "pt pair":
        torch.save((x, y), path)
    elif kind == "pt dict":
        torch.save({"x": x, "y": y}, path)
    elif kind == "pt one-column labels":
        torch.save({"x": x, "targets": y[:, None]}, path)
    else:
        save_file({"test_images": x, "test_labels": y}, path)
    return x, y


@pytest.mark.parametrize(
    "kind",
    ["npz", "npz without names", "pt pair", "pt dict", "pt one-column labels", "safetensors"],
)
def test_images_and_labels_are_found_in_every_format(tmp_path, kind):
    x, y = write_pair(tmp_path / "data", kind)
    data = read_data(tmp_path / "data", batch_size=2)
    assert torch.equal(images_of(data), x[:, None].float() / 255)
    assert torch.equal(labels_of(data), y)
    assert labels_of(data).dtype == torch.int64
    assert len(data) == 3
    assert data.samples == 5


def test_which_arrays_are_meant_is_asked_where_it_is_not_clear(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(
        path,
        x_train=pixels(4, 2, 2),
        y_train=np.arange(4),
        x_test=pixels(3, 2, 2),
        y_test=np.arange(3),
    )
    with pytest.raises(DataError, match=r"say which .*\?images=x_train&labels=y_train\.$"):
        read_data(path)
    data = read_data(f"{path}?images=x_test", shuffle=False)
    assert labels_of(data).tolist() == [0, 1, 2]
    assert data.described.startswith(f"3 samples of {path} (x_test with y_test)")
    assert images_of(read_data(f"{path}?images=x_test&labels=")).shape == (3, 1, 2, 2)
    assert not isinstance(next(iter(read_data(f"{path}?images=x_test&labels="))), tuple)


def test_a_file_whose_name_has_a_question_mark_is_found(tmp_path):
    np.save(tmp_path / "a?images=b.npy", pixels(2, 4, 4))
    assert read_data(tmp_path / "a?images=b.npy").samples == 2


def test_a_large_array_is_mapped_and_not_read(tmp_path):
    np.lib.format.open_memmap(
        tmp_path / "x.npy", mode="w+", dtype=np.uint8, shape=(200_000, 64, 64)
    )  # 800 MB of nothing, sparse on the disk
    data = read_data(tmp_path / "x.npy", batch_size=4)
    assert next(iter(data)).shape == (4, 1, 64, 64)
    (tmp_path / "x.npy").unlink()


def test_reading_does_not_change_the_file(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 3, 4, 4), np.float32))
    before = (tmp_path / "x.npy").read_bytes()
    for batch in read_data(tmp_path / "x.npy"):
        batch.zero_()
    assert (tmp_path / "x.npy").read_bytes() == before


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["torch", "legacy", "npz", "pickle"])
def test_nothing_in_a_file_of_data_is_run(tmp_path, kind):
    path, canary = tmp_path / "data", tmp_path / "canary"
    evil = Touch(canary)
    with path.open("wb") as stream:
        if kind == "npz":
            np.savez(stream, images=np.array([evil], object))
        elif kind == "pickle":
            pickle.dump(evil, stream)
        else:
            torch.save(evil, stream, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(DataError, match="Cannot read the data"):
        read_data(path)
    assert not canary.exists()


def npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def saved(content):
    return lambda path: torch.save(content, path)


def raw(data):
    return lambda path: path.write_bytes(data)


MISTAKES = {
    "empty": (raw(b""), "Cannot use the data .*: it is empty"),
    "text": (raw(b"1 2 3\n"), "it is neither arrays .* Save it with numpy.savez"),
    "a damaged zip": (raw(b"PK\x03\x04abc"), "it is damaged or incomplete"),
    "a damaged array": (raw(b"\x93NUMPY\x01\x00"), "it is neither arrays"),
    "damaged safetensors": (raw(b"\x05\0\0\0\0\0\0\0{abc}"), "a damaged safetensors file"),
    "objects": (npz(x=np.array([{}], object)), "it holds Python objects"),
    "texts": (npz(x=np.array([["a"]])), "its array is <U1, which torch does not have"),
    "one number": (npz(x=np.float32(1)), "a single number has no samples"),
    "one axis": (npz(x=np.zeros(4)), "its array of shape 4 has no samples"),
    "no samples": (npz(x=np.zeros((0, 3, 4, 4))), "shape 0x3x4x4 has no samples"),
    "booleans": (npz(x=np.zeros((4, 4), bool)), "its array is bool: a model takes"),
    "complex": (npz(x=np.zeros((4, 4), complex)), "its array is complex128"),
    "16 bits": (npz(x=np.zeros((2, 4, 4), np.uint16)), "uint16, of unknown range. Give floats"),
    "a row of bytes": (npz(x=pixels(4, 9)), "bytes of shape 4x9 are no images"),
    "many channels": (npz(x=pixels(4, 9, 9, 5)), "shape 4x9x9x5 are no images"),
    "an alpha channel": (npz(x=pixels(4, 9, 9, 4)), "with 1 or 3 channels"),
    "video": (npz(x=pixels(2, 3, 4, 4, 3)), "shape 2x3x4x4x3 are no images"),
    "few labels": (npz(x=pixels(4, 2, 2), y=np.arange(3)), "labels y are 3, and its samples 4"),
    "one label": (npz(x=pixels(4, 2, 2), y=np.int64(3)), "labels y are 0, and its samples 4"),
    "a number in a file": (saved(3), "it holds no tensor, pair"),
    "three tensors": (saved((torch.zeros(2),) * 3), "it holds no tensor, pair"),
    "no tensors": (saved({"a": 1}), "it holds no tensor, pair"),
    "a model": (saved(nn.ReLU()), r"it holds more than tensors .*torch\.nn"),
}


@pytest.mark.parametrize(("write", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_file_that_holds_no_data_is_explained(tmp_path, write, message):
    path = tmp_path / "data.npz"
    write(path)
    with pytest.raises(DataError, match=message) as caught:
        read_data(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ".." not in str(caught.value)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?images=z", "it has no array 'z', only x, y"),
        ("?labels=z", "it has no array 'z'"),
        ("?split=train", "the options images and labels, and not 'split'"),
    ],
)
def test_a_wrong_option_behind_a_file_is_explained(tmp_path, query, message):
    np.savez(tmp_path / "d.npz", x=pixels(2, 4, 4), y=np.arange(2))
    with pytest.raises(DataError, match=message):
        read_data(f"{tmp_path / 'd.npz'}{query}")


# ---- image files ---------------------------------------------------------------------------------


def test_class_folders_are_read_as_torchvision_reads_them(classes):
    truth = ImageFolder(classes, transform=transforms.ToTensor())
    data = read_data(classes, shuffle=False, batch_size=4)
    assert torch.equal(images_of(data), torch.stack([image for image, _ in truth]))
    assert labels_of(data).tolist() == truth.targets
    assert data.described == f"6 images in 2 class folders of {classes}"


def test_a_flat_folder_has_no_labels(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.webp"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (batch,) = read_data(tmp_path)
    assert batch.shape == (3, 3, 8, 8)
    assert read_data(tmp_path).described == f"3 images of {tmp_path}"


@pytest.mark.parametrize("hidden", [".DS_Store.png", "._a.png", ".cache/a.png", "__MACOSX/a.png"])
def test_hidden_files_are_no_images(classes, hidden):
    write_image(classes / "x.png").rename(classes / "cat" / "9.png")
    path = classes / hidden
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"not an image")
    data = read_data(classes)
    assert data.samples == 7
    assert len(labels_of(data)) == 7


def test_an_empty_class_keeps_its_number(classes):
    (classes / "bird").mkdir()
    data = read_data(classes)
    assert set(labels_of(data).tolist()) == {1, 2}
    assert data.notes == ("1 class folders have no image, such as bird",)


def test_numbers_as_names_are_sorted_as_texts_and_that_is_said(tmp_path):
    for name in ("1", "2", "10"):
        write_image(tmp_path / name / "a.png")
    data = read_data(tmp_path)
    (note,) = data.notes
    assert note.startswith("the classes are numbered in the order of the folders' names, as by")
    assert note.endswith("torchvision's ImageFolder: 1 is 0")


@pytest.mark.parametrize("where", ["only one folder", "images beside folders"])
def test_folders_that_are_no_classes_give_no_labels(classes, where):
    if where == "only one folder":
        root = classes / "root"
        root.mkdir()
        (classes / "cat").rename(root / "cat")
        data = read_data(root)
    else:
        write_image(classes / "a.png")
        data = read_data(classes)
    assert all(isinstance(batch, torch.Tensor) for batch in data)


MODES = {
    "RGB": pixels(8, 8, 3),
    "RGBA": pixels(8, 8, 4),
    "L": pixels(8, 8),
    "LA": pixels(8, 8, 2),
    "1": pixels(8, 8) > 127,
    "I;16": np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024,
}


@pytest.mark.parametrize(("mode", "array"), MODES.items(), ids=MODES.keys())
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_becomes_what_is_asked_for(tmp_path, mode, array, channels):
    write_image(tmp_path / "a.png", array)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
    (batch,) = read_data(tmp_path, preprocessing=Preprocessing(grayscale=channels == 1))
    assert batch.shape == (1, channels, 8, 8)
    assert 0 <= batch.min() < batch.max() <= 1


def test_16_bits_are_scaled_and_not_clipped(tmp_path):
    write_image(tmp_path / "a.png", np.array([[0, 256, 32768, 65535]], np.uint16))
    (batch,) = read_data(tmp_path, preprocessing=GREY)
    assert (batch.flatten() * 255).round().tolist() == [0, 1, 128, 255]


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    image = Image.fromarray(pixels(8, 8, 3)).quantize(8)
    image.save(tmp_path / "a.png", transparency=bytes(range(8)))
    assert next(iter(read_data(tmp_path))).shape == (1, 3, 8, 8)


BROKEN = {
    "no image": (raw(b"no image"), "it is no image"),
    "empty": (raw(b""), "it is no image"),
    "cut off": (
        lambda path: path.write_bytes(write_image(path, pixels(64, 64, 3)).read_bytes()[:3000]),
        r"image file is truncated|broken|Truncated",
    ),
    "32 bits": (
        lambda path: Image.fromarray(np.zeros((8, 8), np.float32)).save(path, format="TIFF"),
        "its pixels have 32 bits",
    ),
}


@pytest.mark.parametrize(("write", "why"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_and_left_out_only_when_asked(classes, write, why, workers):
    broken = classes / "cat" / "1.png"
    broken.unlink()
    write(broken)
    with pytest.raises(
        DataError, match=rf"^Cannot read {broken}: .*{why}.*--skip-broken"
    ) as caught:
        list(read_data(classes, workers=workers))
    assert "\n" not in str(caught.value)
    data = read_data(classes, workers=workers, skip_broken=True, shuffle=False, batch_size=2)
    assert labels_of(data).tolist() == [0, 0, 1, 1, 1]
    assert [name.partition(":")[0] for name in data.broken] == [str(broken)]
    list(data)
    assert len(data.broken) == 1, "counted once, however often it is read"


def test_a_batch_of_broken_images_is_left_out_whole(classes):
    for i in (0, 1):
        (classes / "cat" / f"{i}.png").write_bytes(b"")
    data = read_data(classes, skip_broken=True, shuffle=False, batch_size=2)
    assert [len(labels) for _, labels in data] == [2, 2]


def test_an_unreadable_file_is_named(classes, monkeypatch):
    def denied(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(DataError, match=r"0\.png: permission denied\. Take it out"):
        list(read_data(classes, shuffle=False))


def test_images_of_two_sizes_need_a_size(tmp_path):
    write_image(tmp_path / "a.png", pixels(8, 8, 3))
    write_image(tmp_path / "b.png", pixels(8, 9, 3))
    with pytest.raises(
        DataError,
        match=r"a\.png \(3x8x8\) and .*b\.png \(3x8x9\): a batch has one size. Give --size",
    ):
        list(read_data(tmp_path))
    sized = read_data(tmp_path, preprocessing=Preprocessing(size=(6, 6)))
    assert images_of(sized).shape == (2, 3, 6, 6)
    assert [batch.shape[3] for batch in read_data(tmp_path, batch_size=1)] == [8, 9]


@pytest.mark.parametrize("content", ["nothing", "texts", "hidden", "shards"])
def test_a_folder_without_an_image_is_an_error(tmp_path, content):
    folder = tmp_path / "data"
    folder.mkdir()
    if content == "texts":
        (folder / "a.txt").write_text("text")
    elif content == "hidden":
        (folder / ".a.png").write_bytes(b"")
    elif content == "shards":
        (folder / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"no image is in it or below it \(\.bmp, \.jpeg") as caught:
        read_data(folder)
    assert str(caught.value).endswith("/*.tar.") is (content == "shards")


# ---- preprocessing -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (7, 5), (24, 24)])
def test_size_covers_and_crops_the_centre(shape):
    image = pixels(*shape, 3)
    prepared = Preprocessing(size=(12, 10)).image(Image.fromarray(image))
    assert prepared.shape == (3, 12, 10)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    same = Preprocessing(size=(12, 10)).batch(tensor)
    assert same.shape == (1, 3, 12, 10)
    assert (same[0] - prepared).abs().max() < 3 / 255, "files and arrays are resized alike"


def test_a_square_size_is_torchvisions_resize_and_centre_crop():
    image = Image.fromarray(pixels(20, 30, 3))
    truth = transforms.Compose(
        [transforms.Resize(12), transforms.CenterCrop(12), transforms.ToTensor()]
    )(image)
    assert torch.equal(Preprocessing(size=(12, 12)).image(image), truth)


def test_mean_and_std_normalise_each_channel():
    batch = torch.from_numpy(pixels(2, 3, 4, 4))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    truth = v2.Normalize(mean, std)(batch.float() / 255)
    prepared = Preprocessing(mean=mean, std=std).batch(batch)
    assert torch.allclose(prepared, truth, atol=1e-6, rtol=0)
    assert torch.equal(Preprocessing(mean=(0.5,)).batch(batch), batch.float().div(255).sub(0.5))


def test_floats_are_normalised_and_not_scaled(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 1, 4, 4), 3.0))
    (batch,) = read_data(tmp_path / "x.npy", preprocessing=Preprocessing(mean=(1.0,), std=(2.0,)))
    assert batch.unique().tolist() == [1.0]


def test_channels_are_made_of_each_other():
    rgb = torch.from_numpy(pixels(2, 3, 4, 4))
    grey = GREY.batch(rgb)
    truth = v2.functional.rgb_to_grayscale(rgb).float() / 255
    assert (grey - truth).abs().max() <= 1 / 255 + 1e-6
    three = Preprocessing(grayscale=False).batch(rgb[:, :1])
    assert torch.equal(three, rgb[:, :1].expand(-1, 3, -1, -1).float() / 255)
    assert torch.equal(GREY.batch(rgb[:, :1]), rgb[:, :1].float() / 255)
    with pytest.raises(DataError, match="Cannot make 3 of 2 channels"):
        Preprocessing(grayscale=False).batch(torch.zeros(1, 2, 4, 4))


def test_a_preset_of_torchvision_is_its_own_transform():
    preset = Preprocessing(preset="ResNet18_Weights.IMAGENET1K_V1")
    image = Image.fromarray(pixels(300, 280, 3))
    transform = ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert torch.equal(preset.image(image), transform(image))
    batch = torch.from_numpy(pixels(2, 3, 240, 240))
    assert torch.equal(preset.batch(batch), transform(batch))
    assert preset.image(image.convert("L")).shape == (3, 224, 224)
    assert str(preset) == "preset ResNet18_Weights.IMAGENET1K_V1"


def test_a_preset_of_timm_is_its_own_transform():
    timm = pytest.importorskip("timm")
    preset = Preprocessing(preset="timm:resnet18")
    config = timm.data.resolve_data_config(
        pretrained_cfg=timm.models.get_pretrained_cfg("resnet18").to_dict()
    )
    transform = timm.data.create_transform(**config, is_training=False)
    image = Image.fromarray(pixels(260, 280, 3))
    assert torch.equal(preset.image(image), transform(image))
    batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    assert torch.equal(preset.batch(batch)[0], transform(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "ResNet50_Weight.IMAGENET1K_V2"}, "near are ResNet50_Weights.IMAGENET1K_V2"),
        ({"preset": "ResNet50_Weights.NONE"}, "it is the name of torchvision weights, such as"),
        ({"preset": "nonsense"}, "it is the name of torchvision weights"),
        ({"preset": "R3D_18_Weights.KINETICS400_V1"}, "it is not for images alone"),
        ({"preset": "Raft_Small_Weights.C_T_V2"}, "it is not for images alone"),
        ({"preset": "timm:resnet1"}, "timm has no such model; near are resnet18|no such model"),
        ({"preset": "ResNet18_Weights.DEFAULT", "mean": (0.5,)}, "of your own: it has them"),
        ({"size": (0, 4)}, "Cannot resize to 0x4"),
        ({"std": (0.0,)}, "std above 0"),
        ({"std": (0.5, -0.5, 0.5)}, "std above 0"),
        ({"mean": (float("nan"),)}, "mean and std are finite numbers"),
    ],
)
def test_preprocessing_that_cannot_be_is_explained(options, message):
    with pytest.raises(DataError, match=message) as caught:
        Preprocessing(**options)
    assert "\n" not in str(caught.value)


def test_values_for_other_channels_are_explained():
    with pytest.raises(DataError, match=r"mean has 3 values, and the images have 1 channel\. Give"):
        Preprocessing(mean=(0.1, 0.2, 0.3)).batch(torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 3, 2, 2, 2)])
def test_options_for_images_are_refused_for_other_arrays(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.float32))
    assert next(iter(read_data(tmp_path / "x.npy"))).shape == shape
    with pytest.raises(DataError, match=r"\(mean 0\.5\): arrays of shape .* are no images"):
        read_data(tmp_path / "x.npy", preprocessing=Preprocessing(mean=(0.5,)))


def test_a_preset_on_grey_arrays_asks_for_three_channels(tmp_path):
    np.save(tmp_path / "x.npy", pixels(2, 8, 8))
    preset = Preprocessing(preset="ResNet18_Weights.DEFAULT")
    with pytest.raises(DataError, match=r"it is for 3 channels, and the images have 1\..*--rgb"):
        list(read_data(tmp_path / "x.npy", preprocessing=preset))
    both = Preprocessing(preset="ResNet18_Weights.DEFAULT", grayscale=False)
    assert images_of(read_data(tmp_path / "x.npy", preprocessing=both)).shape == (2, 3, 224, 224)


# ---- tar shards ----------------------------------------------------------------------------------


def write_tar(path, members):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "png")
    return stream.getvalue()


def samples(numbers):
    return {
        name: content
        for i in numbers
        for name, content in ((f"a/{i:04}.png", png(i)), (f"a/{i:04}.cls", b"%d" % (i % 3)))
    }


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip("webdataset")
    write_tar(tmp_path / "s-0.tar", samples(range(5)))
    write_tar(tmp_path / "s-1.tar", samples(range(5, 9)))
    return tmp_path


@pytest.mark.parametrize("pattern", ["s-{0..1}.tar", "s-*.tar", "s-[01].tar"])
@pytest.mark.parametrize("workers", [0, 3])
def test_shards_are_a_stream_of_images_and_classes(shards, pattern, workers):
    data = read_data(shards / pattern, batch_size=4, workers=workers)
    for _ in range(2):
        assert (images_of(data)[:, 0, 0, 0] * 255).round().tolist() == list(range(9))
        assert labels_of(data).tolist() == [i % 3 for i in range(9)]
    assert data.samples is None
    assert data.described == f"{shards / pattern} (2 shards)"
    with pytest.raises(TypeError, match="only reading them tells"):
        len(data)


def test_a_compressed_shard_is_read(tmp_path):
    pytest.importorskip("webdataset")
    write_tar(tmp_path / "s.tar.gz", samples(range(3)))
    assert labels_of(read_data(tmp_path / "s.tar.gz")).tolist() == [0, 1, 2]


def test_a_stream_is_shuffled_by_its_seed(shards):
    orders = [
        labels_of(read_data(shards / "s-*.tar", shuffle=True, seed=seed)).tolist()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(i % 3 for i in range(9))


def test_a_shard_without_classes_gives_images(tmp_path):
    pytest.importorskip("webdataset")
    write_tar(tmp_path / "s.tar", {f"{i}.png": png(i) for i in range(3)})
    assert images_of(read_data(tmp_path / "s.tar")).shape == (3, 3, 4, 4)


SHARD_MISTAKES = {
    "missing": (lambda path: None, "there is no file"),
    "damaged": (raw(b"no tar" * 200), "Cannot read the data"),
    "empty": (lambda path: write_tar(path, {}), "there is no sample in it"),
    "no image": (lambda path: write_tar(path, {"a.txt": b"b"}), "it has no image, only txt"),
    "broken": (lambda path: write_tar(path, {"a.png": b"b"}), "a in .*tar: it is no image"),
    "a class in words": (
        lambda path: write_tar(path, {"a.png": png(1), "a.cls": b"cat"}),
        "Cannot use the class of a in .*: b'cat' is no number",
    ),
    "some classes": (
        lambda path: write_tar(path, {"a.png": png(1), "a.cls": b"1", "b.png": png(2)}),
        "Cannot use the labels: .* has none",
    ),
}


@pytest.mark.parametrize(("write", "message"), SHARD_MISTAKES.values(), ids=SHARD_MISTAKES.keys())
def test_a_shard_that_cannot_be_used_is_explained(tmp_path, write, message):
    pytest.importorskip("webdataset")
    write(tmp_path / "s.tar")
    with pytest.raises(DataError, match=message) as caught:
        list(read_data(tmp_path / "s.tar"))
    assert "\n" not in str(caught.value)


def test_without_webdataset_the_cure_is_named(tmp_path, monkeypatch):
    write_tar(tmp_path / "s.tar", {})
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(DataError, match=r"pip install webdataset$"):
        read_data(tmp_path / "s.tar")


# ---- datasets and functions ----------------------------------------------------------------------

FAKE = "torchvision:FakeData?size=10&image_size=3,8,8&num_classes=4"


@pytest.mark.parametrize("workers", [0, 3])
def test_a_dataset_of_torchvision_is_read(workers):
    data = read_data(FAKE, batch_size=4, workers=workers)
    assert images_of(data).shape == (10, 3, 8, 8)
    assert torch.equal(images_of(data), images_of(read_data(FAKE)))
    assert set(labels_of(data).tolist()) <= set(range(4))
    assert data.samples == 10


def test_a_split_becomes_the_argument_that_the_dataset_has(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 4), ("t10k", 3)):
        images, labels = pixels(count, 28, 28), np.arange(count, dtype=np.uint8)
        head = np.array([2051, count, 28, 28], ">i4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = np.array([2049, count], ">i4").tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    asked = f"torchvision:MNIST?root={tmp_path}"
    assert read_data(f"{asked}&split=train").samples == 4
    data = read_data(f"{asked}&split=test", preprocessing=GREY)
    assert images_of(data).shape == (3, 1, 28, 28)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:FashonMNIST", "no such dataset; near are FashionMNIST"),
        ("torchvision:FashionMNIST", r"say where it is, with .*\?root=DIR"),
        ("torchvision:FashionMNIST?root=nowhere", "it is not there.*add download=true"),
        ("torchvision:FakeData?sizes=3", "it has no option 'sizes', only size, image_size"),
        ("torchvision:FakeData?size=0", "there is no sample"),
        ("torchvision:os", "no such dataset"),
        ("nowhere", "there is no such file or folder"),
        ("", "there is no such file or folder"),
        ("http://example.com/x.npz", "there is no such file or folder"),
    ],
)
def test_a_source_that_is_none_is_explained(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        read_data(source)


BATCHES = """
import torch
calls = []
def pairs():
    calls.append(1)
    for i in range(3):
        yield torch.full((4, 2), float(i)), torch.arange(4)
def listed():
    return [torch.zeros(4, 2), torch.ones(3, 2)]
def keywords():
    return [{"x": torch.arange(6).view(6, 1), "scale": 2.0}]
def unfinished():
    yield torch.zeros(2, 2)
    raise ValueError("no luck today")
def number(): return 3
def text(): return "batches"
def tensor(): return torch.zeros(4, 2)
def numbers(): return [1, 2]
def broken(): raise RuntimeError("no luck today")
class Samples(torch.utils.data.Dataset):
    def __len__(self): return 5
    def __getitem__(self, i): return torch.full((3,), float(i)), i
class Odd(Samples):
    def __getitem__(self, i):
        if i == 2: raise ValueError("no luck with this one")
        return super().__getitem__(i)
class Words(Samples):
    def __getitem__(self, i): return "words", i
given = [torch.zeros(2, 2)]
"""


def test_a_function_gives_batches_and_is_called_for_every_iteration(here):
    here(BATCHES)
    data = read_data("mine:pairs")
    assert [float(x[0, 0]) for x, _ in data] == [0, 1, 2]
    assert [float(x[0, 0]) for x, _ in data] == [0, 1, 2]
    assert len(sys.modules["mine"].calls) == 2
    assert [len(batch) for batch in read_data("mine:listed")] == [4, 3]
    assert [len(batch) for batch in read_data("mine:given")] == [2]
    assert data.described == "batches of mine:pairs"


def test_the_samples_of_batches_can_be_limited_and_shared(here):
    here(BATCHES)
    assert [len(x) for x, _ in read_data("mine:pairs", max_samples=6)] == [4, 2]
    data = read_data("mine:keywords")
    parts = [next(iter(data.shard(rank, 4))) for rank in range(4)]
    assert [part["x"].flatten().tolist() for part in parts] == [[0], [1, 2], [3], [4, 5]]
    assert all(part["scale"] == 2.0 for part in parts)


def test_a_dataset_of_a_function_gives_samples(here):
    here(BATCHES)
    data = read_data("mine:Samples", batch_size=2, shuffle=True)
    assert sorted(labels_of(data).tolist()) == list(range(5))
    assert torch.equal(images_of(data)[:, 0], labels_of(data).float())
    with pytest.raises(
        DataError, match=r"sample 2 of mine:Odd: no luck with this one\. Take it out"
    ):
        list(read_data("mine:Odd"))
    data = read_data("mine:Odd", skip_broken=True)
    assert labels_of(data).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:number", "it gives a int, and not batches. Return an iterable"),
        ("mine:text", "it gives a str"),
        ("mine:tensor", "it gives a Tensor"),
        ("mine:numbers", "a batch is a int without a tensor"),
        ("mine:broken", "it raised RuntimeError: no luck today"),
        ("mine:Words", "it begins with a str, which is no image and no tensor"),
    ],
)
def test_a_function_that_gives_no_batches_is_explained(here, name, message):
    here(BATCHES)
    with pytest.raises(DataError, match=message) as caught:
        list(read_data(name))
    assert "\n" not in str(caught.value)


def test_a_function_that_is_not_there_is_explained(here):
    here(BATCHES)
    with pytest.raises(LoadError, match="Cannot use the data mine:nothing: mine has no 'nothing'"):
        read_data("mine:nothing")
    with pytest.raises(LoadError, match="no module named 'nobodys'"):
        read_data("nobodys:data")


def test_batches_cannot_be_prepared_shuffled_or_checked(here):
    here(BATCHES)
    with pytest.raises(DataError, match=r"\(grayscale\): its batches are taken as they are"):
        read_data("mine:listed", preprocessing=GREY)
    for options in ({"shuffle": True}, {"skip_broken": True}):
        with pytest.raises(DataError, match="Cannot shuffle or check the batches of mine:listed"):
            read_data("mine:listed", **options)


# ---- order, shards, threads ----------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path):
    """A maker of sources whose samples carry their own number."""

    def make(count, labels=None):
        arrays = {"x": np.arange(count, dtype=np.float32)[:, None]}
        if labels is not None:
            arrays["y"] = np.asarray(labels)
        np.savez(tmp_path / "n.npz", **arrays)
        return tmp_path / "n.npz"

    return make


def numbers_of(data):
    return images_of(data).flatten().int().tolist()


def test_what_is_sorted_by_class_is_shuffled_unless_forbidden(numbered):
    path = numbered(9, np.arange(9) // 3)
    assert numbers_of(read_data(path, shuffle=False)) == list(range(9))
    mixed = numbers_of(read_data(path))
    assert mixed != list(range(9))
    assert sorted(mixed) == list(range(9))
    assert "shuffled with seed 0" in read_data(path).described
    assert numbers_of(read_data(path, seed=1)) != mixed


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 1, 0, 1], [2] * 6])
def test_what_is_not_sorted_by_class_keeps_its_order(numbered, labels):
    assert numbers_of(read_data(numbered(6, labels))) == list(range(6))
    assert numbers_of(read_data(numbered(6, labels), shuffle=True)) != list(range(6))


def test_every_iteration_has_the_same_order(numbered):
    data = read_data(numbered(50), shuffle=True, seed=7)
    assert numbers_of(data) == numbers_of(data)
    state = torch.get_rng_state()
    numbers_of(data)
    assert torch.equal(state, torch.get_rng_state())


def test_fewer_samples_are_the_first_of_the_order(numbered):
    path = numbered(10)
    assert numbers_of(read_data(path, max_samples=4, batch_size=3)) == [0, 1, 2, 3]
    assert numbers_of(read_data(path, max_samples=99)) == list(range(10))
    few = read_data(path, max_samples=4, shuffle=True)
    assert numbers_of(few) == numbers_of(read_data(path, shuffle=True))[:4]
    assert (few.samples, len(few)) == (4, 1)
    assert "4 of them" in few.described


@pytest.mark.parametrize("count", [1, 5, 32, 33, 40])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_shards_of_each_batch_make_up_the_batch(numbered, count, world):
    data = read_data(numbered(count), batch_size=8, shuffle=True)
    whole = list(data)
    parts = [list(data.shard(rank, world)) for rank in range(world)]
    assert {len(part) for part in parts} == {len(whole)}
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(pieces), batch)
        sizes = [len(piece) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1


def test_shards_stay_in_step_when_images_are_broken(classes):
    for i in (0, 1):
        (classes / "cat" / f"{i}.png").write_bytes(b"")
    data = read_data(classes, batch_size=4, shuffle=False, skip_broken=True)
    parts = [list(data.shard(rank, 2)) for rank in range(2)]
    assert [[len(labels) for _, labels in part] for part in parts] == [[0, 1], [2, 1]]
    assert parts[0][0][0].shape == (0, 3, 8, 8)


def test_threads_read_ahead_and_change_nothing(numbered):
    path = numbered(100)
    plain = [batch.tolist() for batch in read_data(path, batch_size=7)]
    assert [batch.tolist() for batch in read_data(path, batch_size=7, workers=4)] == plain


def test_threads_end_with_the_reader(classes):
    before = threading.active_count()
    iterator = iter(read_data(classes, batch_size=1, workers=3))
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_samples": 0}, {"workers": -1}])
def test_numbers_that_make_no_sense_are_refused(numbered, options):
    with pytest.raises(DataError, match="batch_size and max_samples are 1 or more"):
        read_data(numbered(3), **options)


def test_the_public_names_are_these():
    assert bntools.read_data is read_data
    assert bntools.Preprocessing is Preprocessing
