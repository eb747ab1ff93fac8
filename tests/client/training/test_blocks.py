"""Rounds that train the last blocks of an encoder: what moves, how it is clipped, and how it is kept near the base model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cotune.client.consent.plan_summary import summarize_plan
from cotune.client.site import Site
from cotune.client.training.checks.gradient_checks import check_stages
from cotune.client.training.regularization import dropping, find_dropout
from cotune.client.training.round import train_round
from cotune.client.training.stage_setup.from_records import synthetic_setup
from cotune.errors import ModelError, PlanError
from cotune.models.trainable import State
from cotune.models.transformer_blocks import block_of
from cotune.plan.local_training import LocalTraining
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, stage_names, trained_names
from cotune.plan.update_norm import bound_update_norm
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
PRIVATE = {"epsilon": 4.0, "delta": 1e-3, "clip_norm": 1.0}
BLOCKS: dict[str, Any] = {"train": "blocks", "layers": 1}


def base_state(plan: Plan) -> State:
    model = get_plan_model(plan, "cpu")
    model.load({})
    return model.state(trained_names(plan, model, 1))


@pytest.mark.parametrize("privacy", ["none", PRIVATE], ids=["without privacy", "with privacy"])
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_round_moves_the_last_block_and_the_head_alone(make_plan: MakePlan, make_site: MakeSite, kind: str, privacy: Any) -> None:
    plan = make_plan(kind, **BLOCKS, privacy=privacy)
    update = train_round(plan, make_site(), 1, base_state(plan))
    numbers = {block[1] for block in map(block_of, update.delta) if block}
    assert numbers == {1}
    assert all(bool(tensor.any()) for name, tensor in update.delta.items() if name.endswith("weight") and "key" not in name)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_sum_of_clipped_gradients_is_that_of_a_loop_over_records(make_plan: MakePlan, kind: str) -> None:
    clip = 0.05  # below the norm of every record's gradient
    plan = make_plan(kind, **BLOCKS, privacy=PRIVATE)
    model = get_plan_model(plan, "cpu")
    model.load({})
    (stage,) = plan.stages
    check_stages(plan, model)
    names = stage_names(plan, stage, model)
    parameters = model.train_only(names)
    setup = synthetic_setup(plan, stage, model, 5)
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for row in range(5):
        found = torch.autograd.grad(setup.loss(setup.alone(row)).sum(), parameters)
        norm = torch.cat([g.double().flatten() for g in found]).norm()
        assert norm > clip
        expected = [total + g.double() * clip / norm for total, g in zip(expected, found, strict=True)]
    before = model.state(names)
    config = DPSGDConfig(noise_multiplier=0.0, clip_norm=clip, sample_rate=1.0, expected_batch=1.0, steps=1)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    list(DPSGD(config).run(DPSGDSetup(model.module, optimizer, setup.loss, setup.units, setup.batches)))
    after = model.state(names)
    for name, total in zip(names, expected, strict=True):
        torch.testing.assert_close((before[name] - after[name]).double(), total, atol=2e-6, rtol=1e-4)


def test_stages_unfreeze_one_block_after_another(make_plan: MakePlan) -> None:
    stages = [
        {"mode": "head", "rounds": 1},
        {"mode": "blocks", "rounds": 1},
        {"mode": "blocks", "layers": 2, "rounds": 1},
    ]
    plan = make_plan(train=stages, layers=1)
    assert [stage.layers for stage in plan.stages] == [None, 1, 2]
    model = get_plan_model(plan, "cpu")
    trained = [{block[1] for block in map(block_of, trained_names(plan, model, round)) if block} for round in (1, 2, 3)]
    assert trained == [set(), {1}, {0, 1}]


def test_pull_of_one_step_is_toward_the_base_model(make_plan: MakePlan, make_site: MakeSite) -> None:
    """Of two strengths on the same batch, the difference is η(λ₁ − λ₂)(θ − θ₀), and the new head is left alone."""
    deltas = {}
    for strength in (0.0, 0.5):
        local = {"steps": 1, "learning_rate": 0.1, "momentum": 0.0, "base_decay": strength}
        plan = make_plan(**BLOCKS, local=local)
        moved = {name: tensor + 0.25 for name, tensor in base_state(plan).items()}
        deltas[strength] = train_round(plan, make_site(at=f"{strength}"), 1, moved).delta
    prefix = get_plan_model(plan, "cpu").prefix
    for name, plain in deltas[0.0].items():
        pulled = -0.1 * 0.5 * 0.25 if name.startswith(prefix) else 0.0
        torch.testing.assert_close(deltas[0.5][name] - plain, torch.full_like(plain, pulled), atol=1e-6, rtol=1e-4)


def test_no_bound_is_claimed_of_an_update_that_is_pulled(make_plan: MakePlan) -> None:
    found = []
    for strength in (0.0, 0.1):
        plan = make_plan(**BLOCKS, privacy=PRIVATE, local={"base_decay": strength})
        found.append(bound_update_norm(plan, plan.stages[0], examples=60, entries=10, start=1.0))
    assert found[0] is not None
    assert found[1] is None


def test_dropout_is_on_in_steps_alone_and_repeatable_without_privacy(make_plan: MakePlan, make_site: MakeSite) -> None:
    plan = make_plan(**BLOCKS, local={"dropout": 0.3})
    state = base_state(plan)
    one = train_round(plan, make_site(at="one"), 1, state).delta
    again = train_round(plan, make_site(at="two"), 1, state).delta
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    without = train_round(make_plan(**BLOCKS), make_site(at="three"), 1, state).delta
    assert any(not torch.equal(tensor, without[name]) for name, tensor in one.items())
    model = get_plan_model(plan, "cpu")
    layers = find_dropout(LocalTraining(dropout=0.3), model, trained_names(plan, model, 1))
    assert not any(layer._forward_hooks for layer in layers)


def test_masks_under_privacy_follow_from_no_seed(make_plan: MakePlan, make_site: MakeSite, monkeypatch: Any) -> None:
    """A mask that others can compute ties records together: it depends on a record's slot, and that on the other records."""
    seen: list[np.random.Generator] = []

    def watched(layers: Any, probability: float, generator: np.random.Generator) -> Any:
        seen.append(generator)
        return dropping(layers, probability, generator)

    monkeypatch.setattr("cotune.client.training.regularization.dropping", watched)
    plan = make_plan(**BLOCKS, local={"dropout": 0.3}, privacy=PRIVATE)
    for at in ("one", "two"):
        train_round(plan, make_site(at=at), 1, base_state(plan))
    first, second = (type(generator.bit_generator).__name__ for generator in seen)
    assert first == second == "ChaCha"
    assert seen[0].random() != seen[1].random()


def test_dropping_keeps_the_mean() -> None:
    layer = nn.Dropout(0.0).eval()
    with dropping([layer], 0.25, np.random.default_rng(5)):
        given = layer(torch.ones(400, 100))
    assert given.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float(given.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(layer(torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": "blocks"}, "expected layers with train = blocks"),
        ({"train": "lora", "layers": 1}, "expected layers with train = blocks"),
        ({"train": "head", "local": {"dropout": 0.1}}, "reads features, which are computed once"),
        ({**BLOCKS, "privacy": {**PRIVATE, "clipping": "per_layer"}}, "per_layer is not supported with train = blocks"),
        ({**BLOCKS, "strategy": "fedex"}, "is for adapters"),
        (
            {**BLOCKS, "privacy": PRIVATE, "local": {"base_decay": 0.1}, "strategy": {"weighting": "noise_aware"}},
            "knows the noise of plain steps",
        ),
    ],
)
def test_plans_that_blocks_cannot_have(make_plan: MakePlan, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said) as refused:
        make_plan(**changes)
    assert refused.value.code == "plan.invalid"


@pytest.mark.parametrize(
    ("kind", "local", "code"),
    [
        ("llama", {"dropout": 0.1}, "model.no_dropout"),
        ("bert", {"dropout": 0.1, "activation_checkpointing": "on"}, "model.dropout_computed_again"),
    ],
)
def test_models_that_cannot_drop_out_are_refused_before_a_run(
    make_plan: MakePlan, kind: str, local: dict[str, Any], code: str
) -> None:
    plan = make_plan(kind, **BLOCKS, local=local)
    with pytest.raises(ModelError) as refused:
        check_stages(plan, get_plan_model(plan, "cpu"))
    assert refused.value.code == code


def test_plan_summary_says_how_many_blocks(make_plan: MakePlan) -> None:
    """What an organization reads before it approves."""
    assert any("3 of the last 1 blocks (" in line for line in summarize_plan(make_plan(**BLOCKS)))
