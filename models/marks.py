"""Marks of a detector's stages in profiles.

A marked stage appears as `fastmask::<stage>` in traces of `torch.profiler` and, with
`torch.autograd.profiler.emit_nvtx`, in those of Nsight Systems. Marks nest; time counts for the innermost one.
fastmask's operators have names with the same prefix, but none has the name of a stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch.profiler import record_function

Stage = Literal[
    "preprocess", "backbone", "FPN", "RPN", "pooling", "heads", "selection", "paste", "RLE", "backward", "optimizer"
]
STAGES: tuple[Stage, ...] = get_args(Stage)
PREFIX = "fastmask::"  # of a mark's name in a profile


@contextmanager
def mark(stage: Stage) -> Iterator[None]:
    """Mark a stage: `with mark("pooling"): ...`, or `@mark("pooling")` on a function.

    A decorated function opens a new mark in each call and may therefore be called recursively and from several threads.
    An instance of `record_function`, used as a decorator, may not.

    Args:
        stage: one of `STAGES`.
    """
    with record_function(PREFIX + stage):
        yield
