"""Configuration of fusion and distillation, as plain values. No module that this one imports loads PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cotune.models.config import TrainMode

Loss = Literal["kl", "mse"]  # between teacher and student


@dataclass(frozen=True)
class DistillationConfig:
    """How a student is trained.

    Attributes:
        train: Which parameters: the head, adapters with the head, or all.
        loss: Between teacher and student.
        temperature: T of `kl`, above 0.
        label_weight: α, from 0 to 1; above 0 the inputs need labels.
        epochs: Passes over the inputs; the state of the optimizer (AdamW) is reset at each, so that a pass can be repeated.
        batch_size: Inputs of a step.
        learning_rate: At first; it falls linearly to 0 over all steps.
        seed: Of a new head, adapters, and the order of the inputs.
        weight_decay: Of AdamW.
    """

    train: TrainMode = "full"
    loss: Loss = "kl"
    temperature: float = 2.0
    label_weight: float = 0.0
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-5
    seed: int = 0
    weight_decay: float = 0.01
