"""The inputs of the benchmarks: boxes of COCO's sizes, adversarial boxes, and the pixels that boxes cover."""

import pytest
import torch

from benchmarks.harness.workloads import STRIDES, candidates, covered, disjoint, objects, sized
from fastmask import box_ops

pytestmark = pytest.mark.reference_only


def test_objects_have_cocos_sizes():
    box = objects(20_000)
    scale = 640 / 1333
    side = (box[:, 2:] - box[:, :2]).prod(1).sqrt() * scale
    assert (side < 32).double().mean() == pytest.approx(0.41, abs=0.02)
    assert (side >= 96).double().mean() == pytest.approx(0.24, abs=0.02)
    assert (box >= 0).all()
    assert (box <= torch.tensor([1344, 800, 1344, 800])).all()


def test_candidates_crowd_and_adversarial_boxes_are_as_named():
    boxes, scores = candidates(1000)
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
    assert ((scores > 0) & (scores < 1)).all()
    assert scores.median() < 0.2
    crowd = (box_ops.iou(boxes, boxes) > 0.7).sum(1) - 1
    assert 0.3 < (crowd > 0).double().mean() < 0.9
    grid = disjoint(100)
    assert (box_ops.iou(grid, grid).fill_diagonal_(0) == 0).all()
    assert ((sized(10, 790)[:, 2:] - sized(10, 790)[:, :2] - 790).abs() < 1e-3).all()


def test_covered_pixels_are_counted_once():
    boxes = torch.tensor([[0.0, 0, 8, 8], [4, 4, 12, 12], [0, 0, 448, 448]])
    shapes = [(200, 336), (100, 168), (50, 84), (25, 42)]
    touched = torch.zeros(200, 336, dtype=torch.bool)
    for x1, y1, x2, y2 in (boxes[:2] / 4).int().tolist():
        touched[y1 : y2 + 2, x1 : x2 + 2] = True
    assert covered([boxes], shapes, STRIDES) == int(touched.sum()) + 16 * 16
