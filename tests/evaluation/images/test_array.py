"""Images as one array in an .npz file: written for ADM's evaluator, and scored as a folder of them is."""

import io
import zipfile

import numpy as np
import pytest
import torch

from tarflow.cli import main
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.array import ImageArray, write_array
from tarflow.evaluation.images.folder import ImageFolder
from tarflow.evaluation.samples.png_folder import load_png, save_png
from tarflow.records import DamagedFileError


def pictures(num=7, channels=3, size=8, seed=0):
    shape = (num, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def read_by_the_format(path):
    """An array as the description of numpy's format says, without numpy's reader."""
    with zipfile.ZipFile(path) as archive:
        (name,) = archive.namelist()
        data = archive.read(name)
    assert name == "arr_0.npy"
    assert data[:8] == b"\x93NUMPY\x01\x00"
    length = int.from_bytes(data[8:10], "little")
    header = eval(data[10 : 10 + length])  # noqa: S307 -- written by this test's subject
    assert (header["descr"], header["fortran_order"]) == ("|u1", False)
    assert (10 + length) % 64 == 0
    n, h, w, c = header["shape"]
    body = data[10 + length :]
    assert len(body) == n * h * w * c
    return np.array(
        [
            [[[body[((i * h + y) * w + x) * c + k] for k in range(c)] for x in range(w)] for y in range(h)]
            for i in range(n)
        ]
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read_back_by_numpy_and_by_the_formats_description(tmp_path, channels):
    images = pictures(3, channels, 4)
    write_array(tmp_path / "a.npz", (3, 4, 4, 3), iter(images))
    wanted = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "a.npz") as found:
        assert found["arr_0"].dtype == np.uint8
        assert np.array_equal(found["arr_0"], wanted)
    assert np.array_equal(read_by_the_format(tmp_path / "a.npz"), wanted)


def test_fewer_images_than_promised_leave_no_file(tmp_path):
    with pytest.raises(DamagedFileError, match="3 images came, not 4"):
        write_array(tmp_path / "a.npz", (4, 4, 4, 3), iter(pictures(3, 3, 4)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stored", "channels", "size"), [(3, 3, 8), (3, 1, 8), (1, 3, 8), (3, 3, 5), (1, 1, 12)])
def test_a_file_gives_the_pixels_of_the_same_folder(tmp_path, stored, channels, size):
    images = pictures(channels=stored)
    (tmp_path / "in").mkdir()
    for number, image in enumerate(images):
        save_png(tmp_path / "in" / f"{number}.png", image)
    np.savez(tmp_path / "a.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    array, folder = ImageArray(tmp_path / "a.npz", channels, size), ImageFolder(tmp_path / "in", channels, size)
    assert torch.equal(torch.cat(list(array.batches(3))), torch.cat(list(folder.batches(4))))
    assert (array.sha256, array.used, array.resized) == (folder.sha256, folder.used, folder.resized)
    assert np.array_equal(array.hashes, folder.hashes)
    assert len(array.warnings()) == (size != 8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "there is no array arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, r"float32 \[2, 4, 4, 3\], expected uint8"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, "expected uint8"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "expected uint8"),
        ({"arr_0": np.zeros((2, 4, 6, 4), np.uint8)}, "expected uint8"),
    ],
)
def test_what_are_no_images_is_said(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(EvaluationError, match=message):
        ImageArray(tmp_path / "a.npz", 3, None)


def test_rectangles_are_taken_at_their_own_size_or_at_the_one_asked_for(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images)
    own = ImageArray(tmp_path / "a.npz", 3, None)
    assert np.array_equal(torch.cat(list(own.batches())).permute(0, 2, 3, 1), images)
    assert (own.describe()["image_size"], own.warnings()) == ("4,6", [])
    other = ImageArray(tmp_path / "a.npz", 3, (2, 6))
    assert next(iter(other.batches())).shape == (3, 3, 2, 6)
    assert "were cropped or resized to 2,6 pixels" in other.warnings()[0]


@pytest.mark.case("H06")
def test_damage_is_named(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.zeros((9, 4, 4, 3), np.uint8))
    whole = bytearray(buffer.getvalue())
    whole[300] ^= 1
    (tmp_path / "a.npz").write_bytes(whole)
    with pytest.raises(DamagedFileError, match=r"a\.npz"):
        list(ImageArray(tmp_path / "a.npz", 3, None).batches(2))
    np.savez(tmp_path / "b.npz", arr_0=np.asfortranarray(np.ones((9, 4, 4, 3), np.uint8)))
    with pytest.raises(DamagedFileError, match="column by column"):
        list(ImageArray(tmp_path / "b.npz", 3, None).batches(2))


def test_sample_writes_the_array_of_its_pictures(make_run, tmp_path, capsys):
    run_dir, _ = make_run()
    out = tmp_path / "out"
    assert main(["sample", str(run_dir), "--out", str(out), "--num", "5", "--format", "npz"]) == 0
    assert f"array: {out / 'samples.npz'}" in capsys.readouterr().out
    pixels = torch.stack([load_png(path) for path in sorted((out / "images").iterdir())])
    with np.load(out / "samples.npz") as found:
        assert np.array_equal(found["arr_0"], pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    assert main(["sample", str(run_dir), "--out", str(out), "--num", "7", "--format", "npz"]) == 0
    with np.load(out / "samples.npz") as found:
        assert len(found["arr_0"]) == 7
