"""select_detections against torchvision's box head, detectron2's steps and a float64 oracle; registration."""

from unittest.mock import patch

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import RoIHeads

from fastmask import select_detections
from fastmask.kernels._runtime import INTERPRETED
from tests.oracles.decode import assert_selected
from tests.oracles.select_detections import (
    DETECTRON2,
    IMAGE,
    OPTIONS,
    TORCHVISION,
    check_detections,
    degenerate,
    detections_oracle,
    draw_predictions,
)

NAN, INF = float("nan"), float("inf")
FLAVOURS = {"plain": OPTIONS, "torchvision": TORCHVISION, "detectron2": DETECTRON2}
flavours = pytest.mark.parametrize("options", FLAVOURS.values(), ids=FLAVOURS)


def on(device, inputs):
    return tuple(tensor.to(device) for tensor in inputs)


def large(seed=0, boxes=None):
    """Two images of 200 proposals and 20 classes, and options in proportion."""
    inputs = draw_predictions(200, 20, 2, seed, boxes, image=(240, 300))
    return inputs, {"score_threshold": 0.07, "max_detections": 100}


def exact_nms():
    """torchvision's NMS by class without offsets to the coordinates."""
    exact = torchvision.ops.boxes._batched_nms_vanilla
    return patch.object(torchvision.ops.boxes, "_batched_nms_coordinate_trick", exact)


@pytest.mark.reference_only
@pytest.mark.parametrize("seed", range(3))
def test_equals_torchvision_to_the_bit(seed):
    inputs, options = large(seed, boxes=21)
    class_logits, deltas, proposals, counts, image_sizes = inputs
    options = TORCHVISION | options
    heads = RoIHeads(
        *(None, None, None, 0.5, 0.5, 512, 0.25, None),
        *(options["score_threshold"], options["iou_threshold"], options["max_detections"]),
    )
    valid = torch.arange(200) < counts[:, None]
    with exact_nms():
        expected = heads.postprocess_detections(
            class_logits[valid.flatten()],
            deltas.flatten(1)[valid.flatten()],
            [boxes[:count] for boxes, count in zip(proposals, counts.tolist(), strict=True)],
            [tuple(size) for size in image_sizes.tolist()],
        )
    boxes, scores, labels, found = select_detections(*inputs, **options)
    assert found.tolist() == [len(box) for box in expected[0]]
    for b, count in enumerate(found.tolist()):
        assert torch.equal(boxes[b, :count], expected[0][b])
        assert torch.equal(scores[b, :count], expected[1][b])
        assert torch.equal(labels[b, :count], expected[2][b])
        assert not boxes[b, count:].any()
        assert not scores[b, count:].any()
        assert not labels[b, count:].any()


def infer_as_detectron2(inputs, options):
    """The steps of detectron2's `fast_rcnn_inference` in torchvision's functions."""
    class_logits, deltas, proposals, counts, image_sizes = inputs
    n = proposals.shape[1]
    results = []
    for b, size in enumerate(image_sizes.tolist()):
        rows = slice(b * n, b * n + int(counts[b]))
        boxes = BoxCoder((10.0, 10.0, 5.0, 5.0)).decode(deltas[rows].flatten(1), [proposals[b, : counts[b]]])
        scores = class_logits[rows].softmax(1)
        finite = boxes.isfinite().flatten(1).all(1) & scores.isfinite().all(1)
        boxes, scores = torchvision.ops.clip_boxes_to_image(boxes[finite], size), scores[finite, :-1]
        row, column = (scores > options["score_threshold"]).nonzero(as_tuple=True)
        boxes = boxes[row, column if boxes.shape[1] > 1 else 0]
        scores = scores[row, column]
        kept = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, column, options["iou_threshold"])
        kept = kept[: options["max_detections"]]
        results.append((boxes[kept], scores[kept], column[kept]))
    return results


@pytest.mark.reference_only
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("agnostic", [False, True])
def test_equals_detectron2_to_the_bit(seed, agnostic):
    inputs, options = large(seed, boxes=1 if agnostic else None)
    inputs[0][3, 2], inputs[0][4, 0] = NAN, INF
    inputs[1][5, -1, 0], inputs[1][6, 0, 2], inputs[1][7, 0, 1] = NAN, INF, -INF
    options = DETECTRON2 | options
    arguments = inputs[0], inputs[1][:, 0] if agnostic else inputs[1], *inputs[2:]
    boxes, scores, labels, counts = select_detections(*arguments, **options)
    for b, (expected_boxes, expected_scores, expected_labels) in enumerate(infer_as_detectron2(inputs, options)):
        count = int(counts[b])
        assert count == len(expected_boxes)
        assert torch.equal(boxes[b, :count], expected_boxes)
        assert torch.equal(scores[b, :count], expected_scores)
        assert torch.equal(labels[b, :count], expected_labels)


@flavours
@pytest.mark.parametrize("seed", range(2))
def test_matches_the_oracle(device, options, seed):
    if INTERPRETED:
        check_detections(device, batch=2, seed=seed, **options)
        return
    inputs, sizes = large(seed)
    options = options | sizes
    expected = detections_oracle(*inputs, **options)
    assert_selected(select_detections(*on(device, inputs), **options), expected, 300)


@flavours
@pytest.mark.parametrize("boxes", [4, 5, 1])
def test_degenerate_inputs(device, options, boxes):
    inputs = degenerate(boxes)
    actual = select_detections(*on(device, inputs), **options)
    assert actual[0].isfinite().all()
    assert actual[1].isfinite().all()
    limit = torch.tensor(IMAGE).flip(0).repeat(2).to(device)
    assert ((actual[0] >= 0) & (actual[0] <= limit)).all()
    assert_selected(actual, detections_oracle(*inputs, **options), max(IMAGE))


def test_columns_are_labels(device):
    """The background gives no detection, and labels are columns, wherever it is."""
    proposals, deltas = torch.tensor([[[5.0, 5, 25, 25]]], device=device), torch.zeros(1, 4, device=device)
    rest = torch.tensor([1], device=device), torch.tensor([[40, 40]], device=device)
    logits = torch.tensor([[2.0, 2, 2]], device=device)
    for background, expected in (("first", [1, 2]), ("last", [0, 1])):
        _, scores, labels, counts = select_detections(
            logits, deltas, proposals, *rest, **OPTIONS | {"background": background}
        )
        assert counts.tolist() == [2]
        assert labels[0, :2].tolist() == expected  # ties by rising class
        assert torch.allclose(scores[0, :2], torch.tensor(1 / 3, device=device))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((dtype, value) for dtype in (torch.int64, torch.int32) for value in (-4, 0, 5, 99)),
        *((torch.uint8, value) for value in (0, 5, 99)),
    ],
)
def test_counts_are_clamped(device, value, dtype):
    class_logits, deltas, proposals, _, image_sizes = draw_predictions(9, 3)
    counts = torch.tensor([value], dtype=dtype)
    inputs = class_logits, deltas, proposals, counts, image_sizes
    expected = detections_oracle(*inputs, **OPTIONS)
    assert_selected(select_detections(*on(device, inputs), **OPTIONS), expected, max(IMAGE))


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.2, 0.5, 1.0, 5.0, INF, -INF])
def test_thresholds(device, threshold):
    inputs = draw_predictions(6, 3)
    options = OPTIONS | {"score_threshold": threshold}
    expected = detections_oracle(*inputs, **options)
    assert_selected(select_detections(*on(device, inputs), **options), expected, max(IMAGE))


@pytest.mark.parametrize(
    ("proposals", "classes", "batch", "options"),
    [(0, 3, 2, {}), (9, 0, 1, {}), (9, 3, 0, {}), (9, 3, 1, {"max_detections": 0})],
)
def test_empty(device, proposals, classes, batch, options):
    options = OPTIONS | options
    inputs = on(device, draw_predictions(proposals, classes, batch))
    boxes, scores, labels, counts = select_detections(*inputs, **options)
    size = options["max_detections"]
    assert (boxes.shape, scores.shape, labels.shape) == ((batch, size, 4), (batch, size), (batch, size))
    assert counts.tolist() == [0] * batch
    assert not any(tensor.any() for tensor in (boxes, scores, labels))


def test_non_contiguous(device):
    inputs = on(device, draw_predictions(17, 5, 2))
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    expected, actual = select_detections(*inputs, **OPTIONS), select_detections(*strided, **OPTIONS)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@flavours
def test_bitwise_repeatable(device, options):
    inputs = on(device, draw_predictions(17, 5, 2))
    first, second = (select_detections(*inputs, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing(device):
    inputs = on(device, draw_predictions(17, 5))
    outside = select_detections(*inputs, **OPTIONS)
    with torch.autocast(device, torch.bfloat16):
        inside = select_detections(*inputs, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_has_no_gradient(device):
    class_logits, deltas, *rest = on(device, draw_predictions(9, 3))
    results = select_detections(class_logits.requires_grad_(), deltas.requires_grad_(), *rest, **OPTIONS)
    assert not any(x.requires_grad for x in results)


@flavours
def test_opcheck(device, options):
    inputs = on(device, draw_predictions(9, 3))
    spec = (
        options["score_threshold"],
        options["iou_threshold"],
        options["max_detections"],
        options.get("score_activation", "softmax"),
        options.get("background", "first"),
        options.get("min_size", -INF),
        True,
        options.get("drop_non_finite", False),
        [10.0, 10.0, 5.0, 5.0],
    )
    torch.library.opcheck(torch.ops.fastmask.select_detections.default, (*inputs, *spec))


@flavours
def test_compiles_without_graph_breaks(device, options):
    compiled = torch.compile(lambda *inputs: select_detections(*inputs, **options), fullgraph=True, backend="aot_eager")
    for proposals in (9, 12):
        inputs = on(device, draw_predictions(proposals, 3))
        expected = select_detections(*inputs, **options)
        assert all(torch.equal(a, e) for a, e in zip(compiled(*inputs), expected, strict=True))


def test_fake_tensors():
    with FakeTensorMode():
        inputs = (
            torch.rand(18, 4),
            torch.rand(18, 3, 4),
            torch.rand(2, 9, 4),
            torch.ones(2, dtype=int),
            torch.ones(2, 2),
        )
        boxes, scores, labels, counts = select_detections(*inputs, **OPTIONS)
    assert (boxes.shape, scores.shape, labels.shape, counts.shape) == ((2, 20, 4), (2, 20), (2, 20), (2,))
    assert (boxes.dtype, scores.dtype) == (torch.float32, torch.float32)
    assert (labels.dtype, counts.dtype) == (torch.int64, torch.int64)


def test_any_default_device(device):
    inputs = on(device, draw_predictions(9, 3))
    expected = select_detections(*inputs, **DETECTRON2)
    with torch.device("meta"):
        actual = select_detections(*inputs, **DETECTRON2)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


class Select(torch.nn.Module):
    def forward(self, class_logits, deltas, proposals, counts, image_sizes):
        return select_detections(class_logits, deltas, proposals, counts, image_sizes, **OPTIONS)


def test_symbolic_tracing_records_the_public_function(device):
    traced = torch.fx.symbolic_trace(Select())
    assert select_detections in {node.target for node in traced.graph.nodes}
    inputs = on(device, draw_predictions(9, 3))
    assert all(torch.equal(a, e) for a, e in zip(traced(*inputs), Select()(*inputs), strict=True))


L, D, P = torch.rand(18, 4), torch.rand(18, 3, 4), torch.rand(2, 9, 4)
C, S = torch.tensor([9, 9]), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, r"proposals: expected \[B, N, 4\], got \[18, 4\]", (L, D, P.flatten(0, 1), C, S), {}),
        (ValueError, r"class_logits: expected \[18, 1 \+ K\] .*, got \[17, 4\]", (L[1:], D, P, C, S), {}),
        (ValueError, r"class_logits: expected \[18, 1 \+ K\] .*, got \[18, 0\]", (L[:, :0], D, P, C, S), {}),
        (ValueError, r"deltas: expected \[18, 4\] or .*, got \[18, 12\]", (L, D.flatten(1), P, C, S), {}),
        (ValueError, r"deltas: expected 1, 3 or 4 boxes .*, got \[18, 2, 4\]", (L, D[:, 1:], P, C, S), {}),
        (TypeError, "class_logits: expected a floating dtype, got torch.int64", (L.long(), D, P, C, S), {}),
        (TypeError, "deltas: expected a Tensor, got None", (L, None, P, C, S), {}),
        (ValueError, "deltas: expected on cpu like class_logits, got meta", (L, D.to("meta"), P, C, S), {}),
        (ValueError, r"counts: expected \[2\], got \[1\]", (L, D, P, C[:1], S), {}),
        (TypeError, "counts: expected an integer dtype, got torch.float32", (L, D, P, C.float(), S), {}),
        (TypeError, "counts: expected a signed integer", (L, D, P, C.to(torch.uint16), S), {}),
        (ValueError, r"image_sizes: expected \[2, 2\], got \[2\]", (L, D, P, C, S[0]), {}),
        (ValueError, "score_threshold: expected a number, got nan", (L, D, P, C, S), {"score_threshold": NAN}),
        (TypeError, "score_threshold: expected a number, got None", (L, D, P, C, S), {"score_threshold": None}),
        (ValueError, r"iou_threshold: expected in \[0, 1\], got 2.0", (L, D, P, C, S), {"iou_threshold": 2.0}),
        (ValueError, "max_detections: expected at least 0, got -1", (L, D, P, C, S), {"max_detections": -1}),
        (ValueError, "max_detections: expected fewer than 2.31", (L, D, P, C, S), {"max_detections": 2**30}),
        (ValueError, 'background: expected "first" or "last"', (L, D, P, C, S), {"background": "none"}),
        (ValueError, 'score_activation: expected "softmax" or', (L, D, P, C, S), {"score_activation": "none"}),
        (ValueError, "weights: expected 4 finite numbers", (L, D, P, C, S), {"weights": (1, 1, 1)}),
        (TypeError, "min_size: expected a number", (L, D, P, C, S), {"min_size": "1"}),
    ],
)
def test_wrong_arguments(error, message, arguments, options):
    with pytest.raises(error, match=message):
        select_detections(*arguments, **OPTIONS | options)
