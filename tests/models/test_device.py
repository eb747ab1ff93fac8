from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from cotune.models import device
from cotune.models.device import (
    autocasts,
    bfloat16_is_fast,
    explained_out_of_memory,
    kernel_key,
    limit_memory,
    peak_gpu_memory_bytes,
    peak_memory_bytes,
    pick_device,
    single_thread,
)
from tests.support.failures import fails_with

HAS_CUDA = torch.cuda.is_available()


def test_the_cpu_is_always_there() -> None:
    assert pick_device("cpu") == torch.device("cpu")


def test_auto_takes_what_is_there() -> None:
    assert pick_device().type == ("cuda" if HAS_CUDA else "cpu")
    assert pick_device("auto") == pick_device()


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a GPU")
@pytest.mark.parametrize("wanted", ["cuda", "cuda:0"])
def test_a_gpu_that_is_absent_is_not_replaced(wanted: str) -> None:
    with fails_with("device.missing", wanted):
        pick_device(wanted)


@pytest.mark.skipif(not HAS_CUDA, reason="this machine has no GPU")
def test_a_gpu_that_is_there() -> None:
    assert pick_device("cuda").type == "cuda"
    assert pick_device("cuda:0") == torch.device("cuda:0")


def test_one_gpu_too_many() -> None:
    wanted = f"cuda:{torch.cuda.device_count() if HAS_CUDA else 0}"
    with fails_with("device.missing"):
        pick_device(wanted)


@pytest.mark.parametrize("wanted", ["gpu", "", "cuda:x", "CUDA", "cpu;cuda", "cuda:-1"])
def test_unknown_names(wanted: str) -> None:
    with fails_with("device.unknown", wanted):
        pick_device(wanted)


@pytest.mark.parametrize("wanted", ["meta", "mps", "xpu"])
def test_other_hardware_is_not_supported(wanted: str) -> None:
    with fails_with("device.unknown", wanted):
        pick_device(wanted)


def test_bfloat16_is_a_fact_of_the_hardware() -> None:
    described = Path("/proc/cpuinfo")
    flags = described.read_text() if described.exists() else ""
    if "flags" not in flags:
        pytest.skip("not an x86 machine with /proc")
    assert bfloat16_is_fast(torch.device("cpu")) == ("avx512_bf16" in flags)


def test_peak_memory_is_that_of_the_operating_system() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc here")
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert kilobytes
    assert peak_memory_bytes() == pytest.approx(int(kilobytes[1]) * 1024, rel=0.02)


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a GPU")
def test_no_gpu_has_no_peak() -> None:
    assert peak_gpu_memory_bytes() is None


@pytest.mark.parametrize(("name", "index"), [("cuda", 1), ("cuda:0", 0)])
def test_memory_is_limited_on_the_device_that_is_used(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[int, float] = {}

    class Properties:
        total_memory = 8 * 2**30

    def limit(fraction: float, device: int) -> None:
        assert isinstance(device, int), "torch asks for a number"
        limits[device] = fraction

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    limit_memory(torch.device(name), 2.0)
    assert limits == {index: 0.25}
    limit_memory(torch.device(name), 100.0)
    assert limits == {index: 1.0}


def test_a_full_gpu_is_told_in_one_sentence() -> None:
    with fails_with("device.out_of_memory") as caught, explained_out_of_memory("take a smaller batch"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has more lines")
    assert caught.value.code == "device.out_of_memory"
    assert "more lines" not in str(caught.value)
    with pytest.raises(RuntimeError, match="other"), explained_out_of_memory(""):
        raise RuntimeError("other")


def test_an_evaluation_on_a_cpu_is_in_float32() -> None:
    assert not any(autocasts(precision, torch.device("cpu")) for precision in ("auto", "float32", "bfloat16"))


def test_single_thread_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), threadpool_limits(2, "blas"), single_thread():
            assert torch.get_num_threads() == 1
            assert {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"} == {1}
            _ = 1 / 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Set a variable of the environment, as before the process began."""

    def set_to_1(name: str) -> None:
        monkeypatch.setenv(name, "1")
        device._library_settings.cache_clear()

    yield set_to_1
    device._library_settings.cache_clear()


LIBRARIES = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE", "OMP_DYNAMIC", "NVIDIA_TF32_OVERRIDE")
OF_TORCH = ("TORCH_MKLDNN_MATMUL_MIN_DIM", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_LINEAR_FLATTEN_3D", "DISABLE_ADDMM_CUDA_LT")


@pytest.mark.parametrize("name", [*LIBRARIES, *OF_TORCH, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"])
def test_settings_of_libraries_decide_kernels(name: str, setting: Callable[[str], None]) -> None:
    before = kernel_key(torch.device("cpu"))
    setting(name)
    assert kernel_key(torch.device("cpu")) != before


def test_number_of_the_gpu_decides_no_kernel(setting: Callable[[str], None]) -> None:
    """Workers of one run have one GPU each, and read each other's features."""
    before = kernel_key(torch.device("cpu"))
    setting("CUDA_VISIBLE_DEVICES")
    assert kernel_key(torch.device("cpu")) == before
