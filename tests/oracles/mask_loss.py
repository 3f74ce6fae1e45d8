"""Random logits, targets and labels, the mask loss in float64 by `F.binary_cross_entropy_with_logits`, and variants."""

from functools import partial

import torch
import torch.nn.functional as F

from fastmask.kernels.mask_loss import mask_loss
from tests.oracles.budget import assert_within_budget

FACTOR = 1.5  # of the loss, so that its gradient is not 1


def draw_masks(rows=5, classes=3, m=6, seed=0):
    """Logits `[R, K, m, m]`, targets, labels with an empty slot, and rows that count."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, m, m, generator=g) * 4
    targets = torch.rand(rows, m, m, generator=g)
    targets[: rows // 2] = targets[: rows // 2].round()
    labels = torch.randint(1, classes + 1, (rows,), generator=g)
    labels[rows // 2] = 0
    valid = torch.arange(rows) != 1
    return logits, targets, labels, valid


def exact_mask_loss(logits, targets, labels, valid=None, reduction="mean"):
    """The loss, its gradient, and the magnitudes of their terms, in float64."""
    x = logits.detach().double().requires_grad_()
    rows = (labels > 0) & (True if valid is None else valid)
    of_class = x[rows].take_along_dim((labels[rows] - 1)[:, None, None, None], 1)[:, 0]
    t = targets[rows].double()
    total = F.binary_cross_entropy_with_logits(of_class, t, reduction="sum")
    divisor = max(t.numel(), 1) if reduction == "mean" else 1
    loss = total / divisor
    (grad,) = torch.autograd.grad(loss * FACTOR, x)
    magnitude = ((of_class * (1 + t)).abs() + torch.log1p(torch.exp(-of_class.abs()))).detach().sum() / divisor
    return loss.detach(), grad, magnitude, (grad != 0).double() * (2 * FACTOR / divisor)


def assert_mask_loss(device, logits, targets, labels, valid=None, reduction="mean"):
    """Loss and gradient are those of the oracle; the gradient has the format of the logits."""
    loss, grad, magnitude, grad_magnitude = exact_mask_loss(logits, targets, labels, valid, reduction)
    x = logits.detach().to(device).requires_grad_()
    arguments = targets.to(device), labels.to(device), None if valid is None else valid.to(device)
    actual = mask_loss(x, *arguments, reduction=reduction)
    assert actual.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert actual.shape == ()
    assert_within_budget(actual, loss, magnitude)
    (actual_grad,) = torch.autograd.grad(actual * FACTOR, x)
    assert actual_grad.dtype == x.dtype
    for layout in (torch.contiguous_format, torch.channels_last):
        assert actual_grad.is_contiguous(memory_format=layout) == x.is_contiguous(memory_format=layout)
    assert_within_budget(actual_grad, grad, grad_magnitude)
    assert torch.equal(actual_grad.cpu() != 0, (actual_grad.cpu() != 0) & (grad != 0))


def check_mask_loss(
    device,
    dtype=torch.float32,
    layout=torch.channels_last,
    rows=5,
    classes=3,
    m=6,
    reduction="mean",
    targets_dtype=None,
    with_valid=True,
):
    """A small call."""
    logits, targets, labels, valid = draw_masks(rows, classes, m)
    targets = targets if targets_dtype is None else targets.round().to(targets_dtype)
    logits = logits.to(dtype).to(memory_format=layout)
    assert_mask_loss(device, logits, targets, labels, valid if with_valid else None, reduction)


def check_no_rows(device):
    """No row counts: the loss and its gradient are 0, whatever the logits."""
    logits = torch.full((2, 3, 4, 4), torch.nan, device=device, requires_grad=True)
    targets, labels = torch.zeros(2, 4, 4, device=device), torch.tensor([0, 2], device=device)
    loss = mask_loss(logits, targets, labels, torch.tensor([True, False], device=device))
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


# By name: asserts that a small call of one variant of the kernels agrees with the oracle.
VARIANTS = {
    **{
        f"{name}, {str(dtype).removeprefix('torch.')}": partial(check_mask_loss, dtype=dtype, layout=layout)
        for name, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format))
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    },
    "vectors within a pixel": partial(check_mask_loss, dtype=torch.float16, classes=16, m=4),
    "vectors across pixels": partial(check_mask_loss, classes=11, m=5),
    "one class": partial(check_mask_loss, classes=1),
    "several steps": partial(check_mask_loss, rows=3, classes=2, m=36),
    "several programs of a row": partial(check_mask_loss, rows=3, classes=40, m=9),
    "several programs of a row, contiguous": partial(
        check_mask_loss, layout=torch.contiguous_format, rows=3, classes=40, m=9
    ),
    "sum": partial(check_mask_loss, reduction="sum"),
    "targets of bool": partial(check_mask_loss, targets_dtype=torch.bool),
    "targets of uint8": partial(check_mask_loss, targets_dtype=torch.uint8),
    "without valid": partial(check_mask_loss, with_valid=False),
    "more rows than a block of the sum": partial(check_mask_loss, rows=1030, classes=1, m=1),
    "no rows": check_no_rows,
}
