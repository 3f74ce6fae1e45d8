"""Data sets in COCO's format: reading, augmentation, batches, and generation."""
