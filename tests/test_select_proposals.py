"""select_proposals against torchvision's RPN, detectron2's steps and a float64 oracle; registration."""

from unittest.mock import patch

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork

from fastmask import box_ops, select_proposals
from fastmask.kernels._runtime import INTERPRETED
from tests.oracles.decode import assert_selected
from tests.oracles.select_proposals import (
    DETECTRON2,
    IMAGE,
    OPTIONS,
    SIGMOID,
    check_proposals,
    degenerate,
    draw_predictions,
    proposals_oracle,
)

NAN, INF = float("nan"), float("inf")
FLAVOURS = {"levels": OPTIONS, "torchvision": SIGMOID, "detectron2": DETECTRON2}
flavours = pytest.mark.parametrize("options", FLAVOURS.values(), ids=FLAVOURS)


def on(device, inputs):
    *lists, image_sizes = inputs
    return *([x.to(device) for x in tensors] for tensors in lists), image_sizes.to(device)


def large(seed=0, batch=2):
    """Four levels, the largest of 3000 anchors, and options in proportion."""
    inputs = draw_predictions((3000, 800, 190, 48), batch, seed, image=(240, 300))
    return inputs, {"pre_nms_top_k": 200, "post_nms_top_k": 150}


def filter_by_torchvision(inputs, options):
    """`RegionProposalNetwork.filter_proposals` of boxes that its coder decodes."""
    logits, deltas, anchors, image_sizes = inputs
    top = {"training": 0, "testing": options["pre_nms_top_k"]}
    post = {"training": 0, "testing": options["post_nms_top_k"]}
    rpn = RegionProposalNetwork(
        AnchorGenerator(), None, 0.7, 0.3, 256, 0.5, top, post, options["iou_threshold"], options["score_threshold"]
    ).eval()
    rpn.min_size = options["min_size"]
    batch = len(image_sizes)
    decoded = rpn.box_coder.decode(torch.cat(deltas, 1).flatten(0, 1), [torch.cat(anchors)] * batch)
    sizes = [tuple(size) for size in image_sizes.tolist()]
    exact_nms = torchvision.ops.boxes._batched_nms_vanilla
    with patch.object(torchvision.ops.boxes, "_batched_nms_coordinate_trick", exact_nms):
        per_level = [logit.shape[1] for logit in logits]
        return rpn.filter_proposals(decoded.view(batch, -1, 4), torch.cat(logits, 1), sizes, per_level)


@pytest.mark.reference_only
@pytest.mark.parametrize("seed", range(3))
def test_equals_torchvision_to_the_bit(seed):
    inputs, options = large(seed)
    options = SIGMOID | options
    boxes, scores, counts = select_proposals(*inputs, **options)
    expected = filter_by_torchvision(inputs, options)
    assert counts.tolist() == [len(box) for box in expected[0]]
    for b, count in enumerate(counts.tolist()):
        assert torch.equal(boxes[b, :count], expected[0][b])
        assert torch.equal(scores[b, :count], expected[1][b])
        assert not boxes[b, count:].any()
        assert not scores[b, count:].any()


def filter_as_detectron2(inputs, options):
    """The steps of detectron2's `find_top_rpn_proposals` in torchvision's functions."""
    logits, deltas, anchors, image_sizes = inputs
    coder = torchvision.models.detection._utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    results = []
    for b, size in enumerate(image_sizes.tolist()):
        boxes, scores, levels = [], [], []
        for level, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
            score, index = logit[b].topk(min(options["pre_nms_top_k"], logit.shape[1]))
            boxes.append(coder.decode(delta[b], [anchor])[:, 0][index])
            scores.append(score)
            levels.append(torch.full_like(index, level))
        boxes, scores, levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        finite = boxes.isfinite().all(1) & scores.isfinite()
        boxes = torchvision.ops.clip_boxes_to_image(boxes, size)
        keep = finite & ((boxes[:, 2:] - boxes[:, :2]) > options["min_size"]).all(1)
        boxes, scores, levels = boxes[keep], scores[keep], levels[keep]
        kept = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, levels, options["iou_threshold"])
        kept = kept[: options["post_nms_top_k"]]
        results.append((boxes[kept], scores[kept]))
    return results


@pytest.mark.reference_only
@pytest.mark.parametrize("seed", range(3))
def test_equals_detectron2_to_the_bit(seed):
    inputs, options = large(seed)
    inputs[0][0][0, :3] = torch.tensor([NAN, INF, -INF])
    inputs[1][1][0, :20, 0] = INF
    options = DETECTRON2 | options
    boxes, scores, counts = select_proposals(*inputs, **options)
    for b, (expected_boxes, expected_scores) in enumerate(filter_as_detectron2(inputs, options)):
        assert counts[b] == len(expected_boxes)
        assert torch.equal(boxes[b, : counts[b]], expected_boxes)
        assert torch.equal(scores[b, : counts[b]], expected_scores)


@pytest.mark.reference_only
@pytest.mark.parametrize("seed", range(3))
def test_equals_nms_of_each_level_with_a_quota_of_its_own(seed):
    """The levels one by one, each with at most `post_nms_top_k`, then the best of all."""
    (logits, deltas, anchors, image_sizes), options = large(seed, batch=1)
    options = OPTIONS | options
    boxes, scores = [], []
    for logit, delta, anchor in zip(logits, deltas, anchors, strict=True):
        score, index = logit[0].topk(min(options["pre_nms_top_k"], logit.shape[1]))
        box = box_ops.clip(box_ops.decode(delta[0, index], anchor[index]), image_sizes[0])
        large_enough = (box[:, 2:] - box[:, :2]).amin(1) >= options["min_size"]
        box, score = box[large_enough], score[large_enough]
        kept = torchvision.ops.nms(box, score, options["iou_threshold"])[: options["post_nms_top_k"]]
        boxes.append(box[kept])
        scores.append(score[kept])
    best, order = torch.cat(scores).topk(min(options["post_nms_top_k"], sum(map(len, scores))))
    actual_boxes, actual_scores, counts = select_proposals(logits, deltas, anchors, image_sizes, **options)
    assert counts[0] == len(best)
    assert torch.equal(actual_scores[0, : len(best)], best)
    assert torch.equal(actual_boxes[0, : len(best)], torch.cat(boxes)[order])


@flavours
@pytest.mark.parametrize("seed", range(2))
def test_matches_the_oracle(device, options, seed):
    if INTERPRETED:
        check_proposals(device, batch=2, seed=seed, **options)
        return
    inputs, sizes = large(seed)
    options = options | sizes
    assert_selected(select_proposals(*on(device, inputs), **options), proposals_oracle(*inputs, **options), 300)


@flavours
def test_degenerate_inputs(device, options):
    inputs = degenerate()
    boxes, scores, counts = select_proposals(*on(device, inputs), **options)
    assert boxes.isfinite().all()
    assert not scores.isnan().any()
    limit = torch.tensor(IMAGE).flip(0).repeat(2).to(device)
    assert ((boxes >= 0) & (boxes <= limit)).all()
    assert_selected((boxes, scores, counts), proposals_oracle(*inputs, **options), max(IMAGE))


def test_a_nan_side_is_dropped_without_a_minimum(device):
    for options in (OPTIONS | {"min_size": None}, OPTIONS | {"min_size": -1.0}):
        boxes, _, _ = select_proposals(*on(device, degenerate()), **options)
        assert not boxes.isnan().any()


@pytest.mark.parametrize(("inclusive", "expected"), [(True, 1), (False, 0)])
def test_a_side_of_exactly_the_minimum(device, inclusive, expected):
    anchors = [torch.tensor([[8.0, 8, 10, 30]], device=device)]
    inputs = [torch.zeros(1, 1, device=device)], [torch.zeros(1, 1, 4, device=device)], anchors
    sizes = torch.tensor([[40, 40]], device=device)
    options = OPTIONS | {"min_size": 2.0, "min_size_inclusive": inclusive}
    assert select_proposals(*inputs, sizes, **options)[2].tolist() == [expected]


def test_a_score_of_exactly_the_threshold_is_kept(device):
    inputs = on(device, draw_predictions((20,)))
    options = OPTIONS | {"iou_threshold": 1.0, "min_size": None}
    _, scores, _ = select_proposals(*inputs, **options)
    threshold = scores[0, 5].item()
    _, _, counts = select_proposals(*inputs, **options, score_threshold=threshold)
    assert counts.tolist() == [6]


@pytest.mark.parametrize(
    ("sizes", "batch", "options"),
    [((0, 0), 2, {}), ((9, 4), 0, {}), ((9,), 1, {"pre_nms_top_k": 0}), ((9,), 2, {"post_nms_top_k": 0})],
)
def test_empty(device, sizes, batch, options):
    options = OPTIONS | options
    boxes, scores, counts = select_proposals(*on(device, draw_predictions(sizes, batch)), **options)
    size = options["post_nms_top_k"]
    assert (boxes.shape, scores.shape, counts.shape) == ((batch, size, 4), (batch, size), (batch,))
    assert not boxes.any()
    assert not scores.any()
    assert not counts.any()


def test_non_contiguous(device):
    inputs = on(device, draw_predictions((40, 12), 2))
    strided = [[torch.stack([x, x], -1)[..., 0] for x in tensors] for tensors in inputs[:3]]
    expected = select_proposals(*inputs, **OPTIONS)
    actual = select_proposals(*strided, torch.stack([inputs[3]] * 2, -1)[..., 0], **OPTIONS)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
def test_dtypes_of_image_sizes(device, dtype):
    *lists, image_sizes = on(device, draw_predictions((40, 12), 2))
    expected = select_proposals(*lists, image_sizes, **OPTIONS)
    actual = select_proposals(*lists, image_sizes.to(dtype), **OPTIONS)
    assert all(torch.equal(a, e) and a.dtype == e.dtype for a, e in zip(actual, expected, strict=True))


@flavours
def test_bitwise_repeatable(device, options):
    inputs = on(device, draw_predictions((40, 12), 2))
    first, second = (select_proposals(*inputs, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing(device):
    inputs = on(device, draw_predictions((40, 12)))
    outside = select_proposals(*inputs, **SIGMOID)
    with torch.autocast(device, torch.bfloat16):
        inside = select_proposals(*inputs, **SIGMOID)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_has_no_gradient(device):
    logits, deltas, anchors, image_sizes = on(device, draw_predictions((20, 5)))
    logits, deltas = [x.requires_grad_() for x in logits], [x.requires_grad_() for x in deltas]
    assert not any(x.requires_grad for x in select_proposals(logits, deltas, anchors, image_sizes, **OPTIONS))


@flavours
def test_opcheck(device, options):
    inputs = on(device, draw_predictions((20, 5)))
    spec = (
        options["pre_nms_top_k"],
        options["post_nms_top_k"],
        options["iou_threshold"],
        options.get("score_activation", "none"),
        options.get("score_threshold"),
        options["min_size"],
        options.get("min_size_inclusive", True),
        options.get("drop_non_finite", False),
        [1.0, 1.0, 1.0, 1.0],
    )
    torch.library.opcheck(torch.ops.fastmask.select_proposals.default, (*inputs, *spec))


@flavours
def test_compiles_without_graph_breaks(device, options):
    compiled = torch.compile(lambda *inputs: select_proposals(*inputs, **options), fullgraph=True, backend="aot_eager")
    for sizes in ((20, 5), (23, 6)):
        inputs = on(device, draw_predictions(sizes))
        expected = select_proposals(*inputs, **options)
        assert all(torch.equal(a, e) for a, e in zip(compiled(*inputs), expected, strict=True))


def test_fake_tensors():
    with FakeTensorMode():
        logits, deltas = [torch.rand(2, 50), torch.rand(2, 9)], [torch.rand(2, 50, 4), torch.rand(2, 9, 4)]
        anchors = [torch.rand(50, 4), torch.rand(9, 4)]
        boxes, scores, counts = select_proposals(logits, deltas, anchors, torch.ones(2, 2), **OPTIONS)
    assert (boxes.shape, scores.shape, counts.shape) == ((2, 25, 4), (2, 25), (2,))
    assert (boxes.dtype, scores.dtype, counts.dtype) == (torch.float32, torch.float32, torch.int64)


def test_any_default_device(device):
    inputs = on(device, draw_predictions((20, 5)))
    expected = select_proposals(*inputs, **SIGMOID)
    with torch.device("meta"):
        actual = select_proposals(*inputs, **SIGMOID)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


class Select(torch.nn.Module):
    def forward(self, logit, delta, anchor, image_sizes):
        return select_proposals([logit], [delta], [anchor], image_sizes, **OPTIONS)


def test_symbolic_tracing_records_the_public_function(device):
    traced = torch.fx.symbolic_trace(Select())
    assert select_proposals in {node.target for node in traced.graph.nodes}
    lists = on(device, draw_predictions((20,)))
    inputs = *(tensors[0] for tensors in lists[:3]), lists[3]
    assert all(torch.equal(a, e) for a, e in zip(traced(*inputs), Select()(*inputs), strict=True))


L, D = [torch.rand(2, 9), torch.rand(2, 3)], [torch.rand(2, 9, 4), torch.rand(2, 3, 4)]
A, S = [torch.rand(9, 4), torch.rand(3, 4)], torch.ones(2, 2)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "logits: expected a sequence of tensors, got a Tensor", (L[0], D, A, S), {}),
        (ValueError, r"logits: expected at least one level, got \[\]", ([], [], [], S), {}),
        (ValueError, "deltas: expected 2 levels to match logits, got 1", (L, D[:1], A, S), {}),
        (ValueError, "anchors: expected 2 levels to match logits, got 1", (L, D, A[:1], S), {}),
        (ValueError, r"logits: expected \[2, A\], got \[1, 3\]", ([L[0], L[1][:1]], D, A, S), {}),
        (ValueError, r"logits: expected \[B, A\], got \[\]", ([torch.tensor(0.0)], D[:1], A[:1], S), {}),
        (ValueError, r"deltas: expected \[2, 9, 4\] .*, got \[2, 9, 5\]", (L, [torch.rand(2, 9, 5), D[1]], A, S), {}),
        (ValueError, r"anchors: expected \[3, 4\] .*, got \[2, 4\]", (L, D, [A[0], A[1][:2]], S), {}),
        (TypeError, "logits: expected a floating dtype, got torch.int64", ([x.long() for x in L], D, A, S), {}),
        (TypeError, "deltas: expected torch.float32 in all levels", (L, [D[0], D[1].double()], A, S), {}),
        (ValueError, "anchors: expected on cpu like logits, got meta", (L, D, [x.to("meta") for x in A], S), {}),
        (ValueError, r"image_sizes: expected \[2, 2\], got \[2\]", (L, D, A, S[0]), {}),
        (TypeError, "image_sizes: expected a Tensor, got", (L, D, A, [(4, 5), (4, 5)]), {}),
        (ValueError, "image_sizes: expected on cpu like logits, got meta", (L, D, A, S.to("meta")), {}),
        (ValueError, "pre_nms_top_k: expected at least 0, got -1", (L, D, A, S), {"pre_nms_top_k": -1}),
        (TypeError, "post_nms_top_k: expected an int", (L, D, A, S), {"post_nms_top_k": 2.5}),
        (ValueError, "post_nms_top_k: expected fewer than 2.31", (L, D, A, S), {"post_nms_top_k": 2**30}),
        (ValueError, r"iou_threshold: expected in \[0, 1\], got 2.0", (L, D, A, S), {"iou_threshold": 2.0}),
        (TypeError, "min_size: expected a number, got '1'", (L, D, A, S), {"min_size": "1"}),
        (ValueError, "min_size: expected a number, got nan", (L, D, A, S), {"min_size": NAN}),
        (TypeError, "min_size_inclusive: expected a bool", (L, D, A, S), {"min_size_inclusive": 2}),
        (TypeError, "drop_non_finite: expected a bool", (L, D, A, S), {"drop_non_finite": None}),
        (ValueError, 'score_activation: expected "none" or "sigmoid"', (L, D, A, S), {"score_activation": "softmax"}),
        (TypeError, "score_threshold: expected a number", (L, D, A, S), {"score_threshold": "0"}),
        (ValueError, "weights: expected 4 finite numbers", (L, D, A, S), {"weights": (1, 1, 1)}),
        (ValueError, "weights: expected 4 finite numbers", (L, D, A, S), {"weights": (1, 1, 0, 1)}),
    ],
)
def test_wrong_arguments(error, message, arguments, options):
    with pytest.raises(error, match=message):
        select_proposals(*arguments, **OPTIONS | options)
