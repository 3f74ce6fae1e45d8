"""Images, their preprocessing in float64 by PyTorch's `interpolate`, and the kernel's variants."""

from functools import partial

import torch
from torch.nn.functional import interpolate, pad

from fastmask.kernels._runtime import INTERPRETED
from fastmask.kernels.preprocess import preprocess
from tests.oracles.budget import BUDGET, assert_within_budget

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
DETECTRON_MEAN, DETECTRON_STD = (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)


def draw_image(height, width, seed=0, dtype=torch.uint8):
    """Noise, the hardest image to resample: uint8 levels, or floating numbers in [0, 1)."""
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (3, height, width), generator=g, dtype=dtype)
    return torch.rand(3, height, width, generator=g).to(dtype)


def preprocess_oracle(image, shape, mean, std, padded, *, antialias=True, channels="RGB"):
    """One image, `[3, H, W]` in float64, and the magnitude of the terms of each element."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    pixels = image.double() if channels == "RGB" else image.double().flip(0)
    resized = interpolate(pixels[None], shape, mode="bilinear", align_corners=False, antialias=antialias)[0]
    resized = pixels if image.shape[1:] == shape else resized
    margin = (0, padded[1] - shape[1], 0, padded[0] - shape[0])
    return pad((resized - mean) / std, margin), pad((resized.abs() + mean.abs()) / std, margin)


def assert_preprocessed(actual, exact, magnitude, image, std):
    """Within the budget of the dtype, and in float32 that of the positions of pixels.

    A position has a rounding error of up to a few units in the last place of the larger side; it moves a pixel by that
    times the difference of neighbours, which is at most the largest pixel.
    """
    side = max(*image.shape[1:], *exact.shape[1:])
    position = 4 * side * 2**-24 * image.double().abs().max().item() / min(std)
    inside = magnitude > 0
    assert (actual.cpu()[~inside] == 0).all()
    assert_within_budget(actual, exact, (magnitude + position / BUDGET[actual.dtype]) * inside)


def check_preprocess(
    device,
    *,
    inputs=((23, 37),),
    layout="CHW",
    image_dtype=torch.uint8,
    mean=MEAN,
    std=STD,
    channels="RGB",
    antialias=True,
    **options,
):
    """A batch of images is the oracle's, each image by itself."""
    images = [draw_image(*size, seed=seed, dtype=image_dtype) for seed, size in enumerate(inputs)]
    given = [
        image.to(device) if layout == "CHW" else image.permute(1, 2, 0).contiguous().to(device) for image in images
    ]
    shared = {"antialias": antialias, "channels": channels}
    out, sizes, shapes = preprocess(given, mean=mean, std=std, layout=layout, **shared, **options)
    assert out.shape[:2] == (len(images), 3)
    assert out.dtype == options.get("dtype", torch.float32)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert sizes.device == out.device
    assert sizes.tolist() == [list(shape) for shape in shapes]
    for image, shape, actual in zip(images, shapes, out, strict=True):
        exact, magnitude = preprocess_oracle(image, shape, mean, std, tuple(out.shape[2:]), **shared)
        assert_preprocessed(actual, exact, magnitude, image, std)


def check_unchanged(device, dtype, image_dtype):
    """Images that keep their size are (x - mean) / std to the bit, next to one that does not."""
    images = [draw_image(*size, dtype=image_dtype) for size in ((19, 41), (38, 20))]
    scale = 1 if image_dtype == torch.uint8 else 255
    mean, std = ([value / scale for value in values] for values in (MEAN, STD))
    arguments = {"mean": mean, "std": std, "min_size": 19, "dtype": dtype}
    out, _, shapes = preprocess([image.to(device) for image in images], **arguments)
    assert shapes == ((19, 41), (36, 19))
    expected = (images[0] - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    if INTERPRETED and dtype == torch.bfloat16:  # Triton's interpreter rounds to another neighbour
        torch.testing.assert_close(out[0, :, :19, :41].cpu(), expected.to(dtype), rtol=2**-7, atol=0)
    else:
        assert torch.equal(out[0, :, :19, :41].cpu(), expected.to(dtype))
    assert (out[0, :, 19:] == 0).all()
    assert (out[0, :, :, 41:] == 0).all()


_CASES = {
    "enlarged": {"min_size": 31},
    "reduced": {"min_size": 9},
    "reduced, not antialiased": {"min_size": 9, "antialias": False},
    "enlarged, not antialiased": {"min_size": 31, "antialias": False},
    "one axis": {"inputs": ((24, 300),), "min_size": 24, "max_size": 299},
    "HWC, BGR": {"layout": "HWC", "channels": "BGR", "min_size": 17, "mean": DETECTRON_MEAN, "std": DETECTRON_STD},
    "three images, float16": {
        "inputs": ((23, 37), (40, 11), (16, 16)),
        "min_size": 16,
        "max_size": 30,
        "divisor": 4,
        "dtype": torch.float16,
    },
    "bfloat16, padded size": {"min_size": 12, "padded_size": (14, 40), "dtype": torch.bfloat16},
    "float32 image": {"image_dtype": torch.float32, "min_size": 12, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)},
    "float16 image": {"image_dtype": torch.float16, "min_size": 30, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)},
    "several tiles": {"inputs": ((5, 400),), "min_size": 6, "divisor": 1},
    "many taps": {"inputs": ((40, 30),), "min_size": 2, "divisor": 1},
    "one pixel": {"inputs": ((1, 1), (1, 9)), "min_size": 2, "divisor": 1},
}
# By name: asserts that a small call of one variant of the kernel agrees with the oracle.
VARIANTS = {name: partial(check_preprocess, **arguments) for name, arguments in _CASES.items()}
VARIANTS |= {
    f"unchanged, {str(image_dtype).removeprefix('torch.')} to {str(dtype).removeprefix('torch.')}": partial(
        check_unchanged, dtype=dtype, image_dtype=image_dtype
    )
    for image_dtype in (torch.uint8, torch.float32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
}
