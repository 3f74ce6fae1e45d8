"""Image files of every mode as RGB."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from models.data.image_io import read_image
from models.data.problems import DataError

pytestmark = pytest.mark.reference_only


def gradient(height=6, width=9):
    """[H, W] uint8, each pixel with another value."""
    return (np.arange(height * width) * 4).astype(np.uint8).reshape(height, width)


def assert_gray(image, values):
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(values.copy()).expand(3, -1, -1))


def test_lossless_rgb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    assert torch.equal(read_image(tmp_path / "rgb.png"), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA"])
def test_gray_and_alpha(tmp_path, mode):
    image = Image.fromarray(gradient()).convert(mode)
    if mode != "L":
        image.putalpha(100)  # dropped, not blended
    image.save(tmp_path / "image.png")
    assert_gray(read_image(tmp_path / "image.png"), gradient())


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(54))])
def test_palette(tmp_path, transparency):
    image = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9)).convert("P")
    image.putpalette([value for index in range(54) for value in [4 * index] * 3])
    image.save(tmp_path / "image.png", **({} if transparency is None else {"transparency": transparency}))
    assert_gray(read_image(tmp_path / "image.png"), gradient())


def test_bilevel(tmp_path):
    Image.fromarray(gradient() > 100).save(tmp_path / "image.png")
    assert_gray(read_image(tmp_path / "image.png"), np.where(gradient() > 100, 255, 0).astype(np.uint8))


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_upper_half_of_16_bits(tmp_path, name):
    Image.fromarray(gradient().astype(np.uint16) * 256 + 77).save(tmp_path / name)
    assert_gray(read_image(tmp_path / name), gradient())


def test_cmyk_jpeg(tmp_path):
    Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK").save(tmp_path / "image.jpg", quality=100)
    image = read_image(tmp_path / "image.jpg").float().mean((1, 2))
    torch.testing.assert_close(image, torch.tensor([200.0, 40.0, 90.0]), atol=4, rtol=0)


@pytest.mark.parametrize(("orientation", "quarter_turns"), [(3, 2), (6, -1), (8, 1)])
def test_exif_orientation(tmp_path, orientation, quarter_turns):
    stored = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "image.png", exif=exif)
    assert_gray(read_image(tmp_path / "image.png"), np.rot90(stored, quarter_turns))


def test_truncated(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a.jpg", "a.png"):
        Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"{name}: expected a whole image, got one with an error: .*truncated"):
            read_image(tmp_path / name)


def test_files_that_are_not_images(tmp_path):
    (tmp_path / "a.jpg").write_text("not one")
    (tmp_path / "empty.jpg").touch()
    Image.fromarray(gradient().astype(np.float32)).save(tmp_path / "a.tif")
    for name, kind, message in (
        ("a.jpg", "unreadable image", "Pillow does not know"),
        ("empty.jpg", "unreadable image", "Pillow does not know"),
        ("a.tif", "unreadable image", "8 or 16 bits per channel, got F"),
        ("b.jpg", "missing image", "no such file"),
        (".", "unreadable image", "directory"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            read_image(tmp_path / name)
        assert caught.value.kind == kind
        assert str(tmp_path / name) in str(caught.value)


def test_an_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(DataError("kind", "text")))
    assert (type(error), error.kind, str(error)) == (DataError, "kind", "text")
