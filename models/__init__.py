"""A Mask R-CNN (He et al. 2017) built on fastmask's operators; run from a checkout: `python -m models.train`."""
