"""soft_nms against a loop in float64, known results, and nms as its limit; wrong arguments."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask.kernels.nms import nms_padded
from fastmask.kernels.soft_nms import METHODS, forward, soft_nms
from tests.oracles.nms import draw_candidates
from tests.oracles.soft_nms import CROWD, TILES, check_soft_nms, degenerate

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# Lanes outside a tile hold boxes without area; the interpreter divides in NumPy, which warns of 0 / 0.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
both = pytest.mark.parametrize("method", METHODS)


def padded(n, seeds=(0,), device="cpu", **options):
    drawn = [draw_candidates(n, seed, **options) for seed in seeds]
    return tuple(torch.stack(tensors).to(device) for tensors in zip(*drawn, strict=True))


@both
@pytest.mark.parametrize("kind", ["random", "clustered", "stacked", "disjoint"])
@pytest.mark.parametrize("n", [1, 70, 300])
def test_matches_a_loop(device, method, kind, n):
    check_soft_nms(device, method=method, kind=kind, n=n, segments=2)


@both
@pytest.mark.parametrize("n", [200, 300])
def test_boxes_beyond_the_first_tile_and_window_take_part(device, method, n):
    """In a crowd every score falls, soon below those of boxes that were not looked at."""
    check_soft_nms(device, method=method, segments=2, **TILES | CROWD | {"n": n})


@pytest.mark.reference_only
@both
@pytest.mark.parametrize("kind", ["clustered", "stacked"])
def test_thousands_match_a_loop(device, method, kind):
    check_soft_nms(device, method=method, kind=kind, n=5000, spread=400.0, max_output=100, classes=torch.int64)


def test_known_results(device):
    """The boxes and results of mmcv's test, of its operator for CPUs."""
    boxes = torch.tensor([[[6.0, 3, 8, 7], [3, 6, 9, 11], [3, 7, 10, 12], [1, 4, 13, 7]]], device=device)
    scores = torch.tensor([[0.6, 0.9, 0.7, 0.2]], device=device)
    for method, expected in (
        ("linear", [0.9, 0.6, 0.29024392, 0.2]),
        ("gaussian", [0.9, 0.59630775, 0.35275510, 0.18650459]),
    ):
        indices, selected = soft_nms(boxes, scores, 0.3, 6, method=method, sigma=0.5, score_threshold=0.01)
        assert indices.tolist() == [[1, 0, 2, 3, -1, -1]]
        torch.testing.assert_close(selected.cpu(), torch.tensor([[*expected, 0, 0]]), rtol=1e-6, atol=0)


def test_by_hand(device):
    """IoU 1/2 with the first box, 1/4 with the first and 1/2 with the second."""
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 4], [0, 0, 8, 2]]], device=device)
    scores = torch.tensor([[0.75, 0.5, 0.25]], device=device)
    indices, selected = soft_nms(boxes, scores, 0.25, 3)
    assert indices.tolist() == [[0, 1, 2]]  # 1/4 is not above the threshold; then 1/4 * (1 - 1/2) = 1/8
    assert selected.tolist() == [[0.75, 0.25, 0.125]]
    indices, selected = soft_nms(boxes, scores, 0.2, 3, score_threshold=0.09375)
    assert selected.tolist() == [[0.75, 0.25, 0.09375]]  # 1/4 * (1 - 1/4) * (1 - 1/2), not below the threshold
    indices, selected = soft_nms(boxes, scores, 0.2, 3, score_threshold=0.09376)
    assert indices.tolist() == [[0, 1, -1]]
    assert selected.tolist() == [[0.75, 0.25, 0]]


@both
def test_boxes_that_do_not_overlap_keep_their_scores(device, method):
    boxes, scores = padded(70, device=device, kind="disjoint")
    indices, selected = soft_nms(boxes, scores, 0.0, 80, method=method, score_threshold=0.2)
    expected, count = nms_padded(boxes, scores, 0.5, 80, score_threshold=0.2)
    assert torch.equal(indices, expected)
    assert 20 < count < 70
    assert torch.equal(selected[0, :count], scores[0].sort(descending=True).values[:count])


def test_a_narrow_gaussian_is_nms(device):
    """As sigma falls, the decay tends to suppression by any overlap."""
    boxes, scores = padded(70, device=device)
    indices, _ = soft_nms(boxes, scores, 0.5, 70, method="gaussian", sigma=1e-300)
    expected, _ = nms_padded(boxes, scores, 0.0, 70, score_threshold=0.001)
    assert torch.equal(indices, expected)


@both
def test_order_of_ties(device, method):
    boxes, _ = padded(40, device=device, kind="disjoint")
    scores = torch.tensor([[0.5, 0.25, 0.5, 0.75]], device=device).repeat(1, 10)
    indices, _ = soft_nms(boxes, scores, 0.5, 40, method=method)
    assert torch.equal(indices, scores.sort(dim=1, descending=True, stable=True).indices)


def test_scores_that_do_not_take_part(device):
    boxes, _ = padded(6, device=device, kind="disjoint")
    scores = torch.tensor([[NAN, INF, -1.0, 0.0009, 0.001, -INF]], device=device)
    indices, selected = soft_nms(boxes, scores, 0.5, 4, score_threshold=0.001)
    assert indices.tolist() == [[1, 4, -1, -1]]  # the threshold counts as a float64: float32 has nothing between
    assert selected.tolist() == [[INF, scores[0, 4].item(), 0, 0]]
    indices, _ = soft_nms(boxes, scores, 0.5, 4, score_threshold=0.0)
    assert indices.tolist() == [[1, 4, 3, -1]]


@both
def test_an_infinite_score_is_dropped_with_its_overlap(device, method):
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 4, 4]]], device=device)
    scores = torch.full((1, 2), INF, device=device)
    indices, _ = soft_nms(boxes, scores, 0.5, 2, method=method)
    assert indices.tolist() == [[0, -1]] if method == "linear" else [[0, 1]]


@both
def test_degenerate_and_non_finite_boxes_change_no_score(device, method):
    check_soft_nms(device, method=method, boxes=degenerate(), max_output=40, score_threshold=0.0)


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device, method, dtype):
    check_soft_nms(device, method=method, dtype=dtype, exact=dtype in (torch.float32, torch.float64))


def test_boxes_and_scores_of_different_dtypes(device):
    boxes, scores = padded(70, device=device)
    exact = soft_nms(boxes.double(), scores.double(), 0.3, 20)
    for arguments in ((boxes.double(), scores), (boxes, scores.double())):
        indices, selected = soft_nms(*arguments, 0.3, 20)
        assert torch.equal(indices, exact[0])
        assert torch.equal(selected, exact[1].to(arguments[1].dtype))


@both
def test_classes_and_counts(device, method):
    check_soft_nms(device, method=method, classes=torch.int64, counts=[60, 0, -3], segments=3)
    check_soft_nms(device, method=method, classes=torch.bool, counts=[1000], segments=1)
    check_soft_nms(device, method=method, classes=torch.float32, counts=[290], **TILES | CROWD)


def test_classes_are_separate(device):
    """The result by class is the merged results of the classes."""
    boxes, scores = padded(80, device=device)
    classes = torch.arange(80, device=device)[None] % 2
    indices, selected = soft_nms(boxes, scores, 0.3, 100, classes=classes)
    parts = [soft_nms(boxes[:, k::2], scores[:, k::2], 0.3, 50) for k in range(2)]
    merged = torch.cat([part[1] for part in parts], 1)
    order = merged.sort(dim=1, descending=True).indices
    merged_indices = torch.cat([torch.where(part[0] >= 0, part[0] * 2 + k, -1) for k, part in enumerate(parts)], 1)
    assert torch.equal(selected, merged.gather(1, order))
    assert torch.equal(indices, merged_indices.gather(1, order))


def test_strided_inputs(device):
    boxes, scores = padded(80, (0, 1), device=device)
    classes = torch.arange(160, device=device).view(80, 2).T % 3
    counts = torch.tensor([70, 1, 60], device=device)[::2]
    expected = soft_nms(boxes, scores, 0.3, 20, classes=classes.contiguous(), counts=counts.contiguous())
    strided = boxes.mT.contiguous().mT, scores.T.contiguous().T
    actual = soft_nms(*strided, 0.3, 20, classes=classes, counts=counts)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("batch", "n", "max_output"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(device, batch, n, max_output):
    boxes, scores = torch.rand(batch, n, 4, device=device), torch.rand(batch, n, device=device)
    indices, selected = soft_nms(boxes, scores, 0.5, max_output)
    assert indices.shape == selected.shape == (batch, max_output)
    assert (indices == -1).all()
    assert (selected == 0).all()


@both
def test_bitwise_repeatable(device, method):
    boxes, scores = padded(150, (0, 1), device=device)
    first, second = (soft_nms(boxes, scores, 0.3, 40, method=method) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_segment_does_not_depend_on_the_others(device, monkeypatch):
    monkeypatch.setattr(forward, "MAX_TILE", 128)
    boxes, scores = padded(200, (0, 1, 2), device=device, spread=10.0)
    together = soft_nms(boxes, scores, 0.3, 40)
    for b in range(3):
        alone = soft_nms(boxes[b : b + 1], scores[b : b + 1], 0.3, 40)
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(together, alone, strict=True))


def test_opcheck(device):
    boxes, scores = padded(70, (0, 1), device=device)
    classes, counts = torch.arange(140, device=device).view(2, 70) % 3, torch.tensor([40, 70], device=device)
    for optional in ((None, None), (classes, counts)):
        for method in METHODS:
            arguments = boxes, scores, *optional, 0.3, 9, method, 0.5, 0.01
            torch.library.opcheck(torch.ops.fastmask.soft_nms.default, arguments)


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(soft_nms, fullgraph=True, dynamic=True)
    for n in (70, 61):
        boxes, scores = padded(n, device=device)
        for actual, expected in zip(compiled(boxes, scores, 0.3, 9), soft_nms(boxes, scores, 0.3, 9), strict=True):
            assert torch.equal(actual, expected)


def test_fake_tensors():
    with FakeTensorMode():
        indices, selected = soft_nms(torch.rand(2, 70, 4), torch.rand(2, 70, dtype=torch.float16), 0.5, 100)
    assert (indices.shape, indices.dtype, selected.shape, selected.dtype) == (
        (2, 100),
        torch.int64,
        (2, 100),
        torch.float16,
    )


def test_has_no_gradient(device):
    boxes, scores = (tensor.requires_grad_() for tensor in padded(9, device=device))
    assert not soft_nms(boxes, scores, 0.5, 3)[1].requires_grad


class Suppress(torch.nn.Module):
    def forward(self, boxes, scores):
        return soft_nms(boxes, scores.sigmoid(), 0.5, max_output=9)


def test_symbolic_tracing_records_the_public_function(device):
    traced = torch.fx.symbolic_trace(Suppress())
    assert soft_nms in {node.target for node in traced.graph.nodes}
    arguments = padded(30, device=device)
    assert all(torch.equal(a, b) for a, b in zip(traced(*arguments), Suppress()(*arguments), strict=True))


B2, S2 = torch.rand(2, 5, 4), torch.rand(2, 5)


@pytest.mark.parametrize(
    ("error", "named", "call"),
    [
        (ValueError, r"boxes: expected \[B, N, 4\], got \[5, 4\]", lambda: soft_nms(B2[0], S2, 0.5, 1)),
        (ValueError, r"scores: expected \[2, 5\] to match boxes", lambda: soft_nms(B2, S2[:, :4], 0.5, 1)),
        (TypeError, "boxes: expected a floating dtype", lambda: soft_nms(B2.long(), S2, 0.5, 1)),
        (TypeError, "scores: expected a floating dtype", lambda: soft_nms(B2, S2.long(), 0.5, 1)),
        (ValueError, "scores: expected on cpu like boxes, got meta", lambda: soft_nms(B2, S2.to("meta"), 0.5, 1)),
        (ValueError, r"classes: expected \[2, 5\]", lambda: soft_nms(B2, S2, 0.5, 1, classes=S2[0])),
        (ValueError, r"counts: expected \[2\]", lambda: soft_nms(B2, S2, 0.5, 1, counts=S2.long())),
        (TypeError, "counts: expected an integer", lambda: soft_nms(B2, S2, 0.5, 1, counts=S2[:, 0])),
        (ValueError, r"iou_threshold: expected in \[0, 1\], got 1.1", lambda: soft_nms(B2, S2, 1.1, 1)),
        (ValueError, "max_output: expected at least 0, got -1", lambda: soft_nms(B2, S2, 0.5, -1)),
        (ValueError, "max_output: expected fewer than 2.31 results", lambda: soft_nms(B2, S2, 0.5, 2**31 - 1)),
        (TypeError, r"max_output: expected an int, got 2\.5", lambda: soft_nms(B2, S2, 0.5, 2.5)),
        (ValueError, "method: expected .*, got 'hard'", lambda: soft_nms(B2, S2, 0.5, 1, method="hard")),
        (TypeError, "method: expected .*, got None", lambda: soft_nms(B2, S2, 0.5, 1, method=None)),
        (ValueError, "sigma: expected a positive", lambda: soft_nms(B2, S2, 0.5, 1, sigma=0)),
        (TypeError, "sigma: expected a number", lambda: soft_nms(B2, S2, 0.5, 1, sigma="1")),
        (
            ValueError,
            "score_threshold: .* at least 0, got -0.1",
            lambda: soft_nms(B2, S2, 0.5, 1, score_threshold=-0.1),
        ),
        (ValueError, "score_threshold: expected .*, got nan", lambda: soft_nms(B2, S2, 0.5, 1, score_threshold=NAN)),
        (ValueError, "score_threshold: expected finite", lambda: soft_nms(B2, S2, 0.5, 1, score_threshold=INF)),
        (TypeError, "score_threshold: expected a number", lambda: soft_nms(B2, S2, 0.5, 1, score_threshold=None)),
    ],
)
def test_bad_arguments_are_named(error, named, call):
    with pytest.raises(error, match=named):
        call()
