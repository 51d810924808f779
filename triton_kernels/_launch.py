"""What all kernel files share: Triton where it is installed, launches that can be recorded, and checks before them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from subprocess import CalledProcessError
from threading import Lock
from typing import Any

import torch

from vlm_budget.errors import KernelInputError, KernelUnavailableError

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheels for macOS and for some Linux machines; references run without it
    triton = tl = None

__all__ = [
    "FLOATS",
    "Config",
    "Kernel",
    "Launch",
    "blocks",
    "device_function",
    "kernel",
    "power_of_two",
    "recorded",
    "require_dtype",
    "require_int32",
    "require_rows",
    "require_same_device",
    "require_shape",
    "tl",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**31 - 1
"""Sizes and counts are 32-bit in the kernels; addresses are 64-bit."""

_MISSING = {
    "Failed to find C compiler": "Triton builds a launcher for each kernel and finds no C compiler. Install gcc or "
    "clang (or name a compiler in the environment variable CC)",
    "0 active drivers": "Triton finds no driver of an NVIDIA GPU. Install one, and a torch that is built for CUDA",
}
_FAILED = (
    "the C compiler with which Triton builds launchers failed; its messages are above. It needs Python's header "
    "files: install them (python3-dev)"
)


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    Attributes:
        warps: Warps of 32 threads per program.
        stages: Loop iterations whose loads are in flight at once.
        meta: Values of the kernel's ``constexpr`` tile sizes.
    """

    warps: int = 4
    stages: int = 2
    meta: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of made.

    Attributes:
        kernel: What would run.
        arguments: By parameter name, ``constexpr`` ones included.
        config: One of the kernel's configurations.
    """

    kernel: Kernel
    arguments: dict[str, Any]
    config: Config


_recorder: list[Launch] | None = None
_timing = Lock()
"""Held while configurations are timed: Triton's tuner is not made for threads, and they would slow each other."""


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches instead of making them, with every configuration; outputs stay as allocated."""
    global _recorder
    earlier, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = earlier


class Kernel:
    """A Triton kernel and its configurations.

    With several configurations, the first launch for every new value of ``key`` times them all on the device, which
    waits for it; later ones do not. ``key`` names widths (a head's, a row's), never lengths: another resolution uses
    what was found. Which one is fastest may differ from run to run, so they must not differ in what they compute.

    Attributes:
        name: The function's.
        function: The function in Triton's dialect.
        configs: At least one; the first is launched where none can be timed.
        key: Parameters whose values a tuned choice depends on.
        sizes: Integer parameters that vary from call to call.
        parameters: Names of all parameters.
        jit: Triton's form of the function; None without Triton.
        tunes: Launches choose by timing; the interpreter takes the first configuration.
    """

    def __init__(
        self, function: Callable[..., None], configs: Sequence[Config], key: Sequence[str], sizes: Sequence[str]
    ) -> None:
        self.name = function.__name__
        self.function = function
        self.configs = tuple(configs)
        self.key = tuple(key)
        self.sizes = tuple(sizes)
        self.parameters = tuple(inspect.signature(function).parameters)
        self.jit: Any = None if triton is None else triton.jit(function, do_not_specialize=list(sizes))
        self.tunes = len(self.configs) > 1 and not self.interpreted
        self._fastest: dict[tuple[Any, ...], Config] = {}

    @property
    def interpreted(self) -> bool:
        """The kernel was made under ``TRITON_INTERPRET=1``, and runs on the host."""
        return type(self.jit).__name__ == "InterpretedFunction"

    def launch(self, grid: Any, *args: Any, **meta: Any) -> None:
        """Run the kernel.

        Args:
            grid: Programs per axis, or a function of the ``constexpr`` values that gives them.
            args: Positional arguments.
            meta: ``constexpr`` values that no configuration sets.

        Raises:
            KernelUnavailableError: It cannot run here; the message says what is missing.
        """
        if _recorder is not None:
            named = self._named(args, meta)
            _recorder.extend(Launch(self, {**named, **config.meta}, config) for config in self.configs)
            return
        tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
        require_runnable(self.name, tensor.device, self.interpreted)
        try:
            with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
                config = self._chosen(grid, args, meta) if self.tunes else self.configs[0]
                options = {} if self.interpreted else {"num_warps": config.warps, "num_stages": config.stages}
                self.jit[grid](*args, **meta, **config.meta, **options)
        except (RuntimeError, CalledProcessError) as error:
            if (reason := _missing(error)) is None:
                raise
            raise KernelUnavailableError(
                f"the kernel {self.name} cannot be launched: {reason}, or set VLM_BUDGET_KERNELS=reference."
            ) from error

    def _named(self, args: Sequence[Any], meta: Mapping[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameters, args, strict=False)), **meta}

    def _chosen(self, grid: Any, args: Sequence[Any], meta: Mapping[str, Any]) -> Config:
        """The fastest configuration for these widths and element types."""
        named = self._named(args, meta)
        kinds = (value.dtype for value in named.values() if isinstance(value, torch.Tensor))
        key = (*(named[name] for name in self.key), *kinds)
        if key not in self._fastest:
            if _capturing():
                return self.configs[0]
            with _timing:
                if key not in self._fastest:
                    try:
                        self._fastest[key] = self._timed(grid, args, meta)
                    except torch.OutOfMemoryError:  # between timings 256 MB are written, to empty the caches
                        return self.configs[0]
        return self._fastest[key]

    def _timed(self, grid: Any, args: Sequence[Any], meta: Mapping[str, Any]) -> Config:
        choices = [triton.Config(dict(c.meta), num_warps=c.warps, num_stages=c.stages) for c in self.configs]
        # Made here, not at import, where Triton 3.2 would look for a driver; not kept, since it may hold tensors.
        tuner = triton.autotune(configs=choices, key=list(self.key))(self.jit)
        tuner[grid](*args, **meta)
        best = tuner.best_config
        return Config(best.num_warps, best.num_stages, best.kwargs)


def _missing(error: Exception) -> str | None:
    """What a launch lacks and where to get it, if that is why it failed."""
    if isinstance(error, CalledProcessError):
        return _FAILED
    return next((reason for words, reason in _MISSING.items() if words in str(error)), None)


def _capturing() -> bool:
    """A CUDA graph is being captured, and nothing can be timed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def kernel(
    *configs: Config, key: Sequence[str] = (), sizes: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Kernel]:
    """Make a function in Triton's dialect a :class:`Kernel`.

    Args:
        configs: At least one. Several only where they compute the same to the last bit.
        key: Parameters whose values a tuned choice depends on, widths; element types always count.
        sizes: Integer parameters that vary from call to call (lengths, counts): no value of theirs is compiled in.
    """
    return lambda function: Kernel(function, configs or (Config(),), key, sizes)


def device_function(function: Callable[..., Any]) -> Any:
    """Make a function in Triton's dialect one that kernels can call."""
    return function if triton is None else triton.jit(function)


def require_runnable(name: str, device: torch.device, interpreted: bool) -> None:
    """Refuse a launch that cannot run.

    Raises:
        KernelUnavailableError: Triton is missing, or the tensors live where the kernel does not run.
    """
    if triton is None:
        raise KernelUnavailableError(
            f"the kernel {name} needs Triton, which is not installed. Install it (pip install triton), or set "
            "VLM_BUDGET_KERNELS=auto or =reference."
        )
    if interpreted != (device.type == "cpu") or device.type not in ("cpu", "cuda"):
        runs = "the CPU, since TRITON_INTERPRET=1 was set when it was loaded" if interpreted else "CUDA devices"
        raise KernelUnavailableError(
            f"the kernel {name} runs on {runs}, and its tensors live on {device}. Move them there, or set "
            "VLM_BUDGET_KERNELS=auto or =reference."
        )


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def blocks(n: int, size: int) -> int:
    """How many blocks of ``size`` cover ``n``."""
    return -(-n // size)


# --- checks ----------------------------------------------------------------------------------------------------------


def require_dtype(allowed: Sequence[torch.dtype], **tensors: torch.Tensor) -> None:
    """Refuse element types that a kernel cannot read.

    Raises:
        KernelInputError: Some tensor has another.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise KernelInputError(f"{name} must be one of {kinds}, got {tensor.dtype}. Convert it with .to().")


def require_same_device(**tensors: torch.Tensor | None) -> None:
    """Refuse tensors on several devices.

    Raises:
        KernelInputError: They are; the message says which lives where.
    """
    places = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise KernelInputError(f"all tensors must live on one device, got {listed}. Move them with .to().")


def require_rows(**tensors: torch.Tensor | None) -> None:
    """Refuse tensors whose last dimension is strided: kernels read rows as they lie.

    Raises:
        KernelInputError: Some tensor is.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise KernelInputError(
                f"{name} must be contiguous along its last dimension, got shape {list(tensor.shape)} with strides "
                f"{list(tensor.stride())}. Call .contiguous() first."
            )


def require_int32(**sizes: int) -> None:
    """Refuse sizes that 32 bits cannot hold.

    Raises:
        KernelInputError: Some size is 2**31 or more, or negative.
    """
    for name, size in sizes.items():
        if not 0 <= size <= LARGEST:
            raise KernelInputError(f"{name} must lie between 0 and {LARGEST} (32 bits), got {size}. Split the input.")


def require_shape(expected: Sequence[int | None], **tensors: torch.Tensor) -> None:
    """Refuse another shape; None stands for any size.

    Raises:
        KernelInputError: Some tensor has one.
    """
    for name, tensor in tensors.items():
        fits = tensor.ndim == len(expected) and all(
            want is None or got == want for got, want in zip(tensor.shape, expected, strict=True)
        )
        if not fits:
            shape = ", ".join("any" if want is None else str(want) for want in expected)
            raise KernelInputError(f"{name} must have shape [{shape}], got {list(tensor.shape)}")
