"""The static model's part of the compile report: the kernels of each case, on each device that the model knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.operators import Launch, ModelTarget, Operator
from benchmarks.reporting.control_flow import Code
from benchmarks.reporting.hardware import Device, resident_programs
from benchmarks.reporting.static_model import ModelError, Time, executed, time

ARCHITECTURE = "sm_90"  # of the devices
TARGET_DEVICE = "H200"
_NEGLIGIBLE_FLOOR = 1.0  # microseconds: a ratio to less says nothing


@dataclass(frozen=True)
class Modelled:
    """A kernel in a case: all of its launches together."""

    kernel: str
    case: str
    launches: int
    programs: int
    instructions: float  # that a warp executes, in the mean over the launches
    times: Mapping[str, Time]  # by device


def model(
    kernel: str,
    case: str,
    launches: Sequence[Launch],
    code: Code,
    shape: tuple[int, int, int],
    declared: Mapping[str, Operator],
    devices: Sequence[Device],
) -> Modelled | str | None:
    """A kernel in a case; a sentence if its declaration is wrong; None if its operator declares no models.

    Args:
        kernel: the kernel's name.
        case: the case's name.
        launches: those of the kernel in the case.
        code: its machine code.
        shape: registers of a thread, bytes of shared memory of a program, warps of a program.
        declared: all operators.
        devices: what to model.
    """
    operator = next((operator for operator in declared.values() if case in operator.compile_cases), None)
    if operator is None or not operator.models:
        return None
    if kernel not in operator.models:
        return f"{kernel} ({case}): its operator declares models, but none of this kernel"
    registers, shared, warps = shape
    resident = resident_programs(ARCHITECTURE, registers, shared, warps)
    times: dict[str, Time] = {}
    instructions = 0.0
    for launch in launches:
        work = operator.models[kernel](launch)
        try:
            run = executed(code, kernel, work)
        except ModelError as error:
            return f"{kernel} ({case}): {error}"
        instructions += run.instructions / len(launches)
        for device in devices:
            one = time(device, launch, warps, resident, work, run)
            times[device.name] = times[device.name] + one if device.name in times else one
    programs = sum(launch.programs for launch in launches)
    return Modelled(kernel, case, len(launches), programs, instructions, times)


def _targets(
    modelled: Sequence[Modelled], declared: Mapping[str, Operator]
) -> Iterator[tuple[ModelTarget, Mapping[str, float]]]:
    """The targets of the cases in `modelled`, and the microseconds of each of their kernels that is in it."""
    for target in (target for operator in declared.values() for target in operator.targets):
        parts = [part for part in modelled if part.case == target.case and part.kernel in target.kernels]
        yield target, {part.kernel: part.times[TARGET_DEVICE].total for part in parts}


def missed_targets(modelled: Sequence[Modelled], declared: Mapping[str, Operator]) -> list[str]:
    """A sentence for each target that the model misses."""
    sentences = []
    for target, times in _targets(modelled, declared):
        if missing := sorted(set(target.kernels) - set(times)):
            sentences.append(f"{target.case}: has a target, but no model of {', '.join(missing)}")
        elif (total := sum(times.values())) > target.microseconds:
            where = f"{' + '.join(target.kernels)} ({target.case})"
            sentences.append(f"{where}: {total:.1f} us on {TARGET_DEVICE}, at most {target.microseconds:g}")
    return sentences


def target_section(modelled: Sequence[Modelled], declared: Mapping[str, Operator]) -> str:
    """The document's table of all targets that kernels of `modelled` have."""
    lines = [["case", "kernels", "time", "at most"], ["---", "---", "--:", "--:"]]
    for target, times in _targets(modelled, declared):
        if times:
            kernels = "<br>".join(f"`{kernel}` {time:.1f}" for kernel, time in times.items())
            lines.append([target.case, kernels, f"{sum(times.values()):.1f}", f"{target.microseconds:g}"])
    return "\n".join([f"## Targets: {TARGET_DEVICE}\n", *(f"| {' | '.join(line)} |" for line in lines), ""])


def model_section(device: Device, modelled: Sequence[Modelled]) -> str:
    """One device's part of the document."""
    rates = (  # of which a measurement may replace some
        f"{device.multiprocessors} multiprocessors at {device.clock_ghz} GHz, L2 {device.l2_tb_s} TB/s, "
        f"HBM {device.hbm_tb_s:.3g} TB/s, launch {device.launch_us} us."
    )
    figures = ("programs", "instructions", "issue", "L2", "HBM", "latency", "time", "floor", "ratio")
    lines = [["kernel", "case", *figures, "bound"], ["---", "---", *["--:"] * len(figures), "---"]]
    for part in modelled:
        moment = part.times[device.name]
        ratio = f"{moment.total / moment.floor:.1f}" if moment.floor >= _NEGLIGIBLE_FLOOR else ""
        programs = f"{part.programs}" + f" in {part.launches}" * (part.launches > 1)
        micros = (moment.issue, moment.l2, moment.hbm, moment.latency, moment.total, moment.floor)
        cells = [programs, f"{part.instructions:.0f}", *(f"{micro:.1f}" for micro in micros), ratio]
        lines.append([f"`{part.kernel}`", part.case, *cells, moment.bound])
    return "\n".join([f"## Model: {device.name}\n", f"{rates}\n", *(f"| {' | '.join(line)} |" for line in lines), ""])
