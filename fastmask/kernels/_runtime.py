"""What every operator needs: Triton where there is one, registration with PyTorch, launching, numbers passed exactly.

One switch decides what runs, and it is Triton's own: kernels on an accelerator; references on CPU tensors;
kernels on CPU tensors too, interpreted, when `TRITON_INTERPRET=1` was set before the import.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

if TYPE_CHECKING:

    class _Language(Any):
        """Triton's language: inside a kernel its names have meanings that no type checker knows."""

        constexpr: TypeAlias = Any

    triton: Any = None
    tl = _Language
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # no wheel for this system (macOS): CPU tensors take the references
        triton = tl = None

P = ParamSpec("P")
T = TypeVar("T")

LIBRARY = torch.library.Library("fastmask", "DEF")
LAUNCHERS: dict[str, Callable[..., Any]] = {}  # by the operator's name: what runs on accelerators
INTERPRETED: bool = triton is not None and triton.knobs.runtime.interpret
_FMA_ROUNDS_TWICE = triton and triton.language.constexpr(INTERPRETED)  # the interpreter also rounds the product

_NO_DEVICE = nullcontext()

Size: TypeAlias = int  # in a spec: a number that `torch.compile` may keep symbolic

# From a spec field's annotation to its type in an operator's schema.
_SCHEMA_TYPES = {
    "Size": "SymInt",
    "int": "int",
    "float": "float",
    "float | None": "float?",
    "bool": "bool",
    "str": "str",
    "list[float]": "float[]",
    "Sequence[float]": "float[]",
    "torch.dtype": "ScalarType",
}


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
    spec: type[Any] | None = None,
) -> Callable[..., Any]:
    """Define `fastmask::<schema>` and return its overload.

    Autocast changes nothing: operators take half-precision features beside float32 boxes as they are and accumulate
    in float32.

    Args:
        schema: the operator's; `*spec` stands for the fields of `spec`.
        reference: runs on the CPU, unless kernels are interpreted.
        launch: runs on accelerators.
        fake: gives the output's shape, dtype and layout from the inputs' alone.
        backward, setup_context: as for `torch.library.register_autograd`. `backward` returns the gradients of
            the arguments before the spec.
        spec: a `NamedTuple` of the settings that travel together. Operators take its fields as their last
            arguments (`operator(tensor, *spec)`); every function above takes the tuple as its last argument.
            It is hashable: a field that is a list in the schema arrives as a tuple.
    """
    if spec is not None:
        schema = schema.replace("*spec", _schema_of(spec))
        reference, launch, fake = (_with_spec(function, spec) for function in (reference, launch, fake))
        backward = backward and _without_gradient_of(backward, spec)
        setup_context = setup_context and _context_with_spec(setup_context, spec)
    name = LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LAUNCHERS[name] = launch
    LIBRARY.impl(name, launch if INTERPRETED else _without_autocast(reference), "CPU")
    for device in ("CUDA", "XPU") if triton else ():  # ROCm answers to CUDA
        LIBRARY.impl(name, launch, device)
    for device in ("AutocastCPU", "AutocastCUDA", "AutocastXPU"):
        LIBRARY.impl(name, torch.library.fallthrough_kernel, device)
    torch.library.register_fake(f"fastmask::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"fastmask::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.fastmask, name).default


def _without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would round the factors of a reference's matrix products."""

    @wraps(reference)
    def call(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return reference(*args)
        with torch.autocast("cpu", enabled=False):
            return reference(*args)

    return call


def _schema_of(spec: type[Any]) -> str:
    return ", ".join(f"{_schema_type(spec.__annotations__[field])} {field}" for field in spec._fields)


def _schema_type(annotation: Any) -> str:
    return _SCHEMA_TYPES[getattr(annotation, "__forward_arg__", annotation)]


def _with_spec(function: Callable[..., Any], spec: type[Any]) -> Callable[..., Any]:
    count, make = len(spec._fields), _maker(spec)
    return wraps(function)(lambda *args: function(*args[:-count], make(args[-count:])))


def _context_with_spec(setup_context: Callable[..., None], spec: type[Any]) -> Callable[..., None]:
    count, make = len(spec._fields), _maker(spec)
    return lambda ctx, inputs, output: setup_context(ctx, (*inputs[:-count], make(inputs[-count:])), output)


def _maker(spec: type[Any]) -> Callable[[Sequence[Any]], Any]:
    """Makes a spec from an operator's arguments."""
    names = spec.__annotations__
    lists = [index for index, name in enumerate(spec._fields) if _schema_type(names[name]).endswith("[]")]
    if not lists:
        return spec._make

    def make(values: Sequence[Any]) -> Any:
        values = list(values)
        for index in lists:
            values[index] = tuple(values[index])
        return spec._make(values)

    return make


def _without_gradient_of(backward: Callable[..., Any], spec: type[Any]) -> Callable[..., Any]:
    return lambda ctx, *grads: (*backward(ctx, *grads), *(None for _ in spec._fields))


def overridable(function: Callable[P, T]) -> Callable[P, T]:
    """Let tensor-like arguments override a public function (`__torch_function__`), as they can PyTorch's own.

    Symbolic tracing with `torch.fx` then records one call of the function.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        relevant: list[Any] = []
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple)):  # a union `list | tuple` would be built anew in each call
                relevant.extend(value)
            elif isinstance(value, dict):
                relevant.extend(value.values())
            else:
                relevant.append(value)
        if has_torch_function(relevant):
            return handle_torch_function(call, relevant, *args, **kwargs)
        return function(*args, **kwargs)

    # A code object of its own: `torch.compile` limits how often one is compiled again.
    renamed: Any = call
    renamed.__code__ = renamed.__code__.replace(co_name=function.__name__)
    return call


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current: Triton launches on the current device, whatever its arguments."""
    index = tensor.get_device()  # -1 on the CPU and meta
    return _NO_DEVICE if index < 0 else torch.accelerator.device_index(index)


def ceil_div(numerator: int, denominator: int) -> int:
    """Quotient rounded up; `triton.cdiv` costs 4 us a call on the host."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The least power of two >= `number`; `triton.next_power_of_2` costs 5 us a call on the host."""
    return 1 << (number - 1).bit_length() if number > 1 else 1


def float64_bits(value: float) -> int:
    """The bits of a float64: Triton passes Python floats as float32, integers unchanged."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def round_to_float32(value: float) -> float:
    """The nearest float32, without a tensor."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coordinates and sums: float64 for float64 features, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of `compute_dtype`: kernels take it as their constant `COMPUTE`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@jit()
def float_of(bits, COMPUTE: tl.constexpr):
    """The float whose `float64_bits` are an integer, rounded to `COMPUTE`."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)


@jit()
def divide(x, y):
    """Rounded to nearest: Triton's `/` is approximate in float32, and its `div_rn` takes nothing wider."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@jit()
def divide_by_reciprocal(x, divisor, reciprocal):
    """`divide(x, divisor)` to the bit and without a branch, from `reciprocal = divide(1, divisor)`.

    x is 0 or 2^-60 <= |x| < infinity, and 1 <= divisor <= 2^100. The first quotient is off by at most 1.5 ulp. Adding
    its remainder times the reciprocal leaves at most one ulp; the second remainder is then exact, and with a correctly
    rounded reciprocal the second correction rounds correctly (Markstein 1990).
    """
    if x.dtype == tl.float64 or _FMA_ROUNDS_TWICE:
        return divide(x, divisor)
    quotient = x * reciprocal
    quotient = tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)
    return tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)


@jit()
def divide_by_constant(x, DIVISOR: tl.constexpr):
    """`divide(x, DIVISOR)` to the bit, for a positive integer DIVISOR and x = 0 or 2^-60 <= |x| < infinity.

    A power of two divides every x: its reciprocal is exact, and the product rounds the same number as the quotient.
    For others one correction of a quotient that is off by at most 1.5 ulp is enough. The remainder is exact: a multiple
    of the quotient's ulp, and less than 2^24 of them. Before its last rounding the result is off by less than
    1.5 * 2^-24 ulp. x / DIVISOR is at least 1 / (2 * DIVISOR) ulp from the midpoint of two floats, because DIVISOR
    times a midpoint has more than 24 bits and is not x. All this for divisors up to 2^22; larger ones divide.
    """
    if (DIVISOR & (DIVISOR - 1)) == 0:
        return x * (1.0 / DIVISOR)
    if x.dtype == tl.float64 or _FMA_ROUNDS_TWICE or DIVISOR > 1 << 22:
        return divide(x, DIVISOR * 1.0)
    quotient = x * (1.0 / DIVISOR)
    return tl.fma(tl.fma(quotient, -1.0 * DIVISOR, x), 1.0 / DIVISOR, quotient)


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


def current_device() -> Any:
    """Triton's name of the current device, on which settings may depend; None in the interpreter."""
    return None if INTERPRETED else triton.runtime.driver.active.get_current_device()
