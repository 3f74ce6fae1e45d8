"""`Masks`: construction from COCO's JSON, moves between devices and processes, flips, sizes and crops."""

import pickle

import numpy as np
import pytest
import torch

from fastmask import Masks, mask_targets
from tests.oracles.mask_targets import bitmaps, decode, draw_rles, draw_segmentations, runs_of

pytestmark = pytest.mark.reference_only

SIZE = (24, 32)
TRIANGLE = [2.0, 3.0, 20.0, 5.0, 9.0, 21.0]


def mixed(seed=0, size=SIZE):
    random = np.random.default_rng(seed)
    segmentations = [*draw_segmentations(random, 3, *size), *draw_rles(random, 2, *size)]
    decoded = torch.from_numpy(np.stack([decode(rle, *size) for rle in draw_rles(random, 2, *size)]))
    masks = Masks.cat([Masks.from_coco(segmentations, size), Masks.from_bitmaps(decoded)])
    expected = [torch.from_numpy(decode(segmentation, *size)) for segmentation in segmentations]
    return masks, torch.stack([*expected, *decoded])


def test_objects_of_all_kinds():
    masks, expected = mixed()
    assert (len(masks), masks.size, masks.device) == (7, SIZE, torch.device("cpu"))
    assert torch.equal(bitmaps(masks), expected)


def test_indices_select_objects():
    masks, expected = mixed()
    keep = torch.tensor([True, False, True, True, False, False, True])
    for index in (slice(1, 5), slice(None, None, 2), torch.tensor([6, 0, 3]), keep):
        assert torch.equal(bitmaps(masks[index]), expected[index])
    for index in (0, 3, -1, -7):
        assert torch.equal(bitmaps(masks[index]), expected[index][None])
    assert len(masks[:0]) == 0
    assert masks[1:3].vertices.data_ptr() == masks.vertices.data_ptr()
    for index in (7, -8):
        with pytest.raises(IndexError, match=f"index: expected .* got {index}"):
            masks[index]


def test_pickling():
    masks, expected = mixed()
    copy = pickle.loads(pickle.dumps(masks))
    assert (copy.sizes, copy.vertices.dtype) == (masks.sizes, torch.float64)
    assert torch.equal(bitmaps(copy), expected)


def test_a_flip_is_that_of_the_bitmap():
    masks, expected = mixed()
    flipped = bitmaps(masks.flip())
    assert torch.equal(flipped[3:], expected[3:].flip(2))
    # pycocotools rounds halves of a subpixel up, whose mirror images are rounded down: pixels at edges may differ.
    assert (flipped[:3] != expected[:3].flip(2)).float().mean() < 0.05
    assert torch.equal(masks.flip().vertices[:, 0], 32 - masks.vertices[:, 0])
    assert torch.equal(bitmaps(masks.flip().flip())[3:], expected[3:])


def test_a_crop_is_that_of_the_bitmap():
    masks, expected = mixed()
    cropped = masks.crop(4, 7, 15, 20)
    assert cropped.size == (15, 20)
    assert torch.equal(bitmaps(cropped), expected[:, 4:19, 7:27])


def test_a_third_of_the_size_has_the_middle_of_three_pixels():
    bitmap = torch.randint(2, (2, 42, 66), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bitmaps(Masks.from_bitmaps(bitmap).resize((14, 22))), bitmap[:, 1::3, 1::3])


def test_batches():
    (first, _), (second, expected) = mixed(), mixed(1, (16, 40))
    batch = Masks.batch([first, first[:0], second.flip()])
    assert (len(batch), batch.sizes) == (14, (SIZE, SIZE, (16, 40)))
    assert batch.offsets.tolist() == [0, 7, 7, 14]
    boxes, matches = torch.tensor([[0.0, 0, 40, 16]]).expand(7, -1), torch.arange(7, 14)
    assert torch.equal(mask_targets(batch, boxes, matches, (16, 40), aligned=True)[3:].byte(), expected.flip(2)[3:])
    for call in (
        lambda: batch.size,
        lambda: batch[0],
        batch.flip,
        lambda: batch.resize((2, 2)),
        lambda: batch.crop(0, 0, 1, 1),
    ):
        with pytest.raises(ValueError, match="masks: expected those of one image, got a batch of 3"):
            call()
    with pytest.raises(ValueError, match="masks: expected those of one image size"):
        Masks.cat([first, second])


def test_runs_without_pixels_are_joined():
    for counts in (
        [0, 12],
        [0, 0, 12],
        [5, 0, 7],
        [3, 4, 0, 5],
        [3, 4, 0, 0, 5],
        [1, 0, 0, 0, 2, 9],
        [12],
        [12, 0],
        [0, 5, 0, 0, 7],
    ):
        rle = {"size": [3, 4], "counts": counts}
        assert np.array_equal(bitmaps(Masks.from_coco([rle], (3, 4)))[0], decode(rle, 3, 4)), counts


def test_compressed_counts():
    random = np.random.default_rng(0)
    for density in (0, 0.001, 0.1, 0.5, 1):
        bitmap = (random.random((150, 200)) < density).astype(np.uint8)
        for segmentation in (draw_rles(random, 1, 150, 200)[0], {"size": [150, 200], "counts": runs_of(bitmap)}):
            masks = Masks.from_coco([segmentation], (150, 200))
            assert np.array_equal(bitmaps(masks)[0], decode(segmentation, 150, 200))


def test_nothing_is_rasterised():
    """500 polygons of an image of 8000 x 4000 take less than a megabyte."""
    random = np.random.default_rng(0)
    masks = Masks.from_coco(draw_segmentations(random, 500, 4000, 8000, points=60), (4000, 8000))
    masks = masks.flip().resize((666, 1333)).crop(0, 0, 600, 1333)
    tensors = [value for value in vars(masks).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in tensors) < 2**20


def test_float32_vertices():
    masks = Masks.from_coco([[TRIANGLE]], SIZE, torch.float32)
    assert masks.flip().resize((12, 16)).vertices.dtype == torch.float32
    assert Masks.batch([masks, Masks.from_coco([[TRIANGLE]], SIZE)]).vertices.dtype == torch.float64


@pytest.mark.parametrize(
    ("segmentations", "error", "message"),
    [
        (None, TypeError, "expected a sequence of segmentations, got None"),
        ([None], TypeError, "expected a sequence of polygons, or RLE, got None"),
        ([[]], ValueError, "expected polygons, got an empty list"),
        ([[[1, 2, 3, 4]]], ValueError, r"expected x, y of 3 points or more, got \[1, 2, 3, 4\]"),
        ([[[1, 2, 3, 4, 5, 6, 7]]], ValueError, "expected x, y of 3 points"),
        ([TRIANGLE], TypeError, "expected polygons of numbers, got 2.0"),
        ([[["1", "2", "3", "4", "5", "6"]]], TypeError, "expected polygons of numbers"),
        ([{"size": [24, 32]}], TypeError, "expected a sequence of runs, got None"),
        ([{"size": [24, 32], "counts": [700, 67]}], ValueError, r"expected runs that fill \(24, 32\)"),
        ([{"size": [32, 24], "counts": [768]}], ValueError, r"expected runs that fill \(24, 32\)"),
        ([{"size": [24, 32], "counts": [800, -32]}], ValueError, "expected at least 0, got -32"),
        ([{"size": [24, 32], "counts": ""}], ValueError, "expected COCO's compressed counts"),
        ([{"size": [24, 32], "counts": "\x01"}], ValueError, "expected COCO's compressed counts"),
        ([{"size": [24, 32], "counts": "~~~~~~~~~~~"}], ValueError, "expected COCO's compressed counts"),
    ],
)
def test_wrong_segmentations(segmentations, error, message):
    with pytest.raises(error, match=f"segmentations: {message}"):
        Masks.from_coco(segmentations, SIZE)


def test_wrong_bitmaps():
    with pytest.raises(TypeError, match=r"bitmaps: expected bool or uint8, got torch\.float32"):
        Masks.from_bitmaps(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"bitmaps: expected \[G, H, W\]"):
        Masks.from_bitmaps(torch.zeros(2, 2, dtype=torch.bool))
