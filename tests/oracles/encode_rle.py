"""pycocotools' encoding of pasted masks, smooth masks as a network predicts them, and the kernels' variants."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from fastmask.kernels._mask_sampling import CONVENTIONS
from fastmask.kernels.encode_rle import encode_bitmaps, encode_rle, encode_rle_padded
from fastmask.kernels.encode_rle.text import split_text
from fastmask.kernels.paste_masks import paste_masks
from tests.oracles.paste_masks import draw_masks


def coco_encode(bitmaps):
    """`[N, H, W]` bitmaps by pycocotools, with text as `str`."""
    from pycocotools import mask as coco_mask

    columns = bitmaps.cpu().bool().mT.contiguous()
    rles = coco_mask.encode(columns.view(torch.uint8).numpy().transpose(2, 1, 0))
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in rles]


def paste_and_encode(masks, boxes, image, threshold=0.5, convention="aligned"):
    """What `encode_rle` has to give, on the device of the masks."""
    return coco_encode(paste_masks(masks, boxes, image, threshold, convention=convention))


def smooth_masks(n, m, seed=0):
    """A blob with a wavy border, about a mask pixel wide from 0 to 1: the shape of a trained network's masks."""
    g = torch.Generator().manual_seed(seed)
    waves = F.interpolate(torch.randn(n, 1, 4, 4, generator=g), (m, m), mode="bicubic")[:, 0]
    axis = (torch.arange(m) + 0.5) / m * 2 - 1
    radius = (axis[:, None] ** 2 + axis**2).sqrt()
    return ((0.8 - radius + 0.2 * waves) * (m / 2)).sigmoid()


def check_encoded(
    device, convention="aligned", dtype=torch.float32, image=(45, 70), boxes=None, threshold=0.5, m=14, smooth=False
):
    """Strings of a small image are pycocotools'; by default of boxes of every size."""
    masks, drawn = draw_masks(3 if boxes is None else len(boxes), m, *image)
    masks = smooth_masks(len(masks), m) if smooth else masks
    masks, boxes = masks.to(device, dtype), (drawn if boxes is None else torch.as_tensor(boxes)).to(device)
    expected = paste_and_encode(masks, boxes, image, threshold, convention)
    assert encode_rle(masks, boxes, image, threshold, convention=convention) == expected


def check_full_height(device):
    """Columns of ones that continue in the next column, up to the image's last pixel, and images of few pixels."""
    for image in ((33, 5), (32, 4), (64, 3), (1, 40), (1, 1), (40, 1)):
        ones = torch.ones(2, 4, 4, device=device)
        boxes = torch.tensor([[-9.0, -90, 99, 99], [1, -90, 3, 99]], device=device)
        assert encode_rle(ones, boxes, image) == paste_and_encode(ones, boxes, image)
        check_encoded(device, image=image, boxes=[[-9.0, -90, 99, 99], [-2, -3, 3, 20]], m=3)


def check_unreached(device):
    """Boxes that reach no pixel."""
    nan, inf = math.nan, math.inf
    boxes = [[nan, 0, 9, 9], [0, 0, inf, 9], [9, 9, 3, 3], [-3e38, -3e38, 3e38, 3e38], [99, 3, 120, 9], [4, 2, 4, 9]]
    boxes, masks = torch.tensor(boxes, device=device), torch.ones(len(boxes), 6, 6, device=device)
    for threshold in (0.5, 0.0):
        assert encode_rle(masks, boxes, (10, 13), threshold) == paste_and_encode(masks, boxes, (10, 13), threshold)


def check_no_pixels(device):
    """Images without rows or columns: one run of no pixels, and no word to read."""
    masks, boxes = (tensor.to(device) for tensor in draw_masks(2, 4, 5, 5))
    for size in ((0, 5), (5, 0)):
        expected = [{"size": list(size), "counts": "0"}] * 2
        assert encode_rle(masks, boxes, size, 0.0) == expected
        assert encode_bitmaps(torch.zeros(2, *size, dtype=torch.bool, device=device)) == expected


def check_threshold_zero(device):
    """Pixels outside the box belong to the mask, and those of a negative value inside do not."""
    masks, boxes = draw_masks(3, 5, 41, 37)
    boxes[0] = torch.tensor([-3.0, -3, 9, 60])
    masks, boxes = masks.to(device) - 0.5, boxes.to(device)
    assert encode_rle(masks, boxes, (41, 37), 0.0) == paste_and_encode(masks, boxes, (41, 37), 0.0)


def check_padded(device):
    """Strings one after the other; those that do not fit and those beyond the count have no bytes."""
    masks, boxes = (tensor.to(device) for tensor in draw_masks(6, 7, 40, 30))
    texts = [rle["counts"] for rle in paste_and_encode(masks, boxes, (40, 30))]
    longest = max(map(len, texts[:2] + texts[3:5]))
    for capacity in (longest, longest - 1, 3, 9000):
        strings, lengths = encode_rle_padded(
            masks.view(2, 3, 7, 7),
            boxes.view(2, 3, 4),
            (40, 30),
            counts=torch.tensor([2, 9], device=device),
            capacity=capacity,
        )
        counted = [text if n != 2 else "" for n, text in enumerate(texts)]
        fitting = [text if len(text) <= capacity else "" for text in counted]
        lengths = lengths.flatten().cpu()
        for text, length in zip(counted, lengths.tolist(), strict=True):
            assert length == len(text) if len(text) <= capacity else length >= len(text)
        kept = strings.cpu()[: sum(map(len, fitting))]
        assert split_text(kept, lengths.masked_fill(lengths > capacity, 0)) == fitting
        assert strings.numel() == 6 * capacity
        assert not strings[len(kept) :].any()


def check_long_strings(device):
    """Strings that do not fit the usual capacity, and more of them than are copied at once."""
    bitmaps = (
        torch.rand(3, 200, 90, generator=torch.Generator().manual_seed(0))
        < torch.tensor([0.5, 0.02, 0.9])[:, None, None]
    )
    assert encode_bitmaps(bitmaps.to(device)) == coco_encode(bitmaps)


def check_bitmaps(device):
    """Bitmaps of both dtypes, whose sides are and are not multiples of words and tiles."""
    g = torch.Generator().manual_seed(0)
    for height, width in ((40, 150), (64, 3), (1, 1), (33, 20)):
        bitmaps = torch.rand(2, height, width, generator=g) < 0.3
        bitmaps[1, -1] = bitmaps[1, :, -1] = True
        assert encode_bitmaps(bitmaps.to(device)) == coco_encode(bitmaps)
        assert encode_bitmaps(bitmaps.to(device, torch.uint8) * 7) == coco_encode(bitmaps)


# By name: asserts that a small call of one variant of the kernels agrees with pycocotools.
VARIANTS = {
    **{
        f"{convention}, {str(dtype).removeprefix('torch.')}": partial(check_encoded, convention=convention, dtype=dtype)
        for convention in CONVENTIONS
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    },
    "smooth": partial(check_encoded, smooth=True, m=28),
    "boxes in float64": lambda device: check_encoded(
        device, "torchvision", boxes=torch.tensor([[3.2, 1.1, 30.9, 37.3]], dtype=torch.float64)
    ),
    "several tiles of a program": lambda device: check_encoded(device, image=(70, 400), boxes=[[-5.0, -3, 390, 71]]),
    "full height": check_full_height,
    "unreached": check_unreached,
    "no pixels": check_no_pixels,
    "threshold 0": check_threshold_zero,
    "padded": check_padded,
    "long strings": check_long_strings,
    "bitmaps": check_bitmaps,
}
