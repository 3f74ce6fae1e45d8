"""What becomes of measurements: tables, plots, comparisons."""
