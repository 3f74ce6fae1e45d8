"""Weights on disk: fastmask's own, torchvision's and detectron2's."""
