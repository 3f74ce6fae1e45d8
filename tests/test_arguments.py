"""Random wrong arguments: every public function either accepts them or raises an error that names the argument."""

import random
import re
import zlib

import numpy as np
import pytest
import torch

from benchmarks.harness.operators import Call, operators
from fastmask import box_ops
from fastmask.kernels._runtime import INTERPRETED

CALLS = 32 if INTERPRETED else 640  # of each operator, in random order


def values(seed):
    """Values that users pass by mistake; made anew for each call, since a call may change them."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(), (0,), (5,), (0, 4), (0, 5), (3, 4), (3, 5), (2, 3, 4), (1, 3, 8, 8), (2, 2, 2, 2, 2)]
    box = torch.rand(3, 4, generator=g)
    return [
        *(None, True, False, "boxes", b"boxes", {}, object(), int, 1 + 2j),
        *(-1, 0, 1, 2, 7, 2**31, 2**63, 2**70),  # none that is a valid but enormous size of a result
        *(0.0, -1.0, 0.5, 2.0, 2.5, 1e300, float("nan"), float("inf"), -float("inf")),
        *([], (), [1], (2, 3), (1, 2, 3), [2.5, 1.0], [None, None], ["a"], (0, -1), (2**31, 2**31), [[1, 2], [3, 4]]),
        *(np.float32(0.5), np.int64(2), np.zeros((3, 4), np.float32), [np.zeros(3)]),
        *(torch.rand(shape, generator=g) for shape in shapes),
        *(torch.ones(3, 4, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.float16)),
        *(box.to_sparse(), torch.quantize_per_tensor(box, 0.1, 0, torch.qint8), box.to("meta"), box.T),
        *([box], [box, box], (box, None), [box.long()], [box.to("meta")], [box, box, box, box]),
    ]


def random_call(call, rng):
    """The call with one or two of its arguments replaced."""
    arguments = dict(call.arguments)
    pool = values(rng.randrange(100))
    for name in rng.sample(sorted(arguments), min(len(arguments), rng.choice((1, 1, 2)))):
        arguments[name] = rng.choice(pool)
    return Call(call.function, arguments)


def fault(call):
    """The error that a call raises without naming an argument; None where there is no such error."""
    try:
        call.run()
    except (TypeError, ValueError) as error:
        if re.match(rf"({'|'.join(call.arguments)}): expected .*, got ", str(error), re.DOTALL):
            return None
        return error
    except Exception as error:
        return error
    return None


def check(calls, count, seed):
    rng = random.Random(seed)
    faults = {}
    for _ in range(count):
        call = random_call(rng.choice(calls), rng)
        if error := fault(call):
            faults[f"{call.function.__name__}({call.arguments})"] = repr(error)
    assert not faults, "\n".join(f"{call}\n    {error}" for call, error in list(faults.items())[:10])


@pytest.mark.parametrize("name", operators())
def test_operators_name_the_wrong_argument(name):
    check(operators()[name].calls("cpu", 0), CALLS, zlib.crc32(name.encode()))


@pytest.mark.reference_only
def test_box_ops_name_the_wrong_argument():
    boxes, others = torch.rand(3, 4), torch.rand(3, 4)
    weights = (1.0, 1.0, 1.0, 1.0)
    check(
        [
            Call(box_ops.encode, {"boxes": boxes, "anchors": others, "weights": weights}),
            Call(box_ops.decode, {"deltas": boxes, "anchors": others, "weights": weights}),
            Call(box_ops.clip, {"boxes": boxes, "image_size": (4, 5)}),
            Call(box_ops.area, {"boxes": boxes}),
            Call(box_ops.iou, {"boxes": boxes, "others": others}),
        ],
        CALLS,
        0,
    )
