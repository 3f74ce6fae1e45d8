"""Weights on disk: of fastmask, torchvision and detectron2."""
