"""Reads NumPy arrays from an untrusted pickle.

Loading a pickle calls the functions and classes that it names. Those of NumPy are not safe either: `numpy.ndarray` with
an object dtype reads any bytes as pointers. The unpickler therefore replaces NumPy's names by stand-ins, which build
numeric arrays from the content of pickled ones, and refuses all other names.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _Dtype:
    """Stand-in for `numpy.dtype` that admits only numeric types."""

    def __init__(self, name: str, *_flags: object) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"expected arrays of numbers, got {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stand-in for the array that `numpy.core.multiarray._reconstruct` returns, empty until its state is set."""

    def __init__(self, *_type_shape_dtype: object) -> None:
        self.tensor = torch.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, by_columns, data = state
        array = np.frombuffer(_latin1(data), dtype.dtype).reshape(shape, order="F" if by_columns else "C")
        self.tensor = torch.from_numpy(array.astype(dtype.dtype.newbyteorder("="), order="C"))


def _scalar(dtype: _Dtype, data: str | bytes) -> float:
    return np.frombuffer(_latin1(data), dtype.dtype, count=1).item()


def _latin1(data: str | bytes, _encoding: str = "latin1") -> bytes:
    """Bytes from text, as which pickles of Python 2 and of protocols 0 to 2 store them."""
    return data.encode("latin1") if isinstance(data, str) else data


# NumPy 2 moved numpy.core to numpy._core
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"expected NumPy arrays and plain containers, got {module}.{name}")
        return _ADMITTED[module, name]


def load(path: Path) -> Any:
    """Load a pickle. Arrays that are values of dictionaries, also of nested ones, become tensors.

    Args:
        path: of the file.

    Raises:
        ValueError: the pickle holds anything but numeric arrays, numbers, text and plain containers, or is damaged.
    """
    with path.open("rb") as file:
        try:
            return _tensors(_Unpickler(file, encoding="latin1").load())
        except (pickle.UnpicklingError, EOFError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise ValueError(f"{path}: {error}") from error  # a damaged pickle may raise any of these


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tensors(entry) for key, entry in value.items()}
    return value.tensor if isinstance(value, _Array) else value
