"""What the kernels of the default workload compile to, without a GPU, and the limits that they must keep.

    python -m benchmarks.reporting.compile_report

rewrites docs/compile_report.md and exits with 1 if a kernel breaks a limit.

The library's own launchers run on meta tensors of full size while Triton's driver only names a target, so the
launch code alone decides which variants exist. Meta tensors have address 0: pointers are specialised as
16-byte aligned, as they are for what PyTorch's allocator returns.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from benchmarks.harness.workloads import STRIDES
from fastmask.kernels.nms import _launch_nms_padded
from fastmask.kernels.paste_masks import _launch_paste_masks
from fastmask.kernels.roi_align import _launch_roi_align
from fastmask.kernels.roi_align.backward import _launch_roi_align_backward
from fastmask.kernels.roi_pool import _launch_roi_pool
from fastmask.kernels.roi_pool.backward import _launch_roi_pool_backward

DOCUMENT = Path(__file__).parents[2] / "docs" / "compile_report.md"
COMMAND = "python -m benchmarks.reporting.compile_report"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One compiled kernel. Instructions are counted as they stand in the code, not as they are executed."""

    architecture: str
    kernel: str
    cases: tuple[str, ...]  # of the workload, those that launch this variant
    registers: int  # per thread; of gfx942 the vector registers
    spills: int  # local loads and stores; on gfx942 spilled registers and scratch accesses
    stack: int  # bytes per thread
    shared: int  # bytes per program
    warps: int
    wide_loads: int  # accesses of 128 bits and more to global memory
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    atomics: int  # on global memory, and any compare-and-swap
    barriers: int
    shuffles: int
    matrix: int  # matrix-multiply instructions


@dataclass(frozen=True)
class Limit:
    """A register budget, and whether the design promises 128-bit accesses to global memory."""

    registers: int
    wide_loads: bool = False
    wide_stores: bool = False


# By Triton's backend: all NVIDIA architectures share a limit. Budgets are what the largest variant needs,
# rounded up to the 8 registers that hardware allocates. 16 bytes a thread are promised for warps of 32.
LIMITS = {
    "_list_boxes_kernel": {"cuda": Limit(32), "hip": Limit(40)},
    "_paste_masks_kernel": {"cuda": Limit(80, wide_stores=True), "hip": Limit(56)},
    "_roi_align_backward_kernel": {
        "cuda": Limit(232, wide_loads=True, wide_stores=True),
        "hip": Limit(152, wide_loads=True),
    },
    "_roi_align_forward_kernel": {
        "cuda": Limit(168, wide_loads=True, wide_stores=True),
        "hip": Limit(88, wide_loads=True, wide_stores=True),
    },
    "_roi_pool_backward_kernel": {"cuda": Limit(80, wide_stores=True), "hip": Limit(56, wide_stores=True)},
    "_roi_pool_kernel": {
        "cuda": Limit(112, wide_loads=True, wide_stores=True),
        "hip": Limit(56, wide_loads=True, wide_stores=True),
    },
    "scan_bits_kernel": {"cuda": Limit(112), "hip": Limit(64)},
    "scan_boxes_kernel": {"cuda": Limit(128), "hip": Limit(80)},
    "suppress_later_kernel": {"cuda": Limit(40), "hip": Limit(24)},
    "suppression_bits_kernel": {"cuda": Limit(32), "hip": Limit(24)},
}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _roi_align(dtype: torch.dtype, peer: str, images: int, boxes: int, bins: int, backward: bool) -> None:
    """Box or mask pooling over P2-P5 of an 800 x 1344 image, with a peer's defaults."""
    sides = [(800 // stride, 1344 // stride) for stride in STRIDES]
    features = [_meta(images, 256, *side, dtype=dtype).to(memory_format=torch.channels_last) for side in sides]
    ratio, aligned = {"torchvision": (2, False), "detectron2": (0, True)}[peer]
    settings = (False, [1 / stride for stride in STRIDES], ratio, aligned, 224.0, 4, peer)
    output, argmax = _launch_roi_align(features, _meta(boxes, 5), bins, bins, *settings)
    if backward:
        sizes = [images, *(pixels for side in sides for pixels in side)]
        _launch_roi_align_backward(output, _meta(boxes, 5), argmax, sizes, True, *settings)


def _roi_pool(dtype: torch.dtype) -> None:
    """Box pooling of a network without a pyramid, from its stride 16, for training."""
    features = _meta(1, 1024, 50, 84, dtype=dtype).to(memory_format=torch.channels_last)
    output, argmax = _launch_roi_pool(features, _meta(512, 5), 7, 7, 1 / 16)
    _launch_roi_pool_backward(output, _meta(512, 5), argmax, features.shape, 1 / 16, True)


def _nms(segments: int, boxes: int, max_output: int, score_threshold: float | None = None) -> None:
    """Proposals padded to their level's number; or detections by class, above a score."""
    classes = None if score_threshold is None else _meta(segments, boxes, dtype=torch.int64)
    counts = _meta(segments, dtype=torch.int64) if segments > 1 else None
    rectangles, scores = _meta(segments, boxes, 4), _meta(segments, boxes)
    _launch_nms_padded(rectangles, scores, classes, counts, 0.5, score_threshold, max_output)


def _paste(threshold: float | None, convention: str) -> None:
    _launch_paste_masks(_meta(100, 28, 28), _meta(100, 4), 800, 1333, threshold, convention)


WORKLOAD: list[tuple[str, Callable[[], object]]] = [
    *(
        (
            f"{boxes} RoIs {bins}x{bins}, {peer}, {dtype}",
            partial(_roi_align, DTYPES[dtype], peer, images, boxes, bins, backward=images == 2),
        )
        for peer in ("torchvision", "detectron2")
        for dtype in DTYPES
        for images, boxes, bins in ((1, 1000, 7), (1, 100, 14), (2, 1024, 7), (2, 256, 14))
    ),
    *((f"512 RoIs 7x7, 1024 channels, {dtype}", partial(_roi_pool, DTYPES[dtype])) for dtype in DTYPES),
    ("NMS of 5x1000", partial(_nms, 5, 1000, 1000)),
    ("NMS of 5x2000", partial(_nms, 5, 2000, 2000)),
    ("NMS of 10000", partial(_nms, 1, 10000, 10000)),
    ("NMS of 80000 by class, 100 kept", partial(_nms, 1, 80000, 100, 0.05)),
    ("100 masks 28x28, aligned, bool", partial(_paste, 0.5, "aligned")),
    ("100 masks 28x28, torchvision, bool", partial(_paste, 0.5, "torchvision")),
    ("100 masks 28x28, aligned, probabilities", partial(_paste, None, "aligned")),
    ("100 masks 28x28, torchvision, probabilities", partial(_paste, None, "torchvision")),
]


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # a kernel keeps its variants by device, and the first target seen on each

    def get_current_stream(self, _device: str) -> int:
        return 0


def compile_workload(architecture: str) -> list[tuple[str, CompiledKernel, list[str]]]:
    """Kernel name, binary and cases of every variant that the workload launches."""
    target = TARGETS[architecture]
    variants: dict[str, tuple[str, CompiledKernel, list[str]]] = {}
    launched: dict[str, tuple[str, CompiledKernel]] = {}
    launch_or_compile = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, **options: Any) -> CompiledKernel:
        binary = launch_or_compile(kernel, *args, **options | {"warmup": True})
        assert isinstance(binary, CompiledKernel)
        launched[binary.hash] = kernel.fn.__name__, binary
        return binary

    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(target)),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        for case, launch in WORKLOAD:
            launched.clear()
            launch()
            for key, (name, binary) in launched.items():
                variants.setdefault(key, (name, binary, []))[2].append(case)
    return list(variants.values())


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _count(opcodes: Counter[str], pattern: str) -> int:
    return sum(count for opcode, count in opcodes.items() if re.match(pattern, opcode))


def _measure_nvidia(binary: CompiledKernel) -> dict[str, int]:
    cubin = next(str(path) for name, path in binary.metadata_group.items() if name.endswith(".cubin"))
    usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    sass = _run(knobs.nvidia.nvdisasm.path, "-c", cubin)
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M))
    loads, stores = r"LD(G|GSTS)?\b", r"STG?\b"  # LDGSTS goes straight to shared memory
    wide_loads, wide_stores = (_count(opcodes, access + r".*\.(128|256)\b") for access in (loads, stores))
    return {
        "registers": used["REG"],
        "spills": _count(opcodes, r"(LDL|STL)\b"),
        "stack": used["STACK"] + used["LOCAL"],
        "wide_loads": wide_loads,
        "narrow_loads": _count(opcodes, loads) - wide_loads,
        "wide_stores": wide_stores,
        "narrow_stores": _count(opcodes, stores) - wide_stores,
        # Not ATOMS: the code that ptxas adds to allocate tensor memory has some. REDUX is within a warp.
        "atomics": _count(opcodes, r"(ATOMG?|REDG?|ATOMS\.CAST?)\b"),
        "barriers": _count(opcodes, r"BAR\b"),
        "shuffles": _count(opcodes, r"SHFL\b"),
        "matrix": _count(opcodes, r"\w*MMA\b"),
    }


def _measure_amd(binary: CompiledKernel) -> dict[str, int]:
    text = binary.asm["amdgcn"]
    used = {name: int(value) for name, value in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", text, re.M)}
    opcodes = Counter(re.findall(r"^\s+([a-z]+_\w+)", text, re.M))
    loads, stores = r"(global|buffer|flat)_load_", r"(global|buffer|flat)_store_"
    wide_loads, wide_stores = (_count(opcodes, access + r"(lds_)?dwordx4") for access in (loads, stores))
    return {
        "registers": used["vgpr_count"],
        "spills": used["vgpr_spill_count"] + used["sgpr_spill_count"] + _count(opcodes, "scratch_"),
        "stack": used["private_segment_fixed_size"],
        "wide_loads": wide_loads,
        "narrow_loads": _count(opcodes, loads) - wide_loads,
        "wide_stores": wide_stores,
        "narrow_stores": _count(opcodes, stores) - wide_stores,
        "atomics": _count(opcodes, r"(global|buffer|flat)_atomic_|ds_cmpst_"),
        "barriers": opcodes["s_barrier"],
        "shuffles": _count(opcodes, r"ds_b?permute_|ds_swizzle_|v_permlane|v_\w+_dpp"),
        "matrix": _count(opcodes, "v_mfma_"),
    }


def measure(architecture: str) -> list[Row]:
    """Compile the workload for one architecture and take every variant's figures."""
    variants = compile_workload(architecture)
    figures = _measure_amd if TARGETS[architecture].backend == "hip" else _measure_nvidia
    with ThreadPoolExecutor() as pool:  # the disassembler is another process
        counted = pool.map(figures, [binary for _, binary, _ in variants])
    rows = [
        Row(
            architecture=architecture,
            kernel=kernel,
            cases=tuple(cases),
            shared=binary.metadata.shared,
            warps=binary.metadata.num_warps,
            **counts,
        )
        for (kernel, binary, cases), counts in zip(variants, counted, strict=True)
    ]
    return sorted(rows, key=lambda row: row.kernel)


def _limit(row: Row) -> Limit:
    return LIMITS.get(row.kernel, {}).get(TARGETS[row.architecture].backend, Limit(registers=0))


def violations(rows: list[Row]) -> list[str]:
    """What breaks a rule or a limit, a sentence each; `rows` are all of one architecture, or of more."""
    found = []
    for row in rows:
        limit = _limit(row)
        broken = {
            f"{row.registers} registers, budget {limit.registers}": row.registers > limit.registers,
            f"{row.spills} spills, {row.stack} bytes of stack": row.spills or row.stack,
            f"{row.atomics} atomics, whose order is not deterministic": row.atomics,
            f"no 128-bit load, {row.narrow_loads} narrower": limit.wide_loads and not row.wide_loads,
            f"no 128-bit store, {row.narrow_stores} narrower": limit.wide_stores and not row.wide_stores,
        }
        where = f"{row.kernel} ({'; '.join(row.cases)}) on {row.architecture}"
        found += [f"{where}: {what}" for what, is_broken in broken.items() if is_broken]
    unused = sorted(LIMITS.keys() - {row.kernel for row in rows})
    return found + [f"{kernel}: has limits, but nothing in WORKLOAD launches it" for kernel in unused]


def section(architecture: str, rows: list[Row]) -> str:
    """One architecture's part of the document."""
    table = [
        {
            "kernel": f"`{row.kernel}`",
            "case": "<br>".join(row.cases),
            "registers": row.registers,
            "budget": _limit(row).registers,
            "spills": row.spills,
            "stack": row.stack,
            "shared": row.shared,
            "warps": row.warps,
            "loads": f"{row.wide_loads}/{row.narrow_loads}",
            "stores": f"{row.wide_stores}/{row.narrow_stores}",
            "atomics": row.atomics,
            "barriers": row.barriers,
            "shuffles": row.shuffles,
            "matrix": row.matrix,
        }
        for row in rows
    ]
    lines = [list(table[0]), ["---", "---", *["--:"] * (len(table[0]) - 2)], *(row.values() for row in table)]
    return "\n".join([f"## {architecture}\n", *(f"| {' | '.join(map(str, line))} |" for line in lines), ""])


def document(sections: list[str]) -> str:
    """The committed document: it changes only when a binary does."""
    title = f"""# What the kernels compile to

Written by `{COMMAND}` with triton {triton.__version__}, without a GPU, and checked by
`tests/test_compile.py`, which also holds every row to its budget and allows no spills, stack or atomics.

Registers and stack (bytes) are per thread, shared memory (bytes) is per program. Loads and stores are those
of global memory, 128-bit ones before the slash and narrower ones after it. Instructions are counted as they
stand in the code; "matrix" are those of the tensor cores.
"""
    return "\n".join([title, *sections])


def main() -> int:
    """Also the last part of `python -m benchmarks report`."""
    try:
        _ = knobs.nvidia.cuobjdump, knobs.nvidia.nvdisasm
    except RuntimeError as error:  # "Cannot find nvdisasm": not every build of Triton has them
        print(f"{error}: {DOCUMENT} stays as it is", file=sys.stderr)
        return 0
    rows = {architecture: measure(architecture) for architecture in TARGETS}
    DOCUMENT.write_text(document([section(architecture, found) for architecture, found in rows.items()]))
    print(DOCUMENT)
    broken = list(dict.fromkeys(sentence for found in rows.values() for sentence in violations(found)))
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
