"""Steps of DP-SGD of large models, beside the same steps without privacy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from gpu_bench import Bench, Row
from made_up import LENGTH, Case, build_model, build_setup
from torch import nn

from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup

CASES = [
    Case("7 B", torch.bfloat16, True, 32),
    Case("7 B", torch.bfloat16, False, 32),
    Case("1.5 B", torch.bfloat16, False, 32),
    Case("1.5 B", torch.bfloat16, True, 64),
    Case("7 B", torch.float32, True, 16),
    Case("1.5 B", torch.float32, False, 32),
    Case("7 B", torch.float32, False, 16),
    Case("1.5 B", torch.float32, True, 64),
    Case("7 B", torch.bfloat16, True, 32, four_bits=True),  # quantized on the device, where a run quantizes on the CPU
    Case("1.5 B", torch.bfloat16, False, 32, four_bits=True),
]


def measure_steps(bench: Bench) -> None:
    for case in CASES:
        chosen = replace(case, physical=4) if bench.tiny else case
        bench.attempt(lambda case=chosen: steps_of(bench, case), **chosen.named)  # type: ignore[misc]


def steps_of(bench: Bench, case: Case) -> Row:
    """Tokens per second and peak memory of a step of about 16,384 tokens, private and not, after one that is not timed."""
    model = build_model(bench, case)
    whole_batches = max(1, 64 // case.physical) if not bench.tiny else 1
    rows = whole_batches * (case.physical - 1)
    setup = build_setup(bench, case, model, rows)
    plain = timed(bench, plain_steps(setup, rows))
    private = timed(bench, private_steps(setup, rows))
    tokens = rows * LENGTH
    return {
        "tokens/s": tokens / private.seconds,
        "tokens/s without privacy": tokens / plain.seconds,
        "private / plain": private.seconds / plain.seconds,
        "peak GiB": private.gib,
        "peak GiB without privacy": plain.gib,
        "parameters": float(model.parameter_count()),
    }


@dataclass(frozen=True)
class Timed:
    seconds: float
    gib: float | None


def timed(bench: Bench, steps: Iterator[object], count: int = 2) -> Timed:
    """The seconds of a step, over `count` of them, and the most memory of all, with the weights."""
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    next(steps)
    wait(bench)
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    wait(bench)
    seconds = (time.perf_counter() - began) / count
    peak = torch.cuda.max_memory_allocated(bench.device) / 2**30 if bench.on_gpu else None
    close = getattr(steps, "close", None)
    if close is not None:
        close()
    return Timed(seconds, peak)


def wait(bench: Bench) -> None:
    if bench.on_gpu:
        torch.cuda.synchronize(bench.device)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def plain_steps(setup: TrainingSetup, rows: int) -> Iterator[None]:
    """The same batches and losses, without gradients of single records, clipping and noise."""
    optimizer = torch.optim.SGD(trained(setup.module), lr=1e-4)
    while True:
        optimizer.zero_grad()
        for _, batch in setup.batches(range(rows)):
            (setup.loss(batch).sum() / rows).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield


def private_steps(setup: TrainingSetup, rows: int, steps: int = 100) -> Iterator[object]:
    optimizer = torch.optim.SGD(trained(setup.module), lr=1e-4)
    config = DPSGDConfig(noise_multiplier=1.0, clip_norm=1.0, sample_rate=1.0, expected_batch=float(rows), steps=steps)
    return DPSGD(config).run(DPSGDSetup(setup.module, optimizer, setup.loss, setup.units, setup.batches))
