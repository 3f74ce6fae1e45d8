"""Random heatmaps and targets, the keypoint loss in float64 by `F.cross_entropy`, and the kernels' variants."""

from functools import partial

import torch
import torch.nn.functional as F

from fastmask.kernels.keypoint_loss import keypoint_loss
from tests.oracles.budget import assert_within_budget

FACTOR = 1.5  # of the loss, so that its gradient is not 1


def draw_heatmaps(rows=3, points=5, m=6, seed=0):
    """Heatmaps `[R, P, m, m]` and targets; about a third of the keypoints have none."""
    g = torch.Generator().manual_seed(seed)
    heatmaps = torch.randn(rows, points, m, m, generator=g) * 4
    targets = torch.randint(m * m, (rows, points), generator=g)
    targets[torch.rand(rows, points, generator=g) < 0.35] = -1
    return heatmaps, targets


def exact_keypoint_loss(heatmaps, targets, reduction="mean"):
    """The loss, its gradient, and the magnitudes of their terms, in float64."""
    x = heatmaps.detach().double().requires_grad_()
    logits, index = x.flatten(0, 1).flatten(1), targets.flatten()
    divisor = max(int((targets >= 0).sum()), 1) if reduction == "mean" else 1
    loss = F.cross_entropy(logits, index, ignore_index=-1, reduction="sum") / divisor
    (grad,) = torch.autograd.grad(loss * FACTOR, x)
    chosen = logits[index >= 0].detach()
    magnitude = (chosen.abs().amax(1) + chosen.logsumexp(1).abs()).sum() / divisor
    # exp(x - lse) has the error of its argument.
    of_logits = FACTOR / divisor * (1 + logits.detach().abs() + logits.detach().logsumexp(1, keepdim=True).abs())
    share = logits.detach().softmax(1) + F.one_hot(index.clamp(min=0), logits.shape[1])
    return loss.detach(), grad, magnitude, (of_logits * share * (index >= 0)[:, None]).view(x.shape)


def assert_keypoint_loss(device, heatmaps, targets, reduction="mean"):
    """Loss and gradient are those of the oracle; the gradient has the format of the heatmaps."""
    loss, grad, magnitude, grad_magnitude = exact_keypoint_loss(heatmaps, targets, reduction)
    x = heatmaps.detach().to(device).requires_grad_()
    actual = keypoint_loss(x, targets.to(device), reduction=reduction)
    assert actual.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert actual.shape == ()
    assert_within_budget(actual, loss, magnitude)
    (actual_grad,) = torch.autograd.grad(actual * FACTOR, x)
    assert actual_grad.dtype == x.dtype
    for layout in (torch.contiguous_format, torch.channels_last):
        assert actual_grad.is_contiguous(memory_format=layout) == x.is_contiguous(memory_format=layout)
    subnormal = torch.finfo(x.dtype).smallest_normal
    assert_within_budget(actual_grad, grad, grad_magnitude + subnormal)
    assert (actual_grad.cpu()[targets < 0] == 0).all()


def check_keypoint_loss(
    device, dtype=torch.float32, layout=torch.contiguous_format, rows=3, points=5, m=6, reduction="mean"
):
    """A small call."""
    heatmaps, targets = draw_heatmaps(rows, points, m)
    assert_keypoint_loss(device, heatmaps.to(dtype).to(memory_format=layout), targets, reduction)


def check_no_targets(device):
    """No keypoint has a target: the loss and its gradient are 0, whatever the heatmaps."""
    for layout in (torch.contiguous_format, torch.channels_last):
        heatmaps = torch.full((2, 3, 4, 4), torch.nan, device=device).to(memory_format=layout).requires_grad_()
        loss = keypoint_loss(heatmaps, torch.full((2, 3), -1, device=device))
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, heatmaps)[0] == 0).all()


# By name: asserts that a small call of one variant of the kernels agrees with the oracle.
VARIANTS = {
    **{
        f"{name}, {str(dtype).removeprefix('torch.')}": partial(check_keypoint_loss, dtype=dtype, layout=layout)
        for name, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format))
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    },
    "several steps": partial(check_keypoint_loss, rows=1, points=2, m=66),
    "several steps, channels_last": partial(check_keypoint_loss, layout=torch.channels_last, rows=2, points=17, m=13),
    "sum": partial(check_keypoint_loss, reduction="sum"),
    "no targets": check_no_targets,
}
