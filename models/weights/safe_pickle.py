"""NumPy arrays from a pickle that is not trusted.

A pickle calls what it names. `numpy.ndarray` and `numpy.dtype` are no safer than others to call: together they read
any bytes as pointers to objects. So nothing of NumPy is handed out: stand-ins take what pickled arrays are made of,
and make arrays of numbers from it.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _Dtype:
    """In place of `numpy.dtype`: numbers alone."""

    def __init__(self, name: str, *_flags: object) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"expected arrays of numbers, got {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """In place of what `numpy.core.multiarray._reconstruct` makes: empty, until its state is set."""

    def __init__(self, *_type_shape_dtype: object) -> None:
        self.tensor = torch.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, kind, by_columns, data = state
        array = np.frombuffer(_latin1(data), kind.dtype).reshape(shape, order="F" if by_columns else "C")
        self.tensor = torch.from_numpy(array.astype(kind.dtype.newbyteorder("="), order="C"))


def _scalar(kind: _Dtype, data: str | bytes) -> float:
    return np.frombuffer(_latin1(data), kind.dtype, count=1).item()


def _latin1(data: str | bytes, _encoding: str = "latin1") -> bytes:
    """Bytes, which the pickles of Python 2 and those of protocols up to 2 hold as text."""
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
    """What a pickle holds, with tensors for its arrays inside of dictionaries.

    Raises:
        ValueError: anything but arrays of numbers, numbers, text and plain containers is in it, or it is damaged.
    """
    with path.open("rb") as file:
        try:
            return _tensors(_Unpickler(file, encoding="latin1").load())
        except (pickle.UnpicklingError, EOFError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise ValueError(f"{path}: {error}") from error  # damage shows in all of these


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tensors(entry) for key, entry in value.items()}
    return value.tensor if isinstance(value, _Array) else value
