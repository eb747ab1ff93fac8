"""The hardware that a process computes on, and the arithmetic it is good at."""

from __future__ import annotations

import gc
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from threadpoolctl import ThreadpoolController

from cotune.errors import DeviceError


def pick_device(wanted: str = "auto") -> torch.device:
    """Return a device of PyTorch.

    Args:
        wanted: cpu, cuda, cuda:N, or auto for the first GPU, else the CPU.

    Raises:
        DeviceError: For a device that is not here.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise DeviceError(
            f'device = "{wanted}" is not known: expected auto, cpu, cuda or cuda:N', code="device.unknown"
        ) from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise DeviceError(f'device = "{wanted}" is not supported: expected auto, cpu, cuda or cuda:N', code="device.unknown")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise DeviceError(
            f'device = "{wanted}" was asked for, but this machine shows {count} CUDA GPU{"" if count == 1 else "s"} to PyTorch:'
            " use --device cpu, or install a CUDA build of torch and a driver",
            code="device.missing",
        )
    return device


@lru_cache(maxsize=1)
def _linear_algebra() -> ThreadpoolController:
    """The libraries of numpy and scipy; looking for them takes milliseconds."""
    import scipy.linalg  # noqa: F401  # loads one of its own

    return ThreadpoolController()


@contextmanager
def single_thread() -> Iterator[None]:
    """Compute with one thread during the block: PyTorch, and the linear algebra of numpy and scipy.

    For many small operations in a row: several threads wait for each other after each of them, which on a machine that is shared
    takes up to 30 times as long as the work, and on an idle one eight times its CPU time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _linear_algebra().limit(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(native and native())


def autocasts(precision: str, device: torch.device) -> bool:
    """Whether what no privacy hangs on, such as an evaluation, is computed in bfloat16: on a GPU that is good at it.

    Args:
        precision: `model.precision` of a plan.
    """
    return precision != "float32" and device.type == "cuda" and bfloat16_is_fast(device)


def limit_memory(device: torch.device, gib: float) -> None:
    """Let this process have so much memory of a GPU: beyond it, torch raises its out-of-memory error."""
    index = torch.cuda.current_device() if device.index is None else device.index
    whole = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / whole), index)


_OF_TORCH = ("TORCH_ALLOW_TF32_", "TORCH_BLAS_", "TORCH_CUDNN_", "TORCH_LINALG_", "TORCH_LINEAR_", "TORCH_MKLDNN_")
_SETTING_PREFIXES = ("ATEN_", "BLIS_", "CUBLAS", "CUDNN_", "DNNL_", "MKL_", "MKLDNN_", "ONEDNN_", "OPENBLAS_", *_OF_TORCH)
_SETTINGS = {"DISABLE_ADDMM_CUDA_LT", "NVIDIA_TF32_OVERRIDE", "OMP_DYNAMIC"}
_FULL = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "out of memory", "_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or this machine, has had no room for what was computed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


def free_unused_memory(device: torch.device) -> None:
    """Let go of what nobody uses any more, so that the next allocation finds all the room that there is."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def explained_out_of_memory(advice: str) -> Iterator[None]:
    """Raise DeviceError for a GPU or a machine that is full; the advice says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0].split(". ")[0][:120]
        where = "this machine" if "DefaultCPUAllocator" in str(error) else "the GPU"
        raise DeviceError(
            f"{where} has no memory left ({reason}): expected room for the model and one batch; {advice}",
            code="device.out_of_memory",
        ) from None


def kernel_key(device: torch.device) -> tuple[object, ...]:
    """What decides, beside operations and shapes, which kernels compute on a device in this process: equal where they are."""
    on_gpu = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if on_gpu else (_processor(), torch.backends.cpu.get_cpu_capability())
    flags = (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled)
    return (torch.__version__, device.type, processor, torch.get_num_threads(), *flags, *_library_settings())


@lru_cache(maxsize=1)  # libraries read them once
def _library_settings() -> tuple[tuple[str, str], ...]:
    """The environment variables by which the libraries below PyTorch choose kernels, such as MKL_CBWR or ONEDNN_MAX_CPU_ISA."""
    named = {name: value for name, value in os.environ.items() if name in _SETTINGS or name.startswith(_SETTING_PREFIXES)}
    return tuple(sorted(named.items()))


@lru_cache(maxsize=1)
def _processor() -> str:
    """The name of the processor: libraries choose kernels by its maker and model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith("model name")), platform.machine())


def peak_memory_bytes() -> int:
    """The most memory that this process has held (resident set)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_gpu_memory_bytes() -> int | None:
    """The most memory of one GPU that this process has held in tensors; None where it has used no GPU."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return None
    return max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())) or None
