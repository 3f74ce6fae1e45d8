"""Where a detector's time goes, by stage.

A stage is a range that the code marks with `torch.profiler.record_function("fastmask::<stage>")`. fastmask's detector
marks its stages itself. A peer has no marks: its functions are wrapped in the same marks while it is measured.
`models/stage_times.py` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple
from unittest.mock import patch

from torch.profiler import record_function
from torchvision.models.detection import transform

from benchmarks.harness.timing import Implementation
from models.marks import PREFIX
from models.marks import STAGES as MODEL_STAGES
from models.stage_times import stage_times

PREPROCESS, BACKBONE, FPN, RPN, POOLING, HEADS, SELECTION, PASTE, RLE, BACKWARD, OPTIMIZER = MODEL_STAGES


class Place(NamedTuple):
    """A function of a peer, as an attribute of its owner, and the stage that a call of it is."""

    owner: object
    attribute: str
    stage: str


def mark(stage: str) -> record_function:
    """The mark of a stage, for what the benchmarks add to a detector."""
    return record_function(PREFIX + stage)


def measure(call: Implementation, device: str, places: Sequence[Place] = ()) -> dict[str, float]:
    """As `stage_times`; `places` are wrapped in marks while the call is measured."""
    with marked(places):
        return stage_times(call, device)


def measures(
    calls: Mapping[str, Implementation], device: str, places: Mapping[str, Sequence[Place]]
) -> dict[str, Callable[[], dict[str, float]]]:
    """The argument `stages` of a comparison: a function for each call that has an entry in `places`."""
    return {name: partial(measure, call, device, places[name]) for name, call in calls.items() if name in places}


@contextmanager
def marked(places: Iterable[Place]) -> Iterator[None]:
    """Wrap functions in the marks of their stages."""
    with ExitStack() as patches:
        for owner, attribute, stage in places:
            wrapped = _marked(getattr(owner, attribute), stage)
            patches.enter_context(patch.object(owner, attribute, wrapped))
        yield


def _marked(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with mark(stage):
            return function(*args, **kwargs)

    return run


def of_torchvision(model: Any) -> list[Place]:
    """The functions of a torchvision detector that are its stages."""
    roi_heads = model.roi_heads
    poolers = [roi_heads.box_roi_pool, roi_heads.mask_roi_pool, roi_heads.keypoint_roi_pool]
    return [
        Place(model.transform, "forward", PREPROCESS),
        Place(model.backbone.body, "forward", BACKBONE),
        Place(model.backbone.fpn, "forward", FPN),
        Place(model.rpn, "forward", RPN),
        *(Place(pooler, "forward", POOLING) for pooler in poolers if pooler is not None),
        Place(roi_heads, "forward", HEADS),
        Place(model.rpn, "filter_proposals", SELECTION),
        Place(roi_heads, "postprocess_detections", SELECTION),
        Place(transform, "paste_masks_in_image", PASTE),
    ]
