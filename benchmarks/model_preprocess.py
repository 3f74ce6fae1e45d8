"""The static model of preprocessing: what its kernel does with images of the paper's size."""

from __future__ import annotations

import math

from benchmarks.harness.operators import Launch, ModelTarget, Work


def _unpack(packed: int) -> tuple[int, int]:
    """The two numbers of `pack_size`."""
    return packed >> 31 & (2**30 - 1), packed >> 1 & (2**30 - 1)


def _taps(before: int, after: int, antialias: bool) -> int:
    return 1 if before == after else math.ceil(2 * max(1.0, before / after if antialias else 1.0))


def _preprocess(launch: Launch) -> Work:
    """Programs beyond an image write zeros. Of an image, each program reads the pixels under its part of a row."""
    a = launch.arguments
    tiles = -(-a["width"] // a["TILE"])
    pixel = a["images"][0].itemsize
    busy, rows_read, columns_taken, rows_taken = 0, 0.0, 0.0, 0.0
    for inputs, resized in zip(a["input_sizes"], a["resized_sizes"], strict=True):
        (height, width), (new_height, new_width) = _unpack(inputs), _unpack(resized)
        programs = new_height * -(-new_width // a["TILE"])
        taps = [_taps(*sides, a["ANTIALIAS"]) for sides in ((height, new_height), (width, new_width))]
        busy += programs
        rows_taken += programs * taps[0]
        columns_taken += programs * taps[1]
        rows_read += new_height * taps[0] * 3 * width * pixel
    written = a["out"].nbytes
    read = sum(image.nbytes for image in a["images"])
    assert launch.programs == len(a["images"]) * a["num_rows"] * tiles
    return Work(
        hbm_bytes=read + written,
        l2_bytes=rows_read + 3 * written,  # the three channels of a pixel are stored one by one
        trips={"j": columns_taken / busy} | ({"i": rows_taken / busy} if a["ANTIALIAS"] else {}),
        branches={"if (row < resized_height)": busy / launch.programs, "if tl.program_id(0) == 0": 0.0},
    )


MODELS = {"_preprocess_kernel": _preprocess}
TARGETS = (ModelTarget("480x640 to 800x1067, CHW", ("_preprocess_kernel",), 12),)
