"""What every kernel file needs: Triton where there is one, registration, launching, numbers passed exactly.

One switch decides what runs, and it is Triton's own: kernels on an accelerator; references on CPU tensors;
kernels on CPU tensors too, interpreted, when `TRITON_INTERPRET=1` was set before the import.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:

    class _Language(Any):
        """Triton's language, whose names mean inside a kernel what no type checker can tell."""

        constexpr: TypeAlias = Any

    triton: Any = None
    tl = _Language
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # no wheel for this system (macOS): CPU tensors take the references
        triton = tl = None

LIBRARY = torch.library.Library("fastmask", "DEF")
INTERPRETED: bool = triton is not None and triton.knobs.runtime.interpret


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit(**options)`, or the bare function where Triton is missing, so that kernel files import."""
    return lambda kernel: triton.jit(**options)(kernel) if triton else kernel


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Define `fastmask::<schema>` and return its overload.

    `launch` runs on accelerators, `reference` on the CPU unless kernels are interpreted. `fake` gives the
    output's shape, dtype and layout from the inputs' alone. `backward` and `setup_context` are those of
    `torch.library.register_autograd`.

    Autocast passes through: operators take half-precision features beside float32 boxes as they are and
    accumulate in float32, so there is nothing to cast.
    """
    name = LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, launch if INTERPRETED else reference, "CPU")
    for device in ("CUDA", "XPU") if triton else ():  # ROCm answers to CUDA
        LIBRARY.impl(name, launch, device)
    for device in ("AutocastCPU", "AutocastCUDA", "AutocastXPU"):
        LIBRARY.impl(name, torch.library.fallthrough_kernel, device)
    torch.library.register_fake(f"fastmask::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"fastmask::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.fastmask, name).default


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current: Triton launches on the current one, whatever its arguments."""
    if tensor.device.type in ("cpu", "meta"):
        return nullcontext()
    return torch.accelerator.device_index(tensor.device.index)


def float64_bits(value: float) -> int:
    """The bits of a float64: Triton passes Python floats as float32, integers unchanged."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What coordinates and sums are kept in: float64 for float64 features, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@jit()
def float_of(bits, dtype: tl.constexpr):
    """The float that `float64_bits` made an integer of, rounded to `dtype`."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@jit()
def divide(x, y):
    """Rounded to nearest: Triton's `/` is approximate in float32, and its `div_rn` takes nothing wider."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


def triton_dtype(dtype: torch.dtype) -> Any:
    """What kernels compute in: Triton's name of `compute_dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def pack_size(height: int, width: int) -> int:
    """A feature map's size in one odd 64-bit integer, for a tuple argument.

    Triton specialises the integers of a tuple on their value and divisibility, whatever `do_not_specialize`
    says, and would compile a kernel for every combination of image sizes.
    """
    return 1 << 61 | height << 31 | width << 1 | 1


def is_channels_last(tensor: Tensor) -> bool:
    """Whether outputs that follow `[N, C, H, W]` features are channels_last: not where both formats agree."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def empty(like: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory on the device of `like`, and of its dtype unless another is given."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def target_backend() -> str:
    """`"cuda"`, `"hip"`, ... of the current device, or `"interpreter"`."""
    return "interpreter" if INTERPRETED else triton.runtime.driver.active.get_current_target().backend
