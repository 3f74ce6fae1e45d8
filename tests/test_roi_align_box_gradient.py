"""The gradient of RoIAlign with respect to the boxes: grid_sample's derivatives, an oracle in float64, gradcheck."""

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmask import multiscale_roi_align, roi_align, roi_warp
from fastmask.kernels._runtime import INTERPRETED
from fastmask.kernels.roi_align import geometry as roi_align_geometry
from fastmask.kernels.roi_align import reference as roi_align_reference
from fastmask.kernels.roi_align.op import RoIAlignSpec
from tests.oracles.roi_align import SCALES, draw_boxes, draw_pyramid
from tests.oracles.roi_align_box_gradient import CANONICAL, box_gradients

SAMPLING = [(2, False, "mean"), (0, True, "mean"), (2, True, "max"), (-1, False, "max")]  # ratio, aligned, reduction
SEEDS = range(1 if INTERPRETED else 4)


def split_boxes(boxes):
    """The images `[K, 1]` of boxes `[K, 5]`, and their corners `[K, 4]` as a leaf."""
    return boxes[:, :1], boxes[:, 1:].clone().requires_grad_()


def gradient_by_grid_sample(grad, feature, boxes, ratio, aligned, reduction):
    """The gradient of the corners of boxes by autograd, through the positions of samples and `grid_sample`."""
    images, corners = split_boxes(boxes)
    height, width = feature.shape[2:]
    total = 0
    for k, (x1, y1, x2, y2) in enumerate(corners - 0.5 if aligned else corners):
        positions, counts, inside = [], [], []
        for start, end, bins, extent in ((y1, y2, grad.shape[2], height), (x1, x2, grad.shape[3], width)):
            size = end - start if aligned else (end - start).clamp(min=1)
            count = ratio if ratio > 0 else int((size / bins).ceil())
            position = start + (torch.arange(bins * count, dtype=size.dtype) + 0.5) / (bins * count) * size
            inside.append((position >= -1) & (position <= extent))
            positions.append(2 * position / (extent - 1) - 1)
            counts.append(count)
        grid = torch.stack(torch.meshgrid(*positions, indexing="ij")[::-1], -1)[None]
        image = feature[int(images[k]), None]
        samples = torch.nn.functional.grid_sample(image, grid, padding_mode="border", align_corners=True)[0]
        samples = samples * (inside[0][:, None] & inside[1])
        samples = samples.unflatten(2, (-1, counts[1])).unflatten(1, (-1, counts[0])).movedim(2, 3).flatten(-2)
        total += ((samples.mean(-1) if reduction == "mean" else samples.amax(-1)) * grad[k]).sum()
    return torch.autograd.grad(total, corners)[0]


@pytest.mark.reference_only
@pytest.mark.parametrize(("ratio", "aligned", "reduction"), SAMPLING)
def test_the_oracle_agrees_with_grid_sample(ratio, aligned, reduction):
    (feature,) = draw_pyramid([(9, 13)], torch.float64)
    boxes = draw_boxes(12, 2, 12, seed=3, dtype=torch.float64)
    grad = torch.randn(12, 5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    options = {"ratio": ratio, "aligned": aligned, "reduction": reduction}
    actual, bound = box_gradients(grad, [feature], boxes, [0] * 12, scales=[1.0], **options)
    expected = gradient_by_grid_sample(grad, feature, boxes, **options)
    torch.testing.assert_close(actual[:, 1:], expected, rtol=0, atol=1e-12)
    assert actual[:, 0].eq(0).all()
    assert (bound >= actual.abs()).all()


@pytest.mark.parametrize(("ratio", "aligned", "reduction"), SAMPLING)
def test_gradcheck(ratio, aligned, reduction, device):
    for seed in SEEDS:
        features = [level.to(device) for level in draw_pyramid([(6, 7), (3, 4)], torch.float64, channels=2, seed=seed)]
        images, corners = split_boxes(draw_boxes(2, 2, 24, seed, dtype=torch.float64).to(device))
        features = [level.requires_grad_() for level in features]

        def pool(corners, *levels, images=images):
            boxes = torch.cat([images, corners], 1)
            return multiscale_roi_align(levels, boxes, 2, SCALES, ratio, aligned, reduction=reduction, **CANONICAL)

        assert torch.autograd.gradcheck(pool, (corners, *features), fast_mode=True)
        out = pool(corners, *features)
        grad = torch.randn_like(out).requires_grad_()
        if reduction == "mean":

            def gradient_of_features(grad, corners, pool=pool, features=features):
                return torch.autograd.grad(pool(corners, *features), features, grad, create_graph=True)

            assert torch.autograd.gradcheck(gradient_of_features, (grad, corners), fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_second_derivatives_that_do_not_exist_raise(reduction, device):
    (feature,) = draw_pyramid([(6, 7)], channels=2)
    leaf, boxes = feature.to(device).requires_grad_(), draw_boxes(2, 2, 7, seed=0).to(device).requires_grad_()
    out = roi_align(leaf, boxes, 2, 1.0, 2, reduction=reduction)
    of_feature, of_boxes = torch.autograd.grad(out.square().sum(), (leaf, boxes), create_graph=True)
    for inputs in (leaf, boxes):
        with pytest.raises(NotImplementedError, match="boxes: expected none that require grad for a second derivative"):
            torch.autograd.grad(of_boxes.sum(), inputs, retain_graph=True)
    if reduction == "max":
        with pytest.raises(NotImplementedError, match='reduction: expected "mean" for a second derivative, got "max"'):
            torch.autograd.grad(of_feature.sum(), boxes)


def test_the_derivative_at_a_pixel_centre_is_that_towards_larger_coordinates(device):
    # The one sample of a box two pixels wide lies at its centre, which moves by half as much as a corner.
    ramp = torch.tensor([0.0, 1, 4, 9], device=device).expand(1, 1, 4, 4)
    for shift, aligned in ((0.0, False), (0.5, True)):
        centres = torch.tensor([-1.5, -1, -0.5, 0, 0.25, 1, 2, 2.5, 3, 3.5, 4, 4.5], device=device)
        slopes = [0, 0, 0, 0, 1, 3, 5, 5, 0, 0, 0, 0]  # 0 at the border's pixel centres and beyond
        boxes = torch.zeros(len(centres), 5, device=device)
        boxes[:, 1], boxes[:, 3] = centres + shift - 1, centres + shift + 1
        boxes[:, 2], boxes[:, 4] = 1, 2
        boxes.requires_grad_()
        (grad,) = torch.autograd.grad(roi_align(ramp, boxes, 1, 1.0, 1, aligned).sum(), boxes)
        assert grad[:, 1].mul(2).tolist() == grad[:, 3].mul(2).tolist() == slopes
        assert grad[:, 2].eq(0).all()
        assert grad[:, 4].eq(0).all()


def test_a_size_raised_to_one_pixel_moves_with_the_start_alone(device):
    ramp = torch.arange(5.0, device=device).expand(1, 1, 5, 5)
    boxes = torch.tensor([[0, 2, 1, 3, 3], [0, 2, 1, 5, 3], [0, 6, 1, 4, 3.0]], device=device).requires_grad_()
    (grad,) = torch.autograd.grad(roi_align(ramp, boxes, 1, 0.5, 1).sum(), boxes)
    assert grad[:, 1].tolist() == [0.5, 0.25, 0.5]  # half a pixel of the feature map per image pixel
    assert grad[:, 3].tolist() == [0, 0.25, 0]
    (grad,) = torch.autograd.grad(roi_align(ramp, boxes, 1, 0.5, 1, True).sum(), boxes)
    assert grad[:, 1].tolist() == grad[:, 3].tolist() == [0.25] * 3


def test_boxes_in_a_list_and_in_half_precision(device):
    (feature,) = draw_pyramid([(11, 14)], channels=3)
    feature, boxes = feature.to(device), draw_boxes(4, 2, 28, seed=5).half().to(device)
    boxes = boxes[boxes[:, 0].argsort()].requires_grad_()
    (expected,) = torch.autograd.grad(roi_align(feature, boxes.float(), 2, 0.5, 2).sum(), boxes)
    assert expected.dtype == torch.float16
    (actual,) = torch.autograd.grad(roi_align(feature, boxes, 2, 0.5, 2).sum(), boxes)
    assert torch.equal(actual, expected)
    per_image = [boxes.detach()[boxes[:, 0] == image, 1:].requires_grad_() for image in range(2)]
    grads = torch.autograd.grad(roi_align(feature, per_image, 2, 0.5, 2).sum(), per_image)
    assert torch.equal(torch.cat(grads), expected[:, 1:])
    assert expected[:, 1:].any()


def test_autocast(device):
    (feature,) = draw_pyramid([(6, 7)])
    feature, boxes = feature.to(device).bfloat16(), draw_boxes(3, 2, 7, seed=8).to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out = roi_align(feature, boxes, 2, 1.0, 2)
    assert out.dtype == torch.bfloat16
    (actual,) = torch.autograd.grad(out.sum(), boxes)
    (expected,) = torch.autograd.grad(roi_align(feature.float(), boxes, 2, 1.0, 2).sum(), boxes)
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


class Recorder(TorchDispatchMode):
    """The names of fastmask's operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastmask":
            self.names.append(function.__name__.removesuffix(".default"))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("of_feature", "of_boxes", "expected"),
    [
        (True, False, ["roi_align_backward"]),
        (False, True, ["roi_align_box_backward"]),
        (True, True, ["roi_align_backward", "roi_align_box_backward"]),
    ],
)
def test_only_gradients_that_are_needed_are_computed(of_feature, of_boxes, expected, device):
    (feature,) = draw_pyramid([(6, 7)])
    feature = feature.to(device).requires_grad_(of_feature)
    boxes = draw_boxes(2, 2, 7, seed=1).to(device).requires_grad_(of_boxes)
    out = roi_align(feature, boxes, 2)
    with Recorder() as recorder:
        out.sum().backward()
    assert recorder.names == expected
    assert (feature.grad is not None, boxes.grad is not None) == (of_feature, of_boxes)


@pytest.mark.parametrize("of_boxes", [False, True])
def test_features_are_kept_only_for_the_gradient_of_boxes(of_boxes, device):
    leaf = draw_pyramid([(6, 7)])[0].to(device).requires_grad_()
    feature = leaf + 1
    kept = weakref.ref(feature)
    out = roi_align(feature, draw_boxes(2, 2, 7, seed=1).to(device).requires_grad_(of_boxes), 2)
    del feature
    gc.collect()
    assert (kept() is not None) == of_boxes
    out.sum().backward()
    assert leaf.grad is not None


def test_roi_warp_gives_boxes_no_gradient(device):
    (feature,) = draw_pyramid([(6, 7)])
    boxes = draw_boxes(2, 2, 7, seed=1).to(device).requires_grad_()
    assert not roi_warp(feature.to(device), boxes, 2).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_same_inputs_same_bits(reduction, device):
    features = [level.to(device) for level in draw_pyramid([(9, 13), (5, 7)], channels=3)]
    boxes = draw_boxes(3, 2, 40, seed=4).to(device).requires_grad_()
    out = multiscale_roi_align(features, boxes, 3, SCALES, reduction=reduction, **CANONICAL)
    runs = [torch.autograd.grad(out.sum(), boxes, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(runs[0], torch.autograd.grad(out, boxes, torch.ones_like(out))[0])  # not expanded


@pytest.mark.reference_only
@pytest.mark.parametrize(("ratio", "aligned", "reduction"), SAMPLING)
def test_chunks_of_samples_give_the_whole_result(ratio, aligned, reduction, monkeypatch):
    features = draw_pyramid([(9, 13), (5, 7)], torch.float64)
    boxes = draw_boxes(20, 2, 48, seed=9, dtype=torch.float64).requires_grad_()
    runs = []
    for samples, values in ((roi_align_geometry.MAX_SAMPLES, roi_align_reference.MAX_VALUES), (50, 70)):
        monkeypatch.setattr(roi_align_geometry, "MAX_SAMPLES", samples)
        monkeypatch.setattr(roi_align_reference, "MAX_VALUES", values)
        out = multiscale_roi_align(features, boxes, 3, SCALES, ratio, aligned, reduction=reduction, **CANONICAL)
        runs.append(torch.autograd.grad(out.square().sum(), boxes)[0])
    torch.testing.assert_close(*runs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_nothing_to_pool(reduction, device):
    for shape, boxes in (((2, 5, 6, 7), torch.zeros(0, 5)), ((2, 0, 6, 7), torch.zeros(1, 5))):
        leaf = boxes.to(device).requires_grad_()
        out = roi_align(torch.zeros(shape, device=device), leaf, 2, reduction=reduction)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert torch.equal(grad, torch.zeros_like(leaf))
    no_pixels = [torch.zeros(1, 2, 8, 8, device=device), torch.zeros(1, 2, 0, 4, device=device)]
    leaf = torch.tensor([[0, 0, 0, 900, 900.0]], device=device).requires_grad_()
    out = multiscale_roi_align(no_pixels, leaf, 2, [1 / 4, 1 / 8], reduction=reduction)
    assert torch.autograd.grad(out.sum(), leaf)[0].eq(0).all()


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="the reference raises instead")
def test_kernels_give_no_gradient_for_image_indices_outside_the_batch():
    device = "cpu" if INTERPRETED else "cuda"
    boxes = torch.tensor([[-1, 0, 0, 2, 2], [2, 0, 0, 2, 2], [float("nan"), 0, 0, 2, 2], [1, 0, 0, 2, 2.0]])
    leaf = boxes.to(device).requires_grad_()
    ramp = torch.arange(16.0, device=device).view(1, 1, 4, 4).expand(2, 3, 4, 4)
    (grad,) = torch.autograd.grad(roi_align(ramp, leaf, 2).sum(), leaf)
    assert grad.abs().amax(1).gt(0).tolist() == [False, False, False, True]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_operators_are_registered_in_full(reduction, layout, device):
    spec = RoIAlignSpec(2, 3, SCALES, sampling_ratio=2, aligned=False, reduction=reduction)
    features = [level.to(device).requires_grad_() for level in draw_pyramid([(6, 7), (3, 4)], layout=layout)]
    boxes = draw_boxes(3, 2, 24, seed=6).to(device).requires_grad_()
    torch.library.opcheck(torch.ops.fastmask.roi_align.default, (features, boxes, *spec))
    out, argmax = (output.detach() for output in torch.ops.fastmask.roi_align(features, boxes, *spec))
    levels = [level.detach() for level in features]
    arguments = (torch.ones_like(out), levels, boxes.detach(), argmax, *spec)
    torch.library.opcheck(torch.ops.fastmask.roi_align_box_backward.default, arguments)
    if reduction == "mean":
        grad = torch.ones_like(out).requires_grad_()
        arguments = (grad, boxes, argmax, [2, 6, 7, 3, 4], layout == torch.channels_last, *spec)
        torch.library.opcheck(torch.ops.fastmask.roi_align_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_forward_and_backward_compile_to_one_graph(dynamic, device):
    def pool(features, boxes):
        return multiscale_roi_align(features, [boxes, boxes + 1], (2, 2), SCALES).square().sum()

    compiled = torch.compile(pool, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes, k in (([(6, 7), (3, 4)], 2), ([(8, 7), (4, 4)], 3)):
        features = [level.to(device).requires_grad_() for level in draw_pyramid(sizes)]
        boxes = draw_boxes(k, 2, 24, seed=k)[:, 1:].to(device).requires_grad_()
        expected, actual = pool(features, boxes), compiled(features, boxes)
        assert torch.equal(actual, expected)
        inputs = [*features, boxes]
        grads = zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in grads)


def test_runs_on_fake_and_meta_tensors():
    with FakeTensorMode():
        features = [torch.empty(2, 5, 6, 7, dtype=torch.bfloat16) for _ in "ab"]
        boxes = torch.empty(9, 5, requires_grad=True)
        (grad,) = torch.autograd.grad(multiscale_roi_align(features, boxes, 7, [1 / 4, 1 / 8]).sum(), boxes)
        assert (grad.shape, grad.dtype) == (boxes.shape, torch.float32)
    feature, boxes = torch.empty(2, 5, 6, 7, device="meta"), torch.empty(9, 5, device="meta", requires_grad=True)
    (grad,) = torch.autograd.grad(roi_align(feature, boxes, 7).sum(), boxes)
    assert (grad.shape, grad.device.type) == (boxes.shape, "meta")
