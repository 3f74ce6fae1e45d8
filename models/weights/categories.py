"""The categories that published weights were trained on; label k of a model is `categories[k - 1]`."""

from __future__ import annotations

from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights, MaskRCNN_ResNet50_FPN_Weights

from models.structures import Category

# The skeleton of COCO's person_keypoints annotations, counted from 0
_SKELETON = (
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12)),  # legs and hips
    *((5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10)),  # trunk and arms
    *((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),  # face, and down to the shoulders
)

# The classes of torchvision's weights: all 90 ids of COCO's annotations, ten of which are unused
COCO_IDS = tuple(
    Category(id, name) for id, name in enumerate(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]) if id > 0
)
# The classes of detectron2's weights: the 80 ids in use
COCO = tuple(category for category in COCO_IDS if category.name != "N/A")
COCO_PERSON = (
    Category(1, "person", tuple(KeypointRCNN_ResNet50_FPN_Weights.COCO_V1.meta["keypoint_names"]), _SKELETON),
)


def categories_for(classes: int, keypoints: int | None) -> tuple[Category, ...]:
    """The categories that a model's labels most likely stand for, for files that do not hold them.

    Args:
        classes: number of classes, without the background.
        keypoints: number of keypoints of each object; None without a keypoint branch.

    Returns:
        COCO's categories if the numbers are those of COCO's models; otherwise categories whose names are the labels.
    """
    if (classes, keypoints) == (1, 17):
        return COCO_PERSON
    for known in (COCO, COCO_IDS):
        if classes == len(known) and keypoints is None:
            return known
    return tuple(Category(label, str(label)) for label in range(1, classes + 1))
