"""Box algebra against torchvision."""

import pytest
import torch
import torchvision
from torchvision.models.detection._utils import BoxCoder

from fastmask import box_ops

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def draw(n, seed):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * 100 - 20
    return torch.cat([corner, corner + torch.rand(n, 2, generator=g) * 50 + 1], 1)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), WEIGHTS])
def test_encode_and_decode_match_torchvision(weights):
    boxes, anchors = draw(9, 0), draw(9, 1)
    coder = BoxCoder(weights)
    deltas = box_ops.encode(boxes, anchors, weights)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors))
    wild = deltas * torch.linspace(-9, 9, 9)[:, None]
    assert wild[:, 2:].max() / weights[2] > box_ops.MAX_LOG_SCALE  # so that the limit is reached
    torch.testing.assert_close(
        box_ops.decode(wild, anchors, weights), coder.decode_single(wild, anchors), rtol=1e-5, atol=1e-3
    )


def test_decode_inverts_encode_for_many_classes():
    boxes, anchors = draw(12, 2).view(4, 3, 4), draw(4, 3)[:, None]
    deltas = box_ops.encode(boxes, anchors, WEIGHTS)
    torch.testing.assert_close(box_ops.decode(deltas, anchors, WEIGHTS), boxes, rtol=1e-5, atol=1e-4)


def test_clip_area_and_iou_match_torchvision():
    boxes, others = draw(7, 4), draw(5, 5)
    assert torch.equal(box_ops.clip(boxes, (40, 60)), torchvision.ops.clip_boxes_to_image(boxes, (40, 60)))
    assert torch.equal(box_ops.area(boxes), torchvision.ops.box_area(boxes))
    torch.testing.assert_close(box_ops.iou(boxes, others), torchvision.ops.box_iou(boxes, others))
    batched = box_ops.iou(torch.stack([boxes, boxes + 1]), torch.stack([others, others]))
    torch.testing.assert_close(batched[1], torchvision.ops.box_iou(boxes + 1, others))


def test_clip_to_images_of_different_sizes():
    g = torch.Generator().manual_seed(1)
    boxes = torch.rand(3, 2, 5, 4, generator=g) * 100 - 20
    sizes = torch.tensor([[40, 60], [70, 30], [10, 10]])
    clipped = box_ops.clip(boxes, sizes[:, None, None])
    for i, size in enumerate(sizes.tolist()):
        assert torch.equal(clipped[i], torchvision.ops.clip_boxes_to_image(boxes[i], size))
    with pytest.raises(ValueError, match=r"image_size: expected \[..., 2\], got \[3\]"):
        box_ops.clip(boxes, torch.zeros(3))


def test_half_precision_boxes_are_clipped_to_images_beyond_their_range():
    box = torch.tensor([[-1, 5, 60_000, 9.0]], dtype=torch.float16)
    assert torch.equal(box_ops.clip(box, (8, 70_000)), torch.tensor([[0, 5, 60_000, 8.0]], dtype=torch.float16))


def test_half_precision_boxes_have_float32_areas():
    box = torch.tensor([[0, 0, 600, 600.0]], dtype=torch.float16)
    assert box_ops.area(box).item() == 360_000  # beyond float16
    assert box_ops.iou(box, box).item() == 1


class Roundtrip(torch.nn.Module):
    def forward(self, boxes, anchors):
        decoded = box_ops.clip(box_ops.decode(box_ops.encode(boxes, anchors), anchors), (40, 60))
        return box_ops.iou(decoded, anchors) * box_ops.area(anchors)


def test_symbolic_tracing_records_each_function():
    traced = torch.fx.symbolic_trace(Roundtrip())
    targets = {node.target for node in traced.graph.nodes}
    assert {box_ops.encode, box_ops.decode, box_ops.clip, box_ops.iou, box_ops.area} <= targets
    boxes, anchors = draw(7, 10), draw(7, 11)
    assert torch.equal(traced(boxes, anchors), Roundtrip()(boxes, anchors))


def test_compiles_to_one_graph():
    compiled = torch.compile(Roundtrip(), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (7, 9):
        boxes, anchors = draw(n, 10), draw(n, 11)
        torch.testing.assert_close(compiled(boxes, anchors), Roundtrip()(boxes, anchors))


def test_any_default_device():
    boxes, anchors = draw(7, 10), draw(7, 11)
    expected = Roundtrip()(boxes, anchors)
    with torch.device("meta"):
        assert torch.equal(Roundtrip()(boxes, anchors), expected)


SIGNED = [torch.int16, torch.int32, torch.int64]
INTEGERS = [torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64, *SIGNED]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, *SIGNED])
def test_integer_boxes_have_torchvisions_areas_and_ious(dtype):
    boxes, others = draw(7, 6).abs().to(dtype), draw(5, 7).abs().to(dtype)
    boxes[0] = torch.tensor([0, 0, 100, 100])
    assert torch.equal(box_ops.area(boxes), torchvision.ops.box_area(boxes))
    assert box_ops.area(boxes).dtype == torchvision.ops.box_area(boxes).dtype
    assert box_ops.area(boxes)[0] == 10_000
    # torchvision subtracts before it widens: boxes of 8 bits that do not overlap wrap around.
    wide = (boxes, others) if dtype in SIGNED else (boxes.int(), others.int())
    assert torch.equal(box_ops.iou(boxes, others), torchvision.ops.box_iou(*wide))
    assert (box_ops.iou(boxes, others) == 0).any()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_boxes_give_the_results_of_float32_boxes(dtype):
    sides = torch.tensor([[0, 0, 20, 9]]), torch.tensor([[0, 0, 7, 30]])
    boxes, others = ((draw(7, 8)[:, [0, 1, 0, 1]].abs() + side).to(dtype) for side in sides)
    assert torch.equal(box_ops.area(boxes).float(), box_ops.area(boxes.float()))
    torch.testing.assert_close(box_ops.iou(boxes, others), box_ops.iou(boxes.float(), others.float()))
    deltas = box_ops.encode(boxes, others, WEIGHTS)
    assert torch.equal(deltas, box_ops.encode(boxes.float(), others.float(), WEIGHTS))
    assert torch.equal(box_ops.decode(deltas, others, WEIGHTS), box_ops.decode(deltas, others.float(), WEIGHTS))
    for size in ((40, 60), (4000, 6000), torch.tensor([40, 60]), torch.tensor([40, 60]).to(dtype)):
        clipped = box_ops.clip(boxes, size)
        assert clipped.dtype == dtype
        size = size.float() if isinstance(size, torch.Tensor) else size
        assert torch.equal(clipped.float(), box_ops.clip(boxes.float(), size))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("boxes", lambda bad, good: box_ops.encode(bad, good)),
        ("anchors", lambda bad, good: box_ops.encode(good, bad)),
        ("deltas", lambda bad, good: box_ops.decode(bad, good)),
        ("boxes", lambda bad, _: box_ops.clip(bad, (5, 5))),
        ("boxes", lambda bad, _: box_ops.area(bad)),
        ("others", lambda bad, good: box_ops.iou(good, bad)),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=rf"{name}: expected \[..., 4\], got \[2, 5\]"):
        call(torch.zeros(2, 5), torch.zeros(2, 4))


B, A = torch.zeros(2, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, r"boxes: expected a Tensor, got \[\[0, 0, 1, 1\]\]", lambda: box_ops.area([[0, 0, 1, 1]])),
        (TypeError, "boxes: expected a floating or an integer dtype, got torch.bool", lambda: box_ops.area(B.bool())),
        (TypeError, "boxes: expected a dtype of real numbers", lambda: box_ops.area(B.to(torch.complex64))),
        (TypeError, "boxes: expected a dense tensor", lambda: box_ops.area(B.to_sparse())),
        (
            ValueError,
            r"anchors: expected a shape that broadcasts .* \[2, 4\], got \[3, 4\]",
            lambda: box_ops.encode(B, A),
        ),
        (ValueError, "anchors: expected a shape that broadcasts with deltas", lambda: box_ops.decode(B, A)),
        (ValueError, "anchors: expected on cpu like deltas", lambda: box_ops.decode(B, B.to("meta"))),
        (ValueError, "weights: expected 4 numbers, got 3", lambda: box_ops.encode(B, B, (1, 1, 1))),
        (TypeError, "weights: expected a sequence of 4 numbers", lambda: box_ops.encode(B, B, 1.0)),
        (TypeError, "weights: expected a number, got '1'", lambda: box_ops.decode(B, B, (1, 1, 1, "1"))),
        (TypeError, "image_size: expected two ints, got 7", lambda: box_ops.clip(B, 7)),
        (TypeError, r"image_size: expected an int, got 1\.5", lambda: box_ops.clip(B, (1.5, 2))),
        (ValueError, "image_size: expected at least 0, got -1", lambda: box_ops.clip(B, (5, -1))),
        (ValueError, r"image_size: expected a shape that broadcasts", lambda: box_ops.clip(B, torch.zeros(3, 2))),
        (ValueError, r"boxes: expected \[..., N, 4\], got \[4\]", lambda: box_ops.iou(B[0], B)),
        (
            ValueError,
            "others: expected a shape that broadcasts",
            lambda: box_ops.iou(B.expand(2, 2, 4), B.expand(3, 2, 4)),
        ),
    ],
)
def test_other_bad_arguments_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
