"""fastmask's detector in a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from models.config import ModelConfig
from models.network.mask_rcnn import MaskRCNN
from models.structures import PaddedDetections


class GraphedMaskRCNN(MaskRCNN):
    """A detector in bfloat16 with one CUDA graph for each shape of the padded batch: one launch instead of thousands.

    The detections of a batch are overwritten by those of the next batch of its shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, PaddedDetections]] = {}

    def infer(self, images: Tensor, sizes: Tensor, *, compact: bool = False) -> PaddedDetections:
        assert not compact  # it synchronises, which a capture forbids
        if images.shape not in self.graphs:
            self.graphs[images.shape] = self._capture(images.clone(), sizes.clone())
        graph, graph_images, graph_sizes, detections = self.graphs[images.shape]
        graph_images.copy_(images)
        graph_sizes.copy_(sizes)
        graph.replay()
        return detections

    def _capture(self, images: Tensor, sizes: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, PaddedDetections]:
        # Weights cast to bfloat16 and cached before the capture would be freed while the graph still reads them.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            super().infer(images, sizes)  # compiles kernels, and allocates the workspaces of libraries
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                detections = super().infer(images, sizes)
        return graph, images, sizes, detections


def graphed(model: MaskRCNN) -> GraphedMaskRCNN:
    """A copy of the model, on the same device."""
    copy = GraphedMaskRCNN(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(next(model.parameters()).device).eval()
