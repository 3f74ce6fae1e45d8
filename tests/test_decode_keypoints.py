"""decode_keypoints against torchvision, detectron2's formulas and F.interpolate in float64; wrong arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from benchmarks.harness.workloads import objects
from fastmask.kernels.decode_keypoints import decode_keypoints
from fastmask.kernels.decode_keypoints.geometry import CONVENTIONS, EXCESS
from fastmask.kernels.decode_keypoints.reference import PIXELS_AT_A_TIME, _cubic_weights, _upper_bounds
from tests.oracles.decode_keypoints import (
    assert_keypoints,
    check_degenerate_boxes,
    check_non_finite_heatmaps,
    check_ties,
    draw_boxes,
    draw_heatmaps,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

both = pytest.mark.parametrize("convention", CONVENTIONS)
kinds = pytest.mark.parametrize("kind", ["noise", "peak"])


@both
@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_oracle(device, convention, kind, dtype):
    assert_keypoints(device, draw_heatmaps(2, 2, 7, kind=kind).to(dtype), draw_boxes(2), convention)


@pytest.mark.parametrize(("n", "points", "m", "low", "high"), [(1, 1, 1, 1, 9), (2, 2, 2, 1, 9), (2, 1, 16, 0.1, 60)])
def test_sizes(device, n, points, m, low, high):
    assert_keypoints(device, draw_heatmaps(n, points, m), draw_boxes(n, low, high))


def test_rectangular_heatmaps(device):
    assert_keypoints(device, draw_heatmaps(2, 2, 9)[:, :, :4], draw_boxes(2))


def assert_like_torchvision(device, heatmaps, boxes):
    """The same pixels, unless two values are equal up to rounding; returns how many are."""
    keypoints, scores = (t.cpu() for t in decode_keypoints(heatmaps.to(device), boxes.to(device)))
    expected, expected_scores = heatmaps_to_keypoints(heatmaps, boxes)
    same = (keypoints - expected).abs().amax(2) <= 1e-6 * boxes.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-5 * heatmaps.abs().max().item())
    return same.float().mean().item()


@kinds
def test_matches_torchvision(device, kind):
    assert assert_like_torchvision(device, draw_heatmaps(3, 2, 8, kind=kind), draw_boxes(3)) == 1


@pytest.mark.reference_only
@kinds
def test_matches_torchvision_at_full_size(kind):
    heatmaps, boxes = draw_heatmaps(24, 17, 56, kind=kind), objects(24, seed=3)
    assert assert_like_torchvision("cpu", heatmaps, boxes) > 0.99
    assert_keypoints("cpu", heatmaps[:6, :4], boxes[:6])


@both
def test_detectron2s_formulas(device, convention):
    """What detectron2's `heatmaps_to_keypoints` does for one RoI after the other."""
    heatmaps, boxes = draw_heatmaps(3, 2, 6), draw_boxes(3)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    keypoints, scores = (
        t.cpu() for t in decode_keypoints(heatmaps.to(device), boxes.to(device), convention=convention)
    )
    for n, (width, height) in enumerate(sides.ceil().long().tolist()):
        roi = F.interpolate(heatmaps[n, None], size=(height, width), mode="bicubic", align_corners=False)[0]
        logit, index = roi.flatten(1).max(1)
        score = 1 / (heatmaps[n] - logit[:, None, None]).exp().sum((1, 2))
        pixel = torch.stack([index % width, index // width], 1)
        torch.testing.assert_close(keypoints[n, :, :2], boxes[n, :2] + (pixel + 0.5) * (sides[n] / sides[n].ceil()))
        if convention == "detectron2":
            torch.testing.assert_close(keypoints[n, :, 2], logit)
            torch.testing.assert_close(scores[n], score)
        else:
            torch.testing.assert_close(scores[n], logit)


def test_by_hand(device):
    """A box of the heatmap's size keeps its pixels; one of twice the size interpolates at quarters of pixels."""
    heatmap = torch.zeros(1, 1, 4, 4, device=device)
    heatmap[0, 0, 1, 2] = 1
    keypoints, scores = decode_keypoints(heatmap, torch.tensor([[10.0, 20, 14, 24]], device=device))
    assert keypoints.tolist() == [[[12.5, 21.5, 1]]]
    assert scores.tolist() == [[1]]
    keypoints, scores = decode_keypoints(heatmap, torch.tensor([[10.0, 20, 18, 28]], device=device))
    assert keypoints.tolist() == [[[14.5, 22.5, 1]]]  # the first of four equal ones
    assert scores.item() == pytest.approx(((1.25 * 0.25 - 2.25) * 0.25**2 + 1) ** 2)


def test_ties(device):
    check_ties(device)


def test_non_finite_heatmaps(device):
    check_non_finite_heatmaps(device)


def test_degenerate_boxes(device):
    check_degenerate_boxes(device)


def test_constant_heatmaps(device):
    heatmaps, boxes = torch.full((2, 2, 5, 5), 3.0), draw_boxes(2, 2, 9)
    assert_keypoints(device, heatmaps, boxes)
    assert_keypoints(device, heatmaps * 0, boxes)


@pytest.mark.reference_only
def test_constant_heatmaps_of_many_persons():
    """No cell can be left out: whole heatmaps are resized."""
    heatmaps, boxes = torch.zeros(20, 3, 56, 56), objects(20)
    keypoints, scores = decode_keypoints(heatmaps, boxes)
    assert torch.equal(keypoints, heatmaps_to_keypoints(heatmaps, boxes)[0])
    assert not scores.any()


@pytest.mark.reference_only
def test_cells_are_bounded():
    """No pixel of a heatmap that is resized to ten times its size is above the bound of its cell, many are close."""
    heatmaps = draw_heatmaps(1, 30, 9)[0]
    bounds = _upper_bounds(F.pad(heatmaps[None], (2, 2, 2, 2), mode="replicate")[0])
    values = F.interpolate(heatmaps[None], size=(90, 90), mode="bicubic", align_corners=False)[0]
    cell = ((torch.arange(90) + 0.5) / 10 - 0.5).floor().long() + 1
    gap = bounds[:, cell][:, :, cell] - values
    assert gap.min() > -1e-5
    assert gap.min() < 0.05


@pytest.mark.reference_only
def test_the_excess_of_the_weights():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    weights = _cubic_weights(t)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(t))
    assert (weights[:, [0, 3]] <= 1e-15).all()
    assert (weights[:, 1:3] >= -1e-15).all()
    assert -weights[:, [0, 3]].sum(1).min().item() == pytest.approx(EXCESS)


@pytest.mark.reference_only
def test_many_rois_give_the_results_of_single_ones():
    n = 2 * PIXELS_AT_A_TIME // (4 * 20 * 20) + 3
    heatmaps, boxes = draw_heatmaps(n, 4, 20), draw_boxes(n)
    together = decode_keypoints(heatmaps, boxes)
    for k in (0, n // 2, n - 1):
        alone = decode_keypoints(heatmaps[k : k + 1], boxes[k : k + 1])
        assert all(torch.equal(a[k : k + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("n", [0, 2])
@both
def test_empty(device, n, convention):
    heatmaps, boxes = torch.empty(n, 17 * (n == 0) or 1, 4, 4, device=device).zero_(), torch.zeros(n, 4, device=device)
    keypoints, scores = decode_keypoints(heatmaps, boxes, convention=convention)
    assert keypoints.shape == (*heatmaps.shape[:2], 3)
    assert scores.shape == heatmaps.shape[:2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_box_dtypes(device, dtype):
    heatmaps, boxes = draw_heatmaps(2, 2, 6), draw_boxes(2).to(dtype)
    assert_keypoints(device, heatmaps, boxes)


def test_non_contiguous(device):
    heatmaps, boxes = draw_heatmaps(2, 3, 6).to(device), draw_boxes(2).to(device)
    expected = decode_keypoints(heatmaps, boxes)
    for strided in (heatmaps.to(memory_format=torch.channels_last), torch.cat([heatmaps, heatmaps], 3)[..., :6]):
        actual = decode_keypoints(strided, torch.stack([boxes, boxes], 2)[..., 0])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_bitwise_repeatable(device):
    heatmaps, boxes = draw_heatmaps(2, 2, 8).to(device), draw_boxes(2).to(device)
    first, second = (decode_keypoints(heatmaps, boxes) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing(device):
    heatmaps, boxes = draw_heatmaps(2, 2, 8).to(device), draw_boxes(2).to(device)
    expected = decode_keypoints(heatmaps, boxes)
    with torch.autocast(device, torch.bfloat16):
        actual = decode_keypoints(heatmaps, boxes)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@both
def test_opcheck(device, convention):
    heatmaps, boxes = draw_heatmaps(2, 2, 4).to(device), draw_boxes(2, 1, 9).to(device)
    torch.library.opcheck(torch.ops.fastmask.decode_keypoints.default, (heatmaps, boxes, convention))


@both
def test_compiles_without_graph_breaks(device, convention):
    compiled = torch.compile(decode_keypoints, fullgraph=True, dynamic=True)
    for n, m in ((2, 4), (3, 6)):
        arguments = draw_heatmaps(n, 2, m).to(device), draw_boxes(n, 1, 9).to(device)
        actual, expected = (f(*arguments, convention=convention) for f in (compiled, decode_keypoints))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_fake_tensors():
    with FakeTensorMode():
        keypoints, scores = decode_keypoints(torch.rand(5, 17, 56, 56, dtype=torch.float16), torch.rand(5, 4))
        assert (keypoints.shape, keypoints.dtype) == ((5, 17, 3), torch.float32)
        assert (scores.shape, scores.dtype) == ((5, 17), torch.float32)


def test_has_no_gradient(device):
    heatmaps, boxes = draw_heatmaps(1, 1, 4).to(device).requires_grad_(), draw_boxes(1, 1, 9).to(device)
    assert not any(t.requires_grad for t in decode_keypoints(heatmaps, boxes))


HEATMAPS, BOXES = draw_heatmaps(), draw_boxes()


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "heatmaps: expected a floating dtype", (HEATMAPS.long(), BOXES), {}),
        (ValueError, r"heatmaps: expected \[N, P, m, m\].*\[3, 8, 8\]", (HEATMAPS[0], BOXES), {}),
        (ValueError, r"heatmaps: expected \[N, P, m, m\].*\[2, 0, 8, 8\]", (HEATMAPS[:, :0], BOXES), {}),
        (ValueError, r"heatmaps: expected \[N, P, m, m\].*\[2, 3, 8, 0\]", (HEATMAPS[..., :0], BOXES), {}),
        (ValueError, "heatmaps: expected fewer", (torch.empty(2, 1, 2**15, 2**15, device="meta"), BOXES), {}),
        (ValueError, r"boxes: expected \[2, 4\].*\[1, 4\]", (HEATMAPS, BOXES[:1]), {}),
        (TypeError, "boxes: expected a floating dtype", (HEATMAPS, BOXES.long()), {}),
        (ValueError, "boxes: expected on cpu like heatmaps, got meta", (HEATMAPS, BOXES.to("meta")), {}),
        (ValueError, "convention: expected.*'coco'", (HEATMAPS, BOXES), {"convention": "coco"}),
    ],
)
def test_bad_arguments_are_named(error, message, arguments, options):
    with pytest.raises(error, match=message):
        decode_keypoints(*arguments, **options)
