"""A head on 33 features: a record's place decides in which order its scores are added up, and a neighbor moves it to another place.

Rows of 33 numbers begin at every remainder of 16 bytes, and the kernel for products with few columns goes by that. The check before
training looked at a head of zeros, under which every order gives the same sum, and let such models pass. In states with weights of
unlike size a record then moved the sum through others by 1.8e-6 clip norms, which is 1–2 steps of the grid on which noise lies; LoRA
and full training were refused or not, as the number of slots happened to be. Widths that showed it: 17, 31, 33, 35, 47, 50 and 65.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, BertConfig, RobertaConfig

from cotune.client.training.checks.gradient_checks import check_gradients
from cotune.client.training.stage_setup.from_records import build_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.data.records import Records
from cotune.models.architecture import AlignedRows
from cotune.models.trainable import State, TrainableModel
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms import clipped_sum, dp_sgd
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup
from cotune.privacy.mechanisms.outer_products import OuterProductSum
from tests.support.datasets import sentences
from tests.support.matrix import crossed
from tests.support.tiny_models import tokenizer

WIDTHS = (17, 31, 32, 33, 35, 47, 50, 65)
CLASSES = ("bad", "good", "so")
TEXTS, LABELS = zip(*sentences(6, seed=5), strict=True)
EVERYBODY = list(range(len(TEXTS)))
Sum = Callable[[list[int], State], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def plan_of(folder: Path, config: type[Any], width: int, mode: str) -> Plan:
    words = tokenizer()
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 50, "max_position_embeddings": 40}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config(vocab_size=len(words), pad_token_id=0, hidden_size=width, **small)).save_pretrained(folder)
    words.save_pretrained(folder)
    return parse_plan(
        {
            "labels": CLASSES,
            "train": mode,
            "model": {"base": str(folder), "max_length": 16, "precision": "float32"},
            "data": {"source": "none.csv"},
            "privacy": {"epsilon": 8.0, "delta": 1e-3},
            "local": {"batch_size": 16, "steps": 1, "physical_batch_size": 5},
            "lora": {"rank": 3},
        }
    )


def summing(plan: Plan, model: TrainableModel, monkeypatch: pytest.MonkeyPatch) -> Sum:
    """(records, state) -> the clipped sum of one step over them, in float64, before noise is added to it.

    That of a head's outer products before it is rounded to the grid as a whole, when it is exact.
    """
    seen: list[Tensor] = []
    rounded: list[Tensor] = []

    def watched(total: Tensor, *_: Any) -> Tensor:
        rounded.append(total.clone())
        return total

    class Watched(OuterProductSum):
        def totals(self) -> list[Tensor]:
            seen.extend(steps.double() for steps in self._steps)
            return super().totals()

    monkeypatch.setattr(dp_sgd, "add_gaussian_noise", watched)
    monkeypatch.setattr(clipped_sum, "OuterProductSum", Watched)

    def of(rows: list[int], state: State) -> Tensor:
        seen.clear()
        rounded.clear()
        given = setting(plan, model, rows, state)
        optimizer = torch.optim.SGD([p for p in given.module.parameters() if p.requires_grad], lr=0.0)
        config = DPSGDConfig(noise_multiplier=0.6, clip_norm=0.37, sample_rate=1.0, expected_batch=16.0, steps=1)
        list(DPSGD(config).run(DPSGDSetup(given.module, optimizer, given.loss, given.units, given.batches)))
        return torch.cat([total.flatten() for total in seen or rounded])

    return of


def setting(plan: Plan, model: TrainableModel, rows: list[int], state: State) -> TrainingSetup:
    model.load(state)
    records = Records([TEXTS[i] for i in rows], [LABELS[i] for i in rows], "records")
    held = Dataset(((records, torch.arange(len(rows)).numpy()),), CLASSES)
    return build_setup(plan, plan.stages[0], model, held, state, "clinic", expected_batch=16.0)


def prepared(folder: Path, config: type[Any], width: int, mode: str) -> tuple[Plan, TrainableModel, State]:
    """A plan, its model, checked as before every training, and what the stage trains."""
    plan = plan_of(folder, config, width, mode)
    model = get_plan_model(plan, "cpu")
    model.load({})
    names = model.names(mode)  # type: ignore[arg-type]
    model.train_only(names)
    own = model.state(names)
    assert isinstance(plan.privacy, RecordPrivacy)
    check_gradients(setting(plan, model, EVERYBODY[:3], {}), plan.privacy, mode)
    model.load({})
    after = model.state(names)
    assert all(torch.equal(own[name], after[name]) for name in names)  # the check leaves no trace
    return plan, model, own


def apart(total: Sum, state: State) -> bool:
    """Whether each record changes the sum by what it contributes alone, and by nothing else, to the bit."""
    whole = total(EVERYBODY, state)
    changes = ((whole - total([j for j in EVERYBODY if j != i], state), total([i], state)) for i in EVERYBODY)
    return all(torch.equal(moved, alone) for moved, alone in changes)


@pytest.mark.parametrize(("width", "config"), crossed(WIDTHS, [BertConfig, RobertaConfig]))
def test_of_no_width_a_record_reaches_another(
    config: type[Any], width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, model, own = prepared(tmp_path / "base", config, width, "head")
    total = summing(plan, model, monkeypatch)

    @settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**31), scales=st.lists(st.floats(-4.0, 4.0), min_size=len(own), max_size=len(own)))
    def in_any_state(seed: int, scales: list[float]) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = zip(own.items(), scales, strict=True)
        state = {name: (10.0**scale * torch.randn(t.shape, generator=generator)).clamp(-1e4, 1e4) for (name, t), scale in drawn}
        assert apart(total, state)

    in_any_state()


@pytest.mark.parametrize(("width", "mode"), crossed([33, 47], ["lora", "full"]))
def test_nor_where_the_encoder_is_trained(width: int, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model, own = prepared(tmp_path / "base", BertConfig, width, mode)
    total = summing(plan, model, monkeypatch)
    generator = torch.Generator().manual_seed(1)
    assert apart(total, {name: 0.3 * torch.randn(t.shape, generator=generator) for name, t in own.items()})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(width=st.integers(1, 130), columns=st.integers(1, 12), rows=st.sampled_from([3, 16, 33, 64]), seed=st.integers(0, 2**31))
def test_a_row_has_the_same_scores_and_gradient_in_every_place(width: int, columns: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, bias, row, back = (
        torch.randn(shape, generator=generator) for shape in ((columns, width), (columns,), (width,), (columns,))
    )
    inputs = row.repeat(rows, 1).requires_grad_()
    with AlignedRows():
        scores = functional.linear(inputs, weight, bias)
    scores.backward(back.repeat(rows, 1))  # type: ignore[no-untyped-call]
    assert inputs.grad is not None
    assert torch.equal(scores, scores[:1].expand_as(scores))
    assert torch.equal(inputs.grad, inputs.grad[:1].expand_as(inputs.grad))
    exact = functional.linear(row.double(), weight.double(), bias.double())
    torch.testing.assert_close(scores[0].double(), exact, rtol=1e-4, atol=1e-4)
