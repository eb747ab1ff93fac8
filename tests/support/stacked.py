"""Fused models of unlike architectures and tokenizers as base models of plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cotune.ensembles.folder import write_fused
from cotune.ensembles.fusion import PredictionFusion
from tests.support.exported_models import export_random

LABELS = ("bad", "good", "so")
ORDERS = {"bert": LABELS, "gpt2": ("so", "bad", "good"), "roberta": ("good", "so", "bad"), "qwen2": ("so", "good", "bad")}
TEMPERATURES = {"bert": 1.0, "gpt2": 2.5, "roberta": 0.5, "qwen2": 1.5}


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
