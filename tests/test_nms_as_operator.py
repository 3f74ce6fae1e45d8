"""NMS as an operator of PyTorch: registration, compilation, fake tensors, tracing, wrong arguments."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask.kernels.nms import batched_nms, nms, nms_padded
from tests.oracles.nms import draw_candidates

NAN = float("nan")

# Lanes outside a tile hold boxes without area; the interpreter divides in NumPy, which warns of 0 / 0.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def test_operators_are_registered_in_full(device):
    boxes, scores = (t.to(device) for t in draw_candidates(70, 11))
    classes = torch.arange(70, device=device) % 3
    counts = torch.tensor([40], device=device)
    torch.library.opcheck(torch.ops.fastmask.nms.default, (boxes, scores, None, 0.4))
    torch.library.opcheck(torch.ops.fastmask.nms.default, (boxes, scores, classes, 0.4))
    one = boxes[None], scores[None]
    torch.library.opcheck(torch.ops.fastmask.nms_padded.default, (*one, None, None, 0.4, None, 9))
    torch.library.opcheck(torch.ops.fastmask.nms_padded.default, (*one, classes[None], counts, 0.4, 0.1, 9))


def test_compiles_to_one_graph(device):
    boxes, scores = (t.to(device) for t in draw_candidates(70, 12))
    classes = torch.arange(70, device=device) % 3

    def detect(boxes, scores, classes):
        kept = batched_nms(boxes, scores, classes, 0.4)
        best, count = nms_padded(boxes[None] * 2, scores[None], 0.4, 9, classes=classes[None])
        return boxes[nms(boxes, scores, 0.4)], scores[kept], best, count

    compiled = torch.compile(detect, fullgraph=True, backend="aot_eager")
    for n in (70, 61):
        arguments = boxes[:n], scores[:n], classes[:n]
        for actual, expected in zip(compiled(*arguments), detect(*arguments), strict=True):
            assert torch.equal(actual, expected)


def test_padded_runs_on_fake_tensors(device):
    with FakeTensorMode():
        boxes, scores = torch.rand(2, 70, 4, device=device), torch.rand(2, 70, device=device)
        indices, count = nms_padded(boxes, scores, 0.5, 100, counts=torch.ones(2, dtype=int, device=device))
    assert (indices.shape, indices.dtype, count.shape, count.dtype) == (
        (2, 100),
        torch.int64,
        (2,),
        torch.int64,
    )
    assert indices.device.type == count.device.type == torch.device(device).type


class Suppress(torch.nn.Module):
    def forward(self, boxes, scores, classes):
        indices, count = nms_padded(boxes[None], scores[None], 0.4, max_output=9, classes=classes[None])
        return nms(boxes, scores, 0.4), batched_nms(boxes, scores, classes, iou_threshold=0.4), indices, count


def test_symbolic_tracing_records_the_public_functions(device):
    traced = torch.fx.symbolic_trace(Suppress())
    targets = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {nms, batched_nms, nms_padded} <= targets
    boxes, scores = (t.to(device) for t in draw_candidates(70, 14))
    arguments = boxes, scores, torch.arange(70, device=device) % 3
    for actual, expected in zip(traced(*arguments), Suppress()(*arguments), strict=True):
        assert torch.equal(actual, expected)


B1, S1 = torch.rand(5, 4), torch.rand(5)
B2, S2 = torch.rand(2, 5, 4), torch.rand(2, 5)


@pytest.mark.parametrize(
    ("error", "named", "call"),
    [
        (ValueError, r"boxes: expected \[N, 4\], got \[5, 5\]", lambda: nms(torch.rand(5, 5), S1, 0.5)),
        (ValueError, r"boxes: expected \[N, 4\], got \[2, 5, 4\]", lambda: nms(B2, S2, 0.5)),
        (ValueError, r"scores: expected \[5\] to match boxes, got \[4\]", lambda: nms(B1, S1[:4], 0.5)),
        (ValueError, r"scores: expected \[5\] .*, got \[5, 1\]", lambda: nms(B1, S1[:, None], 0.5)),
        (TypeError, "boxes: expected a floating dtype, got torch.int64", lambda: nms(B1.long(), S1, 0.5)),
        (TypeError, "scores: expected a floating dtype, got torch.int64", lambda: nms(B1, S1.long(), 0.5)),
        (ValueError, "scores: expected on cpu like boxes, got meta", lambda: nms(B1, S1.to("meta"), 0.5)),
        (ValueError, r"idxs: expected \[5\] .*, got \[4\]", lambda: batched_nms(B1, S1, S1[:4], 0.5)),
        (ValueError, "idxs: expected on cpu", lambda: batched_nms(B1, S1, S1.to("meta"), 0.5)),
        (ValueError, r"iou_threshold: expected in \[0, 1\], got 1.5", lambda: nms(B1, S1, 1.5)),
        (ValueError, r"iou_threshold: expected in \[0, 1\], got nan", lambda: batched_nms(B1, S1, S1, NAN)),
        (ValueError, r"boxes: expected \[B, N, 4\], got \[5, 4\]", lambda: nms_padded(B1, S1, 0.5, 1)),
        (ValueError, r"classes: expected \[2, 5\]", lambda: nms_padded(B2, S2, 0.5, 1, classes=S2[0])),
        (ValueError, r"counts: expected \[2\]", lambda: nms_padded(B2, S2, 0.5, 1, counts=S2.long())),
        (TypeError, "counts: expected an integer", lambda: nms_padded(B2, S2, 0.5, 1, counts=S2[:, 0])),
        (TypeError, "counts: expected an integer", lambda: nms_padded(B2, S2, 0.5, 1, counts=S2[:, 0] > 0)),
        (ValueError, r"iou_threshold: expected in \[0, 1\], got 1.1", lambda: nms_padded(B2, S2, 1.1, 1)),
        (ValueError, r"iou_threshold: expected in \[0, 1\], got -0.1", lambda: nms_padded(B2, S2, -0.1, 1)),
        (ValueError, r"iou_threshold: expected in \[0, 1\], got nan", lambda: nms_padded(B2, S2, NAN, 1)),
        (ValueError, "max_output: expected at least 0, got -1", lambda: nms_padded(B2, S2, 0.5, -1)),
        (ValueError, "max_output: expected an int in .*, got 2147483648", lambda: nms_padded(B2, S2, 0.5, 2**31)),
        (ValueError, "max_output: expected fewer than 2.31 results", lambda: nms_padded(B2, S2, 0.5, 2**31 - 1)),
        (TypeError, r"max_output: expected an int, got 2\.5", lambda: nms_padded(B2, S2, 0.5, 2.5)),
        (TypeError, "boxes: expected a Tensor, got \\[\\[", lambda: nms(B1.tolist(), S1, 0.5)),
        (TypeError, "scores: expected a Tensor, got array", lambda: nms(B1, S1.numpy(), 0.5)),
        (TypeError, "boxes: expected a dense tensor, got torch.sparse_coo", lambda: nms(B1.to_sparse(), S1, 0.5)),
        (TypeError, "scores: expected a floating dtype of 16 bits", lambda: nms(B1, S1.to(torch.float8_e5m2), 0.5)),
        (TypeError, "idxs: expected a Tensor, got None", lambda: batched_nms(B1, S1, None, 0.5)),
        (TypeError, "idxs: expected a dtype of real", lambda: batched_nms(B1, S1, S1.to(torch.complex64), 0.5)),
        (TypeError, "iou_threshold: expected a number, got None", lambda: nms(B1, S1, None)),
        (TypeError, "iou_threshold: expected a number, got '0.5'", lambda: batched_nms(B1, S1, S1, "0.5")),
        (ValueError, "iou_threshold: expected a number in the range", lambda: nms(B1, S1, 10**400)),
        (TypeError, "score_threshold: expected a number", lambda: nms_padded(B2, S2, 0.5, 1, score_threshold="0")),
        (TypeError, "counts: expected a signed", lambda: nms_padded(B2, S2, 0.5, 1, counts=S2[:, 0].to(torch.uint16))),
        (ValueError, "boxes: expected a tensor with data", lambda: nms(B1.to("meta"), S1.to("meta"), 0.5)),
    ],
)
def test_bad_arguments_are_named(error, named, call):
    with pytest.raises(error, match=named):
        call()
