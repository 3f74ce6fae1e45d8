"""paste_masks against torchvision, float64 oracles and hand-computed values; wrong arguments."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection.roi_heads import paste_masks_in_image

from fastmask.kernels._mask_sampling import CONVENTIONS
from fastmask.kernels._runtime import compute_dtype
from fastmask.kernels.paste_masks import paste_masks
from tests.oracles.paste_masks import ORACLES, assert_masks, assert_probabilities, draw_masks, grid_sample_oracle

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [(3, 28, 31, 67), (2, 14, 40, 40), (5, 7, 1, 33), (4, 5, 29, 1), (3, 1, 9, 13), (9, 4, 3, 2)]

both = pytest.mark.parametrize("convention", CONVENTIONS)


@both
@pytest.mark.parametrize(("n", "m", "height", "width"), SIZES)
def test_matches_the_oracle(device, convention, n, m, height, width):
    masks, boxes = draw_masks(n, m, height, width)
    exact = ORACLES[convention](masks, boxes, height, width)
    arguments = masks.to(device), boxes.to(device), (height, width)
    assert_masks(paste_masks(*arguments, convention=convention), exact)
    assert_masks(paste_masks(*arguments, 0.3, convention=convention), exact, 0.3)
    assert_probabilities(paste_masks(*arguments, None, convention=convention), exact, m)


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device, convention, dtype):
    masks, boxes = draw_masks(2, 28, 25, 70)
    masks = masks.to(dtype)
    exact = ORACLES[convention](masks, boxes, 25, 70)
    arguments = masks.to(device), boxes.to(device), (25, 70)
    assert_masks(paste_masks(*arguments, convention=convention), exact)
    probabilities = paste_masks(*arguments, None, convention=convention)
    assert probabilities.dtype == dtype
    assert_probabilities(probabilities, exact, 28)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_torchvision(device, dtype):
    masks, boxes = draw_masks(4, 28, 20, 70, seed=1)
    masks = masks.to(device, dtype)
    # In bfloat16, the rounding of torchvision's interpolation would take half of the budget.
    expected = paste_masks_in_image(masks.cpu().to(compute_dtype(dtype))[:, None], boxes, (20, 70))[:, 0]
    actual = paste_masks(masks, boxes.to(device), (20, 70), None, convention="torchvision")
    assert actual.dtype == dtype
    assert_probabilities(actual, expected.double(), 28)


def test_expansion_truncates_as_torchvision_does(device):
    # Corners whose expanded coordinates round to a whole number or just miss it, and one in (-1, 0).
    m = 14
    centre, half = torch.arange(6.0)[:, None] + 7.5, torch.arange(1.0, 7)[:, None] * m / (m + 2)
    boxes = torch.cat([centre - half, centre - half, centre + half, centre + half], 1)
    boxes = torch.cat([boxes, torch.tensor([[-9, -9, -1.2, -1.2]])])
    for nudged in (
        boxes,
        boxes.nextafter(boxes + 1),
        boxes.nextafter(boxes - 1),
        boxes.double() * (1 + 1e-12),
    ):
        masks = torch.ones(len(boxes), m, m)
        expected = paste_masks_in_image(masks[:, None], nudged, (21, 22))[:, 0]
        assert expected[-1].any()
        actual = paste_masks(masks.to(device), nudged.to(device), (21, 22), None, convention="torchvision")
        assert_probabilities(actual, expected.double(), m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_box_dtypes(device, dtype):
    masks, boxes = draw_masks(2, 14, 20, 30)
    boxes = boxes.to(dtype)
    exact = grid_sample_oracle(masks, boxes, 20, 30)
    assert_probabilities(paste_masks(masks.to(device), boxes.to(device), (20, 30), None), exact, 14)
    wide = masks.double().to(device)
    assert_probabilities(paste_masks(wide, boxes.to(device), (20, 30), None), exact, 14)


def test_a_box_on_whole_pixels_copies_the_mask(device):
    mask = torch.rand(1, 4, 4)
    boxes = torch.tensor([[2.0, 1, 6, 5]], device=device)
    out = paste_masks(mask.to(device), boxes, (7, 9), None).cpu()
    assert torch.equal(out[0, 1:5, 2:6], mask[0])
    assert torch.equal(out, torch.nn.functional.pad(mask, (2, 3, 1, 2)))
    assert torch.equal(paste_masks(mask.to(device), boxes, (7, 9)).cpu(), out >= 0.5)


def test_torchvision_by_hand(device):
    # m = 2 doubles the box, 1..3, to 0..4: five pixels, 0.8 padded mask pixels each.
    out = paste_masks(
        torch.ones(1, 2, 2, device=device),
        torch.tensor([[1.0, 1, 3, 3]], device=device),
        (6, 6),
        None,
        convention="torchvision",
    )
    line = torch.tensor([0, 0.7, 1, 0.7, 0, 0], dtype=torch.float64)
    assert_probabilities(out, line[None, :, None] * line, 2)


def test_float64_is_computed_in_float64(device):
    masks = torch.full((1, 4, 4), 0.3, dtype=torch.float64, device=device)
    boxes = torch.tensor([[2.0, 1, 6, 5]], device=device)
    for threshold, inside in ((0.3, True), (math.nextafter(0.3, 1), False)):
        assert paste_masks(masks, boxes, (7, 9), threshold)[0, 3, 4].item() is inside


@both
def test_autocast_changes_nothing(device, convention):
    masks, boxes = (tensor.to(device) for tensor in draw_masks(3, 28, 40, 50))
    outside = paste_masks(masks, boxes, (40, 50), None, convention=convention)
    with torch.autocast(device, torch.bfloat16):
        inside = paste_masks(masks, boxes, (40, 50), None, convention=convention)
    assert inside.equal(outside)


@both
def test_degenerate_and_non_finite_boxes_paste_nothing(device, convention):
    boxes = [
        [NAN, 0, 9, 9],
        [0, NAN, 9, 9],
        [0, 0, INF, 9],
        [-INF, 0, INF, 9],
        [0, -INF, 9, 9],
        [0, 0, 9, 3e38],
    ]
    boxes += [
        [-3e38, -3e38, 3e38, 3e38],
        [0, 0, 9, 2.0**32],
        [9, 9, 3, 3],
        [-90, -90, -80, -80],
        [99, 3, 120, 9],
    ]
    boxes += [[3, 99, 9, 120], [-30, 3, -20, 9]]
    boxes = torch.tensor(boxes, device=device)
    masks = torch.ones(len(boxes), 14, 14, device=device)
    assert not paste_masks(masks, boxes, (10, 12), convention=convention).any()
    assert not paste_masks(masks, boxes, (10, 12), None, convention=convention).any()
    assert paste_masks(masks, boxes, (10, 12), 0.0, convention=convention).all()


def test_zero_area(device):
    boxes = torch.tensor([[5.0, 5, 5, 9], [5, 5, 9, 5], [5, 5, 5, 5]])
    masks = torch.ones(3, 14, 14)
    assert not paste_masks(masks.to(device), boxes.to(device), (12, 12), None).any()
    expected = paste_masks_in_image(masks[:, None], boxes, (12, 12))[:, 0]  # at least a pixel wide
    actual = paste_masks(masks.to(device), boxes.to(device), (12, 12), None, convention="torchvision")
    assert expected.any()
    assert_probabilities(actual, expected.double(), 14)


@both
def test_boxes_narrower_than_a_pixel(device, convention):
    """Boxes so narrow that the scale from pixels to the mask overflows, next to pixel centres and on one."""
    boxes = torch.tensor([[0.0, 0, 1e-40, 9], [0, 0, 9, 1e-38], [2.5, 2.5, 2.5000002, 9]], device=device)
    out = paste_masks(torch.ones(3, 14, 14, device=device), boxes, (9, 11), None, convention=convention)
    assert ((out >= 0) & (out <= 1)).all()


@both
def test_threshold_is_at_least(device, convention):
    masks, boxes = (t.to(device) for t in draw_masks(2, 7, 11, 23))
    probabilities = paste_masks(masks, boxes, (11, 23), None, convention=convention)
    for threshold in (0.0, 0.25, 0.5, 1.0, probabilities.median().item()):
        pasted = paste_masks(masks, boxes, (11, 23), threshold, convention=convention)
        assert torch.equal(pasted, probabilities >= threshold)
    assert paste_masks(masks, boxes, (11, 23), 0.0, convention=convention).all()  # also pixels outside the box
    assert (probabilities == 0).any()


@pytest.mark.parametrize("size", [(0, 9), (9, 0), (0, 0)])
@pytest.mark.parametrize("threshold", [0.5, None])
def test_empty(device, size, threshold):
    masks, boxes = (t.to(device) for t in draw_masks(2, 7, 9, 9))
    dtype = torch.float32 if threshold is None else torch.bool
    for n, image in ((2, size), (0, (9, 9))):
        out = paste_masks(masks[:n], boxes[:n], image, threshold)
        assert out.shape == (n, *image)
        assert out.dtype == dtype


@both
def test_non_contiguous(device, convention):
    masks, boxes = (t.to(device) for t in draw_masks(3, 7, 11, 23))
    strided = torch.stack([masks, masks], 3)[..., 0].mT, torch.stack([boxes, boxes], 2)[..., 0]
    expected = paste_masks(masks.mT.contiguous(), boxes, (11, 23), None, convention=convention)
    assert torch.equal(paste_masks(*strided, (11, 23), None, convention=convention), expected)
    shared = masks[:1].expand(3, 7, 7)
    expected = paste_masks(shared.contiguous(), boxes, (11, 23), convention=convention)
    assert torch.equal(paste_masks(shared, boxes, (11, 23), convention=convention), expected)


@both
def test_bitwise_repeatable(device, convention):
    masks, boxes = (t.to(device) for t in draw_masks(3, 14, 11, 53))
    first, second = (paste_masks(masks, boxes, (11, 53), None, convention=convention) for _ in range(2))
    assert torch.equal(first, second)


@both
def test_any_number_of_masks(device, convention):
    """On a GPU, more than 2^31 elements: the mask that contains element 2^31, and the last one, are right."""
    n, image = (2200, (1000, 1000)) if device == "cuda" else (5, (9, 13))
    masks, boxes = (t.to(device) for t in draw_masks(n, 7, *image))
    out = paste_masks(masks, boxes, image, convention=convention)
    for k in (0, 2**31 // 10**6 % n, n - 1):
        assert torch.equal(out[k], paste_masks(masks[k : k + 1], boxes[k : k + 1], image, convention=convention)[0])


@pytest.mark.reference_only
@both
def test_at_full_size(convention):
    masks, boxes = draw_masks(6, 28, 480, 640)
    if convention == "aligned":
        exact = grid_sample_oracle(masks, boxes, 480, 640)
    else:
        exact = paste_masks_in_image(masks.double()[:, None], boxes, (480, 640))[:, 0]
    assert_masks(paste_masks(masks, boxes, (480, 640), convention=convention), exact, margin=2e-5)
    assert_probabilities(paste_masks(masks, boxes, (480, 640), None, convention=convention), exact, 28)


@both
@pytest.mark.parametrize("threshold", [0.5, None])
def test_opcheck(device, convention, threshold):
    masks, boxes = (t.to(device) for t in draw_masks(2, 7, 9, 13))
    torch.library.opcheck(torch.ops.fastmask.paste_masks.default, (masks, boxes, 9, 13, threshold, convention))


@both
def test_compiles_without_graph_breaks(device, convention):
    masks, boxes = (t.to(device) for t in draw_masks(2, 7, 9, 13))
    compiled = torch.compile(paste_masks, fullgraph=True, dynamic=True)
    for size in ((9, 13), (6, 17)):
        for threshold in (0.5, None):
            expected = paste_masks(masks, boxes, size, threshold, convention=convention)
            assert torch.equal(compiled(masks, boxes, size, threshold, convention=convention), expected)


def test_fake_tensors():
    with FakeTensorMode():
        masks, boxes = torch.rand(3, 28, 28, dtype=torch.float16), torch.rand(3, 4)
        for threshold, dtype in ((0.5, torch.bool), (None, torch.float16)):
            out = paste_masks(masks, boxes, (800, 1333), threshold, convention="torchvision")
            assert (out.shape, out.dtype) == ((3, 800, 1333), dtype)


def test_has_no_gradient(device):
    masks, boxes = (t.to(device).requires_grad_() for t in draw_masks(2, 7, 9, 13))
    assert not paste_masks(masks, boxes, (9, 13), None).requires_grad


@both
@pytest.mark.parametrize("threshold", [0.5, None])
def test_any_default_device(device, convention, threshold):
    arguments = *(t.to(device) for t in draw_masks(2, 7, 9, 13)), (9, 13), threshold
    expected = paste_masks(*arguments, convention=convention)
    with torch.device("meta"):
        assert torch.equal(paste_masks(*arguments, convention=convention), expected)


class Paste(torch.nn.Module):
    def forward(self, masks, boxes):
        return paste_masks(masks.sigmoid(), boxes, (9, 13), convention="torchvision")


def test_symbolic_tracing_records_the_public_function(device):
    traced = torch.fx.symbolic_trace(Paste())
    assert paste_masks in {node.target for node in traced.graph.nodes}
    arguments = [t.to(device) for t in draw_masks(2, 7, 9, 13)]
    assert torch.equal(traced(*arguments), Paste()(*arguments))


MASKS, BOXES = torch.rand(2, 4, 4), torch.rand(2, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, r"masks: expected \[N, m, m\].*\[2, 3, 4\]", (torch.rand(2, 3, 4), BOXES, (5, 5)), {}),
        (ValueError, r"masks: expected \[N, m, m\].*\[2, 1, 4, 4\]", (MASKS[:, None], BOXES, (5, 5)), {}),
        (ValueError, r"masks: expected .*\[2, 0, 0\]", (torch.rand(2, 0, 0), BOXES, (5, 5)), {}),
        (ValueError, r"boxes: expected \[2, 4\].*\[3, 4\]", (MASKS, torch.rand(3, 4), (5, 5)), {}),
        (TypeError, "masks: expected a floating dtype.*uint8", (MASKS.byte(), BOXES, (5, 5)), {}),
        (TypeError, "boxes: expected a floating dtype.*int64", (MASKS, BOXES.long(), (5, 5)), {}),
        (ValueError, "boxes: expected on cpu like masks, got meta", (MASKS, BOXES.to("meta"), (5, 5)), {}),
        (ValueError, r"image_size: expected.*\(-1, 5\)", (MASKS, BOXES, (-1, 5)), {}),
        (ValueError, r"image_size: expected.*\(5, -1\)", (MASKS, BOXES, (5, -1)), {}),
        (ValueError, "image_size: expected.*2\\^30", (MASKS, BOXES, (2**16, 2**15)), {}),
        (ValueError, r"threshold: expected.*1\.5", (MASKS, BOXES, (5, 5), 1.5), {}),
        (ValueError, "threshold: expected.*-0.1", (MASKS, BOXES, (5, 5), -0.1), {}),
        (ValueError, "threshold: expected.*nan", (MASKS, BOXES, (5, 5), NAN), {}),
        (ValueError, "convention: expected.*'caffe'", (MASKS, BOXES, (5, 5)), {"convention": "caffe"}),
        (TypeError, "convention: expected.*None", (MASKS, BOXES, (5, 5)), {"convention": None}),
        (TypeError, "image_size: expected two ints, got 7", (MASKS, BOXES, 7), {}),
        (TypeError, r"image_size: expected an int, got 1\.5", (MASKS, BOXES, (1.5, 2)), {}),
        (ValueError, r"image_size: expected two ints, got \(3, 4, 5\)", (MASKS, BOXES, (3, 4, 5)), {}),
        (TypeError, "threshold: expected a number, got 'half'", (MASKS, BOXES, (5, 5), "half"), {}),
        (TypeError, "masks: expected a Tensor, got array", (MASKS.numpy(), BOXES, (5, 5)), {}),
        (TypeError, "boxes: expected a Tensor, got None", (MASKS, None, (5, 5)), {}),
        (TypeError, "masks: expected a dense tensor", (MASKS.to_sparse(), BOXES, (5, 5)), {}),
    ],
)
def test_bad_arguments_are_named(error, message, arguments, options):
    with pytest.raises(error, match=message):
        paste_masks(*arguments, **options)


@pytest.mark.reference_only
def test_many_masks_give_the_results_of_single_masks():
    masks, boxes = draw_masks(150, 6, 20, 30)
    together = paste_masks(masks, boxes, (20, 30), None)
    assert torch.equal(
        together, torch.cat([paste_masks(m[None], b[None], (20, 30), None) for m, b in zip(masks, boxes, strict=True)])
    )
