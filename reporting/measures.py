"""The figures by which models are judged, and how people read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cotune.reporting.documents.base import Document
from cotune.reporting.formatting import percent, signed


@dataclass(frozen=True)
class Measure:
    """One figure.

    Attributes:
        key: In `metrics` of summary.json.
        name: In a sentence or a heading.
        share: Whether it is a share, shown in percent and compared in points; else it is shown as a plain number.
        less_is_better: Whether a smaller one is better.
        unit: Of a difference.
        floor: What needs no training, and every model is compared with.
    """

    key: str
    name: str
    share: bool = True
    less_is_better: bool = False
    unit: str = "points of accuracy"
    floor: str = "majority class"

    def show(self, value: float) -> str:
        """Return the figure with its unit: "71.2 %", or "2.345"."""
        return percent(value) if self.share else f"{value:.3f}"

    def gain(self, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
        """Return by how much ours is better, as precisely as it is shown, in `unit`."""
        apart: float = ours[self.key] - theirs[self.key]
        found = round(100 * apart, 1) if self.share else round(apart, 3)
        return -found if self.less_is_better else found

    def show_gain(self, value: float) -> str:
        """Return a `gain` with its sign."""
        return signed(value) if self.share else f"{value:+.3f}".replace("-", "−")

    def is_better(self, difference: float) -> bool:
        """Return whether a difference of two figures, ours less theirs, is for the better."""
        return difference < 0 if self.less_is_better else difference > 0

    def rank(self, value: float) -> float:
        """Return what is largest for the best figure."""
        return -value if self.less_is_better else value

    @property
    def number(self) -> str:
        """Of what a figure in a table is a number: "%", or the unit."""
        return "%" if self.share else self.unit

    @property
    def apart(self) -> str:
        """Of what a difference in a table is a number."""
        return "points" if self.share else self.unit


_OF_CLASSES = (
    Measure("accuracy", "accuracy"),
    Measure("precision", "macro precision"),
    Measure("recall", "macro recall"),
    Measure("f1", "macro F1"),
)
_OF_TEXTS = (
    Measure("loss", "loss (nats per token)", share=False, less_is_better=True, unit="nats per token", floor="base model"),
    Measure("perplexity", "perplexity", share=False, less_is_better=True),
    Measure("accuracy", "token accuracy"),
)

_OF_NUMBERS = (
    Measure("mse", "mean squared error", share=False, less_is_better=True, unit="squared error", floor="the mean"),
    Measure("mae", "mean absolute error", share=False, less_is_better=True),
    Measure("spearman", "Spearman correlation", share=False),
    Measure("r2", "R²", share=False),
)
_OF_LABEL_SETS = (
    Measure("micro_f1", "micro F1", unit="points of micro F1", floor="frequencies"),
    Measure("macro_f1", "macro F1"),
    Measure("mean_average_precision", "mean average precision"),
    Measure("exact", "all labels right"),
)
_OF_ANSWERS = (
    Measure("token_f1", "F1 of an answer's words", unit="points of F1", floor="base model"),
    Measure("exact_answer", "exact answers"),
)
_BY_KEY = {measures[0].key: measures for measures in (_OF_TEXTS, _OF_NUMBERS, _OF_LABEL_SETS, _OF_ANSWERS)}


def get_measures(metrics: Document | Mapping[str, Any] | None) -> tuple[Measure, ...]:
    """Return the figures that metrics consist of, the one first that decides; those of classes where there are none."""
    known = () if metrics is None else tuple(metrics.keys())
    return next((measures for key, measures in _BY_KEY.items() if key in known), _OF_CLASSES)


def measures_of(summary: Document | Mapping[str, Any]) -> tuple[Measure, ...]:
    """Return the figures in the summary of a run."""
    return get_measures(summary["test"]["federated"])


def headline(metrics: Document | Mapping[str, Any]) -> str:
    """Return the figure that decides, with its name: "accuracy 0.712", or "loss 2.345"."""
    first = get_measures(metrics)[0]
    return f"{first.key} {metrics[first.key]:.3f}"
