"""Named configurations: the paper's models, one file for each part of the paper, and a small one for `make demo`."""

from models.config import TrainConfig
from models.presets.coco import COCO
from models.presets.demo import DEMO
from models.presets.keypoints import KEYPOINTS

PRESETS: dict[str, TrainConfig] = {**COCO, **KEYPOINTS, **DEMO}
