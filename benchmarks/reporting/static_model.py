"""How long a launch takes and what bounds it, from its machine code and what its operator declares; without a GPU.

Executed instructions: each basic block runs as often as its loops iterate (`Work.trips`) and its branches are taken
(`Work.branches`, otherwise both sides count as executed). Slow paths of divisions are not taken.

    issue    programs * warps * cycles / (multiprocessors * 4 * clock); cycles is the larger of the instructions that a
             warp executes, one a cycle, and the cycles for which they occupy the busiest unit of a scheduler
    L2       bytes that programs request / bandwidth of L2
    HBM      bytes that have to move, and those that L2 cannot hold until they are read again / bandwidth of a copy
    latency  of a warp alone: cycles from its first to its last instruction, with the stalls that the compiler encoded
             and the latency of loads (from L2, although some hit L1) and of other instructions that a later one waits
             for. Programs run in programs / (multiprocessors * resident programs) turns, at least one. The longest
             program (`Work.longest`, all branches that are ever taken) bounds it too.
    time     the largest of the four, and the launch

These are bounds: a kernel that is limited by two of them at once takes longer than either says.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.operators import Launch, Trips, Work
from benchmarks.reporting.control_flow import Code, Instruction
from benchmarks.reporting.hardware import (
    BARRIER,
    LATENCIES,
    MATRIX_WAIT,
    OPERANDS_READ,
    OTHER_LATENCY,
    SCHEDULERS,
    Device,
    occupied,
)
from benchmarks.reporting.source_map import branch_of, loop_names, taken_first

_NEVER = 1e-9  # iterations of a loop that does not run: what follows it still runs


@dataclass(frozen=True)
class Executed:
    """What one warp of a program executes."""

    instructions: float
    issue_cycles: float
    latency_cycles: float  # of the mean program
    longest_cycles: float  # of the longest program


@dataclass(frozen=True)
class Time:
    """Microseconds of a launch, or of all launches of a kernel in a case."""

    issue: float
    l2: float
    hbm: float
    latency: float
    total: float
    floor: float  # the bytes that have to move, at the bandwidth of a copy

    @property
    def bound(self) -> str:
        bounds = {"issue": self.issue, "L2": self.l2, "HBM": self.hbm, "latency": self.latency}
        return max(bounds, key=lambda name: bounds[name])

    def __add__(self, other: Time) -> Time:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Time(*(a + b for a, b in pairs))


class ModelError(ValueError):
    """The declaration does not fit the machine code."""


def executed(code: Code, kernel: str, work: Work) -> Executed:
    """What a warp executes.

    Raises:
        ModelError: a loop of the machine code has no trips, or a declared loop or branch is not in the machine code.
    """
    mean = frequencies(code, kernel, work.trips, work.branches)
    always = {name: share for name, share in work.branches.items() if share in (0.0, 1.0)}
    longest = frequencies(code, kernel, {**work.trips, **work.longest}, always)
    cycles: defaultdict[str, float] = defaultdict(float)
    for block, frequency in zip(code.blocks, mean, strict=True):
        for instruction in block:
            unit, occupies = occupied(instruction.opcode)
            cycles[unit] += frequency * occupies
    instructions = sum(frequency * len(block) for block, frequency in zip(code.blocks, mean, strict=True))
    latencies = _block_latencies(code, mean)
    return Executed(
        instructions,
        max(instructions, *cycles.values()),
        sum(frequency * latency for frequency, latency in zip(mean, latencies, strict=True)),
        sum(frequency * latency for frequency, latency in zip(longest, latencies, strict=True)),
    )


def time(device: Device, launch: Launch, warps: int, resident: int, work: Work, run: Executed) -> Time:
    """The time of one launch.

    Args:
        device: where it runs.
        launch: the number of programs.
        warps: of a program.
        resident: programs that a multiprocessor holds at a time.
        work: what the operator declares.
        run: what a warp executes.
    """
    cycles_per_us = device.clock_ghz * 1000
    issue = launch.programs * warps * run.issue_cycles / (device.multiprocessors * SCHEDULERS) / cycles_per_us
    turns = max(1.0, launch.programs / (device.multiprocessors * resident))
    latency = max(turns * run.latency_cycles, run.longest_cycles) / cycles_per_us
    l2 = work.l2_bytes / device.l2_tb_s / 1e6
    floor = work.hbm_bytes / device.hbm_tb_s / 1e6
    missing = max(0.0, 1 - device.l2_mb * 1e6 / work.shared_bytes) if work.shared_bytes else 0.0
    hbm = (work.hbm_bytes + missing * work.reread_bytes) / device.hbm_tb_s / 1e6
    return Time(issue, l2, hbm, latency, max(issue, l2, hbm, latency) + device.launch_us, floor)


def frequencies(code: Code, kernel: str, trips: Trips, branches: Mapping[str, float]) -> list[float]:
    """How often a warp executes each block."""
    iterations = [max(count, _NEVER) for count in _iterations(loop_names(code, kernel), trips)]
    probability = _probabilities(code, branches)

    def leaving(block: int, following: int) -> float:
        """The fraction of a block's executions after which its loops are left."""
        fraction = 1.0
        for loop, count in zip(code.loops, iterations, strict=True):
            if block in loop.blocks and following not in loop.blocks:
                fraction /= count
        return fraction

    result = [0.0] * len(code.blocks)
    for block in code.order:
        reached = 1.0
        if block:
            before = [other for other in code.predecessors[block] if block not in code.dominators[other]]
            flow = sum(result[other] * leaving(other, block) * probability[other, block] for other in set(before))
            dominator = code.dominator(block)
            reached = min(flow, result[dominator] * leaving(dominator, block))
        for loop, count in zip(code.loops, iterations, strict=True):
            if loop.header == block:
                reached *= count
        result[block] = reached
    return result


def _iterations(names: Sequence[str], trips: Trips) -> list[float]:
    copies = Counter(names)
    declared = {name: count if isinstance(count, tuple) else (count,) for name, count in trips.items()}
    # A loop that is never reached may have any number of copies.
    declared |= {name: (0.0,) * copies[name] for name, counts in declared.items() if counts == (0.0,) and copies[name]}
    if copies != Counter({name: len(counts) for name, counts in declared.items()}):
        in_code = ", ".join(f"{name} x {count}" if count > 1 else name for name, count in copies.items()) or "none"
        in_work = ", ".join(f"{name} x {len(c)}" if len(c) > 1 else name for name, c in declared.items()) or "none"
        raise ModelError(f"the machine code has the loops {in_code}, and trips are declared for {in_work}")
    remaining = {name: iter(counts) for name, counts in declared.items()}
    return [next(remaining[name]) for name in names]


def _probabilities(code: Code, branches: Mapping[str, float]) -> dict[tuple[int, int], float]:
    """How often each edge of the graph is taken when its block is executed."""
    result = {(block, successor): 1.0 for block, all_ in enumerate(code.successors) for successor in all_}
    unused = set(branches)
    for block, following in enumerate(code.successors):
        last = code.blocks[block][-1] if code.blocks[block] else None
        if last is None or not last.conditional or not following:
            continue
        for successor in following:
            if any(instruction.is_slow_call for instruction in code.blocks[successor]):
                result[block, successor] = 0.0
        if last.opcode == "BRA.DIV" and len(following) == 2:  # where a warp has diverged
            result[block, following[1]] = 0.0
        branch = branch_of(last.line)
        name = branch and next((start for start in branches if branch.name.startswith(start)), None)
        if branch is None or name is None or last.line is None:
            continue
        unused.discard(name)
        holds = branches[name] if taken_first(code, block, branch, last.line[0]) else 1 - branches[name]
        for successor, fraction in zip(following, (holds, 1 - holds), strict=False):
            result[block, successor] = fraction
    if unused:
        raise ModelError(f"the machine code has no branch `{'`, `'.join(sorted(unused))}`")
    return result


def _block_latencies(code: Code, frequency: Sequence[float]) -> list[float]:
    """Cycles of each block for a warp alone, whose blocks run in the order of the code.

    A loop runs twice and its second iteration counts: it waits for loads of the first, not for those before the loop.
    """
    now = 0.0
    ready = [0.0] * 6  # when each scoreboard is clear
    cycles = [0.0] * len(code.blocks)

    def run(blocks: frozenset[int]) -> None:
        nonlocal now
        loops = [loop for loop in code.loops if loop.blocks < blocks]
        outermost = [loop for loop in loops if not any(loop.blocks < other.blocks for other in loops)]
        nested = frozenset[int]().union(*(loop.blocks for loop in outermost))
        for block in sorted(blocks):
            for loop in outermost:
                if loop.header == block:
                    run(loop.blocks)
                    run(loop.blocks)
            if block not in nested and frequency[block] > _NEVER:
                begin = now
                for instruction in code.blocks[block]:
                    now = _issue(instruction, now, ready)
                cycles[block] = now - begin

    run(frozenset(range(len(code.blocks))))
    return cycles


def _issue(instruction: Instruction, now: float, ready: list[float]) -> float:
    """When the next instruction can be issued."""
    now = max(now, *(ready[scoreboard] for scoreboard in instruction.waits), 0.0)
    if instruction.writes is not None:
        latency = LATENCIES.get(instruction.name, OTHER_LATENCY)
        ready[instruction.writes] = max(ready[instruction.writes], now + latency)
    if instruction.reads is not None:
        ready[instruction.reads] = max(ready[instruction.reads], now + OPERANDS_READ)
    extra = 0
    if instruction.name == "BAR":
        extra = BARRIER
    elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        extra = MATRIX_WAIT
    return now + max(instruction.stall, 1) + extra
