"""The static model's arithmetic: what is executed, occupancy, and the bounds of a launch."""

import json
import re

import pytest
import torch

from benchmarks.harness.operators import Call, Launch, ModelTarget, Operator, Work
from benchmarks.reporting import hardware, static_model
from benchmarks.reporting.compile_report import measure, section, violations
from benchmarks.reporting.control_flow import Instruction, graph
from benchmarks.reporting.hardware import Device, devices, occupancy, occupied, resident_programs
from benchmarks.reporting.static_model import Executed, ModelError, executed, frequencies, time
from fastmask.kernels._runtime import jit, tl

pytestmark = pytest.mark.reference_only

DEVICE = Device("GPU", multiprocessors=10, clock_ghz=1.0, l2_tb_s=2.0, l2_mb=1, hbm_tb_s=1.0, launch_us=2.0)


# By NVIDIA's occupancy calculator; by the waves that fit 512 registers of a lane on gfx942.
@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_90", 33, 0, 4, 0.75),  # allocated as 40; 51 warps fit, which are a multiple of 4
        ("sm_90", 64, 0, 8, 0.5),
        ("sm_90", 98, 0, 4, 0.25),
        ("sm_90", 128, 0, 16, 0.25),
        ("sm_90", 255, 0, 8, 0.125),
        ("sm_90", 16, 0, 1, 0.5),  # 32 programs at most
        ("sm_80", 16, 81 * 1024, 8, 0.25),  # 163 KB, one of which is the system's in each program
        ("sm_90", 16, 75 * 1024, 8, 0.375),
        ("sm_80", 16, 83 * 1024, 8, 0.125),
        ("sm_90", 16, 227 * 1024, 8, 0.125),
        ("sm_100", 40, 1024, 4, 0.75),
        ("gfx942", 64, 0, 4, 1.0),
        ("gfx942", 65, 0, 4, 0.875),
        ("gfx942", 128, 0, 4, 0.5),
        ("gfx942", 200, 0, 4, 0.25),
        ("gfx942", 16, 32 * 1024, 4, 0.25),
    ],
)
def test_occupancy(architecture, registers, shared, warps, expected):
    assert occupancy(architecture, registers, shared, warps) == expected


def test_resident_programs():
    assert resident_programs("sm_90", 98, 0, 4) == 4
    assert resident_programs("sm_90", 40, 0, 5) == 9  # 48 warps


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("FFMA", ("fma", 1)),
        ("IMAD.WIDE", ("integer multiply", 2)),
        ("LOP3.LUT", ("alu", 2)),
        ("UIADD3", ("uniform", 2)),
        ("MUFU.RCP", ("special", 8)),
        ("LDG.E", ("memory", 4)),
        ("LDG.E.128", ("memory", 16)),
        ("BRA", ("control", 0)),
        ("HGMMA.64x64x16.F32.BF16", ("matrix", 32)),
        ("HGMMA.64x32x8.F32.TF32", ("matrix", 16)),
        ("HMMA.16816.F32.BF16", ("matrix", 4)),
    ],
)
def test_units_of_opcodes(opcode, expected):
    assert occupied(opcode) == expected


def test_measured_bandwidth_replaces_the_table(tmp_path):
    run = {"date": "", "commit": "1", "device": "NVIDIA H200", "threads": 1, "versions": {}, "matrix_tflop_s": {}}
    for name, rate, quick in (("quick", 1000.0, True), ("full", 4321.0, False)):
        content = {"nms": {"run": run | {"copy_gb_s": rate, "quick": quick}, "cases": []}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    h100, h200 = devices(tmp_path)
    assert h200.hbm_tb_s == 4.321
    assert h100 == hardware.DEVICES[0]


@pytest.mark.parametrize(
    ("launch", "work", "run", "bound", "expected"),
    [
        # 40 programs of 4 warps of 1000 cycles, on 10 multiprocessors of 4 schedulers: 4 warps each
        (40, Work(0, 0), Executed(900, 1000, 100, 100), "issue", 4.0),
        (40, Work(0, 12e6), Executed(900, 1000, 100, 100), "L2", 6.0),
        (40, Work(7e6, 0), Executed(900, 1000, 100, 100), "HBM", 7.0),
        # half of 2 MB is not in an L2 of 1 MB, when it is read again
        (40, Work(7e6, 0, shared_bytes=2e6, reread_bytes=4e6), Executed(900, 1000, 100, 100), "HBM", 9.0),
        (40, Work(7e6, 0, shared_bytes=1e6, reread_bytes=4e6), Executed(900, 1000, 100, 100), "HBM", 7.0),
        # 20 programs are resident: two turns
        (40, Work(0, 0), Executed(900, 1000, 3000, 3000), "latency", 6.0),
        (5, Work(0, 0), Executed(900, 1000, 3000, 3000), "latency", 3.0),
        (40, Work(0, 0), Executed(900, 1000, 3000, 9000), "latency", 9.0),
    ],
)
def test_bounds(launch, work, run, bound, expected):
    moment = time(DEVICE, Launch("kernel", launch, {}), warps=4, resident=2, work=work, run=run)
    assert moment.bound == bound
    assert moment.total == pytest.approx(expected + DEVICE.launch_us)
    assert moment.floor == pytest.approx(work.hbm_bytes / 1e6)
    assert (moment + moment).total == pytest.approx(2 * moment.total)


def plain(opcode="FADD", target=None, conditional=False, **scheduling):
    return Instruction(opcode, conditional, target, ends_block=opcode in ("BRA", "EXIT"), **scheduling)


@pytest.fixture
def nested(monkeypatch):
    """Blocks of 1, 2, 3, 4 and 5 instructions: before, outer, inner, the rest of outer, after."""
    instructions = [plain(), plain(), plain(), plain(), plain(), plain("BRA", "inner", conditional=True)]
    instructions += [plain(), plain(), plain(), plain("BRA", "outer", conditional=True)]
    instructions += [plain(), plain(), plain(), plain(), plain("EXIT")]
    monkeypatch.setattr(static_model, "loop_names", lambda *_: ["outer", "inner"])
    return graph(instructions, {"outer": 1, "inner": 3})


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (10, 7), (2.5, 0.5), (3, 0), (0, 4)])
def test_executed_instructions_follow_the_trips(nested, outer, inner):
    run = executed(nested, "kernel", Work(0, 0, trips={"outer": outer, "inner": inner}))
    assert run.instructions == pytest.approx(1 + outer * (2 + inner * 3 + 4) + 5, abs=1e-6)


def test_the_longest_program_has_its_own_trips(nested):
    work = Work(0, 0, trips={"outer": 2, "inner": 3}, longest={"outer": 5})
    run = executed(nested, "kernel", work)
    assert run.latency_cycles == pytest.approx(1 + 2 * (2 + 3 * 3 + 4) + 5)
    assert run.longest_cycles == pytest.approx(1 + 5 * (2 + 3 * 3 + 4) + 5)


@pytest.mark.parametrize(
    ("names", "trips", "expected"),
    [
        (["i"], {}, "the machine code has the loops i, and trips are declared for none"),
        ([], {"i": 1.0}, "the machine code has the loops none, and trips are declared for i"),
        (["i", "i"], {"i": 1.0}, "the machine code has the loops i x 2, and trips are declared for i"),
        (["i"], {"i": (1.0, 2.0)}, "the machine code has the loops i, and trips are declared for i x 2"),
    ],
)
def test_loops_that_differ_from_the_declaration_are_an_error(names, trips, expected):
    with pytest.raises(ModelError, match=expected):
        static_model._iterations(names, trips)


def test_copies_of_a_loop_have_trips_of_their_own():
    assert static_model._iterations(["i", "j", "i"], {"i": (4.0, 1.0), "j": 2.0}) == [4.0, 2.0, 1.0]


def test_a_loop_that_is_never_reached_may_have_any_number_of_copies():
    assert static_model._iterations(["i", "j", "i"], {"i": 0.0, "j": 2.0}) == [0.0, 2.0, 0.0]
    with pytest.raises(ModelError, match="the machine code has the loops j, and trips are declared for i, j"):
        static_model._iterations(["j"], {"i": 0.0, "j": 2.0})


def test_slow_paths_and_diverged_warps_are_not_executed():
    instructions = [
        plain("BRA", "fast", conditional=True),
        plain("CALL", "$slowpath"),
        plain("BRA.DIV", "diverged", conditional=True),  # fast:
        plain("EXIT"),
        plain(),  # diverged:
        plain("EXIT"),
    ]
    instructions[2] = Instruction("BRA.DIV", True, "diverged", ends_block=True)
    code = graph(instructions, {"fast": 2, "diverged": 4})
    assert frequencies(code, "kernel", {}, {}) == [1, 0, 1, 1, 0]


def test_latency_counts_stalls_and_waits():
    instructions = [
        plain("LDG.E", writes=0, stall=2),
        plain("LDG.E", writes=1, stall=4),
        plain(stall=5, waits=(0,)),  # the second load is under way meanwhile
        plain(stall=3, waits=(1,)),
        plain("BAR.SYNC", stall=1),
        plain("EXIT", stall=5),
    ]
    code = graph(instructions, {})
    latency = hardware.LATENCIES["LDG"]
    run = executed(code, "kernel", Work(0, 0))
    assert run.latency_cycles == latency + 5 + 3 + (1 + hardware.BARRIER) + 5


def test_a_loop_waits_for_the_loads_of_its_previous_iteration(monkeypatch):
    instructions = [
        plain("LDG.E", writes=0),
        plain(waits=(0,), stall=4),  # loop:
        plain("LDG.E", writes=0, stall=2),
        plain("BRA", "loop", conditional=True, stall=5),
        plain("EXIT"),
    ]
    monkeypatch.setattr(static_model, "loop_names", lambda *_: ["loop"])
    run = executed(graph(instructions, {"loop": 1}), "kernel", Work(0, 0, trips={"loop": 10}))
    assert run.latency_cycles == 1 + 10 * (hardware.LATENCIES["LDG"] + 4) + 1


@jit(do_not_specialize=["size"])
def _rare_kernel(source, target, size, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if tl.load(source + size) > 3:
        for i in range(size):
            total += tl.sqrt_rn(tl.load(source + i * size + lane))
        tl.store(target + lane, total)
    else:
        tl.store(target + lane, total)


def operators(work, target=1000.0, kernel="_rare_kernel"):
    """A declaration of one kernel with a model."""

    def launch():
        source = torch.empty(1 << 20, device="meta")
        _rare_kernel[(100,)](source, source, 100, BLOCK=128)

    return {
        "operator": Operator(
            lambda _, __: [],
            {"case": lambda: Call(launch, {})},
            {},
            lambda _, __: None,
            models={kernel: lambda launch: work(launch)},
            targets=(ModelTarget("case", ("_rare_kernel",), target),),
        )
    }


def rare(share):
    return lambda launch: Work(
        hbm_bytes=0,
        l2_bytes=4.0 * launch.programs * launch.arguments["BLOCK"],
        trips={"i": float(launch.arguments["size"])},
        branches={"if tl.load(source + size) > 3": share},
    )


def test_branches_are_executed_as_often_as_declared():
    never, half, always = (
        measure("sm_90", operators(rare(share)))[0].modelled[0].instructions for share in (0.0, 0.5, 1.0)
    )
    assert never < 100
    assert always > 1000
    assert half == pytest.approx((never + always) / 2)


def test_a_model_is_part_of_the_report():
    declaration = operators(rare(1.0))
    (row,) = rows = measure("sm_90", declaration)
    (part,) = row.modelled
    assert (part.kernel, part.case, part.launches, part.programs) == ("_rare_kernel", "case", 1, 100)
    assert set(part.times) == {"H100", "H200"}
    assert part.times["H200"].bound == "latency"
    assert "## Model: H200" in section("sm_90", rows)
    assert "## Model" not in section("sm_80", measure("sm_80", declaration))


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        (operators(rare(1.0)), None),
        (operators(rare(1.0), target=0.5), r"_rare_kernel \(case\): \d+\.\d us on H200, at most 0\.5"),
        (
            operators(rare(1.0), kernel="other"),
            r"_rare_kernel \(case\): its operator declares models, but none of this",
        ),
        (operators(lambda _: Work(0, 0)), r"_rare_kernel \(case\): the machine code has the loops i, and .* for none"),
        (
            operators(lambda _: Work(0, 0, trips={"i": 1.0}, branches={"if gone": 0.5})),
            r"_rare_kernel \(case\): the machine code has no branch `if gone`",
        ),
    ],
)
def test_declarations_that_do_not_hold_are_violations(declaration, expected):
    rows = measure("sm_90", declaration)
    sentences = [sentence for sentence in violations(rows, declaration) if "budget" not in sentence]
    if expected is None:
        assert sentences == []
    else:
        assert re.search(expected, sentences[0])
