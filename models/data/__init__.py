"""COCO-format data: reading it, augmenting it, and making some."""
