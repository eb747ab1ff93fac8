from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from cotune.data.tasks.classes import logits
from cotune.data.tasks.text import collator, encode
from cotune.models.base.load import load_model
from cotune.models.check_cache import cache_folder
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.features.cached import get_features
from cotune.models.features.feature_batches import feature_slots
from cotune.models.features.head import feature_head
from cotune.models.trainable import State, TrainableModel
from tests.support.tiny_models import counting

Make = Callable[..., TrainableModel]
CASES = [
    ("bert", "native"),
    ("bert", "mean"),
    ("distilbert", "native"),
    ("distilbert", "mean"),
    ("gpt2", "native"),
    ("llama", "native"),
    ("qwen2", "native"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def features(model: TrainableModel, texts: Any, state: State | None = None, precision: str = "float32") -> Tensor:
    model.load(state or {})
    return get_features(model, texts, state or {}, precision)


def features_from_disk(model: TrainableModel, texts: Sequence[str]) -> Tensor:
    """Of texts that are not the very ones whose features are in memory."""
    return features(model, (*texts[:1], *texts[1:]))


@torch.no_grad()
def whole_logits(model: TrainableModel, texts: Any) -> Tensor:
    """Scores of the whole model, one text at a time."""
    collate = collator(model.module, model.loaded.reader, model.device)
    rows = encode(model.loaded.reader, texts, model.loaded.max_length)
    return torch.cat([logits(model.module, collate([{"input_ids": row, "labels": 0}])) for row in rows])


def head_logits(model: TrainableModel, vectors: Tensor) -> Tensor:
    head = feature_head(model)
    assert head is not None
    got: Tensor = head(vectors).logits
    return got


def moved(model: TrainableModel, names: list[str]) -> State:
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in model.state(names).items()}


# --- the head on features is the model


@pytest.mark.parametrize(("kind", "pooling"), CASES)
def test_the_head_on_features_gives_the_models_logits(shared: Make, texts: tuple[str, ...], kind: str, pooling: str) -> None:
    model = shared(kind, pooling=pooling)
    vectors = features(model, (*texts, ""))
    assert vectors.shape == (len(texts) + 1, 16)
    assert vectors.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(head_logits(model, vectors), whole_logits(model, (*texts, "")), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "qwen2"])
def test_also_for_a_text_that_spells_the_padding_token(shared: Make, kind: str) -> None:
    model = shared(kind)
    tricky = ("great table [PAD]", "great table", "[PAD] tree", "[PAD]")
    with torch.no_grad():
        got = head_logits(model, features(model, tricky))
    torch.testing.assert_close(got, whole_logits(model, tricky), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "qwen2"])
def test_also_with_adapters_and_another_state(shared: Make, texts: tuple[str, ...], kind: str) -> None:
    targets: Any = ("q_lin", "v_lin") if kind == "distilbert" else "auto"
    model = shared(kind, lora=LoraConfig(rank=2, targets=targets))
    state = moved(model, model.names("lora"))
    with torch.no_grad():
        got = head_logits(model, features(model, texts, state))
    torch.testing.assert_close(got, whole_logits(model, texts), atol=1e-4, rtol=1e-4)


def test_training_the_head_trains_the_model(shared: Make, texts: tuple[str, ...]) -> None:
    model = shared("bert")
    head = feature_head(model)
    assert head is not None
    vectors = features(model, texts)
    before = model.state([name for name, _ in model.parameters()])
    optimizer = torch.optim.SGD(model.train_only(model.names("head")), lr=1.0)
    labels = torch.tensor([0, 1, 2, 0, 1])
    loss = functional.cross_entropy(head(vectors).logits, labels)
    loss.backward()
    optimizer.step()
    after = model.state([name for name, _ in model.parameters()])
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"classifier.weight", "classifier.bias"}
    assert float(functional.cross_entropy(whole_logits(model, texts), labels)) < float(loss.detach())
    with torch.no_grad():
        torch.testing.assert_close(head(vectors).logits, whole_logits(model, texts), atol=1e-4, rtol=1e-4)
    assert {id(p) for p in head.parameters()} == {id(dict(model.parameters())[n]) for n in model.names("head")}


def test_the_head_leaves_the_model_whole(shared: Make, texts: tuple[str, ...]) -> None:
    model = shared("bert")
    before = whole_logits(model, texts)
    names = [name for name, _ in model.parameters()]
    assert feature_head(model) is not None
    assert [name for name, _ in model.parameters()] == names
    assert torch.equal(whole_logits(model, texts), before)


def test_a_model_whose_head_reads_more_than_one_vector_has_none(shared: Make, texts: tuple[str, ...]) -> None:
    model = shared("bert")
    classify: Any = model.loaded.module

    def both(**inputs: Any) -> Any:
        output = classify.bert(**inputs)
        output["logits"] = classify.classifier(output.last_hidden_state.pow(2).sum(dim=1))
        return output

    model.module.forward = both  # type: ignore[method-assign]
    assert feature_head(model) is None


# --- features depend on text, model and arithmetic alone


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_features_do_not_depend_on_the_order(
    shared: Make, texts: tuple[str, ...], precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = shared("bert", pooling="mean")
    many = [f"{a} {b} {c}" for a in texts for b in texts for c in texts]  # more than one batch
    expected = features(model, many, precision=precision)
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "other"))
    order = torch.randperm(len(many), generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(features(model, [many[i] for i in order], precision=precision), expected[order])


def test_features_do_not_depend_on_what_was_computed_before(shared: Make, texts: tuple[str, ...]) -> None:
    alone = features(shared("bert"), texts)
    model = shared("bert", lora=LoraConfig(rank=2))
    features(model, texts, moved(model, model.names("full")))
    assert torch.equal(features(model, texts), alone)


def test_bfloat16_is_close_but_kept_apart(shared: Make, texts: tuple[str, ...]) -> None:
    model = shared("bert")
    exact, rough = (features(model, texts, precision=p) for p in ("float32", "bfloat16"))
    assert rough.dtype == torch.float32
    assert 0 < float((exact - rough).abs().max()) < 0.1
    assert torch.equal(features(model, texts), exact)


def test_no_texts_no_features(shared: Make) -> None:
    assert len(features(shared("bert"), ())) == 0


def test_unencodable_text_has_no_feature_and_others_stay(shared: Make, texts: tuple[str, ...]) -> None:
    """Such a tokenizer would otherwise tell that somebody holds the text."""
    model = shared("bert")
    expected = features(model, texts)
    reader = model.loaded.reader

    class Moody:
        def __getattr__(self, name: str) -> Any:
            return getattr(reader, name)

        def __call__(self, given: Any, **options: Any) -> Any:
            if any("awful" in text for text in ([given] if isinstance(given, str) else given)):
                raise OverflowError("no")
            return reader(given, **options)

    object.__setattr__(model.loaded, "reader", Moody())
    with_nothing = features(model, (*texts, "an awful day"))
    assert bool(with_nothing[[2, 5]].isnan().all())
    others = [0, 1, 3, 4]
    assert torch.equal(with_nothing[others], expected[others])


def test_progress_is_told(shared: Make) -> None:
    told: list[tuple[int, int]] = []
    model = shared("bert")
    model.load({})
    get_features(model, [f"great table {i}" for i in range(150)], {}, "float32", lambda done, total: told.append((done, total)))
    slots = feature_slots(model.device)
    assert told == [(min(150, done), 150) for done in range(slots, 150 + slots, slots)]  # the texts are of one length


def test_equal_texts_have_equal_features_in_bfloat16(shared: Make) -> None:
    model = shared("bert")
    model.load({})
    texts = ["great table", *(f"the {word} road" for word in ["sad"] * 70), "great table"]
    found = get_features(model, texts, {}, "bfloat16")
    assert torch.equal(found[0], found[-1])
    assert not torch.equal(found[0], found[1])


# --- the cache


def test_the_second_time_the_encoder_does_not_run(shared: Make, texts: tuple[str, ...], cache: Path) -> None:
    first = shared("bert")
    with counting(first) as calls:
        expected = features(first, texts)
    assert feature_slots(first.device) in calls
    assert len(list(cache.glob("*.safetensors"))) == 1
    again = shared("bert", seed=9)  # another process with another head
    assert feature_head(again) is not None  # finds out what the head reads, once
    with counting(again) as calls:
        assert torch.equal(features(again, texts), expected)
        features(again, texts, moved(again, again.names("head")))  # the head is no part of the features
    assert calls == []


def test_the_last_features_stay_in_memory(shared: Make, texts: tuple[str, ...], cache: Path) -> None:
    model = shared("bert")
    computed, first, again = (features(model, texts) for _ in range(3))
    assert again is first is computed
    assert torch.equal(features_from_disk(model, texts), computed)
    features(model, texts[:-1])
    assert features(model, texts) is not first


def test_the_memory_knows_lists_that_were_changed(shared: Make, texts: tuple[str, ...], cache: Path) -> None:
    model = shared("bert")
    given = list(texts)
    before = features(model, given)
    given[0], given[1] = given[1], given[0]
    assert torch.equal(features(model, given)[[1, 0]], before[:2])


def garbage(file: Path) -> None:
    file.write_bytes(b"no tensors")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def too_short(file: Path) -> None:
    save_file({"features": torch.zeros(2, 16)}, file)


def named_otherwise(file: Path) -> None:
    save_file({"vectors": torch.zeros(5, 16)}, file)


@pytest.mark.parametrize("damage", [garbage, truncated, emptied, too_short, named_otherwise])
def test_a_damaged_file_is_computed_again(
    shared: Make, texts: tuple[str, ...], cache: Path, damage: Callable[[Path], None]
) -> None:
    model = shared("bert")
    expected = features(model, texts)
    (file,) = cache.glob("*.safetensors")
    damage(file)
    assert torch.equal(features(model, texts), expected)
    with counting(model) as calls:
        assert torch.equal(features_from_disk(model, texts), expected)
    assert set(calls) == {feature_slots(model.device)}
    with counting(model) as calls:
        features_from_disk(model, texts)
    assert calls == []  # and corrected


def test_a_cache_that_cannot_be_written_is_done_without(
    shared: Make, texts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared("bert")
    expected = features(model, texts)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "file" / "cache"))  # a folder cannot be made in a file
    for _ in range(2):
        with counting(model) as calls:
            assert torch.equal(features_from_disk(model, texts), expected)
        assert set(calls) == {feature_slots(model.device)}


def test_another_encoder_state_gives_other_features(shared: Make, texts: tuple[str, ...]) -> None:
    model = shared("bert", lora=LoraConfig(rank=2))
    plain = features(model, texts)
    adapted = features(model, texts, moved(model, model.names("lora")))
    trained = features(model, texts, moved(model, model.names("full")))
    for one, other in ((plain, adapted), (plain, trained), (adapted, trained)):
        assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(features(model, texts), plain)


def test_other_adapters_of_the_same_factors_change_features(shared: Make, texts: tuple[str, ...]) -> None:
    """The frozen A is drawn from the seed and is in no state: features with another A are others."""
    model = shared("bert", lora=LoraConfig(rank=2), seed=1)
    state = moved(model, model.names("lora"))
    one = features(model, texts, state)
    for other in (
        shared("bert", lora=LoraConfig(rank=2), seed=2),
        shared("bert", lora=LoraConfig(rank=2, alpha=4), seed=1),
    ):
        got = features(other, texts, state)
        with torch.no_grad():
            torch.testing.assert_close(head_logits(other, got), whole_logits(other, texts), atol=1e-4, rtol=1e-4)
        assert not torch.equal(got, one)


def test_another_tokenizer_gives_other_features(
    base_model: Callable[[str], Path], texts: tuple[str, ...], tmp_path: Path
) -> None:
    """The hash of the weights says nothing of how texts become tokens."""

    def model(folder: Path) -> TrainableModel:
        config = ModelConfig(base=str(folder), max_length=32)
        return TrainableModel(load_model(config, ("bad", "good", "so"), 3), None, 3, torch.device("cpu"))

    first = features(model(base_model("bert")), texts)
    folder = Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    declared = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = declared["model"]["vocab"]
    vocabulary["the"], vocabulary["great"] = vocabulary["great"], vocabulary["the"]
    (folder / "tokenizer.json").write_text(json.dumps(declared))
    changed = model(folder)
    got = features(changed, texts)
    with torch.no_grad():
        torch.testing.assert_close(head_logits(changed, got), whole_logits(changed, texts), atol=1e-4, rtol=1e-4)
    assert not torch.equal(got, first)


def test_the_length_and_the_texts_are_part_of_the_key(shared: Make, texts: tuple[str, ...], cache: Path) -> None:
    features(shared("bert"), texts)
    features(shared("bert", max_length=4), texts)
    features(shared("bert"), texts[:-1])
    features(shared("bert"), (*texts[:-2], texts[-2] + texts[-1]))
    features(shared("llama"), texts)
    assert len(list(cache.glob("*.safetensors"))) == 5
    assert not list(cache.glob("*.part"))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("COTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "cotune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "cotune"


def test_a_user_without_a_home_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a batch system: no HOME, and a number that no user has."""
    for name in ("COTUNE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    assert cache_folder() == Path(tempfile.gettempdir()) / f"cotune-{2**31 - 7}"
