"""What the kernels of the declared workloads compile to, without a GPU, and the limits that they must keep.

    python -m benchmarks compile

rewrites docs/compile_report.md and exits with 1 if a kernel breaks a limit.

Public functions are called on meta tensors of full size and run the operators' own launchers, under a Triton driver
that only names a target. The launch code alone therefore decides which variants exist. Meta tensors have address 0, so
pointers are specialised as 16-byte aligned, as are pointers from PyTorch's allocator.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from benchmarks.harness.operators import Backend, Launch, Limit, Operator, operators
from benchmarks.reporting import amdgcn, sass
from benchmarks.reporting.control_flow import Code
from benchmarks.reporting.fences import amd_barriers, is_nvidia_barrier, unfenced
from benchmarks.reporting.hardware import devices, occupancy
from benchmarks.reporting.model_report import (
    ARCHITECTURE,
    Modelled,
    missed_targets,
    model,
    model_section,
    target_section,
)
from fastmask.kernels._runtime import LAUNCHERS

DOCUMENT = Path(__file__).parents[2] / "docs" / "compile_report.md"
COMMAND = "python -m benchmarks compile"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Row:
    """One compiled kernel. Instructions are counted as they stand in the code, not as they are executed."""

    architecture: str
    kernel: str
    cases: tuple[str, ...]  # the workloads that launch this variant
    limit: Limit
    registers: int  # per thread; on gfx942 the vector registers
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
    occupancy: float  # the fraction of a multiprocessor's warps that are resident
    instructions: int  # of the body, without the slow paths that it calls
    loops: str  # instructions of each loop, the loops that it contains in brackets
    slow_paths: int  # calls of slow paths of divisions and roots; none on gfx942
    loop_slow_paths: int = 0  # those in loops
    unfenced: tuple[str, ...] = ()  # what is wrong with the kernel's fences
    modelled: tuple[Modelled, ...] = ()  # the static model of each case
    unmodelled: tuple[str, ...] = ()  # what is wrong with its declarations


class Variant(NamedTuple):
    """A compiled kernel, and what launches it."""

    kernel: str
    binary: CompiledKernel
    launches: dict[str, list[Launch]]  # by case


class _Driver:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton caches variants, and the target, by device: each target is a device

    def get_current_stream(self, _device: str) -> int:
        return 0


@contextmanager
def _meta_tensors_to_launchers() -> Iterator[None]:
    library = torch.library.Library("fastmask", "IMPL")
    for name, launch in LAUNCHERS.items():
        library.impl(name, launch, "Meta", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def compile_workloads(architecture: str, declared: Mapping[str, Operator]) -> list[Variant]:
    """Every variant that the declared workloads launch."""
    target = TARGETS[architecture]
    variants: dict[str, Variant] = {}
    launched: list[tuple[CompiledKernel, Launch]] = []
    launch_or_compile = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: tuple[int, ...], **options: Any) -> CompiledKernel:
        binary = launch_or_compile(kernel, *args, grid=grid, **options | {"warmup": True})
        assert isinstance(binary, CompiledKernel)
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
        launched.append((binary, Launch(kernel.fn.__name__, math.prod(grid), arguments)))
        return binary

    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(target)),
        mock.patch.object(JITFunction, "run", compile_only),
        _meta_tensors_to_launchers(),
    ):
        for operator in declared.values():
            for case, call in operator.compile_cases.items():
                launched.clear()
                call().run()
                for binary, launch in launched:
                    variant = variants.setdefault(binary.hash, Variant(launch.kernel, binary, {}))
                    variant.launches.setdefault(case, []).append(launch)
    return list(variants.values())


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _count(opcodes: Counter[str], pattern: str) -> int:
    return sum(count for opcode, count in opcodes.items() if re.match(pattern, opcode))


def _measure_nvidia(binary: CompiledKernel) -> tuple[Code, dict[str, int]]:
    cubin = next(str(path) for name, path in binary.metadata_group.items() if name.endswith(".cubin"))
    usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    text = _run(knobs.nvidia.nvdisasm.path, *sass.DISASSEMBLE, cubin)
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M))
    loads, stores = r"LD(G|GSTS)?\b", r"STG?\b"  # LDGSTS goes straight to shared memory
    wide_loads, wide_stores = (_count(opcodes, access + r".*\.(128|256)\b") for access in (loads, stores))
    return sass.parse(text), {
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


def _measure_amd(binary: CompiledKernel) -> tuple[Code, dict[str, int]]:
    text = binary.asm["amdgcn"]
    used = {name: int(value) for name, value in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", text, re.M)}
    opcodes = Counter(re.findall(r"^\s+([a-z]+_\w+)", text, re.M))
    loads, stores = r"(global|buffer|flat)_load_", r"(global|buffer|flat)_store_"
    wide_loads, wide_stores = (_count(opcodes, access + r"(lds_)?dwordx4") for access in (loads, stores))
    return amdgcn.parse(text), {
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


def measure(architecture: str, declared: Mapping[str, Operator]) -> list[Row]:
    """Compile the declared workloads for one architecture and measure every variant."""
    variants = compile_workloads(architecture, declared)
    figures = _measure_amd if TARGETS[architecture].backend == "hip" else _measure_nvidia
    with ThreadPoolExecutor() as pool:  # the disassembler is another process
        measured = list(pool.map(figures, [variant.binary for variant in variants]))
    rows = [
        _row(architecture, variant, code, counts, declared)
        for variant, (code, counts) in zip(variants, measured, strict=True)
    ]
    return sorted(rows, key=lambda row: row.kernel)


def _row(
    architecture: str, variant: Variant, code: Code, counts: Mapping[str, int], declared: Mapping[str, Operator]
) -> Row:
    kernel, binary, launches = variant
    backend: Backend = "hip" if TARGETS[architecture].backend == "hip" else "cuda"
    limits = {name: limit for operator in declared.values() for name, limit in operator.limits.items()}
    shape = counts["registers"], binary.metadata.shared, binary.metadata.num_warps
    orders_memory = is_nvidia_barrier if backend == "cuda" else amd_barriers(binary.asm["llir"])
    fences = [fence for operator in declared.values() for fence in operator.fences if fence.kernel == kernel]
    models = [
        model(kernel, case, launches[case], code, shape, declared, devices())
        for case in (launches if architecture == ARCHITECTURE else ())
    ]
    return Row(
        architecture=architecture,
        kernel=kernel,
        cases=tuple(launches),
        limit=limits.get(kernel, {}).get(backend, Limit(registers=0)).of(launches),
        shared=binary.metadata.shared,
        warps=binary.metadata.num_warps,
        occupancy=occupancy(architecture, *shape),
        instructions=code.size,
        loops=code.nested_sizes,
        slow_paths=code.slow_paths,
        loop_slow_paths=code.loop_slow_paths,
        unfenced=tuple(wrong for fence in fences if (wrong := unfenced(code, fence, orders_memory))),
        modelled=tuple(part for part in models if isinstance(part, Modelled)),
        unmodelled=tuple(part for part in models if isinstance(part, str)),
        **counts,
    )


def violations(rows: list[Row], declared: Mapping[str, Operator]) -> list[str]:
    """A sentence for every rule or limit that is broken; `rows` are all those of one or more architectures."""
    sentences = []
    for row in rows:
        limit = row.limit
        broken = {
            f"{row.registers} registers, budget {limit.registers}": row.registers > limit.registers,
            f"{row.spills} spills, {row.stack} bytes of stack": row.spills or row.stack,
            f"{row.atomics} atomics, whose order is not deterministic": row.atomics,
            f"no 128-bit load, {row.narrow_loads} narrower": limit.wide_loads and not row.wide_loads,
            f"no 128-bit store, {row.narrow_stores} narrower": limit.wide_stores and not row.wide_stores,
            f"{row.slow_paths} slow paths, budget {limit.slow_paths}": _exceeds(row.slow_paths, limit.slow_paths),
            f"{row.loop_slow_paths} slow paths in loops, budget {limit.loop_slow_paths}": _exceeds(
                row.loop_slow_paths, limit.loop_slow_paths
            ),
            f"occupancy {row.occupancy:.0%}, at least {limit.occupancy:.0%}": row.occupancy < limit.occupancy,
            **dict.fromkeys(row.unfenced, True),
        }
        where = f"{row.kernel} ({'; '.join(row.cases)}) on {row.architecture}"
        sentences += [f"{where}: {what}" for what, is_broken in broken.items() if is_broken]
        sentences += row.unmodelled
    if any(row.architecture == ARCHITECTURE for row in rows):
        sentences += missed_targets([part for row in rows for part in row.modelled], declared)
    limited = {kernel for operator in declared.values() for kernel in operator.limits}
    unused = sorted(limited - {row.kernel for row in rows})
    return sentences + [f"{kernel}: has limits, but no compile case launches it" for kernel in unused]


def _exceeds(count: int, budget: int | None) -> bool:
    return budget is not None and count > budget


def section(architecture: str, rows: list[Row]) -> str:
    """One architecture's part of the document."""
    table = [
        {
            "kernel": f"`{row.kernel}`",
            "case": "<br>".join(row.cases),
            "registers": row.registers,
            "budget": row.limit.registers,
            "shared": row.shared,
            "warps": row.warps,
            "occupancy": f"{row.occupancy:.0%}",
            "instructions": row.instructions,
            "loops": row.loops,
            "slow paths": f"{row.slow_paths} ({row.loop_slow_paths})" if row.slow_paths else 0,
            "loads": f"{row.wide_loads}/{row.narrow_loads}",
            "stores": f"{row.wide_stores}/{row.narrow_stores}",
            "barriers": row.barriers,
            "shuffles": row.shuffles,
            "matrix": row.matrix,
        }
        for row in rows
    ]
    lines = [list(table[0]), ["---", "---", *["--:"] * (len(table[0]) - 2)], *(row.values() for row in table)]
    models = [part for row in rows for part in row.modelled]
    sections = [model_section(device, models) for device in devices()] if models else []
    return "\n".join([f"## {architecture}\n", *(f"| {' | '.join(map(str, line))} |" for line in lines), "", *sections])


def document(sections: list[str]) -> str:
    """The committed document: it changes only when a binary does."""
    title = f"""# What the kernels compile to

Written by `{COMMAND}` with triton {triton.__version__}, without a GPU, and checked by
`tests/test_compile.py`, which also holds every row to its budget and allows no spills, stack or atomics.

Registers are per thread, shared memory (bytes) is per program. Occupancy is the fraction of a multiprocessor's warps
that registers and shared memory let be resident. Instructions are counted as they stand in the code; "loops" has
those of each loop, and in brackets those of the loops that it contains. Slow paths are calls of divisions and roots for
operands such as denormal numbers, in brackets those in loops; what they call is not counted. Loads and stores are those
of global memory, 128-bit ones before the slash and narrower ones after it; "matrix" are those of the tensor cores.

A model says how long the binaries for sm_90 take on a device, in microseconds, and what bounds them, without
running them: "instructions" are those that a warp executes with the boxes of the benchmark, in the mean. Time is the
largest of issue, L2, HBM and latency, and the launch; the floor is the time of the bytes that any implementation has
to move. `benchmarks/reporting/static_model.py` has the formulas, `hardware.py` beside it the rates and their sources.
"""
    return "\n".join([title, *sections])


def main() -> int:
    """Rewrite the document. Returns 1 if a kernel breaks a limit."""
    try:
        _ = knobs.nvidia.cuobjdump, knobs.nvidia.nvdisasm
    except RuntimeError as error:  # "Cannot find nvdisasm": not every build of Triton has them
        print(f"{error}: {DOCUMENT} stays as it is", file=sys.stderr)
        return 0
    declared = operators()
    rows = {architecture: measure(architecture, declared) for architecture in TARGETS}
    models = [part for row in rows[ARCHITECTURE] for part in row.modelled]
    sections = [section(*item) for item in rows.items()]
    DOCUMENT.write_text(document([target_section(models, declared), *sections]))
    print(DOCUMENT)
    broken = list(dict.fromkeys(sentence for part in rows.values() for sentence in violations(part, declared)))
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return int(bool(broken))
