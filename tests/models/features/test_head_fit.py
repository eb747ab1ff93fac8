"""Against the conditions that a minimum fulfills, computed here by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, softmax

from cotune.models.config import ModelConfig
from cotune.models.features.head_fit import correct_head, evaluate_linear, fit_head, head_names, head_scores, last_layer
from cotune.models.trainable import State, TrainableModel, get_model

CLASSES = ("bad", "good", "so")


@pytest.fixture
def model(base_model: Callable[[str], Path]) -> TrainableModel:
    return get_model(ModelConfig(base=str(base_model("bert")), max_length=16, pooling="mean"), CLASSES, None, 7, "cpu")


@pytest.fixture
def head(model: TrainableModel) -> State:
    model.load({})
    return model.state(head_names(model))


def records(count: int, seed: int = 0, mix: tuple[float, ...] = (1, 1, 1)) -> tuple[Tensor, Tensor]:
    """Features around a point for each class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.multinomial(torch.tensor(mix, dtype=torch.float64), count, replacement=True, generator=generator)
    points = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    return points[targets] + 1.5 * torch.randn(count, 16, generator=generator), targets


def one_hot(targets: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(targets, 3).float()


@pytest.mark.parametrize("pull", [0.01, 0.3])
def test_a_fitted_head_is_where_the_gradient_vanishes(model: TrainableModel, head: State, pull: float) -> None:
    features, targets = records(80)
    found = fit_head(model, features, targets, start=head, toward=head, pull=pull)
    weight = found["classifier.weight"]
    bias = found["classifier.bias"]
    strength = pull * float((features**2).sum(dim=1).mean())
    apart = softmax(features @ weight.T + bias, dim=1) - one_hot(targets)
    assert (apart.T @ features / 80 + strength * (weight - head["classifier.weight"])).abs().max() < 2e-3
    assert (apart.mean(dim=0) + strength * (bias - head["classifier.bias"])).abs().max() < 2e-3


@given(st.integers(1, 40), st.floats(0, 10), st.integers(0, 99))
def test_closed_form_is_what_autograd_finds(count: int, strength: float, seed: int) -> None:
    features, targets = records(count, seed)
    generator = torch.Generator().manual_seed(seed)
    weight, other = torch.randn(2, 3, 16, generator=generator)
    bias, shift = torch.randn(2, 3, generator=generator)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    apart = (weight - other).square().sum() + (bias - shift).square().sum()
    expected = cross_entropy(features @ weight.t() + bias, targets) + strength / 2 * apart

    value, gradients = evaluate_linear(weight, bias, features, targets, [other, shift], strength)

    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(tuple(gradients), torch.autograd.grad(expected, parameters), rtol=1e-4, atol=1e-5)


def test_a_strong_pull_leaves_the_head_and_none_fits_the_records(model: TrainableModel, head: State) -> None:
    features, targets = records(80)
    held = fit_head(model, features, targets, start=head, toward=head, pull=1e4)
    assert all((held[name] - head[name]).abs().max() < 1e-3 for name in head)
    loose = fit_head(model, features, targets, start=head, toward=head, pull=1e-6)
    assert (head_scores(model, loose, features).argmax(dim=1) == targets).float().mean() > 0.95


@given(st.floats(-3, 4), st.floats(-4, 1), st.integers(0, 99))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_start_and_no_size_makes_a_fit_fail(model: TrainableModel, head: State, size: float, pull: float, seed: int) -> None:
    """Heads that noise has blown up are started from, and fitted once more where nothing is left to gain: never worse."""
    features, targets = records(40, seed)
    start = {name: 10**size * tensor for name, tensor in head.items()}

    def loss(of: State) -> float:
        apart = sum(float((of[name] - head[name]).square().sum()) for name in head)
        strength = 10**pull * float(features.square().sum(dim=1).mean())
        return float(cross_entropy(head_scores(model, of, features), targets)) + strength / 2 * apart

    once = fit_head(model, features, targets, start=start, toward=head, pull=10**pull)
    twice = fit_head(model, features, targets, start=once, toward=head, pull=10**pull)
    assert loss(once) <= loss(start) * (1 + 1e-5)
    assert loss(twice) <= loss(once) * (1 + 1e-5)


def test_corrected_head_predicts_classes_by_their_frequency(model: TrainableModel, head: State) -> None:
    features, targets = records(300)
    shared = fit_head(model, features, targets, start=head, toward=head, pull=0.001)
    others, skewed = records(200, seed=5, mix=(8, 1, 1))
    found = correct_head(model, shared, others, skewed)
    predicted = softmax(head_scores(model, found, others), dim=1).mean(dim=0)
    there = one_hot(skewed).mean(dim=0)
    assert (predicted - there).abs().max() < 0.02  # but for a penalty of one record of 200
    assert (softmax(head_scores(model, shared, others), dim=1).mean(dim=0) - there).abs().max() > 0.02
    new, expected = records(2000, seed=6, mix=(8, 1, 1))
    right = [float((head_scores(model, h, new).argmax(dim=1) == expected).float().mean()) for h in (found, shared)]
    assert right[0] > right[1]


def test_a_class_without_records_keeps_a_finite_score(model: TrainableModel, head: State) -> None:
    features, targets = records(50, mix=(1, 1, 0))
    found = correct_head(model, head, features, targets)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert softmax(head_scores(model, found, features), dim=1)[:, 2].mean() < 0.1


def test_the_last_layer_is_found_or_there_is_none(base_model: Callable[[str], Path]) -> None:
    def of(kind: str) -> tuple[str, str] | None:
        return last_layer(get_model(ModelConfig(base=str(base_model(kind)), max_length=16), CLASSES, None, 7, "cpu"))

    assert of("distilbert") == ("classifier.weight", "classifier.bias")
    assert of("gpt2") is None  # its scores have no bias
