"""keypoint_loss against F.cross_entropy, torchvision and a float64 oracle; wrong arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask.kernels.keypoint_loss import keypoint_loss
from tests.oracles.keypoint_loss import assert_keypoint_loss, check_no_targets, draw_heatmaps

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_matches_the_oracle(device, dtype, layout, reduction):
    heatmaps, targets = draw_heatmaps(3, 5, 7)
    assert_keypoint_loss(device, heatmaps.to(dtype).to(memory_format=layout), targets, reduction)


@layouts
@pytest.mark.parametrize(("rows", "points", "m"), [(3, 1, 5), (2, 17, 1), (1, 2, 70), (2, 33, 12)])
def test_sizes(device, layout, rows, points, m):
    heatmaps, targets = draw_heatmaps(rows, points, m)
    targets[0] = m * m - 1
    assert_keypoint_loss(device, heatmaps.to(memory_format=layout), targets)


def test_is_pytorchs_cross_entropy(device):
    heatmaps, targets = on(device, *draw_heatmaps())
    for reduction in ("mean", "sum"):
        expected = F.cross_entropy(
            heatmaps.flatten(0, 1).flatten(1), targets.flatten(), ignore_index=-1, reduction=reduction
        )
        torch.testing.assert_close(keypoint_loss(heatmaps, targets, reduction=reduction), expected)


@pytest.mark.reference_only
def test_matches_torchvision():
    from torchvision.models.detection.roi_heads import keypointrcnn_loss, keypoints_to_heatmap

    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 14, 14, generator=g, requires_grad=True)
    corner = torch.rand(6, 2, generator=g) * 20
    boxes = torch.cat([corner, corner + 3 + torch.rand(6, 2, generator=g) * 20], 1)
    keypoints = torch.cat([torch.rand(3, 5, 2, generator=g) * 40, torch.randint(3, (3, 5, 1), generator=g)], 2)
    matches = torch.randint(3, (6,), generator=g)
    expected = keypointrcnn_loss(logits, [boxes], [keypoints], [matches])
    pixels, valid = keypoints_to_heatmap(keypoints[matches], boxes, 14)
    actual = keypoint_loss(logits, pixels.where(valid.bool(), -1))
    assert valid.any()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (actual, expected)))


@layouts
def test_keypoints_without_target_do_not_matter(device, layout):
    heatmaps, targets = on(device, *draw_heatmaps())
    heatmaps = heatmaps.to(memory_format=layout)
    expected = keypoint_loss(heatmaps, targets)
    other = torch.where((targets < 0)[..., None, None], torch.nan, heatmaps).requires_grad_()
    actual = keypoint_loss(other, targets)
    assert torch.equal(actual, expected)
    assert torch.autograd.grad(actual, other)[0].isfinite().all()


@layouts
def test_large_logits_do_not_overflow(device, layout):
    heatmaps, targets = draw_heatmaps(2, 3, 5)
    targets[:] = 7
    for shift in (-2e4, 2e4):
        assert_keypoint_loss(device, (heatmaps * 50 + shift).to(memory_format=layout), targets)
    heatmaps[0, 0, 0, :3] = -torch.inf  # pixels of probability 0
    expected = F.cross_entropy(heatmaps.flatten(0, 1).flatten(1), targets.flatten())
    actual = keypoint_loss(heatmaps.to(device).to(memory_format=layout), targets.to(device)).cpu()
    torch.testing.assert_close(actual, expected)


def test_non_finite_logits_give_a_loss_that_is_not_finite(device):
    for value in (torch.nan, torch.inf):
        heatmaps, targets = draw_heatmaps(2, 2, 3)
        targets[:] = 1
        heatmaps[0, 0, 1, 1] = value
        assert not keypoint_loss(*on(device, heatmaps, targets)).isfinite()


def test_no_targets(device):
    check_no_targets(device)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty(device, reduction):
    heatmaps = torch.empty(0, 17, 8, 8, device=device, requires_grad=True)
    loss = keypoint_loss(heatmaps, torch.empty(0, 17, dtype=torch.long, device=device), reduction=reduction)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, heatmaps)[0].shape == (0, 17, 8, 8)


@layouts
def test_gradcheck(device, layout):
    heatmaps, targets = on(device, *draw_heatmaps(2, 3, 3))
    heatmaps = heatmaps.double().to(memory_format=layout).requires_grad_()
    for reduction in ("mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda x, reduction=reduction: keypoint_loss(x, targets, reduction=reduction), heatmaps
        )


def test_second_derivatives_raise(device):
    heatmaps, targets = on(device, *draw_heatmaps())
    heatmaps.requires_grad_()
    (grad,) = torch.autograd.grad(keypoint_loss(heatmaps, targets), heatmaps, create_graph=True)
    with pytest.raises(NotImplementedError, match="second"):
        grad.sum().backward()


@layouts
def test_non_contiguous(device, layout):
    heatmaps, targets = on(device, *draw_heatmaps())
    expected = keypoint_loss(heatmaps.to(memory_format=layout), targets)
    wide = torch.cat([heatmaps, heatmaps], 3)[..., :6].requires_grad_()
    loss = keypoint_loss(wide, torch.stack([targets, targets], 2)[..., 0])
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, wide)[0].is_contiguous()


def test_bitwise_repeatable(device):
    heatmaps, targets = on(device, *draw_heatmaps(3, 5, 20))
    first, second = (keypoint_loss(heatmaps, targets) for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_changes_nothing(device):
    heatmaps, targets = on(device, *draw_heatmaps())
    expected = keypoint_loss(heatmaps, targets)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(keypoint_loss(heatmaps, targets), expected)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, layout, dtype):
    heatmaps, targets = on(device, *draw_heatmaps(2, 3, 4))
    heatmaps = heatmaps.to(dtype).to(memory_format=layout).requires_grad_()
    torch.library.opcheck(torch.ops.fastmask.keypoint_loss.default, (heatmaps, targets, "mean"))


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(keypoint_loss, fullgraph=True, dynamic=True)
    for rows, m in ((3, 4), (2, 6)):
        heatmaps, targets = on(device, *draw_heatmaps(rows, 3, m))
        for layout in LAYOUTS:
            x = heatmaps.to(memory_format=layout).requires_grad_()
            actual, expected = compiled(x, targets), keypoint_loss(x, targets)
            assert torch.equal(actual, expected)
            assert torch.equal(*(torch.autograd.grad(loss, x)[0] for loss in (actual, expected)))


def test_fake_tensors():
    with FakeTensorMode():
        heatmaps = torch.rand(4, 17, 56, 56, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        heatmaps.requires_grad_()
        loss = keypoint_loss(heatmaps, torch.ones(4, 17, dtype=torch.long))
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        (grad,) = torch.autograd.grad(loss, heatmaps)
        assert (grad.shape, grad.dtype, grad.stride()) == (heatmaps.shape, heatmaps.dtype, heatmaps.stride())


@pytest.mark.reference_only
def test_targets_without_a_pixel_raise_on_the_cpu():
    heatmaps, targets = draw_heatmaps()
    for target in (-2, 36):
        targets[0, 0] = target
        with pytest.raises(ValueError, match=f"targets: expected -1..35, got {target}"):
            keypoint_loss(heatmaps, targets)


HEATMAPS, TARGETS = draw_heatmaps()


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "heatmaps: expected a floating dtype.*int64", (HEATMAPS.long(), TARGETS), {}),
        (ValueError, r"heatmaps: expected \[R, P, m, m\]", (HEATMAPS[0], TARGETS), {}),
        (ValueError, r"heatmaps: expected \[R, P, m, m\]", (HEATMAPS[:, :0], TARGETS[:, :0]), {}),
        (ValueError, r"heatmaps: expected \[R, P, m, m\]", (HEATMAPS[..., :0], TARGETS), {}),
        (ValueError, "heatmaps: expected fewer than 2", (torch.empty(1, 2**15, 256, 256, device="meta"), TARGETS), {}),
        (TypeError, "targets: expected an integer dtype", (HEATMAPS, TARGETS.float()), {}),
        (ValueError, r"targets: expected \[3, 5\]", (HEATMAPS, TARGETS[:, :4]), {}),
        (ValueError, "targets: expected on cpu", (HEATMAPS, TARGETS.to("meta")), {}),
        (ValueError, "reduction: expected.*'none'", (HEATMAPS, TARGETS), {"reduction": "none"}),
    ],
)
def test_bad_arguments_are_named(error, message, arguments, options):
    with pytest.raises(error, match=message):
        keypoint_loss(*arguments, **options)
