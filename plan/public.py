"""The `[public]` table of a plan, which names public inputs, and the conditions for sharing only predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from cotune.storage.config_table import ConfigTable

Collaboration = Literal["parameters", "predictions"]
Share = Literal["scores", "votes"]

SCORES = "public.scores"  # the array that is shared instead of parameters, (answers, classes)

# All other rules are about parameters, or about the disclosures of updates of parameters.
_WEIGHTINGS = ("examples", "uniform")
_FUSIONS = (
    "mean",
    "median",
    "trimmed_mean",
    "geometric_median",
    "krum",
    "multi_krum",
    "bulyan",
    "robust",
    "norm_bound",
    "centered_clipping",
)


class PublicConfig(ConfigTable):
    """Public inputs without labels (the `public` table of a plan), and how models learn from predictions for them."""

    source: str = Field(
        "",
        max_length=4096,
        description="a file of inputs, or a folder of images; for real organizations a path in the federation's folder, which"
        " members see; empty: there are none",
    )
    column: str | None = Field(
        None, min_length=1, max_length=1000, description='the column that holds the inputs; absent: "text", or "image"'
    )
    encoding: str = Field("utf-8", max_length=40, description="text encoding of a CSV, TSV or JSON file")
    license: str = Field("", max_length=200, description="license of the inputs, for information only")
    sha256: str = Field(
        "",
        pattern=r"^([0-9a-f]{64})?$",
        description="SHA-256 of the inputs in their order; filled in by a run; other inputs are refused",
    )
    answers: int = Field(
        0, ge=0, le=10_000_000, description="number of predictions for the inputs, one for each input or word; filled in by a run"
    )
    share: Share = Field(
        "scores",
        description="with collaboration = predictions: what is shared, the scores of all classes or a vote for one class",
    )
    max_score: float = Field(
        20.0, gt=0, le=100, description="bound on centered scores, which are clipped to it; the server refuses larger ones"
    )
    temperature: float = Field(
        1.0, gt=0, le=100, description="temperature of the distillation loss, by which models learn the fused predictions"
    )
    learning_rate: float = Field(
        1e-3, gt=0, le=10, description="learning rate of Adam in distillation; it decays to 0 over all steps"
    )
    epochs: int = Field(3, ge=1, le=1000, description="passes over the inputs in distillation")
    batch_size: int = Field(64, ge=1, le=65536, description="inputs per step of distillation")

    @property
    def bound(self) -> float:
        """The largest magnitude of an entry of a shared prediction."""
        return 1.0 if self.share == "votes" else self.max_score


def explain_predictions(public: PublicConfig, *, private: bool) -> str:
    """Return one sentence about what is sent if predictions are shared, and what protects it."""
    what = "the scores of all classes" if public.share == "scores" else "the most probable class"
    count = f"{public.answers:,} public inputs" if public.answers else "public inputs"
    licensed = f" ({public.license})" if public.license else ""
    cost = (
        "they follow from what was trained under ε, and cost no more"
        if private
        else "NO noise protects them, so that single records may show"
    )
    whose = "predictions: each organization trains a model of its own"
    return f"{whose}, and shares {what} for {count}{licensed} and no parameter; {cost}"


def find_strategy_problem(weighting: str, fusion: str, *, plain: bool, client_term: bool) -> str | None:
    """Return why a strategy cannot fuse predictions, in words; None if it can.

    Args:
        weighting: Its name.
        fusion: Its name.
        plain: Whether the server optimizer applies the result of the fusion unchanged.
        client_term: Whether there is one.
    """
    if fusion not in _FUSIONS:
        return f'the fusion "{fusion}" is about parameters: expected one of {", ".join(_FUSIONS)}'
    if weighting not in _WEIGHTINGS:
        return f'the weighting "{weighting}" is about updates of parameters: expected one of {", ".join(_WEIGHTINGS)}'
    if not plain:
        return 'what all predict together is no direction: expected server_optimizer = "sgd" with lr 1, and nothing else'
    if client_term:
        return "a client term pulls at shared parameters, and there are none: expected no client_term"
    return None


def find_problems(public: PublicConfig, others: dict[str, bool]) -> Iterator[str]:
    """Yield, in words, why organizations cannot share only predictions.

    Args:
        public: The plan's table.
        others: Feature in words -> whether the plan has it.
    """
    if not public.source:
        yield 'collaboration = "predictions" needs public inputs, and the plan names none: expected public.source'
    for what, found in others.items():
        if found:
            yield f'collaboration = "predictions" is not supported with {what}: leave out one of the two'
