"""Published figures, shown beside fastmask's. Other machines and software made them; no ratio includes them."""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "[He et al. 2017](https://arxiv.org/abs/1703.06870)"
DETECTRON2 = "[detectron2's model zoo](https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md)"
D2_NOTES = (
    "[detectron2's benchmarks](https://github.com/facebookresearch/detectron2/blob/main/docs/notes/benchmarks.md)"
)
NVIDIA = (
    "[NVIDIA DeepLearningExamples]"
    "(https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Segmentation/MaskRCNN)"
)
MLPERF = "[MLPerf Training 3.0](https://github.com/mlcommons/training_results_v3.0)"

PAPER_MS = 200  # per image: "about 200ms per frame on a GPU", 5 images/s


@dataclass(frozen=True)
class Latency:
    """The latency of one image, alone in its batch."""

    model: str  # the preset's name
    device: str
    ms: float
    label: str  # short, for a plot
    source: str
    note: str = ""


@dataclass(frozen=True)
class Throughput:
    """The throughput of training."""

    model: str
    device: str
    gpus: int
    images_s: float  # of all GPUs
    source: str
    note: str = ""


INFERENCE = (
    Latency("R-101-FPN", "M40", 195 + 15, "paper, M40", PAPER, "15 ms of them resizing on the CPU"),
    Latency("R-101-C4", "M40", 400, "paper, M40", PAPER, '"~400ms"'),
    Latency("R-50-FPN", "V100", 43, "detectron2, V100", DETECTRON2),
    Latency("R-101-FPN", "V100", 56, "detectron2, V100", DETECTRON2),
    Latency("X-101-FPN", "V100", 103, "detectron2, V100", DETECTRON2, "32x8d"),
    Latency("R-101-C4", "V100", 145, "detectron2, V100", DETECTRON2),
    Latency("R-50-FPN-keypoint", "V100", 66, "detectron2, V100", DETECTRON2),
    Latency("R-50-FPN", "A100", 34.9, "NVIDIA, A100", NVIDIA, "fp16"),
)

TRAINING = (
    Throughput("R-50-FPN", "not named", 8, 16 / 0.72, PAPER, "0.72 s for 16 images"),
    Throughput("R-101-FPN", "V100", 8, 16 / 0.340, DETECTRON2, "0.340 s for 16 images"),
    Throughput("R-50-FPN", "V100", 8, 62, D2_NOTES, "detectron2"),
    Throughput("R-50-FPN", "V100", 8, 53, D2_NOTES, "mmdetection"),
    Throughput("R-50-FPN", "V100", 8, 19, D2_NOTES, "Detectron"),
    Throughput("R-50-FPN", "V100", 8, 14, D2_NOTES, "matterport"),
    Throughput("R-50-FPN", "A100", 1, 24, NVIDIA, "batch 12, AMP"),
    Throughput("R-50-FPN", "H100", 8, 1436, MLPERF, "slowest of its 8-GPU machines"),
    Throughput("R-50-FPN", "H100", 8, 1575, MLPERF, "fastest of its 8-GPU machines"),
)
