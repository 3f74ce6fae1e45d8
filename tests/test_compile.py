"""The compile gate: no GPU, every kernel variant of the default workload, every architecture."""

from dataclasses import replace

import pytest
import torch
from triton.runtime.jit import JITFunction

from benchmarks.reporting import compile_report
from benchmarks.reporting.compile_report import (
    COMMAND,
    DOCUMENT,
    TARGETS,
    Limit,
    Row,
    document,
    measure,
    section,
    violations,
)
from fastmask.kernels._runtime import jit, tl, triton

pytestmark = pytest.mark.reference_only


@pytest.mark.parametrize("architecture", TARGETS)
def test_kernels_keep_their_limits_and_the_committed_table(architecture):
    rows = measure(architecture)
    table = section(architecture, rows)
    if broken := violations(rows):
        pytest.fail("\n".join([*broken, "", table]), pytrace=False)
    if table not in DOCUMENT.read_text():
        pytest.fail(f"not the committed table: run `{COMMAND}` and review its diff\n\n{table}", pytrace=False)


def test_the_committed_table_is_of_this_triton():
    assert DOCUMENT.read_text().startswith(document([])), f"run `{COMMAND}` and review its diff"


def test_triton_is_left_as_it_was(monkeypatch):
    def fail():
        assert triton.runtime.driver.active.get_current_target() == TARGETS["gfx942"]
        raise FileNotFoundError

    before = triton.runtime.driver._active, JITFunction.run
    monkeypatch.setattr(compile_report, "WORKLOAD", [("failure", fail)])
    with pytest.raises(FileNotFoundError):
        measure("gfx942")
    assert (triton.runtime.driver._active, JITFunction.run) == before


@jit()
def _offending_kernel(source, sums, size, block: tl.constexpr):
    """Strided loads that must all be live at once, more than there are registers; and an atomic sum."""
    index = tl.arange(0, block)
    values = tl.load(source + index * size)
    for i in range(size):
        values += tl.load(source + i) * values
    tl.atomic_add(sums + index, values, sem="relaxed")


# As many values a thread as it can have registers.
@pytest.mark.parametrize(("architecture", "block"), [("sm_90", 256 * 32), ("gfx942", 512 * 64)])
def test_offences_are_measured(architecture, block, monkeypatch):
    def launch():
        source = torch.empty(1 << 20, device="meta")
        _offending_kernel[(1,)](source, source, 35, block=block, num_warps=1)

    monkeypatch.setattr(compile_report, "WORKLOAD", [("offence", launch)])
    (row,) = measure(architecture)
    assert (row.kernel, row.cases, row.warps) == ("_offending_kernel", ("offence",), 1)
    assert row.spills > 0
    assert row.stack > 0
    assert row.atomics > 0
    assert row.narrow_loads > 0
    assert row.wide_loads == row.wide_stores == 0


@jit()
def _copying_kernel(source, target, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(target + index, tl.load(source + index))


@pytest.mark.parametrize(("architecture", "threads"), [("sm_80", 128), ("sm_100", 128), ("gfx942", 256)])
def test_wide_accesses_are_recognised(architecture, threads, monkeypatch):
    def launch(source):
        _copying_kernel[(1,)](source, source, block=4 * threads)

    aligned = torch.empty(1 << 20, device="meta")
    shifted = torch.empty(1 << 20, device="meta")[1:]
    monkeypatch.setattr(
        compile_report,
        "WORKLOAD",
        [("aligned", lambda: launch(aligned)), ("shifted", lambda: launch(shifted))],
    )
    wide, narrow = measure(architecture)
    assert (wide.cases, wide.wide_loads, wide.narrow_loads) == (("aligned",), 1, 0)
    assert (wide.wide_stores, wide.narrow_stores) == (1, 0)
    assert (narrow.cases, narrow.wide_loads, narrow.narrow_loads) == (("shifted",), 0, 4)
    assert (narrow.wide_stores, narrow.narrow_stores) == (0, 4)


CLEAN = Row(
    architecture="sm_90",
    kernel="kernel",
    cases=("case",),
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
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"registers": 65}, ["kernel (case) on sm_90: 65 registers, budget 64"]),
        ({"registers": 65, "architecture": "gfx942"}, []),
        ({"registers": 97, "architecture": "gfx942"}, ["kernel (case) on gfx942: 97 registers, budget 96"]),
        ({"spills": 3}, ["kernel (case) on sm_90: 3 spills, 0 bytes of stack"]),
        ({"stack": 8}, ["kernel (case) on sm_90: 0 spills, 8 bytes of stack"]),
        ({"atomics": 2}, ["kernel (case) on sm_90: 2 atomics, whose order is not deterministic"]),
        ({"wide_loads": 0, "narrow_loads": 8}, ["kernel (case) on sm_90: no 128-bit load, 8 narrower"]),
        ({"wide_stores": 0, "narrow_stores": 8}, ["kernel (case) on sm_90: no 128-bit store, 8 narrower"]),
        (
            {"kernel": "other"},
            [
                "other (case) on sm_90: 64 registers, budget 0",
                "kernel: has limits, but nothing in WORKLOAD launches it",
            ],
        ),
    ],
)
def test_each_limit_is_enforced(change, expected, monkeypatch):
    limits = {backend: Limit(registers, True, True) for backend, registers in (("cuda", 64), ("hip", 96))}
    monkeypatch.setattr(compile_report, "LIMITS", {"kernel": limits})
    assert violations([CLEAN]) == []
    assert violations([replace(CLEAN, **change)]) == expected
