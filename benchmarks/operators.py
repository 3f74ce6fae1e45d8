"""Time each operator against torchvision's, side by side in one run, and say which targets are met.

    python -m benchmarks.operators [--device cuda] [--threads 2] [--repeat 7] [--json PATH]
    python -m benchmarks.operators --readme    # the README's tables, from the committed CPU results

Workload: an image of 800 x 1344 pixels, its pyramid P2-P5 of 256 channels; boxes with log-uniform sides from 16 to
600 pixels and aspect ratios up to 2, uniformly placed; random scores. Each pair must agree before it is timed,
then the two take turns; the ratio is of their medians. On a CPU only ratios mean anything beyond the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

import fastmask

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMITTED = ("cpu.json", "cpu_detectors.json")  # shown in the README, each between marks of its name
README = ROOT / "README.md"

IMAGE = (800, 1344)
STRIDES = (4, 8, 16, 32)
CHANNELS = 256
NAMES = [str(level) for level in range(len(STRIDES))]


@dataclass
class Case:
    """One comparison; `ours` and `theirs` return what `same` compares before anything is timed."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    target: float  # at least so many times as fast as torchvision
    same: Callable[[object, object], bool]


@dataclass
class Result:
    name: str
    ours_ms: float
    torchvision_ms: float
    ratio: float
    target: float
    met: bool


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """`[count, 4]` boxes inside the image."""
    log_side = torch.rand(count, 1, generator=generator) * (6.4 - 2.77) + 2.77
    log_aspect = (torch.rand(count, 1, generator=generator) - 0.5) * 0.7
    size = torch.cat([log_side + log_aspect, log_side - log_aspect], 1).exp()
    image = torch.tensor([IMAGE[1], IMAGE[0]])
    size = size.minimum(image)
    corner = torch.rand(count, 2, generator=generator) * (image - size)
    return torch.cat([corner, corner + size], 1)


def close(tolerance: float) -> Callable[[object, object], bool]:
    def same(ours, theirs) -> bool:
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        return all((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max() for a, b in pairs)

    return same


def pooling_cases(device: str, generator: torch.Generator) -> list[Case]:
    """The pooler on a GPU is compared under autocast, where torchvision's casts the pyramid to float32."""
    on_gpu = device != "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    layout = torch.channels_last if on_gpu else torch.contiguous_format
    features = [
        torch.randn(1, CHANNELS, IMAGE[0] // s, IMAGE[1] // s, generator=generator)
        .to(device, dtype)
        .to(memory_format=layout)
        .requires_grad_()
        for s in STRIDES
    ]
    boxes = random_boxes(1000, generator).to(device)
    pyramid = dict(zip(NAMES, features, strict=True))
    theirs = torchvision.ops.MultiScaleRoIAlign(NAMES, 7, 2)
    ours = fastmask.MultiScaleRoIAlign(NAMES, 7, 2)
    grad = torch.randn(1000, CHANNELS, 7, 7, generator=generator).to(device, dtype)

    def forward(pool: torch.nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            return pool(pyramid, [boxes], [IMAGE])

    def backward(pool: torch.nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            out = pool(pyramid, [boxes], [IMAGE])
        return lambda: torch.autograd.grad(out, features, grad, retain_graph=True)

    def both(pool: torch.nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(pool(pyramid, [boxes], [IMAGE]), features, grad)

    tolerance = 2e-2 if on_gpu else 1e-5
    cases = [
        Case(
            "multiscale_roi_align, 1000 boxes, forward",
            lambda: forward(ours),
            lambda: forward(theirs),
            8 if on_gpu else 3,
            close(tolerance),
        )
    ]
    if on_gpu:
        cases.append(
            Case(
                "multiscale_roi_align, 1000 boxes, backward (ours deterministic)",
                backward(ours),
                backward(theirs),
                3,
                close(tolerance),
            )
        )
    else:
        cases.append(
            Case(
                "multiscale_roi_align, 1000 boxes, forward + backward",
                lambda: both(ours),
                lambda: both(theirs),
                5,
                close(tolerance),
            )
        )
    return cases


def nms_cases(device: str, generator: torch.Generator) -> list[Case]:
    def single(count: int, target: float) -> Case:
        boxes, scores = (
            random_boxes(count, generator).to(device),
            torch.rand(count, generator=generator).to(device),
        )
        return Case(
            f"nms, {count:,} boxes",
            lambda: fastmask.nms(boxes, scores, 0.7),
            lambda: torchvision.ops.nms(boxes, scores, 0.7),
            target,
            torch.equal,
        )

    if device == "cpu":
        return [single(1000, 1 / 1.15), single(10_000, 2)]

    boxes = torch.stack([random_boxes(1000, generator) for _ in range(5)]).to(device)
    scores = torch.rand(5, 1000, generator=generator).to(device)
    level = torch.arange(5, device=device)[:, None].expand(5, 1000)

    def same(ours: tuple[Tensor, Tensor], theirs: Tensor) -> bool:
        indices, _ = ours
        found = (indices + torch.arange(5, device=device)[:, None] * 1000)[indices >= 0]
        # torchvision keeps levels apart by an offset, which rounds IoUs: the odd box may go the other way.
        union = len(torch.cat([found, theirs]).unique())
        return len(found) + len(theirs) - union >= 0.99 * union

    segments = Case(
        "nms_padded, 5 x 1000 boxes, against batched_nms",
        lambda: fastmask.nms_padded(boxes, scores, 0.7, 1000),
        lambda: torchvision.ops.batched_nms(boxes.flatten(0, 1), scores.flatten(), level.flatten(), 0.7),
        5,
        same,
    )
    return [segments, single(1000, 1), single(10_000, 1)]


def paste_cases(device: str, generator: torch.Generator) -> list[Case]:
    masks = torch.rand(100, 28, 28, generator=generator).to(device)
    boxes = random_boxes(100, generator).clamp(max=1332).to(device)
    size = (800, 1333)

    def theirs() -> Tensor:
        return paste_masks_in_image(masks[:, None], boxes, size)[:, 0] >= 0.5

    def same(ours: Tensor, pasted: Tensor) -> bool:
        return bool((ours != pasted).double().mean() < 1e-6)  # a probability of 0.5 may round either way

    return [
        Case(
            "paste_masks, 100 masks on 800 x 1333",
            lambda: fastmask.paste_masks(masks, boxes, size, convention="torchvision"),
            theirs,
            50 if device != "cpu" else 6,
            same,
        )
    ]


def measure(case: Case, device: str, repeat: int) -> Result:
    """Medians of both sides, taking turns; an event pair times the device, a clock the CPU."""
    if not case.same(case.ours(), case.theirs()):
        raise SystemExit(f"{case.name}: the results differ from torchvision's, nothing was timed")

    def milliseconds(call: Callable[[], object]) -> float:
        if device == "cpu":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    ours, theirs = [], []
    for _ in range(repeat + 2):
        theirs.append(milliseconds(case.theirs))
        ours.append(milliseconds(case.ours))
    ours_ms, theirs_ms = statistics.median(ours[2:]), statistics.median(theirs[2:])
    ratio = theirs_ms / ours_ms
    return Result(case.name, ours_ms, theirs_ms, ratio, case.target, ratio >= case.target)


def table(results: list[Result]) -> str:
    """Markdown: how many times as fast as torchvision."""
    lines = ["| | times as fast as torchvision | target | |", "|---|---|---|---|"]
    for r in results:
        lines.append(f"| {r.name} | {r.ratio:.1f} | {r.target:.2g} | {'met' if r.met else 'missed'} |")
    return "\n".join(lines)


def committed_table(name: str) -> str:
    """The table of committed results."""
    return table([Result(**result) for result in json.loads((RESULTS / name).read_text())["results"]])


def shown_table(readme: str, name: str) -> str:
    """What the README shows of them."""
    return readme.split(f"<!-- {name} -->\n")[1].split("\n<!-- end -->")[0]


def write_readme() -> None:
    """Put the committed results between the README's marks."""
    readme = README.read_text()
    for name in COMMITTED:
        mark = f"<!-- {name} -->\n"
        readme = readme.replace(mark + shown_table(readme, name), mark + committed_table(name))
    README.write_text(readme)


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every comparison."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--threads", type=int, default=2, help="CPU threads of both sides")
    result.add_argument("--repeat", type=int, default=7, help="timed calls of each side")
    result.add_argument("--json", type=Path, help="also write the results here")
    return result


def compare(cases: list[Case], arguments: argparse.Namespace) -> None:
    """Measure, print, and write what is asked for."""
    results = [measure(case, arguments.device, arguments.repeat) for case in cases]
    print(table(results))
    if not arguments.json:
        return
    on_gpu = arguments.device != "cpu"
    report = {
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {arguments.threads} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "fastmask": fastmask.__version__,
        },
        "repeat": arguments.repeat,
        "results": [asdict(result) for result in results],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    options = parser("Each operator against torchvision's, in one run.")
    options.add_argument("--readme", action="store_true", help="measure nothing, renew the README's tables")
    arguments = options.parse_args()
    if arguments.readme:
        write_readme()
        return
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    makers = (pooling_cases, nms_cases, paste_cases)
    compare([case for make in makers for case in make(arguments.device, generator)], arguments)


if __name__ == "__main__":
    main()
