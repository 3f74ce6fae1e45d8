"""Launch kernels with little host time: prepare once what does not change between calls.

`kernel[grid](...)` binds all arguments, specialises each, and looks the compiled variant up by a key of them, in every
call. A `Launch` holds the numbers and constants of a call, which a launcher prepares once for each of its settings and
image sizes, and remembers which variant Triton chose for tensors of the same dtypes and alignment. It launches that as
`variant[grid](...)`, which uses the current stream and calls launch hooks, as Triton's own path does.
`python -m benchmarks host-time` measures launchers.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor

from fastmask.kernels._runtime import INTERPRETED, triton

Argument: TypeAlias = Tensor | tuple[Tensor, ...] | int | None


class Launch:
    """A kernel with its numbers and constants: `Launch(kernel, *numbers, **settings)(grid, *arguments)` does what
    `kernel[grid](*arguments, *numbers, **settings)` does, on the current device and stream.

    Args:
        kernel: decorated with `jit`.
        numbers: the arguments before the constants: integers, and tuples of integers.
        settings: the kernel's constants (`tl.constexpr`), and options such as `num_warps`.
    """

    def __init__(self, kernel: Any, *numbers: Any, **settings: Any) -> None:
        self._kernel, self._numbers, self._settings = kernel, numbers, settings
        self._variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    @property
    def name(self) -> str:
        """The kernel's."""
        return self._kernel.__name__

    def __call__(self, grid: tuple[int, ...], *arguments: Argument) -> None:
        """Launch.

        Args:
            grid: one to three sizes.
            arguments: the kernel's first arguments, which change from call to call. Integers are of 64 bits or less,
                and the kernel does not specialise them.
        """
        if INTERPRETED:
            self._kernel[grid](*arguments, *self._numbers, **self._settings)
            return
        # What can change the variant, or the loaded binary, between calls. Triton keys its own caches by the same. It
        # also calls `pre_run_hooks` and checks the globals that a kernel reads: no kernel here has or changes any.
        knobs = triton.knobs
        key: list[Any] = [
            triton.runtime.driver.active.get_current_device(),
            knobs.runtime.debug,
            knobs.compilation.instrumentation_mode,
        ]
        for argument in arguments:
            if isinstance(argument, tuple):
                for tensor in argument:
                    key += tensor.dtype, tensor.data_ptr() % 16 == 0
            elif isinstance(argument, int):
                key.append(-(2**31) <= argument < 2**31)  # int32, or int64
            elif argument is None:
                key.append(None)
            else:
                key += argument.dtype, argument.data_ptr() % 16 == 0
        known = self._variants.get(tuple(key))
        if known is None:
            self._launch_by_triton(tuple(key), grid, arguments)
        else:
            variant, rest = known
            variant[(*grid, 1, 1)[:3]](*arguments, *rest)

    def _launch_by_triton(self, key: tuple[Any, ...], grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Launch, and remember the variant."""
        for parameter, argument in zip(self._kernel.params, arguments, strict=False):
            if isinstance(argument, int) and not parameter.do_not_specialize:
                raise TypeError(f"{parameter.name}: expected in `do_not_specialize` or `numbers`, got an argument")
        variant = self._kernel[grid](*arguments, *self._numbers, **self._settings)
        # It has no function where the call only compiled it. Other backends specialise on more, such as sizes in bytes.
        if getattr(variant, "function", None) is not None and variant.metadata.target.backend == "cuda":
            constants = self._kernel.arg_names[len(arguments) + len(self._numbers) :]
            self._variants[key] = variant, (*self._numbers, *(self._settings[name] for name in constants))
