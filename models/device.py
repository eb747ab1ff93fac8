"""The hardware that a process computes on, and the arithmetic it is good at."""

from __future__ import annotations

import resource
import sys

import torch

from cotune.models.errors import DeviceError

__all__ = ["bfloat16_is_fast", "peak_memory_bytes", "pick_device"]


def pick_device(wanted: str = "auto") -> torch.device:
    """auto: the first GPU, else the CPU. Raises DeviceError when a device that was asked for is absent."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise DeviceError(f'device = "{wanted}" is not known: expected auto, cpu, cuda or cuda:N') from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise DeviceError(f'device = "{wanted}" is not supported: expected auto, cpu, cuda or cuda:N')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise DeviceError(
            f'device = "{wanted}" was asked for, but this machine shows {count} CUDA GPU{"" if count == 1 else "s"} to PyTorch:'
            " use --device cpu, or install a CUDA build of torch and a driver"
        )
    return device


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(native and native())


def peak_memory_bytes() -> int:
    """The most memory that this process has held (resident set)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
