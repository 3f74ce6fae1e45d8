"""torchvision's detectors with random weights, made to detect something."""

import torch
from torchvision.models import detection

from benchmarks.harness.detectors import calibrate


def build(name, size, *, proposals, detections, **options):
    """An untrained detector that still gives `detections` of each image.

    Args:
        name: of torchvision's function.
        size: the shorter side of the images; the longer one may be twice that.
        proposals: before NMS and of each level; an eighth of them are left over after it.
        detections: of each image.
        options: of torchvision's constructor.
    """
    torch.manual_seed(0)
    model = getattr(detection, name)(
        weights=None,
        weights_backbone=None,
        num_classes=2 if name.startswith("keypoint") else 4,
        min_size=size,
        max_size=2 * size,
        rpn_pre_nms_top_n_test=proposals,
        rpn_post_nms_top_n_test=proposals // 8,
        box_score_thresh=0.0,
        box_detections_per_img=detections,
        **options,
    )
    g = torch.Generator().manual_seed(1)
    calibrate(model, torch.rand(3, size, size + 16, generator=g))
    return model.eval()
