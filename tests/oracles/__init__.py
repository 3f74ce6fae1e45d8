"""Oracles, random inputs and checks that several tests and the benchmarks share."""
