"""Box algebra against torchvision's."""

import pytest
import torch
import torchvision
from torchvision.models.detection._utils import BoxCoder

from fastmask import box_ops as algebra

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def draw(n, seed):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * 100 - 20
    return torch.cat([corner, corner + torch.rand(n, 2, generator=g) * 50 + 1], 1)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), WEIGHTS])
def test_encode_and_decode_are_torchvisions(weights):
    boxes, anchors = draw(9, 0), draw(9, 1)
    coder = BoxCoder(weights)
    deltas = algebra.encode(boxes, anchors, weights)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors))
    wild = deltas * torch.linspace(-9, 9, 9)[:, None]
    assert wild[:, 2:].max() / weights[2] > algebra.MAX_LOG_SCALE  # so that the limit is reached
    torch.testing.assert_close(
        algebra.decode(wild, anchors, weights), coder.decode_single(wild, anchors), rtol=1e-5, atol=1e-3
    )


def test_decode_inverts_encode_for_many_classes():
    boxes, anchors = draw(12, 2).view(4, 3, 4), draw(4, 3)[:, None]
    deltas = algebra.encode(boxes, anchors, WEIGHTS)
    torch.testing.assert_close(algebra.decode(deltas, anchors, WEIGHTS), boxes, rtol=1e-5, atol=1e-4)


def test_clip_area_and_iou_are_torchvisions():
    boxes, others = draw(7, 4), draw(5, 5)
    assert torch.equal(algebra.clip(boxes, (40, 60)), torchvision.ops.clip_boxes_to_image(boxes, (40, 60)))
    assert torch.equal(algebra.area(boxes), torchvision.ops.box_area(boxes))
    torch.testing.assert_close(algebra.iou(boxes, others), torchvision.ops.box_iou(boxes, others))
    batched = algebra.iou(torch.stack([boxes, boxes + 1]), torch.stack([others, others]))
    torch.testing.assert_close(batched[1], torchvision.ops.box_iou(boxes + 1, others))


def test_clip_to_images_of_different_sizes():
    g = torch.Generator().manual_seed(1)
    boxes = torch.rand(3, 2, 5, 4, generator=g) * 100 - 20
    sizes = torch.tensor([[40, 60], [70, 30], [10, 10]])
    clipped = algebra.clip(boxes, sizes[:, None, None])
    for i, size in enumerate(sizes.tolist()):
        assert torch.equal(clipped[i], torchvision.ops.clip_boxes_to_image(boxes[i], size))
    with pytest.raises(ValueError, match=r"image_size: expected \[..., 2\], got \[3\]"):
        algebra.clip(boxes, torch.zeros(3))


def test_half_precision_boxes_have_float32_areas():
    box = torch.tensor([[0, 0, 600, 600.0]], dtype=torch.float16)
    assert algebra.area(box).item() == 360_000  # beyond float16
    assert algebra.iou(box, box).item() == 1


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("boxes", lambda bad, good: algebra.encode(bad, good)),
        ("anchors", lambda bad, good: algebra.encode(good, bad)),
        ("deltas", lambda bad, good: algebra.decode(bad, good)),
        ("boxes", lambda bad, _: algebra.clip(bad, (5, 5))),
        ("boxes", lambda bad, _: algebra.area(bad)),
        ("others", lambda bad, good: algebra.iou(good, bad)),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=rf"{name}: expected \[..., 4\], got \[2, 5\]"):
        call(torch.zeros(2, 5), torch.zeros(2, 4))
