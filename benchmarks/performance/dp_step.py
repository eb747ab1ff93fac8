"""What does differential privacy cost in one optimizer step, in time and in memory?

The same rows, the same model (all-MiniLM-L6-v2, 22.7 M parameters) and the same trained parameters in all three: cotune's
DP-SGD step; the step without privacy, by a plain PyTorch loop over the same physical batches; and Opacus' own building blocks
(GradSampleModule and DPOptimizer) on the same module. Every row is in the step (sample rate 1), so that all do the same work.

Head: 1,024 rows of cached features; LoRA: rank 8 on the values of the last two layers, 128 rows in one physical batch; full:
all layers but the embeddings, 32 rows. Rows of tokens have 32, as tweets have at most, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import inputs
from harness import Benchmark, Contender, Figure, Meter, Results, Row

LENGTH, CLIP, SIGMA, RATE = 32, 1.0, 1.0, 0.01


@dataclass(frozen=True)
class Mode:
    """records: of one step. physical: of a batch. steps: that are measured, after one that is not."""

    name: str
    records: int
    physical: int
    steps: int


MODES = {"head": Mode("head", 1024, 512, 20), "lora": Mode("lora", 128, 128, 1), "full": Mode("full", 32, 32, 1)}
SMOKE = {"head": Mode("head", 32, 16, 1), "lora": Mode("lora", 4, 4, 1), "full": Mode("full", 4, 4, 1)}


@dataclass(frozen=True)
class Work:
    """What all contenders train: a setting of cotune, so that module, rows and trained parameters are the same."""

    setting: Any
    mode: Mode

    @property
    def parameters(self) -> list[Any]:
        return [p for p in self.setting.module.parameters() if p.requires_grad]

    def batches(self) -> Iterator[dict[str, Any]]:
        """The physical batches of a step; every slot is filled."""
        for _, batch in self.setting.batches(range(self.mode.records)):
            yield batch


def work_of(mode: str, smoke: bool) -> Work:
    """The setting on made-up rows of full length."""
    from cotune import load_plan
    from cotune.client.training.stage_setup.from_records import synthetic_setup
    from cotune.plan.trained_parameters import get_plan_model

    chosen = (SMOKE if smoke else MODES)[mode]
    overrides = [
        f"train={mode}", "rounds=1", f"model.max_length={LENGTH}", "model.precision=float32", "lora.layers=2",
        'lora.targets=["value"]', f"local.physical_batch_size={chosen.physical}", f"local.learning_rate={RATE}",
        'labels=["0", "1", "2"]',
    ]  # fmt: skip
    plan = load_plan(inputs.NARROW, overrides)
    model = get_plan_model(plan, "cpu")
    model.load({})
    stage = plan.stages[0]
    model.train_only(model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings))
    setting = synthetic_setup(plan, stage, model, chosen.records)
    setting.module.train()
    return Work(setting, chosen)


def scores(module: Any, batch: dict[str, Any]) -> Any:
    """The module's own forward: of a head on features, or of the whole model on tokens."""
    if "features" in batch:
        return module(batch["features"]).logits
    return module(**{key: value for key, value in batch.items() if key != "labels"}).logits


def plain(meter: Meter, folder: Path, smoke: bool, mode: str) -> None:
    import torch
    from torch.nn import functional

    work = work_of(mode, smoke)
    optimizer = torch.optim.SGD(work.parameters, lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        for batch in work.batches():
            loss = functional.cross_entropy(scores(work.setting.module, batch), batch["labels"], reduction="sum")
            (loss / work.mode.records).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    _measure(meter, work, mode, step)


def opacus(meter: Meter, folder: Path, smoke: bool, mode: str) -> None:
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from torch.nn import functional

    work = work_of(mode, smoke)
    wrapped = GradSampleModule(work.setting.module, strict=False, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(work.parameters, lr=RATE),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=work.mode.records,
        loss_reduction="mean",
    )

    def step() -> None:
        batches = list(work.batches())
        for number, batch in enumerate(batches):
            optimizer.zero_grad()
            optimizer.signal_skip_step(do_skip=number + 1 < len(batches))  # accumulate, as its BatchMemoryManager does
            functional.cross_entropy(scores(wrapped, batch), batch["labels"], reduction="sum").backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    _measure(meter, work, mode, step)
    wrapped.remove_hooks()


def cotune(meter: Meter, folder: Path, smoke: bool, mode: str) -> None:
    import torch

    from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup

    work = work_of(mode, smoke)
    optimizer = torch.optim.SGD(work.parameters, lr=RATE)
    config = DPSGDConfig(
        noise_multiplier=SIGMA,
        clip_norm=CLIP,
        sample_rate=1.0,
        expected_batch=float(work.mode.records),
        steps=work.mode.steps + 1,
    )
    setting = work.setting
    steps = DPSGD(config).run(DPSGDSetup(setting.module, optimizer, setting.loss, setting.units, setting.batches))
    _measure(meter, work, mode, lambda: next(steps))
    steps.close()  # type: ignore[attr-defined]


def _measure(meter: Meter, work: Work, mode: str, step: Any) -> None:
    began = len(meter.samples)
    with meter.measure(label=mode):  # the first step: memory, as nothing has been kept from one before; its time does not count
        step()
    first = meter.samples.pop(began)
    with meter.measure(units=work.mode.steps, label=mode):
        for _ in range(work.mode.steps):
            step()
    timed = meter.samples.pop()
    meter.add(cpu=timed.cpu, wall=timed.wall, units=timed.units, label=mode, memory=max(first.peak, timed.peak))


GOALS = {"head": 1.5, "lora": 1.1, "full": 1.3}


def _at_most(most: float, _: float, ratio: float) -> bool:
    return ratio <= most


def rows(results: Results) -> list[Row]:
    step = Figure()
    memory = Figure("memory", "MB", 1e-6)
    found = []
    for mode, most in GOALS.items():
        without, opacus_, own = f"without privacy, {mode}", f"Opacus, {mode}", f"cotune, {mode}"
        time, peak = f"{mode}: time of a step", f"{mode}: peak memory of a step"
        found += [
            results.row(time, without, step),
            results.row(time, opacus_, step, against=without),
            results.row(time, own, step, against=without, goal=f"≤ {most} ×", reached=partial(_at_most, most)),
            results.row(time, own, step, against=opacus_, goal="faster", reached=lambda _, ratio: ratio < 1),
            results.row(peak, without, memory),
            results.row(peak, opacus_, memory, against=without),
            results.row(peak, own, memory, against=without, goal="≤ 1.3 ×", reached=lambda _, ratio: ratio <= 1.3),
        ]
    return found


BENCHMARK = Benchmark(
    name="dp_step",
    number=3,
    title="A step of DP-SGD",
    contenders=tuple(
        Contender(f"{name}, {mode}", partial(body, mode=mode), repeats=3 if mode == "head" else 2)
        for mode in MODES
        for name, body in (("without privacy", plain), ("Opacus", opacus), ("cotune", cotune))
    ),
    rows=rows,
)
