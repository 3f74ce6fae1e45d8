"""From the machine code of a kernel to the loops and branches of its source, by the line of each instruction.

A loop is named after its variable: the target of a `for`, or the first name in the condition of a `while`. In a
function that the kernel calls, the function's name comes first: `suppressed_by_kept.first`. A branch is named by its
condition: `if word * 64 < last`. `tl.static_range` is unrolled, so its loops are not in the machine code.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from benchmarks.reporting.control_flow import Code, Line, Loop

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class SourceLoop:
    """A loop that is not unrolled."""

    function: str
    variable: str
    lines: range  # from its header to the last line of its body

    def name(self, kernel: str) -> str:
        return self.variable if self.function == kernel else f"{self.function}.{self.variable}"


@dataclass(frozen=True)
class SourceBranch:
    """An `if` statement."""

    name: str
    header: range  # lines of its condition
    body: range
    otherwise: range


@dataclass(frozen=True)
class Statements:
    """The loops and branches of a file, outer ones before those that they contain."""

    loops: list[SourceLoop]
    branches: list[SourceBranch]
    text: list[str]  # the file's lines


@lru_cache
def statements(path: str) -> Statements:
    """The loops and branches of a file; none of a file that is not below this repository."""
    file = _in_this_checkout(path)
    text = file.read_text() if file else ""
    loops, branches = [], []
    for node, function in _with_function(ast.parse(text), ""):
        if isinstance(node, ast.For) and "static_range" not in ast.unparse(node.iter):
            loops.append(SourceLoop(function, ast.unparse(node.target), _lines(node)))
        elif isinstance(node, ast.While):
            names = [name for name in ast.walk(node.test) if isinstance(name, ast.Name)]
            variable = min(names, key=lambda name: (name.lineno, name.col_offset)).id
            loops.append(SourceLoop(function, variable, _lines(node)))
        elif isinstance(node, ast.If):
            body, otherwise = (_lines(part[0], part[-1]) if part else range(0) for part in (node.body, node.orelse))
            name = f"if {ast.unparse(node.test)}"
            branches.append(SourceBranch(name, range(node.lineno, node.body[0].lineno), body, otherwise))
    return Statements(loops, branches, text.splitlines())


def text_of(line: Line | None) -> str:
    """The source of a line."""
    if line is None:
        return ""
    path, number = line
    text = statements(path).text
    return text[number - 1] if number <= len(text) else ""


def loop_names(code: Code, kernel: str) -> list[str]:
    """The source's name of each of the code's loops; "?" for one whose lines are in no loop of the source."""
    return [_loop_name(code, loop, kernel) for loop in code.loops]


def branch_of(line: Line | None) -> SourceBranch | None:
    """The `if` statement whose condition is on a line."""
    if line is None:
        return None
    path, number = line
    return next((branch for branch in statements(path).branches if number in branch.header), None)


def taken_first(code: Code, block: int, branch: SourceBranch, path: str) -> bool:
    """Whether a conditional branch falls through into the body of its `if` statement."""
    sides = code.successors[block]
    for lines, falls in ((branch.body, True), (branch.otherwise, False)):
        for index, side in enumerate(sides):
            inside = [
                instruction.line
                for other, dominators in enumerate(code.dominators)
                if side in dominators and block in dominators
                for instruction in code.blocks[other]
            ]
            # The block after the `if` statement may be dominated too, but it has no lines of the statement.
            if any(line and line[0] == path and line[1] in lines for line in inside):
                return falls == (index == 0)
    return len(sides) > 1  # otherwise the body is a `return`, which the branch itself executes


def _loop_name(code: Code, loop: Loop, kernel: str) -> str:
    """The innermost loop around the branch back, or else around most of the loop's own instructions."""
    latch = code.blocks[loop.latches[-1]][-1].line
    if found := _enclosing(latch):
        return found.name(kernel)
    lines = [instruction.line for block in code.own_blocks(loop) for instruction in code.blocks[block]]
    names = Counter(found.name(kernel) for line in lines if (found := _enclosing(line)))
    return names.most_common(1)[0][0] if names else "?"


def _enclosing(line: Line | None) -> SourceLoop | None:
    if line is None:
        return None
    path, number = line
    return next((loop for loop in reversed(statements(path).loops) if number in loop.lines), None)


def _in_this_checkout(path: str) -> Path | None:
    """Triton's cache returns what another checkout compiled from the same source."""
    parts = Path(path).parts
    candidates = (ROOT.joinpath(*parts[start:]) for start in range(1, len(parts)))
    return next((file for file in candidates if file.is_file()), None)


def _with_function(node: ast.AST, function: str) -> Iterator[tuple[ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, ast.FunctionDef) else function
        yield child, inside
        yield from _with_function(child, inside)


def _lines(first: ast.stmt, last: ast.stmt | None = None) -> range:
    end = (last or first).end_lineno
    assert end is not None
    return range(first.lineno, end + 1)
