"""Generation of a synthetic data set in COCO's format."""
