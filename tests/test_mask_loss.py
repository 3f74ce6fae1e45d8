"""mask_loss against F.binary_cross_entropy_with_logits, torchvision and a float64 oracle; wrong arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask.kernels.mask_loss import mask_loss
from tests.oracles.mask_loss import assert_mask_loss, check_no_rows, draw_masks

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_matches_the_oracle(device, dtype, layout, reduction):
    logits, *rest = draw_masks(4, 5, 7)
    assert_mask_loss(device, logits.to(dtype).to(memory_format=layout), *rest, reduction)


@layouts
@pytest.mark.parametrize(("rows", "classes", "m"), [(3, 1, 5), (2, 2, 1), (3, 9, 8), (2, 80, 4), (1, 3, 40)])
def test_sizes(device, layout, rows, classes, m):
    logits, targets, labels, _ = draw_masks(rows, classes, m)
    labels[-1] = classes
    assert_mask_loss(device, logits.to(memory_format=layout), targets, labels)


def test_is_pytorchs_loss_of_gathered_logits(device):
    logits, targets, labels, valid = on(device, *draw_masks())
    rows = valid & (labels > 0)
    gathered = logits[rows, labels[rows] - 1]
    expected = F.binary_cross_entropy_with_logits(gathered, targets[rows])
    torch.testing.assert_close(mask_loss(logits, targets, labels, valid), expected)


@pytest.mark.reference_only
def test_matches_torchvision():
    """torchvision's channel 0 is the background, so that its channel of class k is k."""
    from torchvision.models.detection.roi_heads import maskrcnn_loss, project_masks_on_boxes

    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 14, 14, generator=g, requires_grad=True)
    corner = torch.rand(6, 2, generator=g) * 20
    boxes = torch.cat([corner, corner + 3 + torch.rand(6, 2, generator=g) * 20], 1)
    masks, classes = (torch.rand(3, 48, 48, generator=g) > 0.5).float(), torch.tensor([1, 3, 2])
    matches = torch.randint(3, (6,), generator=g)
    expected = maskrcnn_loss(logits, [boxes], [masks], [classes], [matches])
    targets = project_masks_on_boxes(masks, boxes, matches, 14)
    actual = mask_loss(logits, targets, classes[matches] + 1)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (actual, expected)))


def test_other_channels_and_rows_do_not_matter(device):
    logits, targets, labels, valid = on(device, *draw_masks())
    expected = mask_loss(logits, targets, labels, valid)
    counted = valid & (labels > 0)
    used = counted[:, None] & (labels[:, None] - 1 == torch.arange(logits.shape[1], device=device))
    other = torch.where(used[:, :, None, None], logits, torch.nan).requires_grad_()
    targets = torch.where(counted[:, None, None], targets, torch.nan)
    actual = mask_loss(other, targets, labels, valid)
    assert torch.equal(actual, expected)
    assert torch.autograd.grad(actual, other)[0].isfinite().all()


def test_confident_logits(device):
    """Losses far below an ulp of 1 keep their digits; losses of large logits do not overflow."""
    x = torch.tensor([-80.0, -30, -17, -9, 0, 9, 17, 30, 80, 1e30, -1e30, 90, -90]).view(1, 1, 1, -1)
    t = (x[:, 0] > 0).float()
    t[..., -2:] = 1 - t[..., -2:]
    for targets, columns in ((t[..., :9], 9), (t, 13)):
        logits = x[..., :columns].to(device)
        actual = mask_loss(logits, targets.to(device), torch.ones(1, dtype=torch.long, device=device)).cpu()
        expected = F.binary_cross_entropy_with_logits(x[:, 0, :, :columns].double(), targets.double()).float()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_non_finite_logits_give_a_loss_that_is_not_finite(device):
    for value in (torch.nan, torch.inf, -torch.inf):
        logits, targets, labels, _ = draw_masks(2, 2, 3)
        labels[:] = 1
        logits[0, 0, 1, 1] = value
        assert not mask_loss(*on(device, logits, targets, labels)).isfinite()


def test_no_rows(device):
    check_no_rows(device)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty(device, shape, reduction):
    logits = torch.empty(shape, device=device, requires_grad=True)
    labels = torch.ones(shape[0], dtype=torch.long, device=device)
    loss = mask_loss(logits, torch.empty(shape[0], *shape[2:], device=device), labels, reduction=reduction)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits)[0].shape == shape


@layouts
def test_gradcheck(device, layout):
    logits, targets, labels, valid = on(device, *draw_masks(4, 3, 3))
    logits = logits.double().to(memory_format=layout).requires_grad_()
    for reduction in ("mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda x, reduction=reduction: mask_loss(x, targets.double(), labels, valid, reduction=reduction), logits
        )


def test_second_derivatives_raise(device):
    logits, targets, labels, valid = on(device, *draw_masks())
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(mask_loss(logits, targets, labels, valid), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="second"):
        grad.sum().backward()


def test_targets_receive_no_gradient(device):
    logits, targets, labels, valid = on(device, *draw_masks())
    logits, targets = logits.requires_grad_(), targets.requires_grad_()
    mask_loss(logits, targets, labels, valid).backward()
    assert targets.grad is None


def test_the_logits_are_not_kept_for_the_backward(device):
    logits, targets, labels, valid = on(device, *draw_masks())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        mask_loss(logits.requires_grad_(), targets, labels, valid)
    assert targets.shape in kept
    assert logits.shape not in kept


@layouts
def test_non_contiguous(device, layout):
    logits, targets, labels, valid = on(device, *draw_masks(4, 3, 5))
    logits = logits.to(memory_format=layout)
    expected = mask_loss(logits, targets, labels, valid)
    wide = torch.cat([logits, logits], 3)[..., :5]
    tensors = torch.stack([targets, targets], 3)[..., 0], torch.stack([labels, labels], 1)[:, 0]
    torch.testing.assert_close(mask_loss(wide, *tensors, torch.stack([valid, valid], 1)[:, 0]), expected)


def test_bitwise_repeatable(device):
    logits, targets, labels, valid = on(device, *draw_masks(9, 3, 8))
    first, second = (mask_loss(logits, targets, labels, valid) for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_changes_nothing(device):
    logits, targets, labels, valid = on(device, *draw_masks())
    expected = mask_loss(logits, targets, labels, valid)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(mask_loss(logits, targets, labels, valid), expected)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, layout, dtype):
    logits, targets, labels, valid = on(device, *draw_masks(3, 2, 4))
    logits = logits.to(dtype).to(memory_format=layout).requires_grad_()
    for rows in (valid, None):
        torch.library.opcheck(torch.ops.fastmask.mask_loss.default, (logits, targets, labels, rows, "mean"))


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(mask_loss, fullgraph=True, dynamic=True)
    for rows, m in ((3, 4), (5, 6)):
        logits, targets, labels, valid = on(device, *draw_masks(rows, 2, m))
        for layout in LAYOUTS:
            x = logits.to(memory_format=layout).requires_grad_()
            actual, expected = compiled(x, targets, labels, valid), mask_loss(x, targets, labels, valid)
            assert torch.equal(actual, expected)
            assert torch.equal(*(torch.autograd.grad(loss, x)[0] for loss in (actual, expected)))


def test_fake_tensors():
    with FakeTensorMode():
        logits = torch.rand(4, 80, 28, 28, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        logits.requires_grad_()
        loss = mask_loss(logits, torch.rand(4, 28, 28), torch.ones(4, dtype=torch.long))
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad.shape, grad.dtype, grad.stride()) == (logits.shape, logits.dtype, logits.stride())


@pytest.mark.reference_only
def test_labels_without_a_class_raise_on_the_cpu():
    logits, targets, labels, valid = draw_masks()
    for label in (-1, logits.shape[1] + 1):
        labels[0] = label
        with pytest.raises(ValueError, match=f"labels: expected 0..3 in valid rows, got {label}"):
            mask_loss(logits, targets, labels, valid)
        mask_loss(logits, targets, labels, valid & (torch.arange(len(valid)) > 0))


LOGITS, TARGETS, LABELS, VALID = draw_masks()


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "logits: expected a floating dtype.*int64", (LOGITS.long(), TARGETS, LABELS), {}),
        (ValueError, r"logits: expected \[R, K, m, m\]", (LOGITS[0], TARGETS, LABELS), {}),
        (ValueError, r"logits: expected \[R, K, m, m\]", (LOGITS[:, :0], TARGETS, LABELS), {}),
        (ValueError, "logits: expected fewer than 2", (torch.empty(1, 2**15, 256, 256, device="meta"),) * 3, {}),
        (ValueError, r"targets: expected \[5, 6, 6\].*\[5, 6, 5\]", (LOGITS, TARGETS[..., :5], LABELS), {}),
        (TypeError, "targets: expected a dtype of real", (LOGITS, TARGETS + 0j, LABELS), {}),
        (ValueError, "targets: expected on cpu", (LOGITS, TARGETS.to("meta"), LABELS), {}),
        (TypeError, "labels: expected an integer dtype", (LOGITS, TARGETS, LABELS.float()), {}),
        (ValueError, r"labels: expected \[5\]", (LOGITS, TARGETS, LABELS[:3]), {}),
        (TypeError, "valid: expected a Tensor of torch.bool", (LOGITS, TARGETS, LABELS, LABELS), {}),
        (TypeError, "valid: expected a Tensor of torch.bool", (LOGITS, TARGETS, LABELS, True), {}),
        (ValueError, r"valid: expected \[5\]", (LOGITS, TARGETS, LABELS, VALID[:2]), {}),
        (ValueError, "reduction: expected.*'none'", (LOGITS, TARGETS, LABELS), {"reduction": "none"}),
        (TypeError, "reduction: expected.*None", (LOGITS, TARGETS, LABELS), {"reduction": None}),
    ],
)
def test_bad_arguments_are_named(error, message, arguments, options):
    if arguments[0].is_meta:
        arguments = arguments[0], torch.empty(1, 256, 256, device="meta"), torch.ones(1, dtype=torch.long)
    with pytest.raises(error, match=message):
        mask_loss(*arguments, **options)
