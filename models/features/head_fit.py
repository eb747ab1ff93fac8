"""A head fitted to the end on features of an organization's own records, without noise: what never leaves need not be noised.

The penalty pulls the head toward another one (Evgeniou & Pontil, KDD 2004, equation 3; with a start at the shared model, the
personalization of Li et al., "Ditto", ICML 2021, https://arxiv.org/abs/2012.04221, equation 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cotune.errors import RunError
from cotune.models.device import single_thread
from cotune.models.features.head import feature_head
from cotune.models.trainable import State, TrainableModel

_ITERATIONS = 60
_TOLERANCE = 1e-6


def head_names(model: TrainableModel) -> list[str]:
    """The parameters of the head."""
    return model.names("head")


def last_layer(model: TrainableModel) -> tuple[str, str] | None:
    """Weight and bias of the layer that gives the scores; None where the head has no such layer, or one without a bias."""
    classes = len(model.loaded.module.config.id2label)
    names = set(head_names(model))
    shapes = {name: p.shape for name, p in model.parameters() if name in names}
    for bias, shape in reversed(shapes.items()):
        weight = f"{bias.removesuffix('bias')}weight"
        if bias.endswith("bias") and shape == (classes,) and len(shapes.get(weight, ())) == 2:
            return weight, bias
    return None


def _require_last_layer(model: TrainableModel) -> tuple[str, str]:
    found = last_layer(model)
    assert found is not None, "anyone who corrects a head has looked for its last layer"
    return found


@torch.no_grad()
def head_scores(model: TrainableModel, head: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Scores of a head on features (n, d): (n, classes) on the CPU.

    Args:
        model: The model, which is set to the base model with this head.
        head: The head's parameters by name.
        features: What the head reads of n records, (n, d).
    """
    model.load(head)
    reader = feature_head(model)
    assert reader is not None, "anyone who has features has a head on them"
    found: Tensor = reader(features.to(model.device)).logits.float().cpu()
    return found


def fit_head(model: TrainableModel, features: Tensor, targets: Tensor, *, start: State, toward: State, pull: float) -> State:
    """Return the head that minimizes the mean cross-entropy + pull / 2 · s · ‖head − toward‖², by L-BFGS.

    Args:
        features: (n, d), without NaN.
        targets: (n,) class numbers.
        start: The head to begin with.
        toward: The head that is pulled to.
        pull: Strength, in units of s, the mean squared norm of a feature: the same for features of any size.

    Raises:
        RunError: When the result is not finite.
    """
    model.load(start)
    reader = feature_head(model)
    names = head_names(model)
    assert reader is not None, "anyone who has features has a head on them"
    parameters = model.train_only(names)
    device = model.device
    anchors = [toward[name].to(device) for name in names]
    rows = features.to(device)
    numbers = targets.to(device)
    strength = pull * float(features.square().sum(dim=1).mean())

    def loss() -> Tensor:
        apart = torch.stack([(p - a).square().sum() for p, a in zip(parameters, anchors, strict=True)]).sum()
        return functional.cross_entropy(reader(rows).logits.float(), numbers) + strength / 2 * apart

    layer = reader.alone[0]
    if layer is not None and list(map(id, parameters)) == [id(layer.weight), id(layer.bias)]:
        _minimize(partial(evaluate_linear, layer.weight, layer.bias, rows, numbers, anchors, strength), parameters)
    else:
        _minimize(partial(_by_autograd, loss, parameters), parameters)
    found = model.state(names)
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise RunError(
            "the head that was fitted to the own records is not finite: expected finite features", code="run.not_finite"
        )
    return found


@torch.no_grad()
def evaluate_linear(
    weight: Tensor, bias: Tensor, features: Tensor, targets: Tensor, toward: Sequence[Tensor], strength: float
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of a linear head and its gradients, in closed form: a tenth of what autograd takes for few records.

    Args:
        weight: (classes, d).
        bias: (classes,).
        features: (n, d).
        targets: (n,) class numbers.
        toward: Weight and bias that are pulled to.
        strength: Of the pull: strength / 2 · ‖head − toward‖² is added to the mean cross-entropy.
    """
    log_probabilities = torch.addmm(bias, features, weight.t()).float().log_softmax(dim=1)
    slopes = log_probabilities.exp()
    slopes[torch.arange(len(targets), device=slopes.device), targets] -= 1
    slopes /= len(targets)
    apart = [own - other for own, other in zip((weight, bias), toward, strict=True)]
    value = functional.nll_loss(log_probabilities, targets) + strength / 2 * (apart[0].square().sum() + apart[1].square().sum())
    return value, [slopes.t() @ features + strength * apart[0], slopes.sum(dim=0) + strength * apart[1]]


def _by_autograd(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    value = loss()
    return value.detach(), torch.autograd.grad(value, list(parameters))


def correct_head(model: TrainableModel, head: State, features: Tensor, targets: Tensor) -> State:
    """Return the head with its scores scaled and shifted so that they suit an organization's own records.

    The shift corrects for another mix of classes: at its maximum likelihood the mean probability of a class is its frequency, as
    with the log of the priors' ratio (Saerens et al., Neural Computation 14, 2002), the priors of training being estimated. The
    scale is a temperature (Guo et al., ICML 2017, section 4.2), as noise makes a head surer than it should be. One record's worth
    of penalty keeps the shift of a class without records finite. The head must have a last layer (`last_layer`).

    Args:
        model: The model.
        head: The head's parameters by name.
        features: What the head reads of n records, (n, d).
        targets: Class numbers, (n,).

    Returns:
        The parameters of the corrected head.
    """
    weight, bias = _require_last_layer(model)
    scores = head_scores(model, head, features)
    scale, shift = _scale_and_shift(scores, targets)
    return {**head, weight: head[weight] * scale, bias: head[bias] * scale + shift}


def _scale_and_shift(scores: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    wide = scores.double()
    log_scale = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(scores.shape[1], dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        penalty = (shift.square().sum() + log_scale.square().sum()) / (2 * len(targets))
        return functional.cross_entropy(wide * log_scale.exp() + shift, targets) + penalty

    _minimize(partial(_by_autograd, loss, [log_scale, shift]), [log_scale, shift])
    return float(log_scale.detach().exp()), shift.detach().float()


def _minimize(evaluate: Callable[[], tuple[Tensor, Sequence[Tensor]]], parameters: Sequence[Tensor]) -> None:
    """Move the parameters to where a loss is smallest, by L-BFGS (Byrd et al., SIAM J. Sci. Comput. 16, 1995).

    scipy's keeps the best point where rounding in float32 ends its line search early; torch's may step to infinity there.
    """
    from scipy.optimize import minimize

    ends = np.cumsum([parameter.numel() for parameter in parameters])[:-1]

    @torch.no_grad()
    def put(point: NDArray[np.float64]) -> None:
        for parameter, piece in zip(parameters, np.split(point, ends), strict=True):
            parameter.copy_(torch.as_tensor(piece).reshape(parameter.shape))

    def at(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        put(point)
        value, gradients = evaluate()
        return float(value), torch.cat([g.detach().double().cpu().reshape(-1) for g in gradients]).numpy()

    start = torch.cat([p.detach().double().cpu().reshape(-1) for p in parameters]).numpy()
    with single_thread():
        found = minimize(at, start, jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS, "gtol": _TOLERANCE})
    put(found.x)
