"""examples/digits.py: an architecture of its own, registered in every process that trains it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from cotune.data.record_reading import read_records
from cotune.models.features.head import feature_head
from cotune.plan.load import load_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.comparison.compare import compare
from cotune.simulations.comparison.grid import parse_variation
from cotune.simulations.comparison.workers import import_all
from cotune.simulations.prepare import prepare

MODULE = str(Path(__file__).parents[2] / "examples" / "digits.py")


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import_all([MODULE])
    import digits

    file: Path = digits.write_digits(tmp_path_factory.mktemp("digits"))
    return file


@pytest.fixture(scope="module")
def plan(plan_file: Path) -> Plan:
    return prepare(load_plan(plan_file), "cpu").plan


def test_the_images_are_the_digits_and_the_features_their_pixels(plan: Plan) -> None:
    images, targets = load_digits(return_X_y=True)
    records = read_records(plan.data, task=plan.task)
    assert records.labels == tuple(str(target) for target in targets)
    model = get_plan_model(plan, "cpu")
    examples = model.loaded.task.examples(model.loaded.reader, 1, records.inputs[:5], [0] * 5)
    pixels = model.loaded.task.collator(model.module, model.loaded.reader, model.device)(examples)["pixel_values"]
    assert torch.allclose(pixels.mean(dim=1).flatten(1), torch.tensor(images[:5] / 16).float(), atol=0.5 / 255)


def test_head_training_trains_the_mlp_drawn_by_the_seed(plan: Plan) -> None:
    model = get_plan_model(plan, "cpu")
    assert feature_head(model) is not None
    assert model.names("head") == ["hidden.weight", "hidden.bias", "classifier.weight", "classifier.bias"]
    assert sum(tensor.numel() for tensor in model.state(model.names("head")).values()) == 64 * 64 + 64 + 64 * 10 + 10
    first = model.state(["hidden.weight"])["hidden.weight"]
    other = get_plan_model(plan.model_copy(update={"seed": 8}), "cpu").state(["hidden.weight"])["hidden.weight"]
    assert not torch.equal(first, other)
    assert torch.equal(first, get_plan_model(plan, "cpu").state(["hidden.weight"])["hidden.weight"])


def test_registered_architecture_learns_in_processes(plan_file: Path, tmp_path: Path) -> None:
    samples = parse_variation("server.sample_size=10,3")
    given = ["rounds=5", "simulation.partition=iid"]
    found = compare(plan_file, [samples], seeds=1, overrides=given, out=tmp_path, device="cpu", imports=[MODULE])
    everybody, three = found.cells
    assert everybody.metrics["accuracy"] > 0.85
    assert (three.bytes_up or 0) * 3 < (everybody.bytes_up or 0)
    rounds = RunFolder(tmp_path / three.folder).load().history
    assert [len(entry["participants"]) for entry in rounds] == [3] * 5
    assert len({name for entry in rounds for name in entry["participants"]}) > 3
