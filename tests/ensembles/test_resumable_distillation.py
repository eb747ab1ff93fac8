"""Distillation: its loss by hand, a student that learns, and interruptions that change nothing."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from cotune.ensembles import resumable_distillation
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.predictor import open_model
from cotune.ensembles.resumable_distillation import RECORD, Distillation, distill
from cotune.ensembles.student_training import distillation_loss
from cotune.errors import RunError
from cotune.models.config import ModelConfig
from cotune.models.evaluation.predictor import open_predictor
from tests.support.datasets import sentences
from tests.support.exported_models import export_random
from tests.support.failures import fails_with

LABELS = ("bad", "good", "so")


def test_loss_at_temperature_one_is_cross_entropy_less_entropy() -> None:
    scores = torch.randn(5, 3)
    taught = torch.softmax(torch.randn(5, 3), dim=1)
    loss = distillation_loss(scores, taught, None, DistillationConfig(temperature=1.0))
    entropy = -(taught * taught.log()).sum(dim=1).mean()
    assert loss == pytest.approx(float(functional.cross_entropy(scores, taught) - entropy), abs=1e-6)


def test_the_loss_of_a_perfect_student_is_zero() -> None:
    scores = torch.randn(5, 3)
    taught = torch.softmax(scores, dim=1)
    for config in (DistillationConfig(temperature=3.0), DistillationConfig(loss="mse")):
        assert float(distillation_loss(scores + 7, taught, None, config)) == pytest.approx(0.0, abs=1e-5)


def test_gradients_keep_their_size_over_temperatures() -> None:
    """T² makes up for the 1/T² of softened gradients (Hinton et al., section 2): for large T they hardly change with T."""
    taught = torch.softmax(torch.randn(4, 3), dim=1)
    norms = []
    for temperature in (50.0, 100.0):
        scores = torch.zeros(4, 3, requires_grad=True)
        distillation_loss(scores, taught, None, DistillationConfig(temperature=temperature)).backward()
        assert scores.grad is not None
        norms.append(float(scores.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_labels_alone_are_plain_cross_entropy() -> None:
    scores = torch.randn(5, 3)
    truth = torch.tensor([0, 1, 2, 1, 0])
    taught = torch.full((5, 3), 1 / 3)
    loss = distillation_loss(scores, taught, truth, DistillationConfig(label_weight=1.0))
    assert loss == pytest.approx(float(functional.cross_entropy(scores, truth)))


@pytest.fixture(scope="module")
def names(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of two teachers of unlike architectures, with their classes in different orders, which tests only read."""
    folder = tmp_path_factory.mktemp("teachers")
    return [
        str(export_random(base_model("bert"), folder / "first", LABELS, seed=1)),
        str(export_random(base_model("gpt2"), folder / "second", ("so", "bad", "good"), seed=2)),
    ]


@pytest.fixture
def work(names: list[str], base_model: Callable[[str], Path], tmp_path: Path) -> Distillation:
    """Two teachers, and a student of a third architecture."""
    inputs = [text for text, _ in sentences(80)]
    config = DistillationConfig(epochs=3, learning_rate=3e-3, batch_size=8)
    base = ModelConfig.model_validate({"base": str(base_model("distilbert")), "max_length": 16})
    return Distillation([open_model(n, "cpu") for n in names], names, base, config, inputs, None, tmp_path / "student", "cpu")


def divergence(student: Path, work: Distillation) -> float:
    """Mean KL(mean of the teachers ‖ student) on inputs that the student has learned from, recomputed: nats."""
    inputs = [given for row, given in enumerate(work.inputs) if row % 10]
    first, second = (np.stack([row.numpy()[0] for row in t.probabilities(inputs)]) for t in work.teachers)
    mean = (first + second[:, [1, 2, 0]]) / 2
    said = np.stack([row.numpy()[0] for row in open_predictor(str(student), "cpu").probabilities(inputs)])
    return float((mean * np.log(mean / said)).sum(axis=1).mean())


def test_a_student_learns_what_its_teachers_say(work: Distillation) -> None:
    long = replace(work, config=replace(work.config, epochs=12, learning_rate=1e-2, temperature=1.0))
    found = distill(long)
    still = replace(work, config=replace(work.config, epochs=1, learning_rate=1e-8), out=work.out.with_name("untrained"))
    untrained = distill(still)
    assert divergence(work.out, work) < divergence(still.out, work) / 3
    assert found["held_out"]["kl"] < untrained["held_out"]["kl"]
    assert open_predictor(str(work.out), "cpu").labels == LABELS
    assert json.loads((work.out / RECORD).read_text())["teachers"][0]["sha256"] == work.teachers[0].content_hash
    assert not work.part.exists()


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_an_interrupted_distillation_goes_on_to_the_same_student(
    work: Distillation, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """Interrupted right after a pass was kept, or before the first one."""
    whole = distill(replace(work, out=work.out.with_name("whole")))
    keep = resumable_distillation.keep_pass

    def keep_and_stop(part: Path, epoch: int, state: dict[str, torch.Tensor]) -> None:
        if epoch > passes:
            raise KeyboardInterrupt
        keep(part, epoch, state)

    monkeypatch.setattr(resumable_distillation, "keep_pass", keep_and_stop)
    with pytest.raises(KeyboardInterrupt):
        distill(work)
    assert not work.out.exists()
    monkeypatch.setattr(resumable_distillation, "keep_pass", keep)
    again = distill(work)
    assert again == whole
    assert (work.out / "model.safetensors").read_bytes() == (work.out.with_name("whole") / "model.safetensors").read_bytes()


def test_unfinished_distillation_of_other_settings_is_ignored(work: Distillation) -> None:
    work.part.mkdir()
    (work.part / "settings.json").write_text("{}")
    with pytest.raises(RunError) as caught:
        distill(work)
    assert caught.value.code == "run.other_settings"


def test_a_folder_that_is_there_is_not_overwritten(work: Distillation) -> None:
    work.out.mkdir()
    with pytest.raises(RunError) as caught:
        distill(work)
    assert caught.value.code == "run.folder_exists"


def test_a_disk_that_is_full_is_named_and_the_work_goes_on(work: Distillation, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distill(replace(work, out=work.out.with_name("whole")))
    keep = resumable_distillation.keep_pass

    def keep_one(part: Path, epoch: int, state: dict[str, torch.Tensor]) -> None:
        if epoch > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        keep(part, epoch, state)

    monkeypatch.setattr(resumable_distillation, "keep_pass", keep_one)
    with fails_with("run.not_writable"):
        distill(work)
    monkeypatch.setattr(resumable_distillation, "keep_pass", keep)
    assert distill(work) == whole


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_less_than_all_can_be_trained(work: Distillation, mode: str) -> None:
    config = DistillationConfig(train=mode, epochs=1, learning_rate=1e-2)  # type: ignore[arg-type]
    assert distill(replace(work, config=config))["held_out"]["answers"] == 8
