"""Mask targets against pycocotools (polygons, RLE) and torchvision (bitmaps)."""

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from fastmask import Masks, mask_targets
from tests.oracles.mask_targets import (
    bitmaps,
    check_polygons,
    decode,
    draw_boxes,
    draw_rles,
    draw_segmentations,
    polygon_oracle,
)

IMAGE = (60, 90)


def zeros(count, device):
    return torch.zeros(count, dtype=torch.int64, device=device)


@pytest.mark.reference_only
@pytest.mark.parametrize("size", [(28, 28), (14, 14), (56, 56), (9, 130), (1, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_polygons_in_bulk(size, seed):
    check_polygons("cpu", size=size, count=120, seed=seed, points=40)


@pytest.mark.reference_only
@pytest.mark.parametrize("kind", ["tiny", "huge", "integers", "half pixels"])
def test_polygons_where_rounding_ties(kind):
    random = np.random.default_rng(0)
    size = (16, 16)
    for _ in range(400):
        if kind == "tiny":
            polygon = random.uniform(0, 0.3, 10)
        elif kind == "huge":
            polygon = random.uniform(-3000, 3000, 10)
        else:
            polygon = random.integers(-4, 24, 14) / (1 if kind == "integers" else 10)
        polygon = [polygon.tolist()]
        masks = Masks.from_coco([polygon], size)
        for box in ((0.0, 0.0, 16.0, 16.0), (1.0, -3.0, 5.0, 29.0)):
            box = torch.tensor(box)
            assert torch.equal(
                mask_targets(masks, box[None], zeros(1, "cpu"), size)[0], polygon_oracle(polygon, box, size)
            )


@pytest.mark.reference_only
def test_edges_of_every_small_slope():
    """All triangles between points of a grid of subpixels: each crossing that two roundings could move."""
    size, points = (4, 4), [(x / 5, y / 5) for x in range(0, 21, 4) for y in range(0, 21, 3)]
    random = np.random.default_rng(0)
    segmentations = []
    for _ in range(3000):
        chosen = random.choice(len(points), 3)
        segmentations.append([[value + 0.1 * random.integers(-1, 2) for index in chosen for value in points[index]]])
    masks = Masks.from_coco(segmentations, size)
    actual = bitmaps(masks)
    for target, segmentation in zip(actual, segmentations, strict=True):
        assert np.array_equal(target, decode(segmentation, *size)), segmentation


@pytest.mark.reference_only
def test_a_whole_image():
    random = np.random.default_rng(3)
    size = (240, 320)
    segmentations = [*draw_segmentations(random, 12, *size, points=60), *draw_rles(random, 3, *size)]
    segmentations += draw_rles(random, 3, *size, compressed=False)
    actual = bitmaps(Masks.from_coco(segmentations, size)).numpy()
    for mask, segmentation in zip(actual, segmentations, strict=True):
        assert np.array_equal(mask, decode(segmentation, *size))


def test_bitmaps_are_torchvisions(device):
    random = np.random.default_rng(4)
    decoded = torch.stack([torch.from_numpy(decode(rle, *IMAGE)) for rle in draw_rles(random, 2, *IMAGE)])
    boxes = draw_boxes(random, 3, *IMAGE)
    matches = torch.tensor([1, 0, 1])
    expected = project_masks_on_boxes(decoded, boxes, matches, 14)
    for bitmap in (decoded, decoded.bool()):
        actual = mask_targets(Masks.from_bitmaps(bitmap).to(device), boxes.to(device), matches.to(device), 14)
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-3)


def test_rle_is_the_bitmap_that_it_encodes(device):
    random = np.random.default_rng(5)
    rles = draw_rles(random, 3, *IMAGE)
    decoded = torch.stack([torch.from_numpy(decode(rle, *IMAGE)) for rle in rles])
    arguments = draw_boxes(random, 3, *IMAGE).to(device), torch.arange(3, device=device), (6, 5)
    actual = mask_targets(Masks.from_coco(rles, IMAGE).to(device), *arguments)
    assert torch.equal(actual, mask_targets(Masks.from_bitmaps(decoded).to(device), *arguments))


@pytest.mark.parametrize("kind", ["polygons", "bitmaps", "RLE"])
def test_a_resize_is_that_of_the_box(kind, device):
    """A box of the resized image and one of the image that cover the same have the same target."""
    random = np.random.default_rng(6)
    if kind == "polygons":
        masks = Masks.from_coco(draw_segmentations(random, 2, *IMAGE), IMAGE)
    else:
        rles = draw_rles(random, 2, *IMAGE)
        masks = Masks.from_coco(rles, IMAGE)
        if kind == "bitmaps":
            masks = Masks.from_bitmaps(torch.stack([torch.from_numpy(decode(rle, *IMAGE)) for rle in rles]))
    resized = masks.resize((2 * IMAGE[0], IMAGE[1] // 2))
    assert (resized.size, len(resized)) == ((120, 45), 2)
    boxes = torch.tensor([[4.0, 6.0, 60.0, 50.0], [20.0, 3.0, 34.0, 41.0]])
    scaled = boxes * torch.tensor([0.5, 2.0, 0.5, 2.0])
    matches = torch.arange(2, device=device)
    expected = mask_targets(masks.to(device), boxes.to(device), matches, 8, aligned=True)
    actual = mask_targets(resized.to(device), scaled.to(device), matches, 8, aligned=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0 if kind == "polygons" else 1e-5)


def test_nothing_to_do(device):
    masks = Masks.from_coco([[[0, 0, 5, 0, 5, 5]]], (8, 8)).to(device)
    assert mask_targets(masks, torch.zeros(0, 4, device=device), zeros(0, device), 7).shape == (0, 7, 7)
    box = torch.tensor([[0.0, 0, 8, 8]], device=device)
    for empty in (
        masks[:0],
        Masks.from_coco([], (8, 8)).to(device),
        Masks.from_bitmaps(torch.zeros(0, 8, 8).bool()).to(device),
    ):
        assert not mask_targets(empty, box, zeros(1, device), 7).any()
    for none in (-1, 1, 2**40, -(2**40)):
        assert not mask_targets(masks, box, torch.tensor([none], device=device), 7).any()
    pixelless = Masks.from_bitmaps(torch.ones(2, 0, 4, dtype=torch.bool)).to(device)
    assert not mask_targets(pixelless, box, zeros(1, device), 7).any()


def test_the_dtypes_of_boxes_and_matches(device):
    masks = Masks.from_coco([[[0, 0, 5, 0, 5, 5]]], (8, 8)).to(device)
    box = torch.tensor([[0.0, 0, 8, 8]], device=device)
    expected = mask_targets(masks, box, zeros(1, device), 7)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(mask_targets(masks, box.to(dtype), zeros(1, device).int(), 7), expected)


def test_boxes_get_no_gradient(device):
    masks = Masks.from_coco([[[0, 0, 5, 0, 5, 5]]], (8, 8)).to(device)
    box = torch.tensor([[0.0, 0, 8, 8]], device=device, requires_grad=True)
    assert not mask_targets(masks, box, zeros(1, device), 7).requires_grad


def test_wrong_arguments():
    masks, box, match = Masks.from_coco([[[0, 0, 5, 0, 5, 5]]], (8, 8)), torch.rand(1, 4), zeros(1, "cpu")
    for arguments, error, message in (
        ((None, box, match, 7), TypeError, "masks: expected Masks, got None"),
        ((masks, box.long(), match, 7), TypeError, "boxes: expected a floating dtype, got torch.int64"),
        ((masks, box[0], match, 7), ValueError, r"boxes: expected \[1, S, 4\] or \[K, 4\], got \[4\]"),
        ((masks, box.expand(2, 1, 4), match, 7), ValueError, r"boxes: expected \[1, S, 4\]"),
        ((masks, box, match.float(), 7), TypeError, "matches: expected an integer dtype, got torch.float32"),
        ((masks, box, match[:0], 7), ValueError, r"matches: expected \[1\] to match boxes, got \[0\]"),
        ((masks, box, match.to("meta"), 7), ValueError, "matches: expected on cpu like masks, got meta"),
        ((masks, box, match, 0), ValueError, "size: expected .* got 0"),
        ((masks, box, match, (7, 2**31)), ValueError, "size: expected"),
    ):
        with pytest.raises(error, match=message):
            mask_targets(*arguments)
    with pytest.raises(TypeError, match="aligned: expected a bool, got 'yes'"):
        mask_targets(masks, box, match, 7, aligned="yes")


def operator_arguments(device):
    random = np.random.default_rng(7)
    image = (20, 30)
    masks = Masks.cat([Masks.from_coco([*draw_segmentations(random, 1, *image), *draw_rles(random, 1, *image)], image)])
    masks = Masks.batch([masks, masks]).to(device)
    boxes = torch.stack([draw_boxes(random, 2, *image) for _ in range(2)]).to(device)
    return masks, boxes, torch.tensor([[0, 1], [1, -1]], device=device)


@pytest.mark.reference_only
def test_opcheck():
    masks, boxes, matches = operator_arguments("cpu")
    tensors = masks.vertices, masks.parts, masks.runs, masks.pixels, masks.objects, masks.transforms, masks.offsets
    for offsets, shape in ((masks.offsets, (2, 2)), (None, (4,))):
        arguments = (*tensors[:6], offsets, boxes.view(*shape, 4), matches.view(shape), 7, 6, True, 0)
        torch.library.opcheck(torch.ops.fastmask.mask_targets.default, arguments)


@pytest.mark.reference_only
def test_compiled_without_breaks():
    masks, boxes, matches = operator_arguments("cpu")
    compiled = torch.compile(lambda *arguments: mask_targets(*arguments, 7), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(masks, boxes, matches), mask_targets(masks, boxes, matches, 7))


def test_repeated_calls_give_the_same_bits(device):
    masks, boxes, matches = operator_arguments(device)
    first = mask_targets(masks, boxes, matches, 7)
    assert all(torch.equal(mask_targets(masks, boxes, matches, 7), first) for _ in range(3))


@pytest.mark.reference_only
def test_many_boxes_are_rasterised_in_pieces(monkeypatch):
    random = np.random.default_rng(8)
    masks = Masks.from_coco(draw_segmentations(random, 5, *IMAGE), IMAGE)
    arguments = masks, draw_boxes(random, 50, *IMAGE), torch.arange(50) % 5, 9
    expected = mask_targets(*arguments)
    monkeypatch.setattr("fastmask.kernels.mask_targets.polygons.MAX_EDGES", 40)
    assert torch.equal(mask_targets(*arguments), expected)
