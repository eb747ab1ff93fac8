"""Every model family × task × train mode, as a client sets it up: DP-SGD's clipped sum against gradients of one record at a time.

`tests/privacy/mechanisms/test_dp_sgd.py` has the algorithm; here it is what the algorithm is given: collators, losses and trained parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.client.training.checks import gradient_checks
from cotune.client.training.checks.gradient_checks import check_gradients, check_stages
from cotune.client.training.stage_setup.from_records import build_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.data.record_reading import read_records
from cotune.data.tasks import classes
from cotune.data.tasks.classes import logits
from cotune.errors import PlanError
from cotune.models.base.load import load_model
from cotune.models.trainable import TrainableModel
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup
from tests.support.datasets import COLORS, TAGS, write_csv, write_images
from tests.support.failures import fails_with
from tests.support.matrix import crossed
from tests.support.tiny_models import ARCHITECTURES

LR = 1024.0  # large: the movement is then not lost in the rounding of the parameters
CLASSES = {
    "sequence-classification": ("bad", "good", "so"),
    "token-classification": (*sorted(TAGS.values()), "O"),
    "image-classification": tuple(COLORS),
}
FAMILIES = [
    *((kind, task) for task in ("sequence-classification", "token-classification") for kind in ARCHITECTURES),
    ("vit", "image-classification"),
]
MODES: dict[str, dict[str, Any]] = {
    "head": {"train": "head"},
    "lora": {"train": "lora"},
    "rslora": {"train": "lora", "lora": {"method": "rslora"}},
    "lora with A": {"train": "lora", "lora": {"factors": "ab"}},
    "full": {"train": "full"},
    "full with embeddings": {"train": [{"mode": "full", "rounds": 1, "freeze_embeddings": False}]},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]
MakePlan = Callable[..., Plan]


@pytest.fixture(autouse=True)
def _own_cache_of_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked is replaced here, which no key of a kept result knows."""
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def records(tmp_path: Path) -> dict[str, Path]:
    """Per task, seven records of unlike lengths, one of them a single word; of tokens, one with a single tag besides O."""
    texts = [
        "great",
        "the table is very sad and this",
        "awful road",
        "a happy day to the tree",
        "of",
        "poor it was",
        "is fine day",
    ]
    csv = write_csv(tmp_path / "texts.csv", [(t, CLASSES["sequence-classification"][i % 3]) for i, t in enumerate(texts)])
    rows = [
        {"text": t.split(), "label": [("B-BAD", "O", "B-SO")[(i + j) % 3] for j in range(len(t.split()))]}
        for i, t in enumerate(texts)
    ]
    tags = tmp_path / "tags.jsonl"
    tags.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "sequence-classification": csv,
        "token-classification": tags,
        "image-classification": write_images(tmp_path / "images", 7),
    }


@pytest.fixture
def new_plan(base_model: Callable[[str], Path], records: dict[str, Path]) -> MakePlan:
    def make(kind: str, task: str, **changes: Any) -> Plan:
        return parse_plan(
            {
                "task": task,
                "labels": CLASSES[task],
                "rounds": 1,
                "model": {"base": str(base_model(kind)), "max_length": 8, "precision": "float32"},
                "data": {"source": str(records[task])},
                "local": {"physical_batch_size": 3},
                "privacy": {"epsilon": 2.0, "delta": 1e-3},
                **changes,
                "lora": {"rank": 2, **changes.get("lora", {})},
            }
        )

    return make


def everything(plan: Plan) -> Dataset:
    records = read_records(plan.data, task=plan.task)
    return Dataset(((records, np.arange(len(records))),), plan.labels, plan.task)


def prepared(plan: Plan) -> tuple[TrainableModel, list[nn.Parameter], TrainingSetup]:
    """The stage's setting at a client, with the parameters away from where they start: a B of zero would hide what A gets."""
    model = get_plan_model(plan, "cpu")
    stage = plan.get_stage(1)
    names = model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings)
    model.load({})
    generator = torch.Generator().manual_seed(5)
    state = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.state(names).items()}
    model.load(state)
    parameters = model.train_only(names)
    return model, parameters, build_setup(plan, stage, model, everything(plan), state, "clinic", expected_batch=4)


def one_at_a_time(given: TrainingSetup, parameters: list[nn.Parameter]) -> list[list[Tensor]]:
    """The gradient of each record, alone in its batch and without padding."""
    batches = [given.alone(row) for row in range(given.rows)]
    return [[g.double() for g in torch.autograd.grad(given.loss(batch).sum(), parameters)] for batch in batches]


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.pow(2).sum()) for t in tensors))


def moved(given: TrainingSetup, parameters: list[nn.Parameter], clip: float) -> list[Tensor]:
    """The sum of clipped gradients, as one step without noise over all records shows it."""
    before = [p.detach().double().clone() for p in parameters]
    config = DPSGDConfig(noise_multiplier=0.0, clip_norm=clip, sample_rate=1.0, expected_batch=float(given.rows), steps=1)
    optimizer = torch.optim.SGD(parameters, lr=LR)
    setup = DPSGDSetup(given.module, optimizer, given.loss, given.units, given.batches)
    assert len(list(DPSGD(config).run(setup))) == 1
    return [(b - p.detach().double()) * given.rows / LR for b, p in zip(before, parameters, strict=True)]


@pytest.mark.parametrize(("family", "mode"), crossed(FAMILIES, MODES))
def test_the_clipped_sum_is_that_of_one_record_at_a_time(new_plan: MakePlan, family: tuple[str, str], mode: str) -> None:
    kind, task = family
    plan = new_plan(kind, task, **MODES[mode])
    _, parameters, given = prepared(plan)
    gradients = one_at_a_time(given, parameters)
    norms = sorted(norm(g) for g in gradients)
    clip = norms[len(norms) // 2] * 0.99  # some are clipped and some are not
    expected = [
        sum((g[i] * min(1.0, clip / (norm(g) + 1e-6)) for g in gradients), torch.zeros(())) for i in range(len(parameters))
    ]
    actual = moved(given, parameters, clip)
    assert norm([a - e for a, e in zip(actual, expected, strict=True)]) < 1e-5 * norm(expected)


@pytest.mark.parametrize(("family", "mode"), crossed(FAMILIES, MODES))
def test_the_check_before_a_run_is_exact_and_passes(new_plan: MakePlan, family: tuple[str, str], mode: str) -> None:
    kind, task = family
    plan = new_plan(kind, task, **MODES[mode])
    _, _, given = prepared(plan)
    assert isinstance(plan.privacy, RecordPrivacy)
    assert check_gradients(given, plan.privacy, mode) < 1e-5
    check_stages(plan, get_plan_model(plan, "cpu"))


def off_in_batches(given: TrainingSetup, share: float, kinds: tuple[torch.dtype, ...]) -> TrainingSetup:
    """The setup with losses that are larger by a share of themselves beside other slots, in some kinds of arithmetic alone."""
    made_up = given.samples()

    def exact(batch: dict[str, Tensor]) -> Tensor:
        losses = made_up.exact(batch)
        arithmetic = next(made_up.module.parameters()).dtype
        return losses * (1 + share) if len(losses) > 1 and arithmetic in kinds else losses

    return replace(given, samples=lambda: replace(made_up, exact=exact))


@pytest.mark.parametrize("mode", ["lora", "full", "head"])
def test_rounding_is_told_from_a_wrong_clipped_sum(new_plan: MakePlan, mode: str) -> None:
    """Rounding of float32 goes by the shape of a batch; what another record or a wrong rule adds is there in float64, too."""
    plan = new_plan("bert", "sequence-classification", **MODES[mode])
    _, _, given = prepared(plan)
    assert isinstance(plan.privacy, RecordPrivacy)
    before = [p.detach().clone() for p in given.module.parameters()]
    assert check_gradients(off_in_batches(given, 1e-4, (torch.float32,)), plan.privacy, mode) < 1e-5
    after = list(given.module.parameters())
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(after, before, strict=True))
    anywhere = off_in_batches(given, 1e-4, (torch.float32, torch.float64))
    too_much = off_in_batches(given, 1e-2, (torch.float32,))
    for wrong in (anywhere, too_much):
        with fails_with("privacy.wrong_gradients"):
            check_gradients(wrong, plan.privacy, mode)


def test_gradients_are_checked_once_for_all_that_decides_them(new_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison asks for every combination and seed; whatever decides how gradients are taken is checked again."""
    checked: list[str] = []
    check = gradient_checks.check_gradients
    monkeypatch.setattr(gradient_checks, "check_gradients", lambda *given: (checked.append(given[2]), check(*given))[1])
    plan = new_plan("bert", "sequence-classification", train="head")
    model = get_plan_model(plan, "cpu")
    alike = [plan, plan.model_copy(update={"rounds": 9}), plan.model_copy(update={"test_fraction": 0.4})]
    for each in (*alike, *alike):
        check_stages(each, model)
    assert checked == ["head"]
    tables: list[dict[str, Any]] = [
        {"privacy": {"epsilon": 8.0, "clip_norm": 0.25}},
        {"privacy": {"epsilon": 8.0, "clipping": "per_layer"}},
        {"local": {"physical_batch_size": 5}},
        {"train": "full"},
        {"class_weights": {"good": 2.0}},
    ]
    for number, table in enumerate(tables, start=2):
        other = new_plan("bert", "sequence-classification", **{"train": "head", **table})
        for _ in range(2):
            check_stages(other, model)
            assert len(checked) == number, table
    again = TrainableModel(load_model(plan.model, plan.labels, 1, plan.task), None, plan.seed, torch.device("cpu"))
    check_stages(plan, again)  # as another process has it: known from the disk
    assert len(checked) == number


# --- classes that count more or less


@pytest.mark.parametrize("mode", ["head", "full"])
@pytest.mark.parametrize("kind", ["bert", "token"])
def test_weights_of_classes_are_within_the_clipping(new_plan: MakePlan, kind: str, mode: str) -> None:
    """A record's gradient is that of its own weighted loss, by hand, and none adds more than the bound, whatever its weight."""
    task = "sequence-classification" if kind == "bert" else "token-classification"
    first, second, *_ = CLASSES[task]
    weights = {first: 1e6, second: 0.125}
    plan = new_plan("bert", task, train=mode)
    weighted = plan.model_copy(update={"class_weights": weights})
    _, parameters, plain = prepared(plan)
    without = one_at_a_time(plain, parameters)
    losses = [plain.loss(plain.alone(row)).detach().sum() for row in range(plain.rows)]
    _, parameters, given = prepared(weighted)
    gradients = one_at_a_time(given, parameters)
    clip = 1.01 * max(norm(g) for g in without)
    for row in range(given.rows):
        batch = given.alone(row)
        labels = batch["labels"][batch["labels"] >= 0].tolist()
        by_label = [weights.get(plan.labels[label], 1.0) for label in labels]
        if len(set(by_label)) == 1:
            assert float(given.loss(batch).detach().sum()) == pytest.approx(by_label[0] * float(losses[row]), rel=1e-4)
            expected = [by_label[0] * g for g in without[row]]
            assert norm([a - b for a, b in zip(gradients[row], expected, strict=True)]) <= 1e-4 * norm(expected)
    bounded = [[g * min(1.0, clip / (norm(each) + 1e-6)) for g in each] for each in gradients]
    assert any(norm(each) > 100 * clip for each in gradients)
    assert all(norm(each) <= clip * (1 + 1e-9) for each in bounded)
    expected = [sum((each[i] for each in bounded), torch.zeros(())) for i in range(len(parameters))]
    actual = moved(given, parameters, clip)
    assert norm([a - e for a, e in zip(actual, expected, strict=True)]) < 1e-4 * norm(expected)
    assert isinstance(weighted.privacy, RecordPrivacy)
    assert check_gradients(given, weighted.privacy, mode) < 1e-5


def test_a_weight_of_no_class_is_refused_before_the_run(new_plan: MakePlan) -> None:
    """Also where the labels are found in the records, after the plan was read."""
    with pytest.raises(PlanError, match="'god'; did you mean 'good'"):
        new_plan("bert", "sequence-classification", class_weights={"god": 2.0})
    plan = new_plan("bert", "sequence-classification", class_weights={"god": 2.0}, labels=())
    resolved = plan.model_copy(update={"labels": CLASSES["sequence-classification"]})
    with pytest.raises(PlanError, match="'god'"):
        check_stages(resolved, get_plan_model(resolved, "cpu"))


@pytest.mark.parametrize("private", [True, False])
def test_a_rare_class_is_told_where_the_frequent_one_counts_less(
    new_plan: MakePlan, records: dict[str, Path], private: bool
) -> None:
    """2 of 100 records: without weights the prior of the frequent class wins, for the rare ones, too."""
    rows = [("great day" if i < 2 else "awful road", "good" if i < 2 else "bad") for i in range(100)]
    write_csv(
        records["sequence-classification"], [(f"{text} {'very ' * (i % 4)}", label) for i, (text, label) in enumerate(rows)]
    )

    def told(**weights: float) -> Tensor:
        plan = new_plan("bert", "sequence-classification", labels=("bad", "good"), class_weights=weights)
        plan = plan if private else plan.model_copy(update={"privacy": "none"})
        _, parameters, given = prepared(plan)
        optimizer = torch.optim.SGD(parameters, lr=5.0)
        config = DPSGDConfig(
            noise_multiplier=0.01 if private else 0.0,
            clip_norm=1.0 if private else 1e9,
            sample_rate=1.0,
            expected_batch=100.0,
            steps=100,
        )
        setup = DPSGDSetup(given.module, optimizer, given.loss, given.units, given.batches)
        assert len(list(DPSGD(config).run(setup))) == 100
        right = [given.correct(given.alone(row)) for row in range(2)]
        return torch.cat(right)

    assert told(bad=0.02).all()
    assert not told().any()


# --- what would be wrong is refused before the run


@pytest.mark.parametrize("mode", ["head", "lora", "full"])
def test_a_loss_that_mixes_records_is_refused(new_plan: MakePlan, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over the tokens of a batch, as Hugging Face's own losses are."""

    def over_the_batch(module: nn.Module, batch: dict[str, Tensor], weights: Tensor | None) -> Tensor:
        labels = batch["labels"]
        losses = functional.cross_entropy(logits(module, batch).movedim(-1, 1), labels, reduction="none")
        return losses.sum(dim=1) * len(labels) / (labels != -100).sum()

    def over_its_words(scores: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        losses = functional.cross_entropy(scores.movedim(-1, 1), labels, reduction="none")
        return losses.sum(dim=1) * len(labels) / (labels != -100).sum()

    monkeypatch.setattr(classes, "example_losses", over_the_batch)
    monkeypatch.setattr(classes, "losses_from_scores", over_its_words)
    plan = new_plan("bert", "token-classification", train=mode)
    with fails_with("privacy.wrong_gradients", mode):
        check_stages(plan, get_plan_model(plan, "cpu"))
    check_stages(plan.model_copy(update={"privacy": "none"}), get_plan_model(plan, "cpu"))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_parameter_used_outside_its_module_is_refused(new_plan: MakePlan, mode: str) -> None:
    plan = new_plan("vit", "image-classification", train=mode)
    model = get_plan_model(plan, "cpu")
    whole: Any = model.module
    plain = whole.forward

    def twice(**inputs: Any) -> Any:
        output = plain(**inputs)
        output.logits = output.logits + whole.classifier.weight.sum(dim=1)
        return output

    whole.forward = twice
    with fails_with("privacy.no_per_example_gradients", mode):
        check_stages(plan, model)


def test_what_opacus_refuses_is_refused_in_a_sentence(new_plan: MakePlan) -> None:
    """A parameter that takes no part in the forward pass."""
    plan = new_plan("bert", "token-classification", train="full")
    model = get_plan_model(plan, "cpu")
    model.module.add_module("unused", nn.Linear(3, 3))
    with fails_with("privacy.no_per_example_gradients", "full") as error:
        check_stages(plan, model)
    assert error.value.code == "privacy.no_per_example_gradients"


def test_adapters_on_more_layers_than_there_are_are_refused(new_plan: MakePlan) -> None:
    plan = new_plan("bert", "token-classification", train="lora", lora={"layers": 3})
    with fails_with("model.lora_layers", "lora.layers", "3", "2"):
        get_plan_model(plan, "cpu")


def test_records_described_for_another_task_are_refused(new_plan: MakePlan) -> None:
    texts = new_plan("bert", "sequence-classification")
    tokens = new_plan("bert", "token-classification")
    with fails_with("data.wrong_task", "clinic"):
        build_setup(tokens, tokens.get_stage(1), get_plan_model(tokens, "cpu"), everything(texts), {}, "clinic", expected_batch=4)


# --- what is told of records counts records


def test_of_tags_a_record_counts_once(new_plan: MakePlan) -> None:
    """Noise on counts is made for one record changing each by one at most, however many words it has."""
    plan = new_plan("bert", "token-classification", train="lora")
    held = everything(plan)
    counts = held.label_counts()
    assert sum(counts.values()) == len(held) == 7 < len(held.truth)
    ((records, rows),) = held.parts
    for left_out in range(7):
        fewer = Dataset(((records, np.delete(rows, left_out)),), plan.labels, plan.task).label_counts()
        assert sum(abs(counts[label] - fewer[label]) for label in counts) == 1


@pytest.mark.parametrize(
    ("kind", "task"), [("bert", "sequence-classification"), ("bert", "token-classification"), ("vit", "image-classification")]
)
def test_a_record_is_right_when_all_of_it_is(new_plan: MakePlan, kind: str, task: str) -> None:
    _, _, given = prepared(new_plan(kind, task, train="full", local={"physical_batch_size": 8}))
    ((rows, batch),) = given.everything()
    with torch.no_grad():
        best = logits(given.module, batch_without(batch)).argmax(dim=-1)
    batch["labels"] = torch.where(batch["labels"] == -100, batch["labels"], best)
    assert int(given.correct(batch)[: len(rows)].sum()) == 7
    wrong = batch["labels"].clone()
    place = (1, int((wrong[1] != -100).nonzero()[0])) if wrong.dim() == 2 else (1,)
    wrong[place] = (wrong[place] + 1) % 3
    assert int(given.correct({**batch, "labels": wrong})[: len(rows)].sum()) == 6


def batch_without(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}
