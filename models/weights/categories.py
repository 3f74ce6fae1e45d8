"""Categories of the data sets that published weights were trained on; label k of a model is `categories[k - 1]`."""

from __future__ import annotations

from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights, MaskRCNN_ResNet50_FPN_Weights

from models.structures import Category

# COCO's skeleton, of its person_keypoints annotations but counted from 0
_SKELETON = (
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12)),  # legs and hips
    *((5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10)),  # trunk and arms
    *((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),  # face, and down to the shoulders
)

# All 90 ids of COCO's annotations, of which ten are not in use: the classes of torchvision's weights
COCO_IDS = tuple(
    Category(id, name) for id, name in enumerate(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]) if id > 0
)
# The 80 in use: the classes of detectron2's weights
COCO = tuple(category for category in COCO_IDS if category.name != "N/A")
COCO_PERSON = (
    Category(1, "person", tuple(KeypointRCNN_ResNet50_FPN_Weights.COCO_V1.meta["keypoint_names"]), _SKELETON),
)


def categories_for(classes: int, keypoints: int | None) -> tuple[Category, ...]:
    """What a model's labels most likely mean, where its file does not say: COCO's, or numbers.

    Args:
        classes: how many, without the background.
        keypoints: of each object; none without a keypoint branch.
    """
    if (classes, keypoints) == (1, 17):
        return COCO_PERSON
    for known in (COCO, COCO_IDS):
        if classes == len(known) and keypoints is None:
            return known
    return tuple(Category(label, str(label)) for label in range(1, classes + 1))
