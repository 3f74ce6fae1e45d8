"""Made-up results of two operators and a detector."""

from dataclasses import replace

from benchmarks.reporting.results import FASTMASK, Case, Run, Section, Spread, Timing


def spread(milliseconds):
    return Spread(*(float(f"{factor * milliseconds:.5g}") for factor in (0.98, 1, 1.02)))  # as a file has them


def timing(milliseconds, *, on_gpu=True, **more):
    if not on_gpu:
        return Timing(spread(milliseconds), rounds=9)
    figures = {"cold": milliseconds, "warm": 0.8 * milliseconds, "graph": 0.7 * milliseconds}
    return Timing(
        spread(milliseconds + 0.02),
        rounds=9,
        **{name: spread(value) for name, value in figures.items()},
        **{"syncs": 0, "peak_mib": 1.5} | more,
    )


def made_up(device="NVIDIA H200", **run):
    """Results with a win, a loss, a missed target and missing peers."""
    on_gpu = device != "cpu"

    def timings(**milliseconds):
        return {name.replace("_", " "): timing(value, on_gpu=on_gpu) for name, value in milliseconds.items()}

    where = Run(
        date="2026-01-02T03:04:05+00:00",
        commit="0123456789abcdef-dirty",
        device=device,
        threads=2,
        versions={"torch": "2.11.0"},
        copy_gb_s=4000.0,
        matrix_tflop_s={"float32": 50.0},
        quick=False,
        driver="580.95" if on_gpu else None,
        unavailable={"detectron2": "not installed"},
    )
    pooled = [
        Case("1000 RoIs", "paper", timings(fastmask=0.02, torchvision=0.1), bytes=40_000_000, floor_ms=0.01, target=8),
        Case("10 RoIs", "scaling", timings(fastmask=0.01, torchvision=0.02), axis="RoIs", at=10),
        Case("100 RoIs", "scaling", timings(fastmask=0.02, torchvision=0.08), axis="RoIs", at=100),
    ]
    slow = Timing(spread(0.05), 9, spread(0.04), syncs=3) if on_gpu else timing(0.04, on_gpu=False)
    suppressed = [
        Case("10,000 boxes", "paper", timings(fastmask=0.05) | {"torchvision": slow}),
        Case("200,000 boxes", "paper", timings(fastmask=5.0), missing={"torchvision": "out of memory"}),
    ]
    steps = {"torchvision": 40.0, FASTMASK: 20.0, "fastmask bf16": 10.0, "fastmask bf16 graph": 8.0}
    detector = Case(
        "R-101-FPN, batch 1",
        "paper",
        {name: timing(value, on_gpu=on_gpu) for name, value in steps.items()},
        images=1,
        stages={FASTMASK: {"backbone": 15.0, "heads": 5.0}},
    )
    sections = {"model": [detector], "nms": suppressed, "roi_align": pooled}
    return {name: Section(replace(where, **run), cases) for name, cases in sections.items()}
