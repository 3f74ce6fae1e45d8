"""The package itself: what it exports, and that it works where Triton is missing."""

import subprocess
import sys

import pytest

import fastmask

WITHOUT_TRITON = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no Triton here")

sys.meta_path.insert(0, Hide())
import torch, fastmask
from fastmask.kernels._runtime import triton

assert triton is None and "triton" not in sys.modules
feature = torch.rand(1, 3, 8, 8, requires_grad=True)
boxes = torch.tensor([[0, 1, 1, 6, 6.0]])
for pool in (fastmask.roi_align, fastmask.roi_pool, fastmask.roi_warp):
    pool(feature, boxes, 2).sum().backward()
assert feature.grad.abs().sum() > 0
assert fastmask.nms(boxes[:, 1:], torch.ones(1), 0.5).tolist() == [0]
assert fastmask.paste_masks(torch.ones(1, 4, 4), boxes[:, 1:], (8, 8)).sum() == 25
print("works")
"""


@pytest.mark.reference_only
def test_works_without_triton():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert run.stdout == "works\n", run.stderr


def test_exports_are_sorted_and_there():
    assert fastmask.__all__ == sorted(fastmask.__all__)
    assert all(hasattr(fastmask, name) for name in fastmask.__all__)
    assert fastmask.__version__
