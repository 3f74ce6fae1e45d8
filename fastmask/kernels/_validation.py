"""Checks of arguments. Every error reads `argument: expected ..., got ...`.

A value of the wrong Python type or dtype is a `TypeError`, anything else that is wrong a `ValueError`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

MAX_INT32 = 2**31 - 1  # what a kernel's integer arguments hold


def check_tensor(
    name: str, value: object, *, floating: bool = False, integer: bool = False, real: bool = False
) -> None:
    """A dense tensor, whose dtype is floating, integer or of real numbers where that is required."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {describe(value)}")
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        kind = "a quantized one" if value.is_quantized else "a nested one" if value.is_nested else value.layout
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    if integer and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
    if real and value.is_complex():
        raise TypeError(f"{name}: expected a dtype of real numbers, got {value.dtype}")
    if (floating or real) and value.is_floating_point() and value.itemsize < 2:
        raise TypeError(f"{name}: expected a floating dtype of 16 bits or more, got {value.dtype}")


def check_counts_dtype(name: str, counts: Any) -> None:
    """A dense tensor of integers that can be compared with indices."""
    check_tensor(name, counts, integer=True)
    if counts.dtype in (torch.uint16, torch.uint32, torch.uint64):  # PyTorch compares these with no other dtype
        raise TypeError(f"{name}: expected a signed integer dtype or uint8, got {counts.dtype}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """`tensor` is on the device of `other`."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected on {other.device} like {other_name}, got {tensor.device}")


def check_int(name: str, value: Any, *, least: int = -MAX_INT32, most: int = MAX_INT32) -> int:
    """An integer in [least, most], NumPy's included; may be symbolic."""
    if type(value) is not int:  # the common case first: these checks cost microseconds
        if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
            raise TypeError(f"{name}: expected an int, got {describe(value)}")
        value = value if isinstance(value, int | torch.SymInt) else int(value)
    if not least <= value <= most:
        limits = f"at least {least}" if most == MAX_INT32 and value < least else f"an int in [{least}, {most}]"
        raise ValueError(f"{name}: expected {limits}, got {value}")
    return cast(int, value)


def check_float(name: str, value: Any) -> float:
    """A real number, NumPy's included."""
    if type(value) is float:  # the common case first
        return value
    if isinstance(value, torch.SymFloat):
        return cast(float, value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number in the range of float64, got {describe(value)}") from None


def check_positive(name: str, value: Any) -> float:
    """A positive finite number."""
    value = check_float(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    return value


def check_fraction(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    value = check_float(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected in [0, 1], got {value}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """A truth value: bool, or the integer 0 or 1."""
    if value is True or value is False:
        return value
    if not isinstance(value, Integral) or value not in (0, 1):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of `choices`."""
    if not isinstance(value, str) or value not in choices:
        quoted = " or ".join(f'"{choice}"' for choice in choices)
        if isinstance(value, str):
            raise ValueError(f"{name}: expected {quoted}, got {value!r}")
        raise TypeError(f"{name}: expected {quoted}, got {describe(value)}")
    return value


def check_pair(name: str, value: Any, *, least: int = -MAX_INT32, most: int = MAX_INT32) -> tuple[int, int]:
    """Two integers in [least, most]."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected two ints, got {describe(value)}")
    if len(value) != 2:
        raise ValueError(f"{name}: expected two ints, got {describe(value)}")
    first, second = (check_int(name, item, least=least, most=most) for item in value)
    return first, second


def check_sequence(name: str, value: Any, of: str) -> list[Any]:
    """The items of a list or tuple; the error calls them `of`."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name}: expected a sequence of {of}, got {describe(value)}")
    return list(value)


def describe(value: object) -> str:
    """A value for an error: a tensor's dtype and shape, anything else as it prints, shortened."""
    if isinstance(value, Tensor) and value.is_nested:
        return f"a nested Tensor of {value.dtype}"
    if isinstance(value, Tensor):
        return f"a Tensor of {value.dtype} {list(value.shape)}"
    text = " ".join(repr(value).split())
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({type(value).__name__})"
