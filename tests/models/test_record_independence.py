from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotune.data.inputs.batching import fixed_batches
from cotune.data.tasks.classes import Batch, logits
from cotune.errors import PrivacyError
from cotune.models import record_independence
from cotune.models.base.load import load_model
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.features import precision
from cotune.models.features.cached import get_features
from cotune.models.features.head import encode_vectors, feature_head
from cotune.models.features.precision import feature_dtype
from cotune.models.record_independence import MAX_PADDING_ERROR, check_independence, padding_error
from cotune.models.synthetic_batches import bucket_lengths, example_probes, mixes_records
from cotune.models.trainable import TrainableModel
from tests.support.architectures import READ_PADDING, REFUSED, folder_of, loaded_from
from tests.support.language_models import write_language_model
from tests.support.matrix import crossed
from tests.support.tiny_models import ARCHITECTURES, VOCABULARY

Make = Callable[..., TrainableModel]
WORDS = [word for word in VOCABULARY if not word.startswith("[")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, shared: Make) -> Callable[[str], TrainableModel]:
    """kind -> one model, kept."""
    made: dict[str, TrainableModel] = {}

    def make(kind: str) -> TrainableModel:
        if kind not in made:
            made[kind] = shared(kind) if kind in ARCHITECTURES else loaded_from(folder_of(kind, tmp_path_factory.mktemp(kind)))
        return made[kind]

    return make


@pytest.fixture(autouse=True)
def _own_cache_of_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are spoiled in memory here, which no key of a kept result knows."""
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "checks"))


def error_of(model: TrainableModel) -> float:
    return padding_error(model, model.loaded.task.samples(model.loaded.reader))


# --- padding


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "roberta", "albert"])
def test_what_hides_its_padding_is_admitted(models: Callable[[str], TrainableModel], kind: str) -> None:
    model = models(kind)
    assert error_of(model) < MAX_PADDING_ERROR / 5
    for mode in ("head", "full"):
        assert check_independence(model, mode, "float32", slots=5, lengths=[8, 24]) == torch.float32  # type: ignore[arg-type]


def test_scores_next_to_nothing_are_no_sign_of_padding(models: Callable[[str], TrainableModel]) -> None:
    """A new head may be drawn so that an example's scores cancel: what is left of them is float32's own error."""
    model = models("bert")
    loaded = model.loaded
    example = loaded.task.samples(loaded.reader)[0]
    head: Any = loaded.module.classifier
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    try:
        with torch.no_grad():
            head.bias.zero_()
            batch = loaded.task.collator(loaded.module, loaded.reader, model.device)([example])
            vector = encode_vectors(model, batch, torch.float32)[0]
            head.weight -= torch.outer(head.weight @ vector, vector) / vector.square().sum()
            scores = loaded.task.scores(loaded.module, batch)
        assert float(scores.norm()) < 1e-6 * float(head.weight.norm() * vector.norm())
        assert error_of(model) < MAX_PADDING_ERROR
    finally:
        head.load_state_dict(before)


@pytest.mark.parametrize("kind", READ_PADDING)
def test_what_reads_its_padding_shows(models: Callable[[str], TrainableModel], kind: str) -> None:
    assert error_of(models(kind)) > 10 * MAX_PADDING_ERROR


@pytest.mark.parametrize(("mode", "kind"), crossed(["head", "full"], REFUSED))
def test_what_reads_its_padding_is_refused(models: Callable[[str], TrainableModel], kind: str, mode: Any) -> None:
    with pytest.raises(PrivacyError):
        check_independence(models(kind), mode, "float32", slots=5, lengths=[8])


def test_trying_changes_nothing_in_the_model(models: Callable[[str], TrainableModel]) -> None:
    model = models("roberta")
    names = [name for name, _ in model.parameters()]
    before = model.state(names)
    error_of(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state(names).items())


def test_images_have_no_padding(base_model: Callable[[str], Path]) -> None:
    model = image_model(base_model)
    assert error_of(model) < MAX_PADDING_ERROR
    assert check_independence(model, "head", "bfloat16") == torch.bfloat16


def image_model(base_model: Callable[[str], Path]) -> TrainableModel:
    loaded = load_model(ModelConfig(base=str(base_model("vit"))), ("a", "b"), 1, "image-classification")
    return TrainableModel(loaded, None, 1, torch.device("cpu"))


def test_tags_are_independent(base_model: Callable[[str], Path]) -> None:
    loaded = load_model(ModelConfig(base=str(base_model("bert")), max_length=32), ("O", "B"), 1, "token-classification")
    model = TrainableModel(loaded, None, 1, torch.device("cpu"))
    assert error_of(model) < MAX_PADDING_ERROR
    check_independence(model, "full", "float32", slots=5, lengths=[8, 16])


# --- bits


def scores(model: TrainableModel) -> Callable[[Batch], Sequence[Tensor]]:
    @torch.no_grad()
    def answer(batch: Batch) -> Sequence[Tensor]:
        return [logits(model.module, batch)]

    return answer


def normalized_over_the_batch(given: Tensor) -> Tensor:
    return given - given.mean(dim=0)


def scaled_to_the_batch(given: Tensor) -> Tensor:
    """As dynamic quantization does, with the range of all."""
    return given / given.abs().mean()


def told_by_position(given: Tensor) -> Tensor:
    return torch.cat([given[:-2], given[-2:].nextafter(torch.tensor(9.0))])


@pytest.mark.parametrize("fault", [normalized_over_the_batch, scaled_to_the_batch, told_by_position])
def test_what_mixes_rows_is_found(models: Callable[[str], TrainableModel], fault: Callable[[Tensor], Tensor]) -> None:
    model = models("bert")
    plain = scores(models("bert"))
    for length in (8, 16):
        assert not mixes_records(plain, example_probes(model, length, 7))
        assert mixes_records(lambda batch: [fault(plain(batch)[0])], example_probes(model, length, 7))


def test_gradients_that_mix_are_refused_and_auto_falls_back(shared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """per_slot is called in the arithmetic that is tried."""
    model = shared("bert")

    def mixing_in_bfloat16(batch: Batch) -> list[Tensor]:
        gradient = torch.randn(len(batch["labels"]), 3, generator=torch.Generator().manual_seed(1))
        return [gradient if torch.is_autocast_enabled("cpu") else torch.ones_like(gradient)]

    monkeypatch.setattr(record_independence, "bfloat16_is_fast", lambda _: True)
    options: Any = {"per_slot": mixing_in_bfloat16, "slots": 5, "lengths": [8]}
    assert check_independence(model, "full", "auto", **options) == torch.float32
    with pytest.raises(PrivacyError):
        check_independence(model, "full", "bfloat16", **options)
    assert check_independence(model, "full", "auto", slots=5, lengths=[8]) == torch.bfloat16


def test_features_fall_back_when_bfloat16_mixes(shared: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda _: True)
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "fine"))
    assert feature_dtype(shared("bert"), "auto") == torch.bfloat16
    monkeypatch.setattr(precision, "mixes_records", lambda *_: True)
    assert feature_dtype(shared("bert"), "auto") == torch.bfloat16  # it was tried on this machine
    for _ in range(2):  # what mixes is tried again
        monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "other"))
        assert feature_dtype(shared("bert"), "auto") == torch.float32


def test_every_length_that_a_record_can_have_is_tried(shared: Make, base_model: Callable[[str], Path]) -> None:
    assert bucket_lengths(shared("bert")) == (8, 16, 24, 32)
    assert bucket_lengths(shared("bert", max_length=20)) == (8, 16, 20)
    assert bucket_lengths(image_model(base_model)) == (1,)


# --- no state decides what a trial sees


def head_on(model: TrainableModel, faulty: bool, calls: list[int]) -> Callable[[Batch], Sequence[Tensor]]:
    """Scores of features; of a faulty head they differ in the last bits from slot to slot, but not where they are 0."""
    head = feature_head(model)
    assert head is not None

    @torch.no_grad()
    def answer(batch: Batch) -> Sequence[Tensor]:
        calls.append(len(batch["labels"]))
        places = torch.arange(len(batch["labels"]))[:, None]
        return [head(batch["features"]).logits * (1 + places * faulty * 2.0**-22)]

    return answer


def zeros(model: TrainableModel) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in model.state(model.names("head")).items()}


def test_a_head_of_zeros_hides_nothing(shared: Make) -> None:
    """A server chooses the state; under zeros every order of adding gives the same sum."""
    model = shared("bert")
    model.load(zeros(model))
    with pytest.raises(PrivacyError):
        check_independence(model, "head", "float32", head_on(model, True, []), slots=16, width=16)
    assert not any(float(tensor.abs().max()) for tensor in model.state(model.names("head")).values())  # as it was
    check_independence(shared("bert"), "head", "float32", head_on(model, False, []), slots=16, width=16)


def test_adapters_that_begin_as_zeros_hide_nothing(shared: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Features of an adapted encoder: what a fault in the product of the factors does shows although B is 0 at first."""
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path))
    model = shared("bert", lora=LoraConfig(rank=2))
    (layer, *_) = [module for name, module in model.module.named_modules() if name.endswith("lora_B.default")]
    layer.register_forward_hook(lambda _, __, found: found * (1 + torch.arange(len(found))[:, None, None] * 2.0**-20))
    model.load({})
    assert precision.features_mix(model, torch.float32)


def test_a_fault_that_one_draw_of_weights_hides_is_found(shared: Make) -> None:
    """Two orders of adding 33 to 96 products gave the same sum in up to 4 of 10 draws."""
    model = shared("bert")
    weight = model.module.get_parameter("classifier.weight")
    drawn = list[Tensor]()

    def answer(batch: Batch) -> Sequence[Tensor]:
        drawn.append(weight.detach().clone())
        places = torch.arange(len(batch["labels"]))
        return [1 + places * float(not torch.equal(drawn[0], weight))]

    with pytest.raises(PrivacyError):
        check_independence(model, "full", "float32", answer, slots=4, lengths=[8])


def test_a_verdict_is_kept_for_what_decides_it(shared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_independence, "features_mix", lambda *_: False)
    model = shared("bert")
    calls = list[int]()
    model.train_only(model.names("head"))

    def tried(slots: int) -> int:
        before = len(calls)
        check_independence(model, "head", "float32", head_on(model, False, calls), slots=slots, width=16)
        return len(calls) - before

    assert tried(16) > 0
    model.load(zeros(model))
    assert tried(16) == 0  # another state
    assert tried(32) > 0  # another shape
    model.train_only([name for name in model.names("head") if "weight" in name])
    assert tried(16) > 0  # other trained parameters
    torch.set_num_threads(2)
    try:
        assert tried(16) > 0
    finally:
        torch.set_num_threads(1)


# --- with and without one record, the others have the same bits

TEXTS = st.lists(
    st.lists(st.sampled_from([*WORDS, "[PAD]", "[SEP]"]), min_size=1, max_size=31).map(" ".join), min_size=2, max_size=9
)


@pytest.mark.parametrize(("kind", "precision"), crossed([*ARCHITECTURES, "roberta"], ["float32", "bfloat16"]))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS, data=st.data())
def test_without_one_record_the_others_have_the_same_features(
    models: Callable[[str], TrainableModel], kind: str, precision: str, texts: list[str], data: st.DataObject, no_cache: None
) -> None:
    model = models(kind)
    model.load({})
    gone = data.draw(st.integers(0, len(texts) - 1))
    order = data.draw(st.permutations([i for i in range(len(texts)) if i != gone]))
    whole = get_features(model, texts, {}, precision)
    rest = get_features(model, [texts[i] for i in order], {}, precision)
    assert torch.equal(rest, whole[list(order)])


@pytest.mark.parametrize(("kind", "low"), crossed([*ARCHITECTURES, "roberta"], [False, True]))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS, data=st.data())
def test_without_one_record_the_others_have_the_same_logits(
    models: Callable[[str], TrainableModel], kind: str, low: bool, texts: list[str], data: st.DataObject
) -> None:
    model = models(kind)
    gone = data.draw(st.integers(0, len(texts) - 1))
    rest = [text for i, text in enumerate(texts) if i != gone]
    whole = fixed_logits(model, texts, low)
    del whole[gone]
    assert all(torch.equal(one, other) for one, other in zip(fixed_logits(model, rest, low), whole, strict=True))


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Features are computed every time."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "file" / "cache"))


@torch.no_grad()
def fixed_logits(model: TrainableModel, texts: list[str], low: bool) -> list[Tensor]:
    task = model.loaded.task
    reader = model.loaded.reader
    examples = task.examples(reader, model.loaded.max_length, texts, [0] * len(texts))
    collate = task.collator(model.module, reader, model.device)
    found: dict[int, Tensor] = {}
    for rows, length in fixed_batches(range(len(texts)), lambda i: task.bucket(examples[i], model.loaded.max_length), 6):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            given = logits(model.module, collate([examples[i] for i in rows], length, 6))
        found |= dict(zip(rows, given, strict=False))
    return [found[i] for i in range(len(texts))]


def test_rounding_alone_is_told_from_reading_padding(shared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared("bert")
    rounding = error_of(model)
    assert rounding > 0
    monkeypatch.setattr(record_independence, "MAX_PADDING_ERROR", rounding / 2)
    record_independence._padding.pop(model, None)
    record_independence.check_padding(model)
    record_independence._padding.pop(model, None)


def test_float64_is_for_the_block_alone(shared: Make) -> None:
    model = shared("llama")
    held = [*model.module.parameters(), *model.module.buffers()]
    before = [(tensor.data_ptr(), tensor.dtype, tensor.clone()) for tensor in held]
    with pytest.raises(ValueError, match="inside"), record_independence.in_float64(model.module):
        assert {p.dtype for p in model.module.parameters()} == {torch.float64}
        raise ValueError("inside")
    for tensor, (place, dtype, value) in zip(held, before, strict=True):
        assert (tensor.data_ptr(), tensor.dtype) == (place, dtype)
        assert torch.equal(tensor, value)


def test_loud_padding_leaves_a_tied_output_layer_alone(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "tied", "llama", tied=True)
    model = TrainableModel(load_model(ModelConfig(base=str(base)), (), 7, "causal-lm"), None, 7, torch.device("cpu"))
    loaded = model.loaded
    batch = loaded.task.collator(model.module, loaded.reader, model.device)(loaded.task.samples(loaded.reader)[:1])
    padded = {**batch, "input_ids": torch.full_like(batch["input_ids"], loaded.reader.pad_token_id)}
    table = model.loaded.module.get_input_embeddings()
    with torch.no_grad():
        quiet = loaded.task.scores(model.module, batch)
        with record_independence._loud_padding(model):
            assert torch.equal(loaded.task.scores(model.module, batch), quiet)
            loud = table(padded["input_ids"])
        assert float(loud.norm()) > 10 * float(table(padded["input_ids"]).norm())
