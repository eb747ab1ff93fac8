"""Exported models of random heads, for tests of what is done with finished models."""

from __future__ import annotations

from pathlib import Path

import torch

from cotune.data.config import TaskName
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from cotune.models.export import export_model
from cotune.models.trainable import TrainableModel


def export_random(
    base: Path, folder: Path, labels: tuple[str, ...], *, seed: int, task: TaskName = "sequence-classification"
) -> Path:
    """Export a base model with a head drawn from a seed, and return its folder."""
    loaded = load_model(ModelConfig(base=str(base), max_length=16), labels, 1, task)
    model = TrainableModel(loaded, None, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(t.shape, generator=generator) for name, t in model.state(model.names("head")).items()}
    model.load(drawn)
    export_model(model, folder)
    return folder


def export_random_layers(
    base: Path, folder: Path, labels: tuple[str, ...], *, seed: int, layers: tuple[int, ...] = (1, 2), whiten: str = "public"
) -> Path:
    """Export a base model with a head on layers of it, drawn from a seed, and return its folder."""
    feature = {"layers": layers, "whiten": whiten}
    config = ModelConfig.model_validate({"base": str(base), "max_length": 20, "feature": feature})
    model = TrainableModel(load_model(config, labels, 1), None, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    model.load({name: torch.randn(t.shape, generator=generator) for name, t in model.state(model.names("head")).items()})
    export_model(model, folder)
    return folder
