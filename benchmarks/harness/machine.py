"""The machine that is measured: the rates of its memory and its arithmetic, and its description in the results."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import torch
from pytest_benchmark.utils import get_commit_info

import fastmask
from benchmarks.harness.timing import Timer
from benchmarks.reporting.results import Run

PEERS = {"detectron2": "detectron2.layers", "mmcv": "mmcv.ops"}  # timed where these modules can be imported
PACKAGES = ("torch", "torchvision", "triton", "numpy")


def peer(module: str) -> ModuleType | None:
    """A peer's module, or None where it cannot be imported."""
    try:
        return import_module(module)
    except ImportError:
        return None


class Machine:
    """A device, and the two rates that bound a kernel on it, measured when the object is made.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads; PyTorch's default if None.
    """

    def __init__(self, device: str, threads: int | None = None) -> None:
        self.device = device
        self.timer = Timer(device)
        self.on_gpu = self.timer.on_gpu
        if threads:
            torch.set_num_threads(threads)
        self.copy_gb_s = self._copy_rate()
        self.matrix_tflop_s = {
            str(dtype).removeprefix("torch."): self._matrix_rate(dtype)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        }

    def floor_ms(self, bytes: int, flops: int, dtype: str) -> float:
        """The larger of two times in milliseconds: the bytes at a copy's rate, the FLOPs at a matrix product's."""
        return max(bytes / self.copy_gb_s / 1e6, flops / self.matrix_tflop_s[dtype] / 1e9)

    def describe(self, *, quick: bool) -> Run:
        """Where, when and at which commit a section that starts now is measured."""
        peers = {name: peer(module) for name, module in PEERS.items()}
        return Run(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=get_commit_info()["id"] + "-dirty" * _has_changes(),
            device=torch.cuda.get_device_name() if self.on_gpu else "cpu",
            driver=_driver() if self.on_gpu else None,
            threads=torch.get_num_threads(),
            versions={
                "python": platform.python_version(),
                "fastmask": fastmask.__version__,
                **{name: version for name in PACKAGES if (version := _version(name))},
                **{name: str(import_module(name).__version__) for name, module in peers.items() if module},
            },
            copy_gb_s=self.copy_gb_s,
            matrix_tflop_s=self.matrix_tflop_s,
            quick=quick,
            unavailable={name: "cannot be imported" for name, module in peers.items() if not module},
        )

    def _copy_rate(self) -> float:
        """GB/s of a large copy, counting bytes read and bytes written."""
        size = 2**30 if self.on_gpu else 2**27
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.timer.fastest(lambda: target.copy_(source)) / 1e6

    def _matrix_rate(self, dtype: torch.dtype) -> float:
        """TFLOP/s of a large matrix product."""
        size = 8192 if self.on_gpu else 1024
        a, b = torch.randn(2, size, size, device=self.device, dtype=dtype)
        return 2 * size**3 / self.timer.fastest(lambda: a @ b) / 1e9


def _version(package: str) -> str | None:
    """The version of an installed package; Triton is missing on some platforms."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _has_changes() -> bool:
    """Whether the code that runs differs from its commit."""
    command = ["git", "status", "--porcelain", "--", "fastmask", "models", "benchmarks", ":!benchmarks/results"]
    try:
        return bool(subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False).stdout)
    except FileNotFoundError:  # no git, and so no commit
        return False


def _driver() -> str | None:
    """The version of NVIDIA's kernel driver; None for devices of other vendors."""
    path = "/proc/driver/nvidia/version"
    try:
        with open(path) as file:
            words = file.readline().split()
    except FileNotFoundError:
        return None
    return next((word for word in words if word[0].isdigit()), None)
