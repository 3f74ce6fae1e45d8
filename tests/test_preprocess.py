"""preprocess against PyTorch's interpolate in float64, torchvision's resize and its detectors' transform."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import resize

from fastmask.kernels._runtime import INTERPRETED
from fastmask.kernels.preprocess import forward, preprocess, resized_shape
from tests.oracles.preprocess import MEAN, STD, check_preprocess, check_unchanged, draw_image

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORMAL = {"mean": MEAN, "std": STD}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

antialiased = pytest.mark.parametrize("antialias", [True, False])


@antialiased
@pytest.mark.parametrize("min_size", [5, 12, 23, 24, 31])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_matches_interpolate(device, antialias, min_size, channels):
    check_preprocess(device, min_size=min_size, antialias=antialias, channels=channels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("image_dtype", [torch.uint8, *DTYPES])
def test_dtypes(device, dtype, image_dtype):
    normal = NORMAL if image_dtype == torch.uint8 else {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    check_preprocess(device, min_size=16, image_dtype=image_dtype, dtype=dtype, **normal)


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_images_of_different_sizes(device, layout):
    inputs = ((23, 37), (37, 23), (8, 8), (30, 5))
    check_preprocess(device, inputs=inputs, layout=layout, min_size=14, max_size=20, divisor=8)
    check_preprocess(device, inputs=inputs, layout=layout, divisor=1)


@pytest.mark.reference_only
@antialiased
@pytest.mark.parametrize(("height", "width"), [(480, 640), (1080, 1920)])
def test_at_full_size(antialias, height, width):
    check_preprocess("cpu", inputs=((height, width),), min_size=800, max_size=1333, antialias=antialias)


@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_images_that_keep_their_size_are_not_resampled(device, dtype, image_dtype):
    check_unchanged(device, dtype, image_dtype)


def test_a_pixel_that_is_not_finite_stays_where_it_is(device):
    image = draw_image(6, 7, dtype=torch.float32)
    image[:, 2, 3], image[:, 5, 6] = NAN, INF
    out = preprocess(image.to(device), **PLAIN, divisor=1).images[0].cpu()
    torch.testing.assert_close(out, image, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [(60, 83), (45, 91)])
@pytest.mark.parametrize("min_size", [20, 45, 70] if not INTERPRETED else [20])
def test_differs_from_torchvision_by_its_rounding(device, size, min_size):
    """torchvision rounds to whole grey levels after each axis: half a level each, and their weights add up to 1."""
    image = draw_image(*size)
    out, _, (shape,) = preprocess(image.to(device), **PLAIN, min_size=min_size)
    expected = functional.resize(image, list(shape), antialias=True)
    difference = (out[0, :, : shape[0], : shape[1]].cpu() - expected).abs().max()
    assert 0.5 < difference <= 1.02 or shape == size


def test_without_antialiasing_equals_the_transform_of_torchvisions_detectors(device):
    images = [draw_image(*size, dtype=torch.float32) for size in ((40, 61), (53, 30))]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected, _ = GeneralizedRCNNTransform(25, 35, mean, std, size_divisible=16).eval()(images)
    out, sizes, shapes = preprocess(
        [image.to(device) for image in images],
        mean=mean,
        std=std,
        min_size=25,
        max_size=35,
        divisor=16,
        rounding="down",
        antialias=False,
    )
    assert list(shapes) == expected.image_sizes
    assert sizes.tolist() == [list(shape) for shape in shapes]
    torch.testing.assert_close(out.cpu(), expected.tensors, rtol=0, atol=2e-5)


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_agrees_with_torchvisions_resize(device, channels):
    """To the bit where nothing is resized, and up to torchvision's rounding where it is."""
    images = [draw_image(*size, seed) for seed, size in enumerate(((20, 31), (20, 28), (30, 40)))]
    options = {"mean": MEAN, "std": STD, "min_size": 20, "max_size": 31, "channels": channels, "divisor": 8}
    out, sizes, _ = preprocess([image.to(device) for image in images], **options)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert out.shape == (3, 3, 24, 32)
    for index, (image, (height, width)) in enumerate(zip(images, sizes.tolist(), strict=True)):
        resized = resize(image, [height, width], antialias=True)
        expected = ((resized.flip(0) if channels == "BGR" else resized) - mean) / std
        actual = out[index].cpu()
        if index < 2:
            assert (height, width) == image.shape[1:]
            assert torch.equal(actual[:, :height, :width], expected)
        else:
            torch.testing.assert_close(actual[:, :height, :width], expected, rtol=0, atol=1.02 / min(STD))
        assert not actual[:, height:].any()
        assert not actual[:, :, width:].any()


@pytest.mark.parametrize("n", [1, 7, 480, 641])
@pytest.mark.parametrize("m", [1, 5, 333, 800])
@pytest.mark.reference_only
def test_resized_shape_keeps_the_limits(n, m):
    for rounding in ("nearest", "down"):
        height, width = resized_shape(n, m, 300, 500, rounding=rounding)
        assert 1 <= min(height, width) <= 300
        assert max(height, width) <= 500
        assert min(height, width) >= 299 or max(height, width) >= 499
        assert resized_shape(m, n, 300, 500, rounding=rounding) == (width, height)


@pytest.mark.reference_only
def test_resized_shape_rounds():
    assert resized_shape(427, 640, 800, 1333) == (800, 1199)
    assert resized_shape(480, 641, 800) == (800, 1068)
    assert resized_shape(480, 641, 800, rounding="down") == (800, 1068)
    assert resized_shape(500, 333, 800) == (1201, 800)
    assert resized_shape(500, 334, 800) == (1198, 800)
    assert resized_shape(1, 1000, 8, 10) == (1, 10)


@pytest.mark.reference_only
def test_resized_shape_rounds_down_as_interpolate_does():
    """Also where the product is just below a whole number: 334 * (800 / 334) is 799.99..."""
    for height, width in [(500, 334), (427, 640), (1, 999), *((n, 2 * n + 3) for n in range(300, 400))]:
        scale = min(800 / min(height, width), 1333 / max(height, width))
        options = {"scale_factor": scale, "mode": "bilinear", "recompute_scale_factor": True}
        if min(height, width) * scale >= 1:
            expected = torch.nn.functional.interpolate(torch.empty(1, 1, height, width, device="meta"), **options)
            assert resized_shape(height, width, 800, 1333, rounding="down") == expected.shape[2:]


def test_forms_of_images(device):
    image = draw_image(9, 12).to(device)
    expected, sizes, shapes = preprocess([image, image], **NORMAL, min_size=10)
    assert shapes == ((10, 13), (10, 13))
    for images, layout in (
        ((image, image), "CHW"),
        (torch.stack([image, image]), "CHW"),
        (torch.stack([image, image]).permute(0, 2, 3, 1), "HWC"),
        ([image.permute(1, 2, 0), image.permute(1, 2, 0).contiguous()], "HWC"),
        ([image.permute(1, 2, 0).contiguous().permute(2, 0, 1), image.expand(2, -1, -1, -1)[1]], "CHW"),
    ):
        actual = preprocess(images, **NORMAL, min_size=10, layout=layout)
        assert torch.equal(actual.images, expected)
        assert torch.equal(actual.sizes, sizes)
    one = preprocess(image, **NORMAL, min_size=10)
    assert torch.equal(one.images, expected[:1])


def test_any_strides(device):
    """Slices, flipped axes' copies, and a stride of 0."""
    large = draw_image(30, 40).to(device)
    for image in (large[:, 3:20:2, 5:31:3], large.transpose(1, 2)[:, 1:12], large[:, :1, :].expand(3, 9, 40)):
        expected = preprocess(image.contiguous(), **NORMAL, min_size=11)
        actual = preprocess(image, **NORMAL, min_size=11)
        assert torch.equal(actual.images, expected.images)


def test_strides_beyond_the_kernels_numbers_are_copied(device, monkeypatch):
    image = draw_image(9, 12).to(device)
    expected = preprocess(image, **NORMAL, min_size=10)
    monkeypatch.setattr(forward, "MAX_STRIDE", 50)
    assert torch.equal(preprocess(image, **NORMAL, min_size=10).images, expected.images)


def test_more_images_than_one_launch_takes(device, monkeypatch):
    images = [draw_image(4 + index, 5, index).to(device) for index in range(5)]
    expected, expected_sizes, _ = preprocess(images, **NORMAL, divisor=4)
    monkeypatch.setattr(forward, "MAX_IMAGES", 2)
    out, sizes, _ = preprocess(images, **NORMAL, divisor=4)
    assert torch.equal(out, expected)
    assert torch.equal(sizes, expected_sizes)


def test_padding(device):
    image = draw_image(9, 12).to(device)
    inside = preprocess(image, **NORMAL, divisor=1).images
    for options, size in (
        ({}, (32, 32)),
        ({"divisor": 5}, (10, 15)),
        ({"padded_size": (9, 12)}, (9, 12)),
        ({"padded_size": (11, 300)}, (11, 300)),
    ):
        out = preprocess(image, **NORMAL, **options).images
        assert torch.equal(out, torch.nn.functional.pad(inside, (0, size[1] - 12, 0, size[0] - 9)))


def test_bitwise_repeatable(device):
    images = [draw_image(9, 12).to(device), draw_image(17, 8).to(device)]
    first, second = (preprocess(images, **NORMAL, min_size=10, dtype=torch.bfloat16).images for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_changes_nothing(device):
    image = draw_image(9, 12).to(device)
    outside = preprocess(image, **NORMAL, min_size=10)
    with torch.autocast(device, torch.bfloat16):
        inside = preprocess(image, **NORMAL, min_size=10)
    assert torch.equal(inside.images, outside.images)


@antialiased
def test_opcheck(device, antialias):
    images = [draw_image(9, 12).to(device), draw_image(17, 8).to(device)]
    for dtype in (torch.float32, torch.bfloat16):
        arguments = images, [10, 13, 17, 8], 20, 16, MEAN, STD, "BGR", antialias, dtype
        torch.library.opcheck(torch.ops.fastmask.preprocess.default, arguments)


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(lambda image: preprocess([image, image], **NORMAL, min_size=10), fullgraph=True)
    for size in ((9, 12), (17, 8)):
        image = draw_image(*size).to(device)
        actual, expected = compiled(image), preprocess([image, image], **NORMAL, min_size=10)
        assert torch.equal(actual.images, expected.images)
        assert torch.equal(actual.sizes, expected.sizes)
        assert actual.shapes == expected.shapes


def test_fake_tensors():
    with FakeTensorMode():
        images = [torch.empty(3, 480, 640, dtype=torch.uint8), torch.empty(3, 1080, 1920, dtype=torch.uint8)]
        out, sizes, shapes = preprocess(images, **NORMAL, min_size=800, max_size=1333, dtype=torch.bfloat16)
    assert (out.shape, out.dtype) == ((2, 3, 800, 1344), torch.bfloat16)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (sizes.shape, sizes.dtype) == ((2, 2), torch.int64)
    assert shapes == ((800, 1067), (750, 1333))


def test_has_no_gradient(device):
    image = draw_image(9, 12, dtype=torch.float32).to(device).requires_grad_()
    assert not preprocess(image, **NORMAL, min_size=10).images.requires_grad


class Preprocess(torch.nn.Module):
    def forward(self, image):
        return preprocess(image, **NORMAL, min_size=10).images


def test_symbolic_tracing_records_the_public_function(device):
    traced = torch.fx.symbolic_trace(Preprocess())
    assert preprocess in {node.target for node in traced.graph.nodes}
    image = draw_image(9, 12).to(device)
    assert torch.equal(traced(image), Preprocess()(image))


IMAGE = draw_image(5, 6)


@pytest.mark.parametrize(
    ("error", "message", "images", "options"),
    [
        (ValueError, "images: expected at least one, got none", [], {}),
        (TypeError, "images: expected a sequence of Tensors, got 7", 7, {}),
        (TypeError, "images: expected a Tensor, got array", [IMAGE.numpy()], {}),
        (ValueError, r"images: expected \[3, H, W\], got \[5, 6\]", IMAGE[0], {}),
        (ValueError, r"images: expected \[3, H, W\], got \[5, 6, 3\]", IMAGE.permute(1, 2, 0), {}),
        (ValueError, r"images: expected \[H, W, 3\], got \[3, 5, 6\]", IMAGE, {"layout": "HWC"}),
        (ValueError, r"images: expected sides of 1 .*, got \[3, 0, 6\]", IMAGE[:, :0], {}),
        (TypeError, "images: expected uint8, .*got torch.int64", IMAGE.long(), {}),
        (TypeError, "images: expected uint8, .*got torch.float64", IMAGE.double(), {}),
        (TypeError, "images: expected one dtype, got torch.uint8 and torch.float32", [IMAGE, IMAGE.float()], {}),
        (ValueError, "images: expected on cpu like the first, got meta", [IMAGE, IMAGE.to("meta")], {}),
        (TypeError, "images: expected a dense tensor", [IMAGE.float().to_sparse()], {}),
        (ValueError, "mean: expected three numbers, got", IMAGE, {"mean": (1.0, 2.0)}),
        (TypeError, "mean: expected a number, got 'a'", IMAGE, {"mean": (1.0, 2.0, "a")}),
        (TypeError, "mean: expected a sequence of three numbers, got 0.5", IMAGE, {"mean": 0.5}),
        (ValueError, "std: expected a positive finite number, got 0", IMAGE, {"std": (1.0, 2.0, 0.0)}),
        (ValueError, "min_size: expected at least 1, got 0", IMAGE, {"min_size": 0}),
        (TypeError, "min_size: expected an int, got 2.5", IMAGE, {"min_size": 2.5}),
        (ValueError, "max_size: expected at least 1, got -1", IMAGE, {"min_size": 1, "max_size": -1}),
        (ValueError, "max_size: expected None without min_size, got 9", IMAGE, {"max_size": 9}),
        (ValueError, "rounding: expected .*, got 'up'", IMAGE, {"rounding": "up"}),
        (TypeError, "antialias: expected a bool, got 'yes'", IMAGE, {"antialias": "yes"}),
        (ValueError, "channels: expected .*, got 'GBR'", IMAGE, {"channels": "GBR"}),
        (ValueError, "layout: expected .*, got 'NHWC'", IMAGE, {"layout": "NHWC"}),
        (ValueError, "divisor: expected at least 1, got 0", IMAGE, {"divisor": 0}),
        (ValueError, r"padded_size: expected at least \(5, 6\), got \(5, 5\)", IMAGE, {"padded_size": (5, 5)}),
        (TypeError, "padded_size: expected two ints", IMAGE, {"padded_size": 5}),
        (TypeError, "dtype: expected float32, .*got torch.float64", IMAGE, {"dtype": torch.float64}),
        (ValueError, "min_size: expected sides below 2.24", IMAGE, {"min_size": 2**24}),
    ],
)
def test_bad_arguments_are_named(error, message, images, options):
    with pytest.raises(error, match=message):
        preprocess(images, **NORMAL | options)
