"""Compiled kernels as graphs: loops, slow paths, names of the source, fences; on every architecture, without a GPU."""

import pytest
import torch

from benchmarks.harness.operators import Call, Fence, Operator
from benchmarks.reporting import compile_report
from benchmarks.reporting.compile_report import TARGETS, compile_workloads, measure
from benchmarks.reporting.control_flow import Instruction, graph
from benchmarks.reporting.sass import parse
from benchmarks.reporting.source_map import branch_of, loop_names, taken_first
from fastmask.kernels._runtime import jit, tl

pytestmark = pytest.mark.reference_only

NVIDIA = [name for name in TARGETS if name.startswith("sm")]


def declared(launch, **options):
    """A declaration with one compile case, "case"."""
    call = {"case": lambda: Call(launch, {})}
    return {"operator": Operator(lambda _, __: [], call, {}, lambda _, __: None, **options)}


def code_of(architecture, launch):
    """The machine code of the one kernel that a function launches."""
    (variant,) = compile_workloads(architecture, declared(launch))
    figures = compile_report._measure_amd if architecture == "gfx942" else compile_report._measure_nvidia
    return figures(variant.binary)[0]


def plain(opcode="FADD", target=None, conditional=False):
    return Instruction(opcode, conditional, target, ends_block=opcode in ("BRA", "EXIT"))


def test_nested_loops_of_a_graph():
    instructions = [
        plain(),  # entry
        plain(),  # outer:
        plain(),  # inner:
        plain(),
        plain("BRA", "inner", conditional=True),
        plain(),
        plain("BRA", "outer", conditional=True),
        plain("EXIT"),
        plain(),  # unreachable
    ]
    code = graph(instructions, {"outer": 1, "inner": 2, "after": 8})
    assert code.size == 8
    assert code.nested_sizes == "6 (3)"
    outer, inner = code.loops
    assert inner.blocks < outer.blocks
    assert code.own_blocks(inner) == inner.blocks
    assert sum(len(code.blocks[block]) for block in code.own_blocks(outer)) == 3
    assert code.dominator(outer.header) == 0


def test_a_branch_into_the_middle_of_a_loop_is_no_loop():
    """Rare code is moved behind the kernel, from where it jumps back."""
    instructions = [
        plain("BRA", "rare", conditional=True),
        plain(),  # back:
        plain("EXIT"),
        plain(),  # rare:
        plain("BRA", "back"),
    ]
    code = graph(instructions, {"back": 1, "rare": 3})
    assert code.size == 5
    assert code.loops == []
    assert code.nested_sizes == ""


def test_loops_side_by_side():
    instructions = [
        plain(),  # first:
        plain("BRA", "first", conditional=True),
        plain(),  # second:
        plain(),
        plain("BRA", "second", conditional=True),
        plain("EXIT"),
    ]
    assert graph(instructions, {"first": 0, "second": 2}).nested_sizes == "2, 3"


TEXT = """
kernel:
	//## File "/somewhere/kernel.py", line 7
        /*0000*/                   S2R R0, SR_CTAID.X ;           /* 0x0000000000007919 */
                                                                  /* 0x000e220000002500 */
.L_x_0:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0000000402048981 */
                                                                  /* 0x001ea8000c1e1d00 */
        /*0020*/                   NOP ;                          /* 0x0000000000007918 */
                                                                  /* 0x000fc00000000000 */
        /*0030*/               @P1 BRA `(.L_x_0) ;                /* 0xfffffffc00201947 */
                                                                  /* 0x004fea000383ffff */
        /*0040*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath) ;  /* 0x0 */
                                                                  /* 0x000fea0003c00000 */
        /*0050*/                   EXIT ;                         /* 0x000000000000794d */
                                                                  /* 0x000fea0003800000 */
$__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:
        /*0060*/                   FADD R0, R0, R0 ;              /* 0x0000000000007221 */
                                                                  /* 0x000fea0003800000 */
"""


def test_the_text_of_the_disassembler():
    code = parse(TEXT)
    s2r, load, branch, call, end = (instruction for block in code.blocks for instruction in block)
    assert s2r.line == ("/somewhere/kernel.py", 7)
    assert (s2r.writes, s2r.reads, s2r.waits, s2r.stall) == (0, None, (), 1)
    assert (load.opcode, load.name, load.conditional) == ("LDG.E.128", "LDG", True)
    assert (load.writes, load.waits) == (2, (0,))
    assert (branch.waits, branch.stall, branch.ends_block) == ((2,), 5, True)
    assert call.is_slow_call
    assert not end.conditional
    assert code.slow_paths == 1
    assert code.nested_sizes == "2"


@jit(do_not_specialize=["rows", "columns"])
def _nested_kernel(source, target, rows, columns, BLOCK: tl.constexpr):
    """Two nested loops that are not unrolled, a division by rounding to nearest, and a rare branch."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        column = tl.load(source + row).to(tl.int32)
        while column < columns:
            total += tl.load(source + row * columns + column * lane)
            column += tl.load(source + column).to(tl.int32)
        total = tl.div_rn(total, tl.load(source + row))
    if tl.load(source + rows) > 3:
        tl.store(target + lane, total * total)


def launch_nested():
    source = torch.empty(1 << 20, device="meta")
    _nested_kernel[(7, 3)](source, source, 100, 100, BLOCK=128)


@pytest.mark.parametrize("architecture", TARGETS)
def test_loops_have_the_names_of_the_source(architecture):
    code = code_of(architecture, launch_nested)
    assert loop_names(code, "_nested_kernel") == ["row", "column"]
    assert loop_names(code, "another_kernel") == ["_nested_kernel.row", "_nested_kernel.column"]
    outer, inner = code.loops
    assert code.loop_size(inner) < code.loop_size(outer) < code.size


@pytest.mark.parametrize("architecture", NVIDIA)
def test_slow_paths_are_counted(architecture):
    code = code_of(architecture, launch_nested)
    assert (code.slow_paths, code.loop_slow_paths) == (1, 1)


@jit(do_not_specialize=["rows"])
def _leaving_kernel(source, target, rows, BLOCK: tl.constexpr):
    """A program may return at once. A division before a loop, none in it."""
    lane = tl.arange(0, BLOCK)
    if tl.load(source + rows) > 3:
        return
    total = tl.div_rn(tl.load(source + lane), tl.load(source + rows + lane))
    for row in range(rows):
        total += tl.load(source + row * total.to(tl.int32))
    tl.store(target + lane, total)


def launch_leaving():
    source = torch.empty(1 << 20, device="meta")
    _leaving_kernel[(7,)](source, source, 100, BLOCK=128)


@pytest.mark.parametrize("architecture", NVIDIA)
def test_slow_paths_before_a_loop_are_not_in_it(architecture):
    code = code_of(architecture, launch_leaving)
    assert (code.slow_paths, code.loop_slow_paths) == (1, 0)


@pytest.mark.parametrize("architecture", NVIDIA)
def test_a_branch_that_returns_falls_through_where_its_condition_does_not_hold(architecture):
    code = code_of(architecture, launch_leaving)
    last = [(number, block[-1]) for number, block in enumerate(code.blocks) if block and block[-1].conditional]
    found = [(number, i.line[0], branch) for number, i in last if i.line and (branch := branch_of(i.line))]
    assert [branch.name for _, _, branch in found] == ["if tl.load(source + rows) > 3"]
    number, path, branch = found[0]
    assert not taken_first(code, number, branch, path)


@pytest.mark.parametrize("architecture", NVIDIA)
def test_branches_have_the_conditions_of_the_source(architecture):
    code = code_of(architecture, launch_nested)
    last = [(number, block[-1]) for number, block in enumerate(code.blocks) if block and block[-1].conditional]
    found = [(number, i.line[0], branch) for number, i in last if i.line and (branch := branch_of(i.line))]
    assert [branch.name for _, _, branch in found] == ["if tl.load(source + rows) > 3"] * len(found)
    number, path, branch = found[0]
    assert taken_first(code, number, branch, path)


def test_launches_and_their_arguments_are_recorded():
    (variant,) = compile_workloads("sm_90", declared(launch_nested))
    (launch,) = variant.launches["case"]
    assert (launch.kernel, launch.programs) == ("_nested_kernel", 21)
    assert (launch.arguments["rows"], launch.arguments["BLOCK"]) == (100, 128)
    assert launch.arguments["source"].shape == (1 << 20,)


@jit(do_not_specialize=["steps"])
def _exchange_kernel(buffer, steps, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """Each step reads what another thread stored in the step before."""
    lane = tl.arange(0, BLOCK)
    value = lane
    for _ in range(steps):
        tl.store(buffer + lane, value)
        if BARRIER:
            tl.debug_barrier()
        value = tl.load(buffer + (lane ^ 64))


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(
    ("barrier", "load", "expected"),
    [
        (True, "lane ^ 64", ()),
        (False, "lane ^ 64", ("no barrier between the store of `buffer + lane, value` and the load of `lane ^ 64`",)),
        (True, "elsewhere", ("no load in a line with `elsewhere`",)),
    ],
)
def test_a_missing_fence_is_found(architecture, barrier, load, expected):
    def launch():
        buffer = torch.empty(1024, device="meta", dtype=torch.int32)
        _exchange_kernel[(1,)](buffer, 10, BLOCK=256, BARRIER=barrier)

    fence = Fence("_exchange_kernel", store="buffer + lane, value", load=load)
    (row,) = measure(architecture, declared(launch, fences=(fence,)))
    assert row.unfenced == expected
