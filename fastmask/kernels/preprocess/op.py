"""The operator `fastmask::preprocess`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import Size, register
from fastmask.kernels.preprocess.forward import launch_preprocess
from fastmask.kernels.preprocess.reference import preprocess_reference


class PreprocessSpec(NamedTuple):
    """The settings of `preprocess`, as its public function documents them."""

    height: Size  # of the padded images
    width: Size
    mean: Sequence[float]
    std: Sequence[float]
    channels: str
    antialias: bool
    dtype: torch.dtype

    def empty_outputs(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The padded images and their sizes, uninitialised."""
        device, shape = images[0].device, (len(images), 3, self.height, self.width)
        out = torch.empty(shape, dtype=self.dtype, device=device, memory_format=torch.channels_last)
        return out, torch.empty((len(images), 2), dtype=torch.int64, device=device)


preprocess_op = register(
    "preprocess(Tensor[] images, SymInt[] sizes, *spec) -> (Tensor, Tensor)",
    reference=preprocess_reference,
    launch=launch_preprocess,
    fake=lambda images, _sizes, spec: spec.empty_outputs(images),
    spec=PreprocessSpec,
)
