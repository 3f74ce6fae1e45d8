"""Preprocessing to the paper's size: the shorter side 800 pixels, the longer at most 1333 (He et al. 2017, §3.1).

Bytes: the pixels of the images read, the padded batch written. FLOPs: a multiply-add for each tap of the separable
filter, rows first, a subtraction and a division for each value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2.functional import resize

import fastmask
from benchmarks import model_preprocess
from benchmarks.harness import operators
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.timing import Implementation
from benchmarks.harness.workloads import DTYPES, generator
from benchmarks.reporting.results import FASTMASK
from models.config import InputConfig
from tests.oracles.preprocess import MEAN, STD, VARIANTS, check_preprocess

CONFIG = InputConfig()
OPTIONS = {"mean": MEAN, "std": STD, "min_size": CONFIG.min_size, "max_size": CONFIG.max_size}
COCO, HD = (480, 640), (1080, 1920)
# Sides of eight images of COCO.
BATCH = ((480, 640), (427, 640), (640, 480), (500, 375), (640, 427), (426, 640), (333, 500), (612, 612))


def compare(
    comparison: Comparison,
    name: str,
    sizes: Sequence[tuple[int, int]],
    *,
    layout: str = "CHW",
    dtype: str | None = None,
    **options: Unpack[CaseOptions],
) -> None:
    """Compare with torchvision's `resize` of uint8 images, and with `interpolate`; both then normalise and pad.

    Args:
        comparison: the fixture.
        name: of the case.
        sizes: height and width of each image.
        layout: of the images, `"CHW"` or `"HWC"`.
        dtype: of the result, by default the device's main dtype.
        options: see `CaseOptions`.
    """
    images = [_image(size).to(comparison.device) for size in sizes]
    if layout == "HWC":
        images = [image.permute(1, 2, 0).contiguous() for image in images]
    target = DTYPES[dtype or comparison.main_dtype]
    planes = [image.permute(2, 0, 1) for image in images] if layout == "HWC" else images

    def interpolate() -> Tensor:
        shapes = [fastmask.resized_shape(image.shape[1], image.shape[2], *limits) for image in planes]
        floats = [
            F.interpolate(image[None].float(), shape, mode="bilinear", antialias=True)[0]
            for image, shape in zip(planes, shapes, strict=True)
        ]
        return _pad(floats, comparison.device).to(target)

    def torchvision() -> Tensor:
        shapes = [list(fastmask.resized_shape(image.shape[1], image.shape[2], *limits)) for image in planes]
        resized = [resize(image, shape, antialias=True) for image, shape in zip(planes, shapes, strict=True)]
        return _pad(resized, comparison.device).to(target)

    limits = CONFIG.min_size, CONFIG.max_size
    providers: dict[str, Implementation] = {
        FASTMASK: lambda: fastmask.preprocess(images, **OPTIONS, layout=layout, dtype=target).images,
        "torchvision": torchvision,
        "interpolate": interpolate,
    }
    _run(comparison, name, providers, sizes, tolerance=1.1 / min(STD), antialias=True, **options)


def _image(size: tuple[int, int]) -> Tensor:
    return torch.randint(0, 256, (3, *size), generator=generator(), dtype=torch.uint8)


def _pad(images: Sequence[Tensor], device: str) -> Tensor:
    """Normalised and padded, with one operator for each step."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    height, width = (-(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (1, 2))
    padded = torch.zeros(len(images), 3, height, width, device=device).to(memory_format=torch.channels_last)
    for image, slot in zip(images, padded, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = (image - mean) / std
    return padded


def _run(
    comparison: Comparison,
    name: str,
    providers: dict[str, Implementation],
    sizes: Sequence[tuple[int, int]],
    *,
    tolerance: float,
    antialias: bool,
    **options: Unpack[CaseOptions],
) -> None:
    """Results agree within `tolerance`, and the rounding of half precision."""
    result = providers[FASTMASK]()
    assert isinstance(result, Tensor)
    allowed = tolerance + torch.finfo(result.dtype).eps * result.abs().max().item()

    def same(images: Tensor, expected: Tensor) -> bool:
        return bool((images.float() - expected.float()).abs().max() <= allowed)

    flops = 0
    for height, width in sizes:
        resized = fastmask.resized_shape(height, width, CONFIG.min_size, CONFIG.max_size)
        rows, columns = (
            math.ceil(2 * max(1.0, before / after if antialias else 1.0))
            for before, after in zip((height, width), resized, strict=True)
        )
        flops += 3 * resized[0] * (2 * rows * width + (2 * columns + 2) * resized[1])
    read = sum(3 * height * width for height, width in sizes)
    comparison.run(name, providers, same, bytes=read + result.nbytes, flops=flops, **options)


@pytest.mark.parametrize(
    ("size", "layout", "dtype"),
    parameters(
        [(COCO, "CHW", None), (COCO, "HWC", None), (COCO, "CHW", "bfloat16"), (HD, "CHW", None), (HD, "HWC", None)],
        quick=lambda size, *_: size == COCO,
    ),
)
def bench_one_image(comparison, size, layout, dtype):
    name = f"{size[0]} x {size[1]}, {layout}" + f", {dtype}" * (dtype is not None)
    compare(comparison, name, [size], layout=layout, dtype=dtype)


def bench_batch(comparison):
    compare(comparison, f"{len(BATCH)} images of COCO, CHW", BATCH)


def bench_detectors_transform(comparison):
    """The transform of torchvision's detectors: floating images, not antialiased, sizes rounded down."""
    images = [(_image(COCO) / 255).to(comparison.device)]
    mean, std = [value / 255 for value in MEAN], [value / 255 for value in STD]
    transform = GeneralizedRCNNTransform(CONFIG.min_size, CONFIG.max_size, mean, std).eval()
    options: dict[str, Any] = OPTIONS | {"mean": mean, "std": std, "rounding": "down", "antialias": False}
    providers: dict[str, Implementation] = {
        FASTMASK: lambda: fastmask.preprocess(images, **options).images,
        "torchvision": lambda: transform(images)[0].tensors,
    }
    name = "480 x 640, float32, torchvision's transform"
    _run(comparison, name, providers, [COCO], tolerance=1e-3, antialias=False)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1, 2, 4])
def bench_image_size(comparison, scale):
    size = (round(scale * COCO[0]), round(scale * COCO[1]))
    options: CaseOptions = {"kind": "scaling", "axis": "image, megapixels", "at": size[0] * size[1] / 1e6}
    compare(comparison, f"{size[0]} x {size[1]}", [size], **options)


def _calls(device: str, seed: int) -> list[operators.Call]:
    """One image, and a batch of two sizes, resized and not."""
    first, second = (
        torch.randint(0, 256, (3, *size), generator=generator(seed + index), dtype=torch.uint8).to(device)
        for index, size in enumerate(((9, 14), (17, 8)))
    )
    plain: dict[str, Any] = {"images": [first, second], "mean": list(MEAN), "std": list(STD), "divisor": 4}
    resized = {"min_size": 10, "max_size": 18, "rounding": "down", "antialias": True, "channels": "BGR"}
    one = {"images": first.permute(1, 2, 0), "mean": list(MEAN), "std": list(STD), "layout": "HWC"}
    return [
        operators.Call(fastmask.preprocess, plain),
        operators.Call(fastmask.preprocess, plain | resized | {"dtype": torch.bfloat16}),
        operators.Call(fastmask.preprocess, one | {"min_size": 6, "antialias": False, "padded_size": (8, 12)}),
    ]


def _compile_case(
    sizes: Sequence[tuple[int, int]], *, layout: str = "CHW", image_dtype: torch.dtype = torch.uint8, **options: Any
) -> operators.Call:
    shapes = [(3, *size) if layout == "CHW" else (*size, 3) for size in sizes]
    images = [operators.meta(*shape, dtype=image_dtype) for shape in shapes]
    arguments = OPTIONS | {"images": images, "layout": layout, "dtype": torch.bfloat16}
    return operators.Call(fastmask.preprocess, arguments | options)


def _check_random(draw: operators.Draw, device: str) -> None:
    """Random images, sizes and settings agree with the oracle."""
    inputs = [(draw.integer(1, 30), draw.integer(1, 40)) for _ in range(draw.integer(1, 3))]
    check_preprocess(
        device,
        inputs=inputs,
        min_size=draw.choice([None, draw.integer(1, 40)]),
        divisor=draw.integer(1, 8),
        rounding=draw.choice(["nearest", "down"]),
        antialias=draw.choice([False, True]),
        channels=draw.choice(["RGB", "BGR"]),
        layout=draw.choice(["CHW", "HWC"]),
        dtype=draw.choice([torch.float32, torch.float16, torch.bfloat16]),
    )


OPERATOR = operators.Operator(
    calls=_calls,
    compile_cases={
        "480x640 to 800x1067, CHW": partial(_compile_case, [COCO]),
        "480x640 to 800x1067, HWC": partial(_compile_case, [COCO], layout="HWC"),
        "480x640 to 800x1067, CHW, float32": partial(_compile_case, [COCO], dtype=torch.float32),
        "1080x1920 to 750x1333, CHW": partial(_compile_case, [HD]),
        "1080x1920 to 750x1333, CHW, not antialiased": partial(_compile_case, [HD], antialias=False),
        "8 images of COCO, CHW": partial(_compile_case, BATCH),
        "480x640 to 800x1066, float32, torchvision's transform": partial(
            _compile_case, [COCO], image_dtype=torch.float32, dtype=torch.float32, rounding="down", antialias=False
        ),
    },
    limits={
        "_preprocess_kernel": {
            "cuda": operators.Limit(104, loop_slow_paths=0),
            "hip": operators.Limit(56),
        },
    },
    check_random=_check_random,
    models=model_preprocess.MODELS,
    targets=model_preprocess.TARGETS,
    variants=VARIANTS,
)
