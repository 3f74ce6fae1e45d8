"""Swap fastmask's operators into torchvision's Mask R-CNN; print what changes in its detections, and in its time.

    python examples/accelerate_torchvision.py [--size 800 1088] [--repeat 3]

Weights are random, so the detections mean nothing, but there are a hundred of them and they must stay the same.
"""

import argparse
import time

import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import box_iou

from fastmask.integrations.torchvision import accelerate, restore


def best_time(model, images, repeat):
    """Detections, and the shortest of `repeat` calls in seconds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        with torch.inference_mode():
            detections = model(images)
        if images[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return detections[0], min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1088), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeat", type=int, default=2)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, box_score_thresh=0.0)
    model = model.eval().to(device)
    images = [torch.rand(3, *arguments.size, device=device)]

    before, time_before = best_time(model, images, arguments.repeat)
    accelerate(model)
    after, time_after = best_time(model, images, arguments.repeat)
    restore(model)

    print(f"detections: {len(before['boxes'])} before, {len(after['boxes'])} after")
    print(f"same labels: {torch.equal(before['labels'], after['labels'])}")
    print(f"smallest IoU of a box with itself: {box_iou(before['boxes'], after['boxes']).diag().min():.6f}")
    print(f"largest difference of a score: {(before['scores'] - after['scores']).abs().max():.2e}")
    print(f"largest difference of a mask's probability: {(before['masks'] - after['masks']).abs().max():.2e}")
    print(f"time after / time before, whole model on {device}: {time_after / time_before:.2f}")


if __name__ == "__main__":
    main()
