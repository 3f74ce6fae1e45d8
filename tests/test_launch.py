"""`Launch` launches what `kernel[grid]` launches, with the same arguments, and launchers take little host time."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from benchmarks.harness.operators import operators
from benchmarks.reporting.host_time import host_driver, measure, recorded_launchers
from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import jit, tl

compiled = pytest.mark.reference_only


@jit(do_not_specialize=["n"])
def _add_kernel(sources, out, sizes, n, m, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    index = tl.arange(0, SIZE)
    value = tl.zeros((SIZE,), DTYPE)
    for i in tl.static_range(len(sources)):
        value += tl.load(sources[i] + index).to(DTYPE) * sizes[i]
    tl.store(out + index, value + (n + m))


SETTINGS = {"SIZE": 16, "DTYPE": tl.float32, "num_warps": 1}
METADATA, HOOKS = 7, slice(8, None)  # for hooks: a new object in each launch
NUMBERS = ((3, 2**40 + 1), 1, 16)


def tensors(dtype=torch.float32, offset=0):
    """Two sources and an output, `offset` elements beyond an aligned address."""
    sources = tuple(torch.ones(32, dtype=dtype)[offset:][:16] for _ in range(2))
    return sources, torch.empty(16)


def launched(driver, launch):
    """What reaches the driver: the variant, the grid, the stream, hooks, and the kernel's arguments."""
    driver.launched.clear()
    launch()
    (call,) = driver.launched
    return call


def assert_like_triton(driver, arguments, grid=(5, 2), numbers=NUMBERS, settings=SETTINGS, launch=None):
    """The first and later launches equal Triton's own. Returns the hash of the variant's source."""
    launch = launch or Launch(_add_kernel, *numbers, **settings)
    variants = set()
    for _ in range(3):
        actual = launched(driver, lambda: launch(grid, *arguments))
        expected = launched(driver, lambda: _add_kernel[grid](*arguments, *numbers, **settings))
        assert actual[:METADATA] == expected[:METADATA]
        assert all(one is two or one == two for one, two in zip(actual[HOOKS], expected[HOOKS], strict=True))
        variants.add(actual[0])
    (variant,) = variants
    return variant


@compiled
def test_launches_what_triton_launches():
    with host_driver() as driver:
        launch = Launch(_add_kernel, *NUMBERS, **SETTINGS)
        calls = [tensors(), tensors(torch.float16), tensors(offset=1), tensors(torch.float16, offset=8)]
        variants = [assert_like_triton(driver, arguments, launch=launch) for arguments in calls]
        assert variants[1] == variants[3]  # aligned again
        assert len(set(variants)) == 3
        assert len(launch._variants) == 3
        for grid in ((1,), (7,), (1, 2, 3)):
            assert_like_triton(driver, calls[0], grid, launch=launch)


@compiled
@pytest.mark.parametrize(
    ("numbers", "settings"),
    [
        (((3, 16), 1, 1), SETTINGS),
        (((1, 2**62), 2**40, -(2**31)), SETTINGS),
        (NUMBERS, SETTINGS | {"DTYPE": tl.float64}),
        (NUMBERS, {"num_warps": 2, "DTYPE": tl.float32, "SIZE": 16}),
        (NUMBERS, SETTINGS | {"enable_fp_fusion": False}),
    ],
)
def test_numbers_and_settings(numbers, settings):
    with host_driver() as driver:
        assert_like_triton(driver, tensors(), numbers=numbers, settings=settings)


@jit(do_not_specialize=["count"])
def _scale_kernel(values, offset, out, count, factor, SIZE: tl.constexpr):
    value = tl.load(values + tl.arange(0, SIZE))
    if offset is not None:
        value += tl.load(offset)
    tl.store(out + tl.arange(0, SIZE), value * count * factor)


@compiled
def test_integers_and_none_among_the_arguments():
    """The variant depends on the width of an integer and on what is None, not on the integer's value."""
    values, out = torch.ones(16), torch.empty(16)
    launch = Launch(_scale_kernel, 3, SIZE=16)

    def variant(driver, offset, count):
        arguments = values, offset, out, count
        actual = launched(driver, lambda: launch((2,), *arguments))
        expected = launched(driver, lambda: _scale_kernel[(2,)](*arguments, 3, SIZE=16))
        assert actual[:METADATA] == expected[:METADATA]
        assert actual[-6:] == expected[-6:] == (*arguments, 3, 16)
        return actual[0]

    with host_driver() as driver:
        for offset in (None, torch.ones(1)):
            for counts in ((0, 1, 16, 7, 2**31 - 1, -(2**31)), (2**31, -(2**31) - 1, 2**62)):
                assert len({variant(driver, offset, count) for count in counts}) == 1
    assert len(launch._variants) == 4


@compiled
def test_an_integer_that_the_kernel_specialises_is_no_argument():
    with host_driver(), pytest.raises(TypeError, match="factor: expected in `do_not_specialize` or `numbers`"):
        Launch(_scale_kernel, SIZE=16)((1,), torch.ones(16), None, torch.empty(16), 5, 3)


@compiled
def test_a_variant_belongs_to_a_device():
    with host_driver() as driver:
        launch = Launch(_add_kernel, *NUMBERS, **SETTINGS)
        for device in ("first", "second", "first"):
            driver.device = device
            assert_like_triton(driver, tensors(), launch=launch)
        assert len(launch._variants) == 2


@compiled
def test_uses_the_current_stream():
    with host_driver() as driver:
        launch = Launch(_add_kernel, *NUMBERS, **SETTINGS)
        for stream in (0, 7, 0):
            driver.stream = stream
            assert_like_triton(driver, tensors(), launch=launch)
            assert launched(driver, lambda: launch((1,), *tensors()))[4] == stream


@compiled
def test_knobs_that_change_the_variant():
    with host_driver() as driver, knobs.runtime.scope(), knobs.compilation.scope():
        launch = Launch(_add_kernel, *NUMBERS, **SETTINGS)
        assert_like_triton(driver, tensors(), launch=launch)
        knobs.runtime.debug = True
        assert_like_triton(driver, tensors(), launch=launch)
        assert len(launch._variants) == 2


@compiled
def test_launch_hooks_are_called():
    names = []
    arguments = tensors()

    def enter(metadata):
        names.append(metadata.get()["name"])

    with host_driver() as driver:
        launch = Launch(_add_kernel, *NUMBERS, **SETTINGS)
        launch((1,), *arguments)
        knobs.runtime.launch_enter_hook.add(enter)
        try:
            call = launched(driver, lambda: launch((1,), *arguments))
            metadata, hook = call[METADATA], call[METADATA + 1]
            hook(metadata)  # as the driver's launcher does
        finally:
            knobs.runtime.launch_enter_hook.remove(enter)
        assert names == ["_add_kernel"]


@compiled
def test_what_only_compiled_is_not_remembered():
    """As in the compile report, whose kernels are never loaded."""
    launch = Launch(_add_kernel, *NUMBERS, **SETTINGS)

    class CompileOnly:
        arg_names, params = _add_kernel.arg_names, _add_kernel.params

        def __getitem__(self, grid):
            return lambda *args, **settings: _add_kernel.run(*args, grid=grid, warmup=True, **settings)

    launch._kernel = CompileOnly()
    with host_driver():
        launch((1,), *tensors(torch.int32))
    assert not launch._variants


# By operator: cases that reach all of its launchers.
CASES = {
    "decode_keypoints": ["100 persons 17x56x56, torchvision, float32"],
    "encode_rle": ["RLE of 100 masks 28x28, aligned"],
    "keypoint_loss": ["128 RoIs 17x56x56, NCHW, float32"],
    "mask_loss": ["256 RoIs 28x28, 80 classes, bfloat16"],
    "mask_targets": ["256 RoIs 28x28, polygons", "256 RoIs 28x28, RLE"],
    "match_boxes": ["2 x 268,569 anchors, 100 objects"],
    "nms": ["NMS of 5x1000", "NMS of 10000"],
    "paste_masks": ["100 masks 28x28, aligned, bool"],
    "preprocess": ["480x640 to 800x1067, CHW"],
    "roi_align": [
        "1024 RoIs 7x7, torchvision, bfloat16",
        "1024 RoIs 7x7, torchvision, mean, bfloat16, gradient of boxes",
    ],
    "roi_pool": ["1024 RoIs 7x7, P2 to P5, bfloat16"],
    "sample_matches": ["256 of 2 x 268,569 anchors"],
    "select_detections": ["detections of 1000 x 80"],
    "select_mask_logits": ["100 RoIs 28x28, 256 channels, bfloat16"],
    "select_proposals": ["proposals of R-50-FPN"],
    "soft_nms": ["soft NMS of 1000, linear"],
}
# By launcher: how many kernels a call launches, and how many times the host time of an empty one it takes at most. One
# and a half times what was measured.
LIMITS = {
    "decode_keypoints": (1, 5),
    "encode_rle_padded": (4, 17),
    "keypoint_loss": (2, 16),
    "keypoint_loss_backward": (1, 6),
    "mask_loss": (2, 13),
    "mask_loss_backward": (1, 4),
    "mask_targets": (1, 5),
    "match_boxes": (2, 7),
    "nms_padded": (3, 14),
    "paste_masks": (1, 5),
    "preprocess": (1, 7),
    "roi_align": (1, 7),
    "roi_align_backward": (4, 24),
    "roi_align_box_backward": (1, 16),
    "roi_pool": (1, 7),
    "roi_pool_backward": (3, 16),
    "sample_matches": (2, 6),
    "select_detections": (5, 40),
    "select_mask_logits": (1, 4),
    "select_proposals": (4, 70),  # beside `torch.topk` of five levels
    "soft_nms": (1, 5),
}


def declared(operator):
    """The operator's declaration with the cases of `CASES` alone."""
    declaration = operators()[operator]
    return replace(declaration, compile_cases={case: declaration.compile_cases[case] for case in CASES[operator]})


@compiled
@pytest.mark.parametrize("operator", CASES)
def test_launchers_launch_what_triton_launches(operator):
    """A launcher's first call in a new driver goes through Triton, the second one does not."""

    def described(call):
        (variant, *grid), arguments = call[:4], call[METADATA + 3 :]
        return (
            variant,
            grid,
            [
                [(one.dtype, one.shape) if isinstance(one, torch.Tensor) else one for one in part]
                for part in (argument if isinstance(argument, tuple) else (argument,) for argument in arguments)
            ],
        )

    with host_driver() as driver, recorded_launchers() as calls:
        for call in declared(operator).compile_cases.values():
            call().run()
        assert {name for name, _ in calls} <= LIMITS.keys()
        for _, repeat in list(calls):
            driver.device = object()
            driver.launched.clear()
            repeat()
            by_triton = [described(call) for call in driver.launched]
            driver.launched.clear()
            with patch.object(JITFunction, "run", side_effect=AssertionError("launched by Triton")):
                repeat()
            assert [described(call) for call in driver.launched] == by_triton


@compiled
@pytest.mark.parametrize("operator", CASES)
def test_host_time(operator):
    rows = [row for row in measure({operator: declared(operator)}) if row.case != "NMS of 10000"]
    assert rows
    assert all(row.kernels == LIMITS[row.launcher][0] for row in rows)
    slow = [row for row in rows if row.ratio > LIMITS[row.launcher][1]]
    assert not slow
