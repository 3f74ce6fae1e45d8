"""Launching a kernel with little host time: what does not change between calls is prepared once.

`kernel[grid](...)` binds all arguments, specialises each, and looks the compiled variant up by a key of them, in every
call. A `Launch` holds the numbers and constants of a call, which a launcher prepares once for each of its settings and
image sizes, and remembers which variant Triton chose for tensors of the same dtypes and alignment. It launches that as
`variant[grid](...)`, which uses the current stream and calls launch hooks, as Triton's own path does.
`python -m benchmarks host-time` measures launchers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmask.kernels._runtime import INTERPRETED, triton


class Launch:
    """A kernel with its numbers and constants: `Launch(kernel, *numbers, **settings)(grid, *tensors)` does what
    `kernel[grid](*tensors, *numbers, **settings)` does, on the current device and stream.

    Args:
        kernel: decorated with `jit`.
        numbers: the arguments between tensors and constants: integers, and tuples of integers.
        settings: the kernel's constants (`tl.constexpr`), and options such as `num_warps`.
    """

    def __init__(self, kernel: Any, *numbers: Any, **settings: Any) -> None:
        self._kernel, self._numbers, self._settings = kernel, numbers, settings
        self._variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, grid: tuple[int, ...], *tensors: Tensor | tuple[Tensor, ...]) -> None:
        """Launch.

        Args:
            grid: one to three sizes.
            tensors: the kernel's first arguments, tensors and tuples of tensors.
        """
        if INTERPRETED:
            self._kernel[grid](*tensors, *self._numbers, **self._settings)
            return
        # What can change the variant, or the loaded binary, between calls. Triton keys its own caches by the same.
        knobs = triton.knobs
        key: list[Any] = [
            triton.runtime.driver.active.get_current_device(),
            knobs.runtime.debug,
            knobs.compilation.instrumentation_mode,
        ]
        for argument in tensors:
            for tensor in argument if isinstance(argument, tuple) else (argument,):
                key += tensor.dtype, tensor.data_ptr() % 16 == 0
        known = self._variants.get(tuple(key))
        if known is None:
            self._launch_by_triton(tuple(key), grid, tensors)
        else:
            variant, rest = known
            variant[(*grid, 1, 1)[:3]](*tensors, *rest)

    def _launch_by_triton(self, key: tuple[Any, ...], grid: tuple[int, ...], tensors: tuple[Any, ...]) -> None:
        """Launch, and remember the variant."""
        variant = self._kernel[grid](*tensors, *self._numbers, **self._settings)
        # It has no function where the call only compiled it. Other backends specialise on more, such as sizes in bytes.
        if getattr(variant, "function", None) is not None and variant.metadata.target.backend == "cuda":
            constants = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            self._variants[key] = variant, (*self._numbers, *(self._settings[name] for name in constants))
