"""Random objects and boxes, their mask targets by pycocotools and torchvision, and the kernels' variants."""

from functools import partial

import numpy as np
import torch
from torchvision.ops import roi_align

from fastmask import Masks, mask_targets
from tests.oracles.budget import BUDGET

NAN, INF = float("nan"), float("inf")


def draw_polygon(random, height, width, points, *, spread=1.2, digits=2):
    """A closed chain of random points in and around an image, as COCO writes it: self-intersecting, of any size."""
    centre = random.uniform(0, (width, height))
    extent = np.exp(random.uniform(np.log(0.5), np.log(spread * max(height, width))))
    angles = np.sort(random.uniform(0, 2 * np.pi, points)) + random.choice([0.0, 0.5]) * random.uniform(0, 3, points)
    radii = extent / 2 * random.uniform(0.3, 1, points)
    xy = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    if random.random() < 0.3:  # repeated points, and points on whole and half pixels
        xy = np.round(xy * 2) / 2
    return np.round(xy, digits).ravel().tolist()


def draw_segmentations(random, count, height, width, *, parts=3, points=12):
    """Polygons of `count` objects."""
    return [
        [
            draw_polygon(random, height, width, int(random.integers(3, points + 1)))
            for _ in range(random.integers(1, parts + 1))
        ]
        for _ in range(count)
    ]


def draw_rles(random, count, height, width, *, compressed=True):
    """RLE of random blobs, and of noise."""
    from pycocotools import mask as coco_mask

    rles = []
    for index in range(count):
        bitmap = decode(draw_segmentations(random, 1, height, width)[0], height, width)
        if index % 3 == 2:
            bitmap ^= (random.random((height, width)) < 0.2).astype(np.uint8)
        encoded = coco_mask.encode(np.asfortranarray(bitmap))
        counts = encoded["counts"].decode()
        rles.append({"size": [height, width], "counts": counts if compressed else runs_of(bitmap)})
    return rles


def runs_of(bitmap):
    """COCO's uncompressed counts."""
    flat = bitmap.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff([0, *edges.tolist(), flat.size]).tolist()


def decode(segmentation, height, width):
    """`[H, W]` uint8 by pycocotools, from a segmentation of COCO's JSON."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return coco_mask.decode(rle)


def draw_boxes(random, count, height, width):
    """Boxes of every size, in and around an image."""
    side = np.exp(random.uniform(np.log(0.3), np.log(1.5 * max(height, width)), (count, 2)))
    corner = random.uniform(-side / 2, (width, height) - side / 2)
    return torch.from_numpy(np.concatenate([corner, corner + side], 1)).float()


def polygon_oracle(segmentation, box, size):
    """`[H, W]` by pycocotools, of polygons moved and scaled to a box: detectron2's target."""
    x1, y1, x2, y2 = (float(value) for value in box)
    height, width = size
    scale = np.array([width / max(x2 - x1, 0.1), height / max(y2 - y1, 0.1)])
    moved = [((np.reshape(polygon, (-1, 2)) - (x1, y1)) * scale).ravel().tolist() for polygon in segmentation]
    return torch.from_numpy(decode(moved, height, width).astype(np.float32))


def bitmap_oracle(bitmap, boxes, size, aligned, ratio=-1):
    """`[K, H, W]` float64 by torchvision, of one bitmap."""
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes.float()], 1).double()
    image = torch.as_tensor(bitmap)[None, None].double()
    return roi_align(image, rois, size, 1.0, ratio, aligned)[:, 0]


def bitmaps(masks):
    """`[G, H, W]` uint8, the masks of one image in its pixels; where it was resized, interpolated at their centres."""
    height, width = masks.size
    boxes = torch.tensor([[0.0, 0.0, width, height]], device=masks.device).expand(len(masks), -1)
    matches = torch.arange(len(masks), device=masks.device)
    targets = mask_targets(masks, boxes, matches, (height, width), aligned=True, sampling_ratio=1)
    return (targets >= 0.5).to(torch.uint8)


def assert_sampled(actual, exact, extent):
    """Mean of samples in float32: each position is off by its rounding, which moves it over pixels of 0 or 1."""
    allowed = 8 * extent * BUDGET[torch.float32]
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape
    assert not exact.numel() or (actual.cpu().double() - exact).abs().max() <= allowed


def check_polygons(device, size=(28, 28), count=3, seed=0, dtype=torch.float64, image=(60, 90), points=12):
    """Targets of polygons of every size are pycocotools', pixel for pixel."""
    random = np.random.default_rng(seed)
    segmentations = draw_segmentations(random, count, *image, points=points)
    masks = Masks.from_coco(segmentations, image, dtype).to(device)
    # Near each object, because a box far from it shows nothing of its edges, and anywhere.
    near = [
        np.reshape(polygons[0], (-1, 2)) + random.normal(0, 0.5, (len(polygons[0]) // 2, 2))
        for polygons in segmentations
    ]
    near = torch.from_numpy(np.stack([[*points.min(0), *points.max(0)] for points in near])).float()
    boxes = torch.cat([near, draw_boxes(random, count, *image)])
    matches = torch.arange(2 * count) % count
    actual = mask_targets(masks, boxes.to(device), matches.to(device), size)
    if dtype == torch.float32:
        segmentations = [[np.float32(p).tolist() for p in polygons] for polygons in segmentations]
    for target, box, match in zip(actual.cpu(), boxes, matches.tolist(), strict=True):
        assert torch.equal(target, polygon_oracle(segmentations[match], box, size)), (match, box)


def check_degenerate_polygons(device):
    """Points, lines, polygons far away, and vertices on the boundaries of subpixels."""
    segmentations = [
        [[3.0, 3.0] * 3],
        [[1.0, 1.0, 9.0, 1.0, 1.0, 1.0], [2.0, 0.0, 2.0, 9.0, 2.0, 3.0]],
        [[-500.0, -500.0, -400.0, -500.0, -400.0, 900.0]],
        [[0.1 * i for i in range(40)], [0.5, 0.5, 9.5, 0.5, 9.5, 9.5, 0.5, 9.5]],
        [[0.0, 0.0, 10.0, 0.0, 10.0, 10.0, 0.0, 10.0], [2.0, 2.0, 4.0, 2.0, 4.0, 4.0]],  # a hole would be an xor
        [[1.0, 9.0, 5.0, 1.0, 9.0, 9.0, 1.0, 4.0, 9.0, 4.0]],  # a star
    ]
    boxes = [[0.0, 0, 10, 10], [3, 3, 2, 3], [-20, -20, 30, 30], [0.05, 0.05, 9.95, 9.95]]
    masks = Masks.from_coco(segmentations, (10, 10)).to(device)
    pairs = [(match, box) for match in range(len(segmentations)) for box in boxes]
    matches = torch.tensor([match for match, _ in pairs], device=device)
    actual = mask_targets(masks, torch.tensor([box for _, box in pairs], device=device), matches, 8)
    for target, (match, box) in zip(actual.cpu(), pairs, strict=True):
        box = torch.tensor(box)
        assert torch.equal(target, polygon_oracle(segmentations[match], box, (8, 8))), (match, box)


def check_far_vertices(device):
    """Vertices too far away, infinite or NaN are moved, and boxes that are not finite give zeros."""
    square = [[0.0, 0.0, 1e30, 0.0, 1e30, 1e30, 0.0, 1e30], [NAN, NAN, INF, -INF, 3.0, 3.0]]
    masks = Masks.from_coco([square], (8, 8)).to(device)
    boxes = torch.tensor([[0.0, 0, 8, 8], [NAN, 0, 8, 8], [0, 0, INF, 8], [-3e38, -3e38, 3e38, 3e38]], device=device)
    actual = mask_targets(masks, boxes, torch.zeros(4, dtype=torch.int64, device=device), 8)
    assert ((actual == 0) | (actual == 1)).all()
    assert actual[0].all()
    assert not actual[1:3].any()


def check_sampled(device, kind, *, aligned=True, ratio=0, size=(14, 14), image=(30, 41), seed=0, boxes=None):
    """Targets of bitmaps, or of RLE, are torchvision's `roi_align` of the decoded bitmap."""
    random = np.random.default_rng(seed)
    rles = draw_rles(random, 3, *image)
    decoded = torch.stack([torch.from_numpy(decode(rle, *image)) for rle in rles])
    masks = Masks.from_bitmaps(decoded) if kind == "bitmaps" else Masks.from_coco(rles, image)
    boxes = draw_boxes(random, 3, *image) if boxes is None else torch.tensor(boxes)
    actual = mask_targets(
        masks.to(device),
        boxes.to(device),
        (torch.arange(len(boxes)) % 3).to(device),
        size,
        aligned=aligned,
        sampling_ratio=ratio,
    )
    for k, target in enumerate(actual):
        exact = bitmap_oracle(decoded[k % 3], boxes[k : k + 1], size, aligned, ratio or -1)
        assert_sampled(target[None], exact, max(image))


def check_transformed(device, kind):
    """A mask flipped and cropped is the flipped and cropped bitmap's."""
    random = np.random.default_rng(1)
    image, (top, left, height, width) = (24, 33), (3, 5, 20, 25)
    rles = draw_rles(random, 2, *image)
    decoded = torch.stack([torch.from_numpy(decode(rle, *image)) for rle in rles])
    masks = Masks.from_bitmaps(decoded) if kind == "bitmaps" else Masks.from_coco(rles, image)
    masks = masks.flip().crop(top, left, height, width)
    expected = decoded.flip(2)[:, top : top + height, left : left + width]
    boxes = torch.tensor([[2.2, 1.5, 20.7, 17.0], [4.0, 3.0, 9.0, 12.5]])  # inside: what is cropped stays around it
    matches = torch.arange(2)
    for aligned in (False, True):
        actual = mask_targets(masks.to(device), boxes.to(device), matches.to(device), 7, aligned=aligned)
        exact = torch.cat([bitmap_oracle(expected[k], boxes[k : k + 1], (7, 7), aligned) for k in range(2)])
        assert_sampled(actual, exact, max(image))


def check_batch(device, kinds=("polygons", "bitmaps", "RLE"), dtype=torch.float32):
    """A padded batch of images of different sizes, one without objects; RoIs without an object have zeros."""
    random = np.random.default_rng(2)
    images, per_image = [(20, 30), (25, 16), (12, 12)], []
    for image in images:
        some = []
        if "polygons" in kinds:
            some.append(Masks.from_coco(draw_segmentations(random, 2, *image), image))
        if "RLE" in kinds:
            some.append(Masks.from_coco(draw_rles(random, 1, *image), image))
        if "bitmaps" in kinds:
            decoded = [decode(rle, *image) for rle in draw_rles(random, 1, *image)]
            some.append(Masks.from_bitmaps(torch.from_numpy(np.stack(decoded))))
        per_image.append(Masks.cat(some))
    per_image[1] = per_image[1][:0]
    batch = Masks.batch([masks.to(device) for masks in per_image])
    boxes = torch.stack([draw_boxes(random, 4, *image) for image in images]).to(dtype)
    matches = torch.tensor([[0, 2, 1, -1], [0, 0, 1, 0], [3, 9, 0, 1]])
    actual = mask_targets(batch, boxes.to(device), matches.to(device), 7).cpu()
    assert actual.shape == (3, 4, 7, 7)
    for image, masks in enumerate(per_image):
        for slot, match in enumerate(matches[image].tolist()):
            expected = torch.zeros(1, 7, 7)
            if 0 <= match < len(masks):
                box, alone = boxes[image, slot][None].to(device), masks[match].to(device)
                expected = mask_targets(alone, box, matches.new_zeros(1).to(device), 7).cpu()
            assert torch.equal(actual[image, slot], expected[0]), (image, slot)


def check_unreached(device, kind):
    """Boxes of a billion pixels end soon, and those that are not finite give zeros."""
    ones = torch.ones(1, 9, 12, dtype=torch.uint8)
    rle = {"size": [9, 12], "counts": [0, 108]}
    masks = Masks.from_bitmaps(ones) if kind == "bitmaps" else Masks.from_coco([rle], (9, 12))
    boxes = [[-1e9, -1e9, 1e9, 1e9], [NAN, 0, 9, 9], [0, 0, INF, 9], [-3e38, 0, 3e38, 9], [2, 2, 8, 8]]
    boxes = torch.tensor(boxes, device=device)
    actual = mask_targets(masks.to(device), boxes, torch.zeros(5, dtype=torch.int64, device=device), 4, aligned=True)
    assert (actual[0] < 1e-6).all()
    assert (actual[1:4] == 0).all()
    assert (actual[4] == 1).all()


FAR_BOXES = [[-50.0, -30, 90, 60], [5, 5, 2, 2], [100, 100, 140, 120], [0, 0, 0.01, 0.01]]

# By name: asserts that a small call of one variant of the kernels agrees with an oracle.
VARIANTS = {
    "polygons 28x28": partial(check_polygons, size=(28, 28), count=2),
    "polygons 14x14, float32": partial(check_polygons, size=(14, 14), dtype=torch.float32, count=1, seed=1),
    "polygons of many edges": partial(check_polygons, size=(28, 28), count=1, points=150, seed=5),
    "polygons 40x70, several programs": partial(check_polygons, size=(40, 70), count=1),
    "polygons 1x3": partial(check_polygons, size=(1, 3), count=2),
    "degenerate polygons": check_degenerate_polygons,
    "far vertices": check_far_vertices,
    **{
        f"{kind}, {'aligned' if aligned else 'not aligned'}": partial(check_sampled, kind=kind, aligned=aligned)
        for kind in ("bitmaps", "RLE")
        for aligned in (False, True)
    },
    "bitmaps, sampling ratio 2": partial(check_sampled, kind="bitmaps", ratio=2, size=(5, 3)),
    "RLE, sampling ratio 3": partial(check_sampled, kind="RLE", ratio=3, size=(5, 3)),
    "bitmaps, far boxes": partial(check_sampled, kind="bitmaps", boxes=FAR_BOXES, size=(4, 4)),
    "RLE, far boxes": partial(check_sampled, kind="RLE", boxes=FAR_BOXES, size=(4, 4)),
    "bitmaps, unreached": partial(check_unreached, kind="bitmaps"),
    "RLE, unreached": partial(check_unreached, kind="RLE"),
    "bitmaps, flipped and cropped": partial(check_transformed, kind="bitmaps"),
    "RLE, flipped and cropped": partial(check_transformed, kind="RLE"),
    "batch": check_batch,
    "batch of bitmaps and RLE": partial(check_batch, kinds=("bitmaps", "RLE")),
    "batch of polygons and bitmaps": partial(check_batch, kinds=("polygons", "bitmaps"), dtype=torch.float64),
}
