"""A generated data set in COCO's format."""
