"""The run-length encoder against pycocotools, byte by byte; registration, compilation, wrong arguments."""

import math

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask.kernels._mask_sampling import CONVENTIONS
from fastmask.kernels.encode_rle import encode_bitmaps, encode_rle, encode_rle_padded
from fastmask.kernels.encode_rle.text import encode_ends, split_text
from fastmask.kernels.paste_masks import paste_masks
from tests.oracles.encode_rle import coco_encode, paste_and_encode, smooth_masks
from tests.oracles.paste_masks import draw_masks

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

both = pytest.mark.parametrize("convention", CONVENTIONS)


def assert_encoded(masks, boxes, image, threshold=0.5, convention="aligned"):
    expected = paste_and_encode(masks, boxes, image, threshold, convention)
    assert encode_rle(masks, boxes, image, threshold, convention=convention) == expected


@both
@pytest.mark.parametrize(
    ("n", "m", "height", "width"), [(3, 28, 31, 67), (2, 14, 40, 40), (4, 5, 1, 33), (3, 1, 33, 1)]
)
def test_matches_pycocotools(device, convention, n, m, height, width):
    masks, boxes = (tensor.to(device) for tensor in draw_masks(n, m, height, width))
    for threshold in (0.3, 0.0):
        assert_encoded(masks, boxes, (height, width), threshold, convention)
    assert_encoded(smooth_masks(n, m).to(device), boxes, (height, width), 0.5, convention)


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device, convention, dtype):
    masks, boxes = (tensor.to(device) for tensor in draw_masks(3, 14, 35, 50))
    for wide in (boxes, boxes.to(dtype)):
        assert_encoded(masks.to(dtype), wide, (35, 50), 0.5, convention)


@pytest.mark.reference_only
@both
@pytest.mark.parametrize("masks", ["noise", "smooth"])
def test_at_full_size(convention, masks):
    masks = torch.rand(6, 28, 28) if masks == "noise" else smooth_masks(6, 28)
    _, boxes = draw_masks(6, 28, 480, 640)
    assert_encoded(masks, boxes, (480, 640), 0.5, convention)


@pytest.mark.reference_only
@pytest.mark.parametrize("value", [0.0, 0.5, math.nextafter(0.5, 0), 1.0, NAN, INF, -INF, 1e38])
def test_constant_masks_and_values_next_to_the_threshold(value):
    """Where rounding decides, the product of paste_masks does."""
    _, boxes = draw_masks(4, 7, 40, 50)
    masks = torch.full((4, 7, 7), value)
    assert_encoded(masks, boxes, (40, 50))
    masks[:, 3:, 2:] = 0.5
    assert_encoded(masks, boxes, (40, 50))
    g = torch.Generator().manual_seed(0)
    noise = (torch.rand(4, 7, 7, generator=g) - 0.5) * 2e-7
    for convention in CONVENTIONS:
        assert_encoded(0.5 + noise, boxes, (40, 50), 0.5, convention)
        assert_encoded((0.5 + noise).double(), boxes, (40, 50), 0.5, convention)


@pytest.mark.reference_only
def test_masks_of_zeros_and_ones_on_whole_pixels():
    """Their values are the threshold itself halfway between two mask pixels."""
    g = torch.Generator().manual_seed(0)
    masks = (torch.rand(8, 6, 6, generator=g) < 0.5).float()
    for side in (6, 12, 18, 30, 42):
        corner = torch.randint(-9, 30, (8, 2), generator=g).float()
        boxes = torch.cat([corner, corner + side], 1)
        for threshold in (0.25, 0.5, 1.0):
            assert_encoded(masks, boxes, (40, 50), threshold)


@pytest.mark.reference_only
def test_random_masks_in_bulk():
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        height, width, m = (int(torch.randint(1, limit, (), generator=g)) for limit in (70, 60, 29))
        masks, boxes = draw_masks(5, m, height, width, seed)
        if seed % 3 == 0:
            masks, boxes = (masks * 4).round() / 4, boxes.round()
        if seed % 5 == 0:
            boxes[:] = torch.tensor([0, 0, width, height])
        dtype, convention = DTYPES[seed % 4], CONVENTIONS[seed // 4 % 2]
        assert_encoded(masks.to(dtype), boxes, (height, width), (0.5, 0.3, 0.0)[seed % 3], convention)


@both
def test_degenerate_and_non_finite_boxes(device, convention):
    boxes = [[NAN, 0, 9, 9], [0, 0, INF, 9], [-INF, 0, INF, 9], [-3e38, -3e38, 3e38, 3e38], [0, 0, 9, 2.0**32]]
    boxes += [[9, 9, 3, 3], [-90, -90, -80, -80], [99, 3, 120, 9], [4, 2, 4, 9], [2, 3, 2 + 1e-6, 9]]
    boxes += [[-1e9, -1e9, 1e9, 1e9], [3, -1e9, 8, 1e9]]
    boxes, masks = torch.tensor(boxes, device=device), torch.rand(len(boxes), 6, 6, device=device)
    for threshold in (0.5, 0.0):
        assert_encoded(masks, boxes, (10, 13), threshold, convention)


def test_images_without_pixels(device):
    masks, boxes = (tensor.to(device) for tensor in draw_masks(2, 4, 5, 5))
    for size in ((0, 5), (5, 0), (0, 0)):
        for threshold in (0.5, 0.0):
            expected = [{"size": list(size), "counts": "0"}] * 2  # one run of no pixels
            assert encode_rle(masks, boxes, size, threshold) == expected
        assert encode_bitmaps(torch.zeros(2, *size, dtype=torch.bool, device=device)) == expected


def test_no_masks(device):
    masks, boxes = torch.rand(0, 4, 4, device=device), torch.rand(0, 4, device=device)
    assert encode_rle(masks, boxes, (5, 6)) == []
    assert encode_bitmaps(torch.zeros(0, 5, 6, dtype=torch.bool, device=device)) == []
    strings, lengths = encode_rle_padded(masks.view(2, 0, 4, 4), boxes.view(2, 0, 4), (5, 6))
    assert (strings.shape, lengths.shape) == ((0,), (2, 0))


def test_decodes_to_the_pasted_masks(device):
    masks, boxes = (tensor.to(device) for tensor in draw_masks(3, 7, 30, 40))
    decoded = coco_mask.decode(encode_rle(masks, boxes, (30, 40)))
    assert np.array_equal(decoded.transpose(2, 0, 1), paste_masks(masks, boxes, (30, 40)).cpu().numpy())


def test_numbers_of_every_length():
    """Runs around every power of two, up to 2^30 pixels, against the string of one number at a time."""
    runs = [1 << bits for bits in range(28)] + [(1 << bits) - 1 for bits in range(1, 28)]
    pixels = 2**30
    ends = torch.tensor(runs).cumsum(0)
    strings, lengths = encode_ends(ends, 1, pixels)
    runs.append(pixels - int(ends[-1]))
    text = ""
    for i, run in enumerate(runs):
        number, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            group, number = number & 31, number >> 5
            more = number != (-1 if group & 16 else 0)
            text += chr(group + 32 * more + 48)
    assert split_text(strings, lengths) == [text]


@both
def test_padded(device, convention):
    masks, boxes = (tensor.to(device) for tensor in draw_masks(4, 7, 20, 30))
    expected = [rle["counts"] for rle in paste_and_encode(masks, boxes, (20, 30), 0.5, convention)]
    arguments = masks.view(2, 2, 7, 7), boxes.view(2, 2, 4), (20, 30)
    strings, lengths = encode_rle_padded(*arguments, convention=convention, capacity=300)
    assert (strings.dtype, strings.shape, lengths.dtype) == (torch.uint8, (4 * 300,), torch.int64)
    assert lengths.tolist() == [[len(text) for text in expected[i : i + 2]] for i in (0, 2)]
    text = bytes(strings.tolist()).rstrip(b"\0").decode()
    assert text == "".join(expected)


def test_padded_counts(device):
    masks, boxes = (tensor.to(device) for tensor in draw_masks(6, 5, 20, 30))
    arguments = masks.view(3, 2, 5, 5), boxes.view(3, 2, 4), (20, 30)
    _, every = encode_rle_padded(*arguments, capacity=200)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        counts = torch.tensor([0, 1, 9], dtype=dtype, device=device)
        _, lengths = encode_rle_padded(*arguments, counts=counts, capacity=200)
        assert torch.equal(lengths, every * (torch.arange(2, device=device) < counts[:, None]))
    _, lengths = encode_rle_padded(*arguments, counts=torch.tensor([-1, 0, 0], device=device), capacity=200)
    assert not lengths.any()


@both
def test_bitwise_repeatable(device, convention):
    masks, boxes = (tensor[None].to(device) for tensor in draw_masks(3, 14, 11, 53))
    first, second = (encode_rle_padded(masks, boxes, (11, 53), convention=convention, capacity=99) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_non_contiguous(device):
    masks, boxes = (tensor.to(device) for tensor in draw_masks(3, 7, 11, 23))
    strided = torch.stack([masks, masks], 3)[..., 0].mT, torch.stack([boxes, boxes], 2)[..., 0]
    assert encode_rle(*strided, (11, 23)) == encode_rle(masks.mT.contiguous(), boxes, (11, 23))
    bitmaps = paste_masks(masks, boxes, (11, 23))
    assert encode_bitmaps(bitmaps.mT) == coco_encode(bitmaps.mT)


def test_autocast_changes_nothing(device):
    masks, boxes = (tensor.to(device) for tensor in draw_masks(3, 14, 40, 50))
    outside = encode_rle(masks, boxes, (40, 50))
    with torch.autocast(device, torch.bfloat16):
        assert encode_rle(masks, boxes, (40, 50)) == outside


def test_opcheck(device):
    masks, boxes = (tensor.to(device) for tensor in draw_masks(2, 7, 9, 13))
    counts = torch.tensor([1], device=device)
    spec = (9, 13, 0.5, "aligned")
    padded = masks[None], boxes[None], counts, 60, *spec
    torch.library.opcheck(torch.ops.fastmask.encode_rle_padded.default, padded)
    torch.library.opcheck(torch.ops.fastmask.encode_rle.default, (masks, boxes, *spec))
    torch.library.opcheck(torch.ops.fastmask.encode_bitmaps.default, (masks > 0.5,))


@both
def test_compiles_without_graph_breaks(device, convention):
    masks, boxes = (tensor[None].to(device) for tensor in draw_masks(2, 7, 9, 13))
    compiled = torch.compile(encode_rle_padded, fullgraph=True, dynamic=True)
    for size in ((9, 13), (6, 17)):
        expected = encode_rle_padded(masks, boxes, size, convention=convention, capacity=70)
        actual = compiled(masks, boxes, size, convention=convention, capacity=70)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_fake_tensors():
    with FakeTensorMode():
        masks, boxes = torch.rand(2, 3, 28, 28, dtype=torch.float16), torch.rand(2, 3, 4)
        strings, lengths = encode_rle_padded(masks, boxes, (800, 1333), capacity=100)
        assert (strings.shape, strings.dtype) == ((600,), torch.uint8)
        assert (lengths.shape, lengths.dtype) == ((2, 3), torch.int64)


def test_any_default_device(device):
    masks, boxes = (tensor.to(device) for tensor in draw_masks(2, 7, 9, 13))
    for threshold in (0.5, 0.0):
        expected = encode_rle(masks, boxes, (9, 13), threshold)
        with torch.device("meta"):
            assert encode_rle(masks, boxes, (9, 13), threshold) == expected


MASKS, BOXES, BITMAPS = torch.rand(2, 4, 4), torch.rand(2, 4), torch.ones(2, 3, 4, dtype=torch.bool)
PADDED = MASKS[None], BOXES[None], (5, 5)
LARGE = BITMAPS[:1, :1, :1].expand(1, 2**16, 2**15)


@pytest.mark.parametrize(
    ("function", "error", "message", "arguments", "options"),
    [
        (encode_rle, ValueError, r"masks: expected \[N, m, m\].*\[2, 3, 4\]", (torch.rand(2, 3, 4), BOXES, (5, 5)), {}),
        (encode_rle, ValueError, r"boxes: expected \[2, 4\].*\[3, 4\]", (MASKS, torch.rand(3, 4), (5, 5)), {}),
        (encode_rle, TypeError, "masks: expected a floating dtype.*uint8", (MASKS.byte(), BOXES, (5, 5)), {}),
        (encode_rle, ValueError, "image_size: expected.*2\\^30", (MASKS, BOXES, (2**16, 2**15)), {}),
        (encode_rle, ValueError, r"threshold: expected.*1\.5", (MASKS, BOXES, (5, 5), 1.5), {}),
        (encode_rle, TypeError, "threshold: expected a number, got None", (MASKS, BOXES, (5, 5), None), {}),
        (encode_rle, ValueError, "convention: expected.*'caffe'", (MASKS, BOXES, (5, 5)), {"convention": "caffe"}),
        (encode_rle_padded, ValueError, r"masks: expected \[B, N, m, m\]", (MASKS, BOXES, (5, 5)), {}),
        (encode_rle_padded, ValueError, r"boxes: expected \[1, 2, 4\]", (MASKS[None], BOXES, (5, 5)), {}),
        (encode_rle_padded, ValueError, "capacity: expected an int in .1, .*, got 0", PADDED, {"capacity": 0}),
        (encode_rle_padded, ValueError, r"counts: expected \[1\]", PADDED, {"counts": torch.ones(2).long()}),
        (encode_rle_padded, TypeError, "counts: expected an integer", PADDED, {"counts": torch.ones(1)}),
        (encode_bitmaps, TypeError, "bitmaps: expected bool or uint8, got .*float32", (MASKS,), {}),
        (encode_bitmaps, ValueError, r"bitmaps: expected \[N, H, W\], got \[3, 4\]", (BITMAPS[0],), {}),
        (encode_bitmaps, ValueError, "bitmaps: expected at most 2\\^30", (LARGE,), {}),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(function, error, message, arguments, options):
    with pytest.raises(error, match=message):
        function(*arguments, **options)
