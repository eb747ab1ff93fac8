"""Ensemble distillation: the fused model learns the combined predictions of the organizations' models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from cotune.strategies.order_statistics import fuse_coordinates, median_rows
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.sums import add_weighted, average, divide
from cotune.strategies.types import Delta, RoundContext, WeightedUpdate

Combine = Literal["mean", "median", "vote"]


@fusion(
    "ensemble_distillation",
    cite="Lin et al., NeurIPS 2020, https://arxiv.org/abs/2006.07242, algorithm 1",
    needs=Needs(visibility=Visibility.PER_CLIENT, public_inputs=True, sets_state=True),
    homogeneous=False,
    idempotent=False,
)
def ensemble_distillation(
    updates: Sequence[WeightedUpdate],
    *,
    combine: Combine = "mean",
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0,
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3,
    epochs: Annotated[int, Field(ge=1, le=1000)] = 3,
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 64,
    context: RoundContext,
) -> Delta:
    """Train the weighted mean on public inputs to predict the combined predictions of the models θ + Δ_k.

    Args:
        updates: Each with one weight w_k.
        combine: How predictions are combined. "mean": the softmax of the weighted mean of the scores. "vote": the weighted share
            of the models that predict each class. "median": the softmax of the median of each score, without weights, starting
            from the coordinate-wise median of the deltas; a few hostile updates move neither far.
        temperature: T of the distillation loss T² · KL.
        learning_rate: Initial learning rate of Adam.
        epochs: Passes over the public inputs.
        batch_size: Public inputs per step.
        context: Its public inputs are required.
    """
    public = context.public
    assert public is not None, "needs.public_inputs"
    scores = torch.stack([public.predict(update.entries) for update in updates])
    weights = torch.tensor([update.scalar for update in updates], dtype=torch.float64)
    taught = combine_scores(scores, weights, combine)
    return public.distill(
        _start(updates, combine),
        taught,
        temperature=temperature,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
    )


def combine_scores(scores: Tensor, weights: Tensor, combine: Combine) -> Tensor:
    """Return the combined probabilities (answers, classes) of several models.

    Args:
        scores: (models, answers, classes), in float64; NaN where a model could not read an input.
        weights: (models,), 0 or more, their sum above 0.
        combine: mean, median or vote, see `ensemble_distillation`.

    Returns:
        Rows of NaN where any model could not read the input.
    """
    if combine == "median":
        return functional.softmax(scores.quantile(0.5, dim=0), dim=-1)
    if combine == "mean":
        return functional.softmax(average([*scores], [*weights]), dim=-1)
    votes = functional.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(torch.float64)
    unread = scores.isnan().any(dim=-1).any(dim=0)
    return average([*votes], [*weights]).masked_fill(unread[:, None], torch.nan)


def _start(updates: Sequence[WeightedUpdate], combine: Combine) -> Delta:
    if combine == "median":
        return fuse_coordinates([update.entries for update in updates], lambda rows, _: median_rows(rows))
    sums: dict[str, Tensor] = {}
    for update in updates:
        add_weighted(sums, update)
    return divide(sums)
