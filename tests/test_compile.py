"""Every kernel variant of the declared workloads compiles for every architecture, within its limits, without a GPU."""

from dataclasses import replace

import pytest
import torch
from triton.runtime.jit import JITFunction

from benchmarks.harness.operators import Call, Limit, Operator, operators
from benchmarks.reporting.compile_report import COMMAND, DOCUMENT, TARGETS, Row, document, measure, section, violations
from benchmarks.reporting.model_report import ARCHITECTURE, target_section
from fastmask.kernels._runtime import jit, tl, triton

pytestmark = pytest.mark.reference_only


def declared(cases, limits=None):
    """A declaration with nothing but limits and compile cases, by name: functions that launch kernels."""
    calls = {name: lambda launch=launch: Call(launch, {}) for name, launch in cases.items()}
    return {"operator": Operator(lambda _, __: [], calls, limits or {}, lambda _, __: None)}


@pytest.mark.parametrize("architecture", TARGETS)
def test_kernels_keep_their_limits_and_the_committed_table(architecture):
    rows = measure(architecture, operators())
    table = section(architecture, rows)
    if broken := violations(rows, operators()):
        pytest.fail("\n".join([*broken, "", table]), pytrace=False)
    if table not in DOCUMENT.read_text():
        pytest.fail(f"not the committed table: run `{COMMAND}` and review its diff\n\n{table}", pytrace=False)
    if architecture == ARCHITECTURE:
        models = [part for row in rows for part in row.modelled]
        assert target_section(models, operators()) in DOCUMENT.read_text(), f"run `{COMMAND}` and review its diff"


def test_the_committed_table_is_of_this_triton():
    assert DOCUMENT.read_text().startswith(document([])), f"run `{COMMAND}` and review its diff"


def test_triton_and_the_operators_are_left_as_they_were():
    def fail():
        assert triton.runtime.driver.active.get_current_target() == TARGETS["gfx942"]
        raise FileNotFoundError

    call = next(iter(next(iter(operators().values())).compile_cases.values()))
    before = triton.runtime.driver._active, JITFunction.run
    with pytest.raises(FileNotFoundError):
        measure("gfx942", declared({"failure": fail}))
    assert (triton.runtime.driver._active, JITFunction.run) == before
    assert all(result.is_meta for result in call().run())  # by the fake implementation, without a driver


@jit()
def _offending_kernel(source, sums, size, BLOCK: tl.constexpr):
    """More strided loads that are live at once than there are registers, and an atomic sum."""
    index = tl.arange(0, BLOCK)
    values = tl.load(source + index * size)
    for i in range(size):
        values += tl.load(source + i) * values
    tl.atomic_add(sums + index, values, sem="relaxed")


# A thread holds as many values as it can have registers.
@pytest.mark.parametrize(("architecture", "block"), [("sm_90", 256 * 32), ("gfx942", 512 * 64)])
def test_spills_stack_and_atomics_are_measured(architecture, block):
    def launch():
        source = torch.empty(1 << 20, device="meta")
        _offending_kernel[(1,)](source, source, 35, BLOCK=block, num_warps=1)

    (row,) = measure(architecture, declared({"offence": launch}))
    assert (row.kernel, row.cases, row.warps) == ("_offending_kernel", ("offence",), 1)
    assert row.spills > 0
    assert row.stack > 0
    assert row.atomics > 0
    assert row.narrow_loads > 0
    assert row.wide_loads == row.wide_stores == 0


@jit()
def _copying_kernel(source, target, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index))


@pytest.mark.parametrize(("architecture", "threads"), [("sm_80", 128), ("sm_100", 128), ("gfx942", 256)])
def test_wide_accesses_are_recognised(architecture, threads):
    def launch(source):
        _copying_kernel[(1,)](source, source, BLOCK=4 * threads)

    aligned = torch.empty(1 << 20, device="meta")
    shifted = torch.empty(1 << 20, device="meta")[1:]
    cases = {"aligned": lambda: launch(aligned), "shifted": lambda: launch(shifted)}
    wide, narrow = measure(architecture, declared(cases))
    assert (wide.cases, wide.wide_loads, wide.narrow_loads) == (("aligned",), 1, 0)
    assert (wide.wide_stores, wide.narrow_stores) == (1, 0)
    assert (narrow.cases, narrow.wide_loads, narrow.narrow_loads) == (("shifted",), 0, 4)
    assert (narrow.wide_stores, narrow.narrow_stores) == (0, 4)


CLEAN = Row(
    architecture="sm_90",
    kernel="kernel",
    cases=("case",),
    limit=Limit(64, wide_loads=True, wide_stores=True, slow_paths=1, loop_slow_paths=0, occupancy=0.5),
    registers=64,
    spills=0,
    stack=0,
    shared=0,
    warps=4,
    wide_loads=1,
    narrow_loads=0,
    wide_stores=1,
    narrow_stores=0,
    atomics=0,
    barriers=0,
    shuffles=0,
    matrix=0,
    occupancy=0.5,
    instructions=100,
    loops="20 (10)",
    slow_paths=1,
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"registers": 65}, ["kernel (case) on sm_90: 65 registers, budget 64"]),
        ({"registers": 65, "limit": Limit(96)}, []),
        (
            {"registers": 97, "limit": Limit(96), "architecture": "gfx942"},
            ["kernel (case) on gfx942: 97 registers, budget 96"],
        ),
        ({"spills": 3}, ["kernel (case) on sm_90: 3 spills, 0 bytes of stack"]),
        ({"stack": 8}, ["kernel (case) on sm_90: 0 spills, 8 bytes of stack"]),
        ({"atomics": 2}, ["kernel (case) on sm_90: 2 atomics, whose order is not deterministic"]),
        ({"wide_loads": 0, "narrow_loads": 8}, ["kernel (case) on sm_90: no 128-bit load, 8 narrower"]),
        ({"wide_stores": 0, "narrow_stores": 8}, ["kernel (case) on sm_90: no 128-bit store, 8 narrower"]),
        ({"slow_paths": 2}, ["kernel (case) on sm_90: 2 slow paths, budget 1"]),
        ({"slow_paths": 2, "limit": Limit(64)}, []),
        ({"loop_slow_paths": 1}, ["kernel (case) on sm_90: 1 slow paths in loops, budget 0"]),
        ({"loop_slow_paths": 1, "limit": Limit(64)}, []),
        ({"occupancy": 0.25}, ["kernel (case) on sm_90: occupancy 25%, at least 50%"]),
        ({"occupancy": 0.25, "limit": Limit(64)}, []),
        ({"unfenced": ("no barrier",)}, ["kernel (case) on sm_90: no barrier"]),
        ({"unmodelled": ("kernel (case): no loop",)}, ["kernel (case): no loop"]),
        ({"kernel": "other"}, ["kernel: has limits, but no compile case launches it"]),
    ],
)
def test_each_limit_is_enforced(change, expected):
    operator = declared({}, {"kernel": {"cuda": CLEAN.limit}})
    assert violations([CLEAN], operator) == []
    assert violations([replace(CLEAN, **change)], operator) == expected


@pytest.mark.parametrize(
    ("architecture", "limits", "budget"),
    [
        ("sm_80", {"cuda": Limit(64), "hip": Limit(96)}, 64),
        ("gfx942", {"cuda": Limit(64), "hip": Limit(96)}, 96),
        ("sm_80", {}, 0),  # without a limit nothing is allowed
    ],
)
def test_limits_are_those_of_the_kernel_and_the_backend(architecture, limits, budget):
    source = torch.empty(1 << 20, device="meta")
    launch = {"case": lambda: _copying_kernel[(1,)](source, source, BLOCK=512)}
    (row,) = measure(architecture, declared(launch, {"_copying_kernel": limits} if limits else {}))
    assert row.limit.registers == budget


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        (["7x7, mean"], 64),
        (["7x7, max, NCHW"], 96),  # the first text that fits
        (["7x7, max, NCHW", "14x14, max"], 96),
        (["7x7, max, NCHW", "14x14, mean, NCHW"], 128),
        (["7x7, max", "7x7, NCHW"], 64),  # no text fits both
    ],
)
def test_limits_of_variants_are_those_of_their_cases(cases, expected):
    limit = Limit(64, for_cases={"max": Limit(96), "NCHW": Limit(128)})
    assert limit.of(cases).registers == expected
