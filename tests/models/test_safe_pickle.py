"""Untrusted pickles: arrays are read correctly, and nothing is called."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from models.weights import safe_pickle

pytestmark = pytest.mark.reference_only


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# Pickles of Python 3, and those of Python 2 and of NumPy 1
@pytest.mark.parametrize(("protocol", "core"), [(4, b"numpy._core"), (2, b"numpy.core"), (0, b"numpy.core")])
def test_arrays(protocol, core, tmp_path):
    arrays = {
        "float": np.random.default_rng(0).random((3, 2, 2), np.float32),
        "integer": np.arange(-3, 3),
        "big_endian": np.arange(6, dtype=">f4"),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "number": np.array(5.0),
        "truth": np.array([True, False]),
    }
    content = OrderedDict(model=arrays, __author__="a zoo", iteration=np.int64(7), lr=np.float32(0.5))
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content, protocol).replace(b"numpy._core", core))
    loaded = safe_pickle.load(path)
    assert (loaded["__author__"], loaded["iteration"], loaded["lr"]) == ("a zoo", 7, 0.5)
    assert loaded["model"].keys() == arrays.keys()
    for name, array in arrays.items():
        expected = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        assert loaded["model"][name].dtype == expected.dtype
        assert torch.equal(loaded["model"][name], expected), name


def test_no_call_is_made(tmp_path):
    path, mark = tmp_path / "model.pkl", tmp_path / "called"
    path.write_bytes(pickle.dumps({"model": Call(os.mkdir, str(mark))}))
    with pytest.raises(ValueError, match=r"model\.pkl: expected NumPy arrays and plain containers, got posix\.mkdir"):
        safe_pickle.load(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        Call(np.ndarray, (1,), "O", b"\1" * 8),  # eight bytes as a pointer to an object
        Call(np.ndarray, (1,), np.dtype("f4")),
        np.array([None]),
        np.zeros(1, [("field", "f4")]),
        Call(np.frombuffer, b""),
        torch.zeros(1),
    ],
    ids=["pointers", "ndarray", "objects", "fields", "frombuffer", "torch"],
)
def test_other_calls_of_numpy_are_refused(value, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {"x": value}}))
    with pytest.raises(ValueError, match=r"model\.pkl: "):
        safe_pickle.load(path)


@pytest.mark.parametrize("length", [0, 1, 60, -9])
def test_damaged_files_are_named(length, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {"x": np.zeros(100)}})[:length])
    with pytest.raises(ValueError, match=r"model\.pkl: "):
        safe_pickle.load(path)
