from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cotune.privacy.mechanisms.per_example import Batch, kinds_without_rule, per_example


class _Scaled(nn.Module):
    """A layer with a parameter of its own, of a kind that Opacus does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, given: Tensor) -> Tensor:
        return given * self.scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
def test_the_gradients_of_a_layer_norm_are_those_of_single_rows(bias: bool, shape: tuple[int, ...]) -> None:
    """Against autograd on one row at a time; with and without a bias, which Opacus' own rule expects."""
    torch.manual_seed(0)
    module = nn.LayerNorm(4, bias=bias)
    rows = torch.randn(shape)
    nn.init.normal_(module.weight)

    def loss(batch: Batch) -> Tensor:
        return module(batch["x"]).sin().flatten(1).sum(dim=1)

    with per_example(module, loss) as of:
        _, found = of.gradients({"x": rows})
    for row in range(len(rows)):
        alone = torch.autograd.grad(loss({"x": rows[row : row + 1]}).sum(), tuple(module.parameters()))
        for gradients, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(gradients[row], expected)


def test_layers_without_a_rule_are_named_by_their_kind() -> None:
    module = nn.Sequential(nn.Linear(4, 4), _Scaled(), nn.LayerNorm(4))
    assert kinds_without_rule(module) == ["_Scaled"]
    module[1].requires_grad_(False)
    assert kinds_without_rule(module) == []
