"""A tiny model of any architecture, ready to be shared, and texts of unequal length for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cotune.models.base_model import load_model
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.trainable import TrainableModel

torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other

LABELS = ("bad", "good", "so")
TEXTS = (
    "great",
    "the table is very sad and this is a fine day of the tree",
    "awful road",
    "it was a lovely happy day to the tree",
    "angry poor and sad",
)


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    return TEXTS


@pytest.fixture(scope="session")
def shared(base_model: Callable[[str], Path]) -> Callable[..., TrainableModel]:
    """(kind, lora=, seed=, pooling=, max_length=) -> a freshly loaded model with three classes on the CPU."""

    def make(
        kind: str, *, lora: LoraConfig | None = None, seed: int = 3, pooling: str = "auto", max_length: int = 32
    ) -> TrainableModel:
        config = ModelConfig.model_validate(
            {"base": str(base_model(kind)), "pooling": pooling, "max_length": max_length, "precision": "float32"}
        )
        return TrainableModel(load_model(config, LABELS, seed), lora, seed, torch.device("cpu"))

    return make
