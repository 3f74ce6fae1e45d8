"""match_boxes against torchvision's matcher, loops in float64 and hand-computed values; wrong arguments."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmask
from fastmask.kernels._runtime import INTERPRETED
from fastmask.kernels.match_boxes import match_boxes, reference
from tests.oracles.match_boxes import (
    NAN,
    THRESHOLDS,
    check_matched,
    draw_boxes,
    loop_oracle,
    padded,
)

BOXES = torch.tensor(
    [
        [0, 0, 10, 10],  # the first object itself
        [0, 0, 10, 20],  # IoU 0.5 with it
        [0, 0, 10, 25],  # 0.4
        [30, 0, 40, 10],  # overlaps no object
        [50, 50, 60, 58],  # 0.4 with the second object, whose best box it is
    ]
).float()
OBJECTS = torch.tensor([[0, 0, 10, 10], [50, 50, 70, 60]]).float()


@pytest.fixture(autouse=True, params=["all pairs"] if INTERPRETED else ["all pairs", "tiles"])
def algorithm(request, monkeypatch):
    """Each test is small enough to compare all pairs on the CPU; large calls are divided into tiles."""
    if request.param == "tiles":
        monkeypatch.setattr(reference, "FEW_PAIRS", 0)


def matched(device, objects, *thresholds, boxes=BOXES, **options):
    """Matches and labels of one image, as lists."""
    counts = torch.tensor([len(objects)], device=device)
    found = match_boxes(boxes.to(device), objects[None].to(device), counts, *thresholds, **options)
    return [tensor[0].tolist() for tensor in found]


def test_thresholds_are_inclusive(device):
    matches, labels = matched(device, OBJECTS, 0.5, 0.4)
    assert labels == [1, 1, -1, 0, -1]
    assert matches == [0, 0, 0, 0, 1]
    assert matched(device, OBJECTS, 0.51, 0.51)[1] == [1, 0, 0, 0, 0]


def test_thresholds_are_rounded_as_by_torch(device):
    """0.7 and 0.3 lie between two float32 values, as IoUs of 7/10 and 3/10 do."""
    boxes = torch.tensor([[0, 0, 1, 7], [0, 0, 1, 3], [0, 0, 1, 2.99]])
    assert matched(device, torch.tensor([[0.0, 0, 1, 10]]), 0.7, 0.3, boxes=boxes)[1] == [1, -1, 0]


def test_every_object_has_its_best_boxes(device):
    assert matched(device, OBJECTS, 0.7, 0.3, low_quality=True)[1] == [1, -1, -1, 0, 1]
    twice = torch.cat([BOXES, BOXES])
    assert matched(device, OBJECTS, 0.7, 0.3, boxes=twice, low_quality=True)[1] == [1, -1, -1, 0, 1] * 2


def test_an_object_that_overlaps_no_box_makes_none_positive(device):
    far = torch.tensor([[500.0, 500, 510, 510]])
    assert matched(device, far, 0.7, 0.3, low_quality=True) == [[0] * 5, [0] * 5]


def test_a_low_quality_match_keeps_the_best_object_of_the_box(device):
    """The only box that overlaps the second object overlaps the first one more, at an IoU below both thresholds."""
    objects = torch.tensor([[0.0, 0, 30, 10], [9, 0, 40, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [3, 0, 9, 10]])
    assert matched(device, objects, 0.7, 0.5, boxes=boxes, low_quality=True) == [[0, 0], [1, 0]]


def test_the_first_of_equal_objects_matches(device):
    objects = torch.tensor([[50.0, 0, 60, 10], [0, 0, 10, 10], [0, 0, 10, 10], [10, 0, 20, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]])
    assert matched(device, objects, 0.5, 0.5, boxes=boxes)[0] == [1, 1, 0]


def test_without_objects_every_box_is_negative(device):
    assert matched(device, torch.zeros(0, 4), 0.0, 0.0, low_quality=True) == [[0] * 5, [0] * 5]


def test_negatives_in_a_crowd_are_ignored(device):
    crowds = torch.tensor([[[33.0, 0, 100, 100], [0, 0, 10, 24]]], device=device)  # 0.7 of the fourth, all of the last
    assert matched(device, OBJECTS, 0.5, 0.5, crowds=crowds, crowd_overlap=0.7)[1] == [1, 1, -1, -1, -1]
    assert matched(device, OBJECTS, 0.5, 0.5, crowds=crowds, crowd_overlap=0.71)[1] == [1, 1, -1, 0, -1]
    assert matched(device, OBJECTS, 0.5, 0.5, crowds=crowds[:, :0])[1] == [1, 1, 0, 0, 0]
    one = torch.tensor([1], device=device)
    assert matched(device, OBJECTS, 0.5, 0.5, crowds=crowds.flip(1), crowd_counts=one)[1] == [1, 1, -1, 0, 0]


def test_values_beyond_the_counts_are_never_used(device):
    boxes = torch.stack([draw_boxes(40, 1), draw_boxes(40, 2)])
    gt_boxes, gt_counts = padded([draw_boxes(3, 5), draw_boxes(1, 6)], 6, fill=0.0)
    crowds, crowd_counts = padded([draw_boxes(1, 7), draw_boxes(2, 8)], 4, fill=0.0)
    counts = torch.tensor([30, 0])
    results = []
    for fill in (0.0, NAN, 3e38, [0.0, 0, 1e4, 1e4]):
        tensors = [boxes.clone(), gt_boxes.clone(), crowds.clone()]
        for tensor, sizes in zip(tensors, (counts, gt_counts, crowd_counts), strict=True):
            tensor[torch.arange(tensor.shape[1]) >= sizes[:, None]] = torch.as_tensor(fill)
        arguments = [tensor.to(device) for tensor in (tensors[0], tensors[1], gt_counts)]
        options = {"counts": counts, "crowds": tensors[2], "crowd_counts": crowd_counts}
        options = {name: tensor.to(device) for name, tensor in options.items()}
        results.append(match_boxes(*arguments, *THRESHOLDS, low_quality=True, **options))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    matches, labels = results[0]
    assert (labels[0, 30:] == -1).all()
    assert (labels[1] == -1).all()
    assert not matches[1].any()


def test_counts_are_clamped(device):
    boxes, gt_boxes = draw_boxes(30, 1)[None].to(device), draw_boxes(3, 5)[None].to(device)
    for dtype in (torch.int64, torch.int32, torch.int8):
        for gt_count, count, same in ((-5, 99, (0, 30)), (7, -1, (3, 0))):
            given, clamped = (
                match_boxes(
                    boxes,
                    gt_boxes,
                    torch.tensor([of_gt], dtype=dtype, device=device),
                    *THRESHOLDS,
                    counts=torch.tensor([of_boxes], dtype=dtype, device=device),
                )
                for of_gt, of_boxes in ((gt_count, count), same)
            )
            assert all(torch.equal(a, b) for a, b in zip(given, clamped, strict=True))


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("objects", [(1,), (17,), (70, 3)])
def test_matches_torchvision(device, low_quality, objects):
    check_matched(device, n=270, objects=objects, low_quality=low_quality, shared=False, spread=40)


def test_real_numbers_match_torchvision(device):
    """Without whole coordinates, and with boxes in no order."""
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(200, 2, generator=g) * 60
    boxes = torch.cat([corner, corner + torch.rand(200, 2, generator=g) * 30], 1)
    for thresholds in ((0.7, 0.3), (0.5, 0.5)):
        check_matched(device, boxes=boxes, objects=(20, 3), thresholds=thresholds)


@pytest.mark.reference_only
@pytest.mark.parametrize("seed", range(3))
def test_many_tiles_match_torchvision(seed):
    check_matched("cpu", n=20_000, objects=(60, 150), spread=500 + seed)


@pytest.mark.parametrize("low_quality", [False, True])
def test_loops_in_float64(device, low_quality):
    g = torch.Generator().manual_seed(1)
    corner = torch.rand(90, 2, generator=g, dtype=torch.float64) * 40
    boxes = torch.cat([corner, corner + torch.rand(90, 2, generator=g, dtype=torch.float64) * 20], 1)
    objects, crowds, boxes = boxes[:9] + 1.5, boxes[9:12] - 2.5, boxes[12:]
    found = matched(device, objects, 0.5, 0.25, boxes=boxes, low_quality=low_quality, crowds=crowds[None].to(device))
    expected = loop_oracle(boxes, objects, 0.5, 0.25, low_quality, crowds)
    assert found == [tensor.tolist() for tensor in expected]


def test_mixed_dtypes_are_promoted(device):
    boxes, objects = draw_boxes(50, 1), draw_boxes(4, 2)
    expected = matched(device, objects, *THRESHOLDS, boxes=boxes)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert matched(device, objects.to(dtype), *THRESHOLDS, boxes=boxes) == expected
        assert matched(device, objects, *THRESHOLDS, boxes=boxes.to(dtype)) == expected


@pytest.mark.parametrize(("boxes", "objects"), [((0, 4), (2, 3, 4)), ((5, 4), (0, 3, 4)), ((2, 0, 4), (2, 0, 4))])
def test_empty_inputs(device, boxes, objects):
    counts = torch.ones(objects[0], dtype=torch.int64, device=device)
    tensors = torch.rand(boxes, device=device), torch.rand(objects, device=device)
    matches, labels = match_boxes(*tensors, counts, *THRESHOLDS, low_quality=True)
    assert matches.shape == labels.shape == (objects[0], boxes[-2])


def test_memory_layouts(device):
    boxes, (gt_boxes, gt_counts) = draw_boxes(40, 1), padded([draw_boxes(3, 5), draw_boxes(2, 6)], 4)
    expected = match_boxes(boxes.to(device), gt_boxes.to(device), gt_counts.to(device), *THRESHOLDS, low_quality=True)
    strided = boxes.t().contiguous().t().to(device), gt_boxes.permute(2, 0, 1).contiguous().permute(1, 2, 0).to(device)
    counts = torch.stack([gt_counts, gt_counts], 1)[:, 0].to(device)
    actual = match_boxes(*strided, counts, *THRESHOLDS, low_quality=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_repeats_to_the_bit(device):
    boxes, gt_boxes = draw_boxes(300, 1).to(device), draw_boxes(20, 2)[None].to(device)
    counts = torch.tensor([20], device=device)
    first, second = (match_boxes(boxes, gt_boxes, counts, *THRESHOLDS, low_quality=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.reference_only
@pytest.mark.skipif(INTERPRETED, reason="measures the reference")
def test_memory_does_not_grow_with_pairs():
    """PyTorch's allocations: a matrix of IoUs would take 40 MB."""
    boxes, objects = draw_boxes(100_000, 1, 1000), draw_boxes(100, 2, 1000)[None]
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        match_boxes(boxes, objects, torch.tensor([100]), *THRESHOLDS, low_quality=True)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 10_000_000


def test_operator_is_registered_in_full(device):
    boxes, gt_boxes = draw_boxes(30, 1).to(device), draw_boxes(6, 2).view(2, 3, 4).to(device)
    counts = torch.tensor([2, 3], device=device)
    operator = torch.ops.fastmask.match_boxes.default
    torch.library.opcheck(operator, (boxes, gt_boxes, counts, None, None, None, 0.6, 0.3, True, 0.7))
    batch = boxes.expand(2, -1, -1)
    torch.library.opcheck(operator, (batch, gt_boxes, counts, counts, gt_boxes, counts, 0.6, 0.3, False, 0.7))


def test_compiles_to_one_graph(device):
    def match(boxes, gt_boxes, counts):
        return match_boxes(boxes * 2, gt_boxes * 2, counts, *THRESHOLDS, low_quality=True, crowds=gt_boxes)

    compiled = torch.compile(match, fullgraph=True, dynamic=True, backend="aot_eager")
    counts = torch.tensor([2, 3], device=device)
    for n in (30, 41):
        arguments = draw_boxes(n, 1).to(device), draw_boxes(6, 2).view(2, 3, 4).to(device), counts
        for actual, expected in zip(compiled(*arguments), match(*arguments), strict=True):
            assert torch.equal(actual, expected)


def test_runs_on_fake_tensors(device):
    with FakeTensorMode():
        boxes, gt_boxes = torch.rand(30, 4, device=device), torch.rand(2, 3, 4, device=device)
        matches, labels = match_boxes(boxes, gt_boxes, torch.ones(2, dtype=int, device=device), *THRESHOLDS)
    assert (matches.shape, matches.dtype) == ((2, 30), torch.int64)
    assert (labels.shape, labels.dtype) == ((2, 30), torch.int8)
    assert matches.device.type == labels.device.type == torch.device(device).type


class Match(torch.nn.Module):
    def forward(self, boxes, gt_boxes, counts):
        return match_boxes(boxes, gt_boxes, counts, 0.6, 0.3, low_quality=True)


def test_symbolic_tracing_records_the_public_function(device):
    traced = torch.fx.symbolic_trace(Match())
    assert fastmask.match_boxes in {node.target for node in traced.graph.nodes}
    arguments = draw_boxes(9, 1).to(device), draw_boxes(6, 2).view(2, 3, 4).to(device), COUNTS.to(device)
    for actual, expected in zip(traced(*arguments), Match()(*arguments), strict=True):
        assert torch.equal(actual, expected)


def test_results_have_no_gradient(device):
    boxes = draw_boxes(9, 1).to(device).requires_grad_()
    counts = torch.tensor([2], device=device)
    assert not any(result.requires_grad for result in match_boxes(boxes, boxes[None, :2], counts, *THRESHOLDS))


B1, GT, COUNTS = torch.rand(5, 4), torch.rand(2, 3, 4), torch.tensor([1, 2])
B2, CROWDS = torch.rand(2, 5, 4), torch.rand(2, 1, 4)


@pytest.mark.parametrize(
    ("error", "named", "arguments", "options"),
    [
        (ValueError, r"boxes: expected \[N, 4\] or \[2, N, 4\] .*, got \[5, 5\]", (torch.rand(5, 5), GT, COUNTS), {}),
        (ValueError, r"boxes: expected \[N, 4\] or \[2, N, 4\] .*, got \[1, 5, 4\]", (B2[:1], GT, COUNTS), {}),
        (ValueError, r"gt_boxes: expected \[B, G, 4\], got \[3, 4\]", (B1, GT[0], COUNTS), {}),
        (ValueError, r"gt_counts: expected \[2\], one for each image, got \[1\]", (B1, GT, COUNTS[:1]), {}),
        (ValueError, "gt_boxes: expected on cpu like boxes, got meta", (B1, GT.to("meta"), COUNTS), {}),
        (ValueError, "gt_counts: expected on cpu like boxes, got meta", (B1, GT, COUNTS.to("meta")), {}),
        (TypeError, "boxes: expected a Tensor, got None", (None, GT, COUNTS), {}),
        (TypeError, "boxes: expected a floating dtype, got torch.int64", (B1.long(), GT, COUNTS), {}),
        (TypeError, "gt_boxes: expected a floating dtype, got torch.int64", (B1, GT.long(), COUNTS), {}),
        (TypeError, "gt_counts: expected an integer dtype, got torch.float32", (B1, GT, COUNTS.float()), {}),
        (TypeError, "gt_counts: expected a signed integer", (B1, GT, COUNTS.to(torch.uint16)), {}),
        (ValueError, "counts: expected None for boxes that all images share", (B1, GT, COUNTS), {"counts": COUNTS}),
        (ValueError, r"counts: expected \[2\]", (B2, GT, COUNTS), {"counts": COUNTS[:1]}),
        (ValueError, r"crowds: expected \[2, C, 4\], got \[1, 4\]", (B1, GT, COUNTS), {"crowds": CROWDS[0]}),
        (ValueError, r"crowds: expected \[2, C, 4\], got \[1, 1, 4\]", (B1, GT, COUNTS), {"crowds": CROWDS[:1]}),
        (ValueError, "crowd_counts: expected None without crowds", (B1, GT, COUNTS), {"crowd_counts": COUNTS}),
        (ValueError, r"high_threshold: expected in \[0, 1\], got 1.5", (B1, GT, COUNTS, 1.5, 0.5), {}),
        (ValueError, r"low_threshold: expected in \[0, 1\], got nan", (B1, GT, COUNTS, 0.5, NAN), {}),
        (ValueError, "low_threshold: expected at most 0.4, got 0.5", (B1, GT, COUNTS, 0.4, 0.5), {}),
        (ValueError, r"crowd_overlap: expected in \[0, 1\], got -1", (B1, GT, COUNTS), {"crowd_overlap": -1}),
        (TypeError, "low_quality: expected a bool, got 0.5", (B1, GT, COUNTS), {"low_quality": 0.5}),
    ],
)
def test_bad_arguments_are_named(error, named, arguments, options):
    arguments = arguments if len(arguments) == 5 else (*arguments, *THRESHOLDS)
    with pytest.raises(error, match=f"^{named}"):
        match_boxes(*arguments, **options)
