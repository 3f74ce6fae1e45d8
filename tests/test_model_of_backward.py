"""The static model of RoIAlign's gradient counts the windows that the kernel lists."""

import pytest
import torch

from benchmarks import model_pooling, model_roi_align_backward
from benchmarks.harness.operators import Launch
from benchmarks.harness.workloads import STRIDES, objects
from fastmask.kernels._runtime import INTERPRETED, pack_size, triton_dtype
from fastmask.kernels.roi_align.level_lists import list_boxes_by_level
from fastmask.kernels.roi_align.levels import scale_bits_of
from fastmask.kernels.roi_align.op import RoIAlignSpec
from fastmask.kernels.roi_align.tile_lists import BOXES_PER_STEP, TILE, WINDOW, list_windows_kernel
from tests.conftest import DEVICES

KERNEL_DEVICES = DEVICES if INTERPRETED else [device for device in DEVICES if device != "cpu"]
IMAGE, IMAGES, BOXES = (128, 160), 2, 40


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("bins", "ratio", "aligned"), [(7, 2, False), (14, 2, False), (7, 0, True)])
def test_windows_of_each_tile(monkeypatch, bins, ratio, aligned, device):
    boxes = tuple(objects(BOXES // IMAGES, image=IMAGE, seed=image) for image in range(IMAGES))
    monkeypatch.setattr(model_pooling, "boxes_of", lambda *_: boxes)
    rois = model_pooling.to_rois(boxes)
    levels = [(IMAGE[0] // stride, IMAGE[1] // stride) for stride in STRIDES]
    spec = RoIAlignSpec(bins, bins, model_pooling.SCALES, ratio, aligned, "mean")
    by_level, level_counts = list_boxes_by_level(rois.to(device), IMAGES, len(levels), spec.thresholds(rois.dtype))
    per_image = [-(-height // TILE) * -(-width // TILE) for height, width in levels]
    tiles = IMAGES * sum(per_image)
    arguments = {
        "boxes": rois.to(device),
        "sizes": tuple(pack_size(*level) for level in levels),
        "num_images": IMAGES,
        "scales": scale_bits_of(spec),
        "PH": bins,
        "PW": bins,
        "RATIO": ratio,
        "ALIGNED": aligned,
    }
    counts = torch.empty(tiles, dtype=torch.int32, device=device)
    list_windows_kernel[(tiles,)](
        by_level=by_level,
        level_counts=level_counts,
        windows=torch.empty(max(per_image) * BOXES * bins**2, dtype=torch.int32, device=device),
        starts=torch.empty(tiles, dtype=torch.int64, device=device),
        counts=counts,
        num_boxes=BOXES,
        first_tile=0,
        max_tiles=max(per_image),
        COMPUTE=triton_dtype(rois.dtype),
        TILE=TILE,
        WINDOW=WINDOW,
        STEP=BOXES_PER_STEP,
        **arguments,
    )
    by_size = counts.split([IMAGES * number for number in reversed(per_image)])  # the coarsest level comes first
    modelled = model_roi_align_backward._windows(Launch("list_windows_kernel", tiles, arguments)).counts
    assert modelled.sum() > BOXES
    assert torch.cat(by_size[::-1]).tolist() == modelled.tolist()
