"""Bit operations for kernels."""

from __future__ import annotations

from fastmask.kernels._runtime import jit, tl


@jit()
def popcount(bits):
    """The number of bits set, in the form that compilers recognise as one instruction."""
    x = bits.to(tl.uint32, bitcast=True)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)
