"""DP-SGD (Abadi et al., CCS 2016, algorithm 1) by Opacus: clip each record's gradient, add noise, step.

Contract of `private_steps`: every step's update direction is (Σ_i min(1, C/‖g_i‖) g_i + σC·N(0, I)) / B, where i runs over a
Poisson sample with rate q of the n records, g_i is the gradient of record i's own loss over all trainable parameters, C the
clip norm, σ the noise multiplier and B the expected batch size q·n. An empty sample takes a step too (noise only). The noise
comes from `private_generator`; a test may inject another generator, which no plan can reach. In ghost mode the loss must be
computed in float32: norms found from bfloat16 products are not those of what is summed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import register_norm_sampler
from opacus.grad_sample.linear import compute_linear_norm_sample
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cotune.models.errors import PrivacyError
from cotune.privacy.randomness import PoissonSampler, private_generator, standard_normal

__all__ = ["Batch", "Clipping", "ClippingMode", "LossPerExample", "StepReport", "check_clipping", "private_steps"]

Clipping = Literal["flat", "per_layer"]  # one norm for the whole gradient | C/√L for each of the L parameter tensors
ClippingMode = Literal["hooks", "ghost"]  # per-example gradients (heads, LoRA) | norms only (full fine-tuning)
Batch = dict[str, Tensor]
LossPerExample = Callable[[Batch], Tensor]  # (a batch of b examples) -> (b,) losses, each of one example alone


@dataclass(frozen=True)
class StepReport:
    """What one step looked like, for the organisation's own eyes: the loss is a private quantity."""

    step: int
    steps: int
    loss: float | None  # mean over the batch; None for an empty batch


class _Loss(nn.Module):
    """The criterion that Opacus' ghost clipping wants: an object with a `reduction` that returns one loss per example."""

    reduction = "mean"

    def __init__(self, loss: LossPerExample) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(batch)


def private_steps(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: LossPerExample,
    records: Dataset[Batch],
    *,
    collate: Callable[[list[Any]], Batch],
    noise_multiplier: float,
    clip_norm: float,
    sample_rate: float,
    steps: int,
    physical_batch: int,
    mode: ClippingMode,
    clipping: Clipping = "flat",
    generator: np.random.Generator | None = None,
    sampling: np.random.Generator | None = None,
) -> Iterator[StepReport]:
    """Runs the steps one after the other, and reports each after it was taken.

    module: in train mode; its parameters with requires_grad are those of the optimizer. collate: a list of records -> a batch.
    physical_batch: the most records whose gradients are held at a time (memory only, no influence on the result).
    Raises PrivacyError when the parameters are not finite after a step: better no update than a wrong one.
    """
    examples = len(cast(Any, records))
    sampler = PoissonSampler(examples, sample_rate, steps, sampling or private_generator())
    loader = DataLoader(records, batch_sampler=sampler, collate_fn=lambda items: items)
    with _made_private(module, optimizer, loss, loader, noise_multiplier, clip_norm, mode, clipping) as (dp_optimizer, criterion):
        dp_optimizer.expected_batch_size = sample_rate * examples
        _draw_noise_from(dp_optimizer, generator or private_generator())
        taken, losses = 0, [0.0, 0.0]
        memory = BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical_batch, optimizer=dp_optimizer)
        with memory as batches:
            for items in batches:
                dp_optimizer.zero_grad()
                if items:
                    losses[0] += len(items) * _backward(module, dp_optimizer, criterion, collate(items), mode)
                    losses[1] += len(items)
                else:
                    _no_gradients(dp_optimizer, mode)
                dp_optimizer.step()
                if dp_optimizer._is_last_step_skipped:
                    continue
                _assert_finite(dp_optimizer)
                taken += 1
                yield StepReport(taken, steps, losses[0] / losses[1] if losses[1] else None)
                losses = [0.0, 0.0]


@register_norm_sampler(nn.Linear)  # type: ignore[untyped-decorator]
def _linear_norms(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Opacus' ghost norms of a linear layer, in float64.

    ‖g‖² is a sum of terms of both signs there; in float32 a record with two nearly opposite positions contributed 367 times the
    clip norm.
    """
    norms = compute_linear_norm_sample(layer, [activations[0].double()], backprops.double())
    return {parameter: norm.to(parameter.dtype) for parameter, norm in norms.items()}


@contextmanager
def _made_private(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: LossPerExample,
    loader: DataLoader[Batch],
    noise_multiplier: float,
    clip_norm: float,
    mode: ClippingMode,
    clipping: Clipping,
) -> Iterator[tuple[DPOptimizer, Any]]:
    """Opacus' hooks on the module for the time of the block. Its accountant is not used: see `accounting`."""
    if clipping == "per_layer" and mode == "ghost":
        raise PrivacyError(
            "privacy.clipping = per_layer cannot be had with ghost clipping: expected head or lora training, or flat clipping"
        )
    tensors = sum(len(group["params"]) for group in optimizer.param_groups)
    hooks, dp_optimizer, *rest = _engine().make_private(
        module=module,
        optimizer=optimizer,
        criterion=_Loss(loss),
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=clip_norm if clipping == "flat" else [clip_norm / math.sqrt(tensors)] * tensors,
        clipping=clipping,
        poisson_sampling=False,  # the loader samples already, at exactly the rate that is accounted
        grad_sample_mode=mode,
        wrap_model=False,
    )
    try:
        yield dp_optimizer, rest[0] if mode == "ghost" else _Loss(loss)
    finally:
        hooks.cleanup()
        for p in module.parameters():
            p.grad = None
            for name in ("grad_sample", "summed_grad", "_norm_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(p, name):
                    delattr(p, name)


def _engine() -> PrivacyEngine:
    with warnings.catch_warnings():  # it recommends secure_mode, which wants a package that is gone; our noise is ChaCha20
        warnings.filterwarnings("ignore", message="Secure RNG turned off")
        return PrivacyEngine()


def _backward(module: nn.Module, optimizer: DPOptimizer, criterion: Any, batch: Batch, mode: ClippingMode) -> float:
    """Leaves each example's gradient (hooks) or the clipped sum (ghost) on the parameters; returns the mean loss."""
    with warnings.catch_warnings():  # no input of the first hooked layer needs a gradient; the hooks do not mind
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        if mode == "ghost":
            return _ghost_backward(optimizer, criterion, batch)
        losses: Tensor = criterion(batch)
        losses.mean().backward()  # type: ignore[no-untyped-call]
    for p in optimizer.params:
        p.grad_sample = p.grad_sample.to(p.dtype)  # under autocast they are bfloat16, too coarse to find a norm from
    _zero_non_finite_examples(optimizer)
    return float(losses.detach().mean())


def _ghost_backward(optimizer: DPOptimizer, criterion: Any, batch: Batch) -> float:
    """Ghost clipping of a batch. Where the sum is not finite, it is made again of the examples that are finite by themselves.

    An example without a finite gradient must contribute nothing: a failure would tell that somebody holds it.
    """

    def clipped(part: Batch) -> tuple[float, bool]:
        for p in optimizer.params:
            p.grad = None
        loss = criterion(part)
        loss.backward()
        return float(loss.item()), all(bool(p.grad.isfinite().all()) for p in optimizer.params if p.grad is not None)

    loss, finite = clipped(batch)
    if finite:
        return loss
    rows = [i for i in range(len(next(iter(batch.values())))) if clipped({k: v[i : i + 1] for k, v in batch.items()})[1]]
    if not rows:
        _no_gradients(optimizer, "ghost")
        return math.nan
    return clipped({key: value[rows] for key, value in batch.items()})[0]


def _zero_non_finite_examples(optimizer: DPOptimizer) -> None:
    """An example whose gradient is not finite contributes nothing: within the clip norm, like any other."""
    grads = optimizer.grad_samples
    finite = torch.stack([g.reshape(len(g), -1).isfinite().all(dim=1) for g in grads]).all(dim=0)
    if not bool(finite.all()):
        for g in grads:
            g[~finite] = 0.0


def _no_gradients(optimizer: DPOptimizer, mode: ClippingMode) -> None:
    """An empty Poisson batch: no example contributes; the step is taken on noise alone, and it counts."""
    for p in optimizer.params:
        if mode == "ghost":
            p.grad = torch.zeros_like(p)
        else:
            p.grad_sample = p.new_zeros((0, *p.shape))


def _draw_noise_from(optimizer: DPOptimizer, generator: np.random.Generator) -> None:
    """Replaces Opacus' noise, which is drawn from torch's generator (32 bits of seed), by `generator`."""

    def add_noise() -> None:
        for p in optimizer.params:
            noise = standard_normal(generator, p.summed_grad) * (optimizer.noise_multiplier * optimizer.max_grad_norm)
            p.grad = (p.summed_grad + noise).view_as(p)

    optimizer.add_noise = add_noise


def _assert_finite(optimizer: DPOptimizer) -> None:
    if not all(bool(p.isfinite().all()) for p in optimizer.params):
        raise PrivacyError(
            "the model is not finite any more after a step of DP-SGD: expected finite parameters; lower local.learning_rate, or"
            " look for records with extreme values"
        )


def check_clipping(
    module: nn.Module,
    loss: LossPerExample,
    examples: list[Batch],
    clip_norm: float,
    mode: ClippingMode,
    *,
    clipping: Clipping = "flat",
) -> float:
    """Relative error of Opacus' clipped gradient sum against gradients taken one example at a time.

    examples: batches of one. A model family for which Opacus is silently wrong (a parameter used outside its module's forward, a
    loss that mixes examples) shows here: callers refuse to train above a small threshold. Changes nothing in the module.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss(example).sum(), params) for example in examples]
    norms = [math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads)) for grads in gradients]
    if not min(norms) > 0:
        return math.inf  # nothing to compare: the check would pass whatever Opacus did
    clips = (clip_norm, min(norms) / 2, max(norms) * 2)  # all clipped, none clipped: each hides other mistakes
    return max(
        _relative_error(
            _clipped_sum(module, params, loss, examples, clip, mode, clipping), _expected_sum(gradients, clip, clipping)
        )
        for clip in clips
    )


def _expected_sum(gradients: list[tuple[Tensor, ...]], clip: float, clipping: Clipping) -> list[Tensor]:
    """The sum of each example's gradient, clipped by itself: as a whole, or every parameter's part to its share of the norm."""
    total = [torch.zeros_like(g, dtype=torch.float64) for g in gradients[0]]
    for grads in gradients:
        parts = [g.double() for g in grads]
        norms = [float(g.norm()) for g in parts]
        whole = math.sqrt(sum(norm**2 for norm in norms))
        for i, part in enumerate(parts):
            norm, share = (whole, clip) if clipping == "flat" else (norms[i], clip / math.sqrt(len(parts)))
            total[i] += part * min(1.0, share / (norm + 1e-6))
    return total


def _relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    error = sum(float((a.double() - e).pow(2).sum()) for a, e in zip(actual, expected, strict=True))
    size = sum(float(e.pow(2).sum()) for e in expected)
    return math.sqrt(error / size) if size else math.inf


def _clipped_sum(
    module: nn.Module,
    params: list[nn.Parameter],
    loss: LossPerExample,
    examples: list[Batch],
    clip: float,
    mode: ClippingMode,
    clipping: Clipping,
) -> list[Tensor]:
    """Opacus' clipped sum over the examples as one batch, without noise; the parameters are left as they were."""
    batch = {key: torch.cat([e[key] for e in examples]) for key in examples[0]}
    optimizer = torch.optim.SGD(params, lr=0.0)
    loader: DataLoader[Batch] = DataLoader(cast(Dataset[Batch], [0] * len(examples)), batch_size=len(examples))
    with _made_private(module, optimizer, loss, loader, 0.0, clip, mode, clipping) as (dp_optimizer, criterion):
        dp_optimizer.expected_batch_size = 1
        dp_optimizer.zero_grad()
        _backward(module, dp_optimizer, criterion, batch, mode)
        dp_optimizer.step()
        return [cast(Tensor, p.grad).detach().clone() for p in params]
