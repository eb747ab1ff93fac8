"""Heads on the layers of an encoder: what they read, that records keep to themselves, and the map that everybody makes alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from cotune.data.tasks.classes import logits
from cotune.errors import ModelError
from cotune.models.base.load import load_model
from cotune.models.base.lookup import find_base
from cotune.models.config import FeatureConfig, ModelConfig
from cotune.models.features import public_map
from cotune.models.features.cached import get_features
from cotune.models.features.head import feature_head
from cotune.models.features.precision import features_mix
from cotune.models.features.public_map import (
    AffineMap,
    FittedMap,
    _features,
    _get_map,
    _order_shifts,
    fit_map,
    get_public_map,
    pin_model,
)
from cotune.models.local_events import observe_models
from cotune.models.record_independence import MAX_PADDING_ERROR, padding_error
from cotune.models.trainable import TrainableModel

LABELS = ("bad", "good", "so")
TEXTS = ("great table", "tree great bad great table awful lamp", "lamp", "")
FEATURE = {"layers": [0, 2], "cls": True}
Base = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))


def config_of(base: Path, **feature: Any) -> ModelConfig:
    return ModelConfig.model_validate({"base": str(base), "max_length": 32, "feature": {**FEATURE, **feature}})


def model_of(base: Path, **feature: Any) -> TrainableModel:
    return TrainableModel(load_model(config_of(base, **feature), LABELS, 1), None, 1, torch.device("cpu"))


@torch.no_grad()
def read_by_hand(base: Path, text: str) -> np.ndarray[Any, Any]:
    """Layers 0 and 2 averaged over the tokens of one text without padding, and the first token of the last layer."""
    batch = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")
    module = AutoModel.from_pretrained(base).eval()
    hidden = module(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    return np.concatenate([hidden[0][0].mean(0).numpy(), hidden[2][0].mean(0).numpy(), hidden[-1][0, 0].numpy()])


# --- what is read


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_features_are_the_means_of_layers_through_the_map(base_model: Base, kind: str) -> None:
    model = model_of(base_model(kind))
    found = get_features(model, TEXTS[:3], {}, "float32").numpy()
    map = get_public_map(model.loaded.folder, FeatureConfig.model_validate(FEATURE))
    for row, text in zip(found, TEXTS[:3], strict=True):
        by_hand = map.matrix.numpy().astype(float) @ (read_by_hand(base_model(kind), text).astype(float) - map.center.numpy())
        assert row == pytest.approx(by_hand, abs=1e-5)


def test_without_a_map_features_are_taken_as_they_are(base_model: Base) -> None:
    model = model_of(base_model("bert"), whiten="none")
    (row,) = get_features(model, TEXTS[:1], {}, "float32").numpy()
    assert row == pytest.approx(read_by_hand(base_model("bert"), TEXTS[0]), abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama"])
def test_the_head_on_features_gives_the_models_scores(base_model: Base, kind: str) -> None:
    model = model_of(base_model(kind))
    head = feature_head(model)
    assert head is not None
    collate = model.loaded.task.collator(model.module, model.loaded.reader, model.device)
    with torch.no_grad():
        scores = torch.cat([logits(model.module, collate([e])) for e in model.loaded.encode_unlabeled(TEXTS)])
        torch.testing.assert_close(head(get_features(model, TEXTS, {}, "float32")).logits, scores, atol=1e-4, rtol=1e-4)


def test_the_head_is_all_that_is_trained(base_model: Base) -> None:
    assert model_of(base_model("bert")).names("head") == ["classifier.weight", "classifier.bias"]


def test_a_new_head_follows_from_the_seed_alone(base_model: Base) -> None:
    """The first of both makes the map, the second one finds it on the disk."""
    one, other = (model_of(base_model("bert")) for _ in range(2))
    names = one.names("head")
    assert all(torch.equal(a, b) for a, b in zip(one.state(names).values(), other.state(names).values(), strict=True))


# --- records keep to themselves


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_record_reads_no_padding_and_no_other_record(base_model: Base, kind: str) -> None:
    model = model_of(base_model(kind))
    assert not features_mix(model, torch.float32)
    assert padding_error(model, model.loaded.task.samples(model.loaded.reader)) <= MAX_PADDING_ERROR


def test_another_map_has_other_features_on_disk(base_model: Base, tmp_path: Path) -> None:
    for feature in ({}, {"whiten": "none"}, {"cls": False}, {"layers": [1, 2]}):
        get_features(model_of(base_model("bert"), **feature), TEXTS, {}, "float32")
    assert len(list((tmp_path / "cache" / "features").glob("*.safetensors"))) == 4


# --- the map


def test_the_map_is_the_formula() -> None:
    """Against NumPy, in one expression: (C + 0.01)^(-3/8) between coordinates scaled to one, to a norm of 2."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)
    found = fit_map(torch.tensor(rows)).choose(None)
    assert found is not None
    scaled = (rows - rows.mean(0)) / rows.std(0, ddof=1)
    values, directions = np.linalg.eigh(scaled.T @ scaled / 500 + 0.01 * np.eye(6))
    told = scaled @ directions @ np.diag(values**-0.375) @ directions.T
    told *= 2 / np.sqrt((told**2).sum(1).mean())
    mapped = (rows - found.center.numpy()) @ found.matrix.numpy().T
    assert mapped == pytest.approx(told, abs=5e-3)
    assert np.sqrt((mapped**2).sum(1).mean()) == pytest.approx(2, abs=1e-2)


def test_a_coordinate_that_never_moves_counts_for_nothing() -> None:
    rng = np.random.default_rng(2)
    rows = torch.tensor(rng.normal(size=(100, 4)))
    rows[:, 2] = 5.0 + 1e-15 * rows[:, 0]
    found = fit_map(rows).choose(None)
    assert found is not None
    assert bool(found.matrix.isfinite().all())
    assert bool((found.matrix[:, 2] == 0).all())


def test_rounding_hides_what_processors_differ_by(base_model: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other threads, and with errors ten times those of float64, everybody has the map that somebody else has pinned."""
    monkeypatch.setattr(public_map, "_TEXTS", 600)  # of 4000: as many orders of summation, in a seventh of the time
    folder = find_base(ModelConfig(base=str(base_model("bert"))))
    rows = torch.cat(list(_features(folder, (0, 2), True)))
    pinned = hash_of(fit_map(rows))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert hash_of(fit_map(torch.cat(list(_features(folder, (0, 2), True)))), pinned) == pinned
    finally:
        torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(1)
    noisy = rows * (1 + 1e-14 * torch.randn(rows.shape, generator=generator, dtype=torch.float64))
    assert hash_of(fit_map(noisy), pinned) == pinned
    assert fit_map(rows * (1 + 1e-3)).choose(pinned) is None


def hash_of(fitted: FittedMap, expected: str | None = None) -> str:
    found = fitted.choose(expected)
    assert found is not None
    return found.hash


def test_a_number_between_two_points_of_the_grid_is_rounded_alike() -> None:
    """Half a step plus and minus an error is apart as the grid lies by itself, and the same as it is laid."""
    middle = torch.eye(2, dtype=torch.float64) * 0.5 / 8192
    maps = [fitted_by_hand(middle + error) for error in (-1e-12, 1e-12)]
    pinned = hash_of(maps[0])
    assert [hash_of(map, pinned) for map in maps] == [pinned, pinned]
    by_itself = [map._round(0.0).hash for map in maps]
    assert by_itself[0] != by_itself[1]


def test_every_way_in_which_the_grid_can_lie_is_found_by_its_hash() -> None:
    fitted = fitted_by_hand(torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    hashes = {fitted._round(shift / 16).hash for shift in range(16)}
    assert len(hashes) == 16
    assert {hash_of(fitted, each) for each in hashes} == hashes
    exact = fitted.matrix.numpy()
    assert all(fitted._round(shift / 16).matrix.numpy() == pytest.approx(exact, abs=0.51 / 8192) for shift in range(16))


def fitted_by_hand(matrix: torch.Tensor) -> FittedMap:
    ones = torch.ones(len(matrix), dtype=torch.float64)
    return FittedMap(0 * ones, matrix, ones, _order_shifts(matrix))


def test_a_map_that_another_user_can_have_written_is_fitted_again(base_model: Base, tmp_path: Path) -> None:
    folder = find_base(ModelConfig(base=str(base_model("bert"))))
    feature = FeatureConfig.model_validate(FEATURE)
    expected = get_public_map(folder, feature).hash
    (file,) = (tmp_path / "cache" / "maps").glob("*.safetensors")
    kept = load_file(file)
    save_file({**kept, "center": kept["center"] + 1}, file)
    _get_map.cache_clear()
    assert get_public_map(folder, feature).hash != expected, "the file is what is read"
    file.chmod(0o666)
    _get_map.cache_clear()
    assert get_public_map(folder, feature).hash == expected


def test_fitting_is_told(base_model: Base) -> None:
    told: list[tuple[str, int, int]] = []
    _get_map.cache_clear()
    with observe_models(lambda what, about: told.append((what, about["done"], about["total"]))):
        model_of(base_model("bert"))
        count = len(told)
        _get_map.cache_clear()
        model_of(base_model("bert"))
    assert (told[0], told[-1]) == (("map", 0, 4000), ("map", 4000, 4000))
    assert len(told) == count, "it is kept"


def test_a_plan_that_states_another_map_is_refused(base_model: Base) -> None:
    folder = find_base(ModelConfig(base=str(base_model("bert"))))
    pinned = pin_model(config_of(base_model("bert")), folder)
    assert pinned.feature is not None
    assert pinned.base_hash == folder.content_hash
    assert load_model(pinned, LABELS, 1).feature[-1] == pinned.feature.map_hash
    with pytest.raises(ModelError) as caught:
        load_model(config_of(base_model("bert"), map_hash="0" * 64), LABELS, 1)
    assert caught.value.code == "model.other_map"


def test_a_hash_is_of_shapes_and_numbers() -> None:
    map = AffineMap(torch.zeros(2), torch.eye(2))
    changed = [AffineMap(torch.ones(2), torch.eye(2)), AffineMap(torch.zeros(2), -torch.eye(2))]
    assert len({map.hash, *(each.hash for each in changed)}) == 3


# --- what cannot be had


@pytest.mark.parametrize("layers", [[3], [0, 9]])
def test_layers_that_are_not_there_are_refused(base_model: Base, layers: list[int]) -> None:
    with pytest.raises(ModelError) as caught:
        model_of(base_model("bert"), layers=layers)
    assert caught.value.code == "model.no_layers"
