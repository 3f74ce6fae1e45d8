"""nms, batched_nms and nms_padded against torchvision and a greedy loop, by both algorithms of the accelerator."""

import pytest
import torch
import torchvision

from fastmask.kernels.nms import batched_nms, bit_matrix, forward, nms, nms_padded, rank
from fastmask.kernels.nms import reference as nms_reference
from tests.oracles.nms import assert_same_indices, draw_candidates, greedy_nms, greedy_nms_padded

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# Lanes outside a tile hold boxes without area; the interpreter divides in NumPy, which warns of 0 / 0.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(params=["scan", "bit_matrix", "sorted"])
def algorithm(request, monkeypatch):
    """Both algorithms of the accelerator, whatever the size of the output, in chunks of 128 boxes; with both sorts."""
    monkeypatch.setattr(forward, "MAX_SINGLE_LAUNCH_OUTPUT", 1 << 30 if request.param == "scan" else 0)
    monkeypatch.setattr(bit_matrix, "MAX_CHUNK_ROWS", 128)
    if request.param == "sorted":
        monkeypatch.setattr(rank, "MAX_RANKED", 0)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "threshold"), [(1, 0.5), (64, 0.5), (150, 0.0), (150, 0.4), (301, 0.7), (65, 1.0)])
def test_matches_torchvision(n, threshold, dtype, device):
    boxes, scores = (t.to(dtype) for t in draw_candidates(n, n))
    expected = torchvision.ops.nms(boxes, scores, threshold)
    assert torch.equal(nms(boxes.to(device), scores.to(device), threshold).cpu(), expected)
    assert torch.equal(greedy_nms(boxes, scores, threshold), expected)


@pytest.mark.reference_only
@pytest.mark.parametrize("kind", ["random", "clustered", "stacked", "disjoint"])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_thousands_match_torchvision(kind, threshold, device):
    boxes, scores = draw_candidates(3000, 0, spread=300.0, kind=kind)
    classes = torch.arange(3000) % 7 % 3
    expected_by_class = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores.argsort().float(), classes, threshold)
    boxes, scores, classes = boxes.to(device), scores.to(device), classes.to(device)
    expected = torchvision.ops.nms(boxes.cpu(), scores.cpu(), threshold)
    assert torch.equal(nms(boxes, scores, threshold).cpu(), expected)
    assert torch.equal(batched_nms(boxes, scores.argsort().float(), classes, threshold).cpu(), expected_by_class)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("shift", [1e-5, -1e-5])
@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.75])
def test_suppresses_strictly_above_the_threshold(threshold, shift, device):
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 100 * threshold]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    assert len(nms(boxes, scores, threshold)) == 2  # IoU is the threshold exactly
    assert len(nms(boxes, scores, threshold + shift)) == (2 if shift > 0 else 1)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6, 0.7, 0.9, 1 / 3])
def test_the_threshold_is_a_float64(threshold, device):
    """The IoU, rounded to float32, is compared with the threshold in float64; float32 would round it up or down."""
    boxes = torch.tensor([[0.0, 0, 30, 30], [0, 0, 30, 30 * threshold]])
    scores = torch.tensor([0.9, 0.8])
    expected = torchvision.ops.nms(boxes, scores, threshold)
    assert torch.equal(nms(boxes.to(device), scores.to(device), threshold).cpu(), expected)


@pytest.mark.reference_only
@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 0.7, 1.0, -0.1, -1e-60, 1e-60, 1e300, -1e300, INF, -INF])
def test_round_down_float32(value):
    below = torch.tensor(nms_reference.round_down_float32(value))
    assert below.item() <= value
    assert below.dtype == torch.float32
    assert value == INF or torch.nextafter(below, torch.tensor(INF)).item() > value


@pytest.mark.usefixtures("algorithm")
def test_half_precision_is_computed_in_float32(device):
    boxes = torch.tensor([[285.25, 185.625, 1194, 851.5], [285.25, 188.75, 1192, 851], [279.5, 197.75, 1189, 849]])
    scores = torch.tensor([0.6, 0.9, 0.8])
    for dtype in (torch.float16, torch.bfloat16):
        rounded, weights = boxes.to(dtype), scores.to(dtype)
        expected = torchvision.ops.nms(rounded.float(), weights.float(), 0.2)
        assert expected.tolist() == [1]  # areas overflow float16
        assert torch.equal(nms(rounded.to(device), weights.to(device), 0.2).cpu(), expected)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_layouts(dtype, device):
    boxes, scores = (t.to(dtype) for t in draw_candidates(150, 3))
    expected = greedy_nms(boxes, scores, 0.4)
    strided = torch.stack([boxes.T, boxes.T], 2).to(device)[..., 1].T
    twice = torch.stack([scores, scores], 1).to(device)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(nms(strided, twice, 0.4).cpu(), expected)
    assert 30 < len(expected) < 120


@pytest.mark.usefixtures("algorithm")
def test_ties_keep_their_order(device):
    boxes, scores = draw_candidates(150, 4)
    scores = (scores * 4).floor()
    expected = greedy_nms(boxes, scores, 0.4)
    assert torch.equal(nms(boxes.to(device), scores.to(device), 0.4).cpu(), expected)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_nan_infinities_zeros_and_ties(dtype, device):
    """NaN before infinity, in any representation; -0 and 0 are a tie; ties by index. No box touches another."""
    boxes, _ = draw_candidates(40, 0, kind="disjoint")
    scores = torch.tensor([0.0, -0.0, NAN, INF, -INF, -1e-30, 1e-30, -NAN, 1.0, -1.0]).repeat(4).to(dtype)
    expected = scores.sort(descending=True, stable=True).indices
    assert torch.equal(greedy_nms(boxes, scores, 0.5), expected)
    assert torch.equal(nms(boxes.to(device, dtype), scores.to(device), 0.5).cpu(), expected)


@pytest.mark.usefixtures("algorithm")
def test_strided_scores_and_counts(device):
    boxes, scores = (torch.stack(t) for t in zip(*(draw_candidates(100, seed) for seed in range(2)), strict=True))
    counts = torch.tensor([100, 7, 60, 7])
    strided = boxes.mT.contiguous().mT.to(device), scores.T.contiguous().T.to(device)
    actual = nms_padded(*strided, 0.4, 50, counts=counts.to(device)[::2], score_threshold=0.1)
    assert_same_indices(actual, greedy_nms_padded(boxes, scores, 0.4, 50, None, counts[::2], 0.1))


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("threshold", [0.3, 1 / 3, 0.5, 0.7, 0.9, 1.0, 1e-8, 1e-30, 1e-40])
def test_iou_within_a_few_units_in_the_last_place_of_the_threshold(threshold, device):
    """Pairs, each of its own class, with areas of every exponent of float32, subnormal ones included."""
    g = torch.Generator().manual_seed(0)
    exponent = torch.linspace(-148, 126, 200).int()
    larger = torch.ldexp(1 + torch.rand(200, generator=g, dtype=torch.float64), exponent).float()
    smaller = (larger.double() * threshold).float().view(torch.int32)
    smaller = (smaller + torch.randint(-4, 5, (200,), generator=g, dtype=torch.int32)).clamp(min=0).view(torch.float32)
    zero, one, classes = torch.zeros(200), torch.ones(200), torch.arange(200).repeat(2)
    boxes = torch.cat([torch.stack([zero, zero, one, height], 1) for height in (larger, smaller)])
    scores = torch.rand(400, generator=g)
    expected = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, classes, threshold)
    actual = batched_nms(boxes.to(device), scores.to(device), classes.to(device), threshold)
    assert torch.equal(actual.cpu(), expected)
    assert len(expected) > 210
    assert len(expected) < 390 or threshold == 1


@pytest.mark.usefixtures("algorithm")
def test_degenerate_and_non_finite_boxes_and_scores(device):
    boxes = torch.tensor(
        [
            *([[5.0, 5, 5, 5]] * 2),  # no area: IoU is NaN
            *([[NAN, 0, 9, 9]] * 2),
            *([[0, 0, INF, 9]] * 2),
            *([[-INF, -INF, INF, INF]] * 2),
            *([[9, 9, 3, 3]] * 2),  # inverted: a positive area, no intersection
            *([[9, 3, 3, 9]] * 2),  # half inverted: a negative area
            *([[0, 0, 9, 9]] * 2),
            *([[-3e38, -3e38, 3e38, 3e38]] * 2),
            [1, 1, 2, 2],
        ]
    )
    scores = torch.linspace(1, 0, len(boxes))
    scores[[3, 12, 16]] = torch.tensor([NAN, -INF, INF])
    expected = torchvision.ops.nms(boxes, scores, 0.5)
    assert 10 < len(expected) < len(boxes)
    assert torch.equal(greedy_nms(boxes, scores, 0.5), expected)
    assert torch.equal(nms(boxes.to(device), scores.to(device), 0.5).cpu(), expected)
    both = nms_padded(boxes.to(device)[None], scores.to(device)[None], 0.5, 17, score_threshold=-INF)
    assert_same_indices(both, greedy_nms_padded(boxes[None], scores[None], 0.5, 17, score_threshold=-INF))
    assert not {3, 12} & set(both[0][0].tolist())


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_extreme_thresholds_match_torchvision(threshold, device):
    boxes, scores = draw_candidates(20, 5)
    expected = torchvision.ops.nms(boxes, scores, threshold)
    assert torch.equal(nms(boxes.to(device), scores.to(device), threshold).cpu(), expected)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("kind", ["int64", "uint8", "float", "one"])
def test_boxes_of_different_classes_do_not_suppress_each_other(kind, device):
    boxes, scores = draw_candidates(150, 6)
    g = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 1 if kind == "one" else 4, (150,), generator=g)
    if kind == "int64":
        classes = (classes - 2) * (1 << 61)  # no offset of coordinates could separate these
    elif kind != "one":
        classes = classes.to(getattr(torch, kind))
    expected = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, classes, 0.4)
    actual = batched_nms(boxes.to(device), scores.to(device), classes.to(device), 0.4)
    assert torch.equal(actual.cpu(), expected)
    assert torch.equal(greedy_nms(boxes, scores, 0.4, classes), expected)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("max_output", [0, 1, 40, 150, 200])
def test_padded_matches_torchvision_in_each_segment(max_output, device):
    boxes, scores = (torch.stack(t) for t in zip(*(draw_candidates(150, seed) for seed in range(3)), strict=True))
    indices, count = nms_padded(boxes.to(device), scores.to(device), 0.4, max_output)
    assert indices.shape == (3, max_output)
    assert indices.device == count.device == boxes.to(device).device
    for b in range(3):
        expected = torchvision.ops.nms(boxes[b], scores[b], 0.4)[:max_output]
        assert count[b] == len(expected)
        assert torch.equal(indices[b, : len(expected)].cpu(), expected)
        assert (indices[b, len(expected) :] == -1).all()


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("score_threshold", [None, 0.3, -INF, INF])
@pytest.mark.parametrize("with_classes", [False, True])
def test_padded_counts_classes_and_score_threshold(with_classes, score_threshold, device):
    boxes, scores = (torch.stack(t) for t in zip(*(draw_candidates(150, seed) for seed in range(5)), strict=True))
    scores[:, ::9], scores[:, 1::9], scores[:, 2::9] = NAN, -INF, INF
    classes = torch.arange(5 * 150).view(5, 150) % 7 % 3 if with_classes else None
    counts = torch.tensor([150, 0, 131, -4, 1000], dtype=torch.int32)
    expected = greedy_nms_padded(boxes, scores, 0.4, 60, classes, counts, score_threshold)
    actual = nms_padded(
        boxes.to(device),
        scores.to(device),
        0.4,
        60,
        classes=None if classes is None else classes.to(device),
        counts=counts.to(device),
        score_threshold=score_threshold,
    )
    assert_same_indices(actual, expected)
    assert expected[1].max() == (0 if score_threshold == INF else 60)


@pytest.mark.usefixtures("algorithm")
def test_segments_that_finish_in_different_chunks(device):
    """The first segment fills its output in the first chunk, the second goes through all chunks."""
    disjoint, scores = draw_candidates(300, 7, kind="disjoint")
    stacked, _ = draw_candidates(300, 7, kind="stacked")
    boxes, scores = torch.stack([disjoint, stacked]), torch.stack([scores, scores])
    actual = nms_padded(boxes.to(device), scores.to(device), 0.5, 70)
    assert_same_indices(actual, greedy_nms_padded(boxes, scores, 0.5, 70))
    assert actual[1].tolist() == [70, 1]


@pytest.mark.reference_only
def test_long_segments_with_few_results(device):
    boxes, scores = (torch.stack(t) for t in zip(*(draw_candidates(2500, s, 300.0) for s in range(2)), strict=True))
    boxes[1] = draw_candidates(2500, 0, kind="stacked")[0]  # no prefix of this one fills its output
    classes = torch.arange(2500).expand(2, -1) % 5
    actual = nms_padded(boxes.to(device), scores.to(device), 0.5, 20, classes=classes.to(device))
    assert_same_indices(actual, greedy_nms_padded(boxes, scores, 0.5, 20, classes))
    assert actual[1].tolist() == [20, 5]


@pytest.mark.reference_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("min_crowd", [1, 1 << 40])  # the best box first, all sorted
@pytest.mark.parametrize("max_pairs", [0, 1 << 40])  # of blocks, of candidate pairs
@pytest.mark.parametrize(("block", "tile", "all_pairs"), [(1, 1, 1), (8, 11, 20), (64, 1000, 50)])
def test_reference_by_any_way(block, tile, all_pairs, max_pairs, min_crowd, dtype, monkeypatch):
    monkeypatch.setattr(nms_reference, "MIN_CROWD", min_crowd)
    monkeypatch.setattr(nms_reference, "BLOCK", block)
    monkeypatch.setattr(nms_reference, "TILE", tile)
    monkeypatch.setattr(nms_reference, "ALL_PAIRS", all_pairs)
    monkeypatch.setattr(nms_reference, "_max_pairs", lambda _: max_pairs)
    boxes, scores = (tensor.to(dtype) for tensor in draw_candidates(200, 8))
    boxes[50:90], scores[20:40], scores[60:63], boxes[7, 2] = boxes[49].clone(), scores[19].clone(), NAN, NAN
    classes = (torch.rand(200, generator=torch.Generator().manual_seed(1)) ** 3 * 9).long()
    assert torch.equal(nms(boxes, scores, 0.4), greedy_nms(boxes, scores, 0.4))
    assert torch.equal(batched_nms(boxes, scores, classes, 0.4), greedy_nms(boxes, scores, 0.4, classes))


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
def test_empty(shape, device):
    boxes, scores = torch.rand(*shape, 4, device=device), torch.rand(shape, device=device)
    classes, counts = scores.long(), torch.ones(shape[0], dtype=torch.int64, device=device)
    for more in ({}, {"classes": classes, "counts": counts, "score_threshold": 0.5}):
        indices, count = nms_padded(boxes, scores, 0.5, 7, **more)
        assert indices.tolist() == [[-1] * 7] * shape[0]
        assert count.tolist() == [0] * shape[0]
    assert nms(boxes.view(-1, 4), scores.view(-1), 0.5).shape == (0,)
    assert batched_nms(boxes.view(-1, 4), scores.view(-1), classes.view(-1), 0.5).dtype == torch.int64


@pytest.mark.usefixtures("algorithm")
def test_same_bits_every_time_and_inputs_untouched(device):
    boxes, scores = (t.to(device) for t in draw_candidates(200, 9))
    before = boxes.clone(), scores.clone()
    first, *others = (nms(boxes, scores, 0.4) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])


@pytest.mark.usefixtures("algorithm")
def test_has_no_gradient(device):
    boxes, scores = (t.to(device).requires_grad_() for t in draw_candidates(70, 10))
    assert torch.equal(nms(boxes, scores, 0.4), nms(boxes.detach(), scores.detach(), 0.4))
    assert not nms_padded(boxes[None], scores[None], 0.4, 9)[0].requires_grad


@pytest.mark.parametrize("shape", [(0,), (0, 4), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_batched_nms_of_no_elements_is_empty(shape, dtype, device):
    boxes = torch.empty(shape, dtype=dtype, device=device)
    scores = torch.empty(shape[0], device=device)
    arguments = boxes, scores, scores.long(), 0.5
    expected, actual = torchvision.ops.batched_nms(*arguments), batched_nms(*arguments)
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, torch.int64, expected.device)


@pytest.mark.usefixtures("algorithm")
def test_any_default_device(device):
    boxes, scores = (t.to(device) for t in draw_candidates(150, 13))
    classes, counts = torch.arange(150, device=device) % 3, torch.tensor([120], device=device)

    def everything():
        padded = nms_padded(boxes[None], scores[None], 0.4, 40, classes=classes[None], counts=counts)
        return nms(boxes, scores, 0.4), batched_nms(boxes, scores, classes, 0.4), *padded

    expected = everything()
    with torch.device("meta"):
        actual = everything()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
