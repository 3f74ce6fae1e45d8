"""What the static model knows about devices: rates, occupancy, and the cost of instructions, with their sources.

A rate is an assumption until a run on that device is committed: the bandwidth of a copy then replaces the table's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.reporting import results


@dataclass(frozen=True)
class Device:
    """A GPU of architecture sm_90."""

    name: str
    multiprocessors: (
        int  # of the SXM boards: NVIDIA H100 Tensor Core GPU Architecture (white paper); the H200's chip too
    )
    # Under load: an assumption, the boost clock of the PCIe board (Chips and Cheese, "Nvidia's H100: Funny L2, and Tons
    # of Bandwidth", 2023). The white paper's rates for SXM boards are at 1.98 GHz, and at 1.83 for tensor cores.
    clock_ghz: float
    l2_tb_s: float  # between L2 and the multiprocessors; a guess, to be measured
    l2_mb: float  # H100: white paper; H200: as a device reported it
    hbm_tb_s: float  # of a device copy, read plus written, measured; data sheets: 3.35 (H100), 4.8 (H200)
    launch_us: float = 2.2  # of a kernel in a CUDA graph; a guess, to be measured


DEVICES = (
    Device("H100", multiprocessors=132, clock_ghz=1.755, l2_tb_s=5.5, l2_mb=50, hbm_tb_s=3.0),
    Device("H200", multiprocessors=132, clock_ghz=1.755, l2_tb_s=5.5, l2_mb=60, hbm_tb_s=4.3),
)

SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of a warp in a cycle


def devices(folder: Path = results.FOLDER) -> list[Device]:
    """The table's devices, with the bandwidth of the runs that are committed."""
    runs = [section.run for path in sorted(folder.glob("*.json")) for section in results.load(path).values()]
    measured = {run.device: run.copy_gb_s / 1000 for run in runs if not run.quick}
    found = []
    for device in DEVICES:
        rates = [rate for name, rate in measured.items() if device.name in name]
        found.append(replace(device, hbm_tb_s=rates[0]) if rates else device)
    return found


@dataclass(frozen=True)
class Capacity:
    """What one multiprocessor holds at a time."""

    warps: int
    programs: int
    registers: int  # of 32 bits and, on AMD, for a lane of each of its four units
    register_unit: int  # a thread's registers are allocated in steps of this
    shared: int  # bytes
    shared_reserved: int  # bytes of each program for the system
    shared_unit: int  # bytes


# NVIDIA's tuning guides for the Ampere, Hopper and Blackwell architectures, "Occupancy"; registers and shared memory
# are allocated in the steps of NVIDIA's occupancy calculator. gfx942: AMD Instinct MI300 Instruction Set Architecture
# Guide, and LLVM's User Guide for AMDGPU.
_HOPPER = Capacity(64, 32, 65536, 8, 228 * 1024, 1024, 128)
CAPACITY = {
    "sm_80": Capacity(64, 32, 65536, 8, 164 * 1024, 1024, 128),
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "gfx942": Capacity(32, 32, 512, 8, 64 * 1024, 0, 512),
}


def resident_programs(architecture: str, registers: int, shared: int, warps: int) -> int:
    """How many programs a multiprocessor holds at a time.

    Args:
        architecture: a key of `CAPACITY`.
        registers: of a thread.
        shared: bytes of a program.
        warps: of a program; waves on gfx942.
    """
    capacity = CAPACITY[architecture]
    allocated = _round_up(max(registers, 1), capacity.register_unit)
    if architecture.startswith("sm"):  # each scheduler has a quarter of the registers
        per_unit = capacity.registers // SCHEDULERS // (allocated * 32)
    else:
        per_unit = min(capacity.warps // SCHEDULERS, capacity.registers // allocated)
    by_shared = capacity.programs
    if shared or capacity.shared_reserved:
        by_shared = capacity.shared // _round_up(shared + capacity.shared_reserved, capacity.shared_unit)
    return min(capacity.programs, capacity.warps // warps, per_unit * SCHEDULERS // warps, by_shared)


def occupancy(architecture: str, registers: int, shared: int, warps: int) -> float:
    """The fraction of a multiprocessor's warps that can be resident."""
    return resident_programs(architecture, registers, shared, warps) * warps / CAPACITY[architecture].warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# Opcodes by the unit of a scheduler that executes them, and the cycles for which an instruction of a warp occupies it:
# 32 lanes over a quarter of the results per cycle and multiprocessor in the CUDA C++ Programming Guide, "Arithmetic
# Instructions", compute capability 9.0. Loads and stores of up to 32 bits; wider ones take as many times longer.
# Opcodes that are not listed go to "alu", or to "uniform" if they begin with U.
UNITS: dict[str, tuple[float, str]] = {
    "fma": (1, "FADD FMUL FFMA HADD2 HMUL2 HFMA2"),
    "integer multiply": (2, "IMAD IMUL"),
    "float64": (2, "DADD DMUL DFMA DSETP"),
    "special": (8, "MUFU POPC FLO BREV I2F F2I F2F FRND I2I F2FP.F64"),
    "memory": (4, "LDG STG LDS STS LDGSTS LDSM STSM SHFL ATOM ATOMG ATOMS RED LDL STL LD ST"),
    "control": (0, "BRA BSSY BSYNC CALL RET EXIT BAR WARPSYNC BREAK DEPBAR LDGDEPBAR WARPGROUP ERRBAR MEMBAR"),
    "matrix": (0, "HMMA HGMMA"),
    "alu": (2, ""),
    "uniform": (2, ""),
}
_UNIT_OF = {opcode: unit for unit, (_, opcodes) in UNITS.items() for opcode in opcodes.split()}
# Multiply-adds a cycle of a scheduler's tensor core: the white paper's 989 dense TFLOP/s at 1.83 GHz.
_MATRIX_RATE = {"BF16": 512, "F16": 512, "TF32": 256}


def occupied(opcode: str) -> tuple[str, float]:
    """The unit that executes an opcode, and for how many cycles."""
    name = opcode.split(".")[0]
    unit = _UNIT_OF.get(name, "uniform" if name.startswith("U") else "alu")
    if unit == "matrix":
        return unit, _matrix_cycles(opcode)
    cycles, _ = UNITS[unit]
    if unit == "memory" and (width := re.search(r"\.(64|128)\b", opcode)):
        cycles *= int(width[1]) / 32
    return unit, cycles


def _matrix_cycles(opcode: str) -> float:
    """HGMMA.64x64x16.F32.BF16 is issued by four warps, each to its own tensor core; HMMA.16816.F32.BF16 by one."""
    rate = next((rate for dtype, rate in _MATRIX_RATE.items() if opcode.endswith(dtype)), 512)
    if wide := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, wide.groups())
        return m * n * k / SCHEDULERS / rate
    shape = re.search(r"\.(16)(8)(\d+)", opcode)
    m, n, k = map(int, shape.groups()) if shape else (16, 8, 16)
    return m * n * k / rate


# Cycles from issue until the result of an instruction of variable latency can be used. Memory: an H100's hit in L2 and
# its shared memory, after Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture"
# (arXiv:2402.13499), quoted from memory. Others: rounded guesses. All of them are to be measured.
LATENCIES = {
    "LDG": 263, "LD": 263, "ATOM": 263, "ATOMG": 263, "LDGSTS": 263, "LDGDEPBAR": 263,
    "LDS": 29, "LDSM": 33, "SHFL": 24, "LDC": 40, "LDCU": 40, "ULDC": 0, "S2R": 30, "S2UR": 30,
    "MUFU": 20, "REDUX": 25, "STG": 20, "STS": 20,
}  # fmt: skip
OTHER_LATENCY = 15
OPERANDS_READ = 15  # from issue until an instruction has read its operands
BARRIER = 30  # cycles of a barrier whose warps arrive together
MATRIX_WAIT = 64  # cycles of waiting for the matrix products that are in flight
