"""Opacus' DP-SGD against gradients taken one example at a time, and against what the contract of `DPSGD.run` says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from cotune.data.tasks.classes import example_losses
from cotune.data.tasks.text import collator
from cotune.models.base.load import load_model
from cotune.models.config import LoraConfig, ModelConfig, TrainMode
from cotune.models.features.head import feature_head
from cotune.models.trainable import TrainableModel
from cotune.privacy.mechanisms.clipped_sum import ClippedSum
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup, StepReport, check_clipping
from cotune.privacy.mechanisms.grid_noise import add_gaussian_noise
from cotune.privacy.mechanisms.per_example import Batch, LossPerExample, per_example, unit_gradients
from cotune.privacy.mechanisms.random_generators import PoissonSampler
from tests.support.batches import in_batches, stack
from tests.support.failures import fails_with
from tests.support.matrix import crossed

KINDS = ("bert", "distilbert", "gpt2", "llama", "qwen2")
LABELS = ("bad", "good", "so")
LR = 1024.0  # large: the movement is then not lost in the rounding of the parameters
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


class Toy(nn.Module):
    """Two layers and a norm; a factor 1e6 in the input is a factor 1e6 in the gradient of the first."""

    def __init__(self, inputs: int = 4, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.norm(self.first(x))))


class Outside(nn.Module):
    """Uses a parameter outside its module's forward, so that Opacus sees only a part of its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.norm(self.first(x)))) + 3 * x[:, :3] * self.norm.weight[:3]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().train()


def points(count: int, inputs: int = 4, scale: float = 1.0, seed: int = 0) -> list[Batch]:
    """Records of a toy model, with labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(inputs, generator=generator) * scale, "y": torch.tensor(i % 3)} for i in range(count)]


def cross_entropy(module: nn.Module) -> LossPerExample:
    return lambda batch: functional.cross_entropy(module(batch["x"]), batch["y"], reduction="none")


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def train(
    module: nn.Module,
    loss: LossPerExample,
    records: Sequence[Any],
    *,
    collate: Callable[[list[Any]], Batch] = stack,
    lr: float = LR,
    **settings: Any,
) -> tuple[list[StepReport], list[Tensor]]:
    """Runs steps of plain SGD; returns the reports and −movement / lr, which is the update direction summed over the steps."""
    chosen = {"noise_multiplier": 0.0, "clip_norm": 1.0, "sample_rate": 1.0, "steps": 1, "slots": 64, **settings}
    batches = in_batches(records, chosen.pop("slots"), collate, fill="x" in records[0])
    units = chosen.pop("units", [[row] for row in range(len(records))])
    chosen.setdefault("expected_batch", chosen["sample_rate"] * len(units))
    params = trained(module)
    before = [p.detach().clone() for p in params]
    optimizer = torch.optim.SGD(params, lr=lr)
    generators = {name: chosen.pop(name) for name in ("noise_generator", "sampling_generator") if name in chosen}
    setup = DPSGDSetup(module, optimizer, loss, units, batches, **generators)
    reports = list(DPSGD(DPSGDConfig(**chosen)).run(setup))
    return reports, [(b - p.detach()) / lr for b, p in zip(before, params, strict=True)]


def gradients(module: nn.Module, loss: LossPerExample, example: Batch) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(loss(example).sum(), trained(module))]


def clipped_sum(module: nn.Module, loss: LossPerExample, examples: list[Batch], clip: float) -> list[Tensor]:
    """The oracle: Σ min(1, C/‖g_i‖) g_i in float64, one example at a time."""
    total = [torch.zeros_like(p, dtype=torch.float64) for p in trained(module)]
    for example in examples:
        found = gradients(module, loss, example)
        factor = min(1.0, clip / max(norm(found), 1e-300))
        total = [t + g * factor for t, g in zip(total, found, strict=True)]
    return total


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([t.double().flatten() for t in tensors]).norm())


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return norm([a.double() - e.double() for a, e in zip(actual, expected, strict=True)]) / norm(expected)


def median_norm(module: nn.Module, loss: LossPerExample, examples: list[Batch]) -> float:
    """A clip norm that clips half of the examples."""
    return float(np.median([norm(gradients(module, loss, example)) for example in examples]))


def leftovers(module: nn.Module) -> list[str]:
    """What Opacus could have forgotten on a module."""
    hooks = [
        f"{name}.{kind}"
        for name, part in module.named_modules()
        for kind in ("_forward_hooks", "_backward_hooks", "_forward_pre_hooks", "_backward_pre_hooks")
        if getattr(part, kind)
    ]
    names = ("grad_sample", "summed_grad", "_norm_sample", "_forward_counter", "_current_grad_sample")
    marks = [f"{name}.{mark}" for name, p in module.named_parameters() for mark in names if hasattr(p, mark)]
    grads = [f"{name}.grad" for name, p in module.named_parameters() if p.grad is not None]
    activations = [name for name, part in module.named_modules() if getattr(part, "activations", None)]
    return hooks + marks + grads + activations


class Never:
    """A sampling generator that picks nobody."""

    def random(self, size: int) -> np.ndarray:
        return np.ones(size)


NEVER = cast(np.random.Generator, Never())


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These models are too small to be shared between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- real architectures against one-example-at-a-time gradients


def text_model(folder: Path, kind: str, lora: LoraConfig | None) -> TrainableModel:
    config = ModelConfig(base=str(folder), max_length=16, precision="float32")
    model = TrainableModel(load_model(config, LABELS, 1), lora, 1, torch.device("cpu"))
    with torch.no_grad():  # fresh adapters have B = 0, for which the gradient of A is zero
        for number, (name, parameter) in enumerate(model.parameters()):
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
    return model


def lora_config(kind: str, freeze_a: bool) -> LoraConfig:
    return LoraConfig(rank=2, factors="b" if freeze_a else "ab", targets=("q_lin", "v_lin") if kind == "distilbert" else "auto")


TRAINED: dict[str, tuple[TrainMode, bool, bool]] = {  # A frozen, embeddings frozen
    "head": ("head", True, True),
    "lora-b": ("lora", True, True),
    "lora-ab": ("lora", False, True),
    "full": ("full", True, True),
    "full-embeddings": ("full", True, False),
}
TOKENS = [[4, 14], [16, 8, 12, 19, 20, 10], [17, 13], [7, 7, 15, 24, 16, 6, 13], [9], [22, 18, 5]]  # none is padding


@pytest.mark.parametrize(("what", "kind"), crossed(TRAINED, KINDS))
def test_architectures_clip_each_text_by_itself(base_model: Callable[[str], Path], kind: str, what: str) -> None:
    """Texts of unequal length, padded into physical batches, against each text alone without padding."""
    train_mode, freeze_a, freeze_embeddings = TRAINED[what]
    lora = lora_config(kind, freeze_a) if train_mode == "lora" else None
    model = text_model(base_model(kind), kind, lora)
    model.train_only(model.names(train_mode, freeze_embeddings=freeze_embeddings))
    collate = collator(model.module, model.loaded.reader, model.device)
    records = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(TOKENS)]

    def loss(batch: Batch) -> Tensor:
        return example_losses(model.module, batch)

    alone = [collate([record]) for record in records]
    clip = median_norm(model.module, loss, alone)
    expected = clipped_sum(model.module, loss, alone, clip)
    assert norm(expected) > 0.1 * clip  # something real is compared
    batches = in_batches(records, 4, collate, fill=False)
    assert check_clipping(model.module, loss, batches=batches, alone=alone, clip_norm=clip) < 1e-5
    _, direction = train(model.module, loss, records, collate=collate, clip_norm=clip, slots=4)
    assert relative_error([d * len(records) for d in direction], expected) < 1e-5
    assert leftovers(model.module) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_on_features_clips_each_record_by_itself(base_model: Callable[[str], Path], kind: str) -> None:
    model = text_model(base_model(kind), kind, None)
    model.train_only(model.names("head"))
    head = feature_head(model)
    assert head is not None
    records = points(7, inputs=16, scale=2.0)

    def loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(head(batch["x"]).logits, batch["y"], reduction="none")

    alone = [stack([record]) for record in records]
    clip = median_norm(head, loss, alone)
    expected = clipped_sum(head, loss, alone, clip)
    assert check(head, loss, records, clip) < 1e-5
    _, direction = train(head, loss, records, clip_norm=clip, slots=3)
    assert relative_error([d * len(records) for d in direction], expected) < 1e-5


# --- the contract of DPSGD.run


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e3])
def test_gradient_is_clipped_sum_over_expected_batch(clip: float) -> None:
    """The divisor is q·n, a public number, and not the size of the batch that was drawn."""
    module = seeded(Toy)
    records = points(40)
    loss = cross_entropy(module)
    rate = 0.3
    (drawn,) = PoissonSampler(40, rate, 1, np.random.default_rng(5))
    assert len(drawn) != 12
    expected = clipped_sum(module, loss, [stack([records[i]]) for i in drawn], clip)
    _, direction = train(
        module,
        loss,
        records,
        clip_norm=clip,
        sample_rate=rate,
        sampling_generator=np.random.default_rng(5),
        slots=5,
    )
    assert relative_error([d * (rate * 40) for d in direction], expected) < 1e-5


def test_slotses_do_not_change_the_result() -> None:
    results = []
    for slots in (1, 3, 64):
        module = seeded(Toy)
        reports, direction = train(
            module,
            cross_entropy(module),
            points(30),
            lr=0.1,
            noise_multiplier=0.5,
            sample_rate=0.4,
            steps=6,
            slots=slots,
            noise_generator=np.random.default_rng(1),
            sampling_generator=np.random.default_rng(2),
        )
        assert [r.step for r in reports] == list(range(1, 7))
        results.append((direction, [r.loss for r in reports]))
    for direction, losses in results[:-1]:
        assert relative_error(direction, results[-1][0]) < 1e-5
        assert losses == pytest.approx(results[-1][1], rel=1e-5)


def test_the_reported_loss_is_the_mean_over_the_batch() -> None:
    module = seeded(Toy)
    records = points(7)
    expected = float(cross_entropy(module)(stack(records)).detach().mean())
    (report,), _ = train(module, cross_entropy(module), records, slots=3)
    assert (report.step, report.steps) == (1, 1)
    assert report.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("silence", ["tiny-gradients", "empty-batches"])
def test_noise_has_the_promised_variance(silence: str) -> None:
    """With nothing to learn from, a step moves by N(0, (σC / qn)²), freshly drawn each time."""
    module = seeded(lambda: Toy(50, 200))
    sigma = 1.7
    clip = 0.3
    rate = 0.25
    examples = 20
    scale = 1e-12 if silence == "tiny-gradients" else 1.0
    moved = []
    for step in range(2):
        _, direction = train(
            module,
            lambda batch: cross_entropy(module)(batch) * scale,
            points(examples, 50),
            noise_multiplier=sigma,
            clip_norm=clip,
            sample_rate=rate,
            noise_generator=np.random.default_rng(3 + step),
            sampling_generator=NEVER if silence == "empty-batches" else np.random.default_rng(0),
        )
        moved.append(torch.cat([d.flatten() for d in direction]).double().numpy() / (sigma * clip / (rate * examples)))
    draws = len(moved[0])
    assert draws > 10_000
    for values in moved:
        assert abs(values.std() - 1) < 5 / np.sqrt(2 * draws)
        assert abs(values.mean()) < 5 / np.sqrt(draws)
        assert stats.kstest(values, "norm").pvalue > 1e-4
    assert abs(stats.pearsonr(*moved).statistic) < 5 / np.sqrt(draws)


def test_each_step_has_fresh_noise() -> None:
    """After k steps without records the movement has variance k, not k²."""
    module = seeded(lambda: Toy(50, 200))
    steps = 16
    _, direction = train(
        module,
        cross_entropy(module),
        points(10, 50),
        noise_multiplier=1.0,
        sample_rate=0.1,
        steps=steps,
        sampling_generator=NEVER,
        noise_generator=np.random.default_rng(0),
    )
    values = torch.cat([d.flatten() for d in direction]).double().numpy()
    assert abs(values.std() / np.sqrt(steps) - 1) < 5 / np.sqrt(2 * len(values))


def test_empty_batches_are_steps() -> None:
    module = seeded(Toy)
    reports, direction = train(
        module, cross_entropy(module), points(10), noise_multiplier=1.0, sample_rate=0.05, steps=4, sampling_generator=NEVER
    )
    assert reports == [StepReport(step, 4, None) for step in (1, 2, 3, 4)]
    assert all(bool(d.ne(0).all()) for d in direction)


def test_empty_and_full_batches_take_turns() -> None:
    """No gradient of one step is left for the next: a mixture of empty and other batches, against the oracle step by step."""
    sampling = 11
    rate = 0.15
    steps = 12
    records = points(6)
    batches = list(PoissonSampler(6, rate, steps, np.random.default_rng(sampling)))
    assert {bool(batch) for batch in batches} == {True, False}
    expected = seeded(Toy)
    actual = seeded(Toy)
    for batch in batches:
        total = clipped_sum(expected, cross_entropy(expected), [stack([records[i]]) for i in batch], 0.5)
        with torch.no_grad():
            for p, t in zip(trained(expected), total, strict=True):
                p.sub_((0.1 * t / (rate * 6)).float())
    reports, _ = train(
        actual,
        cross_entropy(actual),
        records,
        lr=0.1,
        clip_norm=0.5,
        sample_rate=rate,
        steps=steps,
        slots=1,
        sampling_generator=np.random.default_rng(sampling),
    )
    assert [r.loss is not None for r in reports] == [bool(batch) for batch in batches]
    initial = trained(seeded(Toy))
    moved = [[p.detach() - i.detach() for p, i in zip(trained(m), initial, strict=True)] for m in (actual, expected)]
    assert relative_error(*moved) < 1e-4


def test_noise_is_not_that_of_any_seed() -> None:
    """Without an injected generator nobody can repeat the run, whatever global seeds are set."""
    movements = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        module = seeded(Toy)
        _, direction = train(module, cross_entropy(module), points(8), noise_multiplier=1.0)
        movements.append(torch.cat([d.flatten() for d in direction]))
    assert torch.isclose(movements[0], movements[1], rtol=1e-3).float().mean() < 0.2


def test_the_batches_are_not_those_of_any_seed() -> None:
    movements = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        module = seeded(Toy)
        _, direction = train(module, cross_entropy(module), points(64), sample_rate=0.5)
        movements.append(torch.cat([d.flatten() for d in direction]))
    assert not torch.allclose(movements[0], movements[1])


def test_injected_generators_repeat_a_run() -> None:
    def run() -> list[Tensor]:
        module = seeded(Toy)
        generators = {"noise_generator": np.random.default_rng(1), "sampling_generator": np.random.default_rng(2)}
        return train(module, cross_entropy(module), points(8), noise_multiplier=1.0, sample_rate=0.5, **generators)[1]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# --- what one record can do


@settings(max_examples=25, deadline=None)
@given(exponent=st.floats(-6.0, 6.0), clip=st.sampled_from([1e-3, 1.0, 50.0]), seed=st.integers(0, 50))
def test_no_record_moves_the_sum_by_more_than_the_clip_norm(exponent: float, clip: float, seed: int) -> None:
    module = seeded(Toy, seed)
    _, direction = train(
        module,
        lambda b: cross_entropy(module)(b) * 10**exponent,
        points(1, scale=10**exponent, seed=seed),
        clip_norm=clip,
    )
    assert norm(direction) <= clip * (1 + 1e-4)


@pytest.mark.parametrize("scale", [1e12, 1e20, 1e30])
def test_gradients_of_overflowing_norm_stay_within_clip_norm(scale: float) -> None:
    module = seeded(lambda: nn.Linear(4, 3))
    _, direction = train(module, lambda b: module(b["x"])[:, 0] * scale, points(1))
    assert norm(direction) <= 1 + 1e-4


def test_adding_a_record_moves_the_sum_by_at_most_the_clip_norm() -> None:
    records = points(9, scale=30.0)
    clip = 0.7
    for left_out in range(9):
        module = seeded(Toy)
        loss = cross_entropy(module)
        _, with_it = train(module, loss, records, clip_norm=clip, slots=4)
        others = records[:left_out] + records[left_out + 1 :]
        module = seeded(Toy)
        _, without = train(module, cross_entropy(module), others, clip_norm=clip, slots=4)
        moved = norm([9 * a.double() - 8 * b.double() for a, b in zip(with_it, without, strict=True)])
        assert 0.5 * clip < moved <= clip * (1 + 1e-3)


class PerPosition(nn.Module):
    """One layer over the positions of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x))[..., 0]


def test_positions_that_almost_cancel_stay_within_the_clip_norm() -> None:
    """Two large, nearly opposite parts of one record's gradient."""
    module = seeded(PerPosition)
    worst = 0.0
    for seed in range(10):
        row = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        record = {"x": torch.stack([row, row * 1.0001]), "w": torch.tensor([1e6, -1e6])}
        _, direction = train(module, lambda b: (module(b["x"]) * b["w"]).sum(dim=1), [record])
        worst = max(worst, norm(direction))
    assert worst <= 1.01


def test_low_precision_stays_within_the_clip_norm() -> None:
    """Under autocast Opacus' gradients per example are bfloat16, with 8 bits; their norms must not be."""
    clip = 0.01
    worst = 0.0
    for record in points(20, 16, scale=3.0):
        module = seeded(lambda: Toy(16, 32))

        def loss(batch: Batch, module: nn.Module = module) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return cross_entropy(module)(batch)

        worst = max(worst, norm(train(module, loss, [record], clip_norm=clip)[1]))
    assert worst <= clip * (1 + 1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("slots", [1, 2, 64])
def test_a_record_without_a_finite_gradient_contributes_nothing(value: float, slots: int) -> None:
    """And does not stop the training: that would tell anyone who waits for the update that there is such a record."""
    module = seeded(Toy)
    records = points(5)
    loss = cross_entropy(module)
    expected = clipped_sum(module, loss, [stack([r]) for r in records], 0.5)
    broken = {"x": torch.tensor([1.0, value, 0.0, 0.0]), "y": torch.tensor(1)}
    _, direction = train(module, loss, [*records, broken], clip_norm=0.5, slots=slots)
    assert leftovers(module) == []
    assert relative_error([d * 6 for d in direction], expected) < 1e-5


def test_a_diverged_model_is_not_returned() -> None:
    module = seeded(Toy)
    with fails_with("privacy.not_finite"):
        train(module, cross_entropy(module), points(4), lr=1e38, noise_multiplier=100.0, clip_norm=100.0)


# --- what is left on a module


def test_a_module_can_be_trained_again() -> None:
    module = seeded(Toy)
    records = points(6)
    for _ in range(3):
        before = clipped_sum(module, cross_entropy(module), [stack([r]) for r in records], 0.5)
        _, direction = train(module, cross_entropy(module), records, clip_norm=0.5, slots=2)
        assert relative_error([d * 6 for d in direction], before) < 1e-3
        assert leftovers(module) == []


def test_leaving_early_leaves_nothing_behind() -> None:
    module = seeded(Toy)
    records = points(20)

    def steps() -> Iterator[StepReport]:
        config = DPSGDConfig(noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.5, expected_batch=10.0, steps=10)
        optimizer = torch.optim.SGD(trained(module), lr=0.01)
        units = [[row] for row in range(20)]
        return DPSGD(config).run(DPSGDSetup(module, optimizer, cross_entropy(module), units, in_batches(records, 3)))

    run = cast(Any, steps())
    assert next(run).step == 1
    assert next(run).step == 2
    run.close()
    assert leftovers(module) == []
    assert [report.step for report in steps()] == list(range(1, 11))
    assert leftovers(module) == []


def test_an_error_in_the_middle_of_a_batch_leaves_nothing_behind() -> None:
    module = seeded(Toy)
    records = points(9)
    calls = []

    def failing(items: list[Any]) -> Batch:
        calls.append(items)
        if len(calls) == 2:
            raise OSError("disk")
        return stack(items)

    with pytest.raises(OSError, match="disk"):
        train(module, cross_entropy(module), records, collate=failing, slots=3)
    assert leftovers(module) == []
    expected = clipped_sum(module, cross_entropy(module), [stack([r]) for r in records], 0.5)
    _, direction = train(module, cross_entropy(module), records, clip_norm=0.5)
    assert relative_error([d * 9 for d in direction], expected) < 1e-5


def test_frozen_parameters_stay() -> None:
    module = cast(Toy, seeded(Toy))
    module.first.requires_grad_(False)
    before = module.first.weight.clone()
    _, direction = train(module, cross_entropy(module), points(5), noise_multiplier=1.0)
    assert len(direction) == 4
    assert all(bool(d.any()) for d in direction)
    assert torch.equal(module.first.weight, before)


# --- check_clipping


def check(module: nn.Module, loss: LossPerExample, records: Sequence[Any], clip: float, **settings: Any) -> float:
    alone = [stack([record]) for record in records]
    return check_clipping(module, loss, batches=in_batches(records, 4), alone=alone, clip_norm=clip, **settings)


@pytest.mark.parametrize("clip", [1e-2, 1.0, 100.0])
def test_a_sound_module_passes_and_is_left_as_it_was(clip: float) -> None:
    module = seeded(Toy)
    before = [p.detach().clone() for p in module.parameters()]
    assert check(module, cross_entropy(module), points(5), clip) < 1e-5
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert leftovers(module) == []


@pytest.mark.parametrize("clip", [1e-2, 1.0, 100.0])
def test_a_parameter_outside_its_modules_forward_is_found(clip: float) -> None:
    """Also where the clip norm is above the gradients of the examples that are looked at: those of training may be larger."""
    module = seeded(Outside)
    assert check(module, cross_entropy(module), points(5), clip) > 0.01


def centered(module: nn.Module) -> LossPerExample:
    """Every example is read relative to the mean of its batch, as in batch normalization."""
    return lambda b: functional.cross_entropy(module(b["x"] - 0.5 * b["x"].mean(dim=0)), b["y"], reduction="none")


def averaged_by_weight(module: nn.Module) -> LossPerExample:
    """Every example counts by its share of the batch, as where a loss is averaged over the tokens of a batch."""
    return lambda b: cross_entropy(module)(b) * b["y"].add(1.0) * len(b["y"]) / b["y"].add(1.0).sum()


@pytest.mark.parametrize("clip", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("mixing", [centered, averaged_by_weight])
def test_a_loss_that_mixes_examples_is_found(clip: float, mixing: Callable[[nn.Module], LossPerExample]) -> None:
    module = seeded(Toy)
    assert check(module, mixing(module), points(5), clip) > 0.01


# --- units of several rows


def test_the_sum_of_the_gradients_of_a_unit_is_clipped() -> None:
    """Against gradients taken unit by unit with autograd; the rows of a unit lie in several batches."""
    module = seeded(Toy)
    records = points(12, scale=3.0)
    units = [[0, 5, 7], [1], [2, 3, 4, 6, 8], [9, 10, 11]]
    loss = cross_entropy(module)
    together = [{key: torch.stack([records[row][key] for row in unit]) for key in ("x", "y")} for unit in units]
    clip = median_norm(module, loss, together)
    expected = clipped_sum(module, loss, together, clip)
    for slots in (2, 5, 64):
        module.load_state_dict(seeded(Toy).state_dict())
        _, direction = train(module, loss, records, units=units, clip_norm=clip, slots=slots)
        assert relative_error([d * len(units) for d in direction], expected) < 1e-5


@pytest.mark.parametrize("copies", [1, 2, 5, 20])
def test_person_of_many_records_contributes_the_clip_norm(copies: int) -> None:
    module, (record,) = seeded(Toy), points(1, scale=20.0)
    _, direction = train(module, cross_entropy(module), [record] * copies, units=[list(range(copies))], clip_norm=0.1)
    assert norm(direction) == pytest.approx(0.1, rel=1e-4)


# --- clipping per layer


def test_per_layer_every_tensor_is_clipped_to_its_share() -> None:
    """Four records, one of them enormous; by hand, one example at a time."""
    module = seeded(Toy)
    records = [*points(3), *points(1, scale=1e6, seed=1)]
    params = trained(module)
    share = 0.3 / len(params) ** 0.5
    expected = [torch.zeros_like(p) for p in params]
    for record in records:
        grads = torch.autograd.grad(cross_entropy(module)(stack([record])).sum(), params)
        for total, grad in zip(expected, grads, strict=True):
            total += grad * min(1.0, share / (float(grad.norm()) + 1e-6))
    _, moved = train(module, cross_entropy(module), records, clip_norm=0.3, clipping_mode="per_layer")
    for found, total in zip(moved, expected, strict=True):
        assert torch.allclose(found, total / 4, rtol=1e-3, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(0.0, 1e8), clip=st.floats(1e-3, 10.0), seed=st.integers(0, 99))
def test_per_layer_one_record_contributes_at_most_the_clip_norm(scale: float, clip: float, seed: int) -> None:
    module = seeded(Toy, seed)
    record = points(1, scale=scale, seed=seed)
    _, moved = train(module, cross_entropy(module), record, clip_norm=clip, clipping_mode="per_layer")
    norms = [float(m.double().norm()) for m in moved]
    assert max(norms) <= clip / len(norms) ** 0.5 * (1 + 1e-3) + 1e-6
    assert sum(n**2 for n in norms) ** 0.5 <= clip * (1 + 1e-3) + 1e-6


def test_per_layer_the_noise_is_that_of_the_whole_clip_norm() -> None:
    """The sensitivity of all tensors together is C: every coordinate gets σC."""
    module = seeded(lambda: Toy(width=400))
    generator = np.random.default_rng(0)
    _, moved = train(
        module, cross_entropy(module), points(1, scale=0.0),
        clip_norm=1e-6, noise_multiplier=3e6, clipping_mode="per_layer", noise_generator=generator,
    )  # fmt: skip
    values = torch.cat([m.flatten() for m in moved])
    assert float(values.std()) == pytest.approx(3.0, rel=4 / (2 * len(values)) ** 0.5)


def test_per_layer_is_checked_against_single_examples_too() -> None:
    module = seeded(Toy)
    assert check(module, cross_entropy(module), points(3), 0.5, clipping_mode="per_layer") < 1e-5
    wrong = seeded(Outside)
    assert check(wrong, cross_entropy(wrong), points(3), 0.5, clipping_mode="per_layer") > 1e-2


# --- guarantee and performance


VALID = {"noise_multiplier": 1.0, "clip_norm": 1.0, "sample_rate": 0.5, "expected_batch": 4.0, "steps": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", -0.1),
        ("noise_multiplier", float("nan")),
        ("clip_norm", 0.0),
        ("clip_norm", float("inf")),
        ("sample_rate", 0.0),
        ("sample_rate", 1.01),
        ("expected_batch", 0.0),
        ("steps", -1),
        ("clipping_mode", "adaptive"),
    ],
)
def test_config_refuses_what_guarantees_nothing(name: str, value: Any) -> None:
    DPSGDConfig(**VALID)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name}.*got"):
        DPSGDConfig(**{**VALID, name: value})


def test_config_holds_all_that_a_contribution_depends_on() -> None:
    """Each of the two types names its knobs once: none of the guarantee is in the setup, where a caller could change it."""
    guarantee = {"noise_multiplier", "clip_norm", "sample_rate", "expected_batch", "steps", "clipping_mode"}
    assert {field.name for field in fields(DPSGDConfig)} == guarantee
    assert not guarantee & {field.name for field in fields(DPSGDSetup)}


@pytest.mark.parametrize("entries", [1, 130, 2**26])
def test_memory_limit_changes_no_bit(entries: int) -> None:
    """Units of several rows, held one, a few, or all at a time."""
    units = [[0, 5], [1, 2, 3], [4]]
    moved = []
    for held in (entries, 2**26):
        module = seeded(Toy)
        loss = cross_entropy(module)
        optimizer = torch.optim.SGD(trained(module), lr=0.1)
        noise = np.random.default_rng(1)
        batches = in_batches(points(6), 2)
        setup = DPSGDSetup(module, optimizer, loss, units, batches, max_held_entries=held, noise_generator=noise)
        list(DPSGD(DPSGDConfig(**{**VALID, "sample_rate": 1.0})).run(setup))  # type: ignore[arg-type]
        moved.append([p.detach().clone() for p in trained(module)])
    assert all(torch.equal(one, other) for one, other in zip(*moved, strict=True))


def test_run_draws_samples_and_noise_in_a_fixed_order() -> None:
    """Bit for bit the algorithm written out: a uniform number per unit and step, then noise parameter by parameter."""
    config = DPSGDConfig(noise_multiplier=0.8, clip_norm=0.7, sample_rate=0.5, expected_batch=3.0, steps=3)
    module = cast(nn.Linear, seeded(lambda: nn.Linear(4, 3)))
    loss = cross_entropy(module)
    records = points(6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    generators = {"noise_generator": np.random.default_rng(1), "sampling_generator": np.random.default_rng(2)}
    units = [[row] for row in range(6)]
    list(DPSGD(config).run(DPSGDSetup(module, optimizer, loss, units, in_batches(records, 4), **generators)))

    expected = cast(nn.Linear, seeded(lambda: nn.Linear(4, 3)))
    sgd = torch.optim.SGD(expected.parameters(), lr=0.1)
    noise = np.random.default_rng(1)
    samples = np.random.default_rng(2)
    for _ in range(config.steps):
        present = samples.random(6) < config.sample_rate
        total = ClippedSum(list(expected.parameters()), 0.7, 0.8, "flat")
        with per_example(expected, cross_entropy(expected)) as of:
            for gradients, _ in unit_gradients(of, [[i] for i in range(6) if present[i]], in_batches(records, 4)):
                total.add(gradients)
        for p, exact in zip(expected.parameters(), total.totals(), strict=True):
            p.grad = add_gaussian_noise(exact, 0.7, 0.8, noise).div(3.0).to(p.dtype)
        sgd.step()
    assert torch.equal(module.weight, expected.weight)
    assert torch.equal(module.bias, expected.bias)
