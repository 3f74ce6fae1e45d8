"""The network, with one file for each part of figure 1 of the paper."""
