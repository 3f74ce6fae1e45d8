"""A compiled kernel as a graph: instructions, basic blocks, dominators, loops. `sass.py` and `amdgcn.py` make it.

A loop is a natural loop: a branch back to a block that dominates it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Line = tuple[str, int]  # file and line


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    opcode: str  # with its modifiers: "LDG.E.128"
    conditional: bool  # has a predicate
    target: str | None = None  # the label that a branch or call names
    line: Line | None = None  # of the source
    ends_block: bool = False  # a branch or an exit
    stall: int = 1  # cycles until the warp may issue its next instruction
    writes: int | None = None  # the scoreboard that it clears when its result is written
    reads: int | None = None  # the scoreboard that it clears when its operands are read
    waits: tuple[int, ...] = ()  # scoreboards that it waits for

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def is_slow_call(self) -> bool:
        """Whether it calls code beside the kernel: a slow path, which ordinary operands do not take."""
        return self.name == "CALL" and self.target is not None and self.target.startswith("$")


@dataclass(frozen=True)
class Loop:
    """A natural loop."""

    header: int  # a block
    latches: tuple[int, ...]  # blocks that branch back to the header
    blocks: frozenset[int]  # of nested loops too


@dataclass(frozen=True)
class Code:
    """The body of a kernel as a graph of basic blocks; block 0 is the entry. Unreachable code is left out."""

    blocks: Sequence[Sequence[Instruction]]
    successors: Sequence[Sequence[int]]  # of a conditional branch: the next block, then the branch's target

    @property
    def size(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def slow_paths(self) -> int:
        """Calls of the slow paths of divisions and roots."""
        return sum(map(_is_slow_path, (instruction for block in self.blocks for instruction in block)))

    @property
    def loop_slow_paths(self) -> int:
        """Those that a loop calls."""
        # A call and the branch back from it may be laid out behind the loop that reaches them, but are part of it.
        inside = frozenset[int]().union(*(loop.blocks for loop in self.loops))
        return sum(map(_is_slow_path, (instruction for block in inside for instruction in self.blocks[block])))

    @cached_property
    def predecessors(self) -> list[list[int]]:
        lists: list[list[int]] = [[] for _ in self.blocks]
        for block, following in enumerate(self.successors):
            for successor in following:
                lists[successor].append(block)
        return lists

    @cached_property
    def order(self) -> list[int]:
        """The blocks in reverse postorder."""
        done: list[int] = []
        seen = {0}
        stack = [(0, iter(self.successors[0]))]
        while stack:
            block, rest = stack[-1]
            following = next((successor for successor in rest if successor not in seen), None)
            if following is None:
                done.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.successors[following])))
        return done[::-1]

    @cached_property
    def dominators(self) -> list[set[int]]:
        """Of each block the blocks that every path to it visits, itself included."""
        sets = [set(self.order) for _ in self.blocks]
        sets[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                common = {block} | set.intersection(*(sets[before] for before in self.predecessors[block]))
                changed |= common != sets[block]
                sets[block] = common
        return sets

    def dominator(self, block: int) -> int:
        """The closest block before this one that every path visits."""
        return max(self.dominators[block] - {block}, key=lambda other: len(self.dominators[other]))

    @cached_property
    def loops(self) -> list[Loop]:
        """In the order of the code, an outer loop before those that it contains."""
        latches: dict[int, list[int]] = {}
        for block, following in enumerate(self.successors):
            for successor in set(following) & self.dominators[block]:
                latches.setdefault(successor, []).append(block)
        loops = []
        for header, ends in sorted(latches.items()):
            inside, pending = {header}, list(ends)
            while pending:
                block = pending.pop()
                if block not in inside:
                    inside.add(block)
                    pending += self.predecessors[block]
            loops.append(Loop(header, tuple(ends), frozenset(inside)))
        return loops

    def own_blocks(self, loop: Loop) -> frozenset[int]:
        """Blocks of a loop that are in no loop that it contains."""
        return loop.blocks.difference(*(other.blocks for other in self.loops if other.blocks < loop.blocks))

    def loop_size(self, loop: Loop) -> int:
        """Instructions of a loop, those of nested loops included."""
        return sum(len(self.blocks[block]) for block in loop.blocks)

    @property
    def nested_sizes(self) -> str:
        """Instructions of each loop, the loops that it contains in brackets: `310 (46)`."""

        def sizes(within: frozenset[int]) -> str:
            inside = [loop for loop in self.loops if loop.blocks < within]
            outer = [loop for loop in inside if not any(loop.blocks < other.blocks for other in inside)]
            parts = ((self.loop_size(loop), sizes(loop.blocks)) for loop in outer)
            return ", ".join(f"{size} ({below})" if below else str(size) for size, below in parts)

        return sizes(frozenset({*range(len(self.blocks)), -1}))


def _is_slow_path(instruction: Instruction) -> bool:
    return instruction.is_slow_call and re.search("div|rcp|sqrt", str(instruction.target)) is not None


def graph(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> Code:
    """Basic blocks of the instructions of a kernel; `labels` are positions in them."""
    starts = {0, *labels.values(), *(index + 1 for index, i in enumerate(instructions) if i.ends_block)}
    first = sorted(start for start in starts if start < len(instructions))
    number = {start: block for block, start in enumerate(first)}
    spans = list(zip(first, [*first[1:], len(instructions)], strict=True))
    successors: list[list[int]] = []
    for _, end in spans:
        last = instructions[end - 1]
        following = []
        if end in number and (last.conditional or not last.ends_block):
            following.append(number[end])
        if last.ends_block and last.target is not None:
            following.append(number[labels[last.target]])
        successors.append(following)
    reachable = sorted(Code([instructions[start:end] for start, end in spans], successors).order)
    kept = {block: index for index, block in enumerate(reachable)}
    return Code(
        [instructions[slice(*spans[block])] for block in reachable],
        [[kept[successor] for successor in successors[block]] for block in reachable],
    )
