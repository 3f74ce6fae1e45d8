"""The network: a file for each part of figure 1."""
