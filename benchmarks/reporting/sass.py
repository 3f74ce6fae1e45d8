"""NVIDIA's machine code (SASS) of a compiled kernel.

The disassembler is asked for source lines and encodings. The upper 64 bits of an encoding hold what the scheduler does
after it issued the instruction: how many cycles it waits, and which of six scoreboards an instruction of variable
latency sets and a later one waits for. Bits 41 to 57 are the same on sm_80, sm_90 and sm_100.

Code beside the kernel that is called, such as the slow path of a division (denormal operands), is left out.
"""

from __future__ import annotations

import re

from benchmarks.reporting.control_flow import Code, Instruction, Line, graph

DISASSEMBLE = ("-c", "-g", "-hex", "-ndf")  # options of nvdisasm

_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_LINE = re.compile(r'^\s*//## File "(.*?)", line (\d+)')
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;?\s*/\* 0x[0-9a-f]+ \*/\s*$"
)
_SECOND_WORD = re.compile(r"^\s+/\* 0x([0-9a-f]+) \*/\s*$")
_TARGET = re.compile(r"`\((\S+?)\)")
_NO_SCOREBOARD = 7


def parse(text: str) -> Code:
    """The first kernel in the text of a disassembler."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line: Line | None = None
    pending: tuple[str | None, str, str] | None = None
    for row in text.splitlines():
        if pending is None and (found := _LABEL.match(row)):
            if found[1].startswith("$"):  # the kernel ends where code that it calls begins
                break
            labels[found[1]] = len(instructions)
        elif found := _LINE.match(row):
            line = found[1], int(found[2])
        elif found := _INSTRUCTION.match(row):
            pending = found[1], found[2], found[3]
        elif pending and (found := _SECOND_WORD.match(row)):
            if pending[1] != "NOP":
                instructions.append(_instruction(*pending, int(found[1], 16), line))
            pending = None
    return graph(instructions, labels)


def _instruction(predicate: str | None, opcode: str, operands: str, upper: int, line: Line | None) -> Instruction:
    target = _TARGET.search(operands)
    before_target = operands[: target.start()].strip() if target else ""
    # A branch on a uniform predicate, or on the divergence of the warp, has an operand: "BRA UP0, `(.L_x_1)".
    conditional = predicate is not None or (opcode.startswith("BRA") and before_target != "")
    control = upper >> 41
    write, read, mask = (control >> 5) & 7, (control >> 8) & 7, (control >> 11) & 63
    waits = [index for index in range(6) if mask >> index & 1]
    if opcode.startswith("DEPBAR") and (found := re.match(r"SB(\d), 0x0$", operands)):  # waits for all that it counts
        waits.append(int(found[1]))
    name = opcode.split(".")[0]
    # On sm_80 the compiler leaves some loops by a call of a label in the kernel, which is a jump.
    is_jump = name == "BRA" or (name == "CALL" and target is not None and target[1].startswith(".L"))
    return Instruction(
        opcode,
        conditional,
        target[1] if target else None,
        line,
        ends_block=is_jump or name in ("EXIT", "RET"),
        stall=control & 15,
        writes=None if write == _NO_SCOREBOARD else write,
        reads=None if read == _NO_SCOREBOARD else read,
        waits=tuple(waits),
    )
