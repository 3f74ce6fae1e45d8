"""Sampled anchors, which the losses predict again from their own pixels, against predictions of whole feature maps."""

import pytest
import torch

from models.config import AnchorConfig, RPNConfig
from models.network.rpn import RPN

pytestmark = pytest.mark.reference_only

CHANNELS = 6


def levels(rpn, batch=2):
    """A pyramid whose coarsest level is smaller than the patch that two convolutions read."""
    g = torch.Generator().manual_seed(0)
    sizes = [(11, 14), (6, 7), (3, 4), (2, 1), (1, 1)][-len(rpn.strides) :]
    return [torch.randn(batch, CHANNELS, *size, generator=g).requires_grad_() for size in sizes]


def whole_maps(rpn, features):
    """Logits and deltas of all anchors, with gradients."""
    hidden = [rpn.convs(x) for x in features]
    logits = [rpn.objectness(x).permute(0, 2, 3, 1).flatten(1) for x in hidden]
    deltas = [rpn.deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in hidden]
    return torch.cat(logits, 1), torch.cat(deltas, 1)


@pytest.mark.parametrize("convs", [0, 1, 2])
@pytest.mark.parametrize("strides", [(4, 8, 16, 32, 64), (16,)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_samples_are_predicted_as_on_whole_maps(convs, strides, memory_format):
    torch.manual_seed(1)
    sizes = (32, 64, 128, 256, 512)[: len(strides)]
    rpn = RPN(RPNConfig(anchors=AnchorConfig(sizes=sizes), convs=convs), CHANNELS, strides)
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = [x.detach().to(memory_format=memory_format).requires_grad_() for x in levels(rpn)]
    logits, deltas = whole_maps(rpn, features)
    predictions = rpn(features, [size * strides[0] for size in features[0].shape[2:]])
    torch.testing.assert_close(torch.cat(predictions.logits, 1), logits)
    torch.testing.assert_close(torch.cat(predictions.deltas, 1), deltas)

    everything = torch.arange(logits.shape[1]).flip(0)
    indices = torch.stack([everything, everything.roll(5)])  # every anchor, another one at each place of the two images
    sampled = rpn._predict(features, indices)
    expected = logits.gather(1, indices), deltas.take_along_dim(indices[..., None], 1)
    torch.testing.assert_close(sampled, expected, rtol=1e-5, atol=1e-5)

    weights = [torch.randn_like(value) for value in expected]
    inputs = [*features, *rpn.parameters()]
    gradients = torch.autograd.grad(sum((a * w).sum() for a, w in zip(sampled, weights, strict=True)), inputs)
    references = torch.autograd.grad(sum((a * w).sum() for a, w in zip(expected, weights, strict=True)), inputs)
    torch.testing.assert_close(gradients, references, rtol=1e-4, atol=1e-4)
