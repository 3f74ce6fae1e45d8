"""The benchmarks, with and without a GPU; they run from a checkout and are no part of the wheel."""
