"""What only a GPU can show: no host waits, CUDA graphs, more than 2^31 elements."""

from dataclasses import replace

import pytest
import torch
from test_roi_align import SCALES, draw_boxes, draw_pyramid

import fastmask
from fastmask.kernels._runtime import INTERPRETED
from models import preprocess as pictures
from models.config import KeypointHeadConfig
from models.network.mask_rcnn import MaskRCNN
from models.presets import PRESETS

pytestmark = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")


def operators():
    """Inputs, and a function of them that calls every operator whose output has a fixed shape."""
    features = [f.cuda().requires_grad_() for f in draw_pyramid([(32, 40), (16, 20)], layout=torch.channels_last)]
    boxes = draw_boxes(20, 2, 150, seed=1).cuda()
    masks = torch.rand(20, 14, 14, device="cuda")

    def run():
        pooled = fastmask.multiscale_roi_align(features, boxes, 7, SCALES)
        warped = fastmask.roi_warp(features[0], boxes, 7, 0.25)
        largest = fastmask.roi_pool(features[0], boxes, 7, 0.25)
        grads = torch.autograd.grad(pooled.sum() + warped.square().sum() + largest.sum(), features)
        few = fastmask.nms_padded(boxes[None, :, 1:], boxes[None, :, 1], 0.5, 8, counts=boxes[:1, 0].long() + 15)
        many = fastmask.nms_padded(boxes[None, :, 1:], boxes[None, :, 1], 0.5, 300, score_threshold=0.0)
        pasted = fastmask.paste_masks(masks, boxes[:, 1:], (120, 160))
        return [pooled, warped, largest, *grads, *few, *many, pasted]

    return boxes, run


def capture(run):
    """A CUDA graph of `run`, and what a replay leaves its results in."""
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


def test_operators_replay_in_a_cuda_graph():
    boxes, run = operators()
    graph, captured = capture(run)
    boxes.copy_(draw_boxes(20, 2, 150, seed=2))
    graph.replay()
    for replayed, eager in zip(captured, run(), strict=True):
        assert torch.equal(replayed, eager)


def detector():
    """A batch, and a function that detects in it."""
    torch.manual_seed(0)
    config = PRESETS["demo"].model
    model = MaskRCNN(replace(config, keypoint=KeypointHeadConfig(convs=1, channels=32))).cuda().eval()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8).cuda() for size in ((128, 160), (144, 128))]
    padded, sizes = pictures.batch(images, config.input)

    @torch.no_grad()
    def run():
        with torch.autocast("cuda", torch.bfloat16):
            return model(padded, sizes)

    return padded, run


def test_a_detector_replays_in_a_cuda_graph():
    padded, run = detector()
    graph, captured = capture(run)
    padded.copy_(padded.flip(3))
    graph.replay()
    eager = run()
    assert torch.equal(captured.counts, eager.counts)
    torch.testing.assert_close(captured.boxes, eager.boxes)


@pytest.mark.parametrize("make", [operators, detector])
def test_nothing_waits_for_the_host(make):
    _, run = make()
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_2_31_elements():
    side, channels = 2912, 256
    feature = torch.zeros(1, channels, side, side, dtype=torch.float16, device="cuda")
    feature = feature.to(memory_format=torch.channels_last)
    assert feature.numel() > 2**31
    feature[..., -16:, -16:] = 1
    box = torch.tensor([[0, side - 12, side - 12, side - 4, side - 4.0]], device="cuda")
    for pool in (fastmask.roi_align, fastmask.roi_pool):
        leaf = feature.detach().requires_grad_()
        out = pool(leaf, box, 2)
        assert out.eq(1).all()
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert grad[..., -16:, -16:].sum(dtype=torch.float32).item() == out.numel()
        assert not grad[..., : side // 2, :].any()
