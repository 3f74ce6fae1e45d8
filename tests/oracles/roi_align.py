"""Inputs of RoIAlign for tests, and its mean in float64 as an explicit matrix."""

import math

import torch

SCALES = [1 / 4, 1 / 8]  # of a pyramid of two levels


def roi_align_matrices(boxes, level_of, *, sizes, images, pooled, scales, ratio, aligned):
    """RoIAlign's mean as a matrix `[K * PH * PW, pixels]` for each level, and a matrix that bounds its error.

    A coordinate is rounded at most three times. This moves a sample by a tenth of the float32 budget times the
    coordinate, and changes each of the sample's four weights by as much.
    """
    bins = pooled[0] * pooled[1]
    matrices = [torch.zeros(len(boxes) * bins, images * h * w, dtype=torch.float64) for h, w in sizes]
    bounds = [torch.zeros_like(matrix) for matrix in matrices]
    for k, (image, *box) in enumerate(boxes.double().tolist()):
        level = level_of[k]
        (height, width), scale = sizes[level], scales[level]
        x1, y1, x2, y2 = (v * scale - (0.5 if aligned else 0) for v in box)
        bin_h, bin_w = y2 - y1, x2 - x1
        if not aligned:
            bin_h, bin_w = max(bin_h, 1), max(bin_w, 1)
        bin_h, bin_w = bin_h / pooled[0], bin_w / pooled[1]
        grid_h, grid_w = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
        count = max(grid_h * grid_w, 1)
        for b in range(bins):
            p, q = divmod(b, pooled[1])
            for i in range(grid_h):
                for j in range(grid_w):
                    y, x = y1 + (p + (i + 0.5) / grid_h) * bin_h, x1 + (q + (j + 0.5) / grid_w) * bin_w
                    if y < -1 or y > height or x < -1 or x > width:
                        continue
                    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                    for row in {int(y), min(int(y) + 1, height - 1)}:
                        for column in {int(x), min(int(x) + 1, width - 1)}:
                            at = (int(image) * height + row) * width + column
                            weight = (1 - abs(y - row)) * (1 - abs(x - column)) / count
                            matrices[level][k * bins + b, at] += weight
                            bounds[level][k * bins + b, at] += weight + 0.1 * (y + x + 2) / count
    return matrices, bounds


def as_rows(feature):
    """`[pixels, C]` float64 from `[N, C, H, W]`."""
    return feature.detach().double().cpu().permute(0, 2, 3, 1).flatten(0, 2)


def draw_boxes(k, images, side, seed, dtype=torch.float32):
    """Boxes inside, across and beyond an image of side x side pixels."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(k, 2, generator=g) * side * 1.3 - side * 0.2
    size = torch.exp(torch.randn(k, 2, generator=g) * 0.8) * side * 0.3
    image = torch.randint(0, images, (k, 1), generator=g)
    return torch.cat([image, corner, corner + size], 1).to(dtype)


def draw_pyramid(sizes, dtype=torch.float32, *, images=2, channels=5, seed=0, layout=torch.contiguous_format):
    """Levels `[N, C, H_l, W_l]` of the given sizes."""
    g = torch.Generator().manual_seed(seed)
    levels = [torch.randn(images, channels, h, w, generator=g).to(dtype) for h, w in sizes]
    return [level.to(memory_format=layout) for level in levels]


def check_large_map(pool, device):
    """`pool` and its gradient at the far end of a feature map of more than 2^31 elements."""
    side, channels = 2912, 256
    feature = torch.zeros(1, channels, side, side, dtype=torch.float16, device=device)
    feature = feature.to(memory_format=torch.channels_last)
    assert feature.numel() > 2**31
    feature[..., -16:, -16:] = 1
    box = torch.tensor([[0, side - 12, side - 12, side - 4, side - 4.0]], device=device)
    leaf = feature.detach().requires_grad_()
    out = pool(leaf, box, 2)
    assert out.eq(1).all()
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad[..., -16:, -16:].sum(dtype=torch.float32).item() == out.numel()
    assert not grad[..., : side // 2, :].any()
