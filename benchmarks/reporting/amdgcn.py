"""AMD's machine code of a compiled kernel, from the assembly that Triton keeps."""

from __future__ import annotations

import re

from benchmarks.reporting.control_flow import Code, Instruction, Line, graph

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"(.*?)"(?:\s+"(.*?)")?')
_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_LABEL = re.compile(r"^(\.LBB\w+):")
_INSTRUCTION = re.compile(r"^\s+([a-z]+_\w+)\s*([^;]*)")


def parse(text: str) -> Code:
    """The kernel in the text of an assembly file."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    files: dict[str, str] = {}
    line: Line | None = None
    for row in text.splitlines():
        if found := _FILE.match(row):
            files[found[1]] = f"{found[2]}/{found[3]}" if found[3] else found[2]
        elif found := _LINE.match(row):
            line = files[found[1]], int(found[2])
        elif found := _LABEL.match(row):
            labels[found[1]] = len(instructions)
        elif row.startswith(".Lfunc_end"):
            break
        elif found := _INSTRUCTION.match(row):
            name, operands = found[1], found[2].strip()
            is_jump = name.startswith(("s_cbranch", "s_branch"))
            instructions.append(
                Instruction(
                    name,
                    conditional=name.startswith("s_cbranch"),
                    target=operands if is_jump else None,
                    line=line,
                    ends_block=is_jump or name in ("s_endpgm", "s_setpc_b64"),
                )
            )
    return graph(instructions, labels)
