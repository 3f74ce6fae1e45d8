"""The barrier between a store to global memory and the loads that read what other threads of the program stored.

Every path through the machine code, from the store to a load, must pass a barrier of the program. On NVIDIA a barrier
orders accesses to memory. On gfx942 only those do that LLVM's code has between a release and an acquire: it may move
accesses past the others. In the machine code nothing but the barrier is left of such a fence, because the waves of a
program share an L1 that is accessed in order (LLVM's User Guide for AMDGPU, "Memory Model gfx942", without tgsplit).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.harness.operators import Fence
from benchmarks.reporting.control_flow import Code, Instruction
from benchmarks.reporting.source_map import text_of

_LOAD = re.compile(r"(LDG|LD|LDGSTS)\b|(global|buffer|flat)_load_")
_STORE = re.compile(r"STG?\b|(global|buffer|flat)_store_")
_FENCED_BARRIER = re.compile(
    r'fence syncscope\("workgroup"\) release, !dbg !(\d+)\s+'
    r"tail call void @llvm\.amdgcn\.s\.barrier\(\), !dbg !\1\s+"
    r'fence syncscope\("workgroup"\) acquire, !dbg !\1'
)


def unfenced(code: Code, fence: Fence, orders_memory: Callable[[Instruction], bool]) -> str | None:
    """What is wrong with a fence, or None.

    Args:
        code: of the kernel.
        fence: the accesses.
        orders_memory: whether an instruction is a barrier that orders accesses.
    """
    stores, loads = _places(code, _STORE, fence.store), _places(code, _LOAD, fence.load)
    if not stores or not loads:
        return f"no {'load' if stores else 'store'} in a line with `{fence.load if stores else fence.store}`"
    seen: set[tuple[int, int]] = set()
    pending = [(block, index + 1) for block, index in stores]
    while pending:
        block, begin = place = pending.pop()
        if place in seen:
            continue
        seen.add(place)
        for index in range(begin, len(code.blocks[block])):
            if (block, index) in loads:
                return f"no barrier between the store of `{fence.store}` and the load of `{fence.load}`"
            if orders_memory(code.blocks[block][index]):
                break
        else:
            pending += [(successor, 0) for successor in code.successors[block]]
    return None


def is_nvidia_barrier(instruction: Instruction) -> bool:
    return instruction.name == "BAR"


def amd_barriers(llvm: str) -> Callable[[Instruction], bool]:
    """Whether an instruction is a barrier that LLVM's code has between a release and an acquire."""
    lines = {int(line) for line in _FENCED_BARRIER.findall(llvm)}
    numbers = dict(re.findall(r"^!(\d+) = !DILocation\(line: (\d+),", llvm, re.M))
    fenced = {int(numbers[str(line)]) for line in lines}
    return lambda instruction: (
        instruction.name == "s_barrier" and instruction.line is not None and instruction.line[1] in fenced
    )


def _places(code: Code, opcode: re.Pattern[str], text: str) -> set[tuple[int, int]]:
    """Positions of the instructions of an opcode whose line in the source has a text."""
    return {
        (block, index)
        for block, instructions in enumerate(code.blocks)
        for index, instruction in enumerate(instructions)
        if opcode.match(instruction.opcode) and text in text_of(instruction.line)
    }
