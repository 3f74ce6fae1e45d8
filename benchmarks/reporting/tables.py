"""The report's tables: pure functions from results to Markdown.

For a CPU, tables show ratios only: its times mean nothing on other machines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.reporting.published import INFERENCE, TRAINING
from benchmarks.reporting.results import FASTMASK, TORCHVISION, Case, Section, Spread, Timing, is_fastmask, providers_of

Row = dict[str, str]


def number(value: float) -> str:
    """Three digits, or two below 0.1."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.2g}"


def table(rows: Sequence[Row]) -> str:
    """Markdown, without columns that are empty in every row."""
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


def ratios(case: Case) -> dict[str, float]:
    """How many times as fast as each peer fastmask is."""
    fastmask = case.timings.get(FASTMASK)
    return {
        name: timing.time.median / fastmask.time.median
        for name, timing in case.timings.items()
        if fastmask and not is_fastmask(name)
    }


def operator(section: Section) -> list[str]:
    """An operator's tables: against the peers, then against the hardware."""
    on_gpu = section.run.on_gpu
    peers = [name for name in providers_of(section.cases) if not is_fastmask(name)]
    legend = "How many times as fast as each peer fastmask is" + (
        ", beside microseconds on the device with a cold L2: the median and, in brackets, p20 to p80."
        if on_gpu
        else "; in brackets the range from the peer's p20 over fastmask's p80 to the reverse."
    )
    return [
        f"{legend} Bold where fastmask is slower.",
        table([_against_peers(case, peers, on_gpu) for case in section.cases]),
        "Against the hardware: bytes and operations that any implementation needs, and fastmask's time beside them.",
        table([_against_hardware(case, on_gpu) for case in section.cases]),
    ]


def _against_peers(case: Case, peers: Sequence[str], on_gpu: bool) -> Row:
    fastmask, times_as_fast = case.timings.get(FASTMASK), ratios(case)
    row = {"case": case.name, "kind": case.kind, "rounds": str(fastmask.rounds) if fastmask else ""}
    if on_gpu and fastmask:
        row[FASTMASK] = _microseconds(fastmask.time)
    for peer in peers:
        row[peer] = ""
        timing = case.timings.get(peer)
        if timing and fastmask:
            times = _emphasised(times_as_fast[peer])
            low, high = timing.time.p20 / fastmask.time.p80, timing.time.p80 / fastmask.time.p20
            row[peer] = (
                f"{_microseconds(timing.time)}: {times}" if on_gpu else f"{times} ({number(low)}-{number(high)})"
            )
    return row | {"target": _target(case)}


def _emphasised(ratio: float) -> str:
    return f"{number(ratio)}x" if ratio >= 1 else f"**{number(ratio)}x**"


def _target(case: Case) -> str:
    if case.target is None:
        return ""
    verdict = {True: "met", False: "**missed**", None: "not measured"}[case.meets_target]
    return f"{number(case.target)}, {verdict}"


def _microseconds(spread: Spread) -> str:
    return f"{number(1e3 * spread.median)} ({number(1e3 * spread.p20)}-{number(1e3 * spread.p80)})"


def _against_hardware(case: Case, on_gpu: bool) -> Row:
    fastmask = case.timings.get(FASTMASK)
    row = {
        "case": case.name,
        "MB": number(case.bytes / 1e6) if case.bytes else "",
        "MFLOP": number(case.flops / 1e6) if case.flops else "",
        "floor, us": number(1e3 * case.floor_ms) if case.floor_ms and on_gpu else "",
        "times the floor": number(fastmask.time.median / case.floor_ms) if case.floor_ms and fastmask else "",
    }
    for name, timing in (("", fastmask), (", torchvision", case.torchvision())):
        row |= _on_device(name, timing) if on_gpu and timing else {}
    return row


def _on_device(name: str, timing: Timing) -> Row:
    return {
        f"warm, us{name}": number(1e3 * timing.warm.median) if timing.warm else "",
        f"graph, us{name}": number(1e3 * timing.graph.median) if timing.graph else "",
        f"latency, us{name}": number(1e3 * timing.latency.median),
        f"syncs{name}": "" if timing.syncs is None else str(timing.syncs),
        f"peak MiB{name}": "" if timing.peak_mib is None else number(timing.peak_mib),
    }


def is_end_to_end(section: Section) -> bool:
    return any(case.images for case in section.cases)


def end_to_end(name: str, section: Section) -> list[str]:
    """A detector's tables: each step from torchvision's to fastmask's fastest, stages, and published figures."""
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
            "target": _target(case) if provider == FASTMASK else "",
        }
        for case in section.cases
        for provider, timing in sorted(case.timings.items(), key=lambda item: is_fastmask(item[0]))
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
        parts += [f"Stages, measured in separate calls: {unit}.", table(stages)]
    if on_gpu and (published := {"model": _published_inference, "training": _published_training}.get(name)):
        parts += ["Published, on other machines and with other software:", table(published(section.cases))]
    return parts


def _a_batch(case: Case, timing: Timing) -> Row:
    spread = timing.time
    return {
        "ms": f"{number(spread.median)} ({number(spread.p20)}-{number(spread.p80)})",
        "images/s": number(_images_s(case, timing)),
        "syncs": "" if timing.syncs is None else str(timing.syncs),
        "peak MiB": "" if timing.peak_mib is None else number(timing.peak_mib),
    }


def _stage(milliseconds: float, all_stages: dict[str, float], on_gpu: bool) -> str:
    share = f"{100 * milliseconds / sum(all_stages.values()):.0f}%"
    return f"{number(milliseconds)} ({share})" if on_gpu else share


def _images_s(case: Case, timing: Timing) -> float:
    return 1e3 * (case.images or 1) / timing.time.median


def _fastmask(cases: Iterable[Case], model: str) -> list[tuple[Case, Timing]]:
    """All forms of fastmask on a model."""
    return [
        (case, timing)
        for case in cases
        for provider, timing in case.timings.items()
        if case.model == model and is_fastmask(provider)
    ]


def _published_inference(cases: Sequence[Case]) -> list[Row]:
    rows = []
    for figure in INFERENCE:
        times = [timing.time.median for case, timing in _fastmask(cases, figure.model) if case.images == 1]
        rows.append(
            {
                "": figure.model,
                "device": figure.device,
                "ms": number(figure.ms),
                "images/s": number(1e3 / figure.ms),
                "fastmask here, ms": number(min(times)) if times else "",
                "source": figure.source,
                "note": figure.note,
            }
        )
    return rows


def _published_training(cases: Sequence[Case]) -> list[Row]:
    rows = []
    for figure in TRAINING:
        rates = [_images_s(case, timing) for case, timing in _fastmask(cases, figure.model)]
        rows.append(
            {
                "": figure.model,
                "device": f"{figure.gpus} x {figure.device}",
                "images/s": number(figure.images_s),
                "of one GPU": number(figure.images_s / figure.gpus),
                "fastmask here": number(max(rates)) if rates else "",
                "source": figure.source,
                "note": figure.note,
            }
        )
    return rows


def missing(section: Section) -> str:
    """The providers that did not run a case, and why."""
    absent: dict[tuple[str, str], list[str]] = {}
    for case in section.cases:
        for provider, why in case.missing.items():
            absent.setdefault((provider, why), []).append(case.name)
    lines = [f"- {provider} ({why}): {'; '.join(names)}" for (provider, why), names in absent.items()]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""
