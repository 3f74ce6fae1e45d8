"""The report's tables: each a pure function from results to Markdown.

Of a CPU only ratios are shown: its times mean nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.reporting.published import INFERENCE, TRAINING
from benchmarks.reporting.results import OURS, TORCHVISION, Case, Section, Spread, Timing, is_ours, who_ran

Row = dict[str, str]


def number(value: float) -> str:
    """Three digits, of small ones two."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.2g}"


def table(rows: Sequence[Row]) -> str:
    """Markdown, without the columns in which nobody has anything to say."""
    if not rows:
        return ""
    cells = {column: [row.get(column, "") for row in rows] for row in rows for column in row}
    cells = {column: entries for column, entries in cells.items() if any(entries)}
    _first, *others = cells.values()
    sides = ["---", *("--:" if _numeric(entries) else "---" for entries in others)]
    lines = [cells, sides, *zip(*cells.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numeric(entries: Sequence[str]) -> bool:
    return all(entry.strip("*")[0].isdigit() for entry in entries if entry)


def met(case: Case) -> bool:
    return case.ratio() >= case.target


def ratios(case: Case) -> dict[str, float]:
    """How many times as fast as each peer ours is."""
    ours = case.timings.get(OURS)
    return {
        name: timing.time.median / ours.time.median
        for name, timing in case.timings.items()
        if ours and not is_ours(name)
    }


def operator(section: Section) -> list[str]:
    """Against the peers, then against the hardware."""
    on_gpu = section.run.on_gpu
    peers = [name for name in who_ran(section.cases) if not is_ours(name)]
    legend = "How many times as fast as each peer ours is" + (
        ", beside microseconds on the device with a cold L2: the median and, in brackets, p20 to p80."
        if on_gpu
        else "; in brackets from ours at p80 and theirs at p20 to the reverse."
    )
    return [
        f"{legend} Bold where ours is slower.",
        table([_against_peers(case, peers, on_gpu) for case in section.cases]),
        "Against the hardware: the bytes and operations that the operator cannot do without, and ours beside them.",
        table([_against_hardware(case, on_gpu) for case in section.cases]),
    ]


def _against_peers(case: Case, peers: Sequence[str], on_gpu: bool) -> Row:
    ours, times_as_fast = case.timings.get(OURS), ratios(case)
    row = {"case": case.name, "kind": case.kind, "rounds": str(ours.rounds) if ours else ""}
    if on_gpu and ours:
        row[OURS] = _microseconds(ours.time)
    for peer in peers:
        row[peer] = ""
        if theirs := case.timings.get(peer):
            times = _emphasised(times_as_fast[peer])
            low, high = theirs.time.p20 / ours.time.p80, theirs.time.p80 / ours.time.p20
            row[peer] = (
                f"{_microseconds(theirs.time)}: {times}" if on_gpu else f"{times} ({number(low)}-{number(high)})"
            )
    return row | {"target": _target(case)}


def _emphasised(ratio: float) -> str:
    return f"{number(ratio)}x" if ratio >= 1 else f"**{number(ratio)}x**"


def _target(case: Case) -> str:
    if case.target is None:
        return ""
    if case.ratio() is None:
        return f"{number(case.target)}, not measured"
    return f"{number(case.target)}, {'met' if met(case) else '**missed**'}"


def _microseconds(spread: Spread) -> str:
    return f"{number(1e3 * spread.median)} ({number(1e3 * spread.p20)}-{number(1e3 * spread.p80)})"


def _against_hardware(case: Case, on_gpu: bool) -> Row:
    ours = case.timings.get(OURS)
    row = {
        "case": case.name,
        "MB": number(case.bytes / 1e6) if case.bytes else "",
        "MFLOP": number(case.flops / 1e6) if case.flops else "",
        "floor, us": number(1e3 * case.floor_ms) if case.floor_ms and on_gpu else "",
        "times the floor": number(ours.time.median / case.floor_ms) if case.floor_ms and ours else "",
    }
    for name, timing in (("", ours), (", torchvision", case.peer())):
        row |= _on_device(name, timing) if on_gpu and timing else {}
    return row


def _on_device(name: str, timing: Timing) -> Row:
    return {
        f"warm, us{name}": number(1e3 * timing.warm.median) if timing.warm else "",
        f"graph, us{name}": number(1e3 * timing.graph.median) if timing.graph else "",
        f"latency, us{name}": number(1e3 * timing.latency.median),
        f"host waits{name}": "" if timing.waits is None else str(timing.waits),
        f"peak MiB{name}": "" if timing.peak_mib is None else number(timing.peak_mib),
    }


def is_end_to_end(section: Section) -> bool:
    return any(case.images for case in section.cases)


def end_to_end(name: str, section: Section) -> list[str]:
    """Step by step from torchvision's to our fastest, where the time goes, and what others have published."""
    on_gpu = section.run.on_gpu
    steps = [
        {
            "case": case.name,
            "provider": provider,
            **(_a_batch(case, timing) if on_gpu else {}),
            **{
                f"times as fast as {peer}": _emphasised(case.timings[peer].time.median / timing.time.median)
                for peer in TORCHVISION
                if peer in case.timings and peer != provider
            },
            "target": _target(case) if provider == OURS else "",
        }
        for case in section.cases
        for provider, timing in sorted(case.timings.items(), key=lambda item: is_ours(item[0]))
        if on_gpu or provider not in TORCHVISION
    ]
    stages = [
        {
            "case": case.name,
            "provider": provider,
            **{stage: _stage(milliseconds, shares, on_gpu) for stage, milliseconds in shares.items()},
        }
        for case in section.cases
        for provider, shares in case.stages.items()
    ]
    parts = [table(steps)]
    if stages:
        unit = "milliseconds and the share of their sum" if on_gpu else "the share of their sum"
        parts += [f"Stages, in calls of their own: {unit}.", table(stages)]
    if on_gpu and (published := {"model": _published_inference, "training": _published_training}.get(name)):
        parts += ["Published, on other machines and with other software:", table(published(section.cases))]
    return parts


def _a_batch(case: Case, timing: Timing) -> Row:
    spread = timing.time
    return {
        "ms": f"{number(spread.median)} ({number(spread.p20)}-{number(spread.p80)})",
        "images/s": number(_images_s(case, timing)),
        "host waits": "" if timing.waits is None else str(timing.waits),
        "peak MiB": "" if timing.peak_mib is None else number(timing.peak_mib),
    }


def _stage(milliseconds: float, all_stages: dict[str, float], on_gpu: bool) -> str:
    share = f"{100 * milliseconds / sum(all_stages.values()):.0f}%"
    return f"{number(milliseconds)} ({share})" if on_gpu else share


def _images_s(case: Case, timing: Timing) -> float:
    return 1e3 * case.images / timing.time.median


def _ours(cases: Iterable[Case], model: str) -> list[tuple[Case, Timing]]:
    return [
        (case, timing)
        for case in cases
        for provider, timing in case.timings.items()
        if case.model == model and is_ours(provider)
    ]


def _published_inference(cases: Sequence[Case]) -> list[Row]:
    rows = []
    for figure in INFERENCE:
        ours = [timing.time.median for case, timing in _ours(cases, figure.model) if case.images == 1]
        rows.append(
            {
                "": figure.model,
                "device": figure.device,
                "ms": number(figure.ms),
                "images/s": number(1e3 / figure.ms),
                "our fastest here, ms": number(min(ours)) if ours else "",
                "source": figure.source,
                "note": figure.note,
            }
        )
    return rows


def _published_training(cases: Sequence[Case]) -> list[Row]:
    rows = []
    for figure in TRAINING:
        ours = [_images_s(case, timing) for case, timing in _ours(cases, figure.model)]
        rows.append(
            {
                "": figure.model,
                "device": f"{figure.gpus} x {figure.device}",
                "images/s": number(figure.images_s),
                "of one GPU": number(figure.images_s / figure.gpus),
                "our fastest here": number(max(ours)) if ours else "",
                "source": figure.source,
                "note": figure.note,
            }
        )
    return rows


def missing(section: Section) -> str:
    """Who did not run a case, and why."""
    absent: dict[tuple[str, str], list[str]] = {}
    for case in section.cases:
        for provider, why in case.missing.items():
            absent.setdefault((provider, why), []).append(case.name)
    lines = [f"- {provider} ({why}): {'; '.join(names)}" for (provider, why), names in absent.items()]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""
