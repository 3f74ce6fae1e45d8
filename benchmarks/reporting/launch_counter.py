"""Counts launches, bytes and synchronisations of what runs on fake tensors of a device, by stage.

The operators' own launchers run; their kernels are counted instead of launched. An operator of PyTorch is counted as
its CUDA implementation launches kernels, which `_LAUNCHES` knows; the numbers of sorts and top-k depend on their sizes
and are estimates. Bytes are those of the tensors that are read and written, each once; a kernel that reads a part of a
feature map counts the whole.

An operator synchronises if the host needs a value that the device computes, or if it copies between host and device and
returns only when the copy is done.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.reporting.host_time import host_driver
from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import LAUNCHERS
from fastmask.kernels.roi_align import levels
from models.marks import PREFIX
from models.stage_times import OTHER

ROOT = Path(__file__).parents[2]

# Operators of PyTorch that launch nothing: views, and memory without contents.
_VIEWS = {
    "_local_scalar_dense", "_pin_memory", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach",
    "diagonal", "empty", "empty_like", "empty_strided", "expand", "is_pinned", "is_same_size", "lift_fresh",
    "new_empty", "new_empty_strided", "permute", "record_stream", "reshape", "resize", "select", "set", "slice",
    "split", "split_with_sizes", "squeeze", "sym_numel", "sym_size", "sym_stride", "t", "transpose", "unbind",
    "unfold", "unsqueeze", "view",
}  # fmt: skip
_LARGE_SORT = 4096  # elements of a row that one block sorts


@dataclass
class Stage:
    """The work of a stage."""

    launches: int = 0
    bytes: int = 0
    synchronisations: Counter[str] = field(default_factory=Counter)  # by the place in the code


def _sort_launches(tensors: list[Tensor]) -> int:
    return 3 if tensors[0].shape[-1] <= _LARGE_SORT else 9  # in blocks | radix: fill, 5 passes, copies


def _topk_launches(values: Tensor, k: int) -> int:
    """The selection, in one block per row or in several passes, the gather, and the sort of k results."""
    sort = 1 if k <= 32 else 3 if k <= 1024 else 8
    return (2 if values.shape[-1] < 20_000 else 11) + sort


def _convolution_launches(arguments: tuple[Any, ...]) -> int:
    """cuDNN's kernel, the bias in one of its own, and padding of input and weight to 8 channels."""
    features, bias = arguments[0], arguments[2]
    return 1 + (bias is not None) + 2 * (features.shape[1] % 8 != 0)


# By the operator's name: the launches of a call, from its arguments. Others launch one kernel.
_LAUNCHES: Mapping[str, Callable[[tuple[Any, ...]], int]] = {
    "convolution": _convolution_launches,
    # A kernel that computes and one that transposes, zeroes or reduces for each gradient; the bias is a sum.
    "convolution_backward": lambda a: 2 * a[-1][0] + 2 * a[-1][1] + a[-1][2],
    "sort": lambda a: _sort_launches(tree_leaves(a)),
    "argsort": lambda a: _sort_launches(tree_leaves(a)),
    "topk": lambda a: _topk_launches(a[0], a[1]),
    "cumsum": lambda _: 2,
    "nonzero": lambda _: 4,
    "cat": lambda a: max(1, math.ceil(len(a[0]) / 64)),
    "native_batch_norm": lambda _: 3,
    "_foreach_norm": lambda a: 2 * math.ceil(len(a[0]) / 110),
    # Up to 48 tensors and 320 blocks of 65,536 elements in a launch.
    "_fused_sgd": lambda a: math.ceil(len(a[0]) / 48) + sum(tensor.numel() for tensor in a[0]) // (320 << 16),
}


class LaunchCounter(TorchDispatchMode):
    """Counts what runs on a device while it is active, by the innermost mark of `models.marks`.

    Args:
        device: "cuda", or "cpu" where CPU tensors stand for those of the device.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.stages: dict[str, Stage] = {}
        self.kernels: Counter[str] = Counter()  # by operator or kernel
        self._marks = [PREFIX + OTHER]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "profiler":
            self._mark(name, args)
        if namespace == "fastmask" and name in LAUNCHERS:
            with self:  # what the launcher itself runs is counted too
                return LAUNCHERS[name](*args, **kwargs)
        if namespace == "aten" and _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        # Fake tensors have no fused optimiser.
        result = None if name == "_fused_sgd_" else func(*args, **kwargs)
        if namespace in ("aten", "torchvision"):
            self._count(name, args, kwargs, result)
        return result

    def reset(self) -> None:
        """Forget what was counted."""
        self.stages.clear()
        self.kernels.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing in the context."""
        stages, kernels = self.stages, self.kernels
        self.stages, self.kernels = {}, Counter()
        try:
            yield
        finally:
            self.stages, self.kernels = stages, kernels

    @property
    def launches(self) -> int:
        """Of all stages."""
        return sum(stage.launches for stage in self.stages.values())

    @property
    def bytes(self) -> int:
        """Of all stages."""
        return sum(stage.bytes for stage in self.stages.values())

    @property
    def synchronisations(self) -> Counter[str]:
        """Of all stages, by the place in the code."""
        return sum((stage.synchronisations for stage in self.stages.values()), Counter())

    def launched(self, kernel: str, arguments: Any) -> None:
        """Count a launch of one of fastmask's kernels."""
        self._add(kernel, 1, sum(tensor.nbytes for tensor in _tensors(arguments)))

    def _mark(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "_record_function_enter_new":
            self._marks.append(arguments[0])
        elif name == "_record_function_exit":
            self._marks.pop()

    @property
    def _stage(self) -> Stage:
        name = next(name for name in reversed(self._marks) if name.startswith(PREFIX))
        return self.stages.setdefault(name.removeprefix(PREFIX), Stage())

    def _add(self, name: str, launches: int, bytes: int) -> None:
        stage = self._stage
        stage.launches += launches
        stage.bytes += bytes
        self.kernels[name] += launches

    def _count(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        kinds = {tensor.device.type for tensor in (*inputs, *outputs)}
        if self.device not in kinds:
            return
        base = name if name.startswith("_") else name.removesuffix("_")
        copies = len(kinds) > 1 and base in ("_to_copy", "copy")
        if _synchronises(base, inputs, outputs, args, kwargs, copies):
            self._stage.synchronisations[f"{base} in {_place()}"] += 1
        if base in _VIEWS:
            return
        if copies:
            self._add("copy between host and device", 1, outputs[0].nbytes)
            return
        launches = _LAUNCHES[base](args) if base in _LAUNCHES else 1
        read = [] if base in ("fill", "zero") else [tensor for tensor in inputs if 0 not in tensor.stride()]
        self._add(base, launches, sum(tensor.nbytes for tensor in (*read, *outputs)))


def _is_composite(func: Any) -> bool:
    """Whether PyTorch computes it by other operators, which in inference mode it has not called yet.

    Decompositions that only PyTorch's compiler applies do not count.
    """
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key not in func.py_kernels and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _synchronises(
    name: str,
    inputs: list[Tensor],
    outputs: list[Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    copies: bool,
) -> bool:
    if copies:
        to_host = outputs[0].device.type == "cpu"
        non_blocking = kwargs.get("non_blocking") or (name == "copy" and len(args) > 2 and args[2])
        return to_host or not non_blocking
    has_mask = name in ("index", "index_put", "_index_put_impl") and any(
        tensor.dtype in (torch.bool, torch.uint8) for tensor in inputs[1:]
    )
    return has_mask or name in _SYNCHRONISING


# The host reads a value, or the size of the result depends on values.
_SYNCHRONISING = frozenset(
    ["_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal", "bincount"]
)


def _place() -> str:
    """The line of the project that called PyTorch."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        counts = isinstance(frame.f_locals.get("self"), LaunchCounter)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and not counts and frame.f_code.co_name != "_place":
            return f"{path.relative_to(ROOT)}, {frame.f_code.co_name}"
        frame = frame.f_back
    return "PyTorch"


def _conv_memory_format(features: Tensor, weight: Tensor, _backend: Any) -> torch.memory_format:
    """What cuDNN returns; without a driver, PyTorch takes it for contiguous."""
    is_last = any(suggest_memory_format(tensor) == torch.channels_last for tensor in (features, weight))
    return torch.channels_last if is_last else torch.contiguous_format


@contextmanager
def counting(device: str) -> Iterator[LaunchCounter]:
    """Count what runs on fake tensors of a device. Everything in the context is fake."""
    counter = LaunchCounter(device)

    def launched(launch: Launch, _grid: tuple[int, ...], *arguments: Any) -> None:
        counter.launched(launch.name, arguments)

    compute = levels.area_thresholds

    def area_thresholds(*arguments: Any) -> Any:
        """Of the host, from real tensors."""
        with _disable_current_modes():
            return compute(*arguments)

    with ExitStack() as stack:
        stack.enter_context(host_driver())
        stack.enter_context(mock.patch.object(levels, "area_thresholds", area_thresholds))
        stack.enter_context(mock.patch.object(Launch, "__call__", launched))
        stack.enter_context(mock.patch.object(torch.accelerator, "device_index", return_value=nullcontext()))
        # `torch.autocast("cuda")` disables itself where there is no driver, and streams need one.
        stack.enter_context(
            mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False)
        )
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True))
        # Fake tensors are no exact `Tensor`, for which the norm of many gradients is one operator.
        stack.enter_context(mock.patch.object(clip_grad, "_has_foreach_support", return_value=True))
        stack.enter_context(mock.patch.object(torch.cuda, "Stream", return_value=None))
        stack.enter_context(mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _conv_memory_format))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(counter)
        yield counter
