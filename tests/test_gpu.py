"""Properties that only a GPU shows: no host-device synchronisation, CUDA graphs, more than 2^31 elements."""

from dataclasses import replace

import pytest
import torch

from benchmarks.harness.operators import operators
from fastmask.kernels._runtime import INTERPRETED
from models import preprocess
from models.config import KeypointHeadConfig
from models.network.mask_rcnn import MaskRCNN
from models.presets import PRESETS

pytestmark = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")


def capture(run):
    """A CUDA graph of `run`, and the tensors that a replay writes its results to."""
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


def assert_does_not_synchronise(run):
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def fixed_calls(name, seed):
    """The calls of an operator whose results have fixed shapes; there is at least one."""
    calls = [call for call in operators()[name].calls("cuda", seed) if not call.dynamic]
    assert calls
    return calls


@pytest.mark.parametrize("name", operators())
def test_operators_replay_in_a_cuda_graph(name):
    for call, other in zip(fixed_calls(name, 1), fixed_calls(name, 2), strict=True):
        graph, captured = capture(call.run)
        for tensor, values in zip(call.tensors(), other.tensors(), strict=True):
            tensor.data.copy_(values)
        graph.replay()
        for replayed, eager in zip(captured, other.run(), strict=True):
            assert torch.equal(replayed, eager), call.function


@pytest.mark.parametrize("name", operators())
def test_operators_do_not_synchronise(name):
    for call in fixed_calls(name, 1):
        assert_does_not_synchronise(call.run)


@pytest.mark.parametrize("name", [name for name, operator in operators().items() if operator.check_large])
def test_more_than_2_31_elements(name):
    operators()[name].check_large("cuda")


def detector():
    """A batch, and a function that detects in it."""
    torch.manual_seed(0)
    config = PRESETS["demo"].model
    model = MaskRCNN(replace(config, keypoint=KeypointHeadConfig(convs=1, channels=32))).cuda().eval()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8).cuda() for size in ((128, 160), (144, 128))]
    padded, sizes = preprocess.batch(images, config.input)

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


def test_a_detector_does_not_synchronise():
    assert_does_not_synchronise(detector()[1])
