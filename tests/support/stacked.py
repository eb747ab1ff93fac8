"""Fused models of unlike architectures and tokenizers as base models of plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from sklearn.linear_model import LogisticRegression

from cotune.ensembles.folder import write_fused
from cotune.ensembles.fusion import PredictionFusion
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from cotune.models.export import export_model
from cotune.models.features.cached import get_features
from cotune.models.trainable import TrainableModel
from tests.support.datasets import sentences
from tests.support.exported_models import export_random

LABELS = ("bad", "good", "so")
ORDERS = {"bert": LABELS, "gpt2": ("so", "bad", "good"), "roberta": ("good", "so", "bad"), "qwen2": ("so", "good", "bad")}
TEMPERATURES = {"bert": 1.0, "gpt2": 2.5, "roberta": 0.5, "qwen2": 1.5}


def export_fitted(
    base: Path, folder: Path, labels: tuple[str, ...], *, seed: int, pooling: Literal["auto", "mean"] = "auto", scale: float = 1.0
) -> Path:
    """Export a base model with a head that was fitted to sixty sentences, and return its folder. scale: Of its scores."""
    rows = sentences(60, seed=seed)
    loaded = load_model(ModelConfig(base=str(base), max_length=16, precision="float32", pooling=pooling), labels, 1)
    model = TrainableModel(loaded, None, 1, torch.device("cpu"))
    features = get_features(model, tuple(text for text, _ in rows), {}, "float32").numpy()
    fitted = LogisticRegression(max_iter=500).fit(features, [labels.index(label) for _, label in rows])
    head = model.state(model.names("head"))
    model.load(
        {
            name: torch.tensor(scale * (fitted.coef_ if t.dim() == 2 else fitted.intercept_)).float().reshape(t.shape)
            for name, t in head.items()
        }
    )
    export_model(model, folder)
    return folder


def write_together(folder: Path, members: Sequence[Path], labels: tuple[str, ...] = LABELS) -> Path:
    """Fuse models with probabilities as they are, and return the folder of the fused model."""
    count = len(members)
    fusion = PredictionFusion("average", (1.0,) * count, (1 / count,) * count)
    write_fused(folder, fusion, members, "sequence-classification", labels)
    return folder


def bundle(base_model: Callable[[str], Path], folder: Path, kinds: Sequence[str] = ("bert", "gpt2")) -> Path:
    """Models with random heads, whose classes are in orders of their own, in the folder of a fused model."""
    members = [export_random(base_model(kind), folder / kind, ORDERS[kind], seed=seed) for seed, kind in enumerate(kinds, 1)]
    temperatures = tuple(TEMPERATURES[kind] for kind in kinds)
    fusion = PredictionFusion("average", temperatures, (1 / len(kinds),) * len(kinds))
    write_fused(folder / "together", fusion, members, "sequence-classification", LABELS)
    return folder / "together"


def stated(*names: str) -> list[dict[str, Any]]:
    """[[model.members]] of models that were trained with privacy."""
    return [{"name": name, "epsilon": 3.0, "delta": 1e-5} for name in names]
