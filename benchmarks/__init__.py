"""What is measured, on a GPU and without one; run from a checkout, not part of the wheel."""
