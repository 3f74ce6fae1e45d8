"""RoIAlign as an operator of PyTorch: registration, compilation, fake tensors, autocast, tracing, wrong arguments."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask import multiscale_roi_align, roi_align
from fastmask.kernels._runtime import INTERPRETED
from fastmask.kernels.roi_align.levels import area_thresholds
from fastmask.kernels.roi_align.op import RoIAlignSpec
from tests.oracles.roi_align import SCALES, draw_boxes, draw_pyramid

NAN = math.nan


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_operators_are_registered_in_full(reduction, layout, device):
    spec = RoIAlignSpec(2, 3, SCALES, sampling_ratio=2, aligned=False, reduction=reduction)
    features = [f.to(device) for f in draw_pyramid([(6, 7), (3, 4)], layout=layout)]
    boxes = draw_boxes(3, 2, 24, seed=6).to(device)
    leaves = [feature.requires_grad_() for feature in features]
    torch.library.opcheck(torch.ops.fastmask.roi_align.default, (leaves, boxes, *spec))
    out, argmax = torch.ops.fastmask.roi_align(features, boxes, *spec)
    grad = torch.ones_like(out).requires_grad_(reduction == "mean")
    last = layout == torch.channels_last
    arguments = (grad, boxes, argmax, [2, 6, 7, 3, 4], last, *spec)
    torch.library.opcheck(torch.ops.fastmask.roi_align_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_forward_and_backward_compile_to_one_graph(dynamic, device):
    def pool(features, boxes):
        return multiscale_roi_align(features, [boxes, boxes + 1], (2, 2), SCALES).square().sum()

    compiled = torch.compile(pool, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes, k in (([(6, 7), (3, 4)], 2), ([(8, 7), (4, 4)], 3)):
        features = [f.to(device).requires_grad_() for f in draw_pyramid(sizes)]
        boxes = draw_boxes(k, 2, 24, seed=k)[:, 1:].to(device)
        expected, actual = pool(features, boxes), compiled(features, boxes)
        assert torch.equal(actual, expected)
        for a, b in zip(torch.autograd.grad(actual, features), torch.autograd.grad(expected, features), strict=True):
            assert torch.equal(a, b)


def test_runs_on_fake_tensors():
    with FakeTensorMode():
        features = [torch.empty(2, 5, 6, 7, dtype=torch.bfloat16, requires_grad=True) for _ in "ab"]
        out = multiscale_roi_align(features, torch.empty(9, 5), 7, [1 / 4, 1 / 8])
        assert (out.shape, out.dtype) == ((9, 5, 7, 7), torch.bfloat16)
        assert [g.shape for g in torch.autograd.grad(out.sum(), features)] == [(2, 5, 6, 7)] * 2


def test_autocast_keeps_half_precision_and_the_boxes_in_float32(device):
    features = [f.to(device) for f in draw_pyramid([(6, 7), (3, 4)])]
    boxes = draw_boxes(3, 2, 24, seed=8).to(device)
    with torch.autocast(device, torch.bfloat16):
        half = multiscale_roi_align([f.bfloat16() for f in features], boxes, 2, SCALES)
        mixed = multiscale_roi_align([features[0], features[1].bfloat16()], boxes, 2, SCALES)
    assert half.dtype == torch.bfloat16
    assert mixed.dtype == torch.float32
    exact = multiscale_roi_align([f.bfloat16().float() for f in features], boxes, 2, SCALES)
    torch.testing.assert_close(half.float(), exact, rtol=2**-7, atol=0)  # rounded once
    # An index that bfloat16 cannot hold: 257 would become 256.
    many = torch.arange(258.0, device=device).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    lists = [torch.empty(0, 4, device=device, dtype=torch.bfloat16)] * 257
    lists.append(torch.tensor([[0, 0, 1, 1]], device=device, dtype=torch.bfloat16))
    assert roi_align(many, lists, 1).item() == 257


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("rounding", ["torchvision", "detectron2"])
def test_the_default_device_makes_no_difference(rounding, reduction, device):
    features = [f.to(device).requires_grad_() for f in draw_pyramid([(6, 7), (3, 4)])]
    boxes = draw_boxes(3, 2, 24, seed=8, dtype=torch.float64).to(device)
    area_thresholds.cache_clear()
    runs = []
    for default in (device, "meta"):
        with torch.device(default):
            pooled = [
                multiscale_roi_align(
                    features,
                    boxes,
                    2,
                    SCALES,
                    ratio,
                    canonical_box_size=24,
                    reduction=reduction,
                    level_rounding=rounding,
                )
                for ratio in (0, 2)
            ]
            pooled.append(roi_align(features[0], [boxes[:, 1:]], 2, reduction=reduction))
            runs.append([*pooled, *torch.autograd.grad(sum(out.sum() for out in pooled), features)])
        area_thresholds.cache_clear()
    assert all(map(torch.equal, *runs))


class Pooler(torch.nn.Module):
    """Pools from two levels and from the first alone."""

    def forward(self, fine, coarse, boxes):
        pooled = multiscale_roi_align([fine, coarse], boxes, 2, SCALES, canonical_box_size=24)
        return pooled + roi_align(fine, boxes, output_size=2, spatial_scale=0.25)


def test_is_recorded_by_symbolic_tracing(device):
    features = [f.to(device) for f in draw_pyramid([(6, 7), (3, 4)])]
    boxes = draw_boxes(3, 2, 24, seed=8).to(device)
    traced = torch.fx.symbolic_trace(Pooler())
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called[:2] == [multiscale_roi_align, roi_align]
    assert torch.equal(traced(*features, boxes), Pooler()(*features, boxes))


F, B = torch.zeros(2, 3, 4, 4), torch.zeros(1, 5)


@pytest.mark.parametrize(
    ("error", "named", "call"),
    [
        (ValueError, "features: expected at least one level", lambda: multiscale_roi_align([], B, 2, [])),
        (TypeError, "input: expected float16", lambda: roi_align(F.int(), B, 2)),
        (ValueError, r"input: expected \[N, C, H, W\]", lambda: roi_align(F[0], B, 2)),
        (ValueError, "same N and C", lambda: multiscale_roi_align([F, F[:1]], B, 2, SCALES)),
        (
            ValueError,
            "features: expected all levels on cpu",
            lambda: multiscale_roi_align([F, F.to("meta")], B, 2, SCALES),
        ),
        (ValueError, r"boxes: expected \[K, 5\]", lambda: roi_align(F, B[:, :4], 2)),
        (ValueError, r"boxes: expected a list of \[L, 4\]", lambda: roi_align(F, [B], 2)),
        (
            ValueError,
            "boxes: expected at most one tensor per image, 2",
            lambda: roi_align(F, [B[:, :4]] * 3, 2),
        ),
        (TypeError, "boxes: expected a floating", lambda: roi_align(F, B.int(), 2)),
        (ValueError, "boxes: expected on cpu", lambda: roi_align(F, B.to("meta"), 2)),
        (ValueError, "output_size: expected at least 1", lambda: roi_align(F, B, (2, 0))),
        (ValueError, "spatial_scale: expected a positive finite", lambda: roi_align(F, B, 2, -0.5)),
        (ValueError, "spatial_scales: expected one for each of 2", lambda: multiscale_roi_align([F, F], B, 2, [0.25])),
        (ValueError, "finest level first", lambda: multiscale_roi_align([F, F], B, 2, SCALES[::-1])),
        (
            ValueError,
            "consecutive powers of 2",
            lambda: multiscale_roi_align([F, F], B, 2, [1 / 4, 1 / 16], level_rounding="detectron2"),
        ),
        (ValueError, 'reduction: expected "mean" or "max"', lambda: roi_align(F, B, 2, reduction="sum")),
        (
            ValueError,
            'level_rounding: expected "torchvision" or "detectron2"',
            lambda: multiscale_roi_align([F], B, 2, [1], level_rounding="mmdet"),
        ),
        (
            ValueError,
            "canonical_box_size: expected a positive",
            lambda: multiscale_roi_align([F], B, 2, [1], canonical_box_size=0),
        ),
        (TypeError, "features: expected a sequence of Tensors", lambda: multiscale_roi_align(F, B, 2, [1])),
        (TypeError, "input: expected a Tensor, got None", lambda: roi_align(None, B, 2)),
        (TypeError, "input: expected a Tensor, got .*ndarray", lambda: roi_align(F.numpy(), B, 2)),
        (TypeError, "input: expected a dense tensor, got torch.sparse_coo", lambda: roi_align(F.to_sparse(), B, 2)),
        (TypeError, "boxes: expected a sequence of Tensors", lambda: roi_align(F, B.numpy(), 2)),
        (TypeError, "boxes: expected a Tensor", lambda: roi_align(F, [[0, 0, 1, 1]], 2)),
        (TypeError, "boxes: expected a dense tensor", lambda: roi_align(F, B.to_sparse(), 2)),
        (TypeError, "boxes: expected a floating dtype", lambda: roi_align(F, B.to(torch.complex64), 2)),
        (TypeError, "output_size: expected an int, got 2.0", lambda: roi_align(F, B, 2.0)),
        (TypeError, "output_size: expected two ints", lambda: roi_align(F, B, "22")),
        (ValueError, "output_size: expected two ints", lambda: roi_align(F, B, (2, 2, 2))),
        (ValueError, r"output_size: expected fewer than 2\^31", lambda: roi_align(F, B, (1 << 15, 1 << 15))),
        (TypeError, "spatial_scale: expected a number", lambda: roi_align(F, B, 2, "1")),
        (ValueError, "spatial_scale: expected a number in the range", lambda: roi_align(F, B, 2, 10**400)),
        (TypeError, "spatial_scales: expected a number", lambda: multiscale_roi_align([F], B, 2, [None])),
        (TypeError, "sampling_ratio: expected an int, got 2.5", lambda: roi_align(F, B, 2, 1.0, 2.5)),
        (ValueError, r"sampling_ratio: expected fewer than 2\^31", lambda: roi_align(F, B, 2, 1.0, 1 << 16)),
        (TypeError, "aligned: expected a bool", lambda: roi_align(F, B, 2, 1.0, 2, "yes")),
        (
            TypeError,
            "canonical_level: expected an int",
            lambda: multiscale_roi_align([F], B, 2, [1], canonical_level=4.0),
        ),
    ],
)
def test_bad_arguments_are_named(error, named, call):
    with pytest.raises(error, match=named):
        call()


@pytest.mark.reference_only
@pytest.mark.parametrize("index", [-1, 2, NAN])
def test_image_indices_outside_the_batch_raise(index):
    boxes = torch.tensor([[0, 0, 0, 2, 2], [index, 0, 0, 2, 2.0]])
    with pytest.raises(ValueError, match=r"boxes: expected image indices in \[0, 2\).* in row 1"):
        roi_align(F, boxes, 2)


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="the reference raises instead")
def test_kernels_pool_zeros_for_image_indices_outside_the_batch():
    device = "cpu" if INTERPRETED else "cuda"
    boxes = torch.tensor([[-1, 0, 0, 2, 2], [2, 0, 0, 2, 2], [NAN, 0, 0, 2, 2], [1, 0, 0, 2, 2.0]], device=device)
    out = roi_align(torch.ones(2, 3, 4, 4, device=device), boxes, 2)
    assert out.amax((1, 2, 3)).tolist() == [0, 0, 0, 1]
